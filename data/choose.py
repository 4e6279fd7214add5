"""What is chosen on dev, on a real model: cells of flags, compared with the direct answer.

    python data/choose.py --model FOLDER --data canonical_dev_200.jsonl [CELL ...]

Rows go to data/results/choice/ as they come and are never made twice; a certain input is answered
once, and cells that share their pairs have them from one of them. The table is of what is there.
Where the best of many cells is taken, its interval is too good: what is chosen is to be confirmed.
"""

import argparse
import dataclasses
import hashlib
import json
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean, pstdev
from unittest import mock

import torch
import transformers
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import figures  # noqa: E402

import ttsi  # noqa: E402

KEPT = HERE / "results" / "choice"


# ---------------------------------------------------------------------- pairs that none has written
def itself(sample, pool):
    """The item with its LABEL: no method, the most that training could do."""
    return [labelled(sample)]


def neighbours(sample, pool):
    """TTT-NN: the three nearest labelled examples of other requests, each with its own tools."""
    request = labelled(sample)["request"]
    drafts = [{"verdict": "kept", "pair": labelled(item)} for item in pool]
    others = [d for d in drafts if not ttsi.copies(d["pair"]["request"], request)]
    return ttsi.closest(others, request)[:3]


def labelled(sample):
    request = ttsi.user_text([m for m in sample["messages"] if m["role"] != "system"])
    return {"request": request, "call": sample["call"], "sample": sample}


def short(sample):
    """Can its tools be trained behind in less than minutes?"""
    return len(ttsi.dumps(sample["tools"])) < 4000  # characters


def with_own_tools(pairs):
    """ttsi.py with these pairs, unjudged, for the time of one input. They are read one by one:
    where lists of tools differ in length, so do the places whose logits are needed."""
    span, logprob = ttsi.pair_span, ttsi.logprob
    changed = {
        "generate": lambda *_: ([], pairs),
        "pair_span": lambda x, pair: span(ttsi.prepare(x.tok, pair["sample"], x.cfg), pair),
        "logprob": lambda spans, prefix: torch.cat([logprob([one], prefix) for one in spans]),
    }
    return mock.patch.multiple(ttsi, **changed)


def remembered(row):
    """ttsi.py drafting what a row's drafts were, as far as they go, for the time of one input."""
    texts, ours = [draft["text"] for draft in row["drafts"]], ttsi.fill

    def fill(outline, *how):
        given = outline.partition(', "arguments"')[0]  # the tool
        old = next((text for text in texts if text.startswith(given)), None)
        if old is None:
            return ours(outline, *how)
        texts.remove(old)
        return old

    return mock.patch.object(ttsi, "fill", fill)


SCORES = "answer-scores"
TWO = "--drafts 0 --k 2 --temperature 0.7"
DIRECT = "direct"
# cell -> flags, and where its pairs are from: written; drafted as another cell's; or a function
CELLS = {
    DIRECT: ("--tau 0", None),
    "two": (TWO, None),  # a pair for each of the two likeliest tools
    "two-lr1e-4": (f"{TWO} --lr 1e-4", "two"),
    "two-10-steps": (f"{TWO} --epochs 10 --lr 1.5e-4", "two"),  # the same way
    "two-full": (f"{TWO} --adapt full", "two"),
    "two-ours": (f"{TWO} --prompt ours", "two"),
    "two-temperature-1": (f"{TWO} --temperature 1", None),
    "free": ("--drafts 4 --k 1 --temperature 0.7", None),
    "neighbours": (TWO, neighbours),
    "itself": (TWO, itself),
}
# Rows of a form that is gone: a third pair where the third tool's p was above .05.
THEN = {"three": None}
THEN |= dict.fromkeys(("three-lr6e-4", "three-3-steps", "three-unchecked", "three-two"), "three")
SOURCES = {cell: source for cell, (_, source) in CELLS.items()} | THEN


# ------------------------------------------------------------------------------- rows and table
def flags_of(args, cell):
    shared = ["--model", args.model, "--data", args.data, "--dtype", args.dtype]
    return ttsi.parse_flags([*shared, *CELLS[cell][0].split()])


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def read_rows(cell):
    """-> {id: row} of the whole lines of a cell."""
    path = KEPT / f"{cell}.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return {row["id"]: row for row in rows}


def certain(row, tau=ttsi.Config.tau):
    return row["margin"] is None or row["margin"] >= tau


