"""`i2vgen score` from the user's side: clips with known scores, random networks, error messages.

LPIPS, FVD and open_clip run on tiny random networks, which tests the code path but no published value.
"""

import base64
import dataclasses
import functools
import io
import json
import math
import re
from pathlib import Path

import media_files
import numpy as np
import pytest
import torch
from PIL import Image

from i2vgen import __main__ as door
from i2vgen import pipeline
from i2vgen.files import video
from i2vgen.scoring import clips, flow, metrics, networks, scores, stats
from i2vgen.settings.config import LAB
from i2vgen.settings.merge import load_config

ROOT = Path(__file__).parents[1]
NETWORKS = """
import torch

def distance():
    return lambda one, other: (one - other).abs().flatten(1).mean(1)

def features():
    torch.manual_seed(0)
    pool = torch.nn.AdaptiveAvgPool3d((2, 2, 2))
    return torch.nn.Sequential(pool, torch.nn.Flatten(), torch.nn.Linear(24, 3))

def wrong():
    return 7
"""


@pytest.fixture
def run(script_at):
    return script_at("score")


def refused(run, *words):
    status, out, err = run(*words)
    assert status == 2 and out == "" and err.count("\n") == 1, (out, err)
    return err


def texture(height=32, width=32, seed=0):
    """uint8 [h w 3] of smooth colours, which optical flow can follow."""
    rough = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), np.uint8)
    return np.asarray(Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC))


def moving(step=2, frames=4, size=32, seed=0):
    """uint8 [f size size 3]: a texture that moves `step` pixels to the right per frame."""
    wide = texture(size, size + step * frames, seed)
    return np.stack([wide[:, step * (frames - k) :][:, :size] for k in range(frames)])


@functools.cache
def shipped():
    return load_config(None, (), weights=LAB)


def write(folder, name, frames, picture=None, prompt="it moves"):
    """Write a clip and the record that generation would write with it."""
    folder.mkdir(parents=True, exist_ok=True)
    image = folder.parent / f"{name}-picture.png"
    Image.fromarray(frames[0] if picture is None else picture).save(image)
    config = dataclasses.replace(shipped(), save=dataclasses.replace(shipped().save, enlarge=1))
    pipeline.Video(frames, str(image), prompt, 0, config).save(folder / name)


def scored(run, *words):
    status, out, err = run(*words, "json=scores.json")
    assert status == 0, err
    return json.loads(Path("scores.json").read_text()), out


# --- the page


def test_the_page_shows_scores_and_moving_clips(run, tmp_path):
    for folder, step in (("one", 2), ("two", 1)):
        for seed in range(2):
            write(tmp_path / folder, f"{seed}.mp4", moving(step, seed=seed), prompt=f"<b> moves {seed}")
    status, out, err = run("videos=one", "against=two", "metrics=flicker", "output=report")
    assert status == 0 and "page in report/index.html" in out, err
    page = Path("report/index.html").read_text(encoding="utf-8")
    assert json.loads(Path("report/scores.json").read_text())["scores"]["flicker"]["clips"] == 2
    assert page.count("<figure>") == 2 and page.count("&lt;b&gt; moves 0") == 1 and "http" not in page
    assert page.count("flicker") >= 5  # the table, and each clip with its own
    png = re.search(r"base64,([^\"]+)", page)[1]
    assert Image.open(io.BytesIO(base64.b64decode(png))).n_frames == 4

    Path("report/scores.json").unlink()
    status, out, err = run("videos=one", "metrics=flicker", "output=report")
    assert status == 2 and "not from an earlier run" in err


# --- numbers


