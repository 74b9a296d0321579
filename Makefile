# Each target makes its own virtual environment first, so the first command after a clone can be any of them.
# Settings: make PYTHON=python3.12 VENV=venv312 TORCH=torch==2.6.0 JOBS=0 test

PYTHON ?= python3
VENV   ?= .venv
# An explicit version: where pip knows a CPU build of it, that build is taken instead of several GB of CUDA.
TORCH  ?= torch==2.13.0
# Test processes: auto, a number, or 0 for none (needed by --pdb).
JOBS   ?= auto
SPREAD := -n $(JOBS) --maxprocesses 4 --dist worksteal

PY  := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
# One thread a process: the processes share the cores, and results do not depend on how many there are.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest

.DEFAULT_GOAL := help
.PHONY: help demo test test-all oldest gpu lint format types doctest snippets docs ci clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1	/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

demo: $(VENV)/.installed ## trains a small CNN on digits with 10 % wrong labels; the report goes to demo/
	$(PY) examples/digits.py --out demo

test: $(VENV)/.installed-dev ## the test suite, without the tests that take minutes and the snippets
	$(PYTEST) $(SPREAD) --ignore tests/test_docs.py

test-all: $(VENV)/.installed-dev ## all tests
	$(PYTEST) $(SPREAD) -m ""

# Of what runs with the package: the lower bounds in pyproject.toml.
OLDEST := torch==2.6.0 lightning==2.5.0 torchmetrics==1.4.0 numpy==1.26.0 scipy==1.11.1 pyarrow==15.0.0 rich==13.0.0
oldest: ## `make test` on Python 3.10 and the oldest versions of what the package needs, in .venv-oldest
	$(MAKE) test PYTHON=python3.10 VENV=.venv-oldest TORCH="$(OLDEST)"

# In 8 minutes. Where everything is installed and nothing can be: python3 -m benchmarks.overhead.gpu --out DIR
gpu: $(VENV)/.installed-dev ## on a machine with a GPU: its tests, what a recording costs there and why; to gpu/
	$(PY) -m benchmarks.overhead.gpu --out gpu

lint: $(VENV)/.installed-dev ## linter and formatter, changing nothing
	$(PY) -m ruff check
	$(PY) -m ruff format --check

format: $(VENV)/.installed-dev ## mends what the linter and the formatter can mend
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

types: $(VENV)/.installed-dev ## type checker
	$(PY) -m mypy

doctest: $(VENV)/.installed-dev ## the examples in the docstrings
	$(PYTEST) $(SPREAD) --doctest-modules --doctest-ignore-import-errors ine_callback

snippets: $(VENV)/.installed-dev ## the code in README.md, CONTRIBUTING.md and docs/
	$(PYTEST) $(SPREAD) tests/test_docs.py

# ruff formats the API's signatures and is looked for on the path. Not --quiet: then warnings are not counted, and pass.
docs: $(VENV)/.installed-dev ## the documentation as a site, in site/; open site/index.html
	PATH="$(VENV)/bin:$$PATH" properdocs build --strict --config-file mkdocs.yml

ci: ## all of the above in a fresh virtual environment, as CI does it
	bash .ci/run

clean: ## removes the virtual environment, caches and output
	rm -rf .venv .venv-oldest .mypy_cache .pytest_cache .ruff_cache .hypothesis dist demo gpu site lightning_logs

# What running needs, then what working on the project needs on top.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "ine_callback needs Python 3.10 or newer, '$(PYTHON)' is not; name one: make PYTHON=python3.11"; exit 1; }
	@test -x $(VENV)/bin/pip || { echo "==> 1/3 virtual environment in $(VENV), with $$($(PYTHON) --version)"; \
	  $(PYTHON) -m venv $(VENV); } || { echo "Python's venv module is missing; on Debian: apt-get install python3-venv"; exit 1; }
	@echo "==> 2/3 installing $(TORCH): a large download, a minute or more"
	@$(PIP) $(TORCH:%="%")
	@echo "==> 3/3 installing ine_callback and what its examples need: half a minute"
	@$(PIP) -e ".[bench]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "==> installing the test runner, linter, type checker and the site's builder: some seconds"
	@$(PIP) -e ".[dev]"
	@touch $@
