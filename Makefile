# The two commands: make demo, make test. Both install what they need into .venv first.

PYTHON ?= python3
BIN := .venv/bin
# A process for each core, and files in the order of tests/conftest.py: xdist's own is by their number of tests.
PARALLEL := --numprocesses auto --dist loadfile --no-loadscope-reorder
# Under NumPy 2.4 and later its interpreter fails, so that comes along.
OLDEST_TRITON := triton==3.6.0 numpy==2.3.5
OLDEST := $(CURDIR)/build/oldest-triton
NATIVE := $(shell find csrc -name "*.h" -o -name "*.cpp" -o -name "*.cu" -o -name "*.cuh")

FORMATTED := $(NATIVE) $(wildcard tests/support/cuda_emulator/*)

# Empty is no: where no bytecode is written, every process that the tests start compiles PyTorch's modules anew.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help install demo test test-quick test-all test-sanitized test-oldest-triton test-all-kernels works-with bench lint format clean

help: ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: ## install everything into .venv, whether or not anything has changed
	@rm -f .venv/installed
	@$(MAKE) --no-print-directory .venv/installed

# Also when native code changes: ninja then compiles only what the change touches. Bytecode is left to the first import:
# of most that comes along, nothing is imported.
.venv/installed: pyproject.toml setup.py constraints.txt $(NATIVE)
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --no-compile --editable '.[dev,train]' --constraint constraints.txt
	@touch .venv/light $@

# Without the CUDA C++ kernels, which take minutes to compile, and without the tools of developers.
.venv/light: pyproject.toml setup.py constraints.txt $(NATIVE)
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	CUDACXX= $(BIN)/pip install --no-compile --editable '.[test,train]' --constraint constraints.txt
	@touch $@

demo: .venv/light ## make footage, train on it, evaluate and predict by the commands of grjca; three minutes from a clean clone
	$(BIN)/python -m grjca demo

test: .venv/installed ## run the tests, a process for each core; ARGS go to pytest
	@echo "Six thousand tests of every layer, on two cores in seven minutes; make test-quick takes two, make test-all has more cases."
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-quick: .venv/light ## run the quick tests of the library and of its kernels on processors; two minutes
	$(BIN)/python -m pytest $(PARALLEL) -m 'not slow' tests/library tests/repository \
		tests/kernels/test_contract.py tests/kernels/test_cpu.py $(ARGS)

test-all: .venv/installed ## run every test with every case; an hour
	$(BIN)/python -m pytest $(PARALLEL) --all $(ARGS)

test-sanitized: .venv/installed ## run tests of the native CPU code under AddressSanitizer and UBSan; ARGS go to pytest
	$(BIN)/python tests/support/sanitized.py $(ARGS)

test-oldest-triton: .venv/installed $(OLDEST)/installed ## run the tests of the Triton kernels with the oldest Triton; ARGS go to pytest
	PYTHONPATH=$(OLDEST) $(BIN)/python -m pytest $(PARALLEL) \
		tests/kernels/test_triton.py tests/kernels/test_triton_compiled.py $(ARGS)

$(OLDEST)/installed: Makefile
	rm -rf $(OLDEST)
	$(BIN)/pip install --no-deps --target $(OLDEST) $(OLDEST_TRITON)
	@touch $@

test-all-kernels: .venv/installed ## compile every Triton kernel there is; takes an hour
	PYTHONPATH=$(CURDIR):$(CURDIR)/tests/support $(BIN)/python tests/support/compiled.py $(ARGS)

works-with: .venv/installed ## run every test, and publish what passed in the table "Works with"
	$(BIN)/python tests/support/record.py --all

bench: .venv/installed ## time eager, torch.compile and fused, in eight minutes; ARGS, as --full, go to pytest
	$(BIN)/python -m pytest benchmarks --benchmark-only $(ARGS)

lint: .venv/installed ## check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)

format: .venv/installed ## format, and repair what can be repaired
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(FORMATTED)

clean: ## remove all that was made here
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f grjca_kernels/_native*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
