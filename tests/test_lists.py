"""Lists that people write, through the doors that read them: items=, score.py's lists, training captions."""

import json
import logging
import unicodedata

import numpy as np
import pytest

from i2vgen import jobs
from i2vgen.files import fingerprint, lists, video
from i2vgen.scoring import clips
from i2vgen.training import data
from i2vgen.training.settings import load_settings

SEPARATORS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"  # str.splitlines ends a line at each


@pytest.fixture
def write(tmp_path):
    def write(content, name="list.jsonl"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture
def folder(tmp_path):
    """folder(captions, name): two clips, of which each is a few grey frames, and a list of captions."""
    frames = (np.arange(6)[:, None, None, None] * 20 + np.zeros((1, 16, 16, 3))).astype(np.uint8)
    for name in ("a.gif", "b.gif"):
        video.save(frames, tmp_path / name, fps=16)

    def make(captions, name="captions.csv"):
        content = captions if isinstance(captions, bytes) else captions.encode()
        (tmp_path / name).write_bytes(content)
        words = [f"train.data={tmp_path}", "train.frame_lengths=2", "sample.width=64", "sample.height=64"]
        return data.open_source(*load_settings(None, words))

    return make


def line(**values):
    return json.dumps(values, ensure_ascii=False) + "\n"


# --- JSONL


@pytest.mark.parametrize("start", ["", "\ufeff"], ids=["plain", "BOM"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_only_a_newline_ends_a_line(write, folder, start, end):
    said = f"a star{SEPARATORS[:3]}moves"
    path = write(start + line(image="a.png", prompt=said).strip() + end + end + line(image="b", prompt="x"))
    assert [item["prompt"] for item in jobs.read_items(path)] == [said, "x"]
    path = write(start + line(file="a.gif", prompt=said).strip() + end + line(file="b.gif"))
    assert [clip.prompt for clip in clips.find("videos", str(path))] == [said, None]
    both = start + line(file="a.gif", caption=said).strip() + end + line(file="b.gif", caption="x")
    assert folder(both, "captions.jsonl").captions == {"a.gif": (said,), "b.gif": ("x",)}


@pytest.mark.parametrize("separator", SEPARATORS[:3])
def test_json_may_hold_every_other_separator(write, separator):
    path = write(line(image="a.png", prompt=f"a{separator}b"))
    assert next(jobs.read_items(path))["prompt"] == f"a{separator}b"


BAD_LINES = [
    ("[1]\n", "line 1: expected an object with image and prompt"),
    ("\n3\n", "line 2: expected an object"),
    ('{"image": "a", "prompt": "a", "prompt": "b"}', "line 1 is not JSON: it names 'prompt' twice"),
    ("[" * 100_000, "line 1 nests too deeply"),
    ('{"image": "a", "prompt": "a\\ud800b"}', r"line 1 holds half of a character, '\ud800'"),
    ('{"image": "a\\u0000.png", "prompt": ""}', "line 1: image is 'a\\x00.png'"),
    ('{"image": "a", "prompt": "", "output": "\\u0000"}', "line 1: output is"),
    ('{"image": "a", "prompt": "", "seed": ' + "9" * 5000 + "}", "line 1 is not JSON: Exceeds the limit"),
    ('{"image": "a", "prompt": "", "seed": NaN}', "line 1: seed is nan"),
    ('{"picture": "a", "prompt": ""}', "it has 'picture', 'prompt'"),
    ("x" * 2**24 + "x", "line 1 is longer than 16 MiB"),
    ("caf\xe9\n".encode("latin-1"), "line 1 is not UTF-8, with its byte 0xe9; save the file as UTF-8"),
    ("x\n".encode("utf-16"), "it is UTF-16 text; save the file as UTF-8"),
]


@pytest.mark.parametrize(("content", "words"), BAD_LINES, ids=[b[1][:30] for b in BAD_LINES])
def test_a_wrong_line_is_named(write, content, words):
    path = write(content)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        list(jobs.read_items(path))
    assert words in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_endless_input_is_refused():
    with pytest.raises(ValueError, match=r"items=/dev/zero cannot be read: line 1 is longer than 16 MiB"):
        list(jobs.read_items("/dev/zero"))


def test_pictures_are_found_beside_the_list(tmp_path, monkeypatch, write):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    path = write(line(image="a.png", prompt=""))
    assert next(jobs.read_items(path))["image"] == str(tmp_path / "a.png")
    (tmp_path / "work" / "a.png").touch()
    assert next(jobs.read_items(path))["image"] == "a.png"  # the working folder comes first


# --- CSV


@pytest.mark.parametrize("start", ["", "\ufeff"], ids=["plain", "BOM"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_captions_in_csv(folder, start, end):
    rows = ["file,caption", 'a.gif,"a ""red"" star, moving\nleft"', "", "b.gif,blue", "", ""]
    source = folder(start + end.join(rows))
    assert source.captions == {"a.gif": ('a "red" star, moving\nleft',), "b.gif": ("blue",)}


BAD_CSV = [
    ("file,caption\na.gif,a star, moving\n", "line 2 holds 3 values for the 2 columns file,caption; put a"),
    ('file,caption\n"a.gif","x\ny"\nb.gif,a,b\n', "line 4 holds 3 values"),
    ("file,caption\na.gif\n", "line 2: it needs file and caption, both text; it has file: 'a.gif'"),
    ('file,caption\na.gif,"x\nb.gif,y\n', "line 2: unexpected end of data; a quoted text ends with a quote"),
    ('file,caption\na.gif,"a "red" star"\n', "line 2: ',' expected after '\"'"),
    ("file;caption\na.gif;x\n", "columns 'file;caption'; it must name file and caption, separated by a comma"
                                "; it looks separated by ';'"),
    ("file\tcaption\na.gif\tx\n", r"it looks separated by '\t'"),
    ("video,text\na.gif,x\n", "columns 'video', 'text'; it must name file and caption"),
    ("file, caption\na.gif, x\n", "columns 'file', ' caption'"),
    ("File,Caption\na.gif,x\n", "columns 'File', 'Caption'; it must name file and caption, separated by a "
                                "comma; write them in lower case"),
    ("a.gif,x\n", "columns 'a.gif', 'x'"),
    ("file,caption,caption\na.gif,x,y\n", "names the column 'caption' twice"),
    ("", "is empty; its first line names the columns file,caption"),
    ("file,caption\na.gif,\xe9toile\n".encode("latin-1"), "line 2 is not UTF-8, with its byte 0xe9"),
    ("file,caption\na.gif,x\n".encode("utf-16-le"), "line 1 holds a NUL byte, so it is no UTF-8 text; save"),
    (b"file,caption\na.gif,x\0y\n", "line 2 holds a NUL byte"),
    ("file,caption\na.gif,x\n".encode("utf-16"), "it is UTF-16 text; save the file as UTF-8"),
    ("file,caption\na.gif," + "x" * 200_000 + "\n", "line 2: field larger than field limit"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "words"), BAD_CSV, ids=[b[1][:30] for b in BAD_CSV])
def test_a_wrong_row_is_named(folder, content, words, tmp_path):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        folder(content)
    assert words in str(caught.value) and str(tmp_path / "captions.csv") in str(caught.value)


def test_equal_rows_are_one_and_others_are_further_captions(folder, caplog):
    found = folder("file,caption\na.gif,x\n./a.gif,x \nb.gif,y\n").captions
    assert found == {"a.gif": ("x",), "b.gif": ("y",)} and not caplog.text
    several = {"a.gif": ("x", "z"), "b.gif": ("y",)}
    assert folder("file,caption\na.gif,x\nb.gif,y\na.gif,z\n").captions == several
    assert "1 of 2 clips have several captions, such as 'a.gif'" in caplog.text


def test_json_lines_may_list_captions(folder):
    rows = line(file="a.gif", caption=["x", " z"]) + line(file="b.gif", caption="y")
    assert folder(rows, "captions.jsonl").captions == {"a.gif": ("x", "z"), "b.gif": ("y",)}


def test_score_lists_keep_quoted_line_breaks(write):
    path = write('\ufefffile,image,prompt\na.gif,,"line one\nline two, with comma"\nb.gif\n', "list.csv")
    first, second = clips.find("videos", str(path))
    assert first.prompt == "line one\nline two, with comma" and second.prompt is None
    path = write("file,prompt\na.gif,a star, moving\n", "list.csv")
    with pytest.raises(ValueError, match="line 2 holds 3 values for the 2 columns file,prompt"):
        clips.find("videos", str(path))
    path = write("video,prompt\na.gif,a\n", "list.csv")
    with pytest.raises(ValueError, match=r"names the columns 'video', 'prompt'; it must name file$"):
        clips.find("videos", str(path))
    path = write("file;prompt\na.gif;a\n", "list.csv")
    with pytest.raises(ValueError, match=r"it must name file; it looks separated by ';', but commas"):
        clips.find("videos", str(path))
    assert clips.find("videos", str(write("output,prompt\na.gif,a\n", "list.csv")))[0].prompt == "a"


# --- notes on captions


def test_empty_captions_are_told(folder, caplog):
    with pytest.raises(ValueError, match=r"all captions of its 2 clips are empty; write them, or set use"):
        folder("file,caption\na.gif,\nb.gif,  \n")
    assert "2 of 2 captions are empty, such as that of 'a.gif'" in caplog.text
    folder("file,caption\na.gif,\nb.gif,x\n")
    assert "1 of 2 captions are empty" in caplog.text


@pytest.mark.parametrize("listed", ["A.gif", "sub\\é.gif", unicodedata.normalize("NFD", "sub/é.gif")])
def test_names_that_differ_in_spelling_are_told(listed, folder, tmp_path, caplog):
    (tmp_path / "sub").mkdir()
    present = "a.gif" if listed == "A.gif" else "sub/" + unicodedata.normalize("NFC", "é") + ".gif"
    if listed != "A.gif":
        (tmp_path / "a.gif").rename(tmp_path / present)
    caplog.set_level(logging.WARNING)
    folder(f"file,caption\n{listed},x\nb.gif,y\n")
    assert f"the captions say {listed!a}, but the file is called {present!a}" in caplog.text


# --- fingerprints


def test_a_changed_file_has_another_fingerprint(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"x" * 100_000)
    found = {fingerprint.of_paths([path])}
    for change in (b"x" * 99_999, b"y" + b"x" * 99_999, b"x" * 99_999 + b"y"):
        path.write_bytes(change)
        found.add(fingerprint.of_paths([path]))
    path.write_bytes(b"x" * 50_000 + b"y" + b"x" * 49_999)
    found.add(fingerprint.of_paths([path], pieces=30))
    path.rename(tmp_path / "b")
    found.add(fingerprint.of_paths([tmp_path / "b"]))
    assert len(found) == 6
    assert fingerprint.of_paths([tmp_path]) == fingerprint.of_paths([tmp_path])


def test_a_name_in_a_list_may_start_at_home():
    assert str(lists.resolved("sub/list.csv", "~/a.png")) == "~/a.png"
    assert str(lists.resolved("sub/list.csv", "no/a.png")) == "sub/no/a.png"
