"""The command `i2vgen prepare`; see `python scripts/prepare.py --help`."""

import sys

from i2vgen.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["prepare", *sys.argv[1:]]))
