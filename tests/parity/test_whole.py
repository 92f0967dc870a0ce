"""The whole pipeline and random draws against the official ones, and planted mistakes that must be caught."""

import dataclasses
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image

from i2vgen import pipeline
from i2vgen.diffusion.noise import SampleNoise
from i2vgen.parity import encoders, whole
from i2vgen.parity.report import Golden, Settings, synthetic_picture

GOLDENS = Path(__file__).parents[1] / "goldens"
KINDS = {"pipeline_e2e": whole.e2e, "pipeline_rng": whole.rng}


@pytest.fixture(scope="module", autouse=True)
def _weights_made_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoders, "fan_in_weight", cache(encoders.fan_in_weight))
        yield


def rows(kind, dtype=torch.float32):
    return KINDS[kind](Golden(GOLDENS / f"{kind}.safetensors"), Settings(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_parity(kind, dtype):
    seen = list(rows(kind, dtype))
    assert len(seen) >= 9
    assert not [row for row in seen if not row.passed]


# Each mistake is a plausible slip in one line; the given row must fail.


def _config(**changed):
    """Change the golden's settings: a section's fields as a dict, or a single field."""
    right = whole.e2e_config

    def e2e_config(meta):
        made = right(meta)
        for name, value in changed.items():
            if isinstance(value, dict):
                value = dataclasses.replace(getattr(made, name), **value)
            made = dataclasses.replace(made, **{name: value})
        return made

    return lambda patch: patch.setattr(whole, "e2e_config", e2e_config)


def _encode(change):
    right = pipeline.encode
    return lambda patch: patch.setattr(pipeline, "encode", lambda *a: change(*right(*a)))


def _noise_before_posterior(patch):
    right, frames = pipeline.draw_all, 5
    kept = []

    def draw_all(samples, shape):
        if len(shape) == 3:
            kept.append(right(samples, (shape[0], frames, *shape[1:])))
            return right(samples, shape)
        return kept.pop()

    patch.setattr(pipeline, "draw_all", draw_all)


def _guidance_swapped(patch):
    right = pipeline.fast_unet.both_branches
    patch.setattr(pipeline.fast_unet, "both_branches", lambda unet, c, u, *how: right(unet, u, c, *how))


def _decoded_twice_scaled(patch):
    right = pipeline.decode
    patch.setattr(pipeline, "decode", lambda model, latents: right(model, latents / model.vae.scale))


def _draw(change):
    return lambda patch: patch.setattr(SampleNoise, "draw", change)


def _started_again(self, shape):
    self.start = getattr(self, "start", self.generator.get_state())
    self.generator.set_state(self.start)
    return torch.randn(1, *shape, generator=self.generator)


def _in_double(self, shape):
    return torch.randn(1, *shape, generator=self.generator, dtype=torch.float64).float()


def _frames_first(self, shape):
    shape = (shape[1], shape[0], *shape[2:]) if len(shape) == 4 else shape
    drawn = torch.randn(1, *shape, generator=self.generator)
    return drawn.transpose(1, 2) if len(shape) == 4 else drawn


FINAL, FRAMES, LATENT = "round0.latent_final", "round0.frames_uint8", "round0.local_latent"
E2E, RNG = "pipeline_e2e", "pipeline_rng"
MISTAKES = {
    "mode instead of a sample": (E2E, LATENT, _config(sample={"posterior": "mode"})),
    "noise before posterior": (E2E, FINAL, _noise_before_posterior),
    "negative prompt empty": (E2E, "y_negative", _config(negative_prompt="")),
    "negative prompt empty, latents": (E2E, FINAL, _config(negative_prompt="")),
    "image vector in the unconditional branch": (
        E2E,
        FINAL,
        _encode(lambda cond, uncond: (cond, uncond._replace(image_vector=cond.image_vector))),
    ),
    "no first frame in the unconditional branch": (
        E2E,
        FINAL,
        _encode(lambda cond, uncond: (cond, uncond._replace(image_latent=0 * uncond.image_latent))),
    ),
    "rounded to nearest": (E2E, FRAMES, _config(save={"rounding": "nearest"})),
    "fps of the file": (E2E, FINAL, _config(sample={"fps": 8})),
    "guidance swapped": (E2E, FINAL, _guidance_swapped),
    "final level 1": (E2E, FINAL, _config(sample={"final_alpha": "one"})),
    "eight steps, not ten": (E2E, FINAL, _config(sample={"steps": 8})),
    "decoding scaled twice": (E2E, FRAMES, _decoded_twice_scaled),
    "generator started again": (E2E, FINAL, _draw(_started_again)),
    "draws started again": (RNG, "initial_noise_sparse.0", _draw(_started_again)),
    "draws in float64": (RNG, "posterior_noise_sparse.0", _draw(_in_double)),
    "draws with frames before channels": (RNG, "initial_noise_sparse.0", _draw(_frames_first)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistakes_are_caught(mistake, monkeypatch):
    kind, row, plant = MISTAKES[mistake]
    plant(monkeypatch)
    assert not next(seen.passed for seen in rows(kind) if seen.name == row)


def _model(crop):
    meta, settings = Golden(GOLDENS / "pipeline_e2e.safetensors").config, Settings()
    cfg = whole.e2e_config(meta)
    cfg = dataclasses.replace(cfg, preprocess=dataclasses.replace(cfg.preprocess, crop=crop))
    vae, *_ = encoders.build_vae(
        meta["vae_ddconfig"], cfg.vae.embed_dim, cfg.vae.scale, meta["vae_weight_seed"], settings
    )
    clip, _ = encoders.build_clip(meta["clip_config"], False, meta["clip_weight_seed"], settings)
    return pipeline.I2VGenXL(cfg, None, vae, clip, torch.device("cpu"))


@pytest.mark.parametrize(("size", "differs"), [((97, 61), False), ((31, 40), True)])
def test_the_crop_setting_reaches_both_encoders(size, differs):
    """The golden's picture, 97 x 61, looks the same in both modes, so it cannot show a clean crop."""
    picture = Image.fromarray(synthetic_picture(*size, 3))
    official, clean = (
        pipeline.encode(_model(crop), [picture], ["a cat"], torch.zeros(1, 4, 6, 10))[0]
        for crop in ("official", "clean")
    )
    assert torch.equal(official.image_latent, clean.image_latent) is not differs
    assert torch.equal(official.image_vector, clean.image_vector) is not differs
