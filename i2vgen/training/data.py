"""Training clips as a function of their position in the run, from the procedural world or a folder.

A run numbers its clips from 0. The seed and that number alone decide which clip is shown and where it is cut,
so a resumed run sees the clips that the killed one would have seen.

Axes: b batch, f frames, c channels, H W pixel rows and columns.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import logging
import multiprocessing
import os
import threading
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from i2vgen.files import fingerprint, images, lists, reading
from i2vgen.model.clip import unknown_words
from i2vgen.settings.config import Config
from i2vgen.settings.wording import counted
from i2vgen.training import copies, draws, prepared
from i2vgen.training.draws import Clips, Source, derived_seed, generator  # noqa: F401
from i2vgen.training.prepared import Prepared
from i2vgen.training.settings import WORLD, Bucket, Train, buckets, fraction, world_speed
from i2vgen.world import drawing, flows, pictures

LOGGER = logging.getLogger(__name__)
OFF_RATE = 0.03  # a clip may be read that much faster or slower than wanted without a note
CAPTION_FILES = ("captions.csv", "captions.jsonl")
# Clips of the world with seeds below this are reserved for evaluation.
FIRST_TRAINING_SEED = 2**40
# Those of validation: evaluation uses small seeds.
FIRST_VALIDATION_SEED = 2**39


# Settings that a folder does not take, switched off: a run on the world may be validated on a folder.
OF_THE_WORLD = {
    "kinds": (), "things": "", "backgrounds": "", "num_clips": 0, "cache": False, "flow_weight": 0.0
}  # fmt: skip


def open_source(config: Config, train: Train) -> World | Folder | Prepared:
    """Open `train.data`, without the clips held out for validation, which its `held_out` gives.

    ValueError if it holds no usable clips, or if `train.validate` names clips that are trained on.
    """
    share = fraction(train.validate)
    if train.data == WORLD:
        source: World | Folder | Prepared = World(config, train)
        if train.validate == WORLD:
            own = dataclasses.replace(train, num_clips=0, cache=False, flow_weight=0.0)
            source.held_out = World(config, own, first_seed=FIRST_VALIDATION_SEED)
    else:
        source = open_folder(config, train, "train.data")
        if share:
            source = divided(source, share)
            if found := copies.shared(listed(source.held_out), listed(source)):
                LOGGER.warning(
                    "train.validate=%s holds out %s trained on under another name, such as %s, which is "
                    "%s; remove the copies, or the loss on them says too little",
                    train.validate,
                    counted(len(found), "clip"),
                    *found[0],
                )
    if train.validate and train.validate != WORLD and not share:
        refuse_overlap(train, source)
        own = {"data": train.validate, "validate": "", "flip": False, "workers": 0}
        there = dataclasses.replace(train, **own, **OF_THE_WORLD)
        source.held_out = open_folder(config, there, "train.validate")
        refuse_copies(train, source, source.held_out)
    return source


def open_folder(config: Config, train: Train, setting: str) -> Folder | Prepared:
    """`train.data`, a folder of videos or a prepared one; `setting` is what the user calls it."""
    if not prepared.is_prepared(Path(train.data)):
        source = Folder(config, train, setting)
        tell_unknown_words(source.captions, config)
        return source
    if train.workers:
        raise ValueError(
            f"train.workers = {train.workers} decode videos, but {setting}={train.data} is prepared; leave "
            "it at 0"
        )
    return Prepared(config, train, setting)


def divided(source: Folder | Prepared, share: float) -> Folder | Prepared:
    """The clips to train on, with a share of all held out for validation. Names alone decide which."""
    hashes = source.name_hashes()
    if len(hashes) < 2:
        raise ValueError(
            f"train.validate={share:g} holds out a share of {source.folder}, which holds a single clip; "
            "name another folder, or leave it out"
        )
    chosen = draws.held_out(hashes, share, source.usable)
    if not chosen.any():
        raise ValueError(
            f"train.validate={share:g} holds out a share of {source.folder}, in which none of {len(hashes)} "
            "clips can be used (the log above says why); give more or longer clips"
        )
    kept, held = source.only(np.flatnonzero(~chosen)), source.only(np.flatnonzero(chosen))
    kept.held_out = held
    return kept


def refuse_overlap(train: Train, source: World | Folder | Prepared) -> None:
    """ValueError if one of the two folders, or what it was prepared from, lies in the other."""
    if train.data != WORLD and (found := overlap(train.validate, train.data)):
        raise ValueError(
            f"train.validate={train.validate} and train.data={train.data} overlap "
            f"({found[0]} and {found[1]}); validation needs clips that are not trained on: give another "
            "folder, or a fraction such as train.validate=0.05"
        )


def overlap(held: str | Path, trained: str | Path) -> tuple[Path, Path] | None:
    """Two folders, each named or what a named one was prepared from, of which one lies in the other"""
    for a in origins(held):
        for b in origins(trained):
            if a == b or a in b.parents or b in a.parents:
                return a, b
    return None


def refuse_copies(train: Train, source: World | Folder | Prepared, held: Folder | Prepared) -> None:
    """ValueError if clips for validation are trained on under other names."""
    found = [] if isinstance(source, World) else copies.shared(listed(held), listed(source))
    if found:
        raise ValueError(
            f"train.validate={train.validate} holds {len(found)} of the clips of train.data={train.data}: "
            f"{found[0][0]} is {found[0][1]}, byte for byte; validation needs clips that are not trained on: "
            "remove them from one of the folders"
        )


def listed(source: Folder | Prepared) -> copies.Clips:
    """What tells its files apart."""
    if isinstance(source, Prepared):
        return copies.Stored(source.folder, source.numbers)
    return copies.Files(source.folder, source.files)


def origins(folder: str | Path) -> list[Path]:
    """A folder, and the one that it was prepared from."""
    found = [Path(folder).resolve()]
    if prepared.is_prepared(Path(folder)):
        found.append(Path(prepared.read_facts(Path(folder))["source"]).resolve())
    return found


def refuse_too_few(source: Source, train: Train, ranks: int) -> None:
    """ValueError if there are fewer clips than processes, so that some would learn the same."""
    listed = isinstance(source, Folder | Prepared)
    setting, count = (source.setting, len(source)) if listed else ("train.data", train.num_clips)
    if 0 < count < ranks:
        raise ValueError(
            f"{setting}={train.data} gives {counted(count, 'clip')} to {ranks} processes; give as many "
            "clips, or start fewer processes"
        )


# ---------------------------------------------------------------------------------------------------
# The procedural world


class World:
    """Clips of the procedural world; a bucket's length and rate decide how much motion it shows."""

    held_out: World | Folder | Prepared | None = None

    def __init__(self, config: Config, train: Train, *, first_seed: int | None = None):
        self.config, self.train, self.world = config, train, None
        self.first = FIRST_TRAINING_SEED + (train.seed << 48) if first_seed is None else first_seed
        if train.things:
            pictures.refuse_size(config.sample.width, config.sample.height)
            self.world = pictures.open_world(train.things, train.backgrounds, "training", section="train.")
            tell_unknown_names(self.world, config)

    def __call__(self, bucket: Bucket, positions: Sequence[int]) -> Clips:
        sample, train = self.config.sample, self.train
        numbers = [p % train.num_clips if train.num_clips else p for p in positions]
        kinds = train.kinds
        world, speed = self.world or drawing, world_speed(self.config, bucket)
        batch = world.batch(
            [self.first + n for n in numbers],
            kind=[kinds[n % len(kinds)] for n in numbers] if kinds else None,
            width=sample.width,
            height=sample.height,
            frames=bucket.frames,
            speed=speed,
        )
        if not train.flow_weight:
            return Clips(batch.clips, batch.captions, bucket.fps)
        h, w = (side * self.config.unet.moved_grid for side in self.config.latent_size)
        flow = np.empty((len(numbers), 3, bucket.frames, h, w), np.float32)
        for i, facts in enumerate(batch.facts):
            covers = world.covers(facts, w, h)
            flow[i, :2] = flows.flow(facts, covers, width=w, height=h, frames=bucket.frames, speed=speed)
            flow[i, 2] = flows.shares(covers, width=w, height=h)
        return Clips(batch.clips, batch.captions, bucket.fps, torch.from_numpy(flow))

    def fixed(self, bucket: Bucket) -> Iterator[Clips]:
        """One clip after the other, each in a form that never changes, for validation."""
        return (self(bucket, [number]) for number in itertools.count())


