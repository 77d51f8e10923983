"""A build in parts: its options, what will be read and kept, what the sheet says of itself, the sheet."""
