"""The evidence: variants, baselines and controls, composed of what ttsi.py exports; their tables and figures.

    python data/experiments.py                                 # all but the tuning, on the test split: a few hours
    python data/experiments.py --quick                         # on 10 items of dev, one seed: do all of them run?
    python data/experiments.py tune-G tune-T tune-B adapt --data data/dev.jsonl   # from these the settings were chosen
    python data/experiments.py main --only accepted --model M --data D.jsonl      # any model, any canonical data

Runs go to runs/ and are resumed; the numbers go to data/results/, and from there into the figures beside them and into
the READMEs, between markers. A seed is one draw of drafts, adapter initialisations and tool order; the model is one and
the same. Nothing here is needed by ttsi.py, and nothing is added to it but for the time of one run (`patched`).
"""
import argparse
import contextlib
import copy
import functools
import gzip
import hashlib
import inspect
import io
import json
import math
import os
import re
import shlex
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402
import ttsi  # noqa: E402
import world  # noqa: E402

# ------------------------------------------------------------------------------------------------------------ runs


class Skip(Exception):
    """What a row needs is not there."""


class Lab:
    """Where runs are kept: one folder per version of ttsi.py, of the model's weights and of the data, so that none is
    stale; one below it per version of a function that takes the place of another (`patched`)."""

    def __init__(self, args):
        self.args, self.limit, self.loaded = args, args.limit, None
        digest = hashlib.sha256((HERE.parent / "ttsi.py").read_bytes() + (HERE / "world.py").read_bytes())
        models = [file for folder in (args.model, args.teacher) if folder for file in sorted(Path(folder).glob("*.*"))]
        for file in (*models, Path(args.data)):
            digest.update(file.read_bytes())
        self.runs = HERE.parent / "runs" / digest.hexdigest()[:12]
        self.runs.mkdir(parents=True, exist_ok=True)
        self.embedded = args.model == ttsi.Config.model and Path(args.data).resolve().parent == HERE

    def config(self, seed, flags=""):
        return ttsi.parse_flags(["--model", self.args.model, "--data", self.args.data, "--seed", str(seed),
                                 *(["--limit", str(self.limit)] if self.limit else []), *shlex.split(self.args.flags),
                                 *shlex.split(flags)])

    def path(self, seed, flags=""):
        """`python ttsi.py --seed SEED FLAGS`, unless it was run before, on these items or on all -> file of its rows."""
        cfg, whole = self.config(seed, flags), self.config(seed, f"{flags} --limit 0")
        for c in (whole, cfg):
            c.output = str(self.runs / (hashlib.sha256(json.dumps(vars(c)).encode()).hexdigest()[:16] + ".jsonl"))
            done = Path(c.output).with_suffix(".done")
            if done.exists():
                return c.output
        print(f"{Path(cfg.data).name} --seed {seed} {flags}", file=sys.stderr, flush=True)
        with contextlib.redirect_stdout(io.StringIO()):
            ttsi.run(cfg)
        done.touch()
        return cfg.output

    def run(self, seed, flags=""):
        return [json.loads(line) for line in open(self.path(seed, flags), encoding="utf-8")][:self.limit or None]

    def file(self, records):
        """Records in a file of their own, named by what is in it -> its path, quoted."""
        text = "".join(json.dumps(r) + "\n" for r in records)
        path = self.runs / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
        path.write_text(text, encoding="utf-8")
        return shlex.quote(str(path))

    def pairs(self, pairs):
        """{id: pairs} -> the flag that trains on them"""
        return f"--pairs {self.file({'id': i, 'pairs': p} for i, p in pairs.items())}"

    def samples(self, cfg):
        return list(ttsi.read_jsonl(cfg.data, ttsi.to_sample).values())[:cfg.limit or None]

    def batches(self, cfg):
        """-> (model, tokenizer, the samples of cfg.data in batches)."""
        self.loaded = self.loaded or ttsi.load(cfg)
        samples, size = self.samples(cfg), 25 if self.embedded else 1
        return *self.loaded, [samples[i:i + size] for i in range(0, len(samples), size)]


def kept(f):
    """What f(lab, ...) gives is kept beside the runs, under its arguments and all that stands in this file before tables."""
    @functools.wraps(f)
    def once(lab, *args):
        source = Path(__file__).read_text(encoding="utf-8").partition("-" * 20 + " tables")[0]
        key = json.dumps([source, lab.args.data, lab.args.flags, lab.limit, args])
        path = lab.runs / f"{f.__name__}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
        if not path.exists():
            print(f"{f.__name__} {args}", file=sys.stderr, flush=True)
            path.with_suffix(".part").write_text(json.dumps(f(lab, *args)), encoding="utf-8")
            os.replace(path.with_suffix(".part"), path)
        return json.loads(path.read_text(encoding="utf-8"))
    return once


@contextlib.contextmanager
def patched(lab, **functions):
    """ttsi.py with other functions -> a Lab whose runs lie apart."""
    folder = hashlib.sha256("".join(map(inspect.getsource, functions.values())).encode()).hexdigest()[:12]
    elsewhere, ours = copy.copy(lab), {name: getattr(ttsi, name) for name in functions}
    elsewhere.runs = lab.runs / folder
    elsewhere.runs.mkdir(exist_ok=True)
    try:
        vars(ttsi).update(functions)
        yield elsewhere
    finally:
        vars(ttsi).update(ours)


def start(model, tok, samples, cfg):
    """-> what every composition begins with: the samples as the model sees them, the caches of tool lists and prompts.
    Samples beyond the context are left out, as they are of every run."""
    xs = [x for x in (ttsi.prepare(model, tok, sample, cfg) for sample in samples) if not x["error"]]
    return xs, *(ttsi.prefill(model, tok, xs, []) if xs else (None, None))


# ------------------------------------------------------------------------------------------------ who is adapted


def gate(rows, chosen):
    """Rows of a run with --select all -> rows as if only the chosen samples had been adapted: each was answered both
    ways, and samples do not touch each other."""
    out = []
    for row, adapt in zip(rows, chosen):
        if not adapt and not row["error"]:
            row = {k: v for k, v in row.items() if k not in ("adapted", "drafts", "pairs", "loss")}
            row["cost"] = {stage: row["cost"][stage] for stage in ("prefill", "score", "direct")}
            row["scores"] = row["scores"] | {"ttsi": row["scores"]["direct"]}
        out.append(row)
    return out


