"""Model of the bytes that residual connections move through device memory: residual, and the family of connections.

What stands between sub-layers is counted, with the norm at a sub-layer's input: a sub-layer's own work is the same
under every connection. Every operation reads its inputs and writes its outputs once, as the counters of
`megatron_fc.profiling.counters` have it, against which tests hold these formulas. Dropout and biases are off.

The unit of the formulas is a row, the d elements of a token in the dtype of the stream. Beside rows there are terms in
fp32: beta (n values per token), alpha (n*n), and once per call the parameters, in backward their gradients too. Here
are the schemes of fused operations; `megatron_fc.connections.costs.eager_traffic` has those of unfused torch.
"""

from dataclasses import dataclass
from typing import Self

from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.connections.config import HyperConfig

FP32 = 4  # bytes


@dataclass(frozen=True)
class Stream:
    """A residual stream.

    Attributes:
        width: d.
        element_bytes: of its dtype, 2 for bf16.
        norm_parameters: of the sub-layer's norm, in rows: 1 for RMSNorm (weight), 2 for LayerNorm (weight and bias);
            per token it keeps as many fp32 statistics.
    """

    width: int
    element_bytes: int = 2
    norm_parameters: int = 1

    @property
    def row(self) -> int:
        """Bytes of a token's d elements."""
        return self.width * self.element_bytes

    @property
    def norm(self) -> int:
        """Bytes of the norm's parameters."""
        return self.norm_parameters * self.row

    @property
    def statistics(self) -> int:
        """Bytes per token that the norm keeps beside its input."""
        return self.norm_parameters * FP32


@dataclass(frozen=True)
class Traffic:
    """Bytes read and written, of every token and once per call however many tokens there are."""

    read_bytes_per_token: float = 0
    written_bytes_per_token: float = 0
    read_bytes_per_call: float = 0
    written_bytes_per_call: float = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __mul__(self, times: float) -> "Traffic":
        return Traffic(*(times * a for a in vars(self).values()))

    def read_bytes(self, tokens: int) -> float:
        """Of one call on a micro-batch of `tokens`."""
        return tokens * self.read_bytes_per_token + self.read_bytes_per_call

    def written_bytes(self, tokens: int) -> float:
        """Of one call on a micro-batch of `tokens`."""
        return tokens * self.written_bytes_per_token + self.written_bytes_per_call

    def total_bytes(self, tokens: int) -> float:
        """Read and written, of one call on a micro-batch of `tokens`."""
        return self.read_bytes(tokens) + self.written_bytes(tokens)


@dataclass(frozen=True)
class Moves:
    """What an operation, a sub-layer's connection or a layer's two connections move.

    Attributes:
        saved_bytes_per_token: kept from forward to backward.
    """

    forward: Traffic
    backward: Traffic
    saved_bytes_per_token: float = 0

    def __add__(self, other: "Moves") -> "Moves":
        saved = self.saved_bytes_per_token + other.saved_bytes_per_token
        return Moves(self.forward + other.forward, self.backward + other.backward, saved)

    def __mul__(self, times: float) -> "Moves":
        return Moves(self.forward * times, self.backward * times, self.saved_bytes_per_token * times)

    def step_bytes(self, tokens: int, micro_batches: int = 1, layers: int = 1, recompute: bool = False) -> float:
        """Bytes of a training step, where these are a layer's.

        Args:
            tokens: of a micro-batch, on this device.
            micro_batches: of a step.
            layers: on this device.
            recompute: every layer's forward pass runs once more in backward (full recompute).
        """
        forward, backward = self.forward.total_bytes(tokens), self.backward.total_bytes(tokens)
        return micro_batches * layers * ((2 if recompute else 1) * forward + backward)


def beta_bytes(config: ConnectionConfig) -> int:
    """Per token, of what a depth connection keeps for backward beside streams: beta, a value per slot."""
    return FP32 * config.slots


