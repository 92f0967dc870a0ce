"""Low-rank adapters for diffusers' UNet and for the official one, converted to ours."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from i2vgen import cli
from i2vgen.adapt import lora
from i2vgen.files import checkpoint
from i2vgen.model.unet import UNet
from i2vgen.settings import config
from weights_conversion import __main__ as command
from weights_conversion import diffusers_layout, rules, unet_diffusers, unet_vgen

SETTINGS = config.UNet(
    base_width=32,
    width_multipliers=(1, 2),
    attention_levels=(True, False),
    blocks_per_level=1,
    head_width=16,
    context_width=64,
    image_vector_width=64,
)
WORDS = ["unet.base_width=32", "unet.width_multipliers=[1,2]", "unet.attention_levels=[true,false]",
         "unet.blocks_per_level=1", "unet.head_width=16", "unet.context_width=64",
         "unet.image_vector_width=64"]  # fmt: skip
MODULES = r".*\.(to_q|to_out\.0|proj_in|conv_shortcut|resnets\.\d\.conv1|conv2\.3|linear_1)"


def run(*words):
    return cli.run(lambda: command.main([str(word) for word in words]))


def make_unet():
    with torch.device("meta"):
        unet = UNet(SETTINGS, config.Use())
    checkpoint.fill(unet, checkpoint.random_state(unet, seed=0), dtype=torch.float32)
    return unet.requires_grad_(False)


@pytest.fixture(scope="module")
def trained():
    """diffusers' UNet with our weights and peft's adapters, and the weights that peft merges them to."""
    peft = pytest.importorskip("peft")
    pytest.importorskip("diffusers")
    rows = unet_diffusers.rows(SETTINGS)
    theirs = diffusers_layout.build_unet(SETTINGS)
    theirs.load_state_dict(rules.to_theirs(rows, make_unet().state_dict()), assign=True)
    asked = peft.LoraConfig(r=3, lora_alpha=6, target_modules=MODULES, alpha_pattern={"to_q": 12},
                            init_lora_weights=False)  # fmt: skip
    network = peft.get_peft_model(theirs, asked)
    state = peft.get_peft_model_state_dict(network)
    state = {name.removeprefix("base_model.model."): tensor.clone() for name, tensor in state.items()}
    return (
        state,
        asked.to_dict(),
        network,
        lambda: rules.to_ours(rows, network.merge_and_unload().state_dict()),
    )


@pytest.fixture(scope="module")
def sources(trained, tmp_path_factory):
    """The same adapter in every form that people have."""
    from diffusers import StableDiffusionPipeline

    state, asked, network, _ = trained
    folder = tmp_path_factory.mktemp("adapters")
    network.save_pretrained(str(folder / "peft"))
    StableDiffusionPipeline.save_lora_weights(
        folder / "diffusers", unet_lora_layers=state, unet_lora_adapter_metadata=asked
    )
    kohya = {}
    for name, tensor in state.items():
        path, _, which = name.rpartition(".lora_")
        key = f"lora_unet_{path.replace('.', '_')}"
        kohya[f"{key}.lora_{'down' if which[0] == 'A' else 'up'}.weight"] = tensor
        kohya[f"{key}.alpha"] = torch.tensor(12.0 if path.endswith("to_q") else 6.0)
    save_file(kohya, folder / "kohya.safetensors")
    official = {r.ours[0]: r.theirs for r in unet_vgen.rows(SETTINGS, config.Use()) if len(r.ours) == 1}
    mine = {r.theirs: r.ours[0] for r in unet_diffusers.rows(SETTINGS)}
    save_file(
        {
            name.replace(path, official[mine[f"{path}.weight"]].removesuffix(".weight")): tensor
            for name, tensor in state.items()
            if mine[f"{(path := name.rpartition('.lora_')[0])}.weight"] in official
        },
        folder / "official.safetensors",
    )
    return folder


@torch.no_grad()
@pytest.mark.reference
@pytest.mark.parametrize("form", ["peft", "diffusers", "kohya.safetensors"])
def test_an_adapter_for_diffusers_unet_does_the_same_to_ours(trained, sources, tmp_path, form, capsys):
    assert run("convert", sources / form, tmp_path / "out", *WORDS) == 0
    assert "low-rank adapters of" in capsys.readouterr().out
    unet, before = make_unet(), make_unet().state_dict()
    lora.load(unet, tmp_path / "out").merge()
    expected, got = trained[3](), unet.state_dict()
    changed = [name for name in before if not torch.equal(before[name], got[name])]
    assert len(changed) == len(trained[0]) // 2
    assert max((got[name] - expected[name]).abs().max().item() for name in got) < 1e-5
    assert max((before[name] - expected[name]).abs().max().item() for name in got) > 0.1


@pytest.mark.reference
def test_official_names_and_ours_are_known_too(trained, sources, tmp_path):
    assert run("convert", sources / "official.safetensors", tmp_path / "a", *WORDS) == 0
    assert run("convert", sources / "peft", tmp_path / "b", *WORDS) == 0
    a, b = (load_file(tmp_path / name / lora.WEIGHTS_FILE) for name in "ab")
    assert len(a) > 20 and all(torch.equal(a[name], b[name]) for name in a)
    assert run("convert", tmp_path / "a", tmp_path / "c", *WORDS) == 0
    assert (tmp_path / "c" / lora.WEIGHTS_FILE).read_bytes() == (
        tmp_path / "a" / lora.WEIGHTS_FILE
    ).read_bytes()


@pytest.mark.reference
def test_refusals(sources, tmp_path, capsys):
    def refused(words, *command):
        assert run("convert", *command) == 2
        assert words in (said := capsys.readouterr().err), said
        assert not (tmp_path / "out").exists()

    refused("does not fit", sources / "peft", tmp_path / "out", *WORDS[1:])  # released width
    one_level = [*WORDS[:1], "unet.width_multipliers=[1]", "unet.attention_levels=[true]", *WORDS[3:]]
    refused("another network: the UNet has no", sources / "peft", tmp_path / "out", *one_level)
    refused("convert it by itself", sources / "kohya.safetensors", sources / "peft", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    refused("is no adapter; choose another place", sources / "peft", tmp_path / "full", *WORDS)
    assert run("convert", sources / "peft", tmp_path / "out", *WORDS, "--dry-run") == 0
    assert not (tmp_path / "out").exists()
    settings = sources / "peft" / lora.SETTINGS_FILE
    text = settings.read_text()
    settings.write_text(json.dumps({**json.loads(text), "use_dora": True}))
    refused("use_dora is True", sources / "peft", tmp_path / "out", *WORDS)
    settings.write_text(text)
