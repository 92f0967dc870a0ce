"""Studies: errors, numbers and error bars, and a whole study from the command line."""

import contextlib
import csv
import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
from conftest import CORE_ONLY, PATHS
from PIL import Image

from i2vgen.commands import ablate
from i2vgen.files import lock, video
from i2vgen.lab import measure, report
from i2vgen.lab import study as studies
from i2vgen.lab.report import Cell
from i2vgen.lab.study import Run
from i2vgen.world import drawing

ROOT = Path(__file__).parents[1]
STUDIES = sorted((ROOT / "configs" / "ablations").glob("*.yaml"))
SMALL = """# Does the concat branch matter?
measures: [cost, untrained, trained]
scores: [motion_accuracy_basic, first_frame_psnr]
variants:
  with it: []
  without: [use.concat=false]
train: {learning_rate: 0.001, log_every: 1}
"""


@pytest.fixture
def run(run_script, monkeypatch):
    monkeypatch.syspath_prepend(str(CORE_ONLY))  # for the workers, which take this process's path
    return functools.partial(run_script, "ablate.py")


@pytest.fixture
def study_file(tmp_path):
    def write(text=SMALL):
        (tmp_path / "small.yaml").write_text(text)
        return tmp_path / "small.yaml"

    return write


# --- studies as they are written


@pytest.mark.parametrize("file", STUDIES, ids=lambda p: p.stem)
def test_shipped_studies_can_be_run(file, tmp_path):
    study = studies.read(file)
    assert study.question.endswith("?") and len(study.variants) > 1
    found = studies.runs(study, studies.BUDGETS["quick"], tmp_path)
    assert len({r.folder for r in found}) == len(found) > 0


def test_the_central_study_of_the_paper_exists():
    assert "hierarchical_encoders" in {file.stem for file in STUDIES}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("use.concat=false", "use.concta=false"), r"variant 'without': .*did you mean use\.concat"),
        (("[use.concat=false]", "[]"), "'without' changes nothing"),
        (("use.concat=false", "use.concat=true"), "'with it' and 'without' have the same settings"),
        (("without:", "With It:"), "would share the result folder with_it"),
        (("first_frame_psnr", "beauty"), "no score 'beauty'"),
        (("cost, untrained", "price, untrained"), "no measure 'price'"),
        (("# Does the concat branch matter?", "# Concat"), "first line must be the question"),
        (("train:", "trian:"), "holds 'trian'"),
        (("use.concat=false", "use.text=false, use.global_tokens=false, use.local_tokens=false"), "all off"),
        (("  without: [use.concat=false]\n", ""), "at least one variant"),
        (("use.concat=false", "train.steeps=3"), r"did you mean train\.steps"),
        (("[use.concat=false]", "use.concat=false"), "give a list of strings"),
        (("without:", f"{'x' * 300}:"), "names its folder; give it a shorter name"),
        (("use.concat=false", "train.lora_rank=2"), "'without': train.lora_rank adapts a trained UNet"),
        (("use.concat=false", "train.first_stage=shipped"), "trains a refiner, which a study cannot score"),
        (("use.concat=false", "'device=${oc.env:HOME}'"), "references such as"),
        (("train: {", "train: {<<: [" + "[" * 99 + "]" * 99 + "], "), "nests deeper than 64 levels"),
        (("  with it: []", "  with it: []\n  with it: []"), "gives 'with it' a second time"),
    ],
    ids=lambda v: v[1] if isinstance(v, tuple) else "",
)
def test_mistakes_are_reported_before_any_run(run, study_file, tmp_path, change, message):
    file = study_file(SMALL.replace(*change))
    with pytest.raises(ValueError, match=message):
        studies.read(file)
    status, out = run(file, f"output={tmp_path / 'out'}")
    assert status == 2 and out.startswith("error: ") and not (tmp_path / "out").exists()


def test_the_command_line_refuses(run, study_file, tmp_path, monkeypatch):
    file = study_file()
    assert "there is no budget=tiny" in run(file, f"output={tmp_path}", "budget=tiny")[1]
    assert "give a study and a folder" in run(file)[1]
    assert "there is no steps=" in run(file, f"output={tmp_path}", "steps=3")[1]
    assert "it measures" in run(file, f"output={tmp_path}", "measures=cost,taste")[1]
    assert "workers is 0" in run(file, f"output={tmp_path / 'o'}", "workers=0", "budget=smoke")[1]
    assert "does not exist" in run(tmp_path / "none.yaml", f"output={tmp_path}")[1]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    assert "need matplotlib" in run(file, f"output={tmp_path}")[1]
    status, out = run(file, f"output={tmp_path / 'costs'}", "measures=cost", "budget=smoke")
    assert status == 0 and "| torch | 2." in (tmp_path / "costs/table.md").read_text(), out


