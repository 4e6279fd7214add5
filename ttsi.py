"""TT-SI in one file: a language model that improves itself while it answers.

"Self-Improving LLM Agents at Test-Time" (Acikgoz et al. 2025, arXiv 2510.07841), for every input x:
    H  l_n = log P(a_n | x) for each tool name a_n on offer, p = softmax(l), u = p(1) - p(2)
       u >= tau: certain, answer with the base parameters
    G  u <  tau: uncertain, the same model writes K similar pairs (x', y'); it sees no label of x
    T  a temporary LoRA is trained on these pairs, and x is answered with it;
       then everything is reset: nothing learned is carried over to the next input

    python ttsi.py                                  # embedded model and data, offline
    python ttsi.py --trace demo-067                 # one sample, step by step
    python ttsi.py --model Qwen/Qwen2.5-0.5B-Instruct --data calls.jsonl --output runs/qwen.jsonl

Departures from the paper, and choices where it is silent (--paper undoes 1, 4 and the SGD of 3):
 1. One pair for each of the two tools of the margin, its keys dictated; what fails label-free
    checks is drafted anew; unless both have one, none is used. By --drafts: free ones, the closest.
 2. A pair is written call first. A copy of x is never trained on. Prompts: see --prompt.
 3. SGD along the normalised gradient, of the calls alone. No warm-up. (--paper: 1e-4, by AdamW.)
 4. The LoRA acts behind the tools only (--adapt suffix): one cache of the tools serves every stage.
 5. Tools are offered in a seeded order (--shuffle): benchmarks list the right one first.

N candidates, R rows of T tokens, V vocabulary, K pairs, r rank. In a span (ids, begin),
ids[begin:] is scored behind ids[:begin].
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import re
import sys
import time
import unicodedata
from collections import Counter
from contextlib import contextmanager, suppress
from copy import deepcopy
from datetime import date
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Literal

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

HERE = Path(__file__).parent / "data"


def flag(default, text):
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass
class Config:
    """Every field is a flag. [paper]: stated there or reported from it; [ours]: our choice."""

    model: str = flag(f"{HERE}/model", "folder or hub name of a model; default: the embedded one")
    data: str = flag("", "samples, JSON lines; default: data/everyday.jsonl, embedded: demo.jsonl")
    output: str = flag("", "a JSON row for each sample goes here; a run that was cut off goes on")
    teacher: str = flag("", "a model that writes the drafts in the other's place: TT-D [paper]")
    pairs: str = flag("", "take this file's {id, pairs: [{request, call}]} as drafts, judged alike")
    limit: int = flag(0, "only the first so many samples; 0: all")
    trace: str = flag("", "tell the sample of this id step by step")
    seed: int = flag(0, "of drafts, LoRA initialisation and candidate order")
    device: str = flag("auto", "a torch device; auto: cuda, else mps, else cpu")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag("auto", "auto: float32 on cpu")
    prompt: Literal["auto", "native", "ours"] = flag(
        "auto", "tools as the chat template shows them (native), or as text (ours); auto: if it can"
    )
    shuffle: bool = flag(True, "offer the tools in a seeded order, not the file's [ours]")
    tau: float = flag(0.95, "adapt where the margin is below it; 2: always, 0: never [paper]")
    k: int = flag(2, "tools to write a pair for, all or none; free ones: at most [ours; paper: 1]")
    drafts: int = flag(0, "so many of any tool at a time [paper: 1]; 0: for the k likeliest tools")
    attempts: int = flag(4, "at most, for a tool or free ones, until enough drafts pass [ours]")
    temperature: float = flag(0.7, "of drafts; answers are greedy [ours]")
    check: bool = flag(True, "draft again what fails the label-free checks [ours]")
    max_new_tokens: int = flag(256, "at most, in a draft or an answer [ours]")
    lora_rank: int = flag(8, "r [paper]")
    lora_alpha: float = flag(16.0, "the LoRA's output is scaled by alpha / r [paper]")
    optimizer: Literal["sgd", "adamw"] = flag("sgd", "normalised steps, or AdamW [ours]")
    lr: float = flag(3e-4, "of the cosine; sgd: a parameter's change, r.m.s. [ours; paper: 1e-4]")
    epochs: int = flag(5, "steps, each on all k pairs [paper: 5, k = 1]")
    adapt: Literal["suffix", "full"] = flag("suffix", "LoRA behind the tools [ours], or everywhere")

    def __post_init__(self):
        embedded = Path(self.model).resolve() == (HERE / "model").resolve()
        self.data = self.data or f"{HERE}/{'demo' if embedded else 'everyday'}.jsonl"


PAPER = "--k 1 --drafts 1 --attempts 1 --no-check --optimizer adamw --lr 1e-4 --adapt full"


# ------------------------------------------------------------------------------- Algorithm 1
@dataclasses.dataclass
class Result:
    """What Algorithm 1 did with one input. What it did not come to is empty."""

    id: str
    logp: dict = dataclasses.field(default_factory=dict)  # H: tool name -> l_n, nats
    margin: float | None = None  # H: u = p(1) - p(2), from 0 to 1
    drafts: list = dataclasses.field(default_factory=list)  # G: all, {text, verdict, pair or None}
    pairs: list = dataclasses.field(default_factory=list)  # G: trained on, {request, call}
    loss: list = dataclasses.field(default_factory=list)  # T: before each step, nats per token
    decision: str = ""  # "adapted", or why the base answers, or "not answered: why"
    answer: str = ""  # the text that the model wrote
    cost: dict = dataclasses.field(default_factory=dict)  # stage -> [seconds, forward tokens]


def tt_si(model, tok, sample, cfg, supplied=None, teacher=None):
    """Algorithm 1 for one input -> Result. Pairs may be supplied; a teacher is (model, tok)."""
    result = Result(sample["id"])
    stage = functools.partial(measured, result.cost)
    try:
        x = prepare(tok, sample, cfg)
    except InputError as e:  # beyond the context, or refused by the chat template
        result.decision = f"not answered: {e}"
        return result
    with stage("prefill", model):
        after_tools = Prefix(model, x.ids[: x.head])  # for H and G; by --adapt suffix for all
        after_prompt = Prefix(model, x.ids[:-1], after_tools)

    def by_base(decision):
        with stage("answer", model):
            result.answer = write(tok, x.ids, after_prompt, cfg)[0]
        result.decision = decision
        return result

    with stage("score", model):  # H: l_n = log P(a_n | x)
        result.logp = score(x, after_prompt)
    result.margin = margin(result.logp)  # u = p(1) - p(2)
    if not result.margin < cfg.tau:  # certain; or nan, where every comparison is false
        return by_base("certain" if result.margin >= cfg.tau else "score not finite")

    writer = teacher or (model, tok)
    with stage("generate", writer[0]):  # G: (x', y') ~ P( . | x)
        result.drafts, result.pairs = generate(*writer, x, after_tools, result.logp, cfg, supplied)
    if not result.pairs:
        return by_base("no pair")
    spans = [pair_span(x, pair) for pair in result.pairs]
    head = x.ids[: x.head] if cfg.adapt == "suffix" else []  # ids: commonprefix takes any lists
    shared = os.path.commonprefix([head, *(ids for ids, _ in spans)])  # tokens may merge at its end
    with stage("train", model):
        frozen = Prefix(model, shared, after_tools)  # the LoRA acts behind it
    with temporary_lora(model, cfg, draw(cfg.seed, x.id, "adapter")) as lora:
        with stage("train", model):  # T: theta' = theta + LoRA, trained on (x', y')
            result.loss = train(spans, frozen, lora, cfg)
        finite = all(p.isfinite().all() for p in [*lora, torch.tensor(result.loss)])
        with stage("answer", model):  # y ~ P'( . | x)
            result.answer = write(tok, x.ids, frozen, cfg)[0] if finite else ""
    # Reset: the block has ended, the LoRA is gone; the base parameters were never written.
    result.decision = "adapted"
    return result if finite else by_base("training not finite")


@contextmanager
def measured(cost, stage, model):
    """Adds to cost[stage] seconds and forward tokens, padding too; with a backward pass twice."""
    spent, start, before = cost.setdefault(stage, [0.0, 0]), time.perf_counter(), Prefix.tokens
    yield
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)
    spent[0] += time.perf_counter() - start
    spent[1] += Prefix.tokens - before


# ------------------------------------------------------------------------- H: self-awareness
@torch.no_grad()
def score(x, after_prompt):
    """H. -> {tool name: l_n, nats}: of its tokens and closing quote, behind a call's opening."""
    logp = []  # N
    for i in range(0, len(x.candidates), 8):  # in groups, so that memory does not grow with N
        logp += logprob(x.candidates[i : i + 8], after_prompt).tolist()
    return dict(zip((tool["name"] for tool in x.tools), logp, strict=True))


