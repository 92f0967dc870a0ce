"""Cases `gpu-*`: what one GPU does at the real sizes, in parts; one that lacks memory stops no other.

A run needs no network and no weights: they are random and shared by both sides. `dry=true` runs the same
parts on the CPU at a toy's size: it shows that they run, its figures mean nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from i2vgen import pipeline
from i2vgen.bench import count, loop, micro, modes, pair
from i2vgen.bench.peer import Options, Peer
from i2vgen.bench.report import Report, Table
from i2vgen.bench.timing import Times, clock_of, interleaved
from i2vgen.fast import machine
from i2vgen.files import checkpoint
from i2vgen.memory import plans
from i2vgen.memory.free import GIB
from i2vgen.settings import config
from i2vgen.settings.config import Config

SIZES = {"gpu-256p": (256, 448), "gpu-704p": (704, 1280)}  # height, width of the video
FRAMES = 16
ROUNDS, WARMUPS = 5, 1
THEIRS, THEIRS_LAST, THEIRS_COMPILED = "diffusers", "diffusers, channels last", "diffusers, compiled"
SHOWN = 25  # operations of a trace
PLAN_STEPS = 3


@dataclass
class Run:
    """What the parts share. `found` is the JSON file so far."""

    settings: Config
    small: Config  # of the exactness part, in float32
    peer: Peer
    options: Options
    device: torch.device
    dtype: torch.dtype
    found: dict
    drawn: pair.Pair | None = None

    def times(self, ways: Mapping[str, Callable[[], object]]) -> Times:
        rounds, warmups = (2, 0) if self.options.dry else (ROUNDS, WARMUPS)
        return interleaved(ways, clock=clock_of(self.device), rounds=rounds, warmups=warmups)

    def pair(self, dtype: torch.dtype | None = None, settings: Config | None = None) -> pair.Pair:
        """Both sides' weights and inputs; the random numbers are drawn once."""
        if self.drawn is None:
            self.drawn = pair.make_pair(self.settings, self.device, torch.float32)
        dtype = dtype or self.dtype
        cast = {name: tensor.to(dtype) for name, tensor in self.drawn.state.items()}
        config = dataclasses.replace(settings or self.settings, use=pair.THEIR_USE)
        return pair.Pair(config, cast, self.device, dtype)


def check(name: str, options: Options) -> None:
    """ValueError before anything is built."""
    if not options.dry and not torch.cuda.is_available():
        raise ValueError(
            f"case={name} needs a CUDA device and PyTorch sees none; dry=true runs its parts small on a CPU"
        )
    if unknown := set(options.parts) - set(PARTS):
        raise ValueError(f"there is no part {sorted(unknown)[0]!r}; parts= takes {', '.join(PARTS)}")
    if options.mode == "train":
        raise ValueError(f"case={name} takes mode=infer only; mode=train goes with cpu-small and cpu-mid")


def run(name: str, peer: Peer, options: Options) -> Report:
    device = torch.device("cpu" if options.dry else "cuda")
    if options.dry:
        torch.set_num_threads(1)
    torch.backends.cudnn.benchmark = True  # for both sides
    found = dict.fromkeys(TOP) | {
        "case": name,
        "mode": "infer",
        "dry": options.dry,
        "device": "cpu" if options.dry else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "diffusers": peer.version,
        "parts": {},
        "failed": {},
    }
    settings = dry_settings() if options.dry else real_settings(*SIZES[name])
    small = settings if options.dry else real_settings(*SIZES["gpu-256p"])
    dtype = torch.float32 if options.dry else torch.bfloat16
    state = Run(settings, small, peer, options, device, dtype, found)
    found["size"], found["dtype"] = [settings.sample.frames, *settings.latent_size], str(dtype)[6:]
    for part in options.parts or PARTS:
        _survive(part, state)
        found.update(top(state))
        if options.save is not None:
            options.save(found)
    return Report(found, tables(state))


