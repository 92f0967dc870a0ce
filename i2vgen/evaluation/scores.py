"""Scores of single generated clips, and their summary over many clips of a model.

Axes: f frames, H W pixel rows and columns.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Literal, NamedTuple

import numpy as np

from i2vgen.scoring import stats
from i2vgen.scoring.metrics import psnr
from i2vgen.world import drawing, matching, reading
from i2vgen.world.drawing import Facts
from i2vgen.world.matching import Kept
from i2vgen.world.pictures import PictureWorld

World = ModuleType | PictureWorld  # `drawing` or a world of pictures; both have the same functions

ACCURACIES = (
    "motion_accuracy_basic",
    "motion_accuracy_all",
    "other_motion_accuracy",
    "object_accuracy",
    "camera_accuracy",
)
MEANS = ("identity", "first_frame_psnr", "clip_psnr", "still_psnr", "vae_psnr")
SCORES = (*ACCURACIES, *MEANS)
# Of the world of pictures, in place of `identity`: docs/evaluation.md
SHAPES = ("shape_kept", "shape_kept_last", "motion_and_shape", "vae_shape_kept")
TWO_OBJECTS = "two objects"  # the row of `per_motion` for clips of two objects
GROUPS = (*drawing.MOTIONS, TWO_OBJECTS, *drawing.CAMERA_MOVES)

# Factors by which area and compactness of an object may differ. True clips degraded by blur, noise and colour
# drift (tests/test_world.py) keep 99.9 % of their frames within these limits; one that fades keeps 36 %.
AREA_OFF, SPREAD_OFF = 1.5, 1.25


class Item(NamedTuple):
    """One clip to generate."""

    set: Literal["basic", "other", "all"]
    seed: int  # of the world's clip and of the sampler's noise
    caption: str
    facts: Facts


class Made(NamedTuple):
    """One generated clip and its scores."""

    item: Item
    right: dict[str, bool]  # of `reading.score`
    read: str  # the motion as read, in words
    identity: float | None
    first_frame_psnr: float
    clip_psnr: float | None
    truth: np.ndarray | None  # uint8 [f H W 3]; kept for the page only
    frames: np.ndarray | None
    shape: Kept | None = None  # of a world of pictures, with things

    @property
    def motion_right(self) -> bool:
        """Whether the objects' motions are right and, if the camera moves, the camera's too."""
        camera_moves = self.item.facts.camera.kind != "still"
        return self.right["motion_right"] and (self.right["camera_right"] or not camera_moves)


@dataclass(frozen=True)
class Scores:
    """All scores under one setting, named as in SCORES, and SHAPES; None where no clip has the score."""

    values: dict[str, float | None]
    intervals: dict[str, tuple[float, float] | None]  # 95 %
    counts: dict[str, int]  # clips behind each number
    per_motion: dict[str, dict]
    seconds: float

    def to_dict(self) -> dict:
        rest = {"intervals": self.intervals, "counts": self.counts, "per_motion": self.per_motion}
        return {**self.values, **rest, "seconds": round(self.seconds, 1)}


# ---------------------------------------------------------------------------------------------------
# One clip


def compare(
    item: Item, truth: np.ndarray, frames: np.ndarray, rate: float, *, keep: bool, world: World = drawing
) -> Made:
    """True clip and generated frames, both uint8 [f H W 3] -> scores; `keep` keeps the frames with them."""
    facts, kept, whole = item.facts, None, None
    if isinstance(world, PictureWorld):
        found = matching.read(frames, facts, world, speed=rate)
        shapes = matching.shapes(frames, truth[0], facts, world, speed=rate)
        right, kept = matching.score(facts, found, shapes), matching.kept(shapes)
    else:
        found = reading.read(frames, facts_objects=facts.things, speed=rate)
        right, whole = reading.score(frames, facts, speed=rate), identity(found, facts, truth, rate)
    return Made(
        item,
        right=right,
        read=in_words([thing.motion for thing in found.things], found.camera),
        identity=whole,
        first_frame_psnr=psnr(frames[0], truth[0]),
        clip_psnr=psnr(frames, truth) if comparable(facts) else None,
        truth=truth if keep else None,
        frames=frames if keep else None,
        shape=kept,
    )


def comparable(facts: Facts) -> bool:
    """Whether a clip can be compared by pixel: picture and caption determine it, and something moves.

    Where nothing moves, the baseline that repeats the picture would be exact and its PSNR infinite.
    """
    moves = facts.camera.kind != "still" or any(move.kind != "still" for move in facts.moves)
    return facts.determined and moves


def identity(found: reading.Reading, facts: Facts, truth: np.ndarray, rate: float) -> float | None:
    """Fraction of the frames in which every object keeps its identity; None without objects.

    It does if the pixels of its colour cover about the right area, which may lie anywhere between its area in
    the first frame and the expected one (a missed motion is not a loss of identity), and if they are about as
    compact as in the first frame.
    """
    if not facts.things:
        return None
    kept = np.ones(len(truth), bool)
    for thing, move, seen in zip(facts.things, facts.moves, found.things, strict=True):
        area, spread = np.array(seen.area), np.array(seen.spread)
        expected = expected_area(thing, move, facts, truth, rate)
        smallest, largest = np.minimum(1.0, expected) / AREA_OFF, np.maximum(1.0, expected) * AREA_OFF
        kept &= (area >= smallest) & (area <= largest)
        kept &= (spread >= 1.0 / SPREAD_OFF) & (spread <= SPREAD_OFF)
    return float(kept.mean())


def expected_area(
    thing: drawing.Thing, move: drawing.Move, facts: Facts, truth: np.ndarray, rate: float
) -> np.ndarray:
    """Area that an object should cover inside the picture -> [f], relative to the first frame."""
    count, height, width, _ = truth.shape
    half = min(height, width) / 2.0
    x, y, radius, angle = drawing.track(thing, move, facts.camera, rate * np.linspace(0.0, 1.0, count))
    column = (np.arange(width) + 0.5 - width / 2.0) / half
    row = (np.arange(height) + 0.5 - height / 2.0) / half
    u, v = column[None, None, :] - x[:, None, None], row[None, :, None] - y[:, None, None]
    area = drawing.coverage(thing.shape, u, v, radius, angle, half).sum((1, 2))
    return area / max(float(area[0]), 1.0)


def in_words(motions: Sequence[str], camera: str) -> str:
    """Describe the motions: "left", "rotate and still", "pan left", "zoom in, right"."""
    things = " and ".join(motions)
    if camera == "still":
        return things or "still"
    return camera if all(motion == "still" for motion in motions) else f"{camera}, {things}"


def asked(facts: Facts) -> str:
    """The requested motions, in words."""
    return in_words([move.kind for move in facts.moves], facts.camera.kind)


# ---------------------------------------------------------------------------------------------------
# Numbers


def summarise(made: Sequence[Made], known: dict[str, list[float]], seconds: float) -> Scores:
    """All scores under one setting; the set "other" enters only `other_motion_accuracy`."""
    sets = {name: [one for one in made if one.item.set == name] for name in ("basic", "other", "all")}
    both = sets["basic"] + sets["all"]
    camera = [one for one in sets["all"] if one.item.facts.camera.kind != "still"]
    verdicts = {
        "motion_accuracy_basic": [one.motion_right for one in sets["basic"]],
        "motion_accuracy_all": [one.motion_right for one in sets["all"]],
        "other_motion_accuracy": [one.motion_right for one in sets["other"]],
        "object_accuracy": [one.right["object_right"] for one in both],
        "camera_accuracy": [one.right["camera_right"] for one in camera],
    }
    figures = {
        "identity": [one.identity for one in both if one.identity is not None],
        "first_frame_psnr": [one.first_frame_psnr for one in both],
        "clip_psnr": [one.clip_psnr for one in both if one.clip_psnr is not None],
        **known,
    }
    if shaped := [one for one in both if one.shape is not None]:
        verdicts["shape_kept_last"] = [last for one in shaped for last in one.shape.last]
        verdicts["motion_and_shape"] = [one.motion_right and one.shape.whole for one in shaped]
        figures["shape_kept"] = [one.shape.mean for one in shaped]
    return Scores(
        values={name: _rounded(_mean(v)) for name, v in (verdicts | figures).items()},
        intervals={
            **{name: _rounded(wilson(sum(v), len(v))) for name, v in verdicts.items()},
            **{name: _rounded(mean_interval(v)) for name, v in figures.items()},
            **{
                name: _rounded(share_interval(figures[name]))
                for name in ("identity", "shape_kept", "vae_shape_kept")
                if name in figures
            },
        },
        counts={name: len(v) for name, v in (verdicts | figures).items()},
        per_motion=per_motion(both),
        seconds=seconds,
    )


def per_motion(made: Sequence[Made]) -> dict[str, dict]:
    """Per requested motion of GROUPS: accuracy, its interval, number of clips, readings of wrong ones."""
    groups: dict[str, list[Made]] = {name: [] for name in GROUPS}
    for one in made:
        groups[group_of(one.item.facts)].append(one)
    table = {}
    for name, group in groups.items():
        right = [one.motion_right for one in group]
        table[name] = {
            "accuracy": _rounded(_mean(right)),
            "interval": _rounded(wilson(sum(right), len(right))),
            "clips": len(group),
            "read_as": dict(Counter(one.read for one in group if not one.motion_right).most_common()),
        }
    return table


def group_of(facts: Facts) -> str:
    """The entry of GROUPS that a clip belongs to."""
    if facts.camera.kind != "still":
        return facts.camera.kind
    return facts.moves[0].kind if len(facts.things) == 1 else TWO_OBJECTS


def wilson(right: int, count: int) -> tuple[float, float] | None:
    """95 % score interval of a proportion, Wilson (1927); valid near 0 and 1 and for few clips."""
    if count == 0:
        return None
    share, extra = right / count, stats.Z**2 / count
    middle = (share + extra / 2) / (1 + extra)
    half_width = stats.Z * math.sqrt(share * (1 - share) / count + extra / (4 * count)) / (1 + extra)
    return max(0.0, middle - half_width), min(1.0, middle + half_width)


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of a mean (Student's t); None for fewer than two values."""
    found = stats.mean(values)
    return None if found.low is None else (found.low, found.high)


def share_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """`mean_interval` clipped to [0, 1], for values in that range."""
    found = mean_interval(values)
    return found and (max(0.0, found[0]), min(1.0, found[1]))


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _rounded(value):
    if value is None:
        return None
    return tuple(round(v, 4) for v in value) if isinstance(value, tuple) else round(value, 4)
