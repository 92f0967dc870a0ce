"""The procedural world: an integer seed -> a short clip of plain shapes, its caption and its facts.

All lengths share one coordinate system: the largest centred square of the picture is [-1, 1] x [-1, 1], with
x to the right and y DOWN, so a length of 1 is half the shorter side. Time runs from 0 (first frame) to 1
(last frame). Amounts of motion are per clip, so every size and frame count shows the same motion. The caption
says what the first frame does not show: kind, direction and speed of each motion.

Clips depend only on the seed and numpy: random numbers are PCG64 doubles, and shapes are drawn from signed
distances, without a rasteriser or fonts. Axes: b batch, f frames, c RGB, h w pixel rows and columns.

Proportions for `kind=None`: 58 % one object under a still camera (twelve equally frequent motions, one of
them standing still), 20 % two objects under a still camera (in half of these, one stands still), 22 % camera
moves (four pans and two zooms, equally frequent) over zero to two still objects. Under a still camera, a
single object starts where all its motions would fit, so its position does not reveal the motion. Speed on one
CPU core at 64 x 64 and 16 frames: 450 clips/s (camera moves alone 280).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

Kind = Literal["basic", "single", "pair", "camera"]
KINDS = ("basic", "single", "pair", "camera")
SHARES = {"single": 0.58, "pair": 0.20, "camera": 0.22}  # of kind=None

BASIC_MOTIONS = ("left", "right", "up", "down", "grow", "shrink", "rotate", "still")
DIAGONALS = ("up left", "up right", "down left", "down right")
MOTIONS = BASIC_MOTIONS + DIAGONALS
CAMERA_MOVES = ("pan left", "pan right", "pan up", "pan down", "zoom in", "zoom out")

# Unit vectors x, y.
DIRECTIONS = {
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
    "up left": (-math.sqrt(0.5), -math.sqrt(0.5)),
    "up right": (math.sqrt(0.5), -math.sqrt(0.5)),
    "down left": (-math.sqrt(0.5), math.sqrt(0.5)),
    "down right": (math.sqrt(0.5), math.sqrt(0.5)),
}

# Amounts per clip for each speed word; "" is the speed that a caption does not mention.
SPEEDS = ("slowly", "", "quickly")
TRAVEL = {"slowly": 0.32, "": 0.52, "quickly": 0.72}  # distance of an object or a panning camera
GROWTH = {"slowly": 1.30, "": 1.55, "quickly": 1.85}  # factor of the radius; shrinking divides
TURN = {"slowly": 45.0, "": 75.0, "quickly": 110.0}  # degrees, clockwise
ZOOM = {"slowly": 1.25, "": 1.45, "quickly": 1.70}  # factor of the picture; zooming out divides

COLOURS = {
    "red": (215, 35, 35),
    "orange": (250, 135, 15),
    "yellow": (245, 225, 40),
    "green": (30, 150, 50),
    "cyan": (50, 215, 225),
    "blue": (40, 70, 225),
    "purple": (125, 35, 170),
    "pink": (250, 120, 190),
    "white": (250, 250, 250),
    "black": (12, 12, 12),
}
SIZES = {"small": 0.22, "medium": 0.31, "large": 0.42}  # radius of the circle of that size
# Circumradius of each shape, in units of `radius`; the shapes have similar areas, not equal circumradii.
REACH = {
    "circle": 1.0,
    "square": 1.2,
    "triangle": 1.3,
    "star": 1.3,
    "ring": 1.0,
    "diamond": 1.25,
    "cross": 1.15 * math.hypot(1.0, 0.36),
}
SHAPES = tuple(REACH)
ROUND = ("circle", "ring")  # never rotate, because it would be invisible
BACKDROPS = {
    "plain": "plain",
    "clouds": "cloudy",
    "stripes": "striped",
    "checks": "checkered",
    "dots": "dotted",
}

MIN_CONTRAST = 0.36  # RGB distance (values 0..1) between an object's colour and all colours of the backdrop
MIN_COLOUR_GAP = 0.45  # RGB distance between two objects
SHORTEST_SIDE = 8
LATTICE = 32  # side of the periodic lattice of random values for the value noise


@dataclass(frozen=True)
class Backdrop:
    """An infinite texture of colours on the segment from `first` to `second` (RGB, 0..1)."""

    kind: str  # of BACKDROPS
    first: tuple[float, float, float]
    second: tuple[float, float, float]
    angle: float  # radians
    period: float  # of stripes, checks and dots
    x: float  # offset of the texture
    y: float
    seed: int  # of the value noise


@dataclass(frozen=True)
class Thing:
    """One object as the first frame shows it."""

    shape: str  # of SHAPES
    colour: str  # of COLOURS
    size: str  # of SIZES
    x: float
    y: float
    radius: float
    angle: float  # degrees, clockwise


@dataclass(frozen=True)
class Move:
    """The motion of an object or the camera (or "still"), with a speed word of SPEEDS."""

    kind: str
    speed: str = ""


STILL = Move("still")


@dataclass(frozen=True)
class Facts:
    """Contents of a clip: `moves[i]` is the motion of `things[i]` in the world; the camera adds its own."""

    backdrop: Backdrop
    things: tuple[Thing, ...]
    moves: tuple[Move, ...]
    camera: Move

    @property
    def determined(self) -> bool:
        """Whether first frame and caption determine the clip: nothing enters from outside the picture."""
        return self.camera.kind in ("still", "zoom in")


class Clip(NamedTuple):
    """One clip: `frames` uint8 [f h w 3]."""

    frames: np.ndarray
    caption: str
    facts: Facts


class Batch(NamedTuple):
    """Clips for training: `clips` float32 [b c f h w] in [-1, 1]."""

    clips: Tensor
    captions: tuple[str, ...]
    facts: tuple[Facts, ...]


# ---------------------------------------------------------------------------------------------------
# Clips and batches


def clip(
    seed: int,
    *,
    width: int = 64,
    height: int = 64,
    frames: int = 16,
    kind: Kind | None = None,
    speed: float = 1.0,
) -> Clip:
    """The clip of a seed: `frames` uint8 [f h w 3], caption, facts; `speed` as in `render`."""
    facts = sample_facts(seed, kind=kind)
    pictures = render(facts, width=width, height=height, frames=frames, speed=speed)
    return Clip(pictures, caption(facts, seed), facts)


def batch(
    seeds: Iterable[int],
    *,
    width: int = 64,
    height: int = 64,
    frames: int = 16,
    kind: Kind | Sequence[Kind] | None = None,
    speed: float = 1.0,
    clip: Callable[..., Clip] = clip,
) -> Batch:
    """The clips of several seeds, stacked: float32 [b c f h w] in [-1, 1], captions, facts.

    `kind` is one kind for all clips, or a list with one for each; `clip` may be another world's.
    """
    seeds = list(seeds)
    kinds = [kind] * len(seeds) if kind is None or isinstance(kind, str) else list(kind)
    clips = [
        clip(s, width=width, height=height, frames=frames, kind=k, speed=speed)
        for s, k in zip(seeds, kinds, strict=True)
    ]
    if not clips:
        raise ValueError("no seeds given; a batch needs at least one")
    pixels = torch.from_numpy(np.stack([c.frames for c in clips])).permute(0, 4, 1, 2, 3)
    stacked = pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)
    return Batch(stacked, tuple(c.caption for c in clips), tuple(c.facts for c in clips))


def another_motion(facts: Facts, seed: int) -> Facts:
    """The same first frame with another basic motion; ValueError unless it is one object, still camera."""
    if len(facts.things) != 1 or facts.camera.kind != "still":
        raise ValueError(
            f"another motion needs one object under a still camera, not {len(facts.things)} object(s) and "
            f"the camera move {facts.camera.kind!r}"
        )
    rng = stream(seed, 2)
    move, thing = facts.moves[0], facts.things[0]
    kind = pick(rng, [m for m in _motions_of(thing.shape, BASIC_MOTIONS) if m != move.kind])
    # A still object has no speed word, and its place may only leave room for slow motions.
    speed = "" if kind == "still" else ("slowly" if move.kind == "still" else move.speed)
    return replace(facts, moves=(Move(kind, speed),))


# ---------------------------------------------------------------------------------------------------
# Sampling the facts


def sample_facts(seed: int, *, kind: Kind | None = None) -> Facts:
    """The contents of the clip of this seed.

    kind None: the whole world; "basic": one object, the eight basic motions, still camera; "single": one
    object, all twelve motions, still camera; "pair": two objects, still camera; "camera": camera moves.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind {kind!r} of a clip is unknown; use None or one of {', '.join(KINDS)}")
    rng = stream(seed, 0)
    if kind is None:
        kind = weighted_pick(rng, SHARES)
    if kind == "camera":
        return _sample_camera(rng)
    if kind == "pair":
        things, moves = _sample_pair(rng, STILL)
    else:
        move, shape = _sample_move(rng, BASIC_MOTIONS if kind == "basic" else MOTIONS)
        size = pick(rng, tuple(SIZES))
        pace = move.speed if move.kind != "still" else pick(rng, SPEEDS)
        things, moves = (_place(rng, shape, size, pick(rng, tuple(COLOURS)), pace),), (move,)
    return Facts(_sample_backdrop(rng, tuple(BACKDROPS), things), things, moves, STILL)


