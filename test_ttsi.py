"""Each test compares ttsi.py with what shares no code: a closed form, brute force, an invariant.
The line above it names the bug that it guards against. SLOW=1 adds the long cases."""

import ast
import contextlib
import copy
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import runpy
import signal
import ssl
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock
from urllib.error import HTTPError, URLError

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import ttsi

HERE = Path(__file__).resolve().parent
SOURCE, README = ((HERE / name).read_text() for name in ("ttsi.py", "README.md"))
MOST = 1062  # lines of ttsi.py
FLAGS = {field.name for field in fields(ttsi.Config)} | {"paper"}
SLOW = bool(os.environ.get("SLOW"))
torch.set_num_threads(1)  # for models as small as these more would wait for one another
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}  # we fork


# ------------------------------------------------------------------- samples and small models
def tool(name, **properties):
    schema = {"type": "object", "properties": properties, "required": list(properties)[:1]}
    return {"name": name, "description": f"does {name}", "parameters": schema}


def user(text):
    return [{"role": "user", "content": text}]


def pair(request, name, **arguments):
    return {"request": request, "call": {"name": name, "arguments": arguments}}


def ask(i, request, tools, call=None, pairs=None):
    sample = {"id": i, "messages": user(request), "tools": tools, "call": call}
    return sample | ({} if pairs is None else {"pairs": [*map(json.dumps, pairs)]})


STRING, INTEGER, W = {"type": "string"}, {"type": "integer"}, [1.0, -2.0, 0.5, 3.0]
GET = [tool("get"), tool("get_all", x=STRING), tool("get_all_users", y=INTEGER)]
FLIGHT = [tool("cancel_flight", city=STRING), tool("book_flight", city=STRING, days=INTEGER)]
F, CANCEL = pair("", "f")["call"], pair("", "cancel_flight", city="Rome")["call"]
ONE, TWO = pair("fetch x", "get_all", x="x"), pair("/a long one, 7", "get_all_users", y=7)
BOOK = pair("/book Oslo", "book_flight", city="Oslo", days=3)
A = ask("a", "/get them all", GET, F | {"name": "get"}, [ONE, TWO])  # names that begin one another
NINE = [*FLIGHT, *(tool(f"act_{i}") for i in range(7))]  # more than are scored at once
B = ask("b", "cancel my flight to Rome, would you, please", NINE, CANCEL, [BOOK])
C = ask("c", "hm", [tool("only")], F | {"name": "only"}, [])
FIRST = ttsi.Config(max_new_tokens=12, drafts=1, k=1, temperature=1.0)
ALWAYS = replace(FIRST, tau=2.0, k=2, check=False, epochs=2, pairs="supplied")
ODD = ["name", "arguments", "App\\Tools\\go", 'q"', "a\tb", "größe", "e\u0301", "0", "go", "g"]
STATUS = {"type": "function", "function": CANCEL | {"arguments": '{"city": "Rome"}'}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [STATUS | {"id": "c"}]}
EARLIER = [CALLED, {"role": "tool", "tool_call_id": "c", "content": "pending"}]
FREE = {"cost": 0, "run": 0}  # what differs from run to run
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
SMALL |= {"max_position_embeddings": 2048, "mamba_d_ssm": 64, "mamba_n_heads": 4}
KINDS = dict.fromkeys(["Llama", "Qwen2", "Qwen3", "Gemma", "Granite", "Olmo2", "GPTNeoX"], {})
KINDS |= dict.fromkeys(["Mistral", "Gemma2", "Gemma3Text"], {"sliding_window": 16})
ROPE = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
ROPE |= {"long_factor": [4.0] * 4, "short_factor": [1.0] * 4}
REFUSED = [("longrope", "Llama", {"rope_parameters": {"rope_type": "longrope"} | ROPE})]
REFUSED += [("dynamic", "Llama", {"rope_parameters": {"rope_type": "dynamic"} | ROPE})]
REFUSED += [("cache", kind, {}) for kind in ("FalconH1", "Mamba", "Rwkv")]
REFUSED += [("embedding", "Llama", {"vocab_size": 1250})]
LONG = [*KINDS] if SLOW else ["Llama", "Qwen2", "Gemma3Text"]
TOKENIZERS = ["embedded", "bytes", "sentencepiece", *(REAL := ["qwen3", "llama3_1", "gemma3"])]
SHOWN = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}"
SHOWN += "{% if m.role == 'assistant' %}Answer:{% endif %}{{ m.content }}"
SHOWN += "{% for c in m.tool_calls %}<call>{{ {'arguments': c.function.arguments,"
SHOWN += " 'name': c.function.name} | tojson }}</call>{% endfor %}"
SHOWN += "{% endfor %}{% if add_generation_prompt %}Answer:{% endif %}"
DAY = "{{ '' if enable_thinking is defined else '<think>' }}{{ date_string + strftime_now('%B') }}"


def small(tok, kind="Llama", **more):
    """A random model whose logits are far from flat, so that a wrong one shows."""
    torch.manual_seed(0)
    more = {"vocab_size": len(tok), "bos_token_id": None, "eos_token_id": tok.eos_token_id} | more
    conf = getattr(transformers, f"{kind}Config")(**SMALL | KINDS.get(kind, {}) | more)
    model = transformers.AutoModelForCausalLM.from_config(conf).eval().requires_grad_(False)
    for p in model.parameters():
        p.mul_(6 if p.dim() > 1 else 1)
    return model


