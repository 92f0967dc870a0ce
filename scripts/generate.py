"""One picture and a sentence in, a video out.

    python scripts/generate.py [config.yaml] image=PATH prompt="..." output=clip.mp4 [weights=FOLDER]
    [setting=value ...]

    image=, prompt=     may be repeated: pairs item by item, one of either serves all
    items=FILE.jsonl    one {"image": ..., "prompt": ..., "seed": ..., "output": ...} per line instead
    refine_weights=FOLDER   a second stage refines every clip, as refine.width=, refine.steps=, ... say
    refine_prompt=      what the second stage is told; none given: the prompt
    video=FILE          no first stage: the second one refines this clip, of any size and length
    seed=[1,2,3]        every pair once per seed
    output=             .mp4, .gif, .webp, .png (a strip of all frames), or a folder for PNGs; a JSON with all
                        settings lands beside it
    weights=FOLDER      a native weights folder; none given: the small model that comes with the package
    adapter=FOLDER      low-rank adapters on top (`train.lora_rank`, or peft's); adapter_scale=1
    quality=            exact (the default), fast or draft: fewer and cheaper network calls, docs/sampling.md
    weights=random      seeded random weights: the output is noise, but the whole road is driven
    memory=low          or balanced, full: how much device memory to take; auto, the default, takes the
                        fastest plan that fits. The plan and what it takes are printed before the start
    --print-config      print the merged settings as YAML and stop
    --resume            leave out clips that are already there, whole and made with the same settings

All settings with their defaults stand in i2vgen/settings/config.py; sizes are width= and height= in pixels.
"""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from i2vgen import cli, jobs, pipeline
from i2vgen.fast import runtime
from i2vgen.files import records, video
from i2vgen.refiner import refine
from i2vgen.settings.config import SHIPPED, Config
from i2vgen.settings.merge import load_config

FLAGS = ("--print-config", "--resume")


def main() -> int:
    file, overrides, flags = cli.split(sys.argv[1:], FLAGS, doc=__doc__)
    config = load_config(file, overrides, default_weights=SHIPPED)
    if "--print-config" in flags:
        print(config.to_yaml(), end="")
        return 0

    todo = jobs.plan(config)
    if "--resume" in flags:
        before = len(todo)
        todo = [job for job in todo if not job.done(config)]
        print(f"{before - len(todo)} clips are already there, {len(todo)} to make")
        if not todo:
            return 0
    runtime.apply(config.runtime)
    source = read_clip(config) if config.video else None
    if config.refine_weights:  # what could stop the second stage stops the first one too
        size, frames = (config.sample.width, config.sample.height), config.sample.frames
        if source is not None:
            frames, height, width, _ = source[0].shape
            size = width, height
        refine.check(config, size, frames)
    if source is None:
        clips = first_stage(config, todo)
    else:
        clips = ((job, pipeline.Video(source[0], "", "", job.seed, config, source[1])) for job in todo)
    if config.refine_weights:
        clips = second_stage(config, list(clips))  # the first stage's memory is free by now
    for job, clip in clips:
        path = clip.save(job.output)
        record = records.path_of(path)
        print(f"{path} ({len(clip.frames)} frames, seed {job.seed}), settings in {record}")
    return 0


def read_clip(config: Config) -> tuple[np.ndarray, float | None]:
    """The clip of video= and its frame rate."""
    frames, fps = video.load(config.video, alpha=config.preprocess.alpha)
    if len(frames) == 1:
        warnings.warn(f"video {config.video} has one frame; it is refined as a picture", stacklevel=1)
    return frames, fps


def first_stage(config: Config, todo: list[jobs.Job]) -> Iterator[tuple[jobs.Job, pipeline.Video]]:
    """Pictures to clips, a batch at a time."""
    if config.use.text and any(not job.prompt.strip() for job in todo):
        warnings.warn("the prompt is empty; the picture alone decides what moves", stacklevel=1)
    batch_size = min(config.runtime.batch, len(todo))
    config = dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, batch=batch_size))
    model = pipeline.load_parts(config, tell=lambda estimate: print(f"memory: {estimate}"))
    print(describe(config, model))

    size = config.runtime.batch
    for start in range(0, len(todo), size):
        batch = todo[start : start + size]
        label = (
            f"clip {start + 1}" + (f"-{start + len(batch)}" if len(batch) > 1 else "") + f" of {len(todo)}"
        )
        with tqdm(desc=label, unit="step", mininterval=0.5) as bar:
            made = list(jobs.make(model, batch, on_step=lambda info, bar=bar: advance(bar, info)))
        yield from made


def second_stage(
    config: Config, clips: list[tuple[jobs.Job, pipeline.Video]]
) -> Iterator[tuple[jobs.Job, pipeline.Video]]:
    """Clips to refined clips, one at a time."""
    count, height, width, _ = clips[0][1].frames.shape  # they are all of one size
    refiner = refine.load(
        config, (width, height), count, tell=lambda estimate: print(f"memory of the second stage: {estimate}")
    )
    told = config.refine
    print(
        f"second stage: inside {told.width} x {told.height} pixels, noise level {told.noise_level}, "
        f"{told.steps} steps of {told.solver}, guidance {told.guidance:g}, on {refiner.device}"
    )
    for number, (job, clip) in enumerate(clips, start=1):
        with tqdm(desc=f"refining {number} of {len(clips)}", unit="step", mininterval=0.5) as bar:
            frames = refiner(
                clip.frames,
                job.refine_prompt,
                seed=job.seed,
                on_step=lambda info, bar=bar: advance(bar, info),
            )
        fps = clip.fps if config.refine.fps == "input" else None
        yield job, dataclasses.replace(clip, frames=frames, fps=fps, config=job.settings(config))


def describe(config, model) -> str:
    sample = config.sample
    return (
        f"{sample.width} x {sample.height} pixels, {sample.frames} frames, {sample.steps} steps, "
        f"guidance {sample.guidance:g}, on {model.device} in {str(model.unet.conv_in.weight.dtype)[6:]}"
    )


def advance(bar: tqdm, info) -> None:
    if info.index == 0:  # an inversion and the sampling after it count by themselves
        bar.reset(total=info.num_steps)
    bar.update()


if __name__ == "__main__":
    sys.exit(cli.run(main))
