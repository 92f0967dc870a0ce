"""Kinds `pipeline_e2e` and `pipeline_rng`: the whole pipeline on tiny parts, the official random draws."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from PIL import Image
from torch import Tensor

from i2vgen import pipeline
from i2vgen.diffusion.noise import SampleNoise
from i2vgen.files import checkpoint
from i2vgen.model.conditioning import Conditions
from i2vgen.parity.diffusion import stand_in
from i2vgen.parity.encoders import build_clip, build_vae
from i2vgen.parity.report import Golden, Row, Settings, check, compare, synthetic_picture
from i2vgen.settings import config

LATENT_ABS = {torch.float64: 2e-5, torch.float32: 2e-5, torch.float16: 0.02, torch.bfloat16: 0.1}
DECODED_ABS = {torch.float64: 2e-4, torch.float32: 2e-4, torch.float16: 0.1, torch.bfloat16: 0.5}
FRAME_LEVELS = {torch.float64: 1, torch.float32: 1, torch.float16: 12, torch.bfloat16: 60}
# A value next to an integer may differ by one level. Rounding instead of truncating would change half of all
# bytes by one level: relative L2 4e-3 instead of 8e-5.
FRAMES_L2 = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}
ENCODER_ABS = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 0.03, torch.bfloat16: 0.25}
# The stored draws are subsampled: every 5th frame, every 8th row and column of the full-size noise.
FRAME_STRIDE, PIXEL_STRIDE = 5, 8


class StandInUNet:
    """The goldens' closed-form network with the UNet's interface, to run the real pipeline with it."""

    def __init__(self, settings: Settings):
        self.settings = settings

    def prepare(self, conditions: Conditions, frames: int) -> Conditions:
        return conditions

    def __call__(self, x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        text, vector, latent, fps = conditions
        x, text, latent = self.settings.cast(x), self.settings.cast(text), self.settings.cast(latent)
        vector = None if vector is None else self.settings.cast(vector)[:, None]
        return stand_in(x, t, text, vector, latent[:, :, None], fps)


def e2e_config(meta: dict) -> config.Config:
    """The golden's settings as ours, in the official forms; a UNet of one level allows all VAE sizes."""
    clip, dd = meta["clip_config"], meta["vae_ddconfig"]
    width, height = meta["resolution"]
    return config.Config(
        unet=config.UNet(
            width_multipliers=(1,),
            attention_levels=(True,),
            context_width=clip["text_cfg"]["width"],
            image_vector_width=clip["embed_dim"],
        ),
        vae=config.VAE(
            base_width=dd["ch"], width_multipliers=tuple(dd["ch_mult"]), scale=meta["scale_factor"]
        ),
        clip=config.Clip(embed_dim=clip["embed_dim"], vision=clip["vision_cfg"], text=clip["text_cfg"]),
        sample=config.Sample(
            width=width,
            height=height,
            frames=meta["max_frames"],
            fps=meta["target_fps"],
            steps=meta["ddim_timesteps"],
            guidance=meta["guide_scale"],
            eps_form="recovered",
            negative_image="zeros" if meta["use_zero_infer"] else "none",
        ),
        preprocess=config.Preprocess(crop="official", exif="ignore", alpha="drop"),
        runtime=config.Runtime(vae_chunk=meta["decoder_bs"]),
        negative_prompt=meta["negative_prompt"],
    )


def e2e(golden: Golden, settings: Settings) -> Iterator[Row]:
    """Picture and prompt to frames with `pipeline.generate`; the rounds share one seeded generator."""
    meta = golden.config
    cfg = e2e_config(meta)
    ddconfig = meta["vae_ddconfig"]
    vae, *_ = build_vae(ddconfig, cfg.vae.embed_dim, cfg.vae.scale, meta["vae_weight_seed"], settings)
    clip, _ = build_clip(meta["clip_config"], False, meta["clip_weight_seed"], settings)
    model = pipeline.I2VGenXL(cfg, StandInUNet(settings), vae, clip, torch.device(settings.device))
    rule = meta["image"]
    picture = Image.fromarray(synthetic_picture(rule["width"], rule["height"], rule["k"]))

    generator = torch.Generator().manual_seed(meta["torch_seed"])
    latent = (cfg.vae.embed_dim, *cfg.latent_size)
    for number in range(meta["rounds"]):
        tag = f"round{number}"
        before = generator.get_state()
        cond, uncond, noise = _inputs(model, picture, meta["prompt"], generator, latent)
        if number == 0:
            yield from _shared(golden, settings, model, picture, cond, uncond)
        yield compare(f"{tag}.noise", noise, golden[f"{tag}.noise"], max_abs=1e-6)
        yield compare(
            f"{tag}.local_latent",
            cond.image_latent,
            golden[f"{tag}.local_latent"],
            max_abs=LATENT_ABS[settings.dtype],
        )
        steps: list[Tensor] = []
        generator.set_state(before)  # `generate` draws the same numbers again
        frames = pipeline.generate(
            model,
            [picture],
            [meta["prompt"]],
            [generator],
            on_step=lambda info, steps=steps: steps.append(info.x),
        )
        final = steps[-1]
        yield compare(
            f"{tag}.latent_final", final, golden[f"{tag}.latent_final"], max_abs=LATENT_ABS[settings.dtype]
        )
        decoded = vae.decode(final[0].transpose(0, 1), chunk=meta["decoder_bs"]).transpose(0, 1)[None]
        yield compare(
            f"{tag}.decoded", decoded, golden[f"{tag}.decoded"], max_abs=DECODED_ABS[settings.dtype]
        )
        yield compare(
            f"{tag}.frames_uint8",
            frames[0],
            golden[f"{tag}.frames_uint8"],
            max_abs=FRAME_LEVELS[settings.dtype],
            relative_l2=FRAMES_L2[settings.dtype],
        )


