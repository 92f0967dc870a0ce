"""The benchmark: what a guidance step costs here and in diffusers.

`python scripts/bench.py case=NAME` is the door; `CASES` in `i2vgen/bench/cases.py` maps the name to a
function that returns a `Report`. This wing sees the whole package; nothing of the road from picture to video
sees it. diffusers is never imported here: the script does that and hands its class in.
"""
