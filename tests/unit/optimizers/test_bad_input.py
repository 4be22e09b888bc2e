"""Bad input gets a clear error before any training."""

import gc
import math

import fork_server
import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_regtopk


def sgd():
    return keras.optimizers.SGD(0.1)


@pytest.mark.parametrize("inner", [None, "sgd", keras.optimizers.SGD, 0.1])
def test_inner_optimizer_that_is_not_one(inner):
    with pytest.raises(
        TypeError,
        match="`inner_optimizer` must be a `keras.optimizers.Optimizer`. "
        "Received: inner_optimizer=",
    ):
        tf_regtopk.SparsifiedOptimizer(inner)


def test_inner_optimizer_that_is_wrapped_already():
    with pytest.raises(
        ValueError,
        match="`inner_optimizer` must not be a `SparsifiedOptimizer` itself. "
        "Received: inner_optimizer=",
    ):
        tf_regtopk.SparsifiedOptimizer(tf_regtopk.SparsifiedOptimizer(sgd()))


def test_loss_scale_optimizer_inside():
    with pytest.raises(
        ValueError,
        match="`inner_optimizer` must not be a `LossScaleOptimizer`. Put that "
        "around the wrapper instead. Received: inner_optimizer=",
    ):
        tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.LossScaleOptimizer(sgd())
        )


@pytest.mark.parametrize("sparsifier", ["topk", 0.1, tf_regtopk.TopK])
def test_bad_sparsifier(sparsifier):
    with pytest.raises(TypeError, match="`sparsifier` must be a `Sparsifier`"):
        tf_regtopk.SparsifiedOptimizer(sgd(), sparsifier)


@pytest.mark.parametrize("scope", ["layer", None, 1])
def test_bad_scope(scope):
    with pytest.raises(
        ValueError,
        match='`scope` must be "global" or "per_variable". Received: scope=',
    ):
        tf_regtopk.SparsifiedOptimizer(sgd(), scope=scope)


@pytest.mark.parametrize("dense_below", [-1, 0.5, True, None, math.nan])
def test_bad_dense_below(dense_below):
    with pytest.raises(
        (ValueError, TypeError),
        match="`dense_below` must be an integer >= 0. Received: dense_below=",
    ):
        tf_regtopk.SparsifiedOptimizer(sgd(), dense_below=dense_below)


@pytest.mark.parametrize(
    "argument",
    [
        {"clipnorm": 1.0},
        {"clipvalue": 1.0},
        {"global_clipnorm": 1.0},
        {"weight_decay": 0.1},
        {"use_ema": True},
        {"ema_momentum": 0.9},
        {"ema_overwrite_frequency": 10},
        {"loss_scale_factor": 2.0},
        {"learning_rate": 0.1},
    ],
)
def test_arguments_of_the_base_class(argument):
    ((name, value),) = argument.items()
    with pytest.raises(
        ValueError,
        match=f"`{name}` must be set on the `inner_optimizer`, not on the "
        f"wrapper. Received: {name}={value}",
    ):
        tf_regtopk.SparsifiedOptimizer(sgd(), **argument)


def test_keras_accumulation_is_that_of_the_wrapper():
    with pytest.raises(ValueError, match="must be `accumulation_steps` of the"):
        tf_regtopk.SparsifiedOptimizer(sgd(), gradient_accumulation_steps=2)
    optimizer = tf_regtopk.SparsifiedOptimizer(sgd())
    with pytest.raises(ValueError, match="must be `accumulation_steps` of the"):
        optimizer.gradient_accumulation_steps = 2


