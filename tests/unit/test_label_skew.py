"""Cliques whose data is like that of all, from histograms of labels."""

import numpy as np
import pytest

import tf_regtopk
from tf_regtopk import label_skew


def of_one_label(num_labels, num_of_each):
    """Replicas that have a single label each."""
    return np.repeat(100 * np.eye(num_labels, dtype=int), num_of_each, axis=0)


def test_replicas_of_one_label_make_cliques_of_all_labels():
    """The mean gradient of each clique then is that of all data."""
    histograms = of_one_label(10, 4)
    cliques = label_skew.greedy_cliques(histograms, clique_size=10)
    for clique in cliques:
        np.testing.assert_array_equal(histograms[clique].sum(axis=0), 100)
        assert label_skew.skew(histograms, clique) == 0
    topology = tf_regtopk.Cliques(cliques, average_gradients=True)
    assert len(topology.gradient_groups(40)) == 4


@pytest.mark.parametrize("seed", range(3))
def test_greedy_cliques_are_better_than_random_ones(seed):
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.full(10, 0.1), size=30)
    histograms = np.ceil(1000 * shares)

    def skews(num_steps):
        cliques = label_skew.greedy_cliques(
            histograms, 5, num_steps=num_steps, seed=seed
        )
        assert [len(clique) for clique in cliques] == [5] * 6
        assert sorted(np.ravel(cliques)) == [*range(30)]
        return sum(label_skew.skew(histograms, c) for c in cliques)

    assert skews(200) < 0.6 * skews(0)


def test_a_seed_gives_the_same_cliques():
    histograms = np.random.default_rng(0).integers(1, 9, (7, 3))
    first, again, other = (
        label_skew.greedy_cliques(histograms, 3, num_steps=0, seed=seed)
        for seed in (1, 1, 2)
    )
    assert first == again != other
    # The last one is smaller, and goes into a topology as well.
    assert sorted(map(len, first)) == [1, 3, 3]
    tf_regtopk.Cliques(first).rounds(7)


def test_a_single_clique():
    assert label_skew.greedy_cliques([[1, 2], [3, 4]], 4) == [[0, 1]]


@pytest.mark.parametrize(
    "histograms", [[1, 2], [[1, -1]], [[0, 0], [1, 1]], [[np.nan, 1]], [[]]]
)
def test_bad_histograms(histograms):
    with pytest.raises(ValueError, match="`histograms` must be an array"):
        label_skew.greedy_cliques(histograms, 1)


def test_bad_numbers():
    with pytest.raises(ValueError, match="`clique_size` must be an integer"):
        label_skew.greedy_cliques([[1]], 0)
    with pytest.raises(TypeError, match="`num_steps` must be an integer"):
        label_skew.greedy_cliques([[1]], 1, num_steps=1.5)
