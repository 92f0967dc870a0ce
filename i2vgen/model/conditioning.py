"""The hierarchical image encoders: every condition of the UNet that does not depend on the timestep.

One picture conditions the video three times: its CLIP vector as a few global tokens, its VAE latent pooled
to 8 x 8 local tokens, and the same latent at full resolution as extra input channels. `ConditionStem.prepare`
computes all of it once per video, and the UNet reads the result at every step.

Axes: b batch, f frames, h w latent rows and columns, c channels, k context tokens, d context width,
v width of the CLIP image vector, e embedding width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from i2vgen.model.attention import for_any_heads
from i2vgen.model.layers import Conv, Mlp, per_frame, sinusoid, zero_
from i2vgen.model.temporal import FrameEncoder
from i2vgen.settings import config


class Conditions(NamedTuple):
    """The encoders' outputs, in any float dtype. Those whose switch is off are not read."""

    text: Tensor | None  # [b k d] penultimate CLIP text tokens
    image_vector: Tensor | None  # [b v] pooled CLIP image vector, not normalised; None omits its tokens
    image_latent: Tensor | None  # [b c h w] scaled VAE latent of the first frame
    fps: Tensor | None  # [b] the requested motion, in frames per second


class Unconditional(Conditions):
    """The conditions of guidance's unconditional branch, so that adapters can tell the two branches apart."""

    __slots__ = ()


class Encoded(NamedTuple):
    """The conditions of b clips, with the prompt and without it, as guidance needs them."""

    cond: Conditions
    uncond: Unconditional

    def tensors(self) -> list[Tensor]:
        """All that are there"""
        return [one for one in (*self.cond, *self.uncond) if one is not None]


class Prepared(NamedTuple):
    """What the UNet reads at every step, in the UNet's dtype."""

    context: Tensor  # [b k d] text, local and global tokens, in this order
    concat: Tensor | None  # [b f h w c] extra input channels, gain applied
    fps_embedding: Tensor | None  # [b e]
    picture: Tensor | None = None  # [b c 1 h w] first-frame latent, to which the output is added


class ConditionStem(nn.Module):
    """All condition encoders of one UNet; those whose switch is off are not built."""

    def __init__(self, unet: config.UNet, use: config.Use, *, backend: str):
        super().__init__()
        self.use = use
        self.base_width, self.context_width = unet.base_width, unet.context_width
        if use.fps:
            self.fps = Mlp(unet.base_width, unet.embedding_width, unet.embedding_width)
            zero_(self.fps.linear2)
        if use.global_tokens:
            self.global_tokens = GlobalTokens(
                unet.image_vector_width, unet.embedding_width, unet.num_global_tokens, unet.context_width
            )
        if use.local_tokens:
            self.local_tokens = LocalTokens(
                unet.image_channels, unet.local_widths, unet.context_width, grid=unet.local_grid
            )
        if use.concat:
            self.concat = ConcatBranch(unet, use, backend=backend)

    def prepare(self, conditions: Conditions, frames: int, dtype: torch.dtype) -> Prepared:
        """Conditions of b samples -> what stays the same over all steps of a video, in `dtype`.

        ValueError if no context token is left.
        """
        text, vector, latent, fps = conditions
        latent = latent.to(dtype) if self.use.local_tokens or self.use.concat else None
        context = []
        if self.use.text:
            context.append(text.to(dtype))
        if self.use.local_tokens:
            context.append(self.local_tokens(latent))
        if self.use.global_tokens and vector is not None:
            context.append(self.global_tokens(vector.to(dtype)))
        if not context:
            raise ValueError(
                "no context token is left: image_vector is None and use.text and use.local_tokens are off"
            )
        concat = self.concat(latent, frames) if self.use.concat else None
        fps_embedding = None
        if self.use.fps:
            fps_embedding = self.fps(sinusoid(fps, self.base_width, self.use.sinusoid).to(dtype))
        picture = latent[:, :, None] if self.use.concat and self.use.output != "plain" else None
        return Prepared(torch.cat(context, dim=1), concat, fps_embedding, picture)


