"""Calling a loaded model: settings for one call, forms of the result, conditions and noise of one's own."""

import base64
import io
import json
import re
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

import i2vgen
from i2vgen import pipeline
from i2vgen.adapt import lora
from i2vgen.diffusion.sampler import ddim
from i2vgen.files.clip import OUTPUTS
from i2vgen.memory import plans
from i2vgen.settings import shipped
from i2vgen.settings.merge import load_config

PROMPT = "a yellow star moves to the right"
STAR = "i2vgen/assets/star.png"
FEW = ["device=cpu", "steps=2"]


@pytest.fixture(scope="module")
def model():
    """The shipped one"""
    return i2vgen.load(overrides=FEW)


CHANGES = {
    "steps": {"steps": 3},
    "guidance": {"guidance": 2.5},
    "no guidance": {"guidance": 1},
    "size": {"width": 48, "height": 40},
    "frames": {"frames": 5},
    "fps": {"fps": 16},
    "negative prompt": {"negative_prompt": "a blue square"},
    "sampler": {"sampler": "unipc", "steps": 3},
    "eta": {"eta": 0.5},
    "interval": {"guidance_interval": [0.5, 1]},
    "preset with steps": {"quality": "draft", "steps": 2},
    "numbers of numpy": {"steps": np.int64(3), "guidance": np.float32(2.5), "frames": np.array(5)},
    "numbers of torch": {"steps": torch.tensor(3)},
}


@pytest.mark.filterwarnings("ignore:.*far from")
@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_a_call_equals_a_fresh_load(model, changes, tmp_path):
    words = [f"{name}={np.asarray(value).tolist()}" for name, value in changes.items()]
    fresh = i2vgen.load(overrides=[*FEW, *words])(STAR, PROMPT, seed=3)
    clip = model(STAR, PROMPT, seed=3, **changes)
    assert np.array_equal(clip.frames, fresh.frames)
    assert clip.config == fresh.config and clip.facts == fresh.facts
    records = [
        json.loads(one.save(tmp_path / name / "a.gif").with_name("a.gif.json").read_text())
        for one, name in ((clip, "call"), (fresh, "load"))
    ]
    records[1]["settings"]["output"] = records[0]["settings"]["output"]
    assert records[0] == records[1]


def test_a_preset_in_a_call(model):
    fresh = i2vgen.load(overrides=["device=cpu", "quality=draft"])(STAR, PROMPT, seed=3)
    clip = model(STAR, PROMPT, seed=3, quality="draft")
    assert clip.config == fresh.config and np.array_equal(clip.frames, fresh.frames)


def test_a_call_leaves_the_model_as_it_was(model):
    before, first = model.config, model(STAR, PROMPT, seed=3).frames
    with pytest.warns(UserWarning, match="4 frames of 64 x 64 pixels are far from the 8 of 32 x 32"):
        other = model(STAR, PROMPT, seed=3, steps=1, width=64, height=64, frames=4)
    assert other.frames.shape == (4, 64, 64, 3)
    assert model.config == before and np.array_equal(model(STAR, PROMPT, seed=3).frames, first)


