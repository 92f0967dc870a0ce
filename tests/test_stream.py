"""The residual stream: sums inside matrix products, and everything that must not be summed so."""

import pytest
import torch
from torch import nn

from i2vgen.fast import speed
from i2vgen.model.attention import FrameAttention
from i2vgen.model.layers import FeedForward, GroupNorm, norm_silu
from i2vgen.model.temporal import TemporalTransformer
from i2vgen.settings import config

EXACT = {"rtol": 0, "atol": 1e-12}
FAST = config.Runtime(kernels="plain")


@pytest.fixture
def transformer():
    made = TemporalTransformer(
        8, heads=2, head_width=4, groups=2, second_attention=True, backend="sdpa"
    ).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made.eval()


@pytest.fixture
def x():
    return torch.randn(2, 3, 4, 5, 8, dtype=torch.float64)


def fused(module):
    """`speed.apply`, and the kernels' place taken by their plain forms"""
    speed.apply(module, FAST)
    for part in module.modules():
        if isinstance(part, speed.WITH_KERNELS):
            part.kernel = True
    return module


@torch.no_grad()
def test_the_stream_gives_the_plain_numbers_and_leaves_its_input_alone(transformer, x):
    plain, before = transformer(x), x.clone()
    speed.apply(transformer, FAST)
    calls = []
    right = torch.Tensor.addmm_
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "addmm_", lambda *args: calls.append(1) or right(*args))
        torch.testing.assert_close(transformer(x), plain, **EXACT)
    assert len(calls) == 4 and x.equal(before)  # two attentions, the feed-forward, the projection out
    torch.testing.assert_close(fused(transformer)(x), plain, **EXACT)


@torch.no_grad()
def test_a_bias_that_is_forgotten_shows(transformer, x):
    plain = transformer(x)
    speed.apply(transformer, FAST)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("i2vgen.fast.stream.Stream.settle", lambda self: self.x)
        patch.setattr("i2vgen.fast.stream.Stream.read", lambda self, norm: norm(self.x))
        assert not torch.allclose(transformer(x), plain, **EXACT)


def test_gradients_take_the_plain_way(transformer, x):
    grads = []
    for apply in (lambda module: module, fused):
        apply(transformer)
        transformer.zero_grad()
        transformer(x).square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in transformer.parameters()])
    for plain, other in zip(*grads, strict=True):
        torch.testing.assert_close(plain, other, rtol=1e-9, atol=1e-12)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Louder(FeedForward):
    def forward(self, x):
        return 3 * super().forward(x)


class Flat(nn.LayerNorm):
    def forward(self, x):
        return torch.ones_like(x)


class Own(nn.Module):
    def forward(self, x):
        return x.flip(-1)


class Shifted(GroupNorm):
    def forward(self, x):
        return 1 + super().forward(x)


def become(path, kind):
    def change(module):
        module.get_submodule(path).__class__ = kind

    return change


def put(path, part):
    return lambda module: module.set_submodule(path, part)


CHANGES = {
    "a layer's kind": become("attention1.to_out", Doubled),
    "its projection": become("attention2.to_q", Doubled),
    "the gate's": become("feed_forward.proj_in", Doubled),
    "a part's kind": become("feed_forward", Louder),
    "a norm's kind": become("norm2", Flat),
    "the entrance norm": become("norm", Shifted),
    "a part of one's own": put("attention1", Own()),
    "nothing for a projection": put("proj_out", nn.Identity()),
    "a norm of one's own": put("norm3", nn.Identity()),
    "a projection that is its input": put("proj_in", nn.Identity()),
    "a hook that changes": lambda m: m.attention1.register_forward_hook(lambda m, args, y: 2 * y),
    "one at a layer": lambda m: m.feed_forward.proj_out.register_forward_hook(lambda m, args, y: 2 * y),
    "one before": lambda m: m.attention2.to_k.register_forward_pre_hook(lambda m, args: (2 * args[0],)),
    "a forward of the object's own": lambda m: setattr(m.attention2, "forward", lambda x: 2 * x),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CHANGES)
def test_what_is_changed_runs_as_it_was_written(name, transformer, x):
    usual = transformer(x)
    CHANGES[name](transformer)
    wanted = transformer(x)
    assert not torch.allclose(wanted, usual, **EXACT)
    torch.testing.assert_close(fused(transformer)(x), wanted, **EXACT)


@torch.no_grad()
def test_what_a_listener_keeps_is_not_written_over(transformer, x):
    kept = {}
    for name, part in transformer.named_modules():
        if isinstance(part, nn.LayerNorm | FrameAttention | FeedForward) or name == "proj_in":
            part.register_forward_hook(lambda m, args, y, name=name: kept.update({name: (args[0], y)}))
    transformer(x)
    wanted = {name: [value.clone() for value in pair] for name, pair in kept.items()}
    fused(transformer)(x)
    assert len(wanted) == 7
    for name, pair in wanted.items():
        for got, value in zip(kept[name], pair, strict=True):
            torch.testing.assert_close(got, value, **EXACT)


@torch.no_grad()
def test_norm_and_silu_are_one_only_where_the_norm_is_ours():
    x, shift = torch.randn(4, 3, 1, 8, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
    for kind in (GroupNorm, Shifted):
        norm = kind(2, 8).double()
        plain = norm_silu(norm, x, shift)
        norm.kernel, called = True, []
        with pytest.MonkeyPatch.context() as patch:
            right = norm.by_kernel
            patch.setattr(norm, "by_kernel", lambda *a, **k: called.append(k["silu"]) or right(*a, **k))  # noqa: B023
            torch.testing.assert_close(norm_silu(norm, x, shift), plain, **EXACT)
        assert called == [kind is GroupNorm]
