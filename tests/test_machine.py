"""What a machine has: attention by name and by measurement, compiled blocks, recorded steps, large sizes."""

import dataclasses
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from i2vgen import pipeline
from i2vgen.bench.count import META, inputs
from i2vgen.fast import compiled, machine, savings
from i2vgen.fast.unet import shared
from i2vgen.memory.meter import Meter
from i2vgen.model import attention
from i2vgen.model.attention import Attention, FrameAttention, attend
from i2vgen.model.unet import UNet
from i2vgen.settings import config

CPU = torch.device("cpu")
EXACT = {"rtol": 0, "atol": 1e-12}


def qkv(n=2, m=3, t=5, d=8, dtype=torch.float64):
    return torch.randn(3, n, m, t, d, dtype=dtype).unbind()


def with_runtime(**changed):
    return config.Config(runtime=config.Runtime(device="cpu", **changed))


# --- backends by name


def flash3_package(monkeypatch, function):
    package = types.ModuleType("flash_attn_interface")
    package.flash_attn_func = function
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)


@pytest.mark.parametrize("name", ["cudnn", "efficient", "flash3"])
def test_a_backend_that_is_not_there_is_refused_before_any_work(name):
    with pytest.raises(ValueError, match=rf"attention is {name}, .*on cpu: it needs .*attention=auto takes"):
        machine.refuse_missing(with_runtime(attention=name), CPU)


def test_each_refusal_says_what_is_needed():
    assert set(machine.NEEDS) == set(attention.BACKENDS) - {"auto", "sdpa", "math"}
    with pytest.raises(ValueError, match="the package flash_attn_interface"):
        machine.refuse_missing(with_runtime(attention="flash3"), CPU)


@pytest.mark.parametrize("name", ["auto", "sdpa", "math", "flash"])
def test_backends_of_a_cpu(name):
    machine.refuse_missing(with_runtime(attention=name), CPU)
    q, k, v = qkv()
    torch.testing.assert_close(attend(q, k, v, name), attend(q, k, v, "math"), **EXACT)


def test_the_road_refuses_before_it_loads(monkeypatch):
    monkeypatch.setattr(pipeline.checkpoint, "load", lambda *a, **k: pytest.fail("loaded"))
    for word in ("attention=cudnn", "cuda_graph=true"):
        with pytest.raises(ValueError, match=rf"runtime\.{word.split('=')[0]} is"):
            pipeline.load(overrides=[word, "device=cpu"])


@pytest.mark.parametrize("sums", [True, False])
def test_flash_attention_3_gets_its_own_layout(sums, monkeypatch):
    def flash(q, k, v):  # [n t m d]
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        return (out, None) if sums else out

    flash3_package(monkeypatch, flash)
    q, k, v = qkv()
    torch.testing.assert_close(attend(q, k, v, "flash3"), attend(q, k, v, "math"), **EXACT)
    machine.refuse_missing(with_runtime(attention="flash3"), CPU)


def test_heads_of_any_width_get_no_kernel_by_name():
    assert [attention.for_any_heads(name) for name in ("flash", "auto", "sdpa", "math")] == [
        "sdpa", "sdpa", "sdpa", "math"
    ]  # fmt: skip


# --- backends by measurement


def test_the_fastest_that_is_right_is_taken(monkeypatch):
    def wrong(q, k, v):
        return torch.zeros_like(q)

    flash3_package(monkeypatch, wrong)
    times = iter([3.0, 2.0])  # sdpa, flash; flash3 is there and quick, but wrong
    monkeypatch.setattr(machine, "seconds", lambda call, device: next(times))
    assert machine.fastest(*qkv(dtype=torch.float32)) == "flash"
    times = iter([1.0, 2.0])
    assert machine.fastest(*qkv(dtype=torch.float32)) == "sdpa"
    assert next(times, None) is None


def test_every_attention_gets_its_kind(make_unet, small, monkeypatch):
    seen = []

    def fastest(q, k, v):
        seen.append((q.shape, k.shape))
        return ("flash", "cudnn", "efficient")[len(seen) - 1]

    monkeypatch.setattr(machine, "fastest", fastest)
    unet = make_unet()
    cfg = dataclasses.replace(
        with_runtime(batch=2),
        unet=small,
        clip=config.Clip(embed_dim=12, text=dict(config.Clip().text) | {"width": 16, "heads": 2}),
        sample=config.Sample(width=64, height=32, frames=3),
    )
    assert list(machine.choose_attention(unet, cfg, torch.device("cpu")).values()) == [
        "flash",
        "cudnn",
        "efficient",
    ]
    assert seen[0] == ((6, 4, 32, 8), (6, 4, 32, 8))
    assert seen[1] == ((2, 4, 96, 8), (2, 4, 77 + 4 + 4, 8))
    assert seen[2] == ((32, 4, 3, 8), (32, 4, 3, 8))
    for name, part in unet.named_modules():
        if isinstance(part, Attention) and not name.startswith(("stem", "temporal_in")):
            kind = 2 if isinstance(part, FrameAttention) else int("cross" in name)
            assert part.backend == ("flash", "cudnn", "efficient")[kind]


