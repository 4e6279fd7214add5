"""The data of the embedded world: tools, requests and calls, all from one seed.

    python data/world.py    # dev.jsonl, demo.jsonl, test.jsonl and train.jsonl.gz, in seconds

The training of model/ and teacher/ on this world lies in commit bb3ddd6 (README.md).

**World.** 24 verbs x 30 objects = 720 tools such as `cancel_flight`, split by name. A request says
the verb, the object and 1 to 3 values; four or five confusable tools are on offer; the answer is a
call. Parameters are drawn afresh for every item: a schema must be read and cannot be remembered.

**The shift.** Every verb and object has familiar wordings, FAMILIAR, and rare ones, RARE ("axe the
flight"). The model was taught two skills: to ANSWER (request -> call), familiar wordings only, and
to WRITE (a seed request -> another call, and then its request), where rare ones occur, too. So it
knows that a `cancel_...` call may be worded "axe", but never learned to answer "axe". The test
requests are rare ones, on tools never seen.

**Why that makes self-improvement possible.** What the model writes about a call of the seed's verb
likes to take the seed's own phrase over. So among its drafts are pairs that show, in the direction
that is missing, what the seed's unknown words mean. Which tool it writes about does not depend on
the seed's: a draft reveals no answer, and what the model writes is all it knows.
"""

import argparse
import gzip
import hashlib
import json
import random
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

# -------------------------------------------------------------------------------------------- knobs

FILES = {"dev": 200, "demo": 100, "test": 500}  # items per file, every one of them shifted
TRAIN_ITEMS = 13_000  # as many labelled items as the paper's supervised baseline had; no shift
SPLITS = {"train": 60, "dev": 11, "demo": 10, "test": 19}  # per cent of the tool names
RARE_NOUN = 0.5  # shifted items: the verb is always worded rarely, the object with this probability
NOVEL = 0.5  # values made of random syllables, where the slot allows that
OPTIONAL = 0.5  # an optional argument is mentioned

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


def call_of(r, tool):
    """A call of this tool: all that is required, and some of what is not."""
    f, arguments = tool["function"], {}
    for key in f["parameters"]["properties"]:
        if key in f["parameters"]["required"] or r.random() < OPTIONAL:
            arguments[key] = value(r, SLOT_OF[key])
    return {"name": f["name"], "arguments": arguments}


def request_of(r, call, verb, noun, frame):
    """The request for this call, in these words."""
    parts = [r.choice(SLOTS[SLOT_OF[k]][1]).format(v) for k, v in call["arguments"].items()]
    r.shuffle(parts)
    return frame.format(" ".join([verb, r.choice(DETERMINERS), noun] + parts))


def answer_pair(r, tool, shifted=False):
    """-> (request, call): worded rarely where shifted, which the training never was."""
    call = call_of(r, tool)
    verb, noun = call["name"].split("_")
    said_verb = wording(r, VERBS, verb, float(shifted))
    said_noun = wording(r, NOUNS, noun, RARE_NOUN * shifted)
    return request_of(r, call, said_verb, said_noun, r.choice(FRAMES)), call


def item(r, split, shift):
    """-> (tools in random order, request, call), shifted with this probability."""
    tools = offer(r, split, r.choice([4, 4, 5]))
    request, call = answer_pair(r, tools[0], r.random() < shift)
    r.shuffle(tools)
    return tools, request, call


def records(split, n, shift, seed):
    """n samples in the form of ttsi.py, no request twice. `shift`, 0 to 1: how often rare words."""
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


# -------------------------------------------------------------------------------------------- files


def jsonl(items):
    """-> a JSON object a line, in bytes."""
    return "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in items).encode()


def write_data(folder, seed):
    """The data files; the same seed gives the same bytes (of the gz: with the same zlib)."""
    for split, n in FILES.items():
        (folder / f"{split}.jsonl").write_bytes(jsonl(records(split, n, 1, seed)))
    text = jsonl(records("train", TRAIN_ITEMS, 0, seed))
    (folder / "train.jsonl.gz").write_bytes(gzip.compress(text, 9, mtime=0))


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--out", type=Path, default=HERE, help="the folder to write; default: this one")
    p.add_argument("--seed", type=int, default=0, help="of the records; the tools are always these")
    args = p.parse_args(argv)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        write_data(args.out, args.seed)
    except OSError as e:
        sys.exit(f"{args.out}: cannot be written ({e.strerror})")


if __name__ == "__main__":
    main()
