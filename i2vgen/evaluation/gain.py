"""What a second stage gains: its clips beside plain upscaling of the same small ones, measured on the world.

Small clips come in three kinds: drawn small, drawn and passed through the first stage's autoencoder, and made
by the first stage. The truth is the world's clip of the same seed, drawn at the refiner's size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from PIL import Image

from i2vgen import pipeline
from i2vgen.evaluation.scores import mean_interval
from i2vgen.files import video
from i2vgen.pipeline import I2VGenXL
from i2vgen.refiner import fitting, refine
from i2vgen.scoring import metrics
from i2vgen.settings.config import MAX_SEED, Config
from i2vgen.training import lift
from i2vgen.training.data import FIRST_TRAINING_SEED
from i2vgen.world import drawing

SOURCES = {"drawn": "drawn small", "decoded": "through the autoencoder", "made": "made by the first stage"}
PLAIN = ("bilinear", "bicubic")
WAYS = (*PLAIN, "refined")
STILL = 1  # levels of a byte: what changes no more in all of the true clip stands still


@dataclass(frozen=True)
class Plan:
    """Which clips: `clips` seeds of the world from `first_seed` on, in kinds of `sources`."""

    clips: int = 32
    first_seed: int = 0
    sources: tuple[str, ...] = tuple(SOURCES)

    def __post_init__(self):
        if self.clips < 2:
            raise ValueError(f"clips is {self.clips}; give 2 or more, intervals need two")
        if not 0 <= self.first_seed <= min(FIRST_TRAINING_SEED, MAX_SEED) - self.clips:
            raise ValueError(
                f"first_seed is {self.first_seed}; give 0 to below {FIRST_TRAINING_SEED - self.clips}, where "
                "training begins"
            )
        for source in self.sources:
            if source not in SOURCES:
                raise ValueError(f"there is no source {source!r}; choose of {', '.join(SOURCES)}")


@dataclass
class Gain:
    """`scores[source][way][measure]` has a number per clip; None where there is nothing to measure."""

    plan: Plan
    config: Config
    scores: dict[str, dict[str, dict[str, list[float | None]]]]
    shown: dict[str, list[np.ndarray]]  # of the first clips: truth, then the ways, all uint8 [f H W 3]

    def to_dict(self) -> dict:
        plan = {"clips": self.plan.clips, "first_seed": self.plan.first_seed}
        return {"plan": plan, "settings": self.config.to_dict(), "scores": self.scores}


def check(config: Config) -> None:
    """ValueError before any work: there are two stages, and the second can run on the first one's clips."""
    if not config.refine_weights:
        raise ValueError("no second stage: name its weights, refine_weights=FOLDER")
    refine.check(config, (config.sample.width, config.sample.height), config.sample.frames)


def measure(
    config: Config, plan: Plan, *, shown: int = 0, on_clip: Callable[[], object] | None = None
) -> Gain:
    """All scores; clips of the first `shown` seeds are kept."""
    model = pipeline.load_parts(config)
    refiner = refine.load(config)
    found = Gain(
        plan, config, {source: {} for source in plan.sources}, {source: [] for source in plan.sources}
    )
    for seed in range(plan.first_seed, plan.first_seed + plan.clips):
        small, caption = draw(seed, config, (config.sample.width, config.sample.height))
        for source in plan.sources:
            clip = make(source, model, small, caption, seed)
            refined = refiner(clip, caption, seed=seed)
            truth, _ = draw(seed, config, (refined.shape[2], refined.shape[1]))
            results = {way: upscaled(clip, truth.shape[1:3], way) for way in PLAIN} | {"refined": refined}
            for way, result in {"truth": truth, **results}.items():
                for name, value in scores(truth, result).items():
                    found.scores[source].setdefault(way, {}).setdefault(name, []).append(value)
            if seed < plan.first_seed + shown:
                found.shown[source] += [truth, *results.values()]
            if on_clip is not None:
                on_clip()
    return found


