"""I2VGen-XL written to be changed: one picture and a sentence in, a video out."""

__version__ = "0.1.0"

from i2vgen.config import Config
from i2vgen.config_layers import load_config
from i2vgen.pipeline import I2VGenXL, Video, load

__all__ = ["Config", "I2VGenXL", "Video", "load", "load_config"]
