"""Recovers the motion of each object and of the camera from a clip of the procedural world, without learning.

The reader knows what the first frame shows (which objects are where), but not the requested motion. It finds
each object by its colour: every pixel is divided between the object's colour, the colours of the other
objects, and the line of colours that the backdrop of the first frame spans. The centroid, area and angular
moment of the object's share are tracked through the frames, in a window around the last position. The camera
is tracked by aligning the frames outside all objects (method of Lucas and Kanade 1981, with shift, zoom and
brightness as parameters), first each frame to the next, then each to the first; a camera move that explains
little more than no move counts as none. The motion of an object is measured relative to the camera's.

Coordinates and amounts are those of `drawing`: per clip, half the shorter side is 1, y points down. All
scores are right on 1,000 true clips of each kind; tests/test_world.py gives the accuracy under blur, noise
and colour drift. A clip of 64 x 64 and 16 frames takes about 12 ms on one CPU core.

Axes: f frames, p pairs of frames, n positions, h w pixel rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from i2vgen.world import drawing
from i2vgen.world.drawing import Facts, Thing

# An amount counts as motion if it exceeds half of the slowest motion of its kind.
LEAST_TRAVEL = 0.5 * drawing.TRAVEL["slowly"]
LEAST_GROWTH = 0.5 * math.log(drawing.GROWTH["slowly"])
LEAST_TURN = 0.5 * drawing.TURN["slowly"]
LEAST_ZOOM = 0.5 * math.log(drawing.ZOOM["slowly"])

# Order of rotational symmetry; round shapes have no angle.
FOLDS = {"square": 4, "triangle": 3, "star": 5, "diamond": 2, "cross": 4}

EDGE = 0.22  # shares below this count as 0, shares above 1 - EDGE as 1
COLOUR_SHIFT = 0.30  # RGB distance by which an object's colour in frame 0 may differ from the named colour
ALIGN_STEPS = 8
COARSE = 32  # the camera is tracked on pictures whose shorter side is reduced to 32 to 63 pixels
PIXEL_NOISE = 0.04  # standard deviation in the smoothed pictures; sets the strength of the prior
CERTAIN = 1e-4  # standard deviation of a prior that must not move
EVIDENCE = 0.68  # a camera move must reduce the residual below this fraction of that without a move
DRIFT = 0.15  # standard deviation of the sum of the steps from frame to frame
WINDOW_MARGIN = 0.16  # added to an object's circumradius and its fastest motion per frame


@dataclass(frozen=True)
class ThingReading:
    """The motion of one object in the world: one of drawing.MOTIONS, and the amounts per clip."""

    motion: str
    x: float  # displacement
    y: float
    growth: float  # factor of the radius
    turn: float  # degrees, clockwise; 0 for round shapes
    area: tuple[float, ...]  # per frame, in the picture, relative to the expected area in the first frame
    spread: tuple[float, ...]  # per frame: radius of gyration / root of area, relative to the first frame


@dataclass(frozen=True)
class Reading:
    """The motions in a clip: one reading per object, and the camera's ("still" or one of CAMERA_MOVES)."""

    things: tuple[ThingReading, ...]
    camera: str
    pan_x: float  # displacement of the camera in the world
    pan_y: float
    zoom: float  # factor of the picture


