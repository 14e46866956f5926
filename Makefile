# `make demo` and `make test` need nothing but Python 3.11 or later, make and a C++ compiler; they set up .venv themselves.
PYTHON ?= python3
BIN = .venv/bin
# For another build of torch: make demo PIP_FLAGS="--index-url ..." CONSTRAINTS=my-constraints.txt
CONSTRAINTS ?= constraints.txt
PIP_FLAGS ?=

.PHONY: demo test check lint clean

demo: .venv/installed
	$(BIN)/atoll demo $(ARGS)

test: .venv/installed
	$(BIN)/python -m pytest $(ARGS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test

.venv/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) $(PIP_FLAGS) torch
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) $(PIP_FLAGS) --editable ".[test,s3]"
	touch $@

clean:
	rm -rf .venv
