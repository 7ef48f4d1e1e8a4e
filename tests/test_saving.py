"""Saving, loading, resuming and exporting: what was spent is never forgotten, and nothing un-noised is written."""

import io
import pickle
import warnings
import zipfile

import h5py
import numpy as np
import pytest
import tensorflow as tf

import tf_dpbn
from tests import helpers, programs
from tf_dpbn import accounting
from tf_dpbn._keras import IS_KERAS_3, keras

pytestmark = pytest.mark.both
layers = keras.layers
DELTA = 1e-3
X, _ = helpers.images(16, (3,))
Y = X[:, :2]
PLAN = tf_dpbn.PrivacyPlan(noise_multiplier=2.0, delta=DELTA, num_examples=16, expected_batch_size=4, epochs=4)
PUBLIC = tf_dpbn.public_data.uniform_noise((3,), 6, seed=0)


@keras.saving.register_keras_serializable(package="tests")
class Subclassed(tf_dpbn.DPModel):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.hidden = layers.Dense(2)
        self.normalization = tf_dpbn.DPBatchNormalization()
        self.head = layers.Dense(2)

    def call(self, x, training=False):
        return self.head(self.normalization(self.hidden(x), training=training))


def functional():
    inputs = keras.Input((3,))
    return tf_dpbn.DPModel(inputs, layers.Dense(2)(tf_dpbn.DPBatchNormalization()(layers.Dense(2)(inputs))))


def sequential():
    stack = [keras.Input((3,)), layers.Dense(2), tf_dpbn.DPBatchNormalization(), layers.Dense(2)]
    return tf_dpbn.DPSequential(stack)


def subclassed():
    model = Subclassed()
    model(X[:1])
    return model


def prepare(model, **kwargs):
    optimizer = tf_dpbn.DPOptimizer(keras.optimizers.Adam(0.01), 0.5, 2.0, 4, num_examples=16, delta=DELTA)
    helpers.compiled(model, "mse", optimizer, metrics=["mae"], stub=True, **kwargs)
    optimizer.build(model.trainable_variables)  # else Keras warns that it loads no optimizer state
    return model


def plain(units=2):
    """Without normalization: quick to trace."""
    inputs = keras.Input((3,))
    return prepare(tf_dpbn.DPModel(inputs, layers.Dense(units)(inputs)))


def fit(model, epochs=1, callbacks=()):
    return model.fit(PLAN.poisson_dataset(X, Y), epochs=epochs, verbose=0, callbacks=list(callbacks))


def load_model(path):
    model = keras.models.load_model(path)
    model._engine = helpers.StubEngine()
    return model


def ledger(steps):
    return tf_dpbn.Ledger([PLAN.record(steps)])


@pytest.fixture(scope="module")
def trained():
    model = prepare(functional(), correction="full", engine="loop", microbatch_size=2)
    model.set_public_batch(PUBLIC)
    fit(model)
    return model


def assert_same_weights(model, other):
    for ours, theirs in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def h5_keys(file):
    found = []
    with h5py.File(file, "r") as content:
        content.visititems(lambda name, item: found.append((name, item)) if isinstance(item, h5py.Dataset) else None)
        return {name: np.asarray(item) for name, item in found}


# ---------------------------------------------------------------------- .keras


@pytest.mark.parametrize("make", [sequential, subclassed], ids=lambda make: make.__name__)
def test_keras_files_keep_weights_public_batch_and_ledger(make, tmp_path):
    model = prepare(make())
    helpers.randomize(model)
    model.set_public_batch(PUBLIC)
    helpers.spend(model, 4)
    model.save(tmp_path / "m.keras")
    loaded = load_model(tmp_path / "m.keras")
    assert type(loaded) is type(model)
    assert_same_weights(model, loaded)
    np.testing.assert_array_equal(loaded.public_batch, PUBLIC)
    np.testing.assert_allclose(loaded.predict(X, verbose=0), model.predict(X, verbose=0), atol=1e-6)
    assert loaded.ledger == model.ledger and model.ledger.steps == 4
    assert loaded.epsilon(DELTA) == model.epsilon(DELTA) > 0


