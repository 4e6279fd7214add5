"""TT-SI in one file: a language model that improves itself while it answers.

"Self-Improving LLM Agents at Test-Time" (Acikgoz et al. 2025, arXiv 2510.07841). For every input x, on its own:

    H  l_n = log P(a_n | x) for each tool name a_n on offer, p = softmax(l), margin u = p(1) - p(2)
       u >= tau: certain, answer with the base parameters
    G  u <  tau: uncertain, the same model writes K similar pairs (x', y'); it never sees the label of x
    T  a temporary LoRA is trained on these pairs, and x is answered with it;
       then everything is reset: nothing learned is carried over to the next input

    python ttsi.py                                  # embedded model and data, offline
    python ttsi.py --trace demo-067                 # one sample, step by step
    python ttsi.py --model Qwen/Qwen2.5-0.5B-Instruct --data calls.jsonl --output runs/qwen.jsonl

Departures from the paper, and choices where it is silent (--paper sets everything that it states):
 1. Four drafts must pass label-free checks (--check); the closest to x is trained on. 2. A pair is written call first.
 3. SGD, normalised per adapter; we take the paper's 1e-4 for AdamW's rate (--optimizer). No warm-up. 4. The adapter
 acts behind the tool list only (--adapt suffix): one cache of it serves every stage. 5. Tools are offered in a seeded
 order (--shuffle): benchmarks list the right one first. 6. b samples at once, each with an adapter of its own.
Shapes: b samples, N candidates, R rows of T tokens, V vocabulary, K pairs, r rank.
"""
import argparse, copy, dataclasses, functools, hashlib, json, math, os, re, sys, time  # noqa: E401
from collections import Counter, namedtuple
from contextlib import contextmanager
from pathlib import Path

import torch, transformers  # noqa: E401
from tqdm import tqdm
HERE = Path(__file__).resolve().parent

# ---------------------------------------------------------------------------------------------- configuration
def flag(default, text, allowed=None):
    """A field that is a flag; `allowed` is a tuple of choices, or the least number."""
    return dataclasses.field(default=default, metadata={"help": text, "allowed": allowed})

@dataclasses.dataclass
class Config:
    """Every field is a flag. [paper]: stated there or reported from it; [ours]: our choice."""
    model: str = flag(str(HERE / "data/model"), "folder or hub name of a causal language model")
    data: str = flag(str(HERE / "data/demo.jsonl"), "samples, one JSON object a line (README: Your own data)")
    output: str = flag("", "one JSON row per sample goes here, a summary beside it; a run that was cut off goes on")
    teacher: str = flag("", "a model that writes the drafts in its place: TT-D [paper]")
    pairs: str = flag("", "train on the pairs of this file, {id, pairs: [{request, call}]} a line, not on drafts")
    limit: int = flag(0, "only the first so many samples; 0: all", 0)
    ids: str = flag("", "only these samples, separated by commas")
    trace: str = flag("", "tell the sample of this id step by step")
    seed: int = flag(0, "of drafts, adapter initialisation and candidate order")
    device: str = flag("auto", "a torch device; auto: cuda, else mps, else cpu")
    dtype: str = flag("auto", "auto: float32 on a CPU, else as stored", ("auto", "float32", "bfloat16", "float16"))
    batch_size: int = flag(0, "samples at once; memory grows with it (README: Speed); 0: 25, 1 for other models [ours]", 0)
    shuffle: bool = flag(True, "offer the tools in a seeded order, not the file's [ours]")
    method: str = flag("ttsi", "train on the pairs, icl: show them [paper], direct: neither", ("ttsi", "icl", "direct"))
    tau: float = flag(0.95, "adapt where the margin is below [paper]", 0.0)
    score: str = flag("sum", "log-probability of a name: over its tokens sum [paper] or mean", ("sum", "mean"))
    select: str = flag("uncertain", "samples to adapt [paper, with controls]", ("uncertain", "certain", "all"))
    k: int = flag(1, "pairs to train on [paper]", 1)
    drafts: int = flag(4, "at once; of those that pass, the k closest to x are kept [ours; paper: 1]", 1)
    cover: bool = flag(False, "the tools of the drafts are forced in turn, the likeliest first [ours]")
    attempts: int = flag(4, "times that drafts are written, until k pass [ours; paper: 1]", 1)
    temperature: float = flag(1.0, "of the drafts; answers are greedy [ours]", 0.0)
    check: bool = flag(True, "only drafts that pass the label-free checks are kept [ours]")
    max_new_tokens: int = flag(256, "at most, in a draft or an answer [ours]", 1)
    lora_rank: int = flag(8, "r [paper]", 1)
    lora_alpha: float = flag(16.0, "the adapter's output is scaled by alpha / r [paper]", 0.0)
    optimizer: str = flag("sgd", "sgd: a step has length lr in each adapter [ours]; adamw [paper]", ("sgd", "adamw"))
    lr: float = flag(0.1, "peak of the cosine schedule [ours; paper: 1e-4, adamw]", 0.0)
    epochs: int = flag(5, "steps, each on all k pairs [paper: 5, k = 1]", 0)
    adapt: str = flag("suffix", "the adapter acts behind the tools [ours], or everywhere [paper]", ("suffix", "full"))

PAPER = ("--tau 0.95 --score sum --select uncertain --k 1 --drafts 1 --attempts 1 --no-check --lora-rank 8"
         " --lora-alpha 16 --optimizer adamw --lr 1e-4 --epochs 5 --adapt full")

# ---------------------------------------------------------------------------------------------- data and prompts
class InputError(ValueError):
    """Bad input, told in one line: where, what is wrong, and what would be right."""
def need(ok, message):
    if not ok:
        raise InputError(message)
DECODER = json.JSONDecoder(parse_constant=lambda name: need(False, f"{name} is not JSON"))
def dumps(value):
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
def loads(text, decode=DECODER.decode):
    """One JSON object, or a ValueError. No lone surrogates, which no tokenizer takes; no 1e999, which is infinite."""
    try:
        value = decode(text)
        dumps(value).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    need(isinstance(value, dict), f"found a {type(value).__name__}")
    return value

def parse(text):
    """The JSON object that begins at the first brace of a model's text, or None. Model output is untrusted data."""
    try:
        return loads(text, lambda text: DECODER.raw_decode(text, text.index("{"))[0])
    except ValueError:
        return None

