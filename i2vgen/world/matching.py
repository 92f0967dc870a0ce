"""Recovers the motions of a clip of `pictures` by matching the known cut-outs, and scores their shape.

The reader knows what the first frame shows (which thing is where), but not the requested motion. Each thing
is tracked by least squares: its cut-out, drawn at a position, size and angle over the first frame's
background, is compared with the next frame, and the four numbers are improved by Gauss-Newton steps with
robust weights. The camera is tracked as in `reading`, outside the things, and a thing's motion is measured
relative to it. Motions and thresholds are those of `reading`.

Axes: f frames, c channels, h w pixel rows and columns, n candidates.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from i2vgen.world import drawing, reading, things
from i2vgen.world.drawing import Facts
from i2vgen.world.pictures import PictureWorld
from i2vgen.world.reading import Reading, ThingReading
from i2vgen.world.things import Cutout

COARSE = 64  # larger frames are reduced to a shorter side of 64 to 127 pixels
STEPS = 5  # Gauss-Newton steps per frame
DELTA = torch.tensor([0.01, 0.01, 0.02, 0.03])  # of x, y, log radius and angle, for derivatives
DOUBT = torch.tensor([0.10, 0.10, 0.10, 0.25])  # standard deviations of a step from frame to frame
MOST = torch.tensor([0.06, 0.06, 0.08, 0.20])  # of one Gauss-Newton step
NOISE = 0.5  # weight of the prior: a lost thing keeps its course
OUTLIER = 0.12  # colour differences above it count less

SHAPE_SIDE = 16  # shapes are compared on so many points across
SURROUND = 0.15  # weight of the colour around a thing, for a thing of one colour
FLAT = 0.02  # variance of colours at which that weight is half
SLACK = 0.06  # a thing may be so far from where the captioned motion leads
VISIBLE = 0.4  # share of a thing that must be inside the picture for its shape to count
KEPT = 0.7  # correlation above which a shape counts as kept


# ---------------------------------------------------------------------------------------------------
# Motion


def read(frames: np.ndarray, facts: Facts, world: PictureWorld, *, speed: float = 1.0) -> Reading:
    """Read a clip, uint8 [f h w 3]; of `facts`, only what the first frame shows is used."""
    reading.check(frames, speed)
    cutouts = [world.things[thing.name] for thing in facts.things]
    pictures = _reduced(torch.from_numpy(frames).permute(0, 3, 1, 2) / 255.0)
    starts = [
        torch.tensor([thing.x, thing.y, math.log(thing.radius), math.radians(thing.angle)])
        for thing in facts.things
    ]
    behind, cover = _background(pictures[:1], cutouts, starts)
    tracks = [start.expand(len(pictures), -1) for start in starts]
    camera, name = _camera(pictures, tracks, 1.0, cover, speed)
    tracks = _tracked(pictures, cutouts, starts, behind, camera)
    again, better = _camera(pictures, tracks, 1.0, cover, speed)
    if better != name or better != "still":
        tracks = _tracked(pictures, cutouts, starts, behind, again)
    travel_x, travel_y, growth = (reading.slope(values) for values in again)
    found = [_thing_reading(track.double().numpy(), again, speed) for track in tracks]
    return Reading(tuple(found), better, travel_x, travel_y, math.exp(growth))


def score(facts: Facts, found: Reading, correlations: list[np.ndarray]) -> dict[str, bool]:
    """As `reading.score`; object_right: every thing keeps its shape in every frame."""
    camera_right = found.camera == facts.camera.kind
    right = all(one.motion == move.kind for one, move in zip(found.things, facts.moves, strict=True))
    return {
        "motion_right": right if found.things else camera_right,
        "object_right": all(bool(np.nanmin(values) > KEPT) for values in correlations),
        "camera_right": camera_right,
    }


def _reduced(pictures: Tensor) -> Tensor:
    cell = max(1, min(pictures.shape[2:]) // COARSE)
    return F.avg_pool2d(pictures, cell) if cell > 1 else pictures


def _smooth(pictures: Tensor) -> Tensor:
    """Binomial blur (1 2 1) / 4 along both axes of [n c h w], with replicated edges."""
    padded = F.pad(pictures, (1, 1, 1, 1), mode="replicate")
    wide = 0.25 * padded[..., :-2] + 0.5 * padded[..., 1:-1] + 0.25 * padded[..., 2:]
    return 0.25 * wide[..., :-2, :] + 0.5 * wide[..., 1:-1, :] + 0.25 * wide[..., 2:, :]


def _drawn(cutout: Cutout, states: Tensor, like: Tensor) -> Tensor:
    """A cut-out at states [n 4] -> premultiplied [n 4 h w] of the size of `like` [.. h w]."""
    x, y, log_radius, angle = states.double().numpy().T
    height, width = like.shape[-2:]
    return things.warp(cutout, x, y, np.exp(log_radius), np.degrees(angle), width, height, fine=1)


def _background(first: Tensor, cutouts: list[Cutout], starts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """First frame [1 3 h w] -> the same without its things, filled from around, and their cover [1 1 h w]."""
    cover = torch.zeros_like(first[:, :1])
    for cutout, start in zip(cutouts, starts, strict=True):
        cover = torch.maximum(cover, _drawn(cutout, start[None], first)[:, 3:])
    cover = F.max_pool2d(cover, 3, 1, 1)
    known = (cover < 0.02).float()
    filled, todo = first * known, 1.0 - known
    for size in (3, 7, 15, 31, 63, 127):
        if not todo.any():
            break
        weight = F.avg_pool2d(known, size, 1, size // 2)
        mean = F.avg_pool2d(first * known, size, 1, size // 2) / weight.clamp(min=1e-6)
        new = todo * (weight > 0.15)
        filled, todo = filled + new * mean, todo - new
    return filled + todo * 0.5, cover


def _camera(
    pictures: Tensor, tracks: list[Tensor], margin: float, cover: Tensor, speed: float
) -> tuple[tuple[np.ndarray, ...], str]:
    """Track the camera outside the things -> pan x, pan y, log zoom, each [f], and its name."""
    frames = pictures.permute(0, 2, 3, 1).numpy()
    x, y = reading.axes(frames)
    shares = []
    for track in tracks:
        u, v, radius = (track[:, i, None, None].numpy() for i in range(3))
        inside = (x - u) ** 2 + (y - v) ** 2 < (margin * np.exp(radius)) ** 2
        shares.append(inside.astype(np.float32))
    line = reading.colour_line(frames[0], cover[0, 0].numpy() < 0.02)
    camera = reading.track_camera(frames, shares, line, x, y, speed)
    name = reading.camera_motion(*(reading.slope(values) for values in camera), speed)
    return reading.keep_only(name, camera), name


def _tracked(
    pictures: Tensor,
    cutouts: list[Cutout],
    starts: list[Tensor],
    behind: Tensor,
    camera: tuple[np.ndarray, ...],
) -> list[Tensor]:
    """Track all things -> their states [f 4]: x, y, log radius, angle in radians."""
    smooth = _smooth(pictures)
    tracks = [[start] for start in starts]
    for i in range(1, len(pictures)):
        seen = _shown(behind, *(float(values[i]) for values in camera))
        for k, cutout in enumerate(cutouts):
            others = seen
            for j, other in enumerate(cutouts):
                if j != k:
                    drawn = _drawn(other, tracks[j][-1][None], seen)
                    others = drawn[:, :3] + (1.0 - drawn[:, 3:]) * others
            tracks[k].append(_matched(smooth[i : i + 1], cutout, tracks[k], others))
    return [torch.stack(track) for track in tracks]


def _shown(behind: Tensor, pan_x: float, pan_y: float, log_zoom: float) -> Tensor:
    """The background [1 3 h w] under a camera."""
    if pan_x == pan_y == log_zoom == 0.0:
        return behind
    height, width = behind.shape[2:]
    half, zoom = min(height, width) / 2.0, math.exp(log_zoom)
    x = (torch.arange(width) + 0.5 - width / 2.0) / half / zoom + pan_x
    y = (torch.arange(height) + 0.5 - height / 2.0) / half / zoom + pan_y
    grid = torch.stack(
        torch.meshgrid(y * half * 2.0 / height, x * half * 2.0 / width, indexing="ij")[::-1], -1
    )
    return F.grid_sample(behind, grid[None], padding_mode="border", align_corners=False)


def _matched(picture: Tensor, cutout: Cutout, before: list[Tensor], behind: Tensor) -> Tensor:
    """The state [4] of a thing in a picture [1 3 h w], from its states before and the background."""
    last = before[-1]
    course = last + (last - before[-2]) if len(before) > 1 else last
    step = torch.tensor([0.06, 0.06, 0.07, 0.14])
    tries = [course, last]
    for i in range(4):
        for sign in (-1.0, 1.0):
            moved = last.clone()
            moved[i] += sign * step[i]
            tries.append(moved)
    candidates = torch.stack(tries)
    state = candidates[_errors(picture, cutout, candidates, behind, course).argmin()]
    for _ in range(STEPS):
        states = torch.cat([state[None], state + torch.diag(DELTA)])
        models = _composed(cutout, states, behind)
        error = (picture - models[:1])[0]
        weight = _window(state, picture) / (1.0 + (error.square().sum(0, keepdim=True) / OUTLIER**2))
        slopes = ((models[1:] - models[:1]) / DELTA[:, None, None, None]).flatten(1)
        weighted = slopes * weight.expand_as(error).flatten()
        prior = torch.diag(NOISE * OUTLIER / DOUBT**2)
        normal = weighted @ slopes.T + prior
        pull = weighted @ error.flatten() + prior @ (course - state)
        change = torch.linalg.solve(normal, pull)
        change = torch.maximum(torch.minimum(change, MOST), -MOST)
        state = state + change
        if bool((change.abs() < 0.02 * MOST).all()):
            break
    return state


def _composed(cutout: Cutout, states: Tensor, behind: Tensor) -> Tensor:
    drawn = _drawn(cutout, states, behind)
    return _smooth(drawn[:, :3] + (1.0 - drawn[:, 3:]) * behind)


def _errors(picture: Tensor, cutout: Cutout, states: Tensor, behind: Tensor, course: Tensor) -> Tensor:
    """How badly each of the states [n 4] explains the picture, near the course -> [n]."""
    gap = (picture - _composed(cutout, states, behind)).square().sum(1)
    robust = OUTLIER**2 * torch.log1p(gap / OUTLIER**2) * _window(course, picture)
    return robust.sum((1, 2)) + NOISE * OUTLIER * ((states - course) / DOUBT).square().sum(1)


def _window(state: Tensor, picture: Tensor) -> Tensor:
    """Weights [1 h w] around a thing."""
    height, width = picture.shape[2:]
    half = min(height, width) / 2.0
    x = (torch.arange(width) + 0.5 - width / 2.0) / half - state[0]
    y = (torch.arange(height) + 0.5 - height / 2.0) / half - state[1]
    reach = 1.15 * float(state[2].exp()) + 0.12
    return (x[None, None, :].square() + y[None, :, None].square() < reach**2).float()


def _thing_reading(track: np.ndarray, camera: tuple[np.ndarray, ...], speed: float) -> ThingReading:
    pan_x, pan_y, log_zoom = camera
    x, y, log_radius, angle = track.T
    zoom = np.exp(log_zoom)
    travel_x, travel_y = reading.slope(x / zoom + pan_x), reading.slope(y / zoom + pan_y)
    growth, turn = reading.slope(log_radius - log_zoom), math.degrees(reading.slope(angle))
    return ThingReading(
        motion=reading.thing_motion(travel_x, travel_y, growth, turn, speed),
        x=travel_x,
        y=travel_y,
        growth=math.exp(growth),
        turn=turn,
        area=tuple(np.exp(2.0 * (log_radius - log_radius[0])).tolist()),
        spread=(1.0,) * len(track),
    )


# ---------------------------------------------------------------------------------------------------
# Shape


def shapes(
    frames: np.ndarray, picture: np.ndarray, facts: Facts, world: PictureWorld, *, speed: float = 1.0
) -> list[np.ndarray]:
    """Whether each thing keeps its shape: per thing, one correlation for every frame, 0..1 -> [f].

    Frames are uint8 [f h w 3], `picture` [h w 3] is the true first one. The captioned motion is undone: a
    thing is looked for where the caption puts it, within SLACK, so one that stays put does not score. Its
    colours there are correlated with those in the picture. NaN where too little of it should be in view.
    """
    first = torch.from_numpy(picture).permute(2, 0, 1)[None] / 255.0
    pictures = torch.from_numpy(frames).permute(0, 3, 1, 2) / 255.0
    time = speed * np.linspace(0.0, 1.0, len(frames))
    found = []
    for thing, move in zip(facts.things, facts.moves, strict=True):
        path = drawing.track(thing, move, facts.camera, time)
        found.append(_kept(first, pictures, path, world.things[thing.name]))
    return found


def _kept(picture: Tensor, pictures: Tensor, path: tuple[np.ndarray, ...], cutout: Cutout) -> np.ndarray:
    alpha = cutout.at(0.0, SHAPE_SIDE)[0, 3]
    steps = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0]) * SLACK
    shifts = torch.cartesian_prod(steps, steps)
    first, _ = _undone(picture, tuple(values[:1] for values in path), torch.zeros(1, 2))
    views, inside = _undone(pictures, path, shifts)  # f n 3 s s, f s s
    weight = alpha.square() * inside  # f s s
    visible = (weight.sum((1, 2)) / alpha.square().sum()).numpy()
    found = _correlated(first[0, 0], views, weight[:, None], (alpha < 0.02).float() * _disc())
    best = found.amax(1).clamp(0.0, 1.0).double().numpy()
    return np.where(visible >= VISIBLE, best, np.nan)


def _disc() -> Tensor:
    line = (torch.arange(SHAPE_SIDE) + 0.5) * 2.0 / SHAPE_SIDE - 1.0
    return (line[:, None].square() + line.square() < 1.0).float()


def _undone(pictures: Tensor, path: tuple[np.ndarray, ...], shifts: Tensor) -> tuple[Tensor, Tensor]:
    """The square around a thing, turned and scaled back -> per shift [n 2], [f n 3 s s]; inside [f s s]."""
    height, width = pictures.shape[2:]
    half, fine = min(height, width) / 2.0, 3
    line = (torch.arange(SHAPE_SIDE * fine) + 0.5) * 2.0 / (SHAPE_SIDE * fine) - 1.0
    x, y, radius, angle = (torch.from_numpy(np.asarray(v, np.float32))[:, None, None] for v in path)
    cos, sin = torch.cos(torch.deg2rad(angle)) * radius, torch.sin(torch.deg2rad(angle)) * radius
    u = x + things.MARGIN * (cos * line[None, None, :] - sin * line[None, :, None])  # f s s
    v = y + things.MARGIN * (sin * line[None, None, :] + cos * line[None, :, None])
    views = []
    for dx, dy in shifts:
        grid = torch.stack([(u + dx) * half * 2.0 / width, (v + dy) * half * 2.0 / height], -1)
        seen = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
        views.append(F.avg_pool2d(seen, fine))
    inside = ((u.abs() * half * 2.0 / width < 1.0) & (v.abs() * half * 2.0 / height < 1.0)).float()
    return torch.stack(views, 1), F.avg_pool2d(inside[:, None], fine)[:, 0].floor()


def _correlated(first: Tensor, views: Tensor, weight: Tensor, around: Tensor) -> Tensor:
    """Correlation of colours [3 s s] with those of views [f n 3 s s], weights [f 1 s s] -> [f n].

    The colour around the thing in the picture, the mean over `around` [s s], enters on both sides as one more
    pixel, whose weight is that of a few of a flat thing's: its own colours vary too little to correlate.
    """
    weight = (weight / weight.sum((2, 3), keepdim=True).clamp(min=1e-6))[:, :, None]
    ring = (first * around).sum((1, 2)) / around.sum().clamp(min=1e-6)
    a, b, ring = first[None, None].expand_as(views), views, ring.expand(*views.shape[:3])
    own = (weight * a).sum((3, 4))
    variance = (weight * (a - own[..., None, None]).square()).sum((2, 3, 4))
    outer = (SURROUND * FLAT / (FLAT + variance))[..., None]
    inner = (1.0 - outer)[..., None, None] * weight
    mean_a, mean_b = ((inner * part).sum((3, 4)) + outer * ring for part in (a, b))
    a, b = a - mean_a[..., None, None], b - mean_b[..., None, None]
    ring_a, ring_b = ring - mean_a, ring - mean_b

    def product(p: Tensor, q: Tensor, ring_p: Tensor, ring_q: Tensor) -> Tensor:
        return (inner * p * q).sum((2, 3, 4)) + (outer * ring_p * ring_q).sum(2)

    both = product(a, b, ring_a, ring_b)
    return both / (product(a, a, ring_a, ring_a) * product(b, b, ring_b, ring_b)).sqrt().clamp(min=1e-6)


class Kept(NamedTuple):
    """The shape scores of one clip."""

    mean: float  # over frames and things
    last: tuple[bool, ...]  # per thing: above KEPT in its last visible frame
    whole: bool  # all of these, and the mean above KEPT


def kept(values: list[np.ndarray]) -> Kept | None:
    """Correlations of `shapes` -> scores of the clip; None without things."""
    if not values:
        return None
    last = tuple(bool(one[~np.isnan(one)][-1] > KEPT) for one in values)
    mean = float(np.mean([np.nanmean(one) for one in values]))
    return Kept(mean, last, all(last) and mean > KEPT)
