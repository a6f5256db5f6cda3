# What a newcomer needs: make demo, make test. Each target installs what it needs into .venv, and Debian packages by
# apt-get where it may.

PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(shell find aiokvm -type f -not -name '*.pyc') meson.build pyproject.toml
IMAGES := memtest86+ cloud cloud-elf generic i386 i386-pae initramfs initramfs-generic initramfs-i386 initramfs-i386-pae

.PHONY: help setup demo test acceptance bench lint docs clean core-tests fuzz

help:
	@echo "make demo    check this machine, boot Debian's kernel and show it working"
	@echo "make test    lint, types, the C core under sanitizers, all tests; real guests run in the lab"
	@echo "make acceptance  the tests with a KVM of both vendors, and Linux there: hours, once before a release"
	@echo "make fuzz    all that reads what guests, peers and files say, fuzzed for an hour each"
	@echo "make bench   measure, against QEMU where it is the peer"
	@echo "make lint    ruff and mypy"
	@echo "make docs    write docs/api.md from the docstrings"
	@echo "make clean   remove what was built"

setup: build/installed

build/packages: tools/packages
	@tools/packages $(PYTHON)
	@mkdir -p build && touch $@

.venv/ready: pyproject.toml build/packages
	@$(PYTHON) -c 'import sys; sys.exit("aiokvm needs Python 3.11 or later" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check --upgrade pip
	$(BIN)/python tools/requirements | $(BIN)/pip install -q --disable-pip-version-check -r /dev/stdin
	@touch $@

build/installed: .venv/ready $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install -q --disable-pip-version-check --no-build-isolation --no-deps --force-reinstall \
		-Cbuild-dir=build/wheel -Csetup-args=-Dwerror=true .
	@touch $@

demo: build/installed
	$(BIN)/python examples/demo.py

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# An hour for each: FUZZ_SECONDS says otherwise.
fuzz: build/installed
	$(BIN)/pip install -q --disable-pip-version-check 'atheris>=3'
	tools/fuzz $(or $(FUZZ_SECONDS),3600)

core-tests: .venv/ready
	PATH="$(CURDIR)/$(BIN):$$PATH" tools/core-tests

test: build/installed lint core-tests
	tools/fuzz
	$(BIN)/aiokvm images pull $(IMAGES)
	$(BIN)/aiokvm images build debian
	$(BIN)/pytest -m "not linux"
	$(BIN)/python tools/newest-python
	$(BIN)/python tools/linux-tests

acceptance: build/installed
	$(BIN)/python tools/acceptance

# SHORT=1: only whether they work.
bench: build/installed
	$(BIN)/pip install -q --disable-pip-version-check 'matplotlib>=3.8'
	tools/bench $(if $(SHORT),--short)

docs: build/installed
	$(BIN)/python tools/api-reference docs/api.md

clean:
	rm -rf build dist .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis benchmarks/results
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
