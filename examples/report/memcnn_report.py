#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Turns results directories of memcnn_train into one page to look at.

    python3 memcnn_report.py RESULTS_DIR... [--output FILE] [--title TEXT]

The page is one HTML file that needs nothing beside it: curves of all runs in
one figure each, their results, and what the paper of Python MemCNN published
for the same networks. It needs matplotlib, and is the same, byte for byte, for
the same files. docs/report.md says what is on it.
"""

import argparse
import bisect
import dataclasses
import html
import io
import itertools
import json
import math
import os
import pathlib
import re
import sys
import tempfile
import xml.etree.ElementTree

PROGRAM = "memcnn_report"
MEBIBYTE = 1024 * 1024


class ReportError(Exception):
    """What the user has to know, and can do something about."""


# --- What was published ------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Published:
    """A network's figures on one data set: accuracy in %, time in minutes on a
    GTX 1080, activations in what the paper calls MB."""

    tensorflow_accuracy: float
    tensorflow_minutes: int
    memcnn_accuracy: float
    memcnn_minutes: int
    activations: float


def hours(hours_and_minutes):
    whole, minutes = hours_and_minutes.split(":")
    return 60 * int(whole) + int(minutes)


# Tables 2a, 2b and 3 of van de Leemput et al. 2019. Table 3 names no data set.
ACTIVATIONS = {
    "resnet32": 238.6,
    "resnet110": 810.7,
    "resnet164": 2452.8,
    "revnet38": 85.6,
    "revnet110": 85.7,
    "revnet164": 432.7,
}
PUBLISHED = {
    (data_set, model): Published(
        tensorflow_accuracy,
        hours(tensorflow_time),
        memcnn_accuracy,
        hours(memcnn_time),
        ACTIVATIONS[model],
    )
    for data_set, rows in {
        "cifar10": (
            ("resnet32", 92.74, "2:04", 92.86, "1:51"),
            ("resnet110", 93.99, "4:11", 93.55, "2:51"),
            ("resnet164", 94.57, "11:05", 94.80, "4:59"),
            ("revnet38", 93.14, "2:17", 92.80, "2:09"),
            ("revnet110", 94.02, "6:59", 94.10, "3:42"),
            ("revnet164", 94.56, "13:09", 94.90, "7:21"),
        ),
        "cifar100": (
            ("resnet32", 69.10, "1:58", 69.81, "1:51"),
            ("resnet110", 73.30, "6:44", 72.40, "2:39"),
            ("resnet164", 76.79, "10:59", 76.47, "3:45"),
            ("revnet38", 71.17, "2:20", 69.90, "2:16"),
            ("revnet110", 74.00, "7:03", 73.30, "3:50"),
            ("revnet164", 76.39, "13:12", 76.90, "7:17"),
        ),
    }.items()
    for model, tensorflow_accuracy, tensorflow_time, memcnn_accuracy, memcnn_time in rows
}
PAIRS = (
    ("resnet32", "revnet38"),
    ("resnet110", "revnet110"),
    ("resnet164", "revnet164"),
)
PUBLISHED_RECIPE = {
    "iterations": 80000,
    "batch_size": 100,
    "learning_rate": 0.1,
    "momentum": 0.9,
    "weight_decay": 2e-4,
}
MODEL_NAMES = {
    "resnet32": "ResNet-32",
    "resnet110": "ResNet-110",
    "resnet164": "ResNet-164",
    "revnet38": "RevNet-38",
    "revnet110": "RevNet-110",
    "revnet164": "RevNet-164",
}
DATA_SET_NAMES = {
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "synthetic": "embedded synthetic images",
}

# --- Reading results directories ---------------------------------------------

CONFIG_FIELDS = {
    "model": str,
    "dataset": str,
    "iterations": int,
    "batch_size": int,
    "learning_rate": float,
    "momentum": float,
    "weight_decay": float,
    "seed": int,
    "engine": str,
}
RUN_FIELDS = {
    "device": str,
    "threads": int,
    "parameters": int,
    "parameter_bytes": int,
    "memcnn": str,
    "libtorch": str,
}
ROW_FIELDS = (
    "accuracy",
    "top5",
    "lr",
    "ms_per_step",
    "data_ms_per_step",
    "held_bytes",
    "peak_bytes",
    "test_loss",
    "test_accuracy",
    "test_top5",
)
STEP_FIELDS = (
    "median_ms_per_step",
    "held_after_forward_bytes",
    "peak_of_the_step_bytes",
)
KINDS = {
    str: "text",
    int: "a whole number",
    float: "a number",
    dict: "an object",
    list: "a list",
}


def shown(value):
    """A value as JSON, short enough for a message."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def is_a(value, kind):
    if isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if kind is float else kind)


def field(holder, name, kind, where):
    """A required member of a JSON object, of the given kind."""
    if name not in holder:
        raise ReportError(
            f'{where}: expected "{name}", but it is missing. '
            "Give the --results-dir of a run of memcnn_train."
        )
    value = holder[name]
    if not is_a(value, kind):
        raise ReportError(
            f'{where}: expected "{name}" to be {KINDS[kind]}, but got '
            f"{shown(value)}. Give the --results-dir of a run of memcnn_train."
        )
    return value


def number(holder, name, where):
    """A number of a JSON object; nan where there is none, or null.

    JSON has no infinities: a diverged loss is null in the program's files.
    """
    value = holder.get(name)
    if value is None:
        return math.nan
    if not is_a(value, float):
        raise ReportError(
            f'{where}: expected "{name}" to be a number, but got '
            f"{shown(value)}. Repair that line, or run memcnn_train again."
        )
    try:
        value = float(value)
    except OverflowError:
        value = math.inf
    return value if math.isfinite(value) else math.nan


def read_bytes(path):
    try:
        return path.read_bytes()
    except OSError as error:
        raise ReportError(
            f"{path}: expected a file that can be read, but got: "
            f"{error.strerror}. Give the --results-dir of a run of memcnn_train."
        ) from error


def parse(data, path, line=None):
    """The JSON object in `data`, which is line `line` of its file, or all."""
    where = f"{path}:{line}" if line else f"{path}"
    try:
        value = json.loads(data.decode("utf-8"))
    except json.JSONDecodeError as error:
        raise ReportError(
            f"{path}:{line or error.lineno}: expected JSON, but got: {error.msg} "
            f"(column {error.colno}). Repair that line, or run memcnn_train again."
        ) from error
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ReportError(
            f"{where}: expected JSON in UTF-8, but got what cannot be read. "
            "Repair it, or run memcnn_train again."
        ) from error
    if not isinstance(value, dict):
        raise ReportError(
            f"{where}: expected a JSON object, but got {shown(value)}. "
            "Repair that line, or run memcnn_train again."
        )
    return value


