# Every target makes .venv and installs into it when that is needed: on first use, and after a change of a C++ file or of
# what is installed. PYTHON=python3.12 picks the interpreter; ARGS="..." goes on to the program that a target runs.
PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
INSTALLED := .venv/.installed
CXX_FILES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: pretrain chat test test-all lint bench gpu-static wheel

pretrain: $(INSTALLED)
	$(BIN)/python recipes/pretrain.py $(ARGS)

# Tunes what pretrain saved; `.venv/bin/python recipes/generate.py` talks to it.
chat: $(INSTALLED)
	$(BIN)/python recipes/chat.py $(ARGS)

# Triton's kernels run twice: their machine code, and, in a process of its own, their source in Triton's interpreter.
# There the tests of the ops go through them, too. ARGS may leave the second run without a test, which is pytest's 5.
INTERPRETED := TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels tests/ops

test: lint
	$(BIN)/python -m pytest $(ARGS)
	$(INTERPRETED) $(ARGS) || [ $$? -eq 5 ]

test-all: lint
	$(BIN)/python -m pytest -m "" $(ARGS)
	$(INTERPRETED) -m "" $(ARGS) || [ $$? -eq 5 ]

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
	$(BIN)/python -m benchmarks.chat
	$(BIN)/python -m benchmarks.dedup
	$(BIN)/python -m benchmarks.data
	$(BIN)/python -m benchmarks.host_overhead
	$(BIN)/python -m benchmarks.pretrain

gpu-static: $(INSTALLED)
	$(BIN)/python -m benchmarks.gpu_static --every-option --out docs/gpu-static.md $(ARGS)

# For machines without a compiler. libgomp stays outside: the process must have one pool of threads, torch's own.
wheel: $(INSTALLED)
	rm -rf build/wheel dist/lemur_fast-*.whl
	$(BIN)/python -m pip wheel --verbose --no-deps --wheel-dir build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude libgomp.so.1 --wheel-dir dist build/wheel/*.whl
	$(BIN)/auditwheel show dist/lemur_fast-*.whl

$(INSTALLED): pyproject.toml setup.py CMakeLists.txt $(wildcard cmake/*.cmake) $(CXX_FILES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --editable '.[recipes,dev]'
	touch $@
