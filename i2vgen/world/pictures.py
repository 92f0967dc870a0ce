"""A world of pictures: a seed -> a short clip of cut-outs before a drawn or photographed background.

Coordinates, motions, amounts and the axes' letters are those of `drawing`, whose flat shapes this world
replaces by pictures of things (`things.load_things`); a `Facts` of either world is read the same way. A
thing's radius is that of the circle around it. Beyond `drawing`, a thing may move while the camera does.
Captions name the thing or speak of "it", since the picture shows what it is.

Clips depend on the seed, the things and the photographs. Speed on one CPU core
at 64 x 64 and 16 frames: about 230 clips/s (pairs 190), with half of the backgrounds photographed.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from i2vgen.world import drawing, things
from i2vgen.world.drawing import (
    BASIC_MOTIONS,
    CAMERA_MOVES,
    MOTIONS,
    STILL,
    Backdrop,
    Batch,
    Clip,
    Facts,
    Kind,
    Move,
    pick,
    stream,
    uniform,
    weighted_pick,
)
from i2vgen.world.things import Cutout, Part, Pyramid

SIZES = {"small": 0.29, "medium": 0.38, "large": 0.49}  # radius of the circle around a compact thing
TURNED = 10.0  # degrees by which a thing may be turned in the first frame
GROUNDS = {**drawing.BACKDROPS, "noise": "mottled", "glow": "shaded", "photograph": "photographed"}
DRAWN = tuple(kind for kind in GROUNDS if kind != "photograph")
TEXTURED = ("clouds", "stripes", "checks", "dots", "noise")  # a camera move shows
PHOTOGRAPHED = 0.5  # share of photographs, where there are some
MOVES_UNDER_CAMERA = 0.4  # share of the camera clips of one thing in which it moves by itself
CONTRAST = 0.33  # RGB distance between a thing and what is behind it that a background should have
GLANCE = 24  # pixels of the picture on which that is measured
TRIES = 10
LEAST_SIDE = 32  # pixels; below it, a thing is a blob


@dataclass(frozen=True)
class Placed:
    """One thing as the first frame shows it."""

    name: str
    x: float
    y: float
    radius: float
    angle: float  # degrees, clockwise


@dataclass(frozen=True)
class Photograph:
    """A part of a photograph as the background; beyond its edges it goes on mirrored."""

    number: int
    x: float  # of the photograph's centre
    y: float
    half: float  # half its shorter side
    kind: str = "photograph"


@functools.lru_cache(maxsize=4)
def open_world(place: str, backgrounds: str = "", part: Part = "all", *, section: str = "") -> PictureWorld:
    """The world of a folder's or font's things; `section` stands before the settings' names in errors."""
    found = things.load_things(place, part, setting=f"{section}things=")
    photographs = (
        things.load_photographs(backgrounds, setting=f"{section}backgrounds=") if backgrounds else []
    )
    return PictureWorld(found, photographs, (str(place), str(backgrounds), part))


def open_for_scoring(place: str, backgrounds: str = "") -> PictureWorld:
    """The things of a font that training never shows, or all of a folder, which the user chose."""
    part = "never trained" if Path(place).expanduser().is_file() else "all"
    return open_world(place, backgrounds, part)


