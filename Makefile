# raysft's set-up, checks and demo. `make help` lists what there is.
#
# The environment in .venv is installed from a complete, pinned list with --no-deps: what you get is the list, no more
# and no less. A stamp that carries the list's hash says what is installed, so a second run does nothing.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
STAMPS := $(VENV)/.raysft
# The set in use, cpu or gpu: what the environment holds already, else cpu.
SET ?= $(or $(shell cat $(STAMPS)/set 2>/dev/null),cpu)

$(if $(filter cpu gpu,$(SET)),,$(error SET is cpu or gpu, not '$(SET)'))

PY := $(VENV)/bin/python
UV ?= $(VENV)/bin/uv
# -qq: the lines of this file tell what happens; of pip's own, only errors.
INSTALL := $(PY) -m pip install -qq --disable-pip-version-check --no-input --no-deps
TORCH_CPU := $(shell grep '^torch==' requirements/cpu.txt)
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

hash = $(shell cat $(1) | sha256sum | cut -c1-16)
VENV_STAMP := $(STAMPS)/venv
RUNTIME_STAMP := $(STAMPS)/$(SET)-$(call hash,requirements/$(SET).txt)
PROJECT_STAMP := $(STAMPS)/project-$(call hash,pyproject.toml)
DEV_STAMP := $(STAMPS)/dev-$(call hash,requirements/dev.txt)
BENCH_STAMP := $(STAMPS)/bench-$(call hash,requirements/bench.txt)
TASKS_STAMP := $(STAMPS)/tasks-$(call hash,requirements/tasks.txt)

comma := ,
fail = { printf '\nmake: %s\n' '$(1)' >&2; exit 1; }

# cpu and gpu both bring the import name vllm: one environment holds one of them.
claim = if [ "$$(cat $(STAMPS)/set 2>/dev/null || echo $(1))" != $(1) ]; then \
  $(call fail,$(VENV) holds the other set. Run `make clean` first$(comma) or name another place with VENV=.venv-$(1)); fi; \
  echo $(1) > $(STAMPS)/set; rm -f $(STAMPS)/$(1)-*

.PHONY: help setup setup-gpu setup-dev setup-tasks lint test test-long chaos test-equality demo evaluate bench-data bench-train bench-serve check-gpu lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(RUNTIME_STAMP) $(PROJECT_STAMP) ## .venv with what training, serving and the demo need, on CPU (3 to 6 minutes, 4.3 GB)
	@printf 'setup: %s holds the %s set\n' '$(VENV)' '$(SET)'

setup-gpu: ## the same with requirements/gpu.txt (several GB of CUDA); later targets then use it, until `make clean`
	@$(MAKE) --no-print-directory setup SET=gpu

setup-dev: setup $(DEV_STAMP) $(TASKS_STAMP) ## setup, the tools for tests, style and types, and the task generators

lint: setup-dev ## style (ruff) and types (mypy)
	@echo 'lint: ruff check'; $(PY) -m ruff check .
	@echo 'lint: ruff format --check'; $(PY) -m ruff format --check .
	@echo 'lint: mypy (half a minute the first time)'; $(PY) -m mypy

# What starts a Ray or an engine needs the cores for itself; the rest shares them.
test: lint ## lint, then every test; ARGS="-k pack" goes to pytest
	$(PY) -m pytest -m "not ray and not engine and not chaos and not long and not exhaustive" -n 2 --dist loadfile $(ARGS) || [ $$? = 5 ]
	$(PY) -m pytest -m "(ray or engine) and not chaos and not long and not exhaustive" $(ARGS) || [ $$? = 5 ]

test-long: lint ## tests of minutes: the README's commands, methods, preferences, promises and pipeline end to end, Ctrl-C against a whole run
	$(PY) -m pytest -m long $(ARGS)

chaos: lint ## kills and faults against real Ray, DeepSpeed and vLLM (long)
	$(PY) -m pytest -m chaos $(ARGS)

test-equality: lint ## gradients of every cut of a global batch, over workers, ZeRO stages and layouts (some minutes)
	$(PY) -m pytest tests/sft/test_equality.py -m exhaustive -s $(ARGS)

