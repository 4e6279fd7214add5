"""Each test compares ttsi.py with what shares no code: a closed form, brute force, an invariant."""

import ast
import contextlib
import copy
import dataclasses
import functools
import gc
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers

import ttsi

HERE = Path(__file__).resolve().parent
SHARED, DEMO = HERE.parent / "shared", HERE / "data/demo.jsonl"
torch.set_num_threads(1)  # for models as small as these more would wait for one another
SLOW = bool(os.environ.get("SLOW"))
slow = pytest.mark.skipif(not SLOW, reason="long; runs with SLOW=1")


# ------------------------------------------------------------------- samples and small models
def tool(name, **properties):
    schema = {"type": "object", "properties": properties, "required": list(properties)[:1]}
    return {"name": name, "description": f"does {name}", "parameters": schema}


def user(text):
    return [{"role": "user", "content": text}]


def ask(i, request, call, *tools):
    return {"id": i, "messages": user(request), "tools": list(tools), "call": call}


def pair(request, name, **arguments):
    return {"request": request, "call": {"name": name, "arguments": arguments}}


STRING, INTEGER = {"type": "string"}, {"type": "integer"}
GET = [tool("get"), tool("get_all", x=STRING), tool("get_all_users", y=INTEGER)]
FLIGHT = [tool("cancel_flight", city=STRING), tool("book_flight", city=STRING, days=INTEGER)]
F, CANCEL = pair("", "f")["call"], pair("", "cancel_flight", city="Rome")["call"]
SAMPLES = [ask("a", "get them all", F | {"name": "get"}, *GET)]  # names that begin one another
SAMPLES += [ask("b", "cancel my flight to Rome, would you, please", CANCEL, *FLIGHT)]
SAMPLES += [ask("c", "hm", F | {"name": "only"}, tool("only"))]
PAIRS = {"b": [pair("book Oslo", "book_flight", city="Oslo", days=3)], "c": []}
PAIRS["a"] = [pair("fetch x", "get_all", x="x"), pair("a long one for 7", "get_all_users", y=7)]
FIRST = ttsi.Config(max_new_tokens=12, attempts=1, drafts=1, k=1, temperature=1.0)
ALWAYS = dataclasses.replace(FIRST, tau=2.0, k=2, check=False, epochs=2)

ALL = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
REFUSING = "{% if 'hm' in messages | string %}{{ raise_exception('no hm') }}{% endif %}" + ALL
SYSTEMLESS = "{% if 'system' in messages | string %}{{ raise_exception('') }}{% endif %}" + ALL
DROPPING = "{% for m in messages if m.role != 'system' %}[{{ m.content | trim }}]{% endfor %}"
THINKING = ALL + "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}"
DATED = ALL + "[{{ date_string if date_string is defined else strftime_now('%d %B %Y') }}]"
TEMPLATES = [(SYSTEMLESS, "USER]"), (DROPPING, "USER]"), (THINKING, "USER]"), (None, "")]
TEMPLATES += [(DATED, "[01 January 2026]"), ({"default": ALL, "tool_use": "{{ 1 / 0 }}"}, "USER]")]

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "max_position_embeddings": 2048}
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 8}
WINDOW = GROUPED | {"sliding_window": 16}
NEO = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 2048}
NEO |= {"attention_types": [[["global", "local"], 1]], "window_size": 16}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 2048}
KINDS = {"Llama": (GROUPED, 14), "Qwen3": (GROUPED, 14), "GPTNeoX": (SMALL, 8), "GPT2": (GPT2, 8)}
KINDS |= {kind: (WINDOW, 14) for kind in ("Mistral", "Gemma2", "Gemma3Text")}
KINDS |= {"Bloom": ({"hidden_size": 32, "n_layer": 2, "n_head": 4}, 8)}  # ALiBi
KINDS |= {"GPTNeo": (NEO, 12)}  # local attention
KINDS |= {"OPT": (SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32}, 12)}
KINDS |= {"Qwen2": (SMALL | {"num_key_value_heads": 2}, 14)}
KINDS |= {"Phi3": (SMALL | {"num_key_value_heads": 2, "pad_token_id": None}, 8)}
LONG = [pytest.param(kind, marks=slow) for kind in KINDS]


def tiny(tok, kind="Llama"):
    """A small random model whose logits are far from flat, so that a wrong one shows."""
    torch.manual_seed(0)
    more = {"vocab_size": len(tok), "bos_token_id": None, "eos_token_id": tok.eos_token_id}
    conf = getattr(transformers, f"{kind}Config")(**more, **KINDS[kind][0])
    model = transformers.AutoModelForCausalLM.from_config(conf).eval().requires_grad_(False)
    for p in model.parameters():
        p.mul_(6 if p.dim() > 1 else 1)
    return model


@pytest.fixture(scope="session")
def tok():
    return transformers.AutoTokenizer.from_pretrained(HERE / "data/model", model_max_length=2048)


@pytest.fixture(scope="session", params=["Llama", "GPT2"])
def model(request, tok):
    return tiny(tok, request.param)


@pytest.fixture(scope="session")
def llama(tok):
    return tiny(tok)


@pytest.fixture(scope="session")
def embedded():
    return ttsi.load(ttsi.Config.model, ttsi.Config())


@pytest.fixture
def loaded(embedded, monkeypatch):
    monkeypatch.setattr(ttsi, "load", lambda *_: embedded)  # once for all runs


@pytest.fixture(scope="session", params=["qwen3", "llama3_1", "gemma3"])
def real(request):
    folder = SHARED / "tokenizers" / request.param
    if not folder.exists():
        pytest.skip("no real tokenizers beside this checkout")
    return transformers.AutoTokenizer.from_pretrained(folder, model_max_length=2048)


def config(base=FIRST, **changes):
    return dataclasses.replace(base, **changes)


def templated(tok, template):
    tok = copy.deepcopy(tok)
    tok.chat_template = template
    return tok


def saved(model, tok, folder):
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return str(folder)


def digest(model):
    parts = [p.cpu().contiguous().view(torch.uint8).numpy() for p in model.state_dict().values()]
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# ------------------------------------------------------- oracles: no cache, no padding, no hooks
def begin(model, tok, sample, cfg=FIRST):
    """-> x, and the prefixes that it may continue: nothing, the tools, the prompt."""
    x = ttsi.prepare(tok, sample, cfg)
    tools = ttsi.Prefix(model, x.ids[: x.head])
    return x, [ttsi.Prefix(model, []), tools, ttsi.Prefix(model, x.ids[:-1], tools)]


def prompt(tok, x, request, call=None, form="ours"):
    """A request of one turn, and a call, by the chat template alone."""
    turns = [{"role": "system", "content": ttsi.SYSTEM + "\n".join(map(json.dumps, x.tools))}]
    how = {"tokenize": False, "enable_thinking": False, "add_generation_prompt": call is None}
    if form == "ours":
        how |= {"chat_template": None if tok.chat_template else ttsi.PLAIN}
        how["add_generation_prompt"] = True
        text = tok.apply_chat_template([*turns, *user(request)], **how)
        return text + (json.dumps(call) if call else "")
    answer = {"role": "assistant", "content": "", "tool_calls": [{"function": call}]}
    turns = [*user(request), *([answer] if call else [])]
    tools = [{"type": "function", "function": t} for t in x.tools]
    return tok.apply_chat_template(turns, tools=tools, **how)


def joined(tok, x, request, call, at=0):
    """-> (ids of prompt and call in one, the first token that reaches into the call behind at)."""
    form = "native" if ttsi.takes_tools(tok) and x.cfg.prompt != "ours" else "ours"
    text = prompt(tok, x, request, form=form)
    whole = prompt(tok, x, request, call, form)
    ids = tok(whole, add_special_tokens=False).input_ids
    at += len(text) if not at else whole.index(call["name"] + '"', len(text)) - 1
    lengths = (len(tok.decode(ids[: n + 1])) for n in range(len(ids)))
    return ids, next(n for n, length in enumerate(lengths) if length > at)


def naive_logp(model, ids, begin):
    """log P of ids[begin:], in one forward pass over all of them."""
    logp = model(torch.tensor([ids])).logits[0, begin - 1 : -1].float().log_softmax(-1)
    return logp[range(len(ids) - begin), ids[begin:]].sum()


def naive_score(model, tok, x, name):
    """log P of a name and what closes it, by where decoding sets the tokens of a whole answer."""
    call = {"name": name, "arguments": {}}
    ids, first = joined(tok, x, x.request, call, 1)
    _, quote = joined(tok, x, x.request, call, 1 + len(name))
    return naive_logp(model, ids[: quote + 1], first).item()


def naive_greedy(model, tok, ids, n):
    """The text that comes of reading everything again for each token."""
    ids, start = list(ids), len(ids)
    for _ in range(n):
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        text = tok.decode(ids[start:], skip_special_tokens=True)
        if ids[-1] == tok.eos_token_id or ttsi.parse(text)[0]:
            break
    return text


def behind(skip, layer, A, B, x):
    """A linear layer and a LoRA that does not act on the first tokens."""
    seen = (torch.arange(x.shape[-2]) >= skip)[:, None]
    return layer(x) + seen * (x @ A @ B)


def wrapped(model, lora, cfg, skip):
    """A copy of a model with other forward passes of its linear layers."""
    model, scale = copy.deepcopy(model), cfg.lora_alpha / cfg.lora_rank
    for i, layer in enumerate(ttsi.linear_layers(model)):
        A, B = lora[2 * i], scale * lora[2 * i + 1]
        layer.forward = functools.partial(behind, skip, layer.forward, A, B)
    return model


def naive_train(model, tok, x, pairs, cfg):
    """T, each pair a forward pass of its own -> (loss before each step, the adapted model)."""
    spans = [joined(tok, x, pair["request"], pair["call"]) for pair in pairs]
    shared = len(os.path.commonprefix([x.ids[: x.head], *(ids for ids, _ in spans)]))
    with ttsi.temporary_lora(model, cfg, ttsi.draw(cfg.seed, x.id, "adapter")) as lora:
        lora = [p.detach().clone().requires_grad_() for p in lora]
    skip = shared if cfg.adapt == "suffix" else 0
    losses, adamw = [], torch.optim.AdamW(lora, weight_decay=0.0)
    for step in range(cfg.epochs):
        now = wrapped(model, lora, cfg, skip)
        parts = [-naive_logp(now, ids, at) / (len(ids) - at) for ids, at in spans]
        losses.append(sum(parts) / len(parts))
        gradients = torch.autograd.grad(losses[-1], lora)
        rms = torch.cat([g.flatten() for g in gradients]).square().mean().sqrt()
        lr = cfg.lr * 0.5 * (1 + math.cos(math.pi * step / cfg.epochs))
        for p, g in zip(lora, gradients, strict=True):
            p.grad = g
            p.data -= lr * g / rms if cfg.optimizer == "sgd" else 0
        if cfg.optimizer == "adamw":
            adamw.param_groups[0]["lr"] = lr
            adamw.step()
    return [loss.item() for loss in losses], wrapped(model, lora, cfg, skip)


def agrees(model, tok, sample, pairs, cfg):
    """Every stage of one sample against the oracles -> (x, its result)."""
    got, x = ttsi.tt_si(model, tok, sample, cfg, pairs), ttsi.prepare(tok, sample, cfg)
    assert [*got.logp] == [t["name"] for t in x.tools], "not each candidate, in their order"
    for name, logp in got.logp.items():
        want = naive_score(model, tok, x, name)
        assert logp == pytest.approx(want, abs=2e-3), f"{name} is scored otherwise"
    assert got.decision == "adapted" and len(got.pairs) == len(pairs), got.decision
    losses, adapted = naive_train(model, tok, x, got.pairs, cfg)
    assert got.loss == pytest.approx(losses, rel=1e-3), "T is not that of a naive loop"
    assert got.answer == naive_greedy(adapted, tok, x.ids, 12), "the adapted answer differs"
    row = ttsi.to_row(model, tok, sample, got, cfg)
    assert row["direct"] == naive_greedy(model, tok, x.ids, 12), "not the base's answer"
    return x, got


# -------------------------------------------------------------- runs, here or in another process
SHORT = ("--limit", 4, "--attempts", 1, "--drafts", 2, "--epochs", 2, "--max-new-tokens", 56)
TABLE = r"(?m)^samples +all {},"
BRIEF = (*SHORT[:-1], 12)  # too short for a draft
OTHERS = multiprocessing.get_context("forkserver")  # imports once, with what is imported late:
OTHERS.set_forkserver_preload(["test_ttsi"])
LATE = transformers.AutoModelForCausalLM, transformers.AutoTokenizer, transformers.Qwen3ForCausalLM


def to_samples(path=DEMO):
    return ttsi.read_jsonl(path, ttsi.to_sample)


def run(model, tok, samples=SAMPLES, pairs=PAIRS, **changes):
    """Algorithm 1 -> {id: Result as a dict, but for the cost}; adapted is whatever has pairs."""
    cfg, found = config(ALWAYS, **changes), {}
    for s in samples:
        given = None if pairs is None else pairs.get(s["id"], [])
        found[s["id"]] = dataclasses.asdict(ttsi.tt_si(model, tok, s, cfg, given)) | {"cost": 0}
    return found


def rows_of(model, tok, samples, cfg, pairs=None):
    results = [ttsi.tt_si(model, tok, s, cfg, pairs and pairs.get(s["id"])) for s in samples]
    return [ttsi.to_row(model, tok, s, r, cfg) for s, r in zip(samples, results, strict=True)]


def scripted(monkeypatch, texts):
    """What the model writes is these; the numbers that it is drawn by are returned."""
    texts, drawn = iter(texts), []

    def write(tok, ids, prefix, cfg, uniform=None, over=None):
        drawn.append(uniform)
        return [next(texts) for _ in range(1 if uniform is None else len(uniform))]

    monkeypatch.setattr(ttsi, "write", write)
    return drawn


def quiet(*argv):
    with contextlib.redirect_stdout(io.StringIO()) as text:
        summary = ttsi.main([str(a) for a in argv])
    return summary, text.getvalue()


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(rows):
    return [row | {"cost": 0} for row in (rows if isinstance(rows, list) else read(rows))]


def program(folder, argv, first):
    for name, fd in (("out", 1), ("err", 2)):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    sys.argv = ["ttsi.py", *argv]
    first()
    runpy.run_path(f"{HERE}/ttsi.py", run_name="__main__")


def start(folder, *argv, first=int):
    """A process that does as `python ttsi.py ARGV` does, once it has called `first`."""
    child = OTHERS.Process(target=program, args=(str(folder), [str(a) for a in argv], first))
    child.start()
    return child


def python(folder, *argv, first=int):
    """-> (exit code, stdout, stderr)"""
    child = start(folder, *argv, first=first)
    child.join(600)
    return child.exitcode, (folder / "out").read_text(), (folder / "err").read_text()


def heed_interrupts():  # which a job in the background is started to ignore
    signal.signal(signal.SIGINT, signal.default_int_handler)


def fsync_slowly():
    fsync = os.fsync
    os.fsync = lambda fd: (time.sleep(0.02), fsync(fd))


