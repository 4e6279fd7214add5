"""TT-SI in one file: a language model that improves itself while it answers.

"Self-Improving LLM Agents at Test-Time" (Acikgoz et al., arXiv 2510.07841), for each x:
    H  l_n = log P(a_n | x) for each tool name a_n, p = softmax(l), u = p(1) - p(2)
       u >= tau: certain, answer with the base parameters
    G  u <  tau: uncertain, it writes K similar pairs (x', y') itself, without a label
    T  a temporary LoRA is trained on them, x is answered with it, all is reset

Departures from the paper, and choices where it is silent:
 1. x is answered first. A flaw, such as a value not in its request: uncertain, too.
 2. A pair for each of the two likeliest tools (flaw alone: of the called one), its tool and keys
    dictated; if one fails, none. It is written call first; a copy of x is never trained on.
 3. Polyak's step, on calls alone, as a native template spells and ends them; a cosine, no warm-up.
 4. The LoRA acts behind the tools only (--adapt suffix): their cache serves every stage.
 5. Tools are offered in a seeded order: benchmarks list the right one first (--no-shuffle).
--paper undoes the departures: of 1 that flaws count, of 2 the first sentence, of 3 the step, and 4.

N candidates, p(1) >= p(2) >= ..., R rows of T tokens (L scored), V vocabulary, K pairs, r rank. In
a span (ids, begin), ids[begin:] is scored behind ids[:begin]. FORK HERE: a place for another idea.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import signal
import ssl
import sys
import time
import unicodedata
import urllib.request
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_args

if __name__ == "__main__":  # Ctrl-C while torch is loading, which swallows exceptions
    note = b"ttsi: stopped before the first sample\n"
    was = signal.signal(signal.SIGINT, lambda *_: (os.write(2, note), os._exit(130)))

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

VERSION = "3.0"
DATA = Path(__file__).parent / "data"


def field(default, text):
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass
class Config:  # every field is a flag; [paper]: stated there or reported; [ours]: chosen
    # model and data
    model: str = field(f"{DATA}/model", "folder or hub name; default: the embedded model")
    data: str = field("", "JSON lines; default: everyday.jsonl, embedded model: demo.jsonl")
    limit: int = field(0, "only the first so many samples; 0: all")
    # H; where the default is True, the flag is --no-..., and the text is of that
    tau: float = field(0.95, "adapt where the margin is below; 2: always, 0: never [paper]")
    shuffle: bool = field(True, "offer the tools in the file's order, not a seeded one [ours]")
    # G
    k: int = field(2, "pairs: one for each of k likely tools, or k free ones [ours; paper: 1]")
    drafts: int = field(4, "written for each of these tools, at once [ours; paper: 1]")
    given: Literal["keys", "name", "nothing"] = field("keys", "what of a call is dictated [ours]")
    temperature: float = field(0.9, "of drafts; answers are greedy [ours]")
    check: bool = field(True, "do not check drafts (but for copies of x) and answers [ours]")
    teacher: str = field("", "a model that writes the drafts in its place: TT-D [paper]")
    pairs: str = field("", "file of {id, pairs: [{request, call}]} to be taken as drafts")
    # T
    lora_rank: int = field(8, "r [paper]")
    lora_alpha: float = field(16.0, "the LoRA's output is scaled by alpha / r [paper]")
    optimizer: Literal["polyak", "adamw"] = field("polyak", "of a step; adamw wants an --lr [ours]")
    lr: float = field(1.0, "polyak: share of the loss that step 1 takes [ours; paper: 1e-4]")
    epochs: int = field(5, "steps, each on all k pairs [paper: 5, k = 1]")
    adapt: Literal["suffix", "full"] = field("suffix", "LoRA behind the tools [ours], or all over")
    # running
    output: str = field("", "file for a JSON row a sample; a run that was cut off goes on")
    trace: str = field("", "tell the sample of this id step by step")
    seed: int = field(0, "of drafts, LoRA initialisation and tool order")
    max_new_tokens: int = field(256, "at most, in an answer; about, in a draft [ours]")
    device: str = field("auto", "a torch device; auto: an accelerator, else cpu")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field("auto", "auto: float32 on cpu")


# ------------------------------------------------------------------ Algorithm 1
@dataclasses.dataclass
class Result:  # what Algorithm 1 did with one input, as --trace tells it
    id: str
    direct: str = field("", "what the base writes")
    flaw: str = field("", "what label-free checks say of that")
    logp: dict = field(None, "H: l_n of each tool, nats, from the first token that differs")
    margin: float = field(None, "H: u = p(1) - p(2), from 0 to 1; uncertain below tau")
    drafts: list = field((), "G: all that were written, with what the checks say")
    pairs: list = field((), "G: those to train on")
    loss: list = field(None, "T: before each step, nats per token of a call, mean of the pairs")
    decision: str = field("", "adapted, or why the base answers, or why nothing does")
    answer: str = field("", "what it writes in the end")
    cost: dict = field(None, "{stage: [seconds, tokens read]}")


def tt_si(model, tok, sample, cfg, writer=None):
    """Algorithm 1 for one input -> Result. A teacher (model, tok) may be the writer."""
    result = Result(sample["id"], cost={})
    stage = functools.partial(measured, model, result.cost)
    model.eval()  # it may come in training mode

    with stage("read"):
        x = prepare(tok, sample, cfg)
        after_tools = Prefix(model, x.ids[: x.head])
        after_prompt = Prefix(model, x.ids[:-1], after_tools)
    with stage("direct"):
        result.direct = result.answer = write(tok, x.ids, after_prompt, cfg)[0]
        x.call = parse(result.direct) or {"name": "", "arguments": {}}
        result.flaw = flaw(x.call, x.request, x)
    with stage("score"):  # H: l_n = log P(a_n | x), u = p(1) - p(2)
        result.logp = score(x, after_prompt)
        result.margin = margin(result.logp)

    tools = doubtful_tools(result, x, cfg)  # none: certain
    if tools:
        # G: (x', y') ~ P( . | x). None if its prompt is too long, or the template refuses it.
        with stage("generate"), suppress(InputError):
            result.drafts = generate(*(writer or (model, tok)), x, after_tools, tools, cfg)
            result.pairs = choose(result.drafts, tools, cfg)
    if not result.pairs:
        result.decision = "no pair" if tools else "certain"
        return result

    with stage("train"):
        # The base reads what all begin with, and the LoRA acts behind it.
        spans = [span(tok, x, pair["request"], pair["call"]) for pair in result.pairs]
        head = x.ids[: x.head] if cfg.adapt == "suffix" else []
        shared = os.path.commonprefix([head, *(ids for ids, _ in spans)])
        frozen = Prefix(model, shared, after_tools)
    with temporary_lora(model, cfg, draw(cfg.seed, x.id, "adapter")) as lora:
        with stage("train"):  # T: theta' = theta + LoRA, trained on (x', y')
            result.loss = train(spans, frozen, lora, cfg)
        with stage("answer"):  # y = argmax P'( . | x), x read afresh behind `frozen`
            result.answer = write(tok, x.ids, frozen, cfg)[0]
    # Reset: the LoRA has gone with its block; the base was never written.
    result.decision = "adapted"
    return result


# ------------------------------------------------------------ H: self-awareness
@torch.no_grad()
def score(x, after_prompt):
    """H. -> {tool name: l_n, nats}, from the first token in which candidates differ."""
    logp = []  # N
    for i in range(0, len(x.candidates), 8):  # so that memory does not grow with N
        logp += logprob(x.candidates[i : i + 8], after_prompt).tolist()
    need(all(map(math.isfinite, logp)), "the scores of its tools are no numbers")
    return dict(zip(x.schemas, logp, strict=True))


def margin(logp):  # FORK HERE: another certainty, 0 to 1, for a --tau of its own
    """Relative Softmax Scoring: u = p(1) - p(2); without a runner-up p(1) [ours]."""
    p = torch.tensor([*logp.values()], dtype=torch.float64).softmax(0)  # (N,)
    first, *second = p.topk(min(2, len(p))).values.tolist()
    return first - sum(second)


def certainty(u, flaw_found, cfg):
    """-> u, but 0 where the direct answer has a flaw [ours]: below tau it is uncertain."""
    return 0.0 if flaw_found and cfg.check else u


def doubtful_tools(result, x, cfg):
    """-> the tools to write pairs for: the K likeliest where u < tau; where a flaw alone makes
    it uncertain [ours], that call's tool, or the likeliest; none where it is certain."""
    likeliest = sorted(result.logp, key=result.logp.get, reverse=True)
    if certainty(result.margin, result.flaw, cfg) >= cfg.tau:
        return []
    if result.margin < cfg.tau:
        return likeliest[: cfg.k]
    called = x.call["name"]
    return [called if called in x.schemas else likeliest[0]]


