"""The evidence: TT-SI beside its variants, controls and rivals, composed of what ttsi.py exports.

    python data/experiments.py own                       # the embedded model on data/test.jsonl
    python data/experiments.py real --model FOLDER --data FILE ... --pool FILE ...
    python data/experiments.py choice --model FOLDER --data DEVFILE --limit 60
    python data/experiments.py --kept                    # tables and figures of kept rows alone
    python data/experiments.py real --quick              # does all of it run? Keeps nothing

Rows go to data/results/rows/ as they come; a run that was cut off goes on. Processes with RANK and
WORLD_SIZE share those of a method, and a last one without packs them. Of data outside this folder
rows hold no texts: these go to runs/texts/, where methods that share TT-SI's pairs find them.
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
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import figures  # noqa: E402

import ttsi  # noqa: E402

RESULTS = HERE / "results"
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LABELS, SFT_BATCH, SFT_EPOCHS, SFT_RATE = 200, 2, 3, 0.1
TEACHER = str(HERE / "teacher")  # who writes the pairs of TT-D
OF_ALL = ("read", "direct", "score")  # stages that no gate can spare
PLACES = {"test": "own world", "canonical_294": "Seal-Tools", "canonical_real": "ToolAlpaca"}
PLACES |= {"canonical_318": "NexusRaven", "canonical_l1": "API-Bank", "canonical_l2": "API-Bank"}


# ------------------------------------------------------------------------------------ methods
# Each is a function (model, tok, sample, cfg) -> Result, and a sample holds no label. What it needs
# besides comes last. Lessons are labelled samples to learn from: TT-SI's pairs, for example.
def adapted(model, tok, sample, cfg):
    """TT-SI as if any margin were small."""
    return ttsi.tt_si(model, tok, sample, dataclasses.replace(cfg, tau=2.0))


def trained(model, tok, sample, cfg, lessons, adapter=ttsi.temporary_lora):
    """T on lessons, and an answer; the LoRA acts behind what all of them begin with."""
    x = ttsi.prepare(tok, sample, cfg)
    if not lessons:
        return answered(model, x, x.ids, cfg)
    result = ttsi.Result(x.id, cost={}, decision="adapted")
    spans = [lesson_span(tok, lesson, cfg) for lesson in lessons]
    head = x.ids[: x.head] if cfg.adapt == "suffix" else []
    frozen = ttsi.Prefix(model, os.path.commonprefix([head, *(ids for ids, _ in spans)]))
    with adapter(model, cfg, ttsi.draw(cfg.seed, x.id, "adapter")) as parameters:
        with ttsi.measured(model, result.cost, "train"):
            result.loss = ttsi.train(spans, frozen, parameters, cfg)
        with ttsi.measured(model, result.cost, "answer"):
            result.answer = ttsi.write(tok, x.ids, frozen, cfg)[0]
    return result


def lesson_span(tok, lesson, cfg):
    """-> (ids, begin): a lesson's prompt, about its own tools, and from begin on its call."""
    tools = ttsi.prepare(tok, lesson, cfg).tools
    return ttsi.encode(tok, tools, lesson["messages"], lesson["call"])


def alike(a, b):
    """The share of common words among all words of two texts."""
    a, b = (set(re.findall(r"\w+", text.casefold())) for text in (a, b))
    return len(a & b) / max(len(a | b), 1)


@contextmanager
def bias_vector(model, cfg, rng):
    """In the LoRA's place a vector, added to what the output layer sees, as GTTA does (arXiv
    2511.04847) -> [it], float32. It goes with the block."""
    head = model.get_output_embeddings()
    bias = torch.zeros(head.weight.shape[1], device=model.device, requires_grad=True)
    with head.register_forward_pre_hook(lambda _, h: ((h[0].float() + bias).to(h[0].dtype),)):
        yield [bias]


def nearest_tool(model, tok, sample, cfg, lessons):
    """No training: the base fills in a call of the tool whose lesson is most like the request."""
    x = ttsi.prepare(tok, sample, cfg)
    if not lessons:
        return answered(model, x, x.ids, cfg)
    nearest = max(lessons, key=lambda it: alike(it["messages"][-1]["content"], x.request))
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


