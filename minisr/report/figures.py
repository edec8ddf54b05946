"""The report's pictures: each a small function from plain numbers to the text of an SVG.

An *estimate* is (value, low, high) with its 95 % interval, or None where nothing was measured. A model has
the same colour and marker in every picture. All are drawn as wide as a phone, so that their text is
never shown smaller than it is drawn.
"""

import functools
import io
import re
from html import escape
from math import ceil

from minisr.runner.files import need

INCHES = 4.6  # 331 pixels at an SVG's 72 to the inch
GREY = "#5F6368"
# SFT, then M1, M2, ... in turn: after Okabe and Ito, whom the colour-blind can tell apart, for light grey.
COLOURS = (GREY, "#D55E00", "#0072B2", "#009E73", "#AA3377", "#A6761D", "#56B4E9", "#332288", "#E0A100",
           "#882255")
MARKERS = "soD^vPX*<>"
PARTS = ("#3B4A5E", "#C3C8CF", "#C98B1B", "#8A93A0")  # of a bar: none of them a model's colour
STYLE = {
    "svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"], "font.size": 11,
    "text.parse_math": False, "axes.unicode_minus": False,
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY, "axes.grid": True,
    "grid.color": "#DADCE0", "axes.axisbelow": True, "legend.frameon": False, "legend.handletextpad": 0.3,
    "legend.columnspacing": 1.0, "lines.markersize": 6}


def picture(draw):
    """draw(axes, *numbers) as a function (title, *numbers) -> SVG, the same bytes for the same numbers."""
    @functools.wraps(draw)
    def drawn(title: str, *numbers, **options) -> str:
        matplotlib, file = need("matplotlib", "report"), io.StringIO()
        with matplotlib.rc_context():
            matplotlib.rcdefaults()  # nobody's own style
            matplotlib.rcParams.update(STYLE | {"svg.hashsalt": title})  # no two pictures share an id
            figure = need("matplotlib.figure", "report").Figure((INCHES, 3.0), layout="tight")
            axes = figure.add_subplot()
            draw(axes, *numbers, **options)
            axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=4, borderaxespad=0.2)
            figure.savefig(file, format="svg", metadata={"Date": None})
        svg = file.getvalue()[file.getvalue().index("<svg"):]
        svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.S)
        svg = re.sub(r'<g id="[^"]*"', "<g", svg)
        svg = re.sub(r' (width|height)="[0-9.]+pt"', "", svg, count=2)
        return svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
    return drawn


@picture
def by_model(axes, names: list[str], ways: dict, label: str, share: bool = False):
    """Models from left to right; ways: {"sampled": [estimate of each model], ...}, two at most."""
    for (way, estimates), shift, fill in zip(ways.items(), (-0.08, 0.08), ("full", "none")):
        for x, (name, estimate) in enumerate(zip(names, estimates)):
            _point(axes, estimate, x + shift, name, fillstyle=fill)
        axes.plot([], [], "o", color=GREY, fillstyle=fill, label=way)
    every = ceil(len(names) / 8)
    axes.set_xticks(range(0, len(names), every), names[::every])
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_ylabel(label)
    if share:
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter("{x:.0%}")


@picture
def rows(axes, labels: list[str], models: dict, label: str, share: bool = False, seeds: dict | None = None):
    """A group of points for each label; models: {"M1": [estimate in each group], ...}; seeds: {"M1": [the
    values behind each]}, drawn as ticks."""
    y, middles = 0, []
    for i in range(len(labels)):
        here = [name for name, estimates in models.items() if estimates[i]]
        middles.append(y + max(len(here) - 1, 0) / 2)
        for name in here:
            values = seeds[name][i] if seeds else []
            axes.plot(values, [y] * len(values), "|", color=_look(name)["color"], alpha=0.6)
            _point(axes, models[name][i], y, name, across=True)
            y += 1
        y += not here  # room for the label
        axes.axhline(y, color="#DADCE0", linewidth=0.8)
        y += 1
    for name in models:
        axes.plot([], [], linestyle="none", label=name, **_look(name))
    axes.figure.set_figheight(1.0 + 0.14 * y)
    _groups(axes, labels, middles, label)
    axes.set_ylim(y - 1, -1)
    if share:
        axes.set_xlim(min(-0.02, axes.get_xlim()[0]), max(1.02, axes.get_xlim()[1]))
        axes.xaxis.set_major_formatter("{x:.0%}")


