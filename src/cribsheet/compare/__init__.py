"""Ways to answer side by side, on a user's own questions."""
