"""Autoencoder and CLIP towers against the official results, and planted mistakes that must be caught."""

from functools import cache
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F

from i2vgen.model import clip, vae
from i2vgen.model.clip import ClipEncoders
from i2vgen.parity import encoders as parity
from i2vgen.parity.report import Golden, Settings
from i2vgen.settings import config

GOLDENS = Path(__file__).parents[1] / "goldens"
KINDS = {"pipeline_vae": parity.vae, "pipeline_clip": parity.clip}


@pytest.fixture(scope="module", autouse=True)
def _weights_made_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "fan_in_weight", cache(parity.fan_in_weight))
        yield


def rows(kind, dtype=torch.float32):
    return KINDS[kind](Golden(GOLDENS / f"{kind}.safetensors"), Settings(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_parity(kind, dtype):
    seen = list(rows(kind, dtype))
    assert len(seen) > 15
    assert not [row for row in seen if not row.passed]


# Each mistake is a plausible slip in one line; at least one row of its kind must fail.


def _set(module, name, value):
    return lambda patch: patch.setattr(module, name, value)


def _in(module, name, change):
    return lambda patch: patch.setattr(module, name, change(getattr(module, name)))


def _padded_all_round(self, x):
    return self.conv(F.pad(x, (0, 0, 1, 1, 1, 1)))


def _decoder_without_attention(self, x):
    x = self.mid.block2(self.mid.block1(self.conv_in(x)))
    for level in reversed(self.up):
        x = level(x)
    return self.conv_out(F.silu(self.norm_out(x)))


def _halves_swapped(right):
    return lambda moments: right(torch.cat(moments.chunk(2, dim=1)[::-1], dim=1))


def _bilinear_twice(x):
    larger = F.interpolate(x.movedim(-1, 1), scale_factor=2, mode="bilinear")
    return larger.movedim(1, -1)


def _without_final_norm(self, tokens):
    x = self.model.token_embedding(tokens) + self.model.positional_embedding
    for block in self.model.transformer.resblocks[:-1]:
        x = block(x, attn_mask=self.model.attn_mask)
    return x


def _padded_with_the_end(right):
    def call(self, texts, context_length=None):
        tokens = right(self, texts, context_length)
        ends = tokens.argmax(dim=-1, keepdim=True)
        return tokens.masked_fill(torch.arange(tokens.shape[1]) > ends, self.eot_token_id)

    return call


def _cut_without_end(right):
    def call(self, texts, context_length=None):
        tokens = right(self, texts, context_length)
        full = tokens[:, -1] == self.eot_token_id
        tokens[full, -1] = tokens[full, -2]
        return tokens

    return call


def _clip(**changed):
    right = config.Clip
    return _set(config, "Clip", lambda **named: right(**{**named, **changed}))


VAE, CLIP = "pipeline_vae", "pipeline_clip"
MISTAKES = {
    "downsampling padded all round": (VAE, _set(vae.Downsample, "forward", _padded_all_round)),
    "group norm eps 1e-5": (VAE, _set(vae, "TRANSFORMER_EPS", 1e-5)),
    "log-variance not clamped": (VAE, _set(vae, "LOG_VARIANCE_RANGE", (-torch.inf, torch.inf))),
    "standard deviation without its half": (
        VAE,
        _set(vae.Posterior, "std", property(lambda self: self.log_variance.exp())),
    ),
    "moments swapped": (VAE, _in(vae.Posterior, "from_moments", _halves_swapped)),
    "encoding scaled twice": (
        VAE,
        _in(vae.AutoencoderKL, "encode", lambda f: lambda self, *a, **k: self.scale * f(self, *a, **k)),
    ),
    "decoding scaled twice": (
        VAE,
        _in(vae.AutoencoderKL, "decode", lambda f: lambda self, z, **k: f(self, z / self.scale, **k)),
    ),
    "decoding not scaled": (
        VAE,
        _in(vae.AutoencoderKL, "decode", lambda f: lambda self, z, **k: f(self, z * self.scale, **k)),
    ),
    "decoder without attention": (VAE, _set(vae.Decoder, "forward", _decoder_without_attention)),
    "attention without its scale": (
        VAE,
        _set(vae, "attend", lambda q, k, v, backend: F.scaled_dot_product_attention(q, k, v, scale=1.0)),
    ),
    "bilinear upsampling": (VAE, _set(vae, "nearest_twice", _bilinear_twice)),
    "last layer": (CLIP, _clip(text_layer="last")),
    "final norm forgotten": (CLIP, _set(ClipEncoders, "text", _without_final_norm)),
    "image vector normalised": (
        CLIP,
        _in(ClipEncoders, "image", lambda f: lambda self, pixels: F.normalize(f(self, pixels), dim=-1)),
    ),
    "padded with end-of-text": (CLIP, _in(open_clip.SimpleTokenizer, "__call__", _padded_with_the_end)),
    "cut without end-of-text": (CLIP, _in(open_clip.SimpleTokenizer, "__call__", _cut_without_end)),
    "text not repaired": (
        CLIP,
        _set(clip, "make_tokenizer", lambda c: open_clip.SimpleTokenizer(clean="whitespace")),
    ),
    "no causal mask": (
        CLIP,
        _set(ClipEncoders, "reset_buffers", lambda self: setattr(self.model, "attn_mask", None)),
    ),
    "quick GELU": (CLIP, _clip(quick_gelu=True)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistakes_are_caught(mistake, monkeypatch):
    kind, plant = MISTAKES[mistake]
    plant(monkeypatch)
    assert any(not row.passed for row in rows(kind))


def test_a_long_prompt_is_truncated_as_in_the_official_code_with_a_warning():
    golden = Golden(GOLDENS / "pipeline_clip.safetensors")
    model, _ = parity.build_clip(golden.config["clip_config"], False, seed=5, settings=Settings())
    with pytest.warns(UserWarning, match="CLIP reads 75; this is lost"):
        tokens = model.tokenize(golden.config["prompts"])
    assert torch.equal(tokens, golden["tokens"])
