"""Frac-Connections in NumPy float64, token by token and index by index, written from the paper's equations.

It shares no code with the package. Parameters come as a dict of arrays under the names of the module's parameters.
"""

import numpy as np

Parameters = dict[str, np.ndarray]


def _normalise(fraction: np.ndarray, norm: str, weight: np.ndarray | None, eps: float) -> np.ndarray:
    if norm == "none":
        return fraction
    centred = fraction - fraction.mean() if norm == "layernorm" else fraction
    return centred / np.sqrt((centred**2).mean() + eps) * weight


def coefficients(
    token: np.ndarray, p: Parameters, m: int, norm: str, tanh: bool, eps: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Equations 9-14 for one token [d]: beta [m], gamma [m, m], alpha [m, m], rows are source fractions."""
    c = token.size // m
    beta, gamma, alpha = np.zeros(m), np.zeros((m, m)), np.zeros((m, m))
    for i in range(m):
        beta[i] = p["static_beta"][i]
        for j in range(m):
            gamma[i, j] = p["static_gamma"][i * m + j]
            alpha[i, j] = p["static_alpha"][i * m + j]
        if "dynamic_weight" not in p:
            continue
        n = _normalise(token[i * c : (i + 1) * c], norm, p.get("norm_weight"), eps)
        z = [float(np.dot(n, row)) for row in p["dynamic_weight"]]
        z = [float(np.tanh(value)) for value in z] if tanh else z
        s_beta = float(p["scale_beta"][0]) if "scale_beta" in p else 1.0
        s_alpha = float(p["scale_alpha"][0]) if "scale_alpha" in p else 1.0
        beta[i] += s_beta * z[0]
        for j in range(m):
            gamma[i, j] += s_alpha * z[1 + j]
            alpha[i, j] += s_alpha * z[1 + m + j]
    return beta, gamma, alpha


def width(token: np.ndarray, p: Parameters, m: int, norm: str, tanh: bool, eps: float) -> np.ndarray:
    """Equation 8, first half: x_j = sum_i gamma_ij h_i."""
    c = token.size // m
    _, gamma, _ = coefficients(token, p, m, norm, tanh, eps)
    x = np.zeros_like(token)
    for j in range(m):
        for i in range(m):
            x[j * c : (j + 1) * c] += gamma[i, j] * token[i * c : (i + 1) * c]
    return x


def depth(o: np.ndarray, token: np.ndarray, p: Parameters, m: int, norm: str, tanh: bool, eps: float) -> np.ndarray:
    """Equation 8, second half: h'_j = beta_j o_j + sum_i alpha_ij h_i."""
    c = token.size // m
    beta, _, alpha = coefficients(token, p, m, norm, tanh, eps)
    h = np.zeros_like(token)
    for j in range(m):
        h[j * c : (j + 1) * c] = beta[j] * o[j * c : (j + 1) * c]
        for i in range(m):
            h[j * c : (j + 1) * c] += alpha[i, j] * token[i * c : (i + 1) * c]
    return h
