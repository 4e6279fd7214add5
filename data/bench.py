"""What the method costs, as multiples of direct inference: everything measured in turn, in one run.

    python data/bench.py                                     # a 135M model, a SealTool-like prompt
    python data/bench.py --shape qwen2.5-0.5b --device cuda --dtype bfloat16 --batch 16
    python data/bench.py --shape embedded --data data/demo.jsonl
    python data/bench.py batching                            # the embedded model: samples at once, memory per sample
    python data/bench.py computed                            # real models: memory and seconds, computed, not measured

Weights are random (the embedded model's are not). Random weights never write a valid draft, so lengths are forced and
the pair to train on is supplied: every stage runs, in every round. The direct answer that ttsi.py makes of labelled
samples only to compare with is left out (not in `batching`, which is the default run). PEFT's row appears if it is
installed: its usual loop, AdamW, one sample after the other. Each ratio is one of medians; in brackets the three quartiles
of the ratios within a round, which a machine that slows down and recovers disturbs less.
"""
import argparse
import dataclasses
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import torch  # noqa: E402
import transformers  # noqa: E402
import ttsi  # noqa: E402

SHAPES = {
    "smollm-135m": lambda: transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=8192),
    "smollm-360m": lambda: transformers.LlamaConfig(
        vocab_size=49152, hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15,
        num_key_value_heads=5, tie_word_embeddings=True, max_position_embeddings=8192),
    "qwen2.5-0.5b": lambda: transformers.Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=32768),
    "qwen2.5-1.5b": lambda: transformers.Qwen2Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=32768),
    "llama-3.2-1b": lambda: transformers.LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True, max_position_embeddings=131072),
}
MACHINES = {"laptop CPU, float32": (4, 100e9, 30e9), "laptop GPU, bfloat16": (2, 10e12, 250e9)}  # bytes, flop/s, bytes/s
DRAFT, ANSWER = 90, 30  # tokens, forced
NAMES = ["getFlightStatus", "bookHotelRoom", "searchRestaurants", "convertCurrency", "sendInvitation"]
REQUEST = "Please tell me about the flight to Oslo, number 402 of 12 May, and its gate"
PAIR = {"request": "Please tell me about the flight to Rome, number 117 of 9 June, and its gate",
        "call": {"name": "getFlightStatus", "arguments": {"place": "Rome", "number": "117", "date": "9 June"}}}


def sealtool_like(n, filler=118):
    """n requests, each to five tools of its own, about 600 tokens of prompt, 45 of them after the tools, no labels."""
    tools = lambda i: [{"name": name, "description": (f"{i}: one of the tools on offer, told in some words " * 3)[:filler],
              "parameters": {"type": "object", "properties": {
                  key: {"type": "string"} for key in ("date", "place", "number")}, "required": ["date"]}}
             for name in NAMES]
    return [{"id": str(i), "messages": [{"role": "user", "content": REQUEST}], "tools": tools(i)}
            for i in range(n)]


def load(args):
    model, tok = ttsi.load(ttsi.Config(device=args.device, dtype=args.dtype))
    if args.shape != "embedded":
        torch.manual_seed(0)
        config = SHAPES[args.shape]()
        config.bos_token_id = config.eos_token_id = config.pad_token_id = None
        with torch.device(model.device):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=model.dtype)
        model.eval().requires_grad_(False)
    model.generation_config.eos_token_id = model.config.eos_token_id = tok.eos_token = None  # nothing ends early
    return model, tok


