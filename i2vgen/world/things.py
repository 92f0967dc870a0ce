"""Things and backgrounds as pictures: cut-outs with alpha from a folder or a colour-emoji font, photographs.

A cut-out is held premultiplied, which leaves no halo when it is resampled, and scaled so that its farthest
opaque pixel lies at a distance of 1 from its centre. `warp` resamples it to any position, size and angle from
a pyramid of reduced copies.

Names split things into two parts that never mix: a model is trained on one and scored on the other. The last
word of a name decides ("red apple" and "green apple" stay together), by a hash that never changes.

Axes: f frames, c channels, h w pixel rows and columns.
"""

from __future__ import annotations

import functools
import hashlib
import math
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from torch import Tensor

from i2vgen.settings.wording import counted

Part = Literal["training", "never trained", "all"]
SPLIT = 52  # decides, with the word, which part it falls into; another number is another split
NEVER_TRAINED = 0.15  # share of the last words whose things are kept from training

SIDE = 144  # pixels of a cut-out's square at its finest
STEP = 2.0**0.5  # between the levels of a pyramid
MARGIN = 1.04  # half the side of the square, in units of the circumradius, so that edges end in nothing
LEAST_OPAQUE = 12 / 255  # alpha below this is dust and does not count for the size of a thing
PHOTOGRAPHS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
PHOTO_SIDE = 512  # photographs are reduced to this shorter side
LEAST_PHOTO = 64

EMOJI_SIZE = 109  # the only size of Noto's bitmaps
KEY = (255, 0, 255)  # glyphs without colours of their own come out in this
# Signs rather than things, things that differ in one detail, and what is no picture at all.
NO_THINGS = (
    "sign", "symbol", "symbols", "squared", "ideograph", "ideograph-", "regional", "modifier", "component",
    "arrow", "arrows", "letter", "letters", "clock face", "triangle", "square", "circle", "diamond suit",
    "keycap", "flag", "flags", "mark", "multiplication", "asterisk", "loop", "button", "hair", "vertical bar",
    "small square", "no ", "input", "not ", "arrowhead", "ballot", "suit", "cinema", "minus", "equals",
    "aries", "taurus", "gemini", "cancer", "leo", "virgo", "libra", "scorpius", "sagittarius", "capricorn",
    "aquarius", "pisces", "ophiuchus", "wheel of dharma", "om", "hundred", "end with", "back with", "on with",
    "soon with", "top with", "exclamation", "question", "sos", "middle finger", "dollar", "yin",
    "biohazard", "radioactive",
)  # fmt: skip
OLD_WORDS = ("heavy ", "black ", "white ")  # of outlines in the oldest names; they say nothing of the colour


class Pyramid:
    """A picture [h w c] in 0..1 and its reductions, made when they are first needed."""

    def __init__(self, picture: np.ndarray):
        self.finest = picture  # uint8 [h w c]
        self.levels: dict[int, Tensor] = {}

    def level(self, number: int) -> Tensor:
        """The picture reduced by STEP ** number -> float32 [1 c h w] in 0..1."""
        if number not in self.levels:
            height, width = self.finest.shape[:2]
            size = (max(1, round(width / STEP**number)), max(1, round(height / STEP**number)))
            bands = [
                np.asarray(Image.fromarray(np.ascontiguousarray(band)).resize(size, Image.Resampling.BOX))
                if number
                else band
                for band in np.moveaxis(self.finest, -1, 0)
            ]
            self.levels[number] = torch.from_numpy(np.stack(bands)[None].astype(np.float32) / 255.0)
        return self.levels[number]

    def sample(self, x: Tensor, y: Tensor, reduction: float, *, border: bool = False) -> Tensor:
        """Values at x [f h w], y [f h w], -1..1 across the picture -> [f c h w]; 0 outside, or the border's.

        `reduction` is the number of this picture's finest pixels per sampled point.
        """
        number = max(0, math.floor(math.log(max(reduction, 1e-6)) / math.log(STEP)))
        most = math.floor(math.log(min(self.finest.shape[:2])) / math.log(STEP))
        level = self.level(min(number, most))
        grid = torch.stack([x, y], dim=-1)
        return F.grid_sample(
            level.expand(len(grid), -1, -1, -1),
            grid,
            mode="bilinear",
            padding_mode="border" if border else "zeros",
            align_corners=False,
        )


class Cutout:
    """One thing: its name, and its premultiplied picture, RGBA."""

    def __init__(self, name: str, picture: np.ndarray):
        self.name = name
        self.pyramid = Pyramid(picture)  # uint8 [SIDE SIDE 4]

    @functools.cached_property
    def turns(self) -> bool:
        """Whether one sees the thing turn: a ball does not."""
        still = self.at(0.0)
        gaps = [
            (self.at(angle) - still).abs().mean() / still[:, 3:].mean() for angle in (25.0, 45.0, 75.0, 110.0)
        ]
        return float(min(gaps)) > 0.22

    @functools.cached_property
    def reach(self) -> float:
        """Radius of the circle around it, in units of that around a compact thing: thin things are larger."""
        share = float(self.at(0.0)[:, 3].mean()) * 4.0 * MARGIN**2 / math.pi
        return min(max((0.55 / share) ** 0.25, 0.95), 1.25)

    def at(self, angle: float, side: int = 32) -> Tensor:
        zero, one = np.zeros(1), np.ones(1)
        return warp(self, zero, zero, one, np.full(1, angle), side, side)