def _sample_camera(rng: np.random.Generator) -> Facts:
    camera = Move(pick(rng, CAMERA_MOVES), pick(rng, SPEEDS))
    count = weighted_pick(rng, {0: 0.2, 1: 0.6, 2: 0.2})
    things, moves = (), ()
    if count == 1:
        size, shape = pick(rng, tuple(SIZES)), pick(rng, SHAPES)
        things, moves = (_place(rng, shape, size, pick(rng, tuple(COLOURS)), camera.speed),), (STILL,)
    elif count == 2:
        things, moves = _sample_pair(rng, camera)
    # Camera moves over a plain backdrop would be invisible.
    return Facts(
        _sample_backdrop(rng, ("clouds", "stripes", "checks", "dots"), things), things, moves, camera
    )


def _sample_move(rng: np.random.Generator, motions: Sequence[str]) -> tuple[Move, str]:
    """A motion and a shape that can show it."""
    kind = pick(rng, motions)
    speed = "" if kind == "still" else pick(rng, SPEEDS)
    shape = pick(rng, [s for s in SHAPES if kind in _motions_of(s, motions)])
    return Move(kind, speed), shape


def _motions_of(shape: str, motions: Sequence[str]) -> tuple[str, ...]:
    return tuple(m for m in motions if m != "rotate" or shape not in ROUND)


