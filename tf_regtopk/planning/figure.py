"""The picture of a step's time over bandwidth and over workers."""

import dataclasses
from typing import Any

import numpy as np

from tf_regtopk.planning import cost_model
from tf_regtopk.planning import crossover
from tf_regtopk.planning import job as job_lib
from tf_regtopk.planning import network as network_lib

# Methods look alike in both panels, and without colours.
_STYLES = {
    "dense": ("black", "-"),
    "dense by worker": ("tab:gray", "--"),
    "coded": ("tab:blue", "-"),
    "natural": ("tab:orange", "--"),
    "sparse": ("tab:green", ":"),
    "hierarchical": ("tab:red", "-."),
    "owners": ("tab:purple", (0, (5, 1))),
    "owners by worker": ("tab:brown", (0, (1, 1))),
}


def save(path: str, job: job_lib.Job, network: network_lib.Network) -> None:
    """Draws the seconds of a step by each method, and saves the picture.

    The left panel varies the bandwidth (inside the host, for one worker), the
    right panel the number of workers (of devices, for one worker).

    Args:
        path: Name of the file, such as `"advise.png"`.
        job: `job_lib.Job`.
        network: `network.Network`.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "`--plot` needs matplotlib. Install it by `pip install "
            "matplotlib`, or leave the flag out."
        ) from error

    matplotlib.use("Agg")  # Writes files; needs no display.
    from matplotlib import pyplot as plt

    is_one = job.workers == 1
    name = "local_bandwidth" if is_one else "bandwidth"
    now = getattr(network, name)
    rates = np.geomspace(min(12.5e6, now), max(125e9, now), 97)
    figure, axes = plt.subplots(
        1, 2, figsize=(9, 3.6), sharey=True, layout="constrained"
    )
    _draw(
        axes[0],
        8 * rates / 1e9,
        [(job, dataclasses.replace(network, **{name: r})) for r in rates],
        8 * now / 1e9,
    )
    axes[0].set_xlabel(
        "Gbit/s " + ("between devices" if is_one else "of a link")
    )
    axes[0].set_ylabel("predicted seconds of a step")
    num_members = job_lib.members(job).workers
    last = max(64 if is_one else 1024, num_members)
    numbers = np.unique(np.geomspace(2, last, 97).round().astype(int))
    _draw(
        axes[1],
        numbers,
        [(crossover.with_members(job, int(n)), network) for n in numbers],
        num_members,
    )
    axes[1].set_xlabel("devices" if is_one else "workers")
    # Methods that a panel lacks have no line there.
    lines = {
        line.get_label(): line
        for panel in axes
        for line in panel.get_legend_handles_labels()[0]
    }
    axes[1].legend(handles=list(lines.values()))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw(
    axes: Any,
    xs: np.ndarray[Any, Any],
    cases: list[tuple[job_lib.Job, network_lib.Network]],
    now: float,
) -> None:
    predictions = [cost_model.predict(*case) for case in cases]
    # A method may need a number of workers.
    for name in dict.fromkeys(name for p in predictions for name in p):
        color, style = _STYLES[name]
        seconds = [
            p[name].step_seconds if name in p else np.nan for p in predictions
        ]
        axes.loglog(xs, seconds, linestyle=style, color=color, label=name)
    axes.axvline(now, color="tab:gray", linewidth=0.8, label="as given")
    axes.grid(alpha=0.3)
