"""The files beside ttsi.py: the world, the converter, the experiments, the bench, the tables.

Each test compares with what shares no code: a closed form, brute force, a hand count, an invariant.
"""

import argparse
import contextlib
import copy
import hashlib
import itertools
import json
import math
import os
import random
import re
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
import smollm2  # noqa: E402
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
    """The embedded model on six samples of the demo; runs are shared by the tests."""
    args = {"model": ttsi.Config.model, "data": str(HERE / "demo.jsonl"), "limit": 6}
    args |= {"flags": "", "quick": True, "teacher": str(HERE / "teacher")}
    lab = experiments.Lab(argparse.Namespace(**args))
    lab.runs, threads = tmp_path_factory.mktemp("runs"), torch.get_num_threads()
    torch.set_num_threads(1)  # products are small; on a busy machine two threads take much longer
    yield lab
    torch.set_num_threads(threads)


def other(lab, **changes):
    """The same lab with other arguments."""
    changed = copy.copy(lab)
    changed.args = argparse.Namespace(**vars(lab.args) | changes)
    return changed


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


def icl(lab):
    return other(lab, flags="--tau 2 --k 2 --drafts 2 --max-new-tokens 60")


def naive_ids(tok, x, pairs):
    turns = [("system", experiments.system_text(x))]
    for pair in pairs:
        turns += [("user", pair["request"]), ("assistant", json.dumps(pair["call"]))]
    turns = [{"role": role, "content": text} for role, text in [*turns, ("user", x.request)]]
    how = {"add_generation_prompt": True, "return_dict": True}
    return tok.apply_chat_template(turns, **how).input_ids


NO_SYSTEM = "{% for m in messages %}{{ raise_exception('no') if m.role == 'system' else '' }}"
NO_SYSTEM += "<{{ m.role }}>{{ m.content }}{% endfor %}"
ROLES = {"no system role": (NO_SYSTEM, "<user>{}\n\nr1<assistant>{}<user>r"), "none": (None, "")}


def scored(*calls, decision="adapted"):
    """Rows of (direct right?, answer right?)"""
    rows = []
    for i, (direct, answer) in enumerate(calls):
        right = [{"name": True, "call": bool(c)} for c in (direct, answer)]
        scores = {"direct": right[0], "answer": right[1], "first": i == 0}
        cost = {"answer": [2.0, 30], "direct": [1.0, 10]}
        row = {"id": str(i), "margin": i / 9, "logp": {"f": 0.0, "g": 0.0}, "drafts": []}
        rows.append(row | {"decision": decision, "scores": scores, "cost": cost})
    return rows


READMES = (HERE.parent / "README.md", HERE / "README.md")
BLOCK = re.compile(r"<!-- table (\S+) (\S+) -->\n(.*?)<!-- end -->", re.S)


def blocks():
    found = [block for readme in READMES for block in BLOCK.findall(readme.read_text())]
    return {(stem, group): text for stem, group, text in found}


def published():
    for file in sorted((HERE / "results").glob("*.json")):
        for label, r in json.loads(file.read_text()).items():
            yield f"{file.name}: {label}", r


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
    both, run = lab.run(0, "--tau 2"), lab.run(0)
    assert {r["decision"] for r in run} == {"certain", "adapted"}, "choose other samples"
    for a, b in zip(experiments.uncertain(both), run, strict=True):
        for key in TOLD:
            assert a[key] == b[key], f"{a['id']}: another {key}"
        assert tokens(a) == tokens(b), f"{a['id']}: gating afterwards costs otherwise"


def test_the_certain_are_the_complement_of_the_uncertain(lab):
    both = lab.run(0, "--tau 2")
    low, high = experiments.uncertain(both), experiments.certain(both)
    for row, a, b in zip(both, low, high, strict=True):
        adapted, not_adapted = (a, b) if row["margin"] < 0.95 else (b, a)
        assert adapted == row, f"{row['id']}: who is adapted is answered otherwise"
        assert not_adapted["answer"] == row["direct"], f"{row['id']}: not the direct answer"
        assert not_adapted["scores"]["answer"] == row["scores"]["direct"], "other scores"
        assert not_adapted["decision"] == "certain" and not not_adapted["pairs"], "it is adapted"