def read_row(holder, where):
    row = {name: number(holder, name, where) for name in ROW_FIELDS}
    row["iteration"] = field(holder, "iteration", int, where)
    if "loss" not in holder:
        field(holder, "loss", float, where)
    row["loss"] = number(holder, "loss", where)
    return row


def check_order(rows, row, where):
    if rows and row["iteration"] <= rows[-1]["iteration"]:
        raise ReportError(
            f'{where}: expected "iteration" to rise above '
            f"{rows[-1]['iteration']} of the line before, but got "
            f"{row['iteration']}. Repair that line, or run memcnn_train again."
        )


def read_log(path):
    """The rows of a log, and whether its last line was cut off."""
    lines = read_bytes(path).split(b"\n")
    last = lines.pop()  # what follows the last end of a line
    rows = []
    for count, line in enumerate(lines, start=1):
        where = f"{path}:{count}"
        row = read_row(parse(line, path, count), where)
        check_order(rows, row, where)
        rows.append(row)
    if not last:
        return rows, False
    # The program writes a line with its end at once, so this one is a part of
    # a line, or has all of it but the end.
    where = f"{path}:{len(lines) + 1}"
    try:
        holder = parse(last, path, len(lines) + 1)
    except ReportError:
        return rows, True
    row = read_row(holder, where)
    check_order(rows, row, where)
    return rows + [row], False


@dataclasses.dataclass
class Run:
    """One results directory, checked."""

    name: str
    key: str  # A, B, ...
    config: dict
    info: dict  # of run.json, without the configuration
    rows: list
    results: dict  # numbers of a finished run, else empty
    comparison: dict  # of a finished run that was compared, else empty
    notes: list

    @property
    def finished(self):
        return bool(self.results)

    @property
    def iteration(self):
        """The last iteration that is known to be done."""
        if self.finished:
            return self.config["iterations"]
        return self.rows[-1]["iteration"] if self.rows else 0

    def column(self, name):
        """Iterations and values of the rows that have the field."""
        found = [
            (row["iteration"], row[name])
            for row in self.rows
            if not math.isnan(row[name])
        ]
        return [at for at, _ in found], [value for _, value in found]

    def tests(self, name):
        """As column(), with the evaluation at the end of the run."""
        at, values = self.column(name)
        if self.finished and not math.isnan(self.results[name]):
            if not at or at[-1] < self.iteration:
                at, values = at + [self.iteration], values + [self.results[name]]
            else:
                values = values[:-1] + [self.results[name]]
        return at, values

    def last_test(self, name):
        values = self.tests(name)[1]
        return values[-1] if values else math.nan

    def step(self, name):
        """What a step takes: of the results, else of the log."""
        if self.finished and not math.isnan(self.results[name]):
            return self.results[name]
        column, summary = {
            "median_ms_per_step": ("ms_per_step", median),
            "held_after_forward_bytes": ("held_bytes", max),
            "peak_of_the_step_bytes": ("peak_bytes", max),
        }[name]
        values = self.column(column)[1]
        return summary(values) if values else math.nan

    def training_ms(self):
        """Time of all logged steps: rows hold the mean of the steps since the
        row before."""
        total, before = 0.0, 0
        for row in self.rows:
            total += row["ms_per_step"] * (row["iteration"] - before)
            before = row["iteration"]
        return total if self.rows else math.nan


def middle_of(ordered):
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2


def median(values):
    return middle_of(sorted(values))


def read_config(run, path):
    where = f"{path}"
    config = field(run, "config", dict, where)
    for name, kind in CONFIG_FIELDS.items():
        field(config, name, kind, f'{where}: "config"')
    # Without iterations a run has evaluated only.
    for name, least in (("iterations", 0), ("batch_size", 1)):
        if config[name] < least:
            raise ReportError(
                f'{where}: expected "{name}" to be at least {least}, but got '
                f"{config[name]}. Give the --results-dir of a run of memcnn_train."
            )
    return config


def read_step(results, where):
    """The numbers of results.json, in one object."""
    numbers = {
        name: number(results, name, where)
        for name in ("test_accuracy", "test_loss", "test_top5")
    }
    step = field(results, "step", dict, where)
    return numbers | {name: number(step, name, where) for name in STEP_FIELDS}


def read_comparison(results, engine, where):
    """Measurements by engine, and the steps that they were taken over."""
    comparison = results.get("comparison")
    if comparison is None:
        return {}
    if not isinstance(comparison, dict):
        field(results, "comparison", dict, where)
    found = {"steps": field(comparison, "steps", int, where)}
    for name in dict.fromkeys((engine, "plain")):
        step = field(comparison, name, dict, where)
        found[name] = {entry: number(step, entry, where) for entry in STEP_FIELDS}
    return found


def read_run(directory, name, key):
    """Reads a results directory, or throws ReportError."""
    if not directory.is_dir():
        raise ReportError(
            f"{directory}: expected a directory, but there is none. "
            "Give the --results-dir of a run of memcnn_train."
        )
    path = directory / "run.json"
    info = parse(read_bytes(path), path)
    config = read_config(info, path)
    for entry, kind in RUN_FIELDS.items():
        field(info, entry, kind, path)
    run = Run(name, key, config, info, [], {}, {}, [])

    path = directory / "log.jsonl"
    if path.exists():
        run.rows, cut = read_log(path)
        if cut:
            run.notes.append(
                "The last line of the log was cut off while it was written, and "
                "is left out."
            )
    path = directory / "results.json"
    if path.exists():
        read_results(run, parse(read_bytes(path), path), path)
    note_divergence(run)
    return run


def read_results(run, results, path):
    where = f"{path}"
    if field(results, "config", dict, where) != run.config:
        run.notes.append(
            "results.json is of a run with other settings than run.json, and is "
            "left out."
        )
        return
    run.results = read_step(results, where)
    run.comparison = read_comparison(results, run.config["engine"], where)
    if not run.rows:
        for row in field(results, "rows", list, where):
            run.rows.append(read_row(row, where))


def note_divergence(run):
    lost = [row["iteration"] for row in run.rows if math.isnan(row["loss"])]
    if lost:
        run.notes.append(
            f"The loss is not a finite number in {len(lost):,} of {len(run.rows):,} "
            f"rows, for the first time at iteration {lost[0]:,}."
        )


