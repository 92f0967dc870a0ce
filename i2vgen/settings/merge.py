"""Settings from where users give them, laid over each other: weights folder, YAML file, command line.

    dataclass defaults < settings stored in the weights folder < YAML file < command line

`i2vgen.settings.config` says what the settings are. Nothing but this file reads or merges them.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from i2vgen.settings import shipped, yaml_text
from i2vgen.settings.config import (
    ARCHITECTURE,
    DEFAULTS,
    FOREIGN,
    FORMAT,
    FREE,
    IN_A_CALL,
    LISTS,
    LITERALS,
    OPEN_CLIP_TEXT,
    OPEN_CLIP_VISION,
    PATHS,
    QUALITIES,
    RANDOM,
    REFINER_USE,
    REMOVED,
    SECTIONS,
    SETTINGS_FILE,
    SHIPPED,
    SHORT,
    STRUCTURAL_SWITCHES,
    TEXTS,
    Config,
    Sample,
    Schedule,
)
from i2vgen.settings.wording import first_line, shortened

MOST_NAMED = 30  # names that a message can list


def load_config(
    file: str | Path | None = None,
    overrides: Iterable[str] = (),
    *,
    sampling: bool = False,
    **literals: str,
) -> Config:
    """Merge defaults, the weights folder's stored settings, a YAML file and `name=value` overrides.

    `overrides` are what a command line holds, e.g. `["sample.steps=20", "prompt=a cat: it runs"]`; a
    repeated `image=` or `prompt=` makes a list. `literals` are the literal fields by keyword
    (`weights="folder"`), never parsed. With `sampling`, the shipped model is taken where nothing names
    weights. Raises ValueError on an unknown name, a value of the wrong type, an impossible combination, and
    an architecture setting that contradicts the weights.
    """
    yaml_settings, yaml_literals = _read_yaml(file) if file is not None else ({}, {})
    cli_settings, cli_literals = parse_overrides(overrides)
    if foreign := [name for name in cli_literals if name not in LITERALS]:
        raise ValueError(
            f"{foreign[0]}={cli_literals[foreign[0]]} is no setting here; another command takes it"
        )
    texts = {**yaml_literals, **cli_literals, **{k: _listed(k, v) for k, v in literals.items()}}
    texts = {name: _expanded(name, value) for name, value in texts.items()}
    weights = texts["weights"] = texts.get("weights") or (SHIPPED if sampling else "")
    stored = read_stored_settings(weights) if weights not in ("", RANDOM) else {}
    second = texts.get("refine_weights", "")
    refiner = read_stored_settings(second) if second not in ("", RANDOM) else {}
    kept = {**stored, **{name: value for name, value in refiner.items() if name.startswith("refine_")}}
    kept = without_plugins(kept, f"the settings in {weights}")
    texts = {**{k: _listed(k, v) for k, v in kept.items() if k in LITERALS}, **texts}
    stored = without_removed(
        {k: v for k, v in stored.items() if k not in LITERALS}, f"the settings in {weights}"
    )
    layers = [
        (f"the weights in {weights}", stored),
        (f"the weights in {second}", {"refine": refiner["refine"]} if "refine" in refiner else {}),
        (str(file), yaml_settings),
        ("the settings given", cli_settings),
    ]
    if stored:
        for source, layer in layers[2:]:
            refuse_contradiction(stored, weights, layer, source)
    merged = _defaults()
    for source, layer in layers:
        merged = _merge(merged, _resolve_quality(_resolve_clip(layer)), source)
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:  # a __post_init__ refusal arrives as itself, this is the rest
        raise ValueError(first_line(error)) from error
    return dataclasses.replace(config, **texts)


def second_stage(job: Config) -> Config:
    """The refining network's settings: those of its weights, with the job's `refine`, `runtime` and `save`.

    `refine_weights=random` takes the first stage's sizes. ValueError if the weights are no refiner's.
    """
    if job.refine_weights == RANDOM:
        schedule = Schedule(kind="logsnr_cosine")
        held = {"use": REFINER_USE, "unet": job.unet, "vae": job.vae, "clip": job.clip, "schedule": schedule}
    else:
        stored = from_dict(read_stored_settings(job.refine_weights))
        held = {name: getattr(stored, name) for name in ("use", "unet", "vae", "clip", "schedule")}
    use = held["use"]
    if not use.text or use.concat or use.local_tokens or use.global_tokens or use.fps:
        raise ValueError(
            f"refine_weights={job.refine_weights} holds no refiner: its network wants more than text "
            "(a picture, or fps); convert a refiner (docs/cascade.md)"
        )
    if job.refine.skip_filter != "stored":
        held["use"] = dataclasses.replace(use, skip_filter=job.refine.skip_filter)
    multiple, rest = held["vae"].factor * held["unet"].factor, held["vae"].factor * held["unet"].margin(use)
    smallest = dataclasses.replace(
        job.sample, width=multiple, height=rest or multiple, steps=1, sampler="ddim"
    )
    # Plugins change the first stage.
    return dataclasses.replace(job, **held, sample=smallest, weights=job.refine_weights, plugins=())


def parse_overrides(overrides: Iterable[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`["a.b=1", "prompt=x"]` -> nested settings dict, literal fields. Values are YAML, literals are text."""
    settings: dict[str, Any] = {}
    literals: dict[str, Any] = {}
    for override in [overrides] if isinstance(overrides, str) else overrides or ():
        if not isinstance(override, str):
            raise ValueError(
                f"the setting {override!r} is no text; write name=value, such as 'sample.steps=20'"
            )
        name, equals, value = override.partition("=")
        if not equals or not name:
            raise ValueError(f"{override!r} is no setting; write name=value, for example sample.steps=20")
        if name in TEXTS:
            if name == "adapter" and name in literals:  # nobody means the second one alone
                raise ValueError(
                    f"adapter= is given twice, {literals[name]} and {value}; give one; in Python, several "
                    "can be merged (i2vgen/adapt/lora.py)"
                )
            several = name == "plugins" and value[:1] + value[-1:] == "[]"
            values = [one.strip() for one in value[1:-1].split(",")] if several else [value]
            literals[name] = (*literals.get(name, ()), *values) if name in LISTS else value
            continue
        name = SHORT.get(name, name)
        try:
            parsed = yaml_text.parse(value)
        except ValueError as error:
            raise ValueError(f"{shortened(override)}: the value cannot be read: {error}") from error
        _set(settings, name, parsed, override)
    return settings, literals


