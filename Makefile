# Every target sets up what it needs in .venv. Variables: PYTHON, TORCH, TORCH_INDEX, CUDA, CUDA_ARCHS, PYTEST_ARGS, PYTHON_TESTS,
# SIM_TESTS, SIM_PRIORITY, FUZZ_SECONDS, FUZZ_SEED; those of the wheels, WHEEL_*, are in docs/howto/wheels.md.
PYTHON ?= python3
# Without a GPU one known torch; beside one, the torch that pip picks for that machine.
TORCH ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo 'torch>=2.10' || echo torch==2.13.0)
TORCH_INDEX ?=
# Whether the editable install has the CUDA backend: without a GPU it could only be compiled, which `make kernels` and `make wheel` do.
CUDA ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo AUTO || echo OFF)
CUDA_ARCHS ?= 80;90a
# What "all" stands for: the architectures whose kernels are held to their budget of registers.
ALL_ARCHS := 80;86;89;90a;100a;120a
ifeq ($(CUDA_ARCHS),all)
override CUDA_ARCHS := $(ALL_ARCHS)
endif
# `make wheel`: the CUDA backend (AUTO, ON, OFF), the label in the version (ON, OFF), the platform tag (auto: what this machine's
# compiler and C library allow; e.g. manylinux_2_28_x86_64: that one, or fail).
WHEEL_CUDA ?= AUTO
WHEEL_LABEL ?= ON
WHEEL_PLAT ?= auto
# `make wheel-matrix`: what the wheel is tried under; `make binding`: whose headers the sources are compiled against.
WHEEL_PYTHONS ?= 3.10 3.11 3.12 3.13
WHEEL_TORCHES ?= 2.10.0 2.11.0 newest
PYTEST_ARGS ?=
PYTHON_TESTS ?= tests/python
SIM_TESTS ?= tests/sim tests/golden
FUZZ_SECONDS ?= 60
FUZZ_SEED ?= 1
SIM_PRIORITY ?=

# Threads that wait asleep: two that spin on a shared machine slow each other down by an order of magnitude.
demo test-python test-sim: export OMP_WAIT_POLICY ?= passive

VENV := $(CURDIR)/.venv
BIN := $(VENV)/bin
SOURCES = $(shell git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')
CMAKE := PATH="$(BIN):$$PATH" $(BIN)/cmake
CMAKE_CORE := $(CMAKE) -S . -G Ninja -DLORS_PYTHON=OFF -DLORS_CUDA=OFF -DLORS_WERROR=ON

.PHONY: demo test test-quick test-python test-sim test-cpp fuzz kernels binding lint format bench bench-cpp wheel test-wheel wheel-matrix sdist \
	test-sdist test-peft docs docs-serve install clean
.DEFAULT_GOAL := test

$(VENV)/.ready: requirements-dev.txt
	@bash cmake/prerequisites.sh $(PYTHON)
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

# The last two at once: the simulator keeps one core busy, and gives way to the Python tests, which want both for moments.
test: install
	@echo 'C++ tests, CUDA kernels on the simulator, Python tests: 25 minutes on two cores (2026-11-28), more on busy ones.'
	@echo 'For every day: make test-quick, under 3 minutes once this is built.'
	$(MAKE) test-cpp
	$(MAKE) --jobs 2 SIM_PRIORITY='nice -n 10' test-python test-sim

# Without torch.compile, commands, trainers and several processes, and with the fast kernels of the simulator.
# Two at a time, each printed when it ends.
test-quick:
	@echo 'C++ tests, fast kernels on the simulator, operators, formats, layers and models: under 3 minutes on two idle cores, once built.'
	$(MAKE) --jobs 2 --output-sync test-python test-cpp test-sim \
		PYTHON_TESTS="$(addprefix tests/python/,ops formats layer model) -k 'not compile'" \
		SIM_TESTS="$(patsubst %,tests/sim/test_%.py,simulator merge mask fused_linear)"

test-python: install
	$(BIN)/python -m pytest $(PYTEST_ARGS) $(PYTHON_TESTS)

test-cpp: $(VENV)/.ready
	@bash cmake/prerequisites.sh libgtest-dev gtest/gtest.h
	$(CMAKE_CORE) -B build/cpp -DLORS_TESTS=ON
	$(CMAKE) --build build/cpp
	build/cpp/tests/cpp/test_core --gtest_brief=1

# What reads compressed weights, on random and damaged bytes. For longer and for other bytes:
# make fuzz FUZZ_SECONDS=3600 FUZZ_SEED=2
fuzz: install
	$(BIN)/python tests/python/formats/fuzz.py --seconds $(FUZZ_SECONDS) --seed $(FUZZ_SEED)

# The CUDA kernels, executed on the CPU.
test-sim: $(VENV)/.ready
	$(CMAKE) -S tests/sim -B build/sim -G Ninja -DPython_EXECUTABLE=$(BIN)/python -DLORS_WERROR=ON
	$(CMAKE) --build build/sim
	$(SIM_PRIORITY) $(BIN)/python -m pytest $(PYTEST_ARGS) $(SIM_TESTS)

# The CUDA kernels, compiled and held to their budgets of registers and instructions (needs nvcc, no GPU).
kernels: $(VENV)/.ready
	$(BIN)/python tests/kernels/compile_kernels.py --archs "$(CUDA_ARCHS)"

# The binding, compiled against the headers of each torch (downloads 100 MB of each; needs neither nvcc nor a GPU).
binding: $(VENV)/.ready
	$(BIN)/python tests/wheel/compile_binding.py --torch $(WHEEL_TORCHES)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)
	for script in .ci/run $$(git ls-files '*.sh'); do bash -n $$script || exit; done
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

