"""Export a native weights folder to another layout, bit for bit.

    i2vgen export NATIVE OUT layout=vgen|diffusers [dtype=NAME] [shard_size=5G] [--no-fold]

    layout=vgen         the official checkpoints' files and names
    layout=diffusers    a folder for diffusers' I2VGenXLPipeline
    dtype=              float32, float16 or bfloat16 (default: keep each tensor's)
    shard_size=         split parts into files of at most this size: 5G, 500M or a number of bytes
    --no-fold           diffusers: do not fold the concat gain into conv_in

docs/conversion.md says what each layout holds.
"""

from __future__ import annotations

import argparse

from i2vgen import cli
from i2vgen.commands.convert import DTYPES, Bars, check_out, size
from i2vgen.fast import runtime
from weights_conversion.export import LAYOUTS, export


def main(argv: list[str]) -> int:
    arguments = parse(argv)
    check_out(arguments.out, [arguments.native])
    with Bars() as bars:
        notes = export(
            arguments.native,
            arguments.out,
            layout=arguments.layout,
            fold=not arguments.no_fold,
            dtype=runtime.DTYPES[arguments.dtype] if arguments.dtype else None,
            shard_bytes=arguments.shard_size,
            on_bytes=lambda done, total: bars.show("writing", done, total),
        )
    for note in notes:
        print(f"note: {note}")
    print(f"written to {cli.shown(arguments.out)}")
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser("export")
    parser.add_argument("native", metavar="NATIVE")
    parser.add_argument("out", metavar="OUT")
    parser.add_argument("--layout", choices=LAYOUTS, required=True)
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--shard-size", type=size, metavar="5G")
    parser.add_argument("--no-fold", action="store_true")
    return parser.read(argv)
