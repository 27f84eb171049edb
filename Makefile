# make demo: train on the shipped digits.  make check: everything that CI runs.  make docs: the pages in docs/_build/html.
# make package: what the index would say of the package.  make wheels: what a release uploads, in dist/.
PYTHON ?= python3
VENV ?= .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
PIP := python -m pip install --quiet --constraint constraints.txt

.PHONY: setup demo check docs package wheels

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt $(wildcard setup.py src/rim_rnn/csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools
	$(PIP) --no-build-isolation --editable '.[examples,docs,test]'
	python -c 'import torch, rim_rnn; print("path of a RIM on this CPU:", rim_rnn.RIM(1, 600).path(torch.zeros(1, 1, 1)))'
	touch $@

$(VENV)/tools: $(VENV)/ready
	$(PIP) --no-build-isolation --editable '.[tools]'
	touch $@

$(VENV)/release: $(VENV)/ready
	$(PIP) --no-build-isolation --editable '.[release]'
	touch $@

demo: setup
	python examples/study/study.py examples/study/demo.toml --data_dir examples/study/digits --jobs 2 --seeds 0
	python examples/study/study_report.py examples/study/demo.toml --seeds 0

check: setup $(VENV)/tools docs package
	ruff format --check
	ruff check
	mypy
	RIM_RNN_NATIVE=0 python -m pytest --quiet -n auto -m 'not tools'
	python -m pytest --quiet -n auto -m tools
	python -m pytest -n auto -m 'not tools'

docs: setup
	python -m sphinx -W -n --keep-going -q -b html docs docs/_build/html
	python -m sphinx -W -n --keep-going -q -b doctest docs docs/_build/doctest

package: setup $(VENV)/release
	rm -rf .cache/package
	RIM_RNN_NATIVE=0 python -m build --no-isolation --outdir .cache/package > /dev/null
	twine check --strict .cache/package/*
	check-wheel-contents .cache/package/*.whl
	check-manifest --no-build-isolation

wheels: setup $(VENV)/release
	.ci/wheels
