"""DeepCache (Ma et al. 2023, arXiv 2312.00858): most steps compute only the finest blocks of the UNet anew.

Neighbouring steps differ little deep inside. Every `interval`-th step runs the whole network and keeps what
enters its last blocks; the steps between compute the entrance and these blocks, and take the rest from
there. Unlike the savings of `speed.py` this changes the numbers: it is off by default and stands in `sample`.
"""

from __future__ import annotations

from torch import Tensor, nn

from i2vgen.diffusion.sampler import Predict
from i2vgen.model.conditioning import Prepared
from i2vgen.model.unet import Deep, UNet


class DeepCache:
    """Made for one sampling, which owns what it keeps. A step is a new t: two calls at one t are one step."""

    def __init__(self, interval: int, blocks: int):
        self.interval, self.blocks = interval, blocks
        self.step, self.t = -1, None

    def over(self, unet: UNet, prepared: Prepared) -> Predict:
        """The network under these conditions. What it keeps is its own: conditions share nothing."""
        deep, filled = Deep(self.blocks, []), None

        def predict(x: Tensor, t: Tensor) -> Tensor:
            nonlocal filled
            step = self.count(int(t[0]))
            if filled is None or step - filled >= self.interval:
                deep.kept.clear()
                filled = step
            return unet(x, t.to(x.device), prepared, deep)

        return predict

    def count(self, t: int) -> int:
        if t != self.t:
            self.step, self.t = self.step + 1, t
        return self.step


def check(unet: nn.Module) -> None:
    """ValueError for a network that is not, or no longer, the one whose deep part can be left out."""
    kind = type(unet)
    known = isinstance(unet, UNet) and kind.forward is UNet.forward
    known = known and kind.blocks_and_head is UNet.blocks_and_head
    if not known:
        raise ValueError(
            f"sample.deep_cache leaves out parts of i2vgen.model.unet.UNet, but the network is a "
            f"{type(unet).__name__} with a forward of its own; use sample.deep_cache=0"
        )
    if unet.control is not None:
        raise ValueError(
            "sample.deep_cache leaves out the blocks to which an adapter adds (taps.controlled); "
            "use sample.deep_cache=0"
        )
