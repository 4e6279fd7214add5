"""The evidence: TT-SI, its variants, baselines and controls, composed of what ttsi.py exports.

    python data/experiments.py [GROUP ...]                     # the own world, its test split
    python data/experiments.py real --model FOLDER --data FILE ...        # a real model, real data
    python data/experiments.py --kept                           # all tables, of kept rows alone
    python data/experiments.py --quick                          # does all of it run? Keeps nothing

Rows go to data/results/rows/ as they come, each is made once, by what it is a row of: method,
flags, seed, data and weights. A run that was cut off goes on, on any machine. Tables and figures
are made of rows alone, into data/results/. A seed is one draw of drafts, LoRA initialisations and
tool order; the model is one and the same. Nothing here is needed by ttsi.py.
"""

import argparse
import copy
import functools
import gzip
import hashlib
import json
import math
import os
import re
import shlex
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import choose  # noqa: E402
import figures  # noqa: E402
import world  # noqa: E402
from figures import against, certain, gate, instead, spent, uncertain  # noqa: E402

import ttsi  # noqa: E402

# --------------------------------------------------------------------------------------- rows
ROWS = HERE / "results" / "rows"
SIDES = ("direct", "answer")
ALL = "--tau 2"  # everyone is adapted; who would be, at any tau, is chosen afterwards (`gate`)
ELSEWHERE = ("model", "data", "output", "pairs", "teacher", "limit", "trace", "device", "seed")


class Skip(Exception):
    """What a row needs is not there."""


class Lab:
    """One model on one file of samples, and the rows of all that was done with them."""

    def __init__(self, args, data, limit=0):
        self.args, self.data, self.limit, self.found = args, str(data), limit, {}
        self.folder = Path(args.rows) / Path(args.model).name
        here = Path(args.model).is_dir() and Path(self.data).is_file()
        self.making = here and not args.kept

    def config(self, seed, flags=""):
        where = ["--model", self.args.model, "--data", self.data, "--seed", str(seed)]
        return ttsi.parse_flags([*where, *shlex.split(f"{self.args.flags} {flags}")])

    @functools.cached_property
    def samples(self):
        """{id: sample} of the whole file."""
        return ttsi.read_jsonl(self.data, ttsi.to_sample)

    @functools.cached_property
    def base(self):
        """(model, tokenizer)"""
        return ttsi.load(self.args.model, self.config(0))

    @functools.cached_property
    def teacher(self):
        return ttsi.load(self.args.teacher, self.config(0))

    @functools.cached_property
    def pool(self):
        """Labelled samples, none with a request of this file's."""
        own, out = {request_of(sample) for sample in self.samples.values()}, []
        for path in self.args.pool:
            for sample in ttsi.read_jsonl(path, ttsi.to_sample).values():
                if request_of(sample) not in own:
                    out.append(sample)
        return out

    def inputs(self, cfg, more):
        """What rows depend on and their flags do not say, by what it is, wherever it lies."""
        files = {"data": [self.data], "model": model_files(self.args.model)}
        files["teacher"] = model_files(cfg.teacher) if cfg.teacher else []
        files["pool"] = self.args.pool if {"neighbours", "pool"} & {*more} else []
        digests = {what: [*map(choose.digest, paths)] for what, paths in files.items()}
        return digests | {"items": len(self.samples)}

    def rows(self, make, seed, flags="", *more):
        """-> [the rows of a method for a seed], in the file's order; what is missing is made."""
        cfg = self.config(seed, flags)
        how = {key: value for key, value in vars(cfg).items() if key not in ELSEWHERE}
        what = {"method": make.__name__, "seed": seed, "more": more, "flags": how}
        what["teacher"] = Path(cfg.teacher).name
        name = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:10]
        name = f"{Path(self.data).stem}-{make.__name__}-{seed}-{name}"
        if name not in self.found:
            self.found[name] = self.complete(name, what, make, cfg, more)
        return [*self.found[name].values()][: self.limit or None]

    def complete(self, name, what, make, cfg, more):
        """-> {id: row} of a file of rows, which is gone on with where something is missing."""
        path = self.folder / f"{name}.jsonl"
        head, rows = read_rows(path)
        if not self.making:
            items = head["items"] if head else 1
            wanted = min(items, self.limit or items)
            if len(rows) < wanted:
                why = f"--kept, or no {self.args.model} (--model) or {self.data} (--data)"
                raise Skip(f"{len(rows)} rows of {wanted}, and none is made: {why}")
            return rows
        what = json.loads(json.dumps(what | self.inputs(cfg, more)))
        ttsi.need(head == what or not (head or rows), f"{path}: rows of {head}, not of {what}")
        samples = [*self.samples.values()][: self.limit or None]
        missing = [sample for sample in samples if sample["id"] not in rows]
        if missing:
            self.folder.mkdir(parents=True, exist_ok=True)
            ttsi.save(path, map(ttsi.dumps, [what, *rows.values()]))
            for sample in tqdm(missing, desc=name):
                row = slim(make(self, cfg, sample, *more), sample)
                ttsi.save(path, [ttsi.dumps(row)], "a")
        if path.exists():
            _, rows = read_rows(path)  # another process may have made some
            rows = {i: rows[i] for i in self.samples if i in rows}
            ttsi.need(all(s["id"] in rows for s in samples), f"{path}: rows were lost; once more")
            pack(path, [what, *rows.values()])
        return rows


