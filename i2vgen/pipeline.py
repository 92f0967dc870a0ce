"""The road from a picture and a sentence to a video, and the record of the parts it needs.

    image, prompt - images - encoders, vae.encode - unet.prepare - ddim(unet) - vae.decode - video

Axes: b batch, f frames, c channels, h w latent rows and columns.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from i2vgen.adapt import lora
from i2vgen.diffusion.noise import SampleNoise, draw_all
from i2vgen.diffusion.sampler import (
    Noise,
    OnStep,
    Predict,
    ancestral,
    between,
    ddim,
    ddim_invert,
    guided_pair,
)
from i2vgen.diffusion.schedule import Schedule, timesteps
from i2vgen.diffusion.solvers import SOLVERS
from i2vgen.fast import compiled, deep_cache, machine, runtime, savings
from i2vgen.fast import unet as fast_unet
from i2vgen.fast.deep_cache import DeepCache
from i2vgen.files import checkpoint, given, images, records, video
from i2vgen.memory import plans
from i2vgen.memory.offload import OffloadedPart
from i2vgen.model.clip import ClipEncoders
from i2vgen.model.conditioning import Conditions, Prepared, Unconditional
from i2vgen.model.unet import UNet
from i2vgen.model.vae import AutoencoderKL
from i2vgen.settings.config import RANDOM, SHIPPED, Config
from i2vgen.settings.merge import load_config, read_stored_settings

FAR = 1.5  # times the size or the frames of training, up or down
BUILT = ("use", "unet", "vae", "clip", "schedule", "runtime")  # settings of a model that loading reads


class Sampler(Protocol):
    """What `generate` asks of a sampler: noise [b c f h w] to latents [b c f h w], `noise` drawn like x."""

    def __call__(
        self,
        predict: Predict,
        x: Tensor,
        schedule: Schedule,
        *,
        steps: int,
        noise: Noise,
        on_step: OnStep | None,
    ) -> Tensor: ...


@dataclass
class Video:
    """A finished clip: `frames` uint8 [f h w 3], and everything needed to make it again."""

    frames: np.ndarray
    image: str
    prompt: str
    seed: int
    config: Config
    fps: float | None = None  # of the file; None: as the settings say
    facts: dict = field(default_factory=dict)  # entries of the record that the settings do not hold

    def save(self, path: str | Path) -> Path:
        """Write the clip by the ending of `path` (.mp4, .gif, .webp, .png, else PNGs) and a JSON beside it.

        The JSON, clip.mp4.json, holds all settings, the seed, the versions that matter, the SHA-256 of file
        and inputs, and whether the settings alone remake the clip. ValueError, before anything is written,
        if it would replace a JSON file that is no such record.
        """
        save = self.config.save
        fps = save.fps if self.fps is None else self.fps
        path = given.path(path)
        records.check(path)
        path = video.save(self.frames, path, fps=fps, quality=save.quality, enlarge=save.enlarge)
        frames, height, width, _ = self.frames.shape
        records.write(
            path,
            records.settings_of(self.config, self.image, self.prompt, self.seed, path),
            size=(save.enlarge * width, save.enlarge * height),
            frames=frames,
            fps=fps,
            facts=self.facts,
        )
        return path


class I2VGenXL:
    """The four parts and their settings. Call it with a picture and a prompt: it returns a `Video`."""

    def __init__(
        self, config: Config, unet: UNet, vae: AutoencoderKL, clip: ClipEncoders, device: torch.device
    ):
        self._config, self.unet, self.vae, self.clip, self.device = config, unet, vae, clip, device
        self.schedule = make_schedule(config)
        self.parts = {"unet": unet, "vae": vae, "clip": clip}
        self.offloaded: dict[str, OffloadedPart] = {}  # parts that wait on the CPU until they are needed

    @property
    def config(self) -> Config:
        return self._config

    @config.setter
    def config(self, config: Config) -> None:
        """ValueError for a change of what was built when the model was loaded."""
        for name in BUILT:
            if getattr(config, name) != getattr(self._config, name):
                raise ValueError(
                    f"{name} was read when the model was loaded, and a change would have no effect now; load "
                    "the model with it"
                )
        self._config = config

    def __call__(
        self,
        image: given.Picture,
        prompt: str,
        *,
        seed: int | None = None,
        on_step: OnStep | None = None,
    ) -> Video:
        """One clip. `seed` defaults to the first of `sample.seed`; `on_step` is told of every step.

        `image` is a path, a PIL picture, or an array [h w 3] of uint8 or of floats from 0 to 1.
        """
        seed = self.config.sample.seed[0] if seed is None else seed
        return self.generate([image], [prompt], [seed], on_step=on_step)[0]

    def generate(
        self,
        pictures: Sequence[given.Picture] | given.Picture,
        prompts: Sequence[str] | str,
        seeds: Sequence[int] | int,
        *,
        noise: Tensor | None = None,
        sampler: Sampler | None = None,
        on_step: OnStep | None = None,
    ) -> list[Video]:
        """One clip per (picture, prompt, seed), sampled as one batch; each depends on its own seed only.

        A single picture, prompt or seed instead of a list serves all clips.
        `noise` [b c f h w] replaces the initial noise that the seeds would draw, e.g. by that of `invert`.
        `sampler` replaces the one that the settings name, e.g. by `schedulers.from_diffusers`.
        """
        config = self.config
        pictures, prompts, seeds = given.paired(pictures, prompts, seeds)
        dataclasses.replace(config.sample, seed=tuple(seeds))  # refuses a seed out of range
        given.functions(sampler=sampler, on_step=on_step)
        if noise is not None:
            noise = given.noise(noise, (len(seeds), *latent_shape(config)))
        opened = [open_picture(picture, config) for picture in pictures]
        facts = [
            given.facts(*both, None if noise is None else noise[i], sampler)
            for i, both in enumerate(zip(pictures, opened, strict=True))
        ]
        for one in facts:
            if sampler is None:
                one["steps"] = steps_made(config)
            if any(isinstance(module, lora.LowRank) for module in self.unet.modules()):
                one |= {"reproducible": False, "changed": "adapters are attached to the UNet"}
        try:
            frames = generate(self, opened, prompts, seeds, noise=noise, sampler=sampler, on_step=on_step)
        except FloatingPointError as error:  # it names the step
            if all(p.dtype != torch.float16 for p in self.unet.parameters()):
                raise
            raise FloatingPointError(
                f"{error}; the UNet is in float16, which ends at 65504: runtime.dtype=bfloat16 does not"
            ) from None
        if config.save.grey_last_frame == "drop":
            clips = [video.drop_grey_last_frame(clip) for clip in frames]
        else:
            clips = list(frames)
            for clip in clips:
                if len(video.drop_grey_last_frame(clip)) < len(clip):
                    warnings.warn(
                        "the last frame is mostly mid-grey; the official code would drop it "
                        "(save.grey_last_frame=drop)",
                        stacklevel=2,
                    )
        names = [os.fsdecode(p) if isinstance(p, str | os.PathLike) else given.UNNAMED for p in pictures]
        return [Video(clip.cpu().numpy(), *inputs, config, facts=one)
                for clip, *inputs, one in zip(clips, names, prompts, seeds, facts, strict=True)]  # fmt: skip


@torch.no_grad()
def generate(
    model: I2VGenXL,
    pictures: Sequence[Image.Image],
    prompts: Sequence[str],
    seeds: Sequence[int | torch.Generator],
    *,
    noise: Tensor | None = None,
    sampler: Sampler | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """RGB pictures, prompts and seeds, b of each -> uint8 frames [b f H W 3]: the whole road.

    `noise` [b c f h w] replaces the initial noise that the seeds would draw, `sampler` the settings' own.
    """
    config, sample = model.config, model.config.sample
    noises = [SampleNoise(seed) for seed in seeds]
    shape = latent_shape(config)
    latent = (shape[0], *shape[2:])

    # A network that never sees the first-frame latent draws nothing for it, as v1 does not.
    posterior = draw_all(noises, latent) if sees_latent(config) else None
    cond, uncond = encode(model, pictures, prompts, posterior)
    drawn = draw_all(noises, shape)
    if sample.noise_offset:
        drawn = drawn + sample.noise_offset * draw_all(noises, (*shape[:2], 1, 1))
    start = (drawn if noise is None else given.noise(noise, drawn.shape)).to(model.device)

    def step_noise(x: Tensor) -> Tensor:
        return draw_all(noises, tuple(x.shape[1:])).to(x)

    with plans.on_device(model.offloaded, "unet"):
        latents = (sampler or named_sampler(config))(
            network(model, cond, uncond),
            start,
            model.schedule,
            steps=sample.steps,
            noise=step_noise,
            on_step=on_step,
        )
    return decode(model, latents)


def latent_shape(config: Config) -> tuple[int, int, int, int]:
    """Of one clip: c f h w."""
    return config.vae.embed_dim, config.sample.frames, *config.latent_size


def steps_made(config: Config) -> int:
    """The number of steps, which the official spacing rounds up: 4 for 3, 500 for 400."""
    sample, count = config.sample, config.schedule.num_timesteps
    return count if sample.sampler == "ancestral" else len(timesteps(count, sample.steps, sample.spacing))


def named_sampler(config: Config) -> Sampler:
    """The sampler that the settings name, with their options."""
    sample = config.sample
    if sample.sampler == "ancestral":
        return lambda *inputs, steps, noise, on_step: ancestral(*inputs, noise=noise, on_step=on_step)
    if sample.sampler != "ddim":
        solver = SOLVERS[sample.sampler]
        return functools.partial(solver, spacing=sample.spacing, final_alpha=sample.final_alpha)
    return functools.partial(
        ddim,
        spacing=sample.spacing,
        eta=sample.eta,
        eps_form=sample.eps_form,
        final_alpha=sample.final_alpha,
    )


def network(model: I2VGenXL, cond: Conditions, uncond: Conditions) -> Predict:
    """The UNet under guidance as the samplers want it; its conditions are prepared here, once."""
    predict = guided_network(model, cond, uncond)
    return compiled.Recorded(predict, model.unet) if model.config.runtime.cuda_graph else predict


def guided_network(model: I2VGenXL, cond: Conditions, uncond: Conditions) -> Predict:
    """The UNet under classifier-free guidance in the timesteps of `sample.guidance_interval`"""
    sample, unet, under = model.config.sample, model.unet, reader(model)
    positive = fast_unet.projected(unet, unet.prepare(cond, sample.frames))
    if sample.guidance == 1.0:
        return under(unet, positive)
    negative = fast_unet.projected(unet, unet.prepare(uncond, sample.frames))
    predict = guided_pair(
        fast_unet.both_branches(unet, positive, negative, under),
        sample.guidance,
        precision=sample.guidance_precision,
        rescale=sample.guidance_rescale,
    )
    low, high = (part * model.schedule.num_timesteps for part in sample.guidance_interval)
    if low <= 0 and high >= model.schedule.num_timesteps - 1:
        return predict
    return between(low, high, predict, under(unet, positive))


def reader(model: I2VGenXL) -> Callable[[nn.Module, Prepared], Predict]:
    """-> a function of UNet and prepared conditions: the network under them, with DeepCache if it is on."""
    sample = model.config.sample
    if sample.deep_cache <= 1:
        return fast_unet.under
    deep_cache.check(model.unet)
    return DeepCache(sample.deep_cache, sample.deep_cache_blocks).over


@torch.no_grad()
def invert(
    model: I2VGenXL,
    frames: np.ndarray | Tensor,
    picture: given.Picture,
    prompt: str,
    *,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> Tensor:
    """A clip, uint8 [f H W 3], of the settings' size -> the noise [1 c f h w] that DDIM turns into it.

    `seed` draws the posterior noise of the conditioning picture. Give the result to `I2VGenXL.generate`.
    """
    sample = model.config.sample
    frames = torch.as_tensor(frames)
    if frames.shape != (sample.frames, sample.height, sample.width, 3) or frames.dtype != torch.uint8:
        raise ValueError(
            f"the clip has shape {tuple(frames.shape)} of {frames.dtype}; give uint8, and frames, height, "
            f"width = {sample.frames}, {sample.height}, {sample.width} as the settings say"
        )
    draws = SampleNoise(seed)
    latent = (model.config.vae.embed_dim, *model.config.latent_size)
    opened = open_picture(picture, model.config)
    cond, uncond = encode(model, [opened], [given.prompt(prompt)], draws.draw(latent))
    pixels = rearrange(frames.to(model.device), "f h w c -> f c h w") / 127.5 - 1
    with plans.on_device(model.offloaded, "vae"):
        chunk = model.config.runtime.vae_chunk
        latents = finite(model.vae, lambda vae: vae.encode(pixels, None, chunk=chunk))
    with plans.on_device(model.offloaded, "unet"):
        return ddim_invert(
            network(model, cond, uncond),
            rearrange(latents, "f c h w -> 1 c f h w"),
            model.schedule,
            steps=sample.steps,
            eps_form=sample.eps_form,
            on_step=on_step,
        )


def encode(
    model: I2VGenXL,
    pictures: Sequence[Image.Image],
    prompts: Sequence[str],
    posterior_noise: Tensor | None,
) -> tuple[Conditions, Conditions]:
    """Pictures and prompts, b of each, posterior noise [b c h w] -> conditions with and without the prompt.

    Without: the negative prompt and a zero image vector; the first-frame latent and fps stay, as in training.
    """
    config, sample, device = model.config, model.config.sample, model.device
    views = [prepare_views(picture, config) for picture in pictures]
    latent = None
    if sees_latent(config):
        pixels = torch.stack([view.pixels for view in views]).to(device)
        noise = posterior_noise.to(device) if sample.posterior == "sample" else None
        with plans.on_device(model.offloaded, "vae"):
            latent = finite(model.vae, lambda vae: vae.encode(pixels, noise, chunk=1))
    fps = torch.full((len(pictures),), sample.fps, device=device)

    text, vector = (None, None), (None, None)
    with plans.on_device(model.offloaded, "clip"):
        if config.use.text:
            for prompt in prompts:
                model.clip.tell_unknown_words(prompt)
            texts = [*prompts, config.negative_prompt]
            tokens = model.clip.text(model.clip.tokenize(texts).to(device))
            text = tokens[:-1], tokens[-1:].expand(len(prompts), -1, -1)
        if config.use.global_tokens:
            clip_pixels = torch.stack([view.clip_pixels for view in views]).to(device)
            vector_cond = model.clip.image(clip_pixels)
            vector = vector_cond, torch.zeros_like(vector_cond) if sample.negative_image == "zeros" else None
    return Conditions(text[0], vector[0], latent, fps), Unconditional(text[1], vector[1], latent, fps)


def sees_latent(config: Config) -> bool:
    return config.use.concat or config.use.local_tokens


def prepare_views(picture: Image.Image, config: Config) -> images.Pictures:
    """RGB picture -> what the VAE and what CLIP sees of it under these settings."""
    return images.prepare(
        picture,
        width=config.sample.width,
        height=config.sample.height,
        clip_size=config.clip.image_size,
        clip_mean=config.clip.image_mean,
        clip_std=config.clip.image_std,
        mode=config.preprocess.crop,
    )


def decode(model: I2VGenXL, latents: Tensor) -> Tensor:
    """Latents [b c f h w] -> uint8 frames [b f H W 3]."""
    b, config, done = latents.shape[0], model.config, []
    frames = rearrange(latents, "b c f h w -> (b f) c h w")
    chunk = config.runtime.vae_chunk
    with plans.on_device(model.offloaded, "vae"):
        for part in frames.split(chunk):
            pixels = finite(model.vae, lambda vae, part=part: vae.decode(part))
            pixels = rearrange(pixels.float(), "n c h w -> c n h w")
            done.append(video.to_uint8(pixels, rounding=config.save.rounding))
    return rearrange(torch.cat(done), "(b f) h w c -> b f h w c", b=b)


def finite(vae: AutoencoderKL, compute: Callable[[AutoencoderKL], Tensor]) -> Tensor:
    """`compute` by the autoencoder; in float32 once more where float16 overflows, never a black frame."""
    out = compute(vae)
    if vae.dtype != torch.float16 or bool(torch.isfinite(out).all()):
        return out
    warnings.warn(
        "the autoencoder overflows in float16; computed again in float32 (runtime.vae_dtype=bfloat16 or "
        "float32 do not overflow)",
        stacklevel=2,
    )
    return compute(copy.deepcopy(vae).float())


def load(
    weights: str | Path = "",
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> I2VGenXL:
    """Settings and weights -> a model ready to be called.

    `weights` is a native weights folder or "random", by default the shipped small model; `config` a YAML
    file; `overrides` are what a command line takes, e.g. `["steps=20", "device=cuda"]`. ValueError for
    settings, weights or memory that cannot work.
    """
    if isinstance(weights, Config) or isinstance(config, Config):
        raise ValueError(
            "load takes a weights folder and a YAML file; for a Config: pipeline.load_parts(config)"
        )
    if not isinstance(config, str | os.PathLike | None):
        raise ValueError(f"the config is a {type(config).__name__}; give the path of a YAML file")
    config = None if config is None else os.path.expanduser(config)
    literal = {"weights": str(weights)} if weights else {}
    return load_parts(load_config(config, overrides, default_weights=SHIPPED, **literal))


def load_parts(config: Config, tell: Callable[[plans.Estimate], None] | None = None) -> I2VGenXL:
    """Check weights and memory first, then load UNet, VAE and CLIP onto the device.

    `tell` hears of the memory plan and what it takes before anything is loaded.
    """
    if not config.weights:
        raise ValueError("no weights given; name a native weights folder with weights=, or weights=random")
    if config.weights == RANDOM:
        warnings.warn(
            "weights=random: the model is untrained, its output is NOISE and shows only that the road works",
            stacklevel=3,
        )
    elif missing := checkpoint.missing_parts(config.weights):
        raise ValueError(
            f"weights folder {config.weights} lacks {', '.join(missing)}, which generation needs"
        )
    else:
        note_other_size(config)
    refuse_unsampleable(config)  # impossible betas too, before anything is loaded
    if config.adapter:
        lora.read(config.adapter)  # a wrong folder is told before gigabytes are read
    device = runtime.device(config.runtime)
    machine.refuse_missing(config, device)
    config, estimate = plans.choose(config)
    if tell is not None:
        tell(estimate)
    place = "cpu" if config.runtime.offload != "none" else device
    unet, vae, clip = (
        checkpoint.load(part, config, device=place, dtype=plans.dtype(part, config.runtime))
        for part in checkpoint.PARTS
    )
    if config.adapter:
        lora.load(unet, config.adapter, scale=config.sample.adapter_scale).merge()
    return assemble(config, unet, vae, clip, device)


def assemble(
    config: Config, unet: UNet, vae: AutoencoderKL, clip: ClipEncoders, device: torch.device
) -> I2VGenXL:
    """Loaded parts (on the CPU where something is to wait there) -> a model as `runtime` wants it.

    A plan for little memory must have been settled (`plans.choose`).
    """
    plans.prepare_unet(unet, config, device)
    savings.apply(vae, config.runtime, device)
    model = I2VGenXL(config, unet, vae, clip, device)
    model.offloaded = plans.offloaded_parts(model.parts, config, device)
    return model


def refuse_unsampleable(config: Config) -> None:
    """ValueError for settings that build a network but cannot sample with it."""
    if config.unet.out_channels != config.vae.embed_dim:
        raise ValueError(
            f"unet.out_channels is {config.unet.out_channels} but vae.embed_dim is {config.vae.embed_dim}; "
            "sampling needs one prediction per latent channel"
        )
    if config.vae.channels != 3:
        raise ValueError(f"vae.channels is {config.vae.channels}; pictures here have 3")
    sample, schedule = config.sample, make_schedule(config)
    divides = sample.eps_form == "recovered" or config.schedule.prediction == "eps"
    visited = timesteps(schedule.num_timesteps, sample.steps, sample.spacing)
    if divides and sample.sampler != "ancestral" and schedule.abar[visited[0]] == 0:
        raise ValueError(
            f"sample.steps={sample.steps} with sample.spacing={sample.spacing} visits t = {visited[0]}, "
            "where no signal is left: sample.eps_form=recovered and schedule.prediction=eps divide by zero "
            "there, as the official code does; use sample.eps_form=direct with v, or another step count"
        )


def note_other_size(config: Config) -> None:
    """A note if size or frames are far from those that the weights store, which they were trained with."""
    stored = read_stored_settings(config.weights).get("sample", {})
    sample = config.sample
    pairs = [(getattr(sample, name), stored.get(name)) for name in ("frames", "width", "height")]
    if any(trained and max(now / trained, trained / now) >= FAR for now, trained in pairs):
        frames, width, height = (trained or now for now, trained in pairs)
        warnings.warn(
            f"{sample.frames} frames of {sample.width} x {sample.height} pixels are far from the {frames} of "
            f"{width} x {height} that these weights were trained with; expect worse clips",
            stacklevel=3,
        )


def make_schedule(config: Config) -> Schedule:
    if config.schedule.kind == "logsnr_cosine":
        raise ValueError(
            f"schedule.kind is logsnr_cosine, a refiner's: give {config.weights or 'its folder'} as "
            "refine_weights=, and the weights of a first stage as weights= or a clip as video="
        )
    return Schedule.of(config.schedule)


def open_picture(picture: given.Picture, config: Config) -> Image.Image:
    """A path, a PIL picture or an array -> RGB, as `preprocess` says."""
    return given.picture(picture, exif=config.preprocess.exif, alpha=config.preprocess.alpha)