def fits(value, shape):
    """Has a JSON value this shape: a type, [shape], {key: shape}; "key?" may be absent or null, ... is any key."""
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(v, shape[0]) for v in value)
    if not isinstance(shape, dict):
        return isinstance(value, shape)
    return isinstance(value, dict) and all(
        all(fits(v, part) for v in value.values()) if key is ... else
        key[-1] == "?" and value.get(key[:-1]) is None or fits(value.get(key.rstrip("?")), part)
        for key, part in shape.items())

MESSAGES = [{"role": str, "content?": str, "tool_calls?": [dict]}]
TOOL = {"name": str, "description?": str, "parameters?": {"properties?": {...: dict}, "required?": [str]}}
CALL = {"name": str, "arguments": dict}
def to_call(call):
    """Arguments may come as a JSON string."""
    return dict(call, arguments=loads(call["arguments"])) if fits(call, {"arguments": str}) else call

def read_jsonl(path, check):
    """{id: check(object)} of all lines; one InputError names every line that is refused. The id may be left out."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: cannot be read ({e}); give a JSONL file in UTF-8, one object per line") from e
    found, errors = {}, []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                record = loads(line)
                record["id"] = str(record.get("id", number))
                need(record["id"] not in found, f'id {dumps(record["id"])} is on an earlier line; ids must differ')
                found[record["id"]] = check(record)
        except ValueError as e:
            errors.append(f'{path}:{number}: {"" if isinstance(e, InputError) else "not JSON, one object each: "}{e}')
    need(not errors, "\n".join(errors))
    need(found, f"{path}: nothing in it; each line must be one JSON object")
    return found

def to_sample(record):
    """A canonical record (README: Your own data) -> {id, messages, tools, call?, accept?}, shorthands spelled out."""
    messages = [{"role": "user", "content": record["query"]}] if "query" in record else record.get("messages")
    need(fits(messages, MESSAGES) and any((m.get("content") or "").strip() for m in messages),
         'no request; give "query": "..." or "messages": [{"role": "user", "content": "..."}]')
    need(fits(record.get("tools"), [dict]) and record["tools"], 'no tools; give [{"name": ..., "parameters": ...}]')
    tools = [t.get("function", t) for t in record["tools"]]
    for t in tools:
        need(fits(t, TOOL) and t["name"], f'a tool must be {{"name": ..., "parameters": schema}}: {dumps(t)[:80]}')
    names = [t["name"] for t in tools]
    need(len(set(names)) == len(names), f"a tool is offered twice; names must differ: {names}")
    call = to_call(record.get("call"))
    need(call is None or fits(call, CALL), '"call" must be {"name": "...", "arguments": {...}}')
    need(not call or call["name"] in names, f'"call" names {call and call["name"]!r}, not one of the tools {names}')
    need(fits(record, {"accept?": {...: list}}), '"accept" must be {argument: [acceptable values]}')
    sample = {"id": record["id"], "messages": messages, "tools": tools, "call": call, "accept": record.get("accept")}
    return {key: value for key, value in sample.items() if value is not None}

def to_pairs(record):
    """{id, pairs: [{request, call}]} -> pairs; the rows of a run's own --output are such records."""
    need(fits(record, {"pairs?": [dict]}), 'give {"id": ..., "pairs": [{"request": "...", "call": {...}}]}')
    return [dict(p, call=to_call(p.get("call"))) for p in record.get("pairs") or []]

SYSTEM = ('Answer the request with one tool call, a JSON object {"name": ..., "arguments": {...}} and nothing else.'
          ' Tools:\n')
# FORK HERE: another generation prompt; `judge` reads what it asks for, `check` is label-free quality control.
DRAFT = ('Write a DIFFERENT request of the same kind as the one below, for any of the tools, and its call, as a JSON'
         ' object {"call": {"name": ..., "arguments": {...}}, "request": "..."} and nothing else.\n\n')

def system_text(tools):
    """The tool list, one JSON object per line. It comes first, so that all that follows can share its cache."""
    return SYSTEM + "\n".join(dumps(t) for t in tools)

def user_text(messages):
    """The request; a dialogue becomes a transcript in one message, earlier calls and results included."""
    if len(messages) == 1:
        return messages[0]["content"].strip()
    turns = []
    for m in messages:
        turns += [f'{m["role"]}: {m["content"].strip()}'] if (m.get("content") or "").strip() else []
        turns += [f'call: {dumps(c.get("function", c))}' for c in m.get("tool_calls") or []]
    return "\n".join(turns)

PLAIN = ("{{ bos_token }}{% for m in messages %}{{ {'system': '', 'user': '\n\nRequest: ', 'assistant': '\nAnswer:\n'}[m.role]"
         " + m.content }}{% endfor %}\nAnswer:\n")  # for tokenizers without a chat template
def render(tok, system, user, shown=()):
    """-> (prompt, length of its part that ends with the system text), by the chat template; shown pairs are turns."""
    turns = [turn for pair in shown for turn in (pair["request"], dumps(pair["call"]))] + [user]
    talk = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    folded = dict(talk[0], content=f'{system}\n\n{talk[0]["content"]}')  # for templates without a system role
    for messages in ([{"role": "system", "content": system}, *talk], [folded, *talk[1:]]):
        try:
            text = tok.apply_chat_template(
                messages, chat_template=tok.chat_template or PLAIN, tokenize=False, add_generation_prompt=True,
                enable_thinking=False, date_string="01 January 2026")
        except Exception as e:  # jinja2's own: some templates raise on a system role, others drop it silently
            text = str(e)
        head = text.find(system) + len(system)
        if system in text and user in text[head:]:
            return text, head
    raise InputError(f"the model's chat template does not hold a system and a user message: {text[:80]}")

def encode(tok, text, *at):
    """-> (token ids, n for each character position in `at`): token n is the first that reaches beyond it. Prompt and
    answer are tokenised as one text: a token that straddles their boundary is the answer's."""
    out = tok(text, add_special_tokens=False, return_offsets_mapping=True)
    return out.input_ids, *(sum(end <= a for _, end in out.offset_mapping) for a in at)

def name_tokens(tok, prompt, name):
    """-> (ids of prompt + {"name": "...", up to the token with the closing quote; first token of the name). It is
    tokenised inside its whole answer: in many vocabularies the quote and the comma are one token."""
    text = prompt + '{"name": ' + dumps(name)
    ids, begin, quote = encode(tok, text + ', "arguments"', len(text) - len(dumps(name)) + 1, len(text) - 1)
    return ids[:quote + 1], begin