@dataclass(frozen=True)
class Site:
    """Bytes of a connection: of its stream and of its terms, per token, and of its parameters.

    Attributes:
        stream: n*c elements, r = n/m rows.
    """

    stream: int
    beta: int
    alpha: int
    parameters: int

    @classmethod
    def of(cls, stream: Stream, config: ConnectionConfig) -> Self:
        width = config.stream_width(stream.width) * stream.element_bytes
        return cls(width, beta_bytes(config), FP32 * config.slots**2, FP32 * config.parameter_count(stream.width))


# Residual connections.


def norm(stream: Stream) -> Moves:
    """A norm in one kernel: reads h, writes x; backward reads g_x and h, writes the gradient of h. Keeps h.

    2 rows and 3 rows.
    """
    row, weights, statistics = stream.row, stream.norm, stream.statistics
    return Moves(
        Traffic(row, row + statistics, weights),
        Traffic(2 * row + statistics, row, weights, weights),
        row + statistics,
    )


def bias_dropout_add(stream: Stream) -> Moves:
    """h' = h + o: reads both, writes one, 3 rows. Backward is nothing: the gradient of both is that of h'."""
    return Moves(Traffic(2 * stream.row, stream.row), Traffic())


def gradient_sum(stream: Stream) -> Moves:
    """What autograd adds where a stream has two consumers: reads two gradients, writes one, 3 rows of backward."""
    return Moves(Traffic(), Traffic(2 * stream.row, stream.row))


def residual(stream: Stream) -> Moves:
    """A layer of Megatron's default path: norm, bias-dropout-add, the sum of their gradients, twice: 10 + 12 rows."""
    return (norm(stream) + bias_dropout_add(stream) + gradient_sum(stream)) * 2


def fused_residual_norm(stream: Stream) -> Moves:
    """The norm of `fused_residual_rmsnorm`, whose backward also takes the residual's gradient: 2 and 4 rows."""
    plain = norm(stream)
    return Moves(plain.forward, plain.backward + Traffic(stream.row), plain.saved_bytes_per_token)


def fused_residual(stream: Stream) -> Moves:
    """A layer of Megatron with `fused_residual_rmsnorm`: no sum of gradients is left, 10 + 8 rows."""
    return (fused_residual_norm(stream) + bias_dropout_add(stream)) * 2


# Connections in fused operations: rows of n slots of width d/m, r = n/m. Frac-Connections have r = 1.


def width(stream: Stream, config: ConnectionConfig) -> Moves:
    """Width connection: reads h, writes x, beta, alpha; backward reads g_x, g of the mixed residual and of beta, h.

    It writes the whole gradient of h: r + 1 and 3r + 1 rows. Keeps h.
    """
    row, site = stream.row, Site.of(stream, config)
    p = site.parameters
    return Moves(
        Traffic(site.stream, row + site.beta + site.alpha, p),
        Traffic(2 * site.stream + row + site.beta, site.stream, p, p),
        site.stream,
    )


def width_norm(stream: Stream, config: ConnectionConfig) -> Moves:
    """`width` with the sub-layer's norm in the same pass: the same rows, and the norm's weights."""
    weights = Moves(Traffic(0, 0, stream.norm), Traffic(0, 0, stream.norm, stream.norm))
    return width(stream, config) + weights


def depth(stream: Stream, config: ConnectionConfig) -> Moves:
    """Depth connection: reads o, h, beta, alpha, writes h'; backward reads g and o, beta, writes g_o, g of beta.

    2r + 1 and r + 2 rows. Keeps o and beta.
    """
    row, site = stream.row, Site.of(stream, config)
    return Moves(
        Traffic(site.stream + row + site.beta + site.alpha, site.stream),
        Traffic(site.stream + row + site.beta, row + site.beta),
        row + site.beta,
    )


def boundary(stream: Stream, config: ConnectionConfig) -> Moves:
    """Depth connection and the next `width_norm` in one pass, in which h' is not read again.

    Forward reads o and h, writes h' and x: 2r + 2 rows. Backward reads g_x, g of the next mixed residual, h' and o,
    writes the gradients of h and of o: 3r + 3 rows. The terms and what is kept are those of the two.
    """
    # h' in forward; in backward depth's g, which is made on the way.
    once = Traffic(-Site.of(stream, config).stream)
    return depth(stream, config) + width_norm(stream, config) + Moves(once, once)


