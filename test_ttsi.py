"""Each test compares ttsi.py with something that shares no code with it: a closed form, brute
force, an invariant. Long cases run with SLOW=1; what lies beside ttsi.py: data/test_tools.py.
"""

import ast
import contextlib
import copy
import dataclasses
import errno
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

import huggingface_hub.constants
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers

import ttsi

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / "shared"
DEMO = HERE / "data/demo.jsonl"
slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="long; runs with SLOW=1")


def few(n, all_of_them):
    return all_of_them if os.environ.get("SLOW") else n


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
CANCEL = {"name": "cancel_flight", "arguments": {"city": "Rome"}}
SAMPLES = [  # ragged tool lists; names that begin one another; one with a single tool
    ask("a", "get them all", {"name": "get", "arguments": {}}, *GET),
    ask("b", "cancel my flight to Rome, would you, please", CANCEL, *FLIGHT),
    ask("c", "hm", {"name": "only", "arguments": {}}, tool("only")),
]
PAIRS = {
    "a": [pair("fetch x", "get_all", x="x"), pair("a longer one for 7", "get_all_users", y=7)],
    "b": [pair("book Oslo", "book_flight", city="Oslo", days=3)],
    "c": [],
}
FIRST = ttsi.Config(max_new_tokens=12, attempts=1, drafts=1)
ALWAYS = dataclasses.replace(FIRST, tau=2.0, k=2, check=False, epochs=2)

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "max_position_embeddings": 2048}
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 8}
WINDOW = GROUPED | {"sliding_window": 16}
OPT = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
KINDS = {  # configuration, linear layers but the head
    "Llama": (GROUPED, 14),
    "GPT2": ({"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 2048}, 8),
    "Mistral": (WINDOW, 14),
    "Gemma2": (WINDOW, 14),
    "Gemma3Text": (WINDOW, 14),
    "Qwen2": (SMALL | {"num_key_value_heads": 2}, 14),
    "Qwen3": (GROUPED, 14),
    "Phi3": (SMALL | {"num_key_value_heads": 2, "pad_token_id": None}, 8),
    "GPTNeoX": (SMALL, 8),
    "OPT": (OPT | {"word_embed_proj_dim": 32}, 12),
}


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
    return transformers.AutoTokenizer.from_pretrained(HERE / "data/model")


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
    """The embedded model is there already: runs load nothing."""
    monkeypatch.setattr(ttsi, "load", lambda *_: embedded)


def config(**changes):
    return dataclasses.replace(FIRST, **changes)


def templated(tok, template):
    tok = copy.deepcopy(tok)
    tok.chat_template = template
    return tok


def vocabulary(kind):
    """Small, as real ones are: blanks in front of words, quotes glued to names, bytes alone."""
    texts = [json.dumps(part) for s in SAMPLES for part in (*s["tools"], s["call"], s["call"])]
    pre, post = tokenizers.pre_tokenizers, tokenizers.decoders
    special, alphabet = ["<end>", "<unk>"], pre.ByteLevel.alphabet()
    core = tokenizers.models.BPE(byte_fallback=kind == "sentencepiece-like", unk_token="<unk>")
    made = tokenizers.Tokenizer(core)
    if kind == "sentencepiece-like":
        made.pre_tokenizer = pre.Metaspace(prepend_scheme="first")
        parts = [post.Replace("\u2581", " "), post.ByteFallback(), post.Fuse()]
        made.decoder = post.Sequence([*parts, post.Strip(" ", 1, 0)])
        special, alphabet = special + [f"<0x{i:02X}>" for i in range(256)], []
    else:
        glue = [pre.Split(" ", "merged_with_next")] if kind == "glued quotes" else []
        plain = pre.ByteLevel(add_prefix_space=False, use_regex=kind == "byte-level")
        made.pre_tokenizer, made.decoder = pre.Sequence([*glue, plain]), post.ByteLevel()
    texts = ["}/" * 9] if kind == "merging" else texts * 2
    how = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    size = 259 if kind == "merging" else 900
    made.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(vocab_size=size, **how))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")


# ----------------------------------------------------- oracles: no cache, no padding, no hooks


def begin(model, tok, sample, cfg=FIRST):
    """-> x, and the prefixes that it may continue: nothing, the tools, the prompt."""
    x = ttsi.prepare(model, tok, sample, cfg)
    tools = ttsi.Prefix(model, x.ids[: x.head])
    return x, [ttsi.Prefix(model, []), tools, ttsi.Prefix(model, x.ids[:-1], tools)]


def joined(tok, x, request, answer, at=0):
    """-> (ids of prompt and answer in one, the first token that reaches into answer[at:])."""
    text = ttsi.render(tok, x.system, request)[0]
    ids = tok(text + answer, add_special_tokens=False).input_ids
    lengths = (len(tok.decode(ids[: n + 1])) for n in range(len(ids)))
    return ids, next(n for n, length in enumerate(lengths) if length > len(text) + at)


def naive_logp(model, ids, begin):
    """log P of ids[begin:], in one forward pass over all of them."""
    logp = model(torch.tensor([ids])).logits[0, begin - 1 : -1].float().log_softmax(-1)
    return logp[range(len(ids) - begin), ids[begin:]].sum()


def naive_score(model, tok, x, name):
    """log P of a name and what closes it, by where decoding sets the tokens of a whole answer."""
    answer, opening = json.dumps({"name": name, "arguments": {}}), len('{"name": "')
    ids, first = joined(tok, x, x.request, answer, opening)
    _, quote = joined(tok, x, x.request, answer, opening + len(name))
    return naive_logp(model, ids[: quote + 1], first).item()


def naive_greedy(model, tok, ids, n):
    """The text that comes of reading everything again for each token."""
    ids, start = list(ids), len(ids)
    for _ in range(n):
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        text = tok.decode(ids[start:], skip_special_tokens=True)
        if ids[-1] == tok.eos_token_id or ttsi.parse(text):
            break
    return text


class Wrapped(torch.nn.Module):
    """A linear layer with a LoRA on all but the first tokens."""

    def __init__(self, layer, A, B, scale, skip):
        super().__init__()
        self.layer, self.A, self.B, self.scale, self.skip = layer, A, B, scale, skip

    def forward(self, x):
        seen = (torch.arange(x.shape[-2]) >= self.skip)[:, None]
        return self.layer(x) + self.scale * seen * (x @ self.A @ self.B)


def wrapped(model, lora, cfg, skip):
    """A copy of a model, each of its linear layers replaced."""
    model, scale = copy.deepcopy(model), cfg.lora_alpha / cfg.lora_rank
    for i, layer in enumerate(ttsi.linear_layers(model)):
        children = [(m, k, c) for m in model.modules() for k, c in m.named_children()]
        parent, key = next((m, k) for m, k, c in children if c is layer)
        setattr(parent, key, Wrapped(layer, *lora[2 * i : 2 * i + 2], scale, skip))
    return model


def naive_train(model, tok, x, pairs, cfg):
    """T, each pair a forward pass of its own -> (loss before each step, the adapted model)."""
    spans = [joined(tok, x, pair["request"], json.dumps(pair["call"])) for pair in pairs]
    shared = len(os.path.commonprefix([x.ids[: x.head], *(ids for ids, _ in spans)]))
    with ttsi.temporary_lora(model, cfg, ttsi.draw(cfg.seed, x.id, "adapter")) as lora:
        lora = [p.detach().clone().requires_grad_() for p in lora]
    model = wrapped(model, lora, cfg, shared if cfg.adapt == "suffix" else 0)
    losses, adamw = [], torch.optim.AdamW(lora, weight_decay=0.0)
    for step in range(cfg.epochs):
        parts = [-naive_logp(model, ids, at) / (len(ids) - at) for ids, at in spans]
        loss = sum(parts) / len(parts)
        gradients = torch.autograd.grad(loss, lora)
        norm = math.sqrt(sum((g**2).sum() for g in gradients))
        lr = cfg.lr * 0.5 * (1 + math.cos(math.pi * step / cfg.epochs))
        for p, g in zip(lora, gradients, strict=True):
            p.grad = g
            p.data -= lr * g / norm if cfg.optimizer == "sgd" else 0
        adamw.param_groups[0]["lr"] = lr
        adamw.step() if cfg.optimizer == "adamw" else None
        losses.append(loss.item())
    return losses, model


def to_samples(path):
    return ttsi.read_jsonl(path, ttsi.to_sample)


def run(model, tok, samples=SAMPLES, pairs=PAIRS, **changes):
    """Algorithm 1 -> {id: Result as a dict, but for the cost}; adapted is whatever has pairs."""
    cfg, found = dataclasses.replace(ALWAYS, **changes), {}
    for s in samples:
        given = None if pairs is None else pairs.get(s["id"], [])
        found[s["id"]] = dataclasses.asdict(ttsi.tt_si(model, tok, s, cfg, given))
        del found[s["id"]]["cost"]
    return found


def rows_of(model, tok, samples, cfg, pairs=None):
    results = [ttsi.tt_si(model, tok, s, cfg, pairs and pairs.get(s["id"])) for s in samples]
    return [ttsi.to_row(model, tok, s, r, cfg) for s, r in zip(samples, results, strict=True)]


def digest(model):
    parts = [p.contiguous().view(torch.uint8).numpy() for p in model.state_dict().values()]
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# ------------------------------------------------------------- runs, here or in another process

SHORT = ("--limit", 5, "--attempts", 1, "--drafts", 2, "--epochs", 2, "--max-new-tokens", 56)
BRIEF = (*SHORT[:-1], 12, "--limit", 4)  # too short for a draft
OTHERS = multiprocessing.get_context("forkserver")  # imports once
OTHERS.set_forkserver_preload(["test_ttsi"])


def quiet(*argv):
    with contextlib.redirect_stdout(io.StringIO()) as text:
        summary = ttsi.main([str(a) for a in argv])
    return summary, text.getvalue()


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def without_cost(rows):
    return [{k: v for k, v in row.items() if k != "cost"} for row in rows]


def timeless(path):
    return without_cost(read(path))


def program(folder, argv, first):
    torch.set_num_threads(1)
    for name, fd in (("out", 1), ("err", 2)):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    sys.argv = ["ttsi.py", *argv]
    if first:
        first()
    runpy.run_path(f"{HERE}/ttsi.py", run_name="__main__")


def start(folder, *argv, first=None):
    """A process that does as `python ttsi.py ARGV` does, once it has called `first`."""
    child = OTHERS.Process(target=program, args=(str(folder), [str(a) for a in argv], first))
    child.start()
    return child


def python(folder, *argv, first=None):
    """-> (exit code, stdout, stderr)"""
    child = start(folder, *argv, first=first)
    child.join(600)
    return child.exitcode, (folder / "out").read_text(), (folder / "err").read_text()


def fsync_slowly():
    fsync = os.fsync
    os.fsync = lambda fd: (time.sleep(0.02), fsync(fd))


def fail_at_the_third_gradient(error):
    calls, gradient = itertools.count(), torch.autograd.grad

    def grad(*args, **more):
        if next(calls) == 2:
            torch.empty(1 << 60)
        return gradient(*args, **more)

    def raising(*args, **more):
        if next(calls) == 2:
            raise error
        return gradient(*args, **more)

    torch.autograd.grad = raising if error else grad


def refuse_sockets(offline, then=None):
    """An audit hook cannot be taken away again."""

    def refuse(event, _):
        if event.startswith("socket."):
            raise SystemExit(f"{event}: the run opens a socket")

    huggingface_hub.constants.HF_HUB_OFFLINE = offline
    sys.addaudithook(refuse)
    if then:
        then()


def saved(model, tok, folder):
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return str(folder)


# ------------------------------------------------------------ hostile input: a seed makes a case

WORDS = ["", " ", "\0", "\x1b[2J", "a\nb", 'q"u\\o.t/e', "x" * 10000, "\ud800", "\u2028"]
WORDS += ["<|user|>", "{", "é", "../../etc"]
ODD = [None, True, False, 0, -1, 10**300, 1e308, float("nan"), float("inf"), [], {}, [[]]]
VALUES = ["", "0", "-1", "nan", "inf", "1e999", "1e-320", "9" * 30, "9" * 5000, "0x10", "1_0"]
VALUES += [" 2 ", "x", "é", "\udcff", "a\nb", "--", "-", "/", "/dev/null", "/nope", "\0", "%s"]


def strange(r):
    nested = [{"": None}, {"name": r.choice(WORDS)}, r.choices(WORDS, k=3), {"$ref": "#"}]
    return r.choice([*ODD, *r.choices(WORDS, k=4), *nested])


def places(value, at=()):
    yield at
    parts = value.items() if isinstance(value, dict) else ()
    for key, v in enumerate(value) if isinstance(value, list) else parts:
        yield from places(v, (*at, key))


def mutated(r, value):
    for _ in range(r.randint(1, 3)):
        *path, key = r.choice([p for p in places(value) if p] or [("",)])
        parent, how = functools.reduce(lambda v, k: v[k], path, value), r.random()
        if how < 0.6 and parent:
            parent[key] = strange(r)
        elif how < 0.8 and parent:
            del parent[key]
        elif isinstance(parent, list):
            parent += copy.deepcopy(parent[:1]) * 3
        else:
            parent[r.choice(WORDS)] = strange(r)
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
    call = record["call"] | {"arguments": {str(i): strange(r) for i in range(5)}}
    many = {"tools": [{"name": f"t{i}"} for i in range(5000)], "call": pair("", "t7")["call"]}
    changes = [many, {"call": call}, {"query": r.choice(WORDS)}]
    lines = [f'{text}, "x": {"[" * depth}{"]" * depth}}}', f'{text}, "n": {number}}}']
    lines += [f'{text}, "id": 7, "id": 7, "tools": []}}']
    lines += [json.dumps(record | change) for change in changes]
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
    parts = [part for a in argv for part in (a.split("=")[0], a.split("=")[-1])]
    parts += [part.replace("-", "_") for part in parts] + [p.replace("_", "-") for p in parts]
    return argv, "(?s).*(" + "|".join(map(re.escape, parts)) + ")"


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


@pytest.mark.parametrize(
    "logp,want",
    [([math.log(3), 0.0], 0.5), ([-700, -700 - math.log(2), -800], 1 / 3), ([-5.0], 1.0)],
)
def test_margin_closed_form(logp, want):
    assert ttsi.margin(dict(enumerate(logp))) == pytest.approx(want), "not p(1) - p(2)"


def test_scores_equal_one_candidate_at_a_time_with_its_whole_prompt(model, tok):
    for sample in SAMPLES:
        x, prefixes = begin(model, tok, sample)
        for prefix in prefixes:
            found = ttsi.score(x, prefix)
            assert [*found] == [t["name"] for t in x.tools], "not each candidate, in their order"
            for name, got in found.items():
                want = naive_score(model, tok, x, name)
                assert got == pytest.approx(want, abs=2e-3), f"{name} is scored otherwise"


def test_a_name_that_begins_another_is_scored_with_its_terminator(llama, tok):
    x, _ = begin(llama, tok, SAMPLES[0])
    for candidate, (ids, at) in zip(x.tools, x.candidates, strict=True):
        text = tok.decode(ids[at:])
        assert text.startswith(candidate["name"] + '"'), f"{text}: no name could lose to its longer"


@pytest.mark.parametrize(
    "kind,token",
    [
        ("byte-level", '",'),
        ("sentencepiece-like", '\u2581"get",'),
        ("glued quotes", '\u0120"get",'),
    ],
)
def test_scores_with_other_vocabularies(kind, token):
    other = vocabulary(kind)
    there = token in other.tokenize('{"name": "get", "arguments": {}}')
    assert there, "the vocabulary is not what it is meant to be"
    test_scores_equal_one_candidate_at_a_time_with_its_whole_prompt(tiny(other), other)


# ------------------------------------------------------------------------- prefixes and decoding


def test_greedy_decoding_equals_the_whole_text_recomputed_for_each_token(model, tok):
    for sample in SAMPLES:
        x, prefixes = begin(model, tok, sample)
        want = naive_greedy(model, tok, x.ids, 12)
        for prefix, behind in zip(prefixes, ("nothing", "the tools", "the prompt"), strict=True):
            assert ttsi.write(tok, x.ids, prefix, FIRST) == [want], f"another text behind {behind}"


def test_sampling_follows_the_distribution_and_no_neighbour(llama, tok):
    x, (_, _, prefix) = begin(llama, tok, SAMPLES[1])
    cfg, u = config(max_new_tokens=1), torch.rand(400, 1, generator=ttsi.draw(1))
    texts = ttsi.write(tok, x.ids, prefix, cfg, u)
    assert texts[7:9] == ttsi.write(tok, x.ids, prefix, cfg, u[7:9]), "draws depend on neighbours"
    p = llama(torch.tensor([x.ids])).logits[0, -1].softmax(-1)
    best = p.argmax().item()
    share, sd = texts.count(tok.decode([best])) / 400, (p[best] * (1 - p[best]) / 400).sqrt()
    assert abs(share - p[best]) < 4 * sd, "not the model's distribution (false alarm: 1 in 15,000)"
    cold = ttsi.write(tok, x.ids, prefix, dataclasses.replace(cfg, temperature=0.0), u[:3])
    assert cold == [tok.decode([best])] * 3, "temperature 0 is greedy"


def test_a_draft_that_has_ended_leaves_the_others_alone(embedded):
    model, tok = embedded
    x, (_, tools, _) = begin(model, tok, to_samples(DEMO)["demo-003"])
    ids = tok(ttsi.render(tok, x.system, ttsi.DRAFT + x.request)[0]).input_ids
    u, cfg = torch.rand(4, 60, generator=ttsi.draw(0)), config(max_new_tokens=60)
    together = ttsi.write(tok, ids, tools, cfg, u)
    alone = [ttsi.write(tok, ids, tools, cfg, row[None])[0] for row in u]
    assert together == alone, "a draft depends on those beside it"
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


def test_rows_that_do_not_begin_with_the_prefix_are_read_from_where_they_leave_it(model):
    prefix = ttsi.Prefix(model, [5, 6, 7, 8])
    spans = [([5, 6, 7, 8, 9, 3], 5), ([5, 6, 9, 9], 3), ([4, 4, 4], 1)]
    for rows in (spans[:1], spans[:2], spans):
        for (ids, at), got in zip(rows, ttsi.logprob(rows, prefix), strict=True):
            assert got.item() == pytest.approx(naive_logp(model, ids, at).item(), abs=1e-3), ids
    assert (
        prefix.shared_by([[5, 6, 9]]).ids == [5, 6]
        and prefix.shared_by([[5, 6, 7, 8, 1]]) is prefix
    )


MERGING = "{% for m in messages %}{{ m.content }}{% endfor %}>"


@pytest.mark.parametrize("adapt", ["suffix", "full"])
@pytest.mark.parametrize(
    "request_,pairs", [("go", ["/x", "or"]), ("/go", ["x", "/y"]), ("/", ["/1"])]
)
def test_a_token_that_merges_across_the_end_of_the_tools(request_, pairs, adapt):
    tok = templated(vocabulary("merging"), MERGING)
    model, cfg = tiny(tok), dataclasses.replace(ALWAYS, adapt=adapt, lr=0.5)
    sample = ask("m", request_, {"name": "get", "arguments": {}}, *GET)
    assert "}/" in tok.get_vocab(), "the vocabulary is not what it is meant to be"
    x, prefixes = begin(model, tok, sample)
    given = [pair(text, "get_all", x=text) for text in pairs]
    got = ttsi.tt_si(model, tok, sample, cfg, given)
    for name, logp in got.logp.items():
        assert logp == pytest.approx(naive_score(model, tok, x, name), abs=2e-3), name
    losses, adapted = naive_train(model, tok, x, got.pairs, cfg)
    assert len(got.pairs) == len(pairs) and got.loss == pytest.approx(losses, rel=1e-3)
    assert got.answer == naive_greedy(adapted, tok, x.ids, 12), "the adapter acts elsewhere"


# ---------------------------------------------------------------------------- T: LoRA and training


def test_a_hooked_layer_is_w_plus_s_b_a(llama):
    cfg, x = config(lora_rank=3, lora_alpha=5.0), torch.randn(2, 6, 32)
    layer = llama.model.layers[0].self_attn.q_proj
    plain = torch.nn.functional.linear(x, layer.weight)
    with pytest.raises(ZeroDivisionError), ttsi.temporary_lora(llama, cfg, ttsi.draw(1)) as lora:
        A, B = lora[:2]
        assert A.shape == (32, 3) and 0.9 < A.abs().max() * 32**0.5 <= 1, "not uniform"
        assert len(lora) == 28 and not B.any() and torch.equal(layer(x), plain), "B = 0 changes"
        B.data.normal_()
        want = torch.nn.functional.linear(x, layer.weight + 5 / 3 * (A @ B).T)
        assert torch.allclose(layer(x), want, atol=1e-4), "not W + s B A"
        raise ZeroDivisionError
    assert torch.equal(layer(x), plain) and not hooks(llama), "the adapter outlives its block"


def test_one_sgd_step_closed_form(llama, tok):
    x, prefixes = begin(llama, tok, SAMPLES[0])
    ids, at, cfg = [*x.ids, 20, 21, 22], len(x.ids), config(epochs=1, lr=0.3)
    with ttsi.temporary_lora(llama, cfg, ttsi.draw(1)) as lora:
        loss, before = -naive_logp(llama, ids, at) / 3, [p.detach().clone() for p in lora]
        gradients = torch.autograd.grad(loss, lora)
        norm = math.sqrt(sum((g**2).sum() for g in gradients))
        assert ttsi.train([(ids, at)], prefixes[0], lora, cfg) == pytest.approx([loss.item()])
    for p, was, g in zip(lora, before, gradients, strict=True):
        assert torch.allclose(p, was - 0.3 * g / norm, atol=1e-5), "not lr along the gradient"
    moved = [not torch.equal(p, was) for p, was in zip(lora, before, strict=True)]
    assert moved == [False, True] * 14, "B = 0: the first step moves B alone"


@pytest.mark.parametrize("adapt", ["full", "suffix"])
@pytest.mark.parametrize("optimizer,lr", [("sgd", 0.5), ("adamw", 1e-2)])
def test_training_equals_a_naive_loop(model, tok, adapt, optimizer, lr):
    cfg = dataclasses.replace(ALWAYS, adapt=adapt, optimizer=optimizer, lr=lr, epochs=3)
    for sample in SAMPLES[:2]:  # two ragged pairs, one pair
        x, prefixes = begin(model, tok, sample)
        got = ttsi.tt_si(model, tok, sample, cfg, PAIRS[x.id])
        losses, adapted = naive_train(model, tok, x, got.pairs, cfg)
        assert got.loss == pytest.approx(losses, rel=1e-3) and losses[-1] < losses[0], "losses"
        assert got.answer == naive_greedy(adapted, tok, x.ids, 12), "the adapted answer differs"

        base = prefixes[adapt == "suffix"]
        spans = [joined(tok, x, p["request"], json.dumps(p["call"])) for p in got.pairs]
        with ttsi.temporary_lora(model, cfg, ttsi.draw(cfg.seed, x.id, "adapter")) as lora:
            ttsi.train(spans, base, lora, cfg)
            rest = torch.tensor([x.ids[len(base.ids) :]])
            logits = base.forward(base.copy(1), rest, 1)[0, -1]
        want = adapted(torch.tensor([x.ids])).logits[0, -1]
        assert torch.allclose(logits, want, rtol=1e-2, atol=2e-2), "the adapted model differs"


def test_suffix_gradients_equal_a_full_forward_with_the_adapter_masked(model, tok):
    x, (_, tools, _) = begin(model, tok, SAMPLES[0])
    ids, at = [*x.ids, 20, 21, 22], len(x.ids)
    with ttsi.temporary_lora(model, FIRST, ttsi.draw(1)) as lora:
        for B in lora[1::2]:
            B.data.normal_(0, 0.1, generator=ttsi.draw(3))
        got = torch.autograd.grad(ttsi.logprob([(ids, at)], tools).sum(), lora)
    masked = wrapped(model, lora, FIRST, x.head)
    want = torch.autograd.grad(naive_logp(masked, ids, at), lora)
    scale = max(g.abs().max() for g in want)
    for g, w in zip(got, want, strict=True):
        assert (g - w).abs().max() < 1e-4 * scale, "no gradient passes through what is cached"


# -------------------------------------------------------------------------------------------- G


COPY = "Cancel my FLIGHT to Rome would you please!"


@pytest.mark.parametrize(
    "name,arguments,request_,verdict",
    [
        ("cancel_flight", {"city": "Oslo"}, "drop the Oslo flight", ""),
        ("book_flight", {"city": "Oslo", "days": 3}, "3 days in OSLO", ""),
        ("cancel_hotel", {"city": "Oslo"}, "drop the Oslo flight", "tool not on offer"),
        ("cancel_flight", {}, "drop the flight", "required argument missing"),
        ("cancel_flight", {"city": "Oslo", "x": 1}, "drop Oslo", "unknown argument"),
        ("book_flight", {"city": "Oslo", "days": "3"}, "Oslo 3", "wrong type"),
        ("book_flight", {"city": "Oslo", "days": True}, "Oslo true", "wrong type"),
        ("cancel_flight", {"city": "Lima"}, "drop the Oslo flight", "value not in the request"),
        ("cancel_flight", {"city": "Rome"}, COPY, "copy of the request"),
        ("cancel_flight", {"city": "Bern"}, "no flight to Bern", "written before"),
        ("pick", {"size": "huge"}, "a huge one", "value not in enum"),
        ("cancel_flight", {"city": "Oslo"}, "Oslo " * 2000, "exceeds the context"),
    ],
)
def test_checks(llama, tok, name, arguments, request_, verdict):
    pick = tool("pick", size={"type": "string", "enum": ["S", "L"]})
    x, _ = begin(llama, tok, SAMPLES[1] | {"tools": [*FLIGHT, pick]})
    before = [{"text": "", "verdict": "kept", "pair": pair("No flight to Bern.", "f")}]
    before += [{"text": "", "verdict": "wrong type", "pair": None}]
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


def scripted(monkeypatch, texts):
    """What the model writes is these; the numbers that it is drawn by are returned."""
    texts, drawn = iter(texts), []

    def write(tok, ids, prefix, cfg, uniform=None):
        drawn.append(uniform)
        return [next(texts) for _ in range(1 if uniform is None else len(uniform))]

    monkeypatch.setattr(ttsi, "write", write)
    return drawn


def test_generation_stops_at_k_and_counts_every_rejection(llama, tok, monkeypatch):
    x, (_, tools, _) = begin(llama, tok, SAMPLES[0])
    good = [json.dumps(pair(f"number {i}", "get_all", x=f"{i}")) for i in (1, 1, 2)]
    scripted(monkeypatch, ["junk", *good, *["never"] * 9])
    drafts = ttsi.generate(llama, tok, x, tools, config(k=2, attempts=9))
    junk = "no JSON object with a request and a call"
    assert [d["verdict"] for d in drafts] == [junk, "kept", "written before", "kept"]
    assert [bool(d["pair"]) for d in drafts] == [False, True, False, True]


@pytest.mark.parametrize("drafts,attempts,written", [(1, 1, 1), (1, 4, 4), (3, 2, 6)])
def test_so_many_drafts_are_written(llama, tok, monkeypatch, drafts, attempts, written):
    argv = f"--drafts {drafts} --k 4 --attempts {attempts} --tau 2 --max-new-tokens 12"
    x, (_, tools, _) = begin(llama, tok, SAMPLES[0])
    cfg = ttsi.parse_flags(argv.split())
    scripted(monkeypatch, itertools.repeat("junk"))
    assert len(ttsi.generate(llama, tok, x, tools, cfg)) == written
    good = (json.dumps(pair(f"number {i}", "get_all", x=f"{i}")) for i in itertools.count())
    scripted(monkeypatch, good)
    assert len(ttsi.generate(llama, tok, x, tools, cfg)) == min(written, 4 + (drafts > 1) * 2)


def test_drafts_are_drawn_by_seed_sample_and_number(llama, tok, monkeypatch):
    x, (_, tools, _) = begin(llama, tok, SAMPLES[0])
    y, found = copy.copy(x), []
    y.id = "another"
    for one, seed in ((x, 0), (x, 0), (x, 1), (y, 0)):
        drawn = scripted(monkeypatch, itertools.repeat("junk"))
        ttsi.generate(llama, tok, one, tools, config(drafts=2, attempts=2, seed=seed))
        found.append(torch.cat(drawn))
    assert torch.equal(found[0], found[1]), "not a function of seed, sample and number"
    assert len({tuple(row) for drawn in found for row in drawn.tolist()}) == 12, "drawn twice"


def test_a_supplied_copy_of_the_request_is_refused_even_unchecked(llama, tok):
    copied = pair("Cancel my flight to Rome would you please", "cancel_flight", city="Rome")
    odd = [{"request": 7}, {"request": "x", "call": {"name": "f", "arguments": [1]}}]
    got = run(llama, tok, SAMPLES[1:2], {"b": [copied, *PAIRS["b"], *odd]}, check=False)["b"]
    junk = "no JSON object with a request and a call"
    assert [d["verdict"] for d in got["drafts"]] == ["copy of the request", "kept", junk, junk]
    assert got["pairs"] == PAIRS["b"], "the copy may hold the label"


def test_a_teacher_writes_the_drafts_it_would_write_for_itself(llama, tok, embedded):
    cfg, untouched = ttsi.Config(tau=2.0, max_new_tokens=64, k=2, epochs=2), digest(embedded[0])
    for sample in list(to_samples(DEMO).values())[:3]:
        own = ttsi.tt_si(*embedded, sample, cfg)
        taught = ttsi.tt_si(llama, tok, sample, cfg, teacher=embedded)
        assert taught.drafts == own.drafts and taught.pairs == own.pairs != [], "other drafts"
        assert taught.logp != own.logp and len(taught.loss) == 2, "the student is trained"
        x, _ = begin(llama, tok, sample)
        more = taught.cost["generate"][1] - own.cost["generate"][1]
        assert more == x.head, "the teacher reads the tools itself, the model does not do so again"
    assert digest(embedded[0]) == untouched and not hooks(embedded[0])


# ------------------------------------------------------------------------------------ Algorithm 1


@pytest.mark.parametrize("broken", ["score", "train", "write"])
def test_base_weights_and_hooks_after_a_run_and_after_an_exception_in_it(
    model, tok, monkeypatch, broken
):
    before, count, first = digest(model), hooks(model), run(model, tok)
    decisions = [r["decision"] for r in first.values()]
    assert decisions == ["adapted", "adapted", "no pair"], "c has no pairs"
    assert digest(model) == before and hooks(model) == count, "not reset after a run"
    with monkeypatch.context() as m, pytest.raises(ZeroDivisionError):
        m.setattr(ttsi, broken, lambda *_, **more: 1 / 0)
        run(model, tok)
    assert digest(model) == before and hooks(model) == count, "not reset after an exception"
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
    assert run(model, tok) == first, "a run leaves something behind"


def test_order_and_limit_change_nothing_and_each_sample_starts_from_the_base(model, tok):
    for how in ({}, {"lr": 1.0, "epochs": 4}, {"pairs": None, "tau": 0.95, "check": True}):
        whole = run(model, tok, **how)
        assert run(model, tok, SAMPLES[::-1], **how) == whole, "depends on what came before"
        for s in SAMPLES:
            assert run(model, tok, [s], **how) == {s["id"]: whole[s["id"]]}, "depends on others"


def test_scrambled_labels_change_no_prediction(model, tok):
    leak = {"arguments": {"leak": "1"}}
    other = [s | {"accept": {"leak": ["1"]}} for s in SAMPLES]
    other = [s | {"call": leak | {"name": s["tools"][-1]["name"]}} for s in other]
    none = [{k: v for k, v in s.items() if k != "call"} for s in SAMPLES]
    for pairs in (None, PAIRS):
        want = run(model, tok, pairs=pairs)
        assert run(model, tok, other, pairs) == want, "a label is read"
        assert run(model, tok, none, pairs) == want, "a label is needed"


def test_without_a_label_there_is_nothing_to_compare_with(llama, tok):
    none = [{k: v for k, v in s.items() if k != "call"} for s in SAMPLES]
    for row in rows_of(llama, tok, none, ALWAYS, PAIRS):
        assert ("direct" in row) == (row["decision"] != "adapted") and "scores" not in row
    for row, s in zip(rows_of(llama, tok, SAMPLES, ALWAYS, PAIRS), SAMPLES, strict=True):
        x, _ = begin(llama, tok, s)
        assert row["direct"] == naive_greedy(llama, tok, x.ids, 12), "not the base's answer"


def test_nothing_changes_where_nothing_is_trained_and_training_changes_the_answer(model, tok):
    zero, closed = run(model, tok, epochs=0), run(model, tok, tau=0.0)
    trained = run(model, tok, epochs=8, lr=1.0)
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


REFUSING = (
    "{% for m in messages %}{% if 'hm' in m.content %}{{ raise_exception('no hm') }}{% endif %}"
    "[{{ m.content }}]{% endfor %}>"
)


@pytest.mark.parametrize("what,why", [("long", "exceed the context"), ("hm", "chat template")])
def test_a_sample_that_cannot_be_asked_is_named_and_counted_and_the_others_answered(
    llama, tok, what, why
):
    tok = templated(tok, REFUSING) if what == "hm" else tok
    text = "word " * 2000 if what == "long" else what
    rows = rows_of(llama, tok, [SAMPLES[0] | {"messages": user(text)}, *SAMPLES[:2]], ALWAYS)
    assert rows[0]["decision"].startswith("not answered: ") and why in rows[0]["decision"]
    assert rows[0]["scores"] == {
        "direct": {"name": False, "call": False},
        "answer": {"name": False, "call": False},
        "first": True,
    }
    assert all(row["answer"] and row["margin"] is not None for row in rows[1:]), "a neighbour"
    assert ttsi.summarise(rows)["samples"]["labelled"] == 3, "the denominator must not change"


def test_a_draft_whose_request_the_template_refuses_is_that_drafts_verdict(llama, tok):
    tok = templated(tok, REFUSING)
    given = {"b": [pair("hm", "book_flight", city="hm", days=1), *PAIRS["b"]]}
    got = run(llama, tok, SAMPLES[1:2], given)["b"]
    assert "template" in got["drafts"][0]["verdict"] and got["pairs"] == PAIRS["b"]
    tok = templated(tok, REFUSING.replace("'hm'", "'DIFFERENT'"))
    got = run(llama, tok, SAMPLES[1:2], None)["b"]
    assert "template" in got["drafts"][0]["verdict"] and got["decision"] == "no pair"


def test_candidate_order_is_a_function_of_seed_and_names(llama, tok):
    def names(sample, **changes):
        cfg = config(**changes)
        return tuple(t["name"] for t in ttsi.prepare(llama, tok, sample, cfg).tools)

    turned = SAMPLES[0] | {"id": "z", "tools": GET[::-1], "call": None}
    assert names(SAMPLES[0]) == names(turned), "the file's order, or the sample's id, matters"
    assert names(turned, shuffle=False) == ("get_all_users", "get_all", "get")
    assert len({names(SAMPLES[0], seed=s) for s in range(20)}) > 3, "always one order"


@pytest.mark.parametrize("adapt", ["suffix", "full"])
@pytest.mark.parametrize("kind", ["Mistral", "Gemma2"])
def test_a_sliding_window_sees_no_padding(tok, kind, adapt):
    model, cfg = tiny(tok, kind), dataclasses.replace(ALWAYS, adapt=adapt, lr=0.5, epochs=3)
    test_greedy_decoding_equals_the_whole_text_recomputed_for_each_token(model, tok)
    for sample in SAMPLES[:2]:
        got = ttsi.tt_si(model, tok, sample, cfg, PAIRS[sample["id"]])
        x, (_, tools, _) = begin(model, tok, sample)
        for name, logp in got.logp.items():
            assert logp == pytest.approx(naive_score(model, tok, x, name), abs=2e-3), name
        losses, _ = naive_train(model, tok, x, got.pairs, cfg)
        assert got.loss == pytest.approx(losses, rel=1e-3), "T sees another window"
        u = torch.rand(3, 12, generator=ttsi.draw(0))
        alone = [ttsi.write(tok, x.ids, tools, FIRST, row[None])[0] for row in u]
        assert ttsi.write(tok, x.ids, tools, FIRST, u) == alone, "a draft sees its neighbours"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base_with_float32_adapters(tok, dtype):
    half = tiny(tok).to(dtype)
    with ttsi.temporary_lora(half, FIRST, ttsi.draw(0)) as lora:
        assert {p.dtype for p in lora} == {torch.float32}
    for a, b in zip(
        *(run(m, tok, epochs=4, lr=0.5).values() for m in (half, tiny(tok))), strict=True
    ):
        assert a["logp"] == pytest.approx(b["logp"], rel=0.1, abs=0.5), "scores"
        assert a["loss"] == pytest.approx(b["loss"], rel=0.15), "losses"
        assert a["loss"] == [] or a["loss"][-1] < a["loss"][0], "it does not learn"


def test_any_end_token_stops_an_answer(llama, tok, monkeypatch):
    x, (prefix, *_) = begin(llama, tok, SAMPLES[1])
    ids, n = list(x.ids), len(x.ids)
    for _ in range(4):
        ids.append(llama(torch.tensor([ids])).logits[0, -1].argmax().item())
    end = next(k for k in range(n + 1, len(ids)) if ids[k] not in ids[n:k])
    for ends in ([tok.eos_token_id, ids[end]], ids[end]):
        monkeypatch.setattr(llama.generation_config, "eos_token_id", ends)
        assert ttsi.write(tok, x.ids, prefix, FIRST) == [tok.decode(ids[n:end])], ends


@pytest.mark.parametrize("adapt", ["suffix", "full"])
def test_tokens_are_counted_as_by_hand(llama, tok, adapt):
    cfg = dataclasses.replace(ALWAYS, adapt=adapt, epochs=3)
    x, _ = begin(llama, tok, SAMPLES[0])
    row = rows_of(llama, tok, SAMPLES[:1], cfg, PAIRS)[0]
    longest = max(len(joined(tok, x, p["request"], json.dumps(p["call"]))[0]) for p in PAIRS["a"])
    name = max(len(ids) for ids, _ in x.candidates)
    n, skip = len(x.ids), x.head if adapt == "suffix" else 0
    want = {"prefill": n - 1, "score": 3 * (name - n + 1), "generate": 0}
    want |= {"train": 2 * 3 * 2 * (longest - skip)}  # forward and backward, steps, pairs
    want |= {"answer": n - skip + 11, "direct": n + 11}  # 12 tokens, the last is not read
    assert {stage: tokens for stage, (_, tokens) in row["cost"].items()} == want
    row = rows_of(llama, tok, SAMPLES[:1], dataclasses.replace(cfg, drafts=2))[0]
    asked = tok(ttsi.render(tok, x.system, ttsi.DRAFT + x.request)[0]).input_ids
    assert row["cost"]["generate"][1] == len(asked) - 1 - x.head + 2 * 12, "from the tools on"
    assert row["cost"]["answer"][1] == 12 and row["cost"]["direct"][1] == n - 1 + 12
    assert all(seconds > 0 for seconds, tokens in row["cost"].values() if tokens), "no time"


def test_no_tensor_outlives_its_sample(embedded):
    sample, alive = to_samples(DEMO)["demo-003"], []
    for i in range(4):
        ttsi.tt_si(*embedded, sample | {"id": str(i)}, config(tau=2.0, max_new_tokens=56))
        gc.collect()
        alive.append(sum(t.numel() for t in gc.get_objects() if type(t) is torch.Tensor))
    assert alive[1] == alive[2] == alive[3], "something of a sample stays"


# ------------------------------------------------------------------------------- real models


@slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_stage_on_every_architecture(tok, kind, dtype):
    model, exact = tiny(tok, kind).to(dtype), dtype is torch.float32
    before = digest(model)
    assert len(ttsi.linear_layers(model)) == KINDS[kind][1]
    for adapt in ("suffix", "full"):
        cfg = dataclasses.replace(ALWAYS, epochs=3, lr=0.5, adapt=adapt)
        for sample in SAMPLES:
            got = ttsi.tt_si(model, tok, sample, cfg, PAIRS[sample["id"]])
            x, _ = begin(model, tok, sample)
            for name, logp in got.logp.items():
                want = naive_score(model, tok, x, name)
                assert logp == pytest.approx(want, abs=2e-3 if exact else 0.3), name
            if got.pairs and exact:
                losses, _ = naive_train(model, tok, x, got.pairs, cfg)
                assert got.loss == pytest.approx(losses, rel=1e-3), "losses"
            assert not got.pairs or got.loss[-1] < got.loss[0], "it does not learn"
    assert digest(model) == before and not hooks(model), "the base was written"


@pytest.fixture(scope="session", params=["qwen3", "llama3_1", "gemma3"])
def real(request):
    folder = SHARED / "tokenizers" / request.param
    if not folder.exists():
        pytest.skip("no real tokenizers beside this checkout")
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_real_tokenizers_keep_the_prompt_and_cut_at_names(real, llama):
    for sample in SAMPLES:
        x = ttsi.prepare(llama, real, sample, FIRST)
        assert "2026" not in ttsi.render(real, x.system, x.request)[0].replace(
            "01 January 2026", ""
        )
        for candidate, (ids, at) in zip(x.tools, x.candidates, strict=True):
            assert ids[: len(x.ids)] == x.ids, "the prompt's tokens are no prefix"
            assert real.decode(ids[at:]).startswith(candidate["name"] + '"'), "cut inside a name"
        ids, at = joined(real, x, x.request, json.dumps(sample["call"]))
        assert ids[:at] == x.ids, "prompt and call share a token"
        assert SAMPLES[0]["tools"][0]["name"] in real.decode(x.ids[: x.head]) or x.id != "a"


@slow
def test_a_whole_run_with_real_tokenizers(real, tmp_path):
    model = tiny(real)
    folder = saved(model, real, tmp_path / "m")
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, SAMPLES)))
    pairs = [json.dumps({"id": i, "pairs": p}) for i, p in PAIRS.items()]
    (tmp_path / "p.jsonl").write_text("\n".join(pairs))
    argv = ["--model", folder, "--data", tmp_path / "d.jsonl", "--max-new-tokens", 12]
    argv += ["--tau", 2, "--k", 2, "--epochs", 2, "--no-check", "--output", tmp_path / "o.jsonl"]
    quiet(*argv, "--pairs", tmp_path / "p.jsonl")
    for row, sample in zip(read(tmp_path / "o.jsonl"), SAMPLES[:2], strict=False):
        x, _ = begin(model, real, sample)
        for name, logp in row["logp"].items():
            assert logp == pytest.approx(naive_score(model, real, x, name), abs=2e-3), name
        losses, _ = naive_train(model, real, x, row["pairs"], ALWAYS)
        assert row["decision"] == "adapted" and row["loss"] == pytest.approx(losses, rel=1e-3)


