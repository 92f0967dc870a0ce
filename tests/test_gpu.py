"""On a CUDA device: the numbers of the CPU. `python -m pytest -m gpu`; without a device these are skipped."""

import dataclasses
import json

import pytest
import torch

from i2vgen import pipeline
from i2vgen.fast import compiled, kernels, machine, savings
from i2vgen.files import checkpoint
from i2vgen.settings import config

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Everything off that changes how a number is computed.
PLAIN = ["savings=none", "batch_guidance=false", "attention=math"]
PROMPT, STEPS = "a yellow star moves to the right", 3


@pytest.fixture(scope="module", autouse=True)
def _whole_float32():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def normal(*shape, dtype):
    return torch.randn(*shape, dtype=torch.float64).to("cuda", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(2, 90, 24, 4), (1, 1000, 320, 32), (3, 129, 70, 7)], ids=str)
def test_kernels_are_no_worse_than_plain_operations(dtype, size, monkeypatch):
    """Against the plain operations in float64 on the same inputs."""
    n, p, c, groups = size
    x, weight, bias = normal(n, p, c, dtype=dtype) * 2 + 1, normal(c, dtype=dtype), normal(c, dtype=dtype)
    shift = normal(1, c, dtype=dtype)
    q, k, v = normal(n, 16, p, 3 * 64, dtype=dtype).chunk(3, dim=-1)
    for operation, inputs in (
        (kernels.group_norm, (x, groups, weight, bias, 1e-5, True, shift)),
        (kernels.group_norm, (x, groups, weight, bias, 1e-5, False, None)),
        (kernels.geglu, (torch.cat([x, x.flip(1)], -1),)),
        (kernels.layer_norm, (x, shift[0], weight, bias, 1e-5)),
        (kernels.frame_attention, (q, k, v, 2)),
    ):
        fused = operation(*inputs)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "by_triton", lambda x: False)
            usual = operation(*inputs)
            wide = (i.double() if isinstance(i, torch.Tensor) else i for i in inputs)
            exact = operation(*wide)
        assert fused.dtype == dtype and fused.shape == exact.shape
        error, usual_error = (fused - exact).norm(), (usual - exact).norm()
        assert error <= 1.2 * usual_error or error <= torch.finfo(dtype).eps * exact.norm(), operation


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gpu_gives_the_numbers_of_the_cpu(make_unet, make_inputs, small, dtype):
    """Kernels, the attention that is fastest there, and a recorded step."""
    unet = make_unet()
    x, t, conditions = make_inputs(1, 3)
    wanted = unet(x, t, unet.prepare(conditions, 3))
    unet.to("cuda", dtype)
    cfg = dataclasses.replace(
        config.Config(),
        unet=small,
        clip=config.Clip(embed_dim=12, text=dict(config.Clip().text) | {"width": 16, "heads": 2}),
        sample=config.Sample(width=64, height=64, frames=3),
    )
    savings.apply(unet, cfg.runtime)
    machine.choose_attention(unet, cfg, torch.device("cuda"))
    x, t, *conditions = (value.to("cuda") for value in (x, t, *conditions))
    prepared = unet.prepare(pipeline.Conditions(*conditions), 3)
    play = compiled.Recorded(lambda x, t: unet(x, t, prepared))
    for _ in range(2):
        got = play(x, t).double().cpu()
        # A CPU errs by 7.5 in float32, by 3 in half precision.
        limit = 24 if dtype == torch.float32 else 8
        assert (got - wanted).norm() <= limit * torch.finfo(dtype).eps * wanted.norm()
    assert play.playable


def shipped(root, *words):
    """The shipped model's last latents and frames, floats on the CPU."""
    told = []
    model = pipeline.load(overrides=[f"steps={STEPS}", "seed=7", *words])
    picture = root / "i2vgen" / "assets" / "star.png"
    clip = model(picture, PROMPT, on_step=lambda info: told.append(info.x))
    return told[-1].float().cpu(), torch.from_numpy(clip.frames).float()


@pytest.fixture(scope="module")
def on_the_cpu(root):
    return shipped(root, "device=cpu", *PLAIN)


SETTINGS = [
    PLAIN, [], ["batch_guidance=true"], ["cuda_graph=true"], ["compile=true"], ["memory=balanced"],
    ["memory=low"], ["memory=low", "token_chunk=16", "vae_tile=3"], ["savings=kernels"], ["attention=sdpa"],
    ["sampler=unipc"], ["sampler=dpmpp_2m"],
]  # fmt: skip


