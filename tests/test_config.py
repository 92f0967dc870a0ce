"""Settings: defaults, files, weights folders and command lines are merged and checked."""

import dataclasses
import json
import re
import time
from pathlib import Path

import pytest
import yaml

from i2vgen.settings import config, merge
from i2vgen.settings.config import Config, Use
from i2vgen.settings.merge import load_config
from i2vgen.training.settings import load_settings

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture
def write(tmp_path):
    def write(text, name="settings.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.fixture
def weights(tmp_path):
    """weights(settings): a weights folder with these settings and no tensors."""

    def make(settings):
        folder = tmp_path / "weights"
        folder.mkdir(exist_ok=True)
        (folder / config.SETTINGS_FILE).write_text(json.dumps({"format": 1, "settings": settings}))
        return str(folder)

    return make


# --- the order of the layers


def test_each_layer_overrides_the_one_before(write, weights):
    folder = weights({"sample": {"steps": 11, "fps": 11, "guidance": 11.0}, "schedule": {"cosine_s": 0.011}})
    file = write("sample: {steps: 22, fps: 22}\n")
    got = load_config(file, ["sample.steps=33"], weights=folder)
    assert (got.sample.steps, got.sample.fps, got.sample.guidance) == (33, 22, 11.0)
    assert got.schedule.cosine_s == 0.011
    assert got.sample.frames == Config().sample.frames


def test_weights_may_be_given_in_any_layer(write, weights):
    folder = weights({"sample": {"steps": 11}})
    assert load_config(None, [f"weights={folder}"]).sample.steps == 11
    assert load_config(write(f"weights: {folder}\n")).sample.steps == 11
    assert load_config(write("weights: nowhere\n"), weights=folder).weights == folder


def test_the_defaults_are_the_released_model():
    assert load_config() == Config()


def test_random_weights_store_no_settings():
    assert load_config(weights="random") == dataclasses.replace(Config(), weights="random")


# --- literals

TEXTS = [
    "a cat: it runs",
    "no",
    "${x}",
    "[a, b]",
    "1e3",
    "a = b",
    "null",
    "{a: 1}",
    "#1",
    "~",
    "0x10",
    " x ",
    "'",
]


@pytest.mark.parametrize("text", TEXTS)
def test_literals_on_the_command_line_are_never_parsed(text):
    got = load_config(None, [f"prompt={text}", f"negative_prompt={text}", f"image={text}", f"output={text}"])
    assert got.prompt == (text,) and got.image == (text,)
    assert got.negative_prompt == text and got.output == text


@pytest.mark.parametrize(
    "text", ["a cat, it runs", "no", "1e3", "a = b", "${x}", "0x10", "2024-01-01", "1_000"]
)
def test_literals_in_a_file_are_kept_verbatim(text, write):
    got = load_config(write(f"prompt: {text}\nimage:\n  - b\n  - {text}\noutput: {text}\n"))
    assert got.prompt == (text,) and got.image == ("b", text) and got.output == text


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_survives_a_round_trip_through_a_file(text, write):
    before = dataclasses.replace(
        Config(), prompt=(text, "two\nlines"), image=(text,), output=text, negative_prompt=text
    )
    assert load_config(write(before.to_yaml())) == before


def test_repeated_pictures_and_prompts_make_lists():
    got = load_config(None, ["image=a", "prompt=x", "image=b", "prompt=y", "output=1", "output=2"])
    assert got.image == ("a", "b") and got.prompt == ("x", "y")
    assert got.output == "2"


def test_the_command_line_replaces_the_pictures_of_a_file(write):
    assert load_config(write("image: [a, b]\nprompt: p\n"), ["image=c"]).image == ("c",)


def test_keywords_are_texts_too():
    assert load_config(prompt="no", image=["a", "b"]).image == ("a", "b")
    with pytest.raises(ValueError, match="unknown field 'promt'"):
        load_config(promt="no")


@pytest.mark.parametrize("line", ["image: {a: b}", "image: [a, [b]]", "weights: [a]", "output: {a: b}"])
def test_literals_that_are_not_text_are_refused(line, write):
    with pytest.raises(ValueError, match=f"{line.split(':')[0]} .*give one text"):
        load_config(write(line))


# --- names and values


def test_bare_names_of_sample_and_runtime():
    got = load_config(None, ["steps=7", "seed=[1,2]", "device=cpu", "batch=2"])
    assert got.sample.steps == 7 and got.sample.seed == (1, 2)
    assert got.runtime.device == "cpu" and got.runtime.batch == 2
    assert set(config.SHORT) == {
        f.name for c in (config.Sample, config.Runtime) for f in dataclasses.fields(c)
    }


def test_bare_names_are_unique():
    names = [f.name for c in (config.Sample, config.Runtime) for f in dataclasses.fields(c)]
    assert len(set(names)) == len(names)
    assert not set(names) & {*config.SECTIONS, *config.LITERALS}


def test_a_single_value_is_a_list_of_one(write):
    assert load_config(None, ["seed=5"]).sample.seed == (5,)
    assert load_config(write("sample: {seed: 6}\n")).sample.seed == (6,)
    assert load_config(None, ["vae.attention_resolutions=32"]).vae.attention_resolutions == (32,)


def test_dotted_names_in_a_file_and_groups_on_the_command_line(write):
    got = load_config(write("sample.steps: 5\nguidance: 2\nsample: {fps: 3}\n"), ["sample={frames: 4}"])
    assert (got.sample.frames, got.sample.fps, got.sample.steps, got.sample.guidance) == (4, 3, 5, 2.0)


@pytest.mark.parametrize("text", ["", "# nothing\n", "sample:\n", "sample:\n  # steps: 5\nuse:\n"])
def test_empty_files_and_empty_headings_change_nothing(text, write):
    assert load_config(write(text)) == Config()


def test_only_booleans_are_structural_switches():
    booleans = {f.name for f in dataclasses.fields(Use) if isinstance(getattr(Use(), f.name), bool)}
    assert set(config.STRUCTURAL_SWITCHES) == booleans


# --- mistakes: (what is given, words that the message must hold)

MISTAKES = [
    # sizes, with the nearest valid ones
    ("width=700", "sample.width is 700", "640 or 704", "vae.factor", "unet.factor"),
    ("height=63", "sample.height is 63", "nearest is 64", "vae.factor", "unet.factor"),
    ("width=0", "sample.width is 0", "64"),
    ("height=-64", "sample.height is -64", "64"),
    # ranges
    ("frames=0", "sample.frames is 0", "1 to 64"),
    ("frames=65", "sample.frames is 65", "1 to 64"),
    ("steps=0", "sample.steps is 0", "schedule.num_timesteps"),
    ("steps=1001", "sample.steps is 1001", "schedule.num_timesteps = 1000"),
    ("schedule.num_timesteps=10", "sample.steps is 50", "schedule.num_timesteps = 10"),
    ("schedule.num_timesteps=0", "schedule.num_timesteps is 0"),
    ("guidance=nan", "sample.guidance is nan"),
    ("guidance=-inf", "sample.guidance is -inf"),
    ("eta=1.5", "sample.eta is 1.5", "0 to 1"),
    ("eta=nan", "sample.eta is nan"),
    ("fps=0", "sample.fps is 0"),
    ("seed=-1", "sample.seed is -1"),
    (f"seed={2**63}", f"sample.seed is {2**63}", str(2**63 - 1)),
    ("seed=[]", "sample.seed is empty"),
    ("save.fps=0", "save.fps is 0"),
    ("save.fps=nan", "save.fps is nan"),
    ("save.quality=11", "save.quality is 11"),
    ("vae_chunk=0", "runtime.vae_chunk is 0"),
    ("batch=0", "runtime.batch is 0"),
    # slips of size, which would otherwise fail after minutes
    (f"width={2**40}", f"sample.width is {2**40}", "at most 65536"),
    (f"height={2**62}", f"sample.height is {2**62}", "at most 65536"),
    (f"fps={2**40}", "sample.fps is", "at most"),
    (f"batch={2**40}", "runtime.batch is", "at most"),
    (f"refine.width={2**40}", "refine.width is", "at most"),
    ("refine.repeat_frames=65", "refine.repeat_frames is 65", "at most 64"),
    (f"schedule.num_timesteps={2**40}", "schedule.num_timesteps is", "at most"),
    (f"unet.base_width={2**40}", "unet.base_width is", "at most"),
    ("unet.blocks_per_level=33", "unet.blocks_per_level is 33", "at most 32"),
    ("unet.base_width=32768", "unet.base_width times the largest of", "131072", "at most 65536"),
    (f"unet.local_grid={2**40}", "unet.local_grid is", "at most"),
    (f"vae.base_width={2**40}", "vae.base_width is", "at most"),
    ("clip.text.layers=257", "clip.text.layers is 257", "at most 256"),
    (f"clip.text.vocab_size={2**40}", "clip.text.vocab_size is", "at most"),
    (f"clip.vision.image_size={2**40}", "clip.vision.image_size is", "at most"),
    (f"clip.embed_dim={2**40}", "clip.embed_dim is", "at most"),
    ("unet.dropout=1", "unet.dropout is 1"),
    ("unet.norm_groups=0", "unet.norm_groups is 0"),
    ("vae.scale=nan", "vae.scale is nan"),
    ("vae.scale=.inf", "vae.scale is inf"),
    ("use.concat_gain=nan", "use.concat_gain is nan"),
    # contradicting settings, both named
    ("use.text=false use.global_tokens=false use.local_tokens=false", "use.text", "use.global_tokens"),
    ("unet.attention_levels=[true]", "unet.attention_levels", "unet.width_multipliers"),
    ("unet.width_multipliers=[]", "unet.width_multipliers is empty"),
    ("vae.width_multipliers=[]", "vae.width_multipliers is empty"),
    ("unet.base_width=100", "unet.base_width", "unet.norm_groups"),
    ("unet.head_width=48", "unet.base_width", "unet.head_width"),
    ("unet.local_grid=30", "unet.local_grid is 30"),
    ("vae.base_width=100", "vae.base_width", "vae.norm_groups"),
    ("vae.attention_resolutions=[48]", "vae.attention_resolutions", "[48]", "vae.resolution"),
    ("vae.embed_dim=8", "vae.embed_dim is 8", "unet.in_channels is 4"),
    ("vae.embed_dim=8 unet.in_channels=8", "vae.embed_dim is 8", "unet.image_channels is 4"),
    ("unet.context_width=512", "clip.text.width is 1024", "unet.context_width is 512"),
    ("unet.image_vector_width=512", "clip.embed_dim is 1024", "unet.image_vector_width is 512"),
    ("schedule.kind=linear_sd", "schedule.init_beta", "schedule.last_beta"),
    ("schedule.kind=linear schedule.prediction=eps", "schedule.prediction", "schedule.zero_terminal_snr"),
    ("clip.text.layers=1", "clip.text_layer", "clip.text.layers"),
    ("clip.text.heads=3", "clip.text.width is 1024", "clip.text.heads = 3"),
    ("clip.vision.width=100", "clip.vision.width is 100", "clip.vision.head_width = 80"),
    ("clip.vision.image_size=big", "clip.vision.image_size is 'big'"),
    ("clip.text.layers=0.5", "clip.text.layers is 0.5"),
    ("clip.text.context_length=2", "clip.text.context_length is 2"),
    ("clip.text.hf_model_name=roberta", "clip.text.hf_model_name", "Hugging Face"),
    # types
    ("steps=many", "sample.steps is 'many'", "int"),
    ("steps=1.5", "sample.steps is 1.5", "int"),
    ("steps=1e3", "sample.steps is '1e3'", "int"),
    ("steps=", "sample.steps is None", "int"),
    ("frames=true", "sample.frames is True", "int"),
    ("seed=abc", "sample.seed", "'abc'", "int"),
    ("seed=[1,[2]]", "sample.seed is [1, [2]]"),
    ("sample.seed.first=1", "sample.seed is {'first': 1}"),
    ("use.text=maybe", "use.text is 'maybe'", "bool"),
    ("guidance=${x}", "x"),
    ("spacing=odd", "sample.spacing is 'odd'", "official", "trailing"),
    ("dtype=float8", "runtime.dtype is 'float8'", "bfloat16"),
    ("unet.local_widths=[1,2,3]", "unet.local_widths is [1, 2, 3]"),
    ("clip.image_mean=0.5", "clip.image_mean is [0.5]"),
    ("clip.vision=[]", "clip.vision is []"),
    # names
    ("sample.stepz=3", "no setting sample.stepz", "did you mean sample.steps"),
    ("stepz=3", "no setting 'stepz'", "did you mean steps"),
    ("smaple.steps=3", "no setting 'smaple'", "did you mean sample"),
    ("use.txt=false", "no setting use.txt", "did you mean use.text"),
    ("promt=hello", "no setting 'promt'", "did you mean prompt"),
    ("qqqqqq=1", "no setting 'qqqqqq'; i2vgen/settings/config.py lists them all"),
    ("clip.qqqqqq=1", "no setting clip.qqqqqq; known are clip.model"),
    ("image.x=3", "image is one text"),
    ("sample=3", "sample is a group of settings", "sample.NAME"),
    ("use=false", "use is a group of settings"),
    ("sample=3 sample.steps=4", "sample was given a value and a part of it"),
    ("sample.steps=4 sample=3", "sample is a group of settings"),
    ("steps", "'steps' is no setting", "name=value"),
    ("=3", "'=3' is no setting"),
    ("steps=[1", "steps=[1", "cannot be read"),
    # models of open_clip
    ("clip.model=ViT-H-41", "clip.model=ViT-H-41", "near", "ViT-H-14"),
    ("clip.model=missing.json", "clip.model=missing.json does not exist"),
    ("clip.model=xlm-roberta-base-ViT-B-32", "clip.text.hf_model_name"),
    # weights
    ("weights=nowhere", "weights=nowhere does not exist", "weights=random"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "words"), [(m[0], m[1:]) for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_mistakes_raise_helpful_messages(given, words):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is checked below)
        load_config(None, given.split(" "))
    message = str(caught.value)
    assert not [word for word in words if word not in message], message
    assert "\n" not in message and len(message) < 700


@pytest.mark.parametrize("place", ["{}=1", "sample.{}=1", "guidance={}", "spacing={}"])
def test_messages_about_long_inputs_are_short(place):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (any message will do)
        load_config(None, [place.format("x" * 10_000)])
    assert len(str(caught.value)) < 1000


BAD_FILES = [
    ("- a\n- b\n", "holds no settings"),
    ("just a sentence", "holds no settings"),
    ("false\n", "holds no settings"),
    ("sample: {steps: 5\n", "no readable YAML", "line 1"),
    ("a: b: c\n", "no readable YAML"),
    ("\tsample: 1\n", "no readable YAML"),
    ("sample: !!python/object/apply:os.getcwd []\n", "no readable YAML"),
    ("sample: 5\n", "sample is a group of settings"),
    ("1: 2\n", "no setting '1'"),
    ("sample: {1: 2}\n", "no setting sample.1"),
    ("sample: {stepz: 2}\n", "no setting sample.stepz", "sample.steps"),
    ("sample: {steps: [1, 2]}\n", "sample.steps is [1, 2]", "int"),
]


@pytest.mark.parametrize(("text", "words"), [(b[0], b[1:]) for b in BAD_FILES])
def test_files_that_are_not_settings_are_refused(text, words, write):
    path = write(text)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        load_config(path)
    message = str(caught.value)
    assert not [word for word in (*words, str(path)) if word not in message], message
    assert "\n" not in message


LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
ENDLESS = [
    (LAUGHS, "more than 65536 values"),
    ("[" * 50_000, "nests deeper than 64 levels"),
    ("{a: " * 50_000, "nests deeper than 64 levels"),
    ("- " * 50_000, "nests deeper than 64 levels"),
    ("&a [*a]", "*a stands inside of what it refers to"),
    ("&a {b: {c: *a}}", "*a stands inside of what it refers to"),
    ("a: &a " + "[" * 60 + "]" * 60 + "\nb: " + "[" * 60 + "*a" + "]" * 60, "nests deeper than 64 levels"),
    ("a: &a " + "x" * 50_000 + "\nb: [" + "*a, " * 10_000 + "]", "more than 65536 values"),
    ("9" * 5000, "Exceeds the limit"),
    ("!!int ''", "string index out of range"),
    ("!!timestamp x", "NoneType"),
    ("2024-13-45", "month must be in 1..12"),
]


@pytest.mark.parametrize(("text", "words"), ENDLESS, ids=[e[1] for e in ENDLESS])
def test_yaml_that_grows_or_nests_without_end_is_refused_at_once(text, words, write):
    start = time.process_time()
    doors = [lambda: load_config(write(text)), lambda: load_settings(write(text))]
    doors += [lambda: load_config(None, [f"sample.steps={text}"])] * ("\n" not in text)
    doors += [lambda: load_settings(None, [f"train.steps={text}"])] * ("\n" not in text)
    for door in doors:
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            door()
        message = str(caught.value)
        assert words in message and "\n" not in message and len(message) < 600
    assert time.process_time() - start < 10


@pytest.mark.parametrize(("text", "number"), [("010", 8), ("1:30", 90), ("12:30:45", 45045), ("-0_7", -7)])
def test_whole_numbers_that_would_surprise_are_refused(text, number, write):
    message = f"{text} means {number} in YAML; write {number}, or '{text}' for a text"
    for door in (
        lambda: load_config(None, [f"steps={text}"]),
        lambda: load_config(write(f"sample: {{seed: [{text}]}}\n")),
        lambda: load_settings(None, [f"train.steps={text}"]),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            door()
    got = load_config(write(f"negative_prompt: '{text}'\nsample: {{seed: 0x10}}\n"))
    assert got.negative_prompt == text and got.sample.seed == (16,)


def test_aliases_and_merge_keys_work(write):
    got = load_config(write("sample: &a {steps: 3}\nsave: {fps: 5}\nrefine: {<<: *a, width: 64}\n"))
    assert (got.sample.steps, got.refine.steps, got.refine.width) == (3, 3, 64)


@pytest.mark.parametrize(
    "text", ["sample: {steps: 3}\nsample: {fps: 4}\n", "sample: {steps: 3, 'steps': 4}\n"]
)
def test_a_name_given_twice_in_a_file_is_refused(text, write):
    with pytest.raises(ValueError, match=r"gives '(sample|steps)' a second time"):
        load_config(write(text))


def test_files_may_start_with_a_byte_order_mark(write, weights):
    path = write("")
    path.write_bytes(b"\xef\xbb\xbfsample: {steps: 3}\nprompt: caf\xc3\xa9\n")
    assert (load_config(path).sample.steps, load_config(path).prompt) == (3, ("café",))
    folder = weights({"sample": {"steps": 11}})
    stored = Path(folder, config.SETTINGS_FILE)
    stored.write_bytes(b"\xef\xbb\xbf" + stored.read_bytes())
    assert load_config(weights=folder).sample.steps == 11


@pytest.mark.parametrize(
    "word", ["device=${oc.env:SECRET}", "clip.words=[a,'${sample.steps}']", "clip.vision={a: [['${x}']]}"]
)
def test_references_are_never_expanded(word, write, weights, monkeypatch):
    monkeypatch.setenv("SECRET", "s3cr3t")
    name, value = word.split("=")
    name = name if "." in name else f"runtime.{name}"
    stored = {}
    merge._set(stored, name, yaml.safe_load(value), "")
    for door in (
        lambda: load_config(None, [word]),
        lambda: load_config(write(f"{name}: {value}\n")),
        lambda: load_config(weights=weights(stored)),
        lambda: merge.from_dict(stored),
    ):
        with pytest.raises(ValueError, match=r"references such as \$\{\.\.\.\} are not expanded") as caught:
            door()
        assert "s3cr3t" not in str(caught.value) and name in str(caught.value)
    for word in ("train.data=${oc.env:SECRET}", "train.kinds=['${oc.env:SECRET}']"):
        with pytest.raises(ValueError, match="are not expanded"):
            load_settings(None, [word])


def test_stored_settings_may_not_nest_without_end(weights):
    deep = {"vision": {}}
    for _ in range(200):
        deep = {"vision": deep}
    with pytest.raises(ValueError, match="nests deeper than 64 levels"):
        load_config(weights=weights({"clip": deep}))


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"missing\.yaml does not exist"):
        load_config(tmp_path / "missing.yaml")
    with pytest.raises(ValueError, match="does not exist"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="no readable YAML"):
        load_config(tmp_path / "binary.yaml")


def test_direct_construction_is_checked_too():
    with pytest.raises(ValueError, match=r"use\.text"):
        Use(text=False, global_tokens=False, local_tokens=False)
    with pytest.raises(ValueError, match=r"sample\.width"):
        Config(sample=config.Sample(width=100))


@pytest.mark.parametrize("off", [("text",), ("global_tokens", "local_tokens"), ("text", "local_tokens")])
def test_some_tokens_may_be_off(off):
    got = load_config(None, [f"use.{name}=false" for name in off])
    assert not any(getattr(got.use, name) for name in off)


def test_widths_of_unused_towers_need_not_match():
    assert load_config(None, ["use.text=false", "unet.context_width=64"]).unet.context_width == 64
    assert load_config(None, ["use.global_tokens=false", "unet.image_vector_width=8"])


# --- weights folders


def test_contradicting_the_weights_names_both(weights):
    folder = weights(
        load_config(None, ["unet.base_width=64", "unet.norm_groups=16"]).to_dict() | {"weights": ""}
    )
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        load_config(None, ["unet.base_width=128"], weights=folder)
    message = str(caught.value)
    assert all(w in message for w in ("unet.base_width is 128", "the settings given", "but 64", folder)), (
        message
    )
    with pytest.raises(ValueError, match=r"unet\.attention_levels"):
        load_config(None, ["unet.attention_levels=[true,true,true,true]"], weights=folder)
    with pytest.raises(ValueError, match=r"clip\.vision\.image_size is 56"):
        load_config(None, ["clip.vision.image_size=56"], weights=folder)


@pytest.fixture
def bare(weights):
    """A weights folder with all architecture settings and no job settings."""
    stored = {k: v for k, v in Config().to_dict().items() if k in config.SECTIONS}
    return weights(stored)


def test_repeating_settings_of_the_weights_is_allowed(bare):
    same = [
        "unet.base_width=320",
        "unet.width_multipliers=[1,2,4,4]",
        "vae.scale=0.18215",
        "clip.model=ViT-H-14",
    ]
    assert load_config(CONFIGS / "i2vgen_xl.yaml", same, weights=bare).unet == Config().unet


def test_a_switch_may_be_turned_off_but_not_on(bare, weights):
    assert load_config(None, ["use.fps=false"], weights=bare).use.fps is False
    folder = weights({"use": {"fps": False}})
    assert load_config(None, [], weights=folder).use.fps is False
    assert load_config(None, ["use.concat=false"], weights=folder).use == Use(fps=False, concat=False)
    with pytest.raises(ValueError, match=r"use\.fps is true in the settings given but false in the weights"):
        load_config(None, ["use.fps=true"], weights=folder)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "3", '{"settings": []}', '{"settings": 3}', '{"settings": null}', "\xff"],
)
def test_damaged_settings(text, tmp_path):
    (tmp_path / config.SETTINGS_FILE).write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"settings\.json is damaged.*convert the weights again"):
        load_config(weights=str(tmp_path))


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ({"unet": 3}, "unet is a group"),
        ({"unet": {"new": 3}}, "no setting unet.new"),
        ({"unet": {"base_width": "wide"}}, "unet.base_width is 'wide'"),
        ({"future": {}}, "no setting 'future'"),
    ],
)
def test_settings_of_weights_that_do_not_fit_name_the_folder(stored, words, weights):
    folder = weights(stored)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        load_config(weights=folder)
    assert words in str(caught.value) and folder in str(caught.value)


