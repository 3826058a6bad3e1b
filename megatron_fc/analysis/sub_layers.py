"""The sub-layers of this rank's part of a model, connected or plain, and what goes into each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityFuncOp
from torch import Tensor

from megatron_fc.connections.eager import width_forward
from megatron_fc.megatron.slots import NormSlot
from megatron_fc.megatron.specs.connected import SITES

_NAMES = {"input_layernorm": "attention", "pre_mlp_layernorm": "mlp", "norm": "mamba"}


@dataclass(frozen=True)
class SubLayer:
    """A sub-layer.

    Attributes:
        number: in the network, from 0.
        layer: number of its layer, from 1.
        name: attention, mlp or mamba.
        slot: the module in the slot of its norm, which is given the stream.
    """

    number: int
    layer: int
    name: str
    slot: Any

    @property
    def site(self) -> Any:
        """Its connection, None where residuals are plain."""
        return self.slot.connection if isinstance(self.slot, NormSlot) else None

    def stream(self, h: Tensor) -> Tensor:
        """The stream, from what the slot is given: the first one gets an embedding."""
        site = self.site
        return site.enter(h) if site is not None and h.shape[-1] != site.stream_width else h

    def input(self, h: Tensor) -> Tensor:
        """What goes into the sub-layer before its norm, [..., d], from the stream."""
        if self.site is None:
            return h
        x = width_forward(h, self.site.operands())[0]
        assert x is not None
        return x


def sub_layers(model: Any) -> list[SubLayer]:
    """Return the sub-layers of a model's decoder, in order; those of multi-token prediction left out."""
    found: list[SubLayer] = []
    for layer in model.decoder.layers:
        slots = [norm for norm, add in SITES[type(layer)] if not isinstance(getattr(layer, add), IdentityFuncOp)]
        for place, name in enumerate(slots):
            number = (layer.layer_number - 1) * len(slots) + place
            found.append(SubLayer(number, layer.layer_number, _NAMES[name], getattr(layer, name)))
    return found


class Streams:
    """A context in which every sub-layer's stream is handed to a function, each time that the model runs.

    Args:
        model: this rank's part.
        see: given the sub-layer and its stream [s, b, n*c].
    """

    def __init__(self, model: Any, see: Callable[[SubLayer, Tensor], None]) -> None:
        self._model, self._see = model, see
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        for sub_layer in sub_layers(self._model):
            self._handles.append(sub_layer.slot.register_forward_pre_hook(self._hook(sub_layer)))

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, sub_layer: SubLayer) -> Callable[..., None]:
        def hook(_: Any, inputs: tuple[Tensor, ...]) -> None:
            with torch.no_grad():
                self._see(sub_layer, sub_layer.stream(inputs[0].detach()))

        return hook
