# Two commands are all a newcomer needs: `make demo` and `make test`.
# Both set up an environment of their own in .venv first.

PYTHON ?= python3
BIN := .venv/bin
SHAKESPEARE ?= ../shared/data/tinyshakespeare.txt

.PHONY: demo test lint bench clean

demo: .venv/ready
	$(BIN)/mygpt demo

test: .venv/ready-dev
	$(BIN)/python -m pytest -n 2

lint: .venv/ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The tutorial's training run beside a plain loop of the same model and batches.
bench: .venv/ready
	$(BIN)/python benchmarks/training_loop.py $(SHAKESPEARE)

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/ready-dev: .venv/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build src/*.egg-info