@pytest.mark.parametrize("is_built", [False, True])
@pytest.mark.parametrize("has_parts", [False, True])
@pytest.mark.parametrize(
    "wrap, name, value",
    [
        (tf_regtopk.SparsifiedOptimizer, "gradient_accumulation_steps", 2),
        (tf_regtopk.DecentralizedOptimizer, "gradient_accumulation_steps", 2),
        (tf_regtopk.DecentralizedOptimizer, "use_ema", True),
    ],
)
def test_settings_that_an_inner_optimizer_gets_later(
    is_built, has_parts, wrap, name, value
):
    inner = part = sgd()
    if has_parts:
        if not hasattr(keras.optimizers, "MultiOptimizer"):
            pytest.skip("This Keras has no MultiOptimizer.")
        inner = keras.optimizers.MultiOptimizer(
            keras.optimizers.OptimizerMap(part)
        )
    optimizer, variable = wrap(inner), keras.Variable([0.0])
    if is_built:
        optimizer.build([variable])
    setattr(part, name, value)
    with pytest.raises(ValueError, match=f"must have no `{name}`"):
        optimizer.apply([tf.constant([1.0])], [variable])
    setattr(part, name, None)
    optimizer.apply([tf.constant([1.0])], [variable])
    assert optimizer.iterations.numpy() == 1
    assert variable.numpy() != 0


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, None])
def test_bad_accumulation_steps(steps):
    with pytest.raises(
        (ValueError, TypeError),
        match="`accumulation_steps` must be an integer >= 1. Received: "
        "accumulation_steps=",
    ):
        tf_regtopk.SparsifiedOptimizer(sgd(), accumulation_steps=steps)


def test_attributes_of_the_base_class():
    optimizer = tf_regtopk.SparsifiedOptimizer(sgd())
    with pytest.raises(
        ValueError,
        match="`clipnorm` must be set on the `inner_optimizer`, not on the "
        "wrapper. Received: clipnorm=1.0",
    ):
        optimizer.clipnorm = 1.0
    optimizer.learning_rate = 0.5
    assert optimizer.inner_optimizer.learning_rate.numpy() == 0.5


@pytest.mark.parametrize(
    "score, received",
    [
        (lambda a: tf.reduce_sum(a), r"shape=\(\), dtype=float32"),
        (lambda a: a > 0, r"shape=\(4,\), dtype=bool"),
    ],
)
def test_sparsifier_with_bad_scores(score, received):
    class Bad(tf_regtopk.Sparsifier):
        def score(self, a, memory, step):
            return score(a)

    optimizer = tf_regtopk.SparsifiedOptimizer(sgd(), Bad(0.5))
    with pytest.raises(
        ValueError,
        match="`score` of the sparsifier must return a tensor of shape "
        rf"\(4,\) and dtype float32. Received: {received}",
    ):
        optimizer.apply([tf.ones(4)], [keras.Variable(np.zeros(4, "f4"))])


def test_unknown_argument():
    with pytest.raises(TypeError, match="densty"):
        tf_regtopk.SparsifiedOptimizer(sgd(), densty=0.1)


def test_positional_scope():
    with pytest.raises(TypeError):
        tf_regtopk.SparsifiedOptimizer(sgd(), tf_regtopk.TopK(), "global")


@pytest.mark.parametrize("version", ["2.15.0", "3.5.0", "3.9.2"])
def test_an_old_keras_is_refused_with_the_reason(monkeypatch, version):
    monkeypatch.setattr(keras, "__version__", version)
    with pytest.raises(
        ValueError,
        match=r"`keras` must be version 3.10 or newer, because .* wrong losses "
        rf".*Received: keras.__version__='{version}'",
    ):
        tf_regtopk.SparsifiedOptimizer(sgd())


@pytest.mark.parametrize("version", ["3.10.0", "3.16.0.dev2026010103", "4.0"])
def test_newer_versions_of_keras(monkeypatch, version):
    monkeypatch.setattr(keras, "__version__", version)
    tf_regtopk.SparsifiedOptimizer(sgd())


