"""The JSON beside a video, and the hash of its file."""

import hashlib
from pathlib import Path

import pytest

from i2vgen.files import records


@pytest.mark.parametrize("name", ["record.mp4", "record", "a b.gif"])
def test_records_stand_beside_their_clips(name):
    assert records.path_of(Path("x") / name) == Path("x") / f"{name}.json"


@pytest.mark.parametrize("text", [None, "", "{", "[1]", "null", "\udcff"])
def test_a_record_that_cannot_be_read_is_none(tmp_path, text):
    if text is not None:
        (tmp_path / "clip.mp4.json").write_bytes(text.encode(errors="surrogateescape"))
    assert records.read(tmp_path / "clip.mp4") is None


def test_what_was_written_is_read(tmp_path, tiny):
    (tmp_path / "clip.mp4").write_bytes(b"abc")
    settings = records.settings_of(tiny, "ä.png", "a boat", 7, tmp_path / "clip.mp4")
    records.write(tmp_path / "clip.mp4", settings, size=(16, 8), frames=3, fps=8)
    record = records.read(tmp_path / "clip.mp4")
    assert (record["width"], record["height"], record["frames"], record["fps"], record["seed"]) == (
        16,
        8,
        3,
        8,
        7,
    )
    assert record["settings"]["image"] == ["ä.png"] and record["sha256"] == hashlib.sha256(b"abc").hexdigest()


def test_sha256(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    seen = []
    assert records.sha256(tmp_path / "f", seen.append).startswith(
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61"
    )
    assert seen == [3]
    with pytest.raises(FileNotFoundError):
        records.sha256(tmp_path / "g")


def test_sha256_of_a_folder_is_that_of_its_files_in_the_order_of_their_names(tmp_path):
    (tmp_path / "b").write_bytes(b"c")
    (tmp_path / "a").write_bytes(b"ab")
    assert records.sha256(tmp_path) == hashlib.sha256(b"abc").hexdigest()
