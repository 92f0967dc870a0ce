"""Weights that stay on the CPU until they are needed: parts of the model, and blocks that run one by one.

The tensors in the modules stay the same objects; only their `.data` changes. The buffer on the CPU is kept,
so nothing is ever copied back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

ALIGN = 256  # bytes; every tensor of a flat buffer starts at a multiple, as kernels like it


def tensors(module: nn.Module) -> list[Tensor]:
    """All parameters and buffers, each once."""
    return list({id(t): t for t in (*module.parameters(), *module.buffers())}.values())


def flat_bytes(held: Iterable[Tensor]) -> int:
    return sum(-(-t.numel() * t.element_size() // ALIGN) * ALIGN for t in held)


class PackedTensors:
    """Tensors in one flat buffer on the CPU, so that a single copy moves all of them."""

    def __init__(self, held: Sequence[Tensor], *, pin: bool):
        self.held, self.nbytes = list(held), flat_bytes(held)
        # The layouts of now, channels last included: a later change of layout must not change these bytes.
        self.layouts = [(t.shape, t.stride()) for t in self.held]
        self.home = torch.empty(self.nbytes, dtype=torch.uint8, pin_memory=pin)
        views = self._views(self.home)
        for t, view in zip(self.held, views, strict=True):
            view.copy_(t)
            t.data = view

    def point_to(self, flat: Tensor) -> None:
        """Make the tensors views of this buffer: a copy of `home`, or `home` itself."""
        for t, view in zip(self.held, self._views(flat), strict=True):
            t.data = view

    def _views(self, flat: Tensor) -> list[Tensor]:
        views, start = [], 0
        for t, layout in zip(self.held, self.layouts, strict=True):
            size = t.numel() * t.element_size()
            views.append(flat[start : start + size].view(t.dtype).as_strided(*layout))
            start += -(-size // ALIGN) * ALIGN
        return views


class OffloadedPart:
    """A part that is on the device only inside `with part:`; its `streamed` blocks come one by one."""

    def __init__(self, module: nn.Module, device: torch.device, *, streamed: Streamed | None = None):
        blocks = streamed.held if streamed else set()
        self.packed = PackedTensors([t for t in tensors(module) if id(t) not in blocks], pin=False)
        self.device, self.streamed = device, streamed

    def __enter__(self) -> None:
        slot = torch.empty(self.packed.nbytes, dtype=torch.uint8, device=self.device)
        self.packed.point_to(slot.copy_(self.packed.home))
        if self.streamed:
            self.streamed.start()

    def __exit__(self, *raised) -> None:
        if self.streamed:
            self.streamed.stop()
        self.packed.point_to(self.packed.home)


class Streamed:
    """Blocks that run one after the other and take turns in two buffers on the device.

    While a block computes, the next one's weights arrive in the other buffer, on a CUDA stream of their own
    and from pinned memory. Blocks are expected in the order given, around and around; in another order
    everything is still right, only nothing arrives early. On a CPU the same is done without streams.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device, *, resident: Iterable[Tensor] = ()):
        self.device, cuda = device, device.type == "cuda"
        kept = {id(t) for t in resident}
        held = [[t for t in tensors(block) if id(t) not in kept] for block in blocks]
        self.held = {id(t) for one in held for t in one}
        self.packed_blocks = [PackedTensors(one, pin=cuda) for one in held]
        self.side = torch.cuda.Stream(device) if cuda else None
        self.arrived = [torch.cuda.Event() for _ in range(2)] if cuda else None
        self.buffers: list[Tensor] = []
        self.holds: list[int | None] = [None, None]  # which block's weights are in each buffer, or on the way
        self.last = 0  # the buffer of the block that ran last
        for i, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda module, inputs, i=i: self._begin(i))
            block.register_forward_hook(lambda module, inputs, output, i=i: self._end(i))

    @property
    def buffer_bytes(self) -> int:
        return 2 * max(packed.nbytes for packed in self.packed_blocks)

    def start(self) -> None:
        half = self.buffer_bytes // 2
        self.buffers = [torch.empty(half, dtype=torch.uint8, device=self.device) for _ in range(2)]
        self.holds, self.last = [None, None], 1
        self._fetch(0, 0)

    def stop(self) -> None:
        if self.side:  # nothing may still be arriving when the buffers go
            torch.cuda.current_stream(self.device).wait_stream(self.side)
        for i in range(len(self.packed_blocks)):
            self._end(i)
        self.buffers = []

    def _fetch(self, i: int, buffer: int) -> None:
        """Bring the weights of block i; the buffer's last user has been given to the main stream already."""
        self.holds[buffer] = i
        packed = self.packed_blocks[i]
        into = self.buffers[buffer][: packed.nbytes]
        if self.side is None:
            into.copy_(packed.home)
            return
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):
            into.copy_(packed.home, non_blocking=True)
            self.arrived[buffer].record()

    def _begin(self, i: int) -> None:
        if not self.buffers:  # outside of `start` and `stop` a block runs where it stands
            return
        buffer = 1 - self.last
        if self.holds[buffer] != i:
            self._fetch(i, buffer)
        if self.side:
            torch.cuda.current_stream(self.device).wait_event(self.arrived[buffer])
        self.packed_blocks[i].point_to(self.buffers[buffer])
        # The other buffer was the previous block's, all of whose work has been given to the main stream.
        self._fetch((i + 1) % len(self.packed_blocks), self.last)
        self.last = buffer

    def _end(self, i: int) -> None:
        self.packed_blocks[i].point_to(self.packed_blocks[i].home)
