"""The algorithms in float64 NumPy, kept plainly in their papers' notation.

Independent of the package: nothing is imported from it.
"""

import math

import numpy as np


def k_of(density, num_entries):
    return max(1, round(density * num_entries))


def largest(scores, k):
    """Positions of the k largest scores, lower positions first in ties."""
    return np.sort(np.argsort(-scores, kind="stable")[:k])


class Workers:
    """N workers with weights w_n = 1/N that sparsify their gradients.

    The local gradients g_n are those of the workers' own losses; nothing is
    divided by N before the aggregation, unlike in the package.

    Args:
        method: "topk", "regtopk" or "randomk".
        num_workers: N.
        sizes: Number of entries of each variable.
        density: Share of entries sent.
        scope: "global" or "per_variable".
        mu, q, denominator: RegTop-k's.
        seed: Random-k's.
        feedback: A rule of error feedback, `Accumulate` if None.
        values: "float32", or "ternary": signs and one magnitude, the mean.
    """

    def __init__(
        self,
        method,
        num_workers,
        sizes,
        density,
        scope="global",
        mu=4.0,
        q=1e8,
        denominator="previous",
        seed=0,
        feedback=None,
        values="float32",
    ):
        self.values = values
        self.method, self.num_workers = method, num_workers
        self.groups = [sum(sizes)] if scope == "global" else list(sizes)
        self.density, self.mu, self.q = density, mu, q
        self.denominator, self.seed = denominator, seed
        size = sum(sizes)
        self.w = 1.0 / num_workers
        self.t = 0
        self.feedback = feedback or Accumulate()
        self.feedback.start(num_workers, size, density)
        # a^{t-1}, s^{t-1} and the aggregate of the previous round.
        self.a_prev = np.zeros((num_workers, size))
        self.s_prev = np.zeros((num_workers, size), bool)
        self.agg_prev = np.zeros(size)

    def score(self, n, a):
        if self.method == "topk":
            return np.abs(a)
        if self.method == "randomk":
            return random_scores(len(a), self.seed, self.t)
        delta = np.full(len(a), self.q)
        for j in np.flatnonzero(self.s_prev[n]):
            divisor = self.w * (
                self.a_prev[n, j] if self.denominator == "previous" else a[j]
            )
            difference = self.agg_prev[j] - self.w * self.a_prev[n, j]
            # A value of 0 counts as not sent.
            if divisor != 0 and self.a_prev[n, j] != 0:
                delta[j] = difference / divisor
        return np.abs(a) * np.tanh(np.abs(1 + delta) / self.mu)

    def step(self, g, learning_rate=1.0):
        """The aggregate `[J]` of the gradients g `[N, J]` of one round."""
        a = self.feedback.accumulate(g, learning_rate)
        s = np.zeros(a.shape, bool)
        for n in range(self.num_workers):
            scores = self.score(n, a[n])
            start = 0
            for size in self.groups:
                part = scores[start : start + size]
                chosen = largest(part, k_of(self.density, size))
                s[n, start + chosen] = True
                start += size
        sent = np.where(s, a, 0.0)
        if self.values == "ternary":
            means = np.abs(sent).sum(axis=1) / s.sum(axis=1)
            sent = np.sign(sent) * means[:, np.newaxis]
        s, sent = self.arrive(s, sent)
        agg = np.sum(self.w * sent, axis=0)
        result = self.feedback.update(a, s, sent, agg)
        self.a_prev, self.s_prev, self.agg_prev = a, s, agg
        self.t += 1
        return result

    def arrive(self, s, sent):
        """The mask and the values that are in the sum: by an all-gather all."""
        return s, sent


class ScatteredWorkers(Workers):
    """Workers whose entries are summed by owners, which keep the largest sums.

    There is room for all entries at the sender.

    Args:
        keep: The number of sums that an owner keeps, in units of k / N.
    """

    def __init__(self, *args, keep, **kwargs):
        super().__init__(*args, **kwargs)
        self.keep = keep

    def arrive(self, s, sent):
        n, size = s.shape
        position = np.arange(size) // n
        owner = (np.arange(size) + (mix(position) >> 9)) % n
        k = s.sum() // n
        total = np.abs(sent.sum(axis=0))
        accepted = np.zeros(size, bool)
        for i in range(n):
            own = np.flatnonzero(owner == i)
            number = min(math.ceil(self.keep * k / n), len(own))
            accepted[own[largest(total[own], number)]] = True
        accepted &= total > 0
        if hasattr(self.feedback, "rate_from"):
            self.feedback.rate_from(np.mean(s & accepted))
        return s & accepted, np.where(accepted, sent, 0.0)