def _survive(part: str, state: Run) -> None:
    """One part; what it could not do is written down and the others go on. A dry run hides nothing."""
    begun = time.perf_counter()
    try:
        state.found["parts"][part] = PARTS[part](state)
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if state.options.dry and not isinstance(error, torch.OutOfMemoryError):
            raise
        state.found["failed"][part] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    state.found["parts"].setdefault(part, {})["wall_seconds"] = round(time.perf_counter() - begun, 1)
    gc.collect()
    if state.device.type == "cuda":
        torch.cuda.empty_cache()


def real_settings(height: int, width: int) -> Config:
    return Config(sample=config.Sample(height=height, width=width, frames=FRAMES))


def dry_settings() -> Config:
    unet = config.UNet(
        base_width=32,
        width_multipliers=(1, 2),
        blocks_per_level=1,
        attention_levels=(True, False),
        head_width=8,
        context_width=16,
        image_vector_width=16,
    )
    return Config(
        unet=unet,
        vae=config.VAE(base_width=32, width_multipliers=(1, 2), blocks_per_level=1),
        clip=config.Clip(
            embed_dim=16,
            text=dict(config.Clip().text) | {"width": 16, "heads": 2, "layers": 2},
            vision=dict(config.Clip().vision) | {"width": 16, "head_width": 8, "layers": 1},
        ),
        sample=config.Sample(height=16, width=16, frames=3),
    )


# ---------------------------------------------------------------------------------------------------
# The parts: each takes the run and gives its figures


def ceilings(state: Run) -> dict:
    """What the device does at best: a large product of random numbers, and a large copy."""
    n, length = (64, 1 << 10) if state.options.dry else (8192, 1 << 28)
    a, b = (torch.randn(n, n, device=state.device, dtype=state.dtype) for _ in range(2))
    source = torch.randn(length, device=state.device)
    target = torch.empty_like(source)
    times = state.times({"product": lambda: a @ b, "copy": lambda: target.copy_(source)})
    moved = 2 * source.numel() * source.element_size()
    return {
        "product_tflops": 2 * n**3 / times.median("product") / 1e12,
        "copy_gb_per_second": moved / times.median("copy") / 1e9,
    }


def micro_benchmarks(state: Run) -> dict:
    return micro.measure(state.settings, state.device, state.dtype, dry=state.options.dry)


def exactness(state: Run) -> dict:
    """float32 without TF32 against each other; then bfloat16 of each against diffusers' float32."""
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        wide = _both_predictions(state, torch.float32)
        narrow = _both_predictions(state, torch.bfloat16)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
    expected = wide.pop(THEIRS)
    return {
        "relative_l2": max(pair.distance(ours, expected) for ours in wide.values()),
        "relative_l2_by_mode": {mode: pair.distance(ours, expected) for mode, ours in wide.items()},
        "bfloat16_error": {side: pair.distance(out, expected) for side, out in narrow.items()},
    }


def _both_predictions(state: Run, dtype: torch.dtype) -> dict[str, Tensor]:
    both = state.pair(dtype, state.small)
    inputs, theirs = both.inputs(), both.theirs(state.peer)
    step = pair.their_step(theirs, inputs, state.small.sample.guidance)
    out = {THEIRS: pair.predictions(theirs, step, swap=True)}
    for mode, model in both.all_ours(modes.EAGER).items():
        out[mode] = pair.predictions(model.unet, pair.our_step(model, inputs))
    return out


def step(state: Run) -> dict:
    """One guidance step of both, eager, in turn; theirs also with its weights channels last."""
    both = state.pair()
    inputs, theirs = both.inputs(), both.theirs(state.peer)
    guidance = state.settings.sample.guidance
    models = both.all_ours(modes.EAGER)
    ways = {mode: pair.our_step(model, inputs) for mode, model in models.items()}
    plain = {THEIRS: pair.their_step(theirs, inputs, guidance)}
    peaks = {name: _peak(call, state) for name, call in (plain | ways).items()}
    times = state.times(plain | ways)
    for parameter in theirs.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    last = state.times({THEIRS_LAST: plain[THEIRS], **ways})
    return _timed(times) | {"channels_last": _timed(last), "peaks": peaks, "work": _work(state, ways)}


