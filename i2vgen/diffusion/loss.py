"""Training: the noise that is added and the loss per sample. No loop and no optimiser."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from i2vgen.diffusion.sampler import Predict
from i2vgen.diffusion.schedule import Schedule

LossKind = Literal["mse", "l1", "charbonnier"]

CHARBONNIER_EPS = 1e-12  # under the root, so its slope at 0 stays finite
DIVERSITY_WEIGHT = 0.001
DIVERSITY_EPS = 1e-4  # bounds the diversity term at 10 for a video that stands still


def offset_noise(noise: Tensor, offset: Tensor, strength: float) -> Tensor:
    """noise [b c f h w], offset [b c f 1 1], both standard normal -> noise + strength * offset [b c f h w].

    The sum is both the noise added and the noise in the target. It is not normalised: its variance is
    1 + strength^2. ValueError for an offset of another shape (one per video instead of per frame broadcasts).
    """
    expected = (*noise.shape[:3], 1, 1)
    if tuple(offset.shape) != expected:
        raise ValueError(
            f"offset is {tuple(offset.shape)}; give {expected}: one value per sample, channel, frame"
        )
    return noise + strength * offset


def draw_offset_noise(
    shape: tuple[int, int, int, int, int], *, strength: float, generator: torch.Generator
) -> Tensor:
    """shape (b, c, f, h, w) -> float32 [b c f h w] on the generator's device. Draws noise, then offset."""
    noise = torch.randn(shape, generator=generator, device=generator.device)
    offset = torch.randn((*shape[:3], 1, 1), generator=generator, device=generator.device)
    return offset_noise(noise, offset, strength)


def training_loss(
    predict: Predict,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    schedule: Schedule,
    *,
    kind: LossKind = "mse",
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    diversity: bool = False,
) -> Tensor:
    """x0, noise [b c f h w], t int64 [b] -> loss per sample [b], in at least float32.

    Mean over all elements of the distance between prediction and target. `weight` [b] multiplies the loss
    of a sample. `mask` [b 1 f h w] multiplies prediction and target; the mean still runs over all elements.
    `diversity` adds 0.001 / (mean std over frames of the predicted x0 + 1e-4), which punishes still videos;
    it is NaN for eps prediction where abar is 0 (the official code has it for eps prediction only).
    ValueError for wrong shapes or kinds.
    """
    if diversity and x0.shape[2] < 2:
        raise ValueError("the diversity term is a spread over frames; it needs two or more, the batch has 1")
    if mask is not None and mask.shape != (x0.shape[0], 1, *x0.shape[2:]):
        expected = (x0.shape[0], 1, *x0.shape[2:])
        raise ValueError(
            f"mask is {tuple(mask.shape)}; give {expected}: one channel over batch, frames, pixels"
        )
    if weight is not None and weight.shape != t.shape:
        raise ValueError(f"weight is {tuple(weight.shape)}; give one number per sample, {tuple(t.shape)}")
    x = schedule.q_sample(x0, t, noise)
    out = predict(x, t)
    if out.shape != x0.shape:
        raise ValueError(
            f"the network returned {tuple(out.shape)} for latents {tuple(x0.shape)}; want the same"
        )
    out = out.to(torch.promote_types(out.dtype, torch.float32))
    target = schedule.target(x0, noise, t)
    if mask is None:
        loss = _distance(out, target, kind)
    else:
        loss = _distance(out * mask, target * mask, kind)
    if weight is not None:
        loss = loss * weight
    if diversity:
        loss = loss + _diversity(schedule.to_x0(out, x, t))
    return loss


def _distance(a: Tensor, b: Tensor, kind: LossKind) -> Tensor:
    """[b ...], [b ...] -> [b], the mean over everything but the batch."""
    difference = a - b
    if kind == "mse":
        distance = difference**2
    elif kind == "l1":
        distance = difference.abs()
    elif kind == "charbonnier":
        distance = torch.sqrt(difference**2 + CHARBONNIER_EPS)
    else:
        raise ValueError(f"loss kind is {kind!r}; choose mse, l1 or charbonnier")
    return distance.flatten(1).mean(dim=1)


def _diversity(x0: Tensor) -> Tensor:
    """x0 [b c f h w] -> [b]"""
    spread = x0.std(dim=2).flatten(1).mean(dim=1)
    return DIVERSITY_WEIGHT / (spread + DIVERSITY_EPS)
