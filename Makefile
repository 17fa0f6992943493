# Megatron-RLVR: `make help` lists the targets.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SGLANG_VENV := .venv-sglang
TRL_VENV := .venv-trl
SLURM_PACKAGES := slurmctld slurmd slurm-client munge shellcheck
# If SGLANG_PYTHON names an environment, the tests use it and need none of their own.
SGLANG_READY := $(if $(SGLANG_PYTHON),,$(SGLANG_VENV)/.installed)
# More test processes than cores, because many tests wait for other processes. `make test PARALLEL=` runs one at a time.
PARALLEL ?= --numprocesses=3 --dist=loadfile --no-loadscope-reorder
UV := uv==0.13.9
NATIVE := $(shell find csrc -type f 2>/dev/null) CMakeLists.txt setup.py
export PYTHONWARNINGS ?= ignore
export TOKENIZERS_PARALLELISM ?= false
# pip would compile 35,000 modules, which takes minutes of processor time. Python compiles those that are imported.
PIP := pip install --quiet --disable-pip-version-check --no-compile
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help setup setup-gpu doctor sglang trl slurm slurm-soak checkpoint-soak mismatch-study mismatch-study-sglang fuzz quickstart quickstart-seeds quantized-rollouts real-model routing-replay real-model-check study docs test lint format clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(STAMP)  ## create .venv, install everything, build the operators

# The stamp of an environment that `make setup-gpu` made keeps its versions.
$(STAMP): pyproject.toml $(NATIVE)
	test ! -f $(VENV)/.gpu || { echo "$(VENV) has the GPU recipe, which is out of date: run make setup-gpu"; exit 2; }
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['build-system']['requires'], sep='\n')" > $(VENV)/build-requirements.txt
	$(BIN)/$(PIP) --requirement $(VENV)/build-requirements.txt
	$(BIN)/$(PIP) --no-build-isolation --editable '.[train,cpu,dev]'
	$(BIN)/python -c "import megatron_rlvr.train"
	touch $@

# CUDA's headers, libraries and nvcc come from the lock, in folders of their own, so no CUDA toolkit is needed.
setup-gpu:  ## create .venv for GPU nodes: trainer and SGLang in one environment, from examples/gpu/requirements.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	touch $(VENV)/.gpu
	$(BIN)/$(PIP) $(UV)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --requirement examples/gpu/requirements.txt
	site="$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia" && \
	export PATH="$(abspath $(BIN)):$$PATH" CUDA_HOME="$$site/cu13" CUDACXX="$$site/cu13/bin/nvcc" MEGATRON_RLVR_CUDA=1 \
	  LIBRARY_PATH="$$site/cu13/lib" CMAKE_ARGS="-DCUDA_CUDART=$$site/cu13/lib/libcudart.so.13" \
	  CPATH="$$site/cu13/include:$$site/cu13/include/cccl:$$site/cudnn/include:$$site/nccl/include" && \
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation \
	  "$$($(BIN)/python -m megatron_rlvr.doctor --pin transformer-engine-torch)" && \
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	touch $(STAMP)
	$(BIN)/python -m megatron_rlvr.doctor --for gpu

doctor:  ## compare what is installed with the GPU recipe, and say what to do
	$(BIN)/python -m megatron_rlvr.doctor

sglang: $(SGLANG_VENV)/.installed  ## create .venv-sglang: SGLang on the CPU, for rollout.sglang.python and the tests

# quick_start.pth shortens the start of a server: garbage collections would be a quarter of its imports, and its two
# children are forked instead of importing everything anew. On a GPU, children must not be forked; this SGLang has none.
$(SGLANG_VENV)/.installed: examples/sglang/requirements.txt examples/sglang/sgl_kernel.py examples/sglang/quick_start.pth
	test -d $(SGLANG_VENV) || $(PYTHON) -m venv $(SGLANG_VENV)
	$(SGLANG_VENV)/bin/$(PIP) --constraint examples/sglang/requirements.txt torch
	$(SGLANG_VENV)/bin/$(PIP) --no-deps --requirement examples/sglang/requirements.txt
	cp examples/sglang/sgl_kernel.py examples/sglang/quick_start.pth \
	  "$$($(SGLANG_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	touch $@

trl: $(TRL_VENV)/.installed  ## create .venv-trl with TRL, and run the tests of examples/ops_only/trl_trainer.py there
	$(TRL_VENV)/bin/python -m pytest tests/integration/test_trl_trainer.py $(ARGS)

$(TRL_VENV)/.installed: pyproject.toml $(STAMP)
	test -d $(TRL_VENV) || $(PYTHON) -m venv $(TRL_VENV)
	$(TRL_VENV)/bin/$(PIP) --requirement $(VENV)/build-requirements.txt
	$(TRL_VENV)/bin/$(PIP) --no-build-isolation --editable '.[train,cpu,dev,trl]'
	touch $@

