# SPDX-License-Identifier: MIT
"""Checks the pages of docs/api against the headers, and every link of all pages.

    python3 tests/packaging/check_pages.py [SOURCE_DIR]

Exits with 1, and lists what is wrong, if
  - a public name of include/memcnn is missing in the index, docs/api/README.md,
    or what the index calls by name is not public;
  - the table of an options struct differs from the TORCH_ARGs of its header in
    names, types or defaults;
  - a relative link in a page of Markdown leads to no file, or to no heading.
Python alone is needed, no package.
"""

import pathlib
import re
import sys

INDEX = "docs/api/README.md"
# Folders that no page of this repository is in.
SKIPPED = {"build", "data", "results", ".git"}

TYPE = re.compile(r"^(?:class|struct|enum class) (\w+)\b(?!;)", re.M)
HOLDER = re.compile(r"^TORCH_MODULE\((\w+)\);", re.M)
FUNCTION = re.compile(r"^(?:inline )?(?:const )?[\w:]+(?:<[^>]*>)?[&*]? (\w+)\(", re.M)
OPTIONS = re.compile(r"^struct (\w+) \{\n(.*?)^\};", re.M | re.S)
OPTION = re.compile(r"TORCH_ARG\((.+), (\w+)\) = ([^;]+);")
HEADING = re.compile(r"^#+ +(.+?) *$", re.M)
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^( *)```.*?^\1```$", re.M | re.S)


def public_part(header):
    """A header without what is in a namespace detail."""
    text = header.read_text(encoding="utf-8")
    for namespace in (
        r"^namespace detail \{\n(?:(?:class|struct) \w+;\n)+\}$",
        r"^namespace detail \{.*?^\} // namespace detail$",
    ):
        text = re.sub(namespace, "", text, flags=re.M | re.S)
    return text


def public_headers(root):
    include = root / "include/memcnn"
    for header in sorted(include.rglob("*.h")):
        if "detail" not in header.relative_to(include).parts:
            yield header


def public_names(root):
    names = set()
    for header in public_headers(root):
        text = public_part(header)
        names.update(TYPE.findall(text), HOLDER.findall(text), FUNCTION.findall(text))
    # The modules behind holders.
    return {name for name in names if not name.endswith("Impl")}


def check_index(root):
    page = (root / INDEX).read_text(encoding="utf-8")
    table = "\n".join(line for line in page.split("\n") if ".h` |" in line)
    listed = set(re.findall(r"\[`(\w+)`\]", table))
    names = public_names(root)
    for name in sorted(names - listed):
        yield f"{INDEX}: expected a row for {name}, which is public."
    for name in sorted(listed - names):
        yield f"{INDEX}: {name} is not public."


def sections(root):
    """The heading and the text of each section of the pages of docs/api."""
    for page in sorted((root / INDEX).parent.glob("*.md")):
        parts = re.split(r"^#+ +(.+)$", page.read_text("utf-8"), flags=re.M)
        for heading, text in zip(parts[1::2], parts[2::2]):
            yield page.relative_to(root), heading, text


def check_options(root):
    for header in public_headers(root):
        for struct, body in OPTIONS.findall(public_part(header)):
            expected = {
                (name, type_, default) for type_, name, default in OPTION.findall(body)
            }
            if not expected:
                continue
            tables = [
                (page, text)
                for page, heading, text in sections(root)
                if f"Options: `{struct}`" in heading
            ]
            if len(tables) != 1:
                yield f"docs/api: expected one heading 'Options: `{struct}`'."
                continue
            page, text = tables[0]
            found = set(re.findall(r"^\| `(\w+)` \| `(.+?)` \| `(.+?)` \|", text, re.M))
            for name, type_, default in sorted(expected ^ found):
                where = "header" if (name, type_, default) in expected else page
                yield (
                    f"{page}: {struct}::{name} differs from the header; the "
                    f"{where} alone has type {type_}, default {default}."
                )


def anchors(text):
    """The anchors that GitHub gives to the headings of a page."""
    found = set()
    for heading in HEADING.findall(FENCE.sub("", text)):
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        kept = re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower())
        found.add(kept.replace(" ", "-"))
    return found


def check_links(root):
    for page in sorted(root.rglob("*.md")):
        name = page.relative_to(root)
        if SKIPPED & set(name.parts):
            continue
        for link in LINK.findall(FENCE.sub("", page.read_text("utf-8"))):
            path, _, anchor = link.partition("#")
            if re.match(r"\w+:", path):
                continue  # of the web
            target = (page.parent / path).resolve() if path else page
            if not target.exists():
                yield f"{name}: no file for the link {link}."
            elif anchor and anchor not in anchors(target.read_text("utf-8")):
                yield f"{name}: no heading for the link {link}."


def main(arguments):
    here = pathlib.Path(__file__).resolve()
    root = pathlib.Path(arguments[0]) if arguments else here.parents[2]
    root = root.resolve()
    problems = [
        *check_index(root),
        *check_options(root),
        *check_links(root),
    ]
    for problem in problems:
        print(problem)
    names = len(public_names(root))
    print(f"check_pages.py: {names} public names, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
