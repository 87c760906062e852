# SPDX-License-Identifier: MIT
"""Checks that functions of C++, and the files of the examples, can be read at once.

    python3 tests/packaging/check_sizes.py [SOURCE_DIR]

Exits with 1, and lists what is too long, if a function has more than 60 lines or a
file of examples more than 400. Python alone is needed.
"""

import pathlib
import re
import sys

FUNCTION_LINES = 60
FILE_LINES = 400

# One case for each opcode: longer than a function is otherwise.
SWITCHES = {"examples/train/weights/unpickler.h": ["void step(unsigned opcode)"]}

# What may hold braces that are none of the code's.
TEXT = re.compile(
    r"""//[^\n]* | /\*.*?\*/ | ^[ ]*\#(?:[^\n]*\\\n)*[^\n]*
        | R"(?P<end>[^(\s]*)\(.*?\)(?P=end)" | "(?:\\.|[^"\\])*"
        | (?<![0-9a-fA-F])'(?:\\.|[^'\\])+'  # but for 1'000""",
    re.DOTALL | re.MULTILINE | re.VERBOSE,
)
# Before the head of what a brace opens: macros end without a semicolon.
BEFORE = re.compile(r"(?:.*\n[ ]*\n)?\s*(?:(?:public|protected|private):\s*)?", re.S)
SCOPE = re.compile(
    r"(?:template\b.*>\s*)?(?:inline\s+)?(?:namespace|class|struct|enum)\b", re.S
)


def functions(code):
    """The first line, the number of lines and the head of each function."""
    code = TEXT.sub(lambda text: re.sub(r"[^\n]", " ", text[0]), code)
    begin = 0
    open_braces = []  # where the function of each begins, if one does
    for mark in re.finditer(r"[{};]", code):
        if mark[0] == "{":
            start = BEFORE.match(code, begin, mark.start()).end()
            head = code[start : mark.start()]
            nested = any(function is not None for function in open_braces)
            is_function = "(" in head and not SCOPE.match(head) and not nested
            open_braces.append(start if is_function else None)
        elif mark[0] == "}":
            start = open_braces.pop()
            if start is not None:
                line = code.count("\n", 0, start) + 1
                head = " ".join(code[start:].partition("{")[0].split())
                yield line, code.count("\n", start, mark.start()) + 1, head
        begin = mark.end()


def check(root, file):
    path = file.relative_to(root).as_posix()
    code = file.read_text(encoding="utf-8")
    lines = code.count("\n")
    if path.startswith("examples/") and lines > FILE_LINES:
        yield f"{path}: expected {FILE_LINES} lines or less, but it has {lines}."
    for line, count, head in functions(code):
        if count > FUNCTION_LINES and head not in SWITCHES.get(path, []):
            yield (
                f"{path}:{line}: expected a function of {FUNCTION_LINES} lines or "
                f"less, but {head} has {count}."
            )


def main(arguments):
    here = pathlib.Path(__file__).resolve()
    root = pathlib.Path(arguments[0]) if arguments else here.parents[2]
    files = [
        file
        for folder in ["include", "examples", "tests"]
        for file in sorted((root / folder).rglob("*"))
        if file.suffix in {".h", ".cpp"}
    ]
    problems = [problem for file in files for problem in check(root, file)]
    for problem in problems:
        print(problem)
    print(f"check_sizes.py: {len(files)} files, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
