"""Export a native weights folder to another layout, bit for bit, or an adapter to diffusers' names.

    i2vgen export NATIVE OUT layout=vgen|diffusers [dtype=NAME] [shard_size=5G] [--no-fold]
    i2vgen export ADAPTER OUT layout=diffusers [weights=NATIVE] [--no-fold]

    layout=vgen         the official checkpoints' files and names
    layout=diffusers    a folder for diffusers' I2VGenXLPipeline
    weights=            of an adapter: the native folder that it was trained on (default: the released model)
    dtype=              float32, float16 or bfloat16 (default: keep each tensor's)
    shard_size=         split parts into files of at most this size: 5G, 500M or a number of bytes
    --no-fold           diffusers: do not fold the concat gain into conv_in

docs/conversion.md says what each layout holds.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from i2vgen import cli
from i2vgen.adapt import lora_files
from i2vgen.commands.convert import DTYPES, Bars, check_out, size
from i2vgen.fast import runtime
from i2vgen.files import checkpoint, plugins
from i2vgen.settings import shipped
from i2vgen.settings.merge import load_config
from weights_conversion import adapters
from weights_conversion.export import LAYOUTS, export


def main(argv: list[str]) -> int:
    arguments = parse(argv)
    arguments.native = shipped.weights(arguments.native)
    check_out(arguments.out, [arguments.native])
    if adapters.is_adapter(Path(arguments.native)):
        return export_adapter(arguments)
    if arguments.weights:
        raise ValueError(f"weights= belongs to an adapter, but {arguments.native} is none; leave it out")
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
    tell(arguments.out, notes + plugin_notes(checkpoint.read_origin(arguments.native)))
    if arguments.layout == "diffusers":
        print(f'load it: pipe = diffusers.I2VGenXLPipeline.from_pretrained("{cli.shown(arguments.out)}")')
    return 0


def export_adapter(arguments: argparse.Namespace) -> int:
    if arguments.layout != "diffusers":
        raise ValueError(
            f"layout={arguments.layout} has no adapters: the official code reads none; use layout=diffusers"
        )
    for name in ("dtype", "shard_size"):
        if getattr(arguments, name):
            raise ValueError(f"{name}= has no effect on an adapter; leave it out")
    config = load_config(None, [f"weights={arguments.weights}"] if arguments.weights else [])
    notes = adapters.export(arguments.native, arguments.out, config, fold=not arguments.no_fold)
    tell(arguments.out, notes + plugin_notes(lora_files.origin(arguments.native)))
    print(
        "load it onto the pipeline of its base: pipe.unet = peft.PeftModel.from_pretrained(pipe.unet, "
        f'"{cli.shown(arguments.out)}").merge_and_unload()'
    )
    return 0


def plugin_notes(origin: Mapping) -> list[str]:
    """What other programs cannot know of"""
    trained = plugins.recorded(origin)
    return [f"trained with the plugin {plugins.named(trained)}, which is not exported"] if trained else []


def tell(out: str, notes: list[str]) -> None:
    for note in notes:
        print(f"note: {note}")
    print(f"written to {cli.shown(out)}")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser("export")
    parser.add_argument("native", metavar="NATIVE")
    parser.add_argument("out", metavar="OUT")
    parser.add_argument("--layout", choices=LAYOUTS, required=True)
    parser.add_argument("--weights", metavar="NATIVE")
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--shard-size", type=size, metavar="5G")
    parser.add_argument("--no-fold", action="store_true")
    return parser.read(argv)
