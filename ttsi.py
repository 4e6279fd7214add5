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
 1. Four drafts must pass label-free checks (--check); the closest to x is trained on. 2. A pair is written call
 first. 3. SGD, normalised per adapter; we take the paper's 1e-4 for AdamW's rate (--optimizer). No warm-up. 4. The
 adapter acts behind the tools only (--adapt suffix): one cache of them serves every stage. 5. Tools are offered in a
 seeded order (--shuffle): benchmarks list the right one first. 6. b samples at once, each with an adapter of its own.
Shapes: b samples, N candidates, R rows of T tokens, V vocabulary, K pairs, r rank. A span: (token ids, begin).
"""
import argparse, copy, dataclasses, functools, hashlib, itertools, json, math, os, re, sys, time  # noqa: E401
from collections import Counter, namedtuple
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
import torch, transformers  # noqa: E401
from tqdm import tqdm
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
# ---------------------------------------------------------------------------------------------- configuration
HERE = Path(__file__).resolve().parent
def flag(default, text, choices=None, least=None):
    """A field that is a flag: its default, its help, and the choices or the least number that are allowed."""
    typed = {"type": type(default), "choices": choices}
    how = {"action": argparse.BooleanOptionalAction} if type(default) is bool else typed
    how["help"] = text.replace("%", "%%") + ("" if default == "" else " (default: %(default)s)")
    return dataclasses.field(default=default, metadata={"least": least, "argparse": how})

@dataclasses.dataclass
class Config:
    """Every field is a flag. [paper]: stated there or reported from it; [ours]: our choice."""
    model: str = flag(str(HERE / "data/model"), "folder or hub name of a causal language model")
    data: str = flag(str(HERE / "data/demo.jsonl"), "samples, one JSON object a line (README: Your own data)")
    output: str = flag("", "one JSON row per sample goes here, a summary beside it; a run that was cut off goes on")
    teacher: str = flag("", "a model that writes the drafts in its place: TT-D [paper]")
    pairs: str = flag("", "train on the pairs of this file, {id, pairs: [{request, call}]} a line, not on drafts")
    limit: int = flag(0, "only the first so many samples; 0: all", least=0)
    ids: str = flag("", "only these samples, separated by commas")
    trace: str = flag("", "tell the sample of this id step by step")
    seed: int = flag(0, "of drafts, adapter initialisation and candidate order")
    device: str = flag("auto", "a torch device; auto: cuda, else mps, else cpu")
    dtype: str = flag("auto", "auto: float32 on a CPU, else as stored", ("auto", "float32", "bfloat16", "float16"))
    batch_size: int = flag(0, "samples at once; memory grows (README: Speed); 0: 25, other models 1 [ours]", least=0)
    shuffle: bool = flag(True, "offer the tools in a seeded order, not the file's [ours]")
    method: str = flag("ttsi", "train on pairs, icl: show them [paper], direct: neither", ("ttsi", "icl", "direct"))
    tau: float = flag(0.95, "adapt where the margin is below [paper]", least=0.0)
    score: str = flag("sum", "log-probability of a name: over its tokens sum [paper] or mean", ("sum", "mean"))
    select: str = flag("uncertain", "samples to adapt [paper, with controls]", ("uncertain", "certain", "all"))
    k: int = flag(1, "pairs to train on [paper]", least=1)
    drafts: int = flag(4, "at once; of those that pass, the k closest to x are kept [ours; paper: 1]", least=1)
    cover: bool = flag(False, "the tools of the drafts are forced in turn, the likeliest first [ours]")
    attempts: int = flag(4, "times that drafts are written, until k pass [ours; paper: 1]", least=1)
    temperature: float = flag(1.0, "of the drafts; answers are greedy [ours]", least=0.0)
    check: bool = flag(True, "only drafts that pass the label-free checks are kept [ours]")
    max_new_tokens: int = flag(256, "at most, in a draft or an answer [ours]", least=1)
    lora_rank: int = flag(8, "r [paper]", least=1)
    lora_alpha: float = flag(16.0, "the adapter's output is scaled by alpha / r [paper]", least=0.0)
    optimizer: str = flag("sgd", "sgd: a step has length lr in each adapter [ours]; adamw [paper]", ("sgd", "adamw"))
    lr: float = flag(0.1, "peak of the cosine schedule [ours; paper: 1e-4, adamw]", least=0.0)
    epochs: int = flag(5, "steps, each on all k pairs [paper: 5, k = 1]", least=0)
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
dumps = functools.partial(json.dumps, ensure_ascii=False, allow_nan=False)
def loads(text, decode=DECODER.decode):
    """One JSON object, or an InputError. No lone surrogates, which no tokenizer takes; no 1e999, it is infinite."""
    try:
        value = decode(text)
        dumps(value).encode()
        canonical(value)  # bounds the depth
    except (ValueError, RecursionError) as e:
        raise InputError(f"not JSON, one object each: {e}") from None
    need(isinstance(value, dict), f"found a {type(value).__name__}")
    return value

def parse(text):
    """The JSON object that begins at the first brace of a model's text, or None. Model output is untrusted data."""
    with suppress(InputError):
        return loads(text, lambda text: DECODER.raw_decode(text, text.index("{"))[0])

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
def to_call(call):  # arguments may come as a JSON string
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
                i = record["id"] = str(record.get("id", number))
                need(i not in found and i.isprintable(), f"id {i!r}: ids must differ, and be printable")
                found[i] = check(record)
        except InputError as e:
            errors.append(f"{path}:{number}: {str(e)[:300]}")
    need(found and not errors, "\n".join(errors) or f"{path}: nothing in it; each line must be one JSON object")
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
    need(call is None or fits(call, CALL) and call["name"] in names,
         f'"call" must be {{"name": ..., "arguments": {{...}}}} for one of the tools {names}: {dumps(call)[:80]}')
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
def system_text(tools):  # the tools, one a line; they come first, so that all that follows can share their cache
    return SYSTEM + "\n".join(dumps(t) for t in tools)
