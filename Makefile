# `make demo` and `make test` are the two set-up commands: each makes the virtual environment it needs.
PYTHON ?= python3
VENV ?= .venv
DIR ?=
PIP = $(VENV)/bin/python -m pip

TARGETS ?= plan manifest model labels png jpeg tiff slide records checkpoint
SECONDS ?= 1200
TESTS ?= tests

.PHONY: demo test docs bench lint coverage fuzz sanitize wheel clean

demo: $(VENV)/installed
	$(VENV)/bin/histoseg-fast demo $(if $(DIR),"$(DIR)")

test: $(VENV)/installed-test
	$(VENV)/bin/python -m pytest

# The site needs nothing of the package, so nothing is compiled for it.
docs:
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet 'mkdocs-material>=9.5'
	$(VENV)/bin/python -m mkdocs build --strict

bench: $(VENV)/installed-test
	$(PIP) install --quiet --editable '.[bench]'
	$(VENV)/bin/python -m pytest -s $(addprefix benchmarks/bench_,labels.py stitch.py tiles.py files.py postprocess.py)
	$(VENV)/bin/histoseg-fast bench

lint: $(VENV)/installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

coverage: $(VENV)/installed-test
	$(VENV)/bin/python -m pytest --cov --cov-report=term $(TESTS)

# What is found is left in build/fuzz/TARGET; inputs that reached new code stay in build/fuzz/corpus for the next time.
fuzz: $(VENV)/installed-test
	for target in $(TARGETS); do \
	    mkdir -p build/fuzz/$$target && (cd build/fuzz/$$target && $(abspath $(VENV))/bin/python \
	        ../../../tests/fuzz/fuzz.py $$target --seconds $(SECONDS) --corpus ../corpus/$$target) || exit 1; \
	done

sanitize: $(VENV)/installed-test
	scripts/sanitize.sh address $(VENV)/bin/python
	scripts/sanitize.sh thread $(VENV)/bin/python

wheel:
	scripts/check_wheel.sh $(PYTHON)

# Editable, so that a change of the Python sources counts at once; a change of csrc/ builds again.
NATIVE = $(wildcard csrc/* histoseg_fast/*/*.pyx) pyproject.toml setup.py

$(VENV)/installed: $(NATIVE)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip
	$(PIP) install --quiet --editable .
	touch $@

$(VENV)/installed-test: $(NATIVE)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip
	$(PIP) install --quiet --editable '.[test]'
	touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) build site *.egg-info
