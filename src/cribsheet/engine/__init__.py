"""Reading: requests over a prefix, answered together, token by token."""
