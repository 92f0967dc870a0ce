"""The road from a picture and a sentence to a video, and the record of the parts it needs.

    image, prompt - images - encoders, vae.encode - unet.prepare - ddim(unet) - vae.decode - video

Axes: b batch, f frames, c channels, h w latent rows and columns.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from i2vgen.adapt import lora, lora_files
from i2vgen.diffusion.noise import SampleNoise, draw_all
from i2vgen.diffusion.sampler import (
    Noise,
    OnStep,
    Predict,
    StepInfo,
    ancestral,
    between,
    ddim,
    ddim_invert,
    guided_pair,
)
from i2vgen.diffusion.schedule import Schedule, timesteps
from i2vgen.diffusion.solvers import SOLVERS
from i2vgen.fast import compiled, deep_cache, machine, parallel, runtime
from i2vgen.fast import unet as fast_unet
from i2vgen.fast.deep_cache import DeepCache
from i2vgen.files import checkpoint, given, images, plugins, video
from i2vgen.files.clip import OUTPUTS, Video
from i2vgen.memory import plans
from i2vgen.memory.offload import OffloadedPart
from i2vgen.model.clip import ClipEncoders
from i2vgen.model.conditioning import Conditions, Encoded, Prepared, Unconditional
from i2vgen.model.unet import UNet
from i2vgen.model.vae import AutoencoderKL
from i2vgen.settings import merge, shipped
from i2vgen.settings.config import RANDOM, SETTINGS_FILE, Config, Runtime
from i2vgen.settings.merge import load_config, read_stored_settings

NARROW = 1 / 3  # no clip is suggested that is narrower or flatter
CROPPED = 0.2  # share of a picture that may be cut off without a note
LATE = 0.25  # share of the timesteps; steps that begin below it leave nearly all of the noise
FAR = 1.5  # times the size or the frames of training, up or down
BUILT = ("use", "unet", "vae", "clip", "schedule", "runtime")  # settings of a model that loading reads


Output = Literal["video", "frames", "pil", "tensor", "latents"]


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


class I2VGenXL:
    """The four parts and their settings. Call it with a picture and a prompt: it returns a `Video`."""

    def __init__(
        self,
        config: Config,
        unet: UNet,
        vae: AutoencoderKL,
        clip: ClipEncoders,
        device: torch.device,
        *,
        asked: Runtime | None = None,
    ):
        """`config` as `plans.choose` settled it; `asked` is its `runtime` before that."""
        self._config, self.unet, self.vae, self.clip, self.device = config, unet, vae, clip, device
        self.schedule = make_schedule(config)
        self.parts = {"unet": unet, "vae": vae, "clip": clip}
        self.offloaded: dict[str, OffloadedPart] = {}  # parts that wait on the CPU until they are needed
        self.plan = plans.Plan(config, asked or config.runtime)
        self.adapters: dict[str, lora.Adapters] = {}  # attached by `lora`, by their folder or file
        self.ranks: parallel.Ranks | None = None  # the processes that compute one clip together

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
        image: given.Picture | Sequence[given.Picture] | None = None,
        prompt: str | Sequence[str] | None = None,
        *,
        seed: int | Sequence[int] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        width: int | None = None,
        height: int | None = None,
        frames: int | None = None,
        fps: int | None = None,
        sampler: str | Sampler | None = None,
        conditions: Encoded | None = None,
        noise: Tensor | np.ndarray | None = None,
        output: Output = "video",
        on_step: OnStep | None = None,
        progress: bool = True,
        **settings: object,
    ) -> Any:
        """One clip, or, where picture, prompt or seed is a list, a list of clips sampled as one batch.

        `image`: a path, a PIL picture, or an array [h w 3] of uint8 or of floats from 0 to 1.
        `seed`: by default the first of `sample.seed`. A clip depends on its own seed only.
        `steps`, `guidance`, ... `settings`: any of the `sample` settings (settings/config.py), for this call
        alone, checked as at loading and recorded in the clip. What is None stays as the model has it.
        `sampler`: a name, a function like those of `diffusion`, or a scheduler of diffusers.
        `conditions`: of `encode`, instead of picture and prompt.
        `noise` [c f h w], or [b c f h w]: replaces the initial noise that the seeds would draw.
        `output`: "video" (a `Video`), "frames" (uint8 [f h w 3]), "pil" (a list of pictures), "tensor"
        (float32 [f 3 h w] from 0 to 1, on the device), "latents" (float [c f h w], on the device).
        `on_step`: is given a `StepInfo` after every step. `progress`: a bar, in terminals and notebooks.

        ValueError, before any computation, for what cannot work.
        """
        merge.refuse_other_names(settings)
        named = {"steps": steps, "guidance": guidance, "width": width, "height": height}
        named |= {"frames": frames, "fps": fps}
        settings |= {name: value for name, value in named.items() if value is not None}
        several = any(given.listed(one) for one in (image, prompt, seed))
        clips = self.generate(
            image,
            prompt,
            self.config.sample.seed[0] if seed is None else seed,
            negative_prompts=negative_prompt,
            sampler=sampler,
            conditions=conditions,
            noise=noise,
            output=output,
            on_step=on_step,
            progress=progress,
            **settings,
        )
        return clips if several or len(clips) > 1 else clips[0]

    def generate(
        self,
        pictures: Sequence[given.Picture] | given.Picture | None,
        prompts: Sequence[str] | str | None,
        seeds: Sequence[int] | int,
        *,
        negative_prompts: Sequence[str] | str | None = None,
        sampler: str | Sampler | None = None,
        conditions: Encoded | None = None,
        noise: Tensor | np.ndarray | None = None,
        output: Output = "video",
        on_step: OnStep | None = None,
        progress: bool = False,
        **settings: object,
    ) -> list:
        """One clip per (picture, prompt, seed), sampled as one batch; each depends on its own seed only.

        A single picture, prompt, negative prompt or seed serves all clips. For the rest see `__call__`.
        """
        given.choice("output", output, OUTPUTS)
        if isinstance(sampler, str):
            settings["sampler"], sampler = sampler, None
        sampler = given.sampler(sampler)
        given.function(on_step)
        if conditions is None:
            pictures, prompts, seeds = given.paired(pictures, prompts, seeds)
        else:
            given.instead_of_conditions(pictures, prompts, negative_prompts, settings)
            seeds = given.seeds_for(seeds, given.conditions_count(conditions))
            pictures, prompts = [None] * len(seeds), [""] * len(seeds)
        model = self.with_settings(clips=len(seeds), **settings)
        config = model.config
        dataclasses.replace(config.sample, seed=tuple(seeds))  # refuses a seed out of range
        negatives = given.spread(negative_prompts, config.negative_prompt, len(seeds))
        if noise is not None:
            noise = given.noise(noise, (len(seeds), *latent_shape(config)))
        if conditions is not None:
            conditions = given.conditions(conditions, config, len(seeds))
        opened = [None if picture is None else open_picture(picture, config) for picture in pictures]
        for picture in opened:
            note_cropping(picture, config)
        if sampler is None:
            note_late_start(config)
        facts = [
            given.facts(
                *both,
                noise=None if noise is None else noise[i],
                sampler=sampler,
                conditions=None if conditions is None else [one[i : i + 1] for one in conditions.tensors()],
                adapters=self.attached(),
            )
            for i, both in enumerate(zip(pictures, opened, strict=True))
        ]
        for one in facts:
            if sampler is None:
                one["steps"] = steps_made(config)
            if config.plugins:
                one["plugins"] = plugins.described(config)
        with _bar(on_step, shown=progress) as on_step:
            latents = model.sampled(
                opened, prompts, seeds, negatives=negatives, conditions=conditions, noise=noise,
                sampler=sampler, on_step=on_step,
            )  # fmt: skip
        if output == "latents":
            return list(latents)
        if output == "tensor":
            return list(pixels(model, latents))
        clips = model.finished(decode(model, latents))
        if output == "frames":
            return clips
        names = [os.fsdecode(p) if isinstance(p, str | os.PathLike) else given.UNNAMED for p in pictures]
        configs = [dataclasses.replace(config, negative_prompt=negative) for negative in negatives]
        videos = [
            Video(*inputs, facts=one)
            for *inputs, one in zip(clips, names, prompts, seeds, configs, facts, strict=True)
        ]
        return [one.pictures() for one in videos] if output == "pil" else videos

    def with_settings(self, *, clips: int = 1, **settings: object) -> I2VGenXL:
        """The same parts under other `sample` settings, and `negative_prompt`; nothing is loaded.

        The memory that `clips` clips at once take is planned again where they take more or less. ValueError
        for settings that cannot work, or need another way to load the model.
        """
        config = merge.with_sample(self.config, settings)
        if config != self.config:
            refuse_unsampleable(config)
            machine.refuse_missing(config, self.device)
            parallel.check(self.ranks, config)
            if _size(config) != _size(self.config) and (Path(config.weights) / SETTINGS_FILE).is_file():
                note_other_size(config)
        other = copy.copy(self)
        other._config = self.plan.adapt(config, self.parts, self.device, clips=clips)
        return other

    def encode(
        self,
        image: given.Picture | Sequence[given.Picture],
        prompt: str | Sequence[str],
        *,
        seed: int | Sequence[int] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        **settings: object,
    ) -> Encoded:
        """Everything that the UNet is given, for `model(conditions=...)`: change it as you like.

        Called with the same seed, the unchanged conditions give the very clip of picture and prompt. The
        text may have another number of tokens; `fps`, size and other settings are as in a call.
        """
        seed = self.config.sample.seed[0] if seed is None else seed
        pictures, prompts, seeds = given.paired(image, prompt, seed)
        model = self.with_settings(clips=len(seeds), **settings)
        negatives = given.spread(negative_prompt, model.config.negative_prompt, len(seeds))
        opened = [open_picture(picture, model.config) for picture in pictures]
        noises = [SampleNoise(one) for one in seeds]
        return encode(model, opened, prompts, posterior_noise(model, noises), negatives)

    def decode(self, latents: Tensor, *, output: Literal["frames", "tensor"] = "frames") -> Any:
        """Latents [c f h w] or [b c f h w] -> uint8 frames [f H W 3], or floats [f 3 H W]; for b, a list."""
        given.choice("output", output, ("frames", "tensor"))
        given.latents(latents, self.config.vae.embed_dim)
        batch = latents.to(self.device)[(None,) * (latents.ndim == 4)]
        made = pixels(self, batch) if output == "tensor" else decode(self, batch).cpu().numpy()
        return made[0] if latents.ndim == 4 else list(made)

    def lora(self, source: str | Path, *, scale: float = 1.0) -> lora.Adapters:
        """Attach the low-rank adapters of a folder or file -> them, to `set_scale`, `remove` or `merge`.

        ValueError for adapters of another architecture, and while others are attached.
        """
        made = load_adapter(self.unet, source, self.config, scale)
        self.adapters[os.fspath(source)] = made
        return made

    def attached(self) -> list[dict]:
        """What a record says of the adapters that are attached to the UNet now; merged ones are weights."""
        here = {id(module) for module in self.unet.modules() if isinstance(module, lora.LowRank)}
        told = []
        for source, adapters in self.adapters.items():
            parts = list(adapters.parts.values())
            if not here.isdisjoint(map(id, parts)):
                told.append({**given.of_file(source), "scale": parts[0].scale})
                here -= {id(part) for part in parts}
        return told + [{"file": None}] * bool(here)  # others, of no file that is known

    def to(
        self,
        device: str | torch.device | torch.dtype | None = None,
        dtype: torch.dtype | str | None = None,
        *,
        memory: str | None = None,
    ) -> I2VGenXL:
        """Move the model to a device, its UNet to a precision, or both, in place, as torch.nn.Module.to.

        `memory` is a plan ("balanced", "low"), by default that of `runtime.memory`. VAE and CLIP keep the
        precisions of `runtime`. ValueError where only loading again can do it: for offloaded, compiled and
        eight-bit models.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        asked = self.plan.asked
        if memory is not None:
            given.choice("memory", memory, ("auto", *plans.PLANS))
            asked = dataclasses.replace(asked, memory=memory)
        if device is not None:
            asked = dataclasses.replace(asked, device=str(device))
        if dtype is not None:
            asked = dataclasses.replace(asked, dtype=given.dtype(dtype))
        new, old = (runtime.dtype(one) for one in (asked, self.plan.asked))
        if torch.finfo(new).eps < torch.finfo(old).eps:
            warnings.warn(
                f"weights that were rounded to {str(old)[6:]} stay rounded in {str(new)[6:]}; load the model "
                "again for all digits",
                stacklevel=2,
            )
        config, _ = self.plan.moved(self.config, asked, self.parts)
        self.device = runtime.device(asked)
        place = "cpu" if config.runtime.offload != "none" else self.device
        for part, module in self.parts.items():
            module.to(device=place, dtype=plans.dtype(part, config.runtime))
        plans.prepare(self.parts, config, self.device)
        self.offloaded = plans.offloaded_parts(self.parts, config, self.device)
        self._config, self.plan = config, plans.Plan(config, asked)
        return self

    def sampled(
        self,
        opened: Sequence[Image.Image],
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        negatives: Sequence[str],
        conditions: Encoded | None,
        noise: Tensor | None,
        sampler: Sampler | None,
        on_step: OnStep | None,
    ) -> Tensor:
        """`sample`, with advice where float16 overflows"""
        try:
            return sample(
                self, opened, prompts, seeds, negatives=negatives, conditions=conditions, noise=noise,
                sampler=sampler, on_step=on_step,
            )  # fmt: skip
        except FloatingPointError as error:  # it names the step
            if all(p.dtype != torch.float16 for p in self.unet.parameters()):
                raise
            raise FloatingPointError(
                f"{error}; the UNet is in float16, which ends at 65504: runtime.dtype=bfloat16 does not"
            ) from None

    def finished(self, frames: Tensor) -> list[np.ndarray]:
        """uint8 [b f h w 3] -> clips, a grey last frame dropped or told as `save.grey_last_frame` says"""
        clips = list(frames.cpu().numpy())
        if self.config.save.grey_last_frame == "drop":
            return [video.drop_grey_last_frame(clip) for clip in clips]
        if any(len(video.drop_grey_last_frame(clip)) < len(clip) for clip in clips):
            warnings.warn(
                "the last frame is mostly mid-grey; the official code would drop it "
                "(save.grey_last_frame=drop)",
                stacklevel=3,
            )
        return clips


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
    return decode(
        model, sample(model, pictures, prompts, seeds, noise=noise, sampler=sampler, on_step=on_step)
    )


