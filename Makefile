# make demo | test | test-all | matrix | install | lint : everything is set up on the way.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)

.PHONY: install demo test test-all matrix lint wheel-test clean

install: $(VENV)/.installed

# A machine with a GPU takes the default (CUDA) build of torch. Without one, the CPU build is asked for first;
# where the package index has none by that name, the default build serves too.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@if command -v nvidia-smi >/dev/null 2>&1; then \
	  $(BIN)/pip install -q "torch==$(TORCH)"; \
	else \
	  $(BIN)/pip install -q "torch==$(TORCH)+cpu" 2>/dev/null || $(BIN)/pip install -q "torch==$(TORCH)"; \
	fi
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@

demo: install
	$(BIN)/flowmill demo

# What was skipped, and why, is printed at the end (-ra). Two files run at a time; what measures time, alone.
TWICE = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
test: install
	$(TWICE) -m "not slow and not alone"
	$(BIN)/python -m pytest -m "not slow and alone"

test-all: install
	$(TWICE) -m "not alone"
	$(BIN)/python -m pytest -m alone

# docs/layouts.md: every family under every layout; minutes.
matrix: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.matrix

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build dist *.egg-info runs
