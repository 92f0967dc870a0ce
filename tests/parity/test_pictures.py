"""Image preparation and video output against the official results, and planted mistakes that must fail."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from i2vgen.files import images, video
from i2vgen.parity import pictures
from i2vgen.parity.report import Golden, Settings

GOLDENS = Path(__file__).parents[1] / "goldens"
KINDS = {
    "pipeline_preprocess": pictures.preprocess,
    "pipeline_preprocess_full": pictures.preprocess_full,
    "pipeline_video_out": pictures.video_out,
}


def rows(kind):
    golden = Golden(GOLDENS / f"{kind}.safetensors")
    assert golden.kind == kind
    return list(KINDS[kind](golden, Settings()))


@pytest.mark.parametrize("kind", KINDS)
def test_official_numbers(kind):
    result = rows(kind)
    assert len(result) > 10
    assert [row for row in result if not row.passed] == []


# Each mistake patches one thing; at least one row of `kind` must fail.


def other_filter(patch, meant, instead):
    right = Image.Image.resize

    def resize(self, size, resample, box=None):
        return right(self, size, instead if resample == meant else resample, box)

    patch.setattr(Image.Image, "resize", resize)


def bilinear_crop(patch):
    other_filter(patch, Image.Resampling.BOX, Image.Resampling.BILINEAR)


def bicubic_clip(patch):
    other_filter(patch, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)


def rounded_up(patch):
    clean = images.resized_size
    patch.setattr(images, "resized_size", lambda size, w, h, *, mode: clean(size, w, h, mode="clean"))


def nearest_size(patch):
    def size(size, w, h, *, mode):
        scale = min(size[0] / w, size[1] / h)
        return max(w, round(size[0] / scale)), max(h, round(size[1] / scale))

    patch.setattr(images, "resized_size", size)


def width_and_height_swapped(patch):
    right = images.center_crop_wide

    def swapped(image, width, height, *, mode="clean"):
        return right(image, height, width, mode=mode).resize((width, height))

    patch.setattr(images, "center_crop_wide", swapped)


def crop_one_to_the_right(patch):
    right = Image.Image.crop
    patch.setattr(
        Image.Image, "crop", lambda self, box: right(self, (box[0] + 1, box[1], box[2] + 1, box[3]))
    )


def crop_from_corner(patch):
    right = Image.Image.crop
    patch.setattr(
        Image.Image, "crop", lambda self, box: right(self, (0, 0, box[2] - box[0], box[3] - box[1]))
    )


def no_black_edge(patch):
    right = Image.Image.crop

    def crop(self, box):
        x, y = max(box[0], 0) - box[0], max(box[1], 0) - box[1]
        return right(self, (box[0] + x, box[1] + y, box[2] + x, box[3] + y))

    patch.setattr(Image.Image, "crop", crop)


def alpha_over_white(patch):
    right = images.to_rgb
    patch.setattr(images, "to_rgb", lambda image, *, alpha: right(image, alpha="white"))


def other_clip_mean(patch):
    right = images.clip_view
    patch.setattr(
        images, "clip_view", lambda image, **named: right(image, **{**named, "mean": (0.5, 0.5, 0.5)})
    )


def square_as_high_as_the_video(patch):
    right = images.prepare
    patch.setattr(
        images, "prepare", lambda image, **named: right(image, **{**named, "clip_square": named["height"]})
    )


def clip_from_the_wide_crop(patch):
    def clip_picture(image, *, square, size, mode):
        wide = images.center_crop_wide(image, square, square // 2, mode=mode)
        return wide.resize((size, size), Image.Resampling.BILINEAR)

    patch.setattr(images, "clip_picture", clip_picture)


def range_zero_to_one(patch):
    right = images.first_frame
    patch.setattr(images, "first_frame", lambda image, **named: right(image, **named) * 0.5 + 0.5)


def clean_differs(patch):
    right = images.resized_size

    def size(size, w, h, *, mode):
        got = right(size, w, h, mode=mode)
        return got if mode == "official" else (got[0] + 2, got[1] + 2)

    patch.setattr(images, "resized_size", size)


SMALL, FULL = "pipeline_preprocess", "pipeline_preprocess_full"
PICTURE_MISTAKES = [
    (bilinear_crop, (SMALL, FULL)),
    (bicubic_clip, (SMALL, FULL)),
    (rounded_up, (SMALL, FULL)),
    (nearest_size, (SMALL,)),
    (width_and_height_swapped, (SMALL,)),
    (crop_one_to_the_right, (SMALL, FULL)),
    (crop_from_corner, (SMALL,)),
    (no_black_edge, (SMALL, FULL)),
    (alpha_over_white, (SMALL, FULL)),
    (other_clip_mean, (SMALL, FULL)),
    (square_as_high_as_the_video, (SMALL, FULL)),
    (clip_from_the_wide_crop, (SMALL,)),
    (range_zero_to_one, (SMALL, FULL)),
    (clean_differs, (SMALL, FULL)),
]


@pytest.mark.parametrize(
    ("mistake", "kind"), [(mistake, kind) for mistake, kinds in PICTURE_MISTAKES for kind in kinds]
)
def test_picture_mistakes_are_caught(mistake, kind, monkeypatch):
    mistake(monkeypatch)
    assert not all(row.passed for row in rows(kind))


def rounded_levels(patch):
    right = video.to_uint8
    patch.setattr(video, "to_uint8", lambda pixels: right(pixels, rounding="nearest"))


def times_256(patch):
    def to_uint8(pixels):
        return ((pixels * 0.5 + 0.5).clamp(0, 1) * 256).clamp(max=255).to(torch.uint8).movedim(-4, -1)

    patch.setattr(video, "to_uint8", to_uint8)


def wrapped_not_clamped(patch):
    def to_uint8(pixels):
        return ((pixels * 0.5 + 0.5) * 255).to(torch.int64).remainder(256).to(torch.uint8).movedim(-4, -1)

    patch.setattr(video, "to_uint8", to_uint8)


def input_overwritten(patch):
    right = video.to_uint8
    patch.setattr(video, "to_uint8", lambda pixels: right(pixels.clamp_(-1, 1)))


def grey_limit(value):
    def mistake(patch):
        patch.setattr(video, "GREY_LIMIT", value)

    return mistake


def narrow_grey_band(patch):
    patch.setattr(video, "GREY_HIGH", 136)


def first_frame_dropped(patch):
    def drop(frames):
        return frames[1:] if video.grey_fraction(frames[-1]) > video.GREY_LIMIT else frames

    patch.setattr(video, "drop_grey_last_frame", drop)


def grey_pixels_not_bytes(patch):
    def fraction(frame):
        frame = np.asarray(frame)
        return float(((frame >= 117) & (frame <= 137)).all(-1).mean())

    patch.setattr(video, "grey_fraction", fraction)


@pytest.mark.parametrize(
    "mistake",
    [
        pytest.param(rounded_levels, id="rounded"),
        pytest.param(times_256, id="times 256"),
        pytest.param(wrapped_not_clamped, id="wrapped"),
        pytest.param(input_overwritten, id="input overwritten"),
        pytest.param(grey_limit(0.5), id="grey rule at 50 %"),
        pytest.param(grey_limit(0.35), id="grey rule at 35 %"),
        pytest.param(narrow_grey_band, id="137 left out"),
        pytest.param(first_frame_dropped, id="first frame dropped"),
        pytest.param(grey_pixels_not_bytes, id="pixels, not bytes"),
    ],
)
def test_video_mistakes_are_caught(mistake, monkeypatch):
    mistake(monkeypatch)
    assert not all(row.passed for row in rows("pipeline_video_out"))
