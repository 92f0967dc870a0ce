"""Memory plans: every way to take less against the plain one, what is counted against what is measured."""

import copy
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
from conftest import PATHS
from torch import nn

from i2vgen import pipeline
from i2vgen.fast import savings
from i2vgen.fast.layers import in_chunks, norm_of_chunks
from i2vgen.fast.unet import both_branches, projected
from i2vgen.memory import offload, plans, storage
from i2vgen.memory.meter import Meter
from i2vgen.model.attention import Attention
from i2vgen.model.layers import FeedForward, GroupNorm
from i2vgen.settings.config import Runtime


def changed(settings, **sections):
    return dataclasses.replace(
        settings,
        **{name: dataclasses.replace(getattr(settings, name), **values) for name, values in sections.items()},
    )


# --- chunks


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("tokens", [1, 17, 50])
def test_chunks_give_the_plain_numbers(make_unet, make_inputs, batch, tokens):
    unet = make_unet()
    x, t, cond = make_inputs(batch)
    branches = [cond, cond._replace(text=cond.text + 1)]
    wanted = torch.cat([unet(x, t, unet.prepare(c, 4)) for c in branches])
    savings.apply(unet, Runtime(token_chunk=tokens))
    together = both_branches(unet, *(unet.prepare(c, 4) for c in branches))(x, t)
    assert torch.allclose(together, wanted, rtol=0, atol=1e-12)
    apart = torch.cat([unet(x, t, unet.prepare(c, 4)) for c in branches])
    assert torch.allclose(apart, wanted, rtol=0, atol=1e-12)


@torch.no_grad()
def test_statistics_of_a_chunk_alone_would_show(make_unet, make_inputs, monkeypatch):
    """The planted mistake: every chunk normalised by itself."""
    unet = make_unet()
    x, t, cond = make_inputs()
    wanted = unet(x, t, unet.prepare(cond, 4))
    monkeypatch.setattr("i2vgen.fast.temporal.norm_of_chunks", lambda norm, x, size: norm)
    savings.apply(unet, Runtime(token_chunk=17))
    assert (unet(x, t, unet.prepare(cond, 4)) - wanted).abs().max() > 1e-3


@torch.no_grad()
def test_a_norm_of_parts_survives_a_large_mean():
    norm = GroupNorm(2, 4).double()
    norm.weight.copy_(torch.randn(4))
    norm.bias.copy_(torch.randn(4))
    x = torch.randn(2, 3, 10, 4, dtype=torch.float64)
    of_parts = norm_of_chunks(norm, x, 3)
    parts = torch.cat([of_parts(part) for part in x.split(4, dim=2)], dim=2)
    assert torch.allclose(parts, norm(x), rtol=0, atol=1e-13)
    far = 1000 + x.float()  # far from zero float32 keeps three digits, which squares would lose
    wanted = norm(far.double()).float()
    norm.float()
    assert torch.allclose(norm_of_chunks(norm, far, 3)(far), wanted, rtol=0, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_take_less(make_unet, make_inputs, dtype):
    unet = make_unet(dtype=dtype).to("meta")
    x, t, cond = make_inputs(1, 8, 32, 32, dtype=dtype)
    peaks = []
    for tokens in (0, 2048, 1024):
        savings.apply(unet, Runtime(token_chunk=tokens))
        with Meter() as meter:
            given = type(cond)(*(c.to("meta") for c in cond))
            unet(x.to("meta"), t.to("meta"), unet.prepare(given, 8))
        peaks.append(meter.peak)
    assert peaks[2] < peaks[1] < 0.8 * peaks[0], peaks


@torch.no_grad()
def test_a_layer_of_ones_own_sees_all_frames_at_once(make_unet, make_inputs):
    """What mixes frames or pixels where ours does not: the layer around it falls back by itself."""

    class OverFrames(Attention):
        def forward(self, x, context=None):
            return super().forward(x, context) + x.mean(1, keepdim=True)

    class OverPixels(FeedForward):
        def forward(self, x):
            return super().forward(x) + x.mean(-2, keepdim=True)

    unet = make_unet()
    unet.down[0].blocks[0].spatial.cross_attention.__class__ = OverFrames
    unet.up[0].blocks[0].temporal.feed_forward.__class__ = OverPixels
    unet.mid1.temporal_conv.stages[1].norm.__class__ = type("Own", (GroupNorm,), {})
    x, t, cond = make_inputs()
    wanted = unet(x, t, unet.prepare(cond, 4))
    savings.apply(unet, Runtime(token_chunk=17))
    assert torch.allclose(unet(x, t, unet.prepare(cond, 4)), wanted, rtol=0, atol=1e-12)


def test_training_is_not_cut(make_unet, make_inputs):
    unet = make_unet()
    x, t, cond = make_inputs()
    grads = []
    for tokens in (0, 17):
        savings.apply(unet, Runtime(token_chunk=tokens))
        unet.zero_grad()
        unet(x, t, unet.prepare(cond, 4)).square().mean().backward()
        grads.append([p.grad.clone() for p in unet.parameters()])
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(*grads, strict=True))


