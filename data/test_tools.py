"""Tests of the scripts in data/: against what shares no code with them, as in test_ttsi.py."""

import dataclasses
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import bench  # noqa: E402
import convert  # noqa: E402
import errors  # noqa: E402
import experiments  # noqa: E402
import figures  # noqa: E402
import smollm2  # noqa: E402
import world  # noqa: E402

import ttsi  # noqa: E402

torch.set_num_threads(1)  # for models as small as these more would wait for one another


def lab_of(folder, data=HERE / "demo.jsonl", flags=""):
    """Two samples, on which every method runs; all that it keeps is in a folder."""
    args = experiments.parse_arguments(["real", "--quick", "--flags", flags])
    args.rows, args.texts, args.pool = folder / "rows", folder / "texts", [HERE / "dev.jsonl"]
    return experiments.Lab(args, args.model, data, 0)


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    return lab_of(tmp_path_factory.mktemp("lab"))


def pair(i, tools, before, after, margin=0.5, **more):
    """A direct row and a method's, of which the calls are right or not."""
    row = {"id": i, "tools": tools, "offered": 3, "margin": margin, "flaw": "", "drafts": []}
    row |= {"cost": {"read": [1.0, 10], "direct": [1.0, 10]}, "decision": "certain", "seed": 0}
    row |= {"f1": [1, 1, 1, 0, 2, 2]}
    changed = row | {"grade": [True, after], "decision": "adapted"} | more
    return row | {"grade": [True, before]}, changed


# ------------------------------------------------------------------------------ convert.py
SHARED = Path(convert.__file__).resolve().parents[2] / "shared" / "benchmarks"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"name": "f", "description": "", "parameters": SCHEMA}
TOOLS = [{"type": "function", "function": TOOL}]
CALL = {"name": "f", "arguments": {"city": "Oslo"}}
TEXT = json.dumps(CALL)
AS_TEXT = CALL | {"arguments": '{"city": "Oslo", "days": null}'}
ASKED = [{"role": "user", "content": "go"}]
SAID = {"role": "assistant", "content": ""}
MADE = SAID | {"tool_calls": [{"type": "function", "function": CALL}]}
PENDING = {"role": "tool", "name": "f", "content": "pending"}
RECORD = {"id": "r", "messages": ASKED, "tools": TOOLS, "call": CALL}


def converted(tmp_path, *records, name="x.json", **more):
    """What convert returns of a file of these records (dicts, or text of lines)."""
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    (tmp_path / name).write_text("\n".join(lines), "utf-8", "surrogateescape")
    return convert.convert(str(tmp_path / name), **more)


FORMS = [{"tools": [TOOL]}, {"tools": json.dumps(TOOLS)}, {"functions": [TOOL], "tools": None}]
for key in ("inputSchema", "input_schema", "parameters"):  # MCP, Anthropic, JSON text
    FORMS += [{"tools": {"tools": [json.dumps({"name": "f", key: json.dumps(SCHEMA)})]}}]
FORMS += [{"tools": [{"toolSpec": {"name": "f", "inputSchema": {"json": SCHEMA}}}]}]
FORMS += [{"messages": None, "query": "go"}, {"messages": None, "prompt": ASKED}]
FORMS += [{"messages": [{"role": "human", "content": "go"}]}]
FORMS += [{"call": None, "answers": '[{"tool": "f", "parameters": {"city": "Oslo"}}]'}]
FORMS += [{"call": {"function": AS_TEXT}}, {"call": None, "tool_calls": [{"function": CALL}]}]
FORMS += [{"call": None, "prompt": "go", "completion": TEXT, "messages": None}]
ENDS = [MADE, {"function_call": AS_TEXT}, {"content": f"Sure.\n<tool_call>{TEXT}</tool_call>"}]
ENDS += [{"content": f'<think>{TEXT}</think>{{"action": {TEXT}}}', "role": "gpt"}]
ENDS += [{"content": [{"type": "tool_use", "name": "f", "input": CALL["arguments"]}]}]
ENDS += [{"content": TEXT.replace("}}", ', "x": None}}')}]  # Python's word
FORMS += [{"call": None, "messages": [*ASKED, SAID | end]} for end in ENDS]
FORMS = [(form, {}) for form in FORMS]
# A call with its result is history and no label; the last call is the label.
TURNS = [[MADE, PENDING | {"role": r}] for r, role in convert.ROLES.items() if role == "tool"]
RESULT = {"type": "tool_result", "content": [{"type": "text", "text": "pending"}]}
TURNS += [[{"role": "tool_call", "content": TEXT}, {"role": "user", "content": [RESULT]}]]
ENDING = PENDING | {"content": "pending\nGenerate API Request:"}
TURNS += [[SAID | {"content": f"```[{TEXT}]```"}, ENDING]]
for turns in TURNS:
    turns, want = [*ASKED, *turns], [*ASKED, MADE, PENDING]
    FORMS += [({"messages": turns, "call": None}, {"messages": want, "call": None})]
    FORMS += [({"messages": [*turns, MADE]}, {"messages": want})]  # the label twice
