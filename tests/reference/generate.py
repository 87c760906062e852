# SPDX-License-Identifier: MIT
"""Writes the reference values that the C++ tests compare with.

They are computed by Python MemCNN, through its InvertibleModuleWrapper:

    pip install torch==2.11.0 torchvision==0.26.0 memcnn==1.5.2
    python tests/reference/generate.py

Both versions are needed, exactly (torchvision is a dependency of memcnn, and
without a version of its own would bring another torch). The result depends on
nothing else but the processor's rounding: weights and inputs are drawn from a
fixed seed in float64.

Each file, KIND_DTYPE.pt, is a dict of tensors saved with torch.save(), which
torch::pickle_load() reads in C++ (it would not read an OrderedDict):

    state.KEY                 weights and buffers before the run, by the keys of
                              the wrapped module's state_dict()
    DIRECTION.input           argument of forward() or inverse()
    DIRECTION.output          result
    DIRECTION.grad_output     gradient that backward() starts from
    DIRECTION.grad_input      gradient of the argument
    DIRECTION.grad.KEY        gradient of a parameter
    DIRECTION.undone          what the opposite map makes of the result
"""

import pathlib

import versions

SHAPE = (2, 4, 3, 3)  # N, C, H, W
HALF = SHAPE[1] // 2

versions.check()

import memcnn  # noqa: E402  (after the check that names what to install)
import torch  # noqa: E402
from torch import nn  # noqa: E402


class ConvBranch(nn.Module):
    """ConvBranch of tests/support/modules.h."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(HALF, HALF, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(HALF)

    def forward(self, x):
        return torch.relu(self.norm(self.conv(x)))


class WideBranch(nn.Module):
    """WideBranch of tests/support/modules.h: twice the channels."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(HALF, 2 * HALF, 3, padding=1)

    def forward(self, x):
        return torch.tanh(self.conv(x))


def additive():
    return memcnn.AdditiveCoupling(Fm=ConvBranch(), Gm=ConvBranch())


def affine_naive():
    return memcnn.AffineCoupling(
        Fm=ConvBranch(), Gm=ConvBranch(), adapter=memcnn.AffineAdapterNaive
    )


def affine_sigmoid():
    return memcnn.AffineCoupling(
        Fm=WideBranch(), Gm=WideBranch(), adapter=memcnn.AffineAdapterSigmoid
    )


def values(make, dtype):
    """The contents of one file."""
    torch.manual_seed(20)
    wrapper = memcnn.InvertibleModuleWrapper(make().double())
    inputs = {d: torch.randn(SHAPE).double() for d in ("forward", "inverse")}
    seeds = {d: torch.randn(SHAPE).double() for d in ("forward", "inverse")}
    wrapper.to(dtype)
    start = {k: v.detach().clone() for k, v in wrapper.state_dict().items()}
    result = {f"state.{key}": value for key, value in start.items()}

    for direction, opposite in (("forward", "inverse"), ("inverse", "forward")):
        wrapper.load_state_dict(start)
        wrapper.zero_grad(set_to_none=True)
        leaf = inputs[direction].to(dtype).requires_grad_()
        argument = leaf * 1.0  # the wrapper frees its memory; a leaf's it keeps
        output = getattr(wrapper, direction)(argument)
        result[f"{direction}.input"] = leaf.detach().clone()
        result[f"{direction}.output"] = output.detach().clone()
        output.backward(seeds[direction].to(dtype))
        result[f"{direction}.grad_output"] = seeds[direction].to(dtype)
        result[f"{direction}.grad_input"] = leaf.grad.clone()
        for key, parameter in wrapper.named_parameters():
            result[f"{direction}.grad.{key}"] = parameter.grad.clone()
        with torch.no_grad():
            undo = getattr(wrapper, opposite)
            result[f"{direction}.undone"] = undo(
                result[f"{direction}.output"].clone()
            ).clone()
    return result


def main():
    torch.set_num_threads(1)
    folder = pathlib.Path(__file__).resolve().parent
    for make in (additive, affine_naive, affine_sigmoid):
        for dtype in (torch.float64, torch.float32):
            name = f"{make.__name__}_{str(dtype).removeprefix('torch.')}.pt"
            torch.save(values(make, dtype), folder / name)
            print(folder / name)


if __name__ == "__main__":
    main()
