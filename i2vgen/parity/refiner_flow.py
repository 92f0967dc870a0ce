"""Kinds `refiner_schedule`, `refiner_sampling`, `refiner_e2e`, `refiner_prepost`: sampling with the refiner.

The official tables are float32, and near zero signal their last bit matters. Quantities that follow from a
table are therefore computed from the golden's table, and the tables are compared separately.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from i2vgen.diffusion.sampler import Predict, guided_pair
from i2vgen.diffusion.schedule import Schedule, make_betas
from i2vgen.fast.unet import both_branches
from i2vgen.files import images, video
from i2vgen.model.conditioning import Conditions
from i2vgen.model.spatial import damp_lowest
from i2vgen.parity import refiner
from i2vgen.parity.report import Golden, Row, Settings, check, compare
from i2vgen.refiner import fitting
from i2vgen.refiner.sampler import (
    Grid,
    Levels,
    at,
    invert,
    make_grid,
    refine,
    refiner_levels,
)
from i2vgen.settings import config

TABLE_ABS = 1e-6
# Levels grow to infinity at the noisy end, so their bound is relative.
TABLE_L2 = 1e-6
SMALL_ALPHA = 0.2
SAMPLING = {"max_abs": 1e-4, "relative_l2": 1e-4}
E2E = {"max_abs": 5e-4, "relative_l2": 1e-3}
PIXELS_ABS = 1e-5


# --------------------------------------------------------------------------------------------- tables


def schedule(golden: Golden, settings: Settings) -> Iterator[Row]:
    """Tables, step lists, maps between level and index, posterior quantities; always in float64."""
    ours, cosine = refiner_levels(), Schedule(cosine_betas())
    tables = {
        "interp_sigma": ours.sigmas,
        "interp_alpha": ours.alphas,
        "cosine_sigma": cosine.sqrt_one_minus_abar,
        "cosine_sigma_f64": cosine.sqrt_one_minus_abar,
        "cosine_alpha": cosine.sqrt_abar,
        "linear_sd_alphas_cumprod_f64": Schedule(refiner.v1_betas()).abar,
    }
    for name, table in tables.items():
        if f"schedule.{name}" in golden and name != "interp_alpha":
            yield compare(f"schedule.{name}", table, golden[f"schedule.{name}"], max_abs=TABLE_ABS)
    # For small alpha, one bit of a float32 sigma changes it by more than the bound, so its square is
    # compared.
    theirs = golden["schedule.interp_alpha"].double()
    large = theirs > SMALL_ALPHA
    yield compare("schedule.interp_alpha, large", ours.alphas[large], theirs[large], max_abs=TABLE_ABS)
    yield compare("schedule.interp_alpha, squared", ours.alphas**2, theirs**2, max_abs=TABLE_ABS)

    theirs = Levels(golden["schedule.interp_sigma"].double(), golden["schedule.interp_alpha"].double())
    for name in sorted(golden):
        if match := re.fullmatch(r"(heun|dpmpp_2m_sde)(\d+)\.T(\d+)\.(\w+)\.sigmas", name):
            solver, steps, total, spacing = match.groups()
            grid = make_grid(
                theirs, total=int(total), steps=int(steps), solver=solver, spacing=spacing, form="official"
            )
            place = name.removesuffix(".sigmas")
            yield compare(name, torch.tensor(grid.levels), golden[name], relative_l2=TABLE_L2)
            visited = torch.tensor(call_timesteps(grid, solver))
            yield compare(f"{place}.model_t", visited, golden[f"{place}.model_t"], exact=True)
    found = torch.tensor([theirs.index(s) for s in golden["map.sigma"].tolist()], dtype=torch.float64)
    yield compare("map.sigma_to_t", found, golden["map.sigma_to_t"], relative_l2=TABLE_L2)
    found = torch.tensor([theirs.level(t) for t in golden["map.t"].tolist()], dtype=torch.float64)
    yield compare("map.t_to_sigma", found, golden["map.t_to_sigma"], relative_l2=TABLE_L2)
    for kind in sorted({name.split(".")[1] for name in golden if re.fullmatch(r"post\.\w+\.mu", name)}):
        yield from posterior(golden, theirs, kind)


def call_timesteps(grid: Grid, solver: str) -> list[int]:
    """The timestep of every network call; Heun also evaluates at the next level."""
    visited = []
    for i, t in enumerate(grid.timesteps):
        visited.append(t)
        if solver == "heun" and grid.levels[i] < float("inf") and grid.levels[i + 1] > 0:
            visited.append(grid.timesteps[i + 1])
    return visited


def posterior(golden: Golden, table: Levels, kind: str) -> Iterator[Row]:
    """q(x_{t-1} | x_t, x0), with x0 from the network's output, in float32 as the golden."""
    t = golden["post.t_eps" if kind == "eps" else "post.t"]
    x, out = golden["post.x"], golden["post.model_out"]
    alpha, sigma = (per_sample(values, t) for values in (table.alphas, table.sigmas))
    alpha_to = per_sample(table.alphas, t - 1)
    sigma_to = (1 - alpha_to**2).sqrt()
    x0 = {"v": alpha * x - sigma * out, "eps": (x - sigma * out) / alpha, "x0": out}[kind]
    beta = 1 - (alpha / alpha_to) ** 2
    variance = beta * (sigma_to / sigma) ** 2
    mean = beta * alpha_to / sigma**2 * x0 + alpha * sigma_to**2 / (alpha_to * sigma**2) * x
    found = {
        "x0": x0,
        "eps": (x - alpha * x0) / sigma,
        "mu": mean,
        "var": variance,
        "log_var": variance.log(),
    }
    for name, value in found.items():
        stored = golden[f"post.{kind}.{name}"]
        yield compare(f"post.{kind}.{name}", value, stored, relative_l2=TABLE_L2, max_abs=1e-5)


