"""Sparsifiers: the choice of the k entries that a replica sends.

A sparsifier is a pair: a pure score function in the notation of its paper, and
a small immutable record of its hyper-parameters. Each step a replica sends the
k entries whose scores have the largest magnitude.

Notation, for one replica: a is the accumulated gradient, `sent` the part of it
that the replica sent, agg the sum of `sent` over all replicas; a superscript
t-1 marks the previous step. Under `tf.distribute` Keras divides the loss by the
number of replicas, so a already carries the weight 1/N of its replica.
"""

from tf_regtopk.sparsifiers.base import Sparsifier
from tf_regtopk.sparsifiers.dense import Dense
from tf_regtopk.sparsifiers.random_k import random_k_score
from tf_regtopk.sparsifiers.random_k import RandomK
from tf_regtopk.sparsifiers.reg_top_k import reg_top_k_score
from tf_regtopk.sparsifiers.reg_top_k import RegTopK
from tf_regtopk.sparsifiers.top_k import top_k_score
from tf_regtopk.sparsifiers.top_k import TopK

__all__ = [
    "Dense",
    "RandomK",
    "RegTopK",
    "Sparsifier",
    "TopK",
    "random_k_score",
    "reg_top_k_score",
    "top_k_score",
]
