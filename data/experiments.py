"""The evidence: variants, baselines and controls, composed of what ttsi.py exports.

    python data/experiments.py                # all but the tuning, on the test split: hours
    python data/experiments.py --quick        # on 10 items of dev, one seed: do all of them run?
    python data/experiments.py tune-G tune-T tune-B adapt --data data/dev.jsonl   # chose settings
    python data/experiments.py main --only accepted --model M --data D.jsonl      # any model, data

Runs go to runs/ and are resumed; the numbers go to data/results/, and from there into the figures
beside them and into the READMEs, between markers. A seed is one draw of drafts, LoRA
initialisations and tool order; the model is one and the same. Nothing here is needed by ttsi.py,
and nothing is added to it but for the time of one run (`patched`).
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
from types import SimpleNamespace

import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import world  # noqa: E402

import ttsi  # noqa: E402

# --------------------------------------------------------------------------------------- runs
ALL, NONE = "--tau 2", "--tau 0"  # who is adapted
FREE = shlex.split("--drafts 4 --k 1 --temperature 1")  # the tables' default: free drafts
VOTES = 5


class Skip(Exception):
    """What a row needs is not there."""


class Lab:
    """Where runs are kept. One folder per version of ttsi.py, of the model's weights and of the
    data, so that none is stale; one below it per version of a function that takes the place of
    another (`patched`)."""

    def __init__(self, args):
        self.args, self.limit, self.loaded = args, args.limit, None
        files = [HERE.parent / "ttsi.py", HERE / "world.py", Path(args.data)]
        for folder in filter(None, (args.model, args.teacher)):
            files += sorted(Path(folder).glob("*.*"))
        digest = hashlib.sha256(b"".join(file.read_bytes() for file in files))
        self.runs = HERE.parent / "runs" / digest.hexdigest()[:12]
        self.runs.mkdir(parents=True, exist_ok=True)
        here = Path(args.data).resolve().parent == HERE
        self.embedded = here and args.model == ttsi.Config.model

    def config(self, seed, flags=""):
        argv = ["--model", self.args.model, "--data", self.args.data, "--seed", str(seed)]
        if self.limit:
            argv += ["--limit", str(self.limit)]
        flags = shlex.split(f"{self.args.flags} {flags}")
        free = [] if "--paper" in flags else FREE
        return ttsi.parse_flags([*argv, *free, *flags])

    def path(self, seed, flags=""):
        """The file of the rows of `python ttsi.py --seed SEED FLAGS`, which is run if it was not
        before, on these items or on all."""
        whole, cfg = self.config(seed, f"{flags} --limit 0"), self.config(seed, flags)
        for c in (whole, cfg):
            name = hashlib.sha256(json.dumps(vars(c)).encode()).hexdigest()[:16]
            c.output = str(self.runs / f"{name}.jsonl")
            done = Path(c.output).with_suffix(".done")
            if done.exists():
                return c.output
        print(f"{Path(cfg.data).name} --seed {seed} {flags}", file=sys.stderr, flush=True)
        with contextlib.redirect_stdout(io.StringIO()):
            ttsi.run(cfg)
        done.touch()
        return cfg.output

    def run(self, seed, flags=""):
        """-> the rows of `path`."""
        return read_rows(self.path(seed, flags))[: self.limit or None]

    def rows(self, seed, flags=""):
        return {row["id"]: row for row in self.run(seed, flags)}

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
        return list(ttsi.read_jsonl(cfg.data, ttsi.to_sample).values())[: cfg.limit or None]

    def base(self, cfg):
        """-> (model, tokenizer), loaded once."""
        self.loaded = self.loaded or ttsi.load(cfg.model, cfg)
        return self.loaded

    def embedded_only(self):
        if not self.embedded:
            raise Skip("only the embedded world can be made anew")

    def prepared(self, cfg):
        """Yields (sample, what a method may see of it), without those that no run answers."""
        for sample in tqdm(self.samples(cfg)):
            try:
                x = ttsi.prepare(self.base(cfg)[1], sample, cfg)
            except ttsi.InputError:
                continue
            yield sample, x


def read_rows(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n")[:-1]]


def kept(f):
    """What f(lab, ...) gives is kept beside the runs, under its arguments and all that stands in
    this file before the tables."""

    @functools.wraps(f)
    def once(lab, *args):
        source = Path(__file__).read_text(encoding="utf-8").partition("-" * 20 + " tables")[0]
        key = json.dumps([source, lab.args.data, lab.args.flags, lab.limit, args])
        path = lab.runs / f"{f.__name__}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
        if not path.exists():
            print(f"{f.__name__} {args}", file=sys.stderr, flush=True)
            part = path.with_suffix(".part")
            part.write_text(json.dumps(f(lab, *args)), encoding="utf-8")
            os.replace(part, path)
        return json.loads(path.read_text(encoding="utf-8"))

    return once


@contextlib.contextmanager
def patched(lab, **functions):
    """ttsi.py with other functions -> a Lab whose runs lie apart."""
    source = "".join(map(inspect.getsource, functions.values()))
    elsewhere, ours = copy.copy(lab), {name: getattr(ttsi, name) for name in functions}
    elsewhere.runs = lab.runs / hashlib.sha256(source.encode()).hexdigest()[:12]
    elsewhere.runs.mkdir(exist_ok=True)
    try:
        vars(ttsi).update(functions)
        yield elsewhere
    finally:
        vars(ttsi).update(ours)


def shared(prefix, spans):
    """-> what a prefix and all these spans begin with, read: a token may merge at its end."""
    ids = os.path.commonprefix([prefix.ids, *(ids for ids, _ in spans)])
    return ttsi.Prefix(prefix.model, ids, prefix)


def system_text(x):
    """The system message of a prompt in our form."""
    return ttsi.SYSTEM + "\n".join(ttsi.dumps(tool) for tool in x.tools)


def prefixes(model, x):
    """-> the prefixes that every composition begins with: of the tools, and of the prompt."""
    after_tools = ttsi.Prefix(model, x.ids[: x.head])
    return after_tools, ttsi.Prefix(model, x.ids[:-1], after_tools)


# ----------------------------------------------------------------------------- who is adapted
def instead(row, text, right, decision, cost):
    """A row that is answered with this text, graded `right`, at this cost; without any pair."""
    answered = {"answer": text, "scores": row["scores"] | {"answer": right}, "decision": decision}
    nothing = {"drafts": [], "pairs": [], "loss": []}
    return row | nothing | answered | {"cost": cost | spent(row, "direct")}


def spent(row, *stages):
    """What these stages of a row cost."""
    return {stage: row["cost"][stage] for stage in stages}


def gate(rows, chosen):
    """Rows of a run with --tau 2 -> rows as if only the chosen samples had been adapted. Each was
    answered both ways, and samples do not touch each other."""
    out = []
    for row, adapt in zip(rows, chosen, strict=True):
        if not adapt and "generate" in row["cost"]:
            cost = spent(row, "score") | {"answer": row["cost"]["direct"]}  # prompt included
            row = instead(row, row["direct"], row["scores"]["direct"], "certain", cost)
        out.append(row)
    return out


def margin(row):
    """Its margin; 2 where there is none: such a sample is never adapted."""
    return 2.0 if row["margin"] is None else row["margin"]


def uncertain(rows, tau=ttsi.Config.tau):
    return gate(rows, [margin(row) < tau for row in rows])


def certain(rows, tau=ttsi.Config.tau):
    return gate(rows, [margin(row) >= tau for row in rows])


def gated(lab, seed, choose):
    return choose(lab.run(seed, ALL))


def a_random_subset(lab, seed):
    """As many samples as are uncertain, drawn without looking at them."""
    rows = lab.run(seed, ALL)
    n = sum(margin(row) < ttsi.Config.tau for row in rows)
    order = torch.randperm(len(rows), generator=ttsi.draw(seed, "subset")).tolist()
    return gate(rows, [place < n for place in order])


def within_budget(lab, seed, share):
    """Tau without labels: so that this share of other samples, dev's, lies below it."""
    dev = shlex.quote(str(HERE / "dev.jsonl"))
    others = f"--data {dev} --limit 0" if lab.embedded else ""
    margins = sorted(margin(row) for row in read_rows(lab.path(seed, f"{NONE} {others}")))
    return uncertain(lab.run(seed, ALL), margins[int(share * len(margins))])


