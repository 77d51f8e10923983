"""Measurements, each a command that prints its table and writes its numbers with their setup."""