def read_stored_settings(weights: str | Path) -> dict[str, Any]:
    """The settings a native weights folder holds; ValueError if it is none."""
    folder = Path(weights)
    if not folder.is_dir():
        what = "is a file" if folder.is_file() else "does not exist"
        hub = re.fullmatch(r"(hf:)?([\w.-]+/[\w.-]+)", str(weights)) if not folder.is_file() else None
        more = f"; if it is on the hub: i2vgen convert hf:{hub[2]} FOLDER" if hub else ""
        if str(weights) == "weights/xl":  # what the docs call the released model
            more = "; for the released model: i2vgen convert hf:ali-vilab/i2vgen-xl weights/xl"
        raise ValueError(
            f"weights={weights} {what}; give a native weights folder (see docs/weights.md), shipped or lab, "
            f"which the package brings, or weights=random to try the program with seeded random weights{more}"
        )
    path = folder / SETTINGS_FILE
    try:
        read = json.loads(path.read_text(encoding="utf-8-sig"))
        stored = read["settings"]
        if not isinstance(stored, dict):
            raise TypeError(f"settings are a {type(stored).__name__}")
        if (version := read.get("format")) != FORMAT:
            raise ValueError(f"{path} is of format {version!r}; this version reads format {FORMAT}")
        return stored
    except FileNotFoundError:
        more = ""
        if (folder / "adapter_config.json").is_file():
            more = f"; it is an adapter: give adapter={folder} and the weights it was trained on"
        elif (folder / "model_index.json").is_file():
            more = f"; it is a folder of diffusers: i2vgen convert {folder} NEW makes it one"
        elif any(
            path.suffix in (".pth", ".ckpt", ".bin", ".pt", ".safetensors") for path in folder.iterdir()
        ):
            more = f"; i2vgen inspect {folder} says what it holds, i2vgen convert {folder} NEW makes it one"
        raise ValueError(
            f"weights={weights} holds no {SETTINGS_FILE}, so it is no native weights folder{more}"
        ) from None
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); convert the weights again") from error


def from_dict(settings: Mapping[str, Any]) -> Config:
    """The inverse of `Config.to_dict`, except that no plugin is taken from there."""
    settings = without_plugins(settings, "the stored settings")
    literals = {k: _listed(k, v) for k, v in settings.items() if k in LITERALS}
    sections = without_removed(
        {k: v for k, v in settings.items() if k not in LITERALS}, "the stored settings"
    )
    merged = _merge(_defaults(), sections, "the stored settings")
    return dataclasses.replace(OmegaConf.to_object(merged), **literals)


