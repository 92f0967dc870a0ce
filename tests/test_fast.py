"""Every exact saving against the plain networks, alone and together, in float64, with and without hooks."""

import copy
import pickle

import pytest
import torch
from torch import nn

from i2vgen import pipeline
from i2vgen.adapt.taps import taps
from i2vgen.fast import compiled, guard, kernels, layers, savings
from i2vgen.fast.attention import joined, lay_side_by_side
from i2vgen.fast.checkpointing import set_checkpointing
from i2vgen.fast.unet import FastUNet, both_branches, projected, shared
from i2vgen.files import checkpoint
from i2vgen.memory.meter import Meter
from i2vgen.model.attention import Attention, FrameAttention
from i2vgen.model.layers import Conv, FeedForward, GroupNorm
from i2vgen.model.spatial import Upsample
from i2vgen.model.temporal import TemporalTransformer
from i2vgen.settings import config
from i2vgen.settings.config import SAVINGS, Runtime, Use

EXACT = {"rtol": 0, "atol": 1e-12}
RUNTIMES = {
    **{name: Runtime(savings=(name,)) for name in SAVINGS},
    "all": Runtime(),
    "all and kernels": Runtime(savings=tuple(SAVINGS)),
    "batched": Runtime(savings=tuple(SAVINGS), batch_guidance=True),
    "chunked": Runtime(savings=tuple(SAVINGS), token_chunk=17),
}
META = torch.device("meta")  # where kernels may be asked for; on a CPU their plain forms compute


@pytest.fixture(autouse=True)
def _few_channels_are_many(monkeypatch):
    monkeypatch.setattr(layers, "MANY_CHANNELS", 1)


def guidance_step(unet, x, t, branches):
    """Both predictions of a step, as the pipeline computes them"""
    prepared = [projected(unet, unet.prepare(c, x.shape[2])) for c in branches]
    return both_branches(unet, *prepared)(x, t)


@pytest.fixture(scope="module")
def branches(make_inputs):
    """-> x, t, and the conditions of both branches of guidance"""

    def make(*shape):
        x, t, cond = make_inputs(*shape)
        other = torch.randn(cond.text.shape, generator=torch.Generator().manual_seed(7)).to(cond.text)
        return x, t, [cond, cond._replace(text=other, image_vector=torch.zeros_like(cond.image_vector))]

    return make


