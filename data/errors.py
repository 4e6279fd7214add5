"""Where a model errs when it answers directly, and which signs tell it without a label.

    python data/errors.py --model FOLDER --data FILE ... --limit 100
    python data/errors.py --kept               # tables of kept rows alone, into the page beside

Rows go to data/results/errors/ as they come, without a benchmark's texts; a run that was cut off
goes on. Processes with RANK and WORLD_SIZE share it, and a last one without packs the rows.
"""

import argparse
import re
import statistics
import sys
from contextlib import suppress
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import experiments  # noqa: E402

import ttsi  # noqa: E402

ROWS = HERE / "results/errors"
KINDS = ("no call", "another tool", "argument missing", "argument invented", "another value")
SIGNS = {  # of a row: the higher, the surer of its call
    "margin": lambda row: row["margin"],
    "checks": lambda row: not row["flaw"],
    "both": lambda row: ttsi.certainty(row["margin"], row["flaw"], ttsi.Config()),
    "log P of the call": lambda row: row["nats"][0],
    "log P of its arguments": lambda row: row["nats"][1],
    "log P of its least likely value": lambda row: row["nats"][2],
}


class Direct(experiments.Lab):
    """One model on one file of labelled samples, answered directly."""

    def config(self, name):
        return ttsi.parse_arguments([*self.args.flags.split(), "--tau", "0"])

    def path(self, name, whole=False):
        return Path(self.args.rows) / Path(self.model).name / f"{self.data.stem}.jsonl"

    def row(self, name, i):
        model, tok = self.base
        with ttsi.advising(f"{self.data}: {i}", "leave it out"):  # such as one beyond the context
            return look(model, tok, self.samples[i], self.config(name))


def look(model, tok, sample, cfg):
    """-> a row: of the direct answer its signs and, looking at the label only then, its errors."""
    unlabelled = {key: value for key, value in sample.items() if key != "call"}
    result = ttsi.tt_si(model, tok, unlabelled, cfg)
    nats = log_probabilities(model, ttsi.prepare(tok, unlabelled, cfg), result.direct)
    row = {"id": result.id, "margin": result.margin, "flaw": result.flaw, "nats": nats}
    row["grade"] = ttsi.grade(result.direct, sample["call"])
    return row | {"errors": errors_of(ttsi.parse(result.direct), sample["call"])}


def log_probabilities(model, x, text):
    """-> log P, nats: of an answer, of its arguments, and of the least likely of their values; of
    one without values that of the answer thrice."""
    values = value_spans(text) or [(0, len(text))]
    spans = [(0, len(text)), (values[0][0], len(text)), *values]
    ids, rows = ttsi.continuation(x.tok, text), []
    for span in spans:
        # Places in the text become numbers of tokens.
        begin, end = (len(ttsi.continuation(x.tok, text, place)) for place in span)
        rows.append((x.ids + ids[:end], len(x.ids) + begin))
    with torch.no_grad():
        logp = ttsi.logprob(rows, ttsi.Prefix(model, x.ids[:-1])).tolist()
    return [*logp[:2], min(logp[2:])]


def value_spans(text):
    """-> where each value of a call's arguments begins and ends in its text."""
    inside = re.search('"(arguments|parameters)"', text)
    spans, end = [], inside.end() if inside else 0
    with suppress(*ttsi.MALFORMED):
        for key in ttsi.parse(text)["arguments"]:
            begin = text.index(f"{ttsi.dumps(key)}:", end) + len(ttsi.dumps(key)) + 1
            begin += len(text[begin:]) - len(text[begin:].lstrip())
            _, end = ttsi.DECODER.raw_decode(text, begin)
            spans.append((begin, end))
    return spans


