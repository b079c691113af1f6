# Everything sets itself up: the only needs are Python 3.11 and a C compiler (two small dependencies build from source).
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/ready
SGLANG := .venv-sglang
SUPPORT := tests/support/sglang_cpu
export OMP_NUM_THREADS ?= 1

.PHONY: demo smoke real readme test parity integration sglang sglang-test lint fuzz soak benchmark benchmark-quick clean-demo clean-smoke help

help:
	@echo "make demo         three specialists become one student; ends with the result table (5 to 14 minutes on 2 cores)"
	@echo "make smoke        the same with fewer steps (about 2 minutes after installation)"
	@echo "make real         a real 135M model: two specialists, consolidated at tensor parallel 3 (half an hour)"
	@echo "make readme       the README's section on your own teachers, verbatim in a clean environment (about 4 minutes)"
	@echo "make test         install what is needed and run the test suite"
	@echo "make parity       the same mini-batch under every layout, one table (about 3 minutes; part of make test)"
	@echo "make integration  whole runs of the command line (kills, resume, the smoke demo) and long matrices"
	@echo "make sglang       the environment of real SGLang servers on a CPU (about 5 minutes, 3 GB)"
	@echo "make sglang-test  rollouts on real SGLang servers on a CPU: updates, kills, faults, the main loop (20 minutes where two cores are busy)"
	@echo "make lint         ruff and mypy"
	@echo "make fuzz         1,600 damaged inputs through the command line (under 4 minutes)"
	@echo "make soak         170 SIGKILLs over cache writers, the streaming pass, teachers add, whole jobs, rollouts on servers (about 35 minutes)"
	@echo "make benchmark    divergence, teacher stream, hidden cache, train step, token log and client of servers at real sizes (about 30 minutes on 2 idle cores)"
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

real: $(READY)
	$(BIN)/python -m tests.real_model

readme: $(READY)
	$(BIN)/python -m tests.readme_commands

test: $(READY)
	$(BIN)/python -m pytest -m "not integration" -n 2 --dist loadfile

parity: $(READY)
	$(BIN)/python -m tests.parallel.parity

integration: $(READY)
	$(BIN)/python -m pytest -m integration

# SGLang names the CUDA build of everything it needs, so it is installed alone and its imports by a list.
$(SGLANG)/ready: $(SUPPORT)/requirements.txt $(SUPPORT)/constraints.txt
	$(PYTHON) -m venv $(SGLANG)
	$(SGLANG)/bin/python -m pip install --quiet --disable-pip-version-check -c $(SUPPORT)/constraints.txt torch
	$(SGLANG)/bin/python -m pip install --quiet --disable-pip-version-check -c $(SUPPORT)/constraints.txt --no-deps sglang torchvision
	$(SGLANG)/bin/python -m pip install --quiet --disable-pip-version-check -c $(SUPPORT)/constraints.txt -r $(SUPPORT)/requirements.txt
	@touch $@

sglang: $(SGLANG)/ready

# Servers that `mtopd serve` starts import everything anew, a minute or more each: their tests are part of make soak.
sglang-test: $(READY) $(SGLANG)/ready
	$(BIN)/python -m pytest tests/sglang --ignore=tests/sglang/test_serve.py

fuzz: $(READY)
	$(BIN)/python -m tests.fuzz.run

soak: $(READY) $(SGLANG)/ready
	$(BIN)/python -m pytest tests/sglang/test_serve.py
	$(BIN)/python -m tests.fuzz.run --count 2000 --whole 200 --seed $$(date +%s)
	$(BIN)/python -m tests.convert.read_back
	$(BIN)/python -m tests.hidden_cache.kill_writers --kills 60
	$(BIN)/python -m tests.teacher_offload.kill_add --kills 20
	$(BIN)/python -m tests.integration.kill_pass --kills 20
	$(BIN)/python -m tests.integration.kill_job --kills 30
	$(BIN)/python -m tests.sglang.kill_rollouts --kills 40

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

benchmark: $(READY)
	env -u OMP_NUM_THREADS $(BIN)/python benchmarks/divergence.py --json benchmarks/results/divergence_2core_cpu.json
	$(BIN)/python benchmarks/teacher_stream.py --json benchmarks/results/teacher_stream_2core_cpu.json
	$(BIN)/python benchmarks/hidden_cache.py --json benchmarks/results/hidden_cache_2core_cpu.json
	$(BIN)/python benchmarks/trainer.py --json benchmarks/results/trainer_2core_cpu.json
	$(BIN)/python benchmarks/weights.py --json benchmarks/results/weights_2core_cpu.json
	$(BIN)/python benchmarks/rollout.py --json benchmarks/results/rollout_2core_cpu.json
	$(BIN)/python benchmarks/rollout_client.py --json benchmarks/results/rollout_client_2core_cpu.json

benchmark-quick: $(READY)
	env -u OMP_NUM_THREADS $(BIN)/python benchmarks/divergence.py --quick
	$(BIN)/python benchmarks/teacher_stream.py --quick
	$(BIN)/python benchmarks/hidden_cache.py --quick
	$(BIN)/python benchmarks/trainer.py --quick
	$(BIN)/python benchmarks/weights.py --quick
	$(BIN)/python benchmarks/rollout.py --quick
	$(BIN)/python benchmarks/rollout_client.py --quick

clean-demo:
	rm -rf runs/demo

clean-smoke:
	rm -rf runs/smoke
