"""What is chosen on dev, on a real model: cells of flags, compared with the direct answer.

    python data/choose.py --model FOLDER --data canonical_dev_200.jsonl --limit 60 [CELL ...]

Rows go to data/results/choice/ as they come and are never made twice; a certain input is answered
once, and cells that share their pairs have them from one of them. The table is of what is there.
"""

import argparse
import dataclasses
import hashlib
import json
import sys
from collections import Counter
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from unittest import mock

import transformers
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import ttsi  # noqa: E402

KEPT = HERE / "results" / "choice"


# -------------------------------------------------------------------------- pairs of other kinds
def itself(sample, pool):
    """The item with its LABEL: no method, the most that training could do."""
    return [labelled(sample)]


def neighbours(sample, pool):
    """TTT-NN: the nearest labelled examples, each with its own tools."""
    others = [item for item in pool if item["id"] != sample["id"]]
    drafts = [{"verdict": "kept", "pair": labelled(item)} for item in others]
    return ttsi.closest(drafts, ttsi.user_text(sample["messages"]))[:3]


def labelled(sample):
    request = ttsi.user_text(sample["messages"])
    return {"request": request, "call": sample["call"], "tools": sample["tools"]}


def with_own_tools(pairs):
    """ttsi.py with these pairs, unjudged, for the time of one input."""
    ours = ttsi.pair_span

    def pair_span(x, pair):
        return ours(SimpleNamespace(**vars(x) | {"tools": pair["tools"]}), pair)

    return mock.patch.multiple(ttsi, generate=lambda *_: ([], pairs), pair_span=pair_span)


EACH = "--drafts 0 --k 3 --temperature 0.7"
# cell -> flags, and where its pairs are from: written, another cell's, or a function below
CELLS = {
    "each": (EACH, None),  # a pair for each plausible tool
    "each-lr1e-4": (f"{EACH} --lr 1e-4", "each"),
    "each-lr6e-4": (f"{EACH} --lr 6e-4", "each"),
    "each-10-steps": (f"{EACH} --epochs 10 --lr 1.5e-4", "each"),
    "each-full": (f"{EACH} --adapt full", "each"),
    "each-two-tools": (f"{EACH} --k 2", None),
    "each-temperature-1": (f"{EACH} --temperature 1", None),
    "each-unchecked": (f"{EACH} --no-check", None),
    "each-our-prompt": (f"{EACH} --prompt ours", None),
    "free": ("--drafts 4 --k 1 --temperature 0.7", None),
    "free-lr1e-4": ("--drafts 4 --k 1 --temperature 0.7 --lr 1e-4", "free"),
    "neighbours": (f"{EACH} --no-check", neighbours),
    "itself": (f"{EACH} --k 1", itself),
}
DIRECT = "direct"  # --tau 0, for all of them


# ------------------------------------------------------------------------------- rows and table
def flags_of(args, cell):
    flags = CELLS[cell][0] if cell != DIRECT else "--tau 0"
    shared = ["--model", args.model, "--data", args.data, "--dtype", args.dtype]
    return ttsi.parse_flags([*shared, *flags.split()])


def read_rows(cell):
    path = KEPT / f"{cell}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {row["id"]: row for row in map(json.loads, lines)}


def answered(model, tok, sample, cfg, pairs=None):
    """-> a row: Algorithm 1, graded."""
    result = ttsi.tt_si(model, tok, sample, cfg, pairs)
    row = dataclasses.asdict(result) | {"scores": ttsi.grade(result.answer, sample)}
    row["logp"] = {name: round(value, 3) for name, value in row["logp"].items()}
    row["cost"] = {k: [round(s, 2), tokens] for k, (s, tokens) in row["cost"].items()}
    return row


def make_rows(args, cell, model, tok, samples, pool):
    """Makes what is missing of a cell; `direct` must be there."""
    cfg, rows, direct = flags_of(args, cell), read_rows(cell), read_rows(DIRECT)
    source = None if cell == DIRECT else CELLS[cell][1]
    written = read_rows(source) if source in CELLS else {}
    for sample in tqdm(samples, desc=cell):
        i = sample["id"]
        if i in rows or (cell != DIRECT and direct[i]["margin"] >= cfg.tau):
            continue
        if source in CELLS:
            row = answered(model, tok, sample, cfg, written[i]["pairs"])
        elif source:
            with with_own_tools(source(sample, pool)):
                row = answered(model, tok, sample, cfg)
        else:
            row = answered(model, tok, sample, cfg)
        ttsi.save(KEPT / f"{cell}.jsonl", [ttsi.dumps(row)], "a")


def table(args, samples):
    """Prints each cell beside the direct answer, over the items that it has."""
    direct = read_rows(DIRECT)
    print(
        "| cell | items | names | calls | difference [95 %] | better, worse | adapted | drafts kept"
        " | seconds |\n|---|---|---|---|---|---|---|---|---|"
    )
    for cell in [DIRECT, *CELLS]:
        rows, tau = read_rows(cell), flags_of(args, cell).tau
        mine = [s["id"] for s in samples if s["id"] in direct]
        mine = [i for i in mine if i in rows or direct[i]["margin"] >= tau]
        if not rows or not mine:
            continue
        pairs = [(direct[i], rows.get(i, direct[i])) for i in mine]
        change = {k: [r["scores"][k] - d["scores"][k] for d, r in pairs] for k in ("name", "call")}
        told = []
        for kind, differences in change.items():
            low, high = ttsi.interval(differences)
            points = [100 * value for value in (fmean(differences), low, high)]
            told.append("{} {:+.1f} [{:+.1f}, {:+.1f}]".format(kind, *points))
        names, calls = (100 * fmean(r["scores"][k] for _, r in pairs) for k in change)
        wins, losses = change["call"].count(1), change["call"].count(-1)
        adapted = sum(r["decision"] == "adapted" for _, r in pairs)
        verdicts = Counter(d["verdict"] for _, r in pairs for d in r["drafts"])
        kept = f"{verdicts['kept']}/{verdicts.total()}"
        seconds = fmean(sum(s for s, _ in r["cost"].values()) for _, r in pairs)
        print(
            f"| {cell} | {len(mine)} | {names:.1f} | {calls:.1f} | {', '.join(told)} |"
            f" {wins}, {losses} | {adapted} | {kept} | {seconds:.1f} |"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cells", nargs="*", metavar="CELL", help=f"of {', '.join(CELLS)}")
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--pool", nargs="*", default=[], help="labelled files: nearest labelled")
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    samples = list(ttsi.read_jsonl(args.data, ttsi.to_sample).values())[: args.limit]
    pool = [*samples]
    for path in args.pool:
        pool += ttsi.read_jsonl(path, ttsi.to_sample).values()
    if args.cells:
        model, tok = ttsi.load(args.model, flags_of(args, DIRECT))
        KEPT.mkdir(parents=True, exist_ok=True)
        what = {"model": ttsi.fingerprint(model, tok), "dtype": args.dtype}
        what["data"] = hashlib.sha256(Path(args.data).read_bytes()).hexdigest()[:16]
        begun = KEPT / "settings.json"
        if begun.exists():
            found = json.loads(begun.read_text())
            ttsi.need(found == what, f"{KEPT}: rows of {found}, not of {what}")
        ttsi.save(begun, [json.dumps(what)])
        for cell in [DIRECT, *args.cells]:
            make_rows(args, cell, model, tok, samples, pool)
    table(args, samples)


if __name__ == "__main__":
    main()