@picture
def stacked(axes, labels: list[str], parts: dict, label: str, marks: tuple = ()):
    """A bar a label, made of parts: {"win": [share in each bar], ...}; marks: (bar, estimate) in it."""
    axes.figure.set_figheight(1.05 + 0.32 * len(labels))
    left = [0.0] * len(labels)
    for (part, shares), colour in zip(parts.items(), PARTS):
        axes.barh(range(len(labels)), shares, left=left, height=0.62, color=colour, label=part)
        left = [a + b for a, b in zip(left, shares)]
    for y, (_, low, high) in marks:
        axes.plot([low, high], [y, y], color="white", linewidth=4)
        axes.plot([low, high], [y, y], color="black", linewidth=1.4)
    _groups(axes, labels, range(len(labels)), label)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter("{x:.0%}")


@picture
def histogram(axes, labels: list[str], models: dict, xlabel: str, ylabel: str):
    """Bars side by side over the labels; models: {"M1": [share at each label], ...}."""
    width = 0.84 / len(models)
    for k, (name, shares) in enumerate(models.items()):
        middles = [x + (k - (len(models) - 1) / 2) * width for x in range(len(labels))]
        axes.bar(middles, shares, width * 0.94, color=_look(name)["color"], label=name)
    axes.set_xticks(range(len(labels)), labels)
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(False, axis="x")


@picture
def calibration(axes, models: dict):
    """Mean given score over the true one, beside the diagonal; models: {"M1": [(true, given, count)]}."""
    axes.plot([0, 5], [0, 5], color=GREY, linewidth=1, linestyle="--")
    largest = max(count for points in models.values() for _, _, count in points)
    for k, (name, points) in enumerate(models.items()):
        x = [true + (k - (len(models) - 1) / 2) * 0.09 for true, _, _ in points]
        axes.plot(x, [given for _, given, _ in points], color=_look(name)["color"], linewidth=1)
        axes.scatter(x, [given for _, given, _ in points], [12 + 110 * n / largest for _, _, n in points],
                     alpha=0.8, linewidth=0, **_look(name))
        axes.plot([], [], linestyle="none", label=name, **_look(name))
    axes.set(xlabel="true score", ylabel="mean score given", xlim=(-0.3, 5.3), ylim=(-0.3, 5.3))


@picture
def curves(axes, models: dict, label: str, reference: float):
    """A line a model over the steps: thin as logged, thick the mean around it; dashed: the reference."""
    axes.axhline(reference, color=GREY, linewidth=1, linestyle="--")
    for name, values in models.items():
        colour, around = _look(name)["color"], max(len(values) // 20, 1)
        windows = [values[max(i - around, 0):i + around + 1] for i in range(len(values))]
        axes.plot(values, color=colour, linewidth=0.7, alpha=0.5)
        axes.plot([sum(w) / len(w) for w in windows], color=colour, linewidth=2, label=name)
    axes.set(xlabel="step", ylabel=label)


def _look(name: str) -> dict:
    """A model's colour and marker."""
    number = int(name[1:]) if re.fullmatch(r"M[0-9]{1,4}", name) else 0
    number = number and 1 + (number - 1) % (len(COLOURS) - 1)
    return {"color": COLOURS[number], "marker": MARKERS[number]}


def _point(axes, estimate, place: float, name: str, across: bool = False, **how) -> None:
    """One estimate with its interval at a place of the other axis."""
    if estimate is None:
        return
    value, *interval = estimate
    line, point = (interval, [place, place]), ([value], [place])
    axes.plot(*(line if across else line[::-1]), color=_look(name)["color"], linewidth=1.6)
    axes.plot(*(point if across else point[::-1]), linestyle="none", **_look(name), **how)


def _groups(axes, labels: list[str], places, xlabel: str) -> None:
    """Labels from top to bottom, long ones cut."""
    axes.set_yticks(places, [name if len(name) < 20 else name[:18] + "…" for name in labels])
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(xlabel)
