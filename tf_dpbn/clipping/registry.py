"""The clipping engines by name, as `DPModel.compile(engine=...)` takes them."""

from __future__ import annotations

from tf_dpbn import _validate
from tf_dpbn.clipping import Engine
from tf_dpbn.clipping.vectorized import PerExampleEngine

ENGINES = ("vectorized", "loop")


def get_engine(name: str, microbatch_size: int | None = None) -> Engine:
    """Returns the engine called `name`.

    Args:
      name: "vectorized" (per-example gradients, vectorized over a microbatch) or "loop" (one example after the other).
      microbatch_size: bounds the memory of per-example gradients; None chooses.

    Raises:
      ValueError: for an unknown name or a bad microbatch size.
    """
    _validate.one_of("engine", name, ENGINES)
    return PerExampleEngine(microbatch_size, vectorize=name == "vectorized")
