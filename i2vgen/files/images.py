"""PIL image -> first-frame pixels in [-1, 1] and CLIP pixels. The only resizing code.

Two modes run through the file. "clean" is what a reader would expect; "official" repeats what the
released code does, black edges included, and is what the parity goldens hold.
Sizes are always width, height; tensors are `c h w`.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

CropMode = Literal["clean", "official"]

# Constants of the CLIP training data, as in every open_clip ViT-H/14 checkpoint.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# The whole picture is resized before the crop, so a picture of 1 x 5000 pixels would need 24 GB at
# 1280 x 704. 2^26 pixels (256 MB inside PIL) are reached at 1280 columns by shapes beyond 1:40 only.
MAX_RESIZED_PIXELS = 2**26
# The official mode has no way around the full resize; past this it would only fail later, by memory.
MAX_OFFICIAL_PIXELS = 2**29

EXIF_ORIENTATION = 0x0112
# EXIF 2.3, tag Orientation: what undoes each value (1 is upright).
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What PIL's readers raise on damaged data; there is no common base class.
DAMAGED = (
    OSError,
    RuntimeError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    OverflowError,
    struct.error,
    zlib.error,
)


class Pictures(NamedTuple):
    """The two views of one picture: `pixels` [3, height, width] in [-1, 1], `clip_pixels` [3, size, size]."""

    pixels: Tensor
    clip_pixels: Tensor


# ---------------------------------------------------------------------------------------------------
# A file, or any PIL image, to RGB


def open_picture(
    path: str | Path, *, exif: Literal["apply", "ignore"] = "apply", alpha: Literal["white", "drop"] = "white"
) -> Image.Image:
    """Read a picture file completely -> PIL RGB image.

    `exif="apply"` turns the picture upright, `alpha="white"` lays transparent parts over white; the
    official code does neither ("ignore", "drop"). Of an animated file the first frame is taken, with a
    warning. Everything that can be wrong with the file is a ValueError here, before any long work.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"picture {path} does not exist; give the path of a picture file")
    if not path.is_file():
        raise ValueError(f"picture {path} is a folder, not a file; give the path of one picture")
    if path.stat().st_size == 0:
        raise ValueError(f"picture {path} is an empty file (0 bytes); save or download it again")
    try:
        with Image.open(path) as image:
            _refuse_bomb(image, path)
            image.load()
            if exif == "apply":
                picture = to_rgb(_upright(image, path), alpha=alpha)
            else:
                picture = to_rgb(image, alpha=alpha)
            if _has_second_frame(image):
                warnings.warn(f"picture {path} holds several frames; the first one is used", stacklevel=2)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"picture {path} is too large: {error}; make it smaller first") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not a picture that Pillow can read; use PNG, JPEG or WebP") from error
    except PermissionError as error:
        raise ValueError(f"picture {path} may not be read; check its permissions") from error
    except _UserMistake:
        raise
    except DAMAGED as error:
        raise ValueError(f"picture {path} is damaged or cut short ({error}); save it again") from error
    return picture


def to_rgb(image: Image.Image, *, alpha: Literal["white", "drop"] = "white") -> Image.Image:
    """Any PIL image, any mode -> PIL RGB image of the same size.

    alpha="white": transparency (alpha bands, premultiplied ones, palette or key colours) is laid over
    white, and deep pictures are brought to 8 bits: 16-bit values are divided by 257; 32-bit integers
    and floats are taken as 0..1 (floats only), 0..255 or 0..65535, whichever is the smallest range that
    holds them all, and refused outside. alpha="drop" is the official plain `convert("RGB")`: hidden
    colours show and 16-bit values above 255 clip to white.
    """
    if image.width == 0 or image.height == 0:
        raise _UserMistake(f"the picture is {image.width} x {image.height} pixels; it has nothing to show")
    if image.mode == "La":  # PIL converts the premultiplied grey mode to nothing but LA
        image = image.convert("LA")
    if alpha == "drop" or (image.mode == "RGB" and "transparency" not in image.info):
        return image.convert("RGB")
    if image.mode == "F" or image.mode.startswith("I"):
        image = _to_eight_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


class _UserMistake(ValueError):
    """A ValueError that already says everything; `open_picture` must not rewrap it as damage."""


def _refuse_bomb(image: Image.Image, path: Path) -> None:
    # PIL itself only warns between its limit and twice its limit; here both are refused.
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise _UserMistake(
            f"picture {path} is {image.width} x {image.height} = {image.width * image.height} pixels, over "
            f"the limit of {limit} (PIL.Image.MAX_IMAGE_PIXELS); make it smaller first"
        )


def _upright(image: Image.Image, path: Path) -> Image.Image:
    # Not ImageOps.exif_transpose: it also rewrites the EXIF block, and a broken one would cost the picture.
    # PIL turns TIFF files by itself while loading and then reports them as upright.
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    except DAMAGED:
        warnings.warn(f"picture {path}: its EXIF block is unreadable; taken as upright", stacklevel=3)
        return image
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def _has_second_frame(image: Image.Image) -> bool:
    if image.format == "MPO":  # a phone's JPEG with a preview or depth map behind it: one picture
        return False
    try:
        image.seek(1)
    except DAMAGED:
        return False
    return True


