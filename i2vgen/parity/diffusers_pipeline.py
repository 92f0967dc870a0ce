"""Kind `diffusers_pipeline`: a whole tiny run of diffusers' port, compared with ours under its conventions.

The port adds the concat branch once, ends DDIM at abar = 1 and takes exactly n steps; we have settings for
all three.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from i2vgen import pipeline
from i2vgen.diffusion import sampler
from i2vgen.files import checkpoint, video
from i2vgen.model.conditioning import frame_planes
from i2vgen.parity.report import Golden, Row, Settings, compare
from i2vgen.settings import config, merge
from weights_conversion import clip as clip_tables
from weights_conversion import diffusers_configs, rules, unet_diffusers
from weights_conversion import vae as vae_tables

# Bounds of the goldens' README, for one network call and for whole trajectories. diffusers' abar table is
# float32 (7.7e-7 from ours) even in its float64 run, which limits trajectories to float32 accuracy but not
# single calls.
CALL_L2 = {torch.float64: 1e-9, torch.float32: 5e-6, torch.float16: 3e-2, torch.bfloat16: 0.25}
LOOP_L2 = {torch.float64: 5e-5, torch.float32: 5e-5, torch.float16: 0.1, torch.bfloat16: 0.5}
STAGES = ("unet", "vae", "text_encoder", "image_encoder")


def run(golden: Golden, settings: Settings) -> Iterator[Row]:
    """Encoders, every step's network outputs and latents, and the final frames."""
    cfg = settings_of(golden.meta["description"])
    model = build(golden, cfg, settings)
    reference = "io64" if settings.dtype == torch.float64 else "io"
    call, loop = CALL_L2[settings.dtype], LOOP_L2[settings.dtype]

    def row(name: str, got: Tensor, bound: float) -> Iterator[Row]:
        """Compare with the float64 run if we run in float64 and it is stored, else with the float32 run."""
        exact = f"{reference}/{name}" in golden
        stored = f"{reference}/{name}" if exact else f"io/{name}"
        if stored in golden:
            # The rounding of their float32 run limits how close our float64 run can come.
            limit = bound if exact or settings.dtype != torch.float64 else max(bound, CALL_L2[torch.float32])
            yield compare(name, got.reshape(golden[stored].shape), golden[stored], relative_l2=limit)

    tokens = model.clip.tokenize([golden.meta["description"]["prompt"], cfg.negative_prompt])
    yield compare("input.token_ids", tokens[:1], golden["io/input.token_ids"], exact=True)
    yield compare("input.negative_token_ids", tokens[1:], golden["io/input.negative_token_ids"], exact=True)

    picture = Image.fromarray(golden["io/input.image_hwc_uint8"].numpy())
    prompt = golden.meta["description"]["prompt"]
    with torch.no_grad():
        cond, uncond = pipeline.encode(model, [picture], [prompt], golden["io/input.vae_posterior_noise"])
        views = pipeline.prepare_views(picture, cfg)
        posterior = model.vae.posterior(settings.cast(views.pixels[None]))
    yield from row("image.vae_pixels", views.pixels[None], call)
    yield from row("image.clip_pixels", views.clip_pixels[None], call)
    yield from row("image.vae_mean", posterior.mean, call)
    yield from row("image.vae_logvar", posterior.log_variance, call)
    yield from row("image.clip_embeds", cond.image_vector, call)
    yield from row("text.prompt_embeds", cond.text, call)
    yield from row("text.negative_prompt_embeds", uncond.text, call)
    yield from row("image.latents_with_position_mask", _planes(cond.image_latent, cfg.sample.frames), call)
    yield from _sample(golden, settings, model, cond, uncond, row, call, loop)


