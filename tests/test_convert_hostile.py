"""Malicious and broken sources: one line, exit status 2, no code executed, no files left."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from i2vgen import cli
from weights_conversion import __main__ as command
from weights_conversion import sources


class Trap:
    """Unpickling this creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


class Shell:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        import os

        return (os.system, (f"touch {self.path}",))


def spoil_zip(path: Path) -> None:
    torch.save({"state_dict": {"input_blocks.0.0.weight": torch.ones(64, 64)}}, path)
    with zipfile.ZipFile(path) as archive:
        entry = max(archive.infolist(), key=lambda e: e.file_size)
        start = entry.header_offset + 30 + len(entry.filename)
    data = bytearray(path.read_bytes())
    for i in range(start + 200, start + 4000, 97):
        data[i] ^= 0xFF
    path.write_bytes(data)


def lying_header(path: Path) -> None:
    save_file({"a": torch.zeros(8)}, path)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"[0,32]", b"[0,99]"))


def truncated(path: Path) -> None:
    save_file({"a": torch.zeros(800)}, path)
    path.write_bytes(path.read_bytes()[:-100])


BROKEN = {
    "a pickle that runs code": lambda p, mark: p.write_bytes(pickle.dumps(Trap(mark))),
    "code in a checkpoint": lambda p, mark: torch.save({"state_dict": {"w": Shell(mark)}}, p),
    "a Git LFS pointer": lambda p, mark: p.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 5\n"
    ),
    "an HTML page": lambda p, mark: p.write_text("<!DOCTYPE html><html><body>Log in</body></html>"),
    "an empty file": lambda p, mark: p.write_bytes(b""),
    "a truncated file": lambda p, mark: truncated(p),
    "a corrupt zip entry": lambda p, mark: spoil_zip(p),
    "a lying header": lambda p, mark: lying_header(p),
    "nothing known": lambda p, mark: save_file({"a": torch.zeros(8)}, p),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("what", ["convert", "inspect"])
def test_broken_sources_are_refused_in_one_line(tmp_path, capsys, name, what):
    source, mark, out = tmp_path / "model.bin", tmp_path / "executed", tmp_path / "out"
    BROKEN[name](source, mark)
    words = ["convert", str(source), str(out)] if what == "convert" else ["inspect", str(source)]
    status = cli.run(lambda: command.main(words))
    said = capsys.readouterr()
    # `inspect` lists names and shapes without reading the tensors, so it can describe these two.
    if not (what == "inspect" and name in ("nothing known", "a corrupt zip entry")):
        assert status == 2 and said.err.count("error:") == 1 and "Traceback" not in said.err
    assert not mark.exists() and not out.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["model.bin"]


def test_the_hub_is_used_only_if_named(tmp_path, monkeypatch):
    asked = []

    def snapshot(repo, *, revision=None, allow_patterns=None):
        asked.append((repo, revision, allow_patterns))
        return str(tmp_path / "snapshots" / "0123abcd")

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    path, commit = sources.download("hf:owner/name@v1.0#models")
    assert asked == [("owner/name", "v1.0", ["models", "models/*"])]
    assert path.name == "models" and commit == "0123abcd"
    with pytest.raises(ValueError, match="hf:OWNER/NAME"):
        sources.download("hf:nonsense")
    with pytest.raises(ValueError, match="does not exist"):
        sources.gather([tmp_path / "hf_no_prefix"])
    assert len(asked) == 1


def test_a_revision_is_recorded(tmp_path, monkeypatch):
    folder = tmp_path / "snapshots" / "0123abcd"
    folder.mkdir(parents=True)
    names = ("encoder.conv_in.weight", "encoder.mid.block_1.conv1.weight")
    save_file({name: torch.zeros(2) for name in names}, folder / "vae.safetensors")
    monkeypatch.setattr(sources, "download", lambda name: (folder, "0123abcd"))
    (part,) = sources.gather(["hf:owner/name"])
    assert part.part == "vae" and part.notes == ("downloaded as hf:owner/name, revision 0123abcd",)


def test_a_failed_download_is_reported_in_one_line(monkeypatch, capsys, tmp_path):
    import huggingface_hub

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert cli.run(lambda: command.main(["convert", "hf:owner/name", str(tmp_path / "out")])) == 2
    assert "could not be downloaded: no network" in capsys.readouterr().err
