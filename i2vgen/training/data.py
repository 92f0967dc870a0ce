"""Training clips as a function of their position in the run, from the procedural world or a folder.

A run numbers its clips from 0. The seed and that number alone decide which clip is shown and where it is cut,
so a resumed run sees the clips that the killed one would have seen.

Axes: b batch, f frames, c channels, H W pixel rows and columns.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import threading
import unicodedata
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from i2vgen.files import fingerprint, images, lists, reading
from i2vgen.settings.config import Config
from i2vgen.training.settings import WORLD, Bucket, Train, buckets, world_speed
from i2vgen.world import drawing, pictures

LOGGER = logging.getLogger(__name__)
CAPTION_FILES = ("captions.csv", "captions.jsonl")
# Clips of the world with seeds below this are reserved for evaluation.
FIRST_TRAINING_SEED = 2**40


class Clips(NamedTuple):
    """A batch: `pixels` float32 [b c f H W] in [-1, 1], b captions, the frame rate it was sampled at."""

    pixels: Tensor
    captions: tuple[str, ...]
    fps: int


Source = Callable[[Bucket, Sequence[int]], Clips]  # positions of the clips in the run -> the clips


def generator(*keys: int) -> torch.Generator:
    """A CPU generator for (seed, step, rank, ...); different keys give independent streams."""
    return torch.Generator().manual_seed(derived_seed(*keys))


def derived_seed(*keys: int) -> int:
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0]) >> 1


def open_source(config: Config, train: Train) -> Source:
    """Open `train.data`; ValueError if it holds no usable clips."""
    if train.data == WORLD:
        return World(config, train)
    return Folder(config, train)


# ---------------------------------------------------------------------------------------------------
# The procedural world


class World:
    """Clips of the procedural world; a bucket's length and rate decide how much motion it shows."""

    def __init__(self, config: Config, train: Train):
        self.config, self.train, self.world = config, train, None
        if train.things:
            pictures.refuse_size(config.sample.width, config.sample.height)
            self.world = pictures.open_world(train.things, train.backgrounds, "training", section="train.")
            tell_unknown_names(self.world, config)

    def __call__(self, bucket: Bucket, positions: Sequence[int]) -> Clips:
        sample, train = self.config.sample, self.train
        first = FIRST_TRAINING_SEED + (train.seed << 48)
        numbers = [p % train.num_clips if train.num_clips else p for p in positions]
        kinds = train.kinds
        batch = (self.world or drawing).batch(
            [first + n for n in numbers],
            kind=[kinds[n % len(kinds)] for n in numbers] if kinds else None,
            width=sample.width,
            height=sample.height,
            frames=bucket.frames,
            speed=world_speed(self.config, bucket),
        )
        return Clips(batch.clips, batch.captions, bucket.fps)


def tell_unknown_names(world: pictures.PictureWorld, config: Config) -> None:
    """A note on things whose names a vocabulary of one's own (`clip.words`) lacks: they are spelt."""
    words = set(config.clip.words)
    unknown = [name for name in world.names if words and not words.issuperset(name.split())]
    if unknown:
        LOGGER.warning(
            "clip.words lacks words of the names of %d of %d things, such as %r; they are spelt, which takes "
            "more tokens",
            len(unknown),
            len(world.names),
            unknown[0],
        )


# ---------------------------------------------------------------------------------------------------
# A folder of videos


