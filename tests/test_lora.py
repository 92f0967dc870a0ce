"""Low-rank adapters: exact on and off, small on disk, readable by peft, through the scripts."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from i2vgen import pipeline
from i2vgen.adapt import lora
from i2vgen.fast import savings
from i2vgen.settings import config
from i2vgen.settings.config import LAB

ROOT = Path(__file__).parents[1]
PATTERNS = ["*attention*.to_*", "mid1.res.conv*"]


@pytest.fixture
def network(make_unet, make_inputs):
    unet = make_unet()
    x, t, conditions = make_inputs(1, 3)
    return unet, lambda: unet(x, t, unet.prepare(conditions, 3))


def trained(adapters):
    """As after a training: no matrix is zero, and all are float32 numbers."""
    with torch.no_grad():
        for part in adapters.parts.values():
            part.b.normal_(std=0.05)
            for matrix in (part.a, part.b):
                matrix.copy_(matrix.float())
    return adapters


def files(folder):
    return folder / lora.SETTINGS_FILE, folder / lora.WEIGHTS_FILE


@torch.no_grad()
def test_on_off_and_merged_are_exact(network):
    unet, call = network
    plain, before = call(), {n: t.clone() for n, t in unet.state_dict().items()}
    adapters = lora.attach(unet, PATTERNS, rank=2)
    assert torch.equal(call(), plain)  # B is zero
    adapted = (trained(adapters), call())[1]
    assert not torch.allclose(adapted, plain)
    assert torch.equal((adapters.set_scale(0.0), call())[1], plain)
    adapters.set_scale(1.0).remove()
    assert torch.equal(call(), plain)
    assert all(torch.equal(t, before[n]) for n, t in unet.state_dict().items())

    again = lora.attach(unet, PATTERNS, rank=2)
    again.load_state_dict(adapters.state_dict())
    again.merge()
    assert torch.equal(call(), adapted)
    assert unet.state_dict().keys() == before.keys()
    assert not torch.allclose(unet.mid1.res.conv1.weight, before["mid1.res.conv1.weight"])


@torch.no_grad()
def test_the_formula(network):
    unet, _ = network
    weight = unet.mid1.res.conv1.weight.clone()
    part = trained(lora.attach(unet, ["mid1.res.conv1"], rank=3, alpha=6)).part("mid1.res.conv1")
    by_hand = weight + 6 / 3 * (part.b @ part.a).view_as(weight)
    assert torch.allclose(unet.mid1.res.conv1.weight, by_hand, rtol=0, atol=1e-15)


@torch.no_grad()
def test_the_fast_forms_see_the_adapted_weights(network):
    unet, call = network
    trained(lora.attach(unet, ["*attention*.to_*", "*feed_forward*", "*resample.conv"], rank=2))
    plain = call()
    savings.apply(unet, config.Runtime())
    assert torch.allclose(call(), plain, rtol=0, atol=1e-12)


@torch.no_grad()
def test_saved_small_and_loaded_back(network, tmp_path):
    unet, call = network
    adapters = trained(lora.attach(unet, PATTERNS, rank=2))
    adapted = call()
    adapters.save(tmp_path)
    adapters.remove()
    loaded = lora.load(unet, tmp_path)
    assert torch.equal(call(), adapted)
    assert sum(f.stat().st_size for f in files(tmp_path)) < 300_000
    loaded.remove()
    lora.load(unet, tmp_path, scale=0.5)
    assert not torch.allclose(call(), adapted)


def test_only_adapters_learn(network):
    unet, call = network
    unet.requires_grad_(False)
    adapters = lora.attach(unet, PATTERNS, rank=2)
    call().square().mean().backward()
    assert all(p.grad is not None for n, p in adapters.named_parameters() if n.endswith(".b"))
    assert sum(p.requires_grad for p in unet.parameters()) == len(list(adapters.parameters()))


@torch.no_grad()
@pytest.mark.reference
def test_peft_reads_it_and_we_read_peft(network, tmp_path, make_unet):
    peft = pytest.importorskip("peft")
    unet, call = network
    plain = call()
    trained(lora.attach(unet, ["*attention*.to_*"], rank=2, alpha=4)).save(tmp_path / "ours")
    adapted = call()
    theirs = peft.PeftModel.from_pretrained(make_unet(), str(tmp_path / "ours"))
    inside = theirs.base_model.model
    for name, module in inside.named_modules():
        if name.endswith("mid1.temporal.attention1.to_q"):
            assert type(module).__name__ == "Linear" and "peft" in type(module).__module__
    x_before = unet.mid1.temporal.attention1.to_q.weight
    x_theirs = inside.mid1.temporal.attention1.to_q
    x_theirs.merge()
    assert torch.allclose(x_theirs.base_layer.weight, x_before, rtol=0, atol=1e-7)

    theirs.save_pretrained(str(tmp_path / "theirs"))
    fresh = make_unet()
    lora.load(fresh, tmp_path / "theirs")
    for path in ("mid1.spatial.cross_attention.to_k", "temporal_in.attention2.to_out"):
        assert torch.equal(fresh.get_submodule(path).weight, unet.get_submodule(path).weight)
    assert not torch.allclose(adapted, plain)


# --- what peft, diffusers and kohya write


MODULES = ["mid1.spatial.cross_attention.to_q", "mid1.res.conv1", "temporal_in.proj_in", "time.linear1"]
KEYS = {
    "plain": {},
    "one key": {"alpha_pattern": {"to_q": 32}},
    "a regular expression": {"alpha_pattern": {r"mid1\..*\.to_[qk]": 32, "(time|mid1).*": 3}},
    "the first that matches": {"alpha_pattern": {"linear1": 5, r"time\.linear1": 7}},
    "part of a name matches nothing": {"alpha_pattern": {"inear1": 5, "onv1": 7}},
    "ranks": {"rank_pattern": {"to_q": 2, r"^time\..*": 6}},
    "both": {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_q": 16, "conv1": 1}},
    "rslora": {"use_rslora": True, "rank_pattern": {"conv1": 3}},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal", "target_modules": ["to_q", "linear1"]},
}


def made_by_peft(unet, folder, **settings):
    """A trained adapter in peft's own files, and the weights that peft merges it to after loading."""
    peft = pytest.importorskip("peft")
    asked = {"r": 4, "lora_alpha": 8, "target_modules": MODULES, **settings}
    network = peft.get_peft_model(copy.deepcopy(unet), peft.LoraConfig(**asked))
    with torch.no_grad():
        for name, matrix in network.named_parameters():
            if "lora_B" in name and "weight" in name:
                matrix.normal_(std=0.1)
    network.save_pretrained(str(folder))
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(unet), str(folder))
    return dict(loaded.merge_and_unload().state_dict())


