# Everything runs in .venv, made on first use with the tested versions.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo smollm2 test test-axolotl quick lint bench campaign clean

demo: .venv/installed
	$(BIN)/pact demo

# QUICK=1: fewer rows, one seed; SEEDS=0: that one alone; DATA=DIR: published sets (docs/smollm2.md). Killed? The same command goes on.
smollm2: .venv/installed
	$(BIN)/pact experiment smollm2$(if $(DATA),_data)$(if $(QUICK),_quick) $(if $(SEEDS),--seeds $(SEEDS)) --jobs 2

test: .venv/installed
	$(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

# Axolotl's pins exclude torchtune's: an environment of its own (4 GB), in which these tests run `axolotl train`.
test-axolotl: .venv/installed .venv-axolotl/installed
	$(BIN)/python -m pytest -m axolotl $(PYTEST_ARGS)

quick: .venv/installed
	$(BIN)/python -m pytest -n 2 -m quick $(PYTEST_ARGS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

campaign: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.campaign

bench: .venv/installed
	$(BIN)/python -m benchmarks.step

.venv/installed: pyproject.toml constraints.txt
	@echo "Setting up .venv with the tested versions; this downloads PyTorch and takes a few minutes."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	PYTHONWARNINGS='ignore:Editable installation' $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

.venv-axolotl/installed: pyproject.toml constraints-axolotl.txt
	@echo "Setting up .venv-axolotl with the tested versions; this takes a quarter of an hour."
	$(PYTHON) -m venv .venv-axolotl
	.venv-axolotl/bin/python -m pip install --quiet --upgrade pip
	.venv-axolotl/bin/python -m pip install --quiet --constraint constraints-axolotl.txt --editable '.[axolotl]'
	touch $@

clean:
	rm -rf .venv .venv-axolotl outputs build *.egg-info
