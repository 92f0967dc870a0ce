"""Compare the cost of a guidance step with diffusers, using the same settings and the same random weights.

    i2vgen bench case=NAME [mode=infer|train|savings] [full=true] [parts=A,B] [dry=true] [json=OUT]

    i2vgen bench case=count json=outputs/count.json
    i2vgen bench case=cpu-small json=outputs/small.json
    i2vgen bench case=gpu-704p parts=ceilings,step,loop full=true json=outputs/gpu.json

    case=count      FLOPs, bytes, operations, peak activation memory at the official size, without weights
    case=memory     GPU memory used by each memory plan at the official size, counted part by part
    case=parallel   what each of several cards computes and sends for one clip (runtime.parallel), counted
    case=cpu-small  timed on one CPU thread: widths 64 to 256, at 8x16x16 and 8x32x32 (frames x latent)
    case=cpu-mid    half the official widths, 8x16x16
    case=cpu-full   the official widths, 1.42 billion parameters, 4x16x16; needs 10 GB of memory
    case=gpu-256p   on one GPU, bfloat16, 448 x 256 pixels, 16 frames; in parts, at most ten minutes
    case=gpu-704p   the same at 1280 x 704
    parts=          for GPU cases, a list of ceilings, micro, exactness, step, savings, loop, vae, plans,
                    compiled, graph, trace
    dry=true        run a GPU case small and on the CPU, to check that every part works
    mode=savings    (cpu and count) each exact saving left out in turn: what it is worth, minutes
    mode=train      time forward, backward and optimiser step, with and without gradient checkpointing
    dtype=bfloat16  (cpu) both sides in float32 and in this precision, with the error beside every speed; with
                    mode=train our training at 64 and 128 channels, in clips per second
    full=true       also whole 50-step loops and both sides compiled; takes minutes longer
    against=        the implementation to compare with: diffusers
    json=           file for all figures; its top level holds the ratios

docs/performance.md has the figures.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from i2vgen import cli
from i2vgen.bench.cases import CASES, check
from i2vgen.bench.half import DTYPES
from i2vgen.bench.peer import MODES, Options, Peer
from i2vgen.bench.report import Report
from weights_conversion import unet_diffusers

AGAINST = ("diffusers",)
NAMES = ("case", "mode", "dtype", "full", "parts", "dry", "against", "json")
SWITCH = ("true", "false")


def main(argv: list[str]) -> int:
    file, words, _ = cli.split(argv)
    if file is not None:
        raise ValueError(
            f"{file!r} is no name=value; a case is chosen by case=NAME, NAME {' or '.join(CASES)}"
        )
    given = cli.take_all(words, texts=NAMES)
    if "case" not in given:
        raise ValueError(f"case= is missing; choose {' or '.join(CASES)}")
    case = cli.choose("case", given["case"], CASES)
    cli.choose("against", given.get("against", "diffusers"), AGAINST)
    out = cli.check_file("json", given["json"], argv) if "json" in given else None
    options = options_of(case, given, out)

    report = CASES[case](diffusers_side(), options)
    print("\n\n".join(map(str, report.tables)))
    if out is not None:
        report.write(out)
        print(f"\nfigures in {cli.shown(out)}")
    return 0


def options_of(case: str, given: dict[str, str], out: Path | None) -> Options:
    """Rejects options that the case does not support, before any work."""
    options = Options(
        mode=cli.choose("mode", given.get("mode", "infer"), MODES),
        full=cli.choose("full", given.get("full", "false"), SWITCH) == "true",
        dtype=cli.choose("dtype", given.get("dtype", "float32"), DTYPES),
        parts=tuple(given["parts"].split(",")) if "parts" in given else (),
        dry=cli.choose("dry", given.get("dry", "false"), SWITCH) == "true",
    )
    check(case, options)
    # Saved after every part, so that an interrupted run keeps its results.
    keep = None if out is None else (lambda found: Report(found, ()).write(out))
    return dataclasses.replace(options, save=keep)


def diffusers_side() -> Peer:
    try:
        import diffusers
        from diffusers import I2VGenXLUNet
    except ImportError as error:
        raise ValueError(
            f"against=diffusers needs the package diffusers ({error}): python -m pip install diffusers"
        ) from None
    return Peer(I2VGenXLUNet, unet_diffusers.to_theirs, diffusers.__version__)