def per_sample(table: Tensor, t: Tensor) -> Tensor:
    return table[t].float().view(-1, 1, 1, 1, 1)


def cosine_betas() -> Tensor:
    """The schedule with which SR600 inverts; it denoises with another."""
    return make_betas(kind="cosine", num_timesteps=1000, zero_terminal_snr=False)


# ------------------------------------------------------------------------------------------- sampling


@dataclass(frozen=True)
class Run:
    """Settings of one sampling run, which only the goldens' README lists."""

    steps: int = 6
    total: int = 600
    guidance: float = 3.0
    rescale: float = 0.0
    solver: str = "dpmpp_2m_sde"
    spacing: str = "trailing"
    eta: float = 1.0
    correction: str = "midpoint"
    indices: tuple[int, ...] = ()


RUNS = {
    "ms_fast": Run(30, guidance=7.5, rescale=0.2),
    "ms_fast_eta0": Run(30, guidance=7.5, rescale=0.2, eta=0.0),
    "ms_heun": Run(50, guidance=7.5, rescale=0.2, solver="heun"),
    "full_range": Run(10, 1000, 7.5, 0.2),
    "g1": Run(guidance=1.0),
    "leading": Run(spacing="leading"),
    "linspace": Run(spacing="linspace"),
    "explicit": Run(rescale=1.0, indices=(599, 400, 200, 50)),
    "solver_heun_type": Run(rescale=0.2, correction="heun"),
    "vgen": Run(30, 700, 9.0, 0.3),
}


def sampling(golden: Golden, settings: Settings) -> Iterator[Row]:
    """Whole runs with the closed-form model: start, levels, inputs, estimates of x0, result."""
    y, negative, z0, noise = (settings.cast(golden[f"in.{name}"]) for name in ("y", "y_neg", "z0", "noise"))
    cond, uncond = refiner.closed_form(y), refiner.closed_form(negative)
    table = refiner_levels()
    if "ms.noised" in golden:
        yield compare("ms.noised", table.noised(z0, noise, 599), golden["ms.noised"], max_abs=TABLE_ABS * 10)
    if "vgen.inverted" in golden:
        yield from inversion(golden, uncond, z0, total=700, steps=30)
    for tag in sorted({name.removesuffix(".x0_steps") for name in golden if name.endswith(".x0_steps")}):
        if tag not in RUNS:
            raise ValueError(f"{golden.path}: the settings of its run {tag!r} are unknown; add them to RUNS")
        yield from sampling_run(golden, settings, tag, RUNS[tag], table, cond, uncond)


