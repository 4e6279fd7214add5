"""What the method costs, as multiples of direct inference: one sample, everything in one run.

    python data/bench.py                                  # a 135M model, a SealTool-like prompt
    python data/bench.py --quick                          # the embedded model, one round
    python data/bench.py --shape qwen2.5-0.5b --device cuda --dtype bfloat16
    python data/bench.py --shape embedded --data data/demo.jsonl
    python data/bench.py computed                         # real models: computed, not measured

Weights are random (the embedded model's are not). Random weights never write a valid draft, so
lengths are forced and the pair to train on is supplied: every stage runs, in every round. The
direct answer that ttsi.py makes of labelled samples only to compare with is left out. PEFT's row
appears if it is installed: its usual loop, AdamW. Each ratio is one of medians; in brackets the
three quartiles of the ratios within a round, which a machine that slows down disturbs less.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import os
import statistics
import sys
import time
import warnings
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch  # noqa: E402
import transformers  # noqa: E402

import ttsi  # noqa: E402

FIELDS = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"]
FIELDS += ["num_attention_heads", "num_key_value_heads", "max_position_embeddings"]
SHAPES = {
    "smollm-135m": (transformers.LlamaConfig, 49152, 576, 1536, 30, 9, 3, 8192),
    "smollm-360m": (transformers.LlamaConfig, 49152, 960, 2560, 32, 15, 5, 8192),
    "qwen2.5-0.5b": (transformers.Qwen2Config, 151936, 896, 4864, 24, 14, 2, 32768),
    "qwen2.5-1.5b": (transformers.Qwen2Config, 151936, 1536, 8960, 28, 12, 2, 32768),
    "llama-3.2-1b": (transformers.LlamaConfig, 128256, 2048, 8192, 16, 32, 8, 131072),
}
NO_ENDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
MACHINES = {  # bytes a weight, flop/s, bytes/s
    "laptop CPU, float32": (4, 100e9, 30e9),
    "laptop GPU, bfloat16": (2, 10e12, 250e9),
}
DRAFT, ANSWER = 90, 30  # tokens, forced
NAMES = ["getFlightStatus", "bookHotelRoom", "searchRestaurants", "convertCurrency"]
NAMES += ["sendInvitation"]
REQUEST = "Please tell me about the flight to {}, and its gate"
CALL = {"name": NAMES[0], "arguments": {"place": "Rome", "number": "117", "date": "9 June"}}
PAIR = {"request": REQUEST.format("Rome, number 117 of 9 June"), "call": CALL}
TARGETS = [
    ("certain", "direct", "at most 1.1"),
    ("uncertain, suffix", "direct", "at most 3"),
    ("T, PEFT", "T, suffix", "at least 4"),
    ("T, PEFT", "T, full", "at least 1"),
    ("H, whole prompts", "H, after the prompt", "at least 4"),
    ("T, full", "T, floor of full", "at most 1.2"),
]


def sealtool_like(filler=118):
    """A sample: five tools, about 600 tokens of prompt, 45 of them after the tools, no label."""
    text = "0: one of the tools on offer, told in some words " * 3
    properties = {key: {"type": "string"} for key in ("date", "place", "number")}
    schema = {"type": "object", "properties": properties, "required": ["date"]}
    tools = [{"name": n, "description": text[:filler], "parameters": schema} for n in NAMES]
    request = REQUEST.format("Oslo, number 402 of 12 May")
    return {"id": "0", "messages": [{"role": "user", "content": request}], "tools": tools}


def shape_config(shape):
    """The configuration of a model of this shape."""
    kind, *values = SHAPES[shape]
    return kind(**dict(zip(FIELDS, values, strict=True)), **NO_ENDS, tie_word_embeddings=True)


def load(args):
    """-> (model of the shape asked for, the embedded tokenizer), neither with an end token."""
    cfg = ttsi.Config(device=args.device, dtype=args.dtype)
    model, tok = ttsi.load(cfg.model, cfg)
    if args.shape != "embedded":
        torch.manual_seed(0)
        config, dtype = shape_config(args.shape), model.dtype
        with torch.device(model.device):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.eval().requires_grad_(False)
    model.generation_config.eos_token_id = tok.eos_token = None
    return model, tok


def forced():
    """While it is open, every draft and answer has its full length, and PAIR is trained on."""
    generate = ttsi.generate

    def long(model, tok, x, after_tools, logp, cfg, supplied=None):
        cfg = dataclasses.replace(cfg, max_new_tokens=DRAFT)
        return generate(model, tok, x, after_tools, logp, cfg, supplied)

    def judge(text, *_):
        return {"text": text, "verdict": "kept", "pair": PAIR}

    # A parse of None: what looks like a call ends nothing.
    return mock.patch.multiple(
        ttsi, generate=long, judge=judge, parse=lambda text: ({}, ""), draft_over=lambda text: False
    )


class Bench:
    """A model and a sample, and what is to be timed: a method each."""

    def __init__(self, model, tok, sample, cfg):
        self.model, self.tok, self.sample, self.cfg = model, tok, sample, cfg
        self.x = ttsi.prepare(tok, sample, cfg)
        self.pair = ttsi.pair_span(self.x, PAIR)
        self.nothing = ttsi.Prefix(model, [])
        self.after_tools = ttsi.Prefix(model, self.x.ids[: self.x.head])
        self.after_prompt = ttsi.Prefix(model, self.x.ids[:-1], self.after_tools)

    def tt_si(self, **changes):
        """Algorithm 1 as it is, with no stage left out."""
        cfg = dataclasses.replace(self.cfg, **changes)
        result = ttsi.tt_si(self.model, self.tok, self.sample, cfg)
        stages, least = {"prefill", "score", "answer"}, {"answer": ANSWER}
        if cfg.tau > 1:
            stages, least = stages | {"generate", "train"}, least | {"generate": DRAFT}
        assert result.cost.keys() == stages, (result.decision, result.cost)
        assert all(result.cost[stage][1] >= n for stage, n in least.items()), "it ended early"

    @torch.no_grad()
    def library_generate(self):
        """The base model's answer, prompt included."""
        ids = torch.tensor([self.x.ids], device=self.model.device)
        limits = {"max_new_tokens": ANSWER, "min_new_tokens": ANSWER, "pad_token_id": 0}
        self.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **limits)

    @torch.no_grad()
    def score_whole(self):
        """H as one would begin: a whole prompt for each candidate."""
        ttsi.logprob(self.x.candidates, self.nothing)

    def train(self, **changes):
        """T, from a new LoRA to its removal."""
        cfg = dataclasses.replace(self.cfg, **changes)
        head = self.after_tools.ids if cfg.adapt == "suffix" else []
        ids = os.path.commonprefix([head, self.pair[0]])
        base = ttsi.Prefix(self.model, ids, self.after_tools)
        with ttsi.temporary_lora(self.model, cfg, ttsi.draw(0, "bench")) as lora:
            ttsi.train([self.pair], base, lora, cfg)

    def floor(self):
        """As many forward and backward passes through the frozen model alone."""
        row, begin = self.pair
        ids, n = torch.tensor([row], device=self.model.device), len(row) - begin
        for _ in range(self.cfg.epochs):
            embedded = self.model.get_input_embeddings()(ids).requires_grad_()
            out = self.model(inputs_embeds=embedded, logits_to_keep=n + 1, use_cache=False)
            loss = torch.nn.functional.cross_entropy(out.logits[0, :-1].float(), ids[0, -n:])
            torch.autograd.grad(loss, embedded)

    def peft(self):
        """The usual loop: an adapter is built, trained by the library's loss, and torn down."""
        from peft import LoraConfig, get_peft_model

        how = {"r": self.cfg.lora_rank, "lora_alpha": self.cfg.lora_alpha}
        how |= {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        wrapped = get_peft_model(self.model, LoraConfig(**how))
        row, begin = self.pair
        ids = torch.tensor([row], device=self.model.device)
        labels = ids.clone()
        labels[:, :begin] = -100
        adam = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-4)
        for _ in range(self.cfg.epochs):
            wrapped(input_ids=ids, labels=labels, use_cache=False).loss.backward()
            adam.step()
            adam.zero_grad()
        self.model = wrapped.unload()
        self.model.requires_grad_(False)


