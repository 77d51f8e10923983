"""OpenAI's HTTP API: what comes in, and what goes out."""
