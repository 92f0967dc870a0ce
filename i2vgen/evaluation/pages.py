"""The report of an evaluation: tables as text, Markdown and HTML, and one page with clips and their truth."""

from __future__ import annotations

import base64
import html
import io
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from i2vgen.evaluation.evaluate import Evaluation
from i2vgen.evaluation.scores import ACCURACIES, SCORES, Made, Scores, asked
from i2vgen.files import whole

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
}
SHORT = ("basic", "all", "other", "objects", "camera", "identity", "first", "clip", "still", "vae")
BRIEF = {  # of a sweep over ways of sampling
    "motion_accuracy_basic": "basic",
    "other_motion_accuracy": "other",
    "object_accuracy": "objects",
    "first_frame_psnr": "first",
    "clip_psnr": "clip",
}
SHARES = (*ACCURACIES, "identity")
NONE = "-"  # no such clip
FRAME_HEIGHT, MAX_FRAMES, GAP = 96, 8, 3  # of the strips, in pixels

STYLE = """
:root { color-scheme: light dark; --ink: #222; --soft: #6a6a6a; --line: #ddd; --paper: #fdfdfb; --bad: #a33; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ddd; --soft: #999; --line: #3a3a3a; --paper: #191a1b; --bad: #e88; }
}
body { margin: 2.5rem auto; max-width: 56rem; padding: 0 1rem; background: var(--paper); color: var(--ink);
       font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; font-weight: 600; }
h2 { font-size: 1.05rem; font-weight: 600; margin-top: 2.2rem; }
p, figcaption, footer { color: var(--soft); }
b { color: var(--ink); font-weight: 500; } .no { color: var(--bad); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem 1rem .2rem 0; text-align: right; border-bottom: 1px solid var(--line); }
th { font-weight: 500; color: var(--soft); }
th:first-child, td:first-child, .words { text-align: left; }
figure { margin: 1.6rem 0; }
figure img { display: block; max-width: 100%; height: auto; margin-top: .25rem; image-rendering: pixelated; }
"""


class Table(NamedTuple):
    """`words`: columns of text, which stand left; all others right."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: tuple[int, ...] = (0,)


def tables(evaluation: Evaluation) -> list[Table]:
    found = [score_table(evaluation.scores)]
    if evaluation.sweep:
        found.append(sweep_table(evaluation))
    return [*found, motion_table(evaluation.scores)]


def score_table(scores: Scores) -> Table:
    rows = []
    for name in SCORES:
        low_high = scores.intervals[name]
        interval = NONE if low_high is None else " to ".join(figure(name, end) for end in low_high)
        rows.append((LABELS[name], figure(name, scores.values[name]), interval, str(scores.counts[name])))
    return Table("Scores", ("score", "value", "95 % interval", "clips"), tuple(rows))


def sweep_table(evaluation: Evaluation) -> Table:
    rows = [("as set", evaluation.scores), *evaluation.sweep]
    if evaluation.drifts:
        return drift_table(evaluation, rows)
    cells = [
        (name, *(figure(score, scores.values[score]) for score in SCORES), f"{scores.seconds:.0f} s")
        for name, scores in rows
    ]
    title = f"Sweep over {evaluation.settings['sweep']}"
    return Table(title, (evaluation.settings["sweep"], *SHORT, "time"), tuple(cells))


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


def as_text(table: Table) -> str:
    lines = [table.head, *table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in table.words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def as_markdown(table: Table) -> str:
    marks = ["---" if i in table.words else "---:" for i in range(len(table.head))]
    lines = [table.head, marks, *table.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def as_html(table: Table) -> str:
    def line(cells: tuple[str, ...], tag: str) -> str:
        kinds = [' class="words"' if i in table.words else "" for i in range(len(cells))]
        return "<tr>" + "".join(
            f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for cell, kind in zip(cells, kinds, strict=True)
        ) + "</tr>"  # fmt: skip

    body = "\n".join([line(table.head, "th"), *(line(row, "td") for row in table.rows)])
    return f'<h2>{html.escape(table.title)}</h2>\n<div class="wide"><table>\n{body}\n</table></div>'


def as_page(evaluation: Evaluation) -> str:
    """Everything in one file: it asks for no other, on this machine or elsewhere."""
    shown = "\n".join(as_figure(one) for one in evaluation.shown)
    what = html.escape(summary(evaluation))
    record = html.escape(json.dumps(evaluation.settings, indent=1))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Evaluation</title><style>{STYLE}</style></head><body>
<h1>Evaluation on the procedural world</h1>
<p>{what}</p>
{"".join(as_html(table) for table in tables(evaluation))}
<h2>The first clips of each set</h2>
<p>Above the true clip, below the one that the model made of its first frame and the caption.</p>
{shown}
<footer><details><summary>Settings</summary><pre>{record}</pre></details></footer>
</body></html>
"""


