"""One clip on several cards: `runtime.parallel` splits a guidance step over the processes of torchrun.

Every process has the whole network and the whole latent video. Two things can be split, or both: the two
branches of guidance, one on each half of the processes, and the frames. A process of the latter computes its
own frames wherever pixels are mixed. Where frames are mixed (temporal convolutions and transformers) the
processes exchange: each receives all frames of its share of the pixels, and sends them back afterwards. Norms
over frames and pixels combine their statistics. The condition stem runs once per video and is not split.

Axes: b batch, f frames, h w latent rows and columns, p = h w flattened, c channels, g groups of a norm.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from i2vgen.diffusion.sampler import Predict
from i2vgen.fast import unet as fast_unet
from i2vgen.fast.guard import plain_kind, undisturbed
from i2vgen.fast.layers import statistics, with_statistics
from i2vgen.model.conditioning import Prepared
from i2vgen.model.layers import GroupNorm
from i2vgen.model.temporal import TemporalConv, TemporalTransformer
from i2vgen.model.unet import NO_RESIDUALS, Residuals, UNet
from i2vgen.settings.config import Config


class PeerLost(RuntimeError):
    """An exchange failed, as it does when another process has ended."""


class Circle:
    """`count` processes that exchange parts of a tensor, among which this one is number `index`.

    Without a group the others are imagined: on `meta`, one process is enough to count what it would send.
    """

    def __init__(self, count: int, index: int, group: dist.ProcessGroup | None = None):
        self.count, self.index, self.group = count, index, group
        self.sent = 0  # bytes that this process has sent to others
        self.exchanges = 0
        self.frames = 0  # of the whole clip that is being computed

    def shares(self, total: int) -> list[int]:
        """How many of `total` entries each process has; the first ones have one more where it is uneven."""
        return [total // self.count + (i < total % self.count) for i in range(self.count)]

    def own(self, x: Tensor, axis: int) -> Tensor:
        """This process's share of a whole tensor"""
        return x.split(self.shares(x.shape[axis]), axis)[self.index]

    def swap(self, parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """One part for each process -> the part from each, of these shapes."""
        sizes = [torch.Size(shape).numel() for shape in shapes]
        out = parts[0].new_empty(sum(sizes))
        self.exchanges += 1
        self.sent += sum(p.numel() for i, p in enumerate(parts) if i != self.index) * out.element_size()
        if not out.is_meta:
            whole = torch.cat([part.reshape(-1) for part in parts])
            try:
                dist.all_to_all_single(out, whole, sizes, [p.numel() for p in parts], group=self.group)
            except RuntimeError as error:
                raise PeerLost(str(error)) from error
        return [piece.view(shape) for piece, shape in zip(out.split(sizes), map(tuple, shapes), strict=True)]

    def gather(self, x: Tensor, axis: int, total: int) -> Tensor:
        """This process's share -> the whole, `total` entries along the axis, on every process"""
        shapes = [[*x.shape[:axis], share, *x.shape[axis + 1 :]] for share in self.shares(total)]
        return torch.cat(self.swap([x] * self.count, shapes), axis)

    def pixels(self, x: Tensor) -> Tensor:
        """This process's frames of all pixels [b f' h w c] -> all frames of its pixels [b f p' 1 c]"""
        b, _, h, w, c = x.shape
        parts = x.flatten(2, 3).split(self.shares(h * w), dim=2)
        mine = parts[self.index].shape[2]
        found = self.swap(parts, [(b, share, mine, c) for share in self.shares(self.frames)])
        return torch.cat(found, dim=1)[..., None, :]

    def whole_frames(self, y: Tensor, like: Tensor) -> Tensor:
        """The inverse: [b f p' 1 c] -> like `like`, [b f' h w c]"""
        b, f, h, w, c = like.shape
        parts = y.squeeze(3).split(self.shares(self.frames), dim=1)
        found = self.swap(parts, [(b, f, share, c) for share in self.shares(h * w)])
        return torch.cat(found, dim=2).view_as(like)


@dataclass(frozen=True)
class Ranks:
    """The place of this process among those of one clip."""

    everyone: Circle  # decoding splits the frames over all
    frames: Circle  # those that share the frames of one branch; a circle of one splits nothing
    branches: Circle  # those that have the same frames in the two branches of guidance

    @property
    def sent(self) -> int:
        """Bytes that this process has sent for the network's steps"""
        return self.frames.sent + self.branches.sent

    def __str__(self) -> str:
        shares = f"{self.frames.count} shares of the frames"
        parts = ["the branches of guidance"] * (self.branches.count > 1) + [shares] * (self.frames.count > 1)
        return f"{self.everyone.count} processes: {' x '.join(parts)}"


def imagined(branches: int, frames: int) -> Ranks:
    """The first of so many processes, for counting on `meta`"""
    return Ranks(Circle(branches * frames, 0), Circle(frames, 0), Circle(branches, 0))


def join(config: Config) -> Ranks | None:
    """The processes of this run as `runtime.parallel` arranges them; None if it is "none".

    Every process has to call it. ValueError for a number of processes that it cannot use.
    """
    if config.runtime.parallel == "none":
        return None
    here = dist.is_available() and dist.is_initialized()
    world, rank = (dist.get_world_size(), dist.get_rank()) if here else (1, 0)
    branches, frames = arrangement(config, world)
    # Those that share frames exchange the most, so they are neighbours.
    of_frames = [[branch * frames + i for i in range(frames)] for branch in range(branches)]
    of_branches = [[branch * frames + i for branch in range(branches)] for i in range(frames)]
    return Ranks(
        Circle(world, rank, dist.group.WORLD),
        _circle(of_frames, rank),
        _circle(of_branches, rank),
    )


def agreed(ranks: Ranks | None, config: Config) -> Config:
    """The precision that the first process chose, which may have measured something else than the others"""
    if ranks is None:
        return config
    chosen = [config.runtime.dtype]
    dist.broadcast_object_list(chosen)
    return dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, dtype=chosen[0]))


