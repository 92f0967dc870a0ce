"""The autoencoder's step: absolute plus squared error and a small KL term. No discriminator.

Axes: n frames, b batch, f frames, c channels, h w latent rows and columns, H W pixels.
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
from i2vgen.training.diffusion import fresh_or_held, others_held, picture
from i2vgen.training.loop import Part
from i2vgen.training.settings import Train, buckets

SHOWN = 8  # frames in a sample strip
SCALE_CLIPS = 32  # clips whose latents decide the measured scale


class VaeLoss(nn.Module):
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
def start(vae: AutoencoderKL, seed: int) -> None:
    """New weights that carry the picture from the first step on: plain signal-keeping convolutions, and
    residual branches at a tenth. PyTorch's own start took four times the steps to the same error.
    """
    draw = torch.Generator().manual_seed(seed)
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear", generator=draw)
            nn.init.zeros_(module.bias)
    for module in vae.modules():
        if isinstance(module, ResBlock):
            module.conv2.weight.mul_(0.1)


def make(config: Config, train: Train, source: Source, device: torch.device) -> Part:
    vae = fresh_or_held("vae", config, train, device)
    if not config.weights or "vae" in checkpoint.missing_parts(config.weights):
        start(vae, train.seed)
    bucket = buckets(config, train)[0]

    def inputs(clips: Clips, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        pixels = rearrange(clips.pixels, "b c f h w -> (b f) c h w").to(device)
        noise = torch.randn(len(pixels), config.vae.embed_dim, *config.latent_size, generator=draw)
        return pixels, noise.to(device)

    @torch.no_grad()
    def finish(settings: Config) -> Config:
        """Latents of spread 1 are what the diffusion expects: the scale is measured on clips of the run."""
        if train.vae_scale == "given":
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
        others=others_held("vae", config),
        strip=strip,
        finish=finish,
    )
