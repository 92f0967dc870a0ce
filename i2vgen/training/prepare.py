"""Encode a folder of videos once, so that training reads latents instead of videos; see `prepared`.

A shard is a function of the settings and its number alone: processes share them out without speaking to each
other, and a run that was killed makes the missing ones. What is encoded together has always the same shape,
the last of a shard being padded, so that no clip's numbers depend on how many there are.

Axes: b batch, f frames, c channels, h w latent rows and columns, H W pixel rows and columns, k context
tokens, d width.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from i2vgen.fast import runtime
from i2vgen.files import checkpoint, fingerprint, whole
from i2vgen.files.rows import RowFile
from i2vgen.files.safefile import Entry, write_safetensors
from i2vgen.model.clip import ClipEncoders
from i2vgen.settings.config import Config
from i2vgen.training import data, draws, prepared
from i2vgen.training.data import Folder
from i2vgen.training.diffusion import Encoding
from i2vgen.training.settings import Train, buckets

SHARD_BYTES = 2**28
MOST_SHARDS = 64  # into which few clips are cut, so that several processes have work


@dataclass(frozen=True)
class Form:
    """What is stored of each clip, beside what the settings of training say."""

    crops: int = 1  # per clip and bucket, spread over the file
    dtype: Literal["float32", "float16"] = "float32"

    def __post_init__(self):
        if not 1 <= self.crops <= 1000:
            raise ValueError(f"crops={self.crops}; give 1 to 1000")
        if self.dtype not in ("float32", "float16"):
            raise ValueError(f"dtype={self.dtype}; give float32 or float16")


class Summary(NamedTuple):
    clips: int  # in the folder of videos
    skipped: int  # of which no bucket has anything
    rows: int
    missing: int  # shards that other processes are still to make


class Crop(NamedTuple):
    """Frames of a file for one bucket: uint8 [f H W 3]."""

    kind: int
    start: int
    frames: np.ndarray


class Decoded(NamedTuple):
    """A file of the folder."""

    name: str
    crops: list[Crop]
    complaints: list[str]  # why there are not more
    size: int
    content: int  # a hash of its bytes


class Job:
    """The preparation of one folder by one of `ranks` processes. ValueError for an output of another job."""

    def __init__(
        self,
        config: Config,
        train: Train,
        form: Form,
        output: Path,
        device: torch.device,
        *,
        rank: int = 0,
        ranks: int = 1,
    ):
        self.config, self.train, self.form, self.output, self.device = config, train, form, output, device
        self.source = Folder(config, train, "data")
        self.kinds = buckets(config, train)
        data.refuse_too_few(self.source, train, ranks)
        self.facts = self._facts()
        self._begin()
        count, per = self.facts["count"], self.facts["per_shard"]
        self.shards = [range(first, min(first + per, count)) for first in range(0, count, per)]
        self.mine = [number for number in range(rank, len(self.shards), ranks) if not self._is_shard(number)]

    def _facts(self) -> dict:
        config, train, source = self.config, self.train, self.source
        return {
            "format": prepared.FORMAT,
            "source": str(source.folder.resolve()),
            "weights": str(Path(config.weights).resolve()),
            **data.contents(source),
            "count": len(source),
            "per_shard": self._per_shard(),
            "identity": prepared.identity(config),
            "buckets": [[kind.frames, kind.fps] for kind in self.kinds],
            "crops": self.form.crops,
            "flip": train.flip,
            "dtype": self.form.dtype,
            "seed": train.seed,
            "batch": train.batch,
            "encode_chunk": train.encode_chunk,
            "vae_dtype": config.runtime.vae_dtype,
            "encoder_dtype": config.runtime.encoder_dtype,
            "negative_prompt": config.negative_prompt,
        }

    def _per_shard(self) -> int:
        config, batch = self.config, self.train.batch
        frames = sum(kind.frames for kind in self.kinds) * self.form.crops * (2 if self.train.flip else 1)
        latent = config.vae.embed_dim * math.prod(config.latent_size)
        size = 2 * frames * latent * runtime.DTYPES[self.form.dtype].itemsize
        most = max(batch, math.ceil(len(self.source) / MOST_SHARDS))
        per = max(1, min(SHARD_BYTES // size, most))
        return per if per < batch else per // batch * batch

    def _begin(self) -> None:
        """Write prepared.json, or compare it with that of the run that is to be continued."""
        if not prepared.is_prepared(self.output):
            ours = (prepared.FACTS, prepared.SHARDS, prepared.INDEX, prepared.SKIPPED)
            names = [path.name for path in self.output.iterdir() if not path.name.startswith(".")]
            if there := [name for name in names if name not in ours]:
                raise ValueError(
                    f"output={self.output} holds other files, such as {there[0]}; choose another"
                )
            whole.write_json(self.output / prepared.FACTS, self.facts)
            return
        before = prepared.read_facts(self.output)
        for name in self.facts:
            here, there = self.facts[name], before.get(name)
            if name == "identity" and there:
                name = next((one for one in here if here[one] != there.get(one)), name)
                here, there = here.get(name, here), there.get(name, there)
            if here != there and name not in prepared.PATHS:
                is_here = f"{name} is {here} here but {there} there"
                if name in prepared.PARTS:
                    is_here = f"{prepared.PARTS[name]} differ"
                if name in ("clips", "captions"):
                    raise ValueError(
                        f"the {name} of data={self.facts['source']} have changed since output={self.output} "
                        "was begun; delete that folder, or choose another output"
                    )
                raise ValueError(
                    f"output={self.output} was begun with other settings: {is_here}; choose another output"
                )

    @functools.cached_property
    def plan(self) -> str:
        return prepared.plan(self.facts)

    def _is_shard(self, number: int) -> bool:
        return self._is_there(prepared.shard_name(number))

    def _is_there(self, name: str) -> bool:
        """Whether a file is there and of this job; others and damaged ones are made again."""
        path = self.output / name
        with contextlib.suppress(ValueError):
            if path.is_file():
                file = RowFile(path, "")
                file.close()
                return file.metadata.get("plan") == self.plan
        return False

    @functools.cached_property
    def clip(self) -> ClipEncoders:
        dtype = runtime.DTYPES[self.config.runtime.encoder_dtype]
        return checkpoint.load("clip", self.config, device=self.device, dtype=dtype)

    def run(self, on_clips: Callable[[int], None]) -> Summary:
        """Make the shards that this process is to make, then the index if all are there.

        `on_clips` is called with the number of clips that all processes have done.
        """
        (self.output / prepared.SHARDS).mkdir(exist_ok=True)
        if self.mine:
            dtype = runtime.DTYPES[self.config.runtime.vae_dtype]
            vae = checkpoint.load("vae", self.config, device=self.device, dtype=dtype)
            encoding = Encoding(self.config, self.train, vae, self.clip, self.device)
            decoded = self._decoded(itertools.chain.from_iterable(self.shards[n] for n in self.mine))
            with contextlib.closing(decoded):
                for number in self.mine:
                    done = self._done()
                    shard = Shard(self, encoding)
                    for i in range(len(self.shards[number])):
                        shard.add(next(decoded))
                        on_clips(done + i + 1)
                    shard.write(self.output / prepared.shard_name(number))
        summary = self._finish()
        on_clips(self._done())
        return summary

    def _done(self) -> int:
        there = {path.name for path in (self.output / prepared.SHARDS).iterdir()}
        names = (Path(prepared.shard_name(number)).name for number in range(len(self.shards)))
        return sum(len(clips) for clips, name in zip(self.shards, names, strict=True) if name in there)

    def _decoded(self, numbers: Iterator[int]) -> Iterator[Decoded]:
        """One clip after the other; workers decode those to come."""
        workers, form = self.train.workers, self.form
        if not workers:
            for number in numbers:
                yield decode(self.source, number, form.crops)
            return
        with data.worker_pool(self.source, workers) as pool:
            try:
                waiting = collections.deque()
                for number in numbers:
                    waiting.append(pool.submit(_decode, number, form.crops))
                    if len(waiting) > 2 * workers:
                        yield self._awaited(waiting.popleft())
                while waiting:
                    yield self._awaited(waiting.popleft())
            finally:
                pool.shutdown(cancel_futures=True)

    def _awaited(self, future) -> Decoded:
        made, told = data.awaited(future)
        told.repeat(self.source)
        return made

    def _finish(self) -> Summary:
        """Write index.safetensors and skipped.jsonl if all shards are there."""
        missing = sum(not self._is_shard(number) for number in range(len(self.shards)))
        if missing:
            return Summary(len(self.source), 0, 0, missing)
        kinds = range(len(self.kinds))
        held: dict[str, list[Tensor]] = collections.defaultdict(list)
        skipped, sizes = [], []
        for number in range(len(self.shards)):
            path = self.output / prepared.shard_name(number)
            file = RowFile(path, prepared.REMEDY)
            for name in (*(f"rows.{kind}" for kind in kinds), "captions", "flipped", "size", "content"):
                held[name].append(file.read(name))
            skipped += json.loads(file.metadata["skipped"])
            sizes.append(path.stat().st_size)
            file.close()
        index = {name: torch.cat(parts) for name, parts in held.items()}
        empty = int((sum(index[f"rows.{kind}"] for kind in kinds) == 0).sum())
        rows = sum(int(index[f"rows.{kind}"].sum()) for kind in kinds)
        if not self._is_there(prepared.INDEX):
            index["name"] = torch.from_numpy(self.source.name_hashes())
            index["shard_bytes"] = torch.tensor(sizes)
            index["negative"] = texts(self.clip, [self.config.negative_prompt], self.train.batch)[1]
            if skipped:
                lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in skipped)
                whole.write_text(self.output / prepared.SKIPPED, lines)
            write(self.output / prepared.INDEX, index, {"plan": self.plan})
        return Summary(len(self.source), empty, rows, 0)


class Shard:
    """The rows of some clips, in the making."""

    def __init__(self, job: Job, encoding: Encoding):
        self.job, self.encoding, self.batch = job, encoding, job.train.batch
        self.dtype = runtime.DTYPES[job.form.dtype]
        kinds = range(len(job.kinds))
        self.waiting: list[list[np.ndarray]] = [[] for _ in kinds]  # to be encoded, uint8 [f H W 3]
        self.made: dict[str, list[Tensor]] = collections.defaultdict(list)
        self.rows: list[list[int]] = [[] for _ in kinds]  # per clip
        self.starts: list[list[int]] = [[] for _ in kinds]  # per row
        self.files: list[Decoded] = []  # without their crops
        self.captions: list[tuple[str, ...]] = []
        self.flipped: list[bool] = []
        self.skipped: list[dict[str, str]] = []

    def add(self, clip: Decoded) -> None:
        name, crops = clip.name, clip.crops
        captions = self.job.source.captions[name]
        mirrored = self.job.train.flip and draws.may_flip(captions)
        self.files.append(clip._replace(crops=[]))
        self.captions.append(captions)
        self.flipped.append(mirrored)
        self.skipped += [{"file": name, "reason": reason} for reason in clip.complaints]
        for kind in range(len(self.waiting)):
            own = [crop for crop in crops if crop.kind == kind]
            shown = [crop.frames for crop in own] + [c.frames[:, :, ::-1] for c in own if mirrored]
            self.rows[kind].append(len(shown))
            self.starts[kind] += [crop.start for crop in own] * (2 if mirrored else 1)
            self.waiting[kind] += shown
            while len(self.waiting[kind]) >= self.batch:
                self._encode(kind)

    def _encode(self, kind: int) -> None:
        """The next batch of rows; the last of a shard is padded."""
        taken, self.waiting[kind] = self.waiting[kind][: self.batch], self.waiting[kind][self.batch :]
        count = len(taken)
        pixels = data.to_pixels(np.stack(taken + taken[-1:] * (self.batch - count)))
        mean, std = self.encoding.posterior(pixels)
        for name, found in (("mean", mean), ("std", std), ("vector", self.encoding.vector(pixels))):
            self._keep(f"{name}.{kind}", found[:count])

    def _keep(self, name: str, found: Tensor) -> None:
        stored = found.to("cpu", self.dtype)
        if not stored.isfinite().all():
            raise ValueError(
                f"{name} of {self.files[-1].name} or a clip before it exceeds {self.job.form.dtype}, or is "
                "not finite; use dtype=float32 and runtime.vae_dtype=float32"
            )
        self.made[name].append(stored)

    def write(self, path: Path) -> None:
        c, (h, w) = self.job.config.vae.embed_dim, self.job.config.latent_size
        for kind, bucket in enumerate(self.job.kinds):
            while self.waiting[kind]:
                self._encode(kind)
            latents = torch.empty(0, c, bucket.frames, h, w, dtype=self.dtype)
            vectors = torch.empty(0, self.job.config.clip.embed_dim, dtype=self.dtype)
            for name, none in (("mean", latents), ("std", latents), ("vector", vectors)):
                self.made[f"{name}.{kind}"].append(none)
        said = [caption for captions in self.captions for caption in captions]
        tokens, text = texts(self.job.clip, said, self.batch)
        self.made["text"] = []
        self._keep("text", text)
        held = {name: torch.cat(parts) for name, parts in self.made.items()}
        held["tokens"] = tokens.int()
        held |= packed("caption", said) | packed("name", [file.name for file in self.files])
        held["size"] = torch.tensor([file.size for file in self.files])
        held["content"] = torch.tensor([file.content for file in self.files])
        held["captions"] = torch.tensor([len(captions) for captions in self.captions], dtype=torch.int32)
        held["flipped"] = torch.tensor(self.flipped, dtype=torch.uint8)
        for kind in range(len(self.rows)):
            held[f"rows.{kind}"] = torch.tensor(self.rows[kind], dtype=torch.int32)
            held[f"start.{kind}"] = torch.tensor(self.starts[kind], dtype=torch.int32)
        write(path, held, {"plan": self.job.plan, "skipped": json.dumps(self.skipped)})


def decode(source: Folder, number: int, crops: int) -> Decoded:
    name, made = source.files[number], []
    kinds = buckets(source.config, source.train)
    for kind, bucket in enumerate(kinds):
        count = source.starts(name, bucket)
        keys = (source.train.seed, draws.name_hash(name), bucket.frames, bucket.fps)
        for start in spread(count, crops, *keys):
            frames = source.read(name, bucket, start)
            if frames is not None:
                made.append(Crop(kind, start, frames))
    keys = ((name, kind) for kind in (None, *(bucket._replace(batch=1) for bucket in kinds)))
    complaints = [source.skipped[key] for key in keys if key in source.skipped]
    path = source.folder / name
    return Decoded(name, made, complaints, fingerprint.size_of(path), fingerprint.of_content(path))


def _decode(number: int, crops: int) -> tuple[Decoded, data.Told]:
    return data.in_worker(lambda source: decode(source, number, crops))


def spread(count: int, crops: int, *keys: int) -> list[int]:
    """`crops` of `count` possible starts, one from each of as many equal stretches; all if they are few."""
    edges = [count * i // min(crops, count) for i in range(min(crops, count) + 1)] if count else []
    return [a + draws.one_of(b - a, *keys, i) for i, (a, b) in enumerate(itertools.pairwise(edges))]


@torch.no_grad()
def texts(clip: ClipEncoders, captions: Sequence[str], batch: int) -> tuple[Tensor, Tensor]:
    """n captions -> token ids int64 [n k] and what the text tower makes of them [n k d], on the CPU."""
    tokens = clip.tokenize(captions)
    padded = torch.cat([tokens, tokens[-1:].expand(-len(tokens) % batch, -1)])
    made = [clip.text(part.to(clip.device)).float().cpu() for part in padded.split(batch)]
    return tokens, torch.cat(made)[: len(tokens)]


def packed(name: str, strings: Sequence[str]) -> dict[str, Tensor]:
    """Texts as one tensor of bytes, and where each of them ends."""
    held = [text.encode("utf-8", "surrogatepass") for text in strings]
    ends = torch.tensor([len(one) for one in held]).cumsum(0)
    joined = torch.frombuffer(bytearray(b"".join(held) or b" "), dtype=torch.uint8)
    return {f"{name}_ends": ends, f"{name}_bytes": joined}


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    entries = [Entry(n, tuple(t.shape), t.dtype, lambda t=t: t) for n, t in tensors.items()]
    write_safetensors(path, entries, metadata=metadata)