def to_row(result, sample):
    """A Result -> a row, without a benchmark's texts."""
    row = dataclasses.asdict(result) | {"scores": ttsi.grade(result.answer, sample)}
    row["logp"] = {name: round(value, 3) for name, value in row["logp"].items()}
    row["cost"] = {k: [round(s, 2), tokens] for k, (s, tokens) in row["cost"].items()}
    for pair in row["pairs"]:
        if "sample" in pair:  # a benchmark's text
            pair.clear()
    for draft in row["drafts"]:
        if "copy" in draft["verdict"]:
            draft["text"] = ""
    return json.loads(json.dumps(row), parse_constant=lambda name: None)


def make_rows(args, cell, model, tok, samples, pool):
    """Makes what is missing of a cell; its settings stand beside its rows."""
    cfg, rows, direct = flags_of(args, cell), read_rows(cell), read_rows(DIRECT)
    source = CELLS[cell][1]
    drafted = read_rows(source) if source in CELLS else {}
    what = vars(cfg) | {"model": ttsi.fingerprint(model, tok), "data": digest(args.data)}
    what |= {"pairs": source.__name__ if callable(source) else source}
    if source is neighbours:
        what["pool"] = len(pool)
    beside = KEPT / f"{cell}.settings.json"
    begun = json.loads(beside.read_text()) if beside.exists() else what
    ttsi.need(begun == what, f"{beside}: rows of {begun}, not of {what}")
    ttsi.save(beside, [json.dumps(what)])
    ttsi.save(KEPT / f"{cell}.jsonl", map(ttsi.dumps, rows.values()))  # without a torn line
    for sample in tqdm(samples, desc=cell):
        i = sample["id"]
        if i in rows or (cell != DIRECT and certain(direct[i], cfg.tau)):
            continue
        given = with_own_tools(source(sample, pool)) if callable(source) else nullcontext()
        with remembered(drafted[i]) if i in drafted else given:
            result = ttsi.tt_si(model, tok, sample, cfg)
        ttsi.save(KEPT / f"{cell}.jsonl", [ttsi.dumps(to_row(result, sample))], "a")


def answer_scores(args, model, tok, samples):
    """Another uncertainty: keeps log P of each direct answer, nats, and its tokens."""
    direct, rows = read_rows(DIRECT), read_rows(SCORES)
    for sample in tqdm(samples, desc=SCORES):
        i = sample["id"]
        if i not in rows:
            x = ttsi.prepare(tok, sample, flags_of(args, DIRECT))
            span = x.ids + tok(direct[i]["answer"], add_special_tokens=False).input_ids, len(x.ids)
            with torch.no_grad():
                logp = ttsi.logprob([span], ttsi.Prefix(model, x.ids[:-1])).item()
            row = {"id": i, "logp": round(logp, 3), "tokens": len(span[0]) - span[1]}
            ttsi.save(KEPT / f"{SCORES}.jsonl", [ttsi.dumps(row)], "a")


def uncertainties(ids):
    """Prints how well each uncertainty tells right direct answers from wrong ones."""
    direct, scores = read_rows(DIRECT), read_rows(SCORES)
    ids = [i for i in ids if i in scores]
    values = {
        "margin of the names": [direct[i]["margin"] for i in ids],
        "log P of the direct answer": [scores[i]["logp"] for i in ids],
        "the same per token": [scores[i]["logp"] / scores[i]["tokens"] for i in ids],
    }
    print(f"\nAUROC over {len(ids)} direct answers, of right names and right calls:\n")
    for label, found in values.items():
        areas = [figures.auroc(found, [direct[i]["scores"][k] for i in ids]) for k in figures.KINDS]
        print(f"{label}: " + ", ".join("" if a is None else f"{a:.2f}" for a in areas))


