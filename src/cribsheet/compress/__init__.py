"""Writing: read a chunk, score it, keep the best, move them."""
