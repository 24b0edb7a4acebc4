# All targets need Python 3.11 or newer and nothing else; each installs what it needs into .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help setup demo up test testall check audit format bench chaos fuzz docs

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.* ## \(.*\)/make \1|\2/p' $(MAKEFILE_LIST) | awk -F '|' '{ printf "%-14s%s\n", $$1, $$2 }'

setup: $(VENV)/.installed ## install everything into .venv; the other targets do it themselves

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Installing into $(VENV), with PyTorch: this takes some minutes, once ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[worker,dev,docs]'
	touch $@

demo: setup ## ask a bundled model one question for each task; write demo.html [MODEL=smolvlm]
	$(BIN)/python -m worker.demo $(if $(MODEL),--model '$(MODEL)')

up: setup ## run a broker and a worker until Ctrl-C [PORT=6379] [CALLBACKS=http://localhost:8000/hook]
	$(BIN)/python -m worker.demo.up $(if $(PORT),--port '$(PORT)') $(if $(CALLBACKS),--callbacks '$(CALLBACKS)')

# The tests start hundreds of Python processes: with the variable unset, none compiles what another one has.
test: setup ## run all tests
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

testall: ## run all tests, those of the models with each checkpoint in both layouts of its cache
	EVERY_LAYOUT=1 $(MAKE) test

check: setup ## lint, types, import rules, repeated code, bandit
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/arid tasks config worker benchmarks
	$(BIN)/bandit --quiet --recursive --configfile pyproject.toml tasks config worker

docs: setup ## build the documentation as a site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Needs the network. With --strict a package that cannot be looked up is a failure.
audit: setup ## list known vulnerabilities of the pinned packages
	$(BIN)/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

format: setup ## correct what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## measure throughput; takes long
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[worker,dev,bench]'
	$(BIN)/python -m benchmarks.compare --save shipped
	$(BIN)/python -m benchmarks.compare --checkpoint mid-size --jobs 64 --save mid-size

chaos: setup ## run 10,000 jobs while processes and connections are killed
	$(BIN)/python -m benchmarks.chaos --save

fuzz: setup ## run broken images, payloads and messages
	$(BIN)/python -m benchmarks.fuzz --save fuzz
	$(BIN)/python -m benchmarks.corpus --save fuzz
	$(BIN)/python -m benchmarks.envelopes --save envelopes
