"""A sheet asked in llama.cpp: a GGUF of its model answers, of any quantisation, without torch in the loop."""
