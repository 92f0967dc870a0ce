"""Kinds `pipeline_preprocess`, `pipeline_preprocess_full` and `pipeline_video_out`: pictures in, frames out.

Cases, sizes, modes and constants are all read from the file. Axes: f frames, h w pixel rows and columns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from i2vgen.files import images, video
from i2vgen.parity.report import Golden, Row, Settings, check, compare, synthetic_picture

FLOAT_BOUND = 1e-6
MOMENT_BOUND = 1e-5  # means and deviations of a whole picture; float32 sums depend on their order


def preprocess(golden: Golden, settings: Settings) -> Iterator[Row]:
    """Small pictures of many shapes and modes: every intermediate picture and both tensors.

    `settings` has no effect: PIL works on 8-bit pictures on the CPU, and the result is float32.
    """
    config = golden.config
    width, height = config["resolution"]
    size = config["vit_resolution"][0]
    for name, case in config["cases"].items():
        stored = golden[f"{name}.rgb"]
        built = images.to_rgb(build_picture(case), alpha="drop")
        yield compare(f"{name} rgb ({case['mode']})", _tensor(built), stored, exact=True)

        picture = Image.fromarray(stored.numpy())
        square = golden[f"{name}.square_uint8"].shape[0]
        yield from _sizes(name, picture, case, width, height, square)
        crop = images.center_crop_wide(picture, width, height, mode="official")
        squared = images.center_crop_wide(picture, square, square, mode="official")
        small = images.clip_picture(picture, square=square, size=size, mode="official")
        yield compare(f"{name} crop", _tensor(crop), golden[f"{name}.crop_uint8"], exact=True)
        yield compare(f"{name} square", _tensor(squared), golden[f"{name}.square_uint8"], exact=True)
        yield compare(f"{name} clip picture", _tensor(small), golden[f"{name}.vit_uint8"], exact=True)

        views = _views(picture, config, square)
        expected = _from_minus_one(golden[f"{name}.image"], config)
        yield compare(f"{name} first frame", views.pixels, expected, max_abs=FLOAT_BOUND)
        yield compare(f"{name} clip view", views.clip_pixels, golden[f"{name}.vit"], max_abs=FLOAT_BOUND)

        yield _clean(f"{name} clean crop", picture, case["resized"], crop)
        yield _clean(f"{name} clean square", picture, case["resized_square"], squared)


def preprocess_full(golden: Golden, settings: Settings) -> Iterator[Row]:
    """Pictures of realistic sizes: hashes of the whole results, sparse values, black edges.

    `settings` has no effect, as in `preprocess`.
    """
    config = golden.config
    width, height = config["resolution"]
    size = config["vit_resolution"][0]
    for name, case in config["cases"].items():
        picture = images.to_rgb(build_picture(case), alpha="drop")
        yield from _sizes(name, picture, case, width, height, width)
        crop = images.center_crop_wide(picture, width, height, mode="official")
        square = images.center_crop_wide(picture, width, width, mode="official")
        small = images.clip_picture(picture, square=width, size=size, mode="official")
        for what, image in (("crop", crop), ("square", square), ("vit", small)):
            digest = hashlib.sha256(np.asarray(image).tobytes()).hexdigest()
            yield check(f"{name} {what} hash", digest == case[f"sha256_{what}"], "SHA-256 equal")

        pixels = _tensor(crop)
        every = golden[f"{name}.crop_uint8_every_16th"]
        yield compare(f"{name} crop, every 16th", pixels[::16, ::16], every, exact=True)
        # 64 rows of the two left columns, then 64 columns of the two top rows, as one vector
        edge = torch.cat([pixels[:64, :2].reshape(-1), pixels[:2, :64].reshape(-1)])
        yield compare(f"{name} crop, edges", edge, golden[f"{name}.crop_uint8_left2_top2"], exact=True)
        black_left, black_top = not pixels[:, 0].any(), not pixels[0].any()
        yield check(f"{name} black left column", black_left == case["black_left_column"], "flag equal")
        yield check(f"{name} black top row", black_top == case["black_top_row"], "flag equal")
        yield compare(f"{name} clip picture", _tensor(small), golden[f"{name}.vit_uint8"], exact=True)

        views = _views(picture, config, width)
        expected = _from_minus_one(golden[f"{name}.image_every_16th"], config)
        sparse = views.pixels[:, ::16, ::16]
        yield compare(f"{name} first frame, every 16th", sparse, expected, max_abs=FLOAT_BOUND)
        moments = views.pixels.double().mean(), views.pixels.double().std(), views.clip_pixels.double().mean()
        for key, moment in zip(("image_mean", "image_std", "vit_mean"), moments, strict=True):
            yield compare(f"{name} {key}", moment, torch.tensor(case[key]), max_abs=MOMENT_BOUND)

        yield _clean(f"{name} clean crop", picture, case["resized"], crop)
        yield _clean(f"{name} clean square", picture, case["resized_square"], square)


def video_out(golden: Golden, settings: Settings) -> Iterator[Row]:
    """Float videos [1 3 f h w] -> uint8 frames for the video encoder, after the last-frame rule."""
    cases = golden.config["cases"]
    for name, case in cases.items():
        given = golden[f"{name}.video"]
        pixels = given.clone().to(settings.device)
        frames = video.to_uint8(pixels[0])
        kept = video.drop_grey_last_frame(frames)
        grey = torch.tensor(video.grey_fraction(frames[-1]))
        expected = torch.tensor(case["grey_fraction"])
        yield check(f"{name} frames in", frames.shape[0] == case["frames_in"], "count equal")
        yield check(f"{name} frames out", kept.shape[0] == case["frames_out"], "count equal")
        yield compare(f"{name} grey fraction", grey, expected, max_abs=FLOAT_BOUND)
        yield compare(f"{name} frames", kept, golden[f"{name}.frames_uint8"], exact=True)
        yield compare(f"{name} input untouched", pixels, given, exact=True)
    ramps = [name.removesuffix(".uint8") for name in golden if name.endswith(".uint8")]
    for name in ramps:
        values = golden[f"{name}.video"].to(settings.device)
        levels = video.to_uint8(values.reshape(1, 1, 1, -1)).reshape(values.shape)  # as one row of pixels
        yield compare(f"{name} levels", levels, golden[f"{name}.uint8"], exact=True)


def build_picture(case: dict) -> Image.Image:
    """The picture of a case {width, height, k, mode}, by the goldens' formula -> PIL image in its mode."""
    mode, size, k = case["mode"], (case["width"], case["height"]), case["k"]
    if mode in ("L", "1"):
        grey = Image.fromarray(synthetic_picture(*size, k, 1)[..., 0])
        return grey if mode == "L" else grey.convert("1", dither=Image.Dither.NONE)
    if mode == "P":
        return Image.fromarray(synthetic_picture(*size, k)).quantize(16, dither=Image.Dither.NONE)
    if mode == "F" or mode.startswith("I"):
        raise ValueError(f"the goldens define no pictures of mode {mode}")
    channels = len(Image.new(mode, (1, 1)).getbands())
    return Image.frombytes(mode, size, synthetic_picture(*size, k, channels).tobytes())


