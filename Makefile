# Needs GNU make and Python >= 3.10; everything else goes into $(VENV).
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
UNFINISHED := $(patsubst %/,%,$(VENV)).incomplete
CONSTRAINTS := requirements/constraints.txt
TORCH := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' $(CONSTRAINTS))
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
DOCS := $(wildcard README.md) lightning_qnoise
# kernels/ imports triton, which is not there on every platform.
DOCTEST := --doctest-modules --doctest-glob=README.md --ignore=lightning_qnoise/kernels

.PHONY: help install demo test slow lint types docs notebooks bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo '  ARGS="-k name" goes on to pytest, PYTHON=python3.12 and VENV=path choose the interpreter and the environment'

install: $(STAMP)  ## create .venv with all that the other targets need (they do it themselves)

demo: $(STAMP)  ## train, quantize and compare small models on embedded data
	@$(BIN)/python -m lightning_qnoise.demos $(ARGS)

test: $(STAMP)  ## the default test suite and the examples in the docstrings
	@echo "[test] tests and docstrings"
	@$(BIN)/python -m pytest $(DOCTEST) tests lightning_qnoise $(ARGS)

slow: $(STAMP)  ## the long tests
	@echo "[slow] long tests"
	@$(BIN)/python -m pytest -m slow $(ARGS) || { code=$$?; test $$code -eq 5 || exit $$code; }

lint: $(STAMP)  ## ruff
	@echo "[lint] ruff"
	@$(BIN)/python -m ruff check .

types: $(STAMP)  ## mypy
	@echo "[types] mypy"
	@$(BIN)/python -m mypy

docs: $(STAMP)  ## the examples in the README and the docstrings
	@echo "[docs] $(DOCS)"
	@$(BIN)/python -m pytest $(DOCTEST) $(DOCS) $(ARGS)

notebooks: $(STAMP)  ## execute every notebook (they are not rewritten)
	@for notebook in $(wildcard notebooks/*.ipynb); do \
		echo "[notebooks] $$notebook"; \
		$(BIN)/python -c "from nbclient.cli import main; main()" "$$notebook" || exit 1; \
	done

bench: $(STAMP)  ## run the benchmarks
	@for bench in $(wildcard benchmarks/[a-z]*.py); do \
		echo "[bench] $$bench"; \
		$(BIN)/python "$$bench" $(ARGS) || exit 1; \
	done

clean:  ## remove the environment and everything that was built
	rm -rf .venv .venv.incomplete build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The marker beside a new environment means: not finished, so an interrupted first install starts over.
# A directory that is no environment is never cleared. The stamp is the last thing written.
$(STAMP): setup.cfg $(CONSTRAINTS)
	@if [ -e $(UNFINISHED) ] || [ ! -x $(BIN)/python ]; then \
		if [ -n "$$(ls -A $(VENV) 2>/dev/null)" ] && [ ! -e $(UNFINISHED) ] && [ ! -e $(VENV)/pyvenv.cfg ]; then \
			echo "$(VENV) exists and is not a virtual environment" >&2; exit 1; \
		fi; \
		python=; \
		for candidate in "$(PYTHON)" python3 python3.13 python3.12 python3.11 python3.10; do \
			"$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
				&& { python="$$candidate"; break; }; \
		done; \
		if [ -z "$$python" ]; then \
			echo "Python 3.10 or newer is needed and none was found: make PYTHON=/path/to/python3" >&2; exit 1; \
		fi; \
		echo "[install 1/3] $(VENV) with $$("$$python" -V)"; \
		touch $(UNFINISHED); \
		"$$python" -m venv --clear $(VENV) || { \
			echo "No environment could be created; on Debian and Ubuntu the package python3-venv is missing." >&2; \
			exit 1; }; \
	fi
	@echo "[install 2/3] $(TORCH) (large: the first time takes minutes)"
	@$(PIP) install -qq $(TORCH) -c $(CONSTRAINTS)
	@echo "[install 3/3] lightning-qnoise[dev]"
	@$(PIP) install -qq -c $(CONSTRAINTS) -e '.[dev]'
	@rm -f $(UNFINISHED)
	@touch $@