@pytest.mark.parametrize("override", ["unet=3", "use=3", "clip=3", "clip.vision=3"])
def test_wrong_groups_with_weights_are_refused(override, bare):
    with pytest.raises(ValueError, match=r"the settings given: .*(is a group|is 3)"):
        load_config(None, [override], weights=bare)


def test_weights_that_are_not_a_folder_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        load_config(weights=str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"holds no settings\.json"):
        load_config(weights=str(tmp_path))


# --- open_clip models


def test_a_named_clip_model_replaces_ours_completely():
    got = load_config(None, ["clip.model=ViT-B-32", "unet.context_width=512", "unet.image_vector_width=512"])
    # The model's JSON lacks the head width; open_clip's default is 64, ViT-H's value is 80.
    assert got.clip.vision == {
        "image_size": 224,
        "patch_size": 32,
        "layers": 12,
        "width": 768,
        "head_width": 64,
    }
    assert got.clip.text["width"] == 512 and got.clip.text["heads"] == 8
    assert got.clip.model is None and got.clip.embed_dim == 512


def test_the_default_is_vit_h_14():
    assert load_config(None, ["clip.model=ViT-H-14"]).clip == Config().clip


def test_defaults_for_missing_values_are_those_of_open_clip():
    open_clip = pytest.importorskip("open_clip")
    vision, text = open_clip.CLIPVisionCfg(), open_clip.CLIPTextCfg()
    assert {name: getattr(vision, name) for name in config.OPEN_CLIP_VISION} == config.OPEN_CLIP_VISION
    assert {name: getattr(text, name) for name in config.OPEN_CLIP_TEXT} == config.OPEN_CLIP_TEXT


