"""Numbers, tables and figures: all that is made of rows alone.

It is imported by `python data/experiments.py`, which says how that is called. A run is what one
method did for one seed: [(the direct answer's row, its own row), ...], item by item. Figures are
SVG on a transparent ground, for pages on white and on black, and as narrow as a telephone.
"""

import math
import statistics

import matplotlib
import torch
from matplotlib.figure import Figure

import ttsi


# ------------------------------------------------------------------------------------ numbers
def bootstrap(changes, resamples=10_000):
    """{list of tools: [change of an item, ...]} -> (resamples,) means. What is drawn are lists of
    tools with all of their items, since items about the same tools are not independent."""
    groups = [changes[tools] for tools in sorted(changes)]
    sums = torch.tensor([sum(items) for items in groups], dtype=torch.float64)
    sizes = torch.tensor([len(items) for items in groups], dtype=torch.float64)
    rng = ttsi.draw("bootstrap", sorted(changes))
    drawn = torch.randint(len(groups), (resamples, len(groups)), generator=rng)
    return sums[drawn].sum(1) / sizes[drawn].sum(1)


def changes_of(runs):
    """Runs of several seeds -> {list of tools: [an item's mean change of right calls, points]}"""
    items = {}
    for before, after in sum(runs, []):
        item = items.setdefault((after["tools"], after["id"]), [])
        item.append(100 * (after["grade"][1] - before["grade"][1]))
    changes = {}
    for (tools, _), item in items.items():
        changes.setdefault(tools, []).append(statistics.mean(item))
    return changes


def difference(places):
    """Runs of each place -> [points of right calls, and their 95 % interval]; of several places
    the mean, in which each counts once."""
    changes = [changes_of(runs) for runs in places]
    means = [statistics.mean(c for items in place.values() for c in items) for place in changes]
    drawn = torch.stack([bootstrap(place) for place in changes]).mean(0)
    quantiles = drawn.quantile(torch.tensor([0.025, 0.975], dtype=drawn.dtype))
    return [statistics.mean(means), *quantiles.tolist()]


def f1_counts(call, gold):
    """-> [names right, written, wanted, arguments right, written, wanted], as Hammer's scorer has
    them (github.com/MadeAgents/Hammer, evaluation/evaluate.py): values are compared as text, empty
    ones are left out, another tool's arguments are all wrong; of two calls without arguments one
    is right. An answer without a call has written a wrong name."""
    wanted = {key: str(value) for key, value in gold["arguments"].items() if value != ""}
    if not call:
        return [0, 1, 1, 0, 0, len(wanted)]
    written = {key: str(value) for key, value in call["arguments"].items() if value != ""}
    right = len(written.items() & wanted.items())
    if call["arguments"] == gold["arguments"] == {}:
        right = 1
    same = call["name"] == gold["name"]
    return [int(same), 1, 1, right if same else 0, len(written), len(wanted)]


def f1(rows):
    """-> micro-F1 of the names and of the arguments, percent, of what `f1_counts` counted."""
    sums = [sum(column) for column in zip(*(row["f1"] for row in rows), strict=True)]
    parts = sums[:3], sums[3:]
    return [200 * right / max(written + wanted, 1) for right, written, wanted in parts]


def cost_ratio(pairs, unit):
    """Seconds (0) or tokens (1) of a method, as a multiple of those of direct answers."""
    spent = sum(cost[unit] for _, row in pairs for cost in row["cost"].values())
    answered = [row["cost"] for row, _ in pairs if row["cost"]]
    return spent / sum(cost[stage][unit] for cost in answered for stage in ("read", "direct"))