def read(frames: np.ndarray, *, facts_objects: Sequence[Thing] | None = None, speed: float = 1.0) -> Reading:
    """Read a clip: `frames` uint8 [f h w 3], two or more; `facts_objects` is `Facts.things`.

    Without objects, only the camera is read. The thresholds scale with `speed`, which is that of
    `drawing.render`. Between two frames, a turn by half a symmetry angle (36 degrees for a star) or a shift
    of the backdrop by half its period is ambiguous, so clips of fewer than about six frames need slow motion.
    ValueError for invalid frames, or if an object covers less than a pixel of the first frame.
    """
    check(frames, speed)
    things = tuple(facts_objects or ())
    pictures = frames.astype(np.float32) / 255.0
    x, y = axes(frames)
    pixel = float(x[0, 1] - x[0, 0])
    first_cover = [_first_cover(thing, x, y) for thing in things]
    for thing, cover in zip(things, first_cover, strict=True):
        if cover.sum() < 1.0:
            raise ValueError(
                f"the {thing.colour} {thing.shape} covers less than a pixel of the first frame; give larger "
                "frames"
            )
    colours = [
        _colour_of(thing, cover, pictures[0]) for thing, cover in zip(things, first_cover, strict=True)
    ]
    backdrop = ~sum(
        (_region_around(thing, x, y, 3.0 * pixel) for thing in things), np.zeros(frames.shape[1:3], bool)
    )
    line = colour_line(pictures[0], backdrop)
    shares = _shares(pictures, colours, line)
    camera_track = track_camera(pictures, shares, line, x, y, speed)
    travel_x, travel_y, growth = (slope(values) for values in camera_track)
    camera = camera_motion(travel_x, travel_y, growth, speed)
    camera_track = keep_only(camera, camera_track)
    readings = []
    for thing, cover, share in zip(things, first_cover, shares, strict=True):
        tracked = _track_thing(thing, share, float(cover.sum()), x, y, speed)
        readings.append(_thing_reading(thing, tracked, camera_track, speed))
    return Reading(tuple(readings), camera, travel_x, travel_y, math.exp(growth))


def score(frames: np.ndarray, facts: Facts, *, speed: float = 1.0) -> dict[str, bool]:
    """Whether a clip shows what its facts say: `motion_right`, `object_right`, `camera_right`.

    motion_right: the motion of every object (including "still") is as requested; without objects, the
    camera's. object_right: in every frame, every object keeps its colour and about its size, in one piece.
    """
    reading = read(frames, facts_objects=facts.things, speed=speed)
    camera_right = reading.camera == facts.camera.kind
    time = speed * np.linspace(0.0, 1.0, len(frames))
    pairs = list(zip(reading.things, facts.things, facts.moves, strict=True))
    motion_right = all(read_thing.motion == move.kind for read_thing, _, move in pairs)
    return {
        "motion_right": motion_right if pairs else camera_right,
        "object_right": all(
            _keeps_size_and_shape(
                read_thing, _area_along(thing, drawing.track(thing, move, facts.camera, time), frames)
            )
            for read_thing, thing, move in pairs
        ),
        "camera_right": camera_right,
    }


def _keeps_size_and_shape(reading: ThingReading, expected: np.ndarray) -> bool:
    """Whether spread and area stay near the first frame's, the area also near `expected` [f] or between."""
    area, spread = np.array(reading.area), np.array(reading.spread)
    enough, small_enough = area >= 0.4 * np.minimum(1.0, expected), area <= 2.0 * np.maximum(1.0, expected)
    return bool(np.all(enough & small_enough) and spread.max() <= 1.6)


def _area_along(thing: Thing, path: tuple[np.ndarray, ...], frames: np.ndarray) -> np.ndarray:
    """Area inside the picture along this path -> [f], relative to the first frame."""
    area = _covers(thing, path, *axes(frames)).sum((1, 2))
    return area / max(float(area[0]), 1.0)


def check(frames: np.ndarray, speed: float) -> None:
    if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8:
        kind = frames.dtype if isinstance(frames, np.ndarray) else type(frames).__name__
        raise ValueError(f"frames are {kind}; give a numpy array of uint8, f h w 3")
    if frames.ndim != 4 or frames.shape[-1] != 3 or min(frames.shape[1:3]) < drawing.SHORTEST_SIDE:
        raise ValueError(f"frames have the shape {frames.shape}; expected f h w 3, h and w of 8 or more")
    if len(frames) < 2:
        raise ValueError("one frame shows no motion; give two or more")
    if not 0.0 < speed < math.inf:
        raise ValueError(f"speed {speed} of a clip to read; use a positive number")


