"""The self-test: checks that the library works on a machine."""
