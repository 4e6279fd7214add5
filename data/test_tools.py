"""The files beside ttsi.py: the world, the converter, the experiments, the bench, the tables.

Each test compares with what shares no code: a closed form, brute force, a hand count, an invariant.
"""

import argparse
import contextlib
import copy
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import convert  # noqa: E402
import world  # noqa: E402

import ttsi  # noqa: E402

BENCHMARKS = HERE.parent.parent / "shared" / "benchmarks"
slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="long; runs with SLOW=1")
beside = pytest.mark.skipif(not BENCHMARKS.exists(), reason="no benchmarks beside this checkout")


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture(scope="session")
def tok():
    return AutoTokenizer.from_pretrained(HERE / "model")


# -------------------------------------------------------------------------------- the world


def test_the_splits_are_what_the_generator_writes():
    for split, n in world.FILES.items():
        drawn = list(world.records(split, n, 1, 0))
        assert read(HERE / f"{split}.jsonl") == drawn, f"{split}.jsonl: world and splits are frozen"


def rare(request, call):
    """-> [is the verb, is the object worded rarely], by looking for all rare wordings."""
    found = []
    for table, word in zip((world.VERBS, world.NOUNS), call["name"].split("_"), strict=True):
        found.append(any(re.search(rf"\b{w}\b", request) for w in table[word][world.RARE]))
    return found


def test_training_never_answers_a_rare_wording():
    r = random.Random(0)
    for _ in range(300):
        tools = world.offer(r, "train", 5)
        plain, shifted = (world.answer_pair(r, tools[0], shifted=s) for s in (False, True))
        assert rare(*plain) == [False, False], f"{plain}: training answers a rare wording"
        assert rare(*shifted)[0], f"{shifted}: a shifted item words its verb familiarly"
    written = [world.draft_triple(r, world.offer(r, "train", 5)) for _ in range(300)]
    share = sum(rare(request, call)[0] for _, call, request in written) / 300
    assert 0.3 < share < 0.8, "writing uses rare verbs, but not always"


def test_what_is_written_does_not_depend_on_the_seeds_tool():
    def verbs(request, tools):  # those of the tools that the request says
        for verb, _ in (tool["function"]["name"].split("_") for tool in tools):
            if any(re.search(rf"\b{w}\b", request) for ws in world.VERBS[verb] for w in ws):
                yield verb

    r, same = random.Random(0), 0
    for _ in range(1000):
        tools = world.offer(r, "train", 4)
        seed, call, _ = world.draft_triple(r, tools)
        names = [t["function"]["name"] for t in tools]
        said = [n for n in names if n.split("_")[0] in verbs(seed, tools)]
        same += call["name"] in said[:1]
    assert abs(same / 1000 - 0.25) < 0.05, "not one of four by chance (3.6 standard deviations)"


def test_no_tool_of_one_split_is_in_another():
    for split, n in (("dev", 200), ("demo", 100), ("test", 500)):
        records = read(HERE / f"{split}.jsonl")
        offered = {t["function"]["name"] for r in records for t in r["tools"]}
        others = {"_".join(t) for s, tools in world.TOOLS.items() if s != split for t in tools}
        assert len(records) == n, f"{split}.jsonl has another size"
        assert not offered & others, f"{split}: {offered & others} belong to other splits"


def test_the_model_learns_the_very_prompts_of_the_method(tok):
    """A prompt in training is a prompt of ttsi.py, and so are its tokens; the shipped tokenizer's."""
    r, built = random.Random(0), world.build_tokenizer()
    model = SimpleNamespace(config=Qwen3Config(max_position_embeddings=4096))
    for record in world.records("dev", 20, 1, 7):
        sample = ttsi.to_sample(record)
        x = ttsi.prepare(model, tok, sample, ttsi.Config(shuffle=False))
        head, rest = world.prompts(built, record["tools"], x.request)
        tokens = [built(part, add_special_tokens=False).input_ids for part in (head, rest)]
        assert sum(tokens, []) == x.ids, "training reads another prompt"
        assert len(tokens[0]) == x.head, "the tools end elsewhere"
        seed, call, request = world.draft_triple(r, record["tools"])
        x.request = seed  # nothing but a copy of it would be refused
        draft = ttsi.judge(world.draft_text(call, request), [], x, ttsi.Config())
        assert draft["pair"] == {"request": request, "call": call}, f"{draft}: training fails"