def tell_unknown_words(captions: Mapping[str, Sequence[str]], config: Config) -> None:
    """A note on words of the captions that a vocabulary of one's own (`clip.words`) lacks."""
    known = set(config.clip.words)
    if not known:
        return
    unknown = Counter(word for texts in captions.values() for word in unknown_words(" ".join(texts), known))
    if unknown:
        word, clips = unknown.most_common(1)[0]
        LOGGER.warning(
            "clip.words lacks %s of the captions, such as %r (of %s); these are spelt, and the "
            "weights know nothing of them",
            counted(len(unknown), "word"),
            word,
            counted(clips, "clip"),
        )


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
    Of several captions of a clip, each visit draws one. With `train.flip`, half of the visits mirror the
    clip, unless a caption names a side.

    Files that are unreadable or too short for a bucket are skipped with a warning; `skipped` holds their
    names and the reasons. Captions without a file and files without a caption are counted once, at the start.
    """

    held_out: Folder | Prepared | None = None

    def __init__(self, config: Config, train: Train, setting: str = "train.data"):
        self.config, self.train, self.setting = config, train, setting
        self.folder = Path(train.data)
        self.skipped: dict[tuple[str, Bucket | None], str] = {}
        self.unreadable: set[str] = set()  # files of which nothing can be read
        self.told_rate = False
        captions = read_captions(self.folder, setting)
        self.files = sorted(name for name in captions if is_clip(self.folder / name))
        self.captions = captions
        self.without_file = sorted(captions.keys() - set(self.files))
        present = {str(p.relative_to(self.folder)) for p in self.folder.rglob("*") if looks_like_a_clip(p)}
        self.without_caption = sorted(present - captions.keys())
        for names, what, lack in (
            (self.without_file, "caption", "file"),
            (self.without_caption, "file", "caption"),
        ):
            if names:
                count = counted(len(names), what)
                LOGGER.warning("%s: ignoring %s without a %s, such as %s", self.folder, count, lack, names[0])
        hint = spelled_otherwise(self.without_file, self.without_caption)
        hint = hint or without_frames(self.folder, self.without_file)
        if hint:
            LOGGER.warning("%s: %s", self.folder, hint)
        if not self.files:
            raise ValueError(
                f"{setting}={self.folder} holds no clip to train on: "
                f"{counted(len(self.without_file), 'caption')} without a file, "
                f"{counted(len(self.without_caption), 'file')} ({', '.join(reading.VIDEOS)}, or folders of "
                f"frame_0000.png, ...) without a caption{'; ' + hint if hint else ''}"
            )
        if train.part != "vae" and config.use.text and not any(map(any, map(captions.get, self.files))):
            raise ValueError(
                f"{setting}={self.folder}: all captions of its {counted(len(self.files), 'clip')} are empty; "
                "write them, or set use.text=false"
            )
        for bucket in buckets(config, train):
            self(bucket, [0])  # fails early if the folder is unusable

    def __len__(self) -> int:
        return len(self.files)

    def only(self, numbers: Sequence[int]) -> Folder:
        """The same folder, but only these of its `files`."""
        part = copy.copy(self)
        part.files = [self.files[number] for number in numbers]
        return part

    def name_hashes(self) -> np.ndarray:
        return np.array([draws.name_hash(name) for name in self.files], np.int64)

    def usable(self, number: int) -> bool:
        """Whether this one of `files` is long enough for every bucket."""
        return all(self.starts(self.files[number], kind) for kind in buckets(self.config, self.train))

    def __call__(self, bucket: Bucket, positions: Sequence[int]) -> Clips:
        levels, captions = self.levels(bucket, positions)
        return Clips(to_pixels(levels), captions, bucket.fps)

    def levels(self, bucket: Bucket, positions: Sequence[int]) -> tuple[np.ndarray, tuple[str, ...]]:
        """The same before the change to floats, uint8 [b f H W 3], and the captions."""
        drawn = [self._clip(bucket, position) for position in positions]
        return np.stack([frames for frames, _ in drawn]), tuple(caption for _, caption in drawn)

    def fixed(self, bucket: Bucket) -> Iterator[Clips]:
        """One usable clip after the other, each in a form that never changes, for validation.

        Its frames are from the middle of the file, its caption is the first one. The order depends on the
        names, but is not theirs, so that the first clips are a fair sample.
        """
        for number in np.argsort(self.name_hashes(), kind="stable"):
            name = self.files[number]
            count = self.starts(name, bucket)
            frames = self.read(name, bucket, (count - 1) // 2) if count else None
            if frames is not None:
                yield Clips(to_pixels(frames[None]), self.captions[name][:1], bucket.fps)

    def _clip(self, bucket: Bucket, position: int) -> tuple[np.ndarray, str]:
        """Frames [f H W 3] and caption at this position, or of the next usable file in the shuffled order."""
        seed = self.train.seed
        for number in draws.visits(seed, position, len(self.files)):
            name = self.files[number]
            frames = self._draw(name, bucket, position)
            if frames is not None:
                captions = self.captions[name]
                if self.train.flip and draws.may_flip(captions) and draws.flipped(seed, position):
                    frames = frames[:, :, ::-1]
                return frames, captions[draws.one_of(len(captions), seed, position, draws.CAPTION_STREAM)]
        reasons = "; ".join(f"{name}: {why}" for (name, _), why in list(self.skipped.items())[:3])
        raise ValueError(
            f"{self.setting}={self.folder}: none of its clips ({len(self.files)}) can be used for the bucket "
            f"train.frame_lengths = {bucket.frames} with train.sample_fps = {bucket.fps} ({reasons})"
        )

    def _draw(self, name: str, bucket: Bucket, position: int) -> np.ndarray | None:
        count = self.starts(name, bucket)
        if not count:
            return None
        draw = generator(self.train.seed, position)
        return self.read(name, bucket, int(torch.randint(count, (1,), generator=draw)))

    def starts(self, name: str, bucket: Bucket) -> int:
        """The number of frames at which a clip for this bucket can start; 0 if the file must be skipped."""
        kind = bucket._replace(batch=1)
        if name in self.unreadable or (name, kind) in self.skipped:
            return 0
        try:
            total, rate = reading.measure(self.folder / name)
        except ValueError as error:
            self.unreadable.add(name)
            self._skip(name, None, str(error))
            return 0
        rate = rate or bucket.fps
        count = num_starts(total, rate, bucket)
        if not count:
            stride = frame_stride(rate, bucket.fps)
            self._skip(
                name,
                kind,
                f"{total} frames at {rate:g} fps are too short for {bucket.frames} at {bucket.fps} (needs "
                f"{stride * (bucket.frames - 1) + 1}: {every(stride)} is taken)",
            )
        elif not self.told_rate:
            self._tell_rate(name, rate, bucket)
        return count

    def _tell_rate(self, name: str, rate: float, bucket: Bucket) -> None:
        """Once for the folder: whole frames cannot give every rate."""
        stride = frame_stride(rate, bucket.fps)
        if abs(rate / stride - bucket.fps) > OFF_RATE * bucket.fps:
            self.told_rate = True
            LOGGER.warning(
                "%s: %s of %s is taken, which gives %.3g frames a second in place of %d, as in "
                "the official code; clips whose rate is a multiple of %d keep their speed",
                self.folder, every(stride), name, rate / stride, bucket.fps, bucket.fps,
            )  # fmt: skip

    def read(self, name: str, bucket: Bucket, start: int) -> np.ndarray | None:
        """-> uint8 [f H W 3] of the settings' size; None if these frames cannot be decoded."""
        sample, path = self.config.sample, self.folder / name
        try:
            _, rate = reading.measure(path)
            stride = frame_stride(rate or bucket.fps, bucket.fps)
            chosen = range(start, start + stride * (bucket.frames - 1) + 1, stride)
            frames = reading.load(path, alpha=self.config.preprocess.alpha, only=chosen)[0]
        except ValueError as error:
            self._skip(name, None, str(error))
            return None
        views = [
            images.center_crop_wide(
                Image.fromarray(frame), sample.width, sample.height, mode=self.config.preprocess.crop
            )
            for frame in frames
        ]
        return np.stack([np.asarray(view) for view in views])

    def _skip(self, name: str, bucket: Bucket | None, reason: str) -> None:
        if (name, bucket) not in self.skipped:
            self.skipped[name, bucket] = reason
            LOGGER.warning(
                "%s: skipping %s (%d skipped so far): %s", self.folder, name, len(self.skipped), reason
            )

    def tell_skipped(self, elsewhere: Mapping[tuple[str, Bucket | None], str]) -> None:
        """What another process has skipped."""
        for (name, bucket), reason in elsewhere.items():
            self._skip(name, bucket, reason)


