"""reading.py: what a file holds, as a player shows it, and no more of it than is wanted."""

import subprocess
import sys
import tracemalloc
import warnings
from fractions import Fraction

import media_files
import numpy as np
import pytest
from PIL import Image

from i2vgen.files import reading, video

TS_PACKET = 188  # bytes


def clip(num_frames=12, height=32, width=48):
    """Grey and a wandering bar tell the frames apart, a bright corner and a dark edge the orientation."""
    frames = np.full((num_frames, height, width, 3), 60, np.uint8)
    for number, frame in enumerate(frames):
        frame += 8 * (number % 20)
        frame[12:20, (3 * number) % 45 :][:, :3] = 255
    frames[:, : height // 4, : width // 4] = (250, 120, 30)
    frames[:, -height // 8 :] = (10, 20, 90)
    return frames


def order(frames, like):
    """Which of `like` each frame is."""
    return np.abs(frames[:, None].astype(int) - like[None]).mean((2, 3, 4)).argmin(1).tolist()


def told(path, **arguments):
    """-> (frames, rate, the warnings in one text)"""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        frames, rate = reading.load(path, **arguments)
    return frames, rate, "\n".join(str(w.message) for w in caught)


# --- orientation and shape


@pytest.mark.parametrize(
    "matrix",
    [
        pytest.param((1, 0, 0, 1), id="plain"),
        pytest.param((0, 1, -1, 0), id="right"),
        pytest.param((-1, 0, 0, -1), id="half"),
        pytest.param((0, -1, 1, 0), id="left"),
        pytest.param((-1, 0, 0, 1), id="hflip"),
        pytest.param((0, -1, -1, 0), id="transverse"),
        pytest.param((1, 0, 0, -1), id="vflip"),
        pytest.param((0, 1, 1, 0), id="transpose"),
    ],
)
def test_display_matrix(tmp_path, matrix):
    """Each pixel goes where the matrix sends it. ffmpeg agrees in all eight cases (compared by hand)."""
    path = media_files.write_video(tmp_path / "a.mp4", clip(3))
    stored, _, _ = told(path)
    got, _, notes = told(media_files.turn(path, *matrix))
    a, b, c, d = matrix
    y, x = np.mgrid[: stored.shape[1], : stored.shape[2]]
    to_x, to_y = a * x + c * y, b * x + d * y
    to_x, to_y = to_x - to_x.min(), to_y - to_y.min()
    right = np.zeros((3, to_y.max() + 1, to_x.max() + 1, 3), np.uint8)
    right[:, to_y, to_x] = stored[:, y, x]
    assert np.array_equal(got, right) and not notes


def test_odd_angles_are_told(tmp_path):
    path = media_files.write_video(tmp_path / "a.mp4", clip(3))
    got, _, notes = told(media_files.turn(path, 0.8, 0.6, -0.6, 0.8))
    assert got.shape == (3, 32, 48, 3) and "odd angle" in notes


@pytest.mark.parametrize(("aspect", "width"), [("2/1", 96), ("1/2", 24), ("10/11", 43), ("1/1", 48)])
def test_pixels_become_square(tmp_path, aspect, width):
    path = media_files.write_video(tmp_path / "a.mp4", clip(3), aspect=Fraction(aspect))
    got, _, _ = told(path)
    assert got.shape == (3, 32, width, 3)  # ffmpeg's iw*sar
    assert np.abs(got[0, 2, 1].astype(int) - (250, 120, 30)).max() < 12
    assert np.abs(got[0, 2, -2].astype(int) - 60).max() < 12
    turned, _, _ = told(media_files.turn(path, 0, 1, -1, 0))
    assert turned.shape == (3, width, 32, 3)


def test_absurd_pixels_are_told(tmp_path):
    got, _, notes = told(media_files.write_video(tmp_path / "a.mp4", clip(3), aspect=Fraction(20)))
    assert got.shape == (3, 32, 48, 3) and "pixels of shape 20" in notes


# --- what cannot be corrected is told


@pytest.mark.parametrize(("color_trc", "name"), [(16, "PQ"), (18, "HLG"), (1, "")])
def test_hdr_is_told(tmp_path, color_trc, name):
    path = media_files.write_video(tmp_path / "a.mkv", clip(3), color_trc=color_trc)
    assert ("HDR" in told(path)[2]) == bool(name) and name in told(path)[2]


@pytest.mark.parametrize("alpha", ["white", "drop"])
def test_transparency_that_is_not_read_is_told(tmp_path, alpha):
    form = {"codec": "libvpx-vp9", "pix_fmt": "yuva420p", "metadata": {"alpha_mode": "1"}}
    path = media_files.write_video(tmp_path / "a.webm", clip(3), **form)
    _, _, note = told(path, alpha=alpha)
    assert "transparen" in note


def test_interlacing_is_told(tmp_path):
    options = {"x264-params": "interlaced=1"}
    path = media_files.write_video(tmp_path / "a.mp4", clip(3), options=options)
    assert "interlaced" in told(path)[2]


# --- time


@pytest.mark.parametrize("ending", ["mp4", "mkv", "mov", "webm", "avi"])
def test_containers_give_frames_and_rate(tmp_path, ending):
    codec = {"webm": "libvpx-vp9", "avi": "mpeg4"}.get(ending, "libx264")
    frames = clip()
    got, rate, notes = told(media_files.write_video(tmp_path / f"a.{ending}", frames, codec=codec))
    assert order(got, frames) == list(range(12)) and rate == pytest.approx(10) and not notes
    assert reading.measure(tmp_path / f"a.{ending}") == (12, rate)


def test_a_clock_is_not_a_rate(tmp_path):
    """AVI counts 1000 frames per second here, of which it stores every hundredth."""
    times = [i / 10 for i in range(12)]
    path = media_files.write_video(tmp_path / "a.avi", clip(), codec="mpeg4", times=times)
    got, rate, notes = told(path)
    assert len(got) == 12 and rate == pytest.approx(10) and not notes


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_a_variable_rate_becomes_even(tmp_path, ending):
    frames, times = clip(), [0, 0.1, 0.2, 0.3, 0.4, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3]
    got, rate, notes = told(media_files.write_video(tmp_path / f"a.{ending}", frames, times=times))
    ticks = (np.arange(len(got)) + 0.5) / rate
    assert order(got, frames) == [int(np.searchsorted(times, t, side="right")) - 1 for t in ticks]
    assert len(got) / rate == pytest.approx(1.4, abs=0.15)
    assert "variable frame rate" in notes


@pytest.mark.parametrize("ending", ["mp4", "mkv", "webm", "mov"])
def test_a_pause_of_ten_minutes(tmp_path, ending):
    frames, times = clip(10), [i / 10 for i in range(9)] + [600]
    codec = "libvpx-vp9" if ending == "webm" else "libx264"
    path = media_files.write_video(tmp_path / f"a.{ending}", frames, times=times, codec=codec)
    got, rate, notes = told(path)
    assert rate == pytest.approx(10) and len(got) == 109  # 10 seconds of the pause stay
    assert order(got, frames) == [*range(8), *[8] * 100, 9]
    assert "stands still for 599.2 seconds" in notes and "its 10 frames become 109" in notes


@pytest.mark.parametrize("ending", ["gif", "webp"])
@pytest.mark.parametrize(
    ("durations", "count", "rate"),
    [
        ([100, 100, 300, 100], 6, 10),  # a hold
        ([20, 20, 20, 60_000], 503, 50),  # the last picture stands for a minute
        ([20_000, 20_000, 30_000, 20_000], 5, 1 / 18),  # slow everywhere: no pause
    ],
)
def test_holds_of_animations(tmp_path, ending, durations, count, rate):
    pictures = [Image.fromarray(frame) for frame in clip(4)]
    path, exact = tmp_path / f"a.{ending}", {"lossless": True} if ending == "webp" else {}
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, **exact)
    got, found, notes = told(path)
    assert len(got) == count and found == pytest.approx(rate)
    assert ("stands still" in notes) == (max(durations) == 60_000)
    assert order(got[:2], clip(4)) == [0, 1] and order(got[-1:], clip(4)) == [3]


def test_a_millisecond_does_not_set_the_clock(tmp_path):
    pictures = [Image.fromarray(frame) for frame in clip(4)]
    path = tmp_path / "a.webp"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=[1, 30, 30, 600_000])
    got, rate, _ = told(path)
    assert len(got) == 336 and rate == pytest.approx(33.3, abs=0.1)


