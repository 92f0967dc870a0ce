"""The diffusers folder: written, loaded by the real pipeline offline, and read back bit for bit."""

import dataclasses
import json
import shutil
import socket
import weakref
from pathlib import Path

import diffusers
import diffusers.models.autoencoders.vae
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from i2vgen import pipeline
from i2vgen.diffusion.noise import SampleNoise
from i2vgen.diffusion.schedule import timesteps
from i2vgen.files import checkpoint
from i2vgen.model.conditioning import Conditions
from i2vgen.model.unet import UNet
from i2vgen.settings import config, merge
from i2vgen.settings.merge import load_config
from weights_conversion import clip, rules, unet_diffusers, vae
from weights_conversion import diffusers_layout as layout

KEYS = Path(__file__).parent / "goldens" / "keys"
TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"
SMALL = [
    "unet.image_vector_width=64", "unet.width_multipliers=[1, 2]", "unet.attention_levels=[true, false]",
    "unet.blocks_per_level=1", "clip.embed_dim=64", "vae.width_multipliers=[1, 2]", "vae.blocks_per_level=1",
    "width=64", "height=32", "frames=3", "steps=10", "device=cpu", "preprocess.crop=official",
    "clip.text.layers=2", "clip.vision.layers=1",
]  # fmt: skip
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def manifest(name):
    return {key: tuple(shape) for key, shape in json.loads((KEYS / f"{name}.json").read_text()).items()}


def shapes(state):
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def native(cfg, parts=checkpoint.PARTS):
    return {part: dict(checkpoint.random_state(checkpoint.build(part, cfg), seed=0)) for part in parts}


def equal(a, b):
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def to_native(folder, cfg):
    """Read a folder -> our parts."""
    held = {name: part.tensors for name, part in folder.parts.items()}
    both, _ = clip.from_transformers({"text": held["text_encoder"], "image": held["image_encoder"]}, cfg.clip)
    return {
        "unet": rules.to_ours(unet_diffusers.rows(cfg.unet), held["unet"]),
        "vae": rules.to_ours(vae.diffusers_rows(cfg.vae), held["vae"]),
        "clip": dict(both),
    }


def without_absent(parts):
    return {**parts, "clip": {n: t for n, t in parts["clip"].items() if n not in clip.ABSENT}}


@pytest.fixture(scope="module")
def cfg():
    return load_config(TINY, SMALL, weights="random")


@pytest.fixture(scope="module")
def parts(cfg):
    return native(cfg)