def bpe(pre, decoder, merges, template):
    """A tokenizer of single characters, but for a few that merge."""
    letters = {*map(chr, range(33, 127)), *"\n▁é🙂🙃日本", *pre_tokenizers.ByteLevel.alphabet()}
    vocab = {part: i for i, part in enumerate(["<unk>", "<end>", *sorted(letters), *merges])}
    made = Tokenizer(models.BPE(vocab, [(part[0], part[1:]) for part in merges], unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre, decoder
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")
    return templated(made, template)


@functools.cache
def tokenizer(name):
    if name == "bytes":  # nothing is split: tokens merge across whatever stands side by side
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return bpe(level, decoders.ByteLevel(), ["}/", "}}/", '":', '",', "2,", '"}', '"O'], SHOWN)
    if name == "sentencepiece":  # it puts a blank first; the template shows the day, no tools
        meta, template = pre_tokenizers.Metaspace(split=False), DAY + SHOWN.replace("tools or", "")
        return bpe(meta, decoders.Metaspace(), [":{", '"_', '",', "}}"], template)
    folder = HERE.parent / "shared/tokenizers" / name if name in REAL else HERE / "data/model"
    if not folder.exists():
        pytest.skip("no real tokenizers beside this checkout")
    return transformers.AutoTokenizer.from_pretrained(folder, model_max_length=2048)


def templated(tok, template):
    tok = copy.deepcopy(tok)
    tok.chat_template = template
    return tok


def digest(model):
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    bits = [p.contiguous().view(torch.uint8).numpy() for p in model.state_dict().values()]
    return hooks, b"".join(part.tobytes() for part in bits)


MODEL, _ = ttsi.load(ttsi.Config.model, ttsi.Config())
TOK, LLAMA = tokenizer("embedded"), small(tokenizer("embedded"))
DEMO = [*ttsi.read_jsonl(HERE / "data/demo.jsonl", ttsi.to_sample).values()]
# Its call has an optional value that nobody said; both likely tools have optional keys.
GUESSED = ttsi.read_jsonl(HERE / "data/test.jsonl", ttsi.to_sample)["test-030"]


# ------------------------------------------------------- oracles: no cache, no padding, no hooks
def prompt(tok, x, messages, call=None):
    """-> the text of a prompt, and of a call behind it, by the chat template alone."""
    how = {"tokenize": False, "enable_thinking": False, "add_generation_prompt": not call}
    how["tools"] = [{"type": "function", "function": t} for t in x.tools]
    answer = {"role": "assistant", "content": "", "tool_calls": [{"function": call}]}
    return tok.apply_chat_template([*messages, answer] if call else messages, **how)


def joined(tok, x, messages, call, end=""):
    """-> (ids of prompt and call in one, up to where a text `end` is closed; the call's begin)"""
    start, whole = prompt(tok, x, messages), prompt(tok, x, messages, call)
    ids = tok(whole, add_special_tokens=False).input_ids
    at = whole.index(end, len(start)) + len(end) if end else len(whole)
    n = next(n for n in range(len(ids)) if len(tok.decode(ids[: n + 1])) >= at)
    return ids[: n + 1], len(tok(start, add_special_tokens=False).input_ids)


def naive_logp(model, ids, begin):
    """log P of ids[begin:], in one forward pass over all of them."""
    logp = model(torch.tensor([ids])).logits[0, begin - 1 : -1].float().log_softmax(-1)
    return logp[range(len(ids) - begin), ids[begin:]].sum()


def naive_h(model, tok, x, messages):
    """log softmax of log P of each name and what closes it, as a whole answer holds them."""
    calls = [{"name": name, "arguments": {}} for name in x.schemas]
    spans = [joined(tok, x, messages, call, json.dumps(call["name"])) for call in calls]
    return torch.stack([naive_logp(model, *s) for s in spans]).log_softmax(0).tolist()


def naive_greedy(model, tok, ids, n):
    """An answer for which everything is read again for each token."""
    new = []
    while len(new) < n and not ttsi.parse(tok.decode(new)) and tok.eos_token_id not in new:
        new.append(model(torch.tensor([ids + new])).logits[0, -1].argmax().item())
    return tok.decode([token for token in new if token != tok.eos_token_id])


def wrapped(model, lora, cfg, skip):
    """A copy of a model whose linear layers are W + s B A, but for the first tokens."""

    def forward(x, plain, A, B):
        seen = (torch.arange(x.shape[-2]) >= skip)[:, None]
        return plain(x) + seen * (x @ A @ B)

    model, scale = copy.deepcopy(model), cfg.lora_alpha / cfg.lora_rank
    layers = [m for m in model.get_decoder().modules() if isinstance(m, torch.nn.Linear)]
    for layer, A, B in zip(layers, lora[::2], lora[1::2], strict=True):
        layer.forward = functools.partial(forward, plain=layer.forward, A=A, B=scale * B)
    return model


def naive_train(model, tok, x, pairs, cfg):
    """T by Polyak, each pair a forward pass of its own -> (losses, the adapted model)"""
    spans = [joined(tok, x, user(p["request"]), p["call"]) for p in pairs]
    shared = len(os.path.commonprefix([x.ids[: x.head], *(ids for ids, _ in spans)]))
    skip, losses = shared * (cfg.adapt == "suffix"), []
    with ttsi.temporary_lora(model, cfg, ttsi.draw(cfg.seed, x.id, "adapter")) as lora:
        pass  # the hooks go, the parameters stay
    for step in range(cfg.epochs):
        now = wrapped(model, lora, cfg, skip)
        loss = sum(-naive_logp(now, ids, at) / (len(ids) - at) for ids, at in spans) / len(spans)
        losses.append(loss.item())
        lr = cfg.lr * (1 + math.cos(math.pi * step / cfg.epochs)) / 2
        gradient = torch.autograd.grad(loss, lora)
        square = sum(g.square().sum() for g in gradient)
        for p, g in zip(lora, gradient, strict=True):
            p.data -= lr * loss.item() / square * g
    return losses, wrapped(model, lora, cfg, skip)


def agrees(model, tok, sample, cfg):
    """Every stage of one sample against the oracles -> its result."""
    got, x = ttsi.tt_si(model, tok, sample, cfg), ttsi.prepare(tok, sample, cfg)
    want, logp = naive_h(model, tok, x, sample["messages"]), torch.tensor([*got.logp.values()])
    assert logp.log_softmax(0).tolist() == pytest.approx(want, abs=1e-2), "H is not of whole calls"
    losses, adapted = naive_train(model, tok, x, got.pairs, cfg) if got.pairs else ([], model)
    assert (got.loss or []) == pytest.approx(losses, rel=1e-3), "T is not that of a naive loop"
    assert got.answer == naive_greedy(adapted, tok, x.ids, cfg.max_new_tokens), "answers"
    assert got.direct == naive_greedy(model, tok, x.ids, cfg.max_new_tokens), "not the base's"
    return got


# -------------------------------------------------------------------------------------------- H
# Guards: u of logits, or of the wrong two; a crash for one tool; no bootstrap of the mean.
def test_margin_and_interval():
    for logp, want in ([math.log(3), 0], 0.5), ([-9, math.log(2) - 9, -99], 1 / 3), ([-5], 1):
        found = ttsi.margin(dict(enumerate(map(float, logp))))
        assert found == pytest.approx(want, abs=1e-6), f"{logp}: not p(1) - p(2)"
    for d in ([100.0, 0, 0, -100.0, 0], [100.0] * 3, [100.0, 100.0, 0, 100.0, 0, 0]):
        means = sorted(sum(resample) / len(d) for resample in itertools.product(d, repeat=len(d)))
        want = [means[round(q * (len(means) - 1))] for q in (0.025, 0.975)]
        assert ttsi.interval(d) == pytest.approx(want, abs=1e-3), "not that of all resamples"


# Guards: a name without what closes it, escaped, decomposed, or found in the call's own keys.
@pytest.mark.parametrize("name", TOKENIZERS)
def test_odd_names_are_scored_whole_and_found_again(name, tmp_path):
    tok, path = tokenizer(name), tmp_path / "x"
    path.write_text(json.dumps(ask("o", "go", [*map(tool, ODD)], {"name": ODD[6]})))
    x = ttsi.prepare(tok, ttsi.read_jsonl(path, ttsi.to_sample)["o"], FIRST)
    assert {*x.schemas} == {*ODD} - {ODD[6]} | {"é"}, "a name is not composed"
    for called, (ids, _) in zip(x.schemas, x.candidates, strict=True):
        text = tok.decode(ids[len(x.ids) :])
        shorter, quoted = tok.decode(ids[len(x.ids) : -1]), json.dumps(called, ensure_ascii=False)
        assert text.count(quoted) > shorter.count(quoted), f"{text}: not up to where it is closed"
        call = {"name": called, "arguments": {"q": called, "r": "look_up"}}
        assert ttsi.parse(ttsi.call_text(tok, call)) == call, called


# Guards: a prompt that depends on the order in the file, or on the id.
def test_the_order_in_the_file_changes_nothing():
    turned = B | {"id": "z", "tools": B["tools"][::-1]}
    one, two = (ttsi.prepare(TOK, sample, FIRST).ids for sample in (B, turned))
    assert one == two, "the file's order, or the id, matters"
    assert ttsi.prepare(TOK, B, replace(FIRST, seed=1)).ids != one, "--seed moves nothing"
    kept = ttsi.prepare(TOK, turned, replace(FIRST, shuffle=False)).schemas
    assert [*kept] == [t["name"] for t in turned["tools"]], "--no-shuffle"


# Guards: a prompt that is rendered or tokenised once for each tool (300 tools: 122 s).
def test_six_hundred_tools_are_prepared_in_linear_work():
    work = []
    for n in (300, 600):
        tok = Mock(wraps=TOK, chat_template=TOK.chat_template, model_max_length=10**6)
        ttsi.prepare(tok, ask("m", "hm", [tool(f"act_{i}") for i in range(n)]), FIRST)
        work.append(len(f"{tok.mock_calls}"))  # all that it was asked to render and to tokenise
    assert work[1] < 2.2 * work[0], "twice as many tools: more than twice the work"


# ------------------------------------------------------------------------------ G, in lockstep
class Scripted:
    """A Prefix of a model that writes given values, and behind each what it would rather write."""

    def __init__(self, tok, start, rows):
        self.model, self.ids, self.tok, self.start = self, [], tok, start
        self.fed = [[] for _ in rows]
        self.state = [self.fed, [[] for _ in rows], rows]
        self.generation_config = SimpleNamespace(eos_token_id=tok.eos_token_id)

    def copy(self, rows):
        return self

    def batch_select_indices(self, stay):
        self.state = [[part[i] for i in stay.tolist()] for part in self.state]

    def forward(self, cache, new, keep):
        logits = torch.zeros(len(new), 1, len(self.tok))
        for ids, fed, plan, row, p in zip(new.tolist(), *self.state, logits, strict=True):
            fed += ids
            if ids != plan[:1] or len(plan) == 1:  # something was forced
                plan[:] = [0, *self.plan(self.tok.decode(fed[self.start :]), *row)]
            del plan[0]
            p[0, plan[0]] = 1
        return logits

    def plan(self, text, outline, values, tail):
        for n in range(1, len(values) + 1):
            whole = "".join(itertools.chain(*zip(outline[:n], values[:n], strict=True)))
            if len(text) <= len(whole):
                assert whole.startswith(text), f"{text!r} was read, not {whole!r}"
                return ttsi.continuation(self.tok, (whole + tail)[len(text) :])
        return [self.tok.eos_token_id]


CITY = ['{"call": {"name": "go", "arguments": {"city": "', ', "n":', '}}, "request": "', "}"]
ROWS = [(CITY, ('Oslo"', " 1", 'to Oslo"'), t) for t in ("}}", ", ", ',"x": 2}', " ", "\n", '"')]
TEXTS = [text + '"' for text in ("", 'a\\"b', "é", "🙂🙃", "日本", "/}", "\\\\", "{x}", '\\"')]
ROWS += [(CITY, (text, n, 'x"'), ",") for text in TEXTS for n in (" 12", " 12.5", " 1e3")]
VALUES = [" -0.5", " true", " false", " null", " 0", ' {"a": {"b": [1, "}"]}}', " []", ' ["]"]']
VALUES = zip(VALUES, TEXTS[1:], ",,}}},}}", strict=True)
ROWS += [(CITY, ('x"', value, text), tail) for value, text, tail in VALUES]
ROWS += [(["{", ""], ('"call": {"name": "go", "arguments": {"n": 1}}, "request": "x"}',), "}")]
ROWS += [(['{"call": {"name": "a\\"b", "arguments":', "}}"], (' {"k": "v"}',), "}}")]
COPY, OSLO = "Cancel my FLIGHT to Rome would you please!", {"city": "Oslo"}
MISSING, TYPE = "arguments missing or unknown", "wrong type or not in enum"
COPIED, JUNK = "copy of the request", "no request and call, or too long"
CHECKS = [("go", OSLO, text, "kept") for text in ("drop Oslo", "drop OSLO")]
CHECKS += [("go", OSLO, text, COPIED) for text in (COPY, "!?", f"So: {COPY}", "oslo.")]
CHECKS += [("go", OSLO, "Oslo " * 2000, JUNK), ("f", {}, 7, JUNK)]
CHECKS += [("hm", OSLO, "drop Oslo", "no call of a tool on offer"), ("go", {}, "drop it", MISSING)]
CHECKS += [("go", OSLO | {"x": 1}, "Oslo 1", MISSING), ("no", OSLO, "to Oslo", MISSING)]
CHECKS += [("pick", {"size": "S"}, "small", "kept"), ("pick", {"size": "XL"}, "XL", TYPE)]
CHECKS += [("go", OSLO | {"days": value}, "Oslo 3 True", TYPE) for value in ("3", True)]
CHECKS += [("go", {"city": city}, "drop Oslo", ttsi.UNSAID) for city in ("Lima", "")]
CHECKS += [("go", OSLO | {"days": 3}, text, ttsi.UNSAID) for text in ("Oslo, 35", "Oslo, 3.5")]
CHECKS += [("go", OSLO | {"days": 3}, "Oslo, 3.", "kept")]
CHECKS += [("any", OSLO, "drop it", ttsi.UNSAID), ("any", OSLO | {"x": "y"}, "Oslo, y", "kept")]
BROKEN = ["", "[]", '{"request": "x"}', '{"request": "x", "call": 7}', json.dumps(ONE) + "{"]
BROKEN += ["[" * 99999]


# Guards: forced text that is not as given, or a value cut or doubled where a token reaches over.
@pytest.mark.parametrize("name", TOKENIZERS)
def test_outlines_and_values_come_out_byte_for_byte(name):
    tok, cfg = tokenizer(name), ttsi.Config()
    ids, outlines = tok("write", add_special_tokens=False).input_ids, [row[0] for row in ROWS]
    model = Scripted(tok, len(ids), ROWS)
    texts = ttsi.write(tok, ids, model, cfg, outlines, [None] * len(ROWS))
    for text, (outline, values, tail) in zip(texts, ROWS, strict=True):
        want = "".join(itertools.chain(*zip(outline, [*values, ""], strict=True)))
        assert text == want and json.loads(text), f"behind a value it would rather write {tail!r}"


# Guards: a draft without end, or one that goes on when it can become none.
def test_a_value_that_never_ends_and_one_that_is_none():
    ids, read = TOK("write").input_ids, []
    for row in (CITY, ("a" * 500, "", ""), ""), (CITY, ('x"', " no", ""), " way " * 99):
        model, cfg = Scripted(TOK, len(ids), [row]), replace(FIRST, max_new_tokens=60)
        ttsi.write(TOK, ids, model, cfg, [CITY], [None])
        read.append(len(model.fed[0]) - len(ids))
    assert 50 < read[0] <= 60 and read[1] < 40, read


# Guards: an answer that its checks doubt and that stays, or one that they need not ask.
def test_an_answer_with_a_flaw_is_uncertain_about_its_tool():
    x, sure, none = ttsi.prepare(TOK, B, FIRST), {"book_flight": -9.0, "cancel_flight": 0.0}, []
    book = {"name": "book_flight", "arguments": {"city": "Rome", "days": 3}}
    cases = [(CANCEL, 0.99, {}, none), (CANCEL, 0.9, {}, ["cancel_flight"])]
    cases += [(book, 0.99, {}, ["book_flight"]), (None, 0.99, {}, ["cancel_flight"])]
    cases += [(book, 0.9, {"k": 2}, [*sure][::-1])]
    cases += [(CANCEL, 0.95, {}, none), (book, 0.95, {"k": 2}, ["book_flight"])]  # at tau
    cases += [(book, 0.99, how, none) for how in ({"tau": 0.0}, {"check": False})]
    for call, margin, how, want in cases:
        x.call = call or {"name": "", "arguments": {}}
        result = ttsi.Result("b", logp=sure, margin=margin, flaw=ttsi.flaw(x.call, x.request, x))
        assert ttsi.doubtful_tools(result, x, replace(FIRST, **how)) == want, (call, margin, how)


# Guards: keys that a schema does not have, optional keys always or never, wrong quotes.
def test_outlines():
    rules, seen = {"a": STRING, "b": INTEGER, "c": {}}, set()
    free = ['{"call": {"name": "f", "arguments":', '}, "request": "', "}"]
    chosen = [free[0] + ' {"b":', ', "c":', "}" + free[1], free[2]]
    schema = {"type": "object", "properties": rules, "required": ["b"]}
    for i in range(40):
        *parts, end = ttsi.outline('q"', schema, "keys", ttsi.draw(i))
        text = "".join(part + ('x"' if part[-1] == '"' else " 1") for part in parts) + end
        keys = json.loads(text)["call"]["arguments"].keys()
        want = {key: "x" if key == "a" else 1 for key in keys}
        assert json.loads(text) == pair("x", 'q"', **want) and keys <= rules.keys(), text
        seen.add("".join(keys))
        assert ttsi.outline("f", schema, "keys", ttsi.draw(i), {"c"}) == chosen, "not by its call"
    assert seen == {"b", "ab", "bc", "abc"}, "optional keys are not drawn"
    odd = ttsi.EMPTY | {"additionalProperties": STRING}  # what a schema allows, not understood
    for rules, given in ((schema, "name"), (odd, "keys")):
        assert ttsi.outline("f", rules, given, ttsi.draw(0)) == free
    assert ttsi.outline("f", schema, "nothing", ttsi.draw(0)) == ["{", ""]
    assert len(ttsi.outline("f", ttsi.EMPTY, "keys", ttsi.draw(0))) == 2, "nothing to write"


# Guards: a check that passes what it should refuse (x with its label, too), or raises.
def test_verdicts_one_by_one():
    turns = [*B["messages"], {"role": "assistant", "content": "From?"}, *user("Oslo")]
    go, pick = tool("go", city=STRING, days=INTEGER), tool("pick", size=STRING | {"enum": ["S"]})
    none, more = tool("no"), tool("any", city=STRING | {"enum": None})
    none["parameters"] |= {"additionalProperties": False, "title": "No"}
    more["parameters"] |= {"anyOf": [{"properties": {"x": STRING}}]}
    tools = [go, pick, none, more]
    x = ttsi.prepare(TOK, B | {"messages": turns, "tools": tools}, FIRST)
    for name, arguments, request, verdict in CHECKS:
        draft = {"request": request, "call": {"name": name, "arguments": arguments}}
        got = ttsi.judge(json.dumps(draft), x, FIRST)
        assert got["verdict"] == verdict and (verdict == JUNK or got["pair"] == draft), draft
        got = ttsi.judge(json.dumps(draft), x, replace(FIRST, check=False, pairs="p"))
        assert got["verdict"] == (verdict if verdict in (JUNK, COPIED) else "kept"), "unchecked"
    for text in BROKEN:
        assert ttsi.judge(text, x, FIRST) == {"text": text, "verdict": JUNK, "pair": None}


# Guards: a pair for one of two likely tools, which pulls the answer to it.
def test_each_likely_tool_has_its_pair_or_none_is_trained_on():
    verdicts = {1: "kept", 2: ttsi.UNSAID, 3: ttsi.UNSAID, 4: "tool not on offer"}
    cases = [([2, 1, 3], [1, 3], {}), ([1, 4], [], {}), ([2, 3], [2, 3], {}), ([3, 2], [2, 3], {})]
    cases += [([2, 1, 4, 1], [1, 1], how) for how in ({"given": "nothing"}, {"pairs": "p"})]
    for numbers, want, how in cases:
        drafts = [{"verdict": verdicts[n], "pair": pair(n, "ab"[n > 2])} for n in numbers]
        pairs = ttsi.choose(drafts, ["a", "b"], replace(ttsi.Config(), **how))
        assert [p["request"] for p in pairs] == want, f"of {numbers}: the kept, then unsaid ones"


# Guards: sampling from another distribution than the model's, an end token that does not end it.
def test_a_token_is_drawn_from_the_models_distribution_and_any_end_token_ends(monkeypatch):
    x, prefix = ttsi.prepare(TOK, B, FIRST), ttsi.Prefix(LLAMA, [])
    logits, cfg = LLAMA(torch.tensor([x.ids])).logits[0, -1], replace(FIRST, max_new_tokens=1)
    for n, heat in itertools.product(range(9), (0.5, 2.0)):
        want = TOK.decode((logits / heat).softmax(-1).multinomial(1, generator=ttsi.draw(n)))
        how = replace(cfg, temperature=heat), [("", "")], [ttsi.draw(n)]
        assert ttsi.write(TOK, x.ids, prefix, *how) == [want], f"not drawn at {heat}"
    for ends in ([TOK.eos_token_id, logits.argmax().item()], logits.argmax().item()):
        monkeypatch.setattr(LLAMA.generation_config, "eos_token_id", ends)
        assert ttsi.write(TOK, x.ids, prefix, FIRST) == [""], f"{ends} does not end it"


# ------------------------------------------------------------------------------------------- T
# Guards: another scale, a LoRA that is at work at first, or outlives its block.
def test_a_hooked_layer_is_w_plus_s_b_a():
    net, x = torch.nn.Linear(6, 4), torch.randn(2, 6)
    net.device, net.get_decoder = torch.device("cpu"), lambda: net
    cfg, plain, before = replace(FIRST, lora_rank=3, lora_alpha=5.0), net(x), digest(net)
    with ttsi.temporary_lora(net, cfg, ttsi.draw(1)) as (a, b):
        assert a.shape == (6, 3) and 0.7 < a.abs().max() * 6**0.5 <= 1, "not uniform"
        assert torch.equal(net(x), plain), "B = 0 must change nothing"
        b.data.normal_()
        want = x @ (net.weight + 5 / 3 * (a @ b).T).T + net.bias
        assert torch.allclose(net(x), want, atol=1e-5), "not (W + s B A) x"
    assert torch.equal(net(x), plain) and digest(net) == before, "it outlives its block"
    with ttsi.temporary_lora(net.bfloat16(), cfg, ttsi.draw(1)) as (a, b):
        assert (a.dtype, net(x.bfloat16()).dtype) == (torch.float32, torch.bfloat16), "half"


def steps(w, slope=1.0, **changes):
    """-> (losses, p) of so many steps from p = 0 on a loss that is linear in p: w p + 5."""
    p, w = torch.zeros(len(w), requires_grad=True), torch.tensor(w)

    def forward(cache, new, keep):
        (q := p.clone()).register_hook(lambda g: g * slope)
        logp = -(w * q).sum() - 5
        return torch.stack([torch.log1p(-logp.exp()), logp]).expand(len(new), keep, 2)

    prefix = SimpleNamespace(ids=[], copy=int, forward=forward)
    return ttsi.train([([1, 1], 1)], prefix, [p], replace(ttsi.Config(), **changes)), p.detach()


# Guards: a step that is not Polyak's, a rate that depends on the scale, an update with NaN.
def test_polyaks_step_takes_the_fraction_lr_of_a_linear_loss():
    losses, p = steps(W, epochs=1, lr=0.3)
    want = -0.3 * 5 / sum(w * w for w in W) * torch.tensor(W)
    assert losses == pytest.approx([5.0]) and torch.allclose(p, want, atol=1e-5), "the closed form"
    left = [1 - 0.3 * (1 + math.cos(math.pi * n / 4)) / 2 for n in range(3)]
    for factor in (1.0, 0.01, 100.0):
        losses, _ = steps([factor * w for w in W], epochs=4, lr=0.3)
        want = [5 * math.prod(left[:n]) for n in range(4)]
        assert losses == pytest.approx(want, rel=1e-3), "not the fraction of the loss, by a cosine"
    for w in [0.1, -0.2], [-0.3, 0.1]:  # by the sign, lr 1, 0.75, 0.25; made afresh for each
        _, p = steps(w, epochs=3, lr=1.0, optimizer="adamw")
        assert torch.allclose(p, -2 * torch.tensor(w).sign(), atol=1e-3), "AdamW with decay"
    for slope, optimizer in itertools.product((0.0, math.nan, math.inf), ("polyak", "adamw")):
        assert not steps(W, slope, optimizer=optimizer)[1].any(), f"a gradient of {slope} moves it"


# Guards: a default rate that lets T diverge.
def test_no_loss_of_the_embedded_model_ends_above_where_it_began():
    n, cfg = 20 if SLOW else 2, replace(ALWAYS, epochs=5, lr=ttsi.Config.lr, max_new_tokens=1)
    for sample, one, two in zip(DEMO[:n], DEMO[1:], DEMO[2:], strict=False):
        pairs = [{"request": s["messages"][0]["content"], "call": s["call"]} for s in (one, two)]
        tools = {t["name"]: t for s in (sample, one, two) for t in s["tools"]}.values()
        loss = ttsi.tt_si(MODEL, TOK, ask("x", "go", [*tools], None, pairs), cfg).loss
        assert len(loss) == 5 and loss[-1] < loss[0] and max(loss) < 1.05 * loss[0], loss


# Guards: a step that fits one scale of a model only.
def test_inputs_ten_times_as_large_make_the_same_change_of_loss():
    large = copy.deepcopy(LLAMA)
    for layer in large.get_decoder().modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.data /= 10
            layer.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 10, *inputs[1:]))
    one, ten = (ttsi.tt_si(model, TOK, A, ALWAYS).loss for model in (LLAMA, large))
    assert one[0] - one[1] > 0.1 and one == pytest.approx(ten, rel=1e-3), "by the inputs' size"