def to_pixels(levels: np.ndarray) -> Tensor:
    """uint8 [b f H W 3] -> float32 [b 3 f H W] in [-1, 1], exactly as `images.first_frame`"""
    pixels = rearrange(torch.from_numpy(levels.copy()), "b f h w c -> b c f h w").contiguous()
    return pixels.float() / 255 * 2 - 1


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


def without_frames(folder: Path, missing: Sequence[str]) -> str:
    """A hint if a missing clip is a folder with something else in it."""
    for name in missing:
        if os.path.isdir(folder / name):
            return f"{name} is a folder without frame_0000.png, frame_0001.png, ..., so it is no clip"
    return ""


def frame_stride(rate: float, fps: int) -> int:
    """Step between frames of a file at `rate` fps that gives about `fps`."""
    return max(1, round(rate / fps))


def every(stride: int) -> str:
    ending = {1: "st", 2: "nd", 3: "rd"}.get(stride % 10, "th") if stride // 10 % 10 != 1 else "th"
    return "every frame" if stride == 1 else f"every {stride}{ending} frame"


def num_starts(total: int, rate: float, bucket: Bucket) -> int:
    """At how many frames a clip for this bucket can start in a file of `total` frames at `rate` fps.

    Unlike in the official code, no clip has an empty or missing frame, and the last start is one of them.
    """
    return max(0, total - frame_stride(rate, bucket.fps) * (bucket.frames - 1))