class Bench:
    def __init__(self, model, tok, samples, cfg):
        self.model, self.tok, self.samples, self.cfg = model, tok, samples, cfg
        xs = [ttsi.prepare(model, tok, s, cfg) for s in samples]
        ttsi.note(xs, pairs=[[PAIR]] * len(xs))
        self.xs, self.prompts = xs, [x["ids"] for x in xs]
        self.pairs = [ttsi.pair_tokens(tok, x, PAIR) for x in xs]
        self.tools, self.asked = ttsi.prefill(model, tok, xs, [])

    def tt_si(self, samples=None, memory=None, **changes):
        """Algorithm 1 as it is, with every stage forced to its length and no stage left out."""
        cfg, generate, judge = dataclasses.replace(self.cfg, **changes), ttsi.generate, ttsi.judge
        longer = dataclasses.replace(cfg, max_new_tokens=DRAFT)
        ttsi.generate = lambda model, tok, xs, past, _: generate(model, tok, xs, past, longer)
        ttsi.judge = lambda text, *_: {"text": text, "verdict": "kept", "pair": PAIR}
        try:
            rows = ttsi.tt_si(self.model, self.tok, samples or self.samples, cfg, memory=memory)
        finally:
            ttsi.generate, ttsi.judge = generate, judge
        stages = {"prefill", "score", *(["generate", "train", "answer"] if cfg.tau > 1 else ["direct"])}
        assert all(set(x["cost"]) == stages and not x["error"] for x in rows), [x["cost"] for x in rows]
        least = {"generate": DRAFT, "answer": ANSWER, "direct": ANSWER}
        assert all(x["cost"][s][1] >= n for x in rows for s, n in least.items() if s in stages), "it ended early"
        return rows

    def direct(self):
        return ttsi.decode(self.model, self.tok, self.prompts, [len(p) for p in self.prompts], ANSWER)

    @torch.no_grad()
    def library_generate(self):
        width = max(map(len, self.prompts))
        ids, mask = (torch.tensor(rows, device=self.model.device) for rows in (
            [[0] * (width - len(p)) + p for p in self.prompts], [[0] * (width - len(p)) + [1] * len(p) for p in self.prompts]))
        return self.model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=ANSWER, min_new_tokens=ANSWER,
                                   pad_token_id=0)

    @torch.no_grad()
    def score_whole(self):
        return ttsi.logprob(self.model, [span for x in self.xs for span in x["candidates"]])

    def train(self, adapt, epochs):
        past = self.tools if adapt == "suffix" else None
        with ttsi.adapters(self.model, self.xs, self.cfg) as theta:
            ttsi.train(self.model, self.tok, self.xs, theta, past, dataclasses.replace(self.cfg, epochs=epochs))

    def floor(self):
        """Forward and backward through the frozen model alone, as long as a step's longest row is."""
        row, begin = max(self.pairs, key=lambda pair: len(pair[0]))
        ids = torch.tensor([row] * len(self.xs), device=self.model.device)
        embedded = self.model.get_input_embeddings()(ids).requires_grad_()
        n = len(row) - begin
        with torch.enable_grad():
            logits = self.model(inputs_embeds=embedded, logits_to_keep=n + 1, use_cache=False).logits[:, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, -n:].flatten())
            torch.autograd.grad(loss, embedded)

    def peft(self):
        """The usual loop: an adapter built anew for each sample, the library's own loss, five AdamW steps, torn down."""
        from peft import LoraConfig, get_peft_model
        for row, begin in self.pairs:
            wrapped = get_peft_model(self.model, LoraConfig(
                r=self.cfg.lora_rank, lora_alpha=self.cfg.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"))
            ids = torch.tensor([row], device=self.model.device)
            labels = ids.masked_fill(torch.arange(ids.shape[1], device=ids.device) < begin, -100)
            adam = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-4)
            for _ in range(self.cfg.epochs):
                wrapped(input_ids=ids, labels=labels, use_cache=False).loss.backward()
                adam.step()
                adam.zero_grad()
            self.model = wrapped.unload()
            self.model.requires_grad_(False)


def measure(things, rounds, device):
    """{name: function} -> {name: its seconds in each round}; in turn, after a round that warms up."""
    seconds = {name: [] for name in things}
    for r in range(rounds + 1):
        for name, f in things.items():
            print(f"\rround {r} of {rounds}: {name:40}", end="", file=sys.stderr)
            start = time.perf_counter()
            f()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name] += [time.perf_counter() - start] * (r > 0)
    print("\r" + " " * 60 + "\r", end="", file=sys.stderr)
    return seconds