# Guards: a cache continued at the wrong place, padding scored, labels shifted, tokens that merge.
@pytest.mark.parametrize("kind", [*LONG, "bytes"])
def test_every_stage_on_every_architecture_equals_reading_everything_anew(kind):
    tok = tokenizer("bytes" if kind == "bytes" else "embedded")
    model = small(tok, kind.replace("bytes", "Llama"))
    before, base = digest(model), replace(ALWAYS, epochs=3, lr=0.5)
    for cfg, sample in (base, A), (replace(base, adapt="full"), A), (base, B):  # 2 pairs, or 1
        got = agrees(model, tok, sample, cfg)
        assert got.decision == "adapted" and len({*got.loss}) == 3, "nothing is learned"
    assert digest(model) == before, "the base was written"


# ------------------------------------------------------------------------------------ Algorithm 1
def rows_of(model, tok, samples, cfg):
    return {s["id"]: ttsi.answer(model, tok, s, cfg, None) | FREE for s in samples}


# Guards: a draft that sees its neighbours or their draws, or has keys that nobody asked for.
@pytest.mark.parametrize("given", ["keys", "name", "nothing"])
@pytest.mark.parametrize("sample", [GUESSED, *DEMO[1 : 8 if SLOW else 2]], ids=lambda s: s["id"])
def test_a_naive_serial_loop_gives_the_same(sample, given):
    cfg = ttsi.Config(given=given, drafts=2, epochs=2, max_new_tokens=64, seed=3)
    got, x = agrees(MODEL, TOK, sample, cfg), ttsi.prepare(TOK, sample, cfg)
    logp = dict(zip(x.schemas, naive_h(MODEL, TOK, x, sample["messages"]), strict=True))
    tools, call = sorted(logp, key=logp.get)[:-3:-1], ttsi.parse(got.direct)
    if got.margin >= 0.95:
        tools = [call["name"] if call["name"] in logp else tools[0]] if got.flaw else []
    known = {key for key, value in call["arguments"].items() if f"{value}" in x.request}
    asked = prompt(TOK, x, user(MODEL.config.draft.replace("{request}", x.request)))
    ids, drafts = TOK(asked).input_ids, []
    for name, n in itertools.product(tools, range(cfg.drafts)):
        rng, chosen = ttsi.draw(3, x.id, name, n), known if name == call["name"] else None
        row = ttsi.outline(name, x.schemas[name], given, rng, chosen)
        (text,) = ttsi.write(TOK, ids, ttsi.Prefix(MODEL, []), cfg, [row], [rng])
        drafts.append(ttsi.judge(text, x, cfg))
    pairs = ttsi.choose(drafts, tools, cfg)
    assert [*got.drafts] == drafts and [*got.pairs] == pairs, "other drafts or pairs"
    assert bool(pairs) == (got.decision == "adapted")


