"""The command `i2vgen draw-example`; see `python scripts/draw_example.py --help`."""

import sys

from i2vgen.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["draw-example", *sys.argv[1:]]))
