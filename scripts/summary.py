"""The command `i2vgen summary`; see `python scripts/summary.py --help`."""

import sys

from i2vgen.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["summary", *sys.argv[1:]]))
