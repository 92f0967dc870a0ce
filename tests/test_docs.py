"""Links of every page, and the model cards: what a reader clicks is there, what a card says is true."""

import json
import math
import re
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open

from i2vgen.evaluation import scores
from i2vgen.files import eight_bits

ROOT = Path(__file__).parents[1]
CARDS = sorted((ROOT / "i2vgen/assets").glob("*/README.md"))
PAGES = [*ROOT.glob("*.md"), ROOT / "i2vgen/assets/README.md", *(ROOT / "docs").glob("*.md"), *CARDS]


def anchors(text):
    """The names under which GitHub finds the headings of a page."""
    heads = re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def dead(page, text):
    """Links of a page to a file or heading that is not there; only https leads out."""
    for target in re.findall(r"\]\(([^)\s]+)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            yield target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert list(dead(page, page.read_text(encoding="utf-8"))) == []


def test_dead_links_are_seen():
    text = "[a](docs/none.md) [b](docs/weights.md#none) [c](#none) ![d](docs/images/none.png) [e](LICENSE)"
    wrong = ["docs/none.md", "docs/weights.md#none", "#none", "docs/images/none.png"]
    assert list(dead(ROOT / "README.md", text)) == wrong


def test_pictures_are_small_and_shown():
    shown = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for file in (ROOT / "docs/images").iterdir():
        most = 450_000 if file.suffix == ".gif" else 200_000
        assert file.stat().st_size < most and f"images/{file.name}" in shown, file.name


# --- model cards


def front_matter(card):
    return yaml.safe_load(card.read_text(encoding="utf-8").split("---\n")[1])


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.parent.name)
def test_a_card_is_what_the_hub_reads(card):
    told = front_matter(card)
    assert told["license"] == "apache-2.0" and told["library_name"] == "i2vgen"
    assert told["pipeline_tag"] in ("image-to-video", "video-to-video")
    hub = pytest.importorskip("huggingface_hub")
    read = hub.ModelCard.load(card)
    assert read.data.license == "apache-2.0" and len(read.data.eval_results or []) == len(metrics(card))


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.parent.name)
def test_a_card_counts_the_parameters_and_bytes_that_are_there(card):
    text, size = card.read_text(encoding="utf-8"), 0
    for file in card.parent.glob("*.safetensors"):
        size += file.stat().st_size
        with safe_open(file, "pt") as held:
            names = set(held.keys())
            names -= {name + eight_bits.SCALE for name in names}
            count = sum(math.prod(held.get_slice(name).get_shape()) for name in names)
        borrowed = file.stem == "clip" and "the small model's CLIP" in text
        assert borrowed or f"{count:,}" in text
    assert f"{size / 1e6:.1f} MB" in text


def metrics(card):
    return [
        one for model in front_matter(card).get("model-index", []) for one in model["results"][0]["metrics"]
    ]


def test_the_scores_of_the_card_are_those_of_the_docs():
    card = ROOT / "i2vgen/assets/small/README.md"
    text, docs = card.read_text(encoding="utf-8"), (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|.*\| *(\d.*?) \|$", text, re.M)
    assert len(rows) == 7
    for row, metric in zip(rows, metrics(card), strict=True):
        assert f"| {row} |" in docs
        assert row.split()[0] == str(metric["value"]) and metric["type"] in scores.SCORES
    words = json.loads((card.parent / "settings.json").read_text(encoding="utf-8"))["settings"]["clip"][
        "words"
    ]
    assert f"{len(words)} words in all" in text
    quoted = " ".join(re.findall(r"^> (.*)", text, re.M))
    assert re.findall(r"[a-z]+", quoted) == words


def test_the_scores_of_the_shipped_models_card_are_those_of_the_docs():
    card = ROOT / "i2vgen/assets/pictures/README.md"
    text, docs = card.read_text(encoding="utf-8"), (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.*?) \| (\d.*?) \|$", text, re.M)
    assert len(rows) == 8
    for (name, value), metric in zip(rows, metrics(card), strict=True):
        assert f"| {name} | {value} | " in docs
        assert value.split()[0] == str(metric["value"])
        assert metric["type"] in (*scores.SCORES, *scores.SHAPES)
    stored = json.loads((card.parent / "settings.json").read_text(encoding="utf-8"))["settings"]
    assert f"{len(stored['clip']['words']):,} words" in text
    sample = stored["sample"]
    assert f"{sample['frames']} frames of {sample['width']} x {sample['height']} pixels" in text
