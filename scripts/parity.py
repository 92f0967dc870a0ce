"""The command `i2vgen parity`; see `python scripts/parity.py --help`."""

import sys

from i2vgen.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["parity", *sys.argv[1:]]))
