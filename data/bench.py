"""What an answer costs, beside what a user would write otherwise: real prompts, drafts, answers.

    python data/bench.py --model FOLDER --data canonical_dev_200.jsonl --dtype bfloat16
    python data/bench.py --model FOLDER --data canonical_dev_200.jsonl grow   # cost by size
    python data/bench.py --quick                      # the embedded model, two items of its dev

Rivals are timed in turn on each item, in turning order. A ratio is one of medians over items; in
brackets, quartiles of the ratios within an item, which a slowing machine disturbs less.

The rivals are `generate` of transformers, for an answer, and the whole method as a competent user
would write it (`pip install peft`): caches of prompt and tools, candidates in one padded batch,
num_return_sequences for as many free drafts as ours wrote, one PEFT adapter, merged to answer, a
loop on whole prompts; with our pairs and steps. Its adapter acts on all tokens, as `full` does.
"""

import argparse
import copy
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import resource
import statistics
import sys
import time
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import torch  # noqa: E402
import transformers  # noqa: E402
from torch.nn.utils.rnn import pad_sequence  # noqa: E402
from tqdm import tqdm  # noqa: E402

import ttsi  # noqa: E402

GOALS = [  # a rival, its measure, and what is wanted
    ("TT-SI, certain", "generate", "at most 1"),
    ("TT-SI, adapted", "generate", "at most 3"),
    ("a competent user's TT-SI", "TT-SI, adapted", "at least 3"),
]


# --------------------------------------------------------------------------------- the rivals
class Ending(transformers.StoppingCriteria):
    """Ends a text where ours ends."""

    def __init__(self, tok, begin, over):
        self.tok, self.begin, self.over = tok, begin, over

    def __call__(self, ids, scores, **how):
        texts = self.tok.batch_decode(ids[:, self.begin :], skip_special_tokens=True)
        return torch.tensor([bool(self.over(text)) for text in texts], device=ids.device)


def called(text):
    return ttsi.parse(text)[0]


@torch.no_grad()
def generate(model, tok, cfg, ids, over, **how):
    """transformers' own -> texts."""
    rows = torch.tensor([ids], device=model.device)
    how = {"do_sample": False, "pad_token_id": tok.eos_token_id or 0} | how
    how |= {"attention_mask": torch.ones_like(rows), "max_new_tokens": cfg.max_new_tokens}
    out = model.generate(rows, stopping_criteria=[Ending(tok, len(ids), over)], **how)
    return tok.batch_decode(out[:, len(ids) :], skip_special_tokens=True)


