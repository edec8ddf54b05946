"""The report's charts: each a small function from plain numbers to the text of an SVG.

An *estimate* is (value, low, high), a value with its 95 % interval, or None where nothing was measured. A
model has the same colour and marker in every chart. Each chart is as wide as the screen of a phone, so that
its text is never scaled down.
"""

import functools
import io
import re
from collections.abc import Iterable
from html import escape
from math import ceil

from minisr.runner.files import import_extra

WIDTH = 4.6  # inches: 331 pixels at the 72 pixels per inch of an SVG
GREY = "#5F6368"
LIGHT_GREY = "#DADCE0"
# SFT, then M1, M2, ...: based on the palette of Okabe and Ito, which colour-blind readers can tell apart.
COLOURS = (GREY, "#D55E00", "#0072B2", "#009E73", "#AA3377", "#A6761D", "#56B4E9", "#332288", "#E0A100",
           "#882255")
MARKERS = "soD^vPX*<>"
PARTS = ("#3B4A5E", "#C3C8CF", "#C98B1B", "#8A93A0")  # of a stacked bar: none is a model's colour
STYLE = {
    "svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"], "font.size": 11,
    "text.parse_math": False, "axes.unicode_minus": False,
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY, "axes.grid": True,
    "grid.color": LIGHT_GREY, "axes.axisbelow": True, "legend.frameon": False, "legend.handletextpad": 0.3,
    "legend.columnspacing": 1.0, "lines.markersize": 6}


def svg_chart(draw):
    """Decorator: turns draw(axes, *numbers) into a function (title, *numbers) -> SVG.

    The same numbers give the same bytes."""
    @functools.wraps(draw)
    def chart(title: str, *numbers, **options) -> str:
        matplotlib = import_extra("matplotlib", "report")
        file = io.StringIO()
        with matplotlib.rc_context():
            matplotlib.rcdefaults()  # ignore the user's own style
            matplotlib.rcParams.update(STYLE | {"svg.hashsalt": title})  # no two charts share an id
            figure = import_extra("matplotlib.figure", "report").Figure((WIDTH, 3.0), layout="tight")
            axes = figure.add_subplot()
            draw(axes, *numbers, **options)
            axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=4, borderaxespad=0.2)
            figure.savefig(file, format="svg", metadata={"Date": None})
        return _embeddable(file.getvalue(), title)
    return chart


def _embeddable(document: str, title: str) -> str:
    """The <svg> element of matplotlib's document, without metadata, group ids and fixed size."""
    svg = document[document.index("<svg"):]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r' (width|height)="[0-9.]+pt"', "", svg, count=2)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)


@svg_chart
def by_model(axes, names: list[str], series: dict, axis_label: str, is_share: bool = False):
    """Models from left to right; series: {"sampled": [estimate of each model], ...}, at most two."""
    for (name_of_series, estimates), shift, fill in zip(series.items(), (-0.08, 0.08), ("full", "none")):
        for x, (name, estimate) in enumerate(zip(names, estimates)):
            _vertical_estimate(axes, x + shift, estimate, name, fill)
        axes.plot([], [], "o", color=GREY, fillstyle=fill, label=name_of_series)
    every = ceil(len(names) / 8)  # label at most eight models
    axes.set_xticks(range(0, len(names), every), names[::every])
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_ylabel(axis_label)
    if is_share:
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter("{x:.0%}")


@svg_chart
def rows(axes, labels: list[str], models: dict, axis_label: str, is_share: bool = False,
         seeds: dict | None = None):
    """A group of points for each label, one point per model from top to bottom.

    models: {"M1": [estimate in each group], ...}; seeds: {"M1": [the values behind each estimate], ...},
    drawn as ticks."""
    y, middles = 0, []
    for group in range(len(labels)):
        measured = [name for name, estimates in models.items() if estimates[group]]
        middles.append(y + max(len(measured) - 1, 0) / 2)
        for name in measured:
            values = seeds[name][group] if seeds else []
            axes.plot(values, [y] * len(values), "|", color=_model_style(name)["color"], alpha=0.6)
            _horizontal_estimate(axes, y, models[name][group], name)
            y += 1
        if not measured:
            y += 1  # room for the label
        axes.axhline(y, color=LIGHT_GREY, linewidth=0.8)
        y += 1
    for name in models:
        axes.plot([], [], linestyle="none", label=name, **_model_style(name))
    axes.figure.set_figheight(1.0 + 0.14 * y)
    _label_groups(axes, labels, middles, axis_label)
    axes.set_ylim(y - 1, -1)
    if is_share:
        axes.set_xlim(min(-0.02, axes.get_xlim()[0]), max(1.02, axes.get_xlim()[1]))
        axes.xaxis.set_major_formatter("{x:.0%}")


