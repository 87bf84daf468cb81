# Every target sets up what it needs: .venv with the pinned versions of requirements/, once.

PYTHON ?= python3
CONFIG ?= configs/tiny.py
WORKDIR ?= runs/$(basename $(notdir $(CONFIG)))
PROMPT ?= Once upon a time
ARGS ?=
PART ?= 1/1
MINUTES ?= 0

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq install

# The jax extra that fits the NVIDIA driver: cuda13 (driver 580 or newer), cuda12, or nothing.
DRIVER := $(shell { cat /proc/driver/nvidia/version || nvidia-smi; } 2>/dev/null | \
	sed -nE 's/.*(Kernel Module|Driver Version:).* +([0-9]{3,})\.[0-9.]+ .*/\2/p' | head -n 1)
ACCELERATOR ?= $(if $(DRIVER),$(shell [ $(DRIVER) -ge 580 ] && echo cuda13 || echo cuda12))

RUNTIME := $(VENV)/.runtime$(ACCELERATOR:%=-%)
DEV := $(VENV)/.dev$(ACCELERATOR:%=-%)
GPU_COMPILER := $(if $(ACCELERATOR),,$(VENV)/.gpu-compiler)

.PHONY: help train test test-slow test-mutants lint format clean

help: ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1|\2/p' Makefile | awk -F'|' '{printf "%-18s%s\n", $$1, $$2}'
	@echo
	@echo 'train takes CONFIG=$(CONFIG) WORKDIR=$(WORKDIR) PROMPT="$(PROMPT)" ARGS="--mesh.fsdp=2"; test takes ARGS="-k config".'
	@echo 'test-slow takes MINUTES=15, after which no test begins (those are named and do not fail).'
	@echo 'All take PYTHON=python3.12 (the interpreter of a new .venv) and ACCELERATOR=cuda12, cuda13 or empty.'

train: $(RUNTIME) ## train CONFIG into WORKDIR, then write a text after PROMPT (installs the runtime only)
	$(BIN)/python -m jaxpar.train --config='$(CONFIG)' --workdir='$(WORKDIR)' $(ARGS)
	$(BIN)/python -m jaxpar.generate --checkpoint='$(WORKDIR)' --prompt='$(PROMPT)'

test: $(DEV) $(GPU_COMPILER) ## run the tests
	$(BIN)/python -m pytest -q -n 2 $(ARGS)

test-slow: $(DEV) $(GPU_COMPILER) ## run the slow tests, or PART=3/12 of them
	$(BIN)/python -m pytest -q -n 2 -m slow -rs --no-fold-skipped --part=$(PART) --minutes=$(MINUTES) $(ARGS)

test-mutants: $(DEV) $(GPU_COMPILER) ## change the code in 60 places: does a test notice?
	$(BIN)/python scripts/mutants.py $(ARGS)

lint: $(DEV) ## check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check

format: $(DEV) ## format, and fix what can be fixed
	$(BIN)/ruff check --fix --quiet --exit-zero .
	$(BIN)/ruff format .

clean: ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written after its install is complete, so that an interrupted one is taken up again.

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo 'jaxpar needs Python 3.11 or newer, and $(PYTHON) is not; name one: make PYTHON=python3.12' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo '$(PYTHON) has no venv module; install it (Debian, Ubuntu: apt-get install python3-venv)' >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(RUNTIME): pyproject.toml requirements/lock.txt | $(VENV)/.python
	@echo 'Installing jaxpar$(ACCELERATOR:%=[%]) into $(VENV) ...'
	@$(PIP) -c requirements/lock.txt -e '.$(ACCELERATOR:%=[%])'
	@touch $@

$(DEV): requirements/dev.txt $(RUNTIME)
	@echo 'Installing the tools for tests and lint into $(VENV) ...'
	@$(PIP) -c requirements/dev.txt -e '.[dev$(ACCELERATOR:%=,%)]'
	@touch $@

# XLA's GPU compiler, for tests where there is no GPU. Not in .venv itself: see pyproject.toml.
$(VENV)/.gpu-compiler: requirements/lock.txt | $(VENV)/.python
	@rm -rf $(VENV)/gpu-compiler
	@$(PIP) -c requirements/lock.txt --no-deps --target $(VENV)/gpu-compiler jax-cuda12-plugin jax-cuda12-pjrt
	@touch $@
