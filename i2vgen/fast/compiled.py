"""torch.compile and CUDA graphs, both optional. Where they fail, sampling goes on without them.

Blocks are compiled one by one, so that blocks of one shape are compiled once; compiling the whole UNet takes
minutes and gains nothing more. A CUDA graph replays a whole guidance step without waiting for the CPU, which
dominates at small sizes.

Compiled and recorded code does not see hooks. So both are entered only while no module inside is hooked,
replaced or changed; otherwise the modules are called as usual. Training (`train.compile`) compiles what it
finds at its first step, adapters and replaced modules included, and only what has a backward pass.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from i2vgen.diffusion.sampler import Predict
from i2vgen.fast.checkpointing import CheckpointedBlock
from i2vgen.fast.guard import undisturbed
from i2vgen.fast.runtime import compile_quickly
from i2vgen.model.unet import Block, UNet

# The first failure of torch.compile; after it all blocks run uncompiled.
_failed: list[BaseException] = []


class CompiledBlock(Block):
    """A block by torch.compile."""

    plain = Block

    def forward(self, *inputs: object) -> Tensor:
        if _failed or torch.is_grad_enabled() or not undisturbed(self):
            return super().forward(*inputs)
        try:
            return _code()(self, *inputs)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ImportError) as error:
            _failed.append(error)
            warnings.warn(
                f"runtime.compile does not work here and is left out: {_first_line(error)}", stacklevel=2
            )
            return super().forward(*inputs)


@functools.cache
def _code() -> Callable[..., Tensor]:
    """One piece of code for all blocks; each of their shapes gets a compilation of its own."""
    return torch.compile(Block.forward)


def compile_blocks(unet: UNet) -> None:
    """Run every block of a UNet that is exactly ours by torch.compile from now on."""
    compile_quickly()
    _failed.clear()
    _code.cache_clear()
    blocks = [block for block in unet.blocks() if type(block) is Block]
    _allow(2 * len(blocks))
    for block in blocks:
        block.__class__ = CompiledBlock


class TrainedBlock(Block):
    """A block whose training, forward and backward, is compiled; without gradients it runs as usual."""

    plain, uncompiled = Block, Block

    def forward(self, *inputs: object) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(*inputs)
        return _training(self.uncompiled, self, inputs)


class CheckpointedTrainedBlock(TrainedBlock, CheckpointedBlock):
    """The same of a block that is checkpointed, which the compiler knows to keep."""

    uncompiled = CheckpointedBlock


TRAINED = {Block: TrainedBlock, CheckpointedBlock: CheckpointedTrainedBlock}


def _training(kind: type[Block], block: Block, inputs: tuple[object, ...]) -> Tensor:
    try:
        return _training_code(kind)(block, *inputs)
    except torch._dynamo.exc.TorchDynamoException as error:
        raise _uncompilable(error) from error


@functools.cache
def _training_code(kind: type[Block]) -> Callable[..., Tensor]:
    """One piece of code for all blocks; each shape of inputs and weights gets a compilation of its own."""
    return torch.compile(kind.forward, dynamic=False)


def compile_training(unet: UNet, shapes: int, device: torch.device) -> None:
    """Train every block of a UNet that is exactly ours, checkpointed or not, by torch.compile from now on.

    `shapes` says how many shapes of inputs will come. Weights, names and isinstance stay. ValueError if
    torch.compile does not work here.
    """
    compile_quickly()
    _training_code.cache_clear()
    _try_out(device)
    blocks = [block for block in unet.blocks() if type(block) in TRAINED]
    _allow(len(blocks) * shapes)
    # It would cut blocks where DistributedDataParallel sends gradients, and cannot cut checkpointed ones.
    torch._dynamo.config.optimize_ddp = False
    for block in blocks:
        block.__class__ = TRAINED[type(block)]


def _try_out(device: torch.device) -> None:
    """Compile a line and its backward pass; ValueError says why that fails, before any work."""
    x = torch.ones(2, device=device, requires_grad=True)
    try:
        torch.compile(lambda x: (x * x).sin(), dynamic=False)(x).sum().backward()
    except (RuntimeError, ImportError) as error:
        raise _uncompilable(error) from error


def _uncompilable(error: BaseException) -> ValueError:
    why = _first_line(getattr(error, "inner_exception", error))  # dynamo's own first line names no reason
    return ValueError(f"train.compile=true does not work here: {why}; leave it out")


def _allow(compilations: int) -> None:
    """Let so many more pieces of code be compiled from one function; those of earlier networks stay."""
    settings = torch._dynamo.config
    settings.cache_size_limit += compilations
    settings.accumulated_cache_size_limit = max(
        settings.accumulated_cache_size_limit, settings.cache_size_limit
    )


class Recorded:
    """A network under fixed conditions, recorded at its first call and replayed by every later one.

    Inputs are copied to where the recording reads them; another shape is recorded anew. Weights and prepared
    conditions are read where they are, so later in-place changes take effect. While a module of `network` is
    disturbed (`guard.undisturbed`), nothing is replayed.
    """

    def __init__(self, predict: Predict, network: nn.Module):
        self.predict, self.network, self.playable = predict, network, True
        self.inputs: tuple[Tensor, ...] = ()
        self.play: Callable[[], Tensor] | None = None

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        undisturbed_ = undisturbed(self.network)
        if self.playable and undisturbed_ and not self._fits(x, t):
            self._record(x, t)
        if not (self.playable and undisturbed_):
            return self.predict(x, t)
        for kept, new in zip(self.inputs, (x, t), strict=True):
            kept.copy_(new)
        return self.play().clone()

    def _fits(self, *inputs: Tensor) -> bool:
        return self.play is not None and all(
            (a.shape, a.dtype) == (b.shape, b.dtype) for a, b in zip(self.inputs, inputs, strict=True)
        )

    def _record(self, x: Tensor, t: Tensor) -> None:
        # t is copied to where x is: a recording must not fetch it from the CPU.
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
    """A CUDA graph of `call` -> a function that replays it and returns its result, overwritten each time."""
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
