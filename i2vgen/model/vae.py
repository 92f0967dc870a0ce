"""The KL autoencoder of Stable Diffusion 2.1, or a smaller one of its family: pixels <-> scaled latents.

It works on single frames, so a video can be decoded in chunks of any size with the same result. Tensors are
channels-last inside; the public functions take and return [n c h w].

Axes: n pictures or frames, c channels, h w rows and columns, p = h w flattened.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from i2vgen.model.attention import attend
from i2vgen.model.layers import TRANSFORMER_EPS, Conv, GroupNorm
from i2vgen.model.spatial import nearest_twice
from i2vgen.settings import config

LOG_VARIANCE_RANGE = (-30.0, 20.0)  # the posterior's log-variance is clamped to this


class Posterior(NamedTuple):
    """Diagonal Gaussian over unscaled latents, each [n c h w]."""

    mean: Tensor
    log_variance: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor) -> Posterior:
        """[n 2c h w]: mean and log-variance halves of the channels, the latter clamped."""
        mean, log_variance = moments.chunk(2, dim=1)
        return cls(mean, log_variance.clamp(*LOG_VARIANCE_RANGE))

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.log_variance)

    def sample(self, noise: Tensor) -> Tensor:
        """noise [n c h w], standard normal"""
        return self.mean + self.std * noise

    def kl(self) -> Tensor:
        """KL divergence to the standard normal, summed over each latent. -> [n]"""
        terms = self.mean**2 + self.log_variance.exp() - 1.0 - self.log_variance
        return 0.5 * terms.flatten(1).sum(1)


class ResBlock(nn.Module):
    """Two convolutions and a skip around both."""

    def __init__(self, width_in: int, width: int, groups: int):
        super().__init__()
        self.norm1 = GroupNorm(groups, width_in, eps=TRANSFORMER_EPS)
        self.conv1 = Conv(width_in, width, 3, padding=1)
        self.norm2 = GroupNorm(groups, width, eps=TRANSFORMER_EPS)
        self.conv2 = Conv(width, width, 3, padding=1)
        self.skip = Conv(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[n h w c] -> [n h w c']"""
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return self.skip(x) + y


class SelfAttention(nn.Module):
    """One head as wide as the channels, over a picture's pixels."""

    def __init__(self, width: int, groups: int, backend: str):
        super().__init__()
        self.backend = backend
        self.norm = GroupNorm(groups, width, eps=TRANSFORMER_EPS)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[n h w c] -> same"""
        y = rearrange(self.norm(x), "n h w c -> n 1 (h w) c")
        y = attend(self.to_q(y), self.to_k(y), self.to_v(y), self.backend)
        return x + self.to_out(y).view_as(x)


class Downsample(nn.Module):
    """Half the size; the padding is on the right and at the bottom only."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = Conv(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 0, 0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the size by repetition, then a convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = Conv(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(nearest_twice(x))


class Level(nn.Module):
    """The blocks of one resolution, each followed by attention if there is any, then the resampling."""

    def __init__(self, blocks: list[ResBlock], attentions: list[SelfAttention], resample: nn.Module | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.attentions = nn.ModuleList(attentions)
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x)
            if len(self.attentions):
                x = self.attentions[i](x)
        return x if self.resample is None else self.resample(x)


