"""Batch normalization whose statistics never come from private examples un-noised, and the gradient through them.

- `moments`: the mathematics of batch statistics, on tensors.
- `layer`: DPBatchNormalization, and the scopes that say which statistics a pass uses.
- `local_terms`: the gradient through the statistics into the kernel layer before (docs/algorithm.md, section 3a).
- `public_pass`: the public forward pass of a train step, what is released of it, and section 3b.
"""

from tf_dpbn.normalization.layer import (
    STATISTICS_MODES,
    DPBatchNormalization,
    GivenStatistics,
    NormalizationCall,
    Normalized,
    PublicPass,
    StatisticsRelease,
    StatisticsScope,
    current_scope,
    side_by_side,
)
from tf_dpbn.normalization.local_terms import with_local_terms
from tf_dpbn.normalization.moments import LocalTerm
from tf_dpbn.normalization.public_pass import (
    CORRECTIONS,
    PublicForward,
    ReleasedMeans,
    assign_moving_statistics,
    create_averages,
    refresh_moving_statistics,
)

__all__ = [
    "CORRECTIONS",
    "STATISTICS_MODES",
    "DPBatchNormalization",
    "GivenStatistics",
    "LocalTerm",
    "NormalizationCall",
    "Normalized",
    "PublicForward",
    "PublicPass",
    "ReleasedMeans",
    "StatisticsRelease",
    "StatisticsScope",
    "assign_moving_statistics",
    "create_averages",
    "current_scope",
    "refresh_moving_statistics",
    "side_by_side",
    "with_local_terms",
]
