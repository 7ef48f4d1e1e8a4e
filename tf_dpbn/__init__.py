"""tf_dpbn: batch normalization under differential privacy, for TensorFlow and Keras.

The map, in the order data flows:

- `sampling`: Poisson batches of fixed shape; `PrivacyPlan` with data sets.
- `features`: scattering coefficients and whitening, in front of a private network.
- `augmentation`: augmented copies of examples, averaged before clipping.
- `normalization`: `DPBatchNormalization`; `public_data`: synthetic public batches for its statistics.
- `clipping`: per-example gradients, with the gradient through the statistics, clipped and summed.
- `mechanisms`: the privacy boundary, where noise is added.
- `constraints`: weight standardization.
- `optimizers`: Keras optimizers behind that boundary.
- `model`: `DPModel` and `DPSequential`, whose train step puts it together.
- `conversion`: `validate` a model, `convert` it to a `DPModel`, and `to_stock` back.
- `pretraining`: of a stock network on synthetic images, without privacy, before any of this.
- `accounting`: from noise multipliers, sampling rate and steps to epsilon, without TensorFlow.
- `callbacks`: epsilon in the logs, a plot of a run, and a stop before the budget is exceeded.
- `interop`: the layer in stock models that optimizers of tensorflow-privacy train.
- `auditing`: lower bounds on epsilon by attack, to hold against the claim.

TensorFlow is imported when a name that needs it is first used, so that `accounting` is quick. The classes that files
name are registered once Keras is imported, before or after this package.
"""

import importlib
from typing import TYPE_CHECKING, Any

from tf_dpbn import _registration
from tf_dpbn.accounting import Ledger, PrivacyWarning
from tf_dpbn.version import __version__

if TYPE_CHECKING:
    from tf_dpbn import (
        accounting,
        auditing,
        augmentation,
        callbacks,
        clipping,
        constraints,
        conversion,
        features,
        interop,
        mechanisms,
        model,
        normalization,
        optimizers,
        pretraining,
        public_data,
        sampling,
    )
    from tf_dpbn.clipping import AdaptiveClip, AutomaticClip
    from tf_dpbn.conversion import convert, to_stock, validate
    from tf_dpbn.model import DPModel, DPSequential
    from tf_dpbn.normalization import DPBatchNormalization
    from tf_dpbn.optimizers import DPOptimizer
    from tf_dpbn.sampling import PrivacyPlan

# The module of each name; imported, TensorFlow with it, when it is first asked for, so that accounting is quick.
_MODULE_OF = {
    "AdaptiveClip": "clipping",
    "AutomaticClip": "clipping",
    "DPBatchNormalization": "normalization",
    "DPModel": "model",
    "DPOptimizer": "optimizers",
    "DPSequential": "model",
    "PrivacyPlan": "sampling",
    "convert": "conversion",
    "to_stock": "conversion",
    "validate": "conversion",
}

__all__ = [
    "AdaptiveClip",
    "AutomaticClip",
    "DPBatchNormalization",
    "DPModel",
    "DPOptimizer",
    "DPSequential",
    "Ledger",
    "PrivacyPlan",
    "PrivacyWarning",
    "__version__",
    "accounting",
    "auditing",
    "augmentation",
    "callbacks",
    "clipping",
    "constraints",
    "conversion",
    "convert",
    "features",
    "interop",
    "mechanisms",
    "model",
    "normalization",
    "optimizers",
    "pretraining",
    "public_data",
    "sampling",
    "to_stock",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'tf_dpbn' has no attribute {name!r}")
    module = importlib.import_module(f"tf_dpbn.{_MODULE_OF.get(name, name)}")
    return getattr(module, name) if name in _MODULE_OF else module


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_registration.follow_keras()