def pair_tokens(tok, x, pair):
    """-> (ids of the prompt for the pair's request and of the answer that is its call, first token of the answer)."""
    prompt, _ = render(tok, x["system"], pair["request"])
    return encode(tok, prompt + dumps(pair["call"]), len(prompt))

def draw(*key):
    """A torch generator seeded by `key` alone: no draw depends on order, batch, resume or shard."""
    return torch.Generator().manual_seed(int(hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16], 16) >> 1)

def prepare(model, tok, sample, cfg):
    """What Algorithm 1 may see of a sample: request, tools, prompt. The label stays behind."""
    tools = sorted(sample["tools"], key=lambda t: t["name"]) if cfg.shuffle else sample["tools"]
    if cfg.shuffle:  # by seed and names alone, so that samples with one tool list share one order
        order = draw(cfg.seed, "order", [t["name"] for t in tools])
        tools = [tools[i] for i in torch.randperm(len(tools), generator=order)]
    x = {"id": sample["id"], "request": user_text(sample["messages"]), "system": system_text(tools), "tools": tools,
         "names": [t["name"] for t in tools], "labelled": "call" in sample, "cost": {}, "error": "", "tok": tok,
         "context": context(model)}
    x["prompt"], head = render(tok, x["system"], x["request"])
    x["ids"], x["head"] = encode(tok, x["prompt"], head)
    x["candidates"] = [name_tokens(tok, x["prompt"], name) for name in x["names"]]
    if max(len(x["ids"]) + cfg.max_new_tokens, *(len(ids) for ids, _ in x["candidates"])) > x["context"]:
        x["error"] = f'prompt of {len(x["ids"])} + {cfg.max_new_tokens} tokens, they exceed the context of {x["context"]}'
    return x

# ---------------------------------------------------------------------------------------------- tokens, cache, stages
Past = namedtuple("Past", "ids cache mask")  # R rows that were read; a cache; (R, slots) which of its slots are theirs
def forward(model, rows, past=None, keep=1):
    """-> (logits (R, keep, V) at the last `keep` positions of R token rows, the Past that they leave behind).
    Each row continues the longest row of `past` that it begins with, whose tokens are not computed again; `past` is
    not changed. Rows are padded on the left: all end together, and only positions that matter go through the head."""
    begun, cache, mask = past or ([[]] * len(rows), transformers.DynamicCache(config=model.config),
                                  torch.zeros(len(rows), 0, dtype=torch.long))
    cache = copy.copy(cache)  # shallow copies do: an update rebinds a layer's tensors
    cache.layers = list(map(copy.copy, cache.layers))
    if past and [row[:-1] for row in rows] != past.ids:  # while decoding they are equal
        at = {tuple(ids): i for i, ids in enumerate(past.ids)}
        lengths = sorted(set(map(len, at)), reverse=True)
        owner = [next(at[row[:n]] for n in lengths if row[:n] in at) for row in map(tuple, rows)]
        begun, end = [past.ids[o] for o in owner], int(mask[owner].any(0).nonzero().max()) + 1
        mask = mask[owner, :end]
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :end], layer.values[:, :, :end]
        cache.reorder_cache(torch.tensor(owner, device=model.device))
    new = [row[len(ids):] for row, ids in zip(rows, begun)]
    width = max(map(len, new))
    ids = torch.tensor([[0] * (width - len(n)) + n for n in new])  # (R, T)
    mask = torch.cat([mask, torch.tensor([[0] * (width - len(n)) + [1] * len(n) for n in new])], 1)  # (R, slots + T)
    position = (mask.cumsum(1) - 1).clamp(min=0)[:, -width:]  # pads do not count
    last = torch.arange(max(0, width - keep), width)  # no slice: the head is faster on contiguous tensors
    logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=True,
                   position_ids=position.to(model.device), cache=cache, logits_to_keep=last).logits
    forward.tokens += ids.numel() * (1 + torch.is_grad_enabled())
    return logits, Past(list(rows), cache, mask)
forward.tokens = 0  # read so far, for `metered`

def context(model):
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
def windowed(model):
    """Does a layer see a window of slots only? Padding would then push real tokens out of it."""
    return any(layer.is_sliding for layer in transformers.DynamicCache(config=model.config).layers)

def token_logprobs(model, rows, n, past=None):
    """(R, L) log-probability of the last n[j] tokens of row j, L = max(n); right-aligned, 0 elsewhere.
        tokens    t0    t1    t2    t3       the logits at one position
        logits    '---> '---> '---> '        predict the token at the next"""
    L = max(n)
    if windowed(model) and len(rows) > 1:  # one by one, unpadded
        return torch.cat([torch.nn.functional.pad(token_logprobs(model, [row], [k], past), (L - k, 0))
                          for row, k in zip(rows, n)])
    logits = forward(model, rows, past, L + 1)[0][:, :-1]  # (R, L, V)
    target = torch.tensor([([0] * L + row)[-L:] for row in rows], device=logits.device)
    logp = logits.float().log_softmax(-1).gather(-1, target[..., None])[..., 0]
    wanted = torch.arange(L) >= L - torch.tensor(n)[:, None]
    return logp.masked_fill(~wanted.to(logp.device), 0.0)

@torch.no_grad()
def decode(model, tok, rows, start, limit, past=None, temperature=0.0, uniform=None):
    """-> R texts from token start[j] of row j on, each ended by an end token, a closed JSON object, or `limit`.
    temperature 0 is greedy; else uniform (R, limit) in [0, 1) goes through the inverse of the cumulative
    distribution: a row's draws are its own, whatever else is in the batch. No generation_config is obeyed."""
    ends = {e for c in (tok, model.generation_config, model.config.get_text_config())
            for e in (c.eos_token_id if isinstance(c.eos_token_id, list) else [c.eos_token_id])}
    text = lambda ids: tok.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    closes = functools.cache(lambda token: "}" in text([token]))
    texts, at, live = [""] * len(rows), list(range(len(rows))), set(range(len(rows)))
    for t in range(limit):
        logits, past = forward(model, rows, past)
        token = logits[:, -1].argmax(-1)
        if temperature > 0:
            cdf = (logits[:, -1].float() / temperature).softmax(-1).cumsum(-1)  # (R, V)
            u = uniform[at, t, None].to(cdf.device) * cdf[:, -1:]
            token = torch.searchsorted(cdf, u, right=True)[:, 0].clamp(max=cdf.shape[1] - 1)
        rows = [row + [k] for row, k in zip(rows, token.tolist())]
        for i, row in zip(at, rows):
            end = row[-1] in ends
            if i in live and (end or closes(row[-1]) or t == limit - 1):
                texts[i] = text(row[start[i]:len(row) - end])
                if end or parse(texts[i]) is not None:
                    live.remove(i)
        if not live:
            break
        if uniform is not None:  # a draft that has ended leaves the batch; adapters need every row in its place
            at, rows = zip(*((i, row) for i, row in zip(at, rows) if i in live))
    return texts

