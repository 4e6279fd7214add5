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

Departures from the paper, and choices where it is silent (--paper sets everything that it states):
 1. Of four drafts at a time, those that pass label-free checks (--check); the closest to x is used.
 2. A pair is written call first. A copy of x is never trained on.
 3. SGD along the normalised gradient (--optimizer; the paper's 1e-4 read as AdamW's). No warm-up.
 4. The LoRA acts behind the tools only (--adapt suffix): one cache of the tools serves every stage.
 5. Tools are offered in a seeded order (--shuffle): benchmarks list the right one first.

N candidates, R rows of T tokens, V vocabulary, K pairs, r rank. A span (ids, begin) is ids[begin:].
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import sys
import time
from collections import Counter
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Literal

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm


def flag(default, text):
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass
class Config:
    """Every field is a flag. [paper]: stated there or reported from it; [ours]: our choice."""

    model: str = flag(f"{Path(__file__).parent}/data/model", "folder or hub name of a model")
    data: str = flag(f"{Path(__file__).parent}/data/demo.jsonl", "samples, JSON lines (README)")
    output: str = flag("", "a JSON row for each sample goes here; a run that was cut off goes on")
    teacher: str = flag("", "a model that writes the drafts in the other's place: TT-D [paper]")
    pairs: str = flag("", "take this file's {id, pairs: [{request, call}]} as drafts, judged alike")
    limit: int = flag(0, "only the first so many samples; 0: all")
    trace: str = flag("", "tell the sample of this id step by step")
    seed: int = flag(0, "of drafts, LoRA initialisation and candidate order")
    device: str = flag("auto", "a torch device; auto: cuda, else mps, else cpu")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "auto", "auto: on a cpu float32"
    )
    shuffle: bool = flag(True, "offer the tools in a seeded order, not the file's [ours]")
    tau: float = flag(0.95, "adapt where the margin is below it; 2: always, 0: never [paper]")
    k: int = flag(1, "pairs to train on, at most [paper]")
    drafts: int = flag(4, "so many at once; the k closest to x of those that pass [ours; paper: 1]")
    attempts: int = flag(4, "so many times at most, until k drafts pass [ours; paper: 1]")
    temperature: float = flag(1.0, "of drafts; answers are greedy [ours]")
    check: bool = flag(True, "drafts must pass the label-free checks [ours]")
    max_new_tokens: int = flag(256, "at most, in a draft or an answer [ours]")
    lora_rank: int = flag(8, "r [paper]")
    lora_alpha: float = flag(16.0, "the LoRA's output is scaled by alpha / r [paper]")
    optimizer: Literal["sgd", "adamw"] = flag("sgd", "steps of length lr [ours], or AdamW [paper]")
    lr: float = flag(0.1, "peak of the cosine schedule [ours; paper: 1e-4, adamw]")
    epochs: int = flag(5, "steps, each on all k pairs [paper: 5, k = 1]")
    adapt: Literal["suffix", "full"] = flag("suffix", "behind the tools [ours], everywhere [paper]")


PAPER = "--k 1 --drafts 1 --attempts 1 --no-check --optimizer adamw --lr 1e-4 --adapt full"


# ------------------------------------------------------------------------------- Algorithm 1
@dataclasses.dataclass
class Result:
    """What Algorithm 1 did with one input. What it did not come to is empty."""

    id: str
    logp: dict = dataclasses.field(default_factory=dict)  # H: tool name -> log P(a_n | x), nats
    margin: float | None = None  # H: u = p(1) - p(2), from 0 to 1
    drafts: list = dataclasses.field(default_factory=list)  # G: all, {text, verdict, pair or None}
    pairs: list = dataclasses.field(default_factory=list)  # G: the K closest, {request, call}
    loss: list = dataclasses.field(default_factory=list)  # T: before each step, nats per token
    decision: str = ""  # "adapted", or why the base answers, or why there is no answer
    answer: str = ""  # the text that the model wrote
    cost: dict = dataclasses.field(default_factory=dict)  # stage -> [seconds, forward tokens]