def request_of(sample):
    return " ".join(ttsi.words(choose.labelled(sample)["request"]))


def model_files(folder):
    names = ("*.safetensors", "tokenizer.json", "*.jinja")
    return sorted(path for name in names for path in Path(folder).glob(name))


def read_rows(path):
    """-> (what they are rows of, {id: row}): of whole lines, packed ones and those that came."""
    packed, lines = path.with_suffix(".jsonl.gz"), []
    if packed.exists():
        lines += gzip.decompress(packed.read_bytes()).splitlines(keepends=True)
    if path.exists():
        lines += path.read_bytes().splitlines(keepends=True)
    read = [json.loads(line) for line in lines if line.endswith(b"\n")]
    heads = [line for line in read if "id" not in line]
    ttsi.need(all(head == heads[0] for head in heads), f"{path}: rows of several kinds")
    return next(iter(heads), None), {line["id"]: line for line in read if "id" in line}


def pack(path, lines):
    """Rows that are complete -> a .gz in their place, the same bytes wherever it is made."""
    packed, text = path.with_suffix(".jsonl.gz"), "".join(ttsi.dumps(line) + "\n" for line in lines)
    part = packed.with_suffix(".part")
    part.write_bytes(gzip.compress(text.encode(), mtime=0))
    os.replace(part, packed)
    path.unlink()


def slim(row, sample):
    """A row as it is kept: rounded, without a benchmark's texts or what its pair says again; and
    which list of tools it is of."""
    names = sorted(tool["name"] for tool in sample["tools"])
    row = row | {"tools": digest_of(names), "offered": len(names), "right": sample["call"]["name"]}
    row["faults"] = {side: fault_of(row[side], sample) for side in SIDES if side in row}
    if "margin" in row:
        row["logp"] = {name: rounded(value) for name, value in row["logp"].items()}
        row["loss"] = [*map(rounded, row["loss"])]
        row["cost"] = {k: [round(s, 3), n] for k, (s, n) in row["cost"].items()}
        row["drafts"] = [draft | {"text": draft_text(draft, sample)} for draft in row["drafts"]]
    return json.loads(json.dumps(row), parse_constant=lambda name: None)


def fault_of(text, sample):
    """What is wrong with an answer; "" where it is right."""
    if ttsi.grade(text, sample)["call"]:
        return ""
    call, right = ttsi.to_call(ttsi.parse(text)[0]), sample["call"]
    if not call:
        return "no call"
    if call["name"] != right["name"]:
        return "another tool"
    if right["arguments"].keys() - call["arguments"].keys():
        return "an argument missing"
    return "another value" if call["arguments"].keys() <= right["arguments"].keys() else "too many"


def rounded(value):
    return None if value is None else round(value, 4)  # None: it was not finite


def digest_of(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:8]


def draft_text(draft, sample):
    said = [turn["content"] for turn in sample["messages"] if turn["role"] == "user"]
    held = "copy" in draft["verdict"] or any(ttsi.copies(draft["text"], turn) for turn in said)
    return "" if draft["pair"] or held else draft["text"]


def kept(make):
    """make(lab, cfg, sample, ...) -> a row   becomes   (lab, seed, flags, ...) -> kept rows."""

    @functools.wraps(make)
    def rows(lab, seed, flags="", *more):
        return lab.rows(make, seed, flags, *more)

    return rows


def written(lab, seed):
    """-> {id: row} of the run that writes the pairs of all: the defaults, everyone adapted."""
    return {row["id"]: row for row in tt_si(lab, seed, ALL)}


def composed(f):
    """f(lab, cfg, row, x, ...) -> a row, of what was written for this sample."""

    @kept
    @functools.wraps(f)
    def make(lab, cfg, sample, *more):
        row = written(lab, cfg.seed)[sample["id"]]
        if not row["cost"]:  # not answered
            return row
        return f(lab, cfg, row, ttsi.prepare(lab.base[1], sample, cfg), *more)

    return make


def prefixes(model, x):
    """-> the prefixes that every composition begins with: of the tools, and of the prompt."""
    after_tools = ttsi.Prefix(model, x.ids[: x.head])
    return after_tools, ttsi.Prefix(model, x.ids[:-1], after_tools)


# ------------------------------------------------------------------------------ TT-SI, as it is
@kept
def tt_si(lab, cfg, sample):
    """Algorithm 1; with --teacher TT-D."""
    teacher = lab.teacher if cfg.teacher else None
    result = ttsi.tt_si(*lab.base, sample, cfg, None, teacher)
    return ttsi.to_row(*lab.base, sample, result, cfg)


def teachers(lab, seed, flags=""):
    if not lab.args.teacher:
        raise Skip("give --teacher MODEL")
    return tt_si(lab, seed, f"{flags} --teacher {shlex.quote(lab.args.teacher)}")


def a_random_subset(lab, seed):
    """As many samples as are uncertain, drawn without looking at them."""
    rows = tt_si(lab, seed, ALL)
    n = sum(figures.margin(row) < ttsi.Config.tau for row in rows)
    order = torch.randperm(len(rows), generator=ttsi.draw(seed, "subset")).tolist()
    return gate(rows, [place < n for place in order])


def within_budget(lab, seed, share):
    """Tau without labels: so that this share of other samples, dev's, lies below it."""
    dev = Lab(lab.args, HERE / "dev.jsonl")
    margins = sorted(figures.margin(row) for row in tt_si(dev, seed, "--tau 0"))
    return uncertain(tt_si(lab, seed, ALL), margins[int(share * len(margins))])


