"""Training: every part learns, a killed run resumes bit-identically, damaged files are never used."""

import dataclasses
import json
import math
import os
import runpy
import shutil
import socket
import subprocess
import sys

import media_files
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from i2vgen import pipeline
from i2vgen.files import checkpoint, lock, reading, video
from i2vgen.model.conditioning import Conditions
from i2vgen.training import clip, data, diffusion, loop, vae
from i2vgen.training.frozen_model import train_on_frozen_model
from i2vgen.training.settings import Bucket, Train, buckets, load_settings

CPU = torch.device("cpu")
# Smaller than configs/train: 16 x 16 pixels, 4 frames, a latent of 8 x 8.
SMALLER = [
    "sample.width=16", "sample.height=16", "sample.frames=4", "sample.fps=4", "sample.steps=2", "device=cpu",
    "unet.base_width=16", "unet.context_width=32", "vae.width_multipliers=[1,2]", "clip.vision.image_size=16",
    "clip.vision.layers=1", "clip.text.width=32", "train.batch=2", "train.sample_every=0",
]  # fmt: skip
MAKE = {"vae": vae.make, "clip": clip.make, "diffusion": diffusion.make}


@pytest.fixture(scope="module")
def stages(root, tmp_path_factory):
    """Run the three stages with scripts/train.py, three steps each -> the folder that holds their outputs."""
    out = tmp_path_factory.mktemp("stages")
    common = ["device=cpu", "train.steps=3", "train.warmup=1", "train.save_every=2"]
    run(root, "tiny_vae.yaml", f"output={out}/vae", *SMALLER, *common, "train.sample_every=3")
    run(root, "tiny_clip.yaml", f"output={out}/clip", f"weights={out}/vae/weights", *common)
    run(
        root,
        "tiny_diffusion.yaml",
        f"output={out}/diffusion",
        f"weights={out}/clip/weights",
        *common,
        "train.frame_lengths=[2,4]",
        "train.sample_fps=[2,4]",
        "train.bucket_batch=[3,2]",
        "train.sample_every=3",
    )
    return out


def run(root, name, *words):
    """Run scripts/train.py in this process and check that it exits with status 0."""
    before = sys.argv
    sys.argv = ["train.py", str(root / "configs" / "train" / name), *words]
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(root / "scripts" / "train.py"), run_name="__main__")
    finally:
        sys.argv = before
    assert not ended.value.code, words


def settings(root, stages, part, *words):
    """Settings of a small training run of one part, starting from the weights it needs."""
    words = ["device=cpu", "train.warmup=1", *words]
    if part == "vae":
        return load_settings(root / "configs/train/tiny_vae.yaml", [*SMALLER, *words])
    folder = stages / {"clip": "vae", "diffusion": "clip"}[part] / "weights"
    name = root / f"configs/train/tiny_{part}.yaml"
    small = ["train.bucket_batch=[]", "train.frame_lengths=[]", "train.sample_fps=[]", "train.sample_every=0"]
    return load_settings(name, [f"weights={folder}", *small, *words])


def fit(config, train, folder, **how):
    source = data.open_source(config, train)
    part = MAKE[train.part](config, train, source, CPU)
    loop.fit(part, config, train, source, folder, device=CPU, **how)
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# --- settings


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.stepz=3"], r"no setting train\.stepz; did you mean train\.steps"),
        (["train.steps=many"], r"train\.steps is 'many', expected int"),
        (["train.steps=0"], r"train\.steps is 0; give at least 1"),
        (["train.learning_rate=-1"], r"train\.learning_rate is -1\.0"),
        (["train.precision=fp8"], r"train\.precision is 'fp8'"),
        (["train.betas=[0.9]"], r"train\.betas"),
        (["train.frame_lengths=[4,8,16]", "train.sample_fps=[4,8]"], r"frame_lengths has 3 .*sample_fps 2"),
        (["train.frame_lengths=999"], r"train\.frame_lengths = 999 with train\.sample_fps = 16"),
        (["train.frame_lengths=64", "train.sample_fps=4"], r"train\.sample_fps = 4 shows 16\.8 times"),
        (["train.bucket_batch=[1,2]"], r"train\.bucket_batch has 2 entries for 1 buckets"),
        (["train.part=clip", "train.batch=1"], r"train\.part=clip contrasts"),
        (["train.part=vae", "train.checkpointing=true"], r"train\.checkpointing needs train\.part=diffusion"),
        (["train.part=clip", "train.compile=true"], r"train\.compile needs train\.part=diffusion"),
        (["train.part=clip", "train.text_encoder=true"], r"train\.text_encoder needs train\.part=diffusion"),
        (["train.part=vae", "train.clip_unread=true"], r"clip_unread needs train\.part=clip"),
        (["train.part=clip", "train.vae_encoder=false"], r"vae_encoder needs train\.part=vae"),
        (["train.lora_rank=2", "train.text_encoder=true"], r"train\.lora_rank = 2 .*text_encoder out"),
        (["train.data=here", "train.num_clips=2"], r"train\.num_clips = 2 needs train\.data=world"),
        (["train.data=here", "train.flow_weight=1"], r"train\.flow_weight = 1\.0 needs .* train\.data=world"),
        (["train.flip=true"], r"train\.flip is for folders"),
        (["train.validate=1.5"], r"train\.validate is 1\.5; give a fraction"),
        (["train.validate=0.1"], r"write train\.validate=world"),
        (["train.data=here", "train.validate=world"], r"train\.validate=world needs train\.data=world"),
        (["train.part=vae", "train.validate=world"], r"train\.validate needs train\.part=diffusion"),
        (["train.cache=true"], r"train\.cache .* train\.num_clips 0"),
        (["train.cache=true", "train.num_clips=12"], r"train\.num_clips = 12 is not a multiple .* 8"),
        (["sample.stepz=3"], r"no setting sample\.stepz"),
        (["steps=5"], r"steps= is no training setting; write train\.steps=, or sample\.steps= if"),
        (["seed=5"], r"write train\.seed=, or sample\.seed="),
        (["batch=5"], r"write train\.batch=, or runtime\.batch="),
        (["learning_rate=0.1"], r"write train\.learning_rate=$"),
        (["guidance=5"], r"guidance= is a setting of sampling; write sample\.guidance="),
    ],
)
def test_bad_settings_are_refused_by_name(words, message):
    with pytest.raises(ValueError, match=message):
        load_settings(None, words)


