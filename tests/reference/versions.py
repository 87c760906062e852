# SPDX-License-Identifier: MIT
"""Which packages write the reference values."""

import pathlib
import sys
from importlib import metadata

VERSIONS = {"memcnn": "1.5.2", "torch": "2.11.0"}


def check():
    """Stops the program where other versions are installed."""
    for package, wanted in VERSIONS.items():
        try:
            found = metadata.version(package).split("+")[0]
        except metadata.PackageNotFoundError:
            found = "none"
        if found != wanted:
            sys.exit(
                f"{pathlib.Path(sys.argv[0]).name}: expected {package} {wanted}, "
                f"but found {found}. Run: pip install torch==2.11.0 "
                "torchvision==0.26.0 memcnn==1.5.2"
            )
