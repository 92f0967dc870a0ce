"""CLIP: open_clip's names (our native `clip` part) <-> transformers' two towers.

In these rows `theirs` is open_clip's name and `ours` is transformers': `rules.to_ours` exports a native CLIP
to transformers, `rules.to_theirs` imports one. CLIPTextModel and CLIPVisionModelWithProjection lack the two
tensors in ABSENT. Our model does not use them (it reads text before the projection), so an import fills them
with `absent`, whose zero projection cannot be mistaken for a trained one, and adds a note. If the file holds
a full CLIPModel, they are kept.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from i2vgen.settings import config
from i2vgen.settings.wording import counted
from weights_conversion.rules import Place, Row, Table, expand

Tower = Literal["text", "image"]

ABSENT = ("text_projection", "logit_scale")
LOGIT_SCALE = math.log(1 / 0.07)  # CLIP's initial value

BLOCK: Table = (
    ("ln_1", "layer_norm1", "affine"),
    *(
        (f"attn.in_proj_{kind}", tuple(f"self_attn.{x}_proj.{kind}" for x in "qkv"), "tensor")
        for kind in ("weight", "bias")
    ),
    ("attn.out_proj", "self_attn.out_proj", "affine"),
    ("ln_2", "layer_norm2", "affine"),
    ("mlp.c_fc", "mlp.fc1", "affine"),
    ("mlp.c_proj", "mlp.fc2", "affine"),
)
TEXT_ENDS: Table = (
    ("token_embedding", "embeddings.token_embedding", "weight"),
    ("positional_embedding", "embeddings.position_embedding.weight", "tensor"),
    ("ln_final", "final_layer_norm", "affine"),
)
VISION_ENDS: Table = (
    ("class_embedding", "embeddings.class_embedding", "tensor"),
    ("positional_embedding", "embeddings.position_embedding.weight", "tensor"),
    ("conv1", "embeddings.patch_embedding", "weight"),
    ("ln_pre", "pre_layrnorm", "affine"),  # the misspelling is transformers'
    ("ln_post", "post_layernorm", "affine"),
)
# Only a full CLIPModel has these (CLIPTextModelWithProjection the first of them).
HEADS: Table = (
    ("text_projection", "text_projection.weight", "transpose"),
    ("logit_scale", "logit_scale", "tensor"),
)


def transformers_rows(clip: config.Clip) -> list[Row]:
    """Rows of CLIPTextModel and CLIPVisionModelWithProjection, without ABSENT.

    ValueError for settings that transformers' classes cannot express.
    """
    return text_rows(clip) + vision_rows(clip)


def text_rows(clip: config.Clip) -> list[Row]:
    """Rows of CLIPTextModel."""
    check_expressible(clip)
    return expand(_tower("", TEXT_ENDS, "text_model", clip.text["layers"]))


def vision_rows(clip: config.Clip) -> list[Row]:
    """Rows of CLIPVisionModelWithProjection."""
    check_expressible(clip)
    projection: Place = ("visual", (("proj", "visual_projection.weight", "transpose"),), "")
    return expand([*_tower("visual", VISION_ENDS, "vision_model", clip.vision["layers"]), projection])


def full_rows(clip: config.Clip) -> list[Row]:
    """Rows of a full CLIPModel, including ABSENT."""
    return transformers_rows(clip) + expand([("", HEADS, "")])


def _tower(theirs: str, ends: Table, ours: str, layers: int) -> Iterator[Place]:
    yield theirs, ends, ours
    inside = f"{theirs}.transformer" if theirs else "transformer"
    for n in range(layers):
        yield f"{inside}.resblocks.{n}", BLOCK, f"{ours}.encoder.layers.{n}"


# --------------------------------------------------------------------------------------------- reading


def canonical(names: Iterable[str], tower: Tower | None = None) -> dict[str, str]:
    """Map the names in our rows to those in a file of one tower or (None) of a full model.

    transformers >= 5.6 writes a single tower without `text_model.`. Very old files hold `position_ids`, which
    are not weights and are ignored. ValueError if two names mean the same tensor.
    """
    heads = {ours for _, ours, _ in HEADS} | {"visual_projection.weight"}
    prefix = {"text": "text_model.", "image": "vision_model.", None: ""}[tower]
    found: dict[str, str] = {}
    for name in names:
        if name.endswith("embeddings.position_ids"):
            continue
        bare = name in heads or name.startswith(("text_model.", "vision_model."))
        meant = name if bare else prefix + name
        if meant in found:
            raise ValueError(f"{found[meant]} and {name} are the same tensor; keep one of them")
        found[meant] = name
    return found


class OpenClipState(Mapping):
    """A state dict under open_clip's names, built from transformers' tensors on access."""

    def __init__(self, rows: Iterable[Row], transformers: Mapping[str, Tensor], made: Mapping[str, Tensor]):
        self.rows = {row.theirs: row for row in rows}
        self.transformers, self.made = transformers, dict(made)

    def __getitem__(self, name: str) -> Tensor:
        return self.made[name] if name in self.made else self.rows[name].to_theirs(self.transformers)

    def __iter__(self) -> Iterator[str]:
        yield from self.rows
        yield from self.made

    def __len__(self) -> int:
        return len(self.rows) + len(self.made)


class _Renamed(Mapping):
    """Tensors under other names; `places` maps a new name to (tensors, old name)."""

    def __init__(self, places: Mapping[str, tuple[Mapping[str, Tensor], str]]):
        self.places = places

    def __getitem__(self, name: str) -> Tensor:
        tensors, theirs = self.places[name]
        return tensors[theirs]

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def from_transformers(
    towers: Mapping[str, Mapping[str, Tensor]], clip: config.Clip
) -> tuple[Mapping[str, Tensor], list[str]]:
    """{"text": tensors, "image": tensors} -> open_clip's state dict, read lazily, and notes for the report.

    Both may come from a full CLIPModel. ValueError lists missing and unexpected tensors.
    """
    places: dict[str, tuple[Mapping[str, Tensor], str]] = {}
    for tower, tensors in towers.items():
        for name, theirs in canonical(tensors, tower).items():
            places.setdefault(name, (tensors, theirs))  # both may be the same file of a full model
    held = _Renamed(places)
    rows = [row for row in full_rows(clip) if row.theirs not in ABSENT or set(row.ours) <= places.keys()]
    expected = {name for row in rows for name in row.ours}
    missing, unexpected = sorted(expected - places.keys()), sorted(places.keys() - expected)
    if missing or unexpected:
        raise ValueError(
            f"the CLIP towers do not fit their settings: {counted(len(missing), 'tensor')} missing "
            f"({_some(missing)}), {len(unexpected)} unexpected ({_some(unexpected)})"
        )
    lacking = [name for name in ABSENT if name not in {row.theirs for row in rows}]
    dtype = held["text_model.embeddings.position_embedding.weight"].dtype
    made = {name: tensor for name, tensor in absent(clip, dtype).items() if name in lacking}
    notes = [
        f"transformers' CLIP towers hold no {name}; it is not used here and was set to {how}"
        for name, how in (("text_projection", "zeros"), ("logit_scale", "ln(1 / 0.07)"))
        if name in lacking
    ]
    return OpenClipState(rows, held, made), notes


def absent(clip: config.Clip, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Substitutes for ABSENT: a zero projection and CLIP's initial scale."""
    return {
        "text_projection": torch.zeros(clip.text["width"], clip.embed_dim, dtype=dtype),
        "logit_scale": torch.tensor(LOGIT_SCALE, dtype=dtype),
    }


