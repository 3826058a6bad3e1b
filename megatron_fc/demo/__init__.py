"""`run`: the same small MoE with plain residuals and with Frac-Connections, on real text, compared."""
