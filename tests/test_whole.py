"""Files and folders appear whole or not at all."""

import json
import os
import signal
import subprocess
import sys

import pytest

from i2vgen.files import whole


def put(path, text, kind):
    if kind == "file":
        path.write_text(text)
    else:
        path.mkdir(exist_ok=True)
        (path / "text").write_text(text)


def got(path):
    return path.read_text() if path.is_file() else (path / "text").read_text()


kinds = pytest.mark.parametrize("kind", ["file", "folder"])


@kinds
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("sync", [False, True])
def test_new_content_takes_the_place(tmp_path, kind, old, sync):
    path = tmp_path / "x"
    if old:
        put(path, "old", kind)
    with whole.replacing(path, sync=sync) as temporary:
        put(temporary, "new", kind)
        assert path.exists() == old and (not old or got(path) == "old")
    assert got(path) == "new" and os.listdir(tmp_path) == ["x"]


@kinds
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_after_an_error_the_old_stands_and_nothing_else(tmp_path, kind, old, error):
    path = tmp_path / "x"
    if old:
        put(path, "old", kind)

    def fail():
        with whole.replacing(path) as temporary:
            put(temporary, "new", kind)
            raise error

    with pytest.raises(type(error)):
        fail()
    assert os.listdir(tmp_path) == (["x"] if old else []) and (not old or got(path) == "old")


@kinds
def test_a_rename_that_fails_brings_the_old_back(tmp_path, kind, monkeypatch):
    path = tmp_path / "x"
    put(path, "old", kind)
    right = os.rename

    def refuse(source, target):
        if ".writing-" in os.fspath(source):
            raise PermissionError("no")
        right(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(PermissionError), whole.replacing(path) as temporary:
        put(temporary, "new", kind)
    assert os.listdir(tmp_path) == ["x"] and got(path) == "old"


KILLED = """
import os, pathlib, signal, sys
from i2vgen.files import whole
path, kind, when = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
with whole.replacing(path) as temporary:
    if kind == "folder":
        temporary.mkdir()
        (temporary / "text").write_text("half")
    else:
        temporary.write_text("half")
    if when == "writing":
        die()
    right, count = os.rename, []
    os.rename = lambda *names: die() if count else (count.append(1), right(*names))
"""


def killed(root, *arguments):
    done = subprocess.run([sys.executable, "-c", KILLED, *map(str, arguments)], cwd=root)
    assert done.returncode == -signal.SIGKILL


@kinds
def test_a_kill_while_writing_keeps_the_old_and_the_next_write_sweeps(tmp_path, root, kind):
    path = tmp_path / "x"
    put(path, "old", kind)
    killed(root, path, kind, "writing")
    assert got(path) == "old" and len(os.listdir(tmp_path)) == 2
    whole.write_text(tmp_path / "y", "another file of the same folder")
    assert sorted(os.listdir(tmp_path)) == ["x", "y"] and got(path) == "old"


def test_a_kill_between_the_renames_loses_nothing(tmp_path, root):
    path = tmp_path / "x"
    put(path, "old", "folder")
    killed(root, path, "folder", "renaming")
    assert not path.exists()
    whole.sweep(tmp_path)
    assert os.listdir(tmp_path) == ["x"] and got(path) == "old"


@pytest.mark.parametrize(
    "name", [".x.writing-{other}-{dead}", ".x.writing-{here}-{alive}", "x.writing-1", ".x.old"]
)
def test_what_may_be_in_use_or_is_not_ours_stays(tmp_path, name):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here = whole._machine()
    other = f"{int(here, 16) ^ 1:08x}"
    name = name.format(here=here, other=other, dead=dead.pid, alive=os.getppid())
    (tmp_path / name).touch()
    (tmp_path / f".x.writing-{here}-{dead.pid}").touch()
    whole.sweep(tmp_path)
    assert os.listdir(tmp_path) == [name]


def test_what_cannot_be_cleared_away_stops_nobody(tmp_path, root, monkeypatch):
    killed(root, tmp_path / "x", "file", "writing")
    (left,) = os.listdir(tmp_path)
    unlink = type(tmp_path).unlink

    def refuse(self, **how):
        if self.name == left:
            raise PermissionError("not yours")
        unlink(self, **how)

    monkeypatch.setattr(type(tmp_path), "unlink", refuse)
    whole.write_text(tmp_path / "y", "new")
    assert sorted(os.listdir(tmp_path)) == [left, "y"]


def test_two_writers_of_one_name_do_not_meet(tmp_path):
    """The later one to finish has the last word, as with any rename."""
    with whole.replacing(tmp_path / "x") as one:
        one.write_text("one")
        code = "import sys; from i2vgen.files import whole; whole.write_text(sys.argv[1], 'two')"
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], check=True)
        assert got(tmp_path / "x") == "two" and one.read_text() == "one"
    assert got(tmp_path / "x") == "one" and os.listdir(tmp_path) == ["x"]


