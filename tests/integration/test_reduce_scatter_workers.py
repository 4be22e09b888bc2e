"""The reduce-scatter of entries among real workers."""

import exchange_program
import multi_worker_launcher
import numpy as np
import pytest
import reduce_scatter_program

# Two workers that gather, of two replicas each, are counted in
# `test_hierarchical_workers.py`.
BOTH = ("reduce_scatter", "all_gather")


@pytest.fixture(
    scope="module",
    params=[
        (3, "reduce_scatter"),
        pytest.param((4, *BOTH), marks=pytest.mark.slow),
        pytest.param((8, *BOTH), marks=pytest.mark.slow),
    ],
    ids=lambda param: str(param[0]),
)
def workers(request, tmp_path_factory):
    """What each worker found, and whether they were alone."""
    num_workers, *counted = request.param
    return multi_worker_launcher.run_workers_alone(
        reduce_scatter_program.__file__,
        num_workers=num_workers,
        directory=tmp_path_factory.mktemp("reduce_scatter"),
        timeout=300,
        args=counted,
    )


def test_workers_are_replicas_of_one_process(workers, mirrored):
    results, _ = workers
    n = len(results)
    expected, _ = exchange_program.train(
        mirrored(n),
        exchange_program.gradients(n),
        "shift",
        topology=reduce_scatter_program.TOPOLOGIES["reduce_scatter"],
        codec=reduce_scatter_program.CODEC,
    )
    for result in results:
        assert result["weights"] == results[0]["weights"]
        np.testing.assert_allclose(
            result["weights"], expected, rtol=1e-5, atol=1e-5
        )


def test_bytes(workers):
    """As reported; however many workers there are, no more than 2.5 k."""
    results, is_alone = workers
    if not is_alone:
        pytest.skip("Needs a network of its own, by `unshare --net`.")
    n = len(results)
    # Workers end a step at different times, so that up to one of the 20 is in
    # part not counted.
    counted, reported = results[0]["bytes"]["reduce_scatter"]
    assert 0.97 < counted / reported < 1.05
    gathered, expected = results[0]["bytes"]["all_gather"]
    if gathered is not None:
        assert 0.97 < gathered / expected < 1.05
    # Each sends `1.5 k + k` entries of which 1 in N stays, or k entries N - 1
    # times. Fillers and headers take some more.
    assert 0.95 < reported / expected / (2.5 / n) < 1.1
