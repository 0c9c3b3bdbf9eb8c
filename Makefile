# Two commands from a bare clone, with nothing but Python 3.11 (or newer): `make demo` and `make test`.
#
# PYTHON       the Python that the virtual environment is made from
# TORCH_INDEX  where pip finds torch 2.13.0+cpu, when it does not by itself: an index address or a folder of wheels.
#              PyTorch's installation page gives the address of its own index of CPU wheels
# TEST_PROCESSES  how many processes run the tests, one thread each

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH_INDEX ?=
TEST_PROCESSES ?= 2
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test soak fuzz lint wheel clean

help: ## this text
	@echo "vllm-dflash: make TARGET [TORCH_INDEX=index of CPU wheels]"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST)

install: $(INSTALLED) ## vLLM for the CPU and this package in .venv (once; the other targets do it for you)

$(INSTALLED): pyproject.toml vllm_dflash/install_cpu.py
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -P vllm_dflash/install_cpu.py $(if $(TORCH_INDEX),--torch-index "$(TORCH_INDEX)")
	@touch $@

demo: $(INSTALLED) ## plain decoding against DFlash on the embedded pair, then the same through `vllm serve`
	@$(BIN)/python examples/demo.py

test: $(INSTALLED) ## the tests that need no GPU
	@$(BIN)/pytest -q -n $(TEST_PROCESSES) --dist loadscope --no-loadscope-reorder tests

soak: $(INSTALLED) ## half an hour of mixed random requests against their twins without a drafter
	@$(BIN)/python tests/soak.py --minutes 30

fuzz: $(INSTALLED) ## half an hour of random requests of every parameter, all of every answer against plain decoding's
	@$(BIN)/python tests/fuzz_differential.py --minutes 30

lint: $(INSTALLED) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy vllm_dflash patches

wheel: $(INSTALLED) ## the wheel, in dist/
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean: ## removes the virtual environment and everything built
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
