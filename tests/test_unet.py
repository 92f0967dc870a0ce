"""The networks: UNet first, then the autoencoder and the CLIP encoders. Properties, not parity."""

import copy
import dataclasses
import json

import pytest
import torch

from i2vgen.fast import checkpointing, runtime
from i2vgen.files import checkpoint
from i2vgen.model import attention
from i2vgen.model.clip import ClipEncoders
from i2vgen.model.layers import Conv
from i2vgen.model.moved import FinePicture, filled, landed, moved, spread
from i2vgen.model.unet import Block, UNet
from i2vgen.model.vae import LOG_VARIANCE_RANGE, AutoencoderKL, Posterior, SelfAttention
from i2vgen.settings import config, merge
from i2vgen.settings.config import Use

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FRAME_MIXERS = ("temporal_attention", "temporal_convolution", "concat_temporal")


def predict(unet, inputs, frames=None):
    x, t, conditions = inputs
    return unet(x, t, unet.prepare(conditions, frames or x.shape[2]))


# --- precision


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_precision_runs(make_unet, make_inputs, dtype, training):
    unet = make_unet(dtype=dtype).train(training)
    for given in {torch.float32, dtype}:  # the network casts at its own door
        inputs = make_inputs(batch=2, dtype=given)
        out = predict(unet, inputs)
        assert out.dtype == dtype and out.shape == inputs[0].shape
        assert out.isfinite().all() and out.std() > 0


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)], ids=str
)
@torch.no_grad()
def test_lower_precisions_only_round(make_unet, make_inputs, dtype, bound):
    exact = predict(make_unet(), make_inputs())
    got = predict(make_unet(dtype=dtype), make_inputs(dtype=dtype))
    assert 0 < (got - exact).norm() / exact.norm() < bound


@torch.no_grad()
def test_sdpa_is_the_formula(make_unet, make_inputs):
    inputs = make_inputs(batch=2)
    one, other = (predict(make_unet(backend=backend), inputs) for backend in ("sdpa", "math"))
    assert (one - other).abs().max() < 1e-12 * one.abs().max()


def test_attention_is_the_textbook_sum():
    q, k, v = torch.randn(3, 1, 2, 5, 4, dtype=torch.float64)
    expected = torch.zeros(5, 4, dtype=torch.float64)
    for i in range(5):
        weights = torch.stack([(q[0, 1, i] @ k[0, 1, j] / 2).exp() for j in range(5)])
        expected[i] = sum(w * v[0, 1, j] for j, w in enumerate(weights / weights.sum()))
    for backend in ("sdpa", "math"):
        torch.testing.assert_close(attention.attend(q, k, v, backend)[0, 1], expected)


def test_unknown_attention_backend(make_unet, make_inputs):
    unet = make_unet(backend="flash9")
    with pytest.raises(ValueError, match=r"backend 'flash9' does not exist; known are sdpa, math"):
        predict(unet, make_inputs())


# --- samples, frames, sizes


@torch.no_grad()
def test_a_batch_is_its_samples_alone(make_unet, make_inputs):
    unet = make_unet()
    x, t, conditions = make_inputs(batch=3)
    both = predict(unet, (x, t, conditions))
    for i in range(3):
        one = slice(i, i + 1)
        alone = predict(unet, (x[one], t[one], type(conditions)(*(c[one] for c in conditions))))
        assert (both[one] - alone).abs().max() < 1e-11 * alone.abs().max()


def disturbed(x, frame):
    x = x.clone()
    x[:, :, frame] += 1
    return x


def test_frames_know_nothing_of_each_other_when_all_mixers_are_off(make_unet, make_inputs):
    unet = make_unet(dataclasses.replace(Use(), **dict.fromkeys(FRAME_MIXERS, False)))
    x, t, conditions = make_inputs()
    with torch.no_grad():
        before, after = (predict(unet, (y, t, conditions)) for y in (x, disturbed(x, 3)))
    assert before[:, :, :3].equal(after[:, :, :3])
    assert not before[:, :, 3].equal(after[:, :, 3])