def tt_si(model, tok, sample, cfg, supplied=None, teacher=None):
    """Algorithm 1 for one input -> Result. Pairs may be supplied, or a teacher's, (model, tok)."""
    result = Result(sample["id"])
    stage = functools.partial(measured, result.cost)
    try:
        x = prepare(model, tok, sample, cfg)
    except InputError as e:  # beyond the context, or refused by the chat template
        result.decision = f"not answered: {e}"
        return result
    with stage("prefill", model):
        after_tools = Prefix(model, x.ids[: x.head])  # read once, for H, G, T and the answer
        after_prompt = Prefix(model, x.ids[:-1], after_tools)

    def by_base(decision):
        with stage("answer", model):
            result.answer = write(tok, x.ids, after_prompt, cfg)[0]
        result.decision = decision
        return result

    with stage("score", model):  # H: l_n = log P(a_n | x)
        result.logp = score(x, after_prompt)
    result.margin = margin(result.logp)  # u = p(1) - p(2)
    if not result.margin < cfg.tau:  # nan is neither
        return by_base("certain" if result.margin >= cfg.tau else "score not finite")

    with stage("generate", teacher[0] if teacher else model):  # G: (x', y') ~ P( . | x)
        result.drafts = generate(*(teacher or (model, tok)), x, after_tools, cfg, supplied)
    result.pairs = closest(result.drafts, x.request)[: cfg.k]
    if not result.pairs:
        return by_base("no pair")
    spans = [pair_span(x, pair) for pair in result.pairs]
    frozen = after_tools if cfg.adapt == "suffix" else Prefix(model, [])
    frozen = frozen.shared_by([ids for ids, _ in spans])  # the LoRA acts behind it
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
    """Adds to cost[stage] its seconds and forward tokens; one with a backward pass counts twice."""
    spent, start, before = cost.setdefault(stage, [0.0, 0]), time.perf_counter(), Prefix.tokens
    yield
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)
    spent[0] += time.perf_counter() - start
    spent[1] += Prefix.tokens - before


# ------------------------------------------------------------------------- H: self-awareness
@torch.no_grad()
def score(x, after_prompt):
    """H. -> {tool name: log P(a_n | x), nats}: over its tokens [paper] and closing quote [ours]."""
    logp = logprob(x.candidates, after_prompt).double().tolist()  # N
    return dict(zip((tool["name"] for tool in x.tools), logp, strict=True))


# FORK HERE: another uncertainty, e.g. 1 - entropy / log N for N > 1. Below tau means uncertain.
def margin(logp):
    """Relative Softmax Scoring: u = p(1) - p(2) of p = softmax(l); without a runner-up 1 [ours]."""
    p = torch.tensor([*logp.values()], dtype=torch.float64).softmax(0)  # (N,)
    first, *second = p.topk(min(2, len(p))).values.tolist()
    return first - sum(second)


# ------------------------------------------------------------------------------ G: self-data
# FORK HERE: another generation prompt; `parse` and `judge` read what it asks for.
DRAFT = (
    "Write a DIFFERENT request of the same kind as the one below, for any of the tools, and its"
    ' call, as a JSON object {"call": {"name": ..., "arguments": {...}}, "request": "..."} and'
    " nothing else.\n\n"
)


def generate(model, tok, x, after_tools, cfg, supplied=None):
    """G. -> drafts [{text, verdict, pair}] that the model, or a teacher, writes until K pass."""
    drafts = []
    for pair in supplied or []:  # they were written elsewhere
        drafts.append(judge(dumps(pair), drafts, x, cfg))
    if supplied is not None:
        return drafts
    try:
        ids, _ = read_prompt(model, tok, x.system, DRAFT + x.request, cfg)
    except InputError as e:
        return [{"text": "", "verdict": str(e), "pair": None}]
    asked = Prefix(model, ids[:-1], after_tools)
    while len(drafts) < cfg.attempts * cfg.drafts and sum(bool(d["pair"]) for d in drafts) < cfg.k:
        draws = [draw(cfg.seed, x.id, "draft", len(drafts) + i) for i in range(cfg.drafts)]
        uniform = torch.stack([torch.rand(cfg.max_new_tokens, generator=g) for g in draws])
        for text in write(tok, ids, asked, cfg, uniform):
            drafts.append(judge(text, drafts, x, cfg))
    return drafts


def judge(text, before, x, cfg):
    """-> a draft {text, verdict, pair or None}; `before` are the drafts before it."""
    verdict, pair = "no JSON object with a request and a call", parse(text) or {}
    request, call = pair.get("request"), to_call(pair.get("call"))
    if isinstance(request, str) and request.strip() and call:
        pair = {"request": request.strip(), "call": call}
        verdict = fault(pair, before, x, cfg)
    return {"text": text, "verdict": verdict or "kept", "pair": None if verdict else pair}