def margin(row):
    return row.get("margin", 2.)  # a sample that could not be answered is never adapted


def uncertain(rows, tau=ttsi.Config.tau):
    return gate(rows, [margin(row) < tau for row in rows])


def certain(rows, tau=ttsi.Config.tau):
    return gate(rows, [margin(row) >= tau for row in rows])


def a_random_subset(lab, seed):
    """As many samples as are uncertain, drawn without looking at them."""
    rows = lab.run(seed, "--select all")
    n = sum(margin(row) < ttsi.Config.tau for row in rows)
    order = torch.randperm(len(rows), generator=ttsi.draw(seed, "subset")).tolist()
    return gate(rows, [order[i] < n for i in range(len(rows))])


def within_budget(lab, seed, share):
    """Tau without labels: the quantile of the margins of other samples, dev's, below which this share of them lies."""
    others = f"--data {shlex.quote(str(HERE / 'dev.jsonl'))} --limit 0" if lab.embedded else ""
    margins = sorted(map(margin, map(json.loads, open(lab.path(seed, f"--method direct {others}"), encoding="utf-8"))))
    return uncertain(lab.run(seed, "--select all"), margins[int(share * len(margins))])


# ------------------------------------------------------------------------------------------------- other pairs


def priced(rows, written):
    """Rows of a run on pairs from a file, with the cost of writing these: that of the run which wrote them."""
    generate = {w["id"]: {"generate": w["cost"]["generate"]} for w in written if "generate" in w["cost"]}
    return [row | {"cost": row["cost"] | generate.get(row["id"], {})} for row in rows]


def shown(lab, seed):
    """TT-ICL: the pairs of the default run stand in the prompt, nothing is trained."""
    written = lab.run(seed)
    return priced(lab.run(seed, f"--method icl {lab.pairs({w['id']: w.get('pairs', []) for w in written})}"), written)


def others_pairs(lab, seed):
    """Every sample is adapted to the pairs that were written for the next one."""
    written = lab.run(seed, "--select all")
    moved = {row["id"]: after.get("pairs", []) for row, after in zip(written, written[1:] + written[:1])}
    return priced(lab.run(seed, f"--select all --no-check {lab.pairs(moved)}"), written)


def the_item_itself(lab, seed):
    """NOT a method, an upper bound: every sample is adapted to its own request and LABEL, which ttsi.py refuses."""
    def supplied(xs, pairs, cfg):
        return [[{"text": "", "verdict": "the label", "pair": pair} for pair in pairs[x["id"]]] for x in xs]
    own = {s["id"]: [{"request": ttsi.user_text(s["messages"]), "call": s["call"]}] for s in lab.samples(lab.config(seed))}
    with patched(lab, supplied=supplied) as elsewhere:
        return elsewhere.run(seed, f"--select all {lab.pairs(own)}")


@ttsi.metered
def read_back(model, tok, xs, past, cfg):
    """-> for each sample, what the base model answers to the requests of its drafts."""
    rows = [(i, ttsi.pair_tokens(tok, x, d["pair"])) for i, x in enumerate(xs) for d in x["drafts"] if d["pair"]]
    out = [[] for _ in xs]
    if rows:
        texts = ttsi.decode(model, tok, [ids[:begin] for _, (ids, begin) in rows], [begin for _, (_, begin) in rows],
                            cfg.max_new_tokens, past)
        for (i, _), text in zip(rows, texts):
            out[i].append(text)
    return out


@kept
def round_trip(lab, seed, agree):
    """Only drafts whose request the model answers with their call are kept; or, as a control, only the others."""
    rows, cfg = {row["id"]: row for row in lab.run(seed)}, lab.config(seed)
    model, tok, batches = lab.batches(cfg)
    pairs, cost = {}, {}
    for samples in tqdm(batches):
        xs, tools, _ = start(model, tok, samples, cfg)
        xs = [x | {"drafts": rows[x["id"]]["drafts"]} for x in xs if "drafts" in rows[x["id"]]]
        for x, texts in zip(xs, read_back(model, tok, xs, tools, cfg)):
            mine = [d["pair"] for d in x["drafts"] if d["pair"]]
            pairs[x["id"]] = [p for p, text in zip(mine, texts) if ttsi.grade(text, {"call": p["call"]})["call"] == agree]
            cost[x["id"]] = {"read_back": x["cost"].get("read_back", (0, 0))}
    trained = priced(lab.run(seed, lab.pairs(pairs)), rows.values())
    return [row | {"cost": row["cost"] | cost.get(row["id"], {})} for row in trained]


@kept
def stream(lab, seed, lr):
    """One adapter for all, in the file's order, never reset: it scores, is trained where it is uncertain, and answers. The
    pairs are those that the base model wrote. One sample at a time, so its seconds are not those of a batch."""
    written, cfg = {row["id"]: row for row in lab.run(seed, "--select all")}, lab.config(seed, f"--lr {lr}")
    model, tok, _ = lab.batches(cfg)
    kept_theta, out = None, []
    for sample in tqdm(lab.samples(cfg)):
        row = written[sample["id"]]
        xs, tools, _ = start(model, tok, [sample], cfg)
        for x in xs:
            with ttsi.adapters(model, xs, cfg) as theta:
                for p, q in zip(theta, kept_theta or theta):
                    p.data.copy_(q)
                u = ttsi.certainty(ttsi.score(model, tok, xs, tools, cfg)[0])
                x["pairs"] = row.get("pairs", []) if u < cfg.tau else []
                if x["pairs"]:
                    ttsi.train(model, tok, xs, theta, tools, cfg)
                text, = ttsi.answer(model, tok, xs, tools, cfg)
                kept_theta = [p.detach().clone() for p in theta]
            cost = {"generate": row["cost"]["generate"]} if u < cfg.tau else {}
            row = instead(row, sample, text, **{k: v for k, v in x["cost"].items() if k != "prefill"}, **cost)
            row |= {"trained": bool(x["pairs"]), "margin now": u}
        out.append(row)
    return out


def dose(lab, seed, shift, flags=""):
    """The default run on a mixture: this share of the items is shifted, in one and the same random order, the others are
    unshifted ones in their places. Samples do not touch each other, so rows of two runs can be mixed."""
    embedded_only(lab)
    split, shifted = Path(lab.args.data).stem, lab.run(seed, flags)
    plain = lab.run(seed, f"{flags} --limit 0 --data {lab.file(world.records(split, len(shifted), 0, 0))}")
    order = torch.randperm(len(shifted), generator=ttsi.draw("dose")).tolist()
    return [(shifted if order[i] < shift / 100 * len(shifted) else plain)[i] for i in range(len(shifted))]


