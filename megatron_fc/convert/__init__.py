"""Checkpoints from and to other models: `upcycle` gives a plain one Frac-Connections, and takes them away."""