def fail_at_a_gradient(number, error):
    """error None: by asking for more memory than there is"""
    calls, gradient = itertools.count(1), torch.autograd.grad

    def grad(*args, **more):
        if next(calls) == number:
            raise error or torch.empty(1 << 60)
        return gradient(*args, **more)

    torch.autograd.grad = grad


def refuse_sockets(offline, then=int):
    """An audit hook cannot be taken away again."""
    huggingface_hub.constants.HF_HUB_OFFLINE = offline
    sys.addaudithook(lambda event, _: sys.exit(event) if event.startswith("socket.") else None)
    then()


# -------------------------------------------------------------- hostile input: a seed makes a case
WORDS = ["", " ", "\0", "\x1b[2J", "a\nb", 'q"u\\o.t/e', "x" * 10000, "\ud800", "\u2028"]
WORDS += ["<|user|>", "{", "é", "../../etc"]
ODD = [None, True, False, 0, -1, 10**300, 1e308, float("nan"), float("inf"), [], {}, [[]]]
ODD += [{"": None}, {"name": ""}, {"$ref": "#"}, ["{", "a\nb", "\ud800"], *WORDS]
VALUES = ["", "0", "-1", "nan", "inf", "1e999", "1e-320", "9" * 30, "9" * 5000, "0x10", "1_0"]
VALUES += [" 2 ", "x", "é", "\udcff", "a\nb", "--", "-", "/", "/dev/null", "/nope", "\0", "%s"]


def places(value, at=()):
    yield at
    parts = value.items() if isinstance(value, dict) else ()
    for key, v in enumerate(value) if isinstance(value, list) else parts:
        yield from places(v, (*at, key))


def mutated(r, value):
    value = copy.deepcopy(value)
    for _ in range(r.randint(1, 3)):
        *path, key = r.choice([p for p in places(value) if p] or [("x",)])
        parent = functools.reduce(lambda v, k: v[k], path, value)
        if parent and r.random() < 0.3:
            del parent[key]
        elif parent:
            parent[key] = copy.deepcopy(r.choice(ODD))
    return value


def garbled(r, data):
    for _ in range(r.randint(1, 4)):
        i, j = sorted(r.choices(range(len(data) + 1), k=2))
        more = data[:i] + bytes(r.choices(range(256), k=3)) + data[i:]
        data = r.choice([more, data[:i] + data[i + 5 :], data[:j] + data[i:], data[:i]])
    return data


def hostile_data(r, folder):
    record = json.loads(r.choice(DEMO.read_text().splitlines()))
    text, depth = json.dumps(record)[:-1], r.choice([50, 90, 100, 200, 900, 5000, 100000])
    number = r.choice(["1e999", "-1e999", "1" * 5000, "1" * 400, "01", "NaN", "-Infinity"])
    call = record["call"] | {"arguments": {str(i): r.choice(ODD) for i in range(5)}}
    many = {"tools": [{"name": f"t{i}"} for i in range(5000)], "call": F | {"name": "t7"}}
    lines = [f'{text}, "x": {"[" * depth}{"]" * depth}}}', f'{text}, "n": {number}}}']
    lines += [f'{text}, "id": 7, "id": 7, "tools": []}}', json.dumps(record | {"call": call})]
    lines += [json.dumps(record | many), json.dumps(record | {"query": r.choice(WORDS)})]
    lines += [json.dumps(mutated(r, record), ensure_ascii=r.random() < 0.7) for _ in range(12)]
    data = r.choice(lines).encode("utf-8", "surrogatepass")
    data = garbled(r, data) if r.random() < 0.3 else data
    (folder / "d.jsonl").write_bytes(data + r.choice([b"\n", b"\r\n", b""]))
    return ["--data", folder / "d.jsonl"], rf"{folder}/d\.jsonl:"


def hostile_pairs(r, folder):
    record = json.loads(DEMO.read_text().splitlines()[0])
    pairs = [{"request": "please", "call": record["call"]}] * 2
    data = json.dumps(mutated(r, {"id": record["id"], "pairs": pairs})).encode()
    (folder / "p.jsonl").write_bytes(garbled(r, data) if r.random() < 0.3 else data)
    argv = ["--pairs", folder / "p.jsonl", r.choice(["--check", "--no-check"])]
    return argv, rf"(--pairs )?{folder}/p\.jsonl:"


def hostile_flags(r, folder):
    fields = [f for f in dataclasses.fields(ttsi.Config) if f.name not in ("output", "epochs")]
    names, argv = [f.name.replace("_", r.choice("-_")) for f in fields], []
    numbers = [f.name for f in fields if f.type in (int, float) and f.name != "attempts"]
    for _ in range(r.randint(1, 3)):
        odd = r.choice(names), r.choice([*VALUES, "cpu", "adamw", *names])
        name, value = odd if r.random() < 0.4 else (r.choice(numbers), r.choice("123"))
        forms = [[f"--{name}", value], [f"--{name}={value}"]] * 4
        argv += r.choice([*forms, [f"--{name}"], [f"--no-{name}"], [value]])
    parts = [re.escape(part) for a in argv for part in (a.split("=")[0], a.split("=")[-1])]
    return argv, "(?s).*(" + "|".join(re.sub(r"_|\\-", "[-_]", part) for part in parts) + ")"


def hostile_model(r, folder):
    shutil.copytree(HERE / "data/model", folder / "m", dirs_exist_ok=True)
    files = sorted((HERE / "data/model").iterdir())
    target = folder / "m" / r.choice(files).name
    data, how = target.read_bytes(), r.random()
    if how < 0.2:
        target.unlink()
    elif how < 0.6 and target.suffix == ".json":
        target.write_text(json.dumps(mutated(r, json.loads(data))))
    else:
        other, cut = r.choice(files).read_bytes(), data[: r.randrange(len(data))]
        target.write_bytes(r.choice([cut, garbled(r, data[:5000]) + data[5000:], other]))
    return ["--model", folder / "m"], rf"(--model )?{folder}/m: "


# -------------------------------------------------------------------------------------------- H
def test_margin_and_interval_closed_form():
    for logp, want in ([math.log(3), 0], 0.5), ([-700, -700 - math.log(2), -800], 1 / 3), ([-5], 1):
        found = ttsi.margin(dict(enumerate(map(float, logp))))
        assert found == pytest.approx(want), f"{logp}: not p(1) - p(2)"
    low, high = ttsi.interval([1] * 50 + [0] * 50)
    assert ttsi.interval([1, 1, 1]) == [1, 1], "nothing varies"
    assert [low, high] == pytest.approx([0.5 - 0.098, 0.5 + 0.098], abs=0.02), "not 1.96 sd"


def test_scores_and_greedy_texts_equal_reading_everything_anew_behind_any_prefix(model, tok):
    for sample in SAMPLES:
        x, prefixes = begin(model, tok, sample)
        text = naive_greedy(model, tok, x.ids, 12)
        for prefix in prefixes:
            assert ttsi.write(tok, x.ids, prefix, FIRST) == [text], f"behind {len(prefix.ids)}"
            found = ttsi.score(x, prefix)
            for (name, got), (ids, at) in zip(found.items(), x.candidates, strict=True):
                want = naive_score(model, tok, x, name)
                assert got == pytest.approx(want, abs=2e-3), f"{name} is scored otherwise"
                ends = tok.decode(ids[at:]).startswith(name + '"')
                assert ends, f"{name} without its terminator cannot lose to one that it begins"


def test_many_candidates_are_scored_as_few_are(llama, tok):
    many = ask("m", "hm", None, *[tool(f"act_{i}", x=STRING) for i in range(19)])
    x, (_, _, prefix) = begin(llama, tok, many)
    found = ttsi.score(x, prefix)
    assert len(found) == 19 and [*found] == [offered["name"] for offered in x.tools]
    for name in ("act_0", "act_9", "act_18"):
        assert found[name] == pytest.approx(naive_score(llama, tok, x, name), abs=2e-3), name


def test_sampling_follows_the_distribution(llama, tok):
    x, (_, _, prefix) = begin(llama, tok, SAMPLES[1])
    cfg, u = config(max_new_tokens=1), torch.rand(400, 1, generator=ttsi.draw(1))
    p = llama(torch.tensor([x.ids])).logits[0, -1].softmax(-1)
    best = p.argmax().item()
    share = ttsi.write(tok, x.ids, prefix, cfg, u).count(tok.decode([best])) / 400
    sd = (p[best] * (1 - p[best]) / 400).sqrt()
    assert abs(share - p[best]) < 4 * sd, "not the model's distribution (false alarm: 1 in 15,000)"
    cold = ttsi.write(tok, x.ids, prefix, config(cfg, temperature=0.0), u[:3])
    assert cold == [tok.decode([best])] * 3, "temperature 0 is greedy"


def test_a_draft_depends_on_no_neighbour_also_when_that_has_ended(embedded):
    model, tok = embedded
    x, (_, tools, _) = begin(model, tok, to_samples()["demo-003"])
    ids = tok(prompt(tok, x, ttsi.DRAFT + x.request)).input_ids
    u, cfg = torch.rand(4, 60, generator=ttsi.draw(0)), config(max_new_tokens=60)
    together = ttsi.write(tok, ids, tools, cfg, u)
    assert together == [ttsi.write(tok, ids, tools, cfg, row[None])[0] for row in u], "it does"
    assert len({len(tok(text).input_ids) for text in together}) > 1, "they end at one time"


def test_a_prefix_is_unchanged_by_use_and_can_be_continued_in_several_ways(model):
    prefix = ttsi.Prefix(model, [5, 6, 7], ttsi.Prefix(model, [5, 6]))
    before = copy.deepcopy(prefix.cache)
    for new in ([1, 2], [3], [9, 4, 2]):
        with torch.set_grad_enabled(new == [3]):
            logits = prefix.forward(prefix.copy(2), torch.tensor([new] * 2), 1)
        want = model(torch.tensor([[5, 6, 7, *new]])).logits[0, -1]
        assert torch.allclose(logits[1, -1], want, atol=1e-4), f"{new} sees another continuation"
    for a, b in zip(before.layers, prefix.cache.layers, strict=True):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values), "it was changed"


@pytest.mark.parametrize("adapt", ["suffix", "full"])
@pytest.mark.parametrize("request_,texts", [("go", ["/x", "or"]), ("/go", ["x", "/y"])])
def test_a_token_that_merges_across_the_end_of_the_tools(request_, texts, adapt):
    pre, made = tokenizers.pre_tokenizers, tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    how = {"special_tokens": ["<end>"], "initial_alphabet": pre.ByteLevel.alphabet()}
    made.train_from_iterator(["}/"] * 9, tokenizers.trainers.BpeTrainer(vocab_size=258, **how))
    tok = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")
    tok, cfg = templated(tok, re.sub(r"[\[\]]", "", ALL)), config(ALWAYS, adapt=adapt, lr=5e-3)
    sample, given = ask("m", request_, F, *GET), [pair(t, "get_all", x=t) for t in texts]
    x, got = agrees(tiny(tok), tok, sample, given, cfg)
    assert "}/" in tok.tokenize(prompt(tok, x, "/")), "the vocabulary is not what it is meant to be"
    assert (x.ids[x.head] in tok("}/").input_ids) == (request_[0] == "/"), "nor is the prompt"


def test_a_hooked_layer_is_w_plus_s_b_a(llama):
    cfg, x = config(lora_rank=3, lora_alpha=5.0), torch.randn(2, 6, 32)
    layer = llama.model.layers[0].self_attn.q_proj
    plain = x @ layer.weight.T
    with pytest.raises(ZeroDivisionError), ttsi.temporary_lora(llama, cfg, ttsi.draw(1)) as lora:
        A, B = lora[:2]
        assert A.shape == (32, 3) and 0.9 < A.abs().max() * 32**0.5 <= 1, "not uniform"
        assert not B.any() and torch.allclose(layer(x), plain, atol=1e-5), "B = 0 changes nothing"
        B.data.normal_()
        want = x @ (layer.weight + 5 / 3 * (A @ B).T).T
        assert torch.allclose(layer(x), want, atol=1e-4), "not W + s B A"
        raise ZeroDivisionError
    assert torch.allclose(layer(x), plain) and not hooks(llama), "the adapter outlives its block"


