"""The evidence: TT-SI beside its variants, controls and rivals, composed of what ttsi.py exports.

    python data/experiments.py own                       # the embedded model on data/test.jsonl
    python data/experiments.py real --model FOLDER --data FILE ... --pool FILE ...
    python data/experiments.py choice --model FOLDER --data DEVFILE --limit 60
    python data/experiments.py real default paper ...    # these methods alone, others later
    python data/experiments.py --kept                    # tables and figures of kept rows alone
    python data/experiments.py real --quick              # does all of it run? Keeps nothing

Rows go to data/results/rows/ as they come; a run that was cut off goes on. With RANK and WORLD_SIZE
in the environment, processes share those of a method, and a last one without packs them. Of data
that does not lie in this folder rows hold no texts: these go to runs/texts/, where methods that
share TT-SI's pairs find them. Tables and figures are made of rows alone, into data/results/.
"""

import argparse
import dataclasses
import functools
import gzip
import hashlib
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import figures  # noqa: E402

import ttsi  # noqa: E402

RESULTS = HERE / "results"
TEXTS = HERE.parent / "runs" / "texts"
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LABELS, SFT_BATCH, SFT_EPOCHS, SFT_RATE = 200, 2, 3, 0.1
TEACHER = str(HERE / "teacher")  # who writes the pairs of TT-D
OF_ALL = ("read", "direct", "score")  # stages that no gate can spare
PLACES = {"test": "own world", "canonical_294": "Seal-Tools", "sealtool": "Seal-Tools"}
PLACES |= {"canonical_real": "ToolAlpaca", "toolalpaca": "ToolAlpaca"}
PLACES |= {"canonical_318": "NexusRaven", "canonical_l1": "API-Bank", "canonical_l2": "API-Bank"}
PLACES |= {"apibank_l1": "API-Bank", "apibank_l2": "API-Bank"}


# ------------------------------------------------------------------------------------ methods
# Each is a function (model, tok, sample, cfg) -> Result, and a sample holds no label. What it needs
# besides comes last.
def adapted(model, tok, sample, cfg):
    """TT-SI as if any margin were small."""
    return ttsi.tt_si(model, tok, sample, dataclasses.replace(cfg, tau=2.0))


def retrained(model, tok, sample, cfg, pairs, about=None, adapter=ttsi.temporary_lora):
    """TT-SI with other settings of T, on pairs that are there, about this sample's tools or
    another's."""
    x = ttsi.prepare(tok, about or sample, cfg)
    spans = [ttsi.span(tok, x, pair["request"], pair["call"]) for pair in pairs]
    return trained_on(model, tok, sample, cfg, spans, adapter)


def trained_on(model, tok, sample, cfg, spans, adapter=ttsi.temporary_lora):
    """T on spans, and an answer; the LoRA acts behind what all of them begin with."""
    x = ttsi.prepare(tok, sample, cfg)
    if not spans:
        return answered(model, x, x.ids, cfg)
    result = ttsi.Result(x.id, cost={}, decision="adapted")
    head = x.ids[: x.head] if cfg.adapt == "suffix" else []
    shared = os.path.commonprefix([head, *(ids for ids, _ in spans)])
    frozen = ttsi.Prefix(model, shared)
    with adapter(model, cfg, ttsi.draw(cfg.seed, x.id, "adapter")) as parameters:
        with ttsi.measured(model, result.cost, "train"):
            result.loss = ttsi.train(spans, frozen, parameters, cfg)
        with ttsi.measured(model, result.cost, "answer"):
            result.answer = ttsi.write(tok, x.ids, frozen, cfg)[0]
    return result


def anothers(model, tok, sample, cfg, other):
    """T on the pairs of another item, about that item's tools."""
    return retrained(model, tok, sample, cfg, other["kept"], about=other)


@contextmanager
def bias_vector(model, cfg, rng):
    """In the LoRA's place a vector, added to what the output layer sees, as GTTA does (arXiv
    2511.04847) -> [it], float32. It goes with the block."""
    head = model.get_output_embeddings()
    bias = torch.zeros(head.weight.shape[1], device=model.device, requires_grad=True)
    hook = head.register_forward_pre_hook(lambda _, h: ((h[0].float() + bias).to(h[0].dtype),))
    try:
        yield [bias]
    finally:
        hook.remove()


