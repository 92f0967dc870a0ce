"""All scores by name with their requirements, and their computation on the clips of one or two models.

Requirements (a picture, a package, a network) are checked before any clip is read. Scores that were not
requested load and compute nothing.

Axes: f frames, h w pixel rows and columns.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from i2vgen.fast import runtime
from i2vgen.files import images, video
from i2vgen.scoring import clips as files
from i2vgen.scoring import flow, metrics, networks, stats
from i2vgen.scoring.clips import Clip
from i2vgen.scoring.stats import Mean
from i2vgen.settings.config import Runtime
from i2vgen.settings.wording import counted

NEEDS = {
    "picture": "the picture that each clip was made from: its record, the JSON next to the clip, or a list",
    "prompt": "the prompt of each clip: its record, the JSON next to the clip, or a list",
    "reference": "true videos: reference=FOLDER, or a list with the field reference",
    "opencv": "OpenCV, which is not installed: python -m pip install opencv-python-headless",
    "clip": "a CLIP: clip_weights=FOLDER, or clip_model=NAME clip_checkpoint=FILE",
    "lpips": "lpips_network=FILE.py:NAME, MODULE:NAME or a TorchScript file",
    "fvd": "fvd_network=FILE.py:NAME, MODULE:NAME or a TorchScript file",
}
# Scores of a whole set of clips, from the features of both sets.
SETS = {"fvd": stats.frechet, "kvd": stats.kernel_distance}


class Metric(NamedTuple):
    """How to read a score, and its requirements (keys of NEEDS)."""

    unit: str
    better: Literal["higher", "lower", ""]  # "": neither; descriptive
    needs: tuple[str, ...]
    says: str


METRICS = {
    "first_frame_psnr": Metric("dB", "higher", ("picture",), "first frame against the picture, PSNR"),
    "first_frame_ssim": Metric("", "higher", ("picture",), "first frame against the picture, SSIM"),
    "first_frame_lpips": Metric("", "lower", ("picture", "lpips"), "first frame against the picture, LPIPS"),
    "reference_psnr": Metric("dB", "higher", ("reference",), "all frames against the true clip, PSNR"),
    "reference_ssim": Metric("", "higher", ("reference",), "all frames against the true clip, SSIM"),
    "reference_lpips": Metric("", "lower", ("reference", "lpips"), "all frames against the true clip, LPIPS"),
    "fvd": Metric("", "lower", ("reference", "fvd"), "Fréchet distance to the true clips, all together"),
    "kvd": Metric(
        "", "lower", ("reference", "fvd"), "kernel distance to the true clips; unbiased, so for few clips"
    ),
    "flicker": Metric("levels", "lower", (), "a frame against midway between its neighbours"),
    "warp_error": Metric(
        "levels", "lower", ("opencv",), "a frame against the next, pulled back along the flow"
    ),
    "clip_consistency": Metric("", "higher", ("clip",), "CLIP cosine of neighbouring frames"),
    "clip_image": Metric("", "higher", ("clip", "picture"), "CLIP cosine of every frame and the picture"),
    "clip_text": Metric("", "higher", ("clip", "prompt"), "CLIP cosine of every frame and the prompt"),
    "motion": Metric("% of width", "", ("opencv",), "length of the optical flow, per frame"),
    "frame_change": Metric("levels", "", (), "absolute difference of neighbouring frames"),
    "sharpness": Metric("levels²", "", (), "variance of the Laplacian"),
}


@dataclass(frozen=True)
class Plan:
    """The user's request; empty strings and tuples mean not given."""

    videos: str
    against: str = ""
    reference: str = ""
    metrics: tuple[str, ...] = ()  # empty: all whose requirements are met
    frames: int = 0  # use the first N frames of every clip; 0: all
    fit: Literal["refuse", "crop"] = "refuse"  # for true clips of another size
    clip_weights: str = ""
    clip_model: str = ""
    clip_checkpoint: str = ""
    lpips_network: str = ""
    fvd_network: str = ""
    device: str = "auto"

    def __post_init__(self):
        if isinstance(self.metrics, str):
            raise ValueError(f"metrics is {self.metrics!r}; give a list of names, such as [{self.metrics!r}]")
        if wrong := [name for name in self.metrics if name not in METRICS]:
            raise ValueError(f"there is no metric {wrong[0]}; choose from {', '.join(METRICS)}")
        if self.frames < 0:
            raise ValueError(f"frames is {self.frames}; give a number of frames, 0 for all")
        if self.fit not in ("refuse", "crop"):
            raise ValueError(f"fit is {self.fit}; give refuse or crop")
        if bool(self.clip_model) != bool(self.clip_checkpoint):
            raise ValueError("clip_model= and clip_checkpoint= belong together; give both, or clip_weights=")
        if self.clip_weights and self.clip_model:
            raise ValueError("clip_weights= and clip_model= both name a CLIP; give one of them")