def _place(rng: np.random.Generator, shape: str, size: str, colour: str, pace: str) -> Thing:
    """An object near the centre, so that any motion or camera move at this pace keeps most of it visible."""
    radius = SIZES[size] * uniform(rng, 0.94, 1.06)
    room = max(0.04, min(1.0 - TRAVEL[pace], 1.0 / ZOOM[pace]) - 0.6 * radius)
    x, y = uniform(rng, -room, room), uniform(rng, -room, room)
    return Thing(shape, colour, size, x, y, radius, uniform(rng, -12.0, 12.0))


def _sample_pair(rng: np.random.Generator, camera: Move) -> tuple[tuple[Thing, ...], tuple[Move, ...]]:
    """Two objects of different colours that stay inside the picture and never touch."""
    first = pick(rng, tuple(COLOURS))
    second = pick(rng, [name for name in COLOURS if _gap(_rgb(name), _rgb(first)) >= MIN_COLOUR_GAP])
    both_move = rng.random() < 0.5
    while True:  # rejection sampling: accepts one in five, or one in twenty under a camera move
        moves, things = [], []
        for colour, moving in ((first, True), (second, both_move)):
            motions = ("still",) if camera != STILL or not moving else [m for m in MOTIONS if m != "still"]
            move, shape = _sample_move(rng, motions)
            size = pick(rng, ("small", "medium"))
            x, y = uniform(rng, -0.8, 0.8), uniform(rng, -0.8, 0.8)
            radius = SIZES[size] * uniform(rng, 0.94, 1.06)
            things.append(Thing(shape, colour, size, x, y, radius, uniform(rng, -12.0, 12.0)))
            moves.append(move)
        if _fits(things, moves, camera):
            return tuple(things), tuple(moves)


