"""I2VGen-XL written to be changed: one picture and a sentence in, a video out."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Config", "I2VGenXL", "Video", "load", "load_config"]

# Imported at their first use, so that `i2vgen --help` need not wait for PyTorch.
HOMES = {
    "Config": "i2vgen.settings.config",
    "I2VGenXL": "i2vgen.pipeline",
    "Video": "i2vgen.pipeline",
    "load": "i2vgen.pipeline",
    "load_config": "i2vgen.settings.merge",
}
MODULES = ("adapt", "diffusion", "fast", "files", "jobs", "memory", "model", "pipeline", "settings")

if TYPE_CHECKING:
    from i2vgen.pipeline import I2VGenXL, Video, load
    from i2vgen.settings.config import Config
    from i2vgen.settings.merge import load_config
else:  # a type checker would take it that every name exists

    def __getattr__(name: str) -> Any:
        if name in HOMES:
            value = getattr(importlib.import_module(HOMES[name]), name)
        elif name in MODULES:
            value = importlib.import_module(f"i2vgen.{name}")
        else:
            raise AttributeError(f"module 'i2vgen' has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({name for name in globals() if name.startswith("__")} | {*__all__, *MODULES})
