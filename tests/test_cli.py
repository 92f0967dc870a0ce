"""Reading a command line: what commands share, and how they report mistakes."""

import io
import sys
import warnings
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from i2vgen import cli


def test_words_are_sorted():
    words = ["--fast", "a.yaml", "x=1", "y=a b=c"]
    assert cli.split(words, ("--fast",)) == ("a.yaml", ["x=1", "y=a b=c"], {"--fast"})


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--slow"], "there is no option --slow; known are --fast, --help"),
        (["a.yaml", "b.yaml"], "two configuration files, a.yaml and b.yaml"),
    ],
)
def test_words_nobody_knows(words, told):
    with pytest.raises(ValueError, match=told):
        cli.split(words, ("--fast",))


def test_a_script_takes_its_own_words():
    own, rest = cli.take(["clips=3", "sample.steps=2", "json=o=o"], numbers=("clips",), texts=("json",))
    assert own == {"clips": 3, "json": "o=o"} and rest == ["sample.steps=2"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["clips=many"], "clips=many: clips is a whole number"),
        (["clips="], "clips is a whole number"),
        (["json="], "json= is empty"),
        (["steps=3"], "there is no steps=; known are json=, clips=!"),
        (["clips=1", "clips=2"], "clips= is given twice"),
    ],
)
def test_a_script_without_settings_knows_all_its_words(words, told):
    with pytest.raises(ValueError, match=told):
        cli.take_all(words, numbers=("clips",), texts=("json",), hint="!")


def test_choices_and_counts():
    assert cli.choose("mode", "a", ("a", "b")) == "a" and cli.at_least_one("workers", 1) == 1
    with pytest.raises(ValueError, match="there is no mode=c; choose a or b"):
        cli.choose("mode", "c", {"a": 1, "b": 2})
    with pytest.raises(ValueError, match="workers is 0; give 1 or more"):
        cli.at_least_one("workers", 0)


def test_outputs_are_checked_before_any_work(tmp_path, monkeypatch):
    assert cli.check_file("json", tmp_path / "new" / "out.json").parent.is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a folder; give the name of a file in it"):
        cli.check_file("json", tmp_path)
    with pytest.raises(ValueError, match=r"json=: cannot create the folder .*file"):
        cli.check_file("json", tmp_path / "file" / "out.json")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ValueError, match=r"json=: the folder .* is not writable"):
        cli.check_file("json", tmp_path / "out.json")


LONG = "x" * 300


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("score", ["videos=.", f"json={LONG}"]),
        ("evaluate", [f"json={LONG}"]),
        ("evaluate", [f"output={LONG}"]),
        ("refine_gain", [f"json={LONG}"]),
        ("refine_gain", [f"output={LONG}.png"]),
        ("summary", [f"json={LONG}"]),
        ("trace", [f"output={LONG}"]),
        ("bench", ["case=count", f"json={LONG}"]),
        ("draw_example", [f"output={LONG}.png"]),
        ("parity", ["golden.safetensors", "--json", LONG]),
        ("train", [f"output={LONG}"]),
        ("ablate", ["STUDY", f"output={LONG}"]),
    ],
    ids=lambda v: v if isinstance(v, str) else v[-1][:6],
)
def test_every_script_tries_its_places_first(script_at, root, script, words):
    study = str(root / "configs" / "ablations" / "concat_gain.yaml")
    status, out, err = script_at(script)(*(study if word == "STUDY" else word for word in words))
    assert status == 2 and "File name too long" in err and "Traceback" not in err
    assert out == ""


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("summary", ["here.yaml", "json=here.yaml"]),
        ("evaluate", ["here.yaml", "json=./here.yaml"]),
        ("score", ["videos=list.jsonl", "json=link.jsonl"]),
        ("trace", ["against=before.jsonl", "output=before.jsonl"]),
        ("parity", ["golden.safetensors", "--json", "golden.safetensors"]),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_no_script_overwrites_what_it_reads(script_at, script, words):
    run = script_at(script)
    for name in ("here.yaml", "list.jsonl", "before.jsonl", "golden.safetensors"):
        Path(name).write_text("sample: {steps: 3}\n")
    Path("link.jsonl").symlink_to("list.jsonl")
    status, _, err = run(*words)
    assert status == 2 and "would overwrite" in err, err
    assert Path("here.yaml").read_text() == Path("list.jsonl").read_text() == "sample: {steps: 3}\n"