BRIEF = {"role": "system", "content": "Be brief."}
FORMS += [({"system": [{"text": "Be brief."}]}, {"messages": [BRIEF, *ASKED]})]


@pytest.mark.parametrize("change,want", FORMS, ids=range(len(FORMS)))
def test_every_form_becomes_the_one(tmp_path, change, want):
    records, _, dropped, faults = converted(tmp_path, RECORD | change)
    want = {key: value for key, value in (RECORD | want).items() if value}
    assert records == [want], f"another record: {dropped} {faults}"


STR, OPTIONAL = {"type": "str"}, {"type": "str, optional"}
MAPS = [({"a": STR, "b": STR | {"default": "x"}, "c": OPTIONAL}, {}, ["a"])]  # xLAM
MAPS += [({"a": STR | {"required": True}, "b": STR}, {}, ["a"])]  # ToolAlpaca
MAPS += [({"a": STR | {"required": False}, "b": STR}, {}, ["b"])]
MAPS += [({"a": STR}, {"required": []}, []), ({"a": STR}, {"return": {}}, [])]  # API-Bank
MAPS += [({key: STR}, {}, [key]) for key in ("properties", "type", "required", "not")]
MAPS += [({}, {}, []), ({"a": STR | {"nullable": True}, "b": STR}, {}, ["b"])]


@pytest.mark.parametrize("rules,tool,want", MAPS, ids=range(len(MAPS)))
def test_parameters_of_a_bare_map(tmp_path, rules, tool, want):
    schema = {"type": "object", "properties": rules, "required": want}
    split = {"parameters": {"properties": rules}, "required": want}
    for offered in ({"parameters": rules} | tool, {"parameters": schema}, split):
        (record,), *_ = converted(tmp_path, RECORD | {"tools": [{"name": "f"} | offered]})
        found = record["tools"][0]["function"]["parameters"]
        assert (list(found["properties"]), found["required"]) == (list(rules), want), found


def test_types_become_those_of_json_schema(tmp_path):
    kinds = {"int": {"type": "integer"}, "float": {"type": "number"}, "bool": {"type": "boolean"}}
    kinds |= {"Dict": {"type": "object"}, "str, optional": {"type": "string"}, "any": {}}
    kinds |= {"List[str]": {"type": "array", "items": {"type": "string"}}}
    kinds |= {"list(int)": {"type": "array", "items": {"type": "integer"}}}
    rules = {kind: {"type": kind, "choices": [1]} for kind in kinds}
    (record,), *_ = converted(tmp_path, RECORD | {"tools": [{"name": "f", "parameters": rules}]})
    found = record["tools"][0]["function"]["parameters"]["properties"]
    assert found == {kind: rule | {"enum": [1]} for kind, rule in kinds.items()}


USELESS = {"several calls": {"call": [CALL, CALL]}, "no call is right": {"answers": []}}
USELESS |= {"the answer's tool is not on offer": {"call": {"name": "g"}}}
USELESS |= {"a tool is on offer twice": {"tools": TOOLS * 2}, "no tool is on offer": {"tools": []}}
USELESS |= {"no request by the user": {"messages": [{"role": "user", "content": " "}]}}
USELESS |= {"a message has an image, or so": {"messages": [{"role": "user", "content": [{}]}]}}
OPEN = json.dumps(RECORD | {"id": "s"})[:-1]  # a good record, but for what comes
FAULTS = ["{", "[1]", "[" * 99999, f'{OPEN}, "a": 1, "a": 2}}', f'{OPEN}, "a": "\udcff"}}']
FAULTS += [f'{OPEN}, "a": {value}}}' for value in ("NaN", "1e999", '"\\ud800"')]
FAULTS += [RECORD, RECORD | {"id": "s", "tools": None}, RECORD | {"id": "\n"}]
ENDS = [[SAID | {"content": "f(city='Oslo')"}], [MADE, SAID | {"content": "Done."}]]
FAULTS += [RECORD | {"id": "t", "call": None, "messages": [*ASKED, *end]} for end in ENDS]
FAULTS += [RECORD | {"id": "v", "messages": [*ASKED, {"role": "tool_call", "content": "f"}]}]
for change in ({"call": "f"}, {"messages": [{"role": "x"}]}, {"tools": [{}]}, {"messages": None}):
    FAULTS += [RECORD | change | {"id": "u"}]


def test_useless_records_are_counted_by_their_reason(tmp_path):
    records = [RECORD | change for change in USELESS.values()]
    kept, items, dropped, faults = converted(tmp_path, *records, RECORD)
    assert (kept, items, faults) == ([RECORD], len(records) + 1, [])
    assert dropped == dict.fromkeys(USELESS, 1)


