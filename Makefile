# Everything sets itself up: the only needs are Python 3.11 and a C compiler (two small dependencies build from source).
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/ready
export OMP_NUM_THREADS ?= 1

.PHONY: demo smoke test integration lint benchmark benchmark-quick clean-demo clean-smoke help

help:
	@echo "make demo         three specialists become one student; ends with the result table (about 15 minutes on 2 cores)"
	@echo "make smoke        the same with fewer steps (about 2 minutes after installation)"
	@echo "make test         install what is needed and run the test suite"
	@echo "make integration  whole runs of the command line: kills, resume, the smoke demo"
	@echo "make lint         ruff and mypy"
	@echo "make benchmark    the divergence against its peers, at real sizes (about 4 minutes on 2 idle cores)"
	@echo "make clean-demo   remove runs/demo and start over with the next make demo"

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,bench]'
	@touch $@

demo: $(READY)
	$(BIN)/python launch/demo.py demo

smoke: $(READY)
	$(BIN)/python launch/demo.py smoke

test: $(READY)
	$(BIN)/python -m pytest -m "not integration"

integration: $(READY)
	$(BIN)/python -m pytest -m integration

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

benchmark: $(READY)
	env -u OMP_NUM_THREADS $(BIN)/python benchmarks/divergence.py --json benchmarks/results/divergence_2core_cpu.json

benchmark-quick: $(READY)
	env -u OMP_NUM_THREADS $(BIN)/python benchmarks/divergence.py --quick

clean-demo:
	rm -rf runs/demo

clean-smoke:
	rm -rf runs/smoke
