"""What survives compression, on made families of questions."""