# The CPU kernels by themselves.
bench-cpp: $(VENV)/.ready
	@bash cmake/prerequisites.sh libbenchmark-dev benchmark/benchmark.h
	$(CMAKE_CORE) -B build/bench-cpp -DLORS_BENCH=ON
	$(CMAKE) --build build/bench-cpp
	build/bench-cpp/bench/cpp/bench_cpu

# With the CUDA backend wherever there is nvcc, whatever the editable install beside it has. CMake first says what the wheel will
# hold, and the label comes from that; WHEEL_LABEL=OFF leaves it out, for an index that refuses labels.
# libtorch.so is torch's, which the wheel requires; every other library must be one that every Linux of the tag has.
wheel: $(VENV)/.ready
	rm -rf dist/*.whl build/wheelhouse
	$(CMAKE) -S . -B build/label -G Ninja -DLORS_PYTHON=OFF -DLORS_CUDA=$(WHEEL_CUDA) '-DLORS_CUDA_ARCHS=$(CUDA_ARCHS)'
	LORS_WHEEL_LABEL=$(WHEEL_LABEL) $(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheelhouse . \
		--config-settings=build-dir=build/wheel '--config-settings=cmake.define.LORS_CUDA=$(WHEEL_CUDA)' \
		'--config-settings=cmake.define.LORS_CUDA_ARCHS=$(CUDA_ARCHS)'
	PATH="$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude libtorch.so --only-plat --plat $(WHEEL_PLAT) \
		--wheel-dir dist build/wheelhouse/*.whl
	$(BIN)/python tests/wheel/check_wheel.py dist/*.whl

# The wheel by itself: an environment that borrows .venv's torch, but not the editable install beside it.
test-wheel: wheel
	$(BIN)/python tests/wheel/try_wheel.py dist/*.whl

# The same under other torches and every Python there is (gigabytes per torch, so no part of CI).
wheel-matrix: wheel
	$(BIN)/python tests/wheel/try_wheel.py dist/*.whl --python $(WHEEL_PYTHONS) --torch $(WHEEL_TORCHES) \
		$(if $(TORCH_INDEX),--index $(TORCH_INDEX))

sdist: $(VENV)/.ready
	rm -f dist/*.tar.gz
	$(BIN)/python -m build --sdist --no-isolation --outdir dist .

# The sdist, installed by the README's line into an empty environment.
test-sdist: sdist
	$(BIN)/python tests/wheel/try_sdist.py dist/*.tar.gz --torch '$(TORCH)' $(if $(TORCH_INDEX),--index $(TORCH_INDEX))

# PEFT's own tests of LoRA against lors_cuda.peft, from a checkout of PEFT: make test-peft LORS_PEFT_TESTS=path/to/peft
# Left out: what LoRSLoraConfig refuses, FSDP1, and compressed weights under the names that dense ones have.
PEFT_TESTS := LoRSLoraConfig and not (DoRA or Conv1d or Conv2d or Conv3d or MHA or VeLoRA or KaSA or MiCA or Embedding or \
	Monte or MlpUsingParameters or BD-LoRA or Fsdp)
PEFT_PYTEST = cd "$(LORS_PEFT_TESTS)" && HF_HUB_OFFLINE=1 PYTHONPATH="$(CURDIR)/tests/peft" $(BIN)/python -m pytest -q \
	-p lors_peft_plugin $(PYTEST_ARGS) tests/test_custom_models.py
test-peft: install
ifeq ($(LORS_PEFT_TESTS),)
	@echo "skipped: there is no checkout of PEFT. Give its folder: make test-peft LORS_PEFT_TESTS=path/to/peft"
else
	$(BIN)/python -m pip install --quiet attrs parameterized scipy
	$(PEFT_PYTEST) -k "$(PEFT_TESTS) and not test_get_base_model_state_dict"
	LORS_PEFT_LAYOUT=dense; export LORS_PEFT_LAYOUT; $(PEFT_PYTEST) -k "$(PEFT_TESTS)"
endif

# The documentation site, into build/site; every warning is an error. (mkdocs-material advertises its successor on every build.)
docs docs-serve: export NO_MKDOCS_2_WARNING = 1
docs: install
	$(BIN)/mkdocs build --strict

docs-serve: install
	$(BIN)/mkdocs serve

clean:
	rm -rf build dist demo-output
