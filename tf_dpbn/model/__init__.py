"""DPModel and DPSequential: Keras models whose train step is differentially private."""

from tf_dpbn.model.dp_model import DPFunctional, DPModel, DPSequential

__all__ = ["DPFunctional", "DPModel", "DPSequential"]
