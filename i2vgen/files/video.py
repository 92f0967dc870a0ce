"""Frames to files and back: uint8 [f h w 3] <-> mp4, gif, webp, or a folder of PNG pictures.

The ending of the path chooses the format; no ending means a folder of `frame_0000.png`, ... A file is
written whole or not at all: into a temporary neighbour first, which then takes its place.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, features
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from i2vgen.files import whole
from i2vgen.files.reading import FPS_RANGE, FRAME_NAME
from i2vgen.files.reading import load as load  # "as": beside `save`, for everybody else
from i2vgen.files.reading import measure as measure

ENDINGS = (".mp4", ".gif", ".webp", ".png", "")
CODEC = "libx264"
GIF_MAX_FPS = 50.0  # players show frames shorter than 20 ms at 100 ms instead
LARGEST_SIDE = {".gif": 65535, ".webp": 16383, ".mp4": 16384}

# The official last-frame rule. The training clips often end in a frame left at zero, which is mid grey,
# and the released weights learned to draw it. Bytes in 117..137, both included, count as grey.
GREY_LOW, GREY_HIGH = 117, 137
GREY_LIMIT = 0.4  # a last frame with a larger share of such bytes is dropped


# ---------------------------------------------------------------------------------------------------
# Floats to frames


def to_uint8(pixels: Tensor, *, rounding: Literal["truncate", "nearest"] = "truncate") -> Tensor:
    """Float pixels [.. c f h w] in [-1, 1] -> uint8 [.. f h w c] on the same device.

    Values outside are clamped. The official code truncates, half a level darker on average than "nearest".
    The input stays as it is (officially it is overwritten). NaN is an error, never a silent black.
    """
    if pixels.ndim < 4 or not pixels.is_floating_point():
        raise ValueError(
            f"got {pixels.dtype} pixels of shape {tuple(pixels.shape)}; expected floats [.. c f h w]"
        )
    if torch.isnan(pixels).any():
        count = int(torch.isnan(pixels).sum())
        raise ValueError(
            f"{count} of {pixels.numel()} pixel values are NaN; the model's output is broken, try float32 or "
            "other sampler settings"
        )
    # At least float32: half precision cannot tell all 256 levels apart near 1.
    pixels = pixels.to(torch.promote_types(pixels.dtype, torch.float32))
    levels = (pixels * 0.5 + 0.5).clamp(0, 1) * 255
    if rounding == "nearest":
        levels = levels.round()
    return levels.to(torch.uint8).movedim(-4, -1).contiguous()


def grey_fraction(frame: Tensor | np.ndarray) -> float:
    """uint8 frame [h w c] -> share of its bytes that are mid grey (GREY_LOW..GREY_HIGH), 0..1."""
    frame = _numpy(frame)
    return float(((frame >= GREY_LOW) & (frame <= GREY_HIGH)).mean())


def drop_grey_last_frame(frames: Tensor | np.ndarray) -> Tensor | np.ndarray:
    """uint8 frames [f h w c] -> the same, or [f-1 h w c] where more than 40 % of the last frame is mid grey.

    The rule of the official video writer. A single frame is a picture and always stays.
    """
    if len(frames) > 1 and grey_fraction(frames[-1]) > GREY_LIMIT:
        return frames[:-1]
    return frames


# ---------------------------------------------------------------------------------------------------
# Checks before any long work


def check_output(path: str | Path, *, fps: float | None = None, size: tuple[int, int] | None = None) -> Path:
    """Everything about a video's destination that can be wrong before there is a video -> the path.

    Parent folders are created. ValueError for an unknown ending, a parent that is no folder or not
    writable, a file where a folder is wanted or the reverse, a PNG folder holding other files, a missing
    encoder, and (if given) an `fps` or a `size` (width, height) that the format cannot hold.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in ENDINGS or {path.name.lower(), f".{path.name.lower()}"} & {*ENDINGS}:
        raise ValueError(
            f"output {str(path)!r}: known endings are .mp4, .gif and .webp, .png for a strip of all "
            "frames, or none for a folder of PNG pictures; give a name with one of these"
        )
    if fps is not None:
        _check_fps(fps, ending)
    largest = LARGEST_SIDE.get(ending)
    if size is not None and largest is not None and max(size) > largest:
        raise ValueError(
            f"output {path}: frames of {size[0]} x {size[1]} pixels do not fit {ending}, whose sides end at "
            f"{largest}; write a folder of PNGs"
        )
    if ending == "":
        _check_png_folder(path)
    elif path.is_dir():
        raise ValueError(f"output {path} is an existing folder; give the name of a file in it")
    whole.check_folder(f"output {path}", path.absolute().parent)
    if ending == ".mp4":
        _check_encoder()
    elif ending == ".webp" and not features.check("webp"):
        raise ValueError("this Pillow was built without WebP; write .mp4 or .gif, or install a Pillow wheel")
    return path