class PictureWorld:
    """Has the functions of `drawing`: sample_facts, another_motion, caption, render, clip, batch."""

    def __init__(self, found: dict[str, Cutout], photographs: Sequence[Pyramid], origin: tuple = ()):
        self.things, self.photographs, self.origin = dict(sorted(found.items())), list(photographs), origin
        self.names = tuple(self.things)

    def __reduce__(self):
        """Other processes open it again, once: its pictures are too large to send with every batch."""
        return open_world, self.origin

    @functools.cached_property
    def turning(self) -> tuple[str, ...]:
        return tuple(name for name in self.names if self.things[name].turns)

    def contents(self) -> dict[str, str]:
        """Fingerprints, by which a resumed run knows whether the pictures changed."""
        named = [name.encode() + thing.pyramid.finest.tobytes() for name, thing in self.things.items()]
        found = {"things": _fingerprint(named)}
        if self.photographs:
            found["backgrounds"] = _fingerprint(photo.finest.tobytes() for photo in self.photographs)
        return found

    def vocabulary(self) -> list[str]:
        """Every word of every caption, for `clip.words`."""
        own = (*IT, *SCENES, *GROUNDS.values(), *JOINTS, *ACROSS, *ALONG, "the camera zooms in out")
        return sorted({*drawing.VOCABULARY, *" ".join(own).split(), *things.vocabulary(self.names)})

    # -----------------------------------------------------------------------------------------------
    # Facts

    def sample_facts(self, seed: int, *, kind: Kind | None = None) -> Facts:
        """The contents of the clip of this seed; kinds and their proportions are those of `drawing`."""
        if kind is not None and kind not in drawing.KINDS:
            raise ValueError(
                f"kind {kind!r} of a clip is unknown; use None or one of {', '.join(drawing.KINDS)}"
            )
        rng = stream(seed, 3)
        kind = weighted_pick(rng, drawing.SHARES) if kind is None else kind
        camera = STILL
        if kind == "pair" and len(self.names) > 1:
            placed, moves = self._pair(rng, STILL)
        elif kind == "camera":
            camera = Move(pick(rng, CAMERA_MOVES), pick(rng, drawing.SPEEDS))
            placed, moves = self._under_camera(rng, camera)
        else:
            placed, moves = self._single(rng, BASIC_MOTIONS if kind == "basic" else MOTIONS)
        return Facts(self._ground(rng, placed, camera), placed, moves, camera)

    def another_motion(self, facts: Facts, seed: int) -> Facts:
        """The same first frame with another basic motion."""
        if len(facts.things) != 1 or facts.camera.kind != "still":
            raise ValueError("another motion needs one thing under a still camera")
        rng, move = stream(seed, 5), facts.moves[0]
        turning = facts.things[0].name in self.turning
        kind = pick(rng, [m for m in BASIC_MOTIONS if m != move.kind and (turning or m != "rotate")])
        speed = "" if kind == "still" else ("slowly" if move.kind == "still" else move.speed)
        return replace(facts, moves=(Move(kind, speed),))

    def _single(self, rng: np.random.Generator, motions: Sequence[str]):
        move, name = self._move(rng, motions)
        pace = move.speed if move.kind != "still" else pick(rng, drawing.SPEEDS)
        # A large thing would leave the picture on a long way.
        radius = SIZES[pick(rng, ("small", "medium") if pace == "quickly" else tuple(SIZES))]
        room = max(0.04, 1.0 - drawing.TRAVEL[pace] - 0.75 * radius)
        return (self._place(rng, name, radius, room),), (move,)

    def _move(self, rng: np.random.Generator, motions: Sequence[str]) -> tuple[Move, str]:
        """A motion and a thing that can show it."""
        kind = pick(rng, [m for m in motions if m != "rotate" or self.turning])
        speed = "" if kind == "still" else pick(rng, drawing.SPEEDS)
        return Move(kind, speed), pick(rng, self.turning if kind == "rotate" else self.names)

    def _under_camera(self, rng: np.random.Generator, camera: Move):
        count = weighted_pick(rng, {0: 0.15, 1: 0.65, 2: 0.2})
        if count == 0:
            return (), ()
        if count == 2 and len(self.names) > 1:
            return self._pair(rng, camera)
        moves = [m for m in MOTIONS if m != "still"] if rng.random() < MOVES_UNDER_CAMERA else ["still"]
        while True:
            move, name = self._move(rng, moves)
            if move.speed == "quickly":
                move = replace(move, speed="")
            placed = self._place(rng, name, SIZES[pick(rng, tuple(SIZES))], 0.6)
            if _fit([placed], [move], camera):
                return (placed,), (move,)

    def _pair(self, rng: np.random.Generator, camera: Move):
        """Two different things that stay inside the picture and never touch."""
        both_move = rng.random() < 0.5
        while True:
            moves, placed = [], []
            for moving in (True, both_move):
                motions = ["still"] if camera != STILL or not moving else [m for m in MOTIONS if m != "still"]
                move, name = self._move(rng, motions)
                placed.append(self._place(rng, name, SIZES[pick(rng, ("small", "medium"))], 0.8))
                moves.append(move)
            if placed[0].name != placed[1].name and _fit(placed, moves, camera):
                return tuple(placed), tuple(moves)

    def _place(self, rng: np.random.Generator, name: str, radius: float, room: float) -> Placed:
        radius *= self.things[name].reach * uniform(rng, 0.94, 1.06)
        x, y = uniform(rng, -room, room), uniform(rng, -room, room)
        return Placed(name, x, y, radius, uniform(rng, -TURNED, TURNED))

    def _ground(self, rng: np.random.Generator, placed: Sequence[Placed], camera: Move):
        """The first of some backgrounds from which every thing stands out, or the one where it does most."""
        drawn = [(thing, self._drawn(thing)) for thing in placed]
        best, chosen = -1.0, None
        for _ in range(TRIES):
            ground = self._any_ground(rng, camera)
            behind = self._behind(ground, STILL, np.zeros(1), GLANCE, GLANCE)[0]
            contrast = min((_contrast(thing, behind) for _, thing in drawn), default=1.0)
            if contrast > best:
                best, chosen = contrast, ground
            if best >= CONTRAST:
                break
        return chosen

    def _any_ground(self, rng: np.random.Generator, camera: Move) -> Backdrop | Photograph:
        if self.photographs and rng.random() < PHOTOGRAPHED:
            number = int(rng.random() * len(self.photographs))
            high, wide = self.photographs[number].finest.shape[:2]
            look_x, look_y, zoom = drawing.camera_path(camera, np.array([0.0, 1.0]))
            need = float((np.maximum(np.abs(look_x), np.abs(look_y)) + 1.0 / zoom).max())
            half = need * uniform(rng, 1.0, 1.5)
            room_x, room_y = (max(0.0, half * side / min(high, wide) - need) for side in (wide, high))
            return Photograph(number, uniform(rng, -room_x, room_x), uniform(rng, -room_y, room_y), half)
        first, second = _colours(rng)
        return Backdrop(
            kind=pick(rng, DRAWN if camera == STILL else TEXTURED),
            first=first,
            second=second,
            angle=uniform(rng, 0.0, 2.0 * math.pi),
            period=uniform(rng, 0.45, 0.95),
            x=uniform(rng, 0.0, 100.0),
            y=uniform(rng, 0.0, 100.0),
            seed=int(rng.random() * 2**31),
        )

    def _drawn(self, thing: Placed) -> np.ndarray:
        path = drawing.track(thing, STILL, STILL, np.zeros(1))
        return things.warp(self.things[thing.name], *path, GLANCE, GLANCE)[0].numpy()

    # -----------------------------------------------------------------------------------------------
    # Pictures

    def render(self, facts: Facts, *, width: int, height: int, frames: int, speed: float = 1.0) -> np.ndarray:
        """Draw the clip -> uint8 [f h w 3]; `speed` as in `drawing.render`."""
        drawing.check_size(width, height, frames, speed)
        refuse_size(width, height)
        time = speed * np.linspace(0.0, 1.0, frames)
        canvas = np.empty((frames, height, width, 3), np.float32)
        canvas[:] = self._behind(facts.backdrop, facts.camera, time, width, height)
        for thing, move in zip(facts.things, facts.moves, strict=True):
            self._paint(canvas, thing, drawing.track(thing, move, facts.camera, time))
        return np.rint(np.clip(canvas, 0.0, 1.0) * 255.0).astype(np.uint8)

    def _paint(self, canvas: np.ndarray, thing: Placed, path: tuple[np.ndarray, ...]) -> None:
        """Lay a thing over the canvas [f h w 3], in place, within a window around its centre."""
        x, y, radius, angle = path
        _, height, width, _ = canvas.shape
        half = min(width, height) / 2.0
        column, row = x * half + width / 2.0, y * half + height / 2.0
        side = 2 * math.ceil(radius.max() * things.MARGIN * half + 1.0)
        left, top = (np.floor(place).astype(int) - side // 2 for place in (column, row))
        inner = side / 2.0  # pixels to a length of 1 in the window's own coordinates
        drawn = things.warp(
            self.things[thing.name],
            (column - left - inner) / inner,
            (row - top - inner) / inner,
            radius * half / inner,
            angle,
            side,
            side,
        ).permute(0, 2, 3, 1).numpy()  # fmt: skip
        for i in range(len(canvas)):
            rows = slice(max(top[i], 0), max(min(top[i] + side, height), 0))
            columns = slice(max(left[i], 0), max(min(left[i] + side, width), 0))
            part = canvas[i, rows, columns]
            seen = drawn[i, rows.start - top[i] :, columns.start - left[i] :][
                : part.shape[0], : part.shape[1]
            ]
            part *= 1.0 - seen[..., 3:]
            part += seen[..., :3]

    def covers(self, facts: Facts, width: int, height: int) -> list[np.ndarray]:
        """As `drawing.covers`."""
        paths = [drawing.track(thing, STILL, STILL, np.zeros(1)) for thing in facts.things]
        return [
            things.warp(self.things[thing.name], *path, width, height)[0, 3].numpy()
            for thing, path in zip(facts.things, paths, strict=True)
        ]

    def _behind(
        self, ground: Backdrop | Photograph, camera: Move, time: np.ndarray, width: int, height: int
    ) -> np.ndarray:
        """The background -> float32 [f h w 3] in 0..1; f is 1 under a still camera."""
        half = min(width, height) / 2.0
        x = (np.arange(width) + 0.5 - width / 2.0) / half
        y = (np.arange(height) + 0.5 - height / 2.0) / half
        look_x, look_y, zoom = drawing.camera_path(camera, time[:1] if camera.kind == "still" else time)
        u = (x / zoom[:, None] + look_x[:, None])[:, None, :].astype(np.float32)  # f 1 w
        v = (y / zoom[:, None] + look_y[:, None])[:, :, None].astype(np.float32)  # f h 1
        if isinstance(ground, Photograph):
            return self._photographed(ground, u, v, zoom * half)
        level = _level(ground, u, v)
        first, second = (np.array(c, np.float32) for c in (ground.first, ground.second))
        return first + level[..., None] * (second - first)

    def _photographed(
        self, ground: Photograph, u: np.ndarray, v: np.ndarray, scale: np.ndarray
    ) -> np.ndarray:
        photo = self.photographs[ground.number]
        high, wide = photo.finest.shape[:2]
        short = min(high, wide)
        p = _mirrored((u - np.float32(ground.x)) / np.float32(ground.half * wide / short))
        q = _mirrored((v - np.float32(ground.y)) / np.float32(ground.half * high / short))
        reduction = short / (2.0 * ground.half * scale)
        frames = [
            photo.sample(
                *torch.broadcast_tensors(torch.from_numpy(a[None]), torch.from_numpy(b[None])), r, border=True
            )
            for a, b, r in zip(p, q, reduction, strict=True)
        ]
        return torch.cat(frames).permute(0, 2, 3, 1).numpy()

    def clip(
        self,
        seed: int,
        *,
        width: int = 64,
        height: int = 64,
        frames: int = 16,
        kind: Kind | None = None,
        speed: float = 1.0,
    ) -> Clip:
        facts = self.sample_facts(seed, kind=kind)
        drawn = self.render(facts, width=width, height=height, frames=frames, speed=speed)
        return Clip(drawn, self.caption(facts, seed), facts)

    def batch(
        self,
        seeds: Iterable[int],
        *,
        width: int = 64,
        height: int = 64,
        frames: int = 16,
        kind: Kind | Sequence[Kind] | None = None,
        speed: float = 1.0,
    ) -> Batch:
        """As `drawing.batch`."""
        return drawing.batch(
            seeds, width=width, height=height, frames=frames, kind=kind, speed=speed, clip=self.clip
        )

    # -----------------------------------------------------------------------------------------------
    # Captions

    def caption(self, facts: Facts, seed: int) -> str:
        """One of many captions of the clip, in lower case."""
        rng = stream(seed, 4)
        if facts.camera.kind != "still":
            return _say_camera(rng, facts)
        text = _say_one(rng, facts) if len(facts.things) == 1 else _say_two(rng, facts)
        if rng.random() < 0.1:
            text = f"{text} on a {GROUNDS[facts.backdrop.kind]} background"
        return text


def refuse_size(width: int, height: int) -> None:
    if min(width, height) < LEAST_SIDE:
        raise ValueError(
            f"frames of {width} x {height} pixels are too small for pictures of things (things=); give "
            f"{LEAST_SIDE} or more"
        )


def _fingerprint(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _fit(placed: Sequence[Placed], moves: Sequence[Move], camera: Move) -> bool:
    """Whether all things stay inside the picture, and apart."""
    time = np.linspace(0.0, 1.0, 9)
    tracks = [drawing.track(thing, move, camera, time) for thing, move in zip(placed, moves, strict=True)]
    for x, y, radius, _ in tracks:
        if np.any(np.maximum(np.abs(x), np.abs(y)) + 0.85 * radius > 1.0):
            return False
    if len(tracks) < 2:
        return True
    (x, y, r, _), (u, v, s, _) = tracks
    return bool(np.all(np.hypot(x - u, y - v) > r + s + 0.04))


def _contrast(drawn: np.ndarray, behind: np.ndarray) -> float:
    """Mean RGB distance of a thing [4 h w], premultiplied, from what it covers [h w 3]."""
    alpha = drawn[3]
    gap = drawn[:3].transpose(1, 2, 0) - alpha[..., None] * behind
    return float(np.sqrt((gap**2).sum(-1)).sum() / max(float(alpha.sum()), 1e-3))


def _colours(rng: np.random.Generator) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Two colours of one background, from pale to dark, some close and some far apart."""
    grey = uniform(rng, 0.15, 0.85)
    step = uniform(rng, 0.08, 0.3) * (1.0 if rng.random() < 0.5 else -1.0)
    pair = (np.full(3, grey + sign * step / 2) + drawing.tint(rng, 0.22) for sign in (-1.0, 1.0))
    first, second = (tuple(np.clip(colour, 0.04, 0.96).tolist()) for colour in pair)
    return first, second


def _level(ground: Backdrop, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Level between the two colours of a drawn background: u [f 1 w], v [f h 1] -> [f h w] in 0..1."""
    if ground.kind == "glow":
        x, y = math.cos(ground.angle) * 0.6, math.sin(ground.angle) * 0.6
        return np.clip(np.hypot(u - np.float32(x), v - np.float32(y)) / np.float32(1.8), 0.0, 1.0)
    if ground.kind != "noise":
        return drawing.texture(ground, u, v)
    lattice = (
        np.random.Generator(np.random.PCG64(ground.seed)).random((drawing.LATTICE,) * 2).astype(np.float32)
    )
    level = 0.0
    for cell, weight in ((0.8, 0.5), (0.37, 0.3), (0.16, 0.2)):
        cell = np.float32(cell)
        level = level + np.float32(weight) * drawing.value_noise(
            lattice, (u + np.float32(ground.x)) / cell, (v + np.float32(ground.y)) / cell
        )
    return np.clip(1.6 * level - 0.3, 0.0, 1.0)


def _mirrored(places: np.ndarray) -> np.ndarray:
    """Places on a line that is mirrored at -1 and 1 again and again -> -1..1."""
    return 1.0 - np.abs((places + 1.0) % 4.0 - 2.0)


# ---------------------------------------------------------------------------------------------------
# Captions: motions are told in the phrases of `drawing`

IT = ("it", "the object", "the thing")
SCENES = ("the scene", "the picture")
JOINTS = ("while", "as", "and")
ACROSS, ALONG = ("on the left", "on the right"), ("at the top", "at the bottom")


def _say_one(rng: np.random.Generator, facts: Facts) -> str:
    noun, many = _noun(rng, facts.things[0])
    move, drawn = facts.moves[0], rng.random()
    if many or drawn >= 0.85:
        return f"{noun} {drawing.say_motion(rng, move, 1)}"
    if drawn < 0.6:
        return f"{noun} {drawing.say_motion(rng, move, 0)}"
    if drawn < 0.75 or not move.speed:
        return f"{noun} is {drawing.say_motion(rng, move, 1)}"
    speed = pick(rng, drawing.SPEED_WORDS[move.speed])
    return f"{speed}, {noun} {drawing.say_motion(rng, Move(move.kind), 0)}"


def _say_two(rng: np.random.Generator, facts: Facts) -> str:
    """Place tells which is which, besides the name: that of a thing never seen in training says nothing."""
    order = (0, 1) if rng.random() < 0.5 else (1, 0)
    places, both = _places(facts.things), rng.random() < 0.5
    said = []
    for i in order:
        noun, many = _noun(rng, facts.things[i], named=True)
        motion = drawing.say_motion(rng, facts.moves[i], int(many or rng.random() < 0.2))
        said.append(f"{noun} {places[i]} {motion}" if both or not said else f"{noun} {motion}")
    return f"{said[0]} {pick(rng, JOINTS)} {said[1]}"


def _places(pair: Sequence[Placed]) -> tuple[str, str]:
    """Where the two are at the start, along the axis on which they are further apart."""
    one, other = pair
    across = abs(one.x - other.x) >= abs(one.y - other.y)
    first, last = ACROSS if across else ALONG
    before = one.x < other.x if across else one.y < other.y
    return (first, last) if before else (last, first)


def _say_camera(rng: np.random.Generator, facts: Facts) -> str:
    camera, speed = facts.camera, pick(rng, drawing.SPEED_WORDS[facts.camera.speed])
    zooms = camera.kind in drawing.ZOOM_PHRASES
    moving = any(move.kind != "still" for move in facts.moves)
    if len(facts.things) == 1 and (moving or rng.random() < 0.3):
        if zooms:
            move = camera.kind.replace("zoom", "zooms")
        else:
            way = pick(rng, drawing.DIRECTION_PHRASES[camera.kind.removeprefix("pan ")])
            move = f"{pick(rng, drawing.PAN_VERBS)} {way}"
        noun, many = _noun(rng, facts.things[0])
        told = " ".join(part for part in ("the camera", speed, move) if part)
        return f"{noun} {drawing.say_motion(rng, facts.moves[0], int(many))} {pick(rng, JOINTS[:2])} {told}"
    scene = pick(rng, (*SCENES, f"a {GROUNDS[facts.backdrop.kind]} background"))
    what = " and ".join(_noun(rng, thing, named=len(facts.things) > 1)[0] for thing in facts.things) or scene
    if zooms:
        move = f"{pick(rng, drawing.ZOOM_PHRASES[camera.kind])} {what}"
    else:
        way = pick(rng, drawing.DIRECTION_PHRASES[camera.kind.removeprefix("pan ")])
        move = f"{pick(rng, drawing.PAN_VERBS)} {way} {pick(rng, drawing.PAN_LINKS)} {what}"
    if speed and rng.random() < 0.3:
        return f"{speed}, the camera {move}"
    return " ".join(part for part in ("the camera", speed, move) if part)


def _noun(rng: np.random.Generator, thing: Placed, *, named: bool = False) -> tuple[str, bool]:
    """The thing in words, and whether there are many of it ("gloves")."""
    drawn, name = rng.random(), thing.name
    if not named and drawn < 0.3:
        return pick(rng, IT), False
    last = name.split()[-1]
    many = last.endswith("s") and not last.endswith(("ss", "us", "is"))
    if many or drawn < 0.75:
        return f"the {name}", many
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}", False
