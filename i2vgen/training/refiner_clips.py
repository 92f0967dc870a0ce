"""Clips for training a refiner: the error of a first stage's clip is treated as part of the noise.

Sampling starts from the upscaled clip y at the level s = sigma / alpha of `refine.noise_level`, that is from
alpha (y + s e). With the true clip x this equals alpha (x + s (e + (y - x) / s)): x with noise shifted by
(y - x) / s. The plain diffusion loss with the shifted noise, at all levels up to s, therefore trains the
network to predict x, and the samplers' trajectory, a straight line in x_s / alpha, leads from y to x.

Axes: b batch, f frames, c channels, h w latent rows and columns, H W pixel rows and columns.
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
    """Turns true clips into a first stage's clips, then upscales them as the refiner's settings `job` say."""

    def __init__(self, model: I2VGenXL, job: Refine, train: Train):
        self.model, self.job, self.train = model, job, train

    @torch.no_grad()
    def __call__(self, pixels: Tensor, captions: Sequence[str]) -> Tensor:
        """True clips [b c f H W] in [-1, 1] and their captions -> degraded clips [b c f H W].

        A hash of the caption decides whether a clip is only downscaled, also passed through the autoencoder,
        or generated from its first frame.
        """
        sample, (b, _, _, height, width) = self.model.config.sample, pixels.shape
        small = F.interpolate(
            rearrange(pixels, "b c f h w -> (b f) c h w"), (sample.height, sample.width), mode="area"
        )
        small = rearrange(small, "(b f) c h w -> b c f h w", b=b)
        clips = video.to_uint8(small, rounding=self.model.config.save.rounding)
        for i, caption in enumerate(captions):
            fraction = zlib.crc32(caption.encode()) / 2**32
            if fraction < self.train.first_stage_made:
                clips[i] = self.generate(clips[i, 0], caption)
            elif fraction < self.train.first_stage_made + self.train.first_stage_vae:
                clips[i] = through_autoencoder(self.model, rearrange(small[i], "c f h w -> f c h w"))
        large = fitting.resized(
            rearrange(clips, "b f h w c -> (b f) h w c").numpy(),
            width,
            height,
            antialias=self.job.antialias,
            resize=self.job.resize,
        )
        return rearrange(large, "(b f) c h w -> b c f h w", b=b)

    def generate(self, first: Tensor, caption: str) -> Tensor:
        """First frame uint8 [h w 3] -> generated clip uint8 [f h w 3]."""
        picture = Image.fromarray(first.numpy())
        return pipeline.generate(self.model, [picture], [caption], [zlib.crc32(caption.encode())])[0].cpu()


def through_autoencoder(model: I2VGenXL, frames: Tensor) -> Tensor:
    """Frames [f 3 h w] in [-1, 1] -> reconstruction by the autoencoder, uint8 [f h w 3] on the CPU."""
    pixels = model.vae.decode(model.vae.encode(frames.to(model.device), None))
    pixels = rearrange(pixels, "f c h w -> c f h w")
    return video.to_uint8(pixels, rounding=model.config.save.rounding).cpu()


def load_first_stage(config: Config, train: Train, device: torch.device) -> FirstStage:
    """Load `train.first_stage`; ValueError if a refiner with these settings cannot refine its clips."""
    first = load_config(None, [f"runtime.device={device}"], weights=train.first_stage)
    sample, large = first.sample, config.sample
    if large.width < sample.width or large.height < sample.height:
        raise ValueError(
            f"train.first_stage = {train.first_stage} makes {sample.width} x {sample.height} pixels, which "
            f"a refiner cannot bring to sample.width x sample.height = {large.width} x {large.height}"
        )
    frames = {bucket.frames for bucket in buckets(config, train)}
    if train.first_stage_made and frames != {sample.frames}:
        raise ValueError(
            f"train.first_stage_made needs clips of the {sample.frames} frames that train.first_stage = "
            f"{train.first_stage} makes, but train.frame_lengths are {sorted(frames)}"
        )
    refine.refuse_unrefinable(config)
    return FirstStage(pipeline.load_parts(with_quality(first, "draft")), config.refine, train)


def shifted_noise(noise: Tensor, x0: Tensor, start: Tensor, level: float) -> Tensor:
    """Noise, true latents and upscaled clip's latents, all [b c f h w] -> e + (y - x) / s for the loss."""
    return noise + (start - x0) / level


def weight_per_clip(noise: Tensor) -> Tensor:
    """Shifted noise [b c f h w] -> [b], the inverse of its mean square, so that all clips count equally.

    The loss becomes relative to the error of the upscaled clip. Otherwise generated clips, whose motion may
    be wrong, would dominate.
    """
    return 1 / noise.square().flatten(1).mean(dim=1)


def schedule(config: Config) -> Schedule:
    """The refiner's noise schedule, for the loss."""
    return refine.levels(config).schedule()


def start_noise_level(config: Config) -> float:
    """The level s = sigma / alpha at which sampling starts."""
    return refine.levels(config).level(config.refine.noise_level - 1)
