"""The same numbers in less memory: plans, counting, offloading, eight-bit weights."""
