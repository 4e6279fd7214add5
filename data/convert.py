"""Records of function calling, in the forms that people have -> the one form that ttsi.py reads.

    python data/convert.py FILE > calls.jsonl  # no FILE, or -: standard input
    python data/convert.py --answers ANSWERS BFCL_v4_multiple.json > multiple.jsonl

FILE holds JSON objects, one a line, or one array of them, as they are or in gzip. Written is, one
a line, with the label under `call` alone or without any,

    {"id": "1", "messages": [{"role": "user", "content": "Cancel my flight to Rome"}],
     "tools": [{"type": "function", "function": {"name": "cancel_flight", ...}}],
     "call": {"name": "cancel_flight", "arguments": {"city": "Rome"}}}

What is well formed and of no use (several calls, the answer's tool not on offer) is dropped, and
counted by its reason. Of what is malformed ten are named with their lines. All others are written.
The exit status is 2 if nothing is left, or a file cannot be read or written.
"""

import gzip
import json
import re
import statistics
import sys
import zlib
from argparse import ArgumentParser, RawTextHelpFormatter
from collections import Counter
from contextlib import suppress
from pathlib import Path


class Dropped(Exception):
    """A record that is well formed and of no use to us; its text is the reason."""


def need(ok, text, error=ValueError):
    if not ok:
        raise error(text)


def present(pairs):
    """A JSON object without its nulls, which Arrow writes for what is absent."""
    keys = [key for key, _ in pairs]
    need(len(set(keys)) == len(keys), f"a key twice among {keys}; keep one")
    return {key: value for key, value in pairs if value is not None}


STRICT = json.JSONDecoder(object_pairs_hook=present, strict=False)
LENIENT = json.JSONDecoder(parse_int=str, strict=False)  # finds the end of what STRICT refuses


def decoded(value):
    """What a string says that holds JSON; anything else as it is."""
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            return STRICT.decode(value.strip() or "null")
    return value


def encoded(value):
    """A value as one line of JSON; a ValueError if it holds NaN, 1e999 or a lone surrogate."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    text.encode()
    return text


def as_object(value, what):
    """An object, or the one that a string holds as JSON; of nothing the empty one."""
    value = decoded(value) or {}
    need(isinstance(value, dict), f"{what} must be an object {{...}}, not {type(value).__name__}")
    return value


def as_list(value):
    """A list as it is; of nothing the empty one; of anything else the list of that."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def find(record, *names):
    """What stands in an object under one of these names: the first that is not empty."""
    values = [decoded(record[name]) for name in names if name in record]
    return max(values, key=bool, default=None)


def named(value, what):
    """A tool or a call, or the one inside it, with its name under "name"."""
    value = as_object(value, f"a {what}")
    inner = find(value, "function", "toolSpec")  # toolSpec: Bedrock
    value = inner if isinstance(inner, dict) else value
    name = value.get("name", value.get("tool"))  # tool: Seal-Tools
    need(isinstance(name, str) and name, f'a {what} has no "name"; give one: {[*value]}')
    return value | {"name": name}


# ------------------------------------------------------------------------------------------ tools
SCHEMA = ("parameters", "inputSchema", "input_schema")  # MCP and Bedrock; Anthropic
TYPES = {"str": "string", "int": "integer", "float": "number", "double": "number"}
TYPES |= {"bool": "boolean", "list": "array", "tuple": "array", "set": "array", "dict": "object"}
TYPES |= {name: name for name in [*TYPES.values(), "null"]}


def typed(kind):
    """A type as JSON schema: `List[int], optional` is {"type": "array", "items": ...}."""
    name, *inner = re.findall(r"\w+", kind.lower().removeprefix("optional")) or [""]
    schema = {"type": TYPES[name]} if name in TYPES else {}  # "any": any value is legal
    items = typed(" ".join(inner)) if name in ("list", "set", "array") else {}
    return schema | ({"items": items} if items else {})


def to_schema(rule):
    """JSON schema of what is nearly so. Which parameters are required, a list says, no flag."""
    rule = as_object(rule, "a parameter's schema")
    rule = {key: value for key, value in rule.items() if key != "optional"}
    if not isinstance(rule.get("required"), list):
        rule.pop("required", None)
    if "choices" in rule:
        rule["enum"] = rule.pop("choices")
    if "example" in rule:
        rule["examples"] = [rule.pop("example")]
    if isinstance(rule.get("type"), str):  # not ["string", "null"]
        rule = typed(rule.pop("type")) | rule
    if isinstance(rule.get("items"), dict):
        rule["items"] = to_schema(rule["items"])
    if isinstance(rule.get("properties"), dict):
        rule["properties"] = {key: to_schema(part) for key, part in rule["properties"].items()}
    return rule


