"""Plugins: what they may change, what they must declare, and that only the user's words import one."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import CORE_ONLY, ROOT
from PIL import Image

from i2vgen import pipeline
from i2vgen.adapt import lora_files, taps
from i2vgen.commands import export
from i2vgen.files import checkpoint, plugins, records
from i2vgen.lab import measure
from i2vgen.lab import study as studies
from i2vgen.settings import merge, shipped
from i2vgen.settings.config import LAB
from i2vgen.settings.merge import load_config
from i2vgen.training import loop
from i2vgen.training.settings import load_settings

EXAMPLE = ROOT / "examples" / "plugin.py"
QUICK = ["weights=lab", "steps=2", "device=cpu"]
ONE = [*QUICK, f"image={shipped.STAR}", "prompt=a yellow star grows", "seed=1"]
MARKS = """from pathlib import Path
Path(__file__).with_suffix(".ran").touch()
def change(parts, config):
    pass
"""


@pytest.fixture
def plugin(tmp_path):
    """plugin(text, name): a file of the user's own -> its path"""

    def write(text, name="mine.py"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


DISTANCES = """import torch
import torch.nn.functional as F
from torch import nn
ADDS = ("unet.*.backend.bias",)
class Distances(nn.Module):
    def __init__(self, heads):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(heads, 63))
    def forward(self, q, k, v):
        place = torch.arange(q.shape[-2], device=q.device)
        bias = self.bias[:, place[:, None] - place + 31]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
def change(parts, config):
    for block in parts["unet"].blocks():
        if block.temporal is not None:
            block.temporal.attention1.backend = Distances(block.temporal.attention1.heads)
"""


# --- what it does


def test_a_clip_under_a_plugin(script_at, tmp_path):
    run = script_at("generate")
    status, out, err = run(*ONE, f"plugins={EXAMPLE}", "output=changed.png")
    assert status == 0
    sha256 = records.sha256(EXAMPLE)
    assert f"plugin {EXAMPLE} (sha256 {sha256[:12]})" in out
    assert "lacks 1 tensor that the settings add (stem.registers): what is new starts untrained" in err
    record = records.read(tmp_path / "changed.png")
    assert record["plugins"] == [{"file": str(EXAMPLE), "sha256": sha256}]
    assert record["settings"]["plugins"] == [str(EXAMPLE)]

    assert run(*ONE, "output=plain.png")[0] == 0
    pictures = [np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("changed", "plain")]
    assert not np.array_equal(*pictures)

    # A clip that another file of this name made is not taken for this one.
    assert "1 clip already there" in run(*ONE, f"plugins={EXAMPLE}", "output=changed.png", "--resume")[1]
    path = records.path_of(tmp_path / "changed.png")
    held = json.loads(path.read_text(encoding="utf-8"))
    held["plugins"][0]["sha256"] = "0" * 64
    path.write_text(json.dumps(held), encoding="utf-8")
    assert "0 clips already there" in run(*ONE, f"plugins={EXAMPLE}", "output=changed.png", "--resume")[1]


def test_a_training_under_a_plugin_and_its_weights(script_at, tmp_path, root):
    train = script_at("train", str(root / "configs" / "train" / "tiny_diffusion.yaml"))
    settings_ = ["weights=lab", "device=cpu", "train.batch=2", "train.sample_every=0", "output=run"]
    settings_ += [f"train.{name}=[]" for name in ("frame_lengths", "sample_fps", "bucket_batch")]
    settings_ += ["train.workers=0"]
    status, out, err = train(*settings_, "train.steps=2", f"plugins={EXAMPLE}")
    assert status == 0, err
    assert f"plugin {EXAMPLE}" in out
    weights = tmp_path / "run" / "weights"
    held = dict(checkpoint.read_part(weights, "unet"))
    assert "stem.registers" in held and not any(name.startswith("mid1.temporal.") for name in held)
    assert checkpoint.read_origin(weights)["plugins"] == plugins.described(
        load_config(plugins=[str(EXAMPLE)])
    )

    # Without the plugin its name is asked for; with it everything is there.
    run = script_at("generate")
    words = [f"weights={weights}", "steps=2", "device=cpu", f"image={shipped.STAR}", "prompt=a star"]
    status, _, err = run(*words, "output=no.png")
    assert status == 2 and len(err.splitlines()) == 1 and f"plugins=[{EXAMPLE}] names it" in err
    status, _, err = run(*words, f"plugins={EXAMPLE}", "output=clip.png")
    assert status == 0 and "untrained" not in err

    # The run goes on with this very file only.
    config, settings = load_settings(None, [f"plugins={EXAMPLE}"])
    assert loop.settings_record(config, settings)["plugins"] == plugins.described(config)
    status, _, err = train(*settings_, "train.steps=2")
    assert status == 2 and "error: plugins is None here" in err


def test_attention_by_a_module_with_weights_of_its_own(plugin, script_at, tmp_path):
    file = plugin(DISTANCES)
    words = ["weights=lab", "device=cpu", "train.data=world", "train.steps=2", "train.batch=1", "output=run"]
    words += ["train.num_clips=2", "train.precision=bf16", "train.sample_every=0", "train.warmup=0"]
    status, _, err = script_at("train")(*words, f"plugins={file}", "train.ema=0.1")
    assert status == 0, err
    model = pipeline.load(
        tmp_path / "run" / "weights", plugins=str(file), overrides=["device=cpu", "steps=2"]
    )
    biases = [p for name, p in model.unet.named_parameters() if name.endswith("backend.bias")]
    assert biases and all(bias.abs().max() > 0 for bias in biases)

    made = [model(shipped.STAR, "it grows", seed=1).frames]
    seen = {}
    with taps.attention_maps(model.unet, {"*.temporal.attention1": seen.setdefault}):
        made.append(model(shipped.STAR, "it grows", seed=1).frames)  # by the map, without the bias
    made.append(model(shipped.STAR, "it grows", seed=1).frames)
    assert len(seen) == len(biases) and np.array_equal(made[0], made[2])


def test_an_adapter_asks_for_its_plugin(script_at, plugin, tmp_path, root):
    """One that sets an attention function, which no name and no shape in the adapter tells."""
    text = """def mean(q, k, v):
    return v.mean(2, keepdim=True).expand_as(q)
def change(parts, config):
    parts["unet"].mid1.temporal.attention1.backend = mean
"""
    file = plugin(text)
    train = script_at("train", str(root / "configs" / "train" / "tiny_diffusion.yaml"))
    words = ["weights=lab", "device=cpu", "train.batch=1", "train.steps=1", "train.sample_every=0"]
    words += [f"train.{name}=[]" for name in ("frame_lengths", "sample_fps", "bucket_batch")]
    words += ["train.lora_rank=2", "train.lora_modules=mid1.temporal.*", "train.warmup=0", "output=run"]
    status, _, err = train(*words, "train.learning_rate=0.1", "train.workers=0", f"plugins={file}")
    assert status == 0, err
    sha256 = records.sha256(file)
    adapter = tmp_path / "run" / "adapter"
    held = json.loads((adapter / "origin.json").read_text(encoding="utf-8"))
    assert held["plugins"] == [{"file": str(file), "sha256": sha256}] and held["steps"] == 1

    asked = f"it was trained with the plugin {file} (sha256 {sha256[:12]}), which is not given"
    run = script_at("generate")
    status, _, err = run(*ONE, f"adapter={adapter}", "output=without.png")
    assert status == 0 and asked in err and f"plugins=[{file}] names it" in err
    status, _, err = run(*ONE, f"adapter={adapter}", f"plugins={file}", "output=with.png")
    assert status == 0 and "trained with" not in err
    # Under another plugin, which drops what the adapter adapts.
    status, _, err = run(*ONE, f"adapter={adapter}", f"plugins={EXAMPLE}", "output=other.png")
    assert status == 2 and "this network has no mid1.temporal" in err and asked in err
    status, _, err = script_at("export")(adapter, "shared", "layout=diffusers", "weights=lab")
    assert status == 2 and "which diffusers cannot build" in err
    told = f"trained with the plugin {file} (sha256 {sha256[:12]}), which is not exported"
    assert export.plugin_notes(lora_files.origin(adapter)) == [told]
    # The file that holds the matrices is as good a name as its folder.
    with pytest.warns(UserWarning, match=r"adapter_model\.safetensors: it was trained with the plugin"):
        pipeline.load("lab", device="cpu").lora(adapter / "adapter_model.safetensors")


def test_weights_that_fit_without_their_plugin_say_so(plugin, tmp_path):
    """One that sets an attention function leaves every tensor as it was."""
    folder = tmp_path / "weights"
    shutil.copytree(LAB, folder)
    origin = {"plugins": [{"file": "function.py", "sha256": "ab" * 32}]}
    (folder / "origin.json").write_text(json.dumps(origin), encoding="utf-8")
    with pytest.warns(UserWarning, match=r"trained with the plugin function\.py \(sha256 abababababab\)"):
        pipeline.load(folder, device="cpu")


def test_a_tensor_of_another_shape_is_new_until_it_is_trained(plugin, tmp_path):
    text = """import torch
ADDS = DROPS = ("unet.time.linear1.*",)
class Wide(torch.nn.Module):
    def __init__(self, old):
        super().__init__()
        self.linear1 = torch.nn.Linear(2 * old.linear1.in_features, old.linear1.out_features)
        self.linear2 = old.linear2
    def forward(self, x):
        return self.linear2(self.linear1(torch.cat([x, x], -1)).relu())
def change(parts, config):
    parts["unet"].time = Wide(parts["unet"].time)
"""
    config = load_config(None, ["weights=lab", "device=cpu", f"plugins={plugin(text)}"])
    with pytest.warns(UserWarning, match="starts untrained"):
        unet = checkpoint.load("unet", config, device="cpu", dtype=torch.float32)
    # Bias and weight: only the weight has another shape, so the pattern covers one tensor of the two.
    torch.nn.init.constant_(unet.time.linear1.weight, 3.0)
    held = {part: dict(checkpoint.read_part(LAB, part)) for part in ("vae", "clip")}
    checkpoint.save(tmp_path / "trained", {**held, "unet": unet}, config)
    config = load_config(
        None, [f"weights={tmp_path / 'trained'}", "device=cpu", f"plugins={tmp_path / 'mine.py'}"]
    )
    again = checkpoint.load("unet", config, device="cpu", dtype=torch.float32)
    assert bool((again.time.linear1.weight == 3).all())


def test_evaluate_records_the_plugin(script_at, tmp_path):
    run = script_at("evaluate")
    status, out, err = run(*QUICK, "clips=1", f"plugins=[{EXAMPLE}]", "json=scores.json")
    assert status == 0, err
    assert f"plugin {EXAMPLE}" in out
    scores = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert scores["settings"]["plugins"][0]["sha256"] == records.sha256(EXAMPLE)


def test_a_study_of_a_plugin(run_script, tmp_path, monkeypatch):
    """Its runs are made in worker processes."""
    monkeypatch.syspath_prepend(str(CORE_ONLY))
    file = tmp_path / "registers.yaml"
    file.write_text(
        "# Do registers matter?\nmeasures: [trained]\nscores: [first_frame_psnr]\nvariants:\n"
        f"  without: []\n  with: [plugins={EXAMPLE}]\ntrain: {{log_every: 1}}\n",
        encoding="utf-8",
    )
    status, out = run_script("ablate.py", file, f"output={tmp_path / 'out'}", "budget=smoke", "workers=1")
    assert status == 0, out
    assert f"plugin {EXAMPLE}" in out
    trained = tmp_path / "out" / "with" / "trained" / "seed0"
    held = json.loads((trained / measure.RESULT).read_text(encoding="utf-8"))
    assert held["plugins"] == [{"file": str(EXAMPLE), "sha256": records.sha256(EXAMPLE)}]
    origin = checkpoint.read_origin(trained / "train" / "weights")
    assert origin["plugins"] == held["plugins"]

    # Another file of this name is another study.
    study, budget = studies.read(file), studies.BUDGETS["smoke"]
    run = next(r for r in studies.runs(study, budget, tmp_path / "out") if r.variant == "with")
    before = studies.identity(study, run, budget)
    own = tmp_path / "own.py"
    own.write_text(EXAMPLE.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    file.write_text(file.read_text(encoding="utf-8").replace(str(EXAMPLE), str(own)), encoding="utf-8")
    assert studies.identity(studies.read(file), run, budget) != before


# --- what it must be


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("import nowhere\n", r"fails in line 1: ModuleNotFoundError: No module named 'nowhere'"),
        ("x = 1\ny = (\n", r"fails in line 2: SyntaxError"),
        ("def change(parts, config):\n    pass\n\nprint(undefined)\n", r"fails in line 4: NameError"),
        ("x = 1\n", r"has no function change\(parts, config\)"),
        ("def change(unet):\n    pass\n", r"has no function change\(parts, config\)"),
        ("ADDS = 'unet.x'\ndef change(parts, config):\n    pass\n", r"ADDS is 'unet\.x'; give a tuple"),
        (
            "def change(parts, config):\n    x = 1\n    parts['unet'].nothing.here\n",
            r"change\(parts, config\) fails in line 3: AttributeError",
        ),
        (
            "def change(parts, config):\n    parts['unet'].mid1.temporal = None\n",
            r"drops the tensor unet\.mid1\.temporal\.\S+, which its DROPS does not declare",
        ),
        (
            "import torch\ndef change(parts, config):\n    parts['vae'].extra = torch.nn.Linear(2, 2)\n",
            r"adds the tensor vae\.extra\.bias, which its ADDS does not declare",
        ),
        (
            "ADDS = ('unet.registers',)\ndef change(parts, config):\n    pass\n",
            r"declares ADDS 'unet\.registers', but its change\(\) adds no such tensor",
        ),
        (
            "DROPS = ('clip.text.*',)\ndef change(parts, config):\n    pass\n",
            r"declares DROPS 'clip\.text\.\*', but its change\(\) drops no such tensor",
        ),
    ],
)
def test_a_file_that_is_no_plugin_is_named_before_any_work(script_at, plugin, tmp_path, text, line):
    file = plugin(text)
    status, _, err = script_at("generate")(*ONE, f"plugins={file}", "output=never.png")
    (said,) = err.splitlines()
    assert status == 2 and said.startswith(f"error: plugins={file}")
    if "line" in line:  # also where it is named as it is from here
        _, _, err = script_at("generate")(*ONE, f"plugins={file.name}", "output=never.png")
        assert f"error: plugins={file.name}" in err and line.partition(":")[0].split("fails ")[1] in err
    with pytest.raises(ValueError, match=line):
        plugins.of(load_config(plugins=[str(file)])) and checkpoint.build(
            "unet", load_config(weights="lab", plugins=[str(file)])
        )
    assert not (tmp_path / "never.png").exists()


