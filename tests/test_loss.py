"""Training noise and loss: per-sample values against formulas written out by hand."""

import pytest
import torch

from i2vgen.diffusion.loss import draw_offset_noise, offset_noise, training_loss
from i2vgen.diffusion.schedule import Schedule, make_betas

BETAS = make_betas(kind="cosine", num_timesteps=1000, zero_terminal_snr=True)
T = torch.tensor([0, 400, 999])


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 4, 5, 2, 3, generator=generator, dtype=torch.float64)


X0, NOISE = batch(0), batch(1)


@pytest.mark.parametrize("prediction", ["v", "eps", "x0", "previous"])
@pytest.mark.parametrize("kind", ["mse", "l1"])
def test_a_perfect_network_has_no_loss(prediction, kind):
    made = Schedule(BETAS, prediction=prediction)
    target = made.target(X0, NOISE, T)
    loss = training_loss(lambda x, t: target, X0, T, NOISE, made, kind=kind)
    assert loss.shape == (3,) and loss.abs().max() == 0


def test_the_network_sees_the_noised_latents_and_the_timesteps():
    made, seen = Schedule(BETAS), []
    training_loss(lambda x, t: seen.append((x, t)) or x, X0, T, NOISE, made)
    assert torch.equal(seen[0][0], made.q_sample(X0, T, NOISE)) and torch.equal(seen[0][1], T)


def test_at_zero_signal_the_v_target_is_minus_x0():
    assert torch.equal(Schedule(BETAS).target(X0, NOISE, T)[2], -X0[2])


@pytest.mark.parametrize(
    ("kind", "distance"),
    [
        ("mse", lambda d: d**2),
        ("l1", lambda d: d.abs()),
        ("charbonnier", lambda d: (d**2 + 1e-12).sqrt()),
    ],
)
def test_loss_is_a_mean_per_sample(kind, distance):
    made = Schedule(BETAS)
    difference = 0.5 * made.q_sample(X0, T, NOISE) - made.target(X0, NOISE, T)
    loss = training_loss(lambda x, t: 0.5 * x, X0, T, NOISE, made, kind=kind)
    torch.testing.assert_close(loss, distance(difference).mean(dim=(1, 2, 3, 4)))


def test_weight_and_mask():
    made, weight = Schedule(BETAS), torch.tensor([0.5, 1.0, 2.0])
    mask = torch.zeros(3, 1, 5, 2, 3)
    mask[:, :, 2] = 1
    plain = training_loss(lambda x, t: 0.5 * x, X0, T, NOISE, made)
    weighted = training_loss(lambda x, t: 0.5 * x, X0, T, NOISE, made, weight=weight)
    torch.testing.assert_close(weighted, plain * weight)
    masked = training_loss(lambda x, t: 0.5 * x, X0, T, NOISE, made, mask=mask)
    difference = 0.5 * made.q_sample(X0, T, NOISE) - made.target(X0, NOISE, T)
    torch.testing.assert_close(masked, (difference[:, :, 2] ** 2).sum(dim=(1, 2, 3)) / (4 * 5 * 2 * 3))


def test_diversity_punishes_still_videos():
    made = Schedule(BETAS, prediction="x0")
    still = X0[:, :, :1].expand_as(X0)
    base = training_loss(lambda x, t: still, X0, T, NOISE, made)
    with_term = training_loss(lambda x, t: still, X0, T, NOISE, made, diversity=True)
    torch.testing.assert_close(with_term - base, torch.full((3,), 10.0, dtype=torch.float64))
    moving = training_loss(lambda x, t: X0, X0, T, NOISE, made, diversity=True)
    assert (moving < 0.002).all()


def test_loss_is_at_least_float32():
    loss = training_loss(lambda x, t: x.half(), X0.half(), T, NOISE.half(), Schedule(BETAS))
    assert loss.dtype == torch.float32


def test_gradients_flow():
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    training_loss(lambda x, t: scale * x, X0, T, NOISE, Schedule(BETAS)).mean().backward()
    assert scale.grad.isfinite() and scale.grad != 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "huber"}, "choose mse, l1 or charbonnier"),
        ({"mask": torch.ones(3, 5, 3, 2, 3)}, r"mask is \(3, 5, 3, 2, 3\)"),
        ({"weight": torch.ones(2)}, "one number per sample"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        training_loss(lambda x, t: x, X0, T, NOISE, Schedule(BETAS), **settings)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="network returned"):
        training_loss(lambda x, t: x[:, :1], X0, T, NOISE, Schedule(BETAS))
    with pytest.raises(ValueError, match="two or more"):
        training_loss(lambda x, t: x, X0[:, :, :1], T, NOISE[:, :, :1], Schedule(BETAS), diversity=True)


def test_offset_noise_moves_whole_frames():
    offset = torch.arange(60, dtype=torch.float64).view(3, 4, 5, 1, 1)
    moved = offset_noise(NOISE, offset, 0.1) - NOISE
    torch.testing.assert_close(moved, (0.1 * offset).expand_as(NOISE))
    with pytest.raises(ValueError, match="one value per sample, channel, frame"):
        offset_noise(NOISE, offset[:, :, :1], 0.1)


def test_drawn_offset_noise_is_repeatable_and_wider():
    shape = (2, 4, 50, 20, 20)
    draws = [draw_offset_noise(shape, strength=0.5, generator=torch.Generator().manual_seed(7)) for _ in "ab"]
    assert torch.equal(*draws) and draws[0].shape == shape
    assert draws[0].var().item() == pytest.approx(1.25, rel=0.05)
    plain = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    per_frame = draws[0] - plain
    torch.testing.assert_close(per_frame, per_frame[..., :1, :1].expand(shape), rtol=0, atol=1e-5)
