# SPDX-License-Identifier: Apache-2.0
# Everything from a fresh clone needs Python 3.10 or later with its headers and make; the targets make their environment themselves.

PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
PIP    := PIP_DISABLE_PIP_VERSION_CHECK=1 $(PY) -m pip install -q --progress-bar off
GO     := $(PY) tools/native.py --go
LIB    := python/zipserv/_zipserv.abi3.so
# Where Go code is; not ".", which holds $(VENV) with other people's.
GODIRS := $(wildcard capi core kernels)
NATIVE := $(shell find $(GODIRS) go.mod -type f -not -name '*_test.go' 2>/dev/null) tools/native.py

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help dev native demo bench test test-go test-c test-python lint lint-go lint-python test-gpu bench-gpu test-vllm test-vllm-newest test-vllm-engine wheel clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' Makefile

dev: $(VENV)/.dev $(LIB) ## environment in .venv with the package in editable form and all tools

native: $(LIB) ## build the native library in place (after a change to Go, C or CUDA sources)

demo: $(VENV)/.demo $(LIB) ## compress a real trained model, verify it, run it, print the table, write the plots
	$(PY) examples/demo.py --out build/demo

bench: $(VENV)/.demo $(LIB) ## measure this machine: codec against memcpy, linear layers, GPU if there is one
	$(VENV)/bin/zipserv bench --out build/bench

test: lint test-go test-python ## linters, Go tests (with the race detector), Python tests, the C program

test-go: $(VENV)/.dev ## Go tests: core with the race detector; kernels without, they are C++ that runs on one thread
	VIRTUAL_ENV=$(abspath $(VENV)) $(GO) test -timeout 30m -race ./core/...
	VIRTUAL_ENV=$(abspath $(VENV)) $(GO) test -timeout 30m ./kernels/... ./capi/...

test-python: $(VENV)/.dev $(LIB) ## Python tests, the hostile files and the C program among them, in up to four processes
	PATH="$$($(GO) env GOROOT)/bin:$$PATH" VIRTUAL_ENV=$(abspath $(VENV)) $(PY) -m pytest -n logical --maxprocesses 4 --dist worksteal --durations=20 --durations-min=5

test-c: $(VENV)/.dev $(LIB) ## only the C program (tests/c)
	$(PY) -m pytest -q tests/python/test_c.py

lint: lint-go lint-python ## gofmt, go vet, staticcheck, ruff, mypy --strict

lint-go: $(VENV)/.tools
	@unformatted="$$($(GO) gofmt -l $(GODIRS))"; test -z "$$unformatted" || { echo "gofmt -w these files:"; echo "$$unformatted"; exit 1; }
	$(GO) mod tidy -diff
	$(GO) vet ./...
	$(GO) tool -modfile=tools/lint/go.mod staticcheck ./...

lint-python: $(VENV)/.dev
	$(PY) -m ruff check
	$(PY) -m mypy

test-gpu: ## correctness on an NVIDIA GPU
	tools/gpu/make.sh test

bench-gpu: ## speed on an NVIDIA GPU against cuBLAS and memcpy
	tools/gpu/make.sh bench

test-vllm: ## the plugin against the real vLLM; makes an environment of its own, about 8 GB, kept in the user's cache folder
	PYTHON=$(PYTHON) tests/vllm/run.sh

test-vllm-engine: ## vLLM's own engine and server on the CPU with the plugin, in a build of others for CPUs; about 6 minutes
	PYTHON=$(PYTHON) ENGINE=0.32.0 tests/vllm/run.sh

test-vllm-newest: ## the same with the newest vLLM that installs; failures are warnings
	PYTHON=$(PYTHON) VLLM=newest tests/vllm/run.sh

wheel: $(VENV)/.dev ## dist/: the sdist, and from it the manylinux wheel
	$(PY) -m build

clean: ## remove what was built; .venv stays (rm -rf .venv)
	rm -rf build dist $(LIB) python/zipserv/include python/*.egg-info
	find python tests tools examples -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

$(LIB): $(VENV)/.tools $(NATIVE) capi/zipserv.h
	$(PY) tools/native.py

# The tool chains: from PyPI where the machine has none that will do.
$(VENV)/.tools: tools/native.py
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "ZipServ needs Python 3.10 or later, $(PYTHON) is %d.%d. Cure: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	@test -x $(PY) && $(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || \
		{ rm -rf $(VENV); echo "zipserv: $(PYTHON) cannot make a virtual environment. Cure: apt install python3-venv (Debian, Ubuntu), or make PYTHON=/path/of/another/python"; exit 1; }
	$(PIP) "setuptools>=77.0.3" $$($(PY) tools/native.py --need)
	@touch $@

$(VENV)/.dev: $(VENV)/.tools pyproject.toml setup.py
	$(PIP) --no-build-isolation -e '.[test]'
	@touch $@ $(VENV)/.demo

$(VENV)/.demo: $(VENV)/.tools pyproject.toml setup.py
	$(PIP) --no-build-isolation -e '.[demo]'
	@touch $@
