"""Saved state as arrays and as bytes."""

import numpy as np
import pytest
import saved_states

from tf_regtopk.saving import saved_state


def test_state_round_trip():
    saved = saved_states.state([0, 2])
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


def test_accumulated_round_trip():
    assert not any(
        "accumulated" in n
        for n in saved_state.to_arrays(saved_states.state([0]))
    )
    saved = saved_states.accumulated_state([0, 2], num_devices=2)
    back, _ = saved_state.from_bytes(saved_state.to_bytes(saved))
    np.testing.assert_equal(back.accumulated, saved.accumulated)
    arrays = saved_state.to_arrays(saved)
    arrays["replica_2_device_1_accumulated_0"] = np.zeros(2, "float32")
    with pytest.raises(ValueError, match="another checksum"):
        saved_state.from_arrays(arrays)


@pytest.mark.parametrize(
    "name", ["replica_2_part_1", "shared_part_0", "1", "replica_state"]
)
def test_state_with_a_missing_or_changed_array(name):
    arrays = saved_state.to_arrays(
        saved_states.state([0, 2]), [np.ones(3), np.ones(2)]
    )
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