def dose(lab, seed, shift):
    """A mixture: this share of the items is shifted, drawn in one and the same order, the others
    are not. Samples do not touch each other: rows of two runs can be mixed."""
    split, folder = Path(lab.data).stem, Path(tempfile.gettempdir()) / f"ttsi-{os.getpid()}"
    path = folder / f"{split}-plain.jsonl"
    if lab.making and not path.exists():
        folder.mkdir(exist_ok=True)
        ttsi.save(path, map(json.dumps, world.records(split, len(lab.samples), 0, 0)))
    shifted = tt_si(lab, seed, ALL)
    unshifted = tt_si(Lab(lab.args, path, lab.limit), seed, ALL)
    order = torch.randperm(len(shifted), generator=ttsi.draw("dose")).tolist()
    mixed = zip(order, shifted, unshifted, strict=True)
    return [a if place < shift / 100 * len(shifted) else b for place, a, b in mixed]


# -------------------------------------------------------------------------------- other pairs
@composed
def on_pairs(lab, cfg, row, x, source):
    """Algorithm 1 on given pairs, each rendered with the tools that it is of; none is kept."""
    pairs, cost = PAIRS[source](lab, cfg, row, x)
    sample = lab.samples[row["id"]]
    with choose.with_own_tools(pairs):
        result = ttsi.tt_si(*lab.base, sample, cfg)
    right = ttsi.grade(result.answer, sample)
    return instead(row, result.answer, right, result.decision, result.cost | cost)


def its_own(lab, cfg, row, x):
    """What was written for it: so that variants of training share their pairs."""
    own = [pair | {"sample": lab.samples[row["id"]]} for pair in row["pairs"]]
    return own, spent(row, "generate")


def of_another(lab, cfg, row, x):
    """What was written for the next sample. With its tools: the LoRA acts on nearly all tokens."""
    rows = [*written(lab, cfg.seed).values()]
    place = [r["id"] for r in rows].index(row["id"])
    return its_own(lab, cfg, rows[(place + 1) % len(rows)], x)


def itself(lab, cfg, row, x):
    """NOT a method, an upper bound: its own request and LABEL."""
    return choose.itself(lab.samples[row["id"]], None), {}


def neighbours(lab, cfg, row, x):
    """TTT-NN: the nearest labelled samples of the pool."""
    if not lab.pool:
        raise Skip("give --pool FILE ..., labelled samples")
    pool = [sample for sample in lab.pool if choose.short(sample)]
    return choose.neighbours(lab.samples[row["id"]], pool), {}


def answered_alike(lab, cfg, row, x, agree=True):
    """Of its drafts those whose request the base answers with their call (the round trip)."""
    after_tools, _ = prefixes(lab.base[0], x)
    pairs, cost = [], copy.deepcopy(spent(row, "generate"))
    for pair in [draft["pair"] for draft in row["drafts"] if draft["pair"]]:
        ids, begin = ttsi.pair_span(x, pair)
        with ttsi.measured(cost, "generate", lab.base[0]):
            asked = ttsi.Prefix(lab.base[0], ids[: begin - 1], after_tools)
            text = ttsi.write(x.tok, ids[:begin], asked, cfg)[0]
        if ttsi.grade(text, {"call": pair["call"]})["call"] == agree:
            pairs.append(pair | {"sample": lab.samples[row["id"]]})
    return pairs, cost


PAIRS = {"its own": its_own, "another's": of_another, "itself": itself, "neighbours": neighbours}
PAIRS |= {"alike": answered_alike, "otherwise": functools.partial(answered_alike, agree=False)}


@composed
def shown(lab, cfg, row, x):
    """TT-ICL: the pairs stand before the request, as earlier calls of one dialogue do; nothing is
    trained."""
    turns, sample = [], lab.samples[row["id"]]
    for pair in row["pairs"]:
        call = {"id": ttsi.ID, "type": "function", "function": pair["call"]}
        turns += [ttsi.turn("user", pair["request"]), ttsi.turn("assistant", "", tool_calls=[call])]
    others = [m for m in sample["messages"] if m["role"] != "system"]
    cost = spent(row, "prefill", "score", "generate")
    try:
        prompt, _ = ttsi.render(x.tok, cfg, x.tools, [*x.system, *turns, *others])
        ids = ttsi.to_ids(x.tok, cfg, prompt)
    except ttsi.InputError as e:  # beyond the context, or refused by the template
        cost = spent(row, "score", "generate") | {"answer": row["cost"]["direct"]}
        return instead(row, row["direct"], row["scores"]["direct"], f"not shown: {e}", cost)
    after_tools, _ = prefixes(lab.base[0], x)
    with ttsi.measured(cost, "answer", lab.base[0]):
        text = ttsi.write(x.tok, ids, ttsi.Prefix(lab.base[0], ids[:-1], after_tools), cfg)[0]
    decision = "adapted" if row["pairs"] else "no pair"
    return instead(row, text, ttsi.grade(text, sample), decision, cost)


@composed
def nearest(lab, cfg, row, x):
    """No training: the tool of the pair closest to the request; the base fills in the values."""
    if not row["pairs"]:
        return instead(row, row["direct"], row["scores"]["direct"], "no pair", row["cost"])
    drafts = [{"verdict": "kept", "pair": pair} for pair in row["pairs"]]
    name = ttsi.closest(drafts, x.request)[0]["call"]["name"]
    _, after_prompt = prefixes(lab.base[0], x)
    cost = spent(row, "prefill", "score", "generate")
    with ttsi.measured(cost, "answer", lab.base[0]):
        text = forced(x, name, after_prompt, cfg)
    return instead(row, text, ttsi.grade(text, lab.samples[row["id"]]), "nearest pair", cost)


