"""The command `i2vgen`: its help, what it says of other words, its first clip, what comes with it."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from i2vgen import __main__ as door
from i2vgen import __version__
from i2vgen.commands import BARE, COMMANDS
from i2vgen.files import video
from i2vgen.settings import config, shipped
from i2vgen.settings.merge import load_config

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
# Modules that no help text may wait for.
SLOW = (
    "torch",
    "numpy",
    "PIL",
    "yaml",
    "omegaconf",
    "tqdm",
    "av",
    "open_clip",
    "i2vgen.cli",
    "i2vgen.pipeline",
)
QUICK = ("steps=2", "device=cpu")


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """run(*words): the command in an empty folder -> (status, stdout, stderr)"""
    monkeypatch.setattr("warnings.showwarning", None)  # put back at the end: commands install their own
    monkeypatch.chdir(tmp_path)

    def run(*words):
        return door.main(list(map(str, words))), *capsys.readouterr()

    return run


def imported(code):
    """What is imported after `code` has run in a process of its own."""
    code = f"import sys\n{code}\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, encoding="utf-8"
    )
    return done.stdout, set(done.stderr.split())


# --- help


def test_help_lists_every_command(run):
    status, out, err = run("--help")
    assert status == 0 and err == "" and run() == run("-h") == (0, out, "")
    assert re.findall(r"^    ([a-z-]+) +\w", out, re.M) == list(COMMANDS)
    assert run("--version") == (0, f"i2vgen {__version__}\n", "")


def test_every_module_is_a_command():
    folder = ROOT / "i2vgen" / "commands"
    assert {path.stem.replace("_", "-") for path in folder.glob("[!_]*.py")} == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(run, name):
    status, out, err = run(name, "x=1", "--help", "--nonsense")
    assert status == 0 and err == "" and run(name, "-h")[1] == out
    assert name in BARE or run(name) == (0, out, "")
    assert f"\n    i2vgen {name} " in out  # its first example, indented
    assert out.isascii() and all(len(line) <= 110 for line in out.splitlines())
    assert "scripts/" not in out and "python -m" not in out.replace("-m i2vgen train", "")


def test_no_help_waits_for_anything():
    calls = [["--help"], ["--version"], ["generat"], ["x=1"], *([name, "--help"] for name in COMMANDS)]
    out, modules = imported(f"from i2vgen.__main__ import main\nfor words in {calls}: main(words)")
    assert len(out.splitlines()) > 100
    assert not modules & set(SLOW) and "i2vgen.commands.generate" not in modules


@pytest.mark.parametrize("file", [ROOT / "scripts" / "generate.py", "-m"])
def test_both_doors_of_python_are_light(file):
    words = [str(file), "--help"] if file != "-m" else ["-m", "i2vgen", "generate", "--help"]
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *words],
        cwd=ROOT, capture_output=True, text=True, check=True, encoding="utf-8",
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert "i2vgen generate" in done.stdout
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "i2vgen.commands" in modules and not modules & set(SLOW)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["generat"], "there is no command 'generat'; did you mean i2vgen generate?"),
        (["refine_gain"], "did you mean i2vgen refine-gain?"),
        (["qqq"], "there is no command 'qqq'; i2vgen --help lists them"),
        (["a\x1b[31m"], r"there is no command 'a\x1b[31m'"),
        (["--steps"], "there is no option '--steps'; known are --help, --version"),
        (["prompt=a boat"], "'prompt=a boat' is a setting; write the command first, such as i2vgen generate"),
    ],
)
def test_words_that_are_no_command(run, words, told):
    status, out, err = run(*words)
    assert status == 2 and out == "" and err.startswith("error: ") and told in err and err.count("\n") == 1


def test_settings_are_written_alike(run):
    """name=value also where options were --name value, which stay."""
    for words in (["dtype=float32", "--dry-run"], ["--dtype", "float32", "--dry-run"]):
        status, out, err = run("convert", ROOT / "i2vgen/assets/small", "out", *words)
        assert status == 0, err
    for words in (["dtype=float3"], ["--dtype=float3"], ["--dtype", "float3"]):
        status, _, err = run("export", ROOT / "i2vgen/assets/small", "out", "layout=vgen", *words)
        assert status == 2 and err.startswith("error: argument --dtype: invalid choice: 'float3'")
        assert "i2vgen export --help" in err and err.count("\n") == 1
    assert "dtype= is empty" in run("parity", "file", "dtype=")[2]
    assert not Path("out").exists()
    status, out, _ = run(
        "parity", *sorted((ROOT / "tests/goldens").glob("*rng*")), "json=a.json", "--summary"
    )
    assert status == 0 and json.loads(Path("a.json").read_text())["passed"] and "pipeline_rng" in out


def test_shipped_weights_have_a_name_everywhere(run):
    status, out, err = run("inspect", "lab")
    assert status == 0 and "decoder.mid" in out, err
    status, out, err = run("verify", "lab", "i2vgen/assets/small")
    assert status == 0 and out.count("same: ") == 3, err
    status, out, err = run("export", "lab", "out", "layout=vgen")
    assert status == 0 and Path("out").is_dir(), err
    status, out, err = run("convert", "lab", "lab", "dtype=int8")  # what is written is ./lab
    assert status == 0 and Path("lab/unet.safetensors").is_file(), err


def test_the_converter_keeps_its_name():
    words = [sys.executable, "-m", "weights_conversion", "inspect", "i2vgen/assets/small"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0 and "unet" in done.stdout, done.stderr
    done = subprocess.run(
        [*words[:3], "generate"], cwd=ROOT, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 2 and "python -m weights_conversion --help lists them" in done.stderr


# --- the first clip


def test_the_first_clip(run):
    status, out, err = run("generate", *QUICK)
    assert status == 0, err
    assert f'image={shipped.PICTURE} prompt="{shipped.PROMPT}"' in out
    assert "next: i2vgen generate image=" in out and "i2vgen examples DIR" in out
    record = json.loads(Path("outputs/rocket.mp4.json").read_text())
    assert record["settings"]["prompt"] == [shipped.PROMPT] and record["seed"] == 8888
    assert len(video.load("outputs/rocket.mp4")[0]) == 8


def test_the_first_clip_replaces_nothing(run):
    Path("outputs").mkdir()
    for name in ("rocket.mp4", "rocket-2.mp4.json"):
        Path("outputs", name).write_text("mine")
    status, out, err = run("generate", *QUICK)
    assert status == 0 and "outputs/rocket-3.mp4 (8 frames" in out, err
    status, out, err = run("generate", *QUICK, "output=outputs/a.gif", "seed=4")
    assert status == 0 and "outputs/a.gif (8 frames, seed 4)" in out, err
    assert Path("outputs/rocket.mp4").read_text() == Path("outputs/rocket-2.mp4.json").read_text() == "mine"
    status, out, _ = run("generate", *QUICK, "output=outputs/a.gif", "seed=4", "--resume")
    assert status == 0 and "1 clip already there, 0 to make" in out
    status, out, err = run("generate", *QUICK, f"image={shipped.PICTURE}", "prompt=p", "seed=[1,2]")
    assert status == 0 and "outputs/rocket-4-001-seed2.mp4 (8 frames, seed 2)" in out, err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["prompt=a star"], "no picture given; write image=PATH"),
        ([f"image={shipped.STAR}"], "no prompt given"),
        ([ROOT / "configs" / "tiny.yaml", "weights=random"], "no picture given"),
        (["weights=random"], "no picture given"),
    ],
)
def test_half_a_job_is_not_completed_in_silence(run, words, told):
    status, out, err = run("generate", *words)
    assert status == 2 and told in err and out == "" and not Path("outputs").exists()


def test_printing_settings_names_no_job(run):
    status, out, _ = run("generate", "--print-config")
    assert status == 0 and "rocket.png" not in out and "steps: 20" in out


# --- what comes with it


def test_shipped_configurations_are_found(run, tmp_path):
    for words in (["generate", "tiny.yaml"], ["generate", "configs/tiny.yaml"]):
        status, out, err = run(*words, "weights=random", "--print-config")
        assert status == 0 and out == load_config(ROOT / "configs/tiny.yaml", weights="random").to_yaml()
        assert f"note: {words[1]} is the shipped file {ROOT / 'configs' / 'tiny.yaml'}" in err
    status, out, _ = run("train", "train/tiny_vae.yaml", "--print-config")
    assert status == 0 and "part: vae" in out
    status, out, _ = run("ablate", "ablations/concat_gain.yaml")
    assert status == 2  # found, but no output= was given

    (tmp_path / "tiny.yaml").write_text("sample: {steps: 3}\n")
    status, out, err = run("generate", "tiny.yaml", "--print-config")
    assert "steps: 3" in out and err == ""


@pytest.mark.parametrize(
    "name", ["tini.yaml", "configs/none.yaml", "/tiny.yaml", "../configs/tiny.yaml", "train"]
)
def test_other_names_are_no_shipped_configuration(run, name):
    status, out, err = run("generate", name, "--print-config")
    assert status == 2 and f"configuration file {name} does not exist" in err and out == ""


def test_an_installation_holds_configurations_and_examples(tmp_path):
    """What setup.py puts into a wheel works where no clone is; .ci/full installs one."""
    words = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
    held = {path.relative_to(tmp_path / "i2vgen") for path in (tmp_path / "i2vgen/configs").rglob("*.yaml")}
    assert held == {path.relative_to(ROOT) for path in CONFIGS} and (tmp_path / "i2vgen/py.typed").is_file()
    words = [sys.executable, "-m", "i2vgen", "examples", "mine"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", env={
        "PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"})  # fmt: skip
    assert done.returncode == 0 and (tmp_path / "mine/control.py").is_file(), done.stderr


def test_examples_are_listed_and_copied(run, tmp_path):
    status, out, _ = run("examples")
    assert status == 0 and "i2vgen examples DIR" in out
    status, told, err = run("examples", "new/mine")
    assert status == 0 and "i2vgen generate image=new/mine/rocket.png" in told, err
    here = Path("new/mine")
    held = {str(path.relative_to(here)) for path in here.rglob("*") if path.is_file()}
    wanted = {str(path.relative_to(ROOT)) for path in CONFIGS}
    wanted |= {path.name for path in (ROOT / "examples").glob("[!.]*.*")} | {
        "rocket.png",
        "turtle.png",
        "two.png",
        "star.png",
        "boat.png",
    }
    assert held == wanted and all(name.rpartition("/")[2] in out for name in held)
    assert Image.open(here / "rocket.png").size == Image.open(shipped.PICTURE).size
    for file in CONFIGS:
        assert (here / file.relative_to(ROOT)).read_bytes() == file.read_bytes()


def test_the_copied_list_makes_clips_anywhere(run, monkeypatch):
    assert run("examples", "mine")[0] == 0
    status, out, err = run("generate", "items=mine/prompts.jsonl", *QUICK, "batch=5", "save.enlarge=1")
    assert status == 0 and "outputs/examples/turtle_grows.gif" in out, err


def test_a_home_folder_is_meant(run, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    assert run("examples", "~/mine")[0] == 0 and (tmp_path / "home/mine/rocket.png").is_file()
    assert not Path("~").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["full"], "full is there already, and nothing in it is replaced"),
        (["file"], "file is there already"),
        (["."], "nothing in it is replaced"),
        (["link"], "nothing in it is replaced"),
        (["file/mine"], "cannot create the folder"),
        (["a", "b"], "give one folder"),
        (["output=a"], "give one folder"),
        (["--force"], "give one folder"),
    ],
)
def test_examples_replace_nothing(run, words, told):
    Path("full").mkdir()
    Path("full/mine.txt").write_text("mine")
    Path("file").write_text("mine")
    Path("empty").mkdir()
    Path("link").symlink_to("empty")
    status, out, err = run("examples", *words)
    assert status == 2 and told in err and out == ""
    assert sorted(p.name for p in Path().rglob("*")) == ["empty", "file", "full", "link", "mine.txt"]


@pytest.mark.parametrize(
    "words",
    [
        ("train", "weights=lab", "train.data=mine", "output=a/b"),
        ("prepare", "weights=lab", "data=mine", "output=a"),
        ("evaluate", "things=mine", "output=a/b"),
    ],
    ids=lambda words: words[0],
)
def test_a_refused_command_leaves_no_folder(run, words):
    Path("mine").mkdir()
    status, _, err = run(*words, "device=cpu")
    assert status == 2 and "mine holds" in err
    assert [p.name for p in Path().rglob("*")] == ["mine"]


def test_an_empty_folder_is_filled(run):
    Path("my examples").mkdir()
    status, out, err = run("examples", "my examples")
    assert status == 0 and Path("my examples/rocket.png").is_file(), err
    assert "i2vgen generate 'image=my examples/rocket.png'" in out


def test_the_working_folder_stays_where_it_is(run):
    assert "is the working folder" in run("examples", ".")[2]


def test_examples_come_whole_or_not_at_all(run, monkeypatch):
    def fails(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", fails)
    status, _, err = run("examples", "mine")
    assert status == 2 and "No space left" in err and list(Path().iterdir()) == []


# --- what the documentation says


PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "i2vgen/assets").rglob("README.md")]
PAGES = [page for page in sorted(PAGES) if page.name != "CHANGELOG.md"]
CODE = re.compile(r"^```[a-z]*\n(.*?)^```|^    (\S.*?)$|`([^`\n]+)`", re.M | re.S)
COMMAND = re.compile(r"^(?:torchrun \S+ \S+ -m |python -m )?i2vgen ([a-z].*)")


def commands(text):
    """The command lines in the code of a page -> name of the command, its other words."""
    for block in CODE.finditer(text):
        for line in next(filter(None, block.groups())).splitlines():
            if found := COMMAND.match(line.partition(" #")[0].strip()):
                name, *words = shlex.split(found[1].replace("[", "").replace("]", "").replace("|", " "))
                yield name, words


def wrong(name, words):
    """What a command does not know of a line that shows it."""
    if name not in COMMANDS:
        return [name]
    text = door.help_text(f"i2vgen.commands.{name.replace('-', '_')}")
    text += " --help"
    settings = {*config.LITERALS, *config.SHORT, *config.SECTIONS, "train"}
    found = []
    for word in words:
        setting = re.match(r"(([a-z]\w*)(?:\.\w+)*)=", word)
        if word.startswith("-"):
            found += [word] if word not in text.split() and f"[{word}]" not in text else []
        elif setting and f"{setting[1]}=" not in text and setting[2] not in settings:
            found.append(word)
        elif word.startswith("configs/") and word.endswith(".yaml") and not word.endswith("/NAME.yaml"):
            found += [] if (ROOT / word).is_file() else [word]
    return found


@pytest.mark.parametrize("page", [*PAGES, *CONFIGS], ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_the_documentation_exist(page):
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".yaml":
        text = re.sub("^# ?", "", text, flags=re.M).replace("\n   i2vgen", "\n    i2vgen")
    assert [odd for name, words in commands(text) for odd in wrong(name, words)] == []
    assert not re.search(r"python scripts/|python -m weights_conversion \w", text)  # one name on every page


def test_there_are_commands_in_the_documentation():
    shown = [name for page in PAGES for name, _ in commands(page.read_text(encoding="utf-8"))]
    assert len(shown) > 60 and set(COMMANDS) - set(shown) <= {"draw-example"}


@pytest.mark.parametrize(
    "line",
    [
        "`i2vgen generat a=b`",
        "```\ni2vgen generate styps=3\n```",
        "    i2vgen train configs/train/none.yaml",
        "`i2vgen parity FILE --sumary`",
        "    torchrun --nproc-per-node 2 -m i2vgen tain x",
    ],
)
def test_commands_that_do_not_exist_are_seen(line):
    assert [odd for name, words in commands(line) for odd in wrong(name, words)]


def test_the_readmes_commands_work_in_any_folder(run):
    """Every line of the section that makes the first clips, then its Python."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## ")[1]
    lines = re.findall(r"^i2vgen .*", section, re.M)
    assert lines[0] == "i2vgen generate" and len(lines) == 3
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        status, out, err = run(*words, *(QUICK if words[0] == "generate" else ()))
        assert status == 0 and "NOISE" not in err + out, err
    python = re.search(r"^```python\n(.*?)^```", section, re.M | re.S)[1]
    exec(python.replace("i2vgen.load()", f"i2vgen.load(overrides={QUICK})"), {})
    made = {path.name for path in Path("outputs").iterdir() if path.suffix != ".json"}
    assert made == {"rocket.mp4", "turtle.gif", "right.gif", "zoom.gif"}


def test_what_the_model_cards_show_works(run):
    """Their lines and their Python, in the order of the cascade."""
    assert run("examples", "mine")[0] == 0
    for card in ("pictures", "small", "small_refiner"):
        text = (ROOT / f"i2vgen/assets/{card}/README.md").read_text(encoding="utf-8")
        for line in re.findall(r"^i2vgen .*", text, re.M):
            status, out, err = run(*shlex.split(line)[1:], *QUICK)
            assert status == 0 and "NOISE" not in err + out, err
        for python in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S):
            exec(re.sub(r"i2vgen\.load\((\"lab\")?\)", f"i2vgen.load(overrides={QUICK})", python), {})
    made = {path.name for path in Path("outputs").iterdir() if path.suffix != ".json"}
    assert made == {"right.gif", "grow.gif", "left.gif", "star64.mp4", "left64.mp4"}
