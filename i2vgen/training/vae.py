"""The autoencoder's training step: absolute plus squared error and a small KL term, no discriminator.

Axes: n frames of all clips, b batch, f frames, c channels, h w latent rows and columns, H W pixel rows and
columns.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from i2vgen.files import checkpoint
from i2vgen.model.vae import AutoencoderKL, ResBlock
from i2vgen.settings.config import Config
from i2vgen.training.data import Clips, Source
from i2vgen.training.diffusion import load_or_create, other_parts, picture
from i2vgen.training.loop import Part
from i2vgen.training.settings import Train, buckets

SHOWN = 8  # frames in a sample strip
SCALE_CLIPS = 32  # clips over which the scale is measured


class VaeLoss(nn.Module):
    """The autoencoder and its loss as one module, because data parallelism wraps a single forward."""

    def __init__(self, vae: AutoencoderKL, train: Train):
        super().__init__()
        self.vae, self.mse, self.kl = vae, train.vae_mse, train.vae_kl

    def forward(self, pixels: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """pixels [n 3 H W] in [-1, 1], noise [n c h w] -> {"loss", "l1", "mse", "kl": scalars}"""
        posterior = self.vae.posterior(pixels)
        z = posterior.sample(noise.to(posterior.mean))
        difference = self.vae.decode(self.vae.scale * z).float() - pixels
        l1, mse = difference.abs().mean(), difference.square().mean()
        kl = posterior.kl().float().mean() / z[0].numel()
        return {"loss": l1 + self.mse * mse + self.kl * kl, "l1": l1, "mse": mse, "kl": kl}


@torch.no_grad()
def initialise(vae: AutoencoderKL, seed: int) -> None:
    """Initialise in place, preserving the signal's variance: Kaiming convolutions (He et al. 2015) with
    linear gain, residual branches times 0.1. PyTorch's defaults take four times the steps to reach the same
    error.
    """
    draw = torch.Generator().manual_seed(seed)
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear", generator=draw)
            nn.init.zeros_(module.bias)
    for module in vae.modules():
        if isinstance(module, ResBlock):
            module.conv2.weight.mul_(0.1)


def freeze(vae: AutoencoderKL, train: Train) -> None:
    """Leave out of the training what `train.vae_encoder=false` leaves as it is."""
    vae.encoder.requires_grad_(train.vae_encoder)
    vae.quant_conv.requires_grad_(train.vae_encoder)


def make(config: Config, train: Train, source: Source, device: torch.device) -> Part:
    """The autoencoder of `weights=`, or a new one, with its loss and inputs."""
    vae = load_or_create("vae", config, train, device)
    if not config.weights or "vae" in checkpoint.missing_parts(config.weights):
        if not train.vae_encoder:
            raise ValueError(
                "train.vae_encoder=false trains the decoder of a trained autoencoder; name it: weights="
            )
        initialise(vae, train.seed)
    freeze(vae, train)
    bucket = buckets(config, train)[0]

    def inputs(clips: Clips, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        pixels = rearrange(clips.pixels, "b c f h w -> (b f) c h w").to(device)
        noise = torch.randn(len(pixels), config.vae.embed_dim, *config.latent_size, generator=draw)
        return pixels, noise.to(device)

    @torch.no_grad()
    def finish(settings: Config) -> Config:
        """Measure `vae.scale` on clips of the run, because the diffusion expects latents of unit variance."""
        if train.vae_scale == "given" or not train.vae_encoder:
            return settings
        squares, count = 0.0, 0
        for position in range(SCALE_CLIPS):
            clips = source(bucket._replace(batch=1), [position])
            posterior = vae.posterior(clips.pixels[0].transpose(0, 1).to(device))
            values = posterior.mean.double().square() + posterior.std.double().square()
            squares, count = squares + values.sum().item(), count + values.numel()
        scale = float(f"{(count / squares) ** 0.5:.5g}")
        return dataclasses.replace(settings, vae=dataclasses.replace(settings.vae, scale=scale))

    @torch.no_grad()
    def strip() -> np.ndarray:
        clips = source(bucket._replace(batch=SHOWN), list(range(SHOWN)))
        pixels = clips.pixels[:, :, 0].to(device)
        shown = [pixels, vae.decode(vae.encode(pixels, None))]
        rows = [np.concatenate([np.asarray(picture(frame)) for frame in row], axis=1) for row in shown]
        return np.concatenate(rows, axis=0)

    return Part(
        name="vae",
        model=vae,
        step=VaeLoss(vae, train),
        inputs=inputs,
        others=other_parts("vae", config),
        strip=strip,
        finish=finish,
    )
