"""Training a module of one's own beside a model that stays as it is, on clips of the procedural world.

    settings = Train(steps=400, batch=4, learning_rate=2e-3)
    for step, loss in train_beside(model, adapter, attached, settings):
        ...

`attached(clips)` attaches the module for these clips: a context manager, such as `taps.controlled` or
`extra_tokens`. Of the settings those of a loss count and the three above; a longer training with checkpoints
is `scripts/train.py`.
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


def train_beside(
    model: I2VGenXL,
    module: nn.Module,
    attached: Callable[[drawing.Batch], AbstractContextManager],
    train: Train,
) -> Iterator[tuple[int, float]]:
    """Clips of one object, by AdamW -> after each step its number, from 0 on, and its loss.

    ValueError for `text_encoder`: the model stays as it is, its text tower too.
    """
    if train.text_encoder:
        raise ValueError("text_encoder teaches the model's text tower, but here only the module learns")
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
