# SPDX-License-Identifier: MIT
"""What a line is drawn through: columns of long logs, smoothed or thinned."""

import math

import numpy
import pandas

WINDOW = 0.02  # of the iterations that a run has logged
POINTS = 300  # of a line: about as many as its figure has pixels


def smooth(values, summary):
    """The running mean or median at most at POINTS rows, both ends among them.

    Rows need not be equally far apart: a window has those that are at most half
    its width away.
    """
    if values.empty:
        return values
    half = WINDOW * (values.index[-1] - values.index[0]) / 2
    count = min(len(values), POINTS)
    chosen = values.index[numpy.linspace(0, len(values) - 1, count).round().astype(int)]
    windows = (
        values.loc[math.ceil(at - half) : math.floor(at + half)] for at in chosen
    )
    return pandas.Series([window.agg(summary) for window in windows], index=chosen)


def envelope(values):
    """The least and the largest value of each POINTS-th part of a noisy line:
    looks like all of it."""
    if len(values) <= 2 * POINTS:
        return values
    parts = values.groupby(numpy.arange(len(values)) * POINTS // len(values))
    return values.loc[sorted({*parts.idxmin(), *parts.idxmax()})]


def without_repeats(values):
    """The ends of every stretch of equal values: draws as all of them do."""
    same = (values == values.shift(1)) & (values == values.shift(-1))
    return values[~same]
