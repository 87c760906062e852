# SPDX-License-Identifier: MIT
"""Checks that includes go one way, down the tables that say who includes whom.

    python3 tests/packaging/check_includes.py [SOURCE_DIR [PAGE...]]

Exits with 1, and lists what is wrong, if a header is not in its table exactly once,
or includes one that is not in a lower row. A table has backticked paths in its first
column, several a row if they do not include each other. Python alone is needed.
"""

import pathlib
import re
import sys

# The page with the table, and the folder that its paths are relative to: the last
# part of it is the first of what stands in an #include.
TABLES = {
    "docs/design.md": "include/memcnn",
    "examples/train/README.md": "examples/train",
    "examples/benchmark/README.md": "examples/benchmark",
    "examples/glow/README.md": "examples/glow",
}
TABLE = re.compile(r"^\| (?:header|file) \|.*\n\|[-| ]+\n((?:\|.*\n)+)", re.M)
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.M)


def rows_of(page):
    """The paths of each row of the page's first table of headers or files."""
    table = TABLE.search(page.read_text(encoding="utf-8"))
    rows = table[1].splitlines() if table else []
    return [re.findall(r"`([^`]+)`", row.split("|")[1]) for row in rows]


def check_listed(page, folder, rows):
    listed = [path for row in rows for path in row]
    for path in sorted(set(listed)):
        if listed.count(path) > 1:
            yield f"{page}: expected {path} in one row, but it is in several."
        if not (folder / path).is_file():
            yield f"{page}: expected {path} to be a file of {folder.name}."
    for header in sorted(folder.rglob("*.h")):
        path = header.relative_to(folder).as_posix()
        if path not in listed:
            yield f"{page}: expected a row for {path}, but there is none."


def includes_of(text):
    """What stands in each #include of a file's text, and its line."""
    for found in INCLUDE.finditer(text):
        yield found[1], text.count("\n", 0, found.start(1)) + 1


def check_order(folder, rows):
    row_of = {path: number for number, row in enumerate(rows, 1) for path in row}
    for path, row in row_of.items():
        file = folder / path
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        for name, line in includes_of(text):
            included = name.removeprefix(f"{folder.name}/")
            if included != name and row_of.get(included, row + 1) <= row:
                yield (
                    f"{file}:{line}: {path} of row {row} includes {included} of row "
                    f"{row_of[included]}, which is not lower."
                )


def main(arguments):
    here = pathlib.Path(__file__).resolve()
    root = pathlib.Path(arguments[0]) if arguments else here.parents[2]
    problems, count = [], 0
    for page in arguments[1:] or TABLES:
        folder = TABLES[page]
        rows = rows_of(root / page)
        problems += check_listed(page, root / folder, rows)
        problems += check_order(root / folder, rows)
        count += sum(map(len, rows))
    for problem in problems:
        print(problem)
    print(f"check_includes.py: {count} files in tables, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
