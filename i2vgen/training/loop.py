"""One resumable training loop for all parts: optimiser, average, precision, checkpoints, log.

A run is a function of its settings and the step: the clips, noise and dropout of a batch come from generators
seeded with the run's seed and the batch number. A checkpoint therefore needs no generator states, and a
killed run resumes bit-identically on the same machine.

    OUT/checkpoint-00001000/state.safetensors   weights, average, moments of the optimiser
    OUT/checkpoint-00001000/state.json          step, settings, gradient scaler, losses not yet logged
    OUT/checkpoint-00001000/*.distcp            instead of state.safetensors, under train.shard=full
    OUT/log.jsonl                               one line per `log_every` steps: means since the last line
    OUT/weights/                                native weights folder, of the average if there is one;
                                                OUT/adapter/ if only adapters are trained
    OUT/samples/                                sample strips, if `sample_every` is set
    OUT/best/                                   with `validate`: the weights, or the adapter, with the lowest
                                                validation loss so far
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from i2vgen.fast import half, machine
from i2vgen.files import checkpoint, lock, plugins, whole
from i2vgen.files.safefile import Entry, write_safetensors
from i2vgen.settings.config import ARCHITECTURE, LITERALS, STRUCTURAL_SWITCHES, Config
from i2vgen.settings.merge import flat
from i2vgen.training import data, optimisers, shards, validation
from i2vgen.training.data import Clips, Source
from i2vgen.training.settings import FREE, Bucket, Train, buckets

LOGGER = logging.getLogger(__name__)
STATE, FACTS, LOG = "state.safetensors", "state.json", "log.jsonl"
CHECKPOINT = re.compile(r"checkpoint-(\d{8})")
# Keys that make the random streams of a step independent.
BUCKET_STREAM, INPUT_STREAM, DROPOUT_STREAM, MOMENT_STREAM = 0, 1, 2, 3


@dataclass(frozen=True)
class Part:
    """What the loop needs to know to train one part of the model."""

    name: str  # one of checkpoint.PARTS, or "adapter"
    model: nn.Module  # the module to train, in float32 on its device
    step: nn.Module  # holds `model`; forward(*inputs) -> {"loss": scalar, other figures}
    inputs: Callable[[Clips, torch.Generator], tuple]  # prepares a batch, without gradients
    source: Source | None = None  # replaces the run's source; gives what `inputs` takes
    slow: frozenset[str] = frozenset()  # parameters to which `spatial_factor` applies
    saved: nn.Module | None = None  # the module to save, if it is not `model` itself
    others: Mapping[str, nn.Module | Mapping[str, Tensor]] = field(default_factory=dict)  # also saved
    strip: Callable[[], np.ndarray] | None = None  # samples with the present weights, uint8 [H W 3]
    finish: Callable[[Config], Config] = lambda config: config  # settings to save with the weights
    # Saves the model and its origin, instead of writing a weights folder.
    write: Callable[[Path, dict], Path] | None = None
    held_out: validation.HeldOut | None = None  # clips for validation


@dataclass
class State:
    """Everything that changes from step to step, and so goes into a checkpoint."""

    step: int
    parameters: dict[str, nn.Parameter]  # of a sharded model: this process's parts, as `ema` and moments
    optimiser: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: dict[str, Tensor]  # exponential moving average, on `train.ema_device`; empty if there is none
    pending: list[dict[str, float]]  # figures of the steps since the last log line
    best: tuple[float, int] = (math.inf, 0)  # lowest validation loss, and its step


def fit(
    part: Part,
    config: Config,
    train: Train,
    source: Source,
    folder: str | Path,
    *,
    device: torch.device,
    rank: int = 0,
    ranks: int = 1,
    resume: bool = False,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> Path:
    """Train to `train.steps`, from the newest checkpoint in `folder` if there is one -> the weights folder.

    `resume` requires a checkpoint and allows the training settings, but not the architecture, to differ from
    it. `on_step` is called with (steps done, figures) after every step. ValueError if `folder` holds another
    run or another process trains there; FloatingPointError if the loss is not finite.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with lock.locked(folder) if rank == 0 else contextlib.nullcontext():
        return _fit(part, config, train, source, folder, device, rank, ranks, resume, on_step)


