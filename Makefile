# Every target sets up what it needs and works from any folder: make -C <clone> <target>. ARGS= passes flags on.
SHELL := /bin/bash
ifeq ($(ENV_PATH),)
ENV_PATH := $(shell _engaging_sites=slurm/sites; . slurm/lib/settings.sh && engaging_setting env_path)
endif
ENV_PATH := $(or $(ENV_PATH),$(HOME)/conda_envs/nanogpt_env)
export ENV_PATH
export PYTHONNOUSERSITE := 1
unexport PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE
NGPUS ?= 8
WORKERS ?= 3
GPUS ?=
NEED_ENV = { test -e "$$ENV_PATH/.engaging-nanogpt" || { echo "error: ENV_PATH: $$ENV_PATH: no environment there; make it: make environment" >&2; exit 2; }; }
PYTHON = "$$ENV_PATH/bin/python"
UV = "$$(command -v uv || echo .cache/uv/bin/uv)"
RERUNS = --reruns 2 -raR --rerun-show-tracebacks
SCRIPTS = git ls-files -z '*.sh' .ci/run tools/bin/engaging | xargs -0 "$$ENV_PATH/bin/shellcheck" -x

.DEFAULT_GOAL := help
.PHONY: help quickstart test environment uv uvlock venv lint faults ddp-train gpu-status gpu-hot kill-gpu

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

quickstart: ## environment, data, training, a sample, a plot: the main job, end to end
	@bash setup_env.sh --brief && bash slurm/lib/here_or_srun.sh $(PYTHON) -m tools.quickstart $(ARGS)

test: ## environment for developers, everything the tests need, all tests
	@bash slurm/lib/here_or_srun.sh --say "make test" && \
		bash setup_env.sh --dev --brief && $(MAKE) --no-print-directory lint && \
		$(PYTHON) -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder $(RERUNS) $(ARGS)

environment: ## the Python environment alone (ARGS=--help says what it takes)
	@bash setup_env.sh $(ARGS)

uv: ## uv, in .cache/uv where it is not on PATH: for those who prefer it to setup_env.sh
	@{ command -v uv || test -x .cache/uv/bin/uv || { python3 -m venv .cache/uv && .cache/uv/bin/pip install -q uv==0.13.9; }; } >&2

uvlock: uv ## uv.lock anew, after a change of the dependency lists in pyproject.toml
	@$(UV) lock $(ARGS)

venv: uv ## the environment by uv, from uv.lock, in .venv (ARGS="--extra dev": for the tests, too)
	@$(UV) sync --locked --extra train --extra tools $(ARGS) && .venv/bin/python -m tools.environment stamp && \
		echo "next: export ENV_PATH=$(CURDIR)/.venv; source activate_env.sh"

lint: ## ruff and shellcheck over what git tracks
	@$(NEED_ENV) && $(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check . && $(SCRIPTS)

faults: ## the campaign of faults, as far as it is not done (ARGS=--section=kills,shards); compiles kernels for every GPU (long)
	@bash setup_env.sh --dev --brief && $(PYTHON) -m tests.faults $(ARGS) && $(PYTHON) -m pytest -m campaign

ddp-train: ## GPT-2 124M, one epoch, on NGPUS=8 GPUs of this machine, without SLURM
	@$(NEED_ENV) && $(PYTHON) -m torch.distributed.run --standalone --nproc_per_node=$(NGPUS) -m nanogpt.train train_gpt2_epoch $(ARGS)

gpu-status: ## what each GPU does, and for whom
	@$(NEED_ENV) && $(PYTHON) -m tools.gpu status $(ARGS)

gpu-hot: ## keeps GPUS=0,1,2 busy until Ctrl-C
	@$(NEED_ENV) && $(PYTHON) -m tools.gpu hot "$(GPUS)" $(ARGS)

kill-gpu: ## lists your own GPU processes (of GPUS=0,1 or all), asks, and ends them
	@$(NEED_ENV) && $(PYTHON) -m tools.gpu kill "$(GPUS)" $(ARGS)
