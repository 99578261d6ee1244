# Every target sets up what it needs: Python 3.11 with pip and venv, a C compiler and make are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile
# In place of pip, which compiles 340 MB of Python on one core. Some packages have files that are no Python of this version.
COMPILE := $(BIN)/python -W ignore -m compileall -qq -j 0 $(VENV)/lib || true
READY := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
STACK := $(VENV)/.installed-stack
DOCS_VENV := .venv-docs
DOCS := $(DOCS_VENV)/.installed

.PHONY: quickstart stack docs docs-serve test test-loop test-sglang test-unit test-megatron test-fast test-faults test-full lint clean

$(READY): requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -r requirements.txt
	$(INSTALL) --no-deps --no-build-isolation -e .
	$(COMPILE)
	touch $@

$(DEV): $(READY) requirements-dev.txt
	$(INSTALL) -r requirements-dev.txt
	$(COMPILE)
	rm -f $(STACK)  # pip puts back what the stack has in another version, such as triton: it is to come last
	touch $@

# SGLang and Megatron-Core as their wheels ship them, without the CUDA packages their metadata names
$(STACK): $(READY) requirements-stack.txt
	$(INSTALL) --no-deps --ignore-requires-python -r requirements-stack.txt
	$(COMPILE)
	touch $@

# An environment of its own: nothing that builds the site is needed by Verst, and its pins need not agree with any other
$(DOCS): requirements-docs.txt
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-compile -r requirements-docs.txt
	touch $@

quickstart: $(READY)
	$(BIN)/python examples/quickstart.py

stack: $(STACK)

# build/site/index.html can be opened as a file. Never with --quiet, which hides warnings from --strict too.
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict

docs-serve: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs serve

# Two at a time, one for each core of a small machine, the longest first. Each is a process of its own: Megatron-Core and Ray change the
# process they are imported into, and what follows must not depend on that. SGLang's servers are shared by all tests of one process.
test: $(DEV) $(STACK)
	OMP_NUM_THREADS=1 $(MAKE) --no-print-directory --output-sync=line --keep-going -j2 test-sglang test-loop test-megatron test-unit

test-sglang:
	$(BIN)/python -m pytest -q -m "not faults" tests/stack tests/contracts --ignore-glob='*/test_megatron*'

test-loop:
	$(BIN)/python -m pytest -q -m "not faults" tests/loop tests/faults

test-megatron:
	$(BIN)/python -m pytest -q tests/stack/test_megatron*.py

test-unit:
	$(BIN)/python -m pytest -q tests/unit tests/gpu

test-fast: $(DEV) $(STACK)
	$(BIN)/python -m pytest -q -m "not slow" tests/unit tests/gpu tests/loop tests/faults tests/contracts tests/stack

# Every kind of process is killed or stopped at every moment of a step, one run after another
test-faults: $(DEV) $(STACK)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m faults tests/faults tests/stack/test_stack_faults.py

# Every algorithm that learns from rewards, three times to the end
test-full: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m full tests/full

lint: $(DEV) $(STACK)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf $(VENV) $(DOCS_VENV) build *.egg-info .pytest_cache .ruff_cache