@pytest.mark.parametrize("mixer", ["temporal_attention", "temporal_convolution"])
@torch.no_grad()
def test_each_mixer_alone_carries_news_between_frames(make_unet, make_inputs, mixer):
    unet = make_unet(dataclasses.replace(Use(), **dict.fromkeys({*FRAME_MIXERS} - {mixer}, False)))
    x, t, conditions = make_inputs()
    before, after = (predict(unet, (y, t, conditions)) for y in (x, disturbed(x, 3)))
    assert (before - after)[:, :, 0].abs().max() > 1e-6


@torch.no_grad()
def test_the_first_picture_reaches_later_frames_of_the_concat_branch_by_its_transformer_only(
    make_unet, make_inputs
):
    _, _, conditions = make_inputs()
    other = conditions._replace(image_latent=conditions.image_latent + 1)
    for on in (True, False):
        unet = make_unet(Use(concat_temporal=on))
        one, two = (unet.prepare(c, 4).concat for c in (conditions, other))
        assert not one[:, 0].equal(two[:, 0])
        assert one[:, 1:].equal(two[:, 1:]) is not on


@pytest.mark.parametrize(("frames", "h", "w"), [(1, 4, 4), (2, 8, 2), (5, 2, 2), (3, 6, 10)])
@torch.no_grad()
def test_frame_counts_and_shapes(make_unet, make_inputs, frames, h, w):
    inputs = make_inputs(frames=frames, h=h, w=w)
    out = predict(make_unet(), inputs)
    assert out.shape == (1, 4, frames, h, w) and out.isfinite().all() and out.is_contiguous()


@torch.no_grad()
def test_the_layout_of_the_input_does_not_matter(make_unet, make_inputs):
    unet = make_unet()
    x, t, conditions = make_inputs(batch=2)
    scattered = x.movedim(1, -1).contiguous().movedim(-1, 1)
    assert not scattered.is_contiguous()
    sliced = torch.stack([x, x], -1)[..., 0]
    expected = predict(unet, (x, t, conditions))
    assert predict(unet, (scattered, t, conditions)).equal(expected)
    assert predict(unet, (sliced, t, conditions)).equal(expected)


@pytest.mark.parametrize(("h", "w"), [(3, 4), (4, 5), (1, 1)])
def test_latents_that_cannot_be_halved(make_unet, make_inputs, h, w):
    x, t, conditions = make_inputs(h=h, w=w)
    unet = make_unet()
    with pytest.raises(ValueError, match=rf"latent of {w} x {h} \(width x height\).*multiples of 2"):
        predict(unet, (x, t, conditions))


# --- conditions


