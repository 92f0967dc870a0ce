"""The UNet against the official results, and planted mistakes that must be caught."""

import dataclasses
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

from i2vgen.model import attention, conditioning, layers, spatial, temporal, unet
from i2vgen.parity import unet as parity
from i2vgen.parity.report import Golden, Settings
from weights_conversion import unet_vgen

GOLDENS = Path(__file__).parents[1] / "goldens"
CASES = ("base", "variant", "lowvar", "batch2", "f1", "wide")


@pytest.fixture(scope="module", autouse=True)
def _weights_made_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "grid_weight", cache(parity.grid_weight))
        yield


def rows(case, dtype=torch.float64, gradients=True):
    golden = Golden(GOLDENS / f"vgen_unet_{case}.safetensors")
    if not gradients:
        golden.names = [name for name in golden if not name.startswith("grads/")]
    return {row.name: row for row in parity.run(golden, Settings(dtype))}


def failed(case, gradients=True):
    return {name for name, row in rows(case, gradients=gradients).items() if not row.passed}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_parity(case, dtype):
    seen = rows(case, dtype)
    assert len(seen) >= 15 and "acts/concat" in seen
    assert not [row for row in seen.values() if not row.passed]
    if (
        dtype == torch.float64
    ):  # the bound of the kind allows for float32 tables, which this case does not have
        assert seen["out_fp64"].relative_l2 <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_stays_close(dtype):
    assert not [row for row in rows("lowvar", dtype).values() if not row.passed]


def test_the_two_attention_backends_agree(monkeypatch):
    monkeypatch.setattr(parity, "UNet", partial(unet.UNet, backend="math"))
    assert rows("lowvar")["out_fp64"].relative_l2 <= 1e-12


# Each mistake is a plausible slip in one line. In float64 it must change the output of the given cases, the
# cheapest that can show it. `lowvar` has variances near the norms' epsilons, but its output does not depend
# on the timestep (its groups are single channels), so mistakes in the embedding are planted in `variant`.


def _set(module, name, value):
    return lambda patch: patch.setattr(module, name, value)


def _all(*plants):
    def plant(patch):
        for one in plants:
            one(patch)

    return plant


def _settings(section, **changed):
    """The golden's network with other settings; `section` 0 is the UNet's, 1 the switches."""
    right = unet_vgen.settings

    def settings(arguments):
        made = list(right(arguments))
        made[section] = dataclasses.replace(made[section], **changed)
        return tuple(made)

    return _set(unet_vgen, "settings", settings)


def _prepared(change):
    """Change what the stem prepares."""
    right = conditioning.ConditionStem.prepare
    return _set(
        conditioning.ConditionStem,
        "prepare",
        lambda self, conditions, frames, dtype: change(right(self, conditions, frames, dtype)),
    )


def _sinusoid(wrong):
    return _all(*(_set(module, "sinusoid", wrong) for module in (unet, conditioning)))


def _sine_first(value, width, formula="pow"):
    cosines, sines = layers.sinusoid(value, width, formula).chunk(2, dim=-1)
    return torch.cat([sines, cosines], dim=-1)


def _divisor_half_minus_one(value, width, formula="pow"):
    half = width // 2
    angles = value.float()[:, None] * torch.pow(10000, -torch.arange(half).float() / (half - 1))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _sinusoid_of_a_fraction(value, width, formula="pow"):
    return layers.sinusoid(value / 1000, width, formula)


def _planes(position):
    """Frame k > 0 holds `position(k, f)`."""
    right = conditioning.frame_planes

    def frame_planes(latent, frames, rounding="float32"):
        planes = right(latent, frames, rounding).clone()
        for k in range(1, frames):
            planes[:, k] = position(k, frames)
        return planes

    return _set(conditioning, "frame_planes", frame_planes)


def _later_latents(patch):
    """Use every frame of `local_image`, as the 5-D argument of the official class suggests."""
    latents = Golden(GOLDENS / "vgen_unet_variant.safetensors")["inputs/local_image"]
    patch.setattr(
        conditioning,
        "frame_planes",
        lambda latent, frames, rounding: rearrange(latents, "b c f h w -> b f h w c").to(latent.dtype),
    )


def _norm_before_small_feed_forward(self, x):
    x = x + self.attention(self.norm(x))
    return x + self.linear2(F.gelu(self.linear1(F.layer_norm(x, x.shape[-1:]))))


def _gated_small_feed_forward(self, x):
    x = x + self.attention(self.norm(x))
    return x + self.linear2(F.silu(self.linear1(x)))


def _bilinear(x, size):
    return F.interpolate(x, (size, size), mode="bilinear")


def _halves_swapped(self, x):
    gate, value = self.proj_in(x).chunk(2, dim=-1)
    return self.proj_out(value * F.gelu(gate))


