"""Each test compares ttsi.py with something that does not share its code: a closed form, brute force, an invariant."""
import argparse
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
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from transformers import (AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig,
                          LlamaForCausalLM, MistralConfig, MistralForCausalLM)

import ttsi

HERE = Path(__file__).resolve().parent
BENCHMARKS = HERE.parent / "shared" / "benchmarks"
slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="long; runs with SLOW=1")


def tool(name, **properties):
    return {"name": name, "description": f"does {name}", "parameters": {
        "type": "object", "properties": properties, "required": list(properties)[:1]}}


STRING, INTEGER = {"type": "string"}, {"type": "integer"}
SAMPLES = [  # ragged tool lists; names that begin one another; one with a single tool
    {"id": "a", "messages": [{"role": "user", "content": "get them all"}], "call": {"name": "get", "arguments": {}},
     "tools": [tool("get"), tool("get_all", x=STRING), tool("get_all_users", y=INTEGER)]},
    {"id": "b", "messages": [{"role": "user", "content": "cancel my flight to Rome, would you, please"}],
     "call": {"name": "cancel_flight", "arguments": {"city": "Rome"}},
     "tools": [tool("cancel_flight", city=STRING), tool("book_flight", city=STRING, days=INTEGER)]},
    {"id": "c", "messages": [{"role": "user", "content": "hm"}], "call": {"name": "only", "arguments": {}},
     "tools": [tool("only")]},
]
PAIRS = {"a": [{"request": "fetch x", "call": {"name": "get_all", "arguments": {"x": "x"}}},
               {"request": "a longer request for 7", "call": {"name": "get_all_users", "arguments": {"y": 7}}}],
         "b": [{"request": "book Oslo", "call": {"name": "book_flight", "arguments": {"city": "Oslo", "days": 3}}}],
         "c": []}
FIRST = ttsi.Config(max_new_tokens=12, attempts=1, drafts=1)


def config(**changes):
    return dataclasses.replace(FIRST, **changes)


@pytest.fixture(scope="session")
def tok():
    return AutoTokenizer.from_pretrained(HERE / "data/model")


def tiny(tok, kind=LlamaForCausalLM):
    """A small random model whose logits are far from flat, so that a wrong one shows."""
    torch.manual_seed(0)
    if kind is GPT2LMHeadModel:
        conf = GPT2Config(vocab_size=len(tok), n_embd=32, n_layer=2, n_head=2, n_positions=2048)
    else:
        window = {"sliding_window": 16} if kind is not LlamaForCausalLM else {}
        make = {LlamaForCausalLM: LlamaConfig, MistralForCausalLM: MistralConfig, Gemma2ForCausalLM: Gemma2Config}[kind]
        conf = make(vocab_size=len(tok), hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
                    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
                    eos_token_id=tok.eos_token_id, bos_token_id=None, **window)
    model = kind(conf).eval().requires_grad_(False)
    for p in model.parameters():
        p.mul_(6 if p.dim() > 1 else 1)
    return model


@pytest.fixture(scope="session", params=[LlamaForCausalLM, GPT2LMHeadModel], ids=["llama", "gpt2"])
def model(request, tok):
    return tiny(tok, request.param)


@pytest.fixture(scope="session")
def llama(tok):
    return tiny(tok)


@pytest.fixture(scope="session")
def embedded():
    return ttsi.load(ttsi.Config())


def prepared(model, tok, cfg, samples=SAMPLES):
    xs = [ttsi.prepare(model, tok, s, cfg) for s in samples]
    for x in xs:
        x.update(pairs=PAIRS.get(x["id"], []))
    return xs


def digest(model):
    return hashlib.sha256(b"".join(p.numpy().tobytes() for p in model.state_dict().values())).hexdigest()


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# ------------------------------------------------------------------------------------------------ H

def test_margin_closed_form():
    assert ttsi.softmax([math.log(3), 0.0]) == pytest.approx([0.75, 0.25])
    assert ttsi.certainty([math.log(3), 0.0]) == pytest.approx(0.5)
    assert ttsi.certainty([-700.0, -700.0 - math.log(2), -800]) == pytest.approx(1 / 3), "no underflow"
    assert ttsi.certainty([-5.0]) == 1.0, "one candidate has no runner-up"


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_scores_equal_one_candidate_at_a_time_with_its_whole_prompt(model, tok, mode):
    cfg = config(score=mode)
    xs = prepared(model, tok, cfg)
    _, asked = ttsi.prefill(model, tok, xs, [])
    for x, got in zip(xs, ttsi.score(model, tok, xs, asked, cfg)):
        for name, g in zip(x["names"], got):
            answer = '{"name": "' + name + '", "arguments": {}}'
            ids, total, n = tok(x["prompt"] + answer, add_special_tokens=False).input_ids, 0.0, 0
            logp = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            for t in range(len(ids)):  # by decoding: the tokens between '{"name": "' and the closing quote
                before, after = tok.decode(ids[:t]), tok.decode(ids[:t + 1])
                if len(after) > len(x["prompt"]) + 10 and len(before) <= len(x["prompt"]) + 10 + len(name):
                    total, n = total + logp[t - 1, ids[t]].item(), n + 1
            assert g == pytest.approx(total if mode == "sum" else total / n, abs=2e-3), (name, "is scored otherwise")


def test_a_name_that_begins_another_is_scored_with_its_terminator(tok):
    spans = [ttsi.name_tokens(tok, "x", n) for n in ("get", "get_all")]
    texts = [tok.decode(ids[begin:]) for ids, begin in spans]
    assert texts[0].startswith('get"') and texts[1].startswith('get_all"')


# ------------------------------------------------------------------------------------------------ tokens, cache, decoding

def test_greedy_decoding_equals_the_whole_text_recomputed_for_each_token(model, tok):
    cfg = config()
    xs = prepared(model, tok, cfg)
    tools, _ = ttsi.prefill(model, tok, xs, [])
    for past in (None, tools):
        got = ttsi.answer(model, tok, xs, past, cfg)
        for x, text in zip(xs, got):
            ids = list(x["ids"])
            for _ in range(cfg.max_new_tokens):
                ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
                naive = tok.decode(ids[len(x["ids"]):], skip_special_tokens=True)
                if ids[-1] == tok.eos_token_id or ttsi.parse(naive):
                    break
            assert text == naive, "cache, padding or positions are wrong"


def test_sampling_follows_the_distribution_and_no_neighbour(llama, tok):
    x = prepared(llama, tok, config())[1]
    u = torch.rand(400, 1, generator=torch.Generator().manual_seed(1))
    row, start = x["ids"], len(x["ids"])
    draw = lambda uniform: ttsi.decode(llama, tok, [row] * len(uniform), [start] * len(uniform), 1, None, 1.0, uniform)
    texts = draw(u)
    assert texts[7:9] == draw(u[7:9]), "a row's draws depend on its batch"
    p = llama(torch.tensor([row])).logits[0, -1].softmax(-1)
    best = p.argmax().item()
    share, sd = texts.count(tok.decode([best])) / 400, (p[best] * (1 - p[best]) / 400).sqrt()
    assert abs(share - p[best]) < 4 * sd, "not the model's distribution (false alarm: 1 in 15,000)"


def test_forward_leaves_the_past_as_it_was(llama, tok):
    xs = prepared(llama, tok, config())
    tools, _ = ttsi.prefill(llama, tok, xs, [])
    keys = [layer.keys.clone() for layer in tools.cache.layers]
    ttsi.answer(llama, tok, xs, tools, config())
    assert all(torch.equal(k, layer.keys) for k, layer in zip(keys, tools.cache.layers))


@pytest.mark.parametrize("text,value", [
    ('{"a": 1}', {"a": 1}), ('Sure! {"a": {"b": "}"}} and more {', {"a": {"b": "}"}}), ("", None), ("{" * 5000, None),
    ('{"a": NaN}', None), ('{"a": 1e999}', None), ('{"a": "\\ud800"}', None), ('{"a": ' + "[" * 9000 + "]" * 9000 + "}", None), ("[1]", None)])
def test_model_output_is_data(text, value):
    assert ttsi.parse(text) == value


# ------------------------------------------------------------------------------------------------ the adapter

def test_a_hooked_layer_is_w_plus_s_b_a(llama, tok):
    cfg, x = config(lora_rank=3, lora_alpha=5.0), torch.randn(4, 6, 32)  # four rows, two for each adapter
    layer = llama.model.layers[0].self_attn.q_proj
    with ttsi.adapters(llama, prepared(llama, tok, cfg)[:2], cfg) as theta:
        A, B = theta[:2]
        assert A.shape == (2, 3, 32) and A.abs().max() <= 32 ** -0.5 and not B.any()
        assert torch.equal(layer(x), F.linear(x, layer.weight)), "B = 0 must change nothing"
        B.data.normal_()
        for row in range(4):
            W = layer.weight + 5 / 3 * (A[row // 2].T @ B[row // 2]).T
            assert torch.allclose(layer(x)[row], F.linear(x[row], W), atol=1e-4)
        assert layer(x.reshape(24, 32)).shape == (24, 32), "rows flattened before the layer"
    assert torch.equal(layer(x), F.linear(x, layer.weight)) and not hooks(llama)


def test_one_sgd_step_closed_form():
    theta = [torch.zeros(2, 1, 2), torch.zeros(2, 2, 1)]
    theta[0].grad, theta[1].grad = torch.tensor([[[3.0, 0.0]], [[0.0, 0.0]]]), torch.tensor([[[0.0], [4.0]], [[0.0], [0.1]]])
    ttsi.sgd(theta, 0.5)
    assert torch.allclose(theta[0], torch.tensor([[[-0.3, 0.0]], [[0.0, 0.0]]])), "3 / 5 of 0.5, by its own norm"
    assert torch.allclose(theta[1], torch.tensor([[[0.0], [-0.4]], [[0.0], [-0.5]]])), "not scaled by its neighbour"


class Naive(torch.nn.Module):
    """LoRA by a wrapped layer, one sample, for the oracle below."""

    def __init__(self, layer, A, B, s, mask):
        super().__init__()
        self.layer, self.A, self.B, self.s, self.mask = layer, A, B, s, mask

    def forward(self, x):
        return self.layer(x) + self.s * (x @ self.A.T @ self.B) * self.mask[0][:x.shape[-2], None]


def naive_train(model, tok, x, cfg, A0):
    """T for one sample: no batch, no cache, no hooks; each pair a whole forward pass. -> (losses, first logits after)"""
    model, mask, params = copy.deepcopy(model), [None], []
    for layer in ttsi.linear_layers(model):
        parent, key = next((m, k) for m in model.modules() for k, c in m.named_children() if c is layer)
        d_out = layer.out_features if hasattr(layer, "out_features") else layer.nf
        A, B = A0[len(params) // 2].clone().requires_grad_(), torch.zeros(cfg.lora_rank, d_out, requires_grad=True)
        params += [A, B]
        setattr(parent, key, Naive(layer, A, B, cfg.lora_alpha / cfg.lora_rank, mask))

    def logits(ids):
        mask[0] = (torch.arange(len(ids)) >= (x["head"] if cfg.adapt == "suffix" else 0)).float()
        return model(torch.tensor([ids])).logits[0]
    losses, adam = [], torch.optim.AdamW(params, lr=cfg.lr, weight_decay=0.0)
    for step in range(cfg.epochs):
        loss = 0.0
        for pair in x["pairs"]:
            prompt = tok(ttsi.render(tok, x["system"], pair["request"])[0], add_special_tokens=False).input_ids
            answer = tok(json.dumps(pair["call"]), add_special_tokens=False).input_ids
            out = logits(prompt + answer)[len(prompt) - 1:-1].log_softmax(-1)
            loss = loss - sum(out[t, k] for t, k in enumerate(answer)) / len(answer) / len(x["pairs"])
        grads = torch.autograd.grad(loss, params)
        lr, norm = cfg.lr * 0.5 * (1 + math.cos(math.pi * step / cfg.epochs)), math.sqrt(sum((g ** 2).sum() for g in grads))
        with torch.no_grad():
            for p, g in zip(params, grads):
                p.grad = g
                if cfg.optimizer == "sgd":
                    p -= lr * g / norm
        if cfg.optimizer == "adamw":
            adam.param_groups[0]["lr"] = lr
            adam.step()
        losses.append(loss.item())
    with torch.no_grad():
        return losses, logits(x["ids"])[-1]


@pytest.mark.parametrize("adapt", ["full", "suffix"])
@pytest.mark.parametrize("optimizer,lr", [("sgd", 0.5), ("adamw", 1e-2)])
def test_training_a_ragged_batch_equals_serial_naive_loops(model, tok, adapt, optimizer, lr):
    cfg = config(adapt=adapt, optimizer=optimizer, lr=lr, epochs=3)
    xs = prepared(model, tok, cfg)  # two pairs, one pair, none
    past = ttsi.prefill(model, tok, xs, [])[0] if adapt == "suffix" else None
    with ttsi.adapters(model, xs, cfg) as theta:
        start = [A.detach().clone() for A in theta[::2]]
        losses = ttsi.train(model, tok, xs, theta, past, cfg)
        after = ttsi.forward(model, [x["ids"] for x in xs], past)[0][:, -1]
    for i, x in enumerate(xs[:2]):
        naive_losses, naive_after = naive_train(model, tok, x, cfg, [A[i] for A in start])
        assert losses[i] == pytest.approx(naive_losses, rel=1e-3), "loss of a sample differs from training it alone"
        assert torch.allclose(after[i], naive_after, rtol=1e-2, atol=2e-2), "the adapted model differs"
        assert losses[i][-1] < losses[i][0]
    base = ttsi.forward(model, [x["ids"] for x in xs])[0][2, -1]
    assert losses[2] == [0.0] * 3 and torch.allclose(after[2], base, atol=1e-3), "without pairs nothing may change"


def test_suffix_gradients_equal_a_full_forward_with_the_adapter_masked(model, tok):
    cfg = config(epochs=1, adapt="suffix")
    xs = prepared(model, tok, cfg)[:1]
    past, _ = ttsi.prefill(model, tok, xs, [])
    span = xs[0]["ids"] + [20, 21, 22], len(xs[0]["ids"])

    def gradients(masked):
        with ttsi.adapters(model, xs, cfg) as theta:
            for B in theta[1::2]:
                B.data.copy_(torch.randn(B.shape, generator=torch.Generator().manual_seed(3)) * 0.1)
            keep = ttsi.adapted
            if masked:
                def only_suffix(x, y, parameters, cfg):
                    behind = (torch.arange(x.shape[1]) >= xs[0]["head"])[None, :, None]
                    return torch.where(behind, keep(x, y, parameters, cfg), y)
                ttsi.adapted = only_suffix
            try:
                loss = ttsi.logprob(model, [span], None if masked else past).sum()
                return torch.autograd.grad(loss, theta)
            finally:
                ttsi.adapted = keep
    got, want = gradients(False), gradients(True)
    scale = max(g.abs().max() for g in want)
    assert max((g - w).abs().max() for g, w in zip(got, want)) < 1e-4 * scale


# ------------------------------------------------------------------------------------------------ G

def reading(model, f):
    """-> (f(), for each forward pass the shape of its tokens)"""
    shapes = []
    hook = model.register_forward_pre_hook(lambda _, args, kw: shapes.append(tuple(kw["input_ids"].shape)), with_kwargs=True)
    try:
        return f(), shapes
    finally:
        hook.remove()


def test_rows_continue_the_longest_past(model):
    _, past = ttsi.forward(model, [[5, 6], [5, 6, 7, 8]])
    rows = [[5, 6, 7, 8, 9], [5, 6, 9, 9], [5, 6, 7, 8, 9]]
    (logits, after), shapes = reading(model, lambda: ttsi.forward(model, rows, past))
    assert shapes == [(3, 2)], "two tokens at most are new"
    assert after.mask.sum(1).tolist() == [5, 4, 5], "each row has its own behind it"
    for row, got in zip(rows, logits):
        assert torch.allclose(model(torch.tensor([row])).logits[0, -1], got[-1], atol=1e-4)
    short = past._replace(ids=[[5, 6], [5]], mask=past.mask * torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]]))
    (logits, _), shapes = reading(model, lambda: ttsi.forward(model, [[5, 9, 4]], short))
    assert shapes == [(1, 2)] and torch.allclose(model(torch.tensor([[5, 9, 4]])).logits[0, -1], logits[0, -1], atol=1e-4), \
        "what the cache holds beyond the tokens that a past claims is seen"


