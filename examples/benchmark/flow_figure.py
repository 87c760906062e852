#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Draws the memory of a training step of a Glow against its depth: what memcnn_flows
measured, beside what was published of a package with ordinary autograd.

Reads JSON lines of memcnn_flows for one Glow of several depths, writes an SVG, and
prints the numbers as a table of Markdown. Measures nothing itself.
It needs matplotlib and pandas: apt-get install python3-matplotlib python3-pandas.
"""

import argparse
import pathlib
import sys

import figures
import matplotlib
import pandas
from matplotlib import ticker

TITLE = "Memory of a training step of a Glow (GiB)"
ENGINES = {
    "plain": ("plain autograd", "#59636e"),
    "saving": ("saving memory", "#cf222e"),
}
# Peak in GiB by steps a level of VincentStimper/normalizing-flows, as NVML reports the
# memory in use on a GPU of 40 GB. Source: slimgroup/InvertibleNetworks.jl, commit
# e83cd548, examples/benchmarks/memory_usage_normflows.py, which divides bytes by 1024^3.
PUBLISHED = {4: 5.09, 8: 7.88, 16: 13.55, 32: 24.87, 48: 36.20}
PUBLISHED_FLOW = {"levels": 3, "width": 256, "batch": 8, "size": 256}
SETTING = [*PUBLISHED_FLOW, "device", "matrix", "memory_format"]
BYTES = ["parameter_bytes", "image_bytes", "left_bytes", "peak_bytes"]


def read_rows(paths):
    rows = pandas.concat([figures.read_file(path) for path in paths])
    missing = {"engine", "depth", *SETTING, *BYTES} - set(rows)
    if missing:
        raise figures.DataError(f"expected {', '.join(sorted(missing))} in every line.")
    settings = rows[SETTING].drop_duplicates()
    if len(settings) > 1:
        texts = settings.to_string(index=False)
        raise figures.DataError(f"expected one flow in all files, but got:\n{texts}")
    # The published figures are of all that the device has for a step.
    rows["total"] = rows[["parameter_bytes", "image_bytes", "peak_bytes"]].sum(axis=1)
    rows["gradients"] = rows["parameter_bytes"] + rows["left_bytes"]
    return rows.sort_values("depth", kind="stable"), settings.to_dict("records")[0]


def is_published(setting):
    return all(setting[name] == value for name, value in PUBLISHED_FLOW.items())


def draw(rows, setting, output):
    subtitle = "{levels} levels, width {width}, batch {batch}, {size} × {size}, float32, {device}"
    figure = figures.new_figure(TITLE, subtitle.format(**setting))
    place, label = (0.085, 0.125, 0.615, 0.705), "steps a level"
    axes = figures.new_axes(figure, place, label)
    axes.set_xticks(sorted({*rows["depth"], *PUBLISHED}))
    axes.yaxis.set_major_locator(ticker.MaxNLocator(8, steps=[1, 2, 5, 10]))
    full = {"linewidth": 2.2, "markersize": 4.5, "marker": "o", "clip_on": False}
    dashed = full | {"linewidth": 1.6, "linestyle": (0, (4, 2.4))}
    if is_published(setting):
        label = "normflows (Python),\npublished, on a GPU"
        open_ = {"markersize": 8.5, "markerfacecolor": "none", "color": "#8250df"}
        axes.plot(*zip(*PUBLISHED.items()), label=label, **dashed | open_)
    for engine, (label, colour) in ENGINES.items():
        line = rows[rows["engine"] == engine]
        style = {"label": label, "color": colour}
        if len(line):
            axes.plot(line["depth"], line["total"] / 2**30, **full | style)
    line = rows[rows["engine"] == "saving"]
    label = "of it parameters\nand their gradients"
    style = {"label": label, "color": "#e16f24"}
    axes.plot(line["depth"], line["gradients"] / 2**30, **dashed | style)
    axes.set_ylim(bottom=0)
    figures.add_legend(axes, axes.get_lines())
    figures.save(figure, TITLE, output)


def table_of(rows, setting):
    """In Markdown, a column for each depth."""
    depths = sorted({*rows["depth"], *(PUBLISHED if is_published(setting) else ())})
    lines = [["GiB", *(f"K = {depth}" for depth in depths)]]
    lines.append(["---"] * len(lines[0]))
    if is_published(setting):
        cells = [f"{PUBLISHED[d]:.2f}" if d in PUBLISHED else "" for d in depths]
        lines.append(["normflows, published", *cells])
    for engine, column, label in (
        ("plain", "total", "plain autograd"),
        ("saving", "total", "saving memory"),
        ("saving", "gradients", "of it parameters and their gradients"),
    ):
        of_engine = rows[rows["engine"] == engine].drop_duplicates("depth")
        values = of_engine.set_index("depth")[column].reindex(depths) / 2**30
        cells = ["" if pandas.isna(value) else f"{value:.2f}" for value in values]
        lines.append([label, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--flows",
        type=pathlib.Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="JSON lines of memcnn_flows, of one Glow of several depths",
    )
    parser.add_argument(
        "--memory",
        type=pathlib.Path,
        required=True,
        metavar="SVG",
        help="figure to write",
    )
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    rows, setting = read_rows(arguments.flows)
    matplotlib.rcParams.update({"svg.hashsalt": "memcnn", "svg.fonttype": "path"})
    draw(rows, setting, arguments.memory)
    print(table_of(rows, setting))


if __name__ == "__main__":
    try:
        main()
    except figures.DataError as error:
        sys.exit(f"flow_figure.py: {error}")
