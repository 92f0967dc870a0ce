"""The scores of one model, or of two side by side, as tables, as JSON and as a page."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from i2vgen.files import pages, records, whole
from i2vgen.files.tables import NONE, Table
from i2vgen.scoring.clips import frames
from i2vgen.scoring.scores import METRICS, SETS, Found, Job, Metric, differences
from i2vgen.scoring.stats import Mean
from i2vgen.settings.wording import counted

ARROWS = {"higher": "higher", "lower": "lower", "": "-"}
INSIDE = "inside the error bars"
UNJUDGED = "no interval"
SHOWN = 8  # clips on the page
FILES = ("index.html", "scores.json")
DIGITS = 4  # significant ones; of numbers below 1, behind the point


def table(found: Sequence[Found], names: Sequence[str]) -> Table:
    return alone(found[0], names) if len(found) == 1 else against(found[0], found[1], names)


def alone(one: Found, names: Sequence[str]) -> Table:
    rows = []
    for name in names:
        mean, metric = one.means[name], METRICS[name]
        rows.append(
            (name, figure(mean.value), interval(mean), str(mean.clips), metric.unit, ARROWS[metric.better])
        )
    return Table("", ("score", "mean", "95 % interval", "clips", "unit", "better"), tuple(rows), (0, 4, 5))


def against(one: Found, other: Found, names: Sequence[str]) -> Table:
    rows, apart = [], differences(one, other, names)
    for name in names:
        a, b = one.means[name].value, other.means[name].value
        difference = apart.get(name) or Mean(None if None in (a, b) else a - b, None, None, 0)
        cells = (figure(a), figure(b), figure(difference.value), interval(difference))
        rows.append((name, *cells, verdict(name, difference), METRICS[name].unit))
    head = ("score", "videos", "against", "difference", "95 % interval", "says", "unit")
    return Table("", head, tuple(rows), (0, 5, 6))


def verdict(name: str, difference: Mean) -> str:
    """What a paired difference videos - against says, or that it says nothing."""
    if difference.value is None or difference.low is None:
        return UNJUDGED
    if difference.holds_zero:
        return INSIDE
    higher, better = difference.value > 0, METRICS[name].better
    if not better:
        return "videos has more" if higher else "videos has less"
    return "videos is better" if higher == (better == "higher") else "against is better"


def figure(value: float | None) -> str:
    """Four digits, never in powers of ten."""
    if value is None:
        return NONE
    before = 0 if abs(value) < 1 else math.floor(math.log10(abs(value))) + 1
    return f"{value:.{max(0, DIGITS - before)}f}"


def interval(mean: Mean) -> str:
    return NONE if mean.low is None else f"{figure(mean.low)} to {figure(mean.high)}"


def notes(job: Job, found: Sequence[Found]) -> list[str]:
    """What a reader of the table has to know beside it."""
    lines = []
    if skipped := found[0].skipped:
        name, why = next(iter(skipped.items()))
        count = counted(len(job.models[0].clips), "clip")
        lines.append(f"skipped {len(skipped)} of {count}, the first is {name}: {why}")
    if job.unpaired:
        count = counted(len(job.unpaired), "clip")
        lines.append(f"left out {count} that only one has, the first is {job.unpaired[0]}")
    for need in dict.fromkeys(job.left_out.values()):
        names = ", ".join(name for name, lack in job.left_out.items() if lack == need)
        lines.append(f"not scored: {names}; needed: {need}")
    return lines


# ---------------------------------------------------------------------------------------------------
# A page


def write_page(job: Job, found: Sequence[Found], folder: Path) -> Path:
    """index.html and scores.json -> the page: the scores, and the first clips with theirs, moving."""
    scores = pages.Section("Scores", table(found, job.names), text="\n".join(notes(job, found)))
    clips = pages.Section(
        "The first clips",
        text="Above one of videos, below its partner in against." if len(found) == 2 else "",
        figures=[as_figure(job, found, number) for number in range(min(SHOWN, len(found[0].clips)))],
    )
    page, told = (folder / name for name in FILES)
    result = to_dict(job, found)
    whole.write_json(told, result, allow_nan=False)
    sections, settings = [scores, clips], result["settings"]
    whole.write_text(page, pages.render("Scores of videos", describe(found), sections, settings=settings))
    return page


def as_figure(job: Job, found: Sequence[Found], number: int) -> pages.Figure:
    pictures, told = [], ""
    for one, which in zip(found, ("videos", "against"), strict=False):
        clip, row = one.clips[number], one.rows[number]
        pictures.append((which, pages.animated([frames(clip, job.plan.frames)])))
        scored = (f"{name} {figure(row[name])}" for name in job.names if row.get(name) is not None)
        told += f"\n{which if len(found) == 2 else clip.name}: {', '.join(scored)}"
    clip = found[0].clips[number]
    return pages.Figure(tuple(pictures), name=clip.prompt or clip.name, told=told)


def describe(found: Sequence[Found]) -> str:
    count = counted(len(found[0].rows), "clip")
    if len(found) == 1:
        return f"{found[0].place}: {count}"
    return f"videos {found[0].place} against {found[1].place}: {count} with the same names"


# ---------------------------------------------------------------------------------------------------
# JSON


def to_dict(job: Job, found: Sequence[Found]) -> dict:
    """Everything, per clip and in all; what is not there is null."""
    plan = {k: v for k, v in dataclasses.asdict(job.plan).items() if v not in ("", (), 0)}
    out = {
        "settings": plan,
        "definitions": {name: definition(METRICS[name]) for name in job.names},
        **one_dict(found[0]),
    }
    if len(found) == 2:
        apart = differences(*found, job.names)
        out["against"] = one_dict(found[1])
        out["differences"] = {n: {**d._asdict(), "says": verdict(n, d)} for n, d in apart.items()}
        out["unpaired"] = list(job.unpaired)
    out["versions"] = records.versions()
    return out


def definition(metric: Metric) -> dict:
    return {"says": metric.says, "unit": metric.unit, "better": metric.better}


def one_dict(one: Found) -> dict:
    rows = [
        {"name": c.name, "file": str(c.file), "image": c.image, "prompt": c.prompt, "scores": row}
        for c, row in zip(one.clips, one.rows, strict=True)
    ]
    means = {name: mean._asdict() for name, mean in one.means.items()}
    return {"videos": one.place, "scores": means, "clips": rows, "skipped": one.skipped}


def listing() -> str:
    """Every metric by name, for --list."""
    lines = []
    for name, metric in METRICS.items():
        unit = f" [{metric.unit}]" if metric.unit else ""
        needs = f"; needs {', '.join(metric.needs)}" if metric.needs else ""
        one_for_all = "; one number for all clips" if name in SETS else ""
        better = f"{metric.better} is better" if metric.better else "describes, neither is better"
        lines.append(f"{name:18} {metric.says}{unit}; {better}{needs}{one_for_all}")
    return "\n".join(lines)