def test_durations_are_pillows(tmp_path):
    """The durations are read from the file's structure; Pillow, which decodes the frames, must agree."""
    pictures, durations = [Image.fromarray(frame) for frame in clip(5)], [40, 80, 130, 40, 1000]
    for ending in ("gif", "webp"):
        pictures[0].save(
            tmp_path / f"a.{ending}", save_all=True, append_images=pictures[1:], duration=durations, loop=3
        )
        read = {"gif": reading._gif_durations, "webp": reading._webp_durations}[ending]
        with (tmp_path / f"a.{ending}").open("rb") as file:
            assert read(file) == (durations, True)


# --- only what is wanted


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov", "a.webm", "a.avi", "a.gif", "a.webp", "a"])
def test_some_frames_are_those_of_the_whole(tmp_path, name):
    frames, path = clip(40), tmp_path / name
    codec = {"a.webm": "libvpx-vp9", "a.avi": "mpeg4"}.get(name, "libx264")
    if name in ("a.gif", "a.webp", "a"):
        video.save(frames, path, fps=10)
    else:
        options = {"x264-params": "keyint=10:open-gop=1:bframes=3"}
        media_files.write_video(path, frames, codec=codec, options=options)
    whole, rate = reading.load(path)
    assert reading.measure(path) == (len(whole), rate) == (40, pytest.approx(10))
    for only in ([0], [39], range(5, 30, 4), [21, 20], [3, 3, 17], range(12, 14)):
        assert np.array_equal(reading.load(path, only=only)[0], whole[list(only)])
    for only in ([], [40], [-1], range(38, 42)):
        with pytest.raises(ValueError, match="has the frames 0 to 39; asked for"):
            reading.load(path, only=only)