def forced(x, name, prefix, cfg):
    """-> the answer that a model gives once this tool's name is written."""
    ids, _ = x.candidates[[tool["name"] for tool in x.tools].index(name)]
    begun = ids[len(os.path.commonprefix([ids, x.ids])) :]

    def decode(new, **how):  # `write` ends with a call, which it must see from its beginning on
        return x.tok.decode([*begun, *new], **how)

    whole = SimpleNamespace(eos_token_id=x.tok.eos_token_id, decode=decode)
    return ttsi.write(whole, ids, prefix, cfg)[0]


# ------------------------------------------------------------------- baselines, without pairs
@composed
def sampled(lab, cfg, row, x, n):
    """-> n sampled answers with their grades, in place of a row."""
    _, after_prompt = prefixes(lab.base[0], x)
    draws = [ttsi.draw(cfg.seed, x.id, "vote", i) for i in range(n)]
    uniform = torch.stack([torch.rand(cfg.max_new_tokens, generator=g) for g in draws])
    cost = {}
    with ttsi.measured(cost, "votes", lab.base[0]):
        texts = ttsi.write(x.tok, x.ids, after_prompt, cfg, uniform)
    grades = [ttsi.grade(text, lab.samples[x.id]) for text in texts]
    return {"id": x.id, "texts": texts, "grades": grades, "votes": cost["votes"]}


def call_of(text):
    """What is voted on: name and arguments, as they are compared in scoring; None: no call."""
    call = ttsi.to_call(ttsi.parse(text)[0])
    return call and json.dumps([call["name"], ttsi.canonical(call["arguments"])], sort_keys=True)


def chosen_by(choose_one):
    """-> rows of a seed, each answered with the one of its sampled texts that is chosen."""

    def rows(lab, seed, n, temperature):
        drawn, out = sampled(lab, seed, f"--temperature {temperature}", n), []
        for vote, row in zip(drawn, tt_si(lab, seed, ALL), strict=True):
            if "texts" in vote:
                at = choose_one(vote["texts"], vote["grades"])
                text, right = ("", WRONG) if at is None else (vote["texts"][at], vote["grades"][at])
                cost = spent(row, "prefill") | {"answer": vote["votes"]}
                row = instead(row, text, right, "chosen", cost)
            out.append(row)
        return out

    return rows


WRONG = {"name": False, "call": False}


def most_frequent(texts, grades):
    """The call that most sampled answers make; among equals the first; None without any."""
    calls = [call_of(text) for text in texts]
    with_call = [i for i, call in enumerate(calls) if call]
    return max(with_call, key=lambda i: calls.count(calls[i]), default=None)


def best_graded(texts, grades):
    """NOT a method: a right one if there is any. Who chooses it needs the label."""
    return max(range(len(texts)), key=lambda i: sum(grades[i].values()))


majority, any_of = chosen_by(most_frequent), chosen_by(best_graded)


def labelled(lab, kind, n):
    """-> n labelled samples to fine-tune on: of the own world's training tools, with the shift or
    without; or the first of the pool."""
    if kind == "shifted":
        return [ttsi.to_sample(record) for record in world.records("train", n, 1, 0)]
    if kind == "plain":
        with gzip.open(HERE / "train.jsonl.gz", "rt", encoding="utf-8") as file:
            lines = [line for _, line in zip(range(n), file, strict=False)]
        return [ttsi.to_sample(json.loads(line)) for line in lines]
    if len(lab.pool) < n:
        raise Skip(f"give --pool FILE ..., {n} labelled samples first")
    return lab.pool[:n]


@functools.cache
def fine_tuned(lab, seed, kind, n, lr):
    """Supervised fine-tuning: ONE LoRA, trained on n labelled items. AdamW, batches of 16, cosine;
    10 epochs on up to 100 items, 3 on up to 1,000, else 1. -> (its parameters, what that took)"""
    cfg, items = lab.config(seed, "--adapt full"), labelled(lab, kind, n)
    order, epochs = [], 10 if n <= 100 else 3 if n <= 1000 else 1
    for epoch in range(epochs):
        order += torch.randperm(n, generator=ttsi.draw(seed, "sft", epoch)).tolist()
    steps = [order[i : i + 16] for i in range(0, len(order), 16)]
    model, tok = lab.base
    cost = {}
    with ttsi.temporary_lora(model, cfg, ttsi.draw(seed, "sft", "adapter")) as lora:
        optimizer = torch.optim.AdamW(lora, weight_decay=0.0)
        for step, batch in enumerate(tqdm(steps, desc=f"SFT on {n}")):
            optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / len(steps))) / 2
            with ttsi.measured(cost, "train", model):
                spans = [label_span(tok, items[i], cfg) for i in batch]
                for part in [spans[i : i + 2] for i in range(0, len(spans), 2)]:  # so many fit
                    lengths = torch.tensor([len(ids) - begin for ids, begin in part])
                    logp = ttsi.logprob(part, ttsi.Prefix(model, []))
                    loss = -(logp / lengths.to(logp.device)).sum() / len(spans)
                    for p, g in zip(lora, torch.autograd.grad(loss, lora), strict=True):
                        p.grad = g if p.grad is None else p.grad + g
                optimizer.step()
                optimizer.zero_grad()
        seconds, tokens = cost["train"]
        once = {"labels": n, "seconds": round(seconds), "tokens": tokens}
        return [p.detach().clone() for p in lora], once


