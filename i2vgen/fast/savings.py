"""Put the exact savings into a network and take them out again.

    apply(network, runtime)     # the classes of its modules change; names, weights and isinstance stay
    remove(network)

Every saving computes the same numbers up to rounding. `settings.config.SAVINGS` lists them, and
docs/performance.md says what each is worth.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from i2vgen.fast import attention, kernels, layers, spatial, temporal, unet, vae
from i2vgen.fast.attention import lay_side_by_side
from i2vgen.fast.layers import Savings
from i2vgen.model.attention import Attention
from i2vgen.model.layers import Conv
from i2vgen.settings.config import SAVINGS, Runtime

# Each class is put in where one of these savings is on; `token_chunk` and `row_chunk` are the memory plans'.
PLACES: dict[type[nn.Module], tuple[str, ...]] = {
    layers.FastConv: ("convolution_products",),
    layers.FastGroupNorm: ("kernels", "half_on_cpu"),
    layers.FastFeedForward: ("kernels", "in_place", "sum_in_place", "fold_products", "token_chunk"),
    attention.FastAttention: (
        "fuse_projections",
        "project_once",
        "sum_in_place",
        "half_on_cpu",
        "token_chunk",
    ),
    attention.FastFrameAttention: (
        "kernels",
        "fuse_projections",
        "sum_in_place",
        "fold_products",
        "half_on_cpu",
        "token_chunk",
    ),
    spatial.FastResBlock: ("kernels", "in_place", "token_chunk"),
    spatial.FastSpatialTransformer: ("sum_in_place", "project_once", "token_chunk"),
    spatial.FastDownsample: ("token_chunk",),
    spatial.FastUpsample: ("subpixel_upsampling", "token_chunk"),
    temporal.FastTemporalConv: ("kernels", "in_place", "token_chunk"),
    temporal.FastTemporalTransformer: ("sum_in_place", "fold_products", "token_chunk"),
    unet.FastUNet: (*SAVINGS, "token_chunk"),
    vae.ChunkedResBlock: ("row_chunk",),
    vae.ChunkedUpsample: ("row_chunk",),
    vae.ChunkedDecoder: ("row_chunk",),
}


def apply(network: nn.Module, runtime: Runtime, device: torch.device | None = None) -> None:
    """Put the savings that `runtime` asks for into every module of a network that is exactly ours.

    Those of an earlier `apply` are taken out first. `device` is where the network will compute, if its
    weights still wait elsewhere. Weights are laid out in memory as the kernels read them. Apply before
    sharding: ValueError for a sharded network.
    """
    remove(network)
    device = device or next(network.parameters()).device
    savings = Savings(
        names=chosen(runtime.savings, device),
        batch_guidance=bool(runtime.batch_guidance),
        token_chunk=runtime.token_chunk,
        row_chunk=runtime.vae_tile,
    )
    on = {*savings.names, *(name for name in ("token_chunk", "row_chunk") if getattr(savings, name))}
    faster = {kind.plain: kind for kind, reasons in PLACES.items() if on & {*reasons}}
    for module in list(network.modules()):
        if type(module) in faster:
            module.__class__, module.savings = faster[type(module)], savings
    lay_out(network, side_by_side="fuse_projections" in savings.names)


def remove(network: nn.Module) -> None:
    """Give every module its plain class back. ValueError for a sharded network, whose classes changed too."""
    modules = list(network.modules())
    if any(_sharded(module) for module in modules):
        raise ValueError("the network is sharded (fully_shard); apply or remove savings before sharding it")
    for module in modules:
        if "plain" in vars(type(module)):
            module.__class__ = type(module).plain
            vars(module).pop("savings", None)


def chosen(wanted: Iterable[str], device: torch.device) -> frozenset[str]:
    """`runtime.savings` -> the names of savings that are on for a device.

    ValueError for kernels that were asked for by name and cannot run there.
    """
    names = frozenset(wanted)
    if "kernels" in names:
        kernels.check(device)
    if names == {"all"}:
        return frozenset(SAVINGS) - (frozenset() if kernels.available(device) else {"kernels"})
    return frozenset() if names == {"none"} else names


def lay_out(network: nn.Module, *, side_by_side: bool) -> None:
    """Put weights into memory as the kernels read them: the same numbers in another order, and no copy.

    Convolution weights become channels-last, those of q, k and v contiguous. Later in-place changes take
    effect; weights that are replaced are used as they are.
    """
    for module in network.modules():
        if isinstance(module, Conv):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
        elif side_by_side and isinstance(module, Attention):
            layers = (module.to_q, module.to_k, module.to_v)
            widths = {layer.in_features for layer in layers if type(layer) is nn.Linear}
            if len(widths) == 1 and all(type(layer) is nn.Linear for layer in layers):
                lay_side_by_side(layers)


def _sharded(module: nn.Module) -> bool:
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)
