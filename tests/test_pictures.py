"""The world of pictures: cut-outs, their clips, the reader and the shape scores."""

import dataclasses
import json
import logging
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter
from test_evaluation import Mirror, written

from i2vgen import pipeline
from i2vgen.evaluation import evaluate
from i2vgen.evaluation.evaluate import Plan
from i2vgen.model.moved import landed
from i2vgen.settings.config import LAB
from i2vgen.settings.merge import load_config
from i2vgen.training import data
from i2vgen.training.settings import load_settings
from i2vgen.world import drawing, flows, matching, pictures, things
from i2vgen.world.drawing import Move

ROOT = Path(__file__).parents[1]
THINGS = ROOT / "i2vgen" / "assets" / "things"
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
TINY = ROOT / "configs" / "train" / "tiny_vae.yaml"
SMALL = ROOT / "configs" / "train" / "small_vae.yaml"  # has a vocabulary of its own


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    skimage = pytest.importorskip("skimage")
    folder = tmp_path_factory.mktemp("photographs")
    for name in ("astronaut", "chelsea", "coffee"):
        shutil.copy(Path(skimage.__file__).parent / "data" / f"{name}.png", folder)
    (folder / "notes.txt").touch()
    return folder


@pytest.fixture(scope="session")
def world(photographs):
    return pictures.open_for_scoring(str(THINGS), str(photographs))


@pytest.fixture(scope="session")
def toys(tmp_path_factory):
    """A folder of plain cut-outs with names of the training part, and one that is kept from it."""
    folder = tmp_path_factory.mktemp("toys")
    names = [f"{colour}_{noun}" for noun in ("apple", "ball", "car", "hat") for colour in ("red", "blue")]
    for name in [n for n in names if things.part_of(things.plain_name(n)) == "training"] + ["green_turtle"]:
        save_toy(folder / f"{name}.png", name.split("_")[0])
    return folder


def save_toy(path, colour):
    picture = Image.new("RGBA", (60, 40))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((4, 4, 55, 35), fill=colour)
    draw.rectangle((10, 10, 25, 30), fill="white")
    picture.save(path)


def clips(world, seeds, kind, side=64):
    return [world.clip(seed, width=side, height=side, kind=kind) for seed in seeds]


def read_right(world, clip, frames):
    correlations = matching.shapes(frames, clip.frames[0], clip.facts, world)
    right = matching.score(clip.facts, matching.read(frames, clip.facts, world), correlations)
    return right["motion_right"] and right["camera_right"], matching.kept(correlations)


# --- clips


def test_a_clip_depends_on_its_seed_alone(world):
    again = pickle.loads(pickle.dumps(world))
    for seed in range(6):
        one, two = (w.clip(seed) for w in (world, again))
        assert np.array_equal(one.frames, two.frames) and one.caption == two.caption
    assert len({world.clip(seed, frames=1).caption for seed in range(30)}) == 30
    one, three = world.clip(3), world.clip(3, frames=3)
    assert np.array_equal(one.frames[[0, -1]], three.frames[[0, -1]])


def test_another_process_opens_the_pictures_itself(world):
    assert len(pickle.dumps(world)) < 1000


def test_captions_use_known_words_and_name_things_or_call_them_it(world):
    known = set(world.vocabulary())
    captions = [
        (facts, world.caption(facts, seed)) for seed in range(300) for facts in [world.sample_facts(seed)]
    ]
    assert {word for _, caption in captions for word in caption.replace(",", "").split()} <= known
    single = [(f.things[0].name, caption) for f, caption in captions if len(f.things) == 1]
    named = [name in caption for name, caption in single]
    assert 0.6 < np.mean(named) < 0.85
    assert all(thing.name in caption for f, caption in captions if len(f.things) == 2 for thing in f.things)