@torch.no_grad()
def sample(
    model: I2VGenXL,
    pictures: Sequence[Image.Image],
    prompts: Sequence[str],
    seeds: Sequence[int | torch.Generator],
    *,
    negatives: Sequence[str] | None = None,
    conditions: Encoded | None = None,
    noise: Tensor | None = None,
    sampler: Sampler | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """The same -> latents [b c f h w]. `conditions` replace those of pictures and prompts."""
    config, sample = model.config, model.config.sample
    noises = [SampleNoise(seed) for seed in seeds]
    shape = latent_shape(config)

    posterior = posterior_noise(model, noises)  # the first draw, whether or not anything reads it
    cond, uncond = conditions or encode(model, pictures, prompts, posterior, negatives)
    drawn = draw_all(noises, shape)
    if sample.noise_offset:
        drawn = drawn + sample.noise_offset * draw_all(noises, (*shape[:2], 1, 1))
    start = (drawn if noise is None else given.noise(noise, drawn.shape)).to(model.device)

    def step_noise(x: Tensor) -> Tensor:
        return draw_all(noises, tuple(x.shape[1:])).to(x)

    with plans.on_device(model.offloaded, "unet"):
        return (sampler or named_sampler(config))(
            network(model, cond, uncond),
            start,
            model.schedule,
            steps=sample.steps,
            noise=step_noise,
            on_step=on_step,
        )


def posterior_noise(model: I2VGenXL, noises: Sequence[SampleNoise]) -> Tensor | None:
    """[b c h w]; a network that never sees the first-frame latent draws nothing for it, as v1 does not."""
    c, _, h, w = latent_shape(model.config)
    return draw_all(list(noises), (c, h, w)) if sees_latent(model.config) else None


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
        parallel.both_branches(model.ranks, unet, positive, negative, under),
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
    posterior = posterior_noise(model, [SampleNoise(seed)])
    opened = open_picture(picture, model.config)
    cond, uncond = encode(model, [opened], [given.prompt(prompt)], posterior)
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
    negatives: Sequence[str] | None = None,
) -> Encoded:
    """Pictures and prompts, b of each, posterior noise [b c h w] -> conditions with and without the prompt.

    Without: the negative prompt and a zero image vector; the first-frame latent and fps stay, as in training.
    `negatives` replace the negative prompt of the settings, b of them.
    """
    config, sample, device = model.config, model.config.sample, model.device
    views = [prepare_views(picture, config) for picture in pictures]
    latent = image_latent(model, views, posterior_noise) if sees_latent(config) else None
    fps = torch.full((len(pictures),), sample.fps, device=device)

    text, vector = (None, None), (None, None)
    with plans.on_device(model.offloaded, "clip"):
        if config.use.text:
            for prompt in prompts:
                model.clip.tell_unknown_words(prompt)
            others = list(negatives or [config.negative_prompt])
            alike = len({*others}) == 1  # encoded once
            texts = [*prompts, *(others[:1] if alike else others)]
            tokens = model.clip.text(model.clip.tokenize(texts).to(device))
            n = len(prompts)
            text = tokens[:n], tokens[n:].expand(n, -1, -1)
        if config.use.global_tokens:
            clip_pixels = torch.stack([view.clip_pixels for view in views]).to(device)
            vector_cond = model.clip.image(clip_pixels)
            vector = vector_cond, torch.zeros_like(vector_cond) if sample.negative_image == "zeros" else None
    return Encoded(
        Conditions(text[0], vector[0], latent, fps), Unconditional(text[1], vector[1], latent, fps)
    )


