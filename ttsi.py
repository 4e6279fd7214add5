"""TT-SI in one file: a language model that improves itself while it answers.

"Self-Improving LLM Agents at Test-Time" (Acikgoz et al., 2025, arXiv 2510.07841). For every input x, on its own:

    H  l_n = log P(a_n | x) for each tool name a_n on offer; p = softmax(l); margin u = p(1) - p(2)
       u >= tau: certain, answer with the base parameters
    G  u <  tau: uncertain, the model itself writes K similar pairs (x', y'); it never sees the label of x
    T  a temporary LoRA is trained on these pairs, x is answered with it,
       and everything is reset: nothing is carried over to the next input

    python ttsi.py                                  # embedded model and data, offline
    python ttsi.py --trace demo-000                 # one sample, step by step
    python ttsi.py --model Qwen/Qwen2.5-0.5B-Instruct --data calls.jsonl --output runs/qwen.jsonl

Departures from the paper, and what it leaves open (--paper sets everything that the paper states):
 1. Drafts must pass label-free checks; the paper keeps whatever is written (--no-check).
 2. A pair is written call first, request second; the paper shows no prompt.
 3. The update is SGD normalised per adapter; the paper's is AdamW at 1e-4 (--optimizer adamw --lr 1e-4). Its
    warm-up of 3 % is less than one of five steps: there is none here.
 4. The adapter may act only after the tool list, whose key/value cache is then shared by every stage
    (--adapt suffix); the paper's acts on every token (--adapt full).
 5. Tools are offered in a seeded random order: benchmarks tend to list the right one first (--no-shuffle).
 6. Several samples are processed at once, each with an adapter of its own: same result, less time (--batch-size).

Shapes: b samples, N candidates, R rows of T tokens, V vocabulary, r rank, K pairs per sample.
"""
import argparse
import copy
import dataclasses
import functools
import hashlib
import json
import math
import os
import random
import re
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent


class InputError(Exception):
    """Bad input, told in one line: where, what is wrong, and what would be right."""


# ---------------------------------------------------------------------------------------------- configuration

def flag(default, text, **kw):
    return dataclasses.field(default=default, metadata={"help": text, **kw})


@dataclasses.dataclass
class Config:
    """Every field is a flag; [paper] is stated by the paper or its reviewers, [ours] is our choice."""
    model: str = flag(str(HERE / "data/model"), "folder or hub name of a causal language model")
    data: str = flag(str(HERE / "data/demo.jsonl"), "JSONL of samples: messages (or query), tools, call (the label, optional)")
    output: str = flag("", "write one JSON row per sample here, and a summary beside it; a run that was cut off goes on")
    pairs: str = flag("", "JSONL of {id, pairs: [{request, call}]} to train on instead of self-written ones")
    limit: int = flag(0, "only the first so many samples; 0: all", least=0)
    ids: str = flag("", "only these samples, separated by commas")
    trace: str = flag("", "tell the sample of this id step by step")
    seed: int = flag(0, "of drafts, adapter initialisation and candidate order")
    device: str = flag("auto", "auto (cuda, mps or cpu), or a torch device")
    dtype: str = flag("auto", "of the frozen base; auto: float32 on a CPU, else the checkpoint's own",
                      choices=("auto", "float32", "bfloat16", "float16"))
    batch_size: int = flag(0, "samples at once, each with its own adapter; 0: 25 for the embedded model, else 1 [ours]",
                           least=0)
    shuffle: bool = flag(True, "offer the tools in a seeded order instead of the file's [ours]")
    # H
    tau: float = flag(0.95, "adapt where the margin is below [paper]", least=0.0)
    score: str = flag("sum", "log-probability of a name: summed over its tokens [paper], or their mean",
                      choices=("sum", "mean"))
    select: str = flag("uncertain", "which samples to adapt [paper: uncertain; its controls: certain, all]",
                       choices=("uncertain", "certain", "all"))
    # G
    k: int = flag(1, "pairs to train on [paper]", least=1)
    drafts: int = flag(1, "drafts written at once; if more than k pass, those closest to the request are kept [ours]",
                       least=1)
    attempts: int = flag(4, "times that drafts are written until k pass the checks [ours]", least=1)
    cover: bool = flag(False, "drafts take the tools on offer in turn instead of the model's choice [ours]")
    temperature: float = flag(1.0, "of the drafts; answers are greedy [ours]", least=0.0)
    check: bool = flag(True, "keep only drafts that pass the label-free checks [ours]")
    max_new_tokens: int = flag(256, "for a draft or an answer [ours]", least=1)
    # T
    lora_rank: int = flag(8, "r [paper]", least=1)
    lora_alpha: float = flag(16.0, "the adapter's output is scaled by alpha / r [paper]", least=0.0)
    optimizer: str = flag("sgd", "sgd: every step has length lr in each adapter [ours]; adamw [paper]",
                          choices=("sgd", "adamw"))
    lr: float = flag(0.1, "peak of the cosine schedule [ours; paper: 1e-4 with adamw]", least=0.0)
    epochs: int = flag(5, "steps, each on all k pairs [paper: 5, k = 1]", least=0)
    adapt: str = flag("suffix", "where the adapter acts: every token [paper: full], or only after the tool list [ours]",
                      choices=("full", "suffix"))


PAPER = dict(tau=0.95, score="sum", select="uncertain", k=1, drafts=1, attempts=1, cover=False, check=False,
             lora_rank=8, lora_alpha=16.0, optimizer="adamw", lr=1e-4, epochs=5, adapt="full")


# ---------------------------------------------------------------------------------------------- data

def read_jsonl(path):
    """-> [(line number, object)]; one InputError names every line that is not a JSON object."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({e}); give a JSONL file, one object per line") from e
    rows, errors = [], []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                rows.append((number, loads(line)))
            except ValueError as e:
                errors.append(f"{path}:{number}: not a JSON object ({e}); each line must be one")
    if errors:
        raise InputError("\n".join(errors))
    return rows


def reject(constant):
    raise ValueError(f"{constant} is not JSON")


DECODER = json.JSONDecoder(parse_constant=reject)


def loads(text):
    """One JSON object; no NaN or infinity, no nesting beyond the parser's."""
    try:
        value = DECODER.decode(text.strip())
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"it is a {type(value).__name__}")
    return value


