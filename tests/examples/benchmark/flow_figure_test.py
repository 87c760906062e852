# SPDX-License-Identifier: MIT
"""Tests of examples/benchmark/flow_figure.py.

    MEMCNN_FLOW_FIGURE=FILE python3 flow_figure_test.py
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest


def row(engine, depth, peak, **others):
    """A line of memcnn_flows, with what the figure needs of it; of GiB."""
    return {
        "engine": engine,
        "depth": depth,
        "levels": 3,
        "width": 256,
        "batch": 8,
        "size": 256,
        "device": "cpu",
        "matrix": "lu",
        "memory_format": "contiguous",
        "parameter_bytes": depth * 2**30 // 4,
        "image_bytes": 0,
        "left_bytes": depth * 2**30 // 4,
        "peak_bytes": peak * 2**30,
        **others,
    }


OURS = [row("plain", 4, 7), row("saving", 4, 2), row("saving", 64, 33)]


class FlowFigure(unittest.TestCase):
    def draw(self, rows):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        path, self.figure = (
            pathlib.Path(folder.name) / name for name in ("flows.jsonl", "memory.svg")
        )
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        program = os.environ["MEMCNN_FLOW_FIGURE"]
        command = [sys.executable, program, "--flows", path, "--memory", self.figure]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def test_measured_and_published_stand_side_by_side(self):
        result = self.draw(OURS)
        self.assertEqual(result.returncode, 0, result.stderr)
        text = self.figure.read_text(encoding="utf-8")
        self.assertTrue(text.rstrip().endswith("</svg>"))
        lines = result.stdout.splitlines()
        for line in (
            "| GiB | K = 4 | K = 8 | K = 16 | K = 32 | K = 48 | K = 64 |",
            "| normflows, published | 5.09 | 7.88 | 13.55 | 24.87 | 36.20 |  |",
            "| plain autograd | 8.00 |  |  |  |  |  |",
            "| saving memory | 3.00 |  |  |  |  | 49.00 |",
            "| of it parameters and their gradients | 2.00 |  |  |  |  | 32.00 |",
        ):
            self.assertIn(line, lines)

    def test_another_flow_has_no_published_figures(self):
        result = self.draw([row("saving", 4, 2, width=8)])
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertNotIn("normflows", result.stdout)

    def test_two_flows_are_an_error(self):
        result = self.draw([*OURS, row("saving", 8, 2, width=8)])
        self.assertEqual(result.returncode, 1)
        self.assertIn("flow_figure.py: expected one flow in all files", result.stderr)


if __name__ == "__main__":
    unittest.main()