def _fits(things: Sequence[Thing], moves: Sequence[Move], camera: Move) -> bool:
    time = np.linspace(0.0, 1.0, 9)
    tracks = [track(thing, move, camera, time) for thing, move in zip(things, moves, strict=True)]
    for x, y, radius, _ in tracks:
        if np.any(np.maximum(np.abs(x), np.abs(y)) + 0.9 * radius > 1.0):
            return False
    (x, y, r, _), (u, v, s, _) = tracks
    apart = REACH[things[0].shape] * r + REACH[things[1].shape] * s + 0.06
    return bool(np.all(np.hypot(x - u, y - v) > apart))


def _sample_backdrop(rng: np.random.Generator, kinds: Sequence[str], things: Sequence[Thing]) -> Backdrop:
    """A backdrop in muted colours of moderate contrast that differ from the colours of all objects."""
    kind = pick(rng, kinds)
    best, pair = -1.0, None
    for _ in range(40):
        drawn = _muted_pair(rng)
        gap = min((_gap_to_segment(_rgb(thing.colour), *drawn) for thing in things), default=1.0)
        if gap > best:
            best, pair = gap, drawn
        if best >= MIN_CONTRAST:
            break
    return Backdrop(
        kind=kind,
        first=pair[0],
        second=pair[1],
        angle=uniform(rng, 0.0, 2.0 * math.pi),
        period=uniform(rng, 0.5, 0.9),
        x=uniform(rng, 0.0, 100.0),
        y=uniform(rng, 0.0, 100.0),
        seed=int(rng.random() * 2**31),
    )


def _muted_pair(rng: np.random.Generator) -> tuple[tuple[float, ...], tuple[float, ...]]:
    grey = np.full(3, uniform(rng, 0.32, 0.72)) + tint(rng, 0.13)
    step = np.full(3, uniform(rng, 0.11, 0.19) * (1.0 if rng.random() < 0.5 else -1.0)) + tint(rng, 0.08)
    first, second = np.clip(grey - step / 2, 0.08, 0.92), np.clip(grey + step / 2, 0.08, 0.92)
    return tuple(first.tolist()), tuple(second.tolist())


def tint(rng: np.random.Generator, most: float) -> np.ndarray:
    """A random RGB offset of any hue that does not change the brightness."""
    hue = 2.0 * math.pi * rng.random() + np.array([0.0, 2.0, 4.0]) * math.pi / 3.0
    return most * rng.random() * np.cos(hue)


def stream(seed: int, branch: int) -> np.random.Generator:
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ValueError(f"seed {seed!r} of a clip must be an integer, zero or above")
    return np.random.Generator(np.random.PCG64([int(seed), branch]))


def pick(rng: np.random.Generator, options: Sequence):
    return options[int(rng.random() * len(options))]


def weighted_pick(rng: np.random.Generator, shares: dict):
    drawn = rng.random() * sum(shares.values())
    for name, share in shares.items():
        drawn -= share
        if drawn < 0.0:
            return name
    return next(reversed(shares))


def uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * rng.random()


def _rgb(colour: str) -> np.ndarray:
    return np.array(COLOURS[colour]) / 255.0


def _gap(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b))


def _gap_to_segment(point: np.ndarray, first: Sequence[float], second: Sequence[float]) -> float:
    start, vector = np.array(first), np.array(second) - np.array(first)
    along = np.clip((point - start) @ vector / (vector @ vector), 0.0, 1.0)
    return _gap(point, start + along * vector)


# ---------------------------------------------------------------------------------------------------
# Motion and drawing


def render(facts: Facts, *, width: int, height: int, frames: int, speed: float = 1.0) -> np.ndarray:
    """Draw the clip -> uint8 [f h w 3].

    `speed` scales all motion: for n frames per second instead of m, at the same frame count, give m / n.
    Above 1, objects may leave the picture; 0 freezes it. Growth and zoom are powers (factor ** speed). If the
    picture is not square, its longer side shows more backdrop.
    """
    check_size(width, height, frames, speed)
    time = speed * np.linspace(0.0, 1.0, frames)
    half = min(width, height) / 2.0
    x = (np.arange(width) + 0.5 - width / 2.0) / half
    y = (np.arange(height) + 0.5 - height / 2.0) / half
    canvas = np.empty((frames, height, width, 3), np.float32)
    canvas[:] = _paint_backdrop(facts, x, y, time)
    for thing, move in zip(facts.things, facts.moves, strict=True):
        _paint_thing(canvas, thing, track(thing, move, facts.camera, time), half)
    return np.rint(canvas * 255.0).astype(np.uint8)