def read_captions(folder: Path, setting: str = "train.data") -> dict[str, tuple[str, ...]]:
    """Read captions.csv or captions.jsonl -> {file: its captions}; ValueError if it is missing or malformed.

    A file has several captions if several rows name it; in JSON lines `caption` may also be a list.
    """
    if not folder.is_dir():
        other = f"{WORLD!r} or " if setting != "data" else ""
        raise ValueError(f"{setting}={folder} is not a folder; give {other}a folder of videos")
    found = [folder / name for name in CAPTION_FILES if (folder / name).is_file()]
    if len(found) != 1:
        raise ValueError(
            f"{setting}={folder} holds {len(found)} of {' and '.join(CAPTION_FILES)}; give one of them"
        )
    path, needed = found[0], ("file", "caption")
    if path.suffix == ".csv":
        rows = lists.csv_rows(path, needed)
    else:
        rows = lists.json_rows(path, expected=" and ".join(needed))
    captions: dict[str, tuple[str, ...]] = {}
    for line, row in rows:
        where = f"{path}, line {line}"
        name, said = row.get("file"), row.get("caption")
        said = said if isinstance(said, list) else [said]
        if not isinstance(name, str) or not name or not all(isinstance(one, str) for one in said) or not said:
            given = ", ".join(f"{key}: {value!r}" for key, value in row.items())
            raise ValueError(
                f"{where}: it needs file and caption, both text; it has {given[:200] or 'nothing'}"
            )
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{where}: {name!r} lies outside the folder")
        name = str(Path(name))
        captions[name] = tuple(dict.fromkeys((*captions.get(name, ()), *(one.strip() for one in said))))
    empty = [name for name, said in captions.items() if not all(said)]
    several = [name for name, said in captions.items() if len(said) > 1]
    if empty:
        LOGGER.warning(
            "%s: %d of %d captions are empty, such as that of %r", path, len(empty), len(captions), empty[0]
        )
    if several:
        LOGGER.warning(
            "%s: %d of %d clips have several captions, such as %r; each visit draws one",
            path,
            len(several),
            len(captions),
            several[0],
        )
    return captions


