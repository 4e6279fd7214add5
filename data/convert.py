"""Records of function calling, in the forms that people have -> the one form that ttsi.py reads.

    python data/convert.py FILE > calls.jsonl  # no FILE, or -: standard input
    python data/convert.py --answers ANSWERS BFCL_v4_multiple.json > multiple.jsonl

FILE holds JSON objects, one a line, or one JSON array of them, as they are or in gzip. BFCL's
answers are looked for in possible_answer/ beside FILE. Written is, one a line,

    {"id": "1", "messages": [{"role": "user", "content": "Cancel my flight to Rome"}],
     "tools": [{"type": "function",
                "function": {"name": "cancel_flight", "description": "", "parameters": SCHEMA}}],
     "call": {"name": "cancel_flight", "arguments": {"city": "Rome"}}}

The label is under `call` alone, or there is none: the messages end before it.

Standard error says what was read. A record that is well formed and of no use (several calls, the
answer's tool not on offer) is dropped, and counted by its reason. A malformed one is left out and
named with its line, up to ten of them; all others are written. The exit status is 2 if nothing is
left, or a file cannot be read or written. Standard library only: it runs where torch is not.
"""

import argparse
import gzip
import json
import os
import re
import statistics
import sys
import zlib
from collections import Counter
from contextlib import suppress
from pathlib import Path

STDIN = "standard input"


class Fault(ValueError):
    """A malformed record or file: what is wrong; what would be right."""


class Dropped(Exception):
    """A record that is well formed and of no use to us; its text is the reason."""


def need(ok, text):
    if not ok:
        raise Fault(text)


def drop(condition, reason):
    if condition:
        raise Dropped(reason)


# ------------------------------------------------------------------------------------------- JSON


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
        with suppress(json.JSONDecodeError):
            return STRICT.decode(value.strip() or "null")
    return value


def encoded(value):
    """A value as one line of JSON; a Fault if it holds NaN, 1e999 or what no UTF-8 can hold."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except ValueError as e:
        raise Fault(f"{e}; give finite numbers, and text in UTF-8") from None
    return text


ALIASES = {
    "tools": ("tools", "functions", "toolConfig"),  # toolConfig, toolSpec, toolUse: Bedrock
    "tool": ("function", "toolSpec"),
    "schema": ("parameters", "inputSchema", "input_schema"),  # MCP and Bedrock; Anthropic
    "label": ("call", "answers", "tool_calls"),  # answers: xLAM, Hammer
    "calls": ("tool_calls", "function_call"),  # function_call: OpenAI's older API
    "call": ("function", "toolUse"),
    "arguments": ("arguments", "parameters", "input", "args"),  # Seal-Tools; Anthropic
}


def find(record, what):
    """What stands in an object under one of its names: the first that is not empty."""
    values = [decoded(record[key]) for key in ALIASES[what] if key in record]
    return next(filter(None, values), values[0] if values else None)


def unwrapped(value, what):
    """An object, or the one inside it."""
    value = decoded(value)
    inner = find(value, what) if isinstance(value, dict) else None
    return inner if isinstance(inner, dict) else value


def as_list(value):
    """A list as it is; of nothing the empty one; of anything else the list of that."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


# ------------------------------------------------------------------------------------------ tools

TYPES = {"str": "string", "int": "integer", "float": "number", "double": "number"}
TYPES |= {"bool": "boolean", "list": "array", "tuple": "array", "set": "array", "dict": "object"}
TYPES |= {name: name for name in [*TYPES.values(), "null"]}


def typed(kind):
    """A type as JSON schema: `List[int], optional` is {"type": "array", "items": ...}.

    What JSON schema does not have ("any") is no rule: then any value is legal.
    """
    if isinstance(kind, list):  # ["string", "null"]
        return {"type": kind}
    form = re.match(r"\s*(?:optional\[)?\s*(\w*)\s*(?:[\[(](.*)[\])])?", str(kind), re.S | re.I)
    name, inner = form[1].lower(), form[2]
    if name not in TYPES:
        return {}
    items = typed(inner) if inner and name in ("list", "set", "array") else {}
    return {"type": TYPES[name]} | ({"items": items} if items else {})