def test_every_tau_equals_gated_runs_and_their_complements(lab):
    both, wrong = lab.run(0, "--tau 2"), {"name": False, "call": False}
    both[1] |= {"margin": None, "cost": {}, "decision": "not answered: beyond the context"}
    both[1]["scores"] = {"direct": wrong, "answer": wrong, "first": False}
    listed = experiments.every_tau(both)
    for tau in (0.0, 0.3, 0.7, 0.95, 0.999, 1.5):
        e = next(e for e in listed if e["tau"] >= tau)
        below, above = (f(both, tau) for f in (experiments.uncertain, experiments.certain))
        n = sum(r["decision"] == "adapted" and (r["margin"] or 0) < tau for r in below)
        right = [ttsi.summarise(rows)["TT-SI"]["call"] for rows in (below, above)]
        assert e["adapted"] == n, f"tau {tau}: another number is adapted"
        assert e["call"] == pytest.approx(right[0]), f"tau {tau}: another accuracy"
        assert e["certain_only"] == pytest.approx(right[1]), f"tau {tau}: another control"
    assert experiments.every_tau([]) == [], "without rows there is no tau"
    assert listed[-1]["adapted"] >= 4, "choose other samples"


def test_votes_and_pass_at_n_by_hand(lab, monkeypatch):
    drawn = {i: {"texts": texts, "cost": [2.0, 30]} for i, (texts, _, _) in DRAWN.items()}
    monkeypatch.setattr(experiments, "sampled", lambda *_: drawn)
    label = {"call": {"name": "f", "arguments": {"a": 12}}}
    samples = [s | label for s in lab.samples(lab.config(0))]
    monkeypatch.setattr(lab, "samples", lambda cfg: samples)
    votes, best = experiments.majority(lab, 0, 1.0), experiments.any_of(lab, 0, 1.0)
    for row, chosen, (_, winner, right) in zip(votes, best, DRAWN.values(), strict=False):
        assert row["answer"] == winner, f"{row['id']}: another answer wins the vote"
        assert row["scores"]["answer"]["call"] == (winner == F12), f"{row['id']}: graded wrong"
        assert chosen["scores"]["answer"]["call"] == right, f"{row['id']}: pass@5 is wrong"
        assert row["cost"]["answer"] == [2.0, 30], f"{row['id']}: the votes cost otherwise"
    assert votes[4:] == lab.run(0, "--tau 0")[4:], "a sample without votes changed"
    texts = experiments.distinct([F12, G12, F12_AS_TEXT, "x", "x"])
    assert texts == [F12, G12, "x"], "one text of each call, in order"


def test_sampled_answers_become_the_direct_one_without_temperature(lab):
    drawn, direct = experiments.sampled(lab, 0, 1e-4), lab.run(0, "--tau 0")
    for row in direct:
        texts = drawn[row["id"]]["texts"]
        assert texts == [row["direct"]] * 5, f"{row['id']}: a sampled answer differs"


def test_certainties_by_answers_are_those_of_whole_texts(lab):
    """1 / perplexity of the direct answer, and the margin of the distinct calls."""
    model, tok = lab.base(lab.config(0))
    drawn, rows = experiments.sampled(lab, 0, 1.5), lab.rows(0, "--tau 0")
    found, several = experiments.by_answer(lab, 0, 1.5), 0
    for _, x in lab.prepared(lab.config(0)):
        texts = experiments.distinct([rows[x.id]["direct"], *drawn[x.id]["texts"]])
        new = [tok(t + tok.eos_token, add_special_tokens=False).input_ids for t in texts]
        total = []
        for ids in new:
            logp = model(torch.tensor([x.ids + ids])).logits[0].log_softmax(-1)
            total.append(sum(logp[len(x.ids) + i - 1, t].item() for i, t in enumerate(ids)))
        p = sorted((math.exp(t) / sum(map(math.exp, total)) for t in total), reverse=True)
        want = [math.exp(total[0] / len(new[0])), p[0] - sum(p[1:2])]
        assert found[x.id] == pytest.approx(want, rel=1e-3), f"{x.id}: other certainties"
        several += len(texts) > 1
    assert several, "choose other samples"