def gain_by_tau(runs):
    """Runs in which everyone was adapted -> [(tau, gain if those below it are adapted, gain if the
    others are)], in points, for each tau at which something changes, beginning with 0."""
    pairs = [pair for run in runs for pair in run if pair[0]["margin"] is not None]
    changes = []
    for before, after in pairs:
        sure = 0.0 if before["flaw"] else before["margin"]  # as `doubtful_tools` has it
        changes.append((sure, 100 * (after["grade"][1] - before["grade"][1])))
    below, above = 0, sum(change for _, change in changes)
    points = [(0.0, 0.0, above / len(pairs))]
    for margin, change in sorted(changes):
        below += change
        above -= change
        points.append((margin, below / len(pairs), above / len(pairs)))
    return points


# ------------------------------------------------------------------------------------- tables
def is_small(row):
    return (row["margin"] or 0.0) < ttsi.Config.tau


PARTS = {  # of the items, by TT-SI's direct rows
    "two tools and more": lambda row: row["offered"] > 1,
    "neither flaw nor small margin": lambda row: not row["flaw"] and not is_small(row),
    "a flaw alone": lambda row: row["flaw"] and not is_small(row),
    "a small margin alone": lambda row: is_small(row) and not row["flaw"],
    "both": lambda row: row["flaw"] and is_small(row),
}


def part(places, name):
    """{place: {seed: run}} -> what of it is in a part, but for places without."""
    found = {}
    for place, runs in places.items():
        for seed, run in runs.items():
            items = [pair for pair in run if PARTS[name](pair[0])]
            if items:
                found.setdefault(place, {})[seed] = items
    return found


def against(ours, theirs):
    """{seed: run} of two methods -> runs, from theirs to ours, of the seeds that both have."""
    runs = []
    for seed in ours.keys() & theirs.keys():
        mine = {row["id"]: row for _, row in ours[seed]}
        runs.append([(row, mine[row["id"]]) for _, row in theirs[seed] if row["id"] in mine])
    return runs


def as_text(points, low, high):
    return f"{points:+.1f} [{low:+.1f}, {high:+.1f}]"


def cells(label, place, runs, ours, scored):
    """A method's runs at one place, those of TT-SI on the same items, and whether with F1 -> the
    cells of a line, by column."""
    pairs = sum(runs, [])
    before, after = zip(*pairs, strict=True)
    gains = [gain for items in changes_of(runs).values() for gain in items]
    adapted = sum(row["decision"] == "adapted" for row in after)
    kept = [draft["verdict"] == "kept" for row in after for draft in row["drafts"]]
    seeds = f", {len(runs)} seeds" if len(runs) > 1 else ""

    found = {"": label, "items": f"{len(runs[0])}, {place}{seeds}"}
    for kind, column in enumerate(("right tool, %", "right call, %")):
        sides = [100 * statistics.mean(r["grade"][kind] for r in rows) for rows in (before, after)]
        found[column] = "{:.1f} -> {:.1f}".format(*sides)
    found["difference [95 %]"] = as_text(*difference([runs]))
    repaired, broken = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    found["repaired / broken"] = f"{repaired} / {broken}"
    found["adapted"] = f"{adapted / len(runs):.0f}"
    found["drafts kept"] = f"{100 * statistics.mean(kept):.0f} %" if kept else ""
    for unit, column in enumerate(("seconds", "tokens")):
        found[column] = f"{cost_ratio(pairs, unit):.1f} x"
    if scored:
        sides = zip(f1(before), f1(after), strict=True)
        found["F1 of names, arguments"] = ", ".join(f"{a:.1f} -> {b:.1f}" for a, b in sides)
    if ours:
        found["TT-SI against it [95 %]"] = as_text(*difference([ours]))
    return found


def markdown(lines):
    """Dicts of cells -> a table; a column that a line lacks is empty there."""
    columns = [*dict.fromkeys(column for line in lines for column in line)]
    rows = [columns, ["---"] * len(columns)]
    rows += [[line.get(column, "") for column in columns] for line in lines]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