def warp(
    thing: Cutout,
    x: np.ndarray,
    y: np.ndarray,
    radius: np.ndarray,
    angle: np.ndarray,
    width: int,
    height: int,
    *,
    fine: int = 2,
) -> Tensor:
    """Draw a thing along a path of `drawing.track`, each [f] -> premultiplied float32 [f 4 h w] in 0..1.

    Every pixel is the mean of `fine` x `fine` samples. Frames of about one size share one level of the
    pyramid.
    """
    half = min(width, height) / 2.0
    across = (np.arange(width * fine) + 0.5) / (fine * half) - width / (2.0 * half)
    down = (np.arange(height * fine) + 0.5) / (fine * half) - height / (2.0 * half)
    u = torch.from_numpy((across - x[:, None]).astype(np.float32))[:, None, :]
    v = torch.from_numpy((down - y[:, None]).astype(np.float32))[:, :, None]
    turn = np.deg2rad(angle)
    cos = torch.from_numpy((np.cos(turn) / (MARGIN * radius)).astype(np.float32))[:, None, None]
    sin = torch.from_numpy((np.sin(turn) / (MARGIN * radius)).astype(np.float32))[:, None, None]
    p, q = u * cos + v * sin, v * cos - u * sin
    reduction = SIDE / (2.0 * MARGIN * radius * half * fine)
    drawn = torch.empty(len(x), 4, height * fine, width * fine)
    numbers = np.floor(np.log(np.maximum(reduction, 1.0)) / math.log(STEP))
    for number in np.unique(numbers):
        chosen = torch.from_numpy(numbers == number)
        drawn[chosen] = thing.pyramid.sample(p[chosen], q[chosen], float(STEP**number * 1.0001))
    return F.avg_pool2d(drawn, fine) if fine > 1 else drawn


# ---------------------------------------------------------------------------------------------------
# Names


def part_of(name: str) -> Part:
    """The part that a name belongs to, by a hash of its last word."""
    digest = hashlib.sha256(f"{SPLIT} {name.split()[-1]}".encode()).digest()
    return "never trained" if digest[0] < 256 * NEVER_TRAINED else "training"


def plain_name(stem: str) -> str:
    """A file's name without its ending, in words: "red_apple" -> "red apple"."""
    return " ".join(stem.replace("_", " ").replace("-", " ").lower().split())


# ---------------------------------------------------------------------------------------------------
# Cut-outs


def load_things(place: str | Path, part: Part = "all", *, setting: str = "things=") -> dict[str, Cutout]:
    """Cut-outs by name, from a folder of PNGs with alpha or a colour-emoji font; ValueError without any."""
    path = Path(place).expanduser()
    if path.is_dir():
        found = _of_folder(path, setting)
    elif path.is_file():
        found = _of_font(path, setting)
    else:
        raise ValueError(
            f"{setting}{place} does not exist; give a folder of PNG cut-outs or a colour-emoji font "
            "such as NotoColorEmoji.ttf (Debian: fonts-noto-color-emoji)"
        )
    chosen = {name: thing for name, thing in found.items() if part in ("all", part_of(name))}
    if not chosen:
        raise ValueError(
            f"{setting}{place} holds {len(found)} things, but none of the part {part!r}, which the last word "
            "of a name decides; give more or other things"
        )
    return chosen


def _of_folder(folder: Path, setting: str) -> dict[str, Cutout]:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".png" and path.is_file())
    if not files:
        raise ValueError(
            f"{setting}{folder} holds no PNG files; give cut-outs with alpha, named as they show"
        )
    found, sources = {}, {}
    for path in files:
        name = plain_name(path.stem)
        if not any(letter.isalpha() for letter in name):
            raise ValueError(f"{path}: the name says nothing; name the file by what it shows: red_apple.png")
        if name in found:
            raise ValueError(f"{path} and {sources[name]} would both be called {name!r}; rename one of them")
        found[name], sources[name] = Cutout(name, _square(_opened(path), str(path))), path.name
    return found