def _peak(call: Callable[[], Tensor], state: Run) -> dict[str, int]:
    """Bytes of all tensors at the widest moment of a call: above nothing, above what lay there, reserved."""
    call()
    if state.device.type != "cuda":
        return {"above": 1, "rise": 1, "reserved": 1}
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    most = torch.cuda.max_memory_allocated()
    return {"above": most, "rise": most - before, "reserved": torch.cuda.max_memory_reserved()}


def _work(state: Run, ours: dict) -> dict[str, int]:
    """FLOP of one guidance step, counted."""
    found = {THEIRS: count.count_theirs(state.peer.network, state.settings).flops}
    return found | {mode: count.count_ours(modes.EAGER[mode], state.settings).flops for mode in ours}


def whole_loop(state: Run) -> dict:
    return loop.measure(state.pair(), state.peer, modes.EAGER["default"], full=state.options.full)


def vae(state: Run) -> dict:
    """Decoding all frames in chunks: seconds and rise of memory."""
    settings = state.settings
    model = pair.random_part("vae", settings, state.device, state.dtype)
    latents = torch.randn(
        settings.sample.frames, settings.vae.embed_dim, *settings.latent_size, device=state.device
    )
    found = {}
    for chunk in (1, 2, 4):

        @torch.no_grad()
        def decode(chunk: int = chunk) -> Tensor:
            return model.decode(latents.to(state.dtype), chunk=chunk)

        peak = _peak(decode, state)
        times = state.times({"decode": decode})
        found[f"chunk {chunk}"] = {"seconds": times.median("decode"), **peak}
    return found


def memory_plans(state: Run) -> dict:
    """Every memory plan through the whole pipeline: what it was said to take and what it took, and how long.

    All parts in the run's dtype; `peak` is of all tensors on the device, weights included.
    """
    names = dict.fromkeys(("dtype", "vae_dtype", "encoder_dtype"), str(state.dtype)[6:])
    asked = pair.with_runtime(state.settings, names | {"device": state.device.type})
    asked = dataclasses.replace(asked, sample=dataclasses.replace(asked.sample, steps=PLAN_STEPS))
    ledger, noise = plans.Ledger(asked), np.random.default_rng(0)
    shape = asked.sample.height, asked.sample.width, 3
    picture = Image.fromarray(noise.integers(0, 256, shape, dtype=np.uint8))
    found = {}
    for plan in plans.PLANS:
        config = plans.settle(asked, plan, state.device.type)
        before = torch.cuda.memory_allocated() if state.device.type == "cuda" else 0
        model = _random_model(config, state.device)
        stamps: list[float] = []

        def run(model=model, stamps=stamps) -> Tensor:
            stamps.clear()
            return pipeline.generate(
                model, [picture], ["a boat"], [0], on_step=lambda step: stamps.append(_now(state.device))
            )

        peak = _peak(run, state)
        begun = _now(state.device)
        run()
        whole = _now(state.device) - begun
        step = median(b - a for a, b in itertools.pairwise(stamps))
        found[plan] = {
            "estimate": ledger.estimate(config, state.device.type).total,
            # The rise counts from what lay there before the run; under `full` these are the weights.
            "peak": peak["above"] - before,
            "step_seconds": step,
            "seconds_per_video": whole + (loop.STEPS - PLAN_STEPS) * step,
        }
        del model, run
        gc.collect()
    return found


