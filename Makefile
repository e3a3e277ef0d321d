# Everything runs from here with python3 (3.11 or later) and make; `make help` lists the targets.
# The first target you run makes .venv and fills it; later runs find it up to date and install nothing.

PYTHON ?= python3
# Extra options for pip, for instance on a Linux machine without a GPU, where PyPI's torch brings CUDA along:
#   make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_ARGS ?=
# Extra options for pytest, for instance: make test PYTEST_ARGS="-x tests/loggers"
PYTEST_ARGS ?= -n 2 --dist worksteal

VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
BENCH_VENV := .venv-bench
BENCH_PY := $(BENCH_VENV)/bin/python
BENCH_READY := $(BENCH_VENV)/.ready
DOCS_VENV := .venv-docs
DOCS_PY := $(DOCS_VENV)/bin/python
DOCS_READY := $(DOCS_VENV)/.ready
TORCH := $(shell grep '^torch==' constraints.txt)
# `make notebooks WRITE=1` writes outputs that differ; ONLY="01 03" takes some of the notebooks.
WRITE ?=
ONLY ?=
# How many processes `make kills` kills.
KILLS ?= 500
# The ends of the range of torch in pyproject.toml, each tested in an environment of its own.
OLDEST := 2.11.0
NEWEST := 2.14.1
# What the ends are tested with: what leans on torch's internals, and whole trainings. `make test-newest ENDS=` runs everything.
ENDS ?= -m "not slow" tests/jit tests/sharding tests/precision --ignore=tests/precision/test_conformance.py \
	$(addprefix tests/,test_functional.py test_recompute.py test_step.py test_grad.py test_keyed.py test_transforms.py test_preemption.py \
	optim/test_lift.py optim/test_foreach.py optim/test_blocks.py optim/test_second_order.py snapshot/test_codec.py \
	snapshot/test_template.py parallel/test_same_bits.py loop/test_run.py loop/test_small_kernels.py)
# What `make zoo` trains and traces: small models of transformers, of each kind one.
ZOO ?= bert distilbert xlnet gpt2 llama qwen2 gemma2 opt mamba vit clip whisper
INSTALL := -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)
EXTRAS := dev,examples,notebooks,data,float8,export,metrics,parquet,optuna,hydra,onnx,ray

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-resume demo-topology examples faults kills test test-slow test-all test-oldest test-newest test-device setup-oldest setup-newest setup-docs zoo lint format notebooks docs bench bench-quick gpu clean
.DELETE_ON_ERROR:

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile

setup: $(READY)  ## make .venv and install what is missing

demo: $(READY)  ## train on the real digits: the main example
	$(PY) examples/digits.py

demo-resume: $(READY)  ## kill the same training four times, resume it, compare the bits
	$(PY) examples/demo_resume.py

demo-topology: $(READY)  ## train the same model on 1, 2 and 4 processes, compare the bits
	$(PY) examples/demo_topology.py

examples: $(READY)  ## run every example with its quick settings, one table; at most twelve minutes on two cores
	$(PY) examples/run_all.py

faults: $(READY)  ## break a small training in more than twenty ways, hundreds of times; one table
	$(PY) examples/demo_faults.py

kills: $(READY)  ## kill processes at every file operation of every kind of save; KILLS=10000 takes hours
	$(PY) -m tests.snapshot.strikes $(KILLS)

test: $(READY)  ## run the quick tests: every contract has some; four minutes on two cores
	$(PY) -m pytest $(PYTEST_ARGS) -m "not slow"

test-slow: $(READY)  ## run the slow ones: whole compilations, every moment of a save, examples
	$(PY) -m pytest $(PYTEST_ARGS) -m slow

test-all: $(READY)  ## run the whole test suite
	$(PY) -m pytest $(PYTEST_ARGS)

setup-oldest: .venv-torch-$(OLDEST)/.ready

setup-newest: .venv-torch-$(NEWEST)/.ready

setup-docs: $(DOCS_READY)

test-oldest: .venv-torch-$(OLDEST)/.ready  ## a selection of the tests on the oldest torch of the range
	.venv-torch-$(OLDEST)/bin/python -m pytest $(PYTEST_ARGS) $(ENDS)

test-newest: .venv-torch-$(NEWEST)/.ready  ## the same on the newest, which `pip install torch` brings
	.venv-torch-$(NEWEST)/bin/python -m pytest $(PYTEST_ARGS) $(ENDS)

test-device: .venv-device/.ready  ## steps on fake CUDA tensors: devices, waits and launches; gigabytes of torch, no card
	.venv-device/bin/python -m pytest $(PYTEST_ARGS) tests/device

zoo: $(READY)  ## train, trace and resume a dozen models of transformers; ZOO="t5 bart" chooses
	$(PY) -m benchmarks.zoo --check $(ZOO)

lint: $(READY)  ## ruff check, ruff format --check, mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(READY)  ## let ruff mend what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

