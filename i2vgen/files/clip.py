"""A finished clip, and the forms in which a call returns its frames."""

from __future__ import annotations

import base64
import html
import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from i2vgen.files import given, records, video, whole
from i2vgen.settings.config import Config
from i2vgen.settings.wording import counted

OUTPUTS = ("video", "frames", "pil", "tensor", "latents")  # what `model(..., output=)` can return
SHOWN_WIDTH = 256  # pixels at which a notebook shows a smaller clip
TOLD = ("steps", "guidance", "sampler", "fps", "width", "height")  # settings that a notebook shows


@dataclass
class Video:
    """A finished clip: `frames` uint8 [f h w 3], and everything needed to make it again.

    A notebook that displays it plays it, with its settings below.
    """

    frames: np.ndarray
    image: str
    prompt: str
    seed: int
    config: Config
    fps: float | None = None  # of the file; None: as the settings say
    facts: dict = field(default_factory=dict)  # entries of the record that the settings do not hold

    def __repr__(self) -> str:
        f, height, width, _ = self.frames.shape
        return f"Video({counted(f, 'frame')} of {width} x {height}, prompt={self.prompt!r}, seed={self.seed})"

    @property
    def rate(self) -> float:
        """Frames per second of the file."""
        return self.config.save.fps if self.fps is None else self.fps

    def save(self, path: str | Path) -> Path:
        """Write the clip by the ending of `path` (.mp4, .gif, .webp, .png, else PNGs) and a JSON beside it.

        The JSON, clip.mp4.json, holds all settings, the seed, the versions that matter, the SHA-256 of file
        and inputs, and whether the settings alone remake the clip. ValueError, before anything is written,
        if it would replace the picture or a JSON file that is no such record.
        """
        save = self.config.save
        path = given.path(path)
        if self.image and Path(self.image).exists():
            whole.refuse_overwriting([path, records.path_of(path)], [self.image])
        records.check(path)
        frames, height, width, _ = self.frames.shape

        def write_record(content: Path) -> None:
            records.write(
                path,
                records.settings_of(self.config, self.image, self.prompt, self.seed, path),
                content=content,
                size=(save.enlarge * width, save.enlarge * height),
                frames=frames,
                fps=self.rate,
                facts=self.facts,
            )

        return video.save(
            self.frames, path, fps=self.rate, quality=save.quality, enlarge=save.enlarge, before=write_record
        )

    def pictures(self) -> list[Image.Image]:
        """The frames as PIL pictures"""
        return [Image.fromarray(frame) for frame in self.frames]

    def _repr_html_(self) -> str:
        first, *rest = self.pictures()
        data, (_, height, width, _) = io.BytesIO(), self.frames.shape
        timing = {"duration": round(1000 / self.rate), "loop": 0}
        first.save(data, "WEBP", save_all=True, append_images=rest, quality=90, **timing)
        sample = self.config.sample
        told = ", ".join(f"{name}={getattr(sample, name)}" for name in TOLD)
        wide = max(width, SHOWN_WIDTH)
        return (
            f'<figure style="margin:0"><img width="{wide}" height="{round(height * wide / width)}" '
            f'style="image-rendering:{"pixelated" if wide > width else "auto"}" alt="the clip" '
            f'src="data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}">'
            f"<figcaption>{html.escape(self.prompt)}<br><small>seed={self.seed}, "
            f"{counted(len(self.frames), 'frame')}, {told}</small></figcaption></figure>"
        )