demo: setup ## train an adapter, serve it, ask it; KEEP=1 keeps the server up
	$(PY) -m jobs.demo --config jobs/configs/demo.yaml $(if $(KEEP),--keep,)

evaluate: setup $(TASKS_STAMP) ## the six promises of tuning, base against tuned; writes build/evaluate/summary.json (about an hour)
	$(PY) -m jobs.promises --config jobs/configs/promises.yaml $(ARGS)

bench-train: setup $(BENCH_STAMP) ## our trainer against TRL and a plain loop; writes build/bench/train.json (half an hour)
	$(PY) -m jobs.bench.train $(ARGS)

bench-serve: setup ## the endpoint against bare vLLM and Ray Serve LLM, swaps under load, many adapters; writes build/bench/serve.json (half an hour or more)
	$(PY) -m jobs.bench.serve $(ARGS)

bench-data: setup $(BENCH_STAMP) ## the data path against datasets.map and TRL's packing; writes build/bench/data.json (some minutes)
	$(PY) -m jobs.bench.data $(ARGS)

setup-tasks: setup $(TASKS_STAMP) ## setup, and the task generators of `python -m jobs.make_tasks`

clean: ## remove .venv and the caches of tools
	rm -rf $(VENV) build raysft.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# ---- the environment -------------------------------------------------------------------------------------------------

$(VENV_STAMP):
	@[ -n '$(PYTHON)' ] || $(call fail,no python3.11 and no python3 found. Install Python 3.11 or name it: make setup PYTHON=/path/to/python3.11)
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
	  || $(call fail,$(PYTHON) is not a working Python 3.11$(comma) for which the lists in requirements/ are made. Name one: make setup PYTHON=/path/to/python3.11)
	@echo 'setup: creating $(VENV) with $(PYTHON) (seconds)'
	@'$(PYTHON)' -m venv $(VENV) || $(call fail,could not create $(VENV); on Debian and Ubuntu the package python3.11-venv is needed)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/cpu-%: | $(VENV_STAMP)
	@$(call claim,cpu)
	@echo 'setup: installing $(TORCH_CPU) (half a minute, 190 MB)'
	@$(INSTALL) '$(TORCH_CPU)' 2> $(STAMPS)/torch.log || { \
	  echo 'setup: the configured package sources have no $(TORCH_CPU); asking $(TORCH_CPU_INDEX)'; \
	  $(INSTALL) --index-url $(TORCH_CPU_INDEX) '$(TORCH_CPU)'; } \
	  || { printf 'The configured package sources said:\n' >&2; cat $(STAMPS)/torch.log >&2; \
	  $(call fail,could not install $(TORCH_CPU)$(comma) neither from the configured package sources nor from $(TORCH_CPU_INDEX). See the errors above); }
	@echo 'setup: installing requirements/cpu.txt (3 to 5 minutes; DeepSpeed is built from source in seconds)'
	@$(INSTALL) -r requirements/cpu.txt || $(call fail,could not install requirements/cpu.txt. See the error above)
	@touch $@

$(STAMPS)/gpu-%: | $(VENV_STAMP)
	@$(call claim,gpu)
	@echo 'setup: installing requirements/gpu.txt (10 minutes or more: several GB of CUDA packages)'
	@$(INSTALL) -r requirements/gpu.txt || $(call fail,could not install requirements/gpu.txt. See the error above)
	@touch $@

$(PROJECT_STAMP): $(RUNTIME_STAMP)
	@rm -f $(STAMPS)/project-*
	@echo 'setup: installing raysft itself, editable (seconds)'
	@$(INSTALL) --no-build-isolation -e . || $(call fail,could not install the project from this folder. See the error above)
	@touch $@

# A list that is installed on top of either set: its name, its stamp, how long it takes.
define on_top
$(2): $(RUNTIME_STAMP)
	@rm -f $(STAMPS)/$(1)-*
	@echo 'setup: installing requirements/$(1).txt ($(3))'
	@$$(INSTALL) -r requirements/$(1).txt || $$(call fail,could not install requirements/$(1).txt. See the error above)
	@touch $$@
