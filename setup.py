"""What i2vgen needs to run; `pip install -e '.[test]'` adds what its tests need."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
PACKAGE = (HERE / "i2vgen" / "__init__.py").read_text(encoding="utf-8")
VERSION = re.search(r'__version__ = "(.+?)"', PACKAGE)[1]


class Build(build_py):
    """A wheel holds configs/ and examples/ in the package; i2vgen/settings/shipped.py finds both places."""

    def run(self):
        super().run()
        if not self.editable_mode:
            for name in ("configs", "examples"):
                left_out = shutil.ignore_patterns("__pycache__", ".*")
                target = Path(self.build_lib, "i2vgen", name)
                shutil.rmtree(target, ignore_errors=True)  # of an earlier build
                shutil.copytree(HERE / name, target, ignore=left_out)


setup(
    name="i2vgen",
    version=VERSION,
    description="I2VGen-XL written to be changed: one picture and a sentence in, a video out",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="i2vgen contributors",
    license="Apache-2.0",
    keywords="image-to-video, text-to-video, diffusion, I2VGen-XL, PyTorch, research",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Multimedia :: Video",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["i2vgen*", "weights_conversion*"]),
    package_data={"i2vgen": ["assets/**/*", "files/page.html", "py.typed"]},
    cmdclass={"build_py": Build},
    entry_points={"console_scripts": ["i2vgen = i2vgen.__main__:main"]},
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
        "app": ["gradio>=6.0"],  # `i2vgen app`
        "eval": ["opencv-python-headless"],  # optical flow for `i2vgen score`
        "lab": ["matplotlib"],  # the plots of `i2vgen ablate`
        "train": ["tensorboard"],  # `i2vgen train` writes its curves there too, where it is installed
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
