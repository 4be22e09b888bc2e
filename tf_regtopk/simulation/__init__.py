r"""Many workers of sparsified gradient descent in one compiled program.

For research on small problems, of which the exchange between replicas would
take all the time: all steps of all workers are one call, on one device, without
a strategy. The step itself is the one of `SparsifiedOptimizer`
(`steps/round.py`) or of `DecentralizedOptimizer` (`steps/gossip_round.py`),
taken for one worker after the other. A `SparseDescent` skips no step: NaN stays
in the weights.

    optimizer = tf_regtopk.SparsifiedOptimizer(
        keras.optimizers.SGD(0.01), tf_regtopk.RegTopK(density=0.1))
    run = simulation.gradient_descent(
        simulation.descent_of(optimizer, num_workers=20),
        gradients_of, measure, num_steps=2500)
    curve = run(weights, 0.01, data)
"""

from tf_regtopk.simulation.descents import DenseDescent
from tf_regtopk.simulation.descents import SparseDescent
from tf_regtopk.simulation.descents import State
from tf_regtopk.simulation.gossip_descent import GossipDescent
from tf_regtopk.simulation.inner_optimizers import Adam
from tf_regtopk.simulation.inner_optimizers import MomentumSGD
from tf_regtopk.simulation.loop import Data
from tf_regtopk.simulation.loop import gradient_descent
from tf_regtopk.simulation.of_optimizer import descent_of

__all__ = [
    "Adam",
    "Data",
    "DenseDescent",
    "GossipDescent",
    "MomentumSGD",
    "SparseDescent",
    "State",
    "descent_of",
    "gradient_descent",
]
