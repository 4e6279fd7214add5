"""Records of function calling, in the forms that people have -> the one form that ttsi.py reads.

    python data/convert.py FILE > calls.jsonl  # no FILE, or -: standard input
    python data/convert.py BFCL_v4_multiple.json > multiple.jsonl  # answers: possible_answer/ there
    python data/convert.py --answers ANSWERS.json < BFCL_v4_multiple.json > multiple.jsonl

FILE holds JSON objects, one a line, or one JSON array of them, as they are or in gzip. Written is

    {"id": "1", "messages": [{"role": "user", "content": "Cancel my flight to Rome"}],
     "tools": [{"type": "function", "function": {"name", "description", "parameters": JSON schema}}],
     "call": {"name": "cancel_flight", "arguments": {"city": "Rome"}}}

one a line. The label is under `call` alone, or there is none: the messages end before it.

Standard error says what was read. A record that is well formed and of no use (several calls, the
answer's tool not on offer) is dropped, and counted by its reason. A malformed one is left out and
named with its line, up to ten of them; all others are written. The exit status is 2 if nothing is
left, or a file cannot be read or written. Standard library only: it runs where torch is not.
"""

import argparse
import gzip
import json
import math
import os
import re
import statistics
import sys
import zlib
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

STDIN = "standard input"


class Fault(ValueError):
    """A malformed record or file: what is wrong; what would be right."""


class Dropped(Exception):
    """A record that is well formed and of no use to us; its text is the reason."""


@dataclass
class Report:
    """What is told at the end."""

    items: int = 0
    dropped: Counter = field(default_factory=Counter)  # by reason
    notes: Counter = field(default_factory=Counter)
    faults: list = field(default_factory=list)  # "file:line: what is wrong; what would be right"


def need(ok, text):
    if not ok:
        raise Fault(text)


def drop(condition, reason):
    if condition:
        raise Dropped(reason)


# ------------------------------------------------------------------------------------------- JSON


def present(pairs):
    """A JSON object without its nulls, which Arrow writes for what is absent."""
    counts = Counter(key for key, _ in pairs)
    twice = [key for key, count in counts.items() if count > 1]
    need(not twice, f"a key twice: {twice}; keep one of each")
    return {key: value for key, value in pairs if value is not None}


def finite(text):
    value = float(text)
    need(math.isfinite(value), f"{text} is out of range; give a finite number, or null")
    return value


STRICT = json.JSONDecoder(
    object_pairs_hook=present, parse_float=finite, parse_constant=finite, strict=False
)
LENIENT = json.JSONDecoder(parse_int=str, strict=False)  # finds the end of what STRICT refuses


def decoded(value):
    """What a string says that holds JSON; anything else as it is."""
    if isinstance(value, str):
        with suppress(json.JSONDecodeError):
            return STRICT.decode(value.strip() or "null")
    return value