# ------------------------------------------------------------------------------------- settings, in

# Width of a vision head by (width, layers), if it is not 64: ViT-H-14, ViT-g-14, ViT-bigG-14.
VISION_HEAD_WIDTHS = {(1280, 32): 80, (1408, 40): 88, (1664, 48): 104}
HEAD_WIDTH = 64


def settings_from_open_clip(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    text_heads: int | None = None,
    vision_head_width: int | None = None,
    quick_gelu: bool = False,
) -> config.Clip:
    """Infer settings from the shapes of an open_clip checkpoint; ValueError if it is not a plain ViT model.

    Shapes do not show the number of heads: unless given, a head is 64 wide, except in the vision towers of
    the three largest models (VISION_HEAD_WIDTHS). Nor do they show the activation: the original OpenAI
    weights need `quick_gelu`.
    """
    _refuse_foreign(shapes)
    patch_out, _, patch, _ = _shape(shapes, "visual.conv1.weight")
    tokens, vision_width = _shape(shapes, "visual.positional_embedding")
    grid = math.isqrt(tokens - 1)
    if grid * grid != tokens - 1 or patch_out != vision_width:
        raise ValueError(f"visual.positional_embedding has {tokens} rows; a square grid has n^2 + 1")
    context, text_width = _shape(shapes, "positional_embedding")
    vision_layers = _layers(shapes, "visual.transformer")
    text_layers = _layers(shapes, "transformer")
    if vision_head_width is None:
        vision_head_width = VISION_HEAD_WIDTHS.get((vision_width, vision_layers), HEAD_WIDTH)
    heads = text_heads if text_heads is not None else text_width // HEAD_WIDTH
    for name, width, wrong in (
        ("clip.vision.head_width", vision_width, vision_width % vision_head_width),
        ("clip.text.heads", text_width, heads == 0 or text_width % heads),
    ):
        if wrong:
            raise ValueError(f"the tower of width {width} has no heads of {HEAD_WIDTH}; give {name}=...")
    return config.Clip(
        embed_dim=_shape(shapes, "visual.proj")[1],
        quick_gelu=quick_gelu,
        vision={
            "image_size": grid * patch,
            "patch_size": patch,
            "layers": vision_layers,
            "width": vision_width,
            "head_width": vision_head_width,
            **_mlp(_shape(shapes, "visual.transformer.resblocks.0.mlp.c_fc.weight")[0], vision_width),
        },
        text={
            "context_length": context,
            "vocab_size": _shape(shapes, "token_embedding.weight")[0],
            "width": text_width,
            "heads": heads,
            "layers": text_layers,
            **_mlp(_shape(shapes, "transformer.resblocks.0.mlp.c_fc.weight")[0], text_width),
        },
    )