def sampling_run(
    golden: Golden, settings: Settings, tag: str, run: Run, table: Levels, cond: Predict, uncond: Predict
) -> Iterator[Row]:
    grid = (
        at(table, run.indices)
        if run.indices
        else make_grid(
            table, total=run.total, steps=run.steps, solver=run.solver, spacing=run.spacing, form="official"
        )
    )
    network = cond
    if run.guidance != 1.0:
        network = guided_pair(
            lambda x, t: torch.cat([cond(x, t), uncond(x, t)]), run.guidance, rescale=run.rescale
        )
    seen = {"xt": [], "t": [], "x0": []}

    def recorded(x: Tensor, t: Tensor) -> Tensor:
        out = network(x, t)
        seen["xt"].append(x)
        seen["t"].append(int(t[0]))
        seen["x0"].append(table.alphas[t[0]].item() * x - table.sigmas[t[0]].item() * out)
        return out

    out = refine(
        recorded,
        settings.cast(golden[f"{tag}.noise"]),
        table,
        grid,
        solver=run.solver,
        start="official",
        eta=run.eta,
        correction=run.correction,
        noise=injected(golden, settings, tag),
    )
    yield compare(f"{tag}.sigmas", torch.tensor(grid.levels), golden[f"{tag}.sigmas"], relative_l2=1e-4)
    yield compare(f"{tag}.t_steps", torch.tensor(seen["t"]), golden[f"{tag}.t_steps"], exact=True)
    yield compare(f"{tag}.xt_steps", torch.stack(seen["xt"]), golden[f"{tag}.xt_steps"], **SAMPLING)
    yield compare(f"{tag}.x0_steps", torch.stack(seen["x0"]), golden[f"{tag}.x0_steps"], **SAMPLING)
    yield compare(f"{tag}.out", out, golden[f"{tag}.out"], **SAMPLING)


def injected(golden: Golden, settings: Settings, tag: str) -> Callable[[Tensor], Tensor] | None:
    """A noise source that returns the recorded unit noise in order, None if none is recorded."""
    if f"{tag}.step_noise" not in golden:
        return None
    recorded = iter(settings.cast(golden[f"{tag}.step_noise"]))
    return lambda x: next(recorded).to(x.dtype)


def inversion(golden: Golden, uncond: Predict, z0: Tensor, *, total: int, steps: int) -> Iterator[Row]:
    states, visited = [], []

    def watch(info) -> None:
        states.append(info.x)
        visited.append(info.t)

    got = invert(uncond, z0, Schedule(cosine_betas()), total=total, steps=steps, on_step=watch)
    if "vgen.inversion_t" in golden:
        yield compare("vgen.inversion_t", torch.tensor(visited), golden["vgen.inversion_t"], exact=True)
        first = golden["vgen.inversion_first3"]
        yield compare("vgen.inversion_first3", torch.stack(states[: len(first)]), first, **SAMPLING)
    yield compare("vgen.inverted", got, golden["vgen.inverted"], **SAMPLING)


# ------------------------------------------------------------------------------------- the whole stage