class GlobalTokens(nn.Module):
    """The CLIP image vector as a few context tokens."""

    def __init__(self, width: int, hidden: int, num_tokens: int, context_width: int):
        super().__init__()
        self.num_tokens = num_tokens
        self.mlp = Mlp(width, hidden, num_tokens * context_width)

    def forward(self, vector: Tensor) -> Tensor:
        """[b v] -> [b k d]"""
        return rearrange(self.mlp(vector), "b (k d) -> b k d", k=self.num_tokens)


class LocalTokens(nn.Module):
    """The first-frame latent, pooled to a fixed grid, convolved to a quarter of it: (grid / 4)^2 tokens."""

    def __init__(self, channels: int, widths: tuple[int, int], context_width: int, *, grid: int):
        super().__init__()
        self.grid = grid
        self.conv1 = Conv(channels, widths[0], 3, padding=1)
        self.conv2 = Conv(widths[0], widths[1], 3, stride=2, padding=1)
        self.conv3 = Conv(widths[1], context_width, 3, stride=2, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        """[b c h w] -> [b k d], k row-major over the pooled grid"""
        x = F.silu(self.conv1(rearrange(latent, "b c h w -> b h w c")))
        x = F.adaptive_avg_pool2d(rearrange(x, "b h w c -> b c h w"), self.grid)
        x = self.conv2(rearrange(x, "b c h w -> b h w c"))
        return rearrange(self.conv3(F.silu(x)), "b h w d -> b (h w) d")


class ConcatBranch(nn.Module):
    """First-frame latent and frame-position planes as extra input channels of the UNet."""

    def __init__(self, unet: config.UNet, use: config.Use, *, backend: str):
        super().__init__()
        self.gain, self.planes = use.concat_gain, use.frame_planes
        self.later_frames = use.later_frames
        self.conv1 = Conv(unet.image_channels, unet.concat_hidden, 3, padding=1)
        self.conv2 = Conv(unet.concat_hidden, unet.concat_hidden, 3, padding=1)
        self.conv3 = Conv(unet.concat_hidden, unet.concat_channels, 3, padding=1)
        self.frames = (
            FrameEncoder(
                unet.concat_channels,
                layers=unet.concat_layers,
                heads=unet.concat_heads,
                head_width=unet.concat_head_width,
                dropout=unet.concat_dropout,
                backend=for_any_heads(backend),
            )
            if use.concat_temporal
            else None
        )

    def forward(self, latent: Tensor, frames: int) -> Tensor:
        """[b c h w] -> [b f h w c]"""
        x = frame_planes(latent, frames, self.planes)
        if self.later_frames != "position":
            x = without_position(x, self.later_frames)
        x = F.silu(per_frame(self.conv1, x))
        x = F.silu(per_frame(self.conv2, x))
        x = per_frame(self.conv3, x)
        if self.frames is not None:
            x = self.frames(x)
        return self.gain * x


def frame_planes(latent: Tensor, frames: int, rounding: str = "float32") -> Tensor:
    """The first-frame latent [b c h w] as frame 0, then constant planes k/(f-1), k = 1..f-1. -> [b f h w c]

    `rounding` is the precision in which k/(f-1) is rounded: "float32" (official) or "network" (diffusers).
    """
    first = rearrange(latent, "b c h w -> b 1 h w c")
    dtype = torch.float32 if rounding == "float32" else latent.dtype
    positions = torch.tensor([k / (frames - 1) for k in range(1, frames)], dtype=dtype, device=latent.device)
    b, _, h, w, c = first.shape
    planes = repeat(positions.to(latent.dtype), "f -> b f h w c", b=b, h=h, w=w, c=c)
    return torch.cat([first, planes], dim=1)


def without_position(planes: Tensor, later_frames: str) -> Tensor:
    """Planes [b f h w c] -> the "picture" again, or "zeros", in every frame after the first"""
    first = planes[:, :1]
    rest = first if later_frames == "picture" else torch.zeros_like(first)
    return torch.cat([first, rest.expand_as(planes[:, 1:])], dim=1)
