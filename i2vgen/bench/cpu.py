"""Cases `cpu-*`: one guidance step against diffusers on one thread of a CPU, in float32.

Both sides have the same random weights and inputs, their outputs are compared before anything is timed, and
each is timed at the best of its own settings. A case of several sizes reports the worst of them at its top.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from i2vgen.bench import count, half, leave_one_out, loop, memory, modes, pair, train
from i2vgen.bench.peer import Options, Peer
from i2vgen.bench.report import Report, Table
from i2vgen.bench.timing import Times, interleaved
from i2vgen.settings import config
from i2vgen.settings.config import Config

CPU, DTYPE = torch.device("cpu"), torch.float32
ROUNDS = 5
THEIRS, THEIRS_COMPILED = "diffusers", "diffusers, compiled"

Size = tuple[int, int, int]  # frames, latent rows, latent columns


@dataclass(frozen=True)
class Case:
    model: Config
    sizes: tuple[Size, ...]
    memory_size: Size | None  # None: the weights alone would fill two more processes
    train_size: Size | None  # None: weights, gradients and moments of both sides would not fit


def model(base_width: int, head_width: int, vae_width: int) -> Config:
    unet = config.UNet(base_width=base_width, head_width=head_width)
    return Config(unet=unet, vae=config.VAE(base_width=vae_width))


CASES = {
    "cpu-small": Case(model(64, 64, 32), ((8, 16, 16), (8, 32, 32)), (16, 32, 32), (4, 16, 16)),
    # Half of everything: 160 channels hold no whole number of heads of 64.
    "cpu-mid": Case(model(160, 32, 64), ((8, 16, 16),), (8, 16, 16), (4, 8, 8)),
    "cpu-full": Case(model(320, 64, 128), ((4, 16, 16),), None, None),
}


def config_of(case: Case, size: Size) -> Config:
    (frames, rows, columns), factor = size, case.model.vae.factor
    sample = config.Sample(frames=frames, height=factor * rows, width=factor * columns)
    return dataclasses.replace(case.model, sample=sample)


def check(name: str, options: Options) -> None:
    """ValueError before anything is built."""
    if options.parts or options.dry:
        raise ValueError(f"case={name} has no parts= and no dry=; they belong to the gpu cases")
    if options.dtype != "float32" and (options.mode == "savings" or options.full):
        raise ValueError(
            f"dtype={options.dtype} measures steps and mode=train; leave mode=savings, full= out"
        )
    if options.dtype != "float32" and options.mode == "train":
        return  # its networks are its own
    if options.mode == "train" and CASES[name].train_size is None:
        raise ValueError(f"case={name} mode=train needs 40 GB for both sides; use cpu-small or cpu-mid")
    if options.mode != "infer" and options.full:
        raise ValueError(f"full=true runs whole loops of sampling; leave it out with mode={options.mode}")


def run(name: str, peer: Peer, options: Options) -> Report:
    case = CASES[name]
    if options.dtype != "float32":
        torch.set_num_threads(1)
        if options.mode == "train":
            return half.training(options.dtype)
        return half.steps(name, [config_of(case, size) for size in case.sizes], peer, options.dtype)
    return measure(case, name, peer, options)


def measure(case: Case, name: str, peer: Peer, options: Options) -> Report:
    torch.set_num_threads(1)
    if options.mode == "savings":
        return leave_one_out.timed(name, [config_of(case, size) for size in case.sizes])
    if options.mode == "train":
        return train.report(config_of(case, case.train_size), peer, CPU, name)
    product = half.product_rate(DTYPE)
    found = [step(config_of(case, size), peer, product, full=options.full) for size in case.sizes]
    ratio, sizes = memory_of(case, peer)
    both = pair.make_pair(config_of(case, case.sizes[0]), CPU, DTYPE)
    whole = loop.measure(both, peer, modes.EAGER["batched"], full=options.full)
    top = {
        "speedup_eager": min(one["speedup_eager"] for one in found),
        "speedup_best_exact": min(one["speedup_best_exact"] for one in found),
        "speedup_vs_compiled": min(one["speedup_vs_compiled"] for one in found) if options.full else None,
        "peak_memory_ratio": ratio,
        "relative_l2": max(one["relative_l2"] for one in found),
        "tflops_per_call": [one["tflops_per_call"] for one in found],
        "roofline_fraction": min(one["roofline_fraction"] for one in found),
    }
    values = {
        **top,
        **whole,
        "case": name,
        "mode": "infer",
        "dtype": "float32",
        "threads": 1,
        "torch": torch.__version__,
        "diffusers": peer.version,
        "product_gflops": round(product / 1e9, 1),
        "memory": sizes,
        "sizes": found,
    }
    return Report(values, (*(_steps(one, name) for one in found), _top(values)))


def step(settings: Config, peer: Peer, product: float, *, full: bool) -> dict:
    """One size: outputs compared, then timed in turn; `full` compiles both sides too, minutes of waiting."""
    both = pair.make_pair(settings, CPU, DTYPE)
    inputs, theirs = both.inputs(), both.theirs(peer)
    ways = {THEIRS: pair.their_step(theirs, inputs, settings.sample.guidance)}
    expected = pair.predictions(theirs, ways[THEIRS], swap=True)
    errors = {}
    for mode, model in both.all_ours(modes.CPU | modes.COMPILED if full else modes.CPU).items():
        ways[mode] = pair.our_step(model, inputs)
        errors[mode] = pair.distance(pair.predictions(model.unet, ways[mode]), expected)
    if full:
        other = both.theirs(peer)
        other.compile()
        ways[THEIRS_COMPILED] = pair.their_step(other, inputs, settings.sample.guidance)
    times = interleaved(ways, rounds=ROUNDS)
    return summary(settings, peer, times, errors, product)


def summary(settings: Config, peer: Peer, times: Times, errors: dict[str, float], product: float) -> dict:
    eager = times.best(list(modes.CPU))
    exact = times.best([name for name in times.rounds if name not in (THEIRS, THEIRS_COMPILED)])
    their_work = count.count_theirs(peer.network, settings).flops
    our_work = count.count_ours(modes.CPU[eager], settings).flops
    rows, columns = settings.latent_size
    return {
        "size": [settings.sample.frames, rows, columns],
        "speedup_eager": round(times.ratio(THEIRS, eager), 3),
        "speedup_best_exact": round(times.ratio(THEIRS, exact), 3),
        "speedup_vs_compiled": round(times.ratio(THEIRS_COMPILED, exact), 3)
        if THEIRS_COMPILED in times.rounds
        else None,
        "best_eager": eager,
        "best_exact": exact,
        "relative_l2": max(errors.values()),
        "tflops_per_call": round(their_work / 1e12, 8),
        "our_tflops_per_call": round(our_work / 1e12, 8),
        # Our own work, not the larger number that diffusers does for the same result.
        "roofline_fraction": round(our_work / times.median(exact) / product, 3),
        "seconds": {name: times.median(name) for name in times.rounds},
        "rounds": {name: list(seconds) for name, seconds in times.rounds.items()},
        "ratios": {name: round(times.ratio(THEIRS, name), 3) for name in times.rounds},
        "errors": errors,
    }


def memory_of(case: Case, peer: Peer) -> tuple[float | None, dict | None]:
    """Growth of a process, ours / theirs, and both in bytes."""
    if case.memory_size is None or not memory.measurable():
        return None, None
    config = config_of(case, case.memory_size)
    found = {THEIRS: memory.growth_of_theirs(config, peer)}
    found |= {mode: memory.growth_of_ours(config, changed) for mode, changed in modes.CPU.items()}
    return round(found["default"] / found[THEIRS], 3), {"size": list(case.memory_size)} | found


def _steps(one: dict, name: str) -> Table:
    rows = []
    for way, seconds in one["seconds"].items():
        taken, error = one["rounds"][way], one["errors"].get(way)
        rows.append(
            (
                way,
                f"{seconds:.3f}",
                f"{min(taken):.3f}-{max(taken):.3f}",
                f"{one['ratios'][way]:.2f}",
                "" if error is None else f"{error:.1e}",
            )
        )
    size = "x".join(map(str, one["size"]))
    title = f"{name} {size}: one guidance step, float32, one thread, seconds of thread time"
    return Table(title, ("", "median", "range", "speedup", "rel. L2"), tuple(rows))


def _top(values: dict) -> Table:
    names = [
        n for n, value in values.items() if isinstance(value, float | int) and not isinstance(value, bool)
    ]
    rows = tuple((name, f"{values[name]:.4g}") for name in names)
    return Table("ours against diffusers, the worst of the sizes", ("", "figure"), rows)