def label_span(tok, sample, cfg):
    x = ttsi.prepare(tok, sample, cfg)
    return ttsi.pair_span(x, {"request": x.request, "call": sample["call"]})


@composed
def sft(lab, cfg, row, x, kind, n, lr):
    """The answer of a model that was fine-tuned once."""
    parameters, once = fine_tuned(lab, cfg.seed, kind, 16 if lab.args.quick else n, lr)
    with ttsi.temporary_lora(lab.base[0], cfg, ttsi.draw(0)) as lora:
        with torch.no_grad():
            for p, learned in zip(lora, parameters, strict=True):
                p.copy_(learned)
        cost = {}
        with ttsi.measured(cost, "prefill", lab.base[0]):
            _, after_prompt = prefixes(lab.base[0], x)
        with ttsi.measured(cost, "answer", lab.base[0]):
            text = ttsi.write(x.tok, x.ids, after_prompt, cfg)[0]
    right = ttsi.grade(text, lab.samples[row["id"]])
    return instead(row, text, right, "fine-tuned", cost) | {"once": once}


def as_it_came(lab, seed, flags=""):
    """The model that this one was made of."""
    args = argparse.Namespace(**vars(lab.args) | {"model": lab.args.base})
    return tt_si(Lab(args, lab.data, lab.limit), seed, flags)


# ------------------------------------------------------------------------ other uncertainties
def judged(lab, seed, which, values, *more):
    """Rows of --tau 2 with another certainty in place of the margin."""
    found = {row["id"]: row for row in values(lab, seed, *more)}
    rows = tt_si(lab, seed, ALL)
    told = {row["id"]: found[row["id"]][which] if row["cost"] else None for row in rows}
    return [row | {"margin": told[row["id"]]} for row in rows]


@composed
def certainties(lab, cfg, row, x, n):
    """-> other certainties: the margin of log P per token of the names ("mean"); 1 / perplexity of
    the direct answer; the softmax margin over the distinct calls among it and n
    sampled ones ("calls")."""
    lengths = [len(ids) - begin for ids, begin in x.candidates]
    names = zip(row["logp"].items(), lengths, strict=True)
    mean = {name: logp / length for (name, logp), length in names}
    drawn = {r["id"]: r for r in sampled(lab, cfg.seed, f"--temperature {cfg.temperature}", n)}
    texts = distinct([row["direct"], *drawn[x.id]["texts"]])
    prompt, _ = ttsi.render(x.tok, cfg, x.tools, lab.samples[x.id]["messages"])
    whole = [ttsi.encode(x.tok, prompt, text + (x.tok.eos_token or "")) for text in texts]
    spans = [(ids, len(x.ids)) for ids, _ in whole]
    _, after_prompt = prefixes(lab.base[0], x)
    with torch.no_grad():
        logp, (ids, begin) = ttsi.logprob(spans, after_prompt).tolist(), spans[0]
    found = {"mean": ttsi.margin(mean), "calls": ttsi.margin(dict(zip(texts, logp, strict=True)))}
    return {"id": x.id, "1 / perplexity": math.exp(logp[0] / (len(ids) - begin))} | found


def distinct(texts):
    """The first text of each call, in order."""
    first = {}
    for text in texts:
        first.setdefault(call_of(text) or text, text)
    return list(first.values())


# ------------------------------------------------------------------------------------- groups
# Lines: (label, what gives it, rows of a seed). Each function below makes such lines.
def using(rows, *args):
    """-> the rows of a seed: rows(lab, seed, *args)."""
    return lambda lab, seed: rows(lab, seed, *args)


def below_tau(rows, *args):
    """The same, with only the uncertain adapted; of the others nothing is used."""
    return lambda lab, seed: uncertain(rows(lab, seed, *args))


def versus(label, rows, other):
    """A line that compares two rows of a seed."""
    return label, "`against`", lambda lab, seed: against(rows(lab, seed), other(lab, seed))


def flagged(label, flags):
    """A line whose rows are a run of ttsi.py with these flags."""
    return label, flags, using(tt_si, flags)


OURS, EVERYONE = below_tau(tt_si, ALL), using(tt_si, ALL)
VOTES, VOTE_T, SFT_LR = 5, 0.5, 3e-3  # of the own world: temperature and rate chosen on its dev
VOTE = using(majority, VOTES, VOTE_T)
FREE = "--k 1 --temperature 1 --drafts"  # as the paper has them: any tool, one pair
ONE, TEACHERS = using(tt_si, f"{FREE} 1"), using(teachers, f"{FREE} 1")
TT_SI = ("TT-SI", "", OURS)
ADAPT_ALL = ("adapt all", ALL, EVERYONE)
ALL_AGAINST_OURS = versus("adapt all against adapt the uncertain", EVERYONE, OURS)
ONLY_CERTAIN = ("adapt only the certain", "`certain`", lambda lab, s: certain(EVERYONE(lab, s)))
NEAREST = ("the nearest pair's tool, no training", "`nearest`", below_tau(nearest))
ICL = ("the pairs in the prompt, no training (TT-ICL)", "`shown`", below_tau(shown))
ANOTHERS = ("another item's pairs", "`of_another`", below_tau(on_pairs, "", "another's"))
ITSELF = ("the item itself, label included: a bound", "`itself`", using(on_pairs, ALL, "itself"))
PAPER_ALL = ("the paper's setting, adapt all", f"--paper {ALL}", using(tt_si, f"--paper {ALL}"))
PAPER = ("the paper's setting", "--paper", below_tau(tt_si, f"--paper {ALL}"))