def measure(things, rounds, device):
    """{name: function} -> {name: its seconds in each round}; in turn, after one that warms up."""
    seconds = {name: [] for name in things}
    for r in range(rounds + 1):
        for name, f in things.items():
            print(f"\rround {r} of {rounds}: {name:40}", end="", file=sys.stderr)
            start = time.perf_counter()
            f()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            if r > 0:
                seconds[name].append(time.perf_counter() - start)
    print("\r" + " " * 60 + "\r", end="", file=sys.stderr)
    return seconds


def over(a, b):
    """Seconds of two things in the same rounds -> (ratio of medians, quartiles of the ratios)."""
    ratios = sorted(x / y for x, y in zip(a, b, strict=True))
    outer = len(ratios) // 4
    middle = statistics.median(ratios)
    return statistics.median(a) / statistics.median(b), ratios[outer], middle, ratios[-1 - outer]


def show(ratio):
    """What `over` returns, as text."""
    return "{:.2f} [{:.2f}, {:.2f}, {:.2f}]".format(*ratio)


def costs(args):
    """Every stage is timed -> (report, lines of text)."""
    model, tok = load(args)
    sample = sealtool_like()
    if args.data:
        sample = next(iter(ttsi.read_jsonl(args.data, ttsi.to_sample).values()))
    cfg = ttsi.Config(max_new_tokens=ANSWER, drafts=1, attempts=1, shuffle=False)
    bench = Bench(model, tok, sample, cfg)
    x = bench.x
    things = {
        "direct": functools.partial(ttsi.write, tok, x.ids, bench.nothing, cfg),
        "direct, transformers.generate": bench.library_generate,
        "prompt alone": functools.partial(ttsi.Prefix, model, x.ids[:-1]),
        "certain": functools.partial(bench.tt_si, tau=0.0),
        "uncertain, suffix": functools.partial(bench.tt_si, tau=2.0),
        "uncertain, full": functools.partial(bench.tt_si, tau=2.0, adapt="full"),
        "H, after the prompt": functools.partial(ttsi.score, x, bench.after_prompt),
        "H, whole prompts": bench.score_whole,
        "T, suffix": bench.train,
        "T, full": functools.partial(bench.train, adapt="full"),
        "T, floor of full": bench.floor,
    }
    if importlib.util.find_spec("peft"):
        things["T, PEFT"] = bench.peft
    with forced():
        seconds = measure(things, args.rounds, model.device)
    rows = {}
    for name, spent in seconds.items():
        median, ratio = statistics.median(spent), over(spent, seconds["direct"])
        rows[name] = {"seconds": median, "direct": ratio}
    targets = []
    for a, b, wanted in TARGETS:
        if a in seconds:
            targets.append((a, b, over(seconds[a], seconds[b]), wanted))

    read = rows["prompt alone"]["seconds"]
    written = (rows["direct"]["seconds"] - read) / ANSWER
    step = written / (read / len(x.ids))
    shape = (
        f"{args.shape}: {model.num_parameters():,} parameters, {model.dtype} on {model.device},"
        f" {torch.get_num_threads()} threads; {len(x.tools)} tools, prompt {len(x.ids)} tokens,"
        f" {len(x.ids) - x.head} after the tools, pair {len(bench.pair[0]) - x.head};"
        f" draft {DRAFT}, answer {ANSWER}, {cfg.epochs} steps, {args.rounds} rounds"
    )
    text = [shape, "", "| | seconds | x direct |", "|---|---|---|"]
    text += [f"| {n} | {r['seconds']:.3f} | {show(r['direct'])} |" for n, r in rows.items()]
    text += ["", "| ratio | here | wanted |", "|---|---|---|"]
    text += [f"| {a} / {b} | {show(ratio)} | {wanted} |" for a, b, ratio, wanted in targets]
    text += ["", f"a token that is written takes as long as {step:.0f} that are read"]
    report = {"shape": shape, "rows": rows, "targets": targets}
    return report | {"tokens read per token written": step}, text


