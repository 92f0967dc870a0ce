"""pipeline.py: the whole road on a tiny model; what it must and must not depend on."""

import dataclasses
import functools
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from i2vgen import load, pipeline
from i2vgen.adapt import lora
from i2vgen.diffusion import schedule
from i2vgen.diffusion.noise import SampleNoise
from i2vgen.diffusion.sampler import ddim
from i2vgen.diffusion.schedulers import from_diffusers
from i2vgen.fast import savings
from i2vgen.files import checkpoint, images, video
from i2vgen.memory import plans
from i2vgen.settings import config, merge

PROMPTS = ["a boat", "a red boat on a lake", ""]
SEEDS = [3, 1, 2**63 - 1]


@pytest.fixture(scope="module")
def pictures(picture):
    return [picture, picture.rotate(90, expand=True), picture.convert("L").convert("RGB")]


def latents(model, pictures, prompts, seeds, **more):
    """Final latents [b c f h w] and the frames of every clip."""
    last = []
    clips = model.generate(pictures, prompts, seeds, on_step=lambda info: last.append(info.x), **more)
    return last[-1], [clip.frames for clip in clips]


def differ(a, b):
    return bool((a - b).abs().max() > 1e-5)


# --- seeds and batches


@pytest.mark.parametrize("sample", [{}, {"eta": 1.0}, {"guidance": 1.0}], ids=str)
def test_a_clip_depends_on_its_own_seed_only(road, with_config, pictures, sample):
    model = with_config(road, sample=sample)
    together, frames = latents(model, pictures, PROMPTS, SEEDS)
    assert together.dtype == torch.float64
    for i in range(3):
        alone, (clip,) = latents(model, [pictures[i]], [PROMPTS[i]], [SEEDS[i]])
        assert (together[i] - alone[0]).abs().max() < 1e-9
        assert np.array_equal(frames[i], clip)
    backwards, _ = latents(model, pictures[::-1], PROMPTS[::-1], SEEDS[::-1])
    assert (together - backwards.flip(0)).abs().max() < 1e-9


def test_seeds_repeat_and_differ(road, picture):
    one, again, other = (road(picture, "a boat", seed=seed).frames for seed in (5, 5, 6))
    assert np.array_equal(one, again) and not np.array_equal(one, other)


def test_the_seed_of_the_settings_is_the_default(road, with_config, picture):
    model = with_config(road, sample={"seed": (5, 6)})
    clip = model(picture, "a boat")
    assert clip.seed == 5 and np.array_equal(clip.frames, road(picture, "a boat", seed=5).frames)


def test_the_global_stream_of_random_numbers_is_left_alone(road, picture):
    before = torch.get_rng_state()
    road(picture, "a boat")
    assert torch.get_rng_state().equal(before)


def test_eta_is_noise_of_the_seed(road, with_config, picture):
    model = with_config(road, sample={"eta": 0.7})
    one, again, other = (latents(model, [picture], ["a boat"], [seed])[0] for seed in (5, 5, 6))
    assert one.equal(again) and differ(one, other)
    assert differ(one, latents(road, [picture], ["a boat"], [5])[0])


# --- what is heard


@pytest.mark.parametrize(
    "changes",
    [
        {"sample": {"fps": 8}},
        {"sample": {"guidance": 1.0}},
        {"sample": {"guidance": 2.0}},
        {"sample": {"steps": 3}},
        {"sample": {"posterior": "mode"}},
        {"sample": {"negative_image": "none"}},
        {"sample": {"final_alpha": "one"}},
        {"sample": {"spacing": "trailing"}},
        {"negative_prompt": "a car"},
        {"schedule": {"cosine_s": 0.02}},
    ],
    ids=str,
)
def test_settings_that_change_the_clip(road, with_config, picture, changes):
    one, other = (
        latents(model, [picture], ["a boat"], [5])[0] for model in (road, with_config(road, **changes))
    )
    assert differ(one, other)