def names_of(directories):
    """The shortest ends of the paths that tell them apart."""
    parts = [path.resolve().parts for path in directories]
    longest = max(len(part) for part in parts)
    for length in range(1, longest + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def keys():
    """A, B, ..., Z, AA, AB, ..."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    for length in itertools.count(1):
        for key in itertools.product(letters, repeat=length):
            yield "".join(key)


def read_runs(directories):
    unique = list({path.resolve(): path for path in directories}.values())
    return [
        read_run(path, name, key)
        for path, name, key in zip(unique, names_of(unique), keys())
    ]


# --- Curves ------------------------------------------------------------------

WINDOW = 0.02  # of the iterations that a run has logged
POINTS = 300  # of a line: about as many as its figure has pixels


def windows(at):
    """For each row, the first and one past the last row in its window."""
    half = WINDOW * (at[-1] - at[0]) / 2 if at else 0
    first = last = 0
    for centre in at:
        while at[first] < centre - half:
            first += 1
        while last < len(at) and at[last] <= centre + half:
            last += 1
        yield first, last


def running_mean(at, values):
    sums = [0.0, *itertools.accumulate(values)]
    return [
        (sums[last] - sums[first]) / (last - first) for first, last in windows(at)
    ]


def running_median(at, values):
    ordered, result, first, last = [], [], 0, 0
    for new_first, new_last in windows(at):
        for value in values[last:new_last]:
            bisect.insort(ordered, value)
        for value in values[first:new_first]:
            del ordered[bisect.bisect_left(ordered, value)]
        first, last = new_first, new_last
        result.append(middle_of(ordered))
    return result


def thinned(at, values):
    """At most POINTS of a smooth line, its ends among them."""
    if len(at) <= POINTS:
        return at, values
    chosen = sorted({round(i * (len(at) - 1) / (POINTS - 1)) for i in range(POINTS)})
    return [at[i] for i in chosen], [values[i] for i in chosen]


def envelope(at, values):
    """The least and the largest value of every POINTS-th part of a noisy line:
    looks like all of it."""
    if len(at) <= 2 * POINTS:
        return at, values
    chosen = []
    for part in range(POINTS):
        begin = part * len(at) // POINTS
        end = (part + 1) * len(at) // POINTS
        inside = range(begin, end)
        chosen += sorted(
            {min(inside, key=values.__getitem__), max(inside, key=values.__getitem__)}
        )
    return [at[i] for i in chosen], [values[i] for i in chosen]


def without_repeats(at, values):
    """The ends of every stretch of equal values: draws as all of them do."""
    kept = [
        i
        for i in range(len(at))
        if i in (0, len(at) - 1)
        or values[i] != values[i - 1]
        or values[i] != values[i + 1]
    ]
    return [at[i] for i in kept], [values[i] for i in kept]


# --- Figures -----------------------------------------------------------------
#
# matplotlib draws with marker colours that stand for CSS variables, so that the
# page decides on the real ones, by the reader's light or dark scheme.

INK, MUTED, GRID, PANEL = "#010101", "#020202", "#030303", "#040404"
RUN_COLOURS = 8
RUN_MARKERS = tuple(f"#0500{i:02x}" for i in range(RUN_COLOURS))
VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    PANEL: "var(--panel)",
} | {marker: f"var(--run-{i})" for i, marker in enumerate(RUN_MARKERS)}
DASHES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
WIDTH, HEIGHT = 400, 270  # points, which become units of the SVG
TEXT_SIZE = 11
LABEL_GAP = 13  # between the base lines of two labels
MOST_LABELS = 14  # as many as fit beside a figure


def import_matplotlib():
    try:
        import matplotlib
        import matplotlib.backends.backend_svg
        import matplotlib.figure
        import matplotlib.ticker
    except ImportError as error:
        raise ReportError(
            f"expected matplotlib to draw with, but got: {error}. Install it: "
            "python3 -m pip install matplotlib (Debian and Ubuntu: apt-get "
            "install python3-matplotlib)."
        ) from error
    return matplotlib


STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": PROGRAM,
    "font.size": TEXT_SIZE,
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


def short(text, most):
    return text if len(text) <= most else text[: most - 1] + "…"


class Figure:
    """One quantity of all runs against iterations."""

    def __init__(self, runs, logarithmic=False):
        self.matplotlib = import_matplotlib()
        self.runs = runs
        figure = self.matplotlib.figure.Figure(figsize=(WIDTH / 72, HEIGHT / 72))
        self.matplotlib.backends.backend_svg.FigureCanvasSVG(figure)
        figure.patch.set_visible(False)
        labels = len(runs) <= MOST_LABELS
        self.axes = figure.add_axes((0.115, 0.15, 0.675 if labels else 0.865, 0.82))
        self.axes.patch.set_visible(False)
        self.axes.set_xlabel("iterations", labelpad=3)
        self.axes.set_yscale("log" if logarithmic else "linear")
        self.end_of_x = max(run.iteration for run in runs) or 1
        self.axes.set_xlim(0, self.end_of_x)
        self.ends = {}  # of each run's line
        self.drawn = []  # values that have to be seen

    def style(self, run):
        index = self.runs.index(run)
        return {
            "color": RUN_MARKERS[index % RUN_COLOURS],
            "linestyle": DASHES[index // RUN_COLOURS % len(DASHES)],
        }

    def line(self, run, at, values, **style):
        if not at:
            return
        self.axes.plot(at, values, **(self.style(run) | style))
        self.drawn += values
        self.ends[run.key] = (at[-1], values[-1])

    def behind(self, run, at, values):
        """Raw rows: faint, and cut where they leave the figure."""
        if at:
            style = self.style(run) | {"linestyle": "solid"}
            self.axes.plot(at, values, **style, alpha=0.28, linewidth=0.8, zorder=1)

    def points(self, run, at, values):
        """Few and exact values, such as those of evaluations."""
        if not at:
            return
        style = self.style(run) | {"linestyle": (0, (2, 2)), "linewidth": 1}
        if len(at) <= 40:
            style |= {
                "marker": "o",
                "markersize": 4.5,
                "markerfacecolor": PANEL,
                "markeredgewidth": 1.4,
            }
        self.axes.plot(at, values, **style, zorder=3, clip_on=False)
        self.drawn += values
        self.ends[run.key] = (at[-1], values[-1])

    def limits(self, bottom=None, top=None):
        """Shows all that is drawn, from `bottom` and to `top` if given."""
        if not self.drawn:
            return
        low, high = min(self.drawn), max(self.drawn)
        if self.axes.get_yscale() == "log":
            self.axes.set_ylim(low / 1.3, high * 1.3)
            return
        room = 0.06 * (high - low) or 0.06 * abs(high) or 1
        self.axes.set_ylim(
            low - room if bottom is None else bottom,
            high + room if top is None else min(top, high + room),
        )

    def format_ticks(self):
        ticker = self.matplotlib.ticker
        self.axes.xaxis.set_major_locator(ticker.MaxNLocator(4, integer=True))
        self.axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        if self.axes.get_yscale() == "log":
            self.axes.yaxis.set_minor_formatter(ticker.NullFormatter())
            self.axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            low, high = self.axes.get_ylim()
            if high < 100 * low:
                self.axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        else:
            self.axes.yaxis.set_major_locator(ticker.MaxNLocator(5))
            self.axes.yaxis.set_major_formatter(tick_text)

    def write_labels(self):
        """The runs' letters and networks at the ends of their lines.

        Names of lines that end at the right edge stand in the margin, moved
        apart where they would overlap. A line that ends earlier has its letter
        there.
        """
        if len(self.runs) > MOST_LABELS:
            return
        in_margin = []
        for run in self.runs:
            if run.key not in self.ends:
                continue
            x, y = self.ends[run.key]
            height = self.height_of(x, y)
            if x >= 0.97 * self.end_of_x:
                in_margin.append((height, run))
            else:
                self.axes.annotate(
                    run.key,
                    (x, y),
                    xytext=(4, 0),
                    textcoords="offset points",
                    va="center",
                    color=self.style(run)["color"],
                    fontweight="bold",
                )
        gap = LABEL_GAP / (HEIGHT * self.axes.get_position().height)
        heights = spread([height for height, _ in in_margin], gap)
        for (height, run), moved in zip(in_margin, heights):
            self.label_in_margin(run, height, moved)

    def height_of(self, x, y):
        """Where a point is, as a part of the figure's height."""
        place = self.axes.transData.transform((x, y))
        return min(max(self.axes.transAxes.inverted().transform(place)[1], 0), 1)

    def label_in_margin(self, run, height, moved):
        colour = self.style(run)["color"]
        self.axes.plot(
            (1.008, 1.028),
            (height, moved),
            transform=self.axes.transAxes,
            clip_on=False,
            color=colour,
            linewidth=0.9,
        )
        self.axes.text(
            1.035,
            moved,
            f"{run.key} {short(run.config['model'], 10)}",
            transform=self.axes.transAxes,
            va="center",
            color=colour,
        )

    def svg(self, name, label):
        self.format_ticks()
        self.write_labels()
        data = io.StringIO()
        self.axes.figure.savefig(data, format="svg", metadata={"Date": None})
        return inline_svg(data.getvalue(), name, label)


def tick_text(value, _):
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


def spread(places, gap):
    """Moves places in 0 to 1 as little as is needed for gaps between them."""
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = [places[i] for i in order]
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + gap)
    top = 1.0
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], top)
        top = moved[i] - gap
    result = [0.0] * len(places)
    for i, place in zip(order, moved):
        result[i] = place
    return result


