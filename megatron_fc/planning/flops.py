"""FLOPs per token: products of matrices at 2 per multiply-add; connections say their own."""

from dataclasses import dataclass

from megatron_fc.connections.costs import flops as connection
from megatron_fc.planning.shape import Shape, Training


@dataclass(frozen=True)
class Flops:
    """Of one token through one pass, by part.

    Attributes:
        attention, scores: projections; products of queries, keys and values, of which causality leaves half.
        mlp, router: k of E experts and the shared one where there are experts; router and the shared one's gate, which
            Megatron's count leaves out.
        head: output layer.
        connections: between sub-layers.
    """

    attention: float = 0.0
    scores: float = 0.0
    mlp: float = 0.0
    router: float = 0.0
    head: float = 0.0
    connections: float = 0.0

    @property
    def total(self) -> float:
        return self.attention + self.scores + self.mlp + self.router + self.head + self.connections

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(**{part: count + getattr(other, part) for part, count in vars(self).items()})

    def __mul__(self, factor: float) -> "Flops":
        return Flops(**{part: factor * count for part, count in vars(self).items()})


def layer(shape: Shape, moe: bool) -> Flops:
    """Forward pass of a token through one layer."""
    d, queries = shape.width, shape.query_width
    ffn = shape.top_k * shape.expert_ffn + shape.shared_ffn if moe else shape.ffn
    return Flops(
        attention=2 * d * (queries + 2 * shape.key_width) + 2 * queries * d,
        scores=2 * shape.sequence * queries,
        mlp=2 * d * shape.matrices * ffn,
        router=2 * d * (shape.experts + shape.shared_gate) if moe else 0,
        connections=2 * connection.site(shape.connection, d) if shape.connection else 0,
    )


def forward(shape: Shape) -> Flops:
    """Of a token through the whole model."""
    leave = connection.leave(shape.connection, shape.width) if shape.connection else 0
    total = Flops(head=2 * shape.width * shape.vocabulary, connections=leave)
    for moe in shape.moe_layers:
        total += layer(shape, moe)
    return total


def backward(shape: Shape) -> Flops:
    """Gradients of both factors of every product: twice the forward pass."""
    return forward(shape) * 2


def recomputed(shape: Shape, training: Training, chunk: int) -> Flops:
    """Forward passes run again in backward, per token.

    Args:
        shape: the model.
        training: says what is recomputed.
        chunk: layers of a model chunk.
    """
    total = Flops()
    for start in range(0, shape.layers, chunk):
        for span in training.recompute.spans(range(start, start + chunk)):
            for index in span:
                total += layer(shape, shape.moe_layers[index])
    for moe in shape.moe_layers:
        total += layer_again(shape, training, moe)
    return total


def layer_again(shape: Shape, training: Training, moe: bool) -> Flops:
    """What selective recompute, or that of the connections or of the stream, runs again in a layer."""
    once, freed = layer(shape, moe), training.recompute.freed
    whole_mlp = ("moe" if moe else "mlp") in freed
    width = once.connections - 2 * connection.depth(shape.connection, shape.width) if shape.connection else 0
    stream = once.connections if "stream" in freed else 0
    return Flops(
        scores=once.scores if "core_attn" in freed else 0.0,
        mlp=once.mlp if whole_mlp else 0.0,
        router=once.router if whole_mlp else 0.0,
        connections=width * (training.recompute.connections + ("layernorm" in freed)) + stream,
    )