@pytest.mark.parametrize(("name", "line"), [("none.py", "does not exist"), ("notes.txt", "is no .py file")])
def test_a_file_that_cannot_be_imported(script_at, plugin, name, line):
    plugin("x", "notes.txt")
    status, _, err = script_at("generate")(*ONE, f"plugins={name}", "output=never.png")
    assert status == 2 and err == f"error: plugins={name} {line}\n"


# --- who may name one


def test_only_the_user_names_a_plugin(plugin, tmp_path):
    file = plugin(MARKS)
    ran = file.with_suffix(".ran")
    folder = tmp_path / "weights"
    shutil.copytree(LAB, folder)
    stored = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    stored["settings"]["plugins"] = [str(file)]
    (folder / "settings.json").write_text(json.dumps(stored), encoding="utf-8")
    with pytest.warns(UserWarning, match="never imported from there"):
        model = pipeline.load(folder, device="cpu")
    assert model.config.plugins == () and not ran.exists()

    # Nor from a record, which holds the settings of its clip.
    with pytest.warns(UserWarning, match="give plugins= yourself"):
        config = merge.from_dict(stored["settings"])
    assert config.plugins == () and not ran.exists()

    # From the user's own YAML file it is.
    (tmp_path / "mine.yaml").write_text(f"plugins: ['{file}']\nweights: lab\n", encoding="utf-8")
    assert pipeline.load(config=tmp_path / "mine.yaml", device="cpu").config.plugins == (str(file),)
    assert ran.exists()


