"""The launcher: worker processes, started, watched and restarted.

`command.py` has the command line, `run.py` of the package starts it. Nothing
here imports TensorFlow.
"""
