"""What a training will take, counted: against a real process, by its parts, and where it does not fit."""

import ctypes
import dataclasses
from pathlib import Path

import pytest
import torch

from i2vgen.bench import memory
from i2vgen.fast.checkpointing import CheckpointedBlock, CheckpointedTemporal, set_checkpointing
from i2vgen.files import checkpoint
from i2vgen.memory.plans import GIB
from i2vgen.model.conditioning import Conditions
from i2vgen.model.temporal import TemporalTransformer
from i2vgen.training import optimisers, plans
from i2vgen.training.settings import buckets, load_settings

ROOT = Path(__file__).parents[1]
M_MMAP_THRESHOLD = -3
ON_CPU = plans.Place("cpu", torch.float32)
ON_GPU = plans.Place("cuda", torch.bfloat16)
# Wide enough that the tensors of a step are most of what a process grows by.
WORDS = [
    "device=cpu", "sample.width=64", "sample.height=64", "sample.frames=2", "sample.fps=4",
    "vae.width_multipliers=[1,2]", "unet.base_width=64", "unet.width_multipliers=[1]",
    "unet.attention_levels=[true]", "unet.head_width=32",
    "train.part=diffusion", "train.batch=1", "train.ema=0", "train.precision=float32",
    "train.frame_lengths=[]", "train.sample_fps=[]",
]  # fmt: skip


def settings(*words):
    return load_settings(ROOT / "configs/train/tiny_vae.yaml", [*WORDS, *words])


def growth_of_steps(config, trains):
    """Bytes by which this process grows in a step that is not its first, which makes the moments."""
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)  # what is freed is given back, not kept for later
    return [growth_of_a_step(config, train) for train in trains]


def growth_of_a_step(config, train):
    unet = checkpoint.construct("unet", config).train()
    set_checkpointing(unet, train.checkpointing)
    work = plans.make(config, train, buckets(config, train)[0])
    step = plans.DiffusionLoss(unet, work.step.schedule)
    optimiser = optimisers.make(train, [{"params": list(unet.parameters())}], torch.device("cpu"))
    x0, t, noise, conditions = work.inputs()
    x0, noise, *conditions = (torch.zeros_like(one, device="cpu") for one in (x0, noise, *conditions))

    def update():
        step(x0, t, noise, Conditions(*conditions))["loss"].backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    update()
    return min(memory.growth(update) for _ in range(2))  # what else happens in the process only adds


@pytest.mark.slow  # measures
@pytest.mark.skipif(not memory.measurable(), reason="no /proc/self/status here")
def test_the_count_is_what_a_process_grows_by():
    config, train = settings("train.batch=3")  # so that Python's own objects weigh little
    trains = [train, dataclasses.replace(train, checkpointing=True)]
    ledger = plans.Ledger(config)
    counted = [ledger.estimate(one, ON_CPU).steps["forward and backward"] for one in trains]
    assert counted[1] < 0.5 * counted[0]
    assert memory.in_a_process(growth_of_steps, config, trains) == pytest.approx(counted, rel=0.1)


# --- its parts, by hand


def test_sums_of_what_lies_there():
    config, train = settings("train.ema=0.99")
    ledger, numbers = (
        plans.Ledger(config),
        sum(p.numel() for p in checkpoint.build("unet", config).parameters()),
    )
    found = ledger.estimate(train, ON_GPU)
    kinds = {"weights": 4, "gradients": 0, "moments": 8, "average": 4}
    assert {kind: found.held[kind] for kind in kinds} == {kind: n * numbers for kind, n in kinds.items()}
    assert found.steps["update"] == 4 * numbers

    lean = dataclasses.replace(train, moments="eight_bit", ema_device="cpu")
    found = ledger.estimate(lean, ON_GPU)
    assert (found.held["moments"], found.held["average"], found.on_cpu) == (2 * numbers, 0, 4 * numbers)
    assert ledger.estimate(lean, ON_CPU).held["average"] == 4 * numbers

    prepared = dataclasses.replace(ON_GPU, prepared=True)
    assert ledger.estimate(train, prepared).held["frozen weights"] == 0
    assert ledger.estimate(train, prepared).steps["encoding"] == 0


