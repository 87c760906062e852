# SPDX-License-Identifier: MIT
"""Tests of check_includes.py, on trees made up for it.

    python3 tests/packaging/check_includes_test.py
"""

import contextlib
import io
import pathlib
import tempfile
import unittest

import check_includes

PAGE = """# Design

| command | words |
|---|---|
| `other.h` | Of another table. |

| header | one sentence |
|---|---|
| `all.h` | Not `low.h`. |
| `left.h`, `detail/right.h` | Two that do not include each other. |
| `low.h` | The rest. |
"""
PAGES = ["docs/design.md", "examples/train/README.md"]
README = """| file | one sentence |
|---|---|
| `main.cpp` | Starts. |
| `run/run.h` | Runs. |
"""


class Includes(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.root = pathlib.Path(folder.name)
        self.write("docs/design.md", PAGE)
        self.header("all.h", "<vector>", "<memcnn/left.h>", "<memcnn/detail/right.h>")
        self.header("left.h", "<memcnn/low.h>")
        self.header("detail/right.h", "<memcnn/low.h>", "<other/all.h>")
        self.header("low.h")
        self.write("examples/train/README.md", README)
        self.write("examples/train/main.cpp", '#include "train/run/run.h"\n')
        self.write("examples/train/run/run.h", "#include <memcnn/all.h>\n")

    def write(self, path, text):
        path = self.root / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def header(self, path, *included):
        lines = [f"#include {name}\n" for name in included]
        self.write(f"include/memcnn/{path}", "#pragma once\n\n" + "".join(lines))

    def problems(self):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            code = check_includes.main([str(self.root), *PAGES])
        *problems, summary = printed.getvalue().splitlines()
        self.assertEqual(code, 1 if problems else 0)
        self.assertIn(f"{len(problems)} problems", summary)
        return [problem.replace(f"{self.root}/", "") for problem in problems]

    def test_includes_of_lower_rows_pass(self):
        self.assertEqual(self.problems(), [])

    def test_include_of_a_higher_row_is_named_with_its_line(self):
        self.header("low.h", "<vector>", "<memcnn/left.h>")
        self.assertEqual(
            self.problems(),
            [
                "include/memcnn/low.h:4: low.h of row 3 includes left.h of row 2, "
                "which is not lower."
            ],
        )

    def test_include_of_the_same_row_is_a_problem(self):
        self.header("left.h", "<memcnn/detail/right.h>")
        self.assertIn("left.h of row 2 includes detail/right.h", self.problems()[0])

    def test_include_in_quotes_is_seen(self):
        self.write("examples/train/run/run.h", '# include "train/main.cpp"\n')
        self.assertIn("run/run.h of row 2 includes main.cpp", self.problems()[0])

    def test_header_without_a_row_is_a_problem(self):
        self.header("detail/new.h")
        page = "docs/design.md: expected a row for detail/new.h, but there is none."
        self.assertEqual(self.problems(), [page])

    def test_row_without_a_header_is_a_problem(self):
        (self.root / "include/memcnn/left.h").unlink()
        page = "docs/design.md: expected left.h to be a file of memcnn."
        self.assertEqual(self.problems(), [page])

    def test_header_of_two_rows_is_a_problem(self):
        self.write("docs/design.md", PAGE + "| `left.h` | Again. |\n")
        problem = "docs/design.md: expected left.h in one row, but it is in several."
        self.assertIn(problem, self.problems())

    def test_page_without_a_table_is_a_problem(self):
        self.write("docs/design.md", "# Design\n")
        self.assertEqual(len(self.problems()), 4)


if __name__ == "__main__":
    unittest.main(verbosity=2)