# -------------------------------------------------------------------------------- other pairs
def priced(rows, written):
    """Rows of a run on pairs from a file, with what writing these cost: in the run that did."""
    cost = {row["id"]: spent(row, "generate") for row in written if "generate" in row["cost"]}
    return [row | {"cost": row["cost"] | cost.get(row["id"], {})} for row in rows]


def with_pairs(tok, x, pairs):
    """-> token ids of the prompt in which these pairs are earlier turns."""
    turns = []
    for pair in pairs:
        turns.append({"role": "user", "content": pair["request"]})
        turns.append({"role": "assistant", "content": ttsi.dumps(pair["call"])})
    turns.append({"role": "user", "content": x.request})
    text = system_text(x)
    system = {"role": "system", "content": text}
    folded = {"role": "user", "content": f"{text}\n\n{turns[0]['content']}"}
    how = ttsi.RENDER | {"chat_template": None if tok.chat_template else ttsi.PLAIN}
    for messages in ([system, *turns], [folded, *turns[1:]]):  # as ttsi.render does
        try:
            prompt = tok.apply_chat_template(messages, add_generation_prompt=True, **how)
        except Exception as e:
            prompt = str(e)
        end = prompt.find(text) + len(text)
        if text in prompt and x.request in prompt[end:]:
            return ttsi.encode(tok, prompt)[0]
    raise ttsi.InputError(f"the chat template does not hold the pairs: {prompt[:80]}")


@kept
def shown(lab, seed):
    """TT-ICL: the pairs of the free drafts stand in the prompt, nothing is trained."""
    cfg, out = lab.config(seed), lab.rows(seed)
    model, tok = lab.base(cfg)
    for sample, x in lab.prepared(cfg):
        row = out[x.id]
        if not row["pairs"]:
            continue
        ids, cost = with_pairs(tok, x, row["pairs"]), spent(row, "score", "generate")
        if len(ids) + cfg.max_new_tokens > tok.model_max_length:
            cost["answer"] = row["cost"]["direct"]  # prompt included
            given = row["direct"], row["scores"]["direct"], "pairs exceed the context"
        else:
            after_tools, _ = prefixes(model, x)
            with ttsi.measured(cost, "answer", model):
                text = ttsi.write(tok, ids, after_tools, cfg)[0]
            cost |= spent(row, "prefill")
            given = text, ttsi.grade(text, sample), "adapted"
        out[x.id] = instead(row, *given, cost) | {"drafts": row["drafts"], "pairs": row["pairs"]}
    return list(out.values())


def others_pairs(lab, seed):
    """Every sample is adapted to the pairs that were written for the next one."""
    written, moved = lab.run(seed, ALL), {}
    for row, after in zip(written, written[1:] + written[:1], strict=True):
        moved[row["id"]] = after["pairs"]
    return priced(lab.run(seed, f"{ALL} --no-check {lab.pairs(moved)}"), written)


def the_item_itself(lab, seed):
    """NOT a method, an upper bound: every sample is adapted to its own request and LABEL. ttsi.py
    refuses that, as a copy of the request."""

    def fault(pair, before, x, cfg):
        found = ours(pair, before, x, cfg)
        return "" if found == "copy of the request" else found

    ours, own = ttsi.fault, {}
    for s in lab.samples(lab.config(seed)):
        own[s["id"]] = [{"request": ttsi.user_text(s["messages"]), "call": s["call"]}]
    with patched(lab, fault=fault) as elsewhere:
        return elsewhere.run(seed, f"{ALL} --no-check {lab.pairs(own)}")


@kept
def round_trip(lab, seed, agree):
    """Only drafts whose request the model answers with their call; or, as a control, the others."""
    cfg, rows = lab.config(seed), lab.rows(seed)
    model, tok = lab.base(cfg)
    pairs = {i: [] for i in rows}
    for _, x in lab.prepared(cfg):
        after_tools, _ = prefixes(model, x)
        for pair in [draft["pair"] for draft in rows[x.id]["drafts"] if draft["pair"]]:
            ids, begin = ttsi.pair_span(x, pair)
            with ttsi.measured(rows[x.id]["cost"], "generate", model):
                text = ttsi.write(tok, ids[:begin], after_tools, cfg)[0]
            if ttsi.grade(text, {"call": pair["call"]})["call"] == agree:
                pairs[x.id].append(pair)
    return priced(lab.run(seed, lab.pairs(pairs)), rows.values())


@kept
def stream(lab, seed, lr):
    """One LoRA for all, in the file's order, never reset. It scores, is trained where it is
    uncertain, and answers. The pairs are those that the base model wrote."""
    cfg, out = lab.config(seed, f"--lr {lr}"), lab.rows(seed, ALL)
    (model, tok), learned = lab.base(cfg), None
    for sample, x in lab.prepared(cfg):
        row, cost = out[x.id], {}
        stage = functools.partial(ttsi.measured, cost, model=model)
        with stage("prefill"):
            after_tools = ttsi.Prefix(model, x.ids[: x.head])
        spans = [ttsi.pair_span(x, pair) for pair in row["pairs"]]
        base = after_tools if cfg.adapt == "suffix" else ttsi.Prefix(model, [])
        base = shared(base, spans)
        with ttsi.temporary_lora(model, cfg, ttsi.draw(cfg.seed, x.id, "adapter")) as lora:
            with torch.no_grad():
                for p, before in zip(lora, learned or lora, strict=True):
                    p.copy_(before)
            with stage("prefill"):
                prefix = ttsi.Prefix(model, x.ids[:-1], base)
            with stage("score"):
                u = ttsi.margin(ttsi.score(x, prefix))
            trained = u < cfg.tau and bool(spans)
            if trained:
                with stage("train"):
                    ttsi.train(spans, base, lora, cfg)
                prefix = base  # what lies behind it is another one now
            with stage("answer"):
                text = ttsi.write(tok, x.ids, prefix, cfg)[0]
            learned = [p.detach().clone() for p in lora]
        if u < cfg.tau:
            cost |= spent(row, "generate")
        decision = "adapted" if trained else "untrained"
        out[x.id] = instead(row, text, ttsi.grade(text, sample), decision, cost)
        out[x.id]["margin now"] = u
    return list(out.values())


