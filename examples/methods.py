r"""The methods that are compared: each by its name, or from a file of yours.

A method is a function of `Hyper` that returns a Keras optimizer. With one of
your own in `mine.py`, such as

    import keras
    import tf_regtopk

    def clipped(hyper):
        return tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(hyper.learning_rate, hyper.momentum),
            tf_regtopk.TopK(hyper.density),
            error_feedback=tf_regtopk.Accumulate(clip_norm=1.0),
        )

it enters every comparison as `file.py:function`:

    python examples/studies/digits_study.py --methods=dense,topk,mine.py:clipped

What a study has kept of its runs counts for the file as it was then.
"""

import functools
import importlib.util
import pathlib
import sys
from typing import NamedTuple
import zlib

from absl import flags
import example_utils
import keras

import tf_regtopk


class Hyper(NamedTuple):
    """What a comparison prescribes to its methods.

    Args:
        learning_rate: Positive float.
        density: Float in (0, 1], the share of the entries that are sent.
        momentum: Float in [0, 1).
        adam: Boolean. Whether the inner optimizer is Adam; without momentum,
            which it has of its own.
        mu: RegTop-k's.
        denominator: RegTop-k's.
        codec: `tf_regtopk.Codec`.
        num_workers: Number of workers.
        topology: `tf_regtopk.EntryTopology`.
        cliques: Lists of workers whose data, taken together, is like the data
            of all.
    """

    learning_rate: float
    density: float
    momentum: float = 0.0
    adam: bool = False
    mu: float = 4.0
    denominator: str = "previous"
    codec: tf_regtopk.Codec = tf_regtopk.Codec()
    num_workers: int = 1
    topology: tf_regtopk.EntryTopology = tf_regtopk.AllGather()
    cliques: tuple = ()

    def inner(self, momentum, scale=1.0):
        """The optimizer that applies the aggregate.

        Args:
            momentum: Float in [0, 1).
            scale: What the learning rate is multiplied by.
        """
        if self.adam:
            return keras.optimizers.Adam(self.learning_rate)
        return keras.optimizers.SGD(scale * self.learning_rate, momentum)

    def topk(self):
        return tf_regtopk.TopK(self.density)

    def regtopk(self):
        return tf_regtopk.RegTopK(
            self.density, self.mu, denominator=self.denominator
        )

    def at_once(self):
        """No momentum, and as long steps on average."""
        return self._replace(
            learning_rate=self.learning_rate / (1 - self.momentum), momentum=0.0
        )

    def with_signs(self):
        """About the same bytes in values of one bit: 4 times the entries."""
        return self._replace(
            density=min(1.0, 4 * self.density),
            codec=tf_regtopk.Codec(self.codec.indices, "sign"),
        )

    def with_owners(self, capacity=1.5, keep=1.0):
        """About the same bytes in entries that are summed by their owners."""
        ratio = self.num_workers / (capacity + keep)
        return self._replace(
            density=min(1.0, ratio * self.density),
            topology=tf_regtopk.ReduceScatter(capacity, keep),
        )

    def sparsified(self, sparsifier, error_feedback=None, momentum=0.0):
        """The inner optimizer, wrapped.

        Args:
            sparsifier: `tf_regtopk.Sparsifier`.
            error_feedback: `tf_regtopk.ErrorFeedback`, error accumulation if it
                is None.
            momentum: As of `inner`: that after the sum.
        """
        return tf_regtopk.SparsifiedOptimizer(
            self.inner(momentum),
            sparsifier,
            codec=self.codec,
            error_feedback=error_feedback,
            topology=self.topology,
        )