endef
$(eval $(call on_top,dev,$(DEV_STAMP),half a minute))
$(eval $(call on_top,bench,$(BENCH_STAMP),seconds))
$(eval $(call on_top,tasks,$(TASKS_STAMP),half a minute))

$(VENV)/bin/uv: | $(DEV_STAMP)

# ---- the locks -------------------------------------------------------------------------------------------------------

COMPILE := $(UV) pip compile --quiet --python-version 3.11 --python-platform x86_64-unknown-linux-gnu --no-header --no-annotate
# What is kept out although a package asks for it (docs/dependencies.md says why).
EXCLUDE_CPU := torchvision torchaudio torchcodec llm llama-cpp-python
EXCLUDE_GPU := llm llama-cpp-python
# CUDA compilers and headers of the release that torch is built for; left alone, they run ahead of common drivers.
CUDA_HOLD := cuda-python cuda-bindings nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-cccl nvidia-nvjitlink
list = <(printf '%s\n' $(1))
pins = grep -v '^\#' requirements/$(1).txt

check-gpu: $(UV) ## resolve requirements/gpu.txt without installing: complete, consistent, available (seconds, 60 MB)
	@work=$$(mktemp -d); trap 'rm -rf "$$work"' EXIT; \
	$(COMPILE) requirements/gpu.txt pyproject.toml --extra gpu --extra demo --excludes $(call list,$(EXCLUDE_GPU)) -o "$$work/gpu.txt" > /dev/null \
	  || $(call fail,check-gpu: the pins of requirements/gpu.txt contradict each other or cannot be had. See above); \
	diff <($(call pins,gpu)) "$$work/gpu.txt" \
	  || $(call fail,check-gpu: requirements/gpu.txt is not the complete set; > marks what lacks); \
	echo "check-gpu: the $$($(call pins,gpu) | wc -l) pins of requirements/gpu.txt are complete, agree with each other and can be had"

# Pins that still fit stay as they are; to move one, change or delete its line first. Where the configured sources hold
# CPU wheels of torch, say TORCH_BACKEND= to take them from there.
TORCH_BACKEND ?= --torch-backend cpu
lock: $(UV) ## make requirements/*.txt again from pyproject.toml and themselves (seconds)
	@work=$$(mktemp -d); trap 'rm -rf "$$work"' EXIT; \
	for set in cpu gpu dev bench tasks; do grep -v '^#' requirements/$$set.txt > "$$work/$$set.txt" || true; done; \
	$(COMPILE) pyproject.toml --extra cpu --extra demo $(TORCH_BACKEND) --excludes $(call list,$(EXCLUDE_CPU)) -o "$$work/cpu.txt" > /dev/null; \
	$(COMPILE) pyproject.toml --extra gpu --extra demo --excludes $(call list,$(EXCLUDE_GPU)) \
	  -c <(printf '%s<13.1\n' $(CUDA_HOLD)) -o "$$work/gpu.txt" > /dev/null; \
	for set in dev bench tasks; do \
	  $(PY) -c 'import sys, tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"][sys.argv[1]], sep="\n")' $$set > "$$work/$$set.in"; \
	  $(COMPILE) "$$work/$$set.in" -c "$$work/cpu.txt" -o "$$work/$$set.txt" > /dev/null; \
	  grep -vxFf <(comm -12 <(sort "$$work/cpu.txt") <(sort "$$work/gpu.txt")) "$$work/$$set.txt" | grep -v "^torch==" > "$$work/$$set" && mv "$$work/$$set" "$$work/$$set.txt"; \
	done; \
	for set in cpu gpu dev bench tasks; do \
	  { grep '^#' requirements/$$set.txt; cat "$$work/$$set.txt"; } > "$$work/new" && cp "$$work/new" requirements/$$set.txt; \
	  echo "lock: requirements/$$set.txt, $$($(call pins,$$set) | wc -l) packages"; \
	done
