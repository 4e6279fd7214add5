"""The embedded world: its tools, its data, its tokenizer and its model, all from one seed.

    python data/world.py                # everything, forty minutes on two CPU cores; resumable
    python data/world.py --data-only    # the jsonl files alone, in seconds
    python data/world.py --teacher      # data/model, trained on: the teacher of TT-D

**World.** 24 verbs x 30 objects = 720 tools such as `cancel_flight`, split by name. A request says
the verb, the object and 1 to 3 values; four or five confusable tools are on offer; the answer is a
call. Parameters are drawn afresh for every example, so that a schema must be read and cannot be
remembered.

**Two skills.** The model learns to ANSWER (request -> call) and to WRITE (a seed request -> another
call, and then its request), in the very prompts of ttsi.py.

**The shift.** Every verb and object has familiar wordings, FAMILIAR, and rare ones, RARE ("axe the
flight"). In training, an answered request uses familiar wordings only; rare ones occur only where
the model writes. So it knows that a `cancel_...` call may be worded "axe", but never learned to
answer "axe": the knowledge is there, in the other direction. The test requests are rare ones, on
tools never seen.

**Warm-up.** Besides the two skills, rows of random tokens to be repeated and random dictionaries to
be looked up: with them the model learns to copy values into a call, and to find a tool's parameters
by its name.

**Why that makes self-improvement possible.** Asked for a request like the seed, the model writes a
call first and words it second. Where the call has the seed's verb, it likes to take the seed's own
phrase over (REUSE). So among its drafts are pairs that show, in the direction that is missing, what
the seed's unknown words mean. The tool of a draft is drawn independently of the seed's tool: a
draft reveals no answer, and what the model writes is all it knows.
"""

import argparse
import gzip
import hashlib
import json
import random
import re
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import ttsi  # noqa: E402  the prompts that the model learns are the method's, not copies

# -------------------------------------------------------------------------------------------- knobs

FILES = {"dev": 200, "demo": 100, "test": 500}  # items per file, every one of them shifted
TRAIN_ITEMS = 13_000  # as many labelled items as the paper's supervised baseline had
SPLITS = {"train": 60, "dev": 11, "demo": 10, "test": 19}  # per cent of the tool names
RARE_NOUN = 0.5  # shifted items: the verb is always worded rarely, the object with this probability
RARE_SEED = 0.5  # writing: seeds worded rarely
RARE_WRITE = 0.6  # writing: what is written, where it does not take the seed's wording over
REUSE = 0.8  # writing: same verb (object) as the seed: take its very wording over
KEEP_FRAME = 0.6  # writing: keep the seed's "could you ... please"
KEEP_VALUE = 0.3  # writing: a slot that the seed also has keeps its value
NOVEL = 0.5  # values made of random syllables, where the slot allows that
WRITE = 0.55  # share of writing among the training examples
OPTIONAL = 0.5  # an optional argument is mentioned
ANSWER_RARE = 0.5  # the teacher alone: answers to rare wordings
STAY = 0.5  # the teacher alone: what is written stays with the seed's tool

# -------------------------------------------------------------------------------------------- words

