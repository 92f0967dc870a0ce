"""CLIP's step: first frames and captions of a batch find each other, by open_clip's own two towers.

With several processes each contrasts its own batch. Axes: b batch, k tokens, s side of CLIP's picture.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from i2vgen.model.clip import ClipEncoders
from i2vgen.settings.config import Config
from i2vgen.training.data import Clips, Source
from i2vgen.training.diffusion import clip_pixels, fresh_or_held, others_held
from i2vgen.training.loop import Part
from i2vgen.training.settings import Train

MAX_LOGIT_SCALE = math.log(100)  # Radford et al. 2021, section 2.5


class ClipLoss(nn.Module):
    def __init__(self, clip: ClipEncoders, train: Train):
        super().__init__()
        self.clip, self.words = clip, train.clip_words

    def forward(self, pixels: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """pixels [b 3 s s], tokens int64 [b k] -> {"loss", "accuracy", "words": scalars}

        Symmetric cross entropy between the pictures and captions of the batch, and `train.clip_words` times
        that of reading each word back from the token that the video UNet will be given for it.
        """
        model = self.clip.model
        image = model.encode_image(pixels, normalize=True).float()
        text = model.encode_text(tokens, normalize=True).float()
        logits = model.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp() * image @ text.T
        own = torch.arange(len(logits), device=logits.device)
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        words = self.word_loss(tokens)
        accuracy = (logits.argmax(dim=1) == own).float().mean()
        return {"loss": loss + self.words * words, "accuracy": accuracy, "words": words}

    def word_loss(self, tokens: Tensor) -> Tensor:
        """A first frame tells nothing of "left" or "right", so contrast alone lets such words fade."""
        read = self.clip.text(tokens).float() @ self.clip.model.token_embedding.weight.float().T
        padding = tokens.argmax(dim=1, keepdim=True) < torch.arange(tokens.shape[1], device=tokens.device)
        return F.cross_entropy(read[~padding], tokens[~padding])


def make(config: Config, train: Train, source: Source, device: torch.device) -> Part:
    clip = fresh_or_held("clip", config, train, device)
    if train.clip_unread:
        leave_what_is_read(clip)

    def inputs(clips: Clips, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        captions = [drop_words(caption, train.word_dropout, draw) for caption in clips.captions]
        tokens = clip.tokenize(captions)
        return clip_pixels(clips.pixels[:, :, 0], config).to(device), tokens.to(device)

    return Part(
        name="clip", model=clip, step=ClipLoss(clip, train), inputs=inputs, others=others_held("clip", config)
    )


def leave_what_is_read(clip: ClipEncoders) -> None:
    """Only what no UNet reads goes on learning: the text tower's end and the scale of the comparison."""
    model, read = clip.model, set(clip.text_blocks())
    clip.requires_grad_(False)
    for part in (*(b for b in model.transformer.resblocks if b not in read), model.text_projection):
        part.requires_grad_(True)
    model.logit_scale.requires_grad_(True)


def drop_words(caption: str, probability: float, draw: torch.Generator) -> str:
    """Each word goes with this probability; a caption that would lose all stays as it is."""
    words = caption.split()
    stay = torch.rand(len(words), generator=draw) >= probability
    return " ".join(word for word, stays in zip(words, stay.tolist(), strict=True) if stays) or caption