def test_pictures_agree_with_scikit_image():
    skimage = pytest.importorskip("skimage.metrics")
    one = np.stack([texture(24, 40, seed) for seed in range(2)])
    other = np.clip(one + np.random.default_rng(1).normal(0, 12, one.shape), 0, 255).astype(np.uint8)
    theirs = [
        skimage.structural_similarity(
            a,
            b,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=255,
            channel_axis=-1,
        )
        for a, b in zip(one, other, strict=True)
    ]
    assert metrics.ssim(one, other) == pytest.approx(np.mean(theirs), abs=1e-12)
    assert metrics.psnr(one, other) == pytest.approx(skimage.peak_signal_noise_ratio(one, other), abs=1e-12)
    uniform = skimage.structural_similarity(one[0], other[0], data_range=255, channel_axis=-1)
    assert abs(metrics.ssim(one[0], other[0]) - uniform) > 1e-4  # the planted mistake: another window
    assert metrics.ssim(one, one) == 1.0 and metrics.psnr(one, one) == metrics.MAX_PSNR
    with pytest.raises(ValueError, match="window of 11 x 11"):
        metrics.ssim(one[:, :8], one[:, :8])


@pytest.mark.parametrize(
    "matrix", [(0, 1, -1, 0), (0, -1, -1, 0), (-1, 0, 0, 1)], ids=["turned", "both", "flip"]
)
def test_clips_are_scored_as_a_player_shows_them(run, tmp_path, matrix):
    """A phone's clip is equal to what a player shows, stored as plain frames; unturned it would not be."""
    a, b, c, d = matrix
    for folder in ("phone", "shown"):
        (tmp_path / folder).mkdir()
    path = media_files.write_video(tmp_path / "phone/a.mov", moving(frames=3)[:, :, :24])
    frames = video.load(path)[0]
    video.save(
        (frames if a else frames.swapaxes(1, 2))[:, :: d or b, :: a or c], tmp_path / "shown/a", fps=10
    )
    media_files.turn(path, *matrix)
    found, _ = scored(run, "videos=phone", "reference=shown", "metrics=reference_psnr")
    assert found["scores"]["reference_psnr"]["value"] == metrics.MAX_PSNR


def test_transparent_clips_are_scored_over_white(run, tmp_path):
    layers = np.zeros((2, 16, 16, 4), np.uint8)
    layers[:, 4:8, 4:8] = (200, 30, 30, 255)
    for folder, shown in (("seen", layers), ("white", np.where(layers[..., 3:] == 0, 255, layers)[..., :3])):
        (tmp_path / folder / "a").mkdir(parents=True)
        for number, frame in enumerate(shown):
            Image.fromarray(frame).save(tmp_path / folder / f"a/frame_{number:04}.png")
    found, _ = scored(run, "videos=seen", "reference=white", "metrics=reference_psnr")
    assert found["scores"]["reference_psnr"]["value"] == metrics.MAX_PSNR


def test_flicker_ignores_uniform_change():
    even = np.stack([np.full((8, 8, 3), 10 * k, np.uint8) for k in range(5)])
    blinking = np.stack([np.full((8, 8, 3), 40 * (k % 2), np.uint8) for k in range(5)])
    assert metrics.flicker(even) == 0 and metrics.frame_change(even) == 10
    assert metrics.flicker(blinking) == 40 and metrics.frame_change(blinking) == 40
    assert metrics.sharpness(even) == 0 < metrics.sharpness(texture()[None])


