"""Video files, GIF, WebP and folders of PNG pictures -> uint8 frames [f h w 3], evenly spaced in time.

A file is read in two steps: `_timing` finds out when its frames are seen, where possible without decoding
them; then only the wanted frames are decoded and kept, once. Whatever the file claims, no more
than MAX_BYTES are taken.

Orientation, pixel aspect ratio and colour profiles are applied, so that frames look as in a player.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import itertools
import os
import re
import statistics
import struct
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
from PIL import Image

from i2vgen.files import images

Alpha = Literal["white", "drop"]

# Endings by which a folder is searched for videos; `load` reads every file that PyAV can read.
VIDEOS = (".mp4", ".gif", ".webp", ".mov", ".mkv", ".avi", ".webm", ".m4v")
FRAME_NAME = re.compile(r"frame_(\d{4,})\.png")
FPS_RANGE = (0.01, 1000.0)

MAX_BYTES = 10**9  # of one clip: 11 seconds of 1280 x 720 at 30 frames per second
WORKING_BYTES = 16  # per pixel of the frame that is being decoded, beside those that are kept
MAX_FRAMES = 1_000_000  # 9 hours at 30 frames per second
MAX_HOLD = 10.0  # seconds that a frame may stand still; longer pauses are shortened to it
TS_PACKETS = (188, 192, 204)  # bytes; an MPEG transport stream names no length
SHORTEST = 10  # milliseconds; players do not show frames of GIF and WebP for a shorter time than this
HDR = {16: "PQ", 18: "HLG"}  # transfer functions by their number in ITU-T H.273


class Timing(NamedTuple):
    """Which frames a file stores, and which of them is seen at each tick of an even clock."""

    shown: np.ndarray  # [ticks] number of the stored frame
    rate: float | None  # ticks per second
    size: tuple[int, int]  # width, height of a frame
    stamps: list[int] | None = None  # presentation times of the stored frames; None: known by order only
    notes: tuple[str, ...] = ()  # what the user should know, each to follow "video PATH"


def load(
    path: str | Path, *, alpha: Alpha = "drop", only: Sequence[int] | None = None
) -> tuple[np.ndarray, float | None]:
    """A video file or a folder of PNGs -> (uint8 frames [f h w 3], frames per second).

    `only` names the frames to read (0 is the first) of those that `measure` counts; None reads all. Others
    are neither converted nor kept, and decoding starts at the key frame before the first one.

    Frames are upright, with square pixels and sRGB colours: display matrix, pixel aspect ratio and colour
    profile are applied. Time runs evenly: GIF and WebP frames that stand for several equal ones are
    repeated, and a file of variable rate is brought to its mean rate, with a warning. A frame without a
    duration counts 100 ms, as browsers have it; a pause of more than MAX_HOLD seconds is shortened to that,
    with a warning. The fps are None where nothing records them (PNGs from elsewhere). `alpha="white"` lays
    transparent parts over white; "drop" shows what hides below. An mp4 of odd-sized frames comes back
    padded, see `video.save`.

    ValueError for a file that is no video, is damaged, or would take more than MAX_BYTES.
    """
    path = Path(path)
    timing = _timing(path)
    chosen = timing.shown if only is None else timing.shown[_checked(path, only, len(timing.shown))]
    _refuse_size(path, len(chosen), *timing.size)
    notes = list(timing.notes)
    order = np.argsort(chosen, kind="stable")  # places of the output, by the frame that they show

    def places(number: int) -> np.ndarray:
        first, end = np.searchsorted(chosen, [number, number + 1], sorter=order)
        return order[first:end]

    frames, found, wanted = None, [], np.unique(chosen).tolist()
    for number, pixels in _reader(path)(path, timing, wanted, alpha, notes):
        if frames is None:
            _refuse_size(path, len(chosen), pixels.shape[1], pixels.shape[0])
            frames = _empty(path, (len(chosen), *pixels.shape))
        elif pixels.shape != frames.shape[1:]:
            raise ValueError(
                f"the frames of {path} change their size on the way; encode it again at one size"
            )
        frames[places(number)] = pixels
        found.append(number)
    if frames is None:
        raise ValueError(f"{path} holds no frame that can be decoded; it is no usable video")
    if missing := sorted(set(wanted) - set(found)):
        found.sort()
        for number in missing:  # as a player does, which leaves the frame before on the screen
            seen = found[max(bisect.bisect(found, number) - 1, 0)]
            frames[places(number)] = frames[places(seen)[0]]
        notes.append(
            f"is damaged: {len(missing)} of its frames cannot be decoded and show the one before instead"
        )
    for note in dict.fromkeys(notes):
        warnings.warn(f"video {path} {note}", stacklevel=2)
    return frames, timing.rate


def measure(path: str | Path) -> tuple[int, float | None]:
    """(number of frames, frames per second) that `load` would give, without decoding them where possible."""
    timing = _timing(Path(path))
    return len(timing.shown), timing.rate


def is_frames(path: Path) -> bool:
    """Whether `path` is a folder of frame_0000.png, frame_0001.png, ..."""
    return os.path.isdir(path) and any(FRAME_NAME.fullmatch(p.name) for p in path.iterdir())


def _checked(path: Path, only: Sequence[int], count: int) -> np.ndarray:
    numbers = np.asarray(only, dtype=np.int64)
    if not numbers.size or numbers.min() < 0 or numbers.max() >= count:
        asked = f"{numbers.min()} to {numbers.max()}" if numbers.size else "none"
        raise ValueError(f"{path} has the frames 0 to {count - 1}; asked for {asked}")
    return numbers


def _empty(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    try:
        return np.empty(shape, np.uint8)
    except MemoryError as error:
        raise ValueError(f"{path} needs {np.prod(shape) / 2**30:.1f} GiB, more than there is") from error


def _refuse_size(path: Path, count: int, width: int, height: int) -> None:
    size = width * height * (3 * count + WORKING_BYTES)
    if size > MAX_BYTES:
        raise images.UserMistake(
            f"{path} is too large to be read: {count} frames of {width} x {height} pixels take "
            f"{size / 1e9:.1f} GB, over the limit of {MAX_BYTES / 1e9:.1f} (i2vgen.files.reading.MAX_BYTES); "
            "cut it shorter or make it smaller first"
        )


# ---------------------------------------------------------------------------------------------------
# The three kinds of clips


def _timing(path: Path) -> Timing:
    if path.is_dir():
        return _png_timing(path)
    if not os.path.exists(path):  # Path.exists raises for names that are too long
        raise ValueError(f"video {path} does not exist; give a video file or a folder of PNG pictures")
    if not path.is_file():
        raise ValueError(f"video {path} is a device or a pipe; give a video file or a folder of PNG pictures")
    state = path.stat()
    if state.st_size == 0:
        raise ValueError(f"video {path} is an empty file (0 bytes); save or download it again")
    return _file_timing(os.path.abspath(path), path, (state.st_ino, state.st_mtime_ns, state.st_size))


@functools.lru_cache(maxsize=1024)
def _file_timing(place: str, path: Path, state: tuple[int, ...]) -> Timing:
    """`place` and `state` make the cache notice a changed file; training reads the same ones often."""
    return _animation_timing(path) if _is_animation(path) else _video_timing(path)


def _reader(path: Path):
    if path.is_dir():
        return _png_frames
    return _animation_frames if _is_animation(path) else _video_frames


def _is_animation(path: Path) -> bool:
    """Whether the file is a GIF or a WebP, whatever its name says."""
    with _reading(path), path.open("rb") as file:
        start = file.read(12)
    return start.startswith((b"GIF87a", b"GIF89a")) or (start[:4] == b"RIFF" and start[8:] == b"WEBP")


@contextlib.contextmanager
def _reading(path: Path, *errors: type[Exception]) -> Iterator[None]:
    try:
        yield
    except images.UserMistake:
        raise
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} is too large: {error}; make it smaller first") from error
    except (MemoryError, *images.DAMAGED, *errors) as error:
        why = getattr(error, "strerror", None) or error or type(error).__name__
        what = images.disguise(path) or f"it is damaged, cut short or no video ({why})"
        raise ValueError(f"{path} cannot be read as a video: {what}") from error


def _rgb(picture: Image.Image, alpha: str, name: str) -> np.ndarray:
    """Any PIL picture -> uint8 [h w 3]; unlike for pictures, "drop" ignores nothing but transparency."""
    if alpha == "white":
        return np.asarray(images.to_rgb(picture, name=name))
    profile = picture.info.get("icc_profile")
    if picture.mode == "F" or picture.mode.startswith("I"):
        picture = images.to_eight_bits(picture)
    if profile:
        picture = images.to_srgb(picture, profile, name)
    return np.asarray(picture.convert("RGB"))


# ---------------------------------------------------------------------------------------------------
# PNG folders, GIF and WebP: by Pillow


def _pngs(path: Path) -> list[Path]:
    numbered = sorted((int(m[1]), p) for p in path.iterdir() if (m := FRAME_NAME.fullmatch(p.name)))
    if not numbered:
        raise ValueError(f"folder {path} holds no frame_0000.png, frame_0001.png, ...")
    return [file for _, file in numbered]


def _png_timing(path: Path) -> Timing:
    files = _pngs(path)
    with _reading(files[0]), Image.open(files[0]) as picture:
        size, fps = picture.size, None
        with contextlib.suppress(ValueError):  # another program's text may say anything
            fps = float(picture.info.get("fps", "nan"))
    return Timing(np.arange(len(files)), fps if fps and FPS_RANGE[0] <= fps <= FPS_RANGE[1] else None, size)


def _png_frames(path: Path, timing: Timing, wanted: list[int], alpha: str, notes: list[str]):
    files = _pngs(path)
    for number in wanted:
        with _reading(files[number]), Image.open(files[number]) as picture:
            _refuse_size(files[number], 1, *picture.size)
            pixels = _rgb(picture, alpha, f"picture {files[number]}")
        yield number, pixels


def _animation_timing(path: Path) -> Timing:
    with _reading(path), Image.open(path) as image, path.open("rb") as file:
        size = image.size
        durations, whole = (_gif_durations if image.format == "GIF" else _webp_durations)(file)
    if not durations:
        durations = [0]  # a WebP picture that does not move
    notes = [] if whole else ["is cut short: its end is missing; what is there is used"]
    stored = [duration or 100 for duration in durations]
    step = min((ms for ms in stored if ms >= SHORTEST), default=min(stored))
    held, pauses = _shortened(np.array(stored) / 1000, min(step, statistics.median_low(stored)) / 1000)
    step = min(step, 1000 * held.max())
    counts = np.maximum(1, np.rint(1000 * held / step)).astype(int)
    _refuse_length(path, counts.sum())
    rate = 1000 * int(counts.sum()) / round(1000 * held.sum())
    if len(pauses):
        notes.append(_about_pauses(pauses, len(counts), counts.sum(), rate))
    return Timing(np.repeat(np.arange(len(counts)), counts), rate, size, None, tuple(notes))


def _gif_durations(file: BinaryIO) -> tuple[list[int], bool]:
    """Milliseconds of each frame, 0 where none are given; whether the end of the file is there. GIF89a."""

    def skip_blocks() -> None:
        while length := file.read(1)[:1]:
            if length == b"\0":
                return
            file.seek(length[0], os.SEEK_CUR)

    def skip_colours(flags: int) -> None:
        if flags & 0x80:
            file.seek(3 << (flags & 7) + 1, os.SEEK_CUR)

    durations, duration = [], 0
    skip_colours(file.read(13)[10])
    while kind := file.read(1):
        if kind == b";":
            return durations, True
        if kind == b"!":
            if file.read(1) == b"\xf9":
                block = file.read(file.read(1)[0])
                duration = 10 * int.from_bytes(block[1:3], "little")
            skip_blocks()
        elif kind == b",":
            skip_colours(file.read(9)[-1])
            file.seek(1, os.SEEK_CUR)
            skip_blocks()
            durations.append(duration)
            duration = 0
    return durations, False


def _webp_durations(file: BinaryIO) -> tuple[list[int], bool]:
    """The same for WebP: a RIFF file whose ANMF chunks are the frames."""
    end = 8 + int.from_bytes(file.read(12)[4:8], "little")
    durations = []
    while file.tell() + 8 <= end and len(head := file.read(8)) == 8:
        length = int.from_bytes(head[4:], "little")
        start = file.tell()
        if head[:4] == b"ANMF":
            durations.append(int.from_bytes(file.read(16)[12:15], "little"))
        file.seek(start + length + length % 2)
    return durations, file.seek(0, os.SEEK_END) >= end


def _animation_frames(path: Path, timing: Timing, wanted: list[int], alpha: str, notes: list[str]):
    with _reading(path), Image.open(path) as image:
        for number in wanted:
            image.seek(number)
            yield number, _rgb(image, alpha, f"video {path}")


# ---------------------------------------------------------------------------------------------------
# Even time


def _shortened(gaps: np.ndarray, step: float) -> tuple[np.ndarray, np.ndarray]:
    """Seconds between frames -> (the same, pauses shortened to MAX_HOLD; the pauses as they were)."""
    paused = gaps > max(MAX_HOLD, 5 * step)
    return np.where(paused, MAX_HOLD, gaps), gaps[paused]


def _about_pauses(pauses: np.ndarray, before: int, after: int, rate: float) -> str:
    return (
        f"stands still for {pauses.max():.6g} seconds; pauses over {MAX_HOLD:g} are shortened to that, "
        f"and its {before} frames become {after} at {rate:.4g} per second, evenly"
    )


def _refuse_length(path: Path, count: float) -> None:
    if count > MAX_FRAMES:
        raise images.UserMistake(
            f"{path} has or would become {count:.0f} frames, over the limit of {MAX_FRAMES}; cut it into "
            "shorter clips"
        )


def evenly(times: Sequence[float], rate: float) -> np.ndarray:
    """Seconds at which frames appear -> which of them is seen at every tick of `rate`."""
    count = round((times[-1] - times[0]) * rate) + 1
    ticks = times[0] + (np.arange(count) + 0.5) / rate  # halfway, so that no rounding decides
    return np.maximum(np.searchsorted(times, ticks, side="right") - 1, 0)


def _even_time(path: Path, times: np.ndarray, declared: float | None) -> tuple[np.ndarray, float, list[str]]:
    """Seconds of the stored frames and the rate that the file declares -> shown, rate, notes of `Timing`.

    The rate is the mean one outside pauses. What the file declares is used if it agrees, because it is exact;
    some files declare their clock or what the writer asked for.
    """
    order = np.arange(len(times))
    gaps = np.diff(times)
    if not len(gaps):
        return order, declared, []
    typical = np.sort(gaps)[(len(gaps) - 1) // 2]
    rate = float(1 / gaps[gaps <= 5 * typical].mean())
    if declared and abs(declared / rate - 1) < 0.05:
        rate = declared
    if len(times) < 3 or gaps.max() < 1.5 * gaps.min():
        return order, rate, []
    held, pauses = _shortened(gaps, typical)
    _refuse_length(path, held.sum() * rate)
    shown = evenly(np.concatenate([[0.0], held.cumsum()]), rate)
    if len(pauses):
        return shown, rate, [_about_pauses(pauses, len(times), len(shown), rate)]
    if np.array_equal(shown, order):
        return order, rate, []
    note = f"has a variable frame rate; its {len(times)} frames become {len(shown)} at {rate:.4g} per second"
    return shown, rate, [note + ", evenly"]


# ---------------------------------------------------------------------------------------------------
# Everything else: by PyAV


def _av():
    try:
        import av
    except ImportError as error:
        raise ValueError("reading videos needs PyAV: `pip install av`") from error
    return av


def _open(path: Path):
    # "file:" keeps a colon in the name from being taken for a protocol; playlists reach no network.
    return _av().open(f"file:{path}", options={"protocol_whitelist": "file"})


def _stream(container, path: Path):
    streams = [
        s for s in container.streams.video if not s.disposition & _av().stream.Disposition.attached_pic
    ]
    if not streams:
        cover = "; its picture is a cover" if container.streams.video else ""
        empty = "" if container.streams else "; it is empty or cut short"
        raise images.UserMistake(f"{path} holds no video stream{cover}{empty}")
    if streams[0].codec_context is None:
        raise images.UserMistake(f"{path} is in a format that this PyAV cannot decode; convert it to H.264")
    return streams[0]


def _video_timing(path: Path) -> Timing:
    with _reading(path, _av().FFmpegError), _open(path) as container:
        stream = _stream(container, path)
        _refuse_size(path, 1, stream.width, stream.height)
        declared = stream.average_rate or stream.guessed_rate
        declared = float(declared) if declared and FPS_RANGE[0] <= declared <= FPS_RANGE[1] else None
        notes = []
        if name := HDR.get(stream.codec_context.color_trc):
            notes.append(
                f"is HDR ({name}), read as if it were not: its colours look flat; convert it to SDR first"
            )
        tags = {name.lower(): value for name, value in stream.metadata.items()}
        # VP8 and VP9 keep transparency beside the picture, where their decoders skip it.
        if tags.get("alpha_mode") == "1":
            notes.append("is transparent, which is not read: hidden colours show; convert it to a PNG folder")
        ratio = stream.sample_aspect_ratio or 1
        if not 0.1 <= ratio <= 10:
            notes.append(f"claims pixels of shape {ratio}; they are taken as square")
            ratio = 1
        wide = int(stream.width * ratio) if abs(ratio - 1) > 0.005 else stream.width  # as ffmpeg's iw*sar
        size = max(1, wide), stream.height
        stamps, cut = _stamps(container, stream, path)
        times = None if stamps is None else np.array(stamps) * float(stream.time_base)
    count = len(stamps or ())
    if times is None:
        count, times = _times_by_decoding(path)
    if not count:
        raise ValueError(f"{path} holds no frames; it is no usable video")
    shown, rate, uneven = np.arange(count), declared, []
    if times is not None:
        shown, rate, uneven = _even_time(path, times, declared)
    return Timing(shown, rate, size, stamps, (*notes, *(cut or uneven)))  # what is cut short ends unevenly


def _stamps(container, stream, path: Path) -> tuple[list[int] | None, list[str]]:
    """Read all packets -> (presentation times of the frames, or None; a note if the file ends too early)."""
    stamps, packets, damaged, end = [], 0, False, 0.0
    for packet in container.demux():
        if packet.pts is None and packet.dts is None and not packet.size:
            continue  # marks the end
        if packet.pts is not None and packet.time_base:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream_index == stream.index:
            packets += 1
            damaged |= packet.is_corrupt
            _refuse_length(path, packets)
            if not packet.is_discard:
                stamps.append(packet.pts)
    # AVI counts ticks of its clock, others do not count
    listed = stream.frames if "mp4" in container.format.name else 0
    missing = f"{packets} of its {listed} frames are there"
    if packets < listed and damaged:
        raise images.UserMistake(f"video {path} is cut short: {missing}; save or download it again")
    stamps = sorted(stamps) if None not in stamps and len(set(stamps)) == len(stamps) else None
    lasts = (container.duration or 0) / _av().time_base
    end -= max(container.start_time or 0, 0) / _av().time_base
    if stamps and len(stamps) > 1:  # the last frame may stand as long as any other, without saying so
        end += float(max(b - a for a, b in itertools.pairwise(stamps)) * stream.time_base)
    notes = []
    if packets < 0.95 * listed:
        notes.append(f"is cut short: {missing} and used")
    elif end < 0.95 * lasts - 0.1:
        notes.append(f"is cut short: it ends after {end:.4g} of {lasts:.4g} seconds; what is there is used")
    elif container.format.name == "mpegts" and all(path.stat().st_size % size for size in TS_PACKETS):
        notes.append("is cut short: its last packet is incomplete; what is there is used")
    elif damaged:
        notes.append("is damaged or cut short: some of its frames are broken")
    return stamps, notes


def _times_by_decoding(path: Path) -> tuple[int, np.ndarray | None]:
    """For files whose packets carry no times -> (number of frames, their seconds where the decoder knows)."""
    times = []
    with _reading(path, _av().FFmpegError), _open(path) as container:
        for frame in container.decode(_stream(container, path)):
            _refuse_size(path, 1, frame.width, frame.height)
            times.append(frame.time)
            _refuse_length(path, len(times))
    known = None not in times and all(a < b for a, b in itertools.pairwise(times))
    return len(times), np.array(times) if known else None


def _video_frames(path: Path, timing: Timing, wanted: list[int], alpha: str, notes: list[str]):
    missing = set(wanted)
    for seek in (True, False) if timing.stamps and wanted[0] > 0 else (False,):
        with _reading(path, _av().FFmpegError), _open(path) as container:
            stream = _stream(container, path)
            stretched = timing.size[0] if timing.size[0] != stream.width else None
            for number, frame in _numbered(container, stream, timing.stamps, wanted[0] if seek else 0):
                if number in missing:
                    missing.remove(number)
                    if frame.interlaced_frame:
                        notes.append("is interlaced: moving edges show combs; deinterlace it first")
                    if frame.is_corrupt:
                        notes.append("is damaged or cut short: some of its frames are broken")
                    yield number, _pixels(frame, stretched, alpha, notes)
                if not missing or number > wanted[-1]:
                    break
        if not missing:
            break


def _numbered(container, stream, stamps: list[int] | None, first: int) -> Iterator[tuple]:
    """(number, frame) in order, from the key frame at or before number `first`."""
    if stamps is None:
        yield from enumerate(container.decode(stream))
        return
    numbers = {stamp: number for number, stamp in enumerate(stamps)}
    if first:
        container.seek(stamps[first], stream=stream)
    whole = not first  # frames before the key frame lack what they were predicted from
    for place, frame in enumerate(container.decode(stream)):
        whole = whole or frame.key_frame
        number = place if frame.pts is None and not first else numbers.get(frame.pts)
        if whole and number is not None:
            yield number, frame


def _pixels(frame, width: int | None, alpha: str, notes: list[str]) -> np.ndarray:
    """A decoded frame -> uint8 [h w 3], upright and `width` wide."""
    shape = {"width": width, "interpolation": "BICUBIC"} if width else {}
    if alpha == "white" and any(component.is_alpha for component in frame.format.components):
        pixels = _rgb(Image.fromarray(frame.to_ndarray(format="rgba", **shape)), alpha, "")
    else:
        pixels = frame.to_ndarray(format="rgb24", **shape)
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))
    if max(abs(b), abs(c)) < 0.02 * min(abs(a), abs(d)):
        flip = d < 0, a < 0
    elif max(abs(a), abs(d)) < 0.02 * min(abs(b), abs(c)):
        pixels, flip = pixels.swapaxes(0, 1), (b < 0, c < 0)
    else:
        if a or b or c or d:
            notes.append("is to be shown turned by an odd angle; it is left as stored")
        return pixels
    return np.flip(pixels, [axis for axis in (0, 1) if flip[axis]])
