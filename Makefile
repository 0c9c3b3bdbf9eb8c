# Two commands from a bare clone, with nothing but Python 3.11 (or newer): `make demo` and
# `make test`.
#
# PYTHON       the Python that the virtual environment is made from
# TORCH_INDEX  where pip finds torch 2.13.0+cpu, when it does not by itself: an index address or a
#              folder of wheels. PyTorch's installation page gives the address of its own index of
#              CPU wheels
# PAIR         what `make demo` runs: smollm2, a real chat model that is fetched once, or tiny, the
#              embedded pair; left out: smollm2 where its drafter and its package can be had
# TEST_PROCESSES  how many processes run the tests, one thread each
# COMPAT_TESTS    what `make compat-test` runs
# VLLM            which vLLM `make compat` and `make compat-test` look at: a range such as '<0.34',
#                 or: supported

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH_INDEX ?=
PAIR ?=
TEST_PROCESSES ?= 2
VLLM ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# What has to hold on another vLLM, in minutes. `make compat-test COMPAT_TESTS=tests` runs all there
# is.
COMPAT_TESTS ?= tests/patches tests/compat/suite.py

.DEFAULT_GOAL := help
.PHONY: help install demo unit test compat compat-test soak soak-server fuzz docs lint wheel sdist
.PHONY: clean

help: ## this text
	@echo "vllm-dflash: make TARGET [TORCH_INDEX=index of CPU wheels]"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST)

install: $(INSTALLED) ## vLLM for the CPU and this package in .venv (the others do it for you)

$(INSTALLED): pyproject.toml vllm_dflash/install_cpu.py
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -P vllm_dflash/install_cpu.py $(if $(TORCH_INDEX),--torch-index "$(TORCH_INDEX)")
	@touch $@

demo: $(INSTALLED) ## plain decoding against DFlash, then by `vllm serve`: PAIR=smollm2 or tiny
	@$(BIN)/python examples/demo.py$(if $(PAIR), --pair $(PAIR))

unit: $(INSTALLED) ## the tests that need no vLLM: under a minute
	@$(BIN)/pytest -q -n $(TEST_PROCESSES) --dist load --pure tests/unit

test: $(INSTALLED) ## the tests that need no GPU
	@$(BIN)/pytest -q -n $(TEST_PROCESSES) --dist loadscope --no-loadscope-reorder tests

compat: $(INSTALLED) ## what the newest vLLM's source means for this package: no GPU, one download
	@folder=$$($(BIN)/python tests/compat/wheel.py $(if $(VLLM),'$(VLLM)')) && \
	$(BIN)/vllm-dflash compat --source "$$folder"

compat-test: $(INSTALLED) ## the tests that matter most, on the newest supported vLLM's Python
	@folder=$$($(BIN)/python tests/compat/wheel.py '$(or $(VLLM),supported)') && \
	python=$$($(BIN)/python tests/compat/overlay.py "$$folder") && \
	"$$python" -m pytest -q -n $(TEST_PROCESSES) --dist loadscope --no-loadscope-reorder \
	    $(COMPAT_TESTS)

soak: $(INSTALLED) ## half an hour of mixed random requests against their twins without a drafter
	@$(BIN)/python tests/soak.py --minutes 30

soak-server: $(INSTALLED) ## ten minutes of requests over HTTP, with and without a drafter: memory
	@$(BIN)/python tests/soak_server.py --minutes 10

fuzz: $(INSTALLED) ## half an hour of random requests of every parameter, against plain decoding
	@$(BIN)/python tests/fuzz_differential.py --minutes 30

lint: $(INSTALLED) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy vllm_dflash patches

docs: $(INSTALLED) ## the documents as a site, in site/
	@$(BIN)/python -c "import mkdocs" 2>/dev/null || \
	$(BIN)/pip install --quiet "$$(sed -n 's/^docs = \["\(.*\)"\]/\1/p' pyproject.toml)"
	$(BIN)/mkdocs build --quiet

wheel: $(INSTALLED) ## the wheel, in dist/
	@rm -rf build  # setuptools would pack what an earlier one left there
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

sdist: $(INSTALLED) ## the source distribution, in dist/
	@mkdir -p dist && $(BIN)/python -c "from setuptools import build_meta; \
	    print('dist/' + build_meta.build_sdist('dist'))" | tail -1

clean: ## removes the virtual environment and everything built
	rm -rf $(VENV) .compat build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache
