# SPDX-License-Identifier: MIT
"""Checks that each header compiles alone, without a warning, and guards itself.

    python3 tests/packaging/check_headers.py [--root DIR] [--jobs N] COMPILER FLAG...

Exits with 1, and shows what the compiler says, if one does not. The flags say where
LibTorch's headers are; CTest knows them. Python and a compiler are needed.

LibTorch's headers take nearly all of the time, so they are read once for several of
ours. What is read before a header hides what it forgets to include, unless it is
included by that header anyway. So a translation unit is a chain of headers, each of
which includes all that stand before it, itself or by another.
"""

import argparse
import concurrent.futures
import pathlib
import re
import subprocess
import sys

from check_includes import includes_of

# Folders of headers, and which of them are checked: the library's, and the one that
# people copy.
CHECKED = {"include": "memcnn/**/*.h", "examples/revnet": "revnet.h"}
FLAGS = "-std=c++17 -fsyntax-only -Wall -Wextra -Wpedantic -Werror -x c++ -".split()

# A condition that has no other inside.
CONDITIONAL = re.compile(
    r"^[ ]*#[ ]*if(?:(?!^[ ]*#[ ]*if).)*?^[ ]*#[ ]*endif", re.DOTALL | re.MULTILINE
)


def surely_included(text):
    """What a header includes whatever is defined."""
    while (rest := CONDITIONAL.sub("", text)) != text:
        text = rest
    return {name for name, _ in includes_of(text)}


def read_headers(root):
    """What each header that is checked includes itself, by the header's name."""
    return {
        file.relative_to(root / folder).as_posix(): surely_included(
            file.read_text(encoding="utf-8")
        )
        for folder, pattern in CHECKED.items()
        for file in sorted((root / folder).glob(pattern))
    }


def with_others(headers):
    """What each header includes, itself or by another of the headers."""
    all_of = {}

    def visit(name):
        if name not in all_of:
            all_of[name] = set()  # ends circles
            for included in headers.get(name, ()):
                all_of[name] |= {included} | visit(included)
        return all_of[name]

    return {name: visit(name) - {name} for name in headers}


def chains_of(included):
    """The headers in as few chains as there can be, which end in cheap ones.

    A chain takes about the time of its last header. So each header is given a
    follower if one can be found, those with most includes first: the matching of a
    bipartite graph, by augmenting paths. Chains with most to read are yielded first.
    """
    leader = {}  # of a follower

    def find_follower(name, tried):
        for follower in included:
            if name in included[follower] and follower not in tried:
                tried.add(follower)
                if follower not in leader or find_follower(leader[follower], tried):
                    leader[follower] = name
                    return True
        return False

    dearest_first = sorted(included, key=lambda name: -len(included[name]))
    for name in dearest_first:
        find_follower(name, set())
    for last in dearest_first:
        if last not in leader.values():
            chain = [last]
            while chain[0] in leader:
                chain.insert(0, leader[chain[0]])
            yield chain


def check(chain, compiler):
    """What is wrong with the chain's first bad header; None if there is none."""
    # Again, which shows that they guard themselves.
    unit = "".join(f"#include <{name}>\n" for name in chain * 2)
    result = subprocess.run(compiler, input=unit, capture_output=True, text=True)
    if result.returncode == 0:
        return None
    line = re.search(r"<stdin>:(\d+)", result.stderr)
    name = chain[(int(line[1]) - 1) % len(chain)] if line else " or ".join(chain)
    return f"{name}: expected it to compile alone, but got:\n{result.stderr}"


def main(arguments):
    parser = argparse.ArgumentParser()
    here = pathlib.Path(__file__).resolve()
    parser.add_argument("--root", type=pathlib.Path, default=here.parents[2])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("compiler", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)

    headers = read_headers(options.root)
    chains = list(chains_of(with_others(headers)))
    folders = [f"-I{options.root / folder}" for folder in CHECKED]
    compiler = options.compiler + folders + FLAGS
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        results = pool.map(lambda chain: check(chain, compiler), chains)
        problems = [problem for problem in results if problem]
    for problem in problems:
        print(problem)
    print(
        f"check_headers.py: {len(headers)} headers in {len(chains)} translation "
        f"units, {len(problems)} problems"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
