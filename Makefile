# Every target uses .venv and creates it if missing. Needs Python 3.11 to 3.13.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test bench lint static static-old clean

demo: .venv/installed
	$(BIN)/python -m bilinear_ops demo

test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile

bench: .venv/installed
	$(BIN)/python -m bench

static: .venv/installed
	$(BIN)/python -m bench.static

# The oldest Triton that is supported, under the pinned torch: the machine code is Triton's alone. CI checks the newest.
static-old: .venv-old/installed
	.venv-old/bin/python -m bench.static

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e ".[test,demo,plots,transformers]"
	touch $@

.venv-old/installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .venv-old
	.venv-old/bin/pip install -c constraints.txt -e .
	.venv-old/bin/pip install --no-deps "triton==3.6.0" "numpy<2.4"
	touch $@

clean:
	rm -rf .venv .venv-old build dist *.egg-info
