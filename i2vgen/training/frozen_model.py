"""Trains a small module attached to a frozen model, on clips of the procedural world.

    settings = Train(steps=400, batch=4, learning_rate=2e-3)
    for step, loss in train_on_frozen_model(model, adapter, attached, settings):
        ...

`attached(clips)` returns a context manager that attaches the module for these clips, such as
`taps.controlled` or `extra_tokens`. Only the three settings above and those of the loss are used. For long
runs with checkpoints, use `i2vgen train`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import nn

from i2vgen.pipeline import I2VGenXL
from i2vgen.training.data import FIRST_TRAINING_SEED, Clips
from i2vgen.training.diffusion import DiffusionLoss, Encoding
from i2vgen.training.settings import Train
from i2vgen.world import drawing


def train_on_frozen_model(
    model: I2VGenXL,
    module: nn.Module,
    attached: Callable[[drawing.Batch], AbstractContextManager],
    train: Train,
) -> Iterator[tuple[int, float]]:
    """Train `module` with AdamW on clips of single objects -> after each step, its number (from 0) and loss.

    ValueError if `train.text_encoder` is set: the whole model is frozen, including its text tower.
    """
    if train.text_encoder:
        raise ValueError("text_encoder trains the model's text tower, but here only the module is trained")
    sample = model.config.sample
    encoding = Encoding(model.config, train, model.vae, model.clip, model.device)
    loss_of = DiffusionLoss(model.unet.requires_grad_(False), model.schedule)
    optimiser = torch.optim.AdamW(module.parameters(), train.learning_rate)
    size = {"width": sample.width, "height": sample.height, "frames": sample.frames}
    for step in range(train.steps):
        first = FIRST_TRAINING_SEED + train.batch * step
        clips = drawing.batch(range(first, first + train.batch), kind="single", **size)
        with torch.no_grad():
            draw = torch.Generator().manual_seed(step)
            inputs = encoding(Clips(clips.clips, clips.captions, sample.fps), draw)
        with attached(clips):
            loss = loss_of(*inputs)["loss"]
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        yield step, loss.item()