def dose(lab, seed, shift, flags=""):
    """The run with free drafts on a mixture: this share of the items is shifted, drawn in one and
    the same order, the others are not. Samples do not touch each other: rows of two runs can be
    mixed."""
    lab.embedded_only()
    split, shifted = Path(lab.args.data).stem, lab.run(seed, flags)
    unshifted = lab.file(world.records(split, len(shifted), 0, 0))
    plain = lab.run(seed, f"{flags} --limit 0 --data {unshifted}")
    order = torch.randperm(len(shifted), generator=ttsi.draw("dose")).tolist()
    mixed = zip(order, shifted, plain, strict=True)
    return [a if place < shift / 100 * len(shifted) else b for place, a, b in mixed]


def teacher(lab, seed, flags=""):
    """TT-D: another model writes the drafts."""
    if not lab.args.teacher:
        raise Skip("give --teacher MODEL")
    return lab.run(seed, f"--teacher {shlex.quote(lab.args.teacher)} {flags}")


# ------------------------------------------------------------------- baselines, without pairs
def forced(tok, x, name, prefix, cfg):
    """-> the answer that a model gives once this tool's name is written."""
    ids, _ = x.candidates[[tool["name"] for tool in x.tools].index(name)]
    begun = ids[len(os.path.commonprefix([ids, x.ids])) :]

    def decode(new, **how):  # `write` ends with a call, which it must see from its beginning on
        return tok.decode([*begun, *new], **how)

    whole = SimpleNamespace(eos_token_id=tok.eos_token_id, decode=decode)
    return ttsi.write(whole, ids, prefix, cfg)[0]


@kept
def nearest(lab, seed, flags=""):
    """No training: the tool of the draft closest to the request; the base fills in the values."""
    cfg, out = lab.config(seed, flags), lab.rows(seed, flags)
    model, tok = lab.base(cfg)
    for sample, x in lab.prepared(cfg):
        row = out[x.id]
        if row["pairs"]:
            _, after_prompt = prefixes(model, x)
            cost = spent(row, "prefill", "score", "generate")
            with ttsi.measured(cost, "answer", model):
                text = forced(tok, x, row["pairs"][0]["call"]["name"], after_prompt, cfg)
            out[x.id] = instead(row, text, ttsi.grade(text, sample), "nearest draft", cost)
    return list(out.values())


@kept
def sampled(lab, seed, temperature):
    """-> {id: {"texts": VOTES sampled answers, "cost": [seconds, tokens]}}"""
    cfg, out = lab.config(seed, f"--temperature {temperature}"), {}
    model, tok = lab.base(cfg)
    for _, x in lab.prepared(cfg):
        _, after_prompt = prefixes(model, x)
        draws = [ttsi.draw(cfg.seed, x.id, "vote", i) for i in range(VOTES)]
        uniform = torch.stack([torch.rand(cfg.max_new_tokens, generator=g) for g in draws])
        cost = {}
        with ttsi.measured(cost, "votes", model):
            texts = ttsi.write(tok, x.ids, after_prompt, cfg, uniform)
        out[x.id] = {"texts": texts, "cost": cost["votes"]}
    return out


def call_of(text):
    """What is voted on: name and arguments, as they are compared in scoring; None: no call."""
    call, _ = ttsi.parse(text)
    name, arguments = call.get("name"), call.get("arguments")
    if not (isinstance(name, str) and isinstance(arguments, dict)):
        return None
    return json.dumps([name, ttsi.canonical(arguments)], sort_keys=True)


def chosen_by(choose):
    """-> rows of a seed, each answered with the one of its sampled texts that is chosen."""

    def rows(lab, seed, temperature):
        drawn, out = sampled(lab, seed, temperature), lab.rows(seed, NONE)
        for sample in lab.samples(lab.config(seed)):
            i = sample["id"]
            if i in drawn:
                text = choose(drawn[i]["texts"], sample)
                cost = spent(out[i], "prefill") | {"answer": drawn[i]["cost"]}
                out[i] = instead(out[i], text, ttsi.grade(text, sample), "chosen", cost)
        return list(out.values())

    return rows


def most_frequent(texts, sample):
    """The call that most sampled answers make; among equals the first; without any, no answer."""
    calls = [call_of(text) for text in texts]
    with_call = [text for text in texts if call_of(text)]
    return max(with_call, key=lambda text: calls.count(call_of(text)), default="")


def best_graded(texts, sample):
    """NOT a method: a right one if there is any. Who chooses it needs the label."""
    return max(texts, key=lambda text: sum(ttsi.grade(text, sample).values()))


majority, any_of = chosen_by(most_frequent), chosen_by(best_graded)


def training_items(shift, n):
    """-> n labelled training items, all of them shifted or none."""
    if shift:
        return [ttsi.to_sample(record) for record in world.records("train", n, 1, 0)]
    with gzip.open(HERE / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        return [ttsi.to_sample(json.loads(line)) for _, line in zip(range(n), file, strict=False)]


@kept
def sft(lab, seed, shift, n, lr):
    """Supervised fine-tuning: ONE LoRA, trained on n labelled items and kept for every sample.
    AdamW, batches of 16, cosine; 10 epochs on up to 100 items, 3 on up to 1,000, else 1."""
    lab.embedded_only()
    cfg, items = lab.config(seed, "--adapt full"), training_items(shift, n)
    order, epochs = [], 10 if n <= 100 else 3 if n <= 1000 else 1
    for epoch in range(epochs):
        order += torch.randperm(n, generator=ttsi.draw(seed, "sft", epoch)).tolist()
    steps = [order[i : i + 16] for i in range(0, len(order), 16)]
    model, tok = lab.base(cfg)
    cost, answers = {}, {}
    with ttsi.temporary_lora(model, cfg, ttsi.draw(cfg.seed, "sft", "adapter")) as lora:
        optimizer = torch.optim.AdamW(lora, weight_decay=0.0)
        for step, batch in enumerate(tqdm(steps)):
            optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / len(steps))) / 2
            with ttsi.measured(cost, "train", model):
                spans = []
                for sample in [items[i] for i in batch]:
                    x = ttsi.prepare(tok, sample, cfg)
                    pair = {"request": x.request, "call": sample["call"]}
                    spans.append(ttsi.pair_span(x, pair))
                lengths = torch.tensor([len(ids) - begin for ids, begin in spans])
                logp = ttsi.logprob(spans, ttsi.Prefix(model, []))
                loss = -(logp / lengths.to(logp.device)).mean()  # over samples, of their tokens'
                for p, g in zip(lora, torch.autograd.grad(loss, lora), strict=True):
                    p.grad = g
                optimizer.step()
        for _, x in lab.prepared(cfg):
            _, after_prompt = prefixes(model, x)
            with ttsi.measured(cost, x.id, model):
                text = ttsi.write(tok, x.ids, after_prompt, cfg)[0]
            answers[x.id] = {"text": text, "cost": cost.pop(x.id)}
    seconds, tokens = cost["train"]
    return {"answers": answers, "once": {"labels": n, "seconds": seconds, "tokens": tokens}}


