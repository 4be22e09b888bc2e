"""Callbacks for `model.fit`, and loading."""

from tf_regtopk.callbacks.backup import Backup
from tf_regtopk.callbacks.density_decay import DensityDecay
from tf_regtopk.callbacks.density_warmup import DensityWarmup
from tf_regtopk.callbacks.monitor import Monitor

__all__ = ["Backup", "DensityDecay", "DensityWarmup", "Monitor"]
