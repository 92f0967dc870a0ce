"""Single operations at the shapes of the real network, each in the forms that are open to it.

Axes: f frames, h w latent rows and columns, p = h w flattened, c channels, m heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from i2vgen.bench.timing import clock_of, interleaved
from i2vgen.fast import savings
from i2vgen.model.layers import Conv, FeedForward, GroupNorm
from i2vgen.model.spatial import Upsample
from i2vgen.model.temporal import TemporalTransformer
from i2vgen.settings.config import Config, Runtime

Way = Callable[[], Tensor]
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def measure(settings: Config, device: torch.device, dtype: torch.dtype, *, dry: bool) -> dict:
    """-> milliseconds by "what: form"; None where a form does not run on this device, and why."""
    unet, (h, w) = settings.unet, settings.latent_size
    shape = settings.sample.frames, h, w, unet.base_width, unet.head_width

    def randn(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=device, dtype=dtype)

    def ready(module: nn.Module) -> nn.Module:
        module = module.to(device=device, dtype=dtype).eval().requires_grad_(False)
        for parameter in module.parameters():  # never zeros: they are faster
            parameter.data.normal_(std=0.02)
        return module

    groups: dict[str, dict[str, Way]] = {}
    groups["spatial attention"] = spatial_attention(randn, *shape)
    groups["attention over frames"] = frame_attention(randn, *shape)
    for level, width in enumerate(unet.widths[:3]):
        at = shape[0], h >> level, w >> level, width
        groups[f"convolution {width}"] = convolution(randn, ready, *at)
        groups[f"convolution over frames {width}"] = frame_convolution(randn, ready, *at)
    groups["group norm, SiLU"] = norms(randn, ready, *shape[:4], unet.norm_groups)
    groups["feed-forward"] = feed_forward(randn, ready, *shape[:4])
    groups["upsampling"] = upsampling(randn, ready, shape[0], h >> 1, w >> 1, unet.widths[1])
    groups["transformer over frames"] = transformer(randn, ready, *shape, unet.norm_groups)

    milliseconds: dict[str, float | None] = {}
    refused: dict[str, str] = {}
    for what, ways in groups.items():
        running = {}
        for form, call in ways.items():
            try:
                with torch.no_grad():
                    call()
                running[form] = torch.no_grad()(call)
            except RuntimeError as error:  # no such kernel here, or no memory for it
                milliseconds[f"{what}: {form}"] = None
                refused[f"{what}: {form}"] = str(error).splitlines()[0]
        times = interleaved(running, clock=clock_of(device), rounds=3 if dry else 7, warmups=1)
        milliseconds |= {f"{what}: {form}": 1e3 * times.median(form) for form in running}
    return {"milliseconds": milliseconds, "refused": refused}


def spatial_attention(randn, f: int, h: int, w: int, c: int, d: int) -> dict[str, Way]:
    q, k, v = (rearrange(randn(f, h * w, c), "f p (m d) -> f m p d", d=d) for _ in range(3))

    def by(backend: SDPBackend) -> Way:
        def call() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        return call

    return {"chosen": lambda: F.scaled_dot_product_attention(q, k, v)} | {
        name: by(backend) for name, backend in BACKENDS.items()
    }


def frame_attention(randn, f: int, h: int, w: int, c: int, d: int) -> dict[str, Way]:
    """The kernel alone, from tokens as they lie, [f p c]."""
    tokens = [randn(f, h * w, c) for _ in range(3)]

    def views() -> tuple[Tensor, ...]:
        return tuple(rearrange(x, "f p (m d) -> p m f d", d=d) for x in tokens)

    def products() -> Tensor:
        q, k, v = views()
        return ((q @ k.transpose(-1, -2)) * d**-0.5).softmax(-1) @ v

    return {
        "views": lambda: F.scaled_dot_product_attention(*views()),
        "copies": lambda: F.scaled_dot_product_attention(*(x.contiguous() for x in views())),
        "products": products,
        # Reads three, writes one: no kernel can be faster.
        "floor": lambda: torch.stack(tokens).sum(0),
    }


def convolution(randn, ready, f: int, h: int, w: int, c: int) -> dict[str, Way]:
    conv = ready(nn.Conv2d(c, c, 3, padding=1))
    last = ready(nn.Conv2d(c, c, 3, padding=1)).to(memory_format=torch.channels_last)
    plain = randn(f, c, h, w)
    other = plain.contiguous(memory_format=torch.channels_last)
    return {"rows last": lambda: conv(plain), "channels last": lambda: last(other)}


def frame_convolution(randn, ready, f: int, h: int, w: int, c: int) -> dict[str, Way]:
    cube, plane = (
        ready(nn.Conv3d(c, c, (3, 1, 1), padding=(1, 0, 0))),
        ready(Conv(c, c, (3, 1), padding=(1, 0))),
    )
    cube_last = ready(nn.Conv3d(c, c, (3, 1, 1), padding=(1, 0, 0))).to(memory_format=torch.channels_last_3d)
    tokens, volume = randn(1, f, h * w, c), randn(1, c, f, h, w)
    volume_last = volume.contiguous(memory_format=torch.channels_last_3d)
    weights = [part.squeeze(-1).contiguous() for part in plane.weight.split(1, dim=2)]
    weights = [part[:, :, 0] for part in weights]

    def products() -> Tensor:
        padded = F.pad(tokens, (0, 0, 0, 0, 1, 1))
        parts = [F.linear(padded[:, k : k + f], weights[k]) for k in range(3)]
        return parts[0] + parts[1] + parts[2] + plane.bias

    return {
        "3-D": lambda: cube(volume),
        "3-D, channels last": lambda: cube_last(volume_last),
        "2-D, channels last": lambda: plane(tokens),
        "three products": products,
    }


def norms(randn, ready, f: int, h: int, w: int, c: int, groups: int) -> dict[str, Way]:
    theirs, ours = ready(nn.GroupNorm(groups, c)), ready(GroupNorm(groups, c))
    plain, last = randn(f, c, h, w), randn(f, h, w, c)
    return {"rows last": lambda: F.silu(theirs(plain)), "channels last": lambda: F.silu(ours(last))}


def feed_forward(randn, ready, f: int, h: int, w: int, c: int) -> dict[str, Way]:
    plain, lean = ready(FeedForward(c)), with_saving(ready(FeedForward(c)), "in_place")
    tokens = randn(1, f * h * w, c)
    return {"one product": lambda: plain(tokens), "two products, in place": lambda: lean(tokens)}


def upsampling(randn, ready, f: int, h: int, w: int, c: int) -> dict[str, Way]:
    plain, folded = ready(Upsample(c)), with_saving(ready(Upsample(c)), "subpixel_upsampling")
    x = randn(1, f, h, w, c)
    return {"enlarge, then 3 x 3": lambda: plain(x), "four 2 x 2, then enlarge": lambda: folded(x)}


def with_saving(module: nn.Module, name: str) -> nn.Module:
    savings.apply(module, Runtime(savings=(name,)))
    return module


def transformer(randn, ready, f: int, h: int, w: int, c: int, d: int, groups: int) -> dict[str, Way]:
    module = TemporalTransformer(
        c, heads=c // d, head_width=d, groups=groups, second_attention=True, backend="sdpa"
    )
    module, x = ready(module), randn(1, f, h, w, c)
    return {"as it is": lambda: module(x)}