def test_time_is_taken_after_warming_up():
    calls = []
    assert machine.seconds(lambda: calls.append(1), CPU) >= 0 and len(calls) == 5


# --- sizes beyond what 16 and 32 bits count


def test_more_sequences_than_a_kernel_counts(monkeypatch):
    q, k, v = qkv(n=11)
    whole, sizes = attend(q, k, v), []
    monkeypatch.setattr(attention, "MAX_SEQUENCES", 4)
    right = F.scaled_dot_product_attention

    def counted(q, *rest):
        sizes.append(len(q))
        return right(q, *rest)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    assert attend(q, k, v).equal(whole) and sizes == [4, 4, 3]
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert attend(*strided).equal(whole) and attend(*strided).stride() == strided[0].stride()


@torch.no_grad()
@pytest.mark.parametrize("plan", [{}, {"savings": tuple(config.SAVINGS)}], ids=["default", "kernels"])
def test_the_whole_network_beyond_2_to_the_31(plan):
    """Three videos of 32 frames at 1280 x 704: a feed-forward alone has 5.5e9 values."""
    cfg = config.Config(sample=config.Sample(frames=32), runtime=config.Runtime(**plan))
    with META:
        unet = UNet(cfg.unet, cfg.use)
    savings.apply(unet, cfg.runtime)
    unet.to(torch.bfloat16).eval()
    sizes = []
    unet.temporal_in.feed_forward.proj_in.register_forward_hook(lambda m, a, y: sizes.append(y.numel()))
    with Meter() as meter:
        x, t, conditions = inputs(cfg, batch=3)
        assert unet(x, t, unet.prepare(conditions, 32)).shape == (3, 4, 32, 88, 160)
    assert sizes == [3 * 32 * 88 * 160 * 4096] and sizes[0] > 2**31
    assert meter.flops > 6 * 80e12


# --- compiled blocks


@pytest.fixture
def compiling(monkeypatch):
    """compiling(backend): torch.compile with it, and its settings as they were afterwards"""
    right, limit = torch.compile, torch._dynamo.config.cache_size_limit
    torch._dynamo.reset()
    yield lambda backend: monkeypatch.setattr(torch, "compile", lambda f: right(f, backend=backend))
    torch._dynamo.reset()
    torch._dynamo.config.cache_size_limit = limit


@torch.no_grad()
def test_blocks_of_one_shape_are_compiled_once(make_unet, make_inputs, compiling):
    unet, graphs = make_unet(blocks_per_level=2), []
    x, t, conditions = make_inputs(1, 3)
    prepared = unet.prepare(conditions, 3)
    plain = unet(x, t, prepared)
    compiling(lambda graph, example: graphs.append(1) or graph.forward)
    compiled.compile_blocks(unet)
    torch.testing.assert_close(unet(x, t, prepared), plain, **EXACT)
    blocks, made = len(list(unet.blocks())), len(graphs)
    assert 0 < made < blocks
    torch.testing.assert_close(unet(x, t, prepared), plain, **EXACT)
    assert len(graphs) == made


@torch.no_grad()
def test_a_compiler_that_fails_is_left_out_once(make_unet, make_inputs, compiling):
    unet, tried = make_unet(), []
    x, t, conditions = make_inputs(1, 3)
    prepared = unet.prepare(conditions, 3)
    plain = unet(x, t, prepared)

    def backend(graph, example):
        tried.append(1)
        raise RuntimeError("no compiler\nand more lines")

    compiling(backend)
    compiled.compile_blocks(unet)
    with pytest.warns(UserWarning, match=r"runtime\.compile does not work here and is left out") as warned:
        torch.testing.assert_close(unet(x, t, prepared), plain, **EXACT)
    assert len(tried) == len(warned) == 1 and "\n" not in str(warned[0].message)
    torch.testing.assert_close(unet(x, t, prepared), plain, **EXACT)
    assert len(tried) == 1


@torch.no_grad()
def test_no_compiler_at_all(make_unet, make_inputs, monkeypatch):
    def compile(function):
        raise RuntimeError("Dynamo is not supported here")

    monkeypatch.setattr(torch, "compile", compile)
    unet = make_unet()
    x, t, conditions = make_inputs(1, 3)
    prepared = unet.prepare(conditions, 3)
    plain = unet(x, t, prepared)
    compiled.compile_blocks(unet)
    with pytest.warns(UserWarning, match="Dynamo is not supported here"):
        assert unet(x, t, prepared).equal(plain)


