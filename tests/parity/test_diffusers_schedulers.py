"""Our solvers against diffusers' schedulers, step by step on one network, and their schedulers on our model.

Noise levels that end before zero signal: there both mean the same. Their tables are float32, ours float64.
"""

import functools
import math
import re

import numpy as np
import pytest
import torch

from i2vgen import pipeline
from i2vgen.diffusion import solvers
from i2vgen.diffusion.sampler import ancestral, ddim
from i2vgen.diffusion.schedule import Schedule, make_betas
from i2vgen.diffusion.schedulers import from_diffusers
from i2vgen.settings import config

pytestmark = pytest.mark.reference
CLOSE = 2e-5  # relative, of float32 tables


@pytest.fixture(scope="module")
def made():
    betas = make_betas(
        kind="linear_sd", num_timesteps=1000, zero_terminal_snr=False, init_beta=0.00085, last_beta=0.012
    )
    return Schedule(betas)


def network(made):
    """A nonlinear network, so that no solver is right by chance."""

    def predict(x, t):
        abar = made.abar[t.long()].view(-1, 1, 1, 1, 1).to(x.dtype)
        return torch.tanh(1.3 * x * abar + 0.2) * abar.sqrt() - 0.7 * (1 - abar).sqrt() * torch.sin(x)

    return predict


def start():
    return torch.randn(2, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def arguments(made):
    return {
        "trained_betas": made.betas.numpy(),
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
    }


def relative(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


def theirs(made, name):
    import diffusers

    kind, extra = {
        "dpmpp_2m": ("DPMSolverMultistepScheduler", {"final_sigmas_type": "zero"}),
        "unipc": ("UniPCMultistepScheduler", {"solver_type": "bh2", "final_sigmas_type": "zero"}),
        "euler": ("EulerDiscreteScheduler", {}),
        "heun": ("HeunDiscreteScheduler", {}),
    }[name]
    return getattr(diffusers, kind)(**arguments(made), **extra)


@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc", "euler", "heun"])
@pytest.mark.parametrize("steps", [7, 25])
def test_deterministic_solvers_match(made, name, steps):
    predict, x = network(made), start()
    ours = solvers.SOLVERS[name](predict, x, made, steps=steps, spacing="trailing", final_alpha="one")
    scheduler = theirs(made, name)
    scheduler.set_timesteps(steps)
    x = x / (made.abar[999].sqrt() if name in ("euler", "heun") else 1)  # these two keep x / alpha
    got = loop(scheduler, predict, x)
    assert relative(got, ours) < CLOSE
    for other in {"dpmpp_2m", "unipc", "euler", "heun"} - {
        name
    }:  # the planted mistake: the solvers differ from each other
        wrong = solvers.SOLVERS[other](
            predict, start(), made, steps=steps, spacing="trailing", final_alpha="one"
        )
        assert relative(got, wrong) > 10 * CLOSE


def loop(scheduler, predict, x, **extra):
    for t in scheduler.timesteps:
        out = predict(scheduler.scale_model_input(x, t), torch.full((len(x),), int(t)))
        x = scheduler.step(out, t, x, **extra).prev_sample
    return x


def test_the_solver_with_noise_matches(made):
    import diffusers

    draws = [
        torch.randn(start().shape, generator=torch.Generator().manual_seed(n)).double() for n in range(9)
    ]
    ours = iter(draws)
    got = solvers.dpmpp_2m_sde(
        network(made),
        start(),
        made,
        steps=9,
        spacing="trailing",
        final_alpha="one",
        noise=lambda x: next(ours),
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **arguments(made), algorithm_type="sde-dpmsolver++", final_sigmas_type="zero"
    )
    scheduler.set_timesteps(9)
    x, predict = start(), network(made)
    for t, z in zip(scheduler.timesteps, draws, strict=True):
        x = scheduler.step(predict(x, torch.full((2,), int(t))), t, x, variance_noise=z).prev_sample
    assert relative(got, x) < CLOSE


# --- their schedulers as our samplers


@pytest.mark.parametrize("name", ["dpmpp_2m", "euler"])
def test_their_scheduler_as_our_sampler(made, name):
    seen = []
    got = from_diffusers(theirs(made, name))(
        network(made), start(), made, steps=10, noise=None, on_step=seen.append
    )
    ours = solvers.SOLVERS[name](
        network(made), start(), made, steps=10, spacing="trailing", final_alpha="one"
    )
    # Their Euler starts from pure noise times sigma / alpha, without the small signal left at 999.
    assert relative(got, ours) < (CLOSE if name == "dpmpp_2m" else 0.05)
    assert [info.t for info in seen] == list(range(999, 0, -100)) and seen[0].num_steps == 10


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "EulerAncestralDiscreteScheduler"])
def test_a_scheduler_drives_the_whole_model_from_no_signal(name, road, picture):
    import diffusers

    scheduler = getattr(diffusers, name)(**arguments(road.schedule), rescale_betas_zero_snr=True)

    def clips(seeds):
        sampler = from_diffusers(scheduler)
        made = road.generate([picture] * len(seeds), ["a star"] * len(seeds), seeds, sampler=sampler)
        return [clip.frames for clip in made]

    both = clips([1, 2])
    assert (both[1] == clips([2])[0]).all()  # noise follows the seed, not the batch
    assert (both[0] != both[1]).any()
    own = pipeline.generate(road, [picture], ["a star"], [1])[0].numpy()
    assert (both[0] != own).any()