def is_map(value):
    """Is it {parameter: rule}? The values tell: a parameter may be called type, required or not."""
    return isinstance(value, dict) and all(isinstance(rule, dict) for rule in value.values())


def is_required(rule, marked):
    """Is a parameter required, if no list says so? `marked`: only if its own flag does."""
    if isinstance(rule.get("required"), bool):
        return rule["required"]
    optional = "default" in rule or rule.get("optional")
    return not (marked or optional or "optional" in str(rule.get("type")).lower())


def to_tool(tool, marked):
    """A tool of any API as OpenAI writes it."""
    schema = as_object(find(tool, *SCHEMA), "its schema")
    if "inputSchema" in tool:  # Bedrock
        schema = as_object(schema.get("json", schema), "its schema")
    is_bare = is_map(schema) and not is_map(schema.get("properties"))  # xLAM, Hammer
    schema = {"properties": schema} if is_bare else schema
    rules = as_object(schema.get("properties"), "properties")
    rules = {key: as_object(rule, f"the schema of {key}") for key, rule in rules.items()}
    required = schema.get("required", tool.get("required"))  # Seal-Tools has it beside them
    if not isinstance(required, list):
        required = [key for key, rule in rules.items() if is_required(rule, marked or not is_bare)]
    schema = {"type": "object"} | to_schema(schema | {"properties": rules})
    # What may be null may be absent, which is the same here.
    maybe = [k for k, r in rules.items() if "null" in f"{r.get('type')} {r.get('anyOf')}"]
    maybe += [k for k, r in rules.items() if r.get("nullable") is True]
    schema["required"] = [k for k in map(str, required) if k in rules and k not in maybe]
    about = {"name": tool["name"], "description": str(tool.get("description", ""))}
    return {"type": "function", "function": about | {"parameters": schema}}


def to_tools(record):
    """The tools of a record; `components` of ToolAlpaca, without a schema, is none."""
    tools = find(record, "tools", "functions", "toolConfig")
    tools = tools.get("tools") if isinstance(tools, dict) else tools  # of MCP, or of Bedrock
    need(isinstance(tools, list), 'no tools; give "tools": [{"name": ..., "parameters": ...}, ...]')
    tools = [named(tool, "tool") for tool in tools]
    names = [tool["name"] for tool in tools]
    # Of bare maps, ToolAlpaca's (components) mark what is required, and API-Bank's (return) require
    # nothing. In all others, xLAM's, all is required but what has a default or is called optional.
    marked = '"required": true' in encoded(tools) or "components" in names
    marked = marked or any("return" in tool for tool in tools)
    tools = [tool for tool in tools if tool["name"] != "components" or find(tool, *SCHEMA)]
    need(tools, "no tool is on offer", Dropped)
    need(len(set(names)) == len(names), "a tool is on offer twice", Dropped)
    return [to_tool(tool, marked) for tool in tools]


# ---------------------------------------------------------------------- calls, messages, records
ARGUMENTS = ("arguments", "parameters", "input", "args")  # Seal-Tools; Anthropic
# Of messages, and of fields of a record: xLAM has a query, TRL a prompt and a completion.
ROLES = {"system": "system developer", "user": "user human messages query prompt"}
ROLES |= {"assistant": "assistant model gpt agent tool_call function_call completion"}
ROLES |= {"tool": "tool function ipython observation tool_response"}
ROLES = {name: role for role, names in ROLES.items() for name in names.split()}
SUFFIX = re.compile(r"\s*Generate API Request:\s*$")  # ends API-Bank's dialogues, and is no turn
PYTHON = {"True": "true", "False": "false", "None": "null"}


def to_call(value):
    """-> {name, arguments} of a call of any API; no arguments are none."""
    call = named(value, "call")
    return {"name": call["name"], "arguments": as_object(find(call, *ARGUMENTS), "arguments")}


def calls_in_text(text):
    """The calls that a text holds as JSON among other things; one in a thought is none."""
    text = text.rpartition("</think>")[2]
    text = text[text.find("{") :]  # prose may hold a lone quote
    words = r'"(?:\\.|[^"\\])*"|\b(?:True|False|None)\b'  # strings stay as they are
    text = re.sub(words, lambda found: PYTHON.get(found[0], found[0]), text)
    calls, at = [], 0
    while at := text.find("{", at) + 1:
        with suppress(ValueError, RecursionError):
            value, end = STRICT.raw_decode(text, at - 1)
            if value.keys() & set(ARGUMENTS):
                calls.append(to_call(value))
                at = end
    return calls