FULL = below_tau(on_pairs, "--adapt full", "its own")

MAIN = [
    TT_SI,
    flagged("free, first draft, unchecked", f"{FREE} 1 --no-check --attempts 1"),
    flagged("free, first accepted draft", f"{FREE} 1"),
    flagged("free, closest of 4 drafts", f"{FREE} 4"),
    ("TT-D: the teacher's pairs", "--teacher data/teacher", using(teachers)),
    ("TT-D, free, first accepted draft", f"--teacher data/teacher {FREE} 1", TEACHERS),
    versus("TT-D against TT-SI, free, first accepted", TEACHERS, ONE),
    NEAREST,
    versus("TT-SI against the nearest pair's tool", OURS, NEAREST[2]),
]


def fine_tuning(label, *how):
    return label, "`sft`", using(sft, "", *how)


PLAIN_SFT = fine_tuning("SFT, 13,000 items without the shift", "plain", 13000, SFT_LR)
SMALL_SFT = fine_tuning("SFT, 100 shifted items", "shifted", 100, SFT_LR)
BASELINES = [
    TT_SI,
    (f"majority vote over {VOTES} sampled calls", "`majority`", VOTE),
    (f"pass@{VOTES}: needs the label", "`any_of`", using(any_of, VOTES, VOTE_T)),
    ICL,
    SMALL_SFT,
    fine_tuning("SFT, 1,000 shifted items", "shifted", 1000, SFT_LR),
    versus("TT-SI against the vote", OURS, VOTE),
    versus("TT-SI against SFT on 100 shifted items", OURS, SMALL_SFT[2]),
]
SFT = [TT_SI, PLAIN_SFT, versus("TT-SI against SFT without the shift", OURS, PLAIN_SFT[2])]
CONTROLS = [
    TT_SI,
    ADAPT_ALL,
    ONLY_CERTAIN,
    ("a random subset of the same size", "`a_random_subset`", a_random_subset),
    ANOTHERS,
    ALL_AGAINST_OURS,
    versus("a random subset against the uncertain", a_random_subset, OURS),
    ITSELF,
    ("tools in the file's order", "--no-shuffle", using(tt_si, "--no-shuffle")),
    PAPER,
    ("--adapt full, the same pairs", "--adapt full", FULL),
]
DOSE = [(f"{n} % shifted", f"`dose`, {n} %", below_tau(dose, n)) for n in (0, 30, 60, 100)]
DOSE.append(("0 % shifted, adapt all", "`dose`, 0 %", using(dose, 0)))
BEYOND = [flagged(f"a pair for each of {k} tools", f"--k {k}") for k in (3, 4)]
BEYOND += [flagged(f"free, K = {n}, of {n} drafts", f"{FREE} {n} --k {n}") for n in (2, 4, 8)]
BEYOND += [flagged(f"free, closest of {n} drafts", f"{FREE} {n}") for n in (2, 8, 16)]
for source, told in (("alike", "drafts that the model answers alike"), ("otherwise", "the others")):
    rows = below_tau(on_pairs, "", source)
    BEYOND.append((f"round trip: {told}", "`answered_alike`", rows))
for share in (20, 40, 60):
    label = f"tau by budget: {share} % of other items' margins below it"
    BEYOND.append((label, "`within_budget`", using(within_budget, share / 100)))


def other_certainty(label, which):
    values = (certainties, f"--temperature {VOTE_T}", VOTES)
    return label, "`certainties`", using(judged, which, *values)


UNCERTAINTY = [
    ("margin of the names (the paper)", ALL, EVERYONE),
    other_certainty("the same, mean-normalised", "mean"),
    other_certainty("perplexity of the direct answer", "1 / perplexity"),
    other_certainty(f"margin of whole calls: the answer and {VOTES} sampled", "calls"),
]
TUNE = [(f"vote, temperature {t}", "`majority`", using(majority, VOTES, t)) for t in (0.5, 1, 1.5)]
for lr in (3e-4, 1e-3, 3e-3):
    TUNE.append(fine_tuning(f"SFT, 100 shifted items, lr {lr}", "shifted", 100, lr))


def at_tau(tau):
    return f"tau {tau}", f"--tau {tau}", lambda lab, seed: uncertain(EVERYONE(lab, seed), tau)


