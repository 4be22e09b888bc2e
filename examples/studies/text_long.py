r"""Text for thousands of steps: accuracy at equal bytes with Adam.

A small transformer predicts the next character of the source code of Python's
standard library, which ships with every Python. The classes of `--split` are
folders of that library. Whole files are kept for the test. Otherwise this is
`cifar10_long.py`.

    python examples/studies/text_long.py --split=dirichlet:0.1 --seeds=0,1,2

The text is another one with another version of Python.
"""

import collections
import os
import pathlib
import sys
import sysconfig

# TensorFlow's default on processors without AVX-512 is half as fast, and must
# be changed before it is imported.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

sys.path.append(str(pathlib.Path(__file__).parent.parent))

from absl import app
from absl import flags
import image_training
import keras
import numpy as np
import simulated_training
import tensorflow as tf

# Those of ASCII that are printed, the end of a line, and one for all others.
_FIRST, _LAST = ord(" "), ord("~")
NUM_SYMBOLS = _LAST - _FIRST + 3
NUM_CLASSES = 10
# Of ten files the first one, and of its windows at most as many.
_TEST_EVERY = 10
_MAX_TESTS = 1000
_HELD_OUT = 1000
_NOT_OF_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests"}


def define_flags():
    flags.DEFINE_integer(
        "length", 64, "Characters of an example.", lower_bound=1
    )
    flags.DEFINE_integer("width", 64, "Of the transformer.", lower_bound=4)
    flags.DEFINE_integer("blocks", 2, "Of the transformer.", lower_bound=1)
    flags.DEFINE_integer(
        "max_files",
        None,
        "Read the first files only, as many as this.",
        lower_bound=_TEST_EVERY,
    )
    simulated_training.define_flags(
        output_dir="results/text_long",
        learning_rates=(0.001, 0.003, 0.01),
        batch_size=4,
    )
    # So that --help lists those too.
    flags.adopt_module_key_flags(simulated_training)
    flags.FLAGS.set_default("momentum", 0.0)
    flags.FLAGS.set_default("inner_optimizer", "adam")


def symbols(text):
    r"""The characters of a text as integers below `NUM_SYMBOLS`.

    >>> symbols("a b\n\u00e9").tolist()
    [65, 0, 66, 95, 96]
    """
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4").astype(np.int64)
    found = np.full(codes.shape, NUM_SYMBOLS - 1, np.int32)
    is_printed = (codes >= _FIRST) & (codes <= _LAST)
    found[is_printed] = codes[is_printed] - _FIRST
    found[codes == ord("\n")] = NUM_SYMBOLS - 2
    return found


def files(max_files=None):
    """The files of the standard library, and the folder of each.

    Args:
        max_files: How many at most, if not all.

    Returns:
        List of `(path, folder)`, in the order of the paths. The folder of those
        in none is "".
    """
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not _NOT_OF_THE_LIBRARY & {*parts}:
            found.append((path, parts[0] if len(parts) > 1 else ""))
    return found[:max_files]


def windows(text, length):
    """A text cut in examples: `(characters, the next of each)`.

    Args:
        text: Integer array.
        length: Number of characters.

    Returns:
        Two arrays `[n, length]`. What is left at the end is dropped.

    Example:

    >>> for part in windows(np.arange(8), 3):
    ...     print(part.tolist())
    [[0, 1, 2], [3, 4, 5]]
    [[1, 2, 3], [4, 5, 6]]
    """
    count = max(0, (len(text) - 1) // length)
    return tuple(
        text[start : start + count * length].reshape([count, length])
        for start in (0, 1)
    )


def classes_of(folders):
    """The largest folders as classes; all others are one class.

    Args:
        folders: The folder of each example.

    Returns:
        Integer array of numbers below `NUM_CLASSES`.
    """
    counted = collections.Counter(folders).most_common(NUM_CLASSES - 1)
    numbers = {folder: i for i, (folder, _) in enumerate(counted)}
    return np.array([numbers.get(folder, len(numbers)) for folder in folders])


def build_model(args):
    """A transformer of which each position sees those before."""
    inputs = keras.Input((args.length,), dtype="int32")
    x = keras.layers.Embedding(NUM_SYMBOLS, args.width)(inputs)
    positions = keras.ops.arange(args.length)
    x += keras.layers.Embedding(args.length, args.width)(positions)
    for _ in range(args.blocks):
        y = keras.layers.LayerNormalization()(x)
        x += keras.layers.MultiHeadAttention(4, args.width // 4)(
            y, y, use_causal_mask=True
        )
        y = keras.layers.LayerNormalization()(x)
        y = keras.layers.Dense(4 * args.width, activation="gelu")(y)
        x += keras.layers.Dense(args.width)(y)
    x = keras.layers.LayerNormalization()(x)
    return keras.Model(inputs, keras.layers.Dense(NUM_SYMBOLS)(x))


def load(args):
    """The task: an `image_training.Task`, of which images are texts."""
    train, test, folders = [], [], []
    for number, (path, folder) in enumerate(files(args.max_files)):
        text = symbols(path.read_text("utf-8", errors="replace"))
        pair = windows(text, args.length)
        if number % _TEST_EVERY:
            train.append(pair)
            folders += [folder] * len(pair[0])
        else:
            test.append(pair)
    inputs, targets = map(np.concatenate, zip(*train, strict=True))
    # Those held out, the last ones, are to be of all folders.
    order = np.random.default_rng(0).permutation(len(inputs))
    tests = tuple(map(np.concatenate, zip(*test, strict=True)))
    chosen = np.random.default_rng(0).permutation(len(tests[0]))[:_MAX_TESTS]
    return image_training.Task(
        lambda: build_model(args),
        tf.constant(inputs[order]),
        targets[order],
        tuple(part[chosen] for part in tests),
        min(_HELD_OUT, len(inputs) // 10),
        classes_of(folders)[order],
    )


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    args = flags.FLAGS
    simulated_training.use_one_core()
    simulated_training.compare(load(args), args, "transformer")


if __name__ == "__main__":
    define_flags()
    app.run(main)
