"""A model fitted to the prompts of LangChain's standard suites; see `fit.py`."""