def encoded(value):
    """A value as one line of JSON."""
    try:
        text = json.dumps(value, ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError:
        raise Fault("a byte that is not UTF-8, or half of a surrogate pair; give UTF-8") from None
    return text


ALIASES = {
    "messages": ("messages", "conversations"),
    "tools": ("tools", "functions", "toolConfig"),  # toolConfig: Bedrock
    "tool": ("function", "toolSpec"),
    "parameters": ("parameters", "inputSchema", "input_schema"),  # MCP and Bedrock; Anthropic
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
    """A list; of what is none, the list of that; of nothing, the empty one."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


# ------------------------------------------------------------------------------------------ tools

TYPES = {"str": "string", "int": "integer", "long": "integer", "bool": "boolean"}
TYPES |= {"float": "number", "double": "number", "dict": "object", "map": "object"}
TYPES |= {"list": "array", "tuple": "array", "set": "array"}
TYPES |= {name: name for name in [*TYPES.values(), "null"]}
RENAMED = {"choices": "enum", "example": "examples"}


def typed(kind, report):
    """A type as JSON schema: `List[int], optional` -> {"type": "array", "items": ...}.

    Any value is legal if JSON schema does not have the type.
    """
    if isinstance(kind, list):  # ["string", "null"]
        return {"type": kind}
    form = re.match(r"\s*(?:optional\[)?\s*(\w*)\s*(?:[\[(](.*)[\])])?", str(kind), re.S | re.I)
    name = form[1].lower()
    if name not in TYPES:
        unknown = f"parameters of type {encoded(kind)[:40]}, unknown to JSON schema"
        report.notes[f"{unknown}: any value is legal"] += 1
        return {}
    schema = {"type": TYPES[name]}
    if schema["type"] == "array" and form[2] and name != "tuple":  # a tuple's may differ
        items = typed(form[2], report)
        schema |= {"items": items} if items else {}
    return schema


def to_rule(rule, report):
    """One parameter as JSON schema. Whether it is required, the tool's own list says."""
    rule = decoded(rule)
    if isinstance(rule, bool):  # true: anything
        return {}
    if isinstance(rule, str):
        rule = {"type": rule}
    need(isinstance(rule, dict), f"a parameter is {encoded(rule)[:40]}; give its JSON schema")
    rule = {RENAMED.get(key, key): value for key, value in rule.items() if key != "optional"}
    if not isinstance(rule.get("required"), list):  # a list is that of an object's properties
        rule.pop("required", None)
    if "examples" in rule:
        rule["examples"] = as_list(rule["examples"])
    if "type" in rule:
        rule = typed(rule.pop("type"), report) | rule
    if isinstance(rule.get("items"), dict):
        rule["items"] = to_rule(rule["items"], report)
    if isinstance(rule.get("properties"), dict):
        parts = rule["properties"].items()
        rule["properties"] = {key: to_rule(part, report) for key, part in parts}
    return rule


def is_map(parameters):
    """Are these {parameter: rule}, as in xLAM and Hammer, and no JSON schema?

    The values tell, for a parameter may be called type, properties, required or not: a keyword's
    are texts and lists, and that of `properties` holds rules, where a rule holds texts.
    """
    if parameters.keys() & {"additionalProperties", "$defs", "patternProperties"}:
        return False
    inner = parameters.get("properties")
    if isinstance(inner, dict) and all(isinstance(rule, (dict, bool)) for rule in inner.values()):
        return False
    return all(isinstance(rule, dict) for rule in parameters.values())


def says_required(tool):
    """Does a tool of bare parameters show that its file marks what is required?

    Then what it does not mark is optional. ToolAlpaca marks parameters, and has a pseudo-tool
    `components`; API-Bank marks none at all, its tools describe what they `return`. Any other
    file is xLAM's: required is what has no default and is not called optional, or a pair without
    any argument would be complete.
    """
    parameters = find(tool, "parameters")
    rules = parameters.values() if isinstance(parameters, dict) else []
    marked = any(isinstance(rule, dict) and rule.get("required") is True for rule in rules)
    return marked or "return" in tool or tool["name"] == "components"


def is_required(rule, optional_unless_marked):
    rule = rule if isinstance(rule, dict) else {}
    if isinstance(rule.get("required"), bool):
        return rule["required"]
    by_type = re.search(r"\boptional\b", str(rule.get("type")), re.I)
    return not (optional_unless_marked or by_type or "default" in rule or rule.get("optional"))


def may_be_null(rule):
    """Then it need not be there: null is absent."""
    return rule.get("nullable") is True or "null" in f"{rule.get('type')} {rule.get('anyOf')}"


def to_tool(tool, optional_unless_marked, report):
    """A tool of any API as OpenAI writes it."""
    schema = find(tool, "parameters") or {}
    need(isinstance(schema, dict), '"parameters" must be a JSON schema')
    if "inputSchema" in tool and "json" in schema:  # Bedrock
        schema = decoded(schema["json"])
    rules = schema
    if is_map(schema):
        schema = {}
    else:
        rules = decoded(schema.get("properties")) or {}
        optional_unless_marked = True
    need(isinstance(rules, dict), '"properties" must be {name: JSON schema}')
    required = schema.get("required", tool.get("required"))  # Seal-Tools has it beside them
    if not isinstance(required, list):
        required = [key for key in rules if is_required(rules[key], optional_unless_marked)]
    rules = {key: to_rule(rule, report) for key, rule in rules.items()}
    required = [key for key in required if key in rules and not may_be_null(rules[key])]
    own = {"type": "object", "properties": rules, "required": required}
    description = str(tool.get("description", ""))
    function = {"name": tool["name"], "description": description, "parameters": schema | own}
    return {"type": "function", "function": function}


def to_tools(record, report):
    tools = find(record, "tools")
    if isinstance(tools, dict):  # of MCP, or of Bedrock; or a single one
        tools = tools.get("tools", [tools])
    need(isinstance(tools, list), 'no tools; give "tools": [{"name": ..., "parameters": ...}, ...]')
    tools = [unwrapped(tool, "tool") for tool in tools]
    for n, tool in enumerate(tools):
        named = isinstance(tool, dict) and isinstance(tool.get("name"), str) and tool["name"]
        need(named, f'tools[{n}]: no "name"; give {{"name": ..., "parameters": JSON schema}}')
    optional_unless_marked = any(map(says_required, tools))
    # `components` is a section of ToolAlpaca's documentation, and no tool.
    real = [t for t in tools if t["name"] != "components" or find(t, "parameters")]
    if len(real) < len(tools):
        report.notes["times the pseudo-tool components left out"] += 1
    drop(not real, "no tool is on offer")
    drop(len({t["name"] for t in real}) < len(real), "a tool is on offer twice")
    return [to_tool(tool, optional_unless_marked, report) for tool in real]


# ----------------------------------------------------------------------------- calls and messages

ROLES = {"system": "system developer", "user": "user human"}
ROLES |= {"assistant": "assistant model gpt agent tool_call function_call"}
ROLES |= {"tool": "tool function ipython observation tool_response"}
ROLES = {name: role for role, names in ROLES.items() for name in names.split()}
SUFFIX = re.compile(r"\s*Generate API Request:\s*$")  # ends API-Bank's dialogues; it is no turn
FENCE = re.compile(r"```\w*|</?tool_call>")
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


def calls_in_text(text, names):
    """The calls that a model wrote in JSON, among other text, of tools on offer."""
    text = text.rpartition("</think>")[2]
    words = r'"(?:\\.|[^"\\])*"|\b(?:True|False|None)\b'  # strings stay as they are
    start = max(text.find("{"), 0)  # prose may hold a lone quote
    text = re.sub(words, lambda found: PYTHON.get(found[0], found[0]), text[start:])
    calls, at = [], text.find("{")
    while at >= 0:
        value, end = {}, at + 1
        with suppress(ValueError, RecursionError):
            value, end = STRICT.raw_decode(text, at)
        call = to_call(value)
        if call and call["name"] in names:
            calls.append(call)
        elif not call and len(value) > 0:  # {"thought": ..., "action": {the call}}
            end = at + 1
        at = text.find("{", end)
    return calls


def calls_in(message, names):
    """The calls that a message of the assistant holds."""
    if message["role"] != "assistant":
        return []
    calls = [call["function"] for call in message.get("tool_calls", [])]
    return calls or calls_in_text(message["content"], names)


def only_calls(text):
    """The calls of a text that holds nothing else, be it fenced (API-Bank) or not (ms-swift)."""
    values = None
    with suppress(ValueError):
        values = as_list(decoded(FENCE.sub("", text)))
    for value in values or []:
        inner = unwrapped(value, "call")
        if not isinstance(inner, dict) or not inner.keys() & set(ALIASES["arguments"]):
            return []
    calls = [to_call(value) for value in values or []]
    return calls if all(calls) else []


def text_of(part, role, place):
    """A part of a content as text. A tool's result may be anything."""
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
    name = str(message.get("role", message.get("from"))).lower()
    role = ROLES.get(name)
    need(role, f'{place} must be {{"role": one of {sorted(ROLES)}, "content": text}}')
    texts, results, calls = [], [], as_list(find(message, "calls"))
    content = message.get("content", message.get("value", ""))
    for part in content if isinstance(content, list) else [content]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "tool_use" or (kind is None and isinstance(part, dict) and "toolUse" in part):
            calls.append(part)
        elif kind == "tool_result":
            results += to_messages({"role": "tool"} | part, place)
        elif kind not in ("thinking", "redacted_thinking"):
            texts.append(text_of(part, role, place))
    text = "\n".join(texts)
    if role == "assistant" and not calls and (calls := only_calls(text)):
        text = ""
    need(calls or not name.endswith("_call"), f"{place}: no call; give its JSON text")
    calls = [to_call(call) for call in calls]
    need(all(calls), f'{place}: a call without name or arguments; give "arguments": {{...}}')
    made = {"role": role, "content": text}
    if role == "tool" and isinstance(message.get("name"), str):
        made["name"] = message["name"]
    if calls:
        made["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    return [*results, made]


def turns_of(value, role):
    """The messages that a value is: a list of them, or the text of one."""
    turns = value
    with suppress(ValueError):
        turns = decoded(value)
    if isinstance(turns, list) and all(isinstance(decoded(turn), dict) for turn in turns):
        return turns
    return [{"role": role, "content": value}]


def to_dialogue(record):
    """All messages of a record."""
    turns = [{"role": "system", "content": record["system"]}] if "system" in record else []
    before = len(turns)
    listed = find(record, "messages")
    if listed is not None:
        turns += turns_of(listed, "user")
    else:
        for key, role in {"query": "user", "prompt": "user", "completion": "assistant"}.items():
            turns += turns_of(record[key], role) if key in record else []
    wanted = 'give "messages": [{"role": "user", "content": "..."}]'
    need(len(turns) > before, f"no request; {wanted}")
    messages = []
    for n, turn in enumerate(turns, -before):
        for message in to_messages(turn, f"messages[{n}]" if n >= 0 else "system"):
            add(messages, message)
    drop(all(m["role"] != "user" for m in messages), "no request by the user")
    return messages


def add(messages, message):
    """One more message; a call is of one turn with what the assistant said just before."""
    last = messages[-1] if messages else {"role": "none"}
    calls = message.get("tool_calls", [])
    if not message["content"].strip():
        if not calls and message["role"] != "tool":
            return
        if calls and last["role"] == "assistant":
            last["tool_calls"] = last.get("tool_calls", []) + calls
            return
    if message["role"] == "tool" and len(last.get("tool_calls", [])) == 1:
        message = {"name": last["tool_calls"][0]["function"]["name"]} | message
    messages.append(message)


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
        drop(not values, "an argument for which nothing is acceptable")
        stated = [value for value in values if value not in ("", None)]
        if stated and (key in arguments or len(stated) == len(values)):
            arguments[key] = stated[0]
    return {"name": call["name"], "arguments": arguments}


def to_record(record, number, report):
    """A record of any form -> {id, messages, tools, call?}."""
    tools = to_tools(record, report)
    names = [tool["function"]["name"] for tool in tools]
    messages = to_dialogue(record)
    call = take_label(record, messages, names)
    need(messages, "no request is left before the label; end the messages with it")
    check_no_leak(messages, call, names)
    name = str(record.get("id", number))
    need(name and name.isprintable(), f"id {name!r} is no text; leave it out, and get a number")
    out = {"id": name, "messages": messages, "tools": tools}
    if call:
        out["call"] = settle(call, decoded(record.get("accept")) or {})
    encoded(out)
    return out


# ------------------------------------------------------------------------ the leaderboard's (BFCL)


def plain(value):
    """The first value that one of the leaderboard's stands for.

    In an object, each value is a list of acceptable ones again, "" for "may be left out".
    """
    if isinstance(value, list):
        return [plain(v) if isinstance(v, dict) else v for v in value]
    if not isinstance(value, dict):
        return value
    firsts = {key: as_list(values)[:1] for key, values in value.items()}
    return {key: first[0] for key, first in firsts.items() if first not in ([], [""])}


def from_bfcl(item, answers):
    """-> a record with messages, tools, call and accept."""
    question, functions = item["question"], item.get("function")
    need(answers is not None, "BFCL's answers are in a file of their own; give --answers FILE")
    shape = isinstance(functions, list) and all(isinstance(turns, list) for turns in question)
    need(shape, 'not of BFCL\'s form: {"id", "question": [[messages]], "function": [tools]}')
    drop(item.get("id") not in answers, "no answer with its id")
    drop(len(question) != 1, "several turns")
    calls = [pair for call in answers[item["id"]] for pair in call.items()]
    drop(len(calls) != 1, "several calls" if calls else "no call is right")
    name, accept = calls[0]
    accept = {key: [plain(v) for v in as_list(values)] for key, values in accept.items()}
    call = {"name": name, "arguments": {}}
    return {"id": item["id"], "messages": question[0], "tools": functions} | {
        "call": call,
        "accept": accept,
    }


def read_answers(path, report):
    """-> {id: [{name: {argument: acceptable values}}]}."""
    answers, own = {}, Report()
    for line, text in read(path, own):
        try:
            answer = object_of(text)
            calls = answer.get("ground_truth")
            shape = isinstance(calls, list) and all(isinstance(call, dict) for call in calls)
            shape = shape and all(isinstance(a, dict) for call in calls for a in call.values())
            need(shape, 'not BFCL\'s; give {"id", "ground_truth": [{name: {argument: [values]}}]}')
            answers[answer.get("id")] = calls
        except (ValueError, RecursionError) as e:
            add_fault(own, path, line, e)
    report.faults += own.faults
    return answers


# ------------------------------------------------------------------------------------------ files


def add_fault(report, path, line, error):
    text = " ".join(str(error).split())[:300]
    if isinstance(error, RecursionError):
        text = "nested too deeply; give at most a few dozen levels"
    report.faults.append(f"{path}:{line}: {text}")


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


def skip_blanks(text, at):
    return re.compile(r"\s*").match(text, at).end()


def array_items(text):
    """Yields (line, text) of each item of a JSON array."""
    line, counted = 1, 0
    at = skip_blanks(text, text.index("[") + 1)
    while text[at : at + 1] != "]":
        line += text.count("\n", counted, at)
        counted = at
        try:
            end = LENIENT.raw_decode(text, at)[1]
        except RecursionError:
            raise json.JSONDecodeError("nested too deeply", text, at) from None
        yield line, text[at:end]
        at = skip_blanks(text, end)
        if text[at : at + 1] == ",":
            at = skip_blanks(text, at + 1)
        elif text[at : at + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
    if text[at + 1 :].strip():
        raise json.JSONDecodeError("Extra data after the array", text, skip_blanks(text, at + 1))


def read(path, report):
    """Yields (line, text) of each item of JSON lines, or of one JSON array."""
    text = load(path)
    array = text.lstrip().startswith("[")
    try:
        for line, item in array_items(text) if array else enumerate(text.split("\n"), 1):
            if item.strip():
                report.items += 1
                yield line, item
    except json.JSONDecodeError as e:  # where the next item of an array would begin, is unknown
        add_fault(report, path, e.lineno, f"not JSON: {e.msg}; mend it: nothing after it is read")


def object_of(text):
    try:
        record = STRICT.decode(text)
    except json.JSONDecodeError as e:
        wanted = "give JSON objects, one a line, or one array of them"
        raise Fault(f"not JSON: {e.msg} (column {e.colno}); {wanted}") from None
    need(isinstance(record, dict), 'this is no JSON object; give {"messages": ..., "tools": ...}')
    encoded(record)
    return record


def convert(path, answers_path=None):
    """-> ([records], Report)."""
    records, report, answers = {}, Report(), None
    unused = bool(answers_path)
    beside = Path(path).parent / "possible_answer" / Path(path).name
    if answers_path or beside.exists():
        answers = read_answers(answers_path or str(beside), report)
    for line, text in read(path, report):
        try:
            record = object_of(text)
            if isinstance(record.get("question"), list) and "function" in record:
                unused = False
                record = from_bfcl(record, answers)
            record = to_record(record, report.items - 1, report)
            name = record["id"]
            need(name not in records, f"id {name!r} is an earlier record's, too; give each its own")
            records[name] = record
        except Dropped as e:
            report.dropped[str(e)] += 1
        except (ValueError, RecursionError) as e:
            add_fault(report, path, line, e)
    need(not unused, f"{path}: not BFCL's, so its answers are in it; leave --answers out")
    return list(records.values()), report


def shape(records):
    """What to know of a benchmark before its scores are read, in words."""
    n = [len(record["tools"]) for record in records]
    spread = f"{min(n)}/{statistics.median_low(n)}/{max(n)}"
    text = f"candidates {spread} (min/median/max), {n.count(1)} items with one"
    labelled = [r for r in records if "call" in r]
    if not labelled:
        return f"{text}; no label"
    first = sum(r["tools"][0]["function"]["name"] == r["call"]["name"] for r in labelled)
    percent = f"{100 * first / len(labelled):.1f} %"
    return f"{text}; the first tool listed is the right one in {percent}"


def tell(path, records, report):
    """The faults and counts, on standard error."""
    lines = report.faults[:10]
    more = len(report.faults) - len(lines)
    if more:
        lines.append(f"and {more} more faults")
    counts = f"{path}: {report.items} items, {len(records)} left"
    if report.dropped:
        why = ", ".join(f"{count} {reason}" for reason, count in report.dropped.most_common())
        counts += f", {report.dropped.total()} dropped ({why})"
    if report.faults:
        counts += f", {len(report.faults)} faults"
    lines.append(counts)
    lines += [f"{count} {note}" for note, count in report.notes.items()]
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
        records, report = convert(path, args.answers)
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
    tell(path, records, report)
    return 0 if records else 2


if __name__ == "__main__":
    sys.exit(main())
