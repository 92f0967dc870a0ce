"""Products folded into their neighbours, where a transformer is much wider inside than outside."""

import pytest
import torch
from torch import nn

from i2vgen.fast import folding, speed
from i2vgen.memory.meter import Meter
from i2vgen.model.attention import FrameAttention
from i2vgen.model.temporal import TemporalTransformer
from i2vgen.settings import config

EXACT = {"rtol": 0, "atol": 1e-12}
ON, OFF = config.Runtime(kernels="plain"), config.Runtime(kernels="plain", fold_products=False)


def make(width, *, heads=4, second=True):
    made = TemporalTransformer(
        width, heads=heads, head_width=8, groups=2, second_attention=second, backend="sdpa"
    )
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made.double().eval()


@pytest.fixture
def x():
    return torch.randn(2, 3, 4, 5, 8, dtype=torch.float64)


def flops(call):
    with Meter() as meter:
        call()
    return meter.flops


@torch.no_grad()
@pytest.mark.parametrize("second", [True, False])
@pytest.mark.parametrize("extra", [{}, {"feed_forward_chunk": 7}, {"token_chunk": 60}], ids=str)
def test_folded_products_give_the_plain_numbers_for_less(x, second, extra):
    part, before = make(8, second=second), x.clone()
    plain = part(x)
    speed.apply(part, config.Runtime(kernels="plain", fold_products=False, **extra))
    unfolded = flops(lambda: part(x))
    speed.apply(part, config.Runtime(kernels="plain", **extra))
    torch.testing.assert_close(part(x), plain, **EXACT)
    assert x.equal(before) and flops(lambda: part(x)) < 0.9 * unfolded


@torch.no_grad()
@pytest.mark.parametrize("name", ["norm1.weight", "norm1.bias", "proj_in.bias", "feed_forward.proj_out.bias"])
def test_what_is_folded_in_is_heard_when_it_changes(x, name):
    part = make(8)
    speed.apply(part, ON)
    before = part(x)
    part.get_parameter(name).add_(0.1)
    after = part(x)
    speed.apply(part, OFF)
    torch.testing.assert_close(after, part(x), **EXACT)
    assert not torch.allclose(after, before, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["norm1", "attention1", "attention1.to_k", "proj_in", "feed_forward", "proj_out"]
)
def test_who_listens_at_a_part_hears_what_it_was_written_to_give(x, name):
    part, heard = make(8), []
    part.get_submodule(name).register_forward_hook(lambda module, inputs, out: heard.append(out.clone()))
    plain = part(x)
    speed.apply(part, ON)
    torch.testing.assert_close(part(x), plain, **EXACT)
    torch.testing.assert_close(heard[1], heard[0], **EXACT)


@torch.no_grad()
def test_a_changed_part_is_not_folded(x):
    class Louder(FrameAttention):
        def inside(self, y):
            return 2 * super().inside(y)

    part = make(8)
    part.attention1.__class__ = Louder
    plain = part(x)
    speed.apply(part, ON)
    torch.testing.assert_close(part(x), plain, **EXACT)


@pytest.mark.parametrize(("tokens", "outside", "inside"), [(10_000, 320, 512), (512, 64, 512)], ids=str)
def test_nothing_is_folded_where_it_costs_more_than_it_saves(tokens, outside, inside):
    assert not folding.pays(tokens, outside, inside)
    assert folding.pays(10_000, 64, 512)


@torch.no_grad()
def test_a_forgotten_part_of_the_fold_shows(x, monkeypatch):
    part = make(8)
    plain = part(x)
    speed.apply(part, ON)
    # The mean that the layer norm takes off, left in.
    monkeypatch.setattr(torch.Tensor, "mean", lambda self, axis: torch.zeros_like(self[0]))
    assert not torch.allclose(part(x), plain, **EXACT)


def test_gradients_take_the_plain_way(x):
    grads = []
    for runtime in (OFF, ON):
        torch.manual_seed(0)
        part = make(8)
        speed.apply(part, runtime)
        part(x).square().sum().backward()
        grads.append([parameter.grad for parameter in part.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
