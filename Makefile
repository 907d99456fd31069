PYTHON      ?= python3
VENV        ?= .venv
# What pip installs first. TORCH_INDEX is the index to take it from, such as the one of PyTorch's CPU-only wheels.
TORCH       ?= torch==2.13.0
TORCH_INDEX ?=

MODEL       ?= examples/tiny-mixtral
TARGET      ?= cpu
PRECISION   ?= int8
FLAGS       ?=
NAME        := $(notdir $(MODEL:/=))
ENGINE      ?= build/engines/$(NAME)-$(TARGET)-$(PRECISION)
# TensorRT engines in int8 and fp8 need the ranges of activations, which are measured over this text.
CALIBRATION ?= build/calibrations/$(NAME).json
CALIBRATION_TEXT ?= $(MODEL)/calibration.txt
ENGINES     ?= examples/engines.txt
PROMPT      ?= def read_lines(path, encoding=None):
SAMPLING    ?= --temperature 0.5 --top-p 0.9 --repetition-penalty 1.1 --seed 1
TEXT        ?= $(MODEL)/heldout.txt

JOBS        ?= 2
TESTS       ?= tests
ARGS        ?=

BIN         := $(VENV)/bin
READY       := $(VENV)/.ready
ROOMS       := export plugins runtime

# Idle threads of torch sleep: on a shared machine, spinning ones cost more than they gain.
export OMP_WAIT_POLICY ?= PASSIVE
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo engine engines bench bench-peers gpu-setup parity test lint format typecheck ci wheel clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(READY) ## Make .venv with the gatework command and everything that building and testing need

$(READY): pyproject.toml $(wildcard plugins/moe/cpu/*.cpp plugins/moe/cpu/*.h plugins/moe/cpu/CMakeLists.txt)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	    { echo 'gatework needs Python 3.11 or newer and "$(PYTHON)" is not: name one, as in make PYTHON=python3.12' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	$(BIN)/pip install --editable '.[dev]'
	@touch $@

demo: engine ## Build an int8 engine from the bundled checkpoint, generate with it, measure it, check it
	$(BIN)/gatework generate $(ENGINE) --echo --prompt '$(PROMPT)' --max-tokens 72 $(SAMPLING)
	$(BIN)/gatework bench $(ENGINE)
	$(BIN)/gatework verify $(ENGINE) --reference $(MODEL) --text $(TEXT)

ifneq ($(filter int8 fp8,$(if $(filter cpu cuda,$(TARGET)),,$(PRECISION))),)
RANGES      := $(CALIBRATION)
endif

engine: $(READY) $(RANGES) ## Build an engine, if anything changed: make engine MODEL=path/to/checkpoint TARGET=a100 PRECISION=int8
	$(strip $(BIN)/gatework build $(MODEL) --target $(TARGET) --precision $(PRECISION) --out $(ENGINE) --force --if-changed \
	    $(addprefix --calibration ,$(RANGES)) $(FLAGS))

$(CALIBRATION): $(wildcard $(MODEL)/*) | $(READY)
	@test -f $(CALIBRATION_TEXT) || { echo '$(PRECISION) on $(TARGET) needs a sample text, and there is no $(CALIBRATION_TEXT):' \
	    'name one with CALIBRATION_TEXT=file, or a finished calibration with CALIBRATION=file' >&2; exit 1; }
	@mkdir -p $(@D)
	$(BIN)/gatework calibrate $(MODEL) --text $(CALIBRATION_TEXT) --out $@ --force

# One target a line, so that make -j builds them side by side.
ENGINE_LINES := $(shell grep -nv -e '^ *\#' -e '^ *$$' $(ENGINES) 2>/dev/null | cut -d: -f1)
engines: $(ENGINE_LINES:%=.engine-%) ## Build the engines listed in ENGINES=examples/engines.txt, if anything changed
	@test -f $(ENGINES) || { echo 'there is no $(ENGINES)' >&2; exit 1; }
.engine-%: $(READY)
	@set -f; set -- $$(sed -n '$*p' $(ENGINES)); model=$$1; target=$$2; precision=$$3; shift 3; \
	    $(MAKE) engine MODEL=$$model TARGET=$$target PRECISION=$$precision FLAGS="$$* $(FLAGS)"

bench: engine ## Measure the engine of MODEL, TARGET and PRECISION
	$(BIN)/gatework bench $(ENGINE)

# llama.cpp is built for this machine's instructions, in an environment of its own.
PEERS       := build/peers/.venv
bench-peers: $(READY) $(PEERS)/.ready ## Measure random models against llama.cpp and transformers: make bench-peers ARGS='--help'
	$(BIN)/python -m benchmarks.peers $(ARGS)

$(PEERS)/.ready: benchmarks/peers/requirements.txt
	$(PYTHON) -m venv $(PEERS)
	CMAKE_ARGS='-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF' $(PEERS)/bin/pip install --no-binary llama-cpp-python --requirement $<
	@touch $@

parity: $(READY) ## Verify every family, precision and target that this machine can run; pages in build/parity
	$(BIN)/python -m benchmarks.parity --pages build/parity $(ARGS)

# What benchmarks/on_gpu.sh uses. An environment holds ONNX Runtime for CPUs or the one for GPUs, hence the second. PyTorch has
# to be one with CUDA: TORCH_INDEX names an index of such wheels where the default has others.
GPU         := build/on-gpu
CUDA        := $(GPU)/.venv-cuda
ONNX_GPU    ?= onnxruntime-gpu>=1.31,<1.34
SM          ?=
gpu-setup: $(GPU)/.ready $(CUDA)/.ready $(GPU)/tokens.json ## Make ready for benchmarks/on_gpu.sh; without a GPU, for the one named: make gpu-setup SM=90
	$(BIN)/python -m benchmarks.compile_kernels $(addprefix --sm ,$(SM))

$(GPU)/.ready: $(READY)
	$(BIN)/pip install --editable '.[dev,tensorrt]'
	@mkdir -p $(@D) && touch $@

$(CUDA)/.ready: pyproject.toml
	$(PYTHON) -m venv $(CUDA)
	$(CUDA)/bin/pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	$(CUDA)/bin/pip install --editable '.[dev,cuda]'
	$(CUDA)/bin/pip uninstall --yes onnxruntime onnxruntime-gpu
	$(CUDA)/bin/pip install --no-deps '$(ONNX_GPU)'
	@touch $@

$(GPU)/tokens.json: $(READY)
	@mkdir -p $(@D)
	$(BIN)/python benchmarks/random_mixtral.py $(GPU)/random
	for target in cpu cuda; do $(BIN)/gatework build $(GPU)/random --target $$target --precision fp32 --max-seq 1024 \
	    --out $(GPU)/random-$$target --force || exit; done
	$(BIN)/python benchmarks/same_tokens.py $(GPU)/random-cpu --write $@

test: $(READY) ## Run the tests: make test, or make test TESTS=tests/runtime ARGS='-k sampler'
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal $(ARGS) $(TESTS)

lint: $(READY) ## Check style and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(READY) ## Mend style and formatting
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

typecheck: $(READY) ## Check types
	@mkdir -p build/typing/gatework
	@ln -sfn $(ROOMS:%=../../../%) build/typing/gatework
	@ln -sf "$$($(BIN)/python -c 'import gatework; print(gatework.__file__)')" build/typing/gatework/__init__.py
	$(BIN)/mypy

ci: ## Run what CI runs
	.ci/run

wheel: $(READY) ## Build dist/gatework-*.whl
	$(BIN)/python -m build --wheel --no-isolation

clean: ## Remove what the other targets made, .venv excepted
	rm -rf build dist
