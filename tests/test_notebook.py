"""The notebook, run from top to bottom in a kernel of its own: it shows what it showed when it was stored.

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


@pytest.fixture(scope="module")
def stored():
    return nbformat.read(FILE, as_version=4)


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
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    fresh = nbformat.read(FILE, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(fresh, timeout=600, startup_timeout=300, resources=resources).execute()
    assert shown(fresh) == shown(stored)
    assert list(tmp_path.iterdir()) == []  # it leaves nothing behind where it is opened


def test_it_is_small_whole_and_of_no_machine(stored):
    text = FILE.read_text()
    assert len(text) < 300_000
    assert str(ROOT) not in text and "/home/" not in text and "site-packages" not in text
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert {kind for _, kinds in shown(stored) for kind in kinds} == {"image/png", "image/gif"}
    assert all(len(cell.source.splitlines()) <= 30 for cell in code)  # a lesson, not a program


def test_it_is_in_the_docs():
    for page in ("README.md", "docs/laboratory.md"):
        assert "examples/architecture.ipynb" in (ROOT / page).read_text()