@pytest.mark.parametrize("words", SETTINGS, ids=lambda words: " ".join(words[:2]))
def test_every_setting_gives_the_clip_of_the_cpu(root, on_the_cpu, words, recwarn):
    wanted = on_the_cpu
    if any(word.startswith("sampler") for word in words):
        wanted = shipped(root, "device=cpu", *PLAIN, *words)
    got = shipped(root, "device=cuda", "dtype=float32", *words)
    assert (got[0] - wanted[0]).norm() <= 1e-4 * wanted[0].norm()
    assert (got[1] - wanted[1]).abs().max() <= 2
    assert not [w for w in recwarn if "left out" in str(w.message)]  # compiled and recorded for real


@pytest.mark.parametrize("dtype", ["auto", "float16", "bfloat16"])
@pytest.mark.parametrize("more", [[], ["vae_dtype=bfloat16", "encoder_dtype=bfloat16"], ["cuda_graph=true"]])
def test_half_precision_gives_nearly_the_clip_of_the_cpu(root, on_the_cpu, dtype, more):
    _, frames = shipped(root, "device=cuda", f"dtype={dtype}", *more)
    error = ((frames - on_the_cpu[1]) ** 2).mean()
    assert 10 * torch.log10(255**2 / error) >= 35


@pytest.mark.parametrize("storage", ["int8", "float8"])
def test_eight_bits(root, on_the_cpu, storage):
    latents, _ = shipped(root, "device=cuda", "dtype=float32", f"weight_storage={storage}")
    assert (latents - on_the_cpu[0]).norm() <= 0.1 * on_the_cpu[0].norm()


def test_scripts_take_the_gpu_by_themselves(root, run_script, tmp_path):
    given = [f"image={root / 'i2vgen/assets/star.png'}", f"prompt={PROMPT}", "steps=3"]
    status, out = run_script("generate.py", *given, f"output={tmp_path / 'a.mp4'}")
    assert status in (0, None) and (tmp_path / "a.mp4").exists(), out
    record = json.loads((tmp_path / "a.mp4.json").read_text())
    assert record["frames"] == 8
    cascade = root / "configs" / "cascade_small.yaml"
    status, out = run_script("generate.py", cascade, *given, f"output={tmp_path / 'b.png'}")
    assert status in (0, None) and (tmp_path / "b.png").exists(), out
    status, out = run_script("evaluate.py", "clips=4", "steps=3", f"json={tmp_path / 'scores.json'}")
    assert status in (0, None) and json.loads((tmp_path / "scores.json").read_text())["clip_psnr"] > 10, out


TRAIN = [
    "configs/train/small_diffusion.yaml", "train.steps=4", "train.batch=4", "train.num_clips=8",
    "train.save_every=2", "train.log_every=1",
]  # fmt: skip


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def train(run_script, root, folder, *words):
    shipped = root / "i2vgen" / "assets" / "small"
    file, *settings = TRAIN
    status, out = run_script(
        "train.py", root / file, f"weights={shipped}", f"output={folder}", *settings, *words
    )
    assert status in (0, None), out
    return losses(folder)


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_training_has_the_losses_of_the_cpu(root, run_script, tmp_path, precision):
    wanted = train(run_script, root, tmp_path / "cpu", "device=cpu", "train.precision=float32")
    got = train(run_script, root, tmp_path / "gpu", "device=cuda", f"train.precision={precision}")
    assert got == pytest.approx(wanted, rel=2e-3 if precision == "float32" else 5e-2)
    assert checkpoint.missing_parts(tmp_path / "gpu" / "weights") == []


def test_a_killed_training_goes_on(root, run_script, tmp_path):
    words = ["device=cuda", "train.precision=float32", "train.decay=constant"]
    whole = train(run_script, root, tmp_path / "whole", *words)
    train(run_script, root, tmp_path / "two", *words, "train.steps=2")
    on = train(run_script, root, tmp_path / "two", *words, "--resume")
    assert on == pytest.approx(whole, rel=1e-5)


def test_other_parts_train_too(root, run_script, tmp_path):
    words = ["device=cuda", "train.steps=3", "train.log_every=1", "train.workers=1"]
    for part in ("vae", "clip"):
        folder = tmp_path / part
        file = root / "configs" / "train" / f"tiny_{part}.yaml"
        given = [f"weights={tmp_path}/vae/weights"] if part == "clip" else []
        status, out = run_script("train.py", file, f"output={folder}", *given, *words)
        assert status in (0, None), out
        assert len(losses(folder)) == 3