@pytest.mark.parametrize("there,device", [(False, "cpu"), (True, "meta")])
def test_a_build_for_an_accelerator_runs_without_one(monkeypatch, there, device):
    def current(check_available=False):
        return torch.device("meta") if there or not check_available else None

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current)
    with pytest.raises(ttsi.InputError, match="on meta") if there else contextlib.nullcontext():
        assert ttsi.load(ttsi.Config.model, ttsi.Config())[0].device.type == device


def test_local_rank_picks_an_accelerator_only_where_it_is_asked_for(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    for device, found in (("auto", None), ("cpu", None), ("cpu", "meta")):
        found = found and torch.device(found)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_, f=found, **more: f)
        model, _ = ttsi.load(ttsi.Config.model, ttsi.Config(device=device))
        assert model.device == torch.device("cpu"), "LOCAL_RANK is for accelerators"
    for device in ("auto", "meta"):
        with pytest.raises(ttsi.InputError, match="on meta:1: "):
            ttsi.load(ttsi.Config.model, ttsi.Config(device=device))


def test_models_without_a_plain_cache_are_refused(tok, tmp_path):
    mamba = {"vocab_size": len(tok), "hidden_size": 32, "num_hidden_layers": 1}
    nexts = GROUPED | {"vocab_size": len(tok), "num_experts": 2, "num_experts_per_tok": 1}
    nexts |= {"moe_intermediate_size": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2}
    nexts |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    for kind, settings in (("Mamba", mamba), ("Qwen3Next", nexts)):
        conf = getattr(transformers, f"{kind}Config")(**settings)
        model = transformers.AutoModelForCausalLM.from_config(conf)
        folder = saved(model, tok, tmp_path / kind)
        with pytest.raises(ttsi.InputError, match=f"{folder}: .*cache") as e:
            ttsi.load(folder, ttsi.Config())
        assert "\n" not in str(e.value)


