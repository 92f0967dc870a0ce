"""Training wing: the procedural clip world, what reads it back, the data, the loop. The road never sees it."""
