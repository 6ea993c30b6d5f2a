# Every target sets up what it needs: a virtual environment in .venv with the versions of constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RANKS ?= 2

# The tests run on several processes, each with one thread, unless the caller says otherwise.
export OMP_NUM_THREADS ?= 1

.PHONY: train test lint types install clean

train: $(READY)  ## train a small GPT on two ranks, show its plan, compare with one process
	$(BIN)/torchrun --nproc-per-node $(RANKS) examples/train_text.py

test: $(READY)  ## the whole test suite
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(READY)
	$(BIN)/ruff check

# mypy needs the package under its own name, which a checkout's folder need not have.
types: $(READY)
	mkdir -p .mypy_cache/src
	ln -sfn "$(CURDIR)" .mypy_cache/src/opweave
	MYPYPATH=.mypy_cache/src $(BIN)/mypy -p opweave.cost_model -p opweave.runtime -p opweave.compiler -m opweave.cli -m opweave.torch_compat -m opweave.zoo -m opweave.calibration -m opweave.comparison -m opweave

install: $(READY)

$(READY): constraints.txt pyproject.toml setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "opweave needs Python 3.11 or newer, this is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --prefer-binary -c constraints.txt -e ".[models,dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
