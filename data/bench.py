"""What an answer costs, beside what a user would write otherwise: whole answers, timed in turn.

    python data/bench.py --model FOLDER --data FILE --output F.jsonl   # and flags of ttsi.py
    python data/bench.py --kept --output F.jsonl           # the tables of the rows in that file
    python data/bench.py --grow --model FOLDER --data FILE # peak memory, and cost by size
    python data/bench.py --quick                           # two items of the embedded model

`generate` is transformers' own, greedy, and ends as ttsi does: behind a call or by an end token.
The competent user's TT-SI is the method with PEFT (pip install peft): ttsi's prompts, caches and
scores; as many free drafts, in one batch; a LoRA, wrapped once and reset for each input. It acts
on all tokens, so its steps, as many and on ttsi's pairs, and the answer read whole prompts.
"""

import argparse
import copy
import dataclasses
import importlib.util
import json
import resource
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch  # noqa: E402
import transformers  # noqa: E402

import ttsi  # noqa: E402

RIVALS = [  # in a ratio: above, below, and what is wanted
    ("generate", "generate", ""),
    ("TT-SI, certain", "generate", ", wanted: at most 1.0"),
    ("TT-SI, no pair", "generate", ""),
    ("TT-SI, adapted", "generate", ", wanted: at most 3.5"),
    ("a competent user's TT-SI", "TT-SI, adapted", ", wanted: at least 3.0"),
]
SIZES = [(5, 2, 4), (10, 2, 4), (40, 2, 4), (5, 1, 4), (5, 4, 4), (5, 2, 1), (5, 2, 16)]


# ------------------------------------------------------------------------------------ rivals
@torch.no_grad()
def generate(model, tok, cfg, ids, **how):
    """transformers' own -> texts."""

    def is_over(rows, scores, **_):
        texts = tok.batch_decode(rows[:, len(ids) :])
        return torch.tensor([bool(ttsi.parse(text)) for text in texts], device=rows.device)

    rows = torch.tensor([ids], device=model.device)
    how = {"do_sample": False, "max_new_tokens": cfg.max_new_tokens} | how
    rows = model.generate(rows, stopping_criteria=[is_over], **how)
    return tok.batch_decode(rows[:, len(ids) :])


def wrapped(model, cfg):
    """-> PEFT's model; both share the base parameters, which neither writes."""
    peft = importlib.import_module("peft")
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    lora = peft.LoraConfig(r=cfg.lora_rank, lora_alpha=cfg.lora_alpha, target_modules="all-linear")
    return peft.get_peft_model(twin, lora)


def competent(model, tok, cfg, sample, result):
    """-> (H's margin, the answer); of ttsi's result it takes the pairs, and how many drafts."""
    drafts = len(result.drafts)
    x = ttsi.prepare(tok, sample, cfg)
    with model.disable_adapter():
        after_tools = ttsi.Prefix(model, x.ids[: x.head])
        margin = ttsi.margin(ttsi.score(x, ttsi.Prefix(model, x.ids[:-1], after_tools)))
        ids, _ = ttsi.span(tok, x, ttsi.draft_prompt(model, x.request))
        how = {"cache": ttsi.Prefix(model, ids[:-1], after_tools).copy(drafts), "do_sample": True}
        how |= {"temperature": cfg.temperature, "top_k": 0, "top_p": 1.0}
        generate(model, tok, cfg, ids, num_return_sequences=drafts, **how)
    for layer in model.modules():
        if hasattr(layer, "reset_lora_parameters"):
            layer.reset_lora_parameters("default", init_lora_weights=True)
    adamw = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    spans = [ttsi.span(tok, x, pair["request"], pair["call"]) for pair in result.pairs]
    for _ in range(cfg.epochs):
        loss = -ttsi.logprob(spans, ttsi.Prefix(model, [])).mean()
        loss.backward()
        adamw.step()
        adamw.zero_grad()
    return margin, generate(model, tok, cfg, x.ids)[0]


# ------------------------------------------------------------------------------------- costs
def measure(model, tok, cfg, peft_model, sample):
    """-> a row of one item, which the rivals answer in turn."""
    certain = dataclasses.replace(cfg, tau=0.0)
    ids = ttsi.prepare(tok, sample, cfg).ids
    seconds = {}

    def timed(name, f, *args):
        start = time.perf_counter()
        found = f(*args)  # it ends in text, so no accelerator is still at work
        seconds[name] = round(time.perf_counter() - start, 4)
        return found

    theirs = timed("generate", generate, model, tok, cfg, ids)[0]
    ours = timed("TT-SI, certain", ttsi.tt_si, model, tok, sample, certain).answer
    result = timed("TT-SI", ttsi.tt_si, model, tok, sample, cfg)
    if result.pairs and peft_model:
        timed("a competent user's TT-SI", competent, peft_model, tok, cfg, sample, result)
    # What the gate finds certain was timed twice: the second time counts.
    seconds[f"TT-SI, {result.decision}"] = seconds.pop("TT-SI")
    # Behind an answer without a call, generate's text has the end token, too.
    same = theirs.startswith(ours)
    if not same:
        ttsi.tqdm.write(f"{sample['id']}: generate  {theirs!r}\n{sample['id']}: ttsi      {ours!r}")
    stages = {stage: round(spent, 4) for stage, (spent, _) in result.cost.items()}
    return {"id": sample["id"], "seconds": seconds, "stages": stages, "same": same}