def shown(model, tok, sample, cfg, lessons):
    """TT-ICL: no training; the lessons stand before the request, as turns of one dialogue."""
    x = ttsi.prepare(tok, sample, cfg)
    turns = []
    for lesson in lessons:
        call = {"id": ttsi.ID, "type": "function", "function": lesson["call"]}
        turns.append(lesson["messages"][-1])
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
    """-> (Result without an answer, the Prefix of the prompt, as many answers as tokens allow)"""
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
    rng = ttsi.draw(cfg.seed, "order")
    epochs = [torch.randperm(len(pool), generator=rng) for _ in range(SFT_EPOCHS)]
    batches = torch.cat(epochs).split(SFT_BATCH)
    with ttsi.temporary_lora(model, cfg, ttsi.draw(cfg.seed, "sft")) as lora:
        for step, batch in enumerate(tqdm(batches, desc=f"SFT on {len(pool)} labels")):
            lr = SFT_RATE * (1 + math.cos(math.pi * step / len(batches))) / 2
            now = dataclasses.replace(cfg, lr=lr, epochs=1)
            spans = [lesson_span(tok, pool[i], cfg) for i in batch]
            ttsi.train(spans, ttsi.Prefix(model, []), lora, now)
        return [parameter.detach().clone() for parameter in lora]