def contents(source: Source) -> dict[str, str]:
    """Fingerprints of what is not in the settings: clips, captions, pictures. A resumed run compares them."""
    found = _contents(source)
    if isinstance(source, World | Folder | Prepared) and source.held_out is not None:
        found |= {f"validation {what}": hash_ for what, hash_ in _contents(source.held_out).items()}
    return found


def _contents(source: Source) -> dict[str, str]:
    if isinstance(source, World) and source.world is not None:
        return source.world.contents()
    if isinstance(source, Prepared):
        return {"clips": source.fingerprint()}
    if not isinstance(source, Folder):
        return {}
    said = [(name, source.captions[name]) for name in source.files]
    captions = json.dumps([(name, several[0] if len(several) == 1 else several) for name, several in said])
    clips = fingerprint.of_paths(source.folder / name for name in source.files)
    return {"clips": clips, "captions": fingerprint.of_text(captions)}


# ---------------------------------------------------------------------------------------------------
# Prefetching


class Prefetcher:
    """Draws the next few batches in other processes; batches and order are unchanged.

    `plan` maps a batch number to (bucket, positions). Use it as a context manager: leaving ends the
    processes.
    """

    def __init__(self, source: Source, plan: Callable[[int], tuple[Bucket, list[int]]], workers: int):
        self.source, self.plan, self.depth = source, plan, 2 * workers
        self.pool = worker_pool(source, workers)
        self.waiting: dict[int, Future] = {}

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_) -> None:
        self.pool.shutdown(cancel_futures=True)

    def __call__(self, index: int) -> Clips:
        for i in range(index, index + self.depth + 1):
            if i not in self.waiting:
                self.waiting[i] = self.pool.submit(_draw, *self.plan(i))
        (pixels, captions, flow), told = awaited(self.waiting.pop(index))
        told.repeat(self.source)
        fps = self.plan(index)[0].fps
        made = to_pixels(pixels) if pixels.dtype == np.uint8 else torch.from_numpy(pixels)
        return Clips(made, captions, fps, None if flow is None else torch.from_numpy(flow))