def axes(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """World coordinates of the pixels in the first frame -> x [1 w], y [h 1]."""
    height, width = frames.shape[1:3]
    half = min(height, width) / 2.0
    x = (np.arange(width, dtype=np.float32) + 0.5 - width / 2.0) / half
    y = (np.arange(height, dtype=np.float32) + 0.5 - height / 2.0) / half
    return x[None, :], y[:, None]


# ---------------------------------------------------------------------------------------------------
# Colours


def _first_cover(thing: Thing, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Fraction of each pixel that the object covers in the first frame -> [h w] in 0..1."""
    return _covers(thing, drawing.track(thing, drawing.STILL, drawing.STILL, np.zeros(1)), x, y)[0]


def _covers(thing: Thing, path: tuple[np.ndarray, ...], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Fraction of each pixel that the object covers along a path of `drawing.track` -> [f h w] in 0..1."""
    place_x, place_y, radius, angle = path
    half = 1.0 / float(x[0, 1] - x[0, 0])
    return drawing.coverage(
        thing.shape, x - place_x[:, None, None], y - place_y[:, None, None], radius, angle, half
    )


def _region_around(thing: Thing, x: np.ndarray, y: np.ndarray, margin: float) -> np.ndarray:
    return np.hypot(x - thing.x, y - thing.y) < thing.radius * drawing.REACH[thing.shape] + margin


def _colour_of(thing: Thing, cover: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """The object's colour in the first frame, or its named colour if the frame shows something else there."""
    named = np.array(drawing.COLOURS[thing.colour], np.float32) / 255.0
    core = cover >= min(0.999, cover.max())
    seen = np.median(picture[core], axis=0)
    return seen if np.linalg.norm(seen - named) <= COLOUR_SHIFT else named


def colour_line(picture: np.ndarray, backdrop: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Segment of colours that the backdrop (mask [h w]) spans -> centre, unit direction, half length."""
    colours = picture[backdrop] if backdrop.sum() >= 8 else picture.reshape(-1, 3)
    middle = np.median(colours, axis=0)
    spread = colours - middle
    direction = np.linalg.eigh(spread.T @ spread)[1][:, -1].astype(np.float32)
    low, high = np.quantile(spread @ direction, (0.02, 0.98))
    return middle + direction * np.float32((low + high) / 2.0), direction, float(high - low) / 2.0


def _shares(
    pictures: np.ndarray, colours: list[np.ndarray], line: tuple[np.ndarray, np.ndarray, float]
) -> list[np.ndarray]:
    """Share of each colour in each pixel -> one [f h w] in 0..1 per colour."""
    middle, direction, half_length = line
    to_backdrop = _to_segment(pictures, middle - half_length * direction, middle + half_length * direction)
    # The outline of an object mixes its colour with the backdrop's; the mixture belongs to no other object.
    to_mixture = [_to_segment(pictures, colour, middle) for colour in colours] if len(colours) > 1 else []
    shares = []
    for i, colour in enumerate(colours):
        rest = to_backdrop
        for other in to_mixture[:i] + to_mixture[i + 1 :]:
            rest = np.minimum(rest, other)
        share = rest / np.maximum(rest + _length(pictures - colour), 1e-6)
        shares.append(np.clip((share - EDGE) / (1.0 - 2.0 * EDGE), 0.0, 1.0))
    return shares


def _to_segment(pictures: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Distance of every pixel [.. 3] to the segment between two colours -> [..]."""
    vector, offset = end - start, pictures - start
    along = np.clip(offset @ vector / max(float(vector @ vector), 1e-6), 0.0, 1.0)
    return _length(offset - along[..., None] * vector)


def _length(colours: np.ndarray) -> np.ndarray:
    red, green, blue = colours[..., 0], colours[..., 1], colours[..., 2]
    return np.sqrt(red * red + green * green + blue * blue)


# ---------------------------------------------------------------------------------------------------
# Objects


def _track_thing(
    thing: Thing, share: np.ndarray, pixels: float, x: np.ndarray, y: np.ndarray, speed: float
) -> np.ndarray:
    """Track an object through its share [f h w] -> [f 6]: x, y, area, radius of gyration, moment (re, im).

    `pixels` is the object's expected area in the first frame. An object that is lost keeps its last position,
    with an area near 0.
    """
    rows = []
    margin = WINDOW_MARGIN + drawing.TRAVEL["quickly"] * speed / (len(share) - 1)
    place, radius = (thing.x, thing.y), thing.radius
    for part in share:
        dx, dy = x - place[0], y - place[1]
        window = dx * dx + dy * dy < (drawing.REACH[thing.shape] * radius + margin) ** 2
        weight = part * window
        mass = float(weight.sum())
        if mass < 0.05 * pixels:
            rows.append([*place, mass / pixels, 0.0, 0.0, 0.0])
            continue
        place = (float((weight * x).sum()) / mass, float((weight * y).sum()) / mass)
        radius = thing.radius * min(max(math.sqrt(mass / pixels), 0.4), 2.5)
        dx, dy = x - place[0], y - place[1]
        gyration = math.sqrt(float((weight * (dx * dx + dy * dy)).sum()) / mass)
        turning = 0.0
        if thing.shape in FOLDS:
            length = np.hypot(dx, dy) + 1e-6
            leverage = np.minimum(length / gyration, 1.8) ** 2
            turning = (
                complex((weight * leverage * ((dx + 1j * dy) / length) ** FOLDS[thing.shape]).sum()) / mass
            )
        rows.append([*place, mass / pixels, gyration, np.real(turning), np.imag(turning)])
    return np.array(rows)


def _thing_reading(
    thing: Thing, tracked: np.ndarray, camera: tuple[np.ndarray, ...], speed: float
) -> ThingReading:
    pan_x, pan_y, log_zoom = camera
    x, y, area, gyration, real, imaginary = tracked.T
    zoom = np.exp(log_zoom)
    travel_x, travel_y = slope(x / zoom + pan_x), slope(y / zoom + pan_y)
    # The mean of two measures of size, because blur reduces the area and increases the radius of gyration.
    size = 0.5 * np.log(np.maximum(area, 1e-3)) + np.log(np.maximum(gyration, 1e-2))
    growth = slope(0.5 * size - log_zoom)
    turn = 0.0
    if thing.shape in FOLDS:
        turn = math.degrees(slope(np.unwrap(np.arctan2(imaginary, real)))) / FOLDS[thing.shape]
    width = gyration / np.sqrt(np.maximum(area, 1e-3))
    return ThingReading(
        motion=thing_motion(travel_x, travel_y, growth, turn, speed),
        x=travel_x,
        y=travel_y,
        growth=math.exp(growth),
        turn=turn,
        area=tuple(area.tolist()),
        spread=tuple((width / max(width[0], 1e-3)).tolist()),
    )


def thing_motion(x: float, y: float, growth: float, turn: float, speed: float) -> str:
    amounts = {
        "travel": math.hypot(x, y) / (LEAST_TRAVEL * speed),
        "growth": abs(growth) / (LEAST_GROWTH * speed),
        "turn": abs(turn) / (LEAST_TURN * speed),
    }
    strongest = max(amounts, key=amounts.get)
    if amounts[strongest] < 1.0:
        return "still"
    if strongest == "travel":
        return _nearest_direction(x, y, drawing.DIRECTIONS)
    if strongest == "growth":
        return "grow" if growth > 0.0 else "shrink"
    return "rotate"


def _nearest_direction(x: float, y: float, names: Sequence[str]) -> str:
    return max(names, key=lambda name: x * drawing.DIRECTIONS[name][0] + y * drawing.DIRECTIONS[name][1])


def slope(values: np.ndarray) -> float:
    """Change of a track [f] from the first to the last frame, by a least-squares line."""
    time = np.linspace(-0.5, 0.5, len(values))
    return float(time @ (values - values.mean()) / (time @ time))


# ---------------------------------------------------------------------------------------------------
# Camera


def track_camera(
    pictures: np.ndarray,
    shares: list[np.ndarray],
    line: tuple[np.ndarray, np.ndarray, float],
    x: np.ndarray,
    y: np.ndarray,
    speed: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Track the camera -> its displacement x, y and log of its zoom, each [f], 0 in the first frame.

    A point at s in one frame lies at (1 + a) s + b in the next. Pictures are projected on the backdrop's line
    of colours, where the texture is strongest, and downscaled, which saves time and reduces noise.
    """
    middle, direction, _ = line
    weight = np.ones(pictures.shape[:3], np.float32)
    for share in shares:
        weight *= 1.0 - _dilated(share) > 0.95
    grey = ((pictures - middle) @ direction) * weight
    cell = max(1, min(pictures.shape[1:3]) // COARSE)
    grey, weight = _smooth(_coarse(grey, cell)), _smooth(_coarse(weight, cell))
    x, y = _coarse_axis(x, cell), _coarse_axis(y, cell)
    grey = grey / np.maximum(weight, 1e-3)
    weight = np.clip(2.0 * weight - 1.0, 0.0, 1.0)
    later, later_weight = grey[1:], weight[1:]
    still = np.zeros((len(later), 3))
    steps, _ = _align(grey[:-1], later, weight[:-1], later_weight, x, y, still, speed / len(later))
    guess = _composed(steps)
    first, first_weight = (np.broadcast_to(part[:1], later.shape) for part in (grey, weight))
    found, residual = _align(first, later, first_weight, later_weight, x, y, guess, DRIFT)
    _, residual_still = _align(first, later, first_weight, later_weight, x, y, still, CERTAIN)
    half = len(residual) // 2
    if residual[half:].sum() > EVIDENCE * residual_still[half:].sum():
        found = still
    zoom = 1.0 + np.concatenate([[0.0], found[:, 0]])
    shift = np.concatenate([np.zeros((1, 2)), found[:, 1:]])
    return -shift[:, 0] / zoom, -shift[:, 1] / zoom, np.log(zoom)


def _composed(steps: np.ndarray) -> np.ndarray:
    """Transforms from frame to frame -> from the first frame to each, both [p 3]: a, bx, by."""
    scale, shift, rows = 1.0, np.zeros(2), []
    for step in steps:
        scale, shift = (1.0 + step[0]) * scale, (1.0 + step[0]) * shift + step[1:]
        rows.append([scale - 1.0, *shift])
    return np.array(rows)


def _align(
    before: np.ndarray,
    after: np.ndarray,
    weight_before: np.ndarray,
    weight_after: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    guess: np.ndarray,
    doubt: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Align pairs of pictures [p h w] -> zoom a and shift b, [p 3]: a, bx, by; residual mean square [p].

    Gauss-Newton steps on after((1 + a) s + b) = (1 + gain) before(s) + offset, with robust (Cauchy) weights
    and a Gaussian prior: mean `guess` [p 3], standard deviation `doubt` relative to PIXEL_NOISE.
    """
    half = 1.0 / float(x[0, 1] - x[0, 0])
    slope_y, slope_x = (half * g for g in np.gradient(before, axis=(1, 2)))
    columns = np.stack(
        [slope_x * x + slope_y * y, slope_x, slope_y, -before, -np.ones_like(before)], axis=-1
    ).reshape(len(before), -1, 5)
    prior = np.diag([PIXEL_NOISE**2 / doubt**2] * 3 + [0.01, 0.01]).astype(np.float32)
    start = np.concatenate([guess, np.zeros((len(before), 2))], axis=1)
    found = start.copy()
    for _ in range(ALIGN_STEPS):
        a, bx, by, gain, offset = (found[:, i, None, None].astype(np.float32) for i in range(5))
        column = ((1.0 + a) * x + bx - x[0, 0]) * half
        row = ((1.0 + a) * y + by - y[0, 0]) * half
        warped, seen = _sample(after, weight_after, column, row)
        error = (warped - (1.0 + gain) * before - offset).reshape(len(before), -1)
        weight = (weight_before * seen).reshape(len(before), -1)
        scale = 1e-3 + 2.0 * (weight * np.abs(error)).sum(1, keepdims=True) / (
            weight.sum(1, keepdims=True) + 1.0
        )
        weight = weight / (1.0 + (error / scale) ** 2)
        weighted = columns * weight[..., None]
        normal = weighted.transpose(0, 2, 1) @ columns + prior
        pull = (weighted * error[..., None]).sum(1) + (found - start) @ prior
        step = np.linalg.solve(normal, pull[..., None])[..., 0]
        found -= step
        found[:, :3] = np.clip(found[:, :3], guess - 0.5, guess + 0.5)  # keeps a diverging pair finite
        found[:, 0] = np.clip(found[:, 0], -0.8, 4.0)
        if np.abs(step).max() < 3e-4:
            break
    return found[:, :3], (weight * error**2).sum(1) / np.maximum(weight.sum(1), 1e-3)


def _sample(
    pictures: np.ndarray, weight: np.ndarray, column: np.ndarray, row: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Sample pictures and weights [p h w] bilinearly at column [p 1 w], row [p h 1]; weight 0 outside."""
    down, across = (
        _linear_weights(row[:, :, 0], pictures.shape[1]),
        _linear_weights(column[:, 0, :], pictures.shape[2]),
    )
    across = across.transpose(0, 2, 1)
    inside = (down.sum(2) > 0.999)[:, :, None] & (across.sum(1) > 0.999)[:, None, :]
    return down @ pictures @ across, (down @ weight @ across) * inside


def _linear_weights(places: np.ndarray, length: int) -> np.ndarray:
    """Weights of linear interpolation at positions [p n] on a line of `length` values -> [p n length]."""
    apart = np.abs(places[:, :, None] - np.arange(length, dtype=np.float32))
    return np.maximum(1.0 - apart, 0.0, dtype=np.float32)


def _smooth(pictures: np.ndarray) -> np.ndarray:
    """Binomial blur (1 2 1) / 4 along both axes of [f h w], with replicated edges."""
    padded = np.pad(pictures, ((0, 0), (1, 1), (1, 1)), mode="edge")
    wide = 0.25 * padded[:, :, :-2] + 0.5 * padded[:, :, 1:-1] + 0.25 * padded[:, :, 2:]
    return 0.25 * wide[:, :-2] + 0.5 * wide[:, 1:-1] + 0.25 * wide[:, 2:]


def _dilated(share: np.ndarray) -> np.ndarray:
    """Dilate by two pixels: the largest share within a square of 5 x 5, [f h w] -> [f h w]."""
    for axis in (1, 2):
        wide = share.copy()
        for step in (1, 2):
            ahead, behind = _cut(axis, step, None), _cut(axis, 0, -step)
            wide[ahead] = np.maximum(wide[ahead], share[behind])
            wide[behind] = np.maximum(wide[behind], share[ahead])
        share = wide
    return share


def _cut(axis: int, start: int, stop: int | None) -> tuple[slice, ...]:
    return (slice(None),) * axis + (slice(start, stop),)


def _coarse(pictures: np.ndarray, cell: int) -> np.ndarray:
    """Means over cells of cell x cell pixels; incomplete cells at the right and bottom are dropped."""
    count, height, width = pictures.shape
    rows, columns = height // cell, width // cell
    cells = pictures[:, : rows * cell, : columns * cell].reshape(count, rows, cell, columns, cell)
    return cells.mean((2, 4))


def _coarse_axis(places: np.ndarray, cell: int) -> np.ndarray:
    line = places.ravel()
    line = line[: len(line) // cell * cell].reshape(-1, cell).mean(1)
    return line.reshape((1, -1) if places.shape[0] == 1 else (-1, 1))


def camera_motion(x: float, y: float, growth: float, speed: float) -> str:
    pan = math.hypot(x, y) / (LEAST_TRAVEL * speed)
    zoom = abs(growth) / (LEAST_ZOOM * speed)
    if max(pan, zoom) < 1.0:
        return "still"
    if zoom > pan:
        return "zoom in" if growth > 0.0 else "zoom out"
    return "pan " + _nearest_direction(x, y, ("left", "right", "up", "down"))


def keep_only(camera: str, track: tuple[np.ndarray, np.ndarray, np.ndarray]) -> tuple[np.ndarray, ...]:
    """The components of a measured track that the named camera motion has; the others are noise, set to 0."""
    pan_x, pan_y, log_zoom = track
    zero = np.zeros_like(pan_x)
    if camera == "still":
        return zero, zero, zero
    if camera.startswith("zoom"):
        return zero, zero, log_zoom
    return (pan_x, zero, zero) if camera in ("pan left", "pan right") else (zero, pan_y, zero)