def _check_fps(fps: float, ending: str) -> None:
    low, high = FPS_RANGE
    if not low <= fps <= high:  # also catches NaN
        raise ValueError(f"fps {fps} is not a frame rate; expected {low:g}..{high:g} frames per second")
    if ending == ".gif" and fps > GIF_MAX_FPS:
        raise ValueError(
            f"fps {fps:g} is too fast for a GIF (at most {GIF_MAX_FPS:g}); lower it or write .mp4 or .webp"
        )


def _check_png_folder(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise ValueError(f"output {path} is an existing file; a name without ending means a folder of PNGs")
    others = [] if not path.exists() else [p.name for p in path.iterdir() if not FRAME_NAME.fullmatch(p.name)]
    if others:
        raise ValueError(
            f"output folder {path} holds other files ({sorted(others)[0]!r} and {len(others) - 1} more); "
            "name a new or empty folder"
        )


def _check_encoder() -> None:
    try:
        import av
    except ImportError as error:
        raise ValueError("writing .mp4 needs PyAV: `pip install av`, or write .gif or .webp") from error
    try:
        av.Codec(CODEC, "w")
    except ValueError as error:
        raise ValueError(
            f"this PyAV has no H.264 encoder ({CODEC}); `pip install av` brings one, or write .gif or .webp"
        ) from error


# ---------------------------------------------------------------------------------------------------
# Writing


def save(
    frames: Tensor | np.ndarray,
    path: str | Path,
    *,
    fps: float,
    quality: int = 8,
    enlarge: int = 1,
    before: Callable[[Path], object] = lambda temporary: None,
) -> Path:
    """uint8 frames [f h w 3] -> a file or a folder of PNGs, by the ending of `path`; returns the path.

    .mp4   H.264, yuv420p, BT.709. An odd width or height gets its last column or row twice, because
           yuv420p needs even sizes and is the one layout that plays everywhere.
    .gif   one palette of 256 colours for all frames (no flicker), dithered, endless. GIF counts time in
           10 ms: every frame ends at the grid point nearest its true end, so the length stays right.
    .webp  lossy animation, endless, 1 ms grid.
    .png   one strip, the frames side by side: for a page, not to be read back.
    folder exact frames; the fps travel in the PNG text entry "fps".

    `quality` is 1 (small) to 10 (best) for mp4 (crf 51 * (1 - quality / 10), the scale of the official
    writer's 8) and webp (10 * quality); gif and PNG have no such dial. GIF and WebP store equal
    neighbouring frames as one longer frame, and a WebP of one frame is a still that records no fps.
    `enlarge` makes every pixel a square of that many. A failed or interrupted write leaves what was there
    before. `before` is called with the written file before it takes its place.
    """
    frames = _numpy(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(
            f"got {frames.dtype} frames of shape {frames.shape}; expected uint8 [f h w 3], none 0"
        )
    if not 1 <= quality <= 10:
        raise ValueError(f"quality {quality} is not in 1..10 (8 is the official writer's)")
    frames = frames.repeat(enlarge, axis=1).repeat(enlarge, axis=2) if enlarge > 1 else frames
    path = check_output(path, fps=fps, size=(frames.shape[2], frames.shape[1]))
    ending = path.suffix.lower()
    writers = {".mp4": _write_mp4, ".gif": _write_gif, ".webp": _write_webp, ".png": _write_strip}
    write = writers.get(ending, _write_pngs)
    with whole.replacing(path) as temporary:
        write(frames, temporary, fps, quality)
        before(temporary)
    return path


def _write_mp4(frames: np.ndarray, path: Path, fps: float, quality: int) -> None:
    import av
    from av.video.reformatter import ColorRange, Colorspace

    _, height, width, _ = frames.shape
    pad = ((0, height % 2), (0, width % 2), (0, 0))
    # quality 10 would be crf 0: lossless, in a profile that few players know
    crf = max(1, int(51 * (1 - quality / 10)))
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream(CODEC, rate=_rate(fps))
        stream.width, stream.height = width + width % 2, height + height % 2
        stream.pix_fmt = "yuv420p"
        stream.options = {
            "crf": str(crf),
            # The colours are written into the stream, or players guess them by the picture's size. mbtree
            # would give other bytes and pixels at every save, more so on a busy machine; without it qcomp=1
            # keeps file size and error where mbtree had them.
            "x264-params": "colorprim=bt709:transfer=bt709:colormatrix=bt709:range=tv:mbtree=0:qcomp=1",
        }
        for frame in frames:
            padded = np.ascontiguousarray(np.pad(frame, pad, mode="edge"))
            picture = av.VideoFrame.from_ndarray(padded, format="rgb24").reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def _write_gif(frames: np.ndarray, path: Path, fps: float, quality: int) -> None:
    # About 2^20 pixels, evenly spread over all frames, choose the palette.
    step = max(1, round(math.sqrt(frames[..., 0].size / 2**20)))
    sample = frames[:, ::step, ::step].reshape(-1, 1, 3)
    columns = math.ceil(math.sqrt(len(sample)))
    mosaic = np.resize(sample, (math.ceil(len(sample) / columns), columns, 3))
    palette = Image.fromarray(mosaic).quantize(256, method=Image.Quantize.MEDIANCUT)
    pictures = [
        Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
        for frame in frames
    ]
    durations = [10 * ticks for ticks in _durations(len(frames), fps, ticks_per_second=100)]
    pictures[0].save(
        path, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0, optimize=False
    )


def _write_webp(frames: np.ndarray, path: Path, fps: float, quality: int) -> None:
    pictures = [Image.fromarray(frame) for frame in frames]
    durations = _durations(len(frames), fps, ticks_per_second=1000)
    pictures[0].save(
        path,
        "WEBP",
        save_all=True,
        append_images=pictures[1:],
        duration=durations,
        loop=0,
        quality=10 * quality,
    )


def _write_strip(frames: np.ndarray, path: Path, fps: float, quality: int) -> None:
    Image.fromarray(np.concatenate(list(frames), axis=1)).save(path, "PNG", optimize=True)


def _write_pngs(frames: np.ndarray, path: Path, fps: float, quality: int) -> None:
    path.mkdir()
    text = PngInfo()
    text.add_text("fps", repr(float(fps)))
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(path / f"frame_{i:04d}.png", "PNG", pnginfo=text)


def _durations(num_frames: int, fps: float, *, ticks_per_second: int) -> list[int]:
    """Whole ticks for each frame; the ends are rounded, not the lengths, so errors do not add up."""
    ends = [math.floor(i * ticks_per_second / fps + 0.5) for i in range(num_frames + 1)]
    return [max(1, end - start) for start, end in itertools.pairwise(ends)]


def _rate(fps: float) -> Fraction:
    return Fraction(fps).limit_denominator(1001)  # holds 24000/1001 and its like exactly


def _numpy(frames: Tensor | np.ndarray) -> np.ndarray:
    return frames.detach().cpu().numpy() if isinstance(frames, Tensor) else np.asarray(frames)
