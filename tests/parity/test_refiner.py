"""The preview cascade against the official results, and planted mistakes that must be caught."""

import dataclasses
import itertools
import math
from functools import partial
from pathlib import Path

import pytest
import torch

from i2vgen.fast import savings
from i2vgen.model import layers, spatial, unet
from i2vgen.parity import refiner, refiner_flow
from i2vgen.parity.kinds import KINDS
from i2vgen.parity.report import Golden, Settings
from i2vgen.refiner import sampler
from i2vgen.settings import config

GOLDENS = Path(__file__).parents[1] / "goldens"
FILES = {
    "refiner_unet_tiny": 24,
    "i2v_v1_tiny": 14,
    "refiner_schedule": 60,
    "refiner_sampling": 54,
    "refiner_e2e_tiny": 6,
    "refiner_prepost": 21,
}


def rows(name, dtype=torch.float64, gradients=True):
    held = Golden(GOLDENS / f"{name}.safetensors")
    if not gradients:
        held.names = [name for name in held if not name.startswith("grad.")]
    return KINDS[held.kind](held, Settings(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", FILES)
def test_parity(name, dtype):
    seen = list(rows(name, dtype))
    assert len(seen) >= FILES[name]
    assert not [row for row in seen if not row.passed]


def test_a_run_without_known_settings_is_refused(monkeypatch):
    monkeypatch.setattr(refiner_flow, "RUNS", {})
    with pytest.raises(ValueError, match="the settings of its run"):
        list(rows("refiner_sampling"))


# Each mistake is a plausible slip in one line; a row whose name has the given prefix must fail.


def _set(module, name, value):
    return lambda patch: patch.setattr(module, name, value)


def _use(**changed):
    return _set(config, "REFINER_USE", dataclasses.replace(config.REFINER_USE, **changed))


def _v1_use(**changed):
    return _set(config, "V1_USE", dataclasses.replace(config.V1_USE, **changed))


def _run(tag, **changed):
    right = refiner_flow.RUNS
    return _set(refiner_flow, "RUNS", {**right, tag: dataclasses.replace(right[tag], **changed)})


def _enlarged(change):
    """The refiners' upsampling with different border rows."""

    def forward(self, x):
        return layers.per_frame(self.conv, change(spatial.nearest_twice(x)))

    return _set(spatial.Upsample, "forward", forward)


def _filters(*gains):
    return _set(unet, "SKIP_FILTERS", {"none": (), "sr600": gains})


def _symmetric(x, gain):
    spectrum = torch.fft.fft2(x, dim=(-3, -2))
    spectrum[..., 0, 0, :] *= gain
    return torch.fft.ifft2(spectrum, dim=(-3, -2)).real


def _brought_to_the_negative(patch):
    """Rescale to the unconditional prediction's standard deviation."""

    def guided_pair(both, scale, *, rescale):
        def predict(x, t):
            c, u = both(x, t).chunk(2)
            out = u + scale * (c - u)
            ratio = u.flatten(1).std(1) / out.flatten(1).std(1)
            return out * (rescale * ratio + 1 - rescale).view(-1, 1, 1, 1, 1)

        return predict

    patch.setattr(refiner_flow, "guided_pair", guided_pair)


def _start(form):
    right = sampler.refine
    return _set(refiner_flow, "refine", lambda *a, start, **named: right(*a, start=form, **named))


def _grid(form):
    right = sampler.make_grid
    return _set(refiner_flow, "make_grid", lambda *a, form=form, **n: right(*a, form="clean", **n))


def _inverted_on_the_samplers_table(patch):
    betas = sampler.refiner_levels().schedule().betas
    patch.setattr(refiner_flow, "cosine_betas", lambda: betas)


UNET, V1, SAMPLING = "refiner_unet_tiny", "i2v_v1_tiny", "refiner_sampling"
MISTAKES = {
    "no filter": (UNET, "out.sr600", _filters((1.0, 1.0), (1.0, 1.0))),
    "filters swapped": (UNET, "out.sr600", _filters((1.2, 0.4), (1.1, 0.6))),
    "rows cut below only": (UNET, "out.vid2vid", _enlarged(lambda y: y[..., 2:, :, :])),
    "symmetric filter": ("refiner_prepost", "freeu", _set(refiner_flow, "damp_lowest", _symmetric)),
    "v1 with the refiners' rows": (V1, "out.v1", _v1_use(resampling="margin")),
    "v1 on the released schedule": (V1, "ddim", _set(refiner, "v1_betas", refiner_flow.cosine_betas)),
    "clean start": (SAMPLING, "ms_fast.", _start("clean")),
    "clean grid": (SAMPLING, "g1.", _grid("clean")),
    "heun as midpoint": (SAMPLING, "solver_heun_type.", _run("solver_heun_type", correction="midpoint")),
    "no rescale": (SAMPLING, "ms_fast.", _run("ms_fast", rescale=0.0)),
    "eta 0": (SAMPLING, "ms_fast.out", _run("ms_fast", eta=0.0)),
    "brought to the negative": (SAMPLING, "ms_heun.", _brought_to_the_negative),
    "another level": (SAMPLING, "vgen.", _run("vgen", total=600)),
    "one table for both": (SAMPLING, "vgen.inverted", _inverted_on_the_samplers_table),
    "one table for both, latents": ("refiner_e2e_tiny", "vgen.", _inverted_on_the_samplers_table),
    "shift of one end": (
        "refiner_schedule",
        "schedule.interp_sigma",
        _set(refiner_flow, "refiner_levels", partial(sampler.refiner_levels, shift=(4.0, 4.0))),
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistakes_are_caught(mistake, monkeypatch):
    name, row, plant = MISTAKES[mistake]
    plant(monkeypatch)
    assert any(seen.name.startswith(row) and not seen.passed for seen in rows(name, gradients=False))


def test_a_file_without_gradients_is_read_too():
    """Such a file holds no weights of the gradient's loss, `in.R`, either."""
    held = Golden(GOLDENS / f"{UNET}.safetensors")
    held.names = [name for name in held if not name.startswith(("grad.", "in.R"))]
    assert len(held.names) < len(Golden(held.path).names) - 1
    seen = list(KINDS[held.kind](held, Settings(torch.float64)))
    assert all(row.passed for row in seen) and {"out.vid2vid", "out.sr600"} <= {row.name for row in seen}


# --- properties beyond the goldens


def test_the_margin_meets_itself_at_every_height():
    released = config.UNet()
    for rows_ in range(1, 130):
        down = [rows_]
        for _ in range(3):
            down.append((down[-1] + 1) // 2 + 1)  # stride 2, padding 2
        up = down[-1]
        fits = all((up := 2 * up - 2) == want for want in down[-2::-1])
        assert fits == (rows_ % released.factor == released.margin(config.REFINER_USE)), rows_


@pytest.mark.parametrize("rows_", [2, 4, 6])
def test_enlarging_later_gives_the_same_numbers(rows_):
    up = spatial.Upsample(6, margin=True).double().eval()
    x = torch.randn(2, 3, rows_, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        plain = up(x)
        savings.apply(up, config.Runtime())
        fast = up(x)
    assert plain.shape == (2, 3, 2 * rows_ - 2, 10, 6)
    assert (plain - fast).abs().max() < 1e-12
    assert plain.equal(fast) == (rows_ == 2)  # two rows are all border


def test_level_and_index_are_inverse():
    table = sampler.refiner_levels()
    for index in (0.0, 0.25, 37.5, 598.4, 998.0):
        assert math.isclose(table.index(table.level(index)), index, abs_tol=1e-9)
    assert table.level(999) == math.inf and table.index(math.inf) == 999
    assert table.index(1e-9) == 0


@pytest.mark.parametrize("solver", ["dpmpp_2m_sde", "heun"])
@pytest.mark.parametrize("steps", [1, 6, 13, 30])
def test_the_clean_grid_has_the_requested_number_of_steps(solver, steps):
    table = sampler.refiner_levels()
    grid = sampler.make_grid(table, total=600, steps=steps, solver=solver)
    assert grid.steps == steps and grid.timesteps[0] == 599 and grid.levels[-1] == 0
    stands = [table.level(t) for t in grid.timesteps]
    assert list(grid.levels[:-1]) == stands  # the network gets the timestep of x
    official = sampler.make_grid(table, total=600, steps=steps, solver=solver, form="official")
    assert official.steps == steps + (steps in (6, 13) and solver == "dpmpp_2m_sde")


@pytest.mark.parametrize("start", ["clean", "official"])
def test_the_solvers_return_a_certain_clip(start):
    """If the network knows the clip, both solvers end on it for any noise."""
    table = sampler.refiner_levels()
    clip = torch.randn(1, 4, 3, 4, 4, dtype=torch.float64)

    def knows(x, t):
        return (table.alphas[t[0]] * x - clip) / table.sigmas[t[0]]

    for solver, eta in (("dpmpp_2m_sde", 1.0), ("dpmpp_2m_sde", 0.0), ("heun", 1.0)):
        grid = sampler.make_grid(table, total=600, steps=8, solver=solver)
        x = table.noised(clip, torch.randn_like(clip), 599)
        seen = []
        got = sampler.refine(
            knows, x, table, grid, solver=solver, start=start, eta=eta, noise=torch.randn_like,
            on_step=lambda info, seen=seen: seen.append(info.x),
        )  # fmt: skip
        assert (got - clip).abs().max() < 1e-9 and len(seen) == 8


def test_the_clean_start_gives_the_network_its_true_timestep():
    table = sampler.refiner_levels()
    grid = sampler.make_grid(table, total=600, steps=1)
    x = torch.randn(1, 4, 2, 2, 2, dtype=torch.float64)
    for form, factor in (("clean", 1.0), ("official", table.sigmas[599].item())):
        seen = []

        def watch(x, t, seen=seen):
            seen.append(x)
            return x

        sampler.refine(watch, x, table, grid, start=form, noise=torch.randn_like)
        assert torch.allclose(seen[0], factor * x, rtol=1e-12)


@pytest.mark.parametrize(("frames", "window", "overlap"), [(5, 8, 2), (8, 8, 2), (9, 8, 2), (40, 8, 3)])
def test_windows_cover_a_clip_and_blend_what_agrees(frames, window, overlap):
    calls = []

    def pointwise(x, t):
        calls.append(x.shape[2])
        return 2 * x

    x = torch.randn(1, 4, frames, 2, 2, dtype=torch.float64)
    got = sampler.windowed(pointwise, window, overlap)(x, torch.zeros(1))
    assert torch.allclose(got, 2 * x, rtol=1e-12)  # if all windows agree, blending changes nothing
    assert calls == ([frames] if frames <= window else [window] * len(calls))
    starts = sampler.window_starts(frames, window, overlap)
    assert len(starts) == len(calls) and starts[0] == 0
    assert all(b - a <= window - overlap for a, b in itertools.pairwise(starts))
