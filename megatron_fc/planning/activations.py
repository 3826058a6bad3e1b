"""Activations: the bytes that autograd keeps for backward, tensor by tensor.

Every function lists what Megatron's layers keep with flash attention, fused SwiGLU and fused norms, for the tokens of
one micro-batch on one rank. The lists were read off `torch.autograd.graph.saved_tensors_hooks` on real layers, and
`tests/preflight/test_estimate.py` holds them to it. Symbols: T tokens of a rank, d width, t tensor-parallel size,
e bytes of an element; a row is T*d*e bytes, divided by t under sequence parallelism, and the stream between sub-layers
r rows, one but for a connection that widens it. A norm keeps 4 bytes of statistics per row, in fp32. What a product in
FP8 or FP4 keeps of its input is in that precision, with its scales.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

from megatron_fc.connections.config import ManifoldConfig
from megatron_fc.connections.costs import eager_memory
from megatron_fc.connections.costs.traffic import Stream, beta_bytes
from megatron_fc.planning.layout import Layout
from megatron_fc.planning.shape import Shape, Training

Part = Literal["attention", "mlp", "connections", "head"]
# Of an element that a product in FP8 or FP4 keeps, scales of blocks of 32 or 16 included; else that of the dtype.
OPERAND_BYTES = {"fp8": 1 + 1 / 32, "fp4": 1 / 2 + 1 / 16}
_INDEX = 8  # bytes of an int64
_FP32 = 4


class Kept(NamedTuple):
    """A tensor that waits for backward.

    Attributes:
        what: it is.
        part: of the model.
        bytes: on one rank, of one micro-batch.
        freed_by: selective recompute modules that drop it.
        is_operand: a product keeps it, in its own precision.
    """

    what: str
    part: Part
    bytes: float
    freed_by: tuple[str, ...] = ()
    is_operand: bool = False


class _Sizes(NamedTuple):
    """Of a rank: tokens of attention, those between sub-layers (under sequence parallelism fewer), and their bytes.

    Attributes:
        row: d values of each of the latter.
        stream: all values of each of the latter.
    """

    tokens: float
    own_tokens: float
    row: float
    stream: float


def _sizes(shape: Shape, training: Training, layout: Layout) -> _Sizes:
    tokens = layout.micro_batch * shape.sequence / layout.context
    divided = tokens / layout.tensor if training.sequence_parallel else tokens
    value = divided * training.element_bytes
    return _Sizes(tokens, divided, value * shape.width, value * shape.stream_width)


def layer(shape: Shape, training: Training, layout: Layout, moe: bool) -> list[Kept]:
    """Kept by one layer, recompute apart; a window of its attention changes nothing."""
    sizes = _sizes(shape, training, layout)
    mlp = _moe(shape, training, layout, sizes) if moe else _dense(shape, training, layout, sizes)
    kept = [*_attention(shape, training, layout, sizes), *mlp, *_connections(shape, training, sizes, moe)]
    share = OPERAND_BYTES.get(training.products, training.element_bytes) / training.element_bytes
    return [one._replace(bytes=share * one.bytes) if one.is_operand else one for one in kept]


def stream(shape: Shape, training: Training, layout: Layout, is_embedding: bool = False) -> float:
    """Bytes of the stream between sub-layers, all that full recompute keeps of a layer; it begins as the embedding."""
    sizes = _sizes(shape, training, layout)
    return sizes.row if is_embedding else sizes.stream


def first(shape: Shape, training: Training, layout: Layout) -> list[Kept]:
    """Kept by the embedding: token numbers, and itself where a norm slot that enters the stream is recomputed."""
    sizes = _sizes(shape, training, layout)
    kept = [Kept("token numbers", "head", _INDEX * sizes.tokens)]
    if shape.is_wide and "layernorm" in training.recompute.freed:
        kept.append(Kept("embedding", "connections", sizes.row))
    return kept


def last(shape: Shape, training: Training, layout: Layout) -> list[Kept]:
    """Kept by the last norm, the output layer and the loss, whose softmax is fp32."""
    sizes = _sizes(shape, training, layout)
    return [
        *_leave(shape, sizes),
        *_norm("last norm", "head", sizes, ()),
        Kept(
            "gradient of the logits" if training.fused_loss else "softmax of the logits",
            "head",
            (training.element_bytes if training.fused_loss else _FP32)
            * sizes.tokens
            * shape.vocabulary
            / layout.tensor,
        ),
        Kept("targets and their mask", "head", (_INDEX + 1) * sizes.tokens),
    ]


def prediction(shape: Shape, training: Training, layout: Layout) -> list[Kept]:
    """Kept by a layer of multi-token prediction: two norms and the product that joins them, a layer, an output."""
    sizes = _sizes(shape, training, layout)
    return [
        *_norm("norm of the stream to join", "head", sizes, ()),
        *_norm("norm of the embedding to join", "head", sizes, ()),
        Kept("joined", "head", 2 * sizes.row),
        *layer(shape, training, layout, shape.moe_layers[-1]),
        *last(shape, training, layout),
    ]


def logits(shape: Shape, training: Training, layout: Layout) -> float:
    """Bytes of the logits in the model's dtype, alive beside the softmax; their gradient takes the place later."""
    sizes = _sizes(shape, training, layout)
    return training.element_bytes * sizes.tokens * shape.vocabulary / layout.tensor


