# Two commands do everything: `make lab` to learn, `make test` to check.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
ANYWHERE := not slow and not nightly and not compile and not browser and not book and not versions and not gpu
QUICK := $(ANYWHERE) and not thorough

.PHONY: help lab test test-gpu setup book notebooks lint clean

lab: setup  ## open JupyterLab on notebook 00
	@$(BIN)/optinfer lab

test: setup  ## package tests, and every lesson executed from top to bottom
	@$(BIN)/python scripts/build_notebooks.py --check
	@$(BIN)/python -m pytest -q -n 2 --dist loadgroup -m "$(QUICK)"

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@echo "Setting up .venv: a few minutes the first time"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[lab,book,dev]"
	@$(BIN)/optinfer fetch
	@touch $@

book: setup  ## the course as a web site in _build/html
	@$(BIN)/python scripts/build_book.py

notebooks: setup  ## make the notebooks from their masters
	@$(BIN)/python scripts/build_notebooks.py

# Tests with the GPU as the default device: the real one where there is one, else a pretended H100 and a pretended T4.
# Pretended, kernels are interpreted; in rooms that are not about kernels once for each kind of input, then their formula.
KERNEL_ROOMS := tests/pretend_gpu tests/attention tests/quantized_matmul tests/kv_cache
OTHER_ROOMS := tests/speculative tests/serving
GPU_TESTS := OPTINFER_TEST_DEVICE=cuda $(BIN)/python -m pytest -q -m "$(ANYWHERE) or gpu"
test-gpu: setup  ## the package on a GPU, or on a pretended one
	@if $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then $(GPU_TESTS) $(KERNEL_ROOMS) $(OTHER_ROOMS); else \
		for card in h100 t4; do export PRETEND_GPU=$$card; $(GPU_TESTS) -p tests.pretend_gpu.plugin $(KERNEL_ROOMS) || exit 1; \
		PRETEND_KERNELS=once $(GPU_TESTS) -p tests.pretend_gpu.plugin $(OTHER_ROOMS) || exit 1; done; fi

# One room each, in a minute or two: `make test-serving`.
test-%: setup
	@$(BIN)/python -m pytest -q -n 2 --dist loadgroup -m "$(ANYWHERE)" tests/$*

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14
	@echo "test-ROOM     the tests of one room: $$(ls -d tests/*/ | xargs -n1 basename | grep -v __ | tr '\n' ' ')"

lint: setup ## formatting, style, types
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && scripts/lint_widgets.sh

clean:
	rm -rf _build build dist *.egg-info