def metered(f):
    """Adds the stage's seconds and tokens to each sample's "cost", in equal shares; without samples, does nothing.
    Tokens are forward equivalents, padding included. One with a backward pass counts twice: the base is frozen."""
    @functools.wraps(f)
    def stage(model, tok, xs, *args, name=f.__name__, **kw):
        if not xs:
            return []
        before, start = forward.tokens, time.perf_counter()
        out = f(model, tok, xs, *args, **kw)
        torch.cuda.synchronize() if model.device.type == "cuda" else None
        spent = time.perf_counter() - start, forward.tokens - before
        for x in xs:
            x["cost"][name] = tuple(old + new / len(xs) for old, new in zip(x["cost"].get(name, (0, 0)), spent))
        return out
    return stage

@metered
@torch.no_grad()  # not inference_mode: T's gradients pass through what is cached here
def prefill(model, tok, xs, memory):
    """-> the Pasts of the tool lists, and of the prompts but for their last token. All is read in one pass; the lists
    apart if several samples share one, and not again if `memory`, a list, has them from the last call."""
    heads = [x["ids"][:x["head"]] for x in xs]
    tools = next((past for past in memory if all(head in past.ids for head in heads)), None)
    if not tools and (windowed(model) or len(set(map(tuple, heads))) < len(heads)):
        tools = forward(model, list(map(list, dict.fromkeys(map(tuple, heads)))))[1]
    asked = forward(model, [x["ids"][:-1] for x in xs], tools)[1]
    begun = asked.mask * (asked.mask.cumsum(1) <= torch.tensor([[len(head)] for head in heads]))
    memory[:] = [tools or Past(heads, asked.cache, begun)]  # a tool list is how its prompt begins
    return memory[0], asked

@metered
def answer(model, tok, xs, past, cfg, method=""):
    """Greedy answers, one text for each sample. TT-ICL shows it its pairs, unless they exceed the context."""
    rows = [x["ids"] for x in xs]
    if method == "icl":
        shown = [encode(tok, render(tok, x["system"], x["request"], x["pairs"])[0])[0] for x in xs]
        rows = [s if len(s) + cfg.max_new_tokens <= x["context"] else x["ids"] for s, x in zip(shown, xs)]
    return decode(model, tok, rows, [len(row) for row in rows], cfg.max_new_tokens, past)

# ---------------------------------------------------------------------------------------------- H: self-awareness
@metered
@torch.no_grad()
def score(model, tok, xs, past, cfg):
    """H. -> for each sample log P(a_n | x) in the order of x["names"]: from the first token of a name through the one
    that holds its closing quote, for without a terminator no name could lose to one that it begins."""
    rows, begin = zip(*(candidate for x in xs for candidate in x["candidates"]))
    n = [len(row) - b for row, b in zip(rows, begin)]
    logp = token_logprobs(model, rows, n, past).sum(1).tolist()
    flat = iter(logp if cfg.score == "sum" else [l / tokens for l, tokens in zip(logp, n)])
    return [[next(flat) for _ in x["names"]] for x in xs]

def softmax(logp):
    return torch.tensor(logp, dtype=torch.float64).softmax(0).tolist()

# FORK HERE: another uncertainty, e.g. 1 - entropy / log N instead of the margin. Below tau means uncertain.
def certainty(logp):
    """Relative Softmax Scoring: margin u = p(1) - p(2) of p = softmax(l). One candidate, no runner-up: 1 [ours]."""
    p = sorted(softmax(logp), reverse=True)
    return p[0] - p[1] if len(p) > 1 else 1.0

# ---------------------------------------------------------------------------------------------- G: self-data
@metered
@torch.no_grad()
def generate(model, tok, xs, past, cfg):
    """G. The model, or a teacher in its place (past: None), writes drafts, up to `attempts` times, until K pass
    -> for each sample [{text, verdict, pair}]."""
    drafts, prompts = [[] for _ in xs], [render(tok, x["system"], DRAFT + x["request"])[0] for x in xs]
    for _ in range(cfg.attempts):
        rows, start, uniform, owner, shared = [], [], [], [], []
        for x, prompt, mine in zip(xs, prompts, drafts):
            ids, begin = encode(tok, prompt, len(prompt))
            missing = cfg.k - sum(d["pair"] is not None for d in mine)
            numbers = range(len(mine), len(mine) + max(cfg.drafts, missing) * (missing > 0))
            names = [name for _, name in sorted(zip(x.get("logp", []), x["names"]), reverse=True)]
            new = [name_tokens(tok, prompt + '{"call": ', names[d % len(names)])[0] if cfg.cover else ids for d in numbers]
            if max(map(len, [ids] + new)) + cfg.max_new_tokens > context(model):
                mine[:] = [{"text": "", "verdict": "the prompt for drafts exceeds the context", "pair": None}]
                continue
            shared += [os.path.commonprefix([ids] + new)[:-1]] * (missing > 0)  # of token ids: read once for all drafts
            rows, start, owner = rows + new, start + [begin] * len(new), owner + [(x, mine)] * len(new)
            uniform += [torch.rand(cfg.max_new_tokens, generator=draw(cfg.seed, x["id"], "draft", d)) for d in numbers]
        if not rows:
            break
        asked = forward(model, shared, past)[1]
        texts = decode(model, tok, rows, start, cfg.max_new_tokens, asked, cfg.temperature, torch.stack(uniform))
        for (x, mine), text in zip(owner, texts):
            mine.append(judge(parse(text), text, x, mine, cfg))
    return drafts

def supplied(xs, pairs, cfg):
    """In place of G: drafts out of a file. A copy of the sample's own request is refused, checks or no checks."""
    drafts = [[] for _ in xs]
    for x, mine in zip(xs, drafts):
        for pair in pairs.get(x["id"], []):
            mine.append(judge(pair, dumps(pair), x, mine, cfg, copies=False))
    return drafts

