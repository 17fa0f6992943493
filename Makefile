# Megatron-RLVR: `make help` lists what there is.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SGLANG_VENV := .venv-sglang
# Its tests use the environment that SGLANG_PYTHON names, if it does.
SGLANG_READY := $(if $(SGLANG_PYTHON),,$(SGLANG_VENV)/.installed)
NATIVE := $(shell find csrc -type f 2>/dev/null) CMakeLists.txt setup.py
export PYTHONWARNINGS ?= ignore
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help setup sglang quickstart study test lint format clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(STAMP)  ## make .venv, install everything, build the operators

$(STAMP): pyproject.toml $(NATIVE)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['build-system']['requires'], sep='\n')" > $(VENV)/build-requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement $(VENV)/build-requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --editable '.[train,dev]'
	touch $@

sglang: $(SGLANG_VENV)/.installed  ## make .venv-sglang: SGLang on the CPU, for rollout.sglang.python and its tests

$(SGLANG_VENV)/.installed: examples/sglang/requirements.txt examples/sglang/sgl_kernel.py
	test -d $(SGLANG_VENV) || $(PYTHON) -m venv $(SGLANG_VENV)
	$(SGLANG_VENV)/bin/pip install --quiet --disable-pip-version-check --constraint examples/sglang/requirements.txt torch
	$(SGLANG_VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --requirement examples/sglang/requirements.txt
	cp examples/sglang/sgl_kernel.py "$$($(SGLANG_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	touch $@

quickstart: $(STAMP)  ## RLVR on Countdown in minutes; ARGS="key=value ..." overrides quickstart.yaml
	test -f runs/quickstart/data/train.jsonl || $(BIN)/python examples/quickstart/countdown.py
	test -f runs/quickstart/base_model/config.json || $(BIN)/python examples/quickstart/make_base_model.py
	$(BIN)/python -m megatron_rlvr.train examples/quickstart/quickstart.yaml $(ARGS)

study: $(STAMP)  ## every strategy on the quickstart's task, 5 seeds each (about 2 hours), into docs/entropy_study.md
	test -f runs/quickstart/data/train.jsonl || $(BIN)/python examples/quickstart/countdown.py
	test -f runs/quickstart/base_model/config.json || $(BIN)/python examples/quickstart/make_base_model.py
	$(BIN)/python examples/entropy_study/study.py run && $(BIN)/python examples/entropy_study/study.py report

test: $(STAMP) $(SGLANG_READY) lint  ## everything CI runs, also on the real SGLang (the first time 2 minutes and 3 GB)
	$(BIN)/python -m pytest tests

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## let ruff put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and what was built
	rm -rf $(VENV) $(SGLANG_VENV) build *.egg-info megatron_rlvr/*.so