def test_picture_and_prompt_change_the_clip(road, pictures):
    one = latents(road, [pictures[0]], ["a boat"], [5])[0]
    assert differ(one, latents(road, [pictures[1]], ["a boat"], [5])[0])
    assert differ(one, latents(road, [pictures[0]], ["a car"], [5])[0])


@pytest.mark.parametrize("changes", [{"runtime": {"vae_chunk": 1}}, {"runtime": {"vae_chunk": 99}}], ids=str)
def test_settings_that_must_not_change_the_frames(road, with_config, picture, changes):
    frames = [m(picture, "a boat").frames for m in (road, with_config(road, **changes))]
    assert np.array_equal(*frames)


def test_without_guidance_the_negative_prompt_is_not_heard(road, with_config, picture):
    one, other = (
        latents(with_config(road, sample={"guidance": 1.0}, negative_prompt=p), [picture], ["a boat"], [5])[0]
        for p in ("a car", "")
    )
    assert not differ(one, other)


# --- steps


@pytest.mark.parametrize(
    ("guidance", "share", "calls"),
    [(1.0, False, 1), (9.0, False, 2), (0.0, False, 2), (1.0, True, 1), (9.0, True, 1)],
)
def test_one_pass_without_guidance_two_with_and_one_for_both(
    road, with_config, picture, guidance, share, calls
):
    model, seen = with_config(road, sample={"guidance": guidance, "steps": 4}), []
    if share:
        savings.apply(model.unet, config.Runtime())
    handle = model.unet.register_forward_hook(lambda module, args, out: seen.append(int(args[1])))
    try:
        model(picture, "a boat")
    finally:
        handle.remove()
        savings.remove(model.unet)
    steps = schedule.timesteps(1000, 4, "official")
    assert seen == [t for t in steps for _ in range(calls)]


@pytest.mark.parametrize("spacing", ["official", "leading", "trailing", "linspace"])
def test_steps_are_those_of_the_spacing(road, with_config, picture, spacing):
    model, told = with_config(road, sample={"spacing": spacing, "steps": 3, "guidance": 1.0}), []
    model(picture, "a boat", on_step=told.append)
    assert [info.t for info in told] == schedule.timesteps(1000, 3, spacing)
    assert [info.index for info in told] == list(range(len(told)))
    assert {info.num_steps for info in told} == {len(told)}


def test_ancestral_sampling(road, with_config, picture):
    model = with_config(
        road, schedule={"num_timesteps": 3}, sample={"steps": 3, "sampler": "ancestral", "guidance": 1.0}
    )
    one, again, other = (latents(model, [picture], ["a boat"], [seed])[0] for seed in (5, 5, 6))
    assert one.equal(again) and differ(one, other)


@pytest.mark.parametrize("name", ["text", "global_tokens", "local_tokens", "concat", "fps"])
def test_the_road_without_a_condition(road, picture, name):
    use = dataclasses.replace(road.config.use, **{name: False})
    settings = dataclasses.replace(road.config, use=use)
    parts = [checkpoint.build(part, settings) for part in checkpoint.PARTS]
    for part in parts:
        checkpoint.fill(part, checkpoint.random_state(part, seed=0))
    # The tower of a condition that is off goes back to meta, where reading it would show.
    if name == "text":
        parts[2].model.transformer.to("meta")
    elif name == "global_tokens":
        parts[2].model.visual.to("meta")
    model = pipeline.I2VGenXL(settings, *(part.eval() for part in parts), torch.device("cpu"))
    assert model(picture, "a boat").frames.std() > 0


# --- noise from outside


def test_noise_may_be_given(road, picture):
    draws = SampleNoise(5)
    draws.draw((4, 8, 8))  # the posterior's
    noise = draws.draw((4, 3, 8, 8))
    expected = latents(road, [picture], ["a boat"], [5])[0]
    assert latents(road, [picture], ["a boat"], [5], noise=noise)[0].equal(expected)
    assert differ(latents(road, [picture], ["a boat"], [5], noise=-noise)[0], expected)
    with pytest.raises(
        ValueError, match=r"noise has shape \(1, 4, 2, 8, 8\); this job needs \(1, 4, 3, 8, 8\)"
    ):
        road.generate([picture], ["a boat"], [5], noise=noise[:, :, :2])


