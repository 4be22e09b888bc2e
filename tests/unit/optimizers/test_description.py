"""What `repr` says of an optimizer and of its parts."""

import keras
import numpy as np
import tensorflow as tf

import tf_regtopk


def sgd():
    return keras.optimizers.SGD(0.1)


def test_an_optimizer_says_what_it_is(mirrored):
    strategy = mirrored(2)
    with strategy.scope():
        variable = keras.Variable(np.zeros(20_000, "float32"))
        optimizer = tf_regtopk.SparsifiedOptimizer(
            sgd(), tf_regtopk.RegTopK(0.001), accumulation_steps=2
        )
        assert repr(optimizer) == (
            "<SparsifiedOptimizer SGD(0.1), RegTopK 0.1 %, Accumulate, float32 "
            "auto, sparse AllGather, 2 batches a step, not built>"
        )
        optimizer.build([variable])
    optimizer.iterations.assign(120)
    expected = (
        "<SparsifiedOptimizer SGD(0.1), RegTopK 0.1 %, Accumulate, float32 "
        "EliasFano, sparse AllGather, 2 batches a step, step 120>"
    )
    assert repr(optimizer) == expected
    texts = []
    strategy.run(lambda: texts.append(repr(optimizer)))  # In replicas.
    assert texts == [expected] * 2


def test_no_variable_is_read_in_a_graph():
    optimizer = tf_regtopk.SparsifiedOptimizer(
        sgd(),
        tf_regtopk.TopK(),
        codec=tf_regtopk.Codec("bitmap", tf_regtopk.Uniform(2)),
        error_feedback=tf_regtopk.EF21(),
        topology=tf_regtopk.Hierarchical(),
    )
    optimizer.build([keras.Variable(np.zeros(2000, "float32"))])
    texts = []

    @tf.function
    def trace():
        texts.append(repr(optimizer))

    graph = trace.get_concrete_function().graph
    assert texts == [
        "<SparsifiedOptimizer SGD, TopK 50 %, EF21, Uniform bitmap, sparse "
        "Hierarchical>"
    ]
    assert not graph.get_operations()


def test_a_dense_exchange_and_other_inner_optimizers():
    def text(inner, **arguments):
        return repr(tf_regtopk.SparsifiedOptimizer(inner, **arguments))

    schedule = keras.optimizers.schedules.ExponentialDecay(0.5, 10, 0.9)
    assert text(keras.optimizers.Adam(schedule), exchange="dense") == (
        "<SparsifiedOptimizer Adam(0.5), dense exchange, not built>"
    )
    assert "RegTopK, Accumulate, float32 auto, auto AllGather" in text(
        sgd(), exchange="auto"
    )


def test_parts_say_how_to_make_them():
    for part in (
        tf_regtopk.RegTopK(0.5),
        tf_regtopk.TopK(),
        tf_regtopk.Dense(),
        tf_regtopk.Accumulate(momentum=0.5),
        tf_regtopk.EF21(),
        tf_regtopk.LearnedShift(),
        tf_regtopk.Codec("golomb", tf_regtopk.Uniform(2)),
        tf_regtopk.AllGather(),
        tf_regtopk.Hierarchical(),
    ):
        assert eval(repr(part), vars(tf_regtopk)) == part
