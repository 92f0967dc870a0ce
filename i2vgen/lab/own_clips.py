"""The clips of one's own that a study scores its variants on: held out, sampled from their first frames.

    evaluate: {videos: FOLDER}                         # captions as for train.data=
    evaluate: {videos: FOLDER, metrics: [reference_psnr, fvd], fvd_network: FILE.py:NAME}

The measures are those of `i2vgen score`. Every variant sees the same clips, frames and seeds, so differences
are paired. Axes: f frames, H W pixel rows and columns.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image

from i2vgen import pipeline
from i2vgen.scoring import networks, scores, stats
from i2vgen.scoring.scores import METRICS, SETS, Job, Judges, Plan
from i2vgen.settings.config import Config
from i2vgen.training import copies, data
from i2vgen.training.settings import Bucket, Train

# What needs no network and no other package.
USUAL = ("first_frame_psnr", "reference_psnr", "reference_ssim", "flicker", "frame_change")
NETWORKS = ("clip_weights", "clip_model", "clip_checkpoint", "lpips_network", "fvd_network")
SETTINGS = ("videos", "metrics", *NETWORKS)


class HeldOut(NamedTuple):
    """A clip at the size of the settings, and its caption."""

    truth: np.ndarray  # uint8 [f H W 3]
    caption: str


class Scored(NamedTuple):
    """The scores of a model on held-out clips, and the frames of the first few."""

    rows: list[dict[str, float | None]]  # one per clip
    values: dict[str, float | None]
    intervals: dict[str, tuple[float, float] | None]  # 95 %, over clips
    shown: list[tuple[HeldOut, np.ndarray]]


def judged(wanted: dict, device: str = "auto") -> Job:
    """The measures of a study's `evaluate:`, checked; ValueError for what `i2vgen score` would refuse."""
    plan = Plan(**{"metrics": USUAL, **wanted, "device": device})
    for setting in ("lpips_network", "fvd_network"):
        if getattr(plan, setting):
            networks.check(setting, getattr(plan, setting))
    lacking = dict(scores.lacks(plan, []))
    for name in plan.metrics:
        if missing := [need for need in METRICS[name].needs if need in lacking]:
            raise ValueError(f"{name} needs {lacking[missing[0]]}")
    scores.refuse_unused(dataclasses.replace(plan, reference=""), plan.metrics)
    return Job(plan, (), plan.metrics, {})


def read(folder: str, config: Config, count: int) -> list[HeldOut]:
    """Up to `count` clips of a folder, each once, from a fixed place in it; ValueError if there are none."""
    source, bucket = folder_of(folder, config), Bucket(config.sample.frames, config.sample.fps, 1)
    found: dict[bytes, HeldOut] = {}
    for position in range(len(source.files)):
        if len(found) == count:
            break
        clips = source(bucket, [position])  # the next one in place of a clip that cannot be read
        pixels = rearrange(clips.pixels[0], "c f h w -> f h w c")
        truth = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
        found.setdefault(truth.tobytes(), HeldOut(truth, clips.captions[0]))
    return list(found.values())


def folder_of(folder: str, config: Config) -> data.Folder:
    """The clips of a folder at the size of the settings; ValueError if there are none."""
    sample = config.sample
    train = Train(data=folder, frame_lengths=(sample.frames,), sample_fps=(sample.fps,), batch=1)
    with naming_the_setting():
        return data.Folder(config, train)


@contextlib.contextmanager
def naming_the_setting() -> Iterator[None]:
    """Errors about the folder say what the study calls it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("train.data=", "evaluate: videos: ")) from error


def check(folder: str, config: Config) -> None:
    """ValueError, before any long work, for a folder without a clip to score."""
    with naming_the_setting():
        read(folder, config, 1)


def evaluate(
    model: pipeline.I2VGenXL, clips: Sequence[HeldOut], job: Job, judges: Judges, shown: int
) -> Scored:
    """Sample each clip from its first frame, caption and number as seed, and score it against its truth."""
    rows, kept, size = [], [], model.config.runtime.batch
    features: tuple[list, list] = ([], [])
    for start in range(0, len(clips), size):
        batch = list(clips[start : start + size])
        pictures = [Image.fromarray(clip.truth[0]) for clip in batch]
        seeds = list(range(start, start + len(batch)))
        made = pipeline.generate(model, pictures, [clip.caption for clip in batch], seeds).cpu().numpy()
        for clip, frames in zip(batch, made, strict=True):
            rows.append(scores.measured(frames, clip.truth[0], clip.truth, clip.caption, job.names, judges))
            if judges.fvd is not None:
                for held, one in zip(features, (frames, clip.truth), strict=True):
                    held.append(judges.fvd(one))
            if len(kept) < shown:
                kept.append((clip, frames))
    means = {
        name: scores.set_distance(name, *features) if name in SETS else stats.mean([r[name] for r in rows])
        for name in job.names
    }
    return Scored(
        rows,
        {name: mean.value for name, mean in means.items()},
        {name: None if mean.low is None else (mean.low, mean.high) for name, mean in means.items()},
        kept,
    )


def refuse_overlap(videos: str, config: Config, train: Train) -> None:
    """ValueError if clips to score are among those to train on, under whatever names."""
    if data.overlap(Path(videos).expanduser(), Path(train.data).expanduser()):
        raise ValueError(
            f"evaluate: videos: {videos} and train.data: {train.data} share files; give held-out clips a "
            "folder of their own"
        )
    trained = data.open_folder(config, dataclasses.replace(train, validate=""), "train.data")
    found = copies.shared(data.listed(folder_of(videos, config)), data.listed(trained))
    if found:
        raise ValueError(
            f"evaluate: videos: {videos} holds {len(found)} of the clips of train.data: {train.data}: "
            f"{found[0][0]} is {found[0][1]}, byte for byte; remove them from one of the folders"
        )
