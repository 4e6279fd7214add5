"""Numbers, tables and figures: all that is made of rows alone.

Rows are those of experiments.py: lists of dicts, one list for each seed, item by item.
"""

import math
import statistics
from collections import Counter

import torch

KINDS = ("name", "call")
TAU = 0.95  # the default of ttsi.py


# --------------------------------------------------------------------------- rows of other rows
def margin(row):
    """Its margin; 2 where there is none: such a sample is never adapted."""
    return 2.0 if row["margin"] is None else row["margin"]


def instead(row, text, right, decision, cost):
    """A row that is answered with this text, graded `right`, at this cost; without any pair."""
    answered = {"answer": text, "scores": row["scores"] | {"answer": right}, "decision": decision}
    nothing = {"drafts": [], "pairs": [], "loss": []}
    return row | nothing | answered | {"cost": cost | spent(row, "direct")}


def spent(row, *stages):
    """What these stages of a row cost."""
    return {stage: row["cost"][stage] for stage in stages if stage in row["cost"]}


def gate(rows, chosen):
    """Rows of a run with --tau 2 -> rows as if only the chosen samples had been adapted. Each was
    answered both ways, and samples do not touch each other."""
    out = []
    for row, adapt in zip(rows, chosen, strict=True):
        if not adapt and row["cost"]:
            cost = spent(row, "score") | {"answer": row["cost"]["direct"]}  # prompt included
            row = instead(row, row["direct"], row["scores"]["direct"], "certain", cost)
            row["faults"] = dict.fromkeys(("direct", "answer"), row["faults"]["direct"])
        out.append(row)
    return out


def uncertain(rows, tau=TAU):
    return gate(rows, [margin(row) < tau for row in rows])


def certain(rows, tau=TAU):
    return gate(rows, [margin(row) >= tau for row in rows])


def against(rows, others):
    """Rows in which "direct" is another run, so that the difference is the one to that."""
    found, out = {row["id"]: row for row in others}, []
    for row in rows:
        other = found[row["id"]]["scores"]["answer"]
        out.append(row | {"scores": row["scores"] | {"direct": other}})
    return out


def several_tools(places):
    """The same rows of each seed, without the items that offer one tool, and places of such."""
    out = {}
    for place, runs in places.items():
        several = [[row for row in rows if row["offered"] > 1] for rows in runs]
        if several[0]:
            out[place] = several
    return out


# --------------------------------------------------------------------------------- statistics
def auroc(values, right):
    """The probability that a right one has the higher value; ties count half. None where all are
    right, or none."""
    high = torch.tensor([v for v, r in zip(values, right, strict=True) if r], dtype=torch.double)
    low = torch.tensor(
        sorted(v for v, r in zip(values, right, strict=True) if not r), dtype=torch.double
    )
    if not len(high) or not len(low):
        return None
    below = torch.searchsorted(low, high) + torch.searchsorted(low, high, right=True)
    return below.double().mean().item() / 2 / len(low)  # ties are in the second only


def aurocs(rows):
    """-> {kind: AUROC of the margin for direct answers whose name, or call, is right}"""
    told = [row for row in rows if row["margin"] is not None]
    margins, right = [row["margin"] for row in told], [row["scores"]["direct"] for row in told]
    return {kind: auroc(margins, [r[kind] for r in right]) for kind in KINDS}


def changes(runs, kind):
    """Rows of several seeds -> {list of tools: [an item's mean change over the seeds, points]}"""
    out = {}
    for same in zip(*runs, strict=True):
        gains = [r["scores"]["answer"][kind] - r["scores"]["direct"][kind] for r in same]
        out.setdefault(same[0]["tools"], []).append(100 * statistics.mean(gains))
    return out


def resampled(change, seed=0, resamples=10_000):
    """Bootstrap by list of tools, whose items are not independent -> (resamples,) means."""
    lists = [torch.tensor(items).double() for items in change.values()]
    total = torch.stack([items.sum() for items in lists])
    count = torch.tensor([len(items) for items in lists])
    g = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(lists), (resamples, len(lists)), generator=g)
    return total[drawn].sum(1) / count[drawn].sum(1)


def difference_of(change, means):
    """-> {points, interval: its 2.5 and 97.5 % quantiles}"""
    low, high = means.quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    points = statistics.mean(c for items in change.values() for c in items)
    return {"points": points, "interval": [low, high]}


