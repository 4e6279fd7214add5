"""Numbers, tables and figures of rows alone; for `python data/experiments.py`.

A run is what one method did at one place: [(the direct answer's row, its own row), ...] of all
items and seeds; lines are {a method's label: {place: run}}. Figures are SVG on a transparent
ground, for pages on white and on black, and as narrow as a telephone.
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


def changes_of(run):
    """-> {list of tools: [an item's change of right calls, points, in the mean of seeds]}"""
    items = {}
    for before, after in run:
        item = items.setdefault((after["tools"], after["id"]), [])
        item.append(100 * (after["grade"][1] - before["grade"][1]))
    changes = {}
    for (tools, _), item in items.items():
        changes.setdefault(tools, []).append(statistics.mean(item))
    return changes


def difference(*runs):
    """-> [points of right calls, and their 95 % interval]; of several runs each counts once."""
    changes = [changes_of(run) for run in runs]
    means = [statistics.mean(c for items in place.values() for c in items) for place in changes]
    drawn = torch.stack([bootstrap(place) for place in changes]).mean(0)
    quantiles = drawn.quantile(torch.tensor([0.025, 0.975], dtype=drawn.dtype))
    return [statistics.mean(means), *quantiles.tolist()]


def f1_counts(call, gold):
    """-> [names right, written, wanted, arguments right, written, wanted], as Hammer's scorer has
    them (github.com/MadeAgents/Hammer, evaluation/evaluate.py): values as text, without empty ones;
    another tool's are all wrong; of two empty calls one is right; no call is a wrong name."""
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
    return [200 * a / max(b + c, 1) for a, b, c in (sums[:3], sums[3:])]


def cost_ratio(run, unit):
    """Seconds (0) or tokens (1) of a method, as a multiple of those of direct answers."""
    spent = sum(cost[unit] for _, row in run for cost in row["cost"].values())
    answered = [row["cost"] for row, _ in run if row["cost"]]
    return spent / sum(cost[stage][unit] for cost in answered for stage in ("read", "direct"))


def gain_by_tau(run):
    """A run in which everyone was adapted -> [(tau, gain if those below it are adapted, gain if the
    others are)], in points, for each tau at which something changes, beginning with 0."""
    changes = []
    for before, after in run:
        sure = ttsi.certainty(before["margin"] or 0.0, before["flaw"], ttsi.Config())
        changes.append((sure, 100 * (after["grade"][1] - before["grade"][1])))
    below, above = 0, sum(change for _, change in changes)
    points = [(0.0, 0.0, above / len(run))]
    for margin, change in sorted(changes):
        below += change
        above -= change
        points.append((margin, below / len(run), above / len(run)))
    return points


# ------------------------------------------------------------------------------------- tables
def is_small(row):
    return (row["margin"] or 0.0) < ttsi.Config.tau


PARTS = {  # of the items, by TT-SI's direct rows
    "two tools and more": lambda row: row["offered"] > 1,
    "a flaw alone": lambda row: row["flaw"] and not is_small(row),
    "a small margin alone": lambda row: is_small(row) and not row["flaw"],
    "both": lambda row: row["flaw"] and is_small(row),
}


def parts(places):
    """TT-SI's {place: run} -> lines of its parts, but for empty ones and what is all of it."""
    lines = {}
    for name, is_in in PARTS.items():
        found = {place: [pair for pair in run if is_in(pair[0])] for place, run in places.items()}
        lines[f"TT-SI, {name}"] = {place: run for place, run in found.items() if run}
    return {label: found for label, found in lines.items() if found not in ({}, places)}


def against(ours, theirs):
    """Runs of two methods -> one from theirs to ours, of what both have."""
    mine = {(row["seed"], row["id"]): row for _, row in ours}
    both = [(row, mine.get((row["seed"], row["id"]))) for _, row in theirs]
    return [pair for pair in both if pair[1]]


def as_text(points, low, high):
    return f"{points:+.1f} [{low:+.1f}, {high:+.1f}]"


def cells(label, place, run, ours, scored):
    """A method's run, from it to TT-SI's, whether with F1 -> the cells of a line, by column."""
    before, after = zip(*run, strict=True)
    gains = [gain for items in changes_of(run).values() for gain in items]
    kept = [draft["verdict"] == "kept" for row in after for draft in row["drafts"]]
    adapted = sum(row["decision"] == "adapted" for row in after)
    seeds = len({row["seed"] for row in after})
    more = f", {seeds} seeds" if seeds > 1 else ""
    found = {"": label, "items": f"{len(run) / seeds:.0f}, {place}{more}"}
    for kind, column in enumerate(("right tool, %", "right call, %")):
        sides = [100 * statistics.mean(r["grade"][kind] for r in rows) for rows in (before, after)]
        found[column] = "{:.1f} -> {:.1f}".format(*sides)
    found["difference [95 %]"] = as_text(*difference(run))
    found["repaired / broken"] = f"{sum(g > 0 for g in gains)} / {sum(g < 0 for g in gains)}"
    found["adapted"] = f"{adapted / seeds:.0f}"
    found["drafts kept"] = f"{100 * statistics.mean(kept):.0f} %" if kept else ""
    for unit, column in enumerate(("seconds", "tokens")):
        found[column] = f"{cost_ratio(run, unit):.1f} x"
    if scored:
        sides = zip(f1(before), f1(after), strict=True)
        found["F1 of names, arguments"] = ", ".join(f"{a:.1f} -> {b:.1f}" for a, b in sides)
    if ours:
        found["TT-SI against it [95 %]"] = as_text(*difference(ours))
    return found


def table(lines, ours, scored):
    """Lines, TT-SI's {place: run}, and whether with F1 -> a table; what a line lacks is empty."""
    found = []
    for label, places in lines.items():
        for place, run in places.items():
            both = [] if label.startswith("TT-SI") else against(ours.get(place, []), run)
            found.append(cells(label, place, run, both, scored))
        if len(places) > 1:
            found.append({"": label, "items": f"mean of {len(places)}"})
            found[-1]["difference [95 %]"] = as_text(*difference(*places.values()))
    if not found:
        return "No rows yet.\n"
    columns = [*dict.fromkeys(column for line in found for column in line)]
    rows = [columns, ["---"] * len(columns)]
    rows += [[line.get(column, "") for column in columns] for line in found]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


# ------------------------------------------------------------------------------------ figures
# Colours of middle lightness read on white and on black.
UP, DOWN, NEITHER = "#2b8cd8", "#e0523f", "#8a8a8a"
LINES = ("#2b8cd8", "#e08a1e", "#2fa26b", "#b06fd0", "#e0523f", "#8a8a8a")
WIDTH = 390 / 72  # inches: the unit of an SVG is a 72nd of one
GREY = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
STYLE = dict.fromkeys(GREY, NEITHER)
STYLE |= {"font.size": 13, "axes.spines.top": False, "axes.spines.right": False}
# Ids do not differ from run to run, and text stays text.
STYLE |= {"svg.hashsalt": "ttsi", "svg.fonttype": "none"}
# Nothing of when and with what it was made.
SAVE = {"transparent": True, "metadata": {"Date": None, "Creator": None}}


@matplotlib.rc_context(STYLE)
def forest(lines, path):
    """Differences with their intervals, one below the other, each under its label."""
    shown = []
    for place in dict.fromkeys(place for places in lines.values() for place in places):
        shown.append((place,))
        for label, places in lines.items():
            if place in places:
                shown.append((label, *difference(places[place])))
    height = 0.46 * len(shown) + 0.8  # inches
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.subplots()
    figure.subplots_adjust(left=0.03, right=0.97, top=1 - 0.1 / height, bottom=0.7 / height)
    ends = [-1, 1, *(end for line in shown for end in line[2:])]
    room = 0.05 * (max(ends) - min(ends))
    axes.set_xlim(min(ends) - room, max(ends) + room)
    axes.set_ylim(len(shown), 0)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.axvline(0, color=NEITHER, linewidth=1, alpha=0.5)
    axes.set_xlabel("points of right calls over direct answers")
    edges = axes.get_yaxis_transform()  # text begins at the left edge and ends at the right one
    for at, (label, *numbers) in enumerate(shown):
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
def tau_curves(places, path):
    """{place: run} -> the gain over tau, by -log10(1 - tau), since most margins are close to 1."""

    def place(tau):
        return -math.log10(max(1 - tau, 1e-4))

    figure = Figure(figsize=(WIDTH, 4.6))
    axes = figure.subplots()
    axes.axhline(0, color=NEITHER, linewidth=1)
    axes.axvline(place(ttsi.Config.tau), color=NEITHER, linewidth=1, linestyle=":")
    for colour, (label, run) in zip(LINES, places.items(), strict=False):
        points = gain_by_tau(run)
        points.append((1.0, *points[-1][1:]))  # up to the edge
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
    top = 0.87 - 0.05 * math.ceil(len(places) / 2)
    figure.subplots_adjust(left=0.15, right=0.92, bottom=0.13, top=top)
    figure.savefig(path, **SAVE)
