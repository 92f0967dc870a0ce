"""A clip longer than the model was trained for.

    python examples/long_clip.py picture.png "a yellow star moves to the right" long.gif windows=3

First, each window continues from the last frame of the previous one. This leaves a seam between windows, so
the whole clip is then noised half way and denoised again in overlapping windows, whose predictions are
blended at every step.
"""

import argparse

import numpy as np
import torch
from einops import rearrange
from PIL import Image

import i2vgen
from i2vgen import pipeline
from i2vgen.diffusion.schedule import timesteps


def long_clip(model, picture, prompt, *, windows=3, seed=0, strength=0.5):
    """-> uint8 frames [n h w 3], n = windows x (frames - 1) + 1"""
    frames = go_on(model, picture, prompt, windows, seed)
    return frames if strength == 0 else smooth(model, frames, prompt, seed, strength)


def go_on(model, picture, prompt, windows, seed):
    clips = []
    for window in range(windows):
        made = model.generate([picture], [prompt], [seed + window])[0].frames
        clips.append(made if window == 0 else made[1:])
        picture = Image.fromarray(made[-1])
    return np.concatenate(clips)


@torch.no_grad()
def smooth(model, frames, prompt, seed, strength):
    """SDEdit (arXiv 2108.01073) of the whole clip, in windows that overlap by half."""
    f, total, schedule = model.config.sample.frames, len(frames), model.schedule
    starts = sorted({*range(0, total - f, f // 2), total - f})
    pixels = rearrange(torch.from_numpy(frames).to(model.device), "n h w c -> n c h w") / 127.5 - 1
    latents = model.vae.encode(pixels, None, chunk=model.config.runtime.vae_chunk)
    x0 = rearrange(latents, "n c h w -> 1 c n h w")
    networks = []
    for start in starts:  # each window is conditioned on its own first frame
        first, mode = Image.fromarray(frames[start]), torch.zeros_like(x0[:, :, 0]).cpu()
        networks.append(pipeline.network(model, *pipeline.encode(model, [first], [prompt], mode)))
    weight = torch.minimum(torch.arange(1, f + 1), torch.arange(f, 0, -1)).to(x0)[:, None, None]

    def predict(x, t):
        total_v, total_weight = torch.zeros_like(x), torch.zeros_like(x[:1, :1, :, :1, :1])
        for start, network in zip(starts, networks, strict=True):
            inside = slice(start, start + f)
            total_v[:, :, inside] += weight * network(x[:, :, inside], t)
            total_weight[:, :, inside] += weight
        return total_v / total_weight

    sample, total_t = model.config.sample, schedule.num_timesteps
    visited = [t for t in timesteps(total_t, sample.steps, sample.spacing) if t < strength * total_t]
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(x0.shape, generator=generator).to(x0)
    a = [schedule.abar[t].sqrt().to(x0) for t in visited]
    x = a[0] * x0 + (1 - a[0] ** 2).sqrt() * noise
    for i, t in enumerate(visited):
        v, s = predict(x, torch.tensor([t])), (1 - a[i] ** 2).sqrt()
        x0, eps = a[i] * x - s * v, s * x + a[i] * v
        x = x0 if i + 1 == len(visited) else a[i + 1] * x0 + (1 - a[i + 1] ** 2).sqrt() * eps
    return pipeline.decode(model, x)[0].cpu().numpy()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name in ("picture", "prompt", "output"):
        parser.add_argument(name)
    parser.add_argument("settings", nargs="*", help="windows=3, and any settings")
    given = parser.parse_args()
    windows = next((int(s[8:]) for s in given.settings if s.startswith("windows=")), 3)
    model = i2vgen.load(
        overrides=["weights=lab", *(s for s in given.settings if not s.startswith("windows="))]
    )
    frames = long_clip(model, given.picture, given.prompt, windows=windows)
    i2vgen.files.video.save(frames, given.output, fps=model.config.save.fps)
    print(f"{given.output}: {len(frames)} frames")


if __name__ == "__main__":
    main()