@pytest.mark.parametrize("fault", FAULTS, ids=range(len(FAULTS)))
def test_a_fault_is_named_with_its_line_and_the_rest_is_kept(tmp_path, fault):
    other = RECORD | {"id": "z"}
    records, items, _, faults = converted(tmp_path, RECORD, "", fault, other)
    assert (records, items, len(faults)) == ([RECORD, other], 3, 1), "good ones are lost"
    assert re.fullmatch(rf"{tmp_path}/x.json:3: .{{9,300}}", faults[0]), faults


def test_faults_in_an_array_are_named_where_the_item_begins(tmp_path):
    broken = '{"a":\nNaN},\n\n{"a": 1,\n"a": 2},\n7,\n{]'
    records, items, _, faults = converted(tmp_path, "[", json.dumps(RECORD) + ",", broken)
    assert (records, items) == ([RECORD], 4), "what comes before a syntax error is kept"
    assert [int(fault.split(":")[1]) for fault in faults] == [3, 6, 8, 9], faults
    for text in ("[", f"[{TEXT}", f"[{TEXT} {TEXT}]", f"[{TEXT}] 1"):
        assert ":1: not JSON" in converted(tmp_path, text)[3][-1], f"{text} passes"


def test_line_ends_a_byte_order_mark_and_gzip_change_nothing(tmp_path):
    texts = [json.dumps(r) for r in (RECORD, RECORD | {"id": None, "call": None})]
    forms = ["\n".join(texts), "\ufeff" + "\r\n\r\n".join(texts) + "\r\n", "\r".join(texts)]
    forms += [f"[{texts[0]},\n{texts[1]}]"]
    for data in [form.encode() for form in forms] + [gzip.compress(forms[0].encode())]:
        (tmp_path / "x").write_bytes(data)
        want = [RECORD, {"id": "2", "messages": ASKED, "tools": TOOLS}]
        assert convert.convert(str(tmp_path / "x"))[0] == want, data[:20]


def test_answers_of_the_leaderboard(tmp_path):
    accept = {"o": [{"p": [1, 2], "q": ["", "u"]}], "z": ["x", ""], "c": ["Oslo", "O"]}
    answers = [{"id": i, "ground_truth": [{"f": a}]} for i, a in (("a", accept), ("b", {"c": []}))]
    item = {"id": "a", "question": [ASKED], "function": [TOOL | {"parameters": {"type": "dict"}}]}
    items = [item, item | {"id": "b"}, item | {"id": "c"}, item | {"question": [ASKED] * 2}]
    converted(tmp_path, *answers, name="y")
    (record,), _, dropped, faults = converted(tmp_path, *items, answers_path=str(tmp_path / "y"))
    want = {"name": "f", "arguments": {"o": {"p": 1}, "c": "Oslo"}}
    assert (record["id"], record["messages"], record["call"]) == ("a", ASKED, want)
    assert dropped.total() == 3 and len(dropped) == 3 and not faults, dropped
    assert "--answers" in str(converted(tmp_path, item)[2]), "it does not ask for the answers"


def test_the_command(tmp_path):
    def run(text, out=subprocess.PIPE):
        command = [sys.executable, convert.__file__]
        made = subprocess.run(command, input=text.encode(), stdout=out, stderr=subprocess.PIPE)
        return made.returncode, made.stdout, made.stderr.decode().splitlines()

    code, out, told = run("\n".join([json.dumps(RECORD), *["{"] * 12]))
    assert (code, json.loads(out), len(told)) == (0, RECORD, 12), "a good record is written"
    assert told[9].startswith("convert: -:11: "), told
    assert "13 items, 1 left, 0 dropped, 12 faults" in told[10], told
    assert "1/1/1" in told[11] and "right one in 100.0 %" in told[11], told
    code, out, told = run("\n")
    assert (code, out) == (2, b"") and told[-1].endswith("nothing is left"), told
    with open("/dev/full", "w") as full:
        code, _, told = run(json.dumps(RECORD), full)
    assert code == 2 and len(told) == 1 and "No space left" in told[0], told


PAIRS = [("hammer-eval/sealtool", "seal-tools/canonical_294")]
PAIRS += [(f"hammer-eval/apibank_{n}", f"api-bank/canonical_{n}") for n in ("l1", "l2")]
PAIRS += [(f"bfcl/BFCL_v4_{n}", f"bfcl/canonical_{n}") for n in ("multiple", "simple_python")]


def essence(record):
    """A record as text: without blanks and `unit`, and with all messages in one."""
    texts = " ".join(message["content"] for message in record["messages"])
    calls = [message for message in record["messages"] if len(message) > 2]
    parts = [record["tools"], record["call"], calls, texts]
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return re.sub(r'(, )?"unit": "[^"]*"|\\[nrt]|\s', "", text)


