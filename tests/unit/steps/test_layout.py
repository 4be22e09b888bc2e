"""Layouts, of clusters that there need not be."""

import keras
import numpy as np
import pytest

from tf_regtopk import codecs
from tf_regtopk import error_feedback
from tf_regtopk import selection
from tf_regtopk import sparsifiers
from tf_regtopk.distribute import reduce_scatter
from tf_regtopk.distribute import topology
from tf_regtopk.steps import layout as layout_lib
from tf_regtopk.steps import variable_rules


def make_layout(kind="sparse", *, topology_=None, workers=4, **choices):
    """A layout of a kernel of 20 entries, a bias of 5 and a table of 40."""
    variables = [
        keras.Variable(np.zeros(shape, "float32"), name=name)
        for name, shape in (
            ("kernel", (4, 5)),
            ("bias", (5,)),
            ("table", (10, 4)),
        )
    ]
    default = layout_lib.Choices(
        sparsifiers.RegTopK(0.1),
        codecs.Codec(indices="int32"),
        error_feedback.LearnedShift(),
        "global",
        variable_rules.VariableRules(),
        telemetry=False,
    )
    return layout_lib.Layout(
        kind,
        variables,
        topology.Participants(
            topology_ or topology.AllGather(), topology.Cluster(workers)
        ),
        default._replace(**choices),
    )


def test_variables_of_an_own_density_come_last():
    layout = make_layout(
        rules=variable_rules.VariableRules(
            dense=["bias"], densities={"kernel": 0.5}
        )
    )
    assert layout.buffer.sizes == (40, 20)
    assert layout.order == [1, 0]
    assert layout.sparse_paths() == ["kernel", "table"]
    assert layout.groups_at(0.1) == (
        selection.Group(40, 4),
        selection.Group(20, 10),
    )
    # The other density is that of the rules.
    assert layout.groups_at(0.2)[1] == selection.Group(20, 10)
    assert layout.facts()["variables"] == ["table_0", "kernel_0"]
    assert layout.facts()["dense_variables"] == ["bias_0"]


@pytest.mark.parametrize(
    "rule",
    [error_feedback.LearnedShift(momentum=0.5), error_feedback.EF21(0.5)],
)
def test_state_of_each_kind_of_exchange(rule):
    def sizes(layout):
        return [
            [tensor.shape.num_elements() for tensor in part]
            for part in layout.initial_feedback()
        ]

    sparse = make_layout(error_feedback=rule)
    local, _, dense = sizes(sparse)
    assert set(local) == {65}
    assert not dense
    # Nothing is selected, and all gradients have one momentum.
    local, none, of_dense = sizes(make_layout("dense", error_feedback=rule))
    assert not local and not none
    assert of_dense == [65]
    assert make_layout("dense").initial_memory(0.1) == ()
    assert sparse.initial_memory(0.1)[0].shape == [6]


def test_payload_is_that_of_the_density_and_the_topology():
    layout = make_layout()
    found = layout.payload_codec_at(0.2, codecs.Codec())
    assert (found.k, found.size) == (13, 65)
    assert make_layout("dense").payload_codec_at(0.2, codecs.Codec()) is None
    owners = reduce_scatter.ReduceScatter()
    for kind, is_scattered in (("sparse", True), ("all_gather", False)):
        layout = make_layout(kind, topology_=owners)
        codec = layout.payload_codec_at(0.2, codecs.Codec())
        assert isinstance(codec, codecs.ScatteredCodec) == is_scattered
    # One participant has nobody to send to.
    layout = make_layout(topology_=owners, workers=1)
    codec = layout.payload_codec_at(0.2, codecs.Codec())
    assert not isinstance(codec, codecs.ScatteredCodec)


def test_bytes_follow_the_density():
    layout = make_layout()
    few, many = (layout.wire_report(d).payload_bytes for d in (0.1, 0.2))
    assert many - few == 8 * (13 - 6)


def test_memory_of_another_gradient_is_refused():
    layout = make_layout()
    good = [part.numpy() for part in layout.initial_memory(0.1)]
    layout.check_memory(good)
    bad = [np.full_like(part, 65) for part in good]
    with pytest.raises(ValueError, match="of a gradient of 65 entries"):
        layout.check_memory(bad)
    make_layout("dense").check_memory(bad)


def test_telemetry_is_kept_only_where_it_is_asked_for():
    assert make_layout().initial_measured() == ()
    kept, with_ages = (
        sum(part.shape.num_elements() for part in layout.initial_measured())
        for layout in (
            make_layout(telemetry=True),
            make_layout(telemetry="ages"),
        )
    )
    # An age for each entry.
    assert with_ages >= kept + 65 > 65
    assert make_layout("dense", telemetry=True).initial_measured() == ()
