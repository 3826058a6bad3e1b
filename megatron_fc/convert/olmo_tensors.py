"""The tensors of OLMoE and OLMo2 under Megatron's names and Hugging Face's, and how one makes the other.

One table serves both directions: a `Part` is one tensor of Megatron's, or one layer or expert of it, and the Hugging
Face tensors that hold the same numbers.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.convert.olmo_config import Architecture


def _same(tensor: Tensor) -> list[Tensor]:
    return [tensor]


def _only(tensors: Sequence[Tensor]) -> Tensor:
    [tensor] = tensors
    return tensor


def _halves(tensor: Tensor) -> list[Tensor]:
    return list(tensor.chunk(2))


@dataclass(frozen=True)
class Part:
    """One tensor of Megatron's and what Hugging Face makes of it.

    Attributes:
        keys: what Megatron may call it: norms have other names with Transformer Engine. Behind `decoder.layers.` where
            `layer` is a number.
        layer: number of the layer; None outside of layers.
        expert: number of the expert, None for all of them or none.
        names: of the Hugging Face tensors.
        split: Megatron's tensor -> theirs.
        join: theirs -> Megatron's.
    """

    keys: tuple[str, ...]
    layer: int | None
    expert: int | None
    names: tuple[str, ...]
    split: Callable[[Tensor], list[Tensor]] = _same
    join: Callable[[Sequence[Tensor]], Tensor] = _only

    def places(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The keys in a checkpoint, and the indices in the tensor there: layers are stacked or have names each."""
        expert = () if self.expert is None else (self.expert,)
        for key in self.keys:
            if self.layer is None:
                yield key, ()
            else:
                yield f"decoder.layers.{key}", (self.layer, *expert)
                yield f"decoder.layers.{self.layer}.{key}", expert


def parts(architecture: Architecture, args: Namespace, connection: ConnectionConfig | None) -> list[Part]:
    """Return all parts of a model, in the order of its layers.

    Args:
        architecture: of the model.
        args: Megatron's.
        connection: of the model.
    """
    ends = [Part(("embedding.word_embeddings.weight",), None, None, ("model.embed_tokens.weight",))]
    layers = [part for layer in range(args.num_layers) for part in _layer(architecture, args, connection, layer)]
    norm = "model.norm.weight" if connection is None else "model.norm.norm.weight"
    last = [Part(("decoder.final_layernorm.weight",), None, None, (norm,))]
    leave = connection.leave_shapes(args.hidden_size) if connection is not None else {}
    last += [
        Part((f"decoder.final_layernorm.connection.{name}",), None, None, (f"model.norm.leave.{name}",))
        for name in leave
    ]
    if args.untie_embeddings_and_output_weights:
        last.append(Part(("output_layer.weight",), None, None, ("lm_head.weight",)))
    return [*ends, *layers, *last]


def _layer(
    architecture: Architecture, args: Namespace, connection: ConnectionConfig | None, layer: int
) -> Iterator[Part]:
    def part(
        keys: str | tuple[str, ...], *names: str, expert: int | None = None, **maps: Callable[..., object]
    ) -> Part:
        keys = (keys,) if isinstance(keys, str) else keys
        return Part(keys, layer, expert, tuple(f"model.layers.{layer}.{name}.weight" for name in names), **maps)  # type: ignore[arg-type]

    heads = _Heads(args)
    projections = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    yield part("self_attention.linear_qkv.weight", *projections, split=heads.split, join=heads.join)
    yield part("self_attention.linear_proj.weight", "self_attn.o_proj")
    yield part("self_attention.q_layernorm.weight", "self_attn.q_norm")
    yield part("self_attention.k_layernorm.weight", "self_attn.k_norm")
    if architecture == "olmo2":
        yield part("self_attn_bda.norm_after.weight", "post_attention_layernorm")
        yield part("mlp_bda.norm_after.weight", "post_feedforward_layernorm")
        yield part("mlp.linear_fc1.weight", "mlp.gate_proj", "mlp.up_proj", split=_halves, join=torch.cat)
        yield part("mlp.linear_fc2.weight", "mlp.down_proj")
    else:
        norm = ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")
        yield part(norm, "input_layernorm")
        norm = ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
        yield part(norm, "post_attention_layernorm")
        yield part("mlp.router.weight", "mlp.gate")
        yield from _experts(args, connection, layer, part)
    if connection is not None:
        for slot, site in (("input_layernorm", "attn_connection"), ("pre_mlp_layernorm", "mlp_connection")):
            for name in connection.parameter_shapes(args.hidden_size):
                names = (f"model.layers.{layer}.{site}.{name}",)
                yield Part((f"{slot}.connection.{name}",), layer, None, names)


def _experts(
    args: Namespace, connection: ConnectionConfig | None, layer: int, part: Callable[..., Part]
) -> Iterator[Part]:
    """Stock files hold each expert by itself; the modules of a connected model all of a layer in one tensor."""
    first, second = (f"mlp.experts.experts.linear_fc{number}.weight" for number in (1, 2))
    if connection is not None:
        prefix = f"model.layers.{layer}.mlp.experts"
        yield Part((first,), layer, None, (f"{prefix}.gate_up_proj",))
        yield Part((second,), layer, None, (f"{prefix}.down_proj",))
        return
    for expert in range(args.num_experts):
        prefix = f"mlp.experts.{expert}"
        gate_up = (f"{prefix}.gate_proj", f"{prefix}.up_proj")
        yield part(first, *gate_up, expert=expert, split=_halves, join=torch.cat)
        yield part(second, f"{prefix}.down_proj", expert=expert)


class _Heads:
    """Rows of Megatron's first projection lie by query group: the group's queries, then its key and its value."""

    def __init__(self, args: Namespace) -> None:
        self._heads, self._head_size = args.num_attention_heads, args.kv_channels
        self._groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads

    def split(self, tensor: Tensor) -> list[Tensor]:
        rows = tensor.unflatten(0, (self._groups, -1, self._head_size))
        return [part.flatten(0, 2) for part in rows.split((self._heads // self._groups, 1, 1), 1)]

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        rows = [tensor.unflatten(0, (self._groups, -1, self._head_size)) for tensor in tensors]
        return torch.cat(rows, 1).flatten(0, 2)
