"""What the method costs, as multiples of direct inference: everything measured in turn, in one run.

    python data/bench.py                                     # a 135M model, a SealTool-like prompt
    python data/bench.py --shape qwen2.5-0.5b --device cuda --dtype bfloat16 --batch 16
    python data/bench.py --shape embedded --data data/demo.jsonl

Weights are random (the embedded model's are not). Random weights never write a valid draft, so lengths are forced and
the pair to train on is supplied: every stage runs, in every round. The direct answer that ttsi.py makes of labelled
samples only to compare with is left out. PEFT's rows appear if it is installed.
"""
import argparse
import dataclasses
import importlib.util
import json
import statistics
import sys
import time
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
    "qwen2.5-0.5b": lambda: transformers.Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=32768),
    "qwen2.5-1.5b": lambda: transformers.Qwen2Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=32768),
}
DRAFT, ANSWER = 90, 30  # tokens, forced
NAMES = ["getFlightStatus", "bookHotelRoom", "searchRestaurants", "convertCurrency", "sendInvitation"]
REQUEST = "Please tell me about the flight to Oslo, number 402 of 12 May, and its gate"
PAIR = {"request": "Please tell me about the flight to Rome, number 117 of 9 June, and its gate",
        "call": {"name": "getFlightStatus", "arguments": {"place": "Rome", "number": "117", "date": "9 June"}}}


