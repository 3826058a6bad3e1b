"""The operations of a micro-batch on a rank: FLOPs and bytes of device memory.

Every operation reads its inputs and writes its outputs once. What connects sub-layers is counted in
`megatron_fc.connections.costs.traffic`. Left out, as small: embedding, biases.
"""

from collections.abc import Iterable
from dataclasses import replace

from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.connections.config import ManifoldConfig
from megatron_fc.connections.costs.eager_traffic import mixing_kernels, torch_backend
from megatron_fc.connections.costs.traffic import (
    Moves,
    Stream,
    Traffic,
    depth,
    fused_residual,
    layer_in_two_operations,
    layer_pure,
    layers_in_a_row,
    norm,
    residual,
    width_norm,
)
from megatron_fc.planning.layout import Layout
from megatron_fc.planning.products import Operation, Pass, product
from megatron_fc.planning.shape import Kind, Latent, Shape, Training

ATTENTION, CONNECTIONS = "attention", "connections and norms"  # names of two operations
_FP32 = 4
_EAGER_KERNELS = 40  # of a site's torch operations
_TILE_OF_KEYS = 128  # of flash attention
_ROUTING_KERNELS = 20  # counted in Megatron's router and dispatcher, unfused


def layer(shape: Shape, training: Training, layout: Layout, kind: Kind, in_a_row: float = 1) -> list[Operation]:
    """Of one layer, its connections included, one of so many in a row."""
    tokens = layout.micro_batch * shape.sequence // layout.context
    attention = _attention(shape, training, layout, tokens, kind.windowed)
    attention.append(_connections(shape, training, layout, tokens, kind.moe, in_a_row))
    mlp = (
        _experts(shape, training, layout, tokens)
        if kind.moe
        else [operation._replace(module="mlp") for operation in _dense(shape, training, layout, tokens)]
    )
    return [*(operation._replace(module="attn") for operation in attention), *mlp]