# FORK HERE: checks of your own. They see the request, the tools and earlier drafts, never a label.
def fault(pair, before, x, cfg):
    """What is wrong with a pair {request, call} that was written for x, or ""."""
    request, arguments = pair["request"], pair["call"]["arguments"]
    try:
        pair_span(x, pair)
    except InputError as e:  # the chat template refuses it, or it exceeds the context
        return str(e)
    tool = next((tool for tool in x.tools if tool["name"] == pair["call"]["name"]), {})
    schema = tool.get("parameters") or {}
    rules = schema.get("properties") or {}
    used = [(value, rules[key]) for key, value in arguments.items() if key in rules]
    types = {"string": [str], "integer": [int], "number": [int, float], "boolean": [bool]}
    types |= {"array": [list], "object": [dict]}
    typed = [(type(value), types.get(str(rule.get("type")))) for value, rule in used]
    chosen = [(value, rule["enum"]) for value, rule in used if isinstance(rule.get("enum"), list)]
    earlier = [words(draft["pair"]["request"]) for draft in before if draft["pair"]]
    quoted = [value.casefold() for value in arguments.values() if isinstance(value, str)]
    faults = {
        "tool not on offer": not tool,
        "required argument missing": not set(schema.get("required") or []) <= set(arguments),
        "unknown argument": len(used) < len(arguments),
        "wrong type": any(allowed and kind not in allowed for kind, allowed in typed),
        "value not in enum": any(value not in enum for value, enum in chosen),
        "value not in the request": any(value not in request.casefold() for value in quoted),
        "copy of the request": words(request) == words(x.request),
        "written before": words(request) in earlier,
    }
    if not cfg.check:  # --pairs may hold x, and its label
        faults = {"copy of the request": faults["copy of the request"]}
    return next((name for name, found in faults.items() if found), "")


def words(text):
    return re.findall(r"\w+", text.casefold())


def closest(drafts, request):
    """-> the pairs that passed, those first that share most words with x; rare ones weigh more."""
    pairs = [draft["pair"] for draft in drafts if draft["pair"]]
    found = Counter(word for pair in pairs for word in set(words(pair["request"])))
    weight = {w: math.log((len(pairs) + 1) / (found[w] + 1)) for w in words(request)}

    def overlap(pair):
        return sum(v for word, v in weight.items() if word in words(pair["request"]))

    return sorted(pairs, key=overlap, reverse=True)  # stable: ties stay in order


# ----------------------------------------------------------------------- T: self-improvement
def linear_layers(model):
    """All linear layers but the head; GPT-2's Conv1D is one."""
    kinds = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    head = model.get_output_embeddings()
    return [m for m in model.modules() if isinstance(m, kinds) and m is not head]


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
        gradients = torch.autograd.grad(loss, lora, allow_unused=True, materialize_grads=True)
        if cfg.optimizer == "adamw":
            for p, g in zip(lora, gradients, strict=True):
                p.grad = g
            adamw.param_groups[0]["lr"] = lr
            adamw.step()
        else:  # FORK HERE: another update rule
            norm = torch.nn.utils.get_total_norm(gradients).clamp(min=1e-12)  # of all parameters
            with torch.no_grad():
                for p, g in zip(lora, gradients, strict=True):
                    p -= lr * g / norm
        losses.append(loss.item())
    return losses


# --------------------------------------------------------------------------------- the model
class Prefix:
    """Token ids that a model has read, and the cache that it kept, for rows that continue them.
    These are padded on the right, which causal attention cannot see: no mask, no positions."""

    tokens = 0  # read so far by all models, for `measured`

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
        return self.model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=keep).logits

    def shared_by(self, rows):
        """-> itself, or, if a token merged across its end, the shorter one that all rows share."""
        ids = os.path.commonprefix([self.ids, *rows])  # of any lists
        return self if ids == self.ids else Prefix(self.model, ids)


def logprob(spans, prefix):
    """-> (R,) log P of each of R spans, in nats.

    tokens   t0    t1    t2    t3      the logits at one position
    logits   '---> '---> '---> '       predict the token at the next
    """
    prefix = prefix.shared_by([ids[: begin - 1] for ids, begin in spans])  # begin - 1 predicts it
    n = len(prefix.ids)
    rows = pad_sequence([torch.tensor(ids[n:]) for ids, _ in spans], batch_first=True)  # (R, T)
    labels = torch.full_like(rows, -100)  # what is -100 gives no loss
    for row, (ids, begin) in zip(labels, spans, strict=True):
        row[begin - n : len(ids) - n] = torch.tensor(ids[begin:])
    labels = labels[:, min(begin for _, begin in spans) - n :]  # before, no logits are needed
    logits = prefix.forward(prefix.copy(len(spans)), rows, labels.shape[1] + 1)[:, :-1].float()
    labels = labels.to(logits.device)
    return -torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none").sum(1)


