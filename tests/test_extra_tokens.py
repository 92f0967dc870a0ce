"""Context tokens of one's own: against formulas written out here, in every fast form, and what is refused."""

import contextlib
import warnings

import pytest
import torch
from torch import nn

from i2vgen import pipeline
from i2vgen.adapt import context as contexts
from i2vgen.adapt.context import Context, Keys
from i2vgen.adapt.extra_tokens import Beside, extra_tokens
from i2vgen.evaluation.evaluate import without
from i2vgen.fast import savings
from i2vgen.fast.checkpointing import set_checkpointing
from i2vgen.fast.unet import Deep, projected, shared
from i2vgen.model.attention import Attention
from i2vgen.model.conditioning import Unconditional
from i2vgen.settings.config import Runtime

EXACT = {"rtol": 0, "atol": 1e-12}
WIDTH = 16  # of the small UNet's context


def predict(unet, inputs):
    x, t, conditions = inputs
    return unet(x, t, unet.prepare(conditions, x.shape[2]))


def trained(unet, *patterns, width=None):
    """A `Beside` with numbers in it."""
    beside = Beside(unet, patterns or ("*.cross_attention",), width=width)
    for parameter in beside.parameters():
        nn.init.normal_(parameter, std=0.5)
    return beside


def tokens(b=1, k=3, width=WIDTH):
    return torch.randn(b, k, width, dtype=torch.float64)


@pytest.fixture
def unet(make_unet):
    return make_unet()


@pytest.fixture
def inputs(make_inputs):
    return make_inputs(batch=2)


# --- what is computed


@torch.no_grad()
def test_tokens_stand_behind_the_context(unet, inputs):
    x, t, conditions = inputs
    plain, given = unet.prepare(conditions, 4), tokens(2)
    wanted = unet(x, t, plain._replace(context=torch.cat([plain.context, given], dim=1)))
    with extra_tokens(unet, given):
        assert predict(unet, inputs).equal(wanted)
    assert not wanted.allclose(unet(x, t, plain))
    with extra_tokens(unet, given[:1]):  # one set for all samples
        torch.testing.assert_close(predict(unet, inputs)[:1], wanted[:1], **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["mid1.spatial.cross_attention", "*.cross_attention"])
def test_tokens_beside_the_context_follow_the_formula(unet, inputs, pattern, monkeypatch):
    """softmax(q kᵀ / √d) v + scale softmax(q k'ᵀ / √d) v', then the output projection."""
    beside, given = trained(unet, pattern, width=5), tokens(2, width=5)
    with extra_tokens(unet, given, through=beside, scale=0.7):
        got = predict(unet, inputs)

    def reading(reader, part):
        def forward(x, context):
            q, k, v = (
                y.unflatten(-1, (reader.heads, -1)).movedim(2, 1)
                for y in (reader.to_q(x), reader.to_k(context), reader.to_v(context))
            )
            k2, v2 = (
                layer(given).unflatten(-1, (reader.heads, -1)).movedim(2, 1)
                for layer in (part.to_k, part.to_v)
            )
            root = q.shape[-1] ** 0.5
            y = (q @ k.mT / root).softmax(-1) @ v + 0.7 * (q @ k2.mT / root).softmax(-1) @ v2
            return reader.to_out(y.movedim(1, 2).flatten(2))

        return forward

    plain = predict(unet, inputs)
    for path, part in beside.parts.items():
        reader = unet.get_submodule(path.replace("/", "."))
        monkeypatch.setattr(reader, "forward", reading(reader, part))
    wanted = predict(unet, inputs)
    torch.testing.assert_close(got, wanted, **EXACT)
    assert not torch.allclose(plain, wanted, atol=1e-6)


