# SPDX-License-Identifier: MIT
"""Reads results directories of memcnn_train and memcnn_glow, and says what is wrong
with them."""

import base64
import dataclasses
import itertools
import json
import math
import re
import stat

import numpy
import pandas

from labels import label

CONFIG_FIELDS = {
    str: ("model", "dataset", "engine"),
    int: ("iterations", "batch_size", "seed"),
    float: ("learning_rate",),
}
RUN_FIELDS = {
    str: ("device", "memcnn", "libtorch"),
    int: ("threads", "processes", "parameters", "parameter_bytes"),
}
ROW_FIELDS = ("loss", "lr", "ms_per_step", "held_bytes", "peak_bytes")
# What a step took, and how a log that goes on says the same.
STEP_FIELDS = {
    "median_ms_per_step": ("ms_per_step", "median"),
    "held_after_forward_bytes": ("held_bytes", "max"),
    "peak_of_the_step_bytes": ("peak_bytes", "max"),
}


@dataclasses.dataclass(frozen=True)
class Program:
    """What the files of a program's runs have beside what those of all have."""

    name: str
    settings: tuple = ()  # numbers
    rows: tuple = ()
    tests: tuple = ()  # of rows and of results
    draws: bool = False  # sheets of samples


TRAIN = Program(
    "memcnn_train",
    settings=("momentum", "weight_decay"),
    rows=("accuracy",),
    tests=("test_accuracy", "test_loss", "test_top5"),
)
GLOW = Program(
    "memcnn_glow",
    tests=("test_bits_per_dim", "reconstruction_error"),
    draws=True,
)


def program_of(config):
    return GLOW if config.get("model") == "glow" else TRAIN


KINDS = {str: "text", int: "a whole number", float: "a number", dict: "an object"}

ANOTHER_FOLDER = "Give the --results-dir of a run of memcnn_train or memcnn_glow."
REPAIR = "Repair that line, or train again."


class ReportError(Exception):
    """What the user has to know, and can do something about."""


def refusal(where, expected, found, cure=ANOTHER_FOLDER):
    return ReportError(f"{where}: expected {expected}, but {found}. {cure}")


def shown(value):
    """A value as JSON, short enough for a message, and nothing a terminal obeys."""
    text = json.dumps(value, ensure_ascii=False)
    if not text.isprintable():
        text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def is_a(value, kind):
    if isinstance(value, bool):
        return False
    if isinstance(value, int) and kind is int:
        return abs(value) < 2**53  # beyond, floating point has gaps
    return isinstance(value, (int, float) if kind is float else kind)


def field(holder, name, kind, where):
    """A required member of a JSON object, of the given kind."""
    if name not in holder:
        raise refusal(where, f'"{name}"', "it is missing")
    value = holder[name]
    if not is_a(value, kind):
        expected = f'"{name}" to be {KINDS[kind]}'
        raise refusal(where, expected, f"got {shown(value)}")
    return value


def check_fields(holder, fields, where):
    for kind, names in fields.items():
        for name in names:
            field(holder, name, kind, where)


def number(holder, name, where):
    """A number of a JSON object; nan where there is none, or null.

    JSON has no infinities: a diverged loss is null in the program's files.
    """
    value = holder.get(name)
    if value is None:
        return math.nan
    if not is_a(value, float):
        expected = f'"{name}" to be a number'
        raise refusal(where, expected, f"got {shown(value)}", REPAIR)
    try:
        value = float(value)
    except OverflowError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def numbers(holder, names, where):
    return {name: number(holder, name, where) for name in names}


def read_bytes(path):
    expected = "a file that can be read"
    try:
        # Anything else could be waited for, or read, without an end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise refusal(path, expected, "it is something else")
        return path.read_bytes()
    except OSError as error:
        raise refusal(path, expected, f"got: {error.strerror}") from error