@torch.no_grad()
def test_a_past_can_be_continued_in_several_ways_at_once(model):
    _, past = ttsi.forward(model, [[5, 6], [7, 8]])
    _, past = ttsi.forward(model, [[5, 6, 1], [7, 8, 1]], past)  # from here on it grows in place
    kept = [layer.keys.clone() for layer in past.cache.layers]
    rows, ends = [[[5, 6, 1, k], [7, 8, 1, k]] for k in (2, 3, 9)], []
    for r in rows:  # all take the next slot
        with torch.set_grad_enabled(r == rows[2]):
            ends.append(ttsi.forward(model, r, past)[1])
    for r, end in zip(rows, ends):
        longer = [row + [4] for row in r]
        logits, _ = ttsi.forward(model, longer, end)
        assert torch.allclose(logits[:, -1], model(torch.tensor(longer)).logits[:, -1], atol=1e-4), "the other one's token"
    assert all(torch.equal(k, layer.keys) for k, layer in zip(kept, past.cache.layers))


def test_tools_are_read_once_for_all_that_offer_them(model, tok):
    cfg, memory = config(shuffle=False), []
    xs = prepared(model, tok, cfg)
    ask = lambda x, request: ttsi.prepare(model, tok, {"id": request, "tools": x["tools"],
                                                       "messages": [{"role": "user", "content": request}]}, cfg)
    first, more = ask(xs[0], "one"), [ask(xs[0], "two two"), ask(xs[0], "three three three")]
    long, total = lambda x: len(x["ids"]) - 1, lambda shapes: sum(b * n for b, n in shapes)
    _, shapes = reading(model, lambda: ttsi.prefill(model, tok, [first], memory))
    assert shapes == [(1, long(first))], "one prompt is read in one pass"
    (_, asked), shapes = reading(model, lambda: ttsi.prefill(model, tok, more, memory))
    assert shapes == [(2, max(map(long, more)) - first["head"])], "the tools of the last call are read again"
    (_, apart), shapes = reading(model, lambda: ttsi.prefill(model, tok, more, []))
    assert shapes == [(1, first["head"]), (2, max(map(long, more)) - first["head"])], "one list is read twice"
    for past in (asked, apart):
        for x, got in zip(more, ttsi.forward(model, [x["ids"] for x in more], past)[0]):
            assert torch.allclose(model(torch.tensor([x["ids"]])).logits[0, -1], got[-1], atol=1e-3)
    _, shapes = reading(model, lambda: ttsi.prefill(model, tok, xs, memory))  # the first of these is known
    assert total(shapes) >= sum(map(long, xs)) and len(memory) == 1, "other tools are not those in memory"



def test_a_draft_that_has_ended_leaves_the_others_alone(embedded):
    model, tok = embedded
    cfg, samples = ttsi.Config(), list(ttsi.read_jsonl(HERE / "data/demo.jsonl", ttsi.to_sample).values())[:4]
    xs = [ttsi.prepare(model, tok, s, cfg) for s in samples]
    rows = [tok(ttsi.render(tok, x["system"], ttsi.DRAFT + x["request"])[0], add_special_tokens=False).input_ids for x in xs]
    uniform = torch.rand(4, 60, generator=torch.Generator().manual_seed(0))
    together = ttsi.decode(model, tok, rows, list(map(len, rows)), 60, None, 1.0, uniform)
    alone = [ttsi.decode(model, tok, [row], [len(row)], 60, None, 1.0, u[None])[0] for row, u in zip(rows, uniform)]
    assert together == alone and len({len(tok(t).input_ids) for t in together}) > 1, "they end at different times"



@pytest.mark.parametrize("name,arguments,request_,verdict", [
    ("cancel_flight", {"city": "Oslo"}, "drop the Oslo flight", ""),
    ("cancel_hotel", {"city": "Oslo"}, "drop the Oslo flight", "tool not on offer"),
    ("cancel_flight", {}, "drop the flight", "required argument missing"),
    ("cancel_flight", {"city": "Oslo", "x": 1}, "drop Oslo", "unknown argument"),
    ("book_flight", {"city": "Oslo", "days": "3"}, "Oslo 3", "wrong type"),
    ("book_flight", {"city": "Oslo", "days": True}, "Oslo true", "wrong type"),
    ("cancel_flight", {"city": "Lima"}, "drop the Oslo flight", "value not in the request"),
    ("cancel_flight", {"city": "Rome"}, "Cancel my flight to Rome, would you, please!", "copy of the request"),
    ("cancel_flight", {"city": "Bern"}, "no flight to Bern", "written before"),
    ("pick", {"size": "huge"}, "a huge one", "value not in enum")])
def test_checks(llama, tok, name, arguments, request_, verdict):
    sample = dict(SAMPLES[1], tools=SAMPLES[1]["tools"] + [tool("pick", size={"type": "string", "enum": ["S", "L"]})])
    x = ttsi.prepare(llama, tok, sample, config())
    pair = {"request": request_, "call": {"name": name, "arguments": arguments}}
    assert ttsi.check(pair, x, [{"request": "No flight to Bern."}]) == verdict


def test_the_closest_drafts_are_kept():
    pairs = [{"request": r} for r in ("please book it", "please axe it", "please axe the flight", "please pay")]
    x = {"request": "please axe my flight", "drafts": [{"pair": p} for p in pairs] + [{"pair": None}]}
    assert [p["request"] for p in ttsi.closest(x)][:2] == [
        "please axe the flight", "please axe it"], "rare shared words first; 'please' is in all of them and says nothing"


def test_generation_stops_at_k_and_counts_every_rejection(llama, tok, monkeypatch):
    good = '{"call": {"name": "get_all", "arguments": {"x": "%d"}}, "request": "number %d"}'
    texts = iter(["junk", good % (1, 1), good % (1, 1), good % (2, 2)] + ["never"] * 9)
    monkeypatch.setattr(ttsi, "decode", lambda m, t, rows, *a: [next(texts) for _ in rows])
    drafts = ttsi.generate(llama, tok, prepared(llama, tok, config())[:1], None, config(k=2, attempts=9))[0]
    assert [d["verdict"] for d in drafts] == ["no JSON object with a request and a call", "kept", "written before", "kept"]


def test_a_supplied_copy_of_the_request_is_refused_even_unchecked(llama, tok):
    xs = prepared(llama, tok, config())
    copy_ = {"b": [{"request": "Cancel my flight to Rome would you please", "call": SAMPLES[1]["call"]}] + PAIRS["b"]}
    drafts = ttsi.supplied(xs, copy_, config(check=False))[1]
    assert [d["verdict"] for d in drafts] == ["copy of the request", "kept"]


# ------------------------------------------------------------------------------------------------ Algorithm 1

SEEN = ("margin", "logp", "direct", "adapted", "pairs", "loss", "drafts")


def run(model, tok, samples=SAMPLES, pairs=PAIRS, **changes):
    cfg = config(**{"tau": 2.0, "k": 2, "check": False, "epochs": 2, **changes})
    rows = [x for i in range(0, len(samples), 2) for x in ttsi.tt_si(model, tok, samples[i:i + 2], cfg, pairs)]
    return {x["id"]: {key: x[key] for key in SEEN if key in x} for x in rows}


def same(a, b):
    assert a.keys() == b.keys()
    for i in a:
        assert a[i].keys() == b[i].keys(), f"{i}: another decision"
        for key in a[i]:
            close = key in ("margin", "logp", "loss")
            assert a[i][key] == (pytest.approx(b[i][key], abs=2e-3) if close else b[i][key]), f"{i}: {key} differs"