def errors_of(call, gold):
    """-> the kinds of what is wrong with a call; of another tool's arguments nothing is told."""
    if not call or call["name"] != gold["name"]:
        return ["another tool" if call else "no call"]
    found, wanted = call["arguments"], gold["arguments"]
    # The values of the keys that both have, compared as in a grade.
    common = {key: wanted[key] for key in wanted if key in found}
    mine = {key: found[key] for key in common}
    same = ttsi.grade(ttsi.dumps(call | {"arguments": mine}), gold | {"arguments": common})[1]
    is_so = (wanted.keys() - found.keys(), found.keys() - wanted.keys(), not same)
    return [kind for kind, so in zip(KINDS[2:], is_so, strict=True) if so]


def auroc(rows, sign, of=1):
    """The area under the ROC curve for wrong calls, or tools (of=0): how often a wrong one has a
    lower sign than a right one; a tie counts half."""
    wrong = [sign(row) for row in rows if not row["grade"][of]]
    right = [sign(row) for row in rows if row["grade"][of]]
    below = [(a < b) + (a == b) / 2 for a in wrong for b in right]
    return statistics.mean(below or [0.5])


def table(places):
    """{place: rows} -> a table in Markdown. Rows of the experiments tell neither all kinds of
    errors nor log P."""
    columns = [column(rows) for rows in places.values()]
    names = max(columns, key=len, default={})
    lines = [["", *places], ["---"] * (len(places) + 1)]
    lines += [[name, *(found.get(name, "") for found in columns)] for name in names]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def column(rows):
    """-> {line: text}, of one place."""
    found = {"items": f"{len(rows)}"}
    whole = "nats" in rows[0]
    for kind in KINDS if whole else ():
        found[kind] = f"{sum(kind in row['errors'] for row in rows)}"
    found["right call"] = f"{sum(row['grade'][1] for row in rows)}"
    found["AUROC for wrong tools: margin"] = f"{auroc(rows, SIGNS['margin'], of=0):.2f}"
    for name in SIGNS if whole else [*SIGNS][:3]:
        found[f"AUROC for wrong calls: {name}"] = f"{auroc(rows, SIGNS[name]):.2f}"
    return found


def kept_rows(folder):
    """-> {file: rows} of a model, and those of its direct answers in the experiments, seed 0."""
    places = {}
    for file in sorted({re.sub(r"\.jsonl(\.gz)?$", "", path.name) for path in folder.iterdir()}):
        _, rows = experiments.read_rows(folder / f"{file}.jsonl")
        if rows:  # none yet, where a run was cut off at once
            places[file] = [*rows.values()]
    for path in sorted(experiments.RESULTS.glob(f"rows/{folder.name}/*-default-0-*.gz")):
        _, rows = experiments.read_rows(path.with_suffix(""))
        file = experiments.PLACES.get(path.name.split("-default-")[0])
        answered = [row for row in rows.values() if row["margin"] is not None]
        if file:
            places.setdefault(file, []).extend(map(experiments.direct_row, answered))
    return places


def main(argv):
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--model", default=ttsi.Config.model, help="its folder; none: the embedded one")
    p.add_argument("--data", nargs="*", default=[], help="files of labelled samples")
    p.add_argument("--flags", default="", help='of ttsi.py, as in --flags="--dtype bfloat16"')
    p.add_argument("--limit", type=int, default=0, help="so many items of a file, by a hash")
    p.add_argument("--kept", action="store_true", help="of kept rows; writes the page")
    p.add_argument("--rows", default=ROWS, help="where rows are kept")
    p.set_defaults(pool=[])  # a Lab's, for SFT
    args = p.parse_args(argv)
    ttsi.need(args.kept or args.data, "give --kept or --model FOLDER --data FILE ...")
    for path in args.data:
        lab = Direct(args, args.model, path, 0)
        lab.make("errors", experiments.seeded(lab.samples)[: args.limit or None])
    for folder in sorted(path for path in Path(args.rows).iterdir() if path.is_dir()):
        text = table(kept_rows(folder))
        print(f"\n{folder.name}\n\n{text}")
        if args.kept:
            experiments.publish(f"errors {folder.name}", text, {}, Path(args.rows))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except (ttsi.InputError, OSError) as e:
        print("errors:", e, file=sys.stderr)
        sys.exit(2)
