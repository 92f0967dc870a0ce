"""`i2vgen evaluate` from the user's side: scores of models of known quality, error messages."""

import copy
import dataclasses
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from i2vgen import pipeline
from i2vgen.evaluation import drift, evaluate, pages, scores
from i2vgen.evaluation.evaluate import Plan
from i2vgen.fast import savings
from i2vgen.files import checkpoint
from i2vgen.settings.config import QUALITIES
from i2vgen.world import drawing

SCRIPT = Path(__file__).parents[1] / "scripts" / "evaluate.py"
FILES = ["clips.png", "index.html", "scores.json", "table.md"]


@pytest.fixture
def run(script_at):
    return script_at("evaluate")


@pytest.fixture
def loads(monkeypatch, road):
    """Replace loading by the parts of `road`; the list records every call."""
    asked = []

    def load_parts(settings):
        asked.append(settings)
        unet = copy.deepcopy(road.unet)
        savings.apply(unet, settings.runtime)
        return pipeline.I2VGenXL(settings, unet, road.vae, road.clip, road.device)

    monkeypatch.setattr(pipeline, "load_parts", load_parts)
    return asked


class Mirror:
    """A lossless autoencoder."""

    dtype = torch.float32

    def encode(self, pixels, noise, *, chunk):
        return pixels

    def decode(self, latents):
        return latents


@pytest.fixture
def oracle(monkeypatch, road):
    """oracle(spoil): sampling returns spoil(the true clip of this caption and seed)."""

    def load_parts(settings):
        return pipeline.I2VGenXL(settings, road.unet, Mirror(), road.clip, road.device)

    def install(spoil=lambda frames: frames):
        monkeypatch.setattr(pipeline, "load_parts", load_parts)
        facts = {(item.seed, item.caption): item.facts for item in evaluate.items(Plan(clips=200))}

        def generate(model, pictures, prompts, seeds):
            clips = [
                evaluate.render(facts[key], model.config, 1.0) for key in zip(seeds, prompts, strict=True)
            ]
            for clip, picture in zip(clips, pictures, strict=True):
                assert np.array_equal(clip[0], np.asarray(picture))
            return torch.from_numpy(np.stack([spoil(clip) for clip in clips]))

        monkeypatch.setattr(pipeline, "generate", generate)

    return install


def written(path):
    def refuse(word):
        raise AssertionError(f"{word} in the JSON")

    return json.loads(Path(path).read_text(), parse_constant=refuse)


SIZE = ["width=32", "height=32", "frames=8"]


# --- models of known quality


def test_a_perfect_model(run, quick, oracle):
    oracle()
    status, out, _ = run(*quick, *SIZE, "clips=24", "json=out.json", "batch=7")
    found = written("out.json")
    assert status == 0
    for name in (*scores.ACCURACIES, "identity"):
        assert found[name] == 1.0, name
    assert found["first_frame_psnr"] == found["clip_psnr"] == 99.0
    assert 10 < found["still_psnr"] < 35 and found["vae_psnr"] > 45
    counts = found["counts"]
    assert counts["motion_accuracy_basic"] == counts["motion_accuracy_all"] == 24
    assert counts["object_accuracy"] == counts["first_frame_psnr"] == 48
    assert counts["clip_psnr"] == counts["still_psnr"] == counts["vae_psnr"]
    assert 0 < counts["camera_accuracy"] < 20 and "100.0 %" in out
    assert sum(row["clips"] for row in found["per_motion"].values()) == 48


def test_a_model_that_repeats_the_picture(run, quick, oracle):
    oracle(lambda frames: np.repeat(frames[:1], len(frames), axis=0))
    assert run(*quick, *SIZE, "clips=24", "json=out.json")[0] == 0
    found, todo = written("out.json"), evaluate.items(Plan(clips=24))
    for name, of in (("motion_accuracy_basic", "basic"), ("other_motion_accuracy", "other")):
        still = [item.facts.moves[0].kind == "still" for item in todo if item.set == of]
        assert found[name] == pytest.approx(np.mean(still), abs=1e-3)
    assert found["camera_accuracy"] == 0.0 and found["object_accuracy"] == found["identity"] == 1.0
    assert found["clip_psnr"] == found["still_psnr"] and found["first_frame_psnr"] == 99.0
    assert found["per_motion"]["left"]["read_as"] == {"still": found["per_motion"]["left"]["clips"]}
    assert found["per_motion"]["still"]["accuracy"] == 1.0


