"""Clipping engines: from private examples to a `ClippedSum`.

The contract, which every engine satisfies and tests/conformance checks:

- It computes, for each example i, the vector of corrected gradients L_i' = dL_i/dtheta + local terms, a function of
  example i, the weights, and the released or public statistics alone.
- It scales the whole vector (all variables together) to an L2 norm of at most `l2_norm_clip`, or by a rule
  (`clip_norms`) to at most its bound; examples that are padding or whose vector is non-finite contribute exactly zero.
- It returns the sum as a `ClippedSum` whose sensitivity under adding or removing one example is `l2_norm_clip`.
- It does the same with each residual of statistics that an example yields (docs/algorithm.md, section 5), each with a
  bound of its own, and, if the clip norm is adaptive, with the count of examples that it does not scale.
"""

from __future__ import annotations

from tf_dpbn import _validate
from tf_dpbn.clipping.book_keeping import BookKeepingEngine
from tf_dpbn.clipping.clip_norms import AdaptiveClip, AutomaticClip, ClipAt, count_release
from tf_dpbn.clipping.microbatches import MicrobatchedEngine
from tf_dpbn.clipping.per_example import PerExampleEngine
from tf_dpbn.clipping.rules.base import NORM_METHODS
from tf_dpbn.clipping.task import Batch, BatchPass, BatchResult, ExampleResult, MaskedPredictions, Task

__all__ = [
    "ENGINES",
    "NORM_METHODS",
    "AdaptiveClip",
    "AutomaticClip",
    "Batch",
    "BatchPass",
    "BatchResult",
    "ClipAt",
    "ExampleResult",
    "MaskedPredictions",
    "Task",
    "count_release",
    "get_engine",
]

ENGINES = ("book_keeping", "vectorized", "loop")


def get_engine(name: str, microbatch_size: int | None = None, norm_method: str = "auto") -> MicrobatchedEngine:
    """Returns the engine called `name`.

    Args:
      name: "book_keeping" (the fast one), "vectorized" (per-example gradients, vectorized over a microbatch) or "loop"
        (one example after the other). All give the same result.
      microbatch_size: bounds the memory that examples take at a time; None chooses.
      norm_method: for "book_keeping", see `BookKeepingEngine`.

    Raises:
      ValueError: for an unknown name, a bad microbatch size or an unknown norm method.
    """
    _validate.one_of("engine", name, ENGINES)
    if name == "book_keeping":
        return BookKeepingEngine(microbatch_size, norm_method)
    return PerExampleEngine(microbatch_size, vectorize=name == "vectorized")
