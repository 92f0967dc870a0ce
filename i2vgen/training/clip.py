"""CLIP's training step: contrastive loss between first frames and captions, on open_clip's two towers.

Each process contrasts its own batch only. Axes: b batch, k context tokens, s side of CLIP's picture.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from i2vgen.model.clip import ClipEncoders
from i2vgen.settings.config import Config
from i2vgen.training.data import Clips, Source
from i2vgen.training.diffusion import clip_pixels, load_or_create, other_parts
from i2vgen.training.loop import Part
from i2vgen.training.settings import Train

MAX_LOGIT_SCALE = math.log(100)  # Radford et al. 2021, section 2.5


class ClipLoss(nn.Module):
    """CLIP and its loss as one module, because data parallelism wraps a single forward."""

    def __init__(self, clip: ClipEncoders, train: Train):
        super().__init__()
        self.clip, self.words = clip, train.clip_words

    def forward(self, pixels: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """pixels [b 3 s s], tokens int64 [b k] -> {"loss", "accuracy", "words": scalars}

        Symmetric cross entropy between the pictures and captions of the batch (Radford et al. 2021, figure
        3), plus `train.clip_words` times `word_loss`.
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
        """int64 [b k] -> scalar: cross entropy of predicting each word from the UNet's token for it.

        Plus the KL divergence of predicting any of the words from each token of the padding, which is most
        of what the UNet reads: 0 if all are equally likely. No first frame shows "left" or "right", so the
        contrastive loss alone forgets such words.
        """
        read = (self.clip.text(tokens) @ self.clip.model.token_embedding.weight.T).float()
        end = tokens.argmax(dim=1, keepdim=True)
        place = torch.arange(tokens.shape[1], device=tokens.device)
        loss = F.cross_entropy(read[place <= end], tokens[place <= end])
        padding = place > end
        if padding.any():
            words = ((place > 0) & (place < end)).float()
            words = words / words.sum(1, keepdim=True).clamp(min=1)  # a caption without words asks for none
            share = torch.zeros_like(read[:, 0]).scatter_add_(1, tokens, words)
            wanted = share.repeat_interleave(padding.sum(1), dim=0)
            loss = loss + F.kl_div(read[padding].log_softmax(dim=-1), wanted, reduction="batchmean")
        return loss


def make(config: Config, train: Train, source: Source, device: torch.device) -> Part:
    """CLIP of `weights=`, or a new one, with its loss and inputs."""
    clip = load_or_create("clip", config, train, device)
    if train.clip_unread:
        freeze_what_the_unet_reads(clip)

    def inputs(clips: Clips, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        captions = [drop_words(caption, train.word_dropout, draw) for caption in clips.captions]
        tokens = clip.tokenize(captions)
        return clip_pixels(clips.pixels[:, :, 0], config).to(device), tokens.to(device)

    return Part(
        name="clip", model=clip, step=ClipLoss(clip, train), inputs=inputs, others=other_parts("clip", config)
    )


def freeze_what_the_unet_reads(clip: ClipEncoders) -> None:
    """Train only what no UNet reads: the last text blocks, the text projection and the logit scale."""
    model, read = clip.model, set(clip.text_blocks())
    clip.requires_grad_(False)
    for part in (*(b for b in model.transformer.resblocks if b not in read), model.text_projection):
        part.requires_grad_(True)
    model.logit_scale.requires_grad_(True)


def drop_words(caption: str, probability: float, draw: torch.Generator) -> str:
    """Drop each word with this probability; a caption that would lose all its words is unchanged."""
    words = caption.split()
    keep = torch.rand(len(words), generator=draw) >= probability
    return " ".join(word for word, kept in zip(words, keep.tolist(), strict=True) if kept) or caption
