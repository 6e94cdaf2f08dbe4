# `make help` lists the targets. Every target builds .venv first when it is missing or stale.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
CONFIG ?= serve_config.yaml
OUT ?= demo-run
DEVICE ?= cpu
GPU_OUT := $(if $(filter file,$(origin OUT)),gpu-results,$(OUT))

# Three on two cores: many tests wait for something (a time limit, a database, a child process).
PARALLEL := --numprocesses 3 --dist loadfile

# Where tests are that need a Ray cluster or run alone: collecting all of them takes a quarter of a minute.
ALONE := tests/api/test_fuzz.py tests/benchmarks/alone tests/chaos tests/demo/test_served.py tests/serving

.DEFAULT_GOAL := help
.PHONY: help install install-stable-audio-tools serve wheels test test-fast test-gpu chaos fuzz soak lint fmt type bench bench-gpu docs clean demo-model demo-eval check-cluster

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-28s%s\n", $$1, $$2}'

install: $(VENV)/.installed ## make .venv and install the tested set of packages

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check "$$(grep -E '^torch==' constraints.txt)"
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

install-stable-audio-tools: install ## also the package that models with `backend: stable_audio_tools` run on
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt \
		-r stable_audio_serve/models/stable_audio_tools/requirements.txt

serve: install ## serve the models of serve_config.yaml (PORT=8000, CONFIG=serve_config.yaml change it)
	@exec $(VENV)/bin/stable-audio-serve serve --config $(CONFIG) $(if $(PORT),--port $(PORT))

wheels: install ## the package as one file, and its client by itself, in dist/
	$(PY) -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist . ./packaging/client

test: install ## everything CI runs: first what needs no Ray, on three processes, then real clusters and what runs alone
	$(PY) -m pytest $(PARALLEL) --ignore=tests/api/test_fuzz.py -m "not ray and not serial and not gpu and not chaos and not cluster"
	$(PY) -m pytest $(ALONE) -m "(ray or serial) and not gpu and not chaos"

test-fast: install ## the fast set: no Ray cluster, under a minute
	$(PY) -m pytest $(PARALLEL) -m "not ray and not gpu and not slow and not chaos and not cluster"

# PY=python3 runs both on a machine that has torch, transformers and pytest but no network: nothing is installed there.
test-gpu: $(if $(filter file,$(origin PY)),install) ## what needs a CUDA device, JUnit XML in OUT=gpu-results (PY=python3 installs nothing)
	$(PY) -m pytest -c tests/gpu/pytest.ini --confcutdir tests/gpu --junitxml $(GPU_OUT)/tests.xml $(ARGS) tests/gpu

check-cluster: install ## the files of cluster/, each by the program that reads it, under 3 minutes; a missing program fails
	$(PY) -m pytest --numprocesses 2 --dist loadfile -m cluster $(ARGS) tests/cluster

chaos: install ## kill processes while 300 jobs run (SEED=0 repeats an order of kills), flood every port, 2,000 sequences on each job store
	CHAOS_SEED=$(or $(SEED),0) $(PY) -m pytest -s -m chaos --timeout 1800

fuzz: install ## ten thousand generated requests to every operation of the API, with another seed each time
	FUZZ_EXAMPLES=300 $(PY) -m pytest tests/api/test_fuzz.py --hypothesis-seed=$${SEED:-$$RANDOM} --timeout 1800

soak: install ## 2,000 mixed requests to one engine, one in twenty cancelled: right answers, flat memory, nothing left (SEED=0 another mix)
	SOAK_REQUESTS=2000 SOAK_SEED=$(or $(SEED),0) $(PY) -m pytest -s --timeout 1800 tests/engine/test_soak.py

lint: install ## style, types and import rules
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

fmt: install ## format and fix what can be fixed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

type: install ## types only
	$(VENV)/bin/mypy

bench: install ## where we stand: the short form of every goal this machine can show, under 12 minutes (FULL=1: hours, for publishing)
	$(PY) -m benchmarks bench $(if $(FULL),--full) --out $(or $(RESULTS),bench-results)

bench-gpu: $(if $(filter file,$(origin PY)),install) ## the benchmarks of a CUDA device, JSON in OUT=gpu-results (PART=1 to 5 for one of them; started again it continues)
	$(PY) -m benchmarks.gpu $(if $(PART),--part $(PART)) --out $(GPU_OUT)

docs: install ## write docs/openapi.json and docs/metrics.md from the application, docs/performance.md from the results
	$(PY) -m stable_audio_serve.cli openapi --out docs/openapi.json
	$(PY) -m stable_audio_serve.cli metrics --out docs/metrics.md
	$(PY) -m benchmarks.page

demo-model: install ## train the demo model from nothing (OUT=demo-run DEVICE=cpu); resumes where it stopped
	MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296 \
		$(PY) -m stable_audio_serve.demo.train --out $(OUT) --device $(DEVICE)

demo-eval: install ## judge the packaged demo model and write its report
	$(PY) -m stable_audio_serve.demo.evaluate --json stable_audio_serve/demo/checkpoint/report.json

clean: ## remove everything that can be rebuilt
	rm -rf $(VENV) build dist bench-results .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