# ------------------------------------------------------------------- what the model writes is data

F = {"name": "f", "arguments": {}}
DEEP = '{"call": ' * 3000 + "}" * 3000


@pytest.mark.parametrize(
    "text,value",
    [
        ("Sure! " + json.dumps(F) + " and more {", F),
        ("use {x} then " + json.dumps(F), F),
        ("{} " + json.dumps(F), F),
        ("of {this} kind: " + json.dumps(PAIRS["b"][0]) + "}", PAIRS["b"][0]),
        (json.dumps({"call": F, "request": "x"})[:-4], None),
        (json.dumps({"call": F, "request": "x"})[:42], None),
        (json.dumps({"call": F})[:-1], None),
        ('{"a": 1}', None),
        ('{"name": NaN}', None),
        ('{"name": 1e999}', None),
        ('{"name": "\\ud800"}', None),
        ('{"name": ' + "[" * 9000 + "]" * 9000 + "}", None),
        ("[1]", None),
        ("", None),
    ],
)
def test_parse(text, value):
    assert ttsi.parse(text) == value, "text, and braces in it, are passed over; open ones are not"


@pytest.mark.parametrize("text", ["{" * 99999, '{"a":' * 99999, "[" * 99999, "{ " * 5000, DEEP])
def test_hostile_nesting_is_no_call(text):
    assert ttsi.parse(text) is None and ttsi.parse("x" + text) is None


