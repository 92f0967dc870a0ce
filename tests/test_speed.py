"""Every exact saving against the plain path, one at a time and all together, in float64."""

import dataclasses

import pytest
import torch
from torch import nn

from i2vgen import pipeline
from i2vgen.fast import speed
from i2vgen.files import checkpoint
from i2vgen.memory.meter import Meter
from i2vgen.model import layers
from i2vgen.model.attention import Attention, joined, lay_side_by_side
from i2vgen.model.conditioning import join
from i2vgen.model.layers import Conv, FeedForward, GroupNorm, norm_silu
from i2vgen.model.spatial import Upsample
from i2vgen.settings import config

OFF = {
    "share_prefix": False,
    "batch_guidance": False,
    "project_once": False,
    "fuse_projections": False,
    "subpixel_upsampling": False,
    "in_place": False,
    "weight_layout": False,
    "convolution_products": False,
    "sum_in_place": False,
    "fold_products": False,
}
SAVINGS = [
    {"project_once": True},
    {"fuse_projections": True},
    {"subpixel_upsampling": True},
    {"in_place": True},
    {"sum_in_place": True},
    {"sum_in_place": True, "in_place": True, "feed_forward_chunk": 7},
    {"in_place": True, "feed_forward_chunk": 7},
    {"convolution_products": True},
    {"weight_layout": True, "fuse_projections": True},
    dict.fromkeys(OFF, True),
]


def settings(**on):
    return config.Runtime(**{**OFF, **on})


def test_plain_is_what_a_network_does_unless_told(make_unet):
    unet = make_unet()
    speed.apply(unet, settings())
    assert not any(m.fused for m in unet.modules() if isinstance(m, Attention))
    assert not unet.project_once


@pytest.fixture(autouse=True)
def _few_channels_are_many(monkeypatch):
    monkeypatch.setattr(layers, "MANY_CHANNELS", 1)


