"""Files that cannot be loaded, or not as they are: an error, and no change."""

import h5py
import keras
import numpy as np
import pytest
import resume_program
import tensorflow as tf

import tf_regtopk
from tf_regtopk.saving import saved_state
from tf_regtopk.saving import worker_files

FILES = ("m.keras", "m.weights.h5", "checkpoint")


def make(strategy, sparsifier=None, units=5, layers=("a", "b"), **options):
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input((4,)),
                *(keras.layers.Dense(units, name=name) for name in layers),
                keras.layers.BatchNormalization(),
                keras.layers.Dense(1),
            ]
        )
        model.compile(
            tf_regtopk.SparsifiedOptimizer(
                keras.optimizers.SGD(0.1, momentum=0.9),
                sparsifier or tf_regtopk.RegTopK(0.2),
                **options,
            ),
            "mse",
        )
        model.optimizer.build(model.trainable_variables)
    resume_program.change(model, seed=0)
    return model


def save(model, directory):
    model.save(directory / "m.keras")
    model.save_weights(directory / "m.weights.h5")
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    checkpoint.write(str(directory / "checkpoint"))


def load(model, path):
    """Loads a file in the only way that promises all or nothing."""
    strategy = model.distribute_strategy
    with tf_regtopk.load_scope(path, strategy, model) as own_path:
        resume_program.load(path.name, model, own_path)


@pytest.fixture
def files(mirrored, tmp_path):
    save(make(mirrored(2)), tmp_path)
    return tmp_path


def assert_refused(model, path, match):
    resume_program.change(model, seed=1)
    before = resume_program.fingerprint(model)
    with pytest.raises(ValueError, match=f"(?s)`path` must hold.*({match})"):
        load(model, path)
    assert resume_program.fingerprint(model) == before


