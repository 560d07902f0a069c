PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# a process a core, each of about 2 GiB
PARALLEL := -n logical --maxprocesses 4 --dist worksteal
SCRIPTS := $(wildcard benchmarks/*.py)
ON_REAL_DATA := $(addprefix benchmarks/,compression_ladder.py int8_sums.py safety_gate.py)
export WANDB_MODE ?= offline

.DEFAULT_GOAL := help
.PHONY: help run test test-all lint bench clean

help:  ## show these targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

run: $(INSTALLED)  ## set up, then python -m medlite (ARGS="model=unet ..." to override)
	$(BIN)/python -m medlite $(ARGS)

test: $(INSTALLED)  ## set up, then the tests (MEDLITE_DATA=folder adds those on real data)
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-all: $(INSTALLED)  ## the tests with the slow ones
	$(BIN)/python -m pytest -m '' $(PARALLEL) $(ARGS)

lint: $(INSTALLED)  ## ruff and mypy
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(INSTALLED)  ## every script of benchmarks/ (those on real data need MEDLITE_DATA=folder)
	@for script in $(if $(MEDLITE_DATA),$(SCRIPTS),$(filter-out $(ON_REAL_DATA),$(SCRIPTS))); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:  ## remove everything that the targets made
	rm -rf $(VENV) outputs build dist .pytest_cache .ruff_cache .mypy_cache
