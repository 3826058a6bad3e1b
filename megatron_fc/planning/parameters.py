"""Parameters of a model, and those of them that a rank holds."""

from dataclasses import dataclass
from math import prod

from megatron_fc.planning.layout import Layout
from megatron_fc.planning.shape import Latent, Shape


@dataclass(frozen=True)
class Parameters:
    """Counts by how they are treated.

    Attributes:
        split: divided among tensor-parallel ranks.
        whole: the same on all of them, in the model's dtype.
        experts: divided among expert- and expert-tensor-parallel ranks.
        connections: of the connections: the same on all ranks, fp32.
    """

    split: int = 0
    whole: int = 0
    experts: int = 0
    connections: int = 0

    @property
    def total(self) -> int:
        return self.split + self.whole + self.experts + self.connections

    def __add__(self, other: "Parameters") -> "Parameters":
        return Parameters(
            self.split + other.split,
            self.whole + other.whole,
            self.experts + other.experts,
            self.connections + other.connections,
        )

    def on_a_rank(self, layout: Layout) -> "Parameters":
        """Those that one rank of a layout holds."""
        experts = self.experts // (layout.expert * layout.expert_tensor)
        return Parameters(self.split // layout.tensor, self.whole, experts, self.connections)


def layer(shape: Shape, moe: bool) -> Parameters:
    """Of one layer: attention, an MLP or its experts, two norms, two connections."""
    d, first, gates = shape.width, shape.query_width + 2 * shape.key_width, shape.matrices - 1
    split, whole = _latent(shape, shape.latent) if shape.latent else (d * first, 0)
    split += shape.output_width * d
    whole += shape.norm_vectors * (2 * d + shape.qk_norm_weights)
    if (shape.linear_bias or shape.qkv_bias) and not shape.latent:
        split += first
    if shape.linear_bias:
        whole += d  # of attention's second projection
    experts = 0
    dense_ffn = shape.shared_ffn if moe else shape.ffn
    split += shape.matrices * d * dense_ffn
    if shape.linear_bias and dense_ffn:
        split, whole = split + gates * dense_ffn, whole + d
    if moe:
        whole += (shape.experts + shape.shared_gate) * d
        experts = shape.experts * shape.matrices * d * shape.expert_ffn
    connections = 2 * shape.connection.parameter_count(d) if shape.connection else 0
    return Parameters(split, whole, experts, connections)


def _latent(shape: Shape, latent: Latent) -> tuple[int, int]:
    """Products before multi-latent attention: divided among tensor-parallel ranks, and the narrow ones, which are not.

    The norms of what is narrow are there with those of queries and keys.
    """
    expanded = shape.heads * (shape.head_size - latent.position + latent.values)
    split = latent.keys * expanded + (latent.queries or shape.width) * shape.query_width
    whole = shape.width * (latent.keys + latent.position + (latent.queries or 0))
    if shape.qk_norm:
        whole += shape.norm_vectors * (latent.keys + (latent.queries or 0))
    return split, whole


def prediction(shape: Shape) -> Parameters:
    """Of the layers of multi-token prediction: three norms, a product that joins stream and embedding, and a layer."""
    d = shape.width
    one = layer(shape, shape.moe_layers[-1]) + Parameters(split=2 * d * d, whole=3 * shape.norm_vectors * d)
    return Parameters(*(shape.predicted * count for count in vars(one).values()))


def embedding(shape: Shape) -> Parameters:
    """Of tokens, and of learned positions."""
    return Parameters(split=shape.vocabulary * shape.width, whole=shape.learned_positions * shape.width)


def head(shape: Shape, has_embedding: bool = False) -> Parameters:
    """Of the last norm, the output layer and a learned leave.

    With tied weights a last stage without the embedding has a copy.
    """
    copy_of_embedding = shape.tied and has_embedding
    split = 0 if copy_of_embedding else shape.vocabulary * shape.width
    leave = shape.connection.leave_shapes(shape.width) if shape.connection else {}
    return Parameters(split=split, whole=shape.norm_vectors * shape.width, connections=sum(map(prod, leave.values())))


def model(shape: Shape) -> Parameters:
    """Of the whole model."""
    total = embedding(shape) + head(shape, has_embedding=True)
    for moe in shape.moe_layers:
        total += layer(shape, moe)
    return total + prediction(shape)


def active(shape: Shape) -> int:
    """That work on one token: of the routed experts k of E."""
    total = model(shape)
    used = total.experts * shape.top_k // shape.experts if shape.experts else 0
    return total.total - total.experts + used


def share_of_stage(shape: Shape, layout: Layout, stage: int) -> list[Parameters]:
    """Of one rank of a pipeline stage, by model chunk.

    Args:
        shape: the model.
        layout: its parallel sizes.
        stage: rank in the pipeline.
    """
    chunks = []
    for chunk in layout.chunks(stage):
        total = Parameters()
        predicts = chunk.prediction and shape.predicted > 0
        if chunk.embedding or predicts:  # prediction embeds the tokens behind its own, with a copy
            total += embedding(shape)
        for index in chunk.layers:
            total += layer(shape, shape.moe_layers[index])
        if predicts:
            total += prediction(shape)
        if chunk.loss:
            total += head(shape, has_embedding=chunk.embedding or predicts)
        # Prediction starts behind the last norm, which is then where the last layer is.
        if shape.predicted and shape.layers - 1 in chunk.layers and not chunk.loss:
            total += Parameters(whole=shape.norm_vectors * shape.width)
        elif shape.predicted and chunk.loss and shape.layers - 1 not in chunk.layers:
            total += Parameters(whole=-shape.norm_vectors * shape.width)
        chunks.append(total.on_a_rank(layout))
    return chunks
