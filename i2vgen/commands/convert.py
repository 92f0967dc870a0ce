"""Convert any known checkpoint to a native weights folder.

    i2vgen convert SOURCE... OUT [dtype=NAME] [shard_size=5G] [variant=fp16] [compat=diffusers]
    [setting=value ...] [--dry-run] [--partial] [--ema] [--spatial-init] [--allow-nonfinite]

    i2vgen convert i2vgen_xl_00854500.pth v2-1_512-ema-pruned.ckpt open_clip_pytorch_model.bin weights/xl
    i2vgen convert hf:ali-vilab/i2vgen-xl weights/xl dtype=float16
    i2vgen convert weights/xl weights/fast sample.steps=30

    SOURCE              a checkpoint file, a folder, or hf:OWNER/NAME[@REVISION][#FOLDER_OR_FILE]
    dtype=              float32, float16, bfloat16, or int8: half the size of float16, not exact
                        (default: keep each tensor's)
    shard_size=         split parts into files of at most this size: 5G, 500M or a number of bytes
    variant=            diffusers folders: fp16 reads the *.fp16.* files
    compat=diffusers    use diffusers' scale, padding and gain instead of the trained ones
    --dry-run           read, map and check everything; write nothing
    --partial           take what fits; initialise the rest
    --ema               take averaged weights where a file holds both kinds
    --spatial-init      initialise from a Stable Diffusion 2.1 UNet
    --allow-nonfinite   convert despite NaN or infinity

It never executes code from a file. docs/conversion.md says what it reads.
"""

from __future__ import annotations

import argparse
import os

from tqdm import tqdm

from i2vgen import cli
from i2vgen.fast import runtime
from i2vgen.files import whole
from i2vgen.settings import shipped
from weights_conversion.convert import CHECKING, convert

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
DTYPES = ("float32", "float16", "bfloat16", "int8")


def main(argv: list[str]) -> int:
    arguments = parse(argv)
    names = [word for word in arguments.words if not cli.is_setting(word)]
    if len(names) < 2:
        raise ValueError("convert needs at least one SOURCE and the folder OUT to write")
    sources, out = [shipped.weights(name) for name in names[:-1]], names[-1]
    if not arguments.dry_run:
        check_out(out, sources)
    with Bars() as bars:
        report = convert(
            sources,
            out,
            overrides=[word for word in arguments.words if cli.is_setting(word)],
            dtype=runtime.DTYPES.get(arguments.dtype),
            eight_bits=arguments.dtype == "int8",
            shard_bytes=arguments.shard_size,
            dry_run=arguments.dry_run,
            partial=arguments.partial,
            allow_nonfinite=arguments.allow_nonfinite,
            spatial_init=arguments.spatial_init,
            variant=arguments.variant,
            compat=arguments.compat,
            ema=arguments.ema,
            on_bytes=bars.show,
        )
    print(report.text())
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser("convert")
    parser.add_argument("words", nargs="+", metavar="SOURCE... OUT [setting=value]")
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--shard-size", type=size, metavar="5G")
    parser.add_argument("--variant")
    parser.add_argument("--compat", choices=["diffusers"])
    for flag in ("--dry-run", "--partial", "--ema", "--spatial-init", "--allow-nonfinite"):
        parser.add_argument(flag, action="store_true")
    return parser.read(argv)


def check_out(out: str, sources: list[str]) -> None:
    """ValueError, before anything is read and hashed, unless the folder OUT can be written without loss."""
    whole.check_place("OUT", out)
    # A native folder may be converted in place; one that only holds the source would lose the rest.
    whole.refuse_overwriting([out], [s for s in sources if os.path.realpath(s) != os.path.realpath(out)])


def size(text: str) -> int:
    """5G, 500M or 123456 -> bytes."""
    unit = text[-1:].upper() if text[-1:].upper() in UNITS and not text[-1:].isdigit() else ""
    try:
        value = int(float(text.removesuffix(text[-1:]) if unit else text) * UNITS[unit])
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size; write 5G, 500M or a number of bytes"
        ) from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size above zero; write 5G, 500M or bytes")
    return value


class Bars:
    """Shows one progress bar at a time, for the current task."""

    def __init__(self):
        self.bar, self.label = None, ""

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *exception) -> None:
        if self.bar is not None:
            self.bar.close()

    def show(self, label: str, done: int, total: int) -> None:
        if self.bar is None or label != self.label:
            if self.bar is not None:
                self.bar.close()
            self.label = label
            of_tensors = label == CHECKING
            self.bar = tqdm(
                desc=cli.shown(label),
                total=total,
                unit="tensor" if of_tensors else "B",
                unit_scale=not of_tensors,
                mininterval=0.5,
                leave=False,
            )
        self.bar.update(done - self.bar.n)
