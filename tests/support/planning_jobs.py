"""Jobs for the cost model."""

from tf_regtopk.planning import cost_model

METHODS = {method.name: method for method in cost_model.METHODS}


def make_job(**kwargs):
    defaults = {"parameters": 10**7, "workers": 16, "step_seconds": 0.2}
    return cost_model.Job(**(defaults | kwargs))
