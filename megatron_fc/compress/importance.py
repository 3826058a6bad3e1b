"""Importance scores of layers, heads, experts and neurons on some data, as Minitron's (arXiv 2407.14679).

All are sums over tokens of activations, so no gradient is needed: the norm of a head's output, the magnitude of a
neuron's activation, the routing probability that an expert receives, and by how much a layer turns the residual stream.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import mpu
from torch import Tensor, nn


class Importance:
    """A context in which a GPTModel's forward passes are scored; every rank holds the whole model.

    Attributes:
        layers: [layers], 1 - cosine of a layer's input and output.
        heads: per layer, [heads].
        experts: per MoE layer, [experts].
        neurons: by (layer, expert), the expert None in a dense layer: [ffn].
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._handles: list[Any] = []
        self.layers = torch.zeros(len(model.decoder.layers))
        self.heads: dict[int, Tensor] = {}
        self.experts: dict[int, Tensor] = {}
        self.neurons: dict[tuple[int, int | None], Tensor] = {}

    def __enter__(self) -> "Importance":
        for index, layer in enumerate(self._model.decoder.layers):
            self._handles.append(layer.register_forward_hook(self._turn(index), with_kwargs=True))
            attention = layer.self_attention
            heads = attention.config.num_attention_heads
            self._sum_input(attention.linear_proj, self.heads, index, lambda x, n=heads: _head_norms(x, n))
            if hasattr(layer.mlp, "router"):
                self._handles.append(layer.mlp.router.register_forward_hook(self._routed(index)))
                for expert, mlp in enumerate(layer.mlp.experts.local_experts):
                    self._sum_input(mlp.linear_fc2, self.neurons, (index, expert), torch.abs)
            else:
                self._sum_input(layer.mlp.linear_fc2, self.neurons, (index, None), torch.abs)
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
        group = mpu.get_data_parallel_group(with_context_parallel=True)
        for scores in [self.layers, *self.heads.values(), *self.experts.values(), *self.neurons.values()]:
            on_device = scores.to(torch.cuda.current_device())
            torch.distributed.all_reduce(on_device, group=group)
            scores.copy_(on_device)

    def _sum_input(self, module: nn.Module, into: dict[Any, Tensor], key: Any, score: Any) -> None:
        """Add up `score` of what a linear layer gets, [..., features], over all but the last dimension."""

        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            _add(into, key, score(inputs[0].float()).flatten(0, -2).sum(0))

        # A size that is known before the data: an expert may never be called.
        weight: Any = module.weight
        into[key] = torch.zeros(score(weight.new_zeros(1, weight.shape[1])).shape[-1])
        self._handles.append(module.register_forward_pre_hook(hook))

    def _routed(self, index: int) -> Any:
        def hook(_: nn.Module, __: Any, output: tuple[Tensor, Tensor]) -> None:
            _add(self.experts, index, output[0].float().flatten(0, -2).sum(0))

        return hook

    def _turn(self, index: int) -> Any:
        def hook(layer: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Any) -> None:
            h = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            new = output[0] if isinstance(output, tuple) else output
            if h.shape != new.shape:  # a wider stream begins inside the first layer
                h = layer.input_layernorm.connection.enter(h)
            self.layers[index] += (1 - F.cosine_similarity(h.float(), new.float(), dim=-1)).sum().cpu()

        return hook


def _head_norms(x: Tensor, heads: int) -> Tensor:
    """[..., heads * channels] -> [..., heads]"""
    return x.unflatten(-1, (heads, -1)).norm(dim=-1)


def _add(into: dict[Any, Tensor], key: Any, value: Tensor) -> None:
    value = value.cpu()
    into[key] = into[key] + value if key in into else value
