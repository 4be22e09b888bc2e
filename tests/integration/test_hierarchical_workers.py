"""Two workers of two devices each, whose gradients are summed first."""

import exchange_program
import multi_worker_launcher
import numpy as np
import pytest

from tf_regtopk.steps import auto_exchange


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """What each of two workers found, and whether they were alone."""
    return multi_worker_launcher.run_workers_alone(
        exchange_program.__file__,
        num_workers=2,
        directory=tmp_path_factory.mktemp("exchange"),
        timeout=300,
    )


@pytest.mark.parametrize("feedback", exchange_program.FEEDBACK)
def test_hierarchical_workers_are_replicas_of_summed_gradients(
    feedback, workers, mirrored
):
    results, _ = workers
    assert [r["num_replicas"] for r in results] == [4, 4]
    g = exchange_program.gradients(4)
    summed = g.reshape(len(g), 2, 2, -1).sum(axis=2)
    expected, _ = exchange_program.train(mirrored(2), summed, feedback)
    for result in results:
        actual = result["hierarchical"][feedback]
        np.testing.assert_allclose(
            actual["weights"], expected, rtol=1e-5, atol=1e-5
        )


def test_hierarchical_workers_accumulate(workers):
    """The same batches twice, as one: sums within a worker are as few."""
    results, _ = workers
    for result in results:
        actual = result["hierarchical"]["accumulated"]
        expected = result["hierarchical"]["accumulate"]["weights"]
        np.testing.assert_allclose(actual[1::2], expected, rtol=1e-6)


def test_a_hierarchical_state_is_saved_once_a_worker(workers):
    results, _ = workers
    for i, result in enumerate(results):
        actual = result["hierarchical"]
        assert actual["shift"]["num_replicas"] == 2
        assert actual["shift"]["replicas"] == [i]
        assert actual["shift, resumed"] == actual["shift"]


def test_without_it_every_device_is_a_replica(workers, mirrored):
    results, _ = workers
    expected, _ = exchange_program.train(
        mirrored(4), exchange_program.gradients(4)
    )
    for result in results:
        np.testing.assert_allclose(
            result["flat"], expected, rtol=1e-5, atol=1e-5
        )


def test_bytes_between_workers(workers):
    """A worker sends its payload once, and not once for each device."""
    results, is_alone = workers
    if not is_alone:
        pytest.skip("Needs a network of its own, by `unshare --net`.")
    counted = results[0]["bytes"]
    hierarchical, reported = counted["hierarchical"]
    assert 1 <= hierarchical / reported < 1.1
    # Flat, each of four devices sends its payload to the two of the other.
    assert 3.6 < counted["flat"][0] / hierarchical < 4.1


def test_waiting_for_others_costs_no_threads(workers):
    """Of 30 steps of 4 replicas."""
    results, _ = workers
    for result in results:
        assert result["new_threads"] < 10


def test_collectives_of_a_device_have_one_order(workers):
    """Or NCCL, which starts them one after the other, could block for ever."""
    results, _ = workers
    for result in results:
        # The worker's replicas, those of the first and the second place, all.
        assert result["order"]["groups"] == 4
        first, second = result["order"]["sequences"]
        assert first == second and len(first) > 4
        assert not result["order"]["unordered"]


def test_initial_state_is_not_sent(workers):
    """Each worker starts with its own, which here is its number."""
    results, _ = workers
    assert [r["initial"] for r in results] == [[0, 0], [1, 1]]


def test_workers_choose_alike(workers):
    results, _ = workers
    kind, seconds = results[0]["auto"]
    assert results[1]["auto"] == [kind, seconds]
    assert kind == auto_exchange.choose(seconds)
