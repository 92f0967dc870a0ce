"""The measurements of a study: cost of a variant, its quality with the base's weights and after training."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

import i2vgen
from i2vgen import pipeline
from i2vgen.evaluation import evaluate, pages
from i2vgen.evaluation.drift import Sampled, counting
from i2vgen.evaluation.evaluate import Plan
from i2vgen.fast import runtime, savings
from i2vgen.files import checkpoint, fingerprint, plugins, whole
from i2vgen.files.pages import animated
from i2vgen.lab import own_clips, summary, trace
from i2vgen.lab import study as studies
from i2vgen.lab.study import Budget, Run, Study
from i2vgen.memory.meter import Meter
from i2vgen.scoring.scores import load_judges
from i2vgen.settings.config import Config
from i2vgen.settings.merge import load_config
from i2vgen.training import data, diffusion, loop

RESULT, CLIPS, CODE = "result.json", "clips.json", "code.json"
SHOWN = 3  # clips of a run on the study's page
BATCH = 8  # clips per batch when sampling


# ---------------------------------------------------------------------------------------------------
# Cost: counted on `meta`, and timed side by side


def cost(study: Study, budget: Budget) -> dict[str, dict]:
    """Per variant: parameters, FLOPs and activation peak (bytes) of the UNet, seconds per call, ratio to
    base.

    Times are CPU seconds of this thread; calls of the variants alternate, so that fluctuations of the machine
    affect all of them alike.
    """
    configs = {name: cost_config(study, name, budget) for name in study.variants}
    found, calls = {}, {}
    for name, config in configs.items():
        network = checkpoint.build("unet", config).eval().requires_grad_(False)
        with torch.no_grad(), Meter() as meter:
            summary.unet(network, config, torch.float32)
        by_part = {part: sum(p.numel() for p in m.parameters()) for part, m in network.named_children()}
        found[name] = {
            "parameters": sum(by_part.values()),
            "parameters_by_part": by_part,
            "flops": meter.flops,
            "activation_peak": meter.peak,
        }
        calls[name] = one_call(config)
    seconds: dict[str, list[float]] = {name: [] for name in configs}
    for call in calls.values():
        call()  # warm-up
    for turn in range(budget.rounds):
        order = list(calls) if turn % 2 == 0 else list(reversed(calls))
        for name in order:
            start = time.thread_time()
            calls[name]()
            seconds[name].append(time.thread_time() - start)
    for name, times in seconds.items():
        ratios = [mine / base for mine, base in zip(times, seconds[study.base], strict=True)]
        found[name] |= {"seconds": statistics.median(times), "time_ratio": statistics.median(ratios)}
    return found


def cost_config(study: Study, variant: str, budget: Budget) -> Config:
    """The settings to measure: of the training if the study trains, else of the base's weights."""
    if "trained" in study.measures:
        config = studies.trained(study, variant, budget, 0)[0]
    else:
        config = studies.untrained(study, variant, budget)
    return dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, device="cpu"))


def one_call(config: Config) -> Callable[[], object]:
    """-> a function that calls a UNet of random weights once."""
    unet = checkpoint.build("unet", config)
    checkpoint.fill(unet, checkpoint.random_state(unet, seed=0), dtype=torch.float32)
    unet.eval().requires_grad_(False)
    savings.apply(unet, config.runtime)
    x, (t, *_), conditions = trace.inputs(unet, config, 1)
    prepared = unet.prepare(conditions, config.sample.frames)

    def call():
        with torch.no_grad():
            return unet(x, t, prepared)

    return call


# ---------------------------------------------------------------------------------------------------
# One run in its folder


def perform(study: Study, run: Run, budget: Budget, device: str) -> Path:
    """Do a run unless it is finished -> its result file. A killed training is resumed."""
    result = run.folder / RESULT
    if finished(study, run, budget):
        return result
    run.folder.mkdir(parents=True, exist_ok=True)
    if not begun(run):
        whole.write_json(run.folder / CODE, studies.code())
    start = time.perf_counter()
    if run.measure == "untrained":
        config, loss = studies.untrained(study, run.variant, budget), None
    else:
        weights, loss = train_variant(study, run, budget, device)
        sample = [f"sample.steps={budget.sample_steps}"] if budget.sample_steps else []
        named = studies.plugged_in(study, run.variant).plugins
        config = dataclasses.replace(load_config(None, sample, **weights), plugins=named)
    settings = dataclasses.replace(config.runtime, device=device, batch=BATCH)
    config = dataclasses.replace(config, runtime=settings)
    scored = (of_own_clips if study.evaluate else of_world)(study, run, budget, pipeline.load_parts(config))
    facts = {
        "variant": run.variant,
        "measure": run.measure,
        "seed": run.seed,
        "fingerprint": studies.identity(study, run, budget),
        **scored,
        "loss": loss,
        "seconds": round(time.perf_counter() - start, 1),
        "made_by": made_by(device),
        **({"plugins": plugins.described(config)} if config.plugins else {}),
    }
    whole.write_json(result, facts, indent=1)
    return result