@torch.no_grad()
def write(tok, ids, prefix, cfg, uniform=None):
    """-> [greedy text, up to an end, a call or a pair]; or R texts drawn by uniform (R, tokens)."""
    ends = prefix.model.generation_config.eos_token_id  # alone of that file: no penalties
    ends = {tok.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    prefix = prefix.shared_by([ids[:-1]])
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
                if token in ends or step == cfg.max_new_tokens - 1 or parse(text) is not None:
                    texts[row] = text
        if None not in texts:
            break
    return texts


# ------------------------------------------------------------------------ prompts and tokens
SYSTEM = (
    'Answer the request with one tool call, a JSON object {"name": ..., "arguments": {...}} and'
    " nothing else. Tools:\n"
)
PLAIN = "{{ bos_token }}{% for m in messages %}{{ m.content }}\n\n{% endfor %}Answer:"
RENDER = {"tokenize": False, "add_generation_prompt": True}
RENDER |= {"enable_thinking": False, "date_string": "01 January 2026"}


def prepare(model, tok, sample, cfg):
    """What Algorithm 1 may see of a sample; InputError: template or context cannot take it."""
    tools = sample["tools"]
    if cfg.shuffle:  # by seed and names alone
        tools = sorted(tools, key=lambda tool: tool["name"])
        g = draw(cfg.seed, "order", [tool["name"] for tool in tools])
        tools = [tools[i] for i in torch.randperm(len(tools), generator=g)]
    x = SimpleNamespace(id=sample["id"], tools=tools, tok=tok, context=context(model))
    x.system = SYSTEM + "\n".join(dumps(tool) for tool in tools)
    x.request = user_text(sample["messages"])  # a dialogue is a transcript
    x.ids, x.head = read_prompt(model, tok, x.system, x.request, cfg)
    x.candidates = []  # N spans: each name and its closing quote, as tokenised in a whole answer
    before = render(tok, x.system, x.request)[0] + '{"name": "'
    for tool in tools:
        text = before + dumps(tool["name"])[1:]
        ids, quote, begin = encode(tok, text + ', "arguments"', len(text) - 1, len(before))
        x.candidates.append((ids[: quote + 1], begin))
    return x


def context(model):
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf


def draw(*key):
    """A torch generator seeded by `key` alone: no draw depends on order, resuming or shard."""
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    return torch.Generator().manual_seed(int(digest[:16], 16) >> 1)


def user_text(messages):
    """The request; a dialogue becomes a transcript, earlier calls and results included."""
    turns = []
    for message in messages:
        if text := (message.get("content") or "").strip():
            turns.append(f"{message['role']}: {text}" if len(messages) > 1 else text)
        for call in message.get("tool_calls") or []:
            turns.append(f"call: {dumps(call.get('function', call))}")
    return "\n".join(turns)


def render(tok, system, user):
    """-> (prompt by the chat template, where its system text ends)."""
    template = None if tok.chat_template else PLAIN
    turns = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    for messages in (turns, [{"role": "user", "content": f"{system}\n\n{user}"}]):
        try:
            text = tok.apply_chat_template(messages, chat_template=template, **RENDER)
        except Exception as e:  # jinja2's own: some templates raise on a system role
            text = str(e)
        end = text.find(system) + len(system)
        if system in text and user in text[end:]:  # others drop it silently
            return text, end
    raise InputError(f"the chat template does not hold tools and request: {text[:80]}")


def encode(tok, text, *places):
    """-> (token ids, n, ...): for each character position, n tokens end there or before."""
    out = tok(text, add_special_tokens=False, return_offsets_mapping=True)
    return out.input_ids, *(sum(end <= at for _, end in out.offset_mapping) for at in places)


def read_prompt(model, tok, system, user, cfg):
    """-> (token ids, how many end in or before the system text) of a prompt with room to answer."""
    ids, head = encode(tok, *render(tok, system, user))
    n = len(ids) + cfg.max_new_tokens
    need(n <= context(model), f"prompt and answer, {n} tokens, exceed the context")
    return ids, head


def pair_span(x, pair):
    """-> span of a pair's call after the prompt of its request."""
    prompt, _ = render(x.tok, x.system, pair["request"])
    ids, begin = encode(x.tok, prompt + dumps(pair["call"]), len(prompt))
    need(len(ids) <= x.context, "exceeds the context")
    return ids, begin


# -------------------------------------------------------------------------------------- data
class InputError(ValueError):
    """Bad input, told in one line: where, what is wrong, and what would be right."""


def need(ok, message):
    if not ok:
        raise InputError(message)


DECODER = json.JSONDecoder(parse_constant=lambda name: need(False, f"{name} is not JSON"))
dumps = functools.partial(json.dumps, ensure_ascii=False, allow_nan=False)


def sound(value):
    """A JSON value, or a ValueError: too deep, infinite (1e999), no text for a tokenizer."""
    canonical(value)
    dumps(value).encode()
    return value


def parse(text):
    """The first JSON object in a model's text that is a call or a pair, or None. Untrusted data.
    One still open is not searched inside, or a draft would end with the call that it holds."""
    for brace in re.finditer("{", text):
        try:
            value, _ = DECODER.raw_decode(text, brace.start())
            if "name" in value or value.keys() >= {"call", "request"}:
                return sound(value)
        except json.JSONDecodeError as e:
            if e.msg.startswith("Unterminated") or re.compile(r"[\w.+-]*\s*\Z").match(text, e.pos):
                return None  # it is still open
        except (ValueError, RecursionError):
            return None
    return None


def to_call(value):
    """-> {name, arguments}, or None; the arguments may come as a JSON string."""
    call = value if isinstance(value, dict) else {}
    name, arguments = call.get("name"), call.get("arguments")
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):
            arguments = sound(DECODER.decode(arguments))
    right = isinstance(name, str) and isinstance(arguments, dict)
    return {"name": name, "arguments": arguments} if right else None


