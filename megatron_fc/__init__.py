"""Frac-Connections (arXiv 2503.14125) for Megatron-LM. Importing this loads neither torch nor Megatron."""

from typing import TYPE_CHECKING

from megatron_fc.connections.config import FracConfig, HyperConfig, ManifoldConfig
from megatron_fc.errors import UserError

if TYPE_CHECKING:
    from megatron_fc.connections.frac import FracConnection

__all__ = ["FracConfig", "FracConnection", "HyperConfig", "ManifoldConfig", "UserError"]
__version__ = "0.2.0"


def __getattr__(name: str) -> object:
    # torch is loaded by the first use of FracConnection: `megatron-fc doctor` must run where torch does not.
    if name == "FracConnection":
        from megatron_fc.connections.frac import FracConnection

        return FracConnection
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
