"""Draw the example pictures of the README.

    i2vgen draw-example output=outputs/boat.png          a red sailing boat on a lake at dusk
    i2vgen draw-example seed=17 output=outputs/star.png  first frame of the world's clip 17
    i2vgen draw-example seed=4 things=i2vgen/assets/things output=outputs/thing.png

    seed=       draw the first frame of a clip of the world and print its caption (default: the boat)
    kind=       with seed=: basic, one object, the default; pair, two; single or camera
    size=       width and height of the world's picture in pixels, 256 by default
    things=     with seed=: the object is one of this folder's or font's things, as in `i2vgen evaluate`
    backgrounds=    with things=: also put it on the photographs of this folder

The same words always draw the same picture.
"""

from __future__ import annotations

import typing

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from i2vgen import cli
from i2vgen.world import drawing, pictures

WIDTH, HEIGHT, OVERSAMPLE = 640, 352, 2
SKY = ((36, 40, 92), (110, 76, 140), (236, 132, 110), (255, 205, 140))  # from the zenith to the horizon
WATER = ((214, 138, 118), (96, 78, 132), (30, 36, 78))


def gradient(stops: tuple[tuple[int, int, int], ...], rows: int, columns: int) -> np.ndarray:
    """Colour stops from top to bottom -> float [rows columns 3]"""
    at = np.linspace(0, len(stops) - 1, rows)
    bands = [np.interp(at, range(len(stops)), [stop[c] for stop in stops]) for c in range(3)]
    return np.repeat(np.stack(bands, -1)[:, None], columns, axis=1)


def ridge(width: int, base: float, amplitude: float, seed: int) -> list[tuple[float, float]]:
    """The upper edge of a mountain range: a sum of waves with random phases."""
    random = np.random.default_rng(seed)
    x = np.linspace(0, 1, 200)
    y = sum(np.sin(2 * np.pi * (k * x + random.random())) / k for k in (1, 2, 3, 5, 8, 13))
    return [(float(a * width), float(base - amplitude * b)) for a, b in zip(x, y, strict=True)]


def draw() -> Image.Image:
    w, h = WIDTH * OVERSAMPLE, HEIGHT * OVERSAMPLE
    horizon = int(0.58 * h)
    pixels = np.concatenate([gradient(SKY, horizon, w), gradient(WATER, h - horizon, w)])
    rows, columns = np.mgrid[0:h, 0:w]
    sun = np.hypot(columns - 0.72 * w, rows - 0.46 * h)
    pixels += 120 * np.exp(-((sun / (0.12 * h)) ** 2))[..., None] * np.array([1.0, 0.8, 0.5])
    depth = (rows - horizon) / (h - horizon)
    waves = np.sin(rows * 0.35 / (0.25 + np.clip(depth, 0, 1)) + 3 * np.sin(columns * 0.008))
    glitter = np.exp(-(((columns - 0.72 * w) / (0.09 * w * (0.3 + np.clip(depth, 0, 1)))) ** 2))
    pixels += np.where(depth > 0, 9 * waves + 70 * glitter * (waves > 0.2), 0)[..., None]
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))

    canvas = ImageDraw.Draw(image)
    for base, amplitude, seed, colour in ((0.53, 0.035, 5, (92, 72, 120)), (0.575, 0.03, 11, (58, 52, 96))):
        edge = [(a, min(b, horizon)) for a, b in ridge(w, base * h, amplitude * h, seed)]
        canvas.polygon([(0, horizon), *edge, (w, horizon)], fill=colour)
    boat(canvas, x=0.36 * w, y=0.74 * h, size=0.32 * h)
    return image.filter(ImageFilter.GaussianBlur(1)).resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def boat(canvas: ImageDraw.ImageDraw, *, x: float, y: float, size: float) -> None:
    """Hull, mast and two sails; (x, y) is the middle of the waterline."""

    def at(*points: tuple[float, float]) -> list[tuple[float, float]]:
        return [(x + size * a, y + size * b) for a, b in points]

    canvas.ellipse([*at((-0.62, -0.02))[0], *at((0.62, 0.16))[0]], fill=(34, 34, 70))
    canvas.polygon(at((-0.5, -0.14), (0.55, -0.14), (0.4, 0.06), (-0.38, 0.06)), fill=(196, 40, 44))
    canvas.polygon(at((-0.5, -0.14), (0.55, -0.14), (0.53, -0.1), (-0.48, -0.1)), fill=(250, 236, 220))
    canvas.line(at((0.02, -0.14), (0.02, -1.12)), fill=(70, 44, 40), width=max(2, int(size * 0.03)))
    canvas.polygon(at((0.06, -1.08), (0.06, -0.22), (0.5, -0.22)), fill=(252, 246, 232))
    canvas.polygon(at((-0.02, -1.0), (-0.02, -0.22), (-0.42, -0.22)), fill=(238, 214, 190))


def main(argv: list[str]) -> int:
    _, words, _ = cli.split(argv)
    given = cli.take_all(words, numbers=("seed", "size"), texts=("output", "kind", "things", "backgrounds"))
    output = cli.check_picture("output", given.get("output", "boat.png"), argv)
    if idle := [name for name in ("size", "kind", "things") if name in given and "seed" not in given]:
        raise ValueError(f"{idle[0]}= has no effect on the boat; give seed= too")
    if "backgrounds" in given and "things" not in given:
        raise ValueError("backgrounds= are for pictures of things; give things= too")
    kind = cli.choose("kind", given.get("kind", "basic"), typing.get_args(drawing.Kind))
    if "seed" in given:
        size, world = given.get("size", 256), drawing
        if "things" in given:
            pictures.refuse_size(size, size)
            world = pictures.open_for_scoring(given["things"], given.get("backgrounds", ""))
        clip = world.clip(given["seed"], width=size, height=size, frames=1, kind=kind)
        cli.save_picture(Image.fromarray(clip.frames[0]), output)
        print(f"{cli.shown(output)}: {clip.caption}")
    else:
        cli.save_picture(draw(), output)
        print(cli.shown(output))
    return 0
