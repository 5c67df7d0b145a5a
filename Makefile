# Everything runs in .venv, which the first target that needs it builds. It needs a Python from
# 3.10 on with its venv module; name another one with `make PYTHON=python3.12 test`.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# Two workers with one thread each: torch's own threads in several workers only slow each other.
TEST   := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n 2
ARGS   ?=

.DEFAULT_GOAL := help
.PHONY: help env test test-all test-adapters test-browser test-paper models operators bench \
	bench-scaling paper demo docs lint format hooks clean distclean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

env: $(READY)  ## build the environment

# Rebuilt when a dependency or a pin changes; a half-finished one leaves no stamp and is resumed.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "$(PYTHON) is older than 3.10: make PYTHON=python3.11 ..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[test,demo,lint]'
	@touch $@

test: $(READY)  ## run the tests (without those marked slow); ARGS="-k name" selects
	$(TEST) -m "not slow" $(ARGS)

test-all: $(READY)  ## run all tests
	$(TEST) $(ARGS)

test-adapters: $(READY)  ## run the tests against laplace-torch, which this installs with all it needs
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[adapters]'
	$(TEST) tests/test_adapters.py tests/test_docs.py $(ARGS)

test-browser: $(READY)  ## run the tests of the page in a browser; chromium must be installed
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[browser]'
	$(TEST) tests/test_inspect_views.py $(ARGS)

test-paper: $(READY)  ## run the experiments at a tiny size, with what they need installed
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[paper]'
	$(TEST) tests/test_paper.py $(ARGS)

bench: $(READY)  ## time steps against the gradient's and other diagonals; ARGS="cnn gpt" selects
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/step.py --others $(ARGS)

bench-scaling: $(READY)  ## the ratio over model and batch sizes; ARGS="--plot ratio.svg" draws it
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/scaling.py $(ARGS)

paper: $(READY)  ## the paper's experiments into build/paper; ARGS="quality --full" selects
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[paper]'
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/paper $(ARGS)

demo: $(READY)  ## train on handwritten digits with Hessian diagonals; ARGS="--epochs 3 --seed 1"
	$(BIN)/python examples/digits.py $(ARGS)

models: $(READY)  ## measure real models and write docs/models.md; ARGS="--only BERT" selects
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[models]'
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/real_models.py --write docs/models.md $(ARGS)

operators: $(READY)  ## every operator of PyTorch's database; writes docs/operators.md (10 minutes)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python benchmarks/operators.py --table docs/operators.md $(ARGS)

docs: $(READY)  ## build the documentation into site/
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "site/index.html; with search: $(PYTHON) -m http.server -d site"

lint: $(READY)  ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

hooks: $(READY)  ## check every commit before it is made
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	$(BIN)/pre-commit install

clean:  ## remove what runs have left behind, but keep the environment
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis ./*.egg-info
	find hesscale_fx tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## remove the environment too
	rm -rf $(VENV)