def image_latent(model: I2VGenXL, views: Sequence[images.Pictures], posterior_noise: Tensor | None) -> Tensor:
    """The first frames as the UNet is given them, [b c h w]"""
    pixels = torch.stack([view.pixels for view in views]).to(model.device)
    noise = posterior_noise.to(model.device) if model.config.sample.posterior == "sample" else None
    with plans.on_device(model.offloaded, "vae"):
        return finite(model.vae, lambda vae: vae.encode(pixels, noise, chunk=1))


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
    return _decoded(model, latents, lambda part: video.to_uint8(part, rounding=model.config.save.rounding))


def pixels(model: I2VGenXL, latents: Tensor) -> Tensor:
    """Latents [b c f h w] -> float32 frames [b f 3 H W] from 0 to 1, not rounded."""
    return _decoded(model, latents, lambda part: (part.movedim(0, 1) * 0.5 + 0.5).clamp(0, 1))


@torch.no_grad()
def _decoded(model: I2VGenXL, latents: Tensor, finish: Callable[[Tensor], Tensor]) -> Tensor:
    """[b c f h w] -> [b f ...], where `finish` turns pixels [3 n H W] in -1..1 into [n ...]"""
    frames = rearrange(latents, "b c f h w -> (b f) c h w")
    everyone = None if model.ranks is None else model.ranks.everyone
    share = frames if everyone is None else everyone.own(frames, 0)
    done = []
    with plans.on_device(model.offloaded, "vae"):
        for part in (share if len(share) else frames[:1]).split(model.config.runtime.vae_chunk):
            floats = finite(model.vae, lambda vae, part=part: vae.decode(part)).float()
            done.append(finish(rearrange(floats, "n c h w -> c n h w")))
    whole = torch.cat(done)[: len(share)]  # of a process that has no frames, nothing
    if everyone is not None:
        whole = everyone.gather(whole, 0, len(frames))
    return whole.unflatten(0, (len(latents), -1))


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
    **settings: object,
) -> I2VGenXL:
    """Settings and weights -> a model ready to be called.

    `weights` is a native weights folder, "lab" or "random", by default the shipped model; `config` a YAML
    file; `overrides` are what a command line takes, e.g. `["steps=20", "vae.scale=1"]`, and `settings` the
    same by keyword, `device="cuda"`. ValueError for settings, weights or memory that cannot work.
    """
    if isinstance(weights, Config) or isinstance(config, Config):
        raise ValueError(
            "load takes a weights folder and a YAML file; for a Config: pipeline.load_parts(config)"
        )
    if not isinstance(config, str | os.PathLike | None):
        raise ValueError(f"the config is {given.kind(config)}; give the path of a YAML file")
    config = None if config is None else shipped.config(os.path.expanduser(config))
    literal = {"weights": str(weights)} if weights else {}
    overrides = [overrides] if isinstance(overrides, str) else list(overrides or ())
    overrides += [f"{name}={given.setting(value)}" for name, value in settings.items()]
    return load_parts(load_config(config, overrides, sampling=True, **literal))


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
    plugins.of(config)
    if config.adapter:
        lora.read(config.adapter)  # a wrong folder is told before gigabytes are read
    ranks = parallel.join(config)
    device = runtime.device(config.runtime)
    machine.refuse_missing(config, device)
    config = parallel.agreed(ranks, machine.choose_dtype(config))
    asked = config.runtime
    ledger, shares = plans.Ledger(config), 1 if ranks is None else ranks.frames.count
    config, estimate = plans.choose(config, ledger=ledger, shares=shares)
    if tell is not None:
        tell(estimate)
    place = "cpu" if config.runtime.offload != "none" else device
    unet, vae, clip = (
        checkpoint.load(part, config, device=place, dtype=plans.dtype(part, config.runtime))
        for part in checkpoint.PARTS
    )
    if config.adapter:
        load_adapter(unet, config.adapter, config, config.sample.adapter_scale).merge()
    model = assemble(config, unet, vae, clip, device, asked, ranks)
    model.plan.ledger = ledger  # of the same model, should a call take more
    return model


