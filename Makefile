# Everything a fresh clone needs: `make demo` shows Sparse at work, `make demo-train` trains a network, `make test` proves
# it. `make` alone lists the rest.
#
# Variables:
#   PYTHON       the interpreter for .venv, 3.11 or later; left out: the first that fits of those below
#   TORCH_INDEX  a pip index to take torch and torchvision from, such as PyTorch's own one for CPU builds, which are
#                about 5 GB smaller on disk than the CUDA builds that Linux on x86-64 gets by default
#   PIP_FLAGS    --quiet unless set; `make demo PIP_FLAGS=` shows what pip does
#   TEST_PROCESSES
#                how many processes run the tests side by side: 3 unless set; 0: one test after another

PYTHON ?= python3 python3.13 python3.12 python3.11
TORCH_INDEX ?=
PIP_FLAGS ?= --quiet
# Tests wait more than they compute: for processes that start, and for what is to be noticed.
TEST_PROCESSES ?= 3
SPARSE_CACHE ?= $(CURDIR)/.cache

LOCK := requirements.lock
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install $(PIP_FLAGS) --constraint $(LOCK)
# The build backend comes from the lock too, so the project itself is built without a second, unlocked environment.
PROJECT := $(INSTALL) --no-build-isolation --editable
BENCHMARKS := $(filter-out __init__ conftest,$(basename $(notdir $(wildcard tests/bench/*.py))))

.DEFAULT_GOAL := help
.PHONY: help demo demo-train test soak check bench lock clean
.DELETE_ON_ERROR:

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

# No shell stands between make and `sparse`: a Ctrl-C or a SIGTERM reaches it directly, and make waits for its end.
demo: export SPARSE_CACHE := $(SPARSE_CACHE)
demo: .venv/.stamp-run ## a live detector, cut in three, on a street video; pictures and JSON under runs/
	@$(BIN)/sparse run examples/street.toml --broker embedded

demo-train: .venv/.stamp-train ## train VGG-11, cut in three, on handwritten digits; a plot and the weights under runs/
	@$(BIN)/sparse run examples/digits.toml --broker embedded

# A file is run by one process, in order, so that what its tests share is made once. Files go out in the order of their
# folders, whose last, tests/unit, is of short tests: nobody waits long for the last file.
test: .venv/.stamp-dev ## all tests
	@$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

soak: .venv/.stamp-dev ## the long form of tests/soak, with its figures; takes about half an hour
	@$(BIN)/python -m pytest tests/soak --long

check: .venv/.stamp-dev ## style, types and the import rule
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/.stamp-dev ## all benchmarks, as tables
	@set -e; for name in $(BENCHMARKS); do $(BIN)/python -m tests.bench.$$name; done

# Linux on x86-64 decides the names; on other platforms pip reads only those lines that it needs.
lock: .venv/.stamp-venv ## resolve all dependencies afresh into requirements.lock
	$(PIP) install --quiet --upgrade pip
	$(PIP) install --quiet --dry-run --ignore-installed --report .venv/resolved.json pip --editable '.[dev]'
	@$(BIN)/python .ci/lock.py .venv/resolved.json > $(LOCK)
	@echo "$(LOCK): $$(grep -c == $(LOCK)) packages"

clean: ## remove .venv, dist and all caches of tools; runs/ and downloads stay
	rm -rf .venv dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find brokers stages sources monitor tests -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.stamp-venv:
	@found=; for python in $(PYTHON); do \
	    if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	    echo "Sparse needs Python 3.11 or later, and none of these is: $(PYTHON). Install one, or name one: make PYTHON=..." >&2; exit 1; \
	fi; \
	if ! "$$found" -c 'import ensurepip, venv' 2>/dev/null; then \
	    echo "$$found cannot make virtual environments: install its venv module (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; \
	fi; \
	echo "Making .venv with $$("$$found" --version)."; \
	"$$found" -m venv --clear .venv
	@touch $@

.venv/.stamp-run: pyproject.toml $(LOCK) | .venv/.stamp-venv
	@$(INSTALL) pip
	@$(INSTALL) hatchling editables
	@echo "Installing what Sparse runs on into .venv. The first time this takes a few minutes: PyTorch is several GB."
	@$(if $(TORCH_INDEX),$(INSTALL) --index-url $(TORCH_INDEX) torch torchvision)
	@$(PROJECT) .
	@touch $@

.venv/.stamp-train: .venv/.stamp-run
	@echo "Installing what training is shown with (scikit-learn, matplotlib) into .venv."
	@$(PROJECT) '.[train]'
	@touch $@

.venv/.stamp-dev: .venv/.stamp-run
	@echo "Installing the tools for tests and checks into .venv."
	@$(PROJECT) '.[dev]'
	@touch $@
