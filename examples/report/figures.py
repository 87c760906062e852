# SPDX-License-Identifier: MIT
"""Draws all runs against iterations, as SVG for a page that has page.css.

matplotlib draws with marker colours that stand for variables of the style sheet,
so that the page decides on the real ones, by the reader's light or dark scheme.
"""

import io
import math
import re
from xml.etree import ElementTree

import matplotlib.figure
import matplotlib.style
import matplotlib.ticker
import numpy
import pandas

from curves import envelope, smooth, without_repeats
from read import GLOW, TRAIN

COLOURS = 8  # of runs; more of them differ by their dashes
DASHES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
INK, MUTED, GRID, PANEL = "#010101", "#020202", "#030303", "#040404"
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", PANEL: "panel"} | {
    f"#0500{i:02x}": f"run-{i}" for i in range(COLOURS)
}
WIDTH, HEIGHT = 400, 270  # points, which become units of the SVG
LABEL_GAP = 13  # between the base lines of two labels
MOST_LABELS = 14  # as many as fit beside a figure
MEBIBYTE = 1024 * 1024
UNUSED = ("metadata", "style")  # elements of an SVG inside a page
STYLE = {
    "svg.fonttype": "none",
    "font.size": 11,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "ytick.major.size": 0,
    "xtick.major.size": 3,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}


def identity_of(run):
    """What tells a run's lines and labels from others."""
    return {"color": f"#0500{run.number % COLOURS:02x}", "gid": f"of-{run.key}"}


class Figure:
    """One quantity of all runs against iterations."""

    def __init__(self, runs):
        figure = matplotlib.figure.Figure(figsize=(WIDTH / 72, HEIGHT / 72))
        figure.patch.set_visible(False)
        self.labelled = len(runs) <= MOST_LABELS
        width = 0.675 if self.labelled else 0.865
        self.axes = figure.add_axes((0.115, 0.15, width, 0.82))
        self.axes.patch.set_visible(False)
        self.axes.set_xlabel("iterations", labelpad=3)
        self.last = max(run.iteration for run in runs) or 1
        self.axes.set_xlim(0, self.last)
        self.ends = {}  # of each run's line
        self.seen = []  # columns that have to be seen whole

    def plot(self, run, at, values, **style):
        self.axes.plot(at, values, **identity_of(run), **style)

    def behind(self, run, values):
        """Raw rows: faint, and cut where they leave the figure."""
        self.plot(run, values.index, values, alpha=0.28, linewidth=0.8, zorder=1)

    def line(self, run, values, **style):
        dashes = DASHES[run.number // COLOURS % len(DASHES)]
        self.plot(run, values.index, values, linestyle=dashes, **style)
        self.show(run, values)

    def points(self, run, values):
        """Few and exact values, such as those of evaluations."""
        style = {"linestyle": (0, (2, 2)), "linewidth": 1, "zorder": 3}
        if len(values) <= 40:
            style |= {"marker": "o", "markersize": 4.5, "markeredgewidth": 1.4}
            style["markerfacecolor"] = PANEL
        self.plot(run, values.index, values, clip_on=False, **style)
        self.show(run, values)

    def show(self, run, values):
        if values.empty:
            return
        self.seen.append(values)
        end = (values.index[-1], values.iloc[-1])
        if run not in self.ends or end[0] >= self.ends[run][0]:
            self.ends[run] = end

    def fit(self, bottom=None, top=math.inf, logarithmic_beyond=math.inf):
        """Chooses a scale that shows all that has to be seen: a logarithmic one
        where its ends are more than a factor apart."""
        if not self.seen:
            return
        seen = pandas.concat(self.seen)
        low, high = seen.min(), seen.max()
        if low > 0 and high > logarithmic_beyond * low:
            self.axes.set_yscale("log")
            self.axes.set_ylim(low / 1.3, high * 1.3)
            return
        room = 0.06 * (high - low) or 0.06 * abs(high) or 1
        low = low - room if bottom is None else bottom
        self.axes.set_ylim(low, min(top, high + room))

    @property
    def logarithmic(self):
        return self.axes.get_yscale() == "log"

    def format_ticks(self):
        x, y, ticker = self.axes.xaxis, self.axes.yaxis, matplotlib.ticker
        x.set_major_locator(ticker.MaxNLocator(4, integer=True))
        x.set_major_formatter("{x:,.0f}")
        if not self.logarithmic:
            y.set_major_locator(ticker.MaxNLocator(5))
            y.set_major_formatter(tick_text)
            return
        y.set_minor_formatter(ticker.NullFormatter())
        y.set_major_formatter("{x:g}")
        low, high = self.axes.get_ylim()
        if high < 100 * low:
            y.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))

    def write_labels(self):
        """The runs' letters, and networks or labels, at the ends of their lines.

        Names of lines that end at the right edge stand in the margin, moved
        apart where they would overlap. A line that ends earlier has its letter
        there.
        """
        if not self.labelled:
            return
        at_edge = [run for run, (x, _) in self.ends.items() if x >= 0.97 * self.last]
        heights = [self.height_of(*self.ends[run]) for run in at_edge]
        gap = LABEL_GAP / (HEIGHT * self.axes.get_position().height)
        margin = {"transform": self.axes.transAxes, "clip_on": False}
        for run, height, place in zip(at_edge, heights, spread(heights, gap)):
            self.plot(run, (1.008, 1.028), (height, place), linewidth=0.9, **margin)
            label = f"{run.key} {short(run.label or run.config['model'], 10)}"
            self.write(run, label, (1.035, place), xycoords="axes fraction")
        beside = {"xytext": (4, 0), "textcoords": "offset points"}
        for run, end in self.ends.items():
            if run not in at_edge:
                self.write(run, run.key, end, fontweight="bold", **beside)

    def write(self, run, text, place, **style):
        style |= {"va": "center", "annotation_clip": False}
        self.axes.annotate(text, place, **identity_of(run), **style)

    def height_of(self, x, y):
        """Where a point is, as a part of the figure's height."""
        place = self.axes.transData.transform((x, y))
        return min(max(self.axes.transAxes.inverted().transform(place)[1], 0), 1)

    def svg(self):
        data = io.StringIO()
        self.axes.figure.savefig(data, format="svg", metadata={"Date": None})
        return data.getvalue()


