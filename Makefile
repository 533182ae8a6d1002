# Every target sets up what it needs and works from any folder: make -C <clone> <target>. ARGS= passes flags on.
SHELL := /bin/bash
export ENV_PATH ?= $(HOME)/conda_envs/nanogpt_env
export PYTHONNOUSERSITE := 1
unexport PYTHONPATH PYTHONHOME
NGPUS ?= 8
WORKERS ?= 3
GPUS ?=
NEED_ENV = { test -e "$$ENV_PATH/.engaging-nanogpt" || { echo "error: ENV_PATH: $$ENV_PATH: no environment there; make it: make environment" >&2; exit 2; }; }
PYTHON = "$$ENV_PATH/bin/python"
RERUNS = --reruns 2 -raR --rerun-show-tracebacks
SCRIPTS = git ls-files -z '*.sh' .ci/run tools/bin/engaging | xargs -0 "$$ENV_PATH/bin/shellcheck" -x

.DEFAULT_GOAL := help
.PHONY: help quickstart test environment lint faults ddp-train gpu-status gpu-hot kill-gpu

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 20

quickstart: ## environment, data, training, a sample, a plot: the main job, end to end
	@bash setup_env.sh --brief && $(PYTHON) -m tools.quickstart $(ARGS)

test: ## environment for developers, everything the tests need, all tests
	@bash setup_env.sh --dev --brief && $(MAKE) --no-print-directory lint && \
		$(PYTHON) -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder $(RERUNS) $(ARGS)

environment: ## the Python environment alone (ARGS=--help says what it takes)
	@bash setup_env.sh $(ARGS)

lint: ## ruff and shellcheck over what git tracks
	@$(NEED_ENV) && $(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check . && $(SCRIPTS)

faults: ## kills savers and trainers at seeded moments, and demands exact resumes; compiles kernels for every GPU (long)
	@bash setup_env.sh --dev --brief && $(PYTHON) -m tests.faults $(ARGS) && $(PYTHON) -m tests.faults --slurm $(ARGS) && \
		$(PYTHON) -m pytest -m campaign

ddp-train: ## GPT-2 124M on NGPUS=8 GPUs of this machine, without SLURM
	@$(NEED_ENV) && $(PYTHON) -m torch.distributed.run --standalone --nproc_per_node=$(NGPUS) -m nanogpt.train train_gpt2 $(ARGS)

gpu-status: ## what each GPU does, and for whom
	@$(NEED_ENV) && $(PYTHON) -m tools.gpu status $(ARGS)

gpu-hot: ## keeps GPUS=0,1,2 busy until Ctrl-C
	@$(NEED_ENV) && $(PYTHON) -m tools.gpu hot "$(GPUS)" $(ARGS)

kill-gpu: ## lists your own GPU processes (of GPUS=0,1 or all), asks, and ends them
	@$(NEED_ENV) && $(PYTHON) -m tools.gpu kill "$(GPUS)" $(ARGS)
