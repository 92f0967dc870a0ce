"""From clips to numbers: what one generated clip shows, and what many of them say about a model.

Axes: f frames, H W pixels.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from i2vgen.scoring import stats
from i2vgen.scoring.metrics import psnr
from i2vgen.world import drawing, reading
from i2vgen.world.drawing import Facts

ACCURACIES = (
    "motion_accuracy_basic",
    "motion_accuracy_all",
    "other_motion_accuracy",
    "object_accuracy",
    "camera_accuracy",
)
MEANS = ("identity", "first_frame_psnr", "clip_psnr", "still_psnr", "vae_psnr")
SCORES = (*ACCURACIES, *MEANS)
TWO_OBJECTS = "two objects"  # the row of `per_motion` for clips without a motion of their own
GROUPS = (*drawing.MOTIONS, TWO_OBJECTS, *drawing.CAMERA_MOVES)

# How far area and compactness of an object may be off, as factors. True clips spoiled by blur, noise and
# colour drift (tests/test_world.py) keep 99.9 % of their frames within; an object that fades keeps 36 %.
AREA_OFF, SPREAD_OFF = 1.5, 1.25


class Item(NamedTuple):
    """One clip to make."""

    set: Literal["basic", "other", "all"]
    seed: int  # of the world's clip and of the sampler's noise
    caption: str
    facts: Facts


class Made(NamedTuple):
    """One clip that was made, and how it compares."""

    item: Item
    right: dict[str, bool]  # of `reading.score`
    read: str
    identity: float | None
    first_frame_psnr: float
    clip_psnr: float | None
    truth: np.ndarray | None  # uint8 [f H W 3]; kept for the page only
    frames: np.ndarray | None

    @property
    def motion_right(self) -> bool:
        """Under a camera move the objects and the camera have to be right."""
        camera_moves = self.item.facts.camera.kind != "still"
        return self.right["motion_right"] and (self.right["camera_right"] or not camera_moves)


@dataclass(frozen=True)
class Scores:
    """Every number of one setting, under the names of SCORES; None where there is no such clip."""

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


def compare(item: Item, truth: np.ndarray, frames: np.ndarray, rate: float, *, keep: bool) -> Made:
    """truth, frames uint8 [f H W 3]"""
    facts = item.facts
    found = reading.read(frames, facts_objects=facts.things, speed=rate)
    return Made(
        item,
        right=reading.score(frames, facts, speed=rate),
        read=in_words([thing.motion for thing in found.things], found.camera),
        identity=identity(found, facts, truth, rate),
        first_frame_psnr=psnr(frames[0], truth[0]),
        clip_psnr=psnr(frames, truth) if comparable(facts) else None,
        truth=truth if keep else None,
        frames=frames if keep else None,
    )


def comparable(facts: Facts) -> bool:
    """Whether a clip can be compared pixel by pixel: picture and caption fix it, and something moves.

    Where nothing moves, repeating the picture is the truth: the baseline would be infinitely good there.
    """
    moves = facts.camera.kind != "still" or any(move.kind != "still" for move in facts.moves)
    return facts.determined and moves


def identity(found: reading.Reading, facts: Facts, truth: np.ndarray, rate: float) -> float | None:
    """Share of the frames in which every object is still itself; None without objects.

    An object is itself where pixels of its colour make up about its area (of the first frame, due by now,
    or between: a motion that fails is no loss of identity) and lie together about as in the first frame.
    """
    if not facts.things:
        return None
    kept = np.ones(len(truth), bool)
    for thing, move, seen in zip(facts.things, facts.moves, found.things, strict=True):
        area, spread = np.array(seen.area), np.array(seen.spread)
        due = area_due(thing, move, facts, truth, rate)
        kept &= (area >= np.minimum(1.0, due) / AREA_OFF) & (area <= np.maximum(1.0, due) * AREA_OFF)
        kept &= (spread >= 1.0 / SPREAD_OFF) & (spread <= SPREAD_OFF)
    return float(kept.mean())


def area_due(
    thing: drawing.Thing, move: drawing.Move, facts: Facts, truth: np.ndarray, rate: float
) -> np.ndarray:
    """Area that a thing covers inside the picture -> [f], in parts of that in the first frame."""
    count, height, width, _ = truth.shape
    half = min(height, width) / 2.0
    x, y, radius, angle = drawing.track(thing, move, facts.camera, rate * np.linspace(0.0, 1.0, count))
    column = (np.arange(width) + 0.5 - width / 2.0) / half
    row = (np.arange(height) + 0.5 - height / 2.0) / half
    u, v = column[None, None, :] - x[:, None, None], row[None, :, None] - y[:, None, None]
    area = drawing.coverage(thing.shape, u, v, radius, angle, half).sum((1, 2))
    return area / max(float(area[0]), 1.0)


def in_words(motions: Sequence[str], camera: str) -> str:
    """What things and camera do: "left", "rotate and still", "pan left", "zoom in, right"."""
    things = " and ".join(motions)
    if camera == "still":
        return things or "still"
    return camera if all(motion == "still" for motion in motions) else f"{camera}, {things}"


def asked(facts: Facts) -> str:
    return in_words([move.kind for move in facts.moves], facts.camera.kind)


# ---------------------------------------------------------------------------------------------------
# Numbers


def summarise(made: Sequence[Made], known: dict[str, list[float]], seconds: float) -> Scores:
    """All scores of one setting; "other" counts in its own score only."""
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
    return Scores(
        values={name: _rounded(_mean(v)) for name, v in (verdicts | figures).items()},
        intervals={
            **{name: _rounded(wilson(sum(v), len(v))) for name, v in verdicts.items()},
            **{name: _rounded(mean_interval(v)) for name, v in figures.items()},
            "identity": _rounded(share_interval(figures["identity"])),
        },
        counts={name: len(v) for name, v in (verdicts | figures).items()},
        per_motion=per_motion(both),
        seconds=seconds,
    )


def per_motion(made: Sequence[Made]) -> dict[str, dict]:
    """Motion asked for, of GROUPS -> accuracy, its interval, clips, and what the wrong ones were read as."""
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
    """The row of a clip, of GROUPS."""
    if facts.camera.kind != "still":
        return facts.camera.kind
    return facts.moves[0].kind if len(facts.things) == 1 else TWO_OBJECTS


def wilson(right: int, count: int) -> tuple[float, float] | None:
    """95 % interval of a share by Wilson (1927), which holds near 0 and 1 and for few clips too."""
    if count == 0:
        return None
    share, extra = right / count, stats.Z**2 / count
    middle = (share + extra / 2) / (1 + extra)
    reach = stats.Z * math.sqrt(share * (1 - share) / count + extra / (4 * count)) / (1 + extra)
    return max(0.0, middle - reach), min(1.0, middle + reach)


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of a mean; None for fewer than two values."""
    found = stats.mean(values)
    return None if found.low is None else (found.low, found.high)


def share_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The same of values between 0 and 1, which it does not leave."""
    found = mean_interval(values)
    return found and (max(0.0, found[0]), min(1.0, found[1]))


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _rounded(value):
    if value is None:
        return None
    return tuple(round(v, 4) for v in value) if isinstance(value, tuple) else round(value, 4)
