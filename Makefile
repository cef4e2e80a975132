# Every target sets up what it needs in .venv. Variables: PYTHON, TORCH, TORCH_INDEX, CUDA, CUDA_ARCHS, PYTEST_ARGS, FUZZ_SECONDS, FUZZ_SEED.
PYTHON ?= python3
# Without a GPU one known torch; beside one, the torch that pip picks for that machine.
TORCH ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo 'torch>=2.10' || echo torch==2.13.0)
TORCH_INDEX ?=
# Whether the editable install has the CUDA half: without a GPU it could only be compiled, which `make kernels` and `make wheel` do.
CUDA ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo AUTO || echo OFF)
CUDA_ARCHS ?= 80;90a
PYTEST_ARGS ?=
FUZZ_SECONDS ?= 60
FUZZ_SEED ?= 1

# Threads that wait asleep: two that spin on a shared machine slow each other down by an order of magnitude.
demo test-python test-sim: export OMP_WAIT_POLICY ?= passive

VENV := $(CURDIR)/.venv
BIN := $(VENV)/bin
SOURCES := $(shell git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')
CMAKE := PATH="$(BIN):$$PATH" $(BIN)/cmake

.PHONY: demo test test-python test-sim test-cpp fuzz kernels lint format bench bench-cpp wheel test-wheel docs docs-serve install clean
.DEFAULT_GOAL := test

$(VENV)/.ready: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

# Editable: Python is read from the checkout, the binaries are rebuilt here where a source has changed.
install: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable . \
		'--config-settings=cmake.define.LORS_CUDA=$(CUDA)' '--config-settings=cmake.define.LORS_CUDA_ARCHS=$(CUDA_ARCHS)'

demo: install
	$(BIN)/lors-cuda demo --output demo-output

test: test-cpp test-sim test-python

test-python: install
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-cpp: $(VENV)/.ready
	$(CMAKE) -S . -B build/cpp -G Ninja -DLORS_PYTHON=OFF -DLORS_CUDA=OFF -DLORS_TESTS=ON -DLORS_WERROR=ON
	$(CMAKE) --build build/cpp
	build/cpp/tests/cpp/test_core --gtest_brief=1
	build/cpp/tests/cpp/test_sparse_product --gtest_brief=1

# The decoders of the compressed layouts on random and damaged bytes, under sanitizers. For longer and for other bytes:
# make fuzz FUZZ_SECONDS=3600 FUZZ_SEED=2
fuzz: $(VENV)/.ready
	$(CMAKE) -S . -B build/fuzz -G Ninja -DLORS_PYTHON=OFF -DLORS_CUDA=OFF -DLORS_FUZZ=ON -DLORS_WERROR=ON
	$(CMAKE) --build build/fuzz --target fuzz_layouts
	build/fuzz/tests/fuzz/fuzz_layouts --seconds $(FUZZ_SECONDS) --seed $(FUZZ_SEED)

# The CUDA kernels, executed on the CPU.
test-sim: $(VENV)/.ready
	$(CMAKE) -S tests/sim -B build/sim -G Ninja -DPython_EXECUTABLE=$(BIN)/python -DLORS_WERROR=ON
	$(CMAKE) --build build/sim
	LORS_SIM_BUILD=$(CURDIR)/build/sim $(BIN)/python -m pytest $(PYTEST_ARGS) tests/sim tests/golden

# The CUDA kernels, compiled and held to their budget of registers (needs nvcc, no GPU).
kernels: $(VENV)/.ready
	$(BIN)/python tests/kernels/compile_kernels.py --archs "$(CUDA_ARCHS)"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)
	bash -n bench/gpu/run.sh
	bash -n bench/gpu/build.sh
	! grep -rnE '#include <(torch|ATen|c10)/' csrc/core

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

bench: install bench-cpp
	mkdir -p build/bench
	$(BIN)/python bench/merge.py --output build/bench/merge.json
	$(BIN)/python bench/linear.py --dtype float32 --output build/bench/linear.json
	$(BIN)/python bench/plot.py build/bench/linear.json

# The CPU kernels by themselves (needs Google Benchmark: libbenchmark-dev).
bench-cpp: $(VENV)/.ready
	$(CMAKE) -S . -B build/bench-cpp -G Ninja -DLORS_PYTHON=OFF -DLORS_CUDA=OFF -DLORS_BENCH=ON -DLORS_WERROR=ON
	$(CMAKE) --build build/bench-cpp
	build/bench-cpp/bench/cpp/bench_cpu

# With the CUDA half wherever there is nvcc, whatever the editable install beside it has.
wheel: $(VENV)/.ready
	rm -rf dist
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist . \
		'--config-settings=cmake.define.LORS_CUDA=AUTO' '--config-settings=cmake.define.LORS_CUDA_ARCHS=$(CUDA_ARCHS)'
	ls -l dist

# The wheel by itself: an environment that borrows .venv's torch, but not the editable install beside it.
test-wheel: wheel
	rm -rf build/wheel-venv
	$(PYTHON) -m venv build/wheel-venv
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$(build/wheel-venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth"
	build/wheel-venv/bin/python -m pip install --quiet --no-deps dist/*.whl
	cd build && wheel-venv/bin/lors-cuda info
	build/wheel-venv/bin/python -m pytest $(PYTEST_ARGS) tests/python/test_package.py

# The documentation site, into build/site; every warning is an error. (mkdocs-material advertises its successor on every build.)
docs docs-serve: export NO_MKDOCS_2_WARNING = 1
docs: install
	$(BIN)/mkdocs build --strict

docs-serve: install
	$(BIN)/mkdocs serve

clean:
	rm -rf build dist demo-output
