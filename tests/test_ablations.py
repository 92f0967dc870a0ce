"""Every switch of config.Use, found by walking its fields: nothing here names a single one of them.

A new switch is tested by being there. It may drop parts, add some, replace some (a `Literal` whose other
choices build other tensors), or change nothing but arithmetic.
"""

import dataclasses
import itertools
import typing

import pytest
import torch

from i2vgen.files import checkpoint
from i2vgen.model import temporal
from i2vgen.model import unet as unet_module
from i2vgen.model.layers import Conv
from i2vgen.settings import config
from i2vgen.settings.config import Use

SMALL = config.UNet(
    base_width=32, width_multipliers=(1, 2), blocks_per_level=1, attention_levels=(True, False), head_width=8,
    first_temporal_heads=2, context_width=16, norm_groups=8, image_vector_width=12, local_grid=8,
    local_widths=(8, 8),
)  # fmt: skip
FIELDS = [field.name for field in dataclasses.fields(Use)]
PARTS = [name for name in FIELDS if getattr(Use(), name) is True]
ADDITIONS = [name for name in FIELDS if getattr(Use(), name) is False]
CONVENTIONS = [name for name in FIELDS if name not in PARTS + ADDITIONS]


def without(*names):
    return dataclasses.replace(Use(), **dict.fromkeys(names, False))


def with_it(name, **others):
    return dataclasses.replace(Use(), **{name: True}, **others)


def predict(unet, inputs):
    x, t, conditions = inputs
    return unet(x, t, unet.prepare(conditions, x.shape[2]))


def left_of(state, change):
    """The tensors of a full model's state dict that an ablation keeps."""
    slices = dict(change.slices)
    kept = {name: tensor for name, tensor in state.items() if name not in change.dropped}
    return {
        name: tensor[:, : slices.get(name)] if tensor.ndim > 1 else tensor for name, tensor in kept.items()
    }


@pytest.fixture(scope="module")
def full(make_unet):
    return make_unet()


@pytest.fixture(scope="module")
def inputs(make_inputs):
    return make_inputs(batch=2)


@pytest.fixture(scope="module")
def full_output(full, inputs):
    with torch.no_grad():
        return predict(full, inputs)


def ablated(make_unet, full, use):
    """A model under other switches, with the full model's numbers wherever both have a tensor."""
    unet = make_unet(use)
    kept = left_of(full.state_dict(), checkpoint.ablation(SMALL, use))
    unet.load_state_dict(unet.state_dict() | kept)
    return unet


@pytest.mark.parametrize("name", PARTS)
def test_a_part_that_is_off_is_gone_and_nothing_else(make_unet, full, name):
    change = checkpoint.ablation(SMALL, without(name))
    left = {key: tuple(t.shape) for key, t in left_of(full.state_dict(), change).items()}
    assert {key: tuple(t.shape) for key, t in make_unet(without(name)).state_dict().items()} == left
    assert not change.added


@pytest.mark.parametrize("name", PARTS)
def test_a_part_that_is_off_changes_the_output(make_unet, full, inputs, full_output, name):
    unet = ablated(make_unet, full, without(name))
    with torch.no_grad():
        got = predict(unet, inputs)
    assert got.shape == full_output.shape and got.isfinite().all()
    assert (got - full_output).abs().max() > 1e-4 * full_output.abs().max()


@pytest.mark.parametrize("use", [Use(), *map(without, PARTS), *map(with_it, ADDITIONS)], ids=str)
def test_gradients_reach_every_parameter_that_is_left(make_unet, inputs, use):
    unet = make_unet(use).train()
    predict(unet, inputs).square().mean().backward()
    silent = [n for n, p in unet.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-12]
    assert silent == []


@pytest.mark.parametrize("name", ADDITIONS)
def test_an_addition_brings_its_own_tensors_and_nothing_else(make_unet, full, inputs, full_output, name):
    unet, change = make_unet(with_it(name)), checkpoint.ablation(SMALL, with_it(name))
    assert change.added and not change.dropped and not change.slices
    assert unet.state_dict().keys() - change.added == full.state_dict().keys()
    with torch.no_grad():
        got = predict(unet, inputs)
    assert got.isfinite().all()
    assert (got - full_output).abs().max() > 1e-4 * full_output.abs().max()


@pytest.mark.parametrize(("name", "part"), list(itertools.product(ADDITIONS, PARTS)))
def test_an_addition_goes_with_every_part_that_is_off(make_unet, inputs, name, part):
    unet = make_unet(with_it(name, **{part: False}))
    with torch.no_grad():
        assert predict(unet, inputs).isfinite().all()


@pytest.mark.parametrize("pair", list(itertools.combinations(PARTS, 2)), ids="-".join)
def test_every_pair_of_parts_can_be_off_together(make_unet, full, inputs, full_output, pair):
    unet = ablated(make_unet, full, without(*pair))
    with torch.no_grad():
        got = predict(unet, inputs)
    assert got.isfinite().all() and not torch.allclose(got, full_output, rtol=1e-4)


