"""Kinds `pipeline_vae` and `pipeline_clip`: both frozen encoders, stage by stage.

Axes: n frames, c channels, h w rows and columns, d width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from i2vgen.files import checkpoint
from i2vgen.model.clip import ClipEncoders
from i2vgen.model.vae import AutoencoderKL, Posterior
from i2vgen.parity.report import Golden, Row, Settings, check, compare
from i2vgen.parity.weights import fan_in_weight, fingerprint
from i2vgen.settings import config
from weights_conversion import rules
from weights_conversion import vae as vae_tables

# Absolute tolerances of the goldens' README for float32. They hold for float64 too, because the goldens are
# float32.
VAE_ABS = {torch.float64: 3e-5, torch.float32: 3e-5, torch.float16: 0.1, torch.bfloat16: 0.8}
CLIP_ABS = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 0.03, torch.bfloat16: 0.25}


def build_vae(
    ddconfig: Mapping[str, Any], embed_dim: int, scale: float, seed: int, settings: Settings
) -> tuple[AutoencoderKL, list[rules.Row], dict[str, Tensor]]:
    """-> our autoencoder with the golden's weights, the mapping used, the weights under official names."""
    vae = vae_tables.settings(ddconfig, embed_dim, scale)
    model = checkpoint.build("vae", _config_with(vae=vae, embed_dim=embed_dim))
    mapping = vae_tables.rows(vae)
    shapes = rules.to_theirs(mapping, model.state_dict())
    theirs = {key: fan_in_weight(key, tuple(t.shape), seed) for key, t in shapes.items()}
    checkpoint.fill(model, rules.to_ours(mapping, theirs), device=settings.device, dtype=settings.dtype)
    return model.eval().requires_grad_(False), mapping, theirs


def build_clip(
    card: Mapping[str, Any], quick_gelu: bool, seed: int, settings: Settings
) -> tuple[ClipEncoders, dict[str, Tensor]]:
    """-> our CLIP encoders with the golden's weights, and those weights (we use open_clip's names)."""
    clip = config.Clip(
        embed_dim=card["embed_dim"], vision=card["vision_cfg"], text=card["text_cfg"], quick_gelu=quick_gelu
    )
    with torch.device("meta"):
        model = ClipEncoders(clip)
    shapes = checkpoint.inner(model).state_dict()
    state = {key: fan_in_weight(key, tuple(t.shape), seed) for key, t in shapes.items()}
    checkpoint.fill(model, state, device=settings.device, dtype=settings.dtype)
    return model.eval().requires_grad_(False), state


@torch.no_grad()
def vae(golden: Golden, settings: Settings) -> Iterator[Row]:
    """Encoder, posterior, decoder and stored activations for each size, and the clamp of the log variance."""
    meta, bound = golden.config, VAE_ABS[settings.dtype]
    model, mapping, theirs = build_vae(
        meta["ddconfig"], meta["embed_dim"], meta["scale_factor"], meta["weight_seed"], settings
    )
    yield check("weights", fingerprint(theirs) == meta["state_dict_sha256"], "SHA-256 of the golden")
    if "n_params" in meta:
        count = sum(t.numel() for t in theirs.values())
        yield check("parameters", count == meta["n_params"], f"{meta['n_params']}")
    ours = {row.theirs.removesuffix(".weight"): row.ours[0].removesuffix(".weight") for row in mapping}

    for case in meta["cases"]:
        seen: dict[str, Tensor] = {}
        handles = [m.register_forward_hook(_keep(seen, name)) for name, m in model.named_modules()]
        pixels = settings.cast(golden[f"{case}.input"])
        moments = model.moments(pixels)
        posterior = Posterior.from_moments(moments)
        found = {
            "moments": moments,
            "mean": posterior.mean,
            "mode": posterior.mean,
            "logvar": posterior.log_variance,
            "std": posterior.std,
            "kl": posterior.kl(),
            "latent_scaled": model.encode(pixels, settings.cast(golden[f"{case}.sample_noise"])),
        }
        # The decoder starts from the golden's latent, so that errors of the encoder do not affect it.
        latent = settings.cast(golden[f"{case}.latent_scaled"])
        found["decode_in"] = latent / model.scale
        found["decoded"] = model.decode(latent)
        for handle in handles:
            handle.remove()
        for name, got in found.items():
            if f"{case}.{name}" in golden:
                # The KL is a sum over the whole latent, so its bound is relative.
                relative = 1e-5 if settings.dtype in (torch.float32, torch.float64) else 0.2
                limits = {"relative_l2": relative} if name == "kl" else {"max_abs": bound}
                yield compare(f"{case}.{name}", got, golden[f"{case}.{name}"], **limits)
        yield compare(
            f"{case}.decoded in chunks of 1", model.decode(latent, chunk=1), found["decoded"], max_abs=bound
        )
        for side in ("enc", "dec"):
            prefix = f"{case}.{side}."
            for name in sorted(n for n in golden if n.startswith(prefix)):
                module = _our_module(name.removeprefix(prefix), ours)
                if module in seen:
                    got = rearrange(seen[module], "n h w c -> n c h w")
                    yield compare(name, got, golden[name], max_abs=bound)
    if "clamp.parameters" in golden:
        parameters = settings.cast(golden["clamp.parameters"])
        wide = torch.promote_types(parameters.dtype, torch.float32)  # exp(20) overflows float16
        posterior = Posterior.from_moments(parameters.to(wide))
        for name, got in (
            ("logvar", posterior.log_variance),
            ("std", posterior.std),
            ("var", posterior.std**2),
        ):
            yield compare(f"clamp.{name}", got, golden[f"clamp.{name}"], relative_l2=max(1e-6, bound / 10))


