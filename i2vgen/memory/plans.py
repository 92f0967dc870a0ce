"""Plans for little memory, what each will take, and the choice between them before anything is loaded.

A plan is a set of switches of `runtime`. What it takes is counted: every part runs once on the `meta` device,
where tensors have shapes and no values, and the peak of what is alive is exact for any settings and ablation.
Not counted are what PyTorch itself and its kernels' workspaces take.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from i2vgen.adapt.context import cross_attentions
from i2vgen.fast import machine, runtime, savings
from i2vgen.fast.compiled import compile_blocks
from i2vgen.fast.unet import both_branches, projected, under
from i2vgen.files import checkpoint
from i2vgen.memory import offload, storage
from i2vgen.memory.free import GIB, free_memory
from i2vgen.memory.meter import Meter
from i2vgen.model.clip import ClipEncoders
from i2vgen.model.conditioning import Conditions
from i2vgen.model.unet import UNet
from i2vgen.settings.config import Config, Runtime

# Fastest first, each leaner than the one before. `full` is what the other settings say.
PLANS: dict[str, dict[str, object]] = {
    "full": {},
    "balanced": {"offload": "parts", "token_chunk": 56_320, "vae_chunk": 1},
    "low": {"offload": "blocks", "token_chunk": 28_160, "vae_chunk": 1, "vae_tile": 64},
}
META = torch.device("meta")
UNCOUNTABLE = 2**63
LARGE = 2**19  # tokens of a latent video; beyond it, counting chunk by chunk takes minutes
FEW_TOKENS = 2**16  # of a latent video; with fewer, a GPU waits for its CPU to launch operations


@dataclass(frozen=True)
class Moment:
    """A station of the road: bytes of all weights on the device while it runs, and its own peak."""

    name: str
    weights: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.activations


@dataclass(frozen=True)
class Estimate:
    plan: str
    moments: tuple[Moment, ...]

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def total(self) -> int:
        return self.peak.total

    def __str__(self) -> str:
        peak = self.peak
        return (
            f"about {amount(peak.total)} under memory={self.plan}, in the {peak.name} "
            f"({amount(peak.weights)} weights + {amount(peak.activations)} activations)"
        )


def amount(count: int) -> str:
    """Bytes, readable."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.0f} MiB"


def settle(config: Config, plan: str, device: str = "", *, batched: bool = False) -> Config:
    """The settings under a plan: its switches where the user left the default.

    On a CPU nothing waits elsewhere, unless asked for by name. `device` is by default that of the settings;
    `batched` is `runtime.batch_guidance` where the user has not chosen.
    """
    runtime_, default = config.runtime, Runtime()
    chosen = {k: v for k, v in PLANS[plan].items() if getattr(runtime_, k) == getattr(default, k)}
    if (device or runtime.device(runtime_).type) == "cpu":
        chosen.pop("offload", None)
    if (runtime_.compile or runtime_.cuda_graph) and chosen.get("offload") == "blocks":
        chosen["offload"] = "parts"  # compiled code and recordings cannot follow weights that move
    if runtime_.batch_guidance is None:
        chosen["batch_guidance"] = batched
    return dataclasses.replace(config, runtime=dataclasses.replace(runtime_, memory=plan, **chosen))


def batching_pays(config: Config) -> bool:
    """Whether both branches of guidance are faster as one batch: measured on CPUs, and on GPUs if small."""
    tokens = config.runtime.batch * config.sample.frames * math.prod(config.latent_size)
    return runtime.device(config.runtime).type == "cpu" or tokens <= FEW_TOKENS


def choose(
    config: Config, free: int | None = None, ledger: Ledger | None = None, *, shares: int = 1
) -> tuple[Config, Estimate]:
    """Settings whose `runtime.memory` is auto or a plan -> the settings of the plan, and what it takes.

    auto takes the fastest plan that fits into `free` bytes, by default those free on the device. ValueError
    if none does, or the one that was asked for does not: with the plan or the largest size that would. Under
    `runtime.parallel` it is `full`, for one of so many shares of the frames.
    """
    if free is None:
        free = free_memory(runtime.device(config.runtime))
    ledger = ledger or Ledger(config)
    if config.runtime.parallel != "none":
        return of_a_share(config, ledger, free, shares)
    settled, estimate = fastest(config, ledger, free)
    if estimate.total <= free or not config.runtime.check_memory:
        return settled, estimate
    sample = config.sample
    raise ValueError(
        f"{sample.width} x {sample.height} x {sample.frames} needs {estimate} and {amount(free)} are "
        f"free; {_advice(config, ledger, free)} (runtime.check_memory=false runs anyway)"
    )


