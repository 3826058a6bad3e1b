"""Model of the bytes that residual connections move through device memory: residual, Frac- and Hyper-Connections.

What stands between sub-layers is counted, with the norm at a sub-layer's input: a sub-layer's own work is the same
under every connection. Every operation reads its inputs and writes its outputs once, as the counters of
`megatron_fc.profiling.counters` have it, against which tests hold these formulas. Dropout and biases are off.

The unit of the formulas is a row, the d elements of a token in the dtype of the stream. Beside rows there are terms in
fp32: beta (m values per token), alpha (m*m), and once per call the parameters, in backward their gradients too. Here
are the schemes of fused operations; `megatron_fc.connections.costs.eager_traffic` has those of unfused torch.
"""

from dataclasses import dataclass
from typing import Self

from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.connections.config import FracConfig, HyperConfig

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
    """Bytes of a connection on a stream: of its terms per token, and of its parameters."""

    beta: int
    alpha: int
    parameters: int

    @classmethod
    def of(cls, stream: Stream, config: ConnectionConfig) -> Self:
        return cls(beta_bytes(config), FP32 * config.slots**2, FP32 * config.parameter_count(stream.width))


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


# Frac-Connections in fused operations.


def width(stream: Stream, config: FracConfig) -> Moves:
    """Width connection: reads h, writes x, beta, alpha; backward reads g_x, g of the mixed residual and of beta, h.

    It writes the whole gradient of h: 2 and 4 rows. Keeps h.
    """
    row, site = stream.row, Site.of(stream, config)
    p = site.parameters
    return Moves(
        Traffic(row, row + site.beta + site.alpha, p),
        Traffic(3 * row + site.beta, row, p, p),
        row,
    )


def width_norm(stream: Stream, config: FracConfig) -> Moves:
    """`width` with the sub-layer's norm in the same pass: the same rows, and the norm's weights."""
    weights = Moves(Traffic(0, 0, stream.norm), Traffic(0, 0, stream.norm, stream.norm))
    return width(stream, config) + weights


def depth(stream: Stream, config: FracConfig) -> Moves:
    """Depth connection: reads o, h, beta, alpha, writes h'; backward reads g and o, beta, writes g_o, g of beta.

    3 and 3 rows. Keeps o and beta.
    """
    row, site = stream.row, Site.of(stream, config)
    return Moves(
        Traffic(2 * row + site.beta + site.alpha, row),
        Traffic(2 * row + site.beta, row + site.beta),
        row + site.beta,
    )


def boundary(stream: Stream, config: FracConfig) -> Moves:
    """Depth connection and the next `width_norm` in one pass, in which h' is not read again.

    Forward reads o and h, writes h' and x: 4 rows. Backward reads g_x, g of the next mixed residual, h' and o, writes
    the gradients of h and of o: 6 rows. The terms and what is kept are those of the two.
    """
    # h' in forward; in backward depth's g, which is made on the way.
    not_read = Moves(Traffic(-stream.row), Traffic(-stream.row))
    return depth(stream, config) + width_norm(stream, config) + not_read


def frac_boundary(stream: Stream, config: FracConfig) -> Moves:
    """A layer alone as the kernels run it: width, boundary, depth: 9 + 13 rows."""
    return width_norm(stream, config) + boundary(stream, config) + depth(stream, config)


def frac_across(stream: Stream, config: FracConfig) -> Moves:
    """A layer after another, with which it meets in a boundary of their own: 8 + 12 rows."""
    return boundary(stream, config) * 2


def frac_in_a_row(stream: Stream, config: FracConfig, layers: float) -> Moves:
    """The average of so many layers in a row on a device: all but the first meet the one before them."""
    return frac_boundary(stream, config) * (1 / layers) + frac_across(stream, config) * (1 - 1 / layers)


def frac_two_operations(stream: Stream, config: FracConfig) -> Moves:
    """A layer without the boundary: width and depth connection, twice: 10 + 14 rows."""
    return (width_norm(stream, config) + depth(stream, config)) * 2


def frac_pure(stream: Stream, config: FracConfig) -> Moves:
    """A layer whose norm slots return x alone, without hand-over: 12 + 24 rows.

    The depth connection finds beta and alpha from h anew: 1 row, and in backward g of the mixed residual and h in, a
    gradient of h out, 3 rows. The width connection's backward has no mixed residual then: 3 rows in place of 4. The
    two gradients of h, and those of the parameters, are summed by autograd. Megatron's selective recompute of
    `layernorm` takes this form, and runs the width connection once more in backward: 4 rows per layer on top.
    """
    row, site = stream.row, Site.of(stream, config)
    p = site.parameters
    once_more = Moves(
        Traffic(row, site.beta + site.alpha, p),
        Traffic(2 * row + site.beta, row, p, p),
    )
    without_mixed = Moves(Traffic(), Traffic(-row - site.beta))
    parameter_sums = Moves(Traffic(), Traffic(0, 0, 2 * p, p))
    half = width_norm(stream, config) + without_mixed + once_more + depth(stream, config)
    return (half + gradient_sum(stream) + parameter_sums) * 2


# Hyper-Connections.


def hyper_ideal(stream: Stream, config: HyperConfig) -> Moves:
    """A layer of Hyper-Connections, n streams, every tensor moved once: computed, no implementation is known to do it.

    Per sub-layer one pass as `boundary`: forward reads n streams and o, writes n streams and x, 2n+2 rows; backward
    reads g_x, n gradients, n streams and o, writes n gradients and g_o, 3n+3 rows. At n = 4: 20 + 30 rows per layer.
    Terms that are not rows are left out. Kept: n streams and o.
    """
    row, n = stream.row, config.slots
    half = Moves(Traffic((n + 1) * row, (n + 1) * row), Traffic((2 * n + 2) * row, (n + 1) * row), (n + 1) * row)
    return half * 2
