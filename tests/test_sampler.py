"""Samplers: closed forms, call counts, noise, finiteness and messages."""

import math

import pytest
import torch

from i2vgen.diffusion.sampler import ancestral, ddim, ddim_invert, guided, limit_x0
from i2vgen.diffusion.schedule import Schedule, make_betas, timesteps

SPACINGS = ("official", "leading", "trailing", "linspace")


def schedule(prediction="v", *, num_timesteps=1000, zero_terminal_snr=True, variance="fixed_small"):
    kind = "cosine" if zero_terminal_snr else "linear"
    betas = make_betas(kind=kind, num_timesteps=num_timesteps, zero_terminal_snr=zero_terminal_snr)
    return Schedule(betas, prediction=prediction, variance=variance)


def noise(seed=0, *, batch=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, 2, 3, 4, generator=generator, dtype=torch.float64).to(dtype)


def gaussian_network(made, variance):
    """The perfect network for data ~ N(0, variance): the expected target given x, which is linear in x."""

    def predict(x, t):
        abar = made.abar[t].view(-1, 1, 1, 1, 1).to(x.dtype)
        total = abar * variance + 1 - abar
        x0, eps = abar.sqrt() * variance / total * x, (1 - abar).sqrt() / total * x
        return {"v": abar.sqrt() * eps - (1 - abar).sqrt() * x0, "eps": eps, "x0": x0}[made.prediction]

    return predict


def linear_steps(made, visited, levels, variance, *, last_abar=None):
    """What DDIM multiplies x by on Gaussian data: the product of its steps."""
    product = 1.0
    for index, (t, level) in enumerate(zip(visited, levels, strict=True)):
        abar, to = made.abar[t].item(), made.abar[level].item()
        if last_abar is not None and index == len(visited) - 1:
            to = last_abar
        total = abar * variance + 1 - abar
        product *= (math.sqrt(to * abar) * variance + math.sqrt((1 - to) * (1 - abar))) / total
    return product


@pytest.mark.parametrize("prediction", ["v", "eps", "x0"])
@pytest.mark.parametrize("final_alpha", ["first", "one"])
def test_on_gaussian_data_ddim_is_the_product_of_its_linear_steps(prediction, final_alpha):
    made, x = schedule(prediction), noise()
    visited = list(range(951, 0, -50))
    levels = [max(t - 50, 0) for t in visited]
    last_abar = 1.0 if final_alpha == "one" else None
    expected = x * linear_steps(made, visited, levels, 0.25, last_abar=last_abar)
    for eps_form in ("direct", "recovered"):
        got = ddim(
            gaussian_network(made, 0.25), x, made, steps=20, eps_form=eps_form, final_alpha=final_alpha
        )
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_many_steps_reach_the_variance_of_the_data():
    made, x = schedule(), noise()
    got = ddim(gaussian_network(made, 0.25), x, made, steps=1000, spacing="trailing", final_alpha="one")
    torch.testing.assert_close(got, 0.5 * x, rtol=2e-2, atol=0)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_on_gaussian_data_ddim_with_noise_keeps_the_variance(eta):
    made = schedule()
    x = torch.randn(1, 4, 10, 50, 50, generator=torch.Generator().manual_seed(0))
    source = torch.Generator().manual_seed(1)

    def draw(like):
        return torch.randn(like.shape, generator=source)

    got = ddim(gaussian_network(made, 0.25), x, made, steps=100, spacing="trailing", eta=eta, noise=draw)
    assert got.std().item() == pytest.approx(0.5, rel=0.04)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_on_gaussian_data_ancestral_sampling_reaches_the_variance_of_the_data(variance):
    made = schedule(num_timesteps=200, variance=variance)
    source = torch.Generator().manual_seed(1)
    x = torch.randn(1, 4, 10, 50, 50, generator=source)
    draws = []

    def draw(like):
        draws.append(None)
        return torch.randn(like.shape, generator=source)

    got = ancestral(gaussian_network(made, 0.25), x, made, noise=draw)
    assert got.std().item() == pytest.approx(0.5, rel=0.04)
    assert len(draws) == 199  # none at t = 0