def test_a_model_that_ignores_the_caption(run, quick, oracle, monkeypatch):
    """It always makes the motion of "basic", which only `other_motion_accuracy` reveals."""
    oracle()
    perfect = pipeline.generate
    basic = {item.seed: item.caption for item in evaluate.items(Plan(clips=8)) if item.set == "basic"}
    other = {item.caption for item in evaluate.items(Plan(clips=8)) if item.set == "other"}

    def generate(model, pictures, prompts, seeds):
        basic_prompts = [
            basic[seed] if prompt in other else prompt for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        return perfect(model, pictures, basic_prompts, seeds)

    monkeypatch.setattr(pipeline, "generate", generate)
    assert run(*quick, *SIZE, "clips=8", "json=out.json")[0] == 0
    found = written("out.json")
    assert found["motion_accuracy_basic"] == found["motion_accuracy_all"] == 1.0
    assert found["other_motion_accuracy"] == 0.0


def test_objects_that_fade_lose_their_identity(run, quick, oracle):
    def fade(frames):
        keep = np.linspace(1, 0, len(frames))[:, None, None, None]
        return (keep * frames + (1 - keep) * np.median(frames[0], axis=(0, 1))).astype(np.uint8)

    oracle(fade)
    assert run(*quick, *SIZE, "clips=8", "json=out.json")[0] == 0
    assert written("out.json")["identity"] < 0.6


# --- a real model


def test_the_report(run, quick, loads):
    status, out, err = run(*quick, "clips=2", "first_seed=5", "json=new/out.json", "output=page")
    assert status == 0 and "error" not in err and loads[0].runtime.batch == 8
    found = written("new/out.json")
    assert set(scores.SCORES) <= {*found} and written("page/scores.json") == found
    assert found["settings"]["first_seed"] == 5 and found["settings"]["guidance"] == 9.0
    assert found["settings"]["weights"] == "random" and found["settings"]["world_speed"] == 1.0
    assert "sweep" not in found and found["seconds"] > 0
    assert sorted(path.name for path in Path("page").iterdir()) == FILES
    page = Path("page/index.html").read_text()
    outside = re.findall(r"(?:src|href)=.(?!data:)|url\(|https?:", page)
    assert outside == [] and page.count("<figure>") == 6 and page.count('src="data:image/png') == 12
    assert "prefers-color-scheme: dark" in page
    for item in evaluate.items(Plan(2, 5)):
        assert item.caption in page
    sheet = Image.open("page/clips.png")  # of the two clips of any kind: picture, four frames, two lines
    assert sheet.size == (
        2 * (5 * pages.SIDE + 2 * pages.GAP),
        pages.SIDE + 2 * (pages.TEXT + pages.GAP) + pages.GAP,
    )
    first = evaluate.render(evaluate.items(Plan(2, 5))[2].facts, loads[0], 1.0)[0]
    small = np.asarray(sheet.crop((0, 0, pages.SIDE, pages.SIDE)).resize((16, 16), Image.Resampling.BOX))
    assert np.abs(small.astype(int) - first).mean() < 12
    table = Path("page/table.md").read_text()
    assert "| score | value | 95 % interval | clips |" in table and "16 x 16 pixels, 3 frames" in out


def test_batches_change_nothing(run, quick, loads):
    found = []
    for batch in (1, 4):
        assert run(*quick, "clips=2", f"batch={batch}", "json=out.json")[0] == 0
        found.append(written("out.json") | {"seconds": 0})
        assert found[-1]["settings"].pop("batch") == batch
    assert found[0] == found[1]


def test_a_sweep_over_conditions(run, quick, loads, monkeypatch):
    status, out, _ = run(*quick, "clips=1", "sweep=conditions", "json=out.json", "output=page")
    assert status == 0
    found = written("out.json")
    names = [row["name"] for row in found["sweep"]]
    assert names == [
        "everything", "without concat", "without text", "without local tokens", "without image vector"
    ]  # fmt: skip
    everything, *rest = found["sweep"]
    assert {name: found[name] for name in scores.SCORES} == {name: everything[name] for name in scores.SCORES}
    assert all(row["first_frame_psnr"] != everything["first_frame_psnr"] for row in rest)
    assert all(row["vae_psnr"] == everything["vae_psnr"] for row in rest)
    assert "Sweep over conditions" in out and "without concat" in Path("page/table.md").read_text()


@pytest.fixture
def short(monkeypatch):
    """The reference and every preset in a few steps."""
    monkeypatch.setattr(drift, "REFERENCE_STEPS", 4)
    for preset in QUALITIES.values():
        monkeypatch.setitem(preset, "steps", 3)
    monkeypatch.setattr(drift, "CALLS", (2, 4))


def test_a_sweep_over_presets(run, quick, loads, short):
    status, out, err = run(*quick, "clips=1", "steps=4", "sweep=quality", "json=out.json", "output=page")
    assert status == 0, err
    found = written("out.json")
    reference, exact, fast, draft, cached, _ = found["sweep"]
    assert [row["name"] for row in found["sweep"]] == [
        "reference, 4 steps", "exact", "fast", "draft", "fast, deep_cache=2", "fast, deep_cache=3"
    ]  # fmt: skip
    # The given settings equal the reference: not sampled again, distance zero.
    assert reference["drift_relative"] == found["drift_relative"] == 0 and reference["drift_psnr"] == 99.0
    assert found["calls"] == reference["calls"] == 8 and found["outer_calls"] == 0
    assert exact["calls"] == 8  # the official spacing gives four steps for three
    assert all(row["drift_relative"] > 0 and row["drift_psnr"] < 99 for row in (exact, fast, draft, cached))
    # Timesteps are 999, 666 and 332; only one preset's guidance interval contains the last.
    assert (fast["calls"], draft["calls"]) == (6, 5) and fast["outer_calls"] == 0
    assert cached["outer_calls"] > 0 and cached["calls"] + cached["outer_calls"] == fast["calls"]
    table = Path("page/table.md").read_text()
    head = "| quality | calls | drift | relative | basic | other | objects | first | clip | time |"
    assert "Sweep over quality" in out and head in table and " outer |" in table


def test_a_sweep_over_samplers(run, quick, loads, short):
    assert run(*quick, "clips=1", "steps=4", "sweep=samplers", "json=out.json")[0] == 0
    rows = {row["name"]: row for row in written("out.json")["sweep"]}
    assert [*rows] == ["reference, 4 steps"] + [
        f"{name}, {steps} steps"
        for name in ("ddim", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "heun")
        for steps in ((1, 2) if name == "heun" else (2, 4))
    ]


def test_a_row_equal_to_the_settings_is_not_sampled_again(run, quick, loads, monkeypatch):
    asked, real = [], pipeline.generate
    monkeypatch.setattr(
        pipeline, "generate", lambda model, *a: asked.append(model.config.sample.guidance) or real(model, *a)
    )
    assert run(*quick, "clips=1", "steps=1", "guidance=3", "sweep=guidance", "json=out.json")[0] == 0
    assert asked == [3, 1, 2, 5, 7, 9]
    assert [row["name"] for row in written("out.json")["sweep"]] == [
        f"guidance {v}" for v in (1, 2, 3, 5, 7, 9)
    ]


def test_removing_a_condition_changes_nothing_else(road, picture):
    """Each removal changes only its own part of the UNet's input, in both branches of guidance."""
    config = road.config
    noise = torch.zeros(1, config.vae.embed_dim, *config.latent_size)
    conds = pipeline.encode(road, [picture], ["a red square moves left"], noise)
    text, local = config.clip.text_length, (config.unet.local_grid // 4) ** 2
    places = {"text": slice(0, text), "local tokens": slice(text, text + local),
              "image vector": slice(text + local, None), "concat": None}  # fmt: skip
    rows = {variant.missing: variant for variant in evaluate.variants(config, "conditions")}
    assert {*rows} == {"", *places}
    before = {name: tensor.clone() for name, tensor in road.unet.state_dict().items()}
    for missing, place in places.items():
        ablated = evaluate.model_for(road, rows[missing]).unet
        whole, less = (unet.prepare(conds[0], 3) for unet in (road.unet, ablated))
        changed = (whole.context != less.context).any(dim=(0, 2))
        expected = torch.zeros_like(changed)
        if place is not None:
            expected[place] = True
        if missing == "text":  # start, end and padding may be the same
            assert changed.any() and not (changed & ~expected).any()
            negative = road.unet.prepare(conds[1], 3).context[:, place]
            torch.testing.assert_close(less.context[:, place], negative)
        else:
            assert torch.equal(changed, expected)
        assert torch.equal(whole.concat, less.concat) == (missing != "concat")
        if missing in ("concat", "local tokens"):
            gone = less.concat if missing == "concat" else less.context[:, place]
            assert gone.abs().max() == 0
        assert torch.equal(whole.fps_embedding, less.fps_embedding)
    assert all(torch.equal(before[name], tensor) for name, tensor in road.unet.state_dict().items())


def test_weights_from_a_folder_at_their_own_size(run, road, tmp_path):
    settings = dataclasses.replace(road.config, sample=dataclasses.replace(road.config.sample, fps=8))
    checkpoint.save("weights", road.parts, settings)
    words = ["weights=weights", "device=cpu", "clips=1", "steps=1", "json=out.json"]
    status, _, err = run(*words)
    assert status == 0, err
    found = written("out.json")["settings"]
    assert (found["width"], found["frames"], found["fps"], found["world_speed"]) == (16, 3, 8, 1.0)
    assert {*found["weights_sha256"]} == {"unet.safetensors", "vae.safetensors", "clip.safetensors"}
    # The same frames at twice the rate last half as long, so true clips show half the motion.
    assert run(*words, "fps=16")[0] == 0 and written("out.json")["settings"]["world_speed"] == 0.5
    status, _, err = run(*words, "frames=9")
    assert status == 2 and "4.0 times the motion" in err and "sample.frames = 9" in err


# --- refusals


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["clips=0"], "clips is 0; give 1 or more"),
        (["clips=many"], "clips is a whole number"),
        (["first_seed=-1"], "first_seed is -1"),
        (["first_seed=1099511627770", "clips=7"], "2**40"),
        (
            ["sweep=everything"],
            "sweep=everything is unknown; use one of guidance, steps, eta, conditions, quality",
        ),
        (["sweep="], "sweep= is empty"),
        (["json=here"], "json=here is a folder"),
        (["json=file/out.json"], "cannot create the folder"),
        (["output=file"], "cannot create the folder"),
        (["frames=1"], "motion is read from two frames or more"),
        (["seed=3"], "use first_seed="),
        (["prompt=a red square"], "prompt= has no effect here"),
        (["sampler=ancestral", "steps=1000", "sweep=eta"], "sweep=eta has no effect with"),
        (["sampler=unipc", "sweep=eta"], "sweep=eta has no effect with sample.sampler=unipc"),
        (["deep_cache=2", "sweep=conditions"], "use deep_cache=0"),
        (["schedule.prediction=eps", "sweep=samplers"], "divide by zero"),
        (["eps_form=recovered", "spacing=trailing", "sweep=steps"], "divide by zero"),
        (["clip=3"], "clip is a group of settings"),
        (["--quick"], "there is no option --quick"),
    ],
)
def test_refusals_before_any_work(run, quick, loads, words, message):
    Path("file").touch()
    Path("here").mkdir()
    status, _, err = run(*quick, *words)
    assert status == 2 and message in err and loads == []
    assert sorted(path.name for path in Path().iterdir()) == ["file", "here"]


