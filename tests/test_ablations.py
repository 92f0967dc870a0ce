"""Every switch of config.Use, found by walking its fields: nothing here names a single one of them.

A new switch is tested by being there; it only has to declare what the released checkpoint loses with it, or
lacks for it.
"""

import dataclasses
import fnmatch
import itertools
import typing

import pytest
import torch

from i2vgen.files import checkpoint
from i2vgen.model.unet import ADDED, declared_drops
from i2vgen.settings import config
from i2vgen.settings.config import Use

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


def minus_drops(state, drops):
    """What should be left of a full model's state dict."""
    left = {}
    for name, tensor in state.items():
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in drops.patterns):
            left[name] = tensor[:, : drops.slices[name]] if name in drops.slices else tensor
    return left


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
    """The model without some parts and with the full model's numbers in all others."""
    unet = make_unet(use)
    unet.load_state_dict(minus_drops(full.state_dict(), declared_drops(config.UNet(), use)))
    return unet


@pytest.mark.parametrize("name", PARTS)
def test_a_part_that_is_off_is_gone_and_nothing_else(make_unet, full, small, name):
    unet = make_unet(without(name))
    drops = declared_drops(small, without(name))
    left = {key: tuple(t.shape) for key, t in minus_drops(full.state_dict(), drops).items()}
    assert {key: tuple(t.shape) for key, t in unet.state_dict().items()} == left
    # No declaration is idle: each pattern and each slice takes something away.
    names = full.state_dict().keys()
    assert [p for p in drops.patterns if not fnmatch.filter(names, p)] == []
    assert [n for n, k in drops.slices.items() if full.state_dict()[n].shape[1] <= k] == []


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
    unet = make_unet(with_it(name))
    added = {key for key in unet.state_dict() if checkpoint.matches(key, ADDED)}
    assert added and unet.state_dict().keys() - added == full.state_dict().keys()
    with torch.no_grad():
        got = predict(unet, inputs)
    assert got.isfinite().all()
    assert (got - full_output).abs().max() > 1e-4 * full_output.abs().max()


def test_no_declaration_of_an_addition_is_idle(make_unet):
    names = make_unet(dataclasses.replace(Use(), **dict.fromkeys(ADDITIONS, True))).state_dict().keys()
    assert [pattern for pattern in ADDED if not fnmatch.filter(names, pattern)] == []


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
def test_conventions_change_arithmetic_and_no_parameter(make_unet, full, inputs, full_output, name, other):
    use = dataclasses.replace(Use(), **{name: other})
    assert declared_drops(config.UNet(), use) == declared_drops(config.UNet(), Use())
    unet = make_unet(use)
    assert unet.state_dict().keys() == full.state_dict().keys()
    with torch.no_grad():
        assert not predict(unet, inputs).equal(full_output)


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