def user_text(messages):
    """The request; a dialogue becomes a transcript in one message, earlier calls and results included."""
    turns = []
    for m in messages:
        text = (m.get("content") or "").strip()
        turns += [f'{m["role"]}: {text}' if len(messages) > 1 else text] * bool(text)
        turns += [f'call: {dumps(c.get("function", c))}' for c in m.get("tool_calls") or []]
    return "\n".join(turns)

PLAIN = ("{{ bos_token }}{% for m in messages %}{{ {'system': '', 'user': '\n\nRequest: ', 'assistant': '\nAnswer:\n'"
         "}[m.role] + m.content }}{% endfor %}\nAnswer:\n")  # for tokenizers without a chat template
def render(tok, system, user, shown=()):
    """-> (prompt, length of its part that ends with the system text), by the chat template; shown pairs are turns."""
    turns = [turn for pair in shown for turn in (pair["request"], dumps(pair["call"]))] + [user]
    talk = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    folded = dict(talk[0], content=f'{system}\n\n{talk[0]["content"]}')  # for templates without a system role
    for messages in ([{"role": "system", "content": system}, *talk], [folded, *talk[1:]]):
        try:
            text = tok.apply_chat_template(
                messages, chat_template=None if tok.chat_template else PLAIN, tokenize=False,
                add_generation_prompt=True, enable_thinking=False, date_string="01 January 2026")
        except Exception as e:  # jinja2's own: some templates raise on a system role, others drop it silently
            text = str(e)
        head = text.find(system) + len(system)
        if system in text and user in text[head:]:
            return text, head
    raise InputError(f"the model's chat template does not hold a system and a user message: {text[:80]}")

def encode(tok, text, *at):
    """-> (token ids, for each character position in `at` the first token that reaches beyond it: the answer's)."""
    out = tok(text, add_special_tokens=False, return_offsets_mapping=True)
    return out.input_ids, *(sum(end <= a for _, end in out.offset_mapping) for a in at)

def name_tokens(tok, prompt, name):
    """-> span of the name and its closing quote after prompt + {"name": ", as tokenised inside a whole answer."""
    text = prompt + '{"name": ' + dumps(name)
    ids, begin, quote = encode(tok, text + ', "arguments"', len(text) - len(dumps(name)) + 1, len(text) - 1)
    return ids[:quote + 1], begin

def pair_tokens(tok, x, pair):
    """-> span of the prompt for the pair's request and of the answer that is its call, from the answer on."""
    prompt, _ = render(tok, x["system"], pair["request"])
    return encode(tok, prompt + dumps(pair["call"]), len(prompt))

def context(model):
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
def draw(*key):
    """A torch generator seeded by `key` alone: no draw depends on order, batch, resume or shard."""
    return torch.Generator().manual_seed(int(hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16], 16) >> 1)

def prepare(model, tok, sample, cfg):
    """What Algorithm 1 may see of a sample: request, tools, prompt. The label stays behind."""
    tools = sample["tools"]
    if cfg.shuffle:  # by seed and names alone, so that samples with one tool list share one order
        tools = sorted(tools, key=lambda t: t["name"])
        order = draw(cfg.seed, "order", [t["name"] for t in tools])
        tools = [tools[i] for i in torch.randperm(len(tools), generator=order)]
    x = {"id": sample["id"], "request": user_text(sample["messages"]), "system": system_text(tools), "tools": tools,
         "names": [t["name"] for t in tools], "labelled": "call" in sample, "cost": {}, "tok": tok,
         "context": context(model), "error": "the chat template does not hold its request"}
    with suppress(InputError):  # of render
        x["prompt"], head = render(tok, x["system"], x["request"])
        x["ids"], x["head"] = encode(tok, x["prompt"], head)
        n = len(x["ids"]) + cfg.max_new_tokens
        x["candidates"] = [name_tokens(tok, x["prompt"], name) for name in x["names"] if n <= x["context"]]
        n = max([n, *(len(ids) for ids, _ in x["candidates"])])
        x["error"] = f"prompt and answer, {n} tokens, exceed the context of {x['context']}" * (n > x["context"])
    return x