def add(messages, role, text, calls):
    """One more message; a call is of one turn with what the assistant said just before."""
    last = messages[-1] if messages else {}
    earlier = last.get("tool_calls", [])
    message = {"role": role, "content": text}
    if role == "tool" and len(earlier) == 1:
        message = {"name": earlier[0]["function"]["name"]} | message
    if calls:
        message["tool_calls"] = [{"type": "function", "function": to_call(c)} for c in calls]
    if calls and last.get("role") == "assistant" and not text.strip():
        last["tool_calls"] = earlier + message["tool_calls"]
    elif calls or text.strip() or role == "tool":
        messages.append(message)


def add_turn(messages, turn, place):
    """The messages of one turn: Anthropic has the results of tools in parts of a user's turn."""
    turn = as_object(turn, place)
    role = ROLES.get(str(turn.get("role")).lower())
    need(role, f"{place}: no known role; give system, user, assistant or tool")
    texts, calls = [], list(as_list(find(turn, "tool_calls", "function_call")))
    for part in as_list(turn.get("content")):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else part
        if kind == "tool_use":
            calls.append(part)
        elif kind == "tool_result":
            add_turn(messages, part | {"role": "tool"}, place)
        elif isinstance(text, str):
            texts.append(SUFFIX.sub("", text))
        elif role == "tool":  # a result may be anything
            texts.append(encoded(part))
        elif kind not in ("thinking", "redacted_thinking"):
            raise Dropped("a message has an image, or so")
    text = "\n".join(texts)
    if role == "assistant" and not calls:
        calls = calls_in_text(text)
        text = "" if calls else text
    need(calls or "call" not in str(turn["role"]), f"{place}: no call")  # ms-swift: tool_call
    add(messages, role, text, calls)


def to_dialogue(record):
    """All messages of a record, its label's included."""
    keys = ["messages"] if "messages" in record else ["query", "prompt", "completion"]
    need({*keys} & {*record}, 'no request; give "messages": [{"role": "user", "content": "..."}]')
    messages = []
    for key in ["system", *keys]:
        turns = decoded(record.get(key))
        if key == "system" or not isinstance(turns, list):
            turns = [{"role": key, "content": record.get(key)}]
        for n, turn in enumerate(turns):
            add_turn(messages, turn, f"{key}[{n}]")
    need(any(m["role"] == "user" for m in messages), "no request by the user", Dropped)
    return messages


def take_label(record, messages, names):
    """-> the label, or None. It leaves the messages, if they end with it."""
    need(decoded(record.get("answers")) != [], "no call is right", Dropped)
    labels = find(record, "call", "answers", "tool_calls") or None
    calls = [to_call(label) for label in as_list(labels)]
    if "tool_calls" in messages[-1]:
        last = [call["function"] for call in messages.pop()["tool_calls"]]
        calls = last if calls == last[:1] else calls + last
    need(len(calls) < 2, "several calls", Dropped)
    need(all(call["name"] in names for call in calls), "the answer's tool is not on offer", Dropped)
    # A call before a result or another request is history; one after them would be the label.
    for message in reversed(messages):
        if message["role"] in ("user", "tool"):
            break
        need("tool_calls" not in message, "the messages hold the label; end them before it")
        forms = [form.format(n) for n in names for form in ("{}(", "={}", ": '{}'", ': "{}"')]
        unread = any(form in message["content"] for form in forms)
        need(not unread, 'the last message has a call in a form that is not read; give "call"')
    return next(iter(calls), None)


def first_accepted(value):
    """The first acceptable value of each argument; in BFCL an object has such lists, too."""
    if isinstance(value, list):
        return [first_accepted(item) for item in value]
    if not isinstance(value, dict):
        return value
    lists = {key: as_list(values) or [None] for key, values in value.items()}
    # "" and null say: it may be left out.
    stated = {key: v for key, v in lists.items() if "" not in v and None not in v}
    return {key: first_accepted(values[0]) for key, values in stated.items()}


def from_bfcl(item, answers):
    """An item of BFCL, the Berkeley leaderboard -> a record with messages, tools, call, accept."""
    answer = as_list(answers.get(str(item.get("id"))))
    need(answer, "no answer with its id; give BFCL's by --answers", Dropped)
    need(len(item["question"]) == 1, "several turns", Dropped)
    need(len(answer) == 1, "several calls", Dropped)
    ((name, accept),) = as_object(answer[0], "an answer").items()
    accept = as_object(accept, "an answer's arguments")
    need([] not in accept.values(), "an argument with no acceptable value", Dropped)
    record = {"messages": item["question"][0], "tools": item["function"]}
    return item | record | {"call": {"name": name}, "accept": accept}


