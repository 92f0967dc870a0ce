"""Kinds `pipeline_schedules`, `pipeline_ddim` and `pipeline_forward_loss`: schedules, samplers and losses.

The goldens use a closed-form stand-in for the UNet, so these comparisons test sampler arithmetic only. The
file's metadata and tensors decide what is compared.

Whole runs are compared within tolerances although we keep the official order of operations: float32 `sqrt`
and `tanh` come from a vector library that does not round correctly, so their last bit differs between builds
of torch and between CPUs, and the loop amplifies it. The rows `<case>.step.<i>` avoid this and require equal
bits.

Axes: b batch, f frames, c channels, h w latent rows and columns; t timestep.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from i2vgen.diffusion import loss, sampler
from i2vgen.diffusion import schedule as schedule_module
from i2vgen.diffusion.sampler import Noise, Predict, StepInfo
from i2vgen.diffusion.schedule import Prediction, Schedule, Variance
from i2vgen.parity.report import Golden, Row, Settings, check, compare

TABLE_TOLERANCE = 1e-12  # absolute, float64 tables
SIGMA_TOLERANCE = 1e-6  # absolute; the official sigma tables were computed in float32
FLOAT64_TOLERANCE = 1e-9  # relative L2 of float64 runs against stored float64 ones; measured 1e-15
STATED_TOLERANCE = 1e-5  # forward quantities and losses, relative to the largest value

# Absolute tolerance on final latents, and the latents' magnitude it is stated for (larger ones scale it).
# Recovering eps from x0 near t = 0 is ill-conditioned, so "eps" and "x0" have larger tolerances. The stand-in
# is not a denoiser, and x_{t-1} prediction divides its output by about 1e-3 in every step, which amplifies
# the last bit without bound; "previous" is tested by the single steps and in float64.
LATENT_TOLERANCE = {"v": (1e-5, 2.0), "eps": (5e-4, 444.0), "x0": (4e-4, 1.0), "previous": (1e-1, 1.0)}
HALF_OUTPUT_TOLERANCE = 1e-3  # absolute at latent magnitude 2, for network outputs rounded to float16
FLOAT64_AGAINST_FLOAT32 = (
    3.0  # factor for the rounding of the stored float32 run, which reaches 0.7 of the bound
)
HALF_OUTPUT_STEPS = 1e-3  # relative L2 of intermediate states, for which no tolerance is stated
INVERSION_FLOAT64 = 1e-4  # relative to the largest value: the error of the stored float32 runs

# Relative L2 when our stand-in computes in half precision: guidance 9 multiplies one rounding of the output
# (2^-11 and 2^-8) about 17 times, and the steps add up.
HALF_TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 8e-2}

PREDICTIONS: dict[str, Prediction] = {
    "v": "v",
    "eps": "eps",
    "x0": "x0",
    "x_{t-1}": "previous",
    "prev": "previous",
}


def stand_in(
    x: Tensor,
    t: Tensor,
    y: Tensor | None,
    image: Tensor | None,
    local_image: Tensor | None,
    fps: Tensor | None,
) -> Tensor:
    """The closed-form network of the goldens: x [b c f h w], t int64 [b] -> [b c f h w] in the dtype of x.

    tanh(0.7 x + 0.3 t / 1000 + 0.5 mean(y) + 0.25 mean(image) + 0.2 local_image + 0.05 fps / 16), means over
    the last two axes, in this order; a condition that is None drops its term.
    """
    out = 0.7 * x + 0.3 * _scalar(t.to(x.dtype) / 1000)
    if y is not None:
        out = out + 0.5 * _scalar(y.mean(dim=(-2, -1)))
    if image is not None:
        out = out + 0.25 * _scalar(image.mean(dim=(-2, -1)))
    if local_image is not None:
        out = out + 0.2 * local_image
    if fps is not None:
        out = out + 0.05 * _scalar(fps.to(x.dtype)) / 16
    return out.double().tanh().to(x.dtype)  # the last bit of float32 tanh depends on the build of torch


def _scalar(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1, 1)


# ------------------------------------------------------------------------------------------ schedules


def schedules(golden: Golden, settings: Settings) -> Iterator[Row]:
    """Beta tables, tables derived from them, timestep grids, NaN step counts; `settings` has no effect."""
    for name, case in golden.config.get("cases", {}).items():
        made = _schedule(case["schedule"], case)
        yield from _table(golden, f"{name}.betas", made.betas)
        yield from _table(golden, f"{name}.alphas_cumprod", made.abar)
    yield from _sigma_tables(golden)
    if "official" not in golden.config:
        return
    official = _diffusion(golden.config["official"], "v")
    for name, table in _derived(official).items():
        yield from _table(golden, f"official.{name}", table)
    yield from _grids(golden, official.num_timesteps)
    if "nan_step_counts_v_zsnr" in golden.config:
        yield from _nan_step_counts(golden.config["nan_step_counts_v_zsnr"], official)


def _derived(made: Schedule) -> dict[str, Tensor]:
    """Our tables under the official names."""
    return {
        "betas": made.betas,
        "alphas_cumprod": made.abar,
        "alphas_cumprod_prev": made.abar_prev,
        "alphas_cumprod_next": made.abar_next,
        "sqrt_alphas_cumprod": made.sqrt_abar,
        "sqrt_one_minus_alphas_cumprod": made.sqrt_one_minus_abar,
        "log_one_minus_alphas_cumprod": made.log_one_minus_abar,
        "sqrt_recip_alphas_cumprod": made.sqrt_recip_abar,
        "sqrt_recipm1_alphas_cumprod": made.sqrt_recip_abar_minus_one,
        "posterior_variance": made.posterior_variance,
        "posterior_log_variance_clipped": made.posterior_log_variance,
        "posterior_mean_coef1": made.posterior_mean_x0,
        "posterior_mean_coef2": made.posterior_mean_xt,
    }


def _table(golden: Golden, name: str, got: Tensor) -> Iterator[Row]:
    """Bound 1e-12, times the largest finite entry if that exceeds 1 (as in 1/sqrt(abar))."""
    if name in golden:
        expected = golden[name]
        yield compare(name, got, expected, max_abs=TABLE_TOLERANCE * max(1.0, _largest(expected)))


def _sigma_tables(golden: Golden) -> Iterator[Row]:
    """Sigma tables of the refiner. They have no metadata; a name may end in the two shifts, as "..._2_4"."""
    for name in _names(golden, "sigma."):
        num_timesteps = len(golden[name])
        if name == "sigma.cosine_zsnr_flag":  # the flag has no effect in the sigma-based class
            made = schedule_module.make_betas(
                kind="cosine", num_timesteps=num_timesteps, zero_terminal_snr=False
            )
            sigmas = Schedule(made).sqrt_one_minus_abar
        elif name.startswith("sigma.logsnr_cosine_interp"):
            scales = [float(number) for number in re.findall(r"_(\d+(?:\.\d+)?)(?=_|$)", name)] or [2.0, 4.0]
            sigmas = schedule_module.logsnr_cosine_sigmas(
                num_timesteps=num_timesteps, scale_min=scales[0], scale_max=scales[1]
            )
        else:
            continue
        yield compare(name, sigmas, golden[name], max_abs=SIGMA_TOLERANCE)


def _grids(golden: Golden, num_timesteps: int) -> Iterator[Row]:
    for name in _names(golden, "ddim_steps."):
        steps = int(name.rpartition(".")[2])
        visited = schedule_module.timesteps(num_timesteps, steps, "official")
        yield compare(name, torch.tensor(visited), golden[name], exact=True)
    for name in _names(golden, "ddim_prev."):
        steps = int(name.rpartition(".")[2])
        levels = schedule_module.next_levels(num_timesteps, steps, "official")
        yield compare(name, torch.tensor(levels), golden[name], exact=True)


def _nan_step_counts(ranges: list[list[int]], made: Schedule) -> Iterator[Row]:
    """Test all step counts by sampling one-element latents; counts with the same grid share a run."""
    grids: dict[tuple[int, ...], list[int]] = {}
    for steps in range(1, made.num_timesteps + 1):
        grid = schedule_module.timesteps(made.num_timesteps, steps, "official")
        grids.setdefault(tuple(grid), []).append(steps)
    official, ours = set(), set()
    for counts in grids.values():
        if _run_is_nan(made, counts[0], "recovered"):
            official.update(counts)
        if _run_is_nan(made, counts[0], "direct"):
            ours.update(counts)
    expected = {steps for first, last in ranges for steps in range(first, last + 1)}
    what = f"NaN for the {len(expected)} listed step counts and no others"
    yield check("nan_step_counts.recovered", official == expected, what)
    what = f"finite for all step counts 1..{made.num_timesteps}"
    yield check("nan_step_counts.direct", not ours, what)


def _run_is_nan(made: Schedule, steps: int, eps_form: schedule_module.EpsForm) -> bool:
    start = torch.ones(1, 1, 1, 1, 1)
    end = sampler.ddim(lambda x, t: 0.5 * x, start, made, steps=steps, eps_form=eps_form, check_finite=False)
    return not bool(end.isfinite().all())


# ----------------------------------------------------------------------------------------------- ddim


def ddim(golden: Golden, settings: Settings) -> Iterator[Row]:
    """Whole DDIM runs with the stand-in network in the official and the direct form, and single steps."""
    for name, case in golden.config["cases"].items():
        made = _diffusion(case["diffusion"], PREDICTIONS[case["mean_type"]])
        network = _network(
            golden,
            settings,
            case.get("g"),
            half_output=case.get("half", False),
            rescale=_rescale(case["diffusion"], made),
        )
        yield from _official_run(golden, settings, name, case, made, network)
        direct = _run(golden, settings, name, case, made, network, "direct")
        if golden[f"{name}.final"].isnan().any():  # the official form gives NaN; ours too for eps prediction
            finite = bool(direct.isfinite().all()) or made.prediction == "eps"
            yield check(f"{name}.final (direct)", finite, "finite where the official form is NaN")
            continue
        yield _latents(f"{name}.final (direct)", direct, golden[f"{name}.final"], settings, case)
        if settings.dtype == torch.float64 and f"{name}.final_fp64" in golden:
            expected = golden[f"{name}.final_fp64"]
            yield compare(f"{name}.final_fp64 (direct)", direct, expected, relative_l2=FLOAT64_TOLERANCE)
        if settings.dtype == torch.float32:
            yield from _single_steps(golden, settings, name, case, made, network)


def _official_run(
    golden: Golden, settings: Settings, name: str, case: dict, made: Schedule, network: Predict
) -> Iterator[Row]:
    seen: list[StepInfo] = []
    final = _run(golden, settings, name, case, made, network, "recovered", seen)
    if "calls" in case:
        yield check(f"{name}.calls", len(seen) == case["calls"], f"{case['calls']} network calls")
    if "kept_t" in case:
        visited = [seen[call].t for call in case["kept_calls"] if call < len(seen)]
        yield check(f"{name}.kept_t", visited == case["kept_t"], f"visits t = {case['kept_t']}")
    yield _latents(f"{name}.final", final, golden[f"{name}.final"], settings, case)
    if settings.dtype == torch.float64 and f"{name}.final_fp64" in golden:
        expected = golden[f"{name}.final_fp64"]
        bound = FLOAT64_TOLERANCE
        yield compare(f"{name}.final_fp64", *_without_shared_nan(final, expected), relative_l2=bound)
    for call in (call for call in case.get("kept_calls", []) if call < len(seen)):
        for kind, got in (("xt_after", seen[call].x), ("x0_pred", seen[call].x0)):
            key = f"{name}.{kind}.{call}"
            if key in golden:
                yield _latents(key, got, golden[key], settings, case, between=True)


def _run(
    golden: Golden,
    settings: Settings,
    name: str,
    case: dict,
    made: Schedule,
    network: Predict,
    eps_form: schedule_module.EpsForm,
    seen: list[StepInfo] | None = None,
) -> Tensor:
    eta = case.get("eta") or 0.0
    return sampler.ddim(
        network,
        _state(golden["noise"], settings),
        made,
        steps=case["n"],
        eta=eta,
        eps_form=eps_form,
        clamp=case.get("clamp"),
        percentile=case.get("percentile"),
        noise=_replay(_ddim_draws(golden, name, case), settings) if eta else None,
        on_step=None if seen is None else seen.append,
        check_finite=False,
    )


def _ddim_draws(golden: Golden, name: str, case: dict) -> Iterable[Tensor]:
    if f"{name}.noise_draws" in golden:
        return golden[f"{name}.noise_draws"]
    generator = torch.Generator().manual_seed(case["nseed"])
    shape = golden["noise"].shape
    return (torch.randn(shape, generator=generator) for _ in itertools.count())


def _latents(
    name: str, got: Tensor, expected: Tensor, settings: Settings, case: dict, *, between: bool = False
) -> Row:
    """Compare latents; the tolerance depends on prediction and precision. `between`: before the last step."""
    if settings.half:
        return compare(name, *_without_shared_nan(got, expected), relative_l2=HALF_TOLERANCE[settings.dtype])
    if case.get("half") and between:
        return compare(name, *_without_shared_nan(got, expected), relative_l2=HALF_OUTPUT_STEPS)
    bound, size = LATENT_TOLERANCE[PREDICTIONS[case["mean_type"]]]
    if case.get("half"):
        bound, size = HALF_OUTPUT_TOLERANCE, LATENT_TOLERANCE["v"][1]
    if settings.dtype == torch.float64:
        bound *= FLOAT64_AGAINST_FLOAT32
    return compare(
        name, *_without_shared_nan(got, expected), max_abs=bound * max(1.0, _largest(expected) / size)
    )


def _single_steps(
    golden: Golden, settings: Settings, name: str, case: dict, made: Schedule, network: Predict
) -> Iterator[Row]:
    """From stored states: x0 by one network call, and the next state from the stored x0, bit for bit."""
    levels = schedule_module.next_levels(made.num_timesteps, case["n"], "official")
    for call, now in zip(case.get("kept_calls", []), case.get("kept_t", []), strict=True):
        before = "noise" if call == 0 else f"{name}.xt_after.{call - 1}"
        if before not in golden or f"{name}.x0_pred.{call}" not in golden:
            continue
        x, x0 = (settings.cast(golden[key]) for key in (before, f"{name}.x0_pred.{call}"))
        if not bool(x0.isfinite().all()):
            continue
        t = torch.full((len(x),), now)
        if not case.get("half"):
            got = made.to_x0(network(x, t.to(x.device)), x, t)
            got = sampler.limit_x0(got, clamp=case.get("clamp"), percentile=case.get("percentile"))
            yield compare(f"{name}.x0.{call}", got, x0, relative_l2=1e-6)
        after = f"{name}.xt_after.{call}" if call < len(levels) - 1 else f"{name}.final"
        if after in golden and settings.device == "cpu" and not case.get("eta"):
            eps = made.eps_from_x0(x0, x, t, form="recovered")
            yield _equal_step(f"{name}.step.{call}", x0, eps, made, levels[call], golden[after])


def _equal_step(name: str, x0: Tensor, eps: Tensor, made: Schedule, level: int, expected: Tensor) -> Row:
    """One deterministic step must be bit-identical, except for the last bit of its two square roots."""
    abar = made.pick(made.abar, torch.full((len(x0),), level), x0)
    signals, noises = _neighbours(abar), _neighbours(1 - abar)
    distances = [
        (signal * x0 + noise * eps - expected).abs().max().item() for signal in signals for noise in noises
    ]
    worst = min(distances)
    return Row(name, worst, worst, "equal, but for the last bit of sqrt(abar), sqrt(1 - abar)", worst == 0.0)


def _neighbours(squared: Tensor) -> list[Tensor]:
    """float32 -> its correctly rounded square root, and the float32 numbers below and above."""
    root = squared.double().sqrt().float()
    limits = (torch.full_like(root, -torch.inf), torch.full_like(root, torch.inf))
    return [root, *(torch.nextafter(root, limit) for limit in limits)]


# --------------------------------------------------------------------------------------- forward, loss


def forward_loss(golden: Golden, settings: Settings) -> Iterator[Row]:
    """Noising, posterior, one-step distributions, losses, offset noise, inversion, ancestral sampling."""
    for name, got in _forward_values(golden, settings):
        if name in golden:
            yield _compare_value(name, got, golden[name], settings)


def _compare_value(name: str, got: Tensor, expected: Tensor, settings: Settings) -> Row:
    if settings.half:
        return compare(name, *_without_shared_nan(got, expected), relative_l2=HALF_TOLERANCE[settings.dtype])
    inversion = name.startswith("reverse") and settings.dtype == torch.float64
    bound = INVERSION_FLOAT64 if inversion else STATED_TOLERANCE
    return compare(name, *_without_shared_nan(got, expected), max_abs=bound * _largest(expected))


def _forward_values(golden: Golden, settings: Settings) -> Iterator[tuple[str, Tensor]]:
    """-> (tensor name, our value). May give names that the file lacks, if they are cheap to compute."""
    yield from _noising(golden, settings)
    yield from _distributions(golden, settings)
    yield from _offset_noise(golden, settings)
    yield from _single_inversions(golden, settings)
    for name, case in golden.config.get("cases", {}).items():
        if name not in golden:
            continue
        if name.startswith("loss."):
            yield name, _loss(golden, settings, name, case)
        elif name.startswith("reverse."):
            yield name, _inversion(golden, settings, case)
        elif name.startswith("ancestral"):
            yield name, _ancestral(golden, settings, name, case)


def _noising(golden: Golden, settings: Settings) -> Iterator[tuple[str, Tensor]]:
    made = _diffusion(golden.config["diffusion"], "v")
    t = golden["t"]
    x0, noise = (_state(golden[key], settings) for key in ("x0", "noise"))
    xt = made.q_sample(x0, t, noise)
    yield "q_sample", xt
    yield from zip(("q_mean", "q_var", "q_logvar"), made.q_mean_variance(x0, t), strict=True)
    yield from zip(("post_mean", "post_var", "post_logvar"), made.q_posterior(x0, xt, t), strict=True)


def _distributions(golden: Golden, settings: Settings) -> Iterator[tuple[str, Tensor]]:
    """Names p.<prediction>.<nocfg | cfg9>.<quantity> and p.fixed_large.<var | logvar>."""
    diffusion = golden.config["diffusion"]
    prefixes = sorted({name.rpartition(".")[0] for name in _names(golden, "p.") if name.count(".") > 1})
    for prefix in prefixes:
        _, kind, *guidance = prefix.split(".")
        prediction = PREDICTIONS.get(kind, "v")
        made = _diffusion(diffusion, prediction, "fixed_large" if kind == "fixed_large" else None)
        scale = _guidance(guidance[0]) if guidance else None
        network = _network(golden, settings, scale, rescale=_rescale(diffusion, made))
        x, t = _state(golden["q_sample"], settings), golden["p.t"]
        step = made.model_distribution(network(x, t.to(x.device)), x, t)
        yield f"{prefix}.mean", step.mean
        yield f"{prefix}.var", step.variance
        yield f"{prefix}.logvar", step.log_variance
        yield f"{prefix}.x0", step.x0


def _offset_noise(golden: Golden, settings: Settings) -> Iterator[tuple[str, Tensor]]:
    if "offset_noise.draw1" not in golden or "offset_noise.draw2" not in golden:
        return
    noise, offset = (_state(golden[f"offset_noise.{key}"], settings) for key in ("draw1", "draw2"))
    made = _diffusion(golden.config["diffusion"], "v")
    network = _network(golden, settings, None, rescale=_rescale(golden.config["diffusion"], made))
    for name in _names(golden, "offset_noise."):
        tag = name.removeprefix("offset_noise.")
        if tag in ("draw1", "draw2"):
            continue
        mixed = loss.offset_noise(noise, offset, float(tag))
        yield name, mixed
        x0 = _state(golden["x0"], settings)
        t = golden["t"].to(settings.device)
        yield f"offset_noise_loss.{tag}", loss.training_loss(network, x0, t, mixed, made)


def _loss(golden: Golden, settings: Settings, name: str, case: dict) -> Tensor:
    diffusion = golden.config["diffusion"]
    made = _diffusion(diffusion, PREDICTIONS[case["mean_type"]])
    extra = case.get("extra", [])
    t = golden["p.t" if "at_p_t" in name else "t"].to(settings.device)
    mask = None
    if "loss_mask" in extra:  # stored as b f c h w; the official code uses the first channel
        mask = _state(golden["loss_mask"], settings)[:, :, 0].unsqueeze(1)
    return loss.training_loss(
        _network(golden, settings, None, rescale=_rescale(diffusion, made)),
        _state(golden["x0"], settings),
        t,
        _state(golden["noise"], settings),
        made,
        kind=case["loss_type"],
        weight=_state(golden["weight"], settings) if "weight" in extra else None,
        mask=mask,
        # the official code ignores the switch unless the prediction is eps
        diversity="use_div_loss" in extra and made.prediction == "eps",
    )


def _inversion(golden: Golden, settings: Settings, case: dict) -> Tensor:
    diffusion = golden.config["diffusion"]
    made = _diffusion(diffusion, PREDICTIONS[case["mean_type"]])
    network = _network(golden, settings, case["g"], rescale=_rescale(diffusion, made))
    x0 = _state(golden["x0"], settings)
    return sampler.ddim_invert(network, x0, made, steps=case["n"], eps_form="recovered", check_finite=False)


def _single_inversions(golden: Golden, settings: Settings) -> Iterator[tuple[str, Tensor]]:
    """Names reverse_step.<prediction>.<next | x0>: one unguided step of 50, from `q_sample` at `p.t`."""
    kinds = sorted({name.split(".")[1] for name in _names(golden, "reverse_step.")})
    for kind in kinds:
        made = _diffusion(golden.config["diffusion"], PREDICTIONS[kind])
        network = _network(golden, settings, None, rescale=_rescale(golden.config["diffusion"], made))
        x, t = _state(golden["q_sample"], settings), golden["p.t"]
        level = (t + made.num_timesteps // 50).clamp(max=made.num_timesteps)
        x, x0 = sampler.invert_step(network, x, t, level, made, eps_form="recovered")
        yield f"reverse_step.{kind}.next", x
        yield f"reverse_step.{kind}.x0", x0


def _ancestral(golden: Golden, settings: Settings, name: str, case: dict) -> Tensor:
    """Names ancestral<T>.<prediction>.<variance>."""
    series, kind, variance = name.split(".")
    diffusion = golden.config["diffusion"] | {"schedule_param": case["schedule_param"]}
    made = _diffusion(diffusion, PREDICTIONS[kind], variance)
    network = _network(golden, settings, case["g"], rescale=_rescale(diffusion, made))
    draws = _replay(golden[f"{series}.draws"], settings)
    start = _state(golden["noise"], settings)
    return sampler.ancestral(network, start, made, noise=draws, check_finite=False)


# -------------------------------------------------------------------------------------------- helpers


def _diffusion(config: dict, prediction: Prediction, variance: Variance | None = None) -> Schedule:
    """The schedule that a golden's `diffusion` entry describes."""
    return _schedule(
        config["schedule"],
        config["schedule_param"],
        prediction=prediction,
        variance=variance or config.get("var_type", "fixed_small"),
    )


