"""Benchmark files as they are published -> records for ttsi.py, one JSON object a line.

    python data/convert.py sealtool.json > sealtool.jsonl
    python data/convert.py BFCL_v4_multiple.json > multiple.jsonl  # answers: possible_answer/ there
    python data/convert.py --answers ANSWERS.json < BFCL_v4_multiple.json > multiple.jsonl

Two forms are read, and told apart by their fields: Hammer's common one (sealtool, apibank_l1,
apibank_l2, toolalpaca, NexusRaven) and the Berkeley leaderboard's (BFCL). Standard error says how
many items came in, how many are left, and why the others are not. Standard library only: it runs
where torch is not installed.
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
    """Has a JSON value this shape: a type, a tuple (one of them), [shape], {key: shape}?

    "key?" may be absent or null, ... is any key.
    """
    if isinstance(shape, tuple):
        return any(fits(value, s) for s in shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(v, shape[0]) for v in value)
    if not isinstance(shape, dict):
        return isinstance(value, shape)
    if not isinstance(value, dict):
        return False
    for key, part in shape.items():
        if key is ...:
            parts = value.values()
        elif key[-1] == "?" and value.get(key[:-1]) is None:
            parts = []
        else:
            parts = [value.get(key.rstrip("?"))]
        if not all(fits(v, part) for v in parts):
            return False
    return True


TURNS = [{"role": str, "content": str}]
CALL = (
    {"name": str, "arguments": dict},
    {"tool": str, "parameters": dict},
)  # or so, in sealtool.json
TOOL = {"name": str, "description?": str}
HAMMER_TOOL = TOOL | {"parameters": {...: {}}, "required?": [str]}
BFCL_TOOL = TOOL | {"parameters": {"properties": {...: {}}, "required?": [str]}}
HAMMER = {"query": (str, TURNS), "answers": [CALL], "tools": [HAMMER_TOOL]}
BFCL = {"id": str, "question": [TURNS], "function": [BFCL_TOOL]}
ANSWER = {"id": str, "ground_truth": [{...: {...: list}}]}

# ---------------------------------------------------------------------------------- tools and calls

TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}
TYPES |= {"list": "array", "tuple": "array", "dict": "object"}
TYPES |= {name: name for name in TYPES.values()}


def schema(spec, notes):
    """A parameter as JSON schema.

    "required": true and "optional" go, the tool's own list says it; so does a type that JSON schema
    does not have ("any"): then any value is legal.
    """
    fields, spec = spec, {}
    for key, value in fields.items():
        if key != "optional" and (key != "required" or isinstance(value, list)):
            spec["enum" if key == "choices" else key] = value
    if "example" in spec:
        spec["examples"] = [spec.pop("example")]
    if "type" in spec:
        name = spec.pop("type")
        form = re.fullmatch(r"(\w*)([\[(](\w+)[\])])?.*", str(name), re.S)  # e.g. list(str)
        kind, _, inner = form.groups()
        if kind.lower() in TYPES:
            spec["type"] = TYPES[kind.lower()]
        else:
            unknown = f"parameters of type {json.dumps(name)[:40]}, unknown to JSON schema"
            notes[f"{unknown}: any value is legal"] += 1
        if spec.get("type") == "array" and inner in TYPES:
            spec["items"] = {"type": TYPES[inner]}
    if isinstance(spec.get("items"), dict):
        spec["items"] = schema(spec["items"], notes)
    if fits(spec.get("properties"), {...: {}}):
        parts = spec["properties"].items()
        spec["properties"] = {name: schema(part, notes) for name, part in parts}
    return spec


def tool(name, description, properties, required, notes):
    """A tool as most chat templates and libraries write it."""
    properties = {key: schema(spec, notes) for key, spec in properties.items()}
    parameters = {"type": "object", "properties": properties, "required": required}
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


def to_call(answer):
    """{name, arguments}, or sealtool.json's {tool, parameters} -> {name, arguments}."""
    name = answer.get("name", answer.get("tool"))
    return {"name": name, "arguments": answer.get("arguments", answer.get("parameters"))}


# ------------------------------------------------------------------------ Hammer's common form

# It closes every dialogue; the prompt asks for the call in its own words.
SUFFIX = "Generate API Request:"


def dialogue(turns):
    """API-Bank's turns as messages.

    `agent` is what the assistant said; `assistant` a call that it made, in a code fence, of one
    turn with what it said before; `tool` what came back.
    """
    messages = []
    for turn in turns:
        role, last = turn["role"], messages[-1:]
        text = turn["content"].strip().removesuffix(SUFFIX).strip()
        if role == "assistant" and text.startswith("```"):
            calls = loads(text.strip("`"))
            if not fits(calls, [CALL]):
                wanted = "an earlier call must be a list of {name, arguments}"
                raise ValueError(f"{wanted}, not {text[:60]!r}")
            if not last or last[0]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            made = messages[-1].setdefault("tool_calls", [])
            made += [{"type": "function", "function": to_call(c)} for c in calls]
        elif role == "tool" and last and last[0].get("tool_calls"):
            name = last[0]["tool_calls"][-1]["function"]["name"]
            messages.append({"role": role, "name": name, "content": text})
        else:
            messages.append({"role": "assistant" if role == "agent" else role, "content": text})
    return messages


