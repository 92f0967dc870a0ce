"""One clip on several cards, and a list of clips over several: gloo processes on CPUs.

A launch takes seconds, so each makes many comparisons (tests/ranks.py) and the tests read what it found.
"""

import functools
import json
import os
import subprocess
import sys
import warnings

import processes as gloo
import pytest
import ranks as driver
import torch
from conftest import ROOT

from i2vgen import __main__ as door
from i2vgen import pipeline
from i2vgen.bench import split
from i2vgen.fast import parallel, processes
from i2vgen.files import records
from i2vgen.memory import plans
from i2vgen.settings import config as settings
from i2vgen.settings import shipped
from i2vgen.settings.merge import load_config

TOLERANCE = 1e-12
SHAPES = {2: ("frames", "guidance", "auto"), 4: ("frames", "both", "auto")}


def torchrun(lines, cwd):
    """Two processes -> what each said to each command, and the program's own lines of standard error"""
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(ROOT / "tests" / "by_torchrun.py"), "found", json.dumps(lines)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )
    files = [cwd / f"found.{rank}" for rank in range(2)]
    assert all(file.exists() for file in files), done.stderr
    assert done.returncode != 0  # the second breaks down in the end
    own = [line for line in done.stderr.splitlines() if line.startswith(("error:", "note:", "[rank"))]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files], own


@pytest.fixture(scope="module", params=[2, 4])
def found(request):
    """Number of processes of a launch, what each found, what the first said when the last was killed"""
    world = request.param
    killed = world == 2
    work = functools.partial(driver.found, killed=killed)
    every, said = gloo.launch(world, work, dies=world - 1 if killed else None)[0]
    return world, every, said


def test_every_split_gives_the_clip_of_one_process(found):
    world, every, _ = found
    for held in every:
        told = {name: d for name, d in held["differences"].items() if isinstance(d, list)}
        wrong = {name: d for name, d in told.items() if max(d) > TOLERANCE and name != "planted mistake"}
        assert wrong == {}
        assert {f"uneven, {name}" for name in SHAPES[world]} <= told.keys()
        assert "planted mistake" not in told or max(told["planted mistake"]) > 1e-3


