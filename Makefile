# Every target makes .venv and installs into it when that is needed: on first use, and after a change of a C++ file or of
# what is installed. PYTHON=python3.12 picks the interpreter; ARGS="..." goes on to the program that a target runs.
PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
INSTALLED := .venv/.installed
CXX_FILES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: pretrain test test-all lint bench

pretrain: $(INSTALLED)
	$(BIN)/python recipes/pretrain.py $(ARGS)

test: lint
	$(BIN)/python -m pytest $(ARGS)

test-all: lint
	$(BIN)/python -m pytest -m "" $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.train_step
	$(BIN)/python -m benchmarks.attention
	$(BIN)/python -m benchmarks.ops
	$(BIN)/python -m benchmarks.packing

$(INSTALLED): pyproject.toml setup.py CMakeLists.txt $(wildcard cmake/*.cmake) $(CXX_FILES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --editable '.[recipes,dev]'
	touch $@