def summary(evaluation: Evaluation) -> str:
    s = evaluation.settings
    return (
        f"{s['weights']}: {s['clips']} seeds from {s['first_seed']}, {s['width']} x {s['height']} pixels, "
        f"{s['frames']} frames, {s['steps']} steps, guidance {s['guidance']:g}, "
        f"{evaluation.scores.seconds:.0f} s"
    )


def as_figure(one: Made) -> str:
    verdict = "right" if one.motion_right else '<span class="no">wrong</span>'
    told = f"{one.item.set} {one.item.seed}: asked {asked(one.item.facts)}, read {one.read}, "
    pictures = "".join(
        f'<img alt="{alt}" src="data:image/png;base64,{encoded(strip(frames))}">'
        for alt, frames in (("true clip", one.truth), ("generated clip", one.frames))
    )
    caption = html.escape(one.item.caption)
    told = f"<b>{caption}</b><br>{html.escape(told)}{verdict}"
    return f"<figure><figcaption>{told}</figcaption>{pictures}</figure>"


def strip(frames: np.ndarray) -> Image.Image:
    """Up to MAX_FRAMES frames of uint8 [f h w 3], evenly spread, side by side at about FRAME_HEIGHT."""
    count, height, width, _ = frames.shape
    chosen = np.linspace(0, count - 1, min(count, MAX_FRAMES)).round().astype(int)
    if height <= FRAME_HEIGHT:
        times = round(FRAME_HEIGHT / height)
        size, how = (width * times, height * times), Image.Resampling.NEAREST
    else:
        size, how = (round(width * FRAME_HEIGHT / height), FRAME_HEIGHT), Image.Resampling.BOX
    row = Image.new("RGBA", (len(chosen) * (size[0] + GAP) - GAP, size[1]))  # the gaps let the page through
    for place, number in enumerate(chosen):
        row.paste(Image.fromarray(frames[number]).resize(size, how), (place * (size[0] + GAP), 0))
    return row


def encoded(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


# ---------------------------------------------------------------------------------------------------
# Files


def check_file(name: str, path: Path) -> Path:
    """ValueError unless a file can be written there; its folder is made."""
    if path.is_dir():
        raise ValueError(f"{name}={path} is a folder; give the name of a file in it")
    check_folder(name, path.absolute().parent)
    return path


def check_folder(name: str, path: Path) -> Path:
    """ValueError unless files can be written into this folder; it is made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{name}=: the folder {path} cannot be made ({error.strerror})") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise ValueError(f"{name}=: the folder {path} is not writable; choose another one")
    return path


def write_report(evaluation: Evaluation, folder: Path) -> Path:
    """index.html, scores.json and table.md -> the page"""
    parts = [f"# Evaluation\n\n{summary(evaluation)}\n"]
    parts += [f"## {table.title}\n\n{as_markdown(table)}\n" for table in tables(evaluation)]
    whole.write_json(folder / "scores.json", evaluation.to_dict(), allow_nan=False)
    whole.write_text(folder / "table.md", "\n".join(parts))
    whole.write_text(folder / "index.html", as_page(evaluation))
    return folder / "index.html"
