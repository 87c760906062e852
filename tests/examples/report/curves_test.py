# SPDX-License-Identifier: MIT
"""Tests of examples/report/curves.py.

    MEMCNN_REPORT=FILE python3 curves_test.py

Exits with 77, which CTest shows as skipped, where pandas is missing.
"""

import importlib.util
import os
import pathlib
import statistics
import sys
import unittest

SKIPPED = 77
if importlib.util.find_spec("pandas") is None:
    print("skipped: no pandas for", sys.executable)
    sys.exit(SKIPPED)
sys.path.insert(0, str(pathlib.Path(os.environ["MEMCNN_REPORT"]).parent))

import pandas

from curves import POINTS, WINDOW, envelope, smooth, without_repeats


def column(iterations, value):
    return pandas.Series(map(value, iterations), index=iterations, dtype=float)


def zigzag(at):
    return at * 7919 % 1009


class Smooth(unittest.TestCase):
    def test_mean_and_median_are_of_the_rows_in_a_centred_window(self):
        # Rows are not equally far apart.
        rows = column([*range(10, 501, 10), *range(501, 1011)], zigzag)
        half = WINDOW * 1000 / 2
        for summary in ("mean", "median"):
            for at, value in smooth(rows, summary).items():
                near = [rows[each] for each in rows.index if abs(each - at) <= half]
                self.assertAlmostEqual(value, getattr(statistics, summary)(near))

    def test_long_log_gives_as_many_points_as_are_seen_with_both_ends(self):
        line = smooth(column(range(1, 5001), zigzag), "mean")
        self.assertEqual(len(line), POINTS)
        self.assertEqual((line.index[0], line.index[-1]), (1, 5000))

    def test_few_rows_stay(self):
        for count in (0, 1, 3):
            rows = column(range(10, 10 + count), zigzag)
            self.assertEqual(list(smooth(rows, "mean")), list(rows))


class Envelope(unittest.TestCase):
    def test_extremes_stay_in_order(self):
        rows = column(range(1, 8001), zigzag)
        rows[[17, 4321]] = -5.0, 5000.0
        kept = envelope(rows)
        self.assertLessEqual(len(kept), 2 * POINTS)
        self.assertEqual((kept[17], kept[4321]), (-5, 5000))
        self.assertTrue(kept.index.is_monotonic_increasing)

    def test_short_log_stays_whole(self):
        rows = column(range(2 * POINTS), zigzag)
        self.assertTrue(envelope(rows).equals(rows))


class WithoutRepeats(unittest.TestCase):
    def test_ends_of_equal_stretches_stay(self):
        values = [1, 1, 1, 2, 3, 3, 3, 3]
        rows = pandas.Series(values, index=range(10, 90, 10))
        self.assertEqual(list(without_repeats(rows).index), [10, 30, 40, 50, 80])


if __name__ == "__main__":
    unittest.main(verbosity=2)
