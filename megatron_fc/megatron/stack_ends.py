"""The end of a stack of layers, where a stream that is wider than the model is left: in front of the final norm.

Megatron's own norm stays, with its keys in checkpoints. A learned leave lies in it, as its child `connection`.
"""

from typing import Any

from megatron.core.models.hybrid.hybrid_block import HybridStack
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.errors import UserError
from megatron_fc.megatron.own_parameters import mark_parameters, network_seed, without_drawing
from megatron_fc.megatron.stream import exchange_shapes


class LeavingNorm:
    """A builder for the slot of a final norm: the slot's own norm, in front of which the stream is left.

    Args:
        norm: the slot's own builder.
        connection: options of the layers' connections.
        exchanges_shapes: as of `megatron_fc.megatron.stream.StreamBorder`.
    """

    def __init__(self, norm: LayerNormBuilder, connection: ConnectionConfig, exchanges_shapes: bool = False) -> None:
        self._norm = norm
        self._connection = connection
        self._exchanges_shapes = exchanges_shapes

    def __call__(self, config: TransformerConfig, hidden_size: int, eps: float) -> Any:
        if self._exchanges_shapes and config.pipeline_model_parallel_size > 1:
            exchange_shapes(self._connection, config)
        return leave_before(self._norm(config=config, hidden_size=hidden_size, eps=eps), self._connection, config)


def leave_before(norm: Any, connection: ConnectionConfig, config: TransformerConfig) -> Any:
    """Let a norm leave the stream of its input first; returns it."""
    with without_drawing():
        leave: Any = connection.build_leave(config.hidden_size)
    leave.place(network_seed())
    mark_parameters(leave, config)
    norm.connection = leave
    norm.register_forward_pre_hook(_leave)
    return norm


def _leave(norm: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    h, *rest = inputs
    return (norm.connection(h), *rest)


class ConnectedHybridStack(HybridStack):
    """Megatron's hybrid stack, whose final norm is in no slot.

    Args:
        connection: options of the layers' connections.
        exchanges_shapes: as of `LeavingNorm`.
    """

    def __init__(
        self, config: TransformerConfig, *args: Any, connection: ConnectionConfig, exchanges_shapes: bool, **kwargs: Any
    ) -> None:
        super().__init__(config, *args, **kwargs)
        norm: nn.Module | None = getattr(self, "final_norm", None)
        if norm is None:
            return
        if exchanges_shapes and config.pipeline_model_parallel_size > 1:
            exchange_shapes(connection, config)
        leave_before(norm, connection, config)


def refuse_no_end(name: str, connection: ConnectionConfig) -> UserError:
    """The error for a spec that has no slot for a final norm, for a connection whose stream has to be left."""
    return UserError(
        f"{name} has no final norm, in front of which the streams of {connection.label} become one again: pass the "
        f"block of it, megatron_fc.megatron.specs.block_spec(spec, config), or the spec of a hybrid stack"
    )
