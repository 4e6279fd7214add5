"""Tables behind the README: ttsi.py's own command over several seeds, and controls composed of its functions.

    python data/experiments.py tune-G tune-T adapt --data data/dev.jsonl  # from these the defaults were chosen
    python data/experiments.py main controls dose                # on the test split: 5 seeds, 2 for the controls
    python data/experiments.py main --only accepted --model M --data D.jsonl   # any model, any canonical data

Runs go to runs/ and are resumed; the numbers go to data/results/, and from there into the READMEs, between markers.
A seed is one draw of drafts, adapter initialisations and tool order; the model is one and the same.
"""
import argparse
import contextlib
import copy
import hashlib
import inspect
import io
import json
import math
import re
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import torch  # noqa: E402
import ttsi  # noqa: E402
import world  # noqa: E402

# ------------------------------------------------------------------------------------------------------------ runs


class Lab:
    """Where runs are kept: one folder per version of ttsi.py, of the model's weights and of the data, so that none is
    stale; one below it per version of a function that takes the place of another (`patched`)."""

    def __init__(self, args):
        self.args = args
        digest = hashlib.sha256((HERE.parent / "ttsi.py").read_bytes())
        for file in (*sorted(Path(args.model).glob("*.safetensors")), Path(args.data)):
            digest.update(file.read_bytes())
        self.runs = HERE.parent / "runs" / digest.hexdigest()[:12]
        self.runs.mkdir(parents=True, exist_ok=True)
        self.loaded, self.embedded = None, args.model == ttsi.Config.model

    def config(self, seed, flags=""):
        return ttsi.parse_flags(["--model", self.args.model, "--data", self.args.data, "--seed", str(seed),
                                 *(["--limit", str(self.args.limit)] if self.args.limit else []), *flags.split()])

    def path(self, seed, flags=""):
        """`python ttsi.py --seed SEED FLAGS`, unless it was run before -> the file of its rows."""
        cfg = self.config(seed, flags)
        cfg.output = str(self.runs / (hashlib.sha256(json.dumps(vars(cfg)).encode()).hexdigest()[:16] + ".jsonl"))
        done = Path(cfg.output).with_suffix(".done")
        if not done.exists():
            print(f"{Path(cfg.data).name} --seed {seed} {flags}", file=sys.stderr, flush=True)
            with contextlib.redirect_stdout(io.StringIO()):
                ttsi.run(cfg)
            done.touch()
        return cfg.output

    def run(self, seed, flags=""):
        return [json.loads(line) for line in open(self.path(seed, flags), encoding="utf-8")]

    def pairs(self, seed, name, pairs):
        """A file for --pairs out of {id: pairs} -> its path."""
        path = self.runs / f"pairs-{Path(self.args.data).stem}-{name}-{seed}.jsonl"
        path.write_text("".join(json.dumps({"id": i, "pairs": p}) + "\n" for i, p in pairs.items()), encoding="utf-8")
        return path

    def batches(self, cfg, size=25):
        """-> (model, tokenizer), and the samples of cfg.data in batches."""
        self.loaded = self.loaded or ttsi.load(cfg)
        samples = list(ttsi.read_jsonl(cfg.data, ttsi.to_sample).values())[:cfg.limit or None]
        return *self.loaded, [samples[i:i + size] for i in range(0, len(samples), size)]


def gate(rows, chosen):
    """Rows of a run with --select all -> rows as if only the chosen samples had been adapted: each was answered both
    ways, and samples do not touch each other."""
    out = []
    for row, adapt in zip(rows, chosen):
        if not adapt:
            row = {k: v for k, v in row.items() if k not in ("adapted", "drafts", "pairs", "loss")}
            row["cost"] = {stage: row["cost"][stage] for stage in ("prefill", "score", "direct")}
            row["scores"] = row["scores"] | {"ttsi": row["scores"]["direct"]}
        out.append(row)
    return out


def uncertain(rows, tau=ttsi.Config.tau):
    return gate(rows, [row["margin"] < tau for row in rows])


def certain(rows, tau=ttsi.Config.tau):
    return gate(rows, [row["margin"] >= tau for row in rows])


# -------------------------------------------------------------------------------------------------------- controls


