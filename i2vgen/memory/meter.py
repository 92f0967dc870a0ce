"""Counts what a network does without doing it: FLOPs, bytes, operations and the peak of live activations.

Run the network under a `Meter` on the `meta` device, where tensors have shapes and no values. The figures
carry no noise, need no weights, and take seconds at any size. What is counted stands at `Meter`.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from i2vgen.fast import guard, kernels  # noqa: F401, the kernels for their operator

aten = torch.ops.aten


def empty(shape: Iterable[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


def empty_like(x: Tensor) -> Tensor:
    """PyTorch's for `meta` does this in Python and takes a hundred times as long."""
    dense = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1:
            if stride != dense:
                return torch.empty_like(x)
            dense *= size
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


@torch.library.custom_op("i2vgen_meter::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """softmax(scale q kᵀ + mask) v as one operation: q [... t d], k [... k d], v [... k e] -> [... t e]"""
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)


@attention.register_fake
def _attention_result(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    # The fused kernels of CPU and CUDA lay their result out as the queries lie.
    return empty_like(q) if v.shape[-1] == q.shape[-1] else empty((*q.shape[:-1], v.shape[-1]), q.dtype)


@torch.library.custom_op("i2vgen_meter::attention_backward", mutates_args=())
def attention_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError("the meter's attention has gradients on meta only")


@attention_backward.register_fake
def _(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return empty_like(q), empty_like(k), empty_like(v)


def _keep_for_backward(ctx, inputs, output) -> None:
    q, k, v, *_ = inputs
    ctx.save_for_backward(q, k, v, output)  # the fused kernels keep no scores, only a number per query more


def _attention_gradients(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return (*attention_backward(gradient, *ctx.saved_tensors), None, None)


attention.register_autograd(_attention_gradients, setup_context=_keep_for_backward)

ATTENTION = torch.ops.i2vgen_meter.attention.default
ATTENTION_BACKWARD = torch.ops.i2vgen_meter.attention_backward.default


# ---------------------------------------------------------------------------------------------------
# FLOPs: a multiplication and an addition are two. Each function takes the operation's arguments and result.


def _mm(out: Tensor, a: Tensor, *rest) -> int:
    return 2 * out.numel() * a.shape[-1]


def _addmm(out: Tensor, bias: Tensor, a: Tensor, *rest) -> int:
    return 2 * out.numel() * a.shape[-1]


def _convolution(
    out: Tensor, x: Tensor, weight: Tensor, bias, stride, padding, dilation, transposed: bool, *rest
) -> int:
    # Every value of the result (of the input, if transposed) meets one filter; zero padding counts as work.
    return 2 * (x if transposed else out).numel() * weight[0].numel()


def _attention(out: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest) -> int:
    return 2 * q[..., 0].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])


def _attention_backward(out: tuple[Tensor, ...], gradient: Tensor, q: Tensor, k: Tensor, *rest) -> int:
    return 10 * q.numel() * k.shape[-2]  # the scores once more, and four products


def _frame_attention(out: Tensor, q: Tensor, *rest) -> int:
    return 4 * q.numel() * q.shape[1]  # [b f p c]: every value meets f keys and f weights


# What is not here is bound by memory: a fused operation with a matrix product inside needs its line.
ARITHMETIC = {
    aten.mm.default: _mm,
    aten.bmm.default: _mm,
    aten.addmm.default: _addmm,
    aten.addmm_.default: _addmm,
    aten.baddbmm.default: _addmm,
    aten.convolution.default: _convolution,
    ATTENTION: _attention,
    ATTENTION_BACKWARD: _attention_backward,
    torch.ops.i2vgen.frame_attention.default: _frame_attention,
}


# PyTorch works these out in Python on `meta`, which is most of the time of a count. The simple cases stand
# here; None leaves a call, and every mistake, to PyTorch.


def _fits(y: Tensor, shape: torch.Size) -> bool:
    """Whether y is broadcast to a shape"""
    pairs = zip(y.shape[::-1], shape[::-1], strict=False)
    return y.ndim <= len(shape) and all(n in (1, wanted) for n, wanted in pairs)


def _in_place(x: Tensor, *rest) -> Tensor | None:
    return x if all(_fits(y, x.shape) for y in rest if isinstance(y, Tensor)) else None


def _one_by_one(x: Tensor) -> Tensor:
    return empty_like(x)


def _broadcast(x: Tensor, *rest: Tensor | float) -> Tensor | None:
    def keeps(y: Tensor | float) -> bool:
        """Whether it leaves x's shape and type as they are"""
        same = isinstance(y, Tensor) and y.dtype == x.dtype and _fits(y, x.shape)
        return same or isinstance(y, int | float)

    simple = x.is_contiguous() and x.is_floating_point() and all(map(keeps, rest))
    return empty(x.shape, x.dtype) if simple else None


def _product(a: Tensor, b: Tensor) -> Tensor | None:
    return empty((a.shape[0], b.shape[1]), a.dtype) if a.shape[1] == b.shape[0] else None


def _sum_with_product(bias: Tensor, a: Tensor, b: Tensor) -> Tensor | None:
    return _product(a, b) if _fits(bias, (a.shape[0], b.shape[1])) else None


def _sum_with_product_in_place(x: Tensor, a: Tensor, b: Tensor) -> Tensor | None:
    return x if a.shape[1] == b.shape[0] and x.shape == (a.shape[0], b.shape[1]) else None


def _convolution_result(
    x: Tensor, weight: Tensor, bias, stride, padding, dilation, transposed: bool, edges, groups: int
) -> Tensor | None:
    if transposed or x.ndim != weight.ndim or x.shape[1] != groups * weight.shape[1]:
        return None
    sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    pixels = [(size + 2 * edge - gap * (width - 1) - 1) // step + 1 for size, width, step, edge, gap in sizes]
    return empty((x.shape[0], weight.shape[0], *pixels), x.dtype) if min(pixels) > 0 else None


def _layer_norm_result(x: Tensor, shape: list[int], *rest) -> tuple[Tensor, Tensor, Tensor]:
    statistics = x.shape[: x.ndim - len(shape)] + (1,) * len(shape)
    wide = torch.promote_types(x.dtype, torch.float32)
    return empty(x.shape, x.dtype), empty(statistics, wide), empty(statistics, wide)


def _group_norm_result(x: Tensor, weight, bias, n: int, c, pixels, groups: int, eps) -> tuple[Tensor, ...]:
    return empty_like(x), empty((n, groups), x.dtype), empty((n, groups), x.dtype)


def _norm_gradients(x: Tensor, channels: Iterable[int], wanted: Iterable[bool]) -> tuple[Tensor | None, ...]:
    made = x, empty(channels, x.dtype), empty(channels, x.dtype)
    return tuple(one if asked else None for one, asked in zip(made, wanted, strict=True))


def _group_norm_gradients(
    gradient: Tensor, x: Tensor, mean, deviation, weight, n, channels: int, pixels, groups, wanted: list[bool]
) -> tuple[Tensor | None, ...]:
    return _norm_gradients(empty_like(x), (channels,), wanted)


def _layer_norm_gradients(
    gradient: Tensor, x: Tensor, shape: list[int], mean, deviation, weight, bias, wanted: list[bool]
) -> tuple[Tensor | None, ...]:
    return _norm_gradients(empty(x.shape, x.dtype), shape, wanted)


RESULTS = {
    aten.add_.Tensor: _in_place,
    aten.mul_.Tensor: _in_place,
    aten.silu_.default: _in_place,
    aten.gelu_.default: _in_place,
    aten.addmm_.default: _sum_with_product_in_place,
    aten.silu.default: _one_by_one,
    aten.gelu.default: _one_by_one,
    aten.add.Tensor: _broadcast,
    aten.sub.Tensor: _broadcast,
    aten.mul.Tensor: _broadcast,
    aten.pow.Tensor_Scalar: _broadcast,
    aten.addcmul.default: _broadcast,
    aten.mm.default: _product,
    aten.addmm.default: _sum_with_product,
    aten.convolution.default: _convolution_result,
    ATTENTION: _attention_result,
    aten.native_layer_norm.default: _layer_norm_result,
    aten.native_group_norm.default: _group_norm_result,
    aten.native_layer_norm_backward.default: _layer_norm_gradients,
    aten.native_group_norm_backward.default: _group_norm_gradients,
}

# One pass over the input for the statistics, one to normalise.
READS_TWICE = {aten.native_group_norm.default, torch.ops.i2vgen.group_norm.default}
# They claim memory and move nothing.
RESERVES = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}


@dataclass(frozen=True)
class Operation:
    """All calls of one operation together."""

    name: str  # as PyTorch spells it: aten.addmm.default
    arithmetic: bool  # else bound by memory
    calls: int = 0
    flops: int = 0
    bytes: int = 0


class Meter(TorchDispatchMode):
    """`with Meter() as m: network(x)`; then the properties below hold what ran inside.

    - FLOPs: those of `ARITHMETIC`, two for a multiplication with its addition.
    - Bytes: inputs and outputs of every operation, weights included; a broadcast input counts what is
      stored, not what it is expanded to. Group norm reads its input twice. Views are free, and no operations.
    - `memory_bound_bytes`: those of all operations but `ARITHMETIC`.
    - `peak`: the largest sum of bytes of tensors alive at once, exact to the storage. Counted are tensors
      made inside; weights are made before and do not count. Make inputs and caches inside, then `restart`.

    Attention is one operation, whatever PyTorch would split it into on this device; convolution and group
    norm keep the channels-last format that `meta` would lose. Workspaces inside a kernel are not seen.
    """

    def __init__(self):
        super().__init__()
        self._table: dict[str, Operation] = {}
        self._alive: dict[int, tuple[weakref.ref, int]] = {}
        self._attention = _AttentionAsOne()
        self.live = self.peak = 0  # bytes

    def restart(self) -> None:
        """Forget what was counted so far; what is alive stays in the sum."""
        self._table.clear()
        self.peak = self.live

    @property
    def table(self) -> list[Operation]:
        """Per operation, most bytes first."""
        return sorted(self._table.values(), key=lambda row: -row.bytes)

    @property
    def flops(self) -> int:
        return sum(row.flops for row in self._table.values())

    @property
    def bytes(self) -> int:
        return sum(row.bytes for row in self._table.values())

    @property
    def memory_bound_bytes(self) -> int:
        return sum(row.bytes for row in self._table.values() if not row.arithmetic)

    @property
    def operations(self) -> int:
        return sum(row.calls for row in self._table.values())

    def __enter__(self) -> Meter:
        guard.built()  # networks that the first forward of a process builds: not part of what is counted
        super().__enter__()
        self._attention.__enter__()
        return self

    def __exit__(self, *raised) -> None:
        self._attention.__exit__(*raised)
        super().__exit__(*raised)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if _only_views(func):
            return func(*args, **(kwargs or {}))
        quick = RESULTS.get(func)
        result = quick(*args) if quick and not kwargs and args[0].is_meta else None
        if result is None:
            result = func(*args, **(kwargs or {}))
        if func is aten.convolution.default:
            result = _keep_channels_last(result, *args[:2])
        if func is aten.native_group_norm.default:
            result = (_keep_channels_last(result[0], args[0]), *result[1:])
        inputs = _tensors([*args, *(kwargs or {}).values()])
        outputs = _tensors([result])
        known = {_storage(x) for x in inputs}
        made = [y for y in outputs if _storage(y) not in known]
        view = bool(outputs) and not made and not func._schema.is_mutable
        if not view and func not in RESERVES:
            self._count(func, args, result, inputs, outputs)
        self._hold(made)
        return result

    def _count(self, func, args, result, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        moved = sum(map(_stored, inputs + outputs))
        if func in READS_TWICE:
            moved += _stored(args[0])
        formula = ARITHMETIC.get(func)
        flops = formula(result, *args) if formula else 0
        row = self._table.get(str(func), Operation(str(func), formula is not None))
        self._table[row.name] = Operation(
            row.name, row.arithmetic, row.calls + 1, row.flops + flops, row.bytes + moved
        )

    def _hold(self, tensors: Iterable[Tensor]) -> None:
        """From now until their storage dies these belong to the live bytes."""
        for x in tensors:
            storage, key = x.untyped_storage(), _storage(x)
            if key not in self._alive and storage.nbytes():
                gone = weakref.ref(storage, lambda _, key=key: self._release(key))
                self._alive[key] = (gone, storage.nbytes())
                self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)

    def _release(self, key: int) -> None:
        self.live -= self._alive.pop(key)[1]


class _AttentionAsOne(TorchFunctionMode):
    """PyTorch splits attention into its score matrix before a dispatch mode sees it, so it is caught here."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return _plain_attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _plain_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
) -> Tensor:
    if dropout_p or is_causal or enable_gqa:
        raise ValueError(
            f"attention with dropout_p={dropout_p}, is_causal={is_causal}, enable_gqa={enable_gqa} came to "
            "the meter, which counts it with attn_mask and scale only; leave the others at their defaults"
        )
    return attention(query, key, value, attn_mask, scale)


@functools.cache
def _only_views(func) -> bool:
    """Whether all that an operation returns are views of what it is given"""
    returns = [one.alias_info for one in func._schema.returns]
    return bool(returns) and all(alias is not None and not alias.is_write for alias in returns)


def _keep_channels_last(out: Tensor, *inputs: Tensor) -> Tensor:
    """The result in the format that the CPU's and CUDA's kernels give: channels last if one input is."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(out.ndim)
    if not out.is_meta or last is None:
        return out
    # A tensor of one channel or of one pixel lies in both formats; PyTorch then takes the plain one.
    chosen = any(y.is_contiguous(memory_format=last) and not y.is_contiguous() for y in inputs)
    return out.contiguous(memory_format=last) if chosen else out


def _tensors(values: Iterable) -> list[Tensor]:
    """All tensors in arguments or results, lists looked into."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _stored(x: Tensor) -> int:
    """Bytes behind x: an axis that is expanded (stride 0) is stored once."""
    sizes = (size for size, stride in zip(x.shape, x.stride(), strict=True) if stride)
    return math.prod(sizes) * x.element_size()
