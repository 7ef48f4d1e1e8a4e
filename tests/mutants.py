"""Small mutations of the package, one at a time, and whether the tests notice: `make mutants`.

    python -m tests.mutants --only=clip --workers=2

Each mutant is a copy of the package in a temporary directory with one line changed, under a fast selection of the
tests, which stops at the first failure. Prints a table and ends with status 1 if less than 90 % are killed. A text to
be changed must occur exactly once, so that the list cannot rot unseen.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

from absl import app, flags

_ONLY = flags.DEFINE_string("only", "", "Runs the mutants whose file or change holds this text.")
_WORKERS = flags.DEFINE_integer("workers", 2, "How many mutants run at a time.", lower_bound=1)
_TIMEOUT = flags.DEFINE_integer(
    "timeout", 300, "Seconds after which a mutant's tests are given up; it then counts as alive.", lower_bound=1
)

ROOT = pathlib.Path(__file__).parents[1]
_REQUIRED = 0.9
_RULES, _ENGINES, _PROOF = (f"tests/conformance/test_{n}.py" for n in ("rules", "engines", "independence"))
_MECHANISMS, _STATISTICS, _RELEASED = (
    f"tests/test_{n}.py" for n in ("mechanisms", "statistics", "released_statistics")
)
_ACCOUNTING, _PLAN, _SAMPLING = (f"tests/test_{n}.py" for n in ("accounting", "accounting_plan", "sampling"))
_DATASET, _SOURCES, _USERS = (f"tests/test_{name}.py" for name in ("poisson_dataset", "sources", "users"))
_CLIP_NORMS = "tests/test_clip_norms.py"
_FLOATS = "tests/conformance/test_floating_point.py"
_ORACLE, _LEDGER, _GALLERY = (f"tests/test_{n}.py" for n in ("gradient_oracle", "ledger_of_model", "gallery"))
_AUDITING, _WEIGHTS = "tests/test_auditing.py", "tests/test_losses_and_weights.py"
_LEDGER_FILE = "tests/test_ledger_file.py"
_FEATURES, _PRETRAINING = "tests/test_features.py", "tests/test_pretraining.py"
_DEVICES, _GPU = "tests/test_devices.py", "tests/test_gpu_graphs.py"


_GRAM, _OF_STATISTICS = ((_GALLERY, f"right_library and {name}") for name in ("gram", "statistics"))
_PADDING = (_ENGINES, "padding_anywhere and book_keeping and False")
_TWICE = (_ENGINES, "microbatches_agree and twice and vectorized")


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One changed line.

    Attributes:
      file: below tf_dpbn.
      old: the text to be changed.
      new: what it becomes.
      tests: arguments of pytest.
    """

    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def _selected(path: str, *keywords: str) -> tuple[str, ...]:
    return (path, *(each for keyword in keywords for each in ("-k", keyword)))


