"""Schedules, samplers and losses against the official results, and planted mistakes that must be caught."""

import math
from pathlib import Path

import pytest
import torch

from i2vgen.diffusion import loss, sampler
from i2vgen.diffusion import schedule as schedule_module
from i2vgen.diffusion.schedule import Schedule
from i2vgen.parity import diffusion
from i2vgen.parity.report import Golden, Settings

GOLDENS = Path(__file__).parents[1] / "goldens"
KINDS = {
    "pipeline_schedules": diffusion.schedules,
    "pipeline_ddim": diffusion.ddim,
    "pipeline_forward_loss": diffusion.forward_loss,
}


def rows(kind, dtype=torch.float32):
    return KINDS[kind](Golden(GOLDENS / f"{kind}.safetensors"), Settings(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_parity(kind, dtype):
    seen = list(rows(kind, dtype))
    assert len(seen) > 30
    assert not [row for row in seen if not row.passed]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_half_precision_network_stays_close(dtype):
    assert not [row for row in rows("pipeline_ddim", dtype) if not row.passed]


def test_every_tensor_of_the_loss_golden_is_compared():
    golden = Golden(GOLDENS / "pipeline_forward_loss.safetensors")
    compared = {row.name for row in diffusion.forward_loss(golden, Settings())}
    left = {name for name in golden if "." in name} - compared
    assert left == {"p.t", "ancestral25.draws", "offset_noise.draw1", "offset_noise.draw2"}


# Each mistake is a plausible slip in one line; at least one row of the given kind must fail.


def _table(name, instead):
    return lambda patch: patch.setattr(Schedule, name, property(instead))


def _in(module, name, instead):
    return lambda patch: patch.setattr(module, name, instead(getattr(module, name)))


def _method(name, instead):
    return _in(Schedule, name, instead)


def _ceil_stride(original):
    def timesteps(num_timesteps, steps, spacing):
        stride = math.ceil(num_timesteps / steps)
        return [min(1 + level, num_timesteps - 1) for level in range(0, num_timesteps, stride)][::-1]

    return timesteps


def _stride_up(patch):
    for module in (sampler, schedule_module):
        patch.setattr(module, "timesteps", _ceil_stride(schedule_module.timesteps))


def _half_log_variance(original):
    def model_distribution(self, out, x, t):
        step = original(self, out, x, t)
        return step._replace(log_variance=0.5 * step.log_variance)

    return model_distribution


def _one_step_up(original):
    def inversion_timesteps(num_timesteps, steps):
        visited, levels = original(num_timesteps, steps)
        return [min(t + 1, num_timesteps - 1) for t in visited], levels

    return inversion_timesteps


def _eps_ignores_clamp(original):
    def estimate(predict, x, t, schedule, eps_form, clamp, percentile):
        x0, _ = original(predict, x, t, schedule, eps_form, clamp, percentile)
        return x0, original(predict, x, t, schedule, eps_form, None, None)[1]

    return estimate


DDIM, LOSS, SCHEDULES = "pipeline_ddim", "pipeline_forward_loss", "pipeline_schedules"
MISTAKES = {
    "sqrt forgotten": (DDIM, _table("sqrt_abar", lambda s: s.abar)),
    "sqrt forgotten in noising": (LOSS, _table("sqrt_one_minus_abar", lambda s: 1 - s.abar)),
    "abar index off by one": (DDIM, _in(sampler, "next_levels", lambda f: lambda *a: [n + 1 for n in f(*a)])),
    "abar shifted": (
        DDIM,
        _method("pick", lambda f: lambda s, table, t, x: f(s, table, (t - 1).clamp(0), x)),
    ),
    "eps from the wrong table": (DDIM, _table("sqrt_recip_abar_minus_one", lambda s: s.sqrt_one_minus_abar)),
    "conditions swapped": (DDIM, _in(sampler, "guided", lambda f: lambda c, u, g, **k: f(u, c, g, **k))),
    "guidance counted from c": (
        DDIM,
        _in(sampler, "guided", lambda f: lambda c, u, g, **k: f(c, u, g + 1, **k)),
    ),
    "stride rounded up": (DDIM, _stride_up),
    "stride rounded up, grid": (SCHEDULES, _in(schedule_module, "timesteps", _ceil_stride)),
    "final level 1": (DDIM, _in(sampler, "ddim", lambda f: lambda *a, **k: f(*a, **k, final_alpha="one"))),
    "eta ignored": (DDIM, _in(sampler, "ddim", lambda f: lambda *a, **k: f(*a, **(k | {"eta": 0.0})))),
    "clamp ignored": (DDIM, _in(sampler, "limit_x0", lambda f: lambda x0, **k: x0)),
    "eps ignores the clamp": (DDIM, _in(sampler, "_estimate", _eps_ignores_clamp)),
    "v sign": (DDIM, _method("to_x0", lambda f: lambda s, out, x, t: f(s, -out, x, t))),
    "zero SNR forgotten": (
        SCHEDULES,
        _in(schedule_module, "rescale_zero_terminal_snr", lambda f: lambda b: b),
    ),
    "cosine cap forgotten": (SCHEDULES, _in(schedule_module, "MAX_COSINE_BETA", lambda v: 1.0)),
    "posterior log not clamped": (SCHEDULES, _in(schedule_module, "MIN_POSTERIOR_VARIANCE", lambda v: 0.0)),
    "alpha for beta in the posterior": (LOSS, _table("posterior_mean_xt", lambda s: s.posterior_mean_x0)),
    "direct form only": (
        SCHEDULES,
        _method("eps_from_x0", lambda f: lambda s, x0, x, t, form: f(s, x0, x, t, form="direct")),
    ),
    "v target sign": (LOSS, _method("target", lambda f: lambda s, x0, n, t: -f(s, x0, n, t))),
    "v target with x0 and noise swapped": (
        LOSS,
        _method("target", lambda f: lambda s, x0, n, t: f(s, n, x0, t)),
    ),
    "offset noise per video": (
        LOSS,
        _in(loss, "offset_noise", lambda f: lambda n, o, s: f(n, o[:, :, :1].expand_as(o), s)),
    ),
    "offset strength squared": (LOSS, _in(loss, "offset_noise", lambda f: lambda n, o, s: f(n, o, s * s))),
    "large variance is the small one": (LOSS, _table("large_variance", lambda s: s.posterior_variance)),
    "log variance halved twice": (LOSS, _method("model_distribution", _half_log_variance)),
    "inversion starts at 1": (LOSS, _in(sampler, "inversion_timesteps", _one_step_up)),
    "inversion ends at abar of T - 1": (
        LOSS,
        _table("abar_to_noise", lambda s: torch.cat([s.abar, s.abar[:1]])),
    ),
    "mask ignored": (
        LOSS,
        _in(loss, "training_loss", lambda f: lambda *a, **k: f(*a, **(k | {"mask": None}))),
    ),
    "weight ignored": (
        LOSS,
        _in(loss, "training_loss", lambda f: lambda *a, **k: f(*a, **(k | {"weight": None}))),
    ),
    "diversity forgotten": (LOSS, _in(loss, "_diversity", lambda f: lambda x0: 0.0)),
    "charbonnier without its root": (LOSS, _in(loss, "CHARBONNIER_EPS", lambda v: 1e-3)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistakes_are_caught(mistake, monkeypatch):
    kind, plant = MISTAKES[mistake]
    plant(monkeypatch)
    assert any(not row.passed for row in rows(kind))