class Accumulate:
    """e_n for each worker; with momentum u_n as well."""

    def __init__(
        self,
        momentum=0.0,
        factor_masking=False,
        clip_norm=None,
        follow_learning_rate=False,
    ):
        self.momentum, self.factor_masking = momentum, factor_masking
        self.clip_norm = clip_norm
        self.follow_learning_rate = follow_learning_rate
        self.last_rate = None

    def start(self, num_workers, size, density):
        self.e = np.zeros((num_workers, size))
        self.u = np.zeros((num_workers, size))

    def accumulate(self, g, learning_rate):
        if self.clip_norm is not None:
            # The package's gradients carry the weight 1/N.
            norms = np.linalg.norm(g, axis=1, keepdims=True) / len(g)
            g = g * np.minimum(1, self.clip_norm / len(g) ** 0.5 / norms)
        if self.follow_learning_rate and self.last_rate is not None:
            self.e = self.e * (self.last_rate / learning_rate)
        self.last_rate = learning_rate
        self.u = self.momentum * self.u + g
        return self.e + self.u

    def update(self, a, s, sent, agg):
        self.e = a - sent
        if self.factor_masking:
            self.u = np.where(s, 0.0, self.u)
        return agg


class NoFeedback:
    def start(self, num_workers, size, density):
        pass

    def accumulate(self, g, learning_rate):
        return g

    def update(self, a, s, sent, agg):
        return agg


class EF21:
    """h_n and v_n for each worker; the aggregate is the mean of all h_n."""

    def __init__(self, momentum=1.0):
        self.momentum = momentum

    def start(self, num_workers, size, density):
        self.h = np.zeros((num_workers, size))
        self.v = np.zeros((num_workers, size))

    def accumulate(self, g, learning_rate):
        self.v = (1 - self.momentum) * self.v + self.momentum * g
        return self.v - self.h

    def update(self, a, s, sent, agg):
        self.h = self.h + sent
        return self.h.mean(axis=0)


class LearnedShift:
    """e_n, h_n and u_n for each worker, and p for all."""

    def __init__(
        self, rate=None, momentum=0.0, factor_masking=False, at_once=False
    ):
        self.rate, self.momentum = rate, momentum
        self.factor_masking, self.scale = factor_masking, 1.0
        if at_once:
            self.momentum, self.scale = 0.0, 1 / (1 - momentum)

    def start(self, num_workers, size, density):
        self.e, self.h, self.u = np.zeros((3, num_workers, size))
        self.p = np.zeros(size)
        self.is_rate_given = self.rate is not None
        self.rate_from(k_of(density, size) / size)

    def rate_from(self, share):
        if not self.is_rate_given:
            self.rate = share

    def accumulate(self, g, learning_rate):
        self.u = self.momentum * self.u + self.scale * g - self.h
        return self.e + self.u

    def update(self, a, s, sent, agg):
        self.e = a - sent
        self.p = self.momentum * self.p + self.h.mean(axis=0)
        self.h = self.h + self.rate * (1 - self.momentum) * sent
        if self.factor_masking:
            self.u = np.where(s, 0.0, self.u)
        return agg + self.p


class LocalAdam:
    """A mean of the squares of each worker, and what the inner rule keeps."""

    def __init__(
        self, error_feedback=None, beta_1=0.9, beta_2=0.999, epsilon=0.1
    ):
        self.inner = error_feedback or Accumulate()
        self.beta_2, self.epsilon = beta_2, epsilon

    def start(self, num_workers, size, density):
        self.inner.start(num_workers, size, density)
        self.squares = []

    def accumulate(self, g, learning_rate):
        self.squares.insert(0, g**2)
        weights = self.beta_2 ** np.arange(len(self.squares))
        mean = np.tensordot(weights, self.squares, 1) / weights.sum()
        rms = np.sqrt(mean.mean(axis=1, keepdims=True))
        x = g / (np.sqrt(mean) + self.epsilon * rms)
        return self.inner.accumulate(x, learning_rate)

    def update(self, a, s, sent, agg):
        return self.inner.update(a, s, sent, agg)


class CompressedDownlink:
    """E for all, of a sum that is sparsified and made ternary."""

    def __init__(self, error_feedback=None, density=None, values="ternary"):
        self.inner = error_feedback or Accumulate()
        self.density, self.values = density, values

    def start(self, num_workers, size, density):
        self.inner.start(num_workers, size, density)
        self.error = np.zeros(size)
        self.k = k_of(self.density or density, size)

    def accumulate(self, g, learning_rate):
        return self.inner.accumulate(g, learning_rate)

    def update(self, a, s, sent, agg):
        a = self.error + self.inner.update(a, s, sent, agg)
        chosen = largest(np.abs(a), self.k)
        result = np.zeros(len(a))
        result[chosen] = a[chosen]
        if self.values == "ternary":
            result[chosen] = np.sign(a[chosen]) * np.abs(a[chosen]).mean()
        self.error = a - result
        return result


def mix(x):
    """A permutation of 32-bit words that looks random."""
    mask = 2**32 - 1
    x = x ^ x >> 16
    x = x * 0x85EBCA6B & mask
    x = x ^ x >> 13
    x = x * 0xC2B2AE35 & mask
    return x ^ x >> 16


def random_scores(size, seed, step):
    """Hash of seed, step and position, uniform in [0, 1)."""
    mask = 2**32 - 1

    def score(j):
        return (
            mix((mix((j + mix(step)) & mask) + mix(seed)) & mask) >> 8
        ) / 2**24

    return np.array([score(j) for j in range(size)])