class Folder:
    """Videos with captions from captions.csv or captions.jsonl (columns file, caption).

    A video is any file that `reading.load` reads, whatever its ending, or a folder of frame_0000.png, ... .
    Files that are unreadable or too short for a bucket are skipped with a warning; `skipped` holds their
    names and the reasons. Captions without a file and files without a caption are counted once, at the start.
    """

    def __init__(self, config: Config, train: Train):
        self.config, self.train = config, train
        self.folder = Path(train.data)
        self.skipped: dict[tuple[str, Bucket | None], str] = {}
        captions = read_captions(self.folder)
        self.files = sorted(name for name in captions if is_clip(self.folder / name))
        self.captions = captions
        self.without_file = sorted(captions.keys() - set(self.files))
        present = {str(p.relative_to(self.folder)) for p in self.folder.rglob("*") if looks_like_a_clip(p)}
        self.without_caption = sorted(present - captions.keys())
        for names, what in (
            (self.without_file, "captions without a file"),
            (self.without_caption, "files without a caption"),
        ):
            if names:
                LOGGER.warning("%s: ignoring %d %s, such as %s", self.folder, len(names), what, names[0])
        hint = spelled_otherwise(self.without_file, self.without_caption)
        if hint:
            LOGGER.warning("%s: %s", self.folder, hint)
        if not self.files:
            raise ValueError(
                f"train.data={self.folder} holds no clip to train on: {len(self.without_file)} captions "
                f"without a file, {len(self.without_caption)} files ({', '.join(reading.VIDEOS)}, or folders "
                f"of frame_0000.png, ...) without a caption{'; ' + hint if hint else ''}"
            )
        for bucket in buckets(config, train):
            self(bucket, [0])  # fails early if the folder is unusable

    def __call__(self, bucket: Bucket, positions: Sequence[int]) -> Clips:
        drawn = [self._clip(bucket, position) for position in positions]
        return Clips(torch.stack([pixels for pixels, _ in drawn]), tuple(c for _, c in drawn), bucket.fps)

    def _clip(self, bucket: Bucket, position: int) -> tuple[Tensor, str]:
        """Pixels [c f H W] and caption at this position, or of the next usable file in the shuffled order."""
        epoch, turn = divmod(position, len(self.files))
        order = np.random.Generator(np.random.PCG64([self.train.seed, epoch])).permutation(len(self.files))
        for i in range(len(order)):
            name = self.files[order[(turn + i) % len(order)]]
            pixels = self._read(name, bucket, position)
            if pixels is not None:
                return pixels, self.captions[name]
        reasons = "; ".join(f"{name}: {why}" for (name, _), why in list(self.skipped.items())[:3])
        raise ValueError(
            f"train.data={self.folder}: none of its {len(self.files)} clips can be used for the bucket "
            f"train.frame_lengths = {bucket.frames} with train.sample_fps = {bucket.fps} ({reasons})"
        )

    def _read(self, name: str, bucket: Bucket, position: int) -> Tensor | None:
        """-> float32 [c f H W], or None if the file must be skipped."""
        kind = bucket._replace(batch=1)
        if (name, None) in self.skipped or (name, kind) in self.skipped:
            return None
        path, seed = self.folder / name, (self.train.seed, position)
        alpha = self.config.preprocess.alpha
        try:
            total, rate = reading.measure(path)
            chosen = frame_numbers(total, rate or bucket.fps, bucket, generator(*seed))
            frames = None if chosen is None else reading.load(path, alpha=alpha, only=chosen)[0]
        except ValueError as error:
            self._skip(name, None, str(error))
            return None
        if frames is None:
            stride = frame_stride(rate or bucket.fps, bucket.fps)
            self._skip(
                name,
                kind,
                f"{total} frames at {rate or bucket.fps:g} fps are too short for {bucket.frames} at "
                f"{bucket.fps} (needs {stride * (bucket.frames - 1) + 1})",
            )
            return None
        sample = self.config.sample
        views = [
            images.first_frame(
                Image.fromarray(frame),
                width=sample.width,
                height=sample.height,
                mode=self.config.preprocess.crop,
            )
            for frame in frames
        ]
        return torch.stack(views, dim=1)

    def _skip(self, name: str, bucket: Bucket | None, reason: str) -> None:
        self.skipped[name, bucket] = reason
        LOGGER.warning(
            "%s: skipping %s (%d skipped so far): %s", self.folder, name, len(self.skipped), reason
        )


def is_clip(path: Path) -> bool:
    """Whether there is something to read: a file of any kind or a folder of frame_0000.png, ..."""
    return os.path.isfile(path) or reading.is_frames(path)  # Path.is_file raises for impossible names


def looks_like_a_clip(path: Path) -> bool:
    if path.name.startswith("."):
        return False
    return path.suffix.lower() in reading.VIDEOS or reading.is_frames(path)


def spelled_otherwise(missing: Sequence[str], present: Sequence[str]) -> str:
    """A hint if a missing file is there under a name that differs in case, slashes, Unicode or ending."""

    def plain(name: str) -> str:
        return unicodedata.normalize("NFC", name.replace("\\", "/")).casefold()

    by_name = {plain(str(Path(name).with_suffix(""))): name for name in present}
    by_name |= {plain(name): name for name in present}
    for name in missing:
        if other := by_name.get(plain(name)):
            return f"the captions say {name!a}, but the file is called {other!a}"
    return ""


def frame_stride(rate: float, fps: int) -> int:
    """Step between frames of a file at `rate` fps that gives about `fps`."""
    return max(1, round(rate / fps))


