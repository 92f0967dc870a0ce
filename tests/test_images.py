"""images.py: any picture file to the two views, without surprises."""

import os
import struct
import warnings
from pathlib import Path

import media_files
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin, TiffImagePlugin

from i2vgen.files import images

skimage = pytest.importorskip("skimage")
PHOTOS = [
    Path(skimage.__file__).parent / "data" / name for name in ("astronaut.png", "chelsea.png", "rocket.jpg")
]
PHOTOS = [path for path in PHOTOS if path.exists()]  # bundled in the wheel; nothing is downloaded


def gradient(width=6, height=4):
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 40, y * 60, 255 - x * 20], -1).astype(np.uint8))


# --- modes


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"])
@pytest.mark.parametrize("alpha", ["white", "drop"])
def test_opaque_modes_convert_as_pil_does(mode, alpha):
    source = (
        gradient().convert("RGB").convert(mode)
        if mode != "LAB"
        else Image.new("LAB", (6, 4), (200, 128, 128))
    )
    got = images.to_rgb(source, alpha=alpha)
    assert got.mode == "RGB" and got.size == (6, 4)
    assert np.array_equal(np.asarray(got), np.asarray(source.convert("RGB")))


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBA", "RGBa"])
def test_transparent_parts_become_white(mode):
    rgba = Image.new("RGBA", (3, 1), (80, 80, 80, 255))
    rgba.putpixel((1, 0), (80, 80, 80, 0))
    rgba.putpixel((2, 0), (0, 0, 0, 128))
    if mode in ("La", "RGBa"):
        source = rgba.convert("LA" if mode == "La" else "RGBA").convert(mode)
    elif mode == "PA":
        grey = rgba.convert("L")
        source = Image.merge("LA", (grey, rgba.getchannel("A")))
        source = Image.frombytes("PA", (3, 1), source.tobytes())
        source.putpalette([value for level in range(256) for value in (level,) * 3])
    else:
        source = rgba.convert(mode)
    got = np.asarray(images.to_rgb(source))[0]
    assert got[0].tolist() == [80, 80, 80]
    assert got[1].tolist() == [255, 255, 255]
    assert np.abs(got[2].astype(int) - 127).max() <= 1
    dropped = np.asarray(images.to_rgb(source, alpha="drop"))[0]
    assert dropped[0].tolist() == [80, 80, 80] and dropped[2].max() == 0


@pytest.mark.parametrize("transparency", [2, b"\xff\xff\x00"], ids=["index", "tRNS bytes"])
def test_palette_transparency(tmp_path, transparency):
    source = Image.new("P", (3, 1))
    source.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    source.putdata([0, 1, 2])
    source.save(tmp_path / "p.png", transparency=transparency)
    got = np.asarray(images.open_picture(tmp_path / "p.png"))[0]
    assert got.tolist() == [[255, 0, 0], [0, 255, 0], [255, 255, 255]]
    dropped = np.asarray(images.open_picture(tmp_path / "p.png", alpha="drop"))[0]
    assert dropped.tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]


@pytest.mark.parametrize(
    ("mode", "dtype", "key"),
    [("RGB", np.uint8, (10, 20, 30)), ("L", np.uint8, 10), ("I;16", np.uint16, 2570)],
)
def test_key_colour_is_transparent(tmp_path, mode, dtype, key):
    values = np.array([[key, key]], dtype)
    values[0, 1] += 1
    Image.fromarray(values).save(tmp_path / "k.png", transparency=key)
    got = np.asarray(images.open_picture(tmp_path / "k.png"))[0]
    assert got[0].tolist() == [255, 255, 255]
    assert got[1].max() <= 31


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert np.asarray(images.open_picture(tmp_path / "deep.png"))[0, :, 0].tolist() == [0, 1, 128, 255]
    # the official plain conversion
    assert (
        np.asarray(images.open_picture(tmp_path / "deep.png", alpha="drop"))[0, :, 0].tolist()[1:]
        == [255] * 3
    )
    assert np.asarray(images.to_rgb(Image.fromarray(values.astype(np.int32))))[0, :, 0].tolist() == [
        0,
        1,
        128,
        255,
    ]


