"""Generate a video from one picture and a sentence.

    i2vgen generate             a first clip, of the shipped picture and sentence
    i2vgen generate [config.yaml] image=PATH prompt="..." output=clip.mp4 [weights=FOLDER]
    [setting=value ...]

    image=, prompt=     may be repeated and are then paired in order; a single one is used for all
    items=FILE.jsonl    instead: one {"image": ..., "prompt": ..., "seed": ..., "output": ...} per line
    refine_weights=FOLDER   refine every clip with a second stage; set refine.width=, refine.steps=, ...
    refine_prompt=      prompt of the second stage (default: the prompt)
    video=FILE          skip the first stage and refine this clip, of any size and length
    seed=[1,2,3]        generate every pair once per seed
    output=             .mp4, .gif, .webp, .png (a strip of all frames), or a folder for PNGs; a JSON file
                        with all settings is written beside it
    weights=FOLDER      native weights folder (default: the shipped model; weights=lab: a smaller one)
    adapter=FOLDER      add low-rank adapters (from `train.lora_rank`, or peft's); adapter_scale=1
    plugins=FILE.py     a Python file that changes the model before its weights are loaded: docs/laboratory.md
    quality=            exact (default), fast or draft: fewer and cheaper network calls, docs/sampling.md
    weights=random      seeded random weights: the output is noise, but the whole pipeline runs
    memory=low          or balanced, full: limits device memory; auto, the default, selects the fastest
                        plan that fits. The plan and its memory use are printed at the start
    parallel=auto       under torchrun all processes compute each clip together (guidance, frames, both)
    --print-config      print the merged settings as YAML and stop
    --resume            skip clips that already exist, complete and made with the same settings

    torchrun --nproc-per-node 4 -m i2vgen generate ...      without parallel=, processes share the clips

All settings and their defaults are in i2vgen/settings/config.py; width= and height= are in pixels.
"""

from __future__ import annotations

import dataclasses
import shlex
import warnings
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from i2vgen import cli, jobs, pipeline
from i2vgen.fast import machine, processes, runtime
from i2vgen.fast.processes import Crew
from i2vgen.files import given, records, video
from i2vgen.refiner import refine
from i2vgen.settings import shipped
from i2vgen.settings.config import Config
from i2vgen.settings.merge import load_config
from i2vgen.settings.wording import counted

FLAGS = ("--print-config", "--resume")
JOBS = {"image", "prompt", "items", "video", "weights"}  # without any of them, the first clip is made


def main(argv: list[str]) -> int:
    with processes.crew() as crew:
        return make(argv, crew)


def make(argv: list[str], crew: Crew) -> int:
    file, overrides, flags = cli.split(argv, FLAGS)
    config = load_config(file, overrides, sampling=True)
    if "--print-config" in flags:
        with crew.quiet():
            print(config.to_yaml(), end="")
        return 0

    if first := file is None and not {word.partition("=")[0] for word in overrides} & JOBS:
        with crew.quiet():
            config = first_clip(overrides)
    config = crew.place(config)
    with crew.quiet():
        cli.tell_plugins(config)
        todo = jobs.plan(config, fresh="--resume" not in flags, decided=crew.decided)
        if "--resume" in flags:
            before = todo
            left = crew.decided(lambda: [i for i, job in enumerate(before) if not job.done(config)])
            todo = [before[i] for i in left]
            print(f"{counted(len(before) - len(todo), 'clip')} already there, {len(todo)} to make")
            if not todo:
                return 0
        runtime.apply(config.runtime)
        source = read_clip(config) if config.video else None
        if config.refine_weights:  # errors of the second stage show before the first one runs
            size, frames = (config.sample.width, config.sample.height), config.sample.frames
            if source is not None:
                frames, height, width, _ = source.frames.shape
                size = width, height
                jobs.check_outputs(todo, config, fps=source.fps or config.save.fps)
            refine.check(config, size, frames)
    together = config.runtime.parallel != "none"
    with crew.quiet(on=together):
        if source is None:
            clips = first_stage(config, todo, crew)
        else:
            taken = (todo[i] for i in crew.taken(len(todo)))
            clips = ((job, dataclasses.replace(source, seed=job.seed)) for job in taken)
        if config.refine_weights:
            clips = second_stage(config, list(clips), crew)  # frees the first stage's memory
        if together and crew.rank > 0:
            for _ in clips:  # the first process writes them
                pass
        else:
            jobs.save(clips, tell, at_end=(lambda: None) if together else crew.wait)
    if first:
        with crew.quiet():
            picture = cli.shown(shlex.quote(f"image={shipped.PICTURE}"))
            print(f'next: i2vgen generate {picture} prompt="{shipped.SUBJECT} moves to the left"')
            print("      i2vgen examples DIR copies pictures, scripts and configurations to a new folder")
    return 0


