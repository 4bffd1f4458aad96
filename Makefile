# Every command makes the environment it needs first, in .venv.
.DEFAULT_GOAL := help
.PHONY: help env test test-cluster check lint types format quickstart clean

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.made

# The first of these that is Python 3.11 or 3.12 and can make environments; or PYTHON=... yourself.
USABLE := import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c '$(USABLE)' 2>/dev/null && echo $$p && break; done)

# Installing compiles all that is there, in twice the time; what is used is compiled below instead.
# Where Python is told to write no bytecode, every process would compile all that it imports.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile

# More arguments for pytest or the quickstart: make test ARGS="-k schedule -n 0"
ARGS ?=

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env: $(STAMP) ## make the environment

$(STAMP): requirements.txt requirements-dev.txt pyproject.toml
	@$(or $(PYTHON),false) -c '$(USABLE)' || { \
		echo "error: PYTHON='$(PYTHON)' is not a Python 3.11 or 3.12 with venv and ensurepip;" \
			"set one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@# Alone, so that what others accept does not choose torch's version.
	$(PIP) "$$(grep '^torch==' requirements.txt)"
	$(PIP) -r requirements.txt -r requirements-dev.txt
	@# setuptools is there: torch requires it.
	$(PIP) --no-deps --no-build-isolation -e .
	$(BIN)/pip check
	@$(BIN)/python -W ignore -c "import megatron_sat.training.run, megatron_sat.finetuning.run"
	touch $@

# Files go to three processes: many tests wait, for a rank to be missed or for a launcher to import.
test: $(STAMP) ## run all tests that this machine can run
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 3 --dist loadfile \
		--no-loadscope-reorder $(ARGS)

test-cluster: $(STAMP) ## every launcher on two small hosts, and SLURM; needs root, installs packages
	tests/cluster/install.sh
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --cluster tests/cluster $(ARGS)

check: lint types test ## lint, types and tests

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## mypy on the package
	$(BIN)/mypy

format: $(STAMP) ## rewrite the files as lint wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quickstart: $(STAMP) ## train a small model, dense and with SAT, and compare
	$(BIN)/python examples/quickstart/run.py $(ARGS)

clean: ## remove the environment and all caches
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