def load_adapter(unet: UNet, source: str | Path, config: Config, scale: float) -> lora.Adapters:
    """`lora.load`, with a warning about plugins that it was trained with and that the settings lack."""
    lacking = plugins.missing(lora_files.origin(source), config, subject="it was")
    try:
        made = lora.load(unet, source, scale=scale)
    except ValueError as error:
        if lacking:
            raise ValueError(f"{error}; {lacking}") from error
        if lora_files.origin(source).get("trained") == "adapter":
            raise ValueError(f"{error}; give the weights= that it was trained on") from error
        raise
    if lacking:
        warnings.warn(f"the adapter {source}: {lacking}", stacklevel=3)
    return made


def assemble(
    config: Config,
    unet: UNet,
    vae: AutoencoderKL,
    clip: ClipEncoders,
    device: torch.device,
    asked: Runtime | None = None,
    ranks: parallel.Ranks | None = None,
) -> I2VGenXL:
    """Loaded parts (on the CPU where something is to wait there) -> a model as `runtime` wants it.

    A plan for little memory must have been settled (`plans.choose`); `asked` is `runtime` before that.
    `ranks` are the processes that compute one clip together.
    """
    plans.prepare({"unet": unet, "vae": vae}, config, device)
    parallel.apply(unet, ranks)
    model = I2VGenXL(config, unet, vae, clip, device, asked=asked)
    model.offloaded, model.ranks = plans.offloaded_parts(model.parts, config, device), ranks
    model.plan.shares = 1 if ranks is None else ranks.frames.count
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