def embedded_only(lab):
    if not lab.embedded:
        raise Skip("only the embedded world can be made anew")


def teacher(lab, seed, flags=""):
    if not lab.args.teacher:
        raise Skip("give --teacher MODEL")
    return lab.run(seed, f"--teacher {shlex.quote(lab.args.teacher)} {flags}")


# ---------------------------------------------------------------------------------------- baselines, without pairs


def instead(row, sample, text, **stages):
    """A row, answered with this text at the cost of reading the prompt and of these stages."""
    row = {k: v for k, v in row.items() if k not in ("drafts", "pairs", "loss")}
    cost = {stage: row["cost"][stage] for stage in ("prefill", "direct") if stage in row["cost"]} | stages
    return row | {"adapted": text, "trained": False, "cost": cost, "scores": row["scores"] | {"ttsi": ttsi.grade(text, sample)}}


@ttsi.metered
def forced(model, tok, xs, past, cfg, names):
    """-> for each sample, the answer that the base model gives once the tool's name is written."""
    rows = [x["candidates"][x["names"].index(name)][0] for x, name in zip(xs, names)]
    return ttsi.decode(model, tok, rows, [len(x["ids"]) for x in xs], cfg.max_new_tokens, past)


@kept
def nearest(lab, seed, flags=""):
    """No training: the tool of the draft closest to the request; the base model fills in the arguments."""
    cfg, out = lab.config(seed, flags), {row["id"]: row for row in lab.run(seed, flags)}
    model, tok, batches = lab.batches(cfg)
    for samples in batches:
        label = {s["id"]: s for s in samples}
        xs, _, asked = start(model, tok, samples, cfg)
        xs = [x for x in xs if out[x["id"]].get("pairs")]
        names = [out[x["id"]]["pairs"][0]["call"]["name"] for x in xs]
        for x, text in zip(xs, forced(model, tok, xs, asked, cfg, names)):
            spent = {stage: out[x["id"]]["cost"][stage] for stage in ("score", "generate")} | {"answer": x["cost"]["forced"]}
            out[x["id"]] = instead(out[x["id"]], label[x["id"]], text, **spent)
    return list(out.values())


@ttsi.metered
def votes(model, tok, xs, past, cfg, n):
    """-> for each sample n answers, sampled."""
    rows = [x["ids"] for x in xs for _ in range(n)]
    uniform = torch.stack([torch.rand(cfg.max_new_tokens, generator=ttsi.draw(cfg.seed, x["id"], "vote", i))
                           for x in xs for i in range(n)])
    texts = ttsi.decode(model, tok, rows, list(map(len, rows)), cfg.max_new_tokens, past, cfg.temperature, uniform)
    return [texts[i * n:(i + 1) * n] for i in range(len(xs))]


VOTES = 5


@kept
def sampled(lab, seed, temperature):
    """-> {id: {"texts": VOTES sampled answers, "cost": ...}}"""
    cfg, out = lab.config(seed, f"--temperature {temperature}"), {}
    model, tok, batches = lab.batches(cfg)
    for samples in tqdm(batches):
        xs, _, asked = start(model, tok, samples, cfg)
        for x, texts in zip(xs, votes(model, tok, xs, asked, cfg, VOTES)):
            out[x["id"]] = {"texts": texts, "cost": x["cost"]["votes"]}
    return out


def call_of(text):
    """What is voted on: name and arguments, values as they are compared in scoring; None where there is no call."""
    call = ttsi.parse(text) or {}
    return json.dumps([call["name"], ttsi.canonical(call["arguments"])], sort_keys=True) if ttsi.fits(call, ttsi.CALL) else None


def chosen_by(choose):
    """-> rows of a seed, each answered with the one of its sampled texts that is chosen by (texts, sample)."""
    def rows(lab, seed, temperature):
        drawn, out = sampled(lab, seed, temperature), lab.run(seed, "--method direct")
        for i, (row, sample) in enumerate(zip(out, lab.samples(lab.config(seed)))):
            if row["id"] in drawn:
                out[i] = instead(row, sample, choose(drawn[row["id"]]["texts"], sample), votes=drawn[row["id"]]["cost"])
        return out
    return rows


def most_frequent(texts, sample):
    """The call that most of the sampled answers make; among equals the one that came first; without any, no answer."""
    calls = [call_of(text) for text in texts]
    return max((t for t, c in zip(texts, calls) if c), key=lambda t: calls.count(call_of(t)), default="")


def best_graded(texts, sample):
    """NOT a method: a right one if there is any. Who chooses it needs the label."""
    return max(texts, key=lambda text: sum(ttsi.grade(text, sample).values()))


majority, any_of = chosen_by(most_frequent), chosen_by(best_graded)


@ttsi.metered
def sft_step(model, tok, xs, theta, optimizer, batch, cfg):
    """One step of the one adapter on labelled samples: the loss is the mean over them of the mean over their answer."""
    examples = [ttsi.prepare(model, tok, sample, cfg) for sample in batch]
    spans = [ttsi.pair_tokens(tok, x, {"request": x["request"], "call": s["call"]}) for x, s in zip(examples, batch)]
    n = torch.tensor([len(ids) - begin for ids, begin in spans], device=model.device)
    with torch.enable_grad():
        loss = -(ttsi.logprob(model, spans) / n).mean()
        for p, g in zip(theta, torch.autograd.grad(loss, theta)):
            p.grad = g
    optimizer.step()
    return [loss.item()]


