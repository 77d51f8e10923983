"""Real models asked about real documents."""
