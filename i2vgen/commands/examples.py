"""Copy the example pictures, the example scripts and the configurations to a folder of yours.

    i2vgen examples DIR         DIR is new or empty
    i2vgen examples             list what there is

Configurations can be used without a copy: `i2vgen train configs/train/tiny_vae.yaml` finds the shipped file
in every folder that has none of this name.
"""

from __future__ import annotations

import ast
import os
import shlex
import shutil
from pathlib import Path

from i2vgen import cli
from i2vgen.files import whole
from i2vgen.settings import shipped

ELSEWHERE = "../i2vgen/assets/"  # where the lists of a clone find the pictures that are copied beside them
LEFT_OUT = shutil.ignore_patterns("__pycache__", ".*")


def main(argv: list[str]) -> int:
    if not argv:
        print(f"{__doc__.strip()}\n\n{listing()}")
        return 0
    if len(argv) > 1 or argv[0].startswith("-") or cli.is_setting(argv[0]):
        raise ValueError(f"{' '.join(argv)}: give one folder and nothing else, i2vgen examples DIR")
    folder = check(Path(os.path.expanduser(argv[0])))
    with whole.replacing_folder(folder) as temporary:
        copy(temporary)
    picture = cli.shown(shlex.quote(f"image={folder / shipped.PICTURE.name}"))
    print(f"{cli.shown(folder)} holds pictures, scripts, lists and configurations; next:")
    print(f'i2vgen generate {picture} prompt="{shipped.SUBJECT} moves to the left"')
    return 0


def check(folder: Path) -> Path:
    """ValueError, before any work, unless the folder can be made without loss."""
    if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already, and nothing in it is replaced; name a new folder")
    if folder.resolve() == Path.cwd():
        raise ValueError(f"{folder} is the working folder; name a new folder in it")
    whole.check_place("DIR", folder)
    return folder


def copy(target: Path) -> None:
    shutil.copytree(shipped.folder("examples"), target, dirs_exist_ok=True, ignore=LEFT_OUT)
    shutil.copytree(shipped.folder("configs"), target / "configs", ignore=LEFT_OUT)
    for picture in shipped.PICTURE.parent.glob("*.png"):
        shutil.copyfile(picture, target / picture.name)
    for file in target.glob("*.jsonl"):
        file.write_text(file.read_text(encoding="utf-8").replace(ELSEWHERE, ""), encoding="utf-8")


def listing() -> str:
    lines = [f"    {path.name}" for path in sorted(shipped.PICTURE.parent.glob("*.png"))]
    for path in sorted(shipped.folder("examples").iterdir()):
        if path.is_file():
            lines.append(f"    {path.name:22}{title(path)}".rstrip())
    configs = shipped.folder("configs")
    lines += [f"    {path.relative_to(configs.parent)}" for path in sorted(configs.rglob("*.yaml"))]
    return "\n".join(lines)


def title(path: Path) -> str:
    """The first line of a script; of other files, none."""
    if path.suffix != ".py":
        return ""
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).splitlines()[0]