@pytest.mark.skipif(not SHARED.exists(), reason="no benchmarks beside this checkout")
@pytest.mark.parametrize("name,other", PAIRS)
def test_benchmarks_equal_an_independent_conversion(name, other):
    """The canonical files were made from each benchmark's own files by other code."""
    ours = convert.convert(str(SHARED / f"{name}.json"))[0]
    lines = (SHARED / f"{other}.jsonl").read_text().splitlines()
    theirs = [json.loads(line) for line in lines]
    for a, b in zip(ours, theirs, strict=True):
        assert essence(a) == essence(b), f"{a['id']} differs"


# --------------------------------------------------- the world, its templates, the tool caller
def test_the_data_files_are_what_the_generator_writes_and_share_no_tool(tmp_path):
    world.main(["--out", str(tmp_path)])
    for split, n in world.FILES.items():
        text = (HERE / f"{split}.jsonl").read_bytes()
        assert (tmp_path / f"{split}.jsonl").read_bytes() == text, f"{split} is frozen"
        records = [*map(json.loads, text.splitlines())]
        offered = {t["function"]["name"] for r in records for t in r["tools"]}
        others = {"_".join(t) for s, tools in world.TOOLS.items() if s != split for t in tools}
        assert len(records) == n and not offered & others, f"{split}: {offered & others}"
    # Another zlib may pack it otherwise.
    packed = [(folder / "train.jsonl.gz").read_bytes() for folder in (tmp_path, HERE)]
    assert gzip.decompress(packed[0]) == gzip.decompress(packed[1]), "train is frozen"


@pytest.mark.parametrize("whose", ["model", "teacher", "smollm2"])
def test_prompts_are_those_of_the_training(whose):
    tok = AutoTokenizer.from_pretrained(HERE / whose.replace("smollm2", "model"))
    begin, end = "<|{}|>", ""
    if whose == "smollm2":
        tok.chat_template, begin, end = smollm2.TEMPLATE, "<|im_start|>{}\n", "<|im_end|>\n"
    system = 'Answer the request with one tool call, a JSON object {"name": ..., "arguments": '
    system += "{...}} and nothing else. Tools:\n"
    for r in map(json.loads, (HERE / "demo.jsonl").read_text().splitlines()):
        turns = {"system": system + "\n".join(json.dumps(t["function"]) for t in r["tools"])}
        turns |= {"user": r["messages"][0]["content"], "assistant": json.dumps(r["call"])}
        answer = {"role": "assistant", "content": "", "tool_calls": [{"function": r["call"]}]}
        whole = "".join(begin.format(role) + text + end for role, text in turns.items())
        how = {"tools": r["tools"], "tokenize": False}
        got = tok.apply_chat_template([*r["messages"], answer], **how)
        assert got == whole, f"{r['id']}: another prompt or answer"
        got = tok.apply_chat_template(r["messages"], add_generation_prompt=True, **how)
        assert got + turns["assistant"] + end == whole, f"{r['id']}: not behind it"


def test_a_folder_is_base_plus_delta(tmp_path, monkeypatch):
    parts = [f"self_attn.{x}" for x in "qkvo"] + ["mlp.gate", "mlp.up", "mlp.down"]
    want, delta = load_file(HERE / "model" / "model.safetensors"), {}
    for n in range(35):
        name = f"model.layers.{n // 7}.{parts[n % 7]}_proj.weight"
        A, B = torch.randn(want[name].shape[1], 2), torch.randn(2, want[name].shape[0])
        delta |= {f"{n}.A": A, f"{n}.B": B}
        want[name] = (want[name].float() + 0.5 * (A @ B).T).half()
    monkeypatch.setattr(smollm2, "DELTA", tmp_path / "delta")
    save_file(delta, smollm2.DELTA, {"base": "another", "scale": "0.5"})
    base, out = shutil.copytree(HERE / "model", tmp_path / "base"), tmp_path / "out"
    config = json.loads((base / "config.json").read_text())
    draft = config.pop("draft")
    (base / "config.json").write_text(json.dumps(config))
    smollm2.main(["--base", str(base), "--out", str(out)])
    assert json.loads((out / "config.json").read_text())["draft"] == draft, "what it was taught"
    torch.testing.assert_close(load_file(out / "model.safetensors"), want)


