"""The full-size road through the converter: memory and time, on synthetic official files (12 GB on disk).

python -m pytest -m slow tests/test_full_size.py -s
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from i2vgen.files import checkpoint
from i2vgen.settings import config
from weights_conversion import rules, unet_vgen
from weights_conversion import vae as vae_tables

pytestmark = pytest.mark.slow
CONFIG = config.Config()
MEMORY_LIMIT = 3 * 2**30  # bytes of anonymous memory (RssAnon): mapped files do not count
TIMES_A_COPY = 3.0  # hashing counted apart


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The three official files with random weights, 1,420,469,224 + 83,653,863 + 986,109,441 parameters."""
    if shutil.disk_usage(tmp_path_factory.getbasetemp()).free < 50 * 10**9:
        pytest.skip("needs 50 GB of free disk")
    folder = tmp_path_factory.mktemp("official")

    def random(names: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        return {name: torch.randn(t.shape, generator=generator) * 0.02 for name, t in names.items()}

    unet = random(
        rules.to_theirs(
            unet_vgen.rows(CONFIG.unet, CONFIG.use), checkpoint.build("unet", CONFIG).state_dict()
        )
    )
    torch.save({"state_dict": unet, "step": 854500}, folder / "unet.pth")
    del unet
    vae = random(rules.to_theirs(vae_tables.rows(CONFIG.vae), checkpoint.build("vae", CONFIG).state_dict()))
    torch.save({"state_dict": {vae_tables.PREFIX + k: v for k, v in vae.items()}}, folder / "sd.ckpt")
    clip = random(checkpoint.inner(checkpoint.build("clip", CONFIG)).state_dict())
    torch.save(clip, folder / "clip.bin")
    return folder


def watched(*words: str | Path) -> tuple[float, float]:
    """Run the converter -> seconds and the peak of RssAnon in bytes; fails if it fails."""
    start, peak = time.time(), 0
    process = subprocess.Popen(
        [sys.executable, "-m", "weights_conversion", *map(str, words)], stderr=subprocess.DEVNULL
    )
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max(peak, int(status.split("RssAnon:")[1].split()[0]) * 1024)
        except (OSError, IndexError):
            pass
        time.sleep(0.02)
    assert process.returncode == 0
    return time.time() - start, peak


def copied(paths: list[Path], to: Path) -> float:
    """Seconds for a plain copy (read, write, fsync) of the same bytes."""
    start = time.time()
    for path in paths:
        with path.open("rb") as source, (to / path.name).open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 24)
            target.flush()
            os.fsync(target.fileno())
    return time.time() - start


def hashed(paths: list[Path]) -> float:
    import hashlib

    start = time.time()
    for path in paths:
        with path.open("rb") as file:
            hashlib.file_digest(file, "sha256") if sys.version_info >= (3, 11) else hashlib.sha256(
                file.read()
            )
    return time.time() - start


def test_convert_and_export_in_little_memory_and_time(files, tmp_path):
    sources = [files / name for name in ("unet.pth", "sd.ckpt", "clip.bin")]
    (tmp_path / "copy").mkdir()
    copy = copied(sources, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy")
    hashing = hashed(sources)
    native = tmp_path / "native"
    seconds, peak = watched("convert", *sources, native)
    print(
        f"\nconvert {seconds:.1f} s ({hashing:.1f} s hashing), copy {copy:.1f} s, peak {peak / 2**20:.0f} MiB"
    )
    assert peak < MEMORY_LIMIT
    assert (
        seconds - hashing < TIMES_A_COPY * copy + 15
    )  # 15 s for starting Python and torch on a busy machine
    for layout in ("vgen", "diffusers"):
        seconds, peak = watched("export", native, tmp_path / layout, "--layout", layout)
        print(f"export {layout} {seconds:.1f} s, peak {peak / 2**20:.0f} MiB")
        assert peak < MEMORY_LIMIT
        seconds, peak = watched("verify", native, tmp_path / layout)
        print(f"verify {layout} {seconds:.1f} s, peak {peak / 2**20:.0f} MiB")
        assert peak < MEMORY_LIMIT
        shutil.rmtree(tmp_path / layout)