def test_base_weights_and_hooks_after_a_run_and_after_an_exception_in_it(model, tok, monkeypatch):
    before, count = digest(model), hooks(model)
    first = run(model, tok)
    assert "adapted" in first["a"] and "adapted" in first["b"] and "adapted" not in first["c"], "c has no pairs"
    assert digest(model) == before and hooks(model) == count, "not reset after a run"
    with monkeypatch.context() as m:
        m.setattr(ttsi, "sgd", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(model, tok)
    assert digest(model) == before and hooks(model) == count, "not reset after an exception"
    same(run(model, tok), first)


def test_a_cached_tool_list_is_not_computed_again(llama, tok):
    cfg = config(tau=2.0, check=False, epochs=2, k=1)
    rows = {adapt: ttsi.tt_si(llama, tok, SAMPLES[1:2], dataclasses.replace(cfg, adapt=adapt), PAIRS)[0]
            for adapt in ("suffix", "full")}
    saved = [rows["full"]["cost"][s][1] - rows["suffix"]["cost"][s][1] for s in ("train", "answer")]
    assert saved[0] == 2 * 2 * rows["full"]["head"], "two steps, forward and backward"
    assert saved[1] >= rows["full"]["head"] - 12, "the adapted answer, of 12 tokens at most, begins behind the tools"
    head, asked = rows["full"]["head"], len(rows["full"]["ids"])
    assert rows["full"]["cost"]["prefill"][1] == asked - 1 and rows["full"]["cost"]["answer"][1] >= asked > head


def test_each_sample_starts_from_the_base(llama, tok):
    alone = run(llama, tok, SAMPLES[1:2], lr=1.0)
    same({"b": run(llama, tok, SAMPLES[:2], lr=1.0, select="all")["b"]}, alone)


def test_order_limit_and_batch_size_change_nothing(model, tok):
    for how in ({"pairs": PAIRS}, {"pairs": None, "tau": 0.95}, {"pairs": None, "select": "all"}):
        whole = run(model, tok, **how)
        same(run(model, tok, SAMPLES[::-1], **how), whole)
        for s in SAMPLES:
            same(run(model, tok, [s], **how), {s["id"]: whole[s["id"]]})


def test_scrambled_labels_change_no_prediction(model, tok):
    other = [dict(s, call={"name": s["tools"][-1]["name"], "arguments": {"leak": "1"}}, accept={"leak": ["1"]}) for s in SAMPLES]
    same(run(model, tok, other, pairs=None), run(model, tok, pairs=None))
    none = [{k: v for k, v in s.items() if k != "call"} for s in SAMPLES]
    for i, row in run(model, tok, none).items():
        assert row.get("adapted") == run(model, tok)[i].get("adapted")
        assert ("direct" in row) != ("adapted" in row), "without a label there is nothing to compare with"


def test_nothing_changes_where_nothing_is_trained(model, tok):
    zero = run(model, tok, epochs=0, select="all")
    closed = run(model, tok, tau=0.0)
    for i in zero:
        assert zero[i].get("adapted", zero[i]["direct"]) == zero[i]["direct"] == closed[i]["direct"]
        assert "adapted" not in closed[i] and "drafts" not in closed[i]


def test_training_changes_the_answer(model, tok):
    rows = run(model, tok, epochs=8, lr=1.0)
    assert any(r["adapted"] != r["direct"] for r in rows.values() if "adapted" in r)


@pytest.mark.parametrize("select", ["uncertain", "certain", "all"])
def test_the_gate_is_strict_and_its_control_the_complement(llama, tok, select):
    margin = ttsi.tt_si(llama, tok, SAMPLES[:1], config(tau=0.0))[0]["margin"]
    for tau, uncertain in ((margin, False), (margin + 1e-6, True), (margin - 1e-6, False)):
        x = ttsi.tt_si(llama, tok, SAMPLES[:1], config(tau=max(tau, 0.0), select=select), PAIRS)[0]
        assert ("drafts" in x) == (select == "all" or uncertain == (select == "uncertain")), (select, tau, margin)


def test_a_prompt_beyond_the_context_is_named_and_its_neighbours_are_answered(llama, tok):
    long = dict(SAMPLES[0], id="long", messages=[{"role": "user", "content": "word " * 2000}])
    rows = ttsi.tt_si(llama, tok, [long] + SAMPLES, config())
    assert "exceed the context of 2048" in rows[0]["error"] and all("direct" in r for r in rows[1:])
    summary = ttsi.summarise([ttsi.finish(x, s, config()) for x, s in zip(rows, [long] + SAMPLES)])
    assert summary["labelled"] == 4 and list(summary["failed"]) == ["long"], "the denominator must not change"


def test_a_request_that_the_template_refuses_is_named_and_its_neighbours_are_answered(llama, tok):
    tok = copy.deepcopy(tok)
    tok.chat_template = "{% for m in messages %}{% if 'hm' in m.content %}{{ raise_exception('no') }}{% endif %}[{{ m.content }}]{% endfor %}>"
    rows = ttsi.tt_si(llama, tok, SAMPLES, config())
    assert [bool(r["error"]) for r in rows] == [False, False, True] and all("direct" in r for r in rows[:2])
    s = ttsi.summarise([ttsi.finish(x, y, config()) for x, y in zip(rows, SAMPLES)])
    assert list(s["failed"]) == ["c"] and s["labelled"] == 3 and "template" in ttsi.table(s, config())
    with contextlib.redirect_stdout(io.StringIO()):
        ttsi.trace(tok, rows[2], ttsi.finish(rows[2], SAMPLES[2], config()), SAMPLES[2], config())


def test_several_templates_in_one_tokenizer(tok):
    several = copy.deepcopy(tok)
    several.chat_template = {"default": tok.chat_template, "tool_use": "{{ 1 / 0 }}"}
    assert ttsi.render(several, "SYSTEM", "USER") == ttsi.render(tok, "SYSTEM", "USER")


def test_candidate_order_is_a_function_of_seed_and_names(llama, tok):
    names = lambda s, **kw: ttsi.prepare(llama, tok, s, config(**kw))["names"]
    turned = dict(SAMPLES[0], id="z", tools=SAMPLES[0]["tools"][::-1])
    assert names(SAMPLES[0]) == names(turned) and names(turned, shuffle=False) == ["get_all_users", "get_all", "get"]
    assert len({tuple(names(SAMPLES[0], seed=s)) for s in range(20)}) > 3


@pytest.mark.parametrize("kind", [MistralForCausalLM, Gemma2ForCausalLM])
def test_a_sliding_window_sees_no_padding(tok, kind):
    model = tiny(tok, kind)
    rows = ttsi.tt_si(model, tok, SAMPLES[:2], config(tau=2.0, k=2, check=False, adapt="full", lr=0.5, epochs=3), PAIRS)
    for x in rows:
        for name, got in zip(x["names"], x["logp"]):  # one candidate at a time, with its whole prompt, unpadded
            ids, begin = ttsi.name_tokens(tok, x["prompt"], name)
            logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            assert got == pytest.approx(sum(logp[t - 1, ids[t]].item() for t in range(begin, len(ids))), abs=2e-3)
        A = [p[0] for p in theta_of(model, x, config())[::2]]
        losses, _ = naive_train(model, tok, x, config(adapt="full", lr=0.5, epochs=3), A)
        assert x["loss"] == pytest.approx(losses, rel=1e-3)


@pytest.mark.parametrize("kind", [MistralForCausalLM, Gemma2ForCausalLM])
def test_drafts_of_unequal_beginnings_see_no_padding_under_a_window(tok, kind):
    model, rows = tiny(tok, kind), [list(range(40, 60)), list(range(40, 70)), list(range(40, 45))]
    _, past = ttsi.forward(model, [rows[2][:-1]])
    alone = [ttsi.decode(model, tok, [row], [len(row)], 8)[0] for row in rows]
    assert ttsi.decode(model, tok, rows, list(map(len, rows)), 8, past) == alone


def theta_of(model, x, cfg):
    with ttsi.adapters(model, [x], cfg) as theta:
        return [p.detach().clone() for p in theta]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base_with_float32_adapters(tok, dtype):
    model = tiny(tok).to(dtype)
    with ttsi.adapters(model, prepared(model, tok, config())[:2], config()) as theta:
        assert {p.dtype for p in theta} == {torch.float32}
    rows = ttsi.tt_si(model, tok, SAMPLES, config(tau=2.0, k=2, check=False, epochs=4, lr=0.5), PAIRS)
    full = ttsi.tt_si(tiny(tok), tok, SAMPLES, config(tau=2.0, k=2, check=False, epochs=4, lr=0.5), PAIRS)
    for a, b in zip(rows, full):
        assert a["logp"] == pytest.approx(b["logp"], rel=0.1, abs=0.5)
        assert "loss" not in a or a["loss"] == pytest.approx(b["loss"], rel=0.15) and a["loss"][-1] < a["loss"][0]


def test_only_k_pairs_are_trained_on_and_the_closest(llama, tok):
    three = {"b": [{"request": r, "call": PAIRS["b"][0]["call"]} for r in ("pay", "cancel my trip to Rome", "book")]}
    x = ttsi.tt_si(llama, tok, SAMPLES[1:2], config(tau=2.0, k=1, check=False), three)[0]
    assert [p["request"] for p in x["pairs"]] == ["cancel my trip to Rome"] and len(x["drafts"]) == 3


def test_drafts_are_drawn_by_seed_sample_and_number(llama, tok, monkeypatch):
    drawn = []
    monkeypatch.setattr(ttsi, "decode", lambda m, t, rows, s, l, p, temperature, u: drawn.append(u) or ["junk"] * len(rows))
    for seed in (0, 0, 1):
        ttsi.generate(llama, tok, prepared(llama, tok, config())[:2], None, config(drafts=2, attempts=2, seed=seed))
    first, again, other = torch.cat(drawn[:2]), torch.cat(drawn[2:4]), torch.cat(drawn[4:])
    assert torch.equal(first, again) and len({*map(tuple, first.tolist()), *map(tuple, other.tolist())}) == 16


def test_any_end_token_stops_an_answer(llama, tok, monkeypatch):
    x = prepared(llama, tok, config())[1]
    ids = list(x["ids"])
    for _ in range(4):
        ids.append(llama(torch.tensor([ids])).logits[0, -1].argmax().item())
    end = next(k for k in range(len(x["ids"]) + 1, len(ids)) if ids[k] not in ids[len(x["ids"]):k])
    monkeypatch.setattr(llama.generation_config, "eos_token_id", [tok.eos_token_id, ids[end]])
    assert ttsi.answer(llama, tok, [x], None, config()) == [tok.decode(ids[len(x["ids"]):end])]


def test_icl_shows_the_pairs_as_earlier_turns_and_trains_nothing(llama, tok):
    cfg = config(method="icl", check=False, k=2, tau=2.0, max_new_tokens=4)
    x = ttsi.tt_si(llama, tok, SAMPLES[:1], cfg, PAIRS)[0]
    turns = [{"role": "system", "content": x["system"]}]
    for pair in x["pairs"]:
        turns += [{"role": "user", "content": pair["request"]}, {"role": "assistant", "content": json.dumps(pair["call"])}]
    ids = tok.apply_chat_template(turns + [{"role": "user", "content": x["request"]}], add_generation_prompt=True,
                                  return_dict=True).input_ids
    new = []
    for _ in range(4):
        new.append(llama(torch.tensor([ids + new])).logits[0, -1].argmax().item())
    assert len(x["pairs"]) == 2 and x["adapted"] == tok.decode(new, skip_special_tokens=True) and "loss" not in x
    assert x["adapted"] != x["direct"], "the pairs make a difference"
    long = [{"request": "1 " * 500, "call": {"name": "get", "arguments": {}}}] * 2
    x = ttsi.tt_si(llama, tok, SAMPLES[:1], cfg, {"a": long})[0]
    assert len(x["pairs"]) == 2 and x["adapted"] == x["direct"], "pairs that exceed the context are left out"


def test_a_teacher_writes_the_drafts_it_would_write_for_itself(llama, tok, embedded):
    cfg = ttsi.Config(select="all", max_new_tokens=64, attempts=2, k=2, epochs=2)
    samples = list(ttsi.read_jsonl(HERE / "data/demo.jsonl", ttsi.to_sample).values())[:3]
    teacher, untouched = embedded, digest(embedded[0])
    own = ttsi.tt_si(*teacher, samples, cfg)
    for x, y in zip(ttsi.tt_si(llama, tok, samples, cfg, teacher=teacher), own):
        assert [d["text"] for d in x["drafts"]] == [d["text"] for d in y["drafts"]] and x["pairs"] == y["pairs"] != []
        assert x["logp"] != y["logp"] and len(x["loss"]) == 2, "the student scores and is trained"
        assert x["cost"]["generate"][1] > y["cost"]["generate"][1] + 0.8 * x["head"], "the teacher reads the tools itself"
    assert digest(embedded[0]) == untouched


def test_direct_adapts_nothing(llama, tok):
    x = ttsi.tt_si(llama, tok, SAMPLES[:1], config(method="direct", tau=2.0), PAIRS)[0]
    assert "margin" in x and "drafts" not in x and "adapted" not in x


def test_cover_forces_the_likeliest_tools_in_turn(embedded):
    model, tok = embedded
    sample = list(ttsi.read_jsonl(HERE / "data/demo.jsonl", ttsi.to_sample).values())[:2]
    for x in ttsi.tt_si(model, tok, sample, ttsi.Config(cover=True, drafts=6, tau=2.0)):
        likely = [name for _, name in sorted(zip(x["logp"], x["names"]), reverse=True)]
        assert [ttsi.parse(d["text"])["call"]["name"] for d in x["drafts"]] == (likely * 2)[:6]
        assert x["drafts"][0]["text"] != x["drafts"][len(likely)]["text"], "each draft has draws of its own"


# ------------------------------------------------------------------------------------------------ real models

SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=2048)
GROUPED, WINDOW = {"num_key_value_heads": 2, "head_dim": 8}, {"sliding_window": 16}
ARCHITECTURES = {  # configuration, what it needs, linear layers but the head
    "Qwen2": ({**SMALL, "num_key_value_heads": 2}, 14), "Qwen3": ({**SMALL, **GROUPED}, 14), "Llama": ({**SMALL, **GROUPED}, 14),
    "Mistral": ({**SMALL, **GROUPED, **WINDOW}, 14), "Gemma2": ({**SMALL, **GROUPED, **WINDOW}, 14),
    "Gemma3Text": ({**SMALL, **GROUPED, **WINDOW}, 14), "Phi3": ({**SMALL, "num_key_value_heads": 2, "pad_token_id": None}, 8),
    "GPTNeoX": (SMALL, 8), "GPT2": (dict(n_embd=32, n_layer=2, n_head=4, n_positions=2048), 8),
    "OPT": (dict(hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32), 12)}


@slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_stage_on_every_architecture(tok, name, dtype):
    settings, layers = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name + "Config")(
        vocab_size=len(tok), bos_token_id=None, eos_token_id=tok.eos_token_id, **settings)).eval().requires_grad_(False)
    for p in model.parameters():
        p.mul_(6 if p.dim() > 1 else 1)
    model = model.to(dtype)
    before = hashlib.sha256(b"".join(p.float().numpy().tobytes() for p in model.state_dict().values())).hexdigest()
    assert len(ttsi.linear_layers(model)) == layers
    for adapt in ("suffix", "full"):
        cfg = config(tau=2.0, k=2, check=False, epochs=3, lr=.5, adapt=adapt)
        for x in ttsi.tt_si(model, tok, SAMPLES, cfg, PAIRS):
            assert x["candidates"] and isinstance(x["direct"], str) and not hooks(model)
            for (ids, begin), got in zip(x["candidates"], x["logp"]):  # alone, unpadded, without cache
                logp = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
                want = sum(logp[t - 1, ids[t]].item() for t in range(begin, len(ids)))
                assert got == pytest.approx(want, abs=2e-3 if dtype is torch.float32 else .3)
            if x["pairs"]:
                A = [p[0] for p in theta_of(model, x, cfg)[::2]]
                losses, _ = naive_train(model.float(), tok, x, cfg, A) if dtype is torch.float32 else ([7] * 3, 0)
                assert x["loss"] == pytest.approx(losses, rel=1e-3 if dtype is torch.float32 else .3)
                assert x["loss"][-1] < x["loss"][0]
    after = hashlib.sha256(b"".join(p.float().numpy().tobytes() for p in model.state_dict().values())).hexdigest()
    assert before == after, "the base was written"


def vocabulary(kind):
    """Tokenizers as real models have them, small: with blanks in front of words or quotes glued to names."""
    texts = [json.dumps(t) for s in SAMPLES for t in s["tools"]] + [json.dumps(s["call"]) for s in SAMPLES] * 3
    end, bytes_ = ["<end>", "<unk>"], tokenizers.pre_tokenizers.ByteLevel.alphabet()
    model = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=kind == "sentencepiece-like", unk_token="<unk>"))
    pre, post = tokenizers.pre_tokenizers, tokenizers.decoders
    if kind == "sentencepiece-like":
        model.pre_tokenizer = pre.Metaspace(prepend_scheme="first")
        model.decoder = post.Sequence([post.Replace("\u2581", " "), post.ByteFallback(), post.Fuse(), post.Strip(" ", 1, 0)])
        end, bytes_ = end + [f"<0x{i:02X}>" for i in range(256)], []
    else:
        glue = [pre.Split(" ", "merged_with_next")] * (kind == "glued quotes")
        model.pre_tokenizer = pre.Sequence([*glue, pre.ByteLevel(add_prefix_space=False, use_regex=not glue)])
        model.decoder = post.ByteLevel()
    model.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=900, special_tokens=end, initial_alphabet=bytes_, show_progress=False))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<end>")


@pytest.mark.parametrize("kind,token", [("byte-level", '",'), ("sentencepiece-like", '\u2581"get",'), ("glued quotes", '\u0120"get",')])
def test_scores_with_other_vocabularies(kind, token):
    other = vocabulary(kind)
    model = tiny(other)
    assert token in other.tokenize('{"name": "get", "arguments": {}}'), "the vocabulary is not what it is meant to be"
    test_scores_equal_one_candidate_at_a_time_with_its_whole_prompt(model, other, "sum")


THINKING = ("{% for m in messages %}[{{ m.role }}: {{ m.content }}]{% endfor %}{% if enable_thinking is not defined or "
            "enable_thinking %}<think>{% else %}<think></think>{% endif %}")
DATED = ("{% if date_string is not defined %}{% set date_string = strftime_now('%d %B %Y') %}{% endif %}[{{ date_string }}]"
         "{% for m in messages %}[{{ m.content }}]{% endfor %}")


@pytest.mark.parametrize("template,end", [(THINKING, "<think></think>"), (DATED, "[USER]")])
def test_templates_that_think_or_tell_the_date(tok, template, end):
    tok = copy.deepcopy(tok)
    tok.chat_template = template
    text, head = ttsi.render(tok, "SYSTEM", "USER")
    assert text.endswith(end) and "SYSTEM" in text[:head] and ("2026" not in text or "01 January 2026" in text)


@pytest.mark.parametrize("available,device", [(False, "cpu"), (True, "meta")])
def test_a_build_for_an_accelerator_runs_without_one(monkeypatch, available, device):
    monkeypatch.setattr(torch.accelerator, "current_accelerator",
                        lambda check_available=False: torch.device("meta") if available or not check_available else None)
    with pytest.raises(ttsi.InputError, match="loaded on meta") if available else contextlib.nullcontext():
        assert ttsi.load(ttsi.Config())[0].device.type == device


def saved(model, tok, folder):
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return str(folder)


