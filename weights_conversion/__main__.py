"""`python -m weights_conversion convert ...`: the commands of `i2vgen` for checkpoints, by an older name."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from i2vgen import __main__ as door
from i2vgen.commands import COMMANDS

OURS = {name: COMMANDS[name] for name in ("convert", "export", "verify", "inspect")}


def main(argv: Sequence[str] | None = None) -> int:
    return door.main(argv, commands=OURS, program="python -m weights_conversion")


if __name__ == "__main__":
    sys.exit(main())
