"""The version of the package; setup.py reads it without importing TensorFlow."""

__version__ = "0.1.0"