biased = functools.partial(retrained, adapter=bias_vector)


def nearest_tool(model, tok, sample, cfg, pairs):
    """No training: the tool of the pair that has most words in common with the request. The base
    fills in its arguments."""
    x = ttsi.prepare(tok, sample, cfg)
    if not pairs:
        return answered(model, x, x.ids, cfg)
    nearest = max(pairs, key=lambda pair: alike(pair["request"], x.request))
    call = ttsi.call_text(tok, {"name": nearest["call"]["name"], "arguments": {}})
    before, after = call.split("{}", 1)
    return answered(model, x, x.ids, cfg, (before.rstrip(), after))


def answered(model, x, ids, cfg, outline=("",)):
    """-> Result: what the model answers behind ids, without training."""
    result = ttsi.Result(x.id, cost={}, decision="answered")
    after_tools = ttsi.Prefix(model, x.ids[: x.head])
    with ttsi.measured(model, result.cost, "answer"):
        read = ttsi.Prefix(model, ids[:-1], after_tools)
        (result.answer,) = ttsi.write(x.tok, ids, read, cfg, [outline])
    return result


def struck(model, tok, sample, cfg, row):
    """No training: the direct answer, without optional arguments that the request does not say."""
    x = ttsi.prepare(tok, sample, cfg)
    cost = {stage: row["cost"][stage] for stage in ("read", "direct")}
    result = ttsi.Result(x.id, cost=cost, decision="struck out", answer=row["direct"])
    call = ttsi.parse(result.answer)
    if call and call["name"] in x.schemas:
        kept = x.schemas[call["name"]]["required"]
        said = {k: v for k, v in call["arguments"].items() if k in kept or ttsi.said(v, x.request)}
        result.answer = ttsi.dumps(call | {"arguments": said})
    return result


def alike(a, b):
    """The share of common words among all words of two texts."""
    a, b = (set(re.findall(r"\w+", text.casefold())) for text in (a, b))
    return len(a & b) / max(len(a | b), 1)


def shown(model, tok, sample, cfg, pairs):
    """TT-ICL: no training; the pairs stand before the request, as turns of one dialogue."""
    x = ttsi.prepare(tok, sample, cfg)
    turns = []
    for pair in pairs:
        call = {"id": ttsi.ID, "type": "function", "function": pair["call"]}
        turns.append({"role": "user", "content": pair["request"]})
        turns.append({"role": "assistant", "content": "", "tool_calls": [call]})
    rest = [message for message in sample["messages"] if message["role"] != "system"]
    ids, _ = ttsi.encode(tok, x.tools, [*x.system, *turns, *rest])
    return answered(model, x, ids, cfg)


def vote(model, tok, sample, cfg, tokens):
    """The call that most of the answers make that are sampled with so many tokens."""
    result, _, texts = sampled(model, tok, sample, cfg, tokens)
    calls = [ttsi.parse(text) for text in texts]
    votes = [sum(ttsi.grade(text, call)[1] for text in texts) if call else 0 for call in calls]
    result.answer = texts[votes.index(max(votes))]
    return result


