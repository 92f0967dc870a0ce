"""`i2vgen generate`, as a user meets it: what it makes, and how it says no."""

import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import PATHS
from PIL import Image

from i2vgen import pipeline
from i2vgen.files import checkpoint, video
from i2vgen.memory import plans
from i2vgen.settings import merge

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "generate.py"
QUICK = [
    str(ROOT / "configs" / "tiny.yaml"),
    "weights=random",
    "width=64",
    "frames=3",
    "steps=2",
    "device=cpu",
]


@pytest.fixture
def run(script_at):
    return script_at("generate")


@pytest.fixture
def loads(monkeypatch, road):
    """Loading takes the parts that are there; the list tells how often it was asked."""
    asked = []

    def load_parts(settings, tell):
        asked.append(settings)
        tell("about nothing")
        return pipeline.I2VGenXL(settings, road.unet, road.vae, road.clip, road.device)

    monkeypatch.setattr(pipeline, "load_parts", load_parts)
    return asked


def made(folder="."):
    return sorted(path.name for path in Path(folder).iterdir())


# --- what it makes


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip.webp", "clip.png", "frames"])
def test_one_clip(run, quick, loads, picture_file, road, name):
    status, out, err = run(
        *quick, f"image={picture_file}", "prompt=a boat: it sails", f"output=new/{name}", "seed=7"
    )
    assert status == 0 and "error" not in err
    record = f"new/{name}.json"
    assert f"new/{name} (3 frames, seed 7), settings in {record}" in out
    assert (
        "16 x 16 pixels, 3 frames, 2 steps, guidance 9, on cpu in float64" in out
        and "memory: about nothing" in out
    )
    assert len(loads) == 1 and loads[0].prompt == ("a boat: it sails",)
    assert json.loads(Path(record).read_text())["settings"]["prompt"] == ["a boat: it sails"]
    frames, _ = video.load(f"new/{name}")
    if name == "frames":  # the one exact format
        assert np.array_equal(frames, road(picture_file, "a boat: it sails", seed=7).frames)


def test_many_clips_from_one_load(run, quick, loads, picture_file, road):
    Image.new("RGB", (50, 50), "red").save("red.png")
    words = [f"image={picture_file}", "image=red.png", "prompt=one", "prompt=two", "seed=[3,4]", "output=o/c"]
    status, out, _ = run(*quick, *words, "batch=3")
    assert status == 0 and len(loads) == 1
    assert len([line for line in out.splitlines() if "settings in" in line]) == 4
    expected = {"c-000-seed3": (picture_file, "one", 3), "c-001-seed4": (picture_file, "one", 4),
                "c-002-seed3": ("red.png", "two", 3), "c-003-seed4": ("red.png", "two", 4)}  # fmt: skip
    assert made("o") == sorted([*expected, *(f"{name}.json" for name in expected)])
    for name, (image, prompt, seed) in expected.items():
        assert np.array_equal(video.load(f"o/{name}")[0], road(image, prompt, seed=seed).frames)
        record = json.loads(Path(f"o/{name}.json").read_text())
        assert record["seed"] == seed and record["settings"]["prompt"] == [prompt]


def test_one_picture_for_all_prompts_and_the_default_place(run, quick, loads, picture_file):
    status, *_ = run(*quick, f"image={picture_file}", "prompt=one", "prompt=two", "steps=1")
    assert status == 0
    stem = f"{picture_file.stem}-{{}}-seed8888"
    assert made("outputs") == sorted(
        stem.format(n) + end for n in ("000", "001") for end in (".mp4.json", ".mp4")
    )


