"""The files beside ttsi.py: the world, the converter, the experiments, the bench, the tables.

Each test compares with what shares no code: a closed form, brute force, a hand count, an invariant.
"""

import argparse
import contextlib
import copy
import hashlib
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import bench  # noqa: E402
import checks  # noqa: E402
import choose  # noqa: E402
import convert  # noqa: E402
import experiments  # noqa: E402
import figures  # noqa: E402
import smollm2  # noqa: E402
import world  # noqa: E402

import ttsi  # noqa: E402

torch.set_num_threads(1)  # as kept rows were made; and products are small
BENCHMARKS = HERE.parent.parent / "shared" / "benchmarks"
slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="long; runs with SLOW=1")
beside = pytest.mark.skipif(not BENCHMARKS.exists(), reason="no benchmarks beside this checkout")


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture(scope="session")
def tok():
    return AutoTokenizer.from_pretrained(HERE / "model")


def rare(request, call):
    """-> [is the verb, is the object worded rarely], by looking for all rare wordings."""
    found = []
    for table, word in zip((world.VERBS, world.NOUNS), call["name"].split("_"), strict=True):
        found.append(any(re.search(rf"\b{w}\b", request) for w in table[word][world.RARE]))
    return found


def small(folder, **changes):
    """The flags of a training of seconds."""
    flags = {"seed": 0, "steps": 3, "hidden": 32, "layers": 1, "ff": 32, "lr": 3e-3, "muon": 0.02}
    flags |= {"tied": False, "bf16": False, "teacher": False, "compile": False}
    flags |= {"threads": torch.get_num_threads(), "minutes": 0, "checkpoint": folder}
    return argparse.Namespace(**flags | changes)


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


def upstream(path, *items):
    """A file of these items as they are published: BFCL's as lines, Hammer's as one list."""
    text = json.dumps(items) if "query" in items[0] else "\n".join(map(json.dumps, items))
    path.write_text("\ufeff" + text)
    return str(path)


F = {"type": "dict", "properties": {"o": {"type": "dict"}, "z": {"type": "tuple"}}}
BERKELEY = {"id": "a", "question": [[{"role": "user", "content": "q"}]]}
BERKELEY |= {"function": [{"name": "m.f", "parameters": F}]}


def answers(path, **accept):
    return upstream(path, *({"id": i, "ground_truth": [{"m.f": a}]} for i, a in accept.items()))


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


def transcript(turns):
    """A published dialogue, line by line: who speaks, what is said, called and returned."""
    for turn in turns:
        role, text = turn["role"], turn["content"].replace("\nGenerate API Request:", "").strip()
        if role == "assistant":
            yield from (f"call: {ttsi.dumps(call)}" for call in json.loads(text.strip("`")))
        else:
            yield f"{'assistant' if role == 'agent' else role}: {text}"


STAGES = ("prefill", "score", "generate", "train", "answer")
TOLD = ("decision", "answer", "direct", "scores", "drafts", "pairs", "loss", "margin")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The embedded model on six samples of the demo; rows are shared by the tests."""
    args = experiments.parse_arguments(["--rows", str(tmp_path_factory.mktemp("rows"))])
    return experiments.Lab(args, HERE / "demo.jsonl", 6)


def other(lab, **changes):
    """The same lab with other arguments, and none of its rows."""
    args = argparse.Namespace(**vars(lab.args) | changes)
    changed = experiments.Lab(args, lab.data, lab.limit)
    changed.base, changed.samples = lab.base, lab.samples
    return changed


def prepared(lab):
    samples = [*lab.samples.values()][: lab.limit]
    return [ttsi.prepare(lab.base[1], sample, lab.config(0)) for sample in samples]


def flag_of(item):
    key, value = item
    if isinstance(value, bool):
        return f"--{key}" if value else f"--no-{key}"
    return f"--{key.replace('_', '-')} {value}"


def tokens(row):
    """What a row's answer cost, without the direct answer that was made to compare."""
    return sum(row["cost"][stage][1] for stage in STAGES if stage in row["cost"])


def digest(model):
    weights = b"".join(p.numpy().tobytes() for p in model.state_dict().values())
    return hashlib.sha256(weights).hexdigest()


def greedy(model, tok, ids, begun="", most=60):
    """The whole text is read again for each token, until it ends or is a call."""
    new = []
    while len(new) < most and new[-1:] != [tok.eos_token_id]:
        new.append(model(torch.tensor([ids + new])).logits[0, -1].argmax().item())
        with contextlib.suppress(ValueError):
            if "name" in json.loads(begun + tok.decode(new)):
                break
    return begun + tok.decode(new, skip_special_tokens=True)


def call(name, **arguments):
    return json.dumps({"name": name, "arguments": arguments})


F12, F12_AS_TEXT, G12 = call("f", a=12.0), call("f", a=" 12"), call("g", a=12.0)
DRAWN = {  # five sampled answers: who wins the vote, is any right
    "demo-000": (["no call", G12, F12, F12_AS_TEXT, G12], G12, True),  # two each: the first
    "demo-001": (["no call"] * 5, "", False),
    "demo-002": ([F12, F12_AS_TEXT, G12, G12, G12], G12, True),
    "demo-003": ([G12, F12, F12_AS_TEXT, "{", "{}"], F12, True),  # a value is compared as text
}


def naive_ids(tok, x, request):
    system = ttsi.SYSTEM + "\n".join(ttsi.dumps(tool) for tool in x.tools)
    turns = [{"role": "system", "content": system}, {"role": "user", "content": request}]
    how = {"add_generation_prompt": True, "return_dict": True}
    return tok.apply_chat_template(turns, **how).input_ids


def scored(*calls, decision="adapted"):
    """Rows of (direct right?, answer right?)"""
    rows = []
    for i, (direct, answer) in enumerate(calls):
        right = [{"name": True, "call": bool(c)} for c in (direct, answer)]
        scores = {"direct": right[0], "answer": right[1], "first": i == 0}
        cost = {"answer": [2.0, 30], "direct": [1.0, 10]}
        row = {"id": str(i), "margin": i / 9, "logp": {"f": 0.0, "g": 0.0}, "drafts": []}
        row["tools"] = str(i)
        row["faults"] = {"direct": "" if direct else "x", "answer": "" if answer else "x"}
        rows.append(row | {"decision": decision, "scores": scores, "cost": cost})
    return rows


RESULTS = HERE / "results" / "README.md"
KEPT_ROWS = [
    path.with_suffix("") for path in sorted((HERE / "results" / "rows").glob("*/*-0-*.jsonl.gz"))
]


# -------------------------------------------------------------------------------- the world
def test_the_splits_are_what_the_generator_writes():
    for split, n in world.FILES.items():
        drawn = list(world.records(split, n, 1, 0))
        assert read(HERE / f"{split}.jsonl") == drawn, f"{split}.jsonl: world and splits are frozen"


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
    r, same = random.Random(0), 0
    for _ in range(1000):
        tools = world.offer(r, "train", 4)
        seed, call, _ = world.draft_triple(r, tools)
        names = [t["function"]["name"] for t in tools]
        verbs = [sum(world.VERBS[name.split("_")[0]], []) for name in names]
        said = [any(re.search(rf"\b{w}\b", seed) for w in wordings) for wordings in verbs]
        same += call["name"] == names[said.index(True)]
    assert abs(same / 1000 - 0.25) < 0.05, "not one of four by chance (3.6 standard deviations)"


def test_no_tool_of_one_split_is_in_another():
    for split, n in (("dev", 200), ("demo", 100), ("test", 500)):
        records = read(HERE / f"{split}.jsonl")
        offered = {t["function"]["name"] for r in records for t in r["tools"]}
        others = {"_".join(t) for s, tools in world.TOOLS.items() if s != split for t in tools}
        assert len(records) == n, f"{split}.jsonl has another size"
        assert not offered & others, f"{split}: {offered & others} belong to other splits"


def test_the_model_learns_the_very_prompts_of_the_method(tok):
    """Prompts in training are those of ttsi.py, in the tokens of the shipped model."""
    r, built = random.Random(0), world.build_tokenizer()
    for record in world.records("dev", 20, 1, 7):
        sample = ttsi.to_sample(record)
        x = ttsi.prepare(tok, sample, ttsi.Config(shuffle=False))
        head, rest = world.prompts(built, record["tools"], x.request)
        tokens = [built(part, add_special_tokens=False).input_ids for part in (head, rest)]
        assert sum(tokens, []) == x.ids, "training reads another prompt"
        between = tok.decode(x.ids[len(tokens[0]) : x.head])
        assert between == "<|user|>", "the tools end elsewhere"
        seed, call, request = world.draft_triple(r, record["tools"])
        x.asked = [seed]  # nothing but a copy of it would be refused
        draft = ttsi.judge(world.draft_text(call, request), [], x, ttsi.Config())
        assert draft["verdict"] == "kept", f"{draft}: it learns what fails the checks"


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
        sample = ttsi.to_sample(record)
        prompt, _ = ttsi.render(tok, ttsi.Config(), sample["tools"], sample["messages"])
        assert prompt.endswith("}<user>" + request), f"{record['id']}: not one user message"


@beside
@pytest.mark.parametrize("name", UPSTREAM)
def test_the_table_of_benchmarks_is_what_the_converter_counts(name):
    records, items, *_ = convert.convert(str(BENCHMARKS / name))
    n = sorted(len(r["tools"]) for r in records)
    first = sum(r["tools"][0]["function"]["name"] == r["call"]["name"] for r in records)
    cells = [f"`{Path(name).name}`", items, len(n), f"{n[0]}/{n[(len(n) - 1) // 2]}/{n[-1]}"]
    cells += [sum(k == 1 for k in n), f"{100 * first / len(n):.1f}"]
    row = "| " + " | ".join(map(str, cells)) + " |"
    assert row in (HERE / "README.md").read_text(), f"data/README.md lacks {row}"
    counted = (cells[3], cells[4], cells[5])
    assert convert.shape(records) == counted, "the converter counts otherwise"


