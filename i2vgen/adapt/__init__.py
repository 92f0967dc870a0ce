"""Changing a network from outside: taps, attention maps, LoRA, extra context tokens, residuals."""