def draw(seed: int, config: Config, size: tuple[int, int]) -> tuple[np.ndarray, str]:
    """The world's clip of a seed at (width, height), in the first stage's frames: uint8 [f h w 3], caption"""
    clip = drawing.clip(seed, width=size[0], height=size[1], frames=config.sample.frames)
    return clip.frames, clip.caption


@torch.no_grad()
def make(source: str, model: I2VGenXL, small: np.ndarray, caption: str, seed: int) -> np.ndarray:
    """The world's small clip -> the clip that is to be upscaled, both uint8 [f h w 3]."""
    if source == "drawn":
        return small
    if source == "made":
        return model.generate([Image.fromarray(small[0])], [caption], [seed])[0].frames
    pixels = fitting.resized(small, *small.shape[2:0:-1], antialias=False)
    return lift.decoded(model, pixels).numpy()


def upscaled(clip: np.ndarray, size: tuple[int, int], mode: str) -> np.ndarray:
    """uint8 [f h w 3] -> uint8 [f H W 3] of (H, W), values rounded to the nearest."""
    pixels = fitting.resized(clip, *size[::-1], antialias=False, resize=mode)
    return video.to_uint8(rearrange(pixels, "f c h w -> c f h w"), rounding="nearest").numpy()


def scores(truth: np.ndarray, clip: np.ndarray) -> dict[str, float | None]:
    """Clips uint8 [f H W 3] -> every measure of the second against the first."""
    still = np.ptp(truth, axis=0).max(axis=-1) <= STILL  # H W
    changes = np.abs(np.diff(clip.astype(np.int16), axis=0))[:, still]
    return {
        "psnr": metrics.psnr(truth, clip),
        "ssim": metrics.ssim(truth, clip),
        "sharpness": metrics.sharpness(clip),
        "flicker": metrics.flicker(clip) if len(clip) > 2 else None,
        "still": float(changes.mean()) if changes.size else None,
    }


# ---------------------------------------------------------------------------------------------------
# The table


def mean(values: list[float | None]) -> float:
    """Of what there is; NaN of nothing."""
    held = [v for v in values if v is not None]
    return float(np.mean(held)) if held else math.nan


def difference(ours: list[float], theirs: list[float]) -> tuple[float, float]:
    """Mean of paired differences, and the half width of its 95 % interval."""
    gap = np.subtract(ours, theirs)
    low, high = mean_interval(gap)
    return float(gap.mean()), (high - low) / 2


def rows(found: Gain) -> list[tuple[str, ...]]:
    """One line per kind of clip and way, in words; sharpness and flicker as parts of the truth's."""
    lines = []
    for source, ways in found.scores.items():
        truth = {name: mean(values) for name, values in ways["truth"].items()}
        for way in WAYS:
            got = {name: mean(values) for name, values in ways[way].items()}
            over = ""
            if way == "refined":
                gain, width = difference(ways[way]["psnr"], ways["bicubic"]["psnr"])
                over = f"{gain:+.2f} +- {width:.2f}"
            lines.append(
                (
                    SOURCES[source],
                    way,
                    f"{got['psnr']:.2f}",
                    f"{got['ssim']:.4f}",
                    f"{got['sharpness'] / truth['sharpness']:.2f}",
                    f"{got['flicker'] / truth['flicker']:.2f}",
                    f"{got['still']:.2f}",
                    over,
                )
            )
    return lines


HEAD = ("clips", "upscaled", "PSNR", "SSIM", "sharpness", "flicker", "still", "PSNR over bicubic")


def strip(found: Gain, source: str, *, frame: int, enlarge: int = 3) -> Image.Image:
    """Of every clip kept, one line: truth, bilinear, bicubic and refined at one frame."""
    clips, count = found.shown[source], len(WAYS) + 1
    lines = [
        np.concatenate([clip[frame] for clip in clips[i : i + count]], axis=1)
        for i in range(0, len(clips), count)
    ]
    picture = np.concatenate(lines, axis=0)
    return Image.fromarray(picture.repeat(enlarge, axis=0).repeat(enlarge, axis=1))
