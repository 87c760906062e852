# SPDX-License-Identifier: MIT
"""Tests of examples/report/memcnn_report.py, all of it.

    MEMCNN_REPORT=FILE python3 report_test.py

Exits with 77, which CTest shows as skipped, where a package that the report needs
is missing.
"""

import base64
import contextlib
import html.parser
import importlib.util
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import unittest

REPORT = os.environ["MEMCNN_REPORT"]
NEEDED = ("jinja2", "matplotlib", "pandas")
SKIPPED = 77
missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
if missing:
    print(f"skipped: no {', '.join(missing)} for {sys.executable}")
    sys.exit(SKIPPED)
sys.path.insert(0, str(pathlib.Path(REPORT).parent))

import memcnn_report

VOID = {"meta", "link", "br", "hr", "img", "input"}
CITED = {"https://doi.org/10.21105/joss.01576", "https://arxiv.org/abs/1707.04585"}


def config(model, **changes):
    return {
        "model": model, "dataset": "cifar10", "iterations": 200,
        "batch_size": 100, "learning_rate": 0.1, "momentum": 0.9,
        "weight_decay": 2e-4, "seed": 1, "engine": "sequence",
        "fractional_bits": None, "memory_budget_mib": 0,
        "checkpoint_transitions": False, "amp": False, "memory_format": "contiguous",
    } | changes  # fmt: skip


def row(iteration, **changes):
    return {
        "iteration": iteration, "loss": 200 / (100 + iteration),
        "accuracy": iteration / 400, "lr": 0.1, "ms_per_step": 30.0,
        "held_bytes": 3 << 20, "peak_bytes": 5 << 20, "unknown": [1],
    } | changes  # fmt: skip


def lines(rows):
    return "".join(json.dumps(each) + "\n" for each in rows)