def differ(unet, expected):
    return max((tensor - expected[name]).abs().max().item() for name, tensor in unet.state_dict().items())


@torch.no_grad()
@pytest.mark.reference
@pytest.mark.parametrize("name", KEYS)
def test_every_accepted_setting_of_peft_acts_as_in_peft(make_unet, tmp_path, name):
    unet = make_unet(dtype=torch.float32)
    expected = made_by_peft(unet, tmp_path, **KEYS[name])
    assert differ(unet, expected) > 0.05
    adapters = lora.load(unet, tmp_path)
    adapters.save(tmp_path / "again")
    adapters.merge()
    assert differ(unet, expected) < 2e-6
    again = make_unet(dtype=torch.float32)
    lora.load(again, tmp_path / "again").merge()
    assert differ(again, expected) < 2e-6
    theirs = pytest.importorskip("peft").PeftModel.from_pretrained(
        make_unet(dtype=torch.float32), str(tmp_path / "again")
    )
    assert differ(theirs.merge_and_unload(), expected) < 2e-6


REFUSED = {
    "use_dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True, "target_modules": ["time.linear1"]},
    "bias": {"bias": "all"},
    "init_lora_weights": {"init_lora_weights": "pissa", "target_modules": ["time.linear1"]},
    "modules_to_save": {"modules_to_save": ["conv_out"]},
}


