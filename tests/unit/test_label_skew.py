"""Cliques whose data is like that of all, from labels or other proxies."""

import itertools

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


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_groups", [4, 6, 7])
def test_clumps_are_like_all_data(seed, num_groups):
    """Of shares of labels: the mixture of each group is near that of all."""
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.full(10, 0.1), size=30)
    clumps, random = (
        label_skew.clump(shares, num_groups, num_steps=steps, seed=seed)
        for steps in (300, 0)
    )
    for groups in (clumps, random):
        assert sorted(itertools.chain(*groups)) == [*range(30)]
        sizes = {len(group) for group in groups}
        assert sizes <= {30 // num_groups, -(-30 // num_groups)}

    def total_variation(groups):
        return sum(label_skew.skew(shares, group) for group in groups) / 2

    assert total_variation(clumps) < 0.7 * total_variation(random)
    tf_regtopk.Cliques(clumps).rounds(30)


def test_clumps_of_features():
    """Of two kinds of data each group has both, though numbers differ."""
    rng = np.random.default_rng(0)
    kind = rng.permutation(np.repeat([-1.0, 1.0], 8))
    features = kind[:, np.newaxis] * [3, -2, 1]
    features += 0.1 * rng.standard_normal(features.shape) + 100
    for group in label_skew.clump(features, 4):
        assert kind[group].sum() == 0
    random = label_skew.clump(features, 4, num_steps=0)
    assert any(kind[group].sum() for group in random)


def test_clumps_of_one_and_of_all():
    assert label_skew.clump([[1.0], [-2.0]], 2) == [[0], [1]]
    assert label_skew.clump([[1.0], [-2.0]], 1) == [[0, 1]]


@pytest.mark.parametrize(
    "histograms, received",
    [
        ([1, 2], r"the shape \(2,\)"),
        ([[]], r"the shape \(1, 0\)"),
        ([[1, 2], [3]], r"histograms=\[\[1, 2\], \[3\]\]"),
        ("abc", "histograms='abc'"),
        ([[1, 2], [1, -1]], r"negative numbers of the replicas \[1\]"),
        ([[0, 0], [1, 1], [0, 0]], r"no samples of the replicas \[0, 2\]"),
        ([[np.nan, 1]], r"NaN or infinity of the replicas \[0\]"),
        ([[1, 1], [np.inf, 1]], r"NaN or infinity of the replicas \[1\]"),
    ],
)
def test_bad_histograms(histograms, received):
    message = f"`histograms` must be an array.*Received: {received}"
    with pytest.raises(ValueError, match=message):
        label_skew.greedy_cliques(histograms, 1)
    with pytest.raises(ValueError, match=message):
        label_skew.skew(histograms, [0])


@pytest.mark.parametrize(
    "proxies, received",
    [
        ([1.0, 2.0], r"the shape \(2,\)"),
        ([[1.0], [np.nan]], r"NaN or infinity of the replicas \[1\]"),
    ],
)
def test_bad_proxies(proxies, received):
    message = f"`proxies` must be an array.*Received: {received}"
    with pytest.raises(ValueError, match=message):
        label_skew.clump(proxies, 1)


@pytest.mark.parametrize("clique", [[], [0, 0], [2], [-1], [0.5], 1])
def test_bad_cliques(clique):
    with pytest.raises(ValueError, match="different ranks from 0 to 1"):
        label_skew.skew([[1, 2], [3, 4]], clique)


def test_bad_numbers():
    with pytest.raises(ValueError, match="`clique_size` must be an integer"):
        label_skew.greedy_cliques([[1]], 0)
    with pytest.raises(TypeError, match="`num_steps` must be an integer"):
        label_skew.greedy_cliques([[1]], 1, num_steps=1.5)
    with pytest.raises(ValueError, match="`num_groups` must be an integer"):
        label_skew.clump([[1.0]], 0)
    with pytest.raises(ValueError, match="at most the number of replicas, 1"):
        label_skew.clump([[1.0]], 2)
