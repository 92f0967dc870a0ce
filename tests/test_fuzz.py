"""The fuzzing job in small: no fault in a few files of each kind, and planted faults are found."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("resource", reason="limits a process's memory")


@pytest.fixture
def fuzz():
    """A copy of the job's module for each test, whose kinds it may change."""
    spec = importlib.util.spec_from_file_location("fuzz", Path(__file__).with_name("fuzz.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_few_mutated_files_of_each_kind(tmp_path):
    """By the job itself: it forks, which is safe only in a process without threads."""
    job, kept = Path(__file__).with_name("fuzz.py"), tmp_path / "kept"
    words = [sys.executable, str(job), "280", "--seed", "7", "--keep", str(kept)]
    done = subprocess.run(words, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0 and "s: 0 faults" in done.stdout, done.stdout + done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 7 and all(int(row[1]) >= 10 for row in rows) and not kept.exists()


def crash(path, r):
    raise KeyError("lost")


def hang(path, r):
    time.sleep(60)


def grow(path, r):
    return len(bytearray(1_200_000_000))


def die(path, r):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("read", "said"), [(crash, "KeyError in"), (hang, "over 0.5 s"), (grow, "1.1 GB"), (die, "ended with -9")]
)
def test_planted_faults_are_found(fuzz, monkeypatch, tmp_path, read, said):
    calls = []

    def faulty(path, r):
        calls.append(path)
        return read(path, r) if len(calls) > len(kind.seeds()) + 1 else None  # good files, and one more

    kind = fuzz.KINDS["csv"]
    monkeypatch.setitem(fuzz.KINDS, "csv", kind._replace(read=faulty))
    monkeypatch.setattr(fuzz, "SECONDS", 0.5 if read is hang else 10)
    ((_, outcomes),) = fuzz.run(2, ["csv"], 0, tmp_path / "kept")
    assert outcomes[0] == "read" and said in outcomes[1]
    assert len(list((tmp_path / "kept").iterdir())) == 1