def test_nothing_is_loaded_or_built_again(model, monkeypatch):
    model(STAR, PROMPT, steps=1, width=48)  # the first other size builds networks on meta to count memory
    for name in ("load", "build"):
        monkeypatch.setattr(plans.checkpoint, name, lambda *given: pytest.fail("loaded"))
    model(STAR, PROMPT, steps=1, width=48, guidance=1)
    model(STAR, PROMPT, steps=1, width=40)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_inference_steps": 5}, "no setting num_inference_steps in a call; here it is steps="),
        ({"negative_prompts": "x"}, "no setting negative_prompts in a call; .*negative_prompt="),
        ({"seeds": [1]}, "no setting seeds in a call; .*seed="),
        ({"guidance_scale": 5}, "here it is guidance="),
        ({"num_frames": 5}, "here it is frames="),
        ({"target_fps": 5}, "here it is fps="),
        ({"num_videos_per_prompt": 2}, r"give a list of seeds, seed=\[1, 2, 3\]"),
        ({"generator": torch.Generator()}, "seed=7"),
        ({"latents": torch.zeros(1)}, "the initial noise is noise="),
        ({"output_type": "np"}, 'output="video", "frames"'),
        ({"prompt_embeds": torch.zeros(1)}, "conditions="),
        ({"step": 5}, r"no setting sample\.step; did you mean sample\.steps"),
        ({"steps": 0}, r"sample\.steps is 0; give 1 to"),
        ({"steps": "many"}, r"sample\.steps is 'many', expected int"),
        ({"steps": 2.5}, r"sample\.steps is 2\.5, expected int"),
        ({"guidance": float("nan")}, r"sample\.guidance is nan"),
        ({"width": 33}, r"sample\.width is 33 pixels; .* nearest is 32 or 40"),
        ({"frames": 0}, r"sample\.frames is 0"),
        ({"eta": 2}, r"sample\.eta is 2"),
        ({"eta": None}, r"sample\.eta is None, expected float"),
        ({"sampler": "plms"}, r"sample\.sampler is 'plms', expected"),
        ({"sampler": 3}, "the sampler is an int; give the name"),
        ({"sampler": dict}, "the sampler is the class dict; give an object"),
        ({"sampler": lambda x: x}, r"cannot be called as sampler\(predict, x, schedule"),
        ({"steps": 1000, "eps_form": "recovered", "spacing": "trailing"}, "divide by zero"),
        ({"vae_chunk": 1}, r"vae_chunk is read when a model is loaded; .*overrides=\[\"vae_chunk=\.\.\.\"\]"),
        ({"weights": "x"}, "weights is read when a model is loaded"),
        ({"unet": {}}, "unet is read when a model is loaded"),
        ({"adapter_scale": 0.5}, r"model\.lora"),
        ({"negative_prompt": 3}, "the prompt is an int"),
        ({"negative_prompt": ["a", "b"]}, "got 2 negative prompts for 1 clip"),
        ({"output": "gif"}, "no output='gif'; choose video, frames, pil, tensor, latents"),
        ({"on_step": 3}, "on_step is an int"),
        ({"seed": -1}, r"sample\.seed is -1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_what_a_call_refuses(model, monkeypatch, changes, message):
    monkeypatch.setattr(pipeline, "sample", lambda *given, **more: pytest.fail("sampled"))
    with pytest.raises(ValueError, match=message):
        model(STAR, PROMPT, **changes)


# --- several clips


def test_lists_make_lists(model):
    clips = model(STAR, [PROMPT, "a red ball grows"], seed=[3, 4], steps=1)
    assert [(clip.prompt, clip.seed) for clip in clips] == [(PROMPT, 3), ("a red ball grows", 4)]
    assert len(model(STAR, PROMPT, seed=range(2), steps=1)) == 2
    (one,) = model([STAR], PROMPT, seed=3, steps=1)
    assert isinstance(one, i2vgen.Video) and one.image == STAR


def test_a_negative_prompt_for_each(model):
    words = ["a blue square", "a green ball"]
    together = model(STAR, PROMPT, seed=[3, 3], negative_prompt=words)
    for word, clip in zip(words, together, strict=True):
        alone = model(STAR, PROMPT, seed=3, negative_prompt=word)
        assert np.abs(clip.frames.astype(int) - alone.frames).max() <= 1
        assert clip.config.negative_prompt == word


# --- forms


@pytest.mark.parametrize("output", OUTPUTS)
def test_outputs(model, output):
    clip, made = model(STAR, PROMPT, seed=3), model(STAR, PROMPT, seed=3, output=output)
    if output == "video":
        assert np.array_equal(made.frames, clip.frames)
    elif output == "frames":
        assert made.dtype == np.uint8 and np.array_equal(made, clip.frames)
    elif output == "pil":
        assert np.array_equal(np.stack([np.asarray(one) for one in made]), clip.frames)
    elif output == "tensor":
        assert made.shape == (8, 3, 32, 32) and made.dtype == torch.float32
        assert np.array_equal((made * 255).byte().movedim(1, -1).numpy(), clip.frames)  # officially truncated
        assert len(torch.unique(made)) > 300  # not rounded to bytes
    else:
        assert made.shape == (8, 8, 8, 8) and made.is_floating_point()
        assert np.array_equal(model.decode(made), clip.frames)
        assert np.array_equal(model.decode(made[None])[0], clip.frames)
        assert model.decode(made, output="tensor").shape == (8, 3, 32, 32)
    assert type(model(STAR, PROMPT, seed=[3], output=output)) is list


def test_latents_that_are_none(model):
    for given, message in (
        (torch.zeros(3, 8, 8, 8), r"shape \(3, 8, 8, 8\); give a tensor \[8 f h w\]"),
        (torch.full((8, 1, 8, 8), torch.nan), "finite"),
        (np.zeros(3), "the latents are a ndarray"),
    ):
        with pytest.raises(ValueError, match=message):
            model.decode(given)


def test_a_notebook_shows_the_clip_with_its_settings(model):
    clip = model(STAR, "<b>a star</b>", seed=3)
    page = clip._repr_html_()
    assert "&lt;b&gt;a star" in page and "<b>" not in page and "seed=3" in page and "steps=2" in page
    data = page.split("base64,")[1].split('"')[0]
    with Image.open(io.BytesIO(base64.b64decode(data))) as shown:
        assert shown.n_frames == 8 and shown.size == (32, 32)


# --- the progress bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_in_terminals_only(model, monkeypatch):
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)  # of another test: this is no notebook
    for stream, progress, wanted in (
        (Terminal(), True, True), (Terminal(), False, False), (io.StringIO(), True, False),
    ):  # fmt: skip
        monkeypatch.setattr("sys.stderr", stream)
        seen = []
        model(STAR, PROMPT, progress=progress, on_step=seen.append)
        assert ("2/2" in stream.getvalue()) is wanted and [one.index for one in seen] == [0, 1]