def connection_backward(shape: Shape, training: Training, layout: Layout) -> float:
    """Bytes that a connection holds while its torch operations run backward; fused kernels hold none.

    On a manifold the coefficients are torch's in any case.
    """
    stream = Stream(shape.width, training.element_bytes)
    if shape.connection is None:
        return 0.0
    if not training.fused_connections:
        per_token = eager_memory.width_backward(stream, shape.connection)
    elif isinstance(shape.connection, ManifoldConfig):
        per_token = eager_memory.coefficients_backward(stream, shape.connection)
    else:
        return 0.0
    return per_token * _sizes(shape, training, layout).own_tokens


def total(kept: Iterable[Kept], freed_by: Iterable[str] = ()) -> float:
    """Sum in bytes, without what selective recompute of these modules drops."""
    modules = set(freed_by)
    return sum(tensor.bytes for tensor in kept if not modules.intersection(tensor.freed_by))


def _norm(name: str, part: Part, sizes: _Sizes, freed_by: tuple[str, ...]) -> list[Kept]:
    """The stream that is its input, its statistics, and its output, which the next product keeps."""
    return [
        Kept(f"stream before {name}", part, sizes.row, () if part == "head" else ("stream",)),
        Kept(f"statistics of {name}", part, _FP32 * sizes.own_tokens, freed_by),
        Kept(f"output of {name}", part, sizes.row, freed_by, is_operand=name != "norm of the experts"),
    ]


def _around(name: str, part: Part, shape: Shape, sizes: _Sizes, freed_by: tuple[str, ...]) -> list[Kept]:
    """What a sub-layer's norm and first product keep."""
    if not shape.norm_after:
        return _norm(f"norm of {name}", part, sizes, freed_by)
    kept = [
        Kept(f"input of {name}", part, sizes.row, ("layernorm",) if shape.connection else ()),
        Kept(f"output of {name} before its norm", part, sizes.row),
        Kept(f"statistics of norm of {name}", part, _FP32 * sizes.own_tokens),
    ]
    if shape.connection is not None:  # without one it is the input
        kept.append(Kept(f"stream before {name}", part, sizes.row, ("stream",)))
    return kept


def _attention(shape: Shape, training: Training, layout: Layout, sizes: _Sizes) -> list[Kept]:
    tokens, e = sizes.tokens / layout.tensor, training.element_bytes
    queries, keys, latent = shape.query_width, shape.key_width, shape.latent
    expanded = ("mla_up_proj",) if latent else ()
    kept = [
        # Megatron recomputes the norms that are modules; what Transformer Engine's product has made stays.
        *_around("attention", "attention", shape, sizes, ("layernorm",) if training.norms_of(False)[0] else ()),
        # The values are a view of it.
        Kept("queries, keys, values", "attention", e * tokens * (queries + keys + shape.value_width), expanded),
        Kept("attention's output", "attention", e * tokens * shape.output_width, is_operand=True),
    ]
    if latent:  # before and behind the norms of what is narrow, whole on every rank
        narrow = latent.keys + (latent.queries or 0)
        kept.append(Kept("narrow queries and keys", "attention", e * sizes.own_tokens * (2 * narrow + latent.position)))
    elif shape.qk_norm:
        # Norms over all heads have the same root on every rank.
        rows = 2 * sizes.tokens if shape.over_heads else tokens * (shape.heads + shape.groups)
        kept.append(Kept("statistics of query and key norm", "attention", _FP32 * rows))
    if shape.rotary and not latent:  # a latent head is rotated in place
        kept.append(Kept("rotated queries and keys", "attention", e * tokens * (queries + keys)))
    if training.flash:
        scores = Kept("log-sum-exp of scores", "attention", _FP32 * tokens * shape.heads, ("core_attn",))
    else:  # fp32 softmax, and a copy of it in the model's dtype
        per_token = shape.heads * shape.sequence * (_FP32 + e)
        scores = Kept("attention scores", "attention", tokens * per_token, ("core_attn",))
    return [*kept, scores]


