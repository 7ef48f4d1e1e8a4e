"""Installs tf_dpbn: DP-SGD for Keras networks with BatchNormalization."""

import pathlib
import re

import setuptools

_ROOT = pathlib.Path(__file__).parent


def _version() -> str:
    # Read, not imported: importing the package needs TensorFlow.
    text = (_ROOT / "tf_dpbn" / "version.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE).group(1)


# "Source", "Documentation" and "Issues" are set on publishing: CONTRIBUTING.md has the list.
_URLS = {"Paper": "https://arxiv.org/abs/2006.10919"}
_LEGACY = ["tf_keras>=2.18"]
_PLOT = ["matplotlib>=3.7"]
# What Keras' `export` makes and what runs it, beside SavedModel.
_EXPORT = ["ai-edge-litert>=2.0", "onnxruntime>=1.20", "openvino>=2025.0", "tf2onnx>=1.16"]
_EXAMPLES = [*_PLOT, "mlxtend>=0.23"]
# tensorflow-datasets imports importlib_resources without asking for it (4.9.10).
_DATASETS = ["importlib_resources", "tensorflow-datasets>=4.9.4"]
# tensorflow-privacy pins numpy 1, packaging 22, absl-py 1 and dp-accounting 0.4.3, so it must be resolved together with
# everything else, in one run of pip, and not with what others get. It has no release for Python 3.12 and later.
_TENSORFLOW_PRIVACY = ['tensorflow-privacy==0.9.0; python_version < "3.12"', *_LEGACY]
_DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.6", "mkdocstrings[python]>=0.30"]
_TESTS = [
    *_DOCS,
    "build>=1.2",
    "hypothesis>=6.100",
    "mypy>=1.10",
    "pytest>=8.0",
    "pytest-xdist>=3.5",
    "ruff>=0.17,<0.18",
    "tensorboard>=2.18",
]

setuptools.setup(
    name="tf_dpbn",
    version=_version(),
    description="Differentially private training of Keras networks with BatchNormalization",
    long_description=(_ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The tf_dpbn authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    project_urls=_URLS,
    keywords="differential privacy, DP-SGD, batch normalization, Keras, TensorFlow, machine learning",
    packages=setuptools.find_packages(include=["tf_dpbn", "tf_dpbn.*"]),
    package_data={"tf_dpbn": ["py.typed"]},
    python_requires=">=3.10",
    entry_points={"console_scripts": ["tf_dpbn = tf_dpbn.__main__:main"]},
    install_requires=[
        "absl-py>=1.0",
        "dp-accounting>=0.4.3",
        "h5py>=3.10",
        "numpy>=1.26",
        "scipy>=1.10",
        "tensorflow>=2.18",
    ],
    extras_require={
        "legacy": _LEGACY,
        "export": _EXPORT,
        "plot": _PLOT,
        "notebook": [*_EXAMPLES, "ipykernel>=6.29", "nbclient>=0.10"],
        # examples/multi_worker.py runs on tf_keras.
        "examples": [*_EXAMPLES, *_LEGACY, *_DATASETS],
        "tensorflow-privacy": _TENSORFLOW_PRIVACY,
        "bench": _EXAMPLES,
        # TFDS' data sources read array_record's files.
        "test": [*_TESTS, *_EXAMPLES, *_LEGACY, *_DATASETS, "array_record", *_EXPORT],
        "test-tensorflow-privacy": [*_TESTS, *_EXAMPLES, *_TENSORFLOW_PRIVACY],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Security",
        "Typing :: Typed",
    ],
)
