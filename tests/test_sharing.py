"""What is trained here loads in diffusers and peft: full weights and adapters, through the commands."""

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from i2vgen.adapt import lora
from i2vgen.files import checkpoint
from i2vgen.settings.merge import load_config
from weights_conversion import rules, unet_diffusers

diffusers, peft = (pytest.importorskip(name) for name in ("diffusers", "peft"))
# The released topology on two levels, as diffusers' class can express it.
SETTINGS = [
    "unet.image_vector_width=64", "unet.width_multipliers=[1,2]", "unet.attention_levels=[true,false]",
    "unet.blocks_per_level=1", "clip.embed_dim=64", "vae.width_multipliers=[1,2]", "vae.blocks_per_level=1",
    "width=32", "height=32", "frames=3", "steps=2", "clip.text.layers=2", "clip.vision.layers=1",
]  # fmt: skip
TRAIN = [
    "train.part=diffusion", "train.steps=1", "train.batch=1", "train.warmup=0", "train.precision=float32",
    "train.learning_rate=0.01", "device=cpu",
]  # fmt: skip
MODULES = '["*attention*.to_*","conv_in","*.temporal_conv.stages.*.conv","*.proj_in","*.res.embedding"]'
pytestmark = [
    pytest.mark.reference,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture
def base(tmp_path):
    """A native folder of seeded random weights"""
    cfg = load_config(ROOT / "configs" / "tiny.yaml", SETTINGS, weights="random")
    parts = {
        part: dict(checkpoint.random_state(checkpoint.build(part, cfg), seed=0)) for part in checkpoint.PARTS
    }
    return checkpoint.save(tmp_path / "base", parts, cfg)


def their_unet(folder):
    return diffusers.I2VGenXLUNet.from_pretrained(folder / "unet")


def differences(state, expected):
    assert state.keys() == expected.keys()
    return {name: float((state[name] - expected[name]).abs().max()) for name in state}


def test_a_full_fine_tune_loads_in_diffusers(script_at, base, tmp_path):
    assert script_at("train")(*TRAIN, f"weights={base}", "output=full")[0] == 0
    status, out, err = script_at("export")("full/weights", "shared", "layout=diffusers", "--no-fold")
    assert status == 0, err
    assert 'load it: pipe = diffusers.I2VGenXLPipeline.from_pretrained("shared")' in out
    trained, before = (dict(checkpoint.read_part(p, "unet")) for p in (tmp_path / "full" / "weights", base))
    rows = unet_diffusers.rows(load_config(weights=str(base)).unet)
    theirs = their_unet(tmp_path / "shared").state_dict()
    assert max(differences(theirs, rules.to_theirs(rows, trained)).values()) == 0
    assert max(differences(theirs, rules.to_theirs(rows, before)).values()) > 1e-3  # it was trained
    pipe = diffusers.I2VGenXLPipeline.from_pretrained(tmp_path / "shared")
    assert type(pipe.unet) is diffusers.I2VGenXLUNet


def test_an_adapter_loads_with_peft_on_diffusers_unet(script_at, base, tmp_path):
    words = ["train.lora_rank=2", f"train.lora_modules={MODULES}"]
    assert script_at("train")(*TRAIN, *words, f"weights={base}", "output=lora")[0] == 0
    export = script_at("export")
    status, out, err = export("lora/adapter", "shared", "layout=diffusers", f"weights={base}")
    assert status == 0, err
    assert 'peft.PeftModel.from_pretrained(pipe.unet, "shared").merge_and_unload()' in out
    assert "conv_in's columns for the concat branch are multiplied by 2" in out

    # The same as merging it here and exporting the merged weights.
    cfg = load_config(None, [f"weights={base}", "device=cpu"])
    unet = checkpoint.load("unet", cfg, device="cpu", dtype=torch.float32)
    lora.load(unet, tmp_path / "lora" / "adapter").merge()
    checkpoint.save(tmp_path / "merged", {"unet": unet, **_others(base)}, cfg)
    for native, name in ((base, "base"), (tmp_path / "merged", "merged")):
        assert export(native, f"theirs-{name}", "layout=diffusers")[0] == 0
    before, merged = (their_unet(tmp_path / f"theirs-{name}") for name in ("base", "merged"))
    untouched = {name: tensor.clone() for name, tensor in before.state_dict().items()}
    theirs = peft.PeftModel.from_pretrained(before, str(tmp_path / "shared")).merge_and_unload().state_dict()
    assert max(differences(theirs, merged.state_dict()).values()) < 1e-6
    changed = [name for name, d in differences(theirs, untouched).items() if d > 1e-6]
    assert len(changed) == len(lora.read(tmp_path / "lora" / "adapter"))

    # And back: bit for bit, but for the gain in conv_in.
    settings = [f"unet.{name}={value}" for name, value in _shape(cfg)]
    status, _, err = script_at("convert")("shared", "back", *settings)
    assert status == 0, err
    back, ours = (load_file(tmp_path / place / lora.WEIGHTS_FILE) for place in ("back", "lora/adapter"))
    differing = [name for name in ours if not torch.equal(back[name], ours[name])]
    assert differing == ["base_model.model.conv_in.lora_A.weight"] and back.keys() == ours.keys()
    assert export("lora/adapter", "plain", "layout=diffusers", f"weights={base}", "--no-fold")[0] == 0
    assert script_at("convert")("plain", "same", *settings)[0] == 0
    same = load_file(tmp_path / "same" / lora.WEIGHTS_FILE)
    assert all(torch.equal(same[name], ours[name]) for name in ours)

    for words, line in {
        ("lora/adapter", "no", "layout=vgen"): "the official code reads none",
        ("lora/adapter", "no", "layout=diffusers"): "does not fit the released model",
        ("lora/adapter", "no", "layout=diffusers", "dtype=float16"): "dtype= has no effect on an adapter",
        (base, "no", "layout=diffusers", f"weights={base}"): "weights= belongs to an adapter",
    }.items():
        status, _, err = export(*words)
        assert status == 2 and line in err and len(err.splitlines()) == 1
        assert not (tmp_path / "no").exists()


def _others(folder):
    return {part: dict(checkpoint.read_part(folder, part)) for part in ("vae", "clip")}


def _shape(cfg):
    names = ("base_width", "head_width", "context_width", "image_vector_width", "blocks_per_level")
    yield from ((name, getattr(cfg.unet, name)) for name in names)
    yield "width_multipliers", list(cfg.unet.width_multipliers)
    yield "attention_levels", str(list(cfg.unet.attention_levels)).lower()