@pytest.mark.parametrize("script", ["refine_gain", "draw_example"])
def test_pictures_that_cannot_be_written_are_told_first(script_at, script):
    status, _, err = script_at(script)("output=strip.xyz")
    assert status == 2 and "output=strip.xyz: no picture has this ending; write .png" in err


def test_the_page_of_somebody_else_stays(script_at):
    run = script_at("evaluate")
    Path("site").mkdir()
    Path("site/index.html").write_text("mine")
    status, _, err = run("output=site", "clips=1")
    assert status == 2 and "index.html is not from an earlier run" in err


# --- the terminal


@pytest.mark.parametrize(
    "text", ["a\x1b[31mb", "a\x07\x00\x7f\x9b", "a\r\nb\t", "a\u2028\u202eb", "a\udcff\ud800"]
)
def test_control_characters_are_shown(text):
    shown = cli.shown(text)
    assert shown.isprintable() and shown.encode() and shown != text


def test_names_stay_as_they_are():
    text = "Fréchet 寿\u3000 e\u0301 👩\u200d🚀"
    assert cli.shown(text) == text


def test_nothing_commands_the_terminal(capsys, monkeypatch):
    monkeypatch.setattr("warnings.showwarning", None)

    def main():
        print("a\x1b[31m\tb\nc")
        warnings.warn("n\x1b\n", stacklevel=1)
        sys.stderr.write("50 %\r")
        raise ValueError("e\x1b\r")

    assert cli.run(main) == 2
    out, err = capsys.readouterr()
    assert out == "a\\x1b[31m\tb\nc\n" and err == "note: n\\x1b\\n\n50 %\rerror: e\\x1b\\r\n"


def test_a_terminal_without_unicode_shows_what_it_can(monkeypatch):
    monkeypatch.setattr("warnings.showwarning", None)
    held = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(held, "ascii"))
    assert cli.run(lambda: print("levels²") or 0) == 0
    sys.stdout.flush()
    assert held.getvalue() == b"levels\\xb2\n"


def test_notes_stand_beside_the_progress_bar(capsys, monkeypatch):
    monkeypatch.setattr("warnings.showwarning", None)

    def main():
        with tqdm(total=2, mininterval=0) as bar:
            bar.update()
            warnings.warn("mind the gap", stacklevel=1)

    assert cli.run(main) == 0
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert "note: mind the gap" in [line.strip() for line in lines]


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (ValueError("no such thing"), 2, "error: no such thing\n"),
        (OSError(28, "full"), 2, "error: [Errno 28] full\n"),
        (MemoryError(), 2, "error: out of memory; use a smaller size or fewer frames\n"),
        (
            torch.OutOfMemoryError("CUDA: 2 GiB"),
            2,
            "error: out of device memory; use a smaller size or fewer frames (CUDA: 2 GiB)\n",
        ),
        (
            RuntimeError("DefaultCPUAllocator: no"),
            2,
            "error: out of memory; use a smaller size, fewer frames or runtime.vae_chunk=1\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_mistakes_are_one_line(error, status, told, capsys, monkeypatch):
    monkeypatch.setattr("warnings.showwarning", None)

    def main():
        raise error

    assert cli.run(main) == status and capsys.readouterr().err == told


def test_bugs_keep_their_traceback(monkeypatch):
    monkeypatch.setattr("warnings.showwarning", None)
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: sys.exit(1 // 0))
