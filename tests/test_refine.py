"""The second stage: its road, the sizes it takes, what it refuses, what `i2vgen generate` makes of it."""

import copy
import dataclasses
import json
import warnings
from fractions import Fraction
from pathlib import Path

import av
import media_files
import numpy as np
import pytest
import torch
from PIL import Image

from i2vgen import pipeline
from i2vgen.diffusion.noise import SampleNoise
from i2vgen.fast import savings
from i2vgen.files import checkpoint, records, video
from i2vgen.memory import plans
from i2vgen.memory.meter import Meter
from i2vgen.model.conditioning import Conditions
from i2vgen.model.unet import UNet
from i2vgen.refiner import fitting, refine
from i2vgen.settings import config, merge

SCRIPT = Path(__file__).parents[1] / "scripts" / "generate.py"


@pytest.fixture(scope="module")
def job(road):
    """Settings of a small second stage: two levels, 2-pixel latents, sizes that are multiples of 4."""
    stage = config.Refine(width=20, height=16, steps=3, window=4, overlap=1, fit="stretch")
    return dataclasses.replace(road.config, refine=stage, weights="", refine_weights="random")


@pytest.fixture(scope="module")
def refiner(job, road):
    stage = merge.second_stage(job)
    unet = checkpoint.load(
        "unet", dataclasses.replace(stage, weights="random"), device="cpu", dtype=torch.float64
    )
    return refine.Refiner(stage, unet, road.vae, road.clip, road.device)


@pytest.fixture
def told(refiner):
    """told(name=value, ...): the same parts under other settings of `refine`."""

    def make(**changes):
        settings = dataclasses.replace(
            refiner.config, refine=dataclasses.replace(refiner.config.refine, **changes)
        )
        return dataclasses.replace(refiner, config=settings)

    return make


def clip(frames=3, h=12, w=16):
    y, x, t = np.mgrid[:h, :w, :frames]
    return np.stack([x * 9, y * 11, t * 60], -1).astype(np.uint8).transpose(2, 0, 1, 3)


# --- the road


def test_a_clip_is_refined_and_depends_on_its_seed_alone(refiner):
    first = refiner(clip(), "a boat", seed=3)
    assert first.shape == (3, 16, 20, 3) and first.dtype == np.uint8 and first.std() > 1
    assert np.array_equal(first, refiner(clip(), "a boat", seed=3))
    assert not np.array_equal(first, refiner(clip(), "a boat", seed=4))
    assert not np.array_equal(first, refiner(clip(), "a tree", seed=3))


@pytest.mark.parametrize(
    "changes",
    [
        {"start": "inversion"},
        {"start": "inversion", "inversion_table": "cosine"},
        {"solver": "heun"},
        {"grid": "official", "steps": 6},
        {"start_scale": "official"},
        {"skip_filter": "sr600"},
        {"guidance": 1.0},
        {"rescale": 0.0},
        {"eta": 0.0},
        {"noise_level": 300},
        {"posterior": "mode"},
        {"repeat_frames": 2},
        {"spacing": "leading"},
        {"resize": "bicubic"},
        {"restore": 1.0},
        {"noise": 0.5},
    ],
    ids=str,
)
def test_every_setting_does_something(refiner, told, job, changes):
    model = told(**changes)
    if "skip_filter" in changes:  # read where the network is built
        stage = merge.second_stage(dataclasses.replace(job, refine=model.config.refine))
        assert stage.use.skip_filter == "sr600" and refiner.config.use.skip_filter == "none"
        unet = checkpoint.load(
            "unet", dataclasses.replace(stage, weights="random"), device="cpu", dtype=torch.float64
        )
        model = dataclasses.replace(model, unet=unet)
    got = model(clip(), "a boat", seed=3)
    assert got.shape == (3, 16, 20, 3)
    assert not np.array_equal(got, refiner(clip(), "a boat", seed=3))


