"""Scores a model on clips of the procedural world, or of a world of pictures, that training never draws.

Three sets, each with one clip per seed: "basic" (one object, the eight basic motions), "all" (the whole
world) and "other" (pictures and noise of "basic" with another motion in the caption, which separates
following the caption from guessing by the picture). The model gets the first frame and the caption; `reading`
recovers the motion from its clip, which is compared with the true one. docs/evaluation.md explains every
score.

Axes: b batch, f frames, c channels, h w latent rows and columns, H W pixel rows and columns; t timestep.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
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
from i2vgen.evaluation.scores import Item, Made, Scores, World, comparable, compare, summarise
from i2vgen.fast.processes import ALONE, Crew
from i2vgen.files import checkpoint, plugins, records
from i2vgen.memory import plans
from i2vgen.model.conditioning import Conditions, Prepared
from i2vgen.model.unet import UNet
from i2vgen.pipeline import I2VGenXL
from i2vgen.scoring.metrics import psnr
from i2vgen.settings.config import ASSETS, RANDOM, Config
from i2vgen.settings.merge import load_config
from i2vgen.training.data import FIRST_TRAINING_SEED
from i2vgen.training.settings import MAX_WORLD_SPEED, Bucket, world_speed
from i2vgen.world import drawing, matching, pictures, things
from i2vgen.world.drawing import Facts

SWEEPS = {"guidance": (1, 2, 3, 5, 7, 9), "steps": (10, 15, 20, 30, 50), "eta": (0, 0.25, 0.5, 1)}
CONDITIONS = "conditions"
SHAPES = "shapes"  # things=shapes
SHIPPED_THINGS = str(ASSETS / "things")
COMPARED = ("quality", "samplers")  # these sweeps also compare their rows with a reference (drift.py)
ALL_SWEEPS = (*SWEEPS, CONDITIONS, *COMPARED)
KEPT = {"basic": 6, "other": 4, "all": 32}  # clips whose frames are kept to be shown, per set
Missing = Literal["", "concat", "text", "local tokens", "image vector"]


@dataclass(frozen=True)
class Plan:
    """Which clips to generate, and which sweep to run."""

    clips: int = 64
    first_seed: int = 0
    sweep: Literal["", "guidance", "steps", "conditions", "eta", "quality", "samplers"] = ""
    # Folder of cut-outs or colour-emoji font, or SHAPES for the flat shapes of `drawing`; empty: what the
    # model was trained on (`suited`).
    things: str = ""
    backgrounds: str = ""  # folder of photographs to put the things on, beside the drawn backgrounds

    def __post_init__(self):
        if self.clips < 1:
            raise ValueError(f"clips is {self.clips}; give 1 or more")
        if self.first_seed < 0:
            raise ValueError(f"first_seed is {self.first_seed}; seeds are 0 or above")
        if self.first_seed + self.clips > FIRST_TRAINING_SEED:
            raise ValueError(
                f"first_seed={self.first_seed} with clips={self.clips} reaches the training seeds, which "
                "start at 2**40; scores there would measure memorisation, so use smaller seeds"
            )
        if self.sweep not in ("", *ALL_SWEEPS):
            raise ValueError(f"sweep={self.sweep} is unknown; use one of {', '.join(ALL_SWEEPS)}")

    @property
    def world(self) -> World:
        """The world of the clips; ValueError without usable pictures."""
        if self.things in ("", SHAPES):
            return drawing
        return pictures.open_for_scoring(self.things, self.backgrounds)


def suited(plan: Plan, config: Config) -> Plan:
    """The plan with things: the shipped ones for a model that was trained on pictures of things."""
    if not plan.things:
        origin = {} if config.weights == RANDOM else checkpoint.read_origin(config.weights)
        trained = next((t for t in trainings(origin) if t.get("part") == "diffusion"), {})
        plan = dataclasses.replace(plan, things=SHIPPED_THINGS if trained.get("things") else SHAPES)
    if plan.backgrounds and plan.things == SHAPES:
        raise ValueError(f"backgrounds={plan.backgrounds} are for pictures of things; give things= too")
    return plan


def trainings(origin: dict) -> Iterator[dict]:
    """The settings of every training that an origin tells of, the last one first."""
    if isinstance(origin.get("train"), dict):
        yield origin["train"]
    for earlier in origin.get("before", ()):
        yield from trainings(earlier)


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`: settings, scores, sweep rows and the clips to show."""

    settings: dict
    scores: Scores  # under the settings as given
    sweep: tuple[tuple[str, Scores], ...]
    shown: tuple[Made, ...]
    drifts: dict[str, Drift] = dataclasses.field(default_factory=dict)  # row or "as set"; COMPARED only

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
    """One row of a sweep: other sampling settings, or a condition that is removed."""

    name: str
    config: Config
    missing: Missing = ""