def test_mean_normalised_margins_by_hand(lab):
    """Here each name is a verb, an object and a closing quote: three tokens."""
    found, rows = experiments.mean_normalised(lab, 0), lab.run(0, "--tau 2")
    for row in rows:
        odds = sorted((math.exp(logp / 3) for logp in row["logp"].values()), reverse=True)
        margin = (odds[0] - odds[1]) / sum(odds)
        assert found[row["id"]] == [pytest.approx(margin)], f"{row['id']}: another mean"
    judged = experiments.judged(lab, 0, 0, experiments.mean_normalised)
    for row, before in zip(judged, rows, strict=True):
        margin = found[row["id"]][0]
        assert row == before | {"margin": margin}, f"{row['id']}: more than the margin changed"


@slow
def test_one_adapter_for_all_starts_as_the_base_and_learns(lab):
    model, _ = lab.base(lab.config(0))
    untouched, direct = digest(model), lab.run(0, "--tau 0")
    whole = other(lab, quick=False)
    still, trained = (experiments.fine_tuned(whole, 0, True, 4, lr) for lr in (0.0, 1e-2))
    answers = [[r["answer"] for r in rows] for rows in (direct, still, trained)]
    assert answers[0] == answers[1], "a LoRA that learned nothing answers otherwise"
    assert answers[0] != answers[2], "nothing was learned"
    once = trained[0]["once"]
    assert once["labels"] == 4 and once["tokens"] > 10 * 2 * 4 * 100, "ten epochs, two passes"
    assert digest(model) == untouched, "the base weights were written"


def test_a_kept_adapter_begins_as_the_temporary_one(lab):
    kept, fresh = experiments.stream(lab, 0, 6e-4), lab.run(0, "--tau 2 --lr 6e-4")
    at = next(i for i, r in enumerate(fresh) if r["margin"] < 0.95 and r["pairs"])
    for a, b in zip(kept[:at], fresh, strict=False):
        assert a["answer"] == b["direct"], f"{a['id']}: nothing was learned before"
    assert kept[at]["answer"] == fresh[at]["answer"], "the first LoRA is not the temporary one"
    assert kept[at]["decision"] == "adapted", "the first uncertain sample is not trained on"
    moved = [abs(a["margin now"] - b["margin"]) for a, b in zip(kept, fresh, strict=True)]
    assert max(moved[: at + 1]) < 1e-4 < max(moved[at + 1 :]), "what was learned is gone"
    still = [r["answer"] for r in experiments.stream(lab, 0, 0.0)]
    assert still == [r["direct"] for r in fresh], "a rate of 0 changes answers"


@slow
def test_round_trips_part_the_drafts(lab):
    model, tok = lab.base(lab.config(0))
    samples = {s["id"]: s for s in lab.samples(lab.config(0))}
    alike, otherwise = (experiments.round_trip(lab, 0, agree) for agree in (True, False))
    assert any(r["pairs"] for r in alike), "choose other samples"
    for row, *parts in zip(lab.run(0), alike, otherwise, strict=True):
        passed = [d["pair"] for d in row["drafts"] if d["pair"]]
        halves = [[d["pair"] for d in part["drafts"]] for part in parts]
        both = sorted(map(json.dumps, halves[0] + halves[1]))
        assert both == sorted(map(json.dumps, passed)), f"{row['id']}: a draft in both or none"
        for agree, half in zip((True, False), halves, strict=True):
            for pair in half:
                question = [{"role": "user", "content": pair["request"]}]
                sample = samples[row["id"]] | {"messages": question}
                result = ttsi.tt_si(model, tok, sample, ttsi.Config(tau=0.0))
                answered = ttsi.parse(result.answer)[0] == pair["call"]
                assert answered == agree, f"{row['id']}: {pair} is in the wrong half"


def test_a_random_subset_is_as_large_as_the_uncertain(lab):
    n = sum(r["margin"] < 0.95 for r in lab.run(0, "--tau 2"))
    chosen = sum("generate" in r["cost"] for r in experiments.a_random_subset(lab, 0))
    assert 0 < chosen == n < 6, f"{chosen} are adapted, {n} are uncertain"


