# make demo   train Dreamer on Humanoid-v4 for a few minutes, save it, evaluate it
# make test   lint, types and tests
# make format put the sources into ruff's format
#
# Both set up a virtual environment first (VENV, .venv if not given) with PYTHON (python3 if not given).

PYTHON ?= python3
VENV ?= .venv
# Installed before everything else: with a torch in place, no other package brings a second one (several GB with CUDA).
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := sb3_dreamer benchmarks examples tests

.PHONY: demo test lint types pytest format

demo: $(VENV)/.demo
	$(BIN)/python examples/humanoid.py

test: lint types pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: $(VENV)/.dev
	$(BIN)/mypy

# Two processes of one thread each: networks of this size gain nothing from a second thread.
pytest: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

format: $(VENV)/.dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) install -e ".[mujoco,progress]"
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) install -e ".[dev]"
	touch $@

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "$(TORCH)"
	touch $@