def _our_module(theirs: str, ours: Mapping[str, str]) -> str | None:
    """An official module path -> ours: a leaf through the table, a block through one of its leaves."""
    if theirs in ours:
        return ours[theirs]
    inside = next((name for name in ours if name.startswith(theirs + ".")), None)
    if inside is None:
        return None
    below = inside.removeprefix(theirs).count(".")
    return ours[inside].rsplit(".", below)[0]


@torch.no_grad()
def clip(golden: Golden, settings: Settings) -> Iterator[Row]:
    """Token ids (exactly), text tokens, pooled vectors, image vectors and blocks of the towers."""
    meta, bound = golden.config, CLIP_ABS[settings.dtype]
    model, state = build_clip(meta["clip_config"], meta["quick_gelu"], meta["weight_seed"], settings)
    yield check("weights", fingerprint(state) == meta["state_dict_sha256"], "SHA-256 of the golden")
    tokens = model.tokenizer(meta["prompts"])
    yield compare("tokens", tokens, golden["tokens"], exact=True)

    seen: dict[str, Tensor] = {}
    handles = [m.register_forward_hook(_keep(seen, name)) for name, m in model.model.named_modules()]
    penultimate = model.text(golden["tokens"].to(settings.device))
    vector = model.image(settings.cast(golden["image_in"]))
    for handle in handles:
        handle.remove()
    yield compare("text_tokens_penultimate", penultimate, golden["text_tokens_penultimate"], max_abs=bound)
    yield compare("image_embed", vector, golden["image_embed"], max_abs=bound)
    taps = {f"tap.text.block.{n}": f"transformer.resblocks.{n}" for n in range(64)}
    taps |= {f"tap.vision.block.{n}": f"visual.transformer.resblocks.{n}" for n in range(64)}
    taps |= {f"tap.vision.{n}": f"visual.{n}" for n in ("ln_pre", "ln_post")}
    for name, module in taps.items():
        if name in golden and module in seen:
            yield from _stored_samples(name, seen[module], golden[name], bound)

    last = _with_layer(model, "last").text(golden["tokens"].to(settings.device))
    if "text_tokens_last" in golden:
        stored = golden["text_tokens_last"]
        yield compare("text_tokens_last", last[: len(stored)], stored, max_abs=bound)
    for name, features in (("text_pooled_penultimate", penultimate), ("text_pooled_last", last)):
        if name in golden:
            stored = golden[name]
            ends = golden["tokens"].argmax(dim=-1)
            pooled = features[torch.arange(len(ends)), ends] @ model.model.text_projection
            yield compare(name, pooled[: len(stored)], stored, max_abs=bound)


def _stored_samples(name: str, got: Tensor, stored: Tensor, bound: float) -> Iterator[Row]:
    """Compare an activation stored for some samples only: each with the nearest of ours."""
    got = got[:, 0] if got.ndim == stored.ndim + 1 else got
    for i, row in enumerate(stored):
        if row.shape != got.shape[1:]:  # ln_post after pooling: [1, d] against tokens
            row = row.reshape(got.shape[1:]) if row.numel() == got[0].numel() else row
        nearest = min(got, key=lambda g, row=row: (g.double().cpu() - row.double()).abs().max().item())
        yield compare(f"{name}[{i}]", nearest, row, max_abs=bound)


def _with_layer(model: ClipEncoders, layer: str) -> ClipEncoders:
    """The same model with another text layer as its output."""
    other = ClipEncoders.__new__(ClipEncoders)
    nn.Module.__init__(other)
    other.tokenizer, other.model = model.tokenizer, model.model
    card = model.settings
    other.settings = config.Clip(
        embed_dim=card.embed_dim,
        vision=card.vision,
        text=card.text,
        quick_gelu=card.quick_gelu,
        text_layer=layer,
    )
    return other


def _config_with(*, vae: config.VAE, embed_dim: int) -> config.Config:
    """A valid configuration with this autoencoder; the other parts are not built."""
    unet = config.UNet(in_channels=embed_dim, image_channels=embed_dim)
    size = vae.factor * unet.factor
    return config.Config(unet=unet, vae=vae, sample=config.Sample(width=size, height=size))


def _keep(seen: dict[str, Tensor], name: str):
    def hook(module: nn.Module, inputs, output) -> None:
        if isinstance(output, Tensor):
            seen[name] = output

    return hook