class Model(NamedTuple):
    """The clips of one model and the folder, list or file they come from."""

    place: str
    clips: tuple[Clip, ...]


@dataclass(frozen=True)
class Job:
    """A checked plan: the clips of each model and the scores to compute."""

    plan: Plan
    models: tuple[Model, ...]  # one, or two whose clips have the same names in the same order
    names: tuple[str, ...]  # of METRICS
    left_out: dict[str, str]  # metrics left out -> their missing requirement
    unpaired: tuple[str, ...] = ()  # clips that only one of the two models has


@dataclass
class Judges:
    """The networks that the requested scores need."""

    clip: networks.ClipJudge | None = None
    lpips: networks.Lpips | None = None
    fvd: networks.FvdFeatures | None = None


@dataclass
class Found:
    """The scores of one model."""

    place: str
    clips: list[Clip] = field(default_factory=list)
    rows: list[dict[str, float | None]] = field(default_factory=list)  # one per clip
    means: dict[str, Mean] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)  # unreadable clip -> reason


# ---------------------------------------------------------------------------------------------------
# Preparing


def prepare(plan: Plan) -> Job:
    """Find the clips and check all requirements before any clip is read. ValueError if one is not met."""
    places = [plan.videos, *([plan.against] if plan.against else [])]
    found = [files.find(name, place) for name, place in zip(("videos", "against"), places, strict=False)]
    found, unpaired = pair(found, places)
    if plan.reference:
        true = files.find("reference", plan.reference)
        found = [files.match(clips, true) for clips in found]
    for setting in ("lpips_network", "fvd_network"):
        if getattr(plan, setting):
            networks.check(setting, getattr(plan, setting))
    lacking = dict(lacks(plan, [clip for clips in found for clip in clips]))
    names, left_out = [], {}
    for name, metric in METRICS.items():
        missing = [need for need in metric.needs if need in lacking]
        if plan.metrics and name not in plan.metrics:
            continue
        if not missing:
            names.append(name)
        elif plan.metrics:
            raise ValueError(f"{name} needs {lacking[missing[0]]}")
        else:
            left_out[name] = lacking[missing[0]]
    refuse_unused(plan, names)
    if any("picture" in METRICS[name].needs for name in names):
        for file in dict.fromkeys(clip.image for clips in found for clip in clips):
            images.open_picture(file)
    models = tuple(Model(place, tuple(clips)) for place, clips in zip(places, found, strict=True))
    return Job(plan, models, tuple(names), left_out, unpaired)


def lacks(plan: Plan, clips: Sequence[Clip]) -> Iterable[tuple[str, str]]:
    """Unmet requirements, each with what to do about it."""
    for need, which in (("picture", "image"), ("prompt", "prompt"), ("reference", "reference")):
        without = [str(clip.file) for clip in clips if not getattr(clip, which)]
        if without:
            some = f" ({len(without)} of {len(clips)} lack it, such as {without[0]})"
            yield need, NEEDS[need] + (some if len(without) < len(clips) else "")
    if importlib.util.find_spec("cv2") is None:
        yield "opencv", NEEDS["opencv"]
    if not (plan.clip_weights or plan.clip_model):
        yield "clip", NEEDS["clip"]
    for need in ("lpips", "fvd"):
        if not getattr(plan, f"{need}_network"):
            yield need, NEEDS[need]


def refuse_unused(plan: Plan, names: Sequence[str]) -> None:
    """ValueError if an input was given that no requested score uses."""
    given = {
        "reference": plan.reference,
        "clip": plan.clip_weights or plan.clip_model,
        "lpips": plan.lpips_network,
        "fvd": plan.fvd_network,
    }
    needed = {need for name in names for need in METRICS[name].needs}
    for need, value in given.items():
        if value and need not in needed:
            some = [name for name, metric in METRICS.items() if need in metric.needs]
            raise ValueError(
                f"{value} is used by none of the requested scores; add {' or '.join(some)} to metrics="
            )