REAL = [TT_SI, ADAPT_ALL, ONLY_CERTAIN, at_tau(0.35), at_tau(0.7), at_tau(0.99), PAPER, PAPER_ALL]
REAL_SEEDS = [TT_SI, ADAPT_ALL, ALL_AGAINST_OURS]
REAL_VOTES, REAL_VOTE_T, DEV_LABELS, REAL_SFT_LR = 25, 1, 200, 3e-3  # 25: the tokens of TT-SI
REAL_VOTE = using(majority, REAL_VOTES, REAL_VOTE_T)
TTT_NN = ("TTT-NN: the 3 nearest labelled", "`neighbours`", below_tau(on_pairs, "", "neighbours"))
REAL_SFT = fine_tuning(f"SFT, {DEV_LABELS} labels of dev", "pool", DEV_LABELS, REAL_SFT_LR)
REAL_CONTROLS = [
    TT_SI,
    ANOTHERS,
    NEAREST,
    ICL,
    (f"majority vote over {REAL_VOTES} sampled calls", "`majority`", REAL_VOTE),
    (f"pass@{REAL_VOTES}: needs the label", "`any_of`", using(any_of, REAL_VOTES, REAL_VOTE_T)),
    TTT_NN,
    ITSELF,
    REAL_SFT,
    ("TT-SI, the model as it came", "--base", below_tau(as_it_came)),
    versus("TT-SI against another item's pairs", OURS, ANOTHERS[2]),
    versus("TT-SI against the nearest pair's tool", OURS, NEAREST[2]),
    versus("TT-SI against TT-ICL", OURS, ICL[2]),
    versus("TT-SI against the vote", OURS, REAL_VOTE),
    versus("TT-SI against TTT-NN", OURS, TTT_NN[2]),
    versus("TT-SI against SFT", OURS, REAL_SFT[2]),
]
TUNE_REAL = [TT_SI]
for lr in (3e-4, 1e-3, 3e-3, 1e-2):
    TUNE_REAL.append(fine_tuning(f"SFT, 140 labels, lr {lr}", "pool", 140, lr))
for t in (0.5, 1):
    TUNE_REAL.append((f"vote, temperature {t}", "`majority`", using(majority, REAL_VOTES, t)))
# place -> the names of its files
OWN, BENCHMARKS = {"own world": ["test"]}, {"Seal-Tools": ["canonical_294"]}
BENCHMARKS |= {"ToolAlpaca": ["canonical_real"], "API-Bank": ["canonical_l1", "canonical_l2"]}
SEAL = {"Seal-Tools": BENCHMARKS["Seal-Tools"]}
GROUPS = {  # group -> (places, seeds, items or 0: all, lines)
    "main": (OWN, 5, 0, MAIN),
    "controls": (OWN, 2, 250, CONTROLS),
    "baselines": (OWN, 2, 250, BASELINES),
    "sft": (OWN, 1, 250, SFT),
    "dose": (OWN, 2, 250, DOSE),
    "uncertainty": (OWN, 2, 250, UNCERTAINTY),
    "beyond": (OWN, 2, 250, BEYOND),
    "tune": ({"own dev": ["dev"]}, 2, 0, TUNE),
    "tune-real": ({"the first 60 of dev": ["dev_60"]}, 1, 0, TUNE_REAL),
    "real": (BENCHMARKS, 1, 0, REAL),
    "real-seeds": (SEAL, 3, 0, REAL_SEEDS),
    "real-controls": (SEAL, 1, 0, REAL_CONTROLS),
}


# ------------------------------------------------------------------------------------ running
SHOW = {"uncertainty": (figures.ranked, figures.uncertainties)}


def runs_of(args, group):
    """-> {label: (what gives it, {place: rows of each seed, of the items that all seeds have})}"""
    places, seeds, items, lines = GROUPS[group]
    at = {Path(path).stem: path for path in args.data}
    if at and not at.keys() & {name for names in places.values() for name in names}:
        places = {name: [name] for name in at}  # files of your own
    labs, out = {}, {}
    for name in {name for names in places.values() for name in names}:
        path = at.get(name, HERE / ("dev.jsonl" if args.quick else f"{name}.jsonl"))
        labs[name] = Lab(args, path, args.limit or items)
    for label, by, rows in lines:
        if args.only not in label + by:
            continue
        found = {}
        for place, names in places.items():
            try:
                runs = [rows_of(rows, labs, names, seed) for seed in range(args.seeds or seeds)]
            except Skip as e:
                print(f"{label}, {place}: left out: {e}", file=sys.stderr)
                continue
            found[place] = figures.in_common(runs)
        if found:
            out[label] = by, found
    return out


def rows_of(rows, labs, names, seed):
    return [row for name in names for row in rows(labs[name], seed)]


def numbers(group, runs):
    """-> {label: {place: numbers}}, and the mean over the places where there are several."""
    measure, _ = SHOW.get(group, (figures.pooled, figures.markdown))
    out = {}
    for label, (by, places) in runs.items():
        found = {place: measure(seeds) for place, seeds in places.items()}
        if len(found) > 1 and len(found) == len(GROUPS[group][0]):
            found["mean"] = figures.mean_of([*places.values()])
        out[label] = {place: r | {"by": by} for place, r in found.items()}
    return out


def publish(name, text, file=HERE / "results" / "README.md"):
    """A figure beside the file, a table in it between <!-- table NAME --> and <!-- end -->."""
    if name.endswith(".svg"):
        file.with_name(name).write_text(text, encoding="utf-8")
        return
    mark = re.escape(f"<!-- table {name} -->\n")
    old = file.read_text(encoding="utf-8")
    new = re.sub(f"({mark}).*?(<!-- end -->)", lambda m: m[1] + text + m[2], old, flags=re.S)
    file.write_text(new, encoding="utf-8")