# FORK HERE: another uncertainty, e.g. 1 - entropy / log N for N > 1. Below tau means uncertain.
def margin(logp):
    """Relative Softmax Scoring: u = p(1) - p(2) of p = softmax(l); without a runner-up 1 [ours]."""
    p = torch.tensor([*logp.values()], dtype=torch.float64).softmax(0)  # (N,)
    first, *second = p.topk(min(2, len(p))).values.tolist()
    return first - sum(second)


# ------------------------------------------------------------------------------ G: self-data
# FORK HERE: another generation prompt. `outline`, `parse`, `judge`, `draft_over` hold its form.
DRAFT = (
    "Write a DIFFERENT request of the same kind as the one below, for any of the tools, and its"
    ' call, as a JSON object {"call": {"name": ..., "arguments": {...}}, "request": "..."} and'
    " nothing else.\n\n"
)
UNSAID = "a value is not in the request"  # or written otherwise there: the pair is a last resort


def generate(model, tok, x, after_tools, logp, cfg, supplied=None):
    """G. -> (drafts [{text, verdict, pair}], the pairs to train on): one for each of the K tools
    that are likeliest, if each of them has one; or of free or supplied ones the K closest to x."""
    drafts, pairs = [], []
    if supplied is not None:  # they were written elsewhere
        for pair in supplied:
            drafts.append(judge(dumps(pair), drafts, x, cfg))
        return drafts, closest(drafts, x.request)[: cfg.k]
    try:
        prompt, _ = render(tok, cfg, x.tools, [*x.system, turn("user", DRAFT + x.request)])
        ids = to_ids(tok, cfg, prompt)
    except InputError as e:
        return [{"text": "", "verdict": str(e), "pair": None}], []
    asked = Prefix(model, ids[:-1], after_tools)
    likeliest = sorted(logp, key=logp.get, reverse=True)[: cfg.k]
    for tool in [None] if cfg.drafts else likeliest:  # None: any
        start, n = len(drafts), 1 if tool else cfg.k
        for _ in range(cfg.attempts):
            if tool:
                g = draw(cfg.seed, x.id, tool, len(drafts) - start)
                texts = [fill(outline(x.tools, tool, g), tok, prompt, asked, cfg, g)]
            else:
                gs = [draw(cfg.seed, x.id, "draft", len(drafts) + i) for i in range(cfg.drafts)]
                uniform = torch.stack([torch.rand(cfg.max_new_tokens, generator=g) for g in gs])
                texts = write(tok, ids, asked, cfg, uniform, draft_over)
            for text in texts:
                drafts.append(judge(text, drafts, x, cfg))
            if sum(draft["verdict"] == "kept" for draft in drafts[start:]) >= n:
                break
        best = closest(drafts[start:], x.request)[:n]
        if not best:  # a pair for one of two likely tools would pull the answer to it
            return drafts, []
        pairs += best
    return drafts, pairs


GAP = "\0"  # where a JSON value is to be written
VALUES = (' "a"', " 1", " [1]", " {}", " true")  # one of each kind, to see where they part


def outline(tools, name, generator):
    """-> a draft for a tool with gaps: for what its schema requires, and for the rest by a draw."""
    rules, required, complete = schema_of(tools, name)
    drawn = torch.rand(len(rules), generator=generator).tolist()
    keys = [key for key, level in zip(rules, drawn, strict=True) if key in required or level < 0.5]
    arguments = " {" + ", ".join(f"{dumps(key)}:{GAP}" for key in keys) + "}"
    arguments = arguments if rules or complete else GAP
    return f'{{"call": {{"name": {dumps(name)}, "arguments":{arguments}}}, "request":{GAP}}}'


def fill(form, tok, prompt, asked, cfg, generator):
    """-> the draft, each value written behind all that stands before it; or up to a failure."""
    text, *others = form.split(GAP)
    for given in others:
        written = write_value(text, tok, prompt, asked, cfg, generator)
        end = value_end(text, written)
        if end < 1:
            return written
        text = written[:end] + given
    return text


def write_value(text, tok, prompt, asked, cfg, generator):
    """-> the text, and behind it a JSON value and what else its last token holds."""
    spans = [encode(tok, prompt, text + value) for value in VALUES]
    ids = os.path.commonprefix([ids for ids, _ in spans])  # tokens may merge where they meet
    known = (text + " ")[: spans[0][1][len(ids) - 1] - len(prompt)]  # the part that ids spell
    room = len(asked.ids) + 1 + cfg.max_new_tokens - len(ids)  # prompt and draft, without ids
    if room < 1:
        return text

    def over(new):
        return value_end(text, known + new)

    uniform = torch.rand(1, room, generator=generator)
    left = dataclasses.replace(cfg, max_new_tokens=room)
    return known + write(tok, ids, asked, left, uniform, over)[0]


def judge(text, before, x, cfg):
    """-> a draft {text, verdict, pair or None}; `before` are the drafts before it."""
    draft = {"text": text, "verdict": "no JSON object with a request and a call", "pair": None}
    value, rest = parse(text, STRICT)
    request, call = value.get("request"), to_call(value.get("call"))
    if isinstance(request, str) and request.strip() and call and not rest:
        pair = {"request": request.strip(), "call": call}
        draft["verdict"] = fault(pair, before, x, cfg) or "kept"
        draft["pair"] = pair if draft["verdict"] in ("kept", UNSAID) else None
    return draft