# Guards: a label, or whatever else a sample holds, in any prompt or in any number.
def test_the_label_is_in_no_prompt_and_changes_no_prediction():
    cfg, leak, found = ttsi.Config(drafts=1, epochs=2), {"name": "Zyxwv", "arguments": {}}, []
    for label in ({"call": leak, "label": leak}, {}):
        samples = [{k: v for k, v in s.items() if k != "call"} | label for s in DEMO[:2]]
        found.append([asdict(ttsi.tt_si(MODEL, TOK, s, cfg)) | {"cost": 0} for s in samples])
    assert found[0] == found[1], "a label is read"
    assert [result["decision"] for result in found[0]] == ["adapted", "certain"]


# Guards: base weights or a gradient mode that are not restored, something of a sample that stays.
def test_nothing_is_left_of_a_run_or_of_an_exception_in_training():
    model = small(TOK, attention_dropout=0.5).requires_grad_()  # it need not be frozen
    before, first = digest(model), rows_of(model, TOK, [A, B, C], ALWAYS)
    assert digest(model) == before, "not reset after a run"
    assert [row["decision"] for row in first.values()] == ["adapted", "adapted", "no pair"]
    second = Mock(side_effect=[None, KeyboardInterrupt])  # in the second step
    handle = model.lm_head.register_full_backward_hook(second)
    with pytest.raises(KeyboardInterrupt):
        ttsi.tt_si(model, TOK, A, ALWAYS)
    handle.remove()
    assert digest(model) == before and torch.is_grad_enabled(), "not reset after an exception"
    for samples in ([A, B, C], [C, B, A], [B]):
        again = rows_of(model.train(), TOK, samples, ALWAYS)
        assert again.items() <= first.items(), "depends on what came before, or on the mode"
    assert all(p.grad is None for p in model.parameters()), "gradients are left"


