# Every target works alone on a machine with Python 3: it first makes .venv and installs into it.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed

.PHONY: demo test check bench gpu-check clean

demo: $(INSTALLED)
	$(BIN)/fastunet demo

test: $(INSTALLED)
	$(BIN)/python -m pytest

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*.h csrc/*.cpp csrc/cpu/* csrc/cuda/* tests/cuda_emulation/*

bench: $(INSTALLED)
	$(BIN)/python -m pytest --benchmark

# for a machine with a GPU, a CUDA toolkit and no network: the torch that is there, no .venv
gpu-check:
	FASTUNET_BUILD_CUDA=1 $(PYTHON) setup.py build_ext --inplace
	$(PYTHON) -m pytest

# torch comes first and from the constraints: the extension is built against it, without isolation
$(INSTALLED): pyproject.toml setup.py constraints.txt $(shell find csrc -type f)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=70,<82" wheel ninja
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch "numpy<2.4"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build demo fastunet/*.so *.egg-info
