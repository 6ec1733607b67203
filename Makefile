# The interpreter that makes the environment: `PYTHON=python3.12 make setup`.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.setup-done

# Small matrices run slower on two threads than on one, and tests run in several processes.
export OMP_NUM_THREADS ?= 1
# Some images ask for no bytecode. Then every process, and tests start many, compiles torch and the
# libraries on it anew, which takes longer than most tests.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-portable lint clean

help:  ## print this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*##/\t/' | expand -t 15

setup: $(STAMP)  ## make .venv with the pinned environment (several GB: torch brings CUDA along)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or later is needed. Try: PYTHON=python3.12 make setup" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv || { echo "$(PYTHON) has no working 'venv' module."\
		"On Debian and Ubuntu: apt-get install python3-venv; or: PYTHON=python3.12 make setup" >&2; exit 1; }
	@echo "Installing into .venv: several GB, a few minutes."
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[all,dev]"
	@touch $@

demo: setup  ## a small run on the CPU
	$(BIN)/python scripts/demo.py

test: setup  ## run every test
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-portable: setup  ## run every test on each instruction set, on two threads, and under load
	scripts/test_portable.sh

lint: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## remove the environment, caches and builds; runs/ is kept
	rm -rf .venv build *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