# FORK HERE: checks of your own. They see the request, the tools and earlier drafts, never a label.
def fault(pair, before, x, cfg):
    """What is wrong with a pair {request, call} that was written for x; UNSAID; or ""."""
    request, arguments = pair["request"], pair["call"]["arguments"]
    try:
        pair_span(x, pair)
    except InputError as e:  # the chat template refuses it, or it exceeds the context
        return str(e)
    rules, required, complete = schema_of(x.tools, pair["call"]["name"])
    texts = []  # what the request should hold
    for key, value in arguments.items():
        rule = rules.get(key, {})
        is_text = isinstance(value, str) and "str" in str(rule.get("type", "string")).lower()
        if is_text and not rule.get("enum"):
            texts.append(value.strip().casefold())
    typed = [fits(value, rules[key]) for key, value in arguments.items() if key in rules]
    earlier = [words(d["pair"]["request"]) for d in before if d["verdict"] == "kept"]
    faults = {
        "tool not on offer": pair["call"]["name"] not in [tool["name"] for tool in x.tools],
        "required argument missing": not required <= arguments.keys(),
        "unknown argument": complete and not arguments.keys() <= rules.keys(),
        "wrong type or not in enum": not all(typed),
        "copy of the request": any(copies(request, text) for text in x.asked),
        "written before": words(request) in earlier,
        UNSAID: any(text not in request.casefold() for text in texts),
    }
    if not cfg.check:  # even then: --pairs might hold x, with its label
        faults = {"copy of the request": faults["copy of the request"]}
    return next((name for name, found in faults.items() if found), "")


# Type -> what the JSON of a canonical value must match; "5" is that of 5, too.
TYPES = {"string": '".*"', "integer": r'"[-+]?\d+"', "number": r'"[-+]?[\d.]+(e[-+]?\d+)?"'}
TYPES |= {"boolean": '"(true|false)"', "null": '"null"', "object": r"\{.*", "array": r"\[.*"}
# In scripts without blanks (Thai to Khmer, kana, Han) each character is a word.
BLANKLESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{BLANKLESS}]|[^\W{BLANKLESS}]+")


def fits(value, rule):
    """Is a value in the enum of its rule, or else of its type? As for `grade`, 5 is "5"."""
    value, kinds, enum = canonical(value), rule.get("type") or "any", rule.get("enum")
    enum = enum if isinstance(enum, list) else []
    allowed = [str(canonical(v)).casefold() for v in enum if v is not None]
    if allowed and isinstance(value, str):
        return value.casefold() in allowed
    forms = [TYPES.get(str(k), ".*") for k in (kinds if isinstance(kinds, list) else [kinds])]
    return any(re.fullmatch(form, dumps(value), re.S) for form in forms)


def words(text):
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def copies(request, text):
    """Does a request say a text word for word, or hold one of three words and more?"""
    said, part = words(request), words(text)
    return said == part or (len(part) > 2 and f" {' '.join(part)} " in f" {' '.join(said)} ")


def closest(drafts, request):
    """-> the usable pairs: the kept first, of these first what shares most words with x, where
    rare ones weigh more."""
    usable = [draft for draft in drafts if draft["pair"]]
    found = Counter(word for draft in usable for word in set(words(draft["pair"]["request"])))
    weight = {w: math.log((len(usable) + 1) / (found[w] + 1)) for w in words(request)}

    def nearness(draft):
        here = words(draft["pair"]["request"])
        return draft["verdict"] == "kept", sum(v for word, v in weight.items() if word in here)

    return [draft["pair"] for draft in sorted(usable, key=nearness, reverse=True)]  # stable


# ----------------------------------------------------------------------- T: self-improvement
def linear_layers(model):
    """All of the text decoder, so neither the head nor a vision tower; GPT-2's Conv1D is one."""
    kinds = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    return [m for m in model.get_decoder().modules() if isinstance(m, kinds)]


@contextmanager  # FORK HERE: another adapter
def temporary_lora(model, cfg, generator):
    """A LoRA on every linear layer -> its parameters, float32. Leaving the block is the reset.

    x --+-- W, frozen --------------------------------+--> y     A uniform in +-1/sqrt(d_in), B = 0:
        '-- A (d_in, r) -- B (r, d_out) -- alpha / r -'          at first, nothing changes
    """
    parameters, hooks, r = [], [], cfg.lora_rank
    try:
        for layer in linear_layers(model):
            W = layer.weight.T if isinstance(layer, torch.nn.Linear) else layer.weight
            A = (torch.rand(len(W), r, generator=generator) * 2 - 1) / len(W) ** 0.5
            A = A.to(model.device).requires_grad_()  # (d_in, r)
            B = torch.zeros(r, W.shape[1], device=model.device, requires_grad=True)  # (r, d_out)

            def add(layer, inputs, y, A=A, B=B):  # inputs[0] (R, T, d_in), y (R, T, d_out)
                if isinstance(y, tuple):  # a router is left as it is
                    return y
                return (y + cfg.lora_alpha / r * (inputs[0].float() @ A @ B)).to(y.dtype)

            hooks.append(layer.register_forward_hook(add))
            parameters += [A, B]
        yield parameters
    finally:
        for hook in hooks:
            hook.remove()


def train(spans, frozen, lora, cfg):
    """T. Steps on the LoRA, in place -> the loss before each, in nats per token of the calls."""
    adamw = torch.optim.AdamW(lora, weight_decay=0.0)  # afresh: no old moments
    lengths = torch.tensor([len(ids) - begin for ids, begin in spans]).to(lora[0].device)  # (K,)
    losses = []
    for step in range(cfg.epochs):
        lr = cfg.lr * (1 + math.cos(math.pi * step / cfg.epochs)) / 2
        loss = -(logprob(spans, frozen) / lengths).mean()
        gradients = torch.autograd.grad(loss, lora, materialize_grads=True)
        if cfg.optimizer == "adamw":
            for p, g in zip(lora, gradients, strict=True):
                p.grad = g
            adamw.param_groups[0]["lr"] = lr
            adamw.step()
        else:  # FORK HERE: another update rule
            size = sum(p.numel() for p in lora)  # so that one rate fits models of all sizes
            rms = torch.nn.utils.get_total_norm(gradients).clamp(min=1e-12) / size**0.5
            with torch.no_grad():
                for p, g in zip(lora, gradients, strict=True):
                    p -= lr * g / rms
        losses.append(loss.item())
    return losses


# --------------------------------------------------------------------------------- the model
class Prefix:
    """Token ids that a model has read, and the cache that it kept, for rows that continue them.
    These are padded on the right, which causal attention cannot see: no mask, no positions."""

    tokens = 0  # read so far by all prefixes, padding too, for `measured`

    @torch.no_grad()  # not inference_mode: autograd saves what is cached here
    def __init__(self, model, ids, before=None):
        self.model, self.ids, new = model, ids, ids
        self.cache = transformers.DynamicCache(config=model.config)
        if before and before.model is model and ids[: len(before.ids)] == before.ids:
            self.cache, new = before.copy(1), ids[len(before.ids) :]
        if new:
            self.forward(self.cache, torch.tensor([new]), 1)

    def copy(self, rows):
        cache = deepcopy(self.cache)
        cache.batch_repeat_interleave(rows)
        return cache

    def forward(self, cache, new, keep):
        """Reads new (R, T) behind a cache, in place -> logits (R, keep, V) of the last `keep`."""
        Prefix.tokens += new.numel() * (1 + torch.is_grad_enabled())
        ids = new.to(self.model.device)
        last = torch.arange(ids.shape[1])[-keep:]  # of a slice, matmul copies the head R times
        return self.model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=last).logits