def _norm_per_frame(eps):
    """The norms of `temporal.py` with this epsilon: of a transformer's input, or of a convolution."""

    class PerFrame(layers.GroupNorm):
        def forward(self, x):
            if self.eps != eps:
                return super().forward(x)
            return super().forward(x.flatten(0, 1).flatten(1, -2)[:, None]).reshape(x.shape)

    return _set(temporal, "GroupNorm", PerFrame)


def _res_block(activate=F.silu, spread=None):
    """The ResBlock with another activation before the embedding's projection, or another broadcast of it."""

    def forward(self, x, embedding):
        b, f = x.shape[:2]
        y = layers.per_frame(self.conv1, F.silu(layers.per_frame(self.norm1, x)))
        shift = self.embedding(activate(embedding))
        shift = repeat(shift, "b c -> b f c", f=f) if spread is None else spread(shift, b, f)
        y = y + shift[:, :, None, None]
        y = layers.per_frame(self.conv2, F.silu(layers.per_frame(self.norm2, y)))
        return layers.per_frame(self.skip, x) + y

    return _set(spatial.ResBlock, "forward", forward)


def _samples_fastest(shift, b, f):
    return repeat(shift, "b c -> (f b) c", f=f).unflatten(0, (b, f))


class _Torch:
    """`torch` with another `cat`, for one module."""

    def __init__(self, cat):
        self.cat = cat

    def __getattr__(self, name):
        return getattr(torch, name)


def _cat(module, wanted):
    """Concatenate lists of tensors for which `wanted` holds in reverse order."""
    return _set(
        module, "torch", _Torch(lambda parts, dim: torch.cat(parts[::-1] if wanted(parts) else parts, dim))
    )


def _spatial_last(self, x, embedding, context):
    x = self.res(x, embedding)
    for part, inputs in ((self.temporal_conv, ()), (self.temporal, ()), (self.spatial, (context,))):
        x = x if part is None else part(x, *inputs)
    return x


def _temporal_convolution_last(self, x, embedding, context):
    x = self.res(x, embedding)
    for part, inputs in ((self.spatial, (context,)), (self.temporal, ()), (self.temporal_conv, ())):
        x = x if part is None else part(x, *inputs)
    return x


def _one_attention(right):
    def forward(self, x):
        self.attention2, second = None, self.attention2
        y = right(self, x)
        self.attention2 = second
        return y

    return forward


def _no_scale(q, k, v, backend):
    return F.scaled_dot_product_attention(q, k, v, scale=1.0)


