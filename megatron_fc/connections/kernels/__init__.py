"""Fused Triton kernels of Frac-Connections; only this folder imports Triton."""
