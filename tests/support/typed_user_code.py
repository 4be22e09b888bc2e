"""Code as users write it, for a type checker: nothing calls it.

Every `# type: ignore` stands where the checker must refuse the line; one that
is not needed is an error as well.
"""

import dataclasses

import keras
import tensorflow as tf

import tf_regtopk


def use_the_library() -> tuple[float | None, int, list[float]]:
    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(0.1),
        tf_regtopk.RegTopK(density=0.01, mu=2.0, denominator="current"),
        codec=tf_regtopk.Codec(indices="golomb", values="bfloat16"),
        error_feedback=tf_regtopk.Accumulate(momentum=0.9, factor_masking=True),
        scope="per_variable",
        dense_below=100,
        exchange="auto",
        telemetry=True,
    )
    density: float | None = optimizer.density
    optimizer.set_density(0.1)
    sent_bytes: int = optimizer.wire_report().sent_bytes
    norms: list[float] = [n["gradient"] for n in optimizer.telemetry()]
    tf_regtopk.Monitor("logs", every=100, per_variable=True)
    tf_regtopk.Monitor(every="100")  # type: ignore[arg-type]

    tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(),
        nonsense=1,  # type: ignore[arg-type]
    )
    tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(),
        scope="layer",  # type: ignore[arg-type]
    )
    tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(),
        tf_regtopk.Accumulate(),  # type: ignore[arg-type]
    )
    tf_regtopk.Accumulate(momentum="0.9")  # type: ignore[arg-type]
    return density, sent_bytes, norms


def decentralise(model: keras.Model) -> list[int]:
    optimizer = tf_regtopk.DecentralizedOptimizer(
        keras.optimizers.SGD(0.1),
        tf_regtopk.Cliques([[0, 1], [2, 3]], average_gradients=True),
        error_feedback=tf_regtopk.Accumulate(),
        consensus_step_size=0.5,
    )
    tf_regtopk.DecentralizedOptimizer(
        keras.optimizers.SGD(),
        tf_regtopk.AllGather(),  # type: ignore[arg-type]
    )
    tf_regtopk.Torus(rows="2")  # type: ignore[arg-type]
    tf_regtopk.DecentralizedOptimizer(
        keras.optimizers.SGD(),
        cross_gradients=tf_regtopk.CrossGradients(alpha=0.5),
    )
    tf_regtopk.CrossGradients(codec="sign")  # type: ignore[arg-type]
    with tf_regtopk.averaged(model):
        counts: list[int] = optimizer.zeroed_gradients
    return counts


class Network(tf_regtopk.CrossGradientTraining, keras.Model):
    """A model of the user."""

    def cross_gradient_loss(self, data: tf.Tensor) -> tf.Tensor:
        return 2 * super().cross_gradient_loss(data)


@dataclasses.dataclass(frozen=True)
class Halved(tf_regtopk.Accumulate):
    """A rule of the user."""

    def update(
        self,
        local: tuple[tf.Tensor, ...],
        indices: tf.Tensor,
        sent: tf.Tensor,
        total: tf.Tensor,
        context: object,
    ) -> tuple[tf.Tensor, ...]:
        return tuple(0.5 * tensor for tensor in local)