# File below tf_dpbn -> (old, new, test file, and, if not all of it, which of its tests).
_CHANGES: dict[str, tuple[tuple[str, ...], ...]] = {
    "mechanisms.py": (
        ("l2_norm_clip / tf.maximum(norms, l2_norm_clip)", "l2_norm_clip / norms", _MECHANISMS),
        ("keep = tf.math.is_finite(norms)", "keep = tf.ones_like(norms, tf.bool)", _MECHANISMS),
        ("keep = tf.logical_and(keep, mask)", "keep = tf.logical_or(keep, mask)", _MECHANISMS),
        ("norms = tf.sqrt(squared_norms)", "norms = squared_norms", _MECHANISMS),
        ("stddev = multiplier * _validate", "stddev = 1.0 * _validate", _MECHANISMS),
        ("tf.cast(stddev * each, tensor.dtype)", "tf.cast(each, tensor.dtype)", _MECHANISMS),
        ("middle * 2.0**-64 + (low + 0.5) * 2.0**-96", "2.0**-33", _FLOATS),
        ("radius * tf.sin(angle)", "radius * tf.cos(angle)", _MECHANISMS),
        ("if multiplier > 0:", "if multiplier > 1:", _MECHANISMS),
        ("self._draws.assign_add(1)", "self._draws.read_value()", _MECHANISMS),
        ("[secrets.randbits(63), secrets.randbits(63)]", "[0, 0]", _MECHANISMS),
        ("tf.cast(tensor / denominator, tf.float32)", "tf.cast(tensor, tf.float32)", _MECHANISMS),
    ),
    "clipping/clip_norms.py": (
        ("self.l2_norm_clip / (norms + self.gamma)", "self.l2_norm_clip / self.gamma", _CLIP_NORMS, "automatic"),
        (
            "1.0 / tf.maximum(norms, self.norm)",
            "self.norm / tf.maximum(norms, self.norm)",
            _CLIP_NORMS,
            "adaptive_sums",
        ),
        ("    l2_sensitivity = 1.0", "    l2_sensitivity = 0.5", _CLIP_NORMS, "adaptive_releases"),
        ("tf.exp(-self.learning_rate", "tf.exp(self.learning_rate", _CLIP_NORMS, "units"),
    ),
    "accounting/events.py": (
        ("parts += (sigma / math.sqrt(f),)", "parts += (sigma / f,)", _CLIP_NORMS, "together_is"),
        ("event.count * tail_delta", "0.0 * tail_delta", _ACCOUNTING),
        ("** 2 for sigma in sigmas)", "** 2 for sigma in sigmas[:1])", _ACCOUNTING, "effective or folded or lost"),
        ("stats.binom.sf(rows - 1,", "stats.binom.sf(rows,", _ACCOUNTING, "truncation"),
        ("rest / math.sqrt(1.0 - rho)", "rest / (1.0 - rho)", _RELEASED, "split_noise"),
        ("max(epsilon, 0.0)", "epsilon / 2.0", _ACCOUNTING, "closed_form"),
    ),
    "clipping/microbatches.py": (
        ("a + b for a, b", "tf.cast(tf.cast(a + b, tf.float32), tf.float64) for a, b", _FLOATS),
        ("        return rounded_up(size)", "        return size", _ENGINES, "its_place"),
        (
            "squared, release.l2_norm_clip, mask)",
            "squared, 2.0 * release.l2_norm_clip, mask)",
            _ENGINES,
            "whoever_made_them",
        ),
        ("squared, release.l2_norm_clip, mask)", "squared, release.l2_norm_clip, None)", *_OF_STATISTICS),
        ("(total,), release.l2_norm_clip)", "(total,), 0.5 * release.l2_norm_clip)", *_OF_STATISTICS),
        ("sensitivity_of(l2_norm_clip))]", "0.5 * sensitivity_of(l2_norm_clip))]", *_GRAM),
        ("return (*data, positions < examples)", "return (*data, positions <= examples)", *_PADDING),
        ("i * size, size, examples)", "i * size + 1, size, examples)", *_PADDING),
    ),
    "normalization/moments.py": (
        ("-0.5 * gamma", "0.5 * gamma", _STATISTICS),
        (
            "(second - variance) * tf.square(r)",
            "(second - variance) * r",
            _RELEASED,
            "mean_residual or masked_positions",
        ),
        ("_LEAST_FACTOR = 0.25", "_LEAST_FACTOR = 0.0", _RELEASED, "survives_any"),
        ("tf.maximum(1.0 - momentum,", "tf.minimum(1.0 - momentum,", _RELEASED, "approach_the_moments or deep_stack"),
        ("+ 0.5 * shift * tf.math.rsqrt", "+ shift * tf.math.rsqrt", _RELEASED, "anchored_corrections"),
        ("+ self.spread(c_variance) * self.d_variance", "- self.spread(c_variance) * self.d_variance", *_TWICE),
    ),
    "clipping/contributions.py": (
        ("squared += 2.0 * tf", "squared += 1.0 * tf", *_GRAM),
        ("return tf.abs(squared) +", "return tf.maximum(squared, 0.0) +", _ENGINES, "infinite_where"),
        (
            "a, g = (tf.cast(each, tf.float64) for each in (self._a",
            "a, g = (each for each in (self._a",
            _ENGINES,
            "leave_float32",
        ),
        (
            "squared = size if single else",
            "squared = size if True else",
            _RULES,
            "plain_differentiation and dense_rank_3",
        ),
        ("weighted_sum(weights, cotangent)", "weighted_sum(tf.ones_like(weights), cotangent)", *_GRAM),
    ),
    "clipping/independence.py": (
        ("stride = state.inner * math", "stride = math", _PROOF, "rows_within"),
        ("and not _is_alike(proof, tensor, found.axis - rank):", "and False:", _PROOF, "place"),
        ("if state.axis in found:", "if False:", _PROOF, "cumulative or reversed"),
        ("if axis == summed:", "if False:", _PROOF, "square_product"),
        ("or state.axis != 0:", "or False:", _PROOF, "convolution_over"),
        ('if operation.get_attr("is_training") or', "if", _PROOF, "fused"),
        ("strides[k] == 1 and", "True and", _PROOF, "by_a_stride"),
        ("if operation.op_def.is_stateful and", "if False and", _PROOF, "state"),
    ),
    "clipping/batch_trace.py": (
        ("    check_same_operations(operations, one_more)", "    pass", _PROOF, "arithmetic"),
        (
            "(tf.concat(products, 1) - mean * d_beta)",
            "tf.concat(products, 1)",
            _ENGINES,
            "microbatches_agree and twice and book_keeping",
        ),
    ),
    "clipping/rows.py": (
        ("return values if finite is None", "return values if True", _RULES, "non_finite"),
        ("(slice(None),) * (tensor", "() * (tensor", _GPU, "every_axis"),
    ),
    "clipping/per_example.py": (
        (
            "tf.add_n([sum_of_squares(g) for g in gradients])",
            "tf.add_n([sum_of_squares(g) for g in gradients[1:]])",
            _ENGINES,
            "loop_over_examples and vectorized and custom",
        ),
        ("gradients[term.index] += tf", "gradients[term.index] -= tf", *_TWICE),
        ("finite_only(finite, g)", "g", _GALLERY, "right_library and vectorized"),
    ),
    "clipping/book_keeping.py": (
        ("l2_norm_clip, mask), finite", "l2_norm_clip, None), finite", *_PADDING),
        (
            "if any(_graph.calls_functions(operation) for operation in operations):",
            "if False:",
            _ENGINES,
            "derivatives_within",
        ),
        (
            "if any(_graph.calls_functions(operation) for operation in operations):",
            "if True:",
            "tests/test_model.py",
            "no_graph_behind and book_keeping",
        ),
    ),
    "normalization/local_terms.py": (
        ("d_variances.append(2.0 *", "d_variances.append(1.0 *", _RELEASED, "length_of_the_kernel"),
    ),
    "clipping/rules/convolution.py": (
        (
            "before, after = total // 2, total - total // 2",
            "before, after = total - total // 2, total // 2",
            _RULES,
            "plain_differentiation and strided_same",
        ),
    ),
    "clipping/rules/matmul.py": (
        (
            "left, right = (cotangent, data) if self._transposed",
            "left, right = (cotangent, data) if not self._transposed",
            _RULES,
            "plain_differentiation and dense",
        ),
    ),
    "clipping/rules/elementwise.py": (
        (
            "widen(cotangent) * widen(inputs[0]) if self._scale",
            "widen(cotangent) if self._scale",
            _RULES,
            "plain_differentiation and scale_and_bias",
        ),
    ),
    "clipping/rules/embedding.py": (
        ("first = tf.logical_and(inside, tf.logical_not(earlier))", "first = inside", _RULES, "lookups_count"),
    ),
    "accounting/ledger.py": (
        (
            "(events, delta - self.truncation_delta(), accountant)",
            "(events, delta, accountant)",
            _ACCOUNTING,
            "truncation",
        ),
        ("self._steps.get(key, 0) + record.steps", "record.steps", _ACCOUNTING, "merge"),
    ),
    "accounting/planning.py": (
        ("Ledger([*self.before, own])", "Ledger([own])", _PLAN),
        ("return low\n\n\n@dataclasses", "return high\n\n\n@dataclasses", _PLAN),
    ),
    "sampling/draws.py": (
        ("rng.geometric(probability,", "rng.geometric(0.9 * probability,", _SAMPLING),
        ("own = rng.choice(own, self._most, replace=False)", "own = own[: self._most]", _USERS, "equally_likely"),
        ("counts[row, : len(own)] =", "counts[row, :] =", _USERS, "count_once"),
        (
            "drawn = rng.choice(drawn, size=sampling.max_batch_size, replace=False)",
            "drawn = drawn[: sampling.max_batch_size]",
            _SAMPLING,
        ),
        ("rng.choice(rows, size=drawn.size, replace=False)", "np.arange(drawn.size)", _SAMPLING),
        ("secrets.randbits(128) if seed is None else seed", "0 if seed is None else seed", _SAMPLING),
    ),
    "sampling/sources.py": (("rows[indices < 0] =", "rows[indices < -1] =", _DATASET),),
    "sampling/dataset.py": (
        ("if weights is not examples[-1] or", "if", _SOURCES, "loses"),
        ("or not isinstance(spec[2], tf.TensorSpec):", "or False:", _SOURCES, "loses"),
        ("tf.where(counts, tf.cast(weights, tf.float32), 0.0)", "tf.cast(weights, tf.float32)", _USERS, "count_once"),
        ("nonzero = tf.not_equal(", "nonzero = tf.greater(", _DATASET),
    ),
    "optimizers.py": (
        (
            "add_gaussian_noise(each, multiplier, self",
            "add_gaussian_noise(each, multipliers[0], self",
            _RELEASED,
            "promised_noise",
        ),
        (
            "self.expected_batch_size / self.num_examples",
            "0.5 * self.expected_batch_size / self.num_examples",
            _LEDGER,
            "epsilon_is_that",
        ),
        ("self._steps.count(len(clipped) - 1)", "tf.constant(0)", _LEDGER, "recorded_by"),
        ("with tf.control_dependencies(sums):", "with tf.control_dependencies([]):", _LEDGER, "beyond_the_end"),
    ),
    "accounting/ledger_file.py": (
        ("self._block - steps, record", "self._block, record", _LEDGER_FILE, "ahead_of_each"),
        ("if self._left >= 0 and", "if self._left >= -1 and", _LEDGER_FILE, "ahead_of_each"),
        ("and record is self._record", "", _LEDGER_FILE, "another_cost"),
        ("        self._file.truncate(self._end)", "        pass", _LEDGER_FILE, "cut_short"),
        ("before.encode() + rest", "rest", _LEDGER_FILE, "other_change"),
        ("        os.fsync(self._file.fileno())\n", "", _LEDGER_FILE, "ahead_of_each"),
    ),
    "model/training_record.py": (
        ("self._merge(self._file.open())", "self._file.open()", _LEDGER_FILE, "resumed_model"),
        ("steps - self._counted.get(multipliers, 0)", "steps", _LEDGER, "recorded_by"),
        ("if optimizer is not self._optimizer:", "if True:", _LEDGER, "while_the_ledger"),
    ),
    "model/step.py": (("tf.reduce_sum(tf.cast(present, tf.float32)))", "float(users))", _USERS, "clipped_mean"),),
    "clipping/rules/base.py": (("cotangent.dtype == tf.float64 or", "False or", _ENGINES, "float64_count"),),
    "model/dp_model.py": (
        ("if not self._is_in_step:", "if False:", _LEDGER, "elsewhere"),
        ("self._record.open(optimizer, unit=self._unit())  # later", "pass  # later", _LEDGER, "assumed_even_after"),
        (
            "released.plus(correction).plus(penalty_gradients)",
            "released.plus(penalty_gradients)",
            _ORACLE,
            "local_and_nonlocal",
        ),
        ("released.plus(correction).plus(penalty_gradients)", "released.plus(correction)", _WEIGHTS, "regularizer"),
        (
            "public.update_statistics([each.tensors[0] for each in statistics])",
            "public.update_statistics([each.tensors[0] for each in clipped[1:]])",
            _RELEASED,
            "promised_noise",
        ),
        ("            require_full_float32()\n", "", _DEVICES),
        ("self._record.write_ahead(", "(lambda steps: None)(", _LEDGER_FILE, "resumed_model"),
    ),
    "features.py": (
        ("wavelets[scale + 1 :]]", "wavelets[scale:]]", _FEATURES, "definition"),
        ("2 * (length - 1) - inside", "2 * length - 1 - inside", _FEATURES, "definition"),
        ("- gaussian * (wave", "- 0.99 * gaussian * (wave", _FEATURES, "definition"),
        ("Dense(channels, trainable=False", "Dense(channels, trainable=True", _FEATURES, "front"),
        ("np.maximum(eigenvalues, 0) + epsilon", "np.maximum(eigenvalues, epsilon)", _FEATURES, "damps"),
    ),
    "pretraining.py": (
        ("tf.roll(tf.range(2 * count), count, 0)", "tf.range(2 * count)", _PRETRAINING, "paper"),
        ("/ temperature\n", "* temperature\n", _PRETRAINING, "paper"),
    ),
    "_devices.py": (("tensor_float_32_execution(False)", "tensor_float_32_execution(True)", _DEVICES),),
    "clipping/vectorization.py": (("images.shape.rank != 5", "images.shape.rank != 6", _GPU, "sums"),),
    "normalization/public_pass.py": ((">= _DEEP", "> _DEEP", "tests/test_conversion.py", "from_eight"),),
    "auditing/bounds.py": (
        ("2.0 * canaries * delta * worst", "2.0 * guesses * delta * worst", _AUDITING, "papers"),
        (
            '- _validate.open_probability("confidence", confidence)) / 2.0',
            '- _validate.open_probability("confidence", confidence))',
            _AUDITING,
            "by_hand",
        ),
    ),
}
MUTANTS = tuple(
    Mutant(file, old, new, _selected(*tests)) for file, found in _CHANGES.items() for old, new, *tests in found
)


