"""Model of the bytes that unfused torch moves for Frac- and Hyper-Connections: one operation, one pass over memory.

Follows the operations of `connections.eager`, `connections.reference` under autograd and `HyperConnection`. Beside the
stream's rows there are rows of d in fp32, in which Frac-Connections compute: `wide`, a row for an fp32 stream, two
for bf16. The terms per token are one fraction's scalar each (`one`: m), one matrix (`matrix`: m*m), or all k = 2m+1
coefficients of m fractions (`all`: k*m).
"""

from dataclasses import dataclass

from megatron_fc.connections.config import FracConfig, HyperConfig
from megatron_fc.connections.costs.traffic import FP32, Moves, Stream, Traffic, gradient_sum, norm

INDEX = 8  # bytes of an int64


@dataclass(frozen=True)
class _Sizes:
    """Bytes per token of what passes through memory; `weight` is once, the projection [k, c]."""

    row: int
    wide: int
    one: int
    matrix: int
    all: int
    weight: int

    @classmethod
    def of(cls, stream: Stream, config: FracConfig) -> "_Sizes":
        m, k = config.rate, 2 * config.rate + 1
        return cls(stream.row, FP32 * stream.width, FP32 * m, FP32 * m * m, FP32 * k * m, FP32 * k * stream.width // m)

    @property
    def upcast(self) -> Traffic:
        """Of a row to fp32, where it is not fp32 already."""
        return Traffic(self.row, self.wide) if self.row < self.wide else Traffic()

    @property
    def downcast(self) -> Traffic:
        """Of a row from fp32."""
        return Traffic(self.wide, self.row) if self.row < self.wide else Traffic()


# The torch backend, megatron_fc/connections/eager.py.


def frac_torch(stream: Stream, config: FracConfig) -> Moves:
    """A layer of the torch backend: in fp32 and at m = 4 about 24 + 58 rows of DFC, terms included."""
    return _torch_site(stream, config) * 2


def _torch_site(stream: Stream, config: FracConfig) -> Moves:
    width = Moves(_torch_width_forward(stream, config), _torch_width_backward(stream, config), stream.row)
    return width + norm(stream) + _torch_depth(stream, config)


def _torch_width_forward(stream: Stream, config: FracConfig) -> Traffic:
    """h is read for the norm's statistics, for the projection and for the mixing, which writes x.

    Then coefficients: tanh's three passes, beta, and gamma and alpha, copied out of the projection's layout.
    """
    s = _Sizes.of(stream, config)
    if not config.dynamic:
        coefficients = Traffic(0, s.one + 2 * s.matrix)
    else:
        # The static part is added to all; then beta, gamma and alpha are copied out.
        coefficients = Traffic(s.all, s.all) * 2
        coefficients += _torch_prediction(stream, config)
    return s.upcast + coefficients + _mixing(s, config.rate, config.rate) + s.downcast


def _torch_prediction(stream: Stream, config: FracConfig) -> Traffic:
    """`_predict`: statistics of every fraction (norm, then four passes over a scalar), projection, scaling, tanh.

    Layernorm centres the rows before: two more reads and a write.
    """
    s = _Sizes.of(stream, config)
    total = Traffic(s.wide, s.all, s.weight, 0)
    if config.norm != "none":
        total += Traffic(s.wide, s.one) + Traffic(s.one, s.one) * 4 + Traffic(s.all + s.one, s.all)
        total += Traffic(0, 0, s.weight, s.weight)
    if config.norm == "layernorm":
        total += Traffic(2 * s.wide + s.one, s.wide + s.one)
    if config.tanh:
        total += Traffic(s.all, s.all) * 3
    return total


def _torch_width_backward(stream: Stream, config: FracConfig) -> Traffic:
    """g_x and g_mixed are laid side by side: 2 read, 2 written. Their products with h, 3 read, are the coefficients'.

    Coefficients are computed again (2 reads of h), and the mixing of both gradients reads 2 and writes the gradient of
    h. Prediction's own backward adds to that twice, once through the norm (2 read, 1 written) and once through the
    projection (1 and 1), and reads h for the projection's gradient.
    """
    s = _Sizes.of(stream, config)
    total = s.upcast + Traffic(2 * s.row, 2 * s.wide)
    total += Traffic(3 * s.wide, 2 * s.matrix)  # products
    total += Traffic(s.one + 2 * s.matrix, s.all) + Traffic(s.all, 0)  # laid out as predicted; summed for the statics
    total += _mixing(s, config.rate, 2 * config.rate) + s.downcast
    if not config.dynamic:
        return total + Traffic(0, 2 * s.matrix)
    total += Traffic(s.all, s.all) + Traffic(2 * s.matrix, 2 * s.matrix) + _torch_prediction(stream, config)
    if config.tanh or config.scale:
        total += Traffic(2 * s.all, s.all)
    if config.scale:
        total += Traffic(s.all, 0) + Traffic(s.all, s.all)
    if config.tanh:
        total += Traffic(3 * s.all, s.all)
    if config.norm != "none":
        total += Traffic(s.all + s.one, s.all) + Traffic(2 * s.all, s.all) + Traffic(s.all, s.one)
        total += Traffic(3 * s.one, 2 * s.one)
        total += Traffic(2 * s.wide + s.one, s.wide) + Traffic(0, 0, 3 * s.weight, 2 * s.weight)
    total += Traffic(s.wide + s.all, s.wide, s.weight, 0)
    return total + Traffic(s.wide + s.all, 0, 0, s.weight)


def _torch_depth(stream: Stream, config: FracConfig) -> Moves:
    """Forward mixes h (1 read, 1 written) and adds beta*o in place (2 and 1).

    Backward multiplies g and o (2 and 1), sums that (1), and multiplies g and beta (1 and 1).
    """
    s = _Sizes.of(stream, config)
    forward = s.upcast + Traffic(s.matrix, s.matrix) + _mixing(s, config.rate, config.rate)
    forward += Traffic(s.wide + s.row + s.one, s.wide) + s.downcast
    backward = s.upcast + Traffic(s.wide + s.row, s.wide) + Traffic(s.wide, s.one)
    backward += Traffic(s.wide + s.one, s.wide) + s.downcast
    return Moves(forward, backward, s.row + s.one)


def _mixing(s: _Sizes, outputs: int, inputs: int) -> Traffic:
    """`_mix`, a bag of rows per output: reads rows and weights, the number of every row and the start of every bag."""
    share = inputs * s.one // FP32 // (s.one // FP32) ** 2  # of inputs in multiples of m
    numbers = INDEX * outputs * (inputs + 1)
    return Traffic(share * (s.wide + s.matrix) + numbers, s.wide)


# The readable reference under autograd, megatron_fc/connections/reference.py.


def frac_reference(stream: Stream, config: FracConfig) -> Moves:
    """A layer of `megatron_fc.connections.reference`: in fp32, 50 + 82 rows of DFC and 40 + 56 of SFC, terms left out.

    Width: DFC norms every fraction (1 read, 1 written), projects (1) and mixes (1 and 1); SFC mixes with copies around
    the product (3 and 3). Backward of the mixing reads 3 and writes 1, of the projection reads 1 and writes 1, of the
    norm reads 2 and writes 1, and the two gradients of h are summed. Depth norms and projects twice, for beta and for
    alpha, multiplies beta and o (1 and 1), mixes, and adds (2 and 1); its backward likewise, beta*o's reading 4 and
    writing 2. Width and depth both take h, whose gradients are summed. In 16 bits, h, o and results are converted.

    Predicted coefficients pass through memory for tanh, scale, the static part and their use. Backward goes through
    the same, reads twice for each gradient of a parameter (product and sum), and twice for the projection's.

    Kept: h and o, what was normed and its statistics, the coefficients in use and, for tanh and scale, as predicted.
    """
    s = _Sizes.of(stream, config)
    wide, predicted = s.wide, 1 if config.dynamic else 0
    normed = predicted if config.norm != "none" else 0
    if config.dynamic:
        mixing = Moves(Traffic(wide, wide), Traffic(3 * wide, wide))
    else:
        mixing = Moves(Traffic(3 * wide, 3 * wide), Traffic(5 * wide, 3 * wide))
    prediction = Moves(
        Traffic((normed + predicted) * wide, normed * wide),
        Traffic((2 * normed + 3 * predicted) * wide, (normed + 2 * predicted) * wide),
        normed * (wide + 2 * s.one),
    )
    passes = predicted * (1 + config.tanh + config.scale)
    coefficients = Moves(
        Traffic(passes + predicted, passes + predicted),
        Traffic(5 * predicted + 4 * config.scale * predicted + 2 * config.tanh * predicted, passes + 2 * predicted),
        predicted + (config.tanh or config.scale) * predicted,
    )
    kept = Moves(Traffic(), Traffic(), wide)
    # DFC of an fp32 stream keeps h itself, once; otherwise each product keeps its own copy of it.
    kept_again = Moves(Traffic(), Traffic()) if config.dynamic and s.row == wide else kept
    width = mixing + prediction + kept + Moves(s.upcast + s.downcast, s.upcast + s.downcast)
    # The sum of o's and h's part takes the mixed rows as they lie, without SFC's last copy.
    uncopied = Moves(Traffic() if config.dynamic else Traffic(-wide, -wide), Traffic())
    update = Moves(Traffic(wide, wide) + Traffic(2 * wide, wide), Traffic(4 * wide, 2 * wide), wide)
    depth = mixing + uncopied + prediction * 2 + kept_again + update
    width, depth = width + coefficients * s.matrix, depth + coefficients * (s.matrix + s.one)
    depth += Moves(s.upcast * 2 + s.downcast, s.upcast + s.downcast * 2)
    return (width + norm(stream) + depth + gradient_sum(stream)) * 2


# Hyper-Connections, megatron_fc/connections/hyper.py.


def hyper_unfused(stream: Stream, config: HyperConfig) -> Moves:
    """A layer of `HyperConnection` under autograd, with a norm: at n = 4, 80 + 178 rows of DHC, terms left out.

    Per sub-layer, forward: norm (n read, n written), projection (n), mixing (n and n+1), beta*o (1 and n), sum (2n and
    n). Backward: x's gradient joins the streams' (n+1 and n+1), the mixing's two products (2n+1, and n+1 and n); of
    beta*o, g*o (n+1 and n), its sum (n), g*beta (n and n), its sum (n and 1); projection (n and n, the gradient of its
    weights included); norm (2n and n); the sum of its gradient and the mixing's (2n and n). Kept: the streams, normed
    too, what was mixed, of which x is a part that the sub-layer's norm keeps, and o. Where the norm and the projection
    are one pass, as in published counts of 8n+2 rows forward, n fewer are read and written.
    """
    row, n = stream.row, config.slots
    p = 1 if config.dynamic else 0
    forward = Traffic(((2 * p + 3) * n + 1) * row, (p * n + 3 * n + 1) * row)
    backward = Traffic(((5 * p + 8) * n + 4) * row, ((3 * p + 4) * n + 2) * row)
    if n == 1:  # there is nothing to sum for g_o
        backward += Traffic(-row, -row)
    saved = ((2 + p) * n + 1) * row
    return (Moves(forward, backward, saved) + norm(stream)) * 2
