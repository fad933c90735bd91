# Every target makes .venv and installs into it when that is needed: on first use, and after a change of a C++ file or of
# what is installed. PYTHON=python3.12 picks the interpreter; ARGS="..." goes on to the program that a target runs.
PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
INSTALLED := .venv/.installed
CXX_FILES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: pretrain chat test test-all test-oldest test-emulated lint bench bench-compare gpu-check gpu-static wheel

pretrain: $(INSTALLED)
	$(BIN)/python recipes/pretrain.py $(ARGS)

# Tunes what pretrain saved; `.venv/bin/python recipes/generate.py` talks to it.
chat: $(INSTALLED)
	$(BIN)/python recipes/chat.py $(ARGS)

# Triton's kernels run twice: their machine code, and, in a process of its own, their source in Triton's interpreter.
# There the tests of the ops go through them, too: Python alone, so a process a core takes half of the time on two.
# ARGS may leave the second run without a test, which is pytest's 5.
INTERPRETED := TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 tests/kernels tests/ops

test: lint
	$(BIN)/python -m pytest $(ARGS)
	$(INTERPRETED) $(ARGS) || [ $$? -eq 5 ]

test-all: lint test-oldest test-emulated
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

# The kernels for AVX-512 and AMX on any CPU with AVX2: a copy of the package that has both emulated, and its tests.
EMULATED := build/emulated

test-emulated: $(INSTALLED)
	rm -rf $(EMULATED)
	LEMUR_FAST_EMULATE=1 LEMUR_FAST_CUDA=0 $(BIN)/python -m pip install --no-deps --target $(EMULATED) .
	cp -R tests benchmarks csrc pyproject.toml $(EMULATED)
	cd $(EMULATED) && $(abspath $(BIN))/python -c \
	  "from lemur_fast import _C; assert {'amx', 'avx512_bf16', 'avx512'} <= set(_C.cpu.isas()), 'emulated: needs x86-64 with AVX2'"
	cd $(EMULATED) && $(abspath $(BIN))/python -m pytest tests/csrc tests/ops -k "avx512 or amx" $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES) tests/csrc/emulated/immintrin.h

# On two cores 20 to 25 minutes without AMX, for which Hugging Face's eager attention is left out of train_step.
# DEVICE=cuda: on a GPU, ten minutes at most, for each of the four has its limit.
# A benchmark that fails, misses its bar or is over its time does not keep the others from running; what it has written
# until then is in the report.
BENCHMARKS_cpu := "train_step --rounds 3 --only sdpa Flash lemur_fast matrix" "attention --steps 5" "ops --seconds 3" scaling
BENCHMARKS_cuda := "train_step --model llama-2-7b --batch drawn --rounds 8" \
	"attention --tokens 16384 --heads 32 --kv-heads 32 --head-dim 128 --seconds 2" \
	"ops --shapes llama-2-7b small llama-2-13b llama-2-70b --rounds 15 --seconds 1" "scaling --seconds 0.5"
LIMIT_cuda := timeout --signal=INT --kill-after=5 135
OF_CPU := products optimizer "packing --documents 200000" host_overhead "chat --conversations 8 --rounds 3" dedup \
	"data --megabytes 5 --step-ms 10 100" "pretrain --steps 3"

bench: DEVICE ?= cpu
bench: ROWS = runs/bench$(filter-out -cpu,-$(DEVICE))
bench: $(INSTALLED)
	@case "$(DEVICE)" in cpu|cuda) ;; *) echo "DEVICE: got $(DEVICE); takes cpu or cuda" >&2; exit 2;; esac
	mkdir -p $(ROWS)
	@failed=; \
	run() { name=$$1; shift; echo "$(BIN)/python -m benchmarks.$$name $$*"; \
	  $(LIMIT_$(DEVICE)) $(BIN)/python -m benchmarks.$$name "$$@" || failed="$$failed $$name"; }; \
	for each in $(BENCHMARKS_$(DEVICE)); do \
	  set -- $$each; run $$* --device $(DEVICE) --json $(ROWS)/$$1.jsonl; \
	done; \
	for each in $(OF_CPU); do \
	  set -- $$each; \
	  if [ $(DEVICE) != cpu ]; then echo "left out: benchmarks.$$1, which measures the CPU alone"; continue; fi; \
	  run $$* --json $(ROWS)/$$1.jsonl; \
	done; \
	$(BIN)/python -m benchmarks.report --results $(ROWS) --out $(ROWS)/benchmarks.md || failed="$$failed report"; \
	if [ -n "$$failed" ]; then echo "failed:$$failed"; exit 1; fi

# The working tree against another commit: make bench-compare BASE=HEAD~1
bench-compare: $(INSTALLED)
	$(BIN)/python -m benchmarks.compare $(BASE) $(ARGS)

# On the Python that has torch, without a network and without installing anything. DEVICE=cpu tries the program itself.
gpu-check: DEVICE ?= cuda
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
