"""What this machine has and what is fastest on it: impossible settings are refused, `auto` is measured.

Axes: n sequences, m heads, d head width; b batch, f frames, p pixels of a frame, k context tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
import warnings
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

from i2vgen.fast import half, runtime, savings
from i2vgen.model.attention import Attention, FrameAttention, attend
from i2vgen.model.unet import UNet
from i2vgen.settings.config import Config

LOGGER = logging.getLogger(__name__)
CANDIDATES = ("sdpa", "flash", "cudnn", "efficient", "flash3")
PRODUCT = 512  # rows and columns of the product by which the precisions of a CPU are compared
PAYS = 2.0  # so many times as fast bfloat16 products must be; with units for them 4 to 9, without below 1
WIDE = 64  # channels of a UNet's finest level from which bfloat16 is faster in sampling, measured
QUERIES = 256  # compared with the formula: enough to notice a wrong kernel, few enough for its scores
NEEDS = {  # backends that may be missing, and what they need
    "flash": "a CUDA GPU of compute capability 8.0 or newer with float16 or bfloat16",
    "cudnn": "a CUDA GPU of compute capability 8.0 or newer with cuDNN 9 and float16 or bfloat16",
    "efficient": "a CUDA GPU",
    "flash3": "the package flash_attn_interface (FlashAttention-3), a Hopper GPU, float16 or bfloat16",
}


def refuse_missing(config: Config, device: torch.device) -> None:
    """ValueError for settings that need what this device does not have, before anything is loaded."""
    name, width, dtype = config.runtime.attention, config.unet.head_width, runtime.dtype(config.runtime)
    if name in NEEDS and not works(name, torch.zeros(1, 1, 16, width, dtype=dtype, device=device)):
        raise ValueError(
            f"runtime.attention is {name}, which does not work with {dtype} and heads of {width} on "
            f"{device}: it needs {NEEDS[name]}; runtime.attention=auto takes what is there"
        )
    savings.chosen(config.runtime.savings, device)
    if config.runtime.cuda_graph and device.type != "cuda":
        raise ValueError(
            f"runtime.cuda_graph is true, which needs a CUDA device, but this one is {device}; leave it out"
        )
    low, high = config.sample.guidance_interval
    changing = {
        "sample.guidance_interval": low > 0 or high < 1,
        "sample.deep_cache": config.sample.deep_cache > 1,
    }
    if config.runtime.cuda_graph and any(changing.values()):
        name = next(name for name, on in changing.items() if on)
        raise ValueError(
            f"runtime.cuda_graph replays one recorded step, but {name} makes the steps differ; "
            "leave one of the two out"
        )


@functools.cache
def product_speed(dtype: torch.dtype) -> float:
    """How many times as fast as in float32 this CPU multiplies matrices in `dtype`; 0 if it cannot."""
    torch_of = {one: torch.ones(PRODUCT, PRODUCT, dtype=one) for one in (torch.float32, dtype)}
    try:
        found = {one: seconds(lambda a=a: a @ a, torch.device("cpu")) for one, a in torch_of.items()}
    except RuntimeError as error:
        LOGGER.info("products in %s cannot be tried (%s)", dtype, str(error).partition("\n")[0])
        return 0.0
    return found[torch.float32] / found[dtype]


def bfloat16_pays() -> bool:
    """Whether this CPU has units for bfloat16: it is tried, in a few hundredths of a second."""
    return product_speed(torch.bfloat16) >= PAYS


def precision(dtype: torch.dtype, device: torch.device) -> str:
    """A precision by name, in half precision on a CPU with its speed there"""
    name = str(dtype).removeprefix("torch.")
    if device.type != "cpu" or dtype not in half.HALF:
        return name
    return f"{name}, whose products are {product_speed(dtype):.2g} times as fast as float32's here"


def choose_dtype(config: Config) -> Config:
    """`runtime.dtype=auto` on a CPU with units for bfloat16, where the UNet is wide enough -> bfloat16.

    A note for half precision that this CPU only emulates.
    """
    if runtime.device(config.runtime).type != "cpu":
        return config
    dtype = runtime.dtype(config.runtime)
    if config.runtime.dtype == "auto":
        if config.unet.widths[0] < WIDE or not bfloat16_pays():
            return config
        LOGGER.info(
            "dtype: bfloat16, which this CPU multiplies %.1f times as fast", product_speed(torch.bfloat16)
        )
        return dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, dtype="bfloat16"))
    if dtype in half.HALF and product_speed(dtype) < 1:
        warnings.warn(
            f"this CPU only emulates {config.runtime.dtype}: its products take "
            f"{1 / max(product_speed(dtype), 1e-3):.0f} times as long as in float32",
            stacklevel=2,
        )
    return config


@torch.no_grad()
def choose_attention(unet: UNet, config: Config, device: torch.device) -> dict[str, str]:
    """Set the backend of every spatial, cross- and temporal attention -> what was chosen for each kind.

    Measured once, at the real shapes of the finest level with attention; it takes well under a second.
    """
    level = config.unet.attention_levels.index(True) if True in config.unet.attention_levels else None
    if level is None:
        return {}
    h, w = (size >> level for size in config.latent_size)
    b, f, d = config.runtime.batch, config.sample.frames, config.unet.head_width
    m = config.unet.widths[level] // d
    dtype = unet.conv_in.weight.dtype

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    tokens = rearrange(normal(3, b * f, h * w, m * d), "i n p (m d) -> i n m p d", m=m)
    context = normal(2, b, m, config.unet.context_tokens(config.clip.text_length), d)
    frames = rearrange(normal(3, f, h * w, m * d), "i f p (m d) -> i p m f d", m=m)
    long = rearrange(tokens[0], "(b f) m p d -> b m (f p) d", b=b)
    chosen = {
        "spatial": fastest(*tokens),
        "cross": fastest(long, *context),
        "temporal": fastest(*frames),
    }
    for block in unet.blocks():
        pairs = []
        if block.spatial is not None:
            pairs = [("spatial", block.spatial.self_attention), ("cross", block.spatial.cross_attention)]
        if block.temporal is not None:
            pairs += [("temporal", part) for part in (block.temporal.attention1, block.temporal.attention2)]
        for kind, part in pairs:
            if isinstance(part, Attention | FrameAttention) and not callable(part.backend):
                part.backend = chosen[kind]
    LOGGER.info("attention: %s", ", ".join(f"{kind} {name}" for kind, name in chosen.items()))
    return chosen


def works(backend: str, like: Tensor) -> bool:
    """Whether a backend computes attention of tensors like this one: it is tried."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # PyTorch explains why not, kernel by kernel
        try:
            attend(like, like, like, backend)
        except (RuntimeError, ImportError):
            return False
    return True


def fastest(q: Tensor, k: Tensor, v: Tensor) -> str:
    """The fastest backend among those that work and are correct up to the dtype's rounding."""
    times = {}
    wanted = attend(*(x.float() for x in (q[:1, :1, :QUERIES], k[:1, :1], v[:1, :1])), "math")
    for name in CANDIDATES:
        if not works(name, q[:1, :, :QUERIES]):
            continue
        got = attend(q[:1], k[:1], v[:1], name)[:, :1, :QUERIES]
        if (got - wanted).norm() <= 4 * torch.finfo(q.dtype).eps * wanted.norm():
            times[name] = seconds(lambda name=name: attend(q, k, v, name), q.device)
    return min(times, key=times.get, default="sdpa")


def seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    """The shortest of three calls, after two to warm up."""
    taken = []
    for _ in range(5):
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        taken.append(time.perf_counter() - start)
    return min(taken[2:])


def wait(device: torch.device) -> None:
    """Until the device has finished its work; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