def test_savings_and_chunks_change_nothing(refiner):
    plain = refiner(clip(5), "a boat", seed=3)
    settings = dataclasses.replace(refiner.config, runtime=config.Runtime(device="cpu", vae_chunk=3))
    unet = copy.deepcopy(refiner.unet)
    savings.remove(unet)
    other = dataclasses.replace(refiner, config=settings, unet=unet)(clip(5), "a boat", seed=3)
    assert np.abs(plain.astype(int) - other).max() <= 1


def test_what_the_autoencoder_loses_is_put_back(told):
    """With latents left alone the upscaled clip comes back whole, which no autoencoder gives by itself."""
    frames = clip()
    errors = {}
    for restore in (0.0, 0.5, 1.0):
        model = told(restore=restore, posterior="mode")
        shape = refine.geometry(model.config, (16, 12))
        given = refine.encode(model, frames, shape, SampleNoise(0))
        got = refine.decode(model, given, shape, frames, given)
        wanted = fitting.cropped(refine.prepared(model, frames, shape), shape)
        wanted = video.to_uint8(wanted.permute(1, 0, 2, 3)).numpy()
        errors[restore] = np.abs(got.astype(int) - wanted).max()
    assert errors[1.0] <= 1 < errors[0.5] < errors[0.0]


def test_less_noise_keeps_more_of_the_clip(told):
    kept = [
        np.abs(told(noise_level=level, guidance=1.0)(clip(), "", seed=1).astype(int) -
               told(noise_level=4, guidance=1.0)(clip(), "", seed=1)).mean()
        for level in (20, 900)
    ]  # fmt: skip
    assert kept[0] < kept[1]


def test_a_long_clip_goes_in_windows_and_one_frame_alone(refiner, told):
    long = refiner(clip(9), "a boat", seed=3)
    assert long.shape == (9, 16, 20, 3)
    assert refiner(clip(1), "a boat", seed=3).shape == (1, 16, 20, 3)
    assert told(frames=2)(clip(9), "a boat", seed=3).shape == (2, 16, 20, 3)


# --- sizes


