"""runtime.py: random numbers of a sample, devices, precisions, the formula for memory."""

import dataclasses

import pytest
import torch

from i2vgen.diffusion.noise import SampleNoise, draw_all
from i2vgen.fast import runtime
from i2vgen.files import checkpoint
from i2vgen.memory import plans
from i2vgen.memory.free import free_memory
from i2vgen.settings import config, merge
from i2vgen.settings.config import Runtime

# --- noise


def test_noise_comes_in_the_official_order():
    noise = SampleNoise(8888)
    drawn = [noise.draw(shape) for shape in ((4, 2, 2), (4, 3, 2, 2), (4, 3, 2, 2))]
    torch.manual_seed(8888)  # as the official script seeds; its draws have a leading axis of one
    for tensor in drawn:
        assert tensor.dtype == torch.float32 and tensor.equal(torch.randn(tensor.shape))


def test_samples_do_not_know_of_each_other():
    def draws(*seeds):
        samples = [SampleNoise(seed) for seed in seeds]
        return torch.stack([draw_all(samples, (2, 3)) for _ in range(2)], 1)

    three = draws(1, 2, 3)
    assert three.shape == (3, 2, 2, 3)
    for i, seed in enumerate((1, 2, 3)):
        assert three[i : i + 1].equal(draws(seed))
    assert draws(3, 1, 2).equal(three[[2, 0, 1]])
    assert not three[0].equal(three[1]) and not three[0, 0].equal(three[0, 1])


def test_noise_leaves_the_global_stream_alone_and_does_not_hear_it():
    before = torch.get_rng_state()
    one = SampleNoise(1).draw((5,))
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(77)
    assert SampleNoise(1).draw((5,)).equal(one)


def test_a_generator_may_stand_for_a_seed():
    generator = torch.Generator().manual_seed(3)
    assert SampleNoise(generator).draw((5,)).equal(SampleNoise(3).draw((5,)))


@pytest.mark.parametrize("seed", [0, config.MAX_SEED])
def test_seeds_at_the_ends(seed):
    assert SampleNoise(seed).draw((5,)).isfinite().all()


# --- devices and precisions


@pytest.mark.parametrize("name", ["quantum", "", "3", "cpu:x", "meta", "cuda:99"])
def test_devices_that_are_not_there(name):
    with pytest.raises(ValueError, match=r"runtime\.device is"):
        runtime.device(Runtime(device=name))


def test_no_cuda_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert runtime.device(Runtime()) == torch.device("cpu")
    assert runtime.dtype(Runtime()) == torch.float32
    with pytest.raises(ValueError, match=r"runtime\.device is cuda but PyTorch sees 0 CUDA devices"):
        runtime.device(Runtime(device="cuda"))


def test_cuda_is_taken_where_it_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert runtime.device(Runtime()).type == "cuda" and runtime.dtype(Runtime()) == torch.float16
    assert runtime.device(Runtime(device="cuda:1")) == torch.device("cuda:1")
    assert runtime.dtype(Runtime(device="cpu")) == torch.float32
    with pytest.raises(ValueError, match="sees 2 CUDA devices"):
        runtime.device(Runtime(device="cuda:2"))


def test_a_missing_mps(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match="is mps but"):
        runtime.device(Runtime(device="mps"))


@pytest.mark.parametrize("name", runtime.DTYPES)
def test_named_precisions(name):
    assert runtime.dtype(Runtime(device="cpu", dtype=name)) == getattr(torch, name)


def test_every_precision_of_the_settings_is_known():
    for field in ("dtype", "encoder_dtype", "vae_dtype"):
        for name in runtime.DTYPES:
            assert merge.load_config(None, [f"runtime.{field}={name}"])
        with pytest.raises(ValueError, match=f"{field} is 'int8'"):
            merge.load_config(None, [f"runtime.{field}=int8"])


def test_apply_sets_what_is_asked():
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [b.allow_tf32 for b in backends]
    try:
        for wanted in (True, False):
            runtime.apply(Runtime(tf32=wanted))
            assert [b.allow_tf32 for b in backends] == [wanted, wanted]
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


# --- memory


@pytest.fixture(scope="module")
def parts(tiny):
    return {part: checkpoint.build(part, tiny) for part in checkpoint.PARTS}


def changed(settings, **sections):
    return dataclasses.replace(
        settings,
        **{name: dataclasses.replace(getattr(settings, name), **values) for name, values in sections.items()},
    )


LARGER = [
    {"sample": {"width": 128}},
    {"sample": {"height": 128}},
    {"sample": {"frames": 4}},
    {"runtime": {"batch": 2}},
    {"runtime": {"dtype": "float64"}},
]


def needs(settings):
    """Bytes of activations by part, as they are counted for a GPU"""
    counted = plans.Ledger(settings).estimate(settings, "cuda").moments
    return {moment.name: moment.activations for moment in counted}


@pytest.mark.parametrize("change", LARGER, ids=str)
def test_the_unet_needs_more_for_more_work(tiny, change):
    assert 0 < needs(tiny)["UNet"] < needs(changed(tiny, **change))["UNet"]


def test_attention_by_its_formula_needs_more(tiny):
    large = changed(tiny, sample={"width": 256, "height": 256})
    assert needs(large)["UNet"] < needs(changed(large, runtime={"attention": "math"}))["UNet"]


@pytest.mark.parametrize(
    "change", [{"runtime": {"vae_chunk": 3}}, {"runtime": {"vae_dtype": "float64"}}], ids=str
)
def test_the_decoder_needs_more_for_more_work(tiny, change):
    start = changed(tiny, runtime={"vae_chunk": 1})
    assert 0 < needs(start)["VAE decoder"] < needs(changed(start, **change))["VAE decoder"]


def test_free_memory_is_told():
    assert 0 < free_memory(torch.device("cpu")) <= 2**63