def _sample(golden, settings, model, cond, uncond, row, call: float, loop: float) -> Iterator[Row]:
    """The sampling loop as diffusers ran it, comparing both passes of every step."""
    cfg, calls = model.config, []
    with torch.no_grad():
        positive, negative = (model.unet.prepare(c, cfg.sample.frames) for c in (cond, uncond))

    def recorded(prepared):
        def predict(x: Tensor, t: Tensor) -> Tensor:
            calls.append((int(t[0]), model.unet(x, t, prepared)))
            return calls[-1][1]

        return predict

    steps = []
    latents = sampler.ddim(
        sampler.guided(recorded(positive), recorded(negative), cfg.sample.guidance),
        golden["io/input.init_latents"].to(settings.device).to(_wide(settings.dtype)),
        model.schedule,
        steps=cfg.sample.steps,
        spacing=cfg.sample.spacing,
        final_alpha=cfg.sample.final_alpha,
        on_step=steps.append,
    )
    visited = torch.tensor([t for t, _ in calls[::2]])
    yield compare("timesteps", visited, golden["io/timesteps"], exact=True)
    for i, step in enumerate(steps):
        bound = call if i == 0 else loop
        yield from row(f"step{i}.v_cond", calls[2 * i][1], bound)
        yield from row(f"step{i}.v_uncond", calls[2 * i + 1][1], bound)
        yield from row(f"step{i}.pred_x0", step.x0, loop)
        yield from row(f"step{i}.latents_after", step.x, loop)
    with torch.no_grad():
        frames = rearrange(latents, "1 c f h w -> f c h w")
        decoded = model.vae.decode(frames, chunk=cfg.runtime.vae_chunk)
    yield from row("out.decoded_raw", decoded, loop)
    pixels = video.to_uint8(rearrange(decoded.float(), "f c h w -> c f h w"), rounding=cfg.save.rounding)
    expected = (golden["io/out.frames_01"] * 255).round().to(torch.uint8)
    limit = {"relative_l2": 0.15} if settings.half else {"max_abs": 1.0}
    yield compare("out.frames, in levels of 255", pixels, expected, **limit)


def settings_of(description: Mapping) -> config.Config:
    """The golden's constructor and call arguments as our settings, with diffusers' conventions."""
    call = description["call"]
    schedule, _ = diffusers_configs.schedule_settings(description["scheduler"])
    clip = clip_tables.settings_from_transformers(description["text_encoder"], description["image_encoder"])
    settings = {
        "unet": diffusers_configs.unet_settings(description["unet"]),
        "use": {"concat_gain": 1.0, "sinusoid": "exp", "frame_planes": "network"},
        "vae": diffusers_configs.vae_settings(description["vae"]),
        "schedule": schedule,
        "sample": {
            "width": call["width"],
            "height": call["height"],
            "frames": call["num_frames"],
            "fps": call["target_fps"],
            "steps": call["num_inference_steps"],
            "guidance": call["guidance_scale"],
            "spacing": description["scheduler"]["timestep_spacing"],
            "final_alpha": "one" if description["scheduler"]["set_alpha_to_one"] else "first",
        },
        "preprocess": {"crop": "official", "exif": "ignore", "alpha": "drop"},
        "save": {"rounding": "nearest"},
        "runtime": {"vae_chunk": call["decode_chunk_size"]},
        "negative_prompt": description["negative_prompt"],
        "clip": dataclasses.asdict(clip),
    }
    return merge.from_dict(settings)


def build(golden: Golden, cfg: config.Config, settings: Settings) -> pipeline.I2VGenXL:
    """Our model with the golden's weights, through the conversion tables."""
    held = {stage: _under(golden, stage) for stage in STAGES}
    towers = {"text": held["text_encoder"], "image": held["image_encoder"]}
    clip, _ = clip_tables.from_transformers(towers, cfg.clip)
    states = {
        "unet": rules.to_ours(unet_diffusers.rows(cfg.unet), held["unet"]),
        "vae": rules.to_ours(vae_tables.diffusers_rows(cfg.vae), held["vae"]),
        "clip": clip,
    }
    parts = {}
    for part, state in states.items():
        parts[part] = checkpoint.build(part, cfg)
        checkpoint.fill(parts[part], state, device=settings.device, dtype=settings.dtype)
        parts[part].eval().requires_grad_(False)
    return pipeline.I2VGenXL(cfg, parts["unet"], parts["vae"], parts["clip"], torch.device(settings.device))


def _planes(latent: Tensor, frames: int) -> Tensor:
    return rearrange(frame_planes(latent, frames, "network"), "b f h w c -> b c f h w")


def _under(golden: Golden, stage: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{stage}/"): golden[name] for name in golden if name.startswith(f"{stage}/")}


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
