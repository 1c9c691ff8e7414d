# Everything happens in .venv, made on first use from constraints.txt. Only Python >= 3.11 with pip is needed.
PYTHON ?= python3
BIN := .venv/bin
DEMO ?=

.PHONY: demo test slow lint clean

demo: .venv/ready
	@$(BIN)/isthmus data fetch demo
	@$(BIN)/isthmus demo $(DEMO)

test: .venv/ready
	@$(BIN)/isthmus data fetch demo
	@$(BIN)/isthmus data fetch tags
	$(BIN)/python -m pytest -m "not slow" -n logical --maxprocesses 8 --dist worksteal

slow: .venv/ready
	@$(BIN)/isthmus data fetch demo
	$(BIN)/python -m pytest -m slow

lint: .venv/ready
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy

.venv/ready: pyproject.toml constraints.txt tests/encoders/timm.txt tests/serving/langchain.txt
	$(PYTHON) -c 'import sys; sys.exit("Isthmus needs Python 3.11 or newer; try make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps --target .venv/timm --requirement tests/encoders/timm.txt || echo "No timm: what is compared with it will be skipped"
	$(BIN)/python -m pip install --quiet --no-deps --target .venv/langchain --requirement tests/serving/langchain.txt || echo "No LangChain: its test will be skipped"
	@touch $@

clean:
	rm -rf .venv runs