def read_samples(path):
    """Canonical records (README, "Your data") -> samples; one InputError names every bad line."""
    samples, errors, seen = [], [], set()
    for number, record in read_jsonl(path):
        try:
            sample = normalise(record, number)
            if sample["id"] in seen:
                raise InputError(f'id "{sample["id"]}" stands on an earlier line too; ids must differ')
            seen.add(sample["id"])
            samples.append(sample)
        except InputError as e:
            errors.append(f"{path}:{number}: {e}")
    if errors:
        raise InputError("\n".join(errors))
    if not samples:
        raise InputError(f"{path}: no samples; each line must be one JSON object")
    return samples


def normalise(record, number):
    messages = [{"role": "user", "content": record["query"]}] if "query" in record else record.get("messages")
    if not (isinstance(messages, list) and messages and all(
            isinstance(m, dict) and isinstance(m.get("role"), str)
            and isinstance(m.get("content") or "", str) for m in messages)):
        raise InputError('no request; give "query": "..." or "messages": [{"role": "user", "content": "..."}]')
    if not any((m.get("content") or "").strip() for m in messages):
        raise InputError("the request is empty; it needs some text")
    tools = record.get("tools")
    if not isinstance(tools, list) or not tools:
        raise InputError('no tools; "tools" must be a list of {"type": "function", "function": {...}}')
    tools = [t.get("function", t) if isinstance(t, dict) else t for t in tools]
    for t in tools:
        if not (isinstance(t, dict) and isinstance(t.get("name"), str) and t["name"]):
            raise InputError('a tool without a name; each needs {"name": "...", "parameters": {JSON schema}}')
        schema = t.get("parameters") or {}
        if not (isinstance(schema, dict) and isinstance(schema.get("properties") or {}, dict)
                and all(isinstance(p, dict) for p in (schema.get("properties") or {}).values())
                and isinstance(schema.get("required") or [], list)):
            raise InputError(f'tool "{t["name"]}": "parameters" must be a JSON schema with "properties"')
    names = [t["name"] for t in tools]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f'tool "{name}" is offered twice; names must differ')
    sample = {"id": str(record.get("id", number)), "messages": messages, "tools": tools}
    if record.get("call") is not None:
        call = record["call"]
        arguments = call.get("arguments", {}) if isinstance(call, dict) else None
        if isinstance(arguments, str):
            try:
                arguments = loads(arguments or "{}")
            except ValueError as e:
                raise InputError(f'the arguments of "call" are no JSON object ({e})') from e
        if not isinstance(arguments, dict):
            raise InputError('"call" must be {"name": "...", "arguments": {...}}')
        if call.get("name") not in names:
            raise InputError(f'"call" names {json.dumps(call.get("name"))}, which is not among the tools {names}')
        sample["call"] = {"name": call["name"], "arguments": arguments}
    if record.get("accept") is not None:
        if not (isinstance(record["accept"], dict) and all(isinstance(v, list) for v in record["accept"].values())):
            raise InputError('"accept" must hold a list of acceptable values for each argument')
        sample["accept"] = record["accept"]
    return sample


# ---------------------------------------------------------------------------------------------- prompts

SYSTEM = ('Answer the request with one tool call, a JSON object {"name": ..., "arguments": {...}} and nothing else.'
          ' Tools:\n')
# FORK HERE: another generation prompt (its answer is read and checked in `check`).
DRAFT = ('Write a DIFFERENT request of the same kind as the one below, for any of the tools, and its call, as a JSON'
         ' object {"call": {"name": ..., "arguments": {...}}, "request": "..."} and nothing else.\n\n')


def dumps(value):
    return json.dumps(value, ensure_ascii=False)


def system_text(tools):
    """The tool list, one JSON object per line. It comes first, so that all that follows can share its cache."""
    return SYSTEM + "\n".join(dumps(t.get("function", t)) for t in tools)


def user_text(messages):
    """The request; a dialogue becomes a transcript in one message, earlier calls and results included."""
    if len(messages) == 1 and messages[0]["role"] == "user":
        return messages[0]["content"].strip()
    turns = []
    for m in messages:
        if (m.get("content") or "").strip():
            turns.append(f'{m["role"]}: {m["content"].strip()}')
        turns += [f'call: {dumps(c.get("function", c))}' for c in m.get("tool_calls") or []]
    return "\n".join(turns)


def render(tok, system, user):
    """-> (prompt text, length of its part that ends with the system text), by the model's own chat template."""
    if not tok.chat_template:
        head = (tok.bos_token or "") + system
        return f"{head}\n\nRequest: {user}\nAnswer:\n", len(head)
    for messages in ([{"role": "system", "content": system}, {"role": "user", "content": user}],
                     [{"role": "user", "content": f"{system}\n\n{user}"}]):  # for templates without a system role
        try:
            text = tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True,
                                           enable_thinking=False, date_string="01 January 2026")
        except Exception as e:  # jinja2's TemplateError and kin: some templates raise on a system role
            error = e
            continue
        if system in text and user in text:  # some drop a system message silently
            return text, text.index(system) + len(system)
        error = "it drops the system or the user message"
    raise InputError(f"the model's chat template cannot hold a system and a user message ({error})")


def encode(tok, text, *at):
    """-> (token ids, n for each character position in `at`): token n is the first that reaches beyond it.

    Prompt and answer are tokenised as one text: a token may straddle the boundary, and then it is the answer's."""
    out = tok(text, add_special_tokens=False, return_offsets_mapping=True)
    return out.input_ids, *(sum(end <= a for _, end in out.offset_mapping) for a in at)


def draw(*key):
    """A 63-bit seed from `key` alone, so that nothing drawn depends on order, batch, resume or shard."""
    return int.from_bytes(hashlib.sha256(json.dumps(key).encode()).digest()[:8], "big") >> 1