def every_tau(rows):
    """Rows of --tau 2 -> for each tau that matters: the adapted, in percent; "gain", in points of
    calls; and "certain_only", the gain if the others were adapted."""
    rows = sorted(rows, key=margin)
    out, adapted = [], 0
    changes = [row["scores"]["answer"]["call"] - row["scores"]["direct"]["call"] for row in rows]
    gain, others = 0, sum(changes)  # tau 0: nobody is adapted; or everybody
    for i, tau in enumerate([*map(margin, rows), 2.0] if rows else []):
        if not out or tau > out[-1]["tau"]:
            counts = {"adapted": adapted, "gain": gain, "certain_only": others}
            out.append({"tau": tau} | {key: 100 * n / len(rows) for key, n in counts.items()})
        if i < len(rows):
            gain, others = gain + changes[i], others - changes[i]
            adapted += rows[i]["decision"] == "adapted"
    return out


def in_common(runs):
    """Rows of several seeds -> those of the items that all of them have."""
    ids = set.intersection(*({row["id"] for row in rows} for rows in runs))
    return [[row for row in rows if row["id"] in ids] for rows in runs]


def pooled(runs):
    """Rows of several seeds, item by item -> the numbers of one line: means over seeds, and
    intervals over items of these means."""
    every = [row for rows in runs for row in rows]
    answered = [row for row in every if row["cost"]]
    out = {"seeds": len(runs), "n": len(runs[0])}
    for side in ("direct", "answer"):
        rates = {}
        for kind in KINDS:
            rates[kind] = 100 * statistics.mean(row["scores"][side][kind] for row in every)
        out[side] = rates
    for kind in KINDS:
        change = changes(runs, kind)
        out[f"{kind} difference"] = difference_of(change, resampled(change))
    gains = [c for items in change.values() for c in items]  # of calls
    out["better"], out["worse"] = sum(c > 0 for c in gains), sum(c < 0 for c in gains)
    out["lists"] = len(change)
    by_seed = [
        statistics.mean(c for items in changes([r], "call").values() for c in items) for r in runs
    ]
    out["sd"] = statistics.stdev(by_seed) if len(runs) > 1 else None
    out["adapted"] = sum(row["decision"] == "adapted" for row in every) / len(runs)
    out["always first"] = 100 * statistics.mean(row["scores"]["first"] for row in every)
    for unit, name in enumerate(("seconds", "tokens")):
        spent_on = [cost_of(row, unit) for row in answered]
        out[name] = statistics.mean(spent_on)
        out[f"{name} ratio"] = sum(spent_on) / sum(row["cost"]["direct"][unit] for row in answered)
    verdicts = Counter(draft["verdict"] for row in every for draft in row["drafts"])
    out["drafts kept"] = [verdicts["kept"], verdicts.total()]
    out["auroc"] = aurocs(every)
    once = [rows[0]["once"] for rows in runs if "once" in rows[0]]
    if once:
        out["once"] = {key: statistics.mean(o[key] for o in once) for key in once[0]}
    return out


def cost_of(row, unit):
    """What a method does for a row, in seconds (0) or tokens (1)."""
    return sum(value[unit] for stage, value in row["cost"].items() if stage != "direct")


def ranked(runs):
    """Rows of --tau 2 -> what their "margin" is worth: AUROC, and accuracy if the least certain
    60 % are adapted."""
    chosen = []
    for rows in runs:
        margins = [margin(row) for row in rows]
        least = sorted(range(len(rows)), key=margins.__getitem__)[: int(0.6 * len(rows))]
        chosen.append(gate(rows, [i in least for i in range(len(rows))]))
    return pooled(chosen)


def mean_of(places):
    """Rows of several seeds for each place -> the numbers of the mean over places, as the paper
    has it: each weighs the same."""
    found, out = [pooled(runs) for runs in places], {"n": sum(len(runs[0]) for runs in places)}
    for side in ("direct", "answer"):
        out[side] = {kind: statistics.mean(r[side][kind] for r in found) for kind in KINDS}
    for kind in KINDS:
        drawn = [resampled(changes(runs, kind), seed) for seed, runs in enumerate(places)]
        means = torch.stack(drawn).mean(0)
        points = statistics.mean(r[f"{kind} difference"]["points"] for r in found)
        low, high = means.quantile(torch.tensor([0.025, 0.975]).double()).tolist()
        out[f"{kind} difference"] = {"points": points, "interval": [low, high]}
    for key in ("better", "worse", "adapted"):
        out[key] = sum(r[key] for r in found)
    for key in ("seconds", "seconds ratio", "tokens ratio"):
        out[key] = statistics.mean(r[key] for r in found)
    return out


