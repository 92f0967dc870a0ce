"""DeepCache (Ma et al. 2023, arXiv 2312.00858): most steps recompute only the finest blocks of the UNet.

Neighbouring steps differ little deep inside the network. Every `interval`-th step runs all of it and keeps
what enters its last blocks; the steps between compute only the entrance and these blocks. Unlike the savings
of this wing it changes the numbers, so it is off by default and its settings are in `sample`.
"""

from __future__ import annotations

from torch import Tensor, nn

from i2vgen.diffusion.sampler import Predict
from i2vgen.fast.unet import Deep, FastUNet
from i2vgen.model.conditioning import Prepared
from i2vgen.model.unet import UNet


class DeepCache:
    """Made for one sampling. A step is a new t: two calls at the same t belong to one step."""

    def __init__(self, interval: int, blocks: int):
        self.interval, self.blocks = interval, blocks
        self.step, self.t = -1, None

    def over(self, unet: FastUNet, prepared: Prepared) -> Predict:
        """The network under these conditions. The features it keeps are used for no others."""
        features, computed_at = None, None

        def predict(x: Tensor, t: Tensor) -> Tensor:
            nonlocal features, computed_at
            step = self.count(int(t[0]))
            if features is None or step - computed_at >= self.interval:
                features, computed_at = None, step
            out, features = unet(x, t.to(x.device), prepared, deep=Deep(self.blocks, features))
            return out

        return predict

    def count(self, t: int) -> int:
        if t != self.t:
            self.step, self.t = self.step + 1, t
        return self.step


def check(unet: nn.Module) -> None:
    """ValueError for a network whose deep part cannot be left out."""
    if type(unet) is UNet:
        raise ValueError(
            "sample.deep_cache needs the faster form of the UNet, which runtime.savings=none switches off; "
            "use runtime.savings=all or sample.deep_cache=0"
        )
    if type(unet) is not FastUNet:
        raise ValueError(
            f"sample.deep_cache leaves out parts of i2vgen.model.unet.UNet, but the network is a "
            f"{type(unet).__name__} with a forward of its own; use sample.deep_cache=0"
        )