# -------------------------------------------------------------------------- the experiments
@pytest.mark.parametrize("name", experiments.METHODS)
def test_every_method_makes_rows_and_writes_a_call(lab, name):
    rows = lab.rows(name)
    assert len(rows) == 2, f"{name}: {rows}"
    for i, row in rows.items():
        gold = lab.samples[i]["call"]
        assert ttsi.parse(row["answer"]), f"{name} wrote no call: {row['answer']}"
        assert row["grade"] == ttsi.grade(row["answer"], gold), f"{name}: another label"
        assert row["before"]["grade"] == ttsi.grade(row["direct"], gold), f"{name}: not direct"
        gated = experiments.METHODS[name].on == "uncertain"
        assert not gated or "score" in row["cost"], f"{name} did not pay for the gate"
        assert "read" in row["cost"], f"{name} did not pay for reading the prompt"
    hooks = [m for m in lab.base[0].modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks, f"{name} leaves hooks"


def test_no_method_sees_a_label_and_rows_of_a_benchmark_hold_no_text(lab, tmp_path):
    other = lab_of(tmp_path, shutil.copy(HERE / "demo.jsonl", tmp_path))
    for sample in other.samples.values():
        sample["call"] = {"name": "scrambled", "arguments": {}}
    for name in ("default", "anothers", "nearest", "icl", "bias", "vote", "teacher"):
        published = json.dumps(other.rows(name))
        _, whole = experiments.read_rows(other.path(name, whole=True))
        for i, row in lab.rows(name).items():
            assert whole[i]["answer"] == row["answer"], f"{name}: a label leaks"
            texts = [row["answer"], lab.samples[i]["messages"][-1]["content"]]
            for text in texts + [tool["name"] for tool in lab.samples[i]["tools"]]:
                assert json.dumps(text)[1:-1] not in published, f"{name}: a text, {text}"


def test_processes_share_rows_and_go_on_where_a_run_was_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "WORLD", 2)
    with pytest.raises(ttsi.InputError, match="1 rows are left to other processes"):
        lab_of(tmp_path).rows("default")
    monkeypatch.setattr(experiments, "RANK", 1)
    rows, path = lab_of(tmp_path).rows("default"), lab_of(tmp_path).path("default")
    *_, last = lines = path.read_text().splitlines()
    assert len(rows) == 2 and len(lines) == 3, "not once each, behind one head"
    path.write_bytes(path.read_bytes()[:-20])  # a torn last row
    monkeypatch.undo()
    made, row = [], experiments.Lab.row
    monkeypatch.setattr(experiments.Lab, "row", lambda *key: made.append(key[2]) or row(*key))
    again = lab_of(tmp_path).rows("default")
    assert made == [json.loads(last)["id"]], "more than the torn row, or less"
    assert [r["answer"] for r in again.values()] == [r["answer"] for r in rows.values()]
    assert path.with_suffix(".jsonl.gz").exists() and not path.exists(), "not packed"
    with pytest.raises(ttsi.InputError, match="other settings"):
        lab_of(tmp_path, flags="--max-new-tokens 99").rows("default")


def test_other_settings_of_t_train_on_the_pairs_of_the_default(lab):
    (i, row), (_, other) = lab.rows("default").items()
    given = lab.samples[i] | {"pairs": [*map(json.dumps, row["pairs"])]}
    for adapt in ("suffix", "full"):
        cfg = dataclasses.replace(lab.config("default"), adapt=adapt, pairs="kept")
        again = experiments.trained(*lab.base, lab.samples[i], cfg, lab.lessons(i))
        want = ttsi.tt_si(*lab.base, given, cfg)
        assert again.loss == pytest.approx(want.loss, rel=1e-3) and again.answer == want.answer
    for name in ("bias", "lr-0.4"):
        loss = lab.rows(name)[i]["loss"]
        assert loss[0] == row["loss"][0] and loss[1] != row["loss"][1], name
    # Before the first step the base's loss counts: of the other item's pairs, about its tools.
    loss = lab.rows("anothers")[i]["loss"]
    assert loss[0] == pytest.approx(other["loss"][0], rel=1e-3), "other pairs"


def test_each_sample_is_run_by_one_of_default_and_rest():
    lab = experiments.Lab(experiments.parse_arguments(["own", "--kept"]), "none", "x.jsonl", 0)
    seen = {"a": (0.1, ""), "b": (0.95, ""), "c": (None, ""), "d": (1.0, ""), "e": (1.0, "flaw")}
    lab.known["default"] = rows = {}
    for i, (margin, flaw) in seen.items():
        more = {"grade": "after", "before": {"grade": "before"}, "cost": {}}
        rows[i] = pair(i, "s", 0, 1, margin, flaw=flaw)[1] | more
    chosen = {"icl": "ae", "rest": "bd", "itself": "abde", "paper": "a"}  # which sees no flaw
    assert {name: "".join(lab.chosen(name)) for name in chosen} == chosen
    lab.known["icl"] = {"a": {"grade": "shown"}, "e": {"grade": "shown"}}
    for name, want in (("default", ["after"] * 5), ("icl", ["shown", *["before"] * 3, "shown"])):
        run = lab.run([name])
        assert [row["grade"] for _, row in run] == want, "the others stay direct"
        assert {row["grade"] for row, _ in run} == {"before"}, "the direct ones"
    assert not lab.run(["default", "rest"]), "rows are missing"


@pytest.mark.parametrize("sizes, middle", [((1, 1), 50.0), ((3, 1), 25.0)])
def test_the_bootstrap_draws_lists_of_tools(sizes, middle):
    changes = {"a": [0.0] * sizes[0], "b": [100.0] * sizes[1]}
    means = figures.bootstrap(changes)  # of two lists two are drawn: aa, ab, ba, bb
    for value, share in ((0.0, 0.25), (middle, 0.5), (100.0, 0.25)):
        found = (means == value).double().mean().item()
        assert abs(found - share) < 0.02, f"{value}: {found}, not {share}; s.d. 0.005"