def prepare(model, tok, sample, cfg):
    """What Algorithm 1 may see of a sample: request, tools, prompt. The label stays behind."""
    tools = sorted(sample["tools"], key=lambda t: t["name"]) if cfg.shuffle else sample["tools"]
    if cfg.shuffle:  # a function of seed and names, so that samples with one tool list share one order
        random.Random(draw(cfg.seed, "order", [t["name"] for t in tools])).shuffle(tools)
    x = {"id": sample["id"], "request": user_text(sample["messages"]), "system": system_text(tools), "tools": tools,
         "names": [t["name"] for t in tools], "label": "call" in sample, "cost": {}}
    x["prompt"], head = render(tok, x["system"], x["request"])
    x["ids"], x["head"] = encode(tok, x["prompt"], head)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    x["room"] = context - cfg.max_new_tokens
    x["error"] = "" if len(x["ids"]) <= x["room"] else (
        f'a prompt of {len(x["ids"])} tokens and {cfg.max_new_tokens} new ones exceed the context of {context}')
    return x


# ---------------------------------------------------------------------------------------------- tokens and cache

class Past(NamedTuple):
    """What the model has read: token ids of each row, their key/value cache, and (R, slots) which slots are real."""
    ids: list
    cache: object
    mask: torch.Tensor


def forward(model, rows, past=None, owner=None, keep=1):
    """Logits (R, keep, V) at the last `keep` positions of R token rows, and the Past that they leave behind.

    Row j continues row owner[j] of `past`, whose tokens are not computed again. Rows are padded on the left: all
    end together, and only the positions that matter go through the head. `past` itself is not changed.
    """
    owner = list(range(len(rows))) if owner is None else owner
    past = past or Past([[]] * (max(owner) + 1), None, torch.zeros(max(owner) + 1, 0, dtype=torch.long))
    assert all(row[:len(past.ids[o])] == past.ids[o] for row, o in zip(rows, owner)), "a row must continue its past"
    new = [row[len(past.ids[o]):] for row, o in zip(rows, owner)]
    width = max(map(len, new))
    ids = torch.tensor([[0] * (width - len(n)) + n for n in new])
    mask = torch.tensor([[0] * (width - len(n)) + [1] * len(n) for n in new])
    mask = torch.cat([past.mask[owner], mask], 1)  # (R, slots + T)
    position = (mask.cumsum(1) - 1).clamp(min=0)[:, -width:]  # pads do not count
    cache = past.cache
    if cache is not None:  # updates rebind a layer's tensors, so a shallow copy is a fresh cache
        cache = copy.copy(cache)
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        if owner != list(range(len(past.ids))):
            cache.reorder_cache(torch.tensor(owner, device=model.device))
    out = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device),
                position_ids=position.to(model.device), past_key_values=cache,
                use_cache=cache is not None or not torch.is_grad_enabled(), logits_to_keep=keep)
    return out.logits, Past(rows, out.past_key_values, mask)


def token_logprobs(model, rows, n, past=None, owner=None):
    """(R, L) log-probability of the last n[j] tokens of row j, L = max(n), right-aligned, 0 elsewhere.

        tokens        t0   t1   t2   t3        the logits at one position
        logits        |--> |--> |--> |         predict the token at the next
    """
    L = max(n)
    logits = forward(model, rows, past, owner, keep=L + 1)[0][:, :-1]  # (R, L, V)
    target = torch.tensor([[0] * (L - len(row[-L:])) + row[-L:] for row in rows], device=logits.device)
    logp = logits.float().log_softmax(-1).gather(-1, target[..., None])[..., 0]
    wanted = torch.arange(L) >= L - torch.tensor(n)[:, None]
    return logp.masked_fill(~wanted.to(logp.device), 0.0)


@torch.no_grad()
def decode(model, tok, rows, start, limit, past=None, owner=None, temperature=0.0, uniform=None):
    """-> R texts from token start[j] of row j on, each ended by an end token, a closed JSON object, or `limit`.

    temperature 0 is greedy; else uniform (R, limit) in [0, 1) is sent through the inverse of the cumulative
    distribution: a row's draws are its own, whatever else is in the batch. No generation_config is read.
    """
    ends = {tok.eos_token_id}
    for e in (model.generation_config.eos_token_id, model.config.get_text_config().eos_token_id):
        ends.update(e if isinstance(e, list) else [e])
    texts, new, live = [""] * len(rows), [[] for _ in rows], set(range(len(rows)))
    logits, past = forward(model, rows, past, owner)
    for t in range(limit):
        if temperature == 0:
            token = logits[:, -1].argmax(-1)
        else:
            cdf = (logits[:, -1].float() / temperature).softmax(-1).cumsum(-1)  # (R, V)
            u = uniform[:, t, None].to(cdf.device) * cdf[:, -1:]
            token = torch.searchsorted(cdf, u, right=True)[:, 0].clamp(max=cdf.shape[1] - 1)
        token = token.tolist()
        for j in sorted(live):
            if token[j] in ends:
                live.remove(j)
                continue
            new[j].append(token[j])
            texts[j] = tok.decode(rows[j][start[j]:] + new[j], skip_special_tokens=True,
                                  clean_up_tokenization_spaces=False)
            if "}" in tok.decode(token[j]) and parse(texts[j]) is not None:
                live.remove(j)
        if not live or t == limit - 1:
            return texts
        logits, past = forward(model, [ids + [k] for ids, k in zip(past.ids, token)], past)  # rows that ended idle on


def parse(text):
    """The JSON object that begins at the first brace of a model's text, or None. Model output is untrusted data."""
    try:
        return DECODER.raw_decode(text, text.index("{"))[0]
    except (ValueError, RecursionError):
        return None


# ---------------------------------------------------------------------------------------------- stages