# ------------------------------------------------------------------------------------- tables
def difference(r, kind="call"):
    """A difference and its interval, as text."""
    low, high = r[f"{kind} difference"]["interval"]
    return f"{r[f'{kind} difference']['points']:+.1f} [{low:+.1f}, {high:+.1f}]"


def two_digits(areas):
    return ["" if area is None else f"{area:.2f}" for area in areas.values()]


HEAD = ("", "by", "names", "calls", "names, difference [95 %]", "calls, difference [95 %]")
HEAD += ("better / worse", "lists of tools", "s.d.", "adapted", "drafts kept")
HEAD += ("seconds", "tokens", "labels, once")


def table(head, rows):
    """Lines of a table in markdown."""
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (head, *rows)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:]]


def markdown(found):
    """{label: {place: numbers}} -> a table."""
    several = any(len(places) > 1 for places in found.values())
    rows = []
    for label, places in found.items():
        for place, r in places.items():
            cells = [f"{label}, {place}" if several else label, r.get("by", "")]
            cells += [f"{r['direct'][k]:.1f} -> {r['answer'][k]:.1f}" for k in KINDS]
            cells += [difference(r, kind) for kind in KINDS]
            cells.append(f"{r['better']} / {r['worse']}")
            cells.append(r.get("lists", ""))
            cells.append(f"{r['sd']:.1f}" if r.get("sd") is not None else "")
            cells.append(f"{r['adapted']:.0f}/{r['n']}")
            kept_drafts, drafts = r.get("drafts kept", (0, 0))
            cells.append(f"{100 * kept_drafts / drafts:.0f} %" if drafts else "")
            cells.append(f"{r['seconds']:.2g} s, {r['seconds ratio']:.1f}x")
            cells.append(f"{r['tokens ratio']:.1f}x")
            once = r.get("once")
            cells.append(
                "" if not once else f"{once['labels']:,.0f}, {once['tokens'] / 1e6:.2f} M tokens"
            )
            rows.append(cells)
    first = {
        place: r["always first"]
        for places in found.values()
        for place, r in places.items()
        if "always first" in r
    }
    text = [*table(HEAD, rows), ""]
    text += [
        f"Always the first tool listed, {place}: {v:.1f} % of the names."
        for place, v in first.items()
    ]
    return "\n".join(text) + "\n"


def uncertainties(found):
    """The same for the uncertainties."""
    head = ["", "by", "AUROC, right names", "AUROC, right calls"]
    head += ["calls, the least certain 60 % adapted", "difference [95 %]"]
    rows = []
    for label, places in found.items():
        for r in places.values():
            areas = two_digits(r["auroc"])
            rows.append([label, r["by"], *areas, f"{r['answer']['call']:.1f}", difference(r)])
    return "\n".join(table(head, rows)) + "\n"


def chains(places):
    """Rows of --tau 2 for each place, of the first seed -> where the chain of H, G and T holds:
    tables of what each does to the uncertain, of what is wrong before and after, and of the right
    calls that training spoils."""
    first = {place: rows for place, (rows, *_) in places.items()}
    return "\n".join([*links(first), "", *faults(first), "", *spoiled(first)]) + "\n"


def links(places):
    head = ["", "AUROC of the margin, right names", "right calls"]
    head += ["uncertain", "direct wrong, of these", "of the others", "have pairs"]
    head += ["a pair calls the right tool", "answered otherwise", "repaired", "broken"]
    lines = []
    for place, rows in places.items():
        low = [row for row in rows if margin(row) < TAU]
        others = [row for row in rows if margin(row) >= TAU]
        adapted = [row for row in low if row["decision"] == "adapted"]
        named = [any(p["call"]["name"] == r["right"] for p in r["pairs"]) for r in adapted]
        changed = [row for row in adapted if row["answer"] != row["direct"]]
        change = [r["scores"]["answer"]["call"] - r["scores"]["direct"]["call"] for r in changed]
        cells = [place, *two_digits(aurocs(rows)), share(low, rows)]
        cells += [share([r for r in part if r["faults"]["direct"]], part) for part in (low, others)]
        cells += [share(adapted, low), share([n for n in named if n], adapted)]
        lines.append([*cells, share(changed, adapted), change.count(1), change.count(-1)])
    return table(head, lines)


