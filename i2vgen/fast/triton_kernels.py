"""The Triton kernels behind `kernels.py`. Importing this needs Triton; nothing here runs at import.

All tensors are contiguous with channels last, unless strides are given. Offsets are 64 bits wide: a
feed-forward of two videos at full size passes 2^31 elements. Sums run in `WIDE`, at least float32.

Axes: n independent samples, p positions of a sample, c channels; b batch, f frames, m heads, d head width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, CHANNELS = 64, 64  # a tile; 64 channels of two bytes are one line of the cache
PROGRAMS = 2048  # enough to fill a large GPU several times over
GATE = 1024  # values that one program of `geglu` writes


# ---------------------------------------------------------------------------------------------------
# Group norm, in three steps: moments of every channel over a run of positions, of every group, the result.


@triton.jit
def channel_moments(
    x, means, squares, p, c, runs, run, WIDE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    """x [n p c] -> mean and sum of squared deviations of each run of positions, both [n runs c]."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(c, CHANNELS)
    block, part = program % blocks, program // blocks
    first = (part % runs) * run
    last = tl.minimum(first + run, p)
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    mean = tl.zeros([CHANNELS], WIDE)
    square = tl.zeros([CHANNELS], WIDE)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < last)[:, None] & (channel < c)[None, :]
        at = ((part // runs) * p + row)[:, None] * c + channel[None, :]
        tile = tl.load(x + at, mask=inside, other=0).to(WIDE)
        seen = (start - first).to(WIDE)
        new = (tl.minimum(start + ROWS, last) - start).to(WIDE)
        tile_mean = tl.sum(tile, 0) / new
        deviation = tl.where(inside, tile - tile_mean[None, :], 0.0)
        # Two sets of moments as one (Chan et al. 1983): no difference of large sums.
        delta = tile_mean - mean
        mean += delta * (new / (seen + new))
        square += tl.sum(deviation * deviation, 0) + delta * delta * (seen * new / (seen + new))
    tl.store(means + part * c + channel, mean, mask=channel < c)
    tl.store(squares + part * c + channel, square, mask=channel < c)


@triton.jit
def group_moments(
    means, squares, shift, centre, scale, p, c, runs, run, width, per_shift,
    EPS: tl.constexpr, SHIFTED: tl.constexpr, WIDE: tl.constexpr, RUNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """[n runs c] twice, shift [m c] -> mean and 1 / deviation of groups of `width` channels, [n groups]."""
    program = tl.program_id(0).to(tl.int64)
    n, group = program // (c // width), program % (c // width)
    channel = group * width + tl.arange(0, WIDTH)
    known = tl.arange(0, WIDTH) < width
    moved = tl.zeros([WIDTH], WIDE)
    if SHIFTED:
        moved = tl.load(shift + (n // per_shift) * c + channel, mask=known, other=0).to(WIDE)
    size = (tl.zeros([], WIDE) + p) * width
    total = tl.zeros([RUNS, WIDTH], WIDE)
    for start in range(0, runs, RUNS):
        part = start + tl.arange(0, RUNS)
        inside = (part < runs)[:, None] & known[None, :]
        count = (tl.minimum((part + 1) * run, p) - part * run).to(WIDE)[:, None]
        at = (n * runs + part)[:, None] * c + channel[None, :]
        mean = tl.load(means + at, mask=inside, other=0) + moved[None, :]
        total += tl.where(inside, mean * count, 0.0)
    middle = tl.sum(tl.sum(total, 1), 0) / size
    total = tl.zeros([RUNS, WIDTH], WIDE)
    for start in range(0, runs, RUNS):
        part = start + tl.arange(0, RUNS)
        inside = (part < runs)[:, None] & known[None, :]
        count = (tl.minimum((part + 1) * run, p) - part * run).to(WIDE)[:, None]
        at = (n * runs + part)[:, None] * c + channel[None, :]
        delta = tl.load(means + at, mask=inside, other=0) + moved[None, :] - middle
        square = tl.load(squares + at, mask=inside, other=0)
        total += tl.where(inside, square + delta * delta * count, 0.0)
    variance = tl.sum(tl.sum(total, 1), 0) / size
    tl.store(centre + program, middle)
    tl.store(scale + program, 1.0 / tl.sqrt(variance + EPS))


@triton.jit
def normalise(
    x, y, centre, scale, weight, bias, shift, p, c, runs, run, width, per_shift,
    SHIFTED: tl.constexpr, SILU: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(c, CHANNELS)
    block, part = program % blocks, program // blocks
    n, first = part // runs, (part % runs) * run
    last = tl.minimum(first + run, p)
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < c
    group = n * (c // width) + channel // width
    middle = tl.load(centre + group, mask=known, other=0)
    if SHIFTED:
        middle -= tl.load(shift + (n // per_shift) * c + channel, mask=known, other=0).to(WIDE)
    factor = tl.load(scale + group, mask=known, other=0)
    factor *= tl.load(weight + channel, mask=known, other=0).to(WIDE)
    offset = tl.load(bias + channel, mask=known, other=0).to(WIDE)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < last)[:, None] & known[None, :]
        at = (n * p + row)[:, None] * c + channel[None, :]
        tile = tl.load(x + at, mask=inside, other=0).to(WIDE)
        tile = (tile - middle[None, :]) * factor[None, :] + offset[None, :]
        if SILU:
            tile = tile / (1.0 + tl.exp(-tile))
        tl.store(y + at, tile.to(y.dtype.element_ty), mask=inside)


def group_norm(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool, shift: Tensor | None
) -> Tensor:
    n, c = x.shape[0], x.shape[-1]
    p = x[0, ..., 0].numel()
    y = torch.empty_like(x)
    blocks, width = triton.cdiv(c, CHANNELS), c // groups
    runs = min(triton.cdiv(p, ROWS), triton.cdiv(PROGRAMS, n * blocks))
    run = triton.cdiv(triton.cdiv(p, runs), ROWS) * ROWS
    runs = triton.cdiv(p, run)
    wide = torch.promote_types(x.dtype, torch.float32)
    means, squares = x.new_empty(2, n, runs, c, dtype=wide)
    centre, scale = x.new_empty(2, n, groups, dtype=wide)
    kind = {"WIDE": tl.float64 if wide == torch.float64 else tl.float32}
    tile = kind | {"ROWS": ROWS, "CHANNELS": CHANNELS}
    shifted = {"SHIFTED": shift is not None}
    per_shift = 1 if shift is None else n // len(shift)
    shift = x if shift is None else shift  # any pointer; it is not read
    sizes = p, c, runs, run
    channel_moments[(n * runs * blocks,)](x, means, squares, *sizes, **tile)
    group_moments[(n * groups,)](
        means, squares, shift, centre, scale, *sizes, width, per_shift,
        EPS=eps, RUNS=32, WIDTH=triton.next_power_of_2(width), **shifted, **kind,
    )  # fmt: skip
    normalise[(n * runs * blocks,)](
        x, y, centre, scale, weight, bias, shift, *sizes, width, per_shift, SILU=silu, **shifted, **tile
    )
    return y


# ---------------------------------------------------------------------------------------------------
# The rest: one program per row or part of a row


@triton.jit
def gate(x, y, c, WIDE: tl.constexpr, GATE: tl.constexpr):
    """x [n 2c] -> y [n c]: the first half times GELU of the second."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(c, GATE)
    row, channel = program // blocks, (program % blocks) * GATE + tl.arange(0, GATE)
    inside = channel < c
    value = tl.load(x + row * 2 * c + channel, mask=inside, other=0).to(WIDE)
    opening = tl.load(x + row * 2 * c + c + channel, mask=inside, other=0).to(WIDE)
    opening = 0.5 * opening * (1.0 + tl.erf(opening * 0.7071067811865476))
    tl.store(y + row * c + channel, (value * opening).to(y.dtype.element_ty), mask=inside)


def geglu(x: Tensor) -> Tensor:
    c = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], c)
    size = min(GATE, triton.next_power_of_2(c))
    wide = tl.float64 if x.dtype == torch.float64 else tl.float32
    gate[(y.numel() // c * triton.cdiv(c, size),)](x, y, c, WIDE=wide, GATE=size)
    return y


@triton.jit
def norm_rows(
    x, shift, weight, bias, y, rows, c,
    EPS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """x [rows c], shift [c] -> y [rows c]: layer norm of x + shift."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)
    known = channel < c
    inside = (row < rows)[:, None] & known[None, :]
    at = row[:, None] * c + channel[None, :]
    tile = tl.load(x + at, mask=inside, other=0).to(WIDE)
    tile += tl.load(shift + channel, mask=known, other=0).to(WIDE)[None, :]
    mean = tl.sum(tile, 1) / c
    tile = tl.where(inside, tile - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(tile * tile, 1) / c + EPS)
    factor = tl.load(weight + channel, mask=known, other=0).to(WIDE)
    offset = tl.load(bias + channel, mask=known, other=0).to(WIDE)
    tile = tile * scale[:, None] * factor[None, :] + offset[None, :]
    tl.store(y + at, tile.to(y.dtype.element_ty), mask=inside)


def layer_norm(x: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    c, y = x.shape[-1], torch.empty_like(x)
    rows, channels = x.numel() // c, triton.next_power_of_2(c)
    at_once = max(1, 2048 // channels)
    wide = tl.float64 if x.dtype == torch.float64 else tl.float32
    norm_rows[(triton.cdiv(rows, at_once),)](
        x, shift, weight, bias, y, rows, c, EPS=eps, WIDE=wide, ROWS=at_once, CHANNELS=channels
    )
    return y


@triton.jit
def attend_frames(
    q, k, v, y, of_b, of_f, of_p, f, p, m, d,
    SCALE: tl.constexpr, WIDE: tl.constexpr, FRAMES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """q, k, v [b f p (m d)] with these strides -> y [b f p (m d)]; one program for a pixel and a head."""
    program = tl.program_id(0).to(tl.int64)
    head, pixel, sample = program % m, program // m % p, program // m // p
    frame, lane = tl.arange(0, FRAMES), tl.arange(0, WIDTH)
    known = frame < f
    inside = known[:, None] & (lane < d)[None, :]
    column = (head * d + lane)[None, :]
    at = sample * of_b + pixel * of_p + frame.to(tl.int64)[:, None] * of_f + column
    queries = tl.load(q + at, mask=inside, other=0)
    keys = tl.load(k + at, mask=inside, other=0)
    values = tl.load(v + at, mask=inside, other=0)
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee", out_dtype=WIDE) * SCALE
    scores = tl.where(known[None, :], scores, float("-inf"))
    scores = tl.exp(scores - tl.max(scores, 1)[:, None])
    total = tl.sum(scores, 1)
    out = tl.dot(scores.to(values.dtype), values, input_precision="ieee", out_dtype=WIDE) / total[:, None]
    at = ((sample * f + frame)[:, None] * p + pixel) * m * d + column
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)


def frame_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    b, f, p, c = q.shape
    if not q.stride() == k.stride() == v.stride() or q.stride(-1) != 1:
        q, k, v = (x.contiguous() for x in (q, k, v))
    d, y = c // heads, q.new_empty(b, f, p, c)
    wide = tl.float64 if q.dtype == torch.float64 else tl.float32
    frames, width = (max(16, triton.next_power_of_2(size)) for size in (f, d))  # a product needs 16 rows
    attend_frames[(b * p * heads,)](
        q, k, v, y, *q.stride()[:3], f, p, heads, d,
        SCALE=d**-0.5, WIDE=wide, FRAMES=frames, WIDTH=width, num_warps=1,
    )  # fmt: skip
    return y
