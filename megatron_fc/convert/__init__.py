"""Checkpoints from and to other models: `upcycle` gives a plain one connections, and takes them away."""