class Competent:
    """TT-SI as one writes it with transformers and PEFT."""

    def __init__(self, model, tok, cfg):
        from peft import LoraConfig, get_peft_model

        self.tok, self.cfg = tok, cfg
        how = {"r": cfg.lora_rank, "lora_alpha": cfg.lora_alpha, "target_modules": "all-linear"}
        self.model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **how))
        self.lora = [p for p in self.model.parameters() if p.requires_grad]
        self.layers = [m for m in self.model.modules() if hasattr(m, "reset_lora_parameters")]
        self.base = [m.get_base_layer().weight.detach().clone() for m in self.layers]

    def __call__(self, sample, pairs, drafts):
        """Answers a sample; `pairs` are trained on, after as many `drafts` were written."""
        x = ttsi.prepare(self.tok, sample, self.cfg)
        with self.model.disable_adapter():
            cache, margin = self.score(x)
            assert 0 <= margin <= 1
            cache.crop(x.head - len(x.ids) + 1)  # negative: so many are dropped
            turns = [*x.system, ttsi.turn("user", ttsi.DRAFT + x.request)]
            prompt, _ = ttsi.render(self.tok, self.cfg, x.tools, turns)
            ids = ttsi.to_ids(self.tok, self.cfg, prompt)
            assert ids[: x.head] == x.ids[: x.head], "another list of tools"
            rest = torch.tensor([ids[x.head : -1]], device=self.model.device)
            with torch.no_grad():  # once, for all drafts
                self.model(input_ids=rest, past_key_values=cache, logits_to_keep=1)
            cache.batch_repeat_interleave(drafts)
            how = {"num_return_sequences": drafts, "do_sample": True, "past_key_values": cache}
            how |= {"temperature": self.cfg.temperature, "top_k": 0, "top_p": 1.0}
            generate(self.model, self.tok, self.cfg, ids, ttsi.draft_over, **how)
        self.train([ttsi.pair_span(x, pair) for pair in pairs])
        self.model.merge_adapter()  # a written token is half as dear
        answer = generate(self.model, self.tok, self.cfg, x.ids, called)[0]
        with torch.no_grad():  # to unmerge is inexact in half precision
            for layer, weight in zip(self.layers, self.base, strict=True):
                layer.get_base_layer().weight.copy_(weight)
                layer.merged_adapters.clear()
        return answer

    @torch.no_grad()
    def score(self, x):
        """H -> (the prompt's cache, the margin)."""
        ids = torch.tensor([x.ids], device=self.model.device)
        cache = self.model(input_ids=ids[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
        n, behind = len(x.ids) - 1, copy.deepcopy(cache)
        rows = pad_sequence([torch.tensor(ids[n:]) for ids, _ in x.candidates], batch_first=True)
        rows = rows.to(self.model.device)
        behind.batch_repeat_interleave(len(rows))
        logits = self.model(input_ids=rows, past_key_values=behind).logits.float().log_softmax(-1)
        logp = logits[:, :-1].gather(-1, rows[:, 1:, None])[..., 0]
        inside = torch.tensor([len(ids) - n - 1 for ids, _ in x.candidates], device=rows.device)
        logp[torch.arange(logp.shape[1], device=rows.device) >= inside[:, None]] = 0  # padding
        return cache, ttsi.margin(dict(enumerate(logp.sum(1).tolist())))

    def train(self, spans):
        """T, by PEFT: re-initialised, then steps on whole prompts in one padded batch."""
        for layer in self.layers:
            layer.reset_lora_parameters("default", init_lora_weights=True)
        ids = pad_sequence([torch.tensor(ids) for ids, _ in spans], batch_first=True)
        labels = torch.full_like(ids, -100)
        for row, (whole, begin) in zip(labels, spans, strict=True):
            row[begin : len(whole)] = torch.tensor(whole[begin:])
        last = torch.arange(ids.shape[1])[min(begin for _, begin in spans) - 1 :]  # no other logits
        ids, labels = ids.to(self.model.device), labels[:, last].to(self.model.device)
        adam = torch.optim.AdamW(self.lora, lr=1e-4)
        for _ in range(self.cfg.epochs):
            how = {"labels": labels, "logits_to_keep": last, "use_cache": False}
            self.model(input_ids=ids, **how).loss.backward()
            adam.step()
            adam.zero_grad()


# --------------------------------------------------------------------------------- measurement
def without_pair(model, tok, sample, cfg, tool):
    """The dearest way to no pair: all drafts for the last of the tools are refused."""
    ours = ttsi.judge

    def judge(*args):
        draft = ours(*args)
        refused = draft["pair"] and draft["pair"]["call"]["name"] == tool
        return draft | {"verdict": "refused", "pair": None} if refused else draft

    with mock.patch.object(ttsi, "judge", judge):
        return ttsi.tt_si(model, tok, sample, cfg)


def timed(model, f, *args, **how):
    """-> (seconds, what f returns)."""
    start = time.perf_counter()
    out = f(*args, **how)
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)
    return time.perf_counter() - start, out


def measure(args, samples):
    """Yields {id, seconds by rival, parts, what is told besides} of each item; rivals in turn."""
    cfg = ttsi.Config(model=args.model, device=args.device, dtype=args.dtype)
    model, tok = ttsi.load(args.model, cfg)
    always, peft = dataclasses.replace(cfg, tau=2.0), importlib.util.find_spec("peft")
    competent = peft and Competent(ttsi.load(args.model, cfg)[0], tok, cfg)

    def ours(sample, **changes):
        return ttsi.tt_si(model, tok, sample, dataclasses.replace(cfg, **changes))

    def direct(x):
        return ttsi.write(tok, x.ids, ttsi.Prefix(model, x.ids[:-1]), cfg)

    size = sum(p.numel() * p.element_size() for p in model.parameters())
    there, here_too = torch.ones(2, size // 2, dtype=torch.uint8, device=model.device)
    for turn, sample in enumerate(progress := tqdm(samples[:1] + samples)):  # the first warms up
        x = ttsi.prepare(tok, sample, cfg)
        result = ttsi.tt_si(model, tok, sample, always)  # seeded: the timed one drafts the same
        drafts = len(result.drafts)
        last = sorted(result.logp, key=result.logp.get, reverse=True)[: cfg.k][-1]
        rivals = {
            "generate": partial(generate, model, tok, cfg, x.ids, called),
            "direct": partial(direct, x),
            "TT-SI, certain": partial(ours, sample, tau=0.0),
            "TT-SI, no pair": partial(without_pair, model, tok, sample, always, last),
        }
        if result.pairs:
            rivals["TT-SI, adapted"] = partial(ours, sample, tau=2.0)
            rivals["TT-SI, adapted, full"] = partial(ours, sample, tau=2.0, adapt="full")
        if competent and result.pairs:
            rivals["a competent user's TT-SI"] = partial(competent, sample, result.pairs, drafts)
        names, here, said = [*rivals], {}, {}
        torch.manual_seed(0)  # of the competent user's drafts
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            progress.set_description(name)
            here[name], said[name] = timed(model, rivals[name])
        read, _ = timed(model, ttsi.Prefix, model, x.ids[:-1])
        copied = min(timed(model, there.copy_, here_too)[0] for _ in range(3))
        if turn == 0:
            continue
        cost = said["TT-SI, adapted"].cost if result.pairs else {}
        parts = {part: seconds for part, (seconds, _) in cost.items()}
        written = max(1, len(tok(said["direct"][0], add_special_tokens=False).input_ids))
        parts["a read token"] = read / (len(x.ids) - 1)
        parts["a written token"] = (here["direct"] - read) / written
        parts["the weights, read once"] = copied  # half read, half written
        told = {"drafts": drafts, "adapted": result.decision == "adapted"}
        told["kept"] = sum(draft["verdict"] == "kept" for draft in result.drafts)
        told["same answer"] = said["generate"] == said["direct"]
        here = {name: here[name] for name in rivals}
        yield {"id": sample["id"], "seconds": here, "parts": parts, "told": told}


def over(a, b):
    """{id: seconds} twice -> (ratio of medians, quartiles of the ratios), of items in both."""
    both = a.keys() & b.keys()
    ratios = sorted(a[i] / b[i] for i in both)
    outer, middle = len(ratios) // 4, statistics.median(ratios)
    medians = [statistics.median(seconds[i] for i in both) for seconds in (a, b)]
    return medians[0] / medians[1], ratios[outer], middle, ratios[-1 - outer]


def show(ratio):
    """What `over` returns, as text."""
    return "{:.2f} [{:.2f}, {:.2f}, {:.2f}]".format(*ratio)


def costs(args, samples):
    """-> (report, lines of text). Rows are kept where --output says so, and gone on with."""
    there = Path(args.output).read_text() if Path(args.output).is_file() else ""
    rows = {row["id"]: row for row in map(json.loads, there.splitlines())}
    missing = [sample for sample in samples if sample["id"] not in rows]
    for row in measure(args, missing) if missing else ():
        rows[row["id"]] = row
        if args.output:
            ttsi.save(args.output, [ttsi.dumps(row)], "a")
    spent, parts, totals = {}, {}, Counter()
    for row in rows.values():
        totals.update(row["told"])
        for name, seconds in row["seconds"].items():
            spent.setdefault(name, {})[row["id"]] = seconds
        for part, seconds in row["parts"].items():
            parts.setdefault(part, []).append(seconds)
    text = [
        f"{len(rows)} items, {args.dtype}; drafts kept"
        f" {totals['kept']} of {totals['drafts']}, adapted {totals['adapted']}; `generate` and ours"
        f" give the same direct answer {totals['same answer']} times",
        "",
        "| | items | seconds | x generate |",
        "|---|---|---|---|",
    ]
    for name, seconds in spent.items():
        ratio = show(over(seconds, spent["generate"]))
        text.append(
            f"| {name} | {len(seconds)} | {statistics.median(seconds.values()):.2f} | {ratio} |"
        )
    text += ["", "| part of an adapted answer | seconds, mean |", "|---|---|"]
    units = ("a read token", "a written token", "the weights, read once")
    for part, seconds in parts.items():
        if part not in units:
            text.append(f"| {part} | {statistics.fmean(seconds):.2f} |")
    for part in units:
        text.append(f"| {part} | {statistics.median(parts[part]):.4f} (median) |")
    text += ["", "| ratio | here | wanted |", "|---|---|---|"]
    goals = []
    for a, b, wanted in GOALS:
        if a in spent and spent[a].keys() & spent.get(b, {}).keys():
            goals.append((a, b, over(spent[a], spent[b]), wanted))
            text.append(f"| {a} / {b} | {show(goals[-1][2])} | {wanted} |")
    return {"seconds": spent, "parts": parts, "told": totals, "goals": goals}, text


# -------------------------------------------------------------------------------------- growth
def grown(sample, tools, words, others):
    """A sample with so many tools, the right one among them, and so many more words asked."""
    offered = {t["name"]: t for item in [sample, *others] for t in item["tools"]}
    right = offered.pop(sample["call"]["name"])
    text = sample["messages"][-1]["content"] + " please" * words
    messages = [*sample["messages"][:-1], sample["messages"][-1] | {"content": text}]
    return sample | {"tools": [right, *offered.values()][:tools], "messages": messages}


def alone(args, sample, k):
    """In a process of its own, so that its memory is its own -> (seconds, peak in bytes)."""
    cfg = ttsi.Config(model=args.model, device=args.device, dtype=args.dtype, tau=2.0, k=k)
    model, tok = ttsi.load(args.model, cfg)
    ttsi.tt_si(model, tok, sample, dataclasses.replace(cfg, tau=0.0))  # to warm up
    seconds, result = timed(model, ttsi.tt_si, model, tok, sample, cfg)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if model.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    found = {part: spent for part, (spent, _) in result.cost.items()} | {"all": seconds}
    return found | {"memory": peak, "drafts": len(result.drafts), "decision": result.decision}


def grow(args, samples):
    """-> (report, lines): one item, with more tools, a longer request, more pairs."""
    sample, report, stages = samples[0], {}, ("prefill", "score", "generate", "train", "answer")
    text = [f"| | {' | '.join(stages)} | all, seconds | memory |", "|---" * 8 + "|"]
    sizes = [(5, 0, 2), (10, 0, 2), (40, 0, 2), (5, 200, 2), (5, 0, 4)][: args.limit]
    for tools, words, k in sizes:
        more = grown(sample, tools, words, samples[1:])
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found = pool.apply(alone, (args, more, k))
        name = f"{len(more['tools'])} tools, {words} words more, K = {k}:"
        name += f" {found['decision']}, {found['drafts']} drafts"
        report[name] = found
        cells = [f"{found.get(stage, 0):.2f}" for stage in (*stages, "all")]
        text.append(f"| {name} | {' | '.join(cells)} | {found['memory'] / 1e9:.2f} GB |")
    return report, text


def main(argv=None):
    """The command line -> the report, as a dict."""
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument("what", nargs="?", choices=["costs", "grow"], default="costs")
    p.add_argument("--model", default=ttsi.Config.model)
    p.add_argument("--data", default=str(HERE / "dev.jsonl"))
    p.add_argument("--limit", type=int, default=30, help="items")
    p.add_argument("--output", default="", help="a row for each item goes here; goes on with it")
    p.add_argument("--quick", action="store_true", help="--limit 2")
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="auto")
    args = p.parse_args(argv)
    args.limit = 2 if args.quick else args.limit
    warnings.filterwarnings("ignore")  # of PEFT and transformers, about each other
    transformers.logging.set_verbosity_error()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    samples = list(ttsi.read_jsonl(args.data, ttsi.to_sample).values())[: args.limit]
    report, text = (grow if args.what == "grow" else costs)(args, samples)
    print(*text, sep="\n")
    return report


if __name__ == "__main__":
    try:
        main()
    except ttsi.InputError as e:
        sys.exit(f"bench: {e}")