slurm:  ## install Debian's Slurm and shellcheck, for tests/integration/slurm; needs root on Debian
	@missing=; for program in slurmctld slurmd munged sbatch shellcheck; do command -v $$program >/dev/null || missing=1; done; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $(SLURM_PACKAGES) >/dev/null; \
	else echo "not root on Debian, so not installed: $(SLURM_PACKAGES); the tests on a real Slurm will be skipped"; fi

slurm-soak: $(STAMP) slurm  ## interrupt a job on a virtual cluster at 10 random moments (about 10 minutes)
	PYTHONPATH=.:examples/quickstart $(BIN)/python -m tests.integration.slurm.soak $(ARGS)

fuzz: $(STAMP)  ## 500 seeded mutations of each thing that a run reads (about 10 minutes)
	MUTATIONS=500 $(BIN)/python -m pytest tests/unit/test_mutated_input.py -s -p no:warnings $(ARGS)

mismatch-study: $(STAMP)  ## planted faults in rollouts and healthy ones: for which does the mismatch alarm ring? (about 20 minutes)
	$(BIN)/python tests/integration/mismatch_study.py

checkpoint-soak: $(STAMP)  ## 50 random kills of a run and 50 flipped bytes of its checkpoints (about 10 minutes)
	PYTHONPATH=.:examples/quickstart $(BIN)/python -m tests.integration.checkpoint_soak $(ARGS)

quickstart: $(STAMP)  ## compare a drawn entropy curve with static clipping (4 minutes); ARGS="key=value ..." overrides
	test -f runs/quickstart/data/train.jsonl || $(BIN)/python examples/quickstart/countdown.py
	$(BIN)/python examples/quickstart/compare.py $(ARGS)

real-model: $(STAMP)  ## the same on Gemma 3 270M, a real language model (15 minutes on two cores, downloads 240 MB)
	PYTHONPATH=. $(BIN)/python examples/real_model/fetch.py
	test -f runs/real_model/data/beginnings.train.jsonl || PYTHONPATH=. $(BIN)/python examples/real_model/tasks.py
	PYTHONPATH=.:examples/quickstart $(BIN)/python examples/real_model/show.py $(ARGS)

real-model-check: $(STAMP) $(SGLANG_READY)  ## test that model against transformers and the real SGLang (minutes)
	PYTHONPATH=. $(BIN)/python examples/real_model/fetch.py
	test -f runs/real_model/data/beginnings.train.jsonl || PYTHONPATH=. $(BIN)/python examples/real_model/tasks.py
	REAL_MODEL=$(abspath runs/real_model/model) $(BIN)/python -m pytest tests/integration/sglang/test_real_model.py -s -p no:warnings $(ARGS)

mismatch-study-sglang: $(STAMP) $(SGLANG_READY)  ## plant faults in a real SGLang: does the mismatch alarm ring? (5 minutes)
	PYTHONPATH=.:examples/quickstart $(BIN)/python tests/integration/sglang/planted_faults_study.py runs/mismatch-study $(ARGS)

routing-replay: $(STAMP) $(SGLANG_READY)  ## measure routing replay on a bf16 SGLang against float32 training (5 minutes)
	PYTHONPATH=.:examples/quickstart $(BIN)/python tests/integration/sglang/routing_replay_study.py runs/routing-replay $(ARGS)

quickstart-seeds: $(STAMP)  ## the quickstart on three seeds, and the table of their results (15 minutes)
	test -f runs/quickstart/data/train.jsonl || $(BIN)/python examples/quickstart/countdown.py
	$(BIN)/python examples/quickstart/seeds.py $(ARGS)

quantized-rollouts: $(STAMP)  ## what FP8 rollouts do to training, three seeds (15 minutes)
	test -f runs/quickstart/data/train.jsonl || $(BIN)/python examples/quickstart/countdown.py
	$(BIN)/python examples/quickstart/quantized_rollouts.py $(ARGS)

study: $(STAMP)  ## compare all strategies, 5 seeds each (3 minutes per run that is not archived), and write docs/entropy_study.md
	test -f runs/study/data/train.jsonl || $(BIN)/python examples/quickstart/countdown.py --output runs/study/data
	$(BIN)/python examples/entropy_study/study.py run && $(BIN)/python examples/entropy_study/study.py report

docs: $(STAMP)  ## write the pages that are generated from docstrings; the tests fail while they are out of date
	for tool in tools/document_*.py; do $(BIN)/python $$tool || exit 1; done

test: $(STAMP) slurm $(SGLANG_READY) lint  ## run what CI runs, also on the real SGLang (downloads 3 GB the first time)
	$(BIN)/python -m pytest tests $(PARALLEL)

lint: $(STAMP)  ## run ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## format the code with ruff and apply its fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environments and everything that was built
	rm -rf $(VENV) $(SGLANG_VENV) $(TRL_VENV) build *.egg-info megatron_rlvr/*.so
