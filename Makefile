# Every target makes .venv itself when it is not complete for this setup.py, and reuses it otherwise.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help train test test-all lint bench docs clean

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.complete-$(shell sha256sum setup.py | cut -c1-16)
BENCH_STAMP := $(STAMP)-bench
DOCS_STAMP := $(STAMP)-docs
# Workers of the test suite. Files stay together, so that what a file prepares is prepared once.
TEST_WORKERS ?= 2
PYTEST := $(RUN) -m pytest -n $(TEST_WORKERS) --dist loadfile

help: ## what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

train: $(STAMP) ## the flights example, from raw files to a measured model
	$(RUN) -m engine train +experiment=flights $(ARGS)

test: $(STAMP) ## the default suite: all but slow and gpu
	$(PYTEST) $(ARGS)

test-all: $(STAMP) ## every test; those that need a GPU skip without one
	$(PYTEST) -m '' $(ARGS)

lint: $(STAMP) ## ruff and mypy
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check --diff --quiet .
	$(RUN) -m mypy

bench: $(BENCH_STAMP) ## the benchmarks against peers; ARGS='NAME --json FILE'
	$(RUN) -m benchmarks $(ARGS)

docs: $(DOCS_STAMP) ## the documents as a site in site/, without the network
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet $(ARGS)

clean: ## remove .venv and caches (runs/ and store/ stay)
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info

# An interpreter counts when it starts, is new enough and can make an environment with pip.
$(STAMP):
	@set -e; \
	for python in $(PYTHON) python3.12 python3.13 python3.11; do \
	  $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break || python=; \
	done; \
	[ -n "$$python" ] || { echo "Python 3.11 or later with venv must be installed (or name one: make PYTHON=/path/to/python3 ...)"; exit 1; }; \
	$(RUN) -c 'import pip' 2>/dev/null || $$python -m venv --clear $(VENV); \
	echo "installing into $(VENV) (minutes, once)"; \
	$(RUN) -m pip install --quiet --editable '.[examples,test]'; \
	rm -f $(VENV)/.complete-*; touch $@

$(BENCH_STAMP): $(STAMP)
	$(RUN) -m pip install --quiet --editable '.[examples,test,bench]'
	@touch $@

$(DOCS_STAMP): $(STAMP)
	$(RUN) -m pip install --quiet --editable '.[examples,test,docs]'
	@touch $@
