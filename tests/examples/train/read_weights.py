# SPDX-License-Identifier: MIT
"""Tests that Python and memcnn_train read each other's weights.

    MEMCNN_TRAIN=build/test/examples/train/memcnn_train \\
        python3 tests/examples/train/read_weights.py

Where memcnn 1.5.2 is installed, too, its own networks read what memcnn_train
has written. Exits with 77 (skipped) if there is no torch.
"""

import os
import pathlib
import subprocess
import sys
import tempfile
import unittest
import warnings

try:
    import torch
except ImportError:
    print("read_weights.py: skipped, since this Python has no torch")
    sys.exit(77)

try:
    warnings.simplefilter("ignore")
    from memcnn.models import resnet as python_memcnn
except ImportError:
    python_memcnn = None

ENTRIES = {"resnet32": 200, "revnet38": 207}


def python_network(model):
    """As in MemCNN's experiments.json."""
    block, layers, channels = {
        "resnet32": ("BasicBlock", [5, 5, 5], [16, 16, 32, 64]),
        "revnet38": ("RevBasicBlock", [3, 3, 3], [32, 32, 64, 112]),
    }[model]
    return python_memcnn.ResNet(
        getattr(python_memcnn, block),
        layers,
        num_classes=10,
        channels_per_layer=channels,
        strides=[1, 1, 2, 2],
        init_kernel_size=3,
        batch_norm_fix=False,
    )


class Weights(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)

    def path(self, name):
        return str(pathlib.Path(self.folder.name) / name)

    def train(self, model, *arguments):
        subprocess.run(
            [os.environ["MEMCNN_TRAIN"], model, "synthetic", "--fresh"]
            + ["--batch-size", "4", "--test-images", "4", "--threads", "1"]
            + ["--no-cuda", "--results-dir", self.path("results")]
            + list(arguments),
            check=True,
            stdout=subprocess.DEVNULL,
        )

    def evaluate_and_save(self, model, weights):
        saved = self.path("saved.pt")
        self.train(
            model,
            *("--iterations", "0"),
            *("--load-weights", weights, "--save-weights", saved),
        )
        return torch.load(saved, weights_only=True)

    def test_both_ways(self):
        for model, entries in ENTRIES.items():
            with self.subTest(model):
                written = self.path("written.pt")
                self.train(model, "--iterations", "1", "--save-weights", written)
                state = torch.load(written, weights_only=True)
                self.assertEqual(len(state), entries)
                self.assertEqual(state["bn1.num_batches_tracked"], 1)
                self.assertEqual(state["fc.weight"].dtype, torch.float32)
                if python_memcnn is not None:
                    network = python_network(model)
                    network.load_state_dict(state)  # strict
                    state = network.state_dict()

                # What Python writes is read, and written again, as it is.
                state["fc.bias"] += torch.arange(10)
                torch.save(state, self.path("changed.pt"))
                again = self.evaluate_and_save(model, self.path("changed.pt"))
                self.assertEqual(set(again), set(state))
                for name, tensor in state.items():
                    self.assertTrue(torch.equal(again[name], tensor), name)

    def test_half_precision_from_data_parallel(self):
        written = self.path("written.pt")
        self.train("resnet32", "--iterations", "1", "--save-weights", written)
        state = torch.load(written, weights_only=True)
        half = {"module." + name: state[name].half() for name in state}
        counters = [name for name in half if name.endswith("num_batches_tracked")]
        for name in counters:
            del half[name]
        checkpoint = {"state_dict": half, "epoch": 3, "loss": 0.5}
        torch.save(checkpoint, self.path("half.pt"))
        again = self.evaluate_and_save("resnet32", self.path("half.pt"))
        for name, tensor in again.items():
            if name.endswith("num_batches_tracked"):
                self.assertEqual(tensor, 0)
            else:
                rounded = half["module." + name].float()
                self.assertTrue(torch.equal(tensor, rounded), name)


if __name__ == "__main__":
    unittest.main(verbosity=2)
