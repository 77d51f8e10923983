"""Answers of a required form: grammars, their tokens, and the tools whose calls they are."""
