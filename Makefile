# `make quickstart` and `make test` need Python 3.11, 3.12 or 3.13 and nothing else.
#
#   make quickstart    install into .venv, then run the main job on the embedded data
#   make test          install into .venv with the test extra, then run the tests
#   make test-slow     the slow tests too (light environment, kills, longer runs)
#   make test-extras   each extra alone, in new environments of Python 3.11 and 3.13
#   make test-beam     the tests on Apache Beam, in an environment of their own
#   make compare       every objective on embedded data, three seeds (2 to 3 hours on 2 cores)
#   make bench         steps beside their peers (BENCH_PEERS, T5X_SRC, BENCH_DATA)
#   make docs          the documentation site, build/docs/html/index.html
#   make lint          ruff
#   make clean         remove .venv, .venv-beam, runs/ and caches
#
# PYTHON=python3.12 chooses the interpreter, PIP_ARGS and PYTEST_ARGS add arguments.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# --no-compile: compiling all of TensorFlow to bytecode takes longer than what is
# imported of it, which Python compiles at the first import.
PIP_INSTALL = $(BIN)/python -m pip install --no-compile --disable-pip-version-check \
	-c constraints.txt $(PIP_ARGS)
# tests/conftest.py says which tests go to one process, and in which order.
PYTEST_WORKERS ?= -n auto
INSTALL_INPUTS := setup.py pyproject.toml constraints.txt

.PHONY: quickstart compare bench install test test-slow test-extras test-beam docs lint clean

quickstart: install
	$(BIN)/jaxalign quickstart

compare: install
	$(PIP_INSTALL) -e ".[plots]"
	$(BIN)/jaxalign compare

bench: $(VENV)/.installed-test
	$(BIN)/python -m benchmarks.steps $(BENCH_ARGS)

install: $(VENV)/.installed

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(PYTEST_WORKERS) $(PYTEST_ARGS)

test-slow: $(VENV)/.installed-test-slow
	$(BIN)/python -m pytest $(PYTEST_WORKERS) -m "not gpu and not tpu and not beam" \
	  $(PYTEST_ARGS)

test-extras: $(VENV)/.installed-test
	$(BIN)/python -m pytest tests/test_extras.py -m "" $(PYTEST_ARGS)

test-beam: .venv-beam/.installed
	.venv-beam/bin/python -m pytest tests/prepare/test_beam.py -m "" $(PYTEST_ARGS)

# A warning fails it. The pages are laid out of docs/ and of the code first.
docs: $(VENV)/.installed-docs
	$(BIN)/python docs/site/stage.py build/docs/source
	$(BIN)/python -m sphinx -W --keep-going -q -b html -c docs/site \
	  build/docs/source build/docs/html
	@echo build/docs/html/index.html

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) .venv-beam runs build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	  2> /dev/null || { echo "jaxalign needs Python 3.11, 3.12 or 3.13, which $(PYTHON)" \
	  "is not. Name another: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Apache Beam and constraints.txt exclude each other: a line of constraints-beam.txt
# stands in for that of the same package there.
.venv-beam/.installed: $(INSTALL_INPUTS) constraints-beam.txt | $(BIN)/python
	$(BIN)/python -m venv .venv-beam
	awk -F== 'NR == FNR { own[$$1] } NR == FNR || !($$1 in own)' \
	  constraints-beam.txt constraints.txt > .venv-beam/constraints.txt
	.venv-beam/bin/python -m pip install --no-compile --disable-pip-version-check \
	  -c .venv-beam/constraints.txt $(PIP_ARGS) -e ".[beam]" pytest hypothesis
	@touch $@

# libtpu and Kubernetes' schemas: hundreds of megabytes that only slow tests want.
$(VENV)/.installed-test-slow: $(VENV)/.installed-test
	$(PIP_INSTALL) -e ".[test,slow-tests]"
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP_INSTALL) -e ".[docs]"
	@touch $@

# The stamps make a second call instant; a change of what they depend on installs again.
$(VENV)/.installed: $(INSTALL_INPUTS) | $(BIN)/python
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.installed-test: $(INSTALL_INPUTS) | $(BIN)/python
	$(PIP_INSTALL) -e ".[test]"
	@touch $@ $(VENV)/.installed
