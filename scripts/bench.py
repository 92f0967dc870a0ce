"""What a guidance step costs here and in diffusers, both with the same settings.

python scripts/bench.py case=NAME [against=diffusers] [json=OUT.json]

python scripts/bench.py case=count json=outputs/count.json

case=count      FLOPs, bytes, operations and activation peak at the official size, counted without weights
case=memory     what every memory plan takes on a GPU at the official size, counted part by part
against=        the other side, diffusers
json=           all figures; its top level holds the ratios ours / theirs
"""

from __future__ import annotations

import sys
from pathlib import Path

from i2vgen import cli
from i2vgen.bench.cases import CASES

FLAGS = ("--help",)
AGAINST = ("diffusers",)
NAMES = ("case", "against", "json")


def main() -> int:
    file, words, flags = cli.split(["--help" if w == "-h" else w for w in sys.argv[1:]], FLAGS)
    if "--help" in flags or not sys.argv[1:]:
        print(__doc__)
        return 0
    if file is not None:
        raise ValueError(f"{file!r} is no name=value; a case is chosen by case=NAME, NAME {_known(CASES)}")
    given = take(words)
    if "case" not in given:
        raise ValueError(f"case= is missing; choose {_known(CASES)}")
    case = choose("case", given["case"], CASES)
    choose("against", given.get("against", "diffusers"), AGAINST)
    out = check_file(Path(given["json"])) if "json" in given else None

    report = CASES[case](diffusers_network())
    print("\n\n".join(map(str, report.tables)))
    if out is not None:
        report.write(out)
        print(f"\nfigures in {out}")
    return 0


def take(words: list[str]) -> dict[str, str]:
    """name=value words by name, each known, given once and not empty"""
    given: dict[str, str] = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in NAMES:
            raise ValueError(f"there is no {name}=; known are {', '.join(f'{n}=' for n in NAMES)}")
        if name in given:
            raise ValueError(f"{name}= is given twice, {given[name]} and {value}; give it once")
        if not value:
            raise ValueError(f"{word} is empty; give a value or leave it out")
        given[name] = value
    return given


def choose(name: str, value: str, known) -> str:
    if value not in known:
        raise ValueError(f"there is no {name}={value}; choose {_known(known)}")
    return value


def _known(names) -> str:
    return " or ".join(names)


def check_file(path: Path) -> Path:
    """Told before the work, not after it."""
    if path.is_dir():
        raise ValueError(f"json={path} is a folder; name a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def diffusers_network() -> type:
    try:
        from diffusers import I2VGenXLUNet
    except ImportError as error:
        raise ValueError(
            f"against=diffusers needs the package diffusers ({error}): python -m pip install -e '.[test]'"
        ) from None
    return I2VGenXLUNet


if __name__ == "__main__":
    sys.exit(cli.run(main))