def fine_tuned(lab, seed, shift, n, lr):
    """The answers of `sft`, and what that took once."""
    trained = sft(lab, seed, shift, 16 if lab.args.quick else n, lr)
    out = lab.rows(seed, NONE)
    for sample in lab.samples(lab.config(seed)):
        i = sample["id"]
        if i in trained["answers"]:
            answer = trained["answers"][i]
            right = ttsi.grade(answer["text"], sample)
            cost = spent(out[i], "prefill") | {"answer": answer["cost"]}
            out[i] = instead(out[i], answer["text"], right, "fine-tuned", cost)
        out[i]["once"] = trained["once"]
    return list(out.values())


# ------------------------------------------------------------------------ other uncertainties
def judged(lab, seed, which, values, *args):
    """Rows of --tau 2 with another certainty in place of the margin: values -> {id: certainties}"""
    other, rows = values(lab, seed, *args), lab.run(seed, ALL)
    found = {i: certainties[which] for i, certainties in other.items()}
    return [row | {"margin": found.get(row["id"], row["margin"])} for row in rows]


@kept
def mean_normalised(lab, seed):
    """-> {id: [the margin of log P(a_n | x) per token of the name]}"""
    cfg, rows, out = lab.config(seed), lab.rows(seed, ALL), {}
    for _, x in lab.prepared(cfg):
        if rows[x.id]["margin"] is not None:
            lengths = [len(ids) - begin for ids, begin in x.candidates]
            names = zip(rows[x.id]["logp"].items(), lengths, strict=True)
            out[x.id] = [ttsi.margin({name: logp / n for (name, logp), n in names})]
    return out


def distinct(texts):
    """The first text of each call, in order."""
    first = {}
    for text in texts:
        first.setdefault(call_of(text) or text, text)
    return list(first.values())


@kept
@torch.no_grad()
def by_answer(lab, seed, temperature):
    """-> {id: [1 / perplexity of the direct answer, margin of whole calls]}; that is the softmax
    margin over the distinct calls among the direct answer and the sampled ones."""
    direct, drawn = lab.rows(seed, NONE), sampled(lab, seed, temperature)
    cfg, out = lab.config(seed), {}
    model, tok = lab.base(cfg)
    for sample, x in lab.prepared(cfg):
        _, after_prompt = prefixes(model, x)
        texts = distinct([direct[x.id]["direct"], *drawn[x.id]["texts"]])
        prompt, _ = ttsi.render(tok, cfg, x.tools, sample["messages"])
        whole = [ttsi.encode(tok, prompt, text + (tok.eos_token or "")) for text in texts]
        spans = [(ids, len(x.ids)) for ids, _ in whole]
        logp, (ids, begin) = ttsi.logprob(spans, after_prompt).tolist(), spans[0]
        margin_of_calls = ttsi.margin(dict(zip(texts, logp, strict=True)))
        out[x.id] = [math.exp(logp[0] / (len(ids) - begin)), margin_of_calls]
    return out


# --------------------------------------------------------------------- other ways of training
def clipped(lab, seed, lr):
    """Another update rule: the gradient is clipped to norm 1, not normalised; the same pairs."""

    def train(spans, base, lora, cfg):
        lengths = torch.tensor([len(ids) - begin for ids, begin in spans]).to(lora[0].device)
        losses = []
        for step in range(cfg.epochs):
            rate = cfg.lr * (1 + math.cos(math.pi * step / cfg.epochs)) / 2
            loss = -(ttsi.logprob(spans, base) / lengths).mean()
            gradients = torch.autograd.grad(loss, lora, allow_unused=True, materialize_grads=True)
            norm = torch.nn.utils.get_total_norm(gradients).clamp(min=1)
            with torch.no_grad():
                for p, g in zip(lora, gradients, strict=True):
                    p -= rate * g / norm
            losses.append(loss.item())
        return losses

    pairs = pairs_of(lab, seed, "--drafts 1")
    with patched(lab, train=train) as elsewhere:
        return elsewhere.run(seed, f"--lr {lr} {pairs}")


def reshuffled(lab, seed):
    """--adapt full, with the tools of each training row in an order of its own; in a cache they
    have but one."""

    def pair_span(x, pair):
        g = ttsi.draw(seed, x.id, "reshuffled", pair["request"])
        tools = [x.tools[i] for i in torch.randperm(len(x.tools), generator=g)]
        return ours(SimpleNamespace(**vars(x) | {"tools": tools}), pair)

    pairs, ours = pairs_of(lab, seed, ""), ttsi.pair_span
    with patched(lab, pair_span=pair_span) as elsewhere:
        return elsewhere.run(seed, f"--adapt full {pairs}")


def pairs_of(lab, seed, flags):
    return f"--pairs {shlex.quote(lab.path(seed, flags))}"


def on_pairs_of(lab, seed, written, flags):
    """A run with these flags on the pairs that a run with the flags `written` wrote."""
    return lab.run(seed, f"{flags} {pairs_of(lab, seed, written)}")


def against(rows, other):
    """Rows in which "direct" is another run, so that the difference is the one to that."""
    out = []
    for row, o in zip(rows, other, strict=True):
        out.append(row | {"scores": row["scores"] | {"direct": o["scores"]["answer"]}})
    return out


# ------------------------------------------------------------------------------------- tables
VOTE_T, SFT_LR, STREAM_LR = 0.5, 3e-3, 8.5e-5  # chosen on dev: tune-B


def using(rows, *args):
    """-> the rows of a seed: rows(lab, seed, *args)."""
    return lambda lab, seed: rows(lab, seed, *args)


def flagged(label, flags):
    """A line whose rows are a run of ttsi.py with these flags."""
    return label, flags, using(Lab.run, flags)


def versus(label, rows, other):
    """A line that compares two rows of a seed."""
    return label, "`against`", lambda lab, seed: against(rows(lab, seed), other(lab, seed))