@pytest.mark.parametrize("suffix", [False, True])
@pytest.mark.parametrize("std", [0.0, 0.1])
def test_one_sgd_step_closed_form_its_gradient_that_of_a_masked_full_forward(
    model, tok, suffix, std
):
    x, prefixes = begin(model, tok, SAMPLES[0])
    ids, at, cfg = [*x.ids, 20, 21, 22], len(x.ids), config(epochs=1, lr=3e-3)
    with ttsi.temporary_lora(model, cfg, ttsi.draw(1)) as lora:
        for B in lora[1::2]:
            B.data.normal_(0, std, generator=ttsi.draw(3))
        before = [p.detach().clone().requires_grad_() for p in lora]
        losses = ttsi.train([(ids, at)], prefixes[suffix], lora, cfg)
    loss = -naive_logp(wrapped(model, before, cfg, x.head * suffix), ids, at) / 3
    gradients = torch.autograd.grad(loss, before)
    rms = torch.cat([g.flatten() for g in gradients]).square().mean().sqrt()
    assert losses == pytest.approx([loss.item()])
    for p, was, g in zip(lora, before, gradients, strict=True):
        assert torch.allclose(p, was - 3e-3 * g / rms, atol=1e-6), "not lr along the gradient"
    moved = [not torch.equal(p, was) for p, was in zip(lora, before, strict=True)]
    assert std or moved == [False, True] * (len(lora) // 2), "B = 0: the first step moves B alone"


@pytest.mark.parametrize("adapt", ["full", "suffix"])
@pytest.mark.parametrize("optimizer,lr", [("sgd", 5e-3), ("adamw", 1e-2)])
def test_training_equals_a_naive_loop(model, tok, adapt, optimizer, lr):
    cfg = config(ALWAYS, adapt=adapt, optimizer=optimizer, lr=lr, epochs=4)
    for sample in SAMPLES[:2]:  # two ragged pairs, one pair
        _, got = agrees(model, tok, sample, PAIRS[sample["id"]], cfg)
        assert got.loss[-1] < got.loss[0], "it does not learn"


# -------------------------------------------------------------------------------------------- G
COPY = "Cancel my FLIGHT to Rome would you please!"
JUNK = "no JSON object with a request and a call"
OSLO = {"city": "Oslo"}
CHECKS = [("cancel_flight", {}, "drop it", "required argument missing")]
CHECKS += [("cancel_flight", OSLO, "drop Oslo", "")]
CHECKS += [("book_flight", OSLO | {"days": 3}, "3 days in OSLO", "")]
CHECKS += [("cancel_hotel", OSLO, "drop the Oslo flight", "tool not on offer")]
CHECKS += [("cancel_flight", OSLO | {"x": 1}, "drop Oslo", "unknown argument")]
CHECKS += [("book_flight", OSLO | {"days": True}, "Oslo true", "wrong type or not in enum")]
CHECKS += [("cancel_flight", {"city": "Lima"}, "drop Oslo", ttsi.UNSAID)]
CHECKS += [("cancel_flight", {"city": "Rome"}, COPY, "copy of the request")]
CHECKS += [("cancel_flight", {"city": "Bern"}, "no flight to Bern", "written before")]
CHECKS += [("pick", {"size": "huge"}, "a huge one", "wrong type or not in enum")]
CHECKS += [("cancel_flight", OSLO, "Oslo " * 2000, "exceeds the context")]


@pytest.mark.parametrize("name,arguments,request_,verdict", CHECKS)
def test_checks(llama, tok, name, arguments, request_, verdict):
    pick = tool("pick", size={"type": "string", "enum": ["S", "L"]})
    x, _ = begin(llama, tok, SAMPLES[1] | {"tools": [*FLIGHT, pick]})
    before = [{"text": "", "verdict": "kept", "pair": pair("No flight to Bern.", "f")}]
    before += [{"text": "", "verdict": "wrong type", "pair": None}]
    before += [{"text": "", "verdict": ttsi.UNSAID, "pair": pair("drop Oslo", "cancel_flight")}]
    assert ttsi.fault(pair(request_, name, **arguments), before, x, FIRST) == verdict


def test_only_the_k_closest_pairs_are_trained_on(llama, tok):
    sample = ask("b", "please axe my flight", CANCEL, *FLIGHT)
    texts = ["please book it", "please axe it", "please axe the flight", "please pay"]
    given = {"b": [pair(text, "book_flight", city="x", days=1) for text in texts]}
    for k, want in ((1, [2]), (2, [2, 1]), (4, [2, 1, 0, 3])):
        got = run(llama, tok, [sample], given, k=k)["b"]
        found = [p["request"] for p in got["pairs"]]
        assert found == [texts[i] for i in want], "rare shared words first; 'please' says nothing"
        assert len(got["drafts"]) == 4, "all are judged"


def test_generation_stops_at_k_and_counts_every_rejection(llama, tok, monkeypatch):
    x, (_, tools, _) = begin(llama, tok, SAMPLES[0])
    good = [json.dumps(pair(f"number {i}", "get_all", x=f"{i}")) for i in (1, 1, 2)]
    scripted(monkeypatch, ["junk", *good, *["never"] * 9])
    drafts, pairs = ttsi.generate(llama, tok, x, tools, {}, config(k=2, attempts=9))
    assert [d["verdict"] for d in drafts] == [JUNK, "kept", "written before", "kept"]
    assert [bool(d["pair"]) for d in drafts] == [False, True, False, True]
    assert pairs == [drafts[1]["pair"], drafts[3]["pair"]]


@pytest.mark.parametrize("drafts,attempts,junk,good", [(1, 1, 1, 1), (1, 4, 4, 4), (3, 3, 9, 6)])
def test_so_many_drafts_are_written(llama, tok, monkeypatch, drafts, attempts, junk, good):
    x, (_, tools, _) = begin(llama, tok, SAMPLES[0])
    cfg = ttsi.parse_flags(f"--drafts {drafts} --k 4 --attempts {attempts} --tau 2".split())
    texts = (json.dumps(pair(f"number {i}", "get_all", x=f"{i}")) for i in itertools.count())
    for source, want in ((itertools.repeat("junk"), junk), (texts, good)):
        scripted(monkeypatch, source)
        written, _ = ttsi.generate(llama, tok, x, tools, {}, cfg)
        assert len(written) == want, "until k = 4 pass"


def test_drafts_are_drawn_by_seed_sample_and_number(llama, tok, monkeypatch):
    x, (_, tools, _) = begin(llama, tok, SAMPLES[0])
    y, found = copy.copy(x), []
    y.id = "another"
    for one, seed in ((x, 0), (x, 0), (x, 1), (y, 0)):
        drawn = scripted(monkeypatch, itertools.repeat("junk"))
        ttsi.generate(llama, tok, one, tools, {}, config(drafts=2, attempts=2, seed=seed))
        found.append(torch.cat(drawn))
    assert torch.equal(found[0], found[1]), "not a function of seed, sample and number"
    assert len({tuple(row) for drawn in found for row in drawn.tolist()}) == 12, "drawn twice"


def test_a_supplied_copy_of_the_request_is_refused_even_unchecked(llama, tok):
    odd = [{"request": 7}, {"request": "x", "call": F | {"arguments": [1]}}]
    given = {"b": [pair(COPY, "cancel_flight", city="Rome"), *PAIRS["b"], *odd]}
    got = run(llama, tok, SAMPLES[1:2], given, check=False)["b"]
    assert [d["verdict"] for d in got["drafts"]] == ["copy of the request", "kept", JUNK, JUNK]
    assert got["pairs"] == PAIRS["b"], "the copy may hold the label"


def test_a_teacher_writes_the_drafts_it_would_write_for_itself(llama, tok, embedded):
    cfg, untouched = config(ALWAYS, max_new_tokens=64, drafts=4), digest(embedded[0])
    for sample in list(to_samples().values())[:2]:
        own = ttsi.tt_si(*embedded, sample, cfg)
        taught = ttsi.tt_si(llama, tok, sample, cfg, teacher=embedded)
        assert taught.drafts == own.drafts and taught.pairs == own.pairs != [], "other drafts"
        assert taught.logp != own.logp and len(taught.loss) == 2, "the student is trained"
        more = taught.cost["generate"][1] - own.cost["generate"][1]
        assert more == begin(llama, tok, sample)[0].head, "the teacher reads the tools, once"
    assert digest(embedded[0]) == untouched and not hooks(embedded[0])


# ----------------------------------------------------------------- a pair for each likely tool
LOGP = {"get": math.log(0.3), "get_all": math.log(0.64), "get_all_users": math.log(0.06)}


def test_a_form_dictates_the_schemas_keys_and_draws_the_optional_ones():
    schema = {"properties": {"a": STRING, "b": STRING, "c": STRING}, "required": ["b"]}
    tools, seen = [{"name": 'q"', "parameters": schema}, {"name": "free"}], set()
    for i in range(40):
        pair = json.loads(ttsi.outline(tools, 'q"', ttsi.draw(i)).replace(ttsi.GAP, " 1"))
        assert list(pair) == ["call", "request"] and pair["call"]["name"] == 'q"'
        seen.add("".join(pair["call"]["arguments"]))
    assert seen == {"b", "ab", "bc", "abc"}
    text = ttsi.outline(tools, "free", ttsi.draw(0))
    assert text == f'{{"call": {{"name": "free", "arguments":{ttsi.GAP}}}, "request":{ttsi.GAP}}}'


VALUE_ENDS = [(' "a", ', 4), (' "a', 0), (" 12", 0), (" 12,", 3), (" [1, [2]] x", 9), (" {}", 3)]
VALUE_ENDS += [(" tru", 0), (" true}", 5), (" True,", 5), ("", 0), (" hm, no", -1), (" -", 0)]
VALUE_ENDS += [(r' "a\"b" ', 7), ("nan,", -1), (" 1.", 0), (" 3.5,", 4), (" 2e", 0), (" 2e5}", 4)]
VALUE_ENDS += [(" null", 0), (" null,", 5), (" None}", 5), (' [{"name": "x"}', 0), ("  ", 0)]


@pytest.mark.parametrize("text,end", VALUE_ENDS)
def test_where_a_value_ends(text, end):
    assert ttsi.value_end("", text) == end
    begun = '{"x": [1], "y":'
    assert ttsi.value_end(begun, begun + text) == (end + len(begun) if end > 0 else end)
    assert ttsi.value_end(begun, begun[:4]) == 0, "it may still be written"
    assert ttsi.value_end(begun, begun[:4] + text + "~") == -1, "other keys than those dictated"


def filled(tok, monkeypatch, values, room):
    """A draft for book_flight in which the model, on its own tokens, writes these."""
    start, outline = "tools and request\n", ttsi.outline(FLIGHT, "book_flight", ttsi.draw(1))
    given = zip(outline.split(ttsi.GAP), [*values, ""], strict=True)
    whole = "".join(text + value for text, value in given)
    tokens, begin, calls = ttsi.encode(tok, start, whole)[0], ttsi.encode(tok, start)[0], []

    def write(tok, ids, prefix, cfg, uniform, over):
        assert ids == tokens[: len(ids)], "other tokens than those of the whole text"
        assert len(ids) + cfg.max_new_tokens == len(begin) + room, "the draft's limit"
        assert uniform.shape == (1, cfg.max_new_tokens) and not over("")
        calls.append(ids)
        return [tok.decode(tokens[len(ids) :])]

    monkeypatch.setattr(ttsi, "write", write)
    asked, cfg = SimpleNamespace(ids=begin[:-1]), config(max_new_tokens=room)
    return ttsi.fill(outline, tok, start, asked, cfg, ttsi.draw(1)), whole, len(calls)


def test_values_are_written_where_the_outline_has_gaps(tok, monkeypatch):
    values = ' "Oslo"', " 3", ' "to Oslo for 3"'
    text, whole, calls = filled(tok, monkeypatch, values, 99)
    assert text == whole and json.loads(text)["call"]["arguments"] == {"city": "Oslo", "days": 3}
    text, whole, calls = filled(tok, monkeypatch, (' "Oslo"', " three no", ' "never"'), 99)
    assert whole.startswith(text) and calls == 2, "it goes on after a failure"
    assert filled(tok, monkeypatch, values, 5)[2] == 0, "beyond its length it is given up"


def test_values_are_written_on_real_vocabularies(real, monkeypatch):
    for values in ((' "Oslo"', " 3", ' "to Oslo for 3"'), (' ["a"]', " -1.5", ' "{}"')):
        text, whole, calls = filled(real, monkeypatch, values, 200)
        assert text == whole and calls == 3


def test_each_likely_tool_has_its_pair_or_none_is_trained_on(llama, tok, monkeypatch):
    x, (_, tools, _) = begin(llama, tok, SAMPLES[0])
    cfg, asked, drawn = config(drafts=0, k=3, attempts=3, check=True), [], []
    good = {"get": [JUNK, pair("one", "get"), pair("no", "get")]}
    good["get_all"] = [pair("nothing", "get_all", x="y"), JUNK, JUNK]  # y is not in its request
    good["get_all_users"] = [pair("user 7", "get_all_users", y=7)]

    def fill(outline, tok, prompt, after, cfg, generator):
        name = json.loads(outline.replace(ttsi.GAP, "1"))["call"]["name"]
        asked.append(name)
        drawn.append(torch.rand(1, generator=generator).item())
        return json.dumps(texts[name].pop(0))

    monkeypatch.setattr(ttsi, "fill", fill)
    texts = copy.deepcopy(good)
    drafts, pairs = ttsi.generate(llama, tok, x, tools, LOGP, cfg)
    assert asked == ["get_all"] * 3 + ["get"] * 2 + ["get_all_users"], "until one passes, in order"
    assert [p["request"] for p in pairs] == ["nothing", "one", "user 7"] and len(drafts) == 6
    assert len(set(drawn)) == 6, "two drafts are drawn alike"
    texts = copy.deepcopy(good)
    ttsi.generate(llama, tok, x, tools, LOGP, dataclasses.replace(cfg, seed=1))
    assert len(set(drawn)) == 12, "the seed draws nothing"
    texts, asked[:] = copy.deepcopy(good | {"get": [JUNK] * 3}), []
    drafts, pairs = ttsi.generate(llama, tok, x, tools, LOGP, cfg)
    assert pairs == [] and len(drafts) == 6, "one has none: the others would be chosen for it"
    assert "get_all_users" not in asked, "written for nothing"
    texts, asked[:] = copy.deepcopy(good), []
    ttsi.generate(llama, tok, x, tools, LOGP, dataclasses.replace(cfg, k=2))
    assert set(asked) == {"get_all", "get"}, "not for the K likeliest"


def test_the_embedded_model_fills_forms(embedded):
    """On the demo's first samples: what is kept names the likeliest tools, and every draft is
    drawn anew by seed."""
    cfg, found = ttsi.Config(k=3, tau=2.0, epochs=1), []
    for seed in (0, 0, 1):
        for sample in list(to_samples().values())[:3]:
            unlabelled = {key: value for key, value in sample.items() if key != "call" or seed}
            got = ttsi.tt_si(*embedded, unlabelled, dataclasses.replace(cfg, seed=seed))
            found.append([draft["text"] for draft in got.drafts])
            names = [p["call"]["name"] for p in got.pairs]
            ranked = [name for _, name in sorted((-p, name) for name, p in got.logp.items())]
            assert names in ([], ranked[:3]), "pairs for other tools"
            for draft in filter(lambda d: d["pair"], got.drafts):
                assert json.loads(draft["text"])["call"] == draft["pair"]["call"]
    assert found[:3] == found[3:6] != found[6:] and sum(map(len, found)) > 12


# ------------------------------------------------------------------------------------ Algorithm 1
@pytest.mark.parametrize("broken", ["score", "train", "write"])
def test_base_weights_and_hooks_after_a_run_and_after_an_exception_in_it(
    model, tok, monkeypatch, broken
):
    before, count, first = digest(model), hooks(model), run(model, tok)
    decisions = [result["decision"] for result in first.values()]
    assert decisions == ["adapted", "adapted", "no pair"], "c has no pairs"
    assert digest(model) == before and hooks(model) == count, "not reset after a run"
    with monkeypatch.context() as m, pytest.raises(ZeroDivisionError):
        m.setattr(ttsi, broken, lambda *_, **more: 1 / 0)
        run(model, tok)
    assert digest(model) == before and hooks(model) == count, "not reset after an exception"
    assert torch.is_grad_enabled() and run(model, tok) == first, "a run leaves something behind"


def test_order_and_limit_change_nothing_and_each_sample_starts_from_the_base(model, tok):
    for how in ({"lr": 1e-2, "epochs": 4}, {"pairs": None, "tau": 0.95, "check": True}):
        whole = run(model, tok, **how)
        assert run(model, tok, SAMPLES[::-1], **how) == whole, "depends on what came before"
        for s in SAMPLES:
            assert run(model, tok, [s], **how) == {s["id"]: whole[s["id"]]}, "depends on others"


def test_scrambled_labels_change_no_prediction(llama, tok):
    other = [s | {"accept": {"leak": ["1"]}} for s in SAMPLES]
    other = [s | {"call": pair("", s["tools"][-1]["name"], leak="1")["call"]} for s in other]
    none = [{k: v for k, v in s.items() if k != "call"} for s in SAMPLES]
    for pairs in (None, PAIRS):
        want = run(llama, tok, pairs=pairs)
        assert run(llama, tok, other, pairs) == want, "a label is read"
        assert run(llama, tok, none, pairs) == want, "a label is needed"
    row = rows_of(llama, tok, none[:1], ALWAYS, PAIRS)[0]
    assert "scores" not in row and "direct" not in row, "there is nothing to compare with"
    labelled = rows_of(llama, tok, SAMPLES[:1], ALWAYS, PAIRS)
    for rows in ([row], [row, *labelled]):
        assert "ratio" not in ttsi.summarise(rows)["seconds"], "a multiple of other rows"


def test_nothing_changes_where_nothing_is_trained_and_training_changes_the_answer(model, tok):
    zero, closed = run(model, tok, epochs=0), run(model, tok, tau=0.0)
    trained = run(model, tok, epochs=8, lr=1e-2)
    for i, row in closed.items():
        assert zero[i]["answer"] == row["answer"], "no step was made, but it answers otherwise"
        assert row["decision"] == "certain" and not row["drafts"], "the gate is closed"
    assert any(trained[i]["answer"] != closed[i]["answer"] for i in trained), "T does nothing"


def test_the_gate_is_strict(llama, tok):
    margin = run(llama, tok, SAMPLES[:1])["a"]["margin"]
    for tau, decision in ((margin, "certain"), (margin + 1e-9, "adapted"), (0.0, "certain")):
        got = run(llama, tok, SAMPLES[:1], tau=tau)["a"]
        assert got["decision"] == decision, f"margin {margin}, tau {tau}: below it is uncertain"
    assert run(llama, tok, SAMPLES[2:], tau=2.0)["c"]["decision"] == "no pair", "2: always"


def not_answered(model, tok, text):
    """-> why; its neighbours are answered, and it counts as wrong."""
    samples = [SAMPLES[0] | {"id": "no", "messages": user(text)}, *SAMPLES[:2]]
    bad, *rows = rows_of(model, tok, samples, ALWAYS)
    wrong = {"name": False, "call": False}
    assert bad["scores"] == {"direct": wrong, "answer": wrong, "first": True} and not bad["cost"]
    assert all(row["answer"] and row["margin"] is not None for row in rows), "a neighbour"
    summary = ttsi.summarise([bad, *rows])
    assert summary["samples"]["labelled"] == 3, "the denominator must not change"
    assert any("no: not answered" in key for key in summary["decisions"]), "it is not named"
    return bad["decision"]


def test_a_prompt_beyond_the_context_is_named_and_its_neighbours_are_answered(llama, tok, tmp_path):
    assert "exceed the context" in not_answered(llama, tok, "word " * 2000)
    long = saved(llama, templated(tok, "word " * 2000 + ALL), tmp_path)
    with pytest.raises(ttsi.InputError, match="exceed the context"):
        ttsi.load(long, ttsi.Config())


def test_a_request_that_the_template_refuses_is_named_and_its_neighbours_are_answered(llama, tok):
    assert "chat template" in not_answered(llama, templated(tok, REFUSING), "hm")


def test_a_draft_whose_request_the_template_refuses_is_that_drafts_verdict(llama, tok):
    given = {"b": [pair("hm", "book_flight", city="hm", days=1), *PAIRS["b"]]}
    got = run(llama, templated(tok, REFUSING), SAMPLES[1:2], given)["b"]
    assert "template" in got["drafts"][0]["verdict"] and got["pairs"] == PAIRS["b"]
    other = templated(tok, REFUSING.replace("'hm'", "'DIFFERENT'"))
    got = run(llama, other, SAMPLES[1:2], None)["b"]
    assert "template" in got["drafts"][0]["verdict"] and got["decision"] == "no pair"


def test_candidate_order_is_a_function_of_seed_and_names(llama, tok):
    def names(sample, **changes):
        return tuple(t["name"] for t in ttsi.prepare(tok, sample, config(**changes)).tools)

    turned = SAMPLES[0] | {"id": "z", "tools": GET[::-1], "call": None}
    assert names(SAMPLES[0]) == names(turned), "the file's order, or the sample's id, matters"
    assert names(turned, shuffle=False) == ("get_all_users", "get_all", "get")
    assert len({names(SAMPLES[0], seed=s) for s in range(20)}) > 3, "always one order"


def test_any_end_token_stops_an_answer(llama, tok, monkeypatch):
    x, (prefix, *_) = begin(llama, tok, SAMPLES[1])
    first = llama(torch.tensor([x.ids])).logits[0, -1].argmax().item()
    assert ttsi.write(tok, x.ids, prefix, FIRST)[0].startswith(tok.decode([first])) != ""
    for ends in ([tok.eos_token_id, first], first):
        monkeypatch.setattr(llama.generation_config, "eos_token_id", ends)
        assert ttsi.write(tok, x.ids, prefix, FIRST) == [""], f"{ends} does not end it"


def test_an_answer_ends_where_its_call_does(embedded):
    model, tok = embedded
    x, (_, _, prefix) = begin(model, tok, to_samples()["demo-003"])
    before = ttsi.Prefix.tokens
    text = ttsi.write(tok, x.ids, prefix, ttsi.Config())[0]
    assert ttsi.to_call(json.loads(text)), "no call"
    read = ttsi.Prefix.tokens - before  # the prompt's last token, then all but the answer's last
    assert read == len(tok(text, add_special_tokens=False).input_ids), "it writes on"


@pytest.mark.parametrize("adapt", ["suffix", "full"])
def test_tokens_are_counted_as_by_hand(llama, tok, adapt):
    cfg = config(ALWAYS, adapt=adapt, epochs=3)
    x, _ = begin(llama, tok, SAMPLES[0])
    row = rows_of(llama, tok, SAMPLES[:1], cfg, PAIRS)[0]
    longest = max(len(joined(tok, x, p["request"], p["call"])[0]) for p in PAIRS["a"])
    n, skip = len(x.ids), x.head if adapt == "suffix" else 0
    want = {"prefill": n - 1, "generate": 0, "train": 2 * 3 * 2 * (longest - skip)}
    want |= {"score": 3 * (max(len(ids) for ids, _ in x.candidates) - n + 1)}
    want |= {"answer": n - skip + 11, "direct": n + 11}  # 12 tokens, the last is not read
    assert {stage: tokens for stage, (_, tokens) in row["cost"].items()} == want
    row = rows_of(llama, tok, SAMPLES[:1], config(cfg, drafts=2))[0]
    asked = tok(prompt(tok, x, ttsi.DRAFT + x.request)).input_ids
    assert row["cost"]["generate"][1] == len(asked) - 1 - x.head + 2 * 12, "from the tools on"
    assert row["cost"]["answer"][1] == 12 and row["cost"]["direct"][1] == n - 1 + 12
    assert all(seconds > 0 for seconds, _ in row["cost"].values()), "no time"


def test_no_tensor_outlives_its_sample(llama, tok):
    alive = []
    for i in range(4):
        ttsi.tt_si(llama, tok, SAMPLES[0] | {"id": str(i)}, ALWAYS, PAIRS["a"])
        gc.collect()
        alive.append(sum(t.numel() for t in gc.get_objects() if type(t) is torch.Tensor))
    assert alive[1] == alive[2] == alive[3], "something of a sample stays"


@pytest.mark.parametrize("kind", ["Mistral", "Gemma2", *LONG])
def test_every_stage_on_every_architecture_a_sliding_window_sees_no_padding(tok, kind):
    model, u = tiny(tok, kind), torch.rand(3, 12, generator=ttsi.draw(0))
    before = digest(model)
    assert len(ttsi.linear_layers(model)) == KINDS[kind][1], "not every layer"
    for adapt, sample in itertools.product(("suffix", "full"), SAMPLES[:2]):
        cfg = config(ALWAYS, epochs=3, lr=5e-3, adapt=adapt)
        agrees(model, tok, sample, PAIRS[sample["id"]], cfg)
        x, prefixes = begin(model, tok, sample)
        alone = [ttsi.write(tok, x.ids, prefixes[1], FIRST, row[None])[0] for row in u]
        assert ttsi.write(tok, x.ids, prefixes[1], FIRST, u) == alone, "a draft sees others"
    assert digest(model) == before and not hooks(model), "the base was written"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["Llama", *LONG])
