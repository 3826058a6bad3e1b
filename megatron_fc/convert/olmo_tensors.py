"""The tensors of OLMoE and OLMo2 under Megatron's names and Hugging Face's, and how one makes the other.

One table serves both directions: a `Part` is one tensor of Megatron's, or one layer or expert of it, and the Hugging
Face tensors that hold the same numbers.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.convert.olmo_config import Architecture

Shape = tuple[int, ...]


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
        theirs: the shapes of the Hugging Face tensors, by name.
        split: Megatron's tensor -> theirs.
        join: theirs -> Megatron's.
    """

    keys: tuple[str, ...]
    layer: int | None
    expert: int | None
    theirs: dict[str, Shape]
    split: Callable[[Tensor], list[Tensor]] = _same
    join: Callable[[Sequence[Tensor]], Tensor] = _only

    @property
    def names(self) -> tuple[str, ...]:
        """Of the Hugging Face tensors."""
        return tuple(self.theirs)

    @property
    def shape(self) -> Shape:
        """Of Megatron's tensor, or of the layer or expert of it: several of theirs lie in it row below row."""
        first, *others = self.theirs.values()
        return (first[0] + sum(shape[0] for shape in others), *first[1:]) if others else first

    def places(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The keys in a checkpoint, and the indices in the tensor there: layers are stacked or have names each."""
        expert = () if self.expert is None else (self.expert,)
        for key in self.keys:
            if self.layer is None:
                yield key, ()
            else:
                yield f"decoder.layers.{key}", (self.layer, *expert)
                yield f"decoder.layers.{self.layer}.{key}", expert


def parts(
    architecture: Architecture, args: Namespace, connection: ConnectionConfig | None, vocabulary: int
) -> list[Part]:
    """Return all parts of a model, in the order of its layers.

    Args:
        architecture: of the model.
        args: Megatron's.
        connection: of the model.
        vocabulary: rows of the embedding.
    """
    width = args.hidden_size
    rows = (vocabulary, width)
    ends = [Part(("embedding.word_embeddings.weight",), None, None, {"model.embed_tokens.weight": rows})]
    layers = [part for layer in range(args.num_layers) for part in _layer(architecture, args, connection, layer)]
    norm = "model.norm.weight" if connection is None else "model.norm.norm.weight"
    last = [Part(("decoder.final_layernorm.weight",), None, None, {norm: (width,)})]
    leave = connection.leave_shapes(width) if connection is not None else {}
    last += [
        Part((f"decoder.final_layernorm.connection.{name}",), None, None, {f"model.norm.leave.{name}": tuple(shape)})
        for name, shape in leave.items()
    ]
    if args.untie_embeddings_and_output_weights:
        last.append(Part(("output_layer.weight",), None, None, {"lm_head.weight": rows}))
    return [*ends, *layers, *last]


def _layer(
    architecture: Architecture, args: Namespace, connection: ConnectionConfig | None, layer: int
) -> Iterator[Part]:
    def part(
        keys: str | tuple[str, ...],
        theirs: Mapping[str, Shape],
        expert: int | None = None,
        **maps: Callable[..., object],
    ) -> Part:
        keys = (keys,) if isinstance(keys, str) else keys
        named = {f"model.layers.{layer}.{name}.weight": shape for name, shape in theirs.items()}
        return Part(keys, layer, expert, named, **maps)  # type: ignore[arg-type]

    heads, width, inner = _Heads(args), args.hidden_size, args.ffn_hidden_size
    queries, values = heads.rows()
    projections = {
        f"self_attn.{name}_proj": (rows, width) for name, rows in zip("qkv", (queries, values, values), strict=True)
    }
    yield part("self_attention.linear_qkv.weight", projections, split=heads.split, join=heads.join)
    yield part("self_attention.linear_proj.weight", {"self_attn.o_proj": (width, queries)})
    yield part("self_attention.q_layernorm.weight", {"self_attn.q_norm": (queries,)})
    yield part("self_attention.k_layernorm.weight", {"self_attn.k_norm": (values,)})
    if architecture == "olmo2":
        yield part("self_attn_bda.norm_after.weight", {"post_attention_layernorm": (width,)})
        yield part("mlp_bda.norm_after.weight", {"post_feedforward_layernorm": (width,)})
        gate_up = {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width)}
        yield part("mlp.linear_fc1.weight", gate_up, split=_halves, join=torch.cat)
        yield part("mlp.linear_fc2.weight", {"mlp.down_proj": (width, inner)})
    else:
        norm = ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")
        yield part(norm, {"input_layernorm": (width,)})
        norm = ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
        yield part(norm, {"post_attention_layernorm": (width,)})
        yield part("mlp.router.weight", {"mlp.gate": (args.num_experts, width)})
        yield from _experts(args, connection, layer, part)
    if connection is not None:
        for slot, site in (("input_layernorm", "attn_connection"), ("pre_mlp_layernorm", "mlp_connection")):
            for name, shape in connection.parameter_shapes(width).items():
                theirs = {f"model.layers.{layer}.{site}.{name}": tuple(shape)}
                yield Part((f"{slot}.connection.{name}",), layer, None, theirs)


def _experts(
    args: Namespace, connection: ConnectionConfig | None, layer: int, part: Callable[..., Part]
) -> Iterator[Part]:
    """Stock files hold each expert by itself; the modules of a connected model all of a layer in one tensor."""
    first, second = (f"mlp.experts.experts.linear_fc{number}.weight" for number in (1, 2))
    count, width, inner = args.num_experts, args.hidden_size, args.moe_ffn_hidden_size or args.ffn_hidden_size
    if connection is not None:
        prefix = f"model.layers.{layer}.mlp.experts"
        yield Part((first,), layer, None, {f"{prefix}.gate_up_proj": (count, 2 * inner, width)})
        yield Part((second,), layer, None, {f"{prefix}.down_proj": (count, width, inner)})
        return
    for expert in range(count):
        prefix = f"mlp.experts.{expert}"
        gate_up = {f"{prefix}.gate_proj": (inner, width), f"{prefix}.up_proj": (inner, width)}
        yield part(first, gate_up, expert=expert, split=_halves, join=torch.cat)
        yield part(second, {f"{prefix}.down_proj": (width, inner)}, expert=expert)


class _Heads:
    """Rows of Megatron's first projection lie by query group: the group's queries, then its key and its value."""

    def __init__(self, args: Namespace) -> None:
        self._heads, self._head_size = args.num_attention_heads, args.kv_channels
        self._groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads

    def rows(self) -> tuple[int, int]:
        """Of all queries, and of all keys or values."""
        return self._heads * self._head_size, self._groups * self._head_size

    def split(self, tensor: Tensor) -> list[Tensor]:
        rows = tensor.unflatten(0, (self._groups, -1, self._head_size))
        return [part.flatten(0, 2) for part in rows.split((self._heads // self._groups, 1, 1), 1)]

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        rows = [tensor.unflatten(0, (self._groups, -1, self._head_size)) for tensor in tensors]
        return torch.cat(rows, 1).flatten(0, 2)