def test_all_motions_pairs_and_camera_moves_occur_and_things_stay_in_the_picture(world):
    seen, cameras = set(), set()
    for seed in range(600):
        facts = world.sample_facts(seed)
        seen |= {move.kind for move in facts.moves}
        cameras.add(facts.camera.kind)
        for thing, move in zip(facts.things, facts.moves, strict=True):
            x, y, radius, _ = drawing.track(thing, move, facts.camera, np.linspace(0, 1, 5))
            assert np.all(np.maximum(abs(x), abs(y)) + 0.4 * radius < 1.0), (seed, thing, move)
            assert move.kind != "rotate" or world.things[thing.name].turns
    assert seen == set(drawing.MOTIONS) and cameras == {"still", *drawing.CAMERA_MOVES}


@pytest.mark.parametrize("side", [64, 128])
def test_things_stand_out_from_the_background(world, side):
    """The picture with a thing differs from the one without it, wherever the thing is."""
    for seed in range(30):
        facts = world.sample_facts(seed, kind="single")
        size = {"width": side, "height": side, "frames": 1}
        bare = dataclasses.replace(facts, things=(), moves=())
        with_it, without = (world.render(f, **size)[0].astype(float) for f in (facts, bare))
        gap = np.sqrt(((with_it - without) ** 2).sum(-1))
        assert gap[gap > 8].mean() > 50, seed


def test_edges_have_no_halo(tmp_path):
    """A disc of the background's colour disappears: what is transparent, black here, must not show."""
    picture = Image.new("RGBA", (200, 200))
    ImageDraw.Draw(picture).ellipse((50, 50, 149, 149), fill=(200, 100, 50))
    picture.save(tmp_path / "disc.png")
    small = pictures.open_for_scoring(str(tmp_path))
    colour = (200 / 255, 100 / 255, 50 / 255)
    facts = small.sample_facts(0, kind="single")
    ground = drawing.Backdrop("plain", colour, colour, 0.0, 1.0, 0.0, 0.0, 0)
    for move in ("left", "grow", "down right"):
        seen = dataclasses.replace(facts, backdrop=ground, moves=(Move(move, "slowly"),))
        frames = small.render(seen, width=64, height=48, frames=6)
        assert abs(frames.astype(int) - (200, 100, 50)).max() <= 1


def test_motion_is_even_below_a_pixel(world):
    name = world.names[0]
    facts = world.sample_facts(0, kind="single")
    ground = drawing.Backdrop("plain", (0, 0, 0), (0, 0, 0), 0.0, 1.0, 0.0, 0.0, 0)
    thing = pictures.Placed(name, 0.1, 0.0, 0.4, 0.0)
    facts = dataclasses.replace(facts, backdrop=ground, things=(thing,), moves=(Move("left", "slowly"),))
    frames = world.render(facts, width=64, height=64, frames=16).astype(float).sum(-1)
    places = (frames * np.arange(64)).sum((1, 2)) / frames.sum((1, 2))
    assert np.diff(places) == pytest.approx(np.full(15, -0.32 * 32 / 15), abs=0.02)
    light = frames.sum((1, 2))
    assert light.max() / light.min() < 1.01


@pytest.mark.parametrize("kind", ["basic", "pair", "camera"])
@pytest.mark.parametrize("shapes", [True, False])
def test_the_true_flow_carries_the_first_frame_to_the_others(world, kind, shapes):
    drawer, error, still = drawing if shapes else world, 0.0, 0.0
    for seed in range(6):
        facts = drawer.sample_facts(seed, kind=kind)
        frames = drawer.render(facts, width=64, height=48, frames=4, speed=0.5)
        true = torch.from_numpy(frames).permute(3, 0, 1, 2)[None] / 255
        covers = drawer.covers(facts, 64, 48)
        shift = flows.flow(facts, covers, width=64, height=48, frames=4, speed=0.5)
        before = torch.full((1, 1, 4, 48, 64), 3.0)  # things hide what is behind them
        for cover in covers:
            before += 6 * torch.from_numpy(cover > 0.5)
        carried, share = landed(true[:, :, :1], torch.from_numpy(shift)[None], before)
        carried, reached = (one.movedim(0, 1)[None] for one in (carried, share > 0.99))
        error += ((carried - true).abs() * reached)[:, :, -1].mean()
        still += ((true[:, :, :1] - true).abs() * reached)[:, :, -1].mean()
        assert abs(shift[:, 0]).max() < 1e-6 and reached[:, :, -1].float().mean() > 0.6
    assert error < 0.5 * still


