"""Conversion of checkpoints between layouts, described as data: block tables x places computed from the
settings.

Mappings are invertible and checked for completeness. Imports i2vgen; generation does not import this package.
"""
