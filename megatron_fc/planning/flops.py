"""FLOPs per token: products of matrices at 2 per multiply-add; connections say their own."""

from dataclasses import dataclass

from megatron_fc.connections.costs import flops as connection
from megatron_fc.planning.layout import Layout
from megatron_fc.planning.shape import Kind, Shape, Training


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


def layer(shape: Shape, kind: Kind) -> Flops:
    """Forward pass of a token through one layer."""
    d, moe = shape.width, kind.moe
    ffn = shape.top_k * shape.expert_ffn + shape.shared_ffn if moe else shape.ffn
    return Flops(
        attention=2 * (_before_attention(shape) + shape.output_width * d),
        scores=2 * shape.attended(kind.windowed) * (shape.query_width + shape.output_width),
        mlp=2 * d * shape.matrices * ffn,
        router=2 * d * (shape.experts + shape.shared_gate) if moe else 0,
        connections=2 * connection.site(shape.connection, d) if shape.connection else 0,
    )


def _before_attention(shape: Shape) -> int:
    """Multiply-adds of the products that make a token's queries, keys and values."""
    d, latent = shape.width, shape.latent
    if latent is None:
        return d * (shape.query_width + 2 * shape.key_width)
    queries = (d + shape.query_width) * latent.queries if latent.queries else d * shape.query_width
    expanded = shape.heads * (shape.head_size - latent.position + latent.values)
    return queries + d * (latent.keys + latent.position) + latent.keys * expanded


def forward(shape: Shape) -> Flops:
    """Of a token through the whole model, multi-token prediction included."""
    leave = connection.leave(shape.connection, shape.width) if shape.connection else 0
    total = Flops(head=2 * shape.width * shape.vocabulary, connections=leave)
    for index in range(shape.layers):
        total += layer(shape, shape.kind(index))
    return total + prediction(shape) * shape.predicted


def prediction(shape: Shape) -> Flops:
    """Of a token through one layer of multi-token prediction: its join counts as attention's, and its own output."""
    d = shape.width
    return layer(shape, shape.kind(shape.layers - 1)) + Flops(attention=4 * d * d, head=2 * d * shape.vocabulary)


def backward(shape: Shape) -> Flops:
    """Gradients of both factors of every product: twice the forward pass."""
    return forward(shape) * 2


def recomputed(shape: Shape, training: Training, layout: Layout) -> Flops:
    """Forward passes run again in backward, per token.

    Args:
        shape: the model.
        training: says what is recomputed.
        layout: has the model chunks.
    """
    total = Flops()
    for stage in range(layout.pipeline):
        for chunk in layout.chunks(stage):
            for span in training.recompute.spans(chunk.layers):
                for index in span:
                    total += layer(shape, shape.kind(index))
    for index in range(shape.layers):
        total += layer_again(shape, training, shape.kind(index))
    return total


def layer_again(shape: Shape, training: Training, kind: Kind) -> Flops:
    """What selective recompute, or that of the connections or of the stream, runs again in a layer."""
    once, freed = layer(shape, kind), training.recompute.freed
    whole_mlp = ("moe" if kind.moe else "mlp") in freed
    expanded = 0
    if shape.latent and "mla_up_proj" in freed:
        expanded = _before_attention(shape) - shape.width * (
            shape.latent.keys + shape.latent.position + (shape.latent.queries or 0)
        )
    width = once.connections - 2 * connection.depth(shape.connection, shape.width) if shape.connection else 0
    stream = once.connections if "stream" in freed else 0
    return Flops(
        attention=2 * expanded,
        scores=once.scores if "core_attn" in freed else 0.0,
        mlp=once.mlp if whole_mlp else 0.0,
        router=once.router if whole_mlp else 0.0,
        connections=width * (training.recompute.connections + ("layernorm" in freed)) + stream,
    )