OUTPUT = ["", "{", "}" * 5000, "{" * 5000, DEEP, "[" * 100000, "null", "[1]", "\0\x1b\u2028\ufffd"]
OUTPUT += ['{"name": null, "arguments": null}', '{"name": ["only"], "arguments": {}}']
OUTPUT += ['{"name": "only", "arguments": [[]]}', '{"name": 1, "name": 2}', '{"a":' * 99999]
OUTPUT += [
    '{"call": {"name": {}, "arguments": {}}, "request": 7}',
    '{"call": 1, "request": "\\ud800"}',
]
OUTPUT += ['{"call": {"name": "get", "arguments": {"x": NaN}}, "request": "x"}']
OUTPUT += ['{"call": {"name": "get", "arguments": {"x": %s}}, "request": "x"}' % ("9" * 5000)]
OUTPUT += [json.dumps(pair("<|assistant|>{", "cancel_flight", days={"": [None, True, 1e308]}))]
OUTPUT += [json.dumps(pair("again " * 300, "book_flight", city="again " * 300))]
OUTPUT += [json.dumps(pair("get them all", "get")), "{{ 7 * 7 }}{% for i in range(9) %}x"]
OUTPUT += [
    '{"request": "x", "call": {"name": "only", "arguments": "{"}}',
    "__import__('os').abort()",
]


