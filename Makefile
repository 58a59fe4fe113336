# What one types here. Two commands suffice on a bare machine (Python 3.11+, make, a package index):
#   make quickstart     install, then the main job on built-in real data
#   make test           install, then the checks and the tests
# After the install both work without a network.

VENV := .venv
PYTHON_VENV := $(VENV)/bin/python
WORKERS ?= 2
# One thread a process, so that the tests do not fight for cores and give the same bits everywhere.
PYTEST := OMP_NUM_THREADS=1 $(PYTHON_VENV) -m pytest -n $(WORKERS) --dist loadgroup

# Written when an install is complete; older than what it was made from, it is made anew.
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install quickstart test test-slow crash-test lint format curves readme reproduce leaderboard bench bench-quick audit constraints clean

help: ## Show what can be made (the default)
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(INSTALLED): pyproject.toml constraints.txt
	@tools/install.sh
	@touch $@

$(INSTALLED_DEV): pyproject.toml constraints.txt
	@tools/install.sh dev
	@touch $(INSTALLED) $@

install: $(INSTALLED) ## Make .venv with everything that a user needs
	@echo "Installed: $(VENV)/bin/tutelage --help"

quickstart: $(INSTALLED) ## Distil digits without a teacher, with kd and with nkd; print the comparison and its report
	$(VENV)/bin/tutelage compare digits --methods none,kd,nkd --seeds 5 --dir runs/quickstart

test: lint ## Checks, then all tests but the slow ones
	$(PYTEST) -m "not slow"

test-slow: $(INSTALLED_DEV) ## Only the slow tests
	$(PYTEST) -m slow

crash-test: $(INSTALLED_DEV) ## Kill real runs at random instants, many of them inside a save; each must end with the same bits
	OMP_NUM_THREADS=1 $(PYTHON_VENV) -m pytest tests/crash -rP

lint: $(INSTALLED_DEV) ## ruff, mypy, and the walls between the rooms
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy setup.py tools examples/*.py examples/new_method/logit_mse
	$(VENV)/bin/mypy benchmarks
	$(VENV)/bin/lint-imports --no-logo

format: $(INSTALLED_DEV) ## Let ruff mend what it can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

readme: $(INSTALLED) ## Make README's tables, docs/functional.md and docs/llm.md's anew, from registry, ledger, last quickstart, docstrings
	$(PYTHON_VENV) tools/readme.py
	$(PYTHON_VENV) tools/functional.py
	$(PYTHON_VENV) tools/llm_plan.py

curves: $(INSTALLED_DEV) ## Write the stored loss curves of all methods anew
	OMP_NUM_THREADS=1 $(PYTHON_VENV) tests/contracts/write_curves.py

reproduce: $(INSTALLED) ## Put every published claim to the test again; writes docs/ledger
	$(VENV)/bin/tutelage reproduce --all

leaderboard: $(INSTALLED_DEV) ## Compare every method on digits, tuned alike; writes docs/leaderboard
	$(VENV)/bin/tutelage compare benchmarks/digits --dir runs/benchmark-digits
	$(PYTHON_VENV) tools/leaderboard.py digits runs/benchmark-digits

bench: $(INSTALLED) ## Hold speed and memory against their peers (on a machine that does nothing else)
	-$(PYTHON_VENV) -m benchmarks.peers
	$(PYTHON_VENV) -m benchmarks

bench-quick: $(INSTALLED) ## The same with fewer and shorter rounds, without the largest sizes
	$(PYTHON_VENV) -m benchmarks --quick

audit: $(INSTALLED_DEV) ## Known vulnerabilities of what constraints.txt pins; a bill of materials in build/sbom.json
	$(PYTHON_VENV) tools/audit.py

constraints: $(INSTALLED_DEV) ## Write constraints.txt from what is installed now
	$(PYTHON_VENV) tools/constraints.py

clean: ## Remove build outputs and caches; runs and .venv stay
	rm -rf build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests tools examples -name __pycache__ -type d -prune -exec rm -rf {} +
