#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Turns results directories of memcnn_train or memcnn_glow into one page to look at.

    python3 memcnn_report.py RESULTS_DIR... [--output FILE] [--title TEXT]

The page is one HTML file that needs nothing beside it, and is the same, byte for
byte, for the same files. README.md says what is on it and what it needs.
"""

import argparse
import os
import pathlib
import sys

PROGRAM = "memcnn_report"


def write(path, text):
    """Writes a file as a whole, or leaves the old one."""
    partial = path.parent / f".{path.name}.{os.getpid()}"
    try:
        partial.write_text(text, encoding="utf-8", newline="\n")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Turns results directories of memcnn_train, or of memcnn_glow, of "
        "finished runs and of runs that are still going on, into one HTML page that "
        "needs nothing beside it.",
        epilog=f"Example: {PROGRAM} results/* --output report.html",
    )
    parser.add_argument(
        "directories",
        metavar="RESULTS_DIR",
        nargs="+",
        type=pathlib.Path,
        help="what --results-dir of the program was; holds a run.json",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=pathlib.Path,
        default=pathlib.Path("report.html"),
        help="the page to write (default: %(default)s)",
    )
    parser.add_argument(
        "--title",
        metavar="TEXT",
        default="Training report",
        help="heading of the page (default: %(default)s)",
    )
    return parser.parse_args(arguments)


def main(arguments=None):
    options = parse_arguments(arguments)
    try:
        import jinja2, matplotlib, pandas  # noqa: F401
    except ImportError as error:
        return failure(
            f"expected matplotlib, pandas and Jinja2 for Python, but got: {error}. "
            "Install them: apt-get install python3-matplotlib python3-pandas "
            "python3-jinja2 (elsewhere: python3 -m pip install matplotlib pandas "
            "jinja2)."
        )
    from page import counted, page
    from read import ReportError, read_runs

    try:
        runs = read_runs(options.directories)
    except ReportError as error:
        return failure(error)
    text = page(runs, options.title)
    try:
        write(options.output, text)
    except OSError as error:
        return failure(
            f"{options.output}: expected a file that can be written, but got: "
            f"{error.strerror}. Give another --output."
        )
    print(f"{options.output}: {counted(len(runs), 'run')}")
    return 0


def failure(message):
    print(f"{PROGRAM}: error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