def _sizes(
    name: str, picture: Image.Image, case: dict, width: int, height: int, square: int
) -> Iterator[Row]:
    for key, target in (("resized", (width, height)), ("resized_square", (square, square))):
        got = images.resized_size(picture.size, *target, mode="official")
        yield compare(f"{name} {key}", torch.tensor(got), torch.tensor(case[key]), exact=True)


def _clean(name: str, picture: Image.Image, resized: list[int], official: Image.Image) -> Row:
    """Clean mode equals the official one if that covers the target size, and covers it in any case."""
    width, height = official.size
    bounded = (
        resized[0] * resized[1] > images.MAX_RESIZED_PIXELS
    )  # clean mode then crops first, equal only up to rounding
    if resized[0] >= width and resized[1] >= height and not bounded:
        clean = images.center_crop_wide(picture, width, height, mode="clean")
        return compare(f"{name} = official", _tensor(clean), _tensor(official), exact=True)
    w, h = images.resized_size(picture.size, width, height, mode="clean")
    return check(f"{name} covers", w >= width and h >= height, "at least the target size")


def _views(picture: Image.Image, config: dict, square: int) -> images.Pictures:
    width, height = config["resolution"]
    return images.prepare(
        picture,
        width=width,
        height=height,
        clip_size=config["vit_resolution"][0],
        clip_square=None if square == width else square,
        clip_mean=tuple(config.get("vit_mean", images.CLIP_MEAN)),
        clip_std=tuple(config.get("vit_std", images.CLIP_STD)),
        mode="official",
    )


def _from_minus_one(stored: Tensor, config: dict) -> Tensor:
    """A stored picture [3 h w], normalised with the file's mean and std -> in our range [-1, 1]."""
    mean = torch.tensor(config.get("mean", (0.5, 0.5, 0.5)), dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor(config.get("std", (0.5, 0.5, 0.5)), dtype=torch.float64).view(3, 1, 1)
    return (stored.double() * std + mean) * 2 - 1


def _tensor(image: Image.Image) -> Tensor:
    """PIL RGB -> uint8 [h w 3]."""
    return torch.from_numpy(np.array(image))