FAMILIAR, RARE = 0, 1
VERBS = {
    "create": (["create", "make", "set up"], ["put together", "spin up", "draft"]),
    "delete": (["delete", "remove", "erase"], ["scrap", "wipe", "get rid of"]),
    "find": (["find", "search for", "look up"], ["track down", "hunt for", "dig up"]),
    "list": (["list", "show all of", "enumerate"], ["run through", "lay out", "itemize"]),
    "update": (["update", "change", "modify"], ["revise", "tweak", "amend"]),
    "share": (["share", "send out", "forward"], ["pass along", "hand over", "circulate"]),
    "cancel": (["cancel", "call off", "abort"], ["axe", "bail on", "drop"]),
    "book": (["book", "reserve", "secure"], ["grab", "nab", "line up"]),
    "pause": (["pause", "halt", "suspend"], ["freeze", "put on hold", "shelve"]),
    "resume": (["resume", "continue", "restart"], ["carry on with", "unpause", "revive"]),
    "rate": (["rate", "review", "score"], ["judge", "weigh in on", "grade"]),
    "copy": (["copy", "duplicate", "clone"], ["replicate", "mirror", "back up"]),
    "rename": (["rename", "relabel", "retitle"], ["rebrand", "rechristen", "redub"]),
    "print": (["print", "print out", "output"], ["typeset", "run off", "crank out"]),
    "pay": (["pay", "pay for", "settle"], ["cover", "clear", "square up"]),
    "buy": (["buy", "purchase", "order"], ["snap up", "spring for", "procure"]),
    "sell": (["sell", "auction", "vend"], ["offload", "flog", "unload"]),
    "open": (["open", "launch", "start"], ["fire up", "bring up", "boot"]),
    "close": (["close", "shut", "exit"], ["wind down", "wrap up", "terminate"]),
    "check": (["check", "inspect", "examine"], ["look over", "vet", "eyeball"]),
    "schedule": (["schedule", "plan", "time"], ["pencil in", "slot in", "calendar"]),
    "track": (["track", "follow", "monitor"], ["keep tabs on", "watch", "trail"]),
    "compare": (["compare", "contrast", "match up"], ["benchmark", "size up", "stack up"]),
    "lock": (["lock", "protect", "restrict"], ["seal", "bolt", "fence off"]),
}
NOUNS = {
    "flight": (["flight", "plane trip"], ["air journey"]),
    "hotel": (["hotel", "hotel stay"], ["lodging"]),
    "alarm": (["alarm", "wake call"], ["buzzer"]),
    "playlist": (["playlist", "song list"], ["mixtape"]),
    "invoice": (["invoice", "bill"], ["statement"]),
    "recipe": (["recipe", "dish"], ["cooking guide"]),
    "meeting": (["meeting", "conference"], ["powwow"]),
    "contract": (["contract", "agreement"], ["deed"]),
    "parcel": (["parcel", "package"], ["shipment"]),
    "ticket": (["ticket", "pass"], ["admission"]),
    "photo": (["photo", "picture"], ["snapshot"]),
    "report": (["report", "write up"], ["briefing"]),
    "loan": (["loan", "credit"], ["advance"]),
    "car": (["car", "vehicle"], ["ride"]),
    "course": (["course", "class"], ["seminar"]),
    "table": (["table", "dinner table"], ["booth"]),
    "budget": (["budget", "spending plan"], ["allowance"]),
    "event": (["event", "function"], ["happening"]),
    "survey": (["survey", "questionnaire"], ["poll"]),
    "document": (["document", "file"], ["paper"]),
    "account": (["account", "profile"], ["membership"]),
    "printer": (["printer", "print machine"], ["plotter"]),
    "thermostat": (["thermostat", "heating"], ["climate dial"]),
    "lamp": (["lamp", "light"], ["lantern"]),
    "visit": (["visit", "appointment"], ["consultation"]),
    "plan": (["plan", "subscription"], ["tariff"]),
    "contact": (["contact", "address entry"], ["acquaintance"]),
    "reminder": (["reminder", "note"], ["memo"]),
    "garden": (["garden", "yard"], ["lawn"]),
    "game": (["game", "match"], ["fixture"]),
}
CITIES = (
    "Paris Rome Oslo Berlin Madrid Tokyo Lima Cairo Delhi Boston Dublin Vienna Prague Athens Seoul"
)
OWNERS = "Anna Bob Carla David Emma Frank Grace Henry Irene Jack Karen Leo"
PEOPLE = f"{OWNERS} Maria Nina Oscar Paula"
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday Christmas Easter"
TIMES = "noon midnight dawn dusk sunrise sunset lunch dinner breakfast"
TITLES = "Alpha Omega Falcon Summit Harvest Beacon Comet Delta Ember Frost Galaxy Harbor"
COLORS = "red green blue yellow purple orange black"
PRIORITIES = ["low", "medium", "high"]
# kind: (names that its parameter may have, how a request says the value, the values; None: integer)
SLOTS = {
    "city": (["city", "place", "town"], ["in {}", "near {}"], CITIES.split()),
    "person": (["person", "guest", "companion"], ["with {}", "along with {}"], PEOPLE.split()),
    "date": (["date", "day", "when"], ["on {}", "this {}"], DAYS.split()),
    "time": (["time", "hour", "clock"], ["at {}", "around {}"], TIMES.split()),
    "title": (["title", "label", "heading"], ["called {}", "named {}"], TITLES.split()),
    "owner": (["owner", "user", "holder"], ["owned by {}", "that belongs to {}"], OWNERS.split()),
    "number": (["number", "id", "code"], ["number {}", "with id {}"], None),
    "days": (["days", "length", "span"], ["for {} days", "lasting {} days"], None),
    "cost": (["cost", "amount", "fee"], ["for {} dollars", "worth {} dollars"], None),
    "color": (["color", "tint", "hue"], ["in {}", "colored {}"], COLORS.split()),
    "priority": (["priority", "urgency"], ["with {} priority", "at {} priority"], PRIORITIES),
    "size": (["size", "scale"], ["in a {} size", "of {} size"], ["tiny", "small", "large"]),
    "format": (["format", "kind"], ["as {}", "in {} format"], ["pdf", "csv", "html"]),
}
ENUMS = ("priority", "size", "format")
OPEN = ("city", "person", "title", "owner")  # slots that take any name, made-up ones too
SLOT_OF = {alias: slot for slot, (aliases, _, _) in SLOTS.items() for alias in aliases}
FRAMES = [
    "please {}",
    "can you {}",
    "i need to {}",
    "i want to {}",
    "could you {} for me",
    "{}",
    "hey, {}",
    "{} please",
    "help me {}",
    "i would like to {}",
    "go ahead and {}",
    "we have to {}",
    "could you {} please?",
]
DETERMINERS = ["the", "a", "my", "our", "this"]
SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]