def _schedule(
    kind: str, param: dict, *, prediction: Prediction = "v", variance: Variance = "fixed_small"
) -> Schedule:
    cosine = kind == "cosine"
    betas = schedule_module.make_betas(
        kind=kind,
        num_timesteps=param["num_timesteps"],
        zero_terminal_snr=param.get("zero_terminal_snr", False),
        cosine_s=param.get("cosine_s", 0.008),
        init_beta=None if cosine else param.get("init_beta"),
        last_beta=None if cosine else param.get("last_beta"),
    )
    return Schedule(betas, prediction=prediction, variance=variance)


def _rescale(diffusion: dict, made: Schedule) -> float:
    """Factor on the timestep before it enters the network (official option `rescale_timesteps`)."""
    return 1000 / made.num_timesteps if diffusion.get("rescale_timesteps") else 1.0


def _network(
    golden: Golden,
    settings: Settings,
    scale: float | None,
    *,
    half_output: bool = False,
    rescale: float = 1.0,
) -> Predict:
    """The stand-in with the golden's conditions; network and guidance use the dtype under test."""

    def branch(suffix: str) -> Predict:
        names = (f"y{suffix}", f"image{suffix}", "local_image", "fps")
        conditions = [settings.cast(golden[name]) if name in golden else None for name in names]

        def predict(x: Tensor, t: Tensor) -> Tensor:
            scaled_t = t if rescale == 1.0 else t.float() * rescale
            out = stand_in(x.to(settings.dtype), scaled_t, *conditions)
            return out.half() if half_output else out

        return predict

    if scale is None:
        return branch("")
    return sampler.guided(branch(""), branch("_neg"), scale, precision="network")