def test_a_list_of_items_then_resume(run, quick, loads, picture_file):
    lines = [
        {"image": str(picture_file), "prompt": "one", "output": "a.gif"},
        {"image": str(picture_file), "prompt": "two", "seed": [1, 2], "output": "b.gif"},
        {"image": str(picture_file), "prompt": "", "seed": 5},
    ]
    Path("list.jsonl").write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    words = [*quick, "items=list.jsonl", "steps=1", "frames=1", "output=rest.gif"]
    status, _, err = run(*words)
    assert status == 0 and "note: the prompt is empty" in err
    names = ["a", "b-001-seed1", "b-002-seed2", "rest-003-seed5"]
    assert {f"{name}{end}" for name in names for end in (".gif", ".gif.json")} <= {*made()}
    assert json.loads(Path("b-002-seed2.gif.json").read_text())["seed"] == 2

    status, out, _ = run(*words, "--resume")
    assert (status, len(loads)) == (0, 1) and out == "4 clips already there, 0 to make\n"
    Path("b-001-seed1.gif.json").unlink()
    before = Path("a.gif").stat().st_mtime_ns
    status, out, _ = run(*words, "--resume")
    assert status == 0 and "3 clips already there, 1 to make" in out and "clip 1 of 1" not in out
    assert Path("b-001-seed1.gif.json").exists() and Path("a.gif").stat().st_mtime_ns == before


@pytest.mark.parametrize("name", ["astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg"])
def test_photographs(run, quick, loads, name):
    skimage = pytest.importorskip("skimage")
    photo = Path(skimage.__file__).parent / "data" / name
    if not photo.exists():
        pytest.skip(f"this scikit-image does not bundle {name}")
    status, out, _ = run(*quick, f"image={photo}", "prompt=it moves", "output=clip", "steps=1", "width=32")
    assert status == 0 and "32 x 16 pixels" in out
    frames, _ = video.load("clip")
    assert frames.shape == (3, 16, 32, 3) and frames.std() > 1


def test_weights_from_a_folder_and_from_a_file_of_settings(run, tiny_model, picture_file):
    checkpoint.save("w", tiny_model.parts, tiny_model.config)
    Path("job.yaml").write_text(
        f"weights: w\nprompt: no\nimage: {picture_file}\noutput: clip\nruntime: {{device: cpu}}\n"
    )
    status, _, err = run("job.yaml", "seed=3")
    assert status == 0 and "NOISE" not in err
    assert np.array_equal(video.load("clip")[0], tiny_model(picture_file, "no", seed=3).frames)


def test_an_empty_prompt_is_allowed_with_a_note(run, quick, loads, picture_file):
    status, _, err = run(*quick, f"image={picture_file}", "prompt=", "output=c.gif", "steps=1")
    assert status == 0 and "note: the prompt is empty" in err and Path("c.gif").exists()


def test_a_long_prompt_says_what_is_lost(run, quick, loads, picture_file):
    status, _, err = run(*quick, f"image={picture_file}", f"prompt={'word ' * 80}", "output=c.gif", "steps=1")
    assert status == 0 and "note: the prompt has 80 tokens and CLIP reads 75" in err


# --- what it prints


def test_print_config_is_a_file_that_says_the_same(run, loads, tmp_path):
    words = [
        *QUICK,
        "prompt=no: 1e3",
        "prompt=",
        "image=é.png",
        "seed=[1,2]",
        "use.fps=false",
        "--print-config",
    ]
    status, out, _ = run(*words)
    (tmp_path / "printed.yaml").write_text(out)
    printed = merge.load_config(tmp_path / "printed.yaml")
    assert status == 0 and loads == [] and printed == merge.load_config(words[0], words[1:-1])
    assert yaml.safe_load(out)["prompt"] == ["no: 1e3", ""]
    assert run("printed.yaml", "--print-config")[1] == out


@pytest.mark.parametrize("words", [("--help",), ("-h",), ("steps=nonsense", "--help")], ids=str)
def test_help(run, words):
    status, out, err = run(*words)
    assert status == 0 and err == ""
    assert all(word in out for word in ("image=", "items=", "weights=", "--resume", "--print-config"))


# --- how it says no