def test_other_peoples_pages_are_not_replaced(run, study_file, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("my own page")
    status, out = run(study_file(), f"output={tmp_path / 'site'}", "budget=smoke")
    assert status == 2 and "index.html is not from an earlier run" in out
    assert [path.name for path in (tmp_path / "site").iterdir()] == ["index.html"]


def test_a_study_of_adapters_samples_with_them(study_file, tmp_path, monkeypatch):
    text = SMALL.replace("cost, untrained, ", "").replace("use.concat=false", "train.lora_rank=2")
    study = studies.read(study_file(text + "start: weights\n"))
    budget = dataclasses.replace(studies.BUDGETS["smoke"], train_steps=1, sample_steps=1)
    (run,) = (r for r in studies.runs(study, budget, tmp_path / "out") if r.variant == "without")
    loaded = []
    right = measure.pipeline.load_parts
    monkeypatch.setattr(measure.pipeline, "load_parts", lambda config: loaded.append(config) or right(config))
    measure.perform(study, run, budget, "cpu")
    assert loaded[0].adapter == str(run.folder / "train" / "adapter")
    assert json.loads((run.folder / measure.RESULT).read_text())["scores"]["first_frame_psnr"] > 0


# --- numbers


def result(value, low, high):
    return {"scores": {"clip_psnr": value}, "intervals": {"clip_psnr": [low, high]}}


def test_few_seeds_use_the_interval_over_clips():
    one = report.cell([result(20.0, 18.0, 22.0)], "clip_psnr")
    assert one == Cell(20.0, 18.0, 22.0, "clips")
    two = report.cell([result(20.0, 18.0, 22.0), result(24.0, 22.0, 26.0)], "clip_psnr")
    assert two.value == 22.0 and two.high - two.value == pytest.approx(2 / 2**0.5)


def test_three_seeds_use_the_interval_over_seeds():
    found = report.cell([result(v, v - 9, v + 9) for v in (20.0, 21.0, 22.0)], "clip_psnr")
    assert found.over == "seeds" and found.value == 21.0
    assert found.high - found.value == pytest.approx(4.303 / 3**0.5)  # Student, 2 degrees, deviation 1


def test_no_number_no_cell():
    assert report.cell([{"scores": {"clip_psnr": None}, "intervals": {}}], "clip_psnr") == Cell(None)
    assert not Cell(1.0).apart_from(Cell(9.0, 8.0, 10.0))


def test_differences_inside_the_error_bars_are_marked(study_file):
    study = studies.read(study_file())
    same = {"with it": {"clip_psnr": Cell(20, 19, 21)}, "without": {"clip_psnr": Cell(21, 20, 22)}}
    assert "lies inside the error bars" in report.verdict(study, same)
    apart = {"with it": {"clip_psnr": Cell(20, 19, 21)}, "without": {"clip_psnr": Cell(25, 24, 26)}}
    said = report.verdict(study, apart)
    assert "without in clip, PSNR" in said and "this run shows no difference" not in said
    assert report.as_text(study, "clip_psnr", Cell(25, 24, 26), Cell(20, 19, 21)).endswith("*")


def test_a_study_of_samplers_counts_network_calls(study_file, tmp_path):
    study = studies.read(study_file())
    study = dataclasses.replace(study, measures=("untrained",), scores=("clip_psnr",))

    def results(*calls):
        return {
            Run(variant, "untrained", 0, tmp_path): {**result(20.0, 19.0, 21.0), "calls": count, "loss": None}
            for variant, count in zip(study.variants, calls, strict=True)
        }

    table = report.score_tables(study, results(40, 9))[0][0]
    assert table.header[:2] == ("variant", "UNet calls a clip") and [row[1] for row in table.rows] == [
        "40",
        "9",
    ]
    assert Image.open(report.plots(study, results(40, 9), tmp_path)[0]).width > 200
    report.write_csv(study, results(40, 9), None, tmp_path / "r.csv")
    assert "without,untrained,calls,9,,," in (tmp_path / "r.csv").read_text()
    # If all are equal, the column is left out.
    assert report.score_tables(study, results(40, 40))[0][0].header[1] == "clip, PSNR"


# --- a whole study


def test_a_study_from_the_command_line(run, study_file, tmp_path):
    file, folder = study_file(), tmp_path / "out"
    status, out = run(file, "budget=smoke", f"output={folder}", "workers=1")
    assert status == 0, out
    assert "Does the concat branch matter?" in out and "4 runs, 0 of them done" in out
    costs = json.loads((folder / "cost.json").read_text())
    assert costs["with it"]["parameters"] > costs["without"]["parameters"] > 1e6
    assert costs["with it"]["time_ratio"] == 1.0

    for variant in ("with_it", "without"):
        for place in (folder / variant / "untrained", folder / variant / "trained" / "seed0"):
            shown = json.loads((place / measure.CLIPS).read_text())
            assert Image.open(place / shown[0]["file"]).n_frames == 8 and shown[0]["caption"]
            assert (place / "scores.json").is_file() and (place / "index.html").is_file()
    trained = folder / "without" / "trained" / "seed0"
    stored = json.loads((trained / "train" / "weights" / "settings.json").read_text())["settings"]
    assert stored["use"]["concat"] is False

    with (folder / "results.csv").open() as rows:
        table = {(r["variant"], r["measure"], r["name"]): r["value"] for r in csv.DictReader(rows)}
    scores = json.loads((folder / "with_it" / "untrained" / "scores.json").read_text())
    assert float(table["with it", "untrained", "first_frame_psnr"]) == scores["first_frame_psnr"]
    page = (folder / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 3 + 4 and "http" not in page.replace("http-equiv", "")
    assert Image.open(folder / "loss.png").width > 300
    table_before = (folder / "results.csv").read_text().splitlines()

    # A result of other code is named, and taken or measured again only if the user says so.
    old = folder / "with_it" / "untrained"
    then = json.loads((old / measure.CODE).read_text())
    (old / measure.CODE).write_text(json.dumps({**then, "i2vgen/model/unet.py": "00000000"}))
    words = (file, "budget=smoke", f"output={folder}", "workers=1")
    status, out = run(*words)
    changed = f"1 of 4 results are stale, made before a change of i2vgen/model/unet.py: {old};"
    assert status == 2 and changed in out and "stale=again" in out and "stale=keep" in out
    status, out = run(*words, "measures=untrained", "stale=keep")
    assert status == 0 and "note: 1 of 2 results are stale" in out and "2 runs, 2 of them done" in out
    assert "1 of 2 results are stale" in (folder / "table.md").read_text()
    assert ",cost," not in (folder / "results.csv").read_text()

    # After an interruption, finished runs are kept, the others repeated, and the answer is the same.
    kept = folder / "with_it" / "trained" / "seed0" / measure.RESULT
    stamp = kept.stat().st_mtime_ns
    (folder / "without" / "untrained" / measure.RESULT).unlink()
    status, out = run(*words, "stale=again")
    assert status == 0 and "4 runs, 2 of them done" in out
    assert kept.stat().st_mtime_ns == stamp and "stale" not in (folder / "table.md").read_text()
    again = (folder / "results.csv").read_text().splitlines()
    assert [r for r in again if ",cost," not in r] == [r for r in table_before if ",cost," not in r]
    assert json.loads((old / measure.CODE).read_text()) == then
    (old / measure.CODE).unlink()
    status, out = run(*words)
    assert status == 2 and "unknown files, since an earlier version began the run" in out
    (old / measure.CODE).write_text(json.dumps(then))

    status, out = run(study_file(SMALL.replace("use.concat=false", "use.fps=false")), "budget=smoke",
                      f"output={folder}")  # fmt: skip
    assert status == 2 and "result of another study" in out


def test_code_that_changed_during_a_training_counts_too(study_file, tmp_path):
    run = studies.runs(studies.read(study_file()), studies.BUDGETS["smoke"], tmp_path)[-1]
    assert not measure.begun(run) and measure.changed_code(run) == []
    place = run.folder / "train" / "checkpoint-00000001"
    place.mkdir(parents=True)
    (place / "state.safetensors").write_bytes(b"x")
    (place / "state.json").write_text('{"bytes": 1}')
    assert measure.begun(run) and "unknown files" in measure.changed_code(run)[0]
    (run.folder / measure.CODE).write_text(json.dumps(studies.code()))
    assert measure.changed_code(run) == []


def test_a_base_that_was_trained_again_is_another_base(study_file, tmp_path):
    shutil.copytree(studies.read(study_file()).weights, tmp_path / "base")
    study = studies.read(study_file(SMALL + f"weights: {tmp_path / 'base'}\n"))
    run, budget = studies.runs(study, studies.BUDGETS["smoke"], tmp_path)[0], studies.BUDGETS["smoke"]
    before = studies.identity(study, run, budget)
    assert studies.identity(study, run, budget) == before
    held = bytearray((tmp_path / "base" / "unet.safetensors").read_bytes())
    held[-1000:] = bytes(1000)
    (tmp_path / "base" / "unet.safetensors").write_bytes(held)
    assert studies.identity(study, run, budget) != before


# --- processes


def test_two_studies_do_not_share_a_folder(run, study_file, tmp_path):
    hold = (
        f"from i2vgen.files.lock import locked\nwith locked({str(tmp_path)!r}): print(1, flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", hold], cwd=ROOT, stdin=-1, stdout=-1) as other:
        assert other.stdout.readline()
        status, out = run(study_file(), f"output={tmp_path}", "budget=smoke")
        assert status == 2 and f"process {other.pid} on" in out and f"is working in {tmp_path}" in out
        other.kill()
    with lock.locked(tmp_path):  # the lock went with its process
        pass


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="lists a process's children")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_study_that_is_killed_leaves_no_worker(number, study_file, tmp_path):
    file = study_file(SMALL.replace("[cost, untrained, trained]", "[untrained]"))
    words = ["scripts/ablate.py", file, f"output={tmp_path / 'out'}", "workers=2", "budget=full"]
    env = {**os.environ, "PYTHONPATH": PATHS}
    study = subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=env,
        stdout=-1,
        stderr=-1,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a shell's background jobs ignore it
    )
    try:
        wait_for(lambda: len(workers_of(study.pid)) >= 2, study)
        workers = workers_of(study.pid)
        study.send_signal(number)
        assert study.wait(timeout=60) == (-9 if number == signal.SIGKILL else 130)
        wait_for(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in workers))
    finally:
        study.kill()
        study.communicate()


