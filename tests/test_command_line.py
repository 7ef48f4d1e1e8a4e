"""The command line: its numbers are dp_accounting's, its statements the model's, its errors one line."""

import re
import sys

import dp_accounting
import pytest
from scipy import stats

import tf_dpbn
from tests import helpers, programs
from tf_dpbn import __main__, accounting
from tf_dpbn._keras import keras

N, B, STEPS, DELTA = 10_000, 100, 300, 1e-5
SIZES = [f"--num_examples={N}", f"--expected_batch_size={B}", f"--delta={DELTA}"]
PLAN = [*SIZES, f"--steps={STEPS}", "--noise_multiplier=1.0"]
LEDGER = accounting.Ledger(
    [
        accounting.StepRecord(sampling_probability=q, noise_multipliers=(4.0,), steps=60, sampling="poisson")
        for q in (0.01, 0.02)
    ]
)


@pytest.fixture
def printed(capsys):
    def run(*arguments):
        __main__.main(arguments)
        return capsys.readouterr().out

    return run


def peer_epsilon(accountant, sigma, rows):
    """dp_accounting's, at the delta that truncation leaves."""
    event = dp_accounting.PoissonSampledDpEvent(B / N, dp_accounting.GaussianDpEvent(sigma))
    peer = {"rdp": dp_accounting.rdp.RdpAccountant, "pld": dp_accounting.pld.PLDAccountant}[accountant]()
    return peer.compose(event, STEPS).get_epsilon(DELTA - STEPS * stats.binom.sf(rows - 1, N, B / N))


# 10,001 rows are never too few; truncation to 160 costs half of delta.
@pytest.mark.parametrize("accountant, rows", [("rdp", 10_001), ("pld", 10_001), ("rdp", 160)])
def test_epsilon_is_that_of_dp_accounting(accountant, rows, printed):
    epsilon = float(printed("epsilon", *PLAN, f"--accountant={accountant}", f"--max_batch_size={rows}"))
    exact = peer_epsilon(accountant, 1.0, rows)
    assert exact <= epsilon < exact + 1.1e-4  # rounded up to four decimals


@pytest.mark.parametrize("rows", [10_001, 160])
def test_noise_is_the_least_that_dp_accounting_lets_pass(rows, printed):
    sigma = float(printed("noise", *SIZES, f"--steps={STEPS}", "--target_epsilon=1", f"--max_batch_size={rows}"))
    assert peer_epsilon("rdp", sigma, rows) <= 1.0 < peer_epsilon("rdp", sigma * (1 - 1e-4), rows)


def test_truncation_weighs_in_the_case_above():
    assert peer_epsilon("rdp", 1.0, 160) > peer_epsilon("rdp", 1.0, 10_001) + 2e-3


def test_plan_says_noise_steps_rows_and_epsilon(printed):
    plan = tf_dpbn.PrivacyPlan(
        target_epsilon=3.0, delta=DELTA, num_examples=N, expected_batch_size=B, epochs=2, accountant="rdp"
    )
    text = printed("plan", *SIZES, "--epochs=2", "--target_epsilon=3")
    assert f"Noise multiplier {plan.noise_multiplier!r} in each of {plan.steps} steps" in text
    assert f"more than {plan.max_batch_size} are truncated" in text
    assert "Epsilon 3.0000 at delta 1e-05, by RDP" in text


def test_suggest_prints_what_the_library_suggests(printed):
    text = printed("suggest", "--num_examples=200", "--target_epsilon=1", "--network=deep", "--delta=1e-3")
    assert text.rstrip() == str(accounting.suggest(200, 1.0, network="deep", delta=1e-3))
    assert "network 'shallow'" in printed("suggest", "--num_examples=200", "--target_epsilon=1")


@pytest.mark.both
@pytest.mark.parametrize("training_rows", [False, True])
def test_statement_of_a_file_is_that_of_its_model(training_rows, tmp_path, printed):
    inputs = keras.Input((3,))
    model = tf_dpbn.DPModel(inputs, keras.layers.Dense(2)(tf_dpbn.DPBatchNormalization()(inputs)))
    optimizer = helpers.dp_optimizer(noise_multiplier=2.0, num_examples=100)
    helpers.compiled(model, "mse", optimizer, stub=True)
    model.set_public_batch(tf_dpbn.public_data.uniform_noise((3,), 6, seed=0), may_contain_training_rows=training_rows)
    helpers.spend(model, 4)
    paths = [str(tmp_path / name) for name in ("m.keras", "m.weights.h5")]
    model.save(paths[0])
    model.save_weights(paths[1])
    for path in paths:
        assert accounting.read_training(path).ledger == model.ledger and model.ledger.steps == 4
        assert printed("statement", f"--file={path}", "--delta=1e-3").rstrip() == model.privacy_statement(1e-3).rstrip()


def test_statement_of_a_ledger_is_that_of_its_steps(tmp_path, printed):
    path = tmp_path / "ledger.json"
    path.write_text(LEDGER.to_json())
    expected = accounting.privacy_statement(LEDGER, delta=DELTA, accountant="pld")
    assert printed("statement", f"--file={path}", f"--delta={DELTA}", "--accountant=pld") == expected