def _random_model(config: Config, device: torch.device) -> pipeline.I2VGenXL:
    place = device if config.runtime.offload == "none" else "cpu"
    parts = (
        pair.random_part(name, config, device, plans.dtype(name, config.runtime), place=place)
        for name in checkpoint.PARTS
    )
    return pipeline.assemble(config, *parts, device)


def _now(device: torch.device) -> float:
    machine.wait(device)
    return time.perf_counter()


def compiled(state: Run) -> dict:
    """Both compiled; the wait for the compiler apart."""
    both = state.pair()
    inputs, theirs = both.inputs(), both.theirs(state.peer)
    ways = {THEIRS: pair.their_step(theirs, inputs, state.settings.sample.guidance)}
    other = both.theirs(state.peer)
    other.compile()
    ways[THEIRS_COMPILED] = pair.their_step(other, inputs, state.settings.sample.guidance)
    for mode, model in both.all_ours(modes.EAGER | modes.COMPILED).items():
        ways[mode] = pair.our_step(model, inputs)
    with _stance(state):
        waited = _first_calls(ways)
        times = state.times(ways)
    return _timed(times) | {"first_call_seconds": waited}


@contextlib.contextmanager
def _stance(state: Run) -> Iterator[None]:
    """A dry run leaves the compiler out: it would take minutes and say nothing."""
    if not state.options.dry:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def graph(state: Run) -> dict:
    """Ours played back from a recorded graph, against both eager; a dry run cannot record."""
    both = state.pair()
    inputs, theirs = both.inputs(), both.theirs(state.peer)
    ways = {THEIRS: pair.their_step(theirs, inputs, state.settings.sample.guidance)}
    for mode, model in both.all_ours(modes.EAGER | modes.GRAPH).items():
        ways[mode] = pair.our_step(model, inputs)
    waited = _first_calls(ways)
    times = state.times(ways)
    return _timed(times) | {"first_call_seconds": waited}


def trace(state: Run) -> dict:
    """Where the time of one step goes, by kernel (on a CPU by operation): milliseconds and calls."""
    both = state.pair()
    inputs, theirs = both.inputs(), both.theirs(state.peer)
    ways = {
        THEIRS: pair.their_step(theirs, inputs, state.settings.sample.guidance),
        "default": pair.our_step(both.ours({}), inputs),
    }
    found = {}
    for name, call in ways.items():
        call()
        with torch.profiler.profile() as profiler:
            call()
        rows = profiler.key_averages()
        if state.device.type == "cuda":
            taken = {row.key: (row.self_device_time_total / 1e3, row.count) for row in rows}
        else:
            taken = {row.key: (row.self_cpu_time_total / 1e3, row.count) for row in rows}
        found[name] = dict(sorted(taken.items(), key=lambda item: -item[1][0])[:SHOWN])
    return found


PARTS: dict[str, Callable[[Run], dict]] = {
    "ceilings": ceilings,
    "micro": micro_benchmarks,
    "exactness": exactness,
    "step": step,
    "loop": whole_loop,
    "vae": vae,
    "plans": memory_plans,
    "compiled": compiled,
    "graph": graph,
    "trace": trace,
}