def pair(found: list[list[Clip]], places: Sequence[str]) -> tuple[list[list[Clip]], tuple[str, ...]]:
    """Clips of two models -> those with a partner of the same name, in the same order; names of the others.

    One model's clips are returned as they are. ValueError if none match or a pair has different conditions.
    """
    if len(found) == 1:
        return found, ()
    first, second = ({clip.name: clip for clip in clips} for clips in found)
    both = [name for name in first if name in second]
    if not both:
        raise ValueError(
            f"no clip of {places[0]} has a partner of the same name in {places[1]} ({next(iter(first))}, ... "
            f"against {next(iter(second))}, ...); use the same names, or give lists with the field name"
        )
    alone = tuple(name for name in (*first, *second) if (name in first) != (name in second))
    for name in both:
        one, other = first[name], second[name]
        made = [(c.prompt, Path(c.image).name) for c in (one, other)]
        if all(c.prompt is not None and c.image for c in (one, other)) and made[0] != made[1]:
            raise ValueError(
                f"{one.file} and {other.file} have the same name but were made from {made[0][1]}, "
                f"{made[0][0]!r} and {made[1][1]}, {made[1][0]!r}; pair only clips of the same picture and "
                "prompt"
            )
    return [[first[name] for name in both], [second[name] for name in both]], alone


def load_judges(job: Job) -> Judges:
    """Load only the networks that the job's scores need."""
    needed = {need for name in job.names for need in METRICS[name].needs}
    plan, judges = job.plan, Judges()
    device = runtime.device(Runtime(device=plan.device))
    if "clip" in needed:
        judges.clip = (
            networks.clip_from_weights(plan.clip_weights, device)
            if plan.clip_weights
            else networks.clip_from_checkpoint(plan.clip_model, plan.clip_checkpoint, device)
        )
    if "lpips" in needed:
        judges.lpips = networks.Lpips(networks.load("lpips_network", plan.lpips_network, device), device)
    if "fvd" in needed:
        judges.fvd = networks.FvdFeatures(networks.load("fvd_network", plan.fvd_network, device), device)
    return judges


# ---------------------------------------------------------------------------------------------------
# Scoring


def run(job: Job, judges: Judges, on_clip: Callable[[], None] = lambda: None) -> list[Found]:
    """Score every model. A clip that cannot be read or scored is skipped for all, recorded with the reason.

    ValueError if no clip is left.
    """
    found = [Found(model.place) for model in job.models]
    features: list[list[np.ndarray]] = [[] for _ in job.models]
    true_features: list[list[np.ndarray]] = [[] for _ in job.models]
    for same in zip(*(model.clips for model in job.models), strict=True):
        try:
            scored = [score_clip(clip, job, judges) for clip in same]
        except (ValueError, OSError) as error:
            for one, clip in zip(found, same, strict=True):
                one.skipped[clip.name] = str(error)
                on_clip()
            continue
        for number, (one, clip, (row, own, true)) in enumerate(zip(found, same, scored, strict=True)):
            one.clips.append(clip)
            one.rows.append(row)
            features[number] += own
            true_features[number] += true
            on_clip()
    if not found[0].rows:
        name, why = next(iter(found[0].skipped.items()))
        raise ValueError(f"none of the clips ({len(found[0].skipped)}) can be scored; {name}: {why}")
    for one, own, true in zip(found, features, true_features, strict=True):
        for name in job.names:
            if name in SETS:
                one.means[name] = set_distance(name, own, true)
            else:
                one.means[name] = stats.mean([row[name] for row in one.rows])
    return found


def score_clip(
    clip: Clip, job: Job, judges: Judges
) -> tuple[dict[str, float | None], list[np.ndarray], list[np.ndarray]]:
    """The scores of one clip, and the features of it and its true clip if the job compares sets."""
    frames = files.frames(clip, job.plan.frames)
    truth = true_frames(clip, frames, job) if needs_truth(job) else None
    row = score(clip, frames, truth, job.names, judges)
    return row, *([judges.fvd(part)] if judges.fvd is not None else [] for part in (frames, truth))


def needs_truth(job: Job) -> bool:
    return any("reference" in METRICS[name].needs for name in job.names)


def true_frames(clip: Clip, frames: np.ndarray, job: Job) -> np.ndarray:
    """The true clip at the length and size of the generated one; ValueError if they differ (size: `fit`)."""
    total, _ = video.measure(clip.reference)
    total = min(total, job.plan.frames or total)
    count, height, width, _ = frames.shape
    if total != count:
        raise ValueError(
            f"{clip.file} has {count} frames and its true clip {clip.reference} has {total}; give clips "
            f"of equal length, or frames={min(count, total)} to compare the first frames"
        )
    truth, _ = video.load(clip.reference, alpha=clip.preprocess.alpha, only=range(count))
    if truth.shape != frames.shape and job.plan.fit == "refuse":
        raise ValueError(
            f"{clip.file} has {width} x {height} pixels and its true clip {clip.reference} has "
            f"{truth.shape[2]} x {truth.shape[1]}; fit=crop scales and crops true clips as it does pictures"
        )
    return files.cropped(truth, width, height)


