# Every target sets up what it needs: Python 3.11 with pip and venv, a C compiler and make are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
STACK := $(VENV)/.installed-stack

.PHONY: quickstart stack test test-loop test-sglang test-unit test-megatron test-fast lint clean

$(READY): requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

$(DEV): $(READY) requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

# SGLang and Megatron-Core as their wheels ship them, without the CUDA packages their metadata names
$(STACK): $(READY) requirements-stack.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python -r requirements-stack.txt
	touch $@

quickstart: $(READY)
	$(BIN)/python examples/quickstart.py

stack: $(STACK)

# Two at a time, one for each core of a small machine, the longest first. Each is a process of its own: Megatron-Core and Ray change the
# process they are imported into, and what follows must not depend on that.
test: $(DEV) $(STACK)
	OMP_NUM_THREADS=1 $(MAKE) --no-print-directory --output-sync=line -j2 test-loop test-sglang test-unit test-megatron

test-loop:
	$(BIN)/python -m pytest -q tests/loop

test-sglang:
	$(BIN)/python -m pytest -q tests/stack --ignore-glob='*/test_megatron*'

test-unit:
	$(BIN)/python -m pytest -q tests/unit tests/gpu tests/contracts

test-megatron:
	$(BIN)/python -m pytest -q tests/stack/test_megatron*.py

test-fast: $(DEV) $(STACK)
	$(BIN)/python -m pytest -q -m "not slow" tests/unit tests/gpu tests/loop tests/contracts tests/stack

lint: $(DEV) $(STACK)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