DEFAULT, EVERYONE = using(Lab.run), using(Lab.run, ALL)
UNCERTAIN, VOTE = using(gated, uncertain), using(majority, VOTE_T)
PLAIN_SFT = using(fine_tuned, False, 13000, SFT_LR)
SMALL_SFT = using(fine_tuned, True, 100, SFT_LR)
ACCEPTED, TEACHERS = using(Lab.run, "--drafts 1"), using(teacher, "--drafts 1")
SUFFIX = using(on_pairs_of, "", "--adapt suffix")
FULL = using(on_pairs_of, "", "--adapt full")

# Lines: (label, what the README calls a command, rows of a seed).
MAIN = [
    flagged("first draft, unchecked", "--drafts 1 --no-check --attempts 1"),
    flagged("first accepted draft", "--drafts 1"),
    flagged("closest of 4 free drafts", "--drafts 4"),
    ("TT-D: first accepted draft of the teacher", "--teacher data/teacher --drafts 1", TEACHERS),
    ("TT-D: closest of 4", "--teacher data/teacher", teacher),
    versus("TT-D against TT-SI, first accepted drafts", TEACHERS, ACCEPTED),
    ("nearest draft: its tool, no training", "`nearest`", using(nearest)),
]
BASELINES = [
    ("TT-SI, closest of 4 free drafts", "--drafts 4", DEFAULT),
    ("majority vote over 5 sampled calls", "`majority`", VOTE),
    ("pass@5: needs the label", "`any_of`", using(any_of, VOTE_T)),
    ("the pairs in the prompt, no training (TT-ICL)", "`shown`", shown),
    ("SFT, 13,000 items without the shift", "`fine_tuned`", PLAIN_SFT),
    ("SFT, 100 shifted items", "`fine_tuned`", SMALL_SFT),
    ("SFT, 1,000 shifted items", "`fine_tuned`", using(fine_tuned, True, 1000, SFT_LR)),
    ("SFT, 13,000 shifted items", "`fine_tuned`", using(fine_tuned, True, 13000, SFT_LR)),
    versus("TT-SI against the vote", DEFAULT, VOTE),
    versus("TT-SI against SFT without the shift", DEFAULT, PLAIN_SFT),
    versus("TT-SI against SFT on 100 shifted items", DEFAULT, SMALL_SFT),
]
UPPER_BOUND = "the item itself, label included, adapt all: an upper bound"
CONTROLS = [
    ("TT-SI, closest of 4 free drafts", "--drafts 4", DEFAULT),
    ("adapt all", ALL, EVERYONE),
    ("adapt only the certain", "`certain`", using(gated, certain)),
    ("a random subset of the same size", "`a_random_subset`", a_random_subset),
    ("another item's pairs", "`others_pairs`", lambda lab, s: uncertain(others_pairs(lab, s))),
    ("another item's pairs, adapt all", "`others_pairs`", others_pairs),
    versus("adapt all against adapt the uncertain", EVERYONE, UNCERTAIN),
    versus("a random subset against the uncertain", a_random_subset, UNCERTAIN),
    (UPPER_BOUND, "`the_item_itself`", the_item_itself),
    ("nearest draft: its tool, no training, all", "`nearest`", using(nearest, ALL)),
    flagged("tools in the file's order", "--no-shuffle"),
    flagged("the paper's settings", "--paper"),
]
DOSE = [(f"{n} % shifted", f"`dose`, {n} %", using(dose, n)) for n in (0, 30, 60, 100)]
DOSE.append(("0 % shifted, adapt all", f"`dose`, 0 %, {ALL}", using(dose, 0, ALL)))
BEYOND = [flagged(f"K = {n}, of {n} drafts", f"--k {n} --drafts {n}") for n in (1, 2, 4, 8)]
BEYOND += [flagged(f"closest of {n} drafts", f"--drafts {n}") for n in (2, 4, 8, 16)]
label = "round trip: drafts that the model answers alike"
BEYOND.append((label, "`round_trip`", using(round_trip, True)))
label = "the opposite: drafts that it answers otherwise"
BEYOND.append((label, "`round_trip`", using(round_trip, False)))
BEYOND.append(("the adapter is kept, not reset", "`stream`", using(stream, STREAM_LR)))
for share in (20, 40, 60):
    label = f"tau by budget: {share} % of other items' margins below it"
    BEYOND.append((label, "`within_budget`", using(within_budget, share / 100)))
WHOLE_CALLS = "margin of whole calls: the answer and 5 sampled"
UNCERTAINTY = [
    ("margin of the names (the paper)", ALL, EVERYONE),
    ("the same, mean-normalised", "`mean_normalised`", using(judged, 0, mean_normalised)),
    ("perplexity of the direct answer", "`by_answer`", using(judged, 0, by_answer, VOTE_T)),
    (WHOLE_CALLS, "`by_answer`", using(judged, 1, by_answer, VOTE_T)),
]

FIRST = ("", "--no-check --attempts 1", "--attempts 1", "--temperature 0.7", "--temperature 1.3")
TUNE_G = [f"--drafts 1 {more}".strip() for more in FIRST]
TUNE_G += [f"--drafts {n}" for n in (2, 4, 8, 16)]
TUNE_G += [f"--k {k} --drafts {n}" for k, n in ((2, 2), (2, 8), (4, 4), (4, 8), (4, 16), (8, 8))]
TUNE_G = [flagged(flags, flags) for flags in TUNE_G]
TUNE_B = []
for t in (0.5, 1.0, 1.5):
    TUNE_B.append((f"majority vote, temperature {t}", "`majority`", using(majority, t)))
for n in (100, 1000):
    for lr in (3e-4, 1e-3, 3e-3):
        label = f"SFT, {n} shifted items, lr {lr}"
        TUNE_B.append((label, "`fine_tuned`", using(fine_tuned, True, n, lr)))
for lr in ("2.8e-5", "8.5e-5", "0.00028"):
    TUNE_B.append((f"the adapter is kept, lr {lr}", "`stream`", using(stream, float(lr))))
ADAPT = [  # from here on every row trains on the same pairs
    ("suffix (the default)", "--adapt suffix", SUFFIX),
    ("full (the paper)", "--adapt full", FULL),
    ("full, the training rows' tools reshuffled", "`reshuffled`", reshuffled),
    versus("suffix against full", SUFFIX, FULL),
    versus("suffix against full, reshuffled", SUFFIX, reshuffled),
]
RATES = ("8.5e-5", "0.00014", "0.0002", "0.00028", "0.0004", "0.00057", "0.00085")
TUNE_T = [f"--lr {lr}" for lr in RATES]
TUNE_T += [f"--optimizer adamw --lr {lr}" for lr in (1e-4, 3e-4, 1e-3, 3e-3)]
TUNE_T += ["--epochs 3", "--epochs 10", "--lora-rank 2 --lr 0.00057"]
TUNE_T += ["--lora-rank 32 --lr 0.00014", "--adapt full"]
TUNE_T = [(flags, flags, using(on_pairs_of, "--drafts 1", flags)) for flags in TUNE_T]
TUNE_T += [(f"clipped, lr {lr}", "`clipped`", using(clipped, lr)) for lr in (0.1, 0.3, 1)]

