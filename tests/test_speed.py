"""Every exact saving against the plain path, one at a time and all together, in float64."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from i2vgen import config, pipeline, speed
from i2vgen.attention import Attention
from i2vgen.conditioning import join
from i2vgen.layers import Conv, FeedForward
from i2vgen.spatial import Upsample

OFF = {
    "share_prefix": False,
    "batch_guidance": False,
    "project_once": False,
    "fuse_projections": False,
    "subpixel_upsampling": False,
    "in_place": False,
    "sum_in_place": False,
}
SAVINGS = [
    {"project_once": True},
    {"fuse_projections": True},
    {"subpixel_upsampling": True},
    {"in_place": True},
    {"sum_in_place": True},
    {"sum_in_place": True, "in_place": True, "feed_forward_chunk": 7},
    {"in_place": True, "feed_forward_chunk": 7},
    dict.fromkeys(OFF, True),
]


def settings(**on):
    return config.Runtime(**{**OFF, **on})


class Operations(TorchDispatchMode):
    """What is computed inside, in order. Results alone do not tell: some machines round both ways alike."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.append(str(operation))
        return operation(*args, **(kwargs or {}))


def test_plain_is_what_a_network_does_unless_told(make_unet):
    unet = make_unet()
    speed.apply(unet, settings())
    assert not any(m.fused for m in unet.modules() if isinstance(m, Attention))
    assert not unet.project_once


@torch.no_grad()
@pytest.mark.parametrize("on", SAVINGS, ids=str)
@pytest.mark.parametrize("size", [(4, 6), (8, 4), (2, 2)], ids=str)
def test_each_saving_gives_the_plain_numbers(make_unet, make_inputs, on, size):
    unet = make_unet()
    x, t, conditions = make_inputs(2, 3, *size)
    with Operations() as written:
        plain = unet(x, t, unet.prepare(conditions, 3))
    speed.apply(unet, settings(**on))
    with Operations() as saved:
        fast = unet(x, t, unet.prepare(conditions, 3))
    assert saved.names != written.names, "the saving did nothing"
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
    [
        "share_prefix",
        "batch_guidance",
        "project_once",
        "fuse_projections",
        "subpixel_upsampling",
        "in_place",
        "sum_in_place",
    ],
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