def others_pairs(lab, seed):
    """Every sample is adapted to the pairs that were written for the next one."""
    written = lab.run(seed, "--select all")
    moved = {row["id"]: after["pairs"] for row, after in zip(written, written[1:] + written[:1])}
    return lab.run(seed, f"--select all --no-check --pairs {lab.pairs(seed, 'others', moved)}")


def start(model, tok, samples, cfg):
    """-> what every composition begins with: the samples as the model sees them, and the cache of their tool lists."""
    xs = [ttsi.prepare(model, tok, sample, cfg) for sample in samples]
    return xs, ttsi.prefill(model, tok, xs, [])[0]


def nearest(lab, seed, flags="--select all"):
    """No training: the tool of the draft closest to the request; the base model fills in the arguments."""
    rows, cfg = lab.run(seed, flags), lab.config(seed, flags)
    written, out = {row["id"]: row for row in rows}, []
    model, tok, batches = lab.batches(cfg)
    for samples in batches:
        xs, tools = start(model, tok, samples, cfg)
        names = [written[x["id"]]["pairs"][0]["call"]["name"] if written[x["id"]]["pairs"] else x["names"][0] for x in xs]
        forced = [x["candidates"][x["names"].index(name)][0] for x, name in zip(xs, names)]
        texts = ttsi.decode(model, tok, forced, [len(x["ids"]) for x in xs], cfg.max_new_tokens, tools)
        for x, sample, text in zip(xs, samples, texts):
            row = written[x["id"]]
            if row["pairs"]:
                row["scores"]["ttsi"] = ttsi.grade(text, sample)
                row["cost"].pop("train", None)
            out.append(row)
    return out


def dose(lab, seed, shift):
    """The same run on items of which this share is shifted."""
    split, n = Path(lab.args.data).stem, min(250, world.FILES[Path(lab.args.data).stem])
    path = lab.runs / f"{split}-shift-{shift}.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in world.records(split, n, shift / 100, 0)), encoding="utf-8")
    return lab.run(seed, f"--data {path}")


@contextlib.contextmanager
def patched(lab, **functions):
    """ttsi.py with other functions -> a Lab whose runs lie apart."""
    folder = hashlib.sha256("".join(map(inspect.getsource, functions.values())).encode()).hexdigest()[:12]
    elsewhere, ours = copy.copy(lab), {name: getattr(ttsi, name) for name in functions}
    elsewhere.runs = lab.runs / folder
    elsewhere.runs.mkdir(exist_ok=True)
    try:
        vars(ttsi).update(functions)
        yield elsewhere
    finally:
        vars(ttsi).update(ours)


def clipped(lab, seed, lr):
    """Another update rule: the gradient of each adapter clipped to norm 1, not normalised; on the same pairs."""
    @torch.no_grad()
    def sgd(theta, lr):
        norm = sum(p.grad.flatten(1).square().sum(1) for p in theta).sqrt()
        for p in theta:
            p -= lr * p.grad / norm.clamp(min=1).view(-1, *[1] * (p.dim() - 1))
    pairs = lab.path(seed, "--drafts 1")
    with patched(lab, sgd=sgd) as elsewhere:
        return elsewhere.run(seed, f"--lr {lr} --pairs {pairs}")


def reshuffled(lab, seed):
    """--adapt full, with the tools of each training row in an order of its own; a tool list in a cache has but one."""
    def pair_tokens(tok, x, pair):
        order = torch.randperm(len(x["tools"]), generator=ttsi.draw(seed, x["id"], "reshuffled", pair["request"]))
        return ours(tok, x | {"system": ttsi.system_text([x["tools"][i] for i in order])}, pair)
    pairs, ours = lab.path(seed), ttsi.pair_tokens
    with patched(lab, pair_tokens=pair_tokens) as elsewhere:
        return elsewhere.run(seed, f"--adapt full --pairs {pairs}")


def against(rows, other):
    """The difference to another run in place of that to the direct answers: "direct" is the other run from here on."""
    return [row | {"scores": row["scores"] | {"direct": o["scores"]["ttsi"]}} for row, o in zip(rows, other, strict=True)]


# ---------------------------------------------------------------------------------------------------------- tables

