"""One loaded model with its caches, and whose turn it is on it."""
