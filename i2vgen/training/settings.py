"""The settings of a training run: the `train:` section of a YAML file, `train.name=value` on a command line.

`i2vgen.settings.merge.load_config` reads the rest of such a file, which describes the model.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from i2vgen.settings import yaml_text
from i2vgen.settings.config import MAX_COUNT, MAX_FRAMES, MAX_SEED, SHORT, Config
from i2vgen.settings.merge import load_config, refuse_references
from i2vgen.settings.wording import first_line, shortened
from i2vgen.world import drawing

SECTION = "train"
SIZES = ("width", "height", "frames", "fps")  # settings of `sample` that a training uses
WORLD = "world"
MAX_WORKERS = 256
MAX_WORLD_SPEED = 2.0  # times the captioned motion; faster objects would mostly leave the picture
# Settings that do not affect what is learned; they may differ from those of a checkpoint.
FREE = (
    "cache", "save_every", "sample_every", "log_every", "validate_every", "keep", "workers", "encode_chunk",
    "shard", "replicas", "ema_device", "compile",
)  # fmt: skip
# What train.shard=full cannot do, and why.
UNSHARDED = {
    "part": "only the UNet is split; the autoencoder and CLIP fit every device",
    "lora_rank": "adapters are small, and train.frozen=bf16 halves the UNet under them",
    "text_encoder": "only the UNet is split",
}


class Bucket(NamedTuple):
    """The shape of a batch: `batch` clips per process, of `frames` frames at `fps`."""

    frames: int
    fps: int
    batch: int


@dataclass(frozen=True)
class Train:
    """How to train one part. The defaults follow the official recipe where known, without its defects."""

    part: Literal["diffusion", "vae", "clip"] = "diffusion"
    steps: int = 10_000  # optimiser steps
    batch: int = 8  # clips per process and forward pass
    accumulate: int = 1  # forward passes per optimiser step
    learning_rate: float = 3e-5
    # Parameters from the image UNet (`diffusion.inherited_parameters`) are trained more slowly than new ones:
    # "lr" scales their learning rate by `spatial_factor`; "grad" (official) scales their gradients, which
    # Adam almost cancels.
    spatial_scale_mode: Literal["lr", "grad"] = "lr"
    spatial_factor: float = 0.5
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup: int = 10  # linear; the first update has 1/warmup of the rate (official: 0)
    decay: Literal["cosine", "constant"] = "cosine"  # to 0 at `steps`
    clip_norm: float = 1.0  # 0: gradients are not clipped (official)
    ema: float = 0.9999  # decay of the weights' average; 0: no average
    # Decay min(ema, (1 + n) / (10 + n)) at update n, so that a short run forgets its initial weights.
    ema_warmup: bool = True
    offset_noise: float = 0.1
    timestep_power: float = 1.0  # part=diffusion: above 1 draws noisy timesteps more often (official: 1)
    # part=diffusion: weights of a first stage; trains a refiner that brings its clips to the size of
    # `sample`. As in sampling, it starts from them at `refine.noise_level`; higher timesteps are not drawn
    # (training/refiner_clips.py).
    first_stage: str = ""
    first_stage_vae: float = 0.5  # share of clips that pass through the first stage's autoencoder
    first_stage_made: float = 0.0  # share that the first stage generates, at quality=draft
    text_dropout: float = 0.1  # caption -> negative prompt, as at sampling (released configuration: 0)
    image_dropout: float = 0.1  # CLIP image vector -> zeros
    # part=diffusion: also train CLIP's text tower, with the UNet's loss. The tokens of a tower that was only
    # trained to match pictures need not say which object does what.
    text_encoder: bool = False
    word_dropout: float = 0.1  # part=clip: each caption loses words with this probability
    clip_words: float = 0.2  # part=clip: weight of predicting words from tokens; 0: contrastive only
    # part=clip: freeze what a UNet reads (the image tower and all but the end of the text tower) and train
    # the rest to match text and pictures again. Use it after training with `text_encoder`.
    clip_unread: bool = False
    vae_mse: float = 1.0  # part=vae: added to the mean absolute error
    vae_kl: float = 1e-5  # part=vae: weight of the KL divergence per latent number
    # part=vae: false trains the decoder alone. Latents and `vae.scale` stay as they are, so a UNet that was
    # trained on them keeps working.
    vae_encoder: bool = True
    # part=vae: 1 / standard deviation of the latents, or vae.scale as set.
    vae_scale: Literal["measured", "given"] = "measured"
    precision: Literal["auto", "float32", "bf16", "fp16"] = (
        "auto"  # auto: bf16 on CUDA (fp16 before Ampere) and on CPUs with units for it, else float32
    )
    # Above 0: part=diffusion trains only low-rank adapters (LoRA) of this rank on the matching modules.
    lora_rank: int = 0
    lora_modules: tuple[str, ...] = ("*attention*.to_*",)
    # With `lora_rank`: precision of the UNet that is adapted. bf16 halves its memory.
    frozen: Literal["float32", "bf16"] = "float32"
    checkpointing: bool = False  # gradient checkpointing of the UNet: less memory, more time
    compile: bool = False  # torch.compile for each kind of the UNet's blocks, forward and backward
    # AdamW's moments: 8 bytes a parameter, 4 in bfloat16, 2 in eight_bit
    moments: Literal["float32", "bfloat16", "eight_bit"] = "float32"
    ema_device: Literal["same", "cpu"] = "same"  # where the weights' average lies
    ema_every: int = 1  # updates between two of the average, which then moves as far as in all of them
    # part=diffusion under torchrun: full splits weights, gradients, moments and average of the UNet over the
    # processes (training/shards.py); none keeps a copy in each.
    shard: Literal["none", "full"] = "none"
    replicas: int = 1  # shard=full: copies of the UNet, each split over a group of neighbouring processes
    encode_chunk: int = 64  # chunk size in frames for the frozen VAE; smaller where frames are large
    # One entry per bucket. A single entry applies to all buckets; empty means the value of `sample`.
    frame_lengths: tuple[int, ...] = ()
    sample_fps: tuple[int, ...] = ()
    bucket_batch: tuple[int, ...] = ()  # batch per bucket; empty: `batch` for all
    seed: int = 0
    # "world", the procedural clips; a folder of videos with captions.csv or .jsonl; or what `i2vgen prepare`
    # made of one.
    data: str = WORLD
    # A folder: half of the visits mirror a clip, unless one of its captions names a side or a turn ("left",
    # "clockwise").
    flip: bool = False
    # part=diffusion: measure the loss on clips that are not trained on: another folder, a fraction of
    # train.data such as 0.05, or "world". best/ keeps the weights with the lowest.
    validate: str = ""
    validate_every: int = 500  # steps
    validate_clips: int = 64  # at most so many of them are measured
    # Kinds of the world's clips (basic, single, pair, camera), used in rotation; empty: the world's default
    # mixture, which `i2vgen evaluate` uses too.
    kinds: tuple[str, ...] = ()
    # data=world: pictures of things in place of its flat shapes, from a folder of PNG cut-outs with alpha or
    # a colour-emoji font; those kept for evaluation are left out, by name.
    things: str = ""
    backgrounds: str = ""  # with `things`: a folder of photographs, used beside the drawn backgrounds
    # data=world, with use.output=moved: weight of the distance of the UNet's flow from the true one, which
    # the world knows. The loss on noise alone does not say where a misplaced thing belongs.
    flow_weight: float = 0.0
    num_clips: int = 0  # train on this many clips of the world repeatedly; 0: never repeat a clip
    cache: bool = False  # part=diffusion: keep the encoded `num_clips` clips in memory
    workers: int = 0  # processes that draw or decode clips ahead; 0: the main process does it
    save_every: int = 250  # steps between checkpoints, from which a run that was stopped continues
    sample_every: int = 0  # steps between sample strips; 0: none
    log_every: int = 10
    keep: int = 2  # number of checkpoints to keep

    def __post_init__(self):
        counts = ("steps", "batch", "accumulate", "save_every", "log_every", "keep", "encode_chunk")
        for name in (*counts, "ema_every", "replicas", "validate_every", "validate_clips"):
            _check(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("warmup", "num_clips", "workers", "sample_every", "lora_rank"):
            _check(self, name, getattr(self, name) >= 0, "0 or more")
        for name in ("batch", "lora_rank", "workers"):
            most = MAX_WORKERS if name == "workers" else MAX_COUNT
            _check(self, name, getattr(self, name) <= most, f"at most {most}")
        _check(
            self, "learning_rate", 0 < self.learning_rate < 1, "a number above 0 and below 1 (official 3e-5)"
        )
        _check(self, "spatial_factor", 0 <= self.spatial_factor <= 10, "0 to 10 (official 0.5)")
        _check(self, "betas", all(0 <= beta < 1 for beta in self.betas), "two numbers in [0, 1)")
        weights = ("clip_words", "flow_weight", "vae_mse", "vae_kl")
        for name in ("weight_decay", "clip_norm", "offset_noise", *weights):
            _check(self, name, 0 <= getattr(self, name) < float("inf"), "a number of 0 or more")
        _check(self, "timestep_power", 0 < self.timestep_power <= 10, "a number above 0, at most 10")
        _check(self, "ema", 0 <= self.ema < 1, "a number in [0, 1); 0 means none")
        for name in ("first_stage_vae", "first_stage_made", "text_dropout", "image_dropout", "word_dropout"):
            _check(self, name, 0 <= getattr(self, name) <= 1, "a probability")
        _check(self, "seed", 0 <= self.seed <= MAX_SEED, f"0 to {MAX_SEED}")
        _check(self, "data", self.data, f"{WORLD!r} or a folder")
        for kind in self.kinds:
            if kind not in drawing.KINDS:
                raise ValueError(
                    f"train.kinds contains {kind!r}, which is not a kind of the world's clips; choose from "
                    f"{', '.join(drawing.KINDS)}"
                )
        if self.data != WORLD and self.kinds:
            raise ValueError(
                f"train.kinds needs train.data={WORLD}, but train.data is {self.data}; leave it out"
            )
        for name in ("things", "backgrounds"):
            if self.data != WORLD and getattr(self, name):
                raise ValueError(
                    f"train.{name} needs train.data={WORLD}, but train.data is {self.data}; leave it out"
                )
        if self.flow_weight and (self.data != WORLD or self.part != "diffusion" or self.first_stage):
            raise ValueError(
                f"train.flow_weight = {self.flow_weight} needs train.part=diffusion and train.data={WORLD}, "
                "which knows where things move, and no train.first_stage; leave it at 0"
            )
        if self.backgrounds and not self.things:
            raise ValueError(
                f"train.backgrounds = {self.backgrounds} are for pictures of things; give train.things too"
            )
        if self.data != WORLD and self.num_clips:
            raise ValueError(
                f"train.num_clips = {self.num_clips} needs train.data={WORLD}, but train.data is "
                f"{self.data}; leave it at 0"
            )
        if self.data == WORLD and self.flip:
            raise ValueError(
                f"train.flip is for folders of videos; the clips of train.data={WORLD} go to either side "
                "anyway: leave it out"
            )
        self._check_validation()
        if self.cache and (self.part != "diffusion" or not self.num_clips):
            raise ValueError(
                "train.cache keeps the latents of train.num_clips clips of the world and needs "
                f"train.part=diffusion; here train.part is {self.part} and train.num_clips {self.num_clips}"
            )
        largest = max(self.bucket_batch or (self.batch,))
        if self.cache and self.num_clips % largest:
            raise ValueError(
                f"train.cache keeps whole batches, but train.num_clips = {self.num_clips} is not a multiple "
                f"of the largest batch, {largest}"
            )
        for name in ("checkpointing", "compile", "lora_rank", "first_stage", "text_encoder", "validate"):
            if self.part != "diffusion" and getattr(self, name):
                raise ValueError(
                    f"train.{name} needs train.part=diffusion, but train.part is {self.part}; leave it out"
                )
        if self.first_stage_vae + self.first_stage_made > 1:
            raise ValueError(
                f"train.first_stage_vae = {self.first_stage_vae} and train.first_stage_made = "
                f"{self.first_stage_made} are shares of all clips; their sum must be at most 1"
            )
        if not self.vae_encoder and self.part != "vae":
            raise ValueError(
                f"train.vae_encoder needs train.part=vae, but train.part is {self.part}; leave it out"
            )
        if self.clip_unread and self.part != "clip":
            raise ValueError(
                f"train.clip_unread needs train.part=clip, but train.part is {self.part}; leave it out"
            )
        if self.text_encoder and self.lora_rank:
            raise ValueError(
                f"train.lora_rank = {self.lora_rank} trains only adapters of the UNet; leave "
                "train.text_encoder out"
            )
        if self.frozen != "float32" and not self.lora_rank:
            raise ValueError(
                f"train.frozen = {self.frozen} is for a UNet under adapters, but train.lora_rank is 0; leave "
                "it out"
            )
        for name in ("ema_device", "ema_every"):
            if not self.ema and getattr(self, name) != getattr(type(self), name):
                raise ValueError(
                    f"train.{name} = {getattr(self, name)} is for the average, but train.ema is 0; leave it "
                    "out"
                )
        if self.shard == "full":
            for name, why in UNSHARDED.items():
                if getattr(self, name) != getattr(type(self), name):
                    raise ValueError(
                        f"train.shard=full does not go with train.{name}={getattr(self, name)}: {why}"
                    )
        elif self.replicas != 1:
            raise ValueError(
                f"train.replicas = {self.replicas} needs train.shard=full; without it every process is one"
            )
        if self.first_stage and self.sample_every:
            raise ValueError(
                f"train.sample_every = {self.sample_every} samples from pure noise, but a refiner "
                f"(train.first_stage = {self.first_stage}) refines clips; leave it at 0 and use "
                "`i2vgen refine-gain`"
            )

    def _check_validation(self) -> None:
        if self.validate == WORLD and self.data != WORLD:
            raise ValueError(
                f"train.validate={WORLD} needs train.data={WORLD}, but train.data is {self.data}; give a "
                "folder, or a fraction such as 0.05"
            )
        if fraction(self.validate) is not None and self.data == WORLD:
            raise ValueError(
                f"train.validate = {self.validate} is a fraction, of which the endless train.data={WORLD} "
                f"has none; write train.validate={WORLD} for train.validate_clips clips that are never "
                "trained on"
            )


def fraction(text: str) -> float | None:
    """What `train.validate` holds out, if it is a fraction; ValueError for a number that is none."""
    try:
        value = float(text)
    except ValueError:
        return None
    if not 0 < value < 1:
        raise ValueError(f"train.validate is {text}; give a fraction between 0 and 1, or a folder")
    return value


def _check(train: Train, name: str, right: Any, wanted: str) -> None:
    if not right:
        raise ValueError(f"train.{name} is {getattr(train, name)!r}; give {wanted}")


def buckets(config: Config, train: Train) -> list[Bucket]:
    """The buckets of a run; ValueError if the fields contradict each other or a bucket is impossible."""
    lengths = train.frame_lengths or (config.sample.frames,)
    rates = train.sample_fps or (config.sample.fps,)
    count = max(len(lengths), len(rates))
    if {len(lengths), len(rates)} - {1, count}:
        raise ValueError(
            f"train.frame_lengths has {len(lengths)} entries and train.sample_fps {len(rates)}; give one of "
            "each per bucket, or one entry for all"
        )
    if len(train.bucket_batch) not in (0, count):
        raise ValueError(
            f"train.bucket_batch has {len(train.bucket_batch)} entries for {count} buckets "
            "(train.frame_lengths with train.sample_fps); give one per bucket"
        )
    lengths = lengths * count if len(lengths) == 1 else lengths
    rates = rates * count if len(rates) == 1 else rates
    batches = train.bucket_batch or (train.batch,) * count
    found = [Bucket(*bucket) for bucket in zip(lengths, rates, batches, strict=True)]
    for bucket in found:
        where = f"the bucket train.frame_lengths = {bucket.frames} with train.sample_fps = {bucket.fps}"
        if not 1 <= bucket.frames <= MAX_FRAMES or bucket.fps < 1 or bucket.batch < 1:
            raise ValueError(
                f"{where}, batch {bucket.batch}, is impossible; give 1 to {MAX_FRAMES} frames, fps and batch "
                "of at least 1"
            )
        if train.data == WORLD and world_speed(config, bucket) > MAX_WORLD_SPEED:
            raise ValueError(
                f"{where} shows {world_speed(config, bucket):.1f} times the motion of sample.frames = "
                f"{config.sample.frames} at sample.fps = {config.sample.fps}, so objects leave the picture; "
                f"the limit is {MAX_WORLD_SPEED:g}: give fewer frames or a higher fps"
            )
        if train.part == "clip" and bucket.batch < 2:
            raise ValueError(
                f"{where} has batch {bucket.batch}, but train.part=clip contrasts the clips of a batch; give "
                "at least 2"
            )
    return found


def world_speed(config: Config, bucket: Bucket) -> float:
    """Motion of a bucket relative to the captioned motion; 1 for the length and rate of `sample`."""
    if bucket.frames == 1 or config.sample.frames == 1:
        return 0.0 if bucket.frames == 1 else config.sample.fps / bucket.fps
    seconds = (bucket.frames - 1) / bucket.fps
    return seconds / ((config.sample.frames - 1) / config.sample.fps)


def load_settings(file: str | Path | None, overrides: Sequence[str] = ()) -> tuple[Config, Train]:
    """Read a training YAML file and `name=value` overrides -> settings of the model and of the training.

    ValueError for unknown names, wrong types and impossible combinations.
    """
    own = [word for word in overrides if word.startswith(f"{SECTION}.")]
    others = [word for word in overrides if not word.startswith(f"{SECTION}.")]
    refuse_bare("the command line", [word.partition("=")[0] for word in others])
    if file is None:
        config, section = load_config(None, others), {}
    else:
        config, section = _load_file(Path(file), others)
    layers = [(str(file), section), ("the command line", _parse(own))]
    train = _merge(layers)
    buckets(config, train)
    return config, train


def refuse_bare(source: str, names: Iterable[str]) -> None:
    """ValueError for a short name that looks like a training setting, but is one of sampling or none."""
    own = {field.name for field in dataclasses.fields(Train)}
    for name in names:
        home = SHORT.get(name, "")
        if name in own:
            other = f", or {home}= if you mean that one" if home else ""
            raise ValueError(f"{source}: {name}= is no training setting; write {SECTION}.{name}={other}")
        if home.startswith("sample.") and name not in SIZES:
            raise ValueError(
                f"{source}: {name}= is a setting of sampling; write {home}=, for the samples of this run "
                "and the settings stored with its weights"
            )


def from_dict(values: dict[str, Any]) -> Train:
    """The inverse of `dataclasses.asdict`."""
    return _merge([("the stored settings", values)])


def _load_file(file: Path, overrides: Sequence[str]) -> tuple[Config, dict[str, Any]]:
    """Cut the `train:` section out of the text and let `load_config` read the rest."""
    if not file.is_file():
        raise ValueError(f"configuration file {file} does not exist")
    text = yaml_text.read_text(file)
    try:
        section = yaml_text.parse(text)
    except ValueError as error:
        raise ValueError(f"{file} is not a readable YAML file: {error}") from error
    cut = "".join(_without_section(text))
    refuse_bare(str(file), section if isinstance(section, dict) else ())
    section = section.get(SECTION) if isinstance(section, dict) else None
    with tempfile.TemporaryDirectory() as folder:
        rest = Path(folder) / file.name
        rest.write_text(cut, encoding="utf-8")
        try:
            config = load_config(rest, overrides)
        except ValueError as error:
            raise ValueError(str(error).replace(str(rest), str(file))) from error
    if section is not None and not isinstance(section, dict):
        raise ValueError(f"{file}: {SECTION} is a group of settings; write `{SECTION}: {{name: value}}`")
    return config, section or {}


def _without_section(text: str) -> Iterator[str]:
    root, position = yaml.compose(text, yaml.SafeLoader), 0
    if isinstance(root, yaml.MappingNode):
        for key, value in root.value:
            if key.value == SECTION:
                yield text[position : key.start_mark.index]
                position = value.end_mark.index
    yield text[position:]


def _parse(overrides: Sequence[str]) -> dict[str, Any]:
    values = {}
    for word in overrides:
        name, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"{word!r} is not a setting; write name=value, for example train.steps=20")
        try:
            values[name.removeprefix(f"{SECTION}.")] = yaml_text.parse(value)
        except ValueError as error:
            raise ValueError(f"{shortened(word)}: the value is not valid YAML: {error}") from error
    return values


def _merge(layers: Sequence[tuple[str, dict[str, Any]]]) -> Train:
    fields = {field.name: str(field.type) for field in dataclasses.fields(Train)}
    merged = OmegaConf.structured(Train)
    for source, values in layers:
        refuse_references({SECTION: values}, source)
        for name, value in values.items():
            if name not in fields:
                near = difflib.get_close_matches(str(name), fields, n=3, cutoff=0.5) or list(fields)
                raise ValueError(
                    f"{source}: there is no setting train.{name}; did you mean "
                    f"{', '.join(f'train.{n}' for n in near)}?"
                )
            if fields[name].startswith("tuple") and not isinstance(value, list | tuple):
                value = [value]
            if isinstance(value, str) and value.startswith("~/"):
                value = os.path.expanduser(value)
            if fields[name] == "float" and isinstance(value, str):
                value = _float(value)  # YAML reads 1e-4 as a string
            try:
                merged = OmegaConf.merge(merged, {name: value})
            except (OmegaConfBaseException, TypeError) as error:
                given = shortened(value)
                raise ValueError(f"{source}: train.{name} is {given}, expected {fields[name]}") from error
    try:
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:  # a ValueError of __post_init__ passes through unchanged
        raise ValueError(first_line(error)) from error


def _float(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
