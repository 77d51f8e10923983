# Two commands do all the set-up: `make demo` and `make test`. Only python3 (>= 3.11) and a package index are needed.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin
READY := $(VENV)/.ready
OLDEST := .venv-oldest
PEERS := .venv-peers
CORPORA ?= build/real-corpora
FAST := -m "not slow and not reliability"
CORE := attention/test_attention attention/test_batch attention/test_prefix attention/test_rope compress/test_compress \
	engine/test_engine model/test_backbone structured/test_grammar test_llm test_testing test_truths

.PHONY: demo test test-library test-pages oldest kernels support check format lint types docs slow reliability ray page quality peers real connectivity certainty \
	memory throughput speed speed-gpu minute-gpu step-gpu vllm-gpu living evidence routing pocket clean

$(READY): pyproject.toml constraints.txt src/cribsheet_pocket/pyproject.toml $(wildcard integrations/*/pyproject.toml)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "python >= 3.11 is needed")'
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable src/cribsheet_pocket --editable '.[dev]' --editable 'integrations/langchain[test]' \
		--editable 'integrations/llama-index[test]'
	touch $(READY)

demo: $(READY)  ## build a sheet from real documents, ask it, show answers, sources, sizes and times
	$(RUN)/cribsheet demo

test: $(READY)  ## every test that fits into CI, in two processes
	$(MAKE) --jobs 2 --output-sync=target test-library test-pages

test-library: $(READY)
	$(RUN)/python -m pytest $(FAST) tests --ignore tests/docs

test-pages: $(READY)
	$(RUN)/python -m pytest $(FAST) tests/docs integrations

$(OLDEST)/.ready: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 'transformers==5.4.*' \
		'pytest>=8' pytest-asyncio safetensors pydantic jinja2 typer rich pypdf llguidance bm25s
	touch $@

oldest: $(OLDEST)/.ready  ## the core's tests with the oldest transformers that is supported, in an environment of its own
	PYTHONPATH=src $(OLDEST)/bin/python -m pytest $(FAST) $(addprefix tests/,$(addsuffix .py,$(CORE)))

.venv-kernels/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-kernels
	.venv-kernels/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 triton==3.6.0 'numpy<2.3' 'transformers==5.23.*' \
		'pytest>=8' pytest-asyncio safetensors pydantic jinja2 typer rich pypdf llguidance bm25s
	touch $@

kernels: .venv-kernels/.ready  ## our own GPU kernels beside their references, in Triton's interpreter, which wants an older numpy
	TRITON_INTERPRET=1 PYTHONPATH=src .venv-kernels/bin/python -m pytest tests/kernels tests/model/test_llama.py
	PYTHONPATH=src .venv-kernels/bin/python -m pytest tests/kernels/test_ahead.py

support: $(READY) $(OLDEST)/.ready  ## the table of supported models, from a test run with the oldest and the newest transformers
	rm -f docs/reference/support/*.json
	CRIBSHEET_SUPPORT=docs/reference/support $(RUN)/python -m pytest tests/test_truths.py
	CRIBSHEET_SUPPORT=docs/reference/support PYTHONPATH=src $(OLDEST)/bin/python -m pytest tests/test_truths.py
	$(RUN)/python docs/support_table.py

$(PEERS)/.ready: Makefile
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.2.0 kvpress==0.5.5
	touch $@

quality: $(READY)  ## what survives compression, by method, rate and family of tasks (a quarter of an hour)
	$(RUN)/cribsheet bench quality

peers: $(READY) $(PEERS)/.ready  ## the same with the presses of kvpress, in an environment of their own, and the page (40 minutes)
	$(RUN)/cribsheet bench quality --peers $(PEERS)/bin/python --json docs/benchmarks/quality.json

real: $(READY)  ## real models: make real MODEL=Qwen/Qwen2.5-0.5B-Instruct DATA=data-sets [CORPORA=folder] [OPTIONS="--only xquad/4000 --cases 1"]
	test -d $(CORPORA) || $(RUN)/python -m cribsheet_bench.real.sets $(DATA) $(CORPORA)
	$(RUN)/cribsheet bench real $(CORPORA) $(addprefix --model ,$(MODEL)) --json docs/benchmarks/real.json \
		$(addprefix --peers ,$(wildcard $(PEERS)/bin/python)) $(OPTIONS)

connectivity: $(READY)  ## direct and join questions by connectivity, at equal budgets, with the figure (35 minutes on a free core)
	$(RUN)/python -m cribsheet_bench.connectivity --json docs/benchmarks/connectivity.json

certainty: $(READY)  ## what auto can know, and what its choices are worth (ten minutes)
	$(RUN)/python -m cribsheet_bench.certainty --json docs/benchmarks/certainty.json

memory: $(READY)  ## peak memory of a build against the length of the corpus
	$(RUN)/python -m cribsheet_bench.memory

throughput: $(READY)  ## many questions at once against stock generate
	$(RUN)/python -m cribsheet_bench.throughput

speed: $(READY)  ## building and answering against their peers, on a CPU (half an hour)
	$(RUN)/cribsheet bench speed --json docs/benchmarks/speed.json --page docs/benchmarks/speed.md

speed-gpu:  ## the same on one large GPU, with the python that has torch there, and the page (six minutes)
	PYTHONPATH=src $(PYTHON) -m cribsheet_bench.speed.run --device cuda --shape 8b --seconds 360 \
		--json docs/benchmarks/speed-h200.json --page docs/benchmarks/speed-h200.md --title "Speed on an H200"

minute-gpu:  ## the first minute, whole builds and the paper's promise on a GPU, and the page: make minute-gpu [MODEL=...] (six minutes)
	PYTHONPATH=src $(PYTHON) -m cribsheet_bench.speed.run --device cuda --shape $(or $(MODEL),1.5b) 0.5b 8b \
		--only "first minute" "whole builds" promise --json docs/benchmarks/minute-h200.json --page docs/benchmarks/minute-h200.md \
		--title "The first minute on an H200"

step-gpu:  ## one decoding step on one large GPU: kernels by kind, ways of making it, tiles of products (three minutes)
	PYTHONPATH=src $(PYTHON) -m cribsheet_bench.speed.step --json step-gpu.json

vllm-gpu:  ## vLLM over sheets beside vLLM over whole contexts, with a python that has vLLM: make vllm-gpu MODEL=... CORPORA=folder (five minutes)
	PYTHONPATH=src $(PYTHON) -m cribsheet_bench.beside_vllm.run $(CORPORA) --model $(MODEL) --only nq/8000 --blocks 1280 \
		--json vllm-gpu.json

living: $(READY)  ## what changing one of a hundred documents costs, and what independent sheets lose (half an hour)
	$(RUN)/python -m cribsheet_bench.living --json docs/benchmarks/living.json

evidence: $(READY)  ## whether an answer's sources are the documents that hold it, against BM25 (half an hour)
	$(RUN)/python -m cribsheet_bench.evidence --json docs/benchmarks/evidence.json

routing: $(READY)  ## whether questions find their sheet, and what two sheets behind one question lose
	$(RUN)/python -m cribsheet_bench.routing

pocket: $(READY)  ## train the pocket model again: make pocket WIKI=wiki.txt.xz (a GPU, or patience)
	$(RUN)/python -m cribsheet_pocket_training.train --wiki $(WIKI) --out pocket-run --resume
	$(RUN)/python -m cribsheet_pocket.quantize pocket-run/weights

slow: $(READY)  ## the long proofs
	$(RUN)/python -m pytest -m slow

reliability: $(READY)  ## damage, crashes and crowds: make reliability [SEED=1] [SHARE=0.1 for a tenth of it]
	CRIBSHEET_SEED=$(or $(SEED),0) CRIBSHEET_SHARE=$(or $(SHARE),1) $(RUN)/python -m pytest -m reliability -rs tests/reliability tests/server

ray: $(READY)  ## two replicas, killed workers and replicas, a model over two processes; installs the extra `ray`
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,ray]'
	$(RUN)/python -m pytest -m reliability -rs tests/scale

page: $(READY)  ## the server's page in a real headless Chromium
	$(RUN)/python -m pytest -m reliability -rs tests/server/test_page.py

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
	rm -rf $(VENV) $(OLDEST) $(PEERS) docs/_build
