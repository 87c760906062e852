# SPDX-License-Identifier: MIT
"""Tests of check_sizes.py, on code made up for it.

    python3 tests/packaging/check_sizes_test.py
"""

import contextlib
import io
import pathlib
import tempfile
import unittest

import check_sizes

# Braces in texts, and every kind of scope around and in functions.
CODE = """#define OPEN {
// {
DECLARE(a, b)

namespace a {
struct S {
  S() : a_(1), b_("{") {
  }
  int f(int x) const {
    const char open = '{';
    const auto lambda = [](int y) { return y; };
    return lambda(x + 100'000);
  }

 private:
  int b_ = 1;
};
template <class T>
class C final : public D<decltype(f())> {
  T t_{};
};
const char* text = R"end(
  { "
)end";
TEST(Suite, Name) {
  for (;;) {
  }
}
} // namespace a
"""


class Sizes(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.root = pathlib.Path(folder.name)

    def write(self, path, code):
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(code, encoding="utf-8")

    def check(self):
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            failed = check_sizes.main([str(self.root)])
        self.assertEqual(failed, 0 if ", 0 problems" in output.getvalue() else 1)
        return output.getvalue()

    def test_finds_functions_and_nothing_else(self):
        self.assertEqual(
            list(check_sizes.functions(CODE)),
            [
                (7, 2, "S() : a_(1), b_( )"),
                (9, 5, "int f(int x) const"),
                (25, 4, "TEST(Suite, Name)"),
            ],
        )

    def test_takes_functions_of_sixty_lines(self):
        self.write("include/a.h", "void f() {\n" + 58 * "g();\n" + "}\n")
        self.assertEqual(self.check(), "check_sizes.py: 1 files, 0 problems\n")

    def test_names_a_longer_function(self):
        self.write("tests/a_test.cpp", "\nvoid f() {\n" + 59 * "g();\n" + "}\n")
        self.assertIn(
            "tests/a_test.cpp:2: expected a function of 60 lines or less, but void f() "
            "has 61.",
            self.check(),
        )

    def test_knows_switches_by_their_file_and_head(self):
        (path, (head, *_)), *_ = check_sizes.SWITCHES.items()
        self.write(path, head + " {\n" + 60 * "g();\n" + "}\n")
        self.assertIn(", 0 problems", self.check())
        self.write("examples/other.h", head + " {\n" + 60 * "g();\n" + "}\n")
        self.assertIn("examples/other.h:1: ", self.check())

    def test_names_a_long_file_of_examples_alone(self):
        self.write("include/a.h", 401 * "int i;\n")
        self.write("examples/a.h", 400 * "int i;\n")
        self.assertIn(", 0 problems", self.check())
        self.write("examples/a.h", 401 * "int i;\n")
        self.assertIn(
            "examples/a.h: expected 400 lines or less, but it has 401.", self.check()
        )


if __name__ == "__main__":
    unittest.main()