@torch.no_grad()
def _inputs(
    model: pipeline.I2VGenXL,
    picture: Image.Image,
    prompt: str,
    generator: torch.Generator,
    latent: tuple[int, ...],
) -> tuple[Conditions, Conditions, Tensor]:
    """Conditions and initial noise, drawn in the pipeline's order."""
    draws = SampleNoise(generator)
    cond, uncond = pipeline.encode(model, [picture], [prompt], draws.draw(latent))
    noise = draws.draw((latent[0], model.config.sample.frames, *latent[1:]))
    return cond, uncond, noise


def _shared(
    golden: Golden,
    settings: Settings,
    model: pipeline.I2VGenXL,
    picture: Image.Image,
    cond: Conditions,
    uncond: Conditions,
) -> Iterator[Row]:
    cfg = model.config
    views = pipeline.prepare_views(picture, cfg)
    yield compare("image_tensor", views.pixels[None], golden["image_tensor"], max_abs=1e-6)
    yield compare("vit_tensor", views.clip_pixels[None], golden["vit_tensor"], max_abs=1e-6)
    bound = ENCODER_ABS[settings.dtype]
    yield compare("y_words", cond.text, golden["y_words"], max_abs=bound)
    yield compare("y_negative", uncond.text, golden["y_negative"], max_abs=bound)
    yield compare("y_visual", cond.image_vector[:, None], golden["y_visual"], max_abs=bound)


def _frames(generator: torch.Generator, size: tuple[int, ...], stored: int, facts: dict) -> int:
    """The number of frames drawn: of the lengths that leave `stored` frames, the one that fits `facts`."""
    lengths = range((stored - 1) * FRAME_STRIDE + 1, stored * FRAME_STRIDE + 1)
    for frames in lengths:
        trial = torch.Generator()
        trial.set_state(generator.get_state())
        draws = SampleNoise(trial)
        draws.draw(size)
        last = draws.draw((size[0], frames, *size[1:])).flatten()[-4:]
        if (last - torch.tensor(facts["noise_last4"])).abs().max() <= 1e-6:
            return frames
    return lengths[0]


def rng(golden: Golden, settings: Settings) -> Iterator[Row]:
    """Posterior and initial noise of every round, from the official generator state before the first item.

    The last bit of vectorised `randn` depends on the CPU, hence the tolerance 1e-6 instead of a hash.
    """
    meta = golden.config
    state = golden["rng_state_before_first_item"]
    seeded = torch.Generator().manual_seed(meta["seed_plus_rank"]).get_state()
    if "after_seed" in meta:
        same = hashlib.sha256(seeded.numpy().tobytes()).hexdigest() == meta["after_seed"]
        yield check("generator after seeding", same, "SHA-256 of the golden")
    generator = torch.Generator()
    generator.set_state(state)
    draws = SampleNoise(generator)
    _, c, f, h, w = golden["initial_noise_sparse.0"].shape
    size = (c, h * PIXEL_STRIDE, w * PIXEL_STRIDE)
    frames = _frames(generator, size, f, meta["rounds"][0])
    if "unet_params" in meta:
        count = sum(p.numel() for p in checkpoint.build("unet", config.Config()).parameters())
        yield check("parameters of the released UNet", count == meta["unet_params"], f"{meta['unet_params']}")
    thin = slice(None, None, PIXEL_STRIDE)
    for number, facts in enumerate(meta["rounds"]):
        posterior = draws.draw(size)
        initial = draws.draw((size[0], frames, *size[1:]))
        thinned = {
            f"posterior_noise_sparse.{number}": posterior[..., thin, thin],
            f"initial_noise_sparse.{number}": initial[:, :, ::FRAME_STRIDE, thin, thin],
        }
        for name, got in thinned.items():
            if name in golden:
                yield compare(name, got, golden[name], max_abs=1e-6)
        ends = {"posterior_first8": posterior.flatten()[:8], "noise_first8": initial.flatten()[:8],
                "noise_last4": initial.flatten()[-4:]}  # fmt: skip
        for name, got in ends.items():
            if name in facts:
                yield compare(f"rounds.{number}.{name}", got, torch.tensor(facts[name]), max_abs=1e-6)