@pytest.mark.parametrize("check", [True, False])
def test_whatever_the_model_writes_is_counted_data(model, tok, check, monkeypatch):
    before = digest(model)
    cfg = dataclasses.replace(ALWAYS, check=check, drafts=3, attempts=2, epochs=1)
    for i in range(0, len(OUTPUT), few(6, 1)):
        scripted(monkeypatch, itertools.cycle(OUTPUT[i:] + OUTPUT[:i]))
        rows = rows_of(model, tok, SAMPLES, cfg)
        counted = ttsi.summarise(rows)["drafts"]
        assert sum(counted.values()) == sum(len(r["drafts"]) for r in rows) >= 9, "not each draft"
        assert json.loads(ttsi.dumps(rows)) == rows, "a row that cannot be read again"
    assert digest(model) == before and not hooks(model)


@pytest.mark.parametrize("adapt", ["suffix", "full"])
@pytest.mark.parametrize(
    "what,bad",
    [("score", math.nan), ("score", math.inf), ("logprob", math.nan), ("logprob", math.inf)]
    + [("train", math.inf), ("train", math.nan)],
)
def test_a_number_that_is_not_finite_leaves_the_base_answer_and_the_neighbours(
    llama, tok, monkeypatch, what, bad, adapt
):
    cfg, before = dataclasses.replace(ALWAYS, adapt=adapt, lr=0.5), digest(llama)
    healthy, keep = rows_of(llama, tok, SAMPLES, cfg, PAIRS), getattr(ttsi, what)

    def broken(*args):
        found = keep(*args)
        if what == "train":
            args[2][-1].data[0] = bad  # after the last step: no loss tells
        if what == "logprob" and torch.is_grad_enabled():
            return found + bad
        return found | {next(iter(found)): bad} if what == "score" else found

    with monkeypatch.context() as m:
        m.setattr(ttsi, what, broken)
        row = rows_of(llama, tok, SAMPLES[:1], cfg, PAIRS)[0]
    kind = "score" if what == "score" else "training"
    assert row["decision"] == f"{kind} not finite" and json.loads(ttsi.dumps(row)) == row
    assert row["answer"] == row["direct"] == healthy[0]["direct"], "not the base's answer"
    assert without_cost(rows_of(llama, tok, SAMPLES, cfg, PAIRS)) == without_cost(healthy), (
        "it stays broken"
    )
    assert "not finite" in str(ttsi.summarise([row])["decisions"]) and digest(llama) == before


# ------------------------------------------------------------------------------ prompts and scoring

SYSTEMLESS = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}[{{ m.content }}]{% endfor %}>"
)
DROPPING = "{% for m in messages if m.role != 'system' %}[{{ m.content | trim }}]{% endfor %}>"
THINKING = (
    "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if enable_thinking is not defined or"
    " enable_thinking %}<think>{% else %}<think></think>{% endif %}"
)
DATED = (
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %B %Y') %}{% endif %}"
    "[{{ date_string }}]{% for m in messages %}[{{ m.content }}]{% endfor %}"
)


@pytest.mark.parametrize(
    "template,end",
    [(SYSTEMLESS, "USER]>"), (DROPPING, "USER]>"), (THINKING, "<think></think>"), (None, "")]
    + [(DATED, "USER]"), ({"default": DATED, "tool_use": "{{ 1 / 0 }}"}, "USER]")],
)
def test_templates(tok, template, end):
    text, head = ttsi.render(templated(tok, template), "SYSTEM", "USER")
    assert text[:head].endswith("SYSTEM") and text.count("USER") == 1, "where the tools end"
    assert text.index("USER") >= head and text.endswith(end), "it thinks, or is cut"
    assert "[01 January 2026]" in text or "DATED" not in str(template), "another prompt every day"


def test_a_template_that_drops_the_request_is_an_error(tok):
    with pytest.raises(ttsi.InputError, match="template"):
        ttsi.render(templated(tok, "{{ messages[0].content[:3] }}"), "SYSTEM", "USER")


def test_a_dialogue_becomes_a_transcript():
    called = [{"type": "function", "function": {"name": "find", "arguments": {"q": 1}}}]
    turns = [*user("hi"), {"role": "assistant", "content": None, "tool_calls": called}]
    turns += [{"role": "tool", "content": "none"}, *user(" so? ")]
    want = 'user: hi\ncall: {"name": "find", "arguments": {"q": 1}}\ntool: none\nuser: so?'
    assert ttsi.user_text(turns) == want


@pytest.mark.parametrize(
    "name,given,gold,accept,right",
    [
        ("f", {"x": 12.0}, {"x": "12"}, None, True),
        ("f", {"x": "a", "y": 1}, {"x": "a"}, None, False),
        ("f", {}, {"x": "a"}, None, False),
        ("f", [1], {}, None, False),
        ("g", {"x": 12}, {"x": 12}, None, False),
        ("f", {"x": True, "l": [1.0, {"k": 2}]}, {"x": True, "l": [1, {"k": 2}]}, None, True),
        ("f", {"x": True}, {"x": 1}, None, False),
        ("f", {"x": 2}, {"x": 1}, {"x": [1, 2], "y": ["u", ""]}, True),
        ("f", {"y": "u"}, {"x": 1}, {"x": [1, 2], "y": ["u", ""]}, False),
        ("f", {"x": 1, "z": 1}, {"x": 1}, {"x": [1]}, False),
        ("", {}, {}, None, False),
    ],
)
def test_grade(name, given, gold, accept, right):
    sample = {"call": {"name": "f", "arguments": gold}} | ({"accept": accept} if accept else {})
    text = json.dumps({"name": name, "arguments": given}) if name else "no json"
    assert ttsi.grade(text, sample) == {"name": name == "f", "call": right}