GROUPS = {  # group -> (seeds, items, lines)
    "main": (5, 0, MAIN),
    "baselines": (2, 250, BASELINES),
    "controls": (2, 250, CONTROLS),
    "dose": (2, 250, DOSE),
    "beyond": (2, 250, BEYOND),
    "uncertainty": (2, 250, UNCERTAINTY),
    "tune-G": (2, 0, TUNE_G),
    "tune-B": (2, 0, TUNE_B),
    "adapt": (5, 0, ADAPT),
    "tune-T": (2, 0, TUNE_T),
}
KINDS, ONCE = ("name", "call"), ("labels", "tokens", "seconds")
TUNING = ("tune-G", "tune-T", "tune-B", "adapt")


def signs(wins, losses):
    """Two-sided exact sign test: how likely is a split as uneven as this by chance alone?"""
    n, k = wins + losses, min(wins, losses)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def auroc(values, right):
    """The probability that a right one has the higher value; ties count half. None where all are
    right, or none."""
    high = torch.tensor([v for v, r in zip(values, right, strict=True) if r])
    low = torch.tensor(sorted(v for v, r in zip(values, right, strict=True) if not r))
    if not len(high) or not len(low):
        return None
    below = torch.searchsorted(low, high) + torch.searchsorted(low, high, right=True)
    return below.double().mean().item() / 2 / len(low)  # ties are in the second only


def every_tau(rows):
    """Rows of --tau 2 -> for each tau that matters: n adapted, call accuracy, that of the others.
    "certain_only" is the accuracy if the others were adapted."""
    rows = sorted((row for row in rows if "scores" in row), key=margin)
    out, adapted = [], 0
    call = sum(row["scores"]["direct"]["call"] for row in rows)  # tau 0: nobody is adapted
    others = sum(row["scores"]["answer"]["call"] for row in rows)  # or everybody
    for i, tau in enumerate([*map(margin, rows), 2.0] if rows else []):
        if not out or tau > out[-1]["tau"]:
            accuracy = {"call": 100 * call / len(rows), "certain_only": 100 * others / len(rows)}
            out.append({"tau": tau, "adapted": adapted} | accuracy)
        if i < len(rows):
            change = rows[i]["scores"]["answer"]["call"] - rows[i]["scores"]["direct"]["call"]
            call, others = call + change, others - change
            adapted += rows[i]["decision"] == "adapted"
    return out


def pooled(runs):
    """Rows of several seeds -> the numbers of one line. Means over seeds, and an interval over
    items of these means."""
    summaries = [ttsi.summarise(rows) for rows in runs]

    def mean(part, key):
        return statistics.mean(summary[part][key] for summary in summaries)

    every = [row for rows in runs for row in rows]
    change = []
    for same in zip(*runs, strict=True):
        gains = [r["scores"]["answer"]["call"] - r["scores"]["direct"]["call"] for r in same]
        change.append(statistics.mean(gains))
    better, worse = sum(c > 0 for c in change), sum(c < 0 for c in change)
    differences = [s["difference"]["call"] for s in summaries]
    once = [rows[0]["once"] for rows in runs if "once" in rows[0]]
    out = {"seeds": len(runs), "n": len(change)}
    out["direct"] = {kind: mean("direct", kind) for kind in KINDS}
    out["always first"] = mean("always first", "name")
    out["ttsi"] = {kind: mean("TT-SI", kind) for kind in KINDS}
    out["difference"] = statistics.mean(differences)
    out["interval"] = [100 * q for q in ttsi.interval(change)]
    out["sd"] = statistics.stdev(differences) if len(runs) > 1 else None
    out |= {"items better": better, "items worse": worse, "p": signs(better, worse)}
    out["adapted"] = sum(row["decision"] == "adapted" for row in every) / len(runs)
    out |= {unit: mean(unit, "ratio") for unit in ("tokens", "seconds")}
    out["per query"] = {unit: mean(unit, "all") for unit in ("tokens", "seconds")}
    if once:
        out["once"] = {key: statistics.mean(o[key] for o in once) for key in once[0]}
    verdicts = [draft["verdict"] for row in every for draft in row["drafts"]]
    told = [row for row in every if row["margin"] is not None]
    margins, right = [row["margin"] for row in told], [row["scores"]["direct"] for row in told]
    out["drafts kept"] = [verdicts.count("kept"), len(verdicts)]
    out["auroc"] = {kind: auroc(margins, [r[kind] for r in right]) for kind in KINDS}
    return out


def ranked(runs):
    """Rows of --tau 2 -> what their "margin" is worth: AUROC, and accuracy if the least certain
    60 % are adapted."""
    chosen = []
    for rows in runs:
        margins = [margin(row) for row in rows]
        least = sorted(range(len(rows)), key=margins.__getitem__)[: int(0.6 * len(rows))]
        chosen.append(gate(rows, [i in least for i in range(len(rows))]))
    return pooled(chosen) | {"every tau": [every_tau(rows) for rows in runs]}


def row_of(label, r, *cells):
    flags = f"`{r['flags']}`" if r["flags"].startswith("-") else r["flags"]
    return "| " + " | ".join([label if label != r["flags"] else "", flags, *cells]) + " |"


def difference(r):
    """A difference and its interval, as text."""
    low, high = r["interval"]
    return f"{r['difference']:+.1f} [{low:+.1f}, {high:+.1f}]"


def markdown(lines):
    """The numbers of a group -> its table. Beside what was trained once for all samples stands
    what that took."""
    once = any("once" in r for r in lines.values())
    head = ["", "flags", "direct", "call", "difference [95 %]", "s.d.", "better / worse", "p"]
    head += ["adapted", "tokens"]
    if once:
        head += ["labels", "tokens once", "seconds once", "tokens a query", "seconds a query"]
    text = ["| " + " | ".join(head).lstrip() + " |", "|---" * len(head) + "|"]
    first = {f"{r['always first']:.1f} %" for r in lines.values() if "always first" in r}
    if len(first) == 1:
        text.append(
            f"| always the first tool listed: {first.pop()} of the names" + " |" * len(head)
        )
    for label, r in lines.items():
        cells = [f"{r['direct']['call']:.1f}", f"{r['ttsi']['call']:.1f}", difference(r)]
        cells.append("" if r["sd"] is None else f"{r['sd']:.1f}")
        cells.append(f"{r['items better']} / {r['items worse']}")
        cells.append("< 0.001" if r["p"] < 0.001 else f"{r['p']:.3f}")
        cells += [f"{r['adapted']:.0f}/{r['n']}", f"{r['tokens']:.1f}x"]
        if once:
            before, each = r.get("once", dict.fromkeys(ONCE, 0)), r["per query"]
            cells += [f"{before['labels']:,.0f}", f"{before['tokens'] / 1e6:.2f} M"]
            cells.append(f"{before['seconds']:.0f}")
            cells += [f"{each['tokens']:.0f}", f"{each['seconds']:.2f}"]
        text.append(row_of(label, r, *cells))
    return "\n".join(text) + "\n"