def test_a_file_is_a_difference_and_the_command_line_another(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("sample: {frames: 8}\ntrain:\n  steps: 7\n  learning_rate: 1e-4\nnegative_prompt: no\n")
    config, train = load_settings(file, ["train.batch=3", "sample.fps=8"])
    assert (train.steps, train.batch, train.learning_rate, train.ema) == (7, 3, 1e-4, 0.9999)
    assert (config.sample.frames, config.sample.fps, config.negative_prompt) == (8, 8, "no")
    assert buckets(config, train) == [Bucket(8, 8, 3)]
    file.write_text("sample: {framez: 8}\ntrain: {steps: 7}\n")
    with pytest.raises(ValueError, match=rf"{file}: there is no setting sample\.framez"):
        load_settings(file)
    file.write_text("steps: 5\ntrain: {steps: 7}\n")
    with pytest.raises(ValueError, match=rf"{file}: steps= is no training setting"):
        load_settings(file)
    assert load_settings(None, ["width=64", "height=64", "frames=4", "device=cpu"])[0].sample.frames == 4
    file.write_text("train: 7\n")
    with pytest.raises(ValueError, match="train is a group of settings"):
        load_settings(file)


@pytest.mark.parametrize("name", ["weights", "adapter", "log.jsonl"])
def test_other_peoples_files_are_not_replaced(stages, tmp_path, name):
    if name == "log.jsonl":
        (tmp_path / name).write_text("my own notes\n")
    else:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
    config, train = load_settings(None, [])
    with pytest.raises(ValueError, match="choose another"):
        loop.open_folder(tmp_path, config, train, resume=False)


def test_diffusion_without_its_other_parts_is_refused(stages):
    for words in ([], [f"weights={stages}/vae/weights"]):
        config, train = load_settings(None, words)
        with pytest.raises(ValueError, match=r"vae and clip|lacks clip"):
            diffusion.make(config, train, None, CPU)


# --- arithmetic


def test_learning_rate_warms_up_from_above_zero_and_ends_near_zero():
    train = Train(steps=110, warmup=10, learning_rate=1.0 / 2)
    rates = [loop.learning_rate(train, step) for step in range(111)]
    assert rates[:3] == [0.05, 0.1, pytest.approx(0.15)] and rates[9] == rates[10] == 0.5
    assert rates[60] == pytest.approx(0.25) and rates[110] == 0 and 0 < rates[109] < 0.001
    assert loop.learning_rate(dataclasses.replace(train, decay="constant"), 100) == 0.5
    assert loop.learning_rate(dataclasses.replace(train, warmup=0), 0) == 0.5


def test_average_is_the_formula_and_integers_are_copied():
    ema = {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(3)}
    loop.average(ema, {"w": torch.tensor([3.0, 2.0]), "n": torch.tensor(5)}, 0.75)
    assert ema["w"].tolist() == [1.5, 2.0] and ema["n"] == 5
    train = Train(ema=0.9)
    assert loop.ema_decay(train, 0) == 0.1 and loop.ema_decay(train, 1000) == 0.9
    assert loop.ema_decay(dataclasses.replace(train, ema_warmup=False), 0) == 0.9


def test_slow_parameters_are_those_inherited_from_the_image_unet(make_unet, small):
    from weights_conversion.unet_vgen import sd_rows

    unet = make_unet()
    targets = {name for row in sd_rows(small) for name in row.ours}
    assert diffusion.inherited_parameters(unet) == targets
    assert 0 < len(targets) < len(unet.state_dict())


@pytest.mark.parametrize(("mode", "ratio"), [("lr", 0.5), ("grad", 1.0)])
def test_lr_mode_scales_the_update_and_the_official_grad_mode_does_not(mode, ratio):
    """Adam cancels a constant factor on the gradient, which is why the official method is not the default."""
    model = nn.ParameterDict({"fast": torch.zeros(4), "slow": torch.zeros(4)})

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self):
            return {"loss": sum((p - 1).square().sum() for p in model.values())}

    part = loop.Part("unet", model, Step(), None, slow=frozenset({"slow"}))
    train = Train(spatial_scale_mode=mode, warmup=0, learning_rate=0.01, clip_norm=0)
    state = loop.start(part, train, CPU)
    ready = loop.Batches(lambda index: (), in_advance=False)
    figures = loop.update(part, part.step, state, train, ready, device=CPU, rank=0, ranks=1)
    assert figures["lr"] == 0.01 and model["fast"][0].item() == pytest.approx(0.01, rel=1e-4)
    assert (model["slow"] / model["fast"])[0].item() == pytest.approx(ratio, rel=1e-4)


# --- every part learns