def mixing(stream: Stream, config: ConnectionConfig) -> Moves:
    """A width connection whose coefficients are given, with the sub-layer's norm in the same pass.

    The rows of `width`; gamma comes in, in backward gamma and alpha, whose gradients go out.
    """
    row, site = stream.row, Site.of(stream, config)
    gamma = FP32 * config.slots * config.fractions
    return Moves(
        Traffic(site.stream + gamma, row, stream.norm),
        Traffic(2 * site.stream + row + gamma + site.alpha, site.stream + gamma + site.alpha, stream.norm, stream.norm),
        site.stream,
    )


def layer_alone(stream: Stream, config: ConnectionConfig) -> Moves:
    """A layer alone as kernels run it: width, boundary, depth: 5r + 4 and 7r + 6 rows, of FC 9 + 13."""
    return width_norm(stream, config) + boundary(stream, config) + depth(stream, config)


def layer_across(stream: Stream, config: ConnectionConfig) -> Moves:
    """A layer after another, with which it meets in a boundary of their own: 4r + 4 and 6r + 6 rows, of FC 8 + 12."""
    return boundary(stream, config) * 2


def layers_in_a_row(stream: Stream, config: ConnectionConfig, layers: float) -> Moves:
    """The average of so many layers in a row on a device: all but the first meet the one before them."""
    return layer_alone(stream, config) * (1 / layers) + layer_across(stream, config) * (1 - 1 / layers)


def layer_in_two_operations(stream: Stream, config: ConnectionConfig) -> Moves:
    """A layer without the boundary: width and depth connection, twice: 6r + 4 and 8r + 6 rows, of FC 10 + 14."""
    return (width_norm(stream, config) + depth(stream, config)) * 2


def layer_pure(stream: Stream, config: ConnectionConfig) -> Moves:
    """A layer whose norm slots return x alone, without hand-over: 8r + 4 and 18r + 6 rows, of FC 12 + 24.

    The depth connection finds beta and alpha from h anew: r rows, and in backward g of the mixed residual and h in, a
    gradient of h out, 3r rows. The width connection's backward has no mixed residual then: 2r + 1 rows in place of
    3r + 1. The two gradients of h, and those of the parameters, are summed by autograd. Megatron's selective recompute
    of `layernorm` takes this form, and runs the width connection once more in backward: 2r + 2 rows per layer on top.
    """
    site = Site.of(stream, config)
    p, r = site.parameters, site.stream / stream.row
    once_more = Moves(
        Traffic(site.stream, site.beta + site.alpha, p),
        Traffic(2 * site.stream + site.beta, site.stream, p, p),
    )
    without_mixed = Moves(Traffic(), Traffic(-site.stream - site.beta))
    parameter_sums = Moves(Traffic(), Traffic(0, 0, 2 * p, p))
    half = width_norm(stream, config) + without_mixed + once_more + depth(stream, config)
    return (half + gradient_sum(stream) * r + parameter_sums) * 2


def enter(stream: Stream, config: ConnectionConfig) -> Moves:
    """Once per network, r copies of the embedding, whose gradients are summed in one pass; nothing where r = 1."""
    row, wide = stream.row, Site.of(stream, config).stream
    if wide == row:
        return Moves(Traffic(), Traffic())
    return Moves(Traffic(row, wide), Traffic(wide, row))


# Hyper-Connections.


def hyper_ideal(stream: Stream, config: HyperConfig) -> Moves:
    """A layer of Hyper-Connections, n streams, every tensor moved once: computed, no implementation is known to do it.

    The rows of `layer_across`, 20 + 30 at n = 4, without the terms that are not rows. Kept: n streams and o.
    """
    row, n = stream.row, config.slots
    half = Moves(Traffic((n + 1) * row, (n + 1) * row), Traffic((2 * n + 2) * row, (n + 1) * row), (n + 1) * row)
    return half * 2