# ---------------------------------------------------------------------------------------------- tokens, cache, stages
Past = namedtuple("Past", "ids cache mask")  # R rows that were read; a cache; (R, slots) which slots are theirs
def forward(model, rows, past=None, keep=1):
    """-> (logits (R, keep, V) at the last `keep` positions of R token rows, the Past that they leave behind).
    Each row continues the longest row of `past` that it begins with, whose tokens are not computed again; `past` is
    not changed. Rows are padded on the left: all end together, and only positions that matter go through the head."""
    begun, cache, mask = past or ([[]] * len(rows), DynamicCache(config=model.config), torch.ones(len(rows), 0).int())
    cache = copy.copy(cache)  # shallow copies do: an update rebinds a layer's tensors
    cache.layers = list(map(copy.copy, cache.layers))
    if past and [row[:-1] for row in rows] != past.ids:  # while decoding they are equal
        owner = [max((len(ids), i) for i, ids in enumerate(past.ids) if row[:len(ids)] == ids)[1] for row in rows]
        begun, end = [past.ids[o] for o in owner], int(mask[owner].any(0).nonzero().max()) + 1
        mask = mask[owner, :end]
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :end], layer.values[:, :, :end]
        cache.reorder_cache(torch.tensor(owner, device=model.device))
    new = [row[len(ids):] for row, ids in zip(rows, begun)]
    width = max(map(len, new))
    ids = padded(new, width)  # (R, T)
    mask = torch.cat([mask, padded([[1] * len(n) for n in new], width)], 1)  # (R, slots + T)
    position = (mask.cumsum(1) - 1).clamp(min=0)[:, -width:]  # pads do not count
    last = torch.arange(max(0, width - keep), width)  # no slice: the head is faster on contiguous tensors
    logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=True,
                   position_ids=position.to(model.device), cache=cache, logits_to_keep=last).logits
    forward.tokens += ids.numel() * (1 + torch.is_grad_enabled())
    return logits, Past(list(rows), cache, mask)
forward.tokens = 0  # read so far, for `metered`
def padded(rows, width, pad=0):
    return torch.tensor([[pad] * (width - len(row)) + row for row in rows])
def windowed(model):  # does a layer see a window of slots only? padding would push real tokens out of it
    return any(layer.is_sliding for layer in DynamicCache(config=model.config).layers)
def logprob(model, spans, past=None):
    """(R,) log-probability of each of R spans (ids, begin): of the tokens from `begin` on, after those before.
        tokens    t0    t1    t2    t3       the logits at one position
        logits    '---> '---> '---> '        predict the token at the next"""
    if windowed(model) and len(spans) > 1:  # one by one, unpadded
        return torch.cat([logprob(model, [span], past) for span in spans])
    rest = [ids[begin:] for ids, begin in spans]
    L = max(map(len, rest))
    logits = forward(model, [ids for ids, _ in spans], past, L + 1)[0][:, :-1].flatten(0, 1)  # (R L, V)
    target = padded(rest, L, pad=-100).flatten().to(model.device)  # what is -100 gives no loss
    return -torch.nn.functional.cross_entropy(logits.float(), target, reduction="none").view(-1, L).sum(1)

@torch.no_grad()
def decode(model, tok, rows, start, limit, past=None, temperature=0.0, uniform=None):
    """-> R texts, row j from token start[j] to an end token, a closed JSON object or `limit`; no generation_config.
    Greedy, or by uniform (R, limit) and the inverse of the cumulative distribution: a row's draws are its own."""
    if windowed(model) and len(set(map(len, rows))) > 1:  # one by one, unpadded
        return [decode(model, tok, [row], [n], limit, past, temperature, u)[0]
                for row, n, u in zip(rows, start, [None] * len(rows) if uniform is None else uniform[:, None])]
    ends = {e for c in (tok, model.generation_config, model.config.get_text_config())
            for e in (c.eos_token_id if isinstance(c.eos_token_id, list) else [c.eos_token_id])}
    text = lambda ids: tok.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    closes = functools.cache(lambda token: "}" in text([token]))
    texts, at = [None] * len(rows), range(len(rows))
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
            if texts[i] is None and (end or closes(row[-1]) or t == limit - 1):
                written = text(row[start[i]:len(row) - end])
                if end or t == limit - 1 or parse(written) is not None:
                    texts[i] = written
        if None not in texts:
            return texts
        if uniform is not None:  # a draft that has ended leaves the batch; adapters need every row in its place
            at, rows = zip(*((i, row) for i, row in zip(at, rows) if texts[i] is None))

def metered(f):
    """Adds the stage's seconds and tokens to each sample's "cost", in equal shares; without samples, does nothing.
    Tokens are forward equivalents, padding included. One with a backward pass counts twice: the base is frozen."""
    @torch.no_grad()  # all stages but T; not inference_mode: T's gradients pass through what is cached in the others
    @functools.wraps(f)
    def stage(model, tok, xs, *args, name=f.__name__, **kw):
        if not xs:
            return []
        before, start = forward.tokens, time.perf_counter()
        out = f(model, tok, xs, *args, **kw)
        torch.cuda.synchronize(model.device) if model.device.type == "cuda" else None
        spent = time.perf_counter() - start, forward.tokens - before
        for x in xs:
            x["cost"][name] = tuple(old + new / len(xs) for old, new in zip(x["cost"].get(name, (0, 0)), spent))
        return out
    return stage

@metered
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
def score(model, tok, xs, past, cfg):
    """H. -> for each sample log P(a_n | x), closing quotes included, or no name could lose to one that it begins."""
    spans = [span for x in xs for span in x["candidates"]]
    n = torch.tensor([len(ids) - begin if cfg.score == "mean" else 1 for ids, begin in spans])
    logp = logprob(model, spans, past).cpu().double() / n
    return [l.tolist() for l in logp.split([len(x["names"]) for x in xs])]

def softmax(logp):
    return torch.tensor(logp, dtype=torch.float64).softmax(0).tolist()