def parse(data, path, line=None):
    """The JSON object in `data`, which is line `line` of its file, or all."""
    where = f"{path}:{line}" if line else path
    try:
        value = json.loads(data.decode("utf-8"))
    except json.JSONDecodeError as error:
        where = f"{path}:{line or error.lineno}"
        found = f"got: {error.msg} (column {error.colno})"
        raise refusal(where, "JSON", found, REPAIR) from error
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        found, cure = "got what cannot be read", "Repair it, or train again."
        raise refusal(where, "JSON in UTF-8", found, cure) from error
    if not isinstance(value, dict):
        raise refusal(where, "a JSON object", f"got {shown(value)}", REPAIR)
    return value


def read_row(holder, program, before, where):
    iteration = field(holder, "iteration", int, where)
    if iteration <= before:
        expected = f'"iteration" to rise above {before} of the line before'
        raise refusal(where, expected, f"got {iteration}", REPAIR)
    if "loss" not in holder:
        field(holder, "loss", float, where)
    fields = (*ROW_FIELDS, *program.rows, *program.tests)
    row = {"iteration": iteration} | numbers(holder, fields, where)
    if program.draws:
        row["samples"] = holder.get("samples")
    return row


def read_log(path, program):
    """The rows of a log, and whether its last line was cut off."""
    lines = read_bytes(path).split(b"\n")
    cut = False
    try:  # A killed run may leave a part of a line, or a line without its end.
        parse(lines[-1], path)
    except ReportError:
        cut = lines.pop() != b""
    rows = []
    for count, line in enumerate(lines, start=1):
        before = rows[-1]["iteration"] if rows else -math.inf
        row = parse(line, path, count)
        rows.append(read_row(row, program, before, f"{path}:{count}"))
    return rows, cut


def table_of(rows, program):
    """Values by iteration, a column a field."""
    columns = ["iteration", *ROW_FIELDS, *program.rows, *program.tests]
    table = pandas.DataFrame(rows, columns=columns)
    return table.set_index("iteration").astype(float)


@dataclasses.dataclass(eq=False)
class Run:
    """One results directory, checked."""

    name: str
    number: int  # from 0, in the order of the command line
    config: dict
    info: dict  # run.json
    rows: pandas.DataFrame = None  # the log, from table_of()
    results: dict = None  # numbers of a finished run
    comparison: dict = None  # of a finished run with its plain twin
    notes: list = dataclasses.field(default_factory=list)
    label: str = ""  # beside its network, where others have that
    sheets: dict = dataclasses.field(default_factory=dict)  # files by iteration

    @property
    def program(self):
        return program_of(self.config)

    @property
    def key(self):
        return letters(self.number)

    @property
    def finished(self):
        return self.results is not None

    @property
    def iteration(self):
        """The last iteration that is known to be done."""
        if self.finished:
            return self.config["iterations"]
        return self.rows.index[-1] if len(self.rows) else 0

    def column(self, name):
        """Values by iteration, of the rows that have the field."""
        return self.rows[name].dropna()

    def tests(self, name):
        """As column(), with the evaluation at the end of the run."""
        found = self.column(name)
        if self.finished and not math.isnan(self.results[name]):
            found.loc[self.iteration] = self.results[name]
        return found

    def last_test(self, name):
        found = self.tests(name)
        return found.iloc[-1] if len(found) else math.nan

    def last_test_loss(self):
        """As last_test(), and infinite where an evaluation gave no number."""
        evaluations = self.tests("test_accuracy")
        if not len(evaluations):
            return math.nan
        return self.tests("test_loss").get(evaluations.index[-1], math.inf)

    def step(self, name):
        """What a step takes: of the results, else of the log."""
        if self.finished and not math.isnan(self.results[name]):
            return self.results[name]
        column, summary = STEP_FIELDS[name]
        return self.rows[column].agg(summary)

    def training_minutes(self):
        """Time of all logged steps: rows hold the mean of the steps since the
        row before."""
        steps = numpy.diff(self.rows.index, prepend=0)
        times = self.rows["ms_per_step"] * steps
        return times.sum(skipna=False, min_count=1) / 60000