def test_the_true_flow_in_halves_of_the_sides(world):
    facts = world.sample_facts(0, kind="single")
    thing = pictures.Placed(facts.things[0].name, 0.0, 0.0, 0.5, 0.0)
    facts = dataclasses.replace(facts, things=(thing,), moves=(Move("right"),))
    cover = np.zeros((4, 8))
    cover[1:3, 3:5] = 1
    shift = flows.flow(facts, [cover], width=8, height=4, frames=2)
    assert shift[0, 1][cover > 0.5] == pytest.approx(0.52 / 2)  # 1 is half the shorter side
    assert not shift[0, 1][cover < 0.5].any() and not shift[1].any()


# --- names


def test_the_split_never_changes_and_keeps_families_together():
    assert {things.part_of(things.plain_name(path.stem)) for path in THINGS.glob("*.png")} == {
        "never trained"
    }
    assert things.part_of("green apple") == things.part_of("red apple") == things.part_of("apple")
    words = [f"word{i}" for i in range(2000)]
    share = np.mean([things.part_of(word) == "never trained" for word in words])
    assert share == pytest.approx(things.NEVER_TRAINED, abs=0.03)
    assert [things.part_of(n) for n in ("turtle", "rocket", "cat", "apple")] == [
        "never trained", "never trained", "training", "training"
    ]  # fmt: skip


def test_shipped_things():
    files = sorted(THINGS.glob("*.png"))
    assert len(files) == 31 and max(path.stat().st_size for path in files) <= 6000
    assert "OFL" in (ROOT / "i2vgen" / "assets" / "README.md").read_text(encoding="utf-8")


@pytest.mark.skipif(not FONT.exists(), reason="needs Debian's fonts-noto-color-emoji")
def test_a_font_holds_a_thousand_things():
    found = things.load_things(FONT)
    assert len(found) > 1000 and {"turtle", "rocket", "red apple", "dog face"} <= set(found)
    assert not [name for name in found if "regional" in name or "modifier" in name or "flag" in name]
    shown, kept = (set(things.load_things(FONT, part)) for part in ("training", "never trained"))
    assert shown | kept == set(found) and not shown & kept and len(kept) > 100


# --- reading


def true_and_right(world, seeds, spoil=lambda frames: frames, side=64):
    right, kept = [], []
    for kind in drawing.KINDS:
        for clip in clips(world, seeds, kind, side):
            good, shape = read_right(world, clip, spoil(clip.frames))
            right.append(good)
            kept += [shape] if shape else []
    return np.mean(right), kept


def worn(frames):
    """Blur and noise of a weak autoencoder."""
    noise = np.random.default_rng(0).normal(0, 20, frames.shape)
    blurred = [np.asarray(Image.fromarray(f).filter(ImageFilter.GaussianBlur(1.2))) for f in frames]
    return np.clip(np.stack(blurred) + noise, 0, 255).astype(np.uint8)


def test_true_clips_are_read_right(world):
    right, kept = true_and_right(world, range(4))
    assert right >= 0.99 and np.mean([k.mean for k in kept]) > 0.95


def test_worn_clips_are_read_right(world):
    right, kept = true_and_right(world, range(100, 103), worn)
    assert right >= 0.93 and np.mean([k.mean for k in kept]) > 0.8


@pytest.mark.slow
def test_hundreds_of_true_and_worn_clips(world):
    right, kept = true_and_right(world, range(100))
    assert right >= 0.99 and np.mean([last for k in kept for last in k.last]) > 0.97
    assert true_and_right(world, range(50), worn)[0] >= 0.95
    assert true_and_right(world, range(15), side=128)[0] >= 0.99


