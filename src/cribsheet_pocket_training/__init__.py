"""How the pocket model was made: its worlds, its training, and how it was measured."""
