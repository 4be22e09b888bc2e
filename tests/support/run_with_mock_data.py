"""Runs an example on images that tensorflow-datasets makes up.

python run_with_mock_data.py num_images example.py --flag=...
"""

import runpy
import sys

import tensorflow_datasets as tfds

if __name__ == "__main__":
    _, num_images, example, *_ = sys.argv
    del sys.argv[:2]
    sys.path.insert(0, str(example).rpartition("/")[0])
    with tfds.testing.mock_data(num_examples=int(num_images)):
        runpy.run_path(example, run_name="__main__")