@torch.no_grad()
@pytest.mark.parametrize("attention_levels", [(True, True), (False, True)], ids=str)
@pytest.mark.parametrize("name", RUNTIMES)
@pytest.mark.parametrize("size", [(4, 6), (8, 4), (2, 2)], ids=str)
def test_each_saving_gives_the_plain_numbers(make_unet, branches, name, size, attention_levels):
    unet = make_unet(attention_levels=attention_levels)
    inputs = branches(2, 3, *size)
    with Meter() as without:
        plain = guidance_step(unet, *inputs)
    savings.apply(unet, RUNTIMES[name], META)
    with Meter() as meter:
        fast = guidance_step(unet, *inputs)
    assert meter.table != without.table, "the saving did nothing"
    torch.testing.assert_close(fast, plain, **EXACT)
    assert not torch.allclose(*fast.chunk(2))
    savings.remove(unet)
    assert {type(m) for m in unet.modules()} == {type(m) for m in make_unet().modules()}
    torch.testing.assert_close(guidance_step(unet, *inputs), plain, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("name", ["batched", "chunked"])
def test_an_output_from_the_picture_reaches_both_branches(make_unet, branches, name):
    unet, plain = make_unet(Use(output="from_picture")), make_unet()
    x, t, conditions = branches(2, 3)
    picture = conditions[0].image_latent[:, :, None].repeat(2, 1, 1, 1, 1)
    savings.apply(unet, RUNTIMES[name], META)
    got, want = (guidance_step(one, x, t, conditions) for one in (unet, plain))
    torch.testing.assert_close(got, want + picture, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("grid", [1, 2])
@pytest.mark.parametrize("name", ["batched", "chunked"])
def test_a_moved_output_reaches_both_branches(make_unet, branches, name, grid):
    use = Use(output="moved")
    inputs = branches(2, 3)
    plain = guidance_step(make_unet(use, moved_grid=grid), *inputs)
    unet = make_unet(use, moved_grid=grid)
    savings.apply(unet, RUNTIMES[name], META)
    torch.testing.assert_close(guidance_step(unet, *inputs), plain, **EXACT)


@torch.no_grad()
def test_what_differs_is_not_shared(make_unet, make_inputs):
    unet = make_unet()
    savings.apply(unet, Runtime())
    _, _, cond = make_inputs(1, 3)
    prepared = unet.prepare(cond, 3)
    assert shared(unet, [prepared, prepared]) is not None
    others = [
        cond._replace(image_latent=cond.image_latent + 1e-9),
        cond._replace(fps=cond.fps + 1),
        cond._replace(image_vector=None),  # fewer tokens
    ]
    for other in others:
        assert shared(unet, [prepared, unet.prepare(other, 3)]) is None


@torch.no_grad()
def test_new_conditions_and_weights_take_effect(make_unet, branches):
    """Nothing is remembered but in what `prepare` returned."""
    unet = make_unet()
    x, t, (first, second) = branches(1, 3)
    orders = [(first, second), (second, first), (first, second)]
    plain = [guidance_step(unet, x, t, order) for order in orders]
    savings.apply(unet, Runtime())
    for order, wanted in zip(orders, plain, strict=True):
        torch.testing.assert_close(guidance_step(unet, x, t, order), wanted, **EXACT)
    for parameter in unet.parameters():
        parameter.mul_(0.9)
    changed = guidance_step(unet, x, t, orders[0])
    savings.remove(unet)
    torch.testing.assert_close(changed, guidance_step(unet, x, t, orders[0]), **EXACT)


def test_gradients_are_the_plain_ones(make_unet, make_inputs):
    unet = make_unet()
    x, t, conditions = make_inputs(1, 3)
    grads = []
    for runtime in (None, *RUNTIMES.values()):
        if runtime is not None:
            savings.apply(unet, runtime, META)
        unet.zero_grad()
        prepared = projected(unet, unet.prepare(conditions, 3))
        unet(x, t, prepared).square().mean().backward()
        grads.append({n: p.grad.clone() for n, p in unet.named_parameters()})
    for other in grads[1:]:
        for name, plain in grads[0].items():
            torch.testing.assert_close(other[name], plain, rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_dropout_stays_where_it_is_active(make_unet, make_inputs):
    unet = make_unet()
    x, t, conditions = make_inputs(1, 3)
    savings.apply(unet, RUNTIMES["all and kernels"], META)
    unet.train()
    prepared = unet.prepare(conditions, 3)
    assert not torch.allclose(unet(x, t, prepared), unet(x, t, prepared))


@pytest.mark.parametrize("name", [*SAVINGS, "batched"])
def test_the_pipeline_obeys_its_settings(road, with_config, picture, name):
    on = {"savings": (name,)}
    if name == "batched":
        on = {"savings": ("share_prefix",), "batch_guidance": True}
    plain = pipeline.generate(road, [picture], ["a boat"], [3])
    model = with_config(road, runtime=on)
    savings.apply(model.unet, model.config.runtime, META)
    fast = pipeline.generate(model, [picture], ["a boat"], [3])
    savings.remove(road.unet)
    assert (plain.int() - fast.int()).abs().max() <= 1


def test_unknown_savings_are_refused():
    with pytest.raises(ValueError, match=r"runtime\.savings names 'speed'; known are all, none, kernels"):
        Runtime(savings=("speed",))
    with pytest.raises(ValueError, match="give all or none alone"):
        Runtime(savings=("all", "kernels"))
    with pytest.raises(ValueError, match="kernels, which need"):
        savings.chosen(("kernels",), torch.device("cpu"))
    assert "kernels" not in savings.chosen(("all",), torch.device("cpu"))


# ------------------------------------------------------------------------------------------ the guard


def hooked(network, predict, path, *inputs, then=lambda: None):
    """What `predict` gives while one module's output is doubled, and how often that is asked for"""
    calls = []
    handle = network.get_submodule(path).register_forward_hook(lambda m, args, y: calls.append(1) or 2 * y)
    then()
    found = predict(*inputs), len(calls)
    handle.remove()
    return found


@pytest.fixture(scope="module")
@torch.no_grad()
def hooked_plain(make_unet, branches):
    """The plain network's output, and by the path of each leaf what comes out while it is hooked"""
    plain, (x, t, conditions) = make_unet(), branches(1, 2, 2, 4)
    predict = both_branches(plain, *(projected(plain, plain.prepare(c, 2)) for c in conditions))
    leaves = [path for path, m in plain.named_modules() if not m._modules and not path.startswith("stem.")]
    return predict(x, t), {path: hooked(plain, predict, path, x, t) for path in leaves}


@torch.no_grad()
@pytest.mark.parametrize(
    ("when", "first", "step"),
    # All ask the same guard, so a third of the leaves each is enough.
    [
        ("before", 0, 3),
        ("after", 1, 3),
        ("compiled", 0, 3),
        ("recorded", 2, 3),
        pytest.param("before", 0, 1, marks=pytest.mark.slow),
    ],
)
def test_a_hook_on_any_leaf_is_called_as_in_the_plain_network(
    make_unet, branches, hooked_plain, when, first, step, monkeypatch
):
    """One leaf at a time: as many calls as in the plain network, and the hook's output counts."""
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(compiled, "record", lambda call: call)
    unet, (usual, by_leaf) = make_unet(), hooked_plain
    x, t, conditions = branches(1, 2, 2, 4)
    if when != "before":
        savings.apply(unet, RUNTIMES["all and kernels"], META)
    if when == "compiled":
        compiled.compile_blocks(unet)
    predict = both_branches(unet, *(projected(unet, unet.prepare(c, 2)) for c in conditions))
    if when == "recorded":
        predict = compiled.Recorded(predict, unet)
        predict(x, t)
    torch.testing.assert_close(predict(x, t), usual, **EXACT)
    assert len(by_leaf) > 150

    def late():
        if when == "before":
            savings.apply(unet, RUNTIMES["all and kernels"], META)

    for path, (wanted, expected) in list(by_leaf.items())[first::step]:
        got, number = hooked(unet, predict, path, x, t, then=late)
        # What guidance shares, the entrance, runs once for both branches.
        assert number == expected or (number == expected / 2 > 0), path
        assert not torch.allclose(wanted, usual, **EXACT), path
        torch.testing.assert_close(got, wanted, **EXACT, msg=path)
    torch.testing.assert_close(predict(x, t), usual, **EXACT)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Louder(FeedForward):
    def forward(self, x):
        return 3 * super().forward(x)


class LouderConv(Conv):
    def forward(self, x):
        return 3 * super().forward(x)


class Flat(nn.LayerNorm):
    def forward(self, x):
        return torch.ones_like(x)


class Own(nn.Module):
    def forward(self, x, *_):
        return x.flip(-1)


class Shifted(GroupNorm):
    def forward(self, x):
        return 1 + super().forward(x)


class OverFrames(Attention):
    """Mixes what ours keeps apart, so chunks of it would show."""

    def forward(self, x, context=None):
        return super().forward(x, context) + x.mean(1, keepdim=True)


def become(path, kind):
    def change(module):
        module.get_submodule(path).__class__ = kind

    return change


def put(path, part):
    return lambda module: module.set_submodule(path, part)


def hook(path, function):
    return lambda module: module.get_submodule(path).register_forward_hook(function)


FIRST = "down.0.blocks.0."
CHANGES = {
    "a layer's class": become(FIRST + "temporal.attention1.to_out", Doubled),
    "a projection's class": become(FIRST + "spatial.self_attention.to_q", Doubled),
    "a projection of the context": become(FIRST + "spatial.cross_attention.to_k", Doubled),
    "the gate's class": become(FIRST + "temporal.feed_forward.proj_in", Doubled),
    "a part's class": become(FIRST + "temporal.feed_forward", Louder),
    "a norm's class": become(FIRST + "temporal.norm2", Flat),
    "the first norm": become(FIRST + "temporal.norm", Shifted),
    "a norm of convolutions": become("mid1.temporal_conv.stages.1.norm", Shifted),
    "the output norm": become("norm_out", Shifted),
    "upsampling's convolution": become("up.1.resample.conv", LouderConv),
    "an attention over frames": become(FIRST + "spatial.cross_attention", OverFrames),
    "a part of your own": put(FIRST + "temporal.attention1", Own()),
    "a spatial part of your own": put("up.0.blocks.1.spatial", Own()),
    "no output projection": put(FIRST + "temporal.proj_out", nn.Identity()),
    "no norm": put(FIRST + "temporal.norm3", nn.Identity()),
    "a hook that changes": hook(FIRST + "temporal.attention1", lambda m, args, y: 2 * y),
    "a hook on the block": hook(FIRST.rstrip("."), lambda m, args, y: 2 * y),
    "a hook on its spatial part": hook(FIRST + "spatial", lambda m, args, y: 2 * y),
    "a hook before": lambda m: m.get_submodule(FIRST + "temporal.attention2.to_k").register_forward_pre_hook(
        lambda m, args: (2 * args[0],)
    ),
    "a forward of an instance": lambda m: setattr(
        m.get_submodule(FIRST + "temporal.attention2"), "forward", lambda x: 2 * x
    ),
    "a parametrization": lambda m: torch.nn.utils.parametrizations.weight_norm(
        m.get_submodule(FIRST + "spatial.self_attention.to_v")
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("order", ["change, apply", "apply, change"])
@pytest.mark.parametrize("runtime", ["all and kernels", "chunked"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_part_computes_what_it_was_written_to(make_unet, branches, name, runtime, order):
    unet, plain = make_unet(), make_unet()
    inputs = branches(1, 3)
    usual = guidance_step(plain, *inputs)
    CHANGES[name](plain)
    if order == "apply, change":
        savings.apply(unet, RUNTIMES[runtime], META)
    CHANGES[name](unet)
    if order == "change, apply":
        savings.apply(unet, RUNTIMES[runtime], META)
    wanted = guidance_step(plain, *inputs)
    torch.testing.assert_close(guidance_step(unet, *inputs), wanted, **EXACT)
    assert name == "a parametrization" or not torch.allclose(wanted, usual, **EXACT)


@torch.no_grad()
def test_a_global_hook_sees_every_module(make_unet, make_inputs):
    unet, seen = make_unet(), []
    savings.apply(unet, RUNTIMES["all and kernels"], META)
    x, t, cond = make_inputs(1, 3)
    prepared = unet.prepare(cond, 3)
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: seen.append(m))
    unet(x, t, prepared)
    handle.remove()
    leaves = [m for p, m in unet.named_modules() if not m._modules and not p.startswith("stem.")]
    assert {*leaves} <= {*seen}


@torch.no_grad()
def test_without_the_guard_a_hook_would_be_lost(make_unet, branches, monkeypatch):
    """The planted mistake."""
    unet, calls = make_unet(), []
    savings.apply(unet, RUNTIMES["subpixel_upsampling"])
    unet.get_submodule("up.1.resample.conv").register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr("i2vgen.fast.spatial.diverted", lambda module: False)
    guidance_step(unet, *branches(1, 3))
    assert calls == []


@torch.no_grad()
def test_what_a_hook_keeps_is_not_overwritten(make_unet, branches):
    unet, kept = make_unet(), {}
    inputs = branches(1, 3)
    for name, part in unet.named_modules():
        if isinstance(part, nn.LayerNorm | GroupNorm | FrameAttention | FeedForward) or "proj_in" in name:
            part.register_forward_hook(lambda m, args, y, name=name: kept.update({name: (args[0], y)}))
    guidance_step(unet, *inputs)
    wanted = {name: [value.clone() for value in pair] for name, pair in kept.items()}
    savings.apply(unet, RUNTIMES["all and kernels"], META)
    guidance_step(unet, *inputs)
    for name, pair in wanted.items():
        for got, value in zip(kept[name], pair, strict=True):
            torch.testing.assert_close(got, value[: len(got)] if len(got) < len(value) else value, **EXACT)


def test_known_kinds_are_those_of_a_network(make_unet):
    """A class of ours that the guard does not know would send everything around it to the plain forward."""
    unet = make_unet()
    for runtime in (Runtime(savings=("none",)), *RUNTIMES.values()):
        savings.apply(unet, runtime, META)
        blocks = [unet.temporal_in, *unet.blocks()]
        assert all(guard.undisturbed(block) for block in blocks)


@torch.no_grad()
def test_applied_networks_can_be_copied_and_pickled(make_unet, branches):
    unet = make_unet()
    savings.apply(unet, RUNTIMES["batched"], META)
    inputs = branches(1, 3)
    wanted = guidance_step(unet, *inputs)
    for other in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        assert isinstance(other, FastUNet)
        assert guidance_step(other, *inputs).equal(wanted)


def test_a_sharded_network_is_refused(make_unet):
    unet = make_unet()

    class FSDPModule:
        pass

    savings.apply(unet, Runtime())
    unet.__class__ = type("FSDPUNet", (FSDPModule, FastUNet), {})  # as fully_shard does
    for call in (lambda: savings.remove(unet), lambda: savings.apply(unet, Runtime())):
        with pytest.raises(ValueError, match="sharded"):
            call()


def test_checkpointing_leaves_other_classes_alone(make_unet):
    unet = make_unet()
    savings.apply(unet, Runtime())
    kinds = [type(m) for m in unet.modules()]
    set_checkpointing(unet, True)
    assert [type(m) for m in unet.modules()] != kinds
    set_checkpointing(unet, False)
    assert [type(m) for m in unet.modules()] == kinds


# ------------------------------------------------------------------------------------ parts of the savings


@pytest.fixture
def transformer():
    made = TemporalTransformer(
        8, heads=2, head_width=4, groups=2, second_attention=True, backend="sdpa"
    ).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made.eval()


@torch.no_grad()
def test_sums_in_place_leave_the_input_alone(transformer):
    x = torch.randn(2, 3, 4, 5, 8, dtype=torch.float64)
    plain, before = transformer(x), x.clone()
    savings.apply(transformer, Runtime())
    calls = []
    right = torch.Tensor.addmm_
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "addmm_", lambda *args: calls.append(1) or right(*args))
        torch.testing.assert_close(transformer(x), plain, **EXACT)
    assert len(calls) == 4 and x.equal(before)  # two attentions, the feed-forward, the output projection


@torch.no_grad()
def test_a_transformer_that_is_wide_inside_ends_in_one_product():
    made = TemporalTransformer(
        8, heads=4, head_width=8, groups=2, second_attention=True, backend="sdpa"
    ).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    made.eval()
    few, many = (torch.randn(1, 3, 2, p, 8, dtype=torch.float64) for p in (5, 9))
    plain = made(few), made(many)
    savings.apply(made, Runtime(savings=("fold_products",)))
    assert not made.folding_pays(few.flatten(2, 3)) and made.folding_pays(many.flatten(2, 3))
    for x, wanted in zip((few, many), plain, strict=True):
        torch.testing.assert_close(made(x), wanted, **EXACT)
    made.feed_forward.proj_out.weight.mul_(2)  # in-place changes take effect
    assert not torch.allclose(made(many), plain[1], rtol=0, atol=1e-3)


@torch.no_grad()
def test_a_bias_that_is_forgotten_shows(transformer):
    x = torch.randn(2, 3, 4, 5, 8, dtype=torch.float64)
    plain = transformer(x)
    savings.apply(transformer, Runtime())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("i2vgen.fast.temporal.layer_norm", lambda norm, y, bias, fused: norm(y))
        assert not torch.allclose(transformer(x), plain, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("kernel", [(3, 3), (3, 1), (1, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("last", [True, False], ids=["weights channels last", "rows last"])
def test_a_convolution_as_a_product(kernel, stride, last):
    conv = Conv(5, 7, kernel, stride=stride, padding=(kernel[0] // 2, kernel[1] // 2)).double().eval()
    x = torch.randn(2, 6, 9, 5, dtype=torch.float64)
    plain = conv(x)
    savings.apply(conv, Runtime(savings=("convolution_products",)))
    if not last:
        conv.weight.data = conv.weight.data.contiguous()
    assert conv.product_pays(x)
    torch.testing.assert_close(conv(x), plain, **EXACT)
    conv.weight.mul_(2).transpose(0, 1)
    assert not torch.allclose(conv(x), plain, rtol=0, atol=1e-3)  # in-place changes take effect


def test_a_product_needs_few_pixels_and_many_channels(monkeypatch):
    conv = Conv(8, 8, 3, stride=2, padding=1)
    savings.apply(conv, Runtime())
    few, many = torch.zeros(2, 32, 32, 8), torch.zeros(3, 32, 32, 8)
    assert conv.product_pays(few) and not conv.product_pays(many)
    assert not conv.product_pays(few.to("meta"))
    monkeypatch.setattr(layers, "MANY_CHANNELS", 9)
    assert not conv.product_pays(few)


@torch.no_grad()
@pytest.mark.parametrize("margin", [False, True])
def test_upsampling_by_small_convolutions(margin):
    up = Upsample(6, margin=margin).double().eval()
    x = torch.randn(2, 3, 5, 4, 6, dtype=torch.float64)
    plain = up(x)
    savings.apply(up, Runtime(savings=("subpixel_upsampling",)))
    torch.testing.assert_close(up(x), plain, **EXACT)
    with taps(up, {"conv": lambda path, y: torch.zeros_like(y)}):
        assert not up(x).any()


def linears(*sizes):
    return [nn.Linear(6, size, bias=False).requires_grad_(False) for size in sizes]


def test_weights_side_by_side_are_joined_without_a_copy():
    listed = linears(4, 2, 4)
    apart = torch.cat([layer.weight for layer in listed])
    lay_side_by_side(listed)
    whole = joined([layer.weight for layer in listed])
    assert torch.equal(whole, apart) and whole.data_ptr() == listed[0].weight.data_ptr()
    listed[1].weight.mul_(2)
    assert torch.equal(joined([layer.weight for layer in listed])[4:6], 2 * apart[4:6])
    lay_side_by_side(listed)  # again: they are in place already
    assert listed[0].weight.data_ptr() == whole.data_ptr()


@pytest.mark.parametrize("change", ["replaced", "moved", "learning", "swapped", "never laid"])
def test_weights_elsewhere_in_memory_are_copied(change):
    listed = linears(4, 4, 4)
    if change != "never laid":
        lay_side_by_side(listed)
    if change == "replaced":
        listed[1].weight = nn.Parameter(torch.randn(4, 6), requires_grad=False)
    elif change == "moved":
        listed[2].weight.data = listed[2].weight.data.clone()
    elif change == "learning":
        listed[0].requires_grad_(True)
    elif change == "swapped":
        listed[0], listed[1] = listed[1], listed[0]
    weights = [layer.weight for layer in listed]
    whole = joined(weights)
    assert torch.equal(whole, torch.cat(weights))
    assert whole.data_ptr() not in {weight.data_ptr() for weight in weights}


@torch.no_grad()
def test_laid_out_weights_are_the_same_weights(make_unet, tmp_path):
    unet = make_unet()
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    savings.apply(unet, Runtime())
    convs = [m for m in unet.modules() if isinstance(m, Conv)]
    assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in convs)
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
    checkpoint.save(tmp_path / "w", {"unet": unet}, config.Config())
    stored = dict(checkpoint.read_part(tmp_path / "w", "unet"))
    assert all(torch.equal(stored[name], tensor) for name, tensor in before.items())


@torch.no_grad()
def test_norm_and_silu_are_one_only_where_the_norm_is_ours(monkeypatch):
    x, shift = torch.randn(4, 3, 1, 8, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
    called, right = [], kernels.group_norm
    monkeypatch.setattr(kernels, "group_norm", lambda *args: called.append(args[5]) or right(*args))
    for kind in (GroupNorm, Shifted):
        norm = kind(2, 8).double().eval()
        plain = layers.norm_silu(norm, x, shift)
        savings.apply(norm, RUNTIMES["kernels"], META)
        torch.testing.assert_close(layers.norm_silu(norm, x, shift), plain, **EXACT)
    assert called == [True]


def test_what_a_hook_on_a_norm_saw_stays_as_it_was():
    norm, x, seen = GroupNorm(2, 4).double(), torch.randn(1, 3, 2, 4, dtype=torch.float64), []
    with torch.no_grad():
        plain = nn.functional.silu(norm(x))
        assert torch.equal(layers.norm_silu(norm, x), plain)
        norm.register_forward_hook(lambda module, args, out: seen.append((out, out.clone())))
        assert torch.equal(layers.norm_silu(norm, x), plain)
    assert torch.equal(*seen[0])


@torch.no_grad()
def test_an_identity_in_place_of_a_norm_keeps_its_input():
    x = torch.randn(1, 3, 2, 4)
    kept = x.clone()
    layers.norm_silu(nn.Identity(), x)
    assert torch.equal(x, kept)