def of_a_share(config: Config, ledger: Ledger, free: int, shares: int) -> tuple[Config, Estimate]:
    """`choose` for one of the processes that share the frames of a clip"""
    sample, settled = config.sample, settle(config, "full")
    largest = dataclasses.replace(sample, frames=math.ceil(sample.frames / shares))
    estimate = ledger.estimate(dataclasses.replace(settled, sample=largest))
    if estimate.total > free and config.runtime.check_memory:
        raise ValueError(
            f"{sample.width} x {sample.height} x {sample.frames}, of which each process computes "
            f"{largest.frames} frames, needs {estimate} and {amount(free)} are free; start more processes "
            "with parallel=frames, or give a smaller size (runtime.check_memory=false runs anyway)"
        )
    return settled, estimate


def refuse_hopeless(config: Config, ledger: Ledger, free: int) -> None:
    """ValueError, within seconds, for a large video that cannot fit.

    What the UNet takes grows at least in proportion to the tokens, so two narrow strips of the video tell.
    """
    tokens = config.runtime.batch * config.sample.frames * math.prod(config.latent_size)
    if tokens <= LARGE or not config.runtime.check_memory:
        return
    plan = list(PLANS)[-1] if config.runtime.memory == "auto" else config.runtime.memory
    multiple, rest = config.size_multiple, config.height_rest
    height = min(config.sample.height, 32 * multiple + rest)
    settled = settle(config, plan)
    strip = dataclasses.replace(settled, runtime=dataclasses.replace(settled.runtime, batch=1))
    savings.apply(ledger.parts["unet"], strip.runtime)
    column = config.sample.frames * math.prod(_resized(strip, multiple, height).latent_size)
    count = math.ceil(LARGE / 4 / column)
    narrow, wide = (_resized(strip, multiple * count * times, height) for times in (1, 2))
    taken = [peak(lambda strip=strip: step(ledger.parts["unet"], strip)) for strip in (narrow, wide)]
    least = (taken[1] - taken[0]) * tokens // (count * column)
    if least > free:
        sample = config.sample
        raise ValueError(
            f"{sample.width} x {sample.height} x {sample.frames} needs at least {amount(least)} under "
            f"memory={plan} and {amount(free)} are free; give a smaller size or fewer frames "
            "(runtime.check_memory=false runs anyway)"
        )


def fastest(config: Config, ledger: Ledger, free: int) -> tuple[Config, Estimate]:
    """Settings and needs of the first plan that fits, of those that were asked for; else of the last.

    auto begins with guidance as one batch, where that pays and is not decided.
    """
    refuse_hopeless(config, ledger, free)
    wanted = config.runtime.memory
    tries = [(plan, False) for plan in (PLANS if wanted == "auto" else [wanted])]
    guided = config.sample.guidance != 1.0 and config.runtime.batch_guidance is None
    if wanted == "auto" and guided and batching_pays(config):
        tries.insert(0, ("full", True))
    for plan, batched in tries:
        settled = settle(config, plan, batched=batched)
        estimate = ledger.estimate(settled)
        if estimate.total <= free or not config.runtime.check_memory:
            break
    return settled, estimate


def leaner(config: Config, ledger: Ledger, free: int) -> str | None:
    """A plan that would fit where the one that was asked for does not."""
    names = list(PLANS)
    others = [] if config.runtime.memory == "auto" else names[names.index(config.runtime.memory) + 1 :]
    return next((p for p in others if ledger.estimate(settle(config, p)).total <= free), None)


