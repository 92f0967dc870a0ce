"""Compare our implementation with golden files of the official one, and print how closely they agree.

    i2vgen parity FILE... [dtype=float32] [device=cpu] [json=OUT.json] [--summary] [--failures]

    i2vgen parity tests/goldens/*.safetensors dtype=float64
    i2vgen parity tests/goldens/*.safetensors --summary

    dtype=      float32 (default), float64, float16 or bfloat16
    device=     cpu (default), cuda, cuda:1; auto uses cuda if available
    json=       file for the table
    --summary   print one Markdown line per kind of file
    --failures  print only rows that fail

The metadata of each file says what it holds. The exit status is 0 only if every row passes.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path

from tqdm import tqdm

from i2vgen import cli
from i2vgen.fast import runtime
from i2vgen.files import whole
from i2vgen.files.tables import Table
from i2vgen.parity import kinds
from i2vgen.parity.report import Golden, Row, Settings
from i2vgen.settings import config
from i2vgen.settings.wording import counted


def main(argv: list[str]) -> int:
    arguments = parse(argv)
    out = cli.check_file("--json", arguments.json, arguments.files) if arguments.json else None
    where = runtime.device(config.Runtime(device=arguments.device))
    runtime.apply(config.Runtime())  # TF32 off: its error would hide everything below 1e-3
    settings = Settings(dtype=runtime.DTYPES[arguments.dtype], device=str(where))
    tables: dict[str, list[Row]] = {}
    unread: list[str] = []  # a file that cannot be read must not hide the results of the others
    for file in tqdm(arguments.files, unit="file", disable=None, leave=False):
        try:
            tables[file] = kinds.run(file, settings)
        except ValueError as error:
            unread.append(str(error))

    if arguments.summary:
        print_summary(tables)
    else:
        for file, rows in tables.items():
            print_table(file, rows, failures_only=arguments.failures)
    rows = [row for table in tables.values() for row in table]
    failed = sum(not row.passed for row in rows)
    if out is not None:
        write_json(out, arguments.dtype, str(where), tables, unread)
    counts = f"{counted(len(rows), 'row')} in {counted(len(tables), 'file')}"
    print(f"\n{counts}, {arguments.dtype} on {where}: {failed} failed")
    if unread:
        raise ValueError("; ".join(unread))
    return 1 if failed or not rows else 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser("parity")
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--dtype", choices=list(runtime.DTYPES), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", metavar="OUT")
    parser.add_argument("--summary", action="store_true")
    parser.add_argument("--failures", action="store_true")
    return parser.read(argv)


def print_table(file: str, rows: list[Row], *, failures_only: bool) -> None:
    passed = sum(row.passed for row in rows)
    print(f"\n{file}: {passed} of {len(rows)} pass")
    width = max((len(row.name) for row in rows), default=0)
    for row in rows:
        if not (failures_only and row.passed):
            verdict = "pass" if row.passed else "FAIL"
            figures = f"l2 {row.relative_l2:8.1e}  max {row.max_abs:8.1e}"
            print(f"  {verdict}  {row.name:{width}}  {figures}  {row.bound}")


def print_summary(tables: dict[str, list[Row]]) -> None:
    """One line per kind of golden file: number of rows, and the worst of the figures that have a bound."""
    kinds_found: dict[str, list[Row]] = {}
    for file, rows in tables.items():
        kinds_found.setdefault(Golden(file).kind, []).extend(rows)
    lines = []
    for kind, rows in kinds_found.items():
        l2 = max((row.relative_l2 for row in rows if "relative L2" in row.bound), default=None)
        worst = max((row.max_abs for row in rows if "max abs" in row.bound), default=None)
        figures = ("exact" if figure is None else f"{figure:.1e}" for figure in (l2, worst))
        lines.append((f"`{kind}`", str(len(rows)), str(sum(row.passed for row in rows)), *figures))
    header = ("kind", "rows", "pass", "largest relative L2", "largest max abs")
    print(Table("", header, tuple(lines)).markdown())


def write_json(path: Path, dtype: str, device: str, tables: dict[str, list[Row]], unread: list[str]) -> None:
    def plain(row: Row) -> dict:
        # JSON knows no infinity
        return {k: (str(v) if isinstance(v, float) and not math.isfinite(v) else v)
                for k, v in dataclasses.asdict(row).items()}  # fmt: skip

    rows = [row for table in tables.values() for row in table]
    report = {
        "dtype": dtype,
        "device": device,
        "passed": bool(rows) and not unread and all(row.passed for row in rows),
        "rows": sum(map(len, tables.values())),
        "failed": sum(not row.passed for row in rows),
        "unread": unread,
        "files": {file: [plain(row) for row in table] for file, table in tables.items()},
    }
    whole.write_json(path, report)
