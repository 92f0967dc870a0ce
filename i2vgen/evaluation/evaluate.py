"""Scores a model on clips of the procedural world that no training draws: a model in, numbers out.

Three sets of clips, one per seed each: "basic" (one object, the basic eight motions), "all" (the whole
world) and "other" (the pictures and noises of "basic" with another motion in the caption, which tells
reading the caption from guessing by the picture). The model gets the first frame and the caption; what it
makes is read back by `reading` and compared with the true clip. docs/evaluation.md explains every score.

Axes: b batch, f frames, c channels, h w latent rows and columns, H W pixels.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

import i2vgen
from i2vgen import pipeline
from i2vgen.adapt.context import tokens_of, with_tokens
from i2vgen.diffusion.solvers import SOLVERS
from i2vgen.evaluation import drift
from i2vgen.evaluation.drift import Drift, Sampled, counting
from i2vgen.evaluation.scores import Item, Made, Scores, comparable, compare, summarise
from i2vgen.files import records
from i2vgen.memory import plans
from i2vgen.model.conditioning import Conditions, Prepared
from i2vgen.model.unet import UNet
from i2vgen.pipeline import I2VGenXL
from i2vgen.scoring.metrics import psnr
from i2vgen.settings.config import RANDOM, Config
from i2vgen.settings.merge import load_config
from i2vgen.training.data import FIRST_TRAINING_SEED
from i2vgen.training.settings import MAX_WORLD_SPEED, Bucket, world_speed
from i2vgen.world import drawing
from i2vgen.world.drawing import Facts

SWEEPS = {"guidance": (1, 2, 3, 5, 7, 9), "steps": (10, 15, 20, 30, 50), "eta": (0, 0.25, 0.5, 1)}
CONDITIONS = "conditions"
COMPARED = ("quality", "samplers")  # their rows are compared with a reference too: evaluation_drift.py
ALL_SWEEPS = (*SWEEPS, CONDITIONS, *COMPARED)
SHOWN = {"basic": 6, "other": 4, "all": 6}  # clips on the page
Missing = Literal["", "concat", "text", "local tokens", "image vector"]


@dataclass(frozen=True)
class Plan:
    """Which clips to make, and what to vary."""

    clips: int = 64
    first_seed: int = 0
    sweep: Literal["", "guidance", "steps", "conditions", "eta", "quality", "samplers"] = ""

    def __post_init__(self):
        if self.clips < 1:
            raise ValueError(f"clips is {self.clips}; give 1 or more")
        if self.first_seed < 0:
            raise ValueError(f"first_seed is {self.first_seed}; seeds are 0 or above")
        if self.first_seed + self.clips > FIRST_TRAINING_SEED:
            raise ValueError(
                f"first_seed={self.first_seed} with clips={self.clips} reaches the seeds from 2**40 on, "
                "which trainings draw: scores there would measure memory; use smaller seeds"
            )
        if self.sweep not in ("", *ALL_SWEEPS):
            raise ValueError(f"sweep={self.sweep} is unknown; use one of {', '.join(ALL_SWEEPS)}")


@dataclass(frozen=True)
class Evaluation:
    settings: dict
    scores: Scores  # as set
    sweep: tuple[tuple[str, Scores], ...]
    shown: tuple[Made, ...]
    drifts: dict[str, Drift] = dataclasses.field(default_factory=dict)  # row -> of COMPARED; "as set" too

    def to_dict(self) -> dict:
        report = {**self.scores.to_dict(), "settings": self.settings, **self.drift("as set")}
        if self.sweep:
            report["sweep"] = [
                {"name": name, **scores.to_dict(), **self.drift(name)} for name, scores in self.sweep
            ]
        return report

    def drift(self, row: str) -> dict:
        return self.drifts[row].to_dict() if row in self.drifts else {}


class Variant(NamedTuple):
    """One row of a sweep: other sampling settings, or a condition that is missing."""

    name: str
    config: Config
    missing: Missing = ""


# ---------------------------------------------------------------------------------------------------
# What to make


def items(plan: Plan) -> list[Item]:
    found = []
    for seed in range(plan.first_seed, plan.first_seed + plan.clips):
        basic, whole = drawing.sample_facts(seed, kind="basic"), drawing.sample_facts(seed)
        other = drawing.another_motion(basic, seed)
        found += [
            Item(name, seed, drawing.caption(facts, seed), facts)
            for name, facts in (("basic", basic), ("other", other), ("all", whole))
        ]
    return found


def variants(config: Config, sweep: str) -> list[Variant]:
    """The rows of a sweep, checked; ValueError for a sweep that has no effect under these settings."""
    if sweep == CONDITIONS:
        use = config.use
        if config.sample.deep_cache > 1:
            raise ValueError(
                f"sweep={sweep} changes what the UNet reads and sample.deep_cache={config.sample.deep_cache} "
                "keeps parts of it; use deep_cache=0"
            )
        there = {"concat": use.concat, "text": use.text, "local tokens": use.local_tokens,
                 "image vector": use.global_tokens}  # fmt: skip
        rows = [Variant(f"without {name}", config, name) for name, is_there in there.items() if is_there]
        return [Variant("everything", config), *rows]
    unable = {"steps": ("ancestral",), "eta": ("ancestral", *SOLVERS)}.get(sweep, ())
    if config.sample.sampler in unable:
        raise ValueError(
            f"sweep={sweep} has no effect with sample.sampler={config.sample.sampler}; use sampler=ddim"
        )
    if sweep in COMPARED:
        rows = [Variant(*row) for row in drift.settings(config, sweep)]
        for row in rows:
            pipeline.refuse_unsampleable(row.config)
        return rows
    rows = []
    for value in SWEEPS.get(sweep, ()):
        sample = dataclasses.replace(config.sample, **{sweep: value})
        rows.append(Variant(f"{sweep} {value:g}", dataclasses.replace(config, sample=sample)))
        pipeline.refuse_unsampleable(rows[-1].config)
    return rows


def check(config: Config, plan: Plan) -> int:
    """-> how many settings will be sampled; ValueError, before any work, for what cannot be scored."""
    speed(config)
    return 1 + sum(not as_set(variant, config) for variant in variants(config, plan.sweep))


def as_set(variant: Variant, config: Config) -> bool:
    return variant.config == config and not variant.missing


def speed(config: Config) -> float:
    """How much of the captioned motion the true clips show: 1 at the length and rate of the weights.

    Another `frames` or `fps` asks for more or less of the motion, as it does in training.
    """
    sample = config.sample
    if sample.frames < 2:
        raise ValueError(f"sample.frames is {sample.frames}; motion is read from two frames or more")
    if config.weights == RANDOM:
        return 1.0
    found = world_speed(load_config(weights=config.weights), Bucket(sample.frames, sample.fps, 1))
    if found > MAX_WORLD_SPEED:
        raise ValueError(
            f"sample.frames = {sample.frames} at sample.fps = {sample.fps} shows {found:.1f} times the "
            f"motion that the weights {config.weights} were made for, and things leave the picture; at most "
            f"{MAX_WORLD_SPEED:g}: fewer frames or a higher fps"
        )
    return found


def without(unet: UNet, missing: Missing, silence: Tensor | None, local: slice) -> UNet:
    """The same UNet, weights and modules shared, with one condition that does not reach it.

    In both branches of guidance: "concat" zeroes the concat branch's output, "local tokens" zeroes those
    context tokens, "image vector" zeroes the vector before its tokens are computed, and "text" replaces the
    caption's tokens by the negative prompt's.
    """

    def prepare(conditions: Conditions, frames: int) -> Prepared:
        if missing == "text":
            conditions = conditions._replace(text=silence.expand_as(conditions.text))
        if missing == "image vector" and conditions.image_vector is not None:
            conditions = conditions._replace(image_vector=torch.zeros_like(conditions.image_vector))
        prepared = unet.prepare(conditions, frames)
        if missing == "concat":
            prepared = prepared._replace(concat=torch.zeros_like(prepared.concat))
        if missing == "local tokens":
            tokens = tokens_of(prepared.context).clone()
            tokens[:, local] = 0.0
            prepared = prepared._replace(context=with_tokens(prepared.context, tokens))
        return prepared

    changed = copy.copy(unet)
    vars(changed)["prepare"] = prepare
    return changed


def varied(model: I2VGenXL, variant: Variant) -> I2VGenXL:
    """The same parts under a row's settings."""
    config, unet = variant.config, model.unet
    if variant.missing:
        silence, first = None, config.clip.text_length if config.use.text else 0
        if variant.missing == "text":
            with plans.here(model.waiting, "clip"):
                silence = model.clip.text(model.clip.tokenize([config.negative_prompt]).to(model.device))
        local = slice(first, first + (config.unet.local_grid // 4) ** 2)
        unet = without(unet, variant.missing, silence, local)
    under = I2VGenXL(config, unet, model.vae, model.clip, model.device)
    under.waiting = model.waiting
    return under


# ---------------------------------------------------------------------------------------------------
# Making and comparing


def evaluate(
    model: I2VGenXL, plan: Plan, *, on_clips: Callable[[str, int], None] | None = None
) -> Evaluation:
    """Score the model as it is set, then each row of `plan.sweep`; `on_clips` is told (row, clips made)."""
    todo, rate = items(plan), speed(model.config)
    tick = on_clips or (lambda row, count: None)
    start = time.perf_counter()
    settings = record(model, plan, rate)  # the weights' hash before the work, as they were loaded
    known = references(model, todo, rate)
    compared = plan.sweep in COMPARED
    made, sampled = make(
        model, todo, rate, keep=True, keep_all=compared, on_clips=lambda count: tick("as set", count)
    )
    scores = summarise(made, known, time.perf_counter() - start)
    rows, of_rows = [], {"as set": sampled}
    for variant in variants(model.config, plan.sweep):
        name, of_rows[variant.name] = variant.name, sampled
        if as_set(variant, model.config):
            rows.append((name, scores))
            continue
        start = time.perf_counter()
        again, of_rows[name] = make(
            varied(model, variant),
            todo,
            rate,
            keep_all=compared,
            on_clips=lambda count, name=name: tick(name, count),
        )
        rows.append((name, summarise(again, known, time.perf_counter() - start)))
    drifts = {}
    if compared:
        reference = of_rows[rows[0][0]]
        drifts = {name: drift.drift(one, reference) for name, one in of_rows.items()}
    shown = tuple(one for one in made if one.frames is not None)
    return Evaluation(settings, scores, tuple(rows), shown, drifts)


def make(
    model: I2VGenXL,
    todo: Sequence[Item],
    rate: float,
    *,
    keep: bool = False,
    keep_all: bool = False,
    on_clips: Callable[[int], None] | None = None,
) -> tuple[list[Made], Sampled]:
    """Sample every item, `runtime.batch` at once, and compare. -> what was made, and what it took

    `keep` holds on to the frames of SHOWN, `keep_all` to those of all clips in the second.
    """
    made, size, left, sampled = [], model.config.runtime.batch, dict(SHOWN), Sampled()
    for start in range(0, len(todo), size):
        batch = todo[start : start + size]
        truths = [render(item.facts, model.config, rate) for item in batch]
        pictures = [Image.fromarray(truth[0]) for truth in truths]
        with counting(model.unet, sampled):
            clips = pipeline.generate(model, pictures, [i.caption for i in batch], [i.seed for i in batch])
        for item, truth, frames in zip(batch, truths, clips.cpu().numpy(), strict=True):
            if keep_all:
                sampled.clips.append(frames)
            left[item.set] -= 1
            made.append(compare(item, truth, frames, rate, keep=keep and left[item.set] >= 0))
        if on_clips is not None:
            on_clips(len(batch))
    return made, sampled


def render(facts: Facts, config: Config, rate: float) -> np.ndarray:
    """The true clip at the settings' size -> uint8 [f H W 3]"""
    sample = config.sample
    return drawing.render(facts, width=sample.width, height=sample.height, frames=sample.frames, speed=rate)


@torch.no_grad()
def references(model: I2VGenXL, todo: Sequence[Item], rate: float) -> dict[str, list[float]]:
    """What the clips of `clip_psnr` score without sampling: the picture repeated, the autoencoder alone."""
    found: dict[str, list[float]] = {"still_psnr": [], "vae_psnr": []}
    for item in todo:
        if item.set != "other" and comparable(item.facts):
            truth = render(item.facts, model.config, rate)
            pixels = rearrange(torch.from_numpy(truth).to(model.device), "f h w c -> f c h w") / 127.5 - 1
            latents = model.vae.encode(pixels, None, chunk=model.config.runtime.vae_chunk)
            again = pipeline.decode(model, rearrange(latents, "f c h w -> 1 c f h w"))[0].cpu().numpy()
            found["vae_psnr"].append(psnr(again, truth))
            found["still_psnr"].append(psnr(np.broadcast_to(truth[:1], truth.shape), truth))
    return found


def record(model: I2VGenXL, plan: Plan, rate: float) -> dict:
    """What is needed to make the same numbers again."""
    config = model.config
    sample = {k: v for k, v in dataclasses.asdict(config.sample).items() if k != "seed"}
    return {
        "weights": config.weights,
        "weights_sha256": {} if config.weights == RANDOM else hashes(Path(config.weights)),
        **dataclasses.asdict(plan),
        **sample,
        "world_speed": round(rate, 4),
        "batch": config.runtime.batch,
        "device": str(model.device),
        "dtype": str(next(model.unet.parameters()).dtype).removeprefix("torch."),
        "negative_prompt": config.negative_prompt,
        **{
            name: dataclasses.asdict(getattr(config, name))
            for name in ("use", "schedule", "preprocess", "save")
        },
        "versions": {"i2vgen": i2vgen.__version__, "torch": torch.__version__},
    }


def hashes(folder: Path) -> dict[str, str]:
    """File name -> SHA-256 of every weights file."""
    return {path.name: records.sha256(path) for path in sorted(folder.glob("*.safetensors"))}