@kept
def sft(lab, seed, shift, n, lr):
    """Supervised fine-tuning: ONE adapter, trained on n labelled training items, all of them shifted or none, and kept
    for every sample. AdamW, batches of 16, cosine; 10 epochs on up to 100 items, 3 on up to 1,000, else 1."""
    embedded_only(lab)
    cfg, size = lab.config(seed, "--adapt full"), 16
    with gzip.open(HERE / "train.jsonl.gz", "rt", encoding="utf-8") as f:
        records = world.records("train", n, 1, 0) if shift else (json.loads(line) for _, line in zip(range(n), f))
        items = [ttsi.to_sample(r) for r in records]
    epochs = 10 if n <= 100 else 3 if n <= 1000 else 1
    order = [i for e in range(epochs) for i in torch.randperm(n, generator=ttsi.draw(seed, "sft", e)).tolist()]
    steps = [order[i:i + size] for i in range(0, len(order), size)]
    model, tok, batches = lab.batches(cfg)
    one, answers = {"id": "sft", "cost": {}}, {}
    with ttsi.adapters(model, [one], cfg) as theta:
        optimizer = torch.optim.AdamW(theta, weight_decay=0.)
        for step, batch in enumerate(tqdm(steps)):
            optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / len(steps))) / 2
            sft_step(model, tok, [one], theta, optimizer, [items[i] for i in batch], cfg)
        for samples in batches:
            xs, _, asked = start(model, tok, samples, cfg)
            for x, text in zip(xs, ttsi.answer(model, tok, xs, asked, cfg)):
                answers[x["id"]] = [text, x["cost"]["answer"]]
    return {"answers": answers, "once": {"labels": n, "seconds": one["cost"]["sft_step"][0], "tokens": one["cost"]["sft_step"][1]}}


def fine_tuned(lab, seed, shift, n, lr):
    rows, trained = lab.run(seed, "--method direct"), sft(lab, seed, shift, 16 if lab.args.quick else n, lr)
    for i, (row, sample) in enumerate(zip(rows, lab.samples(lab.config(seed)))):
        if row["id"] in trained["answers"]:
            text, cost = trained["answers"][row["id"]]
            rows[i] = instead(row, sample, text, answer=cost)
        rows[i]["once"] = trained["once"]
    return rows


# ------------------------------------------------------------------------------------------- other uncertainties


def judged_by(values):
    """Rows of --select all with another certainty in place of the margin."""
    def rows(lab, seed):
        other = values(lab, seed)
        return [row | {"margin": other[row["id"]]} if row["id"] in other else row for row in lab.run(seed, "--select all")]
    return rows


def mean_normalised(lab, seed):
    return {row["id"]: row["margin"] for row in lab.run(seed, "--method direct --score mean") if "margin" in row}


def logprobs(model, tok, xs, texts, past):
    """-> for each sample [(log-probability, tokens) of each of its texts after the prompt]"""
    spans = [ttsi.encode(tok, x["prompt"] + text + (tok.eos_token or ""), len(x["prompt"])) for x, ts in zip(xs, texts) for text in ts]
    with torch.no_grad():
        flat = zip(ttsi.logprob(model, spans, past).tolist(), [len(ids) - begin for ids, begin in spans])
    return [[next(flat) for _ in ts] for ts in texts]


def distinct(texts):
    """The first text of each call, in order."""
    first = {}
    for text in texts:
        first.setdefault(call_of(text) or text, text)
    return list(first.values())


@kept
def by_answer(lab, seed, temperature):
    """-> {id: [certainty by the perplexity of the direct answer, margin of whole calls]}: 1 / perplexity; the softmax
    margin over the log-probabilities of the distinct calls among the direct answer and the sampled ones."""
    direct = {row["id"]: row for row in lab.run(seed, "--method direct")}
    drawn, cfg, out = sampled(lab, seed, temperature), lab.config(seed), {}
    model, tok, batches = lab.batches(cfg)
    for samples in tqdm(batches):
        xs, _, asked = start(model, tok, samples, cfg)
        texts = [distinct([direct[x["id"]]["direct"], *drawn[x["id"]]["texts"]]) for x in xs]
        for x, scored in zip(xs, logprobs(model, tok, xs, texts, asked)):
            out[x["id"]] = [math.exp(scored[0][0] / scored[0][1]), ttsi.certainty([logp for logp, _ in scored])]
    return out


# ---------------------------------------------------------------------------------------- other ways of training


def clipped(lab, seed, lr):
    """Another update rule: the gradient of each adapter clipped to norm 1, not normalised; on the same pairs."""
    @torch.no_grad()
    def sgd(theta, lr):
        norm = sum(p.grad.flatten(1).square().sum(1) for p in theta).sqrt()
        for p in theta:
            p -= lr * p.grad / norm.clamp(min=1).view(-1, *[1] * (p.dim() - 1))
    pairs = pairs_of(lab, seed)
    with patched(lab, sgd=sgd) as elsewhere:
        return elsewhere.run(seed, f"--lr {lr} {pairs}")


def reshuffled(lab, seed):
    """--adapt full, with the tools of each training row in an order of its own; a tool list in a cache has but one."""
    def pair_tokens(tok, x, pair):
        order = torch.randperm(len(x["tools"]), generator=ttsi.draw(seed, x["id"], "reshuffled", pair["request"]))
        return ours(tok, x | {"system": ttsi.system_text([x["tools"][i] for i in order])}, pair)
    pairs, ours = pairs_of(lab, seed, ""), ttsi.pair_tokens
    with patched(lab, pair_tokens=pair_tokens) as elsewhere:
        return elsewhere.run(seed, f"--adapt full {pairs}")


def against(rows, other):
    """The difference to another run in place of that to the direct answers: "direct" is the other run from here on."""
    return [row | {"scores": row["scores"] | {"direct": o["scores"]["ttsi"]}} for row, o in zip(rows, other, strict=True)]


# ---------------------------------------------------------------------------------------------------------- tables

VOTE_T, SFT_LR, STREAM_LR = 0.5, 3e-3, 0.03  # chosen on dev: tune-B


def flagged(*rows):
    """(label, flags) -> rows that are runs of ttsi.py with these flags."""
    return [(label, flags, lambda lab, s, flags=flags: lab.run(s, flags)) for label, flags in rows]


def pairs_of(lab, s, flags="--drafts 1"):
    return f"--pairs {shlex.quote(lab.path(s, flags))}"