def read_config(info, path):
    config = field(info, "config", dict, path)
    where = f'{path}: "config"'
    check_fields(config, CONFIG_FIELDS, where)
    check_fields(config, {float: program_of(config).settings}, where)
    # Without iterations a run has evaluated only.
    for name, least in (("iterations", 0), ("batch_size", 1)):
        if config[name] < least:
            expected = f'"{name}" to be at least {least}'
            raise refusal(path, expected, f"got {config[name]}")
    return config


def read_comparison(results, engine, path):
    """Measurements by engine, and the steps that they were taken over."""
    if results.get("comparison") is None:
        return None
    comparison = field(results, "comparison", dict, path)
    found = {"steps": field(comparison, "steps", int, path)}
    for name in dict.fromkeys((engine, "plain")):
        found[name] = numbers(field(comparison, name, dict, path), STEP_FIELDS, path)
    return found


def read_results(run, path):
    results = parse(read_bytes(path), path)
    if field(results, "config", dict, path) != run.config:
        run.notes.append(
            "results.json is of a run with other settings than run.json, and is "
            "left out."
        )
        return
    step = field(results, "step", dict, path)
    tests = numbers(results, run.program.tests, path)
    run.results = tests | numbers(step, STEP_FIELDS, path)
    if run.program.draws:
        run.sheets[run.iteration] = results.get("samples")
    run.comparison = read_comparison(results, run.config["engine"], path)


def read_run(directory, name, number):
    """Reads a results directory, or throws ReportError."""
    if not directory.is_dir():
        raise refusal(directory, "a directory", "there is none")
    path = directory / "run.json"
    info = parse(read_bytes(path), path)
    run = Run(name, number, read_config(info, path), info)
    info.setdefault("processes", 1)  # of versions that knew of no others
    check_fields(info, RUN_FIELDS, path)

    path = directory / "log.jsonl"
    rows, cut = read_log(path, run.program) if path.exists() else ([], False)
    run.rows = table_of(rows, run.program)
    run.sheets = {row["iteration"]: row["samples"] for row in rows if run.program.draws}
    if cut:
        run.notes.append(
            "The last line of the log was cut off while it was written, and is left "
            "out."
        )
    path = directory / "results.json"
    if path.exists():
        read_results(run, path)
    note_divergence(run)
    run.sheets = read_sheets(directory, run.sheets)
    return run


def read_sheets(directory, names):
    """Sheets of samples as addresses that hold them, by iteration: those that are
    still there."""
    found = {}
    for iteration, name in names.items():
        # Nothing outside of the folder, whatever a file says.
        if isinstance(name, str) and re.fullmatch(r"samples-\d+\.png", name):
            path = directory / name
            if path.is_file():
                data = base64.b64encode(read_bytes(path)).decode("ascii")
                found[iteration] = f"data:image/png;base64,{data}"
    return found


def note_divergence(run):
    lost = run.rows.index[run.rows["loss"].isna()]
    if len(lost):
        run.notes.append(
            f"The loss is not a finite number in {len(lost):,} of {len(run.rows):,} "
            f"rows, for the first time at iteration {lost[0]:,}."
        )
    if run.program is TRAIN and math.isinf(run.last_test_loss()):
        run.notes.append(
            "The last test loss is not a finite number: the test accuracy says nothing."
        )


def names_of(directories):
    """The shortest ends of the paths that tell them apart."""
    parts = [path.resolve().parts for path in directories]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def letters(number):
    """A, B, ..., Z, AA, AB, ..."""
    before = letters(number // 26 - 1) if number >= 26 else ""
    return before + chr(ord("A") + number % 26)


def read_runs(directories):
    unique = list({path.resolve(): path for path in directories}.values())
    runs = [
        read_run(*found) for found in zip(unique, names_of(unique), itertools.count())
    ]
    if len({run.program for run in runs}) > 1:
        names = " and ".join(sorted({run.program.name for run in runs}))
        raise refusal(
            "runs",
            "those of one program",
            f"got some of {names}",
            "Write a page for each.",
        )
    label(runs)
    return runs