def small(folder, **changes):
    """The flags of a training of seconds."""
    flags = {"seed": 0, "steps": 3, "hidden": 32, "layers": 1, "ff": 32, "lr": 3e-3, "muon": 0.02}
    flags |= {"tied": False, "bf16": False, "teacher": False, "compile": False, "threads": 2}
    return argparse.Namespace(**flags | {"minutes": 0, "checkpoint": folder} | changes)


def test_training_goes_on_where_it_was_stopped(tok, tmp_path, monkeypatch):
    monkeypatch.setattr(world, "evaluate", lambda *_: "")
    world.train(small(tmp_path), tok)
    at_once = torch.load(tmp_path / "state.pt", weights_only=True)
    (tmp_path / "state.pt").unlink()
    for _ in range(3):
        with pytest.raises(SystemExit, match="goes on from there"):
            world.train(small(tmp_path, minutes=1e-9), tok)  # stopped after every step
    stopped = torch.load(tmp_path / "state.pt", weights_only=True)
    assert at_once["step"] == stopped["step"] == 3, "a step was lost, or done twice"
    for name, weight in at_once["model"].items():
        assert torch.equal(weight, stopped["model"][name]), f"{name} differs from one sitting"


# ---------------------------------------------------------------------------- the converter

HAMMER = ("sealtool", "apibank_l1", "apibank_l2", "toolalpaca")
THEIRS = ("seal-tools/canonical_294", "api-bank/canonical_l1", "api-bank/canonical_l2")
THEIRS += ("toolalpaca/canonical_real",)
UPSTREAM = {f"hammer-eval/{a}.json": f"{b}.jsonl" for a, b in zip(HAMMER, THEIRS, strict=True)}
for kind in ("multiple", "simple_python"):
    UPSTREAM[f"bfcl/BFCL_v4_{kind}.json"] = f"bfcl/canonical_{kind}.jsonl"


def bare(value):
    """Without blanks at the ends of strings, and the units that the other conversion leaves out."""
    if isinstance(value, dict):
        return {k: bare(v) for k, v in value.items() if k != "unit"}
    if isinstance(value, list):
        return [bare(v) for v in value]
    return value.strip() if isinstance(value, str) else value


def joined(messages):
    """Two assistant turns in a row as one, as the other conversion has them."""
    out = []
    for m in messages:
        both = [*out[-1:], m]
        if [b["role"] for b in both] == ["assistant"] * 2 and "tool_calls" not in out[-1]:
            out[-1] = m | {"content": out[-1]["content"] + "\n" + m["content"]}
        else:
            out.append(m)
    return out


def without_details(records):
    """ToolAlpaca: enums there come out of prose, and one tool lost its parameters."""
    for f in (t["function"] for r in records for t in r["tools"]):
        properties = f["parameters"]["properties"]
        f["parameters"]["properties"] = {name: spec["type"] for name, spec in properties.items()}
        if "icao_code" in json.dumps(f):
            f |= {"description": "", "parameters": {}}


@beside
@pytest.mark.parametrize("name", UPSTREAM)
def test_conversion_equals_the_independent_one(name):
    """The canonical files were made from each benchmark's own files by other code."""
    ours, theirs = convert.convert(str(BENCHMARKS / name))[0], read(BENCHMARKS / UPSTREAM[name])
    if "toolalpaca" in name:  # there 107 and 111 are malformed
        ours = [r for r in ours if r["id"] not in ("107", "111")]
        without_details(ours + theirs)
    assert len(ours) == len(theirs), "other items are left"
    for a, b in zip(ours, theirs, strict=True):
        a["messages"] = joined(a["messages"])
        for key in ("messages", "tools", "call"):
            assert bare(a[key]) == bare(b[key]), f"{a['id']}: another {key}"
        assert a.keys() == b.keys(), f"{a['id']}: other fields"
        for key, values in b.get("accept", {}).items():
            plain = "{" not in json.dumps(values)  # objects are spelled out: see the tests below
            assert not plain or a["accept"][key] == values, f"{a['id']}: accepts other {key}"


