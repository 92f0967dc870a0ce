"""Control a clip with edge drawings: train a small adapter while the model stays frozen.

    python examples/control.py outputs/control steps=400

Trains on clips of the procedural world and drops half of the captions, so that the adapter learns to convey
the motion. Writes OUT/adapter.safetensors, and for a clip not used in training the given edges
(OUT/edges.gif) and what the model makes with them (OUT/with.gif) and without (OUT/without.gif).
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import i2vgen
from i2vgen.adapt.taps import controlled
from i2vgen.files import video
from i2vgen.model.unet import Residuals
from i2vgen.training.frozen_model import train_on_frozen_model
from i2vgen.training.settings import Train
from i2vgen.world import drawing


class EdgeAdapter(nn.Module):
    """Edges of all frames -> residuals added after every down block; initially zero."""

    def __init__(self, config, width=48):
        super().__init__()
        self.blocks = config.unet.blocks_per_level
        self.inside = nn.Sequential(
            nn.PixelUnshuffle(config.vae.factor),
            nn.Conv2d(config.vae.factor**2, width, 3, padding=1), nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.SiLU(),
        )  # fmt: skip
        self.heads = nn.ModuleList(nn.Conv2d(width, out, 1) for out in config.unet.widths)
        for head in self.heads:
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        self.edges = None  # [b f H W]; set this before each network call

    def forward(self, x, t):
        b, down = len(self.edges), []
        y = self.inside(rearrange(self.edges, "b f h w -> (b f) 1 h w"))
        for level, head in enumerate(self.heads):
            part = F.avg_pool2d(y, 2**level) if level else y
            down += [rearrange(head(part), "(b f) c h w -> b f h w c", b=b)] * self.blocks
        return Residuals(down=down)


def edges(clips):
    """[b 3 f H W] in [-1, 1] -> [b f H W] in [0, 1]: difference to the next pixel, right and below"""
    right = F.pad((clips[..., 1:] - clips[..., :-1]).abs(), (0, 1))
    below = F.pad((clips[..., 1:, :] - clips[..., :-1, :]).abs(), (0, 0, 0, 1))
    return (right + below).mean(1).clamp(0, 1)


def train(model, adapter, steps):
    def attached(clips):
        adapter.edges = edges(clips.clips).to(model.device)
        return controlled(model.unet, adapter)

    settings = Train(steps=steps, batch=4, learning_rate=2e-3, timestep_power=2.0, text_dropout=0.5)
    for step, loss in train_on_frozen_model(model, adapter, attached, settings):
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step + 1} of {steps}: loss {loss:.4f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("settings", nargs="*", help="steps=400")
    given = parser.parse_args()
    steps = int(dict(s.split("=") for s in given.settings).get("steps", 400))
    torch.manual_seed(0)
    model = i2vgen.load("lab")
    sample, adapter = model.config.sample, EdgeAdapter(model.config).to(model.device)
    train(model, adapter, steps)
    given.output.mkdir(parents=True, exist_ok=True)
    save_file(adapter.state_dict(), given.output / "adapter.safetensors")

    seed = next(s for s in range(99) if drawing.sample_facts(s, kind="single").moves[0].kind == "left")
    clip = drawing.batch(
        [seed], width=sample.width, height=sample.height, frames=sample.frames, kind="single"
    )
    drawn, prompt = edges(clip.clips), "a " + clip.facts[0].things[0].shape  # does not mention the motion
    first = Image.fromarray(((clip.clips[0, :, 0] + 1) * 127.5).byte().permute(1, 2, 0).numpy())
    adapter.edges = drawn.to(model.device)
    grey = (255 * drawn[0]).byte()[..., None].expand(-1, -1, -1, 3)
    video.save(grey, given.output / "edges.gif", fps=sample.fps, enlarge=model.config.save.enlarge)
    model(first, prompt, seed=1).save(given.output / "without.gif")
    with controlled(model.unet, adapter):
        print(model(first, prompt, seed=1).save(given.output / "with.gif"))


if __name__ == "__main__":
    main()
