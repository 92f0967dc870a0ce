"""The report of an evaluation: its tables, and one page with clips and their truth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from i2vgen.evaluation.evaluate import Evaluation
from i2vgen.evaluation.scores import ACCURACIES, MEANS, SCORES, SHAPES, Made, Scores, asked
from i2vgen.files import pages, whole
from i2vgen.files.tables import NONE, Table
from i2vgen.settings.wording import counted

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
FILES = ("scores.json", "table.md", "index.html", "clips.png")
SHOWN = {"basic": 6, "other": 4, "all": 6}  # clips on the page, per set; the contact sheet has all of "all"
# Of the contact sheet, in pixels.
VIEWS, SIDE, COLUMNS, LINES, TEXT, GAP = 4, 80, 3, 2, 13, 4


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
        figures=[as_figure(one) for name, few in SHOWN.items() for one in of_set(evaluation, name)[:few]],
    )
    return pages.render(
        "Evaluation on the procedural world",
        summary(evaluation),
        [*map(pages.of_table, tables(evaluation)), clips],
        settings=evaluation.settings,
    )


def of_set(evaluation: Evaluation, name: str) -> list[Made]:
    return [one for one in evaluation.shown if one.item.set == name]


def summary(evaluation: Evaluation) -> str:
    s = evaluation.settings
    return (
        f"{s['weights']}: {counted(s['clips'], 'seed')} from {s['first_seed']}, "
        f"{s['width']} x {s['height']} pixels, {counted(s['frames'], 'frame')}, "
        f"{counted(s['steps'], 'step')}, guidance {s['guidance']:g}, {evaluation.scores.seconds:.0f} s"
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
# Contact sheet


def contact_sheet(clips: Sequence[Made]) -> Image.Image:
    """For each clip: the picture, VIEWS frames up to the last, and the sentence below."""
    cells = [cell(one) for one in clips]
    wide, high = cells[0].size
    rows = -(-len(cells) // COLUMNS)
    sheet = Image.new("RGB", (wide * min(COLUMNS, len(cells)), high * rows), "white")
    for place, one in enumerate(cells):
        sheet.paste(one, (place % COLUMNS * wide, place // COLUMNS * high))
    return sheet


def cell(one: Made) -> Image.Image:
    later = np.linspace(0, len(one.frames) - 1, VIEWS + 1).round().astype(int)[1:]
    views = np.concatenate([one.truth[0], *one.frames[later]], axis=1)
    height = len(views)
    strip = Image.fromarray(views).resize((views.shape[1] * SIDE // height, SIDE), Image.Resampling.LANCZOS)
    found = Image.new("RGB", (strip.width + 2 * GAP, SIDE + LINES * (TEXT + GAP) + GAP), "white")
    found.paste(strip, (0, 0))
    draw, font = ImageDraw.Draw(found), ImageFont.load_default(TEXT)
    lines = [""]
    for word in one.item.caption.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font=font) > strip.width:
            lines.append(word)
        else:
            lines[-1] = longer
    for place, line in enumerate(lines[:LINES]):
        draw.text((1, SIDE + place * (TEXT + GAP)), line, fill="black", font=font)
    return found


# ---------------------------------------------------------------------------------------------------
# Files


def write_report(evaluation: Evaluation, folder: Path) -> Path:
    """index.html, scores.json, table.md and clips.png -> the page"""
    parts = [f"# Evaluation\n\n{summary(evaluation)}\n"]
    parts += [f"## {table.title}\n\n{table.markdown()}\n" for table in tables(evaluation)]
    scores, table, page, sheet = (folder / name for name in FILES)
    with whole.replacing(sheet) as temporary:
        contact_sheet(of_set(evaluation, "all")).save(temporary, "PNG", optimize=True)
    whole.write_json(scores, evaluation.to_dict(), allow_nan=False)
    whole.write_text(table, "\n".join(parts))
    whole.write_text(page, as_page(evaluation))
    return page