@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_step_count_is_finite_by_default(spacing):
    """Grids repeat (only T // n matters to the official one), so each different grid is run once."""
    made, x = schedule(num_timesteps=60), torch.ones(1, 1, 1, 1, 1)
    for steps in range(1, 61):
        calls = []

        def predict(x, t, calls=calls):
            calls.append(int(t[0]))
            return 0.5 * x

        got = ddim(predict, x, made, steps=steps, spacing=spacing)
        assert got.isfinite().all()
        assert calls == timesteps(60, steps, spacing)
        assert spacing == "official" or len(calls) == steps


def test_eta_one_is_finite_from_zero_signal():
    made, x = schedule(), noise(dtype=torch.float32)
    got = ddim(lambda x, t: 0.5 * x, x, made, steps=9, eta=1.0, noise=torch.zeros_like)
    assert got.isfinite().all()


def test_the_official_form_is_nan_where_999_is_visited_and_says_so():
    made, x = schedule(), noise()
    predict = gaussian_network(made, 1.0)
    with pytest.raises(FloatingPointError, match=r"step 1 of 10 \(t = 999\).*eps_form='direct'"):
        ddim(predict, x, made, steps=9, eps_form="recovered")
    got = ddim(predict, x, made, steps=9, eps_form="recovered", check_finite=False)
    assert got.isnan().all()
    assert ddim(predict, x, made, steps=9).isfinite().all()


def test_a_network_that_diverges_is_named_by_step():
    made, x = schedule(), noise()
    with pytest.raises(FloatingPointError, match=r"after step 3 of 5 \(t = 401\)$"):
        ddim(lambda x, t: x / (t[0] != 401), x, made, steps=5)


@pytest.mark.parametrize("steps", [20, 50])
def test_inversion_then_sampling_comes_back(steps):
    made = schedule()
    predict = gaussian_network(made, 0.8)
    x0 = noise(3) * math.sqrt(0.8)
    back = ddim(predict, ddim_invert(predict, x0, made, steps=steps), made, steps=steps)
    assert (back - x0).norm() / x0.norm() < 3.0 / steps  # the two grids are not mirrored: first order


def test_inversion_ends_on_pure_eps():
    made, seen = schedule(), []
    end = ddim_invert(lambda x, t: torch.zeros_like(x), noise(), made, steps=9, on_step=seen.append)
    assert [info.t for info in seen] == list(range(0, 1000, 111))
    assert torch.equal(end, seen[-2].x)  # at t = 999 and v = 0, eps is x itself


def test_guidance_of_one_is_one_pass_and_order_is_conditional_first():
    made, x, calls = schedule(), noise(), []

    def cond(x, t):
        calls.append("cond")
        return 0.5 * x

    def uncond(x, t):
        calls.append("uncond")
        return 0.25 * x

    assert guided(cond, uncond, 1.0) is cond
    ddim(guided(cond, uncond, 1.0), x, made, steps=5)
    assert calls == ["cond"] * 5
    calls.clear()
    out = guided(cond, uncond, 9.0)(x, torch.tensor([3]))
    assert calls == ["cond", "uncond"]
    torch.testing.assert_close(out, (0.25 + 9 * 0.25) * x)
    assert torch.equal(guided(cond, uncond, 0.0)(x, torch.tensor([3])), 0.25 * x)


def test_guidance_precision():
    x = noise(dtype=torch.float32)
    cond, uncond = (lambda x, t: (0.5 * x).half()), (lambda x, t: (0.3 * x).half())
    assert guided(cond, uncond, 9.0, precision="network")(x, None).dtype == torch.float16
    assert guided(cond, uncond, 9.0)(x, None).dtype == torch.float32
    wide = guided(lambda x, t: x.double(), lambda x, t: x.double(), 9.0)
    assert wide(x, None).dtype == torch.float64


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_guidance_that_is_no_number_is_refused(scale):
    with pytest.raises(ValueError, match="guidance scale"):
        guided(torch.add, torch.add, scale)


