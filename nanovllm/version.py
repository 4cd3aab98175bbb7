"""The version of this source tree, whether it is installed or not. `pyproject.toml` has the same: a test compares them."""

__version__ = "0.1.0"