def e2e(golden: Golden, settings: Settings) -> Iterator[Row]:
    """Latents of both pipelines with the small UNet, whose weights are in another file of the folder."""
    weights = refiner.sibling(golden, golden.meta["weights"].removeprefix("those of "))
    if weights.meta["config"] != golden.meta["config"]:
        raise ValueError(f"{golden.path} was made with another network than that in {weights.path}")
    table = refiner_levels()
    cast = {name: settings.cast(golden[f"in.{name}"]) for name in ("y", "y_neg", "z0", "noise")}
    for tag, skip_filter in (("ms", "none"), ("vgen", "sr600")):
        run = golden.meta["settings"][tag]
        use = config.Use(**{**config.REFINER_USE.__dict__, "skip_filter": skip_filter})
        model, _ = refiner.build(weights, settings, use)
        frames = cast["z0"].shape[2]
        with torch.no_grad():
            prepared = [model.prepare(Conditions(cast[n], None, None, None), frames) for n in ("y", "y_neg")]
        network, alone = both_branches(model, *prepared), prepared[1]

        if tag == "ms":
            start = table.noised(cast["z0"], cast["noise"], run["T"] - 1)
            yield compare("ms.noised", start, golden["ms.noised"], **E2E)
        else:
            start = invert(
                lambda x, t, model=model, alone=alone: model(x, t, alone),
                cast["z0"],
                Schedule(cosine_betas()),
                total=run["T"],
                steps=run["inversion_steps"],
            )
            yield compare("vgen.inverted", start, golden["vgen.inverted"], **E2E)
        grid = make_grid(table, total=run["T"], steps=run["steps"], form="official")
        estimates = []
        out = refine(
            guided_pair(network, run["guide"], rescale=run["rescale"]),
            start,
            table,
            grid,
            start="official",
            noise=injected(golden, settings, tag),
            on_step=lambda info, estimates=estimates: estimates.append(info.x0),
        )
        yield compare(f"{tag}.x0_steps", torch.stack(estimates), golden[f"{tag}.x0_steps"], **E2E)
        yield compare(f"{tag}.out", out, golden[f"{tag}.out"], **E2E)


# ------------------------------------------------------------------------------- pixels in, pixels out


def prepost(golden: Golden, settings: Settings) -> Iterator[Row]:
    """Frames to resized tensors, floats to bytes, the skip filter, v1's picture, chunk sizes."""
    frames = golden["in.frames_uint8_hwc"].numpy()
    stored = golden["pre.normalized"]
    rows, columns = stored.shape[-2:]
    pixels = fitting.resized(frames, columns, rows, antialias=False)
    yield compare("pre.normalized", pixels, stored, max_abs=PIXELS_ABS)
    for name in sorted(golden):
        if match := re.fullmatch(r"pre\.bilinear_(\d+)x(\d+)", name):
            rows, columns = map(int, match.groups())
            pixels = fitting.resized(frames, columns, rows, antialias=False)
            yield compare(name, pixels, golden[name], max_abs=PIXELS_ABS)
        elif match := re.fullmatch(r"freeu\.(scale|even)([\d.]+)", name):
            which, gain = match.groups()
            x = settings.cast(golden["freeu.x" if which == "scale" else "freeu.x_even"])
            got = damp_lowest(rearrange(x, "n c h w -> n h w c"), float(gain))
            bound = 2e-2 if settings.half else PIXELS_ABS
            yield compare(name, rearrange(got, "n h w c -> n c h w"), golden[name], max_abs=bound)
    decoded = golden["in.decoded"]
    yield compare("post.uint8", video.to_uint8(decoded[0]), golden["post.uint8"], exact=True)
    if "v1.in.image_uint8_hwc" in golden:
        picture = Image.fromarray(golden["v1.in.image_uint8_hwc"].numpy())
        size = golden["v1.pre.clip_input"].shape[-1]
        view = images.clip_view(picture, square=448, size=size, mode="official")
        yield compare("v1.pre.clip_input", view, golden["v1.pre.clip_input"], max_abs=PIXELS_ABS)
    for name, sizes in golden.meta.get("chunks", {}).items():
        count, per = map(int, name.split("/"))
        # The official chunk size; our result does not depend on `runtime.vae_chunk`.
        at_once = -(-count // (count // per))
        got = [min(at_once, count - start) for start in range(0, count, at_once)]
        yield check(f"chunks {name}", got == sizes, "sizes equal")
