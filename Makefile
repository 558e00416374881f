# make train    set up, train the small default on real video, sample a video, print where to look
# make test     every fast test, two-rank ZeRO-3 included
# make help     the rest

PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
SHARDS := data/quickstart/index.jsonl
# The rest of the command line of a training: make train ARGS="run.steps=50 run.dir=runs/short"
ARGS   ?=
# Processes that share the tests; make test WORKERS= runs them in one, as a debugger needs it.
WORKERS ?= -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup train test test-slow check docs lock clean

help:           ## this list
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/ /' | awk '{c=$$1; $$1=""; printf "make %-10s %s\n", c, $$0}'

setup: $(VENV)/.installed $(SHARDS)  ## make .venv with the locked versions, cut the quickstart's clips into shards

# torch first and exactly: any other spelling may pull gigabytes of CUDA packages where no GPU is. The rest without
# dependencies, since the lock has all of them but one: opencv-python, which would overwrite opencv-python-headless.
$(VENV)/.installed: requirements.lock setup.py
	@echo "Installing the locked versions into $(VENV): about two minutes."
	@$(PYTHON) -c 'import sys; sys.exit("svd_ds needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install -q --disable-pip-version-check "$$(grep '^torch==' requirements.lock)"
	@$(PY) -m pip install -q --disable-pip-version-check --no-deps -r requirements.lock
	@$(PY) -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

$(SHARDS): | $(VENV)/.installed
	@$(PY) tools/make_shards.py --quickstart $(dir $@)

train: setup    ## train the small default on all GPUs, or on two CPU ranks; ARGS="key=value ..."
	@$(PY) tools/launch.py -- $(ARGS)

test: setup     ## the fast tests, two-rank ZeRO-3 included
	@$(PY) -m pytest -q -m "not slow" $(WORKERS)

test-slow: setup  ## the tests that take minutes
	@$(PY) -m pytest -q -m slow $(WORKERS)

check: setup    ## test, lint, formatting and types
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy
	@$(MAKE) --no-print-directory test

docs: setup     ## write docs/configuration.md and build the site into site/, every link and anchor checked
	@$(PY) -m svd_ds.config_reference docs/configuration.md
	@NO_MKDOCS_2_WARNING=true $(VENV)/bin/mkdocs build --strict --quiet
	@echo "wrote site/index.html"

lock:           ## write requirements.lock from what .venv holds
	@$(PY) -m pip freeze --all --exclude-editable | grep -vE '^(pip|triton)==' | sed -E 's/^torch==([0-9.]+).*/torch==\1/' > requirements.lock

clean:          ## remove .venv, shards and caches; runs/ stays
	@rm -rf $(VENV) data site .pytest_cache .mypy_cache .ruff_cache
