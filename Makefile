# Each target does its own set-up in .venv; nothing happens twice. make demo SEED=1 OUT=runs/demo1
SEED ?= 0
OUT ?= runs/demo
VENV ?= .venv
ARGS ?=
# One thread per process: the processes share the cores.
TEST_ENV = HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
FAST = not slow and not parallel and not demo and not vllm and not gpu

.PHONY: help setup demo test test-fast test-slurm lint lock

help:
	@echo "make demo [SEED=0] [OUT=runs/demo]  the whole line on the miniature world, with a report"
	@echo "make test [ARGS=...]                every test, the demo with one seed included"
	@echo "make test-fast [ARGS=...]           without the slow, parallel, vLLM and demo tests"
	@echo "make test-slurm [ARGS=...]          the job scripts under a Slurm of their own (Debian: slurmctld slurmd munge)"
	@echo "make lint                           ruff"
	@echo "make setup                          .venv only"
	@echo "make lock                           resolve requirements/lock.txt again"

setup:
	@VENV="$(VENV)" bash tools/setup.sh

demo: setup
	@HF_HUB_OFFLINE=1 $(VENV)/bin/her-nemo demo seed=$(SEED) out=$(OUT) $(ARGS)

test: setup
	@$(TEST_ENV) $(VENV)/bin/python -m pytest $(ARGS)

test-fast: setup
	@$(TEST_ENV) $(VENV)/bin/python -m pytest -m "$(FAST)" $(ARGS)

test-slurm: setup
	@$(TEST_ENV) $(VENV)/bin/python -m pytest tests/stages/test_real_slurm.py tests/stages/test_slurm.py $(ARGS)

lint: setup
	@$(VENV)/bin/ruff check .

lock: setup
	@$(VENV)/bin/python tools/lock.py