def test_a_line_of_a_table_is_a_hand_count():
    draft = {"verdict": "kept"}, {"verdict": "tool not on offer"}
    run = [pair("1", "s", 0, 1, drafts=draft), pair("2", "s", 1, 0), pair("3", "t", 1, 1)]
    for key in (("1", "s", 0, 1), ("2", "s", 1, 1), ("3", "t", 1, 1)):
        run.append(pair(*key, seed=1))
    cells = figures.cells("label", "place", run, [], True)
    assert cells["items"] == "3, place, 2 seeds"
    assert cells["right tool, %"] == "100.0 -> 100.0"
    assert cells["right call, %"] == "66.7 -> 83.3"
    assert cells["difference [95 %]"].startswith("+16.7 [+0.0, +25.0]"), "t, t; s, s"
    assert cells["repaired / broken"] == "1 / 1" and cells["adapted"] == "3"
    assert cells["drafts kept"] == "50 %" and cells["tokens"] == "1.0 x"
    assert cells["F1 of names, arguments"] == "100.0 -> 100.0, 0.0 -> 0.0"
    other = [pair("2", "s", 1, 1), pair("3", "t", 0, 0), pair("4", "t", 0, 0)]
    both = figures.against(run, other)  # of one seed, from theirs to ours
    assert [(a["grade"][1], b["grade"][1]) for a, b in both] == [(1, 0), (0, 1)]


def test_parts_of_the_items_by_their_direct_rows():
    known = [("", 0.99, 5), ("x", 0.99, 5), ("", 0.5, 5), ("x", 0.5, 1)]
    rows = [{"flaw": f, "margin": m, "offered": n} for f, m, n in known]
    run = [(row, i) for i, row in enumerate(rows)]
    parts = figures.parts({"there": run, "elsewhere": run[:1]}).values()
    found = [[i for _, i in part["there"]] for part in parts]
    assert found == [[0, 1, 2], [1], [2], [3]], "five tools; a flaw; a small margin; both"
    assert ["elsewhere" in part for part in parts] == [True, False, False, False]


def test_f1_counts_as_hammers_scorer_does():
    gold = {"name": "f", "arguments": {"a": 5, "b": "x", "c": ""}}
    other = {"name": "f", "arguments": {"a": "5", "b": "y", "d": 1, "e": ""}}
    assert figures.f1_counts(None, gold) == [0, 1, 1, 0, 0, 2]
    assert figures.f1_counts(other | {"name": "g"}, gold) == [0, 1, 1, 0, 3, 2]
    assert figures.f1_counts(other, gold) == [1, 1, 1, 1, 3, 2]
    bare = {"name": "f", "arguments": {}}
    assert figures.f1_counts(bare, bare) == [1, 1, 1, 1, 0, 0]


def test_the_gain_over_tau_is_a_hand_count():
    run = [pair("1", "s", 0, 1, 0.2), pair("2", "s", 1, 0, 0.6), pair("3", "s", 0, 1, 0.9)]
    run[0][0].update(flaw="as uncertain as can be", margin=0.99)
    points = figures.gain_by_tau([*run, pair("4", "s", 0, 0, 1.0)])
    assert [tau for tau, *_ in points] == [0.0, 0.0, 0.6, 0.9, 1.0]
    assert [below for _, below, _ in points] == [0, 25, 0, 25, 25], "adapted below tau"
    assert [above for *_, above in points] == [25, 0, 25, 0, 0], "adapted from tau on"


def test_figures_are_written_and_come_out_the_same(tmp_path):
    places = {"own world": [pair("1", "s", 0, 1), pair("2", "t", 1, 1)]}
    for draw, given in ((figures.forest, {"label": places}), (figures.tau_curves, places)):
        for name in ("a.svg", "b.svg"):
            draw(given, tmp_path / name)
        text = (tmp_path / "a.svg").read_text()
        assert text == (tmp_path / "b.svg").read_text(), "it depends on when it was made"
        assert "own world" in text and "<dc:date>" not in text and "fill: #ffffff" not in text


def test_all_pages_say_what_the_rows_say(tmp_path, capsys):
    page = HERE / "results" / "README.md"
    again = Path(shutil.copy(page, tmp_path))
    experiments.main(["--kept"], tmp_path)
    assert again.read_text() == page.read_text(), "run: python data/experiments.py --kept"
    front = (HERE.parent / "README.md").read_text(encoding="utf-8")
    told = re.findall(r"experiments\.py (?:own|real) --kept`.*\| (.*?) \|$", front, re.M)
    assert told, "README has no row of the experiments"
    lines = capsys.readouterr().out.splitlines()
    ours = "".join(line for line in lines if line.startswith("| TT-SI |"))
    assert all(f"| {difference} |" in ours for difference in told), told
    for kept in page.parent.glob("bench-*.jsonl"):
        bench.main(["--kept", "--output", str(kept)])
        assert capsys.readouterr().out in (page.parent / "costs.md").read_text(), kept
    again = shutil.copytree(errors.ROWS, tmp_path / "errors")
    errors.main(["--kept", "--rows", str(again)])
    said = [(folder / "README.md").read_text() for folder in (errors.ROWS, again)]
    assert said[0] == said[1], "run: python data/errors.py --kept"


