"""Set-up shared by all tests."""

import gc

# First, because it sets variables that TensorFlow reads when imported.
import logical_devices

# isort: split
import hypothesis
import keras
import pytest
from tensorflow.python.data.ops import multi_device_iterator_ops

from tf_regtopk.kernels import tracing

# No limits of time, because a busy machine is no error.
hypothesis.settings.register_profile(
    "untimed",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(autouse=True, scope="module")
def _cheap_garbage_collection():
    """Keeps the collector off what has been imported and what others keep.

    Else it goes through all of it time and again.
    """
    gc.collect()
    gc.freeze()


_iterators = []


@pytest.fixture(autouse=True, scope="session")
def _iterators_stay():
    """Keeps what `fit` reads from under a strategy until the process ends.

    TensorFlow 2.21 may free such an iterator while its thread still reads, and
    the process ends: once in about thirty calls of `fit` on a single device
    that is not the first, far less often on several devices.
    """
    init = multi_device_iterator_ops.OwnedMultiDeviceIterator.__init__

    def keep(self, *args, **kwargs):
        _iterators.append(self)
        init(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(
            multi_device_iterator_ops.OwnedMultiDeviceIterator, "__init__", keep
        )
        yield


@pytest.fixture(autouse=True)
def _fresh_keras():
    """Every test starts with Keras's defaults and forgets its models."""
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    keras.utils.clear_session(free_memory=False)


@pytest.fixture(autouse=True)
def _programs_of_patched_code(request):
    """Tests that patch code get programs of their own, and leave none."""
    is_patched = "monkeypatch" in request.fixturenames
    if is_patched:
        tracing.forget()
    yield
    if is_patched:
        tracing.forget()


@pytest.fixture(scope="session")
def mirrored():
    """Function from a number of replicas to a strategy (0: no strategy)."""
    return logical_devices.mirrored_strategy
