"""Where speed, memory and bytes are measured; see README.md.

Networks and methods of trainings are those of the examples, whose modules
import each other by their plain names; hence the two folders on the path.
"""

import pathlib
import sys

_EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
sys.path += [str(_EXAMPLES), str(_EXAMPLES / "studies")]
