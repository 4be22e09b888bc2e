"""Saved state: arrays, several workers, another number of replicas."""

import numpy as np
import pytest

from tf_regtopk.saving import saved_state


def state(replicas, num_replicas=3, step=1):
    return saved_state.SavedState(
        {"scope": "global"},
        {"step": step},
        num_replicas,
        {n: [np.full(2, n, "float32"), np.arange(3)] for n in replicas},
        [np.arange(4.0)],
    )


def test_state_round_trip():
    saved = state([0, 2])
    arrays = saved_state.to_arrays(saved, [np.ones(3), np.float32(2)])
    back, variables = saved_state.from_arrays(arrays)
    assert back[:3] == saved[:3] and list(back.replicas) == [0, 2]
    for n in (0, 2):
        for a, b in zip(back.replicas[n], saved.replicas[n], strict=True):
            np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(back.shared, saved.shared)
    np.testing.assert_array_equal(variables[0], np.ones(3))
    assert variables[1] == 2
    back, variables = saved_state.from_bytes(saved_state.to_bytes(saved, [7]))
    assert back[:3] == saved[:3] and variables == [7]


def accumulated_state(replicas, num_devices=1):
    """Each device of the replica n has n + 1."""
    saved = state(replicas)
    return saved._replace(
        moment={**saved.moment, "accumulated": [1, 4]},
        accumulated={
            n: [[np.full(2, n + 1, "float32")]] * num_devices for n in replicas
        },
    )


def test_accumulated_round_trip():
    assert not any(
        "accumulated" in n for n in saved_state.to_arrays(state([0]))
    )
    saved = accumulated_state([0, 2], num_devices=2)
    back, _ = saved_state.from_bytes(saved_state.to_bytes(saved))
    np.testing.assert_equal(back.accumulated, saved.accumulated)
    arrays = saved_state.to_arrays(saved)
    arrays["replica_2_device_1_accumulated_0"] = np.zeros(2, "float32")
    with pytest.raises(ValueError, match="another checksum"):
        saved_state.from_arrays(arrays)


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
    saved = saved_state.combine(
        accumulated_state([0], 2),
        [accumulated_state([2], 2), accumulated_state([1], 2)],
    )
    ranks = [0, 2] if num_replicas == 3 else [0, 1]
    zeros = np.zeros(2, "float32")
    loaded = saved_state.accumulated_of_replicas(
        saved, ranks, num_replicas, [[zeros]] * num_devices
    )
    assert [[part[0] for [part] in devices] for devices in loaded] == expected
    with pytest.raises(ValueError, match="must be of the shapes"):
        saved_state.accumulated_of_replicas(saved, [0], 3, [[np.zeros(3)]])


@pytest.mark.parametrize(
    "name", ["replica_2_part_1", "shared_part_0", "1", "replica_state"]
)
def test_state_with_a_missing_or_changed_array(name):
    arrays = saved_state.to_arrays(state([0, 2]), [np.ones(3), np.ones(2)])
    changed = arrays | {name: arrays[name].copy()}
    if name == "replica_state":
        # Still JSON, with another number of replicas.
        text = changed[name].tobytes().replace(b'as": 3', b'as": 4')
        changed[name] = np.frombuffer(text, np.uint8)
    changed[name] = changed[name] + (name != "replica_state")
    assert not np.array_equal(changed[name], arrays[name])
    del arrays[name]
    for bad in (arrays, changed):
        with pytest.raises(ValueError, match="must (be|have been)"):
            saved_state.from_arrays(bad)


@pytest.mark.filterwarnings("ignore:Saved by 2")
@pytest.mark.parametrize("num_replicas", [1, 2])
def test_what_is_shared_was_with_each_replica_in_format_1(num_replicas):
    saved = state([0, 1], num_replicas=2)
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
        saved_state.state_of_replicas(
            s, range(num_replicas), num_replicas, *initial
        )
        for s in (saved, read)
    ]
    np.testing.assert_equal(*loaded)
    assert [part.shape for part in loaded[0][0]] == [(2,), (4,), (3,)]


def test_combining_workers():
    other_step = state([0, 1, 2], step=2)
    combined = saved_state.combine(state([1]), [other_step, state([2, 0])])
    assert combined.moment == {"step": 1} and set(combined.replicas) == {
        0,
        1,
        2,
    }
    with pytest.raises(ValueError, match=r"at step 1.*replicas \[0\]"):
        saved_state.combine(state([1]), [other_step, state([2])])


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
    saved = state(saved_replicas)
    assert saved_state.needs_others(saved, replicas, num_replicas) == expected


@pytest.mark.parametrize("num_replicas", [1, 2, 4, 7])
def test_total_is_spread_evenly(num_replicas):
    rng = np.random.default_rng(num_replicas)
    errors = rng.standard_normal((3, 50)).astype("float32")
    errors[:, 0] = [3e38, 3e38, -3e38]  # The sum of two is too large.
    saved = state([])._replace(
        replicas={n: [e] for n, e in enumerate(errors)}, shared=[]
    )
    with pytest.warns(UserWarning, match="spread evenly") as caught:
        parts = saved_state.state_of_replicas(
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