# ---------------------------------------------------------------------------- checks of drafts
def test_checks_and_choose_take_labelled_samples(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ttsi, "pair_span", ttsi.pair_span)  # `checks.main` replaces it
    tools, file = [{"name": "f", "parameters": {"type": "object"}}], tmp_path / "some.jsonl"
    bare = {"messages": [{"role": "user", "content": "Do it."}], "tools": tools}
    label = {"call": {"name": "f", "arguments": {}}}
    file.write_text("\n".join(map(json.dumps, (bare, bare | label, bare | label))))
    checks.main([str(file)])
    assert "2 labelled samples" in capsys.readouterr().out, "one has no label"
    with pytest.raises(ttsi.InputError, match="without a label"):
        choose.main(["--data", str(file)])
    with pytest.raises(ttsi.InputError, match="needs --model and --data"):
        choose.main(["two"])


CHECKED = ["bfcl/canonical_multiple", "bfcl/canonical_live_simple"]


@beside
@pytest.mark.parametrize("name", [*CHECKED, "seal-tools/canonical_dev_200"])
def test_checks_refuse_few_right_pairs_and_hardly_a_spoiled_one_is_kept(name, monkeypatch):
    monkeypatch.setattr(ttsi, "pair_span", lambda x, pair: None)
    samples = ttsi.read_jsonl(str(BENCHMARKS / f"{name}.jsonl"), ttsi.to_sample)
    found = checks.verdicts(list(samples.values()))
    right, bad = found.pop("right"), sum(found.values(), Counter())
    refused = right.total() - right["kept"] - right[ttsi.UNSAID]
    assert refused < 0.1 * right.total(), f"{right}: right pairs are refused"
    assert bad["kept"] <= 0.1 * bad.total(), f"{found}: spoiled pairs are kept"
    assert len(found) >= 3, "not every way of spoiling"


# -------------------------------------------------------------------------- the experiments
def test_gating_afterwards_equals_a_gated_run(lab):
    both, run = experiments.tt_si(lab, 0, "--tau 2"), experiments.tt_si(lab, 0)
    assert {r["decision"] for r in run} == {"certain", "adapted"}, "choose other samples"
    for a, b in zip(experiments.uncertain(both), run, strict=True):
        for key in TOLD:
            assert a[key] == b[key], f"{a['id']}: another {key}"
        assert tokens(a) == tokens(b), f"{a['id']}: gating afterwards costs otherwise"


def test_the_certain_are_the_complement_of_the_uncertain(lab):
    both = experiments.tt_si(lab, 0, "--tau 2")
    low, high = experiments.uncertain(both), experiments.certain(both)
    for row, a, b in zip(both, low, high, strict=True):
        adapted, not_adapted = (a, b) if row["margin"] < 0.95 else (b, a)
        assert adapted == row, f"{row['id']}: who is adapted is answered otherwise"
        assert not_adapted["answer"] == row["direct"], f"{row['id']}: not the direct answer"
        assert not_adapted["scores"]["answer"] == row["scores"]["direct"], "other scores"
        assert not_adapted["decision"] == "certain" and not not_adapted["pairs"], "it is adapted"


def test_every_tau_equals_gated_runs_and_their_complements(lab):
    both, wrong = experiments.tt_si(lab, 0, "--tau 2"), {"name": False, "call": False}
    both[1] = both[1] | {"margin": None, "cost": {}, "decision": "not answered: too long"}
    both[1]["scores"] = {"direct": wrong, "answer": wrong, "first": False}
    listed = figures.every_tau(both)
    for tau in (0.0, 0.3, 0.7, 0.95, 0.999, 1.5):
        e = next(e for e in listed if e["tau"] >= tau)
        below, above = (f(both, tau) for f in (experiments.uncertain, experiments.certain))
        n = sum(r["decision"] == "adapted" and (r["margin"] or 0) < tau for r in below)
        told = [ttsi.summarise(rows) for rows in (below, above)]
        gains = [s["TT-SI"]["call"] - s["direct"]["call"] for s in told]
        assert e["adapted"] == 100 * n / len(both), f"tau {tau}: another share is adapted"
        assert e["gain"] == pytest.approx(gains[0]), f"tau {tau}: another gain"
        assert e["certain_only"] == pytest.approx(gains[1]), f"tau {tau}: another control"
    assert figures.every_tau([]) == [], "without rows there is no tau"
    assert listed[-1]["adapted"] >= 400 / len(both), "choose other samples"


def test_votes_and_pass_at_n_by_hand(lab, monkeypatch):
    label, drawn = {"call": {"name": "f", "arguments": {"a": 12}}}, []
    for i, (texts, _, _) in DRAWN.items():
        grades = [ttsi.grade(text, label) for text in texts]
        drawn.append({"id": i, "texts": texts, "grades": grades, "votes": [2.0, 30]})
    unanswered = [{"id": "demo-004"}, {"id": "demo-005"}]
    monkeypatch.setattr(experiments, "sampled", lambda *_: drawn + unanswered)
    votes, best = (f(lab, 0, 5, 1.0) for f in (experiments.majority, experiments.any_of))
    assert votes[4:] == experiments.tt_si(lab, 0, "--tau 2")[4:], "without votes a row changed"
    for row, chosen, (_, winner, right) in zip(votes, best, DRAWN.values(), strict=False):
        assert row["answer"] == winner, f"{row['id']}: another answer wins the vote"
        assert row["scores"]["answer"]["call"] == (winner == F12), f"{row['id']}: graded wrong"
        assert chosen["scores"]["answer"]["call"] == right, f"{row['id']}: pass@5 is wrong"
        assert row["cost"]["answer"] == [2.0, 30], f"{row['id']}: the votes cost otherwise"
        assert set(row["cost"]) == {"prefill", "answer", "direct"}, "the prompt is read, too"
    texts = experiments.distinct([F12, G12, F12_AS_TEXT, "x", "x"])
    assert texts == [F12, G12, "x"], "one text of each call, in order"


def test_sampled_answers_become_the_direct_one_without_temperature(lab):
    drawn = experiments.sampled(lab, 0, "--temperature 1e-4", 5)
    for vote, row in zip(drawn, experiments.tt_si(lab, 0, "--tau 2"), strict=True):
        assert vote["texts"] == [row["direct"]] * 5, f"{row['id']}: a sampled answer differs"
        assert vote["grades"] == [row["scores"]["direct"]] * 5, f"{row['id']}: graded otherwise"


@slow
def test_certainties_by_answers_are_those_of_whole_texts(lab):
    """1 / perplexity of the direct answer, and the margin of the distinct calls."""
    (model, tok), how, several = lab.base, ("--temperature 1.5", 5), 0
    drawn = experiments.sampled(lab, 0, *how)
    rows, found = experiments.tt_si(lab, 0, "--tau 2"), experiments.certainties(lab, 0, *how)
    for x, row, vote, told in zip(prepared(lab), rows, drawn, found, strict=True):
        texts = experiments.distinct([row["direct"], *vote["texts"]])
        new = [tok(t + tok.eos_token, add_special_tokens=False).input_ids for t in texts]
        total = []
        for ids in new:
            logp = model(torch.tensor([x.ids + ids])).logits[0].log_softmax(-1)
            total.append(sum(logp[len(x.ids) + i - 1, t].item() for i, t in enumerate(ids)))
        p = sorted((math.exp(t) / sum(map(math.exp, total)) for t in total), reverse=True)
        want = [math.exp(total[0] / len(new[0])), p[0] - sum(p[1:2])]
        assert [told["1 / perplexity"], told["calls"]] == pytest.approx(want, rel=1e-3), (
            f"{x.id}: others"
        )
        several += len(texts) > 1
    assert several, "choose other samples"


@slow
def test_mean_normalised_margins_by_hand(lab):
    """Here each name is a verb, an object and a closing quote: three tokens."""
    how = (experiments.certainties, "--temperature 1.5", 5)
    judged, rows = experiments.judged(lab, 0, "mean", *how), experiments.tt_si(lab, 0, "--tau 2")
    for after, row in zip(judged, rows, strict=True):
        odds = sorted((math.exp(logp / 3) for logp in row["logp"].values()), reverse=True)
        margin = (odds[0] - odds[1]) / sum(odds)
        assert after["margin"] == pytest.approx(margin, abs=1e-3), f"{row['id']}: another mean"
        assert after | {"margin": 0} == row | {"margin": 0}, f"{row['id']}: more has changed"


@slow
def test_one_adapter_for_all_starts_as_the_base_and_learns(lab):
    untouched, direct = digest(lab.base[0]), experiments.tt_si(lab, 0, "--tau 2")
    still, trained = (experiments.sft(lab, 0, "", "shifted", 4, lr) for lr in (0.0, 1e-2))
    answers = [[r["answer"] for r in rows] for rows in (still, trained)]
    assert answers[0] == [r["direct"] for r in direct], "what learned nothing answers otherwise"
    assert answers[0] != answers[1], "nothing was learned"
    once = trained[0]["once"]
    assert once["labels"] == 4 and once["tokens"] > 10 * 2 * 4 * 100, "ten epochs, two passes"
    assert digest(lab.base[0]) == untouched, "the base weights were written"


