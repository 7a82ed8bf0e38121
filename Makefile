# make fit    install and train the quickstart      make test   install and run the tests
# make lint   ruff                                  make types  mypy
# make rehearsal  what make test leaves out: sweeps, repetitions, trainings to an AP
# make settings  300 command lines at random: each trains or says in a sentence why not
# make faults the fault matrix, to faults.md        make audit  packages against the advisory database
# make docs   the site, to build/site               make gpu    measure a GPU; without one, rehearse that
# make oldest the fast tests and an export with the oldest versions of all packages that pyproject.toml allows
#
# PYTHON=python3.12   another interpreter, 3.11 or newer
# CPU=1               PyTorch's CPU build, a tenth of the download
# PIP_ARGS=...        passed to pip install
# ARGS=...            passed to scripts/fit.py or to pytest
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
ARGS ?=
CPU ?=
BIN := $(VENV)/bin
OLDEST ?= .venv-oldest
CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: fit test rehearsal settings faults gpu oldest audit docs lint types check clean

fit: $(VENV)/.installed
	$(BIN)/python scripts/fit.py $(ARGS)

# A process of one thread on each core: two of two threads on two cores wait for each other. tests/conftest.py orders them.
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder \
		-m 'not rehearsal' $(ARGS)

rehearsal: $(VENV)/.installed-dev
	GPU_TESTS_ON_CPU=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile -m rehearsal $(ARGS)

settings: $(VENV)/.installed-dev
	RANDOM_SETTINGS=300 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_settings_at_random.py $(ARGS)

# What is promised when disks fill, processes die and files are hostile: each row of the table is a real injection.
faults: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults --fault-table faults.md $(ARGS)

# Eight minutes, and it keeps what it has when it is stopped. Without a GPU: tiny sizes on the CPU, a minute or two.
gpu: $(VENV)/.installed-dev
	OMP_NUM_THREADS=$(if $(shell command -v nvidia-smi),4,1) $(BIN)/python scripts/benchmark.py gpu --minutes 8 \
		--docs docs $(ARGS)

# An environment of its own, in which uv, unlike pip, can take the lowest version of all that pyproject.toml names.
oldest:
	$(MAKE) $(OLDEST)/bin/python VENV=$(OLDEST) CPU=
	$(OLDEST)/bin/pip install $(PIP_ARGS) uv
	$(OLDEST)/bin/uv pip install --python $(OLDEST)/bin/python --resolution lowest-direct -e '.[dev]'
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n auto --maxprocesses 8 --dist loadfile -m 'not slow' $(ARGS)
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest tests/test_export.py -k "finds_what_the_model_finds and not cascade"

# Needs the network: asks the advisory database about every package installed. Without it, tests/known_bad.txt holds.
audit: $(VENV)/.installed-dev
	$(BIN)/pip install -q $(PIP_ARGS) pip-audit
	$(BIN)/pip-audit --skip-editable

# Strict: a link, a name of the reference or a heading that does not exist fails. Nothing is fetched.
docs: $(VENV)/.installed-dev
	$(BIN)/python docs/render_notebooks.py
	$(BIN)/zensical build --clean --strict

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

check: lint types test

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, not %s: make PYTHON=python3.11 ..." % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(if $(CPU),$(BIN)/pip install $(PIP_ARGS) torch torchvision --index-url $(CPU_INDEX))

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install $(PIP_ARGS) -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install $(PIP_ARGS) -e '.[dev]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
