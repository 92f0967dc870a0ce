"""I2VGen-XL written to be changed: one picture and a sentence in, a video out."""

__version__ = "0.1.0"

from i2vgen.pipeline import I2VGenXL, Video, load
from i2vgen.settings.config import Config
from i2vgen.settings.merge import load_config

__all__ = ["Config", "I2VGenXL", "Video", "load", "load_config"]
