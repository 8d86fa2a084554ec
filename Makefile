# The one door to everything a developer does. `make` lists it; CI calls nothing else.

VENV   := .venv
BIN    := $(VENV)/bin
ARCHS  ?=
DEMO   := build/demo
SKILL  := examples/skills/sales-report
# The zig compiler keeps what it built of musl here, when it is used at all.
export ZIG_GLOBAL_CACHE_DIR ?= $(CURDIR)/build/zig-cache
# The newest Python that works and is new enough. Version managers leave commands on the PATH that do not run.
PYTHON ?= $(firstword $(foreach name,python3 python3.13 python3.14 python3.12 python3.11,\
            $(shell $(name) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(name))))

C_SOURCES := $(wildcard src/cloche/supervisor/c/*.[ch])

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format types imports docs bench supervisor supervisor-all sanitize \
        engines-docker engines-docker-env engines-docker-down \
        engines-kubernetes engines-kubernetes-env engines-kubernetes-down \
        engines-opensandbox engines-opensandbox-env engines-opensandbox-down chart engines-helm-env engines-compose engines-compose-env engines-vm soak wheel wheel-check clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  \033[1m%-15s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.ready $(VENV)/.supervisor ## make the virtual environment and build the supervisor; quick when nothing changed

$(VENV)/.ready: pyproject.toml
	@test -n "$(PYTHON)" || { echo "cloche needs Python 3.11 or newer on the PATH, or make PYTHON=/path/to/python3" >&2; exit 1; }
	@# Debian's Python has no ensurepip unless python3-venv is installed; pip can then fill the environment from outside.
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || \
	  { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[server]' --group dev
	@touch $@

$(VENV)/.supervisor: $(VENV)/.ready $(C_SOURCES) hatch_build.py
	@needed=$$($(BIN)/python hatch_build.py --requires --archs "$(ARCHS)") && \
	  { test -z "$$needed" || $(BIN)/python -m pip install --quiet --disable-pip-version-check "$$needed"; }
	@$(BIN)/python hatch_build.py --archs "$(ARCHS)"
	@touch $@

supervisor: $(VENV)/.supervisor ## compile the supervisor if its sources changed

supervisor-all: $(VENV)/.ready ## compile it for every architecture, with zig, as published wheels have it
	@rm -f $(VENV)/.supervisor src/cloche/supervisor/bin/*
	@$(MAKE) --no-print-directory $(VENV)/.supervisor ARCHS=all

demo: setup ## run a real skill on real input in the local sandbox
	@rm -rf $(DEMO) && mkdir -p $(DEMO)
	$(BIN)/cloche run --verbose --mode local --workspace $(SKILL) --output $(DEMO) scripts/report.py -- data/sales.csv
	@echo && echo "What the script left in /output is now in $(DEMO):" && ls -l $(DEMO)

test: setup ## run the tests; PYTEST_ARGS="-k word" narrows them
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.ready ## style and likely mistakes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/hadolint deploy/images/*/Dockerfile

format: $(VENV)/.ready ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.ready ## mypy over everything, pyright over the public API
	$(BIN)/mypy
	$(BIN)/pyright
	PATH="$(CURDIR)/$(BIN):$$PATH" python typing_tests/verify.py

imports: $(VENV)/.ready ## the direction of imports
	$(BIN)/lint-imports

docs: setup ## links resolve, examples run, docs/settings.md is what the code says
	$(BIN)/python docs/check.py

bench: setup ## measure cloche against plain bubblewrap, its service against the library, and each engine that is there against its own ways
	@mkdir -p build
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --group bench
	$(BIN)/python -m benchmarks.local --json build/bench.json
	$(BIN)/python -m benchmarks.service --json build/bench-service.json
	$(BIN)/python -m benchmarks.docker --json build/bench-docker.json
	$(BIN)/python -m benchmarks.kubernetes --json build/bench-kubernetes.json
	$(BIN)/python -m benchmarks.opensandbox --json build/bench-opensandbox.json

soak: setup ## many runs on every engine that is there, while clients, boxes and engines die; SOAK_ARGS="--runs 60 --modes local"
	$(BIN)/python -m tests.soak $(SOAK_ARGS)

sanitize: setup ## the supervisor's own tests under sanitizers, and its fuzzer for a while
	PYTHON=$(BIN)/python tests/supervisor/run-sanitizers

engines-docker: setup ## start private Docker daemons for the tests (needs root and Go); ENGINES="current" for one of them
	@$(BIN)/python -m tests.engines.docker up $(ENGINES)
	@echo 'Now let the tests find them: eval "$$(make --silent engines-docker-env)"'

engines-docker-env: ## the variables by which the tests find those daemons, to be evaluated by a shell
	@$(BIN)/python -m tests.engines.docker env

engines-docker-down: ## end them, and leave nothing of them
	@$(BIN)/python -m tests.engines.docker down

engines-kubernetes: setup ## start a private Kubernetes cluster for the tests (needs root and Go)
	@$(BIN)/python -m tests.engines.kubernetes up
	@echo 'Now let the tests find it: eval "$$(make --silent engines-kubernetes-env)"'

engines-kubernetes-env: ## the variables by which the tests find it, to be evaluated by a shell
	@$(BIN)/python -m tests.engines.kubernetes env

engines-kubernetes-down: ## end it, and leave nothing of it
	@$(BIN)/python -m tests.engines.kubernetes down

engines-opensandbox: setup ## start private OpenSandbox services for the tests (needs root and Go); GENERATIONS="old" for one
	@$(BIN)/python -m tests.engines.opensandbox up $(GENERATIONS)
	@echo 'Now let the tests find them: eval "$$(make --silent engines-opensandbox-env)"'

engines-opensandbox-env: ## the variables by which the tests find them, to be evaluated by a shell
	@$(BIN)/python -m tests.engines.opensandbox env

engines-opensandbox-down: ## end them, and leave nothing of them
	@$(BIN)/python -m tests.engines.opensandbox down

chart: setup ## the Helm chart: lint, templates, refusals; with a cluster and CLOCHE_TEST_SERVICE_IMAGE, installs of it (needs Go)
	@eval "$$($(BIN)/python -m tests.engines.helm env)" && $(BIN)/python -m pytest tests/chart $(PYTEST_ARGS)

engines-helm-env: setup ## the variable by which the tests find helm, which is built first
	@$(BIN)/python -m tests.engines.helm env

engines-compose: setup ## build Docker Compose and the images that its tests need; the daemon is that of engines-docker
	@$(BIN)/python -m tests.engines.compose build
	@echo 'Now let the tests find it: eval "$$(make --silent engines-compose-env)"'

engines-compose-env: ## the variable by which the tests find it, to be evaluated by a shell
	@$(BIN)/python -m tests.engines.compose env

engines-vm: setup ## prove the local backend in a virtual machine (needs root, qemu, debootstrap); VM_ARGS="--scene user-login"
	$(BIN)/python -m tests.engines.vm $(VM_ARGS)

wheel: $(VENV)/.ready ## build sdist and wheel for publishing, with both architectures, into dist/
	rm -rf dist
	CLOCHE_BUILD_ARCHS=all $(BIN)/python -m build --outdir dist

wheel-check: setup wheel ## build them, and test what was built: contents, installs, a run of each
	CLOCHE_BUILD_DIST=dist $(BIN)/python -m pytest tests/packaging $(PYTEST_ARGS)

clean: ## remove all that was made here
	rm -rf $(VENV) build dist src/cloche/supervisor/bin .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
