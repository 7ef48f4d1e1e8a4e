"""The clipping engines by name, as `DPModel.compile(engine=...)` takes them."""

from __future__ import annotations

from tf_dpbn import _validate
from tf_dpbn.clipping import Engine
from tf_dpbn.clipping.book_keeping import BookKeepingEngine
from tf_dpbn.clipping.vectorized import PerExampleEngine

ENGINES = ("book_keeping", "vectorized", "loop")


def get_engine(name: str, microbatch_size: int | None = None, norm_method: str = "auto") -> Engine:
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