def judge(draft, text, x, before, cfg, copies=True):
    """One draft, parsed -> {text, verdict, pair or None}. Unchecked, all that it needs are a request and a call."""
    if not fits(draft, {"request": str, "call": CALL}) or not draft["request"].strip():
        return {"text": text, "verdict": "no JSON object with a request and a call", "pair": None}
    pair = {"request": draft["request"].strip(), "call": {key: draft["call"][key] for key in CALL}}
    copied = "copy of the request" * (not copies and words(pair["request"]) == words(x["request"]))
    wrong = copied or (check(pair, x, [d["pair"] for d in before if d["pair"]]) if cfg.check else "")
    if len(pair_tokens(x["tok"], x, pair)[0]) > x["context"]:
        wrong = "exceeds the context"
    return {"text": text, "verdict": wrong or "kept", "pair": None if wrong else pair}

TYPES = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict}
# FORK HERE: checks of your own. They see the request, the tools on offer and earlier drafts, never a label.
def check(pair, x, before):
    """What is wrong with a pair {request, call} written for the sample x, or "" """
    name, arguments = pair["call"]["name"], pair["call"]["arguments"]
    if name not in x["names"]:
        return "tool not on offer"
    schema = x["tools"][x["names"].index(name)].get("parameters") or {}
    if any(key not in arguments for key in schema.get("required") or []):
        return "required argument missing"
    for key, value in arguments.items():
        rule = (schema.get("properties") or {}).get(key)
        if rule is None:
            return "unknown argument"
        kind = TYPES.get(str(rule.get("type")), object)
        if not isinstance(value, kind) or isinstance(value, bool) and kind not in (bool, object):  # True is an int
            return "wrong type"
        if isinstance(rule.get("enum"), list) and value not in rule["enum"]:
            return "value not in enum"
        if isinstance(value, str) and value.casefold() not in pair["request"].casefold():
            return "value not in the request"
    if words(pair["request"]) == words(x["request"]):
        return "copy of the request"
    return "written before" if any(words(pair["request"]) == words(p["request"]) for p in before) else ""

def words(text):
    return re.findall(r"\w+", text.casefold())
def closest(x):
    """Pairs by the words that they share with the request, most first; a word rare among the pairs weighs more."""
    pairs = [d["pair"] for d in x["drafts"] if d["pair"]]
    bags = [set(words(p["request"])) for p in pairs]
    weight = {w: math.log((len(bags) + 1) / (sum(w in bag for bag in bags) + 1)) for w in words(x["request"])}
    overlap = lambda pair: sum(v for w, v in weight.items() if w in words(pair["request"]))
    return sorted(pairs, key=overlap, reverse=True)  # ties stay in order

# ---------------------------------------------------------------------------------------------- T: self-improvement
# FORK HERE: another adapter. `fresh` makes the parameters of one layer for b samples, `adapted` is what it then gives.
def fresh(layer, generators, cfg):
    """A uniform in +-1/sqrt(d_in), B = 0: before the first step the adapter changes nothing. Always float32."""
    d_in, d_out = (layer.in_features, layer.out_features) if hasattr(layer, "in_features") else (layer.nx, layer.nf)
    A = torch.stack([torch.rand(d_in, cfg.lora_rank, generator=g).T * 2 - 1 for g in generators]) / d_in ** 0.5
    return [A, torch.zeros(len(generators), cfg.lora_rank, d_out)]  # (b, r, d_in), (b, r, d_out)

def adapted(x, y, parameters, cfg):
    """x (b, tokens, d_in), the frozen layer's y (b, tokens, d_out) -> y + alpha/r x A B
        x --+-- W, frozen ------------------------------+--> y
            '-- A (r, d_in) -- B (r, d_out) -- alpha/r -'"""
    A, B = parameters
    return torch.baddbmm(y, x @ A.mT, B, alpha=cfg.lora_alpha / cfg.lora_rank)

def linear_layers(model):
    """All linear layers but the head; GPT-2's Conv1D is one."""
    return [m for m in model.modules() if m is not model.get_output_embeddings()
            and (isinstance(m, torch.nn.Linear) or type(m).__name__ == "Conv1D")]

@contextmanager
def adapters(model, xs, cfg):
    """A temporary adapter on every linear layer for each of b samples: the i-th acts on the i-th of b equal groups of
    rows. Leaving the block is the reset: the base is never written, so there is nothing to restore."""
    generators, theta, hooks = [draw(cfg.seed, x["id"], "adapter") for x in xs], [], []
    try:
        for layer in linear_layers(model) if xs else []:
            parameters = [p.to(model.device).requires_grad_() for p in fresh(layer, generators, cfg)]
            def act(_, inputs, y, parameters=parameters):  # some models flatten rows and tokens
                flat = [t.reshape(len(xs), -1, t.shape[-1]).float() for t in (inputs[0], y)]
                return adapted(*flat, parameters, cfg).reshape(y.shape).to(y.dtype)
            hooks.append(layer.register_forward_hook(act))
            theta += parameters
        yield theta
    finally:
        for hook in hooks:
            hook.remove()

@metered
@torch.enable_grad()
def train(model, tok, xs, theta, past, cfg):
    """T. Trains adapter i on x_i's pairs, in place -> for each sample its losses, one a step: the mean over its pairs of
    the mean over the answer's tokens. Their SUM over samples gives each adapter the gradient that it would get alone."""
    K = max(len(x["pairs"]) for x in xs)
    padded = [(x, pair) for x in xs for pair in (x["pairs"] + [None] * K)[:K]]  # a missing pair has weight 0
    rows, begin = zip(*(pair_tokens(tok, x, pair or {"request": x["request"], "call": {}}) for x, pair in padded))
    n = [len(row) - b for row, b in zip(rows, begin)]
    weight = [1 / tokens / len(x["pairs"]) if pair else 0.0 for (x, pair), tokens in zip(padded, n)]
    weight = torch.tensor(weight, device=model.device)
    adamw = torch.optim.AdamW(theta, weight_decay=0.0) if cfg.optimizer == "adamw" else None  # afresh: no old moments
    losses = []
    for step in range(cfg.epochs):
        logp = token_logprobs(model, rows, n, past)  # (b K, L)
        loss = -(logp.sum(1) * weight).view(len(xs), K).sum(1)  # (b,)
        for p, g in zip(theta, torch.autograd.grad(loss.sum(), theta, materialize_grads=True)):  # unused layers: zeros
            p.grad = g
        lr = cfg.lr * (1 + math.cos(math.pi * step / cfg.epochs)) / 2
        if adamw:
            adamw.param_groups[0]["lr"] = lr
            adamw.step()
        else:
            sgd(theta, lr)
        losses.append(loss.tolist())
    return [[step[i] for step in losses] for i in range(len(xs))]