# Guards: a teacher that reads the student's cache, or with the student's tokenizer.
def test_a_teacher_writes_what_it_would_write_for_itself():
    before, cfg = digest(MODEL), ttsi.Config(tau=2.0, drafts=2, epochs=2, max_new_tokens=64)
    only = DEMO[0] | {"tools": DEMO[0]["tools"][:2]}  # both are likely, whoever scores
    own = ttsi.tt_si(MODEL, TOK, only, cfg)
    for tok in TOK, tokenizer("bytes"):
        taught = ttsi.tt_si(small(tok), tok, only, cfg, (MODEL, TOK))
        texts, own_texts = (sorted(draft["text"] for draft in r.drafts) for r in (taught, own))
        assert texts == own_texts and taught.logp != own.logp
    assert digest(MODEL) == before and taught.decision == own.decision == "adapted"


# Guards: one sample that ends the run of all: too long, refused, no numbers, a full device.
def test_what_cannot_be_answered_is_named_and_its_neighbours_are_answered():
    refuse = "{% if 'no hm' in messages | string %}{{ raise_exception('no') }}{% endif %}"
    tok, nan = templated(TOK, refuse + TOK.chat_template), small(TOK)
    for text, why in ("word " * 2000, "exceed"), ("no hm", "template"):
        bad = json.dumps(pair(text, "get_all", x="x"))
        samples = [A | {"id": "no", "messages": user(text)}, A | {"pairs": [bad, *A["pairs"]]}]
        no, a = rows_of(LLAMA, tok, samples, ALWAYS).values()
        assert no["decision"].startswith("not answered: ") and why in no["decision"]
        assert no["grades"] == {"direct": [False] * 2, "answer": [False] * 2}, "it counts as wrong"
        assert [draft["verdict"] for draft in a["drafts"]] == [JUNK, "kept", "kept"] and a["answer"]
    nan.lm_head.weight[7] = math.nan
    assert "no numbers" in ttsi.answer(nan, TOK, A, ALWAYS, None)["decision"]
    nan.lm_head.register_forward_hook(Mock(side_effect=torch.OutOfMemoryError))
    assert ttsi.answer(nan, TOK, A, ALWAYS, None)["decision"] == "not answered: out of memory"


# -------------------------------------------------------------------- prompts, data, grades
def record(*more, tools=FLIGHT, **fields):
    return {"id": "r", "messages": [*user("drop it"), *more], "tools": tools} | fields


