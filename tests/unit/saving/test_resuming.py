"""Resuming with the files of several workers, and other replicas."""

import numpy as np
import pytest
import saved_states

from tf_regtopk.saving import resuming
from tf_regtopk.saving import saved_state


@pytest.mark.parametrize(
    "num_replicas, num_devices, expected",
    [
        (3, 2, [[1, 1], [3, 3]]),  # To each its own.
        (3, 1, [[2], [6]]),  # To each the total of its devices.
        (3, 4, [[0.5] * 4, [1.5] * 4]),
        (2, 3, [[2, 2, 2], [2, 2, 2]]),  # Of 12 in all.
    ],
)
def test_accumulated_of_other_devices(num_replicas, num_devices, expected):
    saved = resuming.combine(
        saved_states.accumulated_state([0], 2),
        [
            saved_states.accumulated_state([2], 2),
            saved_states.accumulated_state([1], 2),
        ],
    )
    ranks = [0, 2] if num_replicas == 3 else [0, 1]
    zeros = np.zeros(2, "float32")
    loaded = resuming.accumulated_of_replicas(
        saved, ranks, num_replicas, [[zeros]] * num_devices
    )
    assert [[part[0] for [part] in devices] for devices in loaded] == expected
    with pytest.raises(ValueError, match="must be of the shapes"):
        resuming.accumulated_of_replicas(saved, [0], 3, [[np.zeros(3)]])


@pytest.mark.filterwarnings("ignore:Saved by 2")
@pytest.mark.parametrize("num_replicas", [1, 2])
def test_what_is_shared_was_with_each_replica_in_format_1(num_replicas):
    saved = saved_states.state([0, 1], num_replicas=2)
    of_format_1 = saved._replace(
        replicas={
            n: [local, *saved.shared, memory]
            for n, (local, memory) in saved.replicas.items()
        },
        shared=None,
    )
    read, _ = saved_state.from_arrays(saved_state.to_arrays(of_format_1))
    assert read.shared is None
    initial = [np.zeros(2)], [np.zeros(4)], [np.zeros(3)]
    loaded = [
        resuming.state_of_replicas(
            s, range(num_replicas), num_replicas, *initial
        )
        for s in (saved, read)
    ]
    np.testing.assert_equal(*loaded)
    assert [part.shape for part in loaded[0][0]] == [(2,), (4,), (3,)]


def test_combining_workers():
    other_step = saved_states.state([0, 1, 2], step=2)
    combined = resuming.combine(
        saved_states.state([1]), [other_step, saved_states.state([2, 0])]
    )
    assert combined.moment == {"step": 1} and set(combined.replicas) == {
        0,
        1,
        2,
    }
    with pytest.raises(ValueError, match=r"at step 1.*replicas \[0\]"):
        resuming.combine(
            saved_states.state([1]), [other_step, saved_states.state([2])]
        )


@pytest.mark.parametrize(
    "saved_replicas, replicas, num_replicas, expected",
    [
        # As many replicas as before: those of this process are enough.
        ([0, 1], [0, 1], 3, False),
        ([0, 1], [1], 3, False),
        ([0, 1], [1, 2], 3, True),
        # Another number: all of them are needed.
        ([0, 1, 2], [0], 2, False),
        ([0, 1], [0], 2, True),
        ([], [0, 1, 2, 3], 4, True),
    ],
)
def test_needs_others(saved_replicas, replicas, num_replicas, expected):
    saved = saved_states.state(saved_replicas)
    assert resuming.needs_others(saved, replicas, num_replicas) == expected


@pytest.mark.parametrize("num_replicas", [1, 2, 4, 7])
def test_total_is_spread_evenly(num_replicas):
    rng = np.random.default_rng(num_replicas)
    errors = rng.standard_normal((3, 50)).astype("float32")
    errors[:, 0] = [3e38, 3e38, -3e38]  # The sum of two is too large.
    saved = saved_states.state([])._replace(
        replicas={n: [e] for n, e in enumerate(errors)}, shared=[]
    )
    with pytest.warns(UserWarning, match="spread evenly") as caught:
        parts = resuming.state_of_replicas(
            saved,
            range(num_replicas),
            num_replicas,
            [np.zeros(50)],
            [],
            ["fresh"],
        )
    assert len(caught) == 1
    assert all(memory == "fresh" for _, memory in parts)
    total = np.sum([error for error, _ in parts], axis=0, dtype="float64")
    expected = errors.astype("float64").sum(axis=0)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert parts[0][0].dtype == np.float32