def to_sample(record):
    """A record (README: Your own data) -> {id, messages, tools, call?, accept?}."""
    sample = {key: record.get(key) for key in ("id", "messages", "tools", "call", "accept")}
    if "query" in record:
        sample["messages"] = [{"role": "user", "content": record["query"]}]
    right = isinstance(sample["messages"], list) and user_text(sample["messages"])
    need(right, 'no request; give "messages": [{"role": "user", "content": "..."}]')
    sample["tools"] = [tool.get("function", tool) for tool in sample["tools"] or []]
    for tool in sample["tools"]:
        schema = tool.get("parameters") or {}
        rules, required = (schema.get("properties") or {}).values(), schema.get("required") or []
        right = isinstance(tool.get("name"), str) and all(isinstance(key, str) for key in required)
        right = right and all(isinstance(rule, dict) for rule in rules)
        need(right, f'a tool must be {{"name": ..., "parameters": schema}}: {dumps(tool)[:80]}')
    names = [tool["name"] for tool in sample["tools"]]
    right = names and all(names) and len(set(names)) == len(names)
    need(right, f'no tools, or one twice: {names}; give [{{"name": ..., "parameters": ...}}, ...]')
    if sample["call"] is not None:
        sample["call"] = call = to_call(sample["call"])
        right = call and call["name"] in names
        need(right, f'"call" must be {{"name": ..., "arguments": {{...}}}} for one of {names}')
    right = all(isinstance(values, list) for values in (sample["accept"] or {}).values())
    need(right, '"accept" must be {argument: [acceptable values]}')
    return {key: value for key, value in sample.items() if value is not None}


def read_jsonl(path, convert):
    """{id: convert(record)} of a file's lines; the first that is refused is named."""
    found, number = {}, 0
    try:
        for number, line in enumerate(Path(path).read_text("utf-8-sig").split("\n"), 1):
            if line.strip():
                record = sound(DECODER.decode(line))
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
    """Values are compared as strings, once 12.0 is 12; containers element by element."""
    need(levels, "nested more than 100 deep")
    if isinstance(value, dict):
        return {key: canonical(v, levels - 1) for key, v in value.items()}
    if isinstance(value, list):
        return [canonical(v, levels - 1) for v in value]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value.strip() if isinstance(value, str) else json.dumps(value)