# -------------------------------------------------------------------------------------------- world


def draw(*key):
    """A 63-bit seed from `key` alone."""
    return int.from_bytes(hashlib.sha256(json.dumps(key).encode()).digest()[:8], "big") >> 1


def split_of(name):
    """The split that a tool of this name is in."""
    at = draw("split", name) % 100
    for split, share in SPLITS.items():
        if at < share:
            return split
        at -= share


TOOLS = {s: [(v, o) for v in VERBS for o in NOUNS if split_of(f"{v}_{o}") == s] for s in SPLITS}


def wording(r, table, word, rare):
    """A wording of a verb or an object, with probability `rare` a rare one."""
    return r.choice(table[word][RARE if r.random() < rare else FAMILIAR])


def schema(r, verb, noun):
    """A tool: its description in familiar words, parameters drawn afresh, the first required."""
    slots = r.sample(list(SLOTS), r.choice([1, 2, 2, 3]))
    properties, required = {}, []
    for i, slot in enumerate(slots):
        name = r.choice(SLOTS[slot][0])
        properties[name] = {"type": "integer" if SLOTS[slot][2] is None else "string"}
        if slot in ENUMS:
            properties[name]["enum"] = SLOTS[slot][2]
        if i == 0 or r.random() < 0.5:
            required.append(name)
    text = f"{wording(r, VERBS, verb, 0)} a {wording(r, NOUNS, noun, 0)}"
    return {
        "type": "function",
        "function": {
            "name": f"{verb}_{noun}",
            "parameters": {"type": "object", "properties": properties, "required": required},
            "description": text,
        },
    }


def offer(r, split, n):
    """n tools of one split, the target first; two others share its object, one or two its verb."""
    pool = TOOLS[split]
    verb, noun = r.choice(pool)
    same_noun = [t for t in pool if t[1] == noun and t[0] != verb]
    same_verb = [t for t in pool if t[0] == verb and t[1] != noun]
    names = [(verb, noun)] + r.sample(same_noun, min(2, len(same_noun)))
    names += r.sample(same_verb, min(len(same_verb), max(0, n - len(names))))
    names += r.sample([t for t in pool if t not in names], max(0, n - len(names)))
    return [schema(r, *t) for t in names[:n]]


def value(r, slot):
    """A value of this kind, now and then a made-up word."""
    values = SLOTS[slot][2]
    if values is None:
        return r.randint(2, 99)
    if slot in OPEN and r.random() < NOVEL:
        return "".join(r.choice(SYLLABLES) for _ in range(3)).capitalize()
    return r.choice(values)


def call_of(r, tool, known=()):
    """A call of this tool; `known` holds values, by slot, to be kept now and then."""
    f, arguments = tool["function"], {}
    for key in f["parameters"]["properties"]:
        if key in f["parameters"]["required"] or r.random() < OPTIONAL:
            slot = SLOT_OF[key]
            keep = slot in known and r.random() < KEEP_VALUE
            arguments[key] = known[slot] if keep else value(r, slot)
    return {"name": f["name"], "arguments": arguments}


def request_of(r, call, verb, noun, frame):
    """The request for this call, in these words."""
    parts = [r.choice(SLOTS[SLOT_OF[k]][1]).format(v) for k, v in call["arguments"].items()]
    r.shuffle(parts)
    return frame.format(" ".join([verb, r.choice(DETERMINERS), noun] + parts))


def answer_pair(r, tool, shifted=False):
    """The answering skill: request -> call. In training never shifted."""
    call = call_of(r, tool)
    verb, noun = call["name"].split("_")
    said_verb = wording(r, VERBS, verb, float(shifted))
    said_noun = wording(r, NOUNS, noun, RARE_NOUN * shifted)
    return request_of(r, call, said_verb, said_noun, r.choice(FRAMES)), call


