"""The self-test: whether the library works on a machine."""
