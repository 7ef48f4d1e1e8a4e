"""Makes this package's classes known to Keras as soon as both are imported, so that it can load models that have them.

Keras looks classes up by registered names and imports nothing to find them, but after `import tf_dpbn` alone
`keras.models.load_model` must know them. Importing their modules imports TensorFlow, which whoever wants nothing but
`tf_dpbn.accounting` should not wait for. So they are imported at once where TensorFlow is there already, and otherwise
right after it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence

_FRAMEWORKS = ("tensorflow", "keras", "tf_keras")
_MODULES = ("constraints", "features", "normalization", "optimizers", "model")


def follow_keras() -> None:
    """Registers the classes now if TensorFlow is imported, otherwise when it, and what imports it, has been."""
    if not _register():
        sys.meta_path.insert(0, _Finder())


def _is_watched(name: str) -> bool:
    return name in _FRAMEWORKS or name.startswith("tf_dpbn.")


def _register(importing: str | None = None) -> bool:
    """Imports the modules that register classes, unless modules other than `importing` are not ready for that."""
    half = [name for name in list(sys.modules) if _is_watched(name) and name != importing and _is_initializing(name)]
    if half or "tensorflow" not in sys.modules:  # Keras on another backend could not load these classes
        return False
    # Where they cannot be imported, whoever asks for one of them is told why.
    with contextlib.suppress(ImportError):
        for name in _MODULES:
            importlib.import_module(f"tf_dpbn.{name}")
    return True


def _is_initializing(name: str) -> bool:
    return bool(getattr(getattr(sys.modules[name], "__spec__", None), "_initializing", False))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds watched modules where they are, and has classes registered after the import of the outermost one."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(name, path, target) if _is_watched(name) else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: types.ModuleType) -> None:
            execute(module)
            if self in sys.meta_path and _register(name):
                sys.meta_path.remove(self)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
