"""Train one part of the model: the autoencoder, CLIP, or the video UNet.

    i2vgen train configs/train/NAME.yaml output=FOLDER [setting=value ...] [--resume]

    i2vgen train configs/train/tiny_vae.yaml
    i2vgen train configs/train/tiny_clip.yaml
    i2vgen train configs/train/tiny_diffusion.yaml train.steps=200 output=outputs/longer
    i2vgen train configs/train/tiny_diffusion.yaml train.data=FOLDER_OF_VIDEOS output=outputs/mine
    i2vgen train weights=weights/xl train.data=prepared output=outputs/mine train.validate=0.05
    i2vgen train weights=weights/xl train.data=prepared output=outputs/adapter train.lora_rank=16
    torchrun --nproc-per-node 2 -m i2vgen train configs/train/tiny_diffusion.yaml

    train.NAME=         training settings; names and defaults are in i2vgen/training/settings.py
    train.data=         world, the procedural clips; a folder of videos; or what `i2vgen prepare` made of one
    train.validate=     a folder, or a fraction of train.data, to measure every train.validate_every steps
    train.things=       pictures of things instead of flat shapes: a colour-emoji font, or a folder of PNG
                        cut-outs with alpha; train.backgrounds=FOLDER puts them on photographs, too
    weights=FOLDER      parts to start from; those not trained are copied, diffusion needs vae and clip
    output=FOLDER       checkpoints, log.jsonl, samples, and weights/, a native weights folder; best/ with
                        train.validate
    plugins=FILE.py     a Python file that changes the model after it is built: docs/laboratory.md
    --print-config      print the merged settings as YAML and stop
    --plan              print the memory that these settings and leaner ones take, counted, and stop; with
                        device=cuda for a GPU that need not be here
    --resume            require a checkpoint, and allow changed training settings (never another model)

A run whose output folder already holds its checkpoints continues from the newest one automatically.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import torch
import yaml
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from i2vgen import cli
from i2vgen.fast import machine, runtime
from i2vgen.fast.processes import leave, own_device
from i2vgen.files import whole
from i2vgen.memory.free import free_memory
from i2vgen.settings.wording import counted
from i2vgen.training import clip, data, diffusion, loop, plans, shards, vae
from i2vgen.training.prepared import is_prepared, read_facts
from i2vgen.training.settings import SECTION, WORLD, load_settings

FLAGS = ("--print-config", "--plan", "--resume")
PARTS = {"diffusion": diffusion.make, "vae": vae.make, "clip": clip.make}


def main(argv: list[str]) -> int:
    file, overrides, flags = cli.split(argv, FLAGS)
    config, train = load_settings(file, overrides)
    if "--print-config" in flags:
        own = {SECTION: {k: list(v) if isinstance(v, tuple) else v for k, v in vars(train).items()}}
        print(yaml.safe_dump(own, sort_keys=False) + config.to_yaml(), end="")
        return 0
    refuse_nameless(config, train)
    rank, ranks, local = processes()
    if "--plan" in flags:
        print(plans.table(train, planned_place(config, train, ranks), plans.Ledger(config)))
        return 0
    if rank == 0:
        cli.tell_plugins(config)
    if not config.output:
        raise ValueError("no output given; name a folder with output=")
    whole.check_folder("output=", config.output)
    loop.open_folder(Path(config.output), config, train, resume="--resume" in flags)  # rejects another run's
    shards.check(train, ranks)
    config = own_device(config, local, ranks)
    device = runtime.device(config.runtime)
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.ERROR, format="%(message)s")
    runtime.apply(config.runtime)
    if device.type != "cpu" or local == 0:  # the processes of a machine share the CPU's memory
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", ranks)) if device.type == "cpu" else 1
        free = free_memory(device) // beside
        needed = plans.refuse(config, train, planned_place(config, train, ranks), free, plans.Ledger(config))
        if rank == 0:
            print(f"memory of each process, counted: {needed}")

    if ranks > 1:
        shards.join(device)
    try:
        source = data.open_source(config, train)
        data.refuse_too_few(source, train, ranks)
        part = PARTS[train.part](config, train, source, device)
        count = sum(p.numel() for p in part.model.parameters())
        with (
            logging_redirect_tqdm(),  # log lines beside the bar, not in it
            tqdm(total=train.steps, unit="step", disable=rank > 0, mininterval=0.5) as bar,
        ):
            if rank == 0:
                shared = counted(ranks, "process")
                bar.write(
                    f"{train.part}: {count:,} parameters on {device}, {shared}, in "
                    f"{machine.precision(loop.precision(train, device), device)}",
                    file=sys.stdout,
                )
            weights = loop.fit(
                part,
                config,
                train,
                source,
                config.output,
                device=device,
                rank=rank,
                ranks=ranks,
                resume="--resume" in flags,
                on_step=lambda step, figures: advance(bar, step, figures),
            )
    except RuntimeError as error:
        if ranks > 1 and shards.peer_gone(error):
            raise ValueError(
                f"process {rank} of {ranks} stops, because another one ended (its own message says why); the "
                f"same command resumes from the newest checkpoint in {config.output}"
            ) from error
        raise
    finally:
        if ranks > 1:
            leave()
    if rank == 0:
        print(f"{cli.shown(weights)} holds the weights after {train.steps} steps")
        if (best := weights.parent / "best").is_dir():
            print(f"{cli.shown(best)} holds those with the lowest loss on the clips for validation")
    return 0


def refuse_nameless(config, train) -> None:
    """ValueError for prepared clips without the weights that encoded them."""
    lacking = train.part == "diffusion" and not config.weights and train.data != WORLD
    if lacking and is_prepared(folder := Path(train.data)):
        weights = cli.shown(read_facts(folder)["weights"])
        raise ValueError(
            f"train.data={folder} was prepared with weights={weights}; give them here too, with weights="
        )


def processes() -> tuple[int, int, int]:
    """This process's number, how many there are, and its number on this machine, as torchrun says."""
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    return tuple(int(os.environ.get(name, default)) for name, default in names.items())


def planned_place(config, train, ranks: int) -> plans.Place:
    """Where the training is to run, as the planner wants it; a GPU that is not here computes in bf16."""
    name, encoded = config.runtime.device, train.data != WORLD and is_prepared(Path(train.data))
    if name.startswith("cuda") and not torch.cuda.is_available():
        dtype = torch.float32 if train.precision == "float32" else torch.bfloat16
        return plans.Place("cuda", dtype, ranks, encoded)
    device = runtime.device(config.runtime)
    return plans.Place(device.type, loop.precision(train, device), ranks, encoded)


def advance(bar: tqdm, step: int, figures: dict[str, float]) -> None:
    bar.n = step
    bar.set_postfix(loss=f"{figures['loss']:.4f}", refresh=False)
    bar.update(0)
