"""Solvers: their order on data with a closed form, DDIM as first order, no signal at the start, noise."""

import itertools
import math

import pytest
import torch

from i2vgen.diffusion.sampler import ddim
from i2vgen.diffusion.schedule import Schedule, make_betas, timesteps
from i2vgen.diffusion.solvers import SOLVERS, dpmpp_2m, dpmpp_2m_sde, euler, heun, plan, unipc

SPACINGS = ("official", "leading", "trailing", "linspace")
TRAILING = {"spacing": "trailing", "final_alpha": "one"}


def released(prediction="v"):
    return Schedule(make_betas(kind="cosine", num_timesteps=1000, zero_terminal_snr=True), prediction)


def even(num_timesteps=6000):
    """Noise levels that are even in lambda, from 3 to -3: errors without the ends that other grids have."""
    abar = torch.sigmoid(2 * torch.linspace(3, -3, num_timesteps, dtype=torch.float64))
    return Schedule(1 - torch.cat([abar[:1], abar[1:] / abar[:-1]]))


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


def exact(made, steps, spacing, variance):
    """What the ODE makes of 1 from the first visited level to the last: it keeps x in its own deviations."""
    start, end = made.abar[timesteps(made.num_timesteps, steps, spacing)[0]].item(), made.abar[0].item()
    return math.sqrt((end * variance + 1 - end) / (start * variance + 1 - start))


def error(solver, made, steps, *, variance=0.25, spacing="linspace", **how):
    one = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
    got = solver(gaussian_network(made, variance), one, made, steps=steps, spacing=spacing, **how)
    return abs(got.item() - exact(made, steps, spacing, variance))


@pytest.mark.parametrize(
    ("solver", "order"),
    [(ddim, 1), (euler, 1), (dpmpp_2m, 2), (unipc, 2), (heun, 2)],
)
def test_errors_fall_with_the_order_of_the_solver(solver, order):
    made = even()
    errors = [error(solver, made, steps) for steps in (31, 61, 121)]
    for coarse, fine in itertools.pairwise(errors):
        assert 0.8 * 2**order < coarse / fine < 2.6 * 2**order


def test_a_solver_of_first_order_fails_the_test_of_the_second():
    made = even()
    coarse, fine = (error(dpmpp_2m, made, steps, order=1) for steps in (31, 61))
    assert coarse / fine < 0.8 * 4


@pytest.mark.parametrize("solver", [dpmpp_2m, unipc, heun], ids=lambda s: s.__name__)
def test_from_no_signal_on_the_released_noise_levels(solver):
    made = released()
    assert made.abar[timesteps(1000, 50, "trailing")[0]] == 0
    assert error(solver, made, 50, spacing="trailing") < 0.2 * error(ddim, made, 50, spacing="trailing")
    assert error(solver, made, 50, spacing="trailing") < 2e-3