def test_tau_by_budget_is_a_quantile_of_other_margins(lab, tmp_path, monkeypatch):
    lines = (HERE / "dev.jsonl").read_text().splitlines(keepends=True)[:12]
    (tmp_path / "dev.jsonl").write_text("".join(lines))
    monkeypatch.setattr(experiments, "HERE", tmp_path)
    dev = lab.path(0, f"--tau 0 --limit 0 --data {tmp_path / 'dev.jsonl'}")
    margins = sorted(r["margin"] for r in read(dev))
    assert len(margins) == 12, "other samples were scored"
    for share in (0, 1 / 3, 3 / 4):
        tau = margins[int(12 * share)]
        below = [r["margin"] < tau for r in lab.run(0, "--tau 2")]
        rows = experiments.within_budget(lab, 0, share)
        chosen = ["generate" in r["cost"] for r in rows]
        assert chosen == below, f"share {share}: others are adapted"


def test_the_upper_bound_is_trained_on_its_own_label(lab):
    rows, fault = experiments.the_item_itself(lab, 0), ttsi.fault
    samples = {s["id"]: s for s in lab.samples(lab.config(0))}
    for row in rows:
        sample = samples[row["id"]]
        request = sample["messages"][0]["content"]
        own = [{"request": request, "call": sample["call"]}]
        assert row["pairs"] == own, f"{row['id']}: trained on something else"
    assert fault.__module__ == "ttsi", "a patch outlived its run"


def test_doses_are_nested(lab):
    rows = {share: experiments.dose(lab, 0, share) for share in (0, 50, 100)}

    def same(a, b):
        return sum(x == y for x, y in zip(rows[a], rows[b], strict=True))

    assert rows[100] == lab.run(0), "all shifted is not the run itself"
    assert (same(50, 100), same(0, 50), same(0, 100)) == (3, 3, 0), "not nested by half"
    assert all(r["scores"]["direct"]["call"] for r in rows[0]), "an unshifted item is wrong"


def test_the_control_is_trained_on_the_next_items_pairs(lab):
    written = lab.run(0, "--tau 2")
    after = written[1:] + written[:1]
    for row, own, given in zip(experiments.others_pairs(lab, 0), written, after, strict=True):
        assert row["pairs"] == given["pairs"], f"{row['id']}: not the next item's pairs"
        generate = own["cost"]["generate"]
        assert row["cost"]["generate"] == generate, f"{row['id']}: writing them has another cost"


def test_the_nearest_draft_gives_its_tool_and_trains_nothing(lab):
    model, tok = lab.base(lab.config(0))
    before, xs = lab.rows(0, "--tau 2"), {x.id: x for _, x in lab.prepared(lab.config(0))}
    for row in experiments.nearest(lab, 0, "--tau 2"):
        if before[row["id"]]["pairs"]:
            name = before[row["id"]]["pairs"][0]["call"]["name"]
            begun = f'{{"name": "{name}", "arguments"'
            ids = xs[row["id"]].ids + tok(begun, add_special_tokens=False).input_ids
            want = greedy(model, tok, ids, begun)
            assert row["answer"] == want, f"{row['id']}: {row['answer']} is not {want}"
            assert "train" not in row["cost"], f"{row['id']}: something was trained"


@slow
def test_variants_of_training_share_their_pairs(lab):
    ours, shuffled = ttsi.pair_span, experiments.reshuffled(lab, 0)
    assert ttsi.pair_span is ours, "a patch outlived its run"
    full = experiments.on_pairs_of(lab, 0, "", "--adapt full")
    suffix = experiments.on_pairs_of(lab, 0, "", "--adapt suffix")
    pairs = [[r["pairs"] for r in rows] for rows in (lab.run(0), shuffled, full, suffix)]
    assert pairs == [pairs[0]] * 4, "other pairs were trained on"
    first = [(a["loss"][0], b["loss"][0]) for a, b in zip(shuffled, full, strict=True) if a["loss"]]
    assert any(abs(a - b) > 1e-4 for a, b in first), "the tools were not reshuffled"
    rows = ttsi.summarise(experiments.against(suffix, full))
    right = [ttsi.summarise(r)["TT-SI"]["call"] for r in (suffix, full)]
    assert rows["difference"]["call"] == pytest.approx(right[0] - right[1]), "another difference"