def to_record(record, number):
    """A record of any form -> {id, messages, tools, call?}."""
    tools = to_tools(record)
    names = [tool["function"]["name"] for tool in tools]
    messages = to_dialogue(record)
    call = take_label(record, messages, names)
    name = str(record.get("id", number))
    need(name and name.isprintable(), f"id {name!r} is no text; leave it out, and get a number")
    out = {"id": name, "messages": messages, "tools": tools}
    if call:
        accepted = first_accepted(as_object(record.get("accept"), '"accept"'))
        out["call"] = call | {"arguments": accepted | call["arguments"]}
    return out


# ------------------------------------------------------------------------------------------ files
def read(path, faults):
    """Yields (place, text) of each item of JSON lines, or of one JSON array."""
    data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    # Bytes that are not UTF-8 become half surrogates, which are refused with their record.
    text = data.decode("utf-8-sig", errors="surrogateescape")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    start = re.match(r"\s*\[\s*", text)
    if not start:
        for line, item in enumerate(text.split("\n"), 1):
            if item.strip():
                yield f"{path}:{line}", item
        return
    line, at = 1, 0
    try:
        while start:
            line += text.count("\n", at, start.end())
            at = start.end()
            end = LENIENT.raw_decode(text, at)[1]
            yield f"{path}:{line}", text[at:end]
            start = re.compile(r"\s*,\s*").match(text, end)
        need(text[end:].strip() == "]", "after this item , or ] is missing")
    except (ValueError, RecursionError) as e:
        faults.append(f"{path}:{line}: not JSON: {e}; mend it: nothing after it is read")


def convert(path, answers_path=None):
    """-> ([records], number of items, Counter of why items were dropped, [faults])."""
    records, answers, items, dropped, faults = {}, {}, 0, Counter(), []
    beside = Path(path).parent / "possible_answer" / Path(path).name
    if answers_path or beside.exists():
        for place, text in read(answers_path or beside, faults):
            answer = as_object(text, place)
            answers[str(answer.get("id"))] = answer.get("ground_truth")
    for place, text in read(path, faults):
        items += 1
        try:
            record = as_object(STRICT.decode(text), "a record")
            encoded(record)
            if isinstance(record.get("question"), list) and "function" in record:
                record = from_bfcl(record, answers)
            record = to_record(record, items)
            encoded(record)
            need(record["id"] not in records, "its id is an earlier record's; give each its own")
            records[record["id"]] = record
        except Dropped as e:
            dropped[str(e)] += 1
        except (ValueError, RecursionError) as e:
            faults.append(f"{place}: {' '.join(str(e).split())[:300]}")
    return list(records.values()), items, dropped, faults


def shape(records):
    """What to know of a benchmark before its scores are read, in words."""
    n = [len(record["tools"]) for record in records]
    spread = f"{min(n)}/{statistics.median_low(n)}/{max(n)}"
    text = f"candidates {spread} (min/median/max), {n.count(1)} items with one"
    labelled = [record for record in records if "call" in record]
    first = [r["tools"][0]["function"]["name"] == r["call"]["name"] for r in labelled]
    if not labelled:
        return f"{text}; none has a label"
    share = 100 * statistics.mean(first)
    return f"{text}; the first tool listed is the right one in {share:.1f} %"


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("file", nargs="?", default="-", help="-, or none: standard input")
    parser.add_argument("--answers", help="BFCL's, if they are not in possible_answer/ beside FILE")
    args = parser.parse_args()
    try:
        records, items, dropped, faults = convert(args.file, args.answers)
        # Not through sys.stdout: on a full disk python would try again when it ends.
        with open(1, "w", encoding="utf-8", newline="\n", closefd=False) as out:
            out.writelines(encoded(record) + "\n" for record in records)
    except (OSError, EOFError, zlib.error, ValueError) as e:
        parser.exit(2, f"convert: {e}\n")
    why = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())
    why = f" ({why})" if why else ""
    counts = f"{items} items, {len(records)} left, {dropped.total()} dropped{why}"
    lines = [*faults[:10], f"{args.file}: {counts}, {len(faults)} faults"]
    lines.append(shape(records) if records else "nothing is left")
    print("\n".join(f"convert: {line}" for line in lines), file=sys.stderr)
    sys.exit(0 if records else 2)


if __name__ == "__main__":
    main()
