# Everything runs in .venv (the oldest releases in .venv-oldest), made on first use; the package index is the only
# thing reached over a network.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
VENV_OLDEST := .venv-oldest
BIN_OLDEST := $(VENV_OLDEST)/bin
INSTALLED_OLDEST := $(VENV_OLDEST)/.installed
# Beside the environment, not in it: transformers and accelerate behave otherwise where they find them.
ENGINES := build/engines
RAY := build/ray
# Likewise: trainers report to every tracker that they find, and Trackio asks for Pillow below 13.
TRACKERS := build/trackers

# Two cores and many small matrices: more threads only wait for each other.
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo docs test test-oldest test-slow test-gpu test-engines test-trackers check format build clean

##@ Start here
help: ## Show this list
	@echo "Measures membership leakage of language models while they are fine-tuned. New here? Run 'make demo'."
	@echo "Python 3.10 or newer is needed; everything else is set up in .venv, on first use."
	@awk -F ':.*## ' '/^##@ / { printf "\n%s\n", substr($$0, 5) } \
		/^[a-z-]+:.*## / { printf "  make %-14s%s\n", $$1, $$2 }' Makefile
	@echo
	@echo "Before a pull request: make format check test docs. Where does it live? See CONTRIBUTING.md."

demo: $(INSTALLED) ## Fine-tune and audit a small model on real text, without a network
	env -u OMP_NUM_THREADS $(BIN)/ezmia demo

##@ While you work
test: $(INSTALLED) ## Run the tests and the doctests
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

check: $(INSTALLED) ## Check lint, formatting, types and who imports what
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py

format: $(INSTALLED) ## Format the code and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(INSTALLED) ## Build the documentation site into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

##@ Less often
test-oldest: $(INSTALLED_OLDEST) ## Run the tests with the oldest supported releases, in .venv-oldest
	$(BIN_OLDEST)/python -m pytest -q -n 2 --dist worksteal

test-slow: $(INSTALLED) ## Run the long simulations and the real-model tests
	$(BIN)/python -m pytest -q -m slow

test-engines: $(INSTALLED) $(ENGINES)/.installed $(RAY)/.installed ## Run DeepSpeed, Ray and launch files without a GPU
	PYTHONPATH="$(CURDIR)/$(ENGINES)" $(BIN)/python -m pytest -q tests/integration/test_deepspeed.py
	PYTHONPATH="$(CURDIR)/$(ENGINES)" $(BIN)/python -m pytest -q -m slow tests/integration/test_launch_files.py
	PYTHONPATH="$(CURDIR)/$(RAY)" $(BIN)/python -m pytest -q -k ray tests/integration/test_ray.py tests/integration/test_examples.py

test-trackers: $(INSTALLED) $(TRACKERS)/.installed ## Run the tests of W&B, MLflow and Trackio, without a network
	PYTHONPATH="$(CURDIR)/$(TRACKERS)" $(BIN)/python -c "import mlflow, trackio, wandb"
	PYTHONPATH="$(CURDIR)/$(TRACKERS)" $(BIN)/python -m pytest -q tests/shells/test_trackers.py

test-gpu: $(INSTALLED) ## Run the tests that need a GPU
	$(BIN)/python -m pytest -q -m gpu tests/integration/test_gpu.py

# The wheel is made from the sdist, installed into an environment of its own and tried from another folder: all that it
# needs beside the code must have come along.
build: ## Build sdist and wheel into dist/, and try the wheel in a clean environment
	rm -rf dist build/try && mkdir -p build/try
	$(PYTHON) -m venv build/try/builder
	build/try/builder/bin/python -m pip install --quiet -c constraints.txt build hatchling
	build/try/builder/bin/python -m build --no-isolation --outdir dist .
	$(PYTHON) -m venv build/try/user
	build/try/user/bin/python -m pip install --quiet -c constraints.txt "$$(ls dist/*.whl)[report]"
	cd build/try && user/bin/python -c "import ezmia_callbacks, ezmia_callbacks.report; \
		from importlib.resources import files; here = files('ezmia_callbacks'); \
		assert 'build/try/user' in str(here), here; \
		needed = ['py.typed', 'report/schema.json', 'report/templates/report.html.jinja']; \
		missing = [name for name in needed if not here.joinpath(name).is_file()]; \
		assert not missing, missing"
	cd build/try && user/bin/ezmia --version && user/bin/ezmia plan --help >/dev/null

clean: ## Remove the environments, caches and built files
	rm -rf $(VENV) $(VENV_OLDEST) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

# Nothing is compiled, neither here nor by the tests.
$(ENGINES)/.installed: $(INSTALLED)
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(ENGINES) -c constraints.txt \
		deepspeed einops hjson msgpack ninja py-cpuinfo
	touch $@

$(RAY)/.installed: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(RAY) -c constraints.txt ray msgpack tensorboardX
	touch $@

# Without what they share with the environment, which is not to be shadowed.
$(TRACKERS)/.installed: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(TRACKERS) -c constraints.txt \
		brotli cachetools cffi cryptography databricks-sdk fastapi gitdb gitpython googleapis-common-protos \
		gradio-client httpcore httpx importlib-metadata lazy-importer mlflow-skinny mlflow-tracing opentelemetry-api \
		opentelemetry-exporter-otlp-proto-common opentelemetry-exporter-otlp-proto-http opentelemetry-proto \
		opentelemetry-sdk opentelemetry-semantic-conventions orjson pycparser python-dotenv python-multipart smmap \
		sqlparse starlette trackio uvicorn wandb websockets zipp
	touch $@

$(BIN_OLDEST)/python:
	$(PYTHON) -m venv $(VENV_OLDEST)

$(INSTALLED_OLDEST): $(BIN_OLDEST)/python pyproject.toml constraints-oldest.txt
	$(BIN_OLDEST)/python -m pip install --quiet -c constraints-oldest.txt -e ".[all]" datasets html5lib hypothesis \
		"jsonargparse[signatures]" jsonschema optuna pytest pytest-xdist pytorch-lightning schedulefree tensorboard trl
	touch $@
