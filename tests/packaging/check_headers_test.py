# SPDX-License-Identifier: MIT
"""Tests of check_headers.py, on headers made up for it, by the compiler $CXX.

    CXX=g++ python3 tests/packaging/check_headers_test.py
"""

import contextlib
import io
import os
import pathlib
import tempfile
import unittest

import check_headers


class Headers(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.root = pathlib.Path(folder.name)
        self.write("memcnn/all.h", "<memcnn/left.h>", "<memcnn/right.h>")
        self.write("memcnn/left.h", "<memcnn/low.h>", "<vector>")
        self.write("memcnn/right.h", "<memcnn/low.h>", "<cstddef>")
        self.write("memcnn/low.h", code="struct Low {};\n")

    def write(self, path, *included, code=""):
        lines = ["#pragma once\n"] + [f"#include {name}\n" for name in included]
        path = self.root / "include" / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines) + code, encoding="utf-8")

    def chains(self):
        headers = check_headers.read_headers(self.root)
        return list(check_headers.chains_of(check_headers.with_others(headers)))

    def assert_problems(self, *parts, count=1):
        printed = io.StringIO()
        compiler = os.environ.get("CXX", "c++")
        arguments = ["--root", str(self.root), "--jobs", "2", compiler]
        with contextlib.redirect_stdout(printed):
            code = check_headers.main(arguments)
        self.assertEqual(code, 1 if count else 0)
        for part in parts:
            self.assertIn(part, printed.getvalue())
        self.assertIn(f", {count} problems", printed.getvalue())

    def test_header_comes_after_what_it_includes_alone(self):
        chains = self.chains()
        self.assertEqual(sorted(map(len, chains)), [1, 3])
        (long,) = (chain for chain in chains if len(chain) == 3)
        self.assertEqual([long[0], long[2]], ["memcnn/low.h", "memcnn/all.h"])

    def test_each_header_of_the_library_comes_after_what_it_includes_alone(self):
        root = pathlib.Path(__file__).resolve().parents[2]
        included = check_headers.with_others(check_headers.read_headers(root))
        chains = list(check_headers.chains_of(included))
        self.assertCountEqual(sum(chains, []), included)
        for chain in chains:
            for place, name in enumerate(chain):
                self.assertLessEqual(set(chain[:place]), included[name])

    def test_good_headers_have_no_problem(self):
        self.assert_problems("4 headers in 2 translation units", count=0)

    def test_header_that_forgets_what_others_include_is_named(self):
        self.write("memcnn/right.h", "<memcnn/low.h>", code="std::vector<int> v();\n")
        self.assert_problems("memcnn/right.h: expected it to compile alone", "vector")

    def test_header_that_forgets_another_one_is_named(self):
        self.write("memcnn/right.h", code="Low right();\n")
        self.assert_problems("memcnn/right.h: expected it to compile alone", "Low")

    def test_header_in_the_middle_of_a_chain_is_named(self):
        self.write("memcnn/high.h", "<memcnn/all.h>")
        self.write(
            "memcnn/all.h",
            "<memcnn/left.h>",
            "<memcnn/right.h>",
            code="std::string all();\n",
        )
        self.assertEqual(sorted(map(len, self.chains())), [1, 4])
        self.assert_problems("memcnn/all.h: expected it to compile alone", "string")

    def test_include_on_a_condition_hides_nothing(self):
        for path in "left.h", "all.h":
            (self.root / "include/memcnn" / path).unlink()
        self.write(
            "memcnn/right.h",
            code="#ifdef SOME\n#if 1\n#endif\n#include <memcnn/low.h>\n#endif\n"
            "Low right();\n",
        )
        self.assert_problems("memcnn/right.h: expected it to compile alone", "Low")

    def test_warning_is_a_problem(self):
        self.write("memcnn/low.h", code="inline void low(int unused) {}\n")
        self.assert_problems("memcnn/low.h: expected", "unused", count=2)

    def test_header_that_does_not_guard_itself_is_a_problem(self):
        path = self.root / "include/memcnn/right.h"
        path.write_text("struct Right {};\n", encoding="utf-8")
        self.assert_problems("memcnn/right.h: expected", "Right")

    def test_copied_header_is_checked(self):
        path = self.root / "examples/revnet/revnet.h"
        path.parent.mkdir(parents=True)
        path.write_text("#pragma once\nLow copied();\n", encoding="utf-8")
        self.assert_problems("revnet.h: expected it to compile alone", "Low")


if __name__ == "__main__":
    unittest.main(verbosity=2)
