"""What imports what: one direction, no TensorFlow in the accounting, noise in one file, Keras in one file."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

import tf_dpbn

ROOT = pathlib.Path(tf_dpbn.__file__).parent
# Modules may import from lower levels, and within their own where that is not a circle.
LEVELS = (
    ("_validate", "_registration", "version"),
    ("auditing.bounds", "accounting.events"),
    ("accounting.ledger",),
    ("accounting.ledger_file", "accounting.planning", "accounting.statement"),
    ("accounting.files", "accounting.suggestion"),
    ("accounting",),
    ("__main__",),
    ("augmentation", "public_data", "mechanisms", "_devices", "_keras", "_graph"),
    ("normalization.moments", "constraints", "features"),
    ("normalization.layer",),
    ("clipping.vectorization", "normalization.local_terms"),
    ("clipping.rows", "normalization.public_pass"),
    ("normalization",),
    ("clipping.clip_norms", "clipping.independence", "clipping.task"),
    ("clipping.contributions",),
    ("clipping.rules.base",),
    (
        "clipping.rules.convolution",
        "clipping.rules.einsum",
        "clipping.rules.elementwise",
        "clipping.rules.embedding",
        "clipping.rules.matmul",
    ),
    ("clipping.rules",),
    ("clipping.uses", "clipping.microbatches"),
    ("clipping.batch_trace", "clipping.per_example"),
    ("clipping.book_keeping",),
    ("clipping",),
    ("sampling.draws", "sampling.sources", "sampling.tfrecords"),
    ("sampling.dataset",),
    ("sampling",),
    ("optimizers",),
    ("model.checks", "model.progress", "model.training_record", "model.saving"),
    ("model.training_trace",),
    ("model.step", "model.public_statistics"),
    ("model.dp_model",),
    ("model",),
    ("conversion.coupling", "conversion.findings", "conversion.rebuild"),
    ("conversion",),
    ("auditing.attacks", "callbacks", "pretraining"),
    ("interop.callback", "interop.checks", "interop.row_loss", "interop.statistics_scope"),
    ("interop", "auditing.audits"),
    ("auditing",),
)
LEVEL = {module: level for level, modules in enumerate(LEVELS) for module in modules}
FRAMEWORKS = {"tensorflow", "keras", "tf_keras"}


def sources():
    """Module name below tf_dpbn -> syntax tree; "" is the package itself."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text())
    return found


SOURCES = sources()
MODULES = sorted(set(SOURCES) - {""})


def imported_names(tree):
    """Dotted names that a module imports anywhere in it, functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_modules(tree, modules=frozenset(LEVEL)):
    """Modules of the package that a module imports: the longest known prefix of each name."""
    found = set()
    for name in imported_names(tree):
        if name.split(".")[0] != "tf_dpbn":
            continue
        parts = name.split(".")[1:]
        prefixes = [".".join(parts[:k]) for k in range(len(parts), 0, -1)]
        found.add(next((prefix for prefix in prefixes if prefix in modules), ""))
    return found


def third_parties(tree):
    return {name.split(".")[0] for name in imported_names(tree)}


def upward(module, tree):
    """Imports that break the order."""
    return {other for other in imported_modules(tree) if LEVEL.get(other, len(LEVELS)) > LEVEL[module]}


def called_names(tree):
    """Last names of everything that is called or mentioned as an attribute, with its full dotted text."""
    return {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, (ast.Attribute, ast.Name))}


def draws_normal(tree):
    """Mentions of TensorFlow's or Keras' normal generators."""
    return {
        name
        for name in called_names(tree)
        if "normal" in name.split(".")[-1].lower() and ("random" in name or "stateless_" in name or "Generator" in name)
    }


def test_every_module_has_a_level():
    assert set(MODULES) == set(LEVEL)


@pytest.mark.parametrize("module", MODULES)
def test_nothing_imports_upwards(module):
    assert not upward(module, SOURCES[module])


def test_there_are_no_circles():
    graph = {module: imported_modules(SOURCES[module]) for module in MODULES}
    done = []
    while len(done) < len(graph):
        ready = [module for module in graph if module not in done and graph[module] <= set(done)]
        assert ready, f"a circle among {sorted(set(graph) - set(done))}"
        done += ready


def test_public_data_and_bounds_need_no_tensorflow_and_nothing_imports_interop():
    assert not (third_parties(SOURCES["public_data"]) | third_parties(SOURCES["auditing.bounds"])) & FRAMEWORKS
    others = [module for module in MODULES if not module.startswith("interop")]
    assert not {module for module in others if any(m.startswith("interop") for m in imported_modules(SOURCES[module]))}


ACCOUNTING = {module for module in MODULES if module.split(".")[0] in ("_validate", "accounting")}


@pytest.mark.parametrize("module", sorted(ACCOUNTING))
def test_accounting_needs_neither_tensorflow_nor_the_rest_of_the_package(module):
    assert not third_parties(SOURCES[module]) & FRAMEWORKS
    assert imported_modules(SOURCES[module]) <= ACCOUNTING


def test_accounting_starts_without_tensorflow_and_keras_files_load_with_the_package_alone():
    program = """
