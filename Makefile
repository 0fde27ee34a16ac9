PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
QUICK = runs/quickstart

.PHONY: help quickstart test test-slow browser lint env wheel clean

help:
	@echo "make quickstart   environment, train an adapter on 200 pictures, before/after grid (no GPU needed)"
	@echo "make test         environment, then every fast test"
	@echo "make test-slow    the tests that take minutes"
	@echo "make browser      Chromium, for the test of the studio's page (Debian, Ubuntu; as root)"
	@echo "make lint         ruff and mypy"
	@echo "make wheel        dist/*.whl"

# One stamp per environment: rebuilt when the dependencies change.
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

env: $(VENV)/.ready

quickstart: env
	test -d $(QUICK)/images || $(BIN)/vislr zoo images --style outline --split train --limit 200 --export $(QUICK)/images
	$(BIN)/vislr train --config train/emoji-unet-convlora.yaml --data.folder $(QUICK)/images --output.folder $(QUICK)/adapter --output.overwrite true
	@echo "look at $(QUICK)/adapter/before_after.png"

test: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: env
	$(BIN)/python -m pytest -m slow

# Without a browser the test of the page is skipped, and says so.
browser:
	command -v chromium chromium-browser google-chrome || \
	  { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } || \
	  echo "no Chromium could be installed: the test of the page will be skipped"

lint: env
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

wheel: env
	$(BIN)/python -m build

clean:
	rm -rf build dist *.egg-info
