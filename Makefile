# Every target sets up what it needs by itself; only the first call takes time. `make help` lists them.
.DEFAULT_GOAL := help
.PHONY: demo demo-first test test-quick soak mutate test-modelopt test-bridge test-te gpu-check compat lint types docs \
	format lock release clean help

# Where it is set, hundreds of Python processes compile the same sources.
unexport PYTHONDONTWRITEBYTECODE

# ARGS reaches the command behind demo, the tests, gpu-check and release: make test ARGS="-k doctor"
ARGS :=
# gpu-check installs nothing, so that it runs where there is no network: make gpu-check PYTHON=/path/to/python
PYTHON = $(or $(wildcard .venv/bin/python),python3)

demo: demo-first .venv/.installed  ## train a residual and a Frac-Connections MoE on real text and compare them
	@.venv/bin/megatron-fc demo $(ARGS)

demo-first:
	@if [ ! -e .venv/.installed ]; then echo "First an environment is installed, then two models of 10M parameters are" \
		"trained, 2 to 4 minutes each on two CPU cores."; fi

test: .venv/.installed  ## run the tests
	@$(PYTEST) -n 4 -m "not soak" --times $(ARGS)

test-quick: .venv/.installed  ## run the tests that take little time, before a commit, and name what they do not touch
	@$(PYTEST) -n 3 -m "not slow and not soak" --touched $(ARGS)

soak: .venv/.installed  ## run the long tests that repeat at more length what others show
	@$(PYTEST) -n 3 -m soak $(ARGS)

mutate: .venv/.installed  ## plant the faults of tests/faults.yaml, one by one, and see that the tests notice
	@PATH="$(CURDIR)/.venv/bin:$$PATH" .venv/bin/python scripts/mutate.py $(ARGS)

# PATH: PyTorch looks for the environment's ninja there. tests/support/schedule.py orders the files. More workers than two
# cores where many tests wait for a cluster.
PYTEST = PATH="$(CURDIR)/.venv/bin:$$PATH" OMP_NUM_THREADS=1 .venv/bin/python -m pytest \
	--dist loadfile --no-loadscope-reorder

# Beside the environment and not in it: where ModelOpt can be imported Megatron imports it, which doubles every start.
test-modelopt: .modelopt/.installed  ## run the tests of quantisation and distillation with NVIDIA ModelOpt
	@PYTHONPATH="$(CURDIR)/.modelopt" $(PYTEST) -n 3 -m modelopt $(ARGS)

test-bridge: .bridge/.installed  ## run the tests of a provider of NVIDIA Megatron-Bridge
	@PYTHONPATH="$(CURDIR)/.bridge" $(PYTEST) -n 1 -k bridge tests/megatron/test_bridge.py tests/examples $(ARGS)

# Its own dependencies would replace torch and ask for Transformer Engine.
.bridge/.installed: .venv/.installed
	@.venv/bin/python -m pip install -q --disable-pip-version-check --no-deps --target .bridge --upgrade \
		megatron-bridge==0.6.2 omegaconf==2.4.0 antlr4-python3-runtime==4.9.3
	@touch $@

# TE_TORCH_WHEEL: see scripts/setup-te.
test-te: .venv/.installed  ## run the tests of Transformer Engine's layers, in an environment of its own, without a GPU
	@scripts/setup-te $(TE_TORCH_WHEEL)
	@if [ -e .venv-te/.installed ]; then OMP_NUM_THREADS=1 .venv-te/bin/python -m pytest tests/te $(ARGS); fi

# Nine minutes on one H100, whatever happens: the tests are ended after three and a half; the benchmarks begin nothing more
# after the seconds given, and are ended if what they began takes 40 more. The tests start processes of their own, on one GPU: with
# pytest-xdist eight at once.
gpu-check:  ## measure the kernels beside their predictions, run the tests that need a CUDA device and the GPU benchmarks
	@export PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}"; failed=; parallel=; \
	if $(PYTHON) -c "import xdist" 2>/dev/null; then parallel="-n auto --maxprocesses 8"; fi; \
	$(call LIMIT,90) $(PYTHON) benchmarks/shares.py --budget 60 || failed="$$failed benchmarks/shares.py"; \
	$(call LIMIT,180) $(PYTHON) -m pytest -m gpu $$parallel $(ARGS) || failed="$$failed tests"; \
	$(call LIMIT,100) $(PYTHON) benchmarks/kernels.py --quick --budget 60 || failed="$$failed benchmarks/kernels.py"; \
	$(call LIMIT,100) $(PYTHON) benchmarks/step.py --budget 60 || failed="$$failed benchmarks/step.py"; \
	$(call LIMIT,70) $(PYTHON) benchmarks/step.py $(FP8) --budget 30 || failed="$$failed benchmarks/step.py in FP8"; \
	if [ -n "$$failed" ]; then echo "failed:$$failed" >&2; exit 1; fi

FP8 = --precision bf16 fp8_delayed fp8_tensorwise fp8_blockwise --layers 2 --steps 2 --rounds 2 \
	--output benchmarks/results/fp8
LIMIT = timeout -s INT -k 10 $(1)

compat: .venv/.installed  ## run the quick tests with every supported megatron-core, write docs/compatibility.md
	@PATH="$(CURDIR)/.venv/bin:$$PATH" .venv/bin/python scripts/compat.py

lint: .venv/.installed  ## check style and formatting
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/shellcheck -x launch/*.sh examples/*.sh .ci/run $(filter-out %.py %__pycache__,$(wildcard scripts/*))
	.venv/bin/hadolint docker/Dockerfile*

types: .venv/.installed  ## check types
	.venv/bin/mypy megatron_fc

docs: .venv/.installed  ## build the site of docs/ into build/site; a broken link or a missing object fails
	@NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict  # with --quiet it would not be strict

format: .venv/.installed  ## correct what lint would complain about
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

lock: .venv/.installed  ## resolve every dependency anew and write constraints.txt
	.venv/bin/python scripts/lock.py

release: .venv/.installed  ## build wheel and sdist, check them in a new environment, print the release notes
	@.venv/bin/python scripts/release.py $(ARGS)

clean:  ## remove the environment, builds and caches; runs/ stays
	rm -rf .venv .venv-te .modelopt build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find megatron_fc tests benchmarks scripts -name __pycache__ -prune -exec rm -rf {} +

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*  ## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

.venv/.installed: pyproject.toml constraints.txt
	@scripts/setup

.modelopt/.installed: .venv/.installed docker/extras.txt
	@rm -rf .modelopt
	@.venv/bin/python -m pip install -q --disable-pip-version-check --no-deps --target .modelopt -r docker/extras.txt
	@touch $@
