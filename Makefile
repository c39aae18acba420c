# Two commands do everything on a fresh machine: `make bench` (the main job) and `make test`.
# Each makes its own environment in .venv and builds; none needs anything installed but Python and g++.
PYTHON ?= python3
PROFILE ?= quick
VENV := .venv
PY := $(VENV)/bin/python
JOBS := $(shell nproc)
CPP := $(shell git ls-files 'csrc/*.cpp' 'csrc/*.h' 2>/dev/null)

.PHONY: bench test lint format dev wheel sanitize clean

dev:  ## build in place with the Python given (default python3), for work on the kernels
	cmake -G Ninja -S . -B build/dev -DPython_EXECUTABLE=$$($(PYTHON) -c 'import sys; print(sys.executable)') \
	  -DCMAKE_INSTALL_PREFIX=flashkern $(CMAKE_ARGS) > build.log 2>&1 || (cat build.log; exit 1)
	cmake --build build/dev -j $(JOBS) && cmake --install build/dev > /dev/null