@pytest.mark.parametrize(
    ("part", "steps", "rate", "fall"),
    [("vae", 40, 3e-3, 0.6), ("clip", 60, 2e-3, 0.5), ("diffusion", 24, 5e-3, 0.7)],
)
def test_a_few_steps_on_one_batch_lower_the_loss(root, stages, tmp_path, part, steps, rate, fall):
    words = [f"train.steps={steps}", f"train.learning_rate={rate}", "train.batch=4", "train.num_clips=4"]
    words += ["train.log_every=1", "train.save_every=1000", "train.decay=constant", "train.word_dropout=0"]
    config, train = settings(root, stages, part, *words)
    if part == "diffusion":  # the untrained autoencoder's latents are mostly noise, which cannot be learned
        config = dataclasses.replace(config, weights=str(tmp_path / "parts"))
        save_with_narrow_posterior(stages / "clip" / "weights", config)
    losses = [line["loss"] for line in fit(config, train, tmp_path / "run")]
    k = max(1, steps // 6)
    assert np.mean(losses[-k:]) < fall * np.mean(losses[:k])


def save_with_narrow_posterior(folder, config):
    """Save the same parts to `config.weights`, with an autoencoder whose posterior has almost no variance."""
    parts = {part: dict(checkpoint.read_part(folder, part)) for part in ("vae", "clip")}
    for kind, value in (("weight", 0.0), ("bias", -20.0)):
        parts["vae"][f"quant_conv.{kind}"][config.vae.embed_dim :] = value
    checkpoint.save(config.weights, parts, config)


def test_measured_scale_gives_latents_of_spread_one(root, stages):
    config, train = settings(root, stages, "clip")
    assert config.vae.scale != 0.18215
    held = checkpoint.load("vae", config, device=CPU, dtype=torch.float32)
    clips = data.World(config, train)(Bucket(2, 1, 8), range(8))
    frames = clips.pixels.transpose(1, 2).flatten(0, 1)
    noise = torch.randn(16, config.vae.embed_dim, *config.latent_size)
    latents = held.encode(frames, noise)
    assert latents.square().mean().sqrt().item() == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("how", ["train.precision=bf16", "train.precision=fp16", "train.checkpointing=true"])
def test_low_precision_stays_close_and_checkpointing_is_exact(root, stages, tmp_path, how):
    words = ["train.steps=2", "train.batch=1", "train.log_every=1", "train.spatial_scale_mode=grad"]
    runs = {}
    for name, extra in (("plain", []), ("other", [how])):
        config, train = settings(root, stages, "diffusion", *words, *extra)
        config = dataclasses.replace(config, unet=dataclasses.replace(config.unet, dropout=0.1))
        runs[name] = [line["loss"] for line in fit(config, train, tmp_path / name)]
    near = {"rel": 1e-6} if "checkpointing" in how else {"rel": 0.03}
    assert runs["other"] == pytest.approx(runs["plain"], **near)


def test_text_encoder_trains_the_text_tower_and_nothing_else_of_clip(root, stages, tmp_path):
    """One run is killed and resumed: the checkpoint holds the tower's average and moments too."""
    words = ["train.steps=4", "train.save_every=2", "train.log_every=1", "train.text_encoder=true"]
    config, train = settings(root, stages, "diffusion", *words)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    fit(config, train, whole)
    with pytest.raises(KeyboardInterrupt):
        fit(config, train, cut, on_step=lambda step, _: killed(step + 2, _))
    fit(config, train, cut)
    same(whole, cut, "log.jsonl", "weights/clip.safetensors", "weights/unet.safetensors")
    before, after = (
        dict(checkpoint.read_part(folder, "clip")) for folder in (config.weights, whole / "weights")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    read = {"ln_final.weight", "ln_final.bias", "positional_embedding", "token_embedding.weight"}
    assert changed == read | {name for name in before if name.startswith("transformer.resblocks.0.")}
    assert config.clip.text["layers"] == 2  # the UNet does not read the last block, so it is not trained
    pipeline.load_parts(dataclasses.replace(config, weights=str(whole / "weights")))


@torch.no_grad()
def test_the_word_loss_reads_each_word_and_all_words_from_the_padding(root, stages):
    config, train = settings(root, stages, "clip")
    made = clip.make(config, train, data.World(config, train), CPU).step
    tokens = made.clip.tokenize(["a red circle moves left", "grows"])
    read = made.clip.text(tokens) @ made.clip.model.token_embedding.weight.T
    logs, own, padding = read.log_softmax(dim=-1), [], []
    for b, row in enumerate(tokens.tolist()):
        end = row.index(max(row))
        own += [-logs[b, k, row[k]] for k in range(end + 1)]
        words = row[1:end]
        even = -math.log(len(words))  # the words of each caption here differ
        padding += [even - logs[b, k, words].mean() for k in range(end + 1, len(row))]
    want = torch.stack(own).mean() + torch.stack(padding).mean()
    torch.testing.assert_close(made.word_loss(tokens), want, rtol=1e-5, atol=1e-5)


def test_clip_unread_trains_only_what_the_unet_does_not_read(root, stages, tmp_path):
    words = [f"weights={stages}/diffusion/weights", "train.steps=2", "train.save_every=2", "train.batch=2"]
    config, train = settings(root, stages, "clip", *words, "train.clip_unread=true")
    fit(config, train, tmp_path / "run")
    before, after = (
        dict(checkpoint.read_part(folder, "clip"))
        for folder in (config.weights, tmp_path / "run" / "weights")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    last = {name for name in before if name.startswith("transformer.resblocks.1.")}
    assert changed == {"logit_scale", "text_projection", *last}
    assert checkpoint.missing_parts(tmp_path / "run" / "weights") == []  # the UNet is saved too


def test_the_decoder_alone_can_be_trained_after_the_unet(root, stages, tmp_path):
    words = ["device=cpu", "train.part=vae", "train.vae_encoder=false", "train.steps=2", "train.batch=2"]
    config, train = load_settings(None, [*words, f"weights={stages}/diffusion/weights"])
    fit(config, train, tmp_path / "run")
    trained = tmp_path / "run" / "weights"
    before, after = (dict(checkpoint.read_part(folder, "vae")) for folder in (config.weights, trained))
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "post_quant_conv"}
    settings_of = [load_settings(None, [f"weights={folder}"])[0] for folder in (config.weights, trained)]
    assert settings_of[0].vae == settings_of[1].vae  # its scale too
    assert checkpoint.missing_parts(trained) == []  # the UNet is saved too


def test_training_the_decoder_of_no_autoencoder_is_refused(root, stages):
    config, train = settings(root, stages, "vae", "train.vae_encoder=false")
    with pytest.raises(ValueError, match=r"decoder of a trained autoencoder; name it: weights="):
        vae.make(config, train, None, CPU)


def test_training_an_unused_text_tower_is_refused(root, stages):
    config, train = settings(root, stages, "diffusion", "use.text=false", "train.text_encoder=true")
    with pytest.raises(ValueError, match=r"use\.text=false does not read"):
        diffusion.make(config, train, None, CPU)


def test_cached_latents_change_nothing(root, stages, tmp_path, monkeypatch):
    encoded = []
    encode = diffusion.Encoding.encode
    monkeypatch.setattr(
        diffusion.Encoding, "encode", lambda self, clips: encoded.append(1) or encode(self, clips)
    )
    words = ["train.steps=5", "train.batch=2", "train.num_clips=4", "train.log_every=1"]
    logs = [
        fit(*settings(root, stages, "diffusion", *words, f"train.cache={cache}"), tmp_path / cache)
        for cache in ("false", "true")
    ]
    assert logs[0] == logs[1]
    assert len(encoded) == 5 + 2  # without the cache five batches, with it two


def test_making_a_batch_in_advance_changes_nothing(root, stages, tmp_path, monkeypatch):
    """On a GPU the CPU makes the next batch while the GPU computes the present one."""
    words = ["train.steps=3", "train.batch=2", "train.accumulate=2", "train.log_every=1"]
    plain = fit(*settings(root, stages, "diffusion", *words), tmp_path / "plain")
    made = []

    class Ahead(loop.Batches):
        def __init__(self, make, *, in_advance):
            super().__init__(make, in_advance=not in_advance)

        def ahead(self, index):
            super().ahead(index)
            made.extend(self.made)

    monkeypatch.setattr(loop, "Batches", Ahead)
    assert fit(*settings(root, stages, "diffusion", *words), tmp_path / "ahead") == plain
    assert made == [2, 4]  # the first batch of each of the other two steps


@pytest.mark.slow  # a spawned process imports PyTorch first
def test_prefetched_clips_are_cached_too(root, stages, tmp_path):
    words = ["train.steps=5", "train.batch=2", "train.num_clips=4", "train.log_every=1", "train.cache=true"]
    logs = [
        fit(*settings(root, stages, "diffusion", *words, f"train.workers={n}"), tmp_path / str(n))
        for n in (0, 1)
    ]
    assert logs[0] == logs[1]


# --- killed and resumed


WORDS = ("train.steps=6", "train.save_every=2", "train.log_every=3", "train.accumulate=2", "train.batch=1")


def killed(step, _):
    if step == 5:
        raise KeyboardInterrupt


def test_a_killed_run_resumes_bit_identically(root, stages, tmp_path):
    words = [*WORDS, "train.frame_lengths=[2,4]", "train.sample_fps=[2,4]"]
    config, train = settings(root, stages, "diffusion", *words)
    unet = dataclasses.replace(config.unet, dropout=0.1, temporal_conv_dropout=0.1)
    config = dataclasses.replace(config, unet=unet)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    fit(config, train, whole)
    with pytest.raises(KeyboardInterrupt):
        fit(config, train, cut, on_step=killed)
    assert [p.name for p in loop.checkpoints(cut)] == ["checkpoint-00000002", "checkpoint-00000004"]
    assert len((cut / "log.jsonl").read_text().splitlines()) == 1  # step 4 waits in the checkpoint
    steps = []
    fit(config, train, cut, on_step=lambda step, _: steps.append(step))
    assert steps == [5, 6]
    same(whole, cut, "log.jsonl", "weights/unet.safetensors", "checkpoint-00000006/state.safetensors")


def test_an_incomplete_checkpoint_is_never_used(root, stages, tmp_path):
    config, train = settings(root, stages, "vae", *WORDS)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    fit(config, train, whole)
    with pytest.raises(KeyboardInterrupt):
        fit(config, train, cut, on_step=killed)
    state = cut / "checkpoint-00000004" / loop.STATE  # what a crash of the machine can leave behind
    state.write_bytes(state.read_bytes()[:-100])
    shutil.copytree(cut / "checkpoint-00000002", cut / ".checkpoint-00000006.writing-00000000-1")
    (cut / "checkpoint-00000008").mkdir()
    assert [p.name for p in loop.checkpoints(cut)] == ["checkpoint-00000002"]
    steps = []
    fit(config, train, cut, on_step=lambda step, _: steps.append(step))
    assert steps == [3, 4, 5, 6]
    assert not list(cut.glob(".*"))
    same(whole, cut, "log.jsonl", "weights/vae.safetensors", "checkpoint-00000006/state.safetensors")


def same(a, b, *names):
    for name in names:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def test_a_full_disk_leaves_the_old_checkpoint(root, stages, tmp_path, monkeypatch):
    config, train = settings(root, stages, "vae", "train.steps=4", "train.save_every=2")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    def fill(step, _):
        if step == 3:
            monkeypatch.setattr(loop, "write_safetensors", full)

    with pytest.raises(OSError, match="No space left"):
        fit(config, train, tmp_path, on_step=fill)
    assert [p.name for p in tmp_path.iterdir() if "checkpoint" in p.name] == ["checkpoint-00000002"]
    monkeypatch.undo()
    assert fit(config, train, tmp_path)[-1]["step"] == 4


def test_another_run_in_the_folder_is_refused_by_name(root, stages, tmp_path):
    shutil.copytree(stages / "vae", tmp_path / "run")
    words = ("train.steps=3", "train.save_every=2", "train.frame_lengths=2", "train.sample_fps=1")
    config, train = settings(root, stages, "vae", *words)
    other = dataclasses.replace(config, unet=dataclasses.replace(config.unet, base_width=32))
    with pytest.raises(
        ValueError, match=r"unet\.base_width is 32 here but 16 in .*checkpoint-00000003; choose"
    ):
        fit(other, train, tmp_path / "run", resume=True)
    longer = dataclasses.replace(train, steps=4)
    with pytest.raises(ValueError, match=r"train\.steps is 4 here but 3 in .* --resume"):
        fit(config, longer, tmp_path / "run")
    assert fit(config, longer, tmp_path / "run", resume=True)[-1]["step"] == 4
    with pytest.raises(ValueError, match="no checkpoint to resume"):
        fit(config, train, tmp_path / "new", resume=True)


def test_a_run_is_not_resumed_with_another_output_layer(root, stages, tmp_path):
    words = ("train.steps=1", "schedule.prediction=x0")
    fit(*settings(root, stages, "diffusion", *words), tmp_path)
    other = settings(root, stages, "diffusion", *words, "use.output=moved")
    with pytest.raises(ValueError, match=r"use\.output is moved here but plain in .* choose another output$"):
        fit(*other, tmp_path, resume=True)


# --- conditions


def test_dropped_conditions_reach_the_network(root, stages):
    config, train = settings(root, stages, "diffusion", "train.text_dropout=1", "train.image_dropout=1")
    source = data.open_source(config, train)
    part = diffusion.make(config, train, source, CPU)
    clips = source(Bucket(4, 4, 2), [0, 1])
    with torch.no_grad():
        x0, t, noise, lost = part.inputs(clips, data.generator(0))
        kept_train = dataclasses.replace(train, text_dropout=0.0, image_dropout=0.0)
        held = part.inputs
        keeping = diffusion.Encoding(config, kept_train, held.vae, held.clip, CPU)
        kept_x0, kept_t, _, kept = keeping(clips, data.generator(0))
    assert torch.equal(x0, kept_x0) and torch.equal(t, kept_t)
    negative = held.clip.text(held.clip.tokenize([config.negative_prompt]))
    # A batch of one and a batch of two may take different kernels.
    assert torch.allclose(lost.text, negative.expand(2, -1, -1), atol=1e-6)
    assert not torch.allclose(lost.text, kept.text, atol=1e-2)
    assert lost.image_vector.abs().max() == 0 < kept.image_vector.abs().max()
    assert lost.fps.tolist() == [4, 4] and lost.image_latent.shape == x0[:, :, 0].shape

    checkpoint.inner(part.model).load_state_dict(dict(checkpoint.random_state(part.model, seed=0)))
    part.step.eval()
    losses = [
        part.step(x0, t, noise, Conditions(text, vector, lost.image_latent, lost.fps))["loss"].item()
        for text, vector in (
            (lost.text, lost.image_vector),
            (kept.text, lost.image_vector),
            (lost.text, kept.image_vector),
        )
    ]
    assert len(set(losses)) == 3


def test_noisy_timesteps_can_be_drawn_more_often():
    plain = diffusion.draw_timesteps(50, 1000, 1.0, data.generator(3))
    assert torch.equal(plain, torch.randint(0, 1000, (50,), generator=data.generator(3)))
    t = diffusion.draw_timesteps(20_000, 1000, 2.0, data.generator(3))
    assert t.min() >= 0 and t.max() == 999
    assert (t >= 800).float().mean().item() == pytest.approx(0.2**0.5, abs=0.02)


def test_timesteps_cover_the_last_one(root, stages):
    config, train = settings(root, stages, "diffusion")
    config = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, num_timesteps=4))
    part = diffusion.make(config, train, None, CPU)
    clips = data.World(config, train)(Bucket(2, 4, 2), [0, 1])
    with torch.no_grad():
        seen = {t for k in range(12) for t in part.inputs(clips, data.generator(k))[1].tolist()}
    assert seen == {0, 1, 2, 3}


