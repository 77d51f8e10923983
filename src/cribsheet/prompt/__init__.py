"""Text to token ids: the chat template and its turns, and documents cut into chunks."""