def _opened(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            if not (picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info):
                raise ValueError(
                    f"{path} has no alpha channel ({picture.mode}); cut the thing out, so that its "
                    "background is transparent"
                )
            return picture.convert("RGBA")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
        raise ValueError(f"{path} is no readable PNG: {error}") from error


def _square(picture: Image.Image, where: str) -> np.ndarray:
    """Cut to what is opaque, centred and scaled -> premultiplied uint8 [SIDE SIDE 4]."""
    alpha = np.asarray(picture.getchannel("A"), np.float32) / 255.0
    rows, columns = np.nonzero(alpha > LEAST_OPAQUE)
    if len(rows) < 16:
        raise ValueError(f"{where} is transparent all over; give a cut-out with something to see")
    if alpha.min() > 0.9:
        raise ValueError(
            f"{where} is opaque all over; cut the thing out, so that its background is transparent"
        )
    x, y = (columns.min() + columns.max() + 1) / 2.0, (rows.min() + rows.max() + 1) / 2.0
    half = MARGIN * float(np.hypot(columns + 0.5 - x, rows + 0.5 - y).max() + 0.5)
    left, top, size = math.floor(x - half), math.floor(y - half), math.ceil(2.0 * half) + 2
    premultiplied = np.asarray(picture, np.float32)
    premultiplied = np.concatenate(
        [premultiplied[..., :3] * alpha[..., None], premultiplied[..., 3:]], axis=-1
    )
    box = (x - half - left, y - half - top, x + half - left, y + half - top)
    bands = []
    for band in np.moveaxis(premultiplied, -1, 0):
        canvas = Image.new("F", (size, size))
        canvas.paste(Image.fromarray(np.ascontiguousarray(band)), (-left, -top))
        bands.append(np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=box)))
    return np.rint(np.stack(bands, axis=-1)).clip(0, 255).astype(np.uint8)


def _of_font(path: Path, setting: str) -> dict[str, Cutout]:
    try:
        font = ImageFont.truetype(str(path), EMOJI_SIZE)
    except OSError as error:
        raise ValueError(
            f"{setting}{path} is no font with bitmaps of {EMOJI_SIZE} pixels, as NotoColorEmoji.ttf has "
            f"(Debian: fonts-noto-color-emoji): {error}"
        ) from error
    found: dict[str, Cutout] = {}
    for code in range(0x2000, 0x20000):
        letter = chr(code)
        name = unicodedata.name(letter, "").lower()
        if unicodedata.category(letter) not in ("So", "Sm", "Sk", "Po") or not _is_thing(name):
            continue
        picture = _glyph(font, letter)
        if picture is None:
            continue
        name = _spoken(name, code)
        if name not in found:
            found[name] = Cutout(name, _square(picture, f"{path}, {name}"))
    if not found:
        raise ValueError(
            f"{setting}{path} holds no coloured pictures that Pillow can draw: it reads bitmaps as in "
            "Debian's NotoColorEmoji.ttf, but no drawn colours (COLRv1) and no plain text fonts"
        )
    return found


def _is_thing(name: str) -> bool:
    words = f" {name} "
    return bool(name) and not any(f" {word.strip()} " in words for word in NO_THINGS)


def _spoken(name: str, code: int) -> str:
    """A Unicode name in plain words: "black scissors" is said of any scissors."""
    if code < 0x2800:
        for word in OLD_WORDS:
            name = name.removeprefix(word)
    return plain_name(name)


def _glyph(font: ImageFont.FreeTypeFont, letter: str) -> Image.Image | None:
    """The coloured picture of a character; None if the font has none."""
    left, top, right, bottom = font.getbbox(letter)
    if right <= left or bottom <= top:
        return None
    picture = Image.new("RGBA", (right + 8, bottom + 8), (*KEY, 0))
    ImageDraw.Draw(picture).text((4, 4), letter, font=font, fill=KEY, embedded_color=True)
    pixels = np.asarray(picture)
    seen = pixels[pixels[..., 3] > 128]
    coloured = len(seen) > 64 and bool(np.any(seen[:, :3] != np.array(KEY)))
    return picture if coloured and pixels[..., 3].min() < 128 else None


# ---------------------------------------------------------------------------------------------------
# Photographs


def load_photographs(place: str | Path, *, setting: str = "backgrounds=") -> list[Pyramid]:
    """Photographs of a folder in the order of their names; ValueError without a usable one."""
    folder = Path(place).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{setting}{place} is not a folder; give one with photographs")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in PHOTOGRAPHS)
    found, reasons = [], []
    for path in files:
        try:
            with Image.open(path) as picture:
                ready = picture.convert("RGB")
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
            reasons.append(f"{path.name}: {error}")
            continue
        short = min(ready.size)
        if short < LEAST_PHOTO:
            reasons.append(f"{path.name}: {ready.width} x {ready.height} pixels are too few")
            continue
        scale = min(1.0, PHOTO_SIDE / short)
        size = (round(ready.width * scale), round(ready.height * scale))
        found.append(Pyramid(np.asarray(ready.resize(size, Image.Resampling.LANCZOS))))
    if not found:
        why = f" ({'; '.join(reasons[:3])})" if reasons else ""
        raise ValueError(
            f"{setting}{place} holds no usable photograph: {counted(len(files), 'file')} with an ending of "
            f"{', '.join(PHOTOGRAPHS)}{why}"
        )
    return found


def vocabulary(names: Sequence[str]) -> list[str]:
    """Every word of the names, for `clip.words`."""
    return sorted({word for name in names for word in name.split()})