def test_texts_and_json(tmp_path):
    whole.write_text(tmp_path / "t", "Fréchet\n")
    whole.write_json(tmp_path / "j", {"naïve": [1, None]})
    assert (tmp_path / "t").read_bytes() == "Fréchet\n".encode()
    assert json.loads((tmp_path / "j").read_bytes()) == {"naïve": [1, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        whole.write_json(tmp_path / "j", {"a": float("nan")}, allow_nan=False)
    assert sorted(os.listdir(tmp_path)) == ["j", "t"]


def test_bytes_of_names_survive_json(tmp_path):
    whole.write_json(tmp_path / "j", {"name": "caf\udce9 \ud800"})
    assert json.loads((tmp_path / "j").read_text("utf-8")) == {"name": "caf\udce9 \ud800"}


@pytest.mark.parametrize("name", ["x" * 255, "寿" * 85, "x"], ids=len)
def test_names_of_any_length_can_be_written(tmp_path, name):
    assert whole.check_place("out", tmp_path / name) == tmp_path / name
    whole.write_text(tmp_path / name, "1")
    whole.write_text(tmp_path / name, "2")
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_text() == "2"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x" * 256, "File name too long"),
        ("a\0b", "null (byte|character)"),
        ("a\ud800", "not valid Unicode"),
        ("..", "has no name"),
        ("file/x", "cannot create the folder"),
        ("settings.json", "belongs to the weights"),
        ("unet.safetensors.index.json", "belongs to the weights"),
    ],
    ids=ascii,
)
def test_places_that_cannot_be_written(tmp_path, name, message):
    for there in ("file", "settings.json", "unet.safetensors.index.json", "unet.safetensors"):
        (tmp_path / there).touch()
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ValueError, match=rf"^out: .*{message}"):
        whole.check_place("out", f"{tmp_path}/{name}")
    assert sorted(os.listdir(tmp_path)) == before


def test_a_read_only_place_is_told(tmp_path, monkeypatch):
    """Where permission bits say nothing: a mount that is read-only, a full one."""

    def refuse(self, **how):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(type(tmp_path), "touch", refuse)
    with pytest.raises(ValueError, match=r"nothing can be written to .*x \(Read-only file system\)"):
        whole.check_place("out", tmp_path / "x")


def test_a_folder_whose_old_name_would_be_too_long_is_told(tmp_path):
    whole.check_place("out", tmp_path / ("x" * 250))
    (tmp_path / ("x" * 250)).mkdir()
    with pytest.raises(ValueError, match="File name too long"):
        whole.check_place("out", tmp_path / ("x" * 250))


@pytest.mark.parametrize(
    "content",
    [{"a": [1, "x [", "]", "{", 'q"]', "new\nline", None], "b": [], "c": [[1, 2], [3]], "d": [{"e": [1.5]}]},
     [1, 2], "text", [], [[]], {"a": {}}, ["["], [{}, []]],
)  # fmt: skip
@pytest.mark.parametrize("indent", [1, 2])
def test_json_is_what_was_given_with_short_lists(tmp_path, content, indent):
    whole.write_json(tmp_path / "a.json", content, indent=indent)
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == content
    if isinstance(content, dict) and "b" in content:
        assert len(text.splitlines()) == 13 and '"x [", "]", "{"' in text


@pytest.mark.parametrize(
    ("written", "read"),
    [("a", "a"), ("a", "./a"), ("link", "a"), ("a", "link"), ("twin", "a"), ("here/a", "a"), ("d", "d/b"),
     ("d", "here/d/b"), ("here/d", "d/b"), ("new", "new")],
)  # fmt: skip
def test_what_is_read_is_not_overwritten(tmp_path, monkeypatch, written, read):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    for name in ("a", "b", "d/b"):
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "here").symlink_to(".")
    os.link("a", "twin")
    with pytest.raises(ValueError, match=f"output {written} would overwrite {read}"):
        whole.refuse_overwriting(["fine", written], ["b", read])
    whole.refuse_overwriting(["other", "d/c", "here/c"], ["b", read])


def test_results_replace_results_only(tmp_path):
    whole.check_results("out", tmp_path, ("a", "b"))
    (tmp_path / "b").touch()
    with pytest.raises(ValueError, match=r"b is not from an earlier run, which would also have left a;"):
        whole.check_results("out", tmp_path, ("a", "b"))
    whole.check_results("out", tmp_path, ("a", "b"), ours=True)
    (tmp_path / "a").touch()
    whole.check_results("out", tmp_path, ("a", "b"))


def test_files_get_ordinary_permissions(tmp_path):
    (tmp_path / "plain").touch()
    whole.write_text(tmp_path / "x", "")
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_folders_get_their_parents(tmp_path):
    with whole.replacing_folder(tmp_path / "a" / "b") as temporary:
        put(temporary, "new", "folder")
    assert got(tmp_path / "a" / "b") == "new" and os.listdir(tmp_path / "a") == ["b"]
