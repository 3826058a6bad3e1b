"""The size of the output projections of attention and MLP at the start of a model with Hyper-Connections."""

import math
import warnings
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.connections.config import HyperConfig


def scale_output_projections(config: TransformerConfig, connection: ConnectionConfig) -> None:
    """Multiply the initial output projections of attention and MLP by sqrt(n), as Hyper-Connections are to start.

    To be called before a model is built, once per config; weights that are loaded stay as they are. All streams are
    equal at first, and a sub-layer's output is written to each (arXiv 2409.19606, section 3). Other kinds have no
    such rule, and `scale_output_init=False` turns it off.
    """
    if _is_due(config, connection):
        factor = math.sqrt(connection.slots / connection.fractions)
        config.output_layer_init_method = _Scaled(config.output_layer_init_method, factor)


def announce_unscaled(config: TransformerConfig, connection: ConnectionConfig) -> None:
    """Say that a model of this config starts with output projections of the plain size, where that is not the rule."""
    if _is_due(config, connection):
        warnings.warn(
            f"{connection.label} starts with output projections of the plain size: unless weights are loaded, call "
            f"megatron_fc.megatron.output_projections.scale_output_projections(config, connection) before the model "
            f"is built, or set scale_output_init=False",
            stacklevel=2,
        )


def _is_due(config: TransformerConfig, connection: ConnectionConfig) -> bool:
    if not isinstance(connection, HyperConfig) or not connection.scale_output_init:
        return False
    return connection.is_wide and not isinstance(config.output_layer_init_method, _Scaled)


class _Scaled:
    """An initialisation, its values multiplied by a factor."""

    def __init__(self, initial: Any, factor: float) -> None:
        self._initial = initial
        self._factor = factor

    def __call__(self, weight: Tensor) -> Any:
        result = self._initial(weight)
        weight.data.mul_(self._factor)
        return result