def test_half_precision_base_with_float32_adapters_on_every_architecture(tok, kind, dtype):
    half = tiny(tok, kind).to(dtype)
    with ttsi.temporary_lora(half, FIRST, ttsi.draw(0)) as lora:
        assert {p.dtype for p in lora} == {torch.float32}
    found, wanted = (run(m, tok, epochs=4, lr=5e-3).values() for m in (half, tiny(tok, kind)))
    for a, b in zip(found, wanted, strict=True):
        assert a["logp"] == pytest.approx(b["logp"], rel=0.1, abs=0.5), "scores"
        assert a["loss"][:1] == pytest.approx(b["loss"][:1], rel=0.15), "losses"
        assert a["loss"] == [] or a["loss"][-1] < a["loss"][0], "it does not learn"


def test_real_tokenizers_keep_the_prompt_and_cut_at_names(real):
    for sample in SAMPLES:
        x = ttsi.prepare(real, sample, config(prompt="ours"))
        for candidate, (ids, at) in zip(x.tools, x.candidates, strict=True):
            assert ids[: len(x.ids)] == x.ids, "the prompt's tokens are no prefix"
            assert real.decode(ids[at:]).startswith(candidate["name"] + '"'), "cut inside a name"
        ids, at = joined(real, x, x.request, sample["call"])
        assert ids[:at] == x.ids, "prompt and call share a token"
        assert x.tools[-1]["name"] in real.decode(x.ids[: x.head]), "the tools are not in its head"


@slow
def test_a_whole_run_with_real_tokenizers(real, tmp_path):
    folder, data = saved(tiny(real), real, tmp_path / "m"), tmp_path / "d.jsonl"
    for sample in SAMPLES[:2]:
        model, tok = ttsi.load(folder, ttsi.Config())
        agrees(model, tok, sample, PAIRS[sample["id"]], ALWAYS)
    data.write_text("\n".join(map(json.dumps, SAMPLES)))
    argv = ("--tau", 2, "--max-new-tokens", 12, "--output", tmp_path / "o.jsonl")
    summary, text = quiet("--model", folder, "--data", data, *argv)
    assert summary["decisions"] == {"no pair": 3}
    form = "the template's own" if "qwen" in real.name_or_path else "our"
    assert f"{form} tool prompts" in text, "the first lines do not say whose form it is"


def test_an_accelerator_is_used_where_there_is_one_and_local_rank_names_which(monkeypatch):
    def device(asked):
        model, _ = ttsi.load(ttsi.Config.model, ttsi.Config(device=asked))
        return f"{model.device} {model.dtype}"

    def current(check_available=False):
        return torch.device("meta") if there or not check_available else None

    there = monkeypatch.setattr(torch.accelerator, "current_accelerator", current)
    assert device("auto") == "cpu torch.float32", "a build for an accelerator runs without one"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device("auto") == device("cpu") == "cpu torch.float32", "LOCAL_RANK is for accelerators"
    there = True
    assert device("cpu") == "cpu torch.float32", "the cpu was asked for"
    with pytest.raises(ttsi.InputError, match="on meta:1: "):
        device("auto")


B = PAIRS["b"][0]
PARSED = [("Sure! " + json.dumps(F) + " and {", F), ("use {x} then " + json.dumps(F), F)]
PARSED += [("{} " + json.dumps(F), F), ("of {this} kind: " + json.dumps(B) + "}", B)]
PARSED += [('{"call": {"name": "f", "arguments": {}}, "req', None), ('{"a": 1}', None)]
PARSED += [('{"call": {"name": "f", "arguments": {}}', None), ('{"name": NaN}', None), ("", None)]
PARSED += [('{"name": 1e999}', None), ('{"name": "\\ud800"}', None), ("[1]", None)]
PARSED += [('{"name": ' + "[" * 9000 + "]" * 9000 + "}", None), ("{" * 5000, None)]
PARSED += [('{"call": ' * 3000 + "}" * 3000, None), ("{ " * 5000, None)]
PARSED += [('{"a":' * 99999, None), ("[" * 99999, None)]
GRIT = F | {"arguments": {"q": "True Grit", "x": None}}
PARSED += [
    (
        'The 5" pipe: ' + json.dumps(GRIT).replace("null", "None"),
        F | {"arguments": {"q": "True Grit"}},
    )
]


@pytest.mark.parametrize("text,value", PARSED, ids=range(len(PARSED)))
def test_parse(text, value):
    assert ttsi.parse(text)[0] == (value or {}), "text, and braces in it, are passed over"
    open_ = f'{{ }} a {{"call": {json.dumps(F | {"x": [-1.5e3, True, None, "é"]})}, "request": "q"'
    found = [ttsi.parse(part)[0] for part in itertools.accumulate(open_)]
    assert not any(found), "an open one is searched inside"


OUTPUT = [*(text for text, _ in PARSED), "null", "\0\x1b\u2028\ufffd", json.dumps(B)]
OUTPUT += ['{"name": null, "arguments": null}', '{"name": ["only"], "arguments": {}}']
OUTPUT += ['{"name": "only", "arguments": [[]]}', '{"call": 1, "request": "\\ud800"}']
OUTPUT += ['{"call": {"name": {}, "arguments": {}}, "request": 7}', "__import__('os').abort()"]
OUTPUT += ['{"request": "x", "call": {"name": "only", "arguments": "{"}}', "{{ 7 * 7 }}{% x"]
OUTPUT += ['{"call": {"name": "get", "arguments": {"x": %s}}, "request": "x"}' % ("9" * 5000)]
OUTPUT += [json.dumps(pair("<|assistant|>{", "cancel_flight", days={"": [None, True, 1e308]}))]
OUTPUT += [json.dumps(pair("again " * 300, "book_flight", city="again " * 300))]


@pytest.mark.parametrize("check", [True, False])
def test_whatever_the_model_writes_is_counted_data(model, tok, check, monkeypatch):
    before = digest(model)
    cfg = config(ALWAYS, check=check, drafts=3, attempts=2, epochs=1)
    for i in range(0, len(OUTPUT), 1 if SLOW else 7):
        scripted(monkeypatch, itertools.cycle(OUTPUT[i:] + OUTPUT[:i]))
        rows = rows_of(model, tok, SAMPLES, cfg)
        counted = ttsi.summarise(rows)["drafts"]
        assert sum(counted.values()) == sum(len(r["drafts"]) for r in rows) >= 9, "not each draft"
        assert json.loads(ttsi.dumps(rows)) == rows, "a row that cannot be read again"
    assert digest(model) == before and not hooks(model)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("what", ["score", "logprob", "train"])
def test_a_number_that_is_not_finite_leaves_the_base_answer_and_the_neighbours(
    llama, tok, monkeypatch, what, bad
):
    healthy, before, keep = run(llama, tok), digest(llama), getattr(ttsi, what)

    def broken(*args):
        found = keep(*args)
        if what == "train":
            args[2][-1].data[0] = bad  # after the last step: no loss tells
        if what == "logprob" and torch.is_grad_enabled():
            return found + bad
        return found | {"get": bad} if what == "score" else found

    with monkeypatch.context() as m:
        m.setattr(ttsi, what, broken)
        row = rows_of(llama, tok, SAMPLES[:1], ALWAYS, PAIRS)[0]
    kind = "score" if what == "score" else "training"
    assert row["decision"] == f"{kind} not finite" and json.loads(ttsi.dumps(row)) == row
    assert row["answer"] == run(llama, tok, tau=0.0)["a"]["answer"], "not the base's answer"
    assert run(llama, tok) == healthy and digest(llama) == before, "it stays"


@pytest.mark.parametrize("template,end", TEMPLATES)
def test_templates(tok, template, end):
    text, rest = ttsi.render(templated(tok, template), FIRST, GET, user("  USER "), F)
    assert rest == json.dumps(F) and text.count("USER") == 1, "the request, once"
    assert text.index("USER") > text.index("get_all_users") > 0, "the tools come first"
    assert text.endswith(end) and "<think>" not in text, "it thinks, or tells the date"
    with pytest.raises(ttsi.InputError, match="template"):
        ttsi.render(templated(tok, "{{ messages[0].content[:3] }}"), FIRST, GET, user("USER"))


