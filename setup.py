"""Installs `tf_regtopk`; the version is read without importing TensorFlow."""

import pathlib
import re
import runpy

import setuptools

root = pathlib.Path(__file__).parent
version = runpy.run_path(str(root / "tf_regtopk" / "version.py"))["__version__"]

# Links to other files of the repository lead nowhere outside of it, so that
# only their texts stay.
readme = re.sub(
    r"!?\[([^\]]*)\]\((?!https?:)[^)]*\)",
    r"\1",
    (root / "README.md").read_text(encoding="utf-8"),
)

# TensorFlow comes in several distributions of the same modules: the user names
# one of the first three extras, or brings an installation.
tensorflow = ">=2.18"
examples = [
    "importlib_resources",  # tensorflow-datasets needs it and does not ask.
    "matplotlib>=3.8",
    "scikit-learn>=1.4",
    "tensorflow-datasets>=4.9.7",
    "tqdm>=4.66",
]
# They build the site of the documentation; 25 MB to download.
docs = [
    "mkdocs>=1.6",
    "mkdocs-material>=9.6",
    "mkdocstrings[python]>=1",
]

setuptools.setup(
    name="tf_regtopk",
    version=version,
    description="Keras training that sends only the gradient entries worth "
    "sending: RegTop-k sparsification under tf.distribute",
    long_description=readme,
    long_description_content_type="text/markdown",
    author="The tf_regtopk authors",
    project_urls={"Paper": "https://arxiv.org/abs/2501.05633"},
    keywords="distributed training, gradient compression, sparsification, "
    "top-k, Keras, TensorFlow",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=setuptools.find_packages(include=["tf_regtopk", "tf_regtopk.*"]),
    package_data={"tf_regtopk": ["py.typed"]},
    python_requires=">=3.11",
    install_requires=[
        "absl-py>=2.1",
        "h5py",  # In the version that TensorFlow and Keras choose.
        "keras>=3.10,<4",
        "numpy>=1.26",
    ],
    extras_require={
        "tensorflow": [f"tensorflow{tensorflow}"],
        "tensorflow-cpu": [f"tensorflow-cpu{tensorflow}"],
        "and-cuda": [f"tensorflow[and-cuda]{tensorflow}"],
        "docs": docs,
        "examples": examples,
        "mutation": ["cosmic-ray>=8.7"],
        "test": [
            *docs,
            *examples,
            "build>=1.2",
            "hypothesis>=6.100",
            "mypy>=1.11",
            "pytest>=8",
            "pytest-xdist>=3.7",
            "pyyaml>=6",
            "ruff==0.17.*",
            "setuptools>=77",
        ],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: System :: Distributed Computing",
        "Typing :: Typed",
    ],
)
