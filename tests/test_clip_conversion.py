"""CLIP in open_clip's and transformers' layouts: complete at full size, exact, the same outputs."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPVisionConfig
from transformers import CLIPVisionModelWithProjection as VisionModel

from i2vgen.files import checkpoint
from i2vgen.model.clip import ClipEncoders
from i2vgen.settings import config
from i2vgen.settings.merge import load_config
from weights_conversion import clip, rules

KEYS = Path(__file__).parent / "goldens" / "keys"
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 3}
VISION = {"image_size": 28, "patch_size": 14, "layers": 2, "width": 24, "head_width": 8}
TINY = config.Clip(embed_dim=10, vision=VISION, text=TEXT)
CASES = {
    "tiny": {},
    "quick gelu": {"quick_gelu": True},
    "short text": {"text": TEXT | {"context_length": 9, "vocab_size": 49500}},
    "wide MLP": {"text": TEXT | {"mlp_ratio": 3.75}, "vision": VISION | {"mlp_ratio": 4.25}},
    "other eps": {"vision": VISION | {"norm_kwargs": {"eps": 1e-3}}},
    "one head": {"vision": VISION | {"patch_size": 7, "head_width": 24, "layers": 1}},
}


def manifest(name):
    return {key: tuple(shape) for key, shape in json.loads((KEYS / f"{name}.json").read_text()).items()}


def encoders(settings, dtype=torch.float32):
    with torch.device("meta"):
        model = ClipEncoders(settings)
    checkpoint.fill(model, checkpoint.random_state(model, seed=0), dtype=dtype)
    return model.eval()


def native(settings):
    return dict(checkpoint.inner(encoders(settings)).state_dict())


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def towers(exported):
    names = ("text_model.", "vision_model.", "visual_projection.")
    text = {name: tensor for name, tensor in exported.items() if name.startswith(names[0])}
    return {"text": text, "image": {n: t for n, t in exported.items() if n.startswith(names[1:])}}


# ------------------------------------------------------------------------------------- the full size


def test_every_released_tensor_is_mapped():
    ours = {n: torch.empty(s, device="meta") for n, s in manifest("open_clip_vit_h14_keys").items()}
    kept = {name: tensor for name, tensor in ours.items() if name not in clip.ABSENT}
    assert len(ours) == 686 and len(kept) == 684
    for table, name, count in (
        (clip.text_rows, "hf_clip_text_keys", 388),
        (clip.vision_rows, "hf_clip_vision_keys", 520),
    ):
        rows = table(config.Clip())
        part = {row.theirs: kept.pop(row.theirs) for row in rows}
        exported = rules.to_ours(rows, part)
        assert len(exported) == count
        assert {n: tuple(t.shape) for n, t in exported.items()} == manifest(name)
        assert {n: t.shape for n, t in rules.to_theirs(rows, exported).items()} == {
            n: t.shape for n, t in part.items()
        }
    assert not kept


def test_full_size_settings():
    assert clip.settings_from_open_clip(manifest("open_clip_vit_h14_keys")) == config.Clip()
    assert clip.settings_from_transformers(*clip.transformers_configs(config.Clip())) == config.Clip()


def test_full_size_configs_build_the_published_towers():
    text, image = clip.transformers_configs(config.Clip())
    with torch.device("meta"):
        models = CLIPTextModel(CLIPTextConfig(**text)), VisionModel(CLIPVisionConfig(**image))
    for model, name in zip(models, ("hf_clip_text_keys", "hf_clip_vision_keys"), strict=True):
        held = {clip_name: tuple(t.shape) for clip_name, t in model.state_dict().items()}
        tower = "text" if "text" in name else "image"
        assert {new: held[old] for new, old in clip.canonical(held, tower).items()} == manifest(name)


@pytest.mark.parametrize("name", ["ViT-H-14", "ViT-g-14", "ViT-bigG-14", "ViT-L-14", "ViT-B-32"])
def test_open_clip_settings_follow_from_shapes(name):
    wanted = load_config(overrides=[f"clip.model={name}", "use.text=false", "use.global_tokens=false"]).clip
    with torch.device("meta"):
        state = ClipEncoders(wanted).model.state_dict()
    found = clip.settings_from_open_clip({n: tuple(t.shape) for n, t in state.items()})
    with torch.device("meta"):
        again = ClipEncoders(found).model.state_dict()
    assert {n: t.shape for n, t in again.items()} == {n: t.shape for n, t in state.items()}
    for part in ("vision", "text"):
        have, want = getattr(found, part), getattr(wanted, part)
        assert all(have[key] == want[key] for key in have if key != "mlp_ratio")


# ------------------------------------------------------------------------------------------ round trip


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_round_trip(changes):
    settings = dataclasses.replace(TINY, **changes)
    ours = native(settings)
    rows = clip.transformers_rows(settings)
    kept = {name: tensor for name, tensor in ours.items() if name not in clip.ABSENT}
    exported = rules.to_ours(rows, kept)
    assert equal(rules.to_theirs(rows, exported), kept)

    state, notes = clip.from_transformers(towers(exported), settings)
    assert len(notes) == 2 and "text_projection" in notes[0] and "logit_scale" in notes[1]
    imported = dict(state)
    assert not imported.pop("text_projection").any()
    assert imported.pop("logit_scale").item() == pytest.approx(math.log(1 / 0.07))
    assert equal(imported, kept)
    with torch.device("meta"):
        model = ClipEncoders(settings)
    checkpoint.fill(model, state)  # complete, including the two substitutes

    assert clip.settings_from_transformers(*clip.transformers_configs(settings)) == settings


def test_a_full_model_keeps_all_tensors():
    ours = native(TINY)
    rows = clip.full_rows(TINY)
    exported = rules.to_ours(rows, ours)
    assert exported["text_projection.weight"].shape == (10, 16) and len(ours) == len(rows)
    for given in ({"text": exported}, {"text": exported, "image": exported}, {"image": exported}):
        state, notes = clip.from_transformers(given, TINY)
        assert not notes and equal(dict(state), ours)


def test_old_and_new_names_are_equivalent():
    exported = rules.to_ours(
        clip.transformers_rows(TINY), {n: t for n, t in native(TINY).items() if n not in clip.ABSENT}
    )
    held = towers(exported)
    bare = {name.removeprefix("text_model."): tensor for name, tensor in held["text"].items()}
    bare["embeddings.position_ids"] = torch.arange(77)[None]
    held["image"]["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    first, _ = clip.from_transformers(towers(exported), TINY)
    second, _ = clip.from_transformers({"text": bare, "image": held["image"]}, TINY)
    assert equal(dict(first), dict(second))
    with pytest.raises(ValueError, match="are the same tensor"):
        clip.canonical(["text_model.final_layer_norm.bias", "final_layer_norm.bias"], "text")


def test_what_does_not_fit_is_listed():
    exported = rules.to_ours(
        clip.transformers_rows(TINY), {n: t for n, t in native(TINY).items() if n not in clip.ABSENT}
    )
    exported.pop("visual_projection.weight")
    exported["vision_model.extra"] = torch.zeros(1)
    with pytest.raises(
        ValueError, match=r"1 tensor missing \(visual_projection.*1 unexpected \(vision_model\.extra"
    ):
        clip.from_transformers(towers(exported), TINY)


# --------------------------------------------------------------------------------- the same outputs


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_transformers_computes_the_same(changes):
    settings = dataclasses.replace(TINY, **changes)
    ours = encoders(settings, torch.float64)
    exported = rules.to_ours(
        clip.transformers_rows(settings),
        {n: t for n, t in ours.model.state_dict().items() if n not in clip.ABSENT},
    )
    configs = clip.transformers_configs(settings)
    text, image = CLIPTextModel(CLIPTextConfig(**configs[0])), VisionModel(CLIPVisionConfig(**configs[1]))
    held = towers(exported)
    for model, tower in ((text, "text"), (image, "image")):
        names = clip.canonical(model.state_dict(), tower)
        model.load_state_dict({names[name]: tensor for name, tensor in held[tower].items()}, assign=True)
        model.eval()
    with torch.no_grad():
        tokens = ours.tokenize(["a red kite over the sea", ""])
        hidden = text(tokens, output_hidden_states=True).hidden_states[-2]
        norm = text.get_submodule("text_model").final_layer_norm
        assert_near(ours.text(tokens), norm(hidden))
        size = settings.image_size
        pixels = torch.randn(2, 3, size, size, dtype=torch.float64)
        assert_near(ours.image(pixels), image(pixels).image_embeds)


def assert_near(got, want):
    assert (got - want).norm() <= 1e-12 * want.norm()


def test_a_full_transformers_model_is_imported_completely():
    text, image = clip.transformers_configs(TINY)
    for part in (text, image):
        part.pop("architectures")
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=image, projection_dim=10))
    found = clip.settings_from_transformers(*[json.loads(json.dumps(model.config.to_dict()))] * 2)
    assert found == TINY
    state, notes = clip.from_transformers({"text": model.state_dict()}, TINY)
    assert not notes
    assert torch.equal(state["text_projection"], model.text_projection.weight.t())


# ---------------------------------------------------------------------------------------------- refusals


def shapes(settings):
    with torch.device("meta"):
        return {n: tuple(t.shape) for n, t in ClipEncoders(settings).model.state_dict().items()}


def test_the_number_of_heads_is_requested_if_64_does_not_fit():
    with pytest.raises(ValueError, match=r"width 24 has no heads of 64; give clip\.vision\.head_width"):
        clip.settings_from_open_clip(shapes(TINY))
    with pytest.raises(ValueError, match=r"width 16 has no heads of 64; give clip\.text\.heads"):
        clip.settings_from_open_clip(shapes(TINY), vision_head_width=8)
    found = clip.settings_from_open_clip(shapes(TINY), vision_head_width=8, text_heads=2)
    assert found == TINY
    quick = clip.settings_from_open_clip(shapes(TINY), vision_head_width=8, text_heads=2, quick_gelu=True)
    assert quick == dataclasses.replace(TINY, quick_gelu=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text.token_embedding.weight": (1, 1)}, "CustomTextCLIP"),
        ({"visual.trunk.x": (1,)}, "not a plain ViT"),
        ({"visual.positional_embedding": (6, 24)}, "6 rows"),
        ({"visual.proj": None}, r"visual\.proj is missing"),
    ],
)
def test_foreign_open_clip_models_are_refused(change, message):
    found = {name: shape for name, shape in (shapes(TINY) | change).items() if shape}
    with pytest.raises(ValueError, match=message):
        clip.settings_from_open_clip(found, vision_head_width=8, text_heads=2)


@pytest.mark.parametrize(
    ("tower", "change", "message"),
    [
        (0, {"hidden_act": "gelu_new"}, "gelu_new in the text tower"),
        (1, {"hidden_act": "quick_gelu"}, "the same for both"),
        (1, {"num_channels": 4}, "num_channels is 4"),
        (0, {"num_attention_heads": 3}, r"text tower is 16, not a multiple"),
    ],
)
def test_what_open_clip_cannot_express_is_refused(tower, change, message):
    configs = clip.transformers_configs(TINY)
    configs[tower].update(change)
    with pytest.raises(ValueError, match=message):
        clip.settings_from_transformers(*configs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": TEXT | {"no_causal_mask": True}}, r"clip\.text\.no_causal_mask is True"),
        ({"vision": VISION | {"ls_init_value": 0.1}}, r"clip\.vision\.ls_init_value is 0\.1"),
        ({"vision": VISION | {"layers": [1, 1, 1, 1]}}, "a ResNet"),
        ({"text": TEXT | {"norm_kwargs": {"bias": False}}}, "norm_kwargs holds bias"),
    ],
)
def test_what_transformers_cannot_express_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        clip.transformers_configs(dataclasses.replace(TINY, **change))
    with pytest.raises(ValueError, match=message):
        clip.transformers_rows(dataclasses.replace(TINY, **change))


def test_an_irrelevant_open_clip_setting_is_accepted():
    settings = dataclasses.replace(TINY, text=TEXT | {"pool_type": "argmax"})
    assert clip.transformers_configs(settings) == clip.transformers_configs(TINY)
