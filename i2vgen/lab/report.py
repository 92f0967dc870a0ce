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
from i2vgen.files.tables import NONE, Table
from i2vgen.lab import study as studies
from i2vgen.lab.measure import CLIPS, RESULT, made_by
from i2vgen.lab.study import Budget, Run, Study
from i2vgen.scoring import stats
from i2vgen.scoring.scores import METRICS, SETS
from i2vgen.settings.wording import counted
from i2vgen.training.settings import WORLD

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


def label(study: Study, score: str) -> str:
    return METRICS[score].says if study.evaluate else LABELS[score]


def shown(study: Study, score: str, value: float | None) -> str:
    """A score with its unit: those of the drawn world are shares and PSNRs."""
    if not study.evaluate:
        return figure(score, value)
    if value is None:
        return NONE
    unit = METRICS[score].unit
    places = 2 if unit else 3
    value = round(value, places) + 0.0  # no -0.00
    return f"{value:.{places}f} {unit}" if unit else f"{value:.{places}f}"


def cells(study: Study, results: dict[Run, dict], measure: str) -> dict[str, dict[str, Cell]]:
    """variant -> score -> cell"""
    table = {}
    for variant in study.variants:
        mine = of_variant(results, variant, measure)
        if mine:
            table[variant] = {score: cell(mine, score) for score in study.scores}
    return table


def of_variant(results: dict[Run, dict], variant: str, measure: str) -> list[dict]:
    return [r for run, r in results.items() if (run.variant, run.measure) == (variant, measure)]


def differences(study: Study, results: dict[Run, dict], measure: str) -> dict[str, dict[str, stats.Mean]]:
    """variant -> score -> mean difference from the base over clips, each averaged over seeds first."""

    def per_clip(variant: str, score: str) -> list[float | None]:
        runs = [[clip[score] for clip in r["clips"]] for r in of_variant(results, variant, measure)]
        return [
            None if None in values else math.fsum(values) / len(values) for values in zip(*runs, strict=True)
        ]

    return {
        variant: {
            score: stats.paired(per_clip(variant, score), per_clip(study.base, score))
            for score in study.scores
            if score not in SETS
        }
        for variant in study.variants
        if variant != study.base and of_variant(results, variant, measure)
    }


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
            (variant, *(as_text(study, score, c, table[study.base][score]) for score, c in line.items()))
            for variant, line in table.items()
        ]
        head = ("variant", *(label(study, score) for score in study.scores))
        if made := calls(results, measure):
            head = (head[0], CALLS, *head[1:])
            rows = [(name, str(made[name]), *rest) for name, *rest in rows]
        found.append((Table(title, head, tuple(rows)), verdict(study, table)))
        if study.evaluate and len(table) > 1:
            found.append((paired_table(study, results, measure), PAIRED))
    return found


PAIRED = (
    "Every variant made the same clips, so these intervals (95 % over clips) leave out how much clips differ "
    "from each other. An interval without zero is marked *."
)


def paired_table(study: Study, results: dict[Run, dict], measure: str) -> Table:
    rows = [
        (variant, *(as_difference(study, score, mean) for score, mean in line.items()))
        for variant, line in differences(study, results, measure).items()
    ]
    head = ("variant", *(label(study, score) for score in study.scores if score not in SETS))
    return Table(f"Difference from {study.base!r}, clip by clip ({measure})", head, tuple(rows))


def as_difference(study: Study, score: str, mean: stats.Mean) -> str:
    if mean.value is None:
        return NONE
    signed = [
        f"{'+' if v > 0 else ''}{shown(study, score, v)}"
        for v in (mean.value, mean.low, mean.high)
        if v is not None
    ]
    span = f" ({signed[1]} to {signed[2]})" if len(signed) == 3 else ""
    return f"{signed[0]}{span}{'' if mean.holds_zero else ' *'}"


def as_text(study: Study, score: str, c: Cell, base: Cell) -> str:
    if c.value is None:
        return NONE
    span = "" if c.low is None else f" ({shown(study, score, c.low)} to {shown(study, score, c.high)})"
    return f"{shown(study, score, c.value)}{span}{' *' if c.apart_from(base) else ''}"


def verdict(study: Study, table: dict[str, dict[str, Cell]]) -> str:
    base = table[study.base]
    apart = [
        f"{variant} in {label(study, score)}"
        for variant, line in table.items()
        for score, c in line.items()
        if c.apart_from(base[score])
    ]
    over = {c.over for line in table.values() for c in line.values() if c.low is not None}
    if not over:
        return "No intervals: there are too few clips. Nothing can be said about differences."
    intervals = f"Intervals: 95 % over {' and '.join(sorted(over))}. "
    if len(table) == 1:
        return intervals
    if not apart:
        return (
            intervals
            + "Every difference from the base lies inside the error bars: this run shows no difference."
        )
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
    tables += [(variants_table(study), ""), (setup_table(study, studies.BUDGETS[budget], results), "")]
    about = (
        f"Study `{study.name}`, budget {budget}. The variants are compared with {study.base!r}, on the "
        f"weights {study.weights}. {scored_on(study)}"
    )
    if budget == "smoke":
        about += " It shows that the study runs; no figure here means anything."
    about += f" {note}" if note else ""
    text = [f"# {study.question}\n\n{about}\n"]
    text += [f"## {table.title}\n\n{table.markdown()}\n\n{said}\n" for table, said in tables]
    table, figures, index = (folder / name for name in FILES)
    whole.write_text(table, "\n".join(text))
    write_csv(study, results, costs, figures)
    pictures = plots(study, results, folder)
    whole.write_text(index, page(study, about, tables, pictures, runs))
    return index