def test_a_scheduler_of_other_noise_levels_is_refused(made):
    import diffusers

    settings = arguments(made)
    run = lambda scheduler: from_diffusers(scheduler)(network(made), start(), made, steps=5)  # noqa: E731
    with pytest.raises(ValueError, match="prediction_type is epsilon, the network predicts v"):
        run(diffusers.DDIMScheduler(**settings | {"prediction_type": "epsilon"}))
    with pytest.raises(ValueError, match="trained_betas="):
        run(diffusers.DDIMScheduler(**settings | {"trained_betas": None}))
    released = pipeline.make_schedule(config.Config())
    scheduler = diffusers.UniPCMultistepScheduler(**arguments(released))
    with pytest.raises(ValueError, match="rescale_betas_zero_snr=True"):
        from_diffusers(scheduler)(network(released), start(), released, steps=5)
    assert math.isfinite(run(diffusers.DDIMScheduler(**settings, clip_sample=False)).sum())


KINDS = ["FlowMatchEulerDiscrete", "EDMEuler", "IPNDM", "ScoreSdeVe", "CMStochasticIterative"]


@pytest.mark.parametrize("name", KINDS)
def test_schedulers_for_networks_of_other_kinds_are_refused(name):
    import diffusers

    with pytest.raises(ValueError, match=f"{name}Scheduler has no .*: it is no scheduler of diffusers for"):
        from_diffusers(getattr(diffusers, f"{name}Scheduler")())


def test_what_is_no_scheduler_is_refused():
    import diffusers

    with pytest.raises(ValueError, match="DDIMScheduler is a class; give an object of it"):
        from_diffusers(diffusers.DDIMScheduler)
    with pytest.raises(ValueError, match="str has no config: it is no scheduler of diffusers"):
        from_diffusers("ddim")


def test_noise_levels_of_flow_matching_are_refused(made):
    import diffusers

    scheduler = diffusers.UniPCMultistepScheduler(**arguments(made), use_flow_sigmas=True)
    with pytest.raises(ValueError, match="use_flow_sigmas=False"):
        from_diffusers(scheduler)(network(made), start(), made, steps=5)


