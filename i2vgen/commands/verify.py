"""Compare the weights of two checkpoints, of any known layout.

    i2vgen verify A B [reference=diffusers] [setting=value ...]

    A, B                    as the SOURCE of `i2vgen convert`
    reference=diffusers     also run our UNet on A and diffusers' on B

The exit status is 1 if they differ.
"""

from __future__ import annotations

from i2vgen import cli
from i2vgen.settings import shipped
from weights_conversion.verify import verify


def main(argv: list[str]) -> int:
    parser = cli.Parser("verify")
    parser.add_argument("a", metavar="A")
    parser.add_argument("b", metavar="B")
    parser.add_argument("settings", nargs="*", metavar="setting=value")
    parser.add_argument("--reference", choices=["diffusers"])
    given = parser.read(argv)
    a, b = shipped.weights(given.a), shipped.weights(given.b)
    verdict = verify(a, b, reference=given.reference, overrides=tuple(given.settings))
    print("\n".join(verdict.lines))
    return 0 if verdict.passed else 1
