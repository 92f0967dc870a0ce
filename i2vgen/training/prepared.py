"""Prepared data: clips that `i2vgen prepare` has encoded, read row by row from safetensors files.

    prepared.json               what the clips were encoded with, and from which folder
    index.safetensors           how many rows each clip has, and size and hash of its file; written last,
                                when all shards are there
    shards/000000.safetensors   the rows of `per_shard` clips: posteriors, CLIP vectors, texts
    skipped.jsonl               the clips that could not be used, and why

The latents of the first frame, which the network is conditioned on, are frame 0 of a clip's posterior.

Axes: b batch, f frames, c channels, h w latent rows and columns, k context tokens, d width.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from i2vgen.files import checkpoint, fingerprint
from i2vgen.files.rows import RowFile, RowFiles
from i2vgen.settings.config import Config
from i2vgen.training import draws
from i2vgen.training.draws import Encoded
from i2vgen.training.settings import Bucket, Train, buckets

FACTS, INDEX, SHARDS, SKIPPED = "prepared.json", "index.safetensors", "shards", "skipped.jsonl"
FORMAT = 2
FORMATS = (1, FORMAT)  # 1: without sizes and hashes of the clips' files
REMEDY = "run `i2vgen prepare` again with the same words, which makes what is missing"
PATHS = ("source", "weights")  # facts that may change: a folder that was moved is the same one
# The parts that decide the numbers, by their names in `identity`.
PARTS = {"vae": "VAE", "clip.image": "CLIP image tower", "clip.text": "CLIP text tower"}
# Tensors of CLIP by which tower they belong to; the others do not change what the encoders give.
TEXT_TOWER = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.")


def is_prepared(folder: Path) -> bool:
    return (folder / FACTS).is_file()


def read_facts(folder: Path) -> dict[str, Any]:
    """What prepared.json says; ValueError if it is damaged or of another version."""
    path = folder / FACTS
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        version = facts["format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}); remove it, then run `i2vgen prepare` again with the same words"
        ) from error
    if version not in FORMATS:
        raise ValueError(
            f"{path} is of format {version!r}; this version reads {' and '.join(map(str, FORMATS))}"
        )
    return facts


def plan(facts: dict[str, Any]) -> str:
    """A hash of all that decides the numbers; every file holds it, so that none of another job is used."""
    decisive = {name: value for name, value in facts.items() if name not in PATHS}
    return fingerprint.of_text(json.dumps(decisive, sort_keys=True))


def shard_name(number: int) -> str:
    return f"{SHARDS}/{number:06}.safetensors"


def identity(config: Config) -> dict[str, str | int]:
    """What decides the numbers in prepared data, by the names that a message uses."""
    clip = config.clip
    unread = f"transformer.resblocks.{clip.text.get('layers', 0) - 1}."
    unread = unread if clip.text_layer == "penultimate" else "-"
    settings = config.to_dict()
    vae = {name: value for name, value in settings["vae"].items() if name != "scale"}

    def of_text(name: str) -> bool:
        return name.startswith(TEXT_TOWER) and not name.startswith(unread)

    return {
        "vae": _hash(config, "vae", vae, lambda name: True),
        "clip.image": _hash(config, "clip", settings["clip"], lambda name: name.startswith("visual.")),
        "clip.text": _hash(config, "clip", settings["clip"], of_text),
        "sample.width": config.sample.width,
        "sample.height": config.sample.height,
        "preprocess.crop": config.preprocess.crop,
        "preprocess.alpha": config.preprocess.alpha,
    }


def _hash(config: Config, part: str, settings: object, chosen) -> str:
    """Of a part's settings and tensors; file names and shards do not matter."""
    paths = checkpoint.part_files(Path(config.weights), part)
    files = [RowFile(path, "convert the weights again") for path in paths]
    homes = {name: file for file in files for name in file.places if chosen(name)}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name in sorted(homes):
        place = homes[name].places[name]
        digest.update(f"{name} {place.dtype} {place.shape}".encode())
        digest.update(homes[name].spots(name))
    for file in files:
        file.close()
    return digest.hexdigest()[:16]


