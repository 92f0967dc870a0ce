"""What a training takes on its device, counted before anything is loaded, and what would take less.

    found = Ledger(config).estimate(train, Place("cuda", torch.bfloat16))
    print(found)

As for sampling (`memory/plans.py`), the network runs once on `meta`, here forward and backward: the peak of
what is alive is exact for any settings, size and ablation. Weights, gradients, moments and average are sums.
Not counted are what PyTorch itself and its kernels' workspaces take, and memory lost between allocations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from i2vgen import pipeline
from i2vgen.adapt import lora
from i2vgen.fast import runtime
from i2vgen.fast.checkpointing import set_checkpointing
from i2vgen.files import checkpoint
from i2vgen.memory import meter, plans
from i2vgen.memory.plans import amount, empty
from i2vgen.model.attention import Attention
from i2vgen.model.conditioning import Conditions
from i2vgen.settings.config import Config
from i2vgen.training import refiner_clips
from i2vgen.training.clip import freeze_what_the_unet_reads
from i2vgen.training.diffusion import DiffusionLoss, chunk_size
from i2vgen.training.settings import Bucket, Train, buckets
from i2vgen.training.vae import VaeLoss, freeze

# Settings that decide what the network computes and keeps; others only add up.
DECIDE = (
    "part", "lora_rank", "lora_modules", "frozen", "checkpointing", "text_encoder", "shard", "vae_encoder",
    "clip_unread",
)  # fmt: skip
NORMS = (nn.LayerNorm, nn.GroupNorm)
PRODUCTS = (nn.Linear, nn.Conv2d)
LEAN_COPIES = 5  # of the largest tensor in float32, while its lean moments are computed
# What to change first where a training does not fit; each comes on top of those before.
SAVINGS = {"checkpointing": True, "ema_device": "cpu", "moments": "eight_bit", "batch": 1}
ADAPTERS = {"lora_rank": 16, "frozen": "bf16"}


@dataclass(frozen=True)
class Place:
    """Where a training runs."""

    device: str  # type of the device
    dtype: torch.dtype  # of autocast; float32: none
    ranks: int = 1
    prepared: bool = False  # the clips are encoded already, so that no VAE and no CLIP is loaded


@dataclass(frozen=True)
class Estimate:
    """Bytes of a process on its device: what always lies there, and what each part of a step adds."""

    held: dict[str, int]
    steps: dict[str, int]
    on_cpu: int = 0  # beside a GPU

    @property
    def peak(self) -> str:
        return max(self.steps, key=self.steps.get)

    @property
    def total(self) -> int:
        return sum(self.held.values()) + self.steps[self.peak]

    def __str__(self) -> str:
        held = ", ".join(f"{name} {amount(count)}" for name, count in self.held.items() if count)
        also = f"; and {amount(self.on_cpu)} of the CPU's memory" if self.on_cpu else ""
        return f"about {amount(self.total)}: {held}, {self.peak} {amount(self.steps[self.peak])}{also}"


class Work(NamedTuple):
    """A step on `meta`."""

    step: nn.Module
    trained: nn.Module  # holds the parameters that the optimiser gets
    blocks: list[nn.Module]  # that train.shard=full gathers one by one
    inputs: Callable[[], tuple]


class Ledger:
    """Estimates for one model under any settings of training; runs of the network are counted once."""

    def __init__(self, config: Config):
        self.config = config
        self.counted: dict[tuple, tuple[int, ...]] = {}

    def estimate(self, train: Train, place: Place) -> Estimate:
        """What each process takes."""
        n = place.ranks // train.replicas if train.shard == "full" else 1
        trained, numbers, frozen, largest, gathered, used = self._step(train, place)
        gradients = _split(trained, n)
        moments = {"float32": 8, "bfloat16": 4, "eight_bit": 2}[train.moments] * _split(numbers, n)
        average = _split(trained, n) if train.ema else 0
        beside = train.ema_device == "cpu" and place.device != "cpu"
        buffers = place.ranks > 1 and train.shard == "none"  # DDP's buckets are the gradients, and stay
        held = {
            "weights": _split(trained, n),
            "frozen weights": frozen,
            "gradients": gradients if buffers else 0,
            "moments": moments,
            "average": 0 if beside else average,
        }
        waiting = gradients if train.accumulate > 1 and not buffers else 0
        update = (0 if buffers else gradients) + (0 if train.moments == "float32" else LEAN_COPIES * largest)
        copied = train.ema and (beside or train.shard == "none")  # the average takes the place of the weights
        steps = {
            "encoding": waiting + self._encoding(train, place),
            "forward and backward": used + gathered + (gradients if train.shard == "full" else 0),
            "update": update,
            "saving": _split(trained, n) if copied else 0,
        }
        return Estimate(held, steps, average if beside else 0)

    def _step(self, train: Train, place: Place) -> tuple[int, ...]:
        accumulated = train.accumulate > 1 and place.ranks == 1
        bucket = max(buckets(self.config, train), key=lambda one: one.batch * one.frames)
        key = (*(getattr(train, name) for name in DECIDE), bucket, place, accumulated)
        if key not in self.counted:
            self.counted[key] = self._count(train, place, bucket, accumulated)
        return self.counted[key]

    def _count(self, train: Train, place: Place, bucket: Bucket, accumulated: bool) -> tuple[int, ...]:
        work = make(self.config, train, bucket)
        parameters = [p for p in work.trained.parameters() if p.requires_grad]
        trained, numbers = _bytes(parameters), sum(p.numel() for p in parameters)
        largest = max(p.numel() for p in parameters) * 4
        frozen = _bytes(work.step.parameters()) - _bytes(p for p in work.step.parameters() if p.requires_grad)
        frozen += self._others(train, place)
        gathered = 0
        if train.shard == "full":
            gathered = _gathered(work, place.dtype)
            work.step.to(place.dtype)
        if train.shard == "full" or place.ranks > 1:  # gradients lie elsewhere
            for parameter in work.step.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(_drop)
        if place.dtype != torch.float32:
            lower(work.step, place.dtype)
        used = plans.peak(lambda: _forward_and_backward(work, 2 if accumulated else 1), gradients=True)
        return trained, numbers, frozen, largest, gathered, used

    def _others(self, train: Train, place: Place) -> int:
        """Weights that are there to encode clips, or wait to be saved"""
        in_step = {train.part} | ({"clip"} if train.text_encoder else set())
        names = [part for part in ("vae", "clip") if part not in in_step and not place.prepared]
        if train.part != "diffusion":  # they wait in the CPU's memory
            return self._weights(names, torch.float32) if place.device == "cpu" and self.config.weights else 0
        settings = self.config.runtime
        dtypes = {"vae": settings.vae_dtype, "clip": settings.encoder_dtype}
        return sum(self._weights([part], runtime.DTYPES[dtypes[part]]) for part in names)

    def _weights(self, names: list[str], dtype: torch.dtype) -> int:
        numbers = (t.numel() for name in names for t in checkpoint.build(name, self.config).parameters())
        return dtype.itemsize * sum(numbers)

    def _encoding(self, train: Train, place: Place) -> int:
        if train.part != "diffusion" or place.prepared:
            return 0
        key = ("encoding", train.encode_chunk)
        if key not in self.counted:
            self.counted[key] = (self._count_encoding(train),)
        return self.counted[key][0]

    def _count_encoding(self, train: Train) -> int:
        config = self.config
        vae = checkpoint.build("vae", config).to(runtime.DTYPES[config.runtime.vae_dtype])
        height, width = config.sample.height, config.sample.width
        n = chunk_size(train, height, width)
        return plans.peak(lambda: vae.posterior(empty(n, config.vae.channels, height, width)))


def _split(count: int, n: int) -> int:
    return -(-count // n)


def _bytes(tensors: Iterator[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _drop(parameter: nn.Parameter) -> None:
    parameter.grad = None


def _gathered(work: Work, dtype: torch.dtype) -> int:
    """Whole weights on a device under train.shard=full: those between blocks, a block and the next; and the
    gradients of a block, as they come and as they are sent."""
    blocks = sorted((sum(p.numel() for p in block.parameters()) for block in work.blocks), reverse=True)
    between = sum(p.numel() for p in work.trained.parameters()) - sum(blocks)
    largest = blocks[0]
    return dtype.itemsize * (between + sum(blocks[:2]) + largest) + 4 * largest


# ---------------------------------------------------------------------------------------------------
# The step on `meta`


def make(config: Config, train: Train, bucket: Bucket) -> Work:
    """The step of a part, without memory or numbers."""
    if train.part == "vae":
        return _vae(config, train, bucket)
    if train.part == "clip":
        return _clip(config, train, bucket)
    unet = checkpoint.build("unet", config).train()
    trained: nn.Module = unet
    set_checkpointing(unet, train.checkpointing)
    if train.lora_rank:
        unet.requires_grad_(False).to(torch.bfloat16 if train.frozen == "bf16" else torch.float32)
        trained = lora.attach(unet, train.lora_modules, rank=train.lora_rank)
    clip = None
    if train.text_encoder:
        clip = checkpoint.build("clip", config).requires_grad_(False)
        trained = nn.ModuleDict({"unet": unet, "text": clip.text_path().requires_grad_(True)})
    for module in unet.modules():
        # The fused kernels that `auto` takes keep no scores; a plugin's module is counted as it is.
        if isinstance(module, Attention) and not isinstance(module.backend, nn.Module):
            module.backend = _attention
    b, c, (h, w) = bucket.batch, config.vae.embed_dim, config.latent_size

    def inputs() -> tuple:
        x0, noise = (empty(b, c, bucket.frames, h, w) for _ in range(2))
        text = (b, config.clip.text_length)
        dtype = runtime.DTYPES[config.runtime.encoder_dtype]
        conditions = Conditions(
            empty(*text, dtype=torch.int64) if clip else empty(*text, config.unet.context_width, dtype=dtype),
            empty(b, config.unet.image_vector_width, dtype=dtype),
            empty(b, config.unet.image_channels, h, w),
            empty(b, dtype=torch.int64),
        )
        return x0, torch.zeros(b, dtype=torch.int64), noise, conditions

    schedule = refiner_clips.schedule(config) if train.first_stage else pipeline.make_schedule(config)
    step = DiffusionLoss(unet, schedule, clip)
    return Work(step, trained, list(unet.blocks()), inputs)


def _vae(config: Config, train: Train, bucket: Bucket) -> Work:
    vae, n = checkpoint.build("vae", config).train(), bucket.batch * bucket.frames
    freeze(vae, train)
    sizes = (config.vae.channels, config.sample.height, config.sample.width)
    return Work(
        VaeLoss(vae, train),
        vae,
        [],
        lambda: (empty(n, *sizes), empty(n, config.vae.embed_dim, *config.latent_size)),
    )


class _Contrast(nn.Module):
    """CLIP's contrastive loss without the words', which `meta` cannot pick and which is small."""

    def __init__(self, clip: nn.Module):
        super().__init__()
        self.clip = clip

    def forward(self, pixels: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        model = self.clip.model
        return {"loss": (model.encode_image(pixels).float() @ model.encode_text(tokens).float().T).sum()}


def _clip(config: Config, train: Train, bucket: Bucket) -> Work:
    clip, b, side = checkpoint.build("clip", config).train(), bucket.batch, config.clip.image_size
    if train.clip_unread:
        freeze_what_the_unet_reads(clip)
    tokens = (b, config.clip.text_length)
    return Work(
        _Contrast(clip), clip, [], lambda: (empty(b, 3, side, side), empty(*tokens, dtype=torch.int64))
    )


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return meter.attention(q, k, v, None, None)


def _forward_and_backward(work: Work, passes: int) -> None:
    for _ in range(passes):
        inputs = work.inputs()
        with parametrize.cached():  # as autocast keeps the weights it has cast until its end
            loss = work.step(*inputs)["loss"]
        torch.autograd.backward(loss)


class _Cast(nn.Module):
    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


def lower(network: nn.Module, dtype: torch.dtype) -> None:
    """Compute as under CUDA's autocast, which `meta` does not have: products in `dtype`, norms in float32."""
    for module in list(network.modules()):
        if isinstance(module, (*PRODUCTS, *NORMS)):
            wanted = dtype if isinstance(module, PRODUCTS) else torch.float32
            module.register_forward_pre_hook(lambda _, inputs, d=wanted: (inputs[0].to(d), *inputs[1:]))
            for name in ("weight", "bias"):
                if getattr(module, name) is not None:
                    parametrize.register_parametrization(module, name, _Cast(wanted), unsafe=True)


