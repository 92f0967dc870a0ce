"""Control the motion with four numbers instead of words, through a small projection to context tokens.

    python examples/extra_tokens.py outputs/tokens steps=200

Trains a projection from dx, dy, growth and rotation to two tokens, and the keys and values with which
cross-attention reads them, on clips of the procedural world with one object and no caption. The model itself
stays frozen. Writes OUT/tokens.safetensors, and still.gif, right.gif, up.gif, grow.gif and between.gif of one
picture to OUT.

A step takes a third of a second on one CPU core. After 160 steps, direction and growth were followed, while
"still" still drifted.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import i2vgen
from i2vgen.adapt.extra_tokens import Beside, extra_tokens
from i2vgen.training.frozen_model import train_on_frozen_model
from i2vgen.training.settings import Train
from i2vgen.world import drawing

MOTIONS = {"still": (0, 0, 0, 0), "right": (0.5, 0, 0, 0), "up": (0, -0.5, 0, 0), "grow": (0, 0, 0.4, 0)}
MOTIONS["between"] = (0.4, 0, 0.4, 0)  # right and growing, which the world never combines


class MotionTokens(nn.Module):
    """Four numbers [b 4] -> tokens [b k d], and the keys and values that read them"""

    def __init__(self, unet, width=64, count=2):
        super().__init__()
        self.beside = Beside(unet, width=width)
        out = nn.Linear(128, count * width)
        self.project = nn.Sequential(nn.Linear(4, 128), nn.SiLU(), out, nn.Unflatten(1, (count, width)))


def numbers(facts):
    """An object's shift in half pictures, log of its growth, rotation in radians -> [4]"""
    x, y, radius, angle = drawing.track(facts.things[0], facts.moves[0], facts.camera, np.array([0.0, 1.0]))
    four = (x[1] - x[0], y[1] - y[0], np.log(radius[1] / radius[0]), np.radians(angle[1] - angle[0]))
    return torch.tensor(four, dtype=torch.float32)


def train(model, tokens, steps):
    def attached(clips):
        given = torch.stack([numbers(facts) for facts in clips.facts]).to(model.device)
        return extra_tokens(model.unet, tokens.project(given), through=tokens.beside)

    # No captions, so only the numbers convey the motion; mostly noisy timesteps, which decide it.
    settings = Train(steps=steps, batch=4, learning_rate=1e-2, timestep_power=4.0, text_dropout=1.0)
    for step, loss in train_on_frozen_model(model, tokens, attached, settings):
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step + 1} of {steps}: loss {loss:.4f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("settings", nargs="*", help="steps=200")
    given = parser.parse_args()
    steps = int(dict(s.split("=") for s in given.settings).get("steps", 200))
    torch.manual_seed(0)
    model = i2vgen.load("lab")
    tokens = MotionTokens(model.unet).to(model.device)
    train(model, tokens, steps)
    given.output.mkdir(parents=True, exist_ok=True)
    save_file(tokens.state_dict(), given.output / "tokens.safetensors")

    seed = next(s for s in range(99) if drawing.sample_facts(s, kind="basic").moves[0].kind == "still")
    sample = model.config.sample
    clip = drawing.clip(seed, width=sample.width, height=sample.height, frames=1, kind="basic")
    for name, four in MOTIONS.items():
        with torch.no_grad():
            projected = tokens.project(torch.tensor([four], dtype=torch.float32, device=model.device))
        with extra_tokens(model.unet, projected, through=tokens.beside):
            print(model(Image.fromarray(clip.frames[0]), "", seed=1).save(given.output / f"{name}.gif"))


if __name__ == "__main__":
    main()
