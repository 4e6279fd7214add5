"""Benchmark files as they are published -> records for ttsi.py, one JSON object a line.

    python data/convert.py sealtool.json > sealtool.jsonl
    python data/convert.py BFCL_v4_multiple.json > multiple.jsonl      # answers: possible_answer/ beside it
    python data/convert.py --answers ANSWERS.json < BFCL_v4_multiple.json > multiple.jsonl

Two forms are read, and told apart by their fields: Hammer's common one (sealtool, apibank_l1, apibank_l2, toolalpaca,
NexusRaven) and the Berkeley leaderboard's (BFCL). Standard error says how many items came in, how many are left, and why
the others are not. Standard library only: it runs where torch is not installed.
"""
import argparse
import itertools
import json
import math
import os
import re
import statistics
import sys
from collections import Counter
from pathlib import Path

class BadInput(ValueError):
    """Told in one line: file, place, what is wrong."""

class Dropped(Exception):
    """An item that is well formed and of no use to us; its text is the reason."""

def drop(condition, reason):
    if condition:
        raise Dropped(reason)

def fits(value, shape):
    """Has a JSON value this shape: a type, a tuple (one of them), [shape], {key: shape}; "key?" may be absent or null,
    ... is any key."""
    if isinstance(shape, tuple):
        return any(fits(value, s) for s in shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(v, shape[0]) for v in value)
    if not isinstance(shape, dict):
        return isinstance(value, shape)
    return isinstance(value, dict) and all(
        all(fits(v, part) for v in value.values()) if key is ... else
        key[-1] == "?" and value.get(key[:-1]) is None or fits(value.get(key.rstrip("?")), part)
        for key, part in shape.items())

TURNS = [{"role": str, "content": str}]
CALL = ({"name": str, "arguments": dict}, {"tool": str, "parameters": dict})  # the second in sealtool.json only
HAMMER = {"query": (str, TURNS), "answers": [CALL], "tools": [
    {"name": str, "description?": str, "parameters": {...: {}}, "required?": [str]}]}
BFCL = {"id": str, "question": [TURNS], "function": [
    {"name": str, "description?": str, "parameters": {"properties": {...: {}}, "required?": [str]}}]}
ANSWER = {"id": str, "ground_truth": [{...: {...: list}}]}

# ---------------------------------------------------------------------------------------------- tools and calls
TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean", "list": "array", "tuple": "array",
         "dict": "object", **{t: t for t in ("string", "integer", "number", "boolean", "array", "object")}}

def schema(spec, notes):
    """A parameter as JSON schema. "required": true and "optional" go, the tool's own list says it; so does a type that
    JSON schema does not have ("any"): then any value is legal."""
    spec = {{"choices": "enum"}.get(key, key): value for key, value in spec.items()
            if key != "optional" and (key != "required" or isinstance(value, list))}
    if "example" in spec:
        spec["examples"] = [spec.pop("example")]
    if "type" in spec:
        kind, _, inner = re.fullmatch(r"(\w*)([\[(](\w+)[\])])?.*", str(spec["type"]), re.S).groups()  # list(str)
        name = spec.pop("type")
        if kind.lower() in TYPES:
            spec["type"] = TYPES[kind.lower()]
        else:
            notes[f"parameters of type {json.dumps(name)[:40]}, unknown to JSON schema: any value is legal"] += 1
        if spec.get("type") == "array" and inner in TYPES:
            spec["items"] = {"type": TYPES[inner]}
    if isinstance(spec.get("items"), dict):
        spec["items"] = schema(spec["items"], notes)
    if fits(spec.get("properties"), {...: {}}):
        spec["properties"] = {name: schema(part, notes) for name, part in spec["properties"].items()}
    return spec

def tool(name, description, properties, required, notes):
    return {"type": "function", "function": {"name": name, "description": description, "parameters": {
        "type": "object", "properties": {p: schema(s, notes) for p, s in properties.items()}, "required": required}}}

def to_call(answer):
    return {"name": answer.get("name", answer.get("tool")),
            "arguments": answer.get("arguments", answer.get("parameters"))}

# ---------------------------------------------------------------------------------------------- Hammer's common form
SUFFIX = "Generate API Request:"  # closes every dialogue; the prompt asks for the call in its own words