GROUPS = {  # group -> (seeds, items, [(label, what the README calls a command, rows of a seed)])
    "main": (5, 0, [
        *flagged(("first draft, unchecked", "--drafts 1 --no-check --attempts 1"), ("first accepted draft", "--drafts 1"),
                 ("closest of 4 drafts (the default)", "--drafts 4")),
        ("TT-D: first accepted draft of the teacher", "--teacher data/teacher --drafts 1",
         lambda lab, s: teacher(lab, s, "--drafts 1")),
        ("TT-D: closest of 4", "--teacher data/teacher", teacher),
        ("TT-D against TT-SI, first accepted drafts", "`against`",
         lambda lab, s: against(teacher(lab, s, "--drafts 1"), lab.run(s, "--drafts 1"))),
        ("nearest draft: its tool, no training", "`nearest`", lambda lab, s: nearest(lab, s))]),
    "baselines": (2, 250, [
        ("TT-SI (the default)", "--drafts 4", lambda lab, s: lab.run(s)),
        ("majority vote over 5 sampled calls", "`majority`", lambda lab, s: majority(lab, s, VOTE_T)),
        ("pass@5: needs the label", "`any_of`", lambda lab, s: any_of(lab, s, VOTE_T)),
        ("the pairs in the prompt, no training (TT-ICL)", "--method icl", shown),
        ("SFT, 13,000 items without the shift", "`fine_tuned`", lambda lab, s: fine_tuned(lab, s, False, 13000, SFT_LR)),
        ("SFT, 100 shifted items", "`fine_tuned`", lambda lab, s: fine_tuned(lab, s, True, 100, SFT_LR)),
        ("SFT, 1,000 shifted items", "`fine_tuned`", lambda lab, s: fine_tuned(lab, s, True, 1000, SFT_LR)),
        ("SFT, 13,000 shifted items", "`fine_tuned`", lambda lab, s: fine_tuned(lab, s, True, 13000, SFT_LR)),
        ("TT-SI against the vote", "`against`", lambda lab, s: against(lab.run(s), majority(lab, s, VOTE_T))),
        ("TT-SI against SFT without the shift", "`against`",
         lambda lab, s: against(lab.run(s), fine_tuned(lab, s, False, 13000, SFT_LR))),
        ("TT-SI against SFT on 100 shifted items", "`against`",
         lambda lab, s: against(lab.run(s), fine_tuned(lab, s, True, 100, SFT_LR)))]),
    "controls": (2, 250, [
        ("TT-SI (the default)", "--drafts 4", lambda lab, s: lab.run(s)),
        ("adapt all", "--select all", lambda lab, s: lab.run(s, "--select all")),
        ("adapt only the certain", "--select certain", lambda lab, s: certain(lab.run(s, "--select all"))),
        ("a random subset of the same size", "`a_random_subset`", a_random_subset),
        ("another item's pairs", "`others_pairs`", lambda lab, s: uncertain(others_pairs(lab, s))),
        ("another item's pairs, adapt all", "`others_pairs`", others_pairs),
        ("adapt all against adapt the uncertain", "`against`",
         lambda lab, s: against(lab.run(s, "--select all"), uncertain(lab.run(s, "--select all")))),
        ("a random subset against the uncertain", "`against`",
         lambda lab, s: against(a_random_subset(lab, s), uncertain(lab.run(s, "--select all")))),
        ("the item itself, label included, adapt all: an upper bound", "`the_item_itself`", the_item_itself),
        ("nearest draft: its tool, no training, all", "`nearest`", lambda lab, s: nearest(lab, s, "--select all")),
        *flagged(("tools in the file's order", "--no-shuffle"), ("the paper's settings", "--paper"))]),
    "dose": (2, 250, [(f"{shift} % shifted", f"`dose`, {shift} %", lambda lab, s, shift=shift: dose(lab, s, shift))
                      for shift in (0, 30, 60, 100)] + [
        ("0 % shifted, adapt all", "`dose`, 0 %, --select all", lambda lab, s: dose(lab, s, 0, "--select all"))]),
    "beyond": (2, 250, [
        *flagged(*((f"K = {k}, of {k} drafts", f"--k {k} --drafts {k}") for k in (1, 2, 4, 8)),
                 *((f"closest of {n} drafts", f"--drafts {n}") for n in (2, 4, 8, 16)),
                 ("closest of 4, tools forced in turn", "--cover")),
        ("round trip: drafts that the model answers alike", "`round_trip`", lambda lab, s: round_trip(lab, s, True)),
        ("the opposite: drafts that it answers otherwise", "`round_trip`", lambda lab, s: round_trip(lab, s, False)),
        ("the adapter is kept, not reset", "`stream`", lambda lab, s: stream(lab, s, STREAM_LR)),
        *((f"tau by budget: {share} % of other items' margins below it", "`within_budget`",
           lambda lab, s, share=share: within_budget(lab, s, share / 100)) for share in (20, 40, 60))]),
    "uncertainty": (2, 250, [
        ("margin of the names (the paper)", "--score sum", lambda lab, s: lab.run(s, "--select all")),
        ("the same, mean-normalised", "--score mean", judged_by(mean_normalised)),
        ("perplexity of the direct answer", "`by_answer`",
         judged_by(lambda lab, s: {i: v[0] for i, v in by_answer(lab, s, VOTE_T).items()})),
        ("margin of whole calls: the answer and 5 sampled", "`by_answer`",
         judged_by(lambda lab, s: {i: v[1] for i, v in by_answer(lab, s, VOTE_T).items()}))]),
    "tune-G": (2, 0, flagged(*((flags, flags) for flags in (
        "--drafts 1", "--drafts 1 --no-check --attempts 1", "--drafts 1 --attempts 1", "--drafts 1 --temperature 0.7",
        "--drafts 1 --temperature 1.3", "--drafts 2", "--drafts 4", "--drafts 8", "--drafts 16", "--k 2 --drafts 2",
        "--k 2 --drafts 8", "--drafts 2 --cover", "--drafts 4 --cover", "--drafts 8 --cover",
        "--k 2 --drafts 4 --cover", "--k 4 --drafts 4", "--k 4 --drafts 8", "--k 4 --drafts 16", "--k 8 --drafts 8")))),
    "tune-B": (2, 0, [
        *((f"majority vote, temperature {t}", "`majority`", lambda lab, s, t=t: majority(lab, s, t)) for t in (0.5, 1.0, 1.5)),
        *((f"SFT, {n} shifted items, lr {lr}", "`fine_tuned`", lambda lab, s, n=n, lr=lr: fine_tuned(lab, s, True, n, lr))
          for n in (100, 1000) for lr in (3e-4, 1e-3, 3e-3)),
        *((f"the adapter is kept, lr {lr}", "`stream`", lambda lab, s, lr=lr: stream(lab, s, lr)) for lr in (0.01, 0.03, 0.1))]),
    # from here on every row trains on the same pairs
    "adapt": (5, 0, [
        ("suffix (the default)", "--adapt suffix", lambda lab, s: lab.run(s, pairs_of(lab, s, ""))),
        ("full (the paper)", "--adapt full", lambda lab, s: lab.run(s, f"--adapt full {pairs_of(lab, s, '')}")),
        ("full, the training rows' tools reshuffled", "`reshuffled`", reshuffled),
        ("suffix against full", "`against`", lambda lab, s: against(
            lab.run(s, pairs_of(lab, s, "")), lab.run(s, f"--adapt full {pairs_of(lab, s, '')}"))),
        ("suffix against full, reshuffled", "`against`",
         lambda lab, s: against(lab.run(s, pairs_of(lab, s, "")), reshuffled(lab, s)))]),
    "tune-T": (2, 0, [(flags, flags, lambda lab, s, flags=flags: lab.run(s, f"{flags} {pairs_of(lab, s)}"))
                      for flags in (*(f"--lr {x}" for x in (.03, .05, .07, .1, .14, .2, .3)),
                                    *(f"--optimizer adamw --lr {x}" for x in (1e-4, 3e-4, 1e-3, 3e-3)),
                                    "--epochs 3", "--epochs 10", "--lora-rank 2", "--lora-rank 32", "--adapt full")]
               + [(f"clipped, lr {lr}", "`clipped`", lambda lab, s, lr=lr: clipped(lab, s, lr)) for lr in (.1, .3, 1)]),
}
TUNING = ("tune-G", "tune-T", "tune-B", "adapt")


