"""PIL image -> first-frame pixels in [-1, 1] and CLIP pixels. The only resizing code.

Two modes run through the file. "clean" is what a reader would expect; "official" repeats what the
released code does, black edges included, and is what the parity goldens hold.
Sizes are always width, height; tensors are `c h w`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import struct
import warnings
import zlib
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageCms, UnidentifiedImageError
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
    SystemError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    OverflowError,
    struct.error,
    zlib.error,
)
# The colour spaces of ICC profiles that pictures have -> the PIL mode whose values they describe.
PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
GREY_MODES = ("1", "L", "LA")
DESCRIBED = {  # what a profile of each mode may be applied to
    "L": GREY_MODES,
    "RGB": (*GREY_MODES, "P", "PA", "RGB", "RGBX", "RGBA", "RGBa", "YCbCr"),
    "CMYK": ("CMYK",),
}
INTEROP = 0xA005  # EXIF 2.3: the tags about interoperability
# PNG's gAMA, and cHRM: x and y of the white point and of red, green and blue.
SRGB_GAMMA, SRGB_POINTS = 0.45455, (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


class UserMistake(ValueError):
    """A ValueError that already says everything; whoever catches damage must not wrap it again."""


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

    `exif="apply"` turns the picture upright; `alpha="white"` lays transparent parts over white and converts
    the colours to sRGB where the file has an ICC profile. The official code does neither ("ignore",
    "drop"). Of an animated file the first frame is taken, with a warning. Everything that can be wrong with
    the file is a ValueError here, before any long work.
    """
    path = Path(path)
    _refuse_what_is_no_file(path)
    try:
        with Image.open(path) as image:
            _refuse_bomb(image, path)
            if image.format == "EPS":
                raise UserMistake(
                    f"picture {path} is PostScript, a program that is not run; export it as PNG"
                )
            image.load()
            picture = to_rgb(image, alpha=alpha, exif=exif, name=f"picture {path}")
            if _has_second_frame(image):
                warnings.warn(f"picture {path} holds several frames; the first one is used", stacklevel=2)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"picture {path} is too large: {error}; make it smaller first") from error
    except UnidentifiedImageError as error:
        why = disguise(path) or "use PNG, JPEG or WebP"
        raise ValueError(f"{path} is not a picture that Pillow can read; {why}") from error
    except PermissionError as error:
        raise ValueError(f"picture {path} may not be read; check its permissions") from error
    except UserMistake:
        raise
    except MemoryError as error:
        raise ValueError(f"picture {path} needs more memory than there is; make it smaller first") from error
    except DAMAGED as error:
        raise ValueError(f"picture {path} is damaged or cut short ({error}); save it again") from error
    return picture


def to_rgb(
    image: Image.Image,
    *,
    alpha: Literal["white", "drop"] = "white",
    exif: Literal["apply", "ignore"] = "ignore",
    name: str = "the picture",
) -> Image.Image:
    """Any PIL image, any mode -> PIL RGB image; exif="apply" turns it upright. `name` is for warnings.

    alpha="white": colours with an ICC profile are converted to sRGB; transparency (alpha bands,
    premultiplied ones, palette or key colours) is laid over white; and deep pictures are brought to 8
    bits: 16-bit values are divided by 257; 32-bit integers and floats are taken as 0..1 (floats only),
    0..255 or 0..65535, whichever is the smallest range that holds them all, and refused outside.
    alpha="drop" is the official plain `convert("RGB")`: profiles are ignored, hidden colours show and
    16-bit values above 255 clip to white.
    """
    if image.width == 0 or image.height == 0:
        raise UserMistake(f"the picture is {image.width} x {image.height} pixels; it has nothing to show")
    if exif == "apply":
        image.load()  # PIL turns TIFF files by itself, but only then
        image = _upright(image, name)
    if image.mode == "La":  # PIL converts the premultiplied grey mode to nothing but LA
        image = image.convert("LA")
    if alpha == "drop":
        return image.convert("RGB")
    profile = image.info.get("icc_profile")
    if image.mode == "F" or image.mode.startswith("I"):
        image = to_eight_bits(image)
    if profile:
        image = to_srgb(image, profile, name)
    elif space := other_space(image):
        warnings.warn(
            f"{name} says that {space}, but has no colour profile; its colours are taken as sRGB",
            stacklevel=3,
        )
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def to_srgb(image: Image.Image, profile: bytes, name: str) -> Image.Image:
    """8-bit PIL image whose values an ICC profile describes -> PIL RGB or RGBA image in sRGB.

    Unchanged if the profile is sRGB within rounding; also, with a warning, if it is broken or of another
    colour space.
    """
    try:
        found = _srgb_transform(profile)
        if found is None:
            return image
        mode, transform = found
        if image.mode not in DESCRIBED[mode]:
            raise ValueError(f"it describes {mode} values, but the picture holds {image.mode}")
    except (ImageCms.PyCMSError, ImportError, *DAMAGED) as error:
        warnings.warn(
            f"{name}: its colour profile cannot be used ({error}); its colours are taken as sRGB",
            stacklevel=4,
        )
        return image
    if not image.has_transparency_data:
        return ImageCms.applyTransform(image.convert(mode), transform)
    image = image.convert("RGBA")
    converted = ImageCms.applyTransform(image.convert(mode), transform)
    converted.putalpha(image.getchannel("A"))
    return converted


