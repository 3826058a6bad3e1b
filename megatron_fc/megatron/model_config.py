"""A model configuration of Megatron's training loop, prepared for connections: what a layer spec alone cannot do."""

import math
from argparse import Namespace
from functools import partial
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.connections.config import HyperConfig
from megatron_fc.megatron.parameter_order import install_order
from megatron_fc.megatron.stream import widen


def prepare(model_config: Any, connection: ConnectionConfig, args: Namespace | None) -> None:
    """Order the parameters, let pipeline stages exchange the whole stream, scale output projections; once.

    Args:
        model_config: GPTModelConfig or HybridModelConfig.
        connection: of the model's layers.
        args: of Megatron's training loop, in which the order is noted.
    """
    install_order(model_config, args)
    if connection.is_wide and not any(isinstance(hook, _Widening) for hook in model_config.post_wrap_hooks):
        model_config.post_wrap_hooks.append(_Widening(widen, connection=connection))
    scale_output_projections(model_config.transformer, connection)


class _Widening(partial[Any]):
    """`widen` as a hook."""


def scale_output_projections(config: TransformerConfig, connection: ConnectionConfig) -> None:
    """Multiply the initial output projections of attention and MLP by sqrt(n), as Hyper-Connections are to start.

    To be called before a model is built, once per config; weights that are loaded stay as they are. All streams are
    equal at first, and a sub-layer's output is written to each (arXiv 2409.19606, section 3). Other kinds have no
    such rule.
    """
    initial = config.output_layer_init_method
    if isinstance(connection, HyperConfig) and connection.is_wide and not isinstance(initial, _Scaled):
        config.output_layer_init_method = _Scaled(initial, math.sqrt(connection.slots / connection.fractions))


class _Scaled:
    """An initialisation, its values multiplied by a factor."""

    def __init__(self, initial: Any, factor: float) -> None:
        self._initial = initial
        self._factor = factor

    def __call__(self, weight: Tensor) -> Any:
        result = self._initial(weight)
        weight.data.mul_(self._factor)
        return result