def shows_its_settings(clip: config.Clip, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether `settings_from_open_clip` finds these settings, all of them."""
    try:
        return settings_from_open_clip(shapes) == clip
    except ValueError:
        return False


# transformers' defaults for values missing in config.json.
SHARED_DEFAULTS = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": 512}
TEXT_DEFAULTS = {
    **SHARED_DEFAULTS,
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
}
VISION_DEFAULTS = {
    **SHARED_DEFAULTS,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
}
ACTIVATIONS = {"gelu": False, "quick_gelu": True}  # -> clip.quick_gelu
EPS = 1e-5


def settings_from_transformers(
    text_config: Mapping[str, Any], vision_config: Mapping[str, Any]
) -> config.Clip:
    """The two config.json files (or twice that of a full CLIPModel) -> our settings.

    ValueError for what open_clip cannot express, such as another activation or a different one per tower.
    """
    text = {**TEXT_DEFAULTS, **text_config.get("text_config", text_config)}
    vision = {**VISION_DEFAULTS, **vision_config.get("vision_config", vision_config)}
    # in a full CLIPModel, the joint width is next to the towers, not inside them
    embed_dim = vision_config.get("projection_dim", vision["projection_dim"])
    acts = text["hidden_act"], vision["hidden_act"]
    if acts[0] != acts[1] or acts[0] not in ACTIVATIONS:
        raise ValueError(
            f"hidden_act is {acts[0]} in the text tower and {acts[1]} in the image tower; "
            f"open_clip has the same for both, {' or '.join(ACTIVATIONS)}"
        )
    if vision["num_channels"] != 3:
        raise ValueError(f"num_channels is {vision['num_channels']}; open_clip's image tower reads 3")
    for name, tower in (("text", text), ("image", vision)):
        if tower["hidden_size"] % tower["num_attention_heads"]:
            raise ValueError(
                f"hidden_size of the {name} tower is {tower['hidden_size']}, "
                f"not a multiple of num_attention_heads = {tower['num_attention_heads']}"
            )
    return config.Clip(
        embed_dim=embed_dim,
        quick_gelu=ACTIVATIONS[acts[0]],
        vision={
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "layers": vision["num_hidden_layers"],
            "width": vision["hidden_size"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            **_mlp(vision["intermediate_size"], vision["hidden_size"]),
            **_norm(vision["layer_norm_eps"]),
        },
        text={
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "width": text["hidden_size"],
            "heads": text["num_attention_heads"],
            "layers": text["num_hidden_layers"],
            **_mlp(text["intermediate_size"], text["hidden_size"]),
            **_norm(text["layer_norm_eps"]),
        },
    )


# ------------------------------------------------------------------------------------ settings, out


def transformers_configs(clip: config.Clip) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our settings -> the config.json of CLIPTextModel and of CLIPVisionModelWithProjection."""
    check_expressible(clip)
    text, vision = _with_defaults(clip.text, "text"), _with_defaults(clip.vision, "vision")
    shared = {
        "attention_dropout": 0.0,
        "hidden_act": "quick_gelu" if clip.quick_gelu else "gelu",
        "projection_dim": clip.embed_dim,
    }
    text_config = {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": text["vocab_size"],
        "max_position_embeddings": text["context_length"],
        "num_attention_heads": text["heads"],
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 0,
    }
    vision_config = {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "num_channels": 3,
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "num_attention_heads": vision["width"] // vision["head_width"],
    }
    return text_config | _widths(text) | shared, vision_config | _widths(vision) | shared


def _widths(tower: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "hidden_size": tower["width"],
        "intermediate_size": int(tower["width"] * tower["mlp_ratio"]),
        "num_hidden_layers": tower["layers"],
        "layer_norm_eps": (tower.get("norm_kwargs") or {}).get("eps", EPS),
    }


EXPRESSIBLE = {
    "text": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "norm_kwargs"},
    "vision": {"image_size", "patch_size", "layers", "width", "head_width", "mlp_ratio", "norm_kwargs"},
}


