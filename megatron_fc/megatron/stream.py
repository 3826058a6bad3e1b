"""A residual stream of n/m times the model's width, where Megatron expects that width: between pipeline stages.

The schedules size what stages exchange by `hidden_size` in the config of the outermost model chunk. `widen` gives the
chunks a view of their config that says the stream's width there: it costs nothing. Where no hook of ours runs, the
slots let the stages exchange the shape of every tensor (`exchanges_shapes`), which costs a synchronisation per message.
"""

import copy
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import BaseTransformerLayer
from torch import Tensor, nn

from megatron_fc.connections import ends
from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.errors import UserError
from megatron_fc.megatron.refusals import refuse_unentered_stream


class StreamBorder:
    """What one sub-layer knows of the stream's width, and of who takes it from stage to stage.

    Args:
        connection: options of the site.
        config: of the layer.
        exchanges_shapes: let the stages exchange shapes.

    Attributes:
        enters: the stream begins here, where the model's width arrives.
        is_carried: the stages exchange the stream whole.

    Raises:
        UserError: the layout cannot exchange shapes.
    """

    def __init__(self, connection: ConnectionConfig, config: TransformerConfig, exchanges_shapes: bool) -> None:
        self._connection = connection
        self._width = config.hidden_size
        self._is_wide = connection.is_wide
        self.enters = False
        self.is_carried = not self._is_wide or config.pipeline_model_parallel_size == 1
        if not self.is_carried and exchanges_shapes:
            exchange_shapes(connection, config)
            self.is_carried = True

    def check(self, connection: ConnectionConfig) -> None:
        """Check that this site's stream is as wide as that of another configuration.

        Raises:
            UserError: it is not.
        """
        own, other = (kind.stream_width(self._width) for kind in (self._connection, connection))
        if own != other:
            raise UserError(
                f"the layers have a stream of {own} values per token ({self._connection.label}), and "
                f"{connection.label} has {other}: give widen the configuration that connect was given"
            )

    def entered(self, h: Tensor) -> Tensor:
        """The stream [..., r*d]: h itself, or entered from the model's width [..., d].

        Raises:
            UserError: that width arrives where the stream has begun long since, or stages would cut it.
        """
        if not self._is_wide:
            return h
        if not self.is_carried:
            raise UserError(
                f"{self._connection.label} has a stream of {self._connection.stream_width(self._width)} values per "
                f"token, and the pipeline's stages exchange hidden_size={self._width}: call "
                f"megatron_fc.megatron.stream.widen(models, config) behind the last wrapper of the models"
            )
        if h.shape[-1] != self._width:
            return h  # the site checks it
        if not self.enters:
            raise UserError(
                f"a pipeline stage sent hidden_size={self._width} values per token, and the stream of "
                f"{self._connection.label} has {self._connection.stream_width(self._width)}: let every rank call "
                f"megatron_fc.megatron.stream.widen(models, config) behind the last wrapper of its models"
            )
        return ends.enter(h, self._connection)


def exchange_shapes(connection: ConnectionConfig, config: TransformerConfig) -> None:
    """Let the pipeline's stages exchange the shape of every tensor, and say so.

    Raises:
        UserError: names the layout in which that would hang or not be heard.
    """
    overlaps = config.overlap_p2p_comm or config.virtual_pipeline_model_parallel_size in (None, 1)
    if not overlaps:
        raise UserError(
            f"{connection.label} cannot exchange shapes between virtual pipeline stages without overlap_p2p_comm, "
            f"where the schedule would hang: drop no_overlap_p2p_communication, or use megatron-fc train"
        )
    if getattr(config, "heterogeneous_block_specs", False):
        raise UserError(
            f"{connection.label} cannot exchange shapes between pipeline stages with heterogeneous_block_specs, whose "
            f"layers have configs of their own: call megatron_fc.megatron.stream.widen(models, config) instead"
        )
    if not config.variable_seq_lengths:
        config.variable_seq_lengths = True
        warnings.warn(
            f"{connection.label}: nobody can widen the buffers of this script's pipeline, so its stages exchange the "
            f"shape of every tensor first (variable_seq_lengths), which waits for the device once per message",
            stacklevel=2,
        )