def test_a_loaded_functional_model_is_compiled_and_continues(trained, tmp_path):
    trained.save(tmp_path / "m.keras")
    loaded = load_model(tmp_path / "m.keras")
    options = {"correction": "full", "engine": "loop", "microbatch_size": 2}
    assert loaded.get_compile_config().items() >= options.items()
    assert loaded.optimizer.get_config() == trained.optimizer.get_config()
    assert int(loaded.optimizer.iterations) == 4
    assert_same_weights(trained, loaded)
    assert loaded.ledger == ledger(4)
    before = loaded.get_weights()
    fit(loaded)
    assert loaded.ledger == ledger(8)
    assert loaded.epsilon(DELTA) == accounting.Ledger([PLAN.record(8)]).epsilon(DELTA)
    assert any(np.any(a != b) for a, b in zip(before, loaded.get_weights(), strict=True))
    assert trained.ledger == ledger(4)


@pytest.mark.parametrize("structure", ["dict", "list"])
def test_public_batches_of_several_inputs_are_kept(structure, tmp_path):
    a, b = keras.Input((3,), name="a"), keras.Input((2,), name="b")
    joined = tf_dpbn.DPBatchNormalization()(layers.Dense(2)(layers.Concatenate()([a, b])))
    inputs, public = [a, b], [PUBLIC, PUBLIC[:, :2] / 2]
    if structure == "dict":
        inputs, public = {"a": a, "b": b}, {"a": public[0], "b": public[1]}
    model = prepare(tf_dpbn.DPModel(inputs, joined))
    model.set_public_batch(public)
    helpers.spend(model, 3)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert type(loaded.public_batch) is type(public)
    tf.nest.map_structure(np.testing.assert_array_equal, loaded.public_batch, public)
    assert loaded.ledger == model.ledger
    assert loaded.ledger.steps == 3


@pytest.mark.skipif(not IS_KERAS_3, reason="tf_keras models are not pickled through their own hooks")
def test_pickles_keep_the_ledger(trained):
    assert pickle.loads(pickle.dumps(trained)).ledger == ledger(4)


@pytest.mark.parametrize("name", ["m.h5", "m.hdf5"])
def test_legacy_files_are_refused_with_the_remedy(name, trained, tmp_path):
    with pytest.raises(ValueError, match=rf"loses the ledger.*\.keras.*{name}"):
        trained.save(tmp_path / name)
    with pytest.raises(ValueError, match=rf"loses the ledger.*\.weights\.h5.*{name}"):
        trained.save_weights(tmp_path / name)


@pytest.mark.skipif(IS_KERAS_3, reason="Keras 3 refuses these itself")
def test_the_old_saved_model_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match="export"):
        plain().save(tmp_path / "folder")
    with pytest.raises(ValueError, match="loses the ledger"):
        plain().save(tmp_path / "m.keras", save_format="h5")


# ---------------------------------------------------------------------- weights and checkpoints


def test_weights_files_keep_the_record(trained, tmp_path):
    path = str(tmp_path / "m.weights.h5")
    trained.save_weights(path)
    other = prepare(functional())
    other.load_weights(path)
    assert_same_weights(trained, other)
    np.testing.assert_array_equal(other.public_batch, PUBLIC)
    assert other.ledger == ledger(4)
    np.testing.assert_allclose(other.predict(X, verbose=0), trained.predict(X, verbose=0), atol=1e-6)


def normalized_twice(seed, frozen=(), statistics=None):
    """Stock, or private by statistics of a kind, with random weights; nested, and once without a scale."""
    inner = keras.Sequential([keras.Input((4,)), layers.BatchNormalization(trainable=1 not in frozen), layers.Dense(2)])
    stack = [keras.Input((3,)), layers.Dense(4), layers.BatchNormalization(trainable=0 not in frozen, scale=False)]
    model = keras.Sequential([*stack, inner])
    helpers.randomize(model, seed)
    return tf_dpbn.convert(model, statistics=statistics) if statistics else model


STORED = {
    "stock": {},
    "public": {"statistics": "public"},
    "first_frozen": {"statistics": "public", "frozen": [0]},
    "second_frozen_noised": {"statistics": "noised", "frozen": [1]},
    "anchored": {"statistics": "anchored"},
    "fixed": {"statistics": "fixed"},
}