@torch.no_grad()
def test_in_chunks_may_write_into_its_input():
    x = torch.arange(24.0).view(2, 12)
    wanted = 2 * x + 1
    assert torch.equal(in_chunks(lambda part: 2 * part + 1, 5, 1, x), wanted)
    assert in_chunks(lambda part: 2 * part + 1, 5, 1, x, into=x) is x and torch.equal(x, wanted)


# --- what waits on the CPU


def stream(unet):
    listed = plans.streamable(unet)
    return offload.Streamed(listed.blocks, torch.device("cpu"), resident=listed.resident)


@torch.no_grad()
@pytest.mark.parametrize("names", [("all",), ("share_prefix",)], ids=str)
def test_blocks_that_take_turns_give_the_same_bits(make_unet, make_inputs, names):
    unet = make_unet()
    last = unet.mid1.res.conv1.weight
    last.data = last.data.to(memory_format=torch.channels_last)
    savings.apply(unet, Runtime(savings=names))
    x, t, cond = make_inputs()
    branches = [cond, cond._replace(text=cond.text + 1)]

    def call():
        return both_branches(unet, *(projected(unet, unet.prepare(c, 4)) for c in branches))(x, t)

    wanted, before = call(), {n: p.clone() for n, p in unet.named_parameters()}
    seen = []
    streamed = stream(unet)
    guest = offload.OffloadedPart(unet, torch.device("cpu"), streamed=streamed)
    for block in plans.streamable(unet).blocks:
        block.register_forward_pre_hook(
            lambda module, inputs: seen.append(module.res.conv1.weight.untyped_storage().data_ptr())
        )
    for _ in range(2):  # it can be entered again
        with guest:
            for _ in range(2):
                assert torch.equal(call(), wanted)
            buffers = {b.untyped_storage().data_ptr() for b in streamed.buffers}
            assert set(seen) == buffers and len(buffers) == 2
            seen.clear()
        assert streamed.buffers == []
    assert last.is_contiguous(memory_format=torch.channels_last)
    for name, parameter in unet.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert torch.equal(call(), wanted)  # at home, outside


@torch.no_grad()
def test_a_block_that_comes_unexpectedly_is_fetched(make_unet):
    unet = make_unet()
    blocks = plans.streamable(unet).blocks
    streamed = stream(unet)
    streamed.start()
    for i in (2, 0, 0, 1, len(blocks) - 1):
        home = streamed.packed_blocks[i].home.clone()
        streamed._begin(i)
        here = streamed.packed_blocks[i].held[0]
        flat = streamed.buffers[streamed.last]
        assert here.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
        # Byte by byte, alignment apart: what `home` holds.
        for a, b in zip(
            streamed.packed_blocks[i]._views(flat), streamed.packed_blocks[i]._views(home), strict=True
        ):
            assert torch.equal(a, b)
        streamed._end(i)
    streamed.stop()


@torch.no_grad()
def test_weights_that_did_not_arrive_would_show(make_unet, make_inputs, monkeypatch):
    unet = make_unet()
    x, t, cond = make_inputs()
    wanted = unet(x, t, unet.prepare(cond, 4))
    streamed, right = stream(unet), offload.Streamed._fetch

    def late(self, i, buffer):
        if i != 1:
            right(self, i, buffer)
        else:
            self.holds[buffer] = i

    monkeypatch.setattr(offload.Streamed, "_fetch", late)
    with offload.OffloadedPart(unet, torch.device("cpu"), streamed=streamed):
        assert not torch.allclose(unet(x, t, unet.prepare(cond, 4)), wanted)


