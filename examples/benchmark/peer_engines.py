# SPDX-License-Identifier: MIT
"""The network of memcnn_benchmark, and the Python packages that run it for peers.py."""
import functools

import torch

PACKAGES = {
    "plain": "torch",
    "checkpoint": "torch",
    "checkpoint-selective": "torch",
    "memcnn": "memcnn",
    "revtorch": "revtorch",
    "revlib": "revlib",
}


class Branch(torch.nn.Sequential):
    """F or G: twice batch normalisation, ReLU and a 3x3 convolution."""

    def __init__(self, channels):
        layers = []
        for _ in range(2):
            layers += [
                torch.nn.BatchNorm2d(channels),
                torch.nn.ReLU(inplace=True),
                torch.nn.Conv2d(
                    channels, channels, kernel_size=3, padding=1, bias=False
                ),
            ]
        super().__init__(*layers)


class Network(torch.nn.Module):
    """A convolution, then pairs of branches, which an engine makes couplings of."""

    def __init__(self, depth, channels):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 2 * channels, kernel_size=3, padding=1)
        self.pairs = torch.nn.ModuleList(
            torch.nn.ModuleList([Branch(channels), Branch(channels)])
            for _ in range(depth)
        )


def couple(f, g, x1, x2):
    y1 = x1 + f(x2)
    return y1, x2 + g(y1)


# Engines: from a network to a function of the stem's output that returns the halves of the last output.


def plain(network):
    def run(x):
        halves = x.chunk(2, dim=1)
        for f, g in network.pairs:
            halves = couple(f, g, *halves)
        return halves

    return run


def checkpoint(network, **options):
    from torch.utils.checkpoint import checkpoint as recomputed

    def run(x):
        halves = x.chunk(2, dim=1)
        for f, g in network.pairs:
            halves = recomputed(couple, f, g, *halves, use_reentrant=False, **options)
        return halves

    return run


def checkpoint_selective(network):
    """The results of convolutions are kept, all else runs again."""
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    kept = [torch.ops.aten.convolution.default]
    contexts = functools.partial(create_selective_checkpoint_contexts, kept)
    return checkpoint(network, context_fn=contexts)


def memcnn(network):
    import memcnn as package

    wrappers = [
        package.InvertibleModuleWrapper(package.AdditiveCoupling(f, g))
        for f, g in network.pairs
    ]

    def run(x):
        for wrapper in wrappers:
            x = wrapper(x)
        return x.chunk(2, dim=1)

    return run


def revtorch(network):
    from revtorch.revtorch import ReversibleBlock, ReversibleSequence

    blocks = torch.nn.ModuleList(ReversibleBlock(f, g) for f, g in network.pairs)
    sequence = ReversibleSequence(blocks)
    return lambda x: sequence(x).chunk(2, dim=1)


def revlib(network):
    import revlib as package

    sequence = package.ReversibleSequential(
        *(branch for pair in network.pairs for branch in pair)
    )
    return lambda x: sequence(x).chunk(2, dim=1)


ENGINES = {
    "plain": plain,
    "checkpoint": checkpoint,
    "checkpoint-selective": checkpoint_selective,
    "memcnn": memcnn,
    "revtorch": revtorch,
    "revlib": revlib,
}