def metered(f):
    """Adds the stage's seconds and forward-token equivalents to each sample's "cost", in equal shares.

    A token with its backward pass counts twice: the base is frozen, so no gradients of its weights are computed.
    """
    @functools.wraps(f)
    def stage(model, tok, xs, *args, name=f.__name__, **kw):
        if not xs:
            return []
        tokens = []
        hook = model.register_forward_pre_hook(lambda _, args, kw: tokens.append(
            kw["input_ids"].numel() * (1 + torch.is_grad_enabled())), with_kwargs=True)
        start = time.perf_counter()
        try:
            return f(model, tok, xs, *args, **kw)
        finally:
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            hook.remove()
            for x in xs:
                s, t = x["cost"].get(name, (0, 0))
                x["cost"][name] = (s + seconds / len(xs), t + sum(tokens) / len(xs))
    return stage


@metered
@torch.no_grad()  # not inference_mode: T's gradients pass through what is cached here
def prefill(model, tok, xs, rows, past=None):
    return forward(model, rows, past)[1]


@metered
def answer(model, tok, xs, past, cfg):
    """Greedy answers, one text for each sample."""
    return decode(model, tok, [x["ids"] for x in xs], [len(x["ids"]) for x in xs], cfg.max_new_tokens, past,
                  [x["slot"] for x in xs])


# ---------------------------------------------------------------------------------------------- H: self-awareness

@metered
@torch.no_grad()
def score(model, tok, xs, past, cfg):
    """H. -> for each sample its N log-probabilities log P(a_n | x), in the order of x["names"].

    A name is tokenised inside its whole answer, and summed from its first token through the token that holds the
    closing quote: without a terminator, a name that begins another one could never lose to it.
    """
    spans = [name_tokens(tok, x["prompt"], '{"name": ', name) for x in xs for name in x["names"]]
    owner = [x["slot"] for x in xs for _ in x["names"]]
    n = [end - begin for _, begin, end in spans]
    logp = token_logprobs(model, [ids for ids, _, _ in spans], n, past, owner).sum(1).tolist()  # R = sum of the N
    if cfg.score == "mean":
        logp = [l / tokens for l, tokens in zip(logp, n)]
    flat = iter(logp)
    return [[next(flat) for _ in x["names"]] for x in xs]


def name_tokens(tok, prompt, opening, name):
    """(token ids of prompt + opening + "name", cut after the closing quote; first and past-the-last index of name")"""
    text = prompt + opening + dumps(name)
    ids, begin, quote = encode(tok, text + ', "arguments"', len(prompt + opening) + 1, len(text) - 1)
    return ids[:quote + 1], begin, quote + 1


# FORK HERE: another uncertainty, e.g. 1 - entropy / log N instead of the margin. Below tau means uncertain.
def certainty(logp):
    """Relative Softmax Scoring: margin u = p(1) - p(2) of p = softmax(l). One candidate has no runner-up: 1 [ours]."""
    p = softmax(logp)
    return 1.0 if len(p) == 1 else sorted(p)[-1] - sorted(p)[-2]


def softmax(logp):
    return torch.tensor(logp, dtype=torch.float64).softmax(0).tolist()


# ---------------------------------------------------------------------------------------------- G: self-data

@metered
def generate(model, tok, xs, past, cfg):
    """G. The model writes drafts, up to `attempts` times, until K pass -> for each sample [{text, verdict, pair}]."""
    drafts = [[] for _ in xs]
    for attempt in range(cfg.attempts):
        rows, start, uniform, owner = [], [], [], []
        for i, x in enumerate(xs):
            if sum(d["pair"] is not None for d in drafts[i]) >= cfg.k:
                continue
            prompt, _ = render(tok, x["system"], DRAFT + x["request"])
            ids, begin = encode(tok, prompt, len(prompt))
            for d in range(attempt * cfg.drafts, (attempt + 1) * cfg.drafts):
                name = x["names"][d % len(x["names"])]
                row = name_tokens(tok, prompt, '{"call": {"name": ', name)[0] if cfg.cover else ids
                if len(row) > x["room"]:
                    drafts[i].append({"text": "", "verdict": "draft prompt exceeds the context", "pair": None})
                    continue
                rows.append(row)
                start.append(begin)
                generator = torch.Generator().manual_seed(draw(cfg.seed, x["id"], "draft", d))
                uniform.append(torch.rand(cfg.max_new_tokens, generator=generator))
                owner.append(i)
        if not rows:
            break
        texts = decode(model, tok, rows, start, cfg.max_new_tokens, past, [xs[i]["slot"] for i in owner],
                       cfg.temperature, torch.stack(uniform))
        for i, text in zip(owner, texts):
            drafts[i].append(judge(parse(text), text, xs[i], drafts[i], cfg))
    return drafts


def judge(draft, text, x, before, cfg):
    """One draft, parsed -> {text, verdict, pair or None}."""
    call, request = (draft or {}).get("call"), (draft or {}).get("request")
    if not (isinstance(call, dict) and isinstance(call.get("name"), str) and isinstance(call.get("arguments"), dict)
            and isinstance(request, str) and request.strip()):
        return {"text": text, "verdict": "no JSON object with a request and a call", "pair": None}
    pair = {"request": request.strip(), "call": {"name": call["name"], "arguments": call["arguments"]}}
    verdict = check(pair, x, [d["pair"]["request"] for d in before if d["pair"]]) if cfg.check else ""
    return {"text": text, "verdict": verdict or "kept", "pair": None if verdict else pair}


# FORK HERE: checks of your own. Label-free: they see the request, the tools on offer and earlier drafts, no more.
def check(pair, x, before):
    """What is wrong with a pair {request, call} written for the sample x, or "" """
    name, arguments = pair["call"]["name"], pair["call"]["arguments"]
    if name not in x["names"]:
        return "tool not on offer"
    schema = x["tools"][x["names"].index(name)].get("parameters") or {}
    properties = schema.get("properties") or {}
    if any(key not in arguments for key in schema.get("required") or []):
        return "required argument missing"
    for key, value in arguments.items():
        if key not in properties:
            return "unknown argument"
        if not has_type(value, properties[key].get("type")):
            return "wrong type"
        if isinstance(properties[key].get("enum"), list) and value not in properties[key]["enum"]:
            return "value not in enum"
        if isinstance(value, str) and value.casefold() not in pair["request"].casefold():
            return "value not in the request"
    if words(pair["request"]) == words(x["request"]):
        return "copy of the request"
    if words(pair["request"]) in map(words, before):
        return "written before"
    return ""


