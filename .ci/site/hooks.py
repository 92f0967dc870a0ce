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


def on_files(files, config):
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("(docs/", "(")
    reference = ["# Reference", ""]
    for title, names in API.items():
        reference += [f"## {title}", "", *(f"::: {name}" for name in names), ""]
    pages = {
        "index.md": readme,
        "models.md": (ROOT / "i2vgen/assets/README.md").read_text(encoding="utf-8"),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
        "api.md": "\n".join(reference),
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown, **_):
    """Links to files of the repository become their names: the site does not hold them."""
    markdown = markdown.replace("(../i2vgen/assets/README.md)", "(models.md)").replace(
        "(i2vgen/assets/README.md)", "(models.md)"
    )
    return re.sub(
        r"\[([^]]+)\]\((?:\.\./)?((?:i2vgen|examples|configs|tests|scripts)/[^)]*)\)", r"\1 (`\2`)", markdown
    )