# ---------------------------------------------------------------------------------------------------
# What to make


def items(plan: Plan) -> list[Item]:
    """The clips to generate, three per seed: one of each set."""
    found, world = [], plan.world
    for seed in range(plan.first_seed, plan.first_seed + plan.clips):
        basic, whole = world.sample_facts(seed, kind="basic"), world.sample_facts(seed)
        other = world.another_motion(basic, seed)
        found += [
            Item(name, seed, world.caption(facts, seed), facts)
            for name, facts in (("basic", basic), ("other", other), ("all", whole))
        ]
    return found


def variants(config: Config, sweep: str) -> list[Variant]:
    """The rows of a sweep, checked; ValueError for a sweep that has no effect under these settings."""
    if sweep == CONDITIONS:
        use = config.use
        if config.sample.deep_cache > 1:
            raise ValueError(
                f"sweep={sweep} changes the UNet's inputs, but sample.deep_cache={config.sample.deep_cache} "
                "reuses activations; use deep_cache=0"
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
    """-> number of settings that will be sampled; ValueError if they cannot be scored."""
    speed(config)
    if plan.world is not drawing:
        pictures.refuse_size(config.sample.width, config.sample.height)
        _ = plan.world  # opened once
    return 1 + sum(not as_set(variant, config) for variant in variants(config, plan.sweep))


def seen_in_training(plan: Plan) -> str:
    """A note on things whose names training takes, too; "" without any."""
    names = () if plan.world is drawing else plan.world.names
    seen = [name for name in names if things.part_of(name) == "training"]
    if not seen:
        return ""
    return (
        f"{len(seen)} of {len(names)} things have names that training shows where it has them, such as "
        f"{seen[0]!r}; a model may know these pictures"
    )


def as_set(variant: Variant, config: Config) -> bool:
    return variant.config == config and not variant.missing


def speed(config: Config) -> float:
    """Motion of the true clips relative to the captioned motion: 1 at the length and rate of the weights.

    As in training, other `frames` or `fps` show more or less of the motion.
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
            f"motion that the weights {config.weights} were trained for, so objects leave the picture; the "
            f"limit is {MAX_WORLD_SPEED:g}: give fewer frames or a higher fps"
        )
    return found


def without(unet: UNet, missing: Missing, negative: Tensor | None, local: slice) -> UNet:
    """The same UNet, weights and modules shared, with one condition that does not reach it.

    In both branches of guidance: "concat" zeroes the concat branch's output, "local tokens" zeroes those
    context tokens, "image vector" zeroes the vector before its tokens are computed, and "text" replaces the
    caption's tokens by the negative prompt's.
    """

    def prepare(conditions: Conditions, frames: int) -> Prepared:
        if missing == "text":
            conditions = conditions._replace(text=negative.expand_as(conditions.text))
        if missing == "image vector" and conditions.image_vector is not None:
            conditions = conditions._replace(image_vector=torch.zeros_like(conditions.image_vector))
        prepared = unet.prepare(conditions, frames)
        if missing == "concat":
            prepared = prepared._replace(concat=torch.zeros_like(prepared.concat), picture=None)
        if missing == "local tokens":
            tokens = tokens_of(prepared.context).clone()
            tokens[:, local] = 0.0
            prepared = prepared._replace(context=with_tokens(prepared.context, tokens))
        return prepared

    changed = copy.copy(unet)
    vars(changed)["prepare"] = prepare
    return changed


def model_for(model: I2VGenXL, variant: Variant) -> I2VGenXL:
    """The same model under the settings of one row."""
    config, unet = variant.config, model.unet
    if variant.missing:
        negative, first = None, config.clip.text_length if config.use.text else 0
        if variant.missing == "text":
            with plans.on_device(model.offloaded, "clip"):
                negative = model.clip.text(model.clip.tokenize([config.negative_prompt]).to(model.device))
        local = slice(first, first + (config.unet.local_grid // 4) ** 2)
        unet = without(unet, variant.missing, negative, local)
    found = I2VGenXL(config, unet, model.vae, model.clip, model.device)
    found.offloaded = model.offloaded
    return found


# ---------------------------------------------------------------------------------------------------
# Making and comparing


def evaluate(
    model: I2VGenXL,
    plan: Plan,
    *,
    on_clips: Callable[[str, int], None] | None = None,
    crew: Crew = ALONE,
) -> Evaluation:
    """Score the model as it is, then each row of `plan.sweep`; calls `on_clips(row, clips made)`.

    The processes of `crew` share the clips, and each gets the whole result.
    """
    todo, rate = items(plan), speed(model.config)
    tick = on_clips or (lambda row, count: None)
    start = time.perf_counter()
    settings = record(model, plan, rate)  # hashes the weights first, in case the files change meanwhile
    known = references(model, todo, rate, plan.world)
    compared = plan.sweep in COMPARED
    made, sampled = make(
        model,
        todo,
        rate,
        plan.world,
        keep=True,
        keep_all=compared,
        on_clips=lambda count: tick("as set", count),
        crew=crew,
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
            model_for(model, variant),
            todo,
            rate,
            plan.world,
            keep_all=compared,
            on_clips=lambda count, name=name: tick(name, count),
            crew=crew,
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
    world: World = drawing,
    *,
    keep: bool = False,
    keep_all: bool = False,
    on_clips: Callable[[int], None] | None = None,
    crew: Crew = ALONE,
) -> tuple[list[Made], Sampled]:
    """Sample every item in batches of `runtime.batch` and compare -> results, and the UNet calls they took.

    `keep` keeps the frames of the clips in KEPT with the results, `keep_all` those of all clips in
    `Sampled`. The processes of `crew` take the batches in turn.
    """
    size, left, sampled = model.config.runtime.batch, dict(KEPT), Sampled()
    kept = set()  # places in `todo`
    for place, item in enumerate(todo):
        left[item.set] -= 1
        kept |= {place} if keep and left[item.set] >= 0 else set()
    own: dict[int, Made] = {}
    for start in range(crew.rank * size, len(todo), crew.world * size):
        batch = todo[start : start + size]
        truths = [render(item.facts, model.config, rate, world) for item in batch]
        pictures = [Image.fromarray(truth[0]) for truth in truths]
        with counting(model.unet, sampled):
            clips = pipeline.generate(model, pictures, [i.caption for i in batch], [i.seed for i in batch])
        frames = clips.cpu().numpy()
        for place, item, truth, clip in zip(itertools.count(start), batch, truths, frames, strict=False):
            own[place] = compare(item, truth, clip, rate, keep=place in kept, world=world)
            if keep_all:
                sampled.clips[place] = clip
        if on_clips is not None:
            on_clips(len(batch))
    made: dict[int, Made] = {}
    whole = Sampled()
    for theirs, count in crew.gathered((own, sampled)):
        made |= theirs
        whole.add(count)
    return [made[place] for place in range(len(todo))], whole


def render(facts: Facts, config: Config, rate: float, world: World = drawing) -> np.ndarray:
    """The true clip at the size of the settings -> uint8 [f H W 3]."""
    sample = config.sample
    return world.render(facts, width=sample.width, height=sample.height, frames=sample.frames, speed=rate)


@torch.no_grad()
def references(
    model: I2VGenXL, todo: Sequence[Item], rate: float, world: World = drawing
) -> dict[str, list[float]]:
    """PSNR of two baselines on the clips of `clip_psnr`: repeated first frame, and autoencoder alone.

    In a world of pictures also how well the autoencoder alone keeps the things' shapes.
    """
    found: dict[str, list[float]] = {"still_psnr": [], "vae_psnr": []}
    if world is not drawing:
        found["vae_shape_kept"] = []
    for item in todo:
        if item.set != "other" and comparable(item.facts):
            truth = render(item.facts, model.config, rate, world)
            pixels = rearrange(torch.from_numpy(truth).to(model.device), "f h w c -> f c h w") / 127.5 - 1
            latents = model.vae.encode(pixels, None, chunk=model.config.runtime.vae_chunk)
            again = pipeline.decode(model, rearrange(latents, "f c h w -> 1 c f h w"))[0].cpu().numpy()
            found["vae_psnr"].append(psnr(again, truth))
            if world is not drawing and item.facts.things:
                kept = matching.kept(matching.shapes(again, truth[0], item.facts, world, speed=rate))
                found["vae_shape_kept"].append(kept.mean)
            found["still_psnr"].append(psnr(np.broadcast_to(truth[:1], truth.shape), truth))
    return found


def record(model: I2VGenXL, plan: Plan, rate: float) -> dict:
    """Everything needed to reproduce the numbers."""
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
        **({"plugins": plugins.described(config)} if config.plugins else {}),
    }


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every weights file, by file name."""
    return {path.name: records.sha256(path) for path in sorted(folder.glob("*.safetensors"))}