def covers(facts: Facts, width: int, height: int) -> list[np.ndarray]:
    """How much of each pixel each object covers in the first frame, by itself -> float32 [h w] in 0..1."""
    half = min(width, height) / 2.0
    u = (np.arange(width) + 0.5 - width / 2.0)[None, None] / half
    v = (np.arange(height) + 0.5 - height / 2.0)[None, :, None] / half
    return [
        coverage(one.shape, u - one.x, v - one.y, np.array([one.radius]), np.array([one.angle]), half)[0]
        for one in facts.things
    ]


def check_size(width: int, height: int, frames: int, speed: float) -> None:
    for name, value, least in (("width", width, SHORTEST_SIDE), ("height", height, SHORTEST_SIDE)):
        if value < least or value != int(value):
            raise ValueError(f"{name} {value} of a clip is too small; use a whole number of {least} or more")
    if frames < 1 or frames != int(frames):
        raise ValueError(f"frames {frames} of a clip; use a whole number of 1 or more")
    if not 0.0 <= speed < math.inf:
        raise ValueError(
            f"speed {speed} of a clip; use 0 (frozen), 1 (as captioned) or another positive number"
        )


def camera_path(camera: Move, time: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The camera at each time [f]: x, y [f] of the world at the centre of the picture, and its zoom [f].

    A camera that pans left makes everything in the picture move right.
    """
    zero, one = np.zeros_like(time), np.ones_like(time)
    if camera.kind == "still":
        return zero, zero, one
    if camera.kind.startswith("pan "):
        x, y = DIRECTIONS[camera.kind.removeprefix("pan ")]
        return x * TRAVEL[camera.speed] * time, y * TRAVEL[camera.speed] * time, one
    factor = ZOOM[camera.speed] if camera.kind == "zoom in" else 1.0 / ZOOM[camera.speed]
    return zero, zero, factor**time


def track(thing: Thing, move: Move, camera: Move, time: np.ndarray) -> tuple[np.ndarray, ...]:
    """An object's path in the picture at each time [f] -> x, y, radius, angle in degrees, each [f]."""
    x, y, radius = thing.x + 0.0 * time, thing.y + 0.0 * time, thing.radius + 0.0 * time
    angle = thing.angle + 0.0 * time
    if move.kind in DIRECTIONS:
        dx, dy = DIRECTIONS[move.kind]
        x, y = x + dx * TRAVEL[move.speed] * time, y + dy * TRAVEL[move.speed] * time
    elif move.kind == "grow":
        radius = radius * GROWTH[move.speed] ** time
    elif move.kind == "shrink":
        radius = radius * GROWTH[move.speed] ** -time
    elif move.kind == "rotate":
        angle = angle + TURN[move.speed] * time
    look_x, look_y, zoom = camera_path(camera, time)
    return (x - look_x) * zoom, (y - look_y) * zoom, radius * zoom, angle


def _paint_thing(canvas: np.ndarray, thing: Thing, path: tuple[np.ndarray, ...], half: float) -> None:
    """Draw an object on the canvas [f h w 3], in place, within a window around its centre."""
    x, y, radius, angle = path
    _, height, width, _ = canvas.shape
    column, row = x * half + width / 2.0 - 0.5, y * half + height / 2.0 - 0.5  # of the centre, in pixels
    side = 2 * math.ceil(radius.max() * REACH[thing.shape] * half + 1.0) + 1
    left = np.rint(column).astype(int) - side // 2
    top = np.rint(row).astype(int) - side // 2
    steps = np.arange(side)
    u = ((left[:, None] + steps - column[:, None]) / half)[:, None, :]  # f 1 w
    v = ((top[:, None] + steps - row[:, None]) / half)[:, :, None]  # f h 1
    cover = coverage(thing.shape, u, v, radius, angle, half)
    colour = _rgb(thing.colour).astype(np.float32)
    for i in range(len(canvas)):
        rows = slice(max(top[i], 0), max(min(top[i] + side, height), 0))
        columns = slice(max(left[i], 0), max(min(left[i] + side, width), 0))
        part = canvas[i, rows, columns]
        alpha = cover[
            i, rows.start - top[i] : rows.stop - top[i], columns.start - left[i] : columns.stop - left[i]
        ]
        part += alpha[: part.shape[0], : part.shape[1], None] * (colour - part)


def coverage(
    shape: str, u: np.ndarray, v: np.ndarray, radius: np.ndarray, angle: np.ndarray, half: float
) -> np.ndarray:
    """Fraction of each pixel that a shape covers -> float32 [f h w] in 0..1.

    u [f 1 w] and v [f h 1] are the pixel's offsets from the centre; radius and angle (degrees) are [f];
    `half` is the number of pixels in a length of 1.
    """
    u, v = u.astype(np.float32), v.astype(np.float32)
    r = radius.astype(np.float32)[:, None, None]
    turn = np.deg2rad(angle).astype(np.float32)[:, None, None]
    cos, sin = np.cos(turn) / r, np.sin(turn) / r
    distance = shape_distance(shape, u * cos + v * sin, v * cos - u * sin)
    return np.clip(0.5 - distance * (r * np.float32(half)), 0.0, 1.0)


def shape_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to the outline of a shape of radius 1 at the origin, negative inside (y points down).

    Method of https://iquilezles.org/articles/distfunctions2d: fold the plane by symmetry until one edge is
    left.
    """
    if shape == "circle":
        return np.hypot(x, y) - 1.0
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.74) - 0.26
    if shape == "square":
        return _box(np.abs(x), np.abs(y), 0.85, 0.85)
    if shape == "cross":
        x, y = np.abs(x), np.abs(y)
        return np.minimum(_box(x, y, 1.15, 0.414), _box(x, y, 0.414, 1.15))
    if shape == "diamond":
        return _edge(np.abs(y), np.abs(x), (1.25, 0.0), (0.0, 0.8))
    points, notch = (3, 0.65) if shape == "triangle" else (5, 0.58)
    wedge = math.pi / points
    angle = np.abs((np.arctan2(x, -y) + wedge) % (2.0 * wedge) - wedge)
    length = np.hypot(x, y)
    valley = (notch * math.cos(wedge), notch * math.sin(wedge))
    return _edge(length * np.cos(angle), length * np.sin(angle), (1.3, 0.0), valley)


def _box(x: np.ndarray, y: np.ndarray, wide: float, high: float) -> np.ndarray:
    dx, dy = x - wide, y - high
    return np.hypot(np.maximum(dx, 0.0), np.maximum(dy, 0.0)) + np.minimum(np.maximum(dx, dy), 0.0)


def _edge(x: np.ndarray, y: np.ndarray, start: tuple[float, float], end: tuple[float, float]) -> np.ndarray:
    """Signed distance to the edge from start to end of a folded shape; negative on the origin's side."""
    wide, high = end[0] - start[0], end[1] - start[1]
    dx, dy = x - start[0], y - start[1]
    along = np.clip((dx * wide + dy * high) / (wide * wide + high * high), 0.0, 1.0)
    inside = wide * dy - high * dx  # its sign at x = y = 0 marks the origin's side
    sign = -1.0 if high * start[0] - wide * start[1] > 0.0 else 1.0
    return np.copysign(np.hypot(dx - along * wide, dy - along * high), sign * inside)


def _paint_backdrop(facts: Facts, x: np.ndarray, y: np.ndarray, time: np.ndarray) -> np.ndarray:
    """The backdrop -> float32 [f h w 3] in 0..1; f is 1 under a still camera."""
    backdrop = facts.backdrop
    look_x, look_y, zoom = camera_path(facts.camera, time[:1] if facts.camera.kind == "still" else time)
    u = (x / zoom[:, None] + look_x[:, None])[:, None, :]  # f 1 w
    v = (y / zoom[:, None] + look_y[:, None])[:, :, None]  # f h 1
    level = texture(backdrop, u.astype(np.float32), v.astype(np.float32))
    first, second = (np.array(c, np.float32) for c in (backdrop.first, backdrop.second))
    return first + level[..., None] * (second - first)


def texture(backdrop: Backdrop, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Texture level at the world coordinates u [f 1 w], v [f h 1] -> float32 [f h w] in 0..1."""
    cos, sin = np.float32(math.cos(backdrop.angle)), np.float32(math.sin(backdrop.angle))
    if backdrop.kind == "plain":
        return np.clip(0.5 + 0.38 * (cos * u + sin * v), 0.0, 1.0)
    u, v = u + np.float32(backdrop.x), v + np.float32(backdrop.y)
    noise = np.random.Generator(np.random.PCG64(backdrop.seed)).random((LATTICE, LATTICE)).astype(np.float32)
    coarse = value_noise(noise, u / np.float32(0.6), v / np.float32(0.6))
    if backdrop.kind == "clouds":
        fine = value_noise(noise.T, u / np.float32(0.27), v / np.float32(0.27))
        return np.clip(1.5 * (0.68 * coarse + 0.32 * fine) - 0.25, 0.0, 1.0)
    wave = np.float32(2.0 * math.pi / backdrop.period)
    along, across = wave * (cos * u + sin * v), wave * (cos * v - sin * u)
    if backdrop.kind == "stripes":
        pattern = np.sin(along)
    elif backdrop.kind == "checks":
        pattern = 1.6 * np.sin(0.7 * along) * np.sin(0.7 * across)
    else:
        pattern = 2.2 * (0.5 * (np.cos(along) + np.cos(across)) - 0.35)
    pattern = np.clip(0.5 + 1.1 * pattern, 0.0, 1.0)
    return 0.62 * pattern + 0.38 * coarse


def value_noise(noise: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Periodic value noise with one lattice value per unit: u [f 1 w], v [f h 1] -> [f h w]."""
    column, row = np.floor(u), np.floor(v)
    p, q = u - column, v - row
    p, q = p * p * (3.0 - 2.0 * p), q * q * (3.0 - 2.0 * q)
    column, row = column.astype(np.int64) % LATTICE, row.astype(np.int64) % LATTICE
    right, below = (column + 1) % LATTICE, (row + 1) % LATTICE
    upper = noise[row, column] * (1.0 - p) + noise[row, right] * p
    lower = noise[below, column] * (1.0 - p) + noise[below, right] * p
    return upper * (1.0 - q) + lower * q


# ---------------------------------------------------------------------------------------------------
# Captions use only the phrases below; every phrase has a single meaning

SIZE_WORDS = {
    "small": ("small", "tiny", "little"),
    "medium": ("medium", ""),
    "large": ("large", "big", "huge"),
}
SPEED_WORDS = {"slowly": ("slowly", "gently"), "": ("",), "quickly": ("quickly", "rapidly")}
TRAVEL_VERBS = (
    ("moves", "moving"),
    ("drifts", "drifting"),
    ("slides", "sliding"),
    ("glides", "gliding"),
    ("travels", "travelling"),
)
DIRECTION_PHRASES = {
    "left": ("left", "to the left", "leftwards"),
    "right": ("right", "to the right", "rightwards"),
    "up": ("up", "upwards"),
    "down": ("down", "downwards"),
    "up left": ("up and to the left", "diagonally up and left", "towards the upper left"),
    "up right": ("up and to the right", "diagonally up and right", "towards the upper right"),
    "down left": ("down and to the left", "diagonally down and left", "towards the lower left"),
    "down right": ("down and to the right", "diagonally down and right", "towards the lower right"),
}
# (third person, -ing form); verbs and directions of travel come from the two tables above.
MOTION_PHRASES = {
    **{
        kind: tuple((f"{verb} {way}", f"{ing} {way}") for verb, ing in TRAVEL_VERBS for way in ways)
        for kind, ways in DIRECTION_PHRASES.items()
    },
    "grow": (("grows", "growing"), ("gets bigger", "getting bigger"), ("expands", "expanding")),
    "shrink": (("shrinks", "shrinking"), ("gets smaller", "getting smaller"), ("contracts", "contracting")),
    "rotate": (("rotates", "rotating"), ("spins", "spinning"), ("turns around", "turning around")),
    "still": (
        ("stays still", "staying still"),
        ("stands still", "standing still"),
        ("does not move", "not moving"),
        ("rests", "resting"),
    ),
}
PAN_VERBS = ("pans", "moves", "swings")
PAN_LINKS = ("over", "past", "across")
ZOOM_PHRASES = {
    "zoom in": ("zooms in on", "moves closer to", "comes closer to"),
    "zoom out": ("zooms out from", "moves back from", "pulls back from"),
}


def caption(facts: Facts, seed: int) -> str:
    """One of many captions of the clip, in lower case, without punctuation except commas.

    Every object is named with its colour, shape, size (optional if medium) and motion; no speed word means
    the middle speed. One caption in four names the backdrop.
    """
    rng = stream(seed, 1)
    if facts.camera.kind != "still":
        return _say_camera(rng, facts)
    if len(facts.things) == 1:
        text = _say_one(rng, facts)
    else:
        text = _say_two(rng, facts)
    if rng.random() < 0.25:
        text = f"{text} on a {BACKDROPS[facts.backdrop.kind]} background"
    return text


def _say_one(rng: np.random.Generator, facts: Facts) -> str:
    noun, move = _noun(rng, facts.things[0]), facts.moves[0]
    drawn = rng.random()
    if drawn < 0.60:
        return f"{noun} {say_motion(rng, move, 0)}"
    if drawn < 0.75:
        return f"{noun} {say_motion(rng, move, 1)}"
    if drawn < 0.90 or not move.speed:
        return f"{noun} is {say_motion(rng, move, 1)}"
    return f"{pick(rng, SPEED_WORDS[move.speed])}, {noun} {say_motion(rng, Move(move.kind), 0)}"


def _say_two(rng: np.random.Generator, facts: Facts) -> str:
    order = (0, 1) if rng.random() < 0.5 else (1, 0)
    form = 0 if rng.random() < 0.75 else 1
    first, second = (f"{_noun(rng, facts.things[i])} {say_motion(rng, facts.moves[i], form)}" for i in order)
    return f"{first} {pick(rng, ('while', 'and'))} {second}"


def _say_camera(rng: np.random.Generator, facts: Facts) -> str:
    camera = facts.camera
    ground = f"a {BACKDROPS[facts.backdrop.kind]} background"
    what = " and ".join(_noun(rng, thing) for thing in facts.things) or ground
    speed = pick(rng, SPEED_WORDS[camera.speed])
    if camera.kind in ZOOM_PHRASES:
        move = f"{pick(rng, ZOOM_PHRASES[camera.kind])} {what}"
    else:
        direction = pick(rng, DIRECTION_PHRASES[camera.kind.removeprefix("pan ")])
        move = f"{pick(rng, PAN_VERBS)} {direction} {pick(rng, PAN_LINKS)} {what}"
    if facts.things and rng.random() < 0.25:
        move = f"{move} on {ground}"
    if speed and rng.random() < 0.3:
        return f"{speed}, the camera {move}"
    return " ".join(part for part in ("the camera", speed, move) if part)


def _noun(rng: np.random.Generator, thing: Thing) -> str:
    words = [w for w in (pick(rng, SIZE_WORDS[thing.size]), thing.colour, thing.shape) if w]
    return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])


def say_motion(rng: np.random.Generator, move: Move, form: int) -> str:
    """The motion in words, with its speed word before or after it; form 0 third person, 1 -ing."""
    phrase = pick(rng, MOTION_PHRASES[move.kind])[form]
    speed = pick(rng, SPEED_WORDS[move.speed])
    if not speed:
        return phrase
    return f"{speed} {phrase}" if rng.random() < 0.5 else f"{phrase} {speed}"


def _all_words() -> list[str]:
    phrases = ["a an is while and on the camera background", *COLOURS, *SHAPES, *BACKDROPS.values()]
    phrases += [*PAN_VERBS, *PAN_LINKS]
    for table in (SIZE_WORDS, SPEED_WORDS, DIRECTION_PHRASES, ZOOM_PHRASES):
        phrases += [phrase for ways in table.values() for phrase in ways]
    phrases += [form for pairs in MOTION_PHRASES.values() for pair in pairs for form in pair]
    return sorted({word for phrase in phrases for word in phrase.split()})


VOCABULARY = _all_words()  # every word of every caption, without commas
