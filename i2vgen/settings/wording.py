"""What messages are made of."""

from __future__ import annotations

from typing import Any


def counted(number: int, noun: str) -> str:
    """1, "clip" -> "1 clip"; 2, "clip" -> "2 clips" """
    ending = "es" if noun.endswith(("s", "sh", "ch", "x")) else "s"
    return f"{number} {noun}{ending * (number != 1)}"


def shortened(value: Any, most: int = 200) -> str:
    """A value as Python writes it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= most else text[:most] + "..."


def first_line(error: BaseException) -> str:
    """Of its message; the error's kind where there is none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
