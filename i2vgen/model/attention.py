"""One attention function with named backends, and the attention modules.

Axes: n independent sequences, m heads, t and k query and context tokens, d head width; b batch, f frames,
p pixels of a frame (h w flattened), c channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

SDPA_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
BACKENDS = ("sdpa", "math", "auto", *SDPA_KERNELS, "flash3")
# CUDA kernels count some batch axes in 16 bits, and older versions of PyTorch fail beyond that.
MAX_SEQUENCES = 65_535

AttentionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [n m t d], k and v [n m k d] -> [n m t d]


def attend(q: Tensor, k: Tensor, v: Tensor, backend: str | AttentionFunction = "sdpa") -> Tensor:
    """softmax(q kᵀ / sqrt(d)) v for q [n m t d], k and v [n m k d] -> [n m t d]. Inputs may be strided views.

    `math` is the reference: the formula as written, with the softmax in at least float32. `sdpa` is the
    fused kernel that PyTorch chooses, and so is `auto` where nothing was measured. `flash`, `cudnn` and
    `efficient` name one of those kernels, `flash3` is FlashAttention-3. A function is called with q, k and v.
    """
    if callable(backend):
        return backend(q, k, v)
    if len(q) > MAX_SEQUENCES:
        out = torch.empty_like(q)
        for part, *chunk in zip(*(x.split(MAX_SEQUENCES) for x in (out, q, k, v)), strict=True):
            part.copy_(attend(*chunk, backend))
        return out
    if backend in ("sdpa", "auto"):
        return F.scaled_dot_product_attention(q, k, v)
    if backend in SDPA_KERNELS:
        with sdpa_kernel(SDPA_KERNELS[backend]):
            return F.scaled_dot_product_attention(q, k, v)
    if backend == "flash3":
        return flash3(q, k, v)
    if backend == "math":
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        wide = torch.promote_types(scores.dtype, torch.float32)
        return scores.softmax(-1, dtype=wide).to(v.dtype) @ v
    raise ValueError(f"attention backend {backend!r} does not exist; known are {', '.join(BACKENDS)}")


def flash3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention-3 with the arguments of `attend`; ImportError without the package."""
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(*(rearrange(x, "n m t d -> n t m d") for x in (q, k, v)))
    out = out[0] if isinstance(out, tuple) else out  # some versions also return the softmax's normaliser
    return rearrange(out, "n t m d -> n m t d")


def for_any_heads(backend: str) -> str:
    """A backend for heads of very few or very many channels, which the named kernels do not support."""
    return "math" if backend == "math" else "sdpa"


class Attention(nn.Module):
    """Multi-head attention: projections without bias, output projection with one; no mask, no positions.

    `backend` is the name of one of `attend`'s backends, or a function of your own.
    """

    def __init__(
        self,
        width: int,
        context_width: int,
        heads: int,
        head_width: int,
        *,
        dropout: float = 0.0,
        backend: str | AttentionFunction,
    ):
        super().__init__()
        inner = heads * head_width
        self.heads, self.backend = heads, backend
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(context_width, inner, bias=False)
        self.to_v = nn.Linear(context_width, inner, bias=False)
        self.to_out = nn.Linear(inner, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Sequences x [n t c] attend to context [n k d], or to themselves. -> [n t c]"""
        context = x if context is None else context
        q, k, v = (self.split_heads(y) for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        y = rearrange(attend(q, k, v, self.backend), "n m t d -> n t (m d)")
        return self.dropout(self.to_out(y))

    def split_heads(self, y: Tensor) -> Tensor:
        return rearrange(y, "n t (m d) -> n m t d", m=self.heads)


class FrameAttention(Attention):
    """Every pixel's frames attend to each other."""

    def forward(self, x: Tensor) -> Tensor:
        """[b f p c] -> same"""
        b = len(x)
        y = super().forward(rearrange(x, "b f p c -> (b p) f c").contiguous())
        return rearrange(y, "(b p) f c -> b f p c", b=b)
