"""Training with train.shard=full on several processes equals training on one."""

import dataclasses
import os
import pickle
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from test_training import SMALLER
from torch import nn

from i2vgen.files import checkpoint
from i2vgen.settings.config import RANDOM
from i2vgen.training import data, loop, optimisers, shards
from i2vgen.training.settings import Train, load_settings

# Few blocks, because each is a dozen messages a step.
FEWER = [
    *SMALLER, "unet.width_multipliers=[1]", "unet.attention_levels=[false]", "unet.blocks_per_level=1",
    "unet.head_width=8", "clip.text.layers=2",
]  # fmt: skip
WORDS = [
    "device=cpu", "train.warmup=1", "train.bucket_batch=[]", "train.frame_lengths=[]", "train.sample_fps=[]",
    "train.batch=1", "train.log_every=1", "train.precision=float32", "train.sample_every=0", "train.steps=20",
    "train.save_every=10",
]  # fmt: skip
FULL = "train.shard=full"


@pytest.fixture(scope="module")
def parts(root, tmp_path_factory):
    """A weights folder with a random VAE and CLIP."""
    config, _ = load_settings(root / "configs/train/tiny_vae.yaml", ["device=cpu", *FEWER])
    drawn = dataclasses.replace(config, weights=RANDOM)
    held = {p: checkpoint.load(p, drawn, device="cpu", dtype=torch.float32) for p in ("vae", "clip")}
    return checkpoint.save(tmp_path_factory.mktemp("parts") / "parts", held, config)


@pytest.fixture(scope="module")
def settings(root, parts):
    file = root / "configs/train/tiny_diffusion.yaml"
    return lambda *words: load_settings(file, [f"weights={parts}", *WORDS, *words])


@pytest.fixture(scope="module")
def one(settings, tmp_path_factory):
    """20 steps of float64 in this process -> the folder, the log, what the process holds"""
    folder = tmp_path_factory.mktemp("one") / "run"
    return folder, *processes.fit(0, 1, *settings("train.accumulate=4"), folder, double=True)


NEEDS_CPUS = "train.shard=full works on CPUs from PyTorch 2.7"


@pytest.fixture(scope="module")
def four(settings, tmp_path_factory):
    """The same on four processes, and a few steps on two copies of two shards; what each rank tells"""
    if not shards.CPUS:
        pytest.skip(NEEDS_CPUS)
    folder = tmp_path_factory.mktemp("four")
    copies = settings(
        FULL, "train.replicas=2", "train.moments=eight_bit", "train.steps=3", "train.sample_every=3",
        "train.validate=world", "train.validate_clips=3", "train.validate_every=2",
    )  # fmt: skip
    jobs = [
        ("double", *settings(FULL), folder / "double", True),
        ("copies", *copies, folder / "copies", False),
    ]
    return folder, processes.launch(4, processes.work, 4, jobs)


@pytest.fixture(scope="module")
def two(settings, one, four, tmp_path_factory):
    """Two processes resume what four, and what one, had done in 10 steps."""
    folder = tmp_path_factory.mktemp("two")
    for name, run in (("from_four", four[0] / "double"), ("from_one", one[0])):
        half(run, folder / name)
    shared = settings(FULL, "train.accumulate=2")
    jobs = [(name, *shared, folder / name, True) for name in ("from_four", "from_one")]
    few = [FULL, "train.accumulate=2", "train.steps=4"]
    jobs.append(("float32", *settings(*few), folder / "float32", False))
    return folder, processes.launch(2, processes.work, 2, jobs)


def half(run, folder):
    """A copy of a run as it was after 10 steps."""
    shutil.copytree(
        run, folder, ignore=shutil.ignore_patterns("checkpoint-00000020", "weights", "tensorboard")
    )


def equal(log, other, tolerance):
    assert len(log) == len(other) > 0
    for a, b in zip(log, other, strict=True):
        assert a == pytest.approx(b, rel=tolerance)


def test_four_processes_equal_one(one, four):
    equal(four[1][0]["double"][0], one[1], 1e-9)


def test_each_process_holds_its_share(one, four):
    whole = one[2]
    for found in four[1]:
        for run, n in (("double", 4), ("copies", 2)):
            for kind, count in found[run][1].items():
                if run == "double" or kind != "moments":  # those of copies have scales beside them
                    assert count == pytest.approx(whole[kind] / n, rel=0.05)