def test_models_without_a_plain_cache_are_refused(tok, tmp_path):
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=len(tok), hidden_size=32, num_hidden_layers=1))
    linear = transformers.Qwen3NextForCausalLM(transformers.Qwen3NextConfig(
        **{**SMALL, **GROUPED, "vocab_size": len(tok), "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8,
           "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}))
    for model in (mamba, linear):
        folder = saved(model, tok, tmp_path / type(model).__name__)
        with pytest.raises(ttsi.InputError, match="no plain key/value cache") as e:
            ttsi.load(ttsi.Config(model=folder))
        assert "\n" not in str(e.value)


def test_a_long_prompt_runs_whole_and_one_beyond_the_context_is_named(llama, tok):
    tools = [tool(f"tool_number_{i}", city=STRING, days=INTEGER) for i in range(62)]
    ask = lambda n: dict(SAMPLES[1], id=str(n), tools=tools[:n], call={"name": tools[0]["name"], "arguments": {}})
    fits, long = ttsi.tt_si(llama, tok, [ask(50), ask(62)], config())
    assert 1200 < len(fits["ids"]) < 2048 < len(long["ids"]) and "direct" in fits and len(fits["logp"]) == 50
    assert f'{len(long["ids"]) + 12} tokens, exceed the context of 2048' in long["error"] and "direct" not in long
    rows = [ttsi.finish(x, s, config()) for x, s in zip((fits, long), (ask(50), ask(62)))]
    assert ttsi.summarise(rows)["labelled"] == 2 and list(ttsi.summarise(rows)["failed"]) == ["62"]


# ------------------------------------------------------------------------------------------------ scoring

@pytest.mark.parametrize("text,gold,accept,name,call", [
    ('{"name": "f", "arguments": {"x": 12.0}}', {"x": "12"}, None, True, True),
    ('{"name": "f", "arguments": {"x": "a", "y": 1}}', {"x": "a"}, None, True, False),
    ('{"name": "f", "arguments": {}}', {"x": "a"}, None, True, False),
    ('{"name": "f", "arguments": [1]}', {}, None, True, False),
    ('{"name": "g", "arguments": {"x": 12}}', {"x": 12}, None, False, False),
    ('{"name": "f", "arguments": {"x": true, "l": [1.0, {"k": 2}]}}', {"x": True, "l": [1, {"k": 2}]}, None, True, True),
    ('{"name": "f", "arguments": {"x": 2}}', {"x": 1}, {"x": [1, 2], "y": ["u", ""]}, True, True),
    ('{"name": "f", "arguments": {"y": "u"}}', {"x": 1}, {"x": [1, 2], "y": ["u", ""]}, True, False),
    ('{"name": "f", "arguments": {"x": 1, "z": 1}}', {"x": 1}, {"x": [1]}, True, False),
    ("no json", {}, None, False, False), (None, {}, None, False, False)])
def test_grade(text, gold, accept, name, call):
    sample = {"call": {"name": "f", "arguments": gold}, **({"accept": accept} if accept else {})}
    assert ttsi.grade(text, sample) == {"name": name, "call": call}


def test_summary_by_hand():
    row = lambda i, direct, ttsi_, first, cost, **more: {"id": i, "error": "", "cost": cost, "scores": {
        "direct": {"name": direct, "call": direct}, "ttsi": {"name": ttsi_, "call": ttsi_}, "first": first}, **more}
    base = {"prefill": (1.0, 10), "score": (0.5, 5), "direct": (1.0, 10)}
    rows = [row("a", False, True, True, base | {"train": (4.0, 40), "answer": (2.0, 20), "trace": (9.0, 9)}, adapted="",
                drafts=[{"verdict": "kept"}, {"verdict": "wrong type"}]),
            row("b", True, True, False, base), row("c", True, False, False, base | {"train": (2.0, 20)}, adapted=""),
            row("e", False, True, False, base), dict(row("d", False, False, False, {}), error="too long")]
    s = ttsi.summarise(rows)
    assert (s["n"], s["labelled"], s["adapted"], s["wins"], s["losses"], s["difference"]) == (5, 5, 2, 2, 1, 20.0)
    assert (s["always_first"], s["direct"]["call"], s["ttsi"]["call"]) == (20.0, 40.0, 60.0)
    assert s["direct"]["seconds"] == 2.0 and s["direct"]["tokens"] == 20, "over those that were answered"
    assert s["ttsi"]["seconds"] == pytest.approx((7.5 + 2.5 + 3.5 + 2.5) / 4), "without the answers made for comparison, or a trace"
    assert s["verdicts"] == {"kept": 1, "wrong type": 1} and s["failed"] == {"d": "too long"}
    assert s["cost"]["tokens"]["direct"] == 5.0 and s["cost"]["tokens"]["train"] == 15.0, "a stage's cost is a mean over all that were answered"
    assert sum(s["cost"]["tokens"].values()) == s["ttsi"]["tokens"] and list(s["cost"]["seconds"]) == list(ttsi.STAGES)
    text = ttsi.table(s, ttsi.Config())
    assert "tokens per sample: prefill 10, score 5, generate 0, train 15, answer 5, direct 5" in text
    assert "+20.0 [" in text and "2/5" in text and "counted as wrong: d: too long" in text and "(2.0x)" in text


@pytest.mark.parametrize("error", ["", "too long"])
def test_a_table_without_labels_or_direct_answers(error):
    row = {"id": "a", "error": error, "cost": {} if error else {"prefill": (1.0, 10), "answer": (2.0, 20)}, "adapted": ""}
    assert "1/1" in ttsi.table(ttsi.summarise([row]), ttsi.Config())


def test_interval():
    assert ttsi.interval([1, 1, 1]) == [1, 1]
    low, high = ttsi.interval([1] * 50 + [0] * 50)  # normal approximation: 0.5 +- 1.96 * 0.5 / 10
    assert low == pytest.approx(0.402, abs=0.02) and high == pytest.approx(0.598, abs=0.02)


# ------------------------------------------------------------------------------------------------ prompts

SYSTEMLESS = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}[{{ m.content }}]{% endfor %}>"
DROPPING = "{% for m in messages if m.role != 'system' %}[{{ m.content | trim }}]{% endfor %}>"


@pytest.mark.parametrize("template", [SYSTEMLESS, DROPPING, None])
def test_templates_without_a_system_role(tok, template):
    tok = copy.deepcopy(tok)
    tok.chat_template = template
    text, head = ttsi.render(tok, "SYSTEM", "USER")
    assert text[:head].endswith("SYSTEM") and text.count("USER") == 1 and text.index("USER") > head


def test_a_template_that_drops_the_request_is_an_error(tok):
    tok = copy.deepcopy(tok)
    tok.chat_template = "{{ messages[0].content[:3] }}"
    with pytest.raises(ttsi.InputError, match="template"):
        ttsi.render(tok, "SYSTEM", "USER")


def test_a_dialogue_becomes_a_transcript():
    call = {"name": "find", "arguments": {"q": 1}}
    text = ttsi.user_text([{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": [
        {"type": "function", "function": call}]}, {"role": "tool", "content": "none"}, {"role": "user", "content": "so?"}])
    assert text == 'user: hi\ncall: {"name": "find", "arguments": {"q": 1}}\ntool: none\nuser: so?'


# ------------------------------------------------------------------------------------------------ command line

TOOLS = '"tools": [{"name": "f", "parameters": {"properties": {}}}]'


@pytest.mark.parametrize("line,complaint", [
    ("{", "not JSON"), ("[]", "found a list"), ('{"x": ' + "[" * 100 + "]" * 100 + "}", "nested more than 100 deep"), ('{"query": NaN}', "NaN"), ('{"query": "\\ud800"}', "surrogate"),
    ("{" + TOOLS + "}", "no request"), ('{"query": " ", ' + TOOLS + "}", "no request"),
    ('{"messages": [{"role": "user", "content": [1]}], ' + TOOLS + "}", "no request"), ('{"query": "q"}', "no tools"),
    ('{"query": "q", "tools": [{}]}', "a tool must be"),
    ('{"query": "q", "tools": [{"name": "f"}, {"name": "f"}]}', "offered twice"),
    ('{"query": "q", "tools": [{"name": "f", "parameters": {"properties": [1]}}]}', "a tool must be"),
    ('{"query": "q", ' + TOOLS + ', "call": {"name": "g", "arguments": {}}}', "one of the tools"),
    ('{"query": "q", ' + TOOLS + ', "call": "f"}', '"call" must be'),
    ('{"query": "q", ' + TOOLS + ', "call": {"name": "f", "arguments": "{"}}', "not JSON"),
    ('{"query": "q", ' + TOOLS + ', "accept": {"x": 1}}', '"accept" must be'),
    ('{"id": 1, "query": "q", ' + TOOLS + "}", "ids must differ")])
def test_every_bad_line_is_named(tmp_path, line, complaint):
    good = '{"query": "q", ' + TOOLS + ', "call": {"name": "f", "arguments": "{}"}}'
    path = tmp_path / "x.jsonl"
    path.write_text("\ufeff" + good + "\r\n\n" + line + "\n{\n")
    with pytest.raises(ttsi.InputError) as e:
        ttsi.read_jsonl(path, ttsi.to_sample)
    first, second = str(e.value).splitlines()
    assert first.startswith(f"{path}:3: ") and complaint in first and second.startswith(f"{path}:4: ")


@pytest.mark.parametrize("argv,complaint", [
    (["--model", "/no/such"], "--model /no/such: cannot be loaded"), (["--data", "/no/such"], "/no/such: cannot be read"),
    (["--k", "0"], "--k 0: must be"), (["--tau", "nan"], "--tau nan: must be"), (["--select", "some"], "invalid choice"),
    (["--lora_rank", "x"], "invalid int"), (["--nonsense"], "unrecognized"), (["--trace", "zzz"], "no sample has the id zzz"),
    (["--pairs", str(HERE / "data/demo.jsonl")], "no pairs for any sample"), (["--teacher", "/no/such"], "--teacher /no/such: cannot be loaded"), (["--output", "/"], "--output /: cannot be used"), (["--output", "/proc/x.jsonl"], "--output /proc/x.jsonl: cannot be used"), (["--output", "/proc/x/y.jsonl"], "--output /proc/x/y.jsonl: cannot be used"), (["--device", "abacus"], "cannot be loaded on abacus")])
def test_bad_flags_are_told_in_one_line(argv, complaint):
    with pytest.raises(ttsi.InputError) as e:
        quiet(*argv)
    assert complaint in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("argv", [["--k", "0"], pytest.param(["--model", "/no/such"], marks=slow)])
def test_bad_input_ends_with_exit_code_2_and_no_traceback(argv):
    done = subprocess.run([sys.executable, str(HERE / "ttsi.py"), *argv], capture_output=True, text=True,
                          env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith(f"ttsi: {' '.join(argv)}: ") and done.stderr.count("\n") == 1


def test_flags():
    flags = ttsi.parse_flags(["--paper", "--max_new_tokens=9", "--no-shuffle", "--epochs", "2"])
    stated = dict(tau=0.95, k=1, drafts=1, attempts=1, check=False, lora_rank=8, lora_alpha=16.0, optimizer="adamw",
                  lr=1e-4, adapt="full", epochs=2, max_new_tokens=9, shuffle=False)
    assert dataclasses.asdict(flags).items() >= stated.items()
    with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()) as text:
        ttsi.parse_flags(["-h"])
    options = text.getvalue().split("\noptions:")[1].split("--paper stands for")[0]
    assert all("  --" + f.name.replace("_", "-") in options for f in dataclasses.fields(ttsi.Config))


def quiet(*argv):
    with contextlib.redirect_stdout(io.StringIO()) as text:
        summary = ttsi.main([str(a) for a in argv])
    return summary, text.getvalue()


def timeless(path):
    return [{k: v for k, v in json.loads(line).items() if k != "cost"} for line in path.read_text().splitlines()]


BRIEF = ("--limit", 7, "--batch-size", 3, "--attempts", 1, "--drafts", 1, "--epochs", 2, "--max-new-tokens", 24)
SHORT = ("--limit", 7, "--batch-size", 3, "--attempts", 1, "--drafts", 2, "--epochs", 3, "--max-new-tokens", 56)


def test_output_resumes_after_any_cut_and_refuses_other_settings(tmp_path):
    path = tmp_path / "new" / "run.jsonl"
    summary, text = quiet(*BRIEF, "--output", path)
    whole, raw = timeless(path), path.read_bytes()
    assert [r["id"] for r in whole] == [f"demo-{i:03d}" for i in range(7)]
    assert json.loads((tmp_path / "new/run.summary.json").read_text())["n"] == summary["n"] == 7
    ends = [i + 1 for i, byte in enumerate(raw) if byte == 10]
    for cut in (0, ends[0], ends[2] - 1, ends[2], ends[3] + 10, ends[5]):
        path.write_bytes(raw[:cut])
        quiet(*BRIEF, "--output", path)
        assert timeless(path) == whole, f"cut at {cut}: other rows than an uninterrupted run"
        kept = 0 if cut < ends[2] else ends[2] if cut < ends[5] else ends[5]
        assert path.read_bytes()[:kept] == raw[:kept], "finished batches were done again"
    with pytest.raises(ttsi.InputError, match="begun with tau = 0.95, not 0.5"):
        quiet(*BRIEF, "--output", path, "--tau", 0.5)
    with pytest.raises(ttsi.InputError, match="--trace"):
        quiet(*BRIEF, "--output", path, "--trace", "demo-050")
    assert path.read_bytes()[:ends[2]] == raw[:ends[2]], "a refused run must not touch the file"
    path.write_bytes(raw[ends[0]:] + b'{"foo": 1}\n')
    with pytest.raises(ttsi.InputError, match="its rows are not those of"):
        quiet(*BRIEF, "--output", path)


def test_a_row_lets_a_reader_check_the_decision(tmp_path):
    path = tmp_path / "run.jsonl"
    quiet(*SHORT, "--output", path)
    for row in timeless(path):
        p = sorted((math.exp(c["logp"]) for c in row["candidates"]), reverse=True)
        assert row["margin"] == pytest.approx((p[0] - p[1]) / sum(p), abs=1e-6)
        assert ("drafts" in row) == (row["margin"] < 0.95)
        assert ("adapted" in row) == bool(row.get("pairs")) and row["decision"].startswith("adapted") == ("adapted" in row)
        assert row["call"] == ttsi.parse(row.get("adapted", row["direct"]))


def test_trace_tells_the_whole_story(tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"id": "demo-003", "pairs": [{"request": "another one", "call": {"name": "f", "arguments": "{}"}}]}))
    _, text = quiet("--trace", "demo-003", "--select", "all", "--pairs", pairs, "--no-check")
    parts = ["-- The prompt", "<|user|>", "-- H:", "log P", "adapted", "tau 0.95", "-- G:", "<|user|>", "-> kept", "-- T:",
             "another one", "step 5: loss", "log P", "-- The answer", "before:", "after:", "-- The label", "before:", "after:"]
    for part in parts:
        assert part in text, f"{part} is missing, or out of the algorithm's order; the label comes last"
        text = text[text.index(part) + len(part):]


def test_trace_without_a_pair():
    _, text = quiet("--trace", "demo-003", "--select", "all", "--attempts", 1, "--max-new-tokens", 5)
    parts = ["-- The prompt", "<|user|>", "-- H:", "log P", "tau 0.95", "-- G:", "-> ", "-- The answer", "before:", "after:", "-- The label"]
    places = [text.index(p) for p in parts]
    assert places == sorted(places), "the steps come in the algorithm's order, the label last"


def test_pairs_come_from_a_file_or_from_another_run(tmp_path):
    first = tmp_path / "first.jsonl"
    quiet(*SHORT, "--select", "all", "--output", first)
    _, text = quiet(*SHORT, "--select", "all", "--pairs", first, "--output", tmp_path / "second.jsonl")
    for a, b in zip(timeless(first), timeless(tmp_path / "second.jsonl")):
        assert (a["pairs"], a.get("adapted")) == (b["pairs"], b.get("adapted"))


def test_the_demo_shows_every_step(embedded):
    model, tok = embedded
    samples = list(ttsi.read_jsonl(HERE / "data/demo.jsonl", ttsi.to_sample).values())
    assert len(samples) == 100
    cfg = ttsi.Config()
    rows = [ttsi.finish(x, s, cfg) for x, s in zip(ttsi.tt_si(model, tok, samples[:40], cfg), samples)]
    right = [r["margin"] for r in rows if r["scores"]["direct"]["name"]]
    wrong = [r["margin"] for r in rows if not r["scores"]["direct"]["name"]]
    assert right and wrong and sum(right) / len(right) > sum(wrong) / len(wrong), "margins must be lower on wrong answers"
    assert sum("adapted" in r for r in rows) >= 5, "drafts are accepted for many uncertain samples"


# ------------------------------------------------------------------------------------------------ world and experiments

@pytest.fixture(scope="session")
def world():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(HERE / "data"), *sys.path])
        import world
    return world


@pytest.fixture
def lab(world, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(HERE / "data"), *sys.path])
    import experiments
    lab = experiments.Lab(argparse.Namespace(model=ttsi.Config.model, data=str(HERE / "data/demo.jsonl"), limit=6, flags="",
                                             quick=True, teacher=str(HERE / "data/teacher")))
    lab.runs = tmp_path
    return experiments, lab


