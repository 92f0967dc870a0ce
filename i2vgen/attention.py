"""One attention function with named backends, and the one attention module.

Axes: n independent sequences, m heads, t and k query and context tokens, d head width; b batch, f frames,
p pixels of a frame (h w flattened), c channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

BACKENDS = ("sdpa", "math")


def attend(q: Tensor, k: Tensor, v: Tensor, backend: str = "sdpa") -> Tensor:
    """softmax(q kᵀ / sqrt(d)) v for q [n m t d], k and v [n m k d] -> [n m t d]. Strided views are welcome.

    `math` is the oracle: the formula as written, softmax in at least float32. `sdpa` is PyTorch's fused
    kernel.
    """
    if backend == "sdpa":
        return F.scaled_dot_product_attention(q, k, v)
    if backend == "math":
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        wide = torch.promote_types(scores.dtype, torch.float32)
        return scores.softmax(-1, dtype=wide).to(v.dtype) @ v
    raise ValueError(f"attention backend {backend!r} does not exist; known are {', '.join(BACKENDS)}")


class Keys(NamedTuple):
    """Context tokens as a cross-attention reads them: keys and values [n m k d]."""

    k: Tensor
    v: Tensor

    def split(self, n: int) -> list[Keys]:
        return [Keys(k, v) for k, v in zip(self.k.split(n), self.v.split(n), strict=True)]


def lay_side_by_side(layers: Sequence[nn.Linear]) -> None:
    """Put the weights of layers of one input width into one storage, so that `joined` copies nothing."""
    sizes = [len(layer.weight) for layer in layers]
    together = joined([layer.weight.data for layer in layers])  # a view where they lie so already
    for layer, part in zip(layers, together.split(sizes), strict=True):
        layer.weight.data = part


def joined(weights: Sequence[Tensor]) -> Tensor:
    """Matrices of one width on top of each other: a view where they lie so already and no gradient flows."""
    if torch.compiler.is_compiling():  # it does not see where tensors lie
        return torch.cat(list(weights))
    first, end = weights[0], weights[0].storage_offset()
    for weight in weights:
        apart = weight.storage_offset() != end or not weight.is_contiguous() or weight.requires_grad
        if apart or weight.untyped_storage()._cdata != first.untyped_storage()._cdata:
            return torch.cat(list(weights))
        end += weight.numel()
    return first.detach().as_strided((sum(map(len, weights)), first.shape[1]), first.stride())


class Attention(nn.Module):
    """Multi-head attention: projections without bias, output projection with one; no mask, no positions."""

    fused = False  # q, k and v of self-attention by one matrix product; see `speed.py`

    def __init__(
        self,
        width: int,
        context_width: int,
        heads: int,
        head_width: int,
        *,
        dropout: float = 0.0,
        backend: str,
    ):
        super().__init__()
        inner = heads * head_width
        self.heads, self.backend = heads, backend
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(context_width, inner, bias=False)
        self.to_v = nn.Linear(context_width, inner, bias=False)
        self.to_out = nn.Linear(inner, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, context: Tensor | Keys | None = None) -> Tensor:
        """Sequences x [n t c] attend to context [n k d], or to themselves. -> [n t c]"""
        if context is None:
            q, k, v = (self.heads_first(y) for y in self.project(x))
        else:
            q = self.heads_first(self.to_q(x))
            k, v = context if isinstance(context, Keys) else self.keys(context)
        y = rearrange(attend(q, k, v, self.backend), "n m t d -> n t (m d)")
        return self.dropout(self.to_out(y))

    def over_frames(self, x: Tensor) -> Tensor:
        """Every pixel's frames attend to each other: x [b f p c] -> [b f p c].

        The projections run on x as it lies; only the kernel sees frames as tokens, through strided views.
        """
        q, k, v = (rearrange(y, "b f p (m d) -> b p m f d", m=self.heads) for y in self.project(x))
        # The fused kernels take one batch axis, and b and p have no common stride: one call per sample. What
        # they return lies as q does, so that a single sample needs no copy on its way back.
        samples = (attend(q[i], k[i], v[i], self.backend) for i in range(len(x)))
        done = [rearrange(y, "p m f d -> f p (m d)") for y in samples]
        return self.dropout(self.to_out(done[0][None] if len(done) == 1 else torch.stack(done)))

    def keys(self, context: Tensor) -> Keys:
        """Context tokens [n k d] -> what `forward` takes in their place, as often as it likes."""
        return Keys(self.heads_first(self.to_k(context)), self.heads_first(self.to_v(context)))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [... c] -> q, k, v, each [... c']"""
        layers = (self.to_q, self.to_k, self.to_v)
        # What a researcher put in a layer's place (an adapter, say) is more than its weight: it is called.
        if self.fused and all(type(layer) is nn.Linear for layer in layers):
            return F.linear(x, joined([layer.weight for layer in layers])).chunk(3, dim=-1)
        return tuple(layer(x) for layer in layers)

    def heads_first(self, y: Tensor) -> Tensor:
        return rearrange(y, "n t (m d) -> n m t d", m=self.heads)