def sealtool_like(n, filler=118):
    """n requests to five tools, about 600 tokens of prompt, 45 of them after the tools, no labels."""
    tools = [{"name": name, "description": ("one of the tools on offer, told in some words " * 3)[:filler],
              "parameters": {"type": "object", "properties": {
                  key: {"type": "string"} for key in ("date", "place", "number")}, "required": ["date"]}}
             for name in NAMES]
    return [{"id": str(i), "messages": [{"role": "user", "content": REQUEST}], "tools": tools} for i in range(n)]


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
        self.pair, self.begin = ttsi.pair_tokens(tok, xs[0], PAIR)
        self.tools = ttsi.prefill(model, tok, xs, [x["ids"][:x["head"]] for x in xs])
        self.asked = ttsi.prefill(model, tok, xs, [x["ids"][:-1] for x in xs], self.tools)

    def tt_si(self, **changes):
        """Algorithm 1 as it is, with every stage forced to its length."""
        cfg, generate, judge = dataclasses.replace(self.cfg, **changes), ttsi.generate, ttsi.judge
        longer = dataclasses.replace(cfg, max_new_tokens=DRAFT)
        ttsi.generate = lambda model, tok, xs, past, _: generate(model, tok, xs, past, longer)
        ttsi.judge = lambda tok, draft, text, *_: {"text": text, "verdict": "kept", "pair": PAIR}
        try:
            rows = ttsi.tt_si(self.model, self.tok, self.samples, cfg)
        finally:
            ttsi.generate, ttsi.judge = generate, judge
        stages = {"prefill", "score", *(["generate", "train", "answer"] if cfg.tau > 1 else ["direct"])}
        assert all(set(x["cost"]) == stages and not x["error"] for x in rows), [x["cost"] for x in rows]
        return rows

    def direct(self):
        return ttsi.decode(self.model, self.tok, self.prompts, [len(p) for p in self.prompts], ANSWER)

    @torch.no_grad()
    def library_generate(self):
        ids = torch.tensor(self.prompts[:1] * len(self.prompts), device=self.model.device)
        return self.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=ANSWER,
                                   min_new_tokens=ANSWER, pad_token_id=0)

    @torch.no_grad()
    def score_whole(self):
        rows, begin = zip(*(c for x in self.xs for c in x["candidates"]))
        return ttsi.token_logprobs(self.model, rows, [len(r) - b for r, b in zip(rows, begin)])

    def train(self, adapt, epochs):
        past = self.tools if adapt == "suffix" else None
        with ttsi.adapters(self.model, self.xs, self.cfg) as theta:
            ttsi.train(self.model, self.tok, self.xs, theta, past, dataclasses.replace(self.cfg, epochs=epochs))

    def floor(self):
        """Forward and backward through the frozen model alone, as long as a step's rows are."""
        ids = torch.tensor([self.pair] * len(self.xs), device=self.model.device)
        embedded = self.model.get_input_embeddings()(ids).requires_grad_()
        n = len(self.pair) - self.begin
        with torch.enable_grad():
            logits = self.model(inputs_embeds=embedded, logits_to_keep=n + 1, use_cache=False).logits[:, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, -n:].flatten())
            torch.autograd.grad(loss, embedded)

    def peft(self):
        """The usual loop: an adapter built anew for each sample, the library's own loss, five AdamW steps, torn down."""
        from peft import LoraConfig, get_peft_model
        for _ in self.xs:
            wrapped = get_peft_model(self.model, LoraConfig(
                r=self.cfg.lora_rank, lora_alpha=self.cfg.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"))
            ids = torch.tensor([self.pair], device=self.model.device)
            labels = ids.masked_fill(torch.arange(ids.shape[1], device=ids.device) < self.begin, -100)
            adam = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-4)
            for _ in range(self.cfg.epochs):
                wrapped(input_ids=ids, labels=labels, use_cache=False).loss.backward()
                adam.step()
                adam.zero_grad()
            self.model = wrapped.unload()
            self.model.requires_grad_(False)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", choices=[*SHAPES, "embedded"], default="smollm-135m")
    p.add_argument("--data", default="", help="a canonical file; default: a built-in SealTool-like prompt")
    p.add_argument("--batch", type=int, default=1, help="samples at once")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="auto")
    p.add_argument("--json", action="store_true")
    args = p.parse_args(argv)
    model, tok = load(args)
    samples = list(ttsi.read_jsonl(args.data, ttsi.to_sample).values()) if args.data else sealtool_like(args.batch)
    samples = [{k: v for k, v in s.items() if k != "call"} for s in samples[:args.batch]]
    cfg = ttsi.Config(max_new_tokens=ANSWER, drafts=1, attempts=1, shuffle=False)
    bench = Bench(model, tok, samples, cfg)
    x = bench.xs[0]
    steps = cfg.epochs
    things = {
        "direct": bench.direct, "direct, transformers.generate": bench.library_generate,
        "certain": lambda: bench.tt_si(tau=0.0),
        "uncertain, suffix": lambda: bench.tt_si(tau=2.0), "uncertain, full": lambda: bench.tt_si(tau=2.0, adapt="full"),
        "H, prompt read": lambda: ttsi.score(model, tok, bench.xs, bench.asked, cfg),
        "H, whole prompts": bench.score_whole,
        "T, suffix": lambda: bench.train("suffix", steps), "T, full": lambda: bench.train("full", steps),
        "T, floor of full": lambda: [bench.floor() for _ in range(steps)],
    }
    if importlib.util.find_spec("peft"):
        things["T, PEFT"] = bench.peft
    print(f"{args.shape}: {model.num_parameters():,} parameters, {model.dtype} on {model.device}, {torch.get_num_threads()}"
          f" threads; {len(x['names'])} tools, prompt {len(x['ids'])} tokens, {len(x['ids']) - x['head']} after the tools,"
          f" pair {len(bench.pair) - x['head']} after them; draft {DRAFT}, answer {ANSWER}, {steps} steps, batch {len(samples)}")
    seconds = {name: [] for name in things}
    for r in range(args.rounds + 1):  # in turn; the first round warms up
        for name, f in things.items():
            start = time.perf_counter()
            f()
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            if r:
                seconds[name].append(time.perf_counter() - start)
    report = {}
    for name, s in seconds.items():
        ratios = sorted(a / b for a, b in zip(s, seconds["direct"]))
        report[name] = {"seconds": statistics.median(s), "ratio": statistics.median(s) / statistics.median(seconds["direct"]),
                        "spread": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]]}
    if args.json:
        print(json.dumps({"shape": args.shape, "threads": torch.get_num_threads(), "torch": torch.__version__, "rows": report}))
    else:
        for name, r in report.items():
            print(f'{name:32} {r["seconds"]:8.3f} s  {r["ratio"]:6.2f}x direct  [{r["spread"][0]:.2f}, {r["spread"][1]:.2f}]')
    return report


if __name__ == "__main__":
    main()
