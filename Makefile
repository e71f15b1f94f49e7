# Everything sets itself up: `make demo` and `make test` work on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo check test test-slow bench clean

demo: .venv/ready
	$(BIN)/rankprune demo

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Two workers of one thread each: more threads than cores would crawl.
test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

test-slow: .venv/ready
	$(BIN)/pytest -n 0 -m slow

bench: .venv/ready
	for name in resnet20-dense resnet20-trp-spatial resnet20-decompose-spatial; do \
		$(BIN)/rankprune bench run benchmarks/experiments/$$name.toml || exit 1; done

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv
