"""List parameters and cost of every module at any size, within seconds and without weights.

    python scripts/summary.py [config.yaml] [part=unet] [depth=2] [json=OUT.json] [setting=value ...]

    python scripts/summary.py                                  the released UNet at 1280 x 704, 16 frames
    python scripts/summary.py part=vae width=512 height=512
    python scripts/summary.py weights=FOLDER depth=4 use.local_tokens=false

    part=       unet (one branch of one step), vae (all frames decoded) or clip (one prompt, one picture)
    depth=      how many module levels to list; each row includes everything inside it
    json=       file for the rows as numbers
    weights=    native weights folder, used for its settings only; the weights are not read

A row without an output was not called as a whole, and shows the sum of its parts. The costs are those of the
plain networks; docs/performance.md has what the savings take off them.
"""

from __future__ import annotations

import sys

from i2vgen import cli
from i2vgen.files import checkpoint, whole
from i2vgen.files.tables import Table
from i2vgen.lab import summary
from i2vgen.settings.merge import load_config


def main() -> int:
    file, words, _ = cli.split(sys.argv[1:], doc=__doc__, bare=True)
    given, words = cli.take(words, numbers=("depth",), texts=("part", "json"))
    config = load_config(file, words)
    part = cli.choose("part", given.get("part", "unet"), checkpoint.PARTS)
    out = cli.check_file("json", given["json"], sys.argv[1:]) if "json" in given else None
    rows = summary.summarise(part, config, cli.at_least_one("depth", given.get("depth", 2)))
    header, *lines = summary.table(rows)
    print(Table("", header, tuple(lines), words=(0, 1, 2)))
    if out is not None:
        whole.write_json(out, summary.to_dict(rows), indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