def logprob(spans, prefix):
    """-> (R,) log P of each of R spans, in nats.

    tokens   t0    t1    t2    t3      the logits at one position
    logits   '---> '---> '---> '       predict the token at the next
    """
    n = len(prefix.ids)
    rows = pad_sequence([torch.tensor(ids[n:]) for ids, _ in spans], batch_first=True)  # (R, T)
    labels = torch.full_like(rows, -100)  # what is -100 gives no loss
    for row, (ids, begin) in zip(labels, spans, strict=True):
        row[begin - n : len(ids) - n] = torch.tensor(ids[begin:])
    labels = labels[:, min(begin for _, begin in spans) - n :]  # (R, L); before, none is scored
    logits = prefix.forward(prefix.copy(len(spans)), rows, labels.shape[1] + 1)[:, :-1].float()
    labels = labels.to(logits.device)
    return -torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none").sum(1)


@torch.no_grad()
def write(tok, ids, prefix, cfg, uniform=None, over=lambda text: parse(text)[0]):
    """-> [the greedy text], or R texts, drawn by uniform (R, tokens). One ends at an end token, or
    once it is over: by default, when it holds a call."""
    ends = prefix.model.generation_config.eos_token_id  # no more of it: no penalties
    ends = {tok.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    n = 1 if uniform is None else len(uniform)
    cache, new = prefix.copy(n), torch.tensor([ids[len(prefix.ids) :]] * n)  # (R, T), then (R, 1)
    written, texts = [[] for _ in range(n)], [None] * n
    for step in range(cfg.max_new_tokens):
        logits = prefix.forward(cache, new, 1)[:, -1]  # (R, V)
        if uniform is None or cfg.temperature == 0:
            new = logits.argmax(-1, keepdim=True)
        else:
            cdf = (logits.float() / cfg.temperature).softmax(-1).cumsum(-1)  # (R, V)
            level = uniform[:, step, None].to(cdf.device) * cdf[:, -1:]  # (R, 1)
            new = torch.searchsorted(cdf, level, right=True).clamp(max=cdf.shape[1] - 1)
        for row, token in enumerate(new[:, 0].tolist()):
            if texts[row] is None:
                if token not in ends:
                    written[row].append(token)
                text = tok.decode(written[row], skip_special_tokens=True)
                if token in ends or step == cfg.max_new_tokens - 1 or over(text):
                    texts[row] = text
        if None not in texts:
            break
    return texts


# ------------------------------------------------------------------------ prompts and tokens
SYSTEM = (
    'Answer the request with one tool call, a JSON object {"name": ..., "arguments": {...}} and'
    " nothing else. Tools:\n"
)
ID = "000000000"  # of every call: some templates want one of nine characters
PLAIN = "{{ bos_token }}{% for m in messages %}{{ m.content }}\n\n{% endfor %}Answer:"
# No thinking, and one date for all days.
RENDER = {"tokenize": False, "enable_thinking": False, "date_string": "01 January 2026"}
CODES = [f"| replace('%{c}', '{date(2026, 1, 1):%{c}}')" for c in "aAbBdeHIjmMpSyY"]
PINNED = "{% macro strftime_now(form) %}{{ form | replace('%-d', '1')"
PINNED += "".join(CODES) + " }}{% endmacro %}\n"
WORD_RULE = {"word": {"type": "string", "description": "a word"}}
PROBE = {"name": "look_up", "description": "Looks a word up.", "parameters": {"type": "object"}}
PROBE["parameters"] |= {"properties": WORD_RULE, "required": ["word"]}
BARE = {"description": "", "parameters": {"type": "object", "properties": {}}}


def turn(role, content, **more):
    return {"role": role, "content": content} | more


def prepare(tok, sample, cfg):
    """-> x, all that Algorithm 1 sees; InputError: template or context cannot take the sample."""
    tools, messages = sample["tools"], sample["messages"]
    if cfg.shuffle:  # by seed and names alone
        tools = sorted(tools, key=lambda tool: tool["name"])
        g = draw(cfg.seed, "order", [tool["name"] for tool in tools])
        tools = [tools[i] for i in torch.randperm(len(tools), generator=g)]
    x = SimpleNamespace(id=sample["id"], tools=tools, tok=tok, cfg=cfg)
    x.system = [m for m in messages if m["role"] == "system"]  # it stands before a pair, too
    x.request = user_text([m for m in messages if m["role"] != "system"])
    x.asked = [m["content"] for m in messages if m["role"] == "user"]
    prompt, zero = render(tok, cfg, tools, messages, {"name": "0", "arguments": {"x": 1}})
    _, one = render(tok, cfg, tools, messages, {"name": "1", "arguments": {"x": 1}})
    another, _ = render(tok, cfg, tools, [*x.system, turn("user", "-")])
    x.ids, other = to_ids(tok, cfg, prompt), to_ids(tok, cfg, another)
    x.head = len(os.path.commonprefix([x.ids[:-1], other]))  # length of the tools' part, if first
    opening = os.path.commonprefix([zero, one])  # '{"name": "'; in zero then '0", ...' follows
    spans = []  # N: each name and its closing quote, as tokenised in a whole answer
    for tool in tools:
        text = opening + dumps(tool["name"])[1:-1]
        ids, ends = encode(tok, prompt, text + zero[len(opening) + 1 :])
        begin = sum(end <= len(prompt + opening) for end in ends)
        quote = sum(end <= len(prompt + text) for end in ends)
        spans.append((ids[: quote + 1], begin))
    begin = min(begin for _, begin in spans)  # one for all: a name's first token may hold the quote
    x.candidates = [(ids, begin) for ids, _ in spans]
    return x


def draw(*key):
    """A torch generator seeded by `key` alone: no draw depends on order, resuming or shard."""
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    return torch.Generator().manual_seed(int(digest[:16], 16) >> 1)


def user_text(messages):
    """The request; a dialogue becomes a transcript, earlier calls and results included."""
    turns = []
    for message in messages:
        if text := message["content"].strip():
            turns.append(f"{message['role']}: {text}" if len(messages) > 1 else text)
        for call in message.get("tool_calls", []):
            turns.append(f"call: {dumps(call['function'])}")
    return "\n".join(turns)


@functools.cache
def takes_tools(tok):
    """Does the chat template show tools, and a call as what continues the prompt, to be parsed?"""
    call, native = {"name": "look_up", "arguments": {"word": "tide"}}, Config(prompt="native")
    with suppress(InputError):
        _, rest = render(tok, native, [PROBE], [turn("user", "What is a tide?")], call)
        return to_call(parse(rest)[0]) == call
    return False


def render(tok, cfg, tools, messages, call=None):
    """-> (prompt by the chat template, what continues it with a call). Its own form of tools and
    calls (native), or ours: tools and request as text. A system turn may have to be folded."""
    native = cfg.prompt == "native" or (cfg.prompt == "auto" and takes_tools(tok))
    if native:
        while len(messages) > 1 and messages[-1]["role"] == "assistant":
            messages = messages[:-1]  # a template would close it; G reads it (x.request)
    else:
        system = SYSTEM + "\n".join(dumps(tool) for tool in tools)
        messages = [turn("system", system), turn("user", user_text(messages))]
    first, *others = messages
    forms = [messages]
    if first["role"] == "system" and others:
        folded = f"{first['content']}\n\n{others[0]['content']}"
        forms.append([others[0] | {"content": folded}, *others[1:]])
    shown = [tool["name"] for tool in tools]
    shown += [message["content"] for message in messages if message["role"] in ("system", "user")]
    called = [{"id": ID, "type": "function", "function": call}]
    why = "it does not show tools and request"
    for form, lacking in itertools.product(forms, ({}, BARE)):  # some want what a tool may lack
        offered = [{"type": "function", "function": lacking | tool} for tool in tools]
        how = RENDER | {"tools": offered if native else None}
        try:
            template = tok.get_chat_template(tools=how["tools"]) if tok.chat_template else PLAIN
            how["chat_template"] = PINNED + template
            prompt = tok.apply_chat_template(form, add_generation_prompt=True, **how)
            whole = prompt + dumps(call)
            if native and call:
                answer = turn("assistant", "", tool_calls=called)
                whole = tok.apply_chat_template([*form, answer], **how)
        except Exception as e:  # jinja2's own: some templates raise on a system role
            why = " ".join(str(e).split())[:80]
            continue
        seen = "".join(prompt.split())  # some strip or collapse blanks
        if all("".join(text.split()) in seen for text in shown) and whole.startswith(prompt):
            return prompt, whole.removeprefix(prompt)
    raise InputError(f"the chat template cannot take this: {why}")


def encode(tok, prompt, rest=""):
    """-> (token ids, where each ends in prompt + rest), as decoding comes by them: first the
    prompt's own, even where its last character would merge with what follows."""
    out = tok(prompt, add_special_tokens=False, return_offsets_mapping=True)
    ids, ends = out.input_ids, [end for _, end in out.offset_mapping]
    if not rest:
        return ids, ends
    whole = encode(tok, prompt + rest)
    if whole[0][: len(ids)] == ids:
        return whole
    more, places = encode(tok, "0" + rest)  # 0 is cut off: first in a text, rest may get a blank
    n = sum(end <= 1 for end in places)
    return ids + more[n:], ends + [len(prompt) - 1 + end for end in places[n:]]


def to_ids(tok, cfg, prompt):
    """-> token ids of a prompt with room to answer."""
    ids, _ = encode(tok, prompt)
    n = len(ids) + cfg.max_new_tokens
    need(n <= tok.model_max_length, f"prompt and answer, {n} tokens, exceed the context")
    return ids


def pair_span(x, pair):
    """-> span of a pair's call after the prompt of its request."""
    turns = [*x.system, turn("user", pair["request"])]
    prompt, rest = render(x.tok, x.cfg, x.tools, turns, pair["call"])
    ids, ends = encode(x.tok, prompt, rest)
    need(len(ids) <= x.tok.model_max_length, "exceeds the context")
    return ids, sum(end <= len(prompt) for end in ends)


# ----------------------------------------------------------- JSON, of models and files; data
class InputError(ValueError):
    """Bad input, told in one line: where, what is wrong, and what would be right."""


def need(ok, message):
    if not ok:
        raise InputError(message)


def present(items):
    """A JSON object; null, which Arrow writes for what is absent, is absent."""
    return {key: value for key, value in items if value is not None}


def once(items):
    keys = [key for key, _ in items]
    need(len(set(keys)) == len(keys), f"a key twice: {keys}")
    return present(items)


DECODER = json.JSONDecoder(object_pairs_hook=present, strict=False)  # a key twice: its last
STRICT = json.JSONDecoder(object_pairs_hook=once, strict=False)  # a key twice: refused
dumps = functools.partial(json.dumps, ensure_ascii=False, allow_nan=False)


def sound(value):
    """A JSON value, or a ValueError: too deep, NaN, 1e999, or no text for a tokenizer."""
    canonical(value)
    dumps(value).encode()
    return value


def decoded(value):
    """What a string says that holds JSON; anything else as it is."""
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            return sound(STRICT.decode(value.strip() or "null"))
    return value


def jsonlike(text):
    """Python's True, False and None, outside of strings, as JSON's; of the same length."""
    python = {"True": "true", "False": "false", "None": "null"}
    at = max(text.find("{"), 0)  # prose may hold a lone quote
    skip = r'"(?:\\.|[^"\\])*"|\b(?:True|False|None)\b'
    return text[:at] + re.sub(skip, lambda found: python.get(found[0], found[0]), text[at:])


WRAPPERS = {"call", "function", "tool_calls", "tool_call", "function_call", "action", "answer"}


def parse(text, decoder=DECODER):
    """-> (the first JSON object in a model's text that is a call or a pair, what follows it); {}
    is none. One still open is not searched inside, or a draft would end with its call."""
    text = jsonlike(text)
    at = text.find("{")
    while at >= 0:
        value, end = read_object(text, at, decoder)
        if value is None:
            break
        if isinstance(value.get("name"), str) or value.keys() >= {"call", "request"}:
            return value, text[end:].strip()
        at = text.find("{", at + 1 if value.keys() & WRAPPERS else end)
    return {}, ""


def read_object(text, at, decoder=DECODER):
    """-> (the JSON object that begins there, its end); None while it is open, {} if it is none."""
    try:
        value, end = decoder.raw_decode(text, at)
        return sound(value), end
    except json.JSONDecodeError as e:
        cut = re.compile(r"[\w.+-]*\s*\Z").match(text, e.pos)  # at its end, or in a last word
        return (None, at) if cut or e.msg.startswith("Unterminated") else ({}, at + 1)
    except RecursionError:  # so deep that none of it will be read
        return None, at
    except ValueError:
        return {}, at + 1


def draft_over(text):
    """Is a draft whole, or no pair any more? Its first brace must come soon, and open the pair."""
    text = jsonlike(text)
    opening = re.search(r'{\s*("\w*|)', text)
    if not opening:
        return len(text) > 200  # characters
    begins = '"call"'.startswith(opening[1]) or '"request"'.startswith(opening[1])
    return not begins or read_object(text, opening.start())[0] is not None


def value_end(text, written):
    """-> where in `written` the JSON value behind `text` ends; 0: not yet, -1: it never will."""
    if not written.startswith(text):
        return 0 if text.startswith(written) else -1
    written = jsonlike(written)
    at = len(written) - len(written[len(text) :].lstrip())
    value, end = read_object(written, at)
    if end == at:
        return 0
    if value == {} and end == at + 1:
        return -1
    more = written[at] not in '"[{' and re.fullmatch(r"[\w.+-]*", written[end:])  # of a number
    return 0 if more else end


def to_call(value):
    """-> {name, arguments}, or None, of what APIs and models write; arguments may be JSON text."""
    with suppress(AttributeError):  # no object
        call = decoded(value)
        inner = decoded(call.get("function"))
        call = inner if isinstance(inner, dict) else call
        given = (call.get(key) for key in ("arguments", "parameters", "input", "args"))
        arguments = decoded(next(filter(None, given), {})) or {}
        if isinstance(call.get("name"), str) and isinstance(arguments, dict):
            return {"name": call["name"], "arguments": arguments}
    return None


# What is not understood of a JSON schema: nothing is checked by one that has such a key.
BEYOND = {"$ref", "$defs", "allOf", "anyOf", "oneOf", "not", "if", "patternProperties"}


def schema_of(tools, name):
    """-> ({argument: rule}, required, are these all? Unless it says otherwise [ours]) of a tool."""
    schema = next((tool.get("parameters") for tool in tools if tool["name"] == name), None)
    schema = schema if isinstance(schema, dict) else {}
    rules, required = schema.get("properties"), schema.get("required")
    if not isinstance(rules, dict) or BEYOND & schema.keys():
        return {}, set(), False
    rules = {key: rule if isinstance(rule, dict) else {} for key, rule in rules.items()}
    listed = rules.keys() & set(map(str, required if isinstance(required, list) else []))
    for key, rule in rules.items():  # what may be null need not be there
        if "null" in f"{rule.get('type')} {rule.get('anyOf')}" or rule.get("nullable") is True:
            listed.discard(key)
    return rules, listed, schema.get("additionalProperties", False) is False


def to_tool(tool, place):
    """-> {name, parameters, ...} of what OpenAI, MCP, Anthropic or xLAM calls a tool."""
    tool = decoded(tool)
    tool = decoded(tool.get("function", tool)) if isinstance(tool, dict) else {}
    right = isinstance(tool, dict) and isinstance(tool.get("name"), str) and tool["name"]
    need(right, f'{place}: no "name"; give {{"name": ..., "parameters": JSON schema}}')
    tool = {"parameters" if k in ("inputSchema", "input_schema") else k: tool[k] for k in tool}
    schema = decoded(tool.get("parameters"))
    rules = schema if isinstance(schema, dict) else {}
    keywords = BEYOND | {"properties", "additionalProperties"}
    if rules and not rules.keys() & keywords and all(isinstance(r, dict) for r in rules.values()):
        required = [key for key in rules if rules[key].get("required") is True]
        schema = {"type": "object", "properties": rules, "required": required}
    return tool if schema is None else tool | {"parameters": schema}


ROLES = dict(system="system developer", user="user human", assistant="assistant model gpt agent")
ROLES |= {"tool": "tool function ipython observation tool_response"}  # as they are called elsewhere


def to_message(message, place):
    """-> {role, content, ...} as chat templates take it: text, and calls with their arguments."""
    message = decoded(message)
    message = dict(message) if isinstance(message, dict) else {}
    role = str(message.get("role")).lower()
    role = next((r for r, names in ROLES.items() if role in names.split()), None)
    need(role, f'{place} must be {{"role": {" or ".join(ROLES)}, "content": text}}')
    parts = message.get("content", "")
    parts = parts if isinstance(parts, list) else [parts]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    if role == "tool":  # a result may be anything
        texts = [t if isinstance(t, str) else dumps(p) for t, p in zip(texts, parts, strict=True)]
        message["tool_call_id"] = ID
    need(all(isinstance(t, str) for t in texts), f'{place}: its "content" must be text')
    single = message.pop("function_call", None)  # the form before tool_calls
    calls = decoded(message.pop("tool_calls", "")) or single or []
    calls = [to_call(call) for call in (calls if isinstance(calls, list) else [calls])]
    need(all(calls), f"{place}: a call without name or arguments")
    message |= {"role": role, "content": "\n".join(texts)}
    if calls:
        message["tool_calls"] = [{"id": ID, "type": "function", "function": c} for c in calls]
    return message


def calls_in(message, names):
    """The calls that a message of the model holds: `tool_calls`, or else JSON text."""
    calls = [call["function"] for call in message.get("tool_calls", [])]
    if calls or message["role"] != "assistant":
        return calls
    value, text = parse(message["content"].rpartition("</think>")[2])
    while value:
        calls += [call for call in [to_call(value)] if call and call["name"] in names]
        value, text = parse(text)
    return calls


def to_sample(record):
    """A record (README: Your own data) -> {id, messages, tools, call?, accept?}."""
    record = DECODER.decode(dumps(record))  # nulls of one from Python are absent, too
    tools = decoded(record.get("tools") or record.get("functions"))
    right = tools and isinstance(tools, list)
    need(right, 'no tools; give "tools": [{"name": ..., "parameters": ...}, ...]')
    tools = [to_tool(tool, f"tools[{n}]") for n, tool in enumerate(tools)]
    names = [tool["name"] for tool in tools]
    need(len(set(names)) == len(names), f"a tool twice: {sorted(names)}")
    kinds = {"system": "system", "messages": "user"}
    if "messages" not in record:
        kinds |= {"query": "user", "prompt": "user", "completion": "assistant"}
    said = []  # texts or lists of messages; TRL has prompt and completion
    for key, role in kinds.items():
        value = record.get(key, [])
        listed = decoded(value)
        turns = isinstance(listed, list) and all(isinstance(decoded(m), dict) for m in listed)
        said += listed if turns else [turn(role, value)]
    messages = [to_message(message, f"messages[{n}]") for n, message in enumerate(said)]
    held = {"tool_calls", "tool_call_id"}  # of what may have no text
    messages = [m for m in messages if m["content"].strip() or m.keys() & held]
    given = record.get("call") or record.get("answers") or record.get("tool_calls") or []
    labels = decoded(given)
    labels = [to_call(label) for label in (labels if isinstance(labels, list) else [labels])]
    answered = calls_in(messages[-1], names) if messages else []
    messages = messages[:-1] if answered else messages  # it ended with its label
    need(len(labels) < 2 and len(answered) < 2, "several calls as label: one input has one call")
    call = next(iter(labels + answered), None)
    right = not labels + answered or (call and call["name"] in names)
    wanted = f'{{"name": one of {names}, "arguments": {{...}}}}'
    need(right, f'"call" must be {wanted}, not {dumps(call or given)[:80]}')
    same = all(canonical(other) == canonical(call) for other in answered)
    need(same, '"call" and that of the last message differ')
    unread = [f.format(n) for n in names for f in ("{}(", "={}", ": '{}'", ': "{}"')]
    for message in reversed(messages):
        told, text = calls_in(message, names), message["content"]
        leaked = call and canonical(call) in map(canonical, told)
        if message is messages[-1] and message["role"] == "assistant" and not told:
            leaked = any(form in text for form in unread)  # a call in another form
        need(not leaked, "the messages hold the label; end them before it")
        if message["role"] == "user":
            break
    by = [message["role"] for message in messages]
    need("user" in by, 'no request; give "messages": [{"role": "user", "content": "..."}]')
    accept = decoded(record.get("accept", {}))
    right = isinstance(accept, dict) and all(isinstance(values, list) for values in accept.values())
    need(right, '"accept" must be {argument: [acceptable values]}')
    sample = {"id": record["id"], "messages": messages, "tools": tools, "call": call}
    return {key: value for key, value in (sample | {"accept": accept}).items() if value}


def read_jsonl(path, convert):
    """{id: convert(record)} of a file's lines, or of one JSON array; what is refused is named."""
    found, number = {}, 0
    try:
        text = Path(path).read_text("utf-8-sig")
        array = text.lstrip().startswith("[")
        lines = map(dumps, STRICT.decode(text)) if array else text.split("\n")
        for number, line in enumerate(lines, 1):
            if line.strip():
                record = sound(STRICT.decode(line))
                need(isinstance(record, dict), "this is no JSON object")
                i = record["id"] = str(record.get("id", number))
                need(i and i not in found and i.isprintable(), f"id {i!r}: twice, or unprintable")
                found[i] = convert(record)
        need(found, "nothing in it; give JSON objects, one a line")
    except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError) as e:
        raise InputError(f"{path}:{number}: {' '.join(str(e).split())[:300]}") from e
    return found