def test_the_splits_are_what_the_generator_writes(world):
    for split, n in world.FILES.items():
        lines = (HERE / f"data/{split}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == list(world.records(split, n, 1, 0)), "world and splits are frozen"


def rare(world, request, call):
    verb, noun = call["name"].split("_")
    return [any(re.search(rf"\b{w}\b", request) for w in table[word][world.RARE])
            for table, word in ((world.VERBS, verb), (world.NOUNS, noun))]


def test_training_never_answers_a_rare_wording(world):
    r = random.Random(0)
    for _ in range(300):
        tools = world.offer(r, "train", 5)
        assert rare(world, *world.answer_pair(r, tools[0])) == [False, False]
        assert rare(world, *world.answer_pair(r, tools[0], shifted=True))[0], "a shifted item words its verb rarely"
    written = [world.draft_triple(r, world.offer(r, "train", 5)) for _ in range(300)]
    assert .3 < sum(rare(world, request, call)[0] for _, call, request in written) / 300 < .8, "writing does use them"


def test_what_is_written_does_not_depend_on_the_seeds_tool(world):
    r, same = random.Random(0), 0
    for _ in range(1000):
        tools = world.offer(r, "train", 4)
        seed, call, _ = world.draft_triple(r, tools)
        said = [t["function"]["name"] for t in tools if any(re.search(rf"\b{w}\b", seed)
                for ws in world.VERBS[t["function"]["name"].split("_")[0]] for w in ws)]
        same += call["name"] in said[:1]
    assert abs(same / 1000 - .25) < .05, "one of four tools by chance (3.6 standard deviations)"


def test_training_goes_on_where_it_was_stopped(world, tmp_path, monkeypatch):
    monkeypatch.setattr(world, "evaluate", lambda *_: "")
    tok, weights = world.build_tokenizer(), []
    for minutes in (0, 1e-9):  # at once, or stopped after every step
        args = argparse.Namespace(seed=0, steps=3, minutes=minutes, hidden=32, layers=1, ff=32, lr=3e-3, muon=.02,
                                  tied=False, bf16=False, teacher=False, compile=False, threads=2, checkpoint=tmp_path / str(minutes))
        args.checkpoint.mkdir()
        for left in range(args.steps if minutes else 1):
            with pytest.raises(SystemExit) if minutes else contextlib.nullcontext():
                world.train(args, tok)
        weights.append(torch.load(args.checkpoint / "state.pt", weights_only=True)["model"])
    assert all(torch.equal(weights[1][k], v) for k, v in weights[0].items())


def test_a_stream_of_requests_to_one_agent_reads_its_tools_once(tmp_path):
    samples = [json.loads(line) for line in (HERE / "data/demo.jsonl").read_text().splitlines()[:4]]
    for s in samples[1:]:
        s["tools"] = samples[0]["tools"]
        del s["call"]
    data = tmp_path / "agent.jsonl"
    data.write_text("".join(json.dumps(s) + "\n" for s in samples))
    outputs = {}
    for size in (1, 4):
        outputs[size] = tmp_path / f"{size}.jsonl"
        quiet("--data", data, "--batch-size", size, "--output", outputs[size], "--max-new-tokens", 64)
    alone, together = ([json.loads(line) for line in open(path)] for path in outputs.values())
    first, *later = [row["cost"]["prefill"][1] for row in alone]
    assert max(later) < 0.4 * first, "the tools of the sample before are read again"
    assert sum(row["cost"]["prefill"][1] for row in together) < 1.5 * (first + sum(later)), "one list, read twice"
    for a, b in zip(alone, together):
        assert a["margin"] == pytest.approx(b["margin"], abs=1e-3) and a["answer"] == b["answer"] and a.get("pairs") == b.get("pairs")


def test_gating_afterwards_equals_a_gated_run(lab):
    experiments, lab = lab
    both = lab.run(0, "--select all")
    for rows, flags in ((experiments.uncertain(both), ""), (experiments.certain(both), "--select certain")):
        run = lab.run(0, flags)
        assert [r["scores"] for r in rows] == [r["scores"] for r in run]
        a, b = ttsi.summarise(rows), ttsi.summarise(run)
        assert (a["adapted"], a["verdicts"], a["ttsi"]["call"]) == (b["adapted"], b["verdicts"], b["ttsi"]["call"])


def test_every_tau_equals_gated_runs_and_their_complements(lab):
    experiments, lab = lab
    both = lab.run(0, "--select all")
    both[1] |= {"scores": {side: {"name": False, "call": False} for side in ("direct", "ttsi")} | {"first": False}}
    del both[1]["margin"]  # as if it had not been answered
    listed = ttsi.every_tau(both)
    for tau in (0.0, 0.3, 0.7, 0.95, 0.999, 1.5):
        e = next(e for e in listed if e["tau"] >= tau)
        chosen, others = (ttsi.summarise(f(both, tau)) for f in (experiments.uncertain, experiments.certain))
        assert e["call"] == pytest.approx(chosen["ttsi"]["call"]) and e["adapted"] == sum(
            "adapted" in r and r.get("margin", 2) < tau for r in both)
        assert e["certain_only"] == pytest.approx(others["ttsi"]["call"])
    assert ttsi.every_tau([]) == [] and listed[-1]["adapted"] >= 4


def test_votes_and_pass_at_n_by_hand(lab, monkeypatch):
    experiments, lab = lab
    name = lambda n: json.dumps({"name": n, "arguments": {"a": 12.0}})
    texts = ["no call", name("g"), name("f"), json.dumps({"name": "f", "arguments": {"a": " 12"}}), name("g")]
    monkeypatch.setattr(experiments, "sampled", lambda lab, *_: {"demo-000": {"texts": texts, "cost": [2.0, 30]},
                                                                 "demo-001": {"texts": ["no call"] * 5, "cost": [2.0, 30]},
                                                                 "demo-002": {"texts": texts[2:] + texts[1:2], "cost": [2.0, 30]}})
    samples = [dict(s, call={"name": "f", "arguments": {"a": 12}}) for s in lab.samples(lab.config(0))]
    monkeypatch.setattr(lab, "samples", lambda cfg: samples)
    first, second, third = experiments.majority(lab, 0, 1.0)[:3]
    texts_of_third = texts[2:] + texts[1:2]  # f, f, g, g: the first; with one more g, that
    assert third["adapted"] == texts_of_third[0] and experiments.most_frequent(texts_of_third + [name("g")], None) == name("g")
    assert first["adapted"] == name("g"), "two votes each: the call that came first"
    assert second["adapted"] == "" and not second["scores"]["ttsi"]["call"] and first["cost"]["votes"] == [2.0, 30]
    best = experiments.any_of(lab, 0, 1.0)
    assert [r["scores"]["ttsi"]["call"] for r in best[:2]] == [True, False]
    assert experiments.distinct([texts[2], texts[1], texts[3], "x"]) == [texts[2], texts[1], "x"]


def test_sampled_answers_become_the_direct_one_without_temperature(lab):
    experiments, lab = lab
    drawn, direct = experiments.sampled(lab, 0, 1e-4), lab.run(0, "--method direct")
    assert all(t == row["direct"] for row in direct for t in drawn[row["id"]]["texts"])
    scored = experiments.by_answer(lab, 0, 1e-4)
    assert all(0 < p <= 1 and margin == 1 for p, margin in scored.values()), "one distinct call has no runner-up"


def test_one_adapter_for_all_starts_as_the_base_and_learns(lab):
    experiments, lab = lab
    untouched = digest(lab.batches(lab.config(0))[0])
    direct = lab.run(0, "--method direct")
    still, trained = (experiments.fine_tuned(lab, 0, True, 100, lr) for lr in (0.0, 3e-3))
    assert [r["adapted"] for r in still] == [r["direct"] for r in direct] != [r["adapted"] for r in trained]
    assert trained[0]["once"]["labels"] == 16 and trained[0]["once"]["tokens"] > 2 * 10 * 16 * 100, "ten epochs, two passes"
    assert digest(lab.batches(lab.config(0))[0]) == untouched


def test_a_kept_adapter_begins_as_the_temporary_one(lab):
    experiments, lab = lab
    kept, fresh = experiments.stream(lab, 0, 0.1), lab.run(0, "--select all")
    at = next(i for i, r in enumerate(fresh) if r["margin"] < .95 and r["pairs"])
    assert kept[at]["adapted"] == fresh[at]["adapted"] and kept[at]["trained"], "nothing was learned before"
    assert [r["adapted"] for r in kept[:at]] == [r["direct"] for r in fresh[:at]]
    moved = [abs(a["margin now"] - b["margin"]) > 1e-4 for a, b in zip(kept, fresh)]
    assert not any(moved[:at + 1]) and any(moved[at + 1:]), "what was learned is gone"
    assert [r["adapted"] for r in experiments.stream(lab, 0, 0.0)] == [r["direct"] for r in fresh]


def test_round_trips_part_the_drafts(lab):
    experiments, lab = lab
    alike, otherwise = (experiments.round_trip(lab, 0, agree) for agree in (True, False))
    for row, a, b in zip(lab.run(0), alike, otherwise):
        passed = [json.dumps(d["pair"]) for d in row.get("drafts", []) if d["pair"]]
        halves = [[json.dumps(d["pair"]) for d in r.get("drafts", []) if d["pair"]] for r in (a, b)]
        assert sorted(halves[0] + halves[1]) == sorted(passed), "each draft is in one of the two"
    model, tok, _ = lab.batches(lab.config(0))
    row, sample = next((r, s) for r, s in zip(alike, lab.samples(lab.config(0))) if r.get("pairs"))
    x = ttsi.tt_si(model, tok, [dict(sample, messages=[{"role": "user", "content": row["pairs"][0]["request"]}])],
                   ttsi.Config(method="direct"))[0]
    assert ttsi.parse(x["direct"]) == row["pairs"][0]["call"], "the model answers what it wrote"


def test_who_is_adapted(lab):
    experiments, lab = lab
    n = sum("adapted" in r for r in experiments.uncertain(lab.run(0, "--select all")))
    assert 0 < sum("adapted" in r for r in experiments.a_random_subset(lab, 0)) == n < 6
    dev = sorted(r["margin"] for r in map(json.loads, open(lab.path(0, f"--method direct --limit 0 --data {HERE}/data/dev.jsonl"))))
    third = sum(r["margin"] < dev[len(dev) // 3] for r in lab.run(0, "--select all"))
    assert sum("adapted" in r for r in experiments.within_budget(lab, 0, 1 / 3)) == third
    own = experiments.the_item_itself(lab, 0)
    gold = {s["id"]: s["call"] for s in lab.samples(lab.config(0))}
    assert all(r["pairs"][0]["call"] == gold[r["id"]] for r in own if "adapted" in r) and ttsi.supplied.__module__ == "ttsi"


def test_doses_are_nested(lab):
    experiments, lab = lab
    rows = {share: experiments.dose(lab, 0, share) for share in (0, 50, 100)}
    same = lambda a, b: sum(x == y for x, y in zip(rows[a], rows[b]))
    assert rows[100] == lab.run(0) and (same(50, 100), same(0, 50), same(0, 100)) == (3, 3, 0)
    assert all(r["scores"]["direct"]["call"] for r in rows[0]), "unshifted items are answered"


def test_controls_do_what_their_names_say(lab):
    experiments, lab = lab
    written = lab.run(0, "--select all")
    assert [r["pairs"] for r in experiments.others_pairs(lab, 0)] == [r["pairs"] for r in written[1:] + written[:1]]
    for before, row in zip(lab.run(0, "--select all"), experiments.nearest(lab, 0, "--select all")):
        named = before["candidates"], before["pairs"][0]["call"]["name"]
        gold = next(s for s in ttsi.read_jsonl(lab.args.data, ttsi.to_sample).values() if s["id"] == row["id"])["call"]
        assert row["scores"]["ttsi"]["name"] == (named[1] == gold["name"]) and "train" not in row["cost"]


def test_variants_of_training_are_those_of_their_names(lab):
    experiments, lab = lab
    ours = ttsi.pair_tokens
    shuffled = experiments.reshuffled(lab, 0)
    assert ttsi.pair_tokens is ours, "a patch outlived its run"
    full, suffix = lab.run(0, f"--adapt full --pairs {lab.path(0)}"), lab.run(0)
    assert [r.get("pairs") for r in shuffled] == [r.get("pairs") for r in full] == [r.get("pairs") for r in suffix]
    losses = [(a["loss"][0], b["loss"][0]) for a, b in zip(shuffled, full) if "loss" in a]
    assert losses and any(abs(a - b) > 1e-4 for a, b in losses), "the tools were not reshuffled"
    difference = ttsi.summarise(experiments.against(suffix, full))["difference"]
    assert difference == pytest.approx(ttsi.summarise(suffix)["ttsi"]["call"] - ttsi.summarise(full)["ttsi"]["call"])


def test_the_bench_measures_every_stage(monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [str(HERE / "data"), *sys.path])
    import bench
    monkeypatch.setattr(bench, "DRAFT", 5)
    monkeypatch.setattr(bench, "ANSWER", 3)
    report = bench.main(["--shape", "embedded", "--rounds", "1", "--batch", "2", "--json"])
    assert json.loads(capsys.readouterr().out)["rows"].keys() == report["rows"].keys() >= {
        "direct", "certain", "uncertain, suffix", "uncertain, full", "H, after the prompt", "T, full", "T, floor of full"}
    assert all(row["seconds"] > 0 for row in report["rows"].values()) and len(report["targets"]) in (4, 6)
    assert bench.over([2, 4, 8, 6], [1, 1, 2, 2]) == (5 / 1.5, 3, 3.5, 4) and bench.over([1, 2, 9], [1, 1, 1]) == (2, 1, 2, 9)
    keep = ttsi.tt_si
    monkeypatch.setattr(ttsi, "tt_si", lambda *args, **kw: [x for x in keep(*args, **kw) if x["cost"].pop("train", 1)])
    if os.environ.get("SLOW"):
        with pytest.raises(AssertionError):
            bench.main(["--shape", "embedded", "--rounds", "1"])


def test_no_tensor_outlives_its_batch(embedded):
    model, tok = embedded
    cfg, memory, alive = ttsi.Config(select="all", max_new_tokens=48, attempts=1), [], []
    sample = next(iter(ttsi.read_jsonl(HERE / "data/demo.jsonl", ttsi.to_sample).values()))
    for i in range(4):
        ttsi.tt_si(model, tok, [dict(sample, id=str(i))], cfg, memory=memory)
        gc.collect()
        alive.append(sum(t.numel() for t in gc.get_objects() if type(t) is torch.Tensor))
    assert alive[1] == alive[2] == alive[3], "of a batch, only the last tool list stays"


def test_what_is_computed_for_real_models_stands_in_the_readme(monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [str(HERE / "data"), *sys.path])
    import bench
    report = bench.main(["computed"])
    assert capsys.readouterr().out in (HERE / "README.md").read_text(), "run `python data/bench.py computed`"
    small = report["qwen2.5-0.5b, laptop GPU, bfloat16"]  # by hand: 494 M parameters, 2 bytes each
    assert small["direct"] == pytest.approx(2 * 494e6 * 581 / 10e12 + 30 * 2 * 494e6 / 250e9, rel=.01)


@slow
def test_the_bench_of_batching(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [str(HERE / "data"), *sys.path])
    import bench
    data = tmp_path / "few.jsonl"
    data.write_text("".join((HERE / "data/demo.jsonl").open().readlines()[:10]))
    report = bench.main(["batching", "--rounds", "1", "--items", "50", "--data", str(data)])
    assert len(report["MB in use"]) == 2 and report["peak MB"][50] > report["peak MB"][1]
    assert "| 25 | " in capsys.readouterr().out


def test_statistics_of_the_tables(lab):
    experiments, _ = lab
    assert experiments.signs(5, 0) == experiments.signs(0, 5) == 2 / 32 and experiments.signs(3, 3) == 1
    assert experiments.signs(7, 2) == pytest.approx(2 * (1 + 9 + 36) / 512)
    r, values = random.Random(0), [i // 3 / 9 for i in range(30)]
    right = [r.random() < .5 for _ in values]
    pairs = [(a > b) + (a == b) / 2 for a, x in zip(values, right) for b, y in zip(values, right) if x and not y]
    assert ttsi.auroc(values, right) == pytest.approx(sum(pairs) / len(pairs)), "of all pairs, ties by half"
    assert ttsi.auroc([.9, .5, .5, .1], [1, 1, 0, 0]) == (1 + 1 + .5 + 1) / 4 and ttsi.auroc([1], [1]) is None


def test_the_tables_are_those_of_the_results(lab):
    experiments, _ = lab
    blocks = {block[:2]: block[2] for readme in ("README.md", "data/README.md") for block in re.findall(
        r"<!-- table (\S+) (\S+) -->\n(.*?)<!-- end -->", (HERE / readme).read_text(), re.S)}
    found = {stem: experiments.results(stem) for stem in ("test", "dev")}
    drawn = experiments.figures("test", found["test"])
    for (stem, group), text in blocks.items():
        if group == "findings":
            assert text == drawn["findings"], "run `python data/experiments.py`"
            continue
        _, show = experiments.SHOW.get(group, (None, experiments.markdown))
        assert text == show(found[stem][group]), f"run `python data/experiments.py {group}` on {stem}"
        assert list(found[stem][group]) == [label for label, *_ in experiments.GROUPS[group][2]], "a row is missing"
    assert blocks.keys() == {(stem, group) for stem in found for group in found[stem]} | {("test", "findings")}
    for name, text in drawn.items():
        assert name == "findings" or (HERE / "data/results" / name).read_text() == text, f"{name} shows other numbers"


@slow
def test_all_experiments_run_quickly(world, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [str(HERE / "data"), *sys.path])
    import experiments
    before = {f: f.read_bytes() for f in (*(HERE / "data/results").iterdir(), HERE / "README.md", HERE / "data/README.md")}
    experiments.main(["--quick", "--limit", "4"])
    text = capsys.readouterr().out
    labels = [label for g, (*_, rows) in experiments.GROUPS.items() if g not in experiments.TUNING for label, *_ in rows]
    assert all(f"\n{label}: " in "\n" + text for label in labels) and "left out" not in text
    assert all(f.read_bytes() == was for f, was in before.items()), "a look publishes nothing"


# ------------------------------------------------------------------------------------------------ nothing lost

KILLER = '''
import json, os, random, signal, sys, time
import torch, ttsi
torch.set_num_threads(1)
n, argv, path, r = int(sys.argv[1]), sys.argv[3:], sys.argv[2], random.Random(0)
loaded, fsync = ttsi.load(ttsi.Config()), os.fsync
ttsi.load = lambda *_: loaded
os.fsync = lambda fd: (time.sleep(.02), fsync(fd))  # so that many moments are in the middle of writing
def start():
    if not (pid := os.fork()):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1), os.dup2(1, 2)
        try:
            ttsi.main([*argv, "--output", path])
        finally:
            os._exit(0)
    return pid
def rows():
    return [{k: v for k, v in json.loads(line).items() if k != "cost"} for line in open(path)]
began = time.time()
os.waitpid(start(), 0)
whole, seconds, kills, runs = rows(), time.time() - began, 0, 0
os.remove(path)
while kills < n:
    pid = start()
    time.sleep(r.uniform(0, seconds))
    os.kill(pid, signal.SIGKILL)
    if os.WIFSIGNALED(os.waitpid(pid, 0)[1]):
        kills += 1
    else:
        assert rows() == whole, "other rows than an uninterrupted run"
        runs += 1
        os.remove(path)
os.waitpid(start(), 0)
assert rows() == whole and len(whole) > 3, "other rows than an uninterrupted run"
assert not [f for f in os.listdir(os.path.dirname(path)) if "rank" in f]
'''


def python(*argv, **more):
    return subprocess.run([sys.executable, *map(str, argv)], capture_output=True, text=True, cwd=HERE,
                          env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}, timeout=600, **more)


def test_killed_at_random_moments_a_run_goes_on(tmp_path):
    done = python("-c", KILLER, 50 if os.environ.get("SLOW") else 3, tmp_path / "run.jsonl", "--limit", 5, "--batch-size", 2,
                  "--attempts", 1, "--drafts", 1, "--max-new-tokens", 32, "--epochs", 2)
    assert done.returncode == 0, done.stderr


def test_interrupted_it_ends_with_the_table_so_far(tmp_path):
    path = tmp_path / "run.jsonl"
    run = subprocess.Popen([sys.executable, HERE / "ttsi.py", "--output", path, "--batch-size", "3"], text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not (path.exists() and path.read_bytes()):
        assert run.poll() is None, run.stderr.read()
        time.sleep(.05)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    n = len(path.read_text().splitlines())
    assert run.returncode == 130 and "Traceback" not in err and re.search(rf"^TT-SI .*/{n} ", out, re.M) and n < 100


def test_an_interrupt_in_training_leaves_the_base_as_it_was(embedded, monkeypatch):
    before, keep, count = digest(embedded[0]), ttsi.sgd, itertools.count()
    def interrupted(theta, lr):
        keep(theta, lr)
        if next(count) == 4:  # in the second batch
            raise KeyboardInterrupt
    monkeypatch.setattr(ttsi, "load", lambda *_: embedded)
    monkeypatch.setattr(ttsi, "sgd", interrupted)
    with pytest.raises(KeyboardInterrupt), contextlib.redirect_stdout(io.StringIO()) as told:
        ttsi.main([*map(str, SHORT), "--select", "all"])
    assert digest(embedded[0]) == before and not hooks(embedded[0]) and re.search(r"^TT-SI .*/3 ", told.getvalue(), re.M)


def test_rows_are_on_disk_before_the_next_batch(tmp_path, monkeypatch):
    path, keep, fsync, seen, synced = tmp_path / "run.jsonl", ttsi.tt_si, os.fsync, [], []
    def looking(model, tok, batch, *args):
        seen.append((len(timeless(path)), len(batch), path.stat().st_size in synced))
        return keep(model, tok, batch, *args)
    monkeypatch.setattr(ttsi, "tt_si", looking)
    monkeypatch.setattr(os, "fsync", lambda fd: (fsync(fd), synced.append(os.fstat(fd).st_size)))
    quiet(*BRIEF, "--output", path)
    assert seen == [(0, 3, True), (3, 3, True), (6, 1, True)], "rows there, rows to come, and no byte that was not synchronised"


def test_a_smaller_batch_goes_on_from_every_row(tmp_path, monkeypatch):
    path = tmp_path / "run.jsonl"
    quiet(*BRIEF, "--output", path)
    raw = path.read_bytes().splitlines(True)
    config = {"config": json.loads((tmp_path / "run.summary.json").read_text())["config"]}
    (tmp_path / "run.summary.json").write_text(json.dumps(config))
    path.write_bytes(b"".join(raw[:4]) + raw[4][:99])
    for size in (2, 3, 3, 2):  # back and forth, cut at once
        with monkeypatch.context() as m, pytest.raises(ZeroDivisionError):
            m.setattr(ttsi, "tt_si", lambda *_: 1 / 0)
            quiet(*BRIEF, "--output", path, "--batch-size", size)
        assert path.read_bytes().splitlines(True) == raw[:4], "a row was thrown away"
    quiet(*BRIEF, "--output", path, "--batch-size", 2)
    now = path.read_bytes().splitlines(True)
    assert now[:4] == raw[:4] and [json.loads(a)["id"] for a in now] == [json.loads(a)["id"] for a in raw]


def test_a_full_disk_ends_with_one_line_and_keeps_what_is_there(tmp_path):
    path = tmp_path / "run.jsonl"
    argv = [HERE / "ttsi.py", *BRIEF, "--output", path]
    quiet(*BRIEF, "--output", path)
    whole, raw = timeless(path), path.read_bytes()
    path.unlink()
    room = len(b"".join(raw.splitlines(True)[:4])) + 50  # for one batch and a part of the next
    done = python(*argv, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)))
    assert done.returncode == 1 and "Traceback" not in done.stderr and re.search(r"^TT-SI .*/6 ", done.stdout, re.M)
    assert done.stderr.splitlines()[-1].startswith("ttsi: [Errno 27] File too large; rows that are there stay")
    assert [json.loads(line)["id"] for line in path.read_bytes().splitlines()[:3]] == [r["id"] for r in whole[:3]]
    quiet(*BRIEF, "--output", path)
    assert timeless(path) == whole and sorted(f.name for f in tmp_path.iterdir()) == ["run.jsonl", "run.summary.json"]


def test_a_file_is_replaced_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "x"
    ttsi.save(path, ["one", "two"])
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as m, pytest.raises(OSError, match="No space left"):
        m.setattr(os, "fsync", full)
        ttsi.save(path, ["three"])
    assert path.read_bytes() == b"one\ntwo\n", "neither the old nor the new file is there"
    ttsi.save(path, ["three"])
    ttsi.save(path, ["four"], "a")
    assert path.read_bytes() == b"three\nfour\n" and list(tmp_path.iterdir()) == [path]


def test_a_vanished_directory_ends_with_one_line_and_the_table(embedded, tmp_path, monkeypatch):
    path, keep, told, before = tmp_path / "new/run.jsonl", ttsi.tt_si, io.StringIO(), digest(embedded[0])
    monkeypatch.setattr(ttsi, "load", lambda *_: embedded)
    def vanishing(model, tok, batch, *args):
        shutil.rmtree(tmp_path / "new") if batch[0]["id"] == "demo-003" else None
        return keep(model, tok, batch, *args)
    monkeypatch.setattr(ttsi, "tt_si", vanishing)
    with pytest.raises(OSError, match="No such file or directory: .*new/run.jsonl"), contextlib.redirect_stdout(told):
        ttsi.main([*map(str, BRIEF), "--output", str(path)])
    assert re.search(r"^TT-SI .*/6 ", told.getvalue(), re.M) and digest(embedded[0]) == before, "what was computed is lost"


def as_ranks(monkeypatch, world, *argv):
    for rank in range(world):
        with monkeypatch.context() as m:
            m.setenv("RANK", str(rank))
            m.setenv("WORLD_SIZE", str(world))
            assert "TT-SI" not in quiet(*argv)[1], "no table of a part"


def test_ranks_share_the_batches_and_one_process_merges_their_rows(tmp_path, monkeypatch):
    path, one = tmp_path / "run.jsonl", tmp_path / "one.jsonl"
    argv, ids = (*BRIEF, "--output", path), lambda name: [r["id"][-1] for r in timeless(tmp_path / name)]
    with pytest.raises(ttsi.InputError, match="give --output"):
        as_ranks(monkeypatch, 2, *BRIEF)
    quiet(*BRIEF, "--output", one)
    as_ranks(monkeypatch, 2, *argv)
    assert ids("run.rank0of2.jsonl") == list("0126") and ids("run.rank1of2.jsonl") == list("345") and not path.exists()
    (tmp_path / "run.rank1of2.jsonl").write_bytes((tmp_path / "run.rank1of2.jsonl").read_bytes()[:-9])  # as if cut
    as_ranks(monkeypatch, 3, *argv)
    assert [ids(f"run.rank{i}of3.jsonl") for i in range(3)] == [list("012"), list("345"), list("6")], "one was done again"
    with pytest.raises(ttsi.InputError, match="begun with tau = 0.95, not 0.5"):
        as_ranks(monkeypatch, 2, *argv, "--tau", 0.5)
    monkeypatch.setattr(ttsi, "tt_si", lambda *_: 1 / 0)  # nothing is run again
    monkeypatch.setattr(ttsi, "load", lambda *_: 1 / 0)
    summary, text = quiet(*argv)
    assert timeless(path) == timeless(one) and re.search(r"^TT-SI .*/7 ", text, re.M)
    assert sorted(f.name for f in tmp_path.glob("run.*")) == ["run.jsonl", "run.summary.json"] and summary["n"] == 7


@slow
def test_torchrun(tmp_path):
    argv = [HERE / "ttsi.py", *BRIEF, "--output", tmp_path / "run.jsonl"]
    for n in (2, 3):
        assert python("-m", "torch.distributed.run", f"--nproc-per-node={n}", *argv).returncode == 0
    assert len(list(tmp_path.glob("run.rank?of?.jsonl"))) == 5
    done = python(*argv)
    assert done.returncode == 0 and re.search(r"^TT-SI .*/7 ", done.stdout, re.M) and "samples of" not in done.stdout
    quiet(*BRIEF, "--output", tmp_path / "one.jsonl")
    for a, b in zip(timeless(tmp_path / "run.jsonl"), timeless(tmp_path / "one.jsonl")):
        assert (a["id"], a["call"], a.get("pairs")) == (b["id"], b["call"], b.get("pairs"))


# hostile input: a seed makes a case; 1,000 cases with SLOW=1

WORDS = ["", " ", "\0", "\x1b[2J", "a\nb", 'q"u\\o.t/e', "x" * 10000, "\ud800", "\u2028", "<|user|>", "{", "é", "../../etc"]


def strange(r):
    return r.choice([None, True, False, 0, -1, 10 ** 300, 1e308, float("nan"), float("inf"), *r.choices(WORDS, k=4), [], {}, [[]],
                     {"": None}, {"name": r.choice(WORDS)}, r.choices(WORDS, k=3), {"$ref": "#"}])


def places(value, at=()):
    yield at
    for key, v in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(v, (*at, key))


def mutated(r, value):
    for _ in range(r.randint(1, 3)):
        *path, key = r.choice([p for p in places(value) if p] or [("",)])
        parent = functools.reduce(lambda v, k: v[k], path, value)
        if (how := r.random()) < .6 and parent:
            parent[key] = strange(r)
        elif how < .8 and parent:
            del parent[key]
        elif isinstance(parent, list):
            parent += copy.deepcopy(parent[:1]) * 3
        else:
            parent[r.choice(WORDS)] = strange(r)
    return value


def garbled(r, data):
    for _ in range(r.randint(1, 4)):
        i, j = sorted(r.choices(range(len(data) + 1), k=2))
        data = r.choice([data[:i] + bytes(r.choices(range(256), k=3)) + data[i:], data[:i] + data[i + 5:], data[:j] + data[i:], data[:i]])
    return data


def a_record(r):
    record = json.loads(r.choice((HERE / "data/demo.jsonl").read_text().splitlines()))
    text, depth = json.dumps(record)[:-1], r.choice([50, 90, 100, 200, 900, 5000, 100000])
    number = r.choice(["1e999", "-1e999", "1" * 5000, "1" * 400, "01", "NaN", "-Infinity"])
    many = record | {"tools": [{"name": f"t{i}"} for i in range(5000)], "call": {"name": "t7", "arguments": {}}}
    every = record["call"] | {"arguments": {str(i): strange(r) for i in range(5)}}
    data = r.choice([f'{text}, "x": {"[" * depth}{"]" * depth}}}', f'{text}, "n": {number}}}', f'{text}, "id": 7, "id": 7, "tools": []}}',
                     json.dumps(many), json.dumps(record | {"call": every}), json.dumps(record | {"query": r.choice(WORDS)}),
                     *(json.dumps(mutated(r, record), ensure_ascii=r.random() < .7) for _ in range(12))])
    return data.encode("utf-8", "surrogatepass")


def hostile_data(r, folder):
    data = a_record(r)
    (folder / "d.jsonl").write_bytes((garbled(r, data) if r.random() < .3 else data) + r.choice([b"\n", b"\r\n", b""]))
    return ["--data", folder / "d.jsonl"], rf"{folder}/d\.jsonl:"


def hostile_pairs(r, folder):
    call = json.loads((HERE / "data/demo.jsonl").read_text().splitlines()[0])["call"]
    data = json.dumps(mutated(r, {"id": "demo-000", "pairs": [{"request": "please", "call": call}] * 2})).encode()
    (folder / "p.jsonl").write_bytes(garbled(r, data) if r.random() < .3 else data)
    return ["--pairs", folder / "p.jsonl", r.choice(["--check", "--no-check"])], rf"{folder}/p\.jsonl:"


def hostile_flags(r, folder):
    fields = [f for f in dataclasses.fields(ttsi.Config) if f.name not in ("output", "attempts", "epochs")]
    names, numbers = ([f.name.replace("_", r.choice("-_")) for f in fields if f.type in types] for types in ((str, int, float, bool), (int, float)))
    values = ["", "0", "-1", "nan", "inf", "1e999", "1e-320", "9" * 30, "9" * 5000, "0x10", "1_0", " 2 ", "x", "é", "\udcff", "a\nb", "--",
              "-", "/", "/dev/null", "/nope", "\0", "%s", "999999999", "cpu", "icl", *names]
    pick = lambda: (r.choice(names), r.choice(values)) if r.random() < .4 else (r.choice(numbers), r.choice("123"))
    argv = [a for n, v in (pick() for _ in range(r.randint(1, 3))) for a in r.choice([[f"--{n}", v], [f"--{n}={v}"]] * 4 + [[f"--{n}"], [f"--no-{n}"], [v]])]
    return argv, ".*(" + "|".join(re.escape(part) for a in argv for part in (a.replace("_", "-").split("=")[0], a.split("=")[-1])) + ")"


def hostile_model(r, folder):
    (folder / "m").mkdir(exist_ok=True)
    files = sorted((HERE / "data/model").iterdir())
    for file in files:
        shutil.copy(file, folder / "m")
    target = folder / "m" / r.choice(files).name
    data, how = target.read_bytes(), r.random()
    if how < .2:
        target.unlink()
    elif how < .6 and target.suffix == ".json":
        target.write_text(json.dumps(mutated(r, json.loads(data))))
    else:
        target.write_bytes(r.choice([data[:r.randrange(len(data))], garbled(r, data[:5000]) + data[5000:], r.choice(files).read_bytes()]))
    return ["--model", folder / "m"], rf"--model {folder}/m: "


@pytest.mark.parametrize("kind,n,few", [(hostile_data, 500, 25), (hostile_pairs, 150, 10), (hostile_flags, 200, 15), (hostile_model, 150, 6)])
def test_hostile_input_is_refused_in_lines_that_name_the_place_or_goes_through(embedded, tmp_path, monkeypatch, kind, n, few):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    real, before, ends = ttsi.load, digest(embedded[0]), {"refused": 0, "through": 0}
    def hang(*_):
        raise TimeoutError
    for seed in range(n if os.environ.get("SLOW") else few):
        argv, place = kind(random.Random(seed), tmp_path)
        others = any(flag in str(a) for a in argv for flag in ("--model", "--teacher", "--device", "--dtype"))
        monkeypatch.setattr(ttsi, "load", real if others else lambda *_: embedded)
        signal.signal(signal.SIGALRM, hang)
        signal.alarm(60)
        try:
            summary, _ = quiet("--limit", 1, "--max-new-tokens", 8, "--attempts", 1, "--drafts", 2, "--epochs", 1, "--select", "all", *argv)
            assert summary["n"] == 1 or kind is hostile_flags, f"{kind.__name__}, seed {seed}: the sample is lost"
            ends["through"] += 1
        except ttsi.InputError as e:
            unnamed = [line for line in str(e).replace("a\nb", "a b").split("\n") if not re.match(place.replace("a\\\nb", "a b"), line)]
            assert not unnamed, f"{kind.__name__}, seed {seed}: {place} is not in {unnamed}"
            ends["refused"] += 1
        except BaseException as e:
            raise AssertionError(f"{kind.__name__}, seed {seed}: {argv}") from e
        finally:
            signal.alarm(0)
    assert all(ends.values()) and digest(embedded[0]) == before, ends


def test_hostile_rows_in_an_output_are_refused(tmp_path):
    path = tmp_path / "run.jsonl"
    quiet(*BRIEF, "--output", path)
    raw = path.read_bytes()
    for bad in (b"[]\n", b"{\n", b'{"id": ["a"]}\n', b'{"id": "demo-099"}\n', b"\xff\n", b"[" * 9999 + b"\n"):
        path.write_bytes(raw + bad)
        with pytest.raises(ttsi.InputError, match=f"--output {path}: cannot be used"):
            quiet(*BRIEF, "--output", path)
        assert path.read_bytes() == raw + bad, "a file that is refused must not be touched"
    raw = (tmp_path / "run.summary.json").read_bytes()
    for bad in (b"[]", b'{"config": [5]}', b"{"):
        path.write_bytes(b"{}\n")
        (tmp_path / "run.summary.json").write_bytes(bad)
        with pytest.raises(ttsi.InputError, match="cannot be used"):
            quiet(*BRIEF, "--output", path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ttsi.InputError, match="no regular file"):
        quiet(*BRIEF, "--output", tmp_path / "pipe")
    other = tmp_path / "notes.txt"
    other.write_text("no rows, and no end of line")
    with pytest.raises(ttsi.InputError, match="cannot be used"):
        quiet(*BRIEF, "--output", other)
    assert other.read_text() == "no rows, and no end of line"


def test_outputs_side_by_side_do_not_touch_one_another(tmp_path):
    for name in ("run.rank0of2.backup.jsonl", "run.ranking.jsonl"):  # somebody else's
        (tmp_path / name).write_text('{"id": "demo-000"}\n')
    for tau in (0.1, 0.2, 0.1):
        quiet(*BRIEF, "--limit", 1, "--tau", tau, "--output", tmp_path / f"tau{tau}")
        quiet(*BRIEF, "--limit", 1, "--tau", tau, "--output", tmp_path / f"run{tau}.jsonl")
    with pytest.raises(ttsi.InputError, match="begun with tau = 0.1, not 0.2"):
        quiet(*BRIEF, "--limit", 1, "--tau", 0.2, "--output", tmp_path / "tau0.1")
    quiet(*BRIEF, "--limit", 1, "--output", tmp_path / "run.jsonl")
    assert len(list(tmp_path.iterdir())) == 2 + 4 * 2 + 2


def test_other_data_under_the_same_name_are_noticed(tmp_path):
    data, line = tmp_path / "d.jsonl", (HERE / "data/demo.jsonl").read_text().splitlines()[0]
    for text, other in ((line, False), (line.replace('"id":', '"mark": 1, "id":', 1), False), (line.replace("could you", "would you"), True)):
        data.write_text(text)
        with pytest.raises(ttsi.InputError, match="begun with sha256") if other else contextlib.nullcontext():
            quiet("--data", data, "--output", tmp_path / "run.jsonl", "--max-new-tokens", 8)


def test_a_byte_order_mark_and_line_endings_change_nothing(tmp_path):
    lines = (HERE / "data/demo.jsonl").read_text().splitlines()[:3]
    forms = ["\n".join(lines), "\ufeff" + "\r\n".join(lines) + "\r\n", "\r".join(lines), "\n\n".join(lines) + "\n"]
    for i, text in enumerate(forms):
        (tmp_path / f"{i}.jsonl").write_bytes(text.encode())
    read = [ttsi.read_jsonl(tmp_path / f"{i}.jsonl", ttsi.to_sample) for i in range(len(forms))]
    assert all(r == read[0] for r in read) and len(read[0]) == 3


# hostile output

DEEP = '{"call": ' * 3000 + "}" * 3000
OUTPUT = ["", "{", "}" * 5000, "{" * 5000, DEEP, "[" * 100000, '{"a":' * 99999, "null", "[1]", '{"name": null, "arguments": null}', "\0\x1b\u2028\ufffd",
          '{"name": ["cancel_flight"], "arguments": {}}', '{"name": "cancel_flight", "arguments": [[]]}', '{"a": 1, "a": 2}',
          '{"call": {"name": {}, "arguments": {}}, "request": 7}', '{"call": {"name": "get", "arguments": {"x": NaN}}, "request": "x"}',
          '{"call": {"name": "get", "arguments": {"x": %s}}, "request": "x"}' % ("9" * 5000), '{"call": 1, "request": "\\ud800"}',
          json.dumps({"call": {"name": "cancel_flight", "arguments": {"days": {"": [None, True, 1e308]}}}, "request": "<|assistant|>{"}),
          json.dumps({"call": {"name": "book_flight", "arguments": {"city": "again " * 300}}, "request": "again " * 300}),
          json.dumps({"call": {"name": "book_flight", "arguments": {}}, "request": SAMPLES[1]["messages"][0]["content"]}),
          "__import__('os').system('touch hacked')", "{{ 7 * 7 }}{% for i in range(9) %}x{% endfor %}"]


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("kind", [LlamaForCausalLM, pytest.param(GPT2LMHeadModel, marks=slow)])
def test_whatever_the_model_writes_is_counted_data(tok, kind, check, monkeypatch):
    model = tiny(tok, kind)
    before = digest(model)
    monkeypatch.setattr(ttsi, "decode", lambda m, t, rows, *_: [next(texts) for _ in rows])
    for i in range(0, len(OUTPUT), 1 if os.environ.get("SLOW") else 7):
        texts = itertools.cycle(OUTPUT[i:] + OUTPUT[:i])
        cfg = config(select="all", check=check, drafts=3, attempts=2, k=2, epochs=1)
        xs = ttsi.tt_si(model, tok, SAMPLES, cfg)
        rows = [ttsi.finish(x, s, cfg) for x, s in zip(xs, SAMPLES)]
        assert sum(ttsi.summarise(rows)["verdicts"].values()) == sum(len(r["drafts"]) for r in rows) >= 9, "each draft is counted"
        assert json.loads(ttsi.dumps(rows)) == rows and ttsi.table(ttsi.summarise(rows), cfg)
        with contextlib.redirect_stdout(io.StringIO()):
            ttsi.trace(tok, xs[1], rows[1], SAMPLES[1], cfg)
    assert digest(model) == before and not hooks(model)


# numbers that are not finite, and memory

@pytest.mark.parametrize("adapt", ["suffix", pytest.param("full", marks=slow)])
@pytest.mark.parametrize("what,bad", [("score", math.nan), ("score", -math.inf), ("loss", math.nan), ("loss", math.inf), ("adapter", math.inf)])
def test_a_number_that_is_not_finite_leaves_the_base_answer_and_the_neighbours(model, tok, monkeypatch, what, bad, adapt):
    cfg, before = config(select="all", k=2, check=False, epochs=2, lr=.5, adapt=adapt), digest(model)
    samples = [dict(SAMPLES[i % 2], id=f"{i}") for i in range(4)]
    pairs = {s["id"]: PAIRS["ab"[i % 2]] for i, s in enumerate(samples)}
    healthy = ttsi.tt_si(model, tok, samples, cfg, pairs)
    score, logprob, sgd, steps = ttsi.score, ttsi.logprob, ttsi.sgd, itertools.count(1)
    def scored(*args, **kw):
        logp = score(*args, **kw)
        logp[1][0] = bad
        return logp
    def spans_logprob(*args):
        out = logprob(*args)
        return out + torch.tensor([0.0, 0, bad, 0, 0, 0, 0, 0]) if torch.is_grad_enabled() else out  # of two pairs each
    def stepped(theta, lr):
        sgd(theta, lr)
        theta[-1].data[1] = bad if next(steps) == cfg.epochs else 0  # the last: no loss tells
    monkeypatch.setattr(ttsi, *{"score": ("score", scored), "loss": ("logprob", spans_logprob), "adapter": ("sgd", stepped)}[what])
    xs = ttsi.tt_si(model, tok, samples, cfg, pairs)
    for i, (x, want) in enumerate(zip(xs, healthy)):
        if i == 1:
            assert "adapted" not in x and x["direct"] == want["direct"]
        else:
            assert all(x[key] == want[key] for key in ("logp", "margin", "loss", "adapted", "direct")), "a neighbour was touched"
    rows = [ttsi.finish(x, s, cfg) for x, s in zip(xs, samples)]
    s = ttsi.summarise(rows)
    assert s["not_finite"] == {"1": "score" if what == "score" else "loss"} and s["adapted"] == 3 and s["n"] == 4
    assert "answered by the base, its " in ttsi.table(s, cfg) and rows[1]["answer"] == healthy[1]["direct"]
    assert ttsi.every_tau(rows) and json.loads(ttsi.dumps(rows)) == rows
    with contextlib.redirect_stdout(io.StringIO()):
        ttsi.trace(tok, xs[1], rows[1], samples[1], cfg)
    assert digest(model) == before and not hooks(model)


@pytest.mark.parametrize("stage,error", [("generate", None), pytest.param("prefill", MemoryError(), marks=slow),
                                         pytest.param("train", torch.OutOfMemoryError("CUDA out of memory."), marks=slow)])
def test_out_of_memory_names_what_to_lower_and_the_next_run_goes_on(embedded, tmp_path, monkeypatch, stage, error):
    path, keep, count = tmp_path / "run.jsonl", getattr(ttsi, stage), itertools.count()
    def full(*args, **kw):
        if next(count):
            if error:
                raise error
            torch.empty(1 << 60)
        return keep(*args, **kw)
    before = digest(embedded[0])
    monkeypatch.setattr(ttsi, "load", lambda *_: embedded)
    argv = (*BRIEF, "--select", "all", "--output", path)
    with monkeypatch.context() as m, pytest.raises(MemoryError) as e:
        m.setattr(ttsi, stage, full)
        quiet(*argv)
    assert re.fullmatch(r"out of memory: a prompt of \d+ tokens; lower --batch-size 3, or --drafts", str(e.value))
    there = path.read_bytes()
    assert there.count(b"\n") == 3 and digest(embedded[0]) == before and not hooks(embedded[0])
    quiet(*argv, "--batch-size", 2)
    assert path.read_bytes().startswith(there) and len(timeless(path)) == 7


def test_other_errors_are_not_taken_for_memory(embedded, tmp_path, monkeypatch):
    monkeypatch.setattr(ttsi, "load", lambda *_: embedded)
    monkeypatch.setattr(ttsi, "generate", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        quiet(*SHORT, "--select", "all")


# supply chain

SOCKETS = '''
import runpy, sys
def deny(event, _):
    if event.startswith("socket."):
        raise SystemExit(f"{event}: the run opens a socket")
sys.addaudithook(deny)
sys.argv = ["ttsi.py", "--limit", "3"]
runpy.run_path("ttsi.py", run_name="__main__")
'''


def test_the_default_run_opens_no_socket():
    done = python("-c", SOCKETS)
    assert done.returncode == 0 and "TT-SI" in done.stdout, done.stderr
    assert python("-c", SOCKETS.replace("runpy.run_path", "__import__('socket').socket() #")).returncode == 1, "the hook sees one"


def test_a_model_brings_weights_in_safetensors_and_no_code(tok, tmp_path):
    model, good = tiny(tok), tmp_path / "good"
    saved(model, tok, good)
    assert ttsi.load(ttsi.Config(model=str(good)))
    tied = LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), tie_word_embeddings=True, **SMALL))
    assert ttsi.load(ttsi.Config(model=saved(tied, tok, tmp_path / "tied"))), "the head's weights are the embedding's, not missing"
    pickled, coded, partly = (shutil.copytree(good, tmp_path / name) for name in ("pickled", "coded", "partly"))
    (pickled / "model.safetensors").unlink()
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    conf = json.loads((coded / "config.json").read_text())
    (coded / "code.py").write_text(f"open({str(tmp_path / 'hacked')!r}, 'w')\nfrom transformers import LlamaConfig, LlamaForCausalLM")
    auto = {"AutoConfig": "code.LlamaConfig", "AutoModelForCausalLM": "code.LlamaForCausalLM"}
    (coded / "config.json").write_text(json.dumps(conf | {"model_type": "ours", "auto_map": auto}))
    (coded / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T", "auto_map": {"AutoTokenizer": [None, "code.T"]}}))
    weights = safetensors.torch.load_file(good / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    safetensors.torch.save_file(weights, partly / "model.safetensors", metadata={"format": "pt"})
    for folder, why in ((pickled, "safetensors"), (coded, "cannot be loaded"), (partly, "up_proj")):
        with pytest.raises(ttsi.InputError, match=why) as e:
            ttsi.load(ttsi.Config(model=str(folder)))
        assert str(e.value).startswith(f"--model {folder}: cannot be loaded") and "\n" not in str(e.value)
    assert not (tmp_path / "hacked").exists(), "code that came with a model was run"


def test_what_the_readme_promises_names_tests_that_exist():
    section = re.search(r"## What happens when\n(.*?)\n## ", (HERE / "README.md").read_text(), re.S)[1]
    rows = [line for line in section.splitlines() if line.startswith("| ") and "test_" in line]
    named = {name for line in rows for name in re.findall(r"`(test_\w+)`", line)}
    assert len(rows) >= 15 and all(f"\ndef {name}(" in Path(__file__).read_text() for name in named), named


# ------------------------------------------------------------------------------------------------ the project

def test_imports_and_layout():
    tree = ast.parse((HERE / "ttsi.py").read_text())
    names = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    wanted = {re.split(r"\W", line)[0] for line in (HERE / "requirements.txt").read_text().split()}
    assert wanted == {"torch", "transformers", "tqdm"} and names - set(sys.stdlib_module_names) <= wanted
    assert len((HERE / "ttsi.py").read_text().splitlines()) <= 800
    tracked = subprocess.run(["git", "ls-files"], cwd=HERE, capture_output=True, text=True).stdout.split() if (HERE / ".git").exists() else []
    assert {Path(f).parts[0] for f in tracked} <= {"ttsi.py", "test_ttsi.py", "requirements.txt", "README.md", "LICENSE", "data", ".ci", ".gitignore"}


def test_import_has_no_side_effects():
    code = "import sys; before = set(sys.modules); import ttsi; print(end='')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_splits_are_disjoint():
    splits = {s: [json.loads(line) for line in (HERE / f"data/{s}.jsonl").read_text().splitlines()] for s in ("dev", "demo", "test")}
    assert {s: len(x) for s, x in splits.items()} == {"dev": 200, "demo": 100, "test": 500}
    tools = [{t["function"]["name"] for x in rows for t in x["tools"]} for rows in splits.values()]
    assert not (tools[0] & tools[1] or tools[0] & tools[2] or tools[1] & tools[2])


def test_readme_commands_and_example():
    readme = (HERE / "README.md").read_text()
    for command in ("pip install -r requirements.txt && python ttsi.py", "pip install pytest && python -m pytest -q"):
        assert readme.count(f"\n{command}\n") == 1, "ci runs these two lines out of the README"
    example = re.search(r"```python\n(.*?)```", readme, re.S)[1]
    with contextlib.redirect_stdout(io.StringIO()) as text:
        exec(compile(example, "README.md", "exec"), {})
    assert text.getvalue().strip()


# ------------------------------------------------------------------------------------------------ real input

FILES = ["seal-tools/canonical_294.jsonl", "toolalpaca/canonical_real.jsonl", "bfcl/canonical_multiple.jsonl",
         "bfcl/canonical_simple_python.jsonl", "api-bank/canonical_l1.jsonl", "api-bank/canonical_l2.jsonl"]


def gold_pairs(path, target):
    """The next item's request and call as the pair of each: only to exercise T, of no other use."""
    samples = list(ttsi.read_jsonl(path, ttsi.to_sample).values())
    rows = [{"id": s["id"], "pairs": [{"request": "Again: " + ttsi.user_text(o["messages"]), "call": o["call"]}]}
            for s, o in zip(samples, samples[1:] + samples[:1])]
    target.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return len(samples)


@pytest.mark.skipif(not BENCHMARKS.exists(), reason="the benchmarks are not beside this checkout")
@pytest.mark.parametrize("name", FILES)
def test_real_data_goes_through(name, tmp_path):
    n = gold_pairs(BENCHMARKS / name, tmp_path / "pairs.jsonl")
    few = () if os.environ.get("SLOW") else ("--limit", 3)
    summary, text = quiet("--data", BENCHMARKS / name, "--pairs", tmp_path / "pairs.jsonl", "--no-check", "--batch-size", 4,
                          "--max-new-tokens", 24, "--epochs", 1, "--select", "all", *few)
    assert summary["labelled"] == summary["n"] == (n if not few else 3)
    assert summary["adapted"] + len(summary["failed"]) == summary["n"] and not (name == FILES[0] and summary["failed"])


@pytest.fixture(scope="session")
def convert():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(HERE / "data"), *sys.path])
        import convert
    return convert