def to_schema(rule):
    """JSON schema of what is nearly so. Which parameters are required, a list says, no flag."""
    rule = decoded(rule)
    if isinstance(rule, bool):  # true: anything
        return {}
    rule = {"type": rule} if isinstance(rule, str) else rule
    need(isinstance(rule, dict), f"a parameter is {encoded(rule)[:40]}; give its JSON schema")
    rule = {key: value for key, value in rule.items() if key != "optional"}
    if not isinstance(rule.get("required"), list):
        rule.pop("required", None)
    if "choices" in rule:
        rule["enum"] = rule.pop("choices")
    if "example" in rule:
        rule["examples"] = [rule.pop("example")]
    if "type" in rule:
        rule = typed(rule.pop("type")) | rule
    if isinstance(rule.get("items"), dict):
        rule["items"] = to_schema(rule["items"])
    if isinstance(rule.get("properties"), dict):
        rule["properties"] = {key: to_schema(part) for key, part in rule["properties"].items()}
    return rule


def is_bare(schema):
    """Is it {parameter: rule}, as in xLAM and Hammer, and no JSON schema?

    The values tell, for a parameter may be called type, properties, required or not: a keyword's
    are texts and lists, and `properties` holds rules as a keyword, and texts as a parameter.
    """
    if schema.keys() & {"additionalProperties", "$defs", "patternProperties"}:
        return False
    inner = schema.get("properties")
    if isinstance(inner, dict) and all(isinstance(rule, (dict, bool)) for rule in inner.values()):
        return False
    return all(isinstance(rule, dict) for rule in schema.values())


def is_required(rule, marked):
    """Is a parameter required, if no list says so? `marked`: only if its own flag does."""
    rule = rule if isinstance(rule, dict) else {}
    if marked or isinstance(rule.get("required"), bool):
        return rule.get("required") is True
    by_type = re.search(r"\boptional\b", str(rule.get("type")), re.I)
    return not (by_type or "default" in rule or rule.get("optional"))


def may_be_null(rule):
    """Then it may be absent, which is the same here."""
    return rule.get("nullable") is True or "null" in f"{rule.get('type')} {rule.get('anyOf')}"


def to_tool(tool, marked):
    """A tool of any API as OpenAI writes it."""
    schema = find(tool, "schema") or {}
    if "inputSchema" in tool and isinstance(schema, dict) and "json" in schema:  # Bedrock
        schema = decoded(schema["json"])
    need(isinstance(schema, dict), f'{tool["name"]}: its "parameters" must be a JSON schema')
    if is_bare(schema):
        schema = {"properties": schema}
    else:
        marked = True
    rules = decoded(schema.get("properties")) or {}
    need(isinstance(rules, dict), f'{tool["name"]}: "properties" must be {{name: JSON schema}}')
    required = schema.get("required", tool.get("required"))  # Seal-Tools has it beside them
    if not isinstance(required, list):
        required = [key for key, rule in rules.items() if is_required(rule, marked)]
    schema = {"type": "object"} | to_schema(schema | {"properties": rules})
    rules = schema["properties"]
    required = [key for key in map(str, required) if key in rules and not may_be_null(rules[key])]
    schema["required"] = required
    description = str(tool.get("description", ""))
    function = {"name": tool["name"], "description": description, "parameters": schema}
    return {"type": "function", "function": function}