@pytest.mark.parametrize("top", [1.0, 255.0, 65535.0])
def test_float_ranges(tmp_path, top):
    values = np.array([[0, 0.5, 1]], np.float32) * top
    Image.fromarray(values).save(tmp_path / "f.tif")
    assert np.asarray(images.open_picture(tmp_path / "f.tif"))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("bad", [-1.0, 1e6, np.nan, np.inf])
def test_float_values_out_of_range(tmp_path, bad):
    Image.fromarray(np.array([[0, bad]], np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(ValueError, match="values span"):
        images.open_picture(tmp_path / "f.tif")


# --- colours


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize("primaries", [media_files.ADOBE_RGB, media_files.DISPLAY_P3], ids=["adobe", "p3"])
def test_wide_colours_come_out_as_srgb(tmp_path, primaries, ending):
    """The right values come from the standards' formulas, not from the library that converts."""
    values = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    values = values.repeat(8, axis=0).repeat(8, axis=1)  # flat fields, which lossy files keep
    lossless = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(ending, {})
    path, profile = tmp_path / f"p.{ending}", media_files.rgb_profile(primaries, 2.19921875)
    Image.fromarray(values).save(path, icc_profile=profile, **lossless)
    with Image.open(path) as stored:
        right = media_files.srgb_of(primaries, 2.19921875, np.asarray(stored.convert("RGB")))
    got = np.asarray(images.open_picture(path))
    assert np.abs(got - right).max() < 1.1
    assert np.abs(got.astype(int) - values).mean() > 5  # the profile matters
    with Image.open(path) as picture:  # a PIL image carries its profile along
        assert np.array_equal(np.asarray(images.to_rgb(picture)), got)
        plain = np.asarray(picture.convert("RGB"))
    assert np.array_equal(np.asarray(images.open_picture(path, alpha="drop")), plain)  # as officially


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "LA", "1"])
def test_profiles_of_other_modes(tmp_path, mode):
    """Palettes, transparent pictures and grey ones with an RGB profile (PNG optimisers write these)."""
    values = np.array([[[90, 90, 90], [200, 200, 200], [255, 255, 255], [0, 0, 0]]], np.uint8)
    source = Image.fromarray(values)
    if mode in ("RGBA", "LA"):
        source.putalpha(Image.fromarray(np.array([[255, 255, 0, 255]], np.uint8)))
    source.convert(mode).save(tmp_path / "p.png", icc_profile=media_files.rgb_profile(media_files.SRGB, 1))
    got = np.asarray(images.open_picture(tmp_path / "p.png"))[0, :, 0]
    stored = np.asarray(source.convert(mode).convert("RGB"))[0, :, 0]
    right = np.rint(media_files.srgb_levels(stored / 255))
    assert got.tolist() == pytest.approx(right.tolist(), abs=1)
    if mode != "1":
        assert right[0] > 150  # 90 of a linear space is light


def test_grey_profile(tmp_path):
    ramp = np.arange(256, dtype=np.uint8)[None]
    Image.fromarray(ramp).save(tmp_path / "g.png", icc_profile=media_files.grey_profile(1.8))
    got = np.asarray(images.open_picture(tmp_path / "g.png"))[0]
    right = media_files.srgb_levels((ramp[0] / 255) ** (round(1.8 * 256) / 256))
    assert np.abs(got - right[:, None]).max() < 1.6
    deep = Image.fromarray(ramp.astype(np.uint16) * 257)
    deep.save(tmp_path / "deep.png", icc_profile=media_files.grey_profile(1.8))
    assert np.array_equal(np.asarray(images.open_picture(tmp_path / "deep.png"))[0], got)


@pytest.mark.parametrize("ending", ["jpg", "tif"])
def test_cmyk_profile(tmp_path, ending):
    lightness = np.zeros((2, 2, 2, 2))
    for inks in np.ndindex(lightness.shape):
        lightness[inks] = max(0, 100 - 20 * sum(inks[:3]) - 40 * inks[3])
    inks = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 1, 0), (0, 0, 0, 1)]
    values = (np.array(inks, np.uint8)[None] * 255).repeat(16, axis=0).repeat(16, axis=1)
    picture = Image.frombytes("CMYK", (64, 16), values.tobytes())
    path = tmp_path / f"c.{ending}"
    picture.save(path, icc_profile=media_files.cmyk_profile(lightness), quality=100)
    got = np.asarray(images.open_picture(path))[8, 8::16]
    right = [media_files.srgb_levels(((lightness[ink] + 16) / 116) ** 3) for ink in inks]
    assert np.abs(got - np.array(right)[:, None]).max() < 2


