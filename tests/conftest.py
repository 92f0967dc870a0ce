"""What the tests share: one thread, a fixed start of every random stream, small models with real numbers."""

import contextlib
import copy
import dataclasses
import gc
import inspect
import io
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from i2vgen import __main__ as door
from i2vgen import pipeline
from i2vgen.fast import machine
from i2vgen.files import checkpoint
from i2vgen.model.conditioning import Conditions
from i2vgen.model.unet import UNet
from i2vgen.settings import config, merge
from i2vgen.settings.config import LAB
from i2vgen.settings.merge import load_config

ROOT = Path(__file__).parents[1]
CORE_ONLY = ROOT / "tests" / "core_only"
PATHS = os.pathsep.join(map(str, (CORE_ONLY, ROOT, ROOT / "tests")))  # PYTHONPATH of what the tests start
# Every kind of part on two levels, a good million parameters: one forward takes hundredths of a second.
SMALL = config.UNet(
    base_width=32,
    width_multipliers=(1, 2),
    blocks_per_level=1,
    attention_levels=(True, False),
    head_width=8,
    first_temporal_heads=2,
    context_width=16,
    norm_groups=8,
    image_vector_width=12,
    local_grid=8,
    local_widths=(8, 8),
)


def pytest_configure(config):
    if "gpu" not in (config.option.markexpr or "").replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what tests say depends on no card; -m gpu shows them one
    machine.product_speed = lambda dtype: 1.0  # nor on the processor's units
    merge.SHIPPED = LAB  # quick; test_shipped.py samples the default model
    # Not in the process that starts the workers, which run the tests and need all that is installed.
    if getattr(config, "workerinput", None) or not config.getoption("numprocesses", None):
        os.environ["PYTHONPATH"] = PATHS
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)


def pytest_collection_finish():
    # What is imported by now stays, and need not be looked through: a sixth of the time of the tests.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and -m gpu")


def pytest_make_parametrize_id(val):
    """Functions by their names: their addresses would differ between the workers of one run."""
    return val.__name__ if inspect.isfunction(val) else None


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture
def run_script(monkeypatch):
    """run_script(name, *words): a script in this process -> exit status, all that it printed."""
    monkeypatch.setattr("warnings.showwarning", None)  # put back at the end: scripts install their own

    def run(name, *words):
        out, before = io.StringIO(), sys.argv
        sys.argv = [name, *map(str, words)]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try:
                runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")
                status = 0
            except SystemExit as end:
                status = end.code
            finally:
                sys.argv = before
        return status, out.getvalue()

    return run


@pytest.fixture
def script_at(monkeypatch, capsys, tmp_path):
    """script_at(name, *first) -> run(*words): a command in an empty folder -> (status, stdout, stderr)."""
    monkeypatch.setattr("warnings.showwarning", None)  # put back at the end: commands install their own
    monkeypatch.chdir(tmp_path)

    def load(name, *first):
        def run(*words):
            status = door.main([name.replace("_", "-"), *first, *map(str, words)])
            return status, *capsys.readouterr()

        return run

    return load


@pytest.fixture(scope="session")
def tiny():
    """configs/tiny.yaml with random weights, made smaller still where only the amount of work changes."""
    return load_config(
        ROOT / "configs" / "tiny.yaml", ["width=64", "frames=3", "steps=2", "device=cpu"], weights="random"
    )


@pytest.fixture(scope="session")
def tiny_model(tiny):
    """All parts of `tiny` with keyed random weights; nobody may change it."""
    with pytest.warns(UserWarning, match="NOISE"):
        return pipeline.load_parts(tiny)


@pytest.fixture(scope="session")
def road(tiny_model):
    """All parts of a still smaller road, in float64: two levels in UNet and autoencoder, 16 x 16 pixels."""
    tiny = tiny_model.config
    unet = dataclasses.replace(
        SMALL, context_width=tiny.unet.context_width, image_vector_width=tiny.unet.image_vector_width
    )
    settings = dataclasses.replace(
        tiny,
        unet=unet,
        vae=config.VAE(base_width=32, width_multipliers=(1, 2), blocks_per_level=1),
        sample=dataclasses.replace(tiny.sample, width=16, height=16),
    )
    parts = [checkpoint.load(p, settings, device="cpu", dtype=torch.float64) for p in ("unet", "vae")]
    return pipeline.I2VGenXL(settings, *parts, copy.deepcopy(tiny_model.clip).double(), tiny_model.device)


@pytest.fixture(scope="session")
def with_config():
    """with_config(model, section={...}): the same parts under other settings."""

    def make(model, **changes):
        settings = model.config
        for name, values in changes.items():
            new = (
                dataclasses.replace(getattr(settings, name), **values) if isinstance(values, dict) else values
            )
            settings = dataclasses.replace(settings, **{name: new})
        return pipeline.I2VGenXL(settings, model.unet, model.vae, model.clip, model.device)

    return make


@pytest.fixture
def quick(tmp_path_factory, road):
    """First words of a command line: a file with the settings of `road`."""
    file = tmp_path_factory.mktemp("settings") / "road.yaml"
    file.write_text(road.config.to_yaml())
    return [str(file)]


@pytest.fixture(scope="session")
def small():
    return SMALL


@pytest.fixture(scope="session")
def make_unet():
    """make_unet(use, dtype): a small UNet on the CPU, in eval mode, with keyed random weights."""

    def make(use=None, dtype=torch.float64, *, backend="sdpa", **changes):
        with torch.device("meta"):
            unet = UNet(dataclasses.replace(SMALL, **changes), use or config.Use(), backend=backend)
        checkpoint.fill(unet, checkpoint.random_state(unet, seed=0), dtype=dtype)
        return unet.eval()

    return make


@pytest.fixture(scope="session")
def make_inputs():
    """make_inputs(batch, frames, h, w): a latent video, timesteps and raw conditions for a small UNet."""

    def make(batch=1, frames=4, h=4, w=6, dtype=torch.float64):
        generator = torch.Generator().manual_seed(batch)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        x = normal(batch, 4, frames, h, w)
        t = torch.tensor([981, 500, 3, 0][:batch])
        fps = torch.tensor([8, 16, 24, 1][:batch])
        return x, t, Conditions(normal(batch, 7, 16), normal(batch, 12), normal(batch, 4, h, w), fps)

    return make


@pytest.fixture(scope="session")
def picture():
    """A PIL picture, 96 x 80: a bright disc over a two-coloured gradient."""
    y, x = np.mgrid[:80, :96]
    pixels = np.stack([2 * x, 3 * y, 255 - 2 * x], -1)
    pixels[(x - 30) ** 2 + (y - 40) ** 2 < 300] = (250, 240, 60)
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture
def picture_file(picture, tmp_path):
    path = tmp_path / "a picture.png"
    picture.save(path)
    return path
