"""Runs an example as a program of its own."""

import json

import fork_server
import paths
import run_with_mock_data


def output_of(name, *args):
    """What an example prints that runs to its end."""
    result = fork_server.run_one(paths.EXAMPLES / f"{name}.py", args)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def run_example(name, output_dir, num_mock_images=None, **flags):
    """Runs an example that writes results to its end.

    Args:
        name: Name of the script.
        output_dir: Where its results go.
        num_mock_images: How many images tensorflow-datasets is to make up, if
            any.
        **flags: The script's flags.

    Returns:
        `(summary, output)`: what it has written and printed.
    """
    script = paths.EXAMPLES / f"{name}.py"
    args = [f"--output_dir={output_dir}"]
    args += [f"--{flag}={value}" for flag, value in flags.items()]
    if num_mock_images is not None:
        args = [num_mock_images, script, *args]
        script = run_with_mock_data.__file__
    result = fork_server.run_one(script, args)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (output_dir / "curves.png").stat().st_size > 1000
    summary = json.loads((output_dir / "summary.json").read_text("utf-8"))
    return summary, result.stdout


def refusal_of(name, flag):
    """What an example says to a flag it refuses."""
    result = fork_server.run_one(paths.EXAMPLES / f"{name}.py", [flag])
    assert result.returncode != 0
    return result.stdout + result.stderr