def test_an_srgb_profile_changes_nothing(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(values).save(tmp_path / "s.png", icc_profile=profile)
    assert np.array_equal(np.asarray(images.open_picture(tmp_path / "s.png")), values)
    if PHOTOS:  # whose profile is Hewlett-Packard's sRGB, which rounds differently
        with Image.open(PHOTOS[0]) as photo:
            assert "icc_profile" in photo.info
            assert np.array_equal(np.asarray(images.open_picture(PHOTOS[0])), np.asarray(photo))


@pytest.mark.parametrize(
    "profile",
    [
        b"nonsense" * 50,
        media_files.rgb_profile(media_files.ADOBE_RGB, 2.2)[:200],
        media_files.cmyk_profile(np.zeros((2, 2, 2, 2))),  # PIL keeps it when CMYK becomes RGB
        media_files.icc_profile("GRAY", "XYZ "),  # without its curve
        media_files.icc_profile("3CLR", "XYZ "),
    ],
    ids=["nonsense", "cut", "of cmyk", "empty", "odd space"],
)
def test_a_useless_profile_costs_a_warning_only(tmp_path, profile):
    gradient().save(tmp_path / "p.png", icc_profile=profile)
    with pytest.warns(UserWarning, match=r"p\.png: its colour profile cannot be used"):
        got = images.open_picture(tmp_path / "p.png")
    assert np.array_equal(np.asarray(got), np.asarray(gradient()))


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("a.png", {"gAMA": struct.pack(">I", 100_000)}, "its gamma is 1,"),
        (
            "a.png",
            {"cHRM": struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)},
            "primaries",
        ),
        ("a.jpg", {}, "Adobe RGB"),
    ],
    ids=["gamma", "primaries", "exif"],
)
def test_colours_that_are_said_without_a_profile_are_told(tmp_path, name, words, message):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[images.INTEROP] = {1: "R03"} if name == "a.jpg" else {}
    chunks = PngImagePlugin.PngInfo()
    for kind, content in words.items():
        chunks.add(kind.encode(), content)
    gradient().save(tmp_path / name, **({"pnginfo": chunks} if words else {"exif": exif}))
    with pytest.warns(UserWarning, match=f"says that .*{message}.* no colour profile; its colours are taken"):
        images.open_picture(tmp_path / name)


def test_what_means_srgb_is_not_told(tmp_path):
    chunks = PngImagePlugin.PngInfo()
    chunks.add(b"gAMA", struct.pack(">I", 45455))
    chunks.add(b"cHRM", struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000))
    chunks.add_text("gamma", "1.0")
    gradient().save(tmp_path / "a.png", pnginfo=chunks)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images.open_picture(tmp_path / "a.png")


def test_pillow_without_colour_management(tmp_path, monkeypatch):
    gradient().save(tmp_path / "p.png", icc_profile=media_files.rgb_profile(media_files.ADOBE_RGB, 2.5))

    def missing(source):
        raise ImportError("no littlecms")

    monkeypatch.setattr(ImageCms, "ImageCmsProfile", missing)
    with pytest.warns(UserWarning, match="no littlecms"):
        images.open_picture(tmp_path / "p.png")


