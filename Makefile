# Everything runs in an environment of its own, .venv, made on the first call.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The pins that CI runs with; a Python without a file of its own gets the newest releases.
PINS := $(wildcard constraints-$(shell $(PYTHON) -c 'import sys; print("py%d%d" % sys.version_info[:2])').txt)
INSTALL := $(BIN)/pip install --quiet $(addprefix --constraint ,$(PINS))
RUN_DIR ?= runs/quickstart
# glibc keeps freed memory, in huge pages: a train step on a CPU is a fifth faster (docs/LOG.md).
FAST_MALLOC := GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=8589934592

.PHONY: quickstart test test-slow faults bench lint clean

## Pretrain a tiny T5Gemma 2 on Python's own library, then average, export and infill.
quickstart: $(VENV)/.quickstart
	$(FAST_MALLOC) $(BIN)/t5g2 train --run_dir $(RUN_DIR) --gin_file configs/recipes/quickstart.gin $(ARGS)

## The fast tests, in two processes: most of their time is tracing and compiling, on one core.
test: $(VENV)/.test
	$(BIN)/pytest --numprocesses 2 --dist loadfile

## The tests that take minutes.
test-slow: $(VENV)/.test
	$(BIN)/pytest -m slow

## Kills, damage, full disks: what docs/reliability.md claims. An hour or more.
faults: $(VENV)/.test
	$(BIN)/pytest -m "slow or not slow" -s tests/faults tests/test_recovery.py tests/checkpoints

## What docs/benchmarks.md shows, as far as this machine's memory goes. Hours.
bench: $(VENV)/.test
	$(BIN)/python tools/step_costs.py
	$(BIN)/python tools/bench/around_step.py
	$(BIN)/python tools/bench/local_layer.py
	$(BIN)/python tools/bench/data.py
	$(BIN)/python tools/bench/transformers_step.py

## Lint, format and types.
lint: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache

$(VENV)/bin/pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "t5g2 needs Python 3.11 or later: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

$(VENV)/.quickstart: pyproject.toml $(PINS) | $(VENV)/bin/pip
	$(INSTALL) --editable '.[seqio]'
	touch $@

$(VENV)/.test: pyproject.toml $(PINS) | $(VENV)/bin/pip
	$(INSTALL) --editable '.[test]'
	touch $@ $(VENV)/.quickstart
