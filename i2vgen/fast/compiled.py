"""The last before a UNet computes: torch.compile and CUDA graphs, both optional.

Where they fail, the run goes on without them.

Compiling goes block by block, so that blocks of one shape are compiled once; the UNet as a whole takes
minutes and gains nothing more. A CUDA graph plays a whole guidance step again without the CPU's say, which is
what small sizes wait for.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from i2vgen.diffusion.sampler import Predict
from i2vgen.fast import machine, speed
from i2vgen.fast.runtime import compile_quickly
from i2vgen.memory import storage
from i2vgen.model.unet import UNet
from i2vgen.settings.config import Config


def make_ready(unet: UNet, config: Config, device: torch.device) -> None:
    """Give a loaded UNet, of either stage, the form in which `runtime` wants it to compute there."""
    storage.store(unet, config.runtime.weight_storage)
    speed.apply(unet, config.runtime, device)
    if config.runtime.attention == "auto" and device.type == "cuda":
        machine.choose_attention(unet, config, device)
    if config.runtime.compile:
        compile_blocks(unet)


def compile_blocks(unet: UNet) -> None:
    """Every block of a UNet by torch.compile. The first failure ends it for all, with a warning."""
    compile_quickly()
    blocks = list(unet.blocks())
    # One piece of code for all blocks: each of their shapes may need its own result.
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 2 * len(blocks))
    failed: list[BaseException] = []
    for block in blocks:
        block.forward = _compiled(block.forward, failed)


def _compiled(function: Callable[..., Tensor], failed: list[BaseException]) -> Callable[..., Tensor]:
    fast = None

    def run(*inputs: object) -> Tensor:
        nonlocal fast
        if not failed:
            try:
                fast = fast or torch.compile(function)
                return fast(*inputs)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ImportError) as error:
                failed.append(error)
                warnings.warn(
                    f"runtime.compile does not work here and is left out: {_first_line(error)}", stacklevel=2
                )
        return function(*inputs)

    return run


class Recorded:
    """A network that is recorded at its first call and played again by every later one.

    Inputs are copied to where the recording reads them; another shape is recorded anew. What the network
    holds otherwise (weights, prepared conditions) is read where it lies, so a change in place is heard.
    """

    def __init__(self, predict: Predict):
        self.predict, self.playable = predict, True
        self.inputs: tuple[Tensor, ...] = ()
        self.play: Callable[[], Tensor] | None = None

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if self.playable and not self._fits(x, t):
            self._record(x, t)
        if not self.playable:
            return self.predict(x, t)
        for kept, new in zip(self.inputs, (x, t), strict=True):
            kept.copy_(new)
        return self.play().clone()

    def _fits(self, *inputs: Tensor) -> bool:
        return self.play is not None and all(
            (a.shape, a.dtype) == (b.shape, b.dtype) for a, b in zip(self.inputs, inputs, strict=True)
        )

    def _record(self, x: Tensor, t: Tensor) -> None:
        # t too where x is: a recording may not fetch it from the CPU.
        self.inputs, self.play = (x.clone(), t.to(x.device, copy=True)), None
        try:
            self.play = record(lambda: self.predict(*self.inputs))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.playable = False
            warnings.warn(
                f"runtime.cuda_graph does not work here and is left out: {_first_line(error)}", stacklevel=3
            )


def record(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A CUDA graph of `call` -> what plays it and returns its one result, overwritten each time."""
    if not torch.cuda.is_available():
        raise RuntimeError("there is no CUDA device")
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):  # libraries choose and compile their kernels before the recording
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def play() -> Tensor:
        graph.replay()
        return result

    return play


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