# --------------------------------------------------------------------------------------- rows
class Lab:
    """One model on one file of labelled samples by one seed, and the rows of all methods."""

    def __init__(self, args, model, data, seed):
        self.args, self.model, self.data, self.seed = args, model, Path(data), seed
        self.known = {}

    @functools.cached_property
    def samples(self):
        """{id: sample} of the whole file."""
        samples = ttsi.read_jsonl(self.data, ttsi.to_sample)
        for i, sample in samples.items():
            ttsi.need("call" in sample, f"{self.data}: {i} has no label (call); leave it out")
        return samples

    @property
    def base(self):
        return loaded(self.model, self.args.flags)

    def config(self, name):
        flags = f"{self.args.flags} {METHODS[name].flags}"
        return dataclasses.replace(ttsi.parse_arguments(flags.split()), seed=self.seed)

    def rows(self, name):
        """-> {id: row} of a method, in the order of ids; without --kept all are made."""
        if name not in self.known:
            chosen = self.chosen(name)
            if not self.args.kept:
                self.make(name, chosen)
            _, rows = read_rows(self.path(name))
            self.known[name] = {i: rows[i] for i in chosen if i in rows}
        return self.known[name]

    def run(self, names):
        """-> [(direct row, row), ...]: the rest was answered directly. Empty: rows are missing."""
        direct = {i: direct_row(row) for i, row in self.rows("default").items()}
        found = dict(direct)
        for name in names:
            if not self.rows(name).keys() >= {*self.chosen(name)}:
                return []
            found |= self.rows(name)
        return [(direct[i], found[i] | {"seed": self.seed}) for i in direct]

    @functools.cached_property
    def texts(self):
        """TT-SI's rows with their texts."""
        rows, path = self.rows("default"), self.path("default", whole=True)
        _, whole = read_rows(path)
        ttsi.need(rows.keys() <= whole.keys(), f"{path} lacks texts: give other --rows")
        return {i: whole[i] for i in rows}

    def chosen(self, name):
        """-> the ids that a method is run on, in their order."""
        if name == "default":
            ids = read_rows(self.path(name))[1] if self.args.kept else self.samples
            return sorted(seeded(ids)[: self.args.limit or None])
        rows, on = self.rows("default"), METHODS[name].on
        answered = [i for i in rows if rows[i]["margin"] is not None]
        if on == "all" or self.args.quick:
            return answered
        cfg = self.config(name)
        sure = {i: ttsi.certainty(rows[i]["margin"], rows[i]["flaw"], cfg) for i in answered}
        return [i for i in answered if (sure[i] < cfg.tau) == (on == "uncertain")]

    def path(self, name, whole=False):
        """-> the file of a method's rows; whole ones, with a benchmark's texts, lie elsewhere."""
        is_ours = HERE in self.data.resolve().parents
        folder = self.args.texts if whole and not is_ours else self.args.rows
        key = hashlib.sha256(f"{name} {METHODS[name].flags}".encode()).hexdigest()[:8]
        file = f"{self.data.stem}-{name}-{self.seed}-{key}.jsonl"
        return Path(folder) / Path(self.model).name / file

    def head(self, name):
        """-> the first line of a file: method, settings, data and weights of its rows."""
        more = {"sft": self.args.pool, "teacher": weights(TEACHER)}
        files = [self.data, *weights(self.model), *more.get(name, [])]
        flags = vars(self.config(name)) | {"model": "", "device": ""}
        return {"rows of": name, "flags": flags, "files": [*map(digest, files)]}

    def make(self, name, chosen):
        """Makes the rows that are missing, each kept as it comes."""
        path, whole = self.path(name), self.path(name, whole=True)
        head = self.head(name)
        kept, rows = read_rows(path)
        ttsi.need(kept in (None, head), f"{path}*: other settings, data, model; give --rows DIR")
        mine = [i for i in seeded(chosen)[RANK::WORLD] if i not in rows]
        if mine:
            for file in {path, whole}:
                begin(file, head)
        for i in tqdm(mine, desc=path.stem, disable=not mine):
            row = self.row(name, i)
            append(whole, row)
            if whole != path:
                append(path, slim(row))
        left = len({*chosen} - read_rows(path)[1].keys())
        ttsi.need(not left, f"{path}: {left} rows are left to other processes; then run this again")
        if path.exists() and WORLD == 1:
            pack(path)

    def row(self, name, i):
        """-> what a method does with a sample. Only then is the sample's label looked at."""
        method, sample = METHODS[name], self.samples[i]
        unlabelled = {key: value for key, value in sample.items() if key != "call"}
        more = [method.needs(self, i)] if method.needs else []
        try:
            result = method.answer(*self.base, unlabelled, self.config(name), *more)
        except ttsi.InputError as e:  # beyond the context, or refused by the chat template
            result = ttsi.Result(i, cost={}, decision=f"not answered: {e}")
        row = dataclasses.asdict(result)
        # What was done once, before the gate and to write pairs, all have paid for.
        if name != "default" and "read" not in row["cost"]:
            before = self.rows("default")[i]["cost"]
            paid = OF_ALL if method.on == "uncertain" else ("read",)
            pairs = ("generate",) if method.needs in (Lab.lessons, Lab.others) else ()
            row["cost"] = {stage: before[stage] for stage in (*paid, *pairs)} | row["cost"]
        row |= scored(result.answer, sample["call"])
        row["before"] = scored(result.direct, sample["call"])
        names = sorted(tool["name"] for tool in sample["tools"])
        row["tools"] = hashlib.sha256(json.dumps(names).encode()).hexdigest()[:8]
        row["offered"] = len(names)
        # Numbers are rounded; one that is none is null.
        how = {"parse_float": lambda x: round(float(x), 5), "parse_constant": lambda x: None}
        return json.loads(json.dumps(row), **how)

    # What methods need besides, of a sample.
    def default(self, i):
        return self.texts[i]

    def lessons(self, i):
        """-> the pairs that TT-SI trained on."""
        sample, lessons = self.samples[i], []
        system = [message for message in sample["messages"] if message["role"] == "system"]
        for pair in self.texts[i]["pairs"]:
            turn = {"role": "user", "content": pair["request"]}
            lessons.append(sample | {"messages": [*system, turn], "call": pair["call"]})
        return lessons

    def others(self, i):
        """-> those of the next sample that has some."""
        having = [j for j in self.texts if j != i and self.texts[j]["pairs"]]
        ttsi.need(having, f"{i}: no other sample has pairs; give a higher --limit")
        return self.lessons(min(having, key=lambda j: (j < i, j)))  # behind the last the first

    def itself(self, i):
        return [self.samples[i]]

    def tokens(self, i):
        """-> how many tokens TT-SI has for G, for T and for its answer."""
        cost = self.rows("default")[i]["cost"]
        return sum(tokens for stage, (_, tokens) in cost.items() if stage not in OF_ALL)

    def teacher(self, i):
        return loaded(TEACHER, self.args.flags)

    @functools.cached_property
    def lora(self):
        """That of SFT, trained once on --pool, without the dialogues of this file."""
        ours = [sample["messages"] for sample in self.samples.values()]
        files = [ttsi.read_jsonl(path, ttsi.to_sample).values() for path in self.args.pool]
        pool = [s for file in files for s in file if "call" in s and s["messages"] not in ours]
        ttsi.need(pool, "give --pool FILE ..., of labelled samples")
        return fine_tune(*self.base, pool[: 8 if self.args.quick else LABELS], self.config("sft"))


@functools.cache
def loaded(name, flags):
    return ttsi.load(name, ttsi.parse_arguments(flags.split()))


def seeded(ids):
    """Ids by a hash, since the first may be the easy ones: any number of them is a fair part."""
    return sorted(ids, key=lambda i: hashlib.sha256(i.encode()).hexdigest())


def scored(text, gold):
    return {"grade": ttsi.grade(text, gold), "f1": figures.f1_counts(ttsi.parse(text), gold)}


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
    packed = path.with_suffix(".jsonl.gz")
    text = gzip.decompress(packed.read_bytes()) if packed.exists() else b""
    text += path.read_bytes() if path.exists() else b""
    *lines, _ = text.split(b"\n")
    head, *rows = [*map(json.loads, lines)] or [None]
    return head, {row["id"]: row for row in rows if "id" in row}


