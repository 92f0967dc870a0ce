"""The numbers that diffusers' former test of its pipeline expected, from our UNet, VAE and DDIM.

Its model is tiny and random: every network is drawn from seed 0. Its tokenizer is not at hand, so the ids are
arbitrary; they move the numbers by less than the tolerance of that test, 0.01.
"""

import random

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image

from i2vgen.diffusion import sampler
from i2vgen.diffusion.schedule import Schedule, make_betas
from i2vgen.files import checkpoint
from i2vgen.model.conditioning import Conditions
from i2vgen.settings import merge
from weights_conversion import diffusers_configs, rules, unet_diffusers
from weights_conversion import vae as vae_tables

pytestmark = pytest.mark.reference
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

EXPECTED = [0.5146, 0.6525, 0.6032, 0.5204, 0.5675, 0.4125, 0.3016, 0.5172, 0.4095]
START, END, PAD = 0, 2, 1
WORDS = [320, 540, 78, 69, 64, 300, 501, 320, 900]
TEXT = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": PAD, "vocab_size": 1000, "hidden_size": 4,
        "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "hidden_act": "gelu",
        "projection_dim": 32}  # fmt: skip
IMAGE = {"hidden_size": 4, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2,
         "projection_dim": 4, "image_size": 32, "patch_size": 1}  # fmt: skip
UNET = {"block_out_channels": (4, 8), "layers_per_block": 1, "cross_attention_dim": 4,
        "attention_head_dim": 4, "num_attention_heads": None, "norm_num_groups": 2, "sample_size": 32,
        "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D")}  # fmt: skip
VAE = {"block_out_channels": (8,), "latent_channels": 4, "norm_num_groups": 2, "sample_size": 32}


def drawn(make, *given, **settings):
    torch.manual_seed(0)
    return make(*given, **settings).eval()


@pytest.fixture(scope="module")
def theirs():
    return {
        "unet": drawn(diffusers.I2VGenXLUNet, **UNET),
        "vae": drawn(diffusers.AutoencoderKL, **VAE),
        "text": drawn(transformers.CLIPTextModel, transformers.CLIPTextConfig(**TEXT)),
        "image": drawn(transformers.CLIPVisionModelWithProjection, transformers.CLIPVisionConfig(**IMAGE)),
    }


def ours(theirs, gain):
    """-> our UNet and VAE with their weights."""
    settings = {
        "unet": diffusers_configs.unet_settings(dict(theirs["unet"].config)),
        "vae": diffusers_configs.vae_settings(dict(theirs["vae"].config)),
        "use": {"concat_gain": gain, "sinusoid": "exp", "frame_planes": "network"},
        "clip": {"embed_dim": 4, "text": {"width": 4, "heads": 2, "layers": 2, "context_length": 77,
                                          "vocab_size": 1000}},
        "sample": {"width": 32, "height": 32},
    }  # fmt: skip
    cfg = merge.from_dict(settings)
    rows = {"unet": unet_diffusers.rows(cfg.unet), "vae": vae_tables.diffusers_rows(cfg.vae)}
    for part, table in rows.items():
        model = checkpoint.build(part, cfg)
        checkpoint.fill(model, rules.to_ours(table, theirs[part].state_dict()))
        yield model.eval()


@torch.no_grad()
def last_pixels(theirs, gain):
    """The blue values of the nine pixels in a corner of the first frame."""
    unet, vae = ours(theirs, gain)
    chance = random.Random(0)
    values = np.array([chance.random() for _ in range(3 * 32 * 32)], np.float32).reshape(3, 32, 32)
    picture = np.array(Image.fromarray((values * 255).round().astype(np.uint8).transpose(1, 2, 0)))
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None] / 255

    ids = [[START, *words, END, *[PAD] * (75 - len(words))] for words in (WORDS, [])]
    layers = theirs["text"](torch.tensor(ids), output_hidden_states=True).hidden_states
    inside = getattr(theirs["text"], "text_model", theirs["text"])
    text = inside.final_layer_norm(layers[-2])  # without the last layer
    clip = transformers.image_utils
    mean, std = (torch.tensor(t).view(1, 3, 1, 1) for t in (clip.OPENAI_CLIP_MEAN, clip.OPENAI_CLIP_STD))
    vector = theirs["image"]((pixels - mean) / std).image_embeds
    torch.manual_seed(0)
    latent = vae.encode(2 * pixels - 1, torch.randn(1, 4, 32, 32))
    fps = torch.tensor([16])
    branches = [
        unet.prepare(Conditions(text[i : i + 1], v, latent, fps), 4)
        for i, v in enumerate((vector, torch.zeros_like(vector)))
    ]
    predict = sampler.guided(*[lambda x, t, p=p: unet(x, t, p) for p in branches], 6.0)
    betas = make_betas(kind="linear_sd", num_timesteps=1000, zero_terminal_snr=False,
                       init_beta=0.00085, last_beta=0.012)  # fmt: skip
    start = torch.randn(1, 4, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    latents = sampler.ddim(predict, start, Schedule(betas, "eps"), steps=2, timesteps=[500, 0])
    frame = vae.decode(rearrange(latents, "1 c f h w -> f c h w"))[0]
    return (frame / 2 + 0.5).clamp(0, 1)[-1, -3:, -3:].flatten().numpy()


def test_the_nine_numbers(theirs):
    assert np.abs(last_pixels(theirs, 1.0) - EXPECTED).max() < 0.01
    assert np.abs(last_pixels(theirs, 2.0) - EXPECTED).max() > 0.01  # the planted mistake: the official gain