# --- clips from a folder


@pytest.fixture
def folder(tmp_path):
    """Two good clips of 9 frames at 10 fps, a short, a broken one, and one orphan of each kind."""
    frames = (np.arange(9)[:, None, None, None] * 20 + np.zeros((1, 20, 24, 3))).astype(np.uint8)
    for name, count in (("a.gif", 9), ("sub/b.gif", 9), ("short.gif", 2), ("orphan.gif", 9)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        video.save(frames[:count], tmp_path / name, fps=10)
    video.save(frames.repeat(2, 1).repeat(2, 2), tmp_path / "c.mp4", fps=10)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    rows = "".join(
        f"{n},what {n} shows\n"
        for n in ("a.gif", "sub/b.gif", "c.mp4", "short.gif", "broken.mp4", "gone.gif")
    )
    (tmp_path / "captions.csv").write_text("file,caption\n" + rows)
    return tmp_path


def folder_settings(path, *words):
    return load_settings(None, [f"train.data={path}", "sample.width=64", "sample.height=64", *words])


def test_a_fraction_holds_out_clips_that_can_be_used(folder, caplog):
    words = ("train.frame_lengths=4", "train.sample_fps=5")
    seen = set()
    for share in (0.1, 0.4, 0.9):
        config, train = folder_settings(folder, *words, f"train.validate={share}")
        source = data.open_source(config, train)
        assert source.held_out.files and {*source.held_out.files} <= {"a.gif", "sub/b.gif", "c.mp4"}
        assert not {*source.held_out.files} & {*source.files} and "broken.mp4" in source.files
        seen.add(len(source.held_out.files))
    assert seen == {1, 2, 3}


def test_a_rate_that_whole_frames_cannot_give_is_told_once(folder, caplog):
    config, train = folder_settings(folder, "train.frame_lengths=3", "train.sample_fps=4")
    source = data.open_source(config, train)
    source(Bucket(3, 4, 3), [0, 1, 2])
    told = [r.getMessage() for r in caplog.records if "frames a second in place of" in r.getMessage()]
    assert (
        len(told) == 1
        and "every 2nd frame of" in told[0]
        and "gives 5 frames a second in place of 4" in told[0]
    )
    config, train = folder_settings(folder, "train.frame_lengths=3", "train.sample_fps=5")
    caplog.clear()
    data.open_source(config, train)(Bucket(3, 5, 3), [0, 1, 2])
    assert "in place of" not in caplog.text


def test_two_trainings_do_not_share_a_folder(root, stages, tmp_path, caplog):
    config, train = settings(root, stages, "vae", "train.steps=2", "train.save_every=9")
    (tmp_path / "run").mkdir()
    with lock.locked(tmp_path / "run"), pytest.raises(ValueError, match=r"is working in .*run; wait"):
        fit(config, train, tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
    caplog.set_level("INFO")
    fit(config, train, tmp_path / "run")
    shutil.rmtree(loop.checkpoints(tmp_path / "run")[0])
    shutil.rmtree(tmp_path / "run" / "weights")
    caplog.clear()
    fit(config, train, tmp_path / "run")
    assert "holds a log but no checkpoint (train.save_every = 9 steps" in caplog.text
    longer = dataclasses.replace(train, steps=3)
    fit(config, longer, tmp_path / "run", resume=True)
    assert "continuing from checkpoint-00000002, step 2" in caplog.text


def test_a_folder_gives_its_good_clips_and_names_the_bad_ones(folder, caplog):
    config, train = folder_settings(folder, "train.frame_lengths=4", "train.sample_fps=5")
    source = data.open_source(config, train)
    clips = [source(Bucket(4, 5, 2), [2 * k, 2 * k + 1]) for k in range(6)]
    assert {c for batch in clips for c in batch.captions} == {
        f"what {n} shows" for n in ("a.gif", "sub/b.gif", "c.mp4")
    }
    assert clips[0].pixels.shape == (2, 3, 4, 64, 64) and clips[0].fps == 5
    for (
        batch
    ) in clips:  # grey levels rise by 20 per frame of the file; every second frame is used, none is empty
        levels = (batch.pixels.mean(dim=(1, 3, 4)) + 1) * 127.5
        assert ((levels.diff(dim=1) - 40).abs() < 4).all()
    again = source(Bucket(4, 5, 2), [0, 1])
    assert torch.equal(again.pixels, clips[0].pixels)
    assert {name for name, _ in source.skipped} == {"short.gif", "broken.mp4"}
    assert "1 caption without a file" in caplog.text and "gone.gif" in caplog.text
    assert "1 file without a caption" in caplog.text and "orphan.gif" in caplog.text
    assert (
        "skipping broken.mp4" in caplog.text and "2 frames at 10 fps are too short for 4 at 5" in caplog.text
    )


def test_a_folder_reads_every_format_as_it_is_shown(tmp_path):
    """Whatever video= reads: other containers and endings, PNG folders, a phone's turned video."""
    frames = np.full((9, 24, 24, 3), 40, np.uint8)
    frames[:, :12] = 220  # light above, dark below
    frames += 4 * np.arange(9, dtype=np.uint8)[:, None, None, None]  # GIF and WebP join equal frames
    codecs = {"webm": "libvpx-vp9", "avi": "mpeg4"}
    for ending in ("mov", "webm", "mkv", "avi", "mp4", "ts"):
        path = tmp_path / f"{ending}.{ending}"
        media_files.write_video(path, frames, codec=codecs.get(ending, "libx264"))
    shutil.copy(tmp_path / "mp4.mp4", tmp_path / "apple.m4v")
    for name in ("webp.webp", "gif.gif", "pngs"):
        video.save(frames, tmp_path / name, fps=10)
    (tmp_path / "mp4.mp4").rename(tmp_path / "noending")
    turned = media_files.write_video(tmp_path / "turned.mov", np.rot90(frames, axes=(1, 2)))
    media_files.turn(turned, 0, 1, -1, 0)  # stored lying on its side, as phones do
    for name in ("._hidden.mp4", "notes.txt"):
        (tmp_path / name).write_text("no clip")
    names = sorted(p.name for p in tmp_path.iterdir() if p.name[0] != ".")
    (tmp_path / "captions.csv").write_text("file,caption\n" + "".join(f"{n},{n}\n" for n in names))
    config, train = folder_settings(tmp_path, "train.frame_lengths=4", "train.sample_fps=5")
    source = data.open_source(config, train)
    assert source.files == names and not source.without_file and not source.without_caption
    batch = source(Bucket(4, 5, 22), list(range(22)))
    assert set(batch.captions) == set(names) - {"notes.txt"}
    assert {name for name, _ in source.skipped} == {"notes.txt"}
    levels = (batch.pixels.mean(dim=(1, 2, 4)) + 1) * 127.5  # by row
    assert levels[:, 8:24].min() > 200 and levels[:, 40:56].max() < 90


@pytest.mark.parametrize(("alpha", "level"), [("white", 255), ("drop", 30)])
def test_transparent_parts_are_shown_as_for_pictures(tmp_path, alpha, level):
    layers = np.full((24, 24, 4), (30, 30, 30, 0), np.uint8)
    (tmp_path / "a").mkdir()
    for number in range(4):
        Image.fromarray(layers).save(tmp_path / f"a/frame_{number:04}.png")
    (tmp_path / "captions.csv").write_text("file,caption\na,nothing\n")
    words = ("train.frame_lengths=4", "train.sample_fps=8", f"preprocess.alpha={alpha}")
    batch = data.open_source(*folder_settings(tmp_path, *words))(Bucket(4, 8, 1), [0])
    assert ((batch.pixels + 1) * 127.5).round().unique().tolist() == [level]


def test_a_draw_reads_only_the_frames_it_shows(tmp_path, monkeypatch):
    frames = np.zeros((60, 24, 24, 3), np.uint8)
    media_files.write_video(tmp_path / "a.mp4", frames)
    (tmp_path / "captions.csv").write_text("file,caption\na.mp4,dark\n")
    config, train = folder_settings(tmp_path, "train.frame_lengths=4", "train.sample_fps=5")
    source, convert, converted = data.open_source(config, train), reading._pixels, []
    monkeypatch.setattr(reading, "_pixels", lambda *given: converted.append(1) or convert(*given))
    source(Bucket(4, 5, 1), [3])
    assert len(converted) == 4


@pytest.mark.parametrize(
    ("written", "stored"),
    [
        ("Boat.MP4", "boat.mp4"),
        ("sub\\\\a.mp4", "sub/a.mp4"),
        ("boat", "boat.mov"),
        ("\u00e9.gif", "e\u0301.gif"),
    ],
    ids=["case", "backslash", "no ending", "unicode"],
)
def test_a_name_spelled_otherwise_gets_a_hint(tmp_path, written, stored):
    (tmp_path / stored).parent.mkdir(exist_ok=True)
    (tmp_path / stored).write_bytes(b"x")
    (tmp_path / "captions.jsonl").write_text(f'{{"file": "{written}", "caption": "a boat"}}\n', "utf-8")
    with pytest.raises(ValueError, match=r"the captions say .* but the file is called") as error:
        data.open_source(*folder_settings(tmp_path))
    assert ascii(stored) in str(error.value)  # in ASCII, or both look alike


def test_a_folder_of_pictures_under_other_names_gets_a_hint(folder, caplog):
    (folder / "pictures").mkdir()
    Image.new("RGB", (16, 16)).save(folder / "pictures/1.png")
    captions = next(folder.glob("captions.*"))
    captions.write_text(captions.read_text() + "pictures,a boat\n")
    data.open_source(*folder_settings(folder, "train.frame_lengths=4", "train.sample_fps=5"))
    assert "pictures is a folder without frame_0000.png" in caplog.text


def test_every_possible_start_is_drawn_and_none_beyond(folder):
    """The official code never draws the last start, and computes stride 0 for a file of a lower rate."""
    config, train = folder_settings(folder, "train.frame_lengths=4", "train.sample_fps=5")
    source = data.open_source(config, train)
    first = {round(((c.pixels[0, :, 0].mean().item()) + 1) * 127.5 / 20)
             for c in (source(Bucket(4, 5, 1), [k]) for k in range(60))}  # fmt: skip
    assert first == {0, 1, 2}  # 9 frames, every second one of which is used
    assert [data.num_starts(4, 3, Bucket(4, 16, 1)), data.num_starts(6, 10, Bucket(4, 5, 1))] == [1, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: shutil.rmtree(p), "is not a folder"),
        (lambda p: (p / "captions.csv").unlink(), r"holds 0 of captions\.csv"),
        (lambda p: (p / "captions.csv").write_text("file,caption\n"), "no clip to train on: 0 captions"),
        (
            lambda p: (p / "captions.csv").write_text("name,text\na.gif,x\n"),
            "columns 'name', 'text'; it",
        ),
        (lambda p: (p / "captions.csv").write_text("file,caption\n../x.gif,x\n"), "outside the folder"),
        (lambda p: (p / "captions.csv").write_bytes(b"\xff\xfe\x00"), "cannot be read"),
        (lambda p: (p / "captions.jsonl").write_text("{}"), r"holds 2 of"),
    ],
)
def test_an_unusable_folder_is_an_error_before_any_work(folder, change, message):
    change(folder)
    with pytest.raises(ValueError, match=message):
        data.open_source(*folder_settings(folder))


