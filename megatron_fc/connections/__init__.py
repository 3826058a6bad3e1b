"""What a connection between sub-layers is. torch alone, never Megatron.

Read `base`, `config`, `reference` and `frac` first.
"""

from megatron_fc.connections.config import FracConfig, HyperConfig

__all__ = ["FracConfig", "HyperConfig"]