TYPES = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict}


def has_type(value, wanted):
    """JSON schema types; what is no plain known type passes."""
    if not isinstance(wanted, str) or wanted not in TYPES:
        return True
    return isinstance(value, TYPES[wanted]) and isinstance(value, bool) == (wanted == "boolean")  # True is an int


def words(text):
    return re.findall(r"\w+", text.casefold())


def closest(request, pairs):
    """Pairs by the words that they share with the request, most first; a word rare among the pairs weighs more."""
    bags = [set(words(p["request"])) for p in pairs]
    weight = {w: math.log((len(bags) + 1) / (sum(w in bag for bag in bags) + 1)) for w in words(request)}
    overlap = [sum(v for w, v in weight.items() if w in bag) for bag in bags]
    return [pairs[i] for i in sorted(range(len(pairs)), key=lambda i: -overlap[i])]  # stable: ties stay in order


def supplied(xs, pairs, cfg):
    """In place of G: drafts out of a file. A copy of the sample's own request is refused, checks or no checks."""
    drafts = [[] for _ in xs]
    for i, x in enumerate(xs):
        for pair in pairs.get(x["id"], []):
            drafts[i].append(judge(pair, dumps(pair), x, drafts[i], cfg))
            if drafts[i][-1]["pair"] and words(drafts[i][-1]["pair"]["request"]) == words(x["request"]):
                drafts[i][-1].update(verdict="copy of the request", pair=None)
    return drafts


# ---------------------------------------------------------------------------------------------- T: self-improvement

# FORK HERE: another adapter. `fresh` makes the parameters of one layer for b samples, `delta` is what they add to y.
def fresh(layer, generators, cfg):
    """A uniform in +-1/sqrt(d_in), B = 0: before the first step the adapter changes nothing. Always float32."""
    d_in, d_out = (layer.in_features, layer.out_features) if hasattr(layer, "in_features") else (layer.nx, layer.nf)
    A = torch.stack([torch.rand(d_in, cfg.lora_rank, generator=g) * 2 - 1 for g in generators]) / d_in ** 0.5
    return [A, torch.zeros(len(generators), cfg.lora_rank, d_out)]  # (b, d_in, r), (b, r, d_out)


def delta(x, parameters, cfg):
    """(b, tokens, d_in) -> (b, tokens, d_out)

        x --+-- W, frozen ------------------------------+--> y
            +-- A (d_in, r) -- B (r, d_out) -- alpha/r -+
    """
    A, B = parameters
    return cfg.lora_alpha / cfg.lora_rank * (x @ A @ B)


def linear_layers(model):
    """All linear layers but the head; GPT-2's Conv1D is one."""
    return [m for m in model.modules() if m is not model.get_output_embeddings()
            and (isinstance(m, torch.nn.Linear) or type(m).__name__ == "Conv1D")]


@contextmanager
def adapters(model, xs, cfg):
    """One temporary adapter for each of b samples on every linear layer; leaving the block is the reset.

    Adapter i acts on the i-th of b equal groups of rows. The base is never written, so there is nothing to restore.
    """
    generators = [torch.Generator().manual_seed(draw(cfg.seed, x["id"], "adapter")) for x in xs]
    theta, hooks = [], []
    try:
        for layer in linear_layers(model) if xs else []:
            parameters = [p.to(model.device).requires_grad_() for p in fresh(layer, generators, cfg)]

            def add(_, inputs, y, parameters=parameters):
                x = inputs[0].reshape(len(xs), -1, inputs[0].shape[-1]).float()  # some models flatten rows and tokens
                return y + delta(x, parameters, cfg).reshape(y.shape).to(y.dtype)
            hooks.append(layer.register_forward_hook(add))
            theta += parameters
        yield theta
    finally:
        for hook in hooks:
            hook.remove()


@metered
def train(model, tok, xs, theta, past, cfg):
    """T. Trains adapter i on x_i's pairs, in place -> for each sample its losses, one a step.

    The loss is a SUM over samples, so each adapter gets exactly the gradient that it would get alone; a sample's is
    the mean over its pairs of the mean over the answer's tokens. Missing pairs are padded with weight 0.
    """
    K = max(len(x["pairs"]) for x in xs)
    padded = [(x, pair) for x in xs for pair in (x["pairs"] + [None] * K)[:K]]
    rows, n, weight = [], [], []
    for x, pair in padded:
        prompt, _ = render(tok, x["system"], pair["request"] if pair else x["request"])
        ids, begin = encode(tok, prompt + (dumps(pair["call"]) if pair else "{}"), len(prompt))
        rows.append(ids)
        n.append(len(ids) - begin)
        weight.append(1 / n[-1] / len(x["pairs"]) if pair else 0.0)
    weight = torch.tensor(weight, device=model.device)
    adamw = torch.optim.AdamW(theta, weight_decay=0.0) if cfg.optimizer == "adamw" else None  # afresh: no old moments
    losses = []
    for step in range(cfg.epochs):
        logp = token_logprobs(model, rows, n, past, [x["slot"] for x, _ in padded])  # (b K, L)
        loss = -(logp.sum(1) * weight).view(len(xs), K).sum(1)  # (b,)
        for p, g in zip(theta, torch.autograd.grad(loss.sum(), theta, allow_unused=True)):
            p.grad = torch.zeros_like(p) if g is None else g
        lr = cfg.lr * (1 + math.cos(math.pi * step / cfg.epochs)) / 2
        if adamw:
            adamw.param_groups[0]["lr"] = lr
            adamw.step()
        else:
            sgd(theta, lr)
        losses.append(loss.tolist())
    return [list(column) for column in zip(*losses)] or [[] for _ in xs]