def test_weights_files_go_between_stock_and_private_forms(tmp_path):
    path = str(tmp_path / "m.weights.h5")
    private = [name for name in STORED if name != "stock"]
    saving, loading = ({name: normalized_twice(seed, **STORED[name]) for name in STORED} for seed in (1, 2))
    for name in private:
        saving[name].set_public_batch(PUBLIC)
        for each, steps in ((saving[name], 3), (loading[name], 2)):
            each._record.open(helpers.dp_optimizer())
            helpers.spend(each, steps)
    for k, (saved, model) in enumerate(saving.items()):
        model.save_weights(path)
        expected = model(X)
        for loaded, other in loading.items():
            helpers.randomize(other, seed=3)
            other.load_weights(path)
            np.testing.assert_allclose(expected, other(X), rtol=1e-5, err_msg=f"{saved}, {loaded}")
            if loaded != "stock":
                assert other.ledger.steps == 2 + 3 * k  # the stock model comes first; what ran is never forgotten


@pytest.mark.parametrize("statistics", ["noised", "anchored"])
def test_weights_files_keep_averages_of_releases_and_a_stock_file_begins_them_anew(statistics, tmp_path):
    path = str(tmp_path / "m.weights.h5")
    model, other = (normalized_twice(seed, statistics=statistics) for seed in (1, 2))
    model.layers[1].statistic_updates.assign(7.0)
    other.layers[1].statistic_updates.assign(9.0)
    for source, expected in ((model, 7.0), (normalized_twice(3), 0.0)):
        source.save_weights(path)
        other.load_weights(path)
        assert float(other.layers[1].statistic_updates) == expected


@pytest.mark.parametrize("compiled", [True, False])
def test_tensorflow_checkpoints_keep_the_ledger(compiled, trained, tmp_path):
    path = tf.train.Checkpoint(model=trained).save(str(tmp_path / "checkpoint"))
    other = prepare(functional()) if compiled else functional()
    tf.train.Checkpoint(model=other).restore(path)
    assert_same_weights(trained, other)
    assert other.ledger == ledger(4)


@pytest.mark.skipif(IS_KERAS_3, reason="Keras 3 has no such format")
def test_legacy_checkpoint_files_keep_the_ledger(trained, tmp_path):
    trained.save_weights(str(tmp_path / "weights"))
    other = prepare(functional())
    other.load_weights(str(tmp_path / "weights")).expect_partial()
    assert other.ledger == ledger(4)


