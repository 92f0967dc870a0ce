"""One attention function with named backends, and the one attention module.

Axes: n independent sequences, m heads, t and k query and context tokens, d head width; b batch, f frames,
p pixels of a frame (h w flattened), c channels.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from i2vgen.fast import kernels
from i2vgen.model.layers import add_product, untouched

SDPA_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
BACKENDS = ("sdpa", "math", "auto", *SDPA_KERNELS, "flash3")
NEEDS = {  # what a backend that may be missing needs
    "flash": "a CUDA GPU of compute capability 8.0 or newer with float16 or bfloat16",
    "cudnn": "a CUDA GPU of compute capability 8.0 or newer with cuDNN 9 and float16 or bfloat16",
    "efficient": "a CUDA GPU",
    "flash3": "the package flash_attn_interface (FlashAttention-3), a Hopper GPU, float16 or bfloat16",
}
# Functions of one's own by name, with the arguments of `attend`; a module's `backend` names one of them.
FUNCTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {}
# CUDA counts a kernel's batch in 16 bits on some of its axes; older PyTorch fails beyond.
MAX_SEQUENCES = 65_535


def attend(q: Tensor, k: Tensor, v: Tensor, backend: str = "sdpa") -> Tensor:
    """softmax(q kᵀ / sqrt(d)) v for q [n m t d], k and v [n m k d] -> [n m t d]. Strided views are welcome.

    `math` is the oracle: the formula as written, softmax in at least float32. `sdpa` is the fused kernel of
    PyTorch's choice, as is `auto` where nothing was measured; `flash`, `cudnn` and `efficient` are one of
    these by name, `flash3` is FlashAttention-3.
    """
    if len(q) > MAX_SEQUENCES and backend not in FUNCTIONS:
        out = torch.empty_like(q)
        pieces = (x.split(MAX_SEQUENCES) for x in (out, q, k, v))
        for part, *inputs in zip(*pieces, strict=True):
            part.copy_(attend(*inputs, backend))
        return out
    if backend in FUNCTIONS:
        return FUNCTIONS[backend](q, k, v)
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
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(*(rearrange(x, "n m t d -> n t m d") for x in (q, k, v)))
    out = out[0] if isinstance(out, tuple) else out  # some versions return the softmax's sums too
    return rearrange(out, "n t m d -> n m t d")


def works(backend: str, like: Tensor) -> bool:
    """Whether a backend is there for tensors like this one: it is tried."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # PyTorch says why not, kernel by kernel
        try:
            attend(like, like, like, backend)
        except (RuntimeError, ImportError):
            return False
    return True


def for_any_heads(backend: str) -> str:
    """A backend for heads of very few channels or very many, which the kernels by name do not take."""
    return "math" if backend == "math" else "sdpa"


class Keys(NamedTuple):
    """Context tokens as a cross-attention reads them: keys and values [n m k d].

    What stands `beside` them is read by a softmax of its own and added; see `extra_tokens.py`.
    """

    k: Tensor
    v: Tensor
    beside: Keys | None = None

    def split(self, n: int) -> list[Keys]:
        parts = [Keys(k, v) for k, v in zip(self.k.split(n), self.v.split(n), strict=True)]
        if self.beside is None:
            return parts
        return [p._replace(beside=b) for p, b in zip(parts, self.beside.split(n), strict=True)]

    def fits(self, other: Keys) -> bool:
        """Whether both can be one batch."""
        if self.k.shape[1:] != other.k.shape[1:] or (self.beside is None) != (other.beside is None):
            return False
        return self.beside is None or self.beside.fits(other.beside)


def one_batch(keys: Sequence[Keys]) -> Keys:
    """Keys that fit each other, one below the other: [(n b) m k d]"""
    k, v = (torch.cat(parts) for parts in zip(*(one[:2] for one in keys), strict=True))
    return Keys(k, v, None if keys[0].beside is None else one_batch([one.beside for one in keys]))


class Projected(NamedTuple):
    """What a self-attention makes of its input first, where that has been made already."""

    q: Tensor
    k: Tensor
    v: Tensor


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
        return self.dropout(self.to_out(self.inside(x, context)))

    def add_to(self, y: Tensor, *inputs: Tensor | Keys) -> None:
        """y [... c] += what `forward` makes of `inputs` but for the last bias; see `stream.py`."""
        add_product(y, self.inside(*inputs), self.to_out.weight)

    @property
    def last(self) -> nn.Module:
        return self.to_out

    def inside(self, x: Tensor, context: Tensor | Keys | None = None) -> Tensor:
        """What the output projection reads: [n t c] -> [n t (m d)]"""
        beside = None
        if context is None:
            q, k, v = (self.heads_first(y) for y in self.project(x))
        else:
            q = self.heads_first(self.to_q(x))
            k, v, beside = context if isinstance(context, Keys) else self.keys(context)
        y = attend(q, k, v, self.backend)
        while beside is not None:
            y = y + attend(q, beside.k, beside.v, self.backend)
            beside = beside.beside
        return rearrange(y, "n m t d -> n t (m d)")

    def keys(self, context: Tensor) -> Keys:
        """Context tokens [n k d] -> what `forward` takes in their place, as often as it likes."""
        return Keys(self.heads_first(self.to_k(context)), self.heads_first(self.to_v(context)))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [... c] -> q, k, v, each [... c']"""
        layers = (self.to_q, self.to_k, self.to_v)
        # What a researcher put in a layer's place (an adapter, say) is more than its weight: it is called.
        if self.fused and all(untouched(layer, nn.Linear) for layer in layers):
            return F.linear(x, joined([layer.weight for layer in layers])).chunk(3, dim=-1)
        return tuple(layer(x) for layer in layers)

    def heads_first(self, y: Tensor) -> Tensor:
        return rearrange(y, "n t (m d) -> n m t d", m=self.heads)


class FrameAttention(Attention):
    """Every pixel's frames attend to each other: x [b f p c] -> [b f p c].

    The projections run on x as it lies; only attention itself sees frames as tokens, through strided views.
    """

    kernel = False  # without gradients: short clips by a kernel of their own; see `speed.py`

    def inside(self, x: Tensor | Projected) -> Tensor:
        """[b f p c] -> [b f p (m d)]"""
        q, k, v = x if isinstance(x, Projected) else self.project(x)
        short = q.shape[1] <= kernels.MAX_FRAMES and self.backend not in FUNCTIONS
        if self.kernel and short and not torch.is_grad_enabled():
            return kernels.frame_attention(q, k, v, self.heads)
        if len(q) > 1 and q.device.type not in ("cpu", "meta"):
            # A call per sample would keep a GPU waiting for the CPU; it minds the copies less.
            b, m = len(q), self.heads
            q, k, v = (rearrange(y, "b f p (m d) -> (b p) m f d", m=m) for y in (q, k, v))
            return rearrange(attend(q, k, v, self.backend), "(b p) m f d -> b f p (m d)", b=b)
        q, k, v = (rearrange(y, "b f p (m d) -> b p m f d", m=self.heads) for y in (q, k, v))
        # The fused kernels take one batch axis, and b and p have no common stride: one call per sample. What
        # they return lies as q does, so that a single sample needs no copy on its way back.
        # `unbind`, not an index: its gradient is one stack instead of a zero-filled batch for every sample.
        samples = zip(q.unbind(), k.unbind(), v.unbind(), strict=True)
        samples = (attend(*sample, self.backend) for sample in samples)
        done = [rearrange(y, "p m f d -> f p (m d)") for y in samples]
        return done[0][None] if len(done) == 1 else torch.stack(done)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.to_out(self.inside(x)))
