"""Attention over a prefix and new tokens: the merge, its backends, and a sheet as cache layers."""