# FORK HERE: another update rule.
@torch.no_grad()
def sgd(theta, lr):
    """p <- p - lr g / |g|, |g| the norm over all parameters of one sample's adapter, never across samples [ours]"""
    norm = sum(p.grad.flatten(1).square().sum(1) for p in theta).sqrt().clamp(min=1e-12)  # (b,)
    for p in theta:
        p -= lr * p.grad / norm.view(-1, *[1] * (p.dim() - 1))


# ---------------------------------------------------------------------------------------------- Algorithm 1

def tt_si(model, tok, samples, cfg, pairs=None):
    """Algorithm 1 for b independent samples at once -> their rows, in order. b = 1 is the paper, literally.

    pairs: {id: [{request, call}]} to take instead of G. No label is read: `prepare` leaves it behind.
    """
    rows = [prepare(model, tok, s, cfg) for s in samples]
    xs = [x for x in rows if not x["error"]]
    note(xs, slot=range(len(xs)))
    tools = prefill(model, tok, xs, [x["ids"][:x["head"]] for x in xs])            # read the tool list once
    asked = prefill(model, tok, xs, [x["ids"][:-1] for x in xs], tools)            # then the request

    note(xs, logp=score(model, tok, xs, asked, cfg))                               # H  l_n = log P(a_n | x)
    note(xs, margin=[certainty(x["logp"]) for x in xs])                            #    u = p(1) - p(2)
    chosen = [x for x in xs if gate(x, cfg)]                                       #    u < tau: uncertain

    note(chosen, drafts=generate(model, tok, chosen, tools, cfg) if pairs is None  # G  (x', y') ~ P( . | x)
         else supplied(chosen, pairs, cfg))
    for x in chosen:
        x["pairs"] = closest(x["request"], [d["pair"] for d in x["drafts"] if d["pair"]])[:cfg.k]
    learners = [x for x in chosen if x["pairs"]]                                   #    no pair, no training

    past = tools if cfg.adapt == "suffix" else None
    with adapters(model, learners, cfg) as theta:                                  # T  theta' = theta + LoRA
        note(learners, loss=train(model, tok, learners, theta, past, cfg))
        note(learners, adapted=answer(model, tok, learners, past, cfg))            #    answer with theta'
        if cfg.trace:
            note(learners, after=score(model, tok, learners, past, cfg, name="trace"))
    # Reset: the block has ended, the adapters are gone; the base parameters were never written.

    direct = [x for x in xs if x["label"] or "adapted" not in x]                       # answer with theta: the certain,
    note(direct, direct=answer(model, tok, direct, asked, cfg, name="direct"))     # and the others to compare with
    return rows


# FORK HERE: another gate.
def gate(x, cfg):
    return cfg.select == "all" or (x["margin"] < cfg.tau) == (cfg.select == "uncertain")


def note(xs, **columns):
    for key, values in columns.items():
        for x, value in zip(xs, values):
            x[key] = value


# ---------------------------------------------------------------------------------------------- scoring (reads labels)