def test_a_dialogue_becomes_a_transcript():
    called = [{"type": "function", "function": {"name": "find", "arguments": {"q": 1}}}]
    turns = [*user("hi"), {"role": "assistant", "content": None, "tool_calls": called}]
    turns += [{"role": "tool", "content": "none"}, *user(" so? ")]
    turns = ttsi.to_sample(SAMPLES[0] | {"messages": turns})["messages"]
    want = 'user: hi\ncall: {"name": "find", "arguments": {"q": 1}}\ntool: none\nuser: so?'
    assert ttsi.user_text(turns) == want


BASE = {"prefill": [1.0, 10], "score": [0.5, 5], "direct": [2.0, 20]}
TRAINED = BASE | {"train": [6.0, 60], "answer": [2.0, 20]}
ROWS = [("a", "adapted", 0, 1, TRAINED, ["kept", "wrong type"]), ("b", "certain", 1, 1, BASE, [])]
ROWS += [("c", "adapted", 1, 0, BASE, ["kept"]), ("e", "certain", 0, 1, BASE, [])]
ROWS += [("d", "not answered: too long", 0, 0, {}, [])]
LIST, ACCEPT = {"x": True, "l": [1, {"k": 2}]}, {"x": [1, 2], "y": ["u", ""]}
GRADES = [("f", {"x": 12.0}, {"x": "12"}, None, True), ("f", [1], {}, None, False)]
GRADES += [("f", {"x": "a", "y": 1}, {"x": "a"}, None, False), ("f", {}, {"x": 1}, None, False)]
GRADES += [("g", {"x": 12}, {"x": 12}, None, False), ("", {}, {}, None, False)]
GRADES += [("f", LIST | {"l": [1.0, {"k": 2}]}, LIST, None, True), ("f", LIST, LIST, None, True)]
GRADES += [("f", {"x": True}, {"x": 1}, None, False), ("f", {"x": 2}, {"x": 1}, ACCEPT, True)]
GRADES += [("f", {"y": "u"}, {}, ACCEPT, False), ("f", {"x": 1, "z": 1}, {}, {"x": [1]}, False)]
GRADES += [("f", {"x": n, "q": 7}, {"x": 1, "q": 7}, {"x": [2]}, n < 3) for n in (1, 2, 3)]
GRADES += [("f", {"x": 2}, {"x": 1, "q": 7}, {"x": [2]}, False)]  # q, which it does not list


@pytest.mark.parametrize("name,given,gold,accept,right", GRADES)
def test_grade(name, given, gold, accept, right):
    sample = {"call": {"name": "f", "arguments": gold}} | ({"accept": accept} if accept else {})
    text = json.dumps({"name": name, "arguments": given}) if name else "no json"
    assert ttsi.grade(text, sample) == {"name": name == "f", "call": right}


def test_summary_by_hand():
    rows = []
    for i, decision, direct, answer, cost, verdicts in ROWS:
        row = {"id": i, "decision": decision, "logp": dict.fromkeys("f" if i == "b" else "fg", -1)}
        row["scores"] = {"direct": {"name": 1, "call": direct}, "first": i == "a"}
        row["scores"]["answer"] = {"name": 1, "call": answer}
        rows.append(row | {"cost": cost, "drafts": [{"verdict": verdict} for verdict in verdicts]})
    s = ttsi.summarise(rows)
    assert s["samples"] == {"all": 5, "labelled": 5, "with one tool": 1}
    named = {"adapted": 2, "certain": 2, "d: not answered: too long": 1}
    assert s["decisions"] == named and s["drafts"] == {"kept": 2, "wrong type": 1}
    tokens = {"prefill": 10, "score": 5, "generate": 0, "train": 15, "answer": 5}
    assert s["tokens"] == tokens | {"all": 35, "direct": 20, "ratio": 1.75}, "over the answered"
    assert s["seconds"]["all"] == pytest.approx(1.5 + 8 / 4), "without the direct answers"
    assert s["always first"] == {"name": 20} and s["direct"] == {"name": 100, "call": 40}
    difference = [s["difference"][key] for key in ("call", "wins", "losses")]
    assert s["TT-SI"] == {"name": 100, "call": 60} and difference == [20, 2, 1]


FLAGS = [("--model /no/such", "/no/such: cannot"), ("--data /no/such", "/no/such")]
FLAGS += [("--tau nan", "--tau nan"), ("--optimizer x", "choice"), ("--lora_rank x", "lora_rank")]
FLAGS += [("--nonsense", "--nonsense"), ("--trace zzz", "--trace zzz"), ("--output /", "/: ")]
FLAGS += [("--trace demo-000 --output x", "--trace"), (f"--limit 1 --pairs {DEMO}", "no pairs")]
FLAGS += [("--teacher /no/such", "/no/such: cannot"), ("--output /proc/x.jsonl", "/proc/x.jsonl: ")]
FLAGS += [("--output /proc/x/y.jsonl", "/proc/x/y.jsonl: "), ("--device abacus", "on abacus")]
GOOD = {"query": "q", "tools": [{"name": "f", "parameters": {}}], "call": F | {"arguments": "{}"}}
LINES = [("{", "Expecting"), ("[]", "no JSON object"), ('{"query": NaN}', "range")]
LINES += [('{"x": ' + "[" * 100 + "]" * 100 + "}", "nested"), ('{"query": 1e999}', "range")]
LINES += [('{"query": "\\ud800"}', "surrogates"), ({"query": None}, ""), ({"query": " "}, "")]
LINES += [({"query": [1]}, ""), ({"tools": None}, ""), ({"tools": []}, ""), ({"tools": [{}]}, "")]
LINES += [({"id": 1}, "twice"), ({"call": "f"}, "call"), ('{"x": 1, "x": 2}', "a key twice")]
LINES += [({"tools": [F, F]}, "f"), ({"call": F | {"name": "g"}}, "call")]
LINES += [({"call": F | {"arguments": "{"}}, "call"), ({"accept": {"x": 1}}, "accept")]
LINES += [({"query": None, "question": "q", "system": "s"}, "no request")]


@pytest.mark.parametrize("change,complaint", LINES)
def test_every_bad_line_is_named(tmp_path, change, complaint):
    line = change if isinstance(change, str) else json.dumps(GOOD | change)
    path = tmp_path / "x.jsonl"
    path.write_text(f"\ufeff{json.dumps(GOOD)}\r\n\n{line}\n{{\n")
    with pytest.raises(ttsi.InputError) as e:
        to_samples(path)
    assert re.fullmatch(f"{path}:3: .*{complaint}.*", str(e.value)), "not the first bad line"


def test_a_byte_order_mark_and_line_endings_change_nothing(tmp_path):
    lines, found, path = DEMO.read_text().splitlines()[:3], [], tmp_path / "x.jsonl"
    forms = ["\n".join(lines), "\ufeff" + "\r\n".join(lines) + "\r\n", "\r".join(lines)]
    for text in [*forms, "\n\n".join(lines) + "\n"]:
        path.write_bytes(text.encode())
        found.append(to_samples(path))
    assert found == [found[0]] * 4 and len(found[0]) == 3
    path.write_text("\n \n")
    with pytest.raises(ttsi.InputError, match="nothing in it"):
        to_samples(path)


FLAGS += [("--k 1", "--k 2, or --drafts 1"), ("--drafts -1", "from 0")]


@pytest.mark.parametrize("argv,complaint", FLAGS)
def test_bad_flags_are_told_in_one_line(argv, complaint):
    with pytest.raises(ttsi.InputError) as e:
        quiet(*argv.split())
    assert complaint in str(e.value) and "\n" not in str(e.value)


def test_an_old_transformers_is_told_in_one_line(loaded, monkeypatch):
    monkeypatch.setattr(transformers, "__version__", "4.57.1")
    with pytest.raises(ttsi.InputError, match="4.57.1 is too old"):
        quiet("--limit", 1)
    monkeypatch.setattr(transformers, "__version__", "5.24.0.dev0")
    assert quiet(*BRIEF, "--limit", 1)[0]["samples"]["all"] == 1


def test_flags(capsys):
    flags = ttsi.parse_flags(["--paper", "--max_new_tokens=9", "--no-shuffle", "--lora-rank", "4"])
    paper = config(ttsi.Config(), k=1, drafts=1, attempts=1, check=False, optimizer="adamw")
    more = {"max_new_tokens": 9, "shuffle": False, "lora_rank": 4}
    assert flags == config(paper, lr=1e-4, adapt="full", **more), "not what the paper states"
    assert (flags.tau, flags.epochs, flags.lora_alpha) == (0.95, 5, 16.0)
    assert ttsi.parse_flags(["--lora_rank", "3"]) == ttsi.Config(lora_rank=3), "other defaults"
    with pytest.raises(SystemExit):
        ttsi.parse_flags(["-h"])
    told = capsys.readouterr().out
    missing = [f.name for f in dataclasses.fields(ttsi.Config) if f"  --{f.name}" not in told]
    assert not missing, "a field is no flag"


def test_output_resumes_after_any_cut_and_refuses_other_settings(loaded, tmp_path):
    path = tmp_path / "new" / "run.jsonl"
    summary, _ = quiet(*SHORT, "--output", path)
    whole, raw = timeless(path), path.read_bytes()
    assert [r["id"] for r in whole] == [f"demo-{i:03d}" for i in range(4)], "not each, in order"
    assert {r["decision"] for r in whole} > {"adapted"}, "nothing to compare"
    written = json.loads((tmp_path / "new/run.summary.json").read_text())
    assert written.items() >= summary.items() and written["config"]["tau"] == 0.95
    ends = [0] + [i + 1 for i, byte in enumerate(raw) if byte == 10]
    for cut in (9, ends[1], ends[2] - 1, ends[2] + 10, ends[4]):
        path.write_bytes(raw[:cut])
        quiet(*SHORT, "--output", path)
        assert timeless(path) == whole, f"cut at {cut}: other rows than an uninterrupted run"
        kept = max(end for end in ends if end <= cut)
        assert path.read_bytes()[:kept] == raw[:kept], "whole rows were made again"
    for flags, why in (["--tau", 0.5], "tau = 0.95, not 0.5"), (["--trace", "demo-050"], "--trace"):
        path.write_bytes(raw[: ends[2]])
        with pytest.raises(ttsi.InputError, match=why):
            quiet(*SHORT, "--output", path, *flags)
        assert path.read_bytes() == raw[: ends[2]], "a refused run must not touch the file"


def copied(folder):
    """-> the flags of a model and data of its own"""
    shutil.copytree(HERE / "data/model", folder / "m")
    shutil.copy(DEMO, folder / "d.jsonl")
    return [*SHORT, "--model", folder / "m", "--data", folder / "d.jsonl"]


def test_the_same_files_elsewhere_go_on(tmp_path):
    path = tmp_path / "run.jsonl"
    quiet(*copied(tmp_path / "here"), "--output", path)
    whole, rows = timeless(path), path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(rows[:2]))
    quiet(*copied(tmp_path / "there"), "--output", path)
    assert timeless(path) == whole and path.read_bytes().startswith(b"".join(rows[:2]))
    quiet(*SHORT, "--pairs", path, "--output", tmp_path / "again.jsonl")
    again = [(row["pairs"], row["answer"]) for row in read(tmp_path / "again.jsonl")]
    assert again == [(row["pairs"], row["answer"]) for row in whole], "a run's rows are pairs"


def test_other_weights_under_the_same_path_are_refused(tmp_path):
    path, argv = tmp_path / "run.jsonl", copied(tmp_path / "here")
    quiet(*argv, "--limit", 1, "--output", path)
    before, file = path.read_bytes(), tmp_path / "here/m/model.safetensors"
    weights = safetensors.torch.load_file(file)
    weights["model.norm.weight"][0] += 0.5
    safetensors.torch.save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ttsi.InputError, match="begun with model = "):
        quiet(*argv, "--limit", 1, "--output", path)
    assert path.read_bytes() == before


def test_other_data_under_the_same_name_are_noticed(loaded, tmp_path):
    data, line = tmp_path / "d.jsonl", DEMO.read_text().splitlines()[0]
    unread = line.replace('"id":', '"mark": 1, "id":', 1)
    for text, other in ((line, False), (unread, False), (line.replace("could", "would"), True)):
        data.write_text(text)
        refused = pytest.raises(ttsi.InputError, match="begun with data = ")
        with refused if other else contextlib.nullcontext():
            quiet("--data", data, "--output", tmp_path / "run.jsonl", "--max-new-tokens", 8)


def test_hostile_rows_in_an_output_are_refused(loaded, tmp_path):
    path, beside = tmp_path / "run.jsonl", tmp_path / "run.summary.json"
    quiet(*BRIEF, "--output", path)
    raw, kept = path.read_bytes(), beside.read_bytes()
    bad = [b"[]", b"{", b'{"id": ["a"]}', b'{"id": "demo-099"}', b"\xff", b"[" * 9999]
    bad += [b'{"id": "demo-000"}', json.dumps(read(path)[0] | {"drafts": 7}).encode()]
    cases = [(raw + line + b"\n", kept) for line in bad]
    cases += [(raw, text) for text in (b"[]", b'{"config": [5]}', b"{")]
    cases += [(b"no rows, and no end of line", b"")]
    for rows, summary in cases:
        path.write_bytes(rows)
        beside.write_bytes(summary)
        with pytest.raises(ttsi.InputError, match=f"^--output {path}: .*") as e:
            quiet(*BRIEF, "--output", path)
        assert path.read_bytes() == rows, "what is refused must not be touched"
        assert "\n" not in str(e.value)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ttsi.InputError, match=f"^--output {tmp_path}/pipe: "):
        quiet(*BRIEF, "--output", tmp_path / "pipe")


def test_outputs_side_by_side_do_not_touch_one_another(loaded, tmp_path):
    others = [tmp_path / name for name in ("run.rank0of2.backup.jsonl", "run.ranking.jsonl")]
    for other in others:
        other.write_text('{"id": "demo-000"}\n')
    one = (*BRIEF, "--limit", 1, "--output")
    for tau in (0.1, 0.2, 0.1):
        for name in (f"tau{tau}", f"run{tau}.jsonl"):
            quiet(*one, tmp_path / name, "--tau", tau)
    with pytest.raises(ttsi.InputError, match="begun with tau = 0.1, not 0.2"):
        quiet(*one, tmp_path / "tau0.1", "--tau", 0.2)
    quiet(*one, tmp_path / "run.jsonl")
    assert len(list(tmp_path.iterdir())) == 2 + 4 * 2 + 2
    assert all(other.read_text() == '{"id": "demo-000"}\n' for other in others)


def test_trace_prints_the_story_in_the_algorithms_order_the_label_last(loaded, tmp_path):
    given = {"id": "demo-003", "pairs": [pair("another one", "f", x="7")]}
    (tmp_path / "p.jsonl").write_text(json.dumps(given))
    argv = ["--trace", "demo-003", "--tau", 2, "--attempts", 1, "--max-new-tokens", 30]
    _, text = quiet(*argv, "--no-check", "--pairs", tmp_path / "p.jsonl")
    sample = to_samples()["demo-003"]
    parts = ["<|system|>", "<|user|>" + ttsi.user_text(sample["messages"]), "margin", "drafts"]
    parts += ["another one", "kept", "another one", "loss", "adapted", "answer", "label"]
    for part in parts:
        assert part in text, f"{part} is missing, or out of order"
        text = text[text.index(part) + len(part) :]
    assert text.strip() == str(sample["call"]), "the label comes last, and nothing behind it"
    _, text = quiet(*argv)
    assert "no pair" in text and text.strip().endswith(str(sample["call"]))
    (tmp_path / "d.jsonl").write_text(json.dumps(sample | {"messages": user("word " * 5000)}))
    _, text = quiet("--data", tmp_path / "d.jsonl", *argv)
    assert "not answered: " in text and text.strip().endswith(str(sample["call"]))


