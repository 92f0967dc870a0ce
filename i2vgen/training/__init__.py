"""Training wing: the procedural clip world, what reads it back, data and loop. The road never sees it."""