@pytest.mark.parametrize("fit", ["keep", "crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [(448, 256), (1280, 704), (1920, 1080), (333, 777), (1, 1), (5000, 3)])
def test_any_size_becomes_legal_and_comes_back(fit, size):
    shape = fitting.geometry(size, (1280, 720), fit)
    assert shape.legal[0] % 64 == 0 and shape.legal[1] % 64 == 16
    assert all(big >= small for big, small in zip(shape.legal, shape.wanted, strict=True))
    if fit == "keep":
        assert shape.wanted == shape.scaled and all(s % 2 == 0 for s in shape.wanted)
        assert shape.wanted[0] <= 1280 and shape.wanted[1] <= 720
    else:
        assert shape.wanted == (1280, 720) == shape.legal
    assert fitting.geometry((1280, 704), (1280, 720), "keep").wanted == (1280, 704)  # not resampled


@pytest.mark.parametrize("fit", ["keep", "crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [(33, 17), (10, 40), (64, 64)])
def test_pixels_go_there_and_back(fit, size):
    frames = clip(2, size[1], size[0])
    shape = fitting.geometry(size, (50, 30), fit, multiple=16, rest=4)
    pixels = fitting.prepared(frames, shape, antialias=True)
    assert pixels.shape == (2, 3, shape.legal[1], shape.legal[0])
    back = fitting.cropped(pixels, shape)
    assert back.shape[-2:] == (shape.wanted[1], shape.wanted[0])
    if fit == "pad" and size != (50, 30):
        assert (back == -1).any() and back.amax() > -0.9
    if fit == "keep":  # the padding repeats the border
        assert torch.equal(back, fitting.resized(frames, *shape.wanted, antialias=True))
        assert torch.equal(pixels[..., 0, :].amin(), back[..., 0, :].amin())


@pytest.mark.parametrize("size", [(33, 17), (7, 3)])
@pytest.mark.parametrize("fit", ["keep", "crop", "pad"])
def test_odd_sizes_are_refined(told, size, fit):
    got = told(fit=fit, width=18, height=14)(clip(2, size[1], size[0]), "a boat", seed=1)
    wanted = fitting.geometry(size, (18, 14), fit, multiple=4, rest=0).wanted
    assert got.shape == (2, wanted[1], wanted[0], 3)


def test_the_full_size_network_needs_no_more_memory_than_the_first_stage():
    """Counted on `meta`, scaled by area: 1280 x 720 x 32 frames against 1280 x 704 x 32."""

    def peak(use, rows):
        with torch.device("meta"):
            unet = UNet(config.UNet(), use)
        savings.apply(unet, config.Runtime())
        with torch.no_grad(), torch.device("meta"), Meter() as meter:
            vector, latent, fps = torch.empty(1, 1024), torch.empty(1, 4, rows, 160), torch.empty(1)
            prepared = unet.prepare(Conditions(torch.empty(1, 77, 1024), vector, latent, fps), 32)
            x = torch.empty(1, 4, 32, rows, 160)
            meter.restart()
            unet(x, torch.empty(1), prepared)
        return meter.peak

    assert peak(config.REFINER_USE, 90) <= peak(config.Use(), 88) * 90 / 88


@pytest.mark.parametrize(
    ("use", "count"), [(config.V1_USE, 1_419_843_396), (config.REFINER_USE, 1_411_233_860)]
)
def test_parameters_at_full_size(use, count):
    with torch.device("meta"):
        unet = UNet(config.UNet(), use)
    assert sum(p.numel() for p in unet.parameters()) == count


# --- what is refused, and what is said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise_level": 1001}, "total noise level is 1001; give 1 to 1000"),
        ({"noise_level": 20, "steps": 30}, "steps is 30; give 1 to 19"),
        ({"solver": "heun", "eta": 0.5}, "adds no noise"),
        ({"start": "inversion", "noise": 0.5}, "refine.noise is 0.5"),
    ],
)
def test_settings_that_cannot_run(told, changes, message):
    with pytest.raises(ValueError, match=message):
        refine.refuse_unrefinable(told(**changes).config)


@pytest.mark.parametrize(
    "changes",
    [
        {"noise_level": 0},
        {"overlap": 32},
        {"window": 65},
        {"rescale": 1.5},
        {"steps": 0},
        {"frames": -1},
        {"restore": 2.0},
        {"noise": -1},
    ],
    ids=str,
)
def test_settings_that_cannot_be(changes):
    with pytest.raises(ValueError, match=f"refine.{next(iter(changes))}"):
        config.Refine(**changes)


def test_lost_words_are_told(refiner):
    settings = dataclasses.replace(refiner.config, refine_suffix=", " + "sharp " * 70)
    model = dataclasses.replace(refiner, config=settings)
    with pytest.warns(
        UserWarning, match=r"quality suffix 7\d, CLIP reads 75; of the suffix this is lost: 'sharp"
    ):
        refine.texts(model, "a small boat that sails")
    with pytest.warns(UserWarning, match="of the prompt and of all the suffix this is lost: 'boat"):
        refine.texts(model, "boat " * 80)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refine.texts(refiner, "a boat")


def test_weights_of_another_kind_are_refused(job, road, tmp_path, tiny):
    folder = checkpoint.save(tmp_path / "first", {"vae": road.vae}, road.config)
    with pytest.raises(ValueError, match="holds no refiner"):
        merge.second_stage(dataclasses.replace(job, refine_weights=str(folder)))
    stage = merge.second_stage(job)
    folder = checkpoint.save(tmp_path / "second", {"vae": road.vae}, stage)
    with pytest.raises(ValueError, match="lacks the unet"):
        refine.homes_of(dataclasses.replace(job, refine_weights=str(folder)), stage)
    with pytest.raises(ValueError, match=r"give .* as refine_weights="):
        pipeline.make_schedule(stage)


def test_vae_and_clip_may_be_the_first_stages(job, refiner, road, tmp_path):
    first = checkpoint.save(tmp_path / "first", {"vae": road.vae, "clip": road.clip}, road.config)
    second = checkpoint.save(tmp_path / "second", {"unet": refiner.unet}, refiner.config)
    both = dataclasses.replace(job, weights=str(first), refine_weights=str(second))
    homes = refine.homes_of(both, merge.second_stage(both))
    assert homes == {"unet": str(second), "vae": str(first), "clip": str(first)}


def test_a_folder_brings_its_own_settings(refiner, tmp_path):
    told = dataclasses.replace(
        refiner.config, refine=config.Refine(guidance=9.0, noise_level=700), refine_suffix=", own"
    )
    folder = str(checkpoint.save(tmp_path / "w", {"unet": refiner.unet}, told))
    got = merge.load_config(None, [f"refine_weights={folder}", "refine.guidance=4"], weights="random")
    assert (got.refine.guidance, got.refine.noise_level, got.refine_suffix) == (4.0, 700, ", own")
    assert merge.second_stage(got).use == config.REFINER_USE


def test_too_little_memory_is_told_before_the_first_stage(job, monkeypatch):
    monkeypatch.setattr(refine, "free_memory", lambda where: 0)
    with pytest.raises(ValueError, match="second stage at 20 x 16, 4 frames at once, needs about"):
        refine.check(job, (16, 12), 9)


# --- memory


@pytest.fixture
def loaded(job, monkeypatch):
    """loaded(name=value, ...): the second stage under settings of `runtime` -> it and what its plan takes."""

    def make(**settings):
        told = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            changed = dataclasses.replace(
                job, runtime=config.Runtime(device="cpu", dtype="float64", vae_dtype="float64",
                                            encoder_dtype="float64", **settings)
            )  # fmt: skip
            return refine.load(changed, (16, 12), 9, tell=told.append), told[0]

    return make


@pytest.mark.parametrize(
    "plan", [{"memory": "low", "offload": "blocks"}, {"memory": "low", "vae_tile": 3}], ids=str
)
def test_a_plan_gives_the_same_clip(loaded, plan, monkeypatch):
    monkeypatch.setitem(plans.PLANS, "low", {"token_chunk": 20, "vae_chunk": 1, "vae_tile": 4})
    (whole, full), (lean, low) = loaded(memory="full"), loaded(**plan)
    assert full.plan == "full" and low.plan == "low" == lean.config.runtime.memory
    assert lean.config.runtime.token_chunk == 20 and bool(lean.offloaded) == ("offload" in plan)
    one, other = (model(clip(5), "a boat", seed=3).astype(int) for model in (whole, lean))
    assert np.abs(one - other).max() <= 1 and one.std() > 1


def test_the_plan_is_the_fastest_that_fits(job, monkeypatch):
    stage = merge.second_stage(job)
    # In a network this small it is the feed-forwards that decide; chunks of tokens would not pay.
    monkeypatch.setitem(plans.PLANS, "low", {"token_chunk": 20, "vae_chunk": 1, "vae_tile": 4})

    def asking(plan):
        return dataclasses.replace(stage, runtime=dataclasses.replace(stage.runtime, memory=plan))

    needs = {plan: refine.choose_plan(asking(plan), (16, 12), 9)[1] for plan in ("full", "low")}
    assert needs["full"].total > needs["low"].total
    monkeypatch.setattr(refine, "free_memory", lambda where: needs["low"].total)
    assert refine.choose_plan(asking("auto"), (16, 12), 9)[1].plan == "low"
    with pytest.raises(ValueError, match=r"second stage at 20 x 16.*memory=(balanced|low) would fit"):
        refine.choose_plan(asking("full"), (16, 12), 9)


# --- clips from files


def write(path, frames, times=None, pix_fmt="yuv420p", codec="libx264", rate=10):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], pix_fmt
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgba" if frame.shape[-1] == 4 else "rgb24")
            picture.pts = i if times is None else times[i]
            picture.time_base = Fraction(1, rate)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def test_alpha_is_laid_over_white(tmp_path):
    frames = np.zeros((2, 16, 16, 4), np.uint8)
    frames[..., 3] = 255
    frames[:, :, :8, 3] = 0
    path = write(tmp_path / "a.mov", frames, pix_fmt="argb", codec="qtrle")
    assert video.load(path, alpha="white")[0][0, 8, 2].tolist() == [255, 255, 255]
    assert video.load(path)[0][0, 8, 2].tolist() == [0, 0, 0]
    (tmp_path / "pngs").mkdir()
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / "pngs" / f"frame_{i:04d}.png")
    assert video.load(tmp_path / "pngs", alpha="white")[0][0, 8, 2].tolist() == [255, 255, 255]
    assert video.load(tmp_path / "pngs")[0][0, 8, 2].tolist() == [0, 0, 0]


