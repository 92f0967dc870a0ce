"""What each module of a network holds and costs, at any size and without weights: a run on `meta`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from i2vgen.fast import runtime
from i2vgen.files import checkpoint
from i2vgen.memory.meter import Meter
from i2vgen.model.conditioning import Conditions
from i2vgen.settings.config import Config

META = torch.device("meta")


@dataclass
class Row:
    """One module with all that is inside it."""

    path: str  # "" is the whole
    kind: str  # its class
    parameters: int
    shape: tuple[int, ...] = ()  # of its last output; () if it was not called as a whole
    calls: int = 0
    flops: int = 0  # of all calls
    bytes: int = 0  # read and written by its operations, weights included


def summarise(part: str, config: Config, depth: int) -> list[Row]:
    """One call of a part (checkpoint.PARTS) for one clip, in the order of definition down to `depth`.

    UNet: one branch of one step, its conditions prepared; VAE: all frames decoded, `runtime.vae_chunk` at a
    time; CLIP: one prompt and one picture.
    """
    dtype = {
        "unet": runtime.dtype(config.runtime),
        "vae": runtime.DTYPES[config.runtime.vae_dtype],
        "clip": runtime.DTYPES[config.runtime.encoder_dtype],
    }[part]
    network = checkpoint.build(part, config).to(dtype).eval().requires_grad_(False)
    return measure(network, lambda: CALLS[part](network, config, dtype), depth)


def measure(network: nn.Module, call: Callable[[], object], depth: int) -> list[Row]:
    """Rows of every module at most `depth` names deep; what `call` runs is counted on `meta`.

    A module that was not called as a whole, a list of blocks for example, gets the sum of its inside.
    """
    rows = {
        path: Row(path, type(module).__name__, sum(p.numel() for p in module.parameters()))
        for path, module in network.named_modules()
    }
    handles = []
    with torch.no_grad(), Meter() as meter:
        for path, module in network.named_modules():
            if path:
                handles += _watch(module, rows[path], meter)
        call()
        rows[""].calls, rows[""].flops, rows[""].bytes = 1, meter.flops, meter.bytes
    for handle in handles:
        handle.remove()
    for path in sorted(rows, key=lambda path: -path.count(".")):  # deepest first
        above = rows[path.rpartition(".")[0]]
        if path and not above.calls:
            above.flops += rows[path].flops
            above.bytes += rows[path].bytes
    return [row for path, row in rows.items() if path.count(".") < depth or not path]


def _watch(module: nn.Module, row: Row, meter: Meter) -> list:
    begun: list[tuple[int, int]] = []

    def before(*_) -> None:
        begun.append((meter.flops, meter.bytes))

    def after(_, inputs, output) -> None:
        flops, moved = begun.pop()
        row.calls += 1
        row.flops += meter.flops - flops
        row.bytes += meter.bytes - moved
        row.shape = tuple(output.shape) if isinstance(output, Tensor) else row.shape

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


# ---------------------------------------------------------------------------------------------------
# What one call is


def unet(network: nn.Module, config: Config, dtype: torch.dtype) -> None:
    unet, sample, (h, w) = config.unet, config.sample, config.latent_size

    def empty(*shape: int) -> Tensor:
        return torch.empty(1, *shape, dtype=dtype, device=META)

    t = torch.empty(1, dtype=torch.int64, device=META)
    conditions = Conditions(
        empty(config.clip.text_length, unet.context_width) if config.use.text else None,
        empty(unet.image_vector_width) if config.use.global_tokens else None,
        empty(unet.image_channels, h, w),
        torch.empty_like(t),
    )
    network(empty(unet.in_channels, sample.frames, h, w), t, network.prepare(conditions, sample.frames))


def vae(network: nn.Module, config: Config, dtype: torch.dtype) -> None:
    shape = (config.sample.frames, config.vae.embed_dim, *config.latent_size)
    network.decode(torch.empty(shape, dtype=dtype, device=META), chunk=config.runtime.vae_chunk)


def clip(network: nn.Module, config: Config, dtype: torch.dtype) -> None:
    network.text(torch.zeros(1, config.clip.text_length, dtype=torch.int64, device=META))
    network.image(torch.empty(1, 3, config.clip.image_size, config.clip.image_size, dtype=dtype, device=META))


CALLS = {"unet": unet, "vae": vae, "clip": clip}


def table(rows: list[Row]) -> list[tuple[str, ...]]:
    """Heading and rows as text; parameters and FLOPs also as shares of the whole."""
    whole = rows[0]
    lines = [("module", "class", "output", "parameters", "", "GFLOP", "", "MB moved")]
    for row in rows:
        name = "    " * (row.path.count(".") + bool(row.path)) + (row.path.rsplit(".", 1)[-1] or "all")
        seen = row.bytes > 0
        lines.append(
            (
                name,
                row.kind,
                " x ".join(map(str, row.shape)),
                f"{row.parameters:,}",
                f"{row.parameters / whole.parameters:.1%}" if whole.parameters else "",
                f"{row.flops / 1e9:,.2f}" if seen else "",
                f"{row.flops / whole.flops:.1%}" if seen and whole.flops else "",
                f"{row.bytes / 1e6:,.0f}" if seen else "",
            )
        )
    return lines


def to_dict(rows: list[Row]) -> list[dict]:
    return [dataclasses.asdict(row) for row in rows]
