"""What the processes of tests/test_parallel.py do: networks and roads compared, commands, and a breakdown."""

import contextlib
import dataclasses
import io
import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import SMALL

from i2vgen import __main__ as door
from i2vgen import pipeline
from i2vgen.fast import parallel, savings
from i2vgen.fast.processes import leave
from i2vgen.files import checkpoint
from i2vgen.model.conditioning import Conditions, Encoded, Unconditional
from i2vgen.model.layers import GroupNorm
from i2vgen.settings import config as settings
from i2vgen.settings import shipped

CONDITIONED = settings.Clip(text={"context_length": 7, "width": 16, "heads": 2, "layers": 2}, embed_dim=12)
VAE = settings.VAE(base_width=8, width_multipliers=(1, 2), blocks_per_level=1, norm_groups=4)


def road(frames, *, parallel_="none", use=None, moved_grid=1, **runtime):
    """A whole road without its encoders, in float64, as `load_parts` would put it together."""
    interval, prediction = runtime.pop("guidance_interval", (0.0, 1.0)), runtime.pop("prediction", "v")
    sample = settings.Sample(width=24, height=16, frames=frames, steps=2, guidance_interval=interval)
    config = settings.Config(
        use=use or settings.Use(),
        unet=dataclasses.replace(SMALL, moved_grid=moved_grid),
        vae=VAE,
        clip=CONDITIONED,
        schedule=settings.Schedule(prediction=prediction),
        sample=sample,
        runtime=settings.Runtime(dtype="float64", vae_dtype="float64", parallel=parallel_, **runtime),
        weights="random",
    )
    ranks = parallel.join(config)
    parts = [checkpoint.load(p, config, device="cpu", dtype=torch.float64) for p in ("unet", "vae")]
    if parts[0].flow_out is not None:  # random ones move pixels by whole frames, which multiplies rounding
        parts[0].flow_out.requires_grad_(False).weight.mul_(0.1)
    return pipeline.assemble(config, *parts, None, torch.device("cpu"), ranks=ranks)


def conditions(b):
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(b, *shape, generator=generator, dtype=torch.float64)

    vector, latent, fps = normal(12), normal(4, 8, 12), torch.full((b,), 8)
    cond = Conditions(normal(7, 16), vector, latent, fps)
    return Encoded(cond, Unconditional(normal(7, 16), torch.zeros_like(vector), latent, fps))


def made(model, clips=1):
    """-> latents, and pixels before rounding"""
    latents = pipeline.sample(model, [], [], list(range(clips)), conditions=conditions(clips))
    return latents, pipeline._decoded(model, latents, lambda part: part.movedim(0, 1))


def equal():
    """Largest difference of latents and of pixels from one process, in each case"""
    world, found = dist.get_world_size(), {}
    cases = {
        "even": (4, {}),
        "uneven": (7, {}),
        "plain networks": (5, {"savings": ("none",)}),
        "one batch": (5, {"batch_guidance": True}),
        "two clips": (4, {}),
        "guidance in an interval": (4, {"guidance_interval": (0.3, 1.0)}),
        "frame positions": (4, {"use": settings.Use(frame_positions=True)}),
        "from the picture": (4, {"use": settings.Use(output="from_picture"), "prediction": "x0"}),
        "moved": (4, {"use": settings.Use(output="moved"), "prediction": "x0"}),
        "moved finely": (4, {"use": settings.Use(output="moved"), "prediction": "x0", "moved_grid": 2}),
        "a path less": (4, {"use": settings.Use(concat=False, temporal_convolution=False)}),
    }
    splits = {2: ("frames", "guidance", "auto"), 4: ("frames", "both", "auto")}[world]
    if world == 4:  # of four processes on two cores only what two do not show
        cases = {name: cases[name] for name in ("even", "uneven")}
    for name, (frames, changes) in cases.items():
        clips = 1 + (name == "two clips")
        plain = made(road(frames, **changes), clips)
        for split in splits if name == "uneven" else splits[:1] if "interval" not in name else splits[:2]:
            model = road(frames, parallel_=split, **changes)
            pairs = zip(made(model, clips), plain, strict=True)
            found[f"{name}, {split}"] = [float((a - b).abs().max()) for a, b in pairs]
            if name == "uneven":
                found[f"sent, {split}"] = model.ranks.sent / 2  # of two steps

    if world == 4:
        return {"differences": found}
    split_norm = parallel.SplitGroupNorm.forward
    parallel.SplitGroupNorm.forward = GroupNorm.forward  # statistics of a share alone
    pairs = zip(made(road(7, parallel_="frames")), made(road(7)), strict=True)
    found["planted mistake"] = [float((a - b).abs().max()) for a, b in pairs]
    parallel.SplitGroupNorm.forward = split_norm

    model = road(4, parallel_="frames")
    refused = {}
    for name, change in {
        "hook": lambda: model.unet.mid1.res.conv1.register_forward_hook(lambda *_: None),
        "gradients": torch.enable_grad,
        "few frames": lambda: dataclasses.replace(model.config.sample, frames=1),
    }.items():
        held = change()
        try:
            if name == "few frames":
                model.with_settings(frames=1)
            with held if name == "gradients" else contextlib.nullcontext():
                pipeline.network(model, *conditions(1))(torch.zeros(1, 4, 4, 8, 12), torch.tensor([5]))
        except ValueError as error:
            refused[name] = str(error)
        if name == "hook":
            held.remove()
    # A module that is not ours might mix frames.
    unet = road(4).unet
    unet.mid1.res = torch.nn.Identity()
    try:
        parallel.apply(unet, model.ranks)
    except ValueError as error:
        refused["a module of one's own"] = str(error)
    network = road(4, parallel_="frames").unet
    savings.remove(network)
    plain_again = type(network).__name__, type(network.mid1.temporal_conv.stages[0].norm).__name__
    return {"differences": found, "refused": refused, "removed": plain_again}


def commands(lines):
    """Each the words of a command, or a file to remove before the next -> what this process said"""
    told = []
    for words in lines:
        if isinstance(words, str):
            if os.environ["RANK"] == "0":  # which decides what is left to do
                Path(words).unlink()
            continue
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try:
                status = door.main(words)
            except SystemExit as end:
                status = end.code
        told.append([status, out.getvalue()])
    return told


def found(rank, *, killed):
    """`equal` in a process of tests/processes.py -> what every process found, and what this one then said

    `killed`: of a clip that follows, in the middle of which the last process is killed.
    """
    dist.init_process_group("gloo")
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, equal())
    leave()
    said = io.StringIO()
    if killed:
        os.environ["TORCHELASTIC_RUN_ID"] = "none"  # a command asks by this whether it has company
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            assert fails("killed") == 2
    return every, said.getvalue()


def fails(how):
    """The last process breaks down in the middle of a clip -> exit status"""
    if os.environ["RANK"] == "1":

        def breaks(info):
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise FloatingPointError("latents are not finite after step 1")

        generate = pipeline.I2VGenXL.generate

        def breaking(model, *inputs, on_step):
            return generate(model, *inputs, on_step=breaks)

        pipeline.I2VGenXL.generate = breaking
    words = ["weights=lab", "steps=2", "device=cpu", "parallel=frames", "output=never.gif"]
    return door.main(["generate", *words, f"image={shipped.STAR}", "prompt=a star"])
