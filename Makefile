# `make help` lists the targets. Every target builds .venv first if it is missing or stale.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
CONFIG ?= serve_config.yaml
OUT ?= demo-run
DEVICE ?= cpu
GPU_OUT := $(if $(filter file,$(origin OUT)),gpu-results,$(OUT))

# Three test processes on two cores, because many tests wait for another process. All tests of a file run in one process,
# and so do the folders whose files share a server (tests/conftest.py).
PYTEST := $(PY) -m pytest --dist loadfile --no-loadscope-reorder --numprocesses
OLDEST_TORCH := $(shell sed -n 's/.*"torch>=\([0-9.]*\)".*/\1/p' pyproject.toml)
OLDEST := .venv-torch-$(OLDEST_TORCH)
ELSEWHERE := not gpu and not chaos and not cluster

# Longest files of tests/cluster first, so that both test processes end at the same time.
LONG_CLUSTER := $(addprefix tests/cluster/,test_two_servers.py test_dockerfile.py test_dashboard.py)
CLUSTER_FILES := $(LONG_CLUSTER) $(filter-out $(LONG_CLUSTER),$(wildcard tests/cluster/test_*.py))

# Tests that `make soak` repeats for longer.
SOAK := tests/engine/test_soak.py tests/serving/test_scaled.py tests/api/test_replay.py

.DEFAULT_GOAL := help
.PHONY: help install install-stable-audio-tools serve wheels test test-fast test-all test-all-1 test-all-2 test-all-3 test-all-4 test-gpu test-oldest-torch chaos fuzz soak lint fmt type bench bench-gpu docs site site-serve clean demo-model demo-adapter demo-eval check-cluster

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-28s%s\n", $$1, $$2}'

install: $(VENV)/.installed ## create .venv and install the tested versions of all packages

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=/path/to/python" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check "$$(grep -E '^torch==' constraints.txt)"
	$(PY) -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

install-stable-audio-tools: install ## also install stable-audio-tools, for models with `backend: stable_audio_tools`
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt \
		-r stable_audio_serve/models/stable_audio_tools/requirements.txt

serve: install ## serve the models of serve_config.yaml (options: PORT=8000, CONFIG=serve_config.yaml)
	@exec $(VENV)/bin/stable-audio-serve serve --config $(CONFIG) $(if $(PORT),--port $(PORT))

wheels: install ## build the wheels of the package and of the client-only package in dist/
	$(PY) -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist . ./packaging/client

# Write .pyc files even if PYTHONDONTWRITEBYTECODE is set: processes that tests start load them.
test test-fast test-all: export PYTHONDONTWRITEBYTECODE :=

test-fast: install ## run before each commit, 90 s: unit tests, golden numbers, the API in one process
	$(PYTEST) 3 -m "not server and not slow and $(ELSEWHERE)"

test: install ## run by CI, 5 to 11 minutes: also a Ray server, PostgreSQL, S3, Chromium and the clients of each dialect
	$(PYTEST) 3 -m "not slow and $(ELSEWHERE)"

test-all: $(if $(PART),test-all-$(PART),test-all-1 test-all-2 test-all-3 test-all-4) ## all tests, under an hour (PART=1 to 4 for one quarter): long forms, nodes, scaling, redeploys
test-all-1: test
test-all-2: install
	$(PYTEST) 3 --hypothesis-profile long -m "(slow or hypothesis) and not server and $(ELSEWHERE)"
test-all-3: install
	$(PYTEST) 2 -m "slow and server and $(ELSEWHERE)"
test-all-4: check-cluster test-oldest-torch

# Set PY=python3 on a machine that has torch, transformers and pytest but no network, to install nothing.
test-gpu: $(if $(filter file,$(origin PY)),install) ## tests that need a CUDA device, JUnit XML in OUT=gpu-results (PY=python3 installs nothing)
	$(PY) -m pytest -c tests/gpu/pytest.ini --confcutdir tests/gpu --junitxml $(GPU_OUT)/tests.xml $(ARGS) tests/gpu