# --- files


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "webp", "tif"])
def test_exif_orientation(tmp_path, orientation, ending):
    upright = gradient()
    undo = images.UPRIGHT.get(orientation)
    inverse = {Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270}
    inverse |= {turned: turn for turn, turned in inverse.items()}
    stored = upright if undo is None else upright.transpose(inverse.get(undo, undo))
    exif = Image.Exif()
    exif[images.EXIF_ORIENTATION] = orientation
    path = tmp_path / f"p.{ending}"
    stored.save(path, exif=exif, **({"lossless": True} if ending == "webp" else {}))
    assert np.array_equal(np.asarray(images.open_picture(path)), np.asarray(upright))
    if ending != "tif":  # PIL itself turns TIFF files
        assert np.array_equal(np.asarray(images.open_picture(path, exif="ignore")), np.asarray(stored))
    with Image.open(path) as lazy:  # a PIL image that was only just opened
        assert np.array_equal(np.asarray(images.to_rgb(lazy, exif="apply")), np.asarray(upright))


def test_orientation_table_against_exif_wording():
    """EXIF names the places of row 0 and column 0; 6 is "right side, top": to be turned clockwise."""
    stored = gradient()
    turned = np.asarray(stored.transpose(images.UPRIGHT[6]))
    assert np.array_equal(turned, np.rot90(np.asarray(stored), -1))


def test_broken_exif_costs_a_warning_only(tmp_path):
    gradient().save(tmp_path / "p.jpg", exif=b"Exif\x00\x00nonsense")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert images.open_picture(tmp_path / "p.jpg").size == (6, 4)


@pytest.mark.parametrize("ending", ["gif", "webp", "png"])
def test_animated_file_gives_its_first_frame(tmp_path, ending):
    red, blue = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    path = tmp_path / f"a.{ending}"
    red.save(path, save_all=True, append_images=[blue], **({"lossless": True} if ending == "webp" else {}))
    with pytest.warns(UserWarning, match="several frames"):
        picture = images.open_picture(path)
    assert picture.getpixel((4, 4)) == (255, 0, 0)


def test_still_file_gives_no_warning(tmp_path):
    gradient().save(tmp_path / "p.gif")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images.open_picture(tmp_path / "p.gif")


def test_wrong_files(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        images.open_picture(tmp_path / "none.png")
    with pytest.raises(ValueError, match="folder"):
        images.open_picture(tmp_path)
    (tmp_path / "empty.png").touch()
    with pytest.raises(ValueError, match="empty file"):
        images.open_picture(tmp_path / "empty.png")
    (tmp_path / "text.png").write_text("not a picture at all")
    with pytest.raises(ValueError, match="not a picture"):
        images.open_picture(tmp_path / "text.png")
    with pytest.raises(ValueError, match="does not exist"):
        images.open_picture("n" * 5000 + ".png")
    with pytest.raises(ValueError, match="web address; download"):
        images.open_picture("https://example.com/x.png")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match="a device or a pipe"):
        images.open_picture(tmp_path / "pipe.png")


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>403</html>", "web page"),
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "drawing"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC picture; convert"),
        (b"%PDF-1.7\n", "it is a PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a program that is not run"),
    ],
    ids=["lfs", "html", "svg", "heic", "pdf", "eps"],
)
def test_a_disguised_file_is_named(tmp_path, start, message):
    (tmp_path / "photo.jpg").write_bytes(start + bytes(200))
    with pytest.raises(ValueError, match=message):
        images.open_picture(tmp_path / "photo.jpg")


def test_running_out_of_memory_is_an_error_in_words(tmp_path, monkeypatch):
    gradient().save(tmp_path / "p.tif")

    def exhausted(self):
        raise MemoryError

    monkeypatch.setattr(TiffImagePlugin.TiffImageFile, "load", exhausted)
    with pytest.raises(ValueError, match="more memory than there is"):
        images.open_picture(tmp_path / "p.tif")


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "bmp", "tif"])
def test_truncated_file(tmp_path, ending):
    gradient(64, 64).save(tmp_path / f"whole.{ending}")
    data = (tmp_path / f"whole.{ending}").read_bytes()
    (tmp_path / "cut").write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(ValueError, match="cut"):
        images.open_picture(tmp_path / "cut")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [23, 12, 5])  # PIL warns of 24 pixels at 23 and 12, refuses them at 5
