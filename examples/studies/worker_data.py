"""Which images each worker has, and the batches that it draws from them."""

from absl import flags
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds


def define_flags():
    """Defines `split` and `shard_sizes`."""
    flags.DEFINE_string(
        "split",
        "iid",
        "How the images are shared out: `iid`, at random; `dirichlet:0.1`, "
        "each class in shares drawn from a Dirichlet distribution, more "
        "unequal the smaller its parameter; `by_label`, few classes a worker.",
    )
    flags.register_validator(
        "split",
        _is_split,
        "must be iid, by_label, or dirichlet:0.1 or the like",
    )
    flags.DEFINE_enum(
        "shard_sizes",
        "equal",
        ["equal", "unequal"],
        "unequal: worker n of N has n / N times the images of the last one. (A "
        "Dirichlet split has unequal ones by itself.) All workers' batches are "
        "of one size.",
    )


def define_loading_flags():
    """Defines `data_dir`."""
    flags.DEFINE_string(
        "data_dir", None, "Where tensorflow-datasets keeps its data sets."
    )


def load_images(name, split, data_dir, transform=None, max_images=None):
    """Loads images through tensorflow-datasets.

    Args:
        name: Name of a data set of images and labels.
        split: Its split.
        data_dir: Its folder, or None.
        transform: Function of an image that makes all of one size.
        max_images: How many to load at most, if not all.

    Returns:
        `(images, labels)`, arrays `[n, height, width, channels]` and `[n]`.
    """
    dataset = tfds.load(
        name, split=split, data_dir=data_dir, as_supervised=True
    )
    if max_images is not None:
        dataset = dataset.take(max_images)
    if transform is not None:
        dataset = dataset.map(lambda image, label: (transform(image), label))
    [all_images] = tfds.as_numpy(dataset.batch(int(dataset.cardinality())))
    return all_images


def describe(args):
    """The split in a few characters."""
    unequal = ", unequal shards" if args.shard_sizes == "unequal" else ""
    return args.split + unequal


def shards(labels, num_workers, split, shard_sizes, smallest, seed):
    """Shares images out.

    Args:
        labels: Integer array `[n]`.
        num_workers: N.
        split: As the flag.
        shard_sizes: As the flag.
        smallest: Number of images that each worker has at least.
        seed: Integer.

    Returns:
        List of N integer arrays, the numbers of the images of each worker.

    Raises:
        ValueError: If there are not enough images.
    """
    rng = np.random.default_rng(seed)
    images = rng.permutation(len(labels))
    share = np.arange(1.0, num_workers + 1)
    if shard_sizes == "equal":
        share = np.ones(num_workers)
    if split.startswith("dirichlet:"):
        alpha = float(split.split(":")[1])
        for _ in range(1000):
            parts = _by_dirichlet(images, labels, alpha * share, rng)
            if min(len(part) for part in parts) >= smallest:
                return parts
    else:
        if split == "by_label":
            images = images[np.argsort(labels[images], kind="stable")]
        cuts = np.cumsum(share / share.sum())[:-1] * len(images)
        parts = np.split(images, cuts.astype(int))
        if min(len(part) for part in parts) >= smallest:
            return parts
    raise ValueError(
        f"Each of {num_workers} workers must have at least {smallest} images, "
        f"one batch. Received: {len(labels)} images to share out by "
        f"split={split!r}"
    )


def batches(parts, batch_size, rounds, seed):
    """The numbers of the images in every batch.

    Each worker goes through its own images in a new order every time.

    Args:
        parts: What `shards` returned.
        batch_size: Images a worker and round.
        rounds: Number of rounds.
        seed: Integer.

    Returns:
        Integer array `[rounds, workers, batch_size]`.
    """
    drawn = []
    for n, images in enumerate(parts):
        rng = np.random.default_rng([seed, n])
        num_passes = -(-rounds * batch_size // len(images))
        order = np.concatenate(
            [rng.permutation(images) for _ in range(num_passes)]
        )
        drawn.append(order[: rounds * batch_size].reshape([rounds, batch_size]))
    return np.stack(drawn, axis=1)


def global_batches(images, labels, numbers):
    """A data set of global batches, worker n's batch as its n-th part."""
    flat = numbers.reshape([len(numbers), -1])
    return tf.data.Dataset.from_tensor_slices(flat).map(
        lambda batch: (tf.gather(images, batch), tf.gather(labels, batch))
    )


def _by_dirichlet(images, labels, alphas, rng):
    """Every class is cut in shares that are drawn for it alone."""
    parts = [[] for _ in alphas]
    for label in np.unique(labels):
        own = images[labels[images] == label]
        cuts = np.cumsum(rng.dirichlet(alphas))[:-1] * len(own)
        for part, piece in zip(
            parts, np.split(own, cuts.astype(int)), strict=True
        ):
            part.append(piece)
    return [np.concatenate(part) for part in parts]


def _is_split(split):
    name, _, alpha = split.partition(":")
    if name != "dirichlet":
        return split in ("iid", "by_label")
    try:
        return 0 < float(alpha) < np.inf
    except ValueError:
        return False