def uncertainties(lines):
    """The same for the uncertainties."""
    head = ["flags", "AUROC, right names", "AUROC, right calls"]
    head += ["call, the least certain 60 % adapted", "difference [95 %]"]
    text = [f"| | {' | '.join(head)} |", "|---|---|---|---|---|---|"]
    for label, r in lines.items():
        areas = [f"{v:.2f}" if v is not None else "" for v in r["auroc"].values()]
        text.append(row_of(label, r, *areas, f"{r['ttsi']['call']:.1f}", difference(r)))
    return "\n".join(text) + "\n"


def findings(found):
    """Results of all groups -> the shape of the paper's findings (SealTool, 1.5 B) beside ours."""
    main, base, controls = (found[group] for group in ("main", "baselines", "controls"))
    text = ["| finding | paper | here | what | shape |", "|---|---|---|---|---|"]

    def add(finding, paper, r, what="the difference"):
        low, high = r["interval"]
        shape = "as there" if low > 0 else "**not as there**" if high < 0 else "undecided"
        text.append(f"| {finding} | {paper} | {difference(r)} | {what} | {shape} |")

    r, what = main["first accepted draft"], "one accepted draft, over direct answers"
    add("TT-SI gains", "+6.1 (mean of four benchmarks +5.5)", r, what)
    r = controls["adapt all against adapt the uncertain"]
    add("adapting all gains more than the uncertain alone", "+1.0", r)
    r = controls["adapt only the certain"]
    add("adapting the certain alone gains too", "+3.7", r, "over direct answers")
    r = main["TT-D against TT-SI, first accepted drafts"]
    add("a stronger teacher gains more (TT-D)", "+0.9 (mean of four)", r)
    r = base["TT-SI against the vote"]
    add("TT-SI gains more than a majority vote", "+1.6 (mean of four)", r)
    r, what = base["TT-SI against SFT without the shift"], "items without the shift: the embedded"
    what += " model answers these already, so that they teach nothing"
    add("TT-SI gains more than SFT on 13,000 items", "+2.2", r, what)
    r = base["TT-SI against SFT on 100 shifted items"]
    add("", "", r, "against SFT on **100** items with the shift")
    return "\n".join(text) + "\n"


# ------------------------------------------------------------------------------------ figures
COLOURS = ("#1f5fa8", "#c0392b", "#2e8b57", "#8e5ea2")
WHITE = 'fill="white" font-size="10"'
# Rows of `main` that stand in other groups, too.
AGAIN = ("TT-SI, closest of 4 free drafts", "closest of 4 drafts", "K = 1, of 1 drafts")


def svg(width, height, body):
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
    font = 'font-family="sans-serif" font-size="12">'
    ground = f'<rect width="{width}" height="{height}" fill="white"/>'
    return "\n".join([f"{head} {font}", ground, *body, "</svg>"]) + "\n"


def text_at(x, y, words, anchor="start", more=""):
    words = words.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{words}</text>'


class Axes:
    """A frame with ticks. x, y: {position: label}, in order; what lies between is interpolated."""

    def __init__(self, left, top, width, height, x, y, x_name, y_name):
        self.box, self.body = (left, top, width, height), []
        self.span = [(min(t), max(t)) for t in (x, y)]
        (x0, x1), (y0, y1) = self.span
        for v, label in x.items():
            px, _ = self.at(v, 0)
            self.body.append(self.line([(v, y0), (v, y1)], "#ddd", 1))
            self.body.append(text_at(px, top + height + 16, label, "middle"))
        for v, label in y.items():
            _, py = self.at(0, v)
            self.body.append(self.line([(x0, v), (x1, v)], "#ddd", 1))
            self.body.append(text_at(left - 6, py + 4, label, "end"))
        self.body.append(text_at(left + width / 2, top + height + 34, x_name, "middle"))
        self.body.append(text_at(left, top - 8, y_name))

    def at(self, x, y):
        (left, top, width, height), ((x0, x1), (y0, y1)) = self.box, self.span
        return left + width * (x - x0) / (x1 - x0), top + height * (y1 - y) / (y1 - y0)

    def line(self, points, colour, width=2):
        path = " ".join("{:.1f},{:.1f}".format(*self.at(*p)) for p in points)
        return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>'

    def dot(self, x, y, low, high, colour, label=""):
        px, py = self.at(x, y)
        self.body.append(self.line([(x, low), (x, high)], colour, 1))
        at = f'cx="{px:.1f}" cy="{py:.1f}" r="{8 if label else 4}"'
        self.body.append(f'<circle {at} fill="{colour}"/>')
        if label:
            self.body.append(text_at(px, py + 4, label, "middle", WHITE))


def cost_figure(found):
    """Gain over cost: points over direct answers on the same items, tokens as a multiple."""
    points = []
    for group, colour in zip(("main", "baselines", "controls", "beyond"), COLOURS, strict=True):
        for label, r in found[group].items():
            if "against" not in label and (group == "main" or label not in AGAIN):
                points.append((colour, label, r))
    low = 10 * math.floor(min(r["interval"][0] for *_, r in points) / 10)
    high = 10 * math.ceil(max(r["interval"][1] for *_, r in points) / 10)
    doublings = math.ceil(math.log2(max(r["tokens"] for *_, r in points)))
    x = {v: f"{2**v}x" for v in range(doublings + 1)}
    y = {v: f"{v:+d}" for v in range(low, high + 1, 10)}
    x_name = "tokens per sample, as a multiple of a direct answer's"
    x_name += " (training before the first query not counted)"
    y_name = "call accuracy, points over direct answers, 95 % interval over items"
    a = Axes(60, 30, 560, 18 * len(points), x, y, x_name, y_name)
    for i, (colour, label, r) in enumerate(points, 1):
        cost = math.log2(max(1, r["tokens"]))
        a.dot(cost, r["difference"], *r["interval"], colour, str(i))
        a.body.append(f'<circle cx="650" cy="{26 + 18 * i}" r="8" fill="{colour}"/>')
        a.body.append(text_at(650, 30 + 18 * i, str(i), "middle", WHITE))
        a.body.append(text_at(664, 30 + 18 * i, label))
    return svg(1060, 18 * len(points) + 80, a.body)


