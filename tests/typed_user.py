"""A user's program, which mypy --strict checks against the installed package (.ci/full wheel); never run."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from typing_extensions import assert_type

import i2vgen

config = i2vgen.load_config("small.yaml", ["sample.steps=20"])
assert_type(config, i2vgen.Config)
assert_type(config.sample.steps, int)

model = i2vgen.load(overrides=["steps=20", "device=cpu"])
assert_type(model, i2vgen.I2VGenXL)
clip: i2vgen.Video = model(Image.new("RGB", (8, 8)), "a boat rests", seed=1, steps=4)
assert_type(clip.save(Path("clip.gif")), Path)
frames: np.ndarray[Any, Any] = clip.frames
clips: list[i2vgen.Video] = model(["a.png", Path("b.png")], ["one", "two"], seed=[1, 2])
assert_type(i2vgen.__version__, str)

# Mistakes that a type checker sees; mypy reports an ignore that is not needed.
i2vgen.load(config=3)  # type: ignore[arg-type]
model("a.png", "a boat", steps="many")  # type: ignore[arg-type]
i2vgen.lode()  # type: ignore[attr-defined]
print(clip.seeds)  # type: ignore[attr-defined]