@pytest.mark.reference
@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_do_more_are_refused_by_name(make_unet, tmp_path, name):
    unet = make_unet(dtype=torch.float32)
    made_by_peft(unet, tmp_path, **REFUSED[name])
    with pytest.raises(ValueError, match=name):
        lora.load(unet, tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("init_lora_weights", "olora"), ("init_lora_weights", "pissa_niter_4"), ("init_lora_weights", "loftq"),
     ("init_lora_weights", "corda"), ("use_qalora", True), ("layer_replication", [[0, 1]]),
     ("a_setting_of_next_year", True), ("peft_type", "LOHA")],
)  # fmt: skip
def test_settings_are_refused_unless_known(network, tmp_path, name, value):
    unet, _ = network
    trained(lora.attach(unet, PATTERNS, rank=2)).save(tmp_path)
    edit(tmp_path, **{name: value})
    with pytest.raises(ValueError, match=str(value) if name == "peft_type" else name):
        lora.read(tmp_path)


def edit(folder, **settings):
    file = folder / lora.SETTINGS_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"alpha_pattern": {"(": 2}}, "no regular expression"),
        ({"alpha_pattern": {"(a+)+b": 2}}, "simpler"),
        ({"alpha_pattern": {".*.*.*.*.*x": 2}}, "simpler"),
        ({"alpha_pattern": {"conv1": "big"}}, "the alpha of mid1.res.conv1 is 'big'"),
        ({"alpha_pattern": [1]}, r"alpha_pattern is \[1\]"),
        ({"rank_pattern": {"conv1": 3}}, "say rank 3 for mid1.res.conv1, its matrices have 2"),
        ({"lora_alpha": None}, "the alpha of .* is None"),
        ({"lora_alpha": float("nan")}, "is nan"),
    ],
)
def test_damaged_settings(network, tmp_path, settings, words):
    unet, _ = network
    trained(lora.attach(unet, PATTERNS, rank=2)).save(tmp_path)
    edit(tmp_path, **settings)
    with pytest.raises(ValueError, match=words):
        lora.load(unet, tmp_path)


KOHYA = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}


def parts(adapters):
    """(path, which matrix, its tensor as peft writes it) of every adapter."""
    for path in adapters.modules_by_path:
        yield path, "lora_A.weight", adapters.part(path).a.detach().float()
        yield path, "lora_B.weight", adapters.part(path).b.detach().float()


def single_file(adapters, form):
    tensors = {}
    for path, which, tensor in parts(adapters):
        if form.startswith("kohya"):
            tensors[f"lora_unet_{path.replace('.', '_')}.{KOHYA[which]}"] = tensor
            tensors[f"lora_unet_{path.replace('.', '_')}.alpha"] = torch.tensor(
                6 if form == "kohya whole" else 6.0
            )
        elif form == "diffusers":
            tensors[f"unet.{path}.{which}"] = tensor
        else:
            tensors[f"unet.{path}.{which.replace('_A', '.down').replace('_B', '.up')}"] = tensor
    return tensors


