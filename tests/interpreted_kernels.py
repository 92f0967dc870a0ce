"""The Triton kernels, number by number on the CPU: `test_kernels.py` runs this with TRITON_INTERPRET=1."""

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from i2vgen.fast import kernels, savings, triton_kernels
from i2vgen.settings import config

EXACT = {"rtol": 0, "atol": 1e-12}
HALVES = (torch.float16, torch.bfloat16)


def normal(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


@pytest.fixture
def plain(monkeypatch):
    """plain(operation, *inputs): by PyTorch's own operations"""

    def run(operation, *inputs):
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "by_triton", lambda x: False)
            return operation(*inputs)

    return run


@pytest.fixture
def _bfloat16_as_on_a_gpu(monkeypatch):
    """The interpreter cuts a float32 where a GPU rounds it, and multiplies bfloat16 by their bits."""
    cut, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def convert(numbers, source, target, mode):
        if str(target) != "bf16":
            return cut(numbers, source, target, mode)
        rounded = torch.from_numpy(np.ascontiguousarray(numbers)).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view(np.uint16)

    def wide(x):
        if str(x.dtype.scalar) != "bf16":
            return x
        bits = x.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *rest: dot(self, wide(a), wide(b), *rest),
    )


def test_the_interpreter_is_on():
    assert kernels.interpreted()
    assert "kernels" in savings.chosen(("kernels",), torch.device("cpu"))
    assert "kernels" not in savings.chosen(("all",), torch.device("cpu"))


# n, positions, channels, groups: odd everywhere, several tiles of rows and of channels, one value per group
SIZES = [(2, (3, 5), 12, 4), (1, (70,), 96, 8), (3, (129,), 70, 7), (4, (2,), 8, 8), (6, (1, 1), 24, 3)]


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize(("n", "p", "c", "groups"), SIZES)
def test_group_norm(n, p, c, groups, silu, plain):
    x, weight, bias = normal(n, *p, c) * 3 + 20, normal(c), normal(c)
    for shift in (None, normal(1, c), normal(n, c)):
        got = kernels.group_norm(x, groups, weight, bias, 1e-5, silu, shift)
        wanted = plain(kernels.group_norm, x, groups, weight, bias, 1e-5, silu, shift)
        torch.testing.assert_close(got, wanted, **EXACT)
        wrong = plain(kernels.group_norm, x, groups, weight, bias, 1e-6, silu, shift)
        assert not torch.allclose(got, wrong, **EXACT)


def test_the_shift_of_group_norm_belongs_to_neighbours(plain):
    x, weight, bias, shift = normal(6, 5, 8), normal(8), normal(8), normal(3, 8)
    got = kernels.group_norm(x, 2, weight, bias, 1e-5, True, shift)
    wanted = plain(
        kernels.group_norm, x + shift.repeat_interleave(2, 0)[:, None], 2, weight, bias, 1e-5, True, None
    )
    torch.testing.assert_close(got, wanted, **EXACT)
    wrong = plain(kernels.group_norm, x + shift.repeat(2, 1)[:, None], 2, weight, bias, 1e-5, True, None)
    assert not torch.allclose(got, wrong, **EXACT)


def test_group_norm_in_many_runs(plain, monkeypatch):
    """As many partial moments as a large tensor has, more than one round of `group_moments`."""
    monkeypatch.setattr(triton_kernels, "ROWS", 2)
    x, weight, bias = normal(1, 77, 6) + 1000, normal(6), normal(6)
    got = kernels.group_norm(x, 3, weight, bias, 1e-5, False, None)
    torch.testing.assert_close(
        got, plain(kernels.group_norm, x, 3, weight, bias, 1e-5, False, None), rtol=0, atol=1e-10
    )


def test_float32_moments_survive_a_large_mean():
    """Sums of squares would lose all digits here."""
    x = (normal(1, 300, 4) + 4000).float()
    got = kernels.group_norm(x, 1, torch.ones(4), torch.zeros(4), 1e-5, False, None)
    assert (got.double() - (x.double() - x.double().mean()) / x.double().std(correction=0)).abs().max() < 1e-3