# --- failures that must score low


def fades(world, clip):
    """The thing becomes a blob of one colour."""
    thing = clip.facts.things[0]
    old = world.things[thing.name]
    finest = old.pyramid.finest.astype(float)
    alpha = finest[..., 3:]
    mean = finest[..., :3].sum((0, 1)) / alpha.sum()
    yy, xx = np.mgrid[: things.SIDE, : things.SIDE]
    blob = (np.hypot(xx - things.SIDE / 2, yy - things.SIDE / 2) < things.SIDE * 0.35)[..., None] * 255.0
    flat = np.concatenate([mean * blob, blob], -1).astype(np.uint8)
    other = pictures.PictureWorld(
        world.things | {thing.name: things.Cutout(thing.name, flat)}, world.photographs
    )
    end = draw(other, clip.facts)
    mix = np.linspace(0, 2, len(end)).clip(0, 1)[:, None, None, None]
    return ((1 - mix) * clip.frames + mix * end).astype(np.uint8)


def swaps(world, clip):
    thing = clip.facts.things[0]
    name = world.names[(world.names.index(thing.name) + 11) % len(world.names)]
    end = draw(world, dataclasses.replace(clip.facts, things=(dataclasses.replace(thing, name=name),)))
    return np.concatenate([clip.frames[:3], end[3:]])


def turns_back(world, clip):
    back = {"left": "right", "right": "left", "up": "down", "down": "up", "grow": "shrink", "shrink": "grow"}
    move = clip.facts.moves[0]
    return draw(world, dataclasses.replace(clip.facts, moves=(Move(back[move.kind], move.speed),)))


def leaves(world, clip):
    end = draw(world, dataclasses.replace(clip.facts, things=(), moves=()))
    return np.concatenate([clip.frames[:4], end[4:]])


def draw(world, facts):
    return world.render(facts, width=64, height=64, frames=16)


def stays(world, clip):
    return np.repeat(clip.frames[:1], 16, axis=0)


@pytest.mark.parametrize("fail", [stays, fades, swaps, turns_back, leaves])
def test_failures_score_low(world, fail):
    # A slow growth changes so little that the first picture still resembles what it should become.
    moving = ("left", "right", "up", "down", *(() if fail is stays else ("grow", "shrink")))
    chosen = [c for c in clips(world, range(30), "basic") if c.facts.moves[0].kind in moving][:8]
    kept = [read_right(world, clip, fail(world, clip)) for clip in chosen]
    last = np.mean([shape.last[0] for _, shape in kept])
    assert last <= 0.25, last
    assert np.mean([good and shape.whole for good, shape in kept]) <= 0.125
    assert np.mean([shape.mean for _, shape in kept]) < 0.8  # the first frames are right
    if fail in (stays, turns_back):
        assert not any(good for good, _ in kept)


# --- evaluate


@pytest.fixture
def oracle(monkeypatch, road, photographs):
    """Sampling returns spoil(the true clip)."""

    def install(spoil=lambda frames: frames):
        monkeypatch.setattr(
            pipeline,
            "load_parts",
            lambda settings: pipeline.I2VGenXL(settings, road.unet, Mirror(), road.clip, road.device),
        )
        plan = Plan(clips=8, things=str(THINGS), backgrounds=str(photographs))
        facts = {(item.seed, item.caption): item.facts for item in evaluate.items(plan)}

        def generate(model, given, prompts, seeds):
            keys = zip(seeds, prompts, strict=True)
            found = [evaluate.render(facts[key], model.config, 1.0, plan.world) for key in keys]
            assert all(np.array_equal(c[0], np.asarray(p)) for c, p in zip(found, given, strict=True))
            return torch.from_numpy(np.stack([spoil(clip) for clip in found]))

        monkeypatch.setattr(pipeline, "generate", generate)

    return install


SIZE = ["width=64", "height=64", "frames=16"]