def dialogue(turns):
    """API-Bank's turns as messages: `agent` is what the assistant said; `assistant` a call that it made, in a code
    fence, of one turn with what it said before; `tool` what came back."""
    messages = []
    for turn in turns:
        role, text, last = turn["role"], turn["content"].strip().removesuffix(SUFFIX).strip(), messages[-1:]
        if role == "assistant" and text.startswith("```"):
            calls = loads(text.strip("`"))
            if not fits(calls, [CALL]):
                raise ValueError(f"an earlier call must be a list of {{name, arguments}}, not {text[:60]!r}")
            if not last or last[0]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            made = messages[-1].setdefault("tool_calls", [])
            made += [{"type": "function", "function": to_call(c)} for c in calls]
        elif role == "tool" and last and last[0].get("tool_calls"):
            messages.append({"role": role, "name": last[0]["tool_calls"][-1]["function"]["name"], "content": text})
        else:
            messages.append({"role": "assistant" if role == "agent" else role, "content": text})
    return messages

def from_hammer(item, notes):
    tools = []
    for t in item["tools"]:
        if t["name"] == "components" and not t["parameters"]:  # ToolAlpaca's: a section of its documentation, no tool
            notes["times the pseudo-tool components left out"] += 1
            continue
        required = t.get("required") or [p for p, s in t["parameters"].items() if s.get("required") is True]
        tools.append(tool(t["name"], t.get("description") or "", t["parameters"], required, notes))
    query = item["query"]
    messages = dialogue(query) if isinstance(query, list) else [{"role": "user", "content": query}]
    return {"messages": messages, "tools": tools}, [to_call(a) for a in item["answers"]]

# ---------------------------------------------------------------------------------------------- the leaderboard's form
def plain(value):
    """-> all plain values that an acceptable value stands for. Inside an object, each is a list of acceptable ones
    again, "" for "may be left out"; ttsi.py's `accept` holds plain values only."""
    if isinstance(value, list) and any(isinstance(v, dict) for v in value):
        parts, join = [plain(v) if isinstance(v, dict) else [v] for v in value], list
    elif isinstance(value, dict):
        parts = [[[] if v == "" else [(key, v)] for v in (values if isinstance(values, list) else [values])]
                 for key, values in value.items()]
        join = lambda pairs: dict(itertools.chain(*pairs))
    else:
        return [value]
    drop(math.prod(map(len, parts)) > 1000, "more than 1000 acceptable values of one argument")
    return [join(choice) for choice in itertools.product(*parts)]

def from_bfcl(item, answers, notes):
    drop(item["id"] not in answers, "no answer with its id")
    drop(len(item["question"]) != 1, "several turns")
    tools = [tool(f["name"], f.get("description") or "", f["parameters"]["properties"],
                  f["parameters"].get("required") or [], notes) for f in item["function"]]
    calls, accept = [], {}
    for name, arguments in (pair for call in answers[item["id"]] for pair in call.items()):
        accept = {key: [v for value in values for v in plain(value)] for key, values in arguments.items()}
        drop(not all(accept.values()), "an argument for which nothing is acceptable")
        calls.append({"name": name, "arguments": {key: values[0] for key, values in accept.items() if "" not in values}})
    return {"messages": item["question"][0], "tools": tools, "accept": accept}, calls

# ---------------------------------------------------------------------------------------------- files
STDIN = "standard input"

def loads(text):
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None

def read(path):
    """-> [(place, item)] of a JSON array, or of JSON lines (as BFCL's files are, though named .json)."""
    try:
        text = (sys.stdin.buffer.read() if path == STDIN else Path(path).read_bytes()).decode("utf-8-sig")
    except (OSError, ValueError) as e:
        raise BadInput(f"{path}: cannot be read: {e}") from None
    whole = text.lstrip().startswith("[")
    items = []
    for number, part in enumerate([text] if whole else text.split("\n"), 1):
        try:
            items += [loads(part)] if part.strip() else []
        except ValueError as e:
            line, column = getattr(e, "lineno", 1) + number - 1, getattr(e, "colno", 1)
            raise BadInput(f"{path}:{line}:{column}: not JSON: {getattr(e, 'msg', e)}") from None
    items = items[0] if whole else items
    if not items:
        raise BadInput(f"{path}: nothing in it")
    return [(f"{path}: item {i}", item) for i, item in enumerate(items)]