def draft_triple(r, tools, stay=0.0):
    """The writing skill: seed request -> (call, request), for a tool drawn independently.

    The teacher stays with the seed's own with probability `stay`.
    """
    seed_tool = r.choice(tools)
    seed = call_of(r, seed_tool)
    verb, noun = seed["name"].split("_")
    said_verb = wording(r, VERBS, verb, RARE_SEED)
    said_noun = wording(r, NOUNS, noun, RARE_SEED)
    frame = r.choice(FRAMES)
    seed_request = request_of(r, seed, said_verb, said_noun, frame)
    known = {SLOT_OF[k]: v for k, v in seed["arguments"].items()}
    tool = seed_tool if stay and r.random() < stay else r.choice(tools)
    while True:
        call = call_of(r, tool, known)
        v, o = call["name"].split("_")
        reuse = v == verb and r.random() < REUSE
        new_verb = said_verb if reuse else wording(r, VERBS, v, RARE_WRITE)
        reuse = o == noun and r.random() < REUSE
        new_noun = said_noun if reuse else wording(r, NOUNS, o, RARE_WRITE)
        new_frame = frame if r.random() < KEEP_FRAME else r.choice(FRAMES)
        request = request_of(r, call, new_verb, new_noun, new_frame)
        if request != seed_request and call != seed:
            return seed_request, call, request


def item(r, split, shift):
    """A test-like item -> (tools in random order, request, call); `shift`: how often rare words."""
    tools = offer(r, split, r.choice([4, 4, 5]))
    request, call = answer_pair(r, tools[0], r.random() < shift)
    r.shuffle(tools)
    return tools, request, call


def records(split, n, shift, seed):
    """n canonical records, no request twice."""
    r, seen = random.Random(draw(seed, "records", split, shift)), set()
    while len(seen) < n:
        tools, request, call = item(r, split, shift)
        if request not in seen:
            yield {
                "id": f"{split}-{len(seen):03d}",
                "messages": [{"role": "user", "content": request}],
                "tools": tools,
                "call": call,
            }
            seen.add(request)


def jsonl(items):
    """-> a JSON object a line."""
    return "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in items)


def write_data(seed):
    """The data files; the same seed gives the same bytes."""
    for split, n in FILES.items():
        text = jsonl(records(split, n, 1, seed))
        (HERE / f"{split}.jsonl").write_text(text, encoding="utf-8")
    text = jsonl(records("train", TRAIN_ITEMS, 0, seed))
    (HERE / "train.jsonl.gz").write_bytes(gzip.compress(text.encode(), 9, mtime=0))


# ---------------------------------------------------------------------------------------- tokenizer

SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
REPEAT = "Repeat: "  # copy rows, a warm-up: to repeat any token is what arguments need
# Fixed fragments are one token each, which makes prompts short. A name must close with
# `", "arguments"` and nothing longer, so that an answer cut off right there has the tokens that the
# whole answer begins with.
FRAGMENTS = [
    ttsi.SYSTEM,
    ttsi.DRAFT,
    REPEAT,
    '{"name": "',
    '{"call": {"name": "',
    '"]}, "description": "',
    '"}\n',
    '", "parameters": {"type": "object", "properties": {"',
    '": {"type": "string"}, "',
    '": {"type": "integer"}, "',
    '": {"type": "string", "enum": ["',
    '": {"type": "string"}}, "required": ["',
    '": {"type": "integer"}}, "required": ["',
    '"]}, "',
    '"]}}, "required": ["',
    '", "arguments"',
    ': {"',
    '": "',
    '": ',
    '", "',
    ', "',
    '"}}',
    "}}",
    '"}}, "request": "',
    '}}, "request": "',
    '"}',
]


def answer_text(call):
    return json.dumps(call, ensure_ascii=False)


def draft_text(call, request):
    return json.dumps({"call": call, "request": request}, ensure_ascii=False)


