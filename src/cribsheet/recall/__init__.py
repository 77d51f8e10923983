"""Stretches of the corpus, fetched as they were read: which, from where, and to which positions."""