@torch.no_grad()
def test_unused_it_costs_and_leaves_nothing(unet, inputs):
    names, before = list(unet.state_dict()), predict(unet, inputs)
    prepared = unet.prepare(inputs[2], 4)
    beside = trained(unet)
    with extra_tokens(unet, tokens(), through=beside):
        assert list(unet.state_dict()) == names
        assert not predict(unet, inputs).equal(before)
    assert "prepare" not in vars(unet) and predict(unet, inputs).equal(before)
    assert unet.prepare(inputs[2], 4).context.equal(prepared.context)
    assert type(unet.mid1.spatial.cross_attention) is Attention
    with contextlib.suppress(RuntimeError), extra_tokens(unet, tokens()):
        raise RuntimeError
    assert "prepare" not in vars(unet)


@torch.no_grad()
def test_untrained_and_zeros_beside_are_exactly_nothing(unet, inputs):
    plain = predict(unet, inputs)
    with (
        pytest.warns(UserWarning, match="untrained, its values are 0"),
        extra_tokens(unet, tokens(), through=Beside(unet)),
    ):
        assert predict(unet, inputs).equal(plain)
    beside = trained(unet)
    with (
        pytest.warns(UserWarning, match="at scale 0"),
        extra_tokens(unet, tokens(), through=beside, scale=0.0),
    ):
        assert predict(unet, inputs).equal(plain)
    away = Unconditional(*inputs[2])
    for negative in ("zeros", "none"):
        with extra_tokens(unet, tokens(), through=beside, negative=negative):
            assert predict(unet, (*inputs[:2], away)).equal(plain)


@torch.no_grad()
def test_one_inside_another_adds_up(unet, inputs):
    one, two, beside, other = tokens(2), tokens(2, k=2), trained(unet), trained(unet, "mid1.*")
    with extra_tokens(unet, torch.cat([one, two], dim=1)), extra_tokens(unet, one, through=beside):
        wanted = predict(unet, inputs)
    for fast in (False, True):
        if fast:
            savings.apply(unet, Runtime())
        with (
            extra_tokens(unet, one),
            extra_tokens(unet, one, through=beside),
            extra_tokens(unet, two),
        ):
            torch.testing.assert_close(predict(unet, inputs), wanted, **EXACT)
    # Two sets of extra keys in one attention: each has a softmax of its own.
    q = torch.randn(1, 2, 6, 8, dtype=torch.float64)
    keys = [Keys(*torch.randn(2, 1, 2, 3, 8, dtype=torch.float64)) for _ in range(3)]
    sums = [contexts.sum_of_attentions(q, listed, "math") for listed in (keys, *([one] for one in keys))]
    torch.testing.assert_close(sums[0], sum(sums[1:]), **EXACT)
    with extra_tokens(unet, one, through=beside), extra_tokens(unet, two, through=other):
        both = unet.prepare(inputs[2], 4).context.extra
    with extra_tokens(unet, two, through=other):
        alone = unet.prepare(inputs[2], 4).context.extra
    assert len(alone) == 1 and {reader for reader, listed in both.items() if len(listed) == 2} == {*alone}


# --- through the fast forms


FORMS = [{"through": False}, {"through": True}, {"through": True, "pattern": "up.*.cross_attention"}]


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("names", [("share_prefix",), ("all",)], ids=str)
def test_guidance_with_everything_shared_gives_the_same(make_unet, make_inputs, form, batched, names):
    unet = make_unet(blocks_per_level=2)
    x, t, cond = make_inputs(batch=2)
    beside = trained(unet, form.get("pattern", "*.cross_attention")) if form["through"] else None
    away = Unconditional(*cond._replace(text=-cond.text))
    with extra_tokens(unet, tokens(2), through=beside):
        plain = torch.cat([unet(x, t, unet.prepare(c, 4)) for c in (cond, away)])
        savings.apply(unet, Runtime(savings=names, batch_guidance=batched))
        both = shared(unet, [projected(unet, unet.prepare(c, 4)) for c in (cond, away)])
        assert bool(both.context.extra) == form["through"]
        torch.testing.assert_close(unet(x, t, both), plain, **EXACT)
        out, features = unet(x, t, both, deep=Deep(1))
        torch.testing.assert_close(out, plain, **EXACT)
        torch.testing.assert_close(unet(x, t, both, deep=Deep(1, features))[0], plain, **EXACT)


