"""Where the files that come with the package lie: configurations, examples and their pictures.

In an installation they are inside the package, in a clone configs/ and examples/ are beside it.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from i2vgen.settings.config import ASSETS, LAB, SHIPPED

PACKAGE = Path(__file__).parents[1]
STAR = ASSETS / "star.png"  # of the lab model's world
PICTURE = ASSETS / "rocket.png"
NAMES = {"shipped": SHIPPED, "lab": LAB}
SUBJECT = "the rocket"
PROMPT = f"{SUBJECT} moves up"


def folder(name: str) -> Path:
    """`configs` or `examples`"""
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name


def config(name: str) -> str:
    """A configuration file that a command line names -> its path.

    One that does not exist is looked for among the shipped ones, with or without `configs/` before it, and a
    note names the file that is used.
    """
    path = Path(name)
    if not os.path.lexists(path) and not path.is_absolute() and path.suffix == ".yaml":
        parts = path.parts[1:] if path.parts[0] == "configs" else path.parts
        for home in (folder("configs"), folder("configs") / "train", folder("configs") / "ablations"):
            found = home.joinpath(*parts)
            if ".." not in parts and found.is_file():
                warnings.warn(f"{name} is the shipped file {found}", stacklevel=2)
                return str(found)
    return name


def weights(name: str) -> str:
    """`shipped`, `lab`, or a folder by its path in a clone, `i2vgen/assets/small`, found from any folder."""
    if name in NAMES:  # a folder of that name is ./lab
        return NAMES[name]
    path = Path(name)
    if path.parts[:2] == ("i2vgen", "assets") and not os.path.lexists(path):
        found = PACKAGE.joinpath(*path.parts[1:])
        if ".." not in path.parts and found.is_dir():
            return str(found)
    return name
