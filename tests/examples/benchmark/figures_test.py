# SPDX-License-Identifier: MIT
"""Tests of examples/benchmark/figures.py.

    MEMCNN_FIGURES=FILE python3 figures_test.py
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest


def row(engine, saved, time, **others):
    """A line of memcnn_benchmark, with what the figures need of it."""
    return {
        "engine": engine,
        "depth": 3,
        "channels": 4,
        "batch": 2,
        "size": 8,
        "device": "cpu",
        "threads": 1,
        "memory_format": "contiguous",
        "step_s": time,
        "ratio_to_plain": time,
        "saved_bytes": saved * 2**20,
        "grad_rel_error": 0,
        **others,
    }


PLAIN = row("plain", 8, 1.0)
OURS = [
    PLAIN,
    row("wrapper", 1, 1.5),
    row("sequence-budget", 1, 1.4, budget="0"),
    row("sequence-budget", 4, 1.1, budget="50%"),
]
PEERS = [PLAIN, row("memcnn", 1, 2.0)]


class Figures(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def draw(self, ours, peers, *figures):
        arguments = []
        for name, rows in (("benchmark", ours), ("peers", peers)):
            path = self.folder / f"{name}.jsonl"
            path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
            arguments += [f"--{name}", path]
        for name in figures:
            arguments += [f"--{name}", self.folder / f"{name}.svg"]
        command = [sys.executable, os.environ["MEMCNN_FIGURES"], *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def assert_drawn(self, result, *figures):
        self.assertEqual(result.returncode, 0, result.stderr)
        for name in figures:
            text = (self.folder / f"{name}.svg").read_text(encoding="utf-8")
            self.assertTrue(text.rstrip().endswith("</svg>"), name)

    def test_depth_has_two_figures(self):
        result = self.draw(OURS, PEERS, "memory", "time")
        self.assert_drawn(result, "memory", "time")
        self.assertEqual(result.stdout, "")

    def test_budgets_have_a_figure_and_a_table_of_all_networks(self):
        wide = [value | {"channels": 64, "batch": 1} for value in OURS]
        result = self.draw(OURS + wide, PEERS, "budgets")
        self.assert_drawn(result, "budgets")
        lines = result.stdout.splitlines()
        for line in (
            "| sequence, 0 | 1.0 | 1.40 | 0.0e+00 | 1.0 | 1.40 | 0.0e+00 |",
            "| sequence, 50% | 4.0 | 1.10 | 0.0e+00 | 4.0 | 1.10 | 0.0e+00 |",
            "| MemCNN (Python) | 1.0 | 2.00 | 0.0e+00 |  |  |  |",
        ):
            self.assertIn(line, lines)

    def test_budgets_without_plain_are_an_error(self):
        result = self.draw(OURS[1:], PEERS, "budgets")
        self.assertEqual(result.returncode, 1)
        self.assertIn("figures.py: expected the engine plain", result.stderr)

    def test_two_machines_are_an_error(self):
        for figures in (("budgets",), ("memory", "time")):
            result = self.draw(
                [*OURS, row("checkpoint", 2, 1.3, threads=2)], PEERS, *figures
            )
            self.assertEqual(result.returncode, 1)
            self.assertIn("expected one setting in all files", result.stderr)


if __name__ == "__main__":
    unittest.main()
