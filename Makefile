# Two commands for a newcomer:  make demo  (sets up, trains a small study, shows the result)   make test  (sets up, passes the tests)
# Needs Python 3.11 or 3.12, pip and make. pip takes the torch build that its index offers for the platform.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup demo test test-fast test-faults soak test-gpu test-paper lint bench-orchestration bench-checkpoints clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 12) else f"decay needs Python 3.11 or 3.12, found {v[0]}.{v[1]}: make setup PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	$(BIN)/decay demo

test: setup
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -x -q -m 'not gpu and not paper and not faults'

test-fast: setup
	$(BIN)/python -m pytest -x -q -m 'not gpu and not paper and not faults and not slow'

# Kills of workers, drivers and nodes in every phase, whole studies each: about an hour on two cores. Prints a table of what was fired and what came of it.
test-faults: setup
	@mkdir -p runs
	DECAY_FAULT_TABLE=$(CURDIR)/runs/faults.jsonl $(BIN)/python -m pytest -q -s -m "faults and not gpu" tests
	$(BIN)/python tests/faults/table.py runs/faults.jsonl

# Random kills of every kind over small whole studies until SOAK_KILLS more have fired; each call goes on where the last one stopped.
SOAK_KILLS ?= 20
SOAK_SEED ?= 1
soak: setup
	$(BIN)/python tests/faults/soak.py --seed $(SOAK_SEED) --kills $(SOAK_KILLS) --folder runs/soak
	$(BIN)/python tests/faults/table.py runs/soak/seed-$(SOAK_SEED)/rows.jsonl

test-gpu: setup
	$(BIN)/python -m pytest -x -q -m gpu

# All 39 configurations of the paper at nano size through the whole service: under 35 minutes on two cores.
test-paper: setup
	$(BIN)/python -m pytest -x -q -s -m paper

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench-orchestration: setup
	$(BIN)/python benchmarks/orchestration.py

bench-checkpoints: setup
	$(BIN)/python benchmarks/checkpoint_stall.py

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