def test_weights_and_checkpoints_are_whole(one, four):
    folder = four[0] / "double"
    a, b = (load_file(run / "weights/unet.safetensors") for run in (one[0], folder))
    assert a.keys() == b.keys()
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=1e-9, atol=1e-12), name
    assert [path.name for path in loop.checkpoints(folder)] == ["checkpoint-00000010", "checkpoint-00000020"]
    assert not list(folder.glob(".*"))


def test_copies_of_shards_stay_alike_validate_and_sample(four):
    folder, log = four[0] / "copies", four[1][0]["copies"][0]
    found = [line["validation_loss"] for line in log if "validation_loss" in line]
    assert len(found) == 2 and all(map(np.isfinite, found))
    assert checkpoint.missing_parts(folder / "best") == []
    assert (folder / "samples/00000003.png").is_file()
    assert all(np.isfinite(line["loss"]) for line in log if "loss" in line)
    assert checkpoint.missing_parts(folder / "weights") == []


@pytest.mark.parametrize("start", ["from_four", "from_one"])
def test_two_processes_go_on_from_any_number(one, two, start):
    equal(two[1][0][start][0], one[1], 1e-9)


def test_float32_equals_within_rounding(settings, two, tmp_path):
    job = settings("train.accumulate=4", "train.steps=4")
    log, _ = processes.fit(0, 1, *job, tmp_path / "run", double=False)
    equal(two[1][0]["float32"][0], log, 1e-4)


@pytest.mark.slow  # compiling
@pytest.mark.parametrize("shard", ["full", "none"])
def test_compiled_blocks_train_as_plain_ones(settings, tmp_path, shard):
    if shard == "full" and not shards.CPUS:
        pytest.skip(NEEDS_CPUS)
    words = [f"train.shard={shard}", "train.accumulate=2", "train.steps=3"]
    jobs = [(on, *settings(*words, f"train.compile={on}"), tmp_path / on, True) for on in ("true", "false")]
    first, second = processes.launch(2, processes.work, 2, jobs, "aot_eager")
    assert first["graphs"] > 3 and second["graphs"] > 3
    equal(first["true"][0], first["false"][0], 1e-9)


def test_one_process_goes_on_from_shards(settings, one, four, tmp_path):
    half(four[0] / "double", tmp_path / "run")
    log, _ = processes.fit(0, 1, *settings("train.accumulate=4"), tmp_path / "run", double=True)
    equal(log, one[1], 1e-9)


