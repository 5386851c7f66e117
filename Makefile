# Two commands for a newcomer: `make demo-generate` and `make test`. Both set up what they need in .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROMPT ?= Natalia has 24 marbles. She buys 3 bags with 12 marbles each and gives 15 marbles to Tom. How many marbles does she have now?

# Tests that touch transformers, which run with more than one release of it.
RELEASE_TESTS := $(patsubst %,tests/test_%.py,\
	hook past outputs errors processors stopping callers targets parity compiled batching private hybrids)
# What pip is asked for there. The oldest release is what pyproject.toml says; the hub client is the last that it takes.
oldest := transformers==$(shell sed -n 's/.*"transformers>=\(.*\)".*/\1/p' pyproject.toml) huggingface_hub==1.33.0
newest := --upgrade transformers

# A worker a core, up to eight; the tests of a file stay together.
PYTEST := python -m pytest -n auto --maxprocesses 8 --dist loadfile
# Of the slow tests a share, another one every hour: their number and that of a day's hours have no divisor in common.
SHARES := 25
SHARE ?= $(shell echo $$(($$(date +%s) / 3600 % $(SHARES) + 1)))/$(SHARES)

.PHONY: demo-generate test test-slow test-package test-oldest test-newest lint docs embedded-pair clean

demo-generate: $(VENV)/installed
	@echo "--- plain decoding"
	@$(BIN)/dspark-hf generate --no-draft "$(PROMPT)"
	@echo "--- the same with the draft head"
	@$(BIN)/dspark-hf generate "$(PROMPT)"
	@echo "--- how fast: one text at a time, and four"
	@$(BIN)/dspark-hf bench --batch-sizes 1,4
	@echo "--- the same with compiled passes, one text at a time; compiling takes some minutes"
	-@$(BIN)/dspark-hf bench --batch-sizes 1 --compile --limit 4 --seconds 60

test: $(VENV)/installed-for-tests lint
	HF_HUB_OFFLINE=1 $(BIN)/$(PYTEST)

test-slow: $(VENV)/installed-for-tests
	HF_HUB_OFFLINE=1 $(BIN)/$(PYTEST) --slow $(SHARE) --ignore tests/test_package.py --ignore tests/test_demo_browser.py

# What pip makes of the package, in venvs of their own, and the Space in a browser.
test-package: $(VENV)/installed-for-tests
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --all tests/test_package.py tests/test_demo_browser.py

test-oldest test-newest: test-%: $(VENV)-%/layered
	$(VENV)-$*/bin/python -m pip install --quiet $($*)
	$(VENV)-$*/bin/python -m pip check
	@$(VENV)-$*/bin/python -m pip list 2>/dev/null | grep '^transformers '
	HF_HUB_OFFLINE=1 $(VENV)-$*/bin/$(PYTEST) $(RELEASE_TESTS)
	HF_HUB_OFFLINE=1 $(VENV)-$*/bin/$(PYTEST) --slow 1/1 tests/test_hook.py tests/test_tensor_parallel.py

lint: $(VENV)/installed-for-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages of docs/ and the API as a site in build/site.
docs: $(VENV)/installed-for-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Trains target and head anew and puts them into the package; see the script for what it reads and how long it takes.
embedded-pair: $(VENV)/installed-for-tests
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/embedded_pair/recipe.sh

# torch comes first and alone: a bare `torch` asked for by another package would fetch its largest build.
$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	@touch $@

$(VENV)/installed: $(VENV)/torch pyproject.toml
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/installed-for-tests: $(VENV)/torch pyproject.toml
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@ $(VENV)/installed

$(VENV)/installed-for-docs: $(VENV)/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $@

# A venv that sees all of .venv behind what is installed into itself: made in seconds, and without a second torch.
$(VENV)-%/layered: $(VENV)/installed-for-tests
	$(BIN)/python -m venv --clear --without-pip $(@D)
	ls -d $(CURDIR)/$(VENV)/lib/python*/site-packages | sed "s/.*/import site; site.addsitedir('&')/" \
		> $$(ls -d $(@D)/lib/python*/site-packages)/below.pth
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-* build .pytest_cache .ruff_cache .hypothesis