@pytest.mark.parametrize("slope", [(3.0, 4.0), (0.3, 0.4)])
def test_a_clipped_step_closed_form(tmp_path, monkeypatch, slope):
    """The loss is slope @ p / 2 of a span of two tokens: its gradient is slope / 2."""
    p, slope = torch.zeros(2, requires_grad=True), torch.tensor(slope)
    monkeypatch.setattr(ttsi, "logprob", lambda *_: -(slope @ p)[None])

    def run(seed, flags):
        cfg = ttsi.Config(epochs=1, lr=0.5)
        return ttsi.train([([1, 2, 3], 1)], None, [p], cfg)

    lab = SimpleNamespace(runs=tmp_path, run=run, path=lambda *_: "pairs")
    ours = ttsi.train
    assert experiments.clipped(lab, 0, 0.5) == [0.0], "another loss before the first step"
    step = -0.5 * slope / 2 / max(1, slope.norm().item() / 2)
    assert torch.allclose(p, step), "longer than 1 is clipped, shorter stays"
    assert ttsi.train is ours, "a patch outlived its run"


def test_icl_shows_the_pairs_as_earlier_turns_and_trains_nothing(lab):
    few = icl(lab)
    cfg, untouched = few.config(0), digest(lab.base(few.config(0))[0])
    (model, tok), xs = few.base(cfg), {x.id: x for _, x in few.prepared(cfg)}
    rows, before = experiments.shown(few, 0), few.run(0)
    assert any(len(r["pairs"]) == 2 for r in rows), "choose other samples"
    for row, was in zip(rows, before, strict=True):
        assert row["pairs"] == was["pairs"], f"{row['id']}: other pairs are shown"
        assert "train" not in row["cost"] and not row["loss"], f"{row['id']}: trained"
        ids = naive_ids(tok, xs[row["id"]], row["pairs"])
        text = greedy(model, tok, ids)
        assert row["answer"] == text, f"{row['id']}: {row['answer']} is not {text}"
    assert any(r["answer"] != r["direct"] for r in rows), "the pairs make no difference"
    assert digest(model) == untouched, "the base weights were written"


