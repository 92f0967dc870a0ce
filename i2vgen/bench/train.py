"""Mode `train`: forward, backward and an AdamW step on one batch, ours against diffusers' class.

Both have the same weights and learn the same: to predict v. Ours is timed with and without gradient
checkpointing, which diffusers' class does not have. The peak of memory is that of the first step:
activations, gradients and the optimiser's moments.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from i2vgen import pipeline
from i2vgen.bench import memory, pair
from i2vgen.bench.peer import Peer
from i2vgen.bench.report import Report, Table
from i2vgen.bench.timing import Times, clock_of, interleaved
from i2vgen.diffusion.loss import training_loss
from i2vgen.fast.checkpointing import set_checkpointing
from i2vgen.settings.config import Config

ROUNDS = 5
THEIRS = "diffusers"
OURS = ("default", "checkpointing")
WAYS = (THEIRS, *OURS)
RATE = 1e-5


def ways_of(both: pair.Pair, peer: Peer, names: tuple[str, ...] = WAYS) -> dict[str, Callable[[], Tensor]]:
    """-> by name a call that takes one optimiser step and gives its loss [b].

    Each side has one network and one optimiser, whether it checkpoints or not. In eval mode: dropout would
    draw other numbers on the two sides.
    """
    made: dict[str, Callable[[], Tensor]] = {}
    if THEIRS in names:
        theirs = both.theirs(peer)
        made[THEIRS] = stepper(theirs, their_prediction(theirs, both.inputs()), both)
    if any(name in OURS for name in names):
        ours = both.ours({}).unet
        predict = our_prediction(ours, both.inputs())
        step = stepper(ours, predict, both)
        made |= {
            name: _with(lambda on=on: set_checkpointing(ours, on), step)
            for name, on in zip(OURS, (False, True), strict=True)
        }
    return {name: made[name] for name in names}


def _with(prepare: Callable[[], None], step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def call() -> Tensor:
        prepare()
        return step()

    return call


def stepper(
    network: nn.Module, predict: Callable[[Tensor, Tensor], Tensor], both: pair.Pair
) -> Callable[[], Tensor]:
    # The two sides would else write into the same weights.
    for parameter in network.parameters():
        parameter.data = parameter.data.clone()
    network.requires_grad_(True)
    optimiser = torch.optim.AdamW(network.parameters(), lr=RATE)
    inputs, noise, schedule = both.inputs(), both.inputs(seed=1).x, pipeline.make_schedule(both.config)

    def step() -> Tensor:
        loss = training_loss(predict, inputs.x, inputs.t.cpu(), noise, schedule)
        loss.mean().backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def our_prediction(unet: nn.Module, inputs: pair.Inputs) -> Callable[[Tensor, Tensor], Tensor]:
    frames = inputs.x.shape[2]
    return lambda x, t: unet(x, t.to(x.device), unet.prepare(inputs.cond, frames))


def their_prediction(unet: nn.Module, inputs: pair.Inputs) -> Callable[[Tensor, Tensor], Tensor]:
    cond = inputs.cond
    planes = pair.their_planes(cond.image_latent, inputs.x.shape[2])
    return lambda x, t: unet(
        x,
        timestep=t.to(x.device),
        fps=cond.fps,
        image_latents=planes,
        image_embeddings=cond.image_vector,
        encoder_hidden_states=cond.text,
        return_dict=False,
    )[0]


def report(settings: Config, peer: Peer, device: torch.device, name: str) -> Report:
    both = pair.make_pair(settings, device, torch.float32)
    ways = ways_of(both, peer)
    losses = {each: step() for each, step in ways.items()}
    times = interleaved(ways, clock=clock_of(device), rounds=ROUNDS, warmups=0)
    del ways
    peaks = peaks_of(settings, peer, device)
    return Report(*_figures(settings, name, peer, times, losses, peaks))


def peaks_of(settings: Config, peer: Peer, device: torch.device) -> dict[str, int | None]:
    """Bytes above the weights at the widest moment of a step, on a CPU each way in its own process."""
    if device.type == "cuda":
        return {each: _peak_on_cuda(each, settings, peer, device) for each in WAYS}
    if not memory.measurable():
        return dict.fromkeys(WAYS)
    return {each: memory.in_a_process(_peak_on_cpu, each, settings, peer) for each in WAYS}


def _peak_on_cpu(name: str, settings: Config, peer: Peer) -> int:
    torch.set_num_threads(1)
    both = pair.make_pair(settings, torch.device("cpu"), torch.float32)
    return memory.growth(ways_of(both, peer, (name,))[name])


def _peak_on_cuda(name: str, settings: Config, peer: Peer, device: torch.device) -> int:
    both = pair.make_pair(settings, device, torch.float32)
    step = ways_of(both, peer, (name,))[name]
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return torch.cuda.max_memory_allocated(device) - before


def _figures(
    settings: Config,
    name: str,
    peer: Peer,
    times: Times,
    losses: dict[str, Tensor],
    peaks: dict[str, int | None],
) -> tuple[dict, tuple[Table, ...]]:
    loss, lean = losses[THEIRS], peaks["checkpointing"]
    values = {
        "speedup_eager": round(times.ratio(THEIRS, times.best(list(OURS))), 3),
        "speedup_checkpointing": round(times.ratio(THEIRS, "checkpointing"), 3),
        "peak_memory_ratio": None if lean is None else round(lean / peaks[THEIRS], 3),
        "relative_loss": (abs(losses["default"] - loss) / loss).max().item(),  # before any step
        "samples_per_second": {each: round(1 / times.median(each), 4) for each in WAYS},
        "peak_bytes": peaks,
        "case": name,
        "mode": "train",
        "size": [settings.sample.frames, *settings.latent_size],
        "dtype": "float32",
        "torch": torch.__version__,
        "diffusers": peer.version,
        "rounds": {each: list(seconds) for each, seconds in times.rounds.items()},
    }
    rows = []
    for each in WAYS:
        peak = "" if peaks[each] is None else f"{peaks[each] / 2**30:.2f}"
        rate, ratio = values["samples_per_second"][each], times.ratio("diffusers", each)
        rows.append((each, f"{rate:.3f}", f"{ratio:.2f}", peak))
    size = "x".join(map(str, values["size"]))
    title = f"{name} {size}, training: forward, backward, AdamW on one clip, float32"
    return values, (Table(title, ("", "clips/s", "speedup", "peak GiB"), tuple(rows)),)