GROUPS = {  # group -> (seeds, [(label, what the README calls a command, rows of a seed)])
    "main": (5, [(label, flags, lambda lab, s, flags=flags: lab.run(s, flags)) for label, flags in (
        ("first draft, unchecked", "--k 1 --drafts 1 --no-check --attempts 1"),
        ("first accepted draft", "--k 1 --drafts 1"), ("closest of 4 drafts (the default)", "--k 1 --drafts 4"),
        ("the same, tools forced in turn", "--k 1 --drafts 4 --cover"), ("closest of 8 drafts", "--k 1 --drafts 8"),
        ("4 pairs of 4 drafts", "--k 4 --drafts 4"))]),
    "controls": (2, [
        ("adapt all", "--select all", lambda lab, s: lab.run(s, "--select all")),
        ("adapt only the certain", "--select certain", lambda lab, s: certain(lab.run(s, "--select all"))),
        ("another item's pairs", "`others_pairs`", lambda lab, s: uncertain(others_pairs(lab, s))),
        ("another item's pairs, adapt all", "`others_pairs`", others_pairs),
        ("closest draft's tool, no training", "`nearest`", lambda lab, s: uncertain(nearest(lab, s))),
        ("closest draft's tool, no training, all", "`nearest`", nearest),
        ("the paper's rate and optimiser", "--paper", lambda lab, s: lab.run(s, "--paper")),
        ("the pairs in the prompt, no training (TT-ICL)", "--method icl",
         lambda lab, s: lab.run(s, f"--method icl --pairs {lab.path(s)}")),
    ]),
    "dose": (2, [(f"{shift} % shifted", f"`dose`, {shift} %", lambda lab, s, shift=shift: dose(lab, s, shift))
                 for shift in (0, 30, 60, 100)]),
    "tune-G": (2, [(flags, flags, lambda lab, s, flags=flags: lab.run(s, flags)) for flags in (
        "--drafts 1", "--drafts 1 --no-check --attempts 1", "--drafts 1 --attempts 1", "--drafts 1 --temperature 0.7",
        "--drafts 1 --temperature 1.3", "--drafts 2", "--drafts 4", "--drafts 8", "--drafts 16", "--k 2 --drafts 2",
        "--k 2 --drafts 8", "--drafts 2 --cover", "--drafts 4 --cover", "--drafts 8 --cover",
        "--k 2 --drafts 4 --cover", "--k 4 --drafts 4", "--k 4 --drafts 8", "--k 4 --drafts 16", "--k 8 --drafts 8")]),
    # from here on every row trains on the same pairs
    "adapt": (5, [
        ("suffix (the default)", "--adapt suffix", lambda lab, s: lab.run(s, f"--pairs {lab.path(s)}")),
        ("full (the paper)", "--adapt full", lambda lab, s: lab.run(s, f"--adapt full --pairs {lab.path(s)}")),
        ("full, the training rows' tools reshuffled", "`reshuffled`", reshuffled),
        ("suffix against full", "`against`",
         lambda lab, s: against(lab.run(s, f"--pairs {lab.path(s)}"), lab.run(s, f"--adapt full --pairs {lab.path(s)}"))),
        ("suffix against full, reshuffled", "`against`",
         lambda lab, s: against(lab.run(s, f"--pairs {lab.path(s)}"), reshuffled(lab, s)))]),
    "tune-T": (2, [(flags, flags, lambda lab, s, flags=flags: lab.run(s, f"{flags} --pairs {lab.path(s, '--drafts 1')}"))
                   for flags in (*(f"--lr {x}" for x in (.03, .05, .07, .1, .14, .2, .3)),
                                 *(f"--optimizer adamw --lr {x}" for x in (1e-4, 3e-4, 1e-3, 3e-3)),
                                 "--epochs 3", "--epochs 10", "--lora-rank 2", "--lora-rank 32", "--adapt full")]
               + [(f"clipped, lr {lr}", "`clipped`", lambda lab, s, lr=lr: clipped(lab, s, lr)) for lr in (.1, .3, 1)]),
}


def signs(wins, losses):
    """Two-sided exact sign test: how likely is a split as uneven as this, if a change were as often good as bad?"""
    n, k = wins + losses, min(wins, losses)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2 ** n)


def auroc(scores, positive):
    """The probability that a positive scores higher than a negative."""
    high = [s for s, p in zip(scores, positive) if p]
    low = [s for s, p in zip(scores, positive) if not p]
    return sum((h > l) + .5 * (h == l) for h in high for l in low) / len(high) / len(low) if high and low else None


