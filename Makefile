# Two commands for a newcomer: `make demo-generate` and `make test`. Both set up what they need in .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROMPT ?= Natalia has 24 marbles. She buys 3 bags with 12 marbles each and gives 15 marbles to Tom. How many marbles does she have now?

.PHONY: demo-generate test lint embedded-pair clean

demo-generate: $(VENV)/installed
	@echo "--- plain decoding"
	@$(BIN)/dspark-hf generate --no-draft "$(PROMPT)"
	@echo "--- the same with the draft head"
	@$(BIN)/dspark-hf generate "$(PROMPT)"
	@$(BIN)/dspark-hf bench --batch-sizes 1,4 --dtype float32

test: $(VENV)/installed-for-tests lint
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

lint: $(VENV)/installed-for-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Trains target and head anew and puts them into the package; see the script for what it reads and how long it takes.
embedded-pair: $(VENV)/installed-for-tests
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/embedded_pair/recipe.sh

# torch comes first and alone: a bare `torch` asked for by another package would fetch its largest build.
$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	@touch $@

$(VENV)/installed: $(VENV)/torch pyproject.toml
	$(BIN)/pip install --quiet --editable .
	@touch $@

$(VENV)/installed-for-tests: $(VENV)/torch pyproject.toml
	$(BIN)/pip install --quiet --editable '.[test]'
	@touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) build .pytest_cache .ruff_cache .hypothesis