@torch.no_grad()
def test_conditions_prepared_once_serve_every_step(make_unet, make_inputs):
    unet = make_unet()
    x, t, conditions = make_inputs(batch=2)
    prepared = unet.prepare(conditions, 4)
    copies = copy.deepcopy(prepared)
    for step in (t, t // 2, t * 0):
        assert unet(x, step, prepared).equal(unet(x, step, unet.prepare(conditions, 4)))
    # No step wrote into them.
    assert all(a.equal(b) for a, b in zip(prepared, copies, strict=True) if a is not None)
    assert not unet(x, t, prepared).equal(unet(x, t // 2, prepared))


@torch.no_grad()
def test_prepared_conditions_hold_only_the_frame_count_of_the_video(make_unet, make_inputs):
    _, _, conditions = make_inputs(batch=2)
    unet = make_unet()
    few, many = unet.prepare(conditions, 2), unet.prepare(conditions, 5)
    assert few.context.equal(many.context) and few.fps_embedding.equal(many.fps_embedding)
    assert few.concat.shape == (2, 2, 4, 6, 4) and many.concat.shape == (2, 5, 4, 6, 4)
    assert few.context.shape[1] == 7 + (8 // 4) ** 2 + 4


@pytest.mark.parametrize("name", ["text", "image_vector", "image_latent", "fps"])
@torch.no_grad()
def test_every_condition_is_heard(make_unet, make_inputs, name):
    unet = make_unet()
    x, t, conditions = make_inputs()
    other = conditions._replace(**{name: getattr(conditions, name) + 1})
    assert (predict(unet, (x, t, conditions)) - predict(unet, (x, t, other))).abs().max() > 1e-6


def test_frame_planes():
    from i2vgen.model.conditioning import frame_planes

    latent = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    planes = frame_planes(latent, 5, "network")
    assert planes[:, 0].movedim(-1, 1).equal(latent)
    for k in range(1, 5):
        assert (planes[:, k] == k / 4).all()
    assert frame_planes(latent, 1).shape == (2, 1, 2, 2, 3)


@torch.no_grad()
def test_an_output_from_the_picture_begins_as_a_still_clip(make_unet, make_inputs):
    """And is the plain output plus the first-frame latent in every frame, in both branches of guidance."""
    plain, unet = make_unet(), make_unet(Use(output="from_picture"))
    unet.load_state_dict(plain.state_dict())
    x, t, conditions = make_inputs()
    with torch.no_grad():
        prepared = unet.prepare(conditions, x.shape[2])
        got, want = unet(x, t, prepared), plain(x, t, plain.prepare(conditions, x.shape[2]))
        picture = conditions.image_latent[:, :, None]
        assert torch.equal(got, want + picture) and not torch.equal(got, want)
        for part in (unet.conv_out.weight, unet.conv_out.bias):
            part.zero_()
        assert torch.equal(unet(x, t, prepared), picture.expand_as(x))


@torch.no_grad()
def test_a_flow_moves_pixels_of_the_picture(make_inputs):
    """By whole pixels it is a shift, by half a one it lands on two; the heavier wins, a gap is filled."""
    picture = make_inputs(batch=2)[2].image_latent
    b, _, h, w = picture.shape
    flow, weight = torch.zeros(b, 2, 4, h, w).double(), torch.zeros(b, 1, 4, h, w).double()
    flow[:, 0, 1] = 2 / w  # one pixel: the whole width is 2
    flow[:, 1, 2] = -2 / h / 2
    flow[:, 0, 3, :, 0] = 2 / w  # only the first column moves, onto the second, which it outweighs
    weight[:, 0, 3, :, 0] = 40.0
    still, right, up, over = moved(picture[:, :, None], flow, weight).unbind(2)
    near = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(still, picture, **near)
    torch.testing.assert_close(right[..., 1:], picture[..., :-1], **near)
    torch.testing.assert_close(up[..., :-1, :], (picture[..., 1:, :] + picture[..., :-1, :]) / 2, **near)
    torch.testing.assert_close(over[..., 1], picture[..., 0], **near)
    torch.testing.assert_close(over[..., 2:], picture[..., 2:], **near)
    pixels, share = landed(picture[:, :, None], flow, weight)
    gaps = torch.ones(b, 4, h, w).double()
    gaps[:, 1, :, 0] = gaps[:, 3, :, 0] = 0
    gaps[:, 2, -1] = 0.5
    torch.testing.assert_close(share, gaps.reshape(-1, 1, h, w), **near)
    torch.testing.assert_close(pixels[2::4, :, -1], picture[..., -1, :] / 2, **near)


def test_gaps_are_filled_from_around_them():
    """One colour stays one colour, what is there stays as it is, a small gap takes what is next to it."""
    draw = torch.Generator().manual_seed(0)
    share = (torch.rand(2, 1, 7, 10, generator=draw) > 0.4).double() * torch.tensor(0.75)
    torch.testing.assert_close(filled(3 * share, share), torch.full_like(share, 3), rtol=0, atol=1e-12)
    whole = share.ceil()
    x = torch.randn(2, 3, 7, 10, generator=draw).double()
    assert torch.equal(filled(x * whole, whole)[(whole == 1).expand_as(x)], x[(whole == 1).expand_as(x)])
    sides = torch.ones(1, 1, 16, 16).double()
    sides[..., 8:] = 5
    hole = torch.ones_like(sides)
    hole[..., 6:8, 2:4] = hole[..., 6:8, 12:14] = 0
    assert (filled(sides * hole, hole) - sides).abs().max() < 0.2
    assert filled(torch.zeros_like(x), torch.zeros_like(share)).abs().max() == 0
    x, part = x[:1].requires_grad_(), torch.rand(1, 1, 7, 10, generator=draw).double().requires_grad_()
    assert torch.autograd.gradcheck(filled, (x, part))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_moves_has_the_gradients_of_its_definition(dtype):
    draw = torch.Generator().manual_seed(0)
    given = [
        torch.randn(2, c, f, 3, 4, generator=draw, dtype=torch.float64) for c, f in ((2, 1), (2, 2), (1, 2))
    ]
    given = [one.to(dtype).requires_grad_() for one in given]
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(moved, given)
    else:
        exact = moved(*(one.double() for one in given))
        torch.testing.assert_close(moved(*given).double(), exact, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_moved_output_begins_as_a_change_of_the_picture_and_leaves_it(make_unet, make_inputs):
    still, unet = make_unet(Use(output="from_picture")), make_unet(Use(output="moved"))
    plain = make_unet()
    plain.load_state_dict(still.state_dict())
    added = unet.state_dict().keys() - still.state_dict().keys()
    assert added == {"flow_out.weight", "flow_out.bias"}
    unet.load_state_dict(still.state_dict(), strict=False)
    for parameter in unet.flow_out.parameters():
        parameter.zero_()
    inputs = make_inputs()
    torch.testing.assert_close(predict(unet, inputs), predict(still, inputs), rtol=0, atol=1e-12)
    with torch.enable_grad():
        unet.requires_grad_(True)
        predict(unet, inputs).square().sum().backward()
    assert unet.flow_out.weight.grad.flatten(1).abs().amax(dim=1)[:2].min() > 0  # of the flow
    with torch.no_grad():
        unet.flow_out.bias[3] = 1.0  # nothing of the picture is left
    torch.testing.assert_close(predict(unet, inputs), predict(plain, inputs), rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_fine_grid_moves_what_a_latent_pixel_holds(make_inputs):
    h, w, grid, frames = 14, 18, 4, 2
    latent = make_inputs(h=h, w=w)[2].image_latent
    torch.manual_seed(0)
    fine = FinePicture(latent.shape[1], grid).double()
    flow = torch.zeros(1, 2, frames, h * grid, w * grid).double()
    flow[:, 0, 1] = 2 / w  # one latent pixel to the right: the whole width is 2
    still, right = fine(latent[:, :, None], flow, torch.zeros_like(flow[:, :1])).unbind(2)
    rows, before, after = slice(6, -6), slice(6, -7), slice(7, -6)  # beyond the reach of the edges
    torch.testing.assert_close(right[..., rows, after], still[..., rows, before], rtol=0, atol=1e-12)
    channels = torch.arange(2 * grid**2)[None, :, None, None, None]
    first, second = spread(channels, grid)[0, :, 0].unbind()
    assert first.flatten().tolist() == list(range(16)) and second.flatten()[0] == 16


@torch.no_grad()
def test_a_fine_grid_of_the_unet(make_unet, make_inputs):
    unet, inputs = make_unet(Use(output="moved"), moved_grid=2), make_inputs()
    assert unet.flow_out.weight.shape[0] == 3 * 4 + 1
    before = predict(unet, inputs)
    unet.flow_out.bias[-1] += 1e3  # nothing of the picture is left: -1000 of it
    hidden = predict(unet, inputs) - before
    carried = unet.fine_picture(
        unet.prepare(inputs[2], 4).picture, *(torch.zeros(1, n, 4, 8, 12).double() for n in (2, 1))
    )
    assert hidden.abs().mean() > 100 * carried.abs().mean()
    unet.flow_out.weight[:-1] = 0
    unet.flow_out.bias[:-1] = 0
    before = predict(unet, inputs)
    unet.flow_out.bias[-1] += 1
    torch.testing.assert_close(before - predict(unet, inputs), carried, rtol=0, atol=1e-10)
    unet.requires_grad_(True)
    with torch.enable_grad():
        predict(unet, inputs).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in unet.fine_picture.parameters())


@pytest.mark.parametrize("later", ["zeros", "picture"])
def test_later_frames_of_the_concat_branch(make_unet, make_inputs, later, monkeypatch):
    _, _, conditions = make_inputs(batch=2)
    got = make_unet(Use(later_frames=later)).prepare(conditions, 5).concat

    def planes(latent, frames, rounding):
        shown = latent.movedim(1, -1)[:, None].repeat(1, frames, 1, 1, 1)
        shown[:, 1:] *= later == "picture"
        return shown

    unet = make_unet()
    assert not unet.prepare(conditions, 5).concat.allclose(got)
    monkeypatch.setattr("i2vgen.model.conditioning.frame_planes", planes)
    assert unet.prepare(conditions, 5).concat.equal(got)
    assert make_unet(Use(later_frames=later)).prepare(conditions, 1).concat.shape[1] == 1


# --- training


def gradients(unet, inputs):
    unet.zero_grad()
    torch.manual_seed(7)  # dropout
    predict(unet, inputs).square().mean().backward()
    return {name: p.grad.clone() for name, p in unet.named_parameters()}


def test_gradient_checkpointing_gives_the_same_gradients(make_unet, make_inputs, monkeypatch):
    unet, inputs = make_unet().train(), make_inputs(batch=2)
    expected = gradients(unet, inputs)
    used, checkpoint_ = [], checkpointing.checkpoint

    def counting(part, *args, **kwargs):
        used.append(getattr(part, "__self__", part))
        return checkpoint_(part, *args, **kwargs)

    monkeypatch.setattr(checkpointing, "checkpoint", counting)
    gradients(unet, inputs)
    assert used == []
    checkpointing.set_checkpointing(unet, True)
    got = gradients(unet, inputs)
    parts = [
        p
        for b in unet.modules()
        if isinstance(b, Block)
        for p in (b.res, b.temporal_conv, b.spatial, b.temporal)
    ]
    parts.append(unet.temporal_in)
    assert {id(p) for p in used} == {id(p) for p in parts if p is not None}
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-10, atol=1e-14, msg=name)
    with torch.no_grad():
        used.clear()
        predict(unet, inputs)
        assert used == []


def test_dropout_is_training_only(make_unet, make_inputs):
    unet, inputs = make_unet(), make_inputs()
    with torch.no_grad():
        assert predict(unet, inputs).equal(predict(unet, inputs))
        unet.train()
        assert not predict(unet, inputs).equal(predict(unet, inputs))


@torch.no_grad()
def test_an_untrained_network_returns_its_heads_bias(small, make_inputs):
    unet = UNet(small, Use()).double().eval()
    out = predict(unet, make_inputs())
    assert unet.conv_out.bias.abs().min() > 0
    assert out.equal(unet.conv_out.bias.view(1, 4, 1, 1, 1).expand_as(out))


def test_every_residual_branch_starts_at_zero(small):
    unet = UNet(small, Use())
    zero = {name for name, p in unet.named_parameters() if not p.any() and name.endswith("weight")}
    expected = {n for n, _ in unet.named_parameters() if n.endswith("res.conv2.weight")}
    expected |= {n for n, _ in unet.named_parameters() if n.endswith("temporal_conv.stages.3.conv.weight")}
    expected |= {n for n, _ in unet.named_parameters() if "stem" not in n and n.endswith(".proj_out.weight")
                 and "feed_forward" not in n}  # fmt: skip
    assert zero == expected | {"conv_out.weight", "stem.fps.linear2.weight"}


# --- the shape of the computation


@torch.no_grad()
def test_channels_stay_last_from_the_first_block_to_the_head(make_unet, make_inputs):
    unet, seen = make_unet(), []

    def look(module, args, output):
        seen.append(output.shape)
        assert args[0].is_contiguous() and output.is_contiguous()
        assert output.shape[:2] == (2, 4) and output.shape[-1] in (32, 64)

    blocks = [module for module in unet.modules() if isinstance(module, Block)]
    for block in blocks:
        block.register_forward_hook(look)
    predict(unet, make_inputs(batch=2))
    assert len(seen) == len(blocks) == 8


@torch.no_grad()
def test_the_whole_forward_is_one_graph_for_all_steps(make_unet, make_inputs):
    unet = make_unet()
    x, t, conditions = make_inputs(batch=2)
    prepared = unet.prepare(conditions, 4)
    torch._dynamo.reset()
    runtime.compile_quickly()
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    try:
        got = compiled(x, t, prepared)
        torch.testing.assert_close(got, unet(x, t, prepared), rtol=1e-10, atol=1e-12)
        with torch._dynamo.config.patch(error_on_recompile=True):
            torch.testing.assert_close(
                compiled(x, t - 1, prepared), unet(x, t - 1, prepared), rtol=1e-10, atol=1e-12
            )
    finally:
        torch._dynamo.reset()


def test_forward_leaves_no_state_behind(make_unet, make_inputs):
    unet = make_unet()
    before = {name: dict(vars(m)) for name, m in unet.named_modules()}
    with torch.no_grad():
        predict(unet, make_inputs(batch=2))
    for name, module in unet.named_modules():
        assert vars(module) == before[name]


# --- the autoencoder

VAE = config.VAE(
    base_width=32, width_multipliers=(1, 2), blocks_per_level=1, resolution=32, attention_resolutions=(16,),
    z_channels=3, embed_dim=5, norm_groups=8,
)  # fmt: skip


def make_vae(settings=VAE, dtype=torch.float64, backend="sdpa"):
    with torch.device("meta"):
        vae = AutoencoderKL(settings, backend=backend)
    checkpoint.fill(vae, checkpoint.random_state(vae, seed=0), dtype=dtype)
    return vae.eval()


@torch.no_grad()
def test_chunks_do_not_change_the_frames():
    vae = make_vae()
    latents, pixels = torch.randn(5, 5, 4, 6), torch.rand(5, 3, 8, 12) * 2 - 1
    noise = torch.randn(5, 5, 4, 6)
    frames, encoded = vae.decode(latents), vae.encode(pixels, noise)
    assert frames.shape == (5, 3, 8, 12) and encoded.shape == (5, 5, 4, 6)
    assert frames.dtype == torch.float64
    for chunk in (1, 2, 3, 5, 7):
        torch.testing.assert_close(vae.decode(latents, chunk=chunk), frames, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(vae.encode(pixels, noise, chunk=chunk), encoded, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_mode_and_sample():
    vae = make_vae()
    pixels, noise = torch.rand(2, 3, 8, 8) * 2 - 1, torch.randn(2, 5, 4, 4, dtype=torch.float64)
    posterior = vae.posterior(pixels)
    mode = vae.encode(pixels, None)
    assert mode.equal(VAE.scale * posterior.mean)
    assert vae.encode(pixels, 0 * noise).equal(mode)
    torch.testing.assert_close(vae.encode(pixels, noise) - mode, VAE.scale * posterior.std * noise)
    assert posterior.std.min() > 0


@torch.no_grad()
def test_the_scale_stands_on_both_doors():
    vae = make_vae()
    pixels = torch.rand(1, 3, 8, 8)
    latent, frames = vae.encode(pixels, None), vae.decode(torch.ones(1, 5, 4, 4))
    other = make_vae(dataclasses.replace(VAE, scale=2 * VAE.scale))
    torch.testing.assert_close(other.encode(pixels, None), 2 * latent)
    torch.testing.assert_close(other.decode(2 * torch.ones(1, 5, 4, 4)), frames)


def test_the_posterior_is_clamped_and_its_kl_is_the_formula():
    moments = torch.randn(2, 6, 2, 2, dtype=torch.float64)
    posterior = Posterior.from_moments(moments * 100)
    low, high = LOG_VARIANCE_RANGE
    assert posterior.log_variance.min() >= low and posterior.log_variance.max() <= high
    posterior = Posterior.from_moments(moments)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(posterior.mean, posterior.std), normal(0.0, 1.0))
    torch.testing.assert_close(posterior.kl(), expected.flatten(1).sum(1))


@pytest.mark.parametrize("resolutions", [(), (32,), (16,), (32, 16)])
@torch.no_grad()
def test_attention_stands_where_asked(resolutions):
    vae = make_vae(dataclasses.replace(VAE, attention_resolutions=resolutions))
    levels = {name.split(".attentions")[0] for name, m in vae.named_modules()
              if isinstance(m, SelfAttention) and ".attentions" in name}  # fmt: skip
    wanted = {32: 0, 16: 1}
    assert levels == {f"{half}.{wanted[r]}" for r in resolutions for half in ("encoder.down", "decoder.up")}
    frames = vae.decode(vae.encode(torch.rand(1, 3, 8, 8), None))
    assert frames.shape == (1, 3, 8, 8) and frames.isfinite().all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@torch.no_grad()
def test_the_autoencoder_in_every_precision(dtype):
    vae = make_vae(dtype=dtype)
    latent = vae.encode(torch.rand(1, 3, 8, 8), torch.randn(1, 5, 4, 4))
    frames = vae.decode(latent)
    assert latent.dtype == frames.dtype == dtype and frames.isfinite().all()


@torch.no_grad()
def test_attention_backends_of_the_autoencoder_agree():
    pixels = torch.rand(1, 3, 8, 8)
    one, other = (make_vae(backend=backend).encode(pixels, None) for backend in ("sdpa", "math"))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@torch.no_grad()
def test_odd_rests_are_cut_off():
    vae = make_vae()
    pixels = torch.rand(1, 3, 9, 11)
    assert vae.encode(pixels, None).shape == (1, 5, 4, 5)
    assert vae.decode(torch.randn(1, 5, 3, 7)).shape == (1, 3, 6, 14)


def test_convolutions_on_channels_last_are_plain_convolutions():
    conv = Conv(3, 5, 3, padding=1, stride=2).double()
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    got = conv(x.movedim(1, -1))
    assert got.is_contiguous()
    expected = torch.nn.functional.conv2d(x, conv.weight, conv.bias, stride=2, padding=1)
    torch.testing.assert_close(got.movedim(-1, 1), expected)


# --- the CLIP encoders


@pytest.fixture
def clip(tiny_model):
    """The tiny encoders; changing `settings` of this copy changes nobody else's."""
    return copy.copy(tiny_model.clip)


@torch.no_grad()
def test_towers_against_open_clips_own_way(clip):
    clip.settings = dataclasses.replace(clip.settings, text_layer="last")
    tokens = clip.tokenize(["a red boat", ""])
    last = clip.text(tokens)
    pooled = last[torch.arange(2), tokens.argmax(-1)] @ clip.model.text_projection
    torch.testing.assert_close(pooled, clip.model.encode_text(tokens), rtol=1e-4, atol=1e-5)
    pixels = torch.randn(2, 3, 56, 56)
    torch.testing.assert_close(clip.image(pixels), clip.model.encode_image(pixels))


@torch.no_grad()
def test_penultimate_stops_one_block_earlier(clip):
    tokens = clip.tokenize(["a red boat"])
    stopped = []
    handle = clip.model.transformer.resblocks[-2].register_forward_hook(lambda m, a, out: stopped.append(out))
    try:
        got = clip.text(tokens)
    finally:
        handle.remove()
    assert got.equal(clip.model.ln_final(stopped[0])) and got.shape == (1, 77, 64)
    clip.settings = dataclasses.replace(clip.settings, text_layer="last")
    assert not torch.allclose(clip.text(tokens), got)


@torch.no_grad()
def test_a_token_sees_only_what_stands_before_it(clip):
    tokens = clip.tokenize(["a red boat on a lake"])
    changed = tokens.clone()
    changed[0, 4] = 7
    before, after = clip.text(tokens), clip.text(changed)
    assert before[:, :4].equal(after[:, :4]) and not before[:, 4:].equal(after[:, 4:])


def test_tokens(clip, recwarn):
    tokens = clip.tokenize(["a red boat", ""])
    start, end = 49406, 49407
    assert tokens.dtype == torch.int64 and tokens.shape == (2, 77)
    assert tokens[0, 0] == start and tokens[0, 4] == end and not tokens[0, 5:].any()
    assert tokens[1, :3].tolist() == [start, end, 0]
    clip.tokenize(["word " * 75])  # exactly what fits
    assert len(recwarn) == 0


def test_a_prompt_that_is_too_long_says_what_is_lost(clip):
    with pytest.warns(
        UserWarning, match=r"has 79 tokens and CLIP reads 75; this is lost: 'a very last thing'"
    ):
        tokens = clip.tokenize(["word " * 75 + "a very last thing"])
    assert tokens.shape == (1, 77) and tokens[0, 76] == 49407


def test_a_vocabulary_smaller_than_the_tokenizers(tiny):
    text = {**tiny.clip.text, "vocab_size": 1000}
    with pytest.raises(ValueError, match=r"vocab_size is 1000 but the tokenizer knows 49408 words"):
        ClipEncoders(dataclasses.replace(tiny.clip, text=text))


def test_towers_of_hugging_face_are_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"clip\.text\.hf_model_name is set"):
        dataclasses.replace(tiny.clip, text={**tiny.clip.text, "hf_model_name": "roberta-base"})
    card = {"embed_dim": 512, "vision_cfg": {}, "text_cfg": {"hf_tokenizer_name": "roberta-base"}}
    (tmp_path / "card.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match=r"clip\.text\.hf_tokenizer_name is set"):
        merge.load_config(None, [f"clip.model={tmp_path / 'card.json'}"])


def test_words_that_open_clip_does_not_know(tiny):
    with pytest.raises(ValueError, match=r"no open_clip configuration: .*colour"):
        ClipEncoders(dataclasses.replace(tiny.clip, vision={**tiny.clip.vision, "colour": 3}))


def test_a_context_of_another_length(tiny):
    with torch.device("meta"):
        clip = ClipEncoders(dataclasses.replace(tiny.clip, text={**tiny.clip.text, "context_length": 16}))
    checkpoint.fill(clip, checkpoint.random_state(clip, seed=0))
    assert clip.text(clip.tokenize(["a red boat"])).shape == (1, 16, 64)


def test_padding_is_a_setting_and_leaves_spelled_out_ends_alone(tiny):
    other = ClipEncoders(dataclasses.replace(tiny.clip, pad_token=49407))
    ours, theirs = (
        ClipEncoders(tiny.clip).tokenize(["a <end_of_text> b"]),
        other.tokenize(["a <end_of_text> b"]),
    )
    assert ours[0, :6].tolist() == [49406, 320, 49407, 321, 49407, 0] and ours[0, 5:].eq(0).all()
    assert theirs[0, :5].equal(ours[0, :5]) and theirs[0, 5:].eq(49407).all()
