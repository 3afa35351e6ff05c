# Everything a person types here. Needs make, a C++17 compiler and Python >= 3.11; the rest is installed into
# virtual environments of this folder: .venv (what a user gets) and .venv-test (tests, linters, editable).

export PIP_DISABLE_PIP_VERSION_CHECK := 1
TORCH := torch==2.13.0
BUILD_REQUIREMENTS := 'scikit-build-core>=0.11' 'nanobind>=2.8' cmake ninja

NATIVE_FILES := $(shell find native -type f)
PYTHON_FILES := $(shell find src -type f -name '*.py')

.PHONY: demo test test-slow lint format bench sanitize clean help

help:  ## what the targets do
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: .venv/.installed  ## the main job: fetch a real model, one streamed answer, what it costs
	.venv/bin/fallow pull
	.venv/bin/fallow run "Explain in two sentences why farmers let a field lie fallow."
	.venv/bin/fallow bench --quick

test: .venv-test/.installed  ## the tests, a process on each core, in an environment of their own
	.venv-test/bin/python -m pytest -ra --durations=5 --numprocesses auto --maxprocesses 8 --dist loadfile $(PYTEST_ARGS)

test-slow: .venv-test/.installed  ## the tests that take minutes
	.venv-test/bin/python -m pytest -ra -m slow --durations=5 $(PYTEST_ARGS)

lint: .venv-test/.installed  ## ruff and mypy
	.venv-test/bin/ruff check
	.venv-test/bin/ruff format --check
	.venv-test/bin/mypy

format: .venv-test/.installed  ## mend what ruff can mend
	.venv-test/bin/ruff check --fix
	.venv-test/bin/ruff format

bench: .venv/.installed  ## the cost table, ours and every peer, in one run
	.venv/bin/fallow bench --peer llama.cpp --peer openvino --peer vllm --peer transformers $(BENCH_ARGS)

sanitize: .venv-test/.installed  ## the native tests under AddressSanitizer and UBSan
	PYTHON=.venv-test/bin/python native/sanitize.sh

clean:  ## back to a fresh clone
	rm -rf .venv .venv-test build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -type d -name __pycache__ -prune -exec rm -rf {} +

# A stamp a virtual environment: made anew only when what it was made from has changed.
.venv/.installed: pyproject.toml README.md $(NATIVE_FILES) $(PYTHON_FILES)
	$(call make_venv,.venv)
	.venv/bin/python -m pip install --quiet --config-settings=build-dir=build/wheel .
	@touch $@

.venv-test/.installed: pyproject.toml $(NATIVE_FILES)
	$(call make_venv,.venv-test)
	.venv-test/bin/python -m pip install --quiet '$(TORCH)'
	.venv-test/bin/python -m pip install --quiet $(BUILD_REQUIREMENTS)
	.venv-test/bin/python -m pip install --quiet --no-build-isolation --config-settings=build-dir=build/editable \
		--editable '.[test,lint,train]'
	@touch $@

# $(call make_venv,FOLDER): the first Python that can make one; it is run, since a name on the path may be an empty shim.
define make_venv
@command -v $${CXX:-c++} >/dev/null || { \
	echo "No C++ compiler found: install one (Debian, Ubuntu: apt install g++) or name it with CXX=..." >&2; exit 1; }
@$(1)/bin/python -m pip --version >/dev/null 2>&1 && exit 0; \
for python in $(PYTHON) python3.13 python3.12 python3.11 python3.14 python3 python; do \
	if $$python -c 'import ensurepip, os, sys, sysconfig, venv; \
		sys.exit(sys.version_info < (3, 11) or not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' \
		2>/dev/null; then \
		echo "$$python -m venv $(1)"; exec $$python -m venv --clear $(1); \
	fi; \
done; \
echo "No Python >= 3.11 with venv and headers found: install one (Debian, Ubuntu: apt install python3 python3-venv" \
	"python3-dev) or name it with PYTHON=/path/to/python3.12" >&2; exit 1
endef