# ------------------------------------------------------- records as people have them, one place
OSLO_CALL = {"name": "cancel_flight", "arguments": {"city": "Oslo"}}
TEXT = json.dumps(OSLO_CALL)
AS_TEXT = OSLO_CALL | {"arguments": json.dumps(OSLO_CALL["arguments"])}
ASKED = user("drop the Oslo flight")
ANSWERS = [{"tool_calls": [{"id": "x", "type": "function", "function": AS_TEXT}], "content": None}]
ANSWERS += [{"function_call": AS_TEXT, "content": ""}, {"content": f"Sure.\n```json\n{TEXT}\n```"}]
ANSWERS += [{"content": f"<tool_call>{TEXT}</tool_call>"}, {"tool_calls": json.dumps([OSLO_CALL])}]
ANSWERS += [{"content": [{"type": "text", "text": TEXT}], "tool_calls": None}]


ANSWERS += [{"content": f"<think>not {json.dumps(CANCEL)}</think>{TEXT}"}]
ANSWERS += [{"content": TEXT, "tool_calls": [{"function": json.dumps(OSLO_CALL)}]}]
ANSWERS += [{"tool_calls": {"function": OSLO_CALL}, "function_call": {"name": None}}]


def record(messages=ASKED, tools=FLIGHT, **more):
    return {"id": "r", "messages": messages, "tools": tools} | more


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_call_that_ends_a_dialogue_is_the_label_and_never_in_the_prompt(tok, answer):
    turns = [*ASKED, {"role": "assistant"} | answer]
    for extra in ({}, {"call": OSLO_CALL}, {"answers": TEXT}, {"call": None}):
        sample = ttsi.to_sample(record(turns, **extra))
        assert sample["call"] == OSLO_CALL and sample["messages"] == ASKED, "it is in the prompt"
        empty = ttsi.to_sample(record([*turns, *user(" ")], **extra))
        assert empty == sample, "an empty message hides it"
    with pytest.raises(ttsi.InputError, match="differ"):
        ttsi.to_sample(record(turns, call=CANCEL))
    more = [{"role": "tool", "content": "done"}]
    with pytest.raises(ttsi.InputError, match="hold the label"):
        ttsi.to_sample(record(turns + more, call=OSLO_CALL))
    again = ttsi.to_sample(record(turns + more + ASKED, call=OSLO_CALL))
    assert len(again["messages"]) == 4, "a call of an earlier request is history"


UNREAD = [
    "[cancel_flight(city='Oslo')]",
    "<function=cancel_flight><parameter=city>Oslo</parameter>",
]
UNREAD += ["{'name': 'cancel_flight', 'arguments': {}}", '{"action": "cancel_flight"}']


@pytest.mark.parametrize("text", UNREAD)
def test_a_label_in_a_form_that_is_not_read_is_refused(text):
    turns = [*ASKED, {"role": "assistant", "content": text}]
    for label in ({"call": OSLO_CALL}, {}):
        with pytest.raises(ttsi.InputError, match="hold the label"):
            ttsi.to_sample(record(turns, **label))
    said = [*ASKED, {"role": "assistant", "content": "The cancel_flight tool does it."}]
    assert len(ttsi.to_sample(record(said, call=OSLO_CALL))["messages"]) == 2, "this is prose"


def test_a_result_that_looks_like_a_call_is_no_label():
    for role in ("tool", "function", "ipython", "observation"):
        turns = [*EARLIER[:2], {"role": role, "name": "cancel_flight", "content": OSLO_CALL}]
        sample = ttsi.to_sample(record(turns))
        assert "call" not in sample and sample["messages"][-1]["role"] == "tool"
        assert sample["messages"][-1]["content"] == TEXT, "a result may be an object"
    for content, text in (("", ""), (22, "22"), ([1, {"text": "x"}], "1\nx"), (None, "")):
        sample = ttsi.to_sample(record([*EARLIER[:2], {"role": "tool", "content": content}]))
        assert "call" not in sample and sample["messages"][-1]["content"] == text, content
    steps = [{"role": "assistant", "content": f"<tool_call>{TEXT}</tool_call>"}, EARLIER[2]]
    steps += [{"role": "assistant", "content": json.dumps(CANCEL)}]
    sample = ttsi.to_sample(record(ASKED + steps))
    assert sample["call"] == CANCEL and len(sample["messages"]) == 3, "an earlier call stays"


def test_prompt_and_completion_and_other_names_of_roles():
    rows = [{"prompt": "drop the Oslo flight"}, {"prompt": ASKED}, {"query": ASKED}]
    rows += [{"prompt": [{"role": "Human", "content": ["drop the Oslo flight"]}]}]
    answer = [{"role": "assistant", "tool_calls": [{"function": OSLO_CALL}]}]
    for row in rows:
        sample = ttsi.to_sample({"id": "r", "tools": FLIGHT, "completion": answer} | row)
        assert (sample["messages"], sample["call"]) == (ASKED, OSLO_CALL)
    both = record([*ASKED, *answer], query="drop it", prompt="drop it", system="Be brief.")
    sample = ttsi.to_sample(both)
    assert (sample["messages"], sample["call"]) == ([SYSTEM_TURN, *ASKED], OSLO_CALL)
    assert ttsi.to_sample(record([], query="[3, 1]") | {"messages": "[3, 1]"})["messages"] == user(
        "[3, 1]"
    )
    with pytest.raises(ttsi.InputError, match=r"messages\[0\] must be .*role"):
        ttsi.to_sample(record([{"role": "narrator", "content": "x"}]))


LABELS = [{"call": OSLO_CALL}, {"call": TEXT}, {"answers": [AS_TEXT]}, {"answers": f"[{TEXT}]"}]
LABELS += [{"tool_calls": [{"function": AS_TEXT}]}, {"call": {"function": OSLO_CALL}}]
LABELS += [{"call": {"name": "cancel_flight", "args": {"city": "Oslo"}}}]
LABELS += [{"call": OSLO_CALL | {"arguments": OSLO_CALL["arguments"] | {"days": None}}}]


@pytest.mark.parametrize("label", LABELS)
def test_a_label_has_several_names_and_forms(label):
    assert ttsi.to_sample(record(**label))["call"] == OSLO_CALL
    two = [{"role": "assistant", "tool_calls": [{"function": OSLO_CALL}] * 2}]
    for several in (record(ASKED + two), record(answers=[OSLO_CALL, CANCEL])):
        with pytest.raises(ttsi.InputError, match="several calls"):
            ttsi.to_sample(several)


def test_when_nothing_is_labelled_the_run_says_so_before_it_starts(loaded, tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps(record(call=[])))
    _, text = quiet("--data", tmp_path / "d.jsonl", *BRIEF)
    assert "0 labelled: no label" in text.splitlines()[0] and "TT-SI" not in text


CITY = {"city": {"type": "string", "description": "where"}}
SCHEMA = {"type": "object", "properties": CITY, "required": ["city", "gone"]}
TOOLS = [{"parameters": SCHEMA}, {"inputSchema": SCHEMA}, {"input_schema": json.dumps(SCHEMA)}]
TOOLS += [{"parameters": {"city": CITY["city"] | {"required": True}}}]
TOOLS += [{"parameters": SCHEMA | {"properties": CITY | {"none": None}}}]


def faulty(tok, schema, arguments, text="the Oslo flight in 3 days"):
    sample = ttsi.to_sample(record(tools=[{"name": "f", "parameters": schema}]))
    x = ttsi.prepare(tok, sample, FIRST)
    return ttsi.fault(
        {"request": text, "call": {"name": "f", "arguments": arguments}}, [], x, FIRST
    )


@pytest.mark.parametrize("schema", TOOLS)
def test_four_names_of_a_schema_mean_the_same(schema):
    listed = [{"name": "f"} | schema]
    for tools in (listed, json.dumps(listed), [{"type": "function", "function": listed[0]}]):
        sample = ttsi.to_sample(record(tools=tools, call={"name": "f"}))
        assert sample["call"]["arguments"] == {}, "no arguments are none"
        rules, required, complete = ttsi.schema_of(sample["tools"], "f")
        assert (set(rules), required, complete) == ({"city"}, {"city"}, True)


VAGUE = [
    True,
    [],
    {},
    "x",
    {"type": "object"},
    {"properties": []},
    {"$ref": "#/x"},
    {"properties": 1},
]
VAGUE += [
    {"$defs": {"a": {}}},
    {"properties": {}, "if": {}},
    {"properties": {"y": {"enum": [None]}, "x": {}}},
]
VAGUE += [{"additionalProperties": {"type": "string"}}]
VAGUE += [{"properties": {"x": {}, "y": {}, "z": {"anyOf": [{"type": "null"}]}}, "required": ["z"]}]
VAGUE += [{"properties": {"x": {"type": []}, "y": {"enum": []}}}]
VAGUE += [{"properties": {"x": {}, "y": {}, "z": {"type": ["string", "null"]}}, "required": ["z"]}]
VAGUE += [{"properties": {"x": {}, "y": {}, "z": {"nullable": True}}, "required": ["z"]}]
VAGUE += [{"allOf": [SCHEMA]}, SCHEMA | {"anyOf": []}, {"properties": {"x": True, "y": {}}}]
VAGUE += [{"type": "object", "properties": {}, "additionalProperties": {}}]
VAGUE += [{"properties": {"x": {"$ref": "#"}, "y": {"type": ["any"]}}, "required": ["x", "z", 1]}]
FIT = [({"type": ["integer", "null"]}, 3, True), ({"type": ["integer", "null"]}, "Oslo", False)]
FIT += [({"type": "integer"}, "3", True), ({"type": "integer"}, 3.0, True)]
FIT += [({"type": "integer"}, 3.5, False), ({"type": "number"}, "3.5", True)]
FIT += [({"type": "boolean"}, "True", True), ({"type": "boolean"}, "Oslo", False)]
FIT += [({"enum": ["OSLO", "Rome"]}, "oslo", True), ({"enum": [1, 2]}, "2", True)]
FIT += [({"enum": [1, 2]}, 3, False), ({"type": "array"}, "Oslo", False)]
FIT += [({"type": "string"}, ["Oslo"], False), ({"type": "object"}, {}, True)]
FIT += [({"type": "float"}, "Oslo", True), ({"type": {"odd": 1}}, "Oslo", True)]


@pytest.mark.parametrize("schema", VAGUE, ids=range(len(VAGUE)))
def test_what_is_not_understood_of_a_schema_is_not_checked(tok, schema):
    assert not faulty(tok, schema, {"x": 3, "y": "Oslo"}), "a right call would be refused"
    ttsi.to_sample(record(tools=[{"name": "f", "parameters": schema}]))


@pytest.mark.parametrize("rule,value,fits", FIT, ids=range(len(FIT)))
def test_types_and_enums_are_compared_as_scores_are(tok, rule, value, fits):
    verdict = faulty(tok, {"properties": {"x": rule}}, {"x": value})
    assert (verdict == "") == fits, f"{value!r} by {rule}: {verdict}"


def test_the_files_form_changes_nothing(tmp_path):
    one = record([{"role": "user", "content": [{"type": "text", "text": "go"}], "name": None}])
    plain, path = record(user("go")), tmp_path / "x.json"
    forms = [json.dumps([one, one | {"id": "s"}], indent=2), json.dumps([one, one | {"id": "s"}])]
    forms += [json.dumps(one) + "\n" + json.dumps(one | {"id": "s", "call": None})]
    for text in forms:
        path.write_text(text)
        samples = to_samples(path)
        assert samples == {i: ttsi.to_sample(plain | {"id": i}) for i in "rs"}, text[:20]
    path.write_text(json.dumps([one, {"id": 2}]))
    with pytest.raises(ttsi.InputError, match=f"{path}:2: no tools"):
        to_samples(path)


PLACES = [({"tools": [FLIGHT[0], {"parameters": {}}]}, r"tools\[1\]: no \"name\"")]
PLACES += [({"messages": [*ASKED, {"content": "x"}]}, r"messages\[1\]")]
PLACES += [({"messages": user([{"type": "image_url"}])}, r"messages\[0\].*content.*text")]
PLACES += [({"messages": [*ASKED, {"role": "gpt", "tool_calls": [{}]}]}, r"messages\[1\]: a call")]


@pytest.mark.parametrize("change,place", PLACES)
def test_messages_name_the_place_of_the_fault(change, place):
    with pytest.raises(ttsi.InputError, match=place):
        ttsi.to_sample(record() | change)


SPELLED = [
    '{"name": "f", "parameters": {"x": true}}',
    '{"name": "f", "arguments": "{\\"x\\": true}"}',
]
SPELLED += [
    '{"name": "f", "arguments": {"x": True, "y": None}}',
    '{"name": "f", "input": {"x": "True"}}',
]
SPELLED += ['{"thought": "x", "action": {"name": "f", "arguments": {"x": true}, "function": "go"}}']
SPELLED += ['{"function": {"name": "f", "arguments": {"x": true, "y": null}}}']


@pytest.mark.parametrize("text", SPELLED)
def test_an_answer_means_what_it_says(text):
    gold = {"call": {"name": "f", "arguments": {"x": True}}, "accept": {"x": ["no"]}}
    assert ttsi.grade(text, gold) == {"name": True, "call": True}, "a label is right by itself"
    for other in ('{"name": 7} ' + text, '{"city": {"name": "Bob"}} ' + text):
        assert ttsi.grade(other, gold)["call"], "an object that is no call is passed over, whole"
    text = '{"name": "f", "arguments": {"x": "say True, or None"}}'
    assert ttsi.parse(text)[0]["arguments"]["x"] == "say True, or None", "inside of a string"


# --------------------------------------------------------------------------- what G does with them
def test_a_copy_of_any_turn_is_refused_whatever_stands_around_it(tok):
    first = "Please cancel my flight to Oslo."
    turns = [*user(first), {"role": "assistant", "content": "When?"}, *user("On Monday")]
    x = ttsi.prepare(tok, record(turns), FIRST)
    texts = [first, "Hello! " + first, "on monday", f"user: {first}\nassistant: When?"]
    texts += [first.replace("Please", "\uff30lease"), "Q: " + first.upper()]
    for text, free in [(text, False) for text in texts] + [("On Monday morning", True)]:
        for cfg in (FIRST, config(check=False)):
            verdict = ttsi.fault({"request": text, "call": OSLO_CALL}, [], x, cfg)
            assert (verdict != "copy of the request") == free, f"{text}: {verdict}"


def test_the_closest_draft_is_found_without_blanks(tok):
    texts = ["今天天气怎么样", "请取消我去奥斯陆的航班", "播放一首歌"]
    drafts = [{"verdict": "kept", "pair": {"request": text}} for text in texts]
    assert ttsi.closest(drafts, "帮我取消去罗马的航班")[0]["request"] == texts[1]