@pytest.mark.parametrize("how", ["parts", "blocks"])
def test_the_road_with_parts_that_come_and_go(road, picture, how):
    wanted = road(picture, "a boat").frames
    settings = changed(road.config, runtime={"offload": how, "token_chunk": 17})
    model = pipeline.I2VGenXL(settings, *copy.deepcopy([road.unet, road.vae, road.clip]), road.device)
    model.offloaded = plans.offloaded_parts(model.parts, settings, model.device)
    assert set(model.offloaded) == {"unet", "vae", "clip"}
    savings.apply(model.unet, settings.runtime)
    for _ in range(2):
        assert np.abs(model(picture, "a boat").frames.astype(int) - wanted).max() <= 1
    noise = pipeline.invert(model, wanted, picture, "a boat")
    assert torch.allclose(noise, pipeline.invert(road, wanted, picture, "a boat"), atol=1e-6)
    for guest in model.offloaded.values():
        home = guest.packed.home.untyped_storage().data_ptr()
        assert all(t.untyped_storage().data_ptr() == home for t in guest.packed.held)


# --- eight bits


@torch.no_grad()
@pytest.mark.parametrize(("how", "bound"), [("int8", 0.5 / 127), ("float8", 1 / 16)])
def test_a_weight_in_eight_bits(how, bound):
    linear = nn.Linear(128, 256)
    linear.weight.mul_(torch.logspace(-3, 3, 256)[:, None])  # each output channel has its own scale
    plain = linear.weight.clone()
    storage.store(linear, how)
    stored = linear.parametrizations.weight.original0
    assert stored.element_size() == 1 and linear.weight.dtype == torch.float32
    error = (linear.weight - plain).abs().amax(1) / plain.abs().amax(1)
    assert 0 < error.max() <= bound * 1.001
    assert isinstance(linear, nn.Linear)


@torch.no_grad()
def test_a_unet_in_eight_bits_drifts_little_and_takes_less(make_unet, make_inputs):
    plain, eight = make_unet(dtype=torch.float32), make_unet(dtype=torch.float32)
    storage.store(eight, "native")
    assert offload.flat_bytes(offload.tensors(eight)) == offload.flat_bytes(offload.tensors(plain))
    storage.store(eight, "int8")
    x, t, cond = make_inputs(dtype=torch.float32)
    for runtime_ in (Runtime(), Runtime(token_chunk=17)):
        savings.apply(eight, runtime_)
        out, wanted = (u(x, t, u.prepare(cond, 4)) for u in (eight, plain))
        assert 0 < (out - wanted).norm() / wanted.norm() < 0.03
    assert offload.flat_bytes(offload.tensors(eight)) < 0.6 * offload.flat_bytes(offload.tensors(plain))


# --- half precision


def test_an_autoencoder_that_overflows_computes_again(road, with_config, picture):
    vae = copy.deepcopy(road.vae)
    with torch.no_grad():
        for conv in (vae.encoder.conv_in, vae.decoder.conv_in):  # norms undo it; float16 ends at 65504
            conv.weight.mul_(1e5).clamp_(-6e4, 6e4)
    wide = pipeline.I2VGenXL(road.config, road.unet, vae.float(), road.clip, road.device)
    wanted = wide(picture, "a boat").frames.astype(int)
    half = pipeline.I2VGenXL(road.config, road.unet, copy.deepcopy(vae).half(), road.clip, road.device)
    with pytest.warns(UserWarning, match=r"overflows in float16; computed again.*runtime\.vae_dtype"):
        frames = half(picture, "a boat").frames.astype(int)
    assert frames.std() > 1 and np.abs(frames - wanted).mean() < 20
    assert half.vae.dtype == torch.float16


def test_latents_that_overflow_name_the_step_and_the_way_out(road, picture):
    unet = copy.deepcopy(road.unet)
    with torch.no_grad():
        unet.conv_out.weight.mul_(1e9)
    model = pipeline.I2VGenXL(road.config, unet.half(), road.vae, road.clip, road.device)
    with pytest.raises(FloatingPointError, match=r"after step 1 of .*runtime\.dtype=bfloat16"):
        model(picture, "a boat")


# --- the choice


@pytest.fixture
def counted(monkeypatch):
    """Estimates that need no counting: so many bytes per pixel."""
    bytes_ = {"full": 100, "balanced": 50, "low": 20}

    class Ledger:
        def __init__(self, settings):
            pass

        def estimate(self, settings):
            sample, plan = settings.sample, settings.runtime.memory
            per_pixel = bytes_[plan] * (2 if settings.runtime.batch_guidance else 1)
            need = per_pixel * sample.width * sample.height
            return plans.Estimate(plan, (plans.Moment("UNet", 0, need),))

    monkeypatch.setattr(plans, "Ledger", Ledger)
    return bytes_


