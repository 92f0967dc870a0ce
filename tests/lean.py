"""For processes that do without transformers, which open_clip imports where it is, for three seconds."""

import sys

sys.modules["transformers"] = None