def test_settings_given_with_a_clip_model_change_it(write):
    file = write("clip: {model: ViT-H-14, vision: {image_size: 112}, quick_gelu: true}\n")
    got = load_config(file).clip
    assert got.vision == {**Config().clip.vision, "image_size": 112}
    assert got.quick_gelu is True and got.text == Config().clip.text


def test_a_clip_model_from_a_file(write):
    card = {
        "embed_dim": 1024,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
        "text_cfg": {"width": 1024, "heads": 4, "layers": 3},
    }
    path = write(json.dumps(card), "card.json")
    got = load_config(None, [f"clip.model={path}"]).clip
    assert got.vision["layers"] == 2 and got.vision["head_width"] == 64
    assert got.text == {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 4, "layers": 3}


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "no JSON file"), ('{"embed_dim": 3}', "lacks 'vision_cfg'"), ("[]", "no open_clip model")],
)
def test_files_that_are_not_a_clip_model_are_refused(text, words, write):
    path = write(text, "card.json")
    with pytest.raises(ValueError, match=words):
        load_config(None, [f"clip.model={path}"])


# --- the files that come with the project, and the way there and back


# Training and study files have their own readers and tests.
OTHERS = ("train", "ablations")


@pytest.mark.parametrize(
    "path", sorted(p for p in CONFIGS.rglob("*.yaml") if p.parent.name not in OTHERS), ids=lambda p: p.name
)
def test_every_configuration_survives_a_round_trip(path, tmp_path):
    # the cascade names weights folders that the user must make
    words = ["weights=random", "refine_weights=random"] if path.name == "cascade.yaml" else []
    got = load_config(path, words)
    assert merge.from_dict(json.loads(json.dumps(got.to_dict()))) == got
    (tmp_path / "again.yaml").write_text(got.to_yaml())
    assert load_config(tmp_path / "again.yaml") == got