# --------------------------------------------------------------------------- scoring, report
def canonical(value, levels=100):
    """As values are compared, by checks and scores: strings, 12.0 as 12; in containers, too."""
    need(levels, "nested more than 100 deep")
    if isinstance(value, dict):
        return {key: canonical(v, levels - 1) for key, v in value.items()}
    if isinstance(value, list):
        return [canonical(v, levels - 1) for v in value]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = value.strip() if isinstance(value, str) else json.dumps(value)
    return text.lower() if text in ("True", "False") else text


def grade(text, sample):
    """-> {"name": right tool?, "call": and right arguments?}; `accept` allows other values."""
    answer, gold, accept = parse(text)[0], sample["call"], sample.get("accept")
    call = to_call(answer)
    name = (call or answer).get("name") == gold["name"]
    if not name or not call:
        return {"name": name, "call": False}
    given = canonical(call["arguments"])
    right = given == canonical(gold["arguments"])
    if accept and not right:
        accept = {key: [value] for key, value in gold["arguments"].items()} | accept
        right = all(value in canonical(accept.get(key, [])) for key, value in given.items())
        right = right and all(k in given or "" in v or None in v for k, v in accept.items())
    return {"name": name, "call": right}


def to_row(model, tok, sample, result, cfg):
    """A Result -> its row: also what answering directly gives and costs, and the grades of both."""
    row, cost = dataclasses.asdict(result), dict(result.cost)
    if result.decision != "adapted":
        row["direct"] = result.answer
        if cost:
            cost["direct"] = [a + b for a, b in zip(cost["prefill"], cost["answer"], strict=True)]
    elif "call" in sample:  # made in order to compare
        ids = prepare(tok, sample, cfg).ids
        with measured(cost, "direct", model):
            row["direct"] = write(tok, ids, Prefix(model, []), cfg)[0]
    if "call" in sample:
        row["scores"] = {side: grade(row[side], sample) for side in ("direct", "answer")}
        row["scores"]["first"] = sample["tools"][0]["name"] == sample["call"]["name"]
    return json.loads(json.dumps(row | {"cost": cost}), parse_constant=lambda name: None)