def test_ledger_files_are_read_whole(tmp_path, printed):
    path = tmp_path / "run.ledger"
    for run in ("a", "b"):
        file = accounting.LedgerFile(path, run)
        file.open()
        file.close(LEDGER)
    both = accounting.Ledger([*LEDGER.entries, *LEDGER.entries])
    assert accounting.read_training(path).ledger == both
    path.write_bytes(path.read_bytes().replace(b"steps", b"spets", 1))
    with pytest.raises(ValueError, match="line 2, or one before it, was changed"):
        accounting.read_training(path)


def test_plot_shows_epsilon_after_the_steps_of_a_ledger_and_of_a_plan(tmp_path, printed, monkeypatch):
    axes, curves = pytest.importorskip("matplotlib.axes"), []
    draw = axes.Axes.plot
    monkeypatch.setattr(
        axes.Axes, "plot", lambda self, *data: (curves.append(list(zip(*data, strict=True))), draw(self, *data))
    )
    path, output = tmp_path / "ledger.json", tmp_path / "epsilon.png"
    path.write_text(LEDGER.to_json())
    assert "after 120 steps" in printed("plot", f"--file={path}", f"--delta={DELTA}", f"--output={output}")
    assert output.read_bytes().startswith(b"\x89PNG")
    printed("plot", *PLAN, f"--output={output}")
    of_ledger, of_plan = map(dict, curves)
    first, second = LEDGER.entries
    assert of_ledger[0] == of_plan[0] == 0.0 and max(of_plan) == STEPS
    assert of_ledger[60] == accounting.Ledger([first]).epsilon(DELTA) < of_ledger[120] == LEDGER.epsilon(DELTA)
    assert of_plan[STEPS] == pytest.approx(float(printed("epsilon", *PLAN)), abs=1e-4)
    assert (
        (len(of_plan), len(of_ledger)) == (51, 101)
        and {1, 61} < set(of_ledger)
        and sorted(of_plan.values()) == list(of_plan.values())
    )


def test_without_a_command_it_says_what_there_is_and_with_help_which_flags(printed):
    assert {"epsilon", "noise", "plan", "suggest", "statement", "plot", "tensorflow"} <= set(printed().split())
    assert "--delta" in printed("noise", "--help") and f"tf_dpbn {tf_dpbn.__version__}" in printed("--version")


REFUSED = {
    "command": (["budget"], "no such command"),
    "flag": (["plan", *PLAN, "--batch=3"], "Unknown command line flag 'batch'"),
    "number": (["plan", *PLAN, "--delta=small"], "flag --delta=small"),
    "missing": (["noise", *SIZES, "--steps=3"], "--target_epsilon must have a value"),
    "value": (["epsilon", *PLAN, "--delta=2"], "`delta` must lie strictly between 0 and 1"),
    "accountant": (["epsilon", *PLAN, "--accountant=gdp"], "`accountant` must be one of 'rdp', 'pld'"),
    "network": (
        ["suggest", "--num_examples=9", "--target_epsilon=1", "--network=big"],
        "`network` must be one of 'features'",
    ),
    "both": (["plan", *PLAN, "--target_epsilon=1"], "Give exactly one of"),
    "argument": (["statement", "m.keras", "--file=m.keras", "--delta=1e-5"], "takes flags only"),
    "no file": (["statement", "--file=none.keras", "--delta=1e-5"], "Reading it failed: .*none.keras"),
    "not HDF5": (["statement", f"--file={__file__}.h5", "--delta=1e-5"], "be a saved DPModel"),
    "not JSON": (["statement", f"--file={__file__}", "--delta=1e-5"], "JSON of a Ledger"),
    "plan and file": (["plot", *PLAN, "--file=m.keras"], "not both"),
}


def refusal(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        __main__.main(arguments)
    assert stop.value.code == 2
    output, error = capsys.readouterr()
    assert not output and error.count("\n") == 1
    return error


@pytest.mark.parametrize("arguments, message", REFUSED.values(), ids=REFUSED)
def test_errors_are_one_line_and_exit_status_2(arguments, message, capsys):
    assert re.search(message, refusal(arguments, capsys))


@pytest.mark.both
def test_files_of_stock_models_are_refused(tmp_path, capsys):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    for name in ("m.keras", "m.weights.h5"):
        model.save(tmp_path / name) if name.endswith(".keras") else model.save_weights(tmp_path / name)
        assert "be a saved DPModel" in refusal(["statement", f"--file={tmp_path / name}", "--delta=1e-5"], capsys)


def test_a_missing_matplotlib_is_named_with_its_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'tf_dpbn[plot]'" in refusal(["plot", *PLAN], capsys)


def test_accounting_and_statements_run_without_tensorflow(tmp_path):
    path = tmp_path / "ledger.json"
    path.write_text(LEDGER.to_json())
    statement = ["statement", f"--file={path}", "--delta=1e-5"]
    program = f"""
import runpy, sys
noise = {[flag for flag in PLAN if "noise" not in flag]} + ["--target_epsilon=3"]
for arguments in (["epsilon", *{PLAN}], ["noise", *noise], ["plan", *noise], {statement}):
    sys.argv[1:] = arguments
    runpy.run_module("tf_dpbn", run_name="__main__")
assert not {{"tensorflow", "keras", "tf_keras"}} & set(sys.modules)
"""
    text = programs.output("-c", program)
    assert "by RDP accounting" in text and "after 120 steps" in text