# --- as a user meets it


@pytest.fixture
def run(script_at, monkeypatch, road, refiner):
    """run(*words): the script in this process with the parts that are there -> (status, stdout, stderr)."""
    run = script_at("generate", "road.yaml")
    monkeypatch.setattr(
        pipeline,
        "load_parts",
        lambda settings, tell=None: pipeline.I2VGenXL(settings, road.unet, road.vae, road.clip, road.device),
    )
    monkeypatch.setattr(
        refine,
        "load",
        lambda settings, *size, tell: dataclasses.replace(refiner, config=merge.second_stage(settings)),
    )
    Path("road.yaml").write_text(road.config.to_yaml())
    return run


SECOND = ["refine_weights=random", "refine.width=20", "refine.height=16", "refine.steps=2", "steps=1"]


def test_both_stages_in_one_command(run, picture_file):
    words = [
        *SECOND,
        f"image={picture_file}",
        "prompt=a boat",
        "refine_prompt=a fine boat: it sails",
        "output=c",
    ]
    status, out, err = run(*words)
    assert status == 0 and "error" not in err and "c (3 frames, seed 8888)" in out
    frames, fps = video.load("c")
    assert frames.shape == (3, 16, 16, 3) and fps == 8.0  # 16 x 16 kept inside 20 x 16
    record = json.loads(Path("c.json").read_text())["settings"]
    assert record["refine_prompt"] == "a fine boat: it sails" and record["prompt"] == ["a boat"]
    assert "1 clip already there" in run(*words, "--resume")[1]