def of_world(study: Study, run: Run, budget: Budget, model: pipeline.I2VGenXL) -> dict:
    """Score the model on the drawn world, as `i2vgen evaluate` does -> part of the run's result."""
    plan, sampled = evaluate.suited(Plan(clips=budget.clips), model.config), Sampled()
    with counting(model.unet, sampled):
        found = evaluate.evaluate(model, plan)
    pages.write_report(found, run.folder)
    chosen = [one for one in found.shown if one.item.set == "basic"][:SHOWN]
    save_shown(run.folder, [(one.item.caption, one.truth, one.frames) for one in chosen])
    batches = math.ceil(len(evaluate.items(plan)) / BATCH)
    scores = found.scores
    return {"scores": scores.values, "intervals": scores.intervals, "calls": sampled.whole // batches}


def of_own_clips(study: Study, run: Run, budget: Budget, model: pipeline.I2VGenXL) -> dict:
    """Score the model on the study's held-out clips -> part of the run's result."""
    job = own_clips.judged(study.evaluate, str(model.device))
    clips, sampled = own_clips.read(study.evaluate["videos"], model.config, budget.clips), Sampled()
    with counting(model.unet, sampled):
        found = own_clips.evaluate(model, clips, job, load_judges(job), SHOWN)
    save_shown(run.folder, [(clip.caption, clip.truth, frames) for clip, frames in found.shown])
    rows = [{"caption": clip.caption, **row} for clip, row in zip(clips, found.rows, strict=True)]
    calls = sampled.whole // math.ceil(len(clips) / BATCH)
    return {"scores": found.values, "intervals": found.intervals, "calls": calls, "clips": rows}


def made_by(device: str) -> dict[str, str]:
    """What the lab book says of a run's machine and code."""
    cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"{platform.machine()} CPU, {cpu_name()}",
        "torch": torch.__version__,
        "i2vgen": i2vgen.__version__,
        "code": fingerprint.of_text(json.dumps(studies.code())),
    }


def cpu_name() -> str:
    """As Linux tells it; elsewhere what Python knows."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.system()


def finished(study: Study, run: Run, budget: Budget) -> bool:
    """Whether the run has a result; ValueError if it is the result of other settings."""
    result = run.folder / RESULT
    if not result.exists():
        return False
    held = json.loads(result.read_text(encoding="utf-8"))["fingerprint"]
    if held != studies.identity(study, run, budget):
        raise ValueError(
            f"{run.folder} holds the result of another study, budget or base; choose another output="
        )
    return True


def begun(run: Run) -> bool:
    """Whether the run has a result, or checkpoints that it would go on from."""
    return (run.folder / RESULT).exists() or bool(loop.checkpoints(run.folder / "train"))


def changed_code(run: Run) -> list[str]:
    """The source files that have changed since the run began; empty if it has not begun, or none has."""
    if not begun(run):
        return []
    try:
        then = json.loads((run.folder / CODE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ["unknown files, since an earlier version began the run"]
    now = studies.code()
    return sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))


def train_variant(
    study: Study, run: Run, budget: Budget, device: str
) -> tuple[dict[str, str], list[tuple[int, float]]]:
    """Train a variant's UNet with the base's VAE and CLIP -> its weights and adapter, (step, loss) pairs."""
    config, train = studies.trained(study, run.variant, budget, run.seed)
    parts = ("vae", "clip") if study.start == "scratch" else checkpoint.PARTS
    held = {part: dict(checkpoint.read_part(study.weights, part)) for part in parts}
    # Variants of different architecture start from the same parts, so each run saves its own settings with
    # them.
    start = checkpoint.save(run.folder / "start", held, config, origin=checkpoint.read_origin(study.weights))
    config = dataclasses.replace(
        config, weights=str(start), runtime=dataclasses.replace(config.runtime, device=device)
    )
    place = torch.device(device)
    source = data.open_source(config, train)
    part = diffusion.make(config, train, source, place)
    made = str(loop.fit(part, config, train, source, run.folder / "train", device=place))
    weights = {"weights": str(start), "adapter": made} if train.lora_rank else {"weights": made}
    log = (run.folder / "train" / loop.LOG).read_text(encoding="utf-8")
    lines = [json.loads(line) for line in log.splitlines()]
    return weights, [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]


def save_shown(folder: Path, clips: Sequence[tuple[str, np.ndarray, np.ndarray]]) -> None:
    """Save what the study's page shows of a run: captions, and true beside generated clips, animated.

    `clips` are captions, true and generated frames, both uint8 [f H W 3].
    """
    told = []
    for number, (caption, truth, frames) in enumerate(clips):
        told.append({"caption": caption, "file": f"clip_{number}.png"})
        with whole.replacing(folder / told[-1]["file"]) as temporary:
            temporary.write_bytes(animated([truth, frames]))
    whole.write_json(folder / CLIPS, told)


def devices() -> list[str]:
    """Devices to run one worker on each: every GPU, or the CPU once per core."""
    if torch.cuda.is_available():
        return [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return ["cpu"] * (os.cpu_count() or 1)


def work(study: Study, run: Run, budget: Budget, device: str) -> Path:
    """`perform` for a worker process, with one thread."""
    torch.set_num_threads(1)
    runtime.apply(load_config(None).runtime)
    return perform(study, run, budget, device)