def plain(value):
    """Values are compared as strings, once 12.0 is 12 and True is true; containers element by element."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value.strip() if isinstance(value, str) else json.dumps(value)


def grade(text, sample):
    """-> {"name": right tool, "call": right tool and arguments}. `accept`, if given, lists what is right instead."""
    call, gold, accept = parse(text or "") or {}, sample["call"], sample.get("accept")
    given, name = call.get("arguments"), call.get("name") == gold["name"]
    if not name or not isinstance(given, dict):
        right = False
    elif accept is None:
        right = plain(given) == plain(gold["arguments"])  # an extra argument is wrong
    else:
        right = (all(key in accept and plain(v) in map(plain, accept[key]) for key, v in given.items())
                 and all(key in given or "" in values for key, values in accept.items()))
    return {"name": name, "call": right}


def finish(x, sample, cfg):
    """What Algorithm 1 left of a sample -> its row: all that is needed to check a decision by hand, and the grades."""
    row = {key: x[key] for key in ("id", "error", "margin", "drafts", "pairs", "loss", "direct", "adapted", "cost") if key in x}
    for key in ("logp", "after"):
        if key in x:
            row["candidates" if key == "logp" else "after"] = [
                {"name": a, "logp": l, "p": p} for a, l, p in zip(x["names"], x[key], softmax(x[key]))]
    row["why"] = (x["error"] or ("one candidate" if len(x["names"]) == 1 else
                                 f'margin {x["margin"]:.3f} {"<" if x["margin"] < cfg.tau else ">="} tau {cfg.tau:g}')
                  + (f', {cfg.select} adapted' if cfg.select != "uncertain" else "")
                  + (", no draft was kept" if x.get("pairs") == [] else ""))
    row["answer"] = row.get("adapted", row.get("direct", ""))
    row["call"] = parse(row["answer"])
    if "call" in sample:
        row["scores"] = {"direct": grade(row.get("direct"), sample), "ttsi": grade(row["answer"], sample),
                         "first": sample["tools"][0]["name"] == sample["call"]["name"]}
    return row


def interval(differences, resamples=10_000, seed=0):
    """Paired bootstrap over items: the 2.5 and 97.5 % quantiles of the mean difference."""
    d = torch.tensor(differences, dtype=torch.float64)
    g = torch.Generator().manual_seed(seed)
    means = torch.stack([d[torch.randint(len(d), (len(d),), generator=g)].mean() for _ in range(resamples)])
    return means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()


def summarise(rows, cfg):
    """-> counts, accuracies in percent over ALL labelled samples, the paired difference, and cost per sample."""
    scored = [r["scores"] for r in rows if "scores" in r]
    verdicts = [d["verdict"] for r in rows for d in r.get("drafts", [])]
    out = {"n": len(rows), "labelled": len(scored), "adapted": sum("adapted" in r for r in rows),
           "one_candidate": sum(len(r.get("candidates", [])) == 1 for r in rows),
           "failed": {r["id"]: r["error"] for r in rows if r["error"]},
           "drafts": len(verdicts), "verdicts": {v: verdicts.count(v) for v in sorted(set(verdicts))}}
    stages = sorted({stage for r in rows for stage in r["cost"]})
    out["cost"] = {s: [sum(r["cost"].get(s, (0, 0))[i] for r in rows) / len(rows) for i in (0, 1)] for s in stages}
    both = [r["cost"] for r in rows if "direct" in r["cost"]]
    direct = [sum(c["prefill"][i] + c["direct"][i] for c in both) / max(1, len(both)) for i in (0, 1)]
    ttsi = [sum(v[i] for r in rows for s, v in r["cost"].items()
                if s != "trace" and not (s == "direct" and "adapted" in r)) / len(rows) for i in (0, 1)]
    out["direct"], out["ttsi"] = ({"seconds": c[0], "tokens": c[1]} for c in (direct, ttsi))
    if scored:
        mean = lambda values: 100 * sum(values) / len(scored)
        out["always_first"] = mean(s["first"] for s in scored)
        for side in ("direct", "ttsi"):
            out[side].update({kind: mean(s[side][kind] for s in scored) for kind in ("name", "call")})
        change = [s["ttsi"]["call"] - s["direct"]["call"] for s in scored]
        low, high = interval(change)
        out["difference"] = {"call": mean(change), "low": 100 * low, "high": 100 * high,
                             "wins": change.count(1), "losses": change.count(-1)}
    return out


def table(s):
    """The summary for people."""
    rows = [["", "name", "call", "difference [95 %]", "wins", "losses", "s/sample", "", "tokens/sample", ""]]
    if s["labelled"]:
        rows.append(["always first", f'{s["always_first"]:.1f}', *"-" * 8])
    for label, side in (("direct", "direct"), ("TT-SI", "ttsi")):
        c, d = s[side], s.get("difference") if side == "ttsi" else None
        rows.append([label, *(f"{c[kind]:.1f}" if kind in c else "-" for kind in ("name", "call")),
                     *([f'{d["call"]:+.1f} [{d["low"]:+.1f}, {d["high"]:+.1f}]', d["wins"], d["losses"]] if d else "---")])
        for unit, digits in (("seconds", 3), ("tokens", 0)):
            ratio = c[unit] / s["direct"][unit] if s["direct"][unit] else math.nan
            rows[-1] += [f"{c[unit]:.{digits}f}", f"({ratio:.1f}x)"]
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows)]
    return "\n".join("  ".join([f"{row[0]:{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(row[1:], widths[1:]))])
                     for row in rows)


def notes(s, cfg):
    """What the table does not show."""
    yield (f'{s["adapted"]}/{s["n"]} samples adapted (margin below {cfg.tau:g}); {s["drafts"]} drafts: '
           + (", ".join(f"{n} {verdict}" for verdict, n in s["verdicts"].items()) or "none"))
    if s["one_candidate"]:
        yield f'{s["one_candidate"]} samples offer one tool only: no margin, never uncertain'
    for i, error in s["failed"].items():
        yield f'not answered, counted as wrong: {i}: {error}'
    if 0 < s["labelled"] < 300:
        yield (f'With {s["labelled"]} samples the 95 % interval is wide; see README.md for the table on the full test'
               ' split.' if cfg.data == Config.data else f'With {s["labelled"]} samples the 95 % interval is wide.')


def trace(x, row, sample, tok, cfg):
    """One sample as the paper's Figure 1 tells it. The label comes last, after all that could not see it."""
    def bars(candidates):
        for c in sorted(candidates, key=lambda c: -c["p"]):
            print(f'  {"#" * round(30 * c["p"]):30} {c["p"]:.3f}  log P {c["logp"]:8.3f}  {c["name"]}')
    print(f'== {row["id"]}\n\n-- The prompt\n{x["prompt"]}\n\n-- H: how likely is each tool on offer?')
    bars(row.get("candidates", []))
    print(f'  {row["why"]}')
    if "drafts" in row:
        print("\n-- G: write a similar request and its call; the tool list stays, the last message becomes"
              f"\n{DRAFT}{x['request']}\n")
        for i, d in enumerate(row["drafts"], 1):
            print(f'  draft {i}: {d["text"]}\n           {d["verdict"]}')
        for pair in row["pairs"]:
            print(f'  to train on: {pair["request"]}\n           ->  {dumps(pair["call"])}')
    if "adapted" in row:
        print(f"\n-- T: a temporary LoRA of rank {cfg.lora_rank} on these pairs")
        for step, loss in enumerate(row["loss"], 1):
            print(f"  step {step}: loss {loss:.4f}")
        print("  the candidates after it:")
        bars(row["after"])
    print(f'\n-- The answer\n  before: {row.get("direct")}')
    print(f'  after:  {row.get("adapted", "the same, nothing was trained")}\n  and everything is reset')
    if "call" in sample:
        print(f'\n-- The label, which nothing above has seen\n  {dumps(sample["call"])}')
        for side, text in (("before", "direct"), ("after", "ttsi")):
            print(f'  {side}: {"right" if row["scores"][text]["call"] else "wrong"}'
                  f'{"" if row["scores"][text]["name"] else " tool"}')


# ---------------------------------------------------------------------------------------------- running

