"""Runs an example on images that tensorflow-datasets makes up.

python run_with_mock_data.py num_images example.py --flag=...

For a program of `benchmarks/` the name of its module stands for the file.
"""

import runpy
import sys

import tensorflow_datasets as tfds

if __name__ == "__main__":
    _, num_images, example, *_ = sys.argv
    del sys.argv[:2]
    with tfds.testing.mock_data(num_examples=int(num_images)):
        if example.endswith(".py"):
            sys.path.insert(0, example.rpartition("/")[0])
            runpy.run_path(example, run_name="__main__")
        else:
            runpy.run_module(example, run_name="__main__")