class Page(html.parser.HTMLParser):
    """Reads a page, and collects what the tests ask for."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.figures = [], [], [], []
        self.shown, self.of_runs = [], []  # checkboxes; classes in each figure
        self.text = ""
        self.feed(text)
        self.close()
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        for key, value in attributes:
            if key == "id":
                self.ids.append(value)
            if key in ("href", "src", "xlink:href"):
                self.links.append(value)
            if key == "class" and value.startswith("of-"):
                self.of_runs[-1].add(value)
        if tag == "svg":
            self.figures.append(dict(attributes)["aria-label"])
            self.of_runs.append(set())
        if tag == "input" and "checked" in dict(attributes):
            self.shown.append(dict(attributes)["id"])

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            raise AssertionError(f"</{tag}> closes another element")

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text += data + " "


class Report(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def make(self, name, settings, rows, finished=True, log=None):
        directory = self.folder / name
        directory.mkdir()
        info = {
            "config": settings, "device": "cpu", "threads": 2,
            "parameters": 466906, "parameter_bytes": 1867624,
            "memcnn": "0.1.0", "libtorch": "2.11.0", "classes": 10,
        }  # fmt: skip
        (directory / "run.json").write_text(json.dumps(info))
        (directory / "log.jsonl").write_text(lines(rows) if log is None else log)
        if finished:
            results = {
                "config": settings, "test_accuracy": 0.4367, "test_loss": 1.504,
                "step": {
                    "median_ms_per_step": 1072.5,
                    "held_after_forward_bytes": 99584000,
                    "peak_of_the_step_bytes": 119910000,
                },
            }  # fmt: skip
            (directory / "results.json").write_text(json.dumps(results))
        return directory

    def make_flow(self, name, sheets):
        """A run of memcnn_glow, whose rows name the sheets, of which two are there."""
        settings = {
            "model": "glow", "dataset": "cifar10", "iterations": 4, "batch_size": 64,
            "learning_rate": 1e-3, "seed": 42, "engine": "sequence", "levels": 3,
        }  # fmt: skip
        test = {"test_bits_per_dim": 5.4321, "reconstruction_error": 2.5e-6}
        rows = [
            {
                "iteration": at, "loss": 6.0, "lr": 1e-3, "ms_per_step": 30.0,
                "held_bytes": 3 << 20, "peak_bytes": 5 << 20, "samples": sheet,
                "drift": [1e-7, 2e-7],
            } | test
            for at, sheet in enumerate(sheets, start=1)
        ]  # fmt: skip
        directory = self.make(name, settings, rows, finished=False)
        results = {"config": settings, "step": {}, "samples": "samples-000004.png"}
        (directory / "results.json").write_text(json.dumps(results | test))
        for name in ("samples-000001.png", "samples-000004.png"):
            (directory / name).write_bytes(b"\x89PNG of " + name.encode())
        return directory

    def run_report(self, *arguments):
        """In this process, since one of its own takes a second to begin."""
        errors, before = io.StringIO(), os.getcwd()
        os.chdir(self.folder)
        try:
            with contextlib.redirect_stderr(errors):
                with contextlib.redirect_stdout(io.StringIO()):
                    code = memcnn_report.main(list(map(str, arguments)))
        finally:
            os.chdir(before)
        return subprocess.CompletedProcess(arguments, code, stderr=errors.getvalue())

    def page_of_own_process(self, *arguments):
        output = subprocess.check_output(
            [sys.executable, REPORT, *map(str, arguments)], cwd=self.folder, text=True
        )
        self.assertEqual(output, f"report.html: {len(arguments)} runs\n")
        return (self.folder / "report.html").read_text(encoding="utf-8")

    def page_of(self, *arguments):
        done = self.run_report(*arguments)
        self.assertEqual(done.returncode, 0, done.stderr)
        return (self.folder / "report.html").read_text(encoding="utf-8")

    def three_runs(self):
        rows = [row(i) for i in range(10, 201, 10)]
        return (
            self.make("first", config("resnet32", engine="plain"), rows),
            self.make("second", config("revnet38"), rows),
            self.make(
                "third", config("revnet110"), [], False,
                lines(rows[:7]) + '{"iteration": 80, "lo',
            ),
        )  # fmt: skip

    def assert_refused(self, directory, *parts):
        done = self.run_report(directory)
        self.assertEqual(done.returncode, 1)
        for part in parts:
            self.assertIn(part, done.stderr)
        self.assertNotIn("Traceback", done.stderr)
        self.assertFalse((self.folder / "report.html").exists())

    def test_flows_have_a_page_with_their_samples(self):
        outside = "../secret.png"
        (self.folder / "secret.png").write_bytes(b"secret")
        self.make_flow("flow", ["samples-000001.png", "samples-000002.png", outside])
        code = self.run_report("flow", "--output", "page.html").returncode
        text = (self.folder / "page.html").read_text()
        page = Page(text)
        self.assertEqual(code, 0)
        images = [link for link in page.links if link.startswith("data:image/png;")]
        expected = [
            base64.b64encode(b"\x89PNG of samples-%06d.png" % at).decode()
            for at in (1, 4)
        ]
        self.assertEqual([image.split(",")[1] for image in images], expected)
        self.assertIn("Glow on CIFAR-10", page.text)
        self.assertIn("5.4321", page.text)
        self.assertIn("img-src data:", text)
        self.assertEqual(len(page.figures), 6)
        self.assertIn("Error of a reconstruction against iterations", page.figures)

    def test_runs_of_two_programs_are_refused(self):
        self.make_flow("flow", [])
        self.make("net", config("revnet38"), [row(10)])
        result = self.run_report("flow", "net")
        self.assertEqual(result.returncode, 1)
        self.assertEqual(
            result.stderr,
            "memcnn_report: error: runs: expected those of one program, but got some "
            "of memcnn_glow and memcnn_train. Write a page for each.\n",
        )

    def test_page_is_well_formed_and_needs_nothing_else(self):
        text = self.page_of(*self.three_runs())
        page = Page(text)
        self.assertEqual(page.open, [])
        self.assertEqual(len(page.ids), len(set(page.ids)))
        outside = {link for link in page.links if not link.startswith("#")}
        self.assertEqual(outside, CITED)
        inside = {link[1:] for link in page.links if link.startswith("#")}
        inside |= set(re.findall(r"url\(#([^)]*)\)", text))
        self.assertLessEqual(inside, set(page.ids))
        for found in re.findall(r"https?://[^\"<\s]*", text):
            self.assertIn(found, CITED)
        self.assertNotIn("@import", text)

    def test_every_table_can_be_scrolled_where_the_page_is_narrow(self):
        text = self.page_of(*self.three_runs())
        in_boxes = re.findall(r'<div class="scroll"[^>]*>\s*<table', text)
        self.assertGreater(text.count("<table"), 5)
        self.assertEqual(len(in_boxes), text.count("<table"))
        self.assertRegex(text, r"\.scroll \{\s*overflow-x: auto;")

    def test_page_has_every_figure_and_entry(self):
        page = Page(self.page_of(*self.three_runs()))
        self.assertEqual(
            [label.split(" against")[0] for label in page.figures],
            [
                "Loss", "Accuracy (%)", "Learning rate", "Time per step (ms)",
                "Memory held after forward (MiB)", "Peak memory of a step (MiB)",
            ],
        )  # fmt: skip
        for entry in (
            "43.67", "1.5040", "1,072.5", "95.0", "114.4", "92.86", "92.74",
            "93.14", "111", "441", "238.6", "432.7", "0.1",
            "first", "A resnet32", "B revnet38",
        ):  # fmt: skip
            self.assertIn(entry, page.text)
        self.assertIn("unfinished: 70 of 200 iterations", page.text)
        self.assertIn("last line of the log was cut off", page.text)

    def test_each_run_can_be_hidden_in_every_figure(self):
        text = self.page_of(*self.three_runs())
        page = Page(text)
        self.assertEqual(page.shown, ["show-A", "show-B", "show-C"])
        self.assertEqual(page.of_runs, 6 * [{"of-A", "of-B", "of-C"}])
        self.assertIn("<title>C third</title>", text)  # of a line
        for key in "ABC":
            hidden = (
                f".course:has(#show-{key}:not(:checked)) .of-{key} {{ display: none"
            )
            self.assertIn(hidden, text)

    def test_single_run_has_nothing_to_hide(self):
        page = Page(self.page_of(self.make("one", config("revnet38"), [row(200)])))
        self.assertEqual(page.shown, [])
        self.assertEqual(page.of_runs[0], {"of-A"})

    def test_same_files_give_same_bytes(self):
        runs = self.three_runs()
        here, elsewhere = self.page_of(*runs), self.page_of_own_process(*runs)
        self.assertEqual(here, elsewhere)

    def test_missing_package_is_named_with_what_installs_it(self):
        run = self.make("one", config("revnet38"), [row(200)])
        for package in NEEDED:
            hide = f"import runpy, sys; sys.modules[{package!r}] = None; "
            start = f"runpy.run_path({REPORT!r}, run_name='__main__')"
            done = subprocess.run(
                [sys.executable, "-c", hide + start, run],
                cwd=self.folder, capture_output=True, text=True,
            )  # fmt: skip
            self.assertEqual(done.returncode, 1)
            self.assertIn(f"import of {package} halted", done.stderr)
            self.assertIn("apt-get install python3-matplotlib", done.stderr)
            self.assertIn("pip install matplotlib pandas jinja2", done.stderr)
            self.assertNotIn("Traceback", done.stderr)

    def test_output_that_cannot_be_written_is_an_error(self):
        run = self.make("one", config("revnet38"), [row(200)])
        done = self.run_report(run, "--output", "none/report.html")
        self.assertEqual(done.returncode, 1)
        self.assertIn("none/report.html: expected a file that can be", done.stderr)
        self.assertIn("Give another --output", done.stderr)

    def test_twins_and_proportions_of_comparable_runs_are_shown(self):
        rows = [row(i) for i in range(10, 201, 10)]
        resnet = self.make("resnet", config("resnet32", engine="plain"), rows)
        revnet = self.make("revnet", config("revnet38"), rows)
        path = revnet / "results.json"
        results = json.loads(path.read_text())
        plain = results["step"] | {"median_ms_per_step": 800.25}
        twins = {"steps": 7, "sequence": results["step"], "plain": plain}
        path.write_text(json.dumps(results | {"comparison": twins}))
        page = Page(self.page_of(resnet, revnet))
        self.assertIn("B RevNet-38 sequence 7 1,072.5 95.0 114.4", page.text)
        self.assertIn("B RevNet-38 plain 7 800.2 95.0 114.4", page.text)
        self.assertIn("B to A 1.00 1.00 0.00", page.text)

    def test_runs_of_several_processes_say_so_and_are_compared_with_such(self):
        one = self.make("one", config("resnet32", engine="plain"), [row(200)])
        two = self.make("two", config("revnet38"), [row(200)])
        path = two / "run.json"
        info = json.loads(path.read_text()) | {"processes": 2}
        path.write_text(json.dumps(info))
        page = Page(self.page_of(one, two))
        self.assertIn("2 processes on cpu, 2 threads", page.text)
        self.assertNotIn("B to A", page.text)
        path.write_text(json.dumps(info | {"processes": "2"}))
        done = self.run_report(two)
        self.assertIn('expected "processes" to be a whole number', done.stderr)

    def test_runs_of_one_network_are_told_apart(self):
        def page_of(*settings):
            runs = [
                self.make(
                    f"{len(settings)}-{at}", config("revnet38", **each), [row(200)]
                )
                for at, each in enumerate(settings)
            ]
            return Page(self.page_of(*runs))

        page = page_of({"amp": True}, {"seed": 7, "amp": True})
        self.assertIn("A RevNet-38 seed 1 43.67", page.text)
        self.assertIn("B seed 7", page.text)  # in a figure
        self.assertIn("CIFAR-10 · seed 7 · engine sequence", page.text)
        self.assertIn("† seed 7, sequence, transitions kept, bfloat16", page.text)
        page = page_of({"engine": "plain"}, {}, {"engine": "wrapper"})
        self.assertIn("C RevNet-38 wrapper 43.67", page.text)
        self.assertNotIn("plain · engine plain", page.text)  # nor here twice
        self.assertIn("† plain, contiguous, cpu", page.text)  # said once
        page = page_of({}, {"seed": 7}, {"amp": True}, {})
        self.assertIn("B RevNet-38 4-1 43.67", page.text)

    def test_changed_iterations_are_no_published_recipe(self):
        published = dict(
            iterations=80000, weight_decay=2e-4, memory_format="contiguous"
        )
        run = self.make("one", config("revnet38", **published), [row(80000)])
        self.assertIn("memcnn sequence, transitions kept", Page(self.page_of(run)).text)
        path = run / "run.json"
        info = json.loads(path.read_text()) | {"earlier_iterations": [40000]}
        path.write_text(json.dumps(info))
        page = Page(self.page_of(run))
        self.assertIn("2 threads, iterations changed on the way", page.text)
        self.assertIn("memcnn †", page.text)

    def test_steps_of_unfinished_run_are_median_and_maximum_of_its_rows(self):
        rows = [row(10, ms_per_step=11), row(20, ms_per_step=14, held_bytes=9 << 20)]
        page = Page(self.page_of(self.make("open", config("revnet38"), rows, False)))
        self.assertIn("unfinished – – 12.5 9.0 5.0 466,906", page.text)

    def test_what_files_say_is_escaped(self):
        evil = "<script>&\"'$x$"
        text = self.page_of(self.make("<b>", config(evil, dataset=evil), [row(200)]))
        self.assertNotIn("<script", text)
        self.assertNotIn("<b>", text)
        self.assertIn(evil, Page(text).text)

    def test_run_without_rows_and_diverged_run_are_shown(self):
        empty = self.make("empty", config("revnet38"), [], False)
        lost = self.make("lost", config("revnet38"), [row(10), row(20, loss=None)])
        page = Page(self.page_of(empty, lost))
        self.assertIn("unfinished: 0 of 200 iterations", page.text)
        self.assertIn("not a finite number in 1 of 2 rows", page.text)

    def test_test_loss_that_is_no_number_is_no_missing_evaluation(self):
        tested = {"test_accuracy": 0.1, "test_top5": 0.5}
        rows = [row(10, test_loss=2.0, **tested), row(20, test_loss=None, **tested)]
        done = self.make("done", config("revnet38"), [row(10)])
        results = json.loads((done / "results.json").read_text())
        (done / "results.json").write_text(json.dumps(results | {"test_loss": None}))
        going_on = self.make("on", config("revnet38"), rows, False)
        none = self.make("none", config("revnet38"), [row(10)], False)
        page = Page(self.page_of(done, going_on, none))
        text = " ".join(page.text.split())
        self.assertIn("43.67 – not finite 1,072.5", text)
        self.assertIn("unfinished 10.00 50.00 not finite", text)
        self.assertIn("unfinished – – –", text)
        self.assertEqual(text.count("the test accuracy says nothing"), 2)

    def test_bad_inputs_name_file_and_line(self):
        self.assert_refused(self.folder / "none", "none: expected a directory")
        bad = self.make("bad", config("revnet38"), [], True, lines([row(10)]) + "{\n")
        self.assert_refused(bad, "log.jsonl:2: expected JSON", "Repair that line")
        log = bad / "log.jsonl"
        log.write_text(lines([row(10), row(20, lr="x")]))
        self.assert_refused(bad, 'log.jsonl:2: expected "lr" to be a number', '"x"')
        # a terminal takes U+009B for the beginning of a command
        log.write_text(lines([row(10), row(20, lr="\u009b2J")]))
        self.assert_refused(bad, 'to be a number, but got "\\u009b2J"')
        log.write_text('{"iteration": 5}\n')
        self.assert_refused(bad, 'log.jsonl:1: expected "loss", but it is missing')
        log.write_text(lines([row(10), row(10)]))
        self.assert_refused(bad, 'log.jsonl:2: expected "iteration" to rise above 10')
        log.write_text("[1]\n")
        self.assert_refused(bad, "log.jsonl:1: expected a JSON object, but got [1]")
        log.write_text("")
        (bad / "results.json").write_text("{\n\n1}")
        self.assert_refused(bad, "results.json:3: expected JSON")
        (bad / "run.json").unlink()
        self.assert_refused(bad, "run.json: expected a file that can be read")
        os.mkfifo(bad / "run.json")  # nobody writes to it
        self.assert_refused(bad, "run.json: expected a file", "it is something else")


if __name__ == "__main__":
    unittest.main(verbosity=2)
