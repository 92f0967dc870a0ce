"""How a refiner learns to lift a first stage's clips: the error of such a clip counts as part of the noise.

Sampling starts from the upscaled clip y at the level s = sigma / alpha of `refine.noise_level`, from
alpha (y + s e). With x the true clip that is alpha (x + s (e + (y - x) / s)): x under a noise that is shifted
by (y - x) / s. So the plain diffusion loss with the shifted noise, at all levels up to s, teaches the network
to leave for x; and the way of the samplers, straight in x_s / alpha, runs from y to x and not around y.

Axes: b batch, f frames, c channels, h w latent rows and columns, H W pixels.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from i2vgen import checkpoint, refine, refine_video, runtime, video
from i2vgen.config import Config, Refine
from i2vgen.config_layers import from_dict, read_stored_settings
from i2vgen.schedule import Schedule
from i2vgen.training.settings import Train
from i2vgen.vae import AutoencoderKL


class FirstStage:
    """What a first stage, `config`, does to clips, and what a refiner's settings `job` make of them again."""

    def __init__(self, config: Config, vae: AutoencoderKL, job: Refine, share: float, device: torch.device):
        self.config, self.vae, self.job, self.share, self.device = config, vae, job, share, device

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """True clips [b c f H W] in [-1, 1] -> the same clips made small and upscaled, [b c f H W].

        The first `share` of them went through the autoencoder, the rest were only made small.
        """
        b, _, f, height, width = pixels.shape
        size = self.config.sample.height, self.config.sample.width
        small = F.interpolate(rearrange(pixels, "b c f h w -> (b f) c h w"), size, mode="area")
        count = round(self.share * b) * f
        if count:
            latents = self.vae.encode(small[:count].to(self.device), None)
            small = torch.cat([self.vae.decode(latents).to(small), small[count:]])
        frames = video.to_uint8(rearrange(small, "n c h w -> c n h w"), rounding=self.config.save.rounding)
        large = refine_video.resized(
            frames.numpy(), width, height, antialias=self.job.antialias, resize=self.job.resize
        )
        return rearrange(large, "(b f) c h w -> b c f h w", b=b)


def load_first_stage(config: Config, train: Train, device: torch.device) -> FirstStage:
    """The first stage of `train.first_stage`; ValueError where a refiner cannot lift its clips."""
    first = from_dict(read_stored_settings(train.first_stage))
    sample, large = first.sample, config.sample
    if large.width < sample.width or large.height < sample.height:
        raise ValueError(
            f"train.first_stage = {train.first_stage} makes {sample.width} x {sample.height} pixels, which "
            f"cannot be lifted to sample.width x sample.height = {large.width} x {large.height}"
        )
    refine.refuse_unrefinable(config)
    if "vae" in checkpoint.missing_parts(train.first_stage):
        raise ValueError(f"train.first_stage = {train.first_stage} lacks the vae")
    first = dataclasses.replace(first, weights=train.first_stage)
    vae = checkpoint.load("vae", first, device=device, dtype=runtime.DTYPES[config.runtime.vae_dtype])
    return FirstStage(first, vae, config.refine, train.first_stage_vae, device)


def shifted(noise: Tensor, x0: Tensor, start: Tensor, level: float) -> Tensor:
    """Noise, true latents, latents of the upscaled clip, all [b c f h w] -> the noise of the loss."""
    return noise + (start - x0) / level


def schedule(config: Config) -> Schedule:
    """The refiner's noise table as the loss reads it."""
    return refine.levels(config).schedule()


def start_level(config: Config) -> float:
    """s = sigma / alpha where sampling starts."""
    return refine.levels(config).level(config.refine.noise_level - 1)