def inline_svg(text, name, label):
    """matplotlib's SVG as a part of a page: without what only a file needs,
    with names that are unique on the page, and with the page's colours."""
    root = xml.etree.ElementTree.fromstring(text.encode())
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))
    for parent in root.iter():
        for child in list(parent):
            if child.tag.endswith(("metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.split("}")[-1]
        element.text = element.text and element.text.strip() or None
        element.tail = None
        attributes = {
            key.split("}")[-1]: value for key, value in element.attrib.items()
        }
        if attributes.get("id") not in used:
            attributes.pop("id", None)
        element.attrib.clear()
        element.attrib.update(
            (key, inline_value(key, value, name)) for key, value in attributes.items()
        )
    view = root.attrib["viewBox"]
    root.attrib.clear()
    root.attrib.update({"viewBox": view, "role": "img", "aria-label": label})
    return xml.etree.ElementTree.tostring(root, encoding="unicode")


def inline_value(key, value, name):
    """An attribute of matplotlib's SVG as the page needs it."""
    if key == "id":
        return f"{name}-{value}"
    value = re.sub(r"url\(#", f"url(#{name}-", value)
    value = re.sub(r"^#(?=[mp])", f"#{name}-", value)
    value = re.sub(r"font: (\d+ )?([\d.]+px) [^;]*", font_size, value)
    value = re.sub(r"#[0-9a-f]{6}", marker_colour, value)
    return re.sub(
        r"-?\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}", value
    )


def marker_colour(found):
    return VARIABLES.get(found[0], found[0])


def font_size(found):
    weight = f"font-weight: {found[1].strip()}; " if found[1] else ""
    return f"{weight}font-size: {found[2]}"


def loss_figure(runs):
    lines, tests = [], []
    for run in runs:
        at, values = run.column("loss")
        lines.append((run, at, values, running_mean(at, values)))
        tests.append((run, *run.tests("test_loss")))
    seen = [value for *_, smooth in lines for value in smooth]
    seen += [value for *_, values in tests for value in values]
    logarithmic = bool(seen) and min(seen) > 0 and max(seen) > 20 * min(seen)
    figure = Figure(runs, logarithmic)
    for run, at, values, _ in lines:
        figure.behind(run, *envelope(at, values))
    for run, at, values in tests:
        figure.points(run, at, values)
    for run, at, _, smooth in lines:
        figure.line(run, *thinned(at, smooth))
    figure.limits()
    return figure, logarithmic


def accuracy_figure(runs):
    figure = Figure(runs)
    for run in runs:
        at, values = run.column("accuracy")
        values = [100 * value for value in values]
        figure.behind(run, *envelope(at, values))
        figure.line(run, *thinned(at, running_mean(at, values)))
    for run in runs:
        at, values = run.tests("test_accuracy")
        figure.points(run, at, [100 * value for value in values])
    figure.limits(top=101)
    return figure


def rate_figure(runs):
    columns = [(run, *run.column("lr")) for run in runs]
    rates = [rate for *_, values in columns for rate in values]
    logarithmic = bool(rates) and min(rates) > 0 and max(rates) > 5 * min(rates)
    figure = Figure(runs, logarithmic)
    for run, at, values in columns:
        # A row's rate is that of the steps before it.
        kept = envelope(*without_repeats(at, values))
        figure.line(run, *kept, drawstyle="steps-pre")
    figure.limits(bottom=None if logarithmic else 0)
    return figure, logarithmic


def time_figure(runs):
    figure = Figure(runs)
    for run in runs:
        at, values = run.column("ms_per_step")
        figure.behind(run, *envelope(at, values))
        figure.line(run, *thinned(at, running_median(at, values)))
    figure.limits(bottom=0)
    return figure


def memory_figure(runs, column):
    figure = Figure(runs)
    for run in runs:
        at, values = run.column(column)
        values = [value / MEBIBYTE for value in values]
        figure.line(run, *envelope(*without_repeats(at, values)))
    figure.limits(bottom=0)
    return figure


def figures(runs):
    """Name, heading, explanation and SVG of every figure of the page."""
    with import_matplotlib().rc_context():
        import_matplotlib().rcdefaults()
        import_matplotlib().rcParams.update(STYLE)
        return list(draw_all(runs))


def draw_all(runs):
    tests = "Circles: on the test images."
    loss, logarithmic = loss_figure(runs)
    yield drawn(
        loss,
        "loss",
        "Loss",
        "Cross-entropy" + (", logarithmic scale" if logarithmic else "") + ". Lines: "
        f"training, running mean; faint: every row. {tests}",
    )
    yield drawn(
        accuracy_figure(runs),
        "accuracy",
        "Accuracy (%)",
        f"Lines: training images, running mean; faint: every row. {tests}",
    )
    rate, logarithmic = rate_figure(runs)
    yield drawn(
        rate,
        "rate",
        "Learning rate",
        "As logged" + (", logarithmic scale." if logarithmic else "."),
    )
    yield drawn(
        time_figure(runs),
        "time",
        "Time per step (ms)",
        "Lines: running median; faint: every row, cut at the top.",
    )
    yield drawn(
        memory_figure(runs, "held_bytes"),
        "held",
        "Memory held after forward (MiB)",
        "What waits for backward, the largest of the steps of a row.",
    )
    yield drawn(
        memory_figure(runs, "peak_bytes"),
        "peak",
        "Peak memory of a step (MiB)",
        "Beyond parameters, momentum and batch; gradients included.",
    )


def drawn(figure, name, heading, explanation):
    if not figure.drawn:
        explanation = "No run has logged it."
    return name, heading, explanation, figure.svg(name, f"{heading} against iterations")


# --- The page ----------------------------------------------------------------

NOTHING = '<span class="none">–</span>'
MINUS = "\N{MINUS SIGN}"


def e(value):
    """Text as HTML: whatever comes from a file goes through here."""
    return html.escape(str(value))


def decimals(value, digits, unit=""):
    """A number for a table, or a dash."""
    if math.isnan(value):
        return NOTHING
    text = f"{value:,.{digits}f}".replace("-", MINUS)
    return f'{text} <span class="unit">{unit}</span>' if unit else text


def percent(part):
    return decimals(100 * part, 2)


def mebibytes(size, unit=""):
    return decimals(size / MEBIBYTE, 1, unit)


def duration(milliseconds):
    """Hours and minutes as the paper has them; with seconds below 10 minutes."""
    if math.isnan(milliseconds):
        return NOTHING
    seconds = round(milliseconds / 1000)
    minutes = round(milliseconds / 60000)
    if minutes >= 10:
        return f"{minutes // 60}:{minutes % 60:02}"
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def counted(count, noun):
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def model_name(model):
    return MODEL_NAMES.get(model, model)


def data_set_name(data_set):
    return DATA_SET_NAMES.get(data_set, data_set)


def chip(run, runs):
    index = runs.index(run)
    ring = index // RUN_COLOURS % len(DASHES)
    return (
        f'<span class="chip run-{index % RUN_COLOURS} dash-{ring}">{e(run.key)}</span>'
    )


def engine_text(config):
    text = config["engine"]
    bits = config.get("fractional_bits")
    if bits is not None:
        text += f", exact ({bits} fractional bits)"
    if config.get("memory_budget_mib"):
        text += f", memory budget {config['memory_budget_mib']} MiB"
    if text != "plain" and not config.get("checkpoint_transitions", True):
        text += ", transitions kept"
    if config.get("amp"):
        text += ", bfloat16"
    if config.get("memory_format", "channels-last") != "channels-last":
        text += f", {config['memory_format']}"
    return text


def device_text(info):
    if info["device"].startswith("cpu"):
        return f"{info['device']}, {counted(info['threads'], 'thread')}"
    return info["device"]


def status_html(run):
    if run.finished:
        return '<span class="status done">finished</span>'
    total = run.config["iterations"]
    done = f"{run.iteration:,} of {total:,} iterations"
    return f'<span class="status open">unfinished: {done}</span>'


def summary_item(run, runs):
    config = run.config
    parts = (
        f"{model_name(config['model'])} on {data_set_name(config['dataset'])}",
        f"engine {engine_text(config)}",
        device_text(run.info),
        f"{config['iterations']:,} iterations of {config['batch_size']:,} images",
    )
    notes = "".join(f'<p class="note">{e(note)}</p>' for note in run.notes)
    line = ' <span class="dot">·</span> '.join(map(e, parts))
    return (
        f'<li>{chip(run, runs)}<div><p><strong class="name">{e(run.name)}</strong> '
        f"{status_html(run)}</p><p>{line}</p>{notes}</div></li>"
    )


def table(head, rows, caption, kind=""):
    """A table in a box of its own to scroll in, where the page is narrow."""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{e(caption)}">'
        f'<table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def heads(*texts):
    return "".join(f'<th scope="col">{text}</th>' for text in texts)


def row_of(head, cells):
    return (
        f'<tr><th scope="row">{head}</th>'
        + "".join(f"<td>{cell}</td>" for cell in cells)
        + "</tr>"
    )


def results_section(runs):
    top5 = any(not math.isnan(run.last_test("test_top5")) for run in runs)
    head = heads(
        "Run",
        "Test accuracy<br>%",
        *(["Among the first 5<br>%"] if top5 else []),
        "Test loss",
        "Step, median<br>ms",
        "Held after forward<br>MiB",
        "Peak of a step<br>MiB",
        "Parameters",
        "Parameters<br>MiB",
    )
    rows = "".join(
        row_of(
            f'{chip(run, runs)} {e(model_name(run.config["model"]))}'
            + ("" if run.finished else '<span class="small">unfinished</span>'),
            (
                percent(run.last_test("test_accuracy")),
                *([percent(run.last_test("test_top5"))] if top5 else []),
                decimals(run.last_test("test_loss"), 4),
                decimals(run.step("median_ms_per_step"), 1),
                mebibytes(run.step("held_after_forward_bytes")),
                mebibytes(run.step("peak_of_the_step_bytes")),
                f"{run.info['parameters']:,}",
                decimals(run.info["parameter_bytes"] / MEBIBYTE, 2),
            ),
        )
        for run in runs
    )
    return (
        "<section><h2>Results</h2>"
        + table(head, rows, "Results of every run")
        + '<p class="small">Memory is that of tensors, beyond parameters, momentum '
        "and the batch itself. Of an unfinished run: its last evaluation, if there "
        "was one, the median of its rows, and the largest memory so far.</p></section>"
    )


def legend(runs):
    items = "".join(f"<li>{chip(run, runs)} {e(run.name)}</li>" for run in runs)
    return f'<ul class="legend">{items}</ul>'


def figures_section(runs):
    drawn_figures = "".join(
        f'<figure id="figure-{name}"><h3>{e(heading)}</h3>{svg}'
        f"<figcaption>{e(explanation)}</figcaption></figure>"
        for name, heading, explanation, svg in figures(runs)
    )
    return (
        "<section><h2>Course of training</h2>"
        f'{legend(runs)}<div class="figures">{drawn_figures}</div>'
        '<p class="small">Smoothing: the mean (of time: the median) of the rows in a '
        f"window of {100 * WINDOW:g} % of the iterations that the run has logged, "
        "centred on each row and cut at both ends of the run. Where a window has "
        "one row, that is the row. Of long logs, the smooth lines are drawn through "
        f"{POINTS} of their points, and the faint ones through the least and the "
        f"largest value in each of {POINTS} equal parts.</p></section>"
    )


def published_rows(published):
    return row_of(
        'TensorFlow <a href="#gomez">[2]</a>'
        '<span class="small">rerun by <a href="#leemput">[1]</a></span>',
        (
            decimals(published.tensorflow_accuracy, 2),
            duration(60000 * published.tensorflow_minutes),
            NOTHING,
            NOTHING,
        ),
    ) + row_of(
        'Python MemCNN <a href="#leemput">[1]</a>',
        (
            decimals(published.memcnn_accuracy, 2),
            duration(60000 * published.memcnn_minutes),
            decimals(published.activations, 1, "MB"),
            NOTHING,
        ),
    )


def deviations(run):
    """How a run's recipe is not the published one, in words."""
    found = [
        f"{name.replace('_', ' ')} {run.config[name]:,}"
        for name, value in PUBLISHED_RECIPE.items()
        if run.config[name] != value
    ]
    if not run.finished:
        found.insert(0, f"unfinished, iteration {run.iteration:,}")
    return found


def own_row(run, runs):
    found = deviations(run)
    remarks = ", ".join([engine_text(run.config), device_text(run.info), *found])
    mark = '<span class="mark">†</span>' if found else ""
    return row_of(
        f'{chip(run, runs)} memcnn{mark}<span class="small">{e(remarks)}</span>',
        (
            percent(run.last_test("test_accuracy")),
            duration(run.training_ms()),
            mebibytes(run.step("held_after_forward_bytes"), "MiB"),
            mebibytes(run.step("peak_of_the_step_bytes"), "MiB"),
        ),
    )


def network_table(model, data_set, runs):
    own = [
        run
        for run in runs
        if (run.config["model"], run.config["dataset"]) == (model, data_set)
    ]
    head = heads(
        f'<span class="model">{MODEL_NAMES[model]}</span>',
        "Accuracy<br>%",
        "Training<br>h:mm",
        "Held for<br>backward",
        "Peak of<br>a step",
    )
    rows = published_rows(PUBLISHED[data_set, model])
    rows += "".join(own_row(run, runs) for run in own)
    if not own:
        rows += row_of('memcnn<span class="small">no run</span>', [NOTHING] * 4)
    caption = f"{MODEL_NAMES[model]} on {DATA_SET_NAMES[data_set]}"
    return own, table(head, rows, caption, "published")


def comparable(run, other):
    same = ("batch_size", "amp", "memory_format")
    return run.info["device"] == other.info["device"] and all(
        run.config.get(name) == other.config.get(name) for name in same
    )


def ratio(ours, theirs):
    value = ours / theirs if theirs else math.nan
    return "" if math.isnan(value) else f"{value:.2f}"


def ratio_lines(pair, data_set, of_resnet, of_revnet, runs):
    """What a RevNet takes of its ResNet, as published and as measured: units
    and devices cancel out."""
    resnet, revnet = (PUBLISHED[data_set, model] for model in pair)
    yield (
        'Python MemCNN <a href="#leemput">[1]</a>',
        ratio(revnet.activations, resnet.activations),
        ratio(revnet.memcnn_minutes, resnet.memcnn_minutes),
        decimals(revnet.memcnn_accuracy - resnet.memcnn_accuracy, 2),
    )
    for revnet in of_revnet:
        resnet = next((run for run in of_resnet if comparable(run, revnet)), None)
        if resnet is None:
            continue
        both = [run.last_test("test_accuracy") for run in (revnet, resnet)]
        yield (
            f"{chip(revnet, runs)} to {chip(resnet, runs)}",
            *(
                ratio(revnet.step(name), resnet.step(name))
                for name in ("held_after_forward_bytes", "median_ms_per_step")
            ),
            decimals(100 * (both[0] - both[1]), 2),
        )


def ratios_html(pair, data_set, of_resnet, of_revnet, runs):
    names = [MODEL_NAMES[model] for model in reversed(pair)]
    head = heads(
        f"{names[0]} : {names[1]}", "Memory held", "Time", "Accuracy, points"
    )
    rows = "".join(
        row_of(line[0], [cell or NOTHING for cell in line[1:]])
        for line in ratio_lines(pair, data_set, of_resnet, of_revnet, runs)
    )
    return table(head, rows, f"{names[0]} in proportion to {names[1]}", "ratios")


def pair_html(pair, data_set, runs):
    (of_resnet, left), (of_revnet, right) = (
        network_table(model, data_set, runs) for model in pair
    )
    ratios = ratios_html(pair, data_set, of_resnet, of_revnet, runs)
    return f'<div class="pair">{left}{right}</div>{ratios}'


def published_section(runs):
    used = {run.config["dataset"] for run in runs}
    data_sets = [name for name in ("cifar10", "cifar100") if name in used]
    body = ""
    if not data_sets:
        data_sets = ["cifar10"]
        body = (
            '<p class="note">None of these runs is on CIFAR-10 or CIFAR-100, the '
            "data sets of the published figures.</p>"
        )
    for data_set in data_sets:
        body += f"<h3>{DATA_SET_NAMES[data_set]}</h3>"
        body += "".join(pair_html(pair, data_set, runs) for pair in PAIRS)
    return (
        "<section><h2>ResNet beside RevNet, and as published</h2>"
        '<p>The paper of Python MemCNN <a href="#leemput">[1]</a> trains each '
        "network on one GeForce GTX 1080, next to the TensorFlow program of the "
        'RevNet’s authors <a href="#gomez">[2]</a>. Below each table of figures: '
        "what the RevNet takes in proportion to its ResNet, which is free of units "
        "and of the device.</p>"
        f'{body}<p class="small">Own training time is that of the logged steps: '
        "without evaluations and without making batches. Published memory is what "
        "the GPU holds after forward beyond the model, in the paper’s MB, and is "
        "given once for both data sets; own memory is beyond parameters, momentum "
        "and batch, in MiB. Proportions of own time are of the median step; they are "
        "given for runs of equal batches on the same kind of device. † Not the "
        "published recipe (80,000 iterations of 100 images, learning rate 0.1, "
        "momentum 0.9, weight decay 0.0002), or not at its end: accuracy and time "
        "are not comparable.</p></section>"
    )


def twins_section(runs):
    compared = [run for run in runs if run.comparison]
    if not compared:
        return ""
    head = heads(
        "Run",
        "Engine",
        "Steps",
        "Step, median<br>ms",
        "Held after forward<br>MiB",
        "Peak of a step<br>MiB",
    )
    rows = "".join(
        row_of(
            f'{chip(run, runs)} {e(model_name(run.config["model"]))}',
            (
                e(engine),
                f"{run.comparison['steps']:,}",
                decimals(step["median_ms_per_step"], 1),
                mebibytes(step["held_after_forward_bytes"]),
                mebibytes(step["peak_of_the_step_bytes"]),
            ),
        )
        for run in compared
        for engine, step in run.comparison.items()
        if engine != "steps"
    )
    return (
        "<section><h2>Beside their plain twins</h2><p>The same network from the same "
        "weights on the same batches, once with its engine and once with ordinary "
        f"autograd.</p>{table(head, rows, 'Runs beside their plain twins')}</section>"
    )


def settings_of(run):
    """Everything that a run's files say about how it was made."""
    settings = dict(run.config)
    for name in (*RUN_FIELDS, "data_fingerprint", "classes", "train_images"):
        settings[name] = run.info.get(name)
    settings["test_images"] = run.info.get("test_images")
    return settings


def setting_text(value):
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def settings_section(runs):
    all_settings = [settings_of(run) for run in runs]
    names = list(dict.fromkeys(itertools.chain(*all_settings)))
    texts = {
        name: [setting_text(settings.get(name)) for settings in all_settings]
        for name in names
    }
    shared = [name for name in names if len(set(texts[name])) == 1]
    different = [name for name in names if name not in shared]
    body = ""
    if different:
        head = heads("Run", *(e(name.replace("_", " ")) for name in different))
        rows = "".join(
            row_of(chip(run, runs), [e(texts[name][i]) for name in different])
            for i, run in enumerate(runs)
        )
        body = table(head, rows, "Settings that differ", "settings")
    items = "".join(
        f'<div><dt>{e(name.replace("_", " "))}</dt><dd>{e(texts[name][0])}</dd></div>'
        for name in shared
    )
    if items:
        title = "The same in all runs" if len(runs) > 1 else ""
        body += (f"<h3>{title}</h3>" if title else "") + f"<dl>{items}</dl>"
    return f"<section><h2>Settings</h2>{body}</section>"


SOURCES = """<section><h2>Sources</h2><ol class="sources">
<li id="leemput">S. C. van de Leemput, J. Teuwen, B. van Ginneken, R. Manniesing.
MemCNN: A Python/PyTorch package for creating memory-efficient invertible neural
networks. <cite>Journal of Open Source Software</cite> 4(39):1576, 2019, tables 2a, 2b
and 3. <a href="https://doi.org/10.21105/joss.01576">doi:10.21105/joss.01576</a></li>
<li id="gomez">A. N. Gomez, M. Ren, R. Urtasun, R. B. Grosse. The Reversible Residual
Network: Backpropagation Without Storing Activations. <cite>Advances in Neural
Information Processing Systems</cite> 30, 2017.
<a href="https://arxiv.org/abs/1707.04585">arXiv:1707.04585</a></li></ol></section>"""

STYLE_SHEET = """
:root {
  color-scheme: light dark;
  --page: #fbfaf8; --panel: #ffffff; --ink: #22252a; --muted: #666c75;
  --grid: #e4e3df; --accent: #2a5f9e; --warn: #8a5a00; --warn-back: #fbf1dc;
  --good: #226b45; --good-back: #e4f3ea;
  --run-0: #2f6db3; --run-1: #c2571a; --run-2: #2b8055; --run-3: #7d55b0;
  --run-4: #b8374a; --run-5: #127b87; --run-6: #8a6d0b; --run-7: #626a76;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #15171a; --panel: #1d2024; --ink: #e4e6e9; --muted: #9ba2ac;
    --grid: #33373d; --accent: #86b5ee; --warn: #e9bd6c; --warn-back: #352a14;
    --good: #84d1a5; --good-back: #17301f;
    --run-0: #79aef0; --run-1: #f0a066; --run-2: #6fcb97; --run-3: #bd9eec;
    --run-4: #f08a94; --run-5: #5fc7d1; --run-6: #d8b850; --run-7: #a9b1bd;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue",
    "Liberation Sans", Arial, sans-serif;
  -webkit-text-size-adjust: 100%;
}
main { max-width: 1120px; margin: 0 auto; padding: 56px 32px 72px; }
h1, h2 {
  font-family: Charter, "Bitstream Charter", "Iowan Old Style", Georgia,
    "Liberation Serif", serif;
  font-weight: 600; line-height: 1.2; letter-spacing: -0.005em;
}
h1 { font-size: 36px; margin: 0 0 8px; overflow-wrap: anywhere; }
h2 { font-size: 25px; margin: 0 0 14px; }
h3 { font-size: 15px; font-weight: 600; margin: 28px 0 10px; }
p { margin: 0 0 12px; max-width: 46em; }
a { color: var(--accent); text-decoration-thickness: 1px; text-underline-offset: 2px; }
section { margin-top: 52px; }
.lede { font-size: 18px; color: var(--muted); }
.small, figcaption { font-size: 13px; line-height: 1.5; color: var(--muted); }
p.small { margin-top: 12px; max-width: 60em; }
.none, .unit { color: var(--muted); }
.unit { font-size: 0.86em; }
.mark { color: var(--warn); }

.chip {
  display: inline-block; min-width: 22px; padding: 0 5px; border-radius: 5px;
  font-size: 13px; font-weight: 700; line-height: 20px; text-align: center;
  border: 1.5px solid currentColor; background: var(--panel);
}
.chip.dash-1 { border-style: dashed; }
.chip.dash-2 { border-style: dotted; }
.chip.dash-3 { border-style: double; border-width: 3px; }
RUN_COLOURS
.runs { list-style: none; margin: 28px 0 0; padding: 0; border-top: 1px solid var(--grid); }
.runs li {
  display: grid; grid-template-columns: auto 1fr; gap: 14px; align-items: start;
  padding: 14px 0; border-bottom: 1px solid var(--grid);
}
.runs p { margin: 0; max-width: none; font-size: 15px; color: var(--muted); }
.runs .name { color: var(--ink); margin-right: 6px; overflow-wrap: anywhere; }
.dot { padding: 0 3px; }
.status {
  font-size: 13px; padding: 1px 9px; border-radius: 10px; display: inline-block;
}
.status.done { color: var(--good); background: var(--good-back); }
.status.open { color: var(--warn); background: var(--warn-back); }
.note, .runs p.note { color: var(--warn); font-size: 14px; }

.scroll {
  overflow-x: auto; background: var(--panel); border: 1px solid var(--grid);
  border-radius: 8px;
}
table { border-collapse: collapse; width: 100%; font-size: 14px; line-height: 1.4; }
th, td { padding: 9px 12px; text-align: right; vertical-align: baseline; }
td { font-variant-numeric: tabular-nums lining-nums; white-space: nowrap; }
thead th {
  font-weight: 500; font-size: 13px; line-height: 1.3; color: var(--muted);
  vertical-align: bottom; border-bottom: 1px solid var(--grid);
}
tbody tr + tr > * { border-top: 1px solid var(--grid); }
th:first-child { text-align: left; padding-left: 16px; }
td:last-child, th:last-child { padding-right: 16px; }
tbody th { font-weight: 500; }
tbody th .small { display: block; font-weight: 400; font-size: 12px; line-height: 1.35; }
.model { white-space: nowrap; font-weight: 600; font-size: 15px; color: var(--ink); }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 16px; margin-top: 22px; }
.pair th, .pair td { padding-left: 6px; padding-right: 6px; }
.pair th:first-child { padding-left: 16px; width: 40%; }
.pair td:last-child, .pair th:last-child { padding-right: 16px; }
.ratios { font-size: 13px; }
.pair + .scroll { margin-top: 8px; max-width: 620px; }
.ratios th, .ratios td { padding-top: 6px; padding-bottom: 6px; }
.settings td { text-align: right; }

.legend {
  list-style: none; display: flex; flex-wrap: wrap; gap: 8px 20px; padding: 0;
  margin: 0 0 14px; font-size: 14px; overflow-wrap: anywhere;
}
.figures { display: grid; grid-template-columns: 1fr 1fr; gap: 16px; }
figure {
  margin: 0; padding: 14px 16px 14px; min-width: 0; background: var(--panel);
  border: 1px solid var(--grid); border-radius: 8px;
}
figure h3 { margin: 0 0 4px; }
figure svg { display: block; width: 100%; height: auto; overflow: visible; }
figure svg * { stroke-linejoin: round; }
figure svg text {
  font-family: inherit; paint-order: stroke; stroke: var(--panel); stroke-width: 3px;
}
figcaption { margin-top: 6px; }

dl { display: flex; flex-wrap: wrap; gap: 10px 28px; margin: 0; font-size: 14px; }
dt { color: var(--muted); font-size: 13px; }
dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.sources { padding-left: 24px; font-size: 14px; margin: 0; max-width: 52em; }
.sources li + li { margin-top: 8px; }
:target { background: var(--warn-back); }

@media (max-width: 900px) {
  .figures, .pair { grid-template-columns: minmax(0, 1fr); }
}
@media (max-width: 560px) {
  main { padding: 32px 16px 48px; }
  h1 { font-size: 28px; }
  h2 { font-size: 22px; }
  .lede { font-size: 16px; }
  section { margin-top: 40px; }
  .runs li { gap: 10px; }
  table { font-size: 13px; }
  th, td { padding: 8px 8px; }
  th:first-child, .pair th:first-child { padding-left: 10px; }
  td:last-child, th:last-child, .pair td:last-child, .pair th:last-child {
    padding-right: 10px;
  }
  .pair th, .pair td { padding-left: 4px; padding-right: 4px; }
  .pair thead th, .pair .small { font-size: 11.5px; }
  figure { padding: 12px 10px; }
  /* The first column stays in sight while the others are scrolled. */
  .scroll th:first-child { position: sticky; left: 0; background: var(--panel); }
}
@media print {
  .scroll { overflow: visible; }
  figure, .pair, tr { break-inside: avoid; }
}
"""


def style_sheet():
    rules = "".join(
        f".run-{i} {{ color: var(--run-{i}); }}\n" for i in range(RUN_COLOURS)
    )
    return STYLE_SHEET.replace("RUN_COLOURS\n", rules)


def lede(runs):
    finished = sum(run.finished for run in runs)
    models = dict.fromkeys(model_name(run.config["model"]) for run in runs)
    data_sets = dict.fromkeys(data_set_name(run.config["dataset"]) for run in runs)
    state = f"{finished} finished" if finished else "none finished"
    if finished == len(runs):
        state = "all finished" if len(runs) > 1 else "finished"
    return (
        f"{counted(len(runs), 'run')} of memcnn_train, {state}: "
        f"{', '.join(models)} on {', '.join(data_sets)}."
    )


def page(runs, title):
    items = "".join(summary_item(run, runs) for run in runs)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" \
content="default-src 'none'; style-src 'unsafe-inline'">
<title>{e(title)}</title>
<style>{style_sheet()}</style>
</head>
<body>
<main>
<header>
<h1>{e(title)}</h1>
<p class="lede">{e(lede(runs))}</p>
<ul class="runs">{items}</ul>
</header>
{results_section(runs)}
{figures_section(runs)}
{published_section(runs)}
{twins_section(runs)}
{settings_section(runs)}
{SOURCES}
</main>
</body>
</html>
"""


# --- The program -------------------------------------------------------------


def write(path, text):
    """Writes a file as a whole, or leaves the old one."""
    try:
        descriptor, partial = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}."
        )
        try:
            with open(descriptor, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
            os.chmod(partial, 0o666 & ~current_umask())
            os.replace(partial, path)
        except BaseException:
            os.unlink(partial)
            raise
    except OSError as error:
        raise ReportError(
            f"{path}: expected a file that can be written, but got: "
            f"{error.strerror}. Give another --output."
        ) from error


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Turns results directories of memcnn_train, of finished runs and "
        "of runs that are still going on, into one HTML page that needs nothing "
        "beside it.",
        epilog=f"Example: {PROGRAM} results/* --output report.html",
    )
    parser.add_argument(
        "directories",
        metavar="RESULTS_DIR",
        nargs="+",
        type=pathlib.Path,
        help="what --results-dir of memcnn_train was; holds a run.json",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=pathlib.Path,
        default=pathlib.Path("report.html"),
        help="the page to write (default: %(default)s)",
    )
    parser.add_argument(
        "--title",
        metavar="TEXT",
        default="Training report",
        help="heading of the page (default: %(default)s)",
    )
    return parser.parse_args(arguments)


def main(arguments=None):
    options = parse_arguments(arguments)
    try:
        runs = read_runs(options.directories)
        write(options.output, page(runs, options.title))
    except ReportError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 1
    print(f"{options.output}: {counted(len(runs), 'run')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
