# `make train`, `make tune` and `make test` do all the set-up themselves. CONTRIBUTING.md says the rest.
PYTHON ?= python3.11
BIN := .venv/bin
DISTMAML_HOME ?= $(HOME)/distmaml
export DISTMAML_HOME
PORT ?= 5000
SHELL := /bin/bash

.PHONY: train tune test test-faults fuzz check bench-check ui clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip -c constraints.txt
	$(BIN)/pip install --quiet -e '.[dev]' -c constraints.txt
	touch $@

# Meta-trains on the embedded glyphs over two Ray workers, tests, and says where everything is.
train: .venv/installed
	$(BIN)/python jobs/train.py glyphs-maml-5w1s --num-workers 2

# A small search on them, over learning rates, inner steps, algorithm and tasks per step.
tune: .venv/installed
	$(BIN)/python jobs/tune.py glyphs-maml-5w1s --num-samples 8 --num-outer-steps 150 --val-every 15 --num-val-episodes 40

# The experiments of all runs, in the browser.
ui: .venv/installed
	@test -f $(DISTMAML_HOME)/mlflow.db || { echo "there is no run in $(DISTMAML_HOME) yet: make train"; exit 2; }
	@! (exec 3<>/dev/tcp/127.0.0.1/$(PORT)) 2>/dev/null || { echo "port $(PORT) is in use: make ui PORT=5001"; exit 2; }
	MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false PATH="$(CURDIR)/$(BIN):$$PATH" \
	  $(BIN)/mlflow server --backend-store-uri sqlite:///$(DISTMAML_HOME)/mlflow.db \
	  --artifacts-destination $(DISTMAML_HOME)/mlartifacts --host 127.0.0.1 --port $(PORT) --workers 1 \
	  --allowed-hosts 127.0.0.1:$(PORT),localhost:$(PORT)

# Lint, types, and the tests that start no server.
check: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest -q -m 'not (ray or slow or faults)' -n 2 --dist loadfile

.venv/bench: .venv/installed
	$(BIN)/pip install --quiet -e '.[bench]' -c constraints.txt
	touch $@

# Whether distmaml is as far ahead of other libraries as it was; on an otherwise idle machine.
bench-check: .venv/bench
	$(BIN)/python -m benchmarks.throughput --short --check docs/results/throughput.json

# Those that start servers go one after the other: each wants all cores for itself.
test: check
	$(BIN)/pytest -q -m 'slow and not (ray or faults)' -n 2 --dist loadfile
	$(BIN)/pytest -q -m 'ray and not faults'

# Damaged and hostile files before every reader; ten minutes.
fuzz: .venv/installed
	$(BIN)/python -m tests.fuzz --inputs 100000

# Real processes, nodes and servers are killed, one after the other.
test-faults: .venv/installed
	$(BIN)/pytest -q -m faults

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