def _to_eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())  # NaN anywhere makes both NaN
    if image.mode.startswith("I;16"):
        scale = 257.0
    elif image.mode == "F" and low >= 0 and high <= 1:
        scale = 1 / 255
    elif low >= 0 and high <= 255:
        scale = 1.0
    elif low >= 0 and high <= 65535:
        scale = 257.0
    else:
        raise _UserMistake(
            f"the picture's {image.mode} values span {low:g}..{high:g}; expected 0..1 (floats), 0..255 or "
            "0..65535; rescale it first"
        )
    grey = Image.fromarray(np.rint(values / scale).astype(np.uint8))
    key = image.info.get("transparency")
    if isinstance(key, int):  # a key colour counts in the file's own depth
        grey.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return grey


# ---------------------------------------------------------------------------------------------------
# Resize and crop


def resized_size(size: tuple[int, int], width: int, height: int, *, mode: CropMode) -> tuple[int, int]:
    """(w, h) of a picture -> (w', h') after the resize that lets it cover width x height.

    "official" is VGen's CenterCropWide: a float floor division by s = min(w / width, h / height). Where
    that quotient was rounded up the result is one short of the target. "clean" is the same in
    integers, so it always covers; the two agree exactly wherever the official result covers.
    """
    w, h = size
    if mode == "official":
        scale = min(w / width, h / height)
        return int(w // scale), int(h // scale)
    if w * height <= h * width:  # the width binds
        return width, h * width // w
    return w * height // h, height


def center_crop_wide(image: Image.Image, width: int, height: int, *, mode: CropMode = "clean") -> Image.Image:
    """PIL RGB image of any size -> its centre, width x height, scaled with the BOX filter.

    After VGen's CenterCropWide. In mode "official" the resized picture may be one pixel short; PIL's
    crop then starts at -1 and leaves a black left column or top row (48 % of realistic sizes at
    1280 x 704). Mode "clean" has no black edge, and equals the official result, bit for bit, for every
    picture where that has none either; only pictures beyond about 1:40 are cropped before the resize.
    """
    _need_rgb(image)
    if width < 1 or height < 1:
        raise ValueError(f"crop size {width} x {height} must be at least 1 x 1")
    w, h = resized_size(image.size, width, height, mode=mode)
    if mode == "official" and w * h > MAX_OFFICIAL_PIXELS:
        raise ValueError(
            f"the official crop would blow a {image.width} x {image.height} picture up to {w} x {h}; "
            'use mode "clean" or a less extreme shape'
        )
    left, top = (w - width) // 2, (h - height) // 2
    if mode == "clean" and w * h > MAX_RESIZED_PIXELS:
        # The same geometry, the window taken back into the source; ties between pixels may fall otherwise.
        x, y = image.width / w, image.height / h
        right, bottom = min((left + width) * x, image.width), min((top + height) * y, image.height)
        return image.resize((width, height), Image.Resampling.BOX, box=(left * x, top * y, right, bottom))
    resized = image.resize((w, h), Image.Resampling.BOX)
    return resized.crop((left, top, left + width, top + height))


def clip_picture(image: Image.Image, *, square: int, size: int, mode: CropMode = "clean") -> Image.Image:
    """PIL RGB image -> PIL RGB image size x size: centre square of side `square`, then BILINEAR to `size`."""
    return center_crop_wide(image, square, square, mode=mode).resize((size, size), Image.Resampling.BILINEAR)


# ---------------------------------------------------------------------------------------------------
# Tensors


def first_frame(image: Image.Image, *, width: int, height: int, mode: CropMode = "clean") -> Tensor:
    """PIL RGB image -> float32 [3, height, width] in [-1, 1]: what the VAE encodes."""
    return _unit(center_crop_wide(image, width, height, mode=mode)) * 2 - 1


def clip_view(
    image: Image.Image,
    *,
    square: int,
    size: int,
    mean: tuple[float, float, float] = CLIP_MEAN,
    std: tuple[float, float, float] = CLIP_STD,
    mode: CropMode = "clean",
) -> Tensor:
    """PIL RGB image -> float32 [3, size, size], normalised for CLIP.

    The picture is resampled twice, as officially: to a square of side `square`, then to `size`. The
    official inference takes the video's width as `square`; the official training code takes `size`
    itself once the video's width is no larger than `size`.
    """
    unit = _unit(clip_picture(image, square=square, size=size, mode=mode))
    return (unit - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def prepare(
    image: Image.Image,
    *,
    width: int,
    height: int,
    clip_size: int,
    clip_square: int | None = None,
    clip_mean: tuple[float, float, float] = CLIP_MEAN,
    clip_std: tuple[float, float, float] = CLIP_STD,
    mode: CropMode = "clean",
) -> Pictures:
    """PIL RGB image -> pixels [3, height, width] in [-1, 1] and clip_pixels [3, clip_size, clip_size].

    `clip_square` None is the official inference, a square as wide as the video; see `clip_view`.
    """
    square = width if clip_square is None else clip_square
    return Pictures(
        first_frame(image, width=width, height=height, mode=mode),
        clip_view(image, square=square, size=clip_size, mean=clip_mean, std=clip_std, mode=mode),
    )


def _unit(image: Image.Image) -> Tensor:
    """PIL RGB -> float32 [3, h, w] in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255


def _need_rgb(image: Image.Image) -> None:
    if image.mode != "RGB":
        raise ValueError(f"the picture has mode {image.mode}, expected RGB; open it with images.open_picture")
    if image.width == 0 or image.height == 0:
        raise ValueError(f"the picture is {image.width} x {image.height} pixels; it has nothing to show")
