"""Connections between sub-layers: what they compute, hold and cost. torch alone, never Megatron.

Read `base`, `config`, `reference` and `site` first.
"""

from megatron_fc.connections.config import FracConfig, HyperConfig, ManifoldConfig

__all__ = ["FracConfig", "HyperConfig", "ManifoldConfig"]
