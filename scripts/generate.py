"""One picture and a sentence in, a video out.

    python scripts/generate.py [config.yaml] image=PATH prompt="..." output=clip.mp4 [weights=FOLDER]
    [setting=value ...]

    image=, prompt=     may be repeated: pairs item by item, one of either serves all
    items=FILE.jsonl    one {"image": ..., "prompt": ..., "seed": ..., "output": ...} per line instead
    seed=[1,2,3]        every pair once per seed
    output=             .mp4, .gif, .webp, .png (a strip of all frames), or a folder for PNGs; a JSON with all
                        settings lands beside it
    weights=FOLDER      a native weights folder; none given: the small model that comes with the package
    quality=            exact (the default), fast or draft: fewer and cheaper network calls, docs/sampling.md
    weights=random      seeded random weights: the output is noise, but the whole road is driven
    --print-config      print the merged settings as YAML and stop
    --resume            leave out clips that are already there, whole and made with the same settings

All settings with their defaults stand in i2vgen/config.py; sizes are width= and height= in pixels.
"""

from __future__ import annotations

import dataclasses
import sys
import warnings

from tqdm import tqdm

from i2vgen import cli, jobs, pipeline, runtime
from i2vgen.config import SHIPPED, load_config

FLAGS = ("--print-config", "--resume", "--help")


def main() -> int:
    file, overrides, flags = cli.split(["--help" if w == "-h" else w for w in sys.argv[1:]], FLAGS)
    if "--help" in flags or not sys.argv[1:]:
        print(__doc__)
        return 0
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
    if any(not job.prompt.strip() for job in todo):
        warnings.warn("the prompt is empty; the picture alone decides what moves", stacklevel=1)
    batch_size = min(config.runtime.batch, len(todo))
    config = dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, batch=batch_size))
    runtime.apply(config.runtime)
    model = pipeline.load_parts(config)
    print(f"{describe(config, model)}\nmemory: about {runtime.estimate_memory(config, model.parts)}")

    size = config.runtime.batch
    for start in range(0, len(todo), size):
        batch = todo[start : start + size]
        label = (
            f"clip {start + 1}" + (f"-{start + len(batch)}" if len(batch) > 1 else "") + f" of {len(todo)}"
        )
        with tqdm(desc=label, unit="step", mininterval=0.5) as bar:
            clips = model.generate(
                [job.image for job in batch],
                [job.prompt for job in batch],
                [job.seed for job in batch],
                on_step=lambda info, bar=bar: advance(bar, info),
            )
        for job, clip in zip(batch, clips, strict=True):
            path = clip.save(job.output)
            print(
                f"{path} ({len(clip.frames)} frames, seed {job.seed}), "
                f"settings in {pipeline.record_path(path)}"
            )
    return 0


def describe(config, model) -> str:
    sample = config.sample
    return (
        f"{sample.width} x {sample.height} pixels, {sample.frames} frames, {sample.steps} steps, "
        f"guidance {sample.guidance:g}, on {model.device} in {str(model.unet.conv_in.weight.dtype)[6:]}"
    )


def advance(bar: tqdm, info) -> None:
    bar.total = info.num_steps
    bar.update()


if __name__ == "__main__":
    sys.exit(cli.run(main))