def grade(text, sample):
    """-> {"name": right tool?, "call": and right arguments?}; `accept` has its say on these."""
    answer, gold, accept = parse(text) or {}, sample["call"], sample.get("accept")
    name, given = answer.get("name") == gold["name"], (to_call(answer) or {}).get("arguments")
    if not name or given is None:
        return {"name": name, "call": False}
    if accept is None:
        return {"name": name, "call": canonical(given) == canonical(gold["arguments"])}
    right = all(canonical(v) in canonical(accept.get(k, [])) for k, v in given.items())
    return {"name": name, "call": right and all(k in given or "" in accept[k] for k in accept)}


def to_row(model, tok, sample, result, cfg):
    """A Result -> its row: also what answering directly gives and costs, and the grades of both."""
    row, cost = dataclasses.asdict(result), dict(result.cost)
    if result.decision != "adapted":
        row["direct"] = result.answer
        if cost:
            cost["direct"] = [a + b for a, b in zip(cost["prefill"], cost["answer"], strict=True)]
    elif "call" in sample:  # made in order to compare
        ids = prepare(model, tok, sample, cfg).ids
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
        total = sum(part.values())
        direct = fmean([cost["direct"][unit] for cost in costs if "direct" in cost] or [0])
        summary[name] = part | {"all": total, "direct": direct, "ratio": total / (direct or 1)}
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
        ids, _ = read_prompt(model, tok, "tools", "request", Config(max_new_tokens=1))
        write(tok, [*ids, tok.vocab_size - 1], Prefix(model, []), Config(max_new_tokens=1))
    except Exception as e:  # whatever goes wrong in there is about this model or device
        why = f"cannot be loaded on {device}: {' '.join(str(e).split())[:200]}"
        raise InputError(f"{name}: {why}; give a causal language model in safetensors") from e
    return model, tok


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
        whole = [DECODER.decode(line.decode()) for line in lines if line.endswith(b"\n")]
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
    pairs = read_jsonl(cfg.pairs, lambda r: list(r.get("pairs") or [])) if cfg.pairs else {}
    right = not pairs or any(map(pairs.get, ids)) and not cfg.teacher
    need(right, f"--pairs {cfg.pairs}: no pairs for any sample, or a --teacher beside them")
    model, tok = load(cfg.model, cfg)
    teacher = load(cfg.teacher, cfg) if cfg.teacher else None
    settings = dataclasses.asdict(cfg) | {"output": "", "pairs": ""}
    settings["model"] = fingerprint(model, tok)  # what it is, not where it lies
    settings["teacher"] = fingerprint(*teacher) if teacher else ""
    settings["data"] = hashlib.sha256(dumps([samples, pairs]).encode()).hexdigest()[:16]
    own, beside, rows = resume(cfg, settings, ids, rank, world) if cfg.output else ("", "", {})
    layers = f"LoRA on {len(linear_layers(model))} linear layers"
    print(f"{len(ids)} samples of {os.path.relpath(cfg.data)}; {os.path.relpath(cfg.model)}:")
    print(f"{model.num_parameters():,} parameters, {model.dtype}, {model.device}, {layers}\n")
    try:
        for i in tqdm(ids[rank::world], unit="sample", disable=bool(cfg.trace or rank)):
            if i not in rows:
                given = pairs.get(i, []) if pairs else None
                result = tt_si(model, tok, samples[i], cfg, given, teacher)
                rows[i] = to_row(model, tok, samples[i], result, cfg)
                if own:
                    save(own, [dumps(rows[i])], "a")
    finally:  # the table so far, whatever ends the run
        summary = summarise([rows[i] for i in ids if i in rows])
        if cfg.trace in rows:  # the label, and the scores by it, come last
            story = {"prompt": "it does not fit"}
            with suppress(InputError):
                story["prompt"] = tok.decode(prepare(model, tok, samples[cfg.trace], cfg).ids)
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
    """-> Config; a dash and an underscore in a flag's name are one."""
    parser = transformers.HfArgumentParser(Config, epilog=f"--paper stands for {PAPER}")
    parser.error = lambda message: need(False, f"{message}; -h explains every flag")
    argv = PAPER.split() * ("--paper" in argv) + [a for a in argv if a != "--paper"]
    cfg = Config(**vars(parser.parse_args(argv)))
    for f in dataclasses.fields(Config):
        if f.type in (int, float) and f.name != "seed":
            least, value = int(f.type is int and f.default > 0), getattr(cfg, f.name)
            need(least <= value <= 10**6, f"--{f.name} {value}: must be from {least} to 1000000")
    return cfg


def main(argv=None):
    """The command line -> the summary, as a dict. Raises InputError, whose text is for the user."""
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
