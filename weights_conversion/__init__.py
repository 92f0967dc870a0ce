"""Checkpoint layouts as data: leaf tables x places generated from the settings, invertible, audited.

Imports i2vgen's settings (and its models on `meta`); nothing on the road from picture to video imports this.
"""