def table(skip, limit):
    """Prints each cell beside the direct answer, over the items from skip to limit, as far as it
    has them."""
    direct, shown = read_rows(DIRECT), []
    ids = [*direct][skip:limit]
    print(
        "| cell | items | names | calls | difference [95 %] | better, worse | adapted | drafts kept"
        " |\n|---|---|---|---|---|---|---|---|"
    )
    for cell, source in SOURCES.items():
        rows, pairs = read_rows(cell), []
        for i in ids:
            if i not in rows and not certain(direct[i]):
                break  # what is certain alone would look like no difference
            pairs.append((direct[i], rows.get(i, direct[i])))
        if not pairs or rows.keys().isdisjoint(ids):
            continue
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
        own = source is None  # its drafts, so that it knows what they cost
        if own and cell != DIRECT:
            sd = pstdev(change["call"])
            shown.append(
                f"{cell}: s.d. {sd:.2f} an item, 294 show {280 * sd / 294**0.5:.1f} points"
            )
        kept = f"{verdicts['kept']}/{verdicts.total()}" if own else ""
        print(
            f"| {cell} | {len(pairs)} | {names:.1f} | {calls:.1f} | {', '.join(told)} |"
            f" {wins}, {losses} | {adapted} | {kept} |"
        )
    print("", "Call accuracy, four cases in five, at 5 %:", *shown, sep="\n")
    uncertainties(ids)


def seeds(samples):
    """Prints whether pairs answer to their seed: the words of it that they hold, in percent, and
    of another's, how many call the tool that is right for it, and what the tool of the nearest
    pair would do for names without training, over the items adapted."""
    requests = {s["id"]: labelled(s)["request"] for s in samples}
    asked, direct = {i: set(ttsi.words(text)) for i, text in requests.items()}, read_rows(DIRECT)
    right = {s["id"]: s["call"]["name"] for s in samples}
    after = dict(zip(asked, [*asked][1:] + [*asked][:1], strict=True))  # another item
    for cell in [cell for cell, source in SOURCES.items() if source is None]:
        own, other, called, near = [], [], [], []
        for i, row in read_rows(cell).items():
            pairs = [draft["pair"] for draft in row["drafts"] if draft["pair"] and i in asked]
            said = [set(ttsi.words(pair["request"])) for pair in pairs]
            for found, words in ((own, asked.get(i)), (other, asked.get(after.get(i)))):
                if pairs:  # a mean for each item
                    found.append(fmean(100 * len(part & words) / len(words) for part in said))
            called += [pair["call"]["name"] == right[i] for pair in pairs]
            if i in asked and row["decision"] == "adapted":
                drafts = [{"verdict": "kept", "pair": pair} for pair in row["pairs"]]
                nearest = ttsi.closest(drafts, requests[i])[0]["call"]["name"]
                near.append(
                    (direct[i]["scores"]["name"], nearest == right[i], row["scores"]["name"])
                )
        if near:
            low, high = ttsi.interval([a - b for a, b in zip(own, other, strict=True)])
            print(
                f"{cell}: {len(called)} pairs hold {fmean(own):.1f} % of the words of their seed,"
                f" {fmean(other):.1f} % of another's (difference from {low:.1f} to {high:.1f});"
                f" {100 * fmean(called):.0f} % call the seed's right tool; names, where adapted:"
                " direct {:.1f}, the nearest pair's {:.1f}, trained {:.1f} %".format(
                    *(100 * fmean(values) for values in zip(*near, strict=True))
                )
            )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "cells", nargs="*", metavar="CELL", help=f"of {', '.join([*CELLS, SCORES])}"
    )
    parser.add_argument("--model", default="", help="where a CELL is given")
    parser.add_argument("--data", default="", help="the same; without, tables of kept rows alone")
    parser.add_argument("--pool", nargs="*", default=[], help="labelled files, for neighbours")
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--skip", type=int, default=0, help="items that the table leaves out")
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    unknown = set(args.cells) - {SCORES, *CELLS}
    if unknown:
        parser.error(f"no cell {unknown}")
    ttsi.need(not args.cells or (args.model and args.data), "a CELL needs --model and --data")
    samples = list(ttsi.read_jsonl(args.data, ttsi.to_sample).values()) if args.data else []
    ttsi.need(all("call" in s for s in samples), f"--data {args.data}: samples without a label")
    pool, samples = samples, samples[: args.limit]
    for path in args.pool:
        pool += ttsi.read_jsonl(path, ttsi.to_sample).values()
    pool = [sample for sample in pool if short(sample)]
    if args.cells:
        model, tok = ttsi.load(args.model, flags_of(args, DIRECT))
        KEPT.mkdir(parents=True, exist_ok=True)
        for cell in dict.fromkeys([DIRECT, *args.cells]):
            if cell == SCORES:
                answer_scores(args, model, tok, samples)
            else:
                make_rows(args, cell, model, tok, samples, pool)
    table(args.skip, args.limit)
    if samples:
        seeds(samples)


if __name__ == "__main__":
    try:
        main()
    except ttsi.InputError as e:
        sys.exit(f"choose: {e}")