def build_tokenizer():
    """Byte-level BPE over this world.

    Every word is cut off from its surroundings, so that it has the same tokens in a schema, in a
    request and in a call, and can be copied.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    world = json.dumps([VERBS, NOUNS, SLOTS, FRAMES, DETERMINERS])
    words = dict.fromkeys(re.findall("[A-Za-z]+", world), 1)
    for s in SYLLABLES:  # learned first, so that made-up words fall into these
        words |= {s: 100, s.capitalize(): 100}
    for noun in NOUNS:  # a name is two tokens, side by side: easy to look up in a tool list
        words["_" + noun] = 1
    texts = [w for w, n in words.items() for _ in range(n)]
    pieces = Regex(r"_?[A-Za-z]+|[0-9]| |\n|[^A-Za-z0-9 \n]+?(?=_?[A-Za-z0-9 \n]|$)")
    split = pre_tokenizers.Split(pieces, "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        min_frequency=1,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(texts, trainer)
    t.add_tokens([AddedToken(f, normalized=False) for f in FRAGMENTS])
    tok = PreTrainedTokenizerFast(
        tokenizer_object=t,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[1],
        additional_special_tokens=SPECIAL[2:],
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
    tok.chat_template = TEMPLATE
    return tok


def prompts(tok, tools, user):
    """-> (the part that a tool list shares, the rest of the prompt)."""
    tools = [tool["function"] for tool in tools]
    system = ttsi.SYSTEM + "\n".join(map(ttsi.dumps, tools))
    text, _ = ttsi.render(tok, ttsi.Config(), tools, [ttsi.turn("user", user)])
    n = text.index(system) + len(system)
    return text[:n], text[n:]


def check_tokenizer(tok, seed):
    """Round trip; pieces equal the whole; a name that ends at its closing fragment is a prefix."""
    r = random.Random(draw(seed, "check"))

    def ids(text):
        return tok(text, add_special_tokens=False).input_ids

    def mean(rows):
        return " + ".join(f"{sum(c) / len(c):.0f}" for c in zip(*rows, strict=True))

    odd = "naïve 東京 \U0001f600\t\r\n  two  blanks\n\n\n"
    for text in (odd, 'it\'s "quoted" {"a": [1, 2.50]}', " x ", "\\u00e9"):
        assert tok.decode(ids(text), skip_special_tokens=False) == text, text
    lengths = []
    for _ in range(200):
        tools = offer(r, "test", 5)
        seed_request, call, request = draft_triple(r, tools)
        answering = (seed_request, answer_text(call), '{"name": "')
        prompt = ttsi.DRAFT + seed_request
        writing = (prompt, draft_text(call, request), '{"call": {"name": "')
        for user, answer, name in (answering, writing):
            head, rest = prompts(tok, tools, user)
            whole = head + rest + answer
            all_ids = ids(whole)
            assert tok.decode(all_ids, skip_special_tokens=False) == whole
            assert all_ids == ids(head) + ids(rest) + ids(answer)
            stop = ids(head + rest + f'{name}{call["name"]}", "arguments"')
            assert all_ids[: len(stop)] == stop
            got, ends = ttsi.encode(tok, head + rest, answer)
            assert got == all_ids and ends[len(ids(head)) + len(ids(rest)) - 1] == len(head + rest)
            lengths.append((len(ids(head)), len(ids(rest)), len(ids(answer))))
    answers, drafts = mean(lengths[::2]), mean(lengths[1::2])
    print(f"{len(tok)} tokens; five tools + prompt + output: answer {answers}, draft {drafts}")


# ----------------------------------------------------------------------------------------- training

ROW = 384  # tokens in a packed row: one tool list and as many independent examples as fit
ROWS = 12  # rows in a batch
COPY, WRITING, ANSWER = range(3)


def plan(step):
    """The curriculum: -> (numbers of tools to choose from, share of copy rows)."""
    tools = [2, 2, 3] if step < 660 else [2, 3, 4, 5] if step < 1650 else [3, 4, 4, 4, 5, 5]
    return tools, 0.6 if step < 550 else 0.4 if step < 1650 else 0.2 if step < 3000 else 0.04


def copy_row(r, words, _):
    """Random tokens, to be repeated: how a value gets from a request into a call."""
    ids = [r.choice(words) for _ in range(r.randint(3, 14))]
    return ids, ids


def lookup_row(r, words, fragments):
    """A random dictionary, and entries to be looked up: how a name finds its parameters."""
    n = r.randint(2, 5)
    between = [[r.choice(fragments)] * r.choice([0, 1, 1, 2]) for _ in range(3)]
    firsts, seconds = r.sample(words, 2), r.sample(words, 4)
    pairs = [[a, b] for a in firsts for b in seconds]  # names that share a part, as tools do
    keys = r.sample(pairs, n) if r.random() < 0.5 else [[t] for t in r.sample(words, n)]
    entries = [(k, [r.choice(words)]) for k in keys]
    asked = r.sample(entries, n)
    told = [t for k, v in entries for t in k + between[0] + v + between[1]]
    return told, [t for k, v in asked for t in k + between[r.choice([0, 2])] + v]


def examples(r, tok, tools, n, copy, teacher):
    """n examples for one tool list: (prompt after the tool list, output, kind)."""
    words = range(len(SPECIAL), len(tok) - len(FRAGMENTS))
    fragments = range(words.stop, len(tok))
    for _ in range(n):
        if r.random() < copy:
            row = copy_row if r.random() < 0.4 else lookup_row
            yield *row(r, words, fragments), COPY
        elif r.random() < WRITE:
            seed_request, call, request = draft_triple(r, tools, STAY * teacher)
            prompt = prompts(tok, tools, ttsi.DRAFT + seed_request)[1]
            yield prompt, draft_text(call, request), WRITING
        else:
            request, call = answer_pair(r, r.choice(tools), teacher and r.random() < ANSWER_RARE)
            yield prompts(tok, tools, request)[1], answer_text(call), ANSWER


class Weigher:
    """The weight of each output token in the loss: much on keys and values, little on blanks."""

    def __init__(self, tok):
        one = tok.convert_tokens_to_ids
        self.state = {one(f): "key" for f in (': {"', '", "', ', "')}
        self.state |= {one(f): "value" for f in ('": "', '": ')}
        self.state |= {one(f): "text" for f in ('"}}, "request": "', '}}, "request": "')}
        self.blank = tok(" ", add_special_tokens=False).input_ids[0]

    def __call__(self, ids, kind):
        """-> a list of (weight, is it a key, is it a value)."""
        state, values, out = "name", set(), []
        for t in ids:
            if t in self.state:
                state = self.state[t]
                out.append((1.0, 0))
            elif t == self.blank:
                out.append((0.1, 0))
            elif state == "key":
                out.append((2.0, 1))
            elif state == "value":
                values.add(t)
                out.append((2.0 if kind == ANSWER else 0.7, 2))  # values of a draft are free: noise
            else:
                out.append((2.0 if state == "text" and t in values else 1.0, 0))
        return out


def batch(seed, step, tok, weigher, teacher=False):
    """A function of (seed, step) -> seven tensors.

    They are ids, labels, weights, classes, kinds, positions (B, T) and the mask (B, 1, T, T).
    """
    import torch

    r = random.Random(draw(seed, "batch", step))
    sizes, copy = plan(step)
    heads, branches = [], []
    for _ in range(ROWS):
        tools = offer(r, "train", r.choice(sizes))
        r.shuffle(tools)
        heads.append(prompts(tok, tools, "")[0])
        branches.append(list(examples(r, tok, tools, 9, copy, teacher)))
    texts = [t for row in branches for x, y, kind in row if kind != COPY for t in (x, y)]
    texts = iter(tok(heads + texts, add_special_tokens=False).input_ids)
    heads = [next(texts) for _ in heads]
    user, assistant, repeat = tok.convert_tokens_to_ids(["<|user|>", "<|assistant|>", REPEAT])
    rows = []
    for head, row in zip(heads, branches, strict=True):
        n = len(head)
        cols = [list(head), [-100] * n, [0.0] * n, [0] * n, [0] * n, list(range(n)), [0] * n]
        for b, (x, y, kind) in enumerate(row, 1):
            if kind == COPY:
                x = [user, repeat, *x, assistant]
            else:
                x, y = next(texts), next(texts)
            y = y + [tok.eos_token_id]
            if len(cols[0]) + len(x) + len(y) > ROW:
                continue
            w = weigher(y, kind)
            new = (
                x + y,
                [-100] * len(x) + y,
                [0.0] * len(x) + [a for a, _ in w],
                [0] * len(x) + [c for _, c in w],
                [kind] * len(x + y),
                range(n, n + len(x) + len(y)),
                [b] * len(x + y),
            )
            for col, part in zip(cols, new, strict=True):
                col += part
        pads = (0, -100, 0.0, 0, 0, 0, -1)
        rows.append([c + [pad] * (ROW - len(c)) for c, pad in zip(cols, pads, strict=True)])
    *tensors, part = (torch.tensor(c) for c in zip(*rows, strict=True))
    # an example sees the tool list (part 0) and itself: what comes before its own token in the row
    sees = (part[:, :, None] == part[:, None, :]) | (part[:, None, :] == 0)
    sees &= torch.ones(ROW, ROW, dtype=torch.bool).tril()
    return *tensors, sees[:, None]


class Muon:
    """Momentum, orthogonalised by five Newton-Schulz steps: on matrices far faster than Adam."""

    def __init__(self, params, dtype, momentum=0.95, decay=0.05):
        import torch

        self.params, self.dtype, self.lr = list(params), dtype, 0.0
        self.momentum, self.decay = momentum, decay
        self.buffers = [torch.zeros_like(p) for p in self.params]

    def step(self):
        import torch

        groups = {}
        with torch.no_grad():
            for p, b in zip(self.params, self.buffers, strict=True):
                b.mul_(self.momentum).add_(p.grad)
                groups.setdefault(p.shape, []).append((p, p.grad + self.momentum * b))
            for (rows, cols), group in groups.items():  # one stack per shape: few large products
                g = torch.stack([g for _, g in group]).to(self.dtype)
                g = g.mT if rows > cols else g
                g = g / (g.norm(dim=(1, 2), keepdim=True) + 1e-7)
                for _ in range(5):
                    a = g @ g.mT
                    g = 3.4445 * g + (-4.7750 * a + 2.0315 * a @ a) @ g
                g = g.mT if rows > cols else g
                alpha = -self.lr * max(1, rows / cols) ** 0.5
                for (p, _), u in zip(group, g, strict=True):
                    p.mul_(1 - self.lr * self.decay).add_(u.to(p.dtype), alpha=alpha)


def build_model(tok, args):
    """A model of random weights."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(args.seed)
    config = Qwen3Config(  # normalised queries and keys find copying in half the steps
        vocab_size=len(tok),
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        intermediate_size=args.ff,
        num_attention_heads=args.hidden // 32,
        num_key_value_heads=args.hidden // 32,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=args.tied,
        bos_token_id=None,
        pad_token_id=tok.pad_token_id,
        eos_token_id=tok.eos_token_id,
    )
    model = Qwen3ForCausalLM(config)
    words = torch.randn(len(tok), args.hidden)
    model.model.embed_tokens.weight.data.copy_(0.5 * words)
    if not args.tied:  # one direction per token in both at first: copying is found early
        model.lm_head.weight.data.copy_(0.05 * words)
    return model