def computed(_):
    """What a sample would take, by the roofline of its forward passes -> (report, lines).

    A pass takes the larger of its arithmetic and of reading the weights.
    """
    prompt, asked, drafting, drafts, steps, pair = 581, 46, 96, 4, 5, 74  # tokens, as in `costs`
    columns = "| shape | parameters | adapter | machine | memory | direct | certain | uncertain |"
    report, text = {}, [columns, "|---" * 8 + "|"]
    for shape in SHAPES:
        config = shape_config(shape)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        weights, width = model.num_parameters(), config.hidden_size
        layers = config.num_hidden_layers
        linear = ttsi.linear_layers(model)
        adapter = sum(ttsi.Config.lora_rank * (m.in_features + m.out_features) for m in linear)
        for machine, (size, flops, bandwidth) in MACHINES.items():
            kv_width = config.num_key_value_heads * (width // config.num_attention_heads)
            kv = 2 * layers * kv_width * size  # bytes a token
            memory = size * weights + 2 * 4 * adapter
            memory += kv * (prompt + drafts * (prompt + drafting + DRAFT))
            memory += pair * (layers * 34 * width * size)  # activations of a step
            memory += pair * 3 * 4 * config.vocab_size  # its logits, float32

            def cost(tokens, w=weights, size=size, flops=flops, bandwidth=bandwidth):
                return max(2 * w * tokens / flops, size * w / bandwidth)

            names, one = cost(len(NAMES) * 8), cost(1)
            direct = cost(prompt) + ANSWER * one
            adapting = cost(drafting) + DRAFT * cost(drafts) + steps * 2 * cost(pair)
            uncertain = cost(prompt) + names + adapting + cost(asked) + ANSWER * one
            seconds = {"direct": direct, "certain": direct + names, "uncertain": uncertain}
            report[f"{shape}, {machine}"] = {"memory": memory} | seconds
            cells = [shape, f"{weights / 1e6:.0f} M", f"{adapter / 1e6:.1f} M", machine]
            cells += [f"{memory / 1e9:.1f} GB", *(f"{s:.2f} s" for s in seconds.values())]
            text.append("| " + " | ".join(cells) + " |")
    return report, text


def main(argv=None):
    """The command line -> the report, as a dict."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("what", nargs="?", choices=["costs", "computed"], default="costs")
    p.add_argument("--shape", choices=[*SHAPES, "embedded"], default="smollm-135m")
    p.add_argument("--data", default="", help="the first sample of this file, not the built-in one")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--quick", action="store_true", help="--shape embedded --rounds 1")
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="auto")
    p.add_argument("--json", action="store_true", help="the numbers, in place of the table")
    args = p.parse_args(argv)
    if args.quick:
        args.shape, args.rounds = "embedded", 1
    warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT's
    transformers.logging.disable_progress_bar()
    report, text = (computed if args.what == "computed" else costs)(args)
    print(json.dumps(report) if args.json else "\n".join(text))
    return report


if __name__ == "__main__":
    main()
