"""video.py: frames to files and back, whole or not at all."""

import hashlib
import os
import subprocess
import sys

import av
import numpy as np
import pytest
import torch
from PIL import Image

from i2vgen.files import video

ENDINGS = ["clip.mp4", "clip.gif", "clip.webp", "clip"]


def clip(num_frames=6, height=32, width=48):
    """Smooth moving colours: uint8 [f h w 3], no two frames equal."""
    f, y, x = np.mgrid[:num_frames, :height, :width]
    wave = [np.sin(x / 9 + f * 0.7), np.cos(y / 7 - f * 0.5), np.sin((x + y) / 11 + f)]
    return (127.5 + 110 * np.stack(wave, -1)).astype(np.uint8)


# --- floats to frames


def test_levels_by_truncation_and_by_rounding():
    values = torch.linspace(-1, 1, 4001).view(1, 1, 1, -1)
    before = values.clone()
    low, near = video.to_uint8(values), video.to_uint8(values, rounding="nearest")
    assert torch.equal(values, before)
    assert low.shape == (1, 1, 4001, 1) and low.dtype == torch.uint8
    assert low.unique().numel() == near.unique().numel() == 256
    assert set((near.int() - low.int()).unique().tolist()) == {0, 1}


def test_layout_batch_and_clamp():
    pixels = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0)) * 2
    frames = video.to_uint8(pixels)
    assert frames.shape == (2, 4, 5, 6, 3)
    assert torch.equal(frames[1], video.to_uint8(pixels[1]))
    assert frames.min() == 0 and frames.max() == 255
    assert video.to_uint8(torch.full((3, 1, 1, 1), float("inf"))).min() == 255


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    values = torch.linspace(-1, 1, 500).view(1, 1, 1, -1).to(dtype)
    assert torch.equal(video.to_uint8(values), video.to_uint8(values.double()))


def test_nan_and_wrong_input():
    pixels = torch.zeros(3, 2, 4, 4)
    pixels[0, 1, 2, 3] = float("nan")
    with pytest.raises(ValueError, match="1 of 96 pixel values are NaN"):
        video.to_uint8(pixels)
    with pytest.raises(ValueError, match="expected floats"):
        video.to_uint8(torch.zeros(3, 4, 4))
    with pytest.raises(ValueError, match="expected floats"):
        video.to_uint8(torch.zeros(3, 2, 4, 4, dtype=torch.uint8))


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_grey_last_frame(kind):
    frames = np.zeros((3, 10, 10, 3), np.uint8)
    frames[2, :4] = 117
    assert video.grey_fraction(kind(frames)[2]) == 0.4
    assert len(video.drop_grey_last_frame(kind(frames))) == 3  # 40 % is not more than 40 %
    frames[2, 4, 0, 0] = 137
    assert len(video.drop_grey_last_frame(kind(frames))) == 2
    frames[2, 4, 0, 0] = 138
    assert len(video.drop_grey_last_frame(kind(frames))) == 3
    grey = np.full((2, 4, 4, 3), 128, np.uint8)
    assert len(video.drop_grey_last_frame(kind(grey))) == 1
    assert len(video.drop_grey_last_frame(kind(grey[:1]))) == 1


# --- round trips


def test_png_is_exact(tmp_path):
    frames = clip()
    path = video.save(torch.from_numpy(frames), tmp_path / "a" / "b" / "clip", fps=7.5)
    assert sorted(p.name for p in path.iterdir())[0] == "frame_0000.png"
    back, fps = video.load(path)
    assert np.array_equal(back, frames) and fps == 7.5
    video.save(frames[:2], path, fps=8)  # a shorter clip leaves none of the old frames
    assert len(list(path.iterdir())) == 2
    assert os.listdir(path.parent) == ["clip"]


def test_png_from_elsewhere_has_no_fps(tmp_path):
    Image.fromarray(clip()[0]).save(tmp_path / "frame_0000.png")
    assert video.load(tmp_path)[1] is None


@pytest.mark.parametrize(("name", "bound"), [("clip.mp4", 5), ("clip.gif", 14), ("clip.webp", 6)])
def test_lossy_formats_come_back_close(tmp_path, name, bound):
    frames = clip()  # saturated colours in steep waves: hard on halved chroma and on 256 colours
    back, fps = video.load(video.save(frames, tmp_path / name, fps=8))
    assert back.shape == frames.shape and back.dtype == np.uint8
    distance = np.abs(back[:, None].astype(int) - frames[None]).mean((2, 3, 4))
    assert np.diag(distance).max() < bound
    assert distance.argmin(1).tolist() == [0, 1, 2, 3, 4, 5]  # every frame in its place
    assert fps == pytest.approx(8, rel=0.02)


