# SPDX-License-Identifier: MIT
"""What tells runs of one network apart."""

import itertools


def setting(value):
    """The value of an option as text."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def labels_of(group):
    """The first option that no two runs have the same of, else their folders."""
    for option in group[0].config:
        values = [run.config.get(option) for run in group]
        texts = [setting(value) for value in values]
        if len(set(texts)) < len(group):
            continue
        if all(isinstance(value, str) for value in values):
            return texts  # such as "plain", which says of what it is one
        return [f"{option.replace('_', ' ')} {text}" for text in texts]
    return [run.name for run in group]


def label(runs):
    """Gives each run a label that is not the only one of its network."""
    network = lambda run: run.config["model"]
    for _, group in itertools.groupby(sorted(runs, key=network), network):
        group = list(group)
        if len(group) > 1:
            for run, text in zip(group, labels_of(group)):
                run.label = text