def from_hammer(item, notes):
    """-> (record without id and call, its calls)."""
    tools = []
    for t in item["tools"]:
        name, parameters = t["name"], t["parameters"]
        if name == "components" and not parameters:  # a section of ToolAlpaca's documentation
            notes["times the pseudo-tool components left out"] += 1
            continue
        required = [key for key, spec in parameters.items() if spec.get("required") is True]
        required = t.get("required") or required
        tools.append(tool(name, t.get("description") or "", parameters, required, notes))
    query = item["query"]
    messages = dialogue(query) if isinstance(query, list) else [{"role": "user", "content": query}]
    return {"messages": messages, "tools": tools}, [to_call(a) for a in item["answers"]]


# --------------------------------------------------------------------------- the leaderboard's form


def plain(value):
    """-> all plain values that an acceptable value stands for; ttsi.py's `accept` holds only those.

    Inside an object, each is a list of acceptable ones again, "" for "may be left out".
    """
    if isinstance(value, list) and any(isinstance(v, dict) for v in value):
        parts, join = [plain(v) if isinstance(v, dict) else [v] for v in value], list
    elif isinstance(value, dict):
        parts = []
        for key, values in value.items():
            values = values if isinstance(values, list) else [values]
            parts.append([[] if v == "" else [(key, v)] for v in values])

        def join(pairs):
            return dict(itertools.chain(*pairs))
    else:
        return [value]
    drop(math.prod(map(len, parts)) > 1000, "more than 1000 acceptable values of one argument")
    return [join(choice) for choice in itertools.product(*parts)]


def from_bfcl(item, answers, notes):
    """-> (record without id and call, its calls)."""
    drop(item["id"] not in answers, "no answer with its id")
    drop(len(item["question"]) != 1, "several turns")
    tools = []
    for f in item["function"]:
        properties, required = f["parameters"]["properties"], f["parameters"].get("required")
        description = f.get("description") or ""
        tools.append(tool(f["name"], description, properties, required or [], notes))
    calls, accept = [], {}
    for name, arguments in (pair for call in answers[item["id"]] for pair in call.items()):
        accept = {}
        for key, values in arguments.items():
            accept[key] = [v for value in values for v in plain(value)]
        drop(not all(accept.values()), "an argument for which nothing is acceptable")
        given = {key: values[0] for key, values in accept.items() if "" not in values}
        calls.append({"name": name, "arguments": given})
    return {"messages": item["question"][0], "tools": tools, "accept": accept}, calls


# --------------------------------------------------------------------------------------- files

STDIN = "standard input"


def loads(text):
    """A JSON value, or a ValueError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read(path):
    """-> [(place, item)] of a JSON array, or of JSON lines (as BFCL's .json files are)."""
    try:
        data = sys.stdin.buffer.read() if path == STDIN else Path(path).read_bytes()
        text = data.decode("utf-8-sig")
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
    """BadInput, if an item is not of a form."""
    if not fits(item, shape):
        wrong = ["it"]
        if isinstance(item, dict):
            wrong = [key for key in shape if not fits(item, {key: shape[key]})]
        raise BadInput(f"{place}: not of {form}: {', '.join(wrong)} missing or of another shape")


def convert(path, answers_path=None):
    """-> (records, number of items, Counter of why items were dropped, Counter of notes)."""
    items, answers, records = read(path), {}, {}
    dropped, notes = Counter(), Counter()
    bfcl = isinstance(items[0][1], dict) and "question" in items[0][1]
    if bfcl:
        if path == STDIN and not answers_path:
            own = "BFCL's answers are in a file of their own"
            raise BadInput(f"{path}: {own}; give --answers FILE")
        beside = str(Path(path).parent / "possible_answer" / Path(path).name)
        for place, answer in read(answers_path or beside):
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
            text = json.dumps(record, allow_nan=False, ensure_ascii=False)  # no NaN
            text.encode()  # no lone surrogate
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
    """A Counter in words."""
    return ", ".join(f"{n} {what}" for what, n in counts.most_common())


def shape(records):
    """What to know of a benchmark before its scores are read.

    -> candidates (min/median/max), items with a single one, and what "take the first tool" scores
    on names, in percent.
    """
    n = [len(r["tools"]) for r in records]
    first = sum(r["tools"][0]["function"]["name"] == r["call"]["name"] for r in records)
    percent = f"{100 * first / len(records):.1f}"
    return f"{min(n)}/{statistics.median_low(n)}/{max(n)}", n.count(1), percent


def main(argv=None):
    """-> the exit status."""
    parser = argparse.ArgumentParser(
        "convert.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    file = "the benchmark's file (-, the default: standard input)"
    parser.add_argument("file", nargs="?", default="-", help=file)
    answers = "BFCL's answers (default: possible_answer/ beside FILE, the same name)"
    parser.add_argument("--answers", help=answers)
    args = parser.parse_args(argv)
    path = STDIN if args.file == "-" else args.file
    try:
        records, n, dropped, notes = convert(path, args.answers)
        sys.stdout.reconfigure(encoding="utf-8", newline="\n")
        sys.stdout.write("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
        sys.stdout.flush()
    except (BadInput, OSError) as e:
        # After a closed pipe, or on a full disk, python would try again when it ends.
        if isinstance(e, OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"convert: {e}", file=sys.stderr)
        return 2
    candidates, single, first = shape(records)
    why = f" ({told(dropped)})" if dropped else ""
    lines = [f"{path}: {n} items, {len(records)} left, {n - len(records)} dropped{why}"]
    lines += [f"{count} {what}" for what, count in notes.items()]
    lines += [
        f"candidates {candidates} (min/median/max), {single} items with one;"
        f" the first tool listed is the right one in {first} %"
    ]
    print(*(f"convert: {line}" for line in lines), sep="\n", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