def test_a_pair_with_an_invented_value_comes_behind_the_others(llama, tok):
    texts = [pair("cancel my flight, please", "cancel_flight", city="Lima")]
    texts += [pair("drop what goes to Oslo", "cancel_flight", city="Oslo")]
    got = run(llama, tok, SAMPLES[1:2], {"b": texts}, k=2, check=True)["b"]
    assert [d["verdict"] for d in got["drafts"]] == [ttsi.UNSAID, "kept"]
    assert got["pairs"] == texts[::-1], "not behind, though it is closer"


@pytest.mark.parametrize("end", ["}", "} {", '}, "more": 1}', "\n\n"])
def test_a_draft_that_says_a_key_twice_or_writes_on_is_a_fault(llama, tok, end):
    x = ttsi.prepare(tok, SAMPLES[1], FIRST)
    good = json.dumps(pair("drop what goes to Oslo", "cancel_flight", city="Oslo"))
    verdict = ttsi.judge(good + end, [], x, FIRST)["verdict"]
    assert verdict == ("kept" if end.isspace() else JUNK)
    twice = good.replace('{"city": "Oslo"}', '{"city": "Rome", "city": "Oslo"}')
    assert ttsi.judge(twice, [], x, FIRST)["pair"] is None, "which of the two?"


ENDS = [('{"name": "f', True), ("Sure! " * 50, True), ("Sure! ", False), ('{"call": {"na', False)]
ENDS += [('{ "req', False), ('{"request": "x", "call": 7}', True), ('{"call": nonsense, ', True)]
ENDS += [('{"call": {"name": "f", "arguments": {"x": True, "y": None}}, "re', False)]
ENDS += [("{x y", True), ("{", False), ('{"call": {}}', True), ('{"request": "so {', False)]


@pytest.mark.parametrize("text,over", ENDS)
def test_a_draft_ends_where_it_can_become_no_pair(text, over):
    assert ttsi.draft_over(text) == over


def test_a_hopeless_draft_is_not_written_on(llama, tok, monkeypatch):
    x, (_, tools, _) = begin(llama, tok, SAMPLES[0])
    seen = []
    monkeypatch.setattr(ttsi, "draft_over", lambda text: seen.append(text) or len(seen) > 5)
    cfg, before = config(drafts=1, max_new_tokens=40), ttsi.Prefix.tokens
    ttsi.generate(llama, tok, x, tools, {}, cfg)
    asked = tok(prompt(tok, x, ttsi.DRAFT + x.request)).input_ids
    assert ttsi.Prefix.tokens - before == len(asked) - 1 - x.head + 6, "not six tokens, but more"


def test_a_hopeless_model_is_told_of_once_and_the_run_goes_on(loaded, monkeypatch, capsys):
    scripted(monkeypatch, itertools.repeat("junk"))
    argv = ["--limit", "7", "--tau", "2", "--attempts", "1", "--drafts", "1"]
    summary = ttsi.main(argv)
    told = capsys.readouterr()
    assert (told.out + told.err).count("--teacher, --pairs") == 1, "what helps is not said"
    assert summary["decisions"] == {"no pair": 7}


# ------------------------------------------------------------------- the template's own tool form
CALLS = "{% for c in m.tool_calls %}CALL{% endfor %}"
JSONS = '{"name": {{ c.function.name | tojson }}, "KEY": {{ c.function.arguments | tojson }}}'
TURNS = "{% set ns = namespace(u=0) %}{% for m in messages %}{% if m.role == 'user' %}"
TURNS += "{% set ns.u = loop.index0 %}{% endif %}{% endfor %}FIRST{% for m in messages %}"
TURNS += "{% if m.tool_call_id is defined and m.tool_call_id | length != 9 %}"
TURNS += "{{ raise_exception('nine characters') }}{% endif %}"  # as Mistral's does
TURNS += "<{{ m.role }}>TOOLS{{ m.content }}" + CALLS + "</s>\n{% endfor %}"
TURNS += "{% if add_generation_prompt %}<assistant>{% endif %}"


def native(first="", inside="", call=JSONS, key="arguments"):
    parts = {"FIRST": first, "TOOLS": inside, "CALL": call, "KEY": key}
    return functools.reduce(lambda text, part: text.replace(*part), parts.items(), TURNS)


ALL_TOOLS, IN_USER = (
    "{{ tools | tojson }}",
    "{% if loop.index0 == ns.u %}{{ tools | tojson }}{% endif %}",
)
XML = "<f={{ c.function.name }}>{{ c.function.arguments | tojson }}</f>"
OWN = {"first": native(ALL_TOOLS), "parameters": native(ALL_TOOLS, key="parameters")}
OWN |= {"in the last user message": native(inside=IN_USER)}
OURS = {"no tools": native(), "calls are no JSON": native(ALL_TOOLS, call=XML)}
OURS |= {
    "no call": native(ALL_TOOLS, call=""),
    "thinks first": native(ALL_TOOLS, call="<t>" + JSONS),
}
OURS["thinks first"] = OURS["thinks first"].replace("<assistant>{% endif", "<assistant><u>{% endif")
SYSTEM_TURN = {"role": "system", "content": "Be brief."}
EARLIER = [
    *user("book it"),
    {"role": "assistant", "content": "", "tool_calls": [{"function": AS_TEXT}]},
]
EARLIER += [{"role": "tool", "content": '{"ok": 1}', "tool_call_id": "call_1"}]


def is_native(tok):
    """Everything that the method reads is what the template gives for turns, tools and calls."""
    sample = ttsi.to_sample(record([SYSTEM_TURN, *EARLIER, *user("cancel my flight to Rome")]))
    x, how = ttsi.prepare(tok, sample, config(shuffle=False)), {"enable_thinking": False}
    how |= {"tools": [{"type": "function", "function": t} for t in FLIGHT], "return_dict": True}
    start = {"add_generation_prompt": True} | how

    def called(turns, name, **arguments):
        function = {"name": name, "arguments": arguments}
        answer = {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}
        return tok.apply_chat_template([*turns, answer], **how).input_ids

    assert x.ids == tok.apply_chat_template(sample["messages"], **start).input_ids, "the prompt"
    for t, (ids, at) in zip(x.tools, x.candidates, strict=True):
        want = called(sample["messages"], t["name"])
        assert ids == want[: len(ids)] and at >= len(x.ids), f"{t['name']}: not as it is called"
        assert tok.decode(ids[at:]).startswith(t["name"] + '"'), "cut inside a name"
    ids, at = ttsi.pair_span(x, PAIRS["b"][0])
    turns = [SYSTEM_TURN, *user("book Oslo")]
    assert ids == called(turns, "book_flight", city="Oslo", days=3), "what is trained on"
    assert ids[:at] == tok.apply_chat_template(turns, **start).input_ids, "and where it begins"
    assert ttsi.to_call(ttsi.parse(tok.decode(ids[at:]))[0]) == PAIRS["b"][0]["call"]
    return x


@pytest.mark.parametrize("kind", OWN)
def test_the_templates_own_tool_form(tok, kind):
    tok = templated(tok, OWN[kind])
    x = is_native(tok)
    assert ("book_flight" in tok.decode(x.ids[: x.head])) == ("last" not in kind)
    model = tiny(tok)
    for adapt in ("suffix", "full"):
        agrees(model, tok, SAMPLES[1], PAIRS["b"], config(ALWAYS, adapt=adapt, lr=5e-3))


def test_a_template_that_wants_what_a_tool_lacks(tok):
    wanting = "{% for t in tools %}{{ t.function.name + ': ' + t.function.description }}"
    wanting += (
        "{% for p in t.function.parameters.properties | items %}{{ p }}{% endfor %}{% endfor %}"
    )
    tok = templated(tok, native(wanting))
    x = ttsi.prepare(tok, SAMPLES[1] | {"tools": [{"name": "now"}, *FLIGHT]}, FIRST)
    assert "now: " in tok.decode(x.ids) and "does book_flight" in tok.decode(x.ids)


@pytest.mark.parametrize("kind", OURS)
def test_a_template_without_a_usable_tool_form_gets_ours(tok, kind, tmp_path):
    tok = templated(tok, OURS[kind])
    assert not ttsi.takes_tools(tok) and ttsi.prepare(tok, SAMPLES[1], FIRST).ids
    folder = saved(tiny(tok), tok, tmp_path / "m")
    assert "our tool prompts" in ttsi.describe(*ttsi.load(folder, FIRST), FIRST)
    with pytest.raises(ttsi.InputError, match="takes no tools"):
        ttsi.load(folder, config(prompt="native"))


def test_a_real_template_with_tools(real):
    if "qwen" not in real.name_or_path:
        assert not ttsi.takes_tools(real), "it ignores tools"
        return
    x = is_native(real)
    assert "book_flight" in real.decode(x.ids[: x.head]), "one prefix of tools serves all stages"
    answer = '<tool_call>\n{"name": "cancel_flight", "arguments": {"city": "Rome"}}\n</tool_call>'
    assert ttsi.grade(answer, SAMPLES[1]) == {"name": True, "call": True}
    said = [*user("cancel it"), {"role": "assistant", "content": "I will."}]
    assert (
        ttsi.prepare(real, record(said), FIRST).ids
        == ttsi.prepare(real, record(said[:1]), FIRST).ids
    )
    ours = ttsi.prepare(real, SAMPLES[1], config(prompt="ours"))
    assert "<tools>" not in real.decode(ours.ids), "--prompt ours"