def test_a_bucket_that_no_clip_fills_is_refused(folder):
    config, train = folder_settings(folder, "train.frame_lengths=16", "train.sample_fps=10")
    with pytest.raises(ValueError, match=r"train\.frame_lengths = 16 with train\.sample_fps = 10 \("):
        data.open_source(config, train)


def test_captions_as_json_lines(folder):
    (folder / "captions.csv").unlink()
    (folder / "captions.jsonl").write_text('{"file": "a.gif", "caption": "a, with a comma"}\n\n')
    config, train = folder_settings(folder, "train.frame_lengths=2")
    assert data.open_source(config, train)(Bucket(2, 16, 1), [7]).captions == ("a, with a comma",)


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("captions", lambda p: (p / "captions.csv").write_text("file,caption\na.gif,x\nsub/b.gif,y\n")),
        ("clips", lambda p: (p / "a.gif").write_bytes((p / "short.gif").read_bytes())),
        ("clips", lambda p: (p / "sub" / "b.gif").unlink()),
    ],
)
def test_resuming_on_other_clips_or_captions_is_refused(what, change, folder, root, stages):
    rows = "a.gif,what a shows\nsub/b.gif,what b shows\n"
    (folder / "captions.csv").write_text("file,caption\n" + rows)
    words = [f"train.data={folder}", "train.steps=2", "train.sample_fps=10"]
    config, train = settings(root, stages, "vae", *words)
    out = folder.with_name(folder.name + "-out")
    lines = fit(config, train, out)
    assert fit(config, train, out) == lines  # nothing changed: it goes on
    change(folder)
    with pytest.raises(ValueError, match=rf"holds other {what} than when .*checkpoint-00000002 was saved"):
        fit(config, train, out)
    assert fit(config, train, out, resume=True) == lines