# FORK HERE: another uncertainty, e.g. 1 - entropy / log N instead of the margin. Below tau means uncertain.
def certainty(logp):
    """Relative Softmax Scoring: margin u = p(1) - p(2) of p = softmax(l). One candidate, no runner-up: 1 [ours]."""
    p = sorted(softmax(logp), reverse=True)
    return p[0] - p[1] if len(p) > 1 else 1.0
# ---------------------------------------------------------------------------------------------- G: self-data
@metered
def generate(model, tok, xs, past, cfg):
    """G. -> for each sample the drafts that the model, or a teacher (past: None), writes until K pass."""
    drafts, writing = [], []
    for x in xs:
        prompt, _ = render(tok, x["system"], DRAFT + x["request"])
        likely = [name for _, name in sorted(zip(x["logp"], x["names"]), reverse=True)] if cfg.cover else []
        begun = [*encode(tok, prompt), *(name_tokens(tok, prompt + '{"call": ', name)[0] for name in likely)]
        long = max(map(len, begun)) + cfg.max_new_tokens > context(model)
        drafts.append([{"text": "", "verdict": "the prompt for drafts exceeds the context", "pair": None}] * long)
        writing += [(x, drafts[-1], begun)] * (not long)
    for _ in range(cfg.attempts):
        writing = [w for w in writing if len(kept(w[1])) < cfg.k]
        if not writing:
            break
        jobs = [(x, mine, begun, d) for x, mine, begun in writing
                for d in range(len(mine), len(mine) + max(cfg.drafts, cfg.k - len(kept(mine))))]
        rows = [forced[d % len(forced)] if forced else ids for _, _, (ids, *forced), d in jobs]
        start = [len(begun[0]) for _, _, begun, _ in jobs]
        uniform = [torch.rand(cfg.max_new_tokens, generator=draw(cfg.seed, x["id"], "draft", d)) for x, *_, d in jobs]
        asked = forward(model, [os.path.commonprefix(begun)[:-1] for *_, begun in writing], past)[1]  # for all drafts
        texts = decode(model, tok, rows, start, cfg.max_new_tokens, asked, cfg.temperature, torch.stack(uniform))
        for (x, mine, *_), text in zip(jobs, texts):
            mine.append(judge(text, x, mine, cfg))
    return drafts

def supplied(xs, pairs, cfg):
    """In place of G: drafts out of a file. A copy of the sample's own request is refused, checks or no checks."""
    drafts = [[] for _ in xs]
    for x, mine in zip(xs, drafts):
        for pair in pairs.get(x["id"], []):
            mine.append(judge(dumps(pair), x, mine, cfg, copies=False))
    return drafts

def judge(text, x, before, cfg, copies=True):
    """One draft -> {text, verdict, pair or None}. Unchecked, all that it needs are a request and a call."""
    draft = parse(text)
    if not fits(draft, {"request": str, "call": CALL}) or not draft["request"].strip():
        return {"text": text, "verdict": "no JSON object with a request and a call", "pair": None}
    pair = {"request": draft["request"].strip(), "call": {key: draft["call"][key] for key in CALL}}
    long = "exceeds the context" * (len(pair_tokens(x["tok"], x, pair)[0]) > x["context"])
    copied = "copy of the request" * (not copies and words(pair["request"]) == words(x["request"]))
    wrong = long or copied or (check(pair, x, kept(before)) if cfg.check else "")
    return {"text": text, "verdict": wrong or "kept", "pair": None if wrong else pair}

TYPES = dict(string=[str], integer=[int], number=[int, float], boolean=[bool], array=[list], object=[dict])
# FORK HERE: checks of your own. They see the request, the tools on offer and earlier drafts, never a label.
def check(pair, x, before):
    """What is wrong with a pair {request, call} written for the sample x, or "" """
    arguments, request = pair["call"]["arguments"], pair["request"]
    tool = next((t for t in x["tools"] if t["name"] == pair["call"]["name"]), {})
    schema = tool.get("parameters") or {}
    rules = schema.get("properties") or {}
    known = [(rules[key], value) for key, value in arguments.items() if key in rules]
    faults = {
        "tool not on offer": not tool,
        "required argument missing": not set(schema.get("required") or []) <= set(arguments),
        "unknown argument": len(known) < len(arguments),
        "wrong type": any(type(v) not in TYPES.get(str(rule.get("type")), [type(v)]) for rule, v in known),
        "value not in enum": any(isinstance(rule.get("enum"), list) and v not in rule["enum"] for rule, v in known),
        "value not in the request": any(type(v) is str and v.casefold() not in request.casefold() for _, v in known),
        "copy of the request": words(request) == words(x["request"]),
        "written before": words(request) in [words(p["request"]) for p in before]}
    return next((fault for fault, found in faults.items() if found), "")

def words(text):
    return re.findall(r"\w+", text.casefold())
def kept(drafts):
    return [d["pair"] for d in drafts if d["pair"]]
def closest(x):
    """Pairs by the words that they share with the request, most first; a word rare among the pairs weighs more."""
    pairs = kept(x["drafts"])
    bags = [set(words(p["request"])) for p in pairs]
    weight = {w: math.log((len(bags) + 1) / (sum(w in bag for bag in bags) + 1)) for w in words(x["request"])}
    overlap = [sum(v for w, v in weight.items() if w in bag) for bag in bags]
    return [pairs[i] for i in sorted(range(len(pairs)), key=lambda i: -overlap[i])]  # stable: ties stay in order