def to_tools(record):
    tools = find(record, "tools")
    if isinstance(tools, dict):  # of MCP, or of Bedrock; or a single one
        tools = tools.get("tools", [tools])
    need(isinstance(tools, list), 'no tools; give "tools": [{"name": ..., "parameters": ...}, ...]')
    tools = [unwrapped(tool, "tool") for tool in tools]
    for n, tool in enumerate(tools):
        named = isinstance(tool, dict) and isinstance(tool.get("name"), str) and tool["name"]
        need(named, f'tools[{n}]: no "name"; give {{"name": ..., "parameters": JSON schema}}')
    # Which parameters of a bare map are required? ToolAlpaca marks them, if any, and has a
    # pseudo-tool `components`. API-Bank says nothing: its tools are known by their `return`, and
    # require nothing. All others are xLAM's: what has no default and is not called optional is
    # required, or a pair without any argument would pass as complete.
    marked = '"required": true' in encoded(tools)
    marked = marked or any("return" in tool or tool["name"] == "components" for tool in tools)
    tools = [tool for tool in tools if tool["name"] != "components" or find(tool, "schema")]
    drop(not tools, "no tool is on offer")
    drop(len({tool["name"] for tool in tools}) < len(tools), "a tool is on offer twice")
    return [to_tool(tool, marked) for tool in tools]


# ----------------------------------------------------------------------------- calls and messages

ROLES = {"system": "system developer", "user": "user human"}
ROLES |= {"assistant": "assistant model gpt agent tool_call function_call"}
ROLES |= {"tool": "tool function ipython observation tool_response"}
ROLES = {name: role for role, names in ROLES.items() for name in names.split()}
SUFFIX = re.compile(r"\s*Generate API Request:\s*$")  # ends API-Bank's dialogues, and is no turn
WRAPPERS = {"call", "function", "tool_calls", "tool_call", "function_call", "action", "answer"}
PYTHON = {"True": "true", "False": "false", "None": "null"}


def to_call(value):
    """-> {name, arguments} of a call of any API, or None; no arguments are none."""
    value = unwrapped(value, "call")
    if not isinstance(value, dict):
        return None
    name = value.get("name", value.get("tool"))  # tool: Seal-Tools
    arguments = find(value, "arguments") or {}
    if isinstance(name, str) and name and isinstance(arguments, dict):
        return {"name": name, "arguments": arguments}
    return None


def calls_in_text(text, names=None):
    """The calls, of these tools, that a text holds as JSON among other things."""
    text = text.rpartition("</think>")[2]
    text = text[max(text.find("{"), 0) :]  # prose may hold a lone quote
    words = r'"(?:\\.|[^"\\])*"|\b(?:True|False|None)\b'  # strings stay as they are
    text = re.sub(words, lambda found: PYTHON.get(found[0], found[0]), text)
    calls, at = [], text.find("{")
    while at >= 0:
        value, end = {}, at + 1
        with suppress(ValueError, RecursionError):
            value, end = STRICT.raw_decode(text, at)
        call = to_call(value)
        if call and (names is None or call["name"] in names):
            calls.append(call)
        elif not call and value.keys() & WRAPPERS:
            end = at + 1
        at = text.find("{", end)
    return calls


def calls_in(message, names):
    """The calls that a message of the assistant holds."""
    if message["role"] != "assistant":
        return []
    calls = [call["function"] for call in message.get("tool_calls", [])]
    return calls or calls_in_text(message["content"], names)


def text_of(part, role, place):
    """A part of a content as text; a tool's result may be anything."""
    text = part.get("text") if isinstance(part, dict) else part
    if isinstance(text, str):
        return SUFFIX.sub("", text)
    if role == "tool":
        return encoded(part)
    drop(isinstance(part, dict) and "type" in part, "a message has an image, or so")
    raise Fault(f'{place}: its "content" must be text')