import sys
import tf_dpbn.accounting
assert not {"tensorflow", "keras", "tf_keras"} & set(sys.modules)
assert {"DPModel", "callbacks", "PrivacyPlan"} <= set(dir(tf_dpbn))
assert tf_dpbn.accounting.PrivacyPlan(
    noise_multiplier=1.0, delta=1e-5, num_examples=1000, expected_batch_size=10, steps=10).epsilon > 0
import keras
assert keras.saving.get_registered_object("tf_dpbn>DPFunctional") is tf_dpbn.model.DPFunctional
assert all(getattr(tf_dpbn, name) is not None for name in tf_dpbn.__all__)
try:
    tf_dpbn.nothing
except AttributeError as error:
    assert "has no attribute 'nothing'" in str(error)
else:
    raise AssertionError
"""
    environment = {k: v for k, v in os.environ.items() if k != "TF_USE_LEGACY_KERAS"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, cwd=ROOT.parent)


def test_a_missing_tf_keras_is_named_with_its_extra():
    program = "import sys; sys.modules['tf_keras'] = None; import tf_dpbn; tf_dpbn.DPModel"
    environment = {**os.environ, "TF_USE_LEGACY_KERAS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, env=environment, cwd=ROOT.parent
    )
    assert done.returncode and "pip install 'tf_dpbn[legacy]'" in done.stderr


def test_only_mechanisms_draws_noise():
    # Nothing draws normal numbers of TensorFlow's, which have no tail: noise is made of uniform bits. Public batches
    # are numpy's random numbers, and the module of those imports no TensorFlow (above).
    assert not {module for module in MODULES if draws_normal(SOURCES[module])} - {"public_data"}
    uniform = {m for m in MODULES if any(name.endswith("stateless_uniform") for name in called_names(SOURCES[m]))}
    assert uniform == {m for m in MODULES if "normal_from_bits" in called_names(SOURCES[m])} == {"mechanisms"}


def test_only_one_module_imports_keras():
    importing = {module for module in MODULES if third_parties(SOURCES[module]) & {"keras", "tf_keras"}}
    reaching = {
        module
        for module in MODULES
        if any(name.startswith(("tf.keras", "tensorflow.keras")) for name in called_names(SOURCES[module]))
    }
    assert importing | reaching <= {"_keras"}
    assert "tf.keras" in called_names(SOURCES["_keras"])


def test_these_checks_see_an_import_that_goes_upwards_and_noise():
    inside = "def f():\n    from tf_dpbn.clipping.per_example import PerExampleEngine"
    for source in ("from tf_dpbn.model import DPModel", inside, "import tf_dpbn"):
        assert upward("normalization.layer", ast.parse(source))
    for name in ("tf.random.stateless_normal", "keras.random.normal", "tf.random.truncated_normal"):
        assert draws_normal(ast.parse(f"{name}([3], seed)"))