def pooled(runs):
    """Rows of several seeds -> the numbers of one line: means over seeds, and an interval over items of these means."""
    summaries = [ttsi.summarise(rows) for rows in runs]
    mean = lambda key: statistics.mean(key(s) for s in summaries)
    change = [statistics.mean(c) for c in zip(*([r["scores"]["ttsi"]["call"] - r["scores"]["direct"]["call"]
                                                 for r in rows] for rows in runs))]
    wins, losses = sum(c > 0 for c in change), sum(c < 0 for c in change)
    verdicts = [d["verdict"] for rows in runs for r in rows for d in r.get("drafts", [])]
    return {
        "seeds": len(runs), "n": len(change), "direct": {k: mean(lambda s: s["direct"][k]) for k in ("name", "call")},
        "ttsi": {k: mean(lambda s: s["ttsi"][k]) for k in ("name", "call")},
        "difference": mean(lambda s: s["difference"]), "interval": [100 * q for q in ttsi.interval(change)],
        "sd": statistics.stdev(s["difference"] for s in summaries) if len(runs) > 1 else None,
        "items better": wins, "items worse": losses, "p": signs(wins, losses), "adapted": mean(lambda s: s["adapted"]),
        **{unit: mean(lambda s: s["ttsi"][unit] / s["direct"][unit]) for unit in ("tokens", "seconds")},
        "drafts kept": [sum(v == "kept" for v in verdicts), len(verdicts)],
        "auroc": {kind: auroc([r["margin"] for rows in runs for r in rows],
                              [r["scores"]["direct"][kind] for rows in runs for r in rows]) for kind in ("name", "call")}}


def markdown(lines):
    text = ["| | flags | call | difference [95 %] | s.d. | better / worse | adapted | tokens |",
            "|---|---|---|---|---|---|---|---|"]
    for label, r in lines.items():
        flags = f'`{r["flags"]}`' if r["flags"].startswith("-") else r["flags"]
        sd = "" if r["sd"] is None else f'{r["sd"]:.1f}'
        text.append(f'| {label if label != r["flags"] else ""} | {flags} | {r["ttsi"]["call"]:.1f} | {r["difference"]:+.1f} '
                    f'[{r["interval"][0]:+.1f}, {r["interval"][1]:+.1f}] | {sd} | {r["items better"]} / '
                    f'{r["items worse"]} | {r["adapted"]:.0f}/{r["n"]} | {r["tokens"]:.1f}x |')
    return "\n".join(text) + "\n"


def publish(stem, group, text):
    """Into each README, between <!-- table STEM GROUP --> and <!-- end -->."""
    for readme in (HERE.parent / "README.md", HERE / "README.md"):
        old = readme.read_text(encoding="utf-8")
        mark = re.escape(f"<!-- table {stem} {group} -->\n")
        new = re.sub(f"({mark}).*?(<!-- end -->)", lambda m: m[1] + text + m[2], old, flags=re.S)
        if new != old:
            readme.write_text(new, encoding="utf-8")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("groups", nargs="*", help=f"of {', '.join(GROUPS)}; default: all that tune nothing")
    p.add_argument("--model", default=ttsi.Config.model)
    p.add_argument("--data", default=str(HERE / "test.jsonl"))
    p.add_argument("--only", default="", help="rows whose label or flags hold this text")
    p.add_argument("--seeds", type=int, default=0, help="0: 5 for the main table, 2 for the others")
    p.add_argument("--limit", type=int, default=0, help="only the first so many items")
    args = p.parse_args()
    lab, stem = Lab(args), Path(args.data).stem
    for group in args.groups or [g for g in GROUPS if g not in ("tune-G", "tune-T", "adapt")]:
        seeds, lines = GROUPS[group]
        file = HERE / "results" / f"{stem}-{group}.json"
        found = json.loads(file.read_text(encoding="utf-8")) if args.only and lab.embedded and file.exists() else {}
        for label, flags, rows in lines:
            if args.only in label + flags:
                found[label] = pooled([rows(lab, s) for s in range(args.seeds or seeds)]) | {"flags": flags}
                print(json.dumps({label: found[label]}), flush=True)
        found = {label: found[label] for label, *_ in lines if label in found}
        print(markdown(found))
        if lab.embedded and not args.limit and not args.seeds:  # a partial run is looked at, not published
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(found, indent=1), encoding="utf-8")
            publish(stem, group, markdown(found))


if __name__ == "__main__":
    main()