def test_a_damaged_sharded_checkpoint_is_not_used(four, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(four[0] / "double", run)
    piece = run / "checkpoint-00000020/__3_0.distcp"
    piece.write_bytes(piece.read_bytes()[:-100])
    assert [path.name for path in loop.checkpoints(run)] == ["checkpoint-00000010"]


@pytest.mark.skipif(not shards.CPUS, reason=NEEDS_CPUS)
class Command:
    """What a pickle of it would run."""

    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(Command()), r"names \w+\.system, which describes no tensor"),
        (pickle.dumps(Path("x"))[:-2], "damaged"),
        (b"", "damaged"),
    ],
)
def test_reading_a_sharded_checkpoint_runs_no_code(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    tensors = {"a": torch.randn(3, 4), "steps": torch.tensor(7)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter("checkpoint"))
    again = {name: torch.zeros_like(t) for name, t in tensors.items()}
    shards.load(Path("checkpoint"), again)
    assert all(torch.equal(again[name], t) for name, t in tensors.items())
    Path("checkpoint", shards.METADATA).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        shards.stored_names(Path("checkpoint"))
    assert not Path("executed").exists()


def test_the_death_of_one_process_ends_all(root, parts, tmp_path):
    words = [str(root / "configs/train/tiny_diffusion.yaml"), f"weights={parts}", *WORDS, FULL]
    words.append(f"output={tmp_path / 'run'}")
    status, said = processes.launch(2, processes.train, words, (1, 2), dies=1)[0]
    assert status == 2
    assert re.search(r"process 0 of 2 stops, because another one ended .* same command resumes", said)


# --- without other processes


def test_a_new_network_is_drawn_as_it_would_be_whole(settings):
    config, _ = settings()
    torch.manual_seed(7)
    wanted = checkpoint.construct("unet", config).state_dict()
    recorder = shards.Recorder()
    with recorder, torch.device("meta"):
        unet = checkpoint.construct("unet", config)
    drawn = dict(recorder.replay(unet, 7))
    assert drawn.keys() == wanted.keys()
    assert all(torch.equal(drawn[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.lora_rank=4"], r"shard=full does not go with train\.lora_rank=4: adapters are small"),
        (["train.text_encoder=true"], r"shard=full does not go with train\.text_encoder=True"),
        (["train.shard=none", "train.replicas=2"], r"train\.replicas = 2 needs train\.shard=full"),
        (["train.frozen=bf16"], r"train\.frozen = bf16 is for a UNet under adapters"),
        (["train.ema=0", "train.ema_every=4"], r"train\.ema_every = 4 is for the average"),
    ],
)
def test_impossible_settings_are_refused(settings, words, message):
    with pytest.raises(ValueError, match=message):
        settings(FULL, *words)


@pytest.mark.parametrize(
    ("replicas", "ranks", "message"),
    [
        (1, 1, r"there is one; start several with torchrun"),
        (3, 8, r"train\.replicas = 3 does not divide 8 processes .* give one of 1, 2, 4"),
        (8, 8, r"groups of two or more"),
    ],
)
def test_a_number_of_processes_that_does_not_fit_is_refused(replicas, ranks, message):
    with pytest.raises(ValueError, match=message):
        shards.check(Train(shard="full", replicas=replicas), ranks)
    shards.check(Train(replicas=1), ranks)


def test_fewer_clips_than_processes_are_refused(settings):
    config, train = settings("train.num_clips=3")
    source = data.open_source(config, train)
    data.refuse_too_few(source, train, 3)
    with pytest.raises(ValueError, match="gives 3 clips to 4 processes"):
        data.refuse_too_few(source, train, 4)


# --- lean moments and averages


def quadratic(moments, steps=300):
    """The loss after minimising a badly scaled quadratic, and the optimiser's state of its weight"""
    torch.manual_seed(0)
    scale = torch.logspace(-2, 0, 64)
    weight = nn.Parameter(torch.randn(32, 64))
    optimiser = optimisers.make(
        Train(moments=moments, learning_rate=0.02), [{"params": [weight]}], weight.device
    )
    for _ in range(steps):
        loss = (weight * scale).square().sum()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return loss.item(), optimiser.state[weight]


def test_lean_moments_learn_as_well():
    plain, _ = quadratic("float32")
    for moments, size in (("bfloat16", 2), ("eight_bit", 1)):
        found, state = quadratic(moments)
        assert found < 1.3 * plain
        assert [state[key].element_size() for key in ("exp_avg", "exp_avg_root")] == [size] * 2


@pytest.mark.parametrize("moments", ["bfloat16", "eight_bit"])
def test_rounding_is_right_on_average(moments):
    dtype = {"bfloat16": torch.bfloat16, "eight_bit": torch.float8_e4m3fn}[moments]
    torch.manual_seed(0)
    x = torch.tensor([1.003, -0.77, 3.3]).repeat(20_000, 1)
    y = optimisers.rounded(x, dtype).float()
    assert torch.allclose(y.mean(0), x[0], rtol=2e-3)
    assert len(y[:, 0].unique()) == 2


def test_a_run_with_lean_moments_resumes_bit_identically(settings, tmp_path):
    words = ["train.moments=eight_bit", "train.ema_device=cpu", "train.ema_every=3", "train.steps=8"]
    job = settings(*words, "train.save_every=4")
    processes.fit(0, 1, *job, tmp_path / "whole", double=False)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for name in ("checkpoint-00000008", "weights"):
        shutil.rmtree(tmp_path / "cut" / name)
    processes.fit(0, 1, *job, tmp_path / "cut", double=False)
    for name in ("log.jsonl", "weights/unet.safetensors", "checkpoint-00000008/state.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes(), name


def test_another_kind_of_moments_cannot_resume(settings, one, tmp_path):
    config, train = settings("train.accumulate=4", "train.moments=bfloat16")
    with pytest.raises(
        ValueError, match=r"train\.moments is bfloat16 here but float32 in .*; choose another output$"
    ):
        loop.open_folder(one[0], config, train, resume=True)


def test_an_average_of_every_few_updates_moves_as_far(settings):
    train = Train(ema=0.9, ema_warmup=False, ema_every=4)
    assert loop.decay_since_last(train, 4) == pytest.approx(0.9**4)
    assert loop.decay_since_last(train, 6) == pytest.approx(0.9**2)  # the last update of a run
    assert loop.decay_since_last(dataclasses.replace(train, ema_every=1), 6) == pytest.approx(0.9)
