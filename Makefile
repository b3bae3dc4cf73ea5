# Targets for a fresh clone: `make demo` runs a live detector, `make demo-train` trains a network, `make test` runs the
# tests. `make` lists all of them.
#
# Variables:
#   PYTHON          the interpreter for .venv, 3.11 or later (default: the first of those below that fits)
#   TORCH_INDEX     the package index of torch and torchvision, such as PyTorch's own one for CPU builds, which are about
#                   5 GB smaller on disk than the CUDA builds that Linux on x86-64 gets by default
#   PIP_FLAGS       options of pip (default --quiet); `make demo PIP_FLAGS=` shows its progress
#   TEST_PROCESSES  test processes in parallel (default 3); 0 runs one test after another

PYTHON ?= python3 python3.13 python3.12 python3.11
TORCH_INDEX ?=
PIP_FLAGS ?= --quiet
# More than cores: tests wait for processes to start and for events more than they compute.
TEST_PROCESSES ?= 3
SPARSE_CACHE ?= $(CURDIR)/.cache

LOCK := requirements.lock
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install $(PIP_FLAGS) --constraint $(LOCK)
# The build backend comes from the lock too: pip would otherwise build the project in a second, unlocked environment.
PROJECT := $(INSTALL) --no-build-isolation --editable
BENCHMARKS := $(filter-out __init__ conftest zoo,$(basename $(notdir $(wildcard tests/bench/*.py))))

.DEFAULT_GOAL := help
.PHONY: help demo demo-train test test-slow soak check bench lock clean
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

# Without a shell between make and `sparse`, Ctrl-C and SIGTERM reach it directly, and make waits for its exit.
demo: export SPARSE_CACHE := $(SPARSE_CACHE)
demo: .venv/.stamp-run ## a live detector, cut in three, on a street video; pictures and JSON under runs/
	@$(BIN)/sparse run examples/street.toml --broker embedded

demo-train: .venv/.stamp-train ## train VGG-11, cut in three, on handwritten digits; a plot and the weights under runs/
	@$(BIN)/sparse run examples/digits.toml --broker embedded

# One process runs all tests of a file, in order, so that module fixtures are set up once. Files are distributed in the
# order of their folders: the last one, tests/unit, has short tests, so that all processes end at about the same time.
PYTEST := $(BIN)/python -m pytest
PARALLEL := --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

test: .venv/.stamp-dev ## all tests but the slow ones; about 17 minutes
	@$(PYTEST) $(PARALLEL) -m "not slow"

test-slow: .venv/.stamp-dev ## containers, and the long sizes of the soak tests; about 15 minutes
	@$(PYTEST) $(PARALLEL) -m slow

soak: .venv/.stamp-dev ## the soak tests at five times their long sizes, with figures; takes an hour
	@$(PYTEST) tests/soak -m slow --soak-factor 5

check: .venv/.stamp-dev ## style, types and import contracts
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/.stamp-dev ## all benchmarks but the zoo, which takes hours
	@set -e; for name in $(BENCHMARKS); do $(BIN)/python -m tests.bench.$$name; done

# Resolved on Linux on x86-64; on other platforms pip uses the lines of the packages that it installs.
lock: .venv/.stamp-venv ## resolve all dependencies again, into requirements.lock
	$(PIP) install --quiet --upgrade pip
	$(PIP) install --quiet --dry-run --ignore-installed --report .venv/resolved.json pip --editable '.[dev]'
	@$(BIN)/python .ci/lock.py .venv/resolved.json > $(LOCK)
	@echo "$(LOCK): $$(grep -c == $(LOCK)) packages"

clean: ## remove .venv, dist and the caches of tools; keeps runs/ and downloads
	rm -rf .venv dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find brokers stages sources monitor tests -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.stamp-venv:
	@found=; for python in $(PYTHON); do \
	    if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	    echo "Sparse needs Python 3.11 or later; tried: $(PYTHON). Install one, or name it: make PYTHON=..." >&2; exit 1; \
	fi; \
	if ! "$$found" -c 'import ensurepip, venv' 2>/dev/null; then \
	    echo "$$found cannot create virtual environments: install its venv module (Debian: apt-get install python3-venv)" >&2; \
	    exit 1; \
	fi; \
	echo "Creating .venv with $$("$$found" --version)."; \
	"$$found" -m venv --clear .venv
	@touch $@

.venv/.stamp-run: pyproject.toml $(LOCK) | .venv/.stamp-venv
	@$(INSTALL) pip
	@$(INSTALL) hatchling editables
	@echo "Installing the dependencies of Sparse into .venv. PyTorch is several GB: the first time takes a few minutes."
	@$(if $(TORCH_INDEX),$(INSTALL) --index-url $(TORCH_INDEX) torch torchvision)
	@$(PROJECT) .
	@touch $@

.venv/.stamp-train: .venv/.stamp-run
	@echo "Installing the dependencies of the training demo (scikit-learn, matplotlib) into .venv."
	@$(PROJECT) '.[train]'
	@touch $@

.venv/.stamp-dev: .venv/.stamp-run
	@echo "Installing the tools for tests and checks into .venv."
	@$(PROJECT) '.[dev]'
	@touch $@
