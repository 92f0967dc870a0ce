"""The report of an evaluation: its tables, and one page with clips and their truth."""

from __future__ import annotations

from pathlib import Path

from i2vgen.evaluation.evaluate import Evaluation
from i2vgen.evaluation.scores import ACCURACIES, MEANS, SCORES, SHAPES, Made, Scores, asked
from i2vgen.files import pages, whole
from i2vgen.files.tables import NONE, Table

LABELS = {
    "motion_accuracy_basic": "motion, basic clips",
    "motion_accuracy_all": "motion, all clips",
    "other_motion_accuracy": "another motion, same picture",
    "object_accuracy": "objects stay whole",
    "camera_accuracy": "camera move",
    "identity": "identity over time",
    "first_frame_psnr": "first frame, PSNR",
    "clip_psnr": "clip, PSNR",
    "still_psnr": "picture repeated, PSNR",
    "vae_psnr": "autoencoder alone, PSNR",
    "shape_kept": "shape kept, frames and objects",
    "shape_kept_last": "shape kept in the last frame",
    "motion_and_shape": "motion right and shape kept",
    "vae_shape_kept": "autoencoder alone, shape kept",
}
SHORT = {
    "motion_accuracy_basic": "basic",
    "motion_accuracy_all": "all",
    "other_motion_accuracy": "other",
    "object_accuracy": "objects",
    "camera_accuracy": "camera",
    "identity": "identity",
    "first_frame_psnr": "first",
    "clip_psnr": "clip",
    "still_psnr": "still",
    "vae_psnr": "vae",
    "shape_kept": "shape",
    "shape_kept_last": "last",
    "motion_and_shape": "both",
    "vae_shape_kept": "vae shape",
}
BRIEF = {  # of a sweep over ways of sampling
    "motion_accuracy_basic": "basic",
    "other_motion_accuracy": "other",
    "object_accuracy": "objects",
    "first_frame_psnr": "first",
    "clip_psnr": "clip",
}
SHARES = (*ACCURACIES, "identity")
FILES = ("scores.json", "table.md", "index.html")


def tables(evaluation: Evaluation) -> list[Table]:
    found = [score_table(evaluation.scores)]
    if evaluation.sweep:
        found.append(sweep_table(evaluation))
    return [*found, motion_table(evaluation.scores)]


def names(scores: Scores) -> list[str]:
    """The scores to show: those of pictures where things are pictures, in place of `identity`."""
    if "shape_kept" not in scores.values:
        return [*SCORES]
    return [name for name in (*ACCURACIES, *SHAPES, *MEANS) if name != "identity" and name in scores.values]


def score_table(scores: Scores) -> Table:
    rows = []
    for name in names(scores):
        low_high = scores.intervals[name]
        interval = NONE if low_high is None else " to ".join(figure(name, end) for end in low_high)
        rows.append((LABELS[name], figure(name, scores.values[name]), interval, str(scores.counts[name])))
    return Table("Scores", ("score", "value", "95 % interval", "clips"), tuple(rows))


def sweep_table(evaluation: Evaluation) -> Table:
    rows = [("as set", evaluation.scores), *evaluation.sweep]
    if evaluation.drifts:
        return drift_table(evaluation, rows)
    shown = names(evaluation.scores)
    cells = [
        (name, *(figure(score, scores.values[score]) for score in shown), f"{scores.seconds:.0f} s")
        for name, scores in rows
    ]
    title = f"Sweep over {evaluation.settings['sweep']}"
    return Table(
        title, (evaluation.settings["sweep"], *(SHORT[name] for name in shown), "time"), tuple(cells)
    )


def drift_table(evaluation: Evaluation, rows: list[tuple[str, Scores]]) -> Table:
    """A sweep over ways of sampling: what they cost and how far they lead from the reference."""
    cells = []
    for name, scores in rows:
        drift = evaluation.drifts[name]
        calls = f"{drift.whole} + {drift.outer} outer" if drift.outer else str(drift.whole)
        shown = (figure(score, scores.values[score]) for score in BRIEF)
        far = (f"{drift.psnr:.1f} dB", f"{drift.relative:.3f}")
        cells.append((name, calls, *far, *shown, f"{scores.seconds:.0f} s"))
    head = (evaluation.settings["sweep"], "calls", "drift", "relative", *BRIEF.values(), "time")
    return Table(f"Sweep over {evaluation.settings['sweep']}", head, tuple(cells))


def motion_table(scores: Scores) -> Table:
    rows = []
    for name, row in scores.per_motion.items():
        if row["clips"]:
            interval = " to ".join(figure("motion", end) for end in row["interval"])
            wrong = ", ".join(f"{read} ({count})" for read, count in row["read_as"].items())
            rows.append((name, figure("motion", row["accuracy"]), interval, str(row["clips"]), wrong))
    head = ("motion asked for", "accuracy", "95 % interval", "clips", "wrong ones read as")
    return Table("Motion by motion", head, tuple(rows), words=(0, 4))


def figure(name: str, value: float | None) -> str:
    """A share in per cent, a PSNR in dB."""
    if value is None:
        return NONE
    return f"{value:.1f} dB" if name.endswith("psnr") else f"{100 * value:.1f} %"


def as_page(evaluation: Evaluation) -> str:
    clips = pages.Section(
        "The first clips of each set",
        text="Above the true clip, below the one that the model made of its first frame and the caption.",
        figures=[as_figure(one) for one in evaluation.shown],
    )
    return pages.render(
        "Evaluation on the procedural world",
        summary(evaluation),
        [*map(pages.of_table, tables(evaluation)), clips],
        settings=evaluation.settings,
    )


def summary(evaluation: Evaluation) -> str:
    s = evaluation.settings
    return (
        f"{s['weights']}: {s['clips']} seeds from {s['first_seed']}, {s['width']} x {s['height']} pixels, "
        f"{s['frames']} frames, {s['steps']} steps, guidance {s['guidance']:g}, "
        f"{evaluation.scores.seconds:.0f} s"
    )


def as_figure(one: Made) -> pages.Figure:
    told = f"\n{one.item.set} {one.item.seed}: asked {asked(one.item.facts)}, read {one.read}, "
    return pages.Figure(
        tuple((alt, pages.strip(frames))
              for alt, frames in (("true clip", one.truth), ("generated clip", one.frames))),
        name=one.item.caption,
        told=told + "right" if one.motion_right else told,
        wrong="" if one.motion_right else "wrong",
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------
# Files


def write_report(evaluation: Evaluation, folder: Path) -> Path:
    """index.html, scores.json and table.md -> the page"""
    parts = [f"# Evaluation\n\n{summary(evaluation)}\n"]
    parts += [f"## {table.title}\n\n{table.markdown()}\n" for table in tables(evaluation)]
    scores, table, page = (folder / name for name in FILES)
    whole.write_json(scores, evaluation.to_dict(), allow_nan=False)
    whole.write_text(table, "\n".join(parts))
    whole.write_text(page, as_page(evaluation))
    return page