def test_a_stream_that_refreshes_bit_by_bit(tmp_path):
    """No frame but the first is complete in itself: seeking must not show half-refreshed ones."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 64, 64, 3), np.uint8)
    options = {"x264-params": "intra-refresh=1:keyint=15"}
    path = media_files.write_video(tmp_path / "a.mkv", noise, options=options)
    whole, _ = reading.load(path)
    for number in range(0, 60, 7):
        assert np.array_equal(reading.load(path, only=[number])[0][0], whole[number])


def test_a_raw_stream_has_no_times(tmp_path):
    frames, path = clip(), tmp_path / "a.h264"
    media_files.write_video(path, frames)
    assert order(reading.load(path)[0], frames) == list(range(12))
    assert order(reading.load(path, only=[7])[0], frames) == [7]


def test_decoding_starts_at_the_key_frame_before(tmp_path, monkeypatch):
    options = {"x264-params": "keyint=20:scenecut=0"}
    path = media_files.write_video(tmp_path / "a.mp4", clip(100), options=options)
    numbered, decoded = reading._numbered, []

    def watched(*arguments):
        for number, frame in numbered(*arguments):
            decoded.append(number)
            yield number, frame

    monkeypatch.setattr(reading, "_numbered", watched)
    reading.load(path, only=range(66, 70))
    assert decoded == list(range(60, 70))


def test_a_clip_is_held_once(tmp_path):
    path = media_files.write_video(tmp_path / "a.mp4", clip(100, 96, 128))
    size = 100 * 96 * 128 * 3
    reading.measure(path)
    for only, bound in ((None, 1.2 * size), (range(0, 100, 25), 0.12 * size)):
        tracemalloc.start()
        reading.load(path, only=only)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < bound


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "a.mp4"
    media_files.write_video(path, clip(12))
    assert reading.measure(path)[0] == 12
    media_files.write_video(path, clip(5))
    assert reading.measure(path)[0] == 5 == len(reading.load(path)[0])


# --- limits


def test_the_limit_names_the_size(tmp_path, monkeypatch):
    media_files.write_video(tmp_path / "a.mp4", clip(40))
    video.save(clip(40), tmp_path / "a.gif", fps=10)
    video.save(clip(40), tmp_path / "a", fps=10)
    monkeypatch.setattr(reading, "MAX_BYTES", 32 * 48 * 3 * 30)
    for name in ("a.mp4", "a.gif", "a"):
        with pytest.raises(ValueError, match=r"40 frames of 48 x 32 pixels take .* GB, over the limit"):
            reading.load(tmp_path / name)
        assert len(reading.load(tmp_path / name, only=range(20))[0]) == 20
    monkeypatch.setattr(reading, "MAX_BYTES", 32 * 48 * 3)
    for name in ("a.mp4", "a.gif", "a"):
        with pytest.raises(ValueError, match="over the limit"):
            reading.load(tmp_path / name, only=[0])


def test_too_many_frames_are_refused(tmp_path, monkeypatch):
    media_files.write_video(tmp_path / "a.mp4", clip(40))
    pictures = [Image.fromarray(frame) for frame in clip(2)]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=[10, 9000])
    monkeypatch.setattr(reading, "MAX_FRAMES", 30)
    for name in ("a.mp4", "a.gif"):
        with pytest.raises(ValueError, match="over the limit of 30"):
            reading.measure(tmp_path / name)


def bombs(folder):
    """Small files that claim much; those whose name begins with "wide" claim more than is allowed."""
    pictures = [Image.fromarray(frame) for frame in clip(5)]
    for name, durations in (
        ("bomb.webp", [1, 16_777_215]),
        ("bomb.gif", [10, 655_350]),
        ("bomb_big.gif", [10, *[655_350] * 4]),
        ("wide.webp", [100] * 5),
        ("wide.gif", [100] * 5),
    ):
        more = pictures[1 : len(durations)]
        pictures[0].save(folder / name, save_all=True, append_images=more, duration=durations)
        data = bytearray((folder / name).read_bytes())
        if name == "wide.gif":
            data[6:10] = b"\xff\xff\xff\xff"
        elif name == "wide.webp":
            start = data.index(b"VP8X") + 12
            data[start : start + 6] = b"\x00\x2f\x00" * 2  # 12,033 x 12,033
        (folder / name).write_bytes(data)
    media_files.write_video(folder / "days.mkv", clip(3), times=[0, 0.125, 864_000])
    return sorted(folder.iterdir())


def test_small_files_with_large_claims_end_quickly(tmp_path):
    """In a process of its own, whose memory can be watched."""
    pytest.importorskip("resource")
    program = (
        "import resource, sys, time, warnings\n"
        "from i2vgen.files import reading\n"
        "warnings.simplefilter('ignore')\n"
        "for path in sys.argv[1:]:\n"
        "    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()\n"
        "    try: what = len(reading.load(path)[0])\n"
        "    except ValueError: what = 'refused'\n"
        "    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "    print(path.rsplit('/')[-1], what, grown < 3 * 10**5, time.process_time() - start < 5)\n"
    )
    run = [sys.executable, "-c", program, *map(str, bombs(tmp_path))]
    ended = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == [
        "bomb.gif 1001 True True",
        "bomb.webp 2 True True",
        "bomb_big.gif 4001 True True",
        "days.mkv 82 True True",
        "wide.gif refused True True",
        "wide.webp refused True True",
    ]


# --- files that are cut short, or something else


@pytest.mark.parametrize("ending", ["mkv", "webm", "ts", "gif"])
def test_what_is_there_is_used_and_the_cut_is_told(tmp_path, ending):
    noise = np.random.default_rng(0).integers(0, 256, (40, 48, 64, 3), np.uint8)
    path = tmp_path / f"a.{ending}"
    if ending == "gif":
        video.save(noise, path, fps=10)
        whole = path.read_bytes()
        path.write_bytes(whole[: whole.index(b"\x21\xf9", len(whole) // 2)])
    else:
        codec = "libvpx-vp9" if ending == "webm" else "libx264"
        media_files.write_video(path, noise, codec=codec)
        path.write_bytes(path.read_bytes()[: inside_a_packet(path.stat().st_size // 2)])
    got, _, notes = told(path)
    assert 10 < len(got) < 35
    assert "cut short" in notes and "variable" not in notes


def inside_a_packet(size: int) -> int:
    """A cut between two packets of a transport stream leaves no trace; sizes depend on x264 and the CPU."""
    return size // TS_PACKET * TS_PACKET + TS_PACKET // 2


@pytest.mark.parametrize("left", [0.5, 0.51, 0.6, 1])
def test_a_stream_that_ends_inside_a_packet_is_told(tmp_path, left):
    path = media_files.write_video(tmp_path / "a.ts", clip(40))
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size if left == 1 else inside_a_packet(int(left * size))])
    assert ("cut short" in told(path)[2]) == (path.stat().st_size % TS_PACKET > 0) == (left < 1)


@pytest.mark.parametrize("name", ["a.mp4", "front.mp4", "a.webp"])
def test_what_is_cut_beyond_use_is_refused(tmp_path, name):
    path, noise = tmp_path / name, np.random.default_rng(0).integers(0, 256, (40, 48, 64, 3), np.uint8)
    if name == "a.mp4":
        media_files.write_video(path, noise)  # its table of frames stands at the end
    else:
        video.save(noise, path, fps=10)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="cut short"):
        reading.load(path)
    with pytest.raises(ValueError, match="cut short"):
        reading.load(path, only=[0])


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<html>login</html>", "web page"),
        (b"", "empty file"),
        (b"GIF89a", "cannot be read as a video"),
        (b"RIFF\0\0\0\0WEBP", "cannot be read as a video"),
    ],
    ids=["lfs", "html", "empty", "gif", "webp"],
)
@pytest.mark.parametrize("name", ["a.mp4", "a.gif"])
def test_a_disguised_file_is_named(tmp_path, name, start, message):
    (tmp_path / name).write_bytes(start)
    with pytest.raises(ValueError, match=message):
        reading.load(tmp_path / name)


def test_the_content_decides_not_the_name(tmp_path):
    frames = clip(4)
    media_files.write_video(tmp_path / "a.mp4", frames).rename(tmp_path / "b.gif")
    video.save(frames, tmp_path / "c.gif", fps=10).rename(tmp_path / "d:e%03d.mp4")
    media_files.write_video(tmp_path / "a.mp4", frames).rename(tmp_path / "http:x.mp4")
    for name in ("b.gif", "d:e%03d.mp4", "http:x.mp4"):
        assert order(reading.load(tmp_path / name)[0], frames) == [0, 1, 2, 3]


def test_a_cover_is_no_video(tmp_path):
    import av

    path = tmp_path / "a.m4a"
    with av.open(str(path), "w", format="mp4") as file:
        cover = file.add_stream("png", rate=10)
        cover.width, cover.height, cover.pix_fmt = 48, 32, "rgb24"
        cover.disposition = int(av.stream.Disposition.attached_pic)
        file.mux(cover.encode(av.VideoFrame.from_ndarray(clip(1)[0], format="rgb24")))
        file.mux(cover.encode())
    with pytest.raises(ValueError, match="no video stream; its picture is a cover"):
        reading.load(path)


# --- pictures inside


@pytest.mark.parametrize("name", ["a.webp", "frames"])
def test_profiles_of_frames_are_applied(tmp_path, name):
    values = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), np.uint8)
    values, path = values.repeat(8, axis=1).repeat(8, axis=2), tmp_path / name
    pictures = [Image.fromarray(frame) for frame in values]
    profile = {"icc_profile": media_files.rgb_profile(media_files.DISPLAY_P3, 2.2)}
    if name == "frames":
        path.mkdir()
        for i, picture in enumerate(pictures):
            picture.save(path / f"frame_{i:04d}.png", **profile)
    else:
        pictures[0].save(path, save_all=True, append_images=pictures[1:], lossless=True, **profile)
    right = media_files.srgb_of(media_files.DISPLAY_P3, 2.2, values)
    assert np.abs(reading.load(path)[0] - right).max() < 1.5


def test_deep_frames_are_scaled_not_clipped(tmp_path):
    Image.fromarray(np.full((4, 4), 100 * 257, np.uint16)).save(tmp_path / "frame_0000.png")
    assert reading.load(tmp_path)[0].max() == 100