def test_a_failed_write_leaves_the_old_file(run, quick, loads, monkeypatch):
    Path("out.json").write_text("before")

    def fails(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "replace", fails)
    status, _, err = run(*quick, "clips=1", "steps=1", "json=out.json")
    assert status == 2 and "the disk is full" in err
    assert [path.name for path in Path().iterdir()] == ["out.json"]
    assert Path("out.json").read_text() == "before"


# --- numbers


def test_wilson_intervals():
    # Brown, Cai and DasGupta 2001; the ends by hand.
    assert scores.wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert scores.wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert scores.wilson(15, 20) == pytest.approx((0.5313, 0.8881), abs=1e-4)
    assert scores.wilson(0, 0) is None


def test_means_and_missing_values():
    assert scores.mean_interval([1.0, 3.0]) == pytest.approx((2 - 12.706, 2 + 12.706))
    assert scores.mean_interval([1.0]) is None
    low, high = scores.share_interval([1.0, 1.0, 0.6])
    assert low == pytest.approx(0.293, abs=1e-3) and high == 1.0 and scores.share_interval([1.0]) is None
    black, grey = np.zeros((2, 4, 4, 3), np.uint8), np.full((2, 4, 4, 3), 51, np.uint8)
    assert scores.psnr(black, black) == 99.0
    assert scores.psnr(black, grey) == pytest.approx(20 * np.log10(5))
    empty = scores.summarise([], {"still_psnr": [], "vae_psnr": []}, 0.0)
    assert {*empty.values.values(), *empty.intervals.values()} == {None}
    assert pages.motion_table(empty).rows == ()
    assert {row[1:] for row in pages.score_table(empty).rows} == {("-", "-", "0")}


def test_still_clips_are_not_compared_by_pixels():
    still, left = (
        drawing.Facts(None, (), (drawing.Move(kind),), drawing.STILL) for kind in ("still", "left")
    )
    pan = drawing.Facts(None, (), (), drawing.Move("pan left"))
    assert [scores.comparable(facts) for facts in (still, left, pan)] == [False, True, False]
