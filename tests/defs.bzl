"""The rule of a test file."""

load("@rules_python//python:defs.bzl", "py_test")

def regtopk_test(name):
    """A file of tests, run by pytest, with everything that a test may need."""
    py_test(
        name = name,
        srcs = [
            name + ".py",
            "support/run_pytest.py",
        ],
        args = ["$(location {}.py)".format(name)],
        data = ["//:repository"],
        main = "support/run_pytest.py",
        deps = [":support"],
    )
