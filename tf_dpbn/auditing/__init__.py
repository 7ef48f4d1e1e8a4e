"""Audits: how much an attacker really learns, as a lower bound on epsilon to hold against the claimed one.

- `audit_step`: one release of a model, with and without one example, noised many times. White box, two worlds.
- `audit_training`: canaries that coins put into one training run; attacks on its updates (white box) and on the final
  model's losses (black box).
- `membership_inference`: losses of a finished model on members and non-members, as a user would look at them.
- `epsilon_lower_bound`, `two_world_epsilon`, `one_run_audit` and what they rest on: from guesses and scores to bounds.

A lower bound above the claim means a bug. One below it proves nothing by itself: see docs/privacy.md, "How to read an
audit".
"""

from tf_dpbn.auditing.attacks import clipped_sums
from tf_dpbn.auditing.audits import (
    MembershipResult,
    TrainingAudit,
    audit_step,
    audit_training,
    membership_inference,
    per_example_losses,
)
from tf_dpbn.auditing.bounds import (
    AuditResult,
    area_under_curve,
    epsilon_lower_bound,
    gaussian_epsilon,
    one_run_audit,
    one_run_epsilon_lower_bound,
    one_run_p_value,
    true_positive_rate,
    two_world_epsilon,
)

__all__ = [
    "AuditResult",
    "MembershipResult",
    "TrainingAudit",
    "area_under_curve",
    "audit_step",
    "audit_training",
    "clipped_sums",
    "epsilon_lower_bound",
    "gaussian_epsilon",
    "membership_inference",
    "one_run_audit",
    "one_run_epsilon_lower_bound",
    "one_run_p_value",
    "per_example_losses",
    "true_positive_rate",
    "two_world_epsilon",
]
