"""torchrun ... tests/by_torchrun.py OUT LINES: commands one after the other in the same processes.

Each process writes what it said to OUT.RANK, as JSON. In the end the second fails in the middle of a clip.
"""

import json
import os
import sys
import warnings
from pathlib import Path

import ranks
import torch

torch.set_num_threads(1)
warnings.simplefilter("ignore")
out, lines = sys.argv[1:]
said = json.dumps(ranks.commands(json.loads(lines)))
Path(f"{out}.{os.environ['RANK']}").write_text(said, encoding="utf-8")
sys.exit(ranks.fails("raises"))