class Prepared:
    """Clips of a prepared folder -> encoded batches. Memory holds a few numbers per clip.

    Clips, captions, flips and their order are drawn as from the folder of videos; of several crops, each
    visit draws one. ValueError if the folder was prepared with other parts or settings than these.
    """

    held_out: Prepared | None = None

    def __init__(self, config: Config, train: Train, setting: str = "train.data"):
        self.config, self.train, self.setting = config, train, setting
        self.folder = Path(train.data)
        self.facts = read_facts(self.folder)
        self.where = f"{setting}={self.folder}"
        self._refuse_use()
        self._refuse_difference()
        if not (self.folder / INDEX).is_file():
            raise ValueError(f"{self.where} is not fully prepared; {REMEDY}")
        self.files = RowFiles(self.folder, REMEDY)
        self._read_index()
        self.numbers = np.arange(self.facts["count"], dtype=np.int32)
        for bucket in buckets(config, train):
            if not self.rows[self._kind(bucket)].any():
                raise ValueError(
                    f"{self.where} holds no clip of {bucket.frames} frames at {bucket.fps} fps; "
                    f"{self.folder / SKIPPED} says why"
                )

    def _refuse_use(self) -> None:
        train = self.train
        if train.part != "diffusion" or train.first_stage:
            what = "train.first_stage" if train.first_stage else f"train.part={train.part}"
            raise ValueError(f"{self.where} holds no pictures, which {what} needs; give the folder of videos")
        if train.flip and not self.facts["flip"]:
            raise ValueError(
                f"train.flip=true, but {self.where} was prepared without mirror images; leave it out, or "
                "prepare the clips with flip=true"
            )

    def _refuse_difference(self) -> None:
        there, here = self.facts["identity"], identity(self.config)
        told = []
        for name, value in here.items():
            if there.get(name) == value or (name == "clip.text" and self.train.text_encoder):
                continue
            if name in PARTS:
                told.append(
                    f"the {PARTS[name]} of weights={self.config.weights} is another than that of "
                    f"{self.facts['weights']}"
                )
            else:
                told.append(f"{name} is {value} here but {there.get(name)} there")
        if told:
            raise ValueError(
                f"{self.where} was prepared with other settings: {'; '.join(told)}. Train with those, or "
                "prepare the clips again with these"
            )
        made = [tuple(kind) for kind in self.facts["buckets"]]
        for bucket in buckets(self.config, self.train):
            if (bucket.frames, bucket.fps) not in made:
                held = ", ".join(f"{frames} frames at {fps} fps" for frames, fps in made)
                raise ValueError(
                    f"{self.where} holds clips of {held}, but the run asks for {bucket.frames} at "
                    f"{bucket.fps}; set train.frame_lengths and train.sample_fps, or prepare the clips again"
                )

    def _read_index(self) -> None:
        file = RowFile(self.folder / INDEX, REMEDY)
        if file.metadata.get("plan") != plan(self.facts):
            raise ValueError(f"{self.folder / INDEX} does not belong to {FACTS} beside it; {REMEDY}")
        held = {name: file.read(name).numpy() for name in file.places if name != "negative"}
        self.negative = file.read("negative")
        file.close()
        count, per = self.facts["count"], self.facts["per_shard"]
        self.rows = [held[f"rows.{kind}"] for kind in range(len(self.facts["buckets"]))]
        self.num_captions, self.mirrored, self.hashes = held["captions"], held["flipped"], held["name"]
        for number, size in enumerate(held["shard_bytes"].tolist()):
            path = self.folder / shard_name(number)
            if not path.is_file() or path.stat().st_size != size:
                raise ValueError(f"{path} is missing or damaged; {REMEDY}")
        starts = np.arange(count) // per * per
        self.first_row = [_offsets(rows, starts) for rows in self.rows]
        self.first_caption = _offsets(self.num_captions, starts)

    def __len__(self) -> int:
        return len(self.numbers)

    def only(self, numbers: Sequence[int]) -> Prepared:
        """The same folder, but only these of its clips."""
        part = copy.copy(self)
        part.numbers = self.numbers[numbers]
        return part

    def usable(self, number: int) -> bool:
        """All that is prepared is."""
        return True

    def name_hashes(self) -> np.ndarray:
        return self.hashes[self.numbers]

    def fingerprint(self) -> str:
        names = hashlib.sha256(self.name_hashes().tobytes()).hexdigest()
        return fingerprint.of_text(plan(self.facts) + names)

    def __call__(self, bucket: Bucket, positions: Sequence[int]) -> Encoded:
        kind = self._kind(bucket)
        return joined([self._visit(kind, bucket, position) for position in positions])

    def fixed(self, bucket: Bucket) -> Iterator[Encoded]:
        """One usable clip after the other, each in a form that never changes, for validation."""
        kind = self._kind(bucket)
        for number in self.numbers[np.argsort(self.name_hashes(), kind="stable")]:
            if crops := self._crops(kind, number):
                yield self._read(kind, bucket, number, (crops - 1) // 2, 0)

    def _visit(self, kind: int, bucket: Bucket, position: int) -> Encoded:
        seed = self.train.seed
        for turn in draws.visits(seed, position, len(self.numbers)):
            number = self.numbers[turn]
            if crops := self._crops(kind, number):
                row = draws.one_of(crops, seed, position, draws.CROP_STREAM)
                if self.train.flip and self.mirrored[number] and draws.flipped(seed, position):
                    row += crops
                said = draws.one_of(int(self.num_captions[number]), seed, position, draws.CAPTION_STREAM)
                return self._read(kind, bucket, number, row, said)
        raise ValueError(f"{self.where}: none of its clips can be used for {bucket.frames} frames")

    def _kind(self, bucket: Bucket) -> int:
        return self.facts["buckets"].index([bucket.frames, bucket.fps])

    def _crops(self, kind: int, number: int) -> int:
        return int(self.rows[kind][number]) // (2 if self.mirrored[number] else 1)

    def _read(self, kind: int, bucket: Bucket, number: int, row: int, said: int) -> Encoded:
        """A batch of one clip."""
        file = self.files(shard_name(number // self.facts["per_shard"]))
        row += int(self.first_row[kind][number])
        said += int(self.first_caption[number])
        ends = file.read("caption_ends", max(said - 1, 0), 2 if said else 1).tolist()
        start = ends[0] if said else 0
        caption = file.read("caption_bytes", start, ends[-1] - start).numpy().tobytes().decode()
        trained = self.train.text_encoder
        return Encoded(
            file.read(f"mean.{kind}", row, 1).float(),
            file.read(f"std.{kind}", row, 1).float(),
            file.read(f"vector.{kind}", row, 1).float(),
            file.read("tokens", said, 1).long() if trained else None,
            bucket.fps,
            text=None if trained else file.read("text", said, 1).float(),
            captions=(caption,),
        )


def _offsets(counts: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Rows per clip -> the first row of each in its shard, whose first clip is `starts`."""
    before = np.cumsum(counts, dtype=np.int64) - counts
    return (before - before[starts]).astype(np.int32)


def joined(parts: Sequence[Encoded]) -> Encoded:
    """Batches -> one batch"""

    def cat(name: str) -> Tensor | None:
        tensors = [getattr(part, name) for part in parts]
        return None if tensors[0] is None else torch.cat(tensors)

    names = ("mean", "std", "vector", "tokens", "start", "text")
    said = tuple(caption for part in parts for caption in part.captions)
    return Encoded(**{name: cat(name) for name in names}, fps=parts[0].fps, captions=said)
