"""Sheets in segments: built apart, changed, put together."""
