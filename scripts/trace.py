"""The command `i2vgen trace`; see `python scripts/trace.py --help`."""

import sys

from i2vgen.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["trace", *sys.argv[1:]]))
