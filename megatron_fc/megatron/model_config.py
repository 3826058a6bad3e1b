"""A model configuration of Megatron's training loop, prepared for connections: what a layer spec alone cannot do."""

from argparse import Namespace
from functools import partial
from typing import Any

from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.megatron.output_projections import scale_output_projections
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
