"""Four workers that average weights with their neighbours only."""

import decentralized_program
import multi_worker_launcher
import numpy as np
import pytest

N = decentralized_program.N
# Groups of two, groups that differ in size, cycles, entries, and answers.
QUICK = (
    *("one peer", "cliques", "directed", "choco"),
    "cross gradients of cliques",
)


@pytest.fixture(
    scope="module",
    params=["quick", pytest.param("all", marks=pytest.mark.slow)],
)
def workers(request, tmp_path_factory):
    """What each of four workers found, in few or in all of the cases."""
    cases = {"quick": QUICK, "all": decentralized_program.CASES}[request.param]
    return multi_worker_launcher.run_workers(
        decentralized_program.__file__,
        num_workers=N,
        directory=tmp_path_factory.mktemp("decentralized"),
        timeout=500,
        args=[*cases],
    )


def of_all(workers, *names):
    """`[steps, N, J]` from what each worker has of itself, `[steps, 1, J]`."""
    found = []
    for result in workers:
        for name in names:
            result = result[name]
        found.append(result)
    return np.concatenate(found, axis=1)


def test_workers_are_replicas_of_one_process(workers, mirrored):
    assert {*workers[0]["cases"]} >= {*QUICK}
    for case in workers[0]["cases"]:
        kwargs = decentralized_program.CASES[case]
        expected = decentralized_program.train(mirrored(N), **kwargs)
        actual = of_all(workers, "cases", case)
        np.testing.assert_allclose(
            actual, expected, rtol=1e-5, atol=1e-5, err_msg=case
        )
        # The replicas have weights of their own.
        assert np.abs(actual - actual[:, :1]).max() > 1e-2, case


def test_workers_average_gradients_of_64_bits(workers, mirrored):
    kwargs = decentralized_program.CASES["clique gradients"]
    expected = decentralized_program.train(
        mirrored(N), dtype="float64", **kwargs
    )
    actual = of_all(workers, "float64")
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


def test_a_worker_with_a_bad_gradient_goes_on_exchanging(workers, mirrored):
    g = decentralized_program.gradients(is_bad=True)
    g[1, 2] = 0
    expected = decentralized_program.train(mirrored(N), g)
    actual = of_all(workers, "bad gradient")
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_idle_workers_in_a_loop_of_one_function(workers):
    """Seven turns of a ring of three, and one replica alone."""
    before, after = (
        np.concatenate([result["loop"][i] for result in workers])
        for i in range(2)
    )
    assert np.abs(before[1] - before[0]).min() > 9
    np.testing.assert_allclose(after, before[[2, 0, 1, 3]], atol=1e-5)


def test_fit_ends_with_the_average_on_all_workers(workers):
    first, *others = (result["fit"] for result in workers)
    assert first["history"]["consensus_distance"][-1] > 1e-2
    losses = first["history"]["average_loss"]
    assert losses[1] < losses[0]
    for other in others:
        np.testing.assert_array_equal(other["weights"], first["weights"])
        for name in ("consensus_distance", "average_loss"):
            np.testing.assert_allclose(
                other["history"][name], first["history"][name], rtol=1e-6
            )


def test_weights_travel_to_the_next_worker(workers):
    for rank, result in enumerate(workers):
        away, home = 10.0 * ((rank - 1) % N), 10.0 * rank
        assert result["travel"] == [[away] * 3, [home] * 3] * 3


def test_workers_agree_on_the_period(workers):
    first, *others = (result["fit"]["history"] for result in workers)
    for name in ("accuracy_loss", "communication_period"):
        assert len(first[name]) == 2
        assert all(other[name] == first[name] for other in others)
    assert abs(first["accuracy_loss"][0]) > 1e-3


def test_errors(workers):
    for result in workers:
        assert "must be used in a `tf.function` on" in result["eager"]
        assert "the same `topology`" in result["build_differently"]


def test_the_watchdog_sees_each_exchange(workers):
    for result in workers:
        assert result["watched"] == decentralized_program.NUM_STEPS


def test_waiting_for_a_lost_worker_ends(workers):
    """Also where it is no neighbour in the first step."""
    *others, lost = (result["lost"] for result in workers)
    assert lost is None
    for message in others:
        assert "has not taken part in a collective for 3 s" in message
