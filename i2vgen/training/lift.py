"""How a refiner learns to lift a first stage's clips: the error of such a clip counts as part of the noise.

Sampling starts from the upscaled clip y at the level s = sigma / alpha of `refine.noise_level`, from
alpha (y + s e). With x the true clip that is alpha (x + s (e + (y - x) / s)): x under a noise that is shifted
by (y - x) / s. So the plain diffusion loss with the shifted noise, at all levels up to s, teaches the network
to leave for x; and the way of the samplers, straight in x_s / alpha, runs from y to x and not around y.

Axes: b batch, f frames, c channels, h w latent rows and columns, H W pixels.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from i2vgen import pipeline
from i2vgen.diffusion.schedule import Schedule
from i2vgen.files import video
from i2vgen.pipeline import I2VGenXL
from i2vgen.refiner import fitting, refine
from i2vgen.settings.config import Config, Refine
from i2vgen.settings.merge import load_config, with_quality
from i2vgen.training.settings import Train, buckets


class FirstStage:
    """What a first stage makes of true clips, and what a refiner's settings `job` make of them again."""

    def __init__(self, model: I2VGenXL, job: Refine, train: Train):
        self.model, self.job, self.train = model, job, train

    @torch.no_grad()
    def __call__(self, pixels: Tensor, captions: Sequence[str]) -> Tensor:
        """True clips [b c f H W] in [-1, 1] and captions -> the same clips small and upscaled, [b c f H W].

        A clip's caption decides what becomes of it: only made small, also passed through the autoencoder, or
        made from its first frame.
        """
        sample, (b, _, _, height, width) = self.model.config.sample, pixels.shape
        small = F.interpolate(
            rearrange(pixels, "b c f h w -> (b f) c h w"), (sample.height, sample.width), mode="area"
        )
        small = rearrange(small, "(b f) c h w -> b c f h w", b=b)
        clips = video.to_uint8(small, rounding=self.model.config.save.rounding)
        for i, caption in enumerate(captions):
            lot = zlib.crc32(caption.encode()) / 2**32
            if lot < self.train.first_stage_made:
                clips[i] = self.made(clips[i, 0], caption)
            elif lot < self.train.first_stage_made + self.train.first_stage_vae:
                clips[i] = decoded(self.model, rearrange(small[i], "c f h w -> f c h w"))
        large = fitting.resized(
            rearrange(clips, "b f h w c -> (b f) h w c").numpy(),
            width,
            height,
            antialias=self.job.antialias,
            resize=self.job.resize,
        )
        return rearrange(large, "(b f) c h w -> b c f h w", b=b)

    def made(self, first: Tensor, caption: str) -> Tensor:
        """First frame uint8 [h w 3] -> the clip of it, uint8 [f h w 3]."""
        picture = Image.fromarray(first.numpy())
        return pipeline.generate(self.model, [picture], [caption], [zlib.crc32(caption.encode())])[0].cpu()


def decoded(model: I2VGenXL, frames: Tensor) -> Tensor:
    """Frames [f 3 h w] in [-1, 1] through a model's autoencoder -> uint8 [f h w 3] on the CPU"""
    pixels = model.vae.decode(model.vae.encode(frames.to(model.device), None))
    pixels = rearrange(pixels, "f c h w -> c f h w")
    return video.to_uint8(pixels, rounding=model.config.save.rounding).cpu()


def load_first_stage(config: Config, train: Train, device: torch.device) -> FirstStage:
    """That of `train.first_stage`; ValueError where a refiner of `config` cannot lift its clips."""
    first = load_config(None, [f"runtime.device={device}"], weights=train.first_stage)
    sample, large = first.sample, config.sample
    if large.width < sample.width or large.height < sample.height:
        raise ValueError(
            f"train.first_stage = {train.first_stage} makes {sample.width} x {sample.height} pixels, which "
            f"cannot be lifted to sample.width x sample.height = {large.width} x {large.height}"
        )
    frames = {bucket.frames for bucket in buckets(config, train)}
    if train.first_stage_made and frames != {sample.frames}:
        raise ValueError(
            f"train.first_stage_made wants clips of the {sample.frames} frames that train.first_stage = "
            f"{train.first_stage} makes, but train.frame_lengths are {sorted(frames)}"
        )
    refine.refuse_unrefinable(config)
    return FirstStage(pipeline.load_parts(with_quality(first, "draft")), config.refine, train)


def shifted(noise: Tensor, x0: Tensor, start: Tensor, level: float) -> Tensor:
    """Noise, true latents, latents of the upscaled clip, all [b c f h w] -> the noise of the loss."""
    return noise + (start - x0) / level


def clip_weight(noise: Tensor) -> Tensor:
    """Shifted noise [b c f h w] -> [b]: a clip that is far from the truth counts no more than a near one.

    A squared error in parts of where it starts, as decibels count it; clips made by the first stage, whose
    motion may be wrong, would drown the others.
    """
    return 1 / noise.square().flatten(1).mean(dim=1)


def schedule(config: Config) -> Schedule:
    """The refiner's noise table as the loss reads it."""
    return refine.levels(config).schedule()


def start_level(config: Config) -> float:
    """s = sigma / alpha where sampling starts."""
    return refine.levels(config).level(config.refine.noise_level - 1)