def prediction(shape: Shape, training: Training, layout: Layout) -> list[Operation]:
    """Of a layer of multi-token prediction: the product that joins stream and embedding, a layer, an output."""
    tokens = layout.micro_batch * shape.sequence // layout.context
    return [
        product("join of prediction", tokens, 2 * shape.width, shape.width // layout.tensor, training),
        *layer(shape, training, layout, shape.kind(shape.layers - 1)),
        *head(shape, training, layout),
    ]


def head(shape: Shape, training: Training, layout: Layout) -> list[Operation]:
    """Output layer, in the model's dtype unless `fp8_output_proj` is on, and loss.

    The loss is in fp32 and unfused: cast, largest logit, difference, exponential, sum, quotient. Transformer Engine's
    reads logits twice and writes their gradient; backward scales it.
    """
    tokens, e = layout.micro_batch * shape.sequence // layout.context, training.element_bytes
    columns = shape.vocabulary // layout.tensor
    forward = 3 * e if training.fused_loss else e + _FP32 * (1 + 1 + 2 + 2 + 1 + 2)
    backward = 2 * e if training.fused_loss else 3 * _FP32 + e
    products = training.products if training.fp8_output else "half"
    output = product("output layer", tokens, shape.width, columns, replace(training, products=products))
    return [
        output._replace(is_linear=training.fp8_output),
        Operation("loss", Pass(0, forward * tokens * columns), Pass(0, backward * tokens * columns), kernels=6),
    ]


def optimizer_bytes(held: float, divided: float, states: float, training: Training) -> float:
    """Bytes that the optimizer moves in a step.

    Args:
        held: parameters of the rank, whose gradients are set to zero.
        divided: those that it updates; each gradient is read for the norm and for the update, each weight written.
        states: bytes of its fp32 weights and moments, read and written.
        training: precisions.
    """
    g = training.gradient_bytes
    return g * held + (2 * g + training.element_bytes) * divided + 2 * states


def again(operations: Iterable[Operation], training: Training) -> list[Operation]:
    """Those whose forward pass selective recompute runs again."""
    return [operation for operation in operations if set(operation.again_with).intersection(training.recompute.freed)]


def _attention(shape: Shape, training: Training, layout: Layout, tokens: float, windowed: bool) -> list[Operation]:
    """Flash attention keeps no scores, and so multiplies queries and keys once more in backward: 5 products for 2."""
    e, t = training.element_bytes, layout.tensor
    queries, keys, output = shape.query_width // t, shape.key_width // t, shape.output_width // t
    row = e * tokens * (queries + keys)
    passes = 2 * shape.rotary + 2 * (shape.qk_norm and not shape.latent)  # each reads and writes queries and keys
    attended, backward = shape.attended(windowed), 2.5 if training.flash else 2
    scores = 2 * tokens * attended * (queries + output)
    # Half of a tile on the diagonal; as much where a window begins.
    beyond = (1 + windowed) * _TILE_OF_KEYS / 2 / attended if training.flash else 0
    moved = row + e * tokens * (shape.value_width // t + output)
    if not training.flash:  # scores are written, read and written by the softmax, read
        moved += tokens * shape.heads // t * shape.sequence * (2 * e + 2 * _FP32)
    before = (
        _latent(shape, shape.latent, training, layout, tokens)
        if shape.latent
        else [product("attention's projections", tokens, shape.width, queries + 2 * keys, training)]
    )
    return [
        *before,
        Operation("rotation, norms of queries and keys", Pass(0, passes * row), Pass(0, 1.5 * passes * row), kernels=4),
        Operation(
            ATTENTION,
            Pass(scores, moved, beyond * scores),
            Pass(backward * scores, 2 * moved, beyond * backward * scores),
            again_with=("core_attn",),
            exponentials=tokens * (1 + beyond) * attended * shape.heads // t,
        ),
        product("attention's projections", tokens, output, shape.width, training),
    ]


def _latent(shape: Shape, latent: Latent, training: Training, layout: Layout, tokens: float) -> list[Operation]:
    """Narrow products on the tokens of a rank, wide ones on its heads; each narrow result is normed."""
    e, t, name = training.element_bytes, layout.tensor, "attention's projections"
    own = tokens / t if training.sequence_parallel else tokens
    heads = shape.heads // t
    wide = heads * (shape.head_size - latent.position + latent.values)
    again = ("mla_up_proj",)
    narrow = [latent.keys + latent.position] + ([latent.queries] if latent.queries else [])
    norms = e * own * sum(narrow)
    return [
        *(product(name, own, shape.width, width, training) for width in narrow),
        Operation("norms of what is narrow", Pass(0, 2 * norms), Pass(0, 3 * norms)),
        product(name, tokens, latent.keys, wide, training, again_with=again),
        product(
            name,
            tokens,
            latent.queries or shape.width,
            heads * shape.head_size,
            training,
            again_with=again if latent.queries else (),
        ),
    ]


def _dense(shape: Shape, training: Training, layout: Layout, tokens: float) -> list[Operation]:
    return _mlp("MLP", tokens, shape.ffn // layout.tensor, shape, training, ("mlp",))


def _mlp(
    name: str, rows: float, ffn: float, shape: Shape, training: Training, again_with: tuple[str, ...], matrices: int = 1
) -> list[Operation]:
    wide, e = ffn * (shape.matrices - 1), training.element_bytes
    act = Operation(
        f"activation of {name}",
        Pass(0, e * rows * (wide + ffn)),
        Pass(0, e * rows * (2 * wide + ffn)),
        again_with=(*again_with, "moe_act") if "moe" in again_with else again_with,
    )
    return [
        product(name, rows, shape.width, wide, training, matrices, again_with),
        act,
        product(name, rows, ffn, shape.width, training, matrices, again_with),
    ]


def _experts(shape: Shape, training: Training, layout: Layout, tokens: float) -> list[Operation]:
    """Rows are gathered four times: into the order of experts, again where they arrive, and back."""
    own = tokens / layout.tensor if training.sequence_parallel else tokens
    rows = own * shape.top_k * layout.expert_tensor
    moved = 4 * 2 * training.element_bytes * rows * shape.width
    matrices = shape.experts // layout.expert
    # Logits, and a softmax, a choice and two losses of them, in fp32.
    routing = own * (training.element_bytes * shape.width + 8 * _FP32 * shape.experts)
    operations = [
        Operation(
            "routing",
            Pass(0, routing),
            Pass(0, routing),
            again_with=("moe",),
            kernels=_ROUTING_KERNELS,
            module="moe_router",
        ),
        Operation(
            "order of the experts' rows",
            Pass(0, moved),
            Pass(0, moved),
            again_with=("moe",),
            kernels=4,
            module="moe_preprocess",
        ),
        *(
            operation._replace(module="moe")
            for operation in _mlp(
                "experts", rows, shape.expert_ffn // layout.expert_tensor, shape, training, ("moe",), matrices
            )
        ),
    ]
    if not training.fused_experts:
        operations += _apart(rows, shape, training, layout)
    if shape.shared_ffn:
        ffn = shape.shared_ffn // layout.tensor
        operations += _mlp("shared expert", tokens, ffn, shape, training, ("moe", "shared_experts"))
    return operations


def _apart(rows: float, shape: Shape, training: Training, layout: Layout) -> list[Operation]:
    """What torch does with the experts' rows where no kernel takes it in: a clamp of the gate, a bias of the output.

    The clamp reads and writes both halves and their concatenation. The bias is weighed by a router's fp32 number: its
    product, the sum, their concatenation and a cast, and the two gradients of the product (`_apply_bias` of Megatron's
    experts).
    """
    e = training.element_bytes
    found = []
    if shape.clamped:
        wide = rows * (shape.matrices - 1) * shape.expert_ffn // layout.expert_tensor
        clamp = Operation("clamp", Pass(0, 4 * e * wide), Pass(0, 5 * e * wide), again_with=("moe", "moe_act"))
        found.append(clamp._replace(module="moe", kernels=3))
    if shape.linear_bias:
        values = rows * shape.width
        forward, backward = 2 * e + 6 * _FP32, 2 * e + 8 * _FP32
        bias = Operation("experts' bias", Pass(0, forward * values), Pass(0, backward * values), again_with=("moe",))
        found.append(bias._replace(module="moe", kernels=2 * shape.experts // layout.expert + 2))
    return found


def _connections(
    shape: Shape, training: Training, layout: Layout, tokens: int, moe: bool, in_a_row: float
) -> Operation:
    own = tokens // layout.tensor if training.sequence_parallel else tokens
    moves = connection_moves(shape, training, moe, in_a_row)
    return Operation(
        CONNECTIONS,
        Pass(0, moves.forward.total_bytes(own)),
        Pass(0, moves.backward.total_bytes(own)),
        kernels=_kernels(shape, training),
    )


def _kernels(shape: Shape, training: Training) -> int:
    """Launches of a layer's residuals or connections and norms: of fused kernels one for a site's boundary each."""
    if shape.connection is None:
        return 4
    return 4 if training.fused_connections else 2 * _EAGER_KERNELS


def connection_moves(shape: Shape, training: Training, moe: bool, in_a_row: float = 1) -> Moves:
    """Bytes of a layer's residual or connections and norms; backward includes what it recomputes of them.

    Of so many layers in a row all but the first meet the one before them; layers that full recompute runs again do not.
    """
    stream, apart = Stream(shape.width, training.element_bytes, shape.norm_vectors), sum(training.norms_of(moe))
    connection, freed = shape.connection, "layernorm" in training.recompute.freed
    if connection is None:
        moves = fused_residual(stream) if training.fused_residual else residual(stream)
        return moves + _again(norm(stream)) * (freed * apart)
    if training.fused_connections:
        moves, widths = _fused(stream, connection, training, in_a_row)
        again = _again(widths) * (freed + training.recompute.connections)
        if "stream" in training.recompute.freed:  # the coefficients are kept
            again = _again(depth(stream, connection)) * 2
        return moves + norm(stream) * (2 - apart) + again
    moves = torch_backend(stream, connection)
    # Width connections and norms are about half of it.
    again = _again(moves) * ((freed + training.recompute.connections) / 2)
    if "stream" in training.recompute.freed:
        again += _again(moves + norm(stream) * -2)
    return moves + again


def _fused(stream: Stream, connection: ConnectionConfig, training: Training, in_a_row: float) -> tuple[Moves, Moves]:
    """A layer as the kernels run it, its norms in the same pass; and its width connections alone."""
    if isinstance(connection, ManifoldConfig):
        moves = mixing_kernels(stream, connection)
        return moves, moves + depth(stream, connection) * -2
    widths = width_norm(stream, connection) * 2
    if "layernorm" in training.recompute.freed:  # the norm slot's tensors, with what the depth connection would take
        return layer_pure(stream, connection), widths
    if training.recompute.connections or "stream" in training.recompute.freed:
        return layer_in_two_operations(stream, connection), widths
    in_a_row = 1 if training.recompute.granularity == "full" else in_a_row
    return layers_in_a_row(stream, connection, in_a_row), widths


def _again(moves: Moves) -> Moves:
    """The forward pass alone, run in backward."""
    return Moves(Traffic(), moves.forward)
