"""Fused operations on channels-last tensors: one pass over the memory where PyTorch's own take several.

Each has two forms with the same numbers: Triton on CUDA (`triton_kernels.py`), PyTorch's own operations
everywhere else. To PyTorch each is one operator, so `torch.compile` keeps it whole and a meter counts it as
one. They have no gradients.

Axes: n independent samples, c channels; b batch, f frames, p pixels, m heads, d head width.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

MAX_FRAMES = 32  # of `frame_attention`, which holds all of them in one program's registers


def available(device: torch.device) -> bool:
    """Whether Triton runs on this device without being asked for by name: on CUDA, if it is installed."""
    return device.type == "cuda" and installed()


def check(device: torch.device) -> None:
    """ValueError if kernels were asked for by name and cannot run on this device."""
    if not installed():
        raise ValueError(
            "runtime.savings names kernels, which need the package triton (pip install triton); "
            "runtime.savings=all leaves out what is not there"
        )
    if device.type not in ("cuda", "meta") and not interpreted():
        raise ValueError(
            f"runtime.savings names kernels, which need a CUDA device, but this one is {device.type}; "
            "runtime.savings=all leaves out what cannot run"
        )


@functools.cache
def installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU, as tests make it do."""
    if not installed():
        return False
    import triton

    from i2vgen.fast import triton_kernels

    return not isinstance(triton_kernels.gate, triton.JITFunction)


def by_triton(x: Tensor) -> bool:
    return installed() if x.is_cuda else interpreted()


@torch.library.custom_op("i2vgen::group_norm", mutates_args=())
def group_norm(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool, shift: Tensor | None
) -> Tensor:
    """SiLU or nothing of the group norm of x + shift: x [n ... c], shift [m c] -> like x.

    Statistics per n and group; n / m neighbours share a row of `shift`.
    """
    if by_triton(x):
        from i2vgen.fast import triton_kernels

        return triton_kernels.group_norm(x.contiguous(), groups, weight, bias, eps, silu, shift)
    y = x if shift is None else shifted(x, shift)
    y = F.group_norm(rearrange(y.flatten(1, -2), "n p c -> n c p"), groups, weight, bias, eps)
    y = rearrange(y, "n c p -> n p c").contiguous().view(x.shape)
    return F.silu(y) if silu else y


def shifted(x: Tensor, shift: Tensor) -> Tensor:
    """x [n ... c] + shift [m c], each row of it for n / m neighbours"""
    rows = x.unflatten(0, (len(shift), -1))
    return (rows + shift.view(len(shift), *[1] * (x.ndim - 1), -1)).view(x.shape)


@torch.library.custom_op("i2vgen::geglu", mutates_args=())
def geglu(x: Tensor) -> Tensor:
    """[... 2c] -> [... c]: the first half times GELU (erf) of the second."""
    if by_triton(x):
        from i2vgen.fast import triton_kernels

        return triton_kernels.geglu(x.contiguous())
    value, opening = x.chunk(2, dim=-1)
    return value * F.gelu(opening)


@torch.library.custom_op("i2vgen::layer_norm", mutates_args=())
def layer_norm(x: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm of x [... c] + shift [c] -> like x."""
    if by_triton(x):
        from i2vgen.fast import triton_kernels

        return triton_kernels.layer_norm(x.contiguous(), shift, weight, bias, eps)
    return F.layer_norm(x + shift, weight.shape, weight, bias, eps)


@torch.library.custom_op("i2vgen::frame_attention", mutates_args=())
def frame_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Every pixel's frames attend to each other, up to `MAX_FRAMES`: q, k, v [b f p (m d)] -> same, dense."""
    if by_triton(q):
        from i2vgen.fast import triton_kernels

        return triton_kernels.frame_attention(q, k, v, heads)
    b, _, p, _ = q.shape
    q, k, v = (rearrange(x, "b f p (m d) -> (b p) m f d", m=heads) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v)
    return rearrange(y, "(b p) m f d -> b f p (m d)", b=b, p=p).contiguous()


@group_norm.register_fake
def _(x: Tensor, groups, weight, bias, eps, silu, shift) -> Tensor:
    return x.new_empty(x.shape)


@geglu.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@layer_norm.register_fake
def _(x: Tensor, shift, weight, bias, eps) -> Tensor:
    return x.new_empty(x.shape)


@frame_attention.register_fake
def _(q: Tensor, k, v, heads) -> Tensor:
    return q.new_empty(q.shape)