def test_other_backend(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(
        ValueError,
        match="The Keras backend must be TensorFlow .* "
        r"Received: keras.backend.backend\(\)='jax'",
    ):
        tf_regtopk.SparsifiedOptimizer(sgd())


def test_parameter_server_strategy(tmp_path):
    """In a cluster of one worker and one server, all in one process."""
    program = """
import socket
import keras
import tensorflow as tf
import tf_regtopk

sockets = {
    job: socket.create_server(("localhost", 0)) for job in ("worker", "ps")
}
cluster = tf.train.ClusterSpec(
    {job: [f"localhost:{s.getsockname()[1]}"] for job, s in sockets.items()}
)
for job, s in sockets.items():
    s.close()
servers = [tf.distribute.Server(cluster, job_name=job) for job in sockets]
strategy = tf.distribute.ParameterServerStrategy(
    tf.distribute.cluster_resolver.SimpleClusterResolver(
        cluster, rpc_layer="grpc"
    )
)
with strategy.scope():
    tf_regtopk.SparsifiedOptimizer(keras.optimizers.SGD(0.1))
"""
    path = tmp_path / "program.py"
    path.write_text(program, encoding="utf-8")
    result = fork_server.run_one(path, [], timeout=120)
    assert result.returncode != 0
    assert (
        "ValueError: The strategy in scope must be one of OneDeviceStrategy, "
        "MirroredStrategy, MultiWorkerMirroredStrategy, or none. Received: "
        "ParameterServerStrategy" in result.stderr
    )


def compile_and_fit(strategy, optimizer, **arguments):
    with strategy.scope():
        model = keras.Sequential([keras.layers.Dense(1)])
        model.compile(optimizer=optimizer, loss="mse", **arguments)
    model.fit(np.ones((4, 2), "f4"), np.ones((4, 1), "f4"), verbose=0)
    return model


def test_jit_compile_under_a_strategy(mirrored):
    strategy = mirrored(2)
    with strategy.scope():
        optimizer = tf_regtopk.SparsifiedOptimizer(sgd())
    with pytest.raises(
        ValueError, match="`jit_compile` must be False under a strategy"
    ):
        compile_and_fit(strategy, optimizer, jit_compile=True)
    assert optimizer.iterations.numpy() == 0


def test_optimizer_made_outside_the_scope(mirrored):
    optimizer = tf_regtopk.SparsifiedOptimizer(sgd())
    with pytest.raises(ValueError, match="scope"):
        compile_and_fit(mirrored(2), optimizer)


def test_inner_optimizer_made_outside_the_scope(mirrored):
    inner = sgd()
    with mirrored(2).scope(), pytest.raises(ValueError, match="scope"):
        tf_regtopk.SparsifiedOptimizer(inner)


def test_an_inner_optimizer_belongs_to_one_wrapper():
    inner, variable = sgd(), keras.Variable([0.0])
    optimizer = tf_regtopk.SparsifiedOptimizer(inner)
    optimizer.build([variable])
    with pytest.raises(ValueError, match="once only.*which `sparsified"):
        tf_regtopk.DecentralizedOptimizer(inner).build([variable])
    # Until that one has given the optimizer back, or is gone.
    optimizer.release_inner_optimizer()
    optimizer = tf_regtopk.SparsifiedOptimizer(inner)
    optimizer.build([variable])
    del optimizer
    gc.collect()
    tf_regtopk.SparsifiedOptimizer(inner).build([variable])


@pytest.mark.parametrize("dtype", ["complex64", "int32"])
def test_variables_of_no_floats(dtype):
    optimizer = tf_regtopk.SparsifiedOptimizer(sgd())
    variable = keras.Variable(np.ones(3), dtype=dtype, name="phases")
    with pytest.raises(ValueError, match=f"of floats.*'phases' of {dtype}"):
        optimizer.build([variable])


def test_apply_in_cross_replica_context(mirrored):
    with mirrored(2).scope():
        variable = keras.Variable(1.0)
        optimizer = tf_regtopk.SparsifiedOptimizer(sgd())
        for outer in (optimizer, tf_regtopk.LossScaleOptimizer(optimizer)):
            with pytest.raises(ValueError, match="in a replica context"):
                outer.apply([tf.constant(1.0)], [variable])


def test_gradients_that_do_not_match():
    variables = [keras.Variable(1.0), keras.Variable(2.0)]
    optimizer = tf_regtopk.SparsifiedOptimizer(sgd())
    with pytest.raises(ValueError, match="`trainable_variables` must be given"):
        optimizer.apply([tf.constant(1.0)])
    with pytest.raises(ValueError, match="1 gradients for 2 variables"):
        optimizer.apply([tf.constant(1.0)], variables)


@pytest.mark.parametrize(
    "kwargs, error",
    [
        ({"initial_scale": 0.0}, ValueError),
        ({"initial_scale": "1"}, TypeError),
        ({"dynamic_growth_steps": 0}, ValueError),
        ({"dynamic_growth_steps": 2.5}, TypeError),
    ],
)
def test_loss_scale(kwargs, error):
    [name] = kwargs
    wrapped = tf_regtopk.SparsifiedOptimizer(keras.optimizers.SGD())
    with pytest.raises(error, match=f"`{name}` must be"):
        tf_regtopk.LossScaleOptimizer(wrapped, **kwargs)