def test_files_hold_neither_metrics_nor_noise_keys(tmp_path):
    class Saving(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            assert any(np.any(np.asarray(v) != 0) for metric in self.model.metrics for v in metric.variables)
            self.model.save(tmp_path / "m.keras")
            self.model.save_weights(str(tmp_path / "m.weights.h5"))

    model = plain()
    with pytest.warns(tf_dpbn.accounting.PrivacyWarning, match="do not come from"):  # Poisson sampling may draw nobody
        model.fit(X, Y, batch_size=4, verbose=0, callbacks=[Saving()])
    checkpoint = tf.train.Checkpoint(model=model).save(str(tmp_path / "checkpoint"))
    inside = io.BytesIO(zipfile.ZipFile(tmp_path / "m.keras").read("model.weights.h5"))
    key = model.optimizer._noise_source._key.numpy()
    for content in (h5_keys(inside), h5_keys(tmp_path / "m.weights.h5")):
        for name, value in content.items():
            first = name.split("/")[0]
            known = {"layers", "_layer_checkpoint_dependencies", "optimizer", "vars", "metrics", "zz_tf_dpbn_record"}
            assert first in known, name
            assert first != "metrics" or not np.any(value), name
            assert not np.isin(key, value).any(), name
    for name, _ in tf.train.list_variables(checkpoint):
        assert not any(word in name for word in ("metric", "noise", "draws", "loss")), name
        value = tf.train.load_variable(checkpoint, name)
        assert isinstance(value, bytes) or not np.isin(key, value).any(), name


# ---------------------------------------------------------------------- histories that meet


def spent(steps, path=None):
    model = plain()
    if path:
        model.load_weights(path)
    helpers.spend(model, steps)
    return model


def test_a_shorter_state_of_the_same_run_takes_nothing_back(tmp_path):
    path = str(tmp_path / "m.weights.h5")
    model = spent(3)
    model.save_weights(path)
    helpers.spend(model, 2)
    model.load_weights(path)
    assert model.ledger.steps == 5
    resumed = spent(4, path)
    assert resumed.ledger.steps == 7
    resumed.save_weights(path)
    model.load_weights(path)
    assert model.ledger.steps == 9  # three of both, two of one, four of the other


def test_another_run_is_added(tmp_path):
    path = str(tmp_path / "m.weights.h5")
    spent(4).save_weights(path)
    model = spent(3)
    model.load_weights(path)
    assert model.ledger.steps == 7


def test_equally_long_branches_of_one_run_are_added_up(tmp_path):
    start, branch = str(tmp_path / "start.weights.h5"), str(tmp_path / "branch.weights.h5")
    model = spent(3)
    model.save_weights(start)
    spent(2, start).save_weights(branch)
    helpers.spend(model, 2)
    for _ in range(2):
        model.load_weights(branch)
        assert model.ledger.steps == 7  # three of both, two of each


def test_the_ledger_is_loaded_though_weights_do_not_match(tmp_path):
    path, other = str(tmp_path / "m.weights.h5"), plain(units=3)
    spent(3).save_weights(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras', of what does not match
        other.load_weights(path, skip_mismatch=True)
    assert other.ledger.steps == 3


# ---------------------------------------------------------------------- resuming


class Interruption(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("same_process", [True, False])
def test_backup_and_restore_counts_all_steps(same_process, tmp_path):
    def backup():
        return keras.callbacks.BackupAndRestore(str(tmp_path / "backup"))

    model = plain()
    with pytest.raises(KeyboardInterrupt):
        fit(model, epochs=3, callbacks=[backup(), Interruption()])
    assert model.ledger == ledger(8)
    resumed = model if same_process else plain()
    history = fit(resumed, epochs=3, callbacks=[backup()])
    assert len(history.epoch) == 1
    assert resumed.ledger == ledger(12)


# ---------------------------------------------------------------------- export


def test_saved_models_are_made_by_export(tmp_path):
    model = functional()
    with pytest.raises(ValueError, match=r"tf.saved_model.save cannot save a DPModel. Call `model.export\(path\)`"):
        tf.saved_model.save(model, str(tmp_path / "saved"))
    inputs = keras.Input((3,))
    keras.Model(inputs, model(inputs)).export(str(tmp_path / "outer"))  # of a stock model around it, too


_SERVE = """
import sys
for name in ("tf_dpbn", "keras", "tf_keras"):
    sys.modules[name] = None
import numpy as np
import tensorflow as tf
served = tf.saved_model.load(sys.argv[1])
data = np.load(sys.argv[2])
np.testing.assert_allclose(served.serve(data["x"]), data["y"], rtol=1e-5, atol=1e-5)
print("reproduced")
"""


def test_an_exported_model_needs_tensorflow_alone_has_final_statistics_and_converts_to_tflite(tmp_path):
    model, path = prepare(functional()), str(tmp_path / "served")
    model.set_public_batch(PUBLIC)
    model.train_on_batch(X[:4], Y[:4])
    model.export(path)
    hidden, normalization, head = model.layers[1:]
    z = hidden(PUBLIC).numpy()
    x = hidden(X).numpy()
    scale = normalization.gamma / np.sqrt(z.var(0) + normalization.epsilon)
    expected = head((x - z.mean(0)) * scale + normalization.beta).numpy()
    np.testing.assert_allclose(model.predict(X, verbose=0), expected, rtol=1e-5, atol=1e-5)
    np.savez(tmp_path / "data.npz", x=X, y=expected)
    assert programs.last_line("-c", _SERVE, path, str(tmp_path / "data.npz")) == "reproduced"

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the interpreter is moving to a package of its own
        interpreter = tf.lite.Interpreter(model_content=tf.lite.TFLiteConverter.from_saved_model(path).convert())
    inputs, outputs = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]
    interpreter.resize_tensor_input(inputs, X.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(inputs, X)
    interpreter.invoke()
    np.testing.assert_allclose(interpreter.get_tensor(outputs), expected, rtol=1e-5, atol=1e-5)


LOADS = """
import sys
import tf_dpbn  # alone, and before Keras
assert "tensorflow" not in sys.modules
keras = __import__(sys.argv[1])
print(type(keras.models.load_model(sys.argv[2])).__module__)
"""


def test_a_model_loads_after_the_import_of_the_package_alone(tmp_path):
    inputs = keras.Input((3,))
    tf_dpbn.DPModel(inputs, tf_dpbn.DPBatchNormalization()(inputs)).save(tmp_path / "m.keras")
    name = "keras" if IS_KERAS_3 else "tf_keras"
    assert programs.last_line("-c", LOADS, name, str(tmp_path / "m.keras")) == "tf_dpbn.model.dp_model"
