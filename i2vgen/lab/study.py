"""An ablation study: a question, a base, its variants, and what to measure. Reads, checks and expands it.

    # The first line of the file is the question that the study asks?
    measures: [cost, untrained, trained]
    scores: [motion_accuracy_basic, first_frame_psnr]
    variants:
      everything: []                       # the first is the base that the others are compared with
      without local tokens: [use.local_tokens=false]

The base is a native weights folder (`weights:`, by default the lab model) under `settings:`. Variants are
scored on clips of the drawn world, or with `evaluate: {videos: FOLDER}` on held-out clips of one's own
(`own_clips.py`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from i2vgen.evaluation.scores import SCORES
from i2vgen.files import checkpoint, fingerprint, plugins
from i2vgen.lab import own_clips
from i2vgen.scoring.scores import METRICS
from i2vgen.settings import shipped, yaml_text
from i2vgen.settings.config import LAB, Config
from i2vgen.settings.merge import from_dict, load_config, parse_overrides, read_stored_settings
from i2vgen.training.settings import SECTION, WORLD, Train, load_settings

Measure = Literal["cost", "untrained", "trained"]
LONGEST_SLUG = 200  # letters of a variant's folder
MEASURES = ("cost", "untrained", "trained")
OF_WORLD = ("motion_accuracy_basic", "other_motion_accuracy", "first_frame_psnr", "clip_psnr")  # by default


@dataclass(frozen=True)
class Budget:
    """How much work to do. None means what the weights or the study say."""

    clips: int  # as in `i2vgen evaluate`, which makes three clips of each
    train_steps: int | None
    seeds: int  # trainings per variant
    rounds: int  # timed calls per variant
    sample_steps: int | None = None
    batch: int | None = None


BUDGETS = {
    "smoke": Budget(clips=1, train_steps=2, seeds=1, rounds=1, sample_steps=2, batch=2),
    "quick": Budget(clips=16, train_steps=500, seeds=2, rounds=5),
    "full": Budget(clips=64, train_steps=None, seeds=3, rounds=9),
}


@dataclass(frozen=True)
class Study:
    """The contents of a file in configs/ablations."""

    name: str
    question: str
    variants: dict[str, tuple[str, ...]]  # name -> settings as on a command line; train.NAME too
    measures: tuple[Measure, ...] = MEASURES
    scores: tuple[str, ...] = ()  # to show; empty: OF_WORLD, or all that are measured on one's own clips
    evaluate: dict = field(default_factory=dict)  # own_clips.SETTINGS; empty: clips of the drawn world
    weights: str = LAB
    settings: tuple[str, ...] = ()  # of every variant; its own settings override them
    train: dict = field(default_factory=dict)  # training settings
    # Train a new UNet or continue from the base's; VAE and CLIP are the base's in both cases.
    start: Literal["scratch", "weights"] = "scratch"

    @property
    def base(self) -> str:
        return next(iter(self.variants))

    @property
    def only_counted(self) -> bool:
        """No variant is run: there are no scores to plot."""
        return self.measures == ("cost",)


class Run(NamedTuple):
    """One measurement of one variant, in its own folder. `cost` measures all variants at once."""

    variant: str
    measure: Measure
    seed: int
    folder: Path


def read(file: str | Path) -> Study:
    """Read and check a study; ValueError says what is wrong with the file."""
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"study {file} does not exist; `i2vgen examples` lists those in configs/ablations")
    text = yaml_text.read_text(path)
    first = text.split("\n", 1)[0]
    if not re.fullmatch(r"#\s*\S.*\?\s*", first):
        raise ValueError(f"{file}: the first line must be the question as a comment: # Does ... ?")
    try:
        held = yaml_text.parse(text)
    except ValueError as error:
        raise ValueError(f"{file} is not a readable YAML file: {error}") from error
    known = {f.name for f in dataclasses.fields(Study)} - {"name", "question"}
    if not isinstance(held, dict) or (wrong := sorted(set(held) - known)):
        what = f"{wrong[0]!r}" if isinstance(held, dict) else "no settings"
        raise ValueError(f"{file} holds {what}; a study has {', '.join(sorted(known))}")
    for name in ("measures", "scores", "settings"):
        if name in held:
            held[name] = _texts(held[name], f"{file}: {name}")
    variants = held.pop("variants", None)
    if not isinstance(variants, dict) or len(variants) < 2:
        raise ValueError(f"{file}: variants needs a base and at least one variant of it")
    variants = {str(name): _texts(words, f"{file}: variant {name!r}") for name, words in variants.items()}
    study = Study(path.stem, first.lstrip("# ").strip(), variants, **held)
    weights = shipped.weights(study.weights)
    study = dataclasses.replace(study, weights=weights, scores=study.scores or _scores(study, file))
    _check(study, file)
    return study


def _scores(study: Study, file: str | Path) -> tuple[str, ...]:
    """The scores of a study that names none; ValueError if its `evaluate:` is impossible."""
    wanted = study.evaluate
    if not isinstance(wanted, dict) or (wrong := sorted(set(wanted) - set(own_clips.SETTINGS))):
        what = f"{wrong[0]!r}" if isinstance(wanted, dict) else f"{wanted!r}"
        raise ValueError(f"{file}: evaluate has {what}; it takes {', '.join(own_clips.SETTINGS)}")
    if not wanted:
        return OF_WORLD
    if not isinstance(wanted.get("videos"), str):
        raise ValueError(f"{file}: evaluate needs videos: FOLDER, held-out clips with captions")
    if "metrics" in wanted:
        wanted["metrics"] = _texts(wanted["metrics"], f"{file}: evaluate: metrics")
    try:
        return own_clips.judged(wanted).names
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: evaluate: {error}") from error


def _texts(value, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise ValueError(
            f"{where} is {value!r}; give a list of strings, for settings [section.name=value, ...]"
        )
    return tuple(value)


def _check(study: Study, file: str | Path) -> None:
    for names, known, what in (
        (study.measures, MEASURES, "measure"),
        (study.scores, METRICS if study.evaluate else SCORES, "score"),
        ((study.start,), ("scratch", "weights"), "start"),
    ):
        if wrong := [name for name in names if name not in known]:
            raise ValueError(f"{file}: there is no {what} {wrong[0]!r}; choose from {', '.join(known)}")
    if not isinstance(study.train, dict):
        raise ValueError(f"{file}: train is {study.train!r}; give name: value pairs")
    if study.evaluate and (gone := set(study.scores) - set(own_clips.judged(study.evaluate).names)):
        raise ValueError(f"{file}: scores has {sorted(gone)[0]}, which evaluate: metrics does not measure")
    folders: dict[str, str] = {}
    for name, words in study.variants.items():
        if not words and name != study.base:
            raise ValueError(f"{file}: the variant {name!r} changes nothing; only the base, the first, may")
        if slug(name) in folders:
            raise ValueError(
                f"{file}: the variants {folders[slug(name)]!r} and {name!r} would share the result folder "
                f"{slug(name)}; rename one"
            )
        if len(slug(name)) > LONGEST_SLUG:
            raise ValueError(f"{file}: the variant {name!r} names its folder; give it a shorter name")
        folders[slug(name)] = name
    known: dict[str, tuple] = {}
    compared: set[str] = set()  # what variants are trained on
    for name in study.variants:
        try:
            both = _settings(study, name, BUDGETS["smoke"]), _settings(study, name, BUDGETS["full"])
        except ValueError as error:
            raise ValueError(f"{file}: the variant {name!r}: {error}") from error
        if study.start == "scratch" and any(isinstance(s, Train) and s.lora_rank for s in both[1]):
            raise ValueError(
                f"{file}: the variant {name!r}: train.lora_rank adapts a trained UNet; write start: weights"
            )
        if "trained" in study.measures and both[1][1].data not in compared:  # files are hashed once
            _check_data(study, *both[1][:2], f"{file}: the variant {name!r}")
            compared.add(both[1][1].data)
        known[name] = both[1]
        same = next(other for other, held in known.items() if held == both[1])
        if same != name:
            raise ValueError(
                f"{file}: the variants {same!r} and {name!r} have the same settings, so there is nothing to "
                "compare"
            )


def _check_data(study: Study, config: Config, train: Train, where: str) -> None:
    """What is trained on must fit what is scored."""
    videos = study.evaluate.get("videos", "")
    if train.data == WORLD:
        return
    if not videos:
        raise ValueError(
            f"{where} is trained on train.data: {train.data}, of which scores on the drawn world say nothing"
            "; write evaluate: {videos: FOLDER} with held-out clips"
        )
    try:
        # Prepared clips are tied to the VAE and CLIP that encoded them: each variant is given the base's.
        own_clips.refuse_overlap(videos, dataclasses.replace(config, weights=str(study.weights)), train)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _settings(study: Study, variant: str, budget: Budget) -> tuple:
    """All settings that a variant is measured under; ValueError if they are impossible."""
    found: list = []
    if "trained" in study.measures:
        found += trained(study, variant, budget, 0)
    if "untrained" in study.measures or "cost" in study.measures:
        found.append(untrained(study, variant, budget))
    return tuple(found)


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "variant"


# ---------------------------------------------------------------------------------------------------
# Settings of one variant


def words_of(study: Study, variant: str) -> tuple[list[str], list[str]]:
    """A variant's settings of the model and of the training, as on a command line."""
    words = [*study.settings, *study.variants[variant]]
    own = [word for word in words if word.startswith(f"{SECTION}.")]
    return [word for word in words if word not in own], own


