# SPDX-License-Identifier: Apache-2.0
# Two commands matter on a fresh machine: `make quickstart` and `make test`. Both install what they need into .venv.
# DISCQUANT_PYTHON=/path/to/python uses that interpreter with the torch it has, without .venv and without network.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install quickstart test fuzz kill-resume sanitize lint bench gpu run-gpu scale interop clean

export PIP_DISABLE_PIP_VERSION_CHECK := 1
EXTENSION := setup.py $(shell find csrc -type f 2>/dev/null)
WORKERS ?= 2
PYTEST_ARGS ?=
INTEROP_ARGS ?=
FUZZ_ARGS ?=

ifdef DISCQUANT_PYTHON
PYTHON := $(DISCQUANT_PYTHON)
STAMPS := build/stamps
else
PYTHON := .venv/bin/python
STAMPS := .venv
endif
# The scripts beside the interpreter. Bare `pytest`, not `python -m pytest`: the latter puts the checkout on sys.path,
# where triton_kernels/ would shadow the package of that name from Triton's own project.
BIN = $(shell $(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
# Parallel only where pytest-xdist is installed (always so in .venv). Few tests are handed out at a time, the slow ones
# first (tests/conftest.py), so that no worker is left with a long one at the end.
PARALLEL = $(shell $(PYTHON) -c 'import importlib.util as u; print("-n $(WORKERS) --maxschedchunk=8" if u.find_spec("xdist") else "")')

help:
	@echo "make quickstart   install, quantize the bundled model at 3 bits, compare with RTN and GPTQ, generate text"
	@echo "make test         install, lint, and every test that this machine can run"
	@echo "make fuzz         ten thousand damaged files of every format: a clear error each time (minutes)"
	@echo "make kill-resume  kill -9 at 20 random moments, resume, compare bytes (minutes)"
	@echo "make install      make .venv with everything in it"
	@echo "make lint         ruff and mypy"
	@echo "make bench        benchmarks that this machine can run"
	@echo "make interop      real tools, each in its own environment under .venvs, read our files; refine theirs (hours)"
	@echo "make gpu          on a machine with a GPU: build for it, then all tests and benchmarks"
	@echo "make scale        on a machine with a GPU: solver steps at Llama 8B and 70B shapes, resident and streamed"
	@echo "make clean        remove build products (not .venv)"

install: $(STAMPS)/.extension

ifdef DISCQUANT_PYTHON
$(STAMPS)/.dependencies:
	@$(PYTHON) -c 'import torch, transformers, setuptools' || { echo "DISCQUANT_PYTHON=$(PYTHON) needs torch, transformers and setuptools" >&2; exit 1; }
	@mkdir -p $(STAMPS) && touch $@
else
$(PYTHON):
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "python3 must be 3.10 or later, got $$(python3 --version 2>&1)" >&2; exit 1; }
	python3 -m venv .venv

# torch first and alone, then everything else held to the same versions by constraints.txt.
$(STAMPS)/.dependencies: pyproject.toml constraints.txt | $(PYTHON)
	$(PYTHON) -m pip install -q "$$(grep '^torch==' constraints.txt)"
	$(PYTHON) -m pip install -q -c constraints.txt setuptools wheel ninja
	DISCQUANT_BUILD=none $(PYTHON) -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@
endif

$(STAMPS)/.extension: $(STAMPS)/.dependencies $(EXTENSION) triton_kernels/__init__.py
	$(PYTHON) -m pip install -q --no-build-isolation --no-deps -e .
	@touch $@

quickstart: install
	$(PYTHON) examples/quickstart.py

test: install
	$(BIN)/pytest $(PARALLEL) $(PYTEST_ARGS)

# Expensive proof: 20 runs killed at random moments; writes benchmarks/results/kill_resume.json.
kill-resume: install
	$(BIN)/pytest -m full -k twenty_random_kills tests/run

# Writes benchmarks/results/fuzz.json and continues from it. FUZZ_ARGS: --count N --formats a,b
fuzz: install
	$(PYTHON) tests/fuzz/harness.py --out benchmarks/results/fuzz.json $(FUZZ_ARGS)

# The CPU kernels of csrc/packed under the address and undefined-behaviour sanitizers.
sanitize: install
	$(MAKE) -C csrc/packed sanitize

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict discquant

bench: install
	$(BIN)/pytest benchmarks -o addopts=--import-mode=importlib --benchmark-only $(PYTEST_ARGS)

# Builds for the GPU that is here, tests, measures, compares with the targets; GPU_ARGS: --set quick|all, --tune, --steps ...
# Without .venv the python3 whose torch sees a GPU is taken as it is, and no network is needed.
gpu:
	@if [ -z "$(DISCQUANT_PYTHON)" ] && [ ! -x .venv/bin/python ] && python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; \
	then $(MAKE) run-gpu DISCQUANT_PYTHON=python3; else $(MAKE) run-gpu; fi

run-gpu: $(STAMPS)/.dependencies
	@rm -f $(STAMPS)/.extension
	$(PYTHON) benchmarks/run_gpu.py $(GPU_ARGS)

# Writes benchmarks/results/<device>-scale.json. SCALE_ARGS: --shape 8b,70b --blocks 4,8 --seconds 100 ...
scale: install
	$(PYTHON) benchmarks/scale_gpu.py $(SCALE_ARGS)

# One environment per tool under .venvs/ (about 12 GB; llama.cpp is compiled); finished rows are kept. Writes docs/interop.md.
# INTEROP_ARGS: --only 'gguf*' ..., --again, --list, --build [TOOL ...], --produce.
interop: install
	$(PYTHON) tests/interop $(INTEROP_ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks $(STAMPS)/.extension
	rm -f discquant/_C*.so
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
