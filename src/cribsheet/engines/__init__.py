"""Engines that are not ours: files in which they read a sheet, and what their models' files must say for it.

What they share: one length for all layers and heads, and keys at positions from 0 on. `export.py` has the table.
"""