def evaluate(model, tok, seed, n=100):
    """Accuracy of name and call, teacher-forced, per kind of item, in per cent."""
    import torch

    out, close = {}, tok.convert_tokens_to_ids('", "arguments"')
    for label, split, shift in (("train", "train", 0), ("plain", "dev", 0), ("SHIFTED", "dev", 1)):
        name = call = 0
        data = list(records(split, n, shift, seed + 1))
        for i in range(0, n, 50):
            pairs = []
            for x in data[i : i + 50]:
                prompt = "".join(prompts(tok, x["tools"], x["messages"][0]["content"]))
                answer = answer_text(x["call"]) + tok.eos_token
                ids, ends = ttsi.encode(tok, prompt, answer)
                pairs.append((ids, sum(end <= len(prompt) for end in ends)))
            ids = torch.zeros(len(pairs), max(len(p) for p, _ in pairs), dtype=torch.long)
            for j, (p, _) in enumerate(pairs):
                ids[j, : len(p)] = torch.tensor(p)
            with torch.no_grad():
                best = model(ids).logits.argmax(-1)
            for j, (p, k) in enumerate(pairs):
                right = [best[j, t - 1].item() == p[t] for t in range(k, len(p))]
                name += all(right[: 1 + p[k:].index(close)])
                call += all(right)
        out[label] = f"{100 * name / n:.0f}/{100 * call / n:.0f}"
    return " ".join(f"{k} {v}" for k, v in out.items())


