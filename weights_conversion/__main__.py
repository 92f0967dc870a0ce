"""Convert, export, verify and inspect checkpoints.

    python -m weights_conversion convert SOURCE... OUT [setting=value ...]
    python -m weights_conversion export NATIVE OUT --layout vgen|diffusers
    python -m weights_conversion verify A B [--reference diffusers]
    python -m weights_conversion inspect PATH

A SOURCE is a checkpoint file, a folder, or hf:OWNER/NAME[@REVISION][#FOLDER_OR_FILE]. See docs/conversion.md.
"""

from __future__ import annotations

import argparse
import os
import sys

from tqdm import tqdm

from i2vgen import cli
from i2vgen.fast import runtime
from i2vgen.files import whole
from weights_conversion.convert import CHECKING, convert
from weights_conversion.export import LAYOUTS, export
from weights_conversion.inspect_file import describe
from weights_conversion.recognise import summary
from weights_conversion.verify import verify

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    top, commands = parser()
    if argv and argv[0] in commands:  # settings may stand before and after the options
        arguments = commands[argv[0]].parse_intermixed_args(argv[1:])
    else:
        arguments = top.parse_args(argv)
    return arguments.run(arguments)


def parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """-> the whole command, and its parts by name."""
    top = argparse.ArgumentParser(
        prog="python -m weights_conversion",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    c = commands.add_parser("convert", help="convert any known checkpoint to a native folder")
    c.add_argument("words", nargs="+", metavar="SOURCE... OUT [setting=value]")
    c.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="default: keep each tensor's")
    c.add_argument(
        "--shard-size", type=size, metavar="5G", help="split parts into files of at most this size"
    )
    c.add_argument("--dry-run", action="store_true", help="read, map and check everything; write nothing")
    c.add_argument("--partial", action="store_true", help="take what fits; initialise the rest")
    c.add_argument("--allow-nonfinite", action="store_true", help="convert despite NaN or infinity")
    c.add_argument("--spatial-init", action="store_true", help="initialise from a Stable Diffusion 2.1 UNet")
    c.add_argument("--ema", action="store_true", help="take averaged weights where a file holds both kinds")
    c.add_argument("--variant", help="diffusers folders: fp16 reads the *.fp16.* files")
    c.add_argument(
        "--compat",
        choices=["diffusers"],
        help="use diffusers' scale, padding and gain instead of the trained ones",
    )
    c.set_defaults(run=run_convert)

    e = commands.add_parser("export", help="export a native folder to another layout")
    e.add_argument("native")
    e.add_argument("out")
    e.add_argument("--layout", choices=LAYOUTS, required=True)
    e.add_argument(
        "--no-fold", action="store_true", help="diffusers: do not fold the concat gain into conv_in"
    )
    e.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="default: keep each tensor's")
    e.add_argument("--shard-size", type=size, metavar="5G")
    e.set_defaults(run=run_export)

    v = commands.add_parser("verify", help="compare the weights in A and B; exit status 1 if they differ")
    v.add_argument("a")
    v.add_argument("b")
    v.add_argument("settings", nargs="*", metavar="setting=value")
    v.add_argument("--reference", choices=["diffusers"], help="also run our UNet on A and diffusers' on B")
    v.set_defaults(run=run_verify)

    i = commands.add_parser("inspect", help="describe a file or folder without executing anything in it")
    i.add_argument("path")
    i.add_argument("--hash", action="store_true", help="also print SHA-256")
    i.set_defaults(run=run_inspect)
    return top, commands.choices


def run_convert(arguments: argparse.Namespace) -> int:
    names = [word for word in arguments.words if not cli.is_setting(word)]
    if len(names) < 2:
        raise ValueError("convert needs at least one SOURCE and the folder OUT to write")
    if not arguments.dry_run:
        check_out(names[-1], names[:-1])
    with Bars() as bars:
        report = convert(
            names[:-1],
            names[-1],
            overrides=[word for word in arguments.words if cli.is_setting(word)],
            dtype=runtime.DTYPES[arguments.dtype] if arguments.dtype else None,
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


def check_out(out: str, sources: list[str]) -> None:
    """ValueError, before anything is read and hashed, unless the folder OUT can be written without loss."""
    whole.check_place("OUT", out)
    # A native folder may be converted in place; one that only holds the source would lose the rest.
    whole.refuse_overwriting([out], [s for s in sources if os.path.realpath(s) != os.path.realpath(out)])


def run_export(arguments: argparse.Namespace) -> int:
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


def run_verify(arguments: argparse.Namespace) -> int:
    verdict = verify(
        arguments.a, arguments.b, reference=arguments.reference, overrides=tuple(arguments.settings)
    )
    print("\n".join(verdict.lines))
    return 0 if verdict.passed else 1


def run_inspect(arguments: argparse.Namespace) -> int:
    print(describe(arguments.path, recognise=summary, hash=arguments.hash))
    return 0


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


if __name__ == "__main__":
    sys.exit(cli.run(main))