# --- the world as a source


def test_the_world_is_a_function_of_the_position(root):
    config, train = load_settings(root / "configs/train/tiny_vae.yaml", SMALLER)
    source = data.open_source(config, train)
    a, b = source(Bucket(4, 4, 2), [3, 4]), source(Bucket(4, 4, 1), [4])
    assert torch.equal(a.pixels[1], b.pixels[0]) and a.captions[1] == b.captions[0]
    assert torch.allclose(source(Bucket(2, 4, 1), [4]).pixels[:, :, 0], b.pixels[:, :, 0])
    other = data.World(config, dataclasses.replace(train, seed=1))(Bucket(4, 4, 1), [4])
    assert not torch.equal(other.pixels, b.pixels)


# --- the script


def test_the_three_stages_make_a_model_that_generates(stages, picture):
    for part, held in (("vae", ["vae"]), ("clip", ["vae", "clip"]), ("diffusion", ["unet", "vae", "clip"])):
        missing = checkpoint.missing_parts(stages / part / "weights")
        assert sorted(held) == sorted(set(checkpoint.PARTS) - set(missing))
    assert (stages / "vae/samples/00000003.png").is_file()
    assert (stages / "diffusion/samples/00000003.png").is_file()
    origin = json.loads((stages / "diffusion/weights/origin.json").read_text())
    assert origin["trained"] == "unet" and origin["steps"] == 3
    assert origin["before"][0]["trained"] == "clip" and origin["before"][0]["before"][0]["trained"] == "vae"
    model = pipeline.load(stages / "diffusion" / "weights", overrides=["device=cpu"])
    clip_ = model(picture, "a small red circle moves to the left", seed=1)
    assert clip_.frames.shape == (4, 16, 16, 3)