@pytest.mark.parametrize("limit", ["clip_sample", "thresholding"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
def test_a_scheduler_that_limits_x0_is_refused_by_the_options_name(made, name, limit):
    import diffusers

    other = {"clip_sample": False, "thresholding": False} | {limit: True}
    scheduler = getattr(diffusers, name)(**arguments(made), **other)
    with pytest.raises(ValueError, match=f"{limit}=True.*make it with {limit}=False"):
        from_diffusers(scheduler)(network(made), start(), made, steps=5)
    if limit == "clip_sample":  # their default
        scheduler = getattr(diffusers, name)(**arguments(made))
        with pytest.raises(ValueError, match="clip_sample=True"):
            from_diffusers(scheduler)(network(made), start(), made, steps=5)


@pytest.mark.parametrize(
    "name",
    ["EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete",
     "DEISMultistep", "LMSDiscrete", "PNDM", "UniPCMultistep", "DPMSolverMultistep", "SASolver"],
)  # fmt: skip
def test_the_advice_for_a_start_without_signal_works_when_followed(name):
    import diffusers

    released = pipeline.make_schedule(config.Config())
    kind, settings = getattr(diffusers, f"{name}Scheduler"), arguments(released)

    def run(**changed):
        x = start().float()
        draw = lambda x: torch.zeros_like(x)  # noqa: E731
        sampler = from_diffusers(kind(**settings | changed))
        return sampler(network(released), x, released, steps=6, noise=draw)

    with pytest.raises((ValueError, FloatingPointError), match="divides by the signal") as refusal:
        run()
    said = str(refusal.value).rpartition("make it with")[2]
    options = {n: {"True": True, "1": 1}.get(v, v.strip("'")) for n, v in re.findall(r"(\w+)=([\w']+)", said)}
    assert options and run(**options).isfinite().all()


def test_schedulers_that_cannot_sample_are_refused(made):
    import diffusers

    run = lambda scheduler: from_diffusers(scheduler)(network(made), start(), made, steps=5)  # noqa: E731
    with pytest.raises(ValueError, match="DDIMInverseScheduler goes from latents to noise"):
        run(diffusers.DDIMInverseScheduler(**arguments(made), clip_sample=False))
    with pytest.raises(ValueError, match="steps of another kind"):
        run(diffusers.CogVideoXDPMScheduler(**arguments(made), snr_shift_scale=1.0, clip_sample=False))
    released = pipeline.make_schedule(config.Config())
    scheduler = diffusers.DPMSolverSinglestepScheduler(
        trained_betas=released.betas.numpy(), prediction_type="v_prediction"
    )
    with pytest.raises(ValueError, match="such as UniPCMultistepScheduler"):
        from_diffusers(scheduler)(network(released), start(), released, steps=5)


# --- options that others have too


@pytest.mark.parametrize("steps", [7, 25])
def test_a_last_step_of_second_order_matches(made, steps):
    import diffusers

    predict, x = network(made), start()
    run = functools.partial(solvers.dpmpp_2m, predict, x, made, steps=steps, spacing="trailing")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **arguments(made), final_sigmas_type="sigma_min", lower_order_final=False
    )
    scheduler.set_timesteps(steps)
    got = loop(scheduler, predict, x)
    assert relative(got, run(last_order=2)) < CLOSE
    assert relative(got, run()) > 10 * CLOSE  # the planted mistake


@pytest.mark.parametrize("final_alpha", ["first", "one"])
def test_timesteps_of_ones_own_match(made, final_alpha):
    import diffusers

    own, predict, x = [987, 640, 601, 333, 20, 3], network(made), start()
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **arguments(made), final_sigmas_type={"first": "sigma_min", "one": "zero"}[final_alpha]
    )
    scheduler.set_timesteps(timesteps=own)
    got = solvers.dpmpp_2m(predict, x, made, steps=50, timesteps=own, final_alpha=final_alpha)
    assert relative(got, loop(scheduler, predict, x)) < CLOSE


@pytest.mark.parametrize("limit", [{"clamp": 1.0}, {"percentile": 0.9}], ids=["clamp", "percentile"])
def test_a_limit_on_x0_matches(made, limit):
    import diffusers

    predict, x = network(made), 3 * start()
    dynamic = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1e9}
    theirs = {"clip_sample": "clamp" in limit} | (dynamic if "percentile" in limit else {})
    scheduler = diffusers.DDIMScheduler(**arguments(made), **theirs)
    scheduler.set_timesteps(9)
    expected = scheduler.step(predict(x, torch.full((2,), 999)), 999, x).pred_original_sample
    assert relative(expected, made.to_x0(predict(x, torch.full((2,), 999)), x, torch.full((2,), 999))) > 0.01
    for sampler in (ddim, solvers.dpmpp_2m, solvers.unipc, solvers.euler, solvers.heun):
        seen = []
        sampler(predict, x, made, steps=9, spacing="trailing", on_step=seen.append, **limit)
        assert relative(seen[0].x0, expected) < CLOSE
        assert all(info.x0.abs().max() <= 1 for info in seen)