def signs(wins, losses):
    """Two-sided exact sign test: how likely is a split as uneven as this, if a change were as often good as bad?"""
    n, k = wins + losses, min(wins, losses)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2 ** n)


def pooled(runs):
    """Rows of several seeds -> the numbers of one line: means over seeds, and an interval over items of these means."""
    summaries = [ttsi.summarise(rows) for rows in runs]
    mean = lambda key: statistics.mean(key(s) for s in summaries)
    change = [statistics.mean(c) for c in zip(*([r["scores"]["ttsi"]["call"] - r["scores"]["direct"]["call"]
                                                 for r in rows] for rows in runs))]
    wins, losses = sum(c > 0 for c in change), sum(c < 0 for c in change)
    verdicts = [d["verdict"] for rows in runs for r in rows for d in r.get("drafts", [])]
    once = [rows[0]["once"] for rows in runs if "once" in rows[0]]
    right = {kind: [r["scores"]["direct"][kind] for rows in runs for r in rows if "margin" in r] for kind in ("name", "call")}
    margins = [r["margin"] for rows in runs for r in rows if "margin" in r]
    return {
        "seeds": len(runs), "n": len(change), "direct": {k: mean(lambda s: s["direct"][k]) for k in ("name", "call")},
        "always first": mean(lambda s: s["always_first"]), "ttsi": {k: mean(lambda s: s["ttsi"][k]) for k in ("name", "call")},
        "difference": mean(lambda s: s["difference"]), "interval": [100 * q for q in ttsi.interval(change)],
        "sd": statistics.stdev(s["difference"] for s in summaries) if len(runs) > 1 else None,
        "items better": wins, "items worse": losses, "p": signs(wins, losses),
        "adapted": statistics.mean(sum(r.get("trained", "adapted" in r) for r in rows) for rows in runs),
        **{unit: mean(lambda s: s["ttsi"][unit] / s["direct"][unit]) for unit in ("tokens", "seconds")},
        "per query": {unit: mean(lambda s: s["ttsi"][unit]) for unit in ("tokens", "seconds")},
        **({"once": {key: statistics.mean(o[key] for o in once) for key in once[0]}} if once else {}),
        "drafts kept": [sum(v == "kept" for v in verdicts), len(verdicts)],
        "auroc": {kind: ttsi.auroc(margins, right[kind]) for kind in right}}


def ranked(runs):
    """Rows of --select all -> what their "margin" is worth: AUROC, and accuracy if the least certain 60 % are adapted."""
    chosen = []
    for rows in runs:
        least = sorted(range(len(rows)), key=lambda i: margin(rows[i]))[:int(.6 * len(rows))]
        chosen.append(gate(rows, [i in least for i in range(len(rows))]))
    return pooled(chosen) | {"every tau": [ttsi.every_tau(rows) for rows in runs]}


def row_of(label, r, *cells):
    flags = f'`{r["flags"]}`' if r["flags"].startswith("-") else r["flags"]
    return "| " + " | ".join([label if label != r["flags"] else "", flags, *cells]) + " |"


def difference(r):
    return f'{r["difference"]:+.1f} [{r["interval"][0]:+.1f}, {r["interval"][1]:+.1f}]'


def markdown(lines):
    """The numbers of a group -> its table. Beside what was trained once for all samples stands what that took."""
    once = any("once" in r for r in lines.values())
    head = ["", "flags", "direct", "call", "difference [95 %]", "s.d.", "better / worse", "p", "adapted", "tokens"]
    head += ["labels", "tokens once", "seconds once", "tokens a query", "seconds a query"] * once
    text = ["| " + " | ".join(head).lstrip() + " |", "|---" * len(head) + "|"]
    first = {f'{r["always first"]:.1f}' for r in lines.values() if "always first" in r}
    text += [f"| always the first tool listed: {v} % of the names" + " |" * len(head) for v in first if len(first) == 1]
    for label, r in lines.items():
        sd, p = "" if r["sd"] is None else f'{r["sd"]:.1f}', "< 0.001" if r["p"] < .001 else f'{r["p"]:.3f}'
        before, each = r.get("once", {"labels": 0, "tokens": 0, "seconds": 0}), r["per query"] if "per query" in r else {}
        text.append(row_of(label, r, *(f'{r[side]["call"]:.1f}' for side in ("direct", "ttsi")), difference(r), sd, f'{r["items better"]} / {r["items worse"]}', p,
                           f'{r["adapted"]:.0f}/{r["n"]}', f'{r["tokens"]:.1f}x', *[
            f'{before["labels"]:,.0f}', f'{before["tokens"] / 1e6:.2f} M', f'{before["seconds"]:.0f}', f'{each.get("tokens", 0):.0f}',
            f'{each.get("seconds", 0):.2f}'] * once))
    return "\n".join(text) + "\n"