def with_sample(config: Config, changes: Mapping[str, Any]) -> Config:
    """These settings with others of `sample`, by name, or `negative_prompt`, checked like those of a file.

    ValueError for any other setting: those are read when a model is loaded.
    """
    if not changes:
        return config
    refuse_other_names(changes)
    texts = {name: _listed(name, value) for name, value in changes.items() if name == "negative_prompt"}
    sample: dict[str, Any] = {}
    for name, value in changes.items():
        section, _, leaf = SHORT.get(name, name).rpartition(".")
        if section not in ("", "sample") or (name in (*SECTIONS, *LITERALS) and name not in texts):
            raise ValueError(
                f"{name} is read when a model is loaded; give it there: "
                f'i2vgen.load(weights, overrides=["{name}=..."])'
            )
        if name not in texts:
            numbers = getattr(value, "tolist", None)  # numpy's and torch's
            sample[leaf] = value if numbers is None else numbers()
    base = OmegaConf.structured(_OfACall(config.sample))
    merged = OmegaConf.to_object(_merge(base, _resolve_quality({"sample": sample}), "the call"))
    return dataclasses.replace(config, sample=merged.sample, **texts)


@dataclass
class _OfACall:
    """What a call can change, by itself: to merge all settings would take tenths of a second."""

    sample: Sample


def refuse_other_names(changes: Iterable[str]) -> None:
    """ValueError for names that a call knows in another form, before they reach what has them as its own."""
    for name in changes:
        if name in IN_A_CALL:
            raise ValueError(f"there is no setting {name} in a call; {IN_A_CALL[name]}")


def check_types(settings: Mapping[str, Any], source: str) -> None:
    """ValueError for an unknown name or a value of the wrong type, whether or not the values fit together."""
    _merge(_defaults(), settings, source)


