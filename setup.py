"""What i2vgen needs to run; `pip install -e '.[test]'` adds what its tests need."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
PACKAGE = (HERE / "i2vgen" / "__init__.py").read_text(encoding="utf-8")
VERSION = re.search(r'__version__ = "(.+?)"', PACKAGE)[1]

setup(
    name="i2vgen",
    version=VERSION,
    description="I2VGen-XL written to be changed: one picture and a sentence in, a video out",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["i2vgen*", "weights_conversion*"]),
    package_data={"i2vgen": ["assets/**/*", "files/page.html"]},
    install_requires=[
        "torch>=2.6",
        "einops>=0.8",
        "open_clip_torch>=3.0",
        "omegaconf>=2.4",
        "numpy>=1.24",
        "safetensors>=0.4.2",
        "pillow>=10.1",
        "tqdm",
        "av>=17.0",  # earlier ones give clips colours that are up to 23 levels off
        "jinja2",  # the HTML pages of reports
    ],
    extras_require={
        "eval": ["opencv-python-headless"],  # optical flow for scripts/score.py
        "lab": ["matplotlib"],  # the plots of scripts/ablate.py
        "train": ["tensorboard"],  # scripts/train.py writes its curves there too, where it is installed
        # diffusers is the live reference; from transformers 5.6 on its I2VGen-XL pipeline fails by default
        "test": [
            "pytest",
            "pytest-xdist",
            "ruff",
            "scikit-image",
            "opencv-python-headless",
            "matplotlib",
            "diffusers",
            "transformers<5.6",
            "tensorboard",
            "peft",
            "nbclient",  # the notebook, in a kernel as a reader would run it
            "ipykernel",
        ],
    },
)