def faults(places):
    """What is wrong with direct answers, and with those of TT-SI."""
    found = {}
    for place, rows in places.items():
        before = Counter(row["faults"]["direct"] for row in rows)
        after = Counter(row["faults"]["answer"] for row in uncertain(rows))
        found[place] = before, after
    kinds = sorted({kind for both in found.values() for kind in [*both[0], *both[1]] if kind})
    lines = []
    for place, (before, after) in found.items():
        lines.append([place, *(f"{before[kind]} -> {after[kind]}" for kind in kinds)])
    return table(["wrong, direct -> TT-SI", *kinds], lines)


def spoiled(places):
    """Right calls of all that are trained for, and what is wrong with them after training: by
    whether a pair has no arguments."""
    kinds = ["an argument missing", "another tool"]
    groups = {True: "with a pair without arguments", False: "other pairs"}
    lines = []
    for place, rows in places.items():
        after = {(sure, bare): [] for sure in ("uncertain", "certain") for bare in groups}
        for row in rows:
            if row["decision"] == "adapted" and not row["faults"]["direct"]:
                sure = "uncertain" if margin(row) < TAU else "certain"
                bare = any(not pair["call"]["arguments"] for pair in row["pairs"])
                after[sure, bare].append(row["faults"]["answer"])
        for (sure, bare), found in after.items():
            wrong = [fault for fault in found if fault]
            cells = [f"{place}, {sure}, {groups[bare]}", len(found), len(wrong)]
            lines.append([*cells, *map(wrong.count, kinds)])
    return table(["trained for", "right before", "then wrong", *kinds], lines)


def share(part, whole):
    return f"{len(part)}/{len(whole)}" + (
        f", {100 * len(part) / len(whole):.0f} %" if whole else ""
    )


# ------------------------------------------------------------------------------------ figures
BLUE, RED, GREY = "#1f5fa8", "#c0392b", "#777"
HALO = 'stroke="white" stroke-width="3" paint-order="stroke"'  # words before lines


def svg(width, height, body):
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
    font = 'font-family="sans-serif" font-size="13">'
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
            self.body.append(text_at(px, top + height + 18, label, "middle"))
        for v, label in y.items():
            _, py = self.at(0, v)
            self.body.append(self.line([(x0, v), (x1, v)], "#ddd", 1))
            self.body.append(text_at(left - 6, py + 4, label, "end"))
        self.body.append(text_at(left + width / 2, top + height + 38, x_name, "middle"))
        self.body.append(text_at(left, top - 8, y_name))

    def at(self, x, y):
        (left, top, width, height), ((x0, x1), (y0, y1)) = self.box, self.span
        return left + width * (x - x0) / (x1 - x0), top + height * (y1 - y) / (y1 - y0)

    def line(self, points, colour, width=2):
        path = " ".join("{:.1f},{:.1f}".format(*self.at(*p)) for p in points)
        return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>'

    def dot(self, x, y, ends, colour):
        """A point, and its interval as a line between two ends."""
        px, py = self.at(x, y)
        self.body.append(self.line(ends, colour))
        self.body.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4.5" fill="{colour}"/>')


