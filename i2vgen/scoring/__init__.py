"""Scores of any clips: the user's own videos, by any model. Nothing here needs the procedural world."""