@pytest.mark.parametrize("prediction", ["v", "x0"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("final_alpha", ["first", "one"])
def test_the_first_order_is_ddim(prediction, spacing, final_alpha):
    made, x = released(prediction), noise()
    how = {"spacing": spacing, "final_alpha": final_alpha}
    network = gaussian_network(made, 0.25)
    for steps in (1, 2, 9, 20):  # 9: the official grid is cut at 999
        expected = ddim(network, x, made, steps=steps, **how)
        for got in (
            dpmpp_2m(network, x, made, steps=steps, order=1, **how),
            euler(network, x, made, steps=steps, **how),
        ):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
        second = dpmpp_2m(network, x, made, steps=steps, **how)
        assert torch.allclose(second, expected, rtol=0, atol=1e-6) == (steps <= 2)


def test_the_first_order_with_noise_is_ddim_with_eta_1():
    made, x = released(), noise()

    def run(sampler, **how):
        source = torch.Generator().manual_seed(3)
        draw = lambda like: torch.randn(like.shape, generator=source, dtype=like.dtype)  # noqa: E731
        return sampler(gaussian_network(made, 0.25), x, made, steps=20, noise=draw, **how)

    for spacing in SPACINGS[:3]:
        expected = run(ddim, spacing=spacing, eta=1.0)
        got = run(dpmpp_2m_sde, spacing=spacing, order=1)
        # Where DDIM keeps nothing of eps, it takes the root of a difference that rounds to about 1e-17.
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-8)
        assert not torch.allclose(run(dpmpp_2m_sde, spacing=spacing), expected, atol=1e-3)


def variance_of_sde(made, steps, *, variance=0.25, order=2):
    """Exact variance of its results: everything is linear, so the answers to single impulses are enough."""
    draws = steps  # a sample of the batch for x, then one for each draw
    x = torch.zeros(draws + 1, 1, 1, 1, 1, dtype=torch.float64)
    x[0] = 1
    count = iter(range(1, draws + 1))

    def impulse(like):
        z = torch.zeros_like(like)
        z[next(count)] = 1
        return z

    network = gaussian_network(made, variance)
    got = dpmpp_2m_sde(network, x, made, steps=steps, spacing="trailing", order=order, noise=impulse)
    return got.square().sum().item()


def test_the_variance_of_the_solver_with_noise_converges():
    made = released()
    end = made.abar[0].item()
    wanted = end * 0.25 + 1 - end
    errors = [abs(variance_of_sde(made, steps) - wanted) for steps in (25, 50, 100)]
    assert errors[0] > 1.5 * errors[1] > 2.25 * errors[2] and errors[2] < 0.01
    assert errors[2] < 0.5 * abs(variance_of_sde(made, 100, order=1) - wanted)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_step_count_is_finite_from_no_signal(name, spacing):
    betas = make_betas(kind="cosine", num_timesteps=30, zero_terminal_snr=True)
    made, x = Schedule(betas), torch.ones(1, 1, 1, 1, 1)
    for steps in range(1, 31):
        calls, seen = [], []

        def predict(x, t, calls=calls):
            calls.append(int(t[0]))
            return 0.5 * x

        how = {"steps": steps, "spacing": spacing, "noise": torch.zeros_like, "on_step": seen.append}
        for final_alpha in ("first", "one"):
            assert SOLVERS[name](predict, x, made, final_alpha=final_alpha, **how).isfinite().all()
        visited = timesteps(30, steps, spacing)
        assert [info.t for info in seen] == 2 * visited and seen[0].num_steps == len(visited)
        if name != "heun":
            assert calls == 2 * visited


def test_heun_calls_twice_but_for_its_end():
    calls = []

    def predict(x, t):
        calls.append(int(t[0]))
        return 0.5 * x

    heun(predict, noise(), released(), steps=5, **TRAILING)
    assert calls == [999, 799, 799, 599, 599, 399, 399, 199, 199]


@pytest.mark.parametrize("name", SOLVERS)
def test_the_state_stays_in_float32_around_a_half_network(name):
    seen = []
    how = {"steps": 5, "noise": torch.zeros_like, "on_step": seen.append}
    got = SOLVERS[name](lambda x, t: x.half(), noise(dtype=torch.float16), released(), **how)
    assert got.dtype == torch.float32
    assert all(info.x.dtype == info.x0.dtype == torch.float32 for info in seen)


def test_float32_is_near_float64():
    made = released()
    for name, solver in SOLVERS.items():
        how = {"steps": 20, "noise": torch.ones_like, **TRAILING}
        wide = solver(gaussian_network(made, 0.25), noise(), made, **how)
        narrow = solver(gaussian_network(made, 0.25), noise(dtype=torch.float32), made, **how)
        assert (wide - narrow).norm() / wide.norm() < 3e-6, name


def test_noise_is_drawn_once_per_step_that_ends_in_noise():
    draws = []

    def draw(x):
        draws.append(x.shape)
        return torch.zeros_like(x)

    made, x = released(), noise()
    for name in ("dpmpp_2m", "unipc", "euler", "heun"):
        SOLVERS[name](torch.mul, x, made, steps=5, noise=draw)
    assert draws == []
    dpmpp_2m_sde(torch.mul, x, made, steps=5, noise=draw)
    assert len(draws) == 5
    dpmpp_2m_sde(torch.mul, x, made, steps=5, noise=draw, final_alpha="one")
    assert len(draws) == 9
    with pytest.raises(ValueError, match="dpmpp_2m_sde needs `noise`"):
        dpmpp_2m_sde(torch.mul, x, made, steps=5)


def test_final_alpha_one_returns_x0():
    for name, solver in SOLVERS.items():
        seen = []
        end = solver(lambda x, t: 0.5 * x, noise(), released(), steps=5, noise=torch.zeros_like,
                     final_alpha="one", on_step=seen.append)  # fmt: skip
        torch.testing.assert_close(end, seen[-1].x0, msg=name)


def test_the_plan_of_the_released_model():
    steps = plan(released(), 20, "trailing", "one")
    assert steps[0].t == 999 and steps[0].alpha == 0 and steps[0].decay == 0 and steps[0].h == math.inf
    assert steps[0].of_x0() == steps[0].alpha_to and steps[0].of_x() == steps[0].sigma_to
    assert steps[-1].next_t is None and steps[-1].sigma_to == 0 and steps[-1].of_x0() == 1
    assert all(0 < step.h < math.inf for step in steps[1:-1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": 5, "spacing": "even"}, "spacing"),
        ({"steps": 5, "final_alpha": "zero"}, "final_alpha"),
    ],
)
@pytest.mark.parametrize("name", SOLVERS)
def test_impossible_settings_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        SOLVERS[name](lambda x, t: x, noise(), released(), noise=torch.zeros_like, **settings)
    with pytest.raises(ValueError, match="b c f h w"):
        SOLVERS[name](lambda x, t: x, noise()[0], released(), noise=torch.zeros_like, steps=5)


def test_another_order_is_refused():
    for solver in (dpmpp_2m, unipc):
        with pytest.raises(ValueError, match="order is 3; choose 1 or 2"):
            solver(lambda x, t: x, noise(), released(), steps=5, order=3)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_network_that_diverges_is_named_by_step(name):
    with pytest.raises(FloatingPointError, match=r"after step [23] of 5 \(t = [64]01\)$"):
        SOLVERS[name](lambda x, t: x / (t[0] != 401), noise(), released(), steps=5, noise=torch.zeros_like)


# --- timesteps of one's own, the last step, limits


@pytest.mark.parametrize("sampler", [ddim, *SOLVERS.values()], ids=lambda s: s.__name__)
def test_timesteps_of_ones_own_take_the_place_of_a_grid(sampler):
    made, x, how = released(), noise(), {"noise": torch.zeros_like}
    network = gaussian_network(made, 0.25)
    for spacing in ("leading", "trailing", "linspace"):
        expected = sampler(network, x, made, steps=10, spacing=spacing, **how)
        for own in (timesteps(1000, 10, spacing), torch.tensor(timesteps(1000, 10, spacing)).numpy()):
            assert torch.equal(sampler(network, x, made, steps=3, timesteps=own, **how), expected)
    for wrong in ([], [3, 3], [1, 2], [1000, 1], [5, -1], [2.5, 1]):
        with pytest.raises(ValueError, match="give falling whole numbers from 999 to 0"):
            sampler(network, x, made, steps=3, timesteps=wrong, **how)


def test_a_last_step_of_second_order_falls_with_its_order():
    made = even()
    first, second = (
        [error(dpmpp_2m, made, steps, spacing="trailing", last_order=order) for steps in (30, 60)]
        for order in (1, 2)
    )
    assert second[1] != first[1] and 0.8 * 4 < second[0] / second[1] < 2.6 * 4
    for settings in ({"last_order": 3}, {"last_order": 2, "final_alpha": "one"}):
        with pytest.raises(ValueError, match=r"last_order is \d; choose 1, or 2 with final_alpha='first'"):
            dpmpp_2m(torch.mul, noise(), made, steps=5, **settings)


@pytest.mark.parametrize("name", SOLVERS)
def test_x0_can_be_limited(name):
    made, seen, x = released(), [], 9 * noise()
    how = {"steps": 5, "noise": torch.zeros_like, "on_step": seen.append}
    SOLVERS[name](gaussian_network(made, 4.0), x, made, clamp=0.5, **how)
    assert max(info.x0.abs().max().item() for info in seen) == 0.5
    with pytest.raises(ValueError, match="exclude each other"):
        SOLVERS[name](gaussian_network(made, 4.0), x, made, clamp=0.5, percentile=0.9, **how)
