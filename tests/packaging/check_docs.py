# SPDX-License-Identifier: MIT
"""Checks that docs/errors.md has every message that the sources can give.

    python3 tests/packaging/check_docs.py [SOURCE_DIR]
    python3 tests/packaging/check_docs.py --list

The first form exits with 1, and lists what is missing, if the page lacks the
fixed parts of a message: of TORCH_CHECK*, static_assert, c10::str(), and
`throw Error`, FormatError or SharedError in include/memcnn and examples, and of errors in the
CMake files. What a message fills in when it is raised may be anything on the page, such as
<sizes>. Likewise the words of input_kept_because(), which the page has in a table
that lists these and no others. The second form prints all messages, to start a new entry from. Python
alone is needed, no package.
"""

import pathlib
import re
import sys

PAGE = "docs/errors.md"
CPP_SOURCES = (
    "include/memcnn/**/*.h",
    "examples/**/*.h",
    "examples/**/*.cpp",
)
CMAKE_SOURCES = (
    "CMakeLists.txt",
    "cmake/*.cmake",
    "tests/CMakeLists.txt",
    "tests/fuzz/CMakeLists.txt",
    "examples/**/CMakeLists.txt",
    "examples/**/*.cmake",
)

STRING = r'"(?:\\.|[^"\\])*"'
CALL = re.compile(
    r"\b(TORCH_CHECK\w*|static_assert|c10::str|throw (?:\w+::)*(?:Format|Shared)?Error)\s*\("
)
# Every string that a function of these returns is a reason to keep an input.
REASON_SOURCES = (
    "include/memcnn/detail/freed_storage.h",
    "include/memcnn/detail/free_inputs.h",
)
REASON_TABLE = "| it says | because |"

PLACE = r"\{[^{}]*\}"  # of a value in a pattern of fmt::format()
HOLE = None  # a part of a message that is filled in when it is raised


def without_comments(text):
    """The text with its comments blanked out, strings left alone."""
    pattern = re.compile(STRING + r"|'(?:\\.|[^'\\])'|//[^\n]*|/\*.*?\*/", re.DOTALL)

    def blanked(found):
        comment = found[0].startswith("/")
        return re.sub(r"[^\n]", " ", found[0]) if comment else found[0]

    return pattern.sub(blanked, text)


def arguments(text, start):
    """The arguments of the call whose parenthesis opens before `start`."""
    found, depth, begin, at = [], 0, start, start
    while True:
        literal = re.compile(STRING + r"|'(?:\\.|[^'\\])'").match(text, at)
        if literal:
            at = literal.end()
            continue
        if text[at] in "([{":
            depth += 1
        elif text[at] in ")]}" and depth > 0:
            depth -= 1
        elif text[at] == ")" or (text[at] == "," and depth == 0):
            found.append(text[begin:at].strip())
            begin = at + 1
            if text[at] == ")":
                return [argument for argument in found if argument]
        at += 1


def content(literals):
    """What adjacent string literals say, joined."""
    joined = "".join(found[1:-1] for found in re.findall(STRING, literals))
    return re.sub(r"\\(.)", lambda found: {"n": " "}.get(found[1], found[1]), joined)


def cpp_messages(text):
    text = without_comments(text)
    for call in CALL.finditer(text):
        if call[1].startswith("throw"):
            # A sum of strings and of fmt::format()'s patterns: only what is
            # between quotes and not in braces is fixed, and of two alternatives
            # the page may show each by itself.
            argument = ",".join(arguments(text, call.end()))
            for literal in re.findall(rf"{STRING}(?:\s*{STRING})*", argument):
                yield [
                    HOLE if re.fullmatch(PLACE, part) else part
                    for part in re.split(f"({PLACE})", content(literal))
                ]
            continue
        parts = arguments(text, call.end())
        if call[1] != "c10::str":
            parts = parts[1:]  # after the condition
        message = []
        for part in parts:
            if re.fullmatch(rf"(?:{STRING}\s*)+", part):
                if message and message[-1] is not HOLE:
                    message[-1] += content(part)
                else:
                    message.append(content(part))
            else:
                message.append(HOLE)
        yield message


def cmake_messages(text):
    text = re.sub(r"^\s*#.*$", "", text, flags=re.MULTILINE)
    text = text.replace("\\\n", "")
    call = (
        r"(?:message\(\s*FATAL_ERROR|set\(\$\{problem\}|"
        r"set\(memcnn_NOT_FOUND_MESSAGE|give_up\()\s*"
    )
    for found in re.finditer(rf"{call}({STRING})", text):
        message = []
        for part in re.split(r"(\$\{\w+\})", content(found[1])):
            message.append(HOLE if part.startswith("${") else part)
        yield message


def says_something(message):
    """Not so where a message comes from elsewhere as a whole."""
    fixed = " ".join(part for part in message if part is not HOLE)
    return bool(re.search(r"[A-Za-z]{2,}\W+[A-Za-z]{2,}", fixed))


def printed(message):
    return "".join("<...>" if part is HOLE else part for part in message)


def pattern(message):
    """Matches the page, whose white space is normalised."""
    parts = []
    for part in message:
        if part is HOLE:
            parts.append(r".{0,80}?")
        else:
            words = re.split(r"\s+", part)
            parts.append(r"\s*".join(re.escape(word) for word in words))
    return re.compile("".join(parts))


def all_messages(root):
    for globs, messages in (
        (CPP_SOURCES, cpp_messages),
        (CMAKE_SOURCES, cmake_messages),
    ):
        for glob in globs:
            for path in sorted(root.glob(glob)):
                for message in messages(path.read_text(encoding="utf-8")):
                    if says_something(message):
                        yield path.relative_to(root), message


def kept_reasons(root):
    """What input_kept_because() can say."""
    for path in REASON_SOURCES:
        text = without_comments((root / path).read_text(encoding="utf-8"))
        yield from re.findall(r'return "([^"]+)";', text)


def check_reasons(root, page):
    """The page's table of these has each as a row, and no others."""
    rows = page[page.index(REASON_TABLE) :].split("\n\n")[0].splitlines()[2:]
    listed = {row.split("`")[1] for row in rows}
    given = set(kept_reasons(root))
    for reason in sorted(given - listed):
        yield f"not in {PAGE}: {reason}"
    for reason in sorted(listed - given):
        yield f"{PAGE} alone has: {reason}"


def main(arguments):
    listing = "--list" in arguments
    places = [argument for argument in arguments if argument != "--list"]
    here = pathlib.Path(__file__).resolve()
    root = pathlib.Path(places[0]).resolve() if places else here.parents[2]
    found = list(all_messages(root))
    if listing:
        for path, message in found:
            print(f"{path}: {printed(message)}")
        return 0
    if not found:
        print(f"check_docs.py: expected messages in {root}, but found none.")
        return 1

    page = (root / PAGE).read_text(encoding="utf-8")
    wrong_reasons = list(check_reasons(root, page))
    for problem in wrong_reasons:
        print(problem)
    page = re.sub(r"\s+", " ", page)
    missing = [
        (path, message) for path, message in found if not pattern(message).search(page)
    ]
    for path, message in missing:
        print(f"{path}: not in {PAGE}: {printed(message)}")
    there = len(found) - len(missing)
    print(f"check_docs.py: {PAGE} has {there} of {len(found)} messages")
    return 1 if missing or wrong_reasons else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
