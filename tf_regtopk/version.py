"""The version, in a module of its own so that `setup.py` can read it alone."""

__version__ = "0.2.0"