# Guards: a prompt that is not what the template renders; tools that it does not show; the day.
@pytest.mark.parametrize("name", TOKENIZERS)
def test_prompts_of_all_templates(name):
    tok, native = tokenizer(name), name in ("embedded", "bytes", "qwen3")
    for messages in (user("go"), ttsi.to_sample(record(*EARLIER))["messages"]):
        x = ttsi.prepare(tok, B | {"messages": messages}, FIRST)
        ids, at = ttsi.span(tok, x, "book Oslo", BOOK["call"])
        start, rest, head = map(tok.decode, (ids[:at], ids[at:], x.ids[: x.head]))
        assert ids[: x.head] == x.ids[: x.head] and "book_flight" in head, "tools come first"
        assert start.count("book Oslo") == 1 and ttsi.parse(rest) == BOOK["call"]
        assert (ttsi.TASK in start) != native
        day = start.startswith("01 January 202601 January 2026")
        assert day == (name == "sentencepiece"), "it tells the day, or thinks"
        assert ("pending" in tok.decode(x.ids)) == (len(messages) > 1), "a result is not shown"
        if native:
            want, first = joined(tok, x, user("book Oslo"), BOOK["call"])
            assert first == at and want[: len(ids)] == ids, "not as the template renders it"
            assert x.ids == tok(prompt(tok, x, messages), add_special_tokens=False).input_ids


# Guards: a label that stays in the prompt, prose behind it, history that is taken for the label.
def test_records_in_openais_form(tmp_path):
    want, prose = ttsi.to_sample(record(call=CANCEL)), {"role": "assistant", "content": "Sure."}
    forms = [record(tools=[{"type": "function", "function": t} for t in FLIGHT], call=CANCEL)]
    forms += [record(CALLED), record(CALLED, prose), record(CALLED, call=CANCEL)]
    for form in [*forms, record(call=STATUS["function"])]:
        assert ttsi.to_sample(form) == want and want["call"] == CANCEL, form
    again = ttsi.to_sample(record(*EARLIER, CALLED))
    assert again["call"] == CANCEL and len(again["messages"]) == 3, "the earlier call is history"
    assert "call" not in ttsi.to_sample(record(*EARLIER)), "a call that has its result is no label"
    assert ttsi.to_sample(record(prose)) | {"call": CANCEL} == want, "prose goes"
    bare = ttsi.to_sample(record(tools=[{"name": "f", "parameters": None}]))["tools"][0]
    assert bare == {"name": "f", "description": "", "parameters": ttsi.EMPTY}, "not completed"
    (path := tmp_path / "x").write_text('{"id": ""}\n\n{}\n{"id": null}\n{"id": 0}\n{"id": "a"}')
    ids = ttsi.read_jsonl(path, lambda row: row["id"])
    assert ids == {i: i for i in "1340a"}, "neither its id nor, without one, its line's number"


TOOLS = [tool("f", x={"enum": 5}), tool("f", x=[]), tool(5), FLIGHT[0]]
TOOLS += [{"name": "f", key: {"x": STRING}} for key in ("parameters", "inputSchema")]
BENT = [{"required": "x"}, {"required": [["x"]]}, {"properties": [1]}]
TOOLS += [F | {"parameters": schema} for schema in ("x", *(ttsi.EMPTY | bad for bad in BENT))]
OTHER = [record(tools=[]), record(messages="q"), *(record(tools=[*FLIGHT, bad]) for bad in TOOLS)]
OTHER += [record(CALLED | {"tool_calls": [STATUS, {"function": BOOK["call"]}]}), record(call=F)]
OTHER += [record(call=CANCEL | {"arguments": arguments}) for arguments in ("{", [1], "[1]")]
OTHER += [record({"role": "assistant", "function_call": STATUS["function"]}), record(id="good")]
OTHER += [record(*user([{"type": "text", "text": "q"}])), record({"role": "human", "content": "q"})]
OTHER += [{"query": "q", "answers": []}, record(messages=[{"role": "system", "content": "q"}])]
OTHER += [b"{", b"[]", b"[" * 99999, b'{"n": NaN}', b"\xff", record(x="\ud800")]


