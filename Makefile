# Two commands are all a newcomer needs: `make demo` and `make test`.
# Both set up an environment of their own in .venv first.

PYTHON ?= python3
BIN := .venv/bin
SHAKESPEARE ?= ../shared/data/tinyshakespeare.txt

.PHONY: demo test test-fast test-wheel lint torture fuzz dist clean
.PHONY: docs notebooks pictures
.PHONY: bench bench-training bench-texts bench-generation bench-serving bench-tokenizing bench-scaling

demo: .venv/ready
	$(BIN)/mygpt demo

# Each process takes one half of the tests, in order, so that few fixtures are set up in both. (Three
# take a fifth less time on two cores, but then some limits of a second are missed.)
test: .venv/ready-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Without browsers, other processes, machine code and whatever is slow: one to three minutes.
test-fast: .venv/ready-dev
	$(BIN)/python -m pytest --fast -n 2 --dist worksteal

lint: .venv/ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Hundreds of killed, cut, damaged and signalled runs; half an hour. `make test` has it in short.
torture: .venv/ready-dev
	PYTHONPATH=tests $(BIN)/python -m torture

# The parsers of files and requests, a minute each (make fuzz SECONDS=720: an hour in all). What is
# found is stored in tests/fuzzing/found/, from where `make test` repeats it.
SECONDS ?= 60
fuzz: .venv/ready-fuzz
	PYTHONPATH=tests $(BIN)/python -m fuzzing --seconds $(SECONDS)

.venv/ready-fuzz: .venv/ready-dev
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[fuzz]'
	touch $@

# Wheel and source archive of the last commit, each built twice: the bytes must be the same.
dist: export SOURCE_DATE_EPOCH = $(shell git log -1 --format=%ct)
dist: .venv/ready-dev
	@test -z "$$(git status --porcelain)" || { echo "commit or remove the changes first"; exit 1; }
	rm -rf dist build/again && mkdir -p dist build/again
	$(BIN)/python -c "$(BUILD)" dist
	$(BIN)/python -c "$(BUILD)" build/again
	diff -r dist build/again
	sha256sum dist/*

# The wheel of the last commit in a new environment, in a folder without the sources: each command as
# a user runs it, then the tests. The folder is removed afterwards. For example
#   make test-wheel PYTHON=python3.12 CONSTRAINTS=               # the newest dependencies
#   make test-wheel CONSTRAINTS=constraints-oldest.txt TESTS='--fast -W ignore::DeprecationWarning'
#   PYTHONOPTIMIZE=1 make test-wheel                             # without assertions
CONSTRAINTS ?= constraints.txt
TESTS ?= --fast
test-wheel: dist
	wheel=$$(realpath dist/*.whl) && folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
	git archive HEAD | tar --extract --directory "$$folder" --exclude src && cd "$$folder" && \
	$(PYTHON) -m venv .venv && \
	.venv/bin/python -m pip install --quiet $(CONSTRAINTS:%=--constraint %) "$$wheel[dev]" && \
	.venv/bin/python tests/installed.py && .venv/bin/python -m pytest $(TESTS)

BUILD := import sys; from flit_core.buildapi import build_sdist, build_wheel; \
	build_wheel(sys.argv[1]); build_sdist(sys.argv[1])

# Side by side with others, on a machine that does nothing else; an hour.
bench: bench-training bench-generation

# Loss against seconds and tokens per second, beside the tutorial's and nanoGPT's recipes;
# writes docs/benchmarks/.
bench-training: .venv/ready-plots
	$(BIN)/python -m benchmarks.training.throughput $(SHAKESPEARE)
	$(BIN)/python -m benchmarks.training.curves $(SHAKESPEARE) --rounds 3

.venv/ready-plots: .venv/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[plots]'
	touch $@

# The default recipe on texts of many kinds: half a day for all times and seeds, or name some:
# make bench-texts ARGUMENTS="--texts 60k-prose --minutes 0.5,1"
bench-texts: .venv/ready
	$(BIN)/python -m benchmarks.texts.make texts --shakespeare $(SHAKESPEARE)
	$(BIN)/python -m benchmarks.texts texts $(ARGUMENTS)

# Decoding beside transformers, CTranslate2, llama.cpp, ik_llama.cpp, OpenVINO and ONNX Runtime, in
# an environment of their own; writes docs/benchmarks/.
bench-generation: .venv-bench/ready
	PYTHONPATH=src .venv-bench/bin/python -m benchmarks.generation

# Logit lens, contributions, ablation, patching and head scores compared with TransformerLens,
# in the environment of bench-generation.
bench-inside: .venv-bench/ready
	PYTHONPATH=src .venv-bench/bin/python -m benchmarks.inside

# `mygpt serve` beside llama.cpp's server; LLAMA_SERVER is that program, built from its sources.
bench-serving: .venv/ready-dev
	$(BIN)/python -m benchmarks.serving $(LLAMA_SERVER)

# Several processes beside one, and training from a token store beside training from memory.
bench-scaling: .venv/ready
	$(BIN)/python -m benchmarks.scaling $(SHAKESPEARE)

# `mygpt tokenize` beside the tokenizers library's own batches, and the memory it takes.
bench-tokenizing: .venv/ready
	$(BIN)/python -m benchmarks.tokenizing

.venv-bench/ready: benchmarks/peers.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --requirement benchmarks/peers.txt
	touch $@

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	$(BIN)/mygpt warmup
	touch $@

.venv/ready-dev: .venv/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The site, into build/site; a warning or a broken link fails. (--quiet would hide both.) To read it:
# .venv-docs/bin/python -m http.server --directory build/site
docs: .venv-docs/ready
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict

# The extra alone: the reference is read from the sources, so mygpt and torch are not needed.
.venv-docs/ready: pyproject.toml
	$(PYTHON) -m venv .venv-docs
	$(PYTHON) -c 'import tomllib; extras = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
		print(*extras["optional-dependencies"]["docs"], sep="\n")' > .venv-docs/requirements.txt
	.venv-docs/bin/python -m pip install --quiet --requirement .venv-docs/requirements.txt
	touch $@

# Run the notebooks; with their outputs they are in build/notebooks.
notebooks: .venv/ready-notebooks
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m nbconvert --to notebook --execute \
		--output-dir build/notebooks notebooks/*.ipynb

.venv/ready-notebooks: .venv/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[notebooks]'
	touch $@

# The README's pictures, from `mygpt demo` and `mygpt serve`; needs Chromium. Writes docs/pictures/.
pictures: .venv/ready-pictures
	$(BIN)/python -m website.pictures

.venv/ready-pictures: .venv/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[pictures,serve]'
	touch $@

clean:
	rm -rf .venv .venv-bench .venv-docs build dist src/*.egg-info
