"""The configuration files of a diffusers folder <-> our settings, and the tokenizer's files.

Each model has two functions, `x_settings(their config) -> our section` and `x_config(our settings) -> their
config`. The first fills in what their class hard-codes, the second checks it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from i2vgen.files import whole
from i2vgen.model.clip import make_tokenizer
from i2vgen.settings import config
from weights_conversion import vae as vae_tables

Json = dict[str, Any]

WRITTEN_FOR = "0.27.0"  # the diffusers version named in the configs; every later one reads them
TRAINED_SCALE = 0.18215  # of the autoencoder
CLASSES = {"unet": "I2VGenXLUNet", "vae": "AutoencoderKL"}

# --------------------------------------------------------------------------------- settings, reading


def unet_settings(unet: Mapping[str, Any]) -> Json:
    """unet/config.json, and the values that the class hard-codes -> our `unet` section.

    ValueError for configurations that our UNet cannot express.
    """
    _expect_class(unet, "unet")
    widths = list(unet.get("block_out_channels", (320, 640, 1280, 1280)))
    if not widths or any(width % widths[0] for width in widths):
        raise ValueError(f"unet block_out_channels are {widths}; each should be a multiple of the first")
    default = ["CrossAttnDownBlock3D"] * 3 + ["DownBlock3D"]
    down = list(unet.get("down_block_types", default))
    kinds = {"CrossAttnDownBlock3D": True, "DownBlock3D": False}
    if unknown := [name for name in down if name not in kinds]:
        raise ValueError(f"unet down_block_types hold {unknown[0]}; known are {', '.join(kinds)}")
    up = [name.replace("Down", "Up") for name in reversed(down)]
    if list(unet.get("up_block_types", up)) != up:
        raise ValueError(
            f"unet up_block_types are {unet['up_block_types']}; our up half mirrors the down half: {up}"
        )
    # In the first published version, `num_attention_heads` is the width of a head.
    head_width = unet.get("attention_head_dim") or unet.get("num_attention_heads") or 64
    if isinstance(head_width, list) and len(set(head_width)) == 1:
        head_width = head_width[0]
    if not isinstance(head_width, int):
        raise ValueError(f"unet attention_head_dim is {head_width}; all levels must share one head width")
    if not unet.get("norm_num_groups", 32):
        raise ValueError("unet norm_num_groups is None; our network always has group norms")
    channels, context = unet.get("in_channels", 4), unet.get("cross_attention_dim", 1024)
    return {
        "in_channels": channels,
        "out_channels": unet.get("out_channels", 4),
        "base_width": widths[0],
        "width_multipliers": [width // widths[0] for width in widths],
        "blocks_per_level": unet.get("layers_per_block", 2),
        "attention_levels": [kinds[name] for name in down],
        "head_width": head_width,
        "first_temporal_heads": 8,
        "context_width": context,
        "norm_groups": unet.get("norm_num_groups", 32),
        "image_channels": 4,
        "image_vector_width": context,
        "num_global_tokens": channels,
        "local_grid": 32,
        "local_widths": [8 * channels, 16 * channels],
        "concat_channels": channels,
        "concat_hidden": 4 * channels,
        "concat_layers": 1,
        "concat_heads": 2,
        "concat_head_width": channels,
    }


# Values that an AutoencoderKL must have to be one of ours; they are also the defaults.
VAE_FIXED = {
    "act_fn": "silu",
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
}


def vae_settings(vae: Mapping[str, Any]) -> Json:
    """vae/config.json -> our `vae` section, with the scale as given there."""
    _expect_class(vae, "vae")
    for name, value in VAE_FIXED.items():
        if vae.get(name, value) != value:
            raise ValueError(f"vae {name} is {vae[name]}; our autoencoder has {value}")
    widths = list(vae.get("block_out_channels", (64,)))
    if not widths or any(width % widths[0] for width in widths):
        raise ValueError(f"vae block_out_channels are {widths}; each should be a multiple of the first")
    for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if set(vae.get(name, (kind,))) != {kind}:
            raise ValueError(f"vae {name} are {vae[name]}; ours are all {kind}")
    if vae.get("in_channels", 3) != vae.get("out_channels", 3):
        raise ValueError(
            f"vae in_channels is {vae.get('in_channels', 3)} and out_channels {vae.get('out_channels', 3)}; "
            "our autoencoder requires them to be equal"
        )
    latent = vae.get("latent_channels", 4)
    return {
        "channels": vae.get("in_channels", 3),
        "base_width": widths[0],
        "width_multipliers": [width // widths[0] for width in widths],
        "blocks_per_level": vae.get("layers_per_block", 1),
        "z_channels": latent,
        "embed_dim": latent,
        "norm_groups": vae.get("norm_num_groups", 32),
        "scale": vae.get("scaling_factor", TRAINED_SCALE),
    }


SCHEDULE_KINDS = {"squaredcos_cap_v2": "cosine", "linear": "linear", "scaled_linear": "linear_sd"}
PREDICTIONS = {"v_prediction": "v", "epsilon": "eps", "sample": "x0"}


def schedule_settings(scheduler: Mapping[str, Any]) -> tuple[Json, list[str]]:
    """scheduler_config.json -> our `schedule` section, and notes on what our settings cannot express."""
    kind = scheduler.get("beta_schedule", "linear")
    prediction = scheduler.get("prediction_type", "epsilon")
    if kind not in SCHEDULE_KINDS or prediction not in PREDICTIONS:
        raise ValueError(
            f"the scheduler has beta_schedule {kind} and prediction_type {prediction}; known are "
            f"{', '.join(SCHEDULE_KINDS)} and {', '.join(PREDICTIONS)}"
        )
    if scheduler.get("trained_betas") is not None:
        raise ValueError("the scheduler lists trained_betas; only schedules given by a formula are supported")
    settings = {
        "kind": SCHEDULE_KINDS[kind],
        "num_timesteps": scheduler.get("num_train_timesteps", 1000),
        "zero_terminal_snr": scheduler.get("rescale_betas_zero_snr", False),
        "prediction": PREDICTIONS[prediction],
    }
    if kind != "squaredcos_cap_v2":
        settings["init_beta"] = scheduler.get("beta_start", 0.0001)
        settings["last_beta"] = scheduler.get("beta_end", 0.02)
    notes = []
    if scheduler.get("clip_sample", True) or scheduler.get("thresholding", False):
        notes.append("not supported: the folder's scheduler clips x0 (clip_sample or thresholding)")
    if (name := scheduler.get("_class_name", "DDIMScheduler")) != "DDIMScheduler":
        notes.append(f"the folder samples with {name}; its noise schedule is used, but we sample with DDIM")
    return settings, notes


def _expect_class(settings: Mapping[str, Any], name: str) -> None:
    expected = CLASSES[name]
    if settings.get("_class_name", expected) != expected:
        raise ValueError(f"{name}/config.json is of the class {settings['_class_name']}; expected {expected}")


# --------------------------------------------------------------------------------- settings, writing


class Unlike(ValueError):
    """Our settings ask for what diffusers' classes cannot express."""


