# Two commands do all the set-up:  make demo   and   make test
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
RUN    ?= runs/demo

# One thread: two that spin on a busy two-core machine are ten times slower. make OMP_NUM_THREADS=8 demo uses more.
export OMP_NUM_THREADS ?= 1

.PHONY: help demo test check perf explore format train clean

help:
	@echo "make demo     capture the shipped model on the shipped benchmark, analyse it, write $(RUN)/report.html"
	@echo "make test     lint, types, import contracts, tests"
	@echo "make explore  open the explorer on $(RUN)"
	@echo "make check    lint, types and import contracts alone"
	@echo "make perf     the benchmarks behind docs/performance.md"
	@echo "make train    train ling-tiny again, into out/ling-tiny"

demo: $(VENV)/.installed
	$(BIN)/ling-probe demo --out $(RUN)

explore: $(VENV)/.installed
	$(BIN)/ling-probe explore $(RUN)

test: check chromium
	$(BIN)/python -m pytest -n auto --dist loadfile

check: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

perf: $(VENV)/.installed-test
	$(BIN)/python -m pytest tests/perf -m perf

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

train: $(VENV)/.installed
	$(BIN)/ling-probe train --preset ling-tiny --workers 2 --snapshot 0.02 --snapshot 0.1 --snapshot 0.2 --snapshot 0.4 --out out/ling-tiny-first
	$(BIN)/ling-probe train --preset ling-tiny-finish --workers 2 --start out/ling-tiny-first --out out/ling-tiny
	cp -r out/ling-tiny-first/step-* out/ling-tiny/

# The browser test needs a Chromium; where it cannot be installed the test says so and is skipped.
.PHONY: chromium
chromium:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	    (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium) >/dev/null 2>&1; } || \
	  echo "no chromium found: the browser test will be skipped"

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) runs out .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .benchmarks
