"""Encode a folder of videos once, so that training reads latents instead of decoding and encoding videos.

    i2vgen prepare data=FOLDER output=FOLDER [setting=value ...]

    i2vgen prepare data=videos output=prepared weights=weights/xl workers=8
    i2vgen prepare data=videos output=prepared width=256 height=256 frames=16 fps=8 crops=4 flip=true
    torchrun --nproc-per-node 8 -m i2vgen prepare data=videos output=prepared weights=weights/xl workers=4
    i2vgen train weights=weights/xl train.data=prepared output=outputs/mine

    data=FOLDER         videos with captions.csv or captions.jsonl, as train.data= reads them
    output=FOLDER       the prepared data; the same command continues a run that was killed
    weights=FOLDER      whose VAE and CLIP encode, at its own size (default: the shipped model)
    width=, height=, frames=, fps=   another size
    frame_lengths=, sample_fps=      several buckets, as in training: frame_lengths=[8,16] sample_fps=[8,8]
    crops=1             clips per video and bucket, from as many places of it
    flip=true           also store mirror images, where no caption names a side, for train.flip=true
    dtype=float32       or float16: half the size, rounded to three digits
    workers=0           processes that decode ahead, of every process
    batch=8, encode_chunk=   clips and frames encoded at once (default: fewer frames for large ones)
    seed=0              draws the crops

Unreadable and short clips are skipped; output/skipped.jsonl says why. See docs/training.md.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from i2vgen import cli
from i2vgen.commands import train as training
from i2vgen.fast import runtime
from i2vgen.fast.processes import own_device
from i2vgen.files import checkpoint, whole
from i2vgen.settings.config import RANDOM, Config
from i2vgen.settings.merge import load_config
from i2vgen.settings.wording import counted
from i2vgen.training import prepare, prepared
from i2vgen.training.settings import WORLD, Train, load_settings

# Settings of training that decide what is prepared; here they need no `train.` before them.
OWN = ("frame_lengths", "sample_fps", "workers", "batch", "encode_chunk", "seed", "flip")
CHUNK_PIXELS = 64 * 256 * 256  # of the frames that the VAE encodes at once


def main(argv: list[str]) -> int:
    config, train, form = settings(argv)
    output = whole.check_folder("output=", config.output)
    if output.resolve() == Path(train.data).resolve():
        raise ValueError(f"output={output} is the folder of videos itself; choose another")
    rank, ranks, local = training.processes()
    config = own_device(config, local, ranks)
    device = runtime.device(config.runtime)
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.ERROR, format="%(message)s")
    runtime.apply(config.runtime)
    job = prepare.Job(config, train, form, output, device, rank=rank, ranks=ranks)
    count = job.facts["count"]
    with (
        logging_redirect_tqdm(),
        tqdm(total=count, unit="clip", disable=rank > 0, mininterval=0.5) as bar,
    ):
        if rank == 0:
            sizes = ", ".join(
                f"{counted(frames, 'frame')} at {fps} fps" for frames, fps in job.facts["buckets"]
            )
            held = counted(len(job.shards), "shard")
            size = f"{config.sample.width} x {config.sample.height}"
            bar.write(f"{counted(count, 'clip')} in {held} on {device}: {size}, {sizes}")
        summary = job.run(lambda done: advance(bar, done))
    if summary.missing:
        if rank == 0:
            print(f"{summary.missing} of {len(job.shards)} shards are still being made by other processes")
        return 0
    place, skipped = cli.shown(output), summary.skipped
    note = f"; {counted(skipped, 'clip')} skipped, {prepared.SKIPPED} says why" if skipped else ""
    print(
        f"{place} holds {counted(summary.clips - skipped, 'clip')} in {counted(summary.rows, 'crop')}{note}"
    )
    return 0


def settings(argv: list[str]) -> tuple[Config, Train, prepare.Form]:
    """ValueError for settings with which nothing can be prepared."""
    file, words, _ = cli.split(argv)
    if file is not None:
        raise ValueError(f"{file} is no setting; write data={file}")
    given, rest = cli.take(words, numbers=("crops",), texts=("data", "dtype"))
    data = given.pop("data", None)
    if data is None:
        raise ValueError("no videos given; name a folder with data=")
    if data == WORLD:
        raise ValueError(
            f"data={WORLD} is drawn, not read; train.cache=true keeps its latents in memory instead"
        )
    if prepared.is_prepared(Path(data)):
        raise ValueError(f"data={data} is prepared already; give the folder of videos")
    rest = [f"train.{word}" if word.partition("=")[0] in OWN else word for word in rest]
    if not any(word.startswith("weights=") for word in rest):
        rest.append(f"weights={load_config(sampling=True).weights}")
    config, train = load_settings(None, [f"train.data={FOLDER}", *rest])
    if config.weights == RANDOM or {"vae", "clip"} & set(checkpoint.missing_parts(config.weights)):
        raise ValueError(f"weights={config.weights} lacks a VAE or CLIP, which encode the clips")
    if not config.output:
        raise ValueError("no output given; name a folder with output=")
    if not any(word.startswith("train.encode_chunk=") for word in rest):
        frame = config.sample.width * config.sample.height
        train = dataclasses.replace(train, encode_chunk=max(1, min(64, CHUNK_PIXELS // frame)))
    return config, dataclasses.replace(train, data=data), prepare.Form(**given)


FOLDER = "folder"  # stands for the path, which may hold what a setting cannot


def advance(bar: tqdm, done: int) -> None:
    bar.n = max(bar.n, done)
    bar.update(0)