def interval(differences, resamples=10_000, seed=0):
    """Paired bootstrap over items: the 2.5 and 97.5 % quantiles of the mean difference."""
    d, g = torch.tensor(differences).double(), torch.Generator().manual_seed(seed)
    means = [d[torch.randint(len(d), (len(d),), generator=g)].mean() for _ in range(resamples)]
    return torch.stack(means).quantile(torch.tensor([0.025, 0.975]).double()).tolist()


def summarise(rows):
    """-> counts; names and calls in percent of ALL labelled samples; costs per answered sample."""
    labelled = [row["scores"] for row in rows if "scores" in row]
    single = sum(len(row["logp"]) == 1 for row in rows)
    summary = {"samples": {"all": len(rows), "labelled": len(labelled), "with one tool": single}}
    told = [
        f"{r['id']}: {r['decision']}" if "not" in r["decision"] else r["decision"] for r in rows
    ]
    summary["decisions"] = dict(Counter(told))  # what went wrong stands beside its sample
    summary["drafts"] = dict(Counter(d["verdict"] for row in rows for d in row["drafts"]))
    stages = ("prefill", "score", "generate", "train", "answer")
    costs = [row["cost"] for row in rows if row["cost"]] or [{}]
    for unit, name in enumerate(("seconds", "tokens")):
        part = {s: fmean(cost.get(s, (0, 0))[unit] for cost in costs) for s in stages}
        summary[name] = part | {"all": sum(part.values())}
        if all("direct" in cost for cost in costs):  # not of what has no label
            direct = fmean(cost["direct"][unit] for cost in costs)
            summary[name] |= {"direct": direct, "ratio": sum(part.values()) / direct}
    if labelled:
        summary["always first"] = {"name": 100 * fmean(scores["first"] for scores in labelled)}
        for label, side in (("direct", "direct"), ("TT-SI", "answer")):
            grades = [scores[side] for scores in labelled]
            summary[label] = {kind: 100 * fmean(g[kind] for g in grades) for kind in grades[0]}
        change = [scores["answer"]["call"] - scores["direct"]["call"] for scores in labelled]
        low, high = interval(change)
        points = {"call": 100 * fmean(change), "95 % from": 100 * low, "to": 100 * high}
        summary["difference"] = points | {"wins": change.count(1), "losses": change.count(-1)}
    return summary


