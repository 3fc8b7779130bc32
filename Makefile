# Everything runs in .venv inside the checkout, made from nothing but Python 3.11 or newer and a C compiler.
# A stamp file says what is installed: a second run installs nothing, a changed source of the list below does.

PYTHON ?= python3
PYTEST_ARGS ?=
FLOOR_ARGS ?=
# One worker a core.
WORKERS ?= auto
DEMO_ARGS ?=
FUZZ_SECONDS ?= 240
CHAOS_ARGS ?=
FUZZ_ARGS ?=
MUTANTS_ARGS ?=
GPU_ARGS ?=
SHELL := /bin/bash

BIN := $(CURDIR)/.venv/bin
# setuptools warns of what an editable installation is by nature.
PIP_INSTALL := PYTHONWARNINGS=ignore::UserWarning $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
BUILT_FROM := pyproject.toml setup.py _planner.pyx _codec.pyx constraints.txt
export PATH := $(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-shared test-ray lint format support api bench bench-table clean test-matrix test-floor test-eval test-space test-triton gpu dist interleavings fuzz mutants

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

demo: .venv/core  ## Questions about long manuals to small trained models, with and without the cache
	$(BIN)/hf-sparse-cache demo $(DEMO_ARGS)

test: .venv/dev lint test-floor  ## Linters, types, all tests, and exactness on the oldest supported transformers (PYTEST_ARGS="-k planner" for some of them)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

test-all: test test-eval test-space test-triton fuzz interleavings test-shared test-ray  ## make test, and every suite that takes longer or needs more and has a target of its own

test-shared: .venv-s3/ready  ## The shared store on an S3-compatible server, and 8 processes on one folder that is damaged under them
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv-s3/bin/python -m pytest tests/store/test_shared_s3.py $(PYTEST_ARGS)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python tests/chaos_shared.py $(CHAOS_ARGS)

test-ray: .venv-ray/ready  ## Replicas on Ray Serve, on this machine: a killed one, scaling, and what is cached beside round robin
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv-ray/bin/python -m pytest -W ignore -s tests/serving/test_ray_files.py tests/serving/test_ray_serve.py $(PYTEST_ARGS)

test-triton: .venv-triton/ready  ## The kernels of mamba_ssm and flash-linear-attention under Triton's interpreter, on Linux
	TRITON_INTERPRET=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv-triton/bin/python -m pytest -n $(WORKERS) --dist worksteal tests/models/test_triton.py $(PYTEST_ARGS)

fuzz: .venv/dev  ## Properties on newly drawn examples, then random requests and hostile files for FUZZ_SECONDS (240): FUZZ_ARGS="--seed 7" brings a fault back
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m hypothesis --hypothesis-profile drawn
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py --seconds $(FUZZ_SECONDS) $(FUZZ_ARGS)

interleavings: .venv/dev  ## Ten thousand random interleavings of threads that wait for each other's prompts: minutes
	HF_SPARSE_CACHE_TEST_INTERLEAVINGS=10000 $(BIN)/python -m pytest tests/store/test_promises.py -k interleavings

mutants: .venv/mutants  ## Faults planted in the core, and whether the tests notice: minutes to hours; MUTANTS_ARGS="--count 40 --room store"
	nice -n 19 $(BIN)/python tests/mutants.py $(MUTANTS_ARGS)

lint: .venv/dev  ## ruff, mypy, the direction of imports, and cython-lint
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --quiet --check . || { echo 'Not formatted: run "make format".'; exit 1; }
	$(BIN)/mypy
	$(BIN)/mypy tests/typed_user.py
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/cython-lint _planner.pyx _codec.pyx

format: .venv/dev  ## Format and sort imports in place
	$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format .

# Exactness on the newest and on the oldest supported transformers.
MATRIX_TESTS := $(addprefix tests/,models/test_matrix.py models/test_sabotage.py test_exactness.py models/test_mamba1.py models/test_replayable.py \
    models/test_multimodal.py models/test_requests.py models/test_weights.py models/test_calls.py models/test_upstream.py models/test_rows.py models/test_handed.py test_record.py \
    serving/test_looking.py serving/test_endpoints.py)

test-matrix: .venv/dev test-floor  ## The exactness tests on the oldest supported transformers and on the newest
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(MATRIX_TESTS) $(PYTEST_ARGS)

test-floor: .venv-floor/ready  ## The exactness tests on the oldest supported transformers
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv-floor/bin/python -m pytest -n $(WORKERS) --dist worksteal $(MATRIX_TESTS) $(FLOOR_ARGS)

test-eval: .venv-eval/ready  ## Evaluation through lm-evaluation-harness, beside the harness's own model
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv-eval/bin/python -m pytest -n $(WORKERS) --dist worksteal tests/evaluation \
	    'tests/project/test_notebooks.py::test_runs[evaluation]' $(PYTEST_ARGS)

test-space: .venv-space/ready  ## The Space of examples/space in headless Chromium (a Chromium of the system, or playwright's own)
	HF_HUB_OFFLINE=1 .venv-space/bin/python -m pytest tests/space $(PYTEST_ARGS)

# The wheel is tried in an empty environment and without a compiler, beside a copy of the tests and no source.
CORE_TESTS := tests/planning tests/store/test_store.py tests/test_handle.py tests/test_exactness.py tests/test_explain.py
dist: .venv/dev  ## The source distribution and this machine's wheel in dist/, checked by twine, and tried in an empty environment
	rm -rf dist .venv-dist && $(PYTHON) -m venv .venv-dist
	.venv-dist/bin/python -m pip --disable-pip-version-check install --quiet build twine
	.venv-dist/bin/python -m build --outdir dist . > /dev/null
	.venv-dist/bin/python -m twine check --strict dist/*
	$(PYTHON) -m venv --clear .venv-dist
	CC=none .venv-dist/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt --only-binary :all: dist/*.whl
	.venv-dist/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt pytest pytest-timeout hypothesis psutil
	rm -rf build/tried && mkdir -p build/tried && cp -r tests pyproject.toml build/tried
	cd build/tried && HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 ../../.venv-dist/bin/python -m pytest -q $(CORE_TESTS) \
	    -k 'not missing_extension and not no_index_leaves' $(PYTEST_ARGS)

support: .venv/dev  ## Every cell of the exactness matrix, in both modes, into docs/support.md: slow
	$(BIN)/python tests/support_table.py

api: .venv/dev  ## The API reference, docs/api.md, from the docstrings
	$(BIN)/python docs/make_api.py

bench: .venv/dev  ## The benchmarks, one after the other: hours; WORKLOADS=folder adds those on recorded requests
	for name in planner store costs shared; do $(BIN)/python -m benchmarks.bench_$$name || exit 1; done
ifdef WORKLOADS
	$(BIN)/python -m benchmarks.bench_policies $(WORKLOADS)
	$(BIN)/python -m benchmarks.bench_paper $(wildcard $(WORKLOADS)/docqa* $(WORKLOADS)/sysprompts*)
	$(BIN)/python -m benchmarks.bench_deciding $(dir $(firstword $(wildcard $(WORKLOADS)/*/meta.json)))
