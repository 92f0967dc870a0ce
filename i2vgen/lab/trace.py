"""A trace of a run: figures of what every module gave, in order; and where two traces part.

Figures do not depend on how a tensor lies or how often a batch repeats it, so a trace can be held against
that of another implementation, given whose name answers to whose.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from i2vgen.fast import savings
from i2vgen.files import whole
from i2vgen.model.conditioning import Conditions
from i2vgen.model.unet import UNet
from i2vgen.settings.config import Config

FIGURES = ("mean", "std", "low", "high")


@dataclass(frozen=True)
class Record:
    """One output of one module."""

    path: str
    call: int  # how often the module was called before
    shape: tuple[int, ...]
    mean: float
    std: float
    low: float
    high: float
    broken: int  # values that are not finite

    @property
    def scale(self) -> float:
        return max(abs(self.low), abs(self.high))


@dataclass(frozen=True)
class Divergence:
    """The first place where two traces differ by more than was allowed."""

    first: Record
    second: Record
    difference: float  # the largest of a figure's, relative to the larger scale


class Trace:
    """`with Trace(network) as trace: ...`; `trace.records` then has one entry per call of every leaf module.

    `inner=True` also records modules that hold others. Only outputs that are tensors are seen.
    """

    def __init__(self, network: nn.Module, *, inner: bool = False):
        self.network, self.inner = network, inner
        self.records: list[Record] = []
        self._calls: dict[str, int] = {}
        self._handles: list = []

    def __enter__(self) -> Trace:
        for path, module in self.network.named_modules():
            if path and (self.inner or not any(True for _ in module.children())):
                self._handles.append(module.register_forward_hook(self._hook(path)))
        return self

    def __exit__(self, *_) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _hook(self, path: str):
        def see(module: nn.Module, inputs: tuple, output) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and output.numel():
                call = self._calls.get(path, 0)
                self._calls[path] = call + 1
                self.records.append(record(path, call, output))

        return see


def record(path: str, call: int, x: Tensor) -> Record:
    wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    finite = wide[wide.isfinite()]
    broken = wide.numel() - finite.numel()
    if not finite.numel():
        return Record(path, call, tuple(x.shape), *[math.nan] * 4, broken)
    figures = finite.mean(), finite.std(correction=0), finite.min(), finite.max()
    return Record(path, call, tuple(x.shape), *(figure.item() for figure in figures), broken)


def compare(
    first: Sequence[Record],
    second: Sequence[Record],
    *,
    tolerance: float,
    names: Mapping[str, str] | None = None,
) -> tuple[Divergence | None, int]:
    """In the order of `first`: the first call whose figures differ by more, and how many calls were compared.

    `names` maps paths of `second` to those of `first`; without it they are the same. ValueError if no call
    of one is in the other.
    """
    rename = names or {}
    others = {(rename.get(r.path, r.path), r.call): r for r in second}
    pairs = [(r, others[r.path, r.call]) for r in first if (r.path, r.call) in others]
    if not pairs:
        raise ValueError(
            f"the traces have no module in common: the first holds {_some(first)}, the second {_some(second)}"
        )
    for one, other in pairs:
        if (found := difference(one, other)) > tolerance:
            return Divergence(one, other, found), len(pairs)
    return None, len(pairs)


def missing(first: Sequence[Record], second: Sequence[Record]) -> list[str]:
    """Paths of the modules of `first` that `second` has not, in their order."""
    there = {r.path for r in second}
    return [path for path in dict.fromkeys(r.path for r in first) if path not in there]


def difference(one: Record, other: Record) -> float:
    """The largest of a figure, relative to the larger of both scales; infinite where only one is broken."""
    if bool(one.broken) != bool(other.broken):
        return math.inf
    scale = max(one.scale, other.scale) or 1.0
    apart = [abs(getattr(one, f) - getattr(other, f)) / scale for f in FIGURES]
    return max((a for a in apart if not math.isnan(a)), default=0.0)


def write(records: Sequence[Record], path: Path) -> None:
    """One JSON object per line; the file appears whole."""
    whole.write_text(path, "".join(json.dumps(asdict(r)) + "\n" for r in records))


def read(path: Path) -> list[Record]:
    """ValueError if the file is no trace."""
    try:
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [Record(**{**fields, "shape": tuple(fields["shape"])}) for fields in found]
    except FileNotFoundError:
        raise ValueError(f"the trace {path} does not exist; write one with output={path}") from None
    except (json.JSONDecodeError, TypeError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no trace: {error}") from error


def _some(records: Sequence[Record]) -> str:
    return ", ".join(r.path for r in records[:3]) or "nothing"


# ---------------------------------------------------------------------------------------------------
# One run of the UNet


def of_unet(unet: UNet, config: Config, calls: int) -> list[Record]:
    """The trace of `calls` calls, from the noisiest timestep on; the savings are taken out."""
    savings.remove(unet)
    x, times, conditions = inputs(unet, config, calls)
    with torch.no_grad(), Trace(unet) as trace:
        prepared = unet.prepare(conditions, config.sample.frames)
        for t in times:
            unet(x, t, prepared)
    return trace.records


def inputs(unet: UNet, config: Config, calls: int) -> tuple[Tensor, list[Tensor], Conditions]:
    """Latent [1 c f h w], timesteps [1] each, conditions: from a fixed seed, the same for every network."""
    like, (h, w) = unet.conv_in.weight, config.latent_size
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator).to(like)

    x = normal(config.unet.in_channels, config.sample.frames, h, w)
    latent = normal(config.unet.image_channels, h, w)
    text = normal(config.clip.text_length, config.unet.context_width)
    vector = normal(config.unet.image_vector_width)
    last = config.schedule.num_timesteps - 1
    times = [torch.tensor([last - i * last // max(calls, 1)], device=like.device) for i in range(calls)]
    fps = torch.tensor([config.sample.fps], device=like.device)
    return x, times, Conditions(text, vector, latent, fps)
