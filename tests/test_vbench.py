"""`i2vgen vbench` on an invented list of two prompts: names, pictures, seeds, resuming."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from i2vgen import pipeline
from i2vgen.files import video
from i2vgen.scoring import vbench

ROOT = Path(__file__).parents[1]
STAR = ROOT / "i2vgen" / "assets" / "star.png"
# As in the benchmark's first lists, the prompt with a camera move names no picture.
INFO = [
    {"prompt_en": "a star", "dimension": ["i2v_subject"], "image_type": "other", "image_name": "a star.png"},
    {"prompt_en": "a star, camera pans left", "dimension": ["camera_motion"], "image_type": "other"},
]


@pytest.fixture
def run(script_at):
    """run(*words): run the script in a folder with a list and pictures of four shapes."""
    called = script_at("vbench")
    Path("info.json").write_text(json.dumps(INFO))
    for ratio in vbench.RATIOS:
        Path("crop", ratio).mkdir(parents=True)
        Image.open(STAR).save(Path("crop", ratio, "a star.png"))

    def run(
        *words, defaults=("info=info.json", "images=crop", "output=out", "steps=1", "batch=4", "device=cpu")
    ):
        return called(*defaults, *words)

    return run


@pytest.fixture
def stub(monkeypatch):
    """Replace loading by a model that makes grey clips; the list records its prompts."""
    asked = []

    class Model:
        def __init__(self, config):
            self.config = config

        def generate(self, pictures, prompts, seeds, on_step=None):
            asked.extend(prompts)
            grey = np.full((4, 32, 32, 3), 90, np.uint8)
            facts = zip(pictures, prompts, seeds, strict=True)
            return [pipeline.Video(grey, *fact, self.config) for fact in facts]

    monkeypatch.setattr(pipeline, "load_parts", lambda config, tell: Model(config))
    return asked


def names(folder="out/videos"):
    return sorted(path.name for path in Path(folder).iterdir())


def test_samples_are_laid_out_for_the_benchmark(run):
    status, out, err = run("samples=2", "seed=100")
    assert status == 0, err
    # Only .mp4 files: the benchmark assumes that all files have the suffix of the first.
    assert names() == [
        f"{prompt}-{i}.mp4" for prompt in ("a star, camera pans left", "a star") for i in (0, 1)
    ]
    assert video.load("out/videos/a star-0.mp4")[0].shape[0] == 8
    records = {
        path.name.split(".")[0]: json.loads(path.read_text()) for path in Path("out/clips").glob("*.json")
    }
    assert {name: record["seed"] for name, record in records.items()} == {
        "000000-0": 100, "000000-1": 101, "000001-0": 102, "000001-1": 103
    }  # fmt: skip
    assert records["000001-0"]["settings"]["image"] == [
        "crop/1-1/a star.png"
    ]  # the picture of the prompt without a camera move
    assert records["000001-0"]["settings"]["prompt"] == ["a star, camera pans left"]
    assert "--ratio 1-1" in out and "4 of 4 samples" in out


def test_a_stopped_run_resumes(run, stub):
    assert run("samples=1", "dimensions=i2v_subject")[0] == 0
    assert names() == ["a star-0.mp4"] and stub == ["a star"]
    status, out, _ = run("samples=1")
    assert status == 0 and "2 clips, 1 of them done" in out and stub == ["a star", "a star, camera pans left"]
    Path("out/videos/a star-0.mp4").unlink()  # only the link; nothing is generated again
    assert run("samples=1")[0] == 0 and len(names()) == 2 == len(stub)
    Path("out/clips/000000-0.mp4").write_bytes(b"cut short")
    assert run("samples=1")[0] == 0 and len(stub) == 3
    assert video.load("out/videos/a star-0.mp4")[0].shape[0] == 4  # the link is restored
    run("samples=1", "steps=2")  # other settings generate other clips
    assert len(stub) == 5


def test_shares_are_disjoint_and_cover_all(run, stub):
    assert "2 of 4 samples" in run("samples=2", "share=1/2")[1]
    assert names() == ["a star, camera pans left-0.mp4", "a star-0.mp4"]
    assert "4 of 4 samples" in run("samples=2", "share=2/2")[1] and len(stub) == 4


def test_the_nearest_shape_is_chosen(tmp_path):
    for ratio in vbench.RATIOS:
        (tmp_path / ratio).mkdir()
    for size, ratio in (((1280, 704), "16-9"), ((512, 512), "1-1"), ((448, 256), "7-4"), ((512, 320), "8-5")):
        assert vbench.crops(str(tmp_path), *size) == (tmp_path / ratio, ratio)
    assert vbench.crops(str(tmp_path), 1280, 704, "7-4")[1] == "7-4"
    (tmp_path / "16-9").rmdir()
    with pytest.raises(ValueError, match="has no 16-9"):
        vbench.crops(str(tmp_path), 1280, 704)


@pytest.mark.parametrize(
    ("info", "words", "message"),
    [
        (INFO, ["info=nowhere.json"], "is not a VBench-I2V list"),
        ({"prompt": 1}, [], "is not a VBench-I2V list"),
        ([{"prompt_en": "a", "dimension": ["x"]}], [], "names no picture"),
        ([*INFO, {**INFO[0], "image_name": "b.png"}], [], "one picture only"),
        ([{**INFO[0], "prompt_en": "up/down"}], [], "cannot be a file name"),
        ([{**INFO[0], "prompt_en": "x" * 250}], [], "longer than"),
        ([{**INFO[0], "image_name": "b.png"}], [], "1 picture missing"),
        (INFO, ["dimensions=beauty"], "has no dimension beauty"),
        (INFO, ["samples=none"], "samples is a whole number"),
        (INFO, ["share=3/2"], "write 1/4"),
        (INFO, ["ratio=4-3"], "not one of the benchmark's"),
        (INFO, ["images=nowhere"], "is not a folder"),
        (INFO, ["seed=[1,2]"], "give one"),
        (INFO, ["seed=9223372036854775807"], "counts up to"),
        (INFO, ["prompt=a"], "has no effect here"),
        (INFO, ["output="], "no output given"),
    ],
)
def test_refusals(run, monkeypatch, info, words, message):
    monkeypatch.setattr(pipeline, "load_parts", lambda *_, **__: pytest.fail("it went on"))
    Path("info.json").write_text(json.dumps(info))
    status, _, err = run(*words)
    assert status == 2 and message in err and "Traceback" not in err


def test_other_files_among_the_samples_are_reported(run):
    Path("out/videos").mkdir(parents=True)
    Path("out/videos/notes.json").write_text("{}")
    assert "notes.json, which is no sample" in run()[2]
