"""One run of the demo at a time: sampled in a thread, watched step by step, stopped between two steps.

No web code is here; `page.py` shows what `Runs` yields.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from i2vgen import pipeline
from i2vgen.diffusion.sampler import StepInfo
from i2vgen.files import records, video, whole

NONE: Mapping[str, object] = {}
PREVIEWS = 8  # at most so many previews a run
THUMBNAIL = 192  # pixels


class Stopped(Exception):
    """The visitor stopped the run."""


class Step(NamedTuple):
    """A step was made. `preview`: the middle frame as it stands, uint8 [h w 3]; None between previews."""

    number: int
    steps: int
    clip: int
    clips: int
    preview: np.ndarray | None


class Clip(NamedTuple):
    """A finished clip: its files, and what was said on the way."""

    video: Path
    record: Path
    picture: Path  # an animation for the gallery
    caption: str
    notes: tuple[str, ...] = ()


class Runs:
    """Makes clips with one model, one after the other, and keeps them in a folder."""

    def __init__(self, model: pipeline.I2VGenXL, folder: str | Path):
        self.model, self.folder = model, whole.check_folder("output=", str(folder))
        self.worker = ThreadPoolExecutor(1)
        self.clips: list[Clip] = []

    def __call__(
        self,
        picture: str,
        prompts: Sequence[str],
        stop: threading.Event,
        settings: Mapping[str, object] = NONE,
    ) -> Iterator[Step | Clip]:
        """Make a clip of the picture for each prompt, with `model(...)`'s settings.

        ValueError, before any step, for what the command line would refuse. Ends early, without an error,
        once `stop` is set. Whoever comes while another run is going on waits.
        """
        told: queue.SimpleQueue = queue.SimpleQueue()

        def work() -> None:
            with contextlib.suppress(Stopped):
                for number, prompt in enumerate(prompts):
                    told.put(self._make(picture, prompt, number, len(prompts), stop, told, settings))

        done = self.worker.submit(work)
        done.add_done_callback(lambda _: told.put(None))
        try:
            while (item := told.get()) is not None:
                yield item
            done.result()  # raises what the run raised
        finally:
            stop.set()  # the page may have been closed

    def _make(self, picture, prompt, number, clips, stop, told, settings) -> Clip:
        if stop.is_set():
            raise Stopped

        def on_step(info: StepInfo) -> None:
            if stop.is_set():
                raise Stopped
            shown = info.index % max(1, info.num_steps // PREVIEWS) == 0
            preview = self._preview(info.x0) if shown else None
            told.put(Step(info.index + 1, info.num_steps, number + 1, clips, preview))

        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always", UserWarning)
            clip = self.model(picture, prompt, on_step=on_step, progress=False, **settings)
        kept = self._keep(clip, tuple(dict.fromkeys(str(note.message) for note in notes)))
        self.clips.insert(0, kept)
        return kept

    @torch.no_grad()
    def _preview(self, x0: torch.Tensor) -> np.ndarray:
        middle = x0[:1, :, x0.shape[2] // 2, None]
        return pipeline.decode(self.model, middle)[0, 0].cpu().numpy()

    def _keep(self, clip: pipeline.Video, notes: tuple[str, ...]) -> Clip:
        stem = time.strftime("%Y-%m-%d-%H%M%S")
        for number in itertools.count(1):
            path = self.folder / f"{stem}{f'-{number}' if number > 1 else ''}.mp4"
            if not path.exists():
                break
        path = clip.save(path)
        animation = path.with_suffix(".webp")
        times = max(1, round(THUMBNAIL / clip.frames.shape[1]))
        video.save(clip.frames, animation, fps=clip.rate, quality=9, enlarge=times)
        return Clip(path, records.path_of(path), animation, f"{clip.prompt} (seed {clip.seed})", notes)
