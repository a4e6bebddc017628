# make quickstart   sets everything up and takes text to a model that transformers loads, in minutes on a CPU
# make test         sets everything up and runs all checks and tests
# make soak         lets a run die a hundred times and compares what is left with one that did not; takes half an hour
# make breakages    breaks maxi in seven ways that nobody would see and shows the test that does
# make gpu-compile  compiles the GPU kernels for an H100, without one; needs Python 3.12 and 5 GB for CUDA's packages

PYTHON ?= python3
GPU_PYTHON ?= python3.12
VENV := .venv
BIN := $(VENV)/bin
LIVES ?= 100
CONFIG ?= configs/quickstart.yaml

.PHONY: quickstart test check format install soak breakages gpu-compile clean

quickstart: $(VENV)/.lean
	$(BIN)/maxi quickstart $(CONFIG)

test: check

check: $(VENV)/.test
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder

format: $(VENV)/.test
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

install: $(VENV)/.lean

soak: $(VENV)/.test
	$(BIN)/python -m tests.soak --lives $(LIVES)

breakages: $(VENV)/.test
	$(BIN)/python -m tests.breakages

gpu-compile: $(VENV)-gpu/.cuda
	$(VENV)-gpu/bin/python tests/peers/gpu_compile.py

$(VENV)-gpu/.cuda: pyproject.toml
	$(GPU_PYTHON) -m venv $(VENV)-gpu
	$(VENV)-gpu/bin/python -m pip install --quiet --editable '.[cuda13]' nvidia-cuda-nvdisasm
	touch $@

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "maxi needs Python 3.11 or later, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.lean: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@ $(VENV)/.lean

clean:
	rm -rf $(VENV) $(VENV)-gpu runs .pytest_cache .ruff_cache .import_linter_cache
