# Every command works on a machine that has Python 3.11 or newer, cargo and make; each builds what it needs first.

PYTHON ?= python3
VENV ?= .venv
BIN = $(abspath $(VENV))/bin
RUN = $(BIN)/python
# The suite runs from here, so that it imports the installed wheel and never the source tree.
OUTSIDE = build/outside
# One process per core, each on one thread: tests are many and small, and tests of threads choose their own number.
PYTEST = OMP_NUM_THREADS=1 $(RUN) -m pytest $(CURDIR)/tests -c $(CURDIR)/pyproject.toml --rootdir $(CURDIR) \
	-p no:cacheprovider -q -n auto --dist worksteal
SITE = NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir build/site

.DEFAULT_GOAL := help
.PHONY: help demo test test-rust test-python deep fuzz docs lint format wheel install bench quality clean

help:  ## List the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: install  ## Watch a model recover on a shifted stream (table and picture in build/demo)
	$(BIN)/shiftkern demo --out build/demo

test: test-rust test-python  ## Run the whole suite against the installed wheel

test-rust:
	cargo test --workspace --locked --quiet

test-python: install
	mkdir -p $(OUTSIDE)
	cd $(OUTSIDE) && $(PYTEST)

deep: install  ## The suite with many more random cases, for an hour to spare
	mkdir -p $(OUTSIDE)
	cd $(OUTSIDE) && SHIFTKERN_PROFILE=deep $(PYTEST) --timeout 3600

docs: install  ## Write the table of methods and build the site into build/site; warnings are errors
	cd $(OUTSIDE) && $(RUN) $(CURDIR)/tools/methods_page.py $(CURDIR)/docs/methods.md
	$(SITE)

fuzz: install  ## A hundred thousand hostile calls of everything public, counted by what came of them
	cd $(OUTSIDE) && OMP_NUM_THREADS=1 $(RUN) $(CURDIR)/tests/fuzz.py --calls 100000 --seed 1

lint: install  ## Check style, types, that the stub file matches the extension, and the documents
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	$(BIN)/ruff check python tests benches tools
	$(BIN)/ruff format --check python tests benches tools
	MYPYPATH=python $(BIN)/mypy --no-incremental
	cd $(OUTSIDE) && $(RUN) -m mypy.stubtest shiftkern._native
	$(SITE)

format:  ## Format all sources
	cargo fmt --all
	$(BIN)/ruff check --fix-only --quiet python tests benches tools
	$(BIN)/ruff format --quiet python tests benches tools

wheel: $(VENV)/.ready  ## Build the wheel into dist/
	rm -rf dist
	$(BIN)/maturin build --release --locked --quiet --out dist

install: wheel
	$(RUN) -m pip install --quiet --no-deps --force-reinstall dist/*.whl
	mkdir -p $(OUTSIDE)

bench: install  ## Measure everything side by side with its peers and write docs/benchmarks.md
	cd $(OUTSIDE) && $(RUN) $(CURDIR)/benches/report.py $(CURDIR)/docs/benchmarks.md
	cargo bench --workspace --locked --quiet

quality: install  ## Train a small diffusion model and measure images under sparse attention (half an hour)
	cd $(OUTSIDE) && $(RUN) $(CURDIR)/benches/quality_reattention.py $(CURDIR)/docs/quality-reattention.md

clean:  ## Remove what was built (the virtual environment stays)
	rm -rf build dist target

$(VENV)/.ready: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -r requirements-dev.txt
	touch $@