# ----------------------------------------------------------------- G: self-data
# FORK HERE: another generation prompt, whose form `outline` and `judge` know. A model that was
# taught one has it as `draft` in its config.json.
DRAFT = (
    "{request}\n\n"
    "That was one user. Now invent a different user, who asks for the same kind of thing, but about"
    ' something else entirely. Write a JSON object {"call": {"name": ..., "arguments": {...}},'
    ' "request": "..."} and nothing else. No value may be the same as above, and the request must'
    " say all values."
)
GAP = "\0"  # in an outline: here the model writes a JSON value
UNSAID = "a value is not in the request"  # or paraphrased there: such pairs are chosen last
TYPES = {"string": [str], "integer": [int], "number": [int, float], "boolean": [bool]}
TYPES |= {"array": [list], "object": [dict]}
MORE = ("additionalProperties", "anyOf", "oneOf", "allOf", "$ref")  # may add arguments


def generate(model, tok, x, after_tools, tools, cfg):
    """G. -> drafts {text, verdict, pair or None}: cfg.drafts a tool, in one batch, or supplied."""
    texts = x.supplied
    if texts is None:
        outlines, rngs = [], []
        # Optional keys: of the called tool those whose value x says, of another a draw.
        stated = {key for key, value in x.call["arguments"].items() if said(value, x.request)}
        for tool in tools:
            chosen = stated if tool == x.call["name"] else None
            for n in range(cfg.drafts):
                rng = draw(cfg.seed, x.id, tool, n)
                outlines.append(outline(tool, x.schemas[tool], cfg.given, rng, chosen))
                rngs.append(rng)
        ids, _ = span(tok, x, draft_prompt(model, x.request))
        asking = Prefix(model, ids[:-1], after_tools)
        texts = write(tok, ids, asking, cfg, outlines, rngs)
    return [judge(text, x, cfg) for text in texts]


def draft_prompt(model, request):
    """-> what asks for a draft: DRAFT, or what the model was taught."""
    return getattr(model.config, "draft", DRAFT).replace("{request}", request)


def outline(name, schema, given, rng, chosen=None):
    """-> a draft as texts, between which (|) the model writes JSON values; a quote or brace
    before | begins its value. Optional arguments: those chosen, or a random half.

    nothing  {|   or {"|
    name     {"call": {"name": "book", "arguments":|}, "request": "|}
    keys     {"call": {"name": "book", "arguments": {"city": "|, "nights":|}}, "request": "|}
    """
    if given == "nothing":
        return ["{", ""]
    keys = []
    for key, rule in schema["properties"].items():
        quote = ' "' if rule.get("type") == "string" else ""
        drawn = torch.rand((), generator=rng) < 0.5
        wanted = drawn if chosen is None else key in chosen
        if key in schema["required"] or wanted:
            keys.append(f"{dumps(key)}:{quote}{GAP}")
    arguments = " {" + ", ".join(keys) + "}"
    if given == "name" or not lists_all(schema):
        arguments = GAP
    text = f'{{"call": {{"name": {dumps(name)}, "arguments":{arguments}}}, "request": "{GAP}}}'
    return text.split(GAP)


def judge(text, x, cfg):
    """-> a draft {text, verdict, pair}; pair is None where the text holds none."""
    pair, verdict = None, "no request and call, or too long"
    with suppress(MALFORMED):
        value = composed(DECODER.decode(text))
        pair = {"request": value["request"].strip(), "call": to_call(value["call"])}
        span(x.tok, x, pair["request"], pair["call"])  # does it fit the context?
        fault = flaw(pair["call"], pair["request"], x) if cfg.check else ""
        # Refused even unchecked: --pairs might hold x with its label.
        if any(copies(pair["request"], turn) for turn in x.turns):
            fault = "copy of the request"
        verdict = fault or "kept"
    return {"text": text, "verdict": verdict, "pair": pair}