@pytest.mark.parametrize("shape", [(3, 5, 2 * 37), (1, 2), (2, 2 * 1500)], ids=str)
def test_geglu(shape, plain):
    x = normal(*shape)
    torch.testing.assert_close(kernels.geglu(x), plain(kernels.geglu, x), **EXACT)
    assert not torch.allclose(kernels.geglu(x), plain(kernels.geglu, x.roll(shape[-1] // 2, -1)), **EXACT)


@pytest.mark.parametrize("shape", [(5, 7, 37), (1, 3), (3, 320)], ids=str)
def test_layer_norm(shape, plain):
    x, (owed, weight, bias) = normal(*shape), normal(3, shape[-1])
    got = kernels.layer_norm(x, owed, weight, bias, 1e-5)
    torch.testing.assert_close(got, plain(kernels.layer_norm, x, owed, weight, bias, 1e-5), **EXACT)
    assert not torch.allclose(got, plain(kernels.layer_norm, x, 0 * owed, weight, bias, 1e-5), **EXACT)


@pytest.mark.parametrize(
    ("b", "f", "p", "heads", "d"),
    [(2, 3, 5, 2, 8), (1, 16, 2, 3, 64), (1, 17, 4, 1, 10), (3, 32, 1, 2, 16), (1, 1, 2, 2, 4)],
)
def test_frame_attention(b, f, p, heads, d, plain):
    joint = normal(b, f, p, 3 * heads * d).chunk(3, dim=-1)
    for q, k, v in (
        joint,
        [x.contiguous() for x in joint],
        [x.transpose(1, 2).contiguous().transpose(1, 2) for x in joint],
    ):
        got = kernels.frame_attention(q, k, v, heads)
        assert got.is_contiguous()
        torch.testing.assert_close(got, plain(kernels.frame_attention, q, k, v, heads), **EXACT)
        if f > 1:
            assert not torch.allclose(got, plain(kernels.frame_attention, k, q, v, heads), **EXACT)


@pytest.mark.usefixtures("_bfloat16_as_on_a_gpu")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_is_no_worse_than_plain(dtype, plain):
    """Against float64 numbers from the same half-precision inputs."""
    x, weight, bias = normal(2, 90, 24, dtype=dtype) * 2, normal(24, dtype=dtype), normal(24, dtype=dtype)
    shift, wide = normal(1, 24, dtype=dtype), normal(40, 2 * 48, dtype=dtype)
    q, k, v = normal(1, 16, 5, 3 * 32, dtype=dtype).chunk(3, dim=-1)
    for operation, inputs in (
        (kernels.group_norm, (x, 4, weight, bias, 1e-5, True, shift)),
        (kernels.group_norm, (x, 4, weight, bias, 1e-5, False, None)),
        (kernels.geglu, (wide,)),
        (kernels.layer_norm, (x, shift[0], weight, bias, 1e-5)),
        (kernels.frame_attention, (q, k, v, 2)),
    ):
        exact = plain(operation, *(i.double() if isinstance(i, torch.Tensor) else i for i in inputs))
        fused, usual = operation(*inputs), plain(operation, *inputs)
        assert fused.dtype == dtype
        assert (fused - exact).norm() <= 1.1 * (usual - exact).norm()


@pytest.mark.slow
@torch.no_grad()
def test_a_unet_by_kernels_gives_the_plain_numbers(make_unet, make_inputs):
    unet = make_unet()
    x, t, conditions = make_inputs(1, 3, 2, 2)
    plain = unet(x, t, unet.prepare(conditions, 3))
    savings.apply(unet, config.Runtime(savings=tuple(config.SAVINGS)))
    fast = unet(x, t, unet.prepare(conditions, 3))
    assert not torch.equal(fast, plain)
    torch.testing.assert_close(fast, plain, **EXACT)
