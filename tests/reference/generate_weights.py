# SPDX-License-Identifier: MIT
"""Writes the files that the tests in tests/examples/train/weights read.

They are written by Python MemCNN's own networks, and by torch.save() as people
use it:

    pip install torch==2.11.0 torchvision==0.26.0 memcnn==1.5.2
    python tests/reference/generate_weights.py

Both versions are needed, exactly (torchvision is a dependency of memcnn, and
without a version of its own would bring another torch). The files, in weights/:

    small_revnet.pt    state dicts of small networks, with weights of all
    small_resnet.pt    kinds: basic blocks and bottlenecks
    logits.pt          by "MODEL.train" and "MODEL.eval", for the two networks
                       above and the six of the training program: what they make
                       of input(), in train mode and then in eval mode, in float64
    checkpoint.pt      small_revnet.pt as people keep it in a checkpoint: beside
                       an optimizer, from DataParallel, without the counters
                       that torch 0.4.0 did not have, as pickle protocol 4
    tensors.pt         tensors of many dtypes, strides and offsets, which share
                       memory
    whole_module.pt    a module, not a state dict: what must not be read
    before_1_6.pt      the old format of torch.save()
    of_gpu.pt          a tensor as torch.save() writes one that is on a GPU
    used_twice.pt      a coupling at two places, with one module as both branches
    net.pt, values.pt  what the program in docs/migration.md writes

The weights of the six networks are too large to be kept. They follow from their
names, by fill().
"""

import collections
import contextlib
import pathlib
import re
import warnings

import versions

versions.check()
warnings.simplefilter("ignore")

import memcnn  # noqa: E402  (after the check that names what to install)
import torch  # noqa: E402
from memcnn.models import resnet  # noqa: E402


def network(block, layers, channels):
    return resnet.ResNet(
        block,
        layers,
        num_classes=10,
        channels_per_layer=channels,
        strides=[1, 1, 2, 2],
        init_kernel_size=3,
        batch_norm_fix=False,
    )


# As in MemCNN's experiments.json; the small ones are of this file.
NETWORKS = {
    "resnet32": (resnet.BasicBlock, [5, 5, 5], [16, 16, 32, 64]),
    "resnet110": (resnet.BasicBlock, [18, 18, 18], [16, 16, 32, 64]),
    "resnet164": (resnet.Bottleneck, [18, 18, 18], [16, 16, 32, 64]),
    "revnet38": (resnet.RevBasicBlock, [3, 3, 3], [32, 32, 64, 112]),
    "revnet110": (resnet.RevBasicBlock, [9, 9, 9], [32, 32, 64, 128]),
    "revnet164": (resnet.RevBottleneck, [9, 9, 9], [32, 32, 64, 128]),
    "small_revnet": (resnet.RevBasicBlock, [2, 1, 2], [4, 4, 6, 8]),
    "small_resnet": (resnet.Bottleneck, [1, 2, 1], [4, 2, 3, 4]),
}


def wave(shape, phase):
    """Numbers from -1 to 1 without a pattern. (Plain sines would make matrices of
    rank 2, and networks that magnify rounding errors.)"""
    count = int(torch.Size(shape).numel())
    sines = torch.sin(torch.arange(count).double() + phase)
    return torch.sin(1e4 * sines).view(shape)


def fill(name, tensor):
    """The values of an entry: values_of() in python_weights_test.cpp."""
    phase = sum((index + 1) * ord(letter) for index, letter in enumerate(name))
    values = wave(tensor.shape, float(phase))
    if tensor.dim() == 4:
        values *= (2.0 / tensor[0].numel()) ** 0.5
    elif name.endswith("running_var") or name.endswith("weight"):
        values = 0.7 + 0.2 * values
    elif name.endswith("num_batches_tracked"):
        values = torch.tensor(phase % 1000)
    else:
        values *= 0.1
    return values.to(tensor.dtype)


def input():
    return wave((4, 3, 32, 32), 0.5)


def filled(name, dtype):
    model = network(*NETWORKS[name]).to(dtype)
    state = model.state_dict()
    model.load_state_dict({key: fill(key, state[key]) for key in state})
    return model


def write_logits(folder):
    logits = collections.OrderedDict()
    for name in NETWORKS:
        if name.startswith("small"):
            state = filled(name, torch.float32).state_dict()
            torch.save(state, folder / f"{name}.pt")
        model = filled(name, torch.float64)
        with torch.no_grad():
            logits[f"{name}.train"] = model.train()(input())
            logits[f"{name}.eval"] = model.eval()(input())
        for mode in ("train", "eval"):
            print(name, mode, logits[f"{name}.{mode}"].abs().max().item())
    torch.save(logits, folder / "logits.pt")


def write_checkpoint(folder):
    model = filled("small_revnet", torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    state = torch.nn.DataParallel(model).state_dict()
    for key in list(state):
        if key.endswith("num_batches_tracked"):
            del state[key]
    torch.save(
        {
            "epoch": 3,
            "best": -0.5,
            "note": None,
            "done": False,
            "state_dict": state,
            "optimizer": optimizer.state_dict(),
        },
        folder / "checkpoint.pt",
        pickle_protocol=4,
    )


def write_tensors(folder):
    base = torch.arange(24, dtype=torch.float32)
    torch.save(
        {
            "base": base,
            "slice": base[4:10],
            "transposed": base.view(4, 6).t(),
            "strided": base[1::2],
            "expanded": base[3].expand(2, 5),
            "empty": torch.zeros(0, 3),
            "scalar": torch.tensor(2.5),
            "parameter": torch.nn.Parameter(base + 1),
            "float64": base.double() / 3,
            "float16": base.half(),
            "bfloat16": base.bfloat16(),
            "int64": -base.long(),
            "int32": base.int(),
            "int16": base.short(),
            "int8": base.char(),
            "uint8": base.byte(),
            "bool": base > 4,
        },
        folder / "tensors.pt",
    )


def write_of_gpu(folder):
    # What torch.save() asks where a storage is; for all that follow.
    torch.serialization.register_package(
        0, lambda storage: "cuda:0", lambda storage, location: storage
    )
    torch.save({"weight": torch.arange(4.0)}, folder / "of_gpu.pt")
    torch.serialization._package_registry.pop(0)


def write_used_twice(folder):
    torch.manual_seed(0)
    branch = torch.nn.Linear(2, 2)
    block = memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(branch, branch))
    model = torch.nn.Sequential(block, block)
    torch.save(model.state_dict(), folder / "used_twice.pt")


def write_page(folder):
    """Runs the page's Python as it stands: the first block, which has the branch,
    and the one that saves the weights."""
    root = pathlib.Path(__file__).resolve().parents[2]
    page = (root / "docs/migration.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    torch.manual_seed(0)
    names = {}
    with contextlib.chdir(folder):
        exec(blocks[0], names)
        exec(next(block for block in blocks if "values.pt" in block), names)


def main():
    torch.set_num_threads(1)
    folder = pathlib.Path(__file__).resolve().parent / "weights"
    folder.mkdir(exist_ok=True)
    write_logits(folder)
    write_checkpoint(folder)
    write_tensors(folder)
    torch.save(torch.nn.Linear(2, 2), folder / "whole_module.pt")
    torch.save(
        collections.OrderedDict(weight=torch.zeros(2)),
        folder / "before_1_6.pt",
        _use_new_zipfile_serialization=False,
    )
    write_of_gpu(folder)
    write_used_twice(folder)
    write_page(folder)
    for path in sorted(folder.iterdir()):
        print(path.stat().st_size, path.name)


if __name__ == "__main__":
    main()