def test_the_state_stays_in_float32_around_a_half_network():
    seen = []
    got = ddim(lambda x, t: x.half(), noise(dtype=torch.float16), schedule(), steps=5, on_step=seen.append)
    assert got.dtype == torch.float32
    assert all(info.x.dtype == info.x0.dtype == torch.float32 for info in seen)


def test_noise_is_drawn_only_when_eta_asks_for_it():
    draws = []

    def draw(x):
        draws.append(x.shape)
        return torch.zeros_like(x)

    made, x = schedule(), noise()
    ddim(torch.mul, x, made, steps=5, noise=draw)
    assert draws == []
    ddim(torch.mul, x, made, steps=5, eta=0.1, noise=draw)
    assert draws == [x.shape] * 5
    with pytest.raises(ValueError, match="no `noise` was given"):
        ddim(torch.mul, x, made, steps=5, eta=0.1)


def test_on_step_hears_of_every_step():
    seen = []
    end = ddim(lambda x, t: 0.5 * x, noise(), schedule(), steps=5, on_step=seen.append)
    assert [(info.index, info.num_steps, info.t) for info in seen] == [
        (index, 5, t) for index, t in enumerate((801, 601, 401, 201, 1))
    ]
    assert torch.equal(seen[-1].x, end)


def test_final_alpha_one_returns_x0():
    seen = []
    end = ddim(lambda x, t: 0.5 * x, noise(), schedule(), steps=5, final_alpha="one", on_step=seen.append)
    assert torch.equal(end, seen[-1].x0)


@pytest.mark.parametrize("limit", [{"percentile": 0.9}, {"clamp": 0.8}])
def test_a_batch_is_limited_like_its_samples_alone(limit):
    made, x = schedule(), noise(batch=2, dtype=torch.float32) * torch.tensor([1.0, 3.0]).view(2, 1, 1, 1, 1)
    predict = gaussian_network(made, 2.0)
    both = ddim(predict, x, made, steps=5, **limit)
    alone = torch.cat([ddim(predict, sample[None], made, steps=5, **limit) for sample in x])
    torch.testing.assert_close(both, alone, rtol=0, atol=1e-6)
    unlimited = ddim(predict, x, made, steps=5)
    assert not torch.allclose(both, unlimited, atol=1e-2)


def test_limits_of_x0():
    x0 = torch.linspace(-4, 4, 101, dtype=torch.float64).view(1, 1, 1, 1, 101)
    assert torch.equal(limit_x0(x0), x0)
    assert limit_x0(x0, clamp=1.5).abs().max() == 1.5
    assert limit_x0(x0, percentile=0.5).abs().max() == 1  # s = 2: clipped to [-2, 2], divided by 2
    assert torch.equal(limit_x0(x0 / 8, percentile=0.5), x0 / 8)  # s is at least 1
    for bad in ({"clamp": 0.0}, {"percentile": 0.0}, {"percentile": 1.1}, {"clamp": 1.0, "percentile": 0.5}):
        with pytest.raises(ValueError, match=r"clamp|percentile"):
            limit_x0(x0, **bad)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": 1001}, "give 1 to 1000"),
        ({"steps": 5, "spacing": "even"}, "spacing"),
        ({"steps": 5, "eta": 1.5, "noise": torch.zeros_like}, "eta is 1.5"),
        ({"steps": 5, "eta": math.nan, "noise": torch.zeros_like}, "eta is nan"),
        ({"steps": 5, "final_alpha": "zero"}, "final_alpha"),
        ({"steps": 5, "eps_form": "exact"}, "eps form"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ddim(lambda x, t: x, noise(), schedule(), **settings)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="b c f h w"):
        ddim(lambda x, t: x, noise()[0], schedule(), steps=5)
    with pytest.raises(ValueError, match="network returned"):
        ddim(lambda x, t: torch.cat([x, x], dim=1), noise(), schedule(), steps=5)
