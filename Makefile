# Two commands are enough on a fresh machine: `make demo` and `make test`.
# PYTHON= chooses the interpreter of the virtual environment, VENV= its folder.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
CONSTRAINTS := .ci/constraints
INPUTS := pyproject.toml $(wildcard $(CONSTRAINTS)/*.txt) .ci/install
# Without PYTHON= the environment's own interpreter is kept; a new one takes the first python that is
# new enough. .ci/install refuses what is too old, by name.
new_enough = $(shell $(1) -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $(1))
ifeq ($(origin PYTHON),undefined)
PYTHON := $(firstword $(foreach p,$(BIN)/python python3 python3.11 python3.12 python3.13,$(call new_enough,$(p))) python3)
endif
# An environment that was moved, broken, or made by another Python than PYTHON= names is stale.
$(shell .ci/install --fresh "$(PYTHON)" "$(VENV)" || rm -f $(VENV)/.stamp-*)

EIGHT_DEVICES := --xla_force_host_platform_device_count=8

.PHONY: help setup demo test lint types docs bench paper check clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# Two stamps, so that the demo installs only what the demo needs.
$(VENV)/.stamp-core: $(INPUTS)
	@.ci/install "$(PYTHON)" "$(VENV)" ""
	@touch $@

$(VENV)/.stamp-all: $(INPUTS) $(VENV)/.stamp-core
	@.ci/install "$(PYTHON)" "$(VENV)" "test,docs,lint"
	@touch $@

setup: $(VENV)/.stamp-all  ## make $(VENV) with everything that tests, docs and lint need

demo: $(VENV)/.stamp-core  ## watch a network compress itself on real images (no download)
	$(BIN)/python -m research.adaptive_compression --config configs/adaptive_compression/digits.yaml

test: setup  ## run every test and doctest
	@if compgen -G 'tests/distributed/test_*.py' >/dev/null; then \
	  echo "== tests/distributed: eight host devices, own process"; \
	  XLA_FLAGS="$(EIGHT_DEVICES)" $(BIN)/python -m pytest tests/distributed; fi
	$(BIN)/python -m pytest -n $(WORKERS) --ignore=tests/distributed

lint: setup  ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup  ## check types
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: setup  ## build the site into docs/_build/html; a warning is an error
	$(BIN)/python -m sphinx -W --keep-going -b html -d docs/_build/doctrees docs docs/_build/html

bench: setup  ## run the benchmark scripts; results go to research/benchmarks/results/
	@for script in research/benchmarks/[a-z]*.py; do \
	  name=$$(basename $$script .py); echo "== $$name"; \
	  $(BIN)/python -m research.benchmarks.$$name; done

paper: setup  ## rebuild the paper's numbers and figures from results, and the PDF once there is a text
	$(BIN)/python -m research.paper build

check: setup  ## is the paper fresh, within its tolerances, and unchanged by hand?
	$(BIN)/python -m research.paper check

clean:  ## remove caches, builds and the virtual environment; keeps runs/
	rm -rf $(VENV) docs/_build dist build .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