def score(
    clip: Clip, frames: np.ndarray, truth: np.ndarray | None, names: Sequence[str], judges: Judges
) -> dict[str, float | None]:
    """Frames and true frames uint8 [f h w 3] -> requested scores of one clip. ValueError names the clip."""
    picture = None
    try:
        if any("picture" in METRICS[name].needs for name in names):
            picture = files.picture(clip, frames.shape[2], frames.shape[1])
        return measured(frames, picture, truth, clip.prompt, names, judges)
    except ValueError as error:
        raise ValueError(f"{clip.file}: {error}") from error


def measured(
    frames: np.ndarray,
    picture: np.ndarray | None,
    truth: np.ndarray | None,
    prompt: str | None,
    names: Sequence[str],
    judges: Judges,
) -> dict[str, float | None]:
    """Frames uint8 [f h w 3], picture [h w 3], true frames [f h w 3] -> requested scores of one clip."""
    wanted = set(names)
    row = scores_without_inputs(frames, wanted)
    if picture is not None:
        row |= against_picture(frames, picture, wanted, judges)
    if truth is not None:
        row |= against_truth(frames, truth, wanted, judges)
    if judges.clip is not None:
        row |= by_clip(prompt, frames, picture, wanted, judges.clip)
    if wrong := [name for name, value in row.items() if value is not None and not math.isfinite(value)]:
        raise ValueError(f"its {wrong[0]} is {row[wrong[0]]}")
    return {name: row[name] for name in names if name not in SETS}


def against_picture(frames: np.ndarray, picture: np.ndarray, wanted: set[str], judges: Judges) -> dict:
    row = {}
    if "first_frame_psnr" in wanted:
        row["first_frame_psnr"] = metrics.psnr(frames[0], picture)
    if "first_frame_ssim" in wanted:
        row["first_frame_ssim"] = metrics.ssim(frames[0], picture)
    if "first_frame_lpips" in wanted:
        row["first_frame_lpips"] = judges.lpips(frames[:1], picture[None])
    return row


def against_truth(frames: np.ndarray, truth: np.ndarray, wanted: set[str], judges: Judges) -> dict:
    row = {}
    if "reference_psnr" in wanted:
        row["reference_psnr"] = metrics.psnr(frames, truth)
    if "reference_ssim" in wanted:
        row["reference_ssim"] = metrics.ssim(frames, truth)
    if "reference_lpips" in wanted:
        row["reference_lpips"] = judges.lpips(frames, truth)
    return row


def scores_without_inputs(frames: np.ndarray, wanted: set[str]) -> dict:
    row = {}
    for name in ("flicker", "frame_change", "sharpness"):
        if name in wanted:
            row[name] = getattr(metrics, name)(frames)
    if wanted & {"motion", "warp_error"}:
        row |= flow.measure(frames)._asdict()
    return row


def by_clip(
    prompt: str | None,
    frames: np.ndarray,
    picture: np.ndarray | None,
    wanted: set[str],
    judge: networks.ClipJudge,
) -> dict:
    """Cosines, -1 to 1: frame consistency (Esser et al. 2023), and CLIPSIM (Wu et al. 2021) for the text."""
    row, seen = {}, judge.pictures(list(frames))
    if "clip_consistency" in wanted:
        metrics.need_frames(frames, 2, "clip_consistency")
        row["clip_consistency"] = float((seen[1:] * seen[:-1]).sum(-1).mean())
    if "clip_image" in wanted:
        row["clip_image"] = float((seen @ judge.pictures([picture]).T).mean())
    if "clip_text" in wanted:
        row["clip_text"] = float((seen @ judge.text(prompt)).mean())
    return row


def set_distance(name: str, own: Sequence[np.ndarray], true: Sequence[np.ndarray]) -> Mean:
    """One number for all clips: it has no interval over them, and no value for a single clip."""
    if len(own) < 2:
        warnings.warn(
            f"{name} compares sets of at least 2 clips, and there is 1; it has no value", stacklevel=2
        )
        return Mean(None, None, None, len(own))
    if name == "fvd" and len(own) <= len(own[0]):
        warnings.warn(
            f"fvd: {counted(len(own), 'clip')} span fewer than the {len(own[0])} directions of their "
            "features; it comes out too high, and only values of as many clips can be compared (kvd has no "
            "such bias)",
            stacklevel=2,
        )
    return Mean(SETS[name](np.stack(own), np.stack(true)), None, None, len(own))


def differences(one: Found, other: Found, names: Sequence[str]) -> dict[str, Mean]:
    """Paired differences one - other, of scores that every clip has."""
    return {
        name: stats.paired([row[name] for row in one.rows], [row[name] for row in other.rows])
        for name in names
        if name not in SETS
    }