@torch.no_grad()
@pytest.mark.parametrize("form", ["kohya", "kohya whole", "diffusers", "diffusers before peft", "metadata"])
@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_single_files(network, tmp_path, form, folder):
    unet, call = network
    strength = {"kohya": 3.0, "kohya whole": 3.0, "metadata": 2.5}.get(form, 1.0)
    adapters = trained(lora.attach(unet, ["*attention*.to_*"], rank=2, alpha=2 * strength))
    adapted, tensors = call(), single_file(adapters, form if form != "metadata" else "diffusers")
    adapters.remove()
    notes = {"unet.r": 2, "unet.lora_alpha": 5, "unet.use_dora": False, "unet.peft_type": "LORA"}
    metadata = {"lora_adapter_metadata": json.dumps(notes)} if form == "metadata" else {}
    file = tmp_path / ("pytorch_lora_weights.safetensors" if folder else "style.safetensors")
    save_file({n: t.contiguous() for n, t in tensors.items()}, file, metadata={"format": "pt", **metadata})
    lora.load(unet, tmp_path if folder else file)
    assert torch.allclose(call(), adapted, rtol=0, atol=1e-12)


def test_other_files_and_folders(network, tmp_path):
    unet, _ = network
    trained(lora.attach(unet, PATTERNS, rank=2)).save(tmp_path / "peft")
    file = tmp_path / "peft" / lora.WEIGHTS_FILE
    assert len(lora.read(file)) == len(lora.read(tmp_path / "peft"))  # its settings lie beside it
    tensors = load_file(file)

    def refused(words, tensors=tensors, name="x.safetensors", **changes):
        save_file({**tensors, **changes}, tmp_path / name)
        with pytest.raises(ValueError, match=words):
            lora.load(unet, tmp_path / name)

    refused("give its folder, with the adapter_config.json")
    one = "lora_unet_mid1_res_conv1"
    kohya = {f"{one}.lora_down.weight": torch.ones(2, 4), f"{one}.lora_up.weight": torch.ones(4, 2)}
    refused("which is no part of a plain LoRA", kohya, **{f"{one}.dora_scale": torch.ones(4)})
    refused("which is no part of a plain LoRA", kohya, **{f"{one}.lora_mid.weight": torch.ones(4)})
    refused("the alpha of .* give one number", kohya, **{f"{one}.alpha": torch.ones(4)})
    refused("not made of finite numbers", kohya, **{f"{one}.lora_up.weight": torch.full((4, 2), math.nan)})
    refused("another architecture: its matrices for mid1.res.conv1", kohya)
    text = {name.replace("unet", "te"): tensor.clone() for name, tensor in kohya.items()}
    refused(
        "another architecture: this network has no lora_te_mid1_res_conv1 .*1 of its 2", {**kohya, **text}
    )
    foreign = {"unet.down_blocks.0.to_q.lora_A.weight": torch.ones(2, 4),
               "unet.down_blocks.0.to_q.lora_B.weight": torch.ones(4, 2)}  # fmt: skip
    refused("i2vgen convert", foreign)
    (tmp_path / "peft" / lora.WEIGHTS_FILE).write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="git lfs pull"):
        lora.read(tmp_path / "peft")
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"no \.safetensors file"):
        lora.read(tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"lacks adapter_config.json.*its subfolders peft are adapters"):
        lora.read(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        lora.read(tmp_path / "nothing.safetensors")


@torch.no_grad()
def test_adapters_combine_by_merging_one_after_the_other(network, tmp_path):
    unet, _ = network
    layer, changes = unet.mid1.res.conv1, []
    before = layer.weight.clone()
    for name, scale in (("a", 0.5), ("b", 2.0)):
        adapters = trained(lora.attach(unet, ["mid1.res.conv1"], rank=2))
        changes.append(scale * (layer.weight - before))
        adapters.save(tmp_path / name)
        adapters.remove()
    for name, scale in (("a", 0.5), ("b", 2.0)):
        lora.load(unet, tmp_path / name, scale=scale).merge()
    assert torch.allclose(layer.weight, before + sum(changes), rtol=0, atol=1e-12)


# --- refusals


def test_refusals(network, tmp_path, make_unet):
    unet, _ = network
    with pytest.raises(ValueError, match="no module's path matches 'mid3"):
        lora.attach(unet, ["mid3.*"], rank=2)
    with pytest.raises(ValueError, match="matches no Linear and no Conv"):
        lora.attach(unet, ["mid1.res.norm1"], rank=2)
    with pytest.raises(ValueError, match="rank of an adapter is 0"):
        lora.attach(unet, PATTERNS, rank=0)
    with pytest.raises(ValueError, match=r"is no adapter: it lacks adapter_config.json"):
        lora.load(unet, tmp_path)
    adapters = lora.attach(unet, PATTERNS, rank=2)
    with pytest.raises(ValueError, match="carries an adapter already"):
        lora.attach(unet, PATTERNS, rank=2)
    adapters.save(tmp_path)
    with pytest.raises(ValueError, match=r"another architecture: its matrices for mid1.res.conv1"):
        lora.load(make_unet(width_multipliers=(1, 4)), tmp_path)
    with pytest.raises(ValueError, match="another architecture: this network has no"):
        lora.load(make_unet(use=config.Use(temporal_attention=False)), tmp_path)
    with pytest.warns(UserWarning, match="changes nothing"):
        lora.load(make_unet(), tmp_path)
    settings, weights = files(tmp_path)
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "use_dora": True}))
    with pytest.raises(ValueError, match="no plain LoRA: use_dora is True"):
        lora.load(make_unet(), tmp_path)
    weights.write_bytes(b"torn")
    settings.write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 1}))
    with pytest.raises(ValueError, match="is damaged"):
        lora.load(make_unet(), tmp_path)


