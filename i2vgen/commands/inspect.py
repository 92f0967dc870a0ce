"""Describe a weights file or folder, of any known layout, without executing anything in it.

    i2vgen inspect PATH [--hash]

    --hash      also print SHA-256

PATH is a file or folder on this machine, or `lab`.
"""

from __future__ import annotations

from i2vgen import cli
from i2vgen.settings import shipped
from weights_conversion.inspect_file import describe
from weights_conversion.recognise import summary


def main(argv: list[str]) -> int:
    parser = cli.Parser("inspect")
    parser.add_argument("path", metavar="PATH")
    parser.add_argument("--hash", action="store_true")
    given = parser.read(argv)
    print(describe(shipped.weights(given.path), recognise=summary, hash=given.hash))
    return 0
