"""The benchmark: what a guidance step costs here and in diffusers.

`i2vgen bench case=NAME` is the door; `CASES` in `i2vgen/bench/cases.py` maps the name to a
function that returns a `Report`. This wing sees the whole package; nothing of the road from picture to video
sees it. diffusers is never imported here: the command does that and hands its class in.
"""
