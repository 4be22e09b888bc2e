"""The launcher: worker processes, started, watched and restarted.

`command.py` runs the command and `arguments.py` parses its line; `run.py` of
the package starts it. `groups.py` says which workers there are: those of this
machine, those of machines that meet (`rendezvous.py`), or one that somebody
else has told of (`cluster.py`). `worker.py` is a process, `standby.py` one
that waits to become a worker, `supervision.py` waits for several workers, and
`bootstrap.py` is what runs in each process. Nothing here needs TensorFlow, but
the variables of Slurm.
"""
