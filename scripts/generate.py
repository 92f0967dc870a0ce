"""The command `i2vgen generate`; see `python scripts/generate.py --help`."""

import sys

from i2vgen.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
