"""The family of connections in NumPy float64, token by token and index by index, written from the papers' equations.

It shares no code with the package. Parameters come as a dict of arrays under the names of a module's parameters. Tables
are [source slot, destination]. A test that plants an error changes them between `coefficients` and `read` or `write`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

Parameters = dict[str, np.ndarray]
Tables = tuple[np.ndarray, np.ndarray, np.ndarray]


def coefficients(token: np.ndarray, p: Parameters, config: Any) -> Tables:
    """For one token [n*c]: beta [n], gamma [n, m], alpha [n, n]."""
    return _on_manifold(token, p, config) if "mapping_weight" in p else _per_slot(token, p, config)


def cycles(config: Any) -> list[int]:
    """The fraction of a sub-layer's output that is written to each slot: in turns, 0, 1, .., m-1, 0, 1, .."""
    return [j % config.fractions for j in range(config.slots)]


def read(token: np.ndarray, gamma: np.ndarray) -> np.ndarray:
    """x_i = sum_j gamma_ji h_j, [d]."""
    n, m = gamma.shape
    c = token.size // n
    x = np.zeros(m * c)
    for i in range(m):
        for j in range(n):
            x[i * c : (i + 1) * c] += gamma[j, i] * token[j * c : (j + 1) * c]
    return x


def write(o: np.ndarray, token: np.ndarray, beta: np.ndarray, alpha: np.ndarray, turns: Sequence[int]) -> np.ndarray:
    """h'_j = beta_j o_turns[j] + sum_k alpha_kj h_k, [n*c]."""
    n = beta.size
    c = token.size // n
    h = np.zeros_like(token)
    for j in range(n):
        h[j * c : (j + 1) * c] = beta[j] * o[turns[j] * c : (turns[j] + 1) * c]
        for k in range(n):
            h[j * c : (j + 1) * c] += alpha[k, j] * token[k * c : (k + 1) * c]
    return h


def _per_slot(token: np.ndarray, p: Parameters, config: Any) -> Tables:
    """FC eq. 9-14, HC eq. 10-13: row j of every table from slot j alone."""
    n, m = config.slots, config.fractions
    c = token.size // n
    beta, gamma, alpha = np.zeros(n), np.zeros((n, m)), np.zeros((n, n))
    for j in range(n):
        beta[j] = p["static_beta"][j]
        for i in range(m):
            gamma[j, i] = p["static_gamma"][j * m + i]
        for k in range(n):
            alpha[j, k] = p["static_alpha"][j * n + k]
        if not config.dynamic:
            continue
        slot = token[j * c : (j + 1) * c]
        if config.norm == "layernorm":
            slot = slot - slot.mean()
        if config.norm != "none":
            slot = slot / np.sqrt((slot**2).mean() + config.norm_eps) * p.get("norm_weight", 1.0)
        z = [float(np.dot(slot, row)) for row in p["dynamic_weight"]]
        z = [float(np.tanh(value)) for value in z] if config.tanh else z
        s_beta, s_alpha = (float(p[name][0]) if name in p else 1.0 for name in ("scale_beta", "scale_alpha"))
        if config.dynamic_beta is not False:
            beta[j] += s_beta * z.pop(0)
        if config.dynamic_alpha is not False:
            for i in range(m):
                gamma[j, i] += s_alpha * z[i]
            for k in range(n):
                alpha[j, k] += s_alpha * z[m + k]
    return beta, gamma, alpha


def _on_manifold(token: np.ndarray, p: Parameters, config: Any) -> Tables:
    """mHC section 4.2, with the epsilons of DeepSeek-V4."""
    n, m, eps = config.slots, config.fractions, config.sinkhorn_eps
    u = token / np.sqrt((token**2).mean() + config.norm_eps)
    z = [float(np.dot(u, row)) for row in p["mapping_weight"]]
    kinds = [0] * (n * m) + [1] * n + [2] * (n * n)
    logits = [p["mapping_scale"][k] * value + b for k, value, b in zip(kinds, z, p["mapping_bias"], strict=True)]
    gamma, beta, alpha = np.zeros((n, m)), np.zeros(n), np.zeros((n, n))
    for j in range(n):
        for i in range(m):
            gamma[j, i] = 1 / (1 + np.exp(-logits[j * m + i])) + eps
        beta[j] = 2 / (1 + np.exp(-logits[n * m + j]))
        row = np.exp(logits[n * m + n + j * n : n * m + n + (j + 1) * n])
        alpha[j] = row / row.sum() + eps
    for turn in range(2 * config.sinkhorn_iterations - 1):
        for index in range(n):
            if turn % 2 == 0:
                alpha[:, index] /= alpha[:, index].sum() + eps
            else:
                alpha[index] /= alpha[index].sum() + eps
    return beta, gamma, alpha
