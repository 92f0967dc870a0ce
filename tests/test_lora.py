"""Low-rank adapters: exact on and off, small on disk, readable by peft, through the scripts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from i2vgen import pipeline
from i2vgen.adapt import lora
from i2vgen.fast import savings
from i2vgen.settings import config
from i2vgen.settings.config import SHIPPED

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
    with pytest.raises(ValueError, match="no plain LoRA"):
        lora.load(make_unet(), tmp_path)
    weights.write_bytes(b"torn")
    settings.write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 1}))
    with pytest.raises(ValueError, match="is damaged"):
        lora.load(make_unet(), tmp_path)


# --- through the scripts

RUN = ["train.part=diffusion", f"weights={SHIPPED}", "train.lora_rank=2", "train.batch=1",
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
    assert status == 2 and "train.lora_rank is for the UNet" in out


def test_a_killed_adapter_run_resumes_to_the_same_numbers(run_script, tmp_path):
    words = [*RUN, "train.save_every=1", "train.decay=constant"]
    assert run_script("train.py", *words, "train.steps=2", f"output={tmp_path / 'whole'}")[0] == 0
    assert run_script("train.py", *words, "train.steps=1", f"output={tmp_path / 'parts'}")[0] == 0
    assert run_script("train.py", *words, "train.steps=2", f"output={tmp_path / 'parts'}", "--resume")[0] == 0
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("whole", "parts")]
    assert logs[0] == logs[1]
