#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Draw what memcnn_benchmark measured at several depths, beside Python packages measured on the same network.

Two SVG figures: memory held after forward against depth, and step time in units of ordinary autograd against depth.
Reads files of JSON lines, one object per engine and depth: those of memcnn_benchmark (see sweep.sh) and, optionally,
those of a script that measures Python packages and prints the same fields. Measures nothing itself.
"""
import argparse
import json
import math
import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib import ticker  # noqa: E402

INK, FAINT, GRID = "#1f2328", "#59636e", "#e4e7eb"

# Engine in the file: (label, colour). Ours are solid with full marks, the Python ones dashed with open marks.
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
ALIASES = {
    "memcnn-keep-first": "memcnn"
}  # the workaround stands in where the engine itself fails
SETTING = ("channels", "batch", "size", "device", "threads", "memory_format")


class DataError(Exception):
    pass


def read_rows(paths):
    rows = []
    for path in paths:
        try:
            lines = path.read_text().splitlines()
        except OSError as error:
            raise DataError(
                f"expected {path} to be a file of JSON lines, but {error.strerror}."
            ) from error
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(
                    f"expected a JSON object in {path}, line {number}, but {error}."
                ) from error
            if not isinstance(row, dict) or "engine" not in row:
                raise DataError(
                    f'expected an object with "engine" in {path}, line {number}, but got {line[:60]}.'
                )
            if row.get("error"):
                print(
                    f"{path}, line {number}: left out {row['engine']}: {row['error']}",
                    file=sys.stderr,
                )
                continue
            missing = [
                name
                for name in ("depth", "step_s", "saved_bytes", *SETTING)
                if row.get(name) is None
            ]
            if missing:
                raise DataError(
                    f"expected {', '.join(missing)} in {path}, line {number} (engine {row['engine']}), "
                    "but there is none."
                )
            rows.append(row)
    if paths and not rows:
        raise DataError(
            f"expected measurements in {', '.join(map(str, paths))}, but there are none."
        )
    return rows


def check_same_setting(rows):
    settings = sorted({tuple(row[name] for name in SETTING) for row in rows}, key=str)
    if len(settings) > 1:
        texts = [
            "; ".join(f"{name} {value}" for name, value in zip(SETTING, setting))
            for setting in settings
        ]
        raise DataError(
            f"expected one setting in all files, but got several: {' | '.join(texts)}."
        )
    return dict(zip(SETTING, settings[0]))


def dtype_of(rows):
    dtypes = sorted({row.get("dtype", "float32") for row in rows})
    couplings = sorted({row.get("coupling", "additive") for row in rows})
    if len(dtypes) > 1 or len(couplings) > 1:
        raise DataError(
            f"expected one dtype and coupling in all files, but got {', '.join(dtypes + couplings)}."
        )
    return dtypes[0]


def series(rows, known, value):
    """For every known engine with data: {depth: value}, in the order of `known`."""
    found = {name: {} for name in known}
    for row in rows:
        name = ALIASES.get(row["engine"], row["engine"])
        if name in known:
            number = value(row)
            if number is not None and math.isfinite(number):
                found[name].setdefault(row["depth"], number)
    return {
        name: dict(sorted(points.items())) for name, points in found.items() if points
    }


def mebibytes_held(row):
    return row["saved_bytes"] / 2**20


def time_to_plain(rows):
    """The ratio from interleaved steps where it was measured, else to the plain engine of the same file."""
    plain = {row["depth"]: row["step_s"] for row in rows if row["engine"] == "plain"}

    def ratio(row):
        if row.get("ratio_to_plain") is not None:
            return row["ratio_to_plain"]
        if row["depth"] not in plain:
            raise DataError(
                f"expected the engine plain at depth {row['depth']}, to compare {row['engine']} with, "
                "but there is none."
            )
        return row["step_s"] / plain[row["depth"]]

    return ratio


def new_axes(title, subtitle, depths):
    figure, axes = plt.subplots(figsize=(8.2, 4.6))
    figure.subplots_adjust(left=0.085, right=0.70, top=0.83, bottom=0.125)
    figure.text(
        0.085, 0.935, title, fontsize=13, fontweight="bold", color=INK, ha="left"
    )
    figure.text(0.085, 0.875, subtitle, fontsize=9, color=FAINT, ha="left")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, length=0, labelsize=9)
    axes.set_xscale("log")
    axes.set_xticks(depths, [str(depth) for depth in depths])
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.tick_params(axis="x", length=3)
    axes.set_xlabel("couplings, one after the other", color=FAINT, fontsize=9)
    return figure, axes


def draw_line(axes, points, colour, python):
    axes.plot(
        list(points),
        list(points.values()),
        color=colour,
        linewidth=1.6 if python else 2.2,
        linestyle=(0, (4, 2.4)) if python else "-",
        marker="o",
        markersize=8.5 if python else 4.5,
        markerfacecolor="none" if python else colour,
        markeredgewidth=1.3,
        zorder=3 if python else 2,
        clip_on=False,
    )


def spread(wanted, gap, low, high):
    """Places near the wanted ones, at least a gap apart, between low and high; of equals the first is the highest."""
    order = sorted(range(len(wanted)), key=lambda i: (wanted[i], -i))
    groups = []  # of neighbours a gap apart, centred on what they want
    for i in order:
        groups.append([i])
        while (
            len(groups) > 1
            and ladder(groups[-1], wanted, gap)[0] - ladder(groups[-2], wanted, gap)[-1]
            < gap
        ):
            last = groups.pop()
            groups[-1] += last
    places = [place for group in groups for place in ladder(group, wanted, gap)]
    for k, place in enumerate(places):
        places[k] = max(place, low if k == 0 else places[k - 1] + gap)
    for k in reversed(range(len(places))):
        places[k] = min(
            places[k], high if k == len(places) - 1 else places[k + 1] - gap
        )
    return [place for _, place in sorted(zip(order, places))]


def ladder(members, wanted, gap):
    """Places of a group: a gap apart, around the mean of what its members want."""
    centre = sum(wanted[i] for i in members) / len(members)
    return [centre + gap * (k - (len(members) - 1) / 2) for k in range(len(members))]


def label_ends(axes, lines):
    """Names every line at its right end; labels that would overlap move apart, with a thin line to their end."""
    axes.figure.canvas.draw()
    box = axes.get_window_extent()
    ends = [
        axes.transData.transform((max(points), points[max(points)]))
        for _, points, *_ in lines
    ]
    pixels = axes.figure.dpi / 72
    places = spread([y for _, y in ends], 13.5 * pixels, box.y0, box.y1)
    for (label, _, colour, weight), (x, y), place in zip(lines, ends, places):
        start, corner, text = axes.transAxes.inverted().transform(
            [
                (x + 7 * pixels, y),
                (box.x1 + 20 * pixels, place),
                (box.x1 + 24 * pixels, place),
            ]
        )
        axes.plot(
            [start[0], corner[0]],
            [start[1], corner[1]],
            transform=axes.transAxes,
            color=colour,
            linewidth=0.7,
            alpha=0.7,
            clip_on=False,
            zorder=1,
        )
        axes.text(
            text[0],
            text[1],
            label,
            transform=axes.transAxes,
            color=colour,
            fontsize=9.5,
            va="center",
            fontweight=weight,
            clip_on=False,
        )


def draw(title, subtitle, ours, theirs, output, scale):
    depths = sorted(
        {depth for points in (*ours.values(), *theirs.values()) for depth in points}
    )
    figure, axes = new_axes(title, subtitle, depths)
    for name, points in theirs.items():
        draw_line(axes, points, PYTHON[name][1], python=True)
    for name, points in ours.items():
        draw_line(axes, points, OURS[name][1], python=False)
    lines = [
        (OURS[name][0], points, OURS[name][1], "normal" if name == "plain" else "bold")
        for name, points in ours.items()
    ]
    lines += [
        (PYTHON[name][0], points, PYTHON[name][1], "normal")
        for name, points in theirs.items()
    ]
    scale(axes, [number for _, points, *_ in lines for number in points.values()])
    label_ends(axes, lines)
    output.parent.mkdir(parents=True, exist_ok=True)
    metadata = (
        {"Date": None, "Creator": None, "Title": title}
        if output.suffix == ".svg"
        else None
    )
    figure.savefig(output, facecolor="white", metadata=metadata)
    plt.close(figure)


def memory_scale(axes, values):
    axes.set_yscale("log")
    axes.set_ylim(min(values) / 1.6, max(values) * 1.3)
    ticks = [
        tick
        for power in range(-4, 7)
        for tick in (10.0**power, 3 * 10.0**power)
        if axes.get_ylim()[0] <= tick <= axes.get_ylim()[1]
    ]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.yaxis.set_minor_locator(ticker.NullLocator())


def time_scale(axes, values):
    low, high = min(*values, 0.9), max(*values, 1.5)
    axes.set_ylim(low - 0.03 * (high - low), high + 0.05 * (high - low))
    axes.yaxis.set_major_locator(ticker.MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--benchmark",
        type=pathlib.Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="JSON lines of memcnn_benchmark",
    )
    parser.add_argument(
        "--peers",
        type=pathlib.Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="JSON lines of the Python packages, with the engine plain among them",
    )
    parser.add_argument(
        "--memory",
        type=pathlib.Path,
        required=True,
        metavar="SVG",
        help="figure of memory to write",
    )
    parser.add_argument(
        "--time",
        type=pathlib.Path,
        required=True,
        metavar="SVG",
        help="figure of time to write",
    )
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    ours, theirs = read_rows(arguments.benchmark), read_rows(arguments.peers)
    setting = check_same_setting(ours + theirs)
    subtitle = (
        f"2 × {setting['channels']} channels, batch {setting['batch']}, "
        f"{setting['size']} × {setting['size']}, {dtype_of(ours)} {setting['memory_format']}, "
    )
    subtitle += (
        f"{setting['threads']} CPU threads" if setting["device"] == "cpu" else "one GPU"
    )
    if theirs:
        subtitle += "; dashed: Python packages"

    plt.rcParams.update(
        {"svg.hashsalt": "memcnn", "svg.fonttype": "path", "font.family": "DejaVu Sans"}
    )
    draw(
        "Memory held after the forward pass (MiB)",
        subtitle,
        series(ours, OURS, mebibytes_held),
        series(theirs, PYTHON, mebibytes_held),
        arguments.memory,
        memory_scale,
    )
    draw(
        "Time of a training step (1 = plain autograd)",
        subtitle,
        series(ours, OURS, time_to_plain(ours)),
        series(theirs, PYTHON, time_to_plain(theirs)),
        arguments.time,
        time_scale,
    )


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        sys.exit(f"figures.py: {error}")