def test_several_plugins_follow_one_another(plugin):
    names = [str(plugin(MARKS, name)) for name in ("a.py", "b.py")]
    for words in ([f"plugins={name}" for name in names], [f"plugins=[{names[0]}, {names[1]}]"]):
        assert load_config(None, words).plugins == tuple(names)


def test_a_plugin_may_hold_dataclasses_and_is_loaded_from_python(plugin):
    text = """from __future__ import annotations
from dataclasses import dataclass
@dataclass
class Size:
    width: int = 3
def change(parts, config):
    parts["unet"].mid1.size = Size().width
"""
    assert pipeline.load("lab", device="cpu", plugins=str(plugin(text))).unet.mid1.size == 3


def test_weights_keep_no_plugin(plugin, tmp_path):
    config = load_config(None, ["weights=lab", "device=cpu", f"plugins={plugin(MARKS)}"])
    held = {part: dict(checkpoint.read_part(LAB, part)) for part in checkpoint.PARTS}
    folder = checkpoint.save(tmp_path / "weights", held, config)
    assert "plugins" not in json.loads((folder / "settings.json").read_text(encoding="utf-8"))["settings"]


def test_the_example_is_the_one_in_the_docs():
    text = (ROOT / "docs" / "laboratory.md").read_text(encoding="utf-8")
    example = text.partition("## A plugin")[2].partition("```python\n")[2].partition("```")[0]
    lines = [line.partition("  #")[0].strip() for line in example.splitlines() if line.strip()]
    file = EXAMPLE.read_text(encoding="utf-8").replace("REGISTERS, config", "4, config")
    missing = [line for line in lines if line not in file and not line.startswith("def change")]
    assert missing == []