def untrained(study: Study, variant: str, budget: Budget) -> Config:
    """The base's weights under the variant's settings; ValueError if the two are incompatible."""
    words, own = words_of(study, variant)
    if own and "trained" not in study.measures:
        raise ValueError(f"{own[0]} is a training setting, but the study trains nothing")
    sample = [f"sample.steps={budget.sample_steps}"] if budget.sample_steps else []
    return load_config(None, [*sample, *words], weights=study.weights)


def trained(study: Study, variant: str, budget: Budget, seed: int) -> tuple[Config, Train]:
    """The settings of a variant's model and of its training."""
    words, own = words_of(study, variant)
    changes, texts = parse_overrides(words)
    settings = _nested_update(read_stored_settings(study.weights), changes)
    config = dataclasses.replace(from_dict(settings), plugins=texts.get("plugins", ()))
    spent = {"train.seed": seed, "train.batch": budget.batch, "train.steps": budget.train_steps}
    given = [f"train.{name}={json.dumps(value)}" for name, value in study.train.items()]
    given += [f"{name}={value}" for name, value in spent.items() if value is not None]
    train = load_settings(None, [*given, *own, "train.part=diffusion"])[1]
    if train.first_stage:
        raise ValueError(
            f"train.first_stage = {train.first_stage} trains a refiner, which a study cannot score; use "
            "`i2vgen train` and `i2vgen refine-gain`"
        )
    if budget.batch and train.cache:  # so few steps see only a handful of clips
        train = dataclasses.replace(train, cache=False)
    return config, train