def test_the_second_stage_alone(run):
    video.save(clip(4), "in.gif", fps=5)
    status, out, err = run(*SECOND, "video=in.gif", "prompt=a boat", "seed=[1,2]", "output=o.gif")
    assert status == 0 and out.count("settings in") == 2, err
    assert video.load("o-000-seed1.gif")[0].shape[1:] == (16, 20, 3)
    record = json.loads(Path("o-000-seed1.gif.json").read_text())
    assert record["fps"] == 5.0 and record["settings"]["image"] == []
    assert record["settings"]["video"] == "in.gif" and record["settings"]["refine_prompt"] == "a boat"


@pytest.mark.parametrize(("fps", "output"), [(60, "o.gif"), (60, "new/o.GIF")])
def test_a_rate_that_the_file_cannot_hold_is_told_before_refining(run, monkeypatch, fps, output):
    video.save(clip(4), "in.webp", fps=fps)
    monkeypatch.setattr(refine, "load", lambda *_, **__: pytest.fail("the second stage was loaded"))
    status, out, err = run(*SECOND, "video=in.webp", "prompt=a boat", f"output={output}")
    assert status == 2 and "too fast for a GIF" in err and out == ""
    monkeypatch.setattr(video, "load", lambda *_, **__: (clip(4), 90000.0))  # a cover picture's clock
    status, _, err = run(*SECOND, "video=in.webp", "prompt=a boat", "output=o.mp4")
    assert status == 2 and "fps 90000.0 is not a frame rate" in err


