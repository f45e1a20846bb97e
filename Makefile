# Two commands do all the set-up: `make train` and `make test`. CONTRIBUTING.md says the rest.
PYTHON ?= python3.11
BIN := .venv/bin
DISTMAML_HOME ?= $(HOME)/distmaml
export DISTMAML_HOME

.PHONY: train test check ui clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip -c constraints.txt
	$(BIN)/pip install --quiet -e '.[dev]' -c constraints.txt
	touch $@

# Meta-trains on the embedded glyphs over two Ray workers, tests, and says where everything is.
train: .venv/installed
	$(BIN)/python jobs/train.py glyphs-maml-5w1s --num-workers 2

# The experiments of all runs, in the browser.
ui: .venv/installed
	MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false PATH="$(CURDIR)/$(BIN):$$PATH" \
	  $(BIN)/mlflow server --backend-store-uri sqlite:///$(DISTMAML_HOME)/mlflow.db \
	  --artifacts-destination $(DISTMAML_HOME)/mlartifacts --host 127.0.0.1 --port 5000 --workers 1 \
	  --allowed-hosts 127.0.0.1:5000,localhost:5000

# Lint, types, and the tests that start no server.
check: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest -q -m 'not ray'

test: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest -q

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