def test_inversion_gives_noise_that_fits(road, with_config, picture):
    model = with_config(road, sample={"guidance": 1.0, "posterior": "mode"})
    clip = model(picture, "a boat")
    noise = pipeline.invert(model, clip.frames, picture, "a boat")
    assert noise.shape == (1, 4, 3, 8, 8) and noise.isfinite().all()
    assert differ(noise, pipeline.invert(model, 255 - clip.frames, picture, "a boat"))
    assert model.generate([picture], ["a boat"], [5], noise=noise)[0].frames.shape == clip.frames.shape
    with pytest.raises(ValueError, match=r"the clip has shape \(2, 16, 16, 3\)"):
        pipeline.invert(model, clip.frames[:2], picture, "a boat")


# --- what goes in


def test_a_file_is_the_picture_it_holds(road, picture, picture_file):
    from_memory = road(picture, "a boat")
    for path in (picture_file, str(picture_file)):
        from_file = road(path, "a boat")
        assert np.array_equal(from_memory.frames, from_file.frames)
        assert from_file.image == str(picture_file)
    assert from_memory.image == "<picture>"


@pytest.mark.parametrize("exif", ["apply", "ignore"])
@pytest.mark.parametrize("ending", ["png", "webp", "tif"])
def test_a_picture_in_memory_is_turned_as_its_file_is(road, with_config, picture, tmp_path, exif, ending):
    turned = Image.Exif()
    turned[images.EXIF_ORIENTATION] = 5
    picture.save(tmp_path / f"a.{ending}", exif=turned)
    model = with_config(road, sample={"steps": 1}, preprocess={"exif": exif})
    with Image.open(tmp_path / f"a.{ending}") as opened:
        assert np.array_equal(
            model(opened, "a boat").frames, model(tmp_path / f"a.{ending}", "a boat").frames
        )


def test_a_damaged_picture_in_memory_is_told(road, picture_file):
    picture_file.write_bytes(picture_file.read_bytes()[:-200])
    with Image.open(picture_file) as opened, pytest.raises(ValueError, match="damaged or cut short"):
        road(opened, "a boat")


def test_pictures_of_any_mode_and_size(road, with_config, picture):
    model = with_config(road, sample={"steps": 1})
    transparent = picture.copy()
    transparent.putalpha(100)
    for given in (transparent, picture.convert("P"), Image.new("L", (1, 1)), Image.new("CMYK", (700, 3))):
        assert model(given, "a boat").frames.shape == (3, 16, 16, 3)


def test_pictures_may_be_arrays(road, with_config, picture):
    model = with_config(road, sample={"steps": 1})
    expected = model(picture, "a boat").frames
    levels = np.asarray(picture)
    for given in (
        levels,
        torch.from_numpy(levels.copy()),
        levels / 255,
        torch.from_numpy(levels / 255).float(),
        torch.from_numpy(levels / 255).float().permute(2, 0, 1),
        np.dstack([levels, np.full(levels.shape[:2], 255, np.uint8)]),
    ):
        assert np.array_equal(model(given, "a boat").frames, expected)
    assert [clip.seed for clip in model.generate(np.stack([levels] * 2), "a boat", [1, 2])] == [1, 2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "no picture is given; give a path"),
        (7, "the picture is an int; give a path"),
        ([["a.png"]], "the picture is a list; give a path"),
        (np.zeros((8, 8, 3)) - 1, r"floats run from -1 to -1; give 0 to 1, \(x \+ 1\) / 2"),
        (np.full((8, 8, 3), 200.0), "floats run from 200 to 200"),
        (np.full((8, 8, 3), np.nan), "values that are NaN or infinite"),
        (np.zeros((8, 8, 3), int), "an array of int64; give uint8"),
        (torch.zeros(8, 8), r"shape \(8, 8\); give \[h w 3\]"),
        (np.zeros((0, 8, 3), np.uint8), "none of them 0"),
        (b"a.png", "the picture is a bytes"),
    ],
    ids=str,
)
def test_pictures_that_cannot_be_meant(road, given, message):
    with pytest.raises(ValueError, match=message):
        road(given, "a boat")


