"""Rebuilds a model layer by layer with some layers replaced, and copies the weights; for `conversion`."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from tf_dpbn import _keras
from tf_dpbn._keras import keras

# What both kinds of batch normalization have, as far as center and scale provide for it.
_SHARED_WEIGHTS = ("gamma", "beta", "moving_mean", "moving_variance")
_REFERENCE = "tf_dpbn_reference"
_NUMBER = re.compile(r"_\d+$")  # by which Keras tells apart the layers that a layer makes for itself
# Methods that a rebuilt model would lose.
_BEHAVIOUR = ("call", "train_step", "test_step", "predict_step", "compute_loss")


class Rebuilder:
    """Makes one new layer for each old one, however often it is used.

    Args:
      replacement: for a batch normalization layer the new one, unbuilt, or None to copy it as it is.
      what: "converted", say; for errors.
    """

    def __init__(self, replacement: Callable[[Any], Any], what: str) -> None:
        self._replacement, self._what = replacement, what
        self._new: dict[int, Any] = {}
        self._pairs: list[tuple[Any, Any]] = []
        self._live: list[Any] = []
        # Stands in the configuration of what holds a layer for that layer, already rebuilt.
        find = classmethod(lambda _, config: self._live[config["index"]])
        self._scope = {_REFERENCE: type(_REFERENCE, (), {"from_config": find})}

    def rebuild(self, model: Any, functional: type, sequential: type) -> Any:
        """A new model of one of the given classes, with the weights and trainable flags of `model`."""
        new = self._model(model, functional, sequential)
        pairs = [(model, new), *(inside for pair in self._pairs for inside in self._inside(*pair))]
        known = {id(old): (old, copy) for old, copy in pairs}
        for layer in [model, *_keras.flatten_layers(model)]:  # parents first: their flags reach into their children
            if id(layer) in known:
                _keras.copy_trainable_flags(known[id(layer)][1], layer)
        for old_layer, new_layer in pairs[1:]:
            self._copy_weights(old_layer, new_layer)
        return new

    def _model(self, old: Any, functional: type, sequential: type) -> Any:
        self._require_graph(old)
        if isinstance(old, keras.Sequential):
            return sequential([*_keras.sequential_input(old), *map(self._layer, old.layers)], name=old.name)
        return functional(*_keras.rebuild_functional(old, self._layer), name=old.name)

    def _require_graph(self, model: Any) -> None:
        name = type(model).__name__
        if not isinstance(model, keras.Sequential) and not _keras.is_functional(model):
            raise TypeError(
                f"Model {model.name!r} is subclassed (class {name}): what its `call` does cannot be {self._what}. "
                "Derive the class from tf_dpbn.DPModel and use tf_dpbn.DPBatchNormalization in it; `export` makes a "
                f"SavedModel of it. Received: model={model!r}"
            )
        own = [m for m in _BEHAVIOUR for c in type(model).__mro__ if m in vars(c) and _is_foreign(c)]
        if own:
            raise TypeError(
                f"Model {model.name!r} is of class {name}, which defines {own[0]!r}, and cannot be {self._what} with "
                f"it. Rebuild it as keras.Model(model.input, model.output) first. Received: model={model!r}"
            )

    def _layer(self, old: Any) -> Any:
        if not isinstance(old, keras.layers.Layer):
            return old  # an operation of Keras 3, which has no state
        if id(old) not in self._new:
            self._new[id(old)] = self._make(old)
            self._pairs.append((old, self._new[id(old)]))
        return self._new[id(old)]

    def _make(self, old: Any) -> Any:
        new = self._replaced(old)
        if new is not None:
            return new
        if isinstance(old, keras.Sequential) or _keras.is_functional(old):
            return self._model(old, keras.Model, keras.Sequential)
        if isinstance(old, keras.Model):
            self._require_graph(old)
        inside = {layer.name: layer for layer in _keras.flatten_layers(old)}
        try:
            new = self._from_live(old, inside)
        except Exception as error:
            raise ValueError(
                f"Layer {old.name!r} (class {type(old).__name__}) cannot be rebuilt from its configuration: {error} "
                f"Give the class `get_config` and `from_config`, and register it with Keras. Received: layer={old!r}"
            ) from error
        self._check_inside(old, new)
        for source, target in self._matched(old, new) or ():
            _copy_vocabulary(source, target)
        return new

    def _from_live(self, old: Any, inside: dict[str, Any]) -> Any:
        """A layer from the configuration of a live one, which gives its functions, and layers inside, by themselves."""
        if isinstance(old, keras.layers.Lambda):
            # Its configuration holds its function's code, without what that refers to.
            functions = {"function": old.function, "output_shape": old._output_shape, "mask": old.mask}
            options = {"name": old.name, "trainable": old.trainable, "dtype": old.dtype_policy}
            return type(old)(**functions, arguments=old.arguments, **options)
        config = _config(old)
        if inside:
            config = self._replace_in_config(config, inside)
        with keras.utils.custom_object_scope(self._scope):
            return type(old).from_config(config)

    def _replaced(self, old: Any) -> Any:
        return self._replacement(old) if isinstance(old, _keras.BatchNormalizationBase) else None

    def _replace_in_config(self, config: Any, inside: dict[str, Any]) -> Any:
        """A configuration with the normalization layers in it replaced, at any depth."""
        if isinstance(config, (list, tuple)):
            return type(config)(self._replace_in_config(each, inside) for each in config)
        if not isinstance(config, dict):
            return config
        inner = config.get("config")
        if "class_name" in config and isinstance(inner, dict):
            layer = inside.get(inner.get("name", ""))
            new = self._replaced(layer)
            if new is not None:
                return keras.saving.serialize_keras_object(new)
            if layer is not None and self._is_by_reference(layer):
                self._live.append(self._make(layer))
                index = {"index": len(self._live) - 1}
                return {"class_name": _REFERENCE, "config": index, "module": None, "registered_name": _REFERENCE}
        return {key: self._replace_in_config(value, inside) for key, value in config.items()}

    def _is_by_reference(self, layer: Any) -> bool:
        """Whether a layer within another's configuration does not come back from it: by functions, or its class."""
        if isinstance(layer, keras.Model):
            return False
        has_functions = any(map(inspect.isfunction, _config(layer).values()))
        return isinstance(layer, keras.layers.Lambda) or _is_foreign(type(layer)) or has_functions

    def _check_inside(self, old: Any, new: Any) -> None:
        """Refuses a layer that makes its own normalization, whatever its configuration says."""
        for layer in _keras.flatten_layers(new):
            if self._replaced(layer) is not None:
                raise ValueError(
                    f"Layer {old.name!r} (class {type(old).__name__}) makes the {type(layer).__name__} {layer.name!r} "
                    f"itself, so that it cannot be {self._what}. Let its constructor take the normalization layer and "
                    f"keep it in `get_config`, or build the model from layers instead. Received: layer={old!r}"
                )

    def _inside(self, old: Any, new: Any) -> list[tuple[Any, Any]]:
        """The pairs of a layer and of what is inside it; those of a nested model are known one by one."""
        if isinstance(old, keras.Model):
            return [(old, new)]
        if old.built and not new.built:
            new.build_from_config(old.get_build_config())
        pairs = self._matched(old, new)
        if pairs is None:
            names = [[layer.name for layer in _keras.flatten_layers(each)] for each in (old, new)]
            raise ValueError(
                f"Layer {old.name!r} (class {type(old).__name__}) is rebuilt from its configuration with other layers "
                "inside. Keep what decides them, and their names, in its `get_config`, or build the model from these "
                f"layers instead. Received: {names[1]} instead of {names[0]}"
            )
        return pairs

    def _matched(self, old: Any, new: Any) -> list[tuple[Any, Any]] | None:
        """The pairs of a layer and of what is inside it, by name; None if others are inside.

        Keras numbers anew what its own layers make for themselves, in the same order.
        """
        ours, theirs = [old, *_keras.flatten_layers(old)], [new, *_keras.flatten_layers(new)]
        names, found = ([layer.name for layer in layers] for layers in (ours, theirs))
        if names != found and len({*names}) == len(names) and {*names} == {*found}:
            theirs.sort(key=lambda layer: names.index(layer.name))
        elif names != found and not _is_foreign(type(old)):
            names, found = ([_NUMBER.sub("", name) for name in each] for each in (names, found))
            if names != found:
                return None
        elif names != found:
            return None
        return list(zip(ours, theirs, strict=True))

    def _copy_weights(self, old: Any, new: Any) -> None:
        if not _keras.own_variables(old) or isinstance(old, keras.Model):
            return
        if isinstance(old, _keras.BatchNormalizationBase) and type(old) is not type(new):
            for name in _SHARED_WEIGHTS:
                if getattr(old, name) is not None:
                    getattr(new, name).assign(getattr(old, name))
            return
        pairs = [(old, new)]
        if hasattr(old, "released_averages"):
            pairs.append((old.released_averages, new.released_averages))
        for source, target in pairs:
            store: dict[str, Any] = {}
            source.save_own_variables(store)
            target.load_own_variables({key: np.asarray(value) for key, value in store.items()})


def _copy_vocabulary(old: Any, new: Any) -> None:
    """Copies what a lookup has learned by `adapt`, or was told since, which is not in its configuration."""
    if not hasattr(old, "lookup_table"):
        return
    words = old.get_vocabulary(include_special_tokens=False)
    if not len(words) or list(words) == list(new.get_vocabulary(include_special_tokens=False)):
        return
    weights = getattr(old, "idf_weights", None) if old.output_mode == "tf_idf" else None
    new.set_vocabulary(words, idf_weights=None if weights is None else np.asarray(weights)[-len(words) :])


def _config(layer: Any) -> dict[str, Any]:
    """A layer's configuration with the user's functions (activations, say) in place of their serialized form."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*lambda.*")  # what is not written to a file need not be safe to load
        config = layer.get_config()
    live = {key: getattr(layer, key, None) for key in config}
    is_own = {key: inspect.isfunction(value) and _is_foreign(value) for key, value in live.items()}
    return {key: live[key] if is_own[key] else value for key, value in config.items()}


def _is_foreign(cls: Any) -> bool:
    """Whether a class or function is neither Keras' nor this package's."""
    return cls.__module__.partition(".")[0] not in ("keras", "tf_keras", "tf_dpbn", "tensorflow", "builtins")