# Guards: a record that is half understood, or refused without its place and what would help.
@pytest.mark.parametrize("line", OTHER, ids=range(len(OTHER)))
def test_other_forms_are_refused_in_one_line_with_their_place(tmp_path, line):
    path, good = tmp_path / "x.jsonl", json.dumps(record(id="good")).encode()
    line = line if isinstance(line, bytes) else json.dumps(line).encode()
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\r\n\n" + line + b"\n{\n")
    with pytest.raises(ttsi.InputError) as e:
        command(["--data", str(path)])
    assert str(e.value).startswith(f"{path}:3: "), str(e.value)[:200]
    assert "python data/convert.py" in str(e.value) and "\n" not in str(e.value)
    assert "object has no" not in str(e.value), "it is told in Python's words"


T, G = '{"name": "f", "arguments": {"x": 1}}', '{"name": "g", "arguments": {}}'
PARSED = [f"Sure! {T} and {{", f"use {{x}} then {T}", f"{{}} {T}", f"<c>\n{T}\n</c>", f"[{T}]"]
PARSED += [f"<think>g? {G} No, f.</think>{T}", f'{{"call": 1, "x": [{{}}]}} {T}', f"{T}{G}"]
PARSED += [T.replace("arguments", "parameters"), T.replace('{"x": 1}', '"{\\"x\\": 1}"')]
PARSED += [f'{{"name": 7}} {T}', f'{{"a": "b\\"{{"}} {T}', f'The 5" pipe {T}', f"{{x y {T}"]
NONE = ["", "{", "}", "{}", "{" * 3000, '{"a":' * 2000, '{"a": 1}', '{"name": 7}', T[:-1], "[1]"]
NONE += [f"<think>{T}", f'{{"arguments": {T}', f'{{"name": "g", "arguments": {{"q": {T}']
NONE += [T.replace("1", more) for more in ("NaN", '"\\ud800"', "1" * 5000)]
NONE += [T.replace('{"x": 1}', "[1]")]
GRADES = [("5", 5, 1), (12.0, 12, 1), (12, 12.5, 0), (True, 1, 0), ("a", "A", 0), (1e3, 1000, 1)]
GRADES += [([1.0, {"k": 2}], [1, {"k": "2"}], 1), ("e\u0301", "é", 1), ([1, 2], [2, 1], 0)]


# Guards: a draft in thought or an argument that is taken for the call; text that raises.
def test_parse():
    call = {"name": "f", "arguments": {"x": 1}}
    for text in PARSED:
        n = next(n for n in range(len(text) + 1) if ttsi.parse(text[:n]))
        assert ttsi.parse(text[:n]) == ttsi.parse(text) == call, f"{text[:n]}: another call"
        assert text[n - 1] == "}", "too early"
    for text in NONE:
        assert ttsi.parse(text) is None, text[:50]


# Guards: numbers that are compared by their form, an argument that is missing or too many.
def test_grade():
    cases = [({"x": given}, {"x": gold}, equal) for given, gold, equal in GRADES]
    cases += [({}, {"x": 1}, 0), ({"x": 1, "y": None}, {"x": 1}, 0), ({}, {}, 1)]
    for given, gold, equal in cases:
        text, call = json.dumps(F | {"arguments": given}), F | {"arguments": gold}
        assert ttsi.grade(f"So: {text}", call) == [True, equal], (given, gold)
        assert ttsi.grade(text, call | {"name": "g"}) == ttsi.grade("", call) == [False, False]


# ------------------------------------------------------------------------------------- running
SHORT = ["--limit", "2", "--drafts", "1", "--epochs", "2", "--max-new-tokens", "56", "--output"]
BAD = ["--k 0", "--dtype x", "--optimizer adamw", "--lim 1", "--limit -1", "--tau -1", "--model="]
BAD += [f"--{f} /no/such" for f in ("data", "model", "teacher", "device", "pairs", "trace")]


def command(argv):
    return ttsi.run(ttsi.parse_arguments(argv))


def quiet(*argv):
    with contextlib.redirect_stdout(io.StringIO()) as text:
        return command([str(a) for a in argv]), text.getvalue()


def timeless(path):
    return {r["id"]: r | FREE for r in map(json.loads, path.read_text().splitlines())}


def start(folder, *argv, env=()):
    """A process that does as `python ttsi.py ARGV` does, and heeds Ctrl-C."""

    def program():
        for name, fd in (("out", 1), ("err", 2)):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        torch.set_num_threads(1)  # before loading threads race for what torch lost by the fork
        sys.argv, _ = ["ttsi.py", *map(str, argv)], os.environ.update(env)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        runpy.run_path(f"{HERE}/ttsi.py", run_name="__main__")

    folder.mkdir(exist_ok=True)
    child = multiprocessing.get_context("fork").Process(target=program)
    child.start()
    return child


def ended(child, folder):
    child.join(300)
    return child.exitcode, (folder / "out").read_text(), (folder / "err").read_text()


def row(decision, before, after, verdicts, **cost):
    row = {"decision": decision, "grades": {"direct": before, "answer": after}, "cost": cost}
    return row | {"drafts": [{"verdict": verdict} for verdict in verdicts]}


# Guards: the wrong denominator, misaligned columns, a ratio over samples that were not answered.
def test_the_table_by_hand():
    base = {"read": [1.0, 10], "direct": [1.0, 10], "score": [1.0, 5]}
    costs = base | {"answer": [2.0, 20], "train": [7.0, 115]}
    rows = [row("adapted", [1, 0], [1, 1], ["kept", "kept", "wrong type"], **costs)] * 2
    rows += [row("certain", [1, 1], [1, 1], [], **base | {"score": [0.0, 0]})]
    rows += [row("not answered: long", [0, 0], [0, 0], [])]
    assert "+50.0  too few for an interval  " in ttsi.table(rows), "it looks certain"
    low, high = ttsi.interval([100.0, 100.0, 0.0, 0.0] * 3)
    want = f"""
               right tool   right call
direct             75.0 %       25.0 %
TT-SI              75.0 %       75.0 %
difference                       +50.0  [{low:+.1f}, {high:+.1f}]   6 repaired, 0 broken
12 of 13 samples have a label
6 adapted, 4 certain, 3 not answered: long; of 18 drafts 12 kept, 6 wrong type
an answer takes 4.3 x the seconds and 5.7 x the tokens of a direct one"""
    got = ttsi.table([*rows * 3, {"decision": "certain", "drafts": [], "cost": {}}])
    assert got == want[1:], got


# Guards: rows that are lost, made twice, torn, or of other settings; a file that is touched then.
def test_output_resumes_after_any_cut_and_refuses_other_settings(tmp_path, capsys):
    path = tmp_path / "new" / "run.jsonl"
    rows, text = quiet(*SHORT, path)
    whole, raw = timeless(path), path.read_bytes()
    assert [*whole] == [*rows] == [s["id"] for s in DEMO[:2]], "not each, in order"
    ends = [i + 1 for i, byte in enumerate(raw) if byte == 10]
    for cut, kept in ((ends[0] + 40, ends[0]), (ends[1], ends[1])):
        path.write_bytes(raw[:cut])
        capsys.readouterr()
        _, again = quiet(*SHORT, path)
        bar = "sample/s" in capsys.readouterr().err
        assert bar == (kept < len(raw)), "a progress bar where nothing is left to do, or none"
        assert timeless(path) == whole, f"cut at {cut}: other rows than an uninterrupted run"
        assert path.read_bytes()[:kept] == raw[:kept], "whole rows are made again"
    assert again == text, "the table is not of all rows"
    assert len(quiet(*SHORT, path, "--limit", 3)[0]) == 3, "--limit is no setting"
    for flags in (["--tau", 0.5], ["--seed", 1], ["--data", HERE / "data/dev.jsonl"]):
        with pytest.raises(ttsi.InputError, match=f"{path} has rows of other settings"):
            quiet(*SHORT, path, *flags)
    assert path.read_bytes().startswith(raw), "a refused run must not touch the file"


# Guards: a kill that loses a row, leaves half of one, or changes what comes after.
def test_killed_at_random_moments_a_run_goes_on(tmp_path):
    path, kills, began = tmp_path / "run.jsonl", 0, time.time()
    quiet(*SHORT, path)
    whole, seconds = timeless(path), time.time() - began
    while kills < (50 if SLOW else 2):
        path.unlink()
        child = start(tmp_path, *SHORT, path)
        child.join(seconds * (0.2 + 0.7 * torch.rand(()).item()))
        child.kill()
        child.join()
        kills += child.exitcode == -signal.SIGKILL
        quiet(*SHORT, path)
        assert timeless(path) == whole and len(whole) == 2, "not as without a kill"


# Guards: rows of one process that another overwrites, a sample that both or none answers.
def test_two_processes_share_one_file(tmp_path):
    path, one, flags = tmp_path / "run.jsonl", tmp_path / "one.jsonl", ["--max-new-tokens", "12"]
    world, folders = {"WORLD_SIZE": "2"}, [tmp_path / "0", tmp_path / "1"]
    ranks = [start(f, *SHORT, path, *flags, env=world | {"RANK": f.name}) for f in folders]
    (first, out, _), (second, more, _) = map(ended, ranks, folders)
    assert first == second == 0 and "right call" in out + more, "no table, or an error"
    quiet(*SHORT, one, *flags)
    assert timeless(path) == timeless(one) and len(path.read_text().splitlines()) == 2


# Guards: a traceback, a lost table or lost rows where a run is interrupted.
def test_an_interrupted_run_leaves_its_rows_and_the_table(tmp_path):
    path = tmp_path / "run.jsonl"
    child = start(tmp_path, *SHORT, path, "--limit", 99)
    while not (path.exists() and path.read_bytes()):
        assert not child.join(0.05) and child.is_alive(), (tmp_path / "err").read_text()
    os.kill(child.pid, signal.SIGINT)
    code, out, err = ended(child, tmp_path)
    assert code == 130 and "Traceback" not in err and "right call" in out, err
    assert err.splitlines()[-1].startswith("ttsi: stopped after "), err
    assert 0 < path.read_bytes().count(b"\n") < 99, "no rows"


# Guards: a step of the algorithm that is not told, a run that is hopeless and does not say so.
def test_what_a_person_sees(tmp_path):
    _, text = quiet("--trace", "demo-003", "--drafts", 1, "--no-check")
    names = ["prompt", *(field.name for field in fields(ttsi.Result)[1:]), "label"]
    assert re.findall(r"^-- (\w+)", text, re.M) == names, "not each step"
    prompt, *_, label = text.split("\n-- ")[1:]
    assert "<|user|>" in prompt and f"{DEMO[3]['call']}" in label, "not what it says"
    (path := tmp_path / "d.jsonl").write_text(json.dumps(record(tools=GET)))
    assert "not answered" in quiet("--data", path, "--trace", "r", "--max-new-tokens", 9999)[1]
    rows, foreign = quiet("--data", path, "--max-new-tokens", 8)
    assert re.match(f".* 1,992,480 .*{path}, max_new_tokens 8\n", foreign), "what was run?"
    assert "toy world alone" in foreign and "toy world" not in text, "it knows its own alone"
    assert rows["r"]["run"] in foreign and "right call" not in foreign and "grades" not in rows["r"]
    assert foreign.endswith("no label; answers: give --output FILE to keep them\n"), "where?"


# Guards: a traceback of an import that is cut off; a hub's client that tries for a minute.
def test_before_there_is_a_model(monkeypatch):
    child = subprocess.Popen([sys.executable, HERE / "ttsi.py"], stderr=subprocess.PIPE, text=True)
    while "libtorch" not in Path(f"/proc/{child.pid}/maps").read_text():  # it is loading
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    assert (child.wait(), child.stderr.read()) == (130, "ttsi: stopped before the first sample\n")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    began = time.time()
    with pytest.raises(ttsi.InputError, match="no such folder here; the hub is out of reach: "):
        ttsi.load("nobody/none", ttsi.Config())
    assert time.time() - began < 10 and not ttsi.hub_answers(), "its client tried for a minute"
    causes = [ValueError(), URLError(ssl.SSLError()), HTTPError(*[None] * 5)]
    monkeypatch.setattr("urllib.request.urlopen", Mock(side_effect=causes))
    assert [ttsi.hub_answers() for _ in causes] == [False, True, True], causes


# Guards: flags that are not told, not checked, or not what they say.
def test_flags(capsys, tmp_path):
    for argv in map(str.split, BAD):
        with pytest.raises((ttsi.InputError, OSError)) as e:
            command(argv)
        assert any(word.strip("-=") in str(e.value) for word in argv), f"{argv}: {e.value}"
    (path := tmp_path / "pairs.jsonl").write_text('{"id": 1}')
    with pytest.raises(ttsi.InputError, match=f"^{path}:1: .*a line is {{id, pairs"):
        command(["--pairs", str(path)])
    for flag, why in ("--model", "/no/such: no such folder\n"), ("--data", "[Errno 2] "):
        code, _, err = ended(start(tmp_path, flag, "/no/such"), tmp_path)
        assert code == 2 and err.count("\n") == 1 and err.startswith(f"ttsi: {why}"), err
    with pytest.raises(SystemExit):
        ttsi.parse_arguments(["-h"])
    told = re.findall(r"--(?:no-)?([\w-]+)", capsys.readouterr().out)
    assert {flag.replace("-", "_") for flag in told} >= FLAGS, "a field is no flag"
    got = ttsi.parse_arguments(["--lr", "1", "--paper", "--lora-rank", "4", "--no-shuffle"])
    paper = {"k": 1, "drafts": 1, "given": "nothing", "check": False, "optimizer": "adamw"}
    paper |= {"lr": 1e-4, "adapt": "full", "lora_rank": 4, "shuffle": False}
    assert got == ttsi.Config(**paper) and (got.tau, got.epochs) == (0.95, 5), "not as stated"


def refused(folder, why):
    with pytest.raises(ttsi.InputError, match=f"^{folder}: .*{why}"):
        ttsi.load(str(folder), ttsi.Config())


# Guards: a model that loads and then fails at the first sample, or whose scores are wrong.
@pytest.mark.parametrize("why,kind,more", REFUSED)
def test_models_that_cannot_be_continued_are_refused_at_load(tmp_path, why, kind, more):
    refused(tmp_path, "config.json")
    small(TOK, kind, **more).save_pretrained(tmp_path)
    TOK.save_pretrained(tmp_path)
    refused(tmp_path, why)


# Guards: Gemma, whose tokenizer has a token of images that its text models lack.
def test_special_tokens_that_no_prompt_holds_need_no_embedding():
    (tok := copy.deepcopy(TOK)).add_special_tokens({"additional_special_tokens": ["<image>"]})
    ttsi.try_out(LLAMA, tok)
    with pytest.raises(ttsi.InputError, match="embedding"):
        ttsi.try_out(LLAMA, templated(tok, SHOWN.replace("Answer:", "<image>")))


# Guards: pickled weights, code of a model that runs, weights that are drawn at random.
def test_a_model_brings_its_weights_in_safetensors_and_no_code(tmp_path):
    weights = {k: v for k, v in LLAMA.state_dict().items() if k != "lm_head.weight"}
    LLAMA.save_pretrained(tmp_path, state_dict=weights)
    TOK.save_pretrained(tmp_path)
    refused(tmp_path, "lm_head")
    # Each fault is found before those above it.
    (tmp_path / "model.safetensors").unlink()
    torch.save(LLAMA.state_dict(), tmp_path / "pytorch_model.bin")
    refused(tmp_path, "safetensors")
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'hacked')!r}, 'w')\n")
    own = {"model_type": "x", "auto_map": {"AutoConfig": "code.C"}}
    (tmp_path / "config.json").write_text(json.dumps(own))
    refused(tmp_path, "custom code")
    opened = SHOWN + "{% if add_generation_prompt %}<think>\n{% endif %}"
    templated(TOK, opened).save_pretrained(tmp_path)
    refused(tmp_path, "a thought")
    (tmp_path / "tokenizer.json").unlink()
    templated(transformers.ByT5Tokenizer(), SHOWN).save_pretrained(tmp_path)
    refused(tmp_path, "slow one")
    assert not (tmp_path / "hacked").exists(), "its code was run"