# FORK HERE: another update rule.
@torch.no_grad()
def sgd(theta, lr):
    """p <- p - lr g / |g|, |g| the norm over all parameters of one sample's adapter, never across samples [ours]"""
    norm = sum(p.grad.flatten(1).square().sum(1) for p in theta).sqrt().clamp(min=1e-12)  # (b,)
    for p in theta:
        p -= lr * p.grad / norm.view(-1, *[1] * (p.dim() - 1))

# ---------------------------------------------------------------------------------------------- Algorithm 1
def tt_si(model, tok, samples, cfg, pairs=None, teacher=None, memory=None):
    """Algorithm 1 for b independent samples at once -> their rows, in order. b = 1 is the paper, literally. No label is
    read: `prepare` leaves it behind. pairs: {id: [{request, call}]} to take instead of G; teacher: (model, tokenizer)
    that writes them, TT-D [paper]. memory: for `prefill`."""
    writer = teacher or (model, tok)
    if len(samples) > 1 and (windowed(model) or windowed(writer[0])):
        return [row for s in samples for row in tt_si(model, tok, [s], cfg, pairs, teacher, memory)]
    rows = [prepare(model, tok, s, cfg) for s in samples]
    xs = [x for x in rows if not x["error"]]
    tools, asked = prefill(model, tok, xs, [] if memory is None else memory) or (None, None)

    note(xs, logp=score(model, tok, xs, asked, cfg))                                # H  l_n = log P(a_n | x)
    note(xs, margin=[certainty(x["logp"]) for x in xs])                             #    u = p(1) - p(2)
    chosen = [x for x in xs if cfg.method != "direct"
              and (cfg.select == "all" or (x["margin"] < cfg.tau) == (cfg.select == "uncertain"))]

    note(chosen, drafts=supplied(chosen, pairs, cfg) if pairs is not None           # G  (x', y') ~ P( . | x)
         else generate(*writer, chosen, None if teacher else tools, cfg))
    note(chosen, pairs=[closest(x)[:cfg.k] for x in chosen])
    learners = [x for x in chosen if x["pairs"]]                                    #    no pair, no training
    students = learners if cfg.method == "ttsi" else []                             #    TT-ICL: pairs in the prompt
    past = tools if cfg.adapt == "suffix" else None
    with adapters(model, students, cfg) as theta:                                   # T  theta' = theta + LoRA
        note(students, loss=train(model, tok, students, theta, past, cfg))          #    trained on (x', y')
        note(learners, adapted=answer(model, tok, learners, past, cfg, cfg.method)) #    y ~ theta'
        if cfg.trace:
            note(students, after=score(model, tok, students, past, cfg, name="trace"))
    # Reset: the block has ended, the adapters are gone; the base parameters were never written.

    plain = [x for x in xs if "adapted" not in x or x["labelled"]]                  # y ~ theta for the certain,
    note(plain, direct=answer(model, tok, plain, asked, cfg, name="direct"))        # and to compare with
    return rows
def note(xs, **columns):
    for key, values in columns.items():
        for x, value in zip(xs, values):
            x[key] = value

# ---------------------------------------------------------------------------------------------- scoring, with labels
def canonical(value):
    """Values are compared as strings, once 12.0 is 12; containers element by element."""
    if isinstance(value, dict):
        return {key: canonical(v) for key, v in value.items()}
    if isinstance(value, list):
        return [canonical(v) for v in value]
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    return value.strip() if isinstance(value, str) else json.dumps(value)

def grade(text, sample):
    """-> {"name": right tool, "call": right tool and arguments}. `accept`, if given, lists what is right instead."""
    call, gold, accept = parse(text or "") or {}, sample["call"], sample.get("accept")
    given, name = call.get("arguments"), call.get("name") == gold["name"]
    allowed = {key: [v] for key, v in gold["arguments"].items()} if accept is None else accept
    return {"name": name, "call": name and isinstance(given, dict)
            and all(key in allowed and canonical(v) in map(canonical, allowed[key]) for key, v in given.items())
            and all(key in given or accept is not None and "" in values for key, values in allowed.items())}

def finish(x, sample, cfg):
    """What Algorithm 1 left of a sample -> its row: what is needed to check each decision by hand, and the grades."""
    row = {key: x[key] for key in "id error margin drafts pairs loss direct adapted cost".split() if key in x}
    if "logp" in x:
        row["candidates"] = [dict(zip(("name", "logp", "p"), c)) for c in zip(x["names"], x["logp"], softmax(x["logp"]))]
    row["decision"] = "not answered" if x["error"] else ("adapted" if "adapted" in x else "no pair was kept" if
                       "pairs" in x else "direct") + f', margin {x["margin"]:.4f}, tau {cfg.tau:g}, {cfg.select}'
    row["answer"] = x.get("adapted", x.get("direct"))
    row["call"] = parse(row["answer"] or "")
    if "call" in sample:
        row["scores"] = {"direct": grade(x.get("direct"), sample), "ttsi": grade(row["answer"], sample),
                         "first": sample["tools"][0]["name"] == sample["call"]["name"]}
    return json.loads(json.dumps(row), parse_constant=lambda name: None)  # a loss that is not finite becomes null

def interval(differences, resamples=10_000, seed=0):
    """Paired bootstrap over items: the 2.5 and 97.5 % quantiles of the mean difference."""
    d, g = torch.tensor(differences, dtype=torch.float64), torch.Generator().manual_seed(seed)
    means = torch.stack([d[torch.randint(len(d), (len(d),), generator=g)].mean() for _ in range(resamples)])
    return means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()

def auroc(values, right):
    """The probability that a right one has the higher value, ties counting half; None where all are right, or none."""
    high, low = (torch.tensor([v for v, r in zip(values, right) if r == side], dtype=torch.float64) for side in (1, 0))
    return ((high[:, None] > low).double() + (high[:, None] == low) / 2).mean().item() if len(high) * len(low) else None