def test_evaluate_scores_a_perfect_model(script_at, quick, oracle, photographs):
    oracle()
    status, out, err = script_at("evaluate")(
        *quick,
        *SIZE,
        "clips=3",
        f"things={THINGS}",
        f"backgrounds={photographs}",
        "json=out.json",
        "output=page",
    )
    assert status == 0, err
    found = written("out.json")
    for name in ("motion_accuracy_basic", "motion_accuracy_all", "other_motion_accuracy", "motion_and_shape"):
        assert found[name] == 1.0, name
    assert found["shape_kept"] > 0.95 and found["shape_kept_last"] == 1.0 and found["vae_shape_kept"] > 0.95
    assert found["settings"]["things"] == str(THINGS) and found["counts"]["shape_kept"] >= 3
    for place in (out, Path("page/table.md").read_text(), Path("page/index.html").read_text()):
        assert "shape kept in the last frame" in place and "identity" not in place
    assert "note" not in out


def test_evaluate_sees_a_still_model(script_at, quick, oracle, photographs):
    oracle(lambda frames: np.repeat(frames[:1], len(frames), axis=0))
    words = [*SIZE, "clips=3", f"things={THINGS}", f"backgrounds={photographs}", "json=out.json"]
    assert script_at("evaluate")(*quick, *words)[0] == 0
    found = written("out.json")
    assert found["motion_and_shape"] <= 1 / 3 and found["shape_kept"] < 0.75


def test_evaluate_notes_names_of_the_training_part(toys):
    assert "a model may know these pictures" in evaluate.seen_in_training(Plan(things=str(toys)))
    assert evaluate.seen_in_training(Plan(things=str(THINGS))) == evaluate.seen_in_training(Plan()) == ""


# --- training


def test_training_draws_pictures_and_leaves_out_what_is_scored(toys, photographs, caplog):
    words = ["output=x", f"train.things={toys}", f"train.backgrounds={photographs}"]
    config, train = load_settings(SMALL, [*words, "train.num_clips=4"])
    with caplog.at_level(logging.WARNING):
        source = data.open_source(config, train)
    assert "green turtle" not in source.world.names and "red apple" in source.world.names
    assert "they are spelt" in caplog.text
    bucket = data.Bucket(8, 8, 2)
    found = source(bucket, [0, 5])
    assert found.pixels.shape == (2, 3, 8, 32, 32) and abs(found.pixels).max() <= 1
    again = pickle.loads(pickle.dumps(source))(bucket, [4, 1])
    assert torch.equal(again.pixels, found.pixels) and again.captions == found.captions
    assert set(data.contents(source)) == {"things", "backgrounds"}


def test_a_training_run_knows_its_pictures_again(script_at, toys):
    shutil.copytree(toys, "toys")
    words = [TINY, "output=run", "train.things=toys", "train.steps=2", "train.sample_every=0"]
    run = script_at("train")
    status, out, err = run(*words)
    assert status == 0 and "holds the weights after 2 steps" in out, err
    save_toy(Path("toys/red_apple.png"), "green")
    pictures.open_world.cache_clear()  # another process would read the folder again
    status, _, err = run(*words)
    assert status == 2 and "train.things=toys holds other things than when" in err


# --- refusals


def bad_folder(name):
    folder = Path("bad")
    folder.mkdir()
    if name == "opaque":
        Image.new("RGBA", (40, 40), "red").save(folder / "cup.png")
    elif name == "no alpha":
        Image.new("RGB", (40, 40), "red").save(folder / "cup.png")
    elif name == "transparent":
        Image.new("RGBA", (40, 40)).save(folder / "cup.png")
    elif name == "collide":
        save_toy(folder / "red_cup.png", "red")
        save_toy(folder / "Red cup.png", "red")
    elif name == "nameless":
        save_toy(folder / "17.png", "red")
    elif name == "broken":
        (folder / "cup.png").write_bytes(b"no picture")
    return folder


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("opaque", "is opaque all over"),
        ("no alpha", "has no alpha channel (RGB)"),
        ("transparent", "is transparent all over"),
        ("collide", "would both be called 'red cup'; rename one"),
        ("nameless", "the name says nothing"),
        ("broken", "is no readable PNG"),
        ("empty", "holds no PNG files"),
    ],
)
def test_refused_folders(script_at, quick, name, message):
    status, _, err = script_at("evaluate")(*quick, *SIZE, f"things={bad_folder(name)}")
    assert status == 2 and message in err and len(err.splitlines()) == 1


