"""Kill every command at random moments and start it again: a job for minutes, not a test.

    python tests/kills.py [COUNT] [--commands generate,train,...] [--seed N]

    COUNT        kills that meet each command at work (default 10), in turn by SIGKILL, SIGTERM and SIGINT;
                 four times as many are tried at most
    --commands   only these: generate, convert, export, train, prepare, evaluate, score, ablate

After each kill, a file under its final name must be the one that an undisturbed run writes, and no process
may be left. At last the command runs to its end: the result must be that of the undisturbed run, and no
unfinished file may be left. The exit status is 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"
STAR, SMALL = ROOT / "i2vgen/assets/star.png", ROOT / "i2vgen/assets/small"
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
STATUS = {signal.SIGINT: {130, -signal.SIGINT}}  # -2: before Python had started
# Files that change while a command works; only their end is compared, where two undisturbed runs agree on it.
GROWING = re.compile(r"(.*/)?(log\.jsonl|events\.out\..+|\.lock|code\.json)|weights/.*")
TIMED = re.compile(r"(.*/)?(table\.md|index\.html|results\.csv)")  # they say how long the work took
SECONDS = re.compile(rb'"seconds": [0-9.]+')
UNFINISHED = re.compile(r"\..+\.(writing|old)-.+")
STUDY = """# Does the concat branch matter?
measures: [untrained]
scores: [first_frame_psnr]
variants: {with it: [], without: [use.concat=false]}
"""


class Command(NamedTuple):
    """`words(out)` is the command line that writes into `out`; `whole`: it is there whole or not at all."""

    words: Callable[[Path], list]
    whole: bool = False


def python(*words: object) -> list:
    return [sys.executable, *words]


COMMANDS = {
    "generate": Command(
        lambda out: python(
            SCRIPTS / "generate.py", f"items={out.parent / 'items.jsonl'}", "steps=1", "guidance=1",
            "--resume",
        )
    ),
    "convert": Command(lambda out: python("-m", "weights_conversion", "convert", SMALL, out), whole=True),
    "export": Command(
        lambda out: python("-m", "weights_conversion", "export", SMALL, out, "--layout", "vgen"), whole=True
    ),
    "train": Command(
        lambda out: python(
            SCRIPTS / "train.py", ROOT / "configs/train/tiny_vae.yaml", f"output={out}", "train.steps=6",
            "train.save_every=1", "train.keep=9", "train.batch=2", "device=cpu",
        )
    ),
    "prepare": Command(
        lambda out: python(
            SCRIPTS / "prepare.py", f"data={out.parent / 'clips'}", f"output={out}", "batch=1", "crops=8",
            "frames=4", "device=cpu",
        )
    ),
    "evaluate": Command(
        lambda out: python(SCRIPTS / "evaluate.py", "clips=1", "steps=1", "guidance=1", f"output={out}")
    ),
    "score": Command(
        lambda out: python(
            SCRIPTS / "score.py", f"videos={ROOT / 'docs/images/turtle_grows.gif'}", "metrics=flicker",
            f"json={out / 'scores.json'}",
        )
    ),
    "ablate": Command(
        lambda out: python(
            SCRIPTS / "ablate.py", out.parent / "study.yaml", "budget=smoke", "workers=2", f"output={out}",
        )
    ),
}  # fmt: skip


def prepared(work: Path) -> Path:
    """A folder with the inputs of the commands -> where they write."""
    work.mkdir()
    (work / "study.yaml").write_text(STUDY, encoding="utf-8")
    (work / "clips").mkdir()
    names = [f"{number}.gif" for number in range(6)]
    for name in names:
        shutil.copy(ROOT / "docs/images/turtle_grows.gif", work / "clips" / name)
    rows = "".join(f"{name},it grows\n" for name in names)
    (work / "clips/captions.csv").write_text(f"file,caption\n{rows}", encoding="utf-8")
    out = work / "out"
    names = ("a.gif", "b.webp", "c.png", "d")
    lines = [
        f'{{"image": "{STAR}", "prompt": "a yellow star", "output": "{out / name}"}}\n' for name in names
    ]
    (work / "items.jsonl").write_text("".join(lines), encoding="utf-8")
    return out


def start(words: list, log: Path) -> subprocess.Popen:
    with log.open("ab") as said:
        return subprocess.Popen(
            list(map(str, words)),
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=said,
            stderr=said,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs ignore it
        )


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder -> its hash, whatever time it says that it took."""
    found = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    held = {str(path.relative_to(folder)): SECONDS.sub(b"", path.read_bytes()) for path in found}
    return {path: hashlib.sha256(content).hexdigest() for path, content in held.items()}


