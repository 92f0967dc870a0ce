"""Schedules: what the tables, grids and conversions promise, whatever a golden file says."""

import math

import pytest
import torch

from i2vgen.diffusion import schedule as schedule_module
from i2vgen.diffusion.schedule import Schedule, make_betas, next_levels, timesteps

SPACINGS = ("official", "leading", "trailing", "linspace")
PREDICTIONS = ("v", "eps", "x0", "previous")


def official_betas(num_timesteps=1000):
    return make_betas(kind="cosine", num_timesteps=num_timesteps, zero_terminal_snr=True)


def latents(seed, *, batch=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, 2, 3, 5, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("kind", ["cosine", "linear", "quadratic"])
@pytest.mark.parametrize("num_timesteps", [25, 250, 1000])
def test_zero_terminal_snr_ends_at_zero_and_keeps_the_first_value(kind, num_timesteps):
    plain = make_betas(kind=kind, num_timesteps=num_timesteps, zero_terminal_snr=False)
    betas = make_betas(kind=kind, num_timesteps=num_timesteps, zero_terminal_snr=True)
    assert betas.dtype == torch.float64
    assert betas[-1] == 1 and Schedule(betas).abar[-1] == 0
    assert betas[0] == pytest.approx(plain[0].item(), abs=1e-12)
    assert torch.equal(schedule_module.rescale_zero_terminal_snr(betas), betas)


def test_a_missing_last_beta_of_the_linear_schedule_gets_its_default():
    betas = make_betas(kind="linear", num_timesteps=500, zero_terminal_snr=False)
    assert betas[0] == pytest.approx(2e-4) and betas[-1] == pytest.approx(0.04)


def test_sigmas_of_the_refiner_end_at_exactly_one():
    sigmas = schedule_module.logsnr_cosine_sigmas(num_timesteps=1000)
    assert sigmas[-1] == 1 and (sigmas.diff() > 0).all()
    logsnr = torch.log((1 - sigmas[0] ** 2) / sigmas[0] ** 2).item()
    assert logsnr == pytest.approx(15 - 2 * math.log(2), abs=1e-2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "sine", "num_timesteps": 10}, "choose cosine, linear"),
        ({"kind": "cosine", "num_timesteps": 1}, "at least 2"),
        ({"kind": "linear_sd", "num_timesteps": 10}, "needs init_beta and last_beta"),
        ({"kind": "cosine", "num_timesteps": 10, "init_beta": 1e-4}, "no effect"),
    ],
)
def test_impossible_betas_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make_betas(zero_terminal_snr=False, **settings)


@pytest.mark.parametrize("bad", [0.0, -0.1, 1.1, math.nan])
def test_betas_outside_their_range_are_refused(bad):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        Schedule(torch.tensor([0.1, bad, 0.2], dtype=torch.float64))