beside = pytest.mark.skipif(not BENCHMARKS.exists(), reason="the benchmarks are not beside this checkout")
HAMMER = ["hammer-eval/sealtool.json", "hammer-eval/apibank_l1.json", "hammer-eval/apibank_l2.json",
          "hammer-eval/toolalpaca.json"]
UPSTREAM = dict(zip(HAMMER, ["seal-tools/canonical_294.jsonl", "api-bank/canonical_l1.jsonl", "api-bank/canonical_l2.jsonl",
                             "toolalpaca/canonical_real.jsonl"]))
UPSTREAM |= {f"bfcl/BFCL_v4_{c}.json": f"bfcl/canonical_{c}.jsonl" for c in ("multiple", "simple_python")}


def bare(value):
    """Without blanks at the ends of strings, and without the units that the other conversion leaves out."""
    if isinstance(value, dict):
        return {k: bare(v) for k, v in value.items() if k != "unit"}
    return [bare(v) for v in value] if isinstance(value, list) else value.strip() if isinstance(value, str) else value


def joined(messages):
    """Two assistant turns in a row as one, as the other conversion has them."""
    for a, b in reversed(list(zip(messages, messages[1:]))):
        if a["role"] == b["role"] == "assistant" and "tool_calls" not in {*a, *b}:
            b["content"] = a["content"] + "\n" + b["content"]
            messages = [m for m in messages if m is not a]
    return messages