def test_the_rate_of_the_settings_does_not_stop_a_clip_that_keeps_its_own(run):
    video.save(clip(4), "in.webp", fps=10)
    assert run(*SECOND, "video=in.webp", "prompt=a boat", "output=o.gif", "save.fps=100")[0] == 0
    status, _, err = run(*SECOND, "video=in.webp", "output=p.gif", "save.fps=100", "refine.fps=save")
    assert status == 2 and "too fast for a GIF" in err


def test_a_refined_clip_names_its_source(run):
    video.save(clip(4), "in.gif", fps=5)
    words = [*SECOND, "video=in.gif", "prompt=a boat", "output=o.gif", "--resume"]
    assert run(*words)[0] == 0 and "1 clip already there" in run(*words)[1]
    assert json.loads(Path("o.gif.json").read_text())["inputs"]["video"]["sha256"] == records.sha256("in.gif")
    video.save(clip(3), "in.gif", fps=5)
    assert "0 clips already there" in run(*words)[1]


@pytest.mark.parametrize(
    "matrix", [(0, 1, -1, 0), (0, -1, -1, 0), (1, 0, 0, -1)], ids=["turned", "both", "flip"]
)
@pytest.mark.parametrize("ending", ["mp4", "mov"])
def test_a_clip_is_refined_as_a_player_shows_it(run, matrix, ending):
    stored = media_files.write_video(Path(f"in.{ending}"), clip(4, 16, 32))
    video.save(upright(video.load(stored)[0], matrix), "upright", fps=10)
    media_files.turn(stored, *matrix)
    for source in (stored, "upright"):
        assert run(*SECOND, f"video={source}", "prompt=a boat", f"output=of_{Path(source).stem}")[0] == 0
    frames, expected = video.load("of_in")[0], video.load("of_upright")[0]
    assert (frames.shape[1] > frames.shape[2]) == (matrix[0] == 0) and np.array_equal(frames, expected)


def upright(frames, matrix):
    """uint8 [f h w 3] as it is shown: a pixel at x, y goes to a x + c y, b x + d y."""
    a, b, c, d = matrix
    if not a:
        frames, a, d = frames.swapaxes(1, 2), c, b
    return frames[:, ::d, ::a]


def test_a_list_may_hold_refine_prompts(run, picture_file):
    item = {"image": str(picture_file), "prompt": "one", "refine_prompt": "own", "output": "x.gif"}
    Path("list.jsonl").write_text(json.dumps(item) + "\n")
    assert run(*SECOND, "items=list.jsonl")[0] == 0
    assert json.loads(Path("x.gif.json").read_text())["settings"]["refine_prompt"] == "own"


def test_one_frame_is_a_picture(run):
    video.save(clip(1), "one", fps=8)
    status, _, err = run(*SECOND, "video=one", "prompt=a boat", "output=o")
    assert status == 0 and "has one frame" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["video=missing.mp4", "refine_weights=random"], "video missing.mp4 does not exist"),
        (["video=bad.mp4", "refine_weights=random"], "cannot be read as a video"),
        (["video=in.gif"], "needs a refiner: refine_weights="),
        (["video=in.gif", "image=a.png", "refine_weights=random"], "use either"),
        (["video=in.gif", "refine_weights=random", "output=in.gif"], "would overwrite in.gif"),
        (["video=in.gif", "refine_weights=random", "refine.noise_level=2000"], "total noise level is 2000"),
        (["video=in.gif", "refine_weights=nowhere"], "does not exist"),
        (["image=a.png", "prompt=x", "refine_prompt=y"], "which needs refine_weights="),
        (["image=a.png", "prompt=x", "refine_weights=random", "refine.steps=600"], "steps is 600"),
    ],
)
def test_what_is_refused(run, words, message):
    video.save(clip(2), "in.gif", fps=5)
    Image.new("RGB", (20, 20), "red").save("a.png")
    Path("bad.mp4").write_bytes(b"no video at all" * 50)
    status, out, err = run(*words)
    assert status == 2 and message in err and "Traceback" not in err and "settings in" not in out