# --- conditions


def test_encoded_conditions_make_the_same_clip(model):
    encoded = model.encode(STAR, PROMPT, seed=3)
    clip = model(STAR, PROMPT, seed=3)
    assert np.array_equal(model(conditions=encoded, seed=3).frames, clip.frames)
    assert np.array_equal(model(conditions=tuple(encoded), seed=3, output="frames"), clip.frames)
    twice = model(conditions=encoded, seed=[3, 4])
    assert np.abs(twice[0].frames.astype(int) - clip.frames).max() <= 1 and len(twice) == 2


def test_settings_of_conditions_are_given_to_encode(model):
    encoded = model.encode(STAR, PROMPT, seed=3, fps=16, negative_prompt="a ball", width=40)
    want = model(STAR, PROMPT, seed=3, fps=16, negative_prompt="a ball", width=40).frames
    assert np.array_equal(model(conditions=encoded, seed=3, width=40).frames, want)


def test_weights_for_tokens_and_longer_prompts(model):
    first, second = (model.encode(STAR, text, seed=3) for text in (PROMPT, "a star grows"))
    heavy = first._replace(cond=first.cond._replace(text=1.3 * first.cond.text))
    longer = first._replace(cond=first.cond._replace(text=torch.cat([first.cond.text, second.cond.text], 1)))
    plain = model(conditions=first, seed=3)
    for changed in (heavy, longer):
        clip = model(conditions=changed, seed=3)
        assert not np.array_equal(clip.frames, plain.frames)
        assert clip.facts["reproducible"] is False
        assert clip.facts["inputs"]["conditions"] != plain.facts["inputs"]["conditions"]
    # Twice the same tokens are the same average.
    doubled = first._replace(
        cond=first.cond._replace(text=first.cond.text.repeat(1, 2, 1)),
    )
    assert not np.array_equal(model(conditions=doubled, seed=3).frames, plain.frames)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"text": torch.zeros(1, 32, 95)},
            r"text has shape \[1, 32, 95\]; this model and size need \[b k 96\]",
        ),
        ({"text": torch.zeros(32, 96)}, r"of \[1, 32\] clips; all their tensors must be of as many"),
        ({"text": torch.zeros(2, 32, 96)}, r"of \[1, 2\] clips"),
        ({"text": None}, "text is None; give a tensor"),
        ({"image_vector": torch.zeros(1, 63)}, r"image_vector has shape \[1, 63\]; .* \[b 64\]"),
        ({"image_latent": torch.zeros(1, 8, 8, 9)}, "image_latent has shape"),
        ({"text": torch.full((1, 32, 96), torch.nan)}, "not finite"),
    ],
)
def test_conditions_that_do_not_fit(model, change, message):
    encoded = model.encode(STAR, PROMPT, seed=3)
    with pytest.raises(ValueError, match=message):
        model(conditions=encoded._replace(cond=encoded.cond._replace(**change)))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"image": STAR}, "image= was given together with conditions="),
        ({"prompt": PROMPT}, "prompt= was given"),
        ({"negative_prompt": "x"}, "negative_prompt= was given"),
        ({"fps": 4}, r"fps= was given .*give it to model\.encode"),
        ({"width": 40}, "image_latent has shape"),
    ],
)
def test_conditions_stand_alone(model, more, message):
    with pytest.raises(ValueError, match=message):
        model(conditions=model.encode(STAR, PROMPT, seed=3), **more)


