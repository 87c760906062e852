#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Draws what memcnn_benchmark measured at several depths, beside Python packages
measured on the same network.

Two SVG figures against depth: memory held after forward, and step time in units of
ordinary autograd. Reads files of JSON lines, one object an engine and depth: those of
memcnn_benchmark (see sweep.sh) and, optionally, of peers.py. Measures nothing itself.
It needs matplotlib and pandas: apt-get install python3-matplotlib python3-pandas.
"""

import argparse
import pathlib
import sys

import matplotlib
import matplotlib.figure
import pandas
from matplotlib import ticker

INK, FAINT, GRID = "#1f2328", "#59636e", "#e4e7eb"
OURS = {
    "plain": ("plain autograd", "#59636e"),
    "checkpoint": ("checkpoint", "#9a6700"),
    "wrapper": ("wrapper", "#0a7ea4"),
    "sequence": ("sequence", "#cf222e"),
}
PYTHON = {
    "checkpoint": ("torch checkpoint (Python)", "#9a6700"),
    "memcnn": ("MemCNN (Python)", "#8250df"),
    "revtorch": ("RevTorch (Python)", "#1a7f37"),
    "revlib": ("revlib (Python)", "#bc4c9b"),
}
MEMORY_TITLE = "Memory held after the forward pass (MiB)"
TIME_TITLE = "Time of a training step (1 = plain autograd)"
SETTING = ["channels", "batch", "size", "device", "threads", "memory_format"]
# What a row that does not say it was measured under.
UNSAID = {"dtype": "float32", "coupling": "additive", "precision": "ieee"}
MEASURED = ["engine", "depth", "step_s", "saved_bytes", *SETTING]


class DataError(Exception):
    """What the user has to know, and can do something about."""


def read_rows(paths):
    """The measurements of all files; an engine that failed is said and left out."""
    rows = pandas.concat([read_file(path) for path in paths], ignore_index=True)
    if "error" in rows:
        for row in rows[rows["error"].notna()].itertuples():
            print(f"left out {row.engine} at {row.depth}: {row.error}", file=sys.stderr)
        rows = rows[rows["error"].isna()]
    missing = [name for name in MEASURED if name not in rows or rows[name].isna().any()]
    if missing or rows.empty:
        places = ", ".join(map(str, paths))
        what = ", ".join(missing) or "measurements"
        raise DataError(f"expected {what} in every line of {places}.")
    return rows


def read_file(path):
    try:
        with path.open(encoding="utf-8") as file:
            return pandas.read_json(file, lines=True)
    except (OSError, ValueError) as error:
        raise DataError(
            f"expected {path} to have lines of JSON, but {error}."
        ) from error


def setting_of(rows):
    """What all rows were measured under."""
    rows = rows.reindex(columns=[*SETTING, *UNSAID])
    rows = rows.astype(object).fillna(UNSAID)
    settings = rows.drop_duplicates()
    if len(settings) > 1:
        texts = settings.to_string(index=False)
        raise DataError(f"expected one setting in all files, but got several:\n{texts}")
    return settings.to_dict("records")[0]


def lines_of(rows, value):
    """A column for each engine, by depth."""
    rows = rows.drop_duplicates(["engine", "depth"])
    return rows.pivot(index="depth", columns="engine", values=value)


def add_values(rows):
    """Time by interleaved steps where it was measured, else that of the engine plain
    of the same files."""
    plain = rows[rows["engine"] == "plain"].drop_duplicates("depth")
    plain = plain.set_index("depth")["step_s"]
    to_plain = rows["step_s"] / rows["depth"].map(plain)
    measured = rows["ratio_to_plain"] if "ratio_to_plain" in rows else to_plain
    rows = rows.assign(
        mebibytes=rows["saved_bytes"] / 2**20,
        time=measured.fillna(to_plain),
        # The workaround stands in where the engine itself fails.
        engine=rows["engine"].replace("memcnn-keep-first", "memcnn"),
    )
    if rows["time"].isna().any():
        raise DataError("expected the engine plain at every depth, to compare with.")
    return rows


def new_axes(title, subtitle, depths):
    figure = matplotlib.figure.Figure(figsize=(8.2, 4.6))
    axes = figure.add_axes((0.085, 0.125, 0.615, 0.705))
    figure.text(0.085, 0.935, title, fontsize=13, fontweight="bold", color=INK)
    figure.text(0.085, 0.875, subtitle, fontsize=9, color=FAINT)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, length=0, labelsize=9)
    axes.set_xscale("log")
    axes.set_xticks(depths, [str(depth) for depth in depths])
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.tick_params(axis="x", length=3)
    axes.set_xlabel("couplings, one after the other", color=FAINT, fontsize=9)
    return axes


def draw(title, subtitle, ours, theirs, scale, output):
    axes = new_axes(title, subtitle, sorted({*ours.index, *theirs.index}))
    full = {"linewidth": 2.2, "markersize": 4.5, "zorder": 2}
    open_ = {
        "linewidth": 1.6,
        "markersize": 8.5,
        "markerfacecolor": "none",
        "zorder": 3,
    }
    open_ |= {"linestyle": (0, (4, 2.4)), "markeredgewidth": 1.3}
    for lines, known, style in ((ours, OURS, full), (theirs, PYTHON, open_)):
        for engine, (label, colour) in known.items():
            if engine in lines:
                line = lines[engine].dropna()
                style |= {"color": colour, "label": label}
                axes.plot(line.index, line, marker="o", clip_on=False, **style)
    scale(axes)
    axes.legend(
        loc="center left",
        bbox_to_anchor=(1.02, 0.5),
        frameon=False,
        labelcolor="linecolor",
        fontsize=9,
        handlelength=2.6,
        labelspacing=0.8,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None, "Creator": None, "Title": title}
    axes.figure.savefig(output, format="svg", facecolor="white", metadata=metadata)


def memory_scale(axes):
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 3)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(ticker.NullLocator())


def time_scale(axes):
    axes.yaxis.set_major_locator(ticker.MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, metavar, text in (
        ("benchmark", "FILE", "JSON lines of memcnn_benchmark"),
        ("peers", "FILE", "JSON lines of the Python packages, plain among them"),
        ("memory", "SVG", "figure of memory to write"),
        ("time", "SVG", "figure of time to write"),
    ):
        parser.add_argument(
            f"--{name}",
            type=pathlib.Path,
            nargs="+" if metavar == "FILE" else None,
            required=name != "peers",
            metavar=metavar,
            help=text,
        )
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    ours = read_rows(arguments.benchmark)
    theirs = read_rows(arguments.peers) if arguments.peers else ours[:0]
    setting = setting_of(pandas.concat([ours, theirs]))
    ours, theirs = add_values(ours), add_values(theirs)
    threads = f"{setting['threads']} CPU threads"
    subtitle = (
        "2 × {channels} channels, batch {batch}, {size} × {size}, {dtype} "
        "{memory_format}, "
    ).format(**setting)
    subtitle += threads if setting["device"] == "cpu" else "one GPU"
    if len(theirs):
        subtitle += "; dashed: Python packages"
    matplotlib.rcParams.update({"svg.hashsalt": "memcnn", "svg.fonttype": "path"})
    for title, value, scale, output in (
        (MEMORY_TITLE, "mebibytes", memory_scale, arguments.memory),
        (TIME_TITLE, "time", time_scale, arguments.time),
    ):
        lines = lines_of(ours, value), lines_of(theirs, value)
        draw(title, subtitle, *lines, scale, output)


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        sys.exit(f"figures.py: {error}")