def summary_row(i, decision, direct, answer, first, cost, *verdicts, logp=2):
    grades = {"direct": {"name": direct, "call": direct}, "answer": {"name": True, "call": answer}}
    row = {"id": i, "decision": decision, "scores": grades | {"first": first}, "cost": cost}
    row["logp"] = {str(n): -1.0 for n in range(logp)}
    return row | {"drafts": [{"verdict": verdict} for verdict in verdicts]}


def test_summary_by_hand():
    base = {"prefill": [1.0, 10], "score": [0.5, 5], "direct": [2.0, 20]}
    more, less = {"train": [4.0, 40], "answer": [2.0, 20]}, {"train": [2.0, 20]}
    rows = [
        summary_row("a", "adapted", False, True, True, base | more, "kept", "wrong type"),
        summary_row("b", "certain", True, True, False, base, logp=1),
        summary_row("c", "adapted", True, False, False, base | less, "kept"),
        summary_row("e", "certain", False, True, False, base),
        summary_row("d", "not answered: too long", False, False, False, {}, logp=0),
    ]
    s = ttsi.summarise(rows)
    assert s["samples"] == {"all": 5, "labelled": 5, "with one tool": 1}
    named = {"adapted": 2, "certain": 2, "d: not answered: too long": 1}
    assert s["decisions"] == named and s["drafts"] == {"kept": 2, "wrong type": 1}
    tokens = {"prefill": 10, "score": 5, "generate": 0, "train": 15, "answer": 5}
    assert s["tokens"] == tokens | {"all": 35, "direct": 20, "ratio": 1.75}, "over the answered"
    assert s["seconds"]["all"] == pytest.approx((7.5 + 1.5 + 3.5 + 1.5) / 4), "not the direct one"
    assert s["always first"] == {"name": 20} and s["direct"] == {"name": 40, "call": 40}
    assert s["TT-SI"]["call"] == 60 and s["difference"]["call"] == 20
    assert (s["difference"]["wins"], s["difference"]["losses"]) == (2, 1)
    del rows[4]["scores"]
    assert ttsi.summarise([]) and "TT-SI" not in ttsi.summarise(rows[4:]), "there is no label"


def test_interval():
    assert ttsi.interval([1, 1, 1]) == [1, 1]
    low, high = ttsi.interval([1] * 50 + [0] * 50)  # about 0.5 +- 1.96 * 0.5 / 10
    assert low == pytest.approx(0.402, abs=0.02) and high == pytest.approx(0.598, abs=0.02)


# ------------------------------------------------------------------------------------ input


GOOD = {"query": "q", "tools": [{"name": "f", "parameters": {}}], "call": F | {"arguments": "{}"}}


@pytest.mark.parametrize(
    "change,complaint",
    [
        ("{", "Expecting"),
        ("[]", "no JSON object"),
        ('{"x": ' + "[" * 100 + "]" * 100 + "}", "nested more than 100 deep"),
        ('{"query": NaN}', "NaN"),
        ('{"query": 1e999}', "Out of range"),
        ('{"query": "\\ud800"}', "surrogates"),
        ({"query": None}, "no request"),
        ({"query": " "}, "no request"),
        ({"query": [1]}, ""),
        ({"tools": None}, "no tools"),
        ({"tools": []}, "a tool is missing"),
        ({"tools": [{}]}, "a tool must be"),
        ({"tools": [F, F]}, "offered twice"),
        ({"tools": [{"name": "f", "parameters": {"properties": [1]}}]}, ""),
        ({"tools": [{"name": "f", "parameters": {"required": 1}}]}, "a tool must be"),
        ({"call": F | {"name": "g"}}, '"call" must be'),
        ({"call": "f"}, '"call" must be'),
        ({"call": F | {"arguments": "{"}}, '"call" must be'),
        ({"accept": {"x": 1}}, '"accept" must be'),
        ({"id": 1}, "twice"),
    ],
)
def test_every_bad_line_is_named(tmp_path, change, complaint):
    line = change if isinstance(change, str) else json.dumps(GOOD | change)
    path = tmp_path / "x.jsonl"
    path.write_text(f"\ufeff{json.dumps(GOOD)}\r\n\n{line}\n{{\n")
    with pytest.raises(ttsi.InputError) as e:
        ttsi.read_jsonl(path, ttsi.to_sample)
    message = str(e.value)
    assert message.startswith(f"{path}:3: ") and complaint in message and "\n" not in message


def test_a_byte_order_mark_and_line_endings_change_nothing(tmp_path):
    lines, found = DEMO.read_text().splitlines()[:3], []
    forms = ["\n".join(lines), "\ufeff" + "\r\n".join(lines) + "\r\n", "\r".join(lines)]
    for text in [*forms, "\n\n".join(lines) + "\n"]:
        (tmp_path / "x.jsonl").write_bytes(text.encode())
        found.append(to_samples(tmp_path / "x.jsonl"))
    assert all(samples == found[0] for samples in found) and len(found[0]) == 3


def test_a_file_without_a_sample_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_text("\n \n")
    with pytest.raises(ttsi.InputError, match="nothing in it"):
        to_samples(tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    "argv,complaint",
    [
        ("--model /no/such", "/no/such: cannot be loaded"),
        ("--data /no/such", "/no/such"),
        ("--k 0", "--k 0"),
        ("--tau nan", "--tau nan"),
        ("--optimizer x", "invalid choice"),
        ("--lora_rank x", "invalid int"),
        ("--nonsense", "unrecognized"),
        ("--trace zzz", "--trace zzz"),
        ("--trace demo-000 --output x", "--trace"),
        (f"--pairs {DEMO}", "no pairs for any sample"),
        ("--teacher /no/such", "/no/such: cannot be loaded"),
        ("--output /", "--output /: "),
        ("--output /proc/x.jsonl", "--output /proc/x.jsonl: "),
        ("--output /proc/x/y.jsonl", "--output /proc/x/y.jsonl: "),
        ("--device abacus", "on abacus"),
    ],
)
def test_bad_flags_are_told_in_one_line(argv, complaint):
    with pytest.raises(ttsi.InputError) as e:
        quiet(*argv.split())
    assert complaint in str(e.value) and "\n" not in str(e.value)


def test_bad_input_ends_with_exit_code_2_and_no_traceback(tmp_path):
    code, out, err = python(tmp_path, "--k", 0)
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("ttsi: --k 0: "), err


def test_flags(capsys):
    flags = ttsi.parse_flags(["--paper", "--max_new_tokens=9", "--no-shuffle", "--lora-rank", "4"])
    stated = {"tau": 0.95, "k": 1, "drafts": 1, "attempts": 1, "check": False, "lora_alpha": 16.0}
    stated |= {"optimizer": "adamw", "lr": 1e-4, "adapt": "full", "epochs": 5, "shuffle": False}
    stated |= {"max_new_tokens": 9, "lora_rank": 4}
    assert dataclasses.asdict(flags).items() >= stated.items()
    assert ttsi.parse_flags(["--lora_rank", "3"]) == ttsi.parse_flags(["--lora-rank", "3"])
    assert ttsi.parse_flags([]) == ttsi.Config(), "the defaults are those of Config"
    with pytest.raises(SystemExit):
        ttsi.parse_flags(["-h"])
    told = capsys.readouterr().out
    missing = [f.name for f in dataclasses.fields(ttsi.Config) if f"  --{f.name}" not in told]
    assert not missing, "a field is no flag"


# ---------------------------------------------------------------------------------------- runs


def test_output_resumes_after_any_cut_and_refuses_other_settings(loaded, tmp_path):
    path = tmp_path / "new" / "run.jsonl"
    summary, _ = quiet(*SHORT, "--output", path)
    whole, raw = timeless(path), path.read_bytes()
    assert [r["id"] for r in whole] == [f"demo-{i:03d}" for i in range(5)], "not each, in order"
    assert {r["decision"] for r in whole} > {"adapted"}, "nothing to compare"
    written = json.loads((tmp_path / "new/run.summary.json").read_text())
    assert written.items() >= summary.items() and written["config"]["tau"] == 0.95
    ends = [0] + [i + 1 for i, byte in enumerate(raw) if byte == 10]
    for cut in (0, 9, ends[1], ends[2] - 1, ends[2] + 10, ends[4]):
        path.write_bytes(raw[:cut])
        quiet(*SHORT, "--output", path)
        assert timeless(path) == whole, f"cut at {cut}: other rows than an uninterrupted run"
        kept = max(end for end in ends if end <= cut)
        assert path.read_bytes()[:kept] == raw[:kept], "whole rows were made again"
    path.write_bytes(raw[: ends[2]])
    for flags, why in (["--tau", 0.5], "tau = 0.95, not 0.5"), (["--trace", "demo-050"], "--trace"):
        with pytest.raises(ttsi.InputError, match=why):
            quiet(*SHORT, "--output", path, *flags)
    assert path.read_bytes() == raw[: ends[2]], "a refused run must not touch the file"


def copied(folder):
    """-> the flags of a model and data of its own"""
    shutil.copytree(HERE / "data/model", folder / "m")
    shutil.copy(DEMO, folder / "d.jsonl")
    return [*SHORT, "--model", folder / "m", "--data", folder / "d.jsonl"]


def cut_short(path):
    """Two rows stay; -> all that were there"""
    rows = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(rows[:2]))
    return rows


def test_the_same_files_elsewhere_go_on(tmp_path):
    path = tmp_path / "run.jsonl"
    quiet(*copied(tmp_path / "here"), "--output", path)
    whole, rows = timeless(path), cut_short(path)
    quiet(*copied(tmp_path / "there"), "--output", path)
    assert timeless(path) == whole, "other rows"
    assert path.read_bytes().splitlines(keepends=True)[:2] == rows[:2], "all were made again"


def test_other_weights_under_the_same_path_are_refused(tmp_path):
    path, argv = tmp_path / "run.jsonl", copied(tmp_path / "here")
    quiet(*argv, "--output", path)
    cut_short(path)
    before, file = path.read_bytes(), tmp_path / "here/m/model.safetensors"
    weights = safetensors.torch.load_file(file)
    weights["model.norm.weight"][0] += 0.5
    safetensors.torch.save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ttsi.InputError, match="begun with model = "):
        quiet(*argv, "--output", path)
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
    bad += [b'{"id": "demo-000"}', raw.splitlines()[0].replace(b"scores", b"x")]
    cases = [(raw + line + b"\n", kept) for line in bad[:-1]]
    cases += [(raw, text) for text in (b"[]", b'{"config": [5]}', b"{")]
    for rows, summary in cases:
        path.write_bytes(rows)
        beside.write_bytes(summary)
        with pytest.raises(ttsi.InputError, match=f"^--output {path}: .*; take") as e:
            quiet(*BRIEF, "--output", path)
        assert path.read_bytes() == rows, "a file that is refused must not be touched"
        assert "\n" not in str(e.value)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "notes.txt").write_text("no rows, and no end of line")
    for name in ("pipe", "notes.txt"):
        with pytest.raises(ttsi.InputError, match=f"^--output {tmp_path / name}: "):
            quiet(*BRIEF, "--output", tmp_path / name)
    assert (tmp_path / "notes.txt").read_text() == "no rows, and no end of line"


