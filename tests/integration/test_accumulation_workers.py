"""`accumulation_steps` of two worker processes: what they send, and get."""

import accumulation_program
import multi_worker_launcher
import numpy as np
import pytest

M = accumulation_program.NUM_BATCHES


def run(directory, *args):
    """What each of two workers found, and whether they were alone."""
    return multi_worker_launcher.run_workers_alone(
        accumulation_program.__file__,
        num_workers=2,
        directory=directory,
        timeout=300,
        args=args,
    )


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    return run(tmp_path_factory.mktemp("accumulation"))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What they found, where bytes can be counted."""
    results, is_alone = run(tmp_path_factory.mktemp("bytes"), "bytes")
    if not is_alone:
        pytest.skip("Needs a network of its own, by `unshare --net`.")
    return results


@pytest.mark.parametrize("way", accumulation_program.WAYS)
def test_workers_take_steps_as_with_a_larger_batch(way, workers, mirrored):
    means = accumulation_program.gradients(2).mean(axis=1)
    expected = accumulation_program.train(
        mirrored(2), means, **accumulation_program.WAYS[way]
    )
    results, _ = workers
    for result in results:
        np.testing.assert_allclose(
            result["weights"][way], expected, rtol=1e-6, atol=1e-6
        )


@pytest.mark.slow  # On a busy machine acknowledgements come late.
def test_batches_between_exchanges_send_nothing(results):
    """A heartbeat, or TCP's acknowledgement of the exchange, may come between.

    A payload is far longer.
    """
    of_batches = np.reshape(results[0]["loop"], [-1, M])
    medians = np.median(of_batches, axis=0)
    assert max(medians[:-1]) < 120 and medians[-1] > 500


@pytest.mark.slow
def test_fit_sends_only_its_logs_between_exchanges(results):
    """As much as without any optimizer, and far less than plain Keras."""
    of_batches, num_exchanges, _ = results[0]["fit"]
    assert num_exchanges == (len(of_batches) + M) / M
    between = np.reshape(of_batches, [-1, M])
    # The batches counted begin behind the first exchange.
    assert np.median(between[:, -1]) > 10 * np.median(between[:, :-1])
    logs = np.median(results[0]["silent"][0])
    np.testing.assert_allclose(np.median(between[:, :-1]), logs, rtol=0.1)
    assert np.median(results[0]["plain"][0]) > 100 * logs


def test_several_steps_per_execution(workers):
    """Collectives in a function that a loop calls, of this and of Keras."""
    for result in workers[0]:
        *_, num_exchanges, weights = result["several_steps"]
        assert num_exchanges == result["fit"][1]
        np.testing.assert_array_equal(weights, result["fit"][2])