def test_the_released_model_in_full():
    path = CONFIGS / "i2vgen_xl.yaml"
    assert load_config(path) == Config()

    def names(values, prefix=""):
        for name, value in values.items():
            yield from names(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]

    settings = {k: v for k, v in Config().to_dict().items() if k in config.SECTIONS}
    spelled_out = set(names(yaml.safe_load(path.read_text())))
    assert sorted(set(names(settings)) - spelled_out) == []  # add a line there for a new setting


def test_every_setting_survives_a_round_trip(tmp_path):
    before = Config(
        use=Use(text=False, concat_gain=1.0, sinusoid="exp"),
        schedule=config.Schedule(kind="linear_sd", init_beta=0.00085, last_beta=0.012),
        sample=config.Sample(seed=(1, 2**63 - 1), width=64, height=128, guidance=1.0),
        runtime=config.Runtime(dtype="bfloat16", attention="math"),
        image=("a", "b"),
        prompt=("x: y", ""),
        negative_prompt="",
        output="no",
    )
    assert merge.from_dict(before.to_dict()) == before
    (tmp_path / "a.yaml").write_text(before.to_yaml())
    assert load_config(tmp_path / "a.yaml") == before


def test_derived_sizes():
    got = load_config(None, ["width=1280", "height=704"])
    assert got.size_multiple == 64 and got.latent_size == (88, 160)
    assert got.unet.widths == (320, 640, 1280, 1280) and got.unet.embedding_width == 1280


@pytest.mark.parametrize("name", ["json"])
def test_texts_of_other_scripts_are_never_parsed(name):
    assert merge.parse_overrides([f"{name}=no: [a, ${{b}}"]) == ({}, {name: "no: [a, ${b}"})
    with pytest.raises(ValueError, match=f"{name}=x is no setting here"):
        merge.load_config(None, [f"{name}=x"])