def forest(lines):
    """[(label, numbers), or (heading, None)] -> differences of call accuracy with their intervals,
    one below the other, and what each costs. As narrow as a phone."""
    told = [r["call difference"] for _, r in lines if r]
    low = 10 * math.floor(min(0, *(d["interval"][0] for d in told)) / 10)
    high = 10 * math.ceil(max(0, *(d["interval"][1] for d in told)) / 10)
    step = 10 if high - low <= 70 else 20
    row, top, width = 40, 66, 190
    x = {v: f"{v:+d}" if v else "0" for v in range(step * (low // step), high + step, step)}
    a = Axes(16, top, width, row * len(lines), x, {0: "", len(lines): ""}, "", "")
    a.body.append(text_at(10, 20, "Points of call accuracy over direct answers"))
    a.body.append(text_at(10, 38, "[95 % interval]; x: cost, in direct answers (tokens)"))
    for v, label in x.items():
        a.body.append(text_at(a.at(v, 0)[0], top - 6, label, "middle"))
    a.body.append(a.line([(0, 0), (0, len(lines))], GREY, 1))
    for i, (label, r) in enumerate(lines):
        y = top + row * i
        if not r:
            a.body.append(f'<rect x="0" y="{y}" width="400" height="{row}" fill="#eee"/>')
            a.body.append(text_at(10, y + 25, label, "start", 'font-weight="bold"'))
            continue
        points, ends = r["call difference"]["points"], r["call difference"]["interval"]
        at = len(lines) - i - 0.75
        colour = BLUE if ends[0] > 0 else RED if ends[1] < 0 else GREY
        a.body.append(text_at(10, y + 16, label, "start", HALO))
        a.dot(points, at, [(end, at) for end in ends], colour)
        cost = f"{difference(r)}, {r['tokens ratio']:.1f}x"
        a.body.append(text_at(390, y + 34, cost, "end"))
    return svg(400, top + row * len(lines) + 30, a.body)


def forest_lines(group, found, only=()):
    """{label: {place: numbers}} -> [(heading, None), (label, numbers), ...]: the lines of each
    place, the mean first."""
    out = []
    places = dict.fromkeys(place for by_place in found.values() for place in by_place)
    for place in sorted(places, key=lambda place: place != "mean"):
        lines = [(label, found[label][place]) for label in found if place in found[label]]
        lines = [line for line in lines if "against" not in line[0]]
        lines = [line for line in lines if line[0] in only or not only]
        if lines:
            r = lines[0][1]
            seeds = f", {r['seeds']} seeds" if r.get("seeds", 1) > 1 else ""
            title = {"mean": "Mean of the benchmarks", "own world": "Own world"}.get(place, place)
            part = group.removeprefix("real").removeprefix("-")
            title += f", {part}" if part else ""
            out += [(f"{title}: {r['n']} items{seeds}", None), *lines]
    return out


def tau_figure(runs):
    """Rows of --tau 2 of each place and seed -> gain and share adapted over tau, in the mean
    of the runs, on the scale of -log10(1 - tau)."""
    found = [every_tau(rows) for rows in runs]

    def curve(key):
        points = []
        for tau in [1 - 10 ** (-i / 20) for i in range(81)]:
            at = [next(e[key] for e in run if e["tau"] >= tau) for run in found]
            points.append((-math.log10(1 - tau), statistics.mean(at)))
        return points

    curves = {"gain": ("adapted below tau (the method)", BLUE)}
    curves["certain_only"] = ("adapted from tau on (the control)", RED)
    gains = [y for key in curves for _, y in curve(key)]
    low, high = 5 * math.floor(min(gains) / 5), 5 * math.ceil(max(gains) / 5)
    x = {0: "0", math.log10(2): "0.5", 1: "0.9", 2: "0.99", 3: "0.999", 4: "0.9999"}
    y = {v: str(v) for v in range(low, high + 1, 5)}
    top = Axes(40, 70, 330, 180, x, y, "", "calls, points over direct")
    y = {v: str(v) for v in range(0, 101, 25)}
    below = Axes(40, 310, 330, 110, x, y, f"tau ({TAU} by default)", "adapted, %")
    for i, (key, (label, colour)) in enumerate(curves.items()):
        top.body.append(top.line(curve(key), colour))
        top.body.append(text_at(40, 20 + 20 * i, label, "start", f'fill="{colour}"'))
    below.body.append(below.line(curve("adapted"), BLUE))
    return svg(400, 470, top.body + below.body)


def dose_figure(rows):
    """{share: numbers} -> accuracy over the share of items that are shifted."""
    low = 10 * math.floor(min(r["direct"]["call"] for r in rows.values()) / 10)
    x, y = {share: f"{share} %" for share in rows}, {v: str(v) for v in range(low, 101, 10)}
    y_name = "call accuracy, %; bars: 95 % interval of the difference"
    a = Axes(40, 30, 330, 220, x, y, "share of shifted items", y_name)
    for i, (side, name, colour) in enumerate(
        (("direct", "direct", RED), ("answer", "TT-SI", BLUE))
    ):
        a.body.append(a.line([(share, r[side]["call"]) for share, r in rows.items()], colour))
        a.body.append(text_at(50, 220 + 18 * i, name, "start", f'fill="{colour}"'))
        for share, r in rows.items():
            call, direct = r[side]["call"], r["direct"]["call"]
            ends = [direct + v for v in r["call difference"]["interval"]]
            bar = [(share, v) for v in (ends if side == "answer" else [call])]
            a.dot(share, call, bar, colour)
    return svg(400, 300, a.body)
