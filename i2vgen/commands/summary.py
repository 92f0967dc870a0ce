"""List parameters and cost of every module at any size, within seconds and without weights.

    i2vgen summary [config.yaml] [part=unet] [depth=2] [json=OUT.json] [setting=value ...]

    i2vgen summary                                  the released UNet at 1280 x 704, 16 frames
    i2vgen summary part=vae width=512 height=512
    i2vgen summary weights=FOLDER depth=4 use.local_tokens=false

    part=       unet (one branch of one step), vae (all frames decoded) or clip (one prompt, one picture)
    depth=      how many module levels to list; each row includes everything inside it
    json=       file for the rows as numbers
    weights=    native weights folder, used for its settings only; the weights are not read

A row without an output was not called as a whole, and shows the sum of its parts. The costs are those of the
plain networks; docs/performance.md has what the savings take off them.
"""

from __future__ import annotations

from i2vgen import cli
from i2vgen.files import checkpoint, whole
from i2vgen.files.tables import Table
from i2vgen.lab import summary
from i2vgen.settings.merge import load_config


def main(argv: list[str]) -> int:
    file, words, _ = cli.split(argv)
    given, words = cli.take(words, numbers=("depth",), texts=("part", "json"))
    config = load_config(file, words)
    part = cli.choose("part", given.get("part", "unet"), checkpoint.PARTS)
    out = cli.check_file("json", given["json"], argv) if "json" in given else None
    rows = summary.summarise(part, config, cli.at_least_one("depth", given.get("depth", 2)))
    header, *lines = summary.table(rows)
    print(Table("", header, tuple(lines), words=(0, 1, 2)))
    if out is not None:
        whole.write_json(out, summary.to_dict(rows), indent=1)
    return 0
