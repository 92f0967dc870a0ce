"""`train.compile`: compiled blocks train as plain ones do, under the same names, or say why they cannot."""

import dataclasses
import itertools

import pytest
import torch
from conftest import SMALL
from test_prepare import RUN, log, run  # noqa: F401 (a fixture)

from i2vgen.adapt import lora
from i2vgen.fast import compiled
from i2vgen.fast.checkpointing import set_checkpointing
from i2vgen.files import checkpoint
from i2vgen.model.unet import UNet
from i2vgen.settings import config
from i2vgen.settings.config import LAB
from i2vgen.settings.merge import load_config

CPU = torch.device("cpu")
# Few kinds of blocks, with and without attention: each takes seconds to compile.
ONE_LEVEL = dataclasses.replace(SMALL, width_multipliers=(1,), attention_levels=(False,))


@pytest.fixture
def compiling(monkeypatch):
    """compiling(backend): what compiles from now on"""
    right, settings = torch.compile, torch._dynamo.config
    names = ("cache_size_limit", "accumulated_cache_size_limit", "optimize_ddp")
    before = {name: getattr(settings, name) for name in names}
    torch._dynamo.reset()

    def choose(backend):
        monkeypatch.setattr(torch, "compile", lambda f, **how: right(f, backend=backend, **how))

    yield choose
    torch._dynamo.reset()
    compiled._training_code.cache_clear()
    for name, value in before.items():
        setattr(settings, name, value)


def gradients(unet, inputs, trained):
    """-> loss and gradients, without dropout, for which a compiler draws other numbers"""
    x, t, conditions = inputs
    trained.zero_grad()
    for module in unet.modules():
        module.train(not isinstance(module, torch.nn.Dropout))
    loss = unet(x, t, unet.prepare(conditions, x.shape[2])).square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in trained.parameters() if p.grad is not None)]


def compare(unet, inputs, trained, backend, compiling):
    wanted, names = gradients(unet, inputs, trained), list(unet.state_dict())
    compiling(backend)
    compiled.compile_training(unet, 1, CPU)
    kinds = {type(block) for block in unet.blocks()}
    assert kinds <= {compiled.TrainedBlock, compiled.CheckpointedTrainedBlock}
    calls = []
    for block in unet.blocks():
        block.register_forward_hook(lambda *_: calls.append(1))  # a hook on a block itself is called
    torch.testing.assert_close(gradients(unet, inputs, trained), wanted, rtol=1e-10, atol=1e-12)
    assert list(unet.state_dict()) == names and len(calls) == len(list(unet.blocks()))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch.no_grad():  # validation and samples run as usual
        unet.eval()(inputs[0], inputs[1], unet.prepare(inputs[2], inputs[0].shape[2]))
    gradients(unet, inputs, trained)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == made


@pytest.mark.parametrize(
    "way", ["plain", *(pytest.param(way, marks=pytest.mark.slow) for way in ("checkpointing", "adapters"))]
)
def test_losses_and_gradients_are_those_of_plain_blocks(make_inputs, compiling, way):
    unet = UNet(ONE_LEVEL, config.Use()).double()
    for name, parameter in unet.named_parameters():  # branches that end in zeros would hide what is inside
        torch.nn.init.normal_(parameter, std=0.05 + (name.endswith("norm.weight")))
    trained = unet
    if way == "adapters":
        trained = lora.attach(unet.requires_grad_(False), ["*attention*.to_*"], rank=2)
        for part in trained.parts.values():
            torch.nn.init.normal_(part.b)
    set_checkpointing(unet, way != "plain")
    compare(unet, make_inputs(1, 2), trained, "aot_eager", compiling)


@pytest.mark.slow  # a C++ compiler takes minutes
def test_a_real_compiler_computes_the_same(make_inputs, compiling):
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        pytest.skip("there is no C++ compiler here")
    unet = UNet(ONE_LEVEL, config.Use()).double()
    compare(unet, make_inputs(1, 2), unet, "inductor", compiling)


def test_a_run_goes_on_with_and_without(run, tmp_path, compiling):  # noqa: F811
    """The checkpoints of either fit the other, and the weights have the ordinary names."""
    compiling("aot_eager")
    held = {part: dict(checkpoint.read_part(LAB, part)) for part in ("vae", "clip")}
    settings = load_config(None, ["weights=lab"])
    few = {"width_multipliers": (1,), "attention_levels": (False,), "blocks_per_level": 1}
    few = dataclasses.replace(settings, unet=dataclasses.replace(settings.unet, **few))
    weights = checkpoint.save(tmp_path / "start", held, few)  # for a new UNet with few kinds of blocks
    words = [f"weights={weights}", *RUN, "train.precision=float32", "train.save_every=1", "train.batch=1"]
    for steps, (output, on) in itertools.product((1, 2), {"eager": (), "mixed": (1,)}.items()):
        how = [f"train.compile={str(steps in on).lower()}", f"train.steps={steps}"]
        run("train", *words, *how, f"output={output}", "train.decay=constant", *["--resume"] * (steps - 1))
    eager, mixed = (log(tmp_path / name) for name in ("eager", "mixed"))
    assert [line["loss"] for line in mixed] == pytest.approx([line["loss"] for line in eager], rel=1e-4)
    names = [list(dict(checkpoint.read_part(tmp_path / o / "weights", "unet"))) for o in ("eager", "mixed")]
    assert names[0] == names[1]


def test_a_machine_that_cannot_compile_says_so_before_any_step(run, tmp_path, monkeypatch):  # noqa: F811
    def fails(graph, example):
        raise RuntimeError("no compiler is installed\nand more lines")

    right = torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda f, **how: right(f, backend=fails, **how))
    said = run.refused("train", f"weights={LAB}", *RUN, "train.compile=true", "output=out")
    assert "error: train.compile=true does not work here: " in said and "no compiler is installed" in said
    assert "leave it out" in said and not (tmp_path / "out/log.jsonl").exists()
