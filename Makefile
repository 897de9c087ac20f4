# Recipes of one line. PYTHON makes the virtual environment; everything else runs in it.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV ?= .venv
RUN = $(VENV)/bin
CONSTRAINTS = constraints.txt
# For two cores: a third worker computes while tests of the others wait for programs that they started (a fifth less time).
WORKERS ?= 3
# Half of the cores, at most eight: each process of the GPU tests has a CUDA context of its own.
GPU_WORKERS ?= $(shell cores=$$(getconf _NPROCESSORS_ONLN); echo $$((cores >= 16 ? 8 : cores > 2 ? cores / 2 : 1)))

.PHONY: help demo test lint types tests format docs site gpu slow fuzz wheel clean
.DEFAULT_GOAL := help

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

# A stamp per set of extras: made again only when what it depends on has changed.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-demo: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(RUN)/python -m pip install -q -c $(CONSTRAINTS) -e '.[eval]'
	@touch $@

$(VENV)/.installed-test: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(RUN)/python -m pip install -q -c $(CONSTRAINTS) -e '.[test]'
	@touch $@ $(VENV)/.installed-demo

$(VENV)/.installed-fuzz: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(RUN)/python -m pip install -q -c $(CONSTRAINTS) -e '.[fuzz]'
	@touch $@ $(VENV)/.installed-test $(VENV)/.installed-demo

$(VENV)/.installed-docs: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(RUN)/python -m pip install -q -c $(CONSTRAINTS) -e '.[docs]'
	@touch $@

demo: $(VENV)/.installed-demo  ## quantize a real model, pack it twice, verify and evaluate it
	$(RUN)/python scripts/demo.py

test: lint types tests  ## what continuous integration runs

lint: $(VENV)/.installed-test  ## ruff, and the generated pages
	$(RUN)/ruff check . && $(RUN)/python scripts/make_cli_docs.py --check && $(RUN)/python scripts/make_troubleshooting.py --check

types: $(VENV)/.installed-test  ## mypy
	$(RUN)/mypy

# Bytecode is written whatever the environment says: workers and programs would compile every module again.
tests: $(VENV)/.installed-test  ## pytest, without what needs a GPU or minutes
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(RUN)/python -m pytest -q -n $(WORKERS) --dist worksteal

slow: $(VENV)/.installed-test  ## the tests that take minutes
	$(RUN)/python -m pytest -q -m slow

fuzz: $(VENV)/.installed-fuzz  ## a minute of hostile bytes
	$(RUN)/python -m tests.fuzz checkpoint -max_total_time=30 -verbosity=0
	$(RUN)/python -m tests.fuzz packed -max_total_time=30 -verbosity=0

gpu: $(VENV)/.installed-test  ## the tests that need a CUDA device
	OMP_NUM_THREADS=2 $(RUN)/python -m pytest -q -m gpu -n $(GPU_WORKERS) --dist load

format: $(VENV)/.installed-test  ## ruff format
	$(RUN)/ruff format .

docs: $(VENV)/.installed-test  ## write the generated pages anew
	$(RUN)/python scripts/make_cli_docs.py && $(RUN)/python scripts/make_troubleshooting.py

site: $(VENV)/.installed-docs $(VENV)/.installed-test  ## docs/ as a site, looked at in a browser if there is one
	NO_MKDOCS_2_WARNING=1 $(RUN)/python -m mkdocs build -q
	$(RUN)/python -m pytest -q tests/test_site.py -m "slow or not slow"

wheel: $(VENV)/.installed-test  ## dist/marlinctl-*.whl
	$(RUN)/python -m build -q --wheel

clean:  ## everything that git does not track, but for downloads
	rm -rf $(VENV) build dist site demo-out *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
