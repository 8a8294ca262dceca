# Everything is made from here; `make` alone lists the commands.
# PYTHON=...: the interpreter that builds the environment (3.11). VENV=...: where the environment lives.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

VENV ?= .venv
ifeq ($(origin PYTHON),undefined)
PYTHON := $(shell command -v python3.11 || command -v python3 || echo python3)
endif
BIN := $(VENV)/bin
PY := $(BIN)/python
STAMP := $(VENV)/.installed
# Taken as the user typed them, never expanded by make nor by a shell: the recipes read the environment.
override export P := $(value P)
override export NB := $(value NB)
override export R := $(value R)
CELL_TIMEOUT ?= 900
FRESH := $(CURDIR)/_build/records
BUILD := -W -n --keep-going --all
unexport PYTHONPATH

.PHONY: help env assets hero book pages book-smoke pages-smoke pages-single browser pdf test lint unit native nbval bench run sweep params refresh results stress audit lock clean

help:  ## list the commands
	@echo "make COMMAND"
	@sed -n 's/^\([a-z-]*\):.*  ## /  \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 14

KERNELS := setup.py $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h)
# Two makes at once take turns: at the environment, at MathJax, and at building pages into a folder. The make INSIDE of a turn
# looks again at what is left to do.
TURN = "$(PYTHON)" tools/in_turn.py
INSIDE ?=
ifeq ($(INSIDE),)
$(STAMP): requirements.lock pyproject.toml $(KERNELS)
	@$(TURN) $(VENV).lock "the environment" $(MAKE) --no-print-directory INSIDE=1 $(STAMP)
else
$(STAMP): requirements.lock pyproject.toml $(KERNELS)
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; sys.exit(0 if v[:2] == (3, 11) else f"error: the lock is for Python 3.11, {sys.executable} is {v[0]}.{v[1]}. Fix: make PYTHON=/path/to/python3.11")'
	test -x $(PY) || "$(PYTHON)" -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check -r requirements.lock
	$(PY) -m pip install --disable-pip-version-check --no-deps -e .
	touch $@
endif

env: $(STAMP)  ## the pinned environment in .venv

assets: env  ## fetch the models, benchmarks and texts (once, with checksums)
	$(PY) -m sparsity_lib.assets fetch

MATHJAX := book/_static/mathjax/es5/tex-chtml.js
ifeq ($(INSIDE),)
$(MATHJAX): tools/mathjax.py | env
	@$(TURN) _build/.mathjax.lock "book/_static/mathjax" $(MAKE) --no-print-directory INSIDE=1 $(MATHJAX)
else
$(MATHJAX): tools/mathjax.py
	$(PY) tools/mathjax.py
endif

hero: env
	@$(TURN) _build/.hero.lock "book/_static/hero.png" $(PY) tools/hero.py

book: assets hero $(MATHJAX)  ## execute the notebooks and render _build/html/index.html
	@$(TURN) _build/.lock _build $(MAKE) --no-print-directory INSIDE=1 pages
	@echo "open _build/html/index.html"

pages:
	$(PY) -m sparsity_lib.notebooks prune-cache
	SPARSITY_PROGRESS=0 SPARSITY_RECORDS=$(CURDIR)/_build/book-records $(BIN)/jupyter-book build . $(BUILD)

book-smoke: env hero $(MATHJAX)  ## render the committed outputs without executing (_build/smoke)
	@$(TURN) _build/.smoke.lock _build/smoke $(MAKE) --no-print-directory INSIDE=1 pages-smoke

pages-smoke:
	$(PY) tools/smoke_config.py _config.yml _build/smoke/_config.yml
	$(BIN)/jupyter-book build . --config _build/smoke/_config.yml --path-output _build/smoke $(BUILD)

browser: book-smoke  ## the pages in a real browser: links, errors, accessibility, explorer (needs Chromium)
	$(PY) -m pytest tests/browser

pdf: book-smoke  ## the committed outputs as one file to print: _build/book.pdf (needs Chromium)
	@$(TURN) _build/.single.lock _build/single $(MAKE) --no-print-directory INSIDE=1 pages-single

pages-single:
	$(BIN)/jupyter-book build . --builder singlehtml --config _build/smoke/_config.yml --path-output _build/single $(BUILD)
	$(PY) tools/pdf.py _build/single/_build/singlehtml _build/book.pdf

test: lint native unit nbval  ## everything that guards the project

lint: env
	$(BIN)/ruff check .

unit: assets
	$(PY) -m pytest tests

native:  ## the compiled operators under sanitizers, and for 64-bit ARM under emulation
	kernels/cpu/check/run.sh

# Each notebook runs once: nbval compares its text, the second call its numbers, by their tolerances.
nbval: assets
	rm -rf $(FRESH)
	SPARSITY_PROGRESS=0 SPARSITY_RECORDS=$(FRESH) $(PY) -m pytest --nbval --nbval-kernel-name python3 \
	  --nbval-sanitize-with tests/nbval_sanitize.cfg --nbval-cell-timeout $(CELL_TIMEOUT) -p no:cacheprovider notebooks
	SPARSITY_RECORDS=$(FRESH) $(PY) -m pytest tests/records

bench: env  ## measure speed on this machine (idle, please) into results/bench/
	@$(PY) -m sparsity_lib.bench

run: env  ## run one chapter with other parameters: make run NB=claws P="density=0.3"
	@$(PY) -m sparsity_lib.notebooks run --from-env P "$$NB"

sweep: env  ## the same at every combination: make sweep NB=claws P="density=0.3,0.5 model=a,b"
	@$(PY) -m sparsity_lib.notebooks sweep --from-env P "$$NB"

params: env  ## list what each chapter lets you change
	@$(PY) -m sparsity_lib.notebooks show --from-env NB

refresh: env  ## execute chapters and write their committed outputs: make refresh [NB=claws]
	$(PY) -m sparsity_lib.notebooks refresh --from-env NB

stress: env hero $(MATHJAX)  ## faults, bad inputs and loads tried on purpose, into results/ (an hour, 17 GB of disk for a while)
	status=0; $(PY) -m sparsity_lib.stress || status=$$?; \
	$(PY) -m sparsity_lib.results bench/scaling bench/streaming || status=$$?; exit $$status

audit:  ## everything that guards the project, with the newest packages that pyproject allows (_build/audit, an hour)
	"$(PYTHON)" tools/audit.py

results: env  ## full-size runs into results/ (hours; resumes): make results [R=name]
	@$(PY) -m sparsity_lib.results --from-env R

lock:  ## resolve pyproject.toml anew into requirements.lock and environment.yml
	"$(PYTHON)" tools/lock.py

clean:  ## remove what was built (not the environment, nor the assets)
	rm -rf _build runs .pytest_cache .ruff_cache build dist