@torch.no_grad()
@pytest.mark.parametrize("on", SAVINGS, ids=str)
@pytest.mark.parametrize("size", [(4, 6), (8, 4), (2, 2)], ids=str)
def test_each_saving_gives_the_plain_numbers(make_unet, make_inputs, on, size):
    unet = make_unet()
    x, t, conditions = make_inputs(2, 3, *size)
    prepared = unet.prepare(conditions, 3)
    with Meter() as without:
        plain = unet(x, t, prepared)
    speed.apply(unet, settings(**on))
    prepared = unet.prepare(conditions, 3)
    with Meter() as meter:
        fast = unet(x, t, prepared)
    assert meter.table != without.table, "the saving did nothing"
    assert torch.allclose(fast, plain, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("attention_levels", [(True, True), (False, True)], ids=str)
@pytest.mark.parametrize(
    "on", [{}, {"project_once": True}, {"batch_guidance": True}, dict.fromkeys(OFF, True)], ids=str
)
def test_branches_that_share_a_prefix_give_what_each_gives_alone(
    make_unet, make_inputs, on, attention_levels
):
    unet = make_unet(attention_levels=attention_levels)
    x, t, cond = make_inputs(2, 3)
    uncond = cond._replace(text=torch.randn_like(cond.text), image_vector=torch.zeros_like(cond.image_vector))
    alone = [unet(x, t, unet.prepare(c, 3)) for c in (cond, uncond)]
    speed.apply(unet, settings(**on))
    both = join([unet.prepare(c, 3) for c in (cond, uncond)])
    together = unet(x, t, both).chunk(2)
    for one, other in zip(together, alone, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)
    assert not torch.allclose(*together)


@torch.no_grad()
def test_what_differs_is_not_shared(make_unet, make_inputs):
    unet = make_unet()
    _, _, cond = make_inputs(1, 3)
    prepared = unet.prepare(cond, 3)
    assert join([prepared, prepared]) is not None
    others = [
        cond._replace(image_latent=cond.image_latent + 1e-9),
        cond._replace(fps=cond.fps + 1),
        cond._replace(image_vector=None),  # fewer tokens
    ]
    for other in others:
        assert join([prepared, unet.prepare(other, 3)]) is None


@torch.no_grad()
def test_new_conditions_between_steps_are_heard(make_unet, make_inputs):
    """Nothing is remembered but in what `prepare` returned."""
    unet = make_unet()
    x, t, first = make_inputs(1, 3)
    second = first._replace(text=first.text.flip(1) + 1)
    plain = [unet(x, t, unet.prepare(c, 3)) for c in (first, second, first)]
    speed.apply(unet, settings(**dict.fromkeys(OFF, True)))
    fast = [unet(x, t, unet.prepare(c, 3)) for c in (first, second, first)]
    for a, b in zip(fast, plain, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)
    # Weights too: what is folded or fused is made anew from them at every call.
    for parameter in unet.parameters():
        parameter.mul_(0.9)
    changed = unet(x, t, unet.prepare(first, 3))
    speed.apply(unet, settings())
    assert torch.allclose(changed, unet(x, t, unet.prepare(first, 3)), rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_changed_part_runs_as_it_was_written(make_unet, make_inputs):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Louder(Conv):
        def forward(self, x):
            return 3 * super().forward(x)

    unet = make_unet()
    for module in list(unet.modules()):
        for name, wanted, other in ((("to_q"), Attention, Doubled), ("proj_in", FeedForward, Doubled)):
            if isinstance(module, wanted):
                getattr(module, name).__class__ = other
        if isinstance(module, Upsample):
            module.conv.__class__ = Louder
    x, t, conditions = make_inputs(1, 3)
    plain = unet(x, t, unet.prepare(conditions, 3))
    speed.apply(unet, settings(**dict.fromkeys(OFF, True)))
    assert torch.allclose(unet(x, t, unet.prepare(conditions, 3)), plain, rtol=0, atol=1e-12)


def test_gradients_pass_through_every_saving(make_unet, make_inputs):
    unet = make_unet()
    x, t, conditions = make_inputs(1, 3)
    grads = []
    for on in ({}, dict.fromkeys(OFF, True)):
        speed.apply(unet, settings(**on))
        unet.zero_grad()
        unet(x, t, unet.prepare(conditions, 3)).square().mean().backward()
        grads.append({n: p.grad.clone() for n, p in unet.named_parameters()})
    for name, plain in grads[0].items():
        assert torch.allclose(grads[1][name], plain, rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize(
    "name",
    [name for name in OFF if name != "weight_layout"],
)
def test_the_road_obeys_its_switches(road, with_config, picture, name):
    changed = {f.name: getattr(road.config.runtime, f.name) for f in dataclasses.fields(config.Runtime)}
    clips = []
    for on in (False, True):
        model = with_config(road, runtime={**OFF, "share_prefix": name == "batch_guidance", name: on})
        speed.apply(model.unet, model.config.runtime)
        clips.append(pipeline.generate(model, [picture], ["a boat"], [3]))
    speed.apply(road.unet, config.Runtime(**changed))
    assert (clips[0].int() - clips[1].int()).abs().max() <= 1


@torch.no_grad()
def test_a_first_block_of_ones_own_or_under_a_hook_is_called_as_ever(make_unet, make_inputs):
    unet = make_unet()
    x, t, cond = make_inputs(1, 3)
    branches = [unet.prepare(c, 3) for c in (cond, cond._replace(text=cond.text + 1))]
    wanted = torch.cat([unet(x, t, branch) for branch in branches])
    first, calls = unet.down[0].blocks[0], []
    handle = first.spatial.register_forward_hook(lambda module, args, out: calls.append(len(out)))
    assert torch.allclose(unet(x, t, join(branches)), wanted, rtol=0, atol=1e-12)
    handle.remove()
    assert calls == [1, 1]  # once for each branch

    class Own(type(first)):
        def forward(self, x, embedding, context):
            return 2 * super().forward(x, embedding, context)

    first.__class__ = Own
    wanted = torch.cat([unet(x, t, branch) for branch in branches])
    assert torch.allclose(unet(x, t, join(branches)), wanted, rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------ parts of the savings


@torch.no_grad()
@pytest.mark.parametrize("kernel", [(3, 3), (3, 1), (1, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("last", [True, False], ids=["weights channels last", "rows last"])
def test_a_convolution_as_a_product(kernel, stride, last):
    conv = Conv(5, 7, kernel, stride=stride, padding=(kernel[0] // 2, kernel[1] // 2)).double()
    if last:
        conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)
    x = torch.randn(2, 6, 9, 5, dtype=torch.float64)
    plain = conv(x)
    conv.product = True
    assert conv.product_pays(x)
    assert torch.allclose(conv(x), plain, rtol=0, atol=1e-12)
    conv.weight.mul_(2).transpose(0, 1)
    assert not torch.allclose(conv(x), plain, rtol=0, atol=1e-3)  # in place is heard


def test_a_product_waits_for_few_pixels_and_many_channels(monkeypatch):
    conv = Conv(8, 8, 3, stride=2, padding=1)
    few, many = torch.zeros(2, 32, 32, 8), torch.zeros(3, 32, 32, 8)
    assert conv.product_pays(few) and not conv.product_pays(many)
    assert not conv.product_pays(few.to("meta"))
    monkeypatch.setattr(layers, "MANY_CHANNELS", 9)
    assert not conv.product_pays(few)


def linears(*sizes):
    return [nn.Linear(6, size, bias=False).requires_grad_(False) for size in sizes]


def test_weights_side_by_side_are_joined_without_a_copy():
    layers = linears(4, 2, 4)
    apart = torch.cat([layer.weight for layer in layers])
    lay_side_by_side(layers)
    together = joined([layer.weight for layer in layers])
    assert torch.equal(together, apart) and together.data_ptr() == layers[0].weight.data_ptr()
    layers[1].weight.mul_(2)
    assert torch.equal(joined([layer.weight for layer in layers])[4:6], 2 * apart[4:6])
    lay_side_by_side(layers)  # again: they lie right already
    assert layers[0].weight.data_ptr() == together.data_ptr()


@pytest.mark.parametrize("change", ["replaced", "moved", "learning", "swapped", "never laid"])
def test_weights_that_lie_elsewhere_are_copied(change):
    layers = linears(4, 4, 4)
    if change != "never laid":
        lay_side_by_side(layers)
    if change == "replaced":
        layers[1].weight = nn.Parameter(torch.randn(4, 6), requires_grad=False)
    elif change == "moved":
        layers[2].weight.data = layers[2].weight.data.clone()
    elif change == "learning":
        layers[0].requires_grad_(True)
    elif change == "swapped":
        layers[0], layers[1] = layers[1], layers[0]
    weights = [layer.weight for layer in layers]
    together = joined(weights)
    assert torch.equal(together, torch.cat(weights))
    assert together.data_ptr() not in {weight.data_ptr() for weight in weights}


@torch.no_grad()
def test_laid_out_weights_are_the_same_weights(make_unet, tmp_path):
    unet = make_unet()
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    speed.apply(unet, settings(weight_layout=True, fuse_projections=True))
    convs = [m for m in unet.modules() if isinstance(m, Conv)]
    assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in convs)
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
    checkpoint.save(tmp_path / "w", {"unet": unet}, config.Config())
    stored = dict(checkpoint.read_part(tmp_path / "w", "unet"))
    assert all(torch.equal(stored[name], tensor) for name, tensor in before.items())


def test_what_a_hook_saw_stays_as_it_was():
    norm, x, seen = GroupNorm(2, 4).double(), torch.randn(1, 3, 2, 4, dtype=torch.float64), []
    with torch.no_grad():
        plain = norm_silu(norm, x)
        norm.in_place = True
        assert torch.equal(norm_silu(norm, x), plain)
        norm.register_forward_hook(lambda module, args, out: seen.append((out, out.clone())))
        assert torch.equal(norm_silu(norm, x), plain)
    assert torch.equal(*seen[0])


@torch.no_grad()
def test_an_identity_in_a_norms_place_keeps_its_input():
    x = torch.randn(1, 3, 2, 4)
    kept = x.clone()
    norm_silu(nn.Identity(), x)
    assert torch.equal(x, kept)