def first_clip(overrides: list[str]) -> Config:
    """The shipped picture and sentence, for those who name none."""
    words = [f"image={shipped.PICTURE}", f"prompt={shipped.PROMPT}", *overrides]
    config = load_config(None, words, sampling=True)
    print(f'no picture given; this is image={cli.shown(shipped.PICTURE)} prompt="{shipped.PROMPT}"')
    return config


def tell(clip: pipeline.Video, path: Path) -> None:
    facts = f"{counted(len(clip.frames), 'frame')}, seed {clip.seed}"
    print(f"{cli.shown(path)} ({facts}), settings in {cli.shown(records.path_of(path))}")


def read_clip(config: Config) -> pipeline.Video:
    """The clip of video=, with the frame rate that its refined versions get."""
    frames, fps = video.load(config.video, alpha=config.preprocess.alpha)
    if len(frames) == 1:
        warnings.warn(f"video {config.video} has one frame; it is refined as a single picture", stacklevel=1)
    facts = {"reproducible": True, "inputs": {"video": given.of_file(config.video)}}
    return pipeline.Video(frames, "", "", 0, config, fps if jobs.follows_input(config) else None, facts=facts)


def first_stage(
    config: Config, todo: list[jobs.Job], crew: Crew
) -> Iterator[tuple[jobs.Job, pipeline.Video]]:
    """Pictures to clips, a batch at a time: all of them, or those that this process takes."""
    if config.use.text and any(not job.prompt.strip() for job in todo) and crew.rank == 0:
        warnings.warn("the prompt is empty; only the picture determines the motion", stacklevel=1)
    size = min(config.runtime.batch, len(todo))
    config = dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, batch=size))
    with crew.quiet():
        model = pipeline.load_parts(config, tell=lambda estimate: print(f"memory: {estimate}"))
        print(describe(config, model))
        if crew.world > 1 and model.ranks is None:
            print(f"{crew.world} processes share {counted(len(todo), 'clip')}")

    batches = range(0, len(todo), size)
    together = model.ranks is not None
    for number in range(len(batches)) if together else crew.taken(len(batches)):
        start = batches[number]
        batch = todo[start : start + size]
        label = (
            f"clip {start + 1}" + (f"-{start + len(batch)}" if len(batch) > 1 else "") + f" of {len(todo)}"
        )
        with tqdm(desc=label, unit="step", mininterval=0.5, disable=crew.rank > 0) as bar:
            made = list(jobs.make(model, batch, on_step=lambda info, bar=bar: advance(bar, info)))
            steps = bar.total
        if together and crew.rank == 0 and number == 0:
            sent = model.ranks.sent / steps / 2**20
            print(f"exchanged: {sent:.3g} MiB sent by each process per step")
        yield from made


def second_stage(
    config: Config, clips: list[tuple[jobs.Job, pipeline.Video]], crew: Crew
) -> Iterator[tuple[jobs.Job, pipeline.Video]]:
    """Clips to refined clips, one at a time."""
    if not clips:  # others took them all
        return
    count, height, width, _ = clips[0][1].frames.shape  # all have the same size
    with crew.quiet():
        refiner = refine.load(
            config,
            (width, height),
            count,
            tell=lambda estimate: print(f"memory of the second stage: {estimate}"),
        )
        stage = config.refine
        print(
            f"second stage: at most {stage.width} x {stage.height} pixels, noise level {stage.noise_level}, "
            f"{counted(stage.steps, 'step')} of {stage.solver}, guidance {stage.guidance:g}, "
            f"on {refiner.device}"
        )
    for number, (job, clip) in enumerate(clips, start=1):
        label = f"refining {number} of {len(clips)}"
        with tqdm(desc=label, unit="step", mininterval=0.5, disable=crew.rank > 0) as bar:
            frames = refiner(
                clip.frames,
                job.refine_prompt,
                seed=job.seed,
                on_step=lambda info, bar=bar: advance(bar, info),
            )
        yield job, dataclasses.replace(clip, frames=frames, config=job.settings(config))


def describe(config, model) -> str:
    sample, made = config.sample, pipeline.steps_made(config)
    steps = counted(made, "step")
    if made != sample.steps:
        steps += f" (for steps={sample.steps}, by its spacing)"
    return (
        f"{sample.width} x {sample.height} pixels, {counted(sample.frames, 'frame')}, {steps}, "
        f"guidance {sample.guidance:g}, on {model.device} in "
        f"{machine.precision(model.unet.conv_in.weight.dtype, model.device)}"
        + (f", split over {model.ranks}" if model.ranks else "")
    )


def advance(bar: tqdm, info) -> None:
    if info.index == 0:  # an inversion and the sampling after it each count from 0
        bar.reset(total=info.num_steps)
    bar.update()