# --- k-diffusion, where it is installed


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("steps", [6, 25])
def test_k_diffusions_own_code_matches(made, name, steps):
    """It keeps x / alpha over sigma / alpha, and ends without noise; in float64 only rounding differs."""
    sampling = pytest.importorskip("k_diffusion").sampling
    x, visited = start(), list(range(999, 0, -(1000 // steps)))
    sigmas = (made.sqrt_one_minus_abar / made.sqrt_abar)[visited]
    of_sigma = dict(zip(sigmas.tolist(), visited, strict=True))
    estimate = solvers.x0_of(network(made), made)

    def denoised(x, sigma):
        t = of_sigma[sigma[0].item()]
        return estimate(made.sqrt_abar[t] * x, t)

    theirs = getattr(sampling, f"sample_{name}")
    expected = theirs(denoised, x / made.sqrt_abar[999], sampling.append_zero(sigmas), disable=True)
    run = functools.partial(solvers.SOLVERS[name], network(made), x, made, steps=1, final_alpha="one")
    assert relative(run(timesteps=visited), expected) < 1e-8
    assert relative(run(timesteps=[t - 1 for t in visited]), expected) > 1e-5  # the planted mistake


# --- the numbers that diffusers' own tests of its schedulers expect
#
# Their samples are 4 x 3 x 8 x 8 numbers that rise evenly from 0 to 1 (noise: that fall), the axes in the
# order 3, 8, 8, 4; their network is x t / (t + 1); the betas rise evenly from 0.0001 to 0.02.

NUMBERS = 4 * 3 * 8 * 8


def even(prediction="eps", *, first=0.0001, num_timesteps=1000):
    betas = make_betas(kind="linear", num_timesteps=num_timesteps, zero_terminal_snr=False,
                       init_beta=first, last_beta=0.02)  # fmt: skip
    return Schedule(betas, prediction)


def rising(*, falling=False):
    numbers = torch.arange(NUMBERS, dtype=torch.float32) / NUMBERS
    numbers = numbers.flip(0) if falling else numbers
    return numbers.view(3, 1, 8, 8, 4).permute(4, 0, 1, 2, 3)


def simple(x, t):
    t = t.view(-1, 1, 1, 1, 1).to(x.dtype)
    return x * t / (t + 1)


def noised(made, t):
    return made.q_sample(rising(), torch.full((4,), t), rising(falling=True))


TENS = list(range(900, -1, -100))
LINSPACE = [999, 899, 799, 699, 599, 500, 400, 300, 200, 100]
second_order = functools.partial(solvers.dpmpp_2m, last_order=2)
ddim_one = functools.partial(ddim, final_alpha="one", clamp=1.0)
PUBLISHED = {
    "DDIM": (ddim_one, even(), TENS, None, 172.0067),
    "DDIM, v": (ddim_one, even("v"), TENS, None, 52.5302),
    "DDIM, final alpha one": (ddim_one, even(first=0.01), TENS, None, 149.8295),
    "DDIM, first": (functools.partial(ddim, clamp=1.0), even(first=0.01), TENS, None, 149.0784),
    "DDIM, with noise": (ddim_one, even(), TENS[8:], 100, 354.5418),
    "UniPC": (solvers.unipc, even(), LINSPACE, None, 0.2464 * NUMBERS),
    "UniPC, v": (solvers.unipc, even("v"), LINSPACE, None, 0.1014 * NUMBERS),
    "UniPC, with noise": (solvers.unipc, even(), LINSPACE[8:], 200, 315.5757),
    "DPM++ 2M": (second_order, even(), LINSPACE, None, 0.3301 * NUMBERS),
    "DPM++ 2M, v": (second_order, even("v"), LINSPACE, None, 0.2251 * NUMBERS),
    "DPM++ 2M, with noise": (second_order, even(), LINSPACE[5:], 500, 318.4111),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_expectations(name):
    sampler, made, visited, noisy, expected = PUBLISHED[name]
    x = rising() if noisy is None else noised(made, noisy)
    got = sampler(simple, x, made, steps=10, timesteps=visited).abs().sum().item()
    digits = 1e-2 if expected % 0.0001 < 1e-9 else 5e-5 * NUMBERS  # of a sum, or of a mean
    assert abs(got - expected) < digits
    shifted = [t - 1 for t in visited if t > 0]  # the planted mistake
    wrong = sampler(simple, x, made, steps=10, timesteps=shifted).abs().sum().item()
    assert abs(wrong - expected) > digits


@pytest.mark.parametrize(("prediction", "expected"), [("eps", 258.9606), ("v", 202.0296)])
def test_published_expectations_of_ancestral_sampling(prediction, expected):
    def run(**limit):
        generator = torch.Generator().manual_seed(0)
        draw = lambda x: torch.randn(4, 3, 8, 8, generator=generator)[:, :, None]  # noqa: E731
        return ancestral(simple, rising(), even(prediction), noise=draw, **limit).abs().sum().item()

    assert abs(run(clamp=1.0) - expected) < 1e-2
    assert abs(run(clamp=0.9) - expected) > 1e-2


def test_published_expectation_of_euler():
    """They visit the levels between timesteps, and scale the state itself before every step."""
    made = even(num_timesteps=1100)
    table = ((1 - made.abar) / made.abar).sqrt().numpy()
    visited = np.linspace(0, 1099, 10)[::-1]
    sigmas = [*np.interp(visited, np.arange(1100), table).tolist(), 0.0]
    x = sigmas[0] * rising()
    for t, sigma, after in zip(visited, sigmas, sigmas[1:], strict=False):
        x = x / math.sqrt(sigma**2 + 1)
        x0_of = lambda x, _, t=t, sigma=sigma: x - sigma * simple(x, torch.full((4,), t))  # noqa: E731
        step = solvers.Step(0, 1.0, sigma, 1.0, after, None)
        ((x, _),) = solvers.over_sigma(x0_of, x, [step], twice=False)
    assert abs(x.abs().sum().item() - 10.0807) < 1e-2