# ---------------------------------------------------------------------------------------------- T: self-improvement
# FORK HERE: another adapter. `fresh` makes one layer's parameters for b samples, `adapted` is what it then gives.
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
    generators, theta = [draw(cfg.seed, x["id"], "adapter") for x in xs], []
    with ExitStack() as hooks:
        for layer in linear_layers(model) if xs else []:
            parameters = [p.to(model.device).requires_grad_() for p in fresh(layer, generators, cfg)]
            def act(_, inputs, y, parameters=parameters):  # some models flatten rows and tokens
                flat = [t.reshape(len(xs), -1, t.shape[-1]).float() for t in (inputs[0], y)]
                return adapted(*flat, parameters, cfg).reshape(y.shape).to(y.dtype)
            hooks.enter_context(layer.register_forward_hook(act))
            theta += parameters
        yield theta

@metered
@torch.enable_grad()
def train(model, tok, xs, theta, past, cfg):
    """T. Trains adapter i on x_i's pairs, in place -> for each sample its loss at each step: the mean over its pairs
    of the mean over answer tokens. The SUM over samples gives each adapter the gradient that it would get alone."""
    K, losses = max(len(x["pairs"]) for x in xs), []
    pairs = [(x, pair) for x in xs for pair in (x["pairs"] + [None] * K)[:K]]  # a missing pair has weight 0
    spans = [pair_tokens(tok, x, pair or {"request": x["request"], "call": {}}) for x, pair in pairs]
    weight = torch.tensor([1 / (len(ids) - begin) / len(x["pairs"]) if pair else 0.0
                           for (x, pair), (ids, begin) in zip(pairs, spans)], device=model.device)  # (b K,)
    adamw = torch.optim.AdamW(theta, weight_decay=0.0)  # afresh: no old moments
    for step in range(cfg.epochs):
        loss = -(logprob(model, spans, past) * weight).view(len(xs), K).sum(1)  # (b,)
        grads = torch.autograd.grad(loss.sum(), theta, allow_unused=True, materialize_grads=True)
        for p, g in zip(theta, grads):
            p.grad = g
        lr = adamw.param_groups[0]["lr"] = cfg.lr * (1 + math.cos(math.pi * step / cfg.epochs)) / 2
        if cfg.optimizer == "adamw":
            adamw.step()
        else:
            sgd(theta, lr)
        losses.append(loss.tolist())
    return [[step[i] for step in losses] for i in range(len(xs))]

@torch.no_grad()
def sgd(theta, lr):  # FORK HERE: another update rule
    """p <- p - lr g / |g|, |g| the norm over all parameters of one sample's adapter, never across samples [ours]"""
    norm = sum(p.grad.flatten(1).square().sum(1) for p in theta).sqrt().clamp(min=1e-12)  # (b,)
    for p in theta:
        p -= lr * p.grad / norm.view(-1, *[1] * (p.dim() - 1))