def _more_heads(patch):
    right = attention.Attention.__init__

    def init(self, width, context_width, heads, head_width, **named):
        right(self, width, context_width, 2 * heads, head_width // 2, **named)

    patch.setattr(attention.Attention, "__init__", init)


def _zero_y_whole(patch):
    right = parity._conditions

    def conditions(inputs):
        return right(inputs)._replace(text=inputs["zero_y"].expand(len(inputs["x"]), -1, -1))

    patch.setattr(parity, "_conditions", conditions)


def _edge_frames_repeated(self, x):
    y = self.dropout(F.silu(self.norm(x)))
    y = torch.cat([y[:, :1], y, y[:, -1:]], dim=1)
    return self.conv(y)[:, 1:-1]


def _padded_at_one_end(self, x):
    frames = F.pad(rearrange(x.flatten(0, 1), "n h w c -> n c h w"), (0, 1, 0, 1))
    y = F.conv2d(frames, self.conv.weight, self.conv.bias, stride=2)
    return rearrange(y, "n c h w -> n h w c").unflatten(0, x.shape[:2])


def _bilinear_twice(x):
    frames = rearrange(x.flatten(0, 1), "n h w c -> n c h w")
    larger = F.interpolate(frames, scale_factor=2, mode="bilinear")
    return rearrange(larger, "n c h w -> n h w c").unflatten(0, x.shape[:2])


LATENT_CHANNELS = 4
MISTAKES = {
    "concat gain 1": (_settings(1, concat_gain=1.0), ("lowvar", "variant")),
    "sine before cosine": (_sinusoid(_sine_first), ("variant",)),
    "frequency divisor half - 1": (_sinusoid(_divisor_half_minus_one), ("variant",)),
    "timestep as a fraction": (_sinusoid(_sinusoid_of_a_fraction), ("variant",)),
    "fps left out": (
        _prepared(lambda p: p._replace(fps_embedding=torch.zeros_like(p.fps_embedding))),
        ("variant",),
    ),
    "embedding repeated with samples fastest": (_res_block(spread=_samples_fastest), ("variant",)),
    "later local_image frames used": (_later_latents, ("variant",)),
    "planes (k - 1) / (f - 1)": (_planes(lambda k, f: (k - 1) / (f - 1)), ("lowvar", "variant")),
    "planes k / f": (_planes(lambda k, f: k / f), ("lowvar", "variant")),
    "norm before the small feed-forward": (
        _set(temporal.FrameEncoderLayer, "forward", _norm_before_small_feed_forward),
        ("lowvar", "variant"),
    ),
    "SiLU in the small feed-forward": (
        _set(temporal.FrameEncoderLayer, "forward", _gated_small_feed_forward),
        ("lowvar",),
    ),
    "bilinear instead of adaptive pool": (_set(F, "adaptive_avg_pool2d", _bilinear), ("lowvar", "variant")),
    "GEGLU halves swapped": (_set(layers.FeedForward, "forward", _halves_swapped), ("lowvar", "variant")),
    "tanh GELU": (_set(F, "gelu", partial(F.gelu, approximate="tanh")), ("variant",)),
    "temporal transformer norm per frame": (_norm_per_frame(layers.TRANSFORMER_EPS), ("lowvar", "variant")),
    "temporal convolution norm per frame": (_norm_per_frame(layers.RES_EPS), ("lowvar", "variant")),
    "group norm eps all 1e-5": (
        _all(*(_set(module, "TRANSFORMER_EPS", 1e-5) for module in (spatial, temporal))),
        ("lowvar",),
    ),
    "group norm eps all 1e-6": (
        _all(*(_set(module, "RES_EPS", 1e-6) for module in (spatial, temporal, unet))),
        ("lowvar", "variant"),
    ),
    "eps of the spatial transformer": (_set(spatial, "TRANSFORMER_EPS", 1e-5), ("lowvar",)),
    "eps of the temporal transformer": (_set(temporal, "TRANSFORMER_EPS", 1e-5), ("lowvar",)),
    "eps of the ResBlock": (_set(spatial, "RES_EPS", 1e-6), ("lowvar",)),
    "eps of the temporal convolution": (_set(temporal, "RES_EPS", 1e-6), ("lowvar",)),
    "eps of the head": (_set(unet, "RES_EPS", 1e-6), ("lowvar",)),
    "layer norm eps 1e-6": (_set(nn, "LayerNorm", partial(nn.LayerNorm, eps=1e-6)), ("lowvar", "variant")),
    "no SiLU before the embedding's projection": (_res_block(activate=lambda e: e), ("variant",)),
    "skip before current": (
        _cat(unet, lambda parts: parts[1].shape[-1] > LATENT_CHANNELS),
        ("lowvar", "variant"),
    ),
    "picture channels before noise": (
        _cat(unet, lambda parts: parts[1].shape[-1] == LATENT_CHANNELS),
        ("lowvar",),
    ),
    "whole zero_y": (_zero_y_whole, ("variant",)),
    "spatial after temporal": (_set(unet.Block, "forward", _spatial_last), ("lowvar",)),
    "temporal convolution last": (_set(unet.Block, "forward", _temporal_convolution_last), ("lowvar",)),
    "second temporal attention left out": (
        _set(temporal.TemporalTransformer, "forward", _one_attention(temporal.TemporalTransformer.forward)),
        ("lowvar",),
    ),
    "attention without its scale": (_set(attention, "attend", _no_scale), ("lowvar",)),
    "twice the heads of half the width": (_more_heads, ("lowvar",)),
    "edge frames repeated, not zero": (
        _set(temporal.ConvStage, "forward", _edge_frames_repeated),
        ("lowvar",),
    ),
    "downsampling padded on one side": (_set(spatial.Downsample, "forward", _padded_at_one_end), ("lowvar",)),
    "bilinear upsampling": (_set(spatial, "nearest_twice", _bilinear_twice), ("lowvar",)),
}


@pytest.mark.parametrize(
    ("mistake", "case"), [(name, case) for name, (_, cases) in MISTAKES.items() for case in cases]
)
def test_planted_mistakes_are_caught(mistake, case, monkeypatch):
    MISTAKES[mistake][0](monkeypatch)
    assert "out_fp64" in failed(case, gradients=False)


def test_only_the_stored_context_shows_the_order_of_its_tokens(monkeypatch):
    _cat(conditioning, lambda parts: parts[0].ndim == 3)(monkeypatch)  # text, local, global, all [b k d]
    assert failed("wide") == {"acts/context"}


def test_only_gradients_show_a_detached_branch(monkeypatch):
    _prepared(lambda p: p._replace(concat=p.concat.detach()))(monkeypatch)
    names = failed("variant")
    assert names and all(name.startswith("grads/") for name in names)


def test_weights_by_another_formula_are_refused(monkeypatch):
    right = parity.grid_weight
    monkeypatch.setattr(
        parity, "grid_weight", lambda key, shape, seed, exponent: right(key, shape, seed + 1, exponent)
    )
    assert {"weights", "out_fp64"} <= failed("lowvar")