# ----------------------------------------------------------------------------------- running
def load(name, cfg):
    """-> (model, tokenizer), frozen; safetensors only, and no code that comes with a model runs."""
    found = torch.accelerator.current_accelerator(check_available=True)
    device = str(found or "cpu") if cfg.device == "auto" else cfg.device
    if found and device == str(found) and "LOCAL_RANK" in os.environ:  # torchrun
        device += ":" + os.environ["LOCAL_RANK"]
    dtype = "float32" if cfg.dtype == "auto" and device == "cpu" else cfg.dtype
    how = dict(dtype=dtype, use_safetensors=True, output_loading_info=True, trust_remote_code=False)
    try:
        tok = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(name, **how)
        need(not info["missing_keys"], f"weights are missing: {sorted(info['missing_keys'])}")
        model = model.to(device).eval().requires_grad_(False)
        most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
        tok.model_max_length = min(tok.model_max_length, most)
        need(cfg.prompt != "native" or takes_tools(tok), "its chat template takes no tools")
        ids = to_ids(tok, cfg, render(tok, cfg, [PROBE], [turn("user", "request")])[0])
        write(tok, [*ids, tok.vocab_size - 1], Prefix(model, []), Config(max_new_tokens=1))
    except Exception as e:  # whatever goes wrong in there is about this model or device
        why = f"cannot be loaded on {device}: {' '.join(str(e).split())[:200]}"
        raise InputError(f"{name}: {why}; give a causal language model in safetensors") from e
    return model, tok


def describe(model, tok, cfg):
    """What a run says first: the model, whose form of tools it sees, what no LoRA acts on."""
    layers = linear_layers(model)
    others = [m for m in model.modules() if m not in layers and [*m.parameters(recurse=False)]]
    kinds = Counter(type(m).__name__ for m in others)
    left = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    form = "the template's own" if cfg.prompt != "ours" and takes_tools(tok) else "our"
    size = f"{model.num_parameters():,} parameters, {model.dtype}, {model.device}"
    return f"{size}; {form} tool prompts; LoRA on {len(layers)} linear layers, not on {left}"