def descendants(pid: int) -> set[int]:
    """Processes that a process started, and those that these did."""
    found: set[int] = set()
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            found |= {child} | descendants(child)
    return found


def alive(pids: set[int]) -> list[int]:
    """Those that still run, after a moment in which they may notice that their parent is gone."""
    for _ in range(100):
        left = [pid for pid in pids if Path(f"/proc/{pid}/exe").exists()]
        if not left:
            break
        time.sleep(0.1)
    return left


def check(name: str, count: int, r: random.Random, folder: Path) -> tuple[Counter, list[str]]:
    """Kill a command `count` times at work -> how often by each signal, and what was wrong."""
    command = COMMANDS[name]
    references = []
    for _ in range(2):
        out = prepared(folder / "work")
        began = time.monotonic()
        if start(command.words(out), folder / "log").wait():
            return Counter(), [
                f"{name} fails undisturbed: {(folder / 'log').read_text(errors='replace')[-300:]}"
            ]
        seconds = time.monotonic() - began
        references.append(tree(out))
        shutil.rmtree(out.parent)
    same = {
        path: held
        for path, held in references[0].items()
        if references[1].get(path) == held and not TIMED.fullmatch(path)
    }
    settled = {path for path in same if not GROWING.fullmatch(path)}

    out, killed, wrong = prepared(folder / "work"), Counter(), []
    for _ in range(4 * count):
        if killed.total() == count:
            break
        by = SIGNALS[killed.total() % len(SIGNALS)]
        process = start(command.words(out), folder / "log")
        time.sleep(r.uniform(0.1, 0.95) * seconds)
        helpers = descendants(process.pid)
        process.send_signal(by)
        status = process.wait()
        killed[by] += status != 0
        if status and status not in STATUS.get(by, {-by}):
            wrong.append(f"{by.name}: status {status}")
        if left := alive(helpers):
            wrong.append(f"{by.name}: processes {left} are left")
        now = tree(out)
        wrong += [f"{by.name}: {p} differs" for p in settled & now.keys() if now[p] != same[p]]
        if command.whole and now and settled - now.keys():
            wrong.append(f"{by.name}: {sorted(settled - now.keys())[0]} is missing from a finished folder")
        if status == 0 or command.whole:
            shutil.rmtree(out, ignore_errors=True)
    if start(command.words(out), folder / "log").wait():
        wrong.append(f"does not end any more: {(folder / 'log').read_text(errors='replace')[-300:]}")
    now = tree(out)
    wrong += [f"in the end {path} differs" for path in same if now.get(path) != same[path]]
    wrong += [f"{path} is left" for path in folder.rglob("*") if UNFINISHED.fullmatch(path.name)]
    return killed, wrong


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("count", nargs="?", type=int, default=10)
    parser.add_argument("--commands", default=",".join(COMMANDS))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    faults, r = 0, random.Random(given.seed)
    print("| command |", *(f"{by.name} |" for by in SIGNALS), "faults |")
    print("|---|" + "---:|" * (len(SIGNALS) + 1))
    for name in given.commands.split(","):
        with tempfile.TemporaryDirectory() as folder:
            killed, wrong = check(name, given.count, r, Path(folder))
        faults += len(wrong)
        counts = " | ".join(str(killed[by]) for by in SIGNALS)
        print(f"| {name} | {counts} | {len(wrong)} |", *wrong, sep="\n  ", flush=True)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
