"""Archives: the keys and values of all tokens that a build read, in a file beside the sheet."""
