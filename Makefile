# make demo | docs | bench-quick | coverage-suites | test | guard | test-slow | soak | nightly | check: each builds .venv by itself, and again only when a pyproject.toml has changed.
# `docs` installs a small part of it.
#
# PYTHON=python3.12 picks the interpreter (3.11 or newer). PYTEST="-k twin" passes options to pytest, JOBS=4 runs it in as many processes.

PYTHON ?= python3
PYTEST ?=
JOBS ?= 2
OUT ?= runs/demo
SITE ?= runs/site
SUITES ?= plain torchvision timm transformers
WORKERS ?= 2
QUICK ?= runs/quick
QUICK_METHODS ?= dense,small,small-long,cubic,setpoint,gmp,torch-pruning-taylor
KILLS ?= 50
RESIZES ?= 2000

BIN := .venv/bin
# The tests start many processes, which need not each compile every file anew.
export PYTHONDONTWRITEBYTECODE :=
READY := .venv/.ready
DOCS_READY := .venv/.docs

.PHONY: help demo docs bench-quick coverage-suites test guard test-slow soak nightly check clean

help:
	@echo "make demo    fine-tune a pretrained network to half of its FLOPs and write $(OUT)/report.html"
	@echo "make docs    build the documentation site into $(SITE), links checked"
	@echo "make bench-quick"
	@echo "             a reduced comparison on three tasks into $(QUICK)"
	@echo "make coverage-suites"
	@echo "             cut every model of $(SUITES) into results/coverage, WORKERS=$(WORKERS) at a time"
	@echo "make test    run the tests, the doctests and the blocks of the README: all but the slow ones"
	@echo "make guard   the size, the golden ledgers, the twins and the conformance battery: a few minutes, after each change"
	@echo "make test-slow"
	@echo "             run the slow tests: some are marked, the others are listed in tests/slow.txt"
	@echo "make soak    kill KILLS=$(KILLS) runs and resize a model RESIZES=$(RESIZES) times, 4 ranks: some ten minutes"
	@echo "make nightly every set-up of training on 1 and 2 ranks, the slow tests, and what needs an accelerator"
	@echo "make check   formatting, lint, types and the layers of the imports"
	@echo "make clean   remove .venv, caches and runs"

demo: $(READY)
	$(BIN)/python examples/demo.py --out $(OUT)

docs: $(DOCS_READY)
	@echo "building the site into $(SITE): under a minute"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir $(SITE)

# The methods of a task take turns in one process, so that their seconds compare. Runs that are done are not done again.
bench-quick: $(READY)
	for task in digits cifar10-mini shakespeare-mini; do \
		$(BIN)/setpoint bench --task $$task --methods $(QUICK_METHODS) --interleaved --out $(QUICK)/$$task && \
		$(BIN)/setpoint report $(QUICK)/$$task || exit 1; \
	done

coverage-suites: $(READY)
	for suite in $(SUITES); do \
		OMP_NUM_THREADS=1 $(BIN)/setpoint coverage $$suite --workers $(WORKERS) --out results/coverage || exit 1; \
	done

# A worker that crashes ends the run: pytest-xdist would wait for ever for the files that it had.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --max-worker-restart=0 -m "not slow" $(PYTEST)

guard: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --max-worker-restart=0 -m "not slow" tests/test_size.py tests/golden tests/twin tests/conformance $(PYTEST)

test-slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --max-worker-restart=0 -m "slow and not gpu" $(PYTEST)

soak: $(READY)
	$(BIN)/python bench/benchmarks/soak.py --resizes $(RESIZES) --kills $(KILLS) --only resized killed "four ranks"

nightly: $(READY)
	$(BIN)/python bench/benchmarks/soak.py --only "matrix on 1 rank" "matrix on 2 ranks"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow or gpu" -rs

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(READY): pyproject.toml bench/pyproject.toml
	@PYTHON="$(PYTHON)" bash .ci/venv
	@touch $@

# The site needs neither PyTorch nor the library; where the development tools are installed, it needs nothing more.
$(DOCS_READY): pyproject.toml
	@[ $(READY) -nt pyproject.toml ] || PYTHON="$(PYTHON)" bash .ci/venv docs
	@touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis runs