def begin(path, head):
    """Makes a file ready for rows: a torn last line is cut off, and a head stands first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    *lines, torn = path.read_bytes().split(b"\n")
    if torn:
        os.truncate(path, sum(len(line) + 1 for line in lines))
    if not lines:
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
    answer: object  # the function
    flags: str = ""  # of ttsi.py
    on: str = "uncertain"  # "certain", "all": what it is run on; the others are answered directly
    needs: object = None  # a function (lab, id) -> what it takes besides


biased = functools.partial(trained, adapter=bias_vector)
METHODS = {
    "default": Method("TT-SI", ttsi.tt_si, on="all"),
    "rest": Method("adapt the certain alone", adapted, on="certain"),
    "paper": Method("the paper's setting", ttsi.tt_si, "--paper"),
    "anothers": Method("another item's pairs", trained, needs=Lab.others),
    "struck": Method("unsaid options struck out by rule", struck, on="all", needs=Lab.default),
    "nearest": Method("nearest pair's tool, no training", nearest_tool, needs=Lab.lessons),
    "icl": Method("pairs in the prompt (TT-ICL)", shown, needs=Lab.lessons),
    "bias": Method("a bias vector for the LoRA", biased, needs=Lab.lessons),
    "vote": Method("vote, at TT-SI's tokens", vote, "--temperature 1", needs=Lab.tokens),
    "best": Method("best of N, at TT-SI's tokens", best_of, "--temperature 1", needs=Lab.tokens),
    "teacher": Method("a teacher's pairs (TT-D)", ttsi.tt_si, needs=Lab.teacher),
    "sft": Method(
        f"SFT on {LABELS} labels", fine_tuned, "--adapt full", "all", lambda lab, _: lab.lora
    ),
    "itself": Method("the item itself, a bound", trained, on="all", needs=Lab.itself),
}
ALL, BOTH = "adapt all (tau 2)", "default rest"  # a line of two methods' rows

# Cells, what `choice` compares: FORK HERE. Those of T take the pairs of the default.
OF_T = ["--lr 0.4", "--lr 0.7", "--epochs 3", "--epochs 10", "--adapt full"]
OF_G = ["--given name", "--given nothing", "--temperature 1", "--drafts 8", "--paper --lr 1e-3"]
CELLS = {flags.replace("--", "").replace(" ", "-"): flags for flags in OF_T + OF_G}
for name, flags in CELLS.items():
    METHODS[name] = Method(f"`{flags}`", ttsi.tt_si, flags)
    if flags in OF_T:
        METHODS[name] = Method(f"`{flags}`", trained, flags, needs=Lab.lessons)
CONTROLS = ["struck", "anothers", "nearest", "icl", "vote", "best", "bias", "sft", "itself"]
GROUPS = {  # group -> {table: its lines}
    "own": {"own": ["default", BOTH, "rest", "anothers", "nearest", "icl", "teacher"]},
    "real": {"real": ["default", "paper", BOTH, "rest"], "controls": CONTROLS},
    "choice": {"choice": ["default", "struck", "itself", *CELLS]},
}


# ------------------------------------------------------------------------------------- tables
def places_of(labs, names):
    """-> {place: run of all seeds}; a place may have several files, and counts if all have rows."""
    parts, places = {}, {}
    for lab in labs:
        place = PLACES.get(lab.data.stem, lab.data.stem)
        parts.setdefault((place, lab.seed), []).append(lab.run(names))
    for (place, _), runs in parts.items():
        if all(runs):
            places[place] = places.get(place, []) + sum(runs, [])
    return places


def results_of(group, labs, methods):
    """Makes what is missing of a group -> {table: {label: {place: run}}}"""
    found = {table: {} for table in GROUPS[group]}
    for table, lines in GROUPS[group].items():
        for line in lines:
            names = line.split()
            label = METHODS[line].label if line in METHODS else ALL
            if {*names} <= {*methods} or not methods:
                found[table][label] = places_of(labs, names)
    if group == "real":
        found["real"] |= figures.parts(found["real"].get("TT-SI", {}))
    return found


def publish(title, text, lines, folder):
    """Writes a table into the page of results, between its marker and the next end; with figures
    of all lines of its group where it is their first."""
    name, page = title.replace(" ", "-"), folder / "README.md"
    if lines.get(ALL):
        figures.tau_curves(lines[ALL], folder / f"{name}-tau.svg")
        text = f"![the gain over tau]({name}-tau.svg)\n\n{text}"
    if lines:
        figures.forest(lines, folder / f"{name}.svg")
        text = f"![differences with their intervals]({name}.svg)\n\n{text}"
    mark = re.escape(f"<!-- {title} -->\n")
    old = page.read_text(encoding="utf-8")
    new = re.sub(f"({mark}).*?(<!-- end -->)", lambda m: m[1] + text + m[2], old, flags=re.S)
    page.write_text(new, encoding="utf-8")


# ------------------------------------------------------------------------------------ running
def labs_of(group, args):
    """-> labs, of the files that were given, or with --kept of those that have rows."""
    if not args.kept:
        data = args.data or ([HERE / "test.jsonl"] if group == "own" else [])
        ttsi.need(data, f"{group}: give --model FOLDER --data FILE ..., labelled samples")
        return [Lab(args, args.model, path, seed) for path in data for seed in args.seeds]
    labs = {}
    for path in sorted(Path(args.rows).glob("*/*-default-*")):
        model, (stem, _, seed, _) = path.parent.name, path.name.rsplit("-", 3)
        kind = "choice" if "dev" in stem else "real"  # its name tells what is chosen on
        if model == Path(ttsi.Config.model).name:
            kind = "own"
        if kind == group and int(seed) in args.seeds:
            labs[model, stem, seed] = Lab(args, model, stem, int(seed))
    return [*labs.values()]


def parse_arguments(argv):
    how = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    p = argparse.ArgumentParser(**how)
    p.add_argument("group", nargs="?", help=f"one of {', '.join(GROUPS)}; none: all")
    p.add_argument("methods", nargs="*", help=f"none: all; {', '.join(METHODS)}")
    p.add_argument("--model", default=ttsi.Config.model, help="its folder; none: the embedded one")
    p.add_argument("--data", nargs="*", default=[], help="files of labelled samples")
    p.add_argument("--pool", nargs="*", default=[], help="other labelled files, for SFT")
    p.add_argument("--flags", default="", help='of ttsi.py, as in --flags="--dtype bfloat16"')
    p.add_argument("--seeds", nargs="*", type=int, default=[], help="none: 0; with --kept: all")
    p.add_argument("--limit", type=int, default=0, help="so many items of a file, by a hash")
    p.add_argument("--kept", action="store_true", help="of all kept rows; alone: writes the page")
    p.add_argument("--quick", action="store_true", help="two samples of each; keeps nothing")
    p.add_argument("--rows", default=RESULTS / "rows", help="where rows are kept")
    p.add_argument("--texts", default=HERE.parent / "runs/texts", help="where their texts are kept")
    args = p.parse_args(argv)
    if args.quick:
        args.flags += " --tau 2"  # or nothing might be adapted
        args.rows, args.texts, args.limit = tempfile.mkdtemp(), tempfile.mkdtemp(), 2
        args.data = args.data or [HERE / "dev.jsonl"]
        args.pool = args.pool or [HERE / "demo.jsonl"]
    args.seeds = args.seeds or [*range(10 if args.kept else 1)]
    ttsi.need(args.group in (None, *GROUPS), f"no group {args.group}: {', '.join(GROUPS)}")
    ttsi.need(METHODS.keys() >= {*args.methods}, f"no such method; there are {', '.join(METHODS)}")
    ttsi.need(args.group or args.kept or args.quick, "give a group, --kept or --quick")
    needs_pool = args.group == "real" and not (args.methods or args.kept)
    ttsi.need(args.pool or not needs_pool, "real: give --pool FILE ..., or name the methods")
    return args


def main(argv, results=RESULTS):
    """The command line. With --kept alone tables go into results/README.md, and figures beside."""
    args = parse_arguments(argv)
    for group in [args.group] if args.group else GROUPS:
        labs = labs_of(group, args)
        for model in dict.fromkeys(lab.model for lab in labs):
            tables = results_of(group, [lab for lab in labs if lab.model == model], args.methods)
            every = {label: places for lines in tables.values() for label, places in lines.items()}
            for table, lines in tables.items():
                title = table if group == "own" else f"{table} {Path(model).name}"
                text = figures.table(lines, every.get("TT-SI", {}), group == "real")
                print(f"\n{title}\n\n{text}", flush=True)
                if argv == ["--kept"]:
                    publish(title, text, every if table in ("own", "real") else {}, results)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except (ttsi.InputError, OSError) as e:
        print("experiments:", e, file=sys.stderr)
        sys.exit(2)
