"""Pages of the site that are not in docs/: the README, the models, the changelog, the reference."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
# Public names, room by room; the text comes from their docstrings.
API = {
    "Sampling": ["i2vgen.load", "i2vgen.pipeline.I2VGenXL", "i2vgen.files.clip.Video", "i2vgen.compat"],
    "Settings": ["i2vgen.settings.merge.load_config", "i2vgen.settings.config"],
    "The networks": [
        "i2vgen.model.unet", "i2vgen.model.conditioning", "i2vgen.model.spatial", "i2vgen.model.temporal",
        "i2vgen.model.attention", "i2vgen.model.vae", "i2vgen.model.clip",
    ],
    "Diffusion": [
        "i2vgen.diffusion.schedule", "i2vgen.diffusion.sampler", "i2vgen.diffusion.solvers",
        "i2vgen.diffusion.loss",
    ],
    "Changing a model": ["i2vgen.adapt.taps", "i2vgen.adapt.extra_tokens", "i2vgen.adapt.lora"],
    "Training": ["i2vgen.training.settings", "i2vgen.training.loop", "i2vgen.training.diffusion"],
    "Weights": ["i2vgen.files.checkpoint", "weights_conversion.convert", "weights_conversion.export"],
}  # fmt: skip


# Pages that lie elsewhere in the repository -> their names in the site.
PAGES = {
    "README.md": "index.md",
    "i2vgen/assets/README.md": "models.md",
    "i2vgen/assets/small/README.md": "small.md",
    "i2vgen/assets/small_refiner/README.md": "small_refiner.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
LINK = re.compile(r"(!?)\[([^]]*)\]\(([^)#\s]+)(#[^)]*)?\)")


def on_files(files, config):
    reference = ["# Reference", ""]
    for title, names in API.items():
        reference += [f"## {title}", "", *(f"::: {name}" for name in names), ""]
    pages = {name: (ROOT / source).read_text(encoding="utf-8") for source, name in PAGES.items()}
    for name, text in {**pages, "api.md": "\n".join(reference)}.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown, page, **_):
    """Links of the repository become links of the site; one to a file that it does not hold, the name."""
    sources = {name: source for source, name in PAGES.items()}
    here = (ROOT / sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")).parent

    def moved(link):
        picture, text, target, anchor = link.groups(default="")
        if "://" in target:
            return link[0]
        if not (here / target).exists():  # code that looks like a link; the tests find dead ones
            return link[0]
        place = (here / target).resolve().relative_to(ROOT).as_posix()
        if found := PAGES.get(place):
            place = found
        elif place.startswith("docs/"):
            place = place.removeprefix("docs/")
        else:
            return text if text.strip("`") == place else f"{text} (`{place}`)"
        return f"{picture}[{text}]({place}{anchor})"

    return LINK.sub(moved, markdown)