def test_colours_survive_mp4(tmp_path):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 100, 50)]
    frames = (
        np.repeat(np.array(colours, np.uint8)[None, None], 32, axis=2).repeat(32, axis=1).repeat(2, axis=0)
    )
    back, _ = video.load(video.save(frames, tmp_path / "c.mp4", fps=8))
    assert np.abs(back[:, 16, 16::32].astype(int) - frames[:, 16, 16::32]).max() <= 4
    with av.open(str(tmp_path / "c.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert context.name == "h264" and context.pix_fmt == "yuv420p" and context.colorspace == 1


@pytest.mark.parametrize("size", [(33, 48), (32, 47), (33, 47), (1, 1)])
def test_odd_mp4_sizes_repeat_the_last_line(tmp_path, size):
    frames = clip(3, *size)
    back, _ = video.load(video.save(frames, tmp_path / "odd.mp4", fps=8))
    assert back.shape == (3, size[0] + size[0] % 2, size[1] + size[1] % 2, 3)


@pytest.mark.parametrize("name", ENDINGS)
def test_single_frame(tmp_path, name):
    back, _ = video.load(video.save(clip(1), tmp_path / name, fps=8))
    assert back.shape == (1, 32, 48, 3)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip.webp"])
@pytest.mark.parametrize("fps", [0.5, 7.5, 8, 24000 / 1001, 30])
def test_length_in_seconds(tmp_path, name, fps):
    back, stored = video.load(video.save(clip(9, 16, 16), tmp_path / name, fps=fps))
    grid = {"clip.mp4": 1e-6, "clip.gif": 0.0051, "clip.webp": 0.00051}[name]
    assert len(back) == 9
    assert abs(9 / stored - 9 / fps) <= grid


def test_animations_loop_and_repeats_keep_time(tmp_path):
    frames = clip(4).repeat(2, axis=0)
    for name in ("a.gif", "a.webp"):
        path = video.save(frames, tmp_path / name, fps=10)
        with Image.open(path) as picture:
            assert picture.info["loop"] == 0 and picture.n_frames == 4
    gif, fps = video.load(tmp_path / "a.gif")
    assert len(gif) == 4 and fps == 5  # four frames of 200 ms
    held = np.concatenate([clip(4), clip(4)[-1:].repeat(5, axis=0)])
    back, fps = video.load(video.save(held, tmp_path / "held.gif", fps=10))
    assert len(back) == 9 and fps == 10


def test_a_strip_shows_all_frames_side_by_side(tmp_path):
    frames = clip()
    path = video.save(frames, tmp_path / "strip.png", fps=8)
    strip = np.asarray(Image.open(path))
    assert np.array_equal(np.split(strip, len(frames), axis=1), frames)


@pytest.mark.parametrize("ending", ["", ".mp4", ".gif"])
def test_enlarging_makes_squares(tmp_path, ending):
    frames = clip()
    got, _ = video.load(video.save(frames, tmp_path / f"e{ending}", fps=8, quality=10, enlarge=3))
    assert got.shape == (len(frames), 3 * frames.shape[1], 3 * frames.shape[2], 3)
    if not ending:  # the others compress
        assert np.array_equal(got, np.kron(frames, np.ones((1, 3, 3, 1), np.uint8)))


def test_quality_changes_the_size(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
    for ending in ("mp4", "webp"):
        small = video.save(noise, tmp_path / f"s.{ending}", fps=8, quality=2).stat().st_size
        assert small < video.save(noise, tmp_path / f"b.{ending}", fps=8, quality=10).stat().st_size


def test_the_same_frames_are_the_same_file(tmp_path):
    """Many saves while every core is busy: x264's mbtree would give another file at almost each of them."""
    spin = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4)]
    try:
        frames = clip(8, 192, 192)
        saved = (video.save(frames, tmp_path / "a.mp4", fps=8).read_bytes() for _ in range(20))
        assert len({hashlib.sha256(data).hexdigest() for data in saved}) == 1
    finally:
        for process in spin:
            process.kill()
            process.wait()


# --- whole or not at all


def fail_midway(monkeypatch, error):
    """The second frame of any format raises."""
    calls = {"count": 0}

    def failing(right):
        def wrapped(*args, **named):
            calls["count"] += 1
            if calls["count"] > 1:
                raise error
            return right(*args, **named)

        return wrapped

    monkeypatch.setattr(np, "pad", failing(np.pad))  # mp4, per frame
    monkeypatch.setattr(Image.Image, "quantize", failing(Image.Image.quantize))  # gif, per frame
    monkeypatch.setattr(Image.Image, "save", failing(Image.Image.save))  # png, per frame


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["disk full", "ctrl-c"])
@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip"])
def test_failed_write_leaves_the_old_and_no_debris(tmp_path, monkeypatch, name, error):
    old = clip(3)
    path = video.save(old, tmp_path / name, fps=8)
    before, _ = video.load(path)
    with monkeypatch.context() as patch:
        fail_midway(patch, error)
        with pytest.raises(type(error)):
            video.save(clip(5), path, fps=8)
        with pytest.raises(type(error)):
            video.save(clip(5), tmp_path / f"new-{name}", fps=8)
    assert os.listdir(tmp_path) == [name]
    assert np.array_equal(video.load(path)[0], before)