def scored_on(study: Study) -> str:
    if study.evaluate:
        return f"Scored on held-out clips of {study.evaluate['videos']}."
    return "Scored on clips of the drawn world."


def variants_table(study: Study) -> Table:
    rows = [(name, " ".join(words) or "as the base") for name, words in study.variants.items()]
    return Table("Settings of the variants", ("variant", "settings that differ"), tuple(rows), words=(0, 1))


LEAST_SPAN = 0.02  # of the values: the least width of a score's axis
STARTS = {"scratch": "a new UNet", "weights": "from the weights of the base"}


def setup_table(study: Study, budget: Budget, results: dict[Run, dict]) -> Table:
    """What another laboratory needs to repeat the study."""
    rows = [
        ("weights of the base", study.weights),
        ("settings of all variants", " ".join(study.settings) or NONE),
    ]
    if "trained" in study.measures:
        train = studies.trained(study, study.base, budget, 0)[1]
        data = train.data if train.data != WORLD else train.things or "the drawn world"
        rows += [
            ("training data", data),
            (
                "training",
                f"{STARTS[study.start]}, {counted(train.steps, 'step')} of {counted(train.batch, 'clip')}, "
                f"rate {train.learning_rate:g}",
            ),
            ("seeds", ", ".join(map(str, range(budget.seeds)))),
        ]
    made = [r["made_by"] for r in results.values() if "made_by" in r]
    if study.only_counted:
        made = [made_by("cpu")]  # where costs are counted
    else:
        clips = f"{budget.clips} at most" if study.evaluate else f"{budget.clips} of each kind"
        rows.append(("clips scored", clips))
    for name in ("device", "torch", "i2vgen", "code"):
        rows.append((name, ", ".join(sorted({one[name] for one in made})) or NONE))
    return Table("Setup", ("what", "value"), tuple(rows), words=(0, 1))


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


def plots(study: Study, results: dict[Run, dict], folder: Path) -> list[Path]:
    """Every score of every variant with its interval, and the losses; names stand beside what they name."""
    if study.only_counted:
        return []
    from matplotlib.figure import Figure  # without a display and without global state

    made = []
    colours = {name: f"C{i}" for i, name in enumerate(study.variants)}
    for measure in study.measures:
        table = {} if measure == "cost" else cells(study, results, measure)
        if not table:
            continue
        rows = len(study.scores)
        picture = Figure(figsize=(6.4, rows * (0.7 + 0.25 * len(table))), layout="constrained")
        for axes, score in zip(picture.subplots(rows, 1, squeeze=False)[:, 0], study.scores, strict=True):
            for place, (variant, line) in enumerate(table.items()):
                c = line[score]
                if c.value is not None:
                    reach = None if c.low is None else [[c.value - c.low], [c.high - c.value]]
                    axes.errorbar(c.value, place, xerr=reach, fmt="o", color=colours[variant], capsize=3)
            axes.set(ylim=(len(table) - 0.5, -0.5))
            axes.set_yticks(range(len(table)), list(table), fontsize=8)
            axes.set_title(f"{label(study, score)} ({measure})", fontsize=9, loc="left")
            axes.tick_params(axis="x", labelsize=8)
            axes.ticklabel_format(axis="x", useOffset=False)
            low, high = axes.get_xlim()
            if high - low < (least := LEAST_SPAN * max(abs(low), abs(high))):  # else rounding fills the width
                axes.set_xlim((low + high - least) / 2, (low + high + least) / 2)
            axes.grid(axis="x", alpha=0.3)
        made.append(_save(picture, folder / f"scores_{measure}.png"))
    curves = {run: r["loss"] for run, r in results.items() if r["loss"]}
    if curves:
        picture = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = picture.subplots()
        for run, curve in curves.items():
            dot = "o" if len(curve) == 1 else None
            axes.plot(*zip(*curve, strict=True), color=colours[run.variant], linewidth=1, marker=dot)
            if run.seed == 0:
                axes.annotate(
                    f" {run.variant}", curve[-1], color=colours[run.variant], fontsize=8, va="center"
                )
        axes.set(xlabel="step", ylabel="training loss", yscale="log")
        for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis("{x:g}")  # not in powers of ten
        axes.tick_params(which="both", labelsize=8)
        axes.margins(x=0.15)
        made.append(_save(picture, folder / "loss.png"))
    return made


def _save(picture, path: Path) -> Path:
    with whole.replacing(path) as temporary:
        picture.savefig(temporary, dpi=120, format="png")
    return path


def page(study: Study, about: str, tables, pictures: Sequence[Path], runs: Sequence[Run]) -> str:
    figures = [pages.Figure(((p.stem, p.read_bytes()),), plot=True) for p in pictures]
    sections = [pages.of_table(table, said) for table, said in tables]
    clips = pages.Section(
        "The same clips by every variant",
        text="Left the true clip, right what the variant made of its first frame and the caption.",
        figures=as_figures(runs),
    )
    return pages.render(study.question, about, [pages.Section(figures=figures), *sections, clips])


def as_figures(runs: Sequence[Run]) -> list[pages.Figure]:
    """Clip by clip, one below the other for all variants."""
    found: dict[tuple[int, str], list[pages.Figure]] = {}
    for run in runs:
        if run.seed == 0:
            told = json.loads((run.folder / CLIPS).read_text(encoding="utf-8"))
            for number, clip in enumerate(told):
                picture = (f"{run.variant}: {clip['caption']}", (run.folder / clip["file"]).read_bytes())
                said = f"\n{run.variant}, {run.measure}"
                figure = pages.Figure((picture,), name=clip["caption"], told=said)
                found.setdefault((number, clip["caption"]), []).append(figure)
    return [figure for _, figures in sorted(found.items()) for figure in figures]
