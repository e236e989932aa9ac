# make demo | test | check: each builds .venv by itself, and again only when pyproject.toml has changed.
#
# PYTHON=python3.12 picks the interpreter (3.11 or newer). PYTEST="-k twin" passes options to pytest.

PYTHON ?= python3
PYTEST ?=
OUT ?= runs/demo

BIN := .venv/bin
READY := .venv/.ready

.PHONY: help demo test check clean

help:
	@echo "make demo    train a small CNN to half of its FLOPs and write $(OUT)/report.html"
	@echo "make test    run the tests, the doctests and the blocks of the README"
	@echo "make check   formatting, lint, types and the layers of the imports"
	@echo "make clean   remove .venv, caches and runs"

demo: $(READY)
	$(BIN)/setpoint demo --out $(OUT)

test: $(READY)
	$(BIN)/python -m pytest $(PYTEST)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(READY): pyproject.toml
	@PYTHON="$(PYTHON)" bash .ci/venv
	@touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis runs