def widen[Models: Sequence[Any] | nn.Module](models: Models, connection: ConnectionConfig) -> Models:
    """Let pipeline stages exchange the whole stream: to be called behind the last wrapper, on every rank.

    A stage of the embedding alone enters the stream. For a stream of the model's width, without pipeline stages and
    for chunks that are widened already nothing happens. Their `config.hidden_size` reads as the stream's width then,
    that of the layers' config does not.

    Args:
        models: this rank's chunks, or the only one, as the schedule gets them.
        connection: of the models' layers.

    Returns:
        The chunks.

    Raises:
        UserError: the layers have no connections or another stream, or a stage of the embedding alone runs in
            Megatron's combined schedule, which leaves that out.
    """
    if not isinstance(connection, ConnectionConfig):
        raise UserError(f"widen takes the models and the configuration of their connections, not {connection!r}")
    for chunk in [models] if isinstance(models, nn.Module) else models:
        _widen(chunk, connection)
    return models


def _widen(chunk: Any, connection: ConnectionConfig) -> None:
    config, model = chunk.config, _unwrapped(chunk)
    modules = list(getattr(model, "decoder", model).modules())
    borders = [module.stream for module in modules if _has_border(module)]
    if not borders and any(isinstance(module, BaseTransformerLayer) for module in modules):
        raise UserError(f"no layer of the model has connections: build it from connect(spec, {connection})")
    for border in borders:
        border.check(connection)
    is_plain = not connection.is_wide or config.pipeline_model_parallel_size == 1
    if is_plain or isinstance(config, _Widened):
        return
    chunk.config = _view(config, connection)
    for module in filter(_has_border, chunk.modules()):
        module.stream.is_carried = True
    _enter_or_check(model, connection, config)


def _has_border(module: Any) -> bool:
    return isinstance(getattr(module, "stream", None), StreamBorder)


class _Widened:
    """Marks the config of a chunk that is widened."""


def _enter_or_check(model: Any, connection: ConnectionConfig, config: TransformerConfig) -> None:
    """Let a stage of the embedding alone enter the stream, and any other that sends it check what it sends."""
    decoder = getattr(model, "decoder", None)
    # With multi-token prediction on a stage of its own Megatron exchanges shapes, and the model's width is sent there.
    if decoder is None or model.post_process or getattr(config, "mtp_standalone", False):
        return
    if decoder.layers or not model.pre_process:
        decoder.register_forward_hook(partial(_checked, connection, config.hidden_size))
        return
    if getattr(config, "overlap_moe_expert_parallel_comm", False):
        refuse_unentered_stream(connection)
    decoder.register_forward_hook(partial(_entered, connection))


def _entered(connection: ConnectionConfig, _decoder: nn.Module, _inputs: Any, h: Tensor) -> Tensor:
    return ends.enter(h, connection)


def _checked(connection: ConnectionConfig, hidden_size: int, _decoder: nn.Module, _inputs: Any, h: Tensor) -> None:
    """A backend may accept a message that is too short for its buffer, and the rest would be what lay there."""
    width = connection.stream_width(hidden_size)
    if h.shape[-1] != width:
        raise UserError(
            f"this pipeline stage would send {h.shape[-1]} values per token, and the next one takes {width}: connect "
            f"the layers of every stage by {connection.label}"
        )


def _view(config: Any, connection: ConnectionConfig) -> Any:
    """The same config, whose `hidden_size` reads as the stream's width and whose stages exchange no shapes.

    Every value lies in the config's own `__dict__`, so that what one is given the other has. A copy or a pickle of the
    view is one of the config: models are built of it.
    """
    width = connection.stream_width(config.hidden_size)
    reads = {
        "hidden_size": property(lambda self: width),
        "variable_seq_lengths": property(lambda self: False),
        "__reduce_ex__": lambda self, protocol: (copy.copy, (config,)),
        "__doc__": f"{type(config).__name__} with the width of the stream",
    }
    view: Any = object.__new__(type(f"Wide{type(config).__name__}", (_Widened, type(config)), reads))
    view.__dict__ = config.__dict__
    return view


def _unwrapped(chunk: Any) -> Any:
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk
