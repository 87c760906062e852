#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Draws what memcnn_benchmark measured, beside Python packages measured on the same
networks.

Up to three SVG figures: memory held after forward against depth; step time in units of
ordinary autograd against depth; and step time against memory by budget, whose numbers it
prints as a table of Markdown. Reads files of JSON lines, one object an engine and network:
those of memcnn_benchmark (see sweep.sh, and budgets.sh) and, optionally, of peers.py.
Measures nothing itself.
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
BUDGETS = {
    "sequence-budget": ("sequence, by budget", "#cf222e"),
    "checkpoint-sequential-budget": ("checkpoint_sequential,\nby budget", "#0550ae"),
}
PYTHON = {
    "checkpoint": ("torch checkpoint (Python)", "#9a6700"),
    "checkpoint-selective": ("torch checkpoint, selective\n(Python)", "#e16f24"),
    "memcnn": ("MemCNN (Python)", "#8250df"),
    "revtorch": ("RevTorch (Python)", "#1a7f37"),
    "revlib": ("revlib (Python)", "#bc4c9b"),
}
MEMORY_TITLE = "Memory held after the forward pass (MiB)"
TIME_TITLE = "Time of a training step (1 = plain autograd)"
BUDGETS_TITLE = "Time of a training step against memory held (1 = plain autograd)"
HIGHEST = 1.75  # of BUDGETS_TITLE; a point above it is an arrow with its number
NETWORK = ["depth", "channels", "batch", "size"]
MACHINE = ["device", "threads", "memory_format"]
SETTING = [*NETWORK[1:], *MACHINE]
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


def setting_of(rows, names):
    """What all rows were measured under."""
    rows = rows.reindex(columns=[*names, *UNSAID])
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
    plain = rows[rows["engine"] == "plain"].drop_duplicates("depth").set_index("depth")
    to_plain = rows["step_s"] / rows["depth"].map(plain["step_s"])
    measured = rows["ratio_to_plain"] if "ratio_to_plain" in rows else to_plain
    rows = rows.assign(
        mebibytes=rows["saved_bytes"] / 2**20,
        share=rows["saved_bytes"] / rows["depth"].map(plain["saved_bytes"]),
        time=measured.fillna(to_plain),
        # The workaround stands in where the engine itself fails.
        engine=rows["engine"].replace("memcnn-keep-first", "memcnn"),
    )
    if rows[["time", "share"]].isna().any(axis=None):
        raise DataError("expected the engine plain at every depth, to compare with.")
    return rows


def new_figure(title, subtitle):
    figure = matplotlib.figure.Figure(figsize=(8.2, 4.6))
    figure.text(0.085, 0.935, title, fontsize=13, fontweight="bold", color=INK)
    figure.text(0.085, 0.875, subtitle, fontsize=9, color=FAINT)
    return figure


def new_axes(figure, place, label):
    axes = figure.add_axes(place)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, length=0, labelsize=9)
    axes.tick_params(axis="x", length=3)
    axes.set_xlabel(label, color=FAINT, fontsize=9)
    return axes


def add_legend(axes, handles):
    axes.legend(
        handles=handles,
        loc="center left",
        bbox_to_anchor=(1.02, 0.5),
        frameon=False,
        labelcolor="linecolor",
        fontsize=9,
        handlelength=2.6,
        labelspacing=0.8,
    )


def save(figure, title, output):
    output.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None, "Creator": None, "Title": title}
    figure.savefig(output, format="svg", facecolor="white", metadata=metadata)


def draw(title, subtitle, ours, theirs, scale, output):
    figure = new_figure(title, subtitle)
    label = "couplings, one after the other"
    axes = new_axes(figure, (0.085, 0.125, 0.615, 0.705), label)
    depths = sorted({*ours.index, *theirs.index})
    axes.set_xscale("log")
    axes.set_xticks(depths, [str(depth) for depth in depths])
    axes.xaxis.set_minor_locator(ticker.NullLocator())
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
    add_legend(axes, axes.get_lines())
    save(figure, title, output)


def memory_scale(axes):
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 3)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(ticker.NullLocator())


def time_scale(axes):
    axes.yaxis.set_major_locator(ticker.MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))


def draw_against_depth(ours, theirs, arguments):
    setting = setting_of(pandas.concat([ours, theirs]), SETTING)
    ours, theirs = add_values(ours), add_values(theirs)
    subtitle = "2 × {channels} channels, batch {batch}, {size} × {size}, "
    subtitle = subtitle.format(**setting) + machine_of(setting)
    if len(theirs):
        subtitle += "; dashed: Python packages"
    for title, value, scale, output in (
        (MEMORY_TITLE, "mebibytes", memory_scale, arguments.memory),
        (TIME_TITLE, "time", time_scale, arguments.time),
    ):
        if output:
            lines = lines_of(ours, value), lines_of(theirs, value)
            draw(title, subtitle, *lines, scale, output)


def draw_network(axes, ours, theirs):
    """A curve for each engine with budgets, a point for each other one."""
    curve = {"marker": "o", "markersize": 4.5, "linewidth": 2.2, "zorder": 2}
    full = {"marker": "o", "markersize": 8, "linestyle": "", "zorder": 3}
    open_ = full | {"markerfacecolor": "none", "markeredgewidth": 1.6}
    points = {name: OURS[name] for name in ("plain", "checkpoint", "wrapper")}
    for rows, known, style in (
        (ours, BUDGETS, curve),
        (ours, points, full),
        (theirs, PYTHON, open_),
    ):
        for engine, (label, colour) in known.items():
            found = rows[rows["engine"] == engine].sort_values("share", kind="stable")
            style |= {"color": colour, "label": label, "clip_on": False}
            if len(found):
                axes.plot(found["share"], found["time"].clip(upper=HIGHEST), **style)
            for row in found[found["time"] > HIGHEST].itertuples():
                axes.annotate(
                    f"↑ {row.time:.2f}",
                    (row.share, HIGHEST),
                    xytext=(7, -3),
                    textcoords="offset points",
                    color=colour,
                    fontsize=9,
                )


def draw_by_budget(networks, setting, output):
    subtitle = f"{machine_of(setting)}; open circles: Python packages"
    figure = new_figure(BUDGETS_TITLE, subtitle)
    width = 0.645 / len(networks)
    for i, (name, ours, theirs) in enumerate(networks):
        place = (0.085 + i * width, 0.125, width - 0.03, 0.6)
        axes = new_axes(figure, place, "memory held after the forward pass")
        axes.set_title(name, fontsize=9, color=INK, loc="left", pad=12)
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        axes.set_xlim(0, 1.1)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "¼", "½", "¾", "1"])
        axes.set_ylim(0.98, HIGHEST)
        axes.tick_params(axis="y", labelleft=i == 0)
        draw_network(axes, ours, theirs)
    add_legend(figure.axes[-1], figure.axes[0].get_lines())
    save(figure, BUDGETS_TITLE, output)


def table_of(networks):
    """In Markdown, a line for each engine and budget."""
    cells = {}
    for i, (_, ours, theirs) in enumerate(networks):
        for rows, known in ((ours, OURS | BUDGETS), (theirs, PYTHON)):
            rows = rows[rows["engine"].isin(known)]
            for row in rows.to_dict("records"):
                name = known[row["engine"]][0].replace("\n", " ")
                name = name.replace("by budget", str(row.get("budget")))
                line = cells.setdefault(name, ["", "", ""] * len(networks))
                line[3 * i : 3 * i + 3] = (
                    f"{row['mebibytes']:.1f}",
                    f"{row['time']:.2f}",
                    f"{row['grad_rel_error']:.1e}",
                )
    lines = [[name, *line] for name, line in cells.items()]
    title = ["", *["held, MiB", "to plain", "gradient error"] * len(networks)]
    rule = ["---"] * len(title)
    return "\n".join(f"| {' | '.join(line)} |" for line in (title, rule, *lines))


def by_budget(ours, theirs, output):
    setting = setting_of(pandas.concat([ours, theirs]), MACHINE)
    networks = []
    for network, rows in ours.groupby(NETWORK, sort=False):
        name = "{} couplings of 2 × {} channels\nbatch {}, {} × {}".format(
            *network, network[-1]
        )
        beside = theirs[(theirs[NETWORK] == network).all(axis=1)]
        networks.append((name, add_values(rows), add_values(beside)))
    draw_by_budget(networks, setting, output)
    print(table_of(networks))


def machine_of(setting):
    threads = f"{setting['threads']} CPU threads"
    where = threads if setting["device"] == "cpu" else "one GPU"
    return f"{setting['dtype']} {setting['memory_format']}, {where}"


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, metavar, text in (
        ("benchmark", "FILE", "JSON lines of memcnn_benchmark"),
        ("peers", "FILE", "JSON lines of the Python packages, plain among them"),
        ("memory", "SVG", "figure of memory against depth to write"),
        ("time", "SVG", "figure of time against depth to write"),
        ("budgets", "SVG", "figure of time against memory to write"),
    ):
        parser.add_argument(
            f"--{name}",
            type=pathlib.Path,
            nargs="+" if metavar == "FILE" else None,
            required=name == "benchmark",
            metavar=metavar,
            help=text,
        )
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    ours = read_rows(arguments.benchmark)
    theirs = read_rows(arguments.peers) if arguments.peers else ours[:0]
    matplotlib.rcParams.update({"svg.hashsalt": "memcnn", "svg.fonttype": "path"})
    if arguments.memory or arguments.time:
        draw_against_depth(ours, theirs, arguments)
    if arguments.budgets:
        by_budget(ours, theirs, arguments.budgets)


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        sys.exit(f"figures.py: {error}")
