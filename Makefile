# Everything here needs Python 3.11 or newer and nothing else: `make demo` and `make test` set themselves up.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help setup demo up test check audit format bench chaos fuzz docs

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.* ## \(.*\)/make \1|\2/p' $(MAKEFILE_LIST) | awk -F '|' '{ printf "%-12s%s\n", $$1, $$2 }'

setup: $(VENV)/.installed ## install everything into .venv; the others do it themselves

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Installing into $(VENV), PyTorch among it: some minutes, the first time alone ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[worker,dev,docs]'
	touch $@

demo: setup ## a question for each task to the bundled model, and demo.html
	$(BIN)/python -m worker.demo

up: setup ## a broker and a worker until Ctrl-C [PORT=6379] [CALLBACKS=http://localhost:8000/hook]
	$(BIN)/python -m worker.demo.up $(if $(PORT),--port '$(PORT)') $(if $(CALLBACKS),--callbacks '$(CALLBACKS)')

test: setup ## all tests
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

check: setup ## lint, types, import rules, repetitions, bandit
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/arid tasks config worker benchmarks
	$(BIN)/bandit --quiet --recursive --configfile pyproject.toml tasks config worker

docs: setup ## the documentation as a site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# It asks the network. Strict: what cannot be looked up fails.
audit: setup ## known vulnerabilities of the pinned packages
	$(BIN)/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

format: setup ## correct what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## measure throughput; takes long
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[worker,dev,bench]'
	$(BIN)/python -m benchmarks.compare --save shipped
	$(BIN)/python -m benchmarks.compare --checkpoint mid-size --jobs 64 --save mid-size

chaos: setup ## 10,000 jobs while everything under them is killed
	$(BIN)/python -m benchmarks.chaos --save

fuzz: setup ## broken images and payloads
	$(BIN)/python -m benchmarks.fuzz --save fuzz
	$(BIN)/python -m benchmarks.corpus --save fuzz
	$(BIN)/python -m benchmarks.envelopes --save envelopes