def mutated(mutant: Mutant, root: pathlib.Path = ROOT) -> str:
    """The text of the file with the mutation."""
    text = (root / "tf_dpbn" / mutant.file).read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        raise ValueError(
            f"{mutant.file} must hold {mutant.old!r} exactly once. Received: {text.count(mutant.old)} times"
        )
    return text.replace(mutant.old, mutant.new)


def run(mutant: Mutant) -> tuple[str, float]:
    """("killed", "timeout", "survived" or "not run", seconds)."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        copy = pathlib.Path(directory)
        for name in ("tf_dpbn", "tests", "examples", "benchmarks"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        (copy / "tf_dpbn" / mutant.file).write_text(mutated(mutant), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutant.tests]
        environment = {**os.environ, "PYTHONPATH": directory, "TF_CPP_MIN_LOG_LEVEL": "3"}
        try:
            done = subprocess.run(
                command, cwd=copy, env=environment, capture_output=True, text=True, timeout=_TIMEOUT.value
            )
            # A crash is noticed as well as a failure; 4 and 5 are pytest's own complaints of what it was given.
            outcome = {0: "survived", 4: "not run", 5: "not run"}.get(done.returncode, "killed")
        except subprocess.TimeoutExpired:
            outcome = "timeout"
    return outcome, time.perf_counter() - start


def main(argv: list[str]) -> None:
    del argv
    chosen = [m for m in MUTANTS if _ONLY.value in f"{m.file} {m.old} {m.new}"]
    for mutant in chosen:
        mutated(mutant)
    print("| file | change | outcome | seconds |\n| --- | --- | --- | --- |")
    killed = 0
    with concurrent.futures.ThreadPoolExecutor(_WORKERS.value) as pool:
        for mutant, (outcome, seconds) in zip(chosen, pool.map(run, chosen), strict=True):
            killed += outcome == "killed"
            change = f"`{mutant.old}` to `{mutant.new}`".replace("\n", " ").replace("|", "\\|")
            print(f"| {mutant.file} | {change} | {outcome} | {seconds:.0f} |", flush=True)
    print(json.dumps({"mutants": len(chosen), "killed": killed}))
    if killed < _REQUIRED * len(chosen):
        raise SystemExit(1)


if __name__ == "__main__":
    app.run(main)