def merging(spans, prefix=""):
    """A tokenizer in the manner of SentencePiece, which joins what follows the prompt's end."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(split=False)
    made.decoder = tokenizers.decoders.Metaspace()
    letters = [chr(i) for i in range(33, 127)] + ["\n"]
    how = {"special_tokens": ["<unk>", "<end>"], "initial_alphabet": letters}
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=len(letters) + 4, **how)
    made.train_from_iterator(spans * 9, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")


@pytest.mark.parametrize("adapt", ["suffix", "full"])
def test_training_and_scores_are_where_decoding_can_be(adapt):
    tok = templated(merging([":{"]), ALL.replace("[", "").replace("]", "") + "Answer:")
    x = ttsi.prepare(tok, SAMPLES[1], FIRST)
    assert ":{" in tok.tokenize("Answer:{"), "the vocabulary is not what it is meant to be"
    for ids, _ in [*x.candidates, ttsi.pair_span(x, PAIRS["b"][0])]:
        text = tok.decode(ids)
        assert text.count("Answer:{") == 1 and "Answer: {" not in text, "other text than decoding's"
    assert all(ids[: len(x.ids)] == x.ids for ids, _ in x.candidates), "decoding is not there"
    got = ttsi.tt_si(tiny(tok), tok, SAMPLES[1], config(ALWAYS, adapt=adapt), PAIRS["b"])
    assert got.decision == "adapted" and len(got.loss) == 2


def test_candidates_are_scored_from_one_place_on():
    tok = templated(merging(['"_']), ALL)
    x = ttsi.prepare(tok, SAMPLES[1] | {"tools": [tool("_private"), tool("get")]}, FIRST)
    texts = [[tok.decode(i) for i in ids[begin:]] for ids, begin in x.candidates]
    assert sorted(part[0] for part in texts) == ['"', '"_'], "the quote opens both, or none merges"


COLLAPSING = "{% for m in messages %}[{{ m.content.split() | join(' ') }}]{% endfor %}"


def test_a_template_that_collapses_blanks_costs_no_draft(embedded):
    model, tok = embedded[0], templated(embedded[1], COLLAPSING)
    sample = next(iter(to_samples().values()))
    got = ttsi.tt_si(model, tok, sample, config(tau=2.0))
    assert got.logp and not any("template" in d["verdict"] for d in got.drafts), got.drafts


def test_no_prompt_tells_the_day(tok):
    dated = templated(tok, ALL + "{{ strftime_now('%d %B %Y, %-d %b') }}")
    assert ttsi.render(dated, FIRST, GET, user("hi"))[0].endswith("01 January 2026, 1 Jan")


# ------------------------------------------------------------------------------ models as they are
class Router(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x), "routed"


def test_a_layer_whose_output_is_a_tuple_is_left_alone(llama):
    model = copy.deepcopy(llama)
    layer = model.model.layers[0].mlp.gate_proj
    layer.__class__ = Router
    x = torch.randn(1, 3, 32)
    with ttsi.temporary_lora(model, FIRST, ttsi.draw(1)) as lora:
        for p in lora:
            p.data.normal_()
        got, mark = layer(x)
    assert torch.equal(got, torch.nn.functional.linear(x, layer.weight)) and mark == "routed"


def test_what_is_not_adapted_is_counted(llama, tok):
    model = copy.deepcopy(llama)
    model.vision_tower = torch.nn.Sequential(torch.nn.Linear(32, 32))
    told = ttsi.describe(model, tok, FIRST)
    assert len(ttsi.linear_layers(model)) == len(ttsi.linear_layers(llama)) == 14
    assert "LoRA on 14 linear layers" in told and "1 Embedding" in told and "2 Linear" in told


# --------------------------------------------------------------------------------- nothing is lost
def test_killed_at_random_moments_a_run_goes_on(tmp_path):
    path, r, kills = tmp_path / "run.jsonl", random.Random(0), 0
    argv, _ = (*SHORT, "--output", path), python(tmp_path, "--k", 0)  # imports, once
    began = time.time()
    assert python(tmp_path, *argv, first=fsync_slowly)[0] == 0
    whole, seconds = timeless(path), time.time() - began
    path.unlink()
    while kills < (50 if SLOW else 2):
        child = start(tmp_path, *argv, first=fsync_slowly)
        child.join(r.uniform(0, seconds))
        child.kill()
        child.join()
        kills += child.exitcode == -signal.SIGKILL
        if child.exitcode == 0:
            assert timeless(path) == whole, "other rows than an uninterrupted run"
            path.unlink()
    assert python(tmp_path, *argv)[0] == 0
    assert timeless(path) == whole and len(whole) == 4, "other rows than an uninterrupted run"


def test_interrupted_it_ends_with_the_table_so_far(tmp_path):
    path = tmp_path / "run.jsonl"
    child = start(tmp_path, "--output", path, first=heed_interrupts)
    while not (path.exists() and path.read_bytes()):
        assert child.is_alive(), (tmp_path / "err").read_text()
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGINT)
    child.join(60)
    n, out = len(read(path)), (tmp_path / "out").read_text()
    assert child.exitcode == 130 and "Traceback" not in (tmp_path / "err").read_text()
    assert re.search(TABLE.format(n), out) and n < 100, "no table of what is there"


def test_an_interrupt_in_training_leaves_the_base_as_it_was(loaded, embedded, monkeypatch):
    before = digest(embedded[0])
    monkeypatch.setattr(torch.autograd, "grad", torch.autograd.grad)  # to be taken back
    fail_at_a_gradient(4, KeyboardInterrupt())  # in the second sample
    with pytest.raises(KeyboardInterrupt), contextlib.redirect_stdout(io.StringIO()) as told:
        ttsi.main([*map(str, SHORT), "--tau", "2"])
    assert digest(embedded[0]) == before and not hooks(embedded[0]), "not reset"
    assert re.search(TABLE.format("[1-3]"), told.getvalue()), "no table of what is there"


def test_rows_are_on_disk_before_the_next_sample(loaded, tmp_path, monkeypatch):
    def looking(*args):
        seen.append((len(read(path)), path.stat().st_size in synced))
        return keep(*args)

    path, keep, fsync, seen, synced = tmp_path / "run.jsonl", ttsi.tt_si, os.fsync, [], []
    monkeypatch.setattr(ttsi, "tt_si", looking)
    monkeypatch.setattr(os, "fsync", lambda fd: (fsync(fd), synced.append(os.fstat(fd).st_size)))
    quiet(*BRIEF, "--output", path)
    assert seen == [(n, True) for n in range(4)], "a row, or a byte of it, is not on the disk"


def ends_early(folder, first, *argv):
    """A run that ends with the table and one line -> this; the same command goes on."""
    path = folder / "run.jsonl"
    code, out, err = python(folder, *argv, "--output", path, first=first)
    rows = [row for row in path.read_bytes().splitlines(keepends=True) if row.endswith(b"\n")]
    assert code == 1 and 0 < len(rows) < 4 and "Traceback" not in err, err
    assert re.search(TABLE.format(f"[{len(rows)}{len(rows) + 1}]"), out), "no table"
    quiet(*argv, "--output", path)
    assert path.read_bytes().startswith(b"".join(rows)), "rows that were there are lost"
    assert len(read(path)) == 4 and not [*folder.glob("*part")], "it does not go on"
    return err.splitlines()[-1]


def test_a_full_disk_ends_with_one_line_and_keeps_what_is_there(loaded, tmp_path):
    full = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (3000, 3000))  # two rows
    assert ends_early(tmp_path, full, *SHORT).startswith("ttsi: [Errno 27] File too large")


MEMORY = [None, MemoryError("no memory"), torch.OutOfMemoryError("CUDA out of memory.")]


@pytest.mark.parametrize("error", [MEMORY[0], *(pytest.param(e, marks=slow) for e in MEMORY[1:])])
def test_out_of_memory_is_one_line_and_the_rows_stay(loaded, tmp_path, error):
    full = functools.partial(fail_at_a_gradient, 3, error)
    last = ends_early(tmp_path, full, *SHORT, "--tau", 2)
    assert last.startswith("ttsi: ") and "memory" in last


def test_a_file_is_replaced_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "x"
    ttsi.save(path, ["one", "two"])
    with monkeypatch.context() as m, pytest.raises(ZeroDivisionError):
        m.setattr(os, "fsync", lambda _: 1 / 0)
        ttsi.save(path, ["three"])
    assert path.read_bytes() == b"one\ntwo\n", "neither the old nor the new file is there"
    ttsi.save(path, ["three"])
    ttsi.save(path, ["four"], "a")
    assert path.read_bytes() == b"three\nfour\n" and list(tmp_path.iterdir()) == [path]


def test_a_vanished_directory_ends_with_one_line_and_the_table(loaded, tmp_path, monkeypatch):
    path, keep = tmp_path / "new/run.jsonl", ttsi.tt_si
    vanish = {"demo-002": functools.partial(shutil.rmtree, path.parent)}
    monkeypatch.setattr(ttsi, "tt_si", lambda *a: vanish.get(a[2]["id"], int)() or keep(*a))
    gone = pytest.raises(OSError, match="No such file or directory: .*new/run.jsonl")
    with gone, contextlib.redirect_stdout(io.StringIO()) as told:
        ttsi.main([*map(str, BRIEF), "--output", str(path)])
    assert re.search(TABLE.format(3), told.getvalue()), "what was computed is lost"


def test_bad_input_ends_with_exit_code_2_and_other_errors_with_their_traceback(tmp_path):
    code, out, err = python(tmp_path, "--k", 0)
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("ttsi: --k 0: "), err
    broken = functools.partial(fail_at_a_gradient, 1, RuntimeError("shapes differ"))
    code, _, err = python(tmp_path, *SHORT, first=broken)
    assert code == 1 and "Traceback" in err and "RuntimeError: shapes differ" in err


def as_ranks(monkeypatch, world, *argv):
    """-> what each of the processes runs"""
    keep, ran = ttsi.tt_si, [[] for _ in range(world)]
    for rank, seen in enumerate(ran):
        with monkeypatch.context() as m:
            m.setenv("RANK", str(rank))
            m.setenv("WORLD_SIZE", str(world))
            m.setattr(ttsi, "tt_si", lambda *a, seen=seen: seen.append(a[2]["id"][-1]) or keep(*a))
            assert "TT-SI" not in quiet(*argv)[1], "no table of a part"
    return ["".join(seen) for seen in ran]


def test_ranks_share_the_samples_and_one_process_merges_their_rows(loaded, tmp_path, monkeypatch):
    path, one, argv = tmp_path / "run.jsonl", tmp_path / "one.jsonl", (*SHORT, "--limit", 7)
    with pytest.raises(ttsi.InputError, match="--output"):
        as_ranks(monkeypatch, 2, *argv)
    quiet(*argv, "--output", one)
    assert as_ranks(monkeypatch, 2, *argv, "--output", path) == ["0246", "135"], "n mod 2"
    for cut in tmp_path.glob("run.rank*"):
        cut.write_bytes(b"".join(cut.read_bytes().splitlines(keepends=True)[:2]) + b'{"id": "d')
    there = {line[15] for cut in tmp_path.glob("run.rank*") for line in cut.open() if "}" in line}
    ran = "".join(as_ranks(monkeypatch, 3, *argv, "--output", path))
    assert sorted(ran) == sorted({*"0123456"} - there), "a row is lost, or made again"
    monkeypatch.setattr(ttsi, "tt_si", lambda *_: 1 / 0)  # nothing is run again
    _, text = quiet(*argv, "--output", path)
    assert timeless(path) == timeless(one) and re.search(TABLE.format(7), text)
    assert len(list(tmp_path.glob("run*"))) == 2, "files of ranks are left"


@slow
def test_torchrun(tmp_path):
    path, one = tmp_path / "run.jsonl", tmp_path / "one.jsonl"
    argv = [str(a) for a in (HERE / "ttsi.py", *SHORT, "--output", path)]
    for ranks in (["-m", "torch.distributed.run", f"--nproc-per-node={n}"] for n in (2, 3)):
        subprocess.run([sys.executable, *ranks, *argv], check=True)
    assert len(list(tmp_path.glob("run.rank?of?.jsonl"))) == 5
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True)
    assert done.returncode == 0 and re.search(TABLE.format(4), done.stdout), done.stderr
    quiet(*SHORT, "--output", one)
    for a, b in zip(read(path), read(one), strict=True):
        assert (a["id"], a["answer"], a["pairs"]) == (b["id"], b["answer"], b["pairs"])


HOSTILE = [(hostile_data, 500, 25), (hostile_pairs, 150, 10)]
HOSTILE += [(hostile_flags, 200, 15), (hostile_model, 150, 6)]


@pytest.mark.parametrize("kind,n,few", HOSTILE)
def test_hostile_input_is_refused_in_lines_that_name_the_place_or_goes_through(
    embedded, tmp_path, monkeypatch, kind, n, few
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    load, before, refused = ttsi.load, digest(embedded[0]), 0
    for seed in range(n if SLOW else few):
        argv, place = kind(random.Random(seed), tmp_path)
        case = f"{kind.__name__}, seed {seed}: {argv}"
        other = re.search("--(model|teacher|device|dtype)", case)
        monkeypatch.setattr(ttsi, "load", load if other else lambda *_: embedded)
        try:
            summary, _ = quiet(*BRIEF, "--limit", 1, "--tau", 2, *argv)
            assert summary["samples"]["all"] == 1 or kind is hostile_flags, f"{case}: it is lost"
        except ttsi.InputError as e:
            lines = str(e).replace("a\nb", "").count("\n")
            assert re.match(place, str(e)) and not lines, f"{case}: {place} is not in {e}"
            refused += 1
        except BaseException as e:
            raise AssertionError(case) from e
    assert 0 < refused < n and digest(embedded[0]) == before


@pytest.mark.parametrize("offline", [True, pytest.param(False, marks=slow)])
def test_the_default_run_opens_no_socket(tmp_path, offline):
    refuse = functools.partial(refuse_sockets, offline)
    code, out, err = python(tmp_path, "--limit", 3, first=refuse)
    assert code == 0 and re.search(TABLE.format(3), out), err
    probe = functools.partial(refuse_sockets, offline, socket.socket)
    assert python(tmp_path, "--limit", 1, first=probe)[0] == 1, "the hook sees none"


def test_a_model_brings_weights_in_safetensors_and_no_code(tok, tmp_path):
    model, good = tiny(tok), tmp_path / "good"
    assert ttsi.load(saved(model, tok, good), ttsi.Config())
    pickled, coded, partly = (shutil.copytree(good, tmp_path / n) for n in ("pkl", "code", "part"))
    (pickled / "model.safetensors").unlink()
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    (coded / "code.py").write_text(f"open({str(tmp_path / 'hacked')!r}, 'w')\n")
    auto = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M", "AutoTokenizer": ["c.T"] * 2}
    for name in ("config.json", "tokenizer_config.json"):
        conf = {"model_type": "x", "tokenizer_class": "T", "auto_map": auto}
        (coded / name).write_text(json.dumps(json.loads((coded / name).read_text()) | conf))
    weights = safetensors.torch.load_file(good / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    safetensors.torch.save_file(weights, partly / "model.safetensors", {"format": "pt"})
    conf = transformers.MambaConfig(vocab_size=len(tok), hidden_size=32, num_hidden_layers=1)
    mamba = saved(transformers.MambaForCausalLM(conf), tok, tmp_path / "mamba")  # no plain cache
    for folder, why in (pickled, "safetensors"), (coded, "code"), (partly, "up_proj"), (mamba, ""):
        with pytest.raises(ttsi.InputError, match=f"^{folder}: cannot be loaded.*{why}") as e:
            ttsi.load(str(folder), ttsi.Config())
        assert "\n" not in str(e.value) and not (tmp_path / "hacked").exists(), "its code was run"


def test_imports_and_layout():
    source = (HERE / "ttsi.py").read_text()
    found = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Import | ast.ImportFrom)]
    names = {(getattr(n, "module", None) or n.names[0].name).split(".")[0] for n in found}
    required = (HERE / "requirements.txt").read_text().split()
    assert [re.split(r"\W", line)[0] for line in required] == ["torch", "transformers", "tqdm"]
    assert names - {*sys.stdlib_module_names} <= {"torch", "transformers", "tqdm"}, "one more"
    assert len(source.splitlines()) <= 1169, "ttsi.py has grown; 800 lines is what it should have"
    top = {"ttsi.py", "test_ttsi.py", "requirements.txt", "README.md", "LICENSE", "data", ".ci"}
    if (HERE / ".git").exists():
        tracked = subprocess.run(["git", "ls-files"], cwd=HERE, capture_output=True, text=True)
        found = {Path(name).parts[0] for name in tracked.stdout.splitlines()}
        assert found <= top | {".gitignore"}, "something else lies at the top level"


def test_the_embedded_model_has_its_own_data_however_its_folder_is_named(monkeypatch):
    monkeypatch.chdir(HERE)
    assert ttsi.Config(model="data/model/").data == ttsi.Config().data == str(DEMO)
    assert ttsi.Config(model="model").data == str(HERE / "data" / "everyday.jsonl")


def test_import_has_no_side_effects(capfd, monkeypatch):
    def state():
        drawn = random.getstate(), torch.get_rng_state().tolist()
        return drawn, {**os.environ}, transformers.logging.get_verbosity()

    before = state(), monkeypatch.setattr(sys, "argv", ["x", "--nonsense"])
    assert runpy.run_path(str(HERE / "ttsi.py"))["Config"], "nothing was defined"
    assert (state(), None) == before and capfd.readouterr() == ("", ""), "it does something"


def test_splits_are_disjoint():
    splits = [read(HERE / f"data/{split}.jsonl") for split in ("dev", "demo", "test")]
    assert [len(rows) for rows in splits] == [200, 100, 500]
    tools = [{t["function"]["name"] for row in rows for t in row["tools"]} for rows in splits]
    assert not any(a & b for a, b in itertools.combinations(tools, 2)), "a tool is in two"


def test_the_trace_in_the_readme_is_what_a_run_says(loaded):
    shown = re.search(r"```\n(-- prompt.*?)```", (HERE / "README.md").read_text(), re.S)[1]
    _, said = quiet("--trace", "demo-067")
    said = re.sub(r"-?\d+\.\d{4,}", lambda m: f"{float(m[0]):.3f}", said)
    for line in shown.splitlines():
        for part in re.split(r"\.\.\.|  +", re.sub(r"^(-- \w+) .*", r"\1", line)):
            assert part in said, f"{part} is not said, or earlier"
            said = said[said.index(part) :]


def test_readme_commands_and_example():
    readme = (HERE / "README.md").read_text()
    install = "pip install -r requirements.txt && python ttsi.py"
    for command in (install, "pip install pytest && python -m pytest -q"):
        marked = f"\n<!-- ci -->\n```\n{command}\n```\n"
        assert readme.count(marked) == 1, "ci runs these two lines out of the README"
    example = re.search(r"```python\n(.*?)```", readme, re.S)[1]
    with contextlib.redirect_stdout(io.StringIO()) as text:
        exec(compile(example, "README.md", "exec"), {})
    assert text.getvalue().strip()


def test_what_the_readme_promises_names_tests_that_exist():
    source = Path(__file__).read_text() + (HERE / "data/test_tools.py").read_text()
    readme = (HERE / "README.md").read_text() + (HERE / "data/README.md").read_text()
    named = {*re.findall(r"`(test_\w+)`", readme)}
    missing = [name for name in named if f"\ndef {name}(" not in source]
    assert named and not missing, f"{missing}: no such test"


FILES = ["seal-tools/canonical_294", "toolalpaca/canonical_real", "bfcl/canonical_multiple"]
FILES += ["bfcl/canonical_simple_python", "api-bank/canonical_l1", "api-bank/canonical_l2"]


@pytest.mark.parametrize("name", FILES)
def test_real_data_goes_through(loaded, tmp_path, name):
    path = SHARED / "benchmarks" / f"{name}.jsonl"
    if not path.exists():
        pytest.skip("the benchmarks are not beside this checkout")
    samples, rows = list(to_samples(path).values()), []
    for sample, other in zip(samples, samples[1:] + samples[:1], strict=True):
        given = {"request": f"Another {other['id']}, please.", "call": other["call"]}
        rows.append(json.dumps({"id": sample["id"], "pairs": [given]}))  # only to exercise T
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    n = min(30, len(samples)) if SLOW else 2  # all of them are read
    argv = ["--data", path, "--pairs", tmp_path / "pairs.jsonl", "--no-check", "--tau", 2]
    summary, _ = quiet(*argv, "--max-new-tokens", 24, "--epochs", 1, "--limit", n)
    refused = sum(v for key, v in summary["decisions"].items() if "not answered" in key)
    assert summary["samples"]["labelled"] == n, "a sample is lost"
    assert summary["decisions"]["adapted"] + refused == n, "T was not reached"