def _first_calls(ways: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    seconds = {}
    for name, call in ways.items():
        begun = time.perf_counter()
        call().sum().item()  # waits for the device
        seconds[name] = round(time.perf_counter() - begun, 2)
    return seconds


def _timed(times: Times) -> dict:
    return {
        "seconds": {name: times.median(name) for name in times.rounds},
        "spread": {name: times.spread(name) for name in times.rounds},
    }


# ---------------------------------------------------------------------------------------------------
# The top of the report: from whatever parts have run

TOP = (
    "speedup_eager",
    "speedup_best_exact",
    "speedup_vs_compiled",
    "peak_memory_ratio",
    "relative_l2",
    "tflops_per_call",
    "roofline_fraction",
    "seconds_per_video",
    "vae_decode_seconds",
    "loop_overhead",
    "low_peak_gib",
    "low_to_full_time",
    "estimate_error",
)


def top(state: Run) -> dict:
    """Each ratio is of medians taken in turn in one part; a fast mode of another part is compared through
    the eager diffusers that ran beside it."""
    parts = state.found["parts"]
    values: dict = dict.fromkeys(TOP)
    eager, recorded = parts.get("step", {}), (parts.get("compiled", {}), parts.get("graph", {}))
    gains: dict[str, float] = {}
    if seconds := eager.get("seconds"):
        # Their best fair setting of the two.
        last = eager["channels_last"]["seconds"]
        theirs = min(1.0, last[THEIRS_LAST] / last["default"] * seconds["default"] / seconds[THEIRS])
        gains = {mode: theirs * seconds[THEIRS] / seconds[mode] for mode in modes.EAGER}
        best = min(modes.EAGER, key=seconds.get)
        values["speedup_eager"] = gains[best]
        values["peak_memory_ratio"] = eager["peaks"]["default"]["rise"] / eager["peaks"][THEIRS]["rise"]
        values["tflops_per_call"] = eager["work"][THEIRS] / 1e12
        if product := parts.get("ceilings", {}).get("product_tflops"):
            rate = eager["work"][best] / seconds[best] / 1e12
            values["roofline_fraction"] = rate / product
    for part in recorded:
        seconds = part.get("seconds", {})
        gains |= {
            mode: seconds[THEIRS] / taken
            for mode, taken in seconds.items()
            if mode in modes.COMPILED | modes.GRAPH
        }
    if gains:
        values["speedup_best_exact"] = max(gains.values())
    if seconds := parts.get("compiled", {}).get("seconds"):
        values["speedup_vs_compiled"] = max(gains.values()) * seconds[THEIRS_COMPILED] / seconds[THEIRS]
    values["relative_l2"] = parts.get("exactness", {}).get("relative_l2")
    figures = parts.get("loop", {})
    values |= {name: figures.get(name) for name in ("seconds_per_video", "loop_overhead")}
    values["vae_decode_seconds"] = figures.get("vae_decode_seconds")
    if by_plan := {name: taken for name, taken in parts.get("plans", {}).items() if name in plans.PLANS}:
        low, full = by_plan["low"], by_plan["full"]
        values["low_peak_gib"] = low["peak"] / GIB
        values["low_to_full_time"] = low["seconds_per_video"] / full["seconds_per_video"]
        values["estimate_error"] = max(abs(p["estimate"] / p["peak"] - 1) for p in by_plan.values())
    return {name: round(value, 8) if isinstance(value, float) else value for name, value in values.items()}


def tables(state: Run) -> tuple[Table, ...]:
    found = state.found
    shown = []
    for name in ("step", "compiled", "graph"):
        if seconds := found["parts"].get(name, {}).get("seconds"):
            rows = tuple(
                (way, f"{1e3 * taken:.1f}", f"{seconds[THEIRS] / taken:.2f}")
                for way, taken in seconds.items()
            )
            size = "x".join(map(str, found["size"]))
            shown.append(Table(f"{name} at {size}, {found['dtype']}", ("", "ms", "speedup"), rows))
    if micros := found["parts"].get("micro", {}).get("milliseconds"):
        rows = tuple((way, "-" if ms is None else f"{ms:.3f}") for way, ms in micros.items())
        shown.append(Table("micro-benchmarks", ("", "ms"), rows))
    rows = [
        (part, f"{figures['wall_seconds']:.1f}", found["failed"].get(part, ""))
        for part, figures in found["parts"].items()
    ]
    shown.append(Table("parts", ("", "s", "failed"), tuple(rows)))
    figures = tuple((name, "none" if found[name] is None else f"{found[name]:.4g}") for name in TOP)
    shown.append(Table(f"{found['case']} on {found['device']}", ("", "figure"), figures))
    return tuple(shown)