endif

gpu:  ## All that one GPU has to say, in 9 minutes, with the torch and transformers of PYTHON and nothing else (GPU_ARGS="--budget-seconds 300")
	HF_HUB_OFFLINE=1 $(PYTHON) benchmarks/gpu.py $(GPU_ARGS)

bench-table: .venv/dev  ## The README's tables of measurements, from benchmarks/results/
	$(BIN)/python -m benchmarks.readme_table

clean:  ## Remove the virtual environment and everything that was built
	rm -rf .venv .venv-floor .venv-s3 .venv-eval .venv-ray .venv-space .venv-triton .venv-dist build dist *.egg-info _planner.c _codec.c hf_sparse_cache/*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis

# In a virtual environment of its own, a suite sees what .venv has, behind what it has itself.
define see_dev
$(1)/bin/python -c 'import sysconfig, pathlib; there = pathlib.Path(sysconfig.get_path("purelib")); \
    rest = str(there).replace("$(1)", ".venv"); \
    (there / "rest.pth").write_text(f"import site; site.addsitedir({rest!r})\n")'
endef

# torch first, by itself: then no other package decides which build of it is taken.
.venv/base: constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "Python 3.11 or newer is needed, \
	$(PYTHON) is %d.%d: make PYTHON=python3.11" % v[:2])'
	$(PYTHON) -m venv .venv
	$(PIP_INSTALL) pip setuptools Cython
	$(PIP_INSTALL) torch numpy
	@touch $@

# Without build isolation the extension is built by the pinned Cython and setuptools, and nothing is fetched twice.
.venv/core: .venv/base $(BUILT_FROM)
	$(PIP_INSTALL) --no-build-isolation --editable .
	@touch $@

.venv/dev: .venv/base $(BUILT_FROM)
	$(PIP_INSTALL) --no-build-isolation --editable '.[dev]'
	@touch .venv/core $@

.venv/mutants: .venv/dev
	$(PIP_INSTALL) 'cosmic-ray>=8.7' 'pytest-cov>=7'
	@touch $@

# An older transformers and what it needs older; torch and all the rest are those of .venv.
.venv-floor/ready: .venv/dev constraints-floor.txt
	$(PYTHON) -m venv --clear .venv-floor
	grep -vE '^(transformers|tokenizers|huggingface_hub)==' constraints.txt > .venv-floor/constraints.txt
	.venv-floor/bin/python -m pip --disable-pip-version-check install --quiet \
	    --constraint .venv-floor/constraints.txt --requirement constraints-floor.txt
	$(call see_dev,.venv-floor)
	@touch $@

# s3fs wants an fsspec of its own age, and moto the boto3 that goes with it: all else is that of .venv.
.venv-s3/ready: .venv/dev constraints-s3.txt
	$(PYTHON) -m venv --clear .venv-s3
	.venv-s3/bin/python -m pip --disable-pip-version-check install --quiet --requirement constraints-s3.txt
	$(call see_dev,.venv-s3)
	@touch $@

# Gradio and a driver for the browser; they want a pillow of their own, all the rest is that of .venv.
.venv-space/ready: .venv/dev
	$(PYTHON) -m venv --clear .venv-space
	$(call see_dev,.venv-space)
	.venv-space/bin/python -m pip --disable-pip-version-check install --quiet 'gradio>=6' playwright
	@touch $@

# lm-evaluation-harness and what only it needs; all the rest is that of .venv.
.venv-eval/ready: .venv/dev
	$(PYTHON) -m venv --clear .venv-eval
	$(call see_dev,.venv-eval)
	.venv-eval/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt 'lm-eval>=0.4.13'
	@touch $@

# Ray and what only it needs (250 MB); all the rest is that of .venv.
.venv-ray/ready: .venv/dev
	$(PYTHON) -m venv --clear .venv-ray
	$(call see_dev,.venv-ray)
	.venv-ray/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt 'ray[serve]>=2.60'
	@touch $@

# Kernels in Triton without their compiled parts, which need a GPU; all the rest is that of .venv.
.venv-triton/ready: .venv/dev constraints-triton.txt
	$(PYTHON) -m venv --clear .venv-triton
	$(call see_dev,.venv-triton)
	.venv-triton/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints-triton.txt wheel
	MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE .venv-triton/bin/python -m pip --disable-pip-version-check install --quiet \
	    --no-deps --no-build-isolation --requirement constraints-triton.txt
	@touch $@
