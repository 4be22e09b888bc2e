"""What goes on GPUs: under TensorFlow, or exported to machines with JAX.

Networks and methods are those of the examples, whose modules import each other
by their plain names; hence the two folders on the path.
"""

import pathlib
import sys

_EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
sys.path += [str(_EXAMPLES), str(_EXAMPLES / "studies")]