# --- through the scripts

RUN = ["train.part=diffusion", f"weights={LAB}", "train.lora_rank=2", "train.batch=1",
       "train.log_every=1", "device=cpu"]  # fmt: skip


def test_train_then_sample(run_script, tmp_path):
    train = [*RUN, "train.steps=2", "train.learning_rate=0.01", f"output={tmp_path / 'run'}"]
    status, out = run_script("train.py", *train)
    adapter = tmp_path / "run" / "adapter"
    assert status == 0 and str(adapter) in out and not (tmp_path / "run" / "weights").exists()
    assert sum(f.stat().st_size for f in files(adapter)) < 1_000_000

    words = ["steps=2", "seed=3", "device=cpu"]
    picture, prompt = ROOT / "i2vgen" / "assets" / "star.png", "a yellow star grows"
    plain = pipeline.load(overrides=words)(picture, prompt).frames
    adapted = pipeline.load(overrides=[*words, f"adapter={adapter}", "adapter_scale=20"])(
        picture, prompt
    ).frames
    assert not np.array_equal(plain, adapted)
    out = tmp_path / "clip.png"
    job = [f"image={picture}", f"prompt={prompt}", f"output={out}", f"adapter={adapter}"]
    assert run_script("generate.py", *job, *words)[0] == 0
    assert json.loads((tmp_path / "clip.png.json").read_text())["settings"]["adapter"] == str(adapter)

    job = [f"image={picture}", "prompt=x", "output=x.png", f"adapter={tmp_path}"]
    status, out = run_script("generate.py", *job)
    assert status == 2 and "is no adapter" in out
    status, out = run_script("train.py", "train.part=vae", "train.lora_rank=2", f"output={tmp_path / 'no'}")
    assert status == 2 and "train.lora_rank needs train.part=diffusion" in out


def test_a_killed_adapter_run_resumes_to_the_same_numbers(run_script, tmp_path):
    words = [*RUN, "train.save_every=1", "train.decay=constant"]
    assert run_script("train.py", *words, "train.steps=2", f"output={tmp_path / 'whole'}")[0] == 0
    assert run_script("train.py", *words, "train.steps=1", f"output={tmp_path / 'parts'}")[0] == 0
    assert run_script("train.py", *words, "train.steps=2", f"output={tmp_path / 'parts'}", "--resume")[0] == 0
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("whole", "parts")]
    assert logs[0] == logs[1]
