"""The autoencoder in bands of rows: the numbers of the whole picture, less memory."""

import dataclasses

import pytest
import torch
from torch import nn

from i2vgen.fast import bands
from i2vgen.files import checkpoint
from i2vgen.memory.meter import Meter
from i2vgen.model.vae import AutoencoderKL
from i2vgen.settings import config

EXACT = {"rtol": 0, "atol": 1e-12}
VAE = config.VAE(base_width=4, width_multipliers=(1, 2, 2), norm_groups=2, resolution=32)


@pytest.fixture
def vae():
    made = AutoencoderKL(VAE)
    checkpoint.fill(made, checkpoint.random_state(made, seed=1))
    return made.double().eval()


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3, 4, 7])
def test_bands_give_the_whole_picture(vae, rows):
    latents = torch.randn(2, VAE.embed_dim, 5, 4, dtype=torch.float64)
    pixels = torch.randn(2, 3, 20, 16, dtype=torch.float64)
    whole, moments = vae.decode(latents), vae.moments(pixels)
    vae.set_tile(rows)
    torch.testing.assert_close(vae.decode(latents), whole, **EXACT)
    torch.testing.assert_close(vae.moments(pixels), moments, **EXACT)


@torch.no_grad()
def test_a_norm_of_each_band_by_itself_shows(vae, monkeypatch):
    latents = torch.randn(1, VAE.embed_dim, 5, 4, dtype=torch.float64)
    whole = vae.decode(latents)
    vae.set_tile(3)
    monkeypatch.setattr(bands, "norm_silu", lambda norm, x, rows: lambda part: nn.functional.silu(norm(part)))
    assert not torch.allclose(vae.decode(latents), whole, **EXACT)


@torch.no_grad()
def test_a_changed_layer_runs_whole(vae):
    latents = torch.randn(1, VAE.embed_dim, 5, 4, dtype=torch.float64)
    seen = []
    vae.decoder.up[0].blocks[0].conv1.register_forward_hook(lambda m, i, out: seen.append(out.shape[1]))
    whole = vae.decode(latents)
    vae.set_tile(3)
    torch.testing.assert_close(vae.decode(latents), whole, **EXACT)
    assert seen == [20, 20]


@torch.no_grad()
def test_bands_take_less_memory():
    peaks = []
    with torch.device("meta"):
        vae, latents = AutoencoderKL(config.VAE()).eval(), torch.empty(1, 4, 64, 64)
    for rows in (0, 32):
        vae.set_tile(rows)
        with Meter() as meter:
            vae.decode(latents)
        peaks.append(meter.peak)
    assert peaks[1] < 0.75 * peaks[0]


def test_gradients_take_the_plain_way(vae):
    latents = torch.randn(1, VAE.embed_dim, 5, 4, dtype=torch.float64)
    plain = vae.decode(latents)
    vae.set_tile(3)
    assert vae.decode(latents).equal(plain)


def test_a_negative_tile_is_refused():
    with pytest.raises(ValueError, match=r"runtime\.vae_tile is -1; give a number of rows"):
        dataclasses.replace(config.Runtime(), vae_tile=-1)
