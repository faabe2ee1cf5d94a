# Two commands set everything up on a fresh machine with Python 3.11+: make quickstart, make test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= quickstart
export JAX_PLATFORMS ?= cpu

.PHONY: install quickstart test test-slow test-slurm test-tpu-compile test-gpu test-hf tpu-acceptance lint format docs bench bound-demo clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "prime_jax needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

# Data, 48 trainings, fit and report; resumes where it was interrupted.
quickstart: install
	$(BIN)/prime-jax data prepare pysource --tokenizer bytes --seq-len 64 --out data/quickstart
	$(BIN)/prime-jax sweep plan preset:quickstart $(RUN)
	$(BIN)/prime-jax sweep run $(RUN) --workers 2
	$(BIN)/prime-jax sweep collect $(RUN) -o $(RUN)/runs.csv
	$(BIN)/prime-jax fit $(RUN) || test $$? -eq 3  # 3: fitted, and some answers refused with a reason

# Two processes: most of the time goes into compiling, on one core each.
test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The full matrices: minutes, not seconds.
test-slow: install
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile

# Sweeps on a real Slurm on this machine: Debian's packages are unpacked, not installed.
test-slurm: install
	$(BIN)/python -m pytest -m slurm -rs

# Compiles the kernels for absent TPUs. It has its own environment: where libtpu is installed, every
# import of JAX looks for a TPU.
test-tpu-compile: .venv-tpu/.installed
	.venv-tpu/bin/python -m pytest -m tpu_compile

.venv-tpu/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-tpu
	.venv-tpu/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,tpu-compile]'
	@touch $@

# Kernels and training on an NVIDIA GPU, compared with the CPU of the same machine.
test-gpu: .venv-gpu/.installed
	JAX_PLATFORMS=cuda,cpu XLA_FLAGS= XLA_PYTHON_CLIENT_PREALLOCATE=false \
		.venv-gpu/bin/python -m pytest -m gpu -rs

.venv-gpu/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,cuda]'
	@touch $@

# Exported folders, loaded by transformers: PyTorch is large, so it has an environment of its own.
test-hf: .venv-hf/.installed
	.venv-hf/bin/python -m pytest tests/test_hf.py tests/test_tokenizer.py -rs

.venv-hf/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-hf
	.venv-hf/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,hf]'
	@touch $@

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The generated parts of docs/: commands, fields of JSON files, rendered launch files.
docs: install
	COLUMNS=100 $(BIN)/python -m prime_jax.cli.reference
	$(BIN)/python tests/test_launch_docs.py

# Tokens/s against an eager PyTorch model (install torch for the comparison).
bench: install
	$(BIN)/python benchmarks/train_step.py

# On a TPU slice that you rent, e.g. ARGS="--slice v6e-16 --on gce --project P --zone Z --root gs://..."
tpu-acceptance: install data/quickstart/manifest.json
	$(BIN)/python benchmarks/tpu_acceptance.py $(ARGS)

data/quickstart/manifest.json: | install
	$(BIN)/prime-jax data prepare pysource --tokenizer bytes --seq-len 64 --out data/quickstart

bound-demo: install
	$(BIN)/python experiments/bound_demo.py

clean:
	rm -rf $(VENV) .venv-tpu .venv-gpu .venv-hf build dist *.egg-info .pytest_cache .ruff_cache
