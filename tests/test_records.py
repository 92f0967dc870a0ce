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


def record_of(path, tiny, seed=7):
    path.write_bytes(b"abc")
    settings = records.settings_of(tiny, "a.png", "a boat", seed, path)
    records.write(path, settings, size=(16, 8), frames=3, fps=8, facts={"steps": 4})


def test_facts_are_kept(tmp_path, tiny):
    record_of(tmp_path / "clip.mp4", tiny)
    assert records.read(tmp_path / "clip.mp4")["steps"] == 4


def test_an_earlier_record_is_read_for_its_own_clip_only(tmp_path, tiny):
    record_of(tmp_path / "clip.mp4", tiny)
    (tmp_path / "clip.mp4.json").rename(tmp_path / "clip.json")
    assert records.read(tmp_path / "clip.mp4")["seed"] == 7
    assert records.read(tmp_path / "clip.gif") is None and records.read(tmp_path / "clip") is None
    record_of(tmp_path / "clip.mp4", tiny, seed=8)
    assert records.read(tmp_path / "clip.mp4")["seed"] == 8 and not (tmp_path / "clip.json").exists()


def test_a_folder_does_not_take_the_earlier_record_of_a_clip(tmp_path, tiny):
    """Both are called clip.json."""
    record_of(tmp_path / "clip.mp4", tiny)
    (tmp_path / "clip.mp4.json").rename(tmp_path / "clip.json")
    (tmp_path / "clip").mkdir()
    records.check(tmp_path / "clip")
    settings = records.settings_of(tiny, "a.png", "a boat", 9, tmp_path / "clip")
    records.write(tmp_path / "clip", settings, size=(16, 8), frames=3, fps=8)
    assert [records.read(tmp_path / name)["seed"] for name in ("clip", "clip.mp4")] == [9, 7]


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"format": 1, "settings": {}}', '{"file": "clip.mp4"}', "[" * 99999]
)
def test_what_is_no_record_is_not_replaced(tmp_path, text):
    (tmp_path / "clip.mp4.json").write_text(text)
    with pytest.raises(ValueError, match=r"would overwrite .*clip\.mp4\.json, which is no record"):
        records.check(tmp_path / "clip.mp4")


def test_a_clip_without_a_record_is_not_replaced(tmp_path, tiny):
    (tmp_path / "clip.mp4").write_text("mine")
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "000.png").write_text("mine")
    for name in ("clip.mp4", "frames"):
        with pytest.raises(ValueError, match=rf"{name} would be overwritten, and no record beside it"):
            records.refuse_foreign(tmp_path / name)
    record_of(tmp_path / "clip.mp4", tiny)
    records.refuse_foreign(tmp_path / "clip.mp4")


def test_an_empty_record_may_be_replaced(tmp_path, tiny):
    (tmp_path / "clip.mp4.json").touch()
    records.check(tmp_path / "clip.mp4")


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
