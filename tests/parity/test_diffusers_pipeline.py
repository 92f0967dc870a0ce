"""Kind `diffusers_pipeline`: a run of diffusers' pipeline, recorded on the fly, against ours."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from i2vgen.files import checkpoint
from i2vgen.parity import diffusers_pipeline as parity
from i2vgen.parity.report import Golden, Settings
from i2vgen.settings import config
from weights_conversion import diffusers_layout

pytestmark = pytest.mark.reference
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

CONFIG = config.Config(
    unet=config.UNet(
        base_width=32,
        width_multipliers=(1, 2),
        attention_levels=(True, False),
        blocks_per_level=1,
        head_width=16,
        context_width=32,
        image_vector_width=32,
    ),
    vae=config.VAE(base_width=32, width_multipliers=(1, 2), blocks_per_level=1),
    clip=config.Clip(
        embed_dim=32,
        vision={"image_size": 28, "patch_size": 14, "layers": 2, "width": 64, "head_width": 64},
        text={"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 1, "layers": 2},
    ),
    sample=config.Sample(width=64, height=32),
)
CALL = {"width": 64, "height": 32, "target_fps": 16, "num_frames": 3, "num_inference_steps": 4}
CALL |= {"guidance_scale": 7.5, "decode_chunk_size": 2}
PROMPT, NEGATIVE = "a red kite over the sea", "blurry"


@pytest.fixture(scope="module")
def golden(tmp_path_factory) -> Golden:
    """A small golden of this kind: weights, inputs, every step, frames."""
    folder = tmp_path_factory.mktemp("pipeline")
    parts = {p: dict(checkpoint.random_state(checkpoint.build(p, CONFIG), seed=2)) for p in checkpoint.PARTS}
    diffusers_layout.write_folder(CONFIG, parts, folder / "model", fold=False)
    pipe = diffusers.I2VGenXLPipeline.from_pretrained(folder / "model", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=True)
    picture = np.random.default_rng(1).integers(0, 255, (40, 50, 3), np.uint8)
    draw = torch.Generator().manual_seed(4)
    posterior, start = torch.randn(1, 4, 16, 32, generator=draw), torch.randn(1, 4, 3, 16, 32, generator=draw)

    tensors = {"io/input.image_hwc_uint8": torch.from_numpy(picture), "io/input.init_latents": start}
    tensors["io/input.vae_posterior_noise"] = posterior
    ids = pipe.tokenizer(
        [PROMPT, NEGATIVE], padding="max_length", max_length=77, return_tensors="pt"
    ).input_ids
    tensors["io/input.token_ids"], tensors["io/input.negative_token_ids"] = ids[:1].clone(), ids[1:].clone()
    record(pipe, tensors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusers.models.autoencoders.vae, "randn_tensor", lambda *a, **k: posterior)
        how = {**CALL, "negative_prompt": NEGATIVE, "latents": start, "output_type": "pt"}
        frames = pipe(PROMPT, Image.fromarray(picture), **how).frames
    tensors["io/out.frames_01"] = frames[0].movedim(1, -1).contiguous()
    tensors["io/timesteps"] = pipe.scheduler.timesteps.clone()

    for name in parity.STAGES:
        for key, tensor in getattr(pipe, name).state_dict().items():
            tensors[f"{name}/{key}"] = tensor.clone()
    description = {name: dict(getattr(pipe, name).config) for name in ("unet", "vae", "scheduler")}
    description |= {n: getattr(pipe, n).config.to_dict() for n in ("text_encoder", "image_encoder")}
    description |= {"call": CALL, "prompt": PROMPT, "negative_prompt": NEGATIVE}
    metadata = {"kind": "diffusers_pipeline", "description": json.dumps(description, default=str)}
    save_file(
        {k: v.contiguous() for k, v in tensors.items()}, folder / "golden.safetensors", metadata=metadata
    )
    return Golden(folder / "golden.safetensors")


def record(pipe, tensors: dict[str, torch.Tensor]) -> None:
    """Record the network's outputs before guidance and the scheduler's results."""
    unet, scheduler = pipe.unet.forward, pipe.scheduler.step

    def forward(*inputs, **kwargs):
        out = unet(*inputs, **kwargs)
        step = sum(".latents_after" in name for name in tensors)
        uncond, cond = out[0].chunk(2)
        tensors[f"io/step{step}.v_uncond"], tensors[f"io/step{step}.v_cond"] = uncond.clone(), cond.clone()
        return out

    def step(noise, t, latents, **kwargs):
        out = scheduler(noise, t, latents, **kwargs)
        f = CALL["num_frames"]
        index = sum(".latents_after" in name for name in tensors)
        for name, value in (("latents_after", out.prev_sample), ("pred_x0", out.pred_original_sample)):
            tensors[f"io/step{index}.{name}"] = value.unflatten(0, (-1, f)).transpose(1, 2).clone()
        return out

    pipe.unet.forward, pipe.scheduler.step = forward, step


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parity(golden, dtype):
    rows = list(parity.run(golden, Settings(dtype=dtype)))
    assert len(rows) >= 20
    assert [row for row in rows if not row.passed] == []


MISTAKES = {
    "concat branch twice": {"use": {"concat_gain": 2.0}},
    "last step on abar[0]": {"sample": {"final_alpha": "first"}},
    "another scale": {"vae": {"scale": 0.18125}},
    "another fps": {"sample": {"fps": 8}},
    "padding with the end token": {"clip": {"pad_token": 49407}},
    "another guidance": {"sample": {"guidance": 7.0}},
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_caught(golden, monkeypatch, name):
    right = parity.settings_of

    def wrong(description):
        cfg = right(description)
        (section, values), *_ = MISTAKES[name].items()
        return dataclasses.replace(cfg, **{section: dataclasses.replace(getattr(cfg, section), **values)})

    monkeypatch.setattr(parity, "settings_of", wrong)
    assert any(not row.passed for row in parity.run(golden, Settings()))
