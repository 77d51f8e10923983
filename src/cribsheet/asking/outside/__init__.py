"""Questions for engines that are not ours: a sheet's prompts in tokens, and requests to vLLM's server."""
