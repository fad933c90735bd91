# Every target makes .venv and installs into it when that is needed: on first use, and after a change of a C++ file or of
# what is installed. PYTHON=python3.12 picks the interpreter; ARGS="..." goes on to the program that a target runs.
PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
INSTALLED := .venv/.installed
CXX_FILES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: pretrain chat test test-all test-oldest lint bench bench-compare gpu-check gpu-static wheel

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

test-all: lint test-oldest
	$(BIN)/python -m pytest -m "not gpu" $(ARGS)
	$(INTERPRETED) -m "not gpu" $(ARGS) || [ $$? -eq 5 ]

# The oldest versions that pyproject.toml allows, in an environment of their own (5 GB); .venv has the newest.
OLDEST := torch==2.10.* triton==3.6.* transformers==5.10.*
OLDEST_BIN := .venv-oldest/bin

test-oldest: .venv-oldest/.installed
	$(OLDEST_BIN)/python -m pytest tests/ops tests/llama tests/packing tests/gpu tests/test_dispatch.py $(ARGS)

.venv-oldest/.installed: $(INSTALLED)
	test -x $(OLDEST_BIN)/python || $(PYTHON) -m venv .venv-oldest
	$(OLDEST_BIN)/python -m pip install $(OLDEST) --editable '.[recipes,dev]'
	touch $@

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

# Each writes its rows for the report. A benchmark that fails, or misses its bar, does not keep the others from running.
BENCHMARKS := "train_step --rounds 3" "attention --steps 5" "ops --seconds 12" "packing --documents 200000" scaling \
	host_overhead "chat --conversations 16 --rounds 1"
WITHOUT_ROWS := dedup data pretrain

bench: $(INSTALLED)
	mkdir -p runs/bench
	@failed=; for run in $(BENCHMARKS); do \
	  set -- $$run; \
	  echo "$(BIN)/python -m benchmarks.$$* --json runs/bench/$$1.jsonl"; \
	  $(BIN)/python -m benchmarks.$$* --json runs/bench/$$1.jsonl || failed="$$failed $$1"; \
	done; \
	for run in $(WITHOUT_ROWS); do \
	  echo "$(BIN)/python -m benchmarks.$$run"; \
	  $(BIN)/python -m benchmarks.$$run || failed="$$failed $$run"; \
	done; \
	$(BIN)/python -m benchmarks.report --out runs/bench/benchmarks.md; \
	if [ -n "$$failed" ]; then echo "failed:$$failed"; exit 1; fi

# The working tree against another commit: make bench-compare BASE=HEAD~1
bench-compare: $(INSTALLED)
	$(BIN)/python -m benchmarks.compare $(BASE) $(ARGS)

# On the Python that has torch, without a network and without installing anything. DEVICE=cpu tries the program itself.
DEVICE ?= cuda

gpu-check:
	$(PYTHON) -m benchmarks.gpu_check --device $(DEVICE) $(ARGS)

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