def test_refused_words(script_at, quick, toys, tmp_path):
    run = script_at("evaluate")
    for words, message in (
        (
            ["things=nowhere"],
            "things=nowhere does not exist; give a folder of PNG cut-outs or a colour-emoji",
        ),
        ([f"backgrounds={toys}"], "give things= too"),
        ([f"things={toys}", f"backgrounds={tmp_path}"], "holds no usable photograph"),
        ([f"things={toys}", "backgrounds=nowhere"], "backgrounds=nowhere is not a folder"),
        ([f"things={toys}", "width=16", "height=16"], "too small for pictures of things"),
        ([f"things={__file__}"], "is no font with bitmaps of 109 pixels"),
    ):
        status, _, err = run(*quick, *SIZE, *words)
        assert status == 2 and message in err, err
    run = script_at("train")
    for words, message in (
        (
            [f"train.things={THINGS}"],
            f"train.things={THINGS} holds 31 things, but none of the part 'training'",
        ),
        ([f"train.backgrounds={toys}"], "give train.things too"),
        ([f"train.things={toys}", "train.data=clips"], "train.things needs train.data=world"),
    ):
        status, _, err = run(TINY, "output=x", *words)
        assert status == 2 and message in err, err


def test_a_text_font_has_no_pictures(script_at, quick):
    matplotlib = pytest.importorskip("matplotlib")
    font = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    status, _, err = script_at("evaluate")(*quick, *SIZE, f"things={font}")
    assert status == 2 and "holds no coloured pictures that Pillow can draw" in err and "COLRv1" in err


def test_a_model_is_scored_on_what_it_was_trained_on(tmp_path):
    """Unless things= says otherwise; a later training of another part does not count."""
    config = load_config(weights=LAB)
    assert evaluate.suited(Plan(), config).things == "shapes"
    folder = tmp_path / "weights"
    shutil.copytree(LAB, folder)
    config = dataclasses.replace(config, weights=str(folder))
    trained = {"train": {"part": "diffusion", "things": "font.ttf"}}
    for origin in (trained, {"before": [{"train": {"part": "vae", "things": ""}, "before": [trained]}]}):
        (folder / "origin.json").write_text(json.dumps(origin))
        assert evaluate.suited(Plan(), config).things == evaluate.SHIPPED_THINGS
        assert evaluate.suited(Plan(things="shapes"), config).things == "shapes"
    assert {p.stem for p in Path(evaluate.SHIPPED_THINGS).glob("*.png")} >= {"turtle", "rocket"}


def test_an_example_picture_shows_a_thing(script_at):
    run = script_at("draw_example")
    status, out, _ = run("seed=5", f"things={THINGS}", "size=96", "output=thing.png")
    clip = pictures.open_for_scoring(str(THINGS)).clip(5, width=96, height=96, frames=1, kind="basic")
    assert status == 0 and clip.caption in out
    assert np.array_equal(np.asarray(Image.open("thing.png")), clip.frames[0])
    status, out, _ = run("seed=5", "kind=pair", f"things={THINGS}", "size=96", "output=two.png")
    clip = pictures.open_for_scoring(str(THINGS)).clip(5, width=96, height=96, frames=1, kind="pair")
    assert status == 0 and clip.caption in out
    assert np.array_equal(np.asarray(Image.open("two.png")), clip.frames[0])
    assert "choose basic or single or pair or camera" in run("seed=1", "kind=two")[2]
    assert "things= has no effect on the boat" in run(f"things={THINGS}")[2]
    assert "give things= too" in run("seed=1", "backgrounds=photos")[2]