def test_shards_take_an_nth_of_what_lies_there():
    config, train = settings("train.ema=0.99", "train.shard=full")
    ledger, kinds = plans.Ledger(config), ("weights", "moments", "average")
    whole = ledger.estimate(dataclasses.replace(train, shard="none"), ON_GPU).held
    for ranks, replicas, n in ((2, 1, 2), (8, 1, 8), (8, 2, 4)):
        cut = dataclasses.replace(train, replicas=replicas)
        held = ledger.estimate(cut, dataclasses.replace(ON_GPU, ranks=ranks)).held
        assert [held[kind] for kind in kinds] == [-(-whole[kind] // n) for kind in kinds]


def test_adapters_on_a_frozen_network():
    config, train = settings("train.lora_rank=2")
    half = dataclasses.replace(train, frozen="bf16")
    ledger, numbers = (
        plans.Ledger(config),
        sum(p.numel() for p in checkpoint.build("unet", config).parameters()),
    )
    wide, lean = (ledger.estimate(one, ON_GPU).held["frozen weights"] for one in (train, half))
    assert wide - lean == 2 * numbers


# --- what is done with it


@pytest.mark.parametrize("part", ["vae", "clip", "diffusion"])
def test_every_part_can_be_counted(part, root, recwarn):
    config, train = load_settings(
        root / "configs/train/tiny_vae.yaml", ["train.batch=2", f"train.part={part}"]
    )
    found = plans.Ledger(config).estimate(train, ON_CPU)
    assert found.steps["forward and backward"] > found.steps["update"] / 4
    assert not [warning for warning in recwarn if "not counted" in str(warning.message)]


def test_what_cannot_fit_is_refused_with_what_would():
    config, train = settings()
    ledger = plans.Ledger(config)
    needed = ledger.estimate(train, ON_GPU).total
    lean = ledger.estimate(dataclasses.replace(train, checkpointing=True), ON_GPU).total
    assert plans.refuse(config, train, ON_GPU, needed, ledger).total == needed
    with pytest.raises(ValueError, match=r"train\.checkpointing=true would fit .*check_memory=false"):
        plans.refuse(config, train, ON_GPU, lean, ledger)
    with pytest.raises(
        ValueError, match=r"64 x 64 x 2 with batch 1 .* smaller size or fewer frames, or split it"
    ):
        plans.refuse(config, train, ON_GPU, 2**20, ledger)
    unchecked = dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, check_memory=False))
    plans.refuse(unchecked, train, ON_GPU, 2**20, ledger)


def test_the_command_prints_the_table_and_refuses(root, run_script, monkeypatch, tmp_path):
    tiny = ["train.py", root / "configs/train/tiny_vae.yaml", f"output={tmp_path}"]
    status, said = run_script(*tiny, "--plan")
    assert status == 0 and "| as given |" in said and "forward and backward" in said
    monkeypatch.setattr("i2vgen.commands.train.free_memory", lambda device: 2**20)
    status, said = run_script(*tiny)
    assert status == 2 and "1 MiB are free" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.slow  # counts the released network twice
def test_the_released_network_fits_the_cards_that_the_guide_names():
    config, train = load_settings(None, ["train.batch=1", "train.checkpointing=true"])
    ledger = plans.Ledger(config)
    adapters = dataclasses.replace(train, lora_rank=16, frozen="bf16")
    assert ledger.estimate(adapters, ON_GPU).total < 22 * GIB
    lean = dataclasses.replace(train, moments="eight_bit", ema_device="cpu")
    assert ledger.estimate(lean, ON_GPU).total < 44 * GIB


def test_checkpointing_covers_every_transformer():
    """Of what a step keeps, nothing is left but the inputs of the parts, and what lies outside them."""
    config, train = settings("train.checkpointing=true")
    unet = plans.make(config, train, buckets(config, train)[0]).trained
    checkpointed = (CheckpointedBlock, CheckpointedTemporal)
    outside = [name for name, module in unet.named_modules() if isinstance(module, TemporalTransformer)]
    inside = [n for n in outside if any(isinstance(unet.get_submodule(p), checkpointed) for p in parents(n))]
    assert "temporal_in" in outside and inside == outside
    set_checkpointing(unet, False)
    assert not any(isinstance(module, checkpointed) for module in unet.modules())


def parents(path):
    """a.b.c -> a, a.b, a.b.c"""
    words = path.split(".")
    return [".".join(words[: i + 1]) for i in range(len(words))]
