# Each target is the one command on a fresh machine: it makes .venv if there is none and installs what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint clean

# Everything runs from this checkout, so an edit needs no reinstallation.
$(VENV)/.ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[train,lm,vln,dev]'
	touch $@

demo: $(VENV)/.ready
	$(BIN)/python -m benchmarks.demo

test: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict fq
	$(BIN)/mypy backbones benchmarks vae_lm vln

clean:
	rm -rf $(VENV) build dist demo