def plugged_in(study: Study, variant: str) -> Config:
    """Settings that name the variant's plugins, and nothing else"""
    return Config(plugins=parse_overrides(words_of(study, variant)[0])[1].get("plugins", ()))


def with_plugins(study: Study) -> list[Config]:
    """`plugged_in` of the variants, each once"""
    found = [plugged_in(study, variant) for variant in study.variants]
    return [config for i, config in enumerate(found) if config.plugins and config not in found[:i]]


def _nested_update(base: dict, changes: dict) -> dict:
    merged = dict(base)
    for name, value in changes.items():
        inside = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _nested_update(merged[name], value) if inside else value
    return merged


# ---------------------------------------------------------------------------------------------------
# Runs


def runs(study: Study, budget: Budget, output: Path) -> list[Run]:
    """All runs of a study, the untrained ones first.

    A variant that changes only training has the base's untrained weights and is not measured again.
    """
    found = []
    for measure, seeds in (("untrained", 1), ("trained", budget.seeds)):
        if measure in study.measures:
            for seed in range(seeds):
                for variant in study.variants:
                    if measure == "untrained" and _only_trains(study, variant):
                        continue
                    name = f"seed{seed}" if measure == "trained" else ""
                    found.append(Run(variant, measure, seed, output / slug(variant) / measure / name))
    return found


def _only_trains(study: Study, variant: str) -> bool:
    return variant != study.base and words_of(study, variant)[0] == words_of(study, study.base)[0]


def identity(study: Study, run: Run, budget: Budget) -> str:
    """Hash of all settings and weights that affect a run's result; finished runs with another are refused."""
    weights = fingerprint.of_paths(sorted(Path(study.weights).glob("*.safetensors")), pieces=64)
    facts = [
        run.measure,
        run.seed,
        dataclasses.asdict(budget),
        study.weights,
        weights,
        study.start,
        study.train,
    ]
    facts += [study.settings, study.variants[run.variant], checkpoint.read_origin(study.weights)]
    facts += [plugins.described(plugged)] if (plugged := plugged_in(study, run.variant)).plugins else []
    if study.evaluate:
        facts += [study.evaluate, fingerprint.of_paths([Path(study.evaluate["videos"])])]
    return fingerprint.of_text(json.dumps(facts, sort_keys=True))


def code() -> dict[str, str]:
    """Hashes of the package's source files: results that other code made are stale. Commands make none."""
    package = Path(__file__).parents[1]
    return {
        str(path.relative_to(package.parent)): hashlib.sha256(path.read_bytes()).hexdigest()[:8]
        for path in sorted(package.rglob("*.py"))
        if path.relative_to(package).parts[0] not in ("commands", "examples", "__main__.py")
    }