def every_tau(rows):
    """Rows that were answered both ways (--select all) -> for each tau at which something changes, the samples adapted
    and call accuracy, in percent; as a control also with only the others adapted."""
    rows = sorted((r for r in rows if "scores" in r), key=lambda r: r.get("margin", 2))
    taus = [r.get("margin", 2) for r in rows] + [2]
    call = lambda side, part: 100 * sum(r["scores"][side]["call"] for r in part) / len(rows)
    return [{"tau": tau, "adapted": sum("adapted" in r for r in rows[:i]),
             "call": call("ttsi", rows[:i]) + call("direct", rows[i:]),
             "certain_only": call("direct", rows[:i]) + call("ttsi", rows[i:])}
            for i, tau in enumerate(taus) if rows and tau not in taus[:i]]

STAGES = ("prefill", "score", "generate", "train", "answer", "direct")
def summarise(rows):
    """-> counts, cost per sample, accuracies in percent over ALL labelled samples, and their paired difference."""
    answered = [r for r in rows if not r["error"]]
    scored = [r for r in rows if "scores" in r]
    mean = lambda values: sum(values) / max(1, len(values))
    out = {"n": len(rows), "labelled": len(scored), "adapted": sum("adapted" in r for r in rows), "direct": {}, "ttsi": {}, "cost": {},
           "one_candidate": sum(len(r.get("candidates", [])) == 1 for r in answered),
           "failed": {r["id"]: r["error"] for r in rows if r["error"]},
           "verdicts": dict(sorted(Counter(d["verdict"] for r in answered for d in r.get("drafts", [])).items()))}
    for i, unit in enumerate(("seconds", "tokens")):  # the direct answer of an adapted sample is for comparison only
        costs = [{s: c[i] for s, c in r["cost"].items() if s != "direct" or "adapted" not in r} for r in answered]
        out["cost"][unit] = {s: mean([c.get(s, 0) for c in costs]) for s in STAGES}
        out["ttsi"][unit] = mean([sum(c.values()) - c.get("trace", 0) for c in costs])
        if answered and all("direct" in r["cost"] for r in answered):
            out["direct"][unit] = mean([r["cost"]["prefill"][i] + r["cost"]["direct"][i] for r in answered])
    if scored:
        for side in ("direct", "ttsi"):
            out[side] |= {kind: 100 * mean([r["scores"][side][kind] for r in scored]) for kind in ("name", "call")}
        change = [r["scores"]["ttsi"]["call"] - r["scores"]["direct"]["call"] for r in scored]
        out |= {"always_first": 100 * mean([r["scores"]["first"] for r in scored]), "difference": 100 * mean(change),
                "interval": [100 * q for q in interval(change)], "wins": change.count(1), "losses": change.count(-1),
                "auroc": {kind: auroc(*zip(*((r["margin"], r["scores"]["direct"][kind]) for r in scored if "margin" in r)))
                          for kind in ("name", "call") if any("margin" in r for r in scored)}}
    return out

def table(s, cfg):
    """The summary for people."""
    forms = {"name": ".1f", "call": ".1f", "seconds": ".3f", "tokens": ".0f"}
    times = lambda side, unit: f' ({side[unit] / s["direct"][unit]:.1f}x)' if s["direct"].get(unit) else ""
    change = ["{:+.1f} [{:+.1f}, {:+.1f}]".format(s["difference"], *s["interval"]), s["wins"], s["losses"]] if (
        s["labelled"]) else [""] * 3
    lines = [["", "name", "call", "difference [95 %]", "wins", "losses", "adapted", "s/sample", "tokens/sample"]]
    for label, side, more in (("always first", {"name": s.get("always_first")}, [""] * 4), ("direct", s["direct"], [""] * 4),
                              ("TT-ICL" if cfg.method == "icl" else "TT-SI", s["ttsi"], [*change, f'{s["adapted"]}/{s["n"]}'])):
        cells = [f"{side[k]:{f}}" + times(side, k) * (k in s["cost"]) if side.get(k) is not None else "" for k, f in forms.items()]
        lines += [[label, *cells[:2], *more, *cells[2:]]]
    lines = ["{:12}  {:>5}  {:>5}  {:>19}  {:>4}  {:>6}  {:>8}  {:>15}  {:>14}".format(*line) for line in lines] + [""]
    lines += [f"{u} per sample: " + ", ".join(f"{stage} {n:{forms[u]}}" for stage, n in c.items()) for u, c in s["cost"].items()]
    lines += [", ".join(f"{n} drafts: {verdict}" for verdict, n in s["verdicts"].items()) or "no drafts"]
    lines += [f'{s["one_candidate"]} samples offer one tool only: no runner-up, margin 1'] * (s["one_candidate"] > 0)
    lines += [f"not answered, counted as wrong: {i}: {error}" for i, error in s["failed"].items()]
    return "\n".join(lines + [f'with {s["labelled"]} samples the interval is wide'] * (0 < s["labelled"] < 300))

def trace(tok, x, row, sample, cfg):
    """One sample as the paper's Figure 1 tells it. The label comes last, after all that could not see it."""
    show = lambda heading, *lines: print(f"\n-- {heading}", *lines, sep="\n  ")
    bars = lambda logp: [f'{"#" * round(30 * p):30} {p:.3f}  log P {l:8.3f}  {name}'
                         for p, l, name in sorted(zip(softmax(logp), logp, x["names"]), reverse=True)]
    show(f'The prompt of {row["id"]}', x["prompt"])
    show("H: how likely is each tool on offer?", *bars(x.get("logp", [])), row["error"] or row["decision"])
    if "drafts" in row:
        prompt, head = render(tok, x["system"], DRAFT + x["request"])
        show("G: the prompt, after the same tools; the drafts", prompt[head:], *(
            f'{d["text"]}\n  -> {d["verdict"]}' for d in row["drafts"]))
    if "adapted" in row:
        show(f"T: a temporary LoRA of rank {cfg.lora_rank}, trained on" if "loss" in row else "Shown before the request",
             *(f'{pair["request"]}\n  -> {dumps(pair["call"])}' for pair in row["pairs"]),
             *(f"step {step}: loss {loss}" for step, loss in enumerate(row.get("loss", []), 1)), *bars(x.get("after", [])))
    show("The answer; then everything is reset", f'before: {row.get("direct")}', f'after:  {row["answer"]}')
    if "call" in sample:
        before, after = (("wrong", "right tool, wrong arguments", "right")[sum(row["scores"][side].values())]
                         for side in ("direct", "ttsi"))
        show("The label, which nothing above has seen", dumps(sample["call"]), f"before: {before}", f"after:  {after}")

