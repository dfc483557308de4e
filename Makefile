# make demo        the whole pipeline on tiny models; the last line says where the report is
# make serve       the server and the dashboard on the demo's result (OUT as for the demo); it prints its address and, the first time, the token
# make test        style, types, import layers, all tests
# make test-fast   the same in under a minute: without the tests marked slow and without checks of array shapes
# make lint        style, types, import layers
# make format      ruff's fixes and formatting
# Each makes its own environment in .venv: with uv where there is one, else with the newest Python (>= 3.11) that runs.

VENV := .venv
BIN  := $(VENV)/bin
OUT  ?= demo
.PHONY: help demo serve test test-fast lint format clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

demo: $(VENV)/.core
	@$(BIN)/mlx-distill demo --out $(OUT)

serve: $(VENV)/.serve
	@$(BIN)/mlx-distill serve --root $(dir $(abspath $(OUT))) --model $(notdir $(abspath $(OUT))) --share-accelerator

test: $(VENV)/.test
	@$(MAKE) --no-print-directory lint
	@OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-fast: $(VENV)/.test
	@$(MAKE) --no-print-directory lint
	@OPENBLAS_NUM_THREADS=1 UNCHECKED_SHAPES=1 $(BIN)/python -m pytest -m 'not slow' -n 2

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet . || { echo 'fix: make format'; exit 1; }
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

# The environment of the tests serves the demo too.
$(VENV)/.core: pyproject.toml .ci/environment
	@if [ -e $(VENV)/.test ] && [ ! pyproject.toml -nt $(VENV)/.test ]; then touch $@; else sh .ci/environment $(VENV) . && touch $@; fi

$(VENV)/.serve: pyproject.toml .ci/environment
	@if [ -e $(VENV)/.test ] && [ ! pyproject.toml -nt $(VENV)/.test ]; then touch $@; else sh .ci/environment $(VENV) '.[serve]' && touch $@; fi

$(VENV)/.test: pyproject.toml .ci/environment
	@sh .ci/environment $(VENV) '.[test]' && touch $@