def bomb(path):
    """A valid PNG head of 30000 x 30000 pixels with nothing behind it."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


@pytest.fixture
def mistakes(tmp_path, picture_file, picture):
    """Files of all sorts to point at."""
    picture.save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no picture")
    bomb(tmp_path / "bomb.png")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "letter.txt").write_text("hello")
    (tmp_path / "list.yaml").write_text("- a\n")
    (tmp_path / "broken.yaml").write_text("sample: {steps: 5\nuse: [\n")
    item = {"image": "whole.png", "prompt": "p"}
    for name, lines in {
        "nojson": ['{"image": '],
        "second": [json.dumps(item), "nonsense"],
        "array": ["[1, 2]"],
        "noimage": [json.dumps({"prompt": "p"})],
        "extra": [json.dumps({**item, "sed": 3})],
        "number": [json.dumps({**item, "prompt": 3})],
        "seed": [json.dumps({**item, "seed": -1})],
        "seeds": [json.dumps({**item, "seed": []})],
        "float": [json.dumps({**item, "seed": 1.5})],
        "true": [json.dumps({**item, "seed": True})],
        "lost": [json.dumps({**item, "image": "gone.png"})],
        "twice": [json.dumps({**item, "output": "same.mp4"})] * 2,
        "blank": ["", "  "],
    }.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    return tmp_path


GOOD = ["image=whole.png", "prompt=p"]
REFUSED = [
    # pictures
    (["image=gone.png", "prompt=p"], "picture gone.png does not exist"),
    (["image=folder", "prompt=p"], "folder is a folder"),
    (["image=text.png", "prompt=p"], "text.png is not a picture"),
    (["image=empty.png", "prompt=p"], "empty.png is an empty file"),
    (["image=cut.png", "prompt=p"], "cut.png is damaged or cut short"),
    (["image=bomb.png", "prompt=p"], "bomb.png is too large"),
    (["image=whole.png", "image=gone.png", "prompt=p"], "gone.png does not exist"),
    (["prompt=p"], "no picture given"),
    (["image=whole.png"], "no prompt given"),
    (["image=whole.png"] * 2 + ["prompt=p"] * 3, "2 pictures and 3 prompts cannot be paired"),
    # numbers
    ([*GOOD, "width=700"], "640 or 704"),
    ([*GOOD, "height=0"], "sample.height is 0"),
    ([*GOOD, "frames=0"], "sample.frames is 0"),
    ([*GOOD, "steps=0"], "sample.steps is 0"),
    ([*GOOD, "steps=1001"], "sample.steps is 1001"),
    ([*GOOD, "guidance=nan"], "sample.guidance is nan"),
    ([*GOOD, "seed=-1"], "sample.seed is -1"),
    ([*GOOD, "seed=18446744073709551616"], "sample.seed is 18446744073709551616"),
    ([*GOOD, "fps=fast"], "sample.fps is 'fast'"),
    # memory
    ([*GOOD, "memory=tiny"], "runtime.memory is 'tiny'"),
    ([*GOOD, "token_chunk=-1"], "runtime.token_chunk is -1"),
    ([*GOOD, "vae_tile=-1"], "runtime.vae_tile is -1"),
    ([*GOOD, "quality=best"], "quality"),
    ([*GOOD, "offload=blocks", "compile=true"], "runtime.compile cannot follow"),
    # outputs
    ([*GOOD, "output=whole.png/sub/clip.mp4"], "cannot create the folder"),
    ([*GOOD, "output=clip.avi"], ".mp4, .gif and .webp"),
    ([*GOOD, "output=folder"], "holds other files"),
    ([*GOOD, "output=a.gif", "save.fps=100"], "too fast for a GIF"),
    (["image=in.gif", "prompt=p", "output=./in.gif"], "would overwrite in.gif"),
    # files of settings, names
    (["list.yaml", *GOOD], "two configuration files"),
    ([*GOOD, "stepz=3"], "did you mean steps"),
    ([*GOOD, "--resum"], "no option --resum"),
    ([*GOOD, "use.text=false", "use.global_tokens=false", "use.local_tokens=false"], "use.text"),
    # lists
    (["items=gone.jsonl"], "items=gone.jsonl cannot be read"),
    (["items=folder"], "items=folder cannot be read"),
    (["items=binary.jsonl"], "items=binary.jsonl cannot be read"),
    (["items=nojson.jsonl"], "nojson.jsonl, line 1 is not JSON"),
    (["items=second.jsonl"], "second.jsonl, line 2 is not JSON"),
    (["items=array.jsonl"], "line 1: expected an object"),
    (["items=noimage.jsonl"], "line 1: expected an object with image and prompt"),
    (["items=extra.jsonl"], "line 1: expected an object"),
    (["items=number.jsonl"], "line 1: prompt is 3, expected text"),
    (["items=seed.jsonl"], "line 1: seed is -1"),
    (["items=seeds.jsonl"], "line 1: seed is []"),
    (["items=float.jsonl"], "line 1: seed is 1.5"),
    (["items=true.jsonl"], "line 1: seed is True"),
    (["items=lost.jsonl"], "picture gone.png does not exist"),
    (["items=gone.jsonl", "image=whole.png"], "items= was given together with image="),
    (["items=twice.jsonl"], "two clips would be written to same.mp4"),
    (["items=blank.jsonl"], "holds no records"),
]


def said_no(status, out, err, words):
    lines = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert status == 2 and out == "" and "Traceback" not in err
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    assert words in lines[0], err


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=[" ".join(r[0])[:60] for r in REFUSED])
def test_mistakes_cost_one_line_and_no_loading(run, mistakes, monkeypatch, words, message):
    monkeypatch.setattr(pipeline, "load_parts", lambda settings, tell: pytest.fail("the model was loaded"))
    if "image=in.gif" in words:
        Image.new("RGB", (8, 8)).save("in.gif")
    said_no(*run(*QUICK, *words), message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["broken.yaml"], "broken.yaml is no readable YAML file"),
        (["list.yaml"], "holds no settings"),
        (["gone.yaml"], "gone.yaml does not exist"),
        (["folder"], "folder does not exist"),
        (["weights=gone"], "weights=gone does not exist"),
        (["weights=folder"], "holds no settings.json"),
        (["weights=whole.png"], "is a file"),
        (["weights=", *GOOD, "unet.base_width=64"], "unet.base_width is 64 in the settings given but"),
    ],
    ids=str,
)
def test_mistakes_in_what_comes_first(run, mistakes, monkeypatch, words, message):
    monkeypatch.setattr(checkpoint, "load", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    said_no(*run(*words), message)


def test_two_clips_may_not_share_a_file(run, mistakes, monkeypatch):
    monkeypatch.setattr(pipeline, "load_parts", lambda settings, tell: pytest.fail("the model was loaded"))
    item = {"image": "whole.png", "prompt": "p"}
    Path("here").symlink_to(".")
    for name in ("a.mp4", "folder/../a.mp4", "here/a.mp4"):
        Path("list.jsonl").write_text("\n".join(json.dumps({**item, "output": n}) for n in ("a.mp4", name)))
        said_no(*run(*QUICK, "items=list.jsonl"), "two clips would be written to a.mp4")


# --- what is there already


@pytest.fixture
def unloadable(monkeypatch):
    monkeypatch.setattr(pipeline, "load_parts", lambda settings, tell: pytest.fail("the model was loaded"))


@pytest.mark.parametrize(
    ("image", "output"),
    [
        ("link.png", "whole.png"),
        ("whole.png", "link.png"),
        ("here/whole.png", "here/here/whole.png"),
        ("twin.png", "whole.png"),
        ("frames/frame_0000.png", "frames"),
        ("here/frames/frame_0000.png", "frames"),
    ],
)
def test_the_picture_is_not_overwritten_under_another_name(run, mistakes, unloadable, image, output):
    Path("link.png").symlink_to("whole.png")
    Path("here").symlink_to(".")
    os.link("whole.png", "twin.png")
    Path("frames").mkdir()
    Path("frames/frame_0000.png").write_bytes(Path("whole.png").read_bytes())
    before = Path("whole.png").read_bytes()
    said_no(*run(*QUICK, f"image={image}", "prompt=p", f"output={output}"), "would overwrite")
    assert Path("whole.png").read_bytes() == Path("frames/frame_0000.png").read_bytes() == before


def test_another_programs_json_is_kept(run, quick, loads, picture_file):
    for name in ("photo.json", "photo.gif.json", "notes.json"):
        Path(name).write_text('{"my": "annotation"}')
    words = [*quick, f"image={picture_file}", "prompt=p", "steps=1"]
    assert run(*words, "output=photo.webp")[0] == 0
    said_no(*run(*words, "output=photo.gif"), "would overwrite photo.gif.json, which is no record of a clip")
    said_no(*run(*words, "output=notes"), "would overwrite notes.json")
    assert {Path(n).read_text() for n in ("photo.json", "photo.gif.json", "notes.json")} == {
        '{"my": "annotation"}'
    }


@pytest.mark.parametrize("name", ["settings", "origin"])
def test_the_files_of_a_weights_folder_are_kept(run, tiny_model, picture_file, name):
    checkpoint.save("w", tiny_model.parts, tiny_model.config)
    before = Path(f"w/{name}.json").read_bytes()
    words = ["weights=w", f"image={picture_file}", "prompt=p", "steps=1", "device=cpu"]
    said_no(*run(*words, f"output=w/{name}"), f"w/{name}.json")
    assert run(*words, f"output=w/{name}.gif")[0] == 0
    assert Path(f"w/{name}.json").read_bytes() == before


def test_an_old_record_is_read_and_then_replaced(run, quick, loads, picture_file):
    words = [*quick, f"image={picture_file}", "prompt=p", "steps=1", "output=c.gif"]
    assert run(*words)[0] == 0
    Path("c.gif.json").rename("c.json")  # where earlier versions put it
    assert "1 clip already there" in run(*words, "--resume")[1]
    assert run(*words, "seed=2")[0] == 0 and made() == ["a picture.png", "c.gif", "c.gif.json"]


def test_clips_of_one_name_keep_a_record_each(run, quick, loads, picture_file):
    words = [*quick, f"image={picture_file}", "prompt=p", "steps=1"]
    for seed, name in enumerate(("c.gif", "c.webp", "c")):
        assert run(*words, f"output={name}", f"seed={seed}")[0] == 0
    seeds = [json.loads(Path(f"{name}.json").read_text())["seed"] for name in ("c.gif", "c.webp", "c")]
    assert seeds == [0, 1, 2]
    for seed, name in enumerate(("c.gif", "c.webp", "c")):
        assert "1 clip already" in run(*words, f"output={name}", f"seed={seed}", "--resume")[1]


def test_a_changed_picture_is_made_again(run, quick, loads, picture_file):
    words = [*quick, f"image={picture_file}", "prompt=p", "steps=1", "output=c.gif", "--resume"]
    assert run(*words)[0] == 0 and "1 clip already there" in run(*words)[1]
    Image.new("RGB", (50, 50), "red").save(picture_file)
    assert "0 clips already there, 1 to make" in run(*words)[1]


# --- names


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["output=" + 251 * "a" + ".mp4"], "File name too long"),
        (["output=" + 251 * "a"], "File name too long"),  # its record's is
        (["output=" + 100 * "/long" + 4000 * "g" + "/c.gif"], "File name too long"),
        (["output=bad\udcff.gif"], "not valid Unicode"),
        (["output=\ud800.gif", "seed=[1,2]"], "not valid Unicode"),
        (["prompt=\ud800"], "is not valid Unicode"),
        (["negative_prompt=\ud800"], "is not valid Unicode"),
    ],
    ids=["name", "record", "path", "bytes", "surrogate", "prompt", "negative"],
)
def test_names_that_cannot_be_written_are_told_first(run, mistakes, unloadable, words, message):
    said_no(*run(*QUICK, "image=whole.png", "prompt=p", *words), message)
    assert not Path("outputs").exists() or list(Path("outputs").iterdir()) == []


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"output": "nul\0.gif"}, "a path holds no"),
        ({"image": "nul\0.png"}, "a path holds no"),
        ({"prompt": "\ud800"}, "holds half of a character"),
    ],
    ids=str,
)
def test_lists_with_impossible_names(run, mistakes, unloadable, item, message):
    Path("list.jsonl").write_text(json.dumps({"image": "whole.png", "prompt": "p", **item}))
    said_no(*run(*QUICK, "items=list.jsonl"), message)


@pytest.mark.parametrize("stem", [79 * "\u5bff", 250 * "x", "caf\udce9"], ids=["chinese", "long", "latin-1"])
def test_any_picture_has_a_default_output(run, quick, loads, picture, stem):
    picture.save("p.png")
    os.rename("p.png", f"{stem}.png")
    assert run(*quick, f"image={stem}.png", "prompt=p", "steps=1", "seed=[1,2,3]")[0] == 0
    assert len(made("outputs")) == 6
    (record, *_) = (path for path in Path("outputs").iterdir() if path.suffix == ".json")
    assert json.loads(record.read_text("utf-8"))["settings"]["image"] == [f"{stem}.png"]


def test_home_folders(run, quick, loads, picture, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    picture.save("home/p.png")
    assert run(*quick, "image=~/p.png", "prompt=p", "steps=1", "output=~/o/c.gif")[0] == 0
    item = {"image": "~/p.png", "prompt": "p", "output": "~/o/d.gif"}
    Path("home/list.jsonl").write_text(json.dumps(item))
    assert run(*quick, "items=~/list.jsonl", "steps=1")[0] == 0
    assert made("home/o") == ["c.gif", "c.gif.json", "d.gif", "d.gif.json"] and not Path("~").exists()


def test_names_never_command_the_terminal(run, quick, loads, picture):
    name = "\x1b]0;owned\x07\x9b31m\r\u202e.png"
    picture.save("p.png")
    os.rename("p.png", name)
    status, out, err = run(*quick, f"image={name}", "prompt=\x1b[1m", "steps=1")
    assert status == 0 and "\\x1b]0;owned" in out
    status, _, more = run(*quick, f"image=no{name}", "prompt=p")
    assert status == 2 and "\\x1b]0;owned" in more
    assert not set(out + err.replace("\r", "") + more) & set("\x1b\x07\x9b\r\u202e")


# --- finished work is kept


def test_a_clip_that_cannot_be_saved_costs_no_other(run, quick, loads, picture_file, monkeypatch):
    right = video.save

    def full(frames, path, **how):
        if "seed2" in str(path):
            raise OSError(28, "No space left on device")
        return right(frames, path, **how)

    monkeypatch.setattr(video, "save", full)
    words = [f"image={picture_file}", "prompt=p", "steps=1", "seed=[1,2,3]", "output=c.gif", "batch=3"]
    status, out, err = run(*quick, *words)
    assert status == 2 and out.count("settings in") == 2 and "error: [Errno 28] No space left" in err
    assert "note: c-001-seed2.gif is not saved" in err


# --- what is told


def test_steps_that_are_made(run, quick, loads, picture_file):
    words = [*quick, f"image={picture_file}", "prompt=p", "output=c.gif"]
    status, out, _ = run(*words, "steps=3")
    assert status == 0 and "4 steps (for steps=3" in out
    assert json.loads(Path("c.gif.json").read_text())["steps"] == 4


def test_sizes_far_from_the_trained_ones(run, tiny_model, picture_file):
    checkpoint.save("w", tiny_model.parts, tiny_model.config)
    words = ["weights=w", f"image={picture_file}", "prompt=p", "output=c.gif", "steps=1", "device=cpu"]
    assert "far from" not in run(*words, "frames=4")[2]
    status, _, err = run(*words, "frames=6", "width=128")
    assert status == 0 and "note: 6 frames of 128 x 64 pixels are far from the 3 of 64 x 64" in err


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("num_inference_steps=4", "here it is steps="),
        ("sample.guidance_scale=2", "here it is guidance="),
        ("num_frames=4", "here it is frames="),
        ("target_fps=4", "here it is fps="),
        ("--num_inference_steps", "without dashes: steps=..."),
        ("--image=a.png", "without dashes: image=..."),
    ],
)
def test_diffusers_names_are_known(run, mistakes, unloadable, word, hint):
    said_no(*run(*QUICK, *GOOD, word), hint)


def test_too_little_memory(run, mistakes, monkeypatch):
    monkeypatch.setattr(checkpoint, "load", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    monkeypatch.setattr(plans, "free_memory", lambda where: 10**6)
    said_no(*run(*QUICK, *GOOD), "runtime.check_memory=false runs anyway")


def test_weights_that_lack_a_part(run, mistakes, monkeypatch, tiny):
    checkpoint.save("w", {"unet": {}, "clip": {}}, tiny)
    monkeypatch.setattr(checkpoint, "load", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    said_no(*run("weights=w", *GOOD), "lacks vae")


def test_a_run_that_breaks_down_says_where(run, quick, loads, mistakes):
    status, _, err = run(*quick, *GOOD, "eps_form=recovered", "spacing=trailing", "output=c.mp4")
    assert status == 2 and "error: latents are not finite after step 1 of 2 (t = 999)" in err
    assert not Path("c.mp4").exists() and not Path("c.mp4.json").exists()


# --- memory


@pytest.mark.filterwarnings("ignore:weights=random")
def test_a_lean_plan_gives_the_same_frames(run, picture_file, monkeypatch):
    """Through the door: plan and estimate are told first, and the frames are those of memory=full."""
    # At this size nothing is long enough to be cut; so the plan cuts finer, and a CPU keeps what a GPU would.
    finer = {"offload": "blocks", "token_chunk": 40, "vae_chunk": 1, "vae_tile": 6}
    monkeypatch.setitem(plans.PLANS, "low", finer)
    frames = {}
    for plan in ("full", "low"):
        words = [*QUICK, f"image={picture_file}", "prompt=a boat", f"output={plan}", f"memory={plan}"]
        status, out, err = run(*words, *(["offload=blocks"] if plan == "low" else []))
        assert status == 0, err
        frames[plan] = video.load(plan)[0].astype(int)
        record = json.loads(Path(f"{plan}.json").read_text())["settings"]["runtime"]
        assert record["memory"] == plan and record["token_chunk"] == (40 if plan == "low" else 0)
        assert (
            out.index(f"MiB under memory={plan}, in the ")
            < out.index("on cpu in float32")
            < out.index("seed")
        )
    assert abs(frames["full"] - frames["low"]).max() <= 1 and frames["full"].std() > 1


# --- as a process of its own


def test_the_command_line_for_real(picture_file, tmp_path):
    environment = {**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}

    def call(*words):
        command = [sys.executable, str(SCRIPT), *map(str, words)]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    done = call(*QUICK, f"image={picture_file}", "prompt=a boat", "output=clip.mp4", "steps=1")
    assert done.returncode == 0, done.stderr
    assert "NOISE" in done.stderr and "clip.mp4 (3 frames, seed 8888)" in done.stdout
    assert video.load(tmp_path / "clip.mp4")[0].shape == (3, 64, 64, 3)

    done = call(*QUICK, f"image={picture_file}", "prompt=a boat", "output=clip.mp4", "steps=0")
    said_no(done.returncode, done.stdout, done.stderr, "sample.steps is 0")