def uncertainties(lines):
    text = ["| | flags | AUROC, right names | AUROC, right calls | call, the least certain 60 % adapted | difference [95 %] |",
            "|---|---|---|---|---|---|"]
    for label, r in lines.items():
        text.append(row_of(label, r, *(f"{v:.2f}" if v is not None else "" for v in r["auroc"].values()),
                           f'{r["ttsi"]["call"]:.1f}', difference(r)))
    return "\n".join(text) + "\n"


def findings(found):
    """Results of all groups -> the shape of the paper's findings beside ours. The paper's: SealTool, 1.5 B parameters."""
    main, base, controls = found["main"], found["baselines"], found["controls"]
    verdict = lambda r: "as there" if r["interval"][0] > 0 else "**not as there**" if r["interval"][1] < 0 else "undecided"
    rows = [
        ("TT-SI gains", "+6.1 (mean of four benchmarks +5.5)", main["first accepted draft"], "one accepted draft, over direct answers"),
        ("adapting all gains more than the uncertain alone", "+1.0", controls["adapt all against adapt the uncertain"], "the difference"),
        ("adapting the certain alone gains too", "+3.7", controls["adapt only the certain"], "over direct answers"),
        ("a stronger teacher gains more (TT-D)", "+0.9 (mean of four)", main["TT-D against TT-SI, first accepted drafts"], "the difference"),
        ("TT-SI gains more than a majority vote", "+1.6 (mean of four)", base["TT-SI against the vote"], "the difference"),
        ("TT-SI gains more than SFT on 13,000 items", "+2.2", base["TT-SI against SFT without the shift"],
         "items without the shift: the embedded model answers these already, so that they teach nothing"),
        ("", "", base["TT-SI against SFT on 100 shifted items"], "against SFT on **100** items with the shift")]
    return "| finding | paper | here | what | shape |\n|---|---|---|---|---|\n" + "".join(
        f"| {name} | {paper} | {difference(r)} | {what} | {verdict(r)} |\n" for name, paper, r, what in rows)


# --------------------------------------------------------------------------------------------------------- figures

COLOURS = ("#1f5fa8", "#c0392b", "#2e8b57", "#8e5ea2")


def svg(width, height, body):
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">\n'
            f'<rect width="{width}" height="{height}" fill="white"/>\n' + "\n".join(body) + "\n</svg>\n")


def text_at(x, y, words, anchor="start", more=""):
    words = words.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{words}</text>'


class Axes:
    """A frame with ticks. x, y: {position: label}, in the order of the axis; what lies between is interpolated."""

    def __init__(self, left, top, width, height, x, y, x_name, y_name):
        self.box, self.body = (left, top, width, height), []
        self.span = [(min(t), max(t)) for t in (x, y)]
        for v, label in x.items():
            self.body += [self.line([(v, self.span[1][0]), (v, self.span[1][1])], "#ddd", 1),
                          text_at(self.at(v, 0)[0], top + height + 16, label, "middle")]
        for v, label in y.items():
            self.body += [self.line([(self.span[0][0], v), (self.span[0][1], v)], "#ddd", 1),
                          text_at(left - 6, self.at(0, v)[1] + 4, label, "end")]
        self.body += [text_at(left + width / 2, top + height + 34, x_name, "middle"), text_at(left, top - 8, y_name)]

    def at(self, x, y):
        (left, top, width, height), ((x0, x1), (y0, y1)) = self.box, self.span
        return left + width * (x - x0) / (x1 - x0), top + height * (y1 - y) / (y1 - y0)

    def line(self, points, colour, width=2):
        path = " ".join("{:.1f},{:.1f}".format(*self.at(*p)) for p in points)
        return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>'

    def dot(self, x, y, low, high, colour, label=""):
        px, py = self.at(x, y)
        self.body += [self.line([(x, low), (x, high)], colour, 1),
                      f'<circle cx="{px:.1f}" cy="{py:.1f}" r="{8 if label else 4}" fill="{colour}"/>']
        self.body += [text_at(px, py + 4, label, "middle", 'fill="white" font-size="10"')] if label else []


def cost_figure(found):
    """Gain over cost, all methods: points over direct answers on the same items, tokens as a multiple of them."""
    points = [(group, label, r) for group in ("main", "baselines", "controls", "beyond") for label, r in found[group].items()
              if "against" not in label and not (
                  group != "main" and label in ("TT-SI (the default)", "closest of 4 drafts", "K = 1, of 1 drafts"))]
    low = 10 * math.floor(min(r["interval"][0] for *_, r in points) / 10)
    high = 10 * math.ceil(max(r["interval"][1] for *_, r in points) / 10)
    doublings = math.ceil(math.log2(max(r["tokens"] for *_, r in points)))
    a = Axes(60, 30, 560, 18 * len(points), {v: f"{2 ** v}x" for v in range(doublings + 1)},
             {v: f"{v:+d}" for v in range(low, high + 1, 10)},
             "tokens per sample, as a multiple of a direct answer's (training before the first query not counted)",
             "call accuracy, points over direct answers, 95 % interval over items")
    for i, (group, label, r) in enumerate(points, 1):
        colour = COLOURS[("main", "baselines", "controls", "beyond").index(group)]
        a.dot(math.log2(max(1, r["tokens"])), r["difference"], *r["interval"], colour, str(i))
        a.body += [f'<circle cx="650" cy="{26 + 18 * i}" r="8" fill="{colour}"/>',
                   text_at(650, 30 + 18 * i, str(i), "middle", 'fill="white" font-size="10"'), text_at(664, 30 + 18 * i, label)]
    return svg(1060, 18 * len(points) + 80, a.body)