def test_curves_and_strips_reach_tensorboard(stages):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reading.EventAccumulator(str(stages / "diffusion" / "tensorboard")).Reload()
    assert {"loss", "lr", "grad_norm"} <= set(events.Tags()["scalars"])
    assert [image.step for image in events.Images("samples")] == [3]


def test_script_help_and_rerunning_a_finished_run(root, stages, capsys, tmp_path):
    run(root, "tiny_vae.yaml", "--help")
    assert "i2vgen train configs/train/tiny_vae.yaml" in capsys.readouterr().out
    run(root, "tiny_vae.yaml", "--print-config", "train.steps=77")
    printed = capsys.readouterr().out
    (tmp_path / "again.yaml").write_text(printed)
    assert load_settings(tmp_path / "again.yaml") == load_settings(
        root / "configs/train/tiny_vae.yaml", ["train.steps=77"]
    )
    before = (stages / "clip/log.jsonl").read_bytes()
    words = ["device=cpu", "train.steps=3", "train.warmup=1", "train.save_every=2"]
    run(root, "tiny_clip.yaml", f"output={stages}/clip", f"weights={stages}/vae/weights", *words)
    assert (stages / "clip/log.jsonl").read_bytes() == before


def test_two_processes_equal_one_with_two_accumulated_batches(root, stages, tmp_path, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "RANK": 0}.items():
        monkeypatch.setenv(name, str(value))
    words = [f"output={tmp_path}/two", *SMALLER, "train.steps=2", "train.warmup=1", "train.log_every=1"]
    words.append("train.precision=float32")  # the other process may see units for bfloat16
    script = [sys.executable, str(root / "scripts/train.py"), str(root / "configs/train/tiny_vae.yaml")]
    env = {**os.environ, "RANK": "1", "LOCAL_RANK": "1", "OMP_NUM_THREADS": "1"}
    other = subprocess.Popen([*script, *words], env=env, stderr=subprocess.PIPE, text=True)
    try:
        run(root, "tiny_vae.yaml", *words)
        assert other.wait(60) == 0, other.stderr.read()
    finally:
        other.kill()
        other.communicate()
    config, train = settings(root, stages, "vae", "train.steps=2", "train.log_every=1", "train.accumulate=2")
    one = fit(config, train, tmp_path / "one")
    two = [json.loads(line) for line in (tmp_path / "two/log.jsonl").read_text().splitlines()]
    assert len(one) == len(two) == 2
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.slow  # a spawned process imports PyTorch first
def test_prefetching_gives_the_same_batches(root):
    config, train = load_settings(root / "configs/train/tiny_vae.yaml", SMALLER)
    source = data.open_source(config, train)

    def plan(index):
        return Bucket(2, 4, 2), [2 * index, 2 * index + 1]

    with data.Prefetcher(source, plan, 1) as prefetched:
        for index in (5, 6, 7, 8, 9):
            drawn, wanted = prefetched(index), source(*plan(index))
            assert torch.equal(drawn.pixels, wanted.pixels) and drawn[1:] == wanted[1:]
    words = [*SMALLER, "train.part=diffusion", "train.flow_weight=1"]
    source = data.open_source(*load_settings(root / "configs/train/tiny_vae.yaml", words))
    with data.Prefetcher(source, plan, 1) as prefetched:
        assert torch.equal(prefetched(0).flow, source(*plan(0)).flow)