class Forgetful(contextlib.AbstractContextManager):
    """A pool that loses its workers while it is given a second run, of which it never says anything"""

    def __init__(self, *given, **named):
        self.futures = []

    def __exit__(self, *raised):
        pass

    def submit(self, *given):
        self.futures.append(Future())
        if len(self.futures) == 2:
            self.futures[0].set_exception(BrokenProcessPool("gone"))
        return self.futures[-1]


def test_a_run_that_a_broken_pool_forgets_is_not_waited_for(run, study_file, tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "ProcessPoolExecutor", Forgetful)
    file = study_file(SMALL.replace("[cost, untrained, trained]", "[untrained]"))
    status, out = run(file, f"output={tmp_path / 'out'}", "budget=smoke", "workers=2")
    assert status == 2 and "a worker was killed" in out


PREFETCHING = """
from i2vgen.training import data
from i2vgen.training.settings import Bucket, load_settings
source = data.World(*load_settings(None, ["sample.width=64", "sample.height=64", "train.part=vae"]))
with data.Prefetcher(source, lambda index: (Bucket(2, 16, 1), [index]), workers=1) as draw:
    draw(0)
    print(1, flush=True)
    input()
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="lists a process's children")
def test_a_training_that_is_killed_leaves_no_worker():
    with subprocess.Popen([sys.executable, "-c", PREFETCHING], cwd=ROOT, stdin=-1, stdout=-1) as training:
        assert training.stdout.readline()
        workers = workers_of(training.pid)
        training.kill()
    assert workers
    wait_for(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in workers))


def workers_of(pid):
    """Process ids of the workers, without multiprocessing's resource tracker."""
    lists = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]  # one per thread
    children = " ".join(lists).split()
    return [c for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]


