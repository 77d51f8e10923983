"""Seconds and bytes against limits and peers."""