# ---------------------------------------------------------------------------------------------- running
def load(cfg, flag="model"):
    """-> (model, tokenizer), frozen; from safetensors only, without running code that comes with a model."""
    name = getattr(cfg, flag)
    device = str(torch.accelerator.current_accelerator() or "cpu") if cfg.device == "auto" else cfg.device
    dtype = cfg.dtype if cfg.dtype != "auto" else "float32" if device == "cpu" else "auto"
    try:
        tok = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=getattr(torch, dtype, dtype), trust_remote_code=False, use_safetensors=True)
        model = model.to(device).eval().requires_grad_(False)
    except Exception as e:  # whatever goes wrong in there is about this model or device
        raise InputError(f"--{flag} {name}: cannot be loaded on {device}: {' '.join(str(e).split())[:200]};"
                         " give a folder or hub name of a causal language model in safetensors") from e
    need(tok.is_fast and linear_layers(model), f"--{flag} {name}: needs a fast tokenizer and linear layers")
    need(all(type(layer).__name__ in ("DynamicLayer", "DynamicSlidingWindowLayer") for layer in transformers.DynamicCache(config=model.config).layers),
         f"--{flag} {name}: its cache is no plain key/value cache (linear attention, state space); not supported")
    return model, tok

def resume(cfg, settings, samples, size):
    """Opens cfg.output -> (file, its summary's path, rows of whole batches so far). A torn batch is done again."""
    path = Path(cfg.output)
    try:
        beside = path.with_suffix(".summary.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        before = loads(beside.read_text(encoding="utf-8")).get("config") or {} if lines else settings
        for key, value in settings.items():
            need(before.get(key) == value, f"it was begun with {key} = {before.get(key)!r}, not {value!r}")
        whole = sum(line.endswith(b"\n") for line in lines)
        whole = len(samples) if whole >= len(samples) else whole - whole % size
        rows = [loads(line.decode()) for line in lines[:whole]]
        need([r.get("id") for r in rows] == [s["id"] for s in samples[:whole]], "its rows are not those of this run")
        file = open(path, "a", encoding="utf-8", newline="\n")
        file.truncate(sum(map(len, lines[:whole])))
        beside.write_text(json.dumps({"config": settings}, indent=1), encoding="utf-8")
        return file, beside, rows
    except (OSError, ValueError) as e:
        raise InputError(f"--output {path}: cannot be used: {e}; take another name, or the same settings") from e

def run(cfg):
    """Reads, answers, scores, writes -> the summary."""
    need(not (cfg.trace and cfg.output), "--trace tells one sample and writes no --output; give one of them")
    samples = read_jsonl(cfg.data, to_sample)
    wanted = [cfg.trace] if cfg.trace else [i for i in cfg.ids.split(",") if i] or list(samples)
    for i in wanted:
        need(i in samples, f"{cfg.data}: no sample has the id {i}; the first is {next(iter(samples))}")
    samples = [samples[i] for i in samples if i in set(wanted)][:cfg.limit or None]
    pairs = read_jsonl(cfg.pairs, to_pairs) if cfg.pairs else None
    need(not (pairs and cfg.teacher), "--pairs or --teacher: both say what to train on; give one of them")
    need(not pairs or any(s["id"] in pairs for s in samples), f"{cfg.pairs}: no pairs for any sample of {cfg.data}")
    size = cfg.batch_size or (25 if cfg.model == Config.model else 1)
    settings = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in ("output", "trace")}
    for key in ("data", "pairs") if pairs else ("data",):
        settings[key + "_sha256"] = hashlib.sha256(Path(settings[key]).read_bytes()).hexdigest()
    out, beside, rows = resume(cfg, settings, samples, size) if cfg.output else (None, None, [])
    model, tok = load(cfg)
    teacher = load(cfg, "teacher") if cfg.teacher else None
    sizes = [sum(p.numel() for p in fresh(layer, [torch.Generator()], cfg)) for layer in linear_layers(model)]
    print(f"{len(samples)} samples of {os.path.relpath(cfg.data)}; {os.path.relpath(cfg.model)}, {model.dtype} on"
          f" {model.device}: {model.num_parameters():,} parameters, an adapter {sum(sizes):,} on {len(sizes)} layers\n")
    batches, memory = [samples[i:i + size] for i in range(len(rows), len(samples), size)], []
    for batch in tqdm(batches, unit="batch", disable=bool(cfg.trace)):
        xs = tt_si(model, tok, batch, cfg, pairs, teacher, memory)
        rows += [finish(x, s, cfg) for x, s in zip(xs, batch)]
        if cfg.trace:
            trace((teacher or (model, tok))[1], xs[0], rows[-1], batch[0], cfg)
        if out:
            print(*map(dumps, rows[-len(batch):]), sep="\n", file=out, flush=True)
            os.fsync(out.fileno())
    summary = summarise(rows) | {"every_tau": every_tau(rows) if cfg.select == "all" else [], "config": settings, "versions": {
        "python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}}
    if out:
        out.close()
        beside.write_text(json.dumps(summary, indent=1), encoding="utf-8")
    if not cfg.trace:
        print(table(summary, cfg))
    return summary

def parse_flags(argv):
    """-> Config; - and _ are one in a flag's name."""
    parser = argparse.ArgumentParser("ttsi.py", description=__doc__, epilog=f"--paper stands for {PAPER}; give more to "
        "depart from it", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: need(False, f"{message}; -h explains every flag")
    for f in dataclasses.fields(Config):
        text, allowed = f.metadata["help"].replace("%", "%%"), f.metadata["allowed"]
        how = {"action": argparse.BooleanOptionalAction} if f.type is bool else {
            "type": f.type, "choices": allowed if isinstance(allowed, tuple) else None}
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, **how,
                            help=text + ("" if f.default == "" else " (default: %(default)s)"))
    argv = PAPER.split() * ("--paper" in argv) + [a for a in argv if a != "--paper"]
    flags = vars(parser.parse_args([re.sub(r"^--[^=]*", lambda m: m[0].replace("_", "-"), a) for a in argv]))
    for f in dataclasses.fields(Config):
        least, value = f.metadata["allowed"], flags[f.name]
        need(isinstance(least, tuple) or least is None or least <= value < math.inf,
             f"--{f.name.replace('_', '-')} {value}: must be a number of at least {least}")
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
        print("\n".join(f"ttsi: {line}" for line in str(e).splitlines()), file=sys.stderr)
        sys.exit(2)
