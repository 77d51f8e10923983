"""vLLM over sheets beside vLLM over whole contexts, which its prefix caching keeps: one server, equal memory."""
