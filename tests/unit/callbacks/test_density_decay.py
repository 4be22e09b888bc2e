"""A density that follows the learning rate while a model trains."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_regtopk
from tf_regtopk.callbacks import density_decay
from tf_regtopk.sizes import density_decay as sizes

NUM_EPOCHS, BATCHES = 4, 3


class Recorder(keras.callbacks.Callback):
    """The density of each epoch."""

    def __init__(self):
        super().__init__()
        self.densities = []

    def on_epoch_begin(self, epoch, logs=None):
        self.densities.append(self.model.optimizer.density)


def make_model(learning_rate=0.1, strategy=None, **options):
    with (strategy or tf.distribute.get_strategy()).scope():
        model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(20)])
        model.compile(
            tf_regtopk.SparsifiedOptimizer(
                keras.optimizers.SGD(learning_rate),
                tf_regtopk.RegTopK(0.1),
                **options,
            ),
            loss="mse",
        )
    return model


def fit(model, decay, initial_epoch=0, **options):
    recorder = Recorder()
    model.fit(
        *(np.ones((4 * BATCHES, 5)), np.ones((4 * BATCHES, 20))),
        batch_size=4,
        epochs=NUM_EPOCHS,
        initial_epoch=initial_epoch,
        callbacks=[decay, recorder],
        verbose=0,
        **options,
    )
    return recorder.densities


def expected(rates, density=0.1):
    """Against the formula, without phases."""
    weights = np.array(rates) ** (2 / 3)
    return pytest.approx(density * weights / weights.mean(), rel=1e-3)


def test_densities_follow_a_schedule_of_steps(mirrored):
    schedule = keras.optimizers.schedules.CosineDecay(
        0.1, decay_steps=NUM_EPOCHS * BATCHES
    )
    model = make_model(schedule, mirrored(2))
    found = fit(model, tf_regtopk.DensityDecay(schedule))
    middles = (np.arange(NUM_EPOCHS) + 0.5) / NUM_EPOCHS
    assert found == expected(1 + np.cos(np.pi * middles))
    assert np.mean(found) == pytest.approx(0.1, rel=1e-3)


def test_the_schedule_is_that_of_the_optimizer():
    decay = tf_regtopk.DensityDecay()
    for power in (1.0, 2.0):
        schedule = keras.optimizers.schedules.PolynomialDecay(
            *(0.1, NUM_EPOCHS * BATCHES, 0.0, power)
        )
        found = fit(make_model(schedule), decay)
        assert found == expected(np.array([3.5, 2.5, 1.5, 0.5]) ** power)


@pytest.mark.parametrize("rate", [0.1, lambda: 0.1])
def test_a_learning_rate_without_schedule_must_be_given(rate):
    decay = tf_regtopk.DensityDecay()
    with pytest.raises(ValueError, match="must be given where.*Received.*SGD"):
        fit(make_model(rate), decay)
    with pytest.raises(ValueError, match="before `fit`. Received"):
        decay.densities(0.1, NUM_EPOCHS)


def test_steps_are_exchanges():
    """Those that a schedule counts, where batches are accumulated."""
    schedule = keras.optimizers.schedules.PolynomialDecay(
        0.1, decay_steps=NUM_EPOCHS, end_learning_rate=0.0
    )
    model = make_model(schedule, accumulation_steps=BATCHES)
    found = fit(model, tf_regtopk.DensityDecay(schedule))
    assert found == expected([3.5, 2.5, 1.5, 0.5])


def test_densities_follow_a_function_of_the_epoch_in_phases():
    decay = tf_regtopk.DensityDecay(lambda epoch: 1.0 / 2**epoch, num_phases=2)
    found = fit(make_model(), decay)
    assert found[0] == found[1] > found[2] == found[3]
    assert np.mean(found) == pytest.approx(0.1, rel=1e-3)


def test_a_run_goes_on_with_the_density_of_its_epoch():
    decay = tf_regtopk.DensityDecay(lambda epoch: 1.0 / 2**epoch)
    model = make_model()
    assert fit(model, decay)[2:] == fit(make_model(), decay, initial_epoch=2)


def test_residual_errors_outlive_a_change(mirrored):
    """All gradients are in the weights or in the errors."""
    model = make_model(1.0, mirrored(2))
    # The gradients are those of the data alone.
    model.compile(model.optimizer, lambda y, output: y * output)
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((4 * BATCHES, n)) for n in (5, 20))
    before, recorder = model.get_weights(), Recorder()
    decay = tf_regtopk.DensityDecay(lambda epoch: 1.0 / 2**epoch, num_phases=2)
    model.fit(x, y, 4, NUM_EPOCHS, verbose=0, callbacks=[decay, recorder])
    assert len(set(recorder.densities)) == 2
    errors = [
        np.sum(parts, axis=0)
        for parts in zip(*model.optimizer.residual_errors(), strict=True)
    ]
    assert np.count_nonzero(errors[0]) > 50
    for old, new, error, gradient in zip(
        *(before, model.get_weights(), errors, (x.T @ y, y.sum(axis=0))),
        strict=True,
    ):
        np.testing.assert_allclose(
            old - new + error, NUM_EPOCHS * gradient / (4 * 20), atol=1e-5
        )


@pytest.mark.parametrize("rates", [[1.0, 0.5, 0.2, 0.0], [0.0, 3.0], [2.0]])
@pytest.mark.parametrize("num_phases", [1, 2, 3, 8])
@pytest.mark.parametrize("density", [0.001, 0.3, 1.0])
def test_mean_and_bounds(rates, num_phases, density):
    found = sizes.densities(rates, density, num_phases)
    assert len(found) == len(rates) and all(0 < d <= 1 for d in found)
    assert len(set(found)) <= num_phases
    if max(found) < 1 and min(found) > 0.011 * density:
        assert np.mean(found) == pytest.approx(density, rel=1e-3)
    # Those that would be more than 1 are 1.
    shares = np.array(sizes.densities(rates, 1e-9, num_phases)) / 1e-9
    assert found == pytest.approx(np.minimum(density * shares, 1), rel=1e-3)
    if num_phases == 1:
        assert set(found) == {density}


def test_a_learning_rate_that_warms_up_counts_as_its_largest_value():
    found = sizes.densities([0.0, 0.5, 1.0, 0.5], 0.1)
    assert found == expected([1.0, 1.0, 1.0, 0.5])


def test_the_squared_errors_are_the_least():
    """Of all densities with this mean, near the ones that are chosen."""
    rates = np.array([1.0, 0.7, 0.4, 0.1])
    chosen = np.array(sizes.densities(rates, 0.01))

    def squares(densities):
        return np.sum(rates**2 / densities**2)

    rng = np.random.default_rng(0)
    for _ in range(100):
        change = rng.standard_normal(4)
        change -= change.mean()
        other = chosen + 3e-4 * change / np.linalg.norm(change)
        assert squares(other) > squares(chosen)


def test_bad_arguments():
    with pytest.raises(TypeError, match="`learning_rate` must be a `Learning"):
        tf_regtopk.DensityDecay(0.1)
    with pytest.raises(ValueError, match="`num_phases` must be an integer >="):
        tf_regtopk.DensityDecay(lambda epoch: 1.0, num_phases=0)
    decay = tf_regtopk.DensityDecay(lambda epoch: 0.0)
    with pytest.raises(ValueError, match="`learning_rates` must not all be 0"):
        fit(make_model(), decay)
    with pytest.raises(ValueError, match="all non-negative"):
        tf_regtopk.DensityDecay(lambda epoch: -1.0).densities(0.1, 2)


def test_a_function_needs_neither_hash_nor_truth():
    class Halved:
        __hash__ = None

        def __call__(self, epoch):
            return 0.5**epoch

        def __len__(self):
            return 0

    found = fit(make_model(), tf_regtopk.DensityDecay(Halved()))
    assert found == expected([1.0, 0.5, 0.25, 0.125])


def test_a_function_of_the_learning_rate_is_refused():
    with pytest.raises(
        TypeError, match=r"epoch alone.*Received: .*\(epoch, lr"
    ):
        tf_regtopk.DensityDecay(lambda epoch, lr: lr)
    assert tf_regtopk.DensityDecay(lambda epoch, base=0.1: base)


def test_a_schedule_needs_the_number_of_steps():
    schedule = keras.optimizers.schedules.CosineDecay(0.1, decay_steps=12)
    model = make_model(schedule)
    data = tf.data.Dataset.from_generator(
        lambda: iter([(np.ones((4, 5)), np.ones((4, 20)))]),
        output_signature=(
            tf.TensorSpec([4, 5], tf.float32),
            tf.TensorSpec([4, 20], tf.float32),
        ),
    )
    for decay, is_refused in (
        (tf_regtopk.DensityDecay(schedule), True),
        (tf_regtopk.DensityDecay(lambda epoch: 1.0), False),
    ):
        if is_refused:
            with pytest.raises(ValueError, match="`steps_per_epoch` of `fit`"):
                model.fit(data, callbacks=[decay], verbose=0)
        else:
            model.fit(data, callbacks=[decay], verbose=0)


def test_example_of_the_docstring_is_the_formula():
    decay = density_decay.DensityDecay(lambda epoch: 0.1 * (1 - epoch / 4))
    found = decay.densities(0.01, num_epochs=4)
    assert found == expected([4, 3, 2, 1], 0.01)