# The momentum acts after the sum, but is the workers' own in "regtopk_local",
# "dgc", "ef21", and all of "shift" but the "inner" one. At density 1 all take
# the same steps, but "dgc", which then has no momentum, and "local_adam", of
# which each worker has its own Adam.
METHODS = {
    "dense": lambda h: h.inner(h.momentum),
    "topk_no_feedback": lambda h: h.sparsified(
        h.topk(), tf_regtopk.NoFeedback(), h.momentum
    ),
    "topk": lambda h: h.sparsified(h.topk(), momentum=h.momentum),
    "regtopk": lambda h: h.sparsified(h.regtopk(), momentum=h.momentum),
    "regtopk_local": lambda h: h.sparsified(
        h.regtopk(), tf_regtopk.Accumulate(h.momentum)
    ),
    "randomk": lambda h: h.sparsified(
        tf_regtopk.RandomK(h.density), momentum=h.momentum
    ),
    "dgc": lambda h: tf_regtopk.methods.deep_gradient_compression(
        h.inner(0.0), h.momentum, h.density, codec=h.codec
    ),
    "ef21": lambda h: tf_regtopk.methods.ef21_sgdm(
        # EF21 averages gradients where momentum adds them up.
        h.inner(0.0, scale=1 / (1 - h.momentum)),
        1 - h.momentum,
        h.density,
        codec=h.codec,
    ),
    "shift": lambda h: h.sparsified(
        h.topk(), tf_regtopk.LearnedShift(momentum=h.momentum)
    ),
    "shift_regtopk": lambda h: h.sparsified(
        h.regtopk(), tf_regtopk.LearnedShift(momentum=h.momentum)
    ),
    "shift_regtopk_inner": lambda h: h.sparsified(
        h.regtopk(), tf_regtopk.LearnedShift(), h.momentum
    ),
    "shift_at_once": lambda h: h.sparsified(
        h.regtopk(), tf_regtopk.LearnedShift(momentum=h.momentum, at_once=True)
    ),
    "local_adam": lambda h: h._replace(adam=False).sparsified(
        h.regtopk(), tf_regtopk.LocalAdam(tf_regtopk.LearnedShift())
    ),
    "shift_slow": lambda h: h.sparsified(
        h.regtopk(), tf_regtopk.LearnedShift(h.density / 4, h.momentum)
    ),
    "shift_fast": lambda h: h.sparsified(
        h.regtopk(), tf_regtopk.LearnedShift(min(1, 4 * h.density), h.momentum)
    ),
}
METHODS |= {
    f"{name}_at_once": lambda h, method=METHODS[name]: method(h.at_once())
    for name in ("dense", "topk")
}


def version(method):
    """What tells runs with other versions of a user's file apart.

    Args:
        method: As of `find`.

    Returns:
        Dictionary for JSON, empty for one of `METHODS`.
    """
    if method in METHODS:
        return {}
    path, _, _ = method.rpartition(":")
    return {"method_crc32": zlib.crc32(pathlib.Path(path).read_bytes())}


def define_method_flags(mu, methods=("dense", "topk", "regtopk")):
    """Defines the flags for the methods to compare; both are defaults."""
    flags.DEFINE_list(
        "methods",
        list(methods),
        f"Methods to compare, of {', '.join(METHODS)}; or yours, as "
        "file.py:function, see examples/methods.py.",
    )
    flags.register_validator("methods", _are_methods)
    example_utils.define_codec_flags()
    flags.DEFINE_float("mu", mu, "RegTop-k's mu.")
    flags.DEFINE_enum(
        "denominator", "previous", ["previous", "current"], "RegTop-k's form."
    )


def make_optimizer(
    method,
    args,
    learning_rate,
    density,
    momentum=0.0,
    adam=False,
    topology=Hyper._field_defaults["topology"],
    cliques=(),
):
    """Makes the optimizer of a method.

    Args:
        method: One of `METHODS`, or `file.py:function`.
        args: The flags of `define_method_flags`.
        learning_rate: As of `Hyper`, and so the next five.
        density: See above.
        momentum: See above.
        adam: See above.
        topology: See above.
        cliques: See above.

    Returns:
        A `keras.optimizers.Optimizer`, in most cases a `SparsifiedOptimizer`.

    Raises:
        TypeError: If a function of the user's returns something else.
        ValueError: If there is no such method.
    """
    optimizer = find(method)(
        Hyper(
            learning_rate,
            density,
            momentum,
            adam,
            args.mu,
            args.denominator,
            tf_regtopk.Codec(args.indices, args.values),
            getattr(args, "num_workers", 1),
            topology,
            cliques,
        )
    )
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise TypeError(
            f"The method `{method}` must return a Keras optimizer. "
            f"Received: {optimizer!r}"
        )
    return optimizer


def find(method):
    """The function of a method.

    Args:
        method: One of `METHODS`, or `file.py:function`.

    Raises:
        ValueError: If there is none.
    """
    if method in METHODS:
        return METHODS[method]
    path, _, name = method.rpartition(":")
    if not path.endswith(".py"):
        raise ValueError(
            f"`methods` must be among {', '.join(METHODS)}, or "
            f"file.py:function. Received: {method}"
        )
    if not pathlib.Path(path).is_file():
        raise ValueError(f"`{path}` must be a file. Received: {method}")
    function = getattr(_load(path), name, None)
    if not callable(function):
        raise ValueError(
            f"`{path}` must define a function `{name}`. Received: {method}"
        )
    return function


@functools.cache  # Its classes must be the same ones in all runs.
def _load(path):
    name = f"methods_in_{pathlib.Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Dataclasses look their module up.
    spec.loader.exec_module(module)
    return module


def _are_methods(methods):
    """Tells of a wrong name before anything is trained."""
    if not methods:
        raise flags.ValidationError("must have at least one method")
    for method in methods:
        try:
            find(method)
        except ValueError as e:
            raise flags.ValidationError(str(e)) from e
    return True