@pytest.fixture(scope="module")
def exported(cfg, parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "diffusers"
    layout.write_folder(cfg, parts, folder)
    return folder


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def load_pipeline(folder, **how):
    pipe = diffusers.I2VGenXLPipeline.from_pretrained(folder, **how)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ---------------------------------------------------------------------------------------- round trip

CASES = {
    "released topology": (
        ["unet.width_multipliers=[1, 2, 4, 4]", "unet.attention_levels=[true, true, true, false]",
         "unet.blocks_per_level=2", "vae.width_multipliers=[1, 2, 4, 4]", "height=64"], {},
    ),
    "attention at the bottom": (["unet.attention_levels=[false, true]", "vae.scale=0.5"], {}),
    "one level": (["unet.width_multipliers=[1]", "unet.attention_levels=[true]", "unet.out_channels=8"], {}),
    "sharded": ([], {"shard_bytes": 400_000}),
    "variant": ([], {"variant": "fp16", "dtype": torch.float16}),
    "sharded variant": ([], {"variant": "fp16", "dtype": torch.bfloat16, "shard_bytes": 400_000}),
    "plain": ([], {"fold": False}),
    "gain 0.5": (["use.concat_gain=0.5"], {}),
    "quick gelu": (["clip.quick_gelu=true", "clip.text.context_length=9", "clip.text.heads=2"], {}),
}  # fmt: skip


@pytest.mark.parametrize(("overrides", "how"), CASES.values(), ids=CASES)
def test_round_trip(overrides, how, tmp_path):
    cfg = load_config(TINY, [*SMALL, *overrides], weights="random")
    ours = native(cfg)
    layout.write_folder(cfg, ours, tmp_path / "a", **how)
    folder = layout.read_folder(tmp_path / "a", variant=how.get("variant"))
    settings, _ = layout.settings_from_folder(folder)
    again = merge.from_dict(settings | {"sample": {"width": 64, "height": 64}})
    quiet = {"dropout": 0.1, "temporal_conv_dropout": 0.1, "concat_dropout": 0.05}
    assert again.unet == dataclasses.replace(cfg.unet, **quiet)
    assert (again.vae, again.clip, again.schedule, again.use) == (cfg.vae, cfg.clip, cfg.schedule, cfg.use)

    back = to_native(folder, again)
    want = {part: {n: t.to(how.get("dtype")) for n, t in state.items()} for part, state in ours.items()}
    for part in checkpoint.PARTS:
        assert equal(without_absent(back)[part], without_absent(want)[part])
    layout.write_folder(again, back, tmp_path / "b", **how)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    if how.get("shard_bytes"):
        assert any("-of-" in f.name for f in files) and any(".index" in f.name for f in files)


def test_folding_doubles_the_concat_columns_and_records_it(cfg, parts, exported):
    held = load_file(exported / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"]
    ours = parts["unet"]["conv_in.weight"]
    assert torch.equal(held[:, :4], ours[:, :4]) and torch.equal(held[:, 4:], 2 * ours[:, 4:])
    folder = layout.read_folder(exported)
    assert (folder.parts["unet"].folded, folder.parts["unet"].gain) == (2.0, 2.0)
    assert torch.equal(folder.parts["unet"].tensors["conv_in.weight"], ours)


def test_an_inexact_fold_is_refused(cfg, parts, tmp_path):
    odd = dataclasses.replace(cfg, use=dataclasses.replace(cfg.use, concat_gain=1.7))
    with pytest.raises(ValueError, match=r"cannot be folded into conv_in\.weight without rounding"):
        layout.write_folder(odd, parts, tmp_path / "out")
    big = {**parts, "unet": {**parts["unet"], "conv_in.weight": parts["unet"]["conv_in.weight"] * 1e5}}
    with pytest.raises(ValueError, match=r"without rounding in torch\.float16"):
        layout.write_folder(cfg, big, tmp_path / "out", dtype=torch.float16)
    nothing = dataclasses.replace(cfg, use=dataclasses.replace(cfg.use, concat_gain=0.0))
    with pytest.raises(ValueError, match="would erase weights"):
        layout.write_folder(nothing, parts, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------- full size


def test_full_size_configs_build_the_published_networks():
    assert shapes(layout.build_unet(config.UNet()).state_dict()) == manifest("diffusers_unet_keys")
    with torch.device("meta"):
        model = diffusers.AutoencoderKL.from_config(layout.vae_config(config.VAE()))
    assert shapes(model.state_dict()) == manifest("diffusers_vae_keys")


def test_full_size_settings():
    published = {
        "_class_name": "I2VGenXLUNet", "sample_size": 32, "in_channels": 4, "out_channels": 4,
        "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2, "norm_num_groups": 32,
        "cross_attention_dim": 1024,
        "down_block_types": ["CrossAttnDownBlock3D"] * 3 + ["DownBlock3D"],
        "up_block_types": ["UpBlock3D"] + ["CrossAttnUpBlock3D"] * 3,
    }  # fmt: skip
    for name in ("num_attention_heads", "attention_head_dim"):  # the old and the new name of the head width
        section = layout.unet_settings({**published, name: 64})
        assert merge.from_dict({"unet": section}).unet == config.UNet()
    both = layout.unet_settings({**published, "num_attention_heads": 64, "attention_head_dim": 32})
    assert both["head_width"] == 32
    written = layout.vae_config(config.VAE())
    assert merge.from_dict({"vae": layout.vae_settings(written)}).vae == config.VAE()
    scheduler = layout.scheduler_config(config.Schedule(), config.Sample())
    assert scheduler["set_alpha_to_one"] is False
    section, notes = layout.schedule_settings(scheduler)
    assert merge.from_dict({"schedule": section}).schedule == config.Schedule() and not notes


# --------------------------------------------------------------------------- the pipeline, live


@pytest.mark.usefixtures("no_network")
def test_the_pipeline_loads_from_the_folder_alone(exported, parts, cfg):
    pipe = load_pipeline(exported)
    assert equal(dict(pipe.vae.state_dict()), rules.to_theirs(vae.diffusers_rows(cfg.vae), parts["vae"]))
    assert pipe.vae.config.scaling_factor == cfg.vae.scale
    assert pipe.scheduler.config.set_alpha_to_one is False
    assert (pipe.feature_extractor.crop_size["height"], pipe.tokenizer.pad_token_id) == (56, 0)
    text = clip.canonical(pipe.text_encoder.state_dict(), "text")
    exported_text = rules.to_ours(
        clip.text_rows(cfg.clip),
        {row.theirs: parts["clip"][row.theirs] for row in clip.text_rows(cfg.clip)},
    )
    assert equal({new: pipe.text_encoder.state_dict()[old] for new, old in text.items()}, exported_text)


@pytest.mark.usefixtures("no_network")
def test_variants_and_shards_load_too(cfg, parts, exported, tmp_path):
    how = {"variant": "fp16", "dtype": torch.float16, "shard_bytes": 2_000_000}
    layout.write_folder(cfg, parts, tmp_path / "a", **how)
    pipe = load_pipeline(tmp_path / "a", variant="fp16", torch_dtype=torch.float16)
    plain = load_pipeline(exported, torch_dtype=torch.float16)
    for name in ("unet", "vae", "text_encoder", "image_encoder"):
        assert equal(getattr(pipe, name).state_dict(), getattr(plain, name).state_dict())


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


def call_both(cfg, state, theirs, use):
    """One call of our network with `state` and of diffusers', in float64 -> relative distance."""
    with torch.device("meta"):
        ours = UNet(cfg.unet, use)
    checkpoint.fill(ours, state, dtype=torch.float64)
    draw = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    frames = 4
    x, latent, text, vector = normal(1, 4, frames, 6, 8), normal(1, 4, 6, 8), normal(1, 77, 64), normal(1, 64)
    t, fps = torch.tensor([601]), torch.tensor([16])
    planes = [latent, *(torch.full_like(latent, k / (frames - 1)) for k in range(1, frames))]
    with torch.no_grad():
        got = ours.eval()(x, t, ours.prepare(Conditions(text, vector, latent, fps), frames))
        theirs = theirs.double()
        want = theirs(x, t, fps, torch.stack(planes, 2), vector[:, None], encoder_hidden_states=text).sample
    return relative(got, want)


def test_the_folded_unet_computes_what_ours_does(cfg, parts, exported):
    theirs = diffusers.I2VGenXLUNet.from_pretrained(exported / "unet")
    same = dataclasses.replace(cfg.use, sinusoid="exp", frame_planes="network")
    assert cfg.use.concat_gain == 2.0
    assert call_both(cfg, parts["unet"], theirs, same) <= 1e-9
    assert call_both(cfg, parts["unet"], theirs, cfg.use) <= 1e-6  # the official sinusoid and planes
    assert call_both(cfg, parts["unet"], theirs, dataclasses.replace(same, concat_gain=1.0)) > 1e-2


def test_the_unfolded_unet_is_ours_with_gain_one(cfg, parts, tmp_path):
    layout.write_folder(cfg, parts, tmp_path / "plain", fold=False)
    theirs = diffusers.I2VGenXLUNet.from_pretrained(tmp_path / "plain" / "unet")
    settings, _ = layout.settings_from_folder(layout.read_folder(tmp_path / "plain"), compat="diffusers")
    use = merge.from_dict({"use": settings["use"]}).use
    assert (use.concat_gain, use.sinusoid, use.frame_planes) == (1.0, "exp", "network")
    assert call_both(cfg, parts["unet"], theirs, use) <= 1e-9


PROMPT, NEGATIVE = "a red kite over the sea, wow!", "blurry! distorted"
NOISE = np.random.default_rng(0).integers(0, 255, (5, 6, 3), np.uint8)
PICTURE = Image.fromarray(NOISE).resize((96, 80))


@pytest.fixture(scope="module")
def road(cfg):
    """Our model, the draws of seed 3, and our final latents."""
    ours = pipeline.load_parts(dataclasses.replace(cfg, negative_prompt=NEGATIVE))
    draws = SampleNoise(3)
    rows, columns = cfg.latent_size
    posterior, start = draws.draw((4, rows, columns)), draws.draw((4, 3, rows, columns))
    steps = []
    pipeline.generate(ours, [PICTURE], [PROMPT], [3], on_step=steps.append)
    assert len(steps) == 10
    return ours, posterior, start, steps[-1].x


def theirs_of(folder, road, monkeypatch):
    """-> diffusers' pipeline and its final latents, from the same noise."""
    _, posterior, start, _ = road
    pipe = load_pipeline(folder)
    monkeypatch.setattr(diffusers.models.autoencoders.vae, "randn_tensor", lambda *a, **k: posterior)
    how = {"width": 64, "height": 32, "num_frames": 3, "num_inference_steps": 10, "target_fps": 16}
    how |= {"negative_prompt": NEGATIVE, "latents": start, "output_type": "latent"}
    return pipe, pipe(PROMPT, PICTURE, **how).frames


@pytest.mark.usefixtures("no_network")
def test_the_whole_pipeline_end_to_end(exported, road, monkeypatch):
    """With the same picture, prompts and noise, diffusers' pipeline gives our latents and frames."""
    ours, _, _, latents = road
    pipe, theirs = theirs_of(exported, road, monkeypatch)
    assert relative(latents, theirs) <= 1e-4
    frames = pipeline.decode(ours, latents)[0].float()
    decoded = pipe.decode_latents(theirs)[0].detach()
    want = ((decoded / 2 + 0.5).clamp(0, 1) * 255).movedim(0, -1)
    assert (frames - want).abs().max() <= 1.1  # ours truncates to bytes
    assert frames.std() > 5


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("scheduler/scheduler_config.json", {"set_alpha_to_one": True}),
        ("tokenizer/special_tokens_map.json", {"pad_token": "<|endoftext|>"}),
        ("tokenizer/tokenizer_config.json", {"split_special_tokens": False}),  # `wow!` loses its `!`
    ],
)
def test_every_choice_matters_end_to_end(copy, road, monkeypatch, file, values):
    changed(copy / file, **values)
    assert relative(road[-1], theirs_of(copy, road, monkeypatch)[1]) > 1e-3


# ----------------------------------------------------------------------------------------- tokenizer

PROMPTS = [
    "", "a cat", "A Cat on a MAT", "wow!", "!", "!!!", "hello!world !! ok?!", "a!", "stop!now", "..!..",
    "it's they're don't I'd we'll I'm you've", "12345 numbers 3.14", "a  b\tc\nd", "$5 %10 +1 =2 #tag @user",
    "(masterpiece:1.2), [best], {x} <y> | \\ / ~ ^ `", "https://example.org/?a=1&b=2", "snake_case CamelCase",
    "naïve café über straße", "日本語のテキスト", "привет мир", "😀 emoji 🎉!", "x" * 300,
    "word " * 120 + "!", "<|endoftext|> and <|startoftext|> are words",
    config.NEGATIVE_PROMPT,
]  # fmt: skip


def test_the_tokenizer_gives_open_clips_ids(exported, tiny_clip):
    tokenizer = transformers.CLIPTokenizer.from_pretrained(exported / "tokenizer")
    how = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"}
    for prompt in PROMPTS:
        assert torch.equal(tokenizer(prompt, **how).input_ids, tiny_clip.tokenizer([prompt])), prompt
    assert (tokenizer.model_max_length, tokenizer.pad_token_id) == (77, 0)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (49406, 49407)


@pytest.fixture(scope="module")
def tiny_clip(cfg):
    return checkpoint.build("clip", cfg)


def test_the_tokenizer_survives_being_saved_again(exported, tiny_clip, tmp_path):
    transformers.CLIPTokenizer.from_pretrained(exported / "tokenizer").save_pretrained(tmp_path)
    again = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    ids = again("wow! wow !", padding="max_length", max_length=77, return_tensors="pt").input_ids
    assert torch.equal(ids, tiny_clip.tokenizer(["wow! wow !"]))


# ------------------------------------------------------------------------------- reading, variants


def test_a_folder_that_diffusers_saved_is_read(exported, parts, cfg, tmp_path):
    """Saved again by current libraries: sharded, other tokenizer files, the fold still recorded."""
    load_pipeline(exported).save_pretrained(tmp_path / "again", max_shard_size="500KB")
    assert list((tmp_path / "again" / "unet").glob("*index.json"))
    folder = layout.read_folder(tmp_path / "again")
    for compat in (None, "diffusers"):  # in both cases our network computes what the folder's does
        settings, _ = layout.settings_from_folder(folder, compat=compat)
        again = merge.from_dict(settings | {"sample": {"width": 64, "height": 64}})
        assert (again.vae, again.clip, again.use.concat_gain) == (cfg.vae, cfg.clip, 2.0)
    back = to_native(folder, again)
    for part in checkpoint.PARTS:
        assert equal(without_absent(back)[part], without_absent(parts)[part])


@pytest.fixture
def copy(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "copy")
    return tmp_path / "copy"


def test_older_file_names_are_found(copy, parts, cfg):
    for name in layout.MODELS:
        (file,) = (copy / name).glob("*.safetensors")
        stem = "pytorch_model" if "encoder" in name else "diffusion_pytorch_model"
        state = load_file(file)
        if name == "vae":
            old = {new: was for was, new in layout.OLD_VAE_NAMES.items()}
            for new, was in old.items():
                state = {n.replace(new, was) if ".attentions." in n else n: t for n, t in state.items()}
        file.unlink()
        torch.save(state, copy / name / f"{stem}.bin")
    folder = layout.read_folder(copy)
    assert all(part.path.suffix == ".bin" for part in folder.parts.values())
    back = to_native(folder, cfg)
    assert equal(back["vae"], parts["vae"]) and equal(back["unet"], parts["unet"])


def test_safetensors_come_before_bin_and_plain_before_index(copy):
    unet = copy / "unet"
    (unet / "diffusion_pytorch_model.bin").write_bytes(b"never opened")
    assert layout.find_weights(unet).name == "diffusion_pytorch_model.safetensors"
    save_file({"a": torch.zeros(1)}, unet / "diffusion_pytorch_model.fp16.safetensors")
    assert layout.find_weights(unet, "fp16").name == "diffusion_pytorch_model.fp16.safetensors"
    with pytest.raises(ValueError, match="no weights of the variant bf16; give one of variant=fp16"):
        layout.find_weights(unet, "bf16")
    for file in unet.glob("diffusion*model.[sb]*"):
        file.unlink()
    with pytest.raises(ValueError, match="no weights without a variant; give one of variant=fp16"):
        layout.find_weights(unet)


def test_a_single_part_is_a_valid_folder(copy):
    for name in [*layout.COMPONENTS, layout.INDEX]:
        if name != "unet":
            shutil.rmtree(copy / name) if (copy / name).is_dir() else (copy / name).unlink()
    assert layout.is_folder(copy)
    folder = layout.read_folder(copy)
    assert folder.parts.keys() == {"unet"}
    assert layout.settings_from_folder(folder)[0].keys() == {"unet", "use"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "unet" / "config.json").unlink(), "unet lacks its config.json"),
        (lambda f: (f / "vae" / "config.json").write_text("<html>"), "vae/config.json is not readable JSON"),
        (lambda f: (f / "vae" / "config.json").write_text("[]"), "holds a list"),
        (lambda f: next((f / "vae").glob("*.safetensors")).unlink(), "vae holds no weights"),
        (lambda f: shutil.rmtree(f), "is not a diffusers folder"),
    ],
)
def test_damage_is_named(copy, damage, message):
    damage(copy)
    with pytest.raises(ValueError, match=message):
        layout.read_folder(copy)