def tau_figure(found):
    """Accuracy and number adapted over tau, out of runs with --select all; tau on the scale of -log10(1 - tau)."""
    runs = found["uncertainty"]["margin of the names (the paper)"]["every tau"]
    taus = [1 - 10 ** (-i / 20) for i in range(81)]
    at = lambda key, tau: statistics.mean(next(e[key] for e in run if e["tau"] >= tau) for run in runs)
    curve = lambda key: [(-math.log10(1 - tau), at(key, tau)) for tau in taus]
    accuracy = [y for key in ("call", "certain_only") for _, y in curve(key)]
    ticks = {0: "0", -math.log10(.5): "0.5", 1: "0.9", -math.log10(.05): "0.95", 2: "0.99", 3: "0.999", 4: "0.9999"}
    low, high = 5 * math.floor(min(accuracy) / 5), 5 * math.ceil(max(accuracy) / 5)
    top = Axes(60, 30, 500, 200, ticks, {v: str(v) for v in range(low, high + 1, 5)}, "", "call accuracy, %")
    n = runs[0][-1]["adapted"]
    below = Axes(60, 290, 500, 120, ticks, {v: str(v) for v in range(0, n + 50, 50)}, "tau", "samples adapted")
    for i, (key, label) in enumerate((("call", "adapted below tau (the method)"), ("certain_only", "adapted from tau on (the control)"))):
        top.body += [top.line(curve(key), COLOURS[i]), text_at(580, 60 + 20 * i, label, "start", f'fill="{COLOURS[i]}"')]
    return svg(800, 470, top.body + below.body + [below.line(curve("adapted"), COLOURS[0])])


def dose_figure(found):
    """Accuracy over the share of items that are shifted, direct and with TT-SI."""
    rows = [(int(label.split()[0]), r) for label, r in found["dose"].items() if label.endswith("shifted")]
    low = 10 * math.floor(min(r["direct"]["call"] for _, r in rows) / 10)
    a = Axes(60, 30, 400, 220, {x: f"{x} %" for x, _ in rows}, {v: str(v) for v in range(low, 101, 10)}, "share of shifted items",
             "call accuracy, %; bars: 95 % interval of the difference")
    for colour, label, y, ys in ((COLOURS[1], "direct", lambda r: r["direct"]["call"], 0), (COLOURS[0], "TT-SI", lambda r: r["ttsi"]["call"], 1)):
        a.body += [a.line([(x, y(r)) for x, r in rows], colour), text_at(480, 60 + 20 * ys, label, "start", f'fill="{colour}"')]
        for x, r in rows:
            a.dot(x, y(r), *((r["direct"]["call"] + v for v in r["interval"]) if ys else (y(r), y(r))), colour)
    return svg(560, 300, a.body)


FIGURES = {"cost": cost_figure, "tau": tau_figure, "dose": dose_figure}
SHOW = {"uncertainty": (ranked, uncertainties)}


def publish(stem, group, text):
    """Into each README, between <!-- table STEM GROUP --> and <!-- end -->."""
    for readme in (HERE.parent / "README.md", HERE / "README.md"):
        old = readme.read_text(encoding="utf-8")
        mark = re.escape(f"<!-- table {stem} {group} -->\n")
        new = re.sub(f"({mark}).*?(<!-- end -->)", lambda m: m[1] + text + m[2], old, flags=re.S)
        if new != old:
            readme.write_text(new, encoding="utf-8")


def results(stem, folder=HERE / "results"):
    """-> {group: its numbers}, of all that were published."""
    return {f.stem[len(stem) + 1:]: json.loads(f.read_text(encoding="utf-8")) for f in sorted(folder.glob(f"{stem}-*.json"))}


def figures(stem, found):
    """Figures, and the table of findings, once all that they need is there -> {file name or group: text}"""
    whole = all(label in found.get(g, {}) for g, (*_, rows) in GROUPS.items() if g not in TUNING for label, *_ in rows)
    return {f"{stem}-{name}.svg": draw(found) for name, draw in FIGURES.items()} | {"findings": findings(found)} if whole else {}


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("groups", nargs="*", help=f"of {', '.join(GROUPS)}; default: all that tune nothing")
    p.add_argument("--model", default=ttsi.Config.model)
    p.add_argument("--data", default="", help="default: data/test.jsonl; with --quick data/dev.jsonl")
    p.add_argument("--teacher", default="", help="who writes the pairs of TT-D; the embedded model has data/teacher")
    p.add_argument("--flags", default="", help="of ttsi.py, for every run: '--lr 1e-4 --optimizer adamw --dtype bfloat16'")
    p.add_argument("--only", default="", help="rows whose label or flags hold this text")
    p.add_argument("--seeds", type=int, default=0, help="0: 5 for the main table, 2 for the others")
    p.add_argument("--limit", type=int, default=0, help="only the first so many items; 0: all for the main table, else 250")
    p.add_argument("--quick", action="store_true", help="10 items, one seed, SFT on 16: under five minutes, nothing is published")
    args = p.parse_args(argv)
    partial = args.limit or args.seeds or args.quick or args.flags  # looked at, not published
    args.data = args.data or str(HERE / ("dev.jsonl" if args.quick else "test.jsonl"))
    if args.quick:
        args.limit, args.seeds = args.limit or 10, args.seeds or 1
    args.teacher = args.teacher or (str(HERE / "teacher") if args.model == ttsi.Config.model else "")
    ttsi.need(Path(args.data).is_file(), f"--data {args.data}: no such file; give canonical samples, one a line")
    lab, stem = Lab(args), Path(args.data).stem
    ttsi.need(all("call" in sample for sample in lab.samples(lab.config(0))), f"{args.data}: not every sample has a label")
    for group in args.groups or [g for g in GROUPS if g not in TUNING]:
        seeds, items, lines = GROUPS[group]
        measure, show = SHOW.get(group, (pooled, markdown))
        lab.limit = args.limit or items
        if not any(args.only in label + flags for label, flags, _ in lines):
            continue
        file = (HERE / "results" if lab.embedded and not partial else lab.runs) / f"{stem}-{group}.json"
        found = json.loads(file.read_text(encoding="utf-8")) if args.only and file.exists() else {}
        for label, flags, rows in lines:
            if args.only in label + flags:
                try:
                    found[label] = measure([rows(lab, s) for s in range(args.seeds or seeds)]) | {"flags": flags}
                    print(f"{label}: {difference(found[label])}", flush=True)
                except Skip as e:
                    print(f"{label}: left out: {e}", flush=True)
        found = {label: found[label] for label, *_ in lines if label in found}
        print(f"\n{show(found)}\nthe numbers: {os.path.relpath(file)}", flush=True)
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(found, indent=1), encoding="utf-8")
        if lab.embedded and not partial:
            publish(stem, group, show(found))
    if lab.embedded and not partial:
        for name, text in figures(stem, results(stem)).items():
            if name.endswith(".svg"):
                (HERE / "results" / name).write_text(text, encoding="utf-8")
            else:
                publish(stem, name, text)


if __name__ == "__main__":
    try:
        main()
    except ttsi.InputError as e:
        sys.exit(f"experiments: {e}")