def test_kernel_distance_is_unbiased_and_sees_a_shift():
    """Against the definition, pair by pair; sets of one distribution differ by nothing on average."""
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(4, 3)), rng.normal(size=(5, 3))

    def k(x, y):
        return (x @ y / 3 + 1) ** 3

    inside = [
        np.mean([k(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j]) for x in (one, other)
    ]
    across = np.mean([k(x, y) for x in one for y in other])
    assert stats.kernel_distance(one, other) == pytest.approx(sum(inside) - 2 * across, rel=1e-12)
    same = [stats.kernel_distance(*rng.normal(size=(2, 6, 3))) for _ in range(2000)]
    assert abs(np.mean(same)) < 4 * np.std(same) / 2000**0.5 and min(same) < 0
    assert stats.kernel_distance(rng.normal(size=(50, 3)), rng.normal(size=(50, 3)) + 2) > 1
    with pytest.raises(ValueError, match="at least 2 clips"):
        stats.kernel_distance(one[:1], other)


def test_frechet_distance_of_gaussians_with_known_moments():
    """Features constructed to have the given mean and covariance exactly, where the distance is known."""

    def cloud(mean, covariance):
        n = len(mean)
        root = np.linalg.cholesky(np.array(covariance)) * math.sqrt((2 * n - 1) / 2)
        return np.array(mean) + np.concatenate([root.T, -root.T])  # np.cov divides by 2n - 1

    # Diagonal covariances: sum of (a - b)^2 over means and standard deviations.
    one, other = cloud([1.0, 2.0], np.diag([4.0, 9.0])), cloud([0.0, 4.0], np.diag([1.0, 16.0]))
    assert np.cov(one, rowvar=False) == pytest.approx(np.diag([4.0, 9.0]))
    assert stats.frechet(one, other) == pytest.approx(1 + 4 + (2 - 1) ** 2 + (3 - 4) ** 2, abs=1e-10)
    # Non-commuting covariances: tr (AB)^(1/2) of 2 x 2 matrices is sqrt(tr AB + 2 sqrt(det AB)).
    a, b = np.array([[3.0, 1.0], [1.0, 2.0]]), np.array([[1.0, -0.5], [-0.5, 4.0]])
    want = np.trace(a + b) - 2 * math.sqrt(np.trace(a @ b) + 2 * math.sqrt(np.linalg.det(a @ b)))
    assert stats.frechet(cloud([0, 0], a), cloud([0, 0], b)) == pytest.approx(want, abs=1e-10)
    assert stats.frechet(one, one) == pytest.approx(0, abs=1e-10)
    with pytest.raises(ValueError, match="at least 2 clips"):
        stats.frechet(one[:1], other)


@pytest.mark.parametrize(
    ("degrees", "want"), [(1, 12.7062), (4, 2.7764), (5, 2.5706), (9, 2.2622), (30, 2.0423), (1000, 1.9623)]
)
def test_students_t(degrees, want):  # from a printed table
    assert stats.student(degrees) == pytest.approx(want, abs=5e-4)


def test_95_percent_intervals_cover_the_mean_in_95_percent_of_cases():
    draw = np.random.default_rng(0)
    hit = [
        found.low <= 0 <= found.high for found in (stats.mean(list(draw.normal(size=5))) for _ in range(2000))
    ]
    assert 0.93 < np.mean(hit) < 0.97
    assert stats.mean([3.0]) == (3.0, None, None, 1) and stats.mean([None]) == (None, None, None, 0)


@pytest.mark.parametrize("step", [1, 3])
def test_flow_reads_a_known_motion(step):
    pytest.importorskip("cv2")
    found = flow.measure(moving(step, size=64))
    assert found.motion == pytest.approx(100 * step / 64, rel=0.1)
    noisy = moving(step, size=64)
    noisy[1] = np.clip(noisy[1].astype(int) + 20, 0, 255)
    assert found.warp_error < 1 < flow.measure(noisy).warp_error  # motion compensation keeps the flash


def test_warping_a_linear_ramp_is_exact():
    rows, columns = np.mgrid[:20, :30].astype(float)
    plane = (3 * columns + 2 * rows)[..., None]
    shift = np.broadcast_to(np.array([1.25, -0.5]), (20, 30, 2))
    inner = flow.visible(shift, -shift)
    assert flow.warp(plane, shift)[inner] == pytest.approx((plane + 3 * 1.25 - 2 * 0.5)[inner], abs=1e-12)
    assert inner.sum() == 28 * 19 and not flow.visible(shift, shift).any()  # the way back is wrong


# --- the command


def test_generated_clips_are_scored_without_further_arguments(run, tmp_path, monkeypatch, capsys):
    star = ROOT / "i2vgen" / "assets" / "star.png"
    rows = [
        {"image": str(star), "prompt": f"a star moves {way}", "output": f"made/{way}.mp4"}
        for way in ("up", "down")
    ]
    Path("list.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert door.main(["generate", "items=list.jsonl", "steps=2", "batch=2", "device=cpu"]) == 0
    capsys.readouterr()
    found, out = scored(run, "videos=made", f"clip_weights={LAB}", "device=cpu")
    assert [clip["prompt"] for clip in found["clips"]] == ["a star moves down", "a star moves up"]
    assert {"first_frame_psnr", "clip_text", "clip_image", "clip_consistency", "flicker"} <= found[
        "scores"
    ].keys()
    assert found["scores"]["first_frame_psnr"]["value"] > 15 and found["scores"]["flicker"]["clips"] == 2
    assert 0.5 < found["scores"]["clip_consistency"]["value"] <= 1
    assert "not scored: reference_psnr" in out and "dB" in out
    # The same clips, through the list they were generated from.
    again, _ = scored(run, "videos=list.jsonl", "metrics=first_frame_psnr")
    assert again["scores"]["first_frame_psnr"]["value"] == found["scores"]["first_frame_psnr"]["value"]


def test_the_first_frame_is_compared_with_the_prepared_picture(run, tmp_path):
    """A wide picture equals the first frame only after the crop that generation applies."""
    wide = texture(64, 160)
    Image.fromarray(wide).save("wide.png")
    prepared = clips.picture(clips.Clip("a", Path("a"), image="wide.png"), 32, 32)
    clip = np.stack([prepared] * 4)
    write(tmp_path / "made", "a", clip, picture=wide)
    assert (
        scored(run, "videos=made", "metrics=first_frame_psnr")[0]["scores"]["first_frame_psnr"]["value"] == 99
    )
    squeezed = np.asarray(Image.fromarray(wide).resize((32, 32)))  # the planted mistake: no crop
    write(tmp_path / "made", "a", np.stack([squeezed] * 4), picture=wide)
    assert (
        scored(run, "videos=made", "metrics=first_frame_psnr")[0]["scores"]["first_frame_psnr"]["value"] < 25
    )


def test_enlargement_is_undone(tmp_path):
    frames = moving()
    folder = tmp_path / "made"
    write(folder, "a", frames)
    record = json.loads((folder.parent / "made" / "a.json").read_text())
    video.save(frames, folder / "a", fps=8, enlarge=3)
    record["settings"]["save"]["enlarge"] = 3
    (folder / "a.json").write_text(json.dumps(record))
    (clip,) = clips.find("videos", str(folder))
    assert np.array_equal(clips.frames(clip), frames)
    assert clips.frames(dataclasses.replace(clip, enlarge=1)).shape == (4, 96, 96, 3)


def test_true_clips_by_name(run, tmp_path):
    true = {name: moving(seed=seed) for seed, name in enumerate("abc")}
    for name, frames in true.items():
        write(tmp_path / "true", name, frames)
        write(tmp_path / "made", name, np.clip(frames.astype(int) + 10, 0, 255).astype(np.uint8))
    found, _ = scored(run, "videos=made", "reference=true", "metrics=reference_psnr,reference_ssim")
    for clip in found["clips"]:
        made = np.clip(true[clip["name"]].astype(int) + 10, 0, 255).astype(np.uint8)
        assert clip["scores"]["reference_psnr"] == metrics.psnr(made, true[clip["name"]])
    assert (
        found["scores"]["reference_ssim"]["clips"] == 3
        and found["scores"]["reference_ssim"]["low"] is not None
    )


def test_two_models_are_compared_clip_by_clip(run, tmp_path):
    """Clips differ much more than models: only pairing shows a difference, and none between equal models."""
    draw = np.random.default_rng(0)
    for n in range(6):
        frames = moving(seed=n)
        picture = frames[0]
        noise = draw.normal(0, 4 + 4 * n, frames.shape)
        bad, worse = (np.clip(frames + times * noise, 0, 255).astype(np.uint8) for times in (1, 1.2))
        same = bad if n % 2 else worse
        other = worse if n % 2 else bad
        for model, clip in (("bad", bad), ("worse", worse), ("mixed", same), ("other", other)):
            write(tmp_path / model, f"clip{n}", clip, picture=picture)
    found, out = scored(run, "videos=bad", "against=worse", "metrics=first_frame_psnr,frame_change")
    first = found["differences"]["first_frame_psnr"]
    assert first["says"] == "videos is better" and first["low"] > 0 and first["clips"] == 6
    both = found["scores"]["first_frame_psnr"], found["against"]["scores"]["first_frame_psnr"]
    assert both[0]["low"] < both[1]["value"]  # unpaired, the intervals overlap
    assert first["value"] == pytest.approx(both[0]["value"] - both[1]["value"])
    assert found["differences"]["frame_change"]["says"] == "videos has less"
    found, out = scored(run, "videos=mixed", "against=other", "metrics=first_frame_psnr")
    assert found["differences"]["first_frame_psnr"]["says"] == "inside the error bars" in out
    found, out = scored(run, "videos=worse", "against=bad", "metrics=first_frame_psnr")
    assert found["differences"]["first_frame_psnr"]["says"] == "against is better"


def test_clips_without_a_partner_are_left_out_and_reported(run, tmp_path):
    for model, names in (("one", "abc"), ("two", "bcd")):
        for name in names:
            write(tmp_path / model, name, moving())
    found, out = scored(run, "videos=one", "against=two", "metrics=flicker")
    assert [clip["name"] for clip in found["clips"]] == ["b", "c"] and found["unpaired"] == ["a", "d"]
    assert "left out 2 clips" in out


def test_a_damaged_clip_is_skipped_and_reported(run, tmp_path):
    write(tmp_path / "made", "whole", moving())
    (tmp_path / "made" / "broken.mp4").write_bytes(b"no video")
    found, out = scored(run, "videos=made", "metrics=flicker")
    assert "broken" in found["skipped"] and [c["name"] for c in found["clips"]] == ["whole"]
    assert "skipped 1 of 2 clips" in out and "broken" in out
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "broken.mp4").write_bytes(b"no video")
    assert "none of the clips (1) can be scored" in run("videos=bad")[2]


def test_a_clip_that_cannot_be_scored_costs_no_other(run, tmp_path):
    for name in "abc":
        write(tmp_path / "made", name, moving(frames=1 if name == "c" else 4))
        write(tmp_path / "true", name, moving(frames=3 if name == "a" else 4))
    found, out = scored(run, "videos=made", "reference=true", "metrics=flicker,reference_psnr")
    assert [clip["name"] for clip in found["clips"]] == ["b"] and found["scores"]["flicker"]["clips"] == 1
    assert "frames=3 to compare" in found["skipped"]["a"] and "skipped 2 of 3 clips" in out
    found, _ = scored(run, "videos=made", "against=made", "metrics=flicker")
    assert [clip["name"] for clip in found["clips"]] == ["a", "b"] and found["differences"]["flicker"][
        "clips"
    ] == 2
    assert "flicker needs at least 3 frames" in found["against"]["skipped"]["c"]


def test_scores_that_are_not_numbers_cost_no_other(run, tmp_path):
    Path("mine.py").write_text(
        NETWORKS
        + """
def broken():
    return lambda one, other: (one - other).flatten(1).mean(1) * float("nan")
"""
    )
    write(tmp_path / "made", "a", moving())
    words = ("videos=made", "reference=made", "lpips_network=mine.py:broken")
    assert "its reference_lpips is nan" in run(*words, "metrics=reference_lpips")[2]
    with pytest.warns(UserWarning, match="fvd compares sets of at least 2"):
        found = scores.set_distance("fvd", [np.zeros(3)], [np.zeros(3)])
    assert found.value is None


def test_networks_that_the_user_names(run, tmp_path, monkeypatch):
    """Tiny random networks: the FVD of a set to itself is 0, and so is the LPIPS of a clip to itself."""
    Path("mine.py").write_text(NETWORKS)
    for seed in range(5):
        for model in ("true", "same"):
            write(tmp_path / model, f"c{seed}", moving(seed=seed))
        write(tmp_path / "other", f"c{seed}", moving(step=1, seed=seed + 10))
    words = ("lpips_network=mine.py:distance", "fvd_network=mine.py:features", "metrics=reference_lpips,fvd")
    same, _ = scored(run, "videos=same", "reference=true", *words)
    assert same["scores"]["reference_lpips"]["value"] == 0
    assert same["scores"]["fvd"]["value"] == pytest.approx(0, abs=1e-6)
    other, out = scored(run, "videos=other", "against=same", "reference=true", *words)
    assert other["scores"]["fvd"]["value"] > 1e-3 and other["scores"]["reference_lpips"]["value"] > 0.01
    assert other["against"]["scores"]["fvd"]["value"] == pytest.approx(0, abs=1e-6)
    assert other["scores"]["fvd"]["low"] is None and "no interval" in out
    # The same network from a module.
    monkeypatch.syspath_prepend(str(tmp_path))
    named, _ = scored(
        run, "videos=other", "reference=true", "lpips_network=mine:distance", "metrics=reference_lpips"
    )
    assert named["scores"]["reference_lpips"] == other["scores"]["reference_lpips"]
    err = run("videos=same", "reference=true", "fvd_network=mine.py:wrong", "metrics=fvd")[2]
    assert "returned int, expected a network" in err


class I3dAlike(torch.nn.Module):
    """Takes the three arguments of the usual TorchScript I3D and fails unless they have the right values."""

    def forward(
        self, x: torch.Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False
    ):
        assert x.shape[-1] == 224 and x.min() >= -1
        assert not rescale and not resize and return_features
        return x.mean(dim=[2, 3, 4])


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_torchscript_network(tmp_path):
    torch.jit.script(I3dAlike()).save(tmp_path / "i3d.pt")
    device = torch.device("cpu")
    network = networks.load("fvd_network", str(tmp_path / "i3d.pt"), device)
    vector = networks.FvdFeatures(network, device)(np.full((4, 32, 48, 3), 255, np.uint8))
    assert vector == pytest.approx([1, 1, 1])


def test_a_local_open_clip_checkpoint(run, tmp_path):
    """Random weights of a tiny model give the scores computed directly with its towers."""
    from i2vgen.files import checkpoint

    card = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    Path("card.json").write_text(json.dumps(card))
    settings = load_config(None, ["clip.model=card.json", *networks.JUDGE])
    built = checkpoint.build("clip", settings)
    state = dict(checkpoint.random_state(built, seed=0))
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, "weights.pt")
    write(tmp_path / "made", "a", moving())
    judge = ("clip_model=card.json", "clip_checkpoint=weights.pt", "device=cpu")
    found, _ = scored(run, "videos=made", *judge, "metrics=clip_consistency,clip_text")
    checkpoint.fill(built, state)
    views = torch.stack([networks.ClipJudge(built).view(frame) for frame in moving()])
    with torch.no_grad():
        seen = built.eval().model.encode_image(views, normalize=True)
        text = built.model.encode_text(built.tokenize(["it moves"]), normalize=True)
    values = {name: score["value"] for name, score in found["scores"].items()}
    assert values["clip_consistency"] == pytest.approx(float((seen[1:] * seen[:-1]).sum(-1).mean()), abs=1e-5)
    assert values["clip_text"] == pytest.approx(float((seen @ text.T).mean()), abs=1e-5)

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    torch.save({"state_dict": Evil()}, "weights.pt")
    assert "cannot be read as weights" in refused(run, "videos=made", *judge)
    assert not (tmp_path / "executed").exists()