def _circle(groups: list[list[int]], rank: int) -> Circle:
    """The circle of `rank`; a group is made by all processes, whether or not they are in it."""
    made = [(ranks, dist.new_group(ranks) if len(ranks) > 1 else None) for ranks in groups]
    ranks, group = next((ranks, group) for ranks, group in made if rank in ranks)
    return Circle(len(ranks), ranks.index(rank), group)


def arrangement(config: Config, world: int) -> tuple[int, int]:
    """-> into how many branches and shares of the frames `world` processes split a clip; or ValueError"""
    name, guided = config.runtime.parallel, config.sample.guidance != 1.0
    if world < 2:
        raise ValueError(
            f"parallel={name} splits a clip over processes, but there is one: start them with "
            "torchrun --nproc-per-node N -m i2vgen generate ... (in Python call "
            "torch.distributed.init_process_group() first), or leave parallel= out"
        )
    if name in ("guidance", "both") and not guided:
        raise ValueError(
            f"parallel={name} splits the two branches of guidance, but sample.guidance=1 has one; use "
            "parallel=frames"
        )
    if name == "guidance" and world != 2:
        raise ValueError(
            f"parallel=guidance uses 2 processes, one for each branch, but {world} were started; use "
            f"--nproc-per-node 2, or parallel={'frames' if world % 2 else 'both'}"
        )
    if name == "both" and (world < 4 or world % 2):
        raise ValueError(
            f"parallel=both uses an even number of processes, 4 or more, but {world} were started; use "
            f"parallel={'guidance' if world == 2 else 'frames'} or another --nproc-per-node"
        )
    branches = 2 if name in ("guidance", "both") or (name == "auto" and guided and world % 2 == 0) else 1
    frames = world // branches
    refuse_small(config, frames)
    return branches, frames