def unet_config(unet: config.UNet, use: config.Use | None = None) -> Json:
    """Our settings -> unet/config.json. `Unlike` names the first setting that the class cannot express."""
    for switch in config.STRUCTURAL_SWITCHES if use else ():
        if getattr(use, switch) != getattr(config.Use(), switch):
            has = "never has" if getattr(use, switch) else "always has"
            value = str(getattr(use, switch)).lower()
            raise Unlike(f"use.{switch} is {value}; diffusers' I2VGenXLUNet {has} this part")
    if use and use.output != "plain":
        raise Unlike(f"use.output is {use.output}; diffusers' I2VGenXLUNet only supports plain")
    if use and use.later_frames != "position":
        raise Unlike(
            f"use.later_frames is {use.later_frames}; diffusers' I2VGenXLUNet only supports position"
        )
    down = ["CrossAttnDownBlock3D" if attends else "DownBlock3D" for attends in unet.attention_levels]
    written = {
        "_class_name": "I2VGenXLUNet",
        "_diffusers_version": WRITTEN_FOR,
        "attention_head_dim": unet.head_width,
        "block_out_channels": list(unet.widths),
        "cross_attention_dim": unet.context_width,
        "down_block_types": down,
        "in_channels": unet.in_channels,
        "layers_per_block": unet.blocks_per_level,
        "norm_num_groups": unet.norm_groups,
        "num_attention_heads": None,
        "out_channels": unet.out_channels,
        "sample_size": 32,
        "up_block_types": [name.replace("Down", "Up") for name in reversed(down)],
    }
    for name, built in unet_settings(written).items():
        have = getattr(unet, name)
        if have != (tuple(built) if isinstance(built, list) else built):
            raise Unlike(f"unet.{name} is {have}; diffusers' I2VGenXLUNet only supports {built} here")
    return written


