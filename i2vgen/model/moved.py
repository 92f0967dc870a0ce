"""The picture, moved by a flow: what `use.output=moved` builds the frames from.

Axes: b batch, c channels, f frames, h w rows and columns of the latent or of a grid g times as fine.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from i2vgen.model.layers import Conv

FINE_CHANNELS, HIDDEN = 8, 64


class FinePicture(nn.Module):
    """Moves a latent on a grid g times as fine as itself, between two small networks learned with the UNet.

    There, a thing that is a few latent pixels wide is cut out along its edges. A shift by half a latent
    pixel, which the autoencoder encodes quite differently, is one by whole places.
    """

    def __init__(self, channels: int, grid: int):
        super().__init__()
        self.grid, fine = grid, FINE_CHANNELS * grid**2
        self.finer, self.coarser = convolutions(channels, fine), convolutions(fine, channels)

    def forward(self, picture: Tensor, flow: Tensor, weight: Tensor) -> Tensor:
        """picture [b c 1 h w], flow [b 2 f gh gw], weight [b 1 f gh gw] as for `moved` -> [b c f h w]"""
        g, dtype = self.grid, self.finer[0].weight.dtype
        fine = self.finer(rearrange(picture, "b c 1 h w -> b h w c").to(dtype))
        carried = moved(spread(rearrange(fine, "b h w c -> b c 1 h w"), g), flow, weight)
        carried = rearrange(carried, "b c f (h p) (w q) -> (b f) h w (c p q)", p=g, q=g)
        out = self.coarser(carried.to(dtype))
        return rearrange(out, "(b f) h w c -> b c f h w", b=len(picture)).to(picture.dtype)


def convolutions(width_in: int, width: int) -> nn.Sequential:
    """[n h w c] -> [n h w c']"""
    sides = (width_in, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, width)
    first, second, third = (Conv(a, b, 3, padding=1) for a, b in sides)
    return nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), third)


def spread(x: Tensor, grid: int) -> Tensor:
    """[b c*g*g f h w] -> [b c f gh gw]: the channels of a latent pixel are g x g places of a finer grid."""
    return rearrange(x, "b (c p q) f h w -> b c f (h p) (w q)", p=grid, q=grid)


def moved(picture: Tensor, flow: Tensor, weight: Tensor) -> Tensor:
    """The pixels of the picture [b c 1 h w], each moved to where the flow of a frame says -> [b c f h w].

    flow [b 2 f h w]: how far a pixel moves right and down, in halves of a frame's width and height,
    so that it means the same at every size. It lands on up to four pixels, bilinearly. Where several land,
    they are averaged by exp(weight), [b 1 f h w]; where none or little lands, the surroundings fill in.
    """
    pixels, share = landed(picture, flow, weight)
    result = filled(pixels, share)
    return rearrange(result, "(b f) c h w -> b c f h w", b=len(picture)).to(picture.dtype)


def landed(picture: Tensor, flow: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """As `moved`, unfilled -> pixels [(b f) c h w] times the share [(b f) 1 h w] of each that is there."""
    c, h, w = picture.shape[1], *picture.shape[-2:]
    precise = torch.float64 if flow.dtype == torch.float64 else torch.float32
    flow, weight = (rearrange(one.to(precise), "b c f h w -> (b f) c (h w)") for one in (flow, weight))
    rows, columns = (torch.arange(n, device=flow.device, dtype=precise) for n in (h, w))
    x = columns.repeat(h) + flow[:, 0] * (w / 2)
    y = rows.repeat_interleave(w) + flow[:, 1] * (h / 2)
    pixels = rearrange(
        picture.to(precise).expand(-1, -1, len(flow) // len(picture), -1, -1), "b c f h w -> (b f) c (h w)"
    )
    pixels = torch.cat([pixels, torch.ones_like(weight)], dim=1) * weight.exp()
    left, above, total = x.floor(), y.floor(), torch.zeros_like(pixels)
    for column, across in ((left, left + 1 - x), (left + 1, x - left)):
        for row, down in ((above, above + 1 - y), (above + 1, y - above)):
            inside = (column >= 0) & (column < w) & (row >= 0) & (row < h)
            place = row.clamp(0, h - 1).long() * w + column.clamp(0, w - 1).long()
            share = (across * down * inside)[:, None]
            total = total.scatter_add(2, place[:, None].expand_as(pixels), pixels * share)
    total = rearrange(total / total[:, c:].clamp(min=1), "n c (h w) -> n c h w", h=h)
    return total[:, :c], total[:, c:]


def filled(x: Tensor, share: Tensor) -> Tensor:
    """What is missing in x [n c h w], from around it; share [n 1 h w] of each place is there, and only that.

    Pull-push: halved until one place is left, where all that is there is averaged; then each size fills
    its gaps with what the next smaller one has there (Gortler et al. 1996, section 3.6).
    """
    h, w = x.shape[-2:]
    if h == w == 1:
        return x / share.clamp(min=1e-6)
    both = F.avg_pool2d(torch.cat([x, share], dim=1), 2, ceil_mode=True, count_include_pad=False)
    known = both[:, -1:]  # of the four: one that is there counts as if all were
    kept = (4 * known).clamp(max=1) / known.clamp(min=1e-6)
    below = filled(both[:, :-1] * kept, known * kept)
    return x + (1 - share) * F.interpolate(below, size=(h, w), mode="bilinear")
