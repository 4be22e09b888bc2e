"""The reduce-scatter of entries among real workers."""

import exchange_program
import multi_worker_launcher
import numpy as np
import owners_by_worker_program
import pytest
import reduce_scatter_program

from tf_regtopk.steps import auto_exchange

# Two workers that gather, of two replicas each, are counted in
# `test_hierarchical_workers.py`.
BOTH = ("reduce_scatter", "all_gather")


@pytest.fixture(
    scope="module",
    params=[
        # The self-test, which a test runs, has two of them.
        pytest.param((3, "reduce_scatter"), marks=pytest.mark.slow),
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


def check_choices(results):
    """Raises unless all workers have measured and chosen the same."""
    kind, seconds = results[0]["auto"]
    assert [*seconds] == ["sparse", "all_gather", "dense"]
    assert kind == auto_exchange.choose(seconds)
    for result in results:
        assert result["auto"] == [kind, seconds]


def test_workers_choose_alike(workers):
    results, _ = workers
    check_choices(results)


def check_bytes(counted, reported, messages):
    """As reported, and some 530 bytes that gRPC and TCP add to a message."""
    # Workers end a step at different times, so that up to one of the 20 is in
    # part not counted.
    assert 0.97 * reported < counted < reported + 700 * messages


def test_bytes(workers):
    """As reported; however many workers there are, no more than 2.5 k."""
    results, is_alone = workers
    if not is_alone:
        pytest.skip("Needs a network of its own, by `unshare --net`.")
    n = len(results)
    messages = n * (n - 1)
    counted, reported = results[0]["bytes"]["reduce_scatter"]
    check_bytes(counted, reported, 2 * messages)
    gathered, expected = results[0]["bytes"]["all_gather"]
    if gathered is not None:
        check_bytes(gathered, expected, messages)
    # Each sends `1.5 k + k` entries of which 1 in N stays, or k entries N - 1
    # times. Fillers and headers take some more.
    assert 0.95 < reported / expected / (2.5 / n) < 1.1


@pytest.fixture(
    scope="module",
    params=["workers", pytest.param("devices", marks=pytest.mark.slow)],
)
def of_two_devices(request, tmp_path_factory):
    """Who owns entries, what each of two workers found, and if alone."""
    results, is_alone = multi_worker_launcher.run_workers_alone(
        owners_by_worker_program.__file__,
        num_workers=2,
        directory=tmp_path_factory.mktemp("owners_by_worker"),
        timeout=500,
        args=[request.param],
    )
    return request.param, results, is_alone


def summed_within(g):
    """The gradients of two workers, of those of two replicas each."""
    return g.reshape(len(g), 2, 2, -1).sum(axis=2)


def test_all_devices_agree_and_nothing_is_lost(of_two_devices):
    _, results, _ = of_two_devices
    weights = results[0]["weights"]
    for result in results:
        assert result["weights"] == weights
        for replica in result["replicas"]:
            assert replica == weights[-1]
    errors = np.sum([result["residual"] for result in results], axis=0)
    total = exchange_program.gradients(4).sum(axis=(0, 1))
    np.testing.assert_allclose(
        errors - np.array(weights[-1]), total, rtol=1e-5, atol=1e-5
    )
    # A part of the gradients was applied, and another one was not.
    assert np.abs(errors).max() > 0.1 < np.abs(weights[-1]).max()


def test_owners_are_replicas_of_one_process(of_two_devices, mirrored):
    """Where workers are the owners, replicas of summed gradients."""
    owners, results, _ = of_two_devices
    g, n = exchange_program.gradients(4), 4
    if owners == "workers":
        g, n = summed_within(g), 2
    expected, _ = exchange_program.train(
        mirrored(n),
        g,
        topology=owners_by_worker_program.TOPOLOGIES["devices"],
        codec=reduce_scatter_program.CODEC,
    )
    for i, result in enumerate(results):
        np.testing.assert_allclose(
            result["weights"], expected, rtol=1e-5, atol=1e-5
        )
        assert result["num_participants"] == n
        own = n // 2
        assert result["own"] == [*range(i * own, (i + 1) * own)]


def only_if_workers_own(of_two_devices):
    owners, results, is_alone = of_two_devices
    if owners != "workers":
        pytest.skip("The program does this with workers as owners only.")
    return results, is_alone


def test_workers_that_own_entries_resume(of_two_devices, mirrored):
    """And learn a shift at the rate of what was accepted."""
    results, _ = only_if_workers_own(of_two_devices)
    expected, _ = exchange_program.train(
        mirrored(2),
        summed_within(exchange_program.gradients(4)),
        "shift",
        topology=owners_by_worker_program.TOPOLOGIES["devices"],
        codec=reduce_scatter_program.CODEC,
    )
    for result in results:
        np.testing.assert_allclose(
            result["shift, resumed"], expected, rtol=1e-5, atol=1e-5
        )


def test_bytes_of_workers_that_own_entries(of_two_devices):
    """A worker sends an owner's entries once, not once for each device."""
    results, is_alone = only_if_workers_own(of_two_devices)
    if not is_alone:
        pytest.skip("Needs a network of its own, by `unshare --net`.")
    counted, reported = results[0]["bytes"]
    assert 1 <= counted / reported < 1.1


def test_collectives_of_workers_that_own_entries_have_one_order(of_two_devices):
    """Or NCCL, which starts them one after the other, could block for ever."""
    results, _ = only_if_workers_own(of_two_devices)
    for result in results:
        # The worker's replicas, those of the first and the second place, all.
        assert result["order"]["groups"] == 4
        first, second = result["order"]["sequences"]
        assert first == second and len(first) > 6
        assert not result["order"]["unordered"]


@pytest.mark.slow
def test_workers_that_may_own_entries_choose_alike(tmp_path):
    results = multi_worker_launcher.run_workers(
        owners_by_worker_program.__file__,
        num_workers=2,
        directory=tmp_path,
        timeout=300,
        args=["auto"],
    )
    check_choices(results)
