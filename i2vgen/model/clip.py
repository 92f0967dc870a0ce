"""CLIP: prompts to text tokens, a picture to one vector. The only file that knows open_clip.

open_clip takes seconds to import, so it is imported where it is first needed.

Axes: b batch, k tokens, d text width, v joint (image vector) width.
"""

from __future__ import annotations

import functools
import gzip
import itertools
import json
import re
import tempfile
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from i2vgen.settings import config

LONGEST = 200  # characters of a lost end that a warning shows


def unknown_words(text: str, known: Collection[str]) -> list[str]:
    """The words of a text that a vocabulary of one's own lacks; an empty one stands for open_clip's, which
    lacks none."""
    said = dict.fromkeys(re.findall(r"[^\W\d_]+", text.lower()))
    return [word for word in said if known and word not in known]


class ClipEncoders(nn.Module):
    """Both towers of one open_clip model under open_clip's own parameter names."""

    def __init__(self, clip: config.Clip):
        super().__init__()
        open_clip = imported()
        self.settings = clip
        self.tokenizer = make_tokenizer(clip)
        if self.tokenizer.vocab_size > clip.text["vocab_size"]:
            raise ValueError(
                f"clip.text.vocab_size is {clip.text['vocab_size']} but the tokenizer knows "
                f"{self.tokenizer.vocab_size} words; they must match"
            )
        try:
            self.model = open_clip.CLIP(
                clip.embed_dim,
                vision_cfg=open_clip.CLIPVisionCfg(**clip.vision),
                text_cfg=open_clip.CLIPTextCfg(**clip.text),
                quick_gelu=clip.quick_gelu,
            )
        except TypeError as error:  # a dataclass of open_clip's was given a field that it has not
            raise ValueError(f"clip.vision or clip.text is no open_clip configuration: {error}") from error
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """The causal mask is not part of a checkpoint; make it anew after a build on `meta`."""
        if self.model.attn_mask is not None:
            n, device = self.settings.text_length, self.model.positional_embedding.device
            self.model.attn_mask = torch.full((n, n), float("-inf"), device=device).triu(1)

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """-> int64 [b k]: start, tokens, end, padding. A prompt that is too long is cut, with a warning."""
        for prompt in prompts:
            ids = self.tokenizer.encode(prompt)
            room = self.settings.text_length - 2  # start and end of text
            if len(ids) > room:
                lost = self.tokenizer.decode(ids[room:]).strip()
                lost = lost if len(lost) <= LONGEST else f"{lost[:LONGEST]}..."
                warnings.warn(
                    f"the prompt has {len(ids)} tokens and CLIP reads {room}; this is lost: {lost!r}",
                    stacklevel=2,
                )
        tokens = self.tokenizer(list(prompts))
        # The last end-of-text ends it: a prompt may spell that token out, too.
        from_the_right = (tokens.flip(-1) == self.tokenizer.eot_token_id).int().argmax(dim=-1, keepdim=True)
        after = torch.arange(tokens.shape[1]) >= tokens.shape[1] - from_the_right
        return tokens.masked_fill(after, self.settings.pad_token)

    def tell_unknown_words(self, prompt: str) -> None:
        """A note on the words that a vocabulary of one's own (`clip.words`) lacks; open_clip's lacks none."""
        if unknown := unknown_words(prompt, self.settings.words):
            warnings.warn(
                "these weights were trained on a few words (clip.words in their settings.json) and know "
                f"nothing of: {', '.join(unknown)}",
                stacklevel=1,  # from here, so that two stages of one vocabulary say it once
            )

    def text(self, tokens: Tensor) -> Tensor:
        """int64 [b k] -> text tokens [b k d]: penultimate or last block, final norm, no projection."""
        model = self.model
        x = model.token_embedding(tokens) + model.positional_embedding
        for block in self.text_blocks():
            x = block(x, attn_mask=model.attn_mask)
        return model.ln_final(x)

    def text_path(self) -> nn.Module:
        """What `text` goes through, as a module that shares it: all that a reader of tokens can teach."""
        model, path = self.model, nn.Module()
        path.token_embedding, path.positional_embedding = model.token_embedding, model.positional_embedding
        path.blocks, path.ln_final = nn.ModuleList(self.text_blocks()), model.ln_final
        return path

    def text_blocks(self) -> list[nn.Module]:
        blocks = list(self.model.transformer.resblocks)
        return blocks[:-1] if self.settings.text_layer == "penultimate" else blocks

    def image(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [b 3 s s] -> image vectors [b v], projected but not normalised."""
        return self.model.visual(pixels.to(self.dtype))

    def blocks(self) -> list[nn.Module]:
        """The towers' transformer blocks; other kinds of towers have none."""
        from open_clip.transformer import ResidualAttentionBlock

        return [module for module in self.model.modules() if isinstance(module, ResidualAttentionBlock)]

    @property
    def dtype(self) -> torch.dtype:
        return self.model.positional_embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.model.positional_embedding.device


def imported():
    """open_clip, imported outside any device context.

    A first import calculates with tensors (torch 2.6 with open_clip 3.0), which fails on `meta`.
    """
    with torch.device("cpu"):
        import open_clip
    return open_clip


def make_tokenizer(clip: config.Clip):
    """open_clip's byte-pair tokenizer: its own 49,408 tokens, or those of `clip.words`."""
    options = {"context_length": clip.text_length, **(clip.text.get("tokenizer_kwargs") or {})}
    return _tokenizer(json.dumps(options), tuple(clip.words))


@functools.lru_cache(maxsize=8)
def _tokenizer(options: str, words: tuple[str, ...]):
    # Kept, because a vocabulary takes a tenth of a second, and every model is built once on `meta` before.
    open_clip = imported()
    if not words:
        return open_clip.SimpleTokenizer(**json.loads(options))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "merges.txt.gz"
        lines = ["one pair per line", *(" ".join(pair) for pair in merges(words))]
        file.write_bytes(gzip.compress("\n".join(lines).encode()))
        return open_clip.SimpleTokenizer(**json.loads(options), bpe_path=str(file))


def merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte pairs to merge, in this order, so that each of the words ends as one token.

    Every other text still has tokens, down to single bytes. A later word's merges rank behind those that
    made the earlier ones, and so never change them.
    """
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            pairs = list(itertools.pairwise(pieces))
            best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
            ranks.setdefault(best, len(ranks))
            merged = []
            while pieces:
                taken = 2 if tuple(pieces[:2]) == best else 1
                merged.append("".join(pieces[:taken]))
                pieces = pieces[taken:]
            pieces = merged
    return list(ranks)
