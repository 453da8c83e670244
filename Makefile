# Two commands matter: `make demo` shows what pixrl does, `make test` proves that it works.
# Both work on a fresh machine with Python 3.11 or 3.12 and nothing else.

VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
CORES  := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
# One single-threaded test process a core, at most 8: faster than one process that uses all cores.
WORKERS ?= $(shell [ $(CORES) -gt 8 ] && echo 8 || echo $(CORES))
OFFLINE := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
PYTEST  := $(OFFLINE) $(PY) -m pytest -n $(WORKERS) --dist loadfile

.PHONY: help setup demo test test-isa check lint docs figures mutate fuzz clean
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv and install pixrl into it, with the tested versions

# A marker file keeps repeated runs quick; a changed pyproject.toml or constraints.txt installs again.
$(STAMP): pyproject.toml constraints.txt
	@PYTHON="$(PYTHON)" sh tools/make_venv.sh $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup ## fuse and align on the toy world and write reports
	$(VENV)/bin/pixrl demo

lint: setup
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

check: lint ## format, lint, types and the quick tests
	$(PYTEST) -m 'not slow and not learning'

test: lint ## everything that CI runs
	$(PYTEST)

test-isa: setup ## the tests as other processors compute; ISA_TESTS="tests/models" and ISA_ONLY="avx2,oldest" run a part
	$(PY) tools/isa.py --workers $(WORKERS) --tests "$(ISA_TESTS)" --only "$(ISA_ONLY)"

docs: setup ## build the documentation site into build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
	@echo "open build/site/index.html"

figures: setup ## make the pictures of the docs again
	$(OFFLINE) $(PY) tools/figures.py

mutate: setup ## make one mistake at a time, in the equations and elsewhere, and count what the tests notice
	$(OFFLINE) $(PY) tools/mutate.py
	$(OFFLINE) $(PY) tools/mutate_semantic.py

fuzz: setup ## give every parser of text and files from outside strange input for about a minute
	HYPOTHESIS_PROFILE=long $(PYTEST) tests/fuzz

clean: ## remove the environment, caches and builds (never a run)
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