def tick_text(value, _):
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


def short(text, most):
    """Names that begin alike differ at their ends."""
    return text if len(text) <= most else "…" + text[1 - most :]


def spread(places, gap):
    """Moves places in 0 to 1 as little as is needed for gaps between them: up,
    and back down where they would leave at the top."""
    order = numpy.argsort(places, kind="stable")
    steps = gap * numpy.arange(len(places))
    moved = numpy.maximum.accumulate(numpy.asarray(places)[order] - steps) + steps
    result = numpy.empty(len(places))
    result[order] = numpy.minimum(moved, 1 - steps[::-1])
    return result


def inlined(svg, runs):
    """What is inside matplotlib's SVG, as a part of a page: without what only a
    file needs, in the page's colours, and what is of one run with its class and
    name."""
    names = {f"of-{run.key}": f"{run.key} {run.name}" for run in runs}
    root = ElementTree.fromstring(svg.encode())
    for element in list(root.iter()):
        element.tag = element.tag.split("}")[-1]
        element.text = element.text and element.text.strip() or None
        element.tail = None
        element[:] = [child for child in element if not child.tag.endswith(UNUSED)]
        attributes = {
            key.split("}")[-1]: inlined_value(value) for key, value in element.items()
        }
        identity = attributes.pop("id", "")
        if identity in names:
            attributes["class"] = identity
            ElementTree.SubElement(element, "title").text = names[identity]
        elif re.fullmatch("[mp][0-9a-f]{10}", identity):  # used by its hash
            attributes["id"] = identity
        element.attrib = attributes
    return "".join(ElementTree.tostring(child, encoding="unicode") for child in root)


def inlined_value(value):
    value = re.sub(r"font: (\d+ )?([\d.]+px) [^;]*", font_of_page, value)
    for marker, variable in VARIABLES.items():
        value = value.replace(marker, f"var(--{variable})")
    return re.sub(r"-?\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}", value)


def font_of_page(found):
    weight = f"font-weight: {found[1].strip()}; " if found[1] else ""
    return f"{weight}font-size: {found[2]}"


TRAIN_FIGURES = {
    "loss": dict(
        column="loss", summary="mean", tests="test_loss", logarithmic_beyond=20
    ),
    "accuracy": dict(
        column="accuracy", unit=0.01, summary="mean", tests="test_accuracy", top=101
    ),
    # A row's rate is that of the steps before it.
    "rate": dict(column="lr", drawstyle="steps-pre", bottom=0, logarithmic_beyond=5),
    "time": dict(column="ms_per_step", summary="median", bottom=0),
    "held": dict(column="held_bytes", unit=MEBIBYTE, bottom=0),
    "peak": dict(column="peak_bytes", unit=MEBIBYTE, bottom=0),
}
GLOW_FIGURES = {
    "loss": dict(column="loss", summary="mean", tests="test_bits_per_dim"),
    "error": dict(tests="reconstruction_error", logarithmic_beyond=5),
    "rate": TRAIN_FIGURES["rate"],
    "time": TRAIN_FIGURES["time"],
    "held": TRAIN_FIGURES["held"],
    "peak": TRAIN_FIGURES["peak"],
}
FIGURES = {TRAIN: TRAIN_FIGURES, GLOW: GLOW_FIGURES}


def draw(runs, column=None, unit=1, summary=None, tests=None, drawstyle=None, **scale):
    """A column of all runs: smoothed before its rows, or exact; with tests, or these
    alone."""
    figure = Figure(runs)
    for run in runs:
        rows = run.column(column) / unit if column else None
        if rows is None:
            pass
        elif summary:
            figure.behind(run, envelope(rows))
            figure.line(run, smooth(rows, summary))
        else:
            figure.line(run, envelope(without_repeats(rows)), drawstyle=drawstyle)
        if tests:
            figure.points(run, run.tests(tests) / unit)
    figure.fit(**scale)
    figure.format_ticks()
    figure.write_labels()
    return figure


def figures(runs):
    """Every figure of the page by its name: what is inside its SVG, and whether it
    has lines and a logarithmic scale."""
    found = {}
    for name, content in FIGURES[runs[0].program].items():
        # The salt makes identifiers that are unique on the page, yet repeatable.
        style = ["default", STYLE | {"svg.hashsalt": name}]
        with matplotlib.style.context(style):
            figure = draw(runs, **content)
            found[name] = {
                "svg": inlined(figure.svg(), runs),
                "empty": not figure.seen,
                "logarithmic": figure.logarithmic,
            }
    return found