# ------------------------------------------------------------------------------------ figures
# Colours of middle lightness read on white and on black.
UP, DOWN, NEITHER = "#2b8cd8", "#e0523f", "#8a8a8a"
LINES = ("#2b8cd8", "#e08a1e", "#2fa26b", "#b06fd0", "#e0523f", "#8a8a8a")
WIDTH = 390 / 72  # inches: the unit of an SVG is a 72nd of one
GREY = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
STYLE = dict.fromkeys(GREY, NEITHER) | {
    "svg.hashsalt": "ttsi",  # or ids differ from run to run
    "svg.fonttype": "none",  # text stays text
    "font.size": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
# Nothing of when and with what it was made.
SAVE = {"transparent": True, "metadata": {"Date": None, "Creator": None}}


@matplotlib.rc_context(STYLE)
def forest(lines, path):
    """[(heading,), or (label, points, low, high)] -> differences with their intervals, one below
    the other, each under its label."""
    height = 0.46 * len(lines) + 0.8  # inches
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.subplots()
    figure.subplots_adjust(left=0.03, right=0.97, top=1 - 0.1 / height, bottom=0.7 / height)
    ends = [-1, 1, *(end for line in lines for end in line[2:])]
    room = 0.05 * (max(ends) - min(ends))
    axes.set_xlim(min(ends) - room, max(ends) + room)
    axes.set_ylim(len(lines), 0)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.axvline(0, color=NEITHER, linewidth=1, alpha=0.5)
    axes.set_xlabel("points of right calls over direct answers")
    edges = axes.get_yaxis_transform()  # text begins at the left edge and ends at the right one
    for at, (label, *numbers) in enumerate(lines):
        if not numbers:
            axes.text(0, at + 0.7, label, weight="bold", transform=edges)
            continue
        points, low, high = numbers
        colour = UP if low > 0 else NEITHER
        if high < 0:
            colour = DOWN
        axes.text(0, at + 0.42, label, transform=edges)
        axes.text(1, at + 0.42, as_text(*numbers), transform=edges, ha="right", color=colour)
        axes.plot([low, high], [at + 0.7, at + 0.7], color=colour, linewidth=2.5)
        axes.plot(points, at + 0.7, "o", color=colour, markersize=7)
    figure.savefig(path, **SAVE)


@matplotlib.rc_context(STYLE)
def tau_curves(curves, path):
    """{label: gain_by_tau's points} -> the gain over tau; dashed, if the others are adapted. On
    the scale of -log10(1 - tau), since most margins are close to 1."""

    def place(tau):
        return -math.log10(max(1 - tau, 1e-4))

    figure = Figure(figsize=(WIDTH, 4.6))
    axes = figure.subplots()
    axes.axhline(0, color=NEITHER, linewidth=1)
    axes.axvline(place(ttsi.Config.tau), color=NEITHER, linewidth=1, linestyle=":")
    for colour, (label, points) in zip(LINES, curves.items(), strict=False):
        points = [*points, (1.0, *points[-1][1:])]  # up to the edge
        taus, below, above = zip(*points, strict=True)
        x = [place(tau) for tau in taus]
        axes.step(x, below, where="post", color=colour, linewidth=2.5, label=label)
        axes.step(x, above, where="post", color=colour, linewidth=1.5, linestyle="--")
    ticks = (0, 0.5, 0.9, 0.99, 0.999, 0.9999)
    axes.set_xticks([place(tau) for tau in ticks], [f"{tau:g}" for tau in ticks])
    axes.set_xlim(0, place(1.0))
    axes.set_xlabel(f"tau (dotted: the default, {ttsi.Config.tau})")
    axes.set_ylabel("gain, points of right calls")
    title = "adapted below tau; dashed: the others"
    figure.legend(loc="upper left", frameon=False, ncols=2, title=title)
    top = 0.87 - 0.05 * math.ceil(len(curves) / 2)
    figure.subplots_adjust(left=0.15, right=0.92, bottom=0.13, top=top)
    figure.savefig(path, **SAVE)