def refuse_small(config: Config, frames: int) -> None:
    """ValueError for a clip of fewer frames, or of fewer positions on the coarsest level, than shares."""
    sample, (h, w) = config.sample, config.latent_size
    if sample.frames < frames:
        raise ValueError(
            f"sample.frames is {sample.frames}, which cannot be split over {frames} processes; start fewer "
            "of them, or use parallel=guidance with 2"
        )
    positions = (h // config.unet.factor) * (w // config.unet.factor)
    if positions < frames:
        raise ValueError(
            f"{sample.width} x {sample.height} pixels are {positions} positions on the UNet's coarsest "
            f"level, which cannot be split over {frames} processes; give a larger size or start fewer"
        )


def check(ranks: Ranks | None, config: Config) -> None:
    """ValueError for the settings of a call that loaded processes cannot split"""
    if ranks is not None:
        refuse_small(config, ranks.frames.count)
        if config.sample.deep_cache > 1:
            raise ValueError(
                f"sample.deep_cache={config.sample.deep_cache} keeps features that runtime.parallel="
                f"{config.runtime.parallel} splits; use sample.deep_cache=0"
            )


# ---------------------------------------------------------------------------------------------------
# The network


def apply(unet: UNet, ranks: Ranks | None) -> None:
    """Let a UNet compute its process's share of the frames. Apply savings before it.

    ValueError for a network whose modules are not all ours: what they would see of a clip is a share.
    """
    if ranks is None or ranks.frames.count == 1:
        return
    if plain_kind(type(unet)) is not UNet or not undisturbed(unet):
        raise ValueError(WHOLE)
    for module in list(unet.modules()):
        kind = plain_kind(type(module))
        if kind not in (TemporalConv, TemporalTransformer):
            continue
        norms = [stage.norm for stage in module.stages] if kind is TemporalConv else [module.norm]
        for norm in norms:
            norm.__class__, norm.circle = SplitGroupNorm, ranks.frames
        module.__class__, module.circle = split(type(module)), ranks.frames
    unet.__class__, unet.circle = split_unet(type(unet)), ranks.frames


WHOLE = (
    "runtime.parallel splits the frames over processes, but a module of the UNet has a hook, a tap or a "
    "class of its own, which would see only a share of them; remove it, or use parallel=guidance"
)


@functools.cache
def split_unet(kind: type[UNet]) -> type[UNet]:
    """A UNet, plain or fast, that computes its share of the frames and gathers the predictions."""

    class SplitUNet(kind):
        plain = UNet
        circle: Circle

        def forward(
            self, x: Tensor, t: Tensor, prepared: Prepared, residuals: Residuals = NO_RESIDUALS
        ) -> Tensor:
            """As in `UNet`: the whole latent video and prediction, [b c f h w], on every process"""
            if residuals is not NO_RESIDUALS or not undisturbed(self):
                raise ValueError(WHOLE)
            if torch.is_grad_enabled():
                raise ValueError("a network under runtime.parallel has no gradients; use torch.no_grad()")
            self.circle.frames = frames = x.shape[2]
            if prepared.concat is not None:
                prepared = prepared._replace(concat=self.circle.own(prepared.concat, 1))
            return self.circle.gather(super().forward(self.circle.own(x, 2), t, prepared), 2, frames)

    return SplitUNet


@functools.cache
def split(kind: type[nn.Module]) -> type[nn.Module]:
    """A part that mixes frames, plain or fast, for all frames of a share of the pixels."""

    class Split(kind):
        plain = plain_kind(kind)
        circle: Circle

        def forward(self, x: Tensor) -> Tensor:
            """x [b f' h w c], this process's frames -> same"""
            return self.circle.whole_frames(super().forward(self.circle.pixels(x)), x)

    return Split


class SplitGroupNorm(GroupNorm):
    """Group norm over frames and pixels of which this process has a share of the pixels."""

    plain = GroupNorm
    circle: Circle

    def forward(self, x: Tensor) -> Tensor:
        """[b f p' c] -> same"""
        wide = torch.promote_types(x.dtype, torch.float32)
        var, mean = statistics(self, x.to(wide))
        own = torch.stack([var, mean, torch.full_like(mean, x.shape[2])])
        pieces = self.circle.swap([own] * self.circle.count, [own.shape] * self.circle.count)
        pixels = sum(piece[2] for piece in pieces)
        shares, found = [piece[2] / pixels for piece in pieces], [(piece[0], piece[1]) for piece in pieces]
        return with_statistics(self, shares, found)(x)


def both_branches(
    ranks: Ranks | None,
    unet: nn.Module,
    cond: Prepared,
    uncond: Prepared,
    under: Callable[[nn.Module, Prepared], Predict],
) -> Predict:
    """`fast.unet.both_branches`, each branch on its half of the processes if `ranks` say so."""
    if ranks is None or ranks.branches.count == 1:
        return fast_unet.both_branches(unet, cond, uncond, under)
    mine, circle = under(unet, (cond, uncond)[ranks.branches.index]), ranks.branches

    def both(x: Tensor, t: Tensor) -> Tensor:
        own = mine(x, t)
        return torch.cat(circle.swap([own, own], [own.shape] * 2))

    return both
