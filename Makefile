# A fresh machine needs Python 3.11 or newer; everything else is installed into .venv on first use.
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
# Stamps lie inside .venv, so that removing it removes what they claim.
CREATED := .venv/.created
DEMO := .venv/.installed-demo
TEST := .venv/.installed-test
BENCH := .venv/.installed-bench
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input

.DEFAULT_GOAL := help
.PHONY: help demo test zoo versions soak lint format bench clean

help: ## Show this list
	@echo "make TARGET [ARGS=...] [PYTHON=python3.12]"
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(DEMO) ## See it work, in about a minute (ARGS=--once ends with an exit status)
	@$(BIN)/outbox demo $(ARGS)

test: $(TEST) ## Run every test and check (ARGS="-k claim" narrows it)
	@$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

zoo: $(TEST) ## Put every known defect in, one at a time: named tests must catch each
	@OUTBOX_TEST_ZOO=all $(BIN)/python -m pytest tests/zoo $(ARGS)

versions: $(TEST) ## Run the tests on PostgreSQL 15, 16 and 17 (ARGS="16 17" for some)
	@.ci/versions $(ARGS)

soak: $(TEST) ## Kill, pause and cut for an hour and a half, and enter it in the ledger (ARGS="--seconds 600 --seed 7")
	@$(BIN)/python -m outbox.testing.crash --numbers soak --survivors 1 --ledger docs/reliability.jsonl $(ARGS)

lint: $(TEST) ## Check style, types and layers only
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

format: $(TEST) ## Format the code and apply safe fixes
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

bench: $(BENCH) ## Run the benchmarks
	@$(BIN)/python -m benchmarks $(ARGS)

clean: ## Remove .venv and everything else that can be made again
	@rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo "clean"

$(CREATED):
	@command -v $(PYTHON) >/dev/null || { \
	  echo "outbox needs Python 3.11 or newer, and there is no $(PYTHON);" \
	    "name yours: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit( \
	  "outbox needs Python 3.11 or newer, and $(PYTHON) is %d.%d; " % sys.version_info[:2] + \
	  "name a newer one: make PYTHON=python3.12")'
	@echo "Creating .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv
	@touch $@

$(DEMO): $(CREATED) pyproject.toml
	@echo "Installing outbox and what its demo needs (once)"
	@$(INSTALL) -e '.[demo]'
	@touch $@

$(TEST): $(CREATED) pyproject.toml
	@echo "Installing outbox and what its tests need (once)"
	@$(INSTALL) -e '.[test]'
	@touch $@ $(DEMO)

$(BENCH): $(CREATED) pyproject.toml
	@echo "Installing outbox and what its benchmarks need (once)"
	@$(INSTALL) -e '.[bench]'
	@touch $@ $(DEMO)