def to_messages(message, place):
    """-> [messages] of one: Anthropic has the results of tools in parts of a user's message."""
    message = decoded(message)
    message = message if isinstance(message, dict) else {}
    name = str(message.get("role")).lower()
    role = ROLES.get(name)
    need(role, f'{place} must be {{"role": one of {sorted(ROLES)}, "content": text}}')
    texts, results, calls = [], [], list(as_list(find(message, "calls")))
    for part in as_list(message.get("content", "")):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "tool_use" or (isinstance(part, dict) and "toolUse" in part):
            calls.append(part)
        elif kind == "tool_result":
            results += to_messages({"content": ""} | part | {"role": "tool"}, place)
        elif kind not in ("thinking", "redacted_thinking"):
            texts.append(text_of(part, role, place))
    text = "\n".join(texts)
    calls_only = name.endswith("_call")  # ms-swift
    if calls_only or (role == "assistant" and text.startswith("```[")):  # API-Bank
        calls = calls or calls_in_text(text)
        text = "" if calls else text
    need(calls or not calls_only, f'{place}: no call; give {{"name": ..., "arguments": {{...}}}}')
    calls = [to_call(call) for call in calls]
    need(all(calls), f'{place}: a call without name or arguments; give "arguments": {{...}}')
    made = {"role": role, "content": text}
    if calls:
        made["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    return [*results, made]


def add(messages, message):
    """One more message; a call is of one turn with what the assistant said just before."""
    last = messages[-1] if messages else {"role": "none"}
    calls = message.get("tool_calls", [])
    if message["role"] == "tool" and len(last.get("tool_calls", [])) == 1:
        messages.append({"name": last["tool_calls"][0]["function"]["name"]} | message)
    elif message["role"] == "tool" or message["content"].strip():
        messages.append(message)
    elif calls and last["role"] == "assistant":
        last["tool_calls"] = last.get("tool_calls", []) + calls
    elif calls:
        messages.append(message)


def to_dialogue(record):
    """All messages of a record, its label's included."""
    messages, roles = [], {"messages": "user"}
    if "messages" not in record:  # xLAM; TRL has prompt and completion
        roles = {"query": "user", "prompt": "user", "completion": "assistant"}
    roles = {"system": "system"} | {key: role for key, role in roles.items() if key in record}
    need(len(roles) > 1, 'no request; give "messages": [{"role": "user", "content": "..."}]')
    for key, role in roles.items():
        text, turns = record.get(key, ""), None
        with suppress(ValueError):
            turns = decoded(text)
        listed = isinstance(turns, list) and all(isinstance(decoded(turn), dict) for turn in turns)
        if not listed or key == "system":
            turns = [{"role": role, "content": text}]
        for n, turn in enumerate(turns):
            for message in to_messages(turn, f"{key}[{n}]"):
                add(messages, message)
    drop(all(m["role"] != "user" for m in messages), "no request by the user")
    return messages


# ---------------------------------------------------------------------------------- whole records


def take_label(record, messages, names):
    """-> the label, or None. It leaves the messages, if they end with it."""
    drop(decoded(record.get("answers")) == [], "no call is right")
    value = find(record, "label") or []
    labels = [to_call(label) for label in as_list(value)]
    wanted = '"call" must be {"name": ..., "arguments": {...}}'
    need(all(labels), f"{wanted}, not {encoded(value)[:60]}")
    last = calls_in(messages[-1], names)
    if last:
        messages.pop()
    drop(len(labels) > 1 or len(last) > 1, "several calls")
    need(not labels or not last or labels == last, '"call" and that of the last message differ')
    call = next(iter(labels + last), None)
    drop(call and call["name"] not in names, "the answer's tool is not on offer")
    return call


def check_no_leak(messages, call, names):
    """A call before a result or another request is history; one after them would be the label."""
    if messages[-1]["role"] == "assistant":
        text = messages[-1]["content"]
        forms = [form.format(n) for n in names for form in ("{}(", "={}", ": '{}'", ': "{}"')]
        unread = any(form in text for form in forms)
        need(not unread, 'the last message has a call in a form that is not read; give "call"')
    for message in reversed(messages):
        if message["role"] in ("user", "tool"):
            break
        leaked = call in calls_in(message, names)
        need(not leaked, "the messages hold the label; end them before it")


def settle(call, accept):
    """A label takes the first accepted value of each argument; "" or null: it may be left out."""
    shape = isinstance(accept, dict) and all(isinstance(v, list) for v in accept.values())
    need(shape, '"accept" must be {argument: [acceptable values]}')
    arguments = dict(call["arguments"])
    for key, values in accept.items():
        stated = [value for value in values if value not in ("", None)]
        optional = len(stated) < len(values) and key not in arguments
        if stated and not optional and arguments.get(key) != plain(stated[0]):
            arguments[key] = stated[0]
    return {"name": call["name"], "arguments": arguments}


def plain(value):
    """The first value that one of BFCL's stands for.

    In an object, each value is a list of acceptable ones again, "" for "may be left out".
    """
    if isinstance(value, list):
        return [plain(v) if isinstance(v, dict) else v for v in value]
    if not isinstance(value, dict):
        return value
    firsts = {key: as_list(values)[:1] for key, values in value.items()}
    return {key: first[0] for key, first in firsts.items() if first not in ([], [""])}


def from_bfcl(item, answers):
    """An item of BFCL, the Berkeley leaderboard -> a record with messages, tools, call, accept."""
    question, name = item["question"], str(item.get("id"))
    need(answers is not None, "BFCL's answers are in a file of their own; give --answers FILE")
    drop(name not in answers, "no answer with its id")
    drop(len(question) != 1, "several turns")
    calls = as_list(answers[name])
    need(all(isinstance(call, dict) for call in calls), "its answer must be [{name: {...}}]")
    calls = [pair for call in calls for pair in call.items()]
    drop(len(calls) != 1, "several calls" if calls else "no call is right")
    function, accept = calls[0]
    need(isinstance(accept, dict), "its answer must be {name: {argument: [acceptable values]}}")
    drop([] in accept.values(), "an argument with no acceptable value")
    accept = {key: [plain(value) for value in as_list(values)] for key, values in accept.items()}
    record = {"id": name, "messages": question[0], "tools": item["function"]}
    return record | {"call": {"name": function, "arguments": {}}, "accept": accept}


def to_record(record, number):
    """A record of any form -> {id, messages, tools, call?}."""
    tools = to_tools(record)
    names = [tool["function"]["name"] for tool in tools]
    messages = to_dialogue(record)
    call = take_label(record, messages, names)
    check_no_leak(messages, call, names)
    name = str(record.get("id", number))
    need(name and name.isprintable(), f"id {name!r} is no text; leave it out, and get a number")
    out = {"id": name, "messages": messages, "tools": tools}
    if call:
        out["call"] = settle(call, decoded(record.get("accept")) or {})
    encoded(out)
    return out


# ------------------------------------------------------------------------------------------ files


def load(path):
    """The text of a file. Bytes that are not UTF-8 become half surrogates, which are refused."""
    try:
        data = sys.stdin.buffer.read() if path == STDIN else Path(path).read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as e:
        raise Fault(f"{path}: cannot be read: {e}") from None
    text = data.decode("utf-8-sig", errors="surrogateescape")
    return text.replace("\r\n", "\n").replace("\r", "\n")


BLANKS = re.compile(r"\s*")
BETWEEN = re.compile(r"\s*(,\s*|(?=\]))")


def array_items(text):
    """Yields (line, text) of each item of a JSON array."""
    line, counted = 1, 0
    at = BLANKS.match(text, text.index("[") + 1).end()
    while text[at : at + 1] != "]":
        line += text.count("\n", counted, at)
        counted = at
        try:
            end = LENIENT.raw_decode(text, at)[1]
        except RecursionError:
            raise json.JSONDecodeError("Nested too deeply", text, at) from None
        yield line, text[at:end]
        between = BETWEEN.match(text, end)
        if not between:
            raise json.JSONDecodeError("Expecting ',' or ']'", text, BLANKS.match(text, end).end())
        at = between.end()
    if text[at + 1 :].strip():
        raise json.JSONDecodeError("Extra data", text, BLANKS.match(text, at + 1).end())


def record_of(text):
    try:
        record = STRICT.decode(text)
    except json.JSONDecodeError as e:
        wanted = "give JSON objects, one a line, or one array of them"
        raise Fault(f"not JSON: {e.msg} (column {e.colno}); {wanted}") from None
    need(isinstance(record, dict), "this is no JSON object; give one for each record")
    encoded(record)
    return record


def read(path, use):
    """Calls use(n, record) for the n-th of JSON lines, or of one JSON array.

    -> (number of items, [faults as "file:line: what is wrong; what would be right"]).
    """
    text, n, faults = load(path), 0, []
    array = text.lstrip().startswith("[")
    try:
        for line, item in array_items(text) if array else enumerate(text.split("\n"), 1):
            if item.strip():
                n += 1
                try:
                    use(n - 1, record_of(item))
                except (ValueError, RecursionError) as e:
                    faults.append(f"{path}:{line}: {' '.join(str(e).split())[:300]}")
    except json.JSONDecodeError as e:
        faults.append(f"{path}:{e.lineno}: not JSON: {e.msg}; mend it: nothing after it is read")
    return n, faults


def convert(path, answers_path=None):
    """-> ([records], number of items, Counter of why items were dropped, [faults])."""
    records, dropped, answers, faults = {}, Counter(), None, []

    def answer(n, item):
        answers[str(item.get("id"))] = item.get("ground_truth")

    def use(n, record):
        try:
            if isinstance(record.get("question"), list) and "function" in record:
                record = from_bfcl(record, answers)
            record = to_record(record, n)
        except Dropped as e:
            dropped[str(e)] += 1
            return
        name = record["id"]
        need(name not in records, f"id {name!r} is an earlier record's, too; give each its own")
        records[name] = record

    beside = Path(path).parent / "possible_answer" / Path(path).name
    if answers_path or beside.exists():
        answers = {}
        faults += read(answers_path or str(beside), answer)[1]
    items, more = read(path, use)
    return list(records.values()), items, dropped, faults + more


def shape(records):
    """What to know of a benchmark before its scores are read, in words."""
    n = [len(record["tools"]) for record in records]
    spread = f"{min(n)}/{statistics.median_low(n)}/{max(n)}"
    text = f"candidates {spread} (min/median/max), {n.count(1)} items with one"
    labelled = [record for record in records if "call" in record]
    if not labelled:
        return f"{text}; none has a label"
    first = sum(r["tools"][0]["function"]["name"] == r["call"]["name"] for r in labelled)
    percent = f"{100 * first / len(labelled):.1f} %"
    return f"{text}; the first tool listed is the right one in {percent}"


def tell(path, records, items, dropped, faults):
    """Faults and counts, on standard error."""
    lines = faults[:10]
    if len(faults) > 10:
        lines.append(f"and {len(faults) - 10} more")
    why = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())
    why = f" ({why})" if why else ""
    counts = f"{items} items, {len(records)} left, {dropped.total()} dropped{why}"
    lines.append(f"{path}: {counts}, {len(faults)} faults")
    lines.append(shape(records) if records else "nothing is left")
    for line in lines:
        print(f"convert: {line}", file=sys.stderr)


def main(argv=None):
    """-> the exit status."""
    parser = argparse.ArgumentParser(
        "convert.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    file = "records in any form (-, the default: standard input)"
    parser.add_argument("file", nargs="?", default="-", help=file)
    answers = "BFCL's answers (default: possible_answer/ beside FILE, the same name)"
    parser.add_argument("--answers", help=answers)
    args = parser.parse_args(argv)
    path = STDIN if args.file == "-" else args.file
    try:
        records, *counts = convert(path, args.answers)
        sys.stdout.reconfigure(encoding="utf-8", newline="\n")
        sys.stdout.write("".join(encoded(record) + "\n" for record in records))
        sys.stdout.flush()
    except Fault as e:
        print(f"convert: {e}", file=sys.stderr)
        return 2
    except OSError as e:
        # After a closed pipe, or on a full disk, python would try again when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"convert: cannot be written: {e}", file=sys.stderr)
        return 2
    tell(path, records, *counts)
    return 0 if records else 2


if __name__ == "__main__":
    sys.exit(main())