def table(rows):
    """-> text, of the rows of one model. A ratio is of items that have both rivals."""
    lines = [rows[0]["key"], f"{'':26}items  seconds   ratio of medians [quartiles over items]"]
    seconds = [row["seconds"] for row in rows]
    for name, other, wanted in RIVALS:
        both = [(row[name], row[other]) for row in seconds if name in row]
        found = "     none" + ": pip install peft" * ("user" in name)
        if both:
            above, below = map(median, zip(*both, strict=True))
            ratios = torch.tensor([a / b for a, b in both])
            quartiles = [ratios.quantile(part).item() for part in (0.25, 0.5, 0.75)]
            found = f"{above:9.3f}   {above / below:.2f}"
            found += " [{:.2f}, {:.2f}, {:.2f}] x ".format(*quartiles) + other + wanted
        lines.append(f"{name:26}{len(both):5}{found}")
    adapted = [row["stages"] for row in rows if "train" in row["stages"]]
    if adapted:
        parts = [f"{stage} {median(row[stage] for row in adapted):.3f}" for stage in adapted[0]]
        lines.append(f"seconds of an adapted answer: {', '.join(parts)}")
    others = [row["id"] for row in rows if not row["same"]]
    lines.append(f"generate and ttsi answer differently: {', '.join(others) or 'never'}")
    return "\n".join(lines)


def grow(model, tok, cfg, samples):
    """Prints peak memory over many adapted answers, and what one costs by its size."""
    cfg = dataclasses.replace(cfg, tau=2.0)  # adapts all
    unit = 2**20 if sys.platform == "darwin" else 2**10
    for n in range(2 * len(samples) + 1):
        if n in (0, 1, len(samples), 2 * len(samples)):
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
            print(f"peak memory after {n} answers: {peak:.0f} MB", flush=True)
        ttsi.tt_si(model, tok, samples[n % len(samples)], cfg)
    print("\ntools  K  drafts of each  seconds   tokens")
    offered = {tool["name"]: tool for sample in samples for tool in sample["tools"]}
    for n, k, drafts in SIZES:
        sample = samples[0] | {"tools": [*offered.values()][:n]}
        result = ttsi.tt_si(model, tok, sample, dataclasses.replace(cfg, k=k, drafts=drafts))
        seconds, tokens = map(sum, zip(*result.cost.values(), strict=True))
        n = len(sample["tools"])
        print(f"{n:5}{k:3}{drafts:16}{seconds:9.3f}{tokens:9}   {result.decision}", flush=True)


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--grow", action="store_true", help="peak memory, and cost by size")
    parser.add_argument("--kept", action="store_true", help="the table of --output as it is")
    parser.add_argument("--quick", action="store_true", help="two items")
    args, flags = parser.parse_known_args(argv)
    cfg = ttsi.parse_arguments(["--limit", "2" if args.quick else "20", *flags])
    if args.kept:
        with ttsi.advising("--kept", "give an --output of this bench"):
            print(table([*map(json.loads, Path(cfg.output).read_text().splitlines())]))
        return
    data = "demo.jsonl" if cfg.model == ttsi.Config.model else "everyday.jsonl"
    every = ttsi.read_jsonl(cfg.data or ttsi.DATA / data, ttsi.to_sample)
    samples = [*every.values()][: cfg.limit or None]
    model, tok = ttsi.load(cfg.model, cfg)
    # generate reads no more of it than ttsi does.
    ends = model.generation_config.eos_token_id or tok.eos_token_id
    model.generation_config = transformers.GenerationConfig(eos_token_id=ends)
    if args.grow:
        return grow(model, tok, cfg, samples)
    peft_model = wrapped(model, cfg) if importlib.util.find_spec("peft") else None
    where = f"{model.dtype}, {model.device}, threads: {torch.get_num_threads()}"
    key = f"{Path(cfg.model).name}, {where}, {ttsi.key_of(cfg, every, [(model, tok)])}"
    rows = ttsi.whole_rows(Path(cfg.output), key) if cfg.output else {}
    measure(model, tok, cfg, peft_model, samples[0])  # to warm up
    for sample in ttsi.tqdm([sample for sample in samples if sample["id"] not in rows]):
        row = {"key": key} | measure(model, tok, cfg, peft_model, sample)
        rows[row["id"]] = row
        if cfg.output:
            with open(cfg.output, "a") as file:
                file.write(json.dumps(row) + "\n")
    print(table([*rows.values()]))


if __name__ == "__main__":
    try:
        main()
    except (ttsi.InputError, OSError) as e:
        sys.exit(f"bench: {' '.join(str(e).split())}")