@beside
@pytest.mark.parametrize("name", UPSTREAM)
def test_converted_labels_are_graded_right(name):
    for record in convert.convert(str(BENCHMARKS / name))[0]:
        sample = ttsi.to_sample(json.loads(json.dumps(record)))
        grade = ttsi.grade(json.dumps(sample["call"]), sample)
        assert grade == {"name": True, "call": True}, f"{record['id']}: its label is graded wrong"


def upstream(path, *items):
    """A file of these items as they are published: BFCL's as lines, Hammer's as one list."""
    text = json.dumps(items) if "query" in items[0] else "\n".join(map(json.dumps, items))
    path.write_text("\ufeff" + text)
    return str(path)


def test_conversion_by_hand(tmp_path):
    x = {"type": "list(str)", "required": True}
    f = {"name": "f", "parameters": {"x": x, "y": {"type": "any", "choices": [1]}}}
    g, answer = {"name": "g", "arguments": {}}, {"tool": "f", "parameters": {"x": "1"}}
    no_tool = {"name": "components", "parameters": {}}
    item = {"query": "q", "tools": [f, no_tool], "answers": [answer]}
    others = [{"answers": [g, g]}, {"answers": []}, {"answers": [g]}, {"tools": [f, f]}]
    others = [item | change for change in (*others, {"query": " "})]
    (record,), n, dropped, notes = convert.convert(upstream(tmp_path / "x.json", *others, item))
    (tool,) = record.pop("tools")
    x = {"type": "array", "items": {"type": "string"}}
    schema = {"type": "object", "properties": {"x": x, "y": {"enum": [1]}}, "required": ["x"]}
    function = {"name": "f", "description": "", "parameters": schema}
    assert tool == {"type": "function", "function": function}, "the tool is converted otherwise"
    call, message = {"name": "f", "arguments": {"x": "1"}}, {"role": "user", "content": "q"}
    assert record == {"id": "5", "messages": [message], "call": call}, "the record differs"
    reasons = ["a tool is on offer twice, or has no name", "no call", "no request"]
    reasons += ["several calls", "the answer's tool is not on offer"]
    assert (n, sorted(dropped), len(notes)) == (6, reasons, 2), "items were dropped otherwise"


F = {"type": "dict", "properties": {"o": {"type": "dict"}, "z": {"type": "tuple"}}}
BERKELEY = {"id": "a", "question": [[{"role": "user", "content": "q"}]]}
BERKELEY |= {"function": [{"name": "m.f", "parameters": F}]}


def answers(path, **accept):
    return upstream(path, *({"id": i, "ground_truth": [{"m.f": a}]} for i, a in accept.items()))


def test_answers_of_the_leaderboard_by_hand(tmp_path):
    a = {"o": [{"p": [1, 2], "q": ["u", ""]}], "z": ["", [3]]}
    many = {"o": [{k: [0, 1] for k in "0123456789"}]}
    right = answers(tmp_path / "y.json", a=a, c={}, d={"z": []}, e=many)
    others = [BERKELEY | {"id": i} for i in "bcde"]
    others[1]["question"] = BERKELEY["question"] * 2
    path = upstream(tmp_path / "x.json", BERKELEY, *others)
    (record,), _, dropped, _ = convert.convert(path, right)
    spelled = [{"p": 1, "q": "u"}, {"p": 1}, {"p": 2, "q": "u"}, {"p": 2}]
    assert record["accept"] == {"o": spelled, "z": ["", [3]]}, "objects are spelled out otherwise"
    call = {"name": "m.f", "arguments": {"o": {"p": 1, "q": "u"}}}
    assert record["call"] == call, "the label is not the first of what is acceptable"
    properties = record["tools"][0]["function"]["parameters"]["properties"]
    assert properties == {"o": {"type": "object"}, "z": {"type": "array"}}, "types differ"
    reasons = ["an argument for which nothing is acceptable", "several turns"]
    reasons += ["more than 1000 acceptable values of one argument", "no answer with its id"]
    assert sorted(dropped) == sorted(reasons), "items were dropped for other reasons"


def test_answers_that_do_not_belong_to_the_file(tmp_path):
    right = answers(tmp_path / "y.json", a={})
    twice = upstream(tmp_path / "x.json", BERKELEY, BERKELEY)
    with pytest.raises(convert.BadInput, match='item 1: id "a" is an earlier'):
        convert.convert(twice, right)
    with pytest.raises(convert.BadInput, match="leave --answers out"):
        convert.convert(upstream(tmp_path / "z.json", json.loads(GOOD)), right)