def test_everything_that_may_be_off_together(make_unet, inputs):
    for kept in ("text", "global_tokens", "local_tokens"):
        unet = make_unet(without(*(name for name in PARTS if name != kept)))
        with torch.no_grad():
            assert predict(unet, inputs).isfinite().all()
        assert not [n for n, _ in unet.named_modules() if "tempor" in n or "concat" in n]


def others(name):
    """Every other choice of a convention, or half of a number."""
    default, choices = getattr(Use(), name), typing.get_args(typing.get_type_hints(Use)[name])
    return [choice for choice in choices if choice != default] or [default / 2]


@pytest.mark.parametrize(("name", "other"), [(name, other) for name in CONVENTIONS for other in others(name)])
def test_every_choice_changes_the_output(make_unet, full, inputs, full_output, name, other):
    """With the full model's tensors, whether the choice replaces a part or changes arithmetic alone."""
    unet = ablated(make_unet, full, dataclasses.replace(Use(), **{name: other}))
    with torch.no_grad():
        assert not predict(unet, inputs).equal(full_output)


# --- a switch that replaces a part, as a researcher would write it


@dataclasses.dataclass(frozen=True)
class MyUse(Use):
    second: typing.Literal["attention", "convolution"] = "attention"


class MyTransformer(temporal.TemporalTransformer):
    def __init__(self, width, *, heads, head_width, **others):
        super().__init__(width, heads=heads, head_width=head_width, **others)
        inner = heads * head_width
        self.attention2 = None
        self.convolution2 = Conv(inner, inner, (3, 1), padding=(1, 0))

    def forward(self, x):
        y = self.proj_in(self.norm(x.flatten(2, 3)))
        y = y + self.attention1(self.norm1(y))
        y = y + self.convolution2(self.norm2(y))
        y = y + self.feed_forward(self.norm3(y))
        return x + self.proj_out(y).view_as(x)


@pytest.fixture
def replacing(monkeypatch):
    """The one `if`, in the place where the part is built."""
    plain = unet_module.temporal_transformer

    def build(width, heads, unet, use, backend):
        kind = MyTransformer if getattr(use, "second", "attention") == "convolution" else None
        if kind is None:
            return plain(width, heads, unet, use, backend)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(unet_module, "TemporalTransformer", kind)
            return plain(width, heads, unet, use, backend)

    monkeypatch.setattr(unet_module, "temporal_transformer", build)
    return MyUse(second="convolution")


def test_a_switch_may_replace_a_part(make_unet, full, inputs, full_output, replacing, tmp_path):
    """No list to keep: building both networks shows what full weights lose and what starts untrained."""
    change = checkpoint.ablation(SMALL, replacing)
    assert change.dropped and all(".attention2." in name for name in change.dropped)
    assert change.added and all(".convolution2." in name for name in change.added)
    with torch.no_grad():
        assert not predict(ablated(make_unet, full, replacing), inputs).equal(full_output)
    with torch.device("meta"):
        unet = unet_module.UNet(SMALL, replacing)
    first = {name: torch.zeros(t.shape) for name, t in unet.state_dict().items() if name in change.added}
    with pytest.warns(UserWarning, match=r"lacks \d+ tensors that the settings add .* starts untrained"):
        checkpoint.fill(unet, full.state_dict(), changed=change, initial=lambda names: first)
    state = full.state_dict()
    assert all(t.equal(state.get(name, t)) for name, t in unet.state_dict().items())


def test_a_switch_that_changes_a_shape_otherwise_is_refused(monkeypatch):
    class Wider(unet_module.UNet):
        def __init__(self, unet, use):
            super().__init__(unet, use)
            if not use.fps:
                self.conv_out = Conv(64, 5, 3)

    monkeypatch.setattr(checkpoint, "UNet", Wider)
    with pytest.raises(ValueError, match=r"change conv_out\.bias from \(4,\) to \(5,\).*a new name"):
        checkpoint.ablation(SMALL, without("fps"))


def test_conditions_of_parts_that_are_off_are_not_read(make_unet, inputs):
    x, t, conditions = inputs
    for off, blank in ((("text",), {"text": None}), (("global_tokens",), {"image_vector": None})):
        unet = make_unet(without(*off))
        with torch.no_grad():
            got = predict(unet, (x, t, conditions._replace(**blank)))
            assert got.equal(predict(unet, inputs))


def test_a_missing_image_vector_leaves_its_tokens_out(make_unet, inputs):
    x, _, conditions = inputs
    bare = conditions._replace(image_vector=None)
    unet = make_unet()
    tokens = unet.prepare(conditions, x.shape[2]).context.shape[1]
    assert unet.prepare(bare, x.shape[2]).context.shape[1] == tokens - config.UNet().num_global_tokens
    with pytest.raises(ValueError, match="no context token is left"):
        make_unet(without("text", "local_tokens")).prepare(bare, 4)