# --- lists and refusals


def test_lists(run, tmp_path):
    write(tmp_path / "made", "a", moving())
    (tmp_path / "made" / "a.json").unlink()
    Path("list.csv").write_text('file,image,prompt\nmade/a,a-picture.png,"left, then right"\n')
    found, _ = scored(run, "videos=list.csv", "metrics=first_frame_psnr")
    assert (
        found["scores"]["first_frame_psnr"]["value"] == 99
        and found["clips"][0]["prompt"] == "left, then right"
    )
    for text, message in (
        ("{", "not JSON"),
        ("[1]", "expected an object"),
        ('{"image": "a"}', "names no file"),
        ("", "no videos"),
    ):
        Path("list.jsonl").write_text(text)
        assert message in refused(run, "videos=list.jsonl")


def test_missing_requirements_are_reported_before_any_clip_is_read(run, tmp_path, monkeypatch):
    monkeypatch.setattr(clips, "frames", lambda *_: pytest.fail("a clip was read"))
    monkeypatch.setattr(scores, "load_judges", lambda *_: pytest.fail("a network was loaded"))
    write(tmp_path / "made", "a", moving())
    write(tmp_path / "made", "b", moving())
    for name, message in (
        ("clip_text", "clip_weights=FOLDER"),
        ("first_frame_lpips", "lpips_network="),
        ("reference_psnr", "reference=FOLDER"),
        ("beauty", "there is no metric beauty"),
    ):
        assert message in refused(run, "videos=made", f"metrics={name}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install" in refused(run, "videos=made", "metrics=motion")
    assert "pip install nowhere" in refused(run, "videos=made", "lpips_network=nowhere:Net")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(clips, "frames", lambda *_: pytest.fail("a clip was read"))
    (tmp_path / "made" / "b.json").unlink()
    err = refused(run, "videos=made", "metrics=first_frame_psnr")
    assert "1 of 2 lack it" in err and "made/b" in err
    err = refused(run, "videos=made", "metrics=clip_text", f"clip_weights={LAB}")
    assert "prompt of each clip" in err and "1 of 2" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["videos=nowhere"], "does not exist"),
        (["videos=empty"], "holds no videos"),
        (["videos=notes.txt"], "neither a video"),
        (["made"], "write videos=made"),
        (["metrics=flicker"], "no videos given"),
        (["videos=made", "videos=made"], "given twice"),
        (["videos=made", "metrics="], "is empty"),
        (["videos=made", "speed=1"], "there is no speed="),
        (["videos=made", "frames=many"], "whole number"),
        (["videos=made", "fit=squeeze"], "give refuse or crop"),
        (["videos=made", "device=abacus", "metrics=clip_text", "clip_weights=LAB"], "device"),
        (["videos=made", "against=strangers"], "no clip of made has a partner"),
        (["videos=made", "against=others"], "of the same picture and prompt"),
        (["videos=made", "reference=strangers"], "no true video of their name"),
        (["videos=made", "reference=short", "metrics=reference_psnr"], "frames=3 to compare"),
        (["videos=made", "reference=small", "metrics=reference_psnr"], "fit=crop"),
        (["videos=made", "reference=made", "metrics=flicker"], "used by none of the requested scores"),
        (["videos=made", "clip_model=ViT-B-32"], "belong together"),
        (["videos=made", "clip_model=RN50", "clip_checkpoint=x", "clip_weights=y"], "give one of them"),
        (["videos=made", "fvd_network=notes.txt", "reference=made"], "is not a TorchScript file"),
        (["videos=made", "lpips_network=no.py:net"], "no.py does not exist"),
        (["videos=made", "lpips_network=a-b:net"], "not a module name"),
        (["videos=made", "json=made"], "is a folder"),
    ],
)
def test_refusals(run, tmp_path, words, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    write(tmp_path / "made", "a", moving())
    write(tmp_path / "strangers", "z", moving())
    write(tmp_path / "others", "a", moving(), prompt="another thing")
    write(tmp_path / "short", "a", moving(frames=3))
    write(tmp_path / "small", "a", moving(size=16))
    status, _, err = run(*(word.replace("LAB", LAB) for word in words))
    assert status == 2 and message in err and "Traceback" not in err


def test_the_fixes_that_the_messages_suggest_work(run, tmp_path):
    write(tmp_path / "made", "a", moving())
    write(tmp_path / "large", "a", moving(step=4, frames=6, size=64))
    found, _ = scored(run, "videos=made", "reference=large", "metrics=reference_psnr", "frames=3", "fit=crop")
    want = clips.cropped(moving(step=4, frames=6, size=64)[:3], 32, 32)
    assert found["scores"]["reference_psnr"]["value"] == metrics.psnr(moving()[:3], want)


def test_every_metric_is_listed_with_its_requirements(run):
    status, out, _ = run("--list")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert status == 0 and lines.keys() == scores.METRICS.keys()
    for name, metric in scores.METRICS.items():
        assert metric.says in lines[name] and all(need in lines[name] for need in metric.needs)
    assert {need for metric in scores.METRICS.values() for need in metric.needs} == scores.NEEDS.keys()
