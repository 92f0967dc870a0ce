"""Say by four numbers instead of words what moves how: context tokens from a small trained projection.

    python examples/extra_tokens.py outputs/tokens steps=300

Trains dx, dy, growth and turn -> two tokens on clips of the procedural world with one object, all of them
without their captions; the model itself stays as it is. Writes OUT/projection.safetensors, and of one picture
OUT/without.gif, and OUT/right.gif, up.gif, grow.gif and between.gif, each told by its numbers alone.
"""

import argparse
import math
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import i2vgen
from i2vgen.extra_tokens import extra_tokens
from i2vgen.training import world
from i2vgen.training.data import FIRST_TRAINING_SEED, Clips
from i2vgen.training.diffusion import DiffusionLoss, Encoding
from i2vgen.training.settings import Train

# dx, dy, growth, turn; 1 is the way, and the factor's logarithm, of a motion at its usual speed.
TOLD = {"right": (1, 0, 0, 0), "up": (0, -1, 0, 0), "grow": (0, 0, 1, 0), "between": (0.7, 0, 0.7, 0)}


class MotionTokens(nn.Sequential):
    """Four numbers [b 4] -> tokens [b k d]"""

    def __init__(self, width, count=2, hidden=128):
        out = nn.Linear(hidden, count * width)
        super().__init__(nn.Linear(4, hidden), nn.SiLU(), out, nn.Unflatten(1, (count, width)))


def numbers(move):
    """What an object of the world does."""
    if move.kind in ("grow", "shrink"):
        amount = math.log(world.GROWTH[move.speed]) / math.log(world.GROWTH[""])
        return 0.0, 0.0, amount if move.kind == "grow" else -amount, 0.0
    if move.kind == "rotate":
        return 0.0, 0.0, 0.0, world.TURN[move.speed] / world.TURN[""]
    dx, dy = world.DIRECTIONS.get(move.kind, (0.0, 0.0))
    amount = world.TRAVEL[move.speed] / world.TRAVEL[""]
    return amount * dx, amount * dy, 0.0, 0.0


def train(model, project, steps, batch=4, lr=1e-2, power=4.0, beside=None):
    config, sample = model.config, model.config.sample
    size = {"width": sample.width, "height": sample.height, "frames": sample.frames}
    settings = Train(timestep_power=power, text_dropout=1.0)  # no caption: the numbers alone can tell
    encoding = Encoding(config, settings, model.vae, model.clip, model.device)
    loss_of = DiffusionLoss(model.unet.requires_grad_(False), model.schedule)
    ps = [*project.parameters(), *(beside.parameters() if beside else ())]
    optimiser = torch.optim.AdamW(ps, lr)
    for step in range(steps):
        first = FIRST_TRAINING_SEED + batch * step
        clips = world.batch(range(first, first + batch), kind="single", **size)
        with torch.no_grad():
            draw = torch.Generator().manual_seed(step)
            inputs = encoding(Clips(clips.clips, clips.captions, sample.fps), draw)
        told = torch.tensor([numbers(facts.moves[0]) for facts in clips.facts], device=model.device)
        with extra_tokens(model.unet, project(told), through=beside):
            loss = loss_of(*inputs)["loss"]
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step + 1} of {steps}: loss {loss.item():.4f}", flush=True)