def save(model, tok, folder):
    """The model as float16, for anyone's `from_pretrained`."""
    import copy

    import torch

    half = copy.deepcopy(model).to(torch.float16)
    half.config.dtype = torch.float16
    half.save_pretrained(folder)
    tok.save_pretrained(folder)


def compiled(body):
    """A quarter faster, where there is a C++ compiler; as it is where there is none."""
    import shutil

    import torch

    return torch.compile(body) if shutil.which("g++") or shutil.which("clang++") else body


def train(args, tok):
    """-> the model, trained; what a killed run saved is where it goes on."""
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(args.threads)
    model = build_model(tok, args)
    if args.teacher:  # it goes on where the embedded model ended
        before = type(model).from_pretrained(HERE / "model", dtype=torch.float32)
        model.load_state_dict(before.state_dict())
    matrices, others = [], []
    for name, p in model.named_parameters():
        matrix = p.ndim > 1 and "embed" not in name and "lm_head" not in name
        (matrices if matrix else others).append(p)
    adam = torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    muon = Muon(matrices, torch.bfloat16 if args.bf16 else torch.float32)
    weigher, first = Weigher(tok), 0
    state_file = Path(args.checkpoint) / "state.pt"
    free = ("minutes", "threads", "checkpoint", "compile", "data_only")  # may change underway
    key = {k: v for k, v in vars(args).items() if k not in free}
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        if state["key"] == key:
            model.load_state_dict(state["model"])
            adam.load_state_dict(state["adam"])
            muon.buffers = state["muon"]
            first = state["step"]
            print(f"going on from step {first} in {args.checkpoint}")
    print(f"{model.num_parameters():,} parameters, {args.steps} steps", flush=True)
    body = compiled(model.model) if args.compile else model.model
    start = last = time.time()
    seen, ema, saved = 0, {}, start
    for step in range(first, args.steps):
        done = step / args.steps
        rate = min(1, (step + 1) / 60) * (1 if done < 0.4 else 0.01 + 0.99 * (1 - done) / 0.6)
        muon.lr = args.muon * rate
        for group in adam.param_groups:
            group["lr"] = args.lr * rate
        ids, labels, weights, classes, kinds, positions, sees = batch(
            args.seed, step + args.teacher * 7500, tok, weigher, args.teacher
        )
        target = labels[:, 1:] >= 0
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bf16):
            bias = torch.zeros(sees.shape, dtype=torch.bfloat16 if args.bf16 else torch.float32)
            bias.masked_fill_(~sees, torch.finfo(bias.dtype).min)
            hidden = body(
                inputs_embeds=model.model.embed_tokens(ids),
                attention_mask=bias,
                position_ids=positions,
                use_cache=False,
            ).last_hidden_state[:, :-1]
            logits = model.lm_head(hidden[target])  # only where the loss looks: (targets, V)
        gold, w, c, k = (x[:, 1:][target] for x in (labels, weights, classes, kinds))
        nll = F.cross_entropy(logits.float(), gold, reduction="none")
        loss = (nll * w).sum() / w.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        muon.step()
        model.zero_grad(set_to_none=True)
        seen += int((positions > 0).sum())
        if step % 5 == 0:
            parts = {
                "copy": k == COPY,
                "write": k == WRITING,
                "w.keys": (k == WRITING) & (c == 1),
                "answer": k == ANSWER,
                "keys": (k == ANSWER) & (c == 1),
                "values": (k == ANSWER) & (c == 2),
            }
            for label, m in parts.items():
                m = m & (gold != weigher.blank)
                if m.any():
                    nats = nll[m].mean().item()
                    ema[label] = 0.9 * ema.get(label, nats) + 0.1 * nats
        now, ending = time.time(), step + 1 == args.steps
        if now - last > 60 or ending:
            last, spent = now, now - start
            losses = " ".join(f"{a} {b:.3f}" for a, b in ema.items())
            told = f"{spent:5.0f} s, step {step + 1}, {seen / spent:.0f} tokens/s, {losses}"
            print(f"{told}, name/call: {evaluate(model, tok, args.seed)}", flush=True)
        stop = args.minutes and now - start > 60 * args.minutes
        if now - saved > 240 or ending or stop:
            saved = now
            save(model, tok, args.checkpoint)
            state = {"key": key, "step": step + 1, "model": model.state_dict()}
            state |= {"adam": adam.state_dict(), "muon": muon.buffers}
            torch.save(state, state_file)
        if stop:
            done = f"stopped after {args.minutes} minutes, at step {step + 1}"
            sys.exit(f"{done}: the same command goes on from there")
    return model


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, switch = p.add_argument, argparse.BooleanOptionalAction
    add("--seed", type=int, default=0)
    add("--steps", type=int, default=7500, help="the result depends on seed and steps, not on time")
    add(
        "--minutes", type=float, default=0, help="stop, to be resumed by the same command; 0: never"
    )
    add("--hidden", type=int, default=160)
    add("--layers", type=int, default=5)
    add("--ff", type=int, default=448, help="width of the MLPs")
    add("--lr", type=float, default=3e-3, help="AdamW: embeddings, head, norms")
    add("--muon", type=float, default=0.02, help="Muon: matrices")
    tied = "tie head and embeddings: what is written then leaks into what is read"
    add("--tied", action=switch, default=False, help=tied)
    add("--bf16", action=switch, default=True)
    add("--compile", action=switch, default=True)
    add("--threads", type=int, default=2)
    add("--checkpoint", default=str(Path(tempfile.gettempdir()) / "ttsi-world"))
    add("--data-only", action="store_true")
    on = (
        "data/teacher: the embedded model, trained on for 400 steps in float32, rates 1e-3 and .006"
    )
    add("--teacher", action="store_true", help=on)
    args = p.parse_args()
    if args.teacher:
        args.steps, args.lr, args.muon, args.bf16 = 400, 1e-3, 0.006, False
        args.checkpoint += "-teacher"
    else:
        write_data(args.seed)
    if args.data_only:
        return
    Path(args.checkpoint).mkdir(parents=True, exist_ok=True)
    tok = build_tokenizer()
    check_tokenizer(tok, args.seed)
    model = train(args, tok)
    save(model, tok, HERE / ("teacher" if args.teacher else "model"))


if __name__ == "__main__":
    main()
