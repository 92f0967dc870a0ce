"""Parity: compares this package with what the official model computed, stored in golden files.

Run `i2vgen parity FILE...`. The metadata entry `kind` of a golden file says what it holds; `KINDS`
in `i2vgen/parity/kinds.py` maps it to the function that runs our implementation. These modules import the
whole package and the conversion tables; generation imports none of them.
"""
