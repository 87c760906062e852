#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Measure one training step of memcnn_benchmark's network under Python packages that save memory.

Prints one JSON object an engine and line, with the fields of memcnn_benchmark. Every engine has a process of its own,
in which steps of plain autograd take turns with it: ratio_to_plain is the median over these pairs.

Needs torch, and for each package what pip installs by its name: memcnn, revtorch, revlib. An engine whose package is
missing says so in its line, and the others go on.
"""
import argparse
import contextlib
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
import warnings

import torch
from torch.profiler import ProfilerActivity, profile

from peer_engines import ENGINES, PACKAGES, Network, plain

FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
# glibc keeps freed memory for the next allocation, as in memcnn_benchmark.
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
}


class Step:
    """One training step without an optimiser: forward, loss, backward."""

    def __init__(self, engine, network, image, autocast):
        self.engine, self.network, self.image = engine(network), network, image
        self.autocast = autocast

    def loss(self):
        device = self.image.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.autocast):
            first, second = self.engine(self.network.stem(self.image))
            return first.square().mean() + second.square().mean()

    def __call__(self):
        self.loss().backward()

    def forget_gradients(self):
        self.network.zero_grad(set_to_none=True)

    def gradients(self):
        return torch.cat(
            [
                parameter.grad.double().flatten()
                for parameter in self.network.parameters()
            ]
        )


def timed(step):
    def time_of_rest():
        if step.image.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    step.forget_gradients()
    start = time_of_rest()
    loss = step.loss()
    middle = time_of_rest()
    loss.backward()
    return middle - start, time_of_rest() - middle


def measured_time(step, reference, options):
    """Medians; in every round the reference has its step before, if there is one."""

    def run_round():
        to_compare = timed(reference) if reference else None
        time = timed(step)
        return time, to_compare or time

    for _ in range(options.warmup):
        run_round()
    rounds = [run_round() for _ in range(options.steps)]
    times = [time for time, _ in rounds]
    steps = [sum(time) for time in times]
    return {
        "step_s": statistics.median(steps),
        "forward_s": statistics.median(forward for forward, _ in times),
        "backward_s": statistics.median(backward for _, backward in times),
        "step_min_s": min(steps),
        "ratio_to_plain": statistics.median(
            sum(time) / sum(to_compare) for time, to_compare in rounds
        ),
    }


def measured_memory(step):
    step.forget_gradients()
    return memory_of_gpu(step) if step.image.is_cuda else memory_of_cpu(step)


def memory_of_gpu(step):
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = step.loss()
    saved = torch.cuda.memory_allocated() - before
    loss.backward()
    del loss
    return {
        "saved_bytes": saved,
        "peak_bytes": torch.cuda.max_memory_allocated() - before,
        "left_bytes": torch.cuda.memory_allocated() - before,
    }


def memory_of_cpu(step):
    """Sums over the allocator's reports: held after the loss, highest, and left after the step."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()  # seen too, so that the sizes of what the next step frees are known
        step.forget_gradients()
        with torch.profiler.record_function("step begins"):
            pass
        loss = step.loss()
        with torch.profiler.record_function("forward ends"):
            pass
        loss.backward()
        del loss
    events = list(profiler.profiler.kineto_results.events())
    begin, middle = (
        max(event.start_ns() for event in events if event.name() == name)
        for name in ("step begins", "forward ends")
    )
    reports = sorted(
        (event.start_ns(), event.nbytes())
        for event in events
        if event.name() == "[memory]" and event.start_ns() > begin
    )
    saved = held = peak = 0
    for when, size in reports:
        held += size
        peak = max(peak, held)
        saved = held if when < middle else saved
    return {"saved_bytes": saved, "peak_bytes": peak, "left_bytes": held}


def measurement(name, options):
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    torch.backends.cudnn.allow_tf32 = options.precision == "tf32"
    memory_format = FORMATS[options.memory_format]
    network = Network(options.depth, options.channels)
    network.to(options.device, memory_format=memory_format)
    image = torch.randn(options.batch, 3, options.size, options.size)
    image = image.to(options.device, memory_format=memory_format)
    autocast = options.precision == "bfloat16"

    reference = Step(plain, network, image, autocast)
    reference()
    expected = reference.gradients()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
    reference.forget_gradients()

    step = Step(ENGINES[name], network, image, autocast)
    step()
    found = step.gradients()
    error = ((found - expected).norm() / expected.norm()).item()
    first_branch = network.pairs[0][0]
    result = {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "grad_norm_first": first_branch[2].weight.grad.norm().item(),
        "grad_rel_error": error,
        "grad_agrees": error < 1e-3,
        "bn_updates": first_branch[0].num_batches_tracked.item(),
    }
    others = None if name == "plain" else reference
    return result | measured_time(step, others, options) | measured_memory(step)


def setting(name, options):
    version = None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version(PACKAGES[name])
    return {
        "engine": name,
        "version": version,
        "torch": torch.__version__,
        "depth": options.depth,
        "channels": options.channels,
        "batch": options.batch,
        "size": options.size,
        "device": options.device,
        "threads": options.threads,
        "precision": options.precision,
        "memory_format": options.memory_format,
    }


def print_row(name, options):
    row = setting(name, options)
    try:
        row |= measurement(name, options)
    except Exception as error:  # of a package: the table shows it
        row["error"] = f"{type(error).__name__}: {error}"
    print(json.dumps(row), flush=True)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def engines(text):
        names = text.split(",")
        unknown = [name for name in names if name not in ENGINES]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"expected engines out of {', '.join(ENGINES)}, but got {unknown[0]}"
            )
        return names

    parser.add_argument(
        "--engines",
        type=engines,
        default=list(ENGINES),
        help=", ".join(ENGINES) + " (default: all)",
    )
    for name, default, text in (
        ("depth", 27, "couplings"),
        ("channels", 16, "of one half"),
        ("batch", 20, "images"),
        ("size", 32, "height and width of an image"),
        ("steps", 15, "timed steps"),
        ("warmup", 2, "steps before the timed ones"),
        ("threads", 2, "on the CPU"),
        ("seed", 0, "of weights and image"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"{text} (default: {default})"
        )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)"
    )
    parser.add_argument(
        "--precision",
        choices=("ieee", "tf32", "bfloat16"),
        default="ieee",
        help="of float32 convolutions, bfloat16 by autocast (default: ieee)",
    )
    parser.add_argument(
        "--memory-format",
        choices=FORMATS,
        default="contiguous",
        help="of weights and image (default: contiguous)",
    )
    parser.add_argument(
        "--default-allocator",
        action="store_true",
        help="let glibc give freed memory back to the system, as it does by itself",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="accepted for sweep.sh: there is no other output",
    )
    parser.add_argument(
        "--in-process",
        action="store_true",
        help="no process of its own for each engine; the allocator is as it is",
    )
    return parser.parse_args()


def main():
    options = parse_arguments()
    warnings.simplefilter("ignore")  # the packages call deprecated functions
    allocator = {} if options.default_allocator else KEEP_FREED_MEMORY
    for name in options.engines:
        if options.in_process:
            print_row(name, options)
        else:
            command = [
                sys.executable,
                __file__,
                *sys.argv[1:],
                "--engines",
                name,
                "--in-process",
            ]
            child = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                check=False,
                env=os.environ | allocator,
            )
            row = child.stdout.strip() or json.dumps(
                setting(name, options)
                | {"error": f"its process ended with code {child.returncode}"}
            )
            print(row, flush=True)


if __name__ == "__main__":
    main()
