"""Our solvers against diffusers' schedulers, step by step on one network, and their schedulers on our model.

Noise levels that end before zero signal: there both mean the same. Their tables are float32, ours float64.
"""

import math

import pytest
import torch

from i2vgen import pipeline
from i2vgen.diffusion import solvers
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
