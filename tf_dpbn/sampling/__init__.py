"""Poisson sampling: draws of examples, and padded datasets of them."""

from tf_dpbn.sampling.dataset import (
    PoissonSource,
    PrivacyPlan,
    apply_class_weight,
    poisson_dataset,
    real_example_mask,
    source_behind,
    source_of,
)
from tf_dpbn.sampling.draws import PoissonSampling, SharedDraws, digest_of, poisson_indices
from tf_dpbn.sampling.tfrecords import TFRecords, index_tfrecords

__all__ = [
    "PoissonSampling",
    "PoissonSource",
    "PrivacyPlan",
    "SharedDraws",
    "TFRecords",
    "apply_class_weight",
    "digest_of",
    "index_tfrecords",
    "poisson_dataset",
    "poisson_indices",
    "real_example_mask",
    "source_behind",
    "source_of",
]