KEPT = sorted((HERE / "results" / "rows").glob("*/*.gz"))


def lab_of_kept(kept, head):
    """Where the model is: MODELS=FOLDER holds those that nobody taught, by the rows' names."""
    name, seed, model = head["rows of"], head["flags"]["seed"], kept.parent.name
    folder = HERE if model == "model" else Path(os.environ.get("MODELS", "none"))
    file = kept.name.split(f"-{name}-{seed}-")[0] + ".jsonl"
    data, *_ = [*HERE.glob(file), *SHARED.glob(f"*/{file}"), Path("none")]
    args = experiments.parse_arguments(["--kept", f"--flags=--dtype {head['flags']['dtype']}"])
    lab = experiments.Lab(args, str(folder / model), data, seed)
    texts = lab.path("default", whole=True) if experiments.METHODS[name].needs else data
    if folder != HERE and not (data.exists() and texts.exists() and (folder / model).exists()):
        pytest.skip(f"one of them is not at hand: {data}, {texts}, {folder / model}")
    return lab, name


@pytest.mark.skipif("SLOW" not in os.environ, reason="SLOW=1 makes rows again")
@pytest.mark.parametrize("kept", KEPT, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_three_kept_rows_come_out_again(kept):
    head, rows = experiments.read_rows(kept.with_suffix(""))
    lab, name = lab_of_kept(kept, head)
    assert lab.head(name) == head, "other settings, data or weights"
    adapted = [i for i in rows if rows[i]["decision"] == "adapted"]
    for i in (adapted or [*rows])[:3]:
        again, row = lab.row(name, i), rows[i]
        same = [(r["decision"] == "adapted", r["tools"], r["before"]) for r in (again, row)]
        assert same[0] == same[1], f"{i}: another decision, or direct answer"
        # In half precision another processor's rounding changes margins and what is drawn.
        if head["flags"]["dtype"] == "auto":
            assert again["margin"] == pytest.approx(row["margin"], abs=0.01), f"{i}: another H"
            assert again["grade"] == row["grade"], f"{i}: another answer"
            losses = [r["loss"] or [] for r in (again, row)]
            assert losses[0] == pytest.approx(losses[1], rel=0.05), f"{i}: other pairs, or T"


@pytest.mark.parametrize("argv, why", [("", "a group"), ("x", "no group"), ("real", "--pool")])
def test_experiments_refuse_bad_input_in_one_line(argv, why):
    with pytest.raises(ttsi.InputError, match=why) as e:
        experiments.main(argv.split())
    assert "\n" not in str(e.value)


# ------------------------------------------------------------------ errors and their signs
def test_values_of_a_call_are_found_in_its_text():
    values = ["5", '"x\\", \\"b\\": 1"', "[1, {}]", '{"arguments": "d"}', "null"]
    keys = ["name", "a", "b", "arguments", "\u00e9"]
    text = ", ".join(f'"{key}":  {value}' for key, value in zip(keys, values, strict=True))
    for form in ("arguments", "parameters"):
        call = f'So: {{"name": "f", "{form}": {{{text}}}}}'
        assert [call[a:b] for a, b in errors.value_spans(call)] == values
    for text in ("", "none", '{"name": "f"', '{"name": "f", "arguments": {}}'):
        assert errors.value_spans(text) == []


def test_log_probabilities_are_those_of_a_whole_forward_pass():
    cfg = ttsi.Config(tau=0)
    model, tok = ttsi.load(cfg.model, cfg)
    sample = next(iter(ttsi.read_jsonl(HERE / "demo.jsonl", ttsi.to_sample).values()))
    x, text = ttsi.prepare(tok, sample, cfg), 'no {"name": "f", "arguments": {"a": "b", "c": 34}}'
    new = tok(text, add_special_tokens=False).input_ids
    p = model(torch.tensor([x.ids + new])).logits[0, len(x.ids) - 1 : -1].log_softmax(-1)
    starts = [len(tok.decode(new[:n])) for n in range(len(new))]
    each = list(zip(starts, p[range(len(new)), new].tolist(), strict=True))

    def of(part):
        begin = text.rindex(part)
        return sum(nats for at, nats in each if begin <= at < begin + len(part))

    found = errors.log_probabilities(model, x, text)
    least = min(of('"b"'), of("34"))
    assert of('"b"') != pytest.approx(of("34"), abs=1), "which is the least is not seen"
    assert found == pytest.approx([of(text), of(text[text.index('"b"') :]), least], rel=1e-4)
    assert errors.log_probabilities(model, x, "no") == pytest.approx([of("no")] * 3, rel=1e-4)


WRONG = [({"a": 1, "b": "x"}, []), ({"a": "1", "b": "x"}, []), ({"a": 2, "b": "x"}, [4])]
WRONG += [({"a": 1}, [2]), ({"a": 1, "b": "x", "c": 0}, [3]), ({"a": 2, "c": 0}, [2, 3, 4])]


@pytest.mark.parametrize("arguments,kinds", WRONG, ids=range(len(WRONG)))
def test_the_kinds_of_errors(arguments, kinds):
    gold = {"name": "f", "arguments": {"a": 1, "b": "x"}}
    want = [errors.KINDS[n] for n in kinds]
    assert errors.errors_of({"name": "f", "arguments": arguments}, gold) == want
    assert errors.errors_of({"name": "g", "arguments": arguments}, gold) == ["another tool"]
    assert errors.errors_of(None, gold) == ["no call"]


def test_the_table_of_errors_goes_on_and_is_that_of_kept_rows(tmp_path, capsys, monkeypatch):
    data = shutil.copy(HERE / "demo.jsonl", tmp_path / "a.b.jsonl")
    command = ["--data", str(data), "--rows", str(tmp_path / "rows"), "--limit"]
    with monkeypatch.context() as m:
        method = ttsi.tt_si
        m.setattr(ttsi, "tt_si", lambda *given: "call" not in given[2] and method(*given))
        errors.main([*command, "3"])
    monkeypatch.setattr(errors, "look", lambda *_: pytest.fail("makes a row again"))
    errors.main([*command, "3"])
    first, second = capsys.readouterr().out.split("model\n")[1:]
    assert first.strip() == second.strip()
    assert "| items | 3 | 500 |" in first, "beside those of the experiments"
    page = tmp_path / "rows" / "README.md"
    page.write_text("<!-- errors model -->\n<!-- end -->")
    errors.main(["--kept", *command[2:4]])
    assert first.strip() in page.read_text()
    with pytest.raises(ttsi.InputError, match="other settings"):
        errors.main([*command, "3", "--flags=--seed 1"])
    grades = [(0, 1, 1), (0, 0, 3), (1, 1, 3), (1, 1, 4)]
    rows = [{"grade": [tool, call], "m": m} for call, tool, m in grades]
    assert errors.auroc(rows, lambda row: row["m"]) == 3.5 / 4
    assert errors.auroc(rows, lambda row: row["m"], of=0) == 1.5 / 3


# -------------------------------------------------------------------------------- the bench
def test_the_bench_times_all_rivals_keeps_rows_and_grows(capsys, tmp_path, monkeypatch):
    kept = ["--output", str(tmp_path / "rows.jsonl")]
    bench.main(["--quick", "--tau", "2", *kept])
    printed = capsys.readouterr().out
    assert "TT-SI, adapted                2" in printed
    assert "answer differently: never" in printed, "generate answers otherwise"
    bench.main(["--kept", *kept])
    assert capsys.readouterr().out == printed
    monkeypatch.setattr(bench, "SIZES", [(6, 2, 1)])
    bench.main(["--grow", "--quick"])
    assert capsys.readouterr().out.splitlines()[-1].split()[:3] == ["6", "2", "1"]


def test_the_table_of_the_bench_by_hand():
    """Ratios within an item: 2, 1, 3; quartiles 1.5, 2, 2.5; medians 3 and 2."""
    rows = [{"id": "a", "seconds": {"generate": 2, "TT-SI, certain": 4}, "same": True}]
    rows += [{"id": "b", "seconds": {"generate": 2, "TT-SI, certain": 2}, "same": False}]
    rows += [{"id": "c", "seconds": {"generate": 1, "TT-SI, certain": 3}, "same": True}]
    text = bench.table([row | {"key": "k", "stages": {}} for row in rows])
    *lines, differently = text.splitlines()
    assert lines[3].split()[2:8] == ["3", "3.000", "1.50", "[1.50,", "2.00,", "2.50]"]
    assert lines[-1].endswith("0     none: pip install peft")
    assert differently.endswith(": b")


def test_the_competent_user_scores_as_ttsi_does_and_leaves_the_base_as_it_was():
    pytest.importorskip("peft")
    cfg = ttsi.Config(tau=2.0)
    model, tok = ttsi.load(cfg.model, cfg)
    sample = next(iter(ttsi.read_jsonl(HERE / "demo.jsonl", ttsi.to_sample).values()))
    result, rival = ttsi.tt_si(model, tok, sample, cfg), bench.wrapped(model, cfg)
    for _ in range(2):  # the second: after its LoRA was trained
        margin, _ = bench.competent(rival, tok, cfg, sample, result)
        assert margin == pytest.approx(result.margin, abs=1e-5)