def test_outputs_side_by_side_do_not_touch_one_another(loaded, tmp_path):
    others = ["run.rank0of2.backup.jsonl", "run.ranking.jsonl"]
    for name in others:
        (tmp_path / name).write_text('{"id": "demo-000"}\n')
    for tau in (0.1, 0.2, 0.1):
        for name in (f"tau{tau}", f"run{tau}.jsonl", f"run{tau}.2.jsonl"):
            quiet(*BRIEF, "--limit", 1, "--tau", tau, "--output", tmp_path / name)
    with pytest.raises(ttsi.InputError, match="begun with tau = 0.1, not 0.2"):
        quiet(*BRIEF, "--limit", 1, "--tau", 0.2, "--output", tmp_path / "tau0.1")
    quiet(*BRIEF, "--limit", 1, "--output", tmp_path / "run.jsonl")
    assert len(list(tmp_path.iterdir())) == 2 + 6 * 2 + 2
    assert all((tmp_path / name).read_text() == '{"id": "demo-000"}\n' for name in others)


def test_a_row_lets_a_reader_check_the_decision(loaded, tmp_path):
    quiet(*SHORT, "--output", tmp_path / "run.jsonl")
    for row in read(tmp_path / "run.jsonl"):
        p = sorted(map(math.exp, row["logp"].values()), reverse=True)
        assert row["margin"] == pytest.approx((p[0] - p[1]) / sum(p), abs=1e-6)
        assert (row["decision"] == "certain") == (row["margin"] >= 0.95) == (not row["drafts"])
        assert (row["decision"] == "adapted") == bool(row["pairs"]) == bool(row["loss"])
        assert all(bool(d["pair"]) == (d["verdict"] == "kept") for d in row["drafts"])
        sample = to_samples(DEMO)[row["id"]]
        assert row["scores"]["answer"] == ttsi.grade(row["answer"], sample)


def test_trace_prints_the_story_in_the_algorithms_order_the_label_last(loaded, tmp_path):
    given = {"id": "demo-003", "pairs": [pair("another one", "f", x="7")]}
    (tmp_path / "p.jsonl").write_text(json.dumps(given))
    argv = ["--trace", "demo-003", "--tau", 2, "--no-check", "--epochs", 2]
    _, text = quiet(*argv, "--pairs", tmp_path / "p.jsonl")
    sample = to_samples(DEMO)["demo-003"]
    parts = ["<|system|>", "<|user|>" + ttsi.user_text(sample["messages"]), "margin", "drafts"]
    parts += ["another one", "kept", "another one", "loss", "adapted", "answer", "label"]
    for part in parts:
        assert part in text, f"{part} is missing, or out of order"
        text = text[text.index(part) + len(part) :]
    assert text.strip() == str(sample["call"]), "the label comes last, and nothing behind it"
    _, text = quiet(*argv[:4], "--attempts", 1, "--max-new-tokens", 5)
    assert "no pair" in text and text.strip().endswith(str(sample["call"]))


def test_trace_of_a_sample_that_cannot_be_asked(loaded, tmp_path):
    record = json.loads(DEMO.read_text().splitlines()[0]) | {"messages": user("word " * 5000)}
    (tmp_path / "d.jsonl").write_text(json.dumps(record))
    _, text = quiet("--data", tmp_path / "d.jsonl", "--trace", record["id"])
    assert "not answered: " in text and text.strip().endswith(str(record["call"]))


def test_pairs_come_from_another_run(loaded, tmp_path):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    quiet(*SHORT, "--tau", 2, "--output", first)
    quiet(*SHORT, "--tau", 2, "--pairs", first, "--output", second)
    for a, b in zip(timeless(first), timeless(second), strict=True):
        assert (a["pairs"], a["answer"]) == (b["pairs"], b["answer"]), "a run's rows are pairs"


def test_the_demo_shows_every_step(embedded):
    samples = list(to_samples(DEMO).values())
    assert len(samples) == 100
    rows = rows_of(*embedded, samples[:20], ttsi.Config())
    grades = [(row["scores"]["direct"]["name"], row["margin"]) for row in rows]
    right, wrong = ([m for name, m in grades if name == value] for value in (True, False))
    assert sum(right) / len(right) > sum(wrong) / len(wrong), "wrong answers have lower margins"
    assert sum(row["decision"] == "adapted" for row in rows) >= 5, "drafts are accepted for many"


# --------------------------------------------------------------------------------- nothing is lost

TABLE = r"(?m)^samples +all {},"


def test_killed_at_random_moments_a_run_goes_on(tmp_path):
    path, r, kills = tmp_path / "run.jsonl", random.Random(0), 0
    argv, began = (*SHORT, "--output", path), time.time()
    assert python(tmp_path, *argv, first=fsync_slowly)[0] == 0
    whole, seconds = timeless(path), time.time() - began
    path.unlink()
    while kills < few(3, 50):
        child = start(tmp_path, *argv, first=fsync_slowly)
        child.join(r.uniform(0, seconds))
        child.kill()
        child.join()
        kills += child.exitcode == -signal.SIGKILL
        if child.exitcode == 0:
            assert timeless(path) == whole, "other rows than an uninterrupted run"
            path.unlink()
    assert python(tmp_path, *argv)[0] == 0
    assert timeless(path) == whole and len(whole) == 5, "other rows than an uninterrupted run"


def test_interrupted_it_ends_with_the_table_so_far(tmp_path):
    path = tmp_path / "run.jsonl"
    child = start(tmp_path, "--output", path)
    while not (path.exists() and path.read_bytes()):
        assert child.is_alive(), (tmp_path / "err").read_text()
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGINT)
    child.join(60)
    n, out = len(path.read_text().splitlines()), (tmp_path / "out").read_text()
    assert child.exitcode == 130 and "Traceback" not in (tmp_path / "err").read_text()
    assert re.search(TABLE.format(n), out) and n < 100, "no table of what is there"


def test_an_interrupt_in_training_leaves_the_base_as_it_was(loaded, embedded, monkeypatch):
    before, gradient, calls = digest(embedded[0]), torch.autograd.grad, itertools.count()

    def interrupted(*args, **more):
        if next(calls) == 3:  # in the second sample
            raise KeyboardInterrupt
        return gradient(*args, **more)

    monkeypatch.setattr(torch.autograd, "grad", interrupted)
    with pytest.raises(KeyboardInterrupt), contextlib.redirect_stdout(io.StringIO()) as told:
        ttsi.main([*map(str, SHORT), "--tau", "2"])
    assert digest(embedded[0]) == before and not hooks(embedded[0]), "not reset"
    assert re.search(TABLE.format("[1-4]"), told.getvalue()), "no table of what is there"


def test_rows_are_on_disk_before_the_next_sample(loaded, tmp_path, monkeypatch):
    path, keep, fsync, seen, synced = tmp_path / "run.jsonl", ttsi.tt_si, os.fsync, [], []

    def looking(*args):
        seen.append((len(timeless(path)), path.stat().st_size in synced))
        return keep(*args)

    monkeypatch.setattr(ttsi, "tt_si", looking)
    monkeypatch.setattr(os, "fsync", lambda fd: (fsync(fd), synced.append(os.fstat(fd).st_size)))
    quiet(*BRIEF, "--output", path)
    assert seen == [(n, True) for n in range(4)], (
        "rows there, and no byte that was not synchronised"
    )


def test_a_full_disk_ends_with_one_line_and_keeps_what_is_there(loaded, tmp_path):
    path, argv = tmp_path / "run.jsonl", (*SHORT, "--output", tmp_path / "run.jsonl")
    quiet(*argv)
    whole, raw = timeless(path), path.read_bytes().splitlines(keepends=True)
    path.unlink()
    room = len(b"".join(raw[:3])) + 50  # for three rows and a part of the next
    full = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (room, room))
    code, out, err = python(tmp_path, *argv, first=full)
    assert code == 1 and "Traceback" not in err and re.search(TABLE.format("[34]"), out)
    assert err.splitlines()[-1].startswith("ttsi: [Errno 27] File too large"), err
    ids = [json.loads(line)["id"] for line in path.read_bytes().splitlines()[:3]]
    assert ids == [r["id"] for r in whole[:3]], "rows that were there are lost"
    quiet(*argv)
    assert timeless(path) == whole and not list(tmp_path.glob("*part")), "it does not go on"


