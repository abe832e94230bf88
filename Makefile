# Every target works alone on a machine with Python 3: it first makes .venv and installs into it.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed

# the kernels are tested under the oldest Triton that serves and under this one
LATER_TRITON = 3.9.0
LATER = $(VENV)-triton-$(LATER_TRITON)

# tests run in so many processes, file by file and one thread each: small networks wait for threads;
# the files keep the order of tests/conftest.py
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# what runs Triton; CUDA's kernels do not
OF_TRITON = $(filter-out %/test_cuda_kernels.py,$(wildcard tests/ops/test_*_kernels.py tests/ops/test_*_compiled.py))

# minutes that one call of gpu-check may take
MINUTES ?= 8

.PHONY: demo test test-triton check bench bench-rows readme-table gpu-check clean

demo: $(INSTALLED)
	$(BIN)/fastunet demo

test: $(INSTALLED)
	$(PYTEST)

test-triton: $(INSTALLED) $(LATER)/triton
	PYTHONPATH=$(LATER) $(PYTEST) $(OF_TRITON)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*.h csrc/*.cpp csrc/cpu/* csrc/cuda/* tests/cuda_emulation/*

bench: $(INSTALLED)
	$(BIN)/python -m pytest --benchmark

# every row of this machine, an hour on two cores; what an interrupt leaves is resumed
bench-rows: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[bench]"
	$(BIN)/fastunet bench --record benchmarks/results
	$(BIN)/python -m benchmarks.results

readme-table: $(INSTALLED)
	$(BIN)/python -m benchmarks.results

# for a machine with a GPU, a CUDA toolkit and no network: the torch that is there, no .venv
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check --minutes $(MINUTES)

# torch comes first and from the constraints: the extension is built against it, without isolation
$(INSTALLED): pyproject.toml setup.py constraints.txt $(shell find csrc -type f)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=70,<82" wheel ninja
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch "numpy<2.4"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[dev]"
	touch $@

$(LATER)/triton: | $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps --target $(LATER) triton==$(LATER_TRITON)

clean:
	rm -rf $(VENV) $(LATER) build demo fastunet/*.so *.egg-info