@torch.no_grad()
def test_tokens_that_are_lost_on_the_way_would_be_seen(unet, make_inputs, monkeypatch):
    """The planted mistake of the test above: contexts split without their extra keys."""
    x, t, cond = make_inputs(batch=2)
    beside, away = trained(unet), Unconditional(*cond)
    savings.apply(unet, Runtime())
    with extra_tokens(unet, tokens(), through=beside, negative="same"):
        plain = unet(x, t, unet.prepare(cond, 4))
        both = shared(unet, [unet.prepare(c, 4) for c in (cond, away)])
    torch.testing.assert_close(unet(x, t, both)[:2], plain, **EXACT)
    monkeypatch.setattr(Context, "split", lambda self, b: [Context(p, {}, {}) for p in self.tokens.split(b)])
    assert not torch.allclose(unet(x, t, both)[:2], plain, atol=1e-6)


@torch.no_grad()
def test_branches_that_differ_in_shape_share_nothing(unet, make_inputs):
    _, _, cond = make_inputs()
    away, beside = Unconditional(*cond), trained(unet)
    savings.apply(unet, Runtime())
    for how in (
        {"negative": "none"},
        {"negative": tokens(k=5)},
        {"negative": tokens(k=5), "through": beside},
    ):
        with extra_tokens(unet, tokens(), **how):
            assert shared(unet, [unet.prepare(c, 4) for c in (cond, away)]) is None
    with extra_tokens(unet, tokens(), through=beside):
        one = unet.prepare(cond, 4)
    assert shared(unet, [one, unet.prepare(cond, 4)]) is None


@torch.no_grad()
def test_an_ablated_condition_keeps_extra_keys(unet, inputs):
    x, t, conditions = inputs
    with extra_tokens(unet, tokens(), through=trained(unet)):
        prepared = unet.prepare(conditions, 4)
        got = without(unet, "local tokens", None, slice(7, 11)).prepare(conditions, 4)
        zeroed = prepared.context.tokens.clone()
        zeroed[:, 7:11] = 0
        assert all(a[0].k.equal(prepared.context.extra[r][0].k) for r, a in got.context.extra.items())
        wanted = unet(x, t, prepared._replace(context=Context(zeroed, {}, prepared.context.extra)))
        assert unet(x, t, got).equal(wanted)


# --- guidance, and the whole road


@torch.no_grad()
@pytest.mark.parametrize("negative", ["zeros", "none", "same", "own"])
@pytest.mark.parametrize("form", ["behind", "beside"])
def test_the_unconditional_branch_reads_what_was_asked_for(unet, road, with_config, form, negative):
    model = with_config(road, sample={"guidance": 3.0})
    cond, away = pipeline.encode(model, [picture_of(16)], ["a boat"], torch.zeros(1, 4, 8, 8).double())
    assert isinstance(away, Unconditional) and not isinstance(cond, Unconditional)
    width = model.config.unet.context_width
    given, own = tokens(width=width), tokens(width=width)
    frames, x = model.config.sample.frames, torch.randn(1, 4, model.config.sample.frames, 8, 8).double()
    t, beside = torch.tensor([500]), trained(model.unet) if form == "beside" else None

    def alone(conditions, what):
        if what is None:
            return model.unet(x, t, model.unet.prepare(conditions, frames))
        with extra_tokens(model.unet, what, through=beside, negative="same"):
            return model.unet(x, t, model.unet.prepare(conditions, frames))

    read = {"zeros": 0 * given, "none": None, "same": given, "own": own}[negative]
    y, n = alone(cond, given), alone(away, read)
    with extra_tokens(model.unet, given, through=beside, negative=own if negative == "own" else negative):
        got = pipeline.network(model, cond, away)(x, t)
    torch.testing.assert_close(got, n + 3.0 * (y - n), rtol=0, atol=1e-11)


