"""The command `i2vgen refine-gain`; see `python scripts/refine_gain.py --help`."""

import sys

from i2vgen.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["refine-gain", *sys.argv[1:]]))
