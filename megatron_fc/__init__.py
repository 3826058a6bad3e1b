"""Frac-Connections (arXiv 2503.14125) for Megatron-LM. Importing this loads neither Megatron nor Triton."""

from megatron_fc.config import FracConfig
from megatron_fc.connection import FracConnection
from megatron_fc.errors import UserError

__all__ = ["FracConfig", "FracConnection", "UserError"]
__version__ = "0.1.0"