def _advice(config: Config, ledger: Ledger, free: int) -> str:
    plan = leaner(config, ledger, free)
    if plan is not None:
        return f"memory={plan} would fit"
    leanest = settle(config, list(PLANS)[-1])
    sizes = smaller_sizes(config)
    low, high = 0, len(sizes)  # the first that fits, largest size first
    while low < high:
        middle = (low + high) // 2
        if ledger.estimate(_resized(leanest, *sizes[middle])).total <= free:
            high = middle
        else:
            low = middle + 1
    if low == len(sizes):
        return "no size fits: use a machine with more memory"
    width, height = sizes[low]
    return f"memory={leanest.runtime.memory} width={width} height={height} would fit"


def smaller_sizes(config: Config) -> list[tuple[int, int]]:
    """(width, height) of about the same shape, largest first; each valid."""
    sides, multiple = (config.sample.width, config.sample.height), config.size_multiple
    steps = max(sides) // multiple
    scaled = [
        tuple(max(multiple, side * k // steps // multiple * multiple) for side in sides)
        for k in reversed(range(1, steps))
    ]
    return list(dict.fromkeys(scaled))


def _resized(config: Config, width: int, height: int) -> Config:
    return dataclasses.replace(config, sample=dataclasses.replace(config.sample, width=width, height=height))


# ---------------------------------------------------------------------------------------------------
# Counting


class Ledger:
    """Estimates for one model at any size and under any plan; built once, without memory."""

    def __init__(self, config: Config):
        self.parts = checkpoint.build_all(config)
        for part, module in self.parts.items():
            module.eval().to(dtype(part, config.runtime)).requires_grad_(False)
        storage.store(self.parts["unet"], config.runtime.weight_storage)
        self._clip: dict[int, int] = {}
        self._known: dict[tuple, Estimate] = {}

    def estimate(self, config: Config, device: str = "") -> Estimate:
        """What settings of a plan take, on their device or the one named; counted once."""
        device = device or runtime.device(config.runtime).type
        key = config.runtime, config.sample, device
        if key not in self._known:
            self._known[key] = self._counted(config, device)
        return self._known[key]

    def _counted(self, config: Config, device: str) -> Estimate:
        for part in ("unet", "vae"):
            savings.apply(self.parts[part], config.runtime)
        needs = {
            ("VAE encoder", "vae"): peak(lambda: encode(self.parts["vae"], config)),
            ("CLIP towers", "clip"): self._of_clip(config),
            ("UNet", "unet"): peak(lambda: step(self.parts["unet"], config)),
            ("VAE decoder", "vae"): peak(lambda: decode(self.parts["vae"], config)),
        }
        return Estimate(
            config.runtime.memory,
            tuple(
                Moment(name, self.weights(part, config, device), used) for (name, part), used in needs.items()
            ),
        )

    def weights(self, part: str, config: Config, device: str) -> int:
        """Bytes of weights on the device while this part runs."""
        everything = sum(offload.flat_bytes(offload.tensors(module)) for module in self.parts.values())
        if config.runtime.offload == "none":
            return everything
        module = self.parts[part]
        here = offload.flat_bytes(offload.tensors(module))
        if config.runtime.offload == "blocks" and (listed := streamable(module)):
            kept = {id(t) for t in listed.resident}
            sizes = [
                offload.flat_bytes(t for t in offload.tensors(block) if id(t) not in kept)
                for block in listed.blocks
            ]
            here += 2 * max(sizes) - sum(sizes)
        # On a CPU what waits is in the same memory.
        return here + (everything if device == "cpu" else 0)

    def _of_clip(self, config: Config) -> int:
        b = config.runtime.batch
        if b not in self._clip:
            self._clip[b] = peak(lambda: clip(self.parts["clip"], config))
        return self._clip[b]


def dtype(part: str, runtime_: Runtime) -> torch.dtype:
    """In which precision a part computes."""
    names = {"vae": runtime_.vae_dtype, "clip": runtime_.encoder_dtype}
    return runtime.dtype(runtime_) if part == "unet" else runtime.DTYPES[names[part]]


def peak(run: Callable[[], object], *, gradients: bool = False) -> int:
    """The most bytes alive at once while `run` runs on `meta`; 0, with a warning, if it cannot run there.

    A tensor with more elements than PyTorch can count takes UNCOUNTABLE bytes.
    """
    try:
        with torch.set_grad_enabled(gradients), Meter() as meter:
            run()
    except (RuntimeError, TypeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        if "overflow" in reason:
            return UNCOUNTABLE
        warnings.warn(
            f"the memory of a part is not counted, since it does not run on meta ({reason})", stacklevel=2
        )
        return 0
    return meter.peak


def step(unet: nn.Module, config: Config) -> object:
    """One guidance step, as the pipeline takes it."""
    b, frames, (h, w) = config.runtime.batch, config.sample.frames, config.latent_size
    x = empty(b, config.vae.embed_dim, frames, h, w)
    t = empty(b, dtype=torch.int64)
    branches = [
        projected(unet, unet.prepare(conditions(config), frames))
        for _ in range(1 + (config.sample.guidance != 1.0))
    ]
    predict = both_branches(unet, *branches) if len(branches) == 2 else under(unet, branches[0])
    return predict(x, t)


def conditions(config: Config) -> Conditions:
    b, clip_dtype = config.runtime.batch, dtype("clip", config.runtime)
    return Conditions(
        empty(b, config.clip.text_length, config.unet.context_width, dtype=clip_dtype),
        empty(b, config.unet.image_vector_width, dtype=clip_dtype),
        empty(b, config.unet.image_channels, *config.latent_size, dtype=dtype("vae", config.runtime)),
        empty(b, dtype=torch.int64),
    )


def decode(vae: nn.Module, config: Config) -> object:
    """One chunk, beside the frames that are done by then."""
    b, sample = config.runtime.batch, config.sample
    n = b * sample.frames
    latents = empty(n, config.vae.embed_dim, *config.latent_size)
    done = empty(n, sample.height, sample.width, 3, dtype=torch.uint8)
    return done, vae.decode(latents[: config.runtime.vae_chunk])


def encode(vae: nn.Module, config: Config) -> object:
    pixels = empty(config.runtime.batch, config.vae.channels, config.sample.height, config.sample.width)
    return vae.encode(pixels, None, chunk=1)


def clip(towers: ClipEncoders, config: Config) -> object:
    b, size = config.runtime.batch, config.clip.image_size
    text = towers.text(empty(b + 1, config.clip.text_length, dtype=torch.int64))
    return text, towers.image(empty(b, 3, size, size))


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


# ---------------------------------------------------------------------------------------------------
# Doing it


def prepare(parts: dict[str, nn.Module], config: Config, device: torch.device) -> None:
    """What `runtime` asks for of a loaded UNet and VAE"""
    prepare_unet(parts["unet"], config, device)
    savings.apply(parts["vae"], config.runtime, device)


def prepare_unet(unet: UNet, config: Config, device: torch.device) -> None:
    """What `runtime` asks for of a loaded UNet of either stage: storage, savings, attention, compilation."""
    storage.store(unet, config.runtime.weight_storage)
    savings.apply(unet, config.runtime, device)
    if config.runtime.attention == "auto" and device.type == "cuda":
        machine.choose_attention(unet, config, device)
    if config.runtime.compile:
        compile_blocks(unet)


@dataclass(frozen=True)
class Streamable:
    """Blocks of a part that run one after the other, and what of them is used outside of their `forward`."""

    blocks: list[nn.Module]
    resident: list[Tensor]


def streamable(module: nn.Module) -> Streamable | None:
    """None for a part that knows no such blocks: it comes and goes as a whole."""
    if isinstance(module, UNet):
        # Guidance computes the first block in two parts, and the keys of all readers before the first step.
        blocks = list(module.blocks())[1:]
        projections = [
            layer for part in cross_attentions(module).values() for layer in (part.to_k, part.to_v)
        ]
        return Streamable(blocks, [t for layer in projections for t in offload.tensors(layer)])
    if isinstance(module, ClipEncoders):
        return Streamable(list(module.blocks()), [])
    return None


def offloaded_parts(
    parts: dict[str, nn.Module], config: Config, device: torch.device
) -> dict[str, offload.OffloadedPart]:
    """The parts that wait on the CPU, each to be entered while it is used."""
    found = {}
    for name, module in parts.items() if config.runtime.offload != "none" else ():
        listed = streamable(module) if config.runtime.offload == "blocks" else None
        streamed = offload.Streamed(listed.blocks, device, resident=listed.resident) if listed else None
        found[name] = offload.OffloadedPart(module, device, streamed=streamed)
    return found


def on_device(offloaded: dict[str, offload.OffloadedPart], part: str) -> AbstractContextManager:
    """`with on_device(offloaded, "vae"):` the part is on the device inside."""
    return offloaded.get(part) or nullcontext()


class Plan:
    """What a loaded model was planned for. Calls that take more or less memory are planned again, not loaded.

    `asked` is `runtime` before the plan was chosen.
    """

    def __init__(self, config: Config, asked: Runtime):
        self.asked, self.settled, self.need = asked, config.runtime, self.needed(config, 1)
        self.ledger: Ledger | None = None
        self.shares = 1  # of the frames, under `runtime.parallel`

    def needed(self, config: Config, clips: int) -> tuple:
        """Everything of a call that memory depends on"""
        sample = config.sample
        clips = max(clips, config.runtime.batch)
        return sample.width, sample.height, sample.frames, sample.guidance != 1.0, clips

    def adapt(
        self, config: Config, parts: dict[str, nn.Module], device: torch.device, *, clips: int
    ) -> Config:
        """Settings of a call of so many clips at once -> under its plan, whose switches the parts now have.

        ValueError if the call fits under none, or under one that only loading can bring about.
        """
        need = self.needed(config, clips)
        if need != self.need:
            self.ledger = self.ledger or Ledger(config)
            wanted = dataclasses.replace(config, runtime=dataclasses.replace(self.asked, batch=need[-1]))
            free = free_memory(device) + held_there(parts, device)
            settled, _ = choose(wanted, free, self.ledger, shares=self.shares)
            chosen = dataclasses.replace(settled.runtime, batch=self.settled.batch)
            if chosen != self.settled:
                self.switch(chosen, parts, device)
            if self.settled.attention == "auto" and device.type == "cuda":
                machine.choose_attention(parts["unet"], settled, device)
            self.need = need
        return dataclasses.replace(config, runtime=self.settled)

    def switch(self, chosen: Runtime, parts: dict[str, nn.Module], device: torch.device) -> None:
        """Take another plan's switches. ValueError where the model would have to be loaded with them."""
        fixed = {"compile": chosen.compile, "cuda_graph": chosen.cuda_graph}
        fixed["offload"] = chosen.offload != self.settled.offload
        if any(fixed.values()):
            name = next(name for name, is_fixed in fixed.items() if is_fixed)
            raise ValueError(
                f"this call needs memory={chosen.memory}, but the model was loaded under memory="
                f"{self.settled.memory}, and {name} cannot change now; load the model again with "
                f'overrides=["memory={chosen.memory}"] and this size'
            )
        for part in ("unet", "vae"):
            savings.apply(parts[part], chosen, device)
        self.settled = chosen

    def moved(self, config: Config, asked: Runtime, parts: dict[str, nn.Module]) -> tuple[Config, Estimate]:
        """Settings for another device, precision or plan, and what they take; ValueError if that is fixed."""
        plain = Runtime()
        for name in ("compile", "cuda_graph", "offload", "weight_storage", "parallel"):
            value = getattr(self.settled, name)
            if value != getattr(plain, name):
                raise ValueError(
                    f"a model with runtime.{name}={value} cannot be moved; load it where it should be"
                )
        device, wanted = runtime.device(asked), dataclasses.replace(config, runtime=asked)
        machine.refuse_missing(wanted, device)
        return choose(wanted, free_memory(device) + held_there(parts, device))


def held_there(parts: dict[str, nn.Module], device: torch.device) -> int:
    """Bytes of weights on a device now"""
    return sum(
        offload.flat_bytes(t for t in offload.tensors(part) if t.device.type == device.type)
        for part in parts.values()
    )
