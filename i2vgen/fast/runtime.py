"""Where and how precisely to compute: device, dtype, per-sample noise, and the memory a run will need."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import einops
import torch
from torch import Tensor, nn

from i2vgen.settings.config import Config, Runtime

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
GIB = 2**30


def device(runtime: Runtime) -> torch.device:
    """ValueError if the device does not exist on this machine."""
    if runtime.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(runtime.device)
    except RuntimeError:
        raise ValueError(f"runtime.device is {runtime.device!r}; use auto, cpu, cuda or cuda:1") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"runtime.device is {runtime.device} but PyTorch sees {torch.cuda.device_count()} CUDA devices"
        )
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("runtime.device is mps but PyTorch sees no such device here")
    if chosen.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"runtime.device is {runtime.device}; known are auto, cpu, cuda, cuda:1 and mps")
    return chosen


def dtype(runtime: Runtime) -> torch.dtype:
    """The UNet's. auto: float16 on CUDA as the official sampler, float32 elsewhere."""
    if runtime.dtype == "auto":
        return torch.float16 if device(runtime).type == "cuda" else torch.float32
    return DTYPES[runtime.dtype]


def apply(runtime: Runtime) -> None:
    """Process-wide switches of PyTorch. Scripts call this; importing the package never does."""
    torch.backends.cuda.matmul.allow_tf32 = runtime.tf32
    torch.backends.cudnn.allow_tf32 = runtime.tf32


def compile_quickly() -> None:
    """To call before `torch.compile`: an einops call becomes one node of the graph.

    Since PyTorch 2.8 the compiler looks into einops, with the same result and ten times the waiting.
    """
    for function in (einops.rearrange, einops.repeat):
        torch.compiler.allow_in_graph(function)


class SampleNoise:
    """All random numbers of one sample, from its own CPU generator, in the official order.

    First the posterior noise of the first-frame latent, then the initial noise, then one draw per step where
    eta asks for it. So a sample depends on its seed alone: not on batch, device or neighbours.
    """

    def __init__(self, seed: int | torch.Generator):
        self.generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)

    def draw(self, shape: tuple[int, ...]) -> Tensor:
        """Standard normal float32 of shape (1, *shape) on the CPU, as the official code draws it."""
        return torch.randn(1, *shape, generator=self.generator)


def draw_all(samples: list[SampleNoise], shape: tuple[int, ...]) -> Tensor:
    """One draw of every sample, stacked: [b, *shape]."""
    return torch.cat([sample.draw(shape) for sample in samples])


# ---------------------------------------------------------------------------------------------------
# Memory


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes a run will need on the device: resident weights, and the largest activations of one part."""

    weights: int
    unet: int
    decoder: int

    @property
    def total(self) -> int:
        return self.weights + max(self.unet, self.decoder)

    def __str__(self) -> str:
        return (
            f"{self.total / GIB:.1f} GiB ({self.weights / GIB:.1f} weights + "
            f"{self.unet / GIB:.1f} in the UNet or {self.decoder / GIB:.1f} in the VAE decoder)"
        )


def estimate_memory(config: Config, parts: dict[str, nn.Module]) -> MemoryEstimate:
    """A formula for the plain modules, for parts that cannot be counted (`memory.py`); they may be on `meta`.

    Level-0 tensors dominate the UNet: per token a transformer's feed-forward holds its 8x projection, the
    gate's activation and the product (4x each) beside the residual stream; the first temporal transformer
    has its own width.
    """
    runtime, unet, vae = config.runtime, config.unet, config.vae
    sizes = {"unet": dtype(runtime), "vae": DTYPES[runtime.vae_dtype], "clip": DTYPES[runtime.encoder_dtype]}
    weights = sum(sum(p.numel() for p in parts[name].parameters()) * sizes[name].itemsize for name in parts)
    rows, columns = config.latent_size
    tokens = runtime.batch * config.sample.frames * rows * columns
    widths = [unet.base_width] * unet.attention_levels[0]
    if config.use.temporal_attention:
        widths.append(unet.first_temporal_heads * unet.head_width)
    # A ResBlock of the last level holds its doubled input, two norms of it and the convolution's output.
    per_token = max([18 * width + 2 * unet.base_width for width in widths] + [12 * unet.base_width])
    activations = tokens * per_token * sizes["unet"].itemsize
    if runtime.attention == "math":
        heads = max(unet.base_width // unet.head_width, 1)
        activations += 3 * heads * config.sample.frames * (rows * columns) ** 2 * sizes["unet"].itemsize
    pixels = config.sample.width * config.sample.height
    frames = min(runtime.vae_chunk, runtime.batch * config.sample.frames)
    decoder = frames * pixels * 6 * vae.base_width * sizes["vae"].itemsize
    decoder += runtime.batch * config.sample.frames * pixels * vae.channels * sizes["vae"].itemsize
    return MemoryEstimate(weights, activations, decoder)


def free_memory(where: torch.device) -> int:
    """Bytes that a new run may take there; infinite where nobody tells."""
    if where.type == "cuda":
        free, _ = torch.cuda.mem_get_info(where)
        return free + torch.cuda.memory_reserved(where) - torch.cuda.memory_allocated(where)
    limits = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        if "MemAvailable" in fields:
            limits.append(int(fields["MemAvailable"].split()[0]) * 1024)
    # A container's own limit (cgroup v2) can be below the machine's free memory.
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        limits.append(max(0, int(limit.read_text()) - int(used.read_text())))
    return min(limits, default=2**63)
