# SPDX-License-Identifier: MIT
"""Fills page.html.j2: numbers as text, and what runs have in common."""

import json
import math
import pathlib

import jinja2
from markupsafe import Markup

from curves import POINTS, WINDOW
from figures import COLOURS, DASHES, HEIGHT, MEBIBYTE, WIDTH, figures
from labels import setting
from read import GLOW, TRAIN

HERE = pathlib.Path(__file__).resolve().parent
NAMES = {
    "resnet32": "ResNet-32",
    "resnet110": "ResNet-110",
    "resnet164": "ResNet-164",
    "revnet38": "RevNet-38",
    "revnet110": "RevNet-110",
    "revnet164": "RevNet-164",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "glow": "Glow",
    "synthetic": "embedded synthetic images",
}
NOTHING = Markup('<span class="none">–</span>')
NOT_FINITE = Markup('<span class="none">not finite</span>')
MINUS = "\N{MINUS SIGN}"


def decimals(value, digits, unit=None):
    """A number for a table, or why there is none."""
    if math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return NOT_FINITE
    text = f"{value:,.{digits}f}".replace("-", MINUS)
    return (
        Markup('{} <span class="unit">{}</span>').format(text, unit) if unit else text
    )


def scientific(value):
    """A small number for a table, to two digits."""
    if not math.isfinite(value):
        return decimals(value, 0)
    digits, power = f"{value:.1e}".split("e")
    power = str(int(power)).replace("-", MINUS)
    return Markup("{} · 10<sup>{}</sup>").format(digits, power)


def thousands(count):
    return f"{count:,}"


def percent(part):
    return decimals(100 * part, 2)


def mebibytes(size, unit=None, digits=1):
    return decimals(size / MEBIBYTE, digits, unit)


def duration(minutes):
    """Of a short run to a tenth of a minute; the paper gives its own to a minute."""
    return decimals(minutes, 1 if minutes < 10 else 0)


def counted(count, noun):
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def named(name):
    return NAMES.get(name, name)


def engine(config):
    text = config["engine"]
    bits = config.get("fractional_bits")
    if bits is not None:
        text += f", exact ({bits} fractional bits)"
    if config.get("memory_budget_mib"):
        text += f", memory budget {config['memory_budget_mib']} MiB"
    if text != "plain" and not config.get("checkpoint_transitions", True):
        text += ", transitions kept"
    if config.get("amp"):
        text += ", bfloat16"
    if config.get("memory_format", "channels-last") != "channels-last":
        text += f", {config['memory_format']}"
    return text


def device(info):
    name = info["device"]
    threads = counted(info["threads"], "thread")
    text = f"{name}, {threads}" if name.startswith("cpu") else name
    processes = info["processes"]
    return text if processes == 1 else f"{processes:,} processes on {text}"


def lede(runs):
    finished = sum(run.finished for run in runs)
    state = f"{finished} finished" if finished else "none finished"
    if finished == len(runs):
        state = "all finished" if len(runs) > 1 else "finished"
    models, data_sets = (
        ", ".join(dict.fromkeys(named(run.config[name]) for run in runs))
        for name in ("model", "dataset")
    )
    return f"{counted(len(runs), 'run')} of {runs[0].program.name}, {state}: {models} on {data_sets}."


def description(run, recipe):
    """A run in words: its label, what computed it, and how its recipe is not the
    published one."""
    parts = [run.label, engine(run.config), device(run.info), *deviations(run, recipe)]
    said = ", ".join(filter(None, parts)).split(", ")  # a label may be the engine
    return ", ".join(dict.fromkeys(said))


def deviations(run, recipe):
    """How a run's recipe is not the published one, in words."""
    found = [
        f"{name.replace('_', ' ')} {run.config[name]:,}"
        for name, value in recipe.items()
        if name != "source" and run.config[name] != value
    ]
    if run.info.get("earlier_iterations"):
        found.append("iterations changed on the way")
    if not run.finished:
        found.insert(0, f"unfinished, iteration {run.iteration:,}")
    return found


def minutes(hours_and_minutes):
    whole, rest = hours_and_minutes.split(":")
    return 60 * int(whole) + int(rest)


def ratio(ours, theirs):
    return ours / theirs if theirs else math.nan


def of(runs, model, data_set):
    return [
        run
        for run in runs
        if (run.config["model"], run.config["dataset"]) == (model, data_set)
    ]


def circumstances(run):
    """What has to be the same for times and memory to be comparable."""
    config = [run.config.get(name) for name in ("batch_size", "amp", "memory_format")]
    return [run.info["device"], run.info["processes"], *config]


def comparable(runs, others):
    """Each run with the first of others like it, if there is one."""
    for run in runs:
        for other in others:
            if circumstances(run) == circumstances(other):
                yield run, other
                break


def settings(runs):
    """Everything that the runs' files say about how they were made, as text: what
    differs, with a text a run, and what does not."""
    all_settings = [run.config | run.info for run in runs]
    names = dict.fromkeys(name for found in all_settings for name in found)
    del names["config"]
    texts = {
        name: [setting(found.get(name)) for found in all_settings] for name in names
    }
    shared = {name: found[0] for name, found in texts.items() if len(set(found)) == 1}
    different = {name: found for name, found in texts.items() if name not in shared}
    return {"different": different, "shared": shared}


def page(runs, title):
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for function in (
        *(
            decimals,
            scientific,
            thousands,
            percent,
            mebibytes,
            duration,
            minutes,
            ratio,
        ),
        *(
            named,
            engine,
            device,
            lede,
            deviations,
            description,
            of,
            comparable,
            settings,
        ),
    ):
        environment.filters[function.__name__] = function
    template = "flows.html.j2" if runs[0].program is GLOW else "page.html.j2"
    return environment.get_template(template).render(
        runs=runs,
        title=title,
        top5=runs[0].program is TRAIN
        and any(len(run.tests("test_top5")) for run in runs),
        nothing=NOTHING,
        figures=figures(runs),
        published=json.loads((HERE / "published.json").read_text(encoding="utf-8")),
        width=WIDTH,
        height=HEIGHT,
        colours=COLOURS,
        dashes=len(DASHES),
        window=WINDOW,
        points=POINTS,
    )
