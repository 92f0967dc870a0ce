"""Edit a clip through its first frame: DDIM inversion, then sampling with the clip's own motion injected.

    python examples/edit_video.py clip.gif edited_first_frame.png "a red star grows" edited.gif

As AnyV2V (arXiv 2403.14468) does with this model: DDIM inversion finds the noise that reproduces the clip.
While the clip is sampled from it, queries and keys of temporal attention are recorded. The edited picture is
then sampled from the same noise, with these injected during the first part of the steps.
"""

import argparse
import dataclasses

from PIL import Image

import i2vgen
from i2vgen import pipeline
from i2vgen.adapt.taps import taps
from i2vgen.files import video

MOTION = ("up.*.temporal.attention*.to_q", "up.*.temporal.attention*.to_k")


def edit(model, frames, picture, prompt, *, share=0.6):
    """uint8 frames [f h w 3] of the model's size, and an edited first frame -> the edited clip"""
    first, steps = Image.fromarray(frames[0]), model.config.sample.steps
    plain = with_guidance(model, 1.0)
    noise = pipeline.invert(plain, frames, first, prompt)

    kept = {}
    with taps(model.unet, dict.fromkeys(MOTION, lambda path, x: kept.setdefault(path, []).append(x))):
        plain.generate([first], [prompt], [0], noise=noise)
    # Recorded: one call per step. With guidance a step makes two, one per branch.
    calls = 1 if model.config.sample.guidance == 1.0 else 2
    recorded = {path: iter([x for x in xs for _ in range(calls)]) for path, xs in kept.items()}
    left = dict.fromkeys(kept, round(share * steps) * calls)

    def inject(path, x):
        left[path] -= 1
        return next(recorded[path]) if left[path] >= 0 else None

    with taps(model.unet, dict.fromkeys(MOTION, inject)):
        return model.generate([picture], [prompt], [0], noise=noise)[0]


def with_guidance(model, scale):
    sample = dataclasses.replace(model.config.sample, guidance=scale)
    config = dataclasses.replace(model.config, sample=sample)
    plain = pipeline.I2VGenXL(config, model.unet, model.vae, model.clip, model.device)
    plain.offloaded = model.offloaded
    return plain


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name in ("clip", "picture", "prompt", "output"):
        parser.add_argument(name)
    parser.add_argument("settings", nargs="*", help="any settings, for example steps=50")
    given = parser.parse_args()
    model = i2vgen.load(overrides=["weights=lab", *given.settings])
    count = min(model.config.sample.frames, video.measure(given.clip)[0])
    frames, _ = video.load(given.clip, only=range(count))
    n, rest = divmod(frames.shape[1], model.config.sample.height)
    if not rest:  # saved with save.enlarge=n: every pixel repeated n times
        frames = frames[:, ::n, ::n]
    print(edit(model, frames, given.picture, given.prompt).save(given.output))


if __name__ == "__main__":
    main()
