"""Where and how precisely to compute: what the settings say about device, dtype and process-wide switches."""

from __future__ import annotations

import einops
import torch

from i2vgen.settings.config import Runtime

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


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
            f"runtime.device is {runtime.device} but PyTorch sees {torch.cuda.device_count()} CUDA devices; "
            "leave device= out, or write device=cpu"
        )
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("runtime.device is mps but PyTorch sees no such device here")
    if chosen.type not in ("cpu", "cuda", "mps"):
        raise ValueError(
            f"runtime.device is {runtime.device}; known are auto, cpu, cuda, cuda:1 and mps (untested)"
        )
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