FUNCTION = '{"name": "f", "parameters": {}}'
GOOD = f'{{"query": "q", "tools": [{FUNCTION}], "answers": [{{"name": "f", "arguments": {{}}}}]}}'
CALLED = '[{"role": "assistant", "content": "```%s"}]'
BAD = {  # what a file holds: how the complaint goes
    "": "nothing in it",
    "[": ":1:2: not JSON",
    GOOD + "\n{": ":2:2: not JSON",
    f"[{GOOD}, 7]": "item 1: not of",
    "[" * 9999: "nested too deeply",
    '{"query": 1}': "item 0: not of Hammer's common form: query, answers, tools",
    GOOD.replace('"q"', '"\\ud800"'): "item 0: 'utf-8' codec",
    GOOD.replace("{}}]}", '{"x": NaN}}]}'): "item 0: Out of range",
    GOOD.replace('"q"', CALLED % "{"): "item 0: Expecting property name",
    GOOD.replace('"q"', CALLED % "7```"): "item 0: an earlier call must be",
    GOOD.replace('"answers": [{', '"answers": [{}, {'): "answers missing or of another shape",
    GOOD.replace("[{", '[], "a": [{', 1): "left of 1 items: 1 the answer's tool is not on offer",
    json.dumps(BERKELEY): "possible_answer/x.json: cannot be read",
    "\udcff": "x.json: cannot be read",
}


@pytest.mark.parametrize("text", BAD, ids=range(len(BAD)))
def test_conversion_tells_bad_input_in_one_line(tmp_path, capsys, text):
    (tmp_path / "x.json").write_text(text, errors="surrogateescape")
    assert convert.main([str(tmp_path / "x.json")]) == 2, "bad input has another exit code"
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1, f"not one line: {out}{err}"
    assert err.startswith(f"convert: {tmp_path}/") and BAD[text] in err, f"it does not help: {err}"


@beside
def test_conversion_of_standard_input():
    def run(*argv, **more):
        command = [sys.executable, str(HERE / "convert.py"), *argv]
        return subprocess.run(command, capture_output=True, **more)

    path = BENCHMARKS / "hammer-eval/apibank_l2.json"
    piped = run(input=path.read_bytes())
    told = b"127 items, 121 left, 6 dropped (6 the answer's tool is not on offer)"
    assert piped.returncode == 0 and told in piped.stderr, piped.stderr.decode()
    assert piped.stdout.count(b"\n") == 121, "not a record a line"
    assert piped.stdout == run(str(path)).stdout, "standard input gives other records"


def transcript(turns):
    """A published dialogue, line by line: who speaks, what is said, called and returned."""
    for turn in turns:
        role, text = turn["role"], turn["content"].replace("\nGenerate API Request:", "").strip()
        if role == "assistant":
            yield from (f"call: {ttsi.dumps(call)}" for call in json.loads(text.strip("`")))
        else:
            yield f"{'assistant' if role == 'agent' else role}: {text}"


@beside
@pytest.mark.parametrize("name", ["apibank_l1", "apibank_l2"])
def test_a_dialogue_is_one_user_message_that_holds_every_turn(tok, name):
    tok = copy.deepcopy(tok)
    tok.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    path = BENCHMARKS / f"hammer-eval/{name}.json"
    items = json.loads(path.read_text())
    for record in convert.convert(str(path))[0]:
        lines = list(transcript(items[int(record["id"])]["query"]))
        want = "\n".join(lines) if len(lines) > 1 else lines[0].removeprefix("user: ")
        request = ttsi.user_text(record["messages"])
        assert request == want, f"{record['id']}: a turn is missing, or told otherwise"
        prompt, _ = ttsi.render(tok, "TOOLS", request)
        assert prompt == "<system>TOOLS<user>" + request, f"{record['id']}: not one user message"


@beside
@pytest.mark.parametrize("name", UPSTREAM)
def test_the_table_of_benchmarks_is_what_the_converter_counts(name):
    records, n, *_ = convert.convert(str(BENCHMARKS / name))
    cells = [f"`{Path(name).name}`", n, len(records), *convert.shape(records)]
    row = "| " + " | ".join(map(str, cells)) + " |"
    assert row in (HERE / "README.md").read_text(), f"data/README.md lacks {row}"