@pytest.mark.parametrize(
    "record", [2.0, {}, {"concat_gain": 2.0, "folded": 0}, {"concat_gain": "2", "folded": 2}]
)
def test_a_recorded_fold_that_is_not_a_number_is_refused(copy, record):
    changed(copy / "unet" / "config.json", **{layout.RECORD: record})
    with pytest.raises(ValueError, match="expected the numbers concat_gain and folded"):
        layout.read_folder(copy)


# ------------------------------------------------------------------------ settings, trained or theirs


@pytest.fixture
def published(copy):
    """The folder with the values of the published copy."""
    changed(copy / "vae" / "config.json", scaling_factor=0.18125)
    changed(copy / "scheduler" / "scheduler_config.json", set_alpha_to_one=True)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        changed(copy / "tokenizer" / name, pad_token="<|endoftext|>")
    path = copy / "unet" / "config.json"
    plain = {name: value for name, value in json.loads(path.read_text()).items() if name != layout.RECORD}
    path.write_text(json.dumps(plain))
    return layout.read_folder(copy)


def changed(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_trained_values_are_the_default(published):
    settings, notes = layout.settings_from_folder(published)
    cfg = merge.from_dict(settings | {"sample": {"width": 64, "height": 64}})
    assert (cfg.vae.scale, cfg.use.concat_gain, cfg.sample.final_alpha) == (0.18215, 2.0, "first")
    assert (cfg.use.sinusoid, cfg.sample.spacing) == ("pow", "official")
    assert cfg.negative_prompt == config.NEGATIVE_PROMPT
    text = "\n".join(notes)
    assert (
        "0.18125, a known typo" in text
        and "pads with <|endoftext|>; using token 0" in text
        and "twice" in text
    )


def test_diffusers_values_are_a_named_choice(published):
    settings, notes = layout.settings_from_folder(published, compat="diffusers")
    sample = settings["sample"] | {"width": 64, "height": 64}
    cfg = merge.from_dict(settings | {"sample": sample})
    assert (cfg.vae.scale, cfg.use.concat_gain, cfg.sample.final_alpha) == (0.18125, 1.0, "one")
    assert (cfg.use.sinusoid, cfg.use.frame_planes) == ("exp", "network")
    assert (cfg.sample.spacing, cfg.negative_prompt) == ("leading", "")
    assert any("clip.pad_token=49407" in note for note in notes) and settings["clip"]["pad_token"] == 49407
    with pytest.raises(ValueError, match="compat is 'comfy'"):
        layout.settings_from_folder(published, compat="comfy")


def test_another_scale_is_kept_without_a_note(copy):
    changed(copy / "vae" / "config.json", scaling_factor=0.3)
    settings, notes = layout.settings_from_folder(layout.read_folder(copy))
    assert settings["vae"]["scale"] == 0.3 and not any("typo" in note for note in notes)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        (
            "unet",
            {"_class_name": "UNet3DConditionModel"},
            "of the class UNet3DConditionModel; expected I2VGenXLUNet",
        ),
        ("unet", {"block_out_channels": [32, 48]}, "multiple of the first"),
        ("unet", {"down_block_types": ["DownBlock3D", "DownBlock2D"]}, "DownBlock2D; known are"),
        ("unet", {"up_block_types": ["UpBlock3D", "UpBlock3D"]}, "mirrors the down half"),
        ("unet", {"attention_head_dim": [8, 16]}, "share one head width"),
        ("unet", {"norm_num_groups": None}, "always has group norms"),
        ("vae", {"act_fn": "relu"}, "act_fn is relu"),
        ("vae", {"down_block_types": ["AttnDownEncoderBlock2D", "DownEncoderBlock2D"]}, "ours are all"),
        ("vae", {"out_channels": 1}, "requires them to be equal"),
        ("scheduler", {"beta_schedule": "sigmoid"}, "beta_schedule sigmoid"),
        ("scheduler", {"trained_betas": [0.1]}, "trained_betas"),
        ("feature_extractor", {"crop_size": 224}, "crops to 224; the image encoder reads 56"),
    ],
)
def test_configs_of_other_models_are_refused(copy, name, values, message):
    changed(copy / name / layout.COMPONENTS[name][2], **values)
    with pytest.raises(ValueError, match=message):
        layout.settings_from_folder(layout.read_folder(copy))