def parse_arguments(argv):
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument("groups", nargs="*", help=f"of {', '.join(GROUPS)}; default: the own world's")
    p.add_argument("--model", default="", help="default: the embedded; real: models/smollm2-tools")
    p.add_argument("--data", nargs="*", default=[], help="real: files of labelled samples")
    p.add_argument("--pool", nargs="*", default=[], help="other labelled files, for SFT and TTT-NN")
    p.add_argument("--base", default="models/smollm2-135m", help="real: the model as it came")
    p.add_argument("--teacher", default="", help="who writes the pairs of TT-D")
    p.add_argument("--flags", default=None, help="of ttsi.py; real: default --dtype bfloat16")
    p.add_argument("--only", default="", help="lines that hold this text")
    p.add_argument("--kept", action="store_true", help="makes no row; alone: tables of all")
    p.add_argument("--rows", default=str(ROWS), help="the folder of the rows")
    p.add_argument("--seeds", type=int, default=0)
    p.add_argument("--limit", type=int, default=0, help="items of each file")
    p.add_argument("--quick", action="store_true", help="10 items of dev, one seed; keeps nothing")
    args = p.parse_args(argv)
    kinds = {"real" in group for group in args.groups} or {False}
    ttsi.need(len(kinds) == 1, "own and real groups want two commands")
    real, flags = kinds == {True}, args.flags or ""
    ttsi.need("--tau" not in flags and "--seed" not in flags, "--flags: neither --tau nor --seed")
    known = {name for places, *_ in GROUPS.values() for name in sum(places.values(), [])}
    changed = args.limit or args.seeds or args.only or args.quick or args.flags or args.teacher
    changed = changed or {Path(path).stem for path in args.data} - known
    folder = not args.model or Path(args.model).is_dir()
    ttsi.need(folder, f"--model {args.model}: not a folder; save_pretrained makes one")
    args.public = not changed and args.rows == str(ROWS)
    args.public &= Path(args.model).name == "smollm2-tools" if args.model else True
    args.model = args.model or ("models/smollm2-tools" if real else ttsi.Config.model)
    if args.flags is None:
        args.flags = "--dtype bfloat16" if real else ""
    if args.model == ttsi.Config.model:
        args.teacher = args.teacher or str(HERE / "teacher")
    if args.quick:
        args.limit, args.seeds, args.rows = args.limit or 10, 1, tempfile.mkdtemp()
    own = [group for group in GROUPS if GROUPS[group][0] is OWN]
    args.groups = [*dict.fromkeys(g for group in args.groups or own for g in expanded(group))]
    return args


def expanded(group):
    """A group; real: all that begin so."""
    ttsi.need(group in GROUPS, f"no group {group}; there are {', '.join(GROUPS)}")
    return [g for g in GROUPS if g.startswith("real")] if group == "real" else [group]


def tables_of(group, runs, found):
    """-> {name: table} of a group."""
    _, show = SHOW.get(group, (None, figures.markdown))
    none = "No rows yet.\n"
    tables = {group: show(found) if found else none}
    if group == "real":
        several = {}
        for label, (by, places) in runs.items():
            several[label] = by, figures.several_tools(places)
        _, adapted = runs.get(ADAPT_ALL[0], ("", {}))
        tables["real several"] = show(numbers(group, several)) if several else none
        tables["real chain"] = figures.chains(adapted) if adapted else none
    return tables


OTHERS = [label for label, *_ in REAL_CONTROLS[1:] if not re.search(r"\blabel\b", label)]
FORESTS = {  # name -> groups, and which of their lines; (): all
    "real.svg": {"real": (TT_SI[0], ADAPT_ALL[0], PAPER[0]), "real-controls": OTHERS},
    "own.svg": {"main": (), "controls": (), "baselines": (), "sft": PLAIN_SFT[:1], "beyond": ()},
}
CURVES = {"real-tau.svg": ("real", ADAPT_ALL[0]), "own-tau.svg": ("uncertainty", UNCERTAINTY[0][0])}


def drawn(runs, found):
    """Of each group its runs and numbers -> {name: figure}, where all groups of one were asked."""
    out = {}
    for name, groups in FORESTS.items():
        asked = groups if groups.keys() <= found.keys() else {}
        lines = [figures.forest_lines(group, found[group], only) for group, only in asked.items()]
        if any(lines):
            out[name] = figures.forest(sum(lines, []))
    for name, (group, label) in CURVES.items():
        _, places = runs.get(group, {}).get(label, ("", {}))
        if places and places.keys() == GROUPS[group][0].keys():
            out[name] = figures.tau_figure(sum(places.values(), []))
    shares = {}
    for label, places in found.get("dose", {}).items():
        if "all" not in label:
            shares[int(label.split()[0])] = next(iter(places.values()))
    if len(shares) > 1:
        out["dose.svg"] = figures.dose_figure(shares)
    return out


def made_of_rows(args):
    """Yields (name, table) of each group when its rows are there, and then (name, figure)."""
    runs, found = {}, {}
    for group in args.groups:
        runs[group] = runs_of(args, group)
        found[group] = numbers(group, runs[group])
        yield from tables_of(group, runs[group], found[group]).items()
    yield from drawn(runs, found).items()


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    transformers.logging.set_verbosity_error()
    every = [[], ["tune"], ["real", "tune-real"]]  # one command for all that rows show
    for groups in every if argv == ["--kept"] else [[]]:
        args = parse_arguments([*groups, *argv])
        for name, text in made_of_rows(args):
            if not name.endswith(".svg"):
                print(f"\n{name}\n\n{text}", flush=True)
            if args.public:
                publish(name, text)


if __name__ == "__main__":
    try:
        main()
    except ttsi.InputError as e:
        sys.exit(f"experiments: {e}")
