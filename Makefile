# `make demo` needs nothing but Python 3.11 or later and make, `make test` a C++ compiler too; they set up .venv themselves.
PYTHON ?= python3
BIN = .venv/bin
# For another build of torch: make demo PIP_FLAGS="--index-url ..." CONSTRAINTS=my-constraints.txt
CONSTRAINTS ?= constraints.txt
PIP_FLAGS ?=

.PHONY: demo demo-chat test soak fuzz check lint docs config-docs clean

demo: .venv/installed
	$(BIN)/atoll demo $(ARGS)

demo-chat: .venv/installed
	$(BIN)/atoll demo --chat $(ARGS)

# One for all that starts processes, which is first in line, one for the rest (tests/conftest.py). One that a test's time
# limit ends is not replaced, so that the test is named.
TWO_WORKERS = -n 2 --no-loadscope-reorder --max-worker-restart=0

test: .venv/installed
	$(BIN)/python -m pytest $(TWO_WORKERS) --durations=20 -rs $(ARGS)

soak: .venv/installed
	$(BIN)/python -m pytest -m soak $(TWO_WORKERS) --durations=20 -rs $(ARGS)

# Any number of inputs for all that reads bytes of others: make fuzz N=10000000
N ?= 1000000
fuzz: .venv/installed
	$(BIN)/python -m tests.fuzz.many --inputs $(N) $(ARGS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test

# The pages as a site in build/site, every link of theirs checked; it asks no other host for anything.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.venv/docs: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) $(PIP_FLAGS) --editable ".[docs]"
	touch $@

config-docs: .venv/installed
	$(BIN)/atoll config keys --markdown > configuration.md.new
	mv configuration.md.new docs/configuration.md

.venv/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) $(PIP_FLAGS) torch
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) $(PIP_FLAGS) --editable ".[test,s3]"
	touch $@

clean:
	rm -rf .venv
