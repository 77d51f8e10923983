# Two commands do all the set-up: `make demo` and `make test`. Only python3 (>= 3.11) and a package index are needed.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check format lint types docs slow quality memory pocket clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "python >= 3.11 is needed")'
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

demo: $(READY)  ## build a sheet from real documents, ask it, show answers, sources, sizes and times
	$(RUN)/cribsheet demo

test: $(READY)  ## every test that fits into CI
	$(RUN)/python -m pytest -m "not slow"

slow: $(READY)  ## the long proofs
	$(RUN)/python -m pytest -m slow

check: format lint types test docs  ## everything CI asks for

format: $(READY)
	$(RUN)/ruff format --check .

lint: $(READY)
	$(RUN)/ruff check .

types: $(READY)
	$(RUN)/mypy

docs: $(READY)
	$(RUN)/sphinx-build --quiet --fail-on-warning docs docs/_build

clean:
	rm -rf $(VENV) docs/_build
