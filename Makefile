# Everything here needs Python 3.11 or newer and nothing else: `make demo` and `make test` set themselves up.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: setup demo up test check audit format bench chaos fuzz

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[worker,dev]'
	touch $@

demo: setup
	$(BIN)/python -m worker.demo

# A broker and a worker until Ctrl-C. PORT: another one than 6379.
up: setup
	$(BIN)/python -m worker.demo.up $(if $(PORT),--port $(PORT))

test: setup
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/arid tasks config worker benchmarks
	$(BIN)/bandit --quiet --recursive --configfile pyproject.toml tasks config worker

# Known vulnerabilities of the pinned packages, of which it asks the network. Strict: what cannot be looked up fails.
audit: setup
	$(BIN)/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[worker,dev,bench]'
	$(BIN)/python -m benchmarks.compare --save shipped
	$(BIN)/python -m benchmarks.compare --checkpoint mid-size --jobs 64 --save mid-size

chaos: setup
	$(BIN)/python -m benchmarks.chaos --save

fuzz: setup
	$(BIN)/python -m benchmarks.fuzz --save fuzz
	$(BIN)/python -m benchmarks.corpus --save fuzz
	$(BIN)/python -m benchmarks.envelopes --save envelopes