def test_what_is_sent_is_what_is_counted(found):
    """On `meta` one process counts what the first of so many sends, and the bench's table rests on that."""
    world, (first, *_), _ = found
    # 7 frames of 24 x 16 pixels, as in tests/ranks.py
    sample = settings.Sample(width=24, height=16, frames=7)
    config = settings.Config(unet=driver.SMALL, vae=driver.VAE, clip=driver.CONDITIONED, sample=sample)
    for name in SHAPES[world]:
        branches = 2 if name in ("guidance", "both", "auto") else 1
        counted = split.count(branches, world // branches, config, torch.float64)
        # Predictions leave the network in its own precision, which is the double one here.
        assert first["differences"][f"sent, {name}"] == counted.sent > 0


NAMES = ("one card", "frames, 2", "both, 4")


def test_the_bench_says_that_its_seconds_are_computed(monkeypatch):
    sample = settings.Sample(width=24, height=16, frames=8)
    config = settings.Config(unet=driver.SMALL, vae=driver.VAE, clip=driver.CONDITIONED, sample=sample)
    monkeypatch.setattr(split, "SPLITS", {name: split.SPLITS[name] for name in NAMES})
    report = split.run(None, config)
    assert "computed, not measured" in str(report.tables[0])
    one, two, both = (report.values[name] for name in NAMES)
    assert one["sent"] == 0 and one["computed_seconds"]["PCIe"] == split.STEP
    assert 0.49 < two["flops"] / one["flops"] < 0.51 and both["sent"] < two["sent"]


def test_what_would_see_a_share_is_refused(found):
    world, (first, *_), _ = found
    if world != 2:
        pytest.skip("once is enough")
    refused = first["refused"]
    assert refused["hook"] == refused["a module of one's own"] == parallel.WHOLE
    assert "no gradients" in refused["gradients"]
    assert "cannot be split over 2 processes" in refused["few frames"]
    assert first["removed"] == ("UNet", "GroupNorm")


# --- commands

MODEL = ["weights=lab", "steps=2", "device=cpu"]
ONE = [*MODEL, f"image={shipped.STAR}", "prompt=a yellow star grows", "seed=1"]
SCORED = [*MODEL, "clips=2", "batch=2"]
LOST = "a-002-seed3.png"


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A list of clips made by one process, and by two in a launch that makes other clips too.

    -> folder of the two, hashes of what the one made, what the two said to each command, and in the end
    """
    folder = tmp_path_factory.mktemp("shared")
    rows = [
        {"image": str(shipped.STAR), "prompt": "a yellow star grows", "seed": [1, 2, 3], "output": "a.png"},
        {"image": str(shipped.STAR), "prompt": "a yellow star moves up", "seed": [4, 5], "output": "b.png"},
    ]
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    words = [*MODEL, "items=items.jsonl", "batch=2"]
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.chdir(folder)
        warnings.simplefilter("ignore")
        assert door.main(["generate", *words]) == 0
        assert door.main(["generate", *ONE, "output=alone.png"]) == 0
        assert door.main(["evaluate", *SCORED, "json=scores"]) == 0
    alone = {path.name: records.sha256(path) for path in folder.glob("*.png")}
    for path in [*folder.glob("*.png"), *folder.glob("*.json")]:
        path.unlink()
    lines = [
        ["generate", *words],
        LOST,
        ["generate", *words, "--resume"],
        ["generate", *ONE, "parallel=frames", "output=frames.png"],
        ["generate", *ONE, "parallel=both", "output=no.png"],
        ["generate", *ONE, "output=no.png", "device=cuda"],
        ["evaluate", *SCORED, "json=shared.json"],
    ]
    said, own = torchrun(lines, folder)
    return folder, alone, list(zip(*said, strict=True)), own


def clips_told(both):
    return sorted(
        line.partition(" (")[0] for _, text in both for line in text.splitlines() if ".png (" in line
    )


def test_processes_share_a_list(told):
    folder, alone, (whole, rest, *_), _ = told
    assert [status for status, _ in whole] == [0, 0]
    names = sorted(set(alone) - {"alone.png"})
    assert clips_told(whole) == names and len(names) == 5  # each once, by whichever made it
    assert {name: records.sha256(folder / name) for name in names} == {name: alone[name] for name in names}
    assert clips_told(rest) == [LOST]
    assert "4 clips already there, 1 to make" in rest[0][1]


def test_processes_share_a_clip(told):
    folder, alone, (_, _, made, *_), _ = told
    (status, first), (other, second) = made
    assert (status, other, second) == (0, 0, "")  # only the first speaks
    assert "2 shares of the frames" in first and "MiB sent by each process per step" in first
    assert clips_told(made) == ["frames.png"]
    assert records.sha256(folder / "frames.png") == alone["alone.png"]


def test_processes_share_an_evaluation(told):
    folder, _, (*_, ((status, first), (other, second))), _ = told
    assert (status, other, second) == (0, 0, "") and "scores in shared.json" in first
    one, two = (json.loads((folder / name).read_text(encoding="utf-8")) for name in ("scores", "shared.json"))
    for report in (one, two):
        del report["seconds"], report["settings"]["batch"]
    assert one == two


@pytest.mark.parametrize(
    ("place", "line"), [(3, "parallel=both uses an even number"), (4, "sees 0 CUDA devices")]
)
def test_an_error_of_all_is_told_once(told, place, line):
    folder, _, said, _ = told
    texts = [text for _, text in said[place]]
    assert [status for status, _ in said[place]] == [2, 2]
    assert sum(text.count("error:") for text in texts) == 1 and line in "".join(texts)
    assert not (folder / "no.png").exists()


def test_a_process_that_fails_ends_all_with_its_line(told):
    folder, *_, own = told
    assert own == ["error: latents are not finite after step 1 (rank 1 of 2)"]
    assert not (folder / "never.gif").exists()


def test_a_process_that_is_killed_ends_all_with_one_line(found):
    world, _, said = found
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    assert world == 4 or (len(errors) == 1 and "another process of this run has ended" in errors[0])


# --- what is refused before anything is loaded


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["parallel=frames", "compile=true"], "runtime.compile=True"),
        (["parallel=auto", "offload=parts"], "runtime.offload=parts"),
        (["parallel=auto", "memory=low"], "runtime.memory=low"),
        (["parallel=frames", "weight_storage=int8"], "runtime.weight_storage=int8"),
        (["parallel=frames", "deep_cache=3"], "sample.deep_cache"),
        (["parallel=frames", "refine_weights=random"], "refine_weights"),
    ],
)
def test_what_cannot_be_split_is_named(words, line):
    with pytest.raises(ValueError, match=line):
        load_config(None, words)


@pytest.mark.parametrize(
    ("words", "world", "line"),
    [
        (["parallel=frames"], 1, "start them with torchrun"),
        (["parallel=guidance", "guidance=1"], 2, "sample.guidance=1 has one"),
        (["parallel=guidance"], 4, "uses 2 processes"),
        (["parallel=both"], 2, "use parallel=guidance"),
        (["parallel=both"], 5, "use parallel=frames"),
        (["parallel=frames", "frames=3"], 4, "sample.frames is 3"),
        (["parallel=frames", "width=64", "height=64"], 2, "1 positions on the UNet's coarsest level"),
    ],
)
def test_a_number_of_processes_that_cannot_be_used(words, world, line):
    with pytest.raises(ValueError, match=line):
        parallel.arrangement(load_config(None, words), world)


@pytest.mark.parametrize(
    ("words", "world", "split_into"),
    [
        (["parallel=auto"], 2, (2, 1)),
        (["parallel=auto"], 8, (2, 4)),
        (["parallel=auto"], 3, (1, 3)),
        (["parallel=auto", "guidance=1"], 4, (1, 4)),
        (["parallel=frames"], 4, (1, 4)),
    ],
)
def test_what_auto_takes(words, world, split_into):
    assert parallel.arrangement(load_config(None, words), world) == split_into


def test_loading_without_torchrun_says_what_to_do():
    with pytest.raises(ValueError, match="torchrun --nproc-per-node"):
        pipeline.load("lab", parallel="frames", device="cpu")


def test_a_process_without_a_device(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)

    def own(device, local, world=4):
        config = load_config(None, [f"device={device}"])
        return processes.own_device(config, local, world).runtime.device

    with pytest.raises(ValueError, match=r"process 3 on this machine has no device: PyTorch sees 2 here"):
        own("cuda", 2)
    with pytest.raises(ValueError, match="write device=cuda"):
        own("cuda:1", 0)
    assert (own("cuda", 1), own("cuda:1", 0, world=1), own("cpu", 3)) == ("cuda:1", "cuda:1", "cpu")
    assert chosen == [1]


def test_a_split_model_cannot_be_moved():
    config = load_config(None, ["device=cpu", "parallel=frames", "frames=5"])
    plan = plans.Plan(config, config.runtime)
    with pytest.raises(ValueError, match=r"runtime\.parallel=frames cannot be moved"):
        plan.moved(config, config.runtime, {})


def test_each_process_is_planned_for_its_share():
    file = ROOT / "configs" / "tiny.yaml"
    config = load_config(file, ["device=cpu", "parallel=frames", "width=512", "height=256"], weights="random")
    ledger = plans.Ledger(config)
    totals = [plans.choose(config, 2**50, ledger, shares=n)[1].moments[2].activations for n in (1, 2, 4)]
    assert totals[0] > 1.7 * totals[1] > 2.4 * totals[2]
    with pytest.raises(ValueError, match="of which each process computes 2 frames"):
        plans.choose(config, 2**20, ledger, shares=4)
