# make demo | test | test-fast | attack | devices | check | docs | page | clients | pyright | reference: each sets up what it needs in .venv
PYTHON ?= $(if $(filter Windows_NT,$(OS)),python,python3)
TORCH ?= torch==2.13.0
BIN := .venv/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
ROOMS := $(sort $(patsubst %/,%,$(dir $(foreach room,runtime convert models,\
	$(wildcard $(room)/*.py $(room)/*/*.py $(room)/*/*/*.py)))))
CORES := $(shell $(PYTHON) -c "import os; print(os.cpu_count() or 2)")
WORKERS ?= $(CORES)
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(CORES)
export HF_HUB_OFFLINE = 1

.PHONY: demo test test-fast attack devices check docs page clients pyright reference record clean

demo: .venv/core
	$(BIN)/pocketllava demo

# Bytecode is kept, whatever the shell says: else every child compiles the package again.
test test-fast attack devices: export PYTHONDONTWRITEBYTECODE =

test: .venv/dev
	$(BIN)/pytest -n $(WORKERS) --dist worksteal -m "not reference"

test-fast: .venv/dev
	$(BIN)/pytest -n $(WORKERS) --dist worksteal -m "not reference and not slow"

attack: export PYTHONPATH = $(CURDIR)/tests
attack: .venv/dev # 15 minutes of damaged files, odd places and interrupts; what fails stays in ATTACKS
	$(BIN)/python -m attack $(or $(ATTACKS),build/attacks)
	$(BIN)/pytest -n $(WORKERS) --dist worksteal -m "hypothesis and not reference" --hypothesis-profile=campaign

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy examples docs/commands.py

devices: export PYTHONPATH = $(CURDIR)/tests
devices: # the tests on a software GPU; Linux only, builds a Vulkan wheel once (or POCKETLLAVA_DEVICE_WHEEL=FILE)
	$(PYTHON) -m devices build/devices

docs: export NO_MKDOCS_2_WARNING = 1
docs: .venv/docs
	$(BIN)/python docs/commands.py
	$(BIN)/mkdocs build --strict --quiet

pyright: .venv/dev # on the examples; fetches the npm package of that name once
	$(BIN)/pip install --quiet pyright
	$(BIN)/pyright

page: .venv/dev # the web page in the system's Chromium
	$(BIN)/pip install --quiet -e ".[page]"
	$(BIN)/pytest tests/test_page.py tests/test_page_odd.py tests/test_page_album.py

clients: .venv/dev # real programs ask the server; node's where there is npm, LlamaIndex with the openai it needs
	$(BIN)/pip install --quiet -e ".[clients]"
	$(PYTHON) -m venv build/llama-index
	build/llama-index/$(notdir $(BIN))/pip install --quiet llama-index-llms-openai-like
	! command -v npm || npm install --silent --no-audit --no-fund --prefix build/clients openai ollama ai @ai-sdk/openai-compatible
	$(BIN)/pytest tests/test_clients.py tests/test_llm_plugin.py tests/test_client_snippets.py

reference: .venv/reference
	$(BIN)/pytest -m reference -s

record: .venv/reference
	$(BIN)/pytest -m reference --record

# A new file in a room needs a new link tree (pyproject.toml, editable_wheel), so a stamp follows the rooms.
.venv/core: pyproject.toml $(ROOMS)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -e ".[cli]"
	touch $@

.venv/dev: .venv/core
	$(BIN)/pip install --quiet -e ".[dev]"
	touch $@

.venv/docs: .venv/core
	$(BIN)/pip install --quiet -e ".[docs]"
	touch $@

.venv/reference: .venv/dev
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet -e ".[dev,reference]"
	touch $@

clean:
	rm -rf .venv build *.egg-info