notebooks: $(READY)  ## execute the notebooks and compare with what is committed; WRITE=1 writes it, ONLY="01 03" chooses
	$(PY) notebooks/execute.py $(if $(WRITE),--write) $(ONLY)

docs: $(DOCS_READY)  ## build the site of the docs into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(DOCS_PY) -m mkdocs build --strict --quiet

bench: $(BENCH_READY)  ## run the benchmarks against other trainers
	$(BENCH_PY) -m benchmarks.run $(ARGS)

bench-quick: $(BENCH_READY)  ## the same, smaller and shorter
	$(BENCH_PY) -m benchmarks.run --quick $(ARGS)

gpu: $(READY)  ## what only a card can settle, in eight minutes; ARGS="--device cpu" tries it without one
	$(PY) -m benchmarks.gpu $(ARGS)

clean:  ## remove environments, caches and runs
	rm -rf $(VENV) $(BENCH_VENV) $(DOCS_VENV) .venv-device .venv-torch-* runs site build dist .hypothesis .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- set-up ---------------------------------------------------------------------------------------------------------

# An exact torch goes in first and alone: asked for by a range, pip may download several builds before it settles.
$(READY): pyproject.toml constraints.txt
	$(call make_venv,$(VENV))
	@echo "[set-up 2/3] installing $(TORCH)"
	@$(PY) $(INSTALL) -c constraints.txt '$(TORCH)'
	@echo "[set-up 3/3] installing purestep[$(EXTRAS)] and what it needs, at the versions of constraints.txt"
	@$(PY) $(INSTALL) -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@
	@echo "[set-up] done"

$(BENCH_READY): pyproject.toml constraints.txt benchmarks/requirements.txt
	$(call make_venv,$(BENCH_VENV))
	@echo "[set-up 2/3] installing $(TORCH)"
	@$(BENCH_PY) $(INSTALL) -c constraints.txt '$(TORCH)'
	@echo "[set-up 3/3] installing purestep and benchmarks/requirements.txt"
	@$(BENCH_PY) $(INSTALL) -c constraints.txt -e . -r benchmarks/requirements.txt
	@touch $@
	@echo "[set-up] done"

# The site is built from sources: only the extra `docs` is installed.
$(DOCS_READY): pyproject.toml constraints.txt
	$(call make_venv,$(DOCS_VENV))
	@echo "[set-up 2/3] reading the extra docs of pyproject.toml"
	@$(DOCS_PY) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' \
		> $(DOCS_VENV)/requirements.txt
	@echo "[set-up 3/3] installing it, at the versions of constraints.txt"
	@$(DOCS_PY) $(INSTALL) -c constraints.txt -r $(DOCS_VENV)/requirements.txt
	@touch $@
	@echo "[set-up] done"

# The build of torch with CUDA, which is what PyPI has for Linux; it needs no card to make fake tensors.
.venv-device/.ready: pyproject.toml constraints.txt
	$(call make_venv,.venv-device)
	@echo "[set-up 2/3] installing $(TORCH) with CUDA"
	@.venv-device/bin/python $(INSTALL) '$(TORCH)'
	@.venv-device/bin/python -c 'import sys, torch; sys.exit(0 if torch.backends.cuda.is_built() else "torch " + torch.__version__ \
		+ " has no CUDA. Write: make test-device PIP_ARGS=\"--index-url https://pypi.org/simple\"")'
	@echo "[set-up 3/3] installing purestep[dev] and what it needs, at the versions of constraints.txt"
	@.venv-device/bin/python $(INSTALL) -c constraints.txt -e '.[dev]'
	@touch $@
	@echo "[set-up] done"

.venv-torch-%/.ready: pyproject.toml constraints.txt
	$(call make_venv,.venv-torch-$*)
	@echo "[set-up 2/3] installing torch==$*"
	@.venv-torch-$*/bin/python $(INSTALL) 'torch==$*'
	@grep -vE '^(torch|setuptools)==' constraints.txt > .venv-torch-$*/constraints.txt
	@echo "[set-up 3/3] installing purestep[$(EXTRAS)] and what it needs, at the versions of constraints.txt"
	@.venv-torch-$*/bin/python $(INSTALL) -c .venv-torch-$*/constraints.txt -e '.[$(EXTRAS)]'
	@touch $@
	@echo "[set-up] done"

define make_venv
@command -v $(PYTHON) >/dev/null || { echo "purestep needs Python 3.11 or later, and '$(PYTHON)' was not found." \
	"Write: make PYTHON=/path/to/python3.11"; exit 1; }
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "purestep needs Python 3.11 or later, and" \
	"'$(PYTHON)' is $$($(PYTHON) --version). Write: make PYTHON=/path/to/python3.11"; exit 1; }
@echo "[set-up 1/3] making $(1) with $$($(PYTHON) --version)"
@$(1)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(1) || { echo "$(PYTHON) could not" \
	"make a virtual environment. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
endef
