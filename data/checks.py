"""What the label-free checks make of right pairs, and of pairs that were spoiled on purpose.

python data/checks.py FILE.jsonl ...      # labelled samples; choose checks on BFCL and dev files

A right pair is a sample's request and its label. It is spoiled by the arguments of another item
(of the same tool where there is one), by an invented string, by leaving out a required argument,
and by adding an argument of another tool.
"""

import random
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.dont_write_bytecode = True

import ttsi  # noqa: E402


def spoiled(r, sample, samples):
    """Yields (kind, arguments) for each way in which this label can be spoiled."""
    name, arguments = sample["call"]["name"], sample["call"]["arguments"]
    rules, required, _ = ttsi.schema_of(sample["tools"], name)
    others = [s["call"] for s in samples if s["call"] != sample["call"]]
    alike = [call for call in others if call["name"] == name] or others
    if alike:
        yield "another item's arguments", r.choice(alike)["arguments"]
    texts = [key for key, value in arguments.items() if isinstance(value, str)]
    if texts:
        yield "an invented string", arguments | {r.choice(texts): "Zorblax Quimby"}
    given = sorted(required & arguments.keys())
    if given:
        left_out = r.choice(given)
        yield "a required argument missing", {k: v for k, v in arguments.items() if k != left_out}
    keys = [key for tool in sample["tools"] for key in ttsi.schema_of([tool], tool["name"])[0]]
    foreign = [key for key in keys if key not in rules]
    if rules and foreign:
        yield "an argument of another tool", arguments | {r.choice(foreign): 1}


def verdicts(samples, seed=0):
    """-> {"right" or a kind of spoiling: Counter of verdicts}"""
    r, found = random.Random(seed), {}
    for sample in samples:
        x = SimpleNamespace(tools=sample["tools"], asked=[])
        kinds = [("right", sample["call"]["arguments"]), *spoiled(r, sample, samples)]
        for kind, arguments in kinds:
            call = {"name": sample["call"]["name"], "arguments": arguments}
            pair = {"request": ttsi.user_text(sample["messages"]), "call": call}
            verdict = ttsi.fault(pair, [], x, ttsi.Config()) or "kept"
            found.setdefault(kind, Counter())[verdict] += 1
    return found


def main(paths):
    ttsi.pair_span = lambda x, pair: None  # no model, no context
    for path in paths:
        samples = [s for s in ttsi.read_jsonl(path, ttsi.to_sample).values() if "call" in s]
        print(f"{path}: {len(samples)} labelled samples, in percent")
        for kind, counts in verdicts(samples).items():
            n = counts.total()
            kept, behind = 100 * counts["kept"] / n, 100 * counts[ttsi.UNSAID] / n
            row = (
                f"kept {kept:5.1f}, placed behind {behind:5.1f}, refused {100 - kept - behind:5.1f}"
            )
            print(f"  {kind:28} n {n:4}  {row}")


if __name__ == "__main__":
    try:
        ttsi.need(sys.argv[1:], "give FILE.jsonl ..., of labelled samples")
        main(sys.argv[1:])
    except ttsi.InputError as e:
        sys.exit(f"checks: {e}")
