# Two commands do everything on a fresh machine: `make bench` (the main job) and `make test`.
# Each makes its own environment in .venv and builds; nothing but Python and g++ need be there before.
#
#   make bench [PROFILE=quick|full]   builds, measures, writes reports/
#   make test                         builds, runs every test
#   make test-emulated [VARIANT=plain|race|asan]   the tests that run CUDA kernels on the host
#   make test-faults [FAULTS="..."]   seeded faults in the CUDA kernels: all are to be caught (hours)
#   make cuda-check                   the CUDA kernels for CUDA_ARCHS beside a CPU torch, by nvcc
#   make lint, make format            what CI checks of style and types; mends what can be mended
#   make sanitize                     the operator tests over an ASan + UBSan build
#   make sanitize SANITIZER=thread    the same over a ThreadSanitizer build
#   make wheel                        a wheel in dist/
#   make dev [PYTHON=...]             builds in place without an environment, for work on the kernels
#   make gpu [PYTHON=...]             on a machine with a GPU: gpu-test, then gpu-bench; no network
#   make gpu-test                     builds for this GPU; the tests on it, compute-sanitizer,
#                                     vectors of its instructions (each of the two: 10 minutes)
#   make gpu-bench                    builds for this GPU; measures into benchmarks/results/<gpu>/
#   make clean                        removes what was built, but not the environment in .venv
SHELL := /bin/bash -o pipefail
PYTHON ?= python3
PROFILE ?= quick
TORCH ?= torch==2.13.0
VENV := $(CURDIR)/.venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --quiet --disable-pip-version-check install
SOURCES := $(shell git ls-files csrc CMakeLists.txt setup.py 2>/dev/null)
CPP := git ls-files '*.cpp' '*.h' '*.cu'
export PATH := $(VENV)/bin:$(PATH)

.PHONY: help bench test test-emulated test-faults cuda-check lint format sanitize wheel dev gpu gpu-test \
  gpu-bench clean

help:
	@sed -n 's/^# \{0,1\}//p;/^SHELL/q' Makefile

bench: $(VENV)/bench.stamp $(VENV)/built.stamp
	$(PY) -m benchmarks run --profile $(PROFILE)

test: $(VENV)/test.stamp $(VENV)/built.stamp
	$(PY) -m pytest tests --ignore tests/emulator
	$(PY) -m pytest tests/emulator
	$(MAKE) test-emulated VARIANT=race
	$(MAKE) test-emulated VARIANT=asan
	$(MAKE) test-emulated
	$(MAKE) test-faults FAULTS="--sample 6 --operators beam"
	$(MAKE) cuda-check

lint: $(VENV)/lint.stamp
	ruff check .
	ruff format --check .
	mypy
	$(CPP) | xargs clang-format --dry-run -Werror
	$(PY) tools/house_rules.py

format: $(VENV)/lint.stamp
	ruff check --fix . ; ruff format .
	$(CPP) | xargs clang-format -i

# ---- environment: one folder, a stamp for each group of pyproject.toml ----

$(VENV)/base.stamp: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) "$(TORCH)" --group build
	touch $@

$(VENV)/lint.stamp: $(VENV)/base.stamp
	$(PIP) --group lint
	touch $@

$(VENV)/test.stamp: $(VENV)/base.stamp
	$(PIP) --group test
	$(PIP) --no-deps --group models || echo "flashkern: real models did not install; left out"
	touch $@

$(VENV)/bench.stamp: $(VENV)/test.stamp
	$(PIP) --group bench
	BEAMGRAD_CUDA=0 $(PIP) --no-build-isolation --no-deps --no-cache-dir --group peers || echo "flashkern: beamgrad did not install; its column stays empty"
	$(PIP) --no-deps --group engines || echo "flashkern: CTranslate2 did not install; its column stays empty"
	touch $@

# An editable install: the library lies in flashkern/, Python files are used where they are. pip
# keeps what a build prints to itself unless it fails; setup.py keeps its objects in build/editable-*.
$(VENV)/built.stamp: $(VENV)/base.stamp $(SOURCES)
	@echo "flashkern: building the CPU operators (portable, AVX2, AVX-512, AMX) with $${MAX_JOBS:-$$(nproc)} jobs"
	@$(PIP) --no-build-isolation --no-deps --editable . 2> build.log || (cat build.log; exit 1)
	$(PY) -m flashkern info
	touch $@

wheel: $(VENV)/base.stamp
	$(PY) -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .

BUILD ?= build/dev
OUT ?= $(CURDIR)/flashkern
dev:  # cmake and ninja may be there as packages of that Python alone
	@export PATH="$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$$PATH" && \
	(cmake -G Ninja -S . -B $(BUILD) -DCMAKE_INSTALL_PREFIX=$(OUT) $(CMAKE_ARGS) \
	  -DPython_EXECUTABLE=$$($(PYTHON) -c 'import sys; print(sys.executable)') > build.log 2>&1 \
	  || (cat build.log; exit 1)) && \
	cmake --build $(BUILD) && cmake --install $(BUILD) > build.log