def test_conditions_of_another_kind(model):
    for given in (torch.zeros(1, 32, 96), (1, 2), "text"):
        with pytest.raises(ValueError, match=r"give those that model\.encode"):
            model(conditions=given)
    encoded = model.encode(STAR, PROMPT, seed=[3, 4])
    with pytest.raises(ValueError, match="conditions of 2 clips and 3 seeds"):
        model(conditions=encoded, seed=[1, 2, 3])
    with pytest.raises(ValueError, match="no picture is given"):
        model(prompt=PROMPT)


# --- noise, samplers, adapters


def test_noise_of_a_single_clip_needs_no_axis(model):
    noise = torch.randn(8, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    one, other = (model(STAR, PROMPT, seed=3, noise=given).frames for given in (noise, noise[None]))
    assert np.array_equal(one, other)
    with pytest.raises(ValueError, match="this job needs"):
        model(STAR, PROMPT, seed=[3, 4], noise=noise)


def test_samplers_by_name_by_function_and_of_diffusers(model):
    diffusers = pytest.importorskip("diffusers")
    plain = model(STAR, PROMPT, seed=3)
    named = model(STAR, PROMPT, seed=3, sampler="ddim")
    assert np.array_equal(plain.frames, named.frames) and named.facts["reproducible"]
    own = model(STAR, PROMPT, seed=3, sampler=ddim)
    assert np.array_equal(own.frames, plain.frames) and not own.facts["reproducible"]
    scheduler = diffusers.DDIMScheduler(
        trained_betas=model.schedule.betas.numpy(), prediction_type="v_prediction", clip_sample=False,
        steps_offset=1, set_alpha_to_one=False, rescale_betas_zero_snr=True,
    )  # fmt: skip
    theirs = model(STAR, PROMPT, seed=3, sampler=scheduler)  # no wrapper needed
    assert np.abs(theirs.frames.astype(int) - plain.frames).max() <= 1


def test_an_attached_adapter_is_recorded(tmp_path):
    model = i2vgen.load(overrides=FEW)
    plain = model(STAR, PROMPT, seed=3)
    trained = lora.attach(model.unet, ["*.cross_attention.to_*"], rank=2)
    for part in trained.parts.values():
        torch.nn.init.normal_(part.b, generator=torch.Generator().manual_seed(1))
    trained.save(tmp_path / "adapter")
    trained.remove()
    adapters = model.lora(tmp_path / "adapter", scale=0.5)
    clip = model(STAR, PROMPT, seed=3)
    assert not np.array_equal(clip.frames, plain.frames)
    assert clip.facts["inputs"]["adapters"][0]["scale"] == 0.5 and clip.facts["reproducible"] is False
    adapters.remove()
    again = model(STAR, PROMPT, seed=3)
    assert np.array_equal(again.frames, plain.frames) and again.facts == plain.facts


# --- moving


def test_a_moved_model_is_a_loaded_one():
    model = i2vgen.load(overrides=FEW)
    assert model.to(torch.bfloat16) is model
    fresh = i2vgen.load(overrides=[*FEW, "dtype=bfloat16"])
    assert model.config == fresh.config
    assert np.array_equal(model(STAR, PROMPT, seed=3).frames, fresh(STAR, PROMPT, seed=3).frames)
    with pytest.warns(UserWarning, match="rounded to bfloat16 stay rounded in float64"):
        model.to("cpu", "float64")
    assert model.unet.conv_in.weight.dtype == torch.float64


def test_a_moved_model_takes_a_memory_plan():
    model = i2vgen.load(overrides=FEW)
    want = model(STAR, PROMPT, seed=3).frames
    model.to(memory="low")
    assert model.config.runtime.memory == "low" and model.config.runtime.vae_tile == 64
    assert np.abs(model(STAR, PROMPT, seed=3).frames.astype(int) - want).max() <= 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("abacus",), "runtime.device is 'abacus'"),
        (("cuda:99",), "CUDA devices|cuda:99"),
        (("cpu", "float31"), "dtype"),
        (("cpu", torch.int8), "dtype"),
    ],
)
def test_places_that_do_not_exist(model, given, message):
    before = model.config
    with pytest.raises(ValueError, match=message):
        model.to(*given)
    assert model.config == before


