"""A study's results as a Markdown table, a CSV, plots, and one page that needs no other file."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from i2vgen.evaluation.pages import LABELS, figure
from i2vgen.files import pages, whole
from i2vgen.files.tables import Table
from i2vgen.lab.measure import RESULT, STRIP
from i2vgen.lab.study import Run, Study
from i2vgen.scoring import stats

CALLS = "UNet calls a clip"  # a pair of guidance counts two
FILES = ("table.md", "results.csv", "index.html")
SEEDS_NEEDED = 3  # fewer say nothing about their spread: then the interval is that of the clips


@dataclass(frozen=True)
class Cell:
    """One score of one variant: the mean over seeds with its 95 % interval."""

    value: float | None
    low: float | None = None
    high: float | None = None
    over: str = "clips"  # what the interval is over

    def apart_from(self, other: Cell) -> bool:
        """Whether the intervals do not touch; an unknown one touches everything."""
        if None in (self.low, self.high, other.low, other.high):
            return False
        return self.low > other.high or self.high < other.low


def cell(results: Sequence[dict], score: str) -> Cell:
    values = [r["scores"][score] for r in results if r["scores"].get(score) is not None]
    if not values:
        return Cell(None)
    found = stats.mean(values)
    mean = found.value
    if len(values) >= SEEDS_NEEDED:
        return Cell(mean, found.low, found.high, "seeds")
    spans = [r["intervals"][score] for r in results if r["intervals"].get(score) is not None]
    if len(spans) < len(values):
        return Cell(mean)
    # Independent runs: the reach of their mean. Wilson's intervals are lopsided, so each side by itself.
    low, high = (
        math.sqrt(sum((v - span[side]) ** 2 for v, span in zip(values, spans, strict=True))) / len(values)
        for side in (0, 1)
    )
    return Cell(mean, mean - low, mean + high)


def cells(study: Study, results: dict[Run, dict], measure: str) -> dict[str, dict[str, Cell]]:
    """variant -> score -> cell"""
    table = {}
    for variant in study.variants:
        mine = [r for run, r in results.items() if (run.variant, run.measure) == (variant, measure)]
        table[variant] = {score: cell(mine, score) for score in study.scores}
    return table


def calls(results: dict[Run, dict], measure: str) -> dict[str, int]:
    """variant -> UNet calls per clip, if a study's variants differ in them"""
    made = {run.variant: r.get("calls") for run, r in results.items() if run.measure == measure}
    return made if len(set(made.values())) > 1 else {}


def read_results(runs: Sequence[Run]) -> dict[Run, dict]:
    return {run: json.loads((run.folder / RESULT).read_text(encoding="utf-8")) for run in runs}


# ---------------------------------------------------------------------------------------------------
# Tables


def score_tables(study: Study, results: dict[Run, dict]) -> list[tuple[Table, str]]:
    """For each measure a table and what it shows; a star marks what lies apart from the base."""
    titles = {
        "untrained": "The base's weights under each variant's settings",
        "trained": "Each variant trained",
    }
    found = []
    for measure, title in titles.items():
        if measure not in study.measures:
            continue
        table = cells(study, results, measure)
        rows = [
            (variant, *(as_text(score, c, table[study.base][score]) for score, c in line.items()))
            for variant, line in table.items()
        ]
        head = ("variant", *(LABELS[score] for score in study.scores))
        if made := calls(results, measure):
            head = (head[0], CALLS, *head[1:])
            rows = [(name, str(made[name]), *rest) for name, *rest in rows]
        found.append((Table(title, head, tuple(rows)), verdict(study, table)))
    return found


def as_text(score: str, c: Cell, base: Cell) -> str:
    if c.value is None:
        return "-"
    span = "" if c.low is None else f" ({figure(score, c.low)} to {figure(score, c.high)})"
    return f"{figure(score, c.value)}{span}{' *' if c.apart_from(base) else ''}"


def verdict(study: Study, table: dict[str, dict[str, Cell]]) -> str:
    base = table[study.base]
    apart = [
        f"{variant} in {LABELS[score]}"
        for variant, line in table.items()
        for score, c in line.items()
        if c.apart_from(base[score])
    ]
    over = {c.over for line in table.values() for c in line.values() if c.low is not None}
    intervals = f"Intervals: 95 % over {' and '.join(sorted(over)) or 'nothing (too few clips)'}. "
    if not apart:
        return intervals + "Every difference from the base lies inside the error bars: this run shows none."
    return (
        intervals + f"Outside the error bars (*): {'; '.join(apart)}. All other differences lie inside them."
    )