def _without_shared_nan(got: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Replace NaN by 0 in both if they have it in the same places (the official code does, at abar = 0)."""
    got, expected = got.cpu(), expected.cpu()
    if got.shape != expected.shape or not torch.equal(got.isnan(), expected.isnan()):
        return got, expected
    nan = expected.isnan()
    return got.masked_fill(nan, 0.0), expected.masked_fill(nan, 0.0)


def _largest(tensor: Tensor) -> float:
    finite = tensor[tensor.isfinite()].abs()
    return finite.max().item() if len(finite) else 1.0


def _guidance(tag: str) -> float | None:
    """ "nocfg" -> None, "cfg9" -> 9.0"""
    return None if tag == "nocfg" else float(tag.removeprefix("cfg"))


def _state(tensor: Tensor, settings: Settings) -> Tensor:
    """Move to the device under test, in the dtype of the sampler's state: at least float32."""
    return tensor.to(settings.device, torch.promote_types(settings.dtype, torch.float32))


def _replay(draws: Iterable[Tensor], settings: Settings) -> Noise:
    """A noise source that returns recorded draws in order."""
    stream = iter(draws)
    return lambda x: _state(next(stream), settings)


def _names(golden: Golden, prefix: str) -> list[str]:
    return [name for name in golden if name.startswith(prefix)]