def test_what_was_stored_in_eight_bits_cannot_be_moved():
    model = i2vgen.load(overrides=[*FEW, "weight_storage=int8"])
    with pytest.raises(ValueError, match=r"runtime\.weight_storage=int8 cannot be moved"):
        model.to("cpu", torch.bfloat16)


# --- memory


def test_a_picture_that_is_cropped_is_told(model):
    told = "and the clip 32 x 32: 33% of the picture, at its top and bottom, is cut off; width=24 height=40"
    with pytest.warns(UserWarning, match=told):
        model(Image.new("RGB", (60, 90)), PROMPT, steps=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the picture is")
        model(Image.new("RGB", (60, 68)), PROMPT, steps=1)


def test_steps_that_begin_late_are_told(model):
    with pytest.warns(
        UserWarning, match="sample.steps=1 with sample.spacing=official begins at timestep 1 of 1000"
    ):
        model(STAR, PROMPT, steps=1, spacing="official")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* begins at timestep")
        model(STAR, PROMPT, steps=2, spacing="official")
        model(STAR, PROMPT, steps=1, spacing="trailing")


def test_a_clip_does_not_replace_its_picture(model, tmp_path):
    shutil.copy(STAR, tmp_path / "own.png")
    clip = model(tmp_path / "own.png", PROMPT)
    with pytest.raises(ValueError, match=r"would overwrite .*own\.png; choose another name"):
        clip.save(tmp_path / "own.png")
    assert (tmp_path / "own.png").read_bytes() == Path(STAR).read_bytes()
    clip.save(tmp_path / "other.gif")


def test_a_call_that_does_not_fit_is_refused(model, monkeypatch):
    monkeypatch.setattr(plans, "free_memory", lambda where: 50_000_000)
    monkeypatch.setattr(pipeline, "sample", lambda *given, **more: pytest.fail("sampled"))
    with pytest.raises(ValueError, match=r"256 x 256 x 8 needs .* are free; .* would fit"):
        model(STAR, PROMPT, width=256, height=256)


def test_a_plan_comes_and_goes_with_the_call(monkeypatch):
    model = i2vgen.load(overrides=FEW)
    want = i2vgen.load(overrides=[*FEW, "width=96", "height=96", "batch_guidance=false"])(
        STAR, PROMPT, seed=3
    )
    needed = plans.choose(want.config)[1].total
    held = plans.held_there(model.parts, model.device)
    monkeypatch.setattr(plans, "free_memory", lambda where: needed - held)
    clip = model(STAR, PROMPT, seed=3, width=96, height=96)
    assert model.config.runtime.batch_guidance and not clip.config.runtime.batch_guidance
    assert np.array_equal(clip.frames, want.frames)
    assert model(STAR, PROMPT, seed=3).config.runtime == model.config.runtime


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_guide_runs(model, monkeypatch, tmp_path):
    """Every Python block of docs/python.md, one after the other, with fewer steps."""
    root = Path(i2vgen.__file__).parents[1]
    blocks = re.findall(
        r"^```python\n(.*?)^```", (root / "docs/python.md").read_text(encoding="utf-8"), re.M | re.S
    )
    (tmp_path / "mine").mkdir()  # of `i2vgen examples mine`
    shutil.copy(shipped.PICTURE, tmp_path / "mine")
    shutil.copy(root / STAR, tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(i2vgen, "load", lambda: model)
    names = {}
    for block in blocks:
        exec(block.replace("steps=50", "steps=2"), names)
    assert len(blocks) >= 4 and (tmp_path / "outputs/right.gif.json").exists() and len(names["previews"]) == 2
    weights = names["heavy"] / names["first"].cond.text
    tokenizer = open_clip.SimpleTokenizer()
    said = tokenizer(["the boat moves to the right"])[0]
    assert tokenizer.decode(said[2:3].tolist()).strip() == "boat"  # the token that it names
    assert torch.allclose(weights[:, 2], torch.tensor(1.3)) and names["both"].shape[1] == 64


# --- loading


def test_settings_by_keyword():
    model = i2vgen.load(
        device="cpu", steps=2, guidance_interval=[0.5, 1], check_memory=False, dtype=torch.float64
    )
    assert model.config == i2vgen.load(overrides=[*FEW, "guidance_interval=[0.5,1]", "check_memory=false",
                                                  "dtype=float64"]).config  # fmt: skip
    for given, message in (
        ({"num_inference_steps": 2}, "that is diffusers' name, here it is steps="),
        ({"seed": "abc"}, r"sample\.seed is 'abc', expected int, or a list of them"),
        ({"sampler": "DDIM"}, "'DDIM', expected ddim or ancestral or"),
    ):
        with pytest.raises(ValueError, match=message):
            i2vgen.load(**given)


def test_weights_that_must_be_converted_are_told_how(tmp_path):
    with pytest.raises(ValueError, match="i2vgen convert hf:ali-vilab/i2vgen-xl FOLDER"):
        i2vgen.load("ali-vilab/i2vgen-xl")
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="a folder of diffusers: i2vgen convert"):
        i2vgen.load(tmp_path)


def test_a_clip_is_one_line_in_a_terminal(model):
    assert repr(model(STAR, "a star", seed=3)) == "Video(8 frames of 32 x 32, prompt='a star', seed=3)"


def test_weighting_syntax_is_told(model):
    with pytest.warns(UserWarning, match=r"'\(yellow:1\.3\)' is read as plain text"):
        model(STAR, "a (yellow:1.3) star", seed=3)


def test_a_shipped_configuration_is_found_by_its_name():
    with pytest.warns(UserWarning, match=r"tiny\.yaml is the shipped file"):
        tiny = i2vgen.load("random", config="tiny.yaml", device="cpu")
    assert tiny.config.unet.base_width == load_config("configs/tiny.yaml", weights="random").unet.base_width


def test_lists_of_other_lengths_are_counted_as_given(model):
    with pytest.raises(ValueError, match=r"got 2 pictures, 1 prompt, 3 seeds; give as many of each"):
        model([STAR, STAR], PROMPT, seed=[1, 2, 3])
    with pytest.raises(ValueError, match=r"got 0 pictures, 1 prompt, 1 seed;"):
        model([], PROMPT, seed=1)