@slow
def test_a_step_of_fine_tuning_is_that_of_the_mean_loss(lab, monkeypatch):
    """Samples are read in parts; the gradient is that of all in one padded batch."""
    seen, grad, items = [], torch.autograd.grad, experiments.labelled(lab, "shifted", 16)
    cfg, (model, tok) = lab.config(0, "--adapt full"), lab.base
    monkeypatch.setattr(torch.autograd, "grad", lambda *how: seen.append(grad(*how)) or seen[-1])
    experiments.fine_tuned.__wrapped__(lab, 0, "shifted", 16, 0.0)
    with ttsi.temporary_lora(model, cfg, ttsi.draw(0, "sft", "adapter")) as lora:
        spans = [experiments.label_span(tok, item, cfg) for item in items]
        lengths = torch.tensor([len(ids) - begin for ids, begin in spans])
        loss = -(ttsi.logprob(spans, ttsi.Prefix(model, [])) / lengths).mean()
        first = seen[: len(seen) // 10]  # ten steps, of 16 samples each
        for p, *parts in zip(grad(loss, lora), *first, strict=True):
            assert torch.allclose(p, sum(parts), atol=1e-6), "another gradient"


@slow
def test_round_trips_part_the_drafts(lab):
    (model, tok), cfg, found = lab.base, lab.config(0), []
    for x, row in zip(prepared(lab), experiments.tt_si(lab, 0, "--tau 2"), strict=True):
        halves = []
        for agree in (True, False):
            half, _ = experiments.answered_alike(lab, cfg, row, x, agree)
            halves.append([{k: pair[k] for k in ("request", "call")} for pair in half])
            for pair in halves[-1]:
                question = [{"role": "user", "content": pair["request"]}]
                sample = lab.samples[x.id] | {"messages": question}
                result = ttsi.tt_si(model, tok, sample, ttsi.Config(tau=0.0))
                answered = ttsi.parse(result.answer)[0] == pair["call"]
                assert answered == agree, f"{row['id']}: {pair} is in the wrong half"
        passed = [d["pair"] for d in row["drafts"] if d["pair"]]
        both = sorted(map(json.dumps, halves[0] + halves[1]))
        assert both == sorted(map(json.dumps, passed)), f"{row['id']}: a draft in both or none"
        found.append(halves)
    assert any(alike for alike, _ in found), "choose other samples"


def test_a_random_subset_is_as_large_as_the_uncertain(lab):
    n = sum(r["margin"] < 0.95 for r in experiments.tt_si(lab, 0, "--tau 2"))
    chosen = sum("generate" in r["cost"] for r in experiments.a_random_subset(lab, 0))
    assert 0 < chosen == n < 6, f"{chosen} are adapted, {n} are uncertain"


@slow
def test_tau_by_budget_is_a_quantile_of_other_margins(lab, tmp_path, monkeypatch):
    lines = (HERE / "dev.jsonl").read_text().splitlines(keepends=True)[:12]
    (tmp_path / "dev.jsonl").write_text("".join(lines))
    monkeypatch.setattr(experiments, "HERE", tmp_path)
    dev = experiments.tt_si(experiments.Lab(lab.args, tmp_path / "dev.jsonl"), 0, "--tau 0")
    margins = sorted(r["margin"] for r in dev)
    assert len(margins) == 12, "other samples were scored"
    for share in (0, 1 / 3, 3 / 4):
        tau = margins[int(12 * share)]
        below = [r["margin"] < tau for r in experiments.tt_si(lab, 0, "--tau 2")]
        rows = experiments.within_budget(lab, 0, share)
        chosen = ["generate" in r["cost"] for r in rows]
        assert chosen == below, f"share {share}: others are adapted"


@slow
def test_given_pairs_are_trained_on_whoever_they_are_of(lab, monkeypatch):
    """The upper bound on its own label, the control on the next item's pairs, with its tools."""
    given, ours = [], ttsi.tt_si
    rows, samples = experiments.tt_si(lab, 0, "--tau 2"), [*lab.samples.values()]

    def seen(*how):
        given.append(ours(*how).pairs)
        return ours(*how)

    monkeypatch.setattr(ttsi, "tt_si", seen)
    for source in ("itself", "another's"):
        given.clear()
        out = experiments.on_pairs(lab, 0, "--tau 2 --epochs 1", source)
        for i, (pairs, row) in enumerate(zip(given, out, strict=True)):
            after = (i + 1) % 6
            whose = samples[i if source == "itself" else after]
            request = whose["messages"][0]["content"]
            own = [{"request": request, "call": whose["call"], "sample": whose}]
            other_pairs = [pair | {"sample": whose} for pair in rows[after]["pairs"]]
            want = own if source == "itself" else other_pairs
            assert pairs == want, f"{row['id']}: trained on something else"
            assert not row["pairs"], "a label is kept"
    generate = rows[1]["cost"]["generate"]
    assert out[0]["cost"]["generate"] == generate, "writing them has another cost"


@slow
def test_given_pairs_train_as_written_ones(lab):
    """Its own pairs, read one by one: the answers of the run that wrote them."""
    rows = experiments.tt_si(lab, 0, "--tau 2")
    for a, b in zip(experiments.on_pairs(lab, 0, "--tau 2", "its own"), rows, strict=True):
        assert a["answer"] == b["answer"] and a["decision"] == b["decision"], f"{a['id']}: others"
        assert a["cost"]["generate"] == b["cost"]["generate"], "writing them has another cost"
        assert 0 < a["cost"]["train"][1] <= b["cost"]["train"][1], "read one by one: no padding"
    assert ttsi.logprob.__module__ == "ttsi", "a patch outlived its run"


@slow
def test_doses_are_nested(lab):
    rows = {share: experiments.dose(lab, 0, share) for share in (0, 50, 100)}

    def same(a, b):
        return sum(x == y for x, y in zip(rows[a], rows[b], strict=True))

    assert rows[100] == experiments.tt_si(lab, 0, "--tau 2"), "all shifted is not the run itself"
    assert (same(50, 100), same(0, 50), same(0, 100)) == (3, 3, 0), "not nested by half"
    assert all(r["scores"]["direct"]["call"] for r in rows[0]), "an unshifted item is wrong"


def test_the_nearest_pair_gives_its_tool_and_trains_nothing(lab):
    (model, tok), before = lab.base, experiments.tt_si(lab, 0, "--tau 2")
    for row, was, x in zip(experiments.nearest(lab, 0), before, prepared(lab), strict=True):
        said = [set(ttsi.words(pair["request"])) for pair in was["pairs"]]
        asked = set(ttsi.words(x.request))
        begun = row["answer"].partition(', "arguments"')[0] + ', "arguments"'
        ids = x.ids + tok(begun, add_special_tokens=False).input_ids
        assert row["answer"] == greedy(model, tok, ids, begun), f"{row['id']}: another answer"
        names = [pair["call"]["name"] for pair in was["pairs"]]
        used = said[names.index(json.loads(begun[:-13] + "}")["name"])]
        only = [asked & words - set.intersection(*said) for words in said]  # what tells them apart
        if all(not part for part in only if part is not only[said.index(used)]):
            assert only[said.index(used)] or used == said[0], f"{row['id']}: not the nearest"
        assert "train" not in row["cost"], f"{row['id']}: something was trained"
        assert row["cost"]["generate"] == was["cost"]["generate"], "the pairs cost nothing"


def test_icl_shows_the_pairs_as_earlier_calls_and_trains_nothing(lab):
    (model, tok), untouched = lab.base, digest(lab.base[0])
    rows, before = experiments.shown(lab, 0), experiments.tt_si(lab, 0, "--tau 2")
    for row, was, x in zip(rows, before, prepared(lab), strict=True):
        assert "train" not in row["cost"] and not row["loss"], f"{row['id']}: trained"
        assert row["cost"]["generate"] == was["cost"]["generate"], "the pairs cost nothing"
        told = []
        for pair in was["pairs"]:
            told += [f"user: {pair['request']}", f"call: {json.dumps(pair['call'])}"]
        ids = naive_ids(tok, x, "\n".join([*told, f"user: {x.request}"]))
        text = greedy(model, tok, ids)
        assert row["answer"] == text, f"{row['id']}: {row['answer']} is not {text}"
    assert any(r["answer"] != r["direct"] for r in rows), "the pairs make no difference"
    assert digest(model) == untouched, "the base weights were written"


@slow
def test_pairs_that_exceed_the_context_are_not_shown_and_not_counted(lab, monkeypatch, tmp_path):
    few, before = other(lab, rows=str(tmp_path)), experiments.tt_si(lab, 0, "--tau 2")
    monkeypatch.setattr(experiments, "written", lambda *_: {row["id"]: row for row in before})
    sizes = [len(x.ids) for x in prepared(lab)]
    monkeypatch.setattr(few.base[1], "model_max_length", max(sizes) + 256)
    rows = experiments.shown(few, 0)
    assert [r["answer"] for r in rows if "exceed" in r["decision"]], "choose another limit"
    for row in rows:
        if row["decision"] != "adapted":
            assert row["answer"] == row["direct"], f"{row['id']}: not the direct answer"
    n = sum(r["decision"] == "adapted" for r in rows)
    assert figures.pooled([rows])["adapted"] == n < 6, "others count as adapted"


def test_a_model_that_is_no_folder_is_told_in_one_line():
    with pytest.raises(ttsi.InputError, match="Qwen/Qwen3: not a folder"):
        experiments.parse_arguments(["real", "--model", "Qwen/Qwen3"])


def test_what_is_not_there_is_left_out(lab, tmp_path):
    bare = other(lab, teacher="", kept=True, rows=str(tmp_path))
    for rows in (experiments.as_it_came, experiments.tt_si):
        with pytest.raises(experiments.Skip):
            rows(bare, 0)
    with pytest.raises(experiments.Skip, match="--teacher"):
        experiments.teachers(other(lab, teacher=""), 0)
    with pytest.raises(experiments.Skip, match="--pool"):
        experiments.labelled(other(lab, pool=[]), "pool", 3)
    here = other(lab, pool=[lab.data, str(HERE / "dev.jsonl")]).pool
    assert len(here) == 200, "a sample that is scored would be trained on"


@slow
def test_rows_are_made_once_whatever_stops_their_making(lab, tmp_path, monkeypatch):
    made, whole = [], experiments.tt_si(lab, 0, "--tau 0")

    def stopped(*how):
        made.append(how[2]["id"])
        if len(made) == 4:
            raise KeyboardInterrupt
        return ours(*how)

    ours = ttsi.tt_si
    monkeypatch.setattr(ttsi, "tt_si", stopped)
    with pytest.raises(KeyboardInterrupt):
        experiments.tt_si(other(lab, rows=str(tmp_path)), 0, "--tau 0")
    (file,) = tmp_path.glob("*/*.jsonl")
    with file.open("a") as torn:
        torn.write('{"id": "demo-003", "ma')
    with pytest.raises(experiments.Skip, match="3 rows of 6"):  # no table of a part
        experiments.tt_si(other(lab, rows=str(tmp_path), kept=True), 0, "--tau 0")
    rows = experiments.tt_si(other(lab, rows=str(tmp_path)), 0, "--tau 0")
    assert made[3:] == [made[3], *(r["id"] for r in whole[3:])], "a row was made twice"
    assert [r["answer"] for r in rows] == [r["answer"] for r in whole], "other rows"
    assert [f.name for f in tmp_path.glob("*/*")] == [f"{file.name}.gz"], "not packed"
    more = other(lab, rows=str(tmp_path))
    more.limit = 7
    assert [r["id"] for r in experiments.tt_si(more, 0, "--tau 0")][:6] == [r["id"] for r in whole]
    assert len(made) == 8, "a larger limit made rows again"


def test_rows_of_two_makers_are_packed_together(tmp_path):
    path, head = tmp_path / "x.jsonl", {"method": "m"}
    path.touch()
    experiments.pack(path, [head, {"id": "a"}])
    path.write_text('{"id": "b"}\n{"id": "c')
    assert experiments.read_rows(path) == (head, {"a": {"id": "a"}, "b": {"id": "b"}})
    ttsi.save(path, ['{"method": "another"}', '{"id": "b"}'])
    with pytest.raises(ttsi.InputError, match="several kinds"):
        experiments.read_rows(path)


def test_what_is_wrong_is_told_from_the_label():
    right = {"call": {"name": "f", "arguments": {"a": 1, "b": 2}}}
    told = {call("f", a=1, b="2"): "", "no": "no call", call("g", a=1, b=2): "another tool"}
    told |= {call("f", a=1): "an argument missing", call("f", a=1, b=3): "another value"}
    told[call("f", a=1, b=2, c=3)] = "too many"
    for text, fault in told.items():
        assert experiments.fault_of(text, right) == fault, f"{text}: told otherwise"


def test_where_the_chain_holds_by_hand():
    """Five items: repaired, broken, changed and still wrong, no pair, certain and right. All names
    are right; of 2 x 3 margins, right before wrong, three are equal and three in order."""
    rows = scored((0, 1), (1, 0), (0, 0), (0, 0), (1, 1))
    for i, row in enumerate(rows):
        name = "f" if i else "g"
        row |= {"margin": 0.99 if i == 4 else 0.5, "right": "g", "direct": "d"}
        called = {"name": name, "arguments": {} if i == 1 else {"a": 1}}
        row |= {"answer": "a" if i < 3 else "d", "pairs": [{"call": called}]}
        row["decision"] = "no pair" if i == 3 else "adapted"
    rows[1]["faults"]["answer"] = "an argument missing"
    lines = figures.chains({"here": [rows]}).splitlines()
    bare, other = "with a pair without arguments", "other pairs"
    counted = [f"uncertain, {bare} | 1 | 1 | 1 | 0", f"uncertain, {other} | 0 | 0 | 0 | 0"]
    counted += [f"certain, {bare} | 0 | 0 | 0 | 0", f"certain, {other} | 1 | 0 | 0 | 0"]
    assert lines[-4:] == [f"| here, {cells} |" for cells in counted], "spoiled otherwise"
    line = lines[2]
    want = "| here |  | 0.75 | 4/5, 80 % | 3/4, 75 % | 0/1, 0 % | 3/4, 75 % | 1/3, 33 % |"
    assert line == f"{want} 3/3, 100 % | 1 | 1 |", "counted otherwise"
    rows = scored((0, 1), (0, 1), (1, 0), (1, 0))
    for i, row in enumerate(rows):
        row |= {"margin": 0.99 if i == 3 else 0.5, "right": "g", "pairs": []}
        row |= {"direct": "d", "answer": "a"}
    assert "| here | 2 -> 1 |" in figures.chains({"here": [rows]}), "other faults"


def test_a_row_that_is_not_finite_is_kept():
    sample = {"tools": [{"name": "f"}], "call": {"name": "f", "arguments": {}}}
    row = {"margin": None, "logp": {"f": None}, "cost": {}}
    row |= {"loss": [None, 0.12345], "drafts": []}
    kept = experiments.slim(row, sample)
    assert kept["loss"] == [None, 0.1235] and kept["logp"] == {"f": None}, "another row"


def test_a_kept_row_holds_no_turn_of_the_user():
    turns = [{"role": r, "content": f"pay {r} the rent"} for r in ("user", "assistant")]
    said = ("so: Pay user the RENT", "pay assistant the rent", "pay user")
    drafts = [{"text": text, "verdict": "wrong type", "pair": None} for text in said]
    kept = [experiments.draft_text(draft, {"messages": turns}) for draft in drafts]
    assert kept == ["", *said[1:]], "a benchmark's text is kept, or another is not"


def test_rows_of_other_data_or_weights_are_refused(lab, tmp_path):
    experiments.tt_si(other(lab, rows=str(tmp_path)), 0, "--tau 0")
    changed = tmp_path / "demo.jsonl"
    changed.write_text(Path(lab.data).read_text() + "\n")
    with pytest.raises(ttsi.InputError, match="rows of"):
        elsewhere = other(lab, rows=str(tmp_path))
        elsewhere.data = str(changed)
        experiments.tt_si(elsewhere, 0, "--tau 0")
    folder = shutil.copytree(HERE / "model", tmp_path / "there" / "model")
    with (folder / "tokenizer.json").open("a") as file:
        file.write("\n")
    with pytest.raises(ttsi.InputError, match="rows of"):
        experiments.tt_si(other(lab, model=str(folder), rows=str(tmp_path)), 0, "--tau 0")


def test_two_runs_are_compared_item_by_item(lab):
    ours, theirs = scored((0, 1), (0, 1)), scored((1, 0), (0, 1))[::-1]
    rows = figures.against(ours, theirs)
    told = [[row["scores"][side]["call"] for side in ("direct", "answer")] for row in rows]
    assert told == [[False, True], [True, True]], "not the other run's answers"
    assert ours == scored((0, 1), (0, 1)), "what is compared has changed"
    _, _, line = experiments.versus("x", lambda *_: ours, lambda *_: theirs)
    assert line(lab, 0) == rows, "compared the other way round"


def test_a_seed_is_that_of_its_pairs(lab, tmp_path, monkeypatch):
    seen = []

    def written(lab, seed):
        seen.append(seed)
        return {i: {"id": i, "cost": {}, "direct": ""} for i in lab.samples}

    monkeypatch.setattr(experiments, "written", written)
    experiments.shown(other(lab, rows=str(tmp_path)), 7)
    assert seen == [7] * 6, "pairs of another seed"
    assert lab.config(7).seed == 7, "another seed"


def test_a_group_is_run_on_all_its_files_and_seeds(monkeypatch):
    def rows(lab, seed):
        return [row | {"id": f"{Path(lab.data).stem} {seed}"} for row in scored((0, seed))]

    places = {"p": ["demo"], "q": ["dev", "everyday"]}
    monkeypatch.setitem(experiments.GROUPS, "x", (places, 2, 5, [("label", "how", rows)]))
    monkeypatch.setattr(figures, "in_common", list)
    _, found = experiments.runs_of(experiments.parse_arguments(["x"]), "x")["label"]
    told = {place: [[r["id"] for r in run] for run in runs] for place, runs in found.items()}
    want = {"p": [["demo 0"], ["demo 1"]]}
    want["q"] = [["dev 0", "everyday 0"], ["dev 1", "everyday 1"]]
    assert told == want, "other files or seeds"


def test_who_writes_and_who_answers(lab, tmp_path, monkeypatch):
    given, changes = [], {"rows": str(tmp_path), "base": str(HERE / "teacher")}
    few, theirs = other(lab, **changes), (str(HERE / "teacher"), "tok")
    monkeypatch.setattr(ttsi, "load", lambda name, cfg: (name, "tok"))
    monkeypatch.setattr(ttsi, "tt_si", lambda *how: given.append((how[0], how[5])))
    nothing = {"direct": "", "answer": ""}
    monkeypatch.setattr(ttsi, "to_row", lambda model, tok, s, *_: nothing | {"id": s["id"]})
    for rows in (experiments.tt_si, experiments.teachers, experiments.as_it_came):
        rows(few, 0, "--tau 2")
    own = few.base[0]
    want = [(own, None), (own, theirs), (theirs[0], None)]
    assert given == [who for who in want for _ in range(6)], "another writes, or answers"


def test_items_of_one_list_of_tools_are_kept_together():
    rows = scored((0, 1), (1, 1), (1, 0), (0, 1))
    for row in rows[:3]:
        row["tools"] = "0"
    assert figures.changes([rows], "call") == {"0": [100, 0, -100], "3": [100]}
    f, g, label = {"name": "f"}, {"name": "g"}, {"name": "f", "arguments": {}}
    row, offers = {"direct": call("g"), "answer": call("f")}, ([f, g], [g, f], [f])
    one, same, less = (experiments.slim(row, {"tools": t, "call": label}) for t in offers)
    assert one == same and one["tools"] != less["tools"], "not known by its names"
    assert (one["offered"], less["offered"], one["right"]) == (2, 1, "f"), "told otherwise"
    assert one["faults"] == {"direct": "another tool", "answer": ""}, "other faults"
    rows[0]["offered"], rows[1]["offered"] = 1, 2
    assert figures.several_tools({"p": [rows[:2]]}) == {"p": [rows[1:2]]}, "one tool is several"


def test_a_printed_line_by_hand(monkeypatch):
    even, ends = torch.linspace(0, 100, 1001).double(), "[+2.5, +97.5]"
    monkeypatch.setattr(figures, "resampled", lambda *_: even)
    rows = scored((0, 1), (1, 0), (0, 1), (1, 1), (0, 0))
    for row, name in zip(rows, (0, 1, 0, 1, 1), strict=True):
        row["scores"]["direct"]["name"] = bool(name)
        row["drafts"] = [{"verdict": v} for v in ("kept", "kept", "other")]
    r = figures.pooled([rows])
    assert r["auroc"] == pytest.approx({"name": 5 / 6, "call": 1 / 2}), "of other answers"
    want = f"| x | b | 60.0 -> 100.0 | 40.0 -> 60.0 | +40.0 {ends} | +20.0 {ends} | 2 / 1 | 5 |"
    line = figures.markdown({"x": {"here": r | {"by": "b"}}}).splitlines()[2]
    assert line == f"{want}  | 5/5 | 67 % | 2 s, 2.0x | 3.0x |  |"
    assert figures.difference(figures.mean_of([[rows], [rows]])) == f"+20.0 {ends}"


def test_votes_are_several_and_drawn_as_told(lab, monkeypatch):
    drawn, told = experiments.sampled(lab, 0, "--temperature 1.5", 5), []
    assert any(len(set(vote["texts"])) > 1 for vote in drawn), "one draw, five times"
    monkeypatch.setattr(experiments, "tt_si", lambda *_: [{}] * 6)
    monkeypatch.setattr(experiments, "sampled", lambda lab, *how: told.append(how) or [{}] * 6)
    experiments.majority(lab, 3, 5, 1.5)
    assert told == [(3, "--temperature 1.5", 5)], "drawn otherwise"


@slow
def test_fine_tuning_takes_each_step_afresh_along_a_cosine(lab, monkeypatch):
    seen = []

    class Seen(torch.optim.AdamW):  # takes no step: each gradient is the first one
        def step(self, closure=None):
            (group,) = self.param_groups
            seen.append((group["lr"], sum(p.grad.abs().sum().item() for p in group["params"])))

    monkeypatch.setattr(torch.optim, "AdamW", Seen)
    experiments.fine_tuned.__wrapped__(lab, 0, "shifted", 16, 1.0)
    rates = [(1 + math.cos(math.pi * i / 10)) / 2 for i in range(10)]
    assert seen == [pytest.approx((rate, seen[0][1]), rel=1e-3) for rate in rates]


@pytest.mark.parametrize("kind", ["shifted", "plain"])
def test_labels_are_with_the_shift_or_without(lab, kind):
    items = experiments.labelled(lab, kind, 40)
    rarely = [rare(item["messages"][0]["content"], item["call"])[0] for item in items]
    assert rarely == [kind == "shifted"] * 40, "the other kind"


def test_rows_beyond_the_limit_stay_in_the_files_order(lab, tmp_path):
    def make(lab, cfg, sample):
        made.append(sample["id"])
        return {"id": sample["id"]}

    made, few = [], other(lab, rows=str(tmp_path))
    whole, (packed,) = few.rows(make, 0), tmp_path.glob("*/*.gz")
    head, rows = experiments.read_rows(packed.with_suffix(""))
    packed.unlink()
    ttsi.save(packed.with_suffix(""), map(ttsi.dumps, [head, *[*rows.values()][::-1]]))
    for limit in (4, 6):
        few.limit, few.found = limit, {}
        assert few.rows(make, 0) == whole[:limit], "not in the file's order"
    assert len(made) == 6, "rows beyond the limit were lost"


@slow
def test_each_uncertainty_has_values_of_its_own(lab):
    rows = [rows(lab, 0) for *_, rows in experiments.UNCERTAINTY]
    assert len({tuple(r["margin"] for r in each) for each in rows}) == 4, "one is another"
    assert experiments.at_tau(0.0)[2](lab, 0) == experiments.uncertain(rows[0], 0.0), "another tau"


def test_the_least_certain_are_adapted():
    rows = scored((0, 1), (0, 1), (0, 1), (1, 1), (1, 0))
    for row in rows:
        row["direct"] = ""
    r = figures.ranked([rows[::-1]])
    assert (r["answer"]["call"], r["adapted"]) == (100, 3), "others are adapted"


def test_statistics_of_the_tables():
    r, values = random.Random(0), [i // 3 / 9 for i in range(30)]
    right = [r.random() < 0.5 for _ in values]
    high = [v for v, good in zip(values, right, strict=True) if good]
    low = [v for v, good in zip(values, right, strict=True) if not good]
    pairs = [(a > b) + (a == b) / 2 for a in high for b in low]
    area = pytest.approx(sum(pairs) / len(pairs))
    assert figures.auroc(values, right) == area, "AUROC: not that of all pairs"
    four = figures.auroc([0.9, 0.5, 0.5, 0.1], [1, 1, 0, 0])
    assert four == (1 + 1 + 0.5 + 1) / 4, "AUROC: ties count half"
    assert figures.auroc([1], [1]) is None, "AUROC: of right ones alone there is none"
    assert figures.auroc([1.0, 1 - 1e-9], [1, 0]) == 1, "AUROC: margins near 1 are not equal"


def test_the_bootstrap_draws_whole_lists_of_tools():
    """Closed form: the variance of a mean of n lists drawn from n, of equal size."""
    lists = {"a": [100, 100], "b": [0, 0], "c": [0, -100], "d": [100, 0]}
    means = torch.tensor([100.0, 0.0, -50.0, 50.0]).double()
    drawn = figures.resampled(lists)
    assert drawn.mean().item() == pytest.approx(25, abs=1), "another mean"
    want = means.var(correction=0).item() / 4
    assert drawn.var().item() == pytest.approx(want, rel=0.05), "items are drawn, not lists"
    alone = figures.resampled({"a": [100, 0, 0]})
    assert torch.allclose(alone, torch.tensor(100 / 3).double()), "one list has no other"


def test_a_line_of_a_table_by_hand():
    """Four items, two seeds: the first gains twice, the second loses once, the third gains once
    and loses once."""
    one = scored((0, 1), (1, 0), (0, 1), (1, 1))
    two = scored((0, 1), (1, 1), (1, 0), (1, 1), decision="certain")
    r = figures.pooled([one, two])
    assert (r["seeds"], r["n"], r["adapted"]) == (2, 4, 2), "other items, or seeds"
    assert r["direct"]["call"] == (50 + 75) / 2, "direct: not the mean of both seeds"
    assert r["answer"]["call"] == (75 + 75) / 2, "TT-SI: not the mean of both seeds"
    points = r["call difference"]["points"]
    assert points == (25 + 0) / 2, "difference: not the mean of both seeds"
    assert r["sd"] == pytest.approx(25 / 2**0.5), "not the deviation between seeds"
    assert (r["better"], r["worse"], r["lists"]) == (1, 1, 4), "items counted otherwise"
    assert ttsi.Config.tau == figures.TAU, "the tables are of another tau"
    assert (r["tokens ratio"], r["seconds ratio"]) == (3, 2), "not multiples of direct answers"
    assert r["always first"] == 25, "always the first tool: one of four"
    low, high = r["call difference"]["interval"]
    assert -50 < low < points < high < 100, "the interval lies elsewhere"
    both = figures.mean_of([[one], [scored((0, 1))]])
    assert both["call difference"]["points"] == (25 + 100) / 2, "places do not weigh the same"
    assert both["n"] == 5 and both["better"] == 3, "items of both are not counted"


@slow
def test_where_only_the_uncertain_count_no_other_is_trained_for(lab, monkeypatch, tmp_path):
    rows, trained, ours = experiments.tt_si(lab, 0, "--tau 2"), [], ttsi.train
    monkeypatch.setattr(experiments, "written", lambda *_: {row["id"]: row for row in rows})
    monkeypatch.setattr(ttsi, "train", lambda *how: trained.append(1) or ours(*how))
    experiments.FULL(other(lab, rows=str(tmp_path)), 0)
    adapted = [row for row in figures.uncertain(rows) if row["decision"] == "adapted"]
    assert 0 < len(trained) == len(adapted) < 6, f"{len(trained)} trained for, not {len(adapted)}"


# ------------------------------------------------------------------------------------- figures
def test_a_forest_has_the_mean_first_and_no_comparison_of_two_methods():
    r = figures.pooled([scored((0, 1), (1, 1))])
    found = {"TT-SI": {"here": r, "mean": r}, "a against b": {"here": r}, "all": {"here": r}}
    lines = figures.forest_lines("real-controls", found)
    mean, here = "Mean of the benchmarks, controls: 2 items", "here, controls: 2 items"
    assert [label for label, _ in lines] == [mean, "TT-SI", here, "TT-SI", "all"]
    lines = figures.forest_lines("real", found, ("all",))
    assert [label for label, _ in lines] == ["here: 2 items", "all"], "lines that nobody asked for"
    drawing, (low, high) = figures.forest(lines), r["call difference"]["interval"]
    assert figures.difference(r) in drawing, "a line without its numbers"
    scale = 190 / 100  # from 0 to +100
    low, at, high = (f"{16 + scale * v:.1f}" for v in (low, 50, high))
    assert f'cx="{at}"' in drawing, "the point lies elsewhere"
    bar = rf'points="{low},(\S+) {high},(\S+)" fill="none" stroke="{figures.GREY}"'
    ends = re.search(bar, drawing)
    assert ends and ends[1] == ends[2], "the interval lies elsewhere"


def test_a_figure_waits_until_all_its_groups_are_asked_for():
    r = figures.pooled([scored((0, 1), (1, 1))])
    found = {"real": {"TT-SI": {"Seal-Tools": r}}}
    assert experiments.drawn({}, found) == {}, "half a forest would replace a whole one"
    drawn = experiments.drawn({}, found | {"real-controls": found["real"]})
    assert [*drawn] == ["real.svg"] and drawn["real.svg"].count(">TT-SI<") == 1, "TT-SI twice"


def test_the_share_adapted_over_tau_by_hand():
    """At margins 0, 1/9, 2/9, 3/9; the second is not adapted: three of four in the end."""
    rows = scored((0, 1), (1, 1), (0, 0), (0, 1))
    rows[1]["decision"] = "no pair"
    curve = re.findall(r'points="([^"]+)"', figures.tau_figure([rows]))[-1].split()
    heights = [float(point.split(",")[1]) for point in curve]
    assert heights[0] == 310 + 110, "at tau 0 somebody is adapted"
    assert heights[-1] == pytest.approx(310 + 110 / 4, abs=0.1), "another share"
    assert heights == sorted(heights, reverse=True), "the share falls somewhere"
    two = re.findall(r'points="([^"]+)"', figures.tau_figure([rows, scored((0, 1))]))[-1].split()
    assert float(two[-1].split(",")[1]) == pytest.approx(310 + 110 / 8, abs=0.1), "not of places"


# --------------------------------------------------------------------------- what is published
def test_the_tables_and_figures_are_those_of_the_rows(capsys):
    """Of all rows that are here, without a model."""
    text, shown = RESULTS.read_text(), 0
    for groups in (["real"], ["tune-real"], [], ["tune"]):
        args = experiments.parse_arguments([*groups, "--kept"])
        hint = f"run `python data/experiments.py {' '.join([*groups, '--kept'])}`"
        for name, made in experiments.made_of_rows(args):
            if name.endswith(".svg"):
                assert (HERE / "results" / name).read_text() == made, f"{name}: {hint}"
            else:
                there = re.search(f"<!-- table {name} -->\n(.*?)<!-- end -->", text, re.S)
                assert there and there[1] == made, f"{name}: another table: {hint}"
                shown += "|" in made
    assert shown or not KEPT_ROWS, "there are rows, and no table"


def test_what_the_results_tell_in_words_stands_in_a_table():
    lines = RESULTS.read_text().splitlines()
    tables = "\n".join(line for line in lines if line.startswith("|"))
    words = " ".join(line for line in lines if not line.startswith("|"))
    told = re.findall(r"[+-]\d+\.\d \[.*?\]", words)
    assert len(told) > 5 and not [gain for gain in told if gain not in tables]


def numbers_at(place, group):
    """-> {label: numbers} of kept rows."""
    args = experiments.parse_arguments([group, "--kept"])
    found = experiments.numbers(group, experiments.runs_of(args, group))
    return {label: places[place] for label, places in found.items()}


def test_what_the_readme_tells_of_rivals_is_of_the_rows():
    said, gain = (HERE.parent / "README.md").read_text(), figures.difference
    one_line, real = " ".join(said.split()), numbers_at("Seal-Tools", "real-controls")
    points, tokens = real["TT-SI"]["call difference"]["points"], real["TT-SI"]["tokens ratio"]
    assert f"instead of TT-SI: {points:+.1f} for {tokens:.1f} times the tokens" in one_line
    rivals = {"another item's pairs": experiments.ANOTHERS, "TT-ICL": experiments.ICL}
    rivals |= {"the nearest pair's tool": experiments.NEAREST, "SFT": experiments.REAL_SFT}
    rivals["TTT-NN"] = experiments.TTT_NN
    rivals["the vote"] = [f"majority vote over {experiments.REAL_VOTES} sampled calls"]
    for name, (label, *_) in rivals.items():
        r, against = real[label], real[f"TT-SI against {name}"]
        cells = f"{gain(r)} | {gain(against)} | {r['tokens ratio']:.1f}x"
        assert f"| {cells} |" in said, f"{name}: README lacks {cells}"
    came = gain(real["TT-SI, the model as it came"])
    assert f"As it came it gains {came} on Seal-Tools, from no right call" in one_line
    own = numbers_at("own world", "main")
    against = own["TT-SI against the nearest pair's tool"]
    told = f"{gain(own[experiments.NEAREST[0]])} (TT-SI against it {gain(against)}, `main --kept`)"
    assert f"nearest pair's tool gains {told}" in one_line
    own = numbers_at("own world", "baselines")
    sft, against = own[experiments.SMALL_SFT[0]], own["TT-SI against SFT on 100 shifted items"]
    told = f"gain {gain(sft)}, 250 items (TT-SI against them {gain(against)}), pairs in the prompt"
    assert f"{told} {gain(own[experiments.ICL[0]])} (`baselines --kept`)" in one_line


def test_the_headline_is_of_the_rows(capsys):
    """The lines of the real model, and the statement on free drafts."""
    said = (HERE.parent / "README.md").read_text()
    args = experiments.parse_arguments(["real", "--kept"])
    runs = experiments.runs_of(args, "real")
    numbers = experiments.numbers("real", runs)
    found, paper = numbers["TT-SI"], numbers[experiments.PAPER[0]]["mean"]
    one_line = " ".join(said.split())
    told = f"{paper['better']} items repaired, {paper['worse']} broken"
    assert (
        f"`--paper` hardly moves this model: mean {figures.difference(paper)}, {told}" in one_line
    )
    seeds = numbers_at("Seal-Tools", "real-seeds")["TT-SI"]
    told = f"{figures.difference(seeds)}, with a standard deviation of {seeds['sd']:.1f}"
    assert f"Over three seeds Seal-Tools gains {told} between them" in one_line
    found["own world"] = numbers_at("own world", "main")["TT-SI"]
    for place, r in found.items():
        line = (
            f"| {r['direct']['call']:.1f} | {r['answer']['call']:.1f} | {figures.difference(r)} |"
        )
        assert line in said, f"{place}: the headline lacks {line}"
    mean, seal = found["mean"], found["Seal-Tools"]
    assert f"{mean['n']} items {mean['better']} repaired, {mean['worse']} broken" in one_line
    first, named = seal["always first"], seal["answer"]["name"]
    told = f"for {first:.1f} % of the items, the name that TT-SI calls for {named:.1f} %"
    assert told in one_line
    _, places = runs[experiments.ADAPT_ALL[0]]
    lines = figures.spoiled({"": places["API-Bank"][0]})
    cells = [line.split("|")[3:6] for line in lines if "uncertain" in line]
    wrong, missing, other_tool = (sum(map(int, column)) for column in zip(*cells, strict=True))
    assert f"of {wrong} right answers spoiled there {missing}" in one_line
    assert f"{other_tool} call another tool" in one_line
    choose.table(0, 60)
    free = re.search(r"^\| free \|.*call (\S+ \[.*?\])", capsys.readouterr().out, re.M)[1]
    assert f"{free}, 60 items of dev)" in one_line, "another of free drafts"


def alike(line, other):
    """The same words, and numbers that differ by what another machine's rounding may do."""
    number = r"[-+]?\d[\d,]*(?:\.\d+)?"
    pairs = zip(re.findall(number, line), re.findall(number, other), strict=False)
    values = [[float(text.replace(",", "")) for text in pair] for pair in pairs]
    near = all(abs(a - b) <= max(2, 0.05 * abs(b)) for a, b in values)
    return near and re.sub(number, "#", line) == re.sub(number, "#", other)


@slow
def test_the_readme_shows_what_a_run_says(capsys):
    said = (HERE.parent / "README.md").read_text().splitlines()
    ttsi.main([])
    lines = [line for line in capsys.readouterr().out.splitlines() if "seconds" not in line]
    for line in filter(None, lines):
        assert any(alike(line, other) for other in said), f"README lacks: {line}"
    assert not alike("call 17.0", "call 20.0") and not alike("call 17.0", "name 17.0")


@slow
def test_what_is_told_of_the_defaults_on_dev_is_what_a_run_says(capsys):
    summary = ttsi.main(["--data", str(HERE / "dev.jsonl")])
    points, low, high, *_ = summary["difference"].values()
    found = f"{points:+.1f} [{low:+.1f}, {high:+.1f}] | {summary['tokens']['ratio']:.1f}x"
    told = re.search(r"(?<=\| \(the default\) \| ).*(?= \|)", (HERE / "README.md").read_text())
    assert alike(found, told[0]), f"data/README.md tells {told[0]}, it is {found}"


def test_publishing_replaces_what_is_between_the_marks_and_no_more(tmp_path):
    file, marks = tmp_path / "README.md", "a\n<!-- table {} -->\nold\n<!-- end -->\nz\n"
    file.write_text("".join(marks.format(group) for group in ("real", "real several")))
    experiments.publish("real several", "new \\1\n", file)
    want = marks.format("real") + marks.format("real several").replace("old", "new \\1")
    experiments.publish("a.svg", "<svg/>", file)
    assert (tmp_path / "a.svg").read_text() == "<svg/>", "a figure stands beside it"
    assert file.read_text() == want, "published elsewhere"


def files_of(stem, digests, folder):
    """-> files with these digests: here, beside this checkout, or made as they once were."""
    if stem == "test-plain":
        ttsi.save(folder / f"{stem}.jsonl", map(json.dumps, world.records("test", 500, 0, 0)))
    for dev in BENCHMARKS.rglob("canonical_dev_200.jsonl") if stem == "dev_60" else ():
        ttsi.save(folder / f"{stem}.jsonl", dev.read_text().splitlines()[:60])
    every = [path for at in (HERE, folder, BENCHMARKS) for path in sorted(at.rglob("*.jsonl"))]
    found = {choose.digest(path): str(path) for path in every}
    return [found[digest] for digest in digests if digest in found]


READ, SAME = ("prefill", "score"), ("id", "tools", "offered", "right")


def as_kept(key, row, kept, half):
    """In half precision another processor rounds otherwise: names score about the same, and what
    is written diverges."""
    if key == "cost":
        return all(row[key].get(k, [0, 0])[1] == kept[key].get(k, [0, 0])[1] for k in READ)
    if key == "logp":
        return row[key] == pytest.approx(kept[key], abs=1 if half else 0.05)
    if key in ("votes", "loss") or (half and key not in SAME):
        return True
    if key == "margin":
        return row[key] == pytest.approx(kept[key], abs=0.01)
    return row[key] == kept[key]


@slow
@pytest.mark.parametrize("file", KEPT_ROWS, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_five_rows_of_each_run_are_made_again(file, tmp_path, tmp_path_factory):
    together = tmp_path_factory.getbasetemp() / "again"  # what is composed of others finds them
    head, rows = experiments.read_rows(file)
    model = {"model": HERE / "model"}.get(
        file.parent.name, HERE.parent / "models" / file.parent.name
    )
    stem = file.name.partition(f"-{head['method']}-")[0]
    files = head["data"] + head["pool"]
    found = files_of(stem, files, tmp_path)
    if not model.is_dir() or len(found) < len(files) or head["method"] == "sft":
        pytest.skip("its model or data are not at hand, or it is trained for minutes")
    where = ["--model", str(model), "--rows", str(together)]
    args = experiments.parse_arguments([*where, f"--flags=--dtype {head['flags']['dtype']}"])
    args.pool = found[1:]
    flags = " ".join(map(flag_of, head["flags"].items()))
    flags += f" --teacher {HERE / 'teacher'}" if head["teacher"] else ""
    again = experiments.Lab(args, found[0], 5)
    method = getattr(experiments, head["method"])
    made = method(again, head["seed"], flags, *head["more"])
    made = made[:-1] if "another's" in head["more"] else made  # who is the last one's next?
    half = head["flags"]["dtype"] == "bfloat16"
    for row in made:
        kept = rows[row["id"]]
        others = [key for key in kept if not as_kept(key, row, kept, half)]
        assert not others, f"{row['id']}: {[(key, row[key], kept[key]) for key in others]}"
    graded = [(row, rows[row["id"]]) for row in made if "scores" in row]
    agree = sum(row["scores"]["answer"] == kept["scores"]["answer"] for row, kept in graded)
    assert agree >= 0.6 * len(graded), "most answers are graded otherwise"


@slow
def test_all_experiments_run_quickly(capsys, monkeypatch):
    files = [f for f in (HERE / "results").rglob("*") if f.is_file()]
    before = {file: file.read_bytes() for file in files}
    experiments.main(["--quick", "--limit", "4"])
    text = "\n" + capsys.readouterr().out
    for group, (places, _, _, lines) in experiments.GROUPS.items():
        for label, *_ in lines if places is experiments.OWN else ():
            assert f"\n| {label} | " in text, f"{group}: {label} did not run"
    assert {f: f.read_bytes() for f in files} == before, "a look publishes something"


@slow
def test_the_real_experiments_run_on_anyones_files(tmp_path, capsys):
    lines = (HERE / "dev.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "mine.jsonl").write_text("".join(lines[:3]))
    pool = [str(HERE / f"{split}.jsonl") for split in ("dev", "demo")]
    where = ["--data", str(tmp_path / "mine.jsonl"), "--pool", *pool]
    model = ["--model", str(HERE / "model"), "--base", str(HERE / "model"), "--flags=--epochs 2"]
    experiments.main(["real", "tune-real", *where, *model, "--quick", "--limit", "2"])
    text = "\n" + capsys.readouterr().out
    for group in ("real", "real-seeds", "real-controls", "tune-real"):
        for label, *_ in experiments.GROUPS[group][3]:
            assert f"\n| {label} | " in text, f"{group}: {label} did not run"


# ------------------------------------------------------------------------- the real model
def test_a_model_is_taught_and_its_folder_is_base_plus_delta(tmp_path, tok, capsys):
    """In two steps, on items of the own world in the place of BFCL's."""
    lines = (HERE / "dev.jsonl").read_text().splitlines()[:40]
    for n, category in enumerate(smollm2.CATEGORIES):
        (tmp_path / f"canonical_{category}.jsonl").write_text("\n".join(lines[n::4]))
    (tmp_path / "test.jsonl").write_text("\n".join(lines[:3]))
    delta, out = tmp_path / "delta.safetensors", tmp_path / "out"
    flags = f"--base {HERE / 'model'} --train {tmp_path} --tests {tmp_path / 'test.jsonl'}"
    flags += f" --steps 2 --lr 0.5 --rows 4 --longest 1500 --delta {delta} --out {out}"
    smollm2.main(flags.split())
    told = capsys.readouterr().out
    assert "37 items" in told and "3 stand in a test file" in told and "the base" not in told
    cfg = ttsi.Config(model=str(out), lora_rank=32, lora_alpha=64.0)
    (model, tok), (base, _) = ttsi.load(str(out), cfg), smollm2.get_base(HERE / "model")
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with smollm2.safe_open(delta, "pt") as tensors:
        assert set(tensors.metadata()) == {"base", "losses, means of 20 steps", "run", "scale"}
        with ttsi.temporary_lora(base, cfg, ttsi.draw(0)) as lora:
            before = base(ids).logits
            for n, p in enumerate(lora):
                p.data = tensors.get_tensor(f"{n // 2}.{'AB'[n % 2]}").float()
            want = base(ids).logits
    change, error = (want - before).abs().max(), (want - model(ids).logits).abs().max()
    assert change > 0.1 and error < change / 10, "not base plus delta"
    assert ttsi.takes_tools(tok), "the folder's template shows no tools"


def test_the_rows_of_the_real_model(tok):
    """Half answer, half write a pair about another request, with its tool on offer."""
    tok = copy.deepcopy(tok)
    tok.chat_template = smollm2.TEMPLATE
    items = [ttsi.to_sample(r) for r in read(HERE / "dev.jsonl")[:60]]
    for item in items:
        item["request"] = item["messages"][0]["content"]
        item["tool"] = next(t for t in item["tools"] if t["name"] == item["call"]["name"])
    rows = smollm2.Rows(items, tok, 0)
    calls = {item["request"]: item["call"] for item in items}
    kinds = Counter()
    for _ in range(60):
        ids, begin = rows.row()
        prompt, output = tok.decode(ids[:begin]), tok.decode(ids[begin:])
        shown = prompt.partition(ttsi.DRAFT)[2] or prompt.rpartition("user\n")[2]
        request = shown.partition("<|im_end|>")[0]
        value, rest = ttsi.parse(output)
        answers = ttsi.DRAFT not in prompt
        call, kinds[answers] = value if answers else value["call"], kinds[answers] + 1
        assert call == calls[request if answers else value["request"]], "another's call"
        assert answers or not ttsi.copies(value["request"], request), "a copy of the seed"
        assert f'"name": "{call["name"]}"' in prompt, "its tool is not on offer"
        assert rest == "<|im_end|>" or rest == tok.eos_token, "the turn does not end"
    assert min(kinds.values()) > 15


def test_native_is_ours_in_the_real_models_template(tok):
    """Of a single request; a dialogue has turns of its own, with its system text and calls."""
    tok = copy.deepcopy(tok)
    tok.chat_template = smollm2.TEMPLATE
    sample = ttsi.to_sample(read(HERE / "dev.jsonl")[0])
    one, other = (ttsi.prepare(tok, sample, ttsi.Config(prompt=p)) for p in ("native", "ours"))
    assert one.ids == other.ids and one.candidates == other.candidates
    call = {"name": "f", "arguments": {"x": "\u00e9"}}
    said = [ttsi.turn("system", "Be brief."), ttsi.turn("user", "one")]
    said += [ttsi.turn("assistant", "", tool_calls=[{"function": call}]), ttsi.turn("tool", "2")]
    text = tok.apply_chat_template(said, tools=[{"function": call}], tokenize=False)
    system = f"Be brief.\n\n{ttsi.SYSTEM}{ttsi.dumps(call)}"
    turns = [("system", system), ("user", "one"), ("assistant", ttsi.dumps(call)), ("tool", "2")]
    assert text == "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)


@slow
def test_cells_are_made_once_and_compared_with_the_direct_answer(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(choose, "KEPT", tmp_path)
    flags = f"--model {ttsi.Config.model} --data {HERE / 'dev.jsonl'} --dtype float32 --limit 6"
    cells = ["two", "two-lr1e-4", "neighbours", "itself"]
    choose.main([*flags.split(), *cells])
    first, rows = capsys.readouterr().out, {cell: choose.read_rows(cell) for cell in choose.CELLS}
    assert len(rows["direct"]) == 6
    uncertain = [i for i, row in rows["direct"].items() if row["margin"] < 0.95]
    assert uncertain and all([*rows[cell]] == uncertain for cell in cells)
    for i in uncertain:
        pairs, drafts = rows["two"][i]["pairs"], rows["two"][i]["drafts"]
        assert all(pair in [draft["pair"] for draft in drafts] for pair in pairs)
        slower = rows["two-lr1e-4"][i]
        anew, again = (r["cost"]["generate"][1] for r in (rows["two"][i], slower))
        assert again < anew, "what was drafted is drafted again"
        assert slower["pairs"] == pairs and slower["drafts"] == drafts, "other pairs"
        assert slower["loss"][:1] == pytest.approx(rows["two"][i]["loss"][:1])
        assert rows["neighbours"][i]["pairs"] == [{}] * 3 and rows["itself"][i]["pairs"] == [{}]
    right = {True: 0, False: 0}
    for i, row in rows["direct"].items():
        right[False] += row["scores"]["call"] / 6
        right[True] += rows["itself"].get(i, row)["scores"]["call"] / 6
    assert f"| itself | 6 | 100.0 | {100 * right[True]:.1f} | " in first, "not better by its label"
    assert f"call {100 * (right[True] - right[False]):+.1f} [" in first.partition("| itself")[2]
    monkeypatch.setattr(ttsi, "tt_si", None)
    choose.main([*flags.split(), *cells])
    assert capsys.readouterr().out == first, "made twice, or other rows"
    del rows["itself"][uncertain[0]]
    ttsi.save(tmp_path / "itself.jsonl", map(json.dumps, rows["itself"].values()))
    choose.main(flags.split())
    told = capsys.readouterr().out
    at = [*rows["direct"]].index(uncertain[0])
    found = re.search(r"\| itself \| (\d+) \|", told)
    assert int(found[1] if found else 0) == at, "certain items alone would look like no difference"
    monkeypatch.setitem(choose.CELLS, "two", ("--drafts 0 --k 3", None))
    with pytest.raises(ttsi.InputError, match="rows of"):
        choose.main([*flags.split(), "two"])


@slow
@pytest.mark.parametrize("skip,limit", [(0, 60), (0, 200), (60, 200)])
def test_the_tables_of_the_choice_are_made_of_the_rows(skip, limit, capsys):
    choose.table(skip, limit)
    out = capsys.readouterr().out.splitlines()
    part = re.search(
        rf"<!-- choice {skip} {limit} -->\n(.*?)<!-- end -->",
        RESULTS.read_text(),
        re.S,
    )
    lines = part[1].splitlines()
    assert len(lines) > 3 and set(lines) <= set(out), [line for line in lines if line not in out]


@slow
def test_direct_answers_are_scored_whole(tmp_path, monkeypatch, tok, capsys):
    monkeypatch.setattr(choose, "KEPT", tmp_path)
    flags = f"--model {ttsi.Config.model} --data {HERE / 'dev.jsonl'} --dtype float32 --limit 3"
    choose.main([*flags.split(), choose.SCORES])
    cfg, samples = ttsi.Config(), read(HERE / "dev.jsonl")
    (model, _), direct = ttsi.load(cfg.model, cfg), choose.read_rows("direct")
    for i, row in choose.read_rows(choose.SCORES).items():
        sample = next(ttsi.to_sample(s) for s in samples if s["id"] == i)
        ids = ttsi.prepare(tok, sample, cfg).ids
        new = tok(direct[i]["answer"], add_special_tokens=False).input_ids
        logits = model(torch.tensor([ids + new])).logits[0].log_softmax(-1)
        want = sum(logits[len(ids) + n - 1, token].item() for n, token in enumerate(new))
        assert row["logp"] == pytest.approx(want, abs=2e-3), f"{i}: another log P"
        assert row["tokens"] == len(new), f"{i}: another length"
    assert "AUROC over 3 direct answers" in capsys.readouterr().out


def test_neighbours_are_of_other_requests_and_have_their_own_tools(tok):
    one, *others = (ttsi.to_sample(record) for record in read(HERE / "dev.jsonl")[:9])
    pairs = choose.neighbours(one, [one, one | {"id": "another"}, *others])
    assert len(pairs) == 3 and one["call"] not in [pair["call"] for pair in pairs], "its label"
    with choose.with_own_tools(pairs):
        ids, _ = ttsi.pair_span(ttsi.prepare(tok, one, ttsi.Config()), pairs[0])
    text = tok.decode(ids)
    for sample, shown in ((pairs[0]["sample"], True), (one, False)):
        names = [f'"{tool["name"]}"' in text for tool in sample["tools"]]
        assert all(names) if shown else not all(names), "another's tools"
    said = one["messages"][0]["content"].partition(" ")[2]
    near = one | {"messages": [ttsi.turn("user", f"kindly {said}")]}
    assert choose.neighbours(one, [*others, near])[0]["sample"] == near, "not the nearest"


@pytest.mark.parametrize("n", [60, 200])
def test_the_areas_told_are_those_of_all_pairs(n, capsys):
    direct, scores = choose.read_rows("direct"), choose.read_rows(choose.SCORES)
    choose.uncertainties([*direct][:n])
    told = re.findall(r": (\S+), (\S+)\n", capsys.readouterr().out)
    rows = [(scores[i]["logp"], r["margin"], r["scores"]) for i, r in [*direct.items()][:n]]
    for k, kind in enumerate(figures.KINDS):
        both = [(a, b) for a in rows for b in rows if a[2][kind] > b[2][kind]]
        areas = [sum((a[v] > b[v]) + (a[v] == b[v]) / 2 for a, b in both) for v in (0, 1)]
        areas = [f"{area / len(both):.2f}" for area in areas]
        assert areas == [told[1][k], told[0][k]], f"{kind}: other areas"
        assert " against ".join(areas) in RESULTS.read_text().replace("the margin's ", ""), kind


# -------------------------------------------------------------------------------- the bench
def test_the_bench_times_all_rivals_on_all_items(capsys, tmp_path):
    judge, kept = ttsi.judge, ["--output", str(tmp_path / "rows.jsonl")]
    report = bench.main(["--quick", *kept])
    first = capsys.readouterr().out
    rivals = {"generate", "direct", "TT-SI, certain", "TT-SI, adapted", "TT-SI, no pair"}
    assert report["seconds"].keys() >= rivals
    for name, seconds in report["seconds"].items():
        assert len(seconds) == 2 and all(s > 0 for s in seconds.values()), name
    assert report["told"]["same answer"] == 2, "transformers answers otherwise"
    assert report["parts"].keys() >= {"prefill", "score", "generate", "train", "answer"}
    assert judge is ttsi.judge, "still patched"
    assert [goal[:2] for goal in report["goals"]][:2] == [goal[:2] for goal in bench.GOALS[:2]]
    bench.main(["--quick", *kept])
    assert capsys.readouterr().out == first, "measured again"
    assert "| TT-SI, adapted | 2 | " in first


def test_the_competent_user_scores_and_trains_as_ttsi_does(tok):
    pytest.importorskip("peft")
    cfg = ttsi.Config(adapt="full", lora_rank=4)
    model, _ = ttsi.load(cfg.model, cfg)
    sample = next(iter(ttsi.read_jsonl(HERE / "dev.jsonl", ttsi.to_sample).values()))
    x = ttsi.prepare(tok, sample, cfg)
    margin = ttsi.margin(ttsi.score(x, ttsi.Prefix(model, x.ids[:-1])))
    spans = [ttsi.pair_span(x, {"request": r, "call": sample["call"]}) for r in ("one", "or two")]
    want = -(ttsi.logprob(spans, ttsi.Prefix(model, [])) / len(spans[0][0][spans[0][1] :])).mean()
    rival = bench.Competent(model, tok, cfg)
    with rival.model.disable_adapter():
        assert rival.score(x)[1] == pytest.approx(margin, abs=1e-4), "another margin"
    losses, forward = [], rival.model.forward

    def told(**how):
        out = forward(**how)
        losses.append(out.loss.item())
        return out

    rival.model.forward = told
    for _ in range(2):
        rival.train(spans)
    assert len(losses) == 2 * cfg.epochs and losses[0] > losses[cfg.epochs - 1]
    assert losses[0] == pytest.approx(want.item(), rel=1e-3), "another loss"
    assert losses[cfg.epochs] == pytest.approx(losses[0], rel=1e-5), "the adapter was not reset"
    rival.model.forward = forward
    rival(sample, [{"request": "one", "call": sample["call"]}], 2)
    with rival.model.disable_adapter():
        assert rival.score(x)[1] == pytest.approx(margin, abs=1e-4), "the base has changed"


def test_transformers_is_stopped_where_a_call_ends(tok):
    ids = [
        tok(text).input_ids for text in ('x{"name": "f", "arguments": {}}', 'x{"name": "f", "ar')
    ]
    ending = bench.Ending(tok, 1, bench.called)
    assert [ending(torch.tensor([row]), None).tolist() for row in ids] == [[True], [False]]


def test_no_pair_is_forced_by_the_last_tool_alone(tok):
    cfg = ttsi.Config(tau=2.0)
    model, _ = ttsi.load(cfg.model, cfg)
    sample = next(iter(ttsi.read_jsonl(HERE / "dev.jsonl", ttsi.to_sample).values()))
    logp = ttsi.tt_si(model, tok, sample, cfg).logp
    last = sorted(logp, key=logp.get)[-2]
    forced = bench.without_pair(model, tok, sample, cfg, last)
    assert forced.decision == "no pair" and any(draft["pair"] for draft in forced.drafts)


def test_what_is_told_of_the_bench_is_of_its_rows():
    args = SimpleNamespace(output=HERE / "results" / "bench.jsonl", dtype="bfloat16")
    report, lines = bench.costs(args, [])
    assert "\n".join(lines) in RESULTS.read_text(), "results/README.md tells of other rows"
    for *_, ratio, _ in report["goals"]:
        assert bench.show(ratio) in (HERE.parent / "README.md").read_text(), "README lacks a ratio"


def test_ratios_of_the_bench_by_hand():
    a, b = (
        dict(zip("wxyz", (2, 4, 8, 6), strict=True)),
        dict(zip("wxyz", (1, 1, 2, 2), strict=True)),
    )
    found = bench.over(a, b | {"other": 99})  # ratios 2, 3, 4, 4
    assert found == (5 / 1.5, 3, 3.5, 4), "four items: median over median, then quartiles"
    assert bench.over({"x": 1, "y": 2, "z": 9}, {"x": 1, "y": 1, "z": 1}) == (2, 1, 2, 9)


def test_a_grown_sample_keeps_its_right_tool_and_asks_for_more():
    samples = list(ttsi.read_jsonl(HERE / "dev.jsonl", ttsi.to_sample).values())
    more = bench.grown(samples[0], 40, 7, samples[1:])
    names = [tool["name"] for tool in more["tools"]]
    assert len(set(names)) == 40 and samples[0]["call"]["name"] in names
    said, asked = more["messages"][-1]["content"], samples[0]["messages"][-1]["content"]
    assert len(said.split()) == len(asked.split()) + 7
