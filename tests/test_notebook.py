"""The notebooks, run from top to bottom in a kernel of their own; the lesson shows what it once did.

After a change: `jupyter execute --inplace examples/architecture.ipynb` (of nbclient), and look at it.
"""

import os
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parents[1]
FILE = ROOT / "examples" / "architecture.ipynb"
TOUR = ROOT / "examples" / "tour.ipynb"


@pytest.fixture(scope="module")
def stored():
    return nbformat.read(FILE, as_version=4)


def run(file, folder, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    fresh = nbformat.read(file, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(fresh, timeout=600, startup_timeout=300, resources=resources).execute()
    assert list(folder.iterdir()) == []  # it leaves nothing behind where it is opened
    return fresh


def shown(notebook):
    """What each code cell prints, but for digits that rounding may change, and its kinds of pictures."""
    found = []
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        printed = "".join(o.text for o in outputs if o.output_type == "stream")
        kinds = {
            kind for o in outputs if o.output_type != "stream" for kind in o.get("data", {o.output_type})
        }
        found.append((re.sub(r"\d+\.\d+", "#", printed), kinds - {"text/plain"}))
    return found


def test_it_runs_and_shows_what_is_stored(stored, tmp_path, monkeypatch):
    assert shown(run(FILE, tmp_path, monkeypatch)) == shown(stored)


@pytest.mark.slow
def test_the_tour_runs(tmp_path, monkeypatch):
    """What it prints depends on rounding; that it prints, shows and trains does not."""
    fresh, stored = run(TOUR, tmp_path, monkeypatch), nbformat.read(TOUR, as_version=4)
    for (now, kinds), (before, then) in zip(shown(fresh), shown(stored), strict=True):
        assert kinds == then and len(now.splitlines()) == len(before.splitlines())


@pytest.mark.parametrize("file", [FILE, TOUR], ids=lambda file: file.name)
def test_it_is_small_whole_and_of_no_machine(file):
    text, stored = file.read_text(), nbformat.read(file, as_version=4)
    assert len(text) < 300_000
    assert str(ROOT) not in text and "/home/" not in text and "site-packages" not in text
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = {kind for _, kinds in shown(stored) for kind in kinds}
    assert kinds == {"image/png", "image/gif" if file == FILE else "text/html"}
    assert all(len(cell.source.splitlines()) <= 30 for cell in code)  # a lesson, not a program


def test_they_are_in_the_docs():
    for page in ("README.md", "docs/laboratory.md"):
        for file in (FILE, TOUR):
            assert f"examples/{file.name}" in (ROOT / page).read_text()