# --------------------------------------------------------------------- settings, what cannot be written


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        *(
            ("use", {switch: False}, rf"use\.{switch} is false; .* always has this part")
            for switch in config.STRUCTURAL_SWITCHES
            if getattr(config.Use(), switch)
        ),
        ("use", {"frame_positions": True}, r"use\.frame_positions is true; .* never has this part"),
        ("use", {"output": "from_picture"}, r"use\.output is from_picture; .* only supports plain"),
        ("use", {"later_frames": "picture"}, r"use\.later_frames is picture; .* only supports position"),
        ("unet", {"concat_layers": 2}, r"unet\.concat_layers is 2; .* only supports 1"),
        ("unet", {"num_global_tokens": 5}, r"unet\.num_global_tokens is 5; .* only supports 4"),
        ("unet", {"image_vector_width": 32}, r"unet\.image_vector_width is 32"),
        ("unet", {"local_widths": (16, 64)}, r"unet\.local_widths is \(16, 64\)"),
        ("unet", {"first_temporal_heads": 4}, r"unet\.first_temporal_heads is 4"),
        ("unet", {"local_grid": 16}, r"unet\.local_grid is 16"),
        ("vae", {"embed_dim": 3}, r"vae\.embed_dim is 3"),
        ("vae", {"resolution": 32, "attention_resolutions": (16,)}, r"vae\.attention_resolutions"),
        ("schedule", {"cosine_s": 0.01}, r"schedule\.cosine_s is 0\.01"),
        ("schedule", {"prediction": "previous"}, r"schedule\.prediction is previous"),
    ],
)  # fmt: skip
def test_settings_that_diffusers_cannot_express_are_refused(cfg, parts, section, values, message, tmp_path):
    odd = object.__new__(config.Config)  # bypasses the checks across sections
    for field in dataclasses.fields(config.Config):
        value = getattr(cfg, field.name)
        changed_value = dataclasses.replace(value, **values) if field.name == section else value
        object.__setattr__(odd, field.name, changed_value)
    with pytest.raises(ValueError, match=message):
        layout.write_folder(odd, parts, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_tensors_that_do_not_fit_are_refused(cfg, parts, tmp_path):
    less = {**parts, "unet": {n: t for n, t in parts["unet"].items() if n != "conv_out.bias"}}
    with pytest.raises(ValueError, match=r"1 are missing, 0 unknown, 0 .* such as conv_out\.bias"):
        layout.write_folder(cfg, less, tmp_path / "out")
    with pytest.raises(ValueError, match="needs every part; vae is missing"):
        layout.write_folder(cfg, {n: p for n, p in parts.items() if n != "vae"}, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(ValueError, match="not empty"):
        layout.write_folder(cfg, parts, tmp_path / "out")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "precious"]


def test_a_failed_write_leaves_no_files(cfg, parts, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(layout, "write_tokenizer", full)  # the last component
    with pytest.raises(OSError, match="No space left"):
        layout.write_folder(cfg, parts, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_tensors_are_read_one_at_a_time(cfg, parts, tmp_path):
    """If a part is read lazily, little more than one tensor is in memory at any time."""
    alive, most = [0], [0]

    class Lazy(dict):
        def __getitem__(self, name):
            tensor = super().__getitem__(name).clone()
            alive[0] += 1
            most[0] = max(most[0], alive[0])
            weakref.finalize(tensor, lambda: alive.__setitem__(0, alive[0] - 1))
            return tensor

    layout.write_folder(cfg, {name: Lazy(part) for name, part in parts.items()}, tmp_path / "out")
    assert most[0] <= 3


@pytest.mark.parametrize("kind", ["cosine", "linear", "linear_sd", "quadratic"])
@pytest.mark.parametrize("snr", [True, False])
def test_schedules_have_the_same_noise_levels(kind, snr):
    betas = {"init_beta": 0.00085, "last_beta": 0.012} if kind == "linear_sd" else {}
    schedule = config.Schedule(kind=kind, zero_terminal_snr=snr, **betas)
    written = layout.scheduler_config(schedule, config.Sample())
    theirs = diffusers.DDIMScheduler.from_config(written).alphas_cumprod.double()
    for one in (
        schedule,
        merge.from_dict({"schedule": layout.schedule_settings(written)[0]}).schedule,
    ):
        ours = pipeline.make_schedule(dataclasses.replace(config.DEFAULTS, schedule=one)).abar
        assert (ours - theirs).abs().max() <= 2e-6


@pytest.mark.parametrize("spacing", ["official", "leading", "trailing", "linspace"])
def test_steps_are_ours(spacing):
    written = layout.scheduler_config(config.Schedule(), config.Sample(spacing=spacing))
    scheduler = diffusers.DDIMScheduler.from_config(written)
    for steps in (10, 50):
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps.tolist() == timesteps(1000, steps, spacing)