def test_schedule_refuses_unknown_names_and_float32_betas():
    betas = official_betas(10)
    with pytest.raises(ValueError, match="prediction"):
        Schedule(betas, prediction="epsilon")
    with pytest.raises(ValueError, match="variance"):
        Schedule(betas, variance="learned")
    with pytest.raises(ValueError, match="float64"):
        Schedule(betas.float())


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_timesteps", [25, 1000])
def test_grids_descend_inside_the_schedule_and_land_on_level_zero(spacing, num_timesteps):
    for steps in range(1, num_timesteps + 1, 1 if num_timesteps < 100 else 7):
        visited = timesteps(num_timesteps, steps, spacing)
        levels = next_levels(num_timesteps, steps, spacing)
        assert len(levels) == len(visited) and levels[-1] == 0
        assert min(visited) >= 0 and max(visited) < num_timesteps
        assert all(level <= t for t, level in zip(visited, levels, strict=True))
        if spacing == "official":
            assert len(visited) == math.ceil(num_timesteps / (num_timesteps // steps))
        else:
            assert len(visited) == len(set(visited)) == steps
            assert visited == sorted(visited, reverse=True)


def test_grids_by_example():
    assert timesteps(1000, 50, "official") == timesteps(1000, 50, "leading") == list(range(981, 0, -20))
    assert timesteps(1000, 7, "official") == [995, 853, 711, 569, 427, 285, 143, 1]
    assert timesteps(1000, 7, "leading") == [853, 711, 569, 427, 285, 143, 1]
    assert timesteps(1000, 4, "trailing") == [999, 749, 499, 249]
    assert timesteps(1000, 4, "linspace") == [999, 666, 333, 0]
    assert next_levels(1000, 4, "trailing") == [749, 499, 249, 0]
    assert next_levels(1000, 999, "official")[:3] == [998, 998, 997]  # 999 is visited twice


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_step_counts_outside_the_schedule_are_refused(steps):
    for make in (timesteps, next_levels):
        with pytest.raises(ValueError, match="give 1 to 1000"):
            make(1000, steps, "official")
    with pytest.raises(ValueError, match="give 1 to 1000"):
        schedule_module.inversion_timesteps(1000, steps)
    with pytest.raises(ValueError, match="choose official"):
        timesteps(1000, 10, "even")


def test_picked_coefficients_promote_half_tensors():
    made, t = Schedule(official_betas()), torch.tensor([3, 999])
    half = latents(0, batch=2, dtype=torch.float16)
    picked = made.pick(made.sqrt_abar, t, half)
    assert picked.shape == (2, 1, 1, 1, 1) and picked.dtype == torch.float32
    assert (picked * half).dtype == torch.float32
    assert made.pick(made.sqrt_abar, t, half.double()).dtype == torch.float64


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_training_target_leads_back_to_x0_and_noise(prediction):
    made = Schedule(official_betas(), prediction=prediction)
    x0, noise, t = latents(1), latents(2), torch.tensor([0, 500, 990])
    x = made.q_sample(x0, t, noise)
    target = made.target(x0, noise, t)
    torch.testing.assert_close(made.to_x0(target, x, t), x0, rtol=0, atol=1e-9)
    for form in ("direct", "recovered"):
        torch.testing.assert_close(made.to_eps(target, x, t, form=form), noise, rtol=0, atol=1e-8)
    with pytest.raises(ValueError, match="direct or recovered"):
        made.eps_from_x0(x0, x, t, form="exact")


def test_at_zero_signal_the_direct_form_is_finite_and_the_recovered_one_is_not():
    made, t = Schedule(official_betas(), prediction="v"), torch.tensor([999])
    x, out = latents(3, batch=1), latents(4, batch=1)
    assert torch.equal(made.to_eps(out, x, t), x)
    assert torch.equal(made.to_x0(out, x, t), -out)
    assert made.to_eps(out, x, t, form="recovered").isnan().all()


def test_posterior_is_the_product_of_gaussians():
    """q(x_{t-1} | x_t, x0) by Bayes' rule from q(x_{t-1} | x0) and q(x_t | x_{t-1}), in precisions."""
    made, t = Schedule(official_betas()), torch.tensor([1, 400, 998])
    x0, xt = latents(5), latents(6)
    beta, abar = made.betas[t].view(-1, 1, 1, 1, 1), made.abar_prev[t].view(-1, 1, 1, 1, 1)
    precision = (1 - beta) / beta + 1 / (1 - abar)
    mean = ((1 - beta).sqrt() / beta * xt + abar.sqrt() / (1 - abar) * x0) / precision
    got_mean, got_variance, got_log = made.q_posterior(x0, xt, t)
    torch.testing.assert_close(got_mean, mean)
    torch.testing.assert_close(got_variance, 1 / precision)
    torch.testing.assert_close(got_log, -precision.log())


def test_model_distribution_has_the_variance_asked_for():
    x, out, t = latents(7), latents(8), torch.tensor([0, 1, 20])
    betas = official_betas()
    small = Schedule(betas, variance="fixed_small").model_distribution(out, x, t)
    large = Schedule(betas, variance="fixed_large").model_distribution(out, x, t)
    assert torch.equal(small.mean, large.mean)
    assert large.variance[1:].flatten().tolist() == betas[t[1:]].tolist()
    assert large.variance[0] == small.variance[1]  # entry 0 borrows the posterior variance at 1
    assert small.variance[0] == 0 and small.log_variance.isfinite().all()