def best_of(model, tok, sample, cfg, tokens):
    """The sampled answer to which the model gives the highest probability. It reads each again."""
    result, read, texts = sampled(model, tok, sample, cfg, tokens // 2)
    ids = ttsi.prepare(tok, sample, cfg).ids
    spans = [(ids + ttsi.continuation(tok, text), len(ids)) for text in texts]
    with ttsi.measured(model, result.cost, "answer"), torch.no_grad():
        logp = [ttsi.logprob([span], read).item() for span in spans]
    result.answer = texts[logp.index(max(logp))]
    return result


def sampled(model, tok, sample, cfg, tokens):
    """-> (Result without an answer, the Prefix of the prompt, answers: as many as the tokens
    allow, four at a time)"""
    result = ttsi.Result(sample["id"], cost={"answer": [0.0, 0]}, decision="sampled")
    x, texts = ttsi.prepare(tok, sample, cfg), []
    read = ttsi.Prefix(model, x.ids[:-1])
    while not texts or result.cost["answer"][1] < tokens:
        rngs = [ttsi.draw(cfg.seed, x.id, "sampled", len(texts) + n) for n in range(4)]
        with ttsi.measured(model, result.cost, "answer"):
            texts += ttsi.write(tok, x.ids, read, cfg, [("",)] * 4, rngs)
    return result, read, texts


def fine_tuned(model, tok, sample, cfg, tuned):
    """SFT: the answer under one LoRA that was trained once, on labelled samples."""
    with ttsi.temporary_lora(model, cfg, ttsi.draw(0)) as lora:
        for parameter, learned in zip(lora, tuned, strict=True):
            parameter.data.copy_(learned)
        x = ttsi.prepare(tok, sample, cfg)
        return answered(model, x, x.ids, cfg)


def fine_tune(model, tok, pool, cfg):
    """-> the parameters of one LoRA. Batches of labelled samples, a step each, cosine."""
    order = []
    for epoch in range(SFT_EPOCHS):
        order += torch.randperm(len(pool), generator=ttsi.draw(cfg.seed, "sft", epoch)).tolist()
    batches = [order[i : i + SFT_BATCH] for i in range(0, len(order), SFT_BATCH)]
    with ttsi.temporary_lora(model, cfg, ttsi.draw(cfg.seed, "sft")) as lora:
        for step, batch in enumerate(tqdm(batches, desc=f"SFT on {len(pool)} labels")):
            lr = SFT_RATE * (1 + math.cos(math.pi * step / len(batches))) / 2
            now = dataclasses.replace(cfg, lr=lr, epochs=1)
            spans = [labelled_span(tok, pool[i], cfg) for i in batch]
            ttsi.train(spans, ttsi.Prefix(model, []), lora, now)
        return [parameter.detach().clone() for parameter in lora]


def labelled_span(tok, sample, cfg):
    tools = ttsi.prepare(tok, sample, cfg).tools
    return ttsi.encode(tok, tools, sample["messages"], sample["call"])


def neighbours(model, tok, sample, cfg, pool):
    """TTT-NN: T on the three labelled samples whose requests have most words in common with this
    one, each about its own tools."""
    ordered = sorted(pool, key=lambda other: alike(request_of(other), request_of(sample)))
    spans = [labelled_span(tok, other, cfg) for other in ordered[-3:]]
    return trained_on(model, tok, sample, cfg, spans)


def request_of(sample):
    return " ".join(m["content"] for m in sample["messages"] if m["role"] == "user")


def itself(model, tok, sample, cfg, label):
    """NOT a method, a bound: T on the item itself, label included."""
    span = labelled_span(tok, sample | {"call": label}, cfg)
    return trained_on(model, tok, sample, cfg, [span])


# --------------------------------------------------------------------------------------- rows
class Lab:
    """One model on one file of labelled samples, and the rows of all methods."""

    def __init__(self, args, data):
        self.args, self.data, self.known = args, Path(data), {}
        self.place = PLACES.get(self.data.stem, self.data.stem)

    @functools.cached_property
    def samples(self):
        """{id: sample} of the whole file."""
        samples = ttsi.read_jsonl(self.data, ttsi.to_sample)
        ttsi.need(all("call" in s for s in samples.values()), f"{self.data}: a label is missing")
        return samples

    @property
    def base(self):
        """(model, tokenizer)"""
        return loaded(self.args.model, self.args.flags)

    def config(self, name, seed):
        flags = f"{self.args.flags} {method_of(name).flags}"
        return dataclasses.replace(ttsi.parse_arguments(flags.split()), seed=seed)

    def rows(self, name, seed):
        """-> {id: row} of a method, in the order of ids; what is missing is made. With --kept:
        None, where something is missing."""
        if (name, seed) not in self.known:
            chosen = self.chosen(name, seed)
            if not self.args.kept:
                self.make(name, seed, chosen)
            _, rows = read_rows(self.path(name, seed))
            if not rows.keys() >= {*chosen}:
                return None
            self.known[name, seed] = {i: rows[i] for i in chosen}
        return self.known[name, seed]

    def texts(self, name, seed):
        """-> the same rows with their texts, read once."""
        if ("texts", name, seed) not in self.known:
            rows, path = self.rows(name, seed), self.path(name, seed, whole=True)
            _, whole = read_rows(path)
            ttsi.need(rows.keys() <= whole.keys(), f"{path} lacks texts: give other --rows")
            self.known["texts", name, seed] = {i: whole[i] for i in rows}
        return self.known["texts", name, seed]

    def chosen(self, name, seed):
        """-> the ids that a method is run on, in their order."""
        if name == "default":
            ids = read_rows(self.path(name, seed))[1] if self.args.kept else self.samples
            return sorted(seeded(ids)[: self.args.limit or None])
        rows, on = self.rows("default", seed) or {}, method_of(name).on
        answered = [i for i in rows if rows[i]["margin"] is not None]
        if on == "all" or self.args.quick:
            return answered
        cfg = self.config(name, seed)
        flawed = {i for i in answered if rows[i]["flaw"] and cfg.check and cfg.tau > 0}
        unsure = {i for i in answered if rows[i]["margin"] < cfg.tau} | flawed
        return [i for i in answered if (i in unsure) == (on == "uncertain")]

    def path(self, name, seed, whole=False):
        """-> the file of a method's rows; whole ones, with a benchmark's texts, lie elsewhere."""
        is_ours = HERE in self.data.resolve().parents
        folder = self.args.texts if whole and not is_ours else self.args.rows
        key = hashlib.sha256(f"{name} {method_of(name).flags}".encode()).hexdigest()[:8]
        file = f"{self.data.stem}-{name}-{seed}-{key}.jsonl"
        return Path(folder) / Path(self.args.model).name / file

    def head(self, name, seed):
        """-> the first line of a file: method, settings, data and weights of its rows."""
        pool = self.args.pool
        more = {Lab.pool: pool, Lab.tuned: pool, Lab.teacher: weights(TEACHER)}
        files = [self.data, *weights(self.args.model), *more.get(method_of(name).needs, [])]
        flags = vars(self.config(name, seed)) | {"model": "", "device": ""}
        return {"rows of": name, "flags": flags, "files": [*map(digest, files)]}

    def make(self, name, seed, chosen):
        """Makes the rows that are missing, each kept as it comes."""
        path, whole = self.path(name, seed), self.path(name, seed, whole=True)
        head = self.head(name, seed)
        kept, rows = read_rows(path)
        same = kept in (None, head)
        ttsi.need(same, f"{path}*: of other settings, data or weights; remove, or give --rows")
        mine = [i for i in seeded(chosen)[RANK::WORLD] if i not in rows]
        if mine:
            for file in {path, whole}:
                begin(file, head)
        for i in tqdm(mine, desc=path.stem, disable=not mine):
            row = self.row(name, seed, i)
            append(whole, row)
            if whole != path:
                append(path, slim(row))
        left = len({*chosen} - read_rows(path)[1].keys())
        ttsi.need(not left, f"{path}: {left} rows are left to other processes; then run this again")
        if path.exists() and WORLD == 1:
            pack(path)

    def row(self, name, seed, i):
        """-> what a method does with a sample. Only then is the sample's label looked at."""
        method, sample = method_of(name), self.samples[i]
        more = [method.needs(self, seed, i)] if method.needs else []
        try:
            cfg = self.config(name, seed)
            result = method.answer(*self.base, unlabelled(sample), cfg, *more)
        except ttsi.InputError as e:  # beyond the context, or refused by the chat template
            result = ttsi.Result(i, cost={}, decision=f"not answered: {e}")
        row = dataclasses.asdict(result)
        # What was done once, before the gate and to write pairs, all have paid for.
        if method.on == "uncertain":
            before = self.rows("default", seed)[i]
            row["cost"] = direct_row(before)["cost"] | row["cost"]
            if method.needs in (Lab.pairs, Lab.other):
                row["cost"]["generate"] = before["cost"]["generate"]
        row |= scored(result.answer, sample["call"])
        row["before"] = scored(result.direct, sample["call"])
        names = sorted(tool["name"] for tool in sample["tools"])
        row["tools"] = hashlib.sha256(json.dumps(names).encode()).hexdigest()[:8]
        row["offered"] = len(names)
        # Numbers are rounded; one that is none is null.
        how = {"parse_float": lambda x: round(float(x), 5), "parse_constant": lambda x: None}
        return json.loads(json.dumps(row), **how)

    # What methods need besides, of a seed and a sample.
    def default(self, seed, i):
        """-> TT-SI's row, with its texts."""
        return self.texts("default", seed)[i]

    def pairs(self, seed, i):
        """-> the pairs that TT-SI trained on."""
        return self.default(seed, i)["pairs"]

    def other(self, seed, i):
        """-> the next sample that has pairs, without its label, and these pairs as `kept`."""
        rows = self.texts("default", seed)
        others = [j for j in rows if j != i and rows[j]["pairs"]]
        ttsi.need(others, f"{i}: no other sample has pairs; give a higher --limit")
        j = min(others, key=lambda j: (j < i, j))  # behind the last comes the first
        return unlabelled(self.samples[j]) | {"kept": rows[j]["pairs"]}

    def tokens(self, seed, i):
        """-> how many tokens TT-SI has for G, for T and for its answer."""
        cost = self.rows("default", seed)[i]["cost"]
        return sum(tokens for stage, (_, tokens) in cost.items() if stage not in OF_ALL)

    def label(self, seed, i):
        return self.samples[i]["call"]

    def teacher(self, seed, i):
        return loaded(TEACHER, self.args.flags)

    def pool(self, seed, i):
        return self.labelled

    @functools.cached_property
    def labelled(self):
        """The samples of --pool, without the requests of this file."""
        ours = {request_of(sample) for sample in self.samples.values()}
        files = [ttsi.read_jsonl(path, ttsi.to_sample).values() for path in self.args.pool]
        found = [s for file in files for s in file if "call" in s and request_of(s) not in ours]
        ttsi.need(len(found) > 2, "give --pool FILE ..., three labelled samples and more")
        return found

    def tuned(self, seed, i):
        """-> the LoRA of SFT, trained once a seed."""
        if ("tuned", seed) not in self.known:
            pool = self.labelled[: 8 if self.args.quick else LABELS]
            self.known["tuned", seed] = fine_tune(*self.base, pool, self.config("sft", seed))
        return self.known["tuned", seed]


@functools.cache
def loaded(name, flags):
    return ttsi.load(name, ttsi.parse_arguments(flags.split()))


def seeded(ids):
    """Ids in an order of their own: the first of a file may be the easy ones. So those that a cut
    off run has made are a fair part, and more can be added later."""
    return sorted(ids, key=lambda i: hashlib.sha256(i.encode()).hexdigest())


def scored(text, gold):
    return {"grade": ttsi.grade(text, gold), "f1": figures.f1_counts(ttsi.parse(text), gold)}


def unlabelled(sample):
    return {key: value for key, value in sample.items() if key != "call"}


def slim(row):
    """A row without any text, neither a benchmark's nor a model's about it."""
    row = {key: value for key, value in row.items() if key not in ("answer", "direct")}
    row["logp"] = [*(row["logp"] or {}).values()]
    row["drafts"] = [{"verdict": draft["verdict"]} for draft in row["drafts"]]
    row["pairs"] = len(row["pairs"])
    row["decision"] = row["decision"].partition(":")[0]
    return row


def direct_row(row):
    """TT-SI's row -> that of the direct answer, which it wrote on its way."""
    cost = {stage: row["cost"][stage] for stage in OF_ALL if row["cost"]}
    return row | row["before"] | {"decision": "direct", "drafts": [], "cost": cost}


def weights(folder):
    names = ("*.safetensors", "tokenizer.json", "*.jinja", "config.json")
    found = sorted(path for name in names for path in Path(folder).glob(name))
    ttsi.need(found, f"{folder}: no folder with a model; save_pretrained makes one")
    return found


@functools.cache
def digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def read_rows(path):
    """-> (head or None, {id: row}): those that are packed, and whole lines of what came later."""
    lines, packed = [], path.with_suffix(".jsonl.gz")
    if packed.exists():
        lines += gzip.decompress(packed.read_bytes()).splitlines(keepends=True)
    if path.exists():
        lines += path.read_bytes().splitlines(keepends=True)
    head, *rows = [json.loads(line) for line in lines if line.endswith(b"\n")] or [None]
    return head, {row["id"]: row for row in rows if "id" in row}


def begin(path, head):
    """Makes a file ready for rows: a torn last line is cut off, and a head stands first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    text = path.read_bytes()
    whole = text.rfind(b"\n") + 1
    if whole < len(text):
        os.truncate(path, whole)
    if not whole:
        append(path, head)


def append(path, row):
    """One write of one whole line."""
    with open(path, "ab", buffering=0) as file:
        file.write((json.dumps(row) + "\n").encode())


def pack(path):
    """All rows of a file -> a .gz in its place: of the same rows the same bytes."""
    head, rows = read_rows(path)
    lines = [json.dumps(line) + "\n" for line in [head, *(rows[i] for i in sorted(rows))]]
    part = path.with_suffix(".part")
    part.write_bytes(gzip.compress("".join(lines).encode(), mtime=0))
    os.replace(part, path.with_suffix(".jsonl.gz"))
    path.unlink()


# ------------------------------------------------------------------------ methods, cells, groups
@dataclasses.dataclass(frozen=True)
class Method:
    label: str
    answer: Callable
    flags: str = ""  # of ttsi.py
    on: str = "uncertain"  # "certain", "all": what it is run on; the others are answered directly
    needs: Callable | None = None  # (lab, seed, id) -> what it takes besides


METHODS = {
    "default": Method("TT-SI", ttsi.tt_si, on="all"),
    "rest": Method("adapt the certain alone", adapted, on="certain"),
    "paper": Method("the paper's setting", ttsi.tt_si, "--paper"),
    "anothers": Method("another item's pairs", anothers, needs=Lab.other),
    "struck": Method("unsaid options struck out by rule", struck, on="all", needs=Lab.default),
    "nearest": Method("nearest pair's tool, no training", nearest_tool, needs=Lab.pairs),
    "icl": Method("pairs in the prompt (TT-ICL)", shown, needs=Lab.pairs),
    "bias": Method("a bias vector for the LoRA", biased, needs=Lab.pairs),
    "vote": Method("vote, at TT-SI's tokens", vote, "--temperature 1", needs=Lab.tokens),
    "best": Method("best of N, at TT-SI's tokens", best_of, "--temperature 1", needs=Lab.tokens),
    "teacher": Method("a teacher's pairs (TT-D)", ttsi.tt_si, needs=Lab.teacher),
    "neighbours": Method("3 nearest labelled (TTT-NN)", neighbours, needs=Lab.pool),
    "sft": Method(f"SFT on {LABELS} labels", fine_tuned, "--adapt full", "all", Lab.tuned),
    "itself": Method("the item itself, a bound", itself, on="all", needs=Lab.label),
}
ALL = "adapt all (tau 2)"  # the rows of two methods, `default` and `rest`

# What `choice` compares: FORK HERE. A cell that changes T alone takes the pairs of the default.
CELLS = {
    "rate-0.4": "--lr 0.4",
    "rate-0.7": "--lr 0.7",
    "3-steps": "--epochs 3",
    "10-steps": "--epochs 10",
    "adapt-full": "--adapt full",
    "adamw": "--optimizer adamw --lr 1e-3",
    "given-name": "--given name",
    "given-nothing": "--given nothing",
    "temperature-1": "--temperature 1",
    "8-drafts": "--drafts 8",
    "3-tools": "--k 3",
    "no-check": "--no-check",
}
OF_T = {"lr", "epochs", "optimizer", "adapt", "lora_rank", "lora_alpha"}

CONTROLS = ["struck", "anothers", "nearest", "icl", "vote", "best", "bias"]
CONTROLS += ["sft", "neighbours", "itself"]
GROUPS = {  # group -> {table: its lines}
    "own": {"own": ["default", ALL, "rest", "anothers", "nearest", "icl", "teacher"]},
    "real": {"real": ["default", "paper", ALL, "rest"], "controls": CONTROLS},
    "choice": {"choice": ["default", "struck", "itself", *CELLS]},
}


def method_of(name):
    """-> a Method, or the one that a cell is."""
    if name in METHODS:
        return METHODS[name]
    flags, default = CELLS[name], vars(ttsi.Config())
    found = vars(ttsi.parse_arguments(flags.split()))
    if {key for key in found if found[key] != default[key]} <= OF_T:
        return Method(f"`{flags}`", retrained, flags, needs=Lab.pairs)
    return Method(f"`{flags}`", ttsi.tt_si, flags)


# ------------------------------------------------------------------------------------- tables
def run_of(lab, names, seed):
    """-> [(direct row, row), ...]: what no method was run on was answered directly. None: rows are
    missing."""
    default, *others = [lab.rows(name, seed) for name in ["default", *names]]
    if None in (default, *others):
        return None
    direct = {i: direct_row(row) for i, row in default.items()}
    found = dict(direct)
    for rows in others:
        found |= rows
    return [(row, found[i]) for i, row in direct.items()]


def places_of(labs, names):
    """-> {place: {seed: run}}; a place may have several files, and counts if all have rows."""
    places = {}
    for place in dict.fromkeys(lab.place for lab in labs):
        for seed in labs[0].args.seeds:
            runs = [run_of(lab, names, seed) for lab in labs if lab.place == place]
            if all(runs):
                places.setdefault(place, {})[seed] = sum(runs, [])
    return places


def results_of(group, args, files):
    """Makes what is missing of a group -> {table: {label: {place: {seed: run}}}}"""
    labs = [Lab(args, path) for path in files]
    found = {table: {} for table in GROUPS[group]}
    for table, lines in GROUPS[group].items():
        for line in lines:
            names = ["default", "rest"] if line == ALL else [line]
            label = ALL if line == ALL else method_of(line).label
            if {*names} <= {*args.methods} or not args.methods:
                found[table][label] = places_of(labs, names)
    ours = found.get("real", {}).get("TT-SI", {})
    for name in figures.PARTS:
        some = figures.part(ours, name)
        if some and some != ours:
            found["real"][f"TT-SI, {name}"] = some
    return found


def table_of(lines, ours, scored):
    """{label: {place: {seed: run}}}, those of TT-SI, and whether with F1 -> a table."""
    table = []
    for label, places in lines.items():
        for place, runs in places.items():
            both = [] if label.startswith("TT-SI") else figures.against(ours.get(place, {}), runs)
            table.append(figures.cells(label, place, [*runs.values()], both, scored))
        if len(places) > 1:
            mean = figures.difference([[*runs.values()] for runs in places.values()])
            table.append({"": label, "items": f"mean of {len(places)}"})
            table[-1]["difference [95 %]"] = figures.as_text(*mean)
    return figures.markdown(table) if table else "No rows yet.\n"


def publish(name, text, page):
    """Writes a table into a page, between its marker and the next end."""
    mark = re.escape(f"<!-- {name} -->\n")
    old = page.read_text(encoding="utf-8")
    new = re.sub(f"({mark}).*?(<!-- end -->)", lambda m: m[1] + text + m[2], old, flags=re.S)
    page.write_text(new, encoding="utf-8")


def draw(found, name, folder):
    """Of the tables of a group NAME.svg, the differences of all lines, and NAME-tau.svg, where all
    were adapted -> markdown that shows them."""
    lines = {label: places for table in found.values() for label, places in table.items()}
    forest, curves = [], {}
    for place in dict.fromkeys(place for places in lines.values() for place in places):
        forest.append((place,))
        for label, places in lines.items():
            if place in places:
                runs = [*places[place].values()]
                forest.append((label, *figures.difference([runs])))
                if label == ALL:
                    curves[place] = figures.gain_by_tau(runs)
    figures.forest(forest, folder / f"{name}.svg")
    shown = f"![differences with their intervals]({name}.svg)\n\n"
    if curves:
        figures.tau_curves(curves, folder / f"{name}-tau.svg")
        shown += f"![the gain over tau]({name}-tau.svg)\n\n"
    return shown


# ------------------------------------------------------------------------------------ running
def files_of(group, args):
    """-> {model: its files}: those that were given, or with --kept those that have rows."""
    own = ttsi.Config.model
    if not args.kept:
        data = args.data or ([HERE / "test.jsonl"] if group == "own" else [])
        ttsi.need(data, f"{group}: give --model FOLDER --data FILE ..., labelled samples")
        return {args.model or own: data}
    files = {}
    for path in sorted(Path(args.rows).glob("*/*-default-*")):
        model, stem = path.parent.name, path.name.split("-default-")[0]
        kind = "choice" if "dev" in stem else "real"  # its name tells what is chosen on
        if model == Path(own).name:
            kind = "own"
        if kind == group:
            files.setdefault(model, {})[stem] = None
    return files


def parse_arguments(argv):
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument("group", nargs="?", help=f"one of {', '.join(GROUPS)}; none: all")
    p.add_argument("methods", nargs="*", help=f"none: all; {', '.join(METHODS)}, or a cell")
    p.add_argument("--model", default="", help="folder of a model, for real and choice")
    p.add_argument("--data", nargs="*", default=[], help="files of labelled samples")
    p.add_argument("--pool", nargs="*", default=[], help="other labelled files, for SFT and TTT-NN")
    p.add_argument("--flags", default="", help='of ttsi.py, as in --flags="--dtype bfloat16"')
    p.add_argument("--seeds", nargs="*", type=int, default=[], help="none: 0; with --kept: all")
    p.add_argument("--limit", type=int, default=0, help="so many items of a file, by a hash")
    p.add_argument("--kept", action="store_true", help="of all kept rows; alone: writes the page")
    p.add_argument("--quick", action="store_true", help="two samples of each; keeps nothing")
    p.add_argument("--rows", default=str(RESULTS / "rows"), help="where rows are kept")
    p.add_argument("--texts", default=str(TEXTS), help="where those of benchmarks have their texts")
    args = p.parse_args(argv)
    if args.quick:
        args.flags += " --tau 2"  # or nothing might be adapted
        args.rows, args.texts, args.limit = tempfile.mkdtemp(), tempfile.mkdtemp(), 2
        args.data = args.data or [HERE / "dev.jsonl"]
        args.pool = args.pool or [HERE / "demo.jsonl"]
    args.seeds = args.seeds or [*range(10 if args.kept else 1)]
    known = {*METHODS, *CELLS}
    ttsi.need(args.group in (None, *GROUPS), f"no group {args.group}: {', '.join(GROUPS)}")
    ttsi.need(known >= {*args.methods}, f"no method {args.methods}: {', '.join(known)}")
    ttsi.need(args.group or args.kept or args.quick, "give a group, --kept or --quick")
    needs_pool = args.group == "real" and not (args.methods or args.kept)
    ttsi.need(args.pool or not needs_pool, "real: give --pool FILE ..., or name the methods")
    return args


def main(argv, results=RESULTS):
    """The command line. With --kept alone tables go into results/README.md, and figures beside."""
    args = parse_arguments(argv)
    for group in [args.group] if args.group else GROUPS:
        for model, files in files_of(group, args).items():
            found = results_of(group, argparse.Namespace(**vars(args) | {"model": model}), files)
            ours = next(iter(found.values())).get("TT-SI", {})
            for table, lines in found.items():
                title = table if group == "own" else f"{table} {Path(model).name}"
                text = table_of(lines, ours, group == "real")
                print(f"\n{title}\n\n{text}", flush=True)
                if argv == ["--kept"]:
                    if table in ("own", "real"):
                        text = draw(found, title.replace(" ", "-"), results) + text
                    publish(title, text, results / "README.md")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except (ttsi.InputError, OSError) as e:
        sys.exit(f"experiments: {e}")