def fingerprint(model, tok):
    """What a model is, wherever it lies: configuration, vocabulary, chat template and weights."""
    digest = hashlib.sha256(f"{model.config}{tok.backend_tokenizer.to_str()}".encode())
    digest.update(f"{tok.chat_template}".encode())
    for weight in model.state_dict().values():
        digest.update(weight.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def save(path, lines, mode="w"):
    """Replaces a file in one step, or adds to it ("a"); when this returns it is on the disk."""
    part = f"{path}.{os.environ.get('RANK', '')}part" if mode == "w" else path
    with open(part, mode, encoding="utf-8", newline="\n") as file:
        file.writelines(f"{line}\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def resume(cfg, settings, ids, rank, world):
    """-> (this process's file, the summary's, {id: row} of the whole rows of all processes)."""
    path, stem = Path(cfg.output), cfg.output.removesuffix(".jsonl")
    own = Path(f"{stem}.rank{rank}of{world}.jsonl") if world > 1 else path
    beside = Path(f"{stem}.summary.json")
    ranked = re.compile(re.escape(Path(stem).name) + r"\.rank\d+of\d+\.jsonl")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        need(path.is_file() or not path.exists(), "it is no regular file")
        files = [f for f in path.parent.iterdir() if f == path or ranked.fullmatch(f.name)]
        lines = [line for file in files for line in file.read_bytes().splitlines(keepends=True)]
        begun = json.loads(beside.read_text())["config"] if lines else settings
        for key, value in settings.items():
            need(begun.get(key) == value, f"begun with {key} = {begun.get(key)!r}, not {value!r}")
        whole = [json.loads(line) for line in lines if line.endswith(b"\n")]
        rows = {row["id"]: row for row in whole}  # a line that is torn is none
        need(rows.keys() <= set(ids), "its rows are not those of this run")
        summarise([*rows.values()])  # refuses a row that is none
        save(own, map(dumps, rows.values()))
        save(beside, [json.dumps({"config": settings})])
        for file in (set(files) - {own}) if world == 1 else ():
            file.unlink()
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        raise InputError(f"--output {path}: no output of this run: {e}; take another name") from e
    return own, beside, rows


def run(cfg):
    """Reads, answers, scores, writes -> the summary."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun
    need(not (cfg.trace and cfg.output), "--trace tells one sample and writes no --output")
    need(rank < world and (world == 1 or cfg.output), "each of WORLD_SIZE processes needs --output")
    samples = read_jsonl(cfg.data, to_sample)
    need(cfg.trace in ("", *samples), f"--trace {cfg.trace}: {cfg.data} has no sample of this id")
    ids = [cfg.trace] if cfg.trace else list(samples)[: cfg.limit or None]
    pairs = read_jsonl(cfg.pairs, lambda r: [*decoded(r.get("pairs", []))]) if cfg.pairs else {}
    right = not pairs or (any(map(pairs.get, ids)) and not cfg.teacher)
    need(right, f"--pairs {cfg.pairs}: no pairs for any sample, or a --teacher beside them")
    model, tok = load(cfg.model, cfg)
    teacher = load(cfg.teacher, cfg) if cfg.teacher else None
    settings = dataclasses.asdict(cfg) | {"output": "", "pairs": ""}
    settings["model"] = fingerprint(model, tok)  # what it is, not where it lies
    settings["teacher"] = fingerprint(*teacher) if teacher else ""
    settings["data"] = hashlib.sha256(dumps([samples, pairs]).encode()).hexdigest()[:16]
    own, beside, rows = resume(cfg, settings, ids, rank, world) if cfg.output else ("", "", {})
    told = sum("call" in samples[i] for i in ids)
    none = "" if told else ': no label ("call"), so that answers are written but not scored'
    print(f"{len(ids)} samples of {os.path.relpath(cfg.data)}, {told} labelled{none}")
    print(f"{os.path.relpath(cfg.model)}: {describe(model, tok, cfg)}\n")
    tried = []  # pairs of the uncertain, to tell of a hopeless model
    try:
        for i in tqdm(ids[rank::world], unit="sample", disable=bool(cfg.trace or rank)):
            if i not in rows:
                given = pairs.get(i, []) if pairs else None
                result = tt_si(model, tok, samples[i], cfg, given, teacher)
                rows[i] = to_row(model, tok, samples[i], result, cfg)
                if own:
                    save(own, [dumps(rows[i])], "a")
                if rows[i]["drafts"]:
                    tried.append(rows[i]["pairs"])
                    if len(tried) == 5 and not any(tried):
                        tqdm.write(
                            "no usable pair in the first five: try --teacher, --pairs, --prompt"
                        )
    finally:  # the table so far, whatever ends the run
        summary = summarise([rows[i] for i in ids if i in rows])
        if cfg.trace in rows:  # the label, and the scores by it, come last
            story = {"prompt": "it does not fit"}
            with suppress(InputError):
                story["prompt"] = tok.decode(prepare(tok, samples[cfg.trace], cfg).ids)
            story |= rows[cfg.trace] | {"label": samples[cfg.trace].get("call")}
            for key, part in story.items():
                print(f"\n-- {key}", *(part if isinstance(part, list) else [part]), sep="\n  ")
        elif world == 1:
            for name, part in summary.items():
                print(f"{name:12}", ", ".join(f"{key} {round(v, 3)}" for key, v in part.items()))
    if own and world == 1:
        save(own, [dumps(rows[i]) for i in ids])
        save(beside, [json.dumps(summary | {"config": settings}, indent=1)])
    return summary


def parse_flags(argv):
    """-> Config"""
    parser = transformers.HfArgumentParser(Config, epilog=f"--paper stands for {PAPER}")
    parser.error = lambda message: need(False, f"{message}; -h explains every flag")
    argv = PAPER.split() * ("--paper" in argv) + [a for a in argv if a != "--paper"]
    cfg = Config(**vars(parser.parse_args(argv)))
    for f in dataclasses.fields(Config):
        value = getattr(cfg, f.name)
        need(value != [], f"--{f.name}: a value is missing")  # so argparse reads --k=--
        if f.type in (int, float) and f.name != "seed":
            least = int(f.type is int and f.name not in ("limit", "drafts"))
            need(least <= value <= 10**6, f"--{f.name} {value}: must be from {least} to 1000000")
    one_sided = cfg.k == 1 and not (cfg.drafts or cfg.pairs)
    need(not one_sided, "--k 1 alone would pull to the likeliest tool: --k 2, or --drafts 1")
    return cfg


def main(argv=None):
    """The command line -> the summary, as a dict. Raises InputError, whose text is for the user."""
    new = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24)
    need(new, f"transformers {transformers.__version__} is too old; see requirements.txt")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return run(parse_flags(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # what a console cannot show
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (InputError, MemoryError, OSError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and "memory" not in str(e):
            raise
        print(f"ttsi: {e}", file=sys.stderr)
        sys.exit(2 if isinstance(e, InputError) else 1)