def cost_table(study: Study, costs: dict[str, dict]) -> Table:
    rows = [
        (
            name,
            f"{c['parameters']:,}",
            f"{c['flops'] / 1e9:,.2f}",
            f"{c['activation_peak'] / 2**20:,.1f}",
            f"{1000 * c['seconds']:,.0f}",
            f"{c['time_ratio']:.2f}",
        )
        for name, c in costs.items()
    ]
    head = ("variant", "UNet parameters", "GFLOP a call", "activations, MiB", "ms a call", "time, base = 1")
    return Table("What a variant costs (one clip, one branch, float32; one CPU thread)", head, tuple(rows))


# ---------------------------------------------------------------------------------------------------
# Files


def write(
    study: Study,
    runs: Sequence[Run],
    costs: dict[str, dict] | None,
    folder: Path,
    budget: str,
    note: str = "",
) -> Path:
    """table.md, results.csv, plots and index.html -> the page. `note` follows the first lines."""
    results = read_results(runs)
    tables = [(cost_table(study, costs), "")] if costs else []
    tables += score_tables(study, results)
    about = f"Study {study.name}, budget {budget}, base {study.base!r} of {study.weights}."
    if budget == "smoke":
        about += " It shows that the study runs; no figure here means anything."
    about += f" {note}" if note else ""
    text = [f"# {study.question}\n\n{about}\n"]
    text += [f"## {table.title}\n\n{table.markdown()}\n\n{said}\n" for table, said in tables]
    table, figures, index = (folder / name for name in FILES)
    whole.write_text(table, "\n".join(text))
    write_csv(study, results, costs, figures)
    pictures = plots(study, results, costs, folder)
    whole.write_text(index, page(study, about, tables, pictures, runs))
    return index


def write_csv(study: Study, results: dict[Run, dict], costs: dict | None, path: Path) -> None:
    file = io.StringIO()
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(("variant", "measure", "name", "value", "low", "high", "interval_over"))
    for name, figures in (costs or {}).items():
        for key in ("parameters", "flops", "activation_peak", "seconds", "time_ratio"):
            rows.writerow((name, "cost", key, figures[key], "", "", ""))
    for measure in study.measures:
        if measure != "cost":
            for variant, count in calls(results, measure).items():
                rows.writerow((variant, measure, "calls", count, "", "", ""))
            for variant, line in cells(study, results, measure).items():
                for score, c in line.items():
                    rows.writerow((variant, measure, score, c.value, c.low, c.high, c.over))
    whole.write_text(path, file.getvalue())


def plots(study: Study, results: dict[Run, dict], costs: dict | None, folder: Path) -> list[Path]:
    """Loss curves, and each score against the cost of a call."""
    from matplotlib.figure import Figure  # without a display and without global state

    made = []
    curves = {run: r["loss"] for run, r in results.items() if r["loss"]}
    if curves:
        picture = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = picture.subplots()
        colours = {name: f"C{i}" for i, name in enumerate(study.variants)}
        for run, curve in curves.items():
            label = run.variant if run.seed == 0 else None
            axes.plot(*zip(*curve, strict=True), color=colours[run.variant], label=label, linewidth=1)
        axes.set(xlabel="step", ylabel="loss", yscale="log")
        axes.legend(fontsize=8)
        made.append(_save(picture, folder / "loss.png"))
    measure = "trained" if "trained" in study.measures else "untrained"
    spent, axis = calls(results, measure), CALLS
    if costs and not spent:
        spent, axis = {name: c["flops"] / 1e9 for name, c in costs.items()}, "GFLOP a call"
    if spent and measure in study.measures:
        picture = Figure(figsize=(3.2 * len(study.scores), 3.4), layout="constrained")
        table = cells(study, results, measure)
        for axes, score in zip(
            picture.subplots(1, len(study.scores), squeeze=False)[0], study.scores, strict=True
        ):
            for i, variant in enumerate(study.variants):
                c = table[variant][score]
                if c.value is not None:
                    reach = None if c.low is None else [[c.value - c.low], [c.high - c.value]]
                    x = spent[variant]
                    axes.errorbar(x, c.value, yerr=reach, fmt="o", color=f"C{i}", label=variant, capsize=3)
            axes.set(xlabel=axis, title=LABELS[score])
        picture.axes[0].legend(fontsize=7)
        made.append(_save(picture, folder / "score_against_cost.png"))
    return made


def _save(picture, path: Path) -> Path:
    with whole.replacing(path) as temporary:
        picture.savefig(temporary, dpi=120, format="png")
    return path


def page(study: Study, about: str, tables, pictures: Sequence[Path], runs: Sequence[Run]) -> str:
    figures = [pages.Figure(((p.stem, p.read_bytes()),)) for p in pictures]
    figures += [
        pages.Figure(
            (("clips", (run.folder / STRIP).read_bytes()),), name=run.variant, told=f", {run.measure}"
        )
        for run in runs
        if run.seed == 0
    ]
    sections = [pages.of_table(table, said) for table, said in tables]
    return pages.render(study.question, about, [*sections, pages.Section(figures=figures)])
