"""The model underneath: loading, registration in transformers, and the fast paths of Llama-like ones."""
