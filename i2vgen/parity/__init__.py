"""Parity: what the official model computed (golden files) against what this package computes.

`python scripts/parity.py FILE...` is the door. A golden file says what it holds in its metadata entry
`kind`; `KINDS` in `i2vgen/parity/kinds.py` maps that to the function that runs our implementation on it.
This wing sees the whole package and the conversion tables; nothing of the road from picture to video
sees this wing.
"""