def check(place, item, shape, form):
    if not fits(item, shape):
        wrong = [k for k in shape if not fits(item, {k: shape[k]})] if isinstance(item, dict) else ["it"]
        raise BadInput(f"{place}: not of {form}: {', '.join(wrong)} missing or of another shape")

def convert(path, answers_path=None):
    """-> (records, number of items, Counter of reasons for which items were dropped, Counter of other notes)."""
    items, answers, records, dropped, notes = read(path), {}, {}, Counter(), Counter()
    bfcl = isinstance(items[0][1], dict) and "question" in items[0][1]
    if bfcl:
        if path == STDIN and not answers_path:
            raise BadInput(f"{path}: BFCL's answers are in a file of their own; give --answers FILE")
        for place, answer in read(answers_path or str(Path(path).parent / "possible_answer" / Path(path).name)):
            check(place, answer, ANSWER, "BFCL's answers")
            answers[answer["id"]] = answer["ground_truth"]
    elif answers_path:
        raise BadInput(f"{path}: not BFCL's, so its answers are in it; leave --answers out")
    for number, (place, item) in enumerate(items):
        check(place, item, *((BFCL, "BFCL's form") if bfcl else (HAMMER, "Hammer's common form")))
        try:
            record, calls = from_bfcl(item, answers, notes) if bfcl else from_hammer(item, notes)
            names = [t["function"]["name"] for t in record["tools"]]
            drop(len(calls) != 1, "several calls" if calls else "no call")
            drop(calls[0]["name"] not in names, "the answer's tool is not on offer")
            drop(len(set(names) - {""}) < len(names), "a tool is on offer twice, or has no name")
            drop(not any(m["content"].strip() for m in record["messages"]), "no request")
            record = {"id": item["id"] if bfcl else str(number), **record, "call": calls[0]}
            json.dumps(record, allow_nan=False, ensure_ascii=False).encode()  # no NaN, no lone surrogate
        except Dropped as e:
            dropped[str(e)] += 1
        except (ValueError, RecursionError) as e:
            raise BadInput(f"{place}: {e}") from None
        else:
            if record["id"] in records:
                raise BadInput(f"{place}: id {json.dumps(record['id'])} is an earlier item's, too")
            records[record["id"]] = record
    if not records:
        raise BadInput(f"{path}: nothing is left of {len(items)} items: {told(dropped)}")
    return list(records.values()), len(items), dropped, notes

def told(counts):
    return ", ".join(f"{n} {what}" for what, n in counts.most_common())

def shape(records):
    """What to know of a benchmark before its scores are read: candidates (min/median/max), items with a single one, and
    what "take the first tool" scores on names, in percent."""
    n = [len(r["tools"]) for r in records]
    first = sum(r["tools"][0]["function"]["name"] == r["call"]["name"] for r in records)
    return f"{min(n)}/{statistics.median_low(n)}/{max(n)}", n.count(1), f"{100 * first / len(records):.1f}"

def main(argv=None):
    parser = argparse.ArgumentParser("convert.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", default="-", help="the benchmark's file (-, the default: standard input)")
    parser.add_argument("--answers", help="BFCL's answers (default: possible_answer/ beside FILE, the same name)")
    args = parser.parse_args(argv)
    path = STDIN if args.file == "-" else args.file
    try:
        records, n, dropped, notes = convert(path, args.answers)
        sys.stdout.reconfigure(encoding="utf-8", newline="\n")
        sys.stdout.write("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
        sys.stdout.flush()
    except (BadInput, OSError) as e:
        if isinstance(e, OSError):  # a closed pipe, a full disk; python would try again when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"convert: {e}", file=sys.stderr)
        return 2
    candidates, single, first = shape(records)
    print(f"convert: {path}: {n} items, {len(records)} left, {n - len(records)} dropped"
          + (f" ({told(dropped)})" if dropped else "") + "".join(f"\nconvert: {m} {what}" for what, m in notes.items())
          + f"\nconvert: candidates {candidates} (min/median/max), {single} items with one; the first tool listed is the"
          f" right one in {first} %", file=sys.stderr)
    return 0

if __name__ == "__main__":
    sys.exit(main())