@pytest.mark.slow
@torch.no_grad()
def test_a_real_compiler(make_unet, make_inputs, compiling, recwarn):
    unet = make_unet(dtype=torch.float32)
    x, t, conditions = make_inputs(1, 3, dtype=torch.float32)
    prepared = unet.prepare(conditions, 3)
    plain = unet(x, t, prepared)
    savings.apply(unet, config.Runtime())
    compiling("inductor")
    compiled.compile_blocks(unet)
    torch.testing.assert_close(unet(x, t, prepared), plain, rtol=1e-4, atol=1e-4)
    assert not [w for w in recwarn if "left out" in str(w.message)]


# --- recorded steps


@pytest.fixture
def recorder(monkeypatch):
    """CUDA graphs on a CPU: a recording is the call itself. -> how often was recorded"""
    recorded = []
    monkeypatch.setattr(compiled, "record", lambda call: recorded.append(1) or call)
    return recorded


@torch.no_grad()
def test_a_recorded_step_hears_its_inputs(make_unet, make_inputs, recorder):
    unet = make_unet()
    x, t, conditions = make_inputs(1, 3)
    prepared = unet.prepare(conditions, 3)
    play = compiled.Recorded(lambda x, t: unet(x, t, prepared), unet)
    outs = []
    for new_x, new_t in ((x, t), (x + 1, t - 5), (x, t)):
        outs.append(play(new_x, new_t))
        torch.testing.assert_close(outs[-1], unet(new_x, new_t, prepared), **EXACT)
    assert recorder == [1] and outs[0].data_ptr() != outs[2].data_ptr()
    prepared.context.mul_(1.1)  # what it holds is read where it lies
    torch.testing.assert_close(play(x, t), unet(x, t, prepared), **EXACT)
    longer = torch.cat([x, x])
    assert play(longer[:1].float(), t).dtype == torch.float64 and recorder == [1, 1]


@torch.no_grad()
def test_a_recording_that_fails_is_left_out_once(monkeypatch):
    def record(call):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(compiled, "record", record)
    play = compiled.Recorded(lambda x, t: x + t, torch.nn.Identity())
    x, t = torch.ones(2), torch.ones(1)
    with pytest.warns(UserWarning, match=r"cuda_graph does not work here.*capturing$") as warned:
        assert play(x, t).equal(x + t)
    assert play(x + 1, t).equal(x + 1 + t) and len(warned) == 1


def test_running_out_of_memory_is_no_reason_to_go_on(monkeypatch):
    def record(call):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(compiled, "record", record)
    with pytest.raises(torch.OutOfMemoryError):
        compiled.Recorded(lambda x, t: x, torch.nn.Identity())(torch.ones(1), torch.ones(1))


def test_the_road_records_where_it_is_told(road, with_config, picture, recorder):
    clips = []
    for on in (False, True):
        model = with_config(road, runtime={"cuda_graph": on})
        clips.append(pipeline.generate(model, [picture], ["a boat"], [3]))
    # The noise comes in float32 and goes on in this network's float64.
    assert recorder == [1, 1] and (clips[0].int() - clips[1].int()).abs().max() <= 1


# --- nothing is remembered that changed


@torch.no_grad()
@pytest.mark.parametrize("change", ["prompt", "image", "fps", "guidance"])
def test_what_changes_between_steps_is_heard(change, road, with_config, recorder):
    """Two steps of guidance, something changed between them: what the plain modules give."""
    unet, runtime = road.unet, road.config.runtime
    (h, w), frames = road.config.latent_size, road.config.sample.frames
    b, c, k = 1, road.config.unet.in_channels, road.config.unet.context_width
    text, vector = torch.randn(b, 7, k).double(), torch.randn(b, road.config.unet.image_vector_width).double()
    first = pipeline.Conditions(text, vector, torch.randn(b, c, h, w).double(), torch.tensor([8]))
    other = {
        "prompt": first._replace(text=text.flip(1) + 1),
        "image": first._replace(image_latent=first.image_latent + 1, image_vector=vector - 1),
        "fps": first._replace(fps=first.fps + 5),
        "guidance": first,
    }[change]
    steps = [(first, 9.0), (other, 3.0 if change == "guidance" else 9.0)]
    x, t = torch.randn(b, c, frames, h, w).double(), torch.tensor([500])
    outs = []
    for settings in ({"savings": ("none",)}, {"cuda_graph": True}):
        outs.append([])
        for cond, guidance in steps:
            model = with_config(road, runtime=settings, sample={"guidance": guidance})
            savings.apply(unet, model.config.runtime)
            uncond = cond._replace(text=torch.zeros_like(text))
            outs[-1].append(pipeline.network(model, cond, uncond)(x, t))
    assert shared(unet, [unet.prepare(first, frames)] * 2) is not None  # the shared prefix was really taken
    savings.apply(unet, runtime)
    for plain, fast in zip(*outs, strict=True):
        torch.testing.assert_close(fast, plain, **EXACT)
    assert not torch.allclose(*outs[0])