def frame_numbers(total: int, rate: float, bucket: Bucket, draw: torch.Generator) -> range | None:
    """Frame indices of a clip for this bucket from a file of `total` frames at `rate` fps.

    The start is random and the stride constant; None if the file is too short. Unlike the official code, this
    never gives an empty or missing frame, and the last possible start is drawn too.
    """
    stride = frame_stride(rate, bucket.fps)
    span = stride * (bucket.frames - 1) + 1
    if span > total:
        return None
    start = int(torch.randint(total - span + 1, (1,), generator=draw))
    return range(start, start + span, stride)


def read_captions(folder: Path) -> dict[str, str]:
    """Read captions.csv or captions.jsonl -> {file: caption}; ValueError if it is missing or malformed."""
    if not folder.is_dir():
        raise ValueError(f"train.data={folder} is not a folder; give {WORLD!r} or a folder of videos")
    found = [folder / name for name in CAPTION_FILES if (folder / name).is_file()]
    if len(found) != 1:
        raise ValueError(
            f"train.data={folder} holds {len(found)} of {' and '.join(CAPTION_FILES)}; give one of them"
        )
    path, needed = found[0], ("file", "caption")
    if path.suffix == ".csv":
        rows = lists.csv_rows(path, needed)
    else:
        rows = lists.json_rows(path, expected=" and ".join(needed))
    captions: dict[str, str] = {}
    lines: dict[str, int] = {}
    for line, row in rows:
        where = f"{path}, line {line}"
        name, caption = row.get("file"), row.get("caption")
        if not isinstance(name, str) or not isinstance(caption, str) or not name:
            given = ", ".join(f"{key}: {value!r}" for key, value in row.items())
            raise ValueError(
                f"{where}: it needs file and caption, both text; it has {given[:200] or 'nothing'}"
            )
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{where}: {name!r} lies outside the folder")
        name, caption = str(Path(name)), caption.strip()
        if captions.get(name, caption) != caption:
            raise ValueError(f"{where}: {name!r} has another caption in line {lines[name]}; keep one of them")
        captions[name], lines[name] = caption, line
    if empty := [name for name, caption in captions.items() if not caption]:
        LOGGER.warning(
            "%s: %d of %d captions are empty, such as that of %r", path, len(empty), len(captions), empty[0]
        )
    return captions


def contents(source: Source) -> dict[str, str]:
    """Fingerprints of what is not in the settings: clips, captions, pictures. A resumed run compares them."""
    if isinstance(source, World) and source.world is not None:
        return source.world.contents()
    if not isinstance(source, Folder):
        return {}
    captions = json.dumps([(name, source.captions[name]) for name in source.files])
    clips = fingerprint.of_paths(source.folder / name for name in source.files)
    return {"clips": clips, "captions": fingerprint.of_text(captions)}


def refuse_too_few(source: Source, train: Train, ranks: int) -> None:
    """ValueError if there are fewer clips than processes, so that some would learn the same."""
    count = len(source.files) if isinstance(source, Folder) else train.num_clips
    if 0 < count < ranks:
        raise ValueError(
            f"train.data={train.data} gives {count} clips to {ranks} processes; give as many clips, or start "
            "fewer processes"
        )


# ---------------------------------------------------------------------------------------------------
# Prefetching


class Prefetcher:
    """Draws the next few batches in other processes; batches and order are unchanged.

    `plan` maps a batch number to (bucket, positions). Use it as a context manager: leaving ends the
    processes.
    """

    def __init__(self, source: Source, plan: Callable[[int], tuple[Bucket, list[int]]], workers: int):
        self.source, self.plan, self.depth = source, plan, 2 * workers
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent)
        self.waiting: dict[int, Future] = {}

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_) -> None:
        self.pool.shutdown(cancel_futures=True)

    def __call__(self, index: int) -> Clips:
        for i in range(index, index + self.depth + 1):
            if i not in self.waiting:
                self.waiting[i] = self.pool.submit(_draw, self.source, *self.plan(i))
        pixels, captions, fps = self.waiting.pop(index).result()
        return Clips(torch.from_numpy(pixels), captions, fps)


def end_with_parent() -> None:
    """In a worker process: end it as soon as the process that started it is gone, killed or not."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _draw(source: Source, bucket: Bucket, positions: list[int]) -> tuple[np.ndarray, tuple[str, ...], int]:
    torch.set_num_threads(1)
    clips = source(bucket, positions)
    return clips.pixels.numpy(), clips.captions, clips.fps