@beside
@pytest.mark.parametrize("name", UPSTREAM)
def test_conversion_equals_the_independent_one(convert, name):
    """The canonical files were made from each benchmark's own files by other code."""
    ours = convert.convert(str(BENCHMARKS / name))[0]
    theirs = [json.loads(line) for line in (BENCHMARKS / UPSTREAM[name]).read_text().splitlines()]
    if "toolalpaca" in name:  # there 107 and 111 are malformed, one tool lost its parameters, enums came out of prose
        ours = [r for r in ours if r["id"] not in ("107", "111")]
        for f in (t["function"] for r in ours + theirs for t in r["tools"]):
            f["parameters"]["properties"] = {p: s["type"] for p, s in f["parameters"]["properties"].items()}
            f |= {"description": "", "parameters": {}} if "icao_code" in json.dumps(f) else {}
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        a["messages"] = joined(a["messages"])
        assert all(bare(a[key]) == bare(b[key]) for key in ("messages", "tools", "call")), a["id"]
        nested = {k for k, values in b.get("accept", {}).items() if "{" in json.dumps(values)}  # see the next two tests
        assert a.keys() == b.keys() and all(a["accept"][k] == v for k, v in b.get("accept", {}).items() if k not in nested)


@beside
@pytest.mark.parametrize("name", UPSTREAM)
def test_converted_labels_are_graded_right(convert, name):
    for record in convert.convert(str(BENCHMARKS / name))[0]:
        sample = ttsi.to_sample(json.loads(json.dumps(record)))
        assert ttsi.grade(json.dumps(sample["call"]), sample) == {"name": True, "call": True}, record["id"]