def test_the_true_flow_teaches_where_things_move(root, stages, tmp_path):
    words = ["train.batch=4", "train.num_clips=4", "train.log_every=1", "train.cache=true"]
    words += ["use.output=moved", "schedule.prediction=x0", "train.learning_rate=0.002"]
    words += ["train.validate=world", "train.validate_clips=2", "train.validate_every=40"]
    taught, untaught = (
        fit(*settings(root, stages, "diffusion", *words, *own), tmp_path / own[0])
        for own in (["train.flow_weight=2", "train.steps=40"], ["train.flow_weight=0", "train.steps=1"])
    )
    error = [line["flow_error"] for line in taught if "flow_error" in line]
    assert sum(error[-5:]) < 0.85 * 5 * error[0]
    assert "flow_error" not in untaught[0]
    assert taught[0]["loss"] == pytest.approx(untaught[0]["loss"] + 2 * error[0], rel=1e-3)


def test_a_flow_that_the_unet_does_not_have_is_not_trained(root, stages):
    config, train = settings(root, stages, "diffusion", "train.flow_weight=1")
    with pytest.raises(ValueError, match=r"set use\.output=moved"):
        MAKE["diffusion"](config, train, data.open_source(config, train), CPU)


def test_training_on_a_frozen_model_refuses_to_train_the_text_tower(tiny_model):
    with pytest.raises(ValueError, match="text_encoder trains the model's text tower"):
        next(train_on_frozen_model(tiny_model, nn.Linear(1, 1), None, Train(text_encoder=True)))