def copies(request, turn):
    """Is a request a turn of x, or around one of three words and more, or without a word?"""
    texts = request.casefold(), turn.casefold()
    new, old = (" ".join(re.findall(r"\w+", text)) for text in texts)
    return new in ("", old) or (old.count(" ") > 1 and f" {old} " in f" {new} ")


def flaw(call, request, x):  # FORK HERE: checks of your own
    """-> what is wrong with a call, by the tools of x and the request; or ""."""
    if call["name"] not in x.schemas:
        return "no call of a tool on offer"
    arguments, schema = call["arguments"], x.schemas[call["name"]]
    rules = schema["properties"]
    missing = (set(schema["required"]) & rules.keys()) - arguments.keys()
    unknown = arguments.keys() - rules.keys()
    if missing or (unknown and lists_all(schema)):
        return "arguments missing or unknown"
    unsaid = ""
    for key, value in arguments.items():
        rule = rules.get(key, {})
        kinds = TYPES.get(str(rule.get("type")), [type(value)])
        if type(value) not in kinds or value not in (rule.get("enum") or [value]):
            return "wrong type or not in enum"
        if not rule.get("enum") and not said(value, request):
            unsaid = UNSAID
    return unsaid


def lists_all(schema):
    """Are all of a tool's arguments among its properties?"""
    return not any(map(schema.get, MORE))


def said(value, request):
    """Does a request hold a value? Texts anywhere, numbers whole, no empty one; others always."""
    if value in ("", [], {}):
        return False
    if type(value) in (int, float):
        number = re.escape(str(value).removesuffix(".0"))  # not within another
        return bool(re.search(rf"(?<![\d.]){number}(?!\.?\d)", request))
    return not isinstance(value, str) or value.casefold() in request.casefold()


def choose(drafts, tools, cfg):
    """-> up to K pairs to train on: one for each of the tools, or none, as some of them would
    bias the answer to theirs; of supplied drafts or free ones (given nothing) the first K."""
    usable = [draft["pair"] for draft in drafts if draft["verdict"] == "kept"]
    usable += [draft["pair"] for draft in drafts if draft["verdict"] == UNSAID]
    if cfg.given == "nothing" or cfg.pairs:
        return usable[: cfg.k]
    # Reversed, as what comes later overwrites: of each tool the first stays.
    pair_of = {pair["call"]["name"]: pair for pair in reversed(usable)}
    return [pair_of[tool] for tool in tools] if pair_of.keys() >= set(tools) else []


# ---------------------------------------------------------- T: self-improvement
@contextmanager  # FORK HERE: another adapter
def temporary_lora(model, cfg, rng):
    """A LoRA on each nn.Linear of the decoder -> its parameters. Leaving the block resets.

    x --+-- W, frozen --------------------------------+--> y     A uniform, +-1/sqrt(d_in);
        '-- A (d_in, r) -- B (r, d_out) -- alpha / r -'          B = 0: nothing changes yet
    """
    parameters, r, scale = [], cfg.lora_rank, cfg.lora_alpha / cfg.lora_rank
    layers = [m for m in model.get_decoder().modules() if isinstance(m, torch.nn.Linear)]
    with ExitStack() as hooks:
        for layer in layers:
            d_in, d_out = layer.in_features, layer.out_features
            A = (torch.rand(d_in, r, generator=rng) * 2 - 1) / d_in**0.5
            A = A.to(model.device).requires_grad_()
            B = torch.zeros(r, d_out, device=model.device, requires_grad=True)

            def add(layer, inputs, y, A=A, B=B):  # inputs[0] (R, T, d_in), y (R, T, d_out)
                return (y + scale * (inputs[0].float() @ A @ B)).to(y.dtype)

            hooks.callback(layer.register_forward_hook(add).remove)
            parameters += [A, B]
        yield parameters


def train(spans, frozen, lora, cfg):
    """T. Steps on the LoRA, in place -> the loss before each, nats per token of a call."""
    adamw = cfg.optimizer == "adamw"
    optimizer = torch.optim.AdamW(lora, weight_decay=0.0) if adamw else torch.optim.SGD(lora)
    lengths = torch.tensor([len(ids) - begin for ids, begin in spans])  # (K,)
    losses = []
    for epoch in range(cfg.epochs):
        optimizer.zero_grad()
        loss = -(logprob(spans, frozen) / lengths.to(lora[0].device)).mean()
        loss.backward(inputs=lora)  # the base may not be frozen
        losses.append(loss.item())
        norm = torch.nn.utils.get_total_norm([p.grad for p in lora if p.grad is not None]).item()
        if not 0 < norm < math.inf:  # zero, infinite or no number: no further step
            break
        lr = cfg.lr * (1 + math.cos(math.pi * epoch / cfg.epochs)) / 2
        if not adamw:  # FORK HERE: another update rule
            # Polyak's step: takes the fraction lr of the loss away, were it linear.
            lr *= losses[-1] / norm**2
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    return losses


# -------------------------------------------------------------------- the model
class Prefix:
    """Token ids that a model has read, and its cache of them, for rows that continue them:
    padded on the right, which causal attention cannot see, so no mask and no positions."""

    tokens = 0  # read so far by all prefixes, padding too, for `measured`

    @torch.no_grad()  # not inference_mode: autograd saves what is cached here
    def __init__(self, model, ids, before=None):
        self.model, self.ids, new = model, ids, ids
        self.cache = transformers.DynamicCache(config=model.config)
        if before and before.model is model and ids[: len(before.ids)] == before.ids:
            self.cache = before.copy(1)
            new = ids[len(before.ids) :]
        if new:
            self.forward(self.cache, torch.tensor([new]), 1)

    def copy(self, rows):
        cache = deepcopy(self.cache)
        cache.batch_repeat_interleave(rows)
        return cache

    def forward(self, cache, new, keep):
        """Reads new (R, T) behind a cache, in place -> (R, keep, V) the last logits."""
        Prefix.tokens += new.numel() * (1 + torch.is_grad_enabled())
        ids = new.to(self.model.device)
        # Given an int (a slice), the output layer would copy its weight for each row.
        indices = torch.arange(new.shape[1])[-keep:]
        # `cache`: past_key_values, before transformers 5.24.
        return self.model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=indices).logits


@contextmanager
def measured(model, cost, stage):
    """Adds seconds and tokens read, padding too, to a stage; backward passes count again."""
    spent = cost.setdefault(stage, [0.0, 0])
    start, before = time.perf_counter(), Prefix.tokens
    yield
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)
    spent[0] += time.perf_counter() - start
    spent[1] += Prefix.tokens - before