def note_late_start(config: Config) -> None:
    """A note if the first step is so far from full noise that it makes little of the input noise."""
    sample, count = config.sample, config.schedule.num_timesteps
    if sample.sampler == "ancestral":
        return
    first = timesteps(count, sample.steps, sample.spacing)[0]
    if first < LATE * count:
        warnings.warn(
            f"sample.steps={sample.steps} with sample.spacing={sample.spacing} begins at timestep {first} of "
            f"{count}, so the noise stays; give more steps, or spacing=trailing",
            stacklevel=4,
        )


def note_cropping(picture: Image.Image | None, config: Config) -> None:
    """A note if much of the picture lies outside the crop in its middle."""
    if picture is None:
        return
    (wide, high), (width, height) = picture.size, (config.sample.width, config.sample.height)
    if (left := _kept(wide / high, width / height)) >= 1 - CROPPED:
        return
    where = "top and bottom" if wide / high < width / height else "left and right"
    multiple, side = config.size_multiple, math.sqrt(width * height * high / wide)
    other_height = max(multiple, round(side / multiple) * multiple)
    other_width = max(multiple, round(other_height * wide / high / multiple) * multiple)
    whole = f"; width={other_width} height={other_height} keeps it nearly whole"
    better = _kept(wide / high, other_width / other_height) > left and _kept(wide / high, 1) > NARROW
    warnings.warn(
        f"the picture is {wide} x {high} and the clip {width} x {height}: {1 - left:.0%} of the picture, at "
        f"its {where}, is cut off{whole if better else ''}",
        stacklevel=4,
    )


def _kept(aspect: float, other: float) -> float:
    """Share of a picture that is left when it is cropped to another aspect ratio."""
    return min(aspect / other, other / aspect)


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


def _size(config: Config) -> tuple[int, int, int]:
    return config.sample.width, config.sample.height, config.sample.frames


@contextlib.contextmanager
def _bar(on_step: OnStep | None, *, shown: bool) -> Iterator[OnStep | None]:
    """`on_step`, with a progress bar where somebody can watch one: in a terminal or a notebook."""
    if not (shown and (sys.stderr.isatty() or "ipykernel" in sys.modules)):
        yield on_step
        return
    from tqdm.auto import tqdm  # only now: in a notebook without ipywidgets it warns when it is imported

    with tqdm(unit="step", mininterval=0.3) as bar:

        def step(info: StepInfo) -> None:
            if info.index == 0:
                bar.reset(total=info.num_steps)
            bar.update()
            if on_step is not None:
                on_step(info)

        yield step
