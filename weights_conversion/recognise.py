"""Recognises from tensor names alone which part of a model a file holds, and in which layout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Part = Literal["unet", "vae", "clip", "text", "image"]  # text and image: one tower of transformers' CLIP
Layout = Literal["vgen", "sd", "compvis", "open_clip", "diffusers", "transformers", "native"]


@dataclass(frozen=True)
class Signature:
    """A part in a layout: names that it must have (after `prefix`), and names that it must not have."""

    part: Part
    layout: Layout
    prefix: str
    needs: tuple[str, ...]
    without: tuple[str, ...] = ()


OTHER_VIDEO = (".temopral_conv.", ".time_stack.")  # ours, and Stable Video Diffusion's
# A name that ends with a dot matches as a prefix; one that starts with a dot matches anywhere.
SIGNATURES = (
    Signature("unet", "vgen", "", ("input_blocks.0.0.weight", ".temopral_conv.")),
    Signature("unet", "sd", "model.diffusion_model.", ("input_blocks.0.0.weight",), OTHER_VIDEO),
    Signature("unet", "sd", "", ("input_blocks.0.0.weight",), OTHER_VIDEO),
    Signature("unet", "diffusers", "", ("transformer_in.norm.weight", "image_latents_proj_in.")),
    Signature("unet", "native", "", ("conv_in.weight", "time.linear1.weight", "mid1.res.conv1.weight")),
    Signature("vae", "compvis", "first_stage_model.", ("encoder.conv_in.weight", "encoder.mid.block_1.")),
    Signature("vae", "compvis", "", ("encoder.conv_in.weight", "encoder.mid.block_1.")),
    Signature("vae", "diffusers", "", ("encoder.conv_in.weight", "encoder.mid_block.")),
    Signature("vae", "native", "", ("encoder.conv_in.weight", "encoder.mid.block1.")),
    Signature("clip", "open_clip", "", ("visual.conv1.weight", "token_embedding.weight", "ln_final.weight")),
    Signature("text", "transformers", "text_model.", ("embeddings.token_embedding.weight",)),
    Signature("text", "transformers", "", ("embeddings.token_embedding.weight",)),
    Signature("image", "transformers", "", ("vision_model.embeddings.class_embedding",)),
)


@dataclass(frozen=True)
class Found:
    """A part found in a file; `tensors` are its tensors without the prefix, read on access."""

    part: Part
    layout: Layout
    tensors: Mapping[str, Tensor]


class Renamed(Mapping):
    """Some tensors of a file under other names (new name -> name in the file), read on access."""

    def __init__(self, tensors: Mapping[str, Tensor], names: Mapping[str, str]):
        self.tensors, self.names = tensors, names

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def recognise(tensors: Mapping[str, Tensor]) -> list[Found]:
    """All parts found, each once; empty if there are none."""
    names = list(tensors)
    found: list[Found] = []
    for signature in SIGNATURES:
        if any(f.part == signature.part for f in found):
            continue
        below = [n.removeprefix(signature.prefix) for n in names if n.startswith(signature.prefix)]
        if all(_has(below, n) for n in signature.needs) and not any(
            _has(below, n) for n in signature.without
        ):
            found.append(Found(signature.part, signature.layout, _own(tensors, signature)))
    return found


# What training programs and compilers put before every name; `_orig_mod.` may also stand inside.
PREFIXES = ("module.", "_forward_module.", "model.diffusion_model.", "diffusion_model.", "model.", "unet.")
COMPILED = "_orig_mod."


def recognise_below(tensors: Mapping[str, Tensor]) -> tuple[list[Found], str]:
    """`recognise`, if need be below prefixes that are no part of a model's names -> parts, those prefixes."""
    names, prefix = {name: name for name in tensors}, ""
    if any(COMPILED in name for name in names):
        names, prefix = {name.replace(COMPILED, ""): held for name, held in names.items()}, COMPILED
        if len(names) < len(tensors):
            raise ValueError(f"the file holds tensors twice, with and without {COMPILED} in their names")
    found = recognise(Renamed(tensors, names))
    while not found and (this := _prefix(names)):
        names = {n.removeprefix(this): held for n, held in names.items() if n.startswith(this)}
        prefix += this
        found = recognise(Renamed(tensors, names))
    return found, prefix


def _prefix(names: Iterable[str]) -> str:
    """One of PREFIXES, or whatever word stands before every name; empty if there is none."""
    words = {name[: name.find(".") + 1] for name in names}
    return next((p for p in PREFIXES if any(n.startswith(p) for n in names)), "") or (
        words.pop() if len(words) == 1 else ""
    )


def bare(name: str) -> str:
    """A name without the prefixes that programs put before it."""
    name = name.replace(COMPILED, "")
    while prefix := next((p for p in PREFIXES if name.startswith(p)), ""):
        name = name.removeprefix(prefix)
    return name


def summary(tensors: Mapping[str, Tensor]) -> str | None:
    """One line that describes the parts found; None if there are none."""
    found, prefix = recognise_below(tensors)
    parts = [f"{WORDS[f.part]} in {f.layout} layout ({len(f.tensors)} tensors)" for f in found]
    return ", ".join(parts) + (f", below the prefix {prefix}" if prefix else "") if parts else None


WORDS = {
    "unet": "UNet",
    "vae": "autoencoder",
    "clip": "CLIP with both towers",
    "text": "CLIP text tower",
    "image": "CLIP image tower",
}


TOWER = {"image": ("vision_model.", "visual_projection."), "text": ("text_model.", "text_projection.")}


def _own(tensors: Mapping[str, Tensor], signature: Signature) -> Renamed:
    """The tensors of a part: all with its prefix. The towers of a full CLIPModel keep their prefixes."""
    prefix = signature.prefix
    if signature.layout != "transformers":
        return Renamed(tensors, {n.removeprefix(prefix): n for n in tensors if n.startswith(prefix)})
    if signature.part == "image":
        own = [n for n in tensors if n.startswith((*TOWER["image"], "logit_scale"))]
    else:
        own = [n for n in tensors if not n.startswith(TOWER["image"])]
    return Renamed(tensors, {n: n for n in own})


def _has(names: list[str], wanted: str) -> bool:
    if wanted.startswith("."):
        return any(wanted in name for name in names)
    if wanted.endswith("."):
        return any(name.startswith(wanted) for name in names)
    return wanted in names