def test_bombs_are_refused(tmp_path, monkeypatch, limit):
    gradient().save(tmp_path / "p.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ValueError, match="24 pixels"):
        images.open_picture(tmp_path / "p.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    images.open_picture(tmp_path / "p.png")


def test_zero_size_and_wrong_mode():
    with pytest.raises(ValueError, match="0 x 5"):
        images.to_rgb(Image.new("L", (0, 5)))
    with pytest.raises(ValueError, match="mode L"):
        images.first_frame(Image.new("L", (5, 5)), width=8, height=8)
    with pytest.raises(ValueError, match="at least 1 x 1"):
        images.center_crop_wide(gradient(), 0, 8)


# --- resize and crop


@pytest.mark.parametrize("path", PHOTOS, ids=lambda path: path.stem)
@pytest.mark.parametrize("target", [(160, 88), (88, 160), (100, 100), (77, 33)])
def test_clean_equals_official_where_that_has_no_black_edge(path, target):
    picture = images.open_picture(path)
    for mode in ("clean", "official"):
        assert images.center_crop_wide(picture, *target, mode=mode).size == target
    w, h = images.resized_size(picture.size, *target, mode="official")
    clean = np.asarray(images.center_crop_wide(picture, *target))
    official = np.asarray(images.center_crop_wide(picture, *target, mode="official"))
    if w >= target[0] and h >= target[1]:
        assert np.array_equal(clean, official)
    else:
        assert not official[:, 0].any() or not official[0].any()
    assert clean[:, 0].any() and clean[0].any()


def test_clean_size_covers_and_equals_official_wherever_that_covers():
    draw = np.random.default_rng(0).integers(1, 4000, (20000, 4)).tolist()
    short = 0
    for w, h, width, height in draw:
        clean = images.resized_size((w, h), width, height, mode="clean")
        official = images.resized_size((w, h), width, height, mode="official")
        assert clean[0] >= width and clean[1] >= height
        if official[0] >= width and official[1] >= height:
            assert clean == official
        else:
            short += 1
    assert 0.2 < short / len(draw) < 0.6


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (1, 1), (3, 20000), (20000, 3)])
def test_extreme_shapes_stay_small(size):
    picture = Image.new("RGB", size, (10, 200, 30))
    crop = np.asarray(images.center_crop_wide(picture, 1280, 704))
    assert crop.shape == (704, 1280, 3) and (crop == (10, 200, 30)).all()


def test_bounded_way_shows_the_same_picture(monkeypatch):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (900, 40, 3), np.uint8))
    whole = np.asarray(images.center_crop_wide(picture, 80, 44)).astype(int)
    monkeypatch.setattr(images, "MAX_RESIZED_PIXELS", 0)
    bounded = np.asarray(images.center_crop_wide(picture, 80, 44)).astype(int)
    assert np.abs(whole - bounded).max() <= 1


def test_official_crop_refuses_what_memory_cannot_hold():
    with pytest.raises(ValueError, match="clean"):
        images.center_crop_wide(Image.new("RGB", (1, 5000)), 1280, 704, mode="official")


# --- tensors


def test_prepare():
    picture = images.open_picture(PHOTOS[0])
    views = images.prepare(picture, width=160, height=88, clip_size=56)
    assert views.pixels.shape == (3, 88, 160) and views.clip_pixels.shape == (3, 56, 56)
    assert views.pixels.dtype == views.clip_pixels.dtype == torch.float32
    assert views.pixels.min() >= -1 and views.pixels.max() <= 1
    assert views.pixels.min() < -0.9 and views.pixels.max() > 0.9
    again = images.clip_view(picture, square=160, size=56)
    assert torch.equal(views.clip_pixels, again)
    trained = images.prepare(picture, width=160, height=88, clip_size=56, clip_square=56)
    assert not torch.equal(trained.clip_pixels, again)


def test_black_and_white_are_the_ends():
    white = images.first_frame(Image.new("RGB", (5, 7), (255, 255, 255)), width=8, height=8)
    black = images.first_frame(Image.new("RGB", (5, 7)), width=8, height=8)
    assert (white == 1).all() and (black == -1).all()
    grey = images.clip_view(
        Image.new("RGB", (5, 7), (51, 51, 51)), square=8, size=8, mean=(0.2, 0, 0), std=(1, 1, 2)
    )
    assert torch.allclose(grey[:, 0, 0], torch.tensor([0.0, 0.2, 0.1]), atol=1e-7)
