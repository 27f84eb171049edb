# make demo: train on the shipped digits.  make quick: what any change needs.  make check: everything that CI runs.
# make docs: the pages in docs/_build/html.  make package: what the index would say of the package.
# make wheels: what a release uploads, in dist/.  make audit: known weaknesses of what all extras install; asks pypi.org.
PYTHON ?= python3
VENV ?= .venv
ifeq ($(OS),Windows_NT)
export PATH := $(abspath $(VENV))/Scripts;$(PATH)
else
export PATH := $(abspath $(VENV))/bin:$(PATH)
# named, for without a shell the make of macOS does not look along this PATH
SHELL := /bin/bash
endif
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Half of an installation's time is compiling modules, most of which nobody imports: each is compiled, and kept, when first imported
export PYTHONDONTWRITEBYTECODE :=
PIP := python -m pip install $(if $(CI),--quiet) --no-compile --constraint constraints.txt
PYTEST := python -m pytest -n auto --maxschedchunk 1

.PHONY: notebooks setup demo lint quick test check whole readable docs package wheels audit before-demo

setup: $(VENV)/ready

# The checkout, without an operator; then what its extras bring, and the operator, compiled into src
$(VENV)/checkout: pyproject.toml constraints.txt
	@echo "=== $(VENV): an environment with torch, which is the largest download"
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools numpy
	RIM_RNN_NATIVE=0 $(PIP) --no-build-isolation --editable .
	@touch $@

$(VENV)/examples: $(VENV)/checkout
	@echo "=== $(VENV): what the examples need"
	$(PIP) 'rim-rnn[examples]'
	@touch $@

$(VENV)/packages: $(VENV)/examples
	@echo "=== $(VENV): what the documentation and the tests need"
	$(PIP) 'rim-rnn[docs,test]'
	@touch $@

$(VENV)/tools: $(VENV)/packages
	@echo "=== $(VENV): the tools whose tests run with the layer inside, and NVRTC"
	$(PIP) 'rim-rnn[nvrtc,tools]'
	@touch $@

$(VENV)/release: $(VENV)/packages
	@echo "=== $(VENV): what looks at a release"
	$(PIP) 'rim-rnn[release]'
	@touch $@

$(VENV)/operator: $(VENV)/checkout $(wildcard setup.py src/rim_rnn/csrc/*)
	@echo "=== the native operator: a minute of the compiler; where there is none, the layer runs in plain PyTorch"
	rm -f src/rim_rnn/_native.*
	python setup.py -q build_ext --force --inplace
	@touch $@

$(VENV)/ready: $(VENV)/packages $(VENV)/operator
	python -m rim_rnn
	@touch $@

RUNS := runs/demo
demo: before-demo $(VENV)/examples $(VENV)/operator
	@echo "=== training, two runs at a time; stop it when you like, the same command goes on"
	python examples/study/study.py examples/study/demo.toml --data_dir examples/study/digits --jobs 2 --seeds 0
	python examples/study/study_report.py examples/study/demo.toml --seeds 0
	@echo "=== the table is in $(RUNS)/table.md. To look at, in $(RUNS)/sequential_mnist:"
	@echo "    RIM/seed-0/units.png   the pixels at which each unit was active"
	@echo "    sizes.png              accuracy against the size of the digits"
	@echo "    curves.png             accuracy as training went on"

before-demo:
	@echo "=== make demo: trains a RIM and an nn.LSTM on digits that ship with the examples, and draws what came of it."
	@echo "    Four minutes on two cores, of which the first time half are setting up $(VENV):"
	@echo "    it downloads torch and what the examples need, 1.1 GB of disk; on Linux gigabytes more, for CUDA, unless:"
	@echo "    PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo"

lint: setup
	ruff format --check
	ruff check
	mypy
	zizmor --offline --no-progress --quiet .
	check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/bug.yml .github/ISSUE_TEMPLATE/idea.yml
	check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	check-jsonschema --builtin-schema vendor.readthedocs .readthedocs.yaml
	check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

# without two files that are slow as a whole, and slow to import
quick: lint
	$(PYTEST) --quiet -m 'not tools and not slow' --ignore tests/test_examples.py --ignore tests/test_speed.py

test: setup
	$(PYTEST) -m 'not tools'

check:
	@echo "=== make check: format, lint, types, documentation, packages, then the tests: what CI runs on Linux."
	@echo "    Longer than the demo; the first time it sets up $(VENV), and downloads torch and some 200 packages."
	$(MAKE) --jobs 3 whole
	@echo "=== the tests, slow ones first"
	$(PYTEST)

# Without the operator: not the cases that choose the readable path themselves, nor files in which the path makes no difference, or
# which take the readable one anyway
ONCE := changed cuda docs examples graphs mutants package speed typing
readable: $(VENV)/packages
	RIM_RNN_NATIVE=0 nice $(PYTEST) --quiet -m 'not tools' -k 'not readable]' $(foreach name,$(ONCE),--ignore tests/test_$(name).py)

# In an order that keeps two cores busy, for pip, sphinx and mypy use one each; but only one pip at a time, and none beside
# docs. That chain is the longest, so the tests beside it are nice; and each has one thread, for two jobs have two cores
whole: export OMP_NUM_THREADS := 1
whole: setup $(VENV)/tools $(VENV)/release lint docs package readable
ifneq ($(filter whole,$(MAKECMDGOALS)),)
$(VENV)/release: | $(VENV)/tools
docs: | $(VENV)/release
endif

docs: setup $(VENV)/tools
	python -m sphinx -W -n --keep-going -q -b html -d docs/_build/doctrees docs docs/_build/html
	python -m sphinx -W -n --keep-going -q -b doctest docs docs/_build/doctest
	@for notebook in docs/gallery/*.ipynb; do \
		cmp $$notebook examples/gallery/notebooks/$${notebook##*/} || { echo "make notebooks, then commit them"; exit 1; }; \
	done

# The gallery's, as the pages have made them, for a browser service that opens them from the repository
notebooks:
	mkdir -p examples/gallery/notebooks
	cp docs/gallery/*.ipynb examples/gallery/notebooks

package: setup $(VENV)/release
	rm -rf .cache/package
	RIM_RNN_NATIVE=0 python -m build --no-isolation --outdir .cache/package > /dev/null
	twine check --strict .cache/package/*
	check-wheel-contents .cache/package/*.whl
	check-manifest --no-build-isolation

wheels: setup $(VENV)/release
	.ci/wheels

# The index knows 2.13.0 and no 2.13.0+cpu; and what it does not know is an error (--strict), for nobody has looked at that
audit: setup $(VENV)/tools $(VENV)/release
	python -m pip install --quiet --upgrade pip
	mkdir -p .cache
	python -m pip freeze --all --local --exclude-editable | sed 's/+.*//' > .cache/audit.txt
	grep -q '^torch==' .cache/audit.txt
	pip-audit --strict --no-deps --disable-pip --progress-spinner off --requirement .cache/audit.txt