def test_pairs_that_exceed_the_context_are_not_shown_and_not_counted(lab, monkeypatch):
    few = icl(lab)
    cfg, tok = few.config(0), few.base(few.config(0))[1]
    xs, before, sizes = {x.id: x for _, x in few.prepared(cfg)}, few.run(0), {}
    for row in [row for row in before if row["pairs"]]:
        ids = naive_ids(tok, xs[row["id"]], row["pairs"])
        sizes[row["id"]] = len(ids) + cfg.max_new_tokens
    limit = sorted(sizes.values())[len(sizes) // 2 - 1]
    monkeypatch.setattr(tok, "model_max_length", limit)
    fit = {i for i, n in sizes.items() if n <= limit}
    assert 0 < len(fit) < len(sizes), "choose other samples"
    rows = experiments.shown.__wrapped__(few, 0)
    for row, was in zip(rows, before, strict=True):
        adapted = row["decision"] == "adapted"
        assert adapted == (row["id"] in fit), f"{row['id']}: {sizes} tokens of {limit}"
        assert adapted or row["answer"] == was["direct"], f"{row['id']}: not the direct answer"
    assert experiments.pooled([rows])["adapted"] == len(fit), "others count as adapted"


@pytest.mark.parametrize("kind", ROLES)
def test_pairs_are_shown_by_any_template(tok, kind):
    tok, x = copy.deepcopy(tok), SimpleNamespace(tools=[], request="r")
    tok.chat_template, want = ROLES[kind]
    pair = {"request": "r1", "call": {"name": "f", "arguments": {}}}
    text = tok.decode(experiments.with_pairs(tok, x, [pair]))
    shown = json.dumps(pair["call"])
    want = want.format(ttsi.SYSTEM, shown) or f"{ttsi.SYSTEM}\n\nr1\n\n{shown}\n\nr\n\nAnswer:"
    assert text == want, f"{kind}: the turns are told otherwise"


def test_what_is_not_there_is_left_out(lab):
    elsewhere = other(lab, teacher="")
    elsewhere.embedded = False
    for rows in (experiments.teacher, experiments.using(experiments.dose, 0)):
        with pytest.raises(experiments.Skip):
            rows(elsewhere, 0)


def test_statistics_of_the_tables():
    assert experiments.signs(5, 0) == experiments.signs(0, 5) == 2 / 32, "sign test: 5 of 5"
    assert experiments.signs(3, 3) == 1, "sign test: an even split"
    assert experiments.signs(7, 2) == 2 * (1 + 9 + 36) / 512, "sign test: 7 of 9"
    r, values = random.Random(0), [i // 3 / 9 for i in range(30)]
    right = [r.random() < 0.5 for _ in values]
    high = [v for v, good in zip(values, right, strict=True) if good]
    low = [v for v, good in zip(values, right, strict=True) if not good]
    pairs = [(a > b) + (a == b) / 2 for a in high for b in low]
    area = pytest.approx(sum(pairs) / len(pairs))
    assert experiments.auroc(values, right) == area, "AUROC: not that of all pairs"
    four = experiments.auroc([0.9, 0.5, 0.5, 0.1], [1, 1, 0, 0])
    assert four == (1 + 1 + 0.5 + 1) / 4, "AUROC: ties count half"
    assert experiments.auroc([1], [1]) is None, "AUROC: of right ones alone there is none"


def test_a_line_of_a_table_by_hand():
    """Four items, two seeds: the first gains twice, the second loses once, the third gains once
    and loses once."""
    one = scored((0, 1), (1, 0), (0, 1), (1, 1))
    two = scored((0, 1), (1, 1), (1, 0), (1, 1), decision="certain")
    r = experiments.pooled([one, two])
    assert (r["seeds"], r["n"], r["adapted"]) == (2, 4, 2), "other items, or seeds"
    assert r["direct"]["call"] == (50 + 75) / 2, "direct: not the mean of both seeds"
    assert r["ttsi"]["call"] == (75 + 75) / 2, "TT-SI: not the mean of both seeds"
    assert r["difference"] == (25 + 0) / 2, "difference: not the mean of both seeds"
    assert r["sd"] == pytest.approx(25 / 2**0.5), "not the deviation between seeds"
    assert (r["items better"], r["items worse"], r["p"]) == (1, 1, 1), "items counted otherwise"
    assert (r["tokens"], r["seconds"]) == (3, 2), "not multiples of direct answers"
    assert r["always first"] == 25, "always the first tool: one of four"
    low, high = r["interval"]
    assert -50 < low < r["difference"] < high < 100, "the interval lies elsewhere"


# --------------------------------------------------------------------------- what is published
def test_the_tables_are_those_of_the_results():
    found = {stem: experiments.results(stem) for stem in ("test", "dev")}
    drawn = experiments.figures("test", found["test"])
    published = {(stem, group) for stem in found for group in found[stem]}
    published |= {("test", "findings")} if drawn else set()
    assert blocks().keys() == published, "a table without results, or the reverse"
    for (stem, group), text in blocks().items():
        if group == "findings":
            assert text == drawn["findings"], "run `python data/experiments.py`"
            continue
        _, show = experiments.SHOW.get(group, (None, experiments.markdown))
        hint = f"run `python data/experiments.py {group}` on {stem}"
        assert text == show(found[stem][group]), hint
        labels = [label for label, *_ in experiments.GROUPS[group][2]]
        assert list(found[stem][group]) == labels, f"{stem} {group}: a row is missing"


def test_the_figures_are_those_of_the_results():
    for name, text in experiments.figures("test", experiments.results("test")).items():
        if name != "findings":
            there = (HERE / "results" / name).read_text()
            assert there == text, f"{name} shows other numbers: run data/experiments.py"


def test_published_numbers_agree_with_one_another():
    for name, r in published():
        change = r["ttsi"]["call"] - r["direct"]["call"]
        assert r["difference"] == pytest.approx(change), f"{name}: another difference"
        low, high = r["interval"]
        assert low <= r["difference"] <= high, f"{name}: the interval lies elsewhere"
        better, worse = r["items better"], r["items worse"]
        n = better + worse
        assert n <= r["n"] and 0 <= r["adapted"] <= r["n"], f"{name}: more than there are"
        splits = itertools.product((0, 1), repeat=min(n, 12))
        if n <= 12:  # all ways in which n items can go
            uneven = [abs(2 * sum(split) - n) >= abs(better - worse) for split in splits]
            assert r["p"] == pytest.approx(sum(uneven) / 2**n), f"{name}: another p"
        kept, all_drafts = r["drafts kept"]
        assert kept <= all_drafts, f"{name}: more drafts are kept than were written"


def test_publishing_replaces_what_is_between_the_marks_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "HERE", tmp_path / "data")
    (tmp_path / "data").mkdir()
    marks = "a\n<!-- table test {} -->\nold\n<!-- end -->\nz\n"
    both = "".join(marks.format(group) for group in ("main", "dose"))
    for readme in (tmp_path / "README.md", tmp_path / "data/README.md"):
        readme.write_text(both)
    experiments.publish("test", "dose", "new \\1\n")
    for readme in (tmp_path / "README.md", tmp_path / "data/README.md"):
        want = marks.format("main") + marks.format("dose").replace("old", "new \\1")
        assert readme.read_text() == want, f"{readme.name}: published elsewhere"


@slow
def test_all_experiments_run_quickly(tmp_path, monkeypatch, capsys):
    class Apart(experiments.Lab):
        def __init__(self, args):
            super().__init__(args)
            self.runs = tmp_path

    monkeypatch.setattr(experiments, "Lab", Apart)
    files = [*(HERE / "results").glob("*.*"), *READMES]
    before = {file: file.read_bytes() for file in files}
    experiments.main(["--quick", "--limit", "4"])
    text = "\n" + capsys.readouterr().out
    for group, (*_, lines) in experiments.GROUPS.items():
        if group not in experiments.TUNING:
            for label, *_ in lines:
                assert f"\n{label}: " in text, f"{group}: {label} did not run"
    assert "left out" not in text, "a row was left out"
    for file, was in before.items():
        assert file.read_bytes() == was, f"a look publishes nothing, but {file} changed"


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
        assert len(rows["neighbours"][i]["pairs"]) == 3 and len(rows["itself"][i]["pairs"]) == 1
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


@pytest.mark.parametrize("skip,limit", [(0, 60), (0, 200), (60, 200)])
def test_the_tables_of_the_choice_are_made_of_the_rows(skip, limit, capsys):
    choose.table(skip, limit)
    out = capsys.readouterr().out.splitlines()
    part = re.search(
        rf"<!-- choice {skip} {limit} -->\n(.*?)<!-- end -->", READMES[1].read_text(), re.S
    )
    lines = part[1].splitlines()
    assert len(lines) > 3 and set(lines) <= set(out), [line for line in lines if line not in out]


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


# -------------------------------------------------------------------------------- the bench
def test_the_bench_times_all_rivals_on_all_items(capsys, monkeypatch):
    judge = ttsi.judge
    report = bench.main(["--quick", "--json"])
    assert json.loads(capsys.readouterr().out).keys() == report.keys()
    rivals = {"generate", "direct", "TT-SI, certain", "TT-SI, adapted", "TT-SI, no pair"}
    assert report["seconds"].keys() >= rivals
    for name, seconds in report["seconds"].items():
        assert len(seconds) == 2 and all(s > 0 for s in seconds.values()), name
    assert report["told"]["same answer"] == [True, True], "transformers answers otherwise"
    assert report["parts"].keys() >= {"prefill", "score", "generate", "train", "answer"}
    assert judge is ttsi.judge, "still patched"
    assert [goal[:2] for goal in report["goals"]][:2] == [goal[:2] for goal in bench.GOALS[:2]]
    measured = report["seconds"], report["parts"], report["told"]
    monkeypatch.setattr(bench, "measure", lambda *_: measured)
    bench.main(["--quick"])
    assert "| TT-SI, adapted | 2 | " in capsys.readouterr().out


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


def test_the_papers_setting_is_not_overruled_by_that_of_the_tables(lab):
    assert lab.config(0).drafts == 4 and lab.config(0, "--k 2").k == 2
    assert (lab.config(0, "--paper").drafts, other(lab, flags="--paper").config(0).k) == (1, 1)


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