def without_plugins(settings: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Stored settings without plugins, which are code: only who writes the settings of a run names them."""
    if named := settings.get("plugins"):
        warnings.warn(
            f"{source} name plugins={named}, which are never imported from there; if you trust the files, "
            "give plugins= yourself",
            stacklevel=3,
        )
    return {name: value for name, value in settings.items() if name != "plugins"}


def without_removed(settings: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Stored settings without those that only earlier versions had, with a note that names them."""
    old = [
        f"{section}.{name}"
        for section, values in settings.items()
        if isinstance(values, Mapping)
        for name in values
        if f"{section}.{name}" in REMOVED
    ]
    if not old:
        return dict(settings)
    warnings.warn(
        f"{source} name settings of an earlier version, which are left out: "
        + "; ".join(f"{name} ({REMOVED[name]})" for name in old),
        stacklevel=2,
    )
    return {
        section: {k: v for k, v in values.items() if f"{section}.{k}" not in old}
        if isinstance(values, Mapping)
        else values
        for section, values in settings.items()
    }


def _read_yaml(file: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    if not Path(file).is_file():
        raise ValueError(f"configuration file {file} does not exist")
    text = yaml_text.read_text(file)
    try:
        parsed = yaml_text.parse(text)
        plain = yaml_text.parse_plain(text)
    except ValueError as error:
        raise ValueError(f"{file} is no readable YAML file: {error}") from error
    if parsed is None:  # empty, or comments only
        return {}, {}
    if not isinstance(parsed, dict):
        raise ValueError(f"{file} holds no settings; write `section: {{name: value}}` pairs")
    literals = {name: _listed(name, plain[name]) for name in parsed if name in LITERALS}
    settings: dict[str, Any] = {}
    for name, value in parsed.items():
        if name not in LITERALS and not (name in SECTIONS and value is None):  # a heading with nothing below
            _set(settings, SHORT.get(str(name), str(name)), value, f"{file}: {name}")
    return settings, literals


def _listed(name: str, value: Any) -> Any:
    if name not in LITERALS:
        raise ValueError(f"unknown field {name!r}; the literal fields are {', '.join(LITERALS)}")
    if name in LISTS:
        values = value if isinstance(value, list | tuple) else (value,)
        if wrong := [v for v in values if not isinstance(v, str | Path)]:
            raise ValueError(f"{name} holds {wrong[0]!r}; give one text or a list of texts")
        return tuple(str(v) for v in values)
    if not isinstance(value, str | Path):
        raise ValueError(f"{name} is {value!r}; give one text")
    return str(value)


def _expanded(name: str, value: Any) -> Any:
    """~/ before a path becomes the home folder; a lone ~ is a name like any other."""
    if name in ("weights", "refine_weights"):
        value = shipped.weights(value)
    if name not in PATHS:
        return value
    values = value if name in LISTS else (value,)
    found = tuple(os.path.expanduser(one) if one.startswith("~/") else one for one in values)
    return found if name in LISTS else found[0]


def _set(settings: dict[str, Any], dotted: str, value: Any, source: str) -> None:
    """Put `value` at `a.b.c`; a single value for a setting that is a tuple becomes a tuple of one."""
    *parents, leaf = dotted.split(".")
    node = settings
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ValueError(f"{source}: {parent} was given a value and a part of it as well")
    if isinstance(value, dict) and isinstance(node.get(leaf), dict):
        for key, inner in value.items():
            _set(node[leaf], str(key), inner, source)
    else:
        node[leaf] = value


@functools.cache
def _defaults():
    """Never changed: merging copies."""
    return OmegaConf.structured(Config)


def _merge(base, layer: Mapping[str, Any], source: str):
    if not layer:
        return base
    layer = {name: _wrap_tuples(name, value) for name, value in layer.items()}
    refuse_references(layer, source)
    try:
        return OmegaConf.merge(base, OmegaConf.create(layer))
    except (OmegaConfBaseException, TypeError) as error:  # TypeError: a dict where a list stands, and so on
        raise ValueError(f"{source}: {_explain(error, layer)}") from error


def refuse_references(value: Any, where: str, depth: int = 0) -> None:
    """ValueError for `${...}`, which OmegaConf would replace by another setting or by the environment.

    Also for values that nest without end.
    """
    if depth > yaml_text.MAX_DEPTH:
        raise ValueError(f"{where[:80]}... nests deeper than {yaml_text.MAX_DEPTH} levels")
    if isinstance(value, Mapping):
        for name, inner in value.items():
            refuse_references(inner, f"{where}{'.' if depth else ': '}{name}", depth + 1)
    elif isinstance(value, list | tuple | set):
        for inner in value:
            refuse_references(inner, where, depth + 1)
    elif isinstance(value, str) and "${" in value:
        raise ValueError(
            f"{where} is {shortened(value)}; references such as ${{...}} are not expanded, write the value "
            "itself"
        )


def _wrap_tuples(section: str, values: Any) -> Any:
    if section not in SECTIONS or not isinstance(values, dict):
        return values
    cls = type(getattr(DEFAULTS, section))
    tuples = {f.name for f in dataclasses.fields(cls) if str(f.type).startswith("tuple[")}
    wrapped = {k: [v] if k in tuples and not isinstance(v, list | tuple) else v for k, v in values.items()}
    for name in tuples & wrapped.keys():
        if any(isinstance(item, list | tuple | dict) for item in wrapped[name]):
            raise ValueError(f"{section}.{name} is {values[name]!r}; give one value or a plain list of them")
    return wrapped


def _explain(error: Exception, layer: Mapping[str, Any]) -> str:
    """An unknown name gets the nearest known ones, a value of the wrong type the type that is expected."""
    for section, values in layer.items():
        if section in LITERALS:
            return f"{section} is one text and has no parts; write {section}=TEXT"
        if section not in SECTIONS:
            known = [*SECTIONS, *LITERALS, *SHORT]
            if f"runtime.{section}" in REMOVED:
                return _replaced(f"runtime.{section}")
            return f"there is no setting {shortened(section)}{_nearest(section, known)}"
        if not isinstance(values, dict):
            return f"{section} is a group of settings; write {section}.NAME={values}"
        known = {f.name: f.type for f in dataclasses.fields(getattr(DEFAULTS, section))}
        for name, value in values.items():
            if f"{section}.{name}" in REMOVED:
                return _replaced(f"{section}.{name}")
            if name not in known:
                near = _nearest(str(name), [*known], section + ".")
                return f"there is no setting {section}.{str(name)[:200]}{near}"
            try:
                OmegaConf.merge(OmegaConf.structured(type(getattr(DEFAULTS, section))), {name: value})
            except (OmegaConfBaseException, TypeError):
                if known[name].endswith("...]") and isinstance(value, list) and len(value) == 1:
                    value = value[0]  # of which `_wrap_tuples` made a list
                return f"{section}.{name} is {shortened(value)}, expected {_kind(known[name])}"
    return first_line(error)


def _kind(annotation: str) -> str:
    """A field's type in words: Literal['a', 'b'] -> a or b, tuple[int, ...] -> int, or a list of them"""
    if annotation.startswith("Literal["):
        return " or ".join(re.findall(r"'([^']*)'", annotation))
    if found := re.fullmatch(r"tuple\[(\w+), \.\.\.\]", annotation):
        return f"{found[1]}, or a list of them"
    return annotation


def _replaced(name: str) -> str:
    return f"there is no setting {name} any more: {REMOVED[name]}"


def _nearest(name: str, known: list[str], prefix: str = "") -> str:
    if name in FOREIGN:
        return f"; that is diffusers' name, here it is {FOREIGN[name]}="
    if near := difflib.get_close_matches(name, known, n=3, cutoff=0.5):
        return f"; did you mean {', '.join(prefix + n for n in near)}?"
    if len(known) > MOST_NAMED:
        return "; i2vgen/settings/config.py lists them all"
    return f"; known are {', '.join(prefix + n for n in known)}"


def refuse_contradiction(stored: Mapping, weights: str, layer: Mapping, source: str) -> None:
    """ValueError if a layer of settings asks for another architecture than the weights' stored settings."""
    for section in ARCHITECTURE:
        values = _wrap_tuples(section, _resolve_clip(layer).get(section))
        if not isinstance(values, Mapping) or not isinstance(stored.get(section), Mapping):
            continue  # nothing to compare, or wrong in itself: merging tells
        for name, value in flat(values):
            have = dict(flat(stored[section])).get(name)
            if have is not None and value != have and f"{section}.{name}" not in FREE:
                raise ValueError(
                    f"{section}.{name} is {value} in {source} but {have} in the weights {weights}; "
                    "drop the setting, or give weights that match it: weights=FOLDER, or weights=random"
                )
    wanted, held = layer.get("use"), stored.get("use")
    if not isinstance(wanted, Mapping) or not isinstance(held, Mapping):
        return
    for name in STRUCTURAL_SWITCHES:
        # A part that the released model lacks may start untrained (`checkpoint.ablation`).
        if getattr(DEFAULTS.use, name) and wanted.get(name) is True and held.get(name) is False:
            raise ValueError(
                f"use.{name} is true in {source} but false in the weights {weights}: they hold no such part"
            )


def flat(values: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """{"unet": {"base_width": 320}} -> ("unet.base_width", 320); tuples become lists, as in JSON."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + str(name), list(value) if isinstance(value, tuple) else value


def _resolve_clip(layer: Mapping[str, Any]) -> Mapping[str, Any]:
    """`clip.model`, a name of open_clip's or a JSON file in its format, becomes what it stands for."""
    clip = layer.get("clip")
    if not isinstance(clip, dict) or not clip.get("model"):
        return layer
    model = os.path.expanduser(str(clip["model"]))
    if model.endswith(".json"):
        try:
            card = json.loads(Path(model).read_text(encoding="utf-8-sig"))
        except FileNotFoundError:
            raise ValueError(f"clip.model={model} does not exist") from None
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"clip.model={model} is no JSON file: {error}") from error
    else:
        import open_clip  # takes seconds; needed only for a model's name

        card = open_clip.get_model_config(model)
        if card is None:
            near = difflib.get_close_matches(model, open_clip.list_models(), n=3)
            raise ValueError(f"clip.model={model} is no open_clip model; near: {', '.join(near) or 'none'}")
    try:
        settings = {
            "embed_dim": card["embed_dim"],
            "quick_gelu": card.get("quick_gelu", False),
            "vision": {**OPEN_CLIP_VISION, **card["vision_cfg"], **clip.get("vision", {})},
            "text": {**OPEN_CLIP_TEXT, **card["text_cfg"], **clip.get("text", {})},
        }
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"clip.model={model} lacks {error}; it is no open_clip model configuration"
        ) from error
    rest = {k: v for k, v in clip.items() if k not in ("model", "vision", "text")}
    return {**layer, "clip": {**settings, **rest, "model": None}}


def _resolve_quality(layer: Mapping[str, Any]) -> Mapping[str, Any]:
    """`sample.quality` becomes what it stands for, below what the same layer says itself."""
    sample = layer.get("sample")
    if not isinstance(sample, dict) or not isinstance(sample.get("quality"), str):
        return layer
    preset = QUALITIES.get(sample["quality"], {})  # an unknown one is refused by its type
    return {**layer, "sample": {**preset, **sample}}


def with_quality(config: Config, quality: str) -> Config:
    """These settings under a preset, as `quality=` on a command line over them."""
    preset = {**QUALITIES[quality], "guidance_interval": tuple(QUALITIES[quality]["guidance_interval"])}
    return dataclasses.replace(config, sample=dataclasses.replace(config.sample, quality=quality, **preset))