@pytest.mark.parametrize("seed", [np.int64(5), np.uint8(5), torch.tensor(5), np.array(5)], ids=repr)
def test_seeds_of_other_libraries(road, with_config, picture, tmp_path, seed):
    model = with_config(road, sample={"steps": 1})
    made = model(picture, "a boat", seed=seed)
    assert type(made.seed) is int and np.array_equal(made.frames, model(picture, "a boat", seed=5).frames)
    assert json.loads((made.save(tmp_path / "a.gif").parent / "a.gif.json").read_text())["seed"] == 5
    assert SampleNoise(seed).draw((2,)).equal(SampleNoise(5).draw((2,)))


@pytest.mark.parametrize(
    ("seed", "message"),
    [
        (torch.Generator(), r"torch\.Generator.*seed=generator\.initial_seed\(\)"),
        (5.0, "the seed is a float; give an integer"),
        ("5", "the seed is a str"),
        (True, "the seed is a bool"),
        (np.zeros((2, 2), int), "the seed is a ndarray"),
        (-1, r"sample\.seed is -1"),
        (2**64, r"sample\.seed is 18446744073709551616"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_seeds_that_cannot_be_meant(road, picture, seed, message):
    with pytest.raises(ValueError, match=message):
        road(picture, "a boat", seed=seed)


@pytest.mark.parametrize("prompt", [None, 5, [["a boat"]], b"a boat", "\ud800"], ids=repr)
def test_prompts_that_cannot_be_meant(road, picture, prompt):
    with pytest.raises(ValueError, match="the prompt "):
        road(picture, prompt)


def test_a_lone_value_serves_all_clips(road, with_config, picture):
    model = with_config(road, sample={"steps": 1})
    made = model.generate(picture, ["a boat", "a car"], 5)
    assert [(clip.prompt, clip.seed) for clip in made] == [("a boat", 5), ("a car", 5)]
    assert [clip.seed for clip in model.generate(picture, "a boat", np.arange(2))] == [0, 1]
    assert [clip.seed for clip in model.generate(picture, "a boat", torch.tensor([3, 4]))] == [3, 4]
    assert len(model.generate(picture, "a boat", 5)) == 1
    for empty in (([], [], []), ([], "a boat", 5), (picture, [], 5)):
        with pytest.raises(ValueError, match=r"got \d pictures?, \d prompts?, \d seeds?; give"):
            model.generate(*empty)


def test_noise_of_other_libraries(road, with_config, picture):
    model = with_config(road, sample={"steps": 1})
    noise = np.random.default_rng(0).normal(size=(1, 4, 3, 8, 8))
    made = [model.generate(picture, "a boat", 5, noise=n)[0].frames for n in (noise, torch.tensor(noise))]
    assert np.array_equal(*made)
    for wrong, message in (
        (noise.astype(int), "must be finite floats"),
        (noise * np.nan, "must be finite floats"),
        ("noise", "noise is a str"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(picture, "a boat", 5, noise=wrong)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, p: m.generate(p, "a", 1, sampler=3), "the sampler is an int; give the name of one of"),
        (lambda m, p: m.generate(p, "a", 1, on_step=5), "on_step is an int; give a function"),
        (lambda m, p: m(p, "a").save(None), "the output is None; give the path of a file"),
        (lambda m, p: m(p, "a").save(""), "the output is empty"),
        (lambda m, p: load(overrides=["steps=5", 5]), "the setting 5 is no text"),
        (lambda m, p: load(config=5), "the config is an int; give the path"),
    ],
    ids=range(6),
)
def test_arguments_that_cannot_be_meant(road, with_config, picture, call, message):
    with pytest.raises(ValueError, match=message):
        call(with_config(road, sample={"steps": 1}), picture)


def test_a_lone_setting_is_a_list_of_one(monkeypatch):
    assert merge.load_config(None, "steps=5") == merge.load_config(None, ["steps=5"])
    assert merge.load_config(None, None) == merge.load_config(None)


def test_clips_are_saved_in_the_home_folder(road, with_config, picture, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    made = with_config(road, sample={"steps": 1})(picture, "a").save("~/new/a.gif")
    assert made == tmp_path / "new" / "a.gif" and made.exists() and not Path("~").exists()


def test_what_was_built_cannot_be_changed_by_the_settings(road, with_config):
    model = with_config(road)
    model.config = dataclasses.replace(road.config, negative_prompt="other")
    with pytest.raises(ValueError, match="schedule was read when the model was loaded"):
        model.config = dataclasses.replace(road.config, schedule=config.Schedule(cosine_s=0.02))


def test_counts_that_do_not_match(road, picture):
    with pytest.raises(ValueError, match="got 1 picture, 2 prompts, 1 seed"):
        road.generate([picture], ["a", "b"], [1])
    with pytest.raises(ValueError, match=r"sample\.seed is -1"):
        road(picture, "a", seed=-1)
    with pytest.raises(ValueError, match="does not exist"):
        road("missing.png", "a")


@pytest.mark.parametrize(("width", "height", "frames"), [(16, 32, 1), (32, 12, 2)])
def test_other_sizes(road, with_config, picture, width, height, frames):
    model = with_config(road, sample={"width": width, "height": height, "frames": frames, "steps": 1})
    clip = model(picture, "a boat")
    assert clip.frames.dtype == np.uint8 and clip.frames.shape == (frames, height, width, 3)


# --- what comes out


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip.webp", "clip"])
def test_a_saved_clip_explains_itself(road, picture_file, tmp_path, name):
    made = road(picture_file, "a boat: no", seed=7)
    path = made.save(tmp_path / "new" / name)
    record = json.loads((tmp_path / "new" / f"{name}.json").read_text())
    assert sorted(p.name for p in path.parent.iterdir()) == sorted([name, f"{name}.json"])
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    assert record["sha256"] == digest and record["file"] == name
    assert (record["width"], record["height"], record["frames"], record["seed"]) == (16, 16, 3, 7)
    assert record["versions"]["torch"] == torch.__version__
    frames, fps = video.load(path)
    assert frames.shape[1:] == (16, 16, 3) and fps == pytest.approx(8, rel=0.1)

    settings = merge.from_dict(record["settings"])
    assert settings.image == (str(picture_file),) and settings.prompt == ("a boat: no",)
    assert settings.sample.seed == (7,) and settings.output == str(path)
    parts = (road.unet, road.vae, road.clip, road.device)
    again = pipeline.I2VGenXL(settings, *parts)(settings.image[0], settings.prompt[0])
    assert np.array_equal(again.frames, made.frames)


@pytest.fixture
def record(road, with_config, picture_file, tmp_path):
    """record(picture, ...): the record of a clip, without the name and hash of its file."""
    model = with_config(road, sample={"steps": 2})

    def make(picture=picture_file, **replaced):
        made = model.generate([picture], ["a boat"], [5], **replaced)[0].save(tmp_path / "a.gif")
        return json.loads((tmp_path / f"{made.name}.json").read_text())

    return make


def test_a_record_names_the_picture_by_its_hash(record, picture, picture_file):
    plain = record()
    assert plain["reproducible"] is True
    assert plain["inputs"]["image"]["sha256"] == hashlib.sha256(picture_file.read_bytes()).hexdigest()
    for given in (picture, np.asarray(picture)):
        found = record(given)
        assert found["reproducible"] is False and found["settings"]["image"] == ["<picture>"]
        assert found["inputs"]["image"] == {
            "size": [96, 80], "sha256": hashlib.sha256(picture.tobytes()).hexdigest()
        }  # fmt: skip


def test_a_record_names_noise_that_was_given(record):
    one, other = (torch.full((1, 4, 3, 8, 8), value) for value in (0.1, 0.2))
    found = record(noise=one)
    assert found["reproducible"] is False
    assert found["inputs"]["noise"] == {
        "shape": [4, 3, 8, 8], "dtype": "float32", "sha256": hashlib.sha256(one.numpy().tobytes()).hexdigest()
    }  # fmt: skip
    assert record(noise=other)["inputs"]["noise"] != found["inputs"]["noise"]
    assert record(noise=one.bfloat16())["inputs"]["noise"]["dtype"] == "bfloat16"


def test_a_record_names_a_sampler_that_was_given(record, road):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.UniPCMultistepScheduler(
        trained_betas=road.schedule.betas.numpy(),
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )
    found = record(sampler=from_diffusers(scheduler))
    assert found["reproducible"] is False and "steps" not in found
    assert found["inputs"]["sampler"]["name"] == "diffusers.UniPCMultistepScheduler"
    settings = found["inputs"]["sampler"]["settings"]
    assert settings["timestep_spacing"] == "trailing" and len(settings["trained_betas"]["sha256"]) == 64

    def still(predict, x, schedule, *, steps, noise, on_step):
        return x

    found = record(sampler=still)
    assert found["inputs"]["sampler"]["name"].endswith("still") and found["reproducible"] is False
    partial = functools.partial(ddim, eta=0.5, spacing="trailing")
    assert record(sampler=partial)["inputs"]["sampler"] == {
        "name": "i2vgen.diffusion.sampler.ddim", "settings": {"eta": 0.5, "spacing": "trailing"}
    }  # fmt: skip


def test_a_record_tells_of_attached_adapters(record, road):
    adapters = lora.attach(road.unet, ["mid1.res.conv1"], rank=2)
    try:
        assert record()["reproducible"] is False
    finally:
        adapters.remove()
    assert record()["reproducible"] is True


def test_a_clip_is_not_written_where_its_record_would_destroy_a_file(road, with_config, picture, tmp_path):
    made = with_config(road, sample={"steps": 1})(picture, "a boat")
    (tmp_path / "a.gif.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="is no record of a clip"):
        made.save(tmp_path / "a.gif")
    assert [path.name for path in tmp_path.iterdir() if "a.gif" in path.name] == ["a.gif.json"]
    assert made.save(tmp_path / "b.gif").exists()  # the work is not lost


def test_a_record_of_one_clip_of_many_names_that_clip_only(road, with_config, picture_file, tmp_path):
    model = with_config(road, image=("a", "b"), prompt=("x", "y"), sample={"seed": (1, 2)}, items="list")
    made = model.generate([picture_file] * 2, ["x", "y"], [1, 2])[1]
    made.save(tmp_path / "b.gif")
    settings = merge.from_dict(json.loads((tmp_path / "b.gif.json").read_text())["settings"])
    assert (settings.prompt, settings.sample.seed, settings.items) == (("y",), (2,), "")


@pytest.fixture
def greying(monkeypatch):
    """The road ends in a grey last frame."""
    frames = torch.randint(0, 100, (1, 4, 8, 8, 3), dtype=torch.uint8)
    frames[:, -1] = 127
    monkeypatch.setattr(pipeline, "decode", lambda *args: frames)


def test_a_grey_last_frame_is_kept_with_a_note(road, picture, greying):
    with pytest.warns(UserWarning, match=r"mostly mid-grey.*save\.grey_last_frame=drop"):
        assert len(road(picture, "a").frames) == 4


def test_a_grey_last_frame_is_dropped_where_asked(road, with_config, picture, greying, recwarn, tmp_path):
    clip = with_config(road, save={"grey_last_frame": "drop"})(picture, "a")
    assert len(clip.frames) == 3 and len(recwarn) == 0
    clip.save(tmp_path / "a.gif")
    assert json.loads((tmp_path / "a.gif.json").read_text())["frames"] == 3


def test_rounding_is_a_setting(road, with_config, picture):
    down = road(picture, "a").frames.astype(int)
    near = with_config(road, save={"rounding": "nearest"})(picture, "a").frames.astype(int)
    assert set(np.unique(near - down)) == {0, 1}


# --- loading: refused before anything is loaded


@pytest.fixture
def nothing_loads(monkeypatch):
    monkeypatch.setattr(checkpoint, "load", lambda *args, **kwargs: pytest.fail("weights were loaded"))


REFUSED = [
    ({"weights": "nowhere"}, [], "weights=nowhere does not exist"),
    ({"weights": "random"}, ["device=quantum"], "runtime.device is 'quantum'"),
    ({"weights": "random"}, ["device=meta"], "runtime.device is meta"),
    ({"weights": "random"}, ["device=cuda:99"], "runtime.device is cuda:99"),
    ({"weights": "random"}, ["schedule.cosine_s=nan"], "nan"),
    ({"weights": "random"}, ["schedule.kind=linear", "schedule.init_beta=5"], "beta"),
    ({"weights": "random"}, ["clip.text.vocab_size=1000"], "vocab_size is 1000"),
    ({"weights": "random"}, ["clip.vision.colour=3"], "no open_clip configuration"),
]


@pytest.mark.filterwarnings("ignore:weights=random")
@pytest.mark.parametrize(("weights", "overrides", "words"), REFUSED, ids=[str(r[1:]) for r in REFUSED])
def test_loading_is_refused_in_time(root, nothing_loads, weights, overrides, words):
    with pytest.raises(ValueError, match=words):
        load(**weights, config=root / "configs" / "tiny.yaml", overrides=overrides)


@pytest.mark.filterwarnings("ignore:weights=random")
def test_too_little_memory_is_told_in_time(tiny, nothing_loads, monkeypatch):
    monkeypatch.setattr(plans, "free_memory", lambda where: 1000)
    with pytest.raises(ValueError, match=r"64 x 64 x 3 needs about .* 0 MiB are free; no size fits"):
        pipeline.load_parts(tiny)


def test_weights_without_all_parts_are_told_in_time(tiny, nothing_loads, tmp_path):
    folder = checkpoint.save(tmp_path / "w", {"unet": {}}, tiny)
    with pytest.raises(ValueError, match="lacks vae, clip, which generation needs"):
        pipeline.load_parts(dataclasses.replace(tiny, weights=str(folder)))
    with pytest.raises(ValueError, match=r"for a Config: pipeline\.load_parts"):
        load(tiny)


def test_load_from_a_folder(tiny, tiny_model, picture, tmp_path, recwarn):
    folder = checkpoint.save(tmp_path / "w", tiny_model.parts, tiny)
    model = load(folder, overrides=["device=cpu"])
    assert model.config == dataclasses.replace(
        tiny, weights=str(folder), runtime=config.Runtime(device="cpu", memory="full", batch_guidance=True)
    )
    assert np.array_equal(model(picture, "a boat").frames, tiny_model(picture, "a boat").frames)
    assert not [w for w in recwarn if "NOISE" in str(w.message)]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["unet.out_channels=8"], "unet.out_channels is 8 but vae.embed_dim is 4"),
        (["vae.channels=1"], "vae.channels is 1"),
        (["steps=3", "eps_form=recovered"], "visits t = 999"),
        (["spacing=trailing", "schedule.prediction=eps"], "visits t = 999"),
    ],
)
def test_what_cannot_be_sampled_is_refused_before_loading(overrides, words, monkeypatch):
    from i2vgen.files import checkpoint
    from i2vgen.settings.merge import load_config

    monkeypatch.setattr(checkpoint, "load", lambda *_, **__: pytest.fail("a part was loaded"))
    cfg = load_config(Path(__file__).parents[1] / "configs" / "tiny.yaml", overrides, weights="random")
    with pytest.warns(UserWarning, match="NOISE"), pytest.raises(ValueError, match=words):
        pipeline.load_parts(cfg)