# ------------------------------------------------------------- README, the file itself, forks
ENTROPY = "    return 1 - torch.special.entr(p).sum().item() / math.log(max(2, len(p)))\n\n\n"
SHORTER = '    if len(request.split()) < 3:\n        return "too short"\n    unsaid = ""\n'
PROMPT = 'DRAFT = "{request}\\n\\nWrite another request for one of the tools."\nGAP ='
BIAS = """            B = torch.zeros(layer.out_features, device=model.device, requires_grad=True)
            def add(layer, inputs, y, B=B):
                return (y + scale * B).to(y.dtype)
            hooks.callback(layer.register_forward_hook(add).remove)
            parameters += [B]
"""
FORKS = {"entropy": [(r"    first, [^\n]*topk.*?\n\n\n", ENTROPY)]}
FORKS |= {"prompt": [(r"DRAFT = \(.*?\nGAP =", PROMPT), (r'    unsaid = ""\n', SHORTER)]}
FORKS |= {"bias": [(r" +A = \(torch\.rand.*?parameters \+= \[A, B\]\n", BIAS)]}


# Guards: a file that grows, a function that cannot be read at a glance, another package.
def test_the_file_itself():
    assert SOURCE.count("\n") <= MOST and max(map(len, SOURCE.splitlines())) <= 100, "too long"
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 46, f"{node.name} is too long"
            assert node.name != "tt_si" or node.end_lineno <= 150, node.end_lineno
    names = {*re.findall(r"^ *(?:import|from) (\w+)", SOURCE, re.M)}
    assert names - {*sys.stdlib_module_names} == {"torch", "transformers", "tqdm"}
    assert not re.search(r"(?<!\.)\b(eval|exec|compile|__import__)\(|except:|pickle", SOURCE)


# Guards: an example in README that does not run, or commands with flags that are no more.
def test_readme(capsys, monkeypatch):
    monkeypatch.chdir(HERE)
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(compile(re.sub(r"\[:\d+\]", "[:1]", example), "README.md", "exec"), {})
    assert "adapted" in capsys.readouterr().out, "the example says nothing"
    for sample in re.findall(r"```json\n(.*?)```", README, re.S):
        assert ttsi.to_sample({"id": "1"} | json.loads(sample))["call"]
    flags = re.findall(r"--(?:no-)?([\w-]+)", " ".join(re.findall(r"ttsi\.py( .*)", README)))
    assert {flag.replace("-", "_") for flag in flags} <= FLAGS, flags
    if SLOW:
        table = re.search(r"```\n( +right tool[^`]*)```", README)[1]
        times, said = r"[\d.]+ x the seconds", quiet()[1]
        assert re.sub(times, "", table.strip()) in re.sub(times, "", said), "not the demo's table"


# Guards: a fork at FORK HERE that takes more than ten lines, or breaks what is around it.
@pytest.mark.parametrize("name", FORKS)
def test_forks(tmp_path, name, monkeypatch):
    if name == "prompt":  # the embedded model has its own
        monkeypatch.delattr(MODEL.config, "draft")
    source, path = SOURCE, tmp_path / "fork.py"
    for pattern, new in FORKS[name]:
        source, n = re.subn(pattern, lambda _, new=new: new, source, flags=re.S)
        assert n == 1 and new.count("\n") <= 10, f"what this fork replaces is gone: {pattern}"
    path.write_text(source)
    fork = SimpleNamespace(**runpy.run_path(str(path)))
    for sample in DEMO[1::-1]:
        how = {"tau": 2.0, "epochs": 2, "drafts": 1, "max_new_tokens": 64}
        got = fork.tt_si(MODEL, TOK, sample, fork.Config(**how))
        assert got.answer and 0 <= got.margin <= 1 and digest(MODEL)[0] == 0
    was = ttsi.tt_si(MODEL, TOK, sample, ttsi.Config(**how))
    changed = [got.margin != was.margin, got.drafts != was.drafts, got.loss != was.loss]
    assert changed.index(True) == [*FORKS].index(name), "the fork changes something else"
    keys = {module.key_of(ttsi.Config(), {}, []) for module in (fork, ttsi)}
    assert len(keys) == 2, "a fork goes on with rows that it did not make"