def logprob(spans, prefix):
    """-> (R,) nats: of R spans (ids, begin), log P of ids[begin:] behind ids[:begin].
    All of them begin with the prefix, and every `begin` is behind it.

    tokens   t0    t1    t2    t3      the logits at one position
    logits   '---> '---> '---> '       predict the token at the next
    """
    n = len(prefix.ids)
    rows = [torch.tensor(ids[n:]) for ids, _ in spans]
    labels = [torch.tensor([-100] * (begin - n) + ids[begin:]) for ids, begin in spans]
    rows = pad_sequence(rows, batch_first=True)  # (R, T)
    labels = pad_sequence(labels, batch_first=True, padding_value=-100)  # no loss there
    # Before the first scored token no logits are needed.
    first = min(begin for _, begin in spans) - n
    labels = labels[:, first:]  # (R, L)
    cache = prefix.copy(len(spans))
    logits = prefix.forward(cache, rows, labels.shape[1] + 1)[:, :-1].float()  # (R, L, V)
    labels = labels.to(logits.device)
    return -torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none").sum(1)


@torch.no_grad()
def write(tok, ids, prefix, cfg, outlines=(("",),), rngs=(None,)):
    """-> a text behind ids for each of R outlines, in one batch, token by token: drawn by its
    generator on the CPU, or greedy. By default one answer, up to the end of its call."""
    # Nothing else of generation_config is used: no penalties.
    ends = prefix.model.generation_config.eos_token_id
    ends = {tok.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    rows = []
    for (text, *parts), rng in zip(outlines, rngs, strict=True):
        # ids: of the draft so far; text: the same up to where its last value began; parts: to
        # be dictated behind values; queue: ids to be read next, first the rest of the prompt.
        row = SimpleNamespace(text=text, parts=parts, ids=[], queue=[], rng=rng, over=False)
        if text:
            force(tok, row)
        row.queue = ids[len(prefix.ids) :] + row.queue
        rows.append(row)
    cache, active = prefix.copy(len(rows)), rows
    # Tokens read behind ids; negative while ids are read. The last token is never read.
    length = len(prefix.ids) - len(ids)
    while active and length < cfg.max_new_tokens - 1:
        # All rows read as many: the cache is a rectangle. Who has no more draws a token.
        n = min(len(row.queue) for row in active)
        new = torch.tensor([row.queue[:n] for row in active])  # (R, n)
        logits = prefix.forward(cache, new, 1)[:, -1].float().cpu()  # (R, V)
        length += n
        for row, scores in zip(active, logits, strict=True):
            row.queue = row.queue[n:]
            if not row.queue:
                token = scores.argmax()
                if row.rng and cfg.temperature > 0:
                    p = (scores / cfg.temperature).softmax(-1)  # (V,)
                    token = torch.multinomial(p, 1, generator=row.rng)
                row.queue = [token.item()]
                row.over = row.queue[0] in ends or take(tok, row)
        stay = [i for i, row in enumerate(active) if not row.over]
        if len(stay) < len(active):
            cache.batch_select_indices(torch.tensor(stay, dtype=torch.long))
            active = [active[i] for i in stay]
    # A draft with parts left was cut off, and is given as it stands.
    return [tok.decode(row.ids) if row.parts else row.text for row in rows]


# Values that may come behind a part, by its last character. One token may hold the end of the
# part and the begin of the value (`:"`), so only those that are the same for all are forced.
BEHIND = {
    "{": ('"call": {"name": "a', '"request": "a'),
    ":": (' "a', " 1", ' {"a', " [1", " t"),
    '"': ("a", "1"),
}


def force(tok, row):
    """Queues a row's text, but for the tokens that the value behind it may change."""
    rest = row.text[len(tok.decode(row.ids)) :]
    spelled = [continuation(tok, rest + value) for value in BEHIND[row.text[-1]]]
    row.queue = os.path.commonprefix(spelled)
    row.ids = row.ids + row.queue


def take(tok, row):
    """Adds the token in the queue -> is the row over? Where it ends a value, `force` is next."""
    written = tok.decode(row.ids + row.queue)
    if not row.parts:  # an answer
        row.ids = row.ids + row.queue
        row.text = written
        return parse(written) is not None
    # The value begins with the quote or brace that was dictated.
    begin = len(row.text) - row.text.endswith(('"', "{"))
    # What `force` left of the dictated text is the model's to write: it may deviate.
    agrees = written[: len(row.text)] == row.text[: len(written)]
    end = json_end(written[begin:]) if agrees else -1  # 0: goes on; -1: cannot be one
    if end > 0:
        # The token is not added: it may hold more than the end, which `force` spells.
        row.text = written[: begin + end] + row.parts.pop(0)
        if row.parts:
            force(tok, row)
    else:
        row.ids = row.ids + row.queue
    return end < 0 or not row.parts


# ----------------------------------------------------------- prompts and tokens
TASK = 'Answer with one tool call, {"name": ..., "arguments": {...}}, and nothing else. Tools:'
CLOCK = "{% macro strftime_now(form) %}01 January 2026{% endmacro %}"  # for all days
ID = "000000000"  # of every call: some templates want one of nine characters
ROLES = ("system", "user", "assistant", "tool")
EMPTY = {"type": "object", "properties": {}, "required": []}
PROBE = {"name": "look_up", "description": "Looks a word up.", "parameters": EMPTY}
CALL = {"name": "look_up", "arguments": {"word": "tide"}}


def draw(*key):
    """A generator seeded by `key` alone: no draw depends on order, resuming or shard."""
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    return torch.Generator().manual_seed(int(digest[:16], 16) >> 1)


def prepare(tok, sample, cfg):
    """-> x: all that Algorithm 1 sees of a sample, without its label: the dialogue (system,
    request, turns), tools and schemas, ids of the prompt, of which the first `head` come before
    any request, and candidates, as spans. `tt_si` adds the direct call."""
    tools, messages = sample["tools"], sample["messages"]
    if cfg.shuffle:
        # By seed and names alone: neither the file's order nor the label shows.
        tools = sorted(tools, key=lambda tool: tool["name"])
        rng = draw(cfg.seed, "order", [tool["name"] for tool in tools])
        tools = [tools[i] for i in torch.randperm(len(tools), generator=rng)]
    x = SimpleNamespace(id=sample["id"], tok=tok, tools=tools)
    x.supplied = sample.get("pairs")  # drafts that were written elsewhere
    x.schemas = {tool["name"]: tool["parameters"] for tool in tools}
    x.system = [m for m in messages if m["role"] == "system"]  # before a pair, too
    x.request = transcript([m for m in messages if m["role"] != "system"])
    x.turns = [m["content"] for m in messages if m["role"] == "user"]
    x.ids, _ = encode(tok, tools, messages)
    # Prompts are the same up to the end of tools that come first, but for a token that merges.
    other, _ = span(tok, x, "-")
    x.head = max(len(os.path.commonprefix([x.ids, other])) - 1, 0)
    # A candidate ends with what closes its name, or `book` always beats `book_room`.
    calls = []  # N
    name_at = call_text(tok, CALL | {"arguments": {}}).index(dumps(CALL["name"]))
    for name in x.schemas:
        text = call_text(tok, {"name": name, "arguments": {}})
        calls.append(continuation(tok, text, name_at + len(dumps(name))))
    # What all begin with is not scored: it adds the same to every l_n.
    shared = len(x.ids + os.path.commonprefix(calls))
    x.candidates = [(x.ids + ids, shared) for ids in calls]
    return x


def span(tok, x, request, call=None):
    """-> (ids, begin): a prompt of a request about the tools of x, and a call behind it."""
    return encode(tok, x.tools, [*x.system, {"role": "user", "content": request}], call)


def encode(tok, tools, messages, call=None):
    """-> (ids, begin): a prompt by the chat template, and from begin on a call. Tools are in
    the template's own form (native), or text in one user turn. InputError: too long."""
    if call_form(tok, f"{tok.chat_template}"):
        prompt = render(tok, messages, tools)
    else:
        text = "\n".join([TASK, *map(dumps, tools), "", transcript(messages)])
        prompt = render(tok, [{"role": "user", "content": text}])
    # Ids are joined, not texts: no token spans prompt and call.
    ids = tok(prompt, add_special_tokens=False).input_ids
    more = continuation(tok, call_text(tok, call)) if call else []
    # `load` has lowered this limit, by the room of an answer.
    need(len(ids + more) <= tok.model_max_length, "its tokens and an answer exceed the context")
    return ids + more, len(ids)


def render(tok, messages, tools=None, answered=False):
    """-> messages by the chat template; unless answered, up to where it goes on."""
    if tools:
        tools = [{"type": "function", "function": tool} for tool in tools]
    options = dict(tokenize=False, enable_thinking=False, date_string="01 January 2026")
    advice = "let at most one system turn come first, then user and assistant in turn"
    with advising("the chat template refuses this dialogue", advice):
        template = CLOCK + tok.get_chat_template(tools=tools)
        options |= {"chat_template": template, "add_generation_prompt": not answered}
        return tok.apply_chat_template(messages, tools=tools, **options)


@functools.cache
def call_form(tok, template):
    """-> what continues a prompt with CALL by the chat template, a key of functools.cache;
    None, not native: it shows no tools, or no call that continues it and can be parsed."""
    user = {"role": "user", "content": "?"}
    calls = [{"id": ID, "type": "function", "function": CALL}]
    turn = {"role": "assistant", "content": "", "tool_calls": calls}
    with suppress(InputError):
        prompt = render(tok, [user], [PROBE])
        whole = render(tok, [user, turn], [PROBE], answered=True)
        form = whole.removeprefix(prompt)
        shown = PROBE["name"] in prompt and dumps(CALL["arguments"]) in form
        if shown and whole.startswith(prompt) and parse(form) == CALL:
            return form
    return None


def call_text(tok, call):
    """-> what continues any prompt with a call: in the native form, or as JSON."""
    # Names are put in here, as templates spoil odd ones: a quote, a backslash.
    text = call_form(tok, f"{tok.chat_template}") or dumps(CALL)
    text = text.replace(dumps(CALL["name"]), dumps(call["name"]), 1)
    return text.replace(dumps(CALL["arguments"]), dumps(call["arguments"]), 1)


def continuation(tok, text, upto=math.inf):
    """-> ids of a text that stands behind another, no token of both; those that begin in its
    first `upto` characters."""
    # A stand-in takes the blank that some tokenizers put first, and moves all offsets by one.
    stand_in = "a" if text[:1].isdigit() else "0"
    out = tok(stand_in + text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = zip(out.input_ids, out.offset_mapping, strict=True)
    return [i for i, (begin, end) in offsets if end > 1 and begin <= upto]


def transcript(messages):
    """The request; a dialogue as "role: text" lines, with earlier calls and results."""
    if len(messages) == 1:
        return messages[0]["content"]
    lines = []
    for message in messages:
        calls = [dumps(call["function"]) for call in message.get("tool_calls", [])]
        lines.append(" ".join([f"{message['role']}:", message["content"], *calls]))
    return "\n".join(lines)


# ----------------------------------------------------------- JSON, data, grades
dumps = functools.partial(json.dumps, ensure_ascii=False, allow_nan=False)
DECODER = json.JSONDecoder(strict=False)
MALFORMED = (ValueError, LookupError, TypeError, AttributeError, RecursionError)


class InputError(ValueError):
    """Bad input, told in one line: where, what is wrong, and what would be right."""


def need(ok, text):
    if not ok:
        raise InputError(text)


@contextmanager
def advising(place, advice):
    """What goes wrong in libraries becomes an InputError: where, what, what would be right."""
    try:
        yield
    except Exception as e:
        kind = "" if isinstance(e, InputError) else f"{type(e).__name__}: "
        raise InputError(f"{place}: {kind}{e}; {advice}") from e


def composed(value):
    """A JSON value with its letters composed (NFC); ValueError: it is none, such as NaN."""
    text = unicodedata.normalize("NFC", dumps(value))
    text.encode()  # refuses half a character
    return json.loads(text)


def json_end(text):
    """-> where the JSON value that begins a text ends; 0: it may go on; -1: not JSON."""
    start = len(text) - len(text.lstrip())
    try:
        _, end = DECODER.raw_decode(text, start)
    except json.JSONDecodeError as e:
        # It is open where the fault is its end, or in a last word: tru, -, 1e
        is_last = re.fullmatch(r"[\w.+-]*\s*", text[e.pos :])
        return 0 if is_last or e.msg.startswith("Unterminated") else -1
    except (RecursionError, ValueError):  # too deep, or a number of too many digits
        return -1
    is_word = text[start] not in '"[{'
    return 0 if is_word and re.fullmatch(r"[\w.+-]*", text[end:]) else end


def parse(text):
    """-> the first call in a text, or None."""
    # Behind a thought, which may hold drafts of the call; without one from 0.
    start = text.rfind("</think>") + 1
    if "<think>" in text[start:]:
        return None
    for brace in re.compile("{").finditer(text, start):
        rest = text[brace.start() :]
        end = json_end(rest)
        if end == 0:  # what an open object holds might become its arguments
            break
        with suppress(MALFORMED):
            return to_call(DECODER.decode(rest[: max(end, 0)]))
    return None


def to_call(value):
    """-> {name, arguments}; the arguments may be JSON text, or be called parameters."""
    arguments = value.get("arguments") or value.get("parameters") or {}
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    need(isinstance(value["name"], str) and isinstance(arguments, dict), "no call")
    return composed({"name": value["name"], "arguments": arguments})


def grade(text, gold):
    """-> [right tool?, right call?] of an answer. Numbers are compared by their text
    [ours]: "5" is 5, and 12.0 is 12."""
    as_text = {"parse_int": str, "parse_float": lambda number: number.removesuffix(".0")}
    call, gold = (json.loads(dumps(value), **as_text) for value in (parse(text), gold))
    return [bool(call) and call["name"] == gold["name"], call == gold]


def read_jsonl(path, convert, advice="other forms: python data/convert.py FILE > calls.jsonl"):
    """-> {id: convert(record)} of a file of JSON lines; a bad one is named by its line."""
    records = {}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        if line.strip():
            with advising(f"{path}:{number}", advice):
                record = composed(json.loads(line))
                need(isinstance(record, dict), "no JSON object")
                i = record.get("id")
                record["id"] = i = str(number if i in (None, "") else i)
                need(i not in records, f"id {i} twice")
                records[i] = convert(record)
    need(records, f"{path}: it is empty; {advice}")
    return records


def to_sample(record):
    """A record in OpenAI's form -> {id, messages, tools, call?}; the label goes into call alone."""
    for key in ("messages", "tools"):
        need(record.get(key) and isinstance(record[key], list), f"no list of {key}")
    tools = [to_tool(tool.get("function", tool)) for tool in record["tools"]]
    names = [tool["name"] for tool in tools]
    need(len(set(names)) == len(names), f"a tool twice: {names}")
    messages = []
    for message in record["messages"]:
        message = {key: value for key, value in message.items() if value is not None}
        need(message["role"] in ROLES, f"role {message['role']} is none of {ROLES}")
        need("function_call" not in message, "function_call is an older form")
        content = message.get("content", "")
        need(isinstance(content, str), "a content that is no text")
        message |= {"content": content.strip(), "tool_call_id": ID}
        calls = [to_call(call["function"]) for call in message.pop("tool_calls", [])]
        if calls:
            message["tool_calls"] = [{"id": ID, "type": "function", "function": c} for c in calls]
        messages.append(message)
    need("user" in [message["role"] for message in messages], "no request of a user")
    # What an assistant says last is to be written: its call is the label, its text goes.
    labels = [to_call(record["call"])] if record.get("call") else []
    while messages[-1]["role"] == "assistant":
        labels += [call["function"] for call in messages.pop().get("tool_calls", [])]
    sample = {"id": record["id"], "messages": messages, "tools": tools}
    for label in labels:
        need(label["name"] in names, f"the label calls {label['name']}, none of {names}")
        need(label == labels[0], "several calls as the label")
        sample["call"] = label
    return sample


def to_tool(tool):
    """-> {name, description, parameters}, completed: some templates want all three."""
    wrong = f'"parameters" of {tool["name"]} must be a JSON schema'
    raw = tool.get("parameters") or EMPTY
    need(isinstance(raw, dict), wrong)
    # Refused: xLAM's map of properties; MCP's and Anthropic's names for a schema.
    need("properties" in raw or raw.get("type") == "object", wrong)
    need(not {"inputSchema", "input_schema"} & tool.keys(), wrong)
    schema = EMPTY | {key: value for key, value in raw.items() if value is not None}
    need(isinstance(schema["required"], list), wrong)
    need(isinstance(schema["properties"], dict), wrong)
    for rule in schema["properties"].values():
        need(isinstance(rule, dict) and isinstance(rule.get("enum") or [], list), wrong)
    for name in [tool["name"], *schema["required"]]:
        need(isinstance(name, str), f"a name that is no text: {name}")
    about = tool.get("description") or ""
    return {"name": tool["name"], "description": about, "parameters": schema}


# ---------------------------------------------------------------------- running
def load(name, cfg):
    """-> (model, tokenizer), frozen; safetensors only, and none of its own code runs."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = cfg.device
    if device == "auto":
        device = f"{accelerator}:{os.environ.get('LOCAL_RANK', 0)}" if accelerator else "cpu"
    with advising(f"--device {device}", "give auto, cpu, cuda or mps"):
        torch.empty(0, device=device)
    dtype = "float32" if cfg.dtype == "auto" and "cpu" in device else cfg.dtype
    is_folder = Path(name).is_dir()
    # No name of the hub begins so.
    need(is_folder or name[:1] not in "/.~\\", f"{name}: no such folder")
    online = not is_folder and hub_answers()
    where = name
    if not is_folder:
        where += ": no such folder here; " + ("of the hub" if online else "the hub is out of reach")
    with advising(where, "give a causal language model with safetensors and chat template"):
        options = {"trust_remote_code": False, "local_files_only": not online}
        need(not is_folder or (Path(name) / "config.json").exists(), "it has no config.json")
        tok = transformers.AutoTokenizer.from_pretrained(name, **options)
        tok.get_chat_template()
        need(tok.is_fast, "its tokenizer is a slow one")
        prompt = render(tok, [{"role": "user", "content": "?"}])
        need(not prompt.rstrip().endswith("<think>"), "its template opens a thought")
        options |= {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
        model, info = transformers.AutoModelForCausalLM.from_pretrained(name, **options)
        need(not info["missing_keys"], f"weights are missing: {info['missing_keys']}")
    with advising(name, "give another --device or --dtype"):
        model = model.to(device).eval().requires_grad_(False)
    config = model.config.get_text_config()
    with advising(name, "give one with a plain key/value cache, that a LoRA can train"):
        rope = f"{getattr(config, 'rope_parameters', None)}"
        need(not re.search("longrope|dynamic", rope), f"its positions depend on length: {rope}")
        try_out(model, tok)
    context = getattr(config, "max_position_embeddings", None) or math.inf
    tok.model_max_length = min(tok.model_max_length, context) - cfg.max_new_tokens
    return model, tok


def hub_answers():
    """Is the hub in reach? Else its client would try for a minute."""
    try:
        url = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        urllib.request.urlopen(url, timeout=5).close()
    except (OSError, ValueError) as e:  # but an HTTP or TLS error is an answer
        cause = getattr(e, "reason", e)
        return isinstance(e, urllib.error.HTTPError) or isinstance(cause, ssl.SSLError)
    return True


def try_out(model, tok):
    """Does once what a sample does: rows continue a prefix, and a LoRA makes a step."""
    cfg = Config(epochs=1)
    prompt, _ = encode(tok, [PROBE], [{"role": "user", "content": "?"}], CALL)
    special = {i for i, t in tok.added_tokens_decoder.items() if t.special}  # as Gemma's of images
    highest = max({*tok.get_vocab().values()} - special | {*prompt})
    need(highest < len(model.get_input_embeddings().weight), f"token {highest} has no embedding")
    ids = [highest, *range(7)]
    spans = [(ids, 4), (ids[:6], 5)]
    at_once, continued = logprob(spans, Prefix(model, [])), logprob(spans, Prefix(model, ids[:3]))
    same = torch.allclose(at_once, continued, rtol=0.1, atol=0.1)
    need(same, "what it has read cannot be continued")
    with temporary_lora(model, cfg, draw("trial")) as lora:
        train(spans, Prefix(model, []), lora, cfg)
        need(lora[1].any(), "its gradient is zero, or no number")


def answer(model, tok, sample, cfg, writer):
    """-> a row: Result and grades."""
    try:
        result = tt_si(model, tok, sample, cfg, writer)
    except InputError as e:  # beyond the context, refused by the template, or NaN scores
        result = Result(sample["id"], cost={}, decision=f"not answered: {e}")
    except torch.OutOfMemoryError:  # of an accelerator
        result = Result(sample["id"], cost={}, decision="not answered: out of memory")
    row = dataclasses.asdict(result)
    if "call" in sample:
        row["grades"] = {side: grade(row[side], sample["call"]) for side in ("direct", "answer")}
    # NaN and infinity become null.
    return json.loads(json.dumps(row), parse_constant=lambda name: None)


def whole_rows(path, key):
    """-> {id: row} of a file's whole lines; a torn last one is cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    *lines, torn = path.read_bytes().split(b"\n")
    begin = f'{{"key": "{key}"'.encode()
    ours = all(begin.startswith(line[: len(begin)]) for line in [*lines, torn])
    need(ours, f"{path} has rows of other settings, data, model or code: take another --output")
    if torn:
        time.sleep(1)  # another process may be writing it
        if path.read_bytes().endswith(torn):
            os.truncate(path, sum(len(line) + 1 for line in lines))
        return whole_rows(path, key)
    with advising(path, "a line is no JSON: take another --output"):
        return {row["id"]: row for row in map(json.loads, lines)}


def interval(differences, draws=10_000):
    """Paired bootstrap over samples: 2.5 and 97.5 % quantiles of the mean difference."""
    d, rng = torch.tensor(differences), draw("bootstrap")
    means = [d[torch.randint(len(d), (len(d),), generator=rng)].mean() for _ in range(draws)]
    return torch.stack(means).quantile(torch.tensor([0.025, 0.975])).tolist()


def table(rows):
    """-> what a run ends with: scores of ALL labelled samples, answered or not."""
    lines = []
    grades = [list(row["grades"].values()) for row in rows if "grades" in row]
    if grades:
        points = 100.0 * torch.tensor(grades)  # (n, direct and TT-SI, tool and call)
        lines.append("               right tool   right call")
        (tool, call), (new_tool, new_call) = points.mean(0).tolist()
        lines.append(f"direct{tool:17.1f} %{call:11.1f} %")
        lines.append(f"TT-SI{new_tool:18.1f} %{new_call:11.1f} %")
        gain = points[:, 1, 1] - points[:, 0, 1]
        bounds = "too few for an interval"  # of one or two it would look certain
        if len(gain) > 9:
            low, high = interval(gain.tolist())
            bounds = f"[{low:+.1f}, {high:+.1f}]"
        changed = f"{(gain > 0).sum()} repaired, {(gain < 0).sum()} broken"
        lines.append(f"difference{gain.mean():+28.1f}  {bounds}   {changed}")
        if len(grades) < len(rows):
            lines.append(f"{len(grades)} of {len(rows)} samples have a label")
    verdicts = [draft["verdict"] for row in rows for draft in row["drafts"]]
    of_drafts = f"; of {len(verdicts)} drafts {counted(verdicts)}" if verdicts else ""
    lines.append(counted(row["decision"] for row in rows) + of_drafts)
    costs = [row["cost"] for row in rows if row["cost"]]
    if costs:
        spent = [part for cost in costs for part in cost.values()]
        direct = [cost[stage] for cost in costs for stage in ("read", "direct")]
        seconds, tokens = (torch.tensor(spent).sum(0) / torch.tensor(direct).sum(0)).tolist()
        ratio = f"{seconds:.1f} x the seconds and {tokens:.1f} x the tokens"
        lines.append(f"an answer takes {ratio} of a direct one")
    return "\n".join(lines)


def counted(words):
    return ", ".join(f"{n} {word}" for word, n in Counter(words).most_common())


def run(cfg):
    """Reads, answers, grades, keeps -> {id: row}. InputError: bad input, in one line."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun
    need(world == 1 or cfg.output, "each of WORLD_SIZE processes needs --output")
    embedded = Path(cfg.model).resolve() == (DATA / "model").resolve()
    path = cfg.data or DATA / ("demo.jsonl" if embedded else "everyday.jsonl")
    samples = read_jsonl(path, to_sample)
    ids = [cfg.trace] if cfg.trace else list(samples)[: cfg.limit or None]
    need(samples.keys() >= set(ids), f"--trace: {path} has {[*samples][:2]}..., not {cfg.trace}")
    if cfg.pairs:
        advice = "a line is {id, pairs: [{request, call}, ...]}"
        pairs = read_jsonl(cfg.pairs, lambda row: [*map(dumps, row["pairs"])], advice)
        need(pairs.keys() & ids, f"{cfg.pairs} has pairs for none of these samples of {path}")
        samples = {i: sample | {"pairs": pairs.get(i, [])} for i, sample in samples.items()}

    models = [load(name, cfg) for name in (cfg.model, cfg.teacher) if name]
    model, tok = models[0]
    stamp = {"key": key_of(cfg, samples, models), "run": report(cfg, path, model, tok)}
    rows = whole_rows(Path(cfg.output), stamp["key"]) if cfg.output else {}
    if rank == 0:
        print(stamp["run"], end="\n\n")
        if embedded and cfg.data:
            print("The embedded model knows its toy world alone: give a --model for others.\n")
    try:
        todo = [i for i in ids[rank::world] if i not in rows]
        for i in tqdm(todo, unit="sample", disable=bool(cfg.trace or rank or not todo)):
            rows[i] = stamp | answer(model, tok, samples[i], cfg, models[-1])
            if cfg.output:
                # One write of one whole line: several processes can share a file.
                with open(cfg.output, "ab", buffering=0) as file:
                    file.write((json.dumps(rows[i]) + "\n").encode())
                    os.fsync(file)
    except KeyboardInterrupt:
        done = sum(i in rows for i in ids)
        raise KeyboardInterrupt(f"after {done} of {len(ids)} samples") from None
    finally:  # the table so far, whatever ends the run; of several, by who sees all
        if cfg.output:
            rows |= whole_rows(Path(cfg.output), stamp["key"])
        if cfg.trace in rows:
            tell(rows[cfg.trace], samples[cfg.trace], tok, cfg)
        elif rows and (world == 1 or rows.keys() >= set(ids)):
            print(table([rows[i] for i in samples if i in rows]))
            if not any("grades" in row for row in rows.values()):
                print(f"no label; answers: {cfg.output or 'give --output FILE to keep them'}")
    return rows


def report(cfg, path, model, tok):
    """-> what a report must say of a run: versions, date, model, changed settings."""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    revision = getattr(model.config, "_commit_hash", None) or "local"
    form = "the template's own" if call_form(tok, f"{tok.chat_template}") else "our"
    facts = f"{revision}, {model.num_parameters():,} parameters, {model.dtype}, {model.device}"
    what = f"{cfg.model} ({facts}, {form} tool prompts)"
    settings = vars(cfg) | {"model": Config.model, "data": path}  # the model is told above
    changed = [f", {k} {v}" for k, v in settings.items() if v != getattr(Config, k)]
    return f"ttsi.py {VERSION}, {versions}, {time.strftime('%F')}: {what}{''.join(changed)}"


def key_of(cfg, samples, models):
    """-> what rows of one file share: settings, data, weights, template, this code."""
    not_in_key = ("limit", "output", "trace", "model", "teacher", "data", "pairs")
    content = [Path(__file__).read_text("utf-8"), samples, vars(cfg) | dict.fromkeys(not_in_key)]
    for model, tok in models:
        weights = [torch.hash_tensor(p.cpu()).item() for p in model.parameters()]
        content.append([tok.chat_template, draft_prompt(model, ""), weights])
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def tell(row, sample, tok, cfg):
    """Prints what Algorithm 1 did with a sample, step by step."""
    captions = {"prompt": "what Algorithm 1 sees"}
    captions |= {item.name: item.metadata["help"] for item in dataclasses.fields(Result)[1:]}
    captions["label"] = "which no step saw"
    prompt = tok.decode(prepare(tok, sample, cfg).ids) if row["cost"] else ""
    steps = row | {"prompt": prompt, "label": sample.get("call")}
    for name, caption in captions.items():
        lines = steps[name] if isinstance(steps[name], list) else [steps[name]]
        print(f"\n-- {name:10}{caption}", *lines, sep="\n   ")


PAPER = "--k 1 --drafts 1 --given nothing --no-check --optimizer adamw --lr 1e-4 --adapt full"
GROUPS = {"model": "model and data", "tau": "H", "k": "G", "lora_rank": "T", "output": "running"}
ABOUT = """python ttsi.py [flags]
       python ttsi.py --model Qwen/Qwen2.5-0.5B-Instruct
       python ttsi.py --model Qwen/Qwen2.5-1.5B-Instruct --data calls.jsonl --output qwen.jsonl"""


def parse_arguments(argv):
    """-> Config, or an InputError. A later flag overrules; --no-... cannot be undone."""
    parser = argparse.ArgumentParser(usage=ABOUT, allow_abbrev=False)
    parser.error = lambda message: need(False, f"{message}; -h explains every flag")
    parser.add_argument("--version", action="version", version=f"ttsi.py {VERSION}")
    parser.add_argument("--paper", action="help", help=f"stands for {PAPER}")  # for -h alone
    for item in dataclasses.fields(Config):
        if item.name in GROUPS:
            group = parser.add_argument_group(GROUPS[item.name])
        flag, text = item.name.replace("_", "-"), item.metadata["help"]
        if item.type is bool:
            group.add_argument(f"--no-{flag}", dest=item.name, action="store_false", help=text)
        else:
            options = {"type": type(item.default), "choices": get_args(item.type) or None}
            text += f"; default: {item.default}" * (item.type is not str)
            group.add_argument(f"--{flag}", default=item.default, help=text, **options)
    flags = []
    for flag in argv:
        flags += PAPER.split() if flag == "--paper" else [flag]
    cfg = Config(**vars(parser.parse_args(flags)))
    for name in ("k", "drafts", "epochs", "max_new_tokens", "lora_rank"):
        need(getattr(cfg, name) > 0, f"--{name.replace('_', '-')} must be 1 or more")
    need(cfg.limit >= 0 and cfg.tau >= 0, "--limit and --tau must be 0 or more")
    need(cfg.model, "--model is empty")
    need(cfg.optimizer == "polyak" or cfg.lr < 1, "--optimizer adamw wants an --lr: 1e-4")
    return cfg


if __name__ == "__main__":
    signal.signal(signal.SIGINT, was)
    sys.stdout.reconfigure(errors="backslashreplace")  # what a console cannot show
    try:
        run(parse_arguments(sys.argv[1:]))
    except KeyboardInterrupt as e:
        print("ttsi: stopped", f"{e}" or "before the first sample", file=sys.stderr)
        sys.exit(130)
    except (InputError, OSError) as e:
        print("ttsi:", " ".join(f"{e}".split()), file=sys.stderr)
        sys.exit(2)
