# `make help` lists the targets. Each one sets up .venv when it has to.
#   make demo DEMO_ARGS="--help"      make test PYTEST_ARGS="-k tokenizer"      make test PYTHON=python3.12

PYTHON ?= python3
WORKERS ?= 2
DEMO_ARGS ?=
PYTEST_ARGS ?=

# The smallest build that computes logits; without GGML_NATIVE, because of GCC 12 on processors with AMX.
LLAMA_CMAKE_ARGS := $(addprefix -D,$(addsuffix =OFF,GGML_NATIVE GGML_OPENMP GGML_LLAMAFILE LLAVA_BUILD LLAMA_CURL \
	LLAMA_BUILD_TESTS LLAMA_BUILD_TOOLS LLAMA_BUILD_EXAMPLES LLAMA_BUILD_SERVER))

VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
SHELL := /bin/bash

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-llama test-upstream lint format docs wheel clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## Make .venv with the package (editable) and everything needed to work on it

# torch first and by its pinned version: it decides what the rest resolves to. The stamp is written last,
# so an interrupted installation is taken up again.
$(READY): setup.py constraints.txt
	@echo "Setting up $(VENV) with the tested versions: a minute, or more where packages have to be downloaded"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.12 ...")'
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -c constraints.txt setuptools torch
	$(PY) -m pip install -q -c constraints.txt --no-build-isolation -e ".[dev]"
	@touch $@

demo: $(READY) ## Train, save, reload and generate with a tiny GRIN on real text (DEMO_ARGS="...")
	$(PY) recipes/demo.py $(DEMO_ARGS)

# Files in alphabetical order: those with several processes, which take longest, come first and leave no gap at the end.
test: $(READY) ## Run the tests (PYTEST_ARGS="...", WORKERS=2)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-llama: $(READY) ## Build llama-cpp-python (4 minutes) and run the tests that need it
	CMAKE_ARGS="$(LLAMA_CMAKE_ARGS)" CMAKE_BUILD_PARALLEL_LEVEL=$(WORKERS) \
		$(PY) -m pip install -q -c constraints.txt --no-binary llama-cpp-python llama-cpp-python
	$(PY) -m pytest tests/test_gguf.py -k llama

test-upstream: $(READY) ## Run the tests of transformers, peft and trl on ours and on stock models (see CONTRIBUTING.md)
	$(PY) -m pip install -q -c constraints.txt -e ".[dev,upstream]"
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest -c tests/upstream/pytest.ini -n $(WORKERS) tests/upstream $(PYTEST_ARGS)

lint: $(READY) ## Check style, formatting and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(READY) ## Apply the formatter and the safe fixes
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

docs: $(READY) ## Build the documentation's site in site/
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

wheel: $(READY) ## Build dist/*.whl
	rm -rf build dist
	$(PY) -m pip wheel -q . --no-deps --no-build-isolation -w dist
	@rm -rf build
	@ls dist/*.whl

clean: ## Remove .venv and everything built
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
