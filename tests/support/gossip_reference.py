"""Decentralised training in float64 NumPy, kept plainly in papers' notation.

Independent of the package: nothing is imported from it. The rows of X are the
weights of the N nodes, W is the mixing matrix of the step. Gradients are those
of the weights before the nodes exchange anything, as in D-PSGD.
"""

import numpy as np
import reference


def top_k(rows, k):
    """C: of each row the k entries of largest magnitude."""
    kept = np.zeros_like(rows)
    for row, result in zip(rows, kept, strict=True):
        chosen = reference.largest(np.abs(row), k)
        result[chosen] = row[chosen]
    return kept


def everything(rows):
    """C of an exchange that compresses nothing."""
    return rows.copy()


class DPSGD:
    """X_{t+1} = W X_t - lr G(X_t)."""

    def __init__(self, x, compress=everything, gamma=1.0):
        self.x, self.compress, self.gamma = x.copy(), compress, gamma

    def step(self, w, update):
        """One step; `update` is what the local optimizers add, lr included."""
        c = self.compress(self.x)
        self.x = self.x + self.gamma * (w @ c - c) + update


class CHOCO:
    """Each node keeps x^_j of itself and of all its neighbours."""

    def __init__(self, x, compress=everything, gamma=1.0):
        self.x, self.compress, self.gamma = x.copy(), compress, gamma
        self.x_hat = x.copy()

    def step(self, w, update):
        q = self.compress(self.x - self.x_hat)
        self.x_hat = self.x_hat + q
        x = self.x.copy()
        for i in range(len(x)):
            for j in range(len(x)):
                x[i] += self.gamma * w[i, j] * (self.x_hat[j] - self.x_hat[i])
        self.x = x + update


class DeepSqueeze:
    """Each node adds to x what its compression has left out before."""

    def __init__(self, x, compress=everything, gamma=1.0):
        self.x, self.compress, self.gamma = x.copy(), compress, gamma
        self.delta = np.zeros_like(x)

    def step(self, w, update):
        v = self.x + self.delta
        c = self.compress(v)
        self.delta = v - c
        self.x = self.x + self.gamma * (w @ c - c) + update


class NGO:
    """Nonlinear gossip: each node compares its weights with its neighbours'."""

    def __init__(self, x, alpha, epsilon):
        self.x, self.alpha, self.epsilon = x.copy(), alpha, epsilon

    def step(self, w, update):
        x = self.x.copy()
        for i in range(len(x)):
            for j in range(len(x)):
                delta = self.x[j] - self.x[i]
                power = np.sign(delta) * np.abs(delta) ** self.alpha
                x[i] += self.epsilon * w[i, j] * power
        self.x = x + update


class FODAC:
    """z_i tracks the mean of what the nodes have, omega."""

    def __init__(self, omega):
        self.z, self.omega = omega.copy(), omega.copy()

    def step(self, w, omega):
        """After all nodes have got new numbers."""
        self.z = w @ self.z + (omega - self.omega)
        self.omega = omega.copy()


class DACFL(DPSGD):
    """D-PSGD whose nodes track the mean of their weights by FODAC."""

    def __init__(self, x):
        super().__init__(x)
        self.tracker = FODAC(x)

    def step(self, w, update):
        super().step(w, update)
        self.tracker.step(w, self.x)


def scaled_signs(row):
    """C of CompNGC: the sign of each entry, times their mean magnitude."""
    return np.where(row < 0, -1.0, 1.0) * np.abs(row).mean()


class NGC(DPSGD):
    """D-PSGD with gradients at the weights, and on the data, of neighbours."""

    def __init__(self, x, alpha, compress=None, has_feedback=True):
        super().__init__(x)
        self.alpha, self.compress_gradient = alpha, compress
        self.has_feedback = has_feedback
        self.error = {}

    def gradients(self, w, gradient_of):
        """Those for the local optimizers; `gradient_of(i, x)` is node i's."""
        g = np.zeros_like(self.x)
        for i, x_i in enumerate(self.x):
            for j, x_j in enumerate(self.x):
                if w[i, j] == 0:
                    continue
                at_weights = gradient_of(i, x_j)
                on_data = at_weights
                if j != i:
                    on_data = self.sent_back(j, i, gradient_of(j, x_i))
                g[i] += (1 - self.alpha) * w[i, j] * at_weights
                g[i] += self.alpha * w[i, j] * on_data
        return g

    def sent_back(self, j, i, gradient):
        """What node j tells node i."""
        if self.compress_gradient is None:
            return gradient
        p = gradient + self.error.get((j, i), 0)
        delta = self.compress_gradient(p)
        if self.has_feedback:
            self.error[j, i] = p - delta
        return delta


def disagreement(x):
    """The consensus distance, sqrt of the mean of |x_i - mean|^2."""
    return np.sqrt(((x - x.mean(axis=0)) ** 2).sum(axis=1).mean())