def check_expressible(clip: config.Clip) -> None:
    """ValueError names the first open_clip setting that transformers' CLIP cannot express."""
    for name, known in EXPRESSIBLE.items():
        tower = getattr(clip, name)
        if set(tower) - known:
            usual = _open_clip_defaults(name)
            for key in sorted(set(tower) - known):
                if tower[key] != usual.get(key):
                    raise ValueError(f"clip.{name}.{key} is {tower[key]}; transformers' CLIP lacks it")
        if not isinstance(tower["layers"], int):
            raise ValueError(f"clip.{name}.layers is {tower['layers']}, a ResNet; transformers has ViTs")
        if unknown := set(tower.get("norm_kwargs") or {}) - {"eps"}:
            raise ValueError(f"clip.{name}.norm_kwargs holds {sorted(unknown)[0]}; transformers has eps")


def _open_clip_defaults(tower: str) -> dict[str, Any]:
    import open_clip

    cls = {"text": open_clip.CLIPTextCfg, "vision": open_clip.CLIPVisionCfg}[tower]
    return {f.name: f.default for f in dataclasses.fields(cls)}


def _with_defaults(tower: Mapping[str, Any], name: str) -> dict[str, Any]:
    usual = config.OPEN_CLIP_TEXT if name == "text" else config.OPEN_CLIP_VISION
    return {"mlp_ratio": 4.0, **usual, **tower}


# ---------------------------------------------------------------------------------------------- help


def _refuse_foreign(shapes: Mapping[str, tuple[int, ...]]) -> None:
    if any(name.startswith("text.") for name in shapes):
        raise ValueError(
            "this open_clip model has a custom text tower (CustomTextCLIP, names with `text.`); only models "
            "with open_clip's own two towers can be converted"
        )
    if "visual.layer1.0.conv1.weight" in shapes or any(n.startswith("visual.trunk.") for n in shapes):
        raise ValueError("this open_clip model's image tower is not a plain ViT; use one of the ViT models")


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, ...]:
    if name not in shapes:
        raise ValueError(f"{name} is missing, so this is not a complete open_clip model")
    return tuple(shapes[name])


def _layers(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    start = f"{prefix}.resblocks."
    return len({name[len(start) :].split(".")[0] for name in shapes if name.startswith(start)})


def _mlp(inner: int, width: int) -> dict[str, float]:
    """open_clip's mlp_ratio, such that int(width * ratio) is `inner`; empty for the default 4."""
    if inner == 4 * width:
        return {}
    ratio = inner / width
    return {"mlp_ratio": ratio if int(width * ratio) == inner else math.nextafter(ratio, math.inf)}


def _norm(eps: float) -> dict[str, Any]:
    return {} if eps == EPS else {"norm_kwargs": {"eps": eps}}


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "none"