def _fit(
    part: Part,
    config: Config,
    train: Train,
    source: Source,
    folder: Path,
    device: torch.device,
    rank: int,
    ranks: int,
    resume: bool,
    on_step: Callable[[int, dict[str, float]], None] | None,
) -> Path:
    sharded = train.shard == "full"
    state = start(part, train, device)
    if device.type == "cpu" and precision(train, device) in half.HALF:
        half.prepare_training(part.step)
    contents = data.contents(source)
    newest = open_folder(folder, config, train, resume=resume, contents=contents)
    if ranks > 1:
        shards.agree("checkpoints", None if newest is None else newest.name)
    if newest is None and (folder / LOG).exists():
        LOGGER.warning(
            "%s holds a log but no checkpoint (train.save_every = %d steps lie between them), so training "
            "starts at step 0", folder, train.save_every,
        )  # fmt: skip
    if newest is not None:
        restore(newest, state, part.model)
        LOGGER.info("%s: continuing from %s, step %d", folder, newest.name, state.step)
        if resume and best_is_later(folder, state.step):
            state.best = (math.inf, 0)  # best/ is of the run that this one departs from
    step = part.step
    if ranks > 1 and not sharded:
        step = DistributedDataParallel(
            step,
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,  # the buckets that are sent are the gradients, not a copy
        )
    kinds = buckets(config, train)
    if rank == 0:
        whole.sweep(folder, alone=True)  # nobody else may train in this folder
    writer = Log(folder, state.step) if rank == 0 else None
    part.step.train()

    def plan(index: int) -> tuple[Bucket, list[int]]:
        bucket = kinds[data.derived_seed(train.seed, index // train.accumulate, BUCKET_STREAM) % len(kinds)]
        first = (index * ranks + rank) * max(kind.batch for kind in kinds)
        return bucket, list(range(first, first + bucket.batch))

    with contextlib.ExitStack() as stack:
        if writer is not None:
            stack.enter_context(writer)
        saver = stack.enter_context(shards.Saver(rank)) if sharded else None
        draw = _batch_reader(part.source or source, plan, train, stack)

        @torch.no_grad()
        def make(index: int) -> tuple:
            stream = data.generator(*_stream_key(train, index, rank, ranks), INPUT_STREAM)
            return part.inputs(draw(index), stream)

        ready = Batches(make, in_advance=device.type == "cuda")
        while state.step < train.steps:
            figures = update(part, step, state, train, ready, device=device, rank=rank, ranks=ranks)
            state.pending.append(figures)
            if not math.isfinite(figures["loss"]):
                raise FloatingPointError(
                    f"the loss is {figures['loss']} at step {state.step}; lower train.learning_rate or set "
                    "train.precision=float32, and restart from the last checkpoint"
                )
            last = state.step == train.steps
            if last or state.step % train.log_every == 0:
                if writer is not None:
                    writer.write(state.step, state.pending)
                state.pending = []
            if saver is not None:
                saver.look()
            if part.held_out and (last or state.step % train.validate_every == 0):
                validate(part, state, config, train, folder, writer, device=device, rank=rank, ranks=ranks)
            if (rank == 0 or sharded) and (last or state.step % train.save_every == 0):
                save(folder, state, part.model, config, train, contents, saver)
                save_weights(folder, state, part, config, train, rank=rank)
            if (rank == 0 or sharded) and train.sample_every and state.step % train.sample_every == 0:
                save_strip(folder, state, part, writer)
            if on_step is not None:
                on_step(state.step, figures)
    if sharded:
        torch.distributed.barrier()  # until the weights are there, so that all see the same
    place = folder / (part.name if part.write else "weights")
    gone = not place.is_dir() if part.write else part.name in checkpoint.missing_parts(place)
    if (rank == 0 or sharded) and gone:  # the run was killed just before writing them
        save_weights(folder, state, part, config, train, rank=rank)
    return place


def _batch_reader(source: Source, plan, train: Train, stack: contextlib.ExitStack) -> Callable[[int], Clips]:
    if not train.workers:
        return lambda index: source(*plan(index))
    if not train.cache:
        return stack.enter_context(data.Prefetcher(source, plan, train.workers))
    ahead = stack.enter_context(data.Prefetcher(source.source, plan, train.workers))
    return lambda index: source(*plan(index), drawn=lambda: ahead(index))


class Batches:
    """Batch number -> arguments of the part's step; with `in_advance` the next batch is prepared on the CPU
    while the GPU computes.
    """

    def __init__(self, make: Callable[[int], tuple], *, in_advance: bool):
        self.make, self.in_advance = make, in_advance
        self.made: dict[int, tuple] = {}

    def __call__(self, index: int) -> tuple:
        return self.made.pop(index) if index in self.made else self.make(index)

    def ahead(self, index: int) -> None:
        if self.in_advance:
            self.made = {index: self.make(index)}


def validate(
    part: Part,
    state: State,
    config: Config,
    train: Train,
    folder: Path,
    log: Log | None,
    *,
    device: torch.device,
    rank: int,
    ranks: int,
) -> None:
    """Measure the average, or the weights if there is none, on the held-out clips, and keep the best."""
    dtype = precision(train, device)
    half_on = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    with averaged(part.model, state.ema), evaluating(part.step), half_on:
        figures = part.held_out.measure(part.step, device=device, rank=rank, ranks=ranks)
    loss = figures[validation.LOSS]
    better = loss < state.best[0]
    if better:
        state.best = (loss, state.step)
        if rank == 0 or train.shard == "full":
            save_weights(folder, state, part, config, train, rank=rank, name="best")
    if log is not None:
        log.add(state.step, {**figures, "best_step": state.best[1]})


def best_is_later(folder: Path, step: int) -> bool:
    """Whether best/ was written after this step, by a run whose log is about to be cut here."""
    log = folder / LOG
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    later = (json.loads(line) for line in lines if step < _step_of(line) < math.inf)
    return any(line.get("best_step") == line["step"] for line in later)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Context in which the module and all in it are in eval mode."""
    modes = {one: one.training for one in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for one, training in modes.items():
            one.training = training


def _stream_key(train: Train, index: int, rank: int, ranks: int) -> tuple[int, int]:
    """The key of a batch's random streams: two ranks draw what one rank draws in two batches."""
    return train.seed, index * ranks + rank


# ---------------------------------------------------------------------------------------------------
# One update


def start(part: Part, train: Train, device: torch.device) -> State:
    """The state before the first step; ValueError if `part.slow` names no parameter of the model."""
    model = checkpoint.inner(part.model)
    parameters = {name: shards.handle(parameter) for name, parameter in model.named_parameters()}
    if unknown := part.slow - parameters.keys():
        raise ValueError(f"{part.name} has no parameter {sorted(unknown)[0]}")
    factor = train.spatial_factor if train.spatial_scale_mode == "lr" else 1.0
    groups = [
        {"params": [p for n, p in parameters.items() if (n in part.slow) == slow], "scale": scale}
        for slow, scale in ((False, 1.0), (True, factor))
    ]
    optimiser = optimisers.make(train, [group for group in groups if group["params"]], device)
    scaler = torch.amp.GradScaler(device.type, enabled=precision(train, device) == torch.float16)
    place = {"device": "cpu"} if train.ema_device == "cpu" else {}
    held = model.state_dict() if train.ema else {}
    ema = {name: shards.local(t).detach().to(**place, copy=True) for name, t in held.items()}
    return State(0, parameters, optimiser, scaler, ema, [])


def update(
    part: Part,
    step: nn.Module,
    state: State,
    train: Train,
    ready: Batches,
    *,
    device: torch.device,
    rank: int,
    ranks: int,
) -> dict[str, float]:
    """One optimiser step over `accumulate` batches -> its figures, averaged over batches and ranks."""
    dtype, sums = precision(train, device), {}
    for micro in range(train.accumulate):
        index = state.step * train.accumulate + micro
        inputs = ready(index)
        # Dropout layers use the global generator.
        torch.manual_seed(data.derived_seed(*_stream_key(train, index, rank, ranks), DROPOUT_STREAM))
        last = micro == train.accumulate - 1
        # Shards of gradients are summed in every pass, because a whole gradient would fit no process.
        wait = (
            step.no_sync() if ranks > 1 and not last and train.shard == "none" else contextlib.nullcontext()
        )
        with wait:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                figures = step(*inputs)
            state.scaler.scale(figures["loss"] / train.accumulate).backward()
        for name, value in figures.items():
            wide = torch.promote_types(value.dtype, torch.float32)
            sums[name] = sums.get(name, 0) + value.detach().to(wide) / train.accumulate

    state.scaler.unscale_(state.optimiser)
    model = checkpoint.inner(part.model)
    if train.spatial_scale_mode == "grad":
        for name, parameter in model.named_parameters():
            if name in part.slow and parameter.grad is not None:
                shards.local(parameter.grad).mul_(train.spatial_factor)
    norm = shards.clip(model, state.parameters, train.clip_norm or math.inf)
    rate = learning_rate(train, state.step)
    for group in state.optimiser.param_groups:
        group["lr"] = rate * group["scale"]
    # Moments of few bits are rounded at random, alike in all processes.
    torch.manual_seed(data.derived_seed(train.seed, state.step, MOMENT_STREAM))
    state.scaler.step(state.optimiser)
    state.scaler.update()
    state.optimiser.zero_grad(set_to_none=True)
    model.zero_grad(set_to_none=True)
    state.step += 1
    if state.ema and (state.step % train.ema_every == 0 or state.step == train.steps):
        average(state.ema, model.state_dict(), decay_since_last(train, state.step))
    if state.step < train.steps:
        ready.ahead(state.step * train.accumulate)

    values = torch.stack(list(sums.values()))
    if ranks > 1:
        torch.distributed.all_reduce(values)
        values /= ranks
    return dict(zip([*sums, "grad_norm"], [*values.tolist(), norm.item()], strict=True)) | {"lr": rate}


def learning_rate(train: Train, step: int) -> float:
    """The rate of update `step`, counted from 0: linear warm-up starting above 0, then the decay."""
    if step < train.warmup:
        return train.learning_rate * (step + 1) / train.warmup
    if train.decay == "constant":
        return train.learning_rate
    progress = (step - train.warmup) / max(1, train.steps - train.warmup)
    return train.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def ema_decay(train: Train, step: int) -> float:
    """The decay of the weights' average at update `step`, counted from 0."""
    return min(train.ema, (1 + step) / (10 + step)) if train.ema_warmup else train.ema


def decay_since_last(train: Train, done: int) -> float:
    """The decay over the updates since the average last moved, when `done` have been made."""
    last = (done - 1) // train.ema_every * train.ema_every
    return math.prod(ema_decay(train, step) for step in range(last, done))


@torch.no_grad()
def average(ema: dict[str, Tensor], state: Mapping[str, Tensor], decay: float) -> None:
    """ema <- decay ema + (1 - decay) state, in place; integer tensors are copied."""
    pairs = [(tensor, shards.local(state[name])) for name, tensor in ema.items()]
    here = [(kept, new) for kept, new in pairs if kept.is_floating_point() and kept.device == new.device]
    if here:
        torch._foreach_lerp_(*zip(*here, strict=True), 1 - decay)
    for kept, new in pairs:
        if not kept.is_floating_point():
            kept.copy_(new)
        elif kept.device != new.device:
            kept.lerp_(new.to(kept.device), 1 - decay)


def precision(train: Train, device: torch.device) -> torch.dtype:
    """The dtype for autocast; float32 means no autocast."""
    if train.precision == "auto":
        if device.type == "cpu":
            return torch.bfloat16 if machine.bfloat16_pays() else torch.float32
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[train.precision]


@contextlib.contextmanager
def averaged(model: nn.Module, ema: Mapping[str, Tensor]) -> Iterator[None]:
    """Context in which the model holds its average, if there is one, and is in eval mode."""
    parts = {name: shards.local(tensor).detach() for name, tensor in _state(model).items()} if ema else {}
    held = {name: part.clone() for name, part in parts.items()}
    for name, part in parts.items():
        part.copy_(ema[name])
    try:
        with evaluating(model):
            yield
    finally:
        for name, part in parts.items():
            part.copy_(held[name])


# ---------------------------------------------------------------------------------------------------
# Checkpoints


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first. Unfinished ones have another name; damaged ones are ignored."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if CHECKPOINT.fullmatch(p.name) and _facts(p) is not None)


def _facts(path: Path) -> dict | None:
    """The contents of state.json, or None if the checkpoint is incomplete."""
    try:
        facts = json.loads((path / FACTS).read_text(encoding="utf-8"))
        return facts if _bytes(path) == facts["bytes"] else None
    except (OSError, json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError, RecursionError):
        LOGGER.warning("%s is damaged; ignoring it", path)
        return None


def _bytes(path: Path) -> int:
    """The size of a checkpoint's tensors."""
    files = shards.files(path) if shards.is_sharded(path) else [path / STATE]
    return sum(file.stat().st_size for file in files)


def open_folder(
    folder: Path,
    config: Config,
    train: Train,
    *,
    resume: bool,
    contents: Mapping[str, str] | None = None,
) -> Path | None:
    """The checkpoint to resume from, or None; ValueError names the setting in which another run differs.

    `contents`, from `data.contents`, is compared too where it is given.
    """
    checkpoint.check_place(folder / "weights")
    found = checkpoints(folder)
    if not found:
        if resume:
            raise ValueError(f"{folder} holds no checkpoint to resume")
        for name in ("weights", "adapter", *(["best"] if train.validate else [])):
            if (folder / name).exists():
                raise ValueError(f"{folder} holds finished {name} but no checkpoint; choose another output")
        log = folder / LOG
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
        if lines and _step_of(lines[0]) == math.inf:
            raise ValueError(f"{log} is no log of a training and would be replaced; choose another output")
        return None
    facts = _facts(found[-1])
    before = {**training_record(Train()), **facts["settings"]}  # older runs lack newer settings
    for name, here, there in _differences(settings_record(config, train), before):
        refused = _architectural(name, here, there)
        if resume and not refused:
            continue
        advice = "" if refused else ", or resume anyway with --resume"
        raise ValueError(f"{name} is {here} here but {there} in {found[-1]}; choose another output{advice}")
    for what, there in facts.get("contents", {}).items():
        if not resume and contents and contents.get(what) != there:
            raise ValueError(
                f"{_home(train, what)} holds other {what} than when {found[-1]} was saved; choose another "
                "output, or resume anyway with --resume"
            )
    return found[-1]


def _home(train: Train, what: str) -> str:
    """The setting that names the place of some contents."""
    homes = {"things": "things", "backgrounds": "backgrounds", "validation": "validate"}
    name = homes.get(what.partition(" ")[0], "data")
    return f"train.{name}={getattr(train, name)}"


def settings_record(config: Config, train: Train) -> dict[str, object]:
    """All settings that affect what is learned, flattened: `unet.base_width` -> 320."""
    record = {k: v for k, v in config.to_dict().items() if k not in LITERALS and k != "runtime"}
    record["negative_prompt"] = config.negative_prompt
    record |= {"plugins": plugins.described(config)} if config.plugins else {}
    return dict(flat(record)) | training_record(train)


def training_record(train: Train) -> dict[str, object]:
    own = json.loads(json.dumps(dataclasses.asdict(train)))
    return dict(flat({"train": {name: value for name, value in own.items() if name not in FREE}}))


def _differences(here: dict, there: dict) -> list[tuple[str, object, object]]:
    names = [*here, *(name for name in there if name not in here)]
    return [(n, here.get(n), there.get(n)) for n in names if here.get(n) != there.get(n)]


def _architectural(name: str, here: object, there: object) -> bool:
    section, _, leaf = name.partition(".")
    return (
        section in ARCHITECTURE
        or (name == "use.output" and "moved" in (here, there))  # the only one with a layer of its own
        or (section == "use" and leaf in STRUCTURAL_SWITCHES)
        or name in ("train.part", "train.moments")
    )


def save(
    folder: Path,
    state: State,
    model: nn.Module,
    config: Config,
    train: Train,
    contents: Mapping[str, str] | None = None,
    saver: shards.Saver | None = None,
) -> Path:
    """Write a checkpoint, whole or not at all; a damaged one of this step is replaced.

    With a `saver` all processes write their shards, in the background. Older checkpoints than `train.keep`
    go once the new one is there.
    """
    place, tensors = folder / f"checkpoint-{state.step:08d}", _tensors(state, model)
    facts = {
        "step": state.step,
        "scaler": state.scaler.state_dict(),
        "pending": state.pending,
        "best": list(state.best) if state.best[1] else None,
        "settings": settings_record(config, train),
        "contents": dict(contents or {}),
    }

    def finish(temporary: Path) -> None:
        whole.write_json(temporary / FACTS, facts | {"bytes": _bytes(temporary)}, indent=1)

    if saver is not None:
        saver.save(place, tensors, finish, lambda: prune(folder, train.keep))
        return place
    with whole.replacing_folder(place, sync=True) as temporary:
        entries = [Entry(n, tuple(t.shape), t.dtype, lambda t=t: t) for n, t in tensors.items()]
        write_safetensors(temporary / STATE, entries)
        finish(temporary)
    prune(folder, train.keep)
    return place


def _state(model: nn.Module) -> Mapping[str, Tensor]:
    return checkpoint.inner(model).state_dict()


def _tensors(state: State, model: nn.Module) -> dict[str, Tensor]:
    held = _state(model)
    tensors = {f"model/{n}": t for n, t in held.items()}
    tensors |= {f"ema/{n}": shards.like(t, held[n]) for n, t in state.ema.items()}
    for name, parameter in state.parameters.items():
        moments = state.optimiser.state.get(parameter, {})
        tensors |= {f"{key}/{name}": shards.like(t, held[name]) for key, t in moments.items()}
    return tensors


def restore(path: Path, state: State, model: nn.Module) -> None:
    """Load a checkpoint into state and model, tensor by tensor; ValueError if it is damaged or unfit.

    It may have been written with or without shards, by any number of processes.
    """
    facts = _facts(path)
    try:
        names = _names(path)
        if {n for n in names if n.startswith("model/")} != {f"model/{n}" for n in _state(model)}:
            raise ValueError(f"{path} holds other tensors than the model; choose another output")
        for name, parameter in state.parameters.items():
            if f"step/{name}" in names:
                state.optimiser.state[parameter] = optimisers.blank(state.optimiser, parameter)
        targets = _tensors(state, model)
        found = {name: targets[name] for name in targets if name in names}
        if shards.is_sharded(path):
            shards.load(path, found)
        else:
            with safe_open(path / STATE, "pt") as file:
                for name, target in found.items():
                    shards.copy_into(target, file.get_tensor(name))
    except (SafetensorError, KeyError) as error:
        raise ValueError(
            f"{path / STATE} is damaged ({error}); remove {path} to resume from the checkpoint before it"
        ) from error
    for name, tensor in state.ema.items():
        source = "ema" if f"ema/{name}" in names else "model"
        tensor.copy_(shards.local(targets[f"{source}/{name}"]).detach())
    if facts["scaler"] and state.scaler.is_enabled():
        state.scaler.load_state_dict(facts["scaler"])
    state.step, state.pending = facts["step"], facts["pending"]
    state.best = tuple(facts.get("best") or state.best)


def _names(path: Path) -> set[str]:
    if shards.is_sharded(path):
        return shards.stored_names(path)
    with safe_open(path / STATE, "pt") as file:
        return set(file.keys())


def prune(folder: Path, keep: int) -> None:
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def save_weights(
    folder: Path, state: State, part: Part, config: Config, train: Train, *, rank: int = 0, name: str = ""
) -> Path:
    """Write OUT/weights, or `name`: the trained part (its average, if any) and those it was trained with.

    Shards are gathered tensor by tensor, in all processes, and written by the first.
    """
    entries = []
    if train.shard == "full":
        held = _state(part.model)
        entries = shards.entries({n: shards.like(t, held[n]) for n, t in (state.ema or held).items()})
    if rank > 0:
        for entry in entries:
            entry.read()
        return folder / (name or "weights")
    with averaged(part.model, {} if entries else state.ema):
        origin = {
            "trained": part.name,
            "steps": state.step,
            "average": bool(state.ema),
            "train": dataclasses.asdict(train),
            "before": [checkpoint.read_origin(config.weights)] if config.weights else [],
            **({"plugins": plugins.described(config)} if config.plugins else {}),
        }
        if part.write is not None:
            return part.write(folder / (name or part.name), origin)
        trained = {entry.name: entry for entry in entries} or part.saved or part.model
        parts = {**part.others, part.name: trained}
        return checkpoint.save(folder / (name or "weights"), parts, part.finish(config), origin=origin)


def save_strip(folder: Path, state: State, part: Part, log: Log | None) -> None:
    """Sample with the present weights; without a log, only take part in it."""
    if part.strip is None:
        return
    with averaged(part.model, state.ema), evaluating(part.step):
        strip = part.strip()
    if log is None:
        return
    picture = Image.fromarray(strip)
    if log.board is not None:
        log.board.add_image("samples", strip, state.step, dataformats="HWC")
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    if part.held_out:
        said = "".join(f"{caption}\n" for caption in part.held_out.shown.captions)
        whole.write_text(folder / "samples" / "prompts.txt", said)
        if log.board is not None:
            log.board.add_text("prompts", said, state.step)
    path = folder / "samples" / f"{state.step:08d}.png"
    with whole.replacing(path) as temporary:
        picture.save(temporary, "PNG")


# ---------------------------------------------------------------------------------------------------
# Log


class Log:
    """Writes OUT/log.jsonl, truncated to the step a run resumes from, and TensorBoard if it is installed."""

    def __init__(self, folder: Path, step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.board = folder / LOG, None
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        kept = [line for line in lines if _step_of(line) <= step]
        whole.write_text(self.path, "".join(f"{line}\n" for line in kept))
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_) -> None:
        if self.board is not None:
            self.board.close()

    def write(self, step: int, pending: list[dict[str, float]]) -> None:
        means = {name: math.fsum(p[name] for p in pending) / len(pending) for name in pending[-1]}
        means["lr"] = pending[-1]["lr"]
        self.add(step, means)

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            # A gradient norm that overflowed under the scaler is not finite, which JSON cannot hold.
            finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
            file.write(json.dumps({"step": step, **finite}) + "\n")
        if self.board is not None:
            for name, value in figures.items():
                self.board.add_scalar(name, value, step)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf  # an incomplete line
