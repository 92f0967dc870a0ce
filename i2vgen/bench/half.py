"""Cases `cpu-*` with `dtype=bfloat16`: both sides in both precisions, in one run on one thread.

Half precision has an error of its own, so it is measured beside every speed: against our float32 step, whose
error is a thousand times smaller.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import nn

from i2vgen import pipeline
from i2vgen.bench import count, modes, pair
from i2vgen.bench.peer import Peer
from i2vgen.bench.report import Report, Table
from i2vgen.bench.timing import interleaved, thread_clock
from i2vgen.diffusion.loss import training_loss
from i2vgen.fast import half
from i2vgen.files import checkpoint
from i2vgen.settings import config
from i2vgen.settings.config import Config

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROUNDS = 5
PRODUCT = 1024  # rows and columns of the product that the roofline is measured with
THEIRS = "diffusers"
TRAINED = (64, 128)  # channels of the finest level of the networks that `mode=train` trains
CLIPS, FRAMES, SIDE = 8, 16, 8  # their batch, in latents


def steps(name: str, sizes: list[Config], peer: Peer, dtype: str) -> Report:
    """A guidance step of every size; the top holds the worst of them."""
    product = product_rate(DTYPES[dtype])
    found = [step(settings, peer, dtype, product) for settings in sizes]
    worst = {
        key: min(one[key] for one in found)
        for key in ("speedup_eager", "speedup_best_exact", "speedup_vs_float32", "roofline_fraction")
    }
    values = {
        **worst,
        "error_ratio": max(one["error_ratio"] for one in found),
        "relative_l2": max(one["errors"][one["best_exact"]] for one in found),
        "case": name,
        "mode": "infer",
        "dtype": dtype,
        "threads": 1,
        "torch": torch.__version__,
        "diffusers": peer.version,
        "product_gflops": round(product / 1e9, 1),
        "sizes": found,
    }
    return Report(values, tuple(_table(name, one) for one in found))


def step(settings: Config, peer: Peer, dtype: str, product: float) -> dict:
    ways, outputs, guidance = {}, {}, settings.sample.guidance
    for label in ("float32", dtype):
        both = pair.make_pair(settings, CPU, DTYPES[label])
        inputs, theirs = both.inputs(), both.theirs(peer)
        way = f"{THEIRS} {label}"
        ways[way] = pair.their_step(theirs, inputs, guidance)
        outputs[way] = pair.predictions(theirs, ways[way], swap=True)
        for mode, model in both.all_ours(modes.CPU).items():
            way = f"{mode} {label}"
            ways[way] = pair.our_step(model, inputs)
            outputs[way] = pair.predictions(model.unet, ways[way])
    expected = outputs["default float32"].double()
    errors = {way: pair.distance(out.double(), expected) for way, out in outputs.items()}
    times = interleaved(ways, rounds=ROUNDS)
    best = times.best([f"{mode} {dtype}" for mode in modes.CPU])
    work = count.count_ours(modes.CPU[best.removesuffix(f" {dtype}")], settings).flops
    rows, columns = settings.latent_size
    eager = round(times.ratio(f"{THEIRS} {dtype}", best), 3)
    return {
        "size": [settings.sample.frames, rows, columns],
        "speedup_eager": eager,
        "speedup_best_exact": eager,
        "speedup_vs_float32": round(times.ratio(f"{THEIRS} float32", best), 3),
        "error_ratio": round(errors[best] / errors[f"{THEIRS} {dtype}"], 3),
        "roofline_fraction": round(work / times.median(best) / product, 3),
        "best_exact": best,
        "seconds": {way: times.median(way) for way in ways},
        "rounds": {way: list(seconds) for way, seconds in times.rounds.items()},
        "errors": errors,
    }


def product_rate(dtype: torch.dtype) -> float:
    """FLOP per second of a product on one thread, the best of several."""
    a = torch.randn(PRODUCT, PRODUCT).to(dtype)
    return 2 * PRODUCT**3 / min(thread_clock(lambda: a @ a) for _ in range(9))


def _table(name: str, one: dict) -> Table:
    slowest = one["seconds"][f"{THEIRS} float32"]
    rows = tuple(
        (way, f"{seconds:.3f}", f"{slowest / seconds:.2f}", f"{one['errors'][way]:.1e}")
        for way, seconds in one["seconds"].items()
    )
    size = "x".join(map(str, one["size"]))
    title = f"{name} {size}: one guidance step, one thread, seconds of thread time"
    return Table(title, ("", "median", "speedup", "rel. L2 to float32"), rows)


# ---------------------------------------------------------------------------------------------------
# Training


def training(dtype: str) -> Report:
    """Forward, backward and AdamW of our network, as the trainer takes them, in float32 and in `dtype`."""
    found: dict[str, dict[str, float]] = {}
    for base in TRAINED:
        ways = {label: trained_step(base, DTYPES[label]) for label in ("float32", dtype)}
        times = interleaved(ways, rounds=3)
        found[f"base {base}"] = {
            **{f"{label} clips per second": round(CLIPS / times.median(label), 3) for label in ways},
            "ratio": round(times.ratio("float32", dtype), 3),
        }
    values = {
        "clips_per_second": {base: one[f"{dtype} clips per second"] for base, one in found.items()},
        "speedup_vs_float32_training": {base: one["ratio"] for base, one in found.items()},
        "mode": "train",
        "dtype": dtype,
        "size": [FRAMES, SIDE, SIDE],
        "threads": 1,
        "torch": torch.__version__,
        "bases": found,
    }
    rows = tuple((base, *(f"{value:.3g}" for value in one.values())) for base, one in found.items())
    title = f"training on {CLIPS} clips of {FRAMES}x{SIDE}x{SIDE} latents, one thread, clips per second"
    return Report(values, (Table(title, ("", "float32", dtype, "ratio"), rows),))


def trained_step(base: int, dtype: torch.dtype) -> Callable[[], None]:
    """-> a call that takes one optimiser step of a network with two levels"""
    unet_settings = config.UNet(
        base_width=base, width_multipliers=(1, 2), attention_levels=(True, True), head_width=32
    )
    settings = Config(unet=unet_settings)
    unet = checkpoint.build("unet", settings)
    checkpoint.fill(unet, checkpoint.random_state(unet, seed=1))
    unet.train().requires_grad_(True)
    for module in unet.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if dtype in half.HALF:
        half.prepare_training(unet)
    optimiser = torch.optim.AdamW(unet.parameters(), lr=1e-5, fused=True)
    sample = config.Sample(frames=FRAMES, width=8 * SIDE, height=8 * SIDE)
    inputs = pair.make_inputs(dataclasses.replace(settings, sample=sample), CPU, torch.float32)
    x, noise = (torch.randn(CLIPS, *inputs.x.shape[1:]) for _ in range(2))
    cond = type(inputs.cond)(*(one.expand(CLIPS, *one.shape[1:]) for one in inputs.cond))
    schedule, t = pipeline.make_schedule(settings), torch.full((CLIPS,), 500)

    def step() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = training_loss(
                lambda x, t: unet(x, t, unet.prepare(cond, FRAMES)), x, t, noise, schedule
            ).mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step
