# Each target does its own set-up in .venv; nothing happens twice. make demo SEED=1 OUT=runs/demo1
SEED ?= 0
OUT ?= runs/demo
VENV ?= .venv
# NeMo-Aligner and vLLM do not resolve together: an environment of its own.
NEMO_VENV ?= .venv-nemo
ARGS ?=
# One thread per process: the processes share the cores.
TEST_ENV = HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
# Two workers, each with whole files: most tests wait for programs to start. ARGS="-n 0" for one after the other.
SHARE = -n 2 --dist loadfile
FAST = not slow and not parallel and not demo and not vllm and not gpu

.PHONY: help setup setup-nemo demo test test-fast test-gpu test-nemo test-slurm lint lock

help:
	@echo "make demo [SEED=0] [OUT=runs/demo]  the whole line on the miniature world, with a report"
	@echo "make test [ARGS=...]                every test, the demo with one seed included"
	@echo "make test-fast [ARGS=...]           without the slow, parallel, vLLM and demo tests"
	@echo "make test-gpu [ARGS=...]            what needs CUDA; each is skipped, with the reason, where there is none"
	@echo "make test-nemo [ARGS=...]           the tests of trainer.backend=nemo_aligner, in .venv-nemo"
	@echo "make test-slurm [ARGS=...]          the job scripts under a Slurm of their own (Debian: slurmctld slurmd munge)"
	@echo "make lint                           ruff"
	@echo "make setup                          .venv only"
	@echo "make setup-nemo                     .venv-nemo only: NeMo-Aligner and NeMo, on the CPU"
	@echo "make lock                           resolve requirements/lock.txt and nemo.txt again"

setup:
	@VENV="$(VENV)" bash tools/setup.sh

setup-nemo:
	@VENV="$(NEMO_VENV)" LOCK=requirements/nemo.txt bash tools/setup.sh

demo: setup
	@HF_HUB_OFFLINE=1 $(VENV)/bin/her-nemo demo seed=$(SEED) out=$(OUT) $(ARGS)

test: setup
	@$(TEST_ENV) $(VENV)/bin/python -m pytest $(SHARE) $(ARGS)

test-fast: setup
	@$(TEST_ENV) $(VENV)/bin/python -m pytest $(SHARE) -m "$(FAST)" $(ARGS)

test-slurm: setup
	@$(TEST_ENV) $(VENV)/bin/python -m pytest tests/stages/test_real_slurm.py tests/stages/test_slurm.py $(ARGS)

test-gpu: setup
	@$(TEST_ENV) $(VENV)/bin/python -m pytest tests/gpu $(ARGS)

test-nemo: setup-nemo
	@$(TEST_ENV) $(NEMO_VENV)/bin/python -m pytest -m nemo tests/aligner $(ARGS)

lint: setup
	@$(VENV)/bin/ruff check .

lock: setup
	@$(VENV)/bin/python tools/lock.py
	@$(VENV)/bin/python tools/lock.py nemo