class Middle(nn.Module):
    """ResBlock, attention, ResBlock at the coarsest resolution."""

    def __init__(self, width: int, groups: int, backend: str):
        super().__init__()
        self.block1 = ResBlock(width, width, groups)
        self.attention = SelfAttention(width, groups, backend)
        self.block2 = ResBlock(width, width, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block2(self.attention(self.block1(x)))


class Encoder(nn.Module):
    """Pixels [n h w 3] -> features of the moments [n h' w' 2z]; levels are numbered finest first."""

    def __init__(self, vae: config.VAE, backend: str):
        super().__init__()
        widths = [vae.base_width * m for m in vae.width_multipliers]
        groups, width, levels = vae.norm_groups, vae.base_width, []
        self.conv_in = Conv(vae.channels, width, 3, padding=1)
        for level, out in enumerate(widths):
            blocks = []
            for _ in range(vae.blocks_per_level):
                blocks.append(ResBlock(width, out, groups))
                width = out
            attends = vae.resolution // 2**level in vae.attention_resolutions
            attentions = [SelfAttention(width, groups, backend) for _ in blocks] if attends else []
            last = level == len(widths) - 1
            levels.append(Level(blocks, attentions, None if last else Downsample(width)))
        self.down = nn.ModuleList(levels)
        self.mid = Middle(width, groups, backend)
        self.norm_out = GroupNorm(groups, width, eps=TRANSFORMER_EPS)
        self.conv_out = Conv(width, 2 * vae.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Features [n h w z] -> pixels [n H W 3]; levels are numbered finest first and run from the last."""

    def __init__(self, vae: config.VAE, backend: str):
        super().__init__()
        widths = [vae.base_width * m for m in vae.width_multipliers]
        groups, width, levels = vae.norm_groups, widths[-1], []
        self.conv_in = Conv(vae.z_channels, width, 3, padding=1)
        self.mid = Middle(width, groups, backend)
        for level in reversed(range(len(widths))):
            blocks = []
            for _ in range(vae.blocks_per_level + 1):
                blocks.append(ResBlock(width, widths[level], groups))
                width = widths[level]
            attends = vae.resolution // 2**level in vae.attention_resolutions
            attentions = [SelfAttention(width, groups, backend) for _ in blocks] if attends else []
            levels.append(Level(blocks, attentions, Upsample(width) if level > 0 else None))
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = GroupNorm(groups, width, eps=TRANSFORMER_EPS)
        self.conv_out = Conv(width, vae.channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class AutoencoderKL(nn.Module):
    """Encoder, decoder and the two 1 x 1 convolutions between them and the latent."""

    def __init__(self, vae: config.VAE, *, backend: str = "sdpa"):
        super().__init__()
        self.scale = vae.scale
        self.encoder = Encoder(vae, backend)
        self.decoder = Decoder(vae, backend)
        self.quant_conv = Conv(2 * vae.z_channels, 2 * vae.embed_dim, 1)
        self.post_quant_conv = Conv(vae.embed_dim, vae.z_channels, 1)

    def posterior(self, pixels: Tensor) -> Posterior:
        """Pixels [n 3 H W] in [-1, 1] -> posterior of unscaled latents.

        Rows and columns beyond a multiple of the downsampling factor are cut off.
        """
        return Posterior.from_moments(self.moments(pixels))

    def moments(self, pixels: Tensor) -> Tensor:
        """[n 3 H W] -> [n 2c h w]"""
        x = rearrange(pixels.to(self.dtype), "n c h w -> n h w c").contiguous()
        return rearrange(self.quant_conv(self.encoder(x)), "n h w c -> n c h w")

    def encode(self, pixels: Tensor, noise: Tensor | None, *, chunk: int | None = None) -> Tensor:
        """Pixels [n 3 H W] in [-1, 1] -> scaled latents [n c h w].

        A sample of the posterior by `noise` [n c h w], which is standard normal, or its mode if that is None.
        `chunk` pictures are encoded at a time; None means all. The result does not depend on it.
        """
        latents = []
        for i in range(0, pixels.shape[0], chunk or pixels.shape[0]):
            part = slice(i, i + (chunk or pixels.shape[0]))
            posterior = self.posterior(pixels[part])
            latents.append(
                posterior.mean if noise is None else posterior.sample(noise[part].to(posterior.mean))
            )
        return self.scale * torch.cat(latents)

    def decode(self, latents: Tensor, *, chunk: int | None = None) -> Tensor:
        """Scaled latents [n c h w] -> pixels [n 3 H W], not clamped; `chunk` frames at a time (None: all)."""
        return torch.cat([self._decode(part) for part in latents.split(chunk or latents.shape[0])])

    def _decode(self, latents: Tensor) -> Tensor:
        z = 1.0 / self.scale * latents.to(self.dtype)
        x = self.post_quant_conv(rearrange(z, "n c h w -> n h w c").contiguous())
        return rearrange(self.decoder(x), "n h w c -> n c h w")

    @property
    def dtype(self) -> torch.dtype:
        return self.quant_conv.weight.dtype