def over(a, b):
    """Seconds of two things in the same rounds -> (ratio of their medians, the three quartiles of the ratios)."""
    ratios = sorted(x / y for x, y in zip(a, b))
    return (statistics.median(a) / statistics.median(b), ratios[len(ratios) // 4], statistics.median(ratios),
            ratios[-1 - len(ratios) // 4])


def show(ratio):
    return "{:.2f} [{:.2f}, {:.2f}, {:.2f}]".format(*ratio)


TARGETS = [("certain", "direct", "at most 1.1"), ("uncertain, suffix", "direct", "at most 3"),
           ("T, PEFT", "T, suffix", "at least 4"), ("T, PEFT", "T, full", "at least 1"),
           ("H, whole prompts", "H, after the prompt", "at least 4"), ("T, full", "T, floor of full", "at most 1.2")]


def costs(args):
    model, tok = load(args)
    samples = list(ttsi.read_jsonl(args.data, ttsi.to_sample).values()) if args.data else sealtool_like(args.batch)
    samples = [{k: v for k, v in s.items() if k != "call"} for s in samples[:args.batch]]
    cfg = ttsi.Config(max_new_tokens=ANSWER, drafts=1, attempts=1, shuffle=False)
    bench = Bench(model, tok, samples, cfg)
    x, steps = bench.xs[0], cfg.epochs
    things = {
        "direct": bench.direct, "direct, transformers.generate": bench.library_generate,
        "prompt alone": lambda: ttsi.prefill(model, tok, bench.xs, []),
        "certain": lambda: bench.tt_si(tau=0.0),
        "certain, tools read before": lambda: bench.tt_si(tau=0.0, memory=[bench.tools]),
        "uncertain, suffix": lambda: bench.tt_si(tau=2.0),
        "uncertain, suffix, tools read before": lambda: bench.tt_si(tau=2.0, memory=[bench.tools]),
        "uncertain, full": lambda: bench.tt_si(tau=2.0, adapt="full"),
        "H, after the prompt": lambda: ttsi.score(model, tok, bench.xs, bench.asked, cfg),
        "H, whole prompts": bench.score_whole,
        "T, suffix": lambda: bench.train("suffix", steps), "T, full": lambda: bench.train("full", steps),
        "T, floor of full": lambda: [bench.floor() for _ in range(steps)]}
    if importlib.util.find_spec("peft"):
        things["T, PEFT"] = bench.peft
    if len(samples) > 1:
        things["uncertain, suffix, one by one"] = lambda: [bench.tt_si([s], tau=2.0) for s in samples]
    shape = (f"{args.shape}: {model.num_parameters():,} parameters, {model.dtype} on {model.device}, "
             f"{torch.get_num_threads()} threads; {len(x['names'])} tools, prompt {len(x['ids'])} tokens, "
             f"{len(x['ids']) - x['head']} after the tools, pair {len(bench.pairs[0][0]) - x['head']}; draft {DRAFT}, answer "
             f"{ANSWER}, {steps} steps, batch {len(samples)}, {args.rounds} rounds")
    parse, ttsi.parse = ttsi.parse, lambda text: None  # a closed JSON object ends nothing, either
    try:
        seconds = measure(things, args.rounds, model.device)
    finally:
        ttsi.parse = parse
    rows = {name: {"seconds": statistics.median(s), "direct": over(s, seconds["direct"])} for name, s in seconds.items()}
    targets = [(a, b, over(seconds[a], seconds[b]), wanted) for a, b, wanted in TARGETS if a in seconds]
    read = rows["prompt alone"]["seconds"]
    step = (rows["direct"]["seconds"] - read) / ANSWER / (read / len(x["ids"]))
    text = [shape, "", "| | seconds | x direct |", "|---|---|---|"]
    text += [f'| {n} | {r["seconds"]:.3f} | {show(r["direct"])} |' for n, r in rows.items()]
    text += ["", "| ratio | here | wanted |", "|---|---|---|"]
    text += [f"| {a} / {b} | {show(r)} | {wanted} |" for a, b, r, wanted in targets]
    text += ["", f"a token that is written takes as long as {step:.0f} that are read"]
    return {"shape": shape, "rows": rows, "targets": targets, "tokens read per token written": step}, text


def resident():
    """MB in use now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def batching(args):
    """The embedded model on its own data, as `python ttsi.py` runs it."""
    cfg = ttsi.Config(device=args.device, dtype=args.dtype)
    model, tok = ttsi.load(cfg)
    samples = list(ttsi.read_jsonl(args.data or cfg.data, ttsi.to_sample).values())

    def run(batch, items, after=lambda: None):
        memory = []
        for k in range(0, len(items), batch):
            ttsi.tt_si(model, tok, items[k:k + batch], cfg, memory=memory)
            after()
    sizes, few = (1, 5, 25, 50), samples[:50]
    seconds = measure({b: lambda b=b: run(b, few) for b in sizes}, args.rounds, model.device)
    fast = {b: over(seconds[1], s) for b, s in seconds.items()}
    peaks = {}  # of processes of their own, on a CPU
    for b in sizes:
        flags = ["--batch-size", str(b), "--limit", str(len(few)), "--data", args.data or cfg.data]
        code = "import sys, ttsi; ttsi.main(sys.argv[1:]); print(open('/proc/self/status').read())"
        status = subprocess.run([sys.executable, "-c", code, *flags], check=True, cwd=HERE.parent, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
        peaks[b] = int(status.split("VmHWM:")[1].split()[0]) / 1e3
    many, used = [dict(s, id=f'{s["id"]}-{k}') for k in range(10) for s in samples][:args.items], []
    run(25, many, lambda: used.append(resident()))
    half = used[len(used) // 2:]
    slope = statistics.linear_regression(range(len(half)), half).slope / 25 * 1000 if len(half) > 1 else None
    text = [f"embedded, {model.device}, {torch.get_num_threads()} threads, {len(few)} samples, {args.rounds} rounds", "",
            "| samples at once | samples/s | x one at a time | peak memory, MB |", "|---|---|---|---|"]
    text += [f"| {b} | {len(few) / statistics.median(seconds[b]):.1f} | {show(fast[b])} | {peaks[b]:.0f} |" for b in sizes]
    text += ["", f"{(peaks[sizes[-1]] - peaks[1]) / (sizes[-1] - 1):.1f} MB for each sample more; over {len(many)} samples, "
             f"25 at once, memory in use: {used[0]:.0f} MB after the first batch, {used[len(used) // 2]:.0f} after half of them,"
             f" {used[-1]:.0f} at the end"]
    return {"seconds": {b: statistics.median(s) for b, s in seconds.items()}, "faster": fast, "peak MB": peaks,
            "MB in use": used, "MB per 1000 samples in the second half": slope}, text


def computed(_):
    """What a sample would take: the roofline of a forward pass, the larger of its arithmetic and of reading the weights."""
    prompt, asked, drafting, drafts, steps, pair = 581, 46, 96, 4, 5, 74  # tokens, as in `costs`; the defaults of ttsi.py
    text = ["| shape | parameters | adapter | machine | memory | direct | certain | uncertain |", "|---|---|---|---|---|---|---|---|"]
    report = {}
    for shape, make in SHAPES.items():
        config = make()
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        P, layers, V, h = model.num_parameters(), config.num_hidden_layers, config.vocab_size, config.hidden_size
        adapter = sum(ttsi.Config.lora_rank * (m.in_features + m.out_features) for m in ttsi.linear_layers(model))
        for machine, (size, flops, bandwidth) in MACHINES.items():
            cost = lambda tokens, passes=1: passes * max(2 * P * tokens / flops, size * P / bandwidth)
            kv = 2 * layers * config.num_key_value_heads * (h // config.num_attention_heads) * size  # bytes a token
            memory = size * P + 2 * 4 * adapter + kv * (prompt + drafts * (prompt + drafting + DRAFT))
            memory += pair * (layers * 34 * h * size + 3 * 4 * V)  # activations of a step; its logits, float32
            direct = cost(prompt) + ANSWER * cost(1)
            certain = direct + cost(len(NAMES) * 8)
            uncertain = cost(prompt) + cost(len(NAMES) * 8) + cost(drafting) + DRAFT * cost(drafts) + steps * cost(pair, 2)
            uncertain += cost(asked) + ANSWER * cost(1)
            report[f"{shape}, {machine}"] = {"memory": memory, "direct": direct, "certain": certain, "uncertain": uncertain}
            text.append(f"| {shape} | {P / 1e6:.0f} M | {adapter / 1e6:.1f} M | {machine} | {memory / 1e9:.1f} GB | "
                        f"{direct:.2f} s | {certain:.2f} s | {uncertain:.2f} s |")
    return report, text


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", nargs="?", choices=["costs", "batching", "computed"], default="costs")
    p.add_argument("--shape", choices=[*SHAPES, "embedded"], default="smollm-135m")
    p.add_argument("--data", default="", help="a canonical file; default: a built-in SealTool-like prompt, or the demo")
    p.add_argument("--batch", type=int, default=1, help="samples at once, for costs")
    p.add_argument("--items", type=int, default=1000, help="samples over which batching looks at the memory")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="auto")
    p.add_argument("--json", action="store_true", help="the numbers, in place of the table")
    args = p.parse_args(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT's
    ttsi.transformers.logging.disable_progress_bar()
    report, text = {"costs": costs, "batching": batching, "computed": computed}[args.what](args)
    print(json.dumps(report) if args.json else "\n".join(text))
    return report


if __name__ == "__main__":
    main()