def tau_figure(found):
    """Accuracy and number adapted over tau, on the scale of -log10(1 - tau)."""
    runs = found["uncertainty"]["margin of the names (the paper)"]["every tau"]

    def curve(key):
        points = []
        for tau in [1 - 10 ** (-i / 20) for i in range(81)]:
            at = [next(e[key] for e in run if e["tau"] >= tau) for run in runs]
            points.append((-math.log10(1 - tau), statistics.mean(at)))
        return points

    curves = {"call": "adapted below tau (the method)"}
    curves["certain_only"] = "adapted from tau on (the control)"
    accuracy = [y for key in curves for _, y in curve(key)]
    low, high = 5 * math.floor(min(accuracy) / 5), 5 * math.ceil(max(accuracy) / 5)
    x = {0: "0", math.log10(2): "0.5", 1: "0.9", math.log10(20): "0.95"}
    x |= {2: "0.99", 3: "0.999", 4: "0.9999"}
    y = {v: str(v) for v in range(low, high + 1, 5)}
    top = Axes(60, 30, 500, 200, x, y, "", "call accuracy, %")
    y = {v: str(v) for v in range(0, runs[0][-1]["adapted"] + 50, 50)}
    below = Axes(60, 290, 500, 120, x, y, "tau", "samples adapted")
    for i, (key, label) in enumerate(curves.items()):
        top.body.append(top.line(curve(key), COLOURS[i]))
        top.body.append(text_at(580, 60 + 20 * i, label, "start", f'fill="{COLOURS[i]}"'))
    below.body.append(below.line(curve("adapted"), COLOURS[0]))
    return svg(800, 470, top.body + below.body)


def dose_figure(found):
    """Accuracy over the share of items that are shifted, direct and with TT-SI."""
    rows = {int(k.split()[0]): r for k, r in found["dose"].items() if k.endswith("shifted")}
    low = 10 * math.floor(min(r["direct"]["call"] for r in rows.values()) / 10)
    x, y = {share: f"{share} %" for share in rows}, {v: str(v) for v in range(low, 101, 10)}
    y_name = "call accuracy, %; bars: 95 % interval of the difference"
    a = Axes(60, 30, 400, 220, x, y, "share of shifted items", y_name)
    curves = (("direct", "direct", COLOURS[1]), ("ttsi", "TT-SI", COLOURS[0]))
    for i, (side, name, colour) in enumerate(curves):
        points = [(share, r[side]["call"]) for share, r in rows.items()]
        a.body.append(a.line(points, colour))
        a.body.append(text_at(480, 60 + 20 * i, name, "start", f'fill="{colour}"'))
        for share, r in rows.items():
            call, direct = r[side]["call"], r["direct"]["call"]
            bar = [direct + v for v in r["interval"]] if side == "ttsi" else [call, call]
            a.dot(share, call, *bar, colour)
    return svg(560, 300, a.body)


FIGURES = {"cost": cost_figure, "tau": tau_figure, "dose": dose_figure}
SHOW = {"uncertainty": (ranked, uncertainties)}


# ------------------------------------------------------------------------------------ running
def publish(stem, group, text):
    """Into each README, between <!-- table STEM GROUP --> and <!-- end -->."""
    mark = re.escape(f"<!-- table {stem} {group} -->\n")
    for readme in (HERE.parent / "README.md", HERE / "README.md"):
        old = readme.read_text(encoding="utf-8")
        new = re.sub(f"({mark}).*?(<!-- end -->)", lambda m: m[1] + text + m[2], old, flags=re.S)
        readme.write_text(new, encoding="utf-8")


def listed(group, found):
    """Published numbers of a group -> those of the lines that it still has, flagged as today."""
    lines = GROUPS[group][2]
    return {label: found[label] | {"flags": f} for label, f, _ in lines if label in found}


def results(stem, folder=HERE / "results"):
    """-> {group: its numbers}, of all that were published and are listed."""
    found = {}
    for file in sorted(folder.glob(f"{stem}-*.json")):
        group = file.stem[len(stem) + 1 :]
        found[group] = listed(group, json.loads(file.read_text(encoding="utf-8")))
    return found


def figures(stem, found):
    """Figures, and the table of findings, once all is there -> {file name or group: text}"""
    for group, (_, _, lines) in GROUPS.items():
        if group not in TUNING and any(label not in found.get(group, {}) for label, *_ in lines):
            return {}
    drawn = {f"{stem}-{name}.svg": draw(found) for name, draw in FIGURES.items()}
    return drawn | {"findings": findings(found)}


def parse_arguments(argv):
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    texts = {"--data": "default: data/test.jsonl; with --quick data/dev.jsonl"}
    texts["--teacher"] = "who writes the pairs of TT-D; the embedded model has data/teacher"
    texts["--flags"] = "of ttsi.py, for every run: '--lr 1e-4 --optimizer adamw --dtype bfloat16'"
    texts["--only"] = "rows whose label or flags hold this text"
    p.add_argument("groups", nargs="*", help=f"of {', '.join(GROUPS)}; default: no tuning")
    p.add_argument("--model", default=ttsi.Config.model)
    for name, text in texts.items():
        p.add_argument(name, default="", help=text)
    p.add_argument("--seeds", type=int, default=0, help="0: 5 for the main table, else 2")
    p.add_argument("--limit", type=int, default=0, help="items; 0: all for main, else 250")
    p.add_argument("--quick", action="store_true", help="10 items, one seed; publishes nothing")
    args = p.parse_args(argv)
    args.partial = bool(args.limit or args.seeds or args.quick or args.flags)  # not published
    args.data = args.data or str(HERE / ("dev.jsonl" if args.quick else "test.jsonl"))
    if args.quick:
        args.limit, args.seeds = args.limit or 10, args.seeds or 1
    if not args.teacher and args.model == ttsi.Config.model:
        args.teacher = str(HERE / "teacher")
    ttsi.need(Path(args.data).is_file(), f"--data {args.data}: no such file")
    return args


def table_of(lab, group, args, file):
    """-> the table of a group's lines, printed; their numbers are written to a file."""
    seeds, items, lines = GROUPS[group]
    measure, show = SHOW.get(group, (pooled, markdown))
    lab.limit = args.limit or items
    found = json.loads(file.read_text(encoding="utf-8")) if args.only and file.exists() else {}
    for label, flags, rows in lines:
        if args.only in label + flags:
            try:
                runs = [rows(lab, seed) for seed in range(args.seeds or seeds)]
            except Skip as e:
                print(f"{label}: left out: {e}", flush=True)
                continue
            found[label] = measure(runs) | {"flags": flags}
            print(f"{label}: {difference(found[label])}", flush=True)
    found = listed(group, found)
    print(f"\n{show(found)}\nthe numbers: {os.path.relpath(file)}", flush=True)
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return show(found)


def main(argv=None):
    args = parse_arguments(argv)
    lab, stem = Lab(args), Path(args.data).stem
    labelled = all("call" in sample for sample in lab.samples(lab.config(0)))
    ttsi.need(labelled, f"{args.data}: not every sample has a label")
    public = lab.embedded and not args.partial
    for group in args.groups or [g for g in GROUPS if g not in TUNING]:
        ttsi.need(group in GROUPS, f"no group {group}; there are {', '.join(GROUPS)}")
        if any(args.only in label + flags for label, flags, _ in GROUPS[group][2]):
            file = (HERE / "results" if public else lab.runs) / f"{stem}-{group}.json"
            text = table_of(lab, group, args, file)
            if public:
                publish(stem, group, text)
    if public:
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
