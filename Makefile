# Every target sets up what it needs by itself; only the first call takes time. `make help` lists them.
.DEFAULT_GOAL := help
.PHONY: demo test gpu-check compat lint types format lock clean help

# ARGS reaches the command behind demo, test and gpu-check: make test ARGS="-k doctor"
ARGS :=
# gpu-check installs nothing, so that it runs where there is no network: make gpu-check PYTHON=/path/to/python
PYTHON = $(or $(wildcard .venv/bin/python),python3)

demo: .venv/.installed  ## train a residual and a Frac-Connections MoE on real text and compare them
	@.venv/bin/megatron-fc demo $(ARGS)

# PATH: PyTorch looks for the environment's ninja there.
test: .venv/.installed  ## run the tests
	@PATH="$(CURDIR)/.venv/bin:$$PATH" OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile $(ARGS)

gpu-check:  ## run the tests that need a CUDA device, with the environment or else python3
	@PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) -m pytest -p no:xdist -m gpu $(ARGS)

compat: .venv/.installed  ## run the quick tests with every supported megatron-core, write docs/compatibility.md
	@PATH="$(CURDIR)/.venv/bin:$$PATH" .venv/bin/python scripts/compat.py

lint: .venv/.installed  ## check style and formatting
	.venv/bin/ruff check
	.venv/bin/ruff format --check

types: .venv/.installed  ## check types
	.venv/bin/mypy megatron_fc

format: .venv/.installed  ## correct what lint would complain about
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

lock: .venv/.installed  ## resolve every dependency anew and write constraints.txt
	.venv/bin/python scripts/lock.py

clean:  ## remove the environment, builds and caches; runs/ stays
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find megatron_fc tests -name __pycache__ -prune -exec rm -rf {} +

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*  ## /\1\t/p' $(MAKEFILE_LIST) | expand -t 11

.venv/.installed: pyproject.toml constraints.txt
	@scripts/setup