def upstream(path, *items):
    path.write_text("\ufeff" + (json.dumps(items) if "query" in items[0] else "\n".join(map(json.dumps, items))))
    return str(path)


def test_conversion_by_hand(convert, tmp_path):
    f = {"name": "f", "parameters": {"x": {"type": "list(str)", "required": True}, "y": {"type": "any", "choices": [1]}}}
    item = {"query": "q", "tools": [f, {"name": "components", "parameters": {}}], "answers": [{"tool": "f", "parameters": {"x": "1"}}]}
    g = {"name": "g", "arguments": {}}
    others = [dict(item, answers=[g, g]), dict(item, answers=[]), dict(item, answers=[g]), dict(item, tools=[f, f]), dict(item, query=" ")]
    (record,), n, dropped, notes = convert.convert(upstream(tmp_path / "x.json", *others, item))
    assert record == {"id": "5", "messages": [{"role": "user", "content": "q"}], "call": {"name": "f", "arguments": {"x": "1"}},
                      "tools": [{"type": "function", "function": {"name": "f", "description": "", "parameters": {
                          "type": "object", "required": ["x"], "properties": {
                              "x": {"type": "array", "items": {"type": "string"}}, "y": {"enum": [1]}}}}}]}
    assert n == 6 and sorted(dropped) == ["a tool is on offer twice, or has no name", "no call", "no request",
                                          "several calls", "the answer's tool is not on offer"] and len(notes) == 2


def test_answers_of_the_leaderboard_by_hand(convert, tmp_path):
    item = {"id": "a", "question": [[{"role": "user", "content": "q"}]], "function": [
        {"name": "m.f", "parameters": {"type": "dict", "properties": {"o": {"type": "dict"}, "z": {"type": "tuple"}}}}]}
    accept = {"a": {"o": [{"p": [1, 2], "q": ["u", ""]}], "z": ["", [3]]}, "c": {}, "d": {"z": []},
              "e": {"o": [{k: [0, 1] for k in "0123456789"}]}}
    answers = upstream(tmp_path / "y.json", *({"id": i, "ground_truth": [{"m.f": a}]} for i, a in accept.items()))
    others = [dict(item, id="b"), dict(item, id="c", question=item["question"] * 2), dict(item, id="d"), dict(item, id="e")]
    (record,), _, dropped, _ = convert.convert(upstream(tmp_path / "x.json", item, *others), answers)
    assert record["accept"] == {"o": [{"p": 1, "q": "u"}, {"p": 1}, {"p": 2, "q": "u"}, {"p": 2}], "z": ["", [3]]}
    assert record["call"] == {"name": "m.f", "arguments": {"o": {"p": 1, "q": "u"}}}
    assert record["tools"][0]["function"]["parameters"]["properties"] == {"o": {"type": "object"}, "z": {"type": "array"}}
    assert sorted(dropped) == ["an argument for which nothing is acceptable", "more than 1000 acceptable values of one argument",
                               "no answer with its id", "several turns"]
    with pytest.raises(convert.BadInput, match='item 1: id "a" is an earlier'):
        convert.convert(upstream(tmp_path / "x.json", item, item), answers)
    with pytest.raises(convert.BadInput, match="leave --answers out"):
        convert.convert(upstream(tmp_path / "z.json", json.loads(GOOD)), answers)


GOOD = '{"query": "q", "tools": [{"name": "f", "parameters": {}}], "answers": [{"name": "f", "arguments": {}}]}'
BFCL = '{"id": "a", "question": [[{"role": "user", "content": "q"}]], "function": [{"name": "f", "parameters": {"properties": {}}}]}'


@pytest.mark.parametrize("text,complaint", [
    ("", "nothing in it"), ("[", ":1:2: not JSON"), (GOOD + "\n{", ":2:2: not JSON"), (f"[{GOOD}, 7]", "item 1: not of"),
    ("[" * 9999, "nested too deeply"), ('{"query": 1}', "item 0: not of Hammer's common form: query, answers, tools"),
    (GOOD.replace('"q"', '"\\ud800"'), "item 0: 'utf-8' codec"), (GOOD.replace("{}}]}", '{"x": NaN}}]}'), "item 0: Out of range"),
    (GOOD.replace('"q"', '[{"role": "assistant", "content": "```{"}]'), "item 0: Expecting property name"),
    (GOOD.replace('"q"', '[{"role": "assistant", "content": "```7```"}]'), "item 0: an earlier call must be"),
    (GOOD.replace('"answers": [{', '"answers": [{}, {'), "answers missing or of another shape"),
    (GOOD.replace("[{", "[], \"a\": [{", 1), "nothing is left of 1 items: 1 the answer's tool is not on offer"),
    (BFCL, "possible_answer/x.json: cannot be read"), ("\udcff", "x.json: cannot be read")])
def test_conversion_tells_bad_input_in_one_line(convert, tmp_path, capsys, text, complaint):
    (tmp_path / "x.json").write_text(text, errors="surrogateescape")
    assert convert.main([str(tmp_path / "x.json")]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and err.startswith(f"convert: {tmp_path}/") and complaint in err


@beside
def test_conversion_of_standard_input(convert, capsys):
    run = lambda *argv, **more: subprocess.run([sys.executable, str(HERE / "data/convert.py"), *argv], capture_output=True, **more)
    piped = run(input=(BENCHMARKS / HAMMER[2]).read_bytes())
    assert b"127 items, 121 left, 6 dropped (6 the answer's tool is not on offer)" in piped.stderr and piped.returncode == 0
    assert piped.stdout == run(str(BENCHMARKS / HAMMER[2])).stdout and piped.stdout.count(b"\n") == 121


@beside
@pytest.mark.parametrize("name", HAMMER[1:3])
def test_a_dialogue_is_one_user_message_that_holds_every_turn(convert, tok, name):
    """Against the turns as they are published: who speaks, what is said, called and returned, in order."""
    tok = copy.deepcopy(tok)
    tok.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    items = json.loads((BENCHMARKS / name).read_text())
    for record in convert.convert(str(BENCHMARKS / name))[0]:
        lines = []
        for turn in items[int(record["id"])]["query"]:
            text = turn["content"].replace("\nGenerate API Request:", "").strip()
            lines += [f"call: {ttsi.dumps(c)}" for c in json.loads(text.strip("`"))] if turn["role"] == "assistant" else [
                f'{ {"agent": "assistant"}.get(turn["role"], turn["role"])}: {text}']
        request = ttsi.user_text(record["messages"])
        assert request == ("\n".join(lines) if len(lines) > 1 else lines[0].removeprefix("user: ")), record["id"]
        assert ttsi.render(tok, "TOOLS", request)[0] == "<system>TOOLS<user>" + request


@beside
def test_the_table_of_benchmarks_is_what_the_converter_counts(convert):
    readme = (HERE / "data/README.md").read_text()
    for path in map(str, (BENCHMARKS / name for name in UPSTREAM)):
        records, n, *_ = convert.convert(path)
        candidates, single, first = convert.shape(records)
        assert f"| `{Path(path).name}` | {n} | {len(records)} | {candidates} | {single} | {first} |" in readme, path