class Told(NamedTuple):
    """What a worker has to say: notes on files, and the files that it skipped."""

    notes: list[str]
    skipped: dict[tuple[str, Bucket | None], str]

    def repeat(self, source: Source) -> None:
        for note in self.notes:
            warnings.warn(note, stacklevel=3)
        if self.skipped:
            source.tell_skipped(self.skipped)


_source: Source | None = None  # in a worker: the source that it draws from


def worker_pool(source: Source, workers: int) -> ProcessPoolExecutor:
    """Processes that each hold a copy of `source`, for functions that use `in_worker`."""
    source = copy.copy(source)
    source.held_out = None
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(source,))


def _start_worker(source: Source) -> None:
    global _source
    _source = source
    LOGGER.setLevel(logging.ERROR)  # the main process repeats what is skipped, once
    torch.set_num_threads(1)
    end_with_parent()


def in_worker(draw: Callable[[Source], object]) -> tuple[object, Told]:
    """In a worker: what `draw` makes of the source, and what there was to say."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = draw(_source)
    skipped = dict(_source.skipped) if isinstance(_source, Folder) else {}
    return made, Told([str(one.message) for one in caught], skipped)


def awaited(future: Future) -> object:
    """Its result; ValueError if the worker is gone."""
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise ValueError(
            "a process of workers= ended, perhaps for lack of memory or on a damaged video; use fewer, or 0 "
            "to see why"
        ) from error


def end_with_parent() -> None:
    """In a worker process: end it as soon as the process that started it is gone, killed or not."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _draw(bucket: Bucket, positions: list[int]) -> tuple[object, Told]:
    def draw(source: Source) -> tuple[np.ndarray, tuple[str, ...], np.ndarray | None]:
        if isinstance(source, Folder):
            return *source.levels(bucket, positions), None
        clips = source(bucket, positions)
        return clips.pixels.numpy(), clips.captions, None if clips.flow is None else clips.flow.numpy()

    return in_worker(draw)