def load(cfg):
    """-> (model, tokenizer), frozen, from safetensors only."""
    device = cfg.device if cfg.device != "auto" else (
        "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    dtype = cfg.dtype if cfg.dtype != "auto" else "float32" if device == "cpu" else "auto"
    try:
        tok = AutoTokenizer.from_pretrained(cfg.model, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            cfg.model, dtype=dtype if dtype == "auto" else getattr(torch, dtype), trust_remote_code=False, use_safetensors=True)
        model = model.to(device).eval().requires_grad_(False)
    except Exception as e:  # whatever goes wrong in there is about this model
        raise InputError(f"--model {cfg.model}: cannot be loaded on {device} ({(str(e).strip() or repr(e)).splitlines()[0]});"
                         " give a folder or hub name of a causal language model in safetensors") from e
    if not tok.is_fast:
        raise InputError(f"--model {cfg.model}: its tokenizer cannot tell character offsets; a fast one is needed")
    if not linear_layers(model):
        raise InputError(f"--model {cfg.model}: no linear layer to adapt")
    return model, tok


def read_pairs(path):
    """{id, pairs: [{request, call}]} a line -> {id: pairs}; a run's own --output is such a file."""
    pairs = {}
    for number, row in read_jsonl(path):
        found = row.get("pairs") or []
        if "id" not in row or not isinstance(found, list) or not all(isinstance(p, dict) for p in found):
            raise InputError(f'{path}:{number}: no pairs; give {{"id": ..., "pairs": [{{"request": ..., "call": {{...}}}}]}}')
        pairs[str(row["id"])] = found
    return pairs


def select(samples, cfg):
    wanted = [i for i in (cfg.trace or cfg.ids).split(",") if i]
    for i in wanted:
        if i not in {s["id"] for s in samples}:
            raise InputError(f'{cfg.data}: no sample has the id "{i}"; the first ids are'
                             f' {", ".join(s["id"] for s in samples[:3])}')
    samples = [s for s in samples if s["id"] in wanted] if wanted else samples
    return samples[:cfg.limit] if cfg.limit else samples


def resume(cfg, settings, batches):
    """Opens cfg.output -> (file, {id: row} of earlier whole batches). What was torn or partial is done again."""
    path, rows = Path(cfg.output), {}
    beside = path.with_suffix(".summary.json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size:
            if not beside.exists():
                raise InputError(f"--output {path}: exists, without the {beside.name} of a run; choose another name")
            before = loads(beside.read_text(encoding="utf-8")).get("config", {})
            for key, value in settings.items():
                if before.get(key) != value:
                    raise InputError(f"--output {path}: begun with {key} = {before.get(key)!r}, now {value!r};"
                                     " choose another name, or the same settings")
            for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
                try:
                    row = loads(line)
                    rows[row["id"]] = row
                except ValueError:
                    break
        rows = {s["id"]: rows[s["id"]] for b in batches if all(s["id"] in rows for s in b) for s in b}
        fresh_copy = path.with_name(path.name + ".tmp")
        fresh_copy.write_text("".join(dumps(r) + "\n" for r in rows.values()), encoding="utf-8")
        os.replace(fresh_copy, path)
        beside.write_text(json.dumps({"config": settings}, indent=1), encoding="utf-8")
        return open(path, "a", encoding="utf-8"), rows
    except (OSError, ValueError) as e:
        raise InputError(f"--output {path}: cannot be used ({e})") from e


def run(cfg):
    """Reads, answers, scores, writes -> the summary."""
    samples = select(read_samples(cfg.data), cfg)
    pairs = read_pairs(cfg.pairs) if cfg.pairs else None
    size = cfg.batch_size or (25 if cfg.model == Config.model else 1)
    batches = [samples[i:i + size] for i in range(0, len(samples), size)]  # of the selection and the size alone
    settings = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in ("output", "trace")}
    settings["data_sha256"] = hashlib.sha256(Path(cfg.data).read_bytes()).hexdigest()
    out, done = resume(cfg, settings, batches) if cfg.output else (None, {})
    model, tok = load(cfg)
    layers = linear_layers(model)
    adapter = sum(p.numel() for layer in layers for p in fresh(layer, [torch.Generator()], cfg))
    print(f"{len(samples)} samples of {cfg.data}\nmodel {cfg.model}: {model.num_parameters() / 1e6:.1f} M parameters,"
          f" {model.dtype} on {model.device}; an adapter: {len(layers)} layers, {adapter / 1e6:.2f} M\n", flush=True)
    for batch in tqdm(batches, unit="batch", disable=bool(cfg.trace)):
        if batch[0]["id"] in done:
            continue
        xs = tt_si(model, tok, batch, cfg, pairs)
        rows = [finish(x, s, cfg) for x, s in zip(xs, batch)]
        done.update((r["id"], r) for r in rows)
        if cfg.trace:
            trace(xs[0], rows[0], batch[0], tok, cfg)
        if out:
            out.write("".join(dumps(r) + "\n" for r in rows))
            out.flush()
            os.fsync(out.fileno())
    summary = summarise([done[s["id"]] for s in samples], cfg)
    summary.update(config=settings, versions={"python": sys.version.split()[0], "torch": torch.__version__,
                                              "transformers": transformers.__version__})
    if out:
        out.close()
        Path(cfg.output).with_suffix(".summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    if not cfg.trace:
        print(table(summary) + "\n\n" + "\n".join(notes(summary, cfg)))
    return summary


def parse_flags(argv):
    def error(message):
        raise InputError(f"{message}; -h explains every flag")
    parser = argparse.ArgumentParser(prog="ttsi.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = error
    for f in dataclasses.fields(Config):
        how = {"action": argparse.BooleanOptionalAction} if isinstance(f.default, bool) else {"type": type(f.default)}
        shown = "" if f.default == "" else f" (default: {os.path.relpath(f.default) if f.name in ('model', 'data') else f.default})"
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, choices=f.metadata.get("choices"),
                            help=f.metadata["help"].replace("%", "%%") + shown, **how)
    parser.add_argument("--paper", action="store_true", help="everything that the paper states: "
                        + ", ".join(f"{k} {v}" for k, v in PAPER.items()) + "; other flags still count")
    argv = [re.sub("_", "-", a.split("=")[0]) + a[len(a.split("=")[0]):] if a.startswith("--") else a for a in argv]
    if "--paper" in argv:
        parser.set_defaults(**PAPER)
    flags = vars(parser.parse_args(argv))
    flags.pop("paper")
    for f in dataclasses.fields(Config):
        least = f.metadata.get("least")
        if least is not None and not (least <= flags[f.name] < math.inf):
            raise InputError(f"--{f.name.replace('_', '-')} {flags[f.name]}: must be at least {least}")
    return Config(**flags)


def main(argv=None):
    """The command line -> the summary, as a dict. Raises InputError, whose text is for the user."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return run(parse_flags(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    try:
        main()
    except InputError as e:
        print(f"ttsi: {e}", file=sys.stderr)
        sys.exit(2)