def wait_for(true, process=None, seconds=90):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end and (process is None or process.poll() is None)
        time.sleep(0.1)


# --- on clips of one's own


def clips_of(folder, count, first=0):
    """Short clips of the drawn world with captions, as somebody's own."""
    folder.mkdir()
    rows = ["file,caption"]
    for seed in range(first, first + count):
        clip = drawing.clip(seed, width=32, height=32, frames=8, kind="basic")
        video.save(clip.frames, folder / f"{seed}.mp4", fps=8, quality=10)
        rows.append(f'{seed}.mp4,"{clip.caption}"')
    (folder / "captions.csv").write_text("\n".join(rows))
    return folder


OWN = """# Do adapters learn my clips?
measures: [untrained, trained]
variants:
  rank 2: [train.lora_rank=2]
  rank 4: [train.lora_rank=4]
  without local tokens: [use.local_tokens=false, train.lora_rank=2]
start: weights
train: {learning_rate: 0.001, data: DATA}
evaluate: {videos: HELD}
"""


def test_a_study_on_ones_own_clips(run, study_file, tmp_path, monkeypatch):
    held, seen = clips_of(tmp_path / "held", 3), clips_of(tmp_path / "seen", 4, first=10)
    file = study_file(OWN.replace("DATA", str(seen)).replace("HELD", str(held)))
    monkeypatch.setitem(studies.BUDGETS, "smoke", dataclasses.replace(studies.BUDGETS["smoke"], clips=3))
    study, folder = studies.read(file), tmp_path / "out"
    assert study.scores == ("first_frame_psnr", "reference_psnr", "reference_ssim", "flicker", "frame_change")
    todo = studies.runs(study, studies.BUDGETS["smoke"], folder)
    # A variant that only trains otherwise has the base's untrained weights.
    assert [r.variant for r in todo if r.measure == "untrained"] == ["rank 2", "without local tokens"]
    for one in todo:
        measure.perform(study, one, studies.BUDGETS["smoke"], "cpu")
    page = report.write(study, todo, None, folder, "smoke").read_text()
    told = json.loads((folder / "rank_2" / "untrained" / measure.RESULT).read_text())
    assert len({clip["caption"] for clip in told["clips"]}) == 3
    assert all(5 < clip["reference_psnr"] < 60 for clip in told["clips"])
    mean = sum(clip["reference_psnr"] for clip in told["clips"]) / 3
    low, high = told["intervals"]["reference_psnr"]
    assert told["scores"]["reference_psnr"] == pytest.approx(mean) and low < mean < high
    for words in ("clip by clip (untrained)", str(held), "train.lora_rank=4", told["clips"][0]["caption"]):
        assert words in page.replace("&#39;", "'"), words
    paired = report.differences(study, report.read_results(todo), "untrained")["without local tokens"]
    other = json.loads((folder / "without_local_tokens" / "untrained" / measure.RESULT).read_text())
    each = [b["flicker"] - a["flicker"] for a, b in zip(told["clips"], other["clips"], strict=True)]
    assert paired["flicker"].value == pytest.approx(sum(each) / 3)
    # The same clips of other content are another study.
    shutil.rmtree(held)
    clips_of(held, 3, first=50)
    with pytest.raises(ValueError, match="result of another study"):
        measure.finished(study, todo[0], studies.BUDGETS["smoke"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("evaluate: {videos: HELD}\n", ""), r"scores on the drawn world say nothing"),
        (("HELD", "DATA"), r"share files; give held-out clips a folder of their own"),
        (("{videos: HELD}", "{clips: HELD}"), r"evaluate has 'clips'; it takes videos, metrics"),
        (("{videos: HELD}", "{metrics: [flicker]}"), r"evaluate needs videos: FOLDER"),
        (("{videos: HELD}", "{videos: HELD, metrics: [fvd]}"), r"fvd needs fvd_network="),
        (("{videos: HELD}", "{videos: HELD, metrics: [taste]}"), r"there is no metric taste"),
        (("start: weights", "start: weights\nscores: [clip_psnr]"), r"there is no score 'clip_psnr'"),
        (("start: weights", "start: weights\nscores: [sharpness]"), r"evaluate: metrics does not measure"),
    ],
)
def test_studies_on_ones_own_clips_are_checked(study_file, tmp_path, change, message):
    held, seen = clips_of(tmp_path / "held", 1), clips_of(tmp_path / "seen", 1, first=10)
    text = OWN.replace(*change).replace("DATA", str(seen)).replace("HELD", str(held))
    with pytest.raises(ValueError, match=message):
        studies.read(study_file(text))


def test_copies_of_clips_trained_on_are_not_scored(study_file, tmp_path):
    held, seen = clips_of(tmp_path / "held", 2), clips_of(tmp_path / "seen", 2, first=10)
    file, *_ = sorted(seen.glob("*.mp4"))
    shutil.copy(file, sorted(held.glob("*.mp4"))[1])
    text = OWN.replace("DATA", str(seen)).replace("HELD", str(held))
    with pytest.raises(ValueError, match=rf"holds 1 of the clips of .* is {file.name}, byte for byte"):
        studies.read(study_file(text))


def test_a_folder_without_clips_to_score_is_refused_before_any_run(run, study_file, tmp_path):
    held, seen = clips_of(tmp_path / "held", 1), clips_of(tmp_path / "seen", 1, first=10)
    for file in held.glob("*.mp4"):
        file.write_bytes(b"no clip")
    file = study_file(OWN.replace("DATA", str(seen)).replace("HELD", str(held)))
    status, out = run(file, "budget=smoke", f"output={tmp_path / 'out'}")
    assert status == 2 and "evaluate: videos: " in out and not (tmp_path / "out" / "rank_2").exists()
