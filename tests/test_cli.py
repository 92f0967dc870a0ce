"""Reading a command line: what scripts share, and how they report mistakes."""

import sys

import pytest

from i2vgen import cli


def test_words_are_sorted():
    words = ["--fast", "a.yaml", "x=1", "y=a b=c"]
    assert cli.split(words, ("--fast",), doc="") == ("a.yaml", ["x=1", "y=a b=c"], {"--fast"})


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["x=1", "--help", "--nonsense"], []])
def test_help_ends_the_script_well(words, capsys):
    assert cli.run(lambda: cli.split(words, doc="what it does")) == 0
    assert capsys.readouterr().out == "what it does\n"


def test_nothing_at_all_can_be_allowed():
    assert cli.split([], doc="", bare=True) == (None, [], set())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--slow"], "there is no option --slow; known are --fast, --help"),
        (["a.yaml", "b.yaml"], "two configuration files, a.yaml and b.yaml"),
    ],
)
def test_words_nobody_knows(words, told):
    with pytest.raises(ValueError, match=told):
        cli.split(words, ("--fast",), doc="")


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


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (ValueError("no such thing"), 2, "error: no such thing\n"),
        (OSError(28, "full"), 2, "error: [Errno 28] full\n"),
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
