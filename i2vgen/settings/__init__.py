"""Everything that can be set, and how the layers of settings are merged."""
