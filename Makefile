# Every target uses .venv and creates it if missing. Needs Python 3.11 to 3.13.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test bench lint static clean

demo: .venv/installed
	$(BIN)/python -m bilinear_ops demo

test: .venv/installed
	$(BIN)/python -m pytest -n 2

bench: .venv/installed
	$(BIN)/python -m bench

static: .venv/installed
	$(BIN)/python -m bench.static

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e ".[test,demo,plots,transformers]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
