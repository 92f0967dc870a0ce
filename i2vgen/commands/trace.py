"""Record a run module by module, and find where two runs first differ.

    i2vgen trace [config.yaml] [weights=FOLDER] [output=FILE.jsonl] [against=FILE.jsonl]
    [setting=value ...]

    i2vgen trace output=outputs/before.jsonl       change something, then:
    i2vgen trace against=outputs/before.jsonl      prints the first module whose output differs

    i2vgen trace configs/tiny.yaml weights=random unet.image_vector_width=64 clip.embed_dim=64 \\
        use.concat_gain=1.0 against=diffusers                  ours against diffusers' class, same weights

    output=     file for mean, deviation, minimum and maximum of every module's output, one line per call
    against=    such a file, or `diffusers`
    tolerance=  largest allowed difference of these figures, relative to the largest value; default 1e-5
    calls=      number of UNet calls, at evenly spaced timesteps, noisiest first; default 1

The UNet runs on a fixed random latent and random conditions. Its modules use their plain forms, so that each
is called. Without weights= the shipped model is used. The exit status is 1 if the runs differ.
"""

from __future__ import annotations

from pathlib import Path

import torch

from i2vgen import cli
from i2vgen.fast import runtime
from i2vgen.files import checkpoint
from i2vgen.lab import trace
from i2vgen.settings.config import RANDOM, Config
from i2vgen.settings.merge import load_config

DIFFUSERS = "diffusers"


def main(argv: list[str]) -> int:
    file, words, _ = cli.split(argv)
    given, words = cli.take(words, numbers=("calls",), texts=("against", "tolerance", "output"))
    config = load_config(file, words, sampling=True)
    calls, tolerance = cli.at_least_one("calls", given.get("calls", 1)), above_zero(given, "tolerance", 1e-5)
    against = given.get("against", "")
    output = cli.check_file("output", given["output"], argv) if "output" in given else None
    other, names = None, {}
    if against and against != DIFFUSERS:
        other = trace.read(Path(against))

    device, dtype = runtime.device(config.runtime), runtime.dtype(config.runtime)
    unet = checkpoint.load("unet", config, device=device, dtype=dtype)
    if against == DIFFUSERS:
        other, names = of_diffusers(unet, config, calls)
    found = trace.of_unet(unet, config, calls)
    print(f"{len(found)} outputs of {len({r.path for r in found})} modules")
    if output is not None:
        trace.write(found, output)
        print(f"written to {cli.shown(output)}")
    if broken := [r for r in found if r.broken]:
        print(f"first values that are not finite: {broken[0].path}, {broken[0].broken} of {broken[0].shape}")
    if other is None:
        return 0
    parting, compared = trace.compare(found, other, tolerance=tolerance, names=names)
    print(f"{compared} calls compared")
    if against != DIFFUSERS:  # its modules are divided differently
        for side, here, there in (("this run", found, other), (against, other, found)):
            if only := trace.missing(here, there):
                print(f"{len(only)} modules in {side} only, the first: {only[0]}")
    if parting is None:
        print(f"none differs by more than {tolerance:g}")
        return 0
    print(f"first difference, {parting.difference:.2g}, at {parting.first.path} (call {parting.first.call}):")
    for side, record in (("this run", parting.first), (against, parting.second)):
        figures = ", ".join(f"{name} {getattr(record, name):.6g}" for name in trace.FIGURES)
        print(f"    {side}: {record.shape} {figures}")
    return 1


def above_zero(given: dict[str, str], name: str, default: float) -> float:
    try:
        value = float(given.get(name, default))
    except ValueError:
        value = -1
    if value <= 0:
        raise ValueError(f"{name} is {given[name]}; give a number above 0")
    return value


def of_diffusers(unet, config: Config, calls: int):
    """The trace of diffusers' class with our weights, and the map from its module names to ours."""
    from i2vgen.bench.count import their_unet
    from weights_conversion import rules, unet_diffusers

    try:
        from diffusers import I2VGenXLUNet
    except ImportError as error:
        raise ValueError(
            f"against=diffusers needs the package diffusers ({error}): python -m pip install diffusers"
        ) from None
    fixed = {"first_temporal_heads": 8, "num_global_tokens": config.unet.in_channels, "concat_heads": 2,
             "image_vector_width": config.unet.context_width}  # fmt: skip
    for name, value in fixed.items():
        if getattr(config.unet, name) != value:
            raise ValueError(
                f"unet.{name} is {getattr(config.unet, name)}; diffusers' class supports only {value}. Use a "
                f"model of that shape, for example configs/tiny.yaml weights={RANDOM}"
            )
    with torch.device("meta"):
        theirs = their_unet(I2VGenXLUNet, config)
    rows = unet_diffusers.rows(config.unet)
    theirs.load_state_dict(rules.to_theirs(rows, unet.state_dict()), strict=True, assign=True)
    names = {row.theirs.rpartition(".")[0]: row.ours[0].rpartition(".")[0] for row in rows}
    x, times, conditions = trace.inputs(unet, config, calls)
    planes = [conditions.image_latent]
    last = max(config.sample.frames - 1, 1)
    planes += [torch.full_like(planes[0], k / last) for k in range(1, config.sample.frames)]
    with torch.no_grad(), trace.Trace(theirs.eval()) as seen:
        for t in times:
            theirs(
                x,
                timestep=t,
                fps=conditions.fps,
                image_latents=torch.stack(planes, dim=2),
                image_embeddings=conditions.image_vector,
                encoder_hidden_states=conditions.text,
                return_dict=False,
            )
    return seen.records, names
