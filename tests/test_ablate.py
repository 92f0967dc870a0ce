"""Studies: errors, numbers and error bars, and a whole study from the command line."""

import csv
import dataclasses
import functools
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from i2vgen.lab import measure, report
from i2vgen.lab import study as studies
from i2vgen.lab.report import Cell
from i2vgen.lab.study import Run

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
def run(run_script):
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
        (("use.concat=false", "train.lora_rank=2"), "'without': train.lora_rank adapts a trained UNet"),
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
    assert "without in clip, PSNR" in said and "this run shows none" not in said
    assert report.as_text("clip_psnr", Cell(25, 24, 26), Cell(20, 19, 21)).endswith("*")


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
    assert Image.open(report.plots(study, results(40, 9), None, tmp_path)[0]).width > 200
    report.write_csv(study, results(40, 9), None, tmp_path / "r.csv")
    assert "without,untrained,calls,9,,," in (tmp_path / "r.csv").read_text()
    # If all are equal, the column is left out.
    assert report.score_tables(study, results(40, 40))[0][0].header[1] == "clip, PSNR"
    assert report.plots(study, results(40, 40), None, tmp_path) == []


# --- a whole study


def test_a_study_from_the_command_line(run, study_file, tmp_path):
    file, folder = study_file(), tmp_path / "out"
    status, out = run(file, "budget=smoke", f"output={folder}", "workers=1")
    assert status == 0, out
    assert "Does the concat branch matter?" in out and "4 runs, of which 0 are done" in out
    costs = json.loads((folder / "cost.json").read_text())
    assert costs["with it"]["parameters"] > costs["without"]["parameters"] > 1e6
    assert costs["with it"]["time_ratio"] == 1.0

    for variant in ("with_it", "without"):
        for place in (folder / variant / "untrained", folder / variant / "trained" / "seed0"):
            assert Image.open(place / measure.STRIP).height > 90
            assert (place / "scores.json").is_file() and (place / "index.html").is_file()
    trained = folder / "without" / "trained" / "seed0"
    stored = json.loads((trained / "train" / "weights" / "settings.json").read_text())["settings"]
    assert stored["use"]["concat"] is False

    with (folder / "results.csv").open() as rows:
        table = {(r["variant"], r["measure"], r["name"]): r["value"] for r in csv.DictReader(rows)}
    scores = json.loads((folder / "with_it" / "untrained" / "scores.json").read_text())
    assert float(table["with it", "untrained", "first_frame_psnr"]) == scores["first_frame_psnr"]
    page = (folder / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 2 + 4 and "http" not in page.replace("http-equiv", "")
    assert Image.open(folder / "loss.png").width > 300

    # After an interruption, finished runs are kept, the others repeated, and the answer is the same.
    table_before = (folder / "results.csv").read_text().splitlines()
    kept = folder / "with_it" / "untrained" / measure.RESULT
    stamp = kept.stat().st_mtime_ns
    (folder / "without" / "untrained" / measure.RESULT).unlink()
    status, out = run(file, "budget=smoke", f"output={folder}", "workers=1")
    assert status == 0 and "4 runs, of which 3 are done" in out
    assert kept.stat().st_mtime_ns == stamp
    again = (folder / "results.csv").read_text().splitlines()
    assert [r for r in again if ",cost," not in r] == [r for r in table_before if ",cost," not in r]

    status, out = run(file, "budget=smoke", f"output={folder}", "measures=untrained")
    assert (
        status == 0
        and "2 runs, of which 2 are done" in out
        and ",cost," not in (folder / "results.csv").read_text()
    )

    status, out = run(study_file(SMALL.replace("use.concat=false", "use.fps=false")), "budget=smoke",
                      f"output={folder}")  # fmt: skip
    assert status == 2 and "result of another study" in out