@svg_chart
def stacked(axes, labels: list[str], parts: dict, axis_label: str, intervals: Iterable = ()):
    """One bar per label, made of parts: {"win": [share in each bar], ...}; intervals: (bar, estimate)."""
    axes.figure.set_figheight(1.05 + 0.32 * len(labels))
    left = [0.0] * len(labels)
    for (part, shares), colour in zip(parts.items(), PARTS):
        axes.barh(range(len(labels)), shares, left=left, height=0.62, color=colour, label=part)
        left = [a + b for a, b in zip(left, shares)]
    for y, (_, low, high) in intervals:
        axes.plot([low, high], [y, y], color="white", linewidth=4)
        axes.plot([low, high], [y, y], color="black", linewidth=1.4)
    _label_groups(axes, labels, range(len(labels)), axis_label)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter("{x:.0%}")


@svg_chart
def histogram(axes, labels: list[str], models: dict, xlabel: str, ylabel: str):
    """Bars side by side above each label; models: {"M1": [share at each label], ...}."""
    width = 0.84 / len(models)
    for k, (name, shares) in enumerate(models.items()):
        middles = [x + (k - (len(models) - 1) / 2) * width for x in range(len(labels))]
        axes.bar(middles, shares, width * 0.94, color=_model_style(name)["color"], label=name)
    axes.set_xticks(range(len(labels)), labels)
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(False, axis="x")


@svg_chart
def calibration(axes, models: dict):
    """Mean score given by the judge against the true score, with the diagonal.

    models: {"M1": [(true score, mean score given, count), ...], ...}; a larger mark stands for more
    responses."""
    axes.plot([0, 5], [0, 5], color=GREY, linewidth=1, linestyle="--")
    largest = max(count for points in models.values() for _, _, count in points)
    for k, (name, points) in enumerate(models.items()):
        shift = (k - (len(models) - 1) / 2) * 0.09  # so that models do not hide each other
        x = [true_score + shift for true_score, _, _ in points]
        y = [given for _, given, _ in points]
        areas = [12 + 110 * count / largest for _, _, count in points]
        axes.plot(x, y, color=_model_style(name)["color"], linewidth=1)
        axes.scatter(x, y, areas, alpha=0.8, linewidth=0, **_model_style(name))
        axes.plot([], [], linestyle="none", label=name, **_model_style(name))
    axes.set(xlabel="true score", ylabel="mean score given", xlim=(-0.3, 5.3), ylim=(-0.3, 5.3))


@svg_chart
def curves(axes, models: dict, axis_label: str, reference: float):
    """One line per model over the optimizer steps.

    Thin: as logged; thick: moving average; dashed: the reference value."""
    axes.axhline(reference, color=GREY, linewidth=1, linestyle="--")
    for name, values in models.items():
        colour = _model_style(name)["color"]
        axes.plot(values, color=colour, linewidth=0.7, alpha=0.5)
        axes.plot(_moving_average(values), color=colour, linewidth=2, label=name)
    axes.set(xlabel="step", ylabel=axis_label)


def _moving_average(values: list[float]) -> list[float]:
    """The mean of each value and its neighbours, a twentieth of all on either side."""
    reach = max(len(values) // 20, 1)
    averages = []
    for i in range(len(values)):
        window = values[max(i - reach, 0):i + reach + 1]
        averages.append(sum(window) / len(window))
    return averages


def _model_style(name: str) -> dict:
    """A model's colour and marker. SFT has the first; M1, M2, ... take turns with the others."""
    if name == "M0":
        return {"color": GREY, "marker": "x"}
    number = int(name[1:]) if re.fullmatch(r"M[0-9]{1,4}", name) else 0
    if number > 0:
        number = 1 + (number - 1) % (len(COLOURS) - 1)
    return {"color": COLOURS[number], "marker": MARKERS[number]}


def _vertical_estimate(axes, x: float, estimate, name: str, fill: str) -> None:
    """A point at x with its interval as a vertical line."""
    if estimate is not None:
        value, low, high = estimate
        axes.plot([x, x], [low, high], color=_model_style(name)["color"], linewidth=1.6)
        axes.plot([x], [value], linestyle="none", fillstyle=fill, **_model_style(name))


def _horizontal_estimate(axes, y: float, estimate, name: str) -> None:
    """A point at y with its interval as a horizontal line."""
    value, low, high = estimate
    axes.plot([low, high], [y, y], color=_model_style(name)["color"], linewidth=1.6)
    axes.plot([value], [y], linestyle="none", **_model_style(name))


def _label_groups(axes, labels: list[str], places: Iterable, xlabel: str) -> None:
    """Labels from top to bottom; long ones are cut."""
    axes.set_yticks(places, [name if len(name) < 20 else name[:18] + "…" for name in labels])
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(xlabel)
