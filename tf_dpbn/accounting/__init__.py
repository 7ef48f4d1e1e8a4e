"""Privacy accounting: noise multipliers, sampling rate, steps in; (epsilon, delta) out. Needs no TensorFlow.

Looking back: `StepRecord`, `Ledger`, `LedgerFile`, `read_training`, `privacy_statement` (what ran). Looking ahead:
`PrivacyPlan`, `calibrate_noise_multiplier`, `max_steps`, `default_max_batch_size`, and `suggest` (settings to start
from). A "multiplier" is standard deviation / L2 sensitivity. Adjacency is add-or-remove one example, or one user with
all of theirs; the number of examples or users and the expected batch size are public.
"""

from tf_dpbn.accounting.events import (
    default_max_batch_size,
    effective_noise_multiplier,
    split_noise_multiplier,
    tail_delta,
    truncation_probability,
)
from tf_dpbn.accounting.files import SavedTraining, read_training
from tf_dpbn.accounting.ledger import Ledger, StepRecord, dp_sgd_event
from tf_dpbn.accounting.ledger_file import LedgerFile
from tf_dpbn.accounting.planning import PrivacyPlan, PrivacyWarning, calibrate_noise_multiplier, max_steps
from tf_dpbn.accounting.statement import TensorFlowPrivacyEpsilons, privacy_statement, tensorflow_privacy_epsilons
from tf_dpbn.accounting.suggestion import Suggestion, suggest

__all__ = [
    "Ledger",
    "LedgerFile",
    "PrivacyPlan",
    "PrivacyWarning",
    "SavedTraining",
    "StepRecord",
    "Suggestion",
    "TensorFlowPrivacyEpsilons",
    "calibrate_noise_multiplier",
    "default_max_batch_size",
    "dp_sgd_event",
    "effective_noise_multiplier",
    "max_steps",
    "privacy_statement",
    "read_training",
    "split_noise_multiplier",
    "suggest",
    "tail_delta",
    "tensorflow_privacy_epsilons",
    "truncation_probability",
]
