"""fast/half.py: half precision on a CPU computes what it should, in training too, and only where it pays."""

import copy
import importlib.util
import logging

import pytest
import torch
from conftest import SMALL

from i2vgen import pipeline
from i2vgen.fast import half, machine, savings
from i2vgen.files import checkpoint
from i2vgen.model.attention import Attention, attend
from i2vgen.model.layers import GroupNorm
from i2vgen.model.unet import UNet
from i2vgen.settings import config
from i2vgen.settings.config import Runtime
from i2vgen.training import loop
from i2vgen.training.settings import Train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def small_unet():
    use = config.Use()
    unet = UNet(SMALL, use).eval()
    checkpoint.fill(unet, checkpoint.random_state(unet, seed=0))
    return unet


def tensors(*shapes, **how):
    return [torch.randn(*shape, **how) for shape in shapes]


# --- attention


@pytest.mark.parametrize("piece", [1, 100, 1000, 2**20])
@pytest.mark.parametrize(("n", "m", "t", "k", "d"), [(5, 2, 7, 7, 8), (1, 3, 40, 11, 4), (6, 1, 1, 9, 8)])
def test_attention_by_products_is_attention(monkeypatch, piece, n, m, t, k, d):
    monkeypatch.setattr(half, "PIECE", piece)
    inputs = [tensors((n, m, t, d), (n, m, k, d), (n, m, k, d), dtype=torch.float64) for _ in range(2)]
    for q, key, v in inputs:
        for x in (q, key, v):
            x.requires_grad_(True)
    (q, key, v), (q2, key2, v2) = inputs[0], [x.detach().clone().requires_grad_(True) for x in inputs[0]]
    ours, wanted = half.attend_by_products(q, key, v), attend(q2, key2, v2, "math")
    assert torch.allclose(ours, wanted, rtol=0, atol=1e-13)
    weight = torch.randn_like(ours)
    (ours * weight).sum().backward()
    (wanted * weight).sum().backward()
    for a, b in zip((q, key, v), (q2, key2, v2), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=0, atol=1e-12)


def test_scores_come_in_pieces(monkeypatch):
    monkeypatch.setattr(half, "PIECE", 2**10)
    held, softmax = [], torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda x, dim: held.append(x.numel()) or softmax(x, dim))
    half.attend_by_products(*tensors((3, 2, 50, 8), (3, 2, 50, 8), (3, 2, 50, 8)))
    assert max(held) <= 2**10 and sum(held) == 3 * 2 * 50 * 50


def test_only_half_precision_on_a_cpu_is_diverted():
    x = torch.zeros(1)
    own = lambda q, k, v: v  # noqa: E731
    assert half.backend("sdpa", x.bfloat16()) is half.attend_by_products
    assert half.backend("auto", x.half()) is half.attend_by_products
    assert half.backend("sdpa", x) == "sdpa" and half.backend("math", x.bfloat16()) == "math"
    assert half.backend("sdpa", x.bfloat16().to("meta")) == "sdpa" and half.backend(own, x.bfloat16()) is own