OTHERS = {
    "sparsifier": (
        {"sparsifier": tf_regtopk.TopK(0.2)},
        r"sparsifier=\['tf_regtopk>TopK'.*"
        r"Received: sparsifier=\['tf_regtopk>RegTopK'",
    ),
    "density": (
        {"sparsifier": tf_regtopk.RegTopK(0.3)},
        "'density': 0.3.*Received: .*'density': 0.2",
    ),
    "scope": (
        {"scope": "per_variable"},
        "scope=per_variable. Received: scope=global",
    ),
    "densities": (
        {"densities": {"*/a/kernel": 0.3}},
        r"densities=\[0.3\]. Received: densities=\[\]",
    ),
    "order": ({"layers": ("b", "a")}, "variables="),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("name", OTHERS)
def test_another_optimizer(name, file, files, mirrored):
    arguments, match = OTHERS[name]
    assert_refused(make(mirrored(2), **arguments), files / file, match)


@pytest.mark.parametrize("file", FILES)
def test_another_model(file, files, mirrored):
    for arguments in ({"units": 6}, {"layers": ("a", "b", "c")}):
        model = make(mirrored(2), **arguments)
        assert_refused(model, files / file, "")


def test_the_optimizer_itself_changes_nothing(files, mirrored):
    """Also where Keras is called as it is, and has loaded the layers."""
    model = make(mirrored(2), tf_regtopk.TopK(0.2))
    before = resume_program.fingerprint(model)
    with pytest.raises(
        ValueError, match=r"Received: sparsifier=\['tf_regtopk>RegTopK'"
    ):
        model.load_weights(files / "m.weights.h5")
    after = resume_program.fingerprint(model)
    for name in ("optimizer", "replicas"):
        assert after[name] == before[name]


STATES = {
    "no replicas": (
        lambda s: s._replace(num_replicas=0),
        "must be an integer >= 1. Received: num_replicas=0",
    ),
    "fewer than none": (
        lambda s: s._replace(num_replicas=-1),
        "num_replicas=-1",
    ),
    "a replica too many": (
        lambda s: s._replace(replicas={**s.replicas, 2: s.replicas[1]}),
        r"of those from 0 to 1. Received: \[0, 1, 2\]",
    ),
    "an error of NaN": (
        lambda s: with_part(s, 0, np.full_like(s.replicas[1][0], np.nan)),
        "must be finite. Received: ",
    ),
    "an index out of range": (
        lambda s: with_part(s, 1, s.replicas[1][1] + 1000),
        "memory of `RegTopK` must be of a gradient of",
    ),
    "another shape": (
        lambda s: with_part(s, 0, s.replicas[1][0][:-1]),
        r"arrays of a replica must be \['float32",
    ),
    "another dtype": (
        lambda s: with_part(s, 1, s.replicas[1][1].astype("int64")),
        "Received: .*'int64",
    ),
    "a part too many": (
        lambda s: s._replace(shared=[np.zeros(2, "f4")]),
        "arrays of a replica must be",
    ),
    "another density": (
        lambda s: s._replace(moment={**s.moment, "density": 7.0}),
        "`density` must be in",
    ),
    "another exchange": (
        lambda s: s._replace(moment={**s.moment, "exchange": "none"}),
        "`exchange` must be",
    ),
    "another `dense_below`": (
        lambda s: s._replace(
            layout={**s.layout, "dense_variables": ["bias_0"]}
        ),
        r"dense_variables=\[\]. Received: .*bias_0.*`dense_below`",
    ),
}


def with_part(saved, part, array):
    """Replaces an array of the last replica."""
    arrays = list(saved.replicas[1])
    arrays[part] = array
    return saved._replace(replicas={**saved.replicas, 1: arrays})


def test_states_that_cannot_be_loaded(mirrored):
    """With right checksums, and without `load_scope`."""
    model = make(mirrored(2))
    optimizer = model.optimizer
    good = optimizer.save_state()
    resume_program.change(model, seed=1)
    before = resume_program.fingerprint(model)
    variables = [v.numpy() + 1 for v in optimizer.variables]
    for name, (spoil, match) in STATES.items():
        arrays = saved_state.to_arrays(spoil(good), variables)
        with pytest.raises(ValueError, match=match):
            optimizer.load_own_variables(arrays)
        assert resume_program.fingerprint(model) == before, name
    optimizer.load_own_variables(saved_state.to_arrays(good, variables))
    assert resume_program.fingerprint(model) != before


def test_files_of_earlier_versions_lack_facts(mirrored):
    optimizer = make(mirrored(0), densities={"*/a/kernel": 0.3}).optimizer
    state = optimizer.save_state()
    for fact in ("dense_variables", "densities"):
        del state.layout[fact]
    optimizer.load_state(state)


def test_hyper_parameters_of_any_number_type(mirrored, tmp_path):
    for sparsifier in (
        tf_regtopk.RegTopK(np.float32(0.25), mu=np.int64(4), q=7),
        tf_regtopk.RandomK(1, seed=np.int32(3)),
    ):
        model = make(mirrored(0), sparsifier)
        model.save(tmp_path / "m.keras")
        loaded = keras.saving.load_model(tmp_path / "m.keras")
        assert resume_program.fingerprint(loaded) == (
            resume_program.fingerprint(model)
        )


def test_plain_variables_and_a_checkpoint_of_the_optimizer_alone(tmp_path):
    def make_optimizer():
        variable = tf.Variable([1.0, 2.0, 3.0])
        optimizer = tf_regtopk.SparsifiedOptimizer(
            keras.optimizers.SGD(0.1), tf_regtopk.TopK(0.3)
        )
        optimizer.build([variable])
        return optimizer, variable

    optimizer, variable = make_optimizer()
    optimizer.apply([tf.constant([3.0, 2.0, 1.0])], [variable])
    path = tf.train.Checkpoint(root=optimizer).write(str(tmp_path / "c"))
    [saved] = worker_files.read_states(path)
    np.testing.assert_array_equal(saved.replicas[0][0], [0, 2, 1])
    other, _ = make_optimizer()
    tf.train.Checkpoint(root=other).read(path)
    np.testing.assert_array_equal(
        other.save_state().replicas[0][0], saved.replicas[0][0]
    )


def test_every_replica_is_put_back(mirrored, files):
    """Also what differs between them, as averages of batch normalisation do."""
    model = make(mirrored(2))
    mean = model.layers[2].moving_mean
    parts = mirrored(2).experimental_local_results(mean.value)
    for i, part in enumerate(parts):
        part.assign(tf.fill(part.shape, float(i)))
    with (
        pytest.raises(ValueError, match="must hold"),
        tf_regtopk.load_scope(files / "m.weights.h5", mirrored(2), model),
    ):
        mean.assign(tf.ones_like(mean) * 7)
        raise OSError
    for i, part in enumerate(parts):
        np.testing.assert_array_equal(part, np.full(part.shape, float(i)))


def test_an_interrupted_load_is_put_back(mirrored, files):
    model = make(mirrored(2))
    resume_program.change(model, seed=1)
    before = resume_program.fingerprint(model)
    with (
        pytest.raises(KeyboardInterrupt),
        tf_regtopk.load_scope(files / "m.weights.h5", mirrored(2), model) as f,
    ):
        model.load_weights(f)
        raise KeyboardInterrupt
    assert resume_program.fingerprint(model) == before


@pytest.mark.parametrize(
    "error", [tf.errors.UnavailableError, tf.errors.DeadlineExceededError]
)
def test_a_lost_worker_is_no_bad_file(error, mirrored, files):
    with (
        pytest.raises(error),
        tf_regtopk.load_scope(files / "m.keras", mirrored(2)),
    ):
        raise error(None, None, "lost")


def test_a_model_that_is_not_built(mirrored, files):
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile(
        tf_regtopk.SparsifiedOptimizer(keras.optimizers.SGD(0.1)), "mse"
    )
    with (
        pytest.raises(ValueError, match="`model` must be built"),
        tf_regtopk.load_scope(files / "m.keras", mirrored(0), model),
    ):
        pass


def damaged(path, where):
    data = bytearray(path.read_bytes())
    if where == "end":
        del data[-len(data) // 3 :]
    elif where == "junk":
        data[:] = b"not what it says it is" * 40
    else:
        start = data.find(where)
        assert start >= 0
        data[start] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize("where", ["end", "junk"])
@pytest.mark.parametrize("file", FILES)
def test_damaged_file(file, where, files, mirrored):
    model = make(mirrored(2))
    path = files / file
    if file == "checkpoint":
        damaged(path.with_name("checkpoint.index"), where)
    else:
        damaged(path, where)
    assert_refused(model, path, "")


def test_truncated_data_of_a_checkpoint(files, mirrored):
    damaged(files / "checkpoint.data-00000-of-00001", "end")
    assert_refused(make(mirrored(2)), files / "checkpoint", "")


@pytest.mark.parametrize("kind", ["error", "momentum", "weights"])
def test_one_bit_of_a_weights_file(kind, files, mirrored):
    model = make(mirrored(2))
    value = {
        "error": lambda: model.optimizer.save_state().replicas[1][0],
        "momentum": lambda: model.optimizer.variables[5].numpy(),
        "weights": lambda: model.layers[1].kernel.numpy(),
    }[kind]()
    resume_program.change(model, seed=1)
    damaged(files / "m.weights.h5", value.tobytes())
    assert_refused(model, files / "m.weights.h5", "checksum|those that were")


def test_foreign_file(mirrored, tmp_path):
    with mirrored(2).scope():
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
    model.save_weights(tmp_path / "m.weights.h5")
    with mirrored(2).scope():
        ours = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        ours.compile(
            tf_regtopk.SparsifiedOptimizer(keras.optimizers.SGD()), "mse"
        )
        ours.optimizer.build(ours.trainable_variables)
    assert_refused(
        ours, tmp_path / "m.weights.h5", "saved by a plain optimizer without"
    )
    with mirrored(2).scope():
        model.compile("adam", "mse")
        model.optimizer.build(model.trainable_variables)
    model.save_weights(tmp_path / "m.weights.h5")
    assert_refused(
        ours, tmp_path / "m.weights.h5", r"then call `tf_regtopk.wrap\(model\)`"
    )


def test_a_checkpoint_without_the_optimizer(mirrored, tmp_path):
    model = make(mirrored(2))
    checkpoint = tf.train.Checkpoint(layer=model.layers[0])
    checkpoint.write(str(tmp_path / "checkpoint"))
    before = resume_program.fingerprint(model)
    with (
        pytest.raises(ValueError, match="must be loaded within `load_scope`"),
        tf_regtopk.load_scope(
            tmp_path / "checkpoint", mirrored(2), model
        ) as path,
    ):
        for v in model.variables:
            v.assign(v + 1)
        tf.train.Checkpoint(layer=model.layers[0]).read(path)
    assert resume_program.fingerprint(model) == before


def test_nothing_there(mirrored, tmp_path):
    with (
        pytest.raises(FileNotFoundError, match="Received: path="),
        tf_regtopk.load_scope(tmp_path / "m.keras", mirrored(2)),
    ):
        pass


def test_load_scope_needs_the_wrapper(mirrored, files):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    with (
        pytest.raises(ValueError, match="must be a `SparsifiedOptimizer`"),
        tf_regtopk.load_scope(files / "m.keras", mirrored(0), model),
    ):
        pass


def test_weights_file_can_be_read_without_a_model(files):
    [saved] = worker_files.read_states(str(files / "m.weights.h5"))
    for file in ("m.keras", "checkpoint"):
        [other] = worker_files.read_states(str(files / file))
        assert other[:3] == saved[:3]
        for n in range(2):
            for a, b in zip(saved.replicas[n], other.replicas[n], strict=True):
                np.testing.assert_array_equal(a, b)
    with h5py.File(files / "m.weights.h5") as file:
        # Nothing is stored twice.
        assert len(file["optimizer/vars"]) > 3
        assert len(file.get("optimizer/inner_optimizer/vars", ())) == 0