def other_space(image: Image.Image) -> str:
    """What a PIL image without an ICC profile says of colours that are not sRGB's; empty if nothing."""
    with contextlib.suppress(*DAMAGED):
        if image.getexif().get_ifd(INTEROP).get(1) == "R03":  # DCF 2.0
            return "it is in Adobe RGB"
    gamma, points = image.info.get("gamma"), image.info.get("chromaticity")
    if "srgb" in image.info:
        return ""
    if isinstance(gamma, float) and abs(gamma / SRGB_GAMMA - 1) > 0.05:  # texts of PNG files lie there too
        return f"its gamma is {1 / gamma:.3g}" if gamma else "its gamma is 0"
    if isinstance(points, tuple) and not np.allclose(points, SRGB_POINTS, rtol=0, atol=0.01):
        return "its primaries are not those of sRGB"
    return ""


@functools.lru_cache(maxsize=8)
def _srgb_transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform] | None:
    """ICC profile -> (PIL mode it describes, its transform to sRGB RGB); None if it is sRGB itself.

    None keeps the pixels of the many files that carry an sRGB profile as they are, bit for bit.
    """
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = source.profile.xcolor_space.strip()
    if space not in PROFILE_MODES:
        raise ValueError(f"it describes {space} values")
    mode = PROFILE_MODES[space]
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode == "CMYK":
        return mode, transform
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
    before = Image.fromarray(cube if mode == "RGB" else levels[None])
    after = np.asarray(ImageCms.applyTransform(before, transform)).astype(int)
    return None if np.abs(after - np.asarray(before.convert("RGB"))).max() <= 1 else (mode, transform)


def disguise(path: Path) -> str:
    """What an unreadable file really is and what to do about it; empty where that is unknown."""
    with path.open("rb") as file:
        start = file.read(512)
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository"
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html", b"<head")):
        return "it is a web page: the download gave an error or a login page; download the file itself"
    if start.startswith(b"%PDF"):
        return "it is a PDF; export its picture as PNG"
    if b"<svg" in start:
        return "it is a drawing (SVG); export it as PNG"
    if start[4:8] == b"ftyp" and start[8:12] in HEIC_BRANDS:
        return "it is a HEIC picture; convert it to JPEG or PNG"
    return ""


def _refuse_what_is_no_file(path: Path) -> None:
    if not os.path.exists(path):  # Path.exists raises for names that are too long
        if str(path).startswith(("http:/", "https:/")):
            address = re.sub(r"^(https?:)/+", r"\1//", str(path))  # a Path keeps one slash
            raise ValueError(f"picture {address} is a web address; download the picture and give its path")
        raise ValueError(f"picture {path} does not exist; give the path of a picture file")
    if path.is_dir():
        raise ValueError(f"picture {path} is a folder, not a file; give the path of one picture")
    if not path.is_file():
        raise ValueError(f"picture {path} is a device or a pipe; give the path of a picture file")
    if path.stat().st_size == 0:
        raise ValueError(f"picture {path} is an empty file (0 bytes); save or download it again")


def _refuse_bomb(image: Image.Image, path: Path) -> None:
    # PIL itself only warns between its limit and twice its limit; here both are refused.
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise UserMistake(
            f"picture {path} is {image.width} x {image.height} = {image.width * image.height} pixels, over "
            f"the limit of {limit} (PIL.Image.MAX_IMAGE_PIXELS); make it smaller first"
        )


def _upright(image: Image.Image, name: str) -> Image.Image:
    # Not ImageOps.exif_transpose: it also rewrites the EXIF block, and a broken one would cost the picture.
    # PIL turns TIFF files by itself while loading and then reports them as upright.
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    except DAMAGED:
        warnings.warn(f"{name}: its EXIF block is unreadable; taken as upright", stacklevel=4)
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


def to_eight_bits(image: Image.Image) -> Image.Image:
    """PIL image of 16-bit or 32-bit integers or floats -> L, or LA with a key colour; see `to_rgb`."""
    values = np.asarray(image)
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
        raise UserMistake(
            f"the picture's {image.mode} values span {low:g}..{high:g}; expected 0..1 (floats), 0..255 or "
            "0..65535; rescale it first"
        )
    bytes_ = np.empty(values.shape, np.uint8)
    for row in range(0, len(values), 256):  # float64 copies of a large picture would not fit
        bytes_[row : row + 256] = np.rint(values[row : row + 256].astype(np.float64) / scale)
    grey = Image.fromarray(bytes_)
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