# One library in a process: the emulated tests have their own. Built beside flashkern/'s own files,
# each variant in place of the one before it.
VARIANT ?= plain
EMULATED := build/emulated-$(VARIANT)
TESTS ?= tests/attention tests/lora tests/beam
# The drop-ins run over the plain variant alone.
ALSO_plain = tests/test_launches.py tests/compat tests/integrations
EMULATED_RUN_asan = $(SANITIZE_RUN_address)
test-emulated: $(VENV)/test.stamp $(VENV)/built.stamp
	@cmake -G Ninja -S . -B $(EMULATED) -DCMAKE_INSTALL_PREFIX=$(OUT) -DFLASHKERN_ISAS=portable \
	  -DFLASHKERN_CUDA=0 -DFLASHKERN_EMULATED_VARIANT=$(VARIANT) $(CMAKE_ARGS) \
	  -DPython_EXECUTABLE=$(PY) > build.log || (cat build.log; exit 1)
	@cmake --build $(EMULATED) --target flashkern_emulated
	@cmake --install $(EMULATED) --component emulated > build.log
	FLASHKERN_BACKEND=emulated $(EMULATED_RUN_$(VARIANT)) \
	  $(PY) -m pytest $(if $(filter asan,$(VARIANT)),-s) $(TESTS) $(ALSO_$(VARIANT))

test-faults: $(VENV)/test.stamp $(VENV)/built.stamp
	$(PY) tests/faults $(FAULTS)

# The library as a machine without a GPU would build it for others: the operators' CPU tests over it,
# and tests/test_cuda_build.py of what nvcc made. It takes minutes, so it is the last of the tests.
# Its CPU kernels multiply as AMX does, in arrays: so they are tested on CPUs without AMX too.
PORTABLE_TILES := -DFLASHKERN_ISAS=portable -DFLASHKERN_PORTABLE_LANES=16 -DFLASHKERN_PORTABLE_TILES=1
CUDA_ARCHS ?= 80;90a
NVCC := $(shell PATH="$$PATH:/usr/local/cuda/bin" command -v nvcc)
CUDA_CHECKED := build/cuda-check
ifeq ($(NVCC),)
cuda-check:
	@echo "flashkern: no nvcc here; the checks of the CUDA kernels are left out"
else
cuda-check: $(VENV)/test.stamp
	$(MAKE) dev PYTHON=$(PY) BUILD=build/cuda OUT=$(CURDIR)/$(CUDA_CHECKED)/flashkern \
	  CMAKE_ARGS="$(PORTABLE_TILES) -DFLASHKERN_CUDA=1 '-DFLASHKERN_CUDA_ARCHS=$(CUDA_ARCHS)'"
	$(call copy_package,$(CUDA_CHECKED))
	cd $(CUDA_CHECKED) && FLASHKERN_PORTABLE_TILES=1 PYTHONPATH=. $(PY) -m pytest -p no:cacheprovider tests/test_cuda_build.py \
	  tests/test_build.py $(TESTS)
endif

# What tests need, beside a library of their own.
define copy_package
rm -rf $(1)/tests
cp -r flashkern/*.py flashkern/compat flashkern/integrations $(1)/flashkern/
cp -r tests tools pyproject.toml $(1)/
endef

# The package is copied beside the sanitized library; the sanitizer must be the first library in the
# process. ThreadSanitizer: a race depends on no vector width, so one will do; it wants addresses
# that are not random. -s: a report must not end in pytest's buffer when the process ends.
SANITIZER ?= address
SANITIZE_TESTS ?= tests/attention tests/lora tests/beam tests/simd
SANITIZED := build/sanitized-$(SANITIZER)
SANITIZE_CMAKE_address :=
SANITIZE_CMAKE_thread := -DFLASHKERN_ISAS=portable
SANITIZE_RUN_address := env ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  LD_PRELOAD="$$(g++ -print-file-name=libasan.so):$$(g++ -print-file-name=libstdc++.so)"
SANITIZE_RUN_thread := setarch -R env TSAN_OPTIONS=halt_on_error=1:ignore_noninstrumented_modules=1 \
  LD_PRELOAD="$$(g++ -print-file-name=libtsan.so):$$(g++ -print-file-name=libstdc++.so)"
sanitize: $(VENV)/test.stamp
	$(MAKE) dev PYTHON=$(PY) BUILD=build/$(SANITIZER) OUT=$(CURDIR)/$(SANITIZED)/flashkern \
	  CMAKE_ARGS="-DFLASHKERN_SANITIZE=$(SANITIZER) $(SANITIZE_CMAKE_$(SANITIZER))"
	$(call copy_package,$(SANITIZED))
	cd $(SANITIZED) && PYTHONPATH=. $(SANITIZE_RUN_$(SANITIZER)) \
	  $(PY) -m pytest -s -p no:cacheprovider $(SANITIZE_TESTS)

# What is there is used, what is missing is named: tools/gpu.py. A failed test does not stop gpu.
gpu:
	@$(PYTHON) -m tools.gpu test bench

gpu-test gpu-bench:
	@$(PYTHON) -m tools.gpu $(@:gpu-%=%)

clean:
	rm -rf build dist *.egg-info flashkern/*.so build.log
