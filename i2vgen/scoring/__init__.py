"""Scores of arbitrary videos, by any model. Nothing here needs the procedural world."""