# ---------------------------------------------------------------------------------------------------
# What to do with it


def refuse(config: Config, train: Train, place: Place, free: int, ledger: Ledger) -> Estimate:
    """What a training takes; ValueError, with what would fit, if that is more than `free` bytes."""
    found = ledger.estimate(train, place)
    if found.total <= free or not config.runtime.check_memory:
        return found
    sample = config.sample
    raise ValueError(
        f"training at {sample.width} x {sample.height} x {sample.frames} with batch {train.batch} takes "
        f"{found}; {amount(free)} are free; {_advice(config, train, place, free, ledger)} "
        "(runtime.check_memory=false runs anyway)"
    )


def _advice(config: Config, train: Train, place: Place, free: int, ledger: Ledger) -> str:
    for words, changed in leaner(train, place):
        if ledger.estimate(changed, place).total <= free:
            return f"{words} would fit"
    if train.part == "diffusion" and not train.lora_rank and train.shard == "none":
        return "give a smaller size or fewer frames, or split it over several cards with train.shard=full"
    return "give a smaller size or fewer frames"


def leaner(train: Train, place: Place) -> Iterator[tuple[str, Train]]:
    """Settings that take less, and their words: savings one on top of the other, then adapters."""
    diffusion, changed = train.part == "diffusion", {}
    useless = {
        "checkpointing": not diffusion,
        "ema_device": not train.ema or place.device == "cpu",
        "batch": bool(train.bucket_batch) or train.part == "clip",  # CLIP contrasts the clips of a batch
    }
    for name, value in SAVINGS.items():
        if getattr(train, name) != value and not useless.get(name):
            changed[name] = value
            yield _words(changed), dataclasses.replace(train, **changed)
    if diffusion and not train.lora_rank and not train.text_encoder and train.shard == "none":
        changed = {"checkpointing": True, **ADAPTERS}
        yield _words(changed), dataclasses.replace(train, **changed)


def _words(changed: dict[str, object]) -> str:
    return " ".join(f"train.{name}={str(value).lower()}" for name, value in changed.items())


def table(train: Train, place: Place, ledger: Ledger) -> str:
    """Settings as given and leaner ones, a line each, in GiB."""
    rows = [("as given", ledger.estimate(train, place))]
    rows += [(words, ledger.estimate(other, place)) for words, other in leaner(train, place)]
    names = [*rows[0][1].held, *rows[0][1].steps]
    lines = [("", *names, "peak", "CPU")]
    for words, found in rows:
        counts = [*found.held.values(), *found.steps.values(), found.total, found.on_cpu]
        lines.append((words, *(f"{count / plans.GIB:.2f}" for count in counts)))
    return "\n".join(
        "| " + " | ".join(line) + " |" for line in [lines[0], ("---",) * len(lines[0]), *lines[1:]]
    )