# ---------------------------------------------------------------------------------------------- Algorithm 1
def tt_si(model, tok, samples, cfg, pairs=None, teacher=None, memory=None):
    """Algorithm 1 for b independent samples at once -> their rows, in order; b = 1 is the paper. No label is read.
    pairs: {id: [pair]} in place of G; teacher: (model, tokenizer) that writes them (TT-D); memory: see `prefill`."""
    writer = teacher or (model, tok)
    if len(samples) > 1 and (windowed(model) or windowed(writer[0])):
        return [row for s in samples for row in tt_si(model, tok, [s], cfg, pairs, teacher, memory)]
    rows = [prepare(model, tok, s, cfg) for s in samples]
    xs = [x for x in rows if not x["error"]]
    tools, asked = prefill(model, tok, xs, [] if memory is None else memory) or (None, None)

    note(xs, logp=score(model, tok, xs, asked, cfg))                                # H  l_n = log P(a_n | x)
    sound = [x for x in xs if all(map(math.isfinite, x["logp"]))]                   #    else, the base answers
    note(sound, margin=[certainty(x["logp"]) for x in sound])                       #    u = p(1) - p(2)
    chosen = [x for x in sound if cfg.method != "direct"
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
        for i, x in enumerate(students):                                            #    or else, the base answers
            if not (all(map(math.isfinite, x["loss"])) and all(p[i].isfinite().all() for p in theta)):
                del x["adapted"]
    # Reset: the block has ended, the adapters are gone; the base parameters were never written.

    plain = [x for x in xs if "adapted" not in x or x["labelled"]]                  # y ~ theta for the certain,
    note(plain, direct=answer(model, tok, plain, asked, cfg, name="direct"))        # and to compare with
    return rows

def note(xs, **columns):
    for x, *values in zip(xs, *columns.values()):
        x.update(zip(columns, values))
# ---------------------------------------------------------------------------------------------- scoring, with labels
def canonical(value, levels=100):
    """Values are compared as strings, once 12.0 is 12; containers element by element."""
    need(levels, "nested more than 100 deep")
    if isinstance(value, dict):
        return {key: canonical(v, levels - 1) for key, v in value.items()}
    if isinstance(value, list):
        return [canonical(v, levels - 1) for v in value]
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
        row["candidates"] = [dict(name=n, logp=l, p=p) for n, l, p in zip(x["names"], x["logp"], softmax(x["logp"]))]
    what = "adapted" if "adapted" in x else "no pair was kept" if x.get("pairs") == [] else "direct"
    why = f'{what}, margin {x.get("margin", math.nan):.4f}, tau {cfg.tau:g}, {cfg.select}'
    answer = x.get("adapted", x.get("direct"))
    row |= {"decision": "not answered" if x["error"] else why, "answer": answer, "call": parse(answer or "")}
    if "call" in sample:
        row["scores"] = {"direct": grade(x.get("direct"), sample), "ttsi": grade(answer, sample),
                         "first": sample["tools"][0]["name"] == sample["call"]["name"]}
    return json.loads(json.dumps(row), parse_constant=lambda name: None)  # a loss that is not finite becomes null

def interval(differences, resamples=10_000, seed=0):
    """Paired bootstrap over items: the 2.5 and 97.5 % quantiles of the mean difference."""
    d, g = torch.tensor(differences, dtype=torch.float64), torch.Generator().manual_seed(seed)
    means = torch.stack([d[torch.randint(len(d), (len(d),), generator=g)].mean() for _ in range(resamples)])
    return means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
def auroc(values, right):
    """The probability that a right one has the higher value, ties count half; None where all are right, or none."""
    high, low = (torch.tensor(sorted(v for v, r in zip(values, right) if r == side)) for side in (True, False))
    below = torch.searchsorted(low, high) + torch.searchsorted(low, high, right=True)  # ties are in the second only
    return below.double().mean().item() / 2 / len(low) if len(high) * len(low) else None
def every_tau(rows):
    """Rows of --select all -> for each tau that matters: n adapted, call accuracy, that of adapting the others."""
    rows = sorted((r for r in rows if "scores" in r), key=lambda r: r.get("margin", 2))
    taus = [r.get("margin", 2) for r in rows] + [2]
    adapted, direct, ttsi = ([0, *itertools.accumulate(map(f, rows))] for f in (
        lambda r: "adapted" in r, *(lambda r, s=side: r["scores"][s]["call"] for side in ("direct", "ttsi"))))
    call = lambda low, high, i: 100 * (low[i] + high[-1] - high[i]) / len(rows)
    return [{"tau": tau, "adapted": adapted[i], "call": call(ttsi, direct, i), "certain_only": call(direct, ttsi, i)}
            for i, tau in enumerate(taus) if rows and (not i or tau > taus[i - 1])]

STAGES = ("prefill", "score", "generate", "train", "answer", "direct")
def summarise(rows):
    """-> counts, cost per sample, accuracies in percent over ALL labelled samples, and their paired difference."""
    mean = lambda values: sum(values) / max(1, len(values))
    answered, scored = [r for r in rows if not r["error"]], [r for r in rows if "scores" in r]
    out = {"n": len(rows), "labelled": len(scored), "adapted": sum("adapted" in r for r in rows),
           "one_candidate": sum(len(r.get("candidates", [])) == 1 for r in answered),
           "failed": {r["id"]: r["error"] for r in rows if r["error"]}, "direct": {}, "ttsi": {}, "cost": {},
           "not_finite": {r["id"]: "loss" if "loss" in r else "score" for r in answered if "adapted" not in r
                          and ("loss" in r or "candidates" in r and "margin" not in r)},
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
        told = [r for r in scored if "margin" in r]
        right = {kind: [r["scores"]["direct"][kind] for r in told] for kind in ("name", "call")}
        out |= {"always_first": 100 * mean([r["scores"]["first"] for r in scored]), "difference": 100 * mean(change),
                "interval": [100 * q for q in interval(change)], "wins": change.count(1), "losses": change.count(-1),
                "auroc": {kind: auroc([r["margin"] for r in told], right[kind]) for kind in right}}
    return out

def table(s, cfg):
    """The summary for people."""
    forms = {"name": ".1f", "call": ".1f", "seconds": ".3f", "tokens": ".0f"}
    line, direct = "{:12}  {:>5}  {:>5}  {:>19}  {:>4}  {:>6}  {:>8}  {:>15}  {:>14}".format, s["direct"]
    times = lambda side, k: f" ({side[k] / direct[k]:.1f}x)" if k in s["cost"] and direct.get(k) else ""
    change = [""] * 3 if not s["labelled"] else [
        "{:+.1f} [{:+.1f}, {:+.1f}]".format(s["difference"], *s["interval"]), s["wins"], s["losses"]]
    sides = {"always first": ({"name": s.get("always_first")}, [""] * 4), "direct": (direct, [""] * 4),
             "TT-ICL" if cfg.method == "icl" else "TT-SI": (s["ttsi"], [*change, f'{s["adapted"]}/{s["n"]}'])}
    lines = [line("", "name", "call", "difference [95 %]", "wins", "losses", "adapted", "s/sample", "tokens/sample")]
    for label, (side, more) in sides.items():
        cells = ["" if side.get(k) is None else f"{side[k]:{form}}" + times(side, k) for k, form in forms.items()]
        lines.append(line(label, *cells[:2], *more, *cells[2:]))
    lines += ["", *(f"{unit} per sample: " + ", ".join(f"{stage} {n:{forms[unit]}}" for stage, n in cost.items())
                    for unit, cost in s["cost"].items())]
    lines += [", ".join(f"{n} drafts: {verdict}" for verdict, n in s["verdicts"].items()) or "no drafts"]
    lines += [f'{s["one_candidate"]} samples offer one tool only: no runner-up, margin 1'] * (s["one_candidate"] > 0)
    lines += [f"not answered, counted as wrong: {i}: {error}" for i, error in s["failed"].items()]
    lines += [f"answered by the base, its {what} is not finite: {i}" for i, what in s["not_finite"].items()]
    return "\n".join(lines + [f'with {s["labelled"]} samples the interval is wide'] * (0 < s["labelled"] < 300))

def trace(tok, x, row, sample, cfg):
    """One sample as the paper's Figure 1 tells it. The label comes last, after all that could not see it."""
    show = lambda heading, *lines: print(f"\n-- {heading}", *lines, sep="\n  ")
    bars = lambda logp: [f'{"#" * round(30 * p):30} {p:.3f}  log P {l:8.3f}  {name}'
                         for p, l, name in sorted(zip(softmax(logp), logp, x["names"]), reverse=True) if p == p]
    show(f'The prompt of {row["id"]}', x.get("prompt", ""))
    show("H: how likely is each tool on offer?", *bars(x.get("logp", [])), row["error"] or row["decision"])
    if "drafts" in row:
        prompt, head = render(tok, x["system"], DRAFT + x["request"])
        drafts = [f'{d["text"]}\n  -> {d["verdict"]}' for d in row["drafts"]]
        show("G: the prompt, after the same tools; the drafts", prompt[head:], *drafts)
    if "adapted" in row:
        use = f"T: a temporary LoRA of rank {cfg.lora_rank}, trained on"
        pairs = [f'{pair["request"]}\n  -> {dumps(pair["call"])}' for pair in row["pairs"]]
        steps = [f"step {step}: loss {loss}" for step, loss in enumerate(row.get("loss", []), 1)]
        show(use if "loss" in row else "Shown before the request", *pairs, *steps, *bars(x.get("after", [])))
    show("The answer; then everything is reset", f'before: {row.get("direct")}', f'after:  {row["answer"]}')
    if "call" in sample:
        grades = [sum(row["scores"][side].values()) for side in ("direct", "ttsi")]
        was, now = (("wrong", "right tool, wrong arguments", "right")[grade] for grade in grades)
        show("The label, which nothing above has seen", dumps(sample["call"]), f"before: {was}", f"after:  {now}")
# ---------------------------------------------------------------------------------------------- running
def load(cfg, flag="model"):
    """-> (model, tokenizer), frozen; from safetensors only, without running code that comes with a model."""
    name, found = getattr(cfg, flag), torch.accelerator.current_accelerator(check_available=True)
    device = str(found or "cpu") if cfg.device == "auto" else cfg.device
    dtype = cfg.dtype if cfg.dtype != "auto" else "float32" if device == "cpu" else "auto"
    try:
        torch.accelerator.set_device_index(int(rank)) if found and (rank := os.environ.get("LOCAL_RANK")) else None
        tok = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True)
        need(not info["missing_keys"], f"weights are missing: {sorted(info['missing_keys'])}")
        need(tok.is_fast and linear_layers(model), "needs a fast tokenizer and linear layers")
        need({type(l) for l in DynamicCache(config=model.config).layers} <= {DynamicLayer, DynamicSlidingWindowLayer},
             "its cache is no plain key/value cache (linear attention, state space)")
        model = model.to(device).eval().requires_grad_(False)
        decode(model, tok, [encode(tok, render(tok, "tools", "request")[0])[0] + [tok.vocab_size - 1]], [0], 1)
    except Exception as e:  # whatever goes wrong in there is about this model or device
        raise InputError(f"--{flag} {name}: cannot be loaded on {device}: {' '.join(str(e).split())[:200]};"
                         " give a folder or hub name of a causal language model in safetensors") from e
    return model, tok

def save(path, lines, mode="w"):
    """Replaces a file in one step, or adds to it ("a"). When this returns, the lines are on the disk."""
    part = f"{path}.{os.environ.get('RANK', '')}part" if mode == "w" else path
    with open(part, mode, buffering=1, encoding="utf-8", newline="\n") as file:
        file.writelines(f"{line}\n" for line in lines)
        os.fsync(file.fileno())
    os.replace(part, path)

def resume(path, rank, world, settings, batches):
    """-> (the file to which this process adds its rows, the summary's, {id: row} of the batches that are whole in the
    files of any processes). Its share of these goes into its file; one process alone then removes the others."""
    stem = str(path).removesuffix(".jsonl")
    try:
        own, beside = Path(f"{stem}.rank{rank}of{world}.jsonl") if world > 1 else path, Path(f"{stem}.summary.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        need(path.is_file() or not path.exists(), "it is no regular file")
        files = [f for f in path.parent.iterdir() if re.fullmatch(re.escape(stem) + r"\.rank\d+of\d+\.jsonl", str(f))]
        lines = [line for f in (*files, path) if f.exists() for line in f.read_bytes().splitlines(True)]
        before = loads(beside.read_text(encoding="utf-8")).get("config") or {} if lines else settings
        for k, new in settings.items():  # a row is independent of the batch size
            need(k == "batch_size" or new == before.get(k), f"it was begun with {k} = {before.get(k)!r}, not {new!r}")
        rows = {str(row.get("id")): row for row in (loads(line.decode()) for line in lines if line.endswith(b"\n"))}
        need(rows.keys() <= set().union(*batches), "its rows are not those of this run")
        own.touch()
    except (OSError, ValueError, AttributeError) as e:  # of what is no row, or no summary
        raise InputError(f"--output {path}: cannot be used: {e}; take another name, or the same settings") from e
    resized = before.get("batch_size") != settings["batch_size"]  # from then on each row counts on its own
    rows = {i: rows[i] for ids in batches if resized or rows.keys() >= set(ids) for i in ids if i in rows}
    save(own, [dumps(rows[i]) for ids in (batches if resized else batches[rank::world]) for i in ids if i in rows])
    if resized or not lines:
        save(beside, [json.dumps({"config": settings | {"batch_size": "mixed"} if resized else settings})])
    [file.unlink() for file in files if own == path]
    return own, beside, rows

def run(cfg):
    """Reads, answers, scores, writes -> the summary."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun
    need(not (cfg.trace and cfg.output), "--trace tells one sample and writes no --output; give one of them")
    need(rank < world and (world == 1 or cfg.output), "each of WORLD_SIZE processes writes a file: give --output")
    samples = read_jsonl(cfg.data, to_sample)
    wanted = dict.fromkeys([cfg.trace] if cfg.trace else cfg.ids.split(",") if cfg.ids else samples)
    for i in wanted:
        need(i in samples, f"{cfg.data}: no sample has the id {i}; the first is {next(iter(samples))}")
    ids = [i for i in samples if i in wanted][:cfg.limit or None]
    pairs = read_jsonl(cfg.pairs, to_pairs) if cfg.pairs else None
    need(not (pairs and cfg.teacher), "--pairs or --teacher: both say what to train on; give one of them")
    need(not pairs or any(pairs.get(i) for i in ids), f"{cfg.pairs}: no pairs for any sample of {cfg.data}")
    settings = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in ("output", "trace")}
    settings["sha256"] = hashlib.sha256(dumps([samples, pairs]).encode()).hexdigest()  # of data and pairs
    size = cfg.batch_size or (25 if cfg.model == Config.model else 1)
    batches, path = [ids[i:i + size] for i in range(0, len(ids), size)], Path(cfg.output)
    own, beside, rows = resume(path, rank, world, settings, batches) if cfg.output else ("", "", {})
    left, memory = [[samples[i] for i in batch if i not in rows] for batch in batches[rank::world]], []
    if any(left):
        (model, tok), teacher = load(cfg), load(cfg, "teacher") if cfg.teacher else None
        with torch.device("meta"):
            lora = [sum(p.numel() for p in fresh(layer, [torch.Generator()], cfg)) for layer in linear_layers(model)]
        data, name = map(os.path.relpath, (cfg.data, cfg.model))
        print(f"{sum(map(len, left))} samples of {data}; {name}, {model.dtype} on {model.device}:"
              f" {model.num_parameters():,} parameters, an adapter {sum(lora):,} on {len(lora)} layers\n")
    try:
        for batch in tqdm([*filter(None, left)], unit="batch", disable=bool(cfg.trace or rank or not any(left))):
            xs = tt_si(model, tok, batch, cfg, pairs, teacher, memory)
            rows |= {s["id"]: finish(x, s, cfg) for x, s in zip(xs, batch)}
            if cfg.trace:
                trace((teacher or (model, tok))[1], xs[0], rows[cfg.trace], batch[0], cfg)
            if own:
                save(own, [dumps(rows[s["id"]]) for s in batch], "a")
    except (MemoryError, RuntimeError) as e:
        if re.search("MemoryError|(out of|allocate|enough) memory|ALLOC_FAILED", repr(e)):
            n = max(len(prepare(model, tok, s, cfg).get("ids", [])) for s in batch)
            e = MemoryError(f"out of memory: a prompt of {n} tokens; lower --batch-size {size}, or --drafts")
        raise e
    finally:
        rows = [rows[i] for i in ids if i in rows]
        summary = summarise(rows) | {"config": settings, "every_tau": every_tau(rows) if cfg.select == "all" else []}
        summary["versions"] = {m.__name__: m.__version__ for m in (torch, transformers)}
        if not cfg.trace:
            print(table(summary, cfg) if world == 1 else f"rank {rank}: one process will merge all rows")
    if cfg.output and world == 1:
        save(path, map(dumps, rows))
        save(beside, [json.dumps(summary, indent=1)])
    return summary

def parse_flags(argv):
    """-> Config; - and _ are one in a flag's name."""
    parser = argparse.ArgumentParser(
        "ttsi.py", description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"--paper stands for {PAPER}; give more to depart from it")
    parser.error = lambda message: need(False, f"{message}; -h explains every flag")
    dashed = lambda text: re.sub(r"^[^=]*", lambda name: name[0].replace("_", "-"), text)
    fields = {"--" + dashed(f.name): f for f in dataclasses.fields(Config)}
    for name, f in fields.items():
        parser.add_argument(name, default=f.default, **f.metadata["argparse"])
    argv = PAPER.split() * ("--paper" in argv) + [a for a in argv if a != "--paper"]
    cfg = Config(**vars(parser.parse_args([dashed(a) if a.startswith("--") else a for a in argv])))
    for name, f in fields.items():
        least, value = f.metadata["least"], getattr(cfg, f.name)
        need(least is None or least <= value <= 10**6, f"{name} {value}: must be a number from {least} to 1000000")
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
    except (InputError, MemoryError, OSError) as e:
        more = "" if isinstance(e, InputError) else "; rows that are there stay, the same command goes on"
        print(*(f"ttsi: {line}{more}" for line in str(e).split("\n")), sep="\n", file=sys.stderr)
        sys.exit(2 if isinstance(e, InputError) else 1)
