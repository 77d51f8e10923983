"""The artifact: what is kept, how it is stored, and where its files lie."""