test-oldest-torch: ## the engine alone, with the oldest torch that pyproject.toml allows, in a venv of its own (5 GB)
	$(PYTHON) -m venv $(OLDEST)
	grep -v '^torch\|^triton\|^nvidia' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/pip install -q -c $(OLDEST)/constraints.txt torch~=$(OLDEST_TORCH).0 numpy transformers safetensors huggingface_hub pytest
	STABLE_AUDIO_TEST_DEVICE=stand-in $(OLDEST)/bin/python -m pytest -c tests/gpu/pytest.ini --confcutdir tests/gpu tests/gpu tests/test_bare_machine.py

check-cluster: install ## check each file of cluster/ with the program that reads it, under 3 minutes; fails if a program is missing
	$(PYTEST) 2 -m cluster $(ARGS) $(CLUSTER_FILES)

chaos: install ## over an hour: kill processes while 300 jobs run (SEED=0 sets the order of kills), flood every port, 2,000 sequences on each job store
	CHAOS_SEED=$(or $(SEED),0) $(PY) -m pytest -s -m chaos --timeout 1800 $(ARGS)

fuzz: install ## send 10,000 generated requests to every operation of the API, with a new seed per run
	FUZZ_EXAMPLES=300 $(PY) -m pytest tests/api/test_fuzz.py --hypothesis-seed=$${SEED:-$$RANDOM} --timeout 1800

soak: install ## 2,000 mixed requests to one engine, 5 % of them cancelled; 500 jobs on two nodes; 500 clips recreated (SEED=0 sets the mix)
	SOAK_REQUESTS=2000 SOAK_JOBS=500 SOAK_TAKES=500 SOAK_SEED=$(or $(SEED),0) $(PY) -m pytest -s --timeout 1800 $(SOAK)

lint: install ## check style, types and import rules
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

fmt: install ## format the code and apply automatic fixes
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

type: install ## check types only
	$(VENV)/bin/mypy

bench: install ## run the short form of the benchmarks with goals, except threads and adapters, about 15 minutes (FULL=1: hours, for published results)
	$(PY) -m benchmarks bench $(if $(FULL),--full) --out $(or $(RESULTS),bench-results)

bench-gpu: $(if $(filter file,$(origin PY)),install) ## compare each fast feature of a CUDA device with the plain path and measure it, under 9 minutes, JSON in OUT=gpu-results
	$(PY) -m benchmarks.gpu first --out $(GPU_OUT) $(ARGS)

docs: install ## write docs/openapi.json, docs/openapi.md and docs/metrics.md from the application, docs/performance.md from the results
	$(PY) -m docs.reference
	$(PY) -m benchmarks.page

site: install ## build the documentation website in site/; fails on any warning (broken link, page missing from the menu)
	$(PY) -m sphinx --quiet --fail-on-warning --keep-going -b html -d build/site docs site

site-serve: site ## build the website and serve it on http://127.0.0.1:8001 (option: PORT=8001)
	@exec $(PY) -m http.server --bind 127.0.0.1 --directory site $(or $(PORT),8001)

demo-model: install ## train the demo model from scratch (options: OUT=demo-run, DEVICE=cpu); run again to resume
	MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296 \
		$(PY) -m examples.demo_model.train --out $(OUT) --device $(DEVICE)

demo-adapter: install ## train the demo model's adapter on one core, write it into the package and evaluate it
	OMP_NUM_THREADS=1 $(PY) -m examples.demo_model.train_adapter

demo-eval: install ## evaluate the packaged demo model and write its report
	$(PY) -m examples.demo_model.evaluate --json stable_audio_serve/demo/checkpoint/report.json

clean: ## delete everything that can be rebuilt
	rm -rf $(VENV) .venv-torch-* build dist site bench-results gpu-results .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