def _dense(shape: Shape, training: Training, layout: Layout, sizes: _Sizes) -> list[Kept]:
    return [
        # A norm inside the first product is a part of the MLP that is recomputed.
        *_around("the MLP", "mlp", shape, sizes, ("layernorm",) if training.norms_of(False)[1] else ("mlp",)),
        *_gate(shape.ffn * sizes.tokens / layout.tensor, "the MLP", shape, training, ("mlp",)),
    ]


def _gate(elements: float, name: str, shape: Shape, training: Training, freed_by: tuple[str, ...]) -> list[Kept]:
    """Input of the activation function (twice as wide if gated) and its output, in elements of the latter."""
    e = training.element_bytes
    return [
        Kept(f"input of {name}'s activation", "mlp", e * elements * (shape.matrices - 1), freed_by),
        Kept(
            f"output of {name}'s activation",
            "mlp",
            e * elements,
            (*freed_by, "moe_act") if "moe" in freed_by else freed_by,
            is_operand=True,
        ),
    ]


def _moe(shape: Shape, training: Training, layout: Layout, sizes: _Sizes) -> list[Kept]:
    """Routed evenly: every rank's experts get as many rows as its own tokens send."""
    rows = sizes.own_tokens * shape.top_k * layout.expert_tensor
    e = training.element_bytes
    routing = 3 * _FP32 * shape.experts + 2 * _INDEX * shape.top_k + _FP32
    order = 3 * _INDEX * shape.top_k
    kept = [
        *_around("the experts", "mlp", shape, sizes, ("layernorm",)),
        # Softmax, and what the two losses of the router need; which experts, and how rows are ordered.
        Kept("routing", "mlp", sizes.own_tokens * routing, ("moe",)),
        Kept("order of rows", "mlp", sizes.own_tokens * order, ("moe",)),
        Kept("rows of the experts", "mlp", e * rows * shape.width, ("moe",), is_operand=True),
        Kept("probabilities of rows", "mlp", _FP32 * rows, ("moe",)),
        *_gate(rows * shape.expert_ffn / layout.expert_tensor, "the experts", shape, training, ("moe",)),
    ]
    if shape.shared_ffn:
        elements = shape.shared_ffn * sizes.tokens / layout.tensor
        kept += _gate(elements, "the shared expert", shape, training, ("moe", "shared_experts"))
    return kept


def _connections(shape: Shape, training: Training, sizes: _Sizes, moe: bool) -> list[Kept]:
    """Of two sites: o, beta, and x where no kernel applies the norm in the same pass; a row of h is kept anyway."""
    if shape.connection is None:
        return []
    beta, beyond = beta_bytes(shape.connection) * sizes.own_tokens, sizes.stream - sizes.row
    kept = []
    for name, apart in zip(("attention", "the MLP"), training.norms_of(moe), strict=True):
        in_kernel = training.fused_connections and apart
        if shape.is_wide:
            kept.append(Kept(f"other rows of the stream before {name}", "connections", beyond, ("stream",)))
        kept.append(Kept(f"output of {name}", "connections", sizes.row))
        kept.append(Kept(f"beta of {name}", "connections", beta))
        if training.fused_connections and training.recompute.stream_layers:
            alpha = _FP32 * shape.connection.slots**2 * sizes.own_tokens
            kept.append(Kept(f"alpha of {name}", "connections", alpha))
        if not shape.norm_after and not in_kernel and not training.recompute.connections:
            freed_by = ("layernorm", "stream") if apart else ("layernorm",)
            kept.append(Kept(f"input of {name} before its norm", "connections", sizes.row, freed_by))
    return kept


def _leave(shape: Shape, sizes: _Sizes) -> list[Kept]:
    """Of a learned leave under autograd, in fp32: the stream, as it is and normed, a statistic, 3 values per slot."""
    if shape.connection is None or not shape.connection.leave_shapes(shape.width):
        return []
    per_token = 2 * shape.stream_width + 1 + 3 * shape.connection.slots
    return [Kept("stream that is left", "connections", _FP32 * sizes.own_tokens * per_token)]
