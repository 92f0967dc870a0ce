"""The autoencoder in chunks of rows: the numbers of the whole picture in less memory."""

import dataclasses

import pytest
import torch
from torch import nn

from i2vgen.fast import savings, vae
from i2vgen.files import checkpoint
from i2vgen.memory.meter import Meter
from i2vgen.model.vae import AutoencoderKL
from i2vgen.settings import config

EXACT = {"rtol": 0, "atol": 1e-12}
VAE = config.VAE(base_width=4, width_multipliers=(1, 2, 2), norm_groups=2, resolution=32)


def chunk(network, rows):
    savings.apply(network, config.Runtime(vae_tile=rows))


@pytest.fixture
def small_vae():
    made = AutoencoderKL(VAE)
    checkpoint.fill(made, checkpoint.random_state(made, seed=1))
    return made.double().eval()


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3, 4, 7])
def test_chunks_give_the_whole_picture(small_vae, rows):
    latents = torch.randn(2, VAE.embed_dim, 5, 4, dtype=torch.float64)
    pixels = torch.randn(2, 3, 20, 16, dtype=torch.float64)
    whole, moments = small_vae.decode(latents), small_vae.moments(pixels)
    chunk(small_vae, rows)
    torch.testing.assert_close(small_vae.decode(latents), whole, **EXACT)
    torch.testing.assert_close(small_vae.moments(pixels), moments, **EXACT)
    savings.remove(small_vae)
    assert type(small_vae.decoder) is vae.Decoder


@torch.no_grad()
def test_a_norm_of_each_chunk_by_itself_shows(small_vae, monkeypatch):
    latents = torch.randn(1, VAE.embed_dim, 5, 4, dtype=torch.float64)
    whole = small_vae.decode(latents)
    chunk(small_vae, 3)
    monkeypatch.setattr(vae, "norm_silu", lambda norm, x, rows: lambda part: nn.functional.silu(norm(part)))
    assert not torch.allclose(small_vae.decode(latents), whole, **EXACT)


@torch.no_grad()
def test_a_hooked_layer_runs_whole(small_vae):
    latents = torch.randn(1, VAE.embed_dim, 5, 4, dtype=torch.float64)
    seen = []
    small_vae.decoder.up[0].blocks[0].conv1.register_forward_hook(lambda m, i, out: seen.append(out.shape[1]))
    whole = small_vae.decode(latents)
    chunk(small_vae, 3)
    torch.testing.assert_close(small_vae.decode(latents), whole, **EXACT)
    assert seen == [20, 20]


@torch.no_grad()
def test_chunks_take_less_memory():
    peaks = []
    with torch.device("meta"):
        network, latents = AutoencoderKL(config.VAE()).eval(), torch.empty(1, 4, 64, 64)
    for rows in (0, 32):
        chunk(network, rows)
        with Meter() as meter:
            network.decode(latents)
        peaks.append(meter.peak)
    assert peaks[1] < 0.75 * peaks[0]


def test_gradients_take_the_plain_forward(small_vae):
    latents = torch.randn(1, VAE.embed_dim, 5, 4, dtype=torch.float64)
    plain = small_vae.decode(latents)
    chunk(small_vae, 3)
    torch.testing.assert_close(small_vae.decode(latents), plain, **EXACT)


def test_a_negative_number_of_rows_is_refused():
    with pytest.raises(ValueError, match=r"runtime\.vae_tile is -1; give a number of rows"):
        dataclasses.replace(config.Runtime(), vae_tile=-1)