FITS = [
    (2**60, "full", True), (200, "full", True), (199, "full", False), (100, "full", False),
    (99, "balanced", False), (50, "balanced", False), (49, "low", False),
]  # fmt: skip


@pytest.mark.parametrize(("free", "plan", "batched"), FITS)
def test_auto_takes_the_fastest_plan_that_fits(tiny, counted, free, plan, batched):
    """On a CPU one batch for both branches of guidance is the fastest, for twice the activations."""
    settled, estimate = plans.choose(tiny, free * 64 * 64)
    assert settled.runtime.memory == estimate.plan == plan and settled.runtime.batch_guidance is batched
    assert plans.choose(settled, free * 64 * 64)[0] == settled  # a recorded choice stays what it is
    asked = changed(tiny, runtime={"memory": plan, "batch_guidance": batched})
    assert plans.choose(asked, 2**60)[0] == settled


def test_batching_is_chosen_only_where_it_pays_and_is_not_decided(tiny, counted, monkeypatch):
    def batched(**runtime):
        return plans.choose(changed(tiny, runtime=runtime), 2**60)[0].runtime.batch_guidance

    assert batched() and not batched(batch_guidance=False) and not batched(memory="full")
    unguided = changed(tiny, sample={"guidance": 1.0})
    assert not plans.choose(unguided, 2**60)[0].runtime.batch_guidance
    monkeypatch.setattr(plans.runtime, "device", lambda runtime: torch.device("cuda"))
    assert batched()
    monkeypatch.setattr(plans, "FEW_TOKENS", 3 * 8 * 8 - 1)
    assert not batched()


def test_full_is_what_the_settings_say(tiny):
    for more in ({}, {"token_chunk": 9, "vae_chunk": 5, "offload": "parts"}):
        settings = changed(tiny, runtime=more)
        wanted = {"memory": "full", "batch_guidance": False}
        assert plans.settle(settings, "full") == changed(settings, runtime=wanted)


def test_a_plan_leaves_what_the_user_set(tiny):
    settled = plans.settle(changed(tiny, runtime={"vae_chunk": 5}), "low", "cuda").runtime
    assert (settled.vae_chunk, settled.token_chunk, settled.offload) == (5, 28_160, "blocks")
    assert plans.settle(tiny, "low").runtime.offload == "none"  # on a CPU nothing would be saved
    for name in ("compile", "cuda_graph"):  # neither can follow weights that move
        fixed = changed(tiny, runtime={name: True})
        assert plans.settle(fixed, "low", "cuda").runtime.offload == "parts"
        with pytest.raises(ValueError, match=rf"offload=blocks .*runtime\.{name} cannot follow"):
            changed(tiny, runtime={name: True, "offload": "blocks"})


def test_a_plan_that_does_not_fit_names_one_that_does(tiny, counted):
    asked = changed(tiny, runtime={"memory": "full"})
    with pytest.raises(ValueError, match=r"64 x 64 x 3 needs about .* are free; memory=low would fit"):
        plans.choose(asked, 30 * 64 * 64)
    assert plans.choose(changed(asked, runtime={"check_memory": False}), 0)[0].runtime.memory == "full"


@pytest.mark.parametrize("plan", ["auto", "full", "low"])
def test_advice_that_is_followed_fits_and_no_larger_size_does(tiny, counted, plan):
    wide = changed(tiny, sample={"width": 512, "height": 384}, runtime={"memory": plan})
    free = 20 * 300 * 250
    with pytest.raises(ValueError, match="512 x 384 x 3 needs") as caught:
        plans.choose(wide, free)
    advised = re.search(r"memory=low width=(\d+) height=(\d+) would fit", str(caught.value))
    size = int(advised[1]), int(advised[2])
    sizes = plans.smaller_sizes(wide)
    better = sizes[sizes.index(size) - 1]
    for (width, height), fits in ((size, True), (better, False)):
        settled = changed(wide, sample={"width": width, "height": height}, runtime={"memory": "low"})
        assert (plans.Ledger(wide).estimate(settled).total <= free) == fits
    assert all(w % 64 == h % 64 == 0 and w < 512 for w, h in sizes)


def test_no_size_fits_where_the_smallest_does_not(tiny, counted):
    with pytest.raises(ValueError, match=r"no size fits.*\(runtime\.check_memory=false runs anyway\)"):
        plans.choose(tiny, 10)


# --- the estimate


@pytest.fixture(scope="module")
def ledger(tiny):
    return plans.Ledger(tiny)


