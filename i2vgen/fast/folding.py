"""Products of weights with weights, where a transformer is much wider inside than outside.

The first temporal transformer has its own width inside (512 in the released model), however narrow what
enters it. There a product that only widens can be folded into the next one, and one that only narrows into
the one before it: the same numbers up to rounding, a fraction of the arithmetic. The folded weights are made
anew in every call, so that changed ones are heard.

Axes: b batch, f frames, p pixels, c channels outside, i inside; d for q, k and v together.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from i2vgen.model.attention import Attention, Projected
from i2vgen.model.layers import FeedForward, untouched

ALIGNED = 8  # columns of a product are a multiple of this, as fast kernels of half precision ask


def pays(tokens: int, outside: int, inside: int) -> bool:
    """Folding takes as many products of one token's as `inside` tokens, and saves half of each at least."""
    return inside >= 2 * outside and tokens > inside


def foldable(proj_in: nn.Module, norm: nn.Module, attention: Attention) -> bool:
    """Whether all of it is as it was written, and nobody listens in between."""
    layers = (proj_in, attention.to_q, attention.to_k, attention.to_v)
    return untouched(norm, nn.LayerNorm) and all(untouched(layer, nn.Linear) for layer in layers)


def projected(
    x: Tensor, y: Tensor, proj_in: nn.Linear, norm: nn.LayerNorm, attention: Attention
) -> Projected:
    """x [b f p c] and y = proj_in(x) [b f p i] -> q, k and v of norm(y), each [b f p i].

    A layer norm takes the mean off, which is linear, and divides by a number for each token: that number
    needs y, all else is one matrix over x.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = torch.cat([layer.weight for layer in (attention.to_q, attention.to_k, attention.to_v)]).to(wide)
    entrance = torch.cat([proj_in.weight, proj_in.bias[:, None]], dim=1).to(wide)
    entrance = entrance - entrance.mean(0)
    folded = (weight * norm.weight.to(wide)) @ entrance  # [d, c + 1]: over x, and over 1
    constant = weight @ norm.bias.to(wide)
    matrix = torch.cat([folded, constant[:, None]], dim=1)

    scale = torch.rsqrt(torch.var(y.to(wide), dim=-1, correction=0, keepdim=True) + norm.eps)
    rows = torch.cat([x * scale, scale, torch.ones_like(scale)], dim=-1).to(x.dtype)
    room = (0, -rows.shape[-1] % ALIGNED)
    return Projected(*F.linear(F.pad(rows, room), F.pad(matrix, room).to(x.dtype)).chunk(3, dim=-1))


def joined(linear: nn.Linear, part: FeedForward) -> Tensor:
    """The last matrix of a part and the one behind it as one: rounded once, [c 4i]"""
    wide = torch.promote_types(linear.weight.dtype, torch.float32)
    return (linear.weight.to(wide) @ part.last.weight.to(wide)).to(linear.weight.dtype)
