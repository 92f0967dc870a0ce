"""Measures how well a trained model follows its prompts, on clips of the procedural world."""
