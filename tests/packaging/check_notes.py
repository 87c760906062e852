# SPDX-License-Identifier: MIT
"""Checks the Notes of the headers, their citations, and that every rule is tested.

    python3 tests/packaging/check_notes.py [SOURCE_DIR]

A Note is a comment in a header of include/memcnn that begins with `// Note [Name]`
and has rules `// 1. ...`, counted from 1. Exits with 1, and lists what is wrong, if
  - two headers have a Note of one name, or rules are not counted one by one;
  - a citation ("Note [Name]", "Note [Name], rule 2", "..., rules 1 and 2") in a
    source, test or page leads to no Note or rule;
  - a rule N has no test `RuleN...` in tests/notes/<name>_test.cpp, or such a test
    has no rule;
  - the table of docs/design.md does not name the header of each Note;
  - a comment in a header names a file that is no header of memcnn or LibTorch: others
    are not there where memcnn is installed.
Python alone is needed, no package.
"""

import pathlib
import re
import sys

NOTE = re.compile(r"^// Note \[([^\]]+)\]\n((?://.*\n)+)", re.M)
RULE = re.compile(r"^// (\d+)\. ", re.M)
CITATION = re.compile(r"Note \[([^\]]+)\](?:,\s+rules? (\d+)(?:(?:,| and) (\d+))*)?")
TEST = re.compile(r"^TEST\w*\(\s*\w+,\s*Rule(\d+)\w+", re.M)
FILE = re.compile(r"(?<![\w./-])[\w./-]+\.(?:h|md|cpp|py|txt)\b")
OF_LIBTORCH = ("torch/", "ATen/", "c10/")
CITING = ("include/**/*.h", "tests/**/*.h", "tests/**/*.cpp", "docs/**/*.md", "*.md")
PLACEHOLDERS = {"Name"}


def notes_of(root, problems):
    """{name: (header, number of rules)} of all Notes."""
    notes = {}
    for header in sorted((root / "include/memcnn").rglob("*.h")):
        for name, text in NOTE.findall(header.read_text(encoding="utf-8")):
            rules = [int(number) for number in RULE.findall(text)]
            if name in notes:
                problems.append(f"{header}: a second Note [{name}]")
            if not rules or rules != list(range(1, len(rules) + 1)):
                problems.append(f"{header}: Note [{name}] counts its rules {rules}")
            notes[name] = (header, len(rules))
    return notes


def check_citations(root, notes, problems):
    for pattern in CITING:
        for path in sorted(root.glob(pattern)):
            # A citation may go on in the next line of a comment.
            text = re.sub(r"\n *(?:///?|\*)? *", " ", path.read_text(encoding="utf-8"))
            for found in CITATION.finditer(text):
                name, rules = found[1], [int(n) for n in found.groups()[1:] if n]
                if name in PLACEHOLDERS:
                    continue
                if name not in notes:
                    problems.append(f"{path}: there is no Note [{name}]")
                elif any(rule > notes[name][1] for rule in rules):
                    problems.append(f"{path}: there is no rule like {found[0]!r}")


def check_tests(root, notes, problems):
    for name, (_, rules) in notes.items():
        path = root / "tests/notes" / (name.lower().replace(" ", "_") + "_test.cpp")
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        tested = {int(number) for number in TEST.findall(text)}
        for rule in sorted(set(range(1, rules + 1)) ^ tested):
            what = "has no test" if rule <= rules else "is tested, but does not exist"
            problems.append(f"{path}: rule {rule} of Note [{name}] {what}")


def check_files(root, problems):
    """What an editor shows to users cites only what they have."""
    library = root / "include/memcnn"
    for header in sorted(library.rglob("*.h")):
        for comment in re.findall(r"//.*", header.read_text(encoding="utf-8")):
            for name in FILE.findall(comment):
                if not (name.startswith(OF_LIBTORCH) or (library / name).is_file()):
                    problems.append(f"{header}: {name} is not installed")


def check_table(root, notes, problems):
    table = (root / "docs/design.md").read_text(encoding="utf-8")
    for name, (header, _) in notes.items():
        place = f"(../{header.relative_to(root).as_posix()})"
        if not any(
            line.startswith(f"| [{name}] |") and place in line
            for line in table.splitlines()
        ):
            problems.append(f"docs/design.md: Note [{name}] is not found in {place}")


def main():
    root = pathlib.Path(
        sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parents[2]
    ).resolve()
    problems = []
    notes = notes_of(root, problems)
    check_citations(root, notes, problems)
    check_tests(root, notes, problems)
    check_table(root, notes, problems)
    check_files(root, problems)
    for problem in problems:
        print(problem.replace(f"{root}/", ""))
    rules = sum(count for _, count in notes.values())
    print(f"check_notes.py: {len(notes)} Notes with {rules} rules")
    return 1 if problems or not notes else 0


if __name__ == "__main__":
    sys.exit(main())