def test_a_clip_under_tokens(road, with_config, picture):
    model = with_config(road, sample={"guidance": 3.0})
    given = tokens(k=2, width=model.config.unet.context_width)

    def clips(how=None):
        inside = contextlib.nullcontext() if how is None else extra_tokens(model.unet, given, **how)
        with inside:
            return pipeline.generate(model, [picture] * 2, ["a boat"] * 2, [1, 2])

    plain, behind = clips(), clips({})
    assert not behind.equal(plain) and clips().equal(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not clips({"through": trained(model.unet)}).equal(plain)
    with pytest.warns(UserWarning, match="untrained"):
        assert clips({"through": Beside(model.unet)}).equal(plain)


def picture_of(size):
    from PIL import Image

    return Image.new("RGB", (size, size), (200, 30, 60))


# --- training


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_tokens_and_what_reads_them(make_unet, inputs, checkpointing):
    unet = make_unet().requires_grad_(False).train()
    set_checkpointing(unet, checkpointing)
    project, beside = nn.Linear(3, WIDTH).double(), Beside(unet)
    for through in (None, beside):
        project.zero_grad()
        given = project(torch.randn(2, 2, 3, dtype=torch.float64))
        with extra_tokens(unet, given, through=through):
            predict(unet, inputs).square().mean().backward()
        # Values that are zero hand nothing on yet, but learn.
        assert (project.weight.grad is None or not project.weight.grad.any()) == (through is not None)
    assert all(part.to_v.weight.grad.any() for part in beside.parts.values())
    assert {p.dtype for p in beside.parameters()} == {torch.float64}
    assert {p.dtype for p in Beside(make_unet(dtype=torch.float16)).parameters()} == {torch.float32}


# --- mistakes


@torch.no_grad()
def test_mistakes_are_told(unet, inputs, make_unet):
    def entering(*given, **how):
        with extra_tokens(unet, *given, **how):
            pass

    with pytest.raises(
        ValueError, match=r"shape \[1, 3, 12\]; give \[b k d\] with d = 16, the width of the context"
    ):
        entering(tokens(width=12))
    with pytest.raises(ValueError, match=r"shape \[1, 3, 16\].*d = 5, the width of what `through` takes"):
        entering(tokens(), through=Beside(unet, width=5))
    with pytest.raises(ValueError, match=r"shape \[3, 16\]"):
        entering(tokens()[0])
    with pytest.raises(ValueError, match="k of at least 1"):
        entering(tokens(k=0))
    with pytest.raises(ValueError, match=r"shape \[1, 3, 4\]"):
        entering(tokens(), negative=tokens(width=4))
    with pytest.raises(ValueError, match="negative is 'nothing'"):
        entering(tokens(), negative="nothing")
    with pytest.raises(ValueError, match=r"scale is 0\.5 without `through`"):
        entering(tokens(), scale=0.5)
    with pytest.raises(ValueError, match="give a finite number"):
        entering(tokens(), through=Beside(unet), scale=float("nan"))
    with pytest.raises(ValueError, match=r"'mid1\.res' matches no cross-attention"):
        Beside(unet, ["mid1.res"])
    with pytest.raises(ValueError, match="matches no cross-attention"):
        Beside(unet, ["mid1.spatial.self_attention"])
    with pytest.raises(ValueError, match="no module's path matches 'mid7"):
        Beside(unet, ["mid7.*"])
    with pytest.raises(ValueError, match="no pattern given"):
        Beside(unet, [])
    other = Beside(make_unet(base_width=16))
    with pytest.raises(ValueError, match=r"another network: .*_attention is no cross-attention of \d+ heads"):
        entering(tokens(), through=other)
    with pytest.raises(ValueError, match="for 3 samples meet a batch of 2"), extra_tokens(unet, tokens(3)):
        predict(unet, inputs)
    assert "prepare" not in vars(unet)


@torch.no_grad()
def test_what_changes_nothing_is_warned_of(unet, inputs):
    prepared = unet.prepare(inputs[2], 4)
    with pytest.warns(UserWarning, match="no conditions were prepared inside"), extra_tokens(unet, tokens()):
        unet(*inputs[:2], prepared)