# --- norms


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("rows", [None, 1, 2])
@pytest.mark.parametrize("shape", [(4, 3, 5, 16), (2, 3, 4, 5, 16)])
def test_a_norm_is_computed_in_float32(shape, rows, silu):
    norm = GroupNorm(4, 16)
    for p in norm.parameters():
        torch.nn.init.normal_(p)
    x = (10 + torch.randn(shape)).bfloat16()
    shift = None if rows is None else torch.randn(rows, 16).bfloat16()
    y = x.double()
    if shift is not None:
        y = y + shift.double().repeat_interleave(len(x) // rows, 0).view(len(x), *[1] * (x.ndim - 2), 16)
    wanted = copy.deepcopy(norm).double()(y)
    wanted = torch.nn.functional.silu(wanted) if silu else wanted
    ours = half.group_norm(norm, x, silu=silu, shift=shift)
    assert ours.dtype == torch.bfloat16 and ours.shape == x.shape
    assert (ours.double() - wanted).abs().max() <= 2**-8 * wanted.abs().max()  # one rounding
    plain = copy.deepcopy(norm).bfloat16()(x.bfloat16() if shift is None else y.bfloat16()).double()
    plain = torch.nn.functional.silu(plain) if silu else plain
    assert (ours.double() - wanted).norm() < (plain - wanted).norm()


# --- a whole step


@torch.no_grad()
def test_a_step_errs_no_more_than_the_plain_network(make_inputs, small_unet):
    """In bfloat16 against float64, with all savings and without."""
    unet = small_unet.double()
    x, t, cond = make_inputs(2, 4, 8, 8)
    wanted = unet(x, t, unet.prepare(cond, 4))
    errors = []
    for names in (("none",), ("all",)):
        network = copy.deepcopy(unet).bfloat16()
        savings.apply(network, Runtime(savings=names))
        out = network(x.bfloat16(), t, network.prepare(cond, 4))
        errors.append(((out.double() - wanted).norm() / wanted.norm()).item())
    assert 0 < errors[1] < 1.1 * errors[0]


def test_the_saving_is_in_use(small_unet, make_inputs, monkeypatch):
    calls = []
    for name in ("attend_by_products", "group_norm"):
        real = getattr(half, name)
        monkeypatch.setattr(
            half, name, lambda *a, real=real, name=name, **k: calls.append(name) or real(*a, **k)
        )
    unet = copy.deepcopy(small_unet).bfloat16()
    x, t, cond = make_inputs(1, 3, 8, 8)
    for names, wanted in ((("half_on_cpu",), {"attend_by_products", "group_norm"}), (("in_place",), set())):
        calls.clear()
        savings.apply(unet, Runtime(savings=names))
        with torch.no_grad():
            unet(x.bfloat16(), t, unet.prepare(cond, 3))
        assert set(calls) == wanted


# --- training


def trained(network, make_inputs):
    x, t, cond = make_inputs(2, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        loss = (network(x.float(), t, network.prepare(cond, 4)).float() ** 2).mean()
    loss.backward()
    grads = {n: p.grad.double() for n, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    return loss.item(), grads


def test_training_has_the_plain_networks_gradients(small_unet, make_inputs):
    plain = copy.deepcopy(small_unet).float().requires_grad_(True)
    fast = copy.deepcopy(plain)
    half.prepare_training(fast)
    torch.manual_seed(0)
    loss, grads = trained(plain, make_inputs)
    torch.manual_seed(0)
    fast_loss, fast_grads = trained(fast, make_inputs)
    assert fast_loss == pytest.approx(loss, rel=0.02) and fast_loss != loss
    assert grads.keys() == fast_grads.keys()
    exact = copy.deepcopy(plain)
    torch.manual_seed(0)
    x, t, cond = make_inputs(2, 4, 8, 8)
    (exact(x.float(), t, exact.prepare(cond, 4)) ** 2).mean().backward()
    wanted = {n: p.grad.double() for n, p in exact.named_parameters() if p.grad is not None}

    def error(found):
        return sum((found[n] - wanted[n]).norm() ** 2 for n in wanted).sqrt().item()

    assert error(fast_grads) < 1.1 * error(grads)


def test_a_prepared_network_stays_what_it_was(small_unet):
    unet = copy.deepcopy(small_unet)
    names = list(unet.state_dict())
    half.prepare_training(unet)
    changed = [module for module in unet.modules() if type(module) in half.TRAINED.values()]
    assert len(changed) > 10 and list(unet.state_dict()) == names
    assert all(isinstance(module, type(module).plain) for module in changed)
    attention = next(module for module in changed if isinstance(module, Attention))
    own = lambda q, k, v: v  # noqa: E731
    attention.backend = own
    assert attention.backend is own
    savings.remove(unet)
    assert not any(type(module) in half.TRAINED.values() for module in unet.modules())
    assert attention.backend is own
    copy.deepcopy(unet)


# --- whether it pays


@pytest.fixture
def speed(monkeypatch):
    """speed(s): this processor multiplies half precision s times as fast as float32."""
    return lambda s: monkeypatch.setattr(machine, "product_speed", lambda dtype: s)


@pytest.fixture
def probing():
    """A copy of the module with its real probe, which conftest.py hides from the tests."""
    spec = importlib.util.spec_from_file_location("machine", machine.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def settings(width=64, **runtime):
    unet = config.UNet(base_width=width, head_width=16, norm_groups=16)
    return config.Config(unet=unet, runtime=Runtime(device="cpu", **runtime))


@pytest.mark.parametrize(
    ("found", "width", "asked", "wanted"),
    [
        (4.5, 64, "auto", "bfloat16"),
        (4.5, 32, "auto", "auto"),
        (1.5, 64, "auto", "auto"),
        (0.0, 64, "auto", "auto"),
        (4.5, 64, "float32", "float32"),
        (4.5, 32, "bfloat16", "bfloat16"),
    ],
)
def test_auto_takes_what_is_faster(speed, recwarn, found, width, asked, wanted):
    speed(found)
    assert machine.choose_dtype(settings(width, dtype=asked)).runtime.dtype == wanted
    assert not recwarn


def test_auto_says_what_it_took(speed, caplog):
    speed(4.5)
    with caplog.at_level(logging.INFO):
        machine.choose_dtype(settings())
    assert "bfloat16, which this CPU multiplies 4.5 times as fast" in caplog.text


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_emulated_precision_is_told(speed, dtype):
    speed(0.02)
    with pytest.warns(UserWarning, match=f"only emulates {dtype}: its products take 50 times as long"):
        machine.choose_dtype(settings(dtype=dtype))


def test_a_probe_that_cannot_run_is_no_reason_to_fail(probing, monkeypatch, caplog):
    def fail(*given):
        raise RuntimeError('"addmm_impl_cpu_" not implemented')

    monkeypatch.setattr(probing, "seconds", fail)
    with caplog.at_level(logging.INFO):
        assert probing.product_speed(torch.bfloat16) == 0.0
    assert "cannot be tried" in caplog.text


def test_the_probe_measures(probing, monkeypatch):
    taken = iter([3.0, 1.0])
    monkeypatch.setattr(probing, "seconds", lambda call, device: next(taken))
    assert probing.product_speed(torch.bfloat16) == 3.0


@pytest.mark.parametrize(("found", "wanted"), [(4.5, torch.bfloat16), (1.0, torch.float32)])
def test_training_takes_what_is_faster(speed, found, wanted):
    speed(found)
    assert loop.precision(Train(), CPU) == wanted
    assert loop.precision(Train(precision="float32"), CPU) == torch.float32


def test_a_loaded_model_computes_in_it(speed, monkeypatch):
    speed(4.5)
    monkeypatch.setattr(machine, "WIDE", 8)
    model = pipeline.load(overrides=["device=cpu", "steps=1"])
    assert model.unet.conv_in.weight.dtype == torch.bfloat16
    clip = model("i2vgen/assets/star.png", "a yellow star moves to the right", seed=1)
    assert clip.config.runtime.dtype == "bfloat16"  # the record says what was computed with
    other = pipeline.load(overrides=["device=cpu", "steps=1", "dtype=bfloat16"])
    again = other("i2vgen/assets/star.png", "a yellow star moves to the right", seed=1)
    assert (clip.frames == again.frames).all()
