"""The command `i2vgen vbench`; see `python scripts/vbench.py --help`."""

import sys

from i2vgen.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["vbench", *sys.argv[1:]]))