def vae_config(vae: config.VAE) -> Json:
    """Our settings -> vae/config.json; ValueError for what AutoencoderKL cannot express."""
    vae_tables.diffusers_rows(vae)
    levels = len(vae.width_multipliers)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": WRITTEN_FOR,
        "act_fn": "silu",
        "block_out_channels": [vae.base_width * m for m in vae.width_multipliers],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "force_upcast": True,
        "in_channels": vae.channels,
        "latent_channels": vae.embed_dim,
        "layers_per_block": vae.blocks_per_level,
        "norm_num_groups": vae.norm_groups,
        "out_channels": vae.channels,
        "sample_size": 512,
        "scaling_factor": vae.scale,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def scheduler_config(schedule: config.Schedule, sample: config.Sample) -> Json:
    """Our settings -> scheduler_config.json of a DDIMScheduler with the same steps."""
    kinds = {ours: theirs for theirs, ours in SCHEDULE_KINDS.items()} | {"quadratic": "scaled_linear"}
    predictions = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    if schedule.kind == "cosine" and schedule.cosine_s != 0.008:
        raise Unlike(f"schedule.cosine_s is {schedule.cosine_s}; diffusers only supports 0.008")
    if schedule.prediction not in predictions:
        raise Unlike(
            f"schedule.prediction is {schedule.prediction}; diffusers' DDIM supports {', '.join(predictions)}"
        )
    per_step = 1000 / schedule.num_timesteps
    first, last = {"quadratic": (0.0015, 0.0195), "linear": (per_step * 1e-4, per_step * 0.02)}.get(
        schedule.kind, (0.0001, 0.02)
    )
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": WRITTEN_FOR,
        "beta_end": schedule.last_beta or last,
        "beta_schedule": kinds[schedule.kind],
        "beta_start": schedule.init_beta or first,
        "clip_sample": False,
        "clip_sample_range": 1.0,
        "dynamic_thresholding_ratio": 0.995,
        "num_train_timesteps": schedule.num_timesteps,
        "prediction_type": predictions[schedule.prediction],
        "rescale_betas_zero_snr": schedule.zero_terminal_snr,
        "sample_max_value": 1.0,
        # the official sampler ends at abar[0], not at 1
        "set_alpha_to_one": sample.final_alpha == "one",
        "steps_offset": 1,
        "thresholding": False,
        "timestep_spacing": "leading" if sample.spacing == "official" else sample.spacing,
        "trained_betas": None,
    }


def feature_extractor_config(clip: config.Clip) -> Json:
    side = {"height": clip.image_size, "width": clip.image_size}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": side,
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(clip.image_mean),
        "image_std": list(clip.image_std),
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": clip.image_size},
    }


# ----------------------------------------------------------------------------------------- tokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
PAD = "!"  # token 0, the padding of prompts in training
END_TOKEN = 49407  # the padding of diffusers' published tokenizer


def write_tokenizer(folder: Path, clip: config.Clip) -> None:
    """Write open_clip's vocabulary as a CLIPTokenizer that gives the same ids and pads with 0."""
    if clip.text.get("tokenizer_kwargs"):
        raise ValueError(
            f"clip.text.tokenizer_kwargs is {clip.text['tokenizer_kwargs']}; CLIPTokenizer has none"
        )
    own = make_tokenizer(clip)
    names = {own.decoder[own.sot_token_id]: START, own.decoder[own.eot_token_id]: END}
    vocabulary = {names.get(word, word): number for word, number in own.encoder.items()}
    merges = "".join(f"{first} {second}\n" for first, second in own.bpe_ranks)
    special = {"bos_token": START, "eos_token": END, "pad_token": PAD, "unk_token": END}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    whole.write_json(folder / "special_tokens_map.json", special)
    settings = {
        "add_prefix_space": False,
        "do_lower_case": True,
        "model_max_length": clip.text_length,
        # Otherwise PAD, a special token here, would match in prompts too: the `!` of `Wow!` -> 0, not 256.
        "split_special_tokens": True,
        "tokenizer_class": "CLIPTokenizer",
    }
    whole.write_json(folder / "tokenizer_config.json", special | settings)