@pytest.mark.parametrize("name", ENDINGS)
def test_failed_replace_leaves_the_old_and_no_debris(tmp_path, monkeypatch, name):
    path = video.save(clip(3), tmp_path / name, fps=8)
    before, _ = video.load(path)
    right = os.rename

    def refuse(source, target):
        if os.fspath(target) == os.fspath(path) and ".writing-" in os.fspath(source):
            raise PermissionError("no")
        right(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        patch.setattr(os, "rename", refuse)
        with pytest.raises(PermissionError):
            video.save(clip(5), path, fps=8)
    assert os.listdir(tmp_path) == [name]
    assert np.array_equal(video.load(path)[0], before)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip.webp"])
def test_files_get_ordinary_permissions(tmp_path, name):
    (tmp_path / "plain").touch()
    path = video.save(clip(2), tmp_path / name, fps=8)
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


# --- errors before any work


@pytest.mark.parametrize("name", ["clip.avi", "clip.jpg", "run.v1.0", ".mp4"])
def test_unknown_ending(tmp_path, name):
    with pytest.raises(ValueError, match=r"\.mp4, \.gif and \.webp"):
        video.check_output(tmp_path / name)


def test_destinations_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="cannot create the folder"):
        video.check_output(tmp_path / "file" / "clip.mp4")
    with pytest.raises(ValueError, match="existing folder"):
        video.check_output(tmp_path / "folder.mp4")
    with pytest.raises(ValueError, match=r"thesis\.tex"):
        video.check_output(tmp_path / "others")
    with pytest.raises(ValueError, match="existing file"):
        video.check_output(tmp_path / "file")
    assert video.check_output(tmp_path / "deep" / "down" / "CLIP.MP4").parent.is_dir()


def test_unwritable_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="not writable"):
        video.check_output(tmp_path / "clip.gif")


def test_missing_encoders(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "CODEC", "libx264_of_another_build")
    with pytest.raises(ValueError, match=r"H\.264"):
        video.check_output(tmp_path / "clip.mp4")
    monkeypatch.setattr(video.features, "check", lambda name: False)
    with pytest.raises(ValueError, match="WebP"):
        video.check_output(tmp_path / "clip.webp")


@pytest.mark.parametrize("fps", [0, -8, float("nan"), float("inf"), 1e-6])
def test_wrong_fps(tmp_path, fps):
    with pytest.raises(ValueError, match="fps"):
        video.save(clip(2), tmp_path / "clip.mp4", fps=fps)
    with pytest.raises(ValueError, match="fps"):
        video.check_output(tmp_path / "clip.mp4", fps=fps)
    assert os.listdir(tmp_path) == []


def test_gif_too_fast(tmp_path):
    with pytest.raises(ValueError, match="too fast for a GIF"):
        video.check_output(tmp_path / "clip.gif", fps=60)
    video.check_output(tmp_path / "clip.webp", fps=60)


def test_wrong_frames(tmp_path):
    for frames in (clip().astype(np.float32), clip()[0], clip()[..., :2], clip()[:0]):
        with pytest.raises(ValueError, match="expected uint8"):
            video.save(frames, tmp_path / "clip.mp4", fps=8)
    with pytest.raises(ValueError, match="quality"):
        video.save(clip(), tmp_path / "clip.mp4", fps=8, quality=11)
    with pytest.raises(ValueError, match="do not fit"):
        video.save(np.zeros((1, 2, 16384, 3), np.uint8), tmp_path / "clip.webp", fps=8)


@pytest.mark.parametrize("name", ["x.mp4", "x.gif", "x.webp"])
def test_unreadable_videos(tmp_path, name):
    with pytest.raises(ValueError, match="does not exist"):
        video.load(tmp_path / name)
    (tmp_path / name).write_bytes(b"no video here")
    with pytest.raises(ValueError, match="cannot be read"):
        video.load(tmp_path / name)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="holds no frame"):
        video.load(tmp_path / "none")