def test_weights_are_counted_where_they_are(tiny, tiny_model, ledger):
    sizes = {name: offload.flat_bytes(offload.tensors(part)) for name, part in ledger.parts.items()}
    everything = sum(sizes.values())
    for part in sizes:
        assert ledger.weights(part, tiny, "cuda") == everything
        away = changed(tiny, runtime={"offload": "parts"})
        assert ledger.weights(part, away, "cuda") == sizes[part]
        assert ledger.weights(part, away, "cpu") == everything + sizes[part]
    one_by_one = changed(tiny, runtime={"offload": "blocks"})
    assert ledger.weights("vae", one_by_one, "cuda") == sizes["vae"]
    unet = copy.deepcopy(tiny_model.unet)
    streamed = stream(unet)
    guest = offload.OffloadedPart(unet, torch.device("cpu"), streamed=streamed)
    here = guest.packed.nbytes + streamed.buffer_bytes
    assert ledger.weights("unet", one_by_one, "cuda") == here < 0.6 * sizes["unet"]


def test_a_part_that_meta_cannot_run_is_not_counted():
    with pytest.warns(UserWarning, match="of a part is not counted, since it does not run on meta"):
        assert plans.peak(lambda: float(torch.ones(1, device="meta"))) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plans.peak(lambda: torch.ones(100, device="meta")) == 400


MEASURE = """
import ctypes, gc, json, sys, warnings
from pathlib import Path
import torch
from PIL import Image
from i2vgen import (load_config, pipeline)

warnings.simplefilter("ignore")
torch.set_num_threads(1)

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

def run(*words):
    settings = load_config(sys.argv[1], ["steps=1", "guidance=1", "device=cpu", *words], weights="random")
    told = []
    pipeline.load_parts(settings, tell=told.append)(Image.new("RGB", (64, 64), "red"), "a")
    return told[0].total

run("width=64", "frames=1")  # what PyTorch and the libraries keep for themselves
found = []
for words in json.loads(sys.argv[2]):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    found.append((run(*words), status("VmHWM") - before))
print(json.dumps(found))
"""
MEASURED = [  # in the autoencoder, in the UNet, in the weights
    ["width=192", "height=192", "frames=6", "vae_chunk=6", "memory=full"],
    ["width=256", "height=192", "frames=6", "attention=math", "memory=full"],
    [
        "width=128",
        "frames=4",
        "memory=low",
        "token_chunk=100",
        "unet.base_width=64",
        "unet.head_width=16",
        "dtype=float32",
    ],
]


@pytest.mark.slow  # measures
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="Linux tells the peak of a process")
def test_the_estimate_is_what_a_run_takes(root):
    """Within 15 % of the process's own memory, whatever it is that takes most."""
    environment = {**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}
    environment["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed goes back at once
    command = [sys.executable, "-c", MEASURE, str(root / "configs" / "tiny.yaml"), json.dumps(MEASURED)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for words, (estimated, measured) in zip(MEASURED, json.loads(done.stdout), strict=True):
        assert 0.85 < estimated / measured < 1.15, (words, estimated / 2**20, measured / 2**20)


def test_a_hopeless_size_is_refused_within_seconds(tiny):
    size = {"width": 65536, "height": 65536, "frames": 64}
    hopeless = changed(tiny, sample=size, runtime={"memory": "auto"})
    start = time.process_time()
    with pytest.raises(
        ValueError, match=r"needs at least \d.* GiB under memory=low and 1\.0 GiB are free; give"
    ):
        plans.choose(hopeless, 2**30)
    assert time.process_time() - start < 30


def test_what_is_called_hopeless_does_not_fit(tiny, monkeypatch):
    """The line through two narrow strips runs just below the true peak."""
    monkeypatch.setattr(plans, "LARGE", 2**15)
    runtime = {"memory": "balanced", "token_chunk": 2**12}
    large = changed(tiny, sample={"width": 1024, "height": 512, "frames": 8}, runtime=runtime)
    ledger = plans.Ledger(large)
    settled = plans.settle(large, "balanced")
    savings.apply(ledger.parts["unet"], settled.runtime)
    true = plans.peak(lambda: plans.step(ledger.parts["unet"], settled))
    plans.refuse_hopeless(large, ledger, true)
    with pytest.raises(ValueError, match="needs at least"):
        plans.refuse_hopeless(large, ledger, int(0.8 * true))


def test_more_than_pytorch_can_count_is_more_than_fits():
    assert plans.peak(lambda: torch.empty(2**40, 2**40, device="meta")) == plans.UNCOUNTABLE