def test_a_file_is_replaced_in_one_step(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "x"
    ttsi.save(path, ["one", "two"])
    with monkeypatch.context() as m, pytest.raises(OSError, match="No space left"):
        m.setattr(os, "fsync", full)
        ttsi.save(path, ["three"])
    assert path.read_bytes() == b"one\ntwo\n", "neither the old nor the new file is there"
    ttsi.save(path, ["three"])
    ttsi.save(path, ["four"], "a")
    assert path.read_bytes() == b"three\nfour\n" and list(tmp_path.iterdir()) == [path]


def test_a_vanished_directory_ends_with_one_line_and_the_table(loaded, tmp_path, monkeypatch):
    path, keep = tmp_path / "new/run.jsonl", ttsi.tt_si

    def vanishing(model, tok, sample, *args):
        if sample["id"] == "demo-002":
            shutil.rmtree(tmp_path / "new")
        return keep(model, tok, sample, *args)

    monkeypatch.setattr(ttsi, "tt_si", vanishing)
    gone = pytest.raises(OSError, match="No such file or directory: .*new/run.jsonl")
    with gone, contextlib.redirect_stdout(io.StringIO()) as told:
        ttsi.main([*map(str, BRIEF), "--output", str(path)])
    assert re.search(TABLE.format(3), told.getvalue()), "what was computed is lost"


MEMORY = [None, MemoryError("no memory"), torch.OutOfMemoryError("CUDA out of memory.")]


@pytest.mark.parametrize("error", MEMORY, ids=["host", "python", "device"])
def test_out_of_memory_is_one_line_and_the_rows_stay(loaded, tmp_path, error):
    path, full = tmp_path / "run.jsonl", functools.partial(fail_at_the_third_gradient, error)
    argv = (*SHORT, "--tau", 2, "--output", path)
    code, out, err = python(tmp_path, *argv, first=full)
    n, there = len(timeless(path)), path.read_bytes()
    assert code == 1 and re.search(TABLE.format(n), out) and 0 < n < 5, err
    last = err.splitlines()[-1]
    assert last.startswith("ttsi: ") and "memory" in last and "Traceback" not in err
    quiet(*argv)
    assert path.read_bytes().startswith(there) and len(timeless(path)) == 5, "it does not go on"


def test_other_errors_are_not_taken_for_memory(tmp_path):
    full = functools.partial(fail_at_the_third_gradient, RuntimeError("shapes differ"))
    code, _, err = python(tmp_path, *SHORT, "--tau", 2, first=full)
    assert code == 1 and "Traceback" in err and "RuntimeError: shapes differ" in err


# ----------------------------------------------------------------------------------- processes


def as_ranks(monkeypatch, world, *argv):
    for rank in range(world):
        with monkeypatch.context() as m:
            m.setenv("RANK", str(rank))
            m.setenv("WORLD_SIZE", str(world))
            assert "TT-SI" not in quiet(*argv)[1], "no table of a part"


def test_ranks_share_the_samples_and_one_process_merges_their_rows(loaded, tmp_path, monkeypatch):
    def ids(name):
        return "".join(row["id"][-1] for row in timeless(tmp_path / name))

    path, one, argv = tmp_path / "run.jsonl", tmp_path / "one.jsonl", (*SHORT, "--limit", 7)
    with pytest.raises(ttsi.InputError, match="--output"):
        as_ranks(monkeypatch, 2, *argv)
    quiet(*argv, "--output", one)
    as_ranks(monkeypatch, 2, *argv, "--output", path)
    assert (ids("run.rank0of2.jsonl"), ids("run.rank1of2.jsonl")) == ("0246", "135")
    cut = tmp_path / "run.rank1of2.jsonl"
    cut.write_bytes(cut.read_bytes()[:-9])
    as_ranks(monkeypatch, 3, *argv, "--output", path)
    merged = [{*ids(f"run.rank{rank}of3.jsonl")} for rank in range(3)]
    assert set.union(*merged) == {*"0123456"}, "a rank's rows are lost"
    monkeypatch.setattr(ttsi, "tt_si", lambda *_: 1 / 0)  # nothing is run again
    _, text = quiet(*argv, "--output", path)
    assert timeless(path) == timeless(one) and re.search(TABLE.format(7), text)
    assert len(list(tmp_path.glob("run*"))) == 2, "files of ranks are left"


@slow
def test_torchrun(tmp_path):
    argv = [str(a) for a in (HERE / "ttsi.py", *SHORT, "--output", tmp_path / "run.jsonl")]
    env, ranks = os.environ | {"OMP_NUM_THREADS": "1"}, "torch.distributed.run"
    for n in (2, 3):
        command = [sys.executable, "-m", ranks, f"--nproc-per-node={n}", *argv]
        subprocess.run(command, check=True, env=env)
    assert len(list(tmp_path.glob("run.rank?of?.jsonl"))) == 5
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and re.search(TABLE.format(5), done.stdout), done.stderr
    quiet(*SHORT, "--output", tmp_path / "one.jsonl")
    for a, b in zip(
        timeless(tmp_path / "run.jsonl"), timeless(tmp_path / "one.jsonl"), strict=True
    ):
        assert (a["id"], a["answer"], a["pairs"]) == (b["id"], b["answer"], b["pairs"])


# ------------------------------------------------------------------------------- hostile input


def hang(*_):
    raise TimeoutError


@pytest.mark.parametrize(
    "kind,n",
    [(hostile_data, few(25, 500)), (hostile_pairs, few(10, 150))]
    + [(hostile_flags, few(15, 200)), (hostile_model, few(6, 150))],
)
def test_hostile_input_is_refused_in_lines_that_name_the_place_or_goes_through(
    embedded, tmp_path, monkeypatch, kind, n
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    load, before, refused = ttsi.load, digest(embedded[0]), 0
    signal.signal(signal.SIGALRM, hang)
    brief = [*BRIEF, "--limit", 1, "--epochs", 1, "--tau", 2]
    for seed in range(n):
        argv, place = kind(random.Random(seed), tmp_path)
        other = re.search("--(model|teacher|device|dtype)", " ".join(map(str, argv)))
        monkeypatch.setattr(ttsi, "load", load if other else lambda *_: embedded)
        signal.alarm(60)
        try:
            summary, _ = quiet(*brief, *argv)
            assert summary["samples"]["all"] == 1 or kind is hostile_flags, "the sample is lost"
        except ttsi.InputError as e:
            assert re.match(place, str(e)), f"{kind.__name__}, seed {seed}: {place} not in {e}"
            assert "\n" not in str(e).replace("a\nb", ""), f"{kind.__name__}, seed {seed}: {e}"
            refused += 1
        except BaseException as e:
            raise AssertionError(f"{kind.__name__}, seed {seed}: {argv}") from e
        finally:
            signal.alarm(0)
    assert 0 < refused < n and digest(embedded[0]) == before


@pytest.mark.parametrize("offline", [True, pytest.param(False, marks=slow)])
def test_the_default_run_opens_no_socket(tmp_path, offline):
    code, out, err = python(
        tmp_path, "--limit", 3, first=functools.partial(refuse_sockets, offline)
    )
    assert code == 0 and re.search(TABLE.format(3), out), err
    probe = functools.partial(refuse_sockets, offline, socket.socket)
    assert python(tmp_path, "--limit", 1, first=probe)[0] == 1, "the hook sees none"


def test_a_model_brings_weights_in_safetensors_and_no_code(tok, tmp_path):
    model, good = tiny(tok), tmp_path / "good"
    assert ttsi.load(saved(model, tok, good), ttsi.Config())
    conf = transformers.LlamaConfig(vocab_size=len(tok), tie_word_embeddings=True, **SMALL)
    tied = saved(transformers.LlamaForCausalLM(conf), tok, tmp_path / "tied")
    assert ttsi.load(tied, ttsi.Config()), "the head's weights are the embedding's, not missing"
    pickled, coded, partly = (shutil.copytree(good, tmp_path / n) for n in ("pkl", "code", "part"))
    (pickled / "model.safetensors").unlink()
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    (coded / "code.py").write_text(f"open({str(tmp_path / 'hacked')!r}, 'w')\n")
    auto = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    conf = json.loads((coded / "config.json").read_text())
    (coded / "config.json").write_text(json.dumps(conf | {"model_type": "x", "auto_map": auto}))
    auto = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": [None, "code.T"]}}
    (coded / "tokenizer_config.json").write_text(json.dumps(auto))
    weights = safetensors.torch.load_file(good / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    safetensors.torch.save_file(weights, partly / "model.safetensors", {"format": "pt"})
    for folder, why in ((pickled, "safetensors"), (coded, "cannot be"), (partly, "up_proj")):
        with pytest.raises(ttsi.InputError, match=f"^{folder}: cannot be loaded.*{why}") as e:
            ttsi.load(str(folder), ttsi.Config())
        assert "\n" not in str(e.value) and not (tmp_path / "hacked").exists(), "its code was run"


# ------------------------------------------------------------------------------------ the project


def test_imports_and_layout():
    source = (HERE / "ttsi.py").read_text()
    nodes = [*ast.walk(ast.parse(source))]
    names = {a.name.split(".")[0] for n in nodes if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module.split(".")[0] for n in nodes if isinstance(n, ast.ImportFrom)}
    lines = (HERE / "requirements.txt").read_text().split()
    wanted = {re.split(r"\W", line)[0] for line in lines}
    assert wanted == {"torch", "transformers", "tqdm"}
    assert names - set(sys.stdlib_module_names) <= wanted, "another package"
    assert len(source.splitlines()) <= 800, "ttsi.py is longer than 800 lines"
    top = {"ttsi.py", "test_ttsi.py", "requirements.txt", "README.md", "LICENSE", "data", ".ci"}
    if (HERE / ".git").exists():
        tracked = subprocess.run(["git", "ls-files"], cwd=HERE, capture_output=True, text=True)
        found = {Path(name).parts[0] for name in tracked.stdout.splitlines()}
        assert found <= top | {".gitignore"}, "something else lies at the top level"


def test_import_has_no_side_effects(capfd, monkeypatch):
    def state():
        level = transformers.logging.get_verbosity()
        return random.getstate(), torch.get_rng_state().tolist(), {**os.environ}, level, sys.argv

    monkeypatch.setattr(sys, "argv", ["x", "--nonsense"])
    before = state()
    assert runpy.run_path(str(HERE / "ttsi.py"))["Config"], "nothing was defined"
    assert state() == before and capfd.readouterr() == ("", ""), "importing it does something"


def test_splits_are_disjoint():
    splits = {split: read(HERE / f"data/{split}.jsonl") for split in ("dev", "demo", "test")}
    assert [len(rows) for rows in splits.values()] == [200, 100, 500]
    tools = [{t["function"]["name"] for r in rows for t in r["tools"]} for rows in splits.values()]
    for a, b in itertools.combinations(tools, 2):
        assert not a & b, "a tool is in two splits"


def test_readme_commands_and_example():
    readme = (HERE / "README.md").read_text()
    install = "pip install -r requirements.txt && python ttsi.py"
    for command in (install, "pip install pytest && python -m pytest -q"):
        assert readme.count(f"\n{command}\n") == 1, "ci runs these two lines out of the README"
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


# ---------------------------------------------------------------------------------- real input

FILES = ["seal-tools/canonical_294", "toolalpaca/canonical_real", "bfcl/canonical_multiple"]
FILES += ["bfcl/canonical_simple_python", "api-bank/canonical_l1", "api-bank/canonical_l2"]


@pytest.mark.parametrize("name", FILES)
def test_real_data_goes_through(loaded, tmp_path, name):
    path = SHARED / "benchmarks" / f"{name}.jsonl"
    if not path.exists():
        pytest.skip("the benchmarks are not beside this checkout")
    samples, rows = list(to_samples(path).values()), []
    for sample, other in zip(samples, samples[1:] + samples[:1], strict=True):
        given = {"request": "Again: " + ttsi.user_text(other["messages"]), "call": other["call"]}
        rows.append(json.dumps({"id": sample["id"], "pairs": [given]}))  # only to exercise T
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    n = min(few(2, 10**6), len(samples))
    argv = ["--data", path, "--pairs", tmp_path / "pairs.jsonl", "--no-check", "--tau", 2]
    summary, _ = quiet(*argv, "--max-new-tokens", 24, "--epochs", 1, "--limit", n)
    refused = sum(v for k, v in summary["decisions"].items() if "not answered" in k)
    assert summary["samples"]["labelled"] == n, "a sample is lost"
    assert summary["decisions"]["adapted"] + refused == n, "T was not reached"
    assert not refused or "seal-tools" not in name
